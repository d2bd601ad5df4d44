"""The same cases measured with another checkout's code, for a comparison in one run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from .processes import environment, last_words
from .report import Row, is_flexmla

# What tells that two rows are of the same case.
CASE_KEYS = (
    "suite", "name", "n_heads", "n_rope_heads", "dv", "d_pe", "dtype", "batch", "q_len", "tokens", "max_len",
    "page_size",
)  # fmt: skip


def base_source(checkout: Path) -> Path:
    """The `src` folder of a checkout.

    Raises:
        ValueError: the folder is no checkout of flexmla.
    """
    source = checkout.resolve() / "src"
    if not (source / "flexmla" / "__init__.py").is_file():
        raise ValueError(f"base must be a checkout of flexmla (with src/flexmla), got {str(checkout)!r}")
    return source


def base_rows(checkout: Path, arguments: Sequence[str], commit: str) -> list[Row]:
    """What `flexmla bench` of another checkout measures, in a process of its own, without peers.

    Args:
        checkout: a folder that holds `src/flexmla`.
        arguments: of the bench command: suites or the flags of a shape, and the device.
        commit: for its rows.

    Raises:
        ValueError: the folder is no checkout of flexmla.
        RuntimeError: its bench command failed.
    """
    source = base_source(checkout)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "flexmla", "bench", *arguments, "--no-peers", "--json", str(rows)]
        done = subprocess.run(
            [*command, "--commit", commit],
            env=environment(source, FLEXMLA_DEBUG=""),  # errors as sentences, with exit code 2
            cwd=folder,  # where no flexmla is beside the command
            capture_output=True,
            text=True,
        )
        measured = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
        # 1 is a result out of its bound, which has no row; or a crash
        if done.returncode not in (0, 1) or not measured:
            raise RuntimeError(f"bench of base {str(checkout)!r} failed: {last_words(done)}")
        return [json.loads(line) for line in measured]


def comparison(rows: Sequence[Row], base: Sequence[Row], title: str) -> Table:
    """flexmla's rows beside the base's rows of the same cases."""
    theirs = {_case(row): row for row in base}
    table = Table(title=title, title_justify="left")
    for column in ("suite", "heads/rope dv+d_pe", "batch x tokens", "name"):
        table.add_column(column)
    for column in ("base us", "us", "speed-up"):
        table.add_column(column, justify="right")
    for row in rows:
        if not is_flexmla(row["name"]):
            continue
        other = theirs.get(_case(row))
        table.add_row(
            row["suite"],
            f"{row['n_heads']}/{row['n_rope_heads']} {row['dv']}+{row['d_pe']}",
            f"{row['batch']} x {row['tokens'] / max(row['batch'], 1):.0f}"
            + (f", pages of {row['page_size']}" if row["page_size"] else "")
            + (f", q_len {row['q_len']}" if row["q_len"] > 1 else ""),
            row["name"],
            f"{other['us']:.1f}" if other else "-",
            f"{row['us']:.1f}",
            f"{other['us'] / row['us']:.2f}x" if other else "",
        )
    return table


def _case(row: Row) -> tuple[object, ...]:
    return tuple(row[key] for key in CASE_KEYS)
