"""How a call is timed: CUDA-graph replay over rotated inputs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

ROTATION = 3  # a set of inputs comes round again only after this many times the L2 cache has been touched
REPLAYS = 20
WARMUP_REPLAYS = 3

Call = Callable[[], Any]


class Timer(Protocol):
    """Runs calls the way they will be timed, then times them."""

    def prepare(self, calls: Sequence[Call]) -> list[Any]:
        """Runs every call once, as `us` will, and returns the results in order."""

    def us(self) -> float:
        """Microseconds a call of the prepared ones."""

    def release(self) -> None:
        """Gives back what `prepare` holds."""


class GraphTimer:
    """One CUDA graph that holds every call once, replayed; the median replay over the number of calls."""

    def __init__(self, device: torch.device, replays: int = REPLAYS) -> None:
        self.device = device
        self.replays = replays
        self._graph: torch.cuda.CUDAGraph | None = None
        self._n_calls = 0

    def prepare(self, calls: Sequence[Call]) -> list[Any]:
        """Compiles and captures `calls`, replays the graph once and returns the results that this replay wrote."""
        if not calls:
            raise ValueError("calls must hold at least one call, got none")
        with torch.cuda.device(self.device):
            # What compiles, loads or tunes at its first run must do so before the capture, on a stream of its own.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                calls[0]()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                results = [call() for call in calls]
            self._n_calls = len(calls)
            self._graph.replay()
            torch.cuda.synchronize()
        return results

    def us(self) -> float:
        """Median over the replays; they follow each other without a gap on the host's side."""
        if self._graph is None:
            raise RuntimeError("prepare must be called before us")
        with torch.cuda.device(self.device):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.replays + 1)]
            for _ in range(WARMUP_REPLAYS):
                self._graph.replay()
            marks[0].record()
            for mark in marks[1:]:
                self._graph.replay()
                mark.record()
            torch.cuda.synchronize()
        replays_ms = [start.elapsed_time(end) for start, end in pairwise(marks)]
        return statistics.median(replays_ms) * 1e3 / self._n_calls

    def release(self) -> None:
        """Drops the graph and the memory of its results."""
        self._graph = None
        torch.cuda.empty_cache()


def rotated_sets(set_bytes: int, l2_bytes: int, free_bytes: int) -> int:
    """Number of input sets that rotate: enough to exceed 3x L2, but at most half of the free memory, at least one.

    Args:
        set_bytes: bytes that one call reads and writes.
        l2_bytes: size of the L2 cache.
        free_bytes: free device memory.
    """
    wanted = math.ceil(ROTATION * l2_bytes / set_bytes)
    return max(1, min(wanted, int(free_bytes // (2 * set_bytes))))
