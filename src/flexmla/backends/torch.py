"""The PyTorch backend: every combination of the API, on CPU and any GPU.

Tokens are walked in chunks with an online softmax. Only one chunk of the caches is ever held in float32; latents are
never decompressed and rotary keys never expanded to the query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# float32 elements (64 MiB) that a chunk's cache copies and scores may take together; decides the tokens of a chunk.
CHUNK_ELEMENTS = 1 << 24
# Below this many tokens a chunk's launches cost more than its work, so a huge batch exceeds the budget instead.
MIN_CHUNK_TOKENS = 16

_LOWEST = torch.finfo(torch.float32).min


class _Span(NamedTuple):
    """What the host knows of the visible tokens, without asking a GPU."""

    first: int  # no row sees a token before this one
    last: int  # no row sees a token from this one on
    inner_first: int  # from here every row sees the token ...
    inner_last: int  # ... up to here; the last queries of each row do
    causal_last: int  # ... up to here; all queries do


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
    """Writes one decode step into `out` and `lse`; arguments as `flexmla.mla_decode`, already checked there.

    Products are float32 whatever the dtype, so `torch.backends.cuda.matmul.allow_tf32` applies to them.

    Args:
        tiling: unused; every backend takes it.

    Raises:
        ValueError: on CPU, where a value of `seq_lens`, `starts` or `block_table` is out of range. On CUDA they are
            clamped instead, as looking at them would synchronise.
    """
    batch, q_len, n_heads, dv = q_nope.shape
    width = out.shape[3]
    page_size = 1 if block_table is None else ckv_cache.shape[1]
    capacity = _capacity(ckv_cache, block_table)
    if _readable(q_nope) or (seq_lens is None and starts is None):
        span = _host_span(q_len, capacity, seq_lens, starts, causal)
    else:
        seq_lens = None if seq_lens is None else seq_lens.clamp(0, capacity)
        starts = None if starts is None else starts.clamp_min(0)
        span = _Span(0, capacity, capacity, 0, 0)
    if block_table is not None:
        assert seq_lens is not None
        block_table = _used_pages(block_table, seq_lens, starts, page_size, ckv_cache.shape[0])

    if q_pe is not None and kpe_cache is not None:
        groups = kpe_cache.shape[-2]
    else:
        groups = 1 if score_scale is None else score_scale.shape[-1]
    rows = q_len * (n_heads // groups)
    # [batch, groups, q_len * heads of a group, width]: the heads that share a rotary key side by side.
    q = _by_group(q_nope, groups).mul(softmax_scale).reshape(batch, groups * rows, dv)
    q_rope = None if q_pe is None else _by_group(q_pe, groups).mul(softmax_scale)

    copied = dv + (0 if q_pe is None else groups * q_pe.shape[3]) + (0 if v_cache is None else width)
    step = CHUNK_ELEMENTS // (batch * (copied + 2 * groups * rows))
    step = max(step, MIN_CHUNK_TOKENS, page_size) // page_size * page_size

    best: Tensor | None = None
    for t0 in range(span.first // page_size * page_size, span.last, step):
        t1 = min(t0 + step, span.last)
        ckv = _chunk(ckv_cache, block_table, t0, t1, page_size)
        scores = torch.bmm(q, ckv.mT).view(batch, groups, rows, t1 - t0)
        if q_rope is not None and kpe_cache is not None:
            kpe = _chunk(kpe_cache, block_table, t0, t1, page_size)
            scores += torch.matmul(q_rope, kpe.permute(0, 2, 3, 1))
        if score_scale is not None:
            scores *= _chunk(score_scale, block_table, t0, t1, page_size).mT.unsqueeze(2)
        if softcap > 0:
            scores.div_(softcap).tanh_().mul_(softcap)

        values = ckv if v_cache is None else _chunk(v_cache, block_table, t0, t1, page_size)
        ragged = t0 < span.inner_first or t1 > span.inner_last
        if ragged or t1 > span.causal_last:
            hidden = _hidden(t0, t1, q_len, capacity, seq_lens, starts, causal, q.device)
            # Fills, not products: NaN at a hidden token must not survive. Hidden to the last query is hidden to all.
            scores.view(batch, groups, q_len, -1, t1 - t0).masked_fill_(hidden[:, None, :, None], float("-inf"))
            if ragged:
                values = values.masked_fill(hidden[:, -1, :, None], 0.0)

        top = scores.amax(-1, keepdim=True)
        if best is not None:
            top = torch.maximum(top, best)
        # An empty row has top = -inf; subtracting the lowest float instead gives exp(-inf) = 0, not NaN.
        shift = top.clamp_min(_LOWEST)
        weights = scores.sub_(shift).exp_()
        mass = weights.sum(-1, keepdim=True)
        part = torch.bmm(weights.view(batch, groups * rows, t1 - t0), values).view(batch, groups, rows, width)
        if best is None:
            total, acc = mass, part
        else:
            decay = best.sub_(shift).exp_()
            total = total.mul_(decay).add_(mass)
            acc = acc.mul_(decay).add_(part)
        best = top

    if best is None:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    # A row that sees anything has total >= 1, its largest term; an empty one has 0 and keeps acc = 0, top = -inf.
    total.clamp_min_(1.0)
    acc.div_(total)
    per_head = (batch, groups, q_len, n_heads // groups)
    out.view(batch, q_len, groups, n_heads // groups, width).copy_(acc.view(*per_head, width).transpose(1, 2))
    lse.view(batch, groups, n_heads // groups, q_len).copy_(total.log_().add_(best).view(per_head).mT)


def _readable(tensor: Tensor) -> bool:
    """Whether the host may look at values: on a GPU that would synchronise, and break graph capture."""
    return tensor.is_cpu


def _capacity(ckv_cache: Tensor, block_table: Tensor | None) -> int:
    """Tokens a row can hold; 0 where a paged cache has no page."""
    if block_table is None:
        return ckv_cache.shape[1]
    return block_table.shape[1] * ckv_cache.shape[1] if ckv_cache.shape[0] else 0


def _host_span(q_len: int, capacity: int, seq_lens: Tensor | None, starts: Tensor | None, causal: bool) -> _Span:
    """Checks CPU `seq_lens` and `starts` and takes their extremes."""
    shortest = longest = capacity
    if seq_lens is not None:
        lens = seq_lens.tolist()
        shortest, longest = min(lens), max(lens)
        if shortest < 0 or longest > capacity:
            row = lens.index(shortest if shortest < 0 else longest)
            raise ValueError(f"seq_lens[{row}] is {lens[row]}; a row of this cache holds 0 to {capacity} tokens")
    earliest = latest = 0
    if starts is not None:
        firsts = starts.tolist()
        earliest, latest = min(firsts), max(firsts)
        if earliest < 0:
            raise ValueError(f"starts[{firsts.index(earliest)}] is {earliest}; it must be at least 0")
    return _Span(earliest, longest, latest, shortest, shortest - q_len + 1 if causal else shortest)


def _used_pages(block_table: Tensor, seq_lens: Tensor, starts: Tensor | None, page_size: int, n_pages: int) -> Tensor:
    """`block_table` with 0 in every entry that holds no visible token, so that any value may stand there."""
    page = torch.arange(block_table.shape[1], dtype=torch.int32, device=block_table.device)
    used = page * page_size < seq_lens[:, None]
    if starts is not None:
        used &= ((page + 1) * page_size > starts[:, None]) & (starts < seq_lens)[:, None]
    table = block_table.masked_fill(~used, 0)
    last = max(n_pages - 1, 0)
    if not _readable(table):
        return table.clamp(0, last)
    if table.numel() and (int(table.min()) < 0 or int(table.max()) > last):
        row, column = ((table < 0) | (table > last)).nonzero()[0].tolist()
        raise ValueError(f"block_table[{row}, {column}] is {int(table[row, column])} and in use; pages are 0 to {last}")
    return table


def _by_group(q: Tensor, groups: int) -> Tensor:
    """`[batch, q_len, n_heads, d]` to float32 `[batch, groups, q_len * n_heads / groups, d]`."""
    batch, q_len, n_heads, d = q.shape
    q = q.float()
    if q_len == 1 or groups == 1:
        return q.reshape(batch, groups, q_len * n_heads // groups, d)
    return q.reshape(batch, q_len, groups, n_heads // groups, d).transpose(1, 2).reshape(batch, groups, -1, d)


def _chunk(cache: Tensor, block_table: Tensor | None, t0: int, t1: int, page_size: int) -> Tensor:
    """Tokens `t0` to `t1` of every row in float32, `[batch, t1 - t0, ...]`; a view of a contiguous float32 cache."""
    if block_table is None:
        return cache[:, t0:t1].float()
    pages = block_table[:, t0 // page_size : -(-t1 // page_size)]
    tokens = cache.index_select(0, pages.reshape(-1)).view(pages.shape[0], -1, *cache.shape[2:])
    return tokens[:, : t1 - t0].float()


def _hidden(
    t0: int,
    t1: int,
    q_len: int,
    capacity: int,
    seq_lens: Tensor | None,
    starts: Tensor | None,
    causal: bool,
    device: torch.device,
) -> Tensor:
    """Bool `[batch or 1, q_len or 1, t1 - t0]`: true where query i does not see token t."""
    token = torch.arange(t0, t1, dtype=torch.int32, device=device)
    if seq_lens is None:
        end = torch.full((1, 1, 1), capacity, dtype=torch.int32, device=device)
    else:
        end = seq_lens[:, None, None]
    if causal and q_len > 1:
        end = end + torch.arange(1 - q_len, 1, dtype=torch.int32, device=device)[:, None]
    hidden = token >= end
    return hidden if starts is None else hidden | (token < starts[:, None, None])
