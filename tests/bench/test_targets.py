"""Targets beside the rows."""

from __future__ import annotations

import pytest
import tables
import targets

from flexmla.bench.suites import PER_HEAD, SHARED

ROW = {"name": "flexmla", "q_len": 1, "batch": 64, "max_len": 8192, "page_size": 0, "commit": "c", "date": "d"}


def row(shape, suite, us, **entries):
    return ROW | targets.layer(shape) | {"suite": suite, "us": us, "frac_read": 100 / us} | entries


@pytest.mark.parametrize("gpu", list(targets.TARGETS))
def test_every_target_is_a_line_of_the_table(gpu):
    lines = targets.targets_table(tables.rows(gpu), gpu).splitlines()[2:]
    assert len(lines) == len(targets.TARGETS[gpu])
    assert len({line.split("|")[1] for line in lines}) == len(lines)
    assert not any(" | reached |" in line for line in targets.targets_table([], gpu).splitlines())


def test_the_latest_row_counts_and_the_worst_of_several():
    rows = [row(SHARED, "s", 200), row(SHARED, "s", 125), row(PER_HEAD, "s", 160), row(SHARED, "other", 500)]
    fraction = targets.Target("", 0.7, "of read", targets.of("s", "frac_read", SHARED, PER_HEAD))
    time = targets.Target("", 150, "us", targets.of("s", "us", SHARED, PER_HEAD))
    assert (fraction.worst(rows), time.worst(rows)) == (100 / 160, 160)
    assert fraction.worst(rows[-1:]) is None
    assert not fraction.reached(100 / 160)
    assert fraction.reached(0.7)
    assert not time.reached(160)
    assert time.reached(150)


def test_pages_are_compared_with_pages_of_64():
    rows = [row(SHARED, "paged", us, page_size=page) for page, us in ((1, 130), (16, 110), (64, 100), (128, 500))]
    assert list(targets.pages(SHARED)(rows)) == [1.3, 1.1]
    assert list(targets.pages(PER_HEAD)(rows)) == []


def test_gains_are_those_of_the_last_search():
    tile, models = targets.PREFIX + "few_heads-16x3-1-66", (SHARED, "models")
    searched = [row(*models, 120), row(*models, 100, name=tile), row(*models, 150, name=tile)]
    old = [row(*models, 300, commit="b"), row(*models, 100, name=tile, commit="b")]
    later = [row(*models, 200, commit="e")]
    assert list(targets.gains(64)(old + searched + later)) == [pytest.approx(20)]
    assert list(targets.gains(8)(searched)) == []


def test_the_first_calls_of_all_shapes_count():
    cold, name = "cold-start", "flexmla-first-call"
    rows = [row(shape, cold, us, name=name) for shape, us in ((SHARED, 9e6), (SHARED, 2e6), (PER_HEAD, 3e6))]
    assert sorted(targets.first_calls(name)([*rows, row(SHARED, "s", 1)])) == [2, 3]


def test_figures_have_their_units():
    assert [targets.shown(*what) for what in ((0.95, "of read"), (9, "us"), (1.154, "times"), (189.5, "us"))] == [
        ".95 of read",
        "9 us",
        "1.15 times",
        "190 us",
    ]
