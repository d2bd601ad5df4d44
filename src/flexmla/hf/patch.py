"""Convert the attention of a transformers model to MLA, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from ..backends.choice import NAMES
from ..convert import ActivationStats, AttentionWeights, MLAWeights, RopeChoice, check_options, convert_attention
from .attention import MLAAttention
from .masks import MaskReader


def patch_model(
    model: PreTrainedModel,
    weights: Sequence[MLAWeights] | None = None,
    *,
    rank: int | tuple[int, int] | None = None,
    d_pe: int | None = None,
    calibration: Tensor | Sequence[Tensor] | None = None,
    rope_dims: RopeChoice | None = None,
    svd: Literal["joint", "split"] | None = None,
    whiten: bool | None = None,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> PreTrainedModel:
    """Replace every attention module of a Llama model by absorbed multi-head latent attention.

        model = AutoModelForCausalLM.from_pretrained(name)
        flexmla.hf.patch_model(model, rank=192, d_pe=32, calibration=tokenizer(text, return_tensors="pt").input_ids)
        model.generate(...)

    The stock caches then hold the latent and the rotary keys; `generate` works as before, with dynamic and static
    caches, left-padded batches, beam search and sampling. Decoding goes through `flexmla.mla_decode`, prefill through
    SDPA. Masks are built by transformers for its `sdpa` implementation, to which the model is set.

    Decoding rows padded on the right stays right with dynamic caches and on a CPU (the step falls back to SDPA); with a
    static cache on an accelerator, where a mask cannot be looked at without waiting, such a row comes out as NaN.

    Args:
        model: a `LlamaForCausalLM` or `LlamaModel` with its weights loaded; changed in place.
        weights: converted layers, from `convert_model`. Without them the model is converted here, by the other
            arguments (see `convert_model`).
        backend: handed to `flexmla.mla_decode`.

    Returns:
        The same model.

    Raises:
        NotImplementedError: a model that is not a Llama.
        TypeError: weights that are no MLAWeights.
        ValueError: an unknown backend, a model already converted, both or neither of weights and rank with d_pe, or
            layers that do not fit.
    """
    layers = _llama_layers(model)
    if backend not in NAMES:
        raise ValueError(f"backend must be 'auto', 'tilelang' or 'torch', got {backend!r}")
    if weights is None:
        if rank is None or d_pe is None:
            raise ValueError("patch_model needs rank and d_pe, or weights from convert_model")
        weights = convert_model(
            model,
            rank=rank,
            d_pe=d_pe,
            calibration=calibration,
            rope_dims=rope_dims,
            svd=svd or "joint",
            whiten=whiten,
            progress=progress,
        )
    elif any(option is not None for option in (rank, d_pe, calibration, rope_dims, svd, whiten)):
        raise ValueError("patch_model got weights and conversion options; the options belong to convert_model")
    if len(weights) != len(layers):
        raise ValueError(f"weights has {len(weights)} layers, but the model has {len(layers)}")
    for i, (layer, converted) in enumerate(zip(layers, weights, strict=True)):
        if not isinstance(converted, MLAWeights):
            raise TypeError(f"weights[{i}] is {type(converted).__name__}, expected MLAWeights from convert_model")
        have = (converted.hidden, converted.n_heads, converted.n_kv_heads, converted.head_dim)
        need = _geometry(layer.self_attn)
        if have != need:
            raise ValueError(
                f"weights[{i}] has (hidden, n_heads, n_kv_heads, head_dim) {have}, but layer {i} has {need}"
            )

    reader = MaskReader()
    rotary = getattr(getattr(model, "model", model), "rotary_emb", None)
    rope_gain = float(getattr(rotary, "attention_scaling", 1.0))
    for i, (layer, converted) in enumerate(zip(layers, weights, strict=True)):
        original = layer.self_attn
        converted = converted.to(device=original.q_proj.weight.device, dtype=original.q_proj.weight.dtype)
        layer.self_attn = MLAAttention(original.config, converted, original.o_proj, i, reader, backend, rope_gain)
    model.set_attn_implementation("sdpa")
    return model


def convert_model(
    model: PreTrainedModel,
    *,
    rank: int | tuple[int, int],
    d_pe: int,
    calibration: Tensor | Sequence[Tensor] | None = None,
    rope_dims: RopeChoice | None = None,
    svd: Literal["joint", "split"] = "joint",
    whiten: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[MLAWeights]:
    """Convert every attention layer of a Llama model, which stays as it is.

    Args:
        model: a `LlamaForCausalLM` or `LlamaModel` with its weights loaded.
        rank: width of the latent; with split SVD `(rank_k, rank_v)`, or one number for both.
        d_pe: rotary dimensions kept in each head: even, 0 to head_dim.
        calibration: token ids without padding, int64 `[n, tokens]`, or several such of different lengths: text like
            that the model is to write. Without it the SVD is plain, which costs much quality below full rank.
        rope_dims: `high`, `low`, `uniform` or `2-norm`. Default: `2-norm` with calibration, else `uniform`.
        svd: `joint` (one latent for keys and values) or `split` (one each).
        whiten: weight the SVD by the calibration activations. Default: where there are any.
        progress: called with (steps done, steps); a step is a calibration text or a layer.

    Returns:
        One `MLAWeights` for each layer.

    Raises:
        NotImplementedError: a model that is not a Llama.
        ValueError: a model already converted, calibration that holds no token ids of the model, or options outside what
            `flexmla.convert.convert_attention` accepts.
    """
    layers = _llama_layers(model)
    originals = attention_weights(model)
    check_options(originals[0], rank=rank, d_pe=d_pe, svd=svd)
    texts = [] if calibration is None else _token_ids(calibration, model.get_input_embeddings().num_embeddings)
    steps = len(texts) + len(layers)
    stats = [ActivationStats(original) for original in originals] if texts else None
    if stats is not None:
        for done, ids in enumerate(texts, start=1):
            _gather(model, layers, stats, ids)
            if progress is not None:
                progress(done, steps)
    converted = []
    for i, original in enumerate(originals):
        layer_stats = None if stats is None else stats[i]
        converted.append(
            convert_attention(
                original, rank=rank, d_pe=d_pe, rope_dims=rope_dims, svd=svd, stats=layer_stats, whiten=whiten
            )
        )
        if progress is not None:
            progress(len(texts) + i + 1, steps)
    return converted


def attention_weights(model: PreTrainedModel) -> list[AttentionWeights]:
    """The attention projections of a Llama model's layers, as `flexmla.convert` takes them (views, not copies).

    Raises:
        NotImplementedError: a model that is not a Llama, or projections that are not plain linear layers.
        ValueError: a model already converted.
    """
    return [_attention_weights(layer.self_attn) for layer in _llama_layers(model)]


def set_decode_mode(model: PreTrainedModel, mode: Literal["absorbed", "decompressed"]) -> None:
    """Choose how a converted model decodes: `absorbed` through `mla_decode`, or `decompressed` through SDPA.

    Raises:
        ValueError: another mode, or a model that `patch_model` has not converted.
    """
    if mode not in ("absorbed", "decompressed"):
        raise ValueError(f"mode is {mode!r}, expected 'absorbed' or 'decompressed'")
    modules = [m for m in model.modules() if isinstance(m, MLAAttention)]
    if not modules:
        raise ValueError("model has no converted attention layers; call flexmla.hf.patch_model first")
    for module in modules:
        module.decode_mode = mode


def _llama_layers(model: PreTrainedModel) -> list[Any]:
    """The decoder layers of a Llama model that is not converted yet."""
    layers = list(getattr(getattr(model, "model", model), "layers", []))
    attention = [getattr(layer, "self_attn", None) for layer in layers]
    if any(isinstance(module, MLAAttention) for module in attention):
        raise ValueError("model is already converted; load the original again to convert it differently")
    if not layers or not all(type(module) is LlamaAttention for module in attention):
        kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise NotImplementedError(f"model is of type {kind!r}; patch_model takes Llama models ('llama')")
    if not getattr(model.config, "is_causal", True):
        raise NotImplementedError(
            "model attends in both directions (config.is_causal is False); MLA decoding is causal"
        )
    return layers


def _geometry(attention: Any) -> tuple[int, int, int, int]:
    hidden, head_dim = attention.q_proj.in_features, attention.head_dim
    return hidden, attention.q_proj.out_features // head_dim, attention.k_proj.out_features // head_dim, head_dim


def _attention_weights(attention: Any) -> AttentionWeights:
    for name in ("q_proj", "k_proj", "v_proj"):
        if type(getattr(attention, name)) is not nn.Linear:
            kind = type(getattr(attention, name)).__name__
            raise NotImplementedError(
                f"{name} is a {kind}; conversion takes plain linear layers, not quantised or adapted ones"
            )

    def bias(linear: nn.Linear) -> Tensor | None:
        return None if linear.bias is None else linear.bias.detach()

    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    _, n_heads, n_kv_heads, _ = _geometry(attention)
    return AttentionWeights(
        q_proj=q.weight.detach(),
        k_proj=k.weight.detach(),
        v_proj=v.weight.detach(),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        q_bias=bias(q),
        k_bias=bias(k),
        v_bias=bias(v),
    )


def _token_ids(calibration: Tensor | Sequence[Tensor], vocabulary: int) -> list[Tensor]:
    """Calibration texts as a list of int64 `[n, tokens]`, each id one of `vocabulary` tokens."""
    texts = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    if not texts:
        raise ValueError("calibration is empty, expected at least one tensor of token ids")
    for ids in texts:
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim not in (1, 2) or ids.numel() == 0:
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"calibration holds {got}, expected int64 token ids [n, tokens] or a list of those")
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"calibration holds ids from {low} to {high}, expected token ids from 0 to {vocabulary - 1}"
            )
    return [ids.reshape(-1, ids.shape[-1]) for ids in texts]


@torch.no_grad()
def _gather(model: PreTrainedModel, layers: list[Any], stats: list[ActivationStats], ids: Tensor) -> None:
    """Run token ids through the model and add what each attention layer is given to its statistics."""

    def hook(i: int) -> Callable[..., None]:
        return lambda module, args, kwargs: stats[i].update(args[0] if args else kwargs["hidden_states"])

    handles = [layer.self_attn.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        getattr(model, "model", model)(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
