"""Converted models in transformers: `patch_model` makes `model.generate` decode through flexmla."""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("flexmla.hf needs transformers; install it with: pip install 'flexmla[hf]'") from error

from .attention import MLAAttention
from .patch import attention_weights, convert_model, patch_model, set_decode_mode

__all__ = ["MLAAttention", "attention_weights", "convert_model", "patch_model", "set_decode_mode"]
