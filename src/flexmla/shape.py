"""The shape of one MLA attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class MLAShape:
    """Head counts and widths of an absorbed multi-head latent attention layer.

    Attributes:
        n_heads: query heads.
        n_rope_heads: rotary keys a token; divides `n_heads`. 1 is DeepSeek's shared key, `n_heads` is MHA2MLA on MHA.
        dv: width of the latent (kv_lora_rank).
        d_pe: width of a rotary key (qk_rope_head_dim); 0 where the layer has none.
        v_width: width of a separate value latent (split SVD); None where the values are the latents themselves.

    Raises:
        TypeError: where a field is not an int.
        ValueError: where a field is out of range or `n_rope_heads` does not divide `n_heads`.
    """

    n_heads: int
    n_rope_heads: int
    dv: int
    d_pe: int
    v_width: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("n_heads", self.n_heads, 1),
            ("n_rope_heads", self.n_rope_heads, 1),
            ("dv", self.dv, 1),
            ("d_pe", self.d_pe, 0),
            ("v_width", 1 if self.v_width is None else self.v_width, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.n_heads % self.n_rope_heads:
            raise ValueError(f"n_rope_heads must divide n_heads, got {self.n_rope_heads} for n_heads {self.n_heads}")

    @property
    def out_width(self) -> int:
        """Width of an output head: `v_width`, or `dv` where the values are the latents."""
        return self.dv if self.v_width is None else self.v_width

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes one token takes in the caches of one layer: latent, rotary keys and separate value latent."""
        return (self.dv + self.n_rope_heads * self.d_pe + (self.v_width or 0)) * dtype.itemsize


class Scoring(NamedTuple):
    """What is done to scores besides the softmax.

    Attributes:
        softcap: whether they are capped through tanh.
        scale_heads: last dimension of `score_scale`, 0 for none.
        scale_dtype: of `score_scale`.
    """

    softcap: bool = False
    scale_heads: int = 0
    scale_dtype: torch.dtype | None = None

    @classmethod
    def of_call(cls, softcap: float, score_scale: torch.Tensor | None) -> Scoring:
        """What a call's arguments ask for."""
        if score_scale is None:
            return cls(softcap > 0)
        return cls(softcap > 0, score_scale.shape[2], score_scale.dtype)

    @classmethod
    def of_layer(cls, shape: MLAShape, softcap: float, score_scale: bool) -> Scoring:
        """What a layer needs, with multipliers a rope head in float32."""
        return cls(softcap > 0, shape.n_rope_heads, torch.float32) if score_scale else cls(softcap > 0)


PLAIN = Scoring()


# The loaders that copy pages by TMA, so many tokens at once: a tile, or what the smallest of their pages holds.
LEAST_PAGE = {"pages": 64, "pages_of_16": 16}
BY_TMA = ("contiguous", *LEAST_PAGE)


class Specialisation(NamedTuple):
    """What is compiled into a kernel, besides its tile.

    Attributes:
        dtype: of queries, caches and outputs.
        q_len: query tokens a row.
        loader: how the caches lie in memory. By TMA come those that are `contiguous` or in pages as LEAST_PAGE says,
            others token by token (`gather`), or element by element where they are not aligned (`scalar`).
    """

    shape: MLAShape
    dtype: torch.dtype
    q_len: int = 1
    loader: str = "contiguous"
    scoring: Scoring = PLAIN
