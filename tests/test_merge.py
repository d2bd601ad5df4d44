from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from flexmla import merge_states, reference

INF = float("inf")


def parts_of(batch=2, q_len=3, n_heads=4, dv=16, cuts=(0, 5, 5, 20, 33)):
    """Attention over slices of one cache, and over all of it; the slice 5:5 is empty."""
    torch.manual_seed(0)
    q = torch.randn(batch, q_len, n_heads, dv)
    cache = torch.randn(batch, cuts[-1], dv)

    def attend(first, last):
        return reference.mla_decode(q, None, cache[:, first:last], None, causal=False)

    states = [attend(first, last) for first, last in pairwise(cuts)]
    outs, lses = (torch.stack(list(x)) for x in zip(*states, strict=True))
    return outs, lses, *attend(0, cuts[-1])


def test_merging_slices_is_attention_over_all_tokens():
    outs, lses, out, lse = parts_of()
    merged, merged_lse = merge_states(outs.float(), lses.float())
    assert merged.dtype == merged_lse.dtype == torch.float32
    torch.testing.assert_close(merged.double(), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged_lse.double(), lse, rtol=1e-6, atol=1e-6)


def test_order_of_parts_only_changes_rounding():
    outs, lses, _, _ = parts_of()
    forward, backward = (
        merge_states(outs.float(), lses.float()),
        merge_states(outs.float().flip(0), lses.float().flip(0)),
    )
    for a, b in zip(forward, backward, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_all_empty_gives_zero_and_minus_infinity():
    out, lse = merge_states(torch.full((3, 1, 2, 4, 8), float("nan")), torch.full((3, 1, 4, 2), -INF))
    assert torch.equal(out, torch.zeros(1, 2, 4, 8))
    assert torch.equal(lse, torch.full((1, 4, 2), -INF))


def test_an_empty_part_counts_for_nothing_whatever_it_holds():
    outs, lses = torch.randn(2, 1, 1, 2, 8), torch.randn(2, 1, 2, 1)
    outs[1], lses[1] = float("nan"), -INF
    out, lse = merge_states(outs, lses)
    assert torch.equal(out, outs[0])
    assert torch.equal(lse, lses[0])


def test_one_part_comes_back_unchanged():
    outs, lses = torch.randn(1, 2, 3, 4, 8).half(), torch.randn(1, 2, 4, 3)
    out, lse = merge_states(outs, lses)
    assert torch.equal(out, outs[0])
    assert torch.equal(lse, lses[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_float32_inside(dtype):
    """Merging many 16-bit parts rounds once, at the end."""
    torch.manual_seed(1)
    outs, lses = torch.randn(64, 1, 2, 4, 32).to(dtype), torch.randn(64, 1, 4, 2)
    share = lses.double().softmax(0).mT.unsqueeze(-1)
    exact = (share * outs.double()).sum(0)
    out, _ = merge_states(outs, lses)
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()


def test_large_lse_does_not_overflow():
    out, lse = merge_states(torch.ones(2, 1, 1, 1, 4), torch.full((2, 1, 1, 1), 5000.0))
    assert torch.equal(out, torch.ones(1, 1, 1, 4))
    assert lse.item() == pytest.approx(5000.0 + 0.6931472)


def test_batch_of_zero():
    out, lse = merge_states(torch.empty(2, 0, 1, 4, 8), torch.empty(2, 0, 4, 1))
    assert out.shape == (0, 1, 4, 8)
    assert lse.shape == (0, 4, 1)


@pytest.mark.gpu
def test_gpu_never_synchronises():
    outs, lses = torch.randn(4, 2, 1, 8, 64, device="cuda"), torch.randn(4, 2, 8, 1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = merge_states(outs, lses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip((out, lse), merge_states(outs.cpu(), lses.cpu()), strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([1.0], torch.zeros(1), TypeError, "outs must be a tensor, got list"),
        (torch.zeros(1, 1, 1, 1, 1), None, TypeError, "lses must be a tensor, got NoneType"),
        (torch.zeros(1, 1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1), TypeError, "outs must be .*, got torch.float64"),
        (torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1).half(), TypeError, "lses must be torch.float32, got"),
        (torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), ValueError, r"outs must be \[n, batch.*got \(2, 1, 1, 1\)"),
        (torch.zeros(0, 1, 1, 1, 1), torch.zeros(0, 1, 1, 1), ValueError, "n >= 1"),
        (torch.zeros(2, 1, 3, 4, 8), torch.zeros(2, 1, 3, 4), ValueError, r"lses must be .* = \(2, 1, 4, 3\), got"),
        (
            torch.zeros(1, 1, 1, 1, 1),
            torch.zeros(1, 1, 1, 1, device="meta"),
            ValueError,
            "on outs' device cpu, got meta",
        ),
    ],
)
def test_bad_arguments(outs, lses, error, message):
    with pytest.raises(error, match=message):
        merge_states(outs, lses)
