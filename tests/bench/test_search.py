from __future__ import annotations

import importlib

import pytest
import torch

from flexmla import MLAShape
from flexmla.bench import search
from flexmla.bench.case import Case
from flexmla.bench.peers import flexmla_contender
from flexmla.bench.report import Measured
from flexmla.bench.run import Rig, measure_case
from flexmla.bench.search import compared, search_misses, search_table, searched
from flexmla.plan import DeviceRecord
from flexmla.tiling import tile

CASE = Case("shape", MLAShape(9, 3, 96, 8), 64, 8192)
OTHER = Case("shape", MLAShape(9, 3, 96, 8), 8, 2048)


def measured(case: Case, name: str, us: float) -> Measured:
    return Measured(case, name, us, 1000, 1000, 1e-4)


def test_the_fastest_tile_is_told_and_one_that_is_much_faster_is_a_miss():
    results = [
        measured(CASE, "flexmla", 56.0),
        measured(CASE, "flexmla-tile-few_heads-9x4-2-264", 50.0),
        measured(CASE, "flexmla-tile-few_heads-9x4-1-132", 60.0),
        measured(CASE, "torch-eager", 1.0),
        measured(OTHER, "flexmla", 7.0),
        measured(OTHER, "flexmla-tile-few_heads-9x4-2-256", 7.1),
    ]
    assert [(planned.us, best.us) for planned, best in compared(results)] == [(56.0, 50.0), (7.0, 7.0)]
    (miss,) = search_misses(results)
    assert miss == "flexmla, shape 9/3 96+8 64 x 8K: 56.0 us, but 50.0 us with few_heads-9x4-2-264"
    assert search_table(results, "shape").row_count == 2


def test_a_gain_within_the_slack_is_none():
    results = [measured(CASE, "flexmla", 54.0), measured(CASE, "flexmla-tile-few_heads-9x4-2-264", 50.0)]
    assert search_misses(results) == []


def test_every_tile_is_tried_and_the_plans_is_among_them(monkeypatch):
    pytest.importorskip("tilelang")
    record = DeviceRecord((9, 0), 132)
    monkeypatch.setattr(search, "device_record", lambda device: record)
    monkeypatch.setattr(importlib.import_module("flexmla.plan"), "device_record", lambda device: record)
    names = [contender.name for contender in searched(CASE, torch.device("cuda"))]
    assert len(names) == len(set(names)) > 5
    planned = tile(CASE.shape, CASE.batch, CASE.max_len, 132)
    assert planned is not None
    assert search.PREFIX + search.tile_name(planned) in names


def test_what_another_backend_decodes_has_no_tiles():
    assert searched(CASE, torch.device("cpu")) == []


@pytest.mark.gpu
def test_every_tile_is_right():
    pytest.importorskip("tilelang")
    device = torch.device("cuda")
    case = Case("shape", MLAShape(32, 32, 2048, 16), 2, 1000)
    outcome = measure_case(case, (flexmla_contender(case, device), *searched(case, device)), Rig.cuda(device))
    assert outcome.misses == []
    assert len(outcome.results) > 2
    assert len(compared(outcome.results)) == 1
