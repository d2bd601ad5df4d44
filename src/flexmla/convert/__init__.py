"""From the attention weights of an MHA or GQA model to multi-head latent attention: pure functions on tensors."""

from .calibrate import ActivationStats
from .layer import check_options, convert_attention
from .rope_dims import RopeChoice, nope_index, rope_index
from .svd import low_rank, whitening_factor
from .weights import AttentionWeights, MLAWeights

__all__ = [
    "ActivationStats",
    "AttentionWeights",
    "MLAWeights",
    "RopeChoice",
    "check_options",
    "convert_attention",
    "low_rank",
    "nope_index",
    "rope_index",
    "whitening_factor",
]
