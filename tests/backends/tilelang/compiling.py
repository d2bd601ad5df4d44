"""Fills TileLang's disk cache on all cores, ahead of the tests that launch the kernels."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from flexmla.plan import device_record
from flexmla.shape import Specialisation
from flexmla.tiling import tile

# Whether a call of the loader may be one with small pages, those of less than a tile.
SMALL = {"contiguous": [False], "pages": [False], "pages_of_16": [True], "gather": [True], "scalar": [False, True]}


def compile_all(specialisations: Iterable[Specialisation]) -> None:
    from flexmla.backends.tilelang.compile import prebuild

    device = device_record("cuda")
    jobs = [
        (s, tile(s.shape, 64, 8192, device.sm_count, s.q_len, once, s.scoring, device.fast_memory))
        for s in specialisations
        for once in SMALL[s.loader]
    ]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16), multiprocessing.get_context("spawn")) as pool:
        problems = [problem for problem in pool.map(prebuild, *zip(*jobs, strict=True)) if problem]
    assert not problems, "\n".join(problems)
