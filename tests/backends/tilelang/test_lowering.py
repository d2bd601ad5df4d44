"""What the compiler makes of each kernel family, without a GPU."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flexmla import MLAShape
from flexmla.shape import PLAIN, Scoring, Specialisation
from flexmla.tiling import (
    BARRIER_BYTES,
    SMEM_PER_CTA,
    Tiling,
    loader_warps,
    padded_queries,
    threads_per_cta,
    tile,
    used_memory,
)

from .compiling import SMALL

pytest.importorskip("tilelang", reason="needs TileLang: pip install 'flexmla[tilelang]'")

# Each family at its boundaries: one and many groups, one and several CTAs an SM, clusters, widths that are no power of
# two or no multiple of a panel, options.
CASES = [
    (MLAShape(32, 1, 512, 16), torch.float16, 1, "contiguous"),
    (MLAShape(32, 32, 512, 16), torch.bfloat16, 1, "pages"),
    (MLAShape(8, 1, 512, 64), torch.float16, 4, "contiguous"),
    (MLAShape(16, 16, 512, 64), torch.float16, 1, "gather"),
    (MLAShape(9, 3, 192, 32), torch.bfloat16, 3, "pages"),
    (MLAShape(15, 5, 64, 8), torch.float16, 1, "scalar"),
    (MLAShape(24, 24, 128, 16), torch.float16, 1, "contiguous"),
    (MLAShape(28, 1, 448, 16), torch.float16, 1, "contiguous"),
    (MLAShape(40, 1, 256, 32), torch.float16, 1, "contiguous"),
    (MLAShape(12, 1, 512, 0), torch.float16, 16, "pages"),
    (MLAShape(64, 1, 512, 64), torch.float16, 1, "contiguous"),
    (MLAShape(40, 1, 512, 64), torch.bfloat16, 1, "pages"),
    (MLAShape(32, 8, 512, 16), torch.float16, 2, "contiguous"),
    (MLAShape(64, 8, 384, 16), torch.float16, 1, "gather"),
    (MLAShape(96, 1, 512, 0), torch.float16, 1, "scalar"),
    (MLAShape(128, 1, 512, 64), torch.bfloat16, 1, "contiguous"),
    (MLAShape(128, 1, 128, 32), torch.float16, 1, "contiguous"),
    (MLAShape(48, 1, 384, 0), torch.bfloat16, 2, "pages"),
    (MLAShape(9, 3, 24, 8), torch.float16, 1, "contiguous"),
    (MLAShape(1, 1, 8, 2), torch.bfloat16, 1, "scalar"),
    (MLAShape(15, 5, 160, 8), torch.bfloat16, 4, "gather"),
    (MLAShape(32, 32, 512, 16), torch.float16, 1, "pages_of_16"),
    (MLAShape(9, 3, 24, 8), torch.bfloat16, 4, "pages_of_16"),
    (MLAShape(128, 1, 512, 64), torch.bfloat16, 1, "pages_of_16"),
    (MLAShape(16, 8, 520, 32, 64), torch.float16, 1, "pages_of_16", Scoring(True, 8, torch.float16)),
    (MLAShape(32, 32, 1024, 16), torch.float16, 1, "contiguous"),
    (MLAShape(32, 32, 2048, 16), torch.bfloat16, 1, "pages"),
    (MLAShape(16, 16, 1536, 8), torch.float16, 4, "gather", Scoring(True, 16, torch.float16)),
    (MLAShape(128, 128, 512, 256), torch.float16, 1, "contiguous"),
    (MLAShape(16, 8, 512, 32), torch.float16, 1, "pages", Scoring(False, 8, torch.float32)),
    (MLAShape(32, 2, 512, 96), torch.float16, 1, "contiguous", Scoring(False, 2, torch.float32)),  # to the last byte
    (MLAShape(16, 1, 320, 256), torch.float16, 1, "contiguous", Scoring(True)),
    (MLAShape(32, 1, 512, 16, 512), torch.bfloat16, 1, "gather"),
    (MLAShape(127, 127, 96, 6, 200), torch.float16, 1, "scalar", Scoring(True, 127, torch.float16)),
]
CASES = [(*case, PLAIN)[:5] for case in CASES]
IDS = [
    f"{s.n_heads}-{s.n_rope_heads}-{s.dv}-{s.d_pe}-{s.out_width}-{str(d).removeprefix('torch.')}-q{q_len}-{loader}"
    for s, d, q_len, loader, _ in CASES
]


def planned(shape: MLAShape, q_len: int = 1, scoring: Scoring = PLAIN, loader: str = "contiguous") -> Tiling:
    tiling = tile(shape, 64, 8192, 132, q_len, SMALL[loader][0], scoring)
    assert tiling is not None
    return tiling


@pytest.mark.parametrize(("shape", "dtype", "q_len", "loader", "scoring"), CASES, ids=IDS)
def test_lowers_to_wgmma_and_tma_within_shared_memory_and_registers(
    shape: MLAShape, dtype: torch.dtype, q_len: int, loader: str, scoring: Scoring, tmp_path: Path
) -> None:
    from flexmla.backends.tilelang.compile import lower_source

    tiling = planned(shape, q_len, scoring, loader)
    source, attributes = lower_source(Specialisation(shape, dtype, q_len, loader, scoring), tiling)
    assert "mma_sync" not in source
    wgmmas = len(re.findall(r"tl::wgmma_[sr]s<", source))
    gathered = loader in ("gather", "scalar")
    many = tiling.family == "many_heads"
    # of latent columns, multiplied as they come: one or two for each warpgroup's half of them
    chunks = 2 * max(1, shape.dv // 256) if many and not gathered else 1
    # rope scores, latent scores, output; of two warpgroups, which add the other's tiles in two places
    assert wgmmas == (2 * (bool(shape.d_pe) + chunks + 3) if many else 2 + bool(shape.d_pe))
    caches = 1 + bool(shape.d_pe) + (shape.v_width is not None)
    # one query token comes by TMA, several by cp.async, as its rotary part does into the block-sparse tile
    by_tma = 0 if gathered else caches
    # what only one CTA reads L2 need not keep
    read_once = by_tma if tiling.family == "few_heads" and tiling.block_h == shape.n_heads else 0
    assert source.count("tl::tma_load<tl::CacheHintSm90::EVICT_FIRST>(") == read_once
    ways = 2 if many else 1  # whichever warpgroup's half comes first
    assert source.count("tl::tma_load(") == (q_len == 1) + (by_tma - read_once + chunks - 1) * ways
    aligned = shape.d_pe > 0 and shape.d_pe % 8 == 0  # rotary queries
    copied = (q_len > 1) + aligned + (caches if loader == "gather" else 0)
    assert len(re.findall(r"tl::cp_async_gs(?:_conditional)?<", source)) == copied
    assert source.count("flexmla_add_parts<") == (tiling.parts > 1)
    if not many:
        assert_transposed_once(source, padded_queries("few_heads", tiling.block_h * q_len))
    # the merge may come at a run's last tile, of each warpgroup; the next decode when all of the merge is there
    early = [m.start() for m in re.finditer(r"cudaTriggerProgrammaticLaunchCompletion\(\);", source)]
    assert len(early) == 1 + ways
    assert all(re.search(r"if \(.*left <= count.*\) {\s*$", source[:at]) for at in early[:-1])
    plain = scoring == PLAIN and shape.v_width is None
    main = attributes["decode_kernel" if plain else "decode_scored_kernel"]
    loaders = loader_warps(tiling.family, tiling.ctas_per_sm, gathered)
    assert int(main["thread_extent"]["threadIdx.x"]) == threads_per_cta(tiling.family, loaders)
    estimate = used_memory(shape, tiling, q_len, scoring)
    assert int(main["dyn_shared_memory_buf"]) + BARRIER_BYTES <= estimate <= SMEM_PER_CTA

    assert_no_spills(source, tmp_path)


@pytest.mark.parametrize(
    ("shape", "q_len", "scoring"),
    [
        (MLAShape(24, 1, 96, 64), 1, PLAIN),
        (MLAShape(48, 1, 128, 16), 1, PLAIN),
        (MLAShape(32, 1, 128, 16), 2, PLAIN),
        (MLAShape(32, 1, 96, 32), 1, Scoring(True, 1, torch.float32)),
    ],
    ids=str,
)
def test_ctas_that_share_an_sm_with_fast_memory_have_registers_enough(
    shape: MLAShape, q_len: int, scoring: Scoring, tmp_path: Path
) -> None:
    from flexmla.backends.tilelang.compile import lower_source

    tiling = tile(shape, 64, 8192, 132, q_len, scoring=scoring, fast=True)
    assert tiling is not None
    assert tiling.ctas_per_sm == 2
    source, _ = lower_source(Specialisation(shape, torch.bfloat16, q_len, "pages", scoring), tiling)
    assert_no_spills(source, tmp_path)


@pytest.mark.parametrize(
    ("shape", "loader", "chunks"),
    [
        (MLAShape(12, 4, 512, 32), "gather", (16, 4)),  # of 32 tokens' latents, and of their rotary keys
        (MLAShape(20, 5, 128, 32), "gather", (4, None)),
        (MLAShape(32, 32, 192, 32), "scalar", (None, 64)),
        (MLAShape(128, 1, 512, 64), "gather", (16, 2)),
    ],
    ids=str,
)
def test_gathering_warps_stop_at_the_last_chunk(
    shape: MLAShape, loader: str, chunks: tuple[int | None, int | None]
) -> None:
    """By a guard and loops of fixed length: bounds that depend on the warp were compiled to one round too many."""
    from flexmla.backends.tilelang.compile import lower_source

    source, _ = lower_source(Specialisation(shape, torch.float16, 1, loader), planned(shape, loader=loader))
    begin = source.index("ckv_at[half")
    end = re.search(r"full\[\(\(int64_t\)stage\w*\)\]\.arrive\(\)", source[begin:])
    assert end is not None
    gathering = source[begin : begin + end.start()]
    assert all(bound.isdigit() for bound in re.findall(r"for \(int \w+ = 0; \w+ < ([^;]*);", gathering))
    guards = tuple(int(n) for n in re.findall(r"if \(.*threadIdx\.x\) >> 5\).* % 3\)+ < (\d+)\) {", gathering))
    assert guards == tuple(n for n in chunks if n is not None)


def test_only_the_wanted_signature_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    import tilelang.language

    from flexmla.backends.tilelang.compile import program

    trace = tilelang.language.prim_func
    traced = []

    def prim_func(function: Any) -> Any:
        traced.append(function.__name__)
        return trace(function)

    monkeypatch.setattr(tilelang.language, "prim_func", prim_func)
    shape = MLAShape(3, 1, 8, 0)
    for scoring in (PLAIN, Scoring(softcap=True)):
        program(Specialisation(shape, torch.float16, scoring=scoring), planned(shape, scoring=scoring))
    assert traced == ["decode", "decode_scored"]


def test_quicker_proofs_make_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexmla.backends.tilelang import compile as backend

    wanted = Specialisation(MLAShape(3, 1, 8, 0), torch.float16)
    source, _ = backend.lower_source(wanted, planned(wanted.shape))
    monkeypatch.setattr(backend, "PROOFS", {})
    assert backend.lower_source(wanted, planned(wanted.shape))[0] == source


def test_z3_s_options_are_set_while_a_kernel_is_compiled_and_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import z3

    from flexmla.backends.tilelang import compile as backend

    def options() -> dict[str, str]:
        return {name: z3.get_param(name) for name in backend.PROOFS}

    seen = []

    def compiled(*_: object, **__: object) -> None:
        seen.append(options())
        raise OSError("no kernel")

    before = options()
    monkeypatch.setattr(backend.tilelang, "compile", compiled)
    monkeypatch.setattr(backend, "missing_compilers", lambda: [])
    shape = MLAShape(8, 1, 64, 8)
    with pytest.raises(OSError, match="no kernel"):
        backend.kernel(Specialisation(shape, torch.float16), planned(shape))
    assert seen == [backend.PROOFS] != [before]
    assert options() == before


def assert_transposed_once(source: str, queries: int) -> None:
    """All threads of the warpgroup transpose the output at once, each from its first accumulator on."""
    loop = r"for \(int (\w+) = 0; \1 < (\d+); \+\+\1\) {\s*if \((.*)\) {\s*"
    call = r"flexmla_transpose<(\d+), (\d+)>\(\(&\(o\[\1\]\)\), \(&\(.*(?:q|out)_sh\)\[0\]\)\)\);"
    ((counter, length, guard, *sizes),) = re.findall(loop + call, source)
    assert int(sizes[0]) == queries
    assert int(length) == queries // 2 * int(sizes[1])  # all accumulators
    first = guard.replace("&&", " and ").replace(counter, "i")
    assert "threadIdx" not in first
    assert [i for i in range(int(length)) if eval(first, {"i": i})] == [0]


def assert_no_spills(source: str, folder: Path) -> None:
    from flexmla.backends.tilelang.compile import missing_compilers

    missing = missing_compilers()
    if missing:
        pytest.skip(f"no spill check without {' and '.join(missing)}")
    report = ptxas_report(source, folder)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 2, report  # the decode kernel and the combine
    assert set(spills) == {("0", "0")}, report
    assert "wgmma.mma_async" not in report, report  # ptxas warns where it had to serialise them


def ptxas_report(source: str, folder: Path) -> str:
    """What ptxas says of a kernel's registers and spills, compiled afresh."""
    from tilelang.contrib.nvcc import get_nvcc_compiler
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    path = folder / "kernel.cu"
    path.write_text(source)
    command = [
        get_nvcc_compiler(), "-std=c++17", "-O3", "--use_fast_math", "--expt-relaxed-constexpr", "-DENABLE_BF16",
        "-Xptxas", "-v", "-gencode=arch=compute_90a,code=sm_90a",
        f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}",
        "-cubin", "-o", str(folder / "kernel.cubin"), str(path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_missing_compiler_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexmla.backends.tilelang import compile as backend

    def fail(*_: object, **__: object) -> None:
        raise OSError("nvcc: not found")

    monkeypatch.setattr(backend.tilelang, "compile", fail)
    monkeypatch.setattr(backend, "_has_nvcc", lambda: False)
    monkeypatch.setattr(backend.shutil, "which", lambda _: None)
    shape = MLAShape(8, 1, 64, 8)
    with pytest.raises(RuntimeError, match=r"needs nvcc.*flexmla\[nvcc\].*host C\+\+ compiler"):
        backend.kernel(Specialisation(shape, torch.float16), planned(shape))


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_compilation_that_takes_long_is_told(
    seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flexmla.backends.tilelang import compile as backend

    monkeypatch.setattr(backend, "_kernels", {})
    monkeypatch.setattr(backend, "TELL_AFTER", 0.1)
    monkeypatch.setattr(backend, "program", lambda *_: None)
    monkeypatch.setattr(backend, "_compile", lambda _: time.sleep(seconds) or "compiled")
    shape = MLAShape(8, 1, 64, 8)
    assert backend.kernel(Specialisation(shape, torch.float16), planned(shape)) == "compiled"
    told = [record.getMessage() for record in caplog.records if record.name == "flexmla"]
    assert len(told) == (seconds > 0)
    assert all("compiling a kernel for MLAShape(n_heads=8" in message for message in told)


def test_an_uncompiled_kernel_refuses_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexmla.backends.tilelang import compile as backend

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    shape = MLAShape(8, 2, 64, 8)
    with pytest.raises(RuntimeError, match="call mla_decode once with this shape and dtype before capturing"):
        backend.kernel(Specialisation(shape, torch.float16), planned(shape))
