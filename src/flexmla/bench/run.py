"""The measuring loop: ceilings, then for each case and contender inputs, check, timing, row."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import flexmla
from flexmla.check import bounds, row_errors
from flexmla.info import driver_version, version
from flexmla.plan import device_record

from . import ceilings
from .base import base_rows, base_source, comparison
from .case import Case
from .ceilings import Ceilings
from .cold import measure_cold
from .inputs import Inputs
from .peers import Contender, flexmla_contender, peers_of
from .report import Machine, Measured, Row, append_rows, figure_class, is_flexmla, overhead_table, plot, row, table
from .search import search_misses, search_table, searched
from .timing import GraphTimer, HostTimer, Timer, rotated_sets

SEED = 0
ROOM = 0.9  # share of the free memory that one set of inputs may take


@dataclass(frozen=True)
class Rig:
    """What the loop runs on: a device with its memory figures, and the way calls are timed there.

    Attributes:
        part: what of a call is timed, where it is not all: goes behind the contender's name.
    """

    device: torch.device
    timer: Timer
    l2_bytes: int
    free_bytes: Callable[[], int]
    part: str = ""

    @classmethod
    def cuda(cls, device: torch.device) -> Rig:
        """A CUDA device, timed by graph replay."""

        def free_bytes() -> int:
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info(device)[0]

        return cls(device, GraphTimer(device), torch.cuda.get_device_properties(device).L2_cache_size, free_bytes)

    @classmethod
    def host(cls, device: torch.device, launching: bool = True) -> Rig:
        """Any device, timed on the host, with the launch or up to it: one small set of inputs, always the same."""
        part = "" if launching else "-before-launch"
        return cls(device, HostTimer(device, launching=launching), 0, lambda: sys.maxsize, part)


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        results: everything that was timed.
        misses: a sentence for each result outside its bound and each failure of flexmla; none of them is timed.
        skipped: a sentence for each contender that a device has no room or no kernel for.
    """

    results: list[Measured] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def measure_case(case: Case, contenders: Sequence[Contender], rig: Rig) -> Outcome:
    """Checks and times contenders on one case; those with the same kind of inputs get the same sets."""
    outcome = Outcome()
    for kind in dict.fromkeys(contender.inputs for contender in contenders):
        group = [contender for contender in contenders if contender.inputs is kind]
        names = ", ".join(contender.name for contender in group)
        held, free = kind.held_bytes(case), rig.free_bytes()
        if held > ROOM * free:
            outcome.skipped.append(f"{names}, {case}: needs {held / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            continue
        try:
            _measure_kind(case, group, rotated_sets(kind.n_bytes(case), held, rig.l2_bytes, free), rig, outcome)
        except torch.OutOfMemoryError:
            outcome.skipped.append(f"{names}, {case}: no room for the inputs")
    return outcome


def _measure_kind(case: Case, group: Sequence[Contender], n_sets: int, rig: Rig, outcome: Outcome) -> None:
    """Contenders that take the same inputs; the inputs are gone when it returns."""
    generator = torch.Generator(rig.device).manual_seed(SEED)
    sets = [group[0].inputs.random(case, rig.device, generator) for _ in range(n_sets)]
    expected = [inputs.expected() for inputs in sets]
    for contender in group:
        _measure(case, contender, sets, expected, rig, outcome)


def _measure(
    case: Case,
    contender: Contender,
    sets: Sequence[Inputs],
    expected: Sequence[tuple[Tensor, Tensor]],
    rig: Rig,
    outcome: Outcome,
) -> None:
    what = f"{contender.name}, {case}"
    try:
        results = rig.timer.prepare([functools.partial(contender.decode, inputs) for inputs in sets])
        errors = [
            row_errors(out, right_lse if lse is None else lse, right, right_lse)
            for (out, lse), (right, right_lse) in zip(results, expected, strict=True)
        ]
        bound = bounds(case.dtype)
        row_error, lse_error = (max(error) for error in zip(*errors, strict=True))
        if row_error > bound.row or lse_error > bound.lse:
            outcome.misses.append(
                f"{what}: row error {row_error:.2e} and lse error {lse_error:.2e}, "
                f"where {bound.row:.1e} and {bound.lse:.1e} are allowed"
            )
            return
        n_bytes, flop = contender.inputs.n_bytes(case), contender.inputs.flop(case)
        outcome.results.append(Measured(case, contender.name + rig.part, rig.timer.us(), n_bytes, flop, row_error))
    except torch.OutOfMemoryError:
        outcome.skipped.append(f"{what}: out of memory")
    except (RuntimeError, ValueError) as failure:
        kept = outcome.misses if is_flexmla(contender.name) else outcome.skipped
        kept.append(f"{what}: {str(failure).strip().splitlines()[0]}")
    finally:
        rig.timer.release()


def measure_suite(
    cases: Sequence[Case],
    rig: Rig,
    *,
    others: Callable[[Case], Sequence[Contender]],
    console: Console,
    keep: Callable[[Sequence[Measured]], object],
) -> Outcome:
    """Measures flexmla and `others` case after case behind a progress bar, handing each case's results on at once."""
    total = Outcome()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            own = flexmla_contender(case, rig.device)
            # without a kernel for the case, this is the torch backend, which is a peer elsewhere
            contenders = (own, *(other for other in others(case) if other.name != own.name))
            outcome = measure_case(case, contenders, rig)
            keep(outcome.results)
            total.results += outcome.results
            total.misses += outcome.misses
            total.skipped += outcome.skipped
            progress.advance(task)
    return total


def run(
    cases: Sequence[Case],
    *,
    device: torch.device,
    peers: bool,
    json_path: Path | None,
    plot_path: Path | None,
    commit: str | None,
    console: Console,
    overhead: Sequence[Case] = (),
    cold: Sequence[Case] = (),
    search: bool = False,
    base: Path | None = None,
    base_arguments: Sequence[str] = (),
) -> int:
    """Measures cases on a CUDA device, prints a table a suite, and returns the number of misses.

    Args:
        cases: what to measure, suite by suite.
        device: a CUDA device; any device where there are no cases but those of `overhead` and `cold`.
        peers: whether to time the peers too.
        json_path: file to append a row a measurement to, as each case ends.
        plot_path: file to draw to.
        commit: for the rows; default: what git says of the checkout that this package runs from.
        console: where to print.
        overhead: what to measure the host's time of an eager call with, after the cases.
        cold: what to measure the first call of a new process with, last.
        search: whether to time the other tiles of `tiling.choices` instead of peers; one that is much faster than the
            plan's is a miss.
        base: another checkout, whose code measures the same cases afterwards; its rows go to `json_path` too.
        base_arguments: what asks its bench command for these cases.

    Raises:
        ValueError: without a CUDA device, for a dtype other than float16 and bfloat16, for rows without a commit, for a
            plot, a search or a base without cases, for a search with a base, and for a base that is no checkout.
        ImportError: without Triton; for a plot, without matplotlib.
    """
    if cases and device.type != "cuda":
        raise ValueError(f"bench needs a CUDA GPU, got device {str(device)!r}")
    for case in (*cases, *overhead):
        if case.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"bench takes float16 and bfloat16, got {str(case.dtype).removeprefix('torch.')}")
    if plot_path is not None:
        if not cases:
            raise ValueError("a plot needs suites or a shape, got none")
        figure_class()  # a missing package is told before anything is measured
    if search and not cases:
        raise ValueError("a search needs suites or a shape, got none")
    if base is not None:
        if not cases:
            raise ValueError("a base needs suites or a shape, got none")
        if search:
            raise ValueError("bench takes a base or a search, got both")
        base_commit = checkout_commit(base_source(base) / "flexmla") or "base"
    commit = commit or checkout_commit(Path(flexmla.__file__).parent)
    if commit is None and json_path is not None:
        raise ValueError("commit must be given (--commit) for rows from a package that is in no git checkout, got none")
    machine = Machine(
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else device_record(device).name,
        driver=driver_version(),
        torch=torch.__version__,
        tilelang=version("tilelang"),
        flexmla=flexmla.__version__,
        commit=commit or "",
    )

    def write(results: Sequence[Measured], limits: Ceilings | None) -> list[Row]:
        new = [row(result, machine, limits) for result in results]
        if json_path is not None:
            append_rows(json_path, new)
        return new

    def host_time(rig: Rig) -> Outcome:
        outcome = measure_suite(
            overhead,
            rig,
            others=lambda case: [flexmla_contender(case, device, given=True)],
            console=console,
            keep=lambda results: write(results, None),
        )
        console.print(overhead_table(outcome.results, f"overhead, {machine.gpu}"))
        return outcome

    def others(case: Case) -> Sequence[Contender]:
        return searched(case, device) if search else peers_of(case) if peers else ()

    misses = 0
    if cases:
        rows: list[Row] = []
        rig = Rig.cuda(device)
        with console.status("measuring the ceilings"):
            limits = ceilings.measure(rig.timer, device)
        console.print(
            f"{machine.gpu}: streaming read {limits.read_gb_s:.0f} GB/s, copy {limits.copy_gb_s:.0f} GB/s, "
            f"fp16 matmul {limits.matmul_tflops:.0f} TFLOP/s",
            highlight=False,
        )
        for suite, of_suite in groupby(cases, key=lambda case: case.suite):
            outcome = measure_suite(
                list(of_suite),
                rig,
                others=others,
                console=console,
                keep=lambda results: rows.extend(write(results, limits)),
            )
            if search:
                console.print(search_table(outcome.results, f"{suite}, {machine.gpu}"))
                outcome.misses += search_misses(outcome.results)
            else:
                console.print(table(outcome.results, limits, f"{suite}, {machine.gpu}"))
            misses += _tell(outcome, console)
        if plot_path is not None:
            plot(rows, plot_path)
        if base is not None:
            with console.status(f"measuring {base}"):
                theirs = base_rows(base, base_arguments, base_commit)
            if json_path is not None:
                append_rows(json_path, theirs)
            console.print(comparison(rows, theirs, f"against {base_commit[:12]}, {machine.gpu}"))
    if overhead:
        outcome = host_time(Rig.host(device))
        misses += _tell(outcome, console)
        if any(result.name == "flexmla" for result in outcome.results):  # the TileLang backend ran
            misses += _tell(host_time(Rig.host(device, launching=False)), console)
    if cold:
        with console.status("measuring first calls"):
            outcome = Outcome(*measure_cold(cold, device))
        write(outcome.results, None)
        console.print(overhead_table(outcome.results, f"cold start, {machine.gpu}"))
        misses += _tell(outcome, console)
    return misses


def _tell(outcome: Outcome, console: Console) -> int:
    """Prints what was skipped and what missed; returns the number of misses."""
    for sentence in outcome.skipped:
        console.print(f"skipped: {sentence}", markup=False, highlight=False, soft_wrap=True)
    for sentence in outcome.misses:
        console.print(f"MISS: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
    return len(outcome.misses)


def checkout_commit(package: Path) -> str | None:
    """The commit of the checkout whose `src/flexmla` a package folder is, with `-dirty` after local changes.

    None where the folder is no such checkout (a package installed somewhere below another project's checkout is not
    that project's), or git or a commit is missing.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() / "src" / "flexmla" != package.resolve():
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
