"""What the machine can do at most, measured in the run it is compared with: streaming read, copy, matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .timing import Timer

READ_BYTES = 2 << 30
MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Ceilings:
    """Limits of one device.

    Attributes:
        read_gb_s: bytes a streaming read over 2 GiB gets, GB/s.
        copy_gb_s: bytes read and written by a device-to-device copy, GB/s.
        matmul_tflops: fp16 product of two 8192 x 8192 matrices, TFLOP/s.
    """

    read_gb_s: float
    copy_gb_s: float
    matmul_tflops: float


class ReadConfig(NamedTuple):
    """One way to lay a streaming read over a device; `ctas_per_sm` 0 is a program a chunk, else a persistent grid."""

    block: int
    loads: int
    warps: int
    ctas_per_sm: int

    def grid(self, n_values: int, sm_count: int) -> tuple[int, int]:
        """Programs, and chunks a program, for at most `n_values` int32 values (what is left over is not read)."""
        chunks = n_values // (self.block * self.loads)
        if self.ctas_per_sm == 0:
            return chunks, 1
        programs = self.ctas_per_sm * sm_count
        return programs, chunks // programs


# Which one is fastest depends on the memory and on the number of SMs, so each is tried.
READ_CONFIGS = (
    ReadConfig(block=4096, loads=4, warps=4, ctas_per_sm=0),
    ReadConfig(block=8192, loads=2, warps=8, ctas_per_sm=0),
    ReadConfig(block=2048, loads=4, warps=4, ctas_per_sm=12),
    ReadConfig(block=8192, loads=2, warps=8, ctas_per_sm=3),
)


def measure(timer: Timer, device: torch.device) -> Ceilings:
    """Measures the three ceilings of a CUDA device (about 2.5 GB of its memory, random data, a few seconds).

    Raises:
        ImportError: without Triton.
        RuntimeError: where the read kernel does not return the sum of what it read.
    """
    values = torch.randint(-(2**31), 2**31, (READ_BYTES // 4,), dtype=torch.int32, device=device)
    read = max(_read_gb_s(timer, values, config) for config in READ_CONFIGS)
    return Ceilings(read, _copy_gb_s(timer, values), _matmul_tflops(timer, device))


def _read_gb_s(timer: Timer, values: Tensor, config: ReadConfig) -> float:
    try:
        from .read_kernel import read_sum
    except ImportError as error:
        raise ImportError(
            "the read ceiling needs Triton, which CUDA builds of PyTorch bring: pip install triton"
        ) from error
    sm_count = torch.cuda.get_device_properties(values.device).multi_processor_count
    programs, rounds = config.grid(values.numel(), sm_count)
    sums = torch.empty(programs, dtype=torch.int32, device=values.device)
    n_read = programs * rounds * config.block * config.loads

    def call() -> Tensor:
        read_sum[(programs,)](values, sums, rounds, config.block, config.loads, num_warps=config.warps)
        return sums

    (result,) = timer.prepare([call])
    # In parts: a sum in int64 first makes an int64 copy.
    expected = sum(int(part.sum(dtype=torch.int64)) for part in values[:n_read].split(1 << 26))
    if (int(result.sum(dtype=torch.int64)) - expected) % 2**32:
        raise RuntimeError(f"the streaming read returned a wrong checksum with {config}")
    gb_s = 4 * n_read / timer.us() / 1e3
    timer.release()
    return gb_s


def _copy_gb_s(timer: Timer, values: Tensor) -> float:
    source, target = values.chunk(2)
    timer.prepare([lambda: target.copy_(source)])
    gb_s = 2 * source.nbytes / timer.us() / 1e3
    timer.release()
    return gb_s


def _matmul_tflops(timer: Timer, device: torch.device) -> float:
    a, b, c = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.float16, device=device) for _ in range(3))
    timer.prepare([lambda: torch.mm(a, b, out=c)])
    tflops = 2 * MATMUL_SIZE**3 / timer.us() / 1e6
    timer.release()
    return tflops
