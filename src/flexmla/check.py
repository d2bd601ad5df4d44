"""The error measures of the library, and `flexmla check`: random cases against the reference."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from .cases import LOADERS, Case, CaseSpace, random_case
from .shape import MLAShape, Scoring, Specialisation

N_SPECIALISATIONS = 64
N_PLAIN = 20  # of them


def _tilelang_specialisations() -> tuple[Specialisation, ...]:
    """Specialisations over everything that the TileLang backend takes: every value of every list occurs, evenly."""
    wide = _drawn(
        N_SPECIALISATIONS - N_PLAIN,
        n_heads=(1, 2, 3, 5, 8, 9, 12, 15, 16, 20, 24, 28, 32, 40, 64, 96, 127),
        dv=(8, 24, 64, 96, 160, 256, 320, 448, 480, 512, 512, 576, 1024, 1024, 1536, 2048),
        d_pe=(0, 2, 6, 8, 8, 16, 16, 20, 32, 64, 128, 256),
        v_width=(None,) * 5 + (8, 64, 200, 512, 1024),
        softcap=(False, False, True),
        scale=(None, None, None, torch.float32, "same"),
    )
    # the shapes that most models have, and the only ones of many_heads
    plain = _drawn(
        N_PLAIN,
        n_heads=(16, 32, 40, 48, 64, 96, 128),
        dv=(128, 256, 384, 512),
        d_pe=(0, 8, 16, 64),
        v_width=(None,),
        softcap=(False,),
        scale=(None,),
    )
    # and of those one with contiguous caches and one query, which the draw leaves out
    many = Specialisation(MLAShape(96, 1, 512, 0), torch.float16)
    return (*wide, *plain[:-1], many)


def _drawn(count: int, **lists: Sequence[Any]) -> tuple[Specialisation, ...]:
    """`count` specialisations in which every value of every list occurs about as often."""
    lists |= {
        "keys": ("shared", "grouped", "per head"),
        "dtype": (torch.float16, torch.bfloat16),
        "q_len": (1, 1, 1, 1, 2, 3, 4, 5, 8, 16),
        "loader": tuple(LOADERS),
    }
    columns = {name: [values[i % len(values)] for i in range(count)] for name, values in lists.items()}
    for name, column in columns.items():
        random.Random(name).shuffle(column)
    found = []
    for values in zip(*columns.values(), strict=True):
        drawn = dict(zip(columns, values, strict=True))
        n_heads, dtype, scale = drawn["n_heads"], drawn["dtype"], drawn["scale"]
        divisors = [g for g in range(1, n_heads + 1) if n_heads % g == 0]
        groups = {"shared": 1, "grouped": divisors[len(divisors) // 2], "per head": n_heads}[drawn["keys"]]
        scoring = Scoring(drawn["softcap"])
        if scale is not None:
            scoring = Scoring(drawn["softcap"], groups, dtype if scale == "same" else scale)
        shape = MLAShape(n_heads, groups if drawn["d_pe"] else 1, drawn["dv"], drawn["d_pe"], drawn["v_width"])
        loader = "scalar" if shape.d_pe % 8 else drawn["loader"]  # where keys do not begin at multiples of 16 bytes
        found.append(Specialisation(shape, dtype, drawn["q_len"], loader, scoring))
    return tuple(found)


# What the TileLang backend takes, from a number of kernels that can be compiled in minutes.
TILELANG = CaseSpace(
    dtypes=(torch.float16, torch.bfloat16),
    max_len=700,
    max_tokens=2000,
    spreads=(0.1, 1.0, 1.0, 4.0, 20.0, 2500.0),
    specialisations=_tilelang_specialisations(),
    max_batch=3,
)

_INF = float("inf")
_DTYPE_FLAGS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class Errors(NamedTuple):
    """Worst errors of a result, or what they may be.

    Attributes:
        row: relative L2 error of an output row `out[b, i, h]`; infinite where a row is NaN or not the zero it must be.
        lse: `|lse - ref_lse| / (1 + |ref_lse| / 10)`; infinite where one is infinite and the other is not.
    """

    row: float
    lse: float

    def within(self, bound: Errors) -> bool:
        return self.row <= bound.row and self.lse <= bound.lse


def bounds(dtype: torch.dtype) -> Errors:
    """What the library promises for caches of a dtype, against float64 on the same inputs."""
    row = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2, torch.float32: 1e-4}[dtype]
    return Errors(row, 1e-4 if dtype == torch.float32 else 2e-3)


def row_errors(out: Tensor, lse: Tensor, ref_out: Tensor, ref_lse: Tensor) -> Errors:
    """Worst errors of `out` `[batch, q_len, n_heads, W]` and `lse` `[batch, n_heads, q_len]` against a reference."""
    if out.numel() == 0:
        return Errors(0.0, 0.0)
    out, lse, ref_out, ref_lse = (x.detach().to("cpu", torch.float64) for x in (out, lse, ref_out, ref_lse))
    norm, distance = ref_out.norm(dim=-1), (out - ref_out).norm(dim=-1)
    row = torch.where(distance == 0, 0.0, distance / norm)
    gap = torch.where(lse == ref_lse, 0.0, (lse - ref_lse).abs() / (1 + ref_lse.abs() / 10))
    return Errors(*(float(x.nan_to_num(nan=_INF, posinf=_INF).max()) for x in (row, gap)))


def run(
    cases: int,
    seed: int | None,
    device: torch.device,
    dtype: torch.dtype | None,
    backend: str,
    console: Console,
    first_seed: int = 0,
) -> int:
    """Runs random cases, prints a table of the worst errors and one line for every miss.

    Args:
        cases: how many; their seeds count from `first_seed`.
        seed: instead, the one case of this seed.
        device: where to decode.
        dtype: None for every dtype the backend takes.
        backend: "auto", "tilelang" or "torch".
        console: where to print.

    Returns:
        The number of misses: results out of bounds, and calls that raised.

    Raises:
        ValueError: the backend does not take the dtype, or is no backend.
        ImportError, NotImplementedError: the named backend is not installed, or not for this device.
    """
    if backend not in ("auto", "tilelang", "torch"):
        raise ValueError(f"backend must be 'auto', 'tilelang' or 'torch', got {backend!r}")
    space = TILELANG if backend == "tilelang" else CaseSpace()
    if dtype is not None:
        if dtype not in space.dtypes:
            accepted = ", ".join(_DTYPE_FLAGS[d] for d in space.dtypes)
            raise ValueError(f"dtype must be one of {accepted} with backend {backend!r}, got {dtype}")
        kept = tuple(s for s in space.specialisations if s.dtype == dtype)
        space = replace(space, dtypes=(dtype,), specialisations=kept)
    seeds = range(first_seed, first_seed + cases) if seed is None else range(seed, seed + 1)
    tally = _Tally(defaultdict(list), [])
    for case_seed in track(seeds, f"checking on {device}", console=console, transient=True):
        tally.add(random_case(case_seed, space, device), backend)
    console.print(tally.table(f"{len(seeds)} random cases on {device}, backend {backend}"))
    flags = f" --dtype {_DTYPE_FLAGS[dtype]}" if dtype is not None else ""
    for case, problem in tally.misses:
        console.print(f"[red]miss[/red] {escape(problem)}: {escape(case.describe())}", highlight=False)
        again = f"flexmla check --seed {case.seed} --device {device} --backend {backend}{flags}"
        console.print(f"     repeat it with: {again}", highlight=False, soft_wrap=True)
    return len(tally.misses)


@dataclass
class _Tally:
    """Errors by dtype and kind of cache, and what went wrong."""

    errors: defaultdict[tuple[torch.dtype, bool], list[Errors | None]]
    misses: list[tuple[Case, str]]

    def add(self, case: Case, backend: str) -> None:
        dtype = case.q_nope.dtype
        errors: Errors | None = None
        try:
            errors = row_errors(*case.decode(backend=backend), *case.expected())
        except (ImportError, NotImplementedError):  # no backend to check
            raise
        except Exception as error:  # a case is valid by construction, so whatever it raises is a finding
            self.misses.append((case, f"{type(error).__name__}: {error}"))
        if errors is not None and not errors.within(bounds(dtype)):
            self.misses.append((case, f"row error {errors.row:.2e}, lse error {errors.lse:.2e}"))
        self.errors[dtype, case.paged].append(errors)

    def table(self, title: str) -> Table:
        table = Table("dtype", "cache", title=title, caption="worst errors, and what is allowed", box=box.SIMPLE)
        for column in ("cases", "row error", "bound", "lse error", "bound", "misses"):
            table.add_column(column, justify="right")
        for (dtype, paged), all_errors in sorted(self.errors.items(), key=lambda item: (str(item[0][0]), item[0][1])):
            bound = bounds(dtype)
            errors = [e for e in all_errors if e is not None]
            missed = len(all_errors) - sum(e.within(bound) for e in errors)
            row, lse = (f"{max(column):.1e}" for column in zip(*errors, strict=True)) if errors else ("-", "-")
            table.add_row(
                _DTYPE_FLAGS[dtype],
                "paged" if paged else "contiguous",
                str(len(all_errors)),
                row,
                f"{bound.row:.1e}",
                lse,
                f"{bound.lse:.1e}",
                f"[red]{missed}[/red]" if missed else "0",
            )
        return table
