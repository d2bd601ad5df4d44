"""Comparison with another checkout, which here is a program that writes what it is told to."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from flexmla.bench.base import base_rows, comparison

PROGRAM = """
import json, sys
arguments = sys.argv[1:]
options = {name: arguments[arguments.index(name) + 1] for name in ("--json", "--commit")}
with open(options["--json"], "a") as file:
    file.write(json.dumps({"commit": options["--commit"], "arguments": arguments}) + "\\n")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "other" / "src" / "flexmla"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PROGRAM)
    return tmp_path / "other"


def row(**changes):
    case = {"suite": "llama2", "name": "flexmla", "n_heads": 32, "n_rope_heads": 1, "dv": 512, "d_pe": 16}
    size = {"dtype": "fp16", "batch": 8, "q_len": 1, "tokens": 16384, "max_len": 2048, "page_size": 0, "us": 20.0}
    return {**case, **size, **changes}


def test_the_other_checkouts_code_is_what_runs(checkout):
    (got,) = base_rows(checkout, ["llama2", "--dtype", "bf16"], "abc")
    assert got["commit"] == "abc"
    assert got["arguments"][:4] == ["bench", "llama2", "--dtype", "bf16"]
    assert "--no-peers" in got["arguments"]


def test_rows_survive_a_miss_and_failures_are_told(checkout):
    program = checkout / "src" / "flexmla" / "__main__.py"
    program.write_text(PROGRAM + "sys.exit(1)")
    assert len(base_rows(checkout, [], "abc")) == 1
    program.write_text("raise ImportError('no TileLang here')")  # exit code 1, as for a miss
    with pytest.raises(RuntimeError, match="failed: ImportError: no TileLang here"):
        base_rows(checkout, [], "abc")
    program.write_text("import sys; print('error: no such suite', file=sys.stderr); sys.exit(2)")
    with pytest.raises(RuntimeError, match=r"bench of base .*other' failed: error: no such suite"):
        base_rows(checkout, [], "abc")


def test_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(ValueError, match=r"base must be a checkout of flexmla \(with src/flexmla\), got "):
        base_rows(tmp_path, [], "abc")


def test_rows_of_the_same_case_stand_side_by_side():
    console = Console(file=io.StringIO(), width=150)
    ours = [row(us=10.0), row(batch=64, tokens=131072), row(name="sdpa"), row(page_size=64, us=15.0)]
    console.print(comparison(ours, [row(us=20.0), row(page_size=64, us=12.0), row(n_heads=16)], "against abc"))
    lines = [line for line in console.file.getvalue().splitlines() if "flexmla" in line]
    figures = [[cell.strip() for cell in line.strip("│").split("│")[-3:]] for line in lines]
    assert figures == [["20.0", "10.0", "2.00x"], ["-", "20.0", ""], ["12.0", "15.0", "0.80x"]]
    assert "8 x 2048, pages of 64" in lines[2]
    assert "sdpa" not in console.file.getvalue()
