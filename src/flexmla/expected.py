"""How long a decode step may be expected to take: a rule of thumb for people. Nothing is planned by it.

Fitted to what was measured on H100s (benchmarks/results): a fixed time for launch, lookup of lengths, epilogue and
merge; then whichever takes longest, reading the cache, the tensor cores, or a worker's tiles one after the other.
"""

from __future__ import annotations

import torch

from .plan import DeviceRecord
from .shape import MLAShape
from .tiling import Tiling, padded_queries

FIXED_US = 7.0
READ_GB_S = 3130.0  # streaming read, where the memory's clock and bus are not known: an H100's
READ_SHARE = 0.94  # of the bandwidth by clock and bus
READING = 1.06  # as often as a cache's bytes take by themselves
MATMUL_TFLOPS = 690.0
MATMUL_SHARE = 0.6
TILE_US = 0.7  # from a tile's scores to the next one's, and
TURN_US = 0.3  # more for every CTA that shares the SM


def step_bytes(shape: MLAShape, batch: int, max_len: int, dtype: torch.dtype) -> int:
    """Bytes that a step of full rows and one query token must move: the cache once, queries and outputs."""
    per_row = shape.n_heads * (shape.dv + shape.d_pe + shape.out_width) * dtype.itemsize
    return batch * (max_len * shape.bytes_per_token(dtype) + per_row)


def expected(
    shape: MLAShape, tiling: Tiling, batch: int, max_len: int, dtype: torch.dtype, device: DeviceRecord
) -> tuple[float, float]:
    """Microseconds of a step of full rows and one query token, and the fraction of the read bandwidth that makes."""
    read_gb_s = READ_SHARE * device.memory_gb_s or READ_GB_S
    reading = step_bytes(shape, batch, max_len, dtype) / read_gb_s / 1e3
    queries = -(-shape.n_heads // tiling.block_h) * padded_queries(tiling.family, tiling.block_h)
    flop = 2 * queries * batch * max_len * (shape.dv + shape.d_pe + shape.out_width)
    multiplying = flop / (MATMUL_SHARE * MATMUL_TFLOPS) / 1e6
    tiles = -(-batch * -(-max_len // tiling.block_n) // tiling.workers)
    us = FIXED_US + max(READING * reading, multiplying, (TILE_US + TURN_US * tiling.ctas_per_sm) * tiles)
    return us, reading / us
