"""The rule of thumb for a step's time, against what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

from flexmla import DeviceRecord, MLAShape
from flexmla.bench.case import Case
from flexmla.bench.expected import expected
from flexmla.models import model_shapes
from flexmla.tiling import tile

ROWS = Path(__file__).parents[2] / "benchmarks/results/h100.jsonl"
H100 = DeviceRecord((9, 0), 132, "H100")


def test_long_steps_of_every_model_take_about_what_is_expected() -> None:
    scoring = {model.shape: model.scoring for model in model_shapes()}
    ratios = {}
    for line in ROWS.read_text().splitlines():
        row = json.loads(line)
        if (row["suite"], row["name"], row["batch"]) != ("models", "flexmla", 64):
            continue
        shape = MLAShape(row["n_heads"], row["n_rope_heads"], row["dv"], row["d_pe"])
        tiling = tile(shape, 64, 8192, H100.sm_count, scoring=scoring[shape])
        assert tiling is not None
        us, _ = expected(Case("x", shape, 64, 8192), tiling, H100)
        ratios[shape] = us / row["us"]
    assert len(ratios) > 15
    assert all(0.8 < ratio < 1.3 for ratio in ratios.values()), ratios
    assert abs(math.log(math.prod(ratios.values()))) / len(ratios) < 0.1


def test_bytes_and_fraction() -> None:
    shape = MLAShape(32, 4, 512, 16)
    assert Case("x", shape, 2, 100).n_bytes == 2 * (2 * 100 * (512 + 64) + 2 * 32 * (512 + 16 + 512))
    tiling = tile(shape, 64, 8192, H100.sm_count)
    assert tiling is not None
    case = Case("x", shape, 64, 8192)
    us, fraction = expected(case, tiling, H100)
    assert math.isclose(fraction * us * 3130e3, case.n_bytes)
    faster = DeviceRecord((9, 0), 132, "twice as fast", memory_gb_s=6660)
    assert expected(case, tiling, faster)[0] < 0.7 * us
