"""The rule of thumb for a step's time, against what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from flexmla import DeviceRecord, MLAShape
from flexmla.expected import expected, step_bytes
from flexmla.models import model_shapes
from flexmla.tiling import tile

ROWS = Path(__file__).parents[1] / "benchmarks/results/h100.jsonl"
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
        us, _ = expected(shape, tiling, 64, 8192, torch.float16, H100)
        ratios[shape] = us / row["us"]
    assert len(ratios) > 15
    assert all(0.7 < ratio < 1.45 for ratio in ratios.values()), ratios
    assert abs(math.log(math.prod(ratios.values()))) / len(ratios) < 0.1


def test_bytes_and_fraction() -> None:
    shape = MLAShape(32, 4, 512, 16)
    assert step_bytes(shape, 2, 100, torch.float16) == 2 * (2 * 100 * (512 + 64) + 2 * 32 * (512 + 16 + 512))
    tiling = tile(shape, 64, 8192, H100.sm_count)
    assert tiling is not None
    us, fraction = expected(shape, tiling, 64, 8192, torch.float16, H100)
    assert math.isclose(fraction * us * 3130e3, step_bytes(shape, 64, 8192, torch.float16))
    faster = DeviceRecord((9, 0), 132, "twice as fast", memory_gb_s=6660)
    assert expected(shape, tiling, 64, 8192, torch.float16, faster)[0] < 0.7 * us
