"""The merge of partial states, as the compiler's CUDA source, executed on the CPU."""

# no `from __future__ import annotations`: the DSL reads a kernel's annotations as values
import ctypes
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


def source(n_heads: int, dv: int) -> str:
    """The combine alone, in float32, as CUDA."""
    from flexmla.backends.tilelang.combine import combine
    from flexmla.backends.tilelang.compile import PASS_CONFIGS, TARGET

    batch, slots = T.dynamic("batch"), T.dynamic("slots")
    f32, i32 = T.float32, T.int32

    @T.prim_func
    def decode(
        seq_lens: T.Tensor((batch,), i32),
        out: T.Tensor((batch, n_heads, dv), "float32"),
        lse: T.Tensor((batch, n_heads), f32),
        part: T.Tensor((slots, n_heads, dv), "float32"),
        part_lse: T.Tensor((slots, n_heads), f32),
        workers: i32,
        max_len: i32,
        log_ways: i32,
        log_parts: i32,
    ):
        combine(
            n_heads, dv, "float32", BLOCK_N, batch, max_len, workers, log_ways, log_parts,
            seq_lens, out, lse, part, part_lse,
        )  # fmt: skip

    target = tilelang.tvm.target.Target(TARGET)
    with target, tilelang.tvm.transform.PassContext(config={k.value: v for k, v in PASS_CONFIGS.items()}):
        text = tilelang.engine.lower(decode, target=target, enable_device_compile=False).kernel_source
    return text[text.rindex('extern "C" __global__') :]


def build(n_heads: int, dv: int, folder: Path) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    kernel = folder / "kernel.inc"
    kernel.write_text(source(n_heads, dv))
    library = folder / "combine.so"
    command = [compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-pthread", f'-DKERNEL="{kernel}"']
    subprocess.run([*command, "-o", str(library), str(WARPS_CPP)], check=True)
    return ctypes.CDLL(str(library))


def partial_states(
    lens: list[int], max_len: int, workers: int, n_heads: int, dv: int, noise: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What decode leaves behind for a batch cut over workers, and what the merge must make of it; NaN: untouched."""
    part, part_lse = torch.full((2 * workers, n_heads, dv), NAN), torch.full((2 * workers, n_heads), NAN)
    out, lse = torch.full((len(lens), n_heads, dv), NAN), torch.full((len(lens), n_heads), NAN)
    tiles = [-(-min(max(n, 0), max_len) // BLOCK_N) for n in lens]
    chunk = max(1, -(-sum(tiles) // workers))
    before = 0
    for row, n_tiles in enumerate(tiles):
        cut_by = range(before // chunk, (before + n_tiles - 1) // chunk + 1)
        before += n_tiles
        if n_tiles == 0:
            out[row], lse[row] = 0, -torch.inf
        elif len(cut_by) > 1:
            slots = torch.tensor([2 * w + (w == cut_by[0]) for w in cut_by])
            part[slots] = torch.randn(len(slots), n_heads, dv, generator=noise)
            part_lse[slots] = 5 * torch.randn(len(slots), n_heads, generator=noise)
            weights = torch.softmax(part_lse[slots].double() * torch.log(torch.tensor(2.0)).double(), 0)
            out[row] = (part[slots] * weights[..., None]).sum(0).float()
            lse[row] = torch.logsumexp(part_lse[slots].double() * torch.log(torch.tensor(2.0)).double(), 0).float()
    return part, part_lse, out, lse


@pytest.mark.parametrize(("n_heads", "dv"), [(9, 192), (5, 512), (3, 64)])
def test_merges_every_cut_row_and_no_other(n_heads: int, dv: int, tmp_path: Path) -> None:
    from flexmla.backends.tilelang.combine import WARPS

    library = build(n_heads, dv, tmp_path)
    rng = random.Random(f"{n_heads} {dv}")
    for seed in range(10):
        max_len, workers = rng.choice((64, 130, 1000, 9000)), rng.choice((1, 2, 5, 13, 40, 132))
        lens = [
            rng.choice((0, 1, 64, 65, max_len, rng.randint(0, max_len), -3, max_len + 9))
            for _ in range(rng.randint(1, 4))
        ]
        log_ways, log_parts = rng.randint(0, 3), rng.randint(0, 4)
        states = partial_states(lens, max_len, workers, n_heads, dv, torch.Generator().manual_seed(seed))
        part, part_lse, want_out, want_lse = states
        out, lse = torch.full_like(want_out, NAN), torch.full_like(want_lse, NAN)
        seq_lens = torch.tensor(lens, dtype=torch.int32)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (lse, out, part, part_lse, seq_lens)]
        blocks = -(-n_heads * 2**log_parts // WARPS)
        library.run(blocks, len(lens), WARPS, *pointers, log_parts, log_ways, max_len, workers)
        torch.testing.assert_close(out, want_out, atol=1e-4, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4, equal_nan=True)
