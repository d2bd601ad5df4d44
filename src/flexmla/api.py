"""`mla_decode`: checks its arguments and hands them to the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, repeats
from .backends.choice import NAMES
from .plan import DecodePlan, device_record
from .shape import MLAShape

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX = (torch.int32,)
_FLOAT32 = (torch.float32,)
_MAX = torch.finfo(torch.float32).max  # the backends compute in float32


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
    out: Tensor | None = None,
    lse: Tensor | None = None,
    plan: DecodePlan | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of multi-head latent attention decoding: attends `q_len` new tokens a row over its latent cache.

    For batch row b, query i and head h, with g(h) = h // (n_heads / n_rope_heads) and all sums over the visible tokens
    `starts[b] <= t < seq_lens[b] - q_len + i + 1` (without `causal`: `t < seq_lens[b]`):

        s[t] = softmax_scale * score_scale[b,t,g'(h)] * (q_nope[b,i,h] . ckv[b,t] + q_pe[b,i,h] . kpe[b,t,g(h)])
        s[t] = softcap * tanh(s[t] / softcap)                                     where softcap > 0
        out[b,i,h] = sum_t softmax(s)[t] * ckv[b,t]                               v_cache[b,t] where given
        lse[b,h,i] = ln sum_t exp(s[t])

    A query that sees no token gets `out = 0` and `lse = -inf`. Memory outside the visible tokens, block-table entries
    that hold none of them included, never reaches a result. Last dimensions are contiguous; every other stride is free.

    Args:
        q_nope: `[batch, q_len, n_heads, dv]`, float16, bfloat16 or float32: the query absorbed through W_UK.
        q_pe: `[batch, q_len, n_heads, d_pe]`, q_nope's dtype; None where the layer has no rotary part.
        ckv_cache: `[batch, max_len, dv]`, or paged `[n_pages, page_size, dv]`; q_nope's dtype.
        kpe_cache: `[batch, max_len, n_rope_heads, d_pe]`, or paged `[n_pages, page_size, n_rope_heads, d_pe]`;
            q_nope's dtype; None with q_pe.
        seq_lens: int32 `[batch]`, end of each row counted from slot 0, the q_len newest tokens included; default
            max_len. Required for a paged cache.
        block_table: int32 `[batch, max_pages]`, the pages of each row; given means the caches are paged.
        starts: int32 `[batch]`, first visible token of each row (left padding); default 0.
        softmax_scale: default `(dv + d_pe) ** -0.5`; a converted model passes its original `head_dim ** -0.5`.
        softcap: cap of the scores through tanh; 0 is none.
        causal: whether a query sees nothing newer than its own token.
        v_cache: separate value latents, laid out like ckv_cache with a width W of its own; q_nope's dtype.
        score_scale: `[batch, max_len, g']`, or paged `[n_pages, page_size, g']`, float32 or q_nope's dtype: a
            multiplier a token and head group; g' divides n_heads and is n_rope_heads where d_pe > 0.
        out: `[batch, q_len, n_heads, W or dv]`, q_nope's dtype, to be written; apart from every input.
        lse: float32 `[batch, n_heads, q_len]`, to be written; apart from every input.
        plan: what `flexmla.plan` returned; exact in shape, page_size, dtype, device (under torch.compile not compared)
            and q_len, upper bounds in batch and max_len. It knows no softcap and no score_scale: with these, a tile is
            chosen by the call's own sizes.
        backend: "auto", "tilelang" or "torch". "auto" takes TileLang on compute capability 9.0 where it is installed
            and takes the combination, else torch.

    Returns:
        `out` and `lse`, natural logarithm; the given tensors where given.

    Raises:
        TypeError: an argument's type or dtype.
        ValueError: a shape, stride, device or value; an overlap of out or lse with an input; a plan for another call;
            on CPU also a length, start or table entry in use that is out of range. CUDA values are clamped instead, as
            looking at them would synchronise.
        NotImplementedError: the named backend lacks the combination.
        ImportError: `backend="tilelang"` and TileLang is not installed.
        RuntimeError: an input requires grad under grad mode.
    """
    signature = None
    if not torch.compiler.is_compiling():
        signature, launch = repeats.find(
            (q_nope, q_pe, ckv_cache, kpe_cache, seq_lens, block_table, starts, v_cache, score_scale, out, lse),
            (softmax_scale, softcap, causal, backend),
            plan,
        )
        if launch is not None:
            return launch(
                q_nope, q_pe, ckv_cache, kpe_cache, seq_lens, block_table, starts, v_cache, score_scale, out, lse
            )

    if not isinstance(q_nope, Tensor):
        raise TypeError(f"q_nope must be a tensor, got {type(q_nope).__name__}")
    if q_nope.dim() != 4 or 0 in q_nope.shape[1:]:
        raise ValueError(f"q_nope must be [batch, q_len, n_heads, dv] with no empty part, got {tuple(q_nope.shape)}")
    batch, q_len, n_heads, dv = q_nope.shape
    device = q_nope.device
    check_tensor("q_nope", q_nope, "", q_nope.shape, DTYPES, device)
    dtypes = (q_nope.dtype,)

    if not isinstance(ckv_cache, Tensor) or ckv_cache.dim() != 3:
        raise _rank_error("ckv_cache", ckv_cache, "[batch, max_len, dv] or [n_pages, page_size, dv]")
    slots, slot_len, _ = ckv_cache.shape
    if block_table is None:
        layout, page_size, max_len = "[batch, max_len, ", None, slot_len
        check_tensor("ckv_cache", ckv_cache, "[batch, max_len, dv]", (batch, slot_len, dv), dtypes, device)
    else:
        layout, page_size = "[n_pages, page_size, ", slot_len
        check_tensor("ckv_cache", ckv_cache, "[n_pages, page_size, dv]", (slots, slot_len, dv), dtypes, device)
        if slot_len == 0:
            raise ValueError("ckv_cache must have a page_size of at least 1, got 0")
        if not isinstance(block_table, Tensor) or block_table.dim() != 2:
            raise _rank_error("block_table", block_table, "[batch, max_pages]")
        check_tensor("block_table", block_table, "[batch, max_pages]", (batch, block_table.shape[1]), INDEX, device)
        if seq_lens is None:
            raise ValueError("seq_lens must be given for a paged cache (block_table), got None")
        max_len = block_table.shape[1] * slot_len

    if (q_pe is None) != (kpe_cache is None):
        name, other = ("q_pe", "kpe_cache") if q_pe is None else ("kpe_cache", "q_pe")
        raise ValueError(f"{name} must be given with {other} (both are None where d_pe is 0), got None")
    d_pe, groups = 0, None
    if q_pe is not None:
        if not isinstance(q_pe, Tensor) or q_pe.dim() != 4:
            raise _rank_error("q_pe", q_pe, "[batch, q_len, n_heads, d_pe]")
        if not isinstance(kpe_cache, Tensor) or kpe_cache.dim() != 4:
            raise _rank_error("kpe_cache", kpe_cache, layout + "n_rope_heads, d_pe]")
        d_pe, groups = q_pe.shape[3], kpe_cache.shape[2]
        if d_pe == 0:
            raise ValueError("q_pe must be None where d_pe is 0, got a tensor of width 0")
        check_tensor("q_pe", q_pe, "[batch, q_len, n_heads, d_pe]", (batch, q_len, n_heads, d_pe), dtypes, device)
        expected = (slots, slot_len, groups, d_pe)
        check_tensor("kpe_cache", kpe_cache, layout + "n_rope_heads, d_pe]", expected, dtypes, device)
        if groups == 0 or n_heads % groups:
            raise ValueError(f"kpe_cache must have n_rope_heads that divide n_heads {n_heads}, got {groups}")

    if seq_lens is not None:
        check_tensor("seq_lens", seq_lens, "[batch]", (batch,), INDEX, device)
    if starts is not None:
        check_tensor("starts", starts, "[batch]", (batch,), INDEX, device)
    width = dv
    if v_cache is not None:
        if not isinstance(v_cache, Tensor) or v_cache.dim() != 3 or v_cache.shape[2] == 0:
            raise _rank_error("v_cache", v_cache, layout + "W]")
        width = v_cache.shape[2]
        check_tensor("v_cache", v_cache, layout + "W]", (slots, slot_len, width), dtypes, device)
    if score_scale is not None:
        if not isinstance(score_scale, Tensor) or score_scale.dim() != 3:
            raise _rank_error("score_scale", score_scale, layout + "g']")
        share = score_scale.shape[2]
        kinds = _FLOAT32 if dtypes == _FLOAT32 else _FLOAT32 + dtypes
        check_tensor("score_scale", score_scale, layout + "g']", (slots, slot_len, share), kinds, device)
        if share == 0 or n_heads % share or (groups is not None and share != groups):
            accepted = f"divides n_heads {n_heads}" if groups is None else f"is n_rope_heads {groups}"
            raise ValueError(f"score_scale must have a last dimension that {accepted}, got {share}")

    if softmax_scale is None:
        softmax_scale = (dv + d_pe) ** -0.5
    elif not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale must be a float, got {type(softmax_scale).__name__}")
    elif not -_MAX <= softmax_scale <= _MAX:
        raise ValueError(f"softmax_scale must be finite in float32, got {softmax_scale}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap must be a float, got {type(softcap).__name__}")
    if not 0 <= softcap <= _MAX:
        raise ValueError(f"softcap must be 0 (none) or positive and finite in float32, got {softcap}")
    if torch.is_grad_enabled():
        tensors = {"q_nope": q_nope, "q_pe": q_pe, "ckv_cache": ckv_cache, "kpe_cache": kpe_cache}
        tensors |= {"v_cache": v_cache, "score_scale": score_scale, "out": out, "lse": lse}
        for name, tensor in tensors.items():
            if getattr(tensor, "requires_grad", False):
                raise RuntimeError(f"{name} requires grad, but mla_decode is inference only: use torch.no_grad()")

    if backend not in NAMES:
        raise ValueError(f"backend must be 'auto', 'tilelang' or 'torch', got {backend!r}")
    tiling: tuple[int, ...] = ()
    if plan is not None:
        if not isinstance(plan, DecodePlan):
            raise TypeError(f"plan must be a DecodePlan (flexmla.plan makes one), got {type(plan).__name__}")
        shape = plan.shape
        rope_heads = shape.n_rope_heads if groups is None else groups
        v_width = None if v_cache is None else width
        # Number by number: making a shape takes long, and torch.compile compares nothing that holds symbolic sizes.
        if (
            n_heads != shape.n_heads
            or rope_heads != shape.n_rope_heads
            or dv != shape.dv
            or d_pe != shape.d_pe
            or v_width != shape.v_width
        ):
            shape = MLAShape(n_heads, rope_heads, dv, d_pe, v_width)
        # torch.compile cannot look at a GPU; a plan for another one costs speed there, not correctness.
        record = plan.device if torch.compiler.is_compiling() else device_record(device)
        plan.check(shape, batch, max_len, q_len, page_size, q_nope.dtype, record)
        if backend not in ("auto", plan.backend):
            raise ValueError(f"plan must be for the named backend {backend!r}, got one for {plan.backend!r}")
        tiling = plan.tiling
        if plan.backend == "torch":
            backend = "torch"

    if out is not None:
        check_tensor("out", out, "[batch, q_len, n_heads, W or dv]", (batch, q_len, n_heads, width), dtypes, device)
    if lse is not None:
        check_tensor("lse", lse, "[batch, n_heads, q_len]", (batch, n_heads, q_len), _FLOAT32, device)
    inputs = (q_nope, q_pe, ckv_cache, kpe_cache, seq_lens, block_table, starts, v_cache, score_scale)
    operands = (*inputs, softmax_scale, softcap, causal, backend, tiling)
    given = out, lse
    if out is None and lse is None:
        out, lse = ops.mla_decode(*operands)
    else:
        out, lse = ops.results(q_nope, width, out, lse)
        ops.mla_decode_out(*operands, out, lse)
    if signature is not None:
        repeats.remember(signature, ops.launcher(operands, *given), plan)
    return out, lse


def check_tensor(
    name: str,
    tensor: Tensor,
    layout: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    owner: str = "q_nope",
) -> None:
    """Raises where `tensor` is not a `shape` tensor of one of `dtypes` on `device` with a contiguous last dimension.

    Args:
        name: what the caller knows the tensor as.
        layout: the names of `shape`'s dimensions, for people.
        owner: the argument whose device `device` is.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {layout} = {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {owner}'s device {device}, got {tensor.device}")
    if tensor.stride(-1) != 1 and shape[-1] > 1:
        raise ValueError(f"{name} must have a contiguous last dimension (stride 1), got strides {tensor.stride()}")


def _rank_error(name: str, value: object, layout: str) -> Exception:
    if not isinstance(value, Tensor):
        return TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return ValueError(f"{name} must be {layout}, got {tuple(value.shape)}")
