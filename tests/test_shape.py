from __future__ import annotations

import dataclasses

import pytest
import torch

from flexmla import MLAShape


def test_bytes_per_token_counts_latent_rope_and_value_latent():
    assert MLAShape(32, 1, 512, 16).bytes_per_token(torch.float16) == (512 + 16) * 2
    assert MLAShape(9, 3, 192, 32).bytes_per_token(torch.float32) == (192 + 3 * 32) * 4
    assert MLAShape(9, 3, 96, 32, v_width=64).bytes_per_token(torch.bfloat16) == (96 + 3 * 32 + 64) * 2
    assert MLAShape(96, 1, 512, 0).bytes_per_token(torch.bfloat16) == 1024


def test_out_width_is_that_of_the_values():
    assert MLAShape(4, 1, 64, 16).out_width == 64
    assert MLAShape(4, 1, 64, 16, v_width=24).out_width == 24


def test_shape_is_frozen_and_hashable():
    shape = MLAShape(8, 2, 64, 16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        shape.dv = 128
    assert {shape: 1}[MLAShape(8, 2, 64, 16)] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0, 1, 64, 16), "n_heads must be at least 1, got 0"),
        ((8, 0, 64, 16), "n_rope_heads must be at least 1, got 0"),
        ((8, 1, 0, 16), "dv must be at least 1, got 0"),
        ((8, 1, 64, -1), "d_pe must be at least 0, got -1"),
        ((8, 1, 64, 16, 0), "v_width must be at least 1, got 0"),
        ((8, 3, 64, 16), "n_rope_heads must divide n_heads, got 3 for n_heads 8"),
        ((8, 16, 64, 16), "n_rope_heads must divide n_heads, got 16 for n_heads 8"),
    ],
)
def test_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        MLAShape(*fields)


@pytest.mark.parametrize("value", [8.0, "8", True, None])
def test_fields_must_be_ints(value):
    with pytest.raises(TypeError, match=f"n_heads must be an int, got {type(value).__name__}"):
        MLAShape(value, 1, 64, 16)
