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

    for b in range(batch):
        seq_len = ckv_cache.shape[1] if seq_lens is None else int(seq_lens[b])
        start = 0 if starts is None else int(starts[b])
        for i in range(q_len):
            end = seq_len - q_len + i + 1 if causal else seq_len
            tokens = list(range(start, end))
            if not tokens:
                continue
            ckv = _gather(ckv_cache, b, tokens, block_table).to(dtype)
            values = _gather(value_cache, b, tokens, block_table).to(dtype)
            kpe = None if kpe_cache is None else _gather(kpe_cache, b, tokens, block_table).to(dtype)
            scale = None if score_scale is None else _gather(score_scale, b, tokens, block_table).to(dtype)
            for h in range(n_heads):
                s = ckv @ q_nope[b, i, h].to(dtype)
                if q_pe is not None and kpe is not None:
                    s = s + kpe[:, h // (n_heads // kpe.shape[1])] @ q_pe[b, i, h].to(dtype)
                s = softmax_scale * s
                if scale is not None:
                    s = s * scale[:, h // (n_heads // scale.shape[1])]
                if softcap > 0:
                    s = softcap * torch.tanh(s / softcap)
                lse[b, h, i] = torch.logsumexp(s, dim=0)
                out[b, i, h] = torch.softmax(s, dim=0) @ values
    return out, lse


def _gather(cache: Tensor, b: int, tokens: list[int], block_table: Tensor | None) -> Tensor:
    """The given tokens of row b, `[len(tokens), ...]`."""
    if block_table is None:
        return cache[b, tokens]
    page_size = cache.shape[1]
    pages = [int(block_table[b, t // page_size]) for t in tokens]
    return cache[pages, [t % page_size for t in tokens]]
