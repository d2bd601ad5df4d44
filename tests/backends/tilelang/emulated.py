"""Kernels whose warps share nothing, as the compiler's CUDA source, executed on the CPU; and how a batch is cut."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BLOCK_N = 64
WARPS_CPP = Path(__file__).with_name("warps.cpp")


def emulated(program: Any, run: str, folder: Path) -> ctypes.CDLL:
    """The last kernel of a program as a library; `run` is the C++ function of this name that calls it."""
    from flexmla.backends.tilelang.compile import lower

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    text = lower(program).kernel_source
    kernel = folder / "kernel.inc"
    kernel.write_text(text[text.rindex('extern "C" __global__') :] + run)
    library = folder / "kernel.so"
    command = [compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-pthread", f'-DKERNEL="{kernel}"']
    subprocess.run([*command, "-o", str(library), str(WARPS_CPP)], check=True)
    return ctypes.CDLL(str(library))


class Piece(NamedTuple):
    """What of a row one worker takes: tiles `[tile, tile + count)`. Its state is left in `slot`."""

    worker: int
    tile: int
    count: int
    slot: int


def row_tiles(lens: list[int], starts: list[int], max_len: int) -> list[int]:
    spans = [(max(start, 0), min(max(n, 0), max_len)) for start, n in zip(starts, lens, strict=True)]
    return [-(-end // BLOCK_N) - begin // BLOCK_N if begin < end else 0 for begin, end in spans]


def cut(tiles: list[int], workers: int) -> list[list[Piece]]:
    """The pieces of each row, as `schedule` describes them."""
    chunk = max(1, -(-sum(tiles) // workers))
    rows: list[list[Piece]] = []
    before = 0
    for n in tiles:
        pieces, tile = [], 0
        while tile < n:
            worker = (before + tile) // chunk
            count = min(n - tile, (worker + 1) * chunk - before - tile)
            pieces.append(Piece(worker, tile, count, 2 * worker + (tile == 0)))
            tile += count
        rows.append(pieces)
        before += n
    return rows
