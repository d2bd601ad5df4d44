from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from flexmla import MLAShape, cli
from flexmla.bench.suites import SUITES

ROOT = Path(__file__).parent.parent


def run(*args: str) -> int:
    """The exit code of the program."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(args))
    return int(stop.value.code or 0)


@pytest.fixture
def calls(monkeypatch):
    """Takes the place of every command's `run`; holds the arguments it got. They say that two things are wrong."""
    got = {}
    for name in ("demo", "check", "info", "bench.run"):

        def fake(*cases, name=name, **arguments):
            got[name] = {**({"cases": cases[0]} if cases else {}), **arguments}
            return 2

        monkeypatch.setattr(import_module(f"flexmla.{name}"), "run", fake)
    return got


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("float32", torch.float32)]
)
def test_dtypes(name, dtype):
    assert cli.parse_dtype(name) == dtype


@pytest.mark.parametrize("name", ["fp8", "int32", "tensor", ""])
def test_other_dtypes_are_refused(name):
    with pytest.raises(ValueError, match=f"dtype must be fp16, bf16 or fp32, got '{name}'"):
        cli.parse_dtype(name)


def test_shapes():
    assert cli.parse_shape("32, 1,512,16") == MLAShape(32, 1, 512, 16)


@pytest.mark.parametrize("text", ["32,1,512", "32,1,512,16,0", "32,1,512,x", "32,1,512,-1", ""])
def test_other_texts_are_no_shape(text):
    with pytest.raises(ValueError, match="shape must be four integers n_heads,n_rope_heads,dv,d_pe, got "):
        cli.parse_shape(text)


@pytest.mark.parametrize("name", ["gpu!", "cuda:99"])
def test_devices_that_are_not_there_are_refused(name):
    with pytest.raises(ValueError, match=f"device must be .*got '{name}'"):
        cli.parse_device(name)


def test_the_default_device_is_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.parse_device(None) == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.parse_device(None) == torch.device("cpu")


def test_demo_passes_its_options_on(calls, tmp_path):
    json, weights = tmp_path / "a.json", tmp_path / "b.gguf"
    options = ("--rank", "96", "--d-pe", "16", "--prompt", "Why?", "--device", "cpu", "--dtype", "bf16")
    assert run("demo", *options, "--weights", str(weights), "--json", str(json)) == 0
    got = calls["demo"]
    assert (got["rank"], got["d_pe"], got["prompt"]) == (96, 16, "Why?")
    assert (got["weights"], got["json_path"]) == (weights, json)
    assert torch.device(got["device"]) == torch.device("cpu")
    assert got["dtype"] == torch.bfloat16


def test_check_passes_its_options_on_and_exits_1_on_a_miss(calls):
    assert run("check", "--seed", "7", "--device", "cpu", "--dtype", "fp16", "--backend", "torch") == 1
    got = calls["check"]
    assert (got["seed"], got["device"], got["dtype"], got["backend"]) == (
        7,
        torch.device("cpu"),
        torch.float16,
        "torch",
    )


def test_check_exits_0_without_a_miss():
    assert run("check", "--cases", "3", "--device", "cpu") == 0


def test_info_passes_its_options_on(calls):
    assert (
        run("info", "--shape", "8,1,64,16", "--dtype", "bf16", "--batch", "3", "--max-len", "100", "--device", "cpu")
        == 0
    )
    got = calls["info"]
    assert (got["shape"], got["dtype"], got["batch"], got["max_len"]) == (
        MLAShape(8, 1, 64, 16),
        torch.bfloat16,
        3,
        100,
    )


def test_info_prints_something(capsys):
    assert run("info", "--device", "cpu") == 0
    assert torch.__version__ in capsys.readouterr().out


def test_bench_measures_suites(calls, tmp_path):
    files = ("--json", str(tmp_path / "a.jsonl"), "--plot", str(tmp_path / "a.png"), "--commit", "abc")
    assert run("bench", "per-head", "llama2", "--dtype", "bf16", "--no-peers", "--device", "cpu", *files) == 1
    got = calls["bench.run"]
    assert [case.suite for case in got["cases"]] == ["per-head"] * 4 + ["llama2"] * 4
    assert {case.dtype for case in got["cases"]} == {torch.bfloat16}
    assert (got["peers"], got["commit"]) == (False, "abc")
    assert (got["json_path"], got["plot_path"]) == (tmp_path / "a.jsonl", tmp_path / "a.png")


def test_bench_measures_one_shape(calls):
    shape = ("--n-heads", "20", "--n-rope-heads", "5", "--dv", "256", "--d-pe", "32")
    assert run("bench", *shape, "--batch", "4", "--max-len", "1024", "--device", "cpu") == 1
    (case,) = calls["bench.run"]["cases"]
    assert (case.shape, case.batch, case.max_len, case.dtype) == (MLAShape(20, 5, 256, 32), 4, 1024, torch.float16)
    assert calls["bench.run"]["peers"]


def test_bench_measures_pages_several_queries_and_rows_of_their_own_length(calls):
    shape = ("--n-heads", "16", "--page-size", "16", "--q-len", "4")
    run("bench", *shape, "--lens", "131072,3x1000,0", "--device", "cpu")
    (case,) = calls["bench.run"]["cases"]
    assert (case.lens, case.page_size, case.q_len) == ((131072, 1000, 1000, 1000, 0), 16, 4)
    assert (case.batch, case.max_len) == (5, 131072)


def test_bench_measures_the_overhead_alone_or_beside_suites(calls):
    run("bench", "--overhead", "--device", "cpu")
    assert calls["bench.run"]["cases"] == []
    assert {case.suite for case in calls["bench.run"]["overhead"]} == {"overhead"}
    run("bench", "mtp", "--overhead", "--device", "cpu")
    assert {case.suite for case in calls["bench.run"]["cases"]} == {"mtp"}


def test_bench_measures_first_calls_alone_or_beside_suites(calls):
    run("bench", "--cold-start", "--dtype", "bf16", "--device", "cpu")
    assert calls["bench.run"]["cases"] == calls["bench.run"]["overhead"] == []
    assert {case.shape.n_heads for case in calls["bench.run"]["cold"]} == {32, 128}
    assert {case.dtype for case in calls["bench.run"]["cold"]} == {torch.bfloat16}
    run("bench", "mtp", "--device", "cpu")
    assert calls["bench.run"]["cold"] == []


def test_bench_asks_a_base_for_the_same_cases(calls, tmp_path):
    run("bench", "mtp", "ragged", "--dtype", "bf16", "--base", str(tmp_path), "--device", "cpu")
    assert calls["bench.run"]["base"] == tmp_path
    assert calls["bench.run"]["base_arguments"] == ["mtp", "ragged", "--dtype", "bf16", "--device", "cpu"]
    run("bench", "--n-heads", "16", "--page-size", "16", "--lens", "5,6", "--base", str(tmp_path))
    flags = ["--n-heads", "16", "--lens", "5,6", "--page-size", "16", "--dtype", "fp16"]
    assert calls["bench.run"]["base_arguments"] == flags


def test_bench_measures_llama2_by_default(calls):
    run("bench", "--device", "cpu")
    assert {case.suite for case in calls["bench.run"]["cases"]} == {"llama2"}


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("bench", "--device", "cpu"), "error: bench needs a CUDA GPU, got device 'cpu'\n"),
        (
            ("bench", "llama3"),
            f"error: suites must be among {', '.join(SUITES)}, got 'llama3'\n",
        ),
        (
            ("bench", "--page-size", "16"),
            "error: bench takes --page-size for a shape by flags, with --n-heads, got no --n-heads\n",
        ),
        (
            ("bench", "--n-heads", "8", "--lens", "5x"),
            "error: lens must be row lengths such as 131072,63x1024, got '5x'\n",
        ),
        (
            ("bench", "--n-heads", "8", "--lens", "5", "--batch", "2"),
            "error: bench takes --lens or --batch and --max-len, got --lens 5 and one of the others\n",
        ),
        (
            ("bench", "llama2", "--n-heads", "8"),
            "error: bench takes suites or a shape by flags, got ['llama2'] and --n-heads 8\n",
        ),
        (("info", "--dtype", "fp8"), "error: dtype must be fp16, bf16 or fp32, got 'fp8'\n"),
        (("info", "--shape", "8,3,64,16"), "error: n_rope_heads must divide n_heads, got 3 for n_heads 8\n"),
        (("check", "--backend", "cuda"), "error: backend must be 'auto', 'tilelang' or 'torch', got 'cuda'\n"),
    ],
)
def test_a_wrong_call_is_one_sentence(capsys, args, sentence):
    assert run(*args) == 2
    assert capsys.readouterr().err == sentence


def test_bench_without_a_gpu_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("bench") == 2
    assert capsys.readouterr().err == "error: bench needs a CUDA GPU, got device 'cpu'\n"


def test_an_error_keeps_its_traceback_for_debugging(monkeypatch):
    monkeypatch.setenv("FLEXMLA_DEBUG", "1")
    with pytest.raises(ValueError, match="dtype must be"):
        cli.main(["info", "--dtype", "fp8"])


def test_unknown_options_are_refused():
    assert run("info", "--no-such-option") == 2


def test_the_module_runs_as_a_program():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "flexmla", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("demo", "check", "info", "bench"))
