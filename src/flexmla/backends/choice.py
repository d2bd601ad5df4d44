"""The choice of a backend for one call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ..plan import HOPPER, device_record, plan_scored, tilelang_installed, tilelang_lacks
from ..shape import PLAIN, MLAShape, Scoring

NAMES = ("auto", "tilelang", "torch")

_warned = False


class Call(NamedTuple):
    """What the choice depends on: sizes as in `flexmla.MLAShape` and `flexmla.plan`, and which options a call uses."""

    device: torch.device
    dtype: torch.dtype
    n_heads: int
    n_rope_heads: int
    dv: int
    d_pe: int
    v_width: int | None
    batch: int
    max_len: int
    q_len: int
    page_size: int | None
    scoring: Scoring


def choose(
    backend: str,
    tiling: Sequence[int],
    call: Call,
) -> tuple[str, Sequence[int]]:
    """Settles which backend runs a call and with which tiling.

    Args:
        backend: "auto", "tilelang" or "torch".
        tiling: of a given plan; empty where one has to be made.
        call: what is to be decoded.

    Returns:
        "tilelang" and its tiling, or "torch" and an empty one.

    Raises:
        NotImplementedError: "tilelang" is named and lacks the combination.
        ImportError: "tilelang" is named and not installed.
    """
    if backend == "torch" or (backend == "auto" and call.device.type != "cuda"):
        return "torch", ()
    capability, lacks, planned = _settle(call)
    if backend == "tilelang":
        if lacks is not None:
            raise NotImplementedError(f"backend 'tilelang' cannot run this call: {lacks}; backend='torch' takes it")
        if not tilelang_installed():
            raise ImportError("backend 'tilelang' needs TileLang: pip install 'flexmla[tilelang]'")
    elif capability != HOPPER or not tilelang_installed():
        return "torch", ()
    elif lacks is not None:
        _warn_once(lacks)
        return "torch", ()
    # a plan does not know what is done to scores
    return "tilelang", tiling if tiling and call.scoring == PLAIN else planned


@lru_cache(maxsize=4096)
def _settle(call: Call) -> tuple[tuple[int, int], str | None, tuple[int, ...]]:
    """Capability of the device, what TileLang lacks for the call, and the tiling it would run with."""
    shape = MLAShape(call.n_heads, call.n_rope_heads, call.dv, call.d_pe, call.v_width)
    record = device_record(call.device)
    lacks = tilelang_lacks(
        shape,
        call.dtype,
        record,
        q_len=call.q_len,
        page_size=call.page_size,
        batch=call.batch,
        scoring=call.scoring,
    )
    if lacks is not None:
        return record.capability, lacks, ()
    made = plan_scored(
        shape,
        call.batch,
        call.max_len,
        q_len=call.q_len,
        page_size=call.page_size,
        dtype=call.dtype,
        device=record,
        scoring=call.scoring,
    )
    return record.capability, None, made.tiling


def _warn_once(lacks: str) -> None:
    """Says, the first time in a process, that an eligible GPU runs the slower backend."""
    global _warned
    if not _warned:
        _warned = True
        # Past the operator, to the caller of mla_decode.
        warnings.warn(f"flexmla uses its torch backend for this call, as TileLang cannot run it: {lacks}", stacklevel=8)
