from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console

from flexmla import DeviceRecord, cases, check
from flexmla.cases import GARBAGE_PAGES, CaseSpace, random_case
from flexmla.check import Errors, bounds, row_errors
from flexmla.plan import tilelang_lacks
from flexmla.tiling import FAMILIES, tile

INF = float("inf")
CPU = torch.device("cpu")


def tensors_of(case):
    named = {"q_nope": case.q_nope, "q_pe": case.q_pe, "ckv_cache": case.ckv_cache, "kpe_cache": case.kpe_cache}
    named |= {**case.options, "out": case.out, "lse": case.lse}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def test_a_seed_is_always_the_same_case():
    for seed in range(20):
        first, second = random_case(seed), random_case(seed)
        assert first.describe() == second.describe()
        for (name, a), b in zip(tensors_of(first).items(), tensors_of(second).values(), strict=True):
            assert a.stride() == b.stride(), name
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


def test_cases_cover_every_option():
    drawn = [random_case(seed) for seed in range(300)]
    for name in ("starts", "causal", "softcap", "softmax_scale", "v_cache", "score_scale", "block_table", "seq_lens"):
        used = sum(name in case.options for case in drawn)
        assert 30 < used < 300, name
    for name in ("out", "lse", "q_pe"):
        assert 30 < sum(getattr(case, name) is not None for case in drawn) < 300, name
    assert {case.q_nope.dtype for case in drawn} == set(CaseSpace().dtypes)
    pages = {case.ckv_cache.shape[1] for case in drawn if case.paged}
    assert pages == {size for size in CaseSpace().page_sizes if size}
    ropes = {
        (c.kpe_cache.shape[2] == 1, c.kpe_cache.shape[2] == c.q_nope.shape[2]) for c in drawn if c.kpe_cache is not None
    }
    assert {(True, False), (False, True), (False, False)} <= ropes
    lens = [n for c in drawn if "seq_lens" in c.options for n in (c.options["seq_lens"] - c.q_nope.shape[1]).tolist()]
    assert min(lens) < 0 < max(lens)
    merged = [c for c in drawn if c.kpe_cache is not None and c.ckv_cache.data_ptr() < c.kpe_cache.data_ptr()]
    assert any(c.ckv_cache.untyped_storage().data_ptr() == c.kpe_cache.untyped_storage().data_ptr() for c in merged)
    strides = {case.ckv_cache.is_contiguous() for case in drawn}
    assert strides == {True, False}


def test_memory_around_the_visible_tokens_is_poisoned():
    """Every cache element is finite exactly where a query sees its token, and so is the buffer behind the view."""
    for seed in range(100):
        case = random_case(seed)
        batch = case.q_nope.shape[0]
        slots, slot_len, _ = case.ckv_cache.shape
        lens = case.options.get("seq_lens", torch.full((batch,), slot_len)).tolist()
        starts = case.options.get("starts", torch.zeros(batch)).tolist()
        seen = torch.zeros(slots, slot_len, dtype=torch.bool)
        for b in range(batch):
            for t in range(int(starts[b]), lens[b]):
                slot = int(case.options["block_table"][b, t // slot_len]) if case.paged else b
                seen[slot, t % slot_len if case.paged else t] = True
        for name in ("ckv_cache", "kpe_cache", "v_cache", "score_scale"):
            tensor = tensors_of(case).get(name)
            if tensor is not None:
                assert torch.equal(tensor.isfinite().flatten(2).all(-1), seen), name
                assert torch.equal(tensor.isfinite().flatten(2).any(-1), seen), name
        for name in ("out", "lse"):
            given = getattr(case, name)
            assert given is None or not given.isfinite().any()
        if case.paged:
            used = seen.any(-1).nonzero().flatten().tolist()
            entries = set(case.options["block_table"].flatten().tolist())
            assert entries - set(used) <= set(GARBAGE_PAGES)


def test_padding_between_strides_is_poisoned():
    case = next(c for c in map(random_case, range(100)) if c.kpe_cache is None and not c.ckv_cache.is_contiguous())
    buffer = torch.empty(0, dtype=case.ckv_cache.dtype).set_(case.ckv_cache.untyped_storage())
    assert buffer.isfinite().sum() == case.ckv_cache.isfinite().sum()


def test_a_space_restricts_what_is_drawn():
    space = CaseSpace(n_heads=(8, 32), d_pe=(8,), page_sizes=(None,), scoring=False, strides=False, max_tokens=50)
    for seed in range(60):
        case = random_case(seed, space)
        assert case.q_nope.shape[2] in (8, 32)
        assert set(case.options) <= {"seq_lens", "softmax_scale", "starts", "causal"}
        assert case.kpe_cache.shape[3] == 8
        assert case.ckv_cache.is_contiguous()
        assert case.ckv_cache.shape[0] * case.ckv_cache.shape[1] <= max(50, case.ckv_cache.shape[0])


def test_bounds_are_those_promised():
    assert bounds(torch.float16) == (2e-3, 2e-3)
    assert bounds(torch.bfloat16) == (1.2e-2, 2e-3)
    assert bounds(torch.float32) == (1e-4, 1e-4)
    # The lse measure folds the relative part in: at |lse| = 50, 16-bit results may be off by 2e-3 + 2e-4 * 50.
    ref = torch.zeros(1, 1, 1, 4).double(), torch.full((1, 1, 1), 50.0).double()
    assert row_errors(ref[0], ref[1] + 1.1e-2, *ref).lse < bounds(torch.float16).lse
    assert row_errors(ref[0], ref[1] + 1.3e-2, *ref).lse > bounds(torch.float16).lse


def test_row_errors_find_the_worst_row():
    ref, ref_lse = torch.randn(2, 3, 4, 8).double(), torch.randn(2, 4, 3).double()
    assert row_errors(ref, ref_lse, ref, ref_lse) == (0.0, 0.0)
    out, lse = ref.clone(), ref_lse.clone()
    out[1, 2, 3] *= 1.25
    lse[0, 1, 2] += 0.5
    errors = row_errors(out, lse, ref, ref_lse)
    assert errors.row == pytest.approx(0.25)
    assert errors.lse == pytest.approx(0.5 / (1 + ref_lse[0, 1, 2].abs().item() / 10))


@pytest.mark.parametrize("bad", [float("nan"), INF, 1e-30])
def test_an_empty_row_must_be_zero(bad):
    ref, ref_lse = torch.zeros(1, 1, 1, 8).double(), torch.full((1, 1, 1), -INF).double()
    out = ref.clone()
    out[..., 3] = bad
    assert row_errors(ref, ref_lse, ref, ref_lse) == (0.0, 0.0)
    assert row_errors(out, ref_lse, ref, ref_lse).row == INF


@pytest.mark.parametrize(
    ("lse", "ref"), [(float("nan"), 1.0), (float("nan"), -INF), (-INF, 1.0), (0.0, -INF), (INF, -INF)]
)
def test_an_lse_must_be_infinite_where_the_reference_is(lse, ref):
    out = torch.ones(1, 1, 1, 8).double()
    assert row_errors(out, torch.full((1, 1, 1), lse), out, torch.full((1, 1, 1), ref)).lse == INF


def test_nothing_to_compare_is_no_error():
    empty = torch.empty(0, 1, 2, 8)
    assert row_errors(empty, torch.empty(0, 2, 1), empty, torch.empty(0, 2, 1)) == Errors(0.0, 0.0)


def run(console=None, **changes):
    console = console or Console(record=True, width=120)
    arguments = {"cases": 25, "seed": None, "device": CPU, "dtype": None, "backend": "auto", "console": console}
    misses = check.run(**{**arguments, **changes})
    return misses, console.export_text()


def test_run_prints_a_table_of_the_worst_errors():
    misses, text = run()
    assert misses == 0
    assert "25 random cases on cpu" in text
    assert all(word in text for word in ("fp16", "bf16", "fp32", "paged", "contiguous"))
    assert "miss " not in text


def test_run_takes_one_dtype_or_one_seed():
    _, text = run(dtype=torch.bfloat16)
    assert "bf16" in text
    assert "fp16" not in text
    assert "1 random cases" in run(seed=11)[1]


def test_run_lists_the_seed_of_every_miss(monkeypatch):
    wrong = {3, 17}
    honest = cases.Case.decode

    def decode(case, **arguments):
        out, lse = honest(case, **arguments)
        return (out + 1 if case.seed in wrong else out), lse

    monkeypatch.setattr(cases.Case, "decode", decode)
    misses, text = run(dtype=torch.float32)
    assert misses == 2
    assert [seed for seed in range(25) if f"--seed {seed} " in text] == sorted(wrong)
    assert "--dtype fp32" in text
    assert run(seed=17)[0] == 1
    assert run(seed=16)[0] == 0


def test_a_case_that_raises_is_a_miss(monkeypatch):
    def decode(case, **arguments):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(cases.Case, "decode", decode)
    misses, text = run(cases=2)
    assert misses == 2
    assert "RuntimeError: launch failed" in text


def test_run_refuses_what_it_cannot_check():
    with pytest.raises(ValueError, match="backend must be 'auto', 'tilelang' or 'torch', got 'cuda'"):
        run(backend="cuda")
    with pytest.raises(ValueError, match=r"dtype must be one of fp16, bf16 with backend 'tilelang', got torch.float32"):
        run(backend="tilelang", dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"capability 9\.0"):
        run(backend="tilelang")


def test_run_counts_seeds_from_the_first_one(monkeypatch):
    seen = []
    monkeypatch.setattr(check, "random_case", lambda seed, *_: seen.append(seed) or random_case(seed))
    assert run(cases=3, first_seed=40)[0] == 0
    assert seen == [40, 41, 42]


def test_scores_spread_up_to_where_one_token_wins():
    """The drawn scales reach from flat to one-hot attention."""
    tops = []
    for seed in range(40):
        case = random_case(seed, CaseSpace(q_len=(1,), scoring=False, page_sizes=(None,)))
        _, lse = case.expected()
        tops += lse[lse.isfinite()].tolist()
    assert max(tops) > 20
    assert sum(abs(x) < math.log(96) + 1 for x in tops) > len(tops) / 4


def test_tilelang_specialisations_cover_what_the_backend_takes():
    record = DeviceRecord((9, 0), 132)
    specialisations = check.TILELANG.specialisations
    assert len(set(specialisations)) == len(specialisations) == 64
    for shape, dtype, q_len, _, scoring in specialisations:
        assert tilelang_lacks(shape, dtype, record, q_len=q_len, scoring=scoring) is None, shape
    shapes = [s.shape for s in specialisations]
    assert {s.n_heads for s in shapes} >= {1, 2, 3, 5, 9, 12, 15, 16, 20, 24, 28, 32, 40, 64, 96, 127, 128}
    assert {s.dv for s in shapes} >= {8, 24, 64, 96, 128, 160, 256, 320, 448, 480, 512, 576, 1024, 1536, 2048}
    assert {s.d_pe for s in shapes} >= {0, 2, 6, 8, 16, 20, 32, 64, 128, 256}
    assert {s.v_width for s in shapes} >= {None, 8, 64, 200, 512, 1024}
    assert {s.dtype for s in specialisations} == {torch.float16, torch.bfloat16}
    assert {s.q_len for s in specialisations} >= {1, 2, 3, 4, 8, 16}
    assert {s.loader for s in specialisations} == set(cases.LOADERS)
    assert {s.scoring.softcap for s in specialisations} == {False, True}
    assert {s.scoring.scale_dtype for s in specialisations} == {None, torch.float32, torch.float16, torch.bfloat16}
    kinds = {(s.n_rope_heads == 1, s.n_rope_heads == s.n_heads) for s in shapes if s.d_pe and s.n_heads > 1}
    assert kinds == {(True, False), (False, True), (False, False)}
    tilings = [(tile(s.shape, 4, 700, 132, s.q_len, scoring=s.scoring), s.loader) for s in specialisations]
    assert {(t.family, loader) for t, loader in tilings} == {(f, loader) for f in FAMILIES for loader in cases.LOADERS}
    assert {(t.parts > 1, loader) for t, loader in tilings} == {
        (p, loader) for p in (False, True) for loader in cases.LOADERS
    }


def test_every_tilelang_case_has_the_memory_that_its_specialisation_is_for():
    strided, tops = 0, []
    for seed in range(120):
        case = random_case(seed, check.TILELANG)
        steps, places = [], []
        for tensor in (case.ckv_cache, case.kpe_cache, case.options.get("v_cache")):
            if tensor is not None:
                steps += [s for s, n in zip(tensor.stride()[:-1], tensor.shape, strict=False) if n > 1]
                places.append(tensor.data_ptr() - tensor.untyped_storage().data_ptr())
        page = case.ckv_cache.shape[1] if case.paged else None
        found = [
            loader
            for loader, (pages, shift) in cases.LOADERS.items()
            if page in pages and bool(shift) == any((p % 16) for p in places)
        ]
        assert len(found) == 1
        if found != ["scalar"]:
            assert all(step * 2 % 16 == 0 for step in steps)
        strided += not case.ckv_cache.is_contiguous()
        if seed < 20:
            _, lse = case.expected()
            tops += lse[lse.isfinite()].abs().tolist()
    assert strided > 20
    assert max(tops) > 3000
