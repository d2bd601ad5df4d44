"""Multi-head latent attention (MLA) decoding at any shape."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .api import mla_decode
from .cache import CacheFullError, PagedLatentCache
from .merge import merge_states
from .plan import DecodePlan, DeviceRecord, plan
from .shape import MLAShape

__version__ = "0.1.0"

__all__ = [
    "CacheFullError",
    "DecodePlan",
    "DeviceRecord",
    "MLAShape",
    "PagedLatentCache",
    "__version__",
    "merge_states",
    "mla_decode",
    "plan",
]

# Imported at first use: not on the decode path, and hf needs an extra.
_MODULES = ("check", "compat", "convert", "hf", "reference")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
