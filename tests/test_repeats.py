"""Calls of one signature are looked at once, and again as soon as anything differs. On CPU, with a stand-in launch."""

from __future__ import annotations

import pytest
import torch

import flexmla
from flexmla import MLAShape, mla_decode, ops, repeats

SHAPE = MLAShape(4, 2, 64, 16)
LAUNCHED = torch.zeros(1), torch.zeros(1)


class Calls:
    """Counts how calls were run."""

    def __init__(self):
        self.launched = self.looked_at = 0

    def launcher(self, *arguments):
        self.looked_at += 1
        return self.launch

    def launch(self, *tensors):
        self.launched += 1
        return LAUNCHED


@pytest.fixture
def calls(monkeypatch):
    """Makes a CPU call as eligible as one on a GPU."""
    counted = Calls()
    repeats.forget()
    monkeypatch.setattr(repeats, "_is_eligible", lambda q_nope: True)
    monkeypatch.setattr(repeats, "_has_several_gpus", lambda: False)
    monkeypatch.setattr(ops, "launcher", counted.launcher)
    with torch.inference_mode():
        yield counted
    repeats.forget()


def arguments(max_len=32, dtype=torch.float16):
    tensors = {
        "q_nope": torch.zeros(2, 1, 4, 64),
        "q_pe": torch.zeros(2, 1, 4, 16),
        "ckv_cache": torch.zeros(2, max_len, 64),
        "kpe_cache": torch.zeros(2, max_len, 2, 16),
    }
    lens = torch.full((2,), 7, dtype=torch.int32)
    return {name: x.to(dtype) for name, x in tensors.items()} | {"seq_lens": lens}


def test_the_second_call_of_a_signature_skips_the_checks(calls):
    mla_decode(**arguments())
    assert (calls.looked_at, calls.launched) == (1, 0)
    assert mla_decode(**arguments()) is LAUNCHED  # of other tensors
    assert (calls.looked_at, calls.launched) == (1, 1)


def test_whatever_differs_is_looked_at(calls):
    base = arguments()
    plan = flexmla.plan(SHAPE, 2, 32, dtype=torch.float16, device="cpu")
    shifted = torch.zeros(2 * 32 * 64 + 1, dtype=torch.float16)[1:].view(2, 32, 64)
    changes = [
        {},
        arguments(max_len=33),
        arguments(dtype=torch.bfloat16),
        {"ckv_cache": torch.zeros(2, 32, 80, dtype=torch.float16)[..., :64]},
        {"ckv_cache": shifted},
        {"seq_lens": None},
        {"starts": torch.zeros(2, dtype=torch.int32)},
        {"softmax_scale": 0.1},
        {"causal": False},
        {"backend": "torch"},
        {"plan": plan},
        {"out": torch.zeros(2, 1, 4, 64, dtype=torch.float16)},
        {"lse": torch.zeros(2, 4, 1)},
        {"softcap": 5.0},
        {"v_cache": torch.zeros(2, 32, 64, dtype=torch.float16)},
        {"v_cache": torch.zeros(2, 32, 48, dtype=torch.float16)},
        {"score_scale": torch.ones(2, 32, 2)},
        {"score_scale": torch.ones(2, 32, 2, dtype=torch.float16)},
    ]
    for change in changes:
        mla_decode(**{**base, **change})
    assert (calls.looked_at, calls.launched) == (len(changes), 0)
    for repeats_of_all in (1, 2, 3):
        for change in changes:
            mla_decode(**{**base, **change})
        assert (calls.looked_at, calls.launched) == (len(changes), repeats_of_all * len(changes))


@pytest.mark.parametrize("unlike", [
    arguments(max_len=33),
    arguments(dtype=torch.bfloat16),
    {"ckv_cache": torch.zeros(2, 32, 80, dtype=torch.float16)[..., :64]},
    {"ckv_cache": torch.zeros(2 * 32 * 64 + 1, dtype=torch.float16)[1:].view(2, 32, 64)},
    {"seq_lens": None, "starts": torch.full((2,), 7, dtype=torch.int32)},
])  # fmt: skip
def test_a_call_like_the_last_is_not_looked_up(calls, unlike):
    base = arguments()
    for _ in range(2):
        mla_decode(**base)
    repeats._launchers.clear()
    mla_decode(**arguments())
    assert (calls.looked_at, calls.launched) == (1, 2)
    mla_decode(**{**base, **unlike})
    assert (calls.looked_at, calls.launched) == (2, 2)


def test_what_is_refused_stays_refused(calls):
    base = arguments()
    mla_decode(**base)
    for change, error in (
        ({"q_nope": base["q_nope"].float()}, TypeError),
        ({"q_nope": None}, TypeError),
        ({"ckv_cache": [1]}, TypeError),
        ({"kpe_cache": base["kpe_cache"].to_sparse()}, (TypeError, ValueError, RuntimeError)),
        ({"seq_lens": base["seq_lens"].long()}, TypeError),
        ({"seq_lens": base["seq_lens"][:1]}, ValueError),
        ({"causal": 1}, TypeError),
        ({"softmax_scale": [0.1]}, TypeError),
        ({"backend": "cuda"}, ValueError),
        ({"plan": "fast"}, TypeError),
    ):
        for _ in range(2):
            with pytest.raises(error):
                mla_decode(**{**base, **change})
    assert (calls.looked_at, calls.launched) == (1, 0)


def test_plans_are_told_apart_by_object_as_long_as_they_are_kept(calls):
    base = arguments()
    for _ in range(20):  # each could get the id of the one before
        mla_decode(**base, plan=flexmla.plan(SHAPE, 2, 32, dtype=torch.float16, device="cpu"))
        with pytest.raises(ValueError, match="plan takes max_len up to 8"):
            mla_decode(**base, plan=flexmla.plan(SHAPE, 2, 8, dtype=torch.float16, device="cpu"))


def test_a_call_without_a_launch_goes_through_the_operator(calls, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "launcher", lambda *arguments: asked.append(arguments))
    for _ in range(3):
        out, _ = mla_decode(**arguments())
        assert out.shape == (2, 1, 4, 64)
    assert len(asked) == 1


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), func]
        return func(*args, **(kwargs or {}))


def test_modes_profilers_and_grad_mode_see_the_operator(calls):
    mla_decode(**arguments())
    with Watching() as mode:
        mla_decode(**arguments())
    assert ops.mla_decode in mode.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        mla_decode(**arguments())
    assert "flexmla::mla_decode" in {event.key for event in profiler.key_averages()}
    with torch.inference_mode(False), torch.enable_grad():
        mla_decode(**arguments())
    assert calls.launched == 0


def test_compiled_calls_see_the_operator(calls):
    torch._dynamo.reset()
    mla_decode(**arguments())
    torch.compile(mla_decode, fullgraph=True, backend="eager")(**arguments())
    assert (calls.looked_at, calls.launched) == (1, 0)


def test_signatures_are_bounded(calls, monkeypatch):
    monkeypatch.setattr(repeats, "MOST", 3)
    for max_len in range(8, 20):
        mla_decode(**arguments(max_len))
        assert len(repeats._launchers) <= 3


def test_calls_on_a_cpu_have_no_signature():
    with torch.inference_mode():
        assert repeats.find(tuple(arguments().values()), (), None) == (None, None)
