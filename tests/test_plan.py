from __future__ import annotations

import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexmla import DecodePlan, DeviceRecord, MLAShape
from flexmla import plan as make_plan
from flexmla.models import ModelShape, model_shapes
from flexmla.plan import device_record, plan_scored, tilelang_lacks
from flexmla.shape import PLAIN, Scoring
from flexmla.tiling import (
    SMEM_PER_CTA,
    SMEM_PER_SM,
    SMEM_RESERVED,
    Tiling,
    choices,
    keys_per_group,
    padded_queries,
    part_width,
    rope_tile_width,
    threads_per_cta,
    tile,
    used_memory,
)

PLAN_MODULE = importlib.import_module("flexmla.plan")  # the package's attribute of this name is the function
H100 = DeviceRecord((9, 0), 132, "H100", memory_gb_s=3352)
H200 = DeviceRecord((9, 0), 132, "H200", memory_gb_s=4916)
SMALLER = DeviceRecord((9, 0), 78, "a Hopper GPU with fewer SMs")
N_HEADS = (1, 2, 3, 8, 9, 12, 15, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 160)


@st.composite
def any_shape(draw: st.DrawFn) -> MLAShape:
    n_heads = draw(st.integers(1, 160))
    d_pe = 2 * draw(st.integers(0, 128))
    keys = [g for g in range(1, n_heads + 1) if n_heads % g == 0] if d_pe else [1]
    widths = st.integers(1, 256).map(lambda n: 8 * n)
    return MLAShape(n_heads, draw(st.sampled_from(keys)), draw(widths), d_pe, draw(st.none() | widths))


def shapes() -> list[MLAShape]:
    """Every head count with shared, grouped and per-head keys, over the widths."""
    return [
        MLAShape(h, g, dv, d_pe)
        for h in N_HEADS
        for g in range(1, h + 1)
        if h % g == 0
        for dv in (8, 96, 256, 448, 512, 1024, 2048)
        for d_pe in (0, 2, 8, 16, 64, 256)
        if d_pe or g == 1
    ]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLAN_MODULE, "tilelang_installed", lambda: True)


def test_every_shape_of_the_backend_has_a_tile_that_fits() -> None:
    for shape in shapes():
        assert tilelang_lacks(shape, torch.float16, H100) is None
        tiling = tile(shape, 64, 8192, H100.sm_count)
        assert tiling is not None, shape
        used = used_memory(shape, tiling)
        assert used <= SMEM_PER_CTA
        assert tiling.ctas_per_sm * (used + SMEM_RESERVED) <= SMEM_PER_SM
        assert tiling.ctas_per_sm * threads_per_cta(tiling.family) <= 2048
        assert tiling.family == "few_heads" or (shape.dv % 128 == 0 and tiling.parts == 1), shape
        assert part_width(shape.dv, tiling.parts) <= 512
        assert (tiling.parts - 1) * part_width(shape.dv, tiling.parts) < shape.dv, "a CTA without columns"


@settings(deadline=None)
@given(
    shape=any_shape(),
    batch=st.integers(1, 1024),
    max_len=st.integers(1, 1 << 20),
    sm_count=st.sampled_from((78, 114, 132)),
    q_len=st.integers(1, 16),
    once=st.booleans(),
    softcap=st.booleans(),
    scales=st.sampled_from((0, 1, 2, 3)),
    fast=st.booleans(),
)
def test_any_call_has_a_tile_that_fits(
    shape: MLAShape, batch: int, max_len: int, sm_count: int, q_len: int, once: bool, softcap: bool, scales: int,
    fast: bool,
) -> None:  # fmt: skip
    scoring = Scoring(softcap, (0, 1, shape.n_rope_heads, shape.n_heads)[scales], torch.float32 if scales else None)
    tiling = tile(shape, batch, max_len, sm_count, q_len, once, scoring, fast)
    assert tiling is not None
    used = used_memory(shape, tiling, q_len, scoring)
    assert used <= SMEM_PER_CTA
    assert tiling.ctas_per_sm * (used + SMEM_RESERVED) <= SMEM_PER_SM
    groups = -(-shape.n_heads // tiling.block_h)
    assert (groups - 1) * tiling.block_h < shape.n_heads
    assert tiling.block_h * q_len <= padded_queries(tiling.family, tiling.block_h * q_len)
    assert 1 <= tiling.workers <= batch * -(-max_len // tiling.block_n)
    assert tiling.workers * groups * tiling.parts <= max(sm_count * tiling.ctas_per_sm, groups * tiling.parts)


@pytest.mark.parametrize("q_len", [1, 4, 16])
@pytest.mark.parametrize("v_width", [None, 8, 512, 2048])
def test_every_option_of_every_shape_has_a_tile_that_fits(v_width: int | None, q_len: int) -> None:
    for plain in shapes()[::7]:
        shape = dataclasses.replace(plain, v_width=v_width)
        for scoring in (PLAIN, Scoring(True, shape.n_rope_heads, torch.float32), Scoring(False, shape.n_heads)):
            assert tilelang_lacks(shape, torch.bfloat16, H100, q_len=q_len, scoring=scoring) is None, shape
            tiling = tile(shape, 64, 8192, H100.sm_count, q_len, scoring=scoring)
            assert tiling is not None, shape
            assert tiling.ctas_per_sm * (used_memory(shape, tiling, q_len, scoring) + SMEM_RESERVED) <= SMEM_PER_SM
            assert tiling.family == "few_heads" or (scoring == PLAIN and v_width is None)


@pytest.mark.parametrize("q_len", [2, 3, 4, 7, 16])
def test_queries_of_a_cta_are_whole_heads_that_fit_its_tile(q_len: int) -> None:
    for shape in shapes():
        assert tilelang_lacks(shape, torch.bfloat16, H100, q_len=q_len) is None
        tiling = tile(shape, 64, 8192, H100.sm_count, q_len)
        assert tiling is not None, shape
        assert tiling.block_h * q_len <= padded_queries(tiling.family, tiling.block_h * q_len)
        assert tiling.ctas_per_sm * (used_memory(shape, tiling, q_len) + SMEM_RESERVED) <= SMEM_PER_SM
        groups = -(-shape.n_heads // tiling.block_h)
        assert (groups - 1) * tiling.block_h < shape.n_heads
        assert tiling.workers * groups * tiling.parts <= max(H100.sm_count * tiling.ctas_per_sm, groups * tiling.parts)


def test_groups_cover_every_head_once_and_never_more_than_their_tile() -> None:
    for shape in shapes():
        tiling = tile(shape, 64, 8192, H100.sm_count)
        assert tiling is not None
        groups = -(-shape.n_heads // tiling.block_h)
        assert (groups - 1) * tiling.block_h < shape.n_heads <= groups * tiling.block_h
        assert tiling.block_h <= padded_queries(tiling.family, tiling.block_h)
        per_key = shape.n_heads // shape.n_rope_heads
        for g in range(groups):
            heads = range(g * tiling.block_h, min((g + 1) * tiling.block_h, shape.n_heads))
            keys = heads[-1] // per_key - heads[0] // per_key + 1
            assert keys <= keys_per_group(shape.n_heads, shape.n_rope_heads, tiling.block_h)
            assert keys * shape.d_pe <= tiling.parts * rope_tile_width(shape, tiling.block_h, tiling.parts)


def test_groups_of_heads_with_keys_of_their_own_are_even() -> None:
    """A group of fewer heads would load fewer rotary keys and wait for the others."""
    for shape in shapes():
        tiling = tile(shape, 64, 8192, H100.sm_count)
        assert tiling is not None
        if tiling.family == "few_heads" and shape.n_rope_heads == shape.n_heads:
            groups = -(-shape.n_heads // tiling.block_h)
            assert tiling.block_h == -(-shape.n_heads // groups), (shape, tiling)


def test_even_groups_do_not_lie_across_more_keys() -> None:
    shape = MLAShape(28, 7, 384, 128)  # 8 heads have 2 keys, 7 can have 3
    tiling = tile(shape, 64, 8192, H100.sm_count)
    assert tiling is not None
    assert (tiling.block_h, rope_tile_width(shape, tiling.block_h)) == (8, 256)


def test_halves_stay_in_their_family() -> None:
    tiling = tile(MLAShape(24, 4, 128, 64), 64, 8192, H100.sm_count, 4)
    assert tiling is not None
    assert tiling.family == "few_heads"


@pytest.mark.parametrize("device", [H100, SMALLER])
@pytest.mark.parametrize(("batch", "max_len"), [(1, 1), (1, 128), (8, 2048), (64, 8192), (1024, 64)])
def test_grid_is_at_most_one_wave_and_one_worker_a_tile(device: DeviceRecord, batch: int, max_len: int) -> None:
    for shape in shapes():
        tiling = tile(shape, batch, max_len, device.sm_count)
        assert tiling is not None
        groups = -(-shape.n_heads // tiling.block_h)
        assert 1 <= tiling.workers <= batch * -(-max_len // tiling.block_n)
        ctas = groups * tiling.parts
        assert tiling.workers * ctas <= max(device.sm_count * tiling.ctas_per_sm, ctas)


@pytest.mark.parametrize(
    ("shape", "family", "block_h"),
    [
        (MLAShape(32, 1, 512, 16), "few_heads", 16),  # two groups with three stages, not one with two
        (MLAShape(32, 1, 512, 64), "few_heads", 16),  # two groups have no third stage, but smaller products
        (MLAShape(32, 1, 256, 64), "few_heads", 16),
        (MLAShape(32, 1, 256, 16), "few_heads", 32),  # a smaller token is not worth reading twice
        (MLAShape(40, 1, 256, 32), "few_heads", 40),  # two of 20 are padded to 64
        (MLAShape(24, 1, 96, 64), "few_heads", 24),
        (MLAShape(24, 24, 128, 16), "few_heads", 12),
        (MLAShape(32, 32, 512, 16), "few_heads", 16),  # groups of 16 where all keys side by side leave one stage
        (MLAShape(16, 1, 512, 64), "few_heads", 16),
        (MLAShape(64, 1, 512, 64), "few_heads", 32),
        (MLAShape(128, 1, 512, 64), "many_heads", 64),
        (MLAShape(96, 1, 512, 0), "many_heads", 48),
        (MLAShape(64, 64, 512, 16), "few_heads", 16),
        (MLAShape(32, 32, 1024, 16), "few_heads", 16),
        (MLAShape(128, 128, 2048, 256), "few_heads", 2),
        (MLAShape(9, 3, 24, 8), "few_heads", 9),
    ],
)
def test_family_and_heads_of_known_shapes(shape: MLAShape, family: str, block_h: int) -> None:
    tiling = tile(shape, 64, 8192, 132)
    assert tiling is not None
    assert (tiling.family, tiling.block_h) == (family, block_h)
    assert tiling.stages >= 2


def test_small_pages_are_loaded_once() -> None:
    heads = {}
    for page_size in (None, 1, 32, 64):
        made = make_plan(MLAShape(32, 1, 512, 16), 64, 8192, page_size=page_size, dtype=torch.float16, device=H100)
        heads[page_size] = Tiling.from_ints(made.tiling).block_h
    assert heads == {None: 16, 1: 32, 32: 32, 64: 16}


def test_where_memory_is_fast_small_pages_have_the_tiles_of_large_ones() -> None:
    for shape in (MLAShape(32, 1, 128, 16), MLAShape(32, 1, 512, 16), MLAShape(64, 1, 128, 16)):
        plans = {
            make_plan(shape, 64, 8192, page_size=page_size, dtype=torch.float16, device=H200).tiling
            for page_size in (None, 1, 16, 64)
        }
        assert len(plans) == 1


def test_fast_memory_is_read_once() -> None:
    for device, block_h in ((H200, 32), (H100, 16), (H200, 32)):
        made = make_plan(MLAShape(32, 1, 512, 16), 64, 8192, dtype=torch.float16, device=device)
        assert Tiling.from_ints(made.tiling).block_h == block_h


def test_the_bandwidth_of_a_device_follows_from_its_clock_and_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {"major": 9, "minor": 0, "multi_processor_count": 132, "name": "H100"}
    clock = {"memory_clock_rate": 2_619_000, "memory_bus_width": 5120}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for index, known, gb_s in ((0, properties | clock, 3352), (1, properties, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, known=known: SimpleNamespace(**known))
        assert round(PLAN_MODULE._cuda_record.__wrapped__(index).memory_gb_s) == gb_s


@pytest.mark.parametrize(("dv", "v_width", "parts"), [(512, None, 1), (520, None, 2), (2048, None, 4), (512, 512, 2)])
def test_wide_latents_are_shared_out_over_a_cluster(dv: int, v_width: int | None, parts: int) -> None:
    tiling = tile(MLAShape(32, 32, dv, 16, v_width), 64, 8192, 132)
    assert tiling is not None
    assert tiling.parts == parts
    assert tiling.stages >= 2


def test_small_latents_share_an_sm() -> None:
    tiling = tile(MLAShape(9, 3, 24, 8), 64, 8192, 132)
    assert tiling is not None
    assert (tiling.ctas_per_sm, tiling.stages, tiling.workers) == (3, 4, 391)
    few = tile(MLAShape(9, 3, 24, 8), 8, 2048, 132)  # the same kernel, but no CTA for a tile or two beside another
    assert few is not None
    assert (few.ctas_per_sm, few.workers) == (3, 128)
    wider = tile(MLAShape(15, 5, 40, 8), 64, 8192, 132)
    assert wider is not None
    assert wider.ctas_per_sm == 1


@pytest.mark.parametrize(
    ("shape", "ctas_per_sm", "stages"),
    [
        (MLAShape(15, 5, 40, 8), 3, 4),
        (MLAShape(32, 1, 128, 32), 2, 4),
        (MLAShape(24, 1, 96, 64), 2, 3),  # three CTAs would have two
        (MLAShape(16, 1, 256, 16), 1, 4),
    ],
)
def test_more_ctas_share_an_sm_where_memory_is_fast(shape: MLAShape, ctas_per_sm: int, stages: int) -> None:
    tiling = tile(shape, 64, 8192, 132, fast=True)
    slower = tile(shape, 64, 8192, 132)
    assert tiling is not None
    assert slower is not None
    assert (tiling.ctas_per_sm, tiling.stages, slower.ctas_per_sm) == (ctas_per_sm, stages, 1)
    assert tiling.ctas_per_sm * (used_memory(shape, tiling) + SMEM_RESERVED) <= SMEM_PER_SM


@pytest.mark.parametrize("q_len", [1, 2])
def test_queries_that_fill_registers_are_halved_to_share_an_sm_where_memory_is_fast(q_len: int) -> None:
    shape = MLAShape(64 // q_len, 1, 128, 16)
    tiling, slower = (tile(shape, 64, 8192, 132, q_len, fast=fast) for fast in (True, False))
    assert tiling is not None
    assert slower is not None
    assert (tiling.block_h * q_len, tiling.ctas_per_sm) == (32, 2)
    assert (slower.block_h * q_len, slower.ctas_per_sm) == (64, 1)


@pytest.mark.parametrize("device", [H100, H200])
def test_a_row_is_not_cut_into_more_states_than_are_worth_merging(device: DeviceRecord) -> None:
    workers = {}
    for dv in (128, 512):
        for max_len in (64, 8192, 32768, 131072):
            made = make_plan(MLAShape(16, 1, dv, 16), 1, max_len, dtype=torch.float16, device=device)
            workers[dv, max_len // 64] = Tiling.from_ints(made.tiling).workers
    assert workers == {
        (128, 1): 1, (128, 128): 84, (128, 512): 86, (128, 2048): 128,
        (512, 1): 1, (512, 128): 84, (512, 512): 86, (512, 2048): 86,
    }  # fmt: skip


def test_small_tokens_use_nearly_all_sms_and_large_ones_leave_rows_whole() -> None:
    small, large = (tile(MLAShape(16, 1, dv, 16), 64, 8192, 132) for dv in (128, 512))
    assert small is not None
    assert large is not None
    assert small.workers > 0.95 * 132
    assert 128 % -(-8192 // small.workers) != 0
    assert 128 % -(-8192 // large.workers) == 0


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("batch", "whole_up_to"), [(1, 1), (8, 2), (64, 7)])
def test_short_rows_stay_whole_where_a_merge_takes_longer(batch: int, whole_up_to: int, fast: bool) -> None:
    for row_tiles in range(1, 40):
        tiling = tile(MLAShape(32, 1, 512, 16), batch, 64 * row_tiles, 132, fast=fast)
        assert tiling is not None
        whole = -(-batch * row_tiles // tiling.workers) == row_tiles
        # two groups leave half as many workers: 64 rows, uncut, are all that there is to do for them
        assert whole == (row_tiles <= whole_up_to or (batch == 64 and not fast)), row_tiles


@pytest.mark.parametrize(("batch", "max_len"), [(8, 2048), (8, 4096), (64, 2048), (64, 8192), (128, 1024)])
def test_workers_without_tiles_are_left_out(batch: int, max_len: int) -> None:
    for shape in (MLAShape(32, 1, 512, 16), MLAShape(16, 1, 128, 16), MLAShape(9, 3, 24, 8)):
        tiling = tile(shape, batch, max_len, 132, fast=True)
        assert tiling is not None
        tiles = batch * max_len // 64
        assert tiling.workers == -(-tiles // -(-tiles // tiling.workers)) >= 126


def test_at_most_a_few_workers_are_left_out() -> None:
    """Shorter rows than the cache has room for may leave tiles for all."""
    tiling = tile(MLAShape(32, 1, 512, 16), 1, 64 * 89, 132, fast=True)  # two tiles each are enough work for 45
    assert tiling is not None
    assert tiling.workers == 84 > 0.95 * 88


@pytest.mark.parametrize("max_len", [0, 1, 64, 8192])
def test_an_empty_batch_or_cache_has_a_worker(max_len: int) -> None:
    for shape in (MLAShape(32, 1, 512, 16), MLAShape(9, 3, 24, 8)):
        for batch in (0, 1):
            for tiling in (tile(shape, batch, max_len, 132), *choices(shape, batch, max_len, 132)):
                assert tiling is not None
                assert tiling.workers >= 1


@pytest.mark.parametrize("model", model_shapes(), ids=lambda model: model.name)
def test_a_search_tries_the_planned_tile(model: ModelShape) -> None:
    for batch, max_len in ((64, 8192), (8, 2048), (1, 128)):
        planned = tile(model.shape, batch, max_len, 132, scoring=model.scoring)
        found = choices(model.shape, batch, max_len, 132, scoring=model.scoring)
        assert planned in found
        assert len(found) == len(set(found))


def test_tiling_survives_the_operator_boundary() -> None:
    tiling = tile(MLAShape(64, 1, 512, 64), 64, 8192, 132)
    assert tiling is not None
    assert all(isinstance(value, int) for value in tiling.ints())
    assert Tiling.from_ints(tiling.ints()) == tiling


def test_plan_on_hopper_and_elsewhere() -> None:
    shape = MLAShape(32, 32, 512, 16)
    made = make_plan(shape, 8, 4096, dtype=torch.bfloat16, device=H100)
    assert made.backend == "tilelang"
    assert made.tiling
    cpu = make_plan(shape, 8, 4096, dtype=torch.bfloat16, device="cpu")
    assert (cpu.backend, cpu.tiling) == ("torch", ())
    assert "compute capability" in cpu.reason


def test_plan_without_tilelang_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLAN_MODULE, "tilelang_installed", lambda: False)
    made = make_plan(MLAShape(28, 1, 512, 64), 3, 100, dtype=torch.float16, device=DeviceRecord((9, 0), 99))
    assert made.backend == "torch"
    assert "pip install 'flexmla[tilelang]'" in made.reason


def test_plan_is_frozen_and_its_sizes_are_upper_bounds() -> None:
    shape = MLAShape(16, 1, 512, 64)
    made = make_plan(shape, 8, 4096, dtype=torch.float16, device=H100)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.batch = 9  # type: ignore[misc]
    made.check(shape, 8, 4096, 1, None, torch.float16, H100)
    made.check(shape, 1, 7, 1, None, torch.float16, H100)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shape": MLAShape(16, 16, 512, 64)}, "shape"),
        ({"batch": 9}, "batch"),
        ({"max_len": 4097}, "max_len"),
        ({"q_len": 2}, "q_len"),
        ({"page_size": 64}, "page_size"),
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"device": SMALLER}, "device"),
        ({"device": DeviceRecord((8, 0), 132)}, "device"),
    ],
)
def test_plan_of_another_call_is_refused(change: dict[str, object], named: str) -> None:
    call: dict[str, object] = {
        "shape": MLAShape(16, 1, 512, 64), "batch": 8, "max_len": 4096, "q_len": 1, "page_size": None,
        "dtype": torch.float16, "device": H100,
    }  # fmt: skip
    made = DecodePlan(**call, backend="tilelang", reason="")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=named):
        made.check(**{**call, **change})  # type: ignore[arg-type]


def test_a_paged_plan_takes_whole_pages() -> None:
    made = make_plan(MLAShape(4, 1, 8, 4), 1, 1000, page_size=64, dtype=torch.float32, device="cpu")
    assert made.max_len == 1024
    made.check(made.shape, 1, 1024, 1, 64, torch.float32, made.device)


@pytest.mark.parametrize(("name", "value"), [("batch", -1), ("max_len", -1), ("q_len", 0)])
def test_plan_names_a_size_out_of_range(name: str, value: int) -> None:
    sizes = {"batch": 1, "max_len": 1, "q_len": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        make_plan(MLAShape(16, 1, 512, 64), sizes["batch"], sizes["max_len"], q_len=sizes["q_len"],
                  dtype=torch.float16, device=H100)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "named"),
    [
        (MLAShape(16, 1, 512, 64), torch.float32, {}, "float32"),
        (MLAShape(16, 1, 516, 64), torch.float16, {}, "dv that is a multiple of 8 up to 2048, not 516"),
        (MLAShape(16, 1, 2056, 64), torch.float16, {}, "2056"),
        (MLAShape(16, 1, 512, 64, 100), torch.float16, {}, "v_cache width that is a multiple of 8"),
        (MLAShape(16, 1, 512, 21), torch.float16, {}, "even d_pe up to 256, not 21"),
        (MLAShape(16, 1, 512, 258), torch.float16, {}, "258"),
        (MLAShape(16, 1, 512, 64), torch.float16, {"q_len": 17}, "q_len up to 16, not 17"),
        (MLAShape(16, 1, 512, 64), torch.float16, {"page_size": 48}, "power of two up to 256, not 48"),
        (MLAShape(16, 1, 512, 64), torch.float16, {"page_size": 512}, "power of two up to 256, not 512"),
        (MLAShape(16, 1, 512, 64), torch.float16, {"batch": 65536}, "65536"),
    ],
)
def test_what_the_backend_lacks_is_named(
    shape: MLAShape, dtype: torch.dtype, options: dict[str, object], named: str
) -> None:
    lacks = tilelang_lacks(shape, dtype, H100, **options)  # type: ignore[arg-type]
    assert lacks is not None
    assert named in lacks


def test_every_published_shape_plans_on_any_device() -> None:
    for model in model_shapes():
        hopper = plan_scored(model.shape, 64, 8192, dtype=torch.float16, device=H100, scoring=model.scoring)
        assert hopper.backend == "tilelang", model
        for device in (H100, DeviceRecord((8, 0), 108), DeviceRecord((0, 0), 0)):
            made = make_plan(model.shape, 64, 8192, dtype=torch.float16, device=device)
            assert made.reason
            assert bool(made.tiling) == (made.backend == "tilelang")


def test_device_record_of_the_cpu_and_of_a_record() -> None:
    assert device_record("cpu") == DeviceRecord((0, 0), 0, "cpu")
    assert device_record(H100) is H100


def test_a_record_matches_the_device_it_describes_by_its_numbers() -> None:
    shape = MLAShape(16, 1, 512, 64)
    made = make_plan(shape, 8, 4096, dtype=torch.float16, device=DeviceRecord((9, 0), 132))
    made.check(shape, 8, 4096, 1, None, torch.float16, H100)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"shape": (16, 1, 512, 64)}, TypeError, "shape must be an MLAShape, got tuple"),
        ({"dtype": torch.int8}, TypeError, "dtype must be .*int8"),
        ({"page_size": 0}, ValueError, "page_size must be at least 1, got 0"),
        ({"batch": 2.5}, TypeError, "batch must be an int, got float"),
        ({"device": "gpu"}, ValueError, "device must be .*'gpu'"),
        ({"device": "cuda:99"}, ValueError, "device must be .*cuda:99"),
    ],
)
def test_plan_names_what_it_cannot_take(change: dict[str, object], error: type[Exception], named: str) -> None:
    call: dict[str, object] = {"shape": MLAShape(16, 1, 512, 64), "batch": 1, "max_len": 1}
    call |= {"dtype": torch.float16, "device": H100} | change
    with pytest.raises(error, match=named):
        make_plan(**call)  # type: ignore[arg-type]
