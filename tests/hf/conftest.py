from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch


@pytest.fixture(scope="session")
def make_model() -> Callable[..., torch.nn.Module]:
    """A small Llama with random weights, large enough that its answers depend on all of the context."""
    transformers = pytest.importorskip("transformers")

    def make(*, n_heads: int = 6, n_kv_heads: int = 3, bias: bool = True, **options: object):
        config = transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=96,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=16,
            max_position_embeddings=256,
            attention_bias=bias,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        torch.manual_seed(n_heads)
        model = transformers.LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture(scope="session")
def original(make_model):
    """GQA with biases; not to be changed."""
    return make_model()


@pytest.fixture
def fresh(original):
    """A copy of the original to convert."""
    return copy.deepcopy(original)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Prompts of twelve tokens, int64 `[2, 12]`."""
    return torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
