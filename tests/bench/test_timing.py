from __future__ import annotations

import pytest
import torch

from flexmla.bench.timing import GraphTimer, rotated_sets

GB = 10**9


@pytest.mark.parametrize(
    ("set_bytes", "l2_bytes", "free_bytes", "sets"),
    [
        (17_800_000, 50 * 2**20, 80 * GB, 9),  # 9 sets are 160 MB, 8 are less than 3 x 52 MB
        (GB, 50 * 2**20, 80 * GB, 1),
        (17_800_000, 50 * 2**20, 100_000_000, 2),
        (30 * GB, 50 * 2**20, 40 * GB, 1),
    ],
)
def test_rotated_sets(set_bytes, l2_bytes, free_bytes, sets):
    assert rotated_sets(set_bytes, l2_bytes, free_bytes) == sets


def test_timing_needs_prepared_calls():
    timer = GraphTimer(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="prepare must be called before us"):
        timer.us()
    with pytest.raises(ValueError, match="at least one call, got none"):
        timer.prepare([])


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
