"""Merging the partial results of one attention over disjoint sets of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merges partial attention results over disjoint tokens (split-KV, context parallelism) into one.

        lse = ln sum_k exp(lses[k])          out = sum_k exp(lses[k] - lse) * outs[k]

    (FlashAttention, https://arxiv.org/abs/2205.14135, section 3.1.) A part that saw no token has `lse = -inf` and
    counts for nothing, whatever its `out`; where all parts are such, `out = 0` and `lse = -inf`.

    Args:
        outs: `[n, batch, q_len, n_heads, W]`, float16, bfloat16 or float32.
        lses: float32 `[n, batch, n_heads, q_len]`, natural logarithm; `-inf` (not FlashMLA's `+inf`) marks an
            empty part.

    Returns:
        `out` `[batch, q_len, n_heads, W]` in outs' dtype and `lse` float32 `[batch, n_heads, q_len]`, both computed in
        float32.

    Raises:
        TypeError: an argument that is no tensor, or its dtype.
        ValueError: shapes or devices that do not agree, or n = 0.
    """
    for name, value in (("outs", outs), ("lses", lses)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if outs.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"outs must be float16, bfloat16 or float32, got {outs.dtype}")
    if lses.dtype != torch.float32:
        raise TypeError(f"lses must be torch.float32, got {lses.dtype}")
    if outs.dim() != 5 or outs.shape[0] == 0:
        raise ValueError(f"outs must be [n, batch, q_len, n_heads, W] with n >= 1, got {tuple(outs.shape)}")
    n, batch, q_len, n_heads, _ = outs.shape
    if lses.shape != (n, batch, n_heads, q_len):
        expected = (n, batch, n_heads, q_len)
        raise ValueError(f"lses must be [n, batch, n_heads, q_len] = {expected}, got {tuple(lses.shape)}")
    if lses.device != outs.device:
        raise ValueError(f"lses must be on outs' device {outs.device}, got {lses.device}")

    top = lses.amax(0)
    # All -inf: subtracting the lowest float instead gives exp(-inf) = 0, not NaN.
    weights = (lses - top.clamp_min(torch.finfo(torch.float32).min)).exp()
    total = weights.sum(0)
    share = (weights / total.clamp_min(1.0)).mT.unsqueeze(-1)  # [n, batch, q_len, n_heads, 1]
    out = (share * outs.float()).masked_fill(share == 0, 0.0).sum(0)
    return out.to(outs.dtype), top + total.log()
