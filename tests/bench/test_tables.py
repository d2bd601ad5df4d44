"""The documentation shows what was measured."""

from __future__ import annotations

import pytest
import tables

from flexmla.bench.suites import SUITES


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pages_hold_the_figures_of_the_rows(page):
    text = page.read_text(encoding="utf-8")
    for gpu in tables.TABLES:
        assert tables.filled(text, tables.rows(gpu), gpu) == text, "run: make tables"
    assert "by benchmarks/tables.py" in text


def test_every_model_has_its_figures():
    lines = tables.models_table(tables.rows("h100")).splitlines()[2:]
    assert len(lines) == len([case for case in SUITES["models"]() if case.batch == 64])
    measured = [line for line in lines if tables.NOT_MEASURED not in line]
    assert len(measured) >= len(lines) - 3
    for line in measured:
        fraction, us = (cell.strip() for cell in line.strip("|").split("|")[-2:])
        assert float(fraction) > 0, line
        assert float(us) > 0, line


def test_tables_are_filled_between_their_marks():
    page = "a\n<!-- source of llama2, by benchmarks/tables.py -->\nold\n<!-- end of source of llama2 -->\nb"
    row = {"suite": "llama2", "name": "flexmla", "date": "2026-01-02T03:04:05", "gpu": "GPU", "read_gb_s": 3000.4}
    row |= {"n_heads": 32, "n_rope_heads": 1, "dv": 512, "d_pe": 16, "batch": 8, "max_len": 2048, "commit": "a" * 40}
    filled = tables.filled(page, [row])
    assert filled.startswith(
        "a\n<!-- source of llama2, by benchmarks/tables.py -->\n\nMeasured on 2026-01-02 on an GPU that reads 3000 GB/s"
    )
    assert filled.endswith("\n\n<!-- end of source of llama2 -->\nb")
    assert tables.filled(filled, [row]) == filled


def test_the_source_tells_what_was_measured_at_another_commit():
    row = {"suite": "llama2", "name": "flexmla", "date": "2026-01-02T03:04:05", "gpu": "GPU", "read_gb_s": 3000.4}
    row |= {"n_heads": 32, "n_rope_heads": 1, "dv": 512, "d_pe": 16, "batch": 8, "max_len": 2048, "commit": "a" * 40}
    peer = row | {"name": "torch-eager", "date": "2026-01-01T03:04:05"}
    assert "beside" not in tables.source([row, peer], "llama2", tables.BESIDE)
    older = tables.source([peer | {"commit": "b" * 40}, row], "llama2", tables.BESIDE)
    assert older.endswith(f"commit {'a' * 12}. What stands beside flexmla: on 2026-01-01, commit {'b' * 12}.")
