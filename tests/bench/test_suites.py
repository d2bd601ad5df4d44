from __future__ import annotations

import pytest
import torch

from flexmla import MLAShape
from flexmla.bench.case import Case
from flexmla.bench.suites import SUITES, mixed_lens, overhead_cases, suite_cases
from flexmla.models import model_shapes


@pytest.mark.parametrize(
    ("rope_heads", "batch", "max_len", "megabytes"),
    [
        (1, 8, 2048, 17.8),
        (1, 8, 4096, 35.1),
        (1, 64, 2048, 142.7),
        (1, 64, 8192, 557.9),
        (32, 8, 2048, 34.1),
        (32, 64, 8192, 1078),
    ],
)
def test_bytes_of_llama2(rope_heads, batch, max_len, megabytes):
    case = Case("llama2", MLAShape(32, rope_heads, 512, 16), batch, max_len)
    assert case.n_bytes / 1e6 == pytest.approx(megabytes, rel=3e-3)


def test_bytes_are_those_of_the_tensors():
    case = Case("shape", MLAShape(8, 4, 24, 8), 3, 50, torch.bfloat16, score_scale=True)
    cache = 3 * 50 * (24 + 4 * 8) * 2 + 3 * 50 * 4 * 4
    assert case.n_bytes == cache + 3 * 8 * (24 + 8) * 2 + 3 * 8 * 24 * 2


def test_flop_counts_both_products():
    assert Case("shape", MLAShape(128, 1, 512, 64), 2, 10).flop == 2 * 128 * 20 * (512 + 64 + 512)


def test_tokens_are_summed_over_the_batch():
    assert Case("shape", MLAShape(8, 1, 64, 8), 3, 50).tokens == 150


@pytest.mark.parametrize(("batch", "max_len"), [(0, 8), (8, 0)])
def test_empty_cases_are_refused(batch, max_len):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        Case("shape", MLAShape(8, 1, 64, 8), batch, max_len)


def test_separate_value_latents_are_refused():
    with pytest.raises(ValueError, match="no v_width in a bench case, got 32"):
        Case("shape", MLAShape(8, 1, 64, 8, v_width=32), 1, 1)


@pytest.mark.parametrize("name", SUITES)
def test_every_case_is_there_once_and_names_its_suite(name):
    cases = suite_cases([name], torch.bfloat16)
    assert len(set(cases)) == len(cases) > 0
    assert {case.suite for case in cases} == {name}
    assert {case.dtype for case in cases} == {torch.bfloat16}


def test_models_cover_every_row():
    cases = suite_cases(["models"])
    for model in model_shapes():
        sizes = {
            (case.batch, case.max_len)
            for case in cases
            if case.shape == model.shape and case.score_scale == model.score_scale and case.softcap == model.softcap
        }
        assert sizes == {(64, 8192), (8, 2048), (1, 128)}, model.name
        assert any(model.name in case.label for case in cases)


def test_small_latent_covers_shared_and_per_head_keys():
    shapes = {case.shape for case in suite_cases(["small-latent"])}
    assert {shape.dv for shape in shapes} == {128, 256}
    assert {(s.n_heads, s.n_rope_heads == 1) for s in shapes} == {(h, x) for h in (16, 24, 32) for x in (True, False)}
    assert all(shape.n_rope_heads in (1, shape.n_heads) for shape in shapes)


def test_suites_keep_their_order():
    assert [case.suite for case in suite_cases(["per-head", "llama2"])] == ["per-head"] * 4 + ["llama2"] * 4


def test_an_unknown_suite_is_named():
    with pytest.raises(ValueError, match=r"suites must be among llama2, .*, got 'llama3'"):
        suite_cases(["llama2", "llama3"])


def test_a_case_in_one_line():
    assert str(Case("llama2", MLAShape(32, 1, 512, 16), 64, 8192)) == "llama2 32/1 512+16 64 x 8K"
    assert Case("shape", MLAShape(32, 1, 512, 16), 3, 100).size == "3 x 100"
    uneven = Case.ragged("ragged", MLAShape(32, 1, 512, 16), [131072] + [1024] * 63, page_size=64, q_len=2)
    assert uneven.size == "1 x 128K + 63 x 1K, page 64, q_len 2"
    assert Case.ragged("ragged", MLAShape(32, 1, 512, 16), [1, 7, 9, 2048]).size == "4 x 1..2K"


def test_ragged_cases_count_what_is_visible_and_hold_what_is_there():
    shape = MLAShape(8, 1, 64, 16)
    paged = Case.ragged("ragged", shape, [100, 0, 16], page_size=16)
    assert (paged.tokens, paged.max_len, paged.row_pages, paged.slots) == (116, 112, (7, 0, 1), (8, 16))
    per_row = 3 * 8 * (64 + 16 + 64) * 2
    assert paged.n_bytes == 116 * 160 + per_row
    assert paged.held_bytes == 128 * 160 + per_row
    with pytest.raises(ValueError, match="lens must hold a visible token, got only 0"):
        Case.ragged("ragged", shape, [0, 0])
    contiguous = Case.ragged("ragged", shape, [100, 0, 16])
    assert (contiguous.max_len, contiguous.slots) == (100, (3, 100))
    assert contiguous.held_bytes == 300 * 160 + per_row


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"batch": 2, "max_len": 10, "lens": (3,)}, "lens must hold a length for each of the 2 rows, got 1"),
        ({"batch": 1, "max_len": 10, "lens": (11,)}, "lens must be 0 to max_len 10, got 11"),
        ({"batch": 1, "max_len": 10, "lens": (0,)}, "lens must hold a visible token"),
        ({"batch": 1, "max_len": 10, "page_size": 4}, "max_len must be a multiple of page_size 4, got 10"),
        ({"batch": 1, "max_len": 10, "q_len": 0}, "q_len must be at least 1, got 0"),
    ],
)
def test_contradicting_sizes_are_named(sizes, named):
    with pytest.raises(ValueError, match=named):
        Case("shape", MLAShape(8, 1, 64, 8), **sizes)


def test_suites_of_the_paths_that_engines_use():
    paged, ragged, mtp = (suite_cases([name]) for name in ("paged", "ragged", "mtp"))
    assert {case.page_size for case in paged} == {2**n for n in range(9)}
    assert len({case.tokens for case in ragged if case.page_size}) == 1  # one long row, or the same tokens evenly
    assert {case.q_len for case in mtp} >= {1, 2, 4}
    assert {case.page_size for case in overhead_cases()} == {0, 64}
    lens = mixed_lens(256, 8192)
    assert lens == mixed_lens(256, 8192)
    assert (min(lens), max(lens), len(lens)) == (0, 8192, 256)
