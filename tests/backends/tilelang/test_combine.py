"""The merge of partial states, as the compiler's CUDA source, executed on the CPU."""

# no `from __future__ import annotations`: the DSL reads a kernel's annotations as values
import ctypes
import math
import random
from pathlib import Path

import pytest
import torch

from .emulated import BLOCK_N, Piece, cut, emulated, row_tiles

tilelang = pytest.importorskip("tilelang", reason="needs TileLang: pip install 'flexmla[tilelang]'")
T = pytest.importorskip("tilelang.language")

NAN = float("nan")
SUMS0 = 5  # rows before the first sum: what of the workspace the states take


RUN = """
extern "C" void run(int blocks, int rows, int warps, float *lse, float *out, const float *part, const float *sums,
                    const int *seq_lens, const int *starts, int capacity, int has_starts, int log_parts, int log_ways,
                    int workers) {
  for_each_warp(blocks, rows, warps, [&] {
    decode_kernel(lse, out, part, seq_lens, starts, sums, rows, capacity, has_starts, log_parts, log_ways, workers);
  });
}
"""


def program(n_heads: int, q_len: int, dv: int):
    """The combine alone, in float32."""
    from flexmla.backends.tilelang.combine import combine
    from flexmla.backends.tilelang.spec import Results

    batch, slots = T.dynamic("batch"), T.dynamic("slots")
    f32, i32 = T.float32, T.int32

    @T.prim_func
    def decode(
        seq_lens: T.Tensor((batch,), i32),
        starts: T.Tensor((batch,), i32),
        out: T.Tensor((batch, q_len, n_heads, dv), "float32"),
        lse: T.Tensor((batch, n_heads, q_len), f32),
        part: T.Tensor((slots, n_heads * q_len, dv), "float32"),
        sums: T.Tensor((slots + SUMS0, n_heads * q_len), f32),
        has_starts: i32,
        workers: i32,
        capacity: i32,
        log_ways: i32,
        log_parts: i32,
    ):
        combine(
            n_heads, q_len, dv, "float32", seq_lens, starts, has_starts, batch, capacity, BLOCK_N, workers, log_ways,
            log_parts, Results(out, lse, part, sums, SUMS0),
        )  # fmt: skip

    return decode


def partial_states(
    rows: list[list[Piece]], n_slots: int, n_queries: int, dv: int, noise: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What decode leaves behind for a batch cut over workers, and what the merge must make of it; NaN: untouched."""
    part, part_lse = torch.full((n_slots, n_queries, dv), NAN), torch.full((n_slots, n_queries), NAN)
    out, lse = torch.full((len(rows), n_queries, dv), NAN), torch.full((len(rows), n_queries), NAN)
    for row, pieces in enumerate(rows):
        if not pieces:
            out[row], lse[row] = 0, -torch.inf
        elif len(pieces) > 1:
            slots = torch.tensor([piece.slot for piece in pieces])
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

    library = emulated(program(n_heads, q_len, dv), RUN, tmp_path)
    n_queries = n_heads * q_len
    rng = random.Random(f"{n_queries} {dv}")
    for seed in range(10):
        max_len, workers = rng.choice((64, 130, 1000, 9000)), rng.choice((1, 2, 5, 13, 40, 132))
        lens = [
            rng.choice((0, 1, 64, 65, max_len, rng.randint(0, max_len), -3, max_len + 9))
            for _ in range(rng.randint(1, 4))
        ]
        starts = [rng.choice((0, 0, -2, 63, 64, rng.randint(0, max_len), max_len + 5)) for _ in lens]
        if seed == 0:  # more states than a warp keeps the sums of
            max_len, workers, lens, starts = 30000, 396, [30000, 64], [63, 0]
        has_starts = rng.randint(0, 1)
        log_ways, log_parts = rng.randint(0, 3), rng.randint(0, 4)
        rows = cut(row_tiles(lens, starts if has_starts else [0] * len(lens), max_len), workers)
        states = partial_states(rows, 2 * workers, n_queries, dv, torch.Generator().manual_seed(seed))
        part, part_lse, want_out, want_lse = states
        out, lse = torch.full((len(lens), q_len, n_heads, dv), NAN), torch.full_like(want_lse, NAN)
        sums = torch.cat([torch.full((SUMS0, n_queries), NAN), part_lse])
        tensors = (lse, out, part, sums, *(torch.tensor(x, dtype=torch.int32) for x in (lens, starts)))
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        blocks = -(-n_queries * 2**log_parts // WARPS)
        library.run(blocks, len(lens), WARPS, *pointers, max_len, has_starts, log_parts, log_ways, workers)
        # query h * q_len + i is head h of token i
        out = out.transpose(1, 2).flatten(1, 2)
        torch.testing.assert_close(out, want_out, atol=1e-4, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4, equal_nan=True)
