"""The streaming read of ceilings and of a case's bytes; needs Triton, which comes with CUDA builds of PyTorch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_sum(src, sums, rounds: tl.constexpr, block: tl.constexpr, loads: tl.constexpr):
    """Adds up int32 values (they wrap): program p takes chunk p, p + programs, ..., of `block * loads` values each.

    The loads of a chunk do not depend on each other, so that all of them are in flight at once.
    """
    pid = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * block * loads
    at = src + pid * block * loads + tl.arange(0, block)
    total = tl.zeros([block], tl.int32)
    for _ in range(rounds):
        for i in tl.static_range(loads):
            total += tl.load(at + i * block)
        at += step
    tl.store(sums + pid, tl.sum(total, 0))
