"""The oracle against formulas written out here, and against itself where one option can be expressed by another."""

from __future__ import annotations

import math

import pytest
import torch

from flexmla.reference import mla_decode


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_reproduces_multi_head_attention_with_a_rope_key_per_head():
    """Softmax of (q.kv^T + q_pe.k_pe^T) / sqrt(dv + d_pe), times kv, with k_pe `[b, h, n, d_pe]`."""
    b, h, n, dv, d_pe = 3, 4, 37, 24, 8
    q, q_pe = normal(b, 1, h, dv), normal(b, 1, h, d_pe, seed=1)
    kv, k_pe = normal(b, 1, n, dv, seed=2), normal(b, h, n, d_pe, seed=3)
    scores = torch.einsum("bqhd,bond->bhqn", q, kv) + torch.einsum("bqhd,bhnd->bhqn", q_pe, k_pe)
    scores = scores / math.sqrt(dv + d_pe)
    out = torch.einsum("bhqn,bond->bqhd", scores.softmax(-1), kv)

    equal(mla_decode(q, q_pe, kv[:, 0], k_pe.transpose(1, 2)), (out, scores.logsumexp(-1)))


def test_one_visible_token_is_returned_as_it_is():
    q, ckv = normal(1, 1, 2, 8), normal(1, 5, 8, seed=1)
    seq_lens, starts = torch.tensor([3], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    out, lse = mla_decode(q, None, ckv, None, seq_lens=seq_lens, starts=starts, softmax_scale=0.5)
    equal((out,), (ckv[:, 2].expand(1, 1, 2, 8),))
    equal((lse[0, :, 0],), (0.5 * q[0, 0] @ ckv[0, 2],))


def test_two_tokens_by_hand():
    q = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    ckv = torch.tensor([[[math.log(3.0), 1.0], [0.0, 5.0]]], dtype=torch.float64)
    out, lse = mla_decode(q, None, ckv, None, softmax_scale=1.0)
    assert lse.item() == pytest.approx(math.log(4.0))
    assert out.flatten().tolist() == pytest.approx([0.75 * math.log(3.0), 0.75 * 1.0 + 0.25 * 5.0])


def test_default_scale_counts_both_parts():
    q, q_pe, ckv, kpe = (
        normal(1, 1, 2, 8),
        normal(1, 1, 2, 4, seed=1),
        normal(1, 5, 8, seed=2),
        normal(1, 5, 1, 4, seed=3),
    )
    equal(mla_decode(q, q_pe, ckv, kpe), mla_decode(q, q_pe, ckv, kpe, softmax_scale=12**-0.5))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_grouped_rope_keys_are_repeated_for_neighbouring_heads(groups):
    q, q_pe, ckv = normal(2, 2, 6, 8), normal(2, 2, 6, 4, seed=1), normal(2, 9, 8, seed=2)
    kpe = normal(2, 9, groups, 4, seed=3)
    equal(mla_decode(q, q_pe, ckv, kpe), mla_decode(q, q_pe, ckv, kpe.repeat_interleave(6 // groups, dim=2)))


def test_pages_are_contiguous_slots_in_table_order():
    q, q_pe, pages, kpe = (
        normal(2, 3, 4, 8),
        normal(2, 3, 4, 4, seed=1),
        normal(6, 4, 8, seed=2),
        normal(6, 4, 2, 4, seed=3),
    )
    table = torch.tensor([[5, 0, 3], [1, 4, -1]], dtype=torch.int32)
    lens = torch.tensor([11, 6], dtype=torch.int32)
    rows = torch.tensor([[5, 0, 3], [1, 4, 0]])
    contiguous = mla_decode(q, q_pe, pages[rows].flatten(1, 2), kpe[rows].flatten(1, 2), seq_lens=lens)
    equal(mla_decode(q, q_pe, pages, kpe, seq_lens=lens, block_table=table), contiguous)


def test_causal_queries_each_see_one_token_more():
    q, ckv = normal(1, 3, 2, 8), normal(1, 7, 8, seed=1)
    out, lse = mla_decode(q, None, ckv, None)
    for i in range(3):
        alone = mla_decode(q[:, i : i + 1], None, ckv[:, : 5 + i], None)
        equal((out[:, i : i + 1], lse[:, :, i : i + 1]), alone)


def test_without_causal_every_query_sees_all():
    q, ckv = normal(1, 3, 2, 8), normal(1, 7, 8, seed=1)
    out, lse = mla_decode(q, None, ckv, None, causal=False)
    for i in range(3):
        equal((out[:, i : i + 1], lse[:, :, i : i + 1]), mla_decode(q[:, i : i + 1], None, ckv, None))


def test_starts_and_seq_lens_cut_a_slice():
    q, ckv = normal(1, 1, 2, 8), normal(1, 9, 8, seed=1)
    starts, lens = torch.tensor([2], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
    equal(mla_decode(q, None, ckv, None, starts=starts, seq_lens=lens), mla_decode(q, None, ckv[:, 2:7], None))


def test_rows_that_see_nothing_are_zero_and_minus_infinity():
    q, ckv = normal(3, 2, 2, 8), normal(3, 9, 8, seed=1)
    lens, starts = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([0, 0, 6], dtype=torch.int32)
    out, lse = mla_decode(q, None, ckv, None, seq_lens=lens, starts=starts)
    empty = torch.tensor([[True, True], [True, False], [True, True]])
    assert (out[empty] == 0).all()
    assert torch.equal(lse.mT == float("-inf"), empty[..., None].expand(3, 2, 2))


def test_softcap_bounds_the_scores_after_scaling():
    q, ckv = 30 * normal(1, 1, 2, 8), normal(1, 9, 8, seed=1)
    scores = 2.0 * torch.tanh(torch.einsum("bqhd,btd->bhqt", q, ckv) * 0.1 / 2.0)
    out = torch.einsum("bhqt,btd->bqhd", scores.softmax(-1), ckv)
    equal(mla_decode(q, None, ckv, None, softmax_scale=0.1, softcap=2.0), (out, scores.logsumexp(-1)))


def test_score_scale_multiplies_a_token_and_head_group_before_softcap():
    q, q_pe, ckv, kpe = (
        normal(1, 1, 4, 8),
        normal(1, 1, 4, 4, seed=1),
        normal(1, 9, 8, seed=2),
        normal(1, 9, 2, 4, seed=3),
    )
    scale = 0.5 + normal(1, 9, 2, seed=4).abs()
    scores = torch.einsum("bqhd,btd->bhqt", q, ckv)
    scores = scores + torch.einsum("bqhd,bthd->bhqt", q_pe, kpe.repeat_interleave(2, 2))
    scores = 12**-0.5 * scores * scale.repeat_interleave(2, 2).permute(0, 2, 1)[:, :, None]
    scores = 3.0 * torch.tanh(scores / 3.0)
    out = torch.einsum("bhqt,btd->bqhd", scores.softmax(-1), ckv)
    equal(mla_decode(q, q_pe, ckv, kpe, score_scale=scale, softcap=3.0), (out, scores.logsumexp(-1)))


def test_v_cache_replaces_the_values_only():
    q, ckv, v = normal(2, 1, 3, 8), normal(2, 9, 8, seed=1), normal(2, 9, 5, seed=2)
    scores = torch.einsum("bqhd,btd->bhqt", q, ckv) * 8**-0.5
    out, lse = mla_decode(q, None, ckv, None, v_cache=v)
    equal((out,), (torch.einsum("bhqt,btw->bqhw", scores.softmax(-1), v),))
    equal((lse,), (mla_decode(q, None, ckv, None)[1],))


def test_computes_in_the_dtype_asked_for():
    q, ckv = normal(1, 1, 2, 8).half(), normal(1, 9, 8, seed=1).half()
    for dtype in (torch.float32, torch.float64):
        assert {x.dtype for x in mla_decode(q, None, ckv, None, dtype=dtype)} == {dtype}
    assert mla_decode(q, None, ckv, None)[0].dtype == torch.float64
