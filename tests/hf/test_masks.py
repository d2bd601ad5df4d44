from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from flexmla import hf
from flexmla.hf.masks import MaskReader, visible_range


def causal(starts: list[int], past: int, q_len: int, slots: int) -> torch.Tensor:
    t = torch.arange(slots)
    ends = past + torch.arange(1, q_len + 1)
    return ((t >= torch.tensor(starts)[:, None, None]) & (t < ends[:, None]))[:, None]


@pytest.mark.parametrize("past", [4, torch.tensor(4)])
@pytest.mark.parametrize("q_len", [1, 3])
def test_left_padding_is_a_range(past, q_len):
    found = visible_range(causal([0, 2, 4], 4, q_len, 9), past, 3)
    assert found.starts.tolist() == [0, 2, 4]
    assert found.starts.dtype == torch.int32
    assert found.regular.tolist() == [True] * 3


def test_holes_are_found():
    mask = causal([0, 0, 0, 0], 4, 2, 9)
    mask[0, 0, :, 3] = False  # padding on the right of a prompt
    mask[1, 0, 0, 5] = True  # looks ahead
    mask[2, 0, 1, 5] = False  # misses itself
    assert visible_range(mask, 4, 4).regular.tolist() == [False, False, False, True]


def test_a_row_that_sees_nothing_is_an_empty_range():
    mask = causal([0, 9], 4, 1, 9)
    found = visible_range(mask, 4, 2)
    assert found.starts.tolist() == [0, 9]
    assert found.regular.tolist() == [True, True]


def test_one_mask_for_all_rows():
    found = visible_range(causal([2], 4, 1, 9), 4, 3)
    assert found.starts.tolist() == [2, 2, 2]


def test_reader_reads_once_a_pass():
    reader, mask = MaskReader(), causal([0, 2], 4, 1, 9)
    first = reader.read(mask, 4, 2, first_layer=True)
    assert first.regular is None, "looked at and found regular"
    assert reader.read(mask, 4, 2, first_layer=False) is first
    mask[0, ..., 1] = False  # the same tensor, changed in place before the next pass
    assert reader.read(mask, 4, 2, first_layer=True) is None
    assert reader.read(mask, 4, 2, first_layer=False) is None
    assert reader.read(causal([1, 2], 4, 1, 9), 4, 2, first_layer=False).starts.tolist() == [1, 2]


def test_masks_that_are_no_ranges_are_not_read():
    assert MaskReader().read(torch.zeros(2, 1, 1, 9), 4, 2, first_layer=True) is None
    assert MaskReader().read(causal([0, 0], 4, 1, 9).expand(2, 3, 1, 9), 4, 2, first_layer=True) is None


@torch.no_grad()
def test_holes_that_cannot_be_looked_at_give_nan(fresh, ids, monkeypatch):
    """As with a static cache on an accelerator, where looking at the mask would wait for the device."""
    model = hf.patch_model(fresh, rank=40, d_pe=8)
    past = model(ids).past_key_values
    mask = torch.ones(2, 1, 1, 13, dtype=torch.bool)
    mask[0, ..., 4] = False
    monkeypatch.setattr(
        MaskReader, "read", lambda self, mask, past, batch, first_layer: visible_range(mask, past, batch)
    )
    out = model(ids[:, :1], attention_mask=mask, position_ids=torch.full((2, 1), 12), past_key_values=past).logits
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
