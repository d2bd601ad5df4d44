"""What a conversion needs to know about a layer's activations, gathered in one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .weights import AttentionWeights


class ActivationStats:
    """Running sums over the inputs of one attention layer.

    Args:
        weights: the layer's projections; they give the queries and keys of each input.
    """

    def __init__(self, weights: AttentionWeights) -> None:
        self._weights = weights
        device, n_pairs = weights.q_proj.device, weights.head_dim // 2
        self._gram = torch.zeros(weights.hidden, weights.hidden, dtype=torch.float64, device=device)
        self._q_norms = torch.zeros(weights.n_heads, n_pairs, dtype=torch.float64, device=device)
        self._k_norms = torch.zeros(weights.n_kv_heads, n_pairs, dtype=torch.float64, device=device)
        self.n_tokens = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add the layer inputs `x [..., hidden]` (after the input norm, padding left out).

        Raises:
            ValueError: x is not as wide as the layer.
        """
        w = self._weights
        if x.shape[-1] != w.hidden:
            raise ValueError(f"x has shape {list(x.shape)}, expected [..., {w.hidden}]")
        x = x.reshape(-1, w.hidden).to(w.q_proj.dtype)
        self._gram += x.double().T @ x.double()
        self._q_norms += _pair_norms(F.linear(x, w.q_proj, w.q_bias), w.n_heads)
        self._k_norms += _pair_norms(F.linear(x, w.k_proj, w.k_bias), w.n_kv_heads)
        self.n_tokens += x.shape[0]

    def fits(self, weights: AttentionWeights) -> bool:
        """Whether they are of a layer of this size."""
        sizes = ("hidden", "n_heads", "n_kv_heads", "head_dim")
        return all(getattr(self._weights, size) == getattr(weights, size) for size in sizes)

    @property
    def covariance(self) -> Tensor:
        """`X^T X / n`, float64 `[hidden, hidden]`."""
        self._require_tokens()
        return self._gram / self.n_tokens

    @property
    def pair_scores(self) -> Tensor:
        """Mean of `|q_f| |k_f|` over pairs of tokens and the query heads of a group.

        `|q_f|` is the 2-norm of the two dimensions that frequency `f` turns, so RoPE does not change it. float64
        `[n_kv_heads, head_dim / 2]`.
        """
        self._require_tokens()
        q = (self._q_norms / self.n_tokens).unflatten(0, (self._weights.n_kv_heads, -1)).mean(dim=1)
        return q * self._k_norms / self.n_tokens

    def _require_tokens(self) -> None:
        if self.n_tokens == 0:
            raise ValueError("no calibration activations were given; call update() with at least one token")


def _pair_norms(projected: Tensor, n_heads: int) -> Tensor:
    """Sum over tokens of the 2-norm of each rotary pair: `[tokens, n_heads * D]` to float64 `[n_heads, D / 2]`."""
    pairs = projected.double().unflatten(-1, (n_heads, 2, -1))
    return pairs.norm(dim=2).sum(dim=0)
