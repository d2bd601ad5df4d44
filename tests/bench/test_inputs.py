from __future__ import annotations

import pytest
import torch

from flexmla import MLAShape, reference
from flexmla.bench.case import Case
from flexmla.bench.inputs import MHA_HEAD_DIM, LatentInputs, MHAInputs

CPU = torch.device("cpu")
SHAPES = [MLAShape(6, 1, 24, 8), MLAShape(6, 2, 24, 8), MLAShape(6, 6, 24, 8), MLAShape(6, 1, 40, 0)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("score_scale", "softcap"), [(False, 0.0), (True, 0.0), (False, 5.0)])
def test_expected_is_the_reference(shape, score_scale, softcap):
    case = Case("shape", shape, 3, 37, torch.float16, score_scale=score_scale, softcap=softcap)
    x = LatentInputs.random(case, CPU, generator())
    out, lse = reference.mla_decode(
        x.q_nope, x.q_pe, x.ckv, x.kpe, seq_lens=x.seq_lens, softcap=softcap, score_scale=x.score_scale
    )
    for result, right in zip(x.expected(), (out, lse), strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case("shape", SHAPES[1], 3, 48, page_size=16, q_len=3),
        Case.ragged("shape", SHAPES[2], [0, 5, 37, 1], page_size=4, q_len=2),
        Case.ragged("shape", SHAPES[3], [0, 5, 37, 1]),
        Case.ragged("shape", SHAPES[0], [30, 2], page_size=1, score_scale=True),
    ],
    ids=str,
)
def test_expected_of_paged_and_ragged_rows_is_the_reference(case):
    x = LatentInputs.random(case, CPU, generator())
    right = reference.mla_decode(
        x.q_nope, x.q_pe, x.ckv, x.kpe, seq_lens=x.seq_lens, block_table=x.block_table, score_scale=x.score_scale
    )
    for result, expected in zip(x.expected(), right, strict=True):
        torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    if x.block_table is not None:
        pages = x.block_table[x.block_table >= 0]
        assert sorted(pages.tolist()) == list(range(x.ckv.shape[0]))


def test_inputs_weigh_what_the_case_counts():
    case = Case("shape", MLAShape(6, 2, 24, 8), 3, 37, torch.bfloat16, score_scale=True)
    x = LatentInputs.random(case, CPU, generator())
    tensors = (x.q_nope, x.q_pe, x.ckv, x.kpe, x.score_scale)
    out_bytes = 3 * 6 * 24 * 2
    assert sum(t.nbytes for t in tensors if t is not None) + out_bytes == LatentInputs.n_bytes(case)


def test_sets_of_one_generator_differ_and_repeat_with_the_seed():
    case = Case("shape", MLAShape(6, 2, 24, 8), 2, 5)
    random = generator(1)
    first, second = (LatentInputs.random(case, CPU, random) for _ in range(2))
    assert not torch.equal(first.ckv, second.ckv)
    assert torch.equal(first.ckv, LatentInputs.random(case, CPU, generator(1)).ckv)


def test_mha_counts_its_own_cache():
    case = Case("shape", MLAShape(4, 1, 64, 8), 2, 10)
    x = MHAInputs.random(case, CPU, generator())
    assert MHAInputs.n_bytes(case) == x.k.nbytes + x.v.nbytes + 2 * x.q.nbytes
    assert MHAInputs.flop(case) == 2 * 4 * 20 * (MHA_HEAD_DIM + MHA_HEAD_DIM)


def test_mha_expected_is_attention():
    x = MHAInputs.random(Case("shape", MLAShape(4, 1, 64, 8), 2, 10), CPU, generator())
    right = torch.nn.functional.scaled_dot_product_attention(x.q.double(), x.k.double(), x.v.double())
    out, lse = x.expected()
    torch.testing.assert_close(out.double(), right.transpose(1, 2), atol=1e-5, rtol=1e-5)
    scores = (x.q.double() @ x.k.double().mT) * MHA_HEAD_DIM**-0.5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_expected_leaves_the_process_settings_alone():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        LatentInputs.random(Case("shape", MLAShape(2, 1, 8, 8), 1, 3), CPU, generator()).expected()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
