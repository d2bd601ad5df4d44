from __future__ import annotations

import json
import sys
from datetime import datetime, timedelta

import pytest
import torch
from rich.console import Console

from flexmla import MLAShape
from flexmla.bench import report
from flexmla.bench.ceilings import Ceilings
from flexmla.bench.report import KEYS, Machine, Measured, append_rows, plot, row, speed_up, table
from flexmla.bench.suites import Case

MACHINE = Machine("GPU", "580.1", "2.13.0", "0.1.15", "0.1.0", "abc")
LIMITS = Ceilings(read_gb_s=3000.0, copy_gb_s=2400.0, matmul_tflops=600.0)
CASE = Case("llama2", MLAShape(32, 1, 512, 16), 64, 8192, label="Llama")


def measured(name: str = "flexmla", us: float = 200.0, case: Case = CASE) -> Measured:
    return Measured(case, name, us, case.n_bytes, case.flop, 3.2149e-4)


def test_a_row_has_the_fixed_keys_in_order():
    fixed = (
        "gpu driver torch tilelang flexmla commit date suite name n_heads n_rope_heads dv d_pe dtype kv_dtype batch "
        "q_len tokens max_len page_size us bytes gb_s read_gb_s frac_read tflops matmul_tflops frac_matmul max_row_err"
    )
    assert list(row(measured(), MACHINE, LIMITS)) == list(KEYS) == fixed.split()


def test_a_row_says_what_was_measured():
    line = row(measured(), MACHINE, LIMITS)
    assert line["bytes"] == CASE.n_bytes
    assert line["gb_s"] == pytest.approx(557.9e6 / 200e-6 / 1e9, rel=1e-3)
    assert line["frac_read"] == pytest.approx(line["gb_s"] / 3000, rel=1e-3)
    assert line["tflops"] == pytest.approx(2 * 32 * 64 * 8192 * (512 + 16 + 512) / 200e-6 / 1e12, rel=1e-3)
    assert line["frac_matmul"] == pytest.approx(line["tflops"] / 600, rel=1e-2)
    assert (line["n_heads"], line["n_rope_heads"], line["dv"], line["d_pe"]) == (32, 1, 512, 16)
    assert (line["batch"], line["q_len"], line["tokens"], line["max_len"], line["page_size"]) == (
        64,
        1,
        524288,
        8192,
        0,
    )
    assert (line["dtype"], line["kv_dtype"], line["max_row_err"]) == ("float16", "float16", 3.21e-4)
    assert (line["gpu"], line["driver"], line["commit"], line["name"]) == ("GPU", "580.1", "abc", "flexmla")


def test_the_date_has_seconds_and_a_zone():
    date = datetime.fromisoformat(row(measured(), MACHINE, LIMITS)["date"])
    assert date.utcoffset() == timedelta(0)
    assert date.microsecond == 0


def test_rows_are_appended_as_json_lines(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    first, second = row(measured(), MACHINE, LIMITS), row(measured("torch-eager"), MACHINE, LIMITS)
    append_rows(file, [first])
    append_rows(file, [second])
    assert [json.loads(line) for line in file.read_text().splitlines()] == [first, second]


def test_speed_up_is_over_the_fastest_peer():
    results = [measured(us=200.0), measured("torch-eager", 900.0), measured("sdpa-mha", 600.0)]
    assert [speed_up(result, results) for result in results] == [3.0, None, None]
    assert speed_up(results[0], results[:1]) is None
    assert speed_up(measured("flexmla-torch", 1200.0), results[1:]) == 0.5
    assert speed_up(results[0], [*results, measured("read", 1.0)]) == 3.0  # no peer


def test_the_table_shows_each_result(capsys):
    other = Case("llama2", MLAShape(32, 1, 512, 16), 8, 2048, torch.bfloat16)
    results = [measured(), measured("torch-eager", 800.0), measured(case=other, us=10.0)]
    Console(width=200).print(table(results, LIMITS, "llama2, GPU"))
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if "flexmla" in line or "torch-eager" in line]
    assert len(lines) == 3
    assert "32/1 512+16  Llama" in lines[0]
    assert "64 x 8K" in lines[0]
    assert "4.00x" in lines[0]
    assert "0.930" in lines[0]
    assert "x" not in lines[1].replace("torch-eager", "")
    assert "8 x 2K" in lines[2]


def test_the_plot_draws_every_series_and_the_limit(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    figure = report.figure_class()
    monkeypatch.setattr(
        report, "figure_class", lambda: lambda **options: figures.append(figure(**options)) or figures[-1]
    )
    small = Case("llama2", MLAShape(32, 1, 512, 16), 8, 2048)
    results = [measured(), measured(case=small, us=9.0), measured("torch-eager", 800.0)]
    file = tmp_path / "plots" / "read.png"
    plot([row(result, MACHINE, LIMITS) for result in results], file)
    assert file.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    series = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines() if "," in line.get_label()}
    assert series == {
        "flexmla, llama2": [small.n_bytes / 1e6, CASE.n_bytes / 1e6],
        "torch-eager, llama2": [CASE.n_bytes / 1e6],
    }
    assert any(list(line.get_ydata()) == [1.0, 1.0] for line in axes.get_lines())
    assert "3000 GB/s" in axes.texts[0].get_text()


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(ValueError, match="at least one measured row"):
        plot([], tmp_path / "read.png")


def test_a_missing_matplotlib_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'flexmla\[bench\]'"):
        report.figure_class()
