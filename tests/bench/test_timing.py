from __future__ import annotations

import time

import pytest
import torch

from flexmla.bench.timing import GraphTimer, HostTimer, launches_left_out, replays_for, rotated_sets

GB = 10**9


@pytest.mark.parametrize(
    ("moved_bytes", "held_bytes", "free_bytes", "sets"),
    [
        (17_800_000, 17_800_000, 80 * GB, 9),  # 9 sets are 160 MB, 8 are less than 3 x 52 MB
        (GB, GB, 80 * GB, 1),
        (17_800_000, 17_800_000, 100_000_000, 2),
        (17_800_000, 10 * GB, 80 * GB, 4),  # the cache has room for more than is visible
        (30 * GB, 30 * GB, 40 * GB, 1),
        (15_000, 15_000, 80 * GB, 256),  # not the ten thousand that would exceed L2
    ],
)
def test_rotated_sets(moved_bytes, held_bytes, free_bytes, sets):
    assert rotated_sets(moved_bytes, held_bytes, 50 * 2**20, free_bytes) == sets


@pytest.mark.parametrize(("replay_ms", "replays"), [(0.0, 1000), (0.01, 1000), (0.2, 125), (5.0, 20), (1000.0, 20)])
def test_short_replays_are_timed_more_often(replay_ms, replays):
    assert replays_for(replay_ms) == replays


@pytest.mark.parametrize("timer", [GraphTimer(torch.device("cuda")), HostTimer(torch.device("cpu"))])
def test_timing_needs_prepared_calls(timer):
    with pytest.raises(RuntimeError, match="prepare must be called before us"):
        timer.us()
    with pytest.raises(ValueError, match="at least one call, got none"):
        timer.prepare([])


def test_the_host_timer_runs_calls_in_turn_and_takes_their_median():
    ran = []

    def call(name, seconds):
        ran.append((name, torch.is_inference_mode_enabled()))
        time.sleep(seconds)
        return name

    timer = HostTimer(torch.device("cpu"), n_calls=5)
    assert timer.prepare([lambda: call("a", 0.002), lambda: call("b", 0)]) == ["a", "b"]
    assert 2000 <= timer.us() < 200_000  # three of the five calls are the slower one
    assert ran == [(name, True) for name in "ababaab"[:2] + "ababa"]
    timer.release()
    with pytest.raises(RuntimeError, match="prepare must be called before us"):
        timer.us()


def test_launches_left_out_come_back():
    tilelang = pytest.importorskip("flexmla.backends.tilelang")
    honest = tilelang.kernel
    with launches_left_out():
        assert tilelang.kernel("a shape", "a tile")("a tensor") is None
    assert tilelang.kernel is honest


@pytest.mark.gpu
def test_a_replay_computes_what_the_calls_do_and_takes_their_time():
    device = torch.device("cuda")
    timer = GraphTimer(device)
    small = [torch.randn(1 << 20, device=device) for _ in range(3)]
    results = timer.prepare([lambda x=x: x * 2 for x in small])
    for x, result in zip(small, results, strict=True):
        torch.testing.assert_close(result, x * 2)
    small_us = timer.us()
    large = torch.randn(1 << 28, device=device)
    timer.prepare([lambda: large * 2])
    assert timer.us() > 20 * small_us > 0
    timer.release()
