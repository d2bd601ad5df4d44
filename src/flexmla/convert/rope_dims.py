"""Which rotary dimensions a converted layer keeps: the partial RoPE of MHA2MLA (https://arxiv.org/abs/2502.14837)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

RopeChoice = Literal["high", "low", "uniform", "2-norm"]


def rope_index(
    choice: RopeChoice, *, d_pe: int, head_dim: int, n_kv_heads: int, pair_scores: Tensor | None = None
) -> Tensor:
    """Choose d_pe of the head_dim rotary dimensions of each KV head.

    Frequency `f` in 0..head_dim/2-1 turns the two dimensions `f` and `f + head_dim/2`; such a pair is kept or dropped
    whole.

    - `high` keeps the d_pe/2 fastest frequencies, `low` the slowest, `uniform` every (head_dim / d_pe)-th from the
      fastest on.
    - `2-norm` keeps, for each KV head, the d_pe/2 frequencies with the largest `pair_scores`: the mean of `|q_f| |k_f|`
      bounds what a frequency contributes to the scores.

    Args:
        choice: one of the four names.
        d_pe: rotary dimensions kept in each head: even, 0 to head_dim.
        head_dim: dimensions of a head, even.
        n_kv_heads: number of KV heads.
        pair_scores: `[n_kv_heads, head_dim / 2]`, needed for `2-norm`
            (`flexmla.convert.ActivationStats.pair_scores`).

    Returns:
        int64 `[n_kv_heads, d_pe]`: the kept frequencies in ascending order, then each of them plus head_dim/2, so that
        rotate-half on the kept dimensions pairs them as before.

    Raises:
        ValueError: an unknown choice, an odd or too large d_pe, an odd head_dim, or missing or misshapen pair_scores.
    """
    if choice not in get_args(RopeChoice):
        raise ValueError(f"rope_dims is {choice!r}, expected one of {', '.join(get_args(RopeChoice))}")
    if d_pe % 2 or not 0 <= d_pe <= head_dim:
        raise ValueError(f"d_pe is {d_pe}, expected an even number from 0 to head_dim {head_dim}")
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, expected an even number")
    n_pairs, kept = head_dim // 2, d_pe // 2
    if choice == "2-norm":
        if pair_scores is None:
            raise ValueError(
                "rope_dims '2-norm' needs calibration activations; give some, or take 'high', 'low' or 'uniform'"
            )
        if tuple(pair_scores.shape) != (n_kv_heads, n_pairs):
            raise ValueError(f"pair_scores has shape {list(pair_scores.shape)}, expected {[n_kv_heads, n_pairs]}")
        freqs = pair_scores.topk(kept, dim=-1).indices.sort(dim=-1).values
    else:
        if choice == "high":
            one_head = torch.arange(kept)
        elif choice == "low":
            one_head = torch.arange(n_pairs - kept, n_pairs)
        else:
            one_head = torch.arange(kept) * n_pairs // max(kept, 1)
        freqs = one_head.expand(n_kv_heads, kept)
    return torch.cat([freqs, freqs + n_pairs], dim=-1)


def nope_index(rope_index: Tensor, head_dim: int) -> Tensor:
    """The dimensions of each head that are not in `rope_index`, ascending.

    Args:
        rope_index: int64 `[n_kv_heads, d_pe]`.
        head_dim: dimensions of a head.

    Returns:
        int64 `[n_kv_heads, head_dim - d_pe]`.
    """
    n_kv_heads, d_pe = rope_index.shape
    dropped = torch.ones(n_kv_heads, head_dim, dtype=torch.bool, device=rope_index.device).scatter_(
        1, rope_index, False
    )
    return dropped.nonzero()[:, 1].view(n_kv_heads, head_dim - d_pe)
