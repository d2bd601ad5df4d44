"""What a decode kernel is specialised to: the numbers that its pieces share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...shape import BY_TMA, LEAST_PAGE, Specialisation
from ...tiling import Tiling, keys_per_group, overlaid, padded_queries, part_width, rope_tile_width

CHUNK = 128  # columns of a latent tile that are loaded and multiplied apart from others
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}  # as TileLang names them


class Spec(NamedTuple):
    """Sizes that the compiler knows.

    Attributes:
        family: of the kernel.
        n_heads, d_pe: of the shape.
        rep: heads that share a rotary key.
        q_len: query tokens a row.
        dv: columns of a latent.
        width: columns of an output head.
        scale_heads: heads of score_scale, 0 without it.
        softcap: whether scores are capped.
        dtype: TileLang's name of the dtype of queries, caches and outputs.
        vector: elements that a lane of a gathering warp copies at once; 0 where tiles come by TMA.
        stages: tiles of the ring.
        halves: shares of a latent tile's columns that are given back one by one: of each warpgroup of `many_heads`.
        chunks: shares of them that are loaded, and waited for, one by one: of `many_heads` some to each half.
        block_n: tokens of a tile.
        boxes: copies by TMA that a tile's tokens take, each inside one page.
        block_h, block_q: heads and queries of a CTA.
        queries: rows of its query tile, padded.
        n_queries: queries of a batch row.
        groups: head groups.
        parts: CTAs of a cluster, each with its part of all columns.
        k, v, out, rope: columns of a CTA's tiles of latents, separate values (0 without them), outputs and rotary keys
            (0 without them), padded.
        overlaid: whether probabilities of `many_heads` take the place of a tile's rotary keys.
        scales: multipliers of a token that a CTA's heads use.
        streams: whether L2 is told not to keep what was loaded: no other CTA reads it, unless rows share pages.
    """

    family: str
    n_heads: int
    d_pe: int
    rep: int
    q_len: int
    dv: int
    width: int
    scale_heads: int
    softcap: bool
    dtype: str
    vector: int
    stages: int
    halves: int
    chunks: int
    block_n: int
    boxes: int
    block_h: int
    block_q: int
    queries: int
    n_queries: int
    groups: int
    parts: int
    k: int
    v: int
    out: int
    rope: int
    overlaid: bool
    scales: int
    streams: bool


def specialise(wanted: Specialisation, tiling: Tiling) -> Spec:
    """The sizes of a specialisation and tile."""
    shape, dtype, q_len, loader, scoring = wanted
    block_q = tiling.block_h * q_len
    k = part_width(shape.dv, tiling.parts)
    rope = rope_tile_width(shape, tiling.block_h, tiling.parts) if shape.d_pe else 0
    v = 0 if shape.v_width is None else part_width(shape.v_width, tiling.parts)
    heads = scoring.scale_heads
    halves = 2 if tiling.family == "many_heads" else 1
    by_tma = loader in BY_TMA
    return Spec(
        family=tiling.family,
        n_heads=shape.n_heads,
        d_pe=shape.d_pe,
        rep=shape.n_heads // shape.n_rope_heads,
        q_len=q_len,
        dv=shape.dv,
        width=shape.out_width,
        scale_heads=heads,
        softcap=scoring.softcap,
        dtype=DTYPES[dtype],
        vector={"gather": 8, "scalar": 1}.get(loader, 0),
        stages=tiling.stages,
        halves=halves,
        chunks=halves * max(1, k // halves // CHUNK) if halves > 1 and by_tma else 1,
        block_n=tiling.block_n,
        boxes=tiling.block_n // LEAST_PAGE.get(loader, tiling.block_n),
        block_h=tiling.block_h,
        block_q=block_q,
        queries=padded_queries(tiling.family, block_q),
        n_queries=shape.n_heads * q_len,
        groups=-(-shape.n_heads // tiling.block_h),
        parts=tiling.parts,
        k=k,
        v=v,
        out=v or k,
        rope=rope,
        overlaid=overlaid(tiling.family, rope),
        scales=keys_per_group(shape.n_heads, heads, tiling.block_h) if heads else 0,
        streams=tiling.family == "few_heads" and tiling.block_h == shape.n_heads,
    )


class Shared(NamedTuple):
    """A CTA's shared memory; what a kernel does not have is a stand-in.

    Attributes:
        q, q_rope: `[queries, k]` and `[queries, rope]`.
        ckv, kpe, v: `[stages, block_n, ...]`.
        scale: float32 `[stages, block_n, scales]`.
        out: `[queries, out]`; the query tile, which the output passes through, where values are latents.
        full, empty: a barrier a chunk, and a half, of each stage. q_full, q_empty: of the query tile.
    """

    q: Any
    q_rope: Any
    ckv: Any
    kpe: Any
    v: Any
    scale: Any
    out: Any
    full: Any
    empty: Any
    q_full: Any
    q_empty: Any


class Results(NamedTuple):
    """Where results go.

    Attributes:
        out: `[batch, q_len, n_heads, width]`.
        lse: `[batch, n_heads, q_len]`.
        states: partial states `[slots, n_queries, width]`.
        sums: float32 `[sums0 + slots, n_queries]`: log2 of a state's sum of exponentials, from row sums0 on.
        sums0: a row.
    """

    out: Any
    lse: Any
    states: Any
    sums: Any
    sums0: Any
