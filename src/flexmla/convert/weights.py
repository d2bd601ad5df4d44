"""The weights that go into a conversion and the ones that come out."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..shape import MLAShape


def _require(tensor: Tensor | None, name: str, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, expected a tensor")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, but q_proj is {like.dtype}; they must share one dtype")
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}, but q_proj is on {like.device}; all weights must share one device"
        )


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Projections of one Llama-type attention layer (MHA or GQA), rows in the rotate-half layout of transformers.

    Dimension `f` and `f + head_dim / 2` of a head are the pair that rotates with frequency `f`.

    Args:
        q_proj: query weight `[n_heads * head_dim, hidden]`.
        k_proj: key weight `[n_kv_heads * head_dim, hidden]`.
        v_proj: value weight `[n_kv_heads * head_dim, hidden]`.
        n_heads: number of query heads.
        n_kv_heads: number of key/value heads; divides n_heads.
        q_bias: query bias `[n_heads * head_dim]`, or None.
        k_bias: key bias `[n_kv_heads * head_dim]`, or None.
        v_bias: value bias `[n_kv_heads * head_dim]`, or None.

    Raises:
        ValueError: shapes that do not fit each other, an odd head_dim, or weights without data (the meta device).
        TypeError: projections that are no tensors, not floating point, or of several dtypes.
    """

    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    n_heads: int
    n_kv_heads: int
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in (("q_proj", self.q_proj), ("k_proj", self.k_proj), ("v_proj", self.v_proj)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} is {type(tensor).__name__}, expected a tensor")
        q = self.q_proj
        if q.ndim != 2:
            raise ValueError(f"q_proj has shape {list(q.shape)}, expected [n_heads * head_dim, hidden]")
        if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"q_proj is {q.dtype}; conversion takes float16, bfloat16, float32 or float64 weights")
        if q.is_meta:
            raise ValueError("q_proj is on the meta device; load the weights before converting them")
        if self.n_heads < 1 or self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a positive multiple of n_kv_heads {self.n_kv_heads}")
        if q.shape[0] == 0 or q.shape[0] % (2 * self.n_heads):
            raise ValueError(f"q_proj has {q.shape[0]} rows, expected n_heads {self.n_heads} times an even head_dim")
        rows = self.n_kv_heads * self.head_dim
        _require(self.k_proj, "k_proj", (rows, self.hidden), q)
        _require(self.v_proj, "v_proj", (rows, self.hidden), q)
        _require(self.q_bias, "q_bias", (q.shape[0],), q)
        _require(self.k_bias, "k_bias", (rows,), q)
        _require(self.v_bias, "v_bias", (rows,), q)

    @property
    def hidden(self) -> int:
        """Width of the layer's input."""
        return self.q_proj.shape[1]

    @property
    def head_dim(self) -> int:
        """Dimensions of a head, rotary ones included."""
        return self.q_proj.shape[0] // self.n_heads


@dataclass(frozen=True, eq=False)
class MLAWeights:
    """One attention layer as multi-head latent attention.

    With `G` KV heads, `rep = n_heads / G`, `D` head_dim, `p` d_pe, `r` the latent width, for token input `x`:

        c = down_k x                              latent, cached
        k_pe[g] = rope(k_rope_proj x + b)[g]      rotary key of each KV head, cached
        q[h] = [q_c[h] | q_pe[h]] = q_proj x      the D - p unrotated dimensions first, then the p rotary ones
        score[h, t] = scale * ((U_k[g]^T q_c[h]) . c[t] + rope(q_pe[h]) . k_pe[t, g])          g = h // rep
        o[h] = U_v[g] sum_t softmax(score)[t] c[t] + v_bias[g]

    With split SVD the sum over tokens is taken over `down_v x` instead of `c`. The output projection stays as it was.

    Args:
        q_proj: `[n_heads * D, hidden]`, the rows of a head ordered unrotated first, then rotary.
        down_k: `[r, hidden]`.
        k_rope_proj: `[G * p, hidden]`.
        up_k: `U_k`, `[G, D - p, r]`.
        up_v: `U_v`, `[G, D, r]`, or `[G, D, r_v]` with split SVD.
        rope_index: int64 `[G, p]`, the dimension in 0..D-1 of each kept rotary row; its frequency is that modulo D / 2.
        n_heads: number of query heads.
        scale: softmax scale of the original model, `D ** -0.5`.
        down_v: `[r_v, hidden]` with split SVD, None with joint SVD.
        q_bias: `[n_heads * D]` in the order of q_proj, or None.
        k_rope_bias: `[G * p]`, added before RoPE, or None. The unrotated part of a key bias adds the same amount to
            every token's score and leaves the softmax as it is, so it does not appear.
        v_bias: `[G, D]`, added after the up-projection since the probabilities sum to one, or None.
    """

    q_proj: Tensor
    down_k: Tensor
    k_rope_proj: Tensor
    up_k: Tensor
    up_v: Tensor
    rope_index: Tensor
    n_heads: int
    scale: float
    down_v: Tensor | None = None
    q_bias: Tensor | None = None
    k_rope_bias: Tensor | None = None
    v_bias: Tensor | None = None

    @property
    def n_kv_heads(self) -> int:
        """KV heads of the original layer, each of which keeps a rotary key of its own."""
        return self.up_v.shape[0]

    @property
    def head_dim(self) -> int:
        """Dimensions of an original head."""
        return self.up_v.shape[1]

    @property
    def d_pe(self) -> int:
        """Rotary dimensions kept in each head."""
        return self.rope_index.shape[1]

    @property
    def hidden(self) -> int:
        """Width of the layer's input."""
        return self.q_proj.shape[1]

    @property
    def shape(self) -> MLAShape:
        """What `flexmla.mla_decode` is called with."""
        return MLAShape(
            n_heads=self.n_heads,
            n_rope_heads=self.n_kv_heads,
            dv=self.down_k.shape[0],
            d_pe=self.d_pe,
            v_width=None if self.down_v is None else self.down_v.shape[0],
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MLAWeights:
        """A copy with the floating-point tensors in `dtype` and all tensors on `device` (None: as they are)."""
        moved: dict[str, Any] = {
            f.name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)
