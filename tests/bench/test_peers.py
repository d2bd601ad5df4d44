from __future__ import annotations

from importlib import import_module

import pytest
import torch

from flexmla import MLAShape
from flexmla.bench import peers
from flexmla.bench.inputs import LatentInputs, MHAInputs
from flexmla.bench.peers import flexmla_contender, sdpa_mha, torch_eager
from flexmla.bench.suites import Case
from flexmla.check import bounds, row_errors
from flexmla.plan import DeviceRecord

CPU = torch.device("cpu")
CASES = [
    Case("shape", MLAShape(6, 1, 64, 16), 3, 300),
    Case("shape", MLAShape(6, 6, 64, 16), 3, 300),
    Case("shape", MLAShape(6, 2, 64, 0), 3, 300),
    Case("shape", MLAShape(6, 2, 64, 16), 3, 300, torch.bfloat16, score_scale=True),
    Case("shape", MLAShape(6, 2, 64, 16), 3, 300, softcap=5.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_latent_contenders_are_right(case):
    inputs = LatentInputs.random(case, CPU, torch.Generator().manual_seed(0))
    right, right_lse = inputs.expected()
    for decode in (torch_eager, flexmla_contender(case, CPU).decode):
        out, lse = decode(inputs)
        assert out.dtype == case.dtype
        assert row_errors(out, right_lse if lse is None else lse, right, right_lse).within(bounds(case.dtype))


def test_sdpa_is_right():
    case = CASES[0]
    inputs = MHAInputs.random(case, CPU, torch.Generator().manual_seed(0))
    (out, _), (right, right_lse) = sdpa_mha(inputs), inputs.expected()
    assert row_errors(out, right_lse, right, right_lse).within(bounds(case.dtype))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case("shape", MLAShape(32, 32, 512, 16), 64, 8192), "flexmla"),
        (Case("shape", MLAShape(32, 32, 512, 16), 64, 8192, score_scale=True), "flexmla-torch"),
        (Case("shape", MLAShape(16, 1, 512, 16), 64, 8192, softcap=50.0), "flexmla-torch"),
        (Case("shape", MLAShape(9, 3, 24, 8), 64, 8192), "flexmla-torch"),
    ],
    ids=str,
)
def test_the_name_says_which_backend_runs(monkeypatch, case, name):
    monkeypatch.setattr(import_module("flexmla.plan"), "tilelang_installed", lambda: True)
    hopper = DeviceRecord((9, 0), 132, "Hopper with TileLang")
    assert flexmla_contender(case, hopper).name == name
    assert flexmla_contender(case, CPU).name == "flexmla-torch"


def test_names_are_what_rows_are_told_apart_by():
    assert [peer.name for peer in peers.PEERS] == ["torch-eager", "sdpa-mha"]
