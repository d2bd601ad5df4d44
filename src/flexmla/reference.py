"""The oracle: one MLA decode step written as its formulas read. It defines what is correct, and is slow."""

from __future__ import annotations

import torch
from torch import Tensor


def mla_decode(
    q_nope: Tensor,
    q_pe: Tensor | None,
    ckv_cache: Tensor,
    kpe_cache: Tensor | None,
    *,
    seq_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    starts: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    v_cache: Tensor | None = None,
    score_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """What `flexmla.mla_decode` must return for valid arguments, whose shapes and meanings are the same here.

    Args:
        dtype: in which everything is computed and returned.

    Returns:
        `out` `[batch, q_len, n_heads, W or dv]` and `lse` `[batch, n_heads, q_len]`, both `dtype`.
    """
    batch, q_len, n_heads, dv = q_nope.shape
    d_pe = 0 if q_pe is None else q_pe.shape[3]
    value_cache = ckv_cache if v_cache is None else v_cache
    if softmax_scale is None:
        softmax_scale = (dv + d_pe) ** -0.5
    out = torch.zeros(batch, q_len, n_heads, value_cache.shape[2], dtype=dtype, device=q_nope.device)
    lse = torch.full((batch, n_heads, q_len), float("-inf"), dtype=dtype, device=q_nope.device)

    lens = [ckv_cache.shape[1]] * batch if seq_lens is None else seq_lens.tolist()
    firsts = [0] * batch if starts is None else starts.tolist()
    for b, (seq_len, first) in enumerate(zip(lens, firsts, strict=True)):
        tokens = torch.arange(first, max(first, seq_len), device=q_nope.device)
        if len(tokens) == 0:
            continue
        ckv, values = (_gather(cache, b, tokens, block_table).to(dtype) for cache in (ckv_cache, value_cache))
        s = torch.einsum("ihd,td->iht", q_nope[b].to(dtype), ckv)
        if q_pe is not None and kpe_cache is not None:
            kpe = _per_head(_gather(kpe_cache, b, tokens, block_table).to(dtype), n_heads)
            s = s + torch.einsum("ihd,thd->iht", q_pe[b].to(dtype), kpe)
        s = softmax_scale * s
        if score_scale is not None:
            s = s * _per_head(_gather(score_scale, b, tokens, block_table).to(dtype), n_heads).T
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        if causal:
            last = seq_len - q_len + torch.arange(q_len, device=q_nope.device)  # the newest token that a query sees
            s = s.masked_fill(tokens > last[:, None, None], float("-inf"))
        log_sum = torch.logsumexp(s, dim=-1)
        weights = torch.exp(s - log_sum[..., None]).masked_fill(log_sum[..., None] == float("-inf"), 0)
        lse[b] = log_sum.T
        out[b] = torch.einsum("iht,tw->ihw", weights, values)
    return out, lse


def _gather(cache: Tensor, b: int, tokens: Tensor, block_table: Tensor | None) -> Tensor:
    """The given tokens of row b, `[len(tokens), ...]`."""
    if block_table is None:
        return cache[b, tokens]
    page_size = cache.shape[1]
    return cache[block_table[b, tokens // page_size].long(), tokens % page_size]


def _per_head(grouped: Tensor, n_heads: int) -> Tensor:
    """`[tokens, groups, ...]` as `[tokens, n_heads, ...]`: neighbouring heads share a group."""
    return grouped.repeat_interleave(n_heads // grouped.shape[1], 1)
