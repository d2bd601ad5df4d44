"""One attention layer from MHA or GQA to MLA."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .calibrate import ActivationStats
from .rope_dims import RopeChoice, nope_index, rope_index
from .svd import low_rank, whitening_factor
from .weights import AttentionWeights, MLAWeights


@torch.no_grad()
def convert_attention(
    weights: AttentionWeights,
    *,
    rank: int | tuple[int, int],
    d_pe: int,
    rope_dims: RopeChoice | None = None,
    svd: Literal["joint", "split"] = "joint",
    stats: ActivationStats | None = None,
    whiten: bool | None = None,
) -> MLAWeights:
    """Convert a Llama-type attention layer to multi-head latent attention (MHA2MLA, https://arxiv.org/abs/2502.14837).

    d_pe of the D dimensions of each head keep their rotation and their key rows; RoPE is dropped from the others. With
    `K_c [G (D - d_pe), hidden]` the unrotated key rows and `V [G D, hidden]` the value rows,

        joint:  [K_c; V] ~ [U_k; U_v] down_k                     one latent for keys and values
        split:  K_c ~ U_k down_k,   V ~ U_v down_v               one each

    by truncated SVD, plain or weighted by the calibration activations (`flexmla.convert.low_rank`). At full rank the
    result computes exactly the attention with partial RoPE; with d_pe = D too, exactly the original attention.

    Args:
        weights: the original projections.
        rank: width of the latent. With split SVD `(rank_k, rank_v)`, or one number for both.
        d_pe: rotary dimensions kept in each head: even, 0 to head_dim.
        rope_dims: which ones (`flexmla.convert.rope_index`). Default: `2-norm` with stats, else `uniform`.
        svd: `joint` or `split`.
        stats: statistics of calibration activations, needed for `2-norm` and for whitening.
        whiten: weight the SVD by the activations. Default: where stats are given.

    Returns:
        The converted layer in the dtype and on the device of the weights; the factorisation itself runs in float64.

    Raises:
        TypeError: stats that are no ActivationStats.
        ValueError: rank, d_pe, rope_dims or svd outside what is accepted, stats missing where they are needed or of
            another layer, weights that are not finite, or factors that the weights' dtype cannot hold.
    """
    if stats is not None and not isinstance(stats, ActivationStats):
        raise TypeError(f"stats is {type(stats).__name__}, expected ActivationStats")
    if stats is not None and not stats.fits(weights):
        raise ValueError("stats are of a layer with other sizes; gather them with the weights that are converted")
    for name in ("q_proj", "k_proj", "v_proj"):
        if not bool(getattr(weights, name).isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite")
    rank_k, rank_v = check_options(weights, rank=rank, d_pe=d_pe, svd=svd)
    whiten = stats is not None if whiten is None else whiten
    if whiten and stats is None:
        raise ValueError("whiten=True needs calibration activations, but stats is None")

    head_dim, groups = weights.head_dim, weights.n_kv_heads
    choice = rope_dims or ("uniform" if stats is None else "2-norm")
    scores = stats.pair_scores if stats is not None and choice == "2-norm" else None
    rope = rope_index(choice, d_pe=d_pe, head_dim=head_dim, n_kv_heads=groups, pair_scores=scores)
    rope = rope.to(weights.q_proj.device)
    nope = nope_index(rope, head_dim)

    keys = weights.k_proj.view(groups, head_dim, -1)
    key_rows = _take(keys, nope).flatten(0, 1)
    whitening = whitening_factor(stats.covariance) if stats is not None and whiten else None
    down_v = None
    if svd == "joint":
        up, down_k = low_rank(torch.cat([key_rows, weights.v_proj]), rank_k, whitening)
        up_k, up_v = up.split([len(key_rows), len(weights.v_proj)])
    else:
        up_k, down_k = low_rank(key_rows, rank_k, whitening)
        up_v, down_v = low_rank(weights.v_proj, rank_v, whitening)

    # Queries of a head follow the choice of its KV head; unrotated rows first, so that a head splits into two views.
    order = torch.cat([nope, rope], dim=1).repeat_interleave(weights.n_heads // groups, dim=0)
    queries = weights.q_proj.view(weights.n_heads, head_dim, -1)
    bias_q, bias_k, bias_v = weights.q_bias, weights.k_bias, weights.v_bias
    converted = MLAWeights(
        q_proj=_take(queries, order).flatten(0, 1),
        down_k=down_k,
        k_rope_proj=_take(keys, rope).flatten(0, 1),
        up_k=up_k.unflatten(0, (groups, head_dim - d_pe)),
        up_v=up_v.unflatten(0, (groups, head_dim)),
        rope_index=rope,
        n_heads=weights.n_heads,
        scale=head_dim**-0.5,
        down_v=down_v,
        q_bias=None if bias_q is None else bias_q.view(weights.n_heads, head_dim).gather(1, order).flatten(),
        k_rope_bias=None if bias_k is None else bias_k.view(groups, head_dim).gather(1, rope).flatten(),
        v_bias=None if bias_v is None else bias_v.view(groups, head_dim).clone(),
    )
    converted = converted.to(dtype=weights.q_proj.dtype)
    for name in ("down_k", "down_v", "up_k", "up_v"):
        factor = getattr(converted, name)
        if factor is not None and not bool(factor.isfinite().all()):
            raise ValueError(f"{name} does not fit {weights.q_proj.dtype}; convert in float32 or bfloat16")
    return converted


def check_options(
    weights: AttentionWeights, *, rank: int | tuple[int, int], d_pe: int, svd: str = "joint"
) -> tuple[int, int]:
    """Whether a layer can be converted so, before any work is done.

    Returns:
        The ranks of keys and values (one and the same latent with joint SVD).

    Raises:
        TypeError: a rank or d_pe that is no int.
        ValueError: an option outside what this layer's shape accepts.
    """
    head_dim, groups, hidden = weights.head_dim, weights.n_kv_heads, weights.hidden
    if svd not in ("joint", "split"):
        raise ValueError(f"svd is {svd!r}, expected 'joint' or 'split'")
    for name, value in (("d_pe", d_pe), *(("rank", r) for r in (rank if isinstance(rank, tuple) else (rank,)))):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected an int")
    if d_pe % 2 or not 0 <= d_pe <= head_dim:
        raise ValueError(f"d_pe is {d_pe}, expected an even number from 0 to head_dim {head_dim}")
    if svd == "joint":
        if not isinstance(rank, int):
            raise ValueError(f"rank is {rank}, expected one number with joint SVD")
        full = min(groups * (2 * head_dim - d_pe), hidden)
        if not 1 <= rank <= full:
            raise ValueError(f"rank is {rank}, expected 1 to {full}, the full rank of the joint keys and values")
        return rank, rank
    if d_pe == head_dim:
        raise ValueError(f"d_pe is head_dim {head_dim}, which leaves split SVD no unrotated keys; take svd='joint'")
    ranks = (rank, rank) if isinstance(rank, int) else rank
    full_k, full_v = min(groups * (head_dim - d_pe), hidden), min(groups * head_dim, hidden)
    if len(ranks) != 2 or not (1 <= ranks[0] <= full_k and 1 <= ranks[1] <= full_v):
        raise ValueError(f"rank is {rank}, expected 1 to {full_k} for the keys and 1 to {full_v} for the values")
    return ranks


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of each head: `rows [heads, D, hidden]` at `index [heads, n]` to `[heads, n, hidden]`."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
