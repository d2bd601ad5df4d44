"""The TileLang backend: compiles a kernel a shape and tile, keeps it, launches it. Imported only where it is used."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...shape import MLAShape
from ...tiling import Tiling
from .compile import kernel

LOG_UNPAGED = 30  # of a page that holds any contiguous row


def decode(
    q_nope: Tensor,
    q_pe: Tensor | None,
    ckv_cache: Tensor,
    kpe_cache: Tensor | None,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
    starts: Tensor | None,
    v_cache: Tensor | None,
    score_scale: Tensor | None,
    softmax_scale: float,
    softcap: float,
    causal: bool,
    tiling: Sequence[int],
    out: Tensor,
    lse: Tensor,
) -> None:
    """Runs a call that `plan.tilelang_lacks` has found nothing against; writes `out` and `lse`."""
    if q_nope.device.index != torch.cuda.current_device():
        # the launch, and the question whether a stream is capturing, go to the current device
        with torch.cuda.device(q_nope.device):
            return decode(
                q_nope, q_pe, ckv_cache, kpe_cache, seq_lens, block_table, starts, v_cache, score_scale,
                softmax_scale, softcap, causal, tiling, out, lse,
            )  # fmt: skip
    batch, q_len, n_heads, dv = q_nope.shape
    page_size = ckv_cache.shape[1]
    capacity = page_size if block_table is None else block_table.shape[1] * page_size
    if capacity == 0 or ckv_cache.shape[0] == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    n_rope_heads, d_pe = (1, 0) if kpe_cache is None else kpe_cache.shape[2:]
    loader = _loader(ckv_cache, kpe_cache, block_table is not None)
    run, workers, log_ways, log_parts = _launch(
        n_heads, n_rope_heads, dv, d_pe, tuple(tiling), q_nope.dtype, q_len, loader
    )
    if seq_lens is None:
        seq_lens = torch.full((batch,), capacity, dtype=torch.int32, device=q_nope.device)
    seq_lens = _aligned(seq_lens)
    log_page = page_size.bit_length() - 1
    if block_table is None:
        log_page = LOG_UNPAGED
        if loader == "contiguous":
            block_table = seq_lens  # a stand-in that nothing reads
        else:
            block_table = torch.arange(batch, dtype=torch.int32, device=q_nope.device).unsqueeze(1)
    elif block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    if softmax_scale <= 0:  # the kernels take the maximum before they scale
        factor = -1 if softmax_scale < 0 else 0
        q_nope, q_pe = q_nope * factor, None if q_pe is None else q_pe * factor
        softmax_scale = -softmax_scale or 1.0
    q_nope = _aligned(q_nope)
    if kpe_cache is None:
        kpe_cache = ckv_cache  # a stand-in, as for q_pe
    elif n_rope_heads == 1:
        if kpe_cache.stride(2) != d_pe:  # any number is right for a dimension of one key, but not for TMA
            kpe_cache = kpe_cache.squeeze(2).unsqueeze(2)
    elif loader in ("contiguous", "pages"):
        kpe_cache = kpe_cache.flatten(2)
    # the kernel writes dense results; a caller's strided ones are filled from those
    dense_out = out if _dense(out) else out.new_empty(out.shape)
    dense_lse = lse if _dense(lse) else lse.new_empty(lse.shape)
    run(
        q_nope,
        q_nope if q_pe is None else _aligned(q_pe),
        ckv_cache,
        kpe_cache,
        seq_lens,
        seq_lens if starts is None else _aligned(starts),
        block_table,
        dense_out,
        dense_lse,
        q_nope.new_empty((2 * workers, n_heads * q_len, dv)),
        q_nope.new_empty((2 * workers, n_heads * q_len), dtype=torch.float32),
        softmax_scale,
        int(starts is not None),
        int(causal),
        capacity,
        log_page,
        workers,
        log_ways,
        log_parts,
    )
    if dense_out is not out:
        out.copy_(dense_out)
    if dense_lse is not lse:
        lse.copy_(dense_lse)


@functools.lru_cache(maxsize=4096)
def _launch(
    n_heads: int,
    n_rope_heads: int,
    dv: int,
    d_pe: int,
    tiling: tuple[int, ...],
    dtype: torch.dtype,
    q_len: int,
    loader: str,
) -> tuple[Any, int, int, int]:
    """The compiled kernel, and what of the tiling its launch takes."""
    chosen = Tiling.from_ints(tiling)
    run = kernel(MLAShape(n_heads, n_rope_heads, dv, d_pe), chosen, dtype, q_len, loader)
    return run, chosen.workers, chosen.log_merge_ways, chosen.log_merge_parts


def _loader(ckv: Tensor, kpe: Tensor | None, paged: bool) -> str:
    """How tiles can be loaded: one of `decode.LOADERS`."""
    page_step, token_step, _ = ckv.stride()
    steps, places, by_tma = page_step | token_step, ckv.data_ptr(), page_step > 0 < token_step
    if kpe is not None:
        page_step, token_step, key_step, _ = kpe.stride()
        n_rope_heads, d_pe = kpe.shape[2:]
        steps, places = steps | page_step | token_step, places | kpe.data_ptr()
        if n_rope_heads > 1:
            steps |= key_step
            by_tma = by_tma and key_step == d_pe
        by_tma = by_tma and page_step > 0 < token_step
    if (places | steps * ckv.element_size()) & 15:
        return "scalar"
    if not by_tma or (paged and ckv.shape[1] < 64):
        return "gather"
    return "pages" if paged else "contiguous"


def _dense(result: Tensor) -> bool:
    return result.is_contiguous() and result.data_ptr() % 16 == 0


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where its base or strides are not what TMA takes. For a call's small inputs."""
    *outer, last = tensor.stride()
    if last == 1 and tensor.data_ptr() % 16 == 0:
        width = tensor.element_size()
        for step in outer:
            if step * width % 16 or not 0 < step < 2**31:
                break
        else:
            return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
