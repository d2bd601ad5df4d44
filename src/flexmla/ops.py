"""`torch.library` definitions: the one boundary between the checked API and the backends.

`Library.define/impl` rather than `custom_op`, which costs tens of microseconds a call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.choice import Call, choose
from .backends.torch import decode as decode_torch
from .shape import Scoring
from .tiling import BLOCK_N

_ARGUMENTS = (
    "Tensor q_nope, Tensor? q_pe, Tensor ckv_cache, Tensor? kpe_cache, Tensor? seq_lens, Tensor? block_table, "
    "Tensor? starts, Tensor? v_cache, Tensor? score_scale, float softmax_scale, float softcap, bool causal, "
    "str backend, int[] tiling"
)

_INPUTS = (
    "q_nope", "q_pe", "ckv_cache", "kpe_cache", "seq_lens", "block_table", "starts", "v_cache", "score_scale"
)  # fmt: skip

Launcher = Callable[..., tuple[Tensor, Tensor]]

# The registrations live exactly as long as this object.
_library = torch.library.Library("flexmla", "DEF")
_library.define(f"mla_decode({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
# No aliased results: functionalization, and with it torch.compile, takes no custom operator that returns its arguments.
# out and lse may be passed by position: torch.compile takes no strided `out=`, and keywords cost a microsecond a call.
_library.define(f"mla_decode.out({_ARGUMENTS}, Tensor(a!) out, Tensor(b!) lse) -> ()")


def _run(out: Tensor, lse: Tensor, *operands: Any) -> None:
    """Runs a call on the backend that suits it, writing into `out` and `lse`."""
    name, tiling = _choose(*operands)
    if operands[0].shape[0] == 0:
        return
    decode: Any = _tilelang().decode if name == "tilelang" else decode_torch
    decode(*operands[:12], tiling, out, lse)


def _choose(
    q_nope: Tensor,
    q_pe: Tensor | None,
    ckv_cache: Tensor,
    kpe_cache: Tensor | None,
    seq_lens: Tensor | None,
    block_table: Tensor | None,
    starts: Tensor | None,
    v_cache: Tensor | None,
    score_scale: Tensor | None,
    softmax_scale: float,
    softcap: float,
    causal: bool,
    backend: str,
    tiling: Sequence[int],
) -> tuple[str, Sequence[int]]:
    """Name of the backend that suits a call, and the tiling."""
    batch, q_len, n_heads, dv = q_nope.shape
    page_size = 0 if block_table is None else ckv_cache.shape[1]
    max_len = ckv_cache.shape[1] if block_table is None else block_table.shape[1] * page_size
    max_len = -(-max_len // BLOCK_N) * BLOCK_N  # whole tiles, so that a cache that grows by a token is rarely new
    n_rope_heads, d_pe = (1, 0) if kpe_cache is None else kpe_cache.shape[2:]
    v_width = None if v_cache is None else v_cache.shape[2]
    sizes = (n_heads, n_rope_heads, dv, d_pe, v_width, batch, max_len, q_len, page_size or None)
    return choose(backend, tiling, Call(q_nope.device, q_nope.dtype, *sizes, Scoring.of_call(softcap, score_scale)))


@functools.cache
def _tilelang() -> Any:
    """The TileLang backend, imported at its first call; an import statement costs a microsecond at each."""
    from .backends import tilelang

    return tilelang


def launcher(operands: Sequence[Any], out: Tensor | None, lse: Tensor | None) -> Launcher | None:
    """What runs every call of the signature of this one (see `repeats`) without dispatch or choice.

    Args:
        operands: of the operator.
        out, lse: as given to `flexmla.mla_decode`.

    Returns:
        A function of the nine tensors from `q_nope` to `score_scale`, `out` and `lse`, that returns both; None where
        such calls have to go through the operator.
    """
    batch, q_len, n_heads, dv = operands[0].shape
    if batch == 0:
        return None
    name, tiling = _choose(*operands)
    if name != "tilelang":
        return None
    softmax_scale, softcap, causal = float(operands[9]), float(operands[10]), operands[11]
    launch = _tilelang().launcher(*operands[:9], softmax_scale, softcap, causal, tiling, out, lse)
    if launch is None:
        return None

    width = dv if operands[7] is None else operands[7].shape[2]
    spans = [_footprint(x)[1] - x.data_ptr() for x in operands[:9] if x is not None]
    out_bytes, lse_bytes = batch * q_len * n_heads * width * operands[0].element_size(), 4 * batch * q_len * n_heads
    # Models of what a call allocates, an element of memory each: `empty_like` takes two thirds of `new_empty`'s time.
    element = operands[0].new_empty(1)
    like_out = element.expand(batch, q_len, n_heads, width)
    like_lse = element.new_empty(1, dtype=torch.float32).expand(batch, n_heads, q_len)
    like_workspace = element.expand(launch.workspace)

    def run(*tensors: Any) -> tuple[Tensor, Tensor]:
        *inputs, out, lse = tensors
        given = out is not None or lse is not None
        if out is None:
            out = torch.empty_like(like_out)
        if lse is None:
            lse = torch.empty_like(like_lse)
        if given:  # looked at as in `_refuse_overlap`, with the sizes known
            out_start, lse_start = out.data_ptr(), lse.data_ptr()
            out_end, lse_end = out_start + out_bytes, lse_start + lse_bytes
            apart = out_end <= lse_start or lse_end <= out_start
            for x, span in zip([x for x in inputs if x is not None], spans, strict=True):
                start = x.data_ptr()
                end = start + span
                if (start < out_end and out_start < end) or (start < lse_end and lse_start < end):
                    apart = False
            if not apart:  # by their bounds; views that interleave in one buffer still are
                _refuse_overlap(inputs, out, lse)
        launch(*inputs, softmax_scale, softcap, out, lse, torch.empty_like(like_workspace))
        return out, lse

    return run


def results(q_nope: Tensor, width: int, out: Tensor | None = None, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`out` `[batch, q_len, n_heads, width]` and `lse` `[batch, n_heads, q_len]`: allocated where not given."""
    batch, q_len, n_heads, _ = q_nope.shape
    if out is None:
        out = q_nope.new_empty((batch, q_len, n_heads, width))
    if lse is None:
        lse = q_nope.new_empty((batch, n_heads, q_len), dtype=torch.float32)
    return out, lse


def _empty_results(*arguments: Any) -> tuple[Tensor, Tensor]:
    q_nope, v_cache = arguments[0], arguments[7]
    return results(q_nope, q_nope.shape[3] if v_cache is None else v_cache.shape[2])


def _functional(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse = _empty_results(*arguments)
    _run(out, lse, *arguments)
    return out, lse


def _into(*arguments: Any) -> None:
    *operands, out, lse = arguments
    _refuse_overlap(operands, out, lse)
    _run(out, lse, *operands)


def _refuse_overlap(inputs: Sequence[Any], out: Tensor, lse: Tensor) -> None:
    """Raises ValueError where writing `out` or `lse` could change an input, the other, or another element of itself."""
    for name, result in (("out", out), ("lse", lse)):
        if not result.is_contiguous() and _overlaps_itself(result):
            raise ValueError(f"{name} must have memory of its own for every element, got strides {result.stride()}")
    out_span, lse_span = _footprint(out), _footprint(lse)
    out_start, out_end, lse_start, lse_end = *out_span[:2], *lse_span[:2]
    for name, other in (*zip(_INPUTS, inputs, strict=False), ("out", out)):  # what follows the tensors is left out
        if other is None:
            continue
        start = other.data_ptr()
        end = start + other.nbytes if other.is_contiguous() else _footprint(other)[1]
        # Bounds first: nearly all calls end there, and this is on the way of every one.
        if start < lse_end and lse_start < end and _overlap(lse_span, _footprint(other)):
            result_name = "lse"
        elif name != "out" and start < out_end and out_start < end and _overlap(out_span, _footprint(other)):
            result_name = "out"
        else:
            continue
        raise ValueError(f"{result_name} must not overlap an input or the other result, got memory of {name}")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether a dimension steps no further than what the dimensions of smaller strides span."""
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return True
            span += (size - 1) * stride
    return False


def _footprint(tensor: Tensor) -> tuple[int, int, int, int]:
    """First byte, byte after the last, bytes of the contiguous runs, and a step that divides any two runs' distance."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes, tensor.nbytes, 0
    run, step, last = 1, 0, 0
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size == 1:
            continue
        last += (size - 1) * stride
        if stride == run and step == 0:
            run *= size
        else:
            step = math.gcd(step, stride)
    width = tensor.element_size()
    return start, start + (last + 1) * width, run * width, step * width


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Whether two footprints may share a byte; views that interleave in one buffer are told apart."""
    if a[0] >= b[1] or b[0] >= a[1]:
        return False
    step = math.gcd(a[3], b[3])
    # Modulo the common step every run of a tensor starts at the same byte.
    offset = (b[0] - a[0]) % step if step else 0
    return not a[2] <= offset <= step - b[2]


def _fake_into(*arguments: Any) -> None:
    """Allocates nothing: the results are the caller's."""


for _name, _real, _fake in (("mla_decode", _functional, _empty_results), ("mla_decode.out", _into, _fake_into)):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flexmla::{_name}", _fake, lib=_library)

# Overloads, not packets: looking one up costs a microsecond a call.
mla_decode = torch.ops.flexmla.mla_decode.default
mla_decode_out = torch.ops.flexmla.mla_decode.out
