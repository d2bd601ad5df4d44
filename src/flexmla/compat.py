"""FlashMLA's decode call on flexmla's kernels, for any width of head: change one import.

    from flexmla.compat import flash_mla_with_kvcache, get_mla_metadata

The calling forms, layouts and meanings are those of https://github.com/deepseek-ai/FlashMLA, before and after its
scheduler metadata became an object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .api import DTYPES, INDEX, check_tensor, mla_decode

METADATA_WIDTH = 8  # int32 numbers that FlashMLA keeps a part


@dataclass(frozen=True)
class SchedulerMetadata:
    """Stands for FlashMLA's scheduler metadata. It is empty: flexmla's kernels cut the work on the device."""


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[SchedulerMetadata | Tensor, Tensor | None]:
    """What `flash_mla_with_kvcache` takes as its schedule; nothing is computed.

    Args:
        cache_seqlens: int32 `[batch]`; None is FlashMLA's newer form.
        num_q_tokens_per_head_k: `q_len * n_heads // num_heads_k`, not needed.
        num_heads_k: 1.
        num_heads_q: not needed.
        is_fp8_kvcache: False.
        topk: None.

    Returns:
        A `SchedulerMetadata` and None; with `cache_seqlens`, for code that keeps the metadata in buffers of its own,
        int32 `[1, 8]` and `[batch + 1]` on its device, all zeros.

    Raises:
        TypeError, ValueError: `cache_seqlens` is no int32 `[batch]` tensor; `num_heads_k` is not 1.
        NotImplementedError: fp8 caches or sparse attention are asked for.
    """
    _refuse(is_fp8_kvcache=is_fp8_kvcache, topk=topk)
    if num_heads_k not in (None, 1):
        raise ValueError(f"num_heads_k must be 1, as MLA has one latent a token, got {num_heads_k}")
    if cache_seqlens is None:
        return SchedulerMetadata(), None
    _check_tensors(cache_seqlens=cache_seqlens)
    if cache_seqlens.dim() != 1:
        raise ValueError(f"cache_seqlens must be [batch], got {tuple(cache_seqlens.shape)}")
    check_tensor("cache_seqlens", cache_seqlens, "[batch]", cache_seqlens.shape, INDEX, cache_seqlens.device)
    zeros = torch.zeros(METADATA_WIDTH + cache_seqlens.shape[0] + 1, dtype=torch.int32, device=cache_seqlens.device)
    return zeros[:METADATA_WIDTH].view(1, METADATA_WIDTH), zeros[METADATA_WIDTH:]


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: object = None,
    num_splits: object = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decodes as FlashMLA's function of this name does, with any `head_dim`, `head_dim_v` and page size.

    Args:
        q: `[batch, q_len, n_heads, head_dim]`: the absorbed query, its rotary part in the last
            `head_dim - head_dim_v` elements; float16, bfloat16 or float32.
        k_cache: `[n_pages, page_size, 1, head_dim]`, q's dtype: latents, with their rotary key behind.
        block_table: int32 `[batch, max_pages]`.
        cache_seqlens: int32 `[batch]`.
        head_dim_v: width of the latents, dv.
        tile_scheduler_metadata: what `get_mla_metadata` returned; not looked at.
        num_splits: as tile_scheduler_metadata.
        softmax_scale: default `head_dim ** -0.5`.
        causal: whether a query sees nothing newer than its own token.
        is_fp8_kvcache: False.
        indices: None, as are all that follow: they belong to FlashMLA's sparse attention.
        attn_sink: None.
        extra_k_cache: None.
        extra_indices_in_kvcache: None.
        topk_length: None.
        extra_topk_length: None.

    Returns:
        `out` `[batch, q_len, n_heads, head_dim_v]` in q's dtype, and `lse`, float32 `[batch, n_heads, q_len]`, natural
        logarithm. A query that sees no token gets 0 and, unlike in `mla_decode`, `+inf`.

    Raises:
        ValueError, TypeError, RuntimeError: as `flexmla.mla_decode`; head_dim_v is out of range.
        NotImplementedError: an argument of sparse attention or of fp8 caches is given.
    """
    _refuse(
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    _check_tensors(q=q, k_cache=k_cache, block_table=block_table, cache_seqlens=cache_seqlens)
    # What mla_decode would check too, with the names that its caller does not know.
    if q.dim() != 4 or 0 in q.shape[1:]:
        raise ValueError(f"q must be [batch, q_len, n_heads, head_dim] with no empty part, got {tuple(q.shape)}")
    head_dim = q.shape[3]
    if k_cache.dim() != 4 or k_cache.shape[2:] != (1, head_dim):
        raise ValueError(f"k_cache must be [n_pages, page_size, 1, {head_dim}], got {tuple(k_cache.shape)}")
    if k_cache.shape[1] == 0:
        raise ValueError("k_cache must have a page_size of at least 1, got 0")
    check_tensor("q", q, "", q.shape, DTYPES, q.device)
    check_tensor("k_cache", k_cache, "", k_cache.shape, (q.dtype,), q.device, "q")
    check_tensor("block_table", block_table, "", block_table.shape, INDEX, q.device, "q")
    check_tensor("cache_seqlens", cache_seqlens, "[batch]", (q.shape[0],), INDEX, q.device, "q")
    for name, tensor in (("q", q), ("k_cache", k_cache)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} requires grad, but decoding is inference only: use torch.no_grad()")
    if not isinstance(head_dim_v, int) or not 0 < head_dim_v <= head_dim:
        raise ValueError(f"head_dim_v must be from 1 to head_dim {head_dim}, got {head_dim_v!r}")
    if block_table.shape[:1] == q.shape[:1] and block_table.dim() == 2:
        _check_lengths(cache_seqlens, block_table.shape[1] * k_cache.shape[1] if k_cache.shape[0] else 0)
    rotary = head_dim_v < head_dim
    out, lse = mla_decode(
        q[..., :head_dim_v],
        q[..., head_dim_v:] if rotary else None,
        k_cache[:, :, 0, :head_dim_v],
        k_cache[..., head_dim_v:] if rotary else None,
        seq_lens=cache_seqlens,
        block_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
    )
    return out, lse.masked_fill_(lse == -torch.inf, torch.inf)


def _check_tensors(**arguments: object) -> None:
    """Raises TypeError for the first argument that is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_lengths(cache_seqlens: Tensor, most: int) -> None:
    """Raises ValueError where lengths on a CPU are out of range."""
    if cache_seqlens.device.type != "cpu" or cache_seqlens.numel() == 0 or torch.compiler.is_compiling():
        return
    shortest, longest = (int(extreme) for extreme in cache_seqlens.aminmax())
    if shortest < 0 or longest > most:
        wrong = shortest if shortest < 0 else longest
        raise ValueError(f"cache_seqlens must be 0 to {most}, what a row of block_table has room for, got {wrong}")


def _refuse(**arguments: Any) -> None:
    """Raises NotImplementedError for the first argument that is given."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} is not supported by flexmla's FlashMLA interface, leave it out")
