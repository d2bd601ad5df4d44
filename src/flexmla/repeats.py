"""What an eager call on a GPU need not do again: calls of one signature are checked and planned once.

A signature is all that checks and choices look at: of the tensors sizes, strides, dtypes, devices and the alignment of
their memory, and every option. Checking a call takes longer than comparing its signature, and the dispatcher as long.
The call before of the same options is compared first, by PyTorch's own guard of tensors, which takes half as long.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch._C._dynamo.guards import TensorGuards
from torch._C._functorch import peek_interpreter_stack

from .plan import DecodePlan

if TYPE_CHECKING:
    from .ops import Launcher

MOST = 4096  # signatures; caches that grow by tokens make new ones all the time

Signature = tuple[Hashable, ...]

# The plan is kept, here and below, as its signature has but its id.
_launchers: dict[Signature, tuple[Launcher | None, DecodePlan | None]] = {}


class _Latest(NamedTuple):
    """The last call with the same options: which tensors it had, whether others are like them, and what runs both."""

    absent: list[bool]
    alike: Callable[..., bool]
    launcher: Launcher | None
    plan: DecodePlan | None


_latest: dict[Hashable, _Latest] = {}  # by the options of a signature


def find(
    tensors: tuple[Any, ...], options: tuple[Any, ...], plan: DecodePlan | None
) -> tuple[Signature | None, Launcher | None]:
    """The signature of a call, and what runs it where such a call was seen before.

    Args:
        tensors: that may be None and have not been checked; `q_nope` first.
        options: numbers, strings and booleans, not checked either.
        plan: as given to the call.

    Returns:
        None for the signature where there is nothing to `remember`: the call was seen, or has to be looked at whole.
    """
    if not _is_eligible(tensors[0]) or torch.is_grad_enabled() or _is_watched():
        return None, None
    current = torch.cuda.current_device() if _has_several_gpus() else 0
    try:
        chosen = (*options, *map(type, options), id(plan), current)  # 1 and 1.0 equal True
        latest = _latest.get(chosen)
        absent = [x is None for x in tensors]
        given = [x for x in tensors if x is not None]
        if latest is not None and latest.absent == absent and latest.alike(*given) and _are_aligned(given):
            return None, latest.launcher
        layouts = [
            None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15, type(x)) for x in tensors
        ]
        signature = (*layouts, *chosen)
        seen = _launchers.get(signature)
    except (AttributeError, RuntimeError, TypeError):  # no strided tensor, or an option of no such type
        return None, None
    if seen is not None:
        if _are_aligned(given):  # what the guard does not look at
            alike = TensorGuards(*given, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
            _latest[chosen] = _Latest(absent, alike, *seen)
        return None, seen[0]
    plain = all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
    return (signature if plain else None), None


def remember(signature: Signature, launcher: Launcher | None, plan: DecodePlan | None) -> None:
    """Lets later calls of the signature run by `launcher`; None means that they are to be looked at whole."""
    if len(_launchers) >= MOST:
        forget()
    _launchers[signature] = launcher, plan


def forget() -> None:
    """Has every signature looked at again."""
    _latest.clear()
    _launchers.clear()


@functools.cache
def _has_several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def _is_eligible(q_nope: Any) -> bool:
    return type(q_nope) is Tensor and q_nope.is_cuda


def _are_aligned(tensors: list[Tensor]) -> bool:
    places = 0
    for x in tensors:
        places |= x.data_ptr()
    return places & 15 == 0


def _is_watched() -> bool:
    """Whether something follows or replaces operators: a mode (as of a default device), transform, trace, profiler."""
    return (
        _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )
