from __future__ import annotations

import io
import json
import re
import subprocess

import pytest
import torch
from rich.console import Console

from flexmla import MLAShape
from flexmla.bench import ceilings, cold, run
from flexmla.bench.case import Case
from flexmla.bench.ceilings import Ceilings
from flexmla.bench.cold import measure_cold
from flexmla.bench.inputs import LatentInputs, MHAInputs
from flexmla.bench.peers import PEERS, TORCH_BACKEND, Contender, flexmla_contender
from flexmla.bench.report import FLOOR, KEYS
from flexmla.bench.run import Rig, checkout_commit, measure_case, measure_suite
from flexmla.bench.timing import GraphTimer

CPU = torch.device("cpu")
CASE = Case("shape", MLAShape(4, 2, 64, 16), 2, 50)


class FixedTimer:
    """Calls what it is given and says that each call takes 5 us."""

    def __init__(self):
        self.n_calls, self.released = [], 0

    def prepare(self, calls):
        self.n_calls.append(len(calls))
        return [call() for call in calls]

    def us(self):
        return 5.0

    def release(self):
        self.released += 1


# the floor needs Triton; the torch backend stands in for the kernels on a CPU
PYTORCH = tuple(peer for peer in PEERS if peer.name not in (FLOOR, TORCH_BACKEND))


def rig(l2_bytes: int = 0, free_bytes: int = 10**9) -> Rig:
    return Rig(CPU, FixedTimer(), l2_bytes, lambda: free_bytes)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def broken(name: str, failure: Exception) -> Contender:
    def decode(inputs):
        raise failure

    return Contender(name, LatentInputs, decode)


def test_every_contender_is_measured_on_its_own_bytes():
    outcome = measure_case(CASE, (flexmla_contender(CASE, CPU), *PYTORCH), rig())
    assert [result.name for result in outcome.results] == ["flexmla-torch", "torch-eager", "sdpa-mha"]
    assert [result.us for result in outcome.results] == [5.0] * 3
    assert [result.n_bytes for result in outcome.results] == [CASE.n_bytes, CASE.n_bytes, MHAInputs.n_bytes(CASE)]
    assert [result.flop for result in outcome.results] == [CASE.flop, CASE.flop, MHAInputs.flop(CASE)]
    assert all(0 < result.max_row_err < 2e-3 for result in outcome.results)
    assert not outcome.misses
    assert not outcome.skipped


def test_sets_rotate_past_the_cache():
    here = rig(l2_bytes=CASE.n_bytes)
    measure_case(CASE, [flexmla_contender(CASE, CPU)], here)
    assert here.timer.n_calls == [3]
    assert here.timer.released == 1


@pytest.mark.parametrize("part", ["out", "lse", "nan"])
def test_a_wrong_result_is_a_miss_and_not_timed(part):
    right = flexmla_contender(CASE, CPU)
    calls = []

    def decode(inputs):
        out, lse = right.decode(inputs)
        calls.append(1)
        if len(calls) == 2:  # in the second of three sets only
            out[1, 0, 3] *= float("nan") if part == "nan" else 1.01 if part == "out" else 1.0
            lse = lse * 1.01 if part == "lse" else lse
        return out, lse

    outcome = measure_case(CASE, [Contender("flexmla", LatentInputs, decode)], rig(l2_bytes=CASE.n_bytes))
    assert outcome.results == []
    (miss,) = outcome.misses
    assert miss.startswith("flexmla, shape 4/2 64+16 2 x 50: row error")


def test_a_failure_of_flexmla_is_a_miss_and_the_others_go_on():
    contenders = (broken("flexmla", RuntimeError("no nvcc\nlong log")), *PYTORCH)
    outcome = measure_case(CASE, contenders, rig())
    assert outcome.misses == ["flexmla, shape 4/2 64+16 2 x 50: no nvcc"]
    assert [result.name for result in outcome.results] == ["torch-eager", "sdpa-mha"]


@pytest.mark.parametrize(
    ("name", "failure", "said"),
    [
        ("torch-eager", RuntimeError("no kernel"), "no kernel"),
        ("torch-eager", torch.OutOfMemoryError("big"), "out of memory"),
        ("flexmla-torch", torch.OutOfMemoryError("big"), "out of memory"),
    ],
)
def test_what_the_device_has_no_room_or_kernel_for_is_skipped(name, failure, said):
    here = rig()
    outcome = measure_case(CASE, [broken(name, failure)], here)
    assert outcome.skipped == [f"{name}, shape 4/2 64+16 2 x 50: {said}"]
    assert outcome.misses == []
    assert here.timer.released == 1


def test_inputs_that_do_not_fit_are_skipped():
    free = (CASE.n_bytes + MHAInputs.n_bytes(CASE)) // 2
    assert CASE.n_bytes < 0.9 * free < MHAInputs.n_bytes(CASE)
    outcome = measure_case(CASE, PYTORCH, rig(free_bytes=free))
    assert [result.name for result in outcome.results] == ["torch-eager"]
    (skipped,) = outcome.skipped
    assert skipped.startswith("sdpa-mha, shape 4/2 64+16 2 x 50: needs ")


def test_inputs_that_find_no_room_are_skipped(monkeypatch):
    def random(case, device, generator):
        raise torch.OutOfMemoryError("big")

    monkeypatch.setattr(MHAInputs, "random", random)
    outcome = measure_case(CASE, PYTORCH, rig())
    assert [result.name for result in outcome.results] == ["torch-eager"]
    assert outcome.skipped == ["sdpa-mha, shape 4/2 64+16 2 x 50: no room for the inputs"]


@pytest.mark.parametrize(("others", "names"), [(lambda case: PYTORCH, 3), (lambda case: (), 1)])
def test_a_suite_hands_on_each_case_as_it_ends(others, names):
    kept = []
    cases = [CASE, Case("shape", MLAShape(4, 1, 64, 16), 2, 50)]
    total = measure_suite(cases, rig(), others=others, console=quiet(), keep=lambda results: kept.append(list(results)))
    assert [[result.case for result in results] for results in kept] == [[case] * names for case in cases]
    assert total.results == kept[0] + kept[1]


@pytest.fixture
def gpu_that_is_a_cpu(monkeypatch):
    """Lets `run` find a device, limits and a timer without a GPU."""
    limits = Ceilings(3000.0, 2400.0, 600.0)
    monkeypatch.setattr(run.torch.cuda, "get_device_name", lambda device: "Test GPU")
    monkeypatch.setattr(Rig, "cuda", classmethod(lambda cls, device: rig()))
    monkeypatch.setattr(ceilings, "measure", lambda timer, device: limits)
    monkeypatch.setattr(run, "peers_of", lambda case: PYTORCH)
    return limits


def start(cases, console=None, **options):
    options = {"peers": True, "json_path": None, "plot_path": None, "commit": "abc", **options}
    return run.run(cases, device=torch.device("cuda"), console=console or quiet(), **options)


def test_a_run_writes_rows_tables_and_plot(gpu_that_is_a_cpu, tmp_path):
    pytest.importorskip("matplotlib")
    console = quiet()
    cases = [CASE, Case("other", MLAShape(4, 1, 64, 16), 2, 50)]
    rows, image = tmp_path / "rows.jsonl", tmp_path / "read.svg"
    assert start(cases, console, json_path=rows, plot_path=image) == 0
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(line["suite"], line["name"]) for line in lines] == [
        (suite, name) for suite in ("shape", "other") for name in ("flexmla-torch", "torch-eager", "sdpa-mha")
    ]
    assert all(list(line) == list(KEYS) and line["commit"] == "abc" and line["gpu"] == "Test GPU" for line in lines)
    assert lines[0]["read_gb_s"] == 3000.0
    text = console.file.getvalue()
    assert "streaming read 3000 GB/s, copy 2400 GB/s, fp16 matmul 600 TFLOP/s" in text
    assert "shape, Test GPU" in text
    assert "other, Test GPU" in text
    assert image.read_text().startswith("<?xml")


def test_a_base_is_measured_after_and_its_rows_are_kept(gpu_that_is_a_cpu, monkeypatch, tmp_path):
    asked = []

    def base_rows(checkout, arguments, commit):
        asked.append((checkout, arguments, commit))
        return [{**json.loads(path.read_text().splitlines()[0]), "commit": commit, "us": 1e9}]

    monkeypatch.setattr(run, "base_rows", base_rows)
    console, path = quiet(), tmp_path / "rows.jsonl"
    (tmp_path / "src" / "flexmla").mkdir(parents=True)
    (tmp_path / "src" / "flexmla" / "__init__.py").touch()
    options = {"peers": False, "json_path": path}
    start([CASE], console, base=tmp_path, base_arguments=["--x"], **options)
    assert asked == [(tmp_path, ["--x"], "base")]
    assert [json.loads(line)["commit"] for line in path.read_text().splitlines()] == ["abc", "base"]
    assert "against base" in console.file.getvalue()
    with pytest.raises(ValueError, match="base must be a checkout of flexmla"):
        start([CASE], base=tmp_path / "none", **options)
    with pytest.raises(ValueError, match="a base needs suites or a shape"):
        start([], base=tmp_path, overhead=[CASE], **options)


def test_misses_are_counted_and_printed(gpu_that_is_a_cpu, monkeypatch):
    monkeypatch.setattr(run, "flexmla_contender", lambda case, device: broken("flexmla", ValueError("wrong")))
    console = quiet()
    assert start([CASE, CASE], console, peers=False) == 2
    assert console.file.getvalue().count("MISS: flexmla, shape 4/2 64+16 2 x 50: wrong") == 2


def test_a_search_times_every_tile_instead_of_peers(gpu_that_is_a_cpu, monkeypatch):
    def decode(inputs):
        return inputs.expected()

    names = ("flexmla-tile-few_heads-4x4-3-2", "flexmla-tile-few_heads-4x4-2-2")
    monkeypatch.setattr(run, "searched", lambda case, device: [Contender(n, LatentInputs, decode) for n in names])
    monkeypatch.setattr(run, "flexmla_contender", lambda case, device: Contender("flexmla", LatentInputs, decode))
    monkeypatch.setattr(run, "search_misses", lambda results: [f"{len(results)} were compared"])
    console = quiet()
    assert start([CASE], console, search=True) == 1
    assert "fastest tile" in console.file.getvalue()
    assert "MISS: 3 were compared" in console.file.getvalue()


def test_a_search_needs_cases_and_no_base(gpu_that_is_a_cpu, tmp_path):
    with pytest.raises(ValueError, match="a search needs suites or a shape, got none"):
        start([], overhead=[CASE], search=True)
    with pytest.raises(ValueError, match="bench takes a base or a search, got both"):
        start([CASE], search=True, base=tmp_path)


def test_a_run_needs_a_cuda_device():
    with pytest.raises(ValueError, match="bench needs a CUDA GPU, got device 'cpu'"):
        run.run([CASE], device=CPU, peers=True, json_path=None, plot_path=None, commit=None, console=quiet())


def test_float32_is_refused():
    with pytest.raises(ValueError, match="bench takes float16 and bfloat16, got float32"):
        start([Case("shape", CASE.shape, 2, 50, torch.float32)])


def test_rows_need_a_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "checkout_commit", lambda package: None)
    with pytest.raises(ValueError, match=r"commit must be given \(--commit\)"):
        start([CASE], commit=None, json_path=tmp_path / "rows.jsonl")


def git(folder, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", folder, *who, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_checkout(tmp_path):
    package = tmp_path / "src" / "flexmla"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1\n")
    assert checkout_commit(package) is None
    git(tmp_path, "init", "-q")
    assert checkout_commit(package) is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "tag", "v1")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert checkout_commit(package) == head
    (package / "a.py").write_text("2\n")
    assert checkout_commit(package) == f"{head}-dirty"


def test_another_projects_commit_is_not_ours(tmp_path):
    package = tmp_path / ".venv" / "flexmla"
    package.mkdir(parents=True)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "theirs")
    assert checkout_commit(package) is None


def test_the_overhead_is_measured_on_any_device_and_has_no_rates(tmp_path):
    console, path = quiet(), tmp_path / "rows.jsonl"
    case = Case("overhead", MLAShape(4, 2, 64, 16), 2, 48, page_size=16)
    options = {"peers": True, "plot_path": None, "commit": "abc", "console": console}
    assert run.run([], device=CPU, json_path=path, overhead=[case], **options) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["flexmla-torch", "flexmla-torch-into"]
    row = rows[1]
    assert (row["suite"], row["page_size"], row["gpu"]) == ("overhead", 16, "cpu")
    assert row["us"] > 0
    assert [row[key] for key in ("gb_s", "read_gb_s", "frac_read", "tflops", "matmul_tflops", "frac_matmul")] == [
        None
    ] * 6
    assert "us on the host" in console.file.getvalue()


def test_first_calls_are_made_by_new_processes(tmp_path):
    console, path = quiet(), tmp_path / "rows.jsonl"
    case = Case("cold-start", MLAShape(4, 2, 64, 16), 2, 48)
    options = {"peers": True, "plot_path": None, "commit": "abc", "console": console}
    assert run.run([], device=CPU, json_path=path, cold=[case], **options) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["flexmla-first-call", "flexmla-first-call-cached", "tilelang-import"]
    assert all(row["us"] > 0 for row in rows[:2])
    assert 0 < rows[0]["max_row_err"] < 2e-3
    results, misses = measure_cold([case], "nowhere")
    assert results == []
    assert len(misses) == 1
    assert re.match(r"flexmla-first-call, cold-start .*: RuntimeError: .*nowhere", misses[0])


def test_a_wrong_first_call_is_a_miss_and_has_no_row(monkeypatch, tmp_path):
    wrong = "import flexmla.bench.cold as c; c.bounds = lambda dtype: c.row_errors.__globals__['Errors'](-1.0, -1.0); "
    monkeypatch.setattr(cold, "CHILD", wrong + cold.CHILD)
    console, path = quiet(), tmp_path / "rows.jsonl"
    case = Case("cold-start", MLAShape(4, 2, 64, 16), 2, 48, torch.bfloat16)
    options = {"peers": True, "plot_path": None, "commit": "abc", "console": console}
    assert run.run([], device=CPU, json_path=path, cold=[case], **options) == 1
    assert path.read_text() == ""
    assert "MISS: flexmla-first-call, cold-start" in console.file.getvalue()


def test_a_plot_needs_cases(tmp_path):
    with pytest.raises(ValueError, match="a plot needs suites or a shape, got none"):
        run.run([], device=CPU, peers=True, json_path=None, plot_path=tmp_path / "x.png", commit="a", console=quiet())


@pytest.mark.gpu
def test_a_case_on_the_gpu():
    device = torch.device("cuda")
    case = Case("shape", MLAShape(32, 1, 512, 16), 8, 2048)
    outcome = measure_case(case, (flexmla_contender(case, device), *PEERS), Rig.cuda(device))
    assert isinstance(Rig.cuda(device).timer, GraphTimer)
    assert outcome.misses == []
    assert len(outcome.results) == 1 + len(PEERS)
    assert all(1 < result.us < 10_000 for result in outcome.results)
