"""Which backend a call gets, on devices that need not be there."""

from __future__ import annotations

import warnings
from importlib import import_module

import pytest
import torch

from flexmla.backends import choice
from flexmla.plan import DeviceRecord
from flexmla.shape import PLAIN, Scoring

GPU = torch.device("cuda", 0)


def call(**changes):
    sizes = {"n_heads": 16, "n_rope_heads": 1, "dv": 512, "d_pe": 64, "v_width": None, "batch": 4, "max_len": 2048}
    options = {"q_len": 1, "page_size": None, "scoring": PLAIN}
    return choice.Call(**{"device": GPU, "dtype": torch.float16, **sizes, **options, **changes})


@pytest.fixture
def machine(monkeypatch):
    """Sets what the GPU is and whether TileLang is installed."""

    def become(capability=(9, 0), installed=True):
        choice._settle.cache_clear()
        monkeypatch.setattr(choice, "_warned", False)
        monkeypatch.setattr(choice, "device_record", lambda device: DeviceRecord(capability, 132))
        monkeypatch.setattr(choice, "tilelang_installed", lambda: installed)
        # By module, as flexmla.plan is the function.
        monkeypatch.setattr(import_module("flexmla.plan"), "tilelang_installed", lambda: installed)

    yield become
    choice._settle.cache_clear()


@pytest.fixture(autouse=True)
def _no_other_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_auto_takes_tilelang_where_it_can(machine):
    machine()
    name, tiling = choice.choose("auto", (), call())
    assert name == "tilelang"
    assert len(tiling) > 0
    assert choice.choose("tilelang", (), call()) == (name, tiling)


def test_a_given_tiling_is_kept(machine):
    machine()
    given = (0, 16, 64, 2, 1, 1, 7, 0, 0)
    assert choice.choose("auto", given, call()) == ("tilelang", given)


def test_a_given_tiling_that_knows_no_options_is_not_taken_for_them(machine):
    """A `flexmla.plan` does not say whether score_scale, which takes shared memory, will come."""
    machine()
    given = (0, 16, 64, 2, 1, 1, 7, 0, 0)
    for scoring in (Scoring(True), Scoring(False, 16, torch.float32)):
        name, tiling = choice.choose("auto", given, call(scoring=scoring))
        assert name == "tilelang"
        assert tiling == choice.choose("auto", (), call(scoring=scoring))[1] != given


@pytest.mark.parametrize("where", [{"capability": (8, 0)}, {"capability": (10, 0)}, {"installed": False}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_auto_takes_torch_in_silence_where_tilelang_is_no_option(machine, where, dtype):
    machine(**where)
    assert choice.choose("auto", (), call(dtype=dtype)) == ("torch", ())


def test_auto_takes_torch_on_a_cpu_and_named_torch_anywhere(machine):
    machine()
    assert choice.choose("auto", (), call(device=torch.device("cpu"))) == ("torch", ())
    assert choice.choose("torch", (), call()) == ("torch", ())


def test_auto_warns_once_where_tilelang_lacks_the_combination(machine):
    machine()
    with pytest.warns(UserWarning, match="torch backend for this call, as TileLang cannot run it: .*float32"):
        assert choice.choose("auto", (), call(dtype=torch.float32)) == ("torch", ())
    assert choice.choose("auto", (), call(dtype=torch.float32)) == ("torch", ())
    assert choice.choose("auto", (), call(dv=44)) == ("torch", ())


def test_named_tilelang_says_what_it_lacks(machine):
    machine()
    with pytest.raises(
        NotImplementedError, match=r"backend 'tilelang' cannot run this call: .*float32; backend='torch'"
    ):
        choice.choose("tilelang", (), call(dtype=torch.float32))
    machine(capability=(8, 0))
    with pytest.raises(NotImplementedError, match=r"capability 9\.0, this device has 8\.0; backend='torch' takes it"):
        choice.choose("tilelang", (), call())


def test_named_tilelang_that_is_not_installed(machine):
    machine(installed=False)
    with pytest.raises(ImportError, match=r"pip install 'flexmla\[tilelang\]'"):
        choice.choose("tilelang", (), call())
