"""The first call of a shape in a new process: with a kernel to compile, and with one in the disk cache."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import flexmla
from flexmla.check import bounds, row_errors

from .case import Case
from .inputs import LatentInputs
from .peers import flexmla_contender
from .processes import environment, last_words
from .report import Measured

CHILD = "import sys; from flexmla.bench.cold import first_call; first_call(*sys.argv[1:])"
# The first process finds an empty cache and fills it.
NAMES = ("flexmla-first-call", "flexmla-first-call-cached")


def cold_cases(dtype: torch.dtype = torch.float16) -> list[Case]:
    """One shape of each kernel family."""
    return [Case("cold-start", flexmla.MLAShape(n, 1, 512, d_pe), 8, 128, dtype) for n, d_pe in ((32, 16), (128, 64))]


def measure_cold(cases: Sequence[Case], device: torch.device) -> tuple[list[Measured], list[str]]:
    """The first call of each case in two new processes; and, once a case, the import of TileLang before it.

    The second result is a sentence for each process that failed or whose call was wrong; its case ends with it.
    """
    results, misses = [], []
    source = Path(flexmla.__file__).parents[1]
    for case in cases:
        numbers = [*dataclasses.astuple(case.shape)[:4], case.batch, case.max_len]
        arguments = [json.dumps(numbers), str(case.dtype).removeprefix("torch."), str(device)]
        with tempfile.TemporaryDirectory() as cache:
            for name in NAMES:
                done = subprocess.run(
                    [sys.executable, "-c", CHILD, *arguments],
                    env=environment(source, TILELANG_CACHE_DIR=cache),
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    misses.append(f"{name}, {case}: {last_words(done)}")
                    break
                call_us, import_us, error = json.loads(done.stdout.splitlines()[-1])
                results.append(Measured(case, name, call_us, case.n_bytes, case.flop, error))
            else:
                results.append(Measured(case, "tilelang-import", import_us, 0, 0, 0.0))
    return results, misses


def first_call(numbers: str, dtype: str, device_name: str) -> None:
    """In a new process: prints the microseconds of the first call and of TileLang's import, and the row error.

    Raises:
        RuntimeError: the result is outside its bounds.
    """
    *shape, batch, max_len = json.loads(numbers)
    device = torch.device(device_name)
    case = Case("cold-start", flexmla.MLAShape(*shape), batch, max_len, getattr(torch, dtype))
    inputs = LatentInputs.random(case, device, torch.Generator(device).manual_seed(0))
    right, right_lse = inputs.expected()
    contender = flexmla_contender(case, device)
    begin = time.perf_counter()
    if contender.name == "flexmla":
        importlib.import_module("flexmla.backends.tilelang")
    imported = time.perf_counter()
    out, lse = contender.decode(inputs)
    errors = row_errors(out, right_lse if lse is None else lse, right, right_lse)  # waits for the result
    called = time.perf_counter()
    if not errors.within(bounds(case.dtype)):
        raise RuntimeError(f"row error {errors.row:.2e} and lse error {errors.lse:.2e} are not within the bounds")
    print(json.dumps([(called - imported) * 1e6, (imported - begin) * 1e6, errors.row]))
