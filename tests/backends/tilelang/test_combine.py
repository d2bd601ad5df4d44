"""The merge of partial states, as the compiler's CUDA source, executed on the CPU."""

# no `from __future__ import annotations`: the DSL reads a kernel's annotations as values
import ctypes
import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

tilelang = pytest.importorskip("tilelang", reason="needs TileLang: pip install 'flexmla[tilelang]'")
T = pytest.importorskip("tilelang.language")

BLOCK_N = 64
WARPS_CPP = Path(__file__).with_name("warps.cpp")
NAN = float("nan")


def source(n_heads: int, q_len: int, dv: int) -> str:
    """The combine alone, in float32, as CUDA."""
    from flexmla.backends.tilelang.combine import combine
    from flexmla.backends.tilelang.compile import PASS_CONFIGS, TARGET

    batch, slots = T.dynamic("batch"), T.dynamic("slots")
    f32, i32 = T.float32, T.int32

    @T.prim_func
    def decode(
        seq_lens: T.Tensor((batch,), i32),
        starts: T.Tensor((batch,), i32),
        out: T.Tensor((batch, q_len, n_heads, dv), "float32"),
        lse: T.Tensor((batch, n_heads, q_len), f32),
        part: T.Tensor((slots, n_heads * q_len, dv), "float32"),
        part_lse: T.Tensor((slots, n_heads * q_len), f32),
        has_starts: i32,
        workers: i32,
        capacity: i32,
        log_ways: i32,
        log_parts: i32,
    ):
        combine(
            n_heads, q_len, dv, "float32", seq_lens, starts, has_starts, batch, capacity, BLOCK_N, workers, log_ways,
            log_parts, out, lse, part, part_lse,
        )  # fmt: skip

    target = tilelang.tvm.target.Target(TARGET)
    with target, tilelang.tvm.transform.PassContext(config={k.value: v for k, v in PASS_CONFIGS.items()}):
        text = tilelang.engine.lower(decode, target=target, enable_device_compile=False).kernel_source
    return text[text.rindex('extern "C" __global__') :]


def build(n_heads: int, q_len: int, dv: int, folder: Path) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    kernel = folder / "kernel.inc"
    kernel.write_text(source(n_heads, q_len, dv))
    library = folder / "combine.so"
    command = [compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-pthread", f'-DKERNEL="{kernel}"']
    subprocess.run([*command, "-o", str(library), str(WARPS_CPP)], check=True)
    return ctypes.CDLL(str(library))


def partial_states(
    lens: list[int], starts: list[int], max_len: int, workers: int, n_queries: int, dv: int, noise: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What decode leaves behind for a batch cut over workers, and what the merge must make of it; NaN: untouched."""
    part, part_lse = torch.full((2 * workers, n_queries, dv), NAN), torch.full((2 * workers, n_queries), NAN)
    out, lse = torch.full((len(lens), n_queries, dv), NAN), torch.full((len(lens), n_queries), NAN)
    spans = [(max(start, 0), min(max(n, 0), max_len)) for start, n in zip(starts, lens, strict=True)]
    tiles = [-(-end // BLOCK_N) - begin // BLOCK_N if begin < end else 0 for begin, end in spans]
    chunk = max(1, -(-sum(tiles) // workers))
    before = 0
    for row, n_tiles in enumerate(tiles):
        cut_by = range(before // chunk, (before + n_tiles - 1) // chunk + 1)
        before += n_tiles
        if n_tiles == 0:
            out[row], lse[row] = 0, -torch.inf
        elif len(cut_by) > 1:
            slots = torch.tensor([2 * w + (w == cut_by[0]) for w in cut_by])
            part[slots] = torch.randn(len(slots), n_queries, dv, generator=noise)
            part_lse[slots] = 5 * torch.randn(len(slots), n_queries, generator=noise)
            part_lse[slots, 0] = -torch.inf  # a query token that sees nothing of its row
            part[slots, 0] = 0
            part_lse[slots[0], 1] = -torch.inf  # one that sees nothing of a row's first part
            natural = part_lse[slots].double() * math.log(2)
            lse[row] = torch.logsumexp(natural, 0).float()
            weights = torch.exp(natural - torch.logsumexp(natural, 0)).nan_to_num()
            out[row] = (part[slots] * weights[..., None]).sum(0).float()
    return part, part_lse, out, lse


@pytest.mark.parametrize(("n_heads", "q_len", "dv"), [(3, 3, 192), (5, 1, 512), (1, 4, 64)])
def test_merges_every_cut_row_and_no_other(n_heads: int, q_len: int, dv: int, tmp_path: Path) -> None:
    from flexmla.backends.tilelang.combine import WARPS

    library = build(n_heads, q_len, dv, tmp_path)
    n_queries = n_heads * q_len
    rng = random.Random(f"{n_queries} {dv}")
    for seed in range(10):
        max_len, workers = rng.choice((64, 130, 1000, 9000)), rng.choice((1, 2, 5, 13, 40, 132))
        lens = [
            rng.choice((0, 1, 64, 65, max_len, rng.randint(0, max_len), -3, max_len + 9))
            for _ in range(rng.randint(1, 4))
        ]
        starts = [rng.choice((0, 0, -2, 63, 64, rng.randint(0, max_len), max_len + 5)) for _ in lens]
        has_starts = rng.randint(0, 1)
        log_ways, log_parts = rng.randint(0, 3), rng.randint(0, 4)
        states = partial_states(
            lens, starts if has_starts else [0] * len(lens), max_len, workers, n_queries, dv,
            torch.Generator().manual_seed(seed),
        )  # fmt: skip
        part, part_lse, want_out, want_lse = states
        out, lse = torch.full((len(lens), q_len, n_heads, dv), NAN), torch.full_like(want_lse, NAN)
        tensors = (lse, out, part, part_lse, *(torch.tensor(x, dtype=torch.int32) for x in (lens, starts)))
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        blocks = -(-n_queries * 2**log_parts // WARPS)
        library.run(blocks, len(lens), WARPS, *pointers, max_len, has_starts, log_parts, log_ways, workers)
        # query h * q_len + i is head h of token i
        out = out.transpose(1, 2).flatten(1, 2)
        torch.testing.assert_close(out, want_out, atol=1e-4, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4, equal_nan=True)
