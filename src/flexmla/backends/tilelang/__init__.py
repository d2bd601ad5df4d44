"""The TileLang backend: compiles a kernel a shape and tile, keeps it, launches it. Imported only where it is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...shape import MLAShape
from ...tiling import Tiling
from .compile import kernel


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
    batch, _, n_heads, dv = q_nope.shape
    max_len = ckv_cache.shape[1]
    if max_len == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    if kpe_cache is None or q_pe is None:
        shape, q_pe, kpe = MLAShape(n_heads, 1, dv, 0), q_nope, ckv_cache
    else:
        shape = MLAShape(n_heads, kpe_cache.shape[2], dv, kpe_cache.shape[3])
        kpe = kpe_cache.flatten(2)
    chosen = Tiling.from_ints(tuple(tiling))
    run = kernel(shape, chosen, q_nope.dtype)
    workers = chosen.workers
    part = q_nope.new_empty((2 * workers, n_heads, dv))
    part_lse = q_nope.new_empty((2 * workers, n_heads), dtype=torch.float32)
    if seq_lens is None:
        seq_lens = torch.full((batch,), max_len, dtype=torch.int32, device=q_nope.device)
    # the kernel writes dense results; a caller's strided ones are filled from those
    dense_out = out.squeeze(1) if _dense(out) else out.new_empty((batch, n_heads, dv))
    dense_lse = lse.squeeze(2) if _dense(lse) else lse.new_empty((batch, n_heads))
    run(
        _aligned(q_nope.squeeze(1)),
        _aligned(q_pe.squeeze(1)),
        ckv_cache,
        kpe,
        _aligned(seq_lens),
        dense_out,
        dense_lse,
        part,
        part_lse,
        softmax_scale,
        workers,
        chosen.log_merge_ways,
        chosen.log_merge_parts,
    )
    if dense_out.data_ptr() != out.data_ptr():
        out.copy_(dense_out.unsqueeze(1))
    if dense_lse.data_ptr() != lse.data_ptr():
        lse.copy_(dense_lse.unsqueeze(2))


def _dense(result: Tensor) -> bool:
    return result.is_contiguous() and result.data_ptr() % 16 == 0


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where its base or strides are no multiples of 16 bytes. For a call's small inputs."""
    width = tensor.element_size()
    outer = tensor.stride()[:-1]
    if tensor.data_ptr() % 16 == 0 and all(stride * width % 16 == 0 and stride < 2**31 for stride in outer):
        return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)
