"""The TileLang backend's numbers, on a GPU of compute capability 9.0."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

import flexmla
from flexmla import MLAShape, reference
from flexmla.cases import random_case
from flexmla.check import TILELANG, bounds, row_errors
from flexmla.shape import Scoring, Specialisation

from .compiling import compile_all
from .covering import covering_shapes
from .hopper import ON_HOPPER

pytestmark = ON_HOPPER

DTYPES = (torch.float16, torch.bfloat16)
SHAPES = covering_shapes()
NAN = float("nan")
Call = dict[str, "torch.Tensor | None"]

every_shape = pytest.mark.parametrize(
    ("shape", "dtype"),
    list(zip(SHAPES, cycle(DTYPES))),
    ids=[f"{s.n_heads}-{s.n_rope_heads}-{s.dv}-{s.d_pe}" for s in SHAPES],
)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    cases = [Specialisation(shape, dtype, 1, "contiguous") for shape, dtype in zip(SHAPES, cycle(DTYPES))]
    compile_all([*cases, *TILELANG.specialisations])


def inputs(shape: MLAShape, lens: list[int], max_len: int, dtype: torch.dtype, seed: int = 0) -> Call:
    """Random queries and caches; every slot at or past a row's length is NaN."""
    noise = torch.Generator("cuda").manual_seed(seed)

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=noise, device="cuda").to(dtype)

    batch = len(lens)
    q = randn(batch, 1, shape.n_heads, shape.dv + shape.d_pe)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
    hidden = torch.arange(max_len, device="cuda") >= seq_lens[:, None]
    ckv = randn(batch, max_len, shape.dv).masked_fill(hidden[..., None], NAN)
    kpe = randn(batch, max_len, shape.n_rope_heads, shape.d_pe).masked_fill(hidden[..., None, None], NAN)
    return {
        "q_nope": q[..., : shape.dv],
        "q_pe": q[..., shape.dv :] if shape.d_pe else None,
        "ckv_cache": ckv,
        "kpe_cache": kpe if shape.d_pe else None,
        "seq_lens": seq_lens,
    }


def check(call: Call, dtype: torch.dtype, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, n_heads, dv = call["q_nope"].shape  # type: ignore[union-attr]
    out = torch.full((batch, 1, n_heads, dv), NAN, dtype=dtype, device="cuda")
    lse = torch.full((batch, n_heads, 1), NAN, device="cuda")
    flexmla.mla_decode(**call, out=out, lse=lse, backend="tilelang", **options)  # type: ignore[arg-type]
    errors = row_errors(out, lse, *reference.mla_decode(**call, **options))  # type: ignore[arg-type]
    assert errors.within(bounds(dtype)), errors
    return out, lse


@every_shape
def test_every_shape_ragged_with_poison(shape: MLAShape, dtype: torch.dtype) -> None:
    check(inputs(shape, [300, 1, 0, 64, 65, 127], 300, dtype, seed=1), dtype)
    check(inputs(shape, [1999], 2100, dtype, seed=2), dtype)  # one row over many workers
    check(inputs(shape, [0, 0], 70, dtype, seed=3), dtype)


@every_shape
def test_maxima_that_creep_up(shape: MLAShape, dtype: torch.dtype) -> None:
    """By less than what moves a maximum at once, and by more, over all tiles of a worker."""
    call = inputs(shape, [1280] * 132, 1280, dtype, seed=4)
    growth = torch.linspace(0.2, 6, 1280, device="cuda")
    for name in ("ckv_cache", "kpe_cache"):
        cache = call[name]
        if cache is not None:
            call[name] = (cache * growth.view(1, -1, *[1] * (cache.dim() - 2))).to(dtype)
    check(call, dtype)


def test_wide_batches_with_many_empty_rows() -> None:
    shape, dtype = MLAShape(8, 1, 512, 64), torch.float16
    for batch in (127, 128, 129, 600):
        lens = torch.randint(-3, 130, (batch,), generator=torch.Generator().manual_seed(batch)).clamp_min(0).tolist()
        check(inputs(shape, lens, 128 + 2, dtype, seed=batch), dtype)


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_cases(first: int) -> None:
    for seed in range(first, first + 100):
        case = random_case(seed, TILELANG, "cuda")
        with torch.inference_mode():
            out, lse = (result.clone() for result in case.decode(backend="tilelang"))
            again = case.decode(backend="tilelang")  # as a call whose signature is known
        errors = row_errors(out, lse, *case.expected())
        assert errors.within(bounds(case.q_nope.dtype)), (case.describe(), errors)
        assert torch.equal(out, again[0]), case.describe()
        assert torch.equal(lse, again[1]), case.describe()


def test_random_cases_lie_in_memory_as_their_loaders_want_it() -> None:
    from flexmla.backends.tilelang import _loader
    from flexmla.cases import LOADERS

    drawn = [random_case(seed, TILELANG, "cuda") for seed in range(60)]
    found = set()
    for case in drawn:
        kpe, shape = case.kpe_cache, case.q_nope.shape
        groups, d_pe = (1, 0) if kpe is None else kpe.shape[2:]
        v, scale = case.options.get("v_cache"), case.options.get("score_scale")
        found.add(loader := _loader(case.ckv_cache, kpe, v, case.paged))
        layer = MLAShape(shape[2], groups, shape[3], d_pe, None if v is None else v.shape[2])
        scales = (0, None) if scale is None else (scale.shape[2], scale.dtype)
        scoring = Scoring("softcap" in case.options, *scales)
        assert Specialisation(layer, case.q_nope.dtype, shape[1], loader, scoring) in TILELANG.specialisations
    assert found == set(LOADERS)


def test_lengths_out_of_range_are_clamped() -> None:
    shape, dtype = MLAShape(16, 1, 512, 64), torch.float16
    call = inputs(shape, [200, 200, 200], 200, dtype)
    want = check(call, dtype)
    call["seq_lens"] = torch.tensor([200, 10**9, -5], dtype=torch.int32, device="cuda")
    out, lse = flexmla.mla_decode(**call, backend="tilelang")  # type: ignore[arg-type]
    assert torch.equal(out[:2], want[0][:2])
    assert torch.equal(lse[:2], want[1][:2])
    assert bool((out[2] == 0).all())
    assert bool((lse[2] == -torch.inf).all())


def test_defaults_match_full_lengths() -> None:
    shape, dtype = MLAShape(32, 32, 512, 16), torch.bfloat16
    call = inputs(shape, [130, 130], 130, dtype)
    want = flexmla.mla_decode(**call, backend="tilelang")  # type: ignore[arg-type]
    call["seq_lens"] = None
    got = flexmla.mla_decode(**call)  # type: ignore[arg-type]
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_merged_cache_views_strided_results_and_unaligned_queries() -> None:
    shape, dtype = MLAShape(16, 1, 512, 64), torch.float16
    call = inputs(shape, [90, 33], 90, dtype)
    want = check(call, dtype)
    row = torch.full((2, 96, 512 + 64 + 8), NAN, dtype=dtype, device="cuda")
    row[:, :90, :512] = call["ckv_cache"]
    row[:, :90, 512:576] = call["kpe_cache"][:, :, 0]  # type: ignore[index]
    call["ckv_cache"], call["kpe_cache"] = row[:, :90, :512], row[:, :90, None, 512:576]
    shifted = torch.empty(2 * 16 * 512 + 1, dtype=dtype, device="cuda")[1:].view(2, 1, 16, 512)
    call["q_nope"] = shifted.copy_(call["q_nope"])
    out = torch.full((2, 1, 16, 520), NAN, dtype=dtype, device="cuda")
    lse = torch.full((2, 16, 2), NAN, device="cuda")
    flexmla.mla_decode(**call, out=out[..., :512], lse=lse[..., :1], backend="tilelang")  # type: ignore[arg-type]
    assert torch.equal(out[..., :512], want[0])
    assert torch.equal(lse[..., :1], want[1])
    assert bool(out[..., 512:].isnan().all())
    assert bool(lse[..., 1:].isnan().all())


def test_large_logits() -> None:
    shape, dtype = MLAShape(32, 1, 512, 16), torch.float16
    for scale in (1e-3, 1.0, 30.0):
        check(inputs(shape, [500, 77], 500, dtype), dtype, softmax_scale=scale)


def test_same_inputs_same_bits() -> None:
    shape = MLAShape(32, 32, 512, 16)
    call = inputs(shape, [1500, 3, 700], 1500, torch.float16)
    first = flexmla.mla_decode(**call, backend="tilelang")  # type: ignore[arg-type]
    for _ in range(20):
        again = flexmla.mla_decode(**call, backend="tilelang")  # type: ignore[arg-type]
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_one_kernel_serves_every_batch_and_length() -> None:
    from flexmla.backends.tilelang import compile as backend

    shape, dtype = MLAShape(24, 1, 256, 32), torch.float16
    check(inputs(shape, [10], 10, dtype), dtype)
    compiled = len(backend._kernels)
    for batch, max_len in ((3, 64), (40, 130), (2, 3000)):
        check(inputs(shape, [max_len] * batch, max_len, dtype), dtype)
    assert len(backend._kernels) == compiled


def test_a_captured_graph_follows_its_lengths_without_synchronising() -> None:
    shape, dtype = MLAShape(32, 1, 512, 16), torch.float16
    call = inputs(shape, [400, 400, 400], 400, dtype)
    out, lse = flexmla.mla_decode(**call, backend="tilelang")  # type: ignore[arg-type]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            flexmla.mla_decode(**call, out=out, lse=lse, backend="tilelang")  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for lens in ([1, 0, 399], [0, 0, 0], [400, 65, 64]):
        call["seq_lens"].copy_(torch.tensor(lens, dtype=torch.int32))  # type: ignore[union-attr]
        out.fill_(NAN)
        lse.fill_(NAN)
        graph.replay()
        assert row_errors(out, lse, *reference.mla_decode(**call)).within(bounds(dtype))  # type: ignore[arg-type]


def test_capture_before_compilation_says_how_to_warm_up() -> None:
    shape = MLAShape(10, 2, 64, 24)
    call = inputs(shape, [5], 5, torch.float16)
    with (
        pytest.raises(RuntimeError, match="call mla_decode once with this shape and dtype before capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        flexmla.mla_decode(**call, backend="tilelang")  # type: ignore[arg-type]


def test_torch_compile_has_no_break() -> None:
    shape, dtype = MLAShape(16, 1, 512, 64), torch.float16
    call = inputs(shape, [90, 33], 90, dtype)
    want = flexmla.mla_decode(**call)  # type: ignore[arg-type]
    compiled = torch.compile(flexmla.mla_decode, fullgraph=True, dynamic=True, backend="aot_eager")
    got = compiled(**call)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_what_it_lacks_is_refused_by_name_and_taken_by_auto() -> None:
    call = inputs(MLAShape(16, 1, 516, 64), [90, 33], 90, torch.float16)
    with pytest.raises(NotImplementedError, match=r"dv.*516.*torch"):
        flexmla.mla_decode(**call, backend="tilelang")  # type: ignore[arg-type]
    out, lse = flexmla.mla_decode(**call)  # type: ignore[arg-type]
    assert row_errors(out, lse, *reference.mla_decode(**call)).within(bounds(torch.float16))  # type: ignore[arg-type]


@torch.inference_mode()
def test_options_of_a_known_signature_and_of_a_plan() -> None:
    shape, dtype = MLAShape(16, 1, 512, 64), torch.float16
    plan = flexmla.plan(shape, 2, 90, dtype=dtype, device="cuda")
    for seed in range(3):
        call = inputs(shape, [90, 33], 90, dtype, seed)
        noise = torch.Generator("cuda").manual_seed(seed)
        call["score_scale"] = torch.rand(2, 90, 1, generator=noise, device="cuda") + 0.5
        out, lse = flexmla.mla_decode(**call, softcap=30.0, plan=plan, backend="tilelang")  # type: ignore[arg-type]
        want = reference.mla_decode(**call, softcap=30.0)  # type: ignore[arg-type]
        assert row_errors(out, lse, *want).within(bounds(dtype))


@torch.inference_mode()
def test_a_known_signature_still_refuses_overlap_and_takes_new_tensors() -> None:
    shape, dtype = MLAShape(16, 1, 512, 64), torch.float16
    out, lse = torch.empty(2, 1, 16, 512, dtype=dtype, device="cuda"), torch.empty(2, 16, 1, device="cuda")
    for seed in range(3):
        call = inputs(shape, [90, 33], 90, dtype, seed)
        result = flexmla.mla_decode(**call, out=out, lse=lse, backend="tilelang")  # type: ignore[arg-type]
        assert result[0] is out
        assert result[1] is lse
        assert row_errors(out, lse, *reference.mla_decode(**call)).within(bounds(dtype))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out must not overlap an input or the other result, got memory of q_nope"):
        flexmla.mla_decode(**call | {"q_nope": out.normal_()}, out=out, lse=lse, backend="tilelang")  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [1, 4, 8])
def test_caches_of_any_alignment(shift: int) -> None:
    call = inputs(MLAShape(16, 1, 512, 64), [90, 33], 90, torch.float16)
    buffer = torch.full((2, 90, 512 + shift), NAN, dtype=torch.float16, device="cuda")
    call["ckv_cache"] = buffer[..., :512].copy_(call["ckv_cache"])
    check(call, torch.float16)


def test_rows_that_share_their_memory() -> None:
    """Expanded caches and queries, whose batch stride is 0."""
    call = inputs(MLAShape(16, 1, 512, 64), [90], 90, torch.float16)
    call |= {name: x.expand(3, *x.shape[1:]) for name, x in call.items() if x is not None and name != "seq_lens"}
    call["seq_lens"] = torch.tensor([90, 5, 64], dtype=torch.int32, device="cuda")
    check(call, torch.float16)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [-0.05, 0.0])
def test_scales_that_are_not_positive(scale: float, causal: bool) -> None:
    call = inputs(MLAShape(16, 1, 512, 64), [90, 0, 33], 90, torch.float16)
    check(call, torch.float16, softmax_scale=scale, causal=causal)
