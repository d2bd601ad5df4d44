"""What comes out: rows for `benchmarks/results/*.jsonl`, the table, the plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .case import Case
from .ceilings import Ceilings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

FLOOR = "read"  # name of what reads a step's bytes and does nothing else: no peer

KEYS = (
    "gpu",
    "driver",
    "torch",
    "tilelang",
    "flexmla",
    "commit",
    "date",
    "suite",
    "name",
    "n_heads",
    "n_rope_heads",
    "dv",
    "d_pe",
    "dtype",
    "kv_dtype",
    "batch",
    "q_len",
    "tokens",
    "max_len",
    "page_size",
    "us",
    "bytes",
    "gb_s",
    "read_gb_s",
    "frac_read",
    "tflops",
    "matmul_tflops",
    "frac_matmul",
    "max_row_err",
)


@dataclass(frozen=True)
class Machine:
    """Where and of what a run was made: the GPU's name, the versions and the commit, as rows have them."""

    gpu: str
    driver: str
    torch: str
    tilelang: str
    flexmla: str
    commit: str


@dataclass(frozen=True)
class Measured:
    """One contender's result on one case.

    Attributes:
        case: what was decoded.
        name: the contender.
        us: microseconds a call.
        n_bytes, flop: what this contender had to move and to compute.
        max_row_err: largest relative L2 error of an output row.
    """

    case: Case
    name: str
    us: float
    n_bytes: int
    flop: int
    max_row_err: float

    @property
    def gb_s(self) -> float:
        return self.n_bytes / self.us / 1e3

    @property
    def tflops(self) -> float:
        return self.flop / self.us / 1e6


def row(measured: Measured, machine: Machine, ceilings: Ceilings | None) -> Row:
    """One line of a results file. `bytes` are the contender's own: a peer with another cache counts that one.

    Args:
        measured: a result.
        machine: where it was measured.
        ceilings: of the same run; None for a time of the host, whose row has null for every rate and fraction.
    """
    case = measured.case
    rates: tuple[float | None, ...] = (None,) * 6
    if ceilings is not None:
        rates = (
            round(measured.gb_s, 1),
            round(ceilings.read_gb_s, 1),
            round(measured.gb_s / ceilings.read_gb_s, 4),
            round(measured.tflops, 2),
            round(ceilings.matmul_tflops, 1),
            round(measured.tflops / ceilings.matmul_tflops, 4),
        )
    dtype = str(case.dtype).removeprefix("torch.")
    values = (
        machine.gpu,
        machine.driver,
        machine.torch,
        machine.tilelang,
        machine.flexmla,
        machine.commit,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        case.suite,
        measured.name,
        case.shape.n_heads,
        case.shape.n_rope_heads,
        case.shape.dv,
        case.shape.d_pe,
        dtype,
        dtype,
        case.batch,
        case.q_len,
        case.tokens,
        case.max_len,
        case.page_size,
        round(measured.us, 3),
        measured.n_bytes,
        *rates,
        float(f"{measured.max_row_err:.3g}"),
    )
    return dict(zip(KEYS, values, strict=True))


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Appends rows to a JSON-lines file, which is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in rows)


def speed_up(measured: Measured, of_case: Sequence[Measured]) -> float | None:
    """How many times faster than the fastest peer of the same case; None for a peer, and where no peer ran."""
    peers = [other.us for other in of_case if not is_flexmla(other.name) and other.name != FLOOR]
    return min(peers) / measured.us if peers and is_flexmla(measured.name) else None


def is_flexmla(name: str) -> bool:
    """Whether a row's `name` is one of flexmla's backends."""
    return name == "flexmla" or name.startswith("flexmla-")


def table(results: Sequence[Measured], ceilings: Ceilings, title: str) -> Table:
    """The results of one suite for people; cases in the order they ran, a rule between them."""
    out = Table(title=title, title_justify="left")
    out.add_column("heads/rope dv+d_pe")
    out.add_column("batch x len")
    out.add_column("name")
    for column in ("us", "GB/s", "of read", "TFLOP/s", "of matmul", "row err", "speed-up"):
        out.add_column(column, justify="right")
    cases = list(dict.fromkeys(result.case for result in results))
    for case in cases:
        of_case = [result for result in results if result.case == case]
        for i, result in enumerate(of_case):
            ratio = speed_up(result, of_case)
            out.add_row(
                f"{case.layer}  {case.label}".strip() if i == 0 else "",
                case.size if i == 0 else "",
                result.name,
                f"{result.us:.1f}",
                f"{result.gb_s:.0f}",
                f"{result.gb_s / ceilings.read_gb_s:.3f}",
                f"{result.tflops:.1f}",
                f"{result.tflops / ceilings.matmul_tflops:.3f}",
                f"{result.max_row_err:.1e}",
                "" if ratio is None else f"{ratio:.2f}x",
                end_section=i == len(of_case) - 1,
                style="bold" if is_flexmla(result.name) else None,
            )
    return out


def overhead_table(results: Sequence[Measured], title: str) -> Table:
    """What calls cost on the host."""
    out = Table(title=title, title_justify="left")
    for column in ("heads/rope dv+d_pe", "batch x len", "name"):
        out.add_column(column)
    for column in ("us on the host", "row err"):
        out.add_column(column, justify="right")
    for result in results:
        case = result.case
        out.add_row(case.layer, case.size, result.name, f"{result.us:.1f}", f"{result.max_row_err:.1e}")
    return out


def figure_class() -> type[Figure]:
    """matplotlib's Figure, which draws without a window system.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'flexmla[bench]'") from error
    return Figure


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws the fraction of read over the bytes of a step, a series a contender and suite, with the limit at 1.

    Raises:
        ImportError: without matplotlib.
        ValueError: without rows, or for a file type that matplotlib does not write.
    """
    if not rows:
        raise ValueError("rows must hold at least one measured row to plot, got none")
    figure = figure_class()(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(r["name"] for r in rows))
    suites = list(dict.fromkeys(r["suite"] for r in rows))
    for name in names:
        for suite in suites:
            series = [r for r in rows if r["name"] == name and r["suite"] == suite]
            points = sorted((r["bytes"] / 1e6, r["frac_read"]) for r in series)
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=f"C{names.index(name)}",
                    marker="os^Dv"[suites.index(suite) % 5],
                    linestyle="-" if is_flexmla(name) else ":",
                    label=f"{name}, {suite}",
                )
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    limit = rows[0]["read_gb_s"]
    axes.annotate(f"streaming read, {limit:.0f} GB/s", (0.01, 1.0), xycoords=("axes fraction", "data"), va="bottom")
    axes.set(xscale="log", xlabel="bytes a step (MB)", ylabel="fraction of read bandwidth", ylim=(0, 1.1))
    axes.set_title(f"{rows[0]['gpu']}, {rows[0]['dtype']}")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
