"""The TileLang backend: compiles a kernel a shape and tile, keeps it, launches it. Imported only where it is used."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...shape import BY_TMA, LEAST_PAGE, PLAIN, MLAShape, Scoring, Specialisation
from ...tiling import Tiling
from .compile import kernel

LOG_UNPAGED = 30  # of a page that holds any contiguous row


@dataclass(slots=True)  # frozen, it would take a microsecond longer to make
class Launch:
    """A compiled kernel, and what of its arguments follows from the layout of a call's tensors.

    Attributes:
        run: the kernel.
        loader: how it loads tiles, a `Specialisation.loader`.
        workspace: elements of the partial states of all workers and of their sums.
        rest: arguments that are numbers.
        scored: whether scores or values are not plain, and the kernel takes what they are made with.
    """

    run: Any
    loader: str
    workspace: int
    rest: tuple[int, ...]
    scored: bool

    def __call__(
        self,
        q_nope: Tensor,
        q_pe: Tensor | None,
        ckv_cache: Tensor,
        kpe_cache: Tensor | None,
        seq_lens: Tensor,
        block_table: Tensor | None,
        starts: Tensor | None,
        v_cache: Tensor | None,
        score_scale: Tensor | None,
        softmax_scale: float,
        softcap: float,
        out: Tensor,
        lse: Tensor,
        workspace: Tensor,
    ) -> None:
        """Launches it; every tensor is as `launcher` asks, and the workspace of q_nope's dtype."""
        if block_table is None:
            if self.loader == "contiguous":
                block_table = seq_lens  # a stand-in that nothing reads
            else:
                block_table = torch.arange(q_nope.shape[0], dtype=torch.int32, device=q_nope.device).unsqueeze(1)
        if kpe_cache is None:
            kpe_cache = ckv_cache  # a stand-in, as for q_pe
        elif kpe_cache.shape[2] == 1:
            if kpe_cache.stride(2) != kpe_cache.shape[3]:  # any number is right for one key, but not for TMA
                kpe_cache = kpe_cache.squeeze(2).unsqueeze(2)
        elif self.loader in BY_TMA:
            kpe_cache = kpe_cache.flatten(2)
        scoring: tuple[Any, ...] = ()
        if self.scored:
            inner_scale, softmax_scale = (softmax_scale / softcap, softcap) if softcap else (1.0, softmax_scale)
            v_cache, score_scale = (ckv_cache if x is None else x for x in (v_cache, score_scale))
            scoring = v_cache, score_scale, inner_scale
        self.run(
            q_nope,
            q_nope if q_pe is None else q_pe,
            ckv_cache,
            kpe_cache,
            seq_lens,
            seq_lens if starts is None else starts,
            block_table,
            out,
            lse,
            workspace,
            softmax_scale,
            *self.rest,
            *scoring,
        )


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
    capacity = _capacity(ckv_cache, block_table)
    if capacity == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    launch = _launch(q_nope, ckv_cache, kpe_cache, block_table, starts, v_cache, score_scale, softcap, causal, tiling)
    if seq_lens is None:
        seq_lens = torch.full(q_nope.shape[:1], capacity, dtype=torch.int32, device=q_nope.device)
    if block_table is not None and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    if softmax_scale <= 0:  # the kernels take the maximum before they scale
        factor = -1 if softmax_scale < 0 else 0
        q_nope, q_pe = q_nope * factor, None if q_pe is None else q_pe * factor
        softmax_scale = -softmax_scale or 1.0
    q_nope, seq_lens = _aligned(q_nope), _aligned(seq_lens)
    q_pe, starts = None if q_pe is None else _copyable(q_pe), None if starts is None else _aligned(starts)
    # the kernel writes dense results; a caller's strided ones are filled from those
    dense_out = out if _is_dense(out) else out.new_empty(out.shape)
    dense_lse = lse if _is_dense(lse) else lse.new_empty(lse.shape)
    launch(
        q_nope, q_pe, ckv_cache, kpe_cache, seq_lens, block_table, starts, v_cache, score_scale, softmax_scale, softcap,
        dense_out, dense_lse, q_nope.new_empty(launch.workspace),
    )  # fmt: skip
    if dense_out is not out:
        out.copy_(dense_out)
    if dense_lse is not lse:
        lse.copy_(dense_lse)


def launcher(
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
    out: Tensor | None,
    lse: Tensor | None,
) -> Launch | None:
    """What runs every call like this one on the current device; None where `decode` has to copy something for it."""
    if q_nope.device.index != torch.cuda.current_device() or _capacity(ckv_cache, block_table) == 0:
        return None
    if seq_lens is None or softmax_scale <= 0 or (block_table is not None and block_table.stride(1) != 1):
        return None
    if not all(x is None or _is_aligned(x) for x in (q_nope, seq_lens, starts)):
        return None
    if q_pe is not None and not _is_copyable(q_pe):
        return None
    if not all(x is None or _is_dense(x) for x in (out, lse)):
        return None
    return _launch(q_nope, ckv_cache, kpe_cache, block_table, starts, v_cache, score_scale, softcap, causal, tiling)


def _capacity(ckv_cache: Tensor, block_table: Tensor | None) -> int:
    """Tokens that a row can hold."""
    pages, page_size, _ = ckv_cache.shape
    return 0 if pages == 0 else page_size if block_table is None else block_table.shape[1] * page_size


def _launch(
    q_nope: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor | None,
    block_table: Tensor | None,
    starts: Tensor | None,
    v_cache: Tensor | None,
    score_scale: Tensor | None,
    softcap: float,
    causal: bool,
    tiling: Sequence[int],
) -> Launch:
    _, q_len, n_heads, dv = q_nope.shape
    n_rope_heads, d_pe = (1, 0) if kpe_cache is None else kpe_cache.shape[2:]
    v_width = None if v_cache is None else v_cache.shape[2]
    scoring = Scoring.of_call(softcap, score_scale)
    loader = _loader(ckv_cache, kpe_cache, v_cache, block_table is not None)
    sizes = (n_heads, n_rope_heads, dv, d_pe, v_width)
    run, workers, *merge = _compiled(sizes, tuple(tiling), q_nope.dtype, q_len, loader, scoring)
    log_page = LOG_UNPAGED if block_table is None else ckv_cache.shape[1].bit_length() - 1
    rest = (int(starts is not None), int(causal), _capacity(ckv_cache, block_table), log_page, workers, *merge)
    workspace = 2 * workers * n_heads * q_len * ((v_width or dv) + 2)  # a sum takes as much as two elements
    return Launch(run, loader, workspace, rest, v_width is not None or scoring != PLAIN)


@functools.lru_cache(maxsize=4096)
def _compiled(
    sizes: tuple[int, int, int, int, int | None],
    tiling: tuple[int, ...],
    dtype: torch.dtype,
    q_len: int,
    loader: str,
    scoring: Scoring,
) -> tuple[Any, int, int, int]:
    """The compiled kernel, and what of the tiling its launch takes."""
    chosen = Tiling.from_ints(tiling)
    run = kernel(Specialisation(MLAShape(*sizes), dtype, q_len, loader, scoring), chosen)
    return run, chosen.workers, chosen.log_merge_ways, chosen.log_merge_parts


def _loader(ckv: Tensor, kpe: Tensor | None, v: Tensor | None, paged: bool) -> str:
    """How tiles can be loaded: a `Specialisation.loader`."""
    steps, places, by_tma = 0, 0, True
    for cache in (ckv, kpe, v):
        if cache is not None:
            page_step, token_step = cache.stride()[:2]
            steps, places = steps | page_step | token_step, places | cache.data_ptr()
            by_tma = by_tma and page_step > 0 < token_step
    if kpe is not None:
        n_rope_heads, d_pe = kpe.shape[2:]
        steps |= d_pe  # a group's keys may begin at any of them
        if n_rope_heads > 1:
            steps |= kpe.stride(2)
            by_tma = by_tma and kpe.stride(2) == d_pe
    if (places | steps * ckv.element_size()) & 15:
        return "scalar"
    if by_tma and not paged:
        return "contiguous"
    return next((loader for loader, least in LEAST_PAGE.items() if by_tma and least <= ckv.shape[1]), "gather")


def _is_dense(result: Tensor) -> bool:
    return result.is_contiguous() and result.data_ptr() % 16 == 0


def _is_aligned(tensor: Tensor) -> bool:
    """Whether base and strides are what TMA takes."""
    *outer, last = tensor.stride()
    width = tensor.element_size()
    steps_fit = all(step * width % 16 == 0 < step < 2**31 for step in outer)
    return steps_fit and last == 1 and tensor.data_ptr() % 16 == 0


def _is_copyable(q_pe: Tensor) -> bool:
    """Whether rotary queries can be copied as the kernels do: in pieces of 16 bytes, or of an element."""
    return q_pe.shape[3] % 8 != 0 or _is_aligned(q_pe)


def _copyable(q_pe: Tensor) -> Tensor:
    return q_pe if _is_copyable(q_pe) else _aligned(q_pe)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that TMA takes. For a call's small inputs."""
    return tensor if _is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)
