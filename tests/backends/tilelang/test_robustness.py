"""The TileLang backend as engines use it: replayed graphs, threads, processes, huge caches."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import flexmla
from flexmla import MLAShape, ops, reference
from flexmla.cases import GARBAGE_PAGES
from flexmla.check import bounds, row_errors

from .hopper import ON_HOPPER

pytestmark = ON_HOPPER

NAN = float("nan")
ROOT = Path(__file__).parents[3]
COMPILES_AND_DECODES = """
import torch, flexmla
from flexmla.check import bounds, row_errors
generator = torch.Generator("cuda").manual_seed(0)
q, ckv = (torch.randn(*size, generator=generator, device="cuda").half() for size in ((2, 1, 8, 64), (2, 100, 64)))
result = flexmla.mla_decode(q, None, ckv, None, backend="tilelang")
assert row_errors(*result, *flexmla.reference.mla_decode(q, None, ckv, None)).within(bounds(torch.float16))
"""


class Engine:
    """A batch over a cache whose contents, lengths and places change; what is not visible is NaN."""

    def __init__(self, shape: MLAShape, page_size: int, q_len: int, batch: int = 5, max_len: int = 512) -> None:
        self.rng, self.noise = random.Random(0), torch.Generator("cuda").manual_seed(0)
        self.shape, self.page_size, self.max_len = shape, page_size, max_len
        self.slot_len = page_size or max_len
        self.slots = batch * (max_len // page_size) + 3 if page_size else batch
        self.cache = self.randn(self.slots, self.slot_len, shape.dv + shape.n_rope_heads * shape.d_pe)
        self.lens = torch.zeros(batch, dtype=torch.int32, device="cuda")
        self.starts = torch.zeros_like(self.lens)
        self.table = torch.zeros(batch, max_len // self.slot_len, dtype=torch.int32, device="cuda")
        self.q_nope = self.randn(batch, q_len, shape.n_heads, shape.dv)
        self.q_pe = self.randn(batch, q_len, shape.n_heads, shape.d_pe)
        self.change()

    def randn(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=self.noise, device="cuda").half()

    def change(self) -> None:
        """New lengths, starts, pages and contents in the same memory."""
        rng, (batch, columns) = self.rng, self.table.shape
        lens = [rng.choice((0, 1, self.max_len, rng.randint(0, self.max_len))) for _ in range(batch)]
        starts = [rng.choice((0, 0, rng.randint(0, n))) for n in lens]
        pages = rng.sample(range(self.slots), batch * columns) if self.page_size else list(range(batch))
        fresh = self.randn(*self.cache.shape)
        self.cache.fill_(NAN)
        table = []
        for b in range(batch):
            mine = pages[b * columns : (b + 1) * columns]
            t = torch.arange(starts[b], lens[b])
            places = torch.tensor(mine)[t // self.slot_len].cuda(), (t % self.slot_len).cuda()
            self.cache[places] = fresh[places]
            used = -(-lens[b] // self.slot_len)
            table.append([page if c < used else rng.choice(GARBAGE_PAGES) for c, page in enumerate(mine)])
        self.lens.copy_(torch.tensor(lens))
        self.starts.copy_(torch.tensor(starts))
        self.table.copy_(torch.tensor(table))
        self.q_nope.copy_(self.randn(*self.q_nope.shape))

    @property
    def call(self) -> dict[str, Any]:
        ckv, kpe = self.cache[..., : self.shape.dv], self.cache[..., self.shape.dv :]
        return {
            "q_nope": self.q_nope,
            "q_pe": self.q_pe,
            "ckv_cache": ckv,
            "kpe_cache": kpe.unflatten(-1, (self.shape.n_rope_heads, self.shape.d_pe)),
            "seq_lens": self.lens,
            "starts": self.starts,
            "block_table": self.table if self.page_size else None,
        }

    def is_right(self, out: torch.Tensor, lse: torch.Tensor) -> bool:
        return row_errors(out, lse, *reference.mla_decode(**self.call)).within(bounds(torch.float16))


@pytest.mark.parametrize(
    ("shape", "page_size", "q_len"),
    [
        (MLAShape(16, 1, 512, 64), 64, 2),
        (MLAShape(16, 1, 512, 64), 16, 1),
        (MLAShape(32, 32, 512, 16), 8, 1),
        (MLAShape(16, 1, 512, 64), 1, 1),
        (MLAShape(32, 32, 512, 16), 0, 1),
        (MLAShape(64, 1, 512, 64), 0, 1),
        (MLAShape(128, 1, 512, 64), 64, 1),
    ],
    ids=str,
)
def test_a_graph_follows_fifty_changes(shape: MLAShape, page_size: int, q_len: int) -> None:
    engine = Engine(shape, page_size, q_len)
    out, lse = flexmla.mla_decode(**engine.call, backend="tilelang")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flexmla.mla_decode(**engine.call, out=out, lse=lse, backend="tilelang")
    for _ in range(50):
        engine.change()
        out.fill_(NAN)
        lse.fill_(NAN)
        graph.replay()
        assert engine.is_right(out, lse)


def test_eight_threads_on_eight_streams() -> None:
    shapes = [MLAShape(16, 1, 512, 64), MLAShape(32, 32, 512, 16), MLAShape(128, 1, 512, 64), MLAShape(32, 1, 512, 16)]
    engines = [Engine(shape, page_size, 1) for shape in shapes for page_size in (0, 64)]
    together, wrong = threading.Barrier(len(engines)), []

    def work(engine: Engine) -> None:
        stream = torch.cuda.Stream()
        together.wait()
        with torch.cuda.stream(stream):
            results = [flexmla.mla_decode(**engine.call, backend="tilelang") for _ in range(25)]
        stream.synchronize()
        if not engine.is_right(*results[0]):
            wrong.append(engine.shape)
        wrong.extend(engine.shape for r in results if not all(map(torch.equal, r, results[0])))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_processes_compile_the_same_kernel_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "TILELANG_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    environment["PYTHONPATH"] += os.pathsep + os.pathsep.join(sys.path)
    command = [sys.executable, "-c", COMPILES_AND_DECODES]
    pair = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in pair:
        _, complaint = process.communicate(timeout=300)
        assert process.returncode == 0, complaint
    subprocess.run(command, env=environment, check=True, timeout=300)  # from the cache that both have written


@pytest.mark.parametrize("page_size", [64, 16, 4, 0])
def test_caches_of_more_than_two_to_the_31_elements(page_size: int) -> None:
    shape, n_rows = MLAShape(16, 1, 512, 64), 2**31 // 576 + 4096
    if torch.cuda.mem_get_info()[0] < n_rows * 576 * 2 + 2**30:
        pytest.skip("needs 6 GB of free device memory")
    engine = Engine(shape, page_size, 1, batch=2)
    memory = torch.empty(n_rows // 64 * 64, 576, dtype=torch.float16, device="cuda")
    call, last = engine.call, memory.shape[0] - engine.slots * engine.slot_len
    if page_size:
        pages = memory.view(-1, page_size, 576)
        pages[-engine.slots :] = engine.cache
        moved = engine.table + last // page_size
        call["block_table"] = torch.where((engine.table >= 0) & (engine.table < engine.slots), moved, engine.table)
    else:
        step = (last // 64 - 8) * 64  # rows between the two rows of the batch
        pages = memory.as_strided((2, engine.slot_len, 576), (step * 576, 576, 1))
        pages.copy_(engine.cache)
    call["ckv_cache"], call["kpe_cache"] = pages[..., :512], pages[..., 512:].unflatten(-1, (1, 64))
    assert call["ckv_cache"].stride(0) * (pages.shape[0] - 1) > 2**31 - 2**23
    assert engine.is_right(*flexmla.mla_decode(**call, backend="tilelang"))


def test_paged_calls_repeat_their_bits() -> None:
    engine = Engine(MLAShape(32, 1, 512, 16), 16, 1)
    first = flexmla.mla_decode(**engine.call, backend="tilelang")
    for _ in range(20):
        assert all(map(torch.equal, flexmla.mla_decode(**engine.call, backend="tilelang"), first))


def test_opcheck() -> None:
    call = Engine(MLAShape(16, 1, 512, 64), 64, 2).call
    names = ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "seq_lens", "block_table", "starts")
    arguments = (*(call[name] for name in names), None, None, 0.05, 0.0, True, "tilelang", [])
    torch.library.opcheck(ops.mla_decode, arguments)
    out, lse = ops.mla_decode(*arguments)
    torch.library.opcheck(ops.mla_decode_out, arguments, {"out": torch.empty_like(out), "lse": torch.empty_like(lse)})
