"""Random calls of `mla_decode`, for the tests and for `flexmla check`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .api import mla_decode
from .shape import MLAShape, Scoring, Specialisation

GARBAGE_PAGES = (-1, 2147480000)  # what engines leave in the unused entries of a block table


# Page sizes that a loader takes (None: contiguous), and how many elements past a 16-byte boundary the caches begin. In
# this order the draw of `check` gives every loader kernels of both families and of clusters.
LOADERS: dict[str, tuple[tuple[int | None, ...], int]] = {
    "pages_of_16": ((16, 32), 0),
    "contiguous": ((None,), 0),
    "pages": ((64, 128, 256), 0),
    "scalar": ((None, 1, 2, 4, 8, 16, 32, 64, 128, 256), 1),
    "gather": ((1, 2, 4, 8), 0),
}


@dataclass(frozen=True)
class CaseSpace:
    """What `random_case` draws from; narrow it to what a backend takes.

    Attributes:
        page_sizes: tokens a page; None is a contiguous cache.
        max_tokens: the most slots of a contiguous cache, or tokens of all rows of a paged one.
        spreads: standard deviations of the scores, roughly.
        specialisations: where not empty, one of these gives shape, dtype, q_len, layout and options of a case.
        scoring: whether softcap, v_cache and score_scale occur, where no specialisation says it.
        strides: whether views with padded, permuted and merged strides occur.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    n_heads: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 9, 12, 15, 16)
    dv: tuple[int, ...] = (8, 13, 24, 40, 64, 96, 128)
    d_pe: tuple[int, ...] = (0, 5, 8, 16, 32)
    q_len: tuple[int, ...] = (1, 1, 1, 1, 1, 2, 3, 4, 7, 16)
    page_sizes: tuple[int | None, ...] = (None,) * 9 + (1, 2, 4, 8, 16, 32, 64, 128, 256)
    max_batch: int = 4
    max_len: int = 96
    max_tokens: int = 1 << 30
    spreads: tuple[float, ...] = (0.1, 1.0, 1.0, 4.0, 20.0)
    specialisations: tuple[Specialisation, ...] = ()
    scoring: bool = True
    strides: bool = True


@dataclass(frozen=True, eq=False)
class Case:
    """One call of `mla_decode`: tensors, options, and results to write into where given.

    Memory around the visible tokens, in the padding between strides and in given results holds NaN or infinity, and
    unused block-table entries hold numbers of no page.
    """

    seed: int
    q_nope: Tensor
    q_pe: Tensor | None
    ckv_cache: Tensor
    kpe_cache: Tensor | None
    options: dict[str, Any]
    out: Tensor | None = None
    lse: Tensor | None = None

    def decode(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        """`flexmla.mla_decode` of this case; `arguments` are added (backend, plan)."""
        options = {**self.options, "out": self.out, "lse": self.lse, **arguments}
        return mla_decode(self.q_nope, self.q_pe, self.ckv_cache, self.kpe_cache, **options)

    def expected(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """`flexmla.reference.mla_decode` of this case."""
        caches = (self.ckv_cache, self.kpe_cache)
        return reference.mla_decode(self.q_nope, self.q_pe, *caches, **self.options, dtype=dtype)

    @property
    def paged(self) -> bool:
        return "block_table" in self.options

    def describe(self) -> str:
        """The case in one line."""
        batch, q_len, n_heads, dv = self.q_nope.shape
        kpe = self.kpe_cache
        rope = "no rope" if kpe is None else f"{kpe.shape[2]} rope heads of {kpe.shape[3]}"
        parts = [f"{str(self.q_nope.dtype)[6:]}, {n_heads} heads of {dv}, {rope}, batch {batch}, q_len {q_len}"]
        parts.append(f"page_size {self.ckv_cache.shape[1]}" if self.paged else f"max_len {self.ckv_cache.shape[1]}")
        for name, value in self.options.items():
            if name in ("seq_lens", "starts"):
                parts.append(f"{name} {value.tolist()}")
            elif name in ("v_cache", "score_scale"):
                parts.append(f"{name} {value.shape[2]} wide")
            elif name != "block_table":
                parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        parts += [f"{name} given" for name in ("out", "lse") if getattr(self, name) is not None]
        return ", ".join(parts)


def random_case(seed: int, space: CaseSpace | None = None, device: torch.device | str = "cpu") -> Case:
    """The case of a seed: the same numbers on every device.

    Args:
        seed: names the case within `space`.
        space: what to draw from; default everything the torch backend takes.
        device: where the tensors are put.
    """
    space = space or CaseSpace()
    rng = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)
    page_sizes, alignment, shift = space.page_sizes, 1, 0
    if space.specialisations:
        shape, dtype, q_len, loader, scoring = rng.choice(space.specialisations)
        n_heads, groups, dv, d_pe = shape.n_heads, shape.n_rope_heads, shape.dv, shape.d_pe
        page_sizes, shift = LOADERS[loader]
        alignment = 1 if shift else 8
    else:
        dtype, n_heads, dv = rng.choice(space.dtypes), rng.choice(space.n_heads), rng.choice(space.dv)
        d_pe, q_len = rng.choice(space.d_pe), rng.choice(space.q_len)
        groups = rng.choice([g for g in range(1, n_heads + 1) if n_heads % g == 0])
        v_width = rng.choice(space.dv) if space.scoring and rng.random() < 0.3 else None
        scaled = (groups, rng.choice((dtype, torch.float32))) if space.scoring and rng.random() < 0.3 else (0, None)
        shape = MLAShape(n_heads, groups, dv, d_pe, v_width)
        scoring = Scoring(space.scoring and rng.random() < 0.3, *scaled)
    page_size = rng.choice(page_sizes)
    # now and then many rows, longer than a warp is wide
    batch = rng.randint(1, space.max_batch) if rng.random() < 0.9 else rng.randint(1, 50 * space.max_batch)
    poison = rng.choice((float("nan"), float("nan"), float("inf")))

    def lay(values: Tensor, fill: float = poison, alignment: int = 1, shift: int = 0) -> Tensor:
        if not space.strides:
            return values.contiguous().to(device)
        return _lay_out(values, fill, rng, device, alignment, shift)

    def lay_cache(values: Tensor) -> Tensor:
        return lay(values, alignment=alignment, shift=shift)

    options: dict[str, Any] = {}
    max_len = rng.randint(1, max(1, min(space.max_len, space.max_tokens // batch)))
    lens = [_random_len(rng, q_len, max_len) for _ in range(batch)]
    starts = [0] * batch
    if page_size is None and rng.random() < 0.2:
        lens = [max_len] * batch
    else:
        options["seq_lens"] = torch.tensor(lens, dtype=torch.int32)
    if rng.random() < 0.4:
        # From 0 to past the row's end, which leaves the row empty.
        starts = [rng.choice((0, rng.randint(0, n), rng.randint(n, n + 2))) for n in lens]
        options["starts"] = torch.tensor(starts, dtype=torch.int32)
    if rng.random() < 0.25:
        options["causal"] = False
    if scoring.softcap:
        options["softcap"] = rng.choice((5.0, 20.0, 50.0, 1e5))
    if rng.random() < 0.4:
        options["softmax_scale"] = rng.choice((16, 64, 80, 128, 192)) ** -0.5 * rng.choice((1, 1, 1, 1, -1, 0))

    slots, slot_len = batch, max_len
    if page_size is not None:
        options["block_table"], slots = _random_table(rng, lens, starts, page_size)
        slot_len = page_size
    visible = _visible(lens, starts, slots, slot_len, options.get("block_table"))

    def cache(width: int) -> Tensor:
        return torch.randn(slots, slot_len, width, generator=noise).to(dtype).masked_fill(~visible[..., None], poison)

    # Scores of a spread of our choosing, up to where softmax picks one token.
    scale = abs(options.get("softmax_scale", (dv + d_pe) ** -0.5)) or 1.0
    factor = rng.choice(space.spreads) / (scale * math.sqrt(dv + d_pe))
    q = (torch.randn(batch, q_len, n_heads, dv + d_pe, generator=noise) * factor).to(dtype)
    blind = _first_end(lens, q_len, options.get("causal", True)) <= torch.tensor(starts)[:, None]
    q.masked_fill_(blind[:, :, None, None], poison)
    rows = cache(dv + groups * d_pe)
    q_nope, q_pe = _split(q, dv, space.strides and rng.random() < 0.3, lay)
    ckv, kpe = _split(rows, dv, space.strides and rng.random() < 0.3, lay_cache)
    if shape.v_width is not None:
        options["v_cache"] = lay_cache(cache(shape.v_width))
    if scoring.scale_heads:
        factors = 0.5 + torch.rand(slots, slot_len, scoring.scale_heads, generator=noise)
        factors.copysign_(torch.rand(factors.shape, generator=noise) - 0.1)  # a tenth of them negative
        options["score_scale"] = lay(factors.masked_fill(~visible[..., None], poison).to(scoring.scale_dtype))
    for name in ("seq_lens", "starts", "block_table"):
        if name in options:
            options[name] = lay(options[name], GARBAGE_PAGES[1])

    out = lay(torch.full((batch, q_len, n_heads, shape.out_width), poison, dtype=dtype)) if rng.random() < 0.4 else None
    lse = lay(torch.full((batch, n_heads, q_len), poison)) if rng.random() < 0.4 else None
    kpe = None if kpe is None else kpe.unflatten(-1, (groups, d_pe))
    return Case(seed, q_nope, q_pe, ckv, kpe, options, out, lse)


def _random_len(rng: random.Random, q_len: int, max_len: int) -> int:
    """A row's length: often 0, shorter than q_len, or full."""
    kind = rng.random()
    if kind < 0.1:
        return 0
    if kind < 0.2:
        return min(rng.randint(0, q_len), max_len)
    return max_len if kind < 0.35 else rng.randint(1, max_len)


def _random_table(rng: random.Random, lens: list[int], starts: list[int], page_size: int) -> tuple[Tensor, int]:
    """A block table whose unused entries are no pages, and the number of pages of the cache."""
    used = [range(s // page_size, -(-n // page_size)) if s < n else range(0) for n, s in zip(lens, starts, strict=True)]
    columns = max(-(-max(lens) // page_size), 1) + rng.randint(0, 2)
    n_pages = sum(len(pages) for pages in used) + rng.randint(1, 3)
    free = rng.sample(range(n_pages), n_pages)
    table = [[free.pop() if c in pages else rng.choice(GARBAGE_PAGES) for c in range(columns)] for pages in used]
    return torch.tensor(table, dtype=torch.int32), n_pages


def _visible(lens: list[int], starts: list[int], slots: int, slot_len: int, table: Tensor | None) -> Tensor:
    """Bool `[slots, slot_len]`: where the cache holds a token that some query sees."""
    visible = torch.zeros(slots, slot_len, dtype=torch.bool)
    for b, (n, start) in enumerate(zip(lens, starts, strict=True)):
        if table is None:
            visible[b, start:n] = True
        elif start < n:
            t = torch.arange(start, n)
            visible[table[b, t // slot_len].long(), t % slot_len] = True
    return visible


def _first_end(lens: list[int], q_len: int, causal: bool) -> Tensor:
    """`[batch, q_len]`: the first token that a query no longer sees."""
    ends = torch.tensor(lens)[:, None].expand(-1, q_len)
    return ends + torch.arange(1 - q_len, 1) if causal else ends


def _split(rows: Tensor, dv: int, merged: bool, lay: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """`[latent | rope]` rows as two tensors: views of one buffer where `merged`, else apart. None for an empty rope."""
    if rows.shape[-1] == dv:
        return lay(rows), None
    if merged:
        rows = lay(rows)
        return rows[..., :dv], rows[..., dv:]
    return lay(rows[..., :dv]), lay(rows[..., dv:])


def _lay_out(
    values: Tensor, fill: float, rng: random.Random, device: torch.device | str, alignment: int, shift: int
) -> Tensor:
    """`values` as a view into a larger buffer full of `fill`, with any strides but the last, which is 1.

    Paddings, and the place of the first element but for `shift`, are multiples of `alignment`.
    """
    outer = values.dim() - 1
    order = rng.sample(range(outer), outer) if rng.random() < 0.3 else list(range(outer))
    sizes = [values.shape[d] + rng.choice((0, 0, 1)) for d in order] + [
        values.shape[-1] + alignment * rng.choice((0, 0, 1, 8))
    ]
    offset = shift + 8 * rng.choice((0, 0, 1, 8)) if alignment > 1 or shift else rng.choice((0, 0, 1, 8))
    buffer = torch.full((offset + math.prod(sizes),), fill, dtype=values.dtype, device=device)
    view = buffer[offset:].view(sizes).permute(*(order.index(d) for d in range(outer)), outer)
    for d, size in enumerate(values.shape):
        view = view.narrow(d, 0, size)
    return view.copy_(values)
