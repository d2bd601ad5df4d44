"""The attention module a converted Llama layer runs: latent cache, absorbed decoding through `flexmla.mla_decode`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..api import mla_decode
from ..convert import MLAWeights
from .masks import MaskReader, VisibleRange

# From some 20 query tokens on (SmolLM2; more on wider models) expanding the cache once costs less than latent scores.
MAX_DECODE_QUERIES = 16


class MLAAttention(nn.Module):
    """Multi-head latent attention in place of `LlamaAttention`.

    The stock caches hold the latent as keys `[batch, 1, tokens, r]` (with split SVD both latents side by side) and the
    rotary keys as values `[batch, 1, tokens, n_kv_heads * d_pe]`. A step of up to 16 tokens on an existing cache is
    decoded absorbed by `flexmla.mla_decode`; prefill, and any larger step, expands the latents and goes through SDPA.

    Args:
        config: the model's configuration.
        weights: the converted layer (`flexmla.convert.convert_attention`).
        o_proj: the original output projection.
        layer_idx: the layer's place in the cache.
        mask_reader: shared by the layers of one model.
        backend: of `flexmla.mla_decode`.
        rope_gain: what the model's rotary embedding multiplies cos and sin with (`attention_scaling`, other than 1 for
            YaRN): all scores of the original model carry its square.

    Attributes:
        decode_mode: `absorbed`, or `decompressed` to expand the cached latents in every step (for comparison).
    """

    is_causal = True
    rope_index: Tensor
    v_bias: nn.Parameter | None

    def __init__(
        self,
        config: PretrainedConfig,
        weights: MLAWeights,
        o_proj: nn.Module,
        layer_idx: int,
        mask_reader: MaskReader,
        backend: str = "auto",
        rope_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.n_heads, self.n_kv_heads = weights.n_heads, weights.n_kv_heads
        self.head_dim, self.d_pe = weights.head_dim, weights.d_pe
        self.num_key_value_groups = weights.n_heads // weights.n_kv_heads
        self.scaling = weights.scale
        self.shape = weights.shape
        self.decode_mode: Literal["absorbed", "decompressed"] = "absorbed"
        self.mask_reader = mask_reader
        self.backend = backend

        self.q_proj = _linear(weights.q_proj, weights.q_bias)
        down = [weights.down_k] if weights.down_v is None else [weights.down_k, weights.down_v]
        self.latent_width = sum(len(rows) for rows in down)
        # Latent and rotary keys in one GEMM; only the rotary keys may have a bias.
        bias = weights.k_rope_bias
        self.kv_down = _linear(
            torch.cat([*down, weights.k_rope_proj]),
            None if bias is None else torch.cat([bias.new_zeros(self.latent_width), bias]),
        )
        # the rotary part gets the gain with cos and sin; what is not rotated any more gets it here
        self.up_k = nn.Parameter(weights.up_k * rope_gain**2, requires_grad=False)
        self.up_v = nn.Parameter(weights.up_v, requires_grad=False)
        self.register_parameter(
            "v_bias", None if weights.v_bias is None else nn.Parameter(weights.v_bias, requires_grad=False)
        )
        self.register_buffer("rope_index", weights.rope_index)
        self.o_proj = o_proj

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As `LlamaAttention.forward`.

        Args:
            hidden_states: `[batch, q_len, hidden]`.
            position_embeddings: cos and sin, `[batch or 1, q_len, head_dim]`.
            attention_mask: `[batch, 1, q_len, kv_len]`, bool (True: look) or additive; None: causal from the first
                slot, or for a single token everything in the cache.
            cache: any cache of transformers that keeps every token; None: no cache.
            past_key_values: the cache, as transformers before 5.24 passes it.

        Returns:
            `[batch, q_len, hidden]` and None (attention weights are never formed).

        Raises:
            NotImplementedError: the model was set to another attention implementation than `sdpa`.
            ValueError: a cache that was allocated for, or filled by, the original model.
        """
        if self.config._attn_implementation != "sdpa":
            raise NotImplementedError(
                f"the model's attention implementation is {self.config._attn_implementation!r}; converted layers read "
                "the masks of 'sdpa': call model.set_attn_implementation('sdpa')"
            )
        batch, q_len, _ = hidden_states.shape
        q = self.q_proj(hidden_states).view(batch, q_len, self.n_heads, self.head_dim)
        q_c, q_pe = q.split([self.head_dim - self.d_pe, self.d_pe], dim=-1)
        latent, k_pe = self.kv_down(hidden_states).split([self.latent_width, self.n_kv_heads * self.d_pe], dim=-1)
        q_pe, k_pe = self._rotate(q_pe, k_pe.unflatten(-1, (self.n_kv_heads, self.d_pe)), position_embeddings)

        past: int | Tensor = 0
        cache = past_key_values if cache is None else cache
        if cache is not None:
            self._check_cache(cache)
            past = cache.get_seq_length(self.layer_idx)
            if isinstance(past, Tensor):
                past = past.clone()  # a static cache counts in place
            keys, values = cache.update(latent[:, None], k_pe.flatten(2)[:, None], self.layer_idx)
        # The count of a static cache stays on its device, but for several tokens no mask means that none precede them.
        is_first = past == 0 if isinstance(past, int) else attention_mask is None and q_len > 1
        if cache is not None and not (is_first and attention_mask is None):
            latent, k_pe = keys[:, 0], values[:, 0].unflatten(-1, (self.n_kv_heads, self.d_pe))

        absorbed = self.decode_mode == "absorbed" and not is_first and q_len <= MAX_DECODE_QUERIES
        visible = None
        if absorbed and attention_mask is not None:
            visible = self.mask_reader.read(attention_mask, past, batch, first_layer=self.layer_idx == 0)
            absorbed = visible is not None
        if absorbed:
            heads = self._absorbed(q_c, q_pe, latent, k_pe, past + q_len, visible)
        else:
            heads = self._decompressed(q_c, q_pe, latent, k_pe, attention_mask)
        heads = heads.unflatten(2, (self.n_kv_heads, -1))
        if self.v_bias is not None:
            heads = heads + self.v_bias[:, None]  # the probabilities sum to one, so the value bias goes in last
        return self.o_proj(heads.flatten(2)), None

    def _check_cache(self, cache: Cache) -> None:
        layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.ndim == 4 and (keys.shape[1], keys.shape[3]) != (1, self.latent_width):
            raise ValueError(
                f"past_key_values holds keys {list(keys.shape)} in layer {self.layer_idx}, but this converted layer "
                f"caches [batch, 1, tokens, {self.latent_width}]; take a new cache, and no static one together with "
                "prefill_chunk_size, for which transformers allocates the original heads"
            )

    def _rotate(self, q_pe: Tensor, k_pe: Tensor, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """RoPE on the kept dimensions: `[batch, q_len, n_heads, p]` and `[batch, q_len, n_kv_heads, p]`."""
        cos, sin = (table[..., self.rope_index] for table in embeddings)  # [batch or 1, q_len, n_kv_heads, p]
        k_pe = k_pe * cos + _rotate_half(k_pe) * sin
        q_pe = q_pe.unflatten(2, (self.n_kv_heads, -1))
        q_pe = q_pe * cos[:, :, :, None] + _rotate_half(q_pe) * sin[:, :, :, None]
        return q_pe.flatten(2, 3), k_pe

    def _absorbed(
        self, q_c: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, end: int | Tensor, visible: VisibleRange | None
    ) -> Tensor:
        """Scores and sums in latent space, two batched GEMMs around `mla_decode`: `[batch, q_len, n_heads, D]`."""
        q_nope = torch.einsum("bsgrd,gdl->bsgrl", q_c.unflatten(2, (self.n_kv_heads, -1)), self.up_k)
        ckv, v_cache = self._latents(latent)
        out, _ = mla_decode(
            q_nope.flatten(2, 3),
            q_pe if self.d_pe else None,
            ckv,
            k_pe if self.d_pe else None,
            seq_lens=(end + torch.zeros(len(q_c), dtype=torch.int64, device=q_c.device)).to(torch.int32),
            starts=None if visible is None else visible.starts,
            softmax_scale=self.scaling,
            v_cache=v_cache,
            backend=self.backend,
        )
        if visible is not None and visible.regular is not None:
            # Holes in a mask that could not be looked at must not go by unnoticed.
            out = out.masked_fill(~visible.regular[:, None, None, None], float("nan"))
        return torch.einsum("bsgrl,gdl->bsgrd", out.unflatten(2, (self.n_kv_heads, -1)), self.up_v).flatten(2, 3)

    def _decompressed(self, q_c: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values expanded for every head, then SDPA; returns `[batch, q_len, n_heads, D]`."""
        ckv, v_cache = self._latents(latent)
        query = torch.cat([q_c, q_pe], dim=-1).transpose(1, 2)
        key = torch.cat([torch.einsum("btl,gdl->bgtd", ckv, self.up_k), k_pe.transpose(1, 2)], dim=-1)
        value = torch.einsum("btl,gdl->bgtd", ckv if v_cache is None else v_cache, self.up_v)
        out, _ = sdpa_attention_forward(self, query, key, value, mask, scaling=self.scaling)
        return out

    def _latents(self, cached: Tensor) -> tuple[Tensor, Tensor | None]:
        """The cached row as the latent and, with split SVD, the separate value latent."""
        if self.shape.v_width is None:
            return cached, None
        ckv, v_cache = cached.split([self.shape.dv, self.shape.v_width], dim=-1)
        return ckv, v_cache


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear layer around given tensors, without an initialised weight in between."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
