from __future__ import annotations

import pytest
import torch

from flexmla.convert import nope_index, rope_index


def pairs(choice: str, d_pe: int, n_pairs: int = 8) -> list[int]:
    index = rope_index(choice, d_pe=d_pe, head_dim=2 * n_pairs, n_kv_heads=3)
    assert index.dtype == torch.int64
    assert index.shape == (3, d_pe)
    first, second = index.chunk(2, dim=1)
    assert torch.equal(second, first + n_pairs), "both dimensions of a pair are kept"
    assert (index == index[0]).all()
    return first[0].tolist()


@pytest.mark.parametrize(
    ("choice", "d_pe", "expected"),
    [
        ("high", 6, [0, 1, 2]),
        ("low", 6, [5, 6, 7]),
        ("uniform", 8, [0, 2, 4, 6]),
        ("uniform", 6, [0, 2, 5]),
        ("high", 16, list(range(8))),
        ("low", 16, list(range(8))),
        ("uniform", 16, list(range(8))),
        ("high", 0, []),
        ("low", 0, []),
        ("uniform", 0, []),
    ],
)
def test_fixed_choices(choice, d_pe, expected):
    assert pairs(choice, d_pe) == expected


def test_two_norm_takes_the_strongest_pairs_of_each_head():
    scores = torch.tensor([[1.0, 9.0, 2.0, 8.0], [5.0, 1.0, 6.0, 2.0]])
    index = rope_index("2-norm", d_pe=4, head_dim=8, n_kv_heads=2, pair_scores=scores)
    assert index.tolist() == [[1, 3, 5, 7], [0, 2, 4, 6]]


def test_nope_index_is_the_complement():
    rope = torch.tensor([[1, 3, 5, 7], [0, 2, 4, 6]])
    assert nope_index(rope, 8).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert nope_index(torch.empty(2, 0, dtype=torch.int64), 4).tolist() == [[0, 1, 2, 3]] * 2
    assert nope_index(torch.arange(4).expand(2, 4), 4).shape == (2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choice": "middle"}, "rope_dims is 'middle', expected one of high, low, uniform, 2-norm"),
        ({"d_pe": 3}, "d_pe is 3, expected an even number from 0 to head_dim 8"),
        ({"d_pe": 10}, "d_pe is 10, expected an even number"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"d_pe": -2}, "d_pe is -2, expected an even number"),
        ({"choice": "2-norm"}, "'2-norm' needs calibration activations"),
        ({"choice": "2-norm", "pair_scores": torch.ones(2, 3)}, r"pair_scores has shape \[2, 3\], expected \[2, 4\]"),
    ],
)
def test_bad_choices(options, message):
    arguments = {"choice": "high", "d_pe": 4, "head_dim": 8, "n_kv_heads": 2} | options
    with pytest.raises(ValueError, match=message):
        rope_index(arguments.pop("choice"), **arguments)
