"""Multi-head latent attention (MLA) decoding at any shape."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from .api import mla_decode
from .merge import merge_states
from .plan import DecodePlan, DeviceRecord, plan
from .shape import MLAShape

try:
    __version__ = version("flexmla")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["DecodePlan", "DeviceRecord", "MLAShape", "__version__", "merge_states", "mla_decode", "plan"]

# Imported at first use: not on the decode path, and hf needs an extra.
_MODULES = ("check", "convert", "hf", "reference")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
