"""How a call is timed: CUDA-graph replay over rotated inputs, or on the host, call by call."""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import cycle, pairwise
from typing import Any, Protocol

import torch

ROTATION = 3  # a set of inputs comes round again only after this many times the L2 cache has been touched
MOST_SETS = 256  # of the smallest steps, ten thousand would fit: building and capturing them takes minutes
REPLAYS = 20  # at least
MOST_REPLAYS = 1000
TIMED_MS = 25  # replays go on for so long: a GPU that is slow for a moment is not what is measured
WARMUP_REPLAYS = 3
HOST_CALLS = 1000
BURST = 32  # calls between two synchronisations; far from where a full queue makes a launch wait

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

    def __init__(self, device: torch.device) -> None:
        self.device = device
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
            warm_ms = self._replay(self._graph, WARMUP_REPLAYS)
            replays_ms = self._replay(self._graph, replays_for(statistics.median(warm_ms)))
        return statistics.median(replays_ms) * 1e3 / self._n_calls

    @staticmethod
    def _replay(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
        """Milliseconds of each of several replays."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(marks)]

    def release(self) -> None:
        """Drops the graph and the memory of its results."""
        self._graph = None
        torch.cuda.empty_cache()


class HostTimer:
    """The host's time of an eager call under `torch.inference_mode`, until it returns: its launches are in it.

    A GPU is never more than a few calls behind. On a CPU the call's own work is in its time.

    Args:
        launching: without it the TileLang backend stops short of its launches.
    """

    def __init__(self, device: torch.device, n_calls: int = HOST_CALLS, launching: bool = True) -> None:
        self.device = device
        self.n_calls = n_calls
        self.launching = launching
        self._calls: Sequence[Call] = ()

    def prepare(self, calls: Sequence[Call]) -> list[Any]:
        """Runs every call once, which compiles, loads and caches what it needs, and returns the results."""
        if not calls:
            raise ValueError("calls must hold at least one call, got none")
        self._calls = calls
        with _on(self.device), torch.inference_mode():
            results = [call() for call in calls]
            _synchronize(self.device)
        return results

    def us(self) -> float:
        """Median over the calls, which take turns."""
        if not self._calls:
            raise RuntimeError("prepare must be called before us")
        taken_ns = []
        with _on(self.device), torch.inference_mode(), nullcontext() if self.launching else launches_left_out():
            for i, call in zip(range(self.n_calls), cycle(self._calls), strict=False):
                if i % BURST == 0:
                    _synchronize(self.device)
                start = time.perf_counter_ns()
                call()
                taken_ns.append(time.perf_counter_ns() - start)
            _synchronize(self.device)
        return statistics.median(taken_ns) / 1e3

    def release(self) -> None:
        """Drops the calls."""
        self._calls = ()


@contextmanager
def launches_left_out() -> Iterator[None]:
    """The TileLang backend does everything for a call but launch its kernel; what it returns holds nothing."""
    from flexmla import repeats

    tilelang: Any = importlib.import_module("flexmla.backends.tilelang")

    def forget() -> None:
        tilelang._compiled.cache_clear()
        repeats.forget()

    honest = tilelang.kernel
    tilelang.kernel = lambda *arguments: _launch_nothing
    forget()
    try:
        yield
    finally:
        tilelang.kernel = honest
        forget()


def _launch_nothing(*arguments: object) -> None: ...


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def replays_for(replay_ms: float) -> int:
    """Number of replays to time, where one takes about `replay_ms`."""
    return max(REPLAYS, min(MOST_REPLAYS, math.ceil(TIMED_MS / max(replay_ms, 1e-6))))


def rotated_sets(moved_bytes: int, held_bytes: int, l2_bytes: int, free_bytes: int) -> int:
    """Number of input sets that rotate: enough to exceed 3x L2, but at most MOST_SETS and half of the free memory.

    Args:
        moved_bytes: bytes that one call reads and writes.
        held_bytes: bytes of memory that one set takes.
        l2_bytes: size of the L2 cache.
        free_bytes: free device memory.
    """
    wanted = math.ceil(ROTATION * l2_bytes / moved_bytes)
    return max(1, min(wanted, MOST_SETS, int(free_bytes // (2 * held_bytes))))
