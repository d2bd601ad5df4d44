"""How long a decode step may be expected to take: a rule of thumb for people. Nothing is planned by it.

Fitted to what was measured on H100s (benchmarks/results): a fixed time for launch, lookup of lengths, epilogue and
merge; then whichever takes longest, reading the cache, the tensor cores, or a worker's tiles one after the other.
"""

from __future__ import annotations

from flexmla.plan import DeviceRecord
from flexmla.tiling import Tiling, padded_queries

from .case import Case

FIXED_US = 7.0
READ_GB_S = 3130.0  # streaming read, where the memory's clock and bus are not known: an H100's
READ_SHARE = 0.94  # of the bandwidth by clock and bus
READING = 1.06  # as often as a cache's bytes take by themselves
MATMUL_TFLOPS = 770.0
MATMUL_SHARE = 0.79
TILE_US = 0.5  # from a tile's scores to the next one's, and
TURN_US = 0.3  # more for every CTA that shares the SM


def expected(case: Case, tiling: Tiling, device: DeviceRecord) -> tuple[float, float]:
    """Microseconds of a case's step, and the fraction of the read bandwidth that makes."""
    read_gb_s = READ_SHARE * device.memory_gb_s or READ_GB_S
    reading = case.n_bytes / read_gb_s / 1e3
    n_heads = case.shape.n_heads
    queries = -(-n_heads // tiling.block_h) * padded_queries(tiling.family, tiling.block_h * case.q_len)
    flop = case.flop * queries / (n_heads * case.q_len)  # of padding too
    multiplying = flop / (MATMUL_SHARE * MATMUL_TFLOPS) / 1e6
    tiles = -(-sum(-(-n // tiling.block_n) for n in case.row_lens) // tiling.workers)
    us = FIXED_US + max(READING * reading, multiplying, (TILE_US + TURN_US * tiling.ctas_per_sm) * tiles)
    return us, reading / us
