"""How a batch is cut over workers, as the compiler's CUDA source, executed on the CPU."""

# no `from __future__ import annotations`: the DSL reads a kernel's annotations as values
import ctypes
import random
from pathlib import Path

import pytest
import torch

from .emulated import BLOCK_N, cut, emulated, row_tiles

tilelang = pytest.importorskip("tilelang", reason="needs TileLang: pip install 'flexmla[tilelang]'")
T = pytest.importorskip("tilelang.language")

RUN = """
extern "C" void run(int workers, int *took, const int *seq_lens, const int *starts, int batch, int limit, int capacity,
                    int has_starts) {
  for_each_warp(1, workers, 1, [&] {
    decode_kernel(seq_lens, starts, took, batch, capacity, has_starts, limit, workers);
  });
}
"""


def program():
    """Every worker writes down what it takes: row, tile, count, and whether that is all of the row."""
    from flexmla.backends.tilelang.schedule import Rows, row_span, share

    batch, n_workers, limit = T.dynamic("batch"), T.dynamic("n_workers"), T.dynamic("limit")
    i32 = T.int32

    @T.prim_func
    def decode(
        seq_lens: T.Tensor((batch,), i32),
        starts: T.Tensor((batch,), i32),
        took: T.Tensor((n_workers, limit, 4), i32),
        has_starts: i32,
        capacity: i32,
        workers: i32,
    ):
        rows = Rows(seq_lens, starts, has_starts, batch, capacity, BLOCK_N)
        with T.Kernel(1, workers, threads=32) as (_, worker):
            lane = T.get_thread_binding()
            row = T.alloc_var(i32)
            tile = T.alloc_var(i32)
            left = T.alloc_var(i32)
            begin = T.alloc_var(i32)
            length = T.alloc_var(i32)
            tiles = T.alloc_var(i32)
            count = T.alloc_var(i32)
            step = T.alloc_var(i32)
            share(rows, lane, worker, workers, row, tile, left)
            step = 0
            while left > 0:
                row_span(rows, row, begin, length, tiles)
                count = T.min(tiles - tile, left)
                if count > 0:
                    if lane == 0:
                        took[worker, step, 0] = row
                        took[worker, step, 1] = tile
                        took[worker, step, 2] = count
                        took[worker, step, 3] = T.if_then_else(count == tiles, 1, 0)
                    step += 1
                left -= count
                row += 1
                tile = 0

    return decode


def test_every_tile_has_one_worker(tmp_path: Path) -> None:
    library = emulated(program(), RUN, tmp_path)
    rng = random.Random(0)
    for _ in range(60):
        max_len, workers = rng.choice((64, 130, 1000, 9000)), rng.choice((1, 2, 5, 13))
        batch = rng.choice((1, 2, 3, 7, 130))
        usual = rng.choice((0, 1, 64, max_len, max_len))
        lens = [
            rng.choice((usual, usual, 0, 65, max_len, rng.randint(0, max_len), -3, max_len + 9)) for _ in range(batch)
        ]
        starts = [rng.choice((0, 0, -2, 63, 64, rng.randint(0, max_len), max_len + 5)) for _ in lens]
        has_starts = rng.randint(0, 1)
        rows = cut(row_tiles(lens, starts if has_starts else [0] * batch, max_len), workers)
        took = torch.full((workers, batch, 4), -1, dtype=torch.int32)
        tensors = (took, *(torch.tensor(x, dtype=torch.int32) for x in (lens, starts)))
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        library.run(workers, *pointers, batch, batch, max_len, has_starts)
        got = {(worker, *piece) for worker, pieces in enumerate(took.tolist()) for piece in pieces if piece[0] >= 0}
        want = {
            (p.worker, row, p.tile, p.count, int(len(pieces) == 1)) for row, pieces in enumerate(rows) for p in pieces
        }
        assert got == want
