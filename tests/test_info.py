from __future__ import annotations

import io
from importlib import import_module

import pytest
import torch
from rich.console import Console

import flexmla
from flexmla import DeviceRecord, MLAShape, info
from flexmla.models import ModelShape, model_shapes

HOPPER = DeviceRecord((9, 0), 132, "Hopper with TileLang")
AMPERE = DeviceRecord((8, 0), 108, "Ampere")
LLAMA = ModelShape("Llama-2-7B", MLAShape(32, 32, 512, 16))


@pytest.fixture
def tilelang(monkeypatch):
    monkeypatch.setattr(import_module("flexmla.plan"), "tilelang_installed", lambda: True)


def shown(**options) -> str:
    console = Console(file=io.StringIO(), width=200)
    info.run(
        **{
            "shape": None,
            "dtype": torch.float16,
            "batch": 8,
            "max_len": 2048,
            "device": torch.device("cpu"),
            **options,
            "console": console,
        }
    )
    return console.file.getvalue()


def test_versions_name_what_is_missing():
    assert info.version("no-such-package-of-flexmla") == "not installed"
    assert info.versions()["torch"] == torch.__version__
    assert info.versions()["flexmla"] == flexmla.__version__


@pytest.mark.parametrize(
    ("script", "version"),
    [("echo 580.159.04", "580.159.04"), ("exit 9", "unknown"), ("true", "unknown")],
)
def test_the_driver_is_what_nvidia_smi_says(monkeypatch, tmp_path, script, version):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert info.driver_version() == version


def test_no_driver_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert info.driver_version() == "unknown"


def test_hopper_gets_tilelang_and_its_tiles(tilelang):
    backend, reason, tiling = info.backend_of(LLAMA, 64, 8192, torch.float16, HOPPER)
    assert backend == "tilelang"
    assert reason
    assert tiling is not None
    assert tiling.ints() == flexmla.plan(LLAMA.shape, 64, 8192, dtype=torch.float16, device=HOPPER).tiling


@pytest.mark.parametrize(
    ("model", "dtype", "device", "why"),
    [
        (LLAMA, torch.float16, AMPERE, "9.0"),
        (LLAMA, torch.float32, HOPPER, "float32"),
        (ModelShape("x", MLAShape(9, 3, 28, 8)), torch.float16, HOPPER, "28"),
        (ModelShape("x", MLAShape(9, 3, 24, 7), softcap=50.0), torch.float16, HOPPER, "7"),
    ],
)
def test_what_the_kernels_lack_gets_torch_and_a_reason(tilelang, model, dtype, device, why):
    backend, reason, tiling = info.backend_of(model, 64, 8192, dtype, device)
    assert backend == "torch"
    assert why in reason
    assert tiling is None


def test_a_missing_tilelang_is_the_reason(monkeypatch):
    monkeypatch.setattr(import_module("flexmla.plan"), "tilelang_installed", lambda: False)
    bare = DeviceRecord((9, 0), 132, "Hopper without TileLang")
    backend, reason, _ = info.backend_of(LLAMA, 64, 8192, torch.float16, bare)
    assert backend == "torch"
    assert "pip install 'flexmla[tilelang]'" in reason


def test_one_shape_is_shown_with_its_backend(tilelang):
    text = shown(shape=MLAShape(32, 32, 512, 16), device=HOPPER)
    assert "32,32,512,16" in text
    assert "tilelang" in text
    assert "block_n" in text
    assert "220 KiB" in text  # 2 tiles of 64 x (512 + 256), queries, probabilities, maxima and sums
    assert "expected us" in text
    assert str((512 + 32 * 16) * 2) in text


def test_every_model_is_shown_by_default():
    text = shown(device=torch.device("cpu"))
    assert all(model.name in text for model in model_shapes())
    assert "block_n" not in text
    assert torch.__version__ in text
    assert text.count("compute capability 9.0") == 1


def test_every_model_has_a_kernel_on_hopper(tilelang):
    text = shown(device=HOPPER)
    models = len(model_shapes())
    assert text.count("few_heads") + text.count("many_heads") == models
    assert "torch backend" not in text


@pytest.mark.gpu
def test_the_gpu_is_described():
    facts = info.gpu(torch.device("cuda"))
    assert facts["gpu"] == torch.cuda.get_device_name()
    assert facts["driver"] != "unknown"
