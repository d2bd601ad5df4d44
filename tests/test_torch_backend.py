from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from flexmla import mla_decode
from flexmla.backends import torch as backend
from flexmla.cases import CaseSpace, random_case
from flexmla.check import bounds, row_errors

INF = float("inf")
BATCHES = 15
SEEDS_PER_BATCH = 60


def int32(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_within_bounds(case, **arguments):
    errors = row_errors(*case.decode(backend="torch", **arguments), *case.expected())
    assert errors.within(bounds(case.q_nope.dtype)), f"{errors}, seed {case.seed}: {case.describe()}"


@pytest.mark.parametrize("number", range(BATCHES))
@pytest.mark.parametrize("path", ["whole", "chunked", "unread"])
def test_random_cases_agree_with_the_reference(path, number, monkeypatch):
    """2,700 cases in poisoned memory: in one chunk, in chunks of few tokens, and without looking at index values."""
    if path != "whole":
        monkeypatch.setattr(backend, "CHUNK_ELEMENTS", 1)
    if path == "unread":
        monkeypatch.setattr(backend, "_readable", lambda tensor: False)
    first = (["whole", "chunked", "unread"].index(path) * BATCHES + number) * SEEDS_PER_BATCH
    for seed in range(first, first + SEEDS_PER_BATCH):
        assert_within_bounds(random_case(seed))


def test_chunk_size_only_changes_rounding(monkeypatch):
    case = random_case(7, CaseSpace(dtypes=(torch.float32,), max_len=300, page_sizes=(None, 4)))
    whole = [x.clone() for x in case.decode()]
    monkeypatch.setattr(backend, "CHUNK_ELEMENTS", 1)
    for a, b in zip(whole, case.decode(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_same_inputs_give_the_same_bits(dtype):
    case = random_case(3, CaseSpace(dtypes=(dtype,), max_len=300))
    first = [x.clone() for x in case.decode()]
    for a, b in zip(first, case.decode(), strict=True):
        assert torch.equal(a, b)


class _PeakAllocation(TorchDispatchMode):
    """Most bytes that tensors made under it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("paged", [False, True])
def test_never_holds_a_copy_of_the_cache(dtype, paged, monkeypatch):
    """Peak memory is that of a chunk: no float32 copy of the cache, no rotary keys expanded to the heads."""
    budget = 1 << 16
    monkeypatch.setattr(backend, "CHUNK_ELEMENTS", budget)
    batch, max_len, n_heads, groups, dv, d_pe, page_size = 2, 8192, 16, 2, 64, 16, 16
    q, q_pe = torch.randn(batch, 1, n_heads, dv).to(dtype), torch.randn(batch, 1, n_heads, d_pe).to(dtype)
    ckv = torch.randn(batch, max_len, dv).to(dtype)
    kpe = torch.randn(batch, max_len, groups, d_pe).to(dtype)
    options: list = [int32(max_len, max_len - 5), None, None, None, None, 0.1, 0.0, True, ()]
    if paged:
        ckv, kpe = ckv.view(-1, page_size, dv), kpe.view(-1, page_size, groups, d_pe)
        options[1] = torch.arange(batch * max_len // page_size, dtype=torch.int32).view(batch, -1)
    out, lse = torch.empty(batch, 1, n_heads, dv, dtype=dtype), torch.empty(batch, n_heads, 1)
    with _PeakAllocation() as memory:
        backend.decode(q, q_pe, ckv, kpe, *options, out, lse)
    assert 0 < memory.peak < 3 * 4 * budget < ckv.numel() * 4 / 4


@pytest.mark.parametrize("field", ["seq_lens", "starts"])
def test_index_values_are_checked_on_cpu(field):
    q, ckv = torch.randn(3, 1, 2, 8), torch.randn(3, 10, 8)
    with pytest.raises(ValueError, match=rf"{field}\[1\] is -1"):
        mla_decode(q, None, ckv, None, **{field: int32(0, -1, 3)})
    mla_decode(q, None, ckv, None, seq_lens=int32(10, 0, 3), starts=int32(11, 0, 3))


def test_seq_lens_past_the_cache_raise_on_cpu():
    q, ckv = torch.randn(3, 1, 2, 8), torch.randn(3, 10, 8)
    with pytest.raises(ValueError, match=r"seq_lens\[2\] is 11; a row of this cache holds 0 to 10 tokens"):
        mla_decode(q, None, ckv, None, seq_lens=int32(10, 0, 11))
    with pytest.raises(ValueError, match="holds 0 to 20 tokens"):
        mla_decode(q, None, ckv, None, seq_lens=int32(10, 0, 21), block_table=torch.zeros(3, 2, dtype=torch.int32))


def test_table_entries_in_use_are_checked_on_cpu_and_others_are_not():
    q, pages = torch.randn(2, 1, 2, 8), torch.randn(4, 4, 8)
    for bad in (-1, 4, 2147480000):
        table = torch.tensor([[0, 1, bad], [2, 3, bad]], dtype=torch.int32)
        with pytest.raises(ValueError, match=rf"block_table\[1, 2\] is {bad} and in use; pages are 0 to 3"):
            mla_decode(q, None, pages, None, seq_lens=int32(8, 9), block_table=table)
        mla_decode(q, None, pages, None, seq_lens=int32(8, 8), block_table=table)
        # Pages before the first visible token are as little in use as those after the last.
        freed = torch.tensor([[bad, 1, bad], [bad, 3, bad]], dtype=torch.int32)
        mla_decode(q, None, pages, None, seq_lens=int32(8, 8), starts=int32(4, 8), block_table=freed)


@pytest.mark.parametrize("readable", [True, False])
def test_empty_rows_ignore_nan_queries(readable, monkeypatch):
    monkeypatch.setattr(backend, "_readable", lambda tensor: readable)
    q, ckv = torch.full((2, 3, 2, 8), float("nan")), torch.randn(2, 10, 8)
    q[0, 2] = 1.0
    out, lse = mla_decode(q, None, ckv, None, seq_lens=int32(1, 0))
    assert torch.equal(lse.mT == -INF, torch.tensor([[True, True, False], [True] * 3])[..., None].expand(2, 3, 2))
    torch.testing.assert_close(out[0, 2], ckv[0, 0].expand(2, 8))
    out[0, 2] = 0
    assert (out == 0).all()


def test_a_cache_without_pages_or_slots_is_empty():
    q = torch.randn(2, 1, 2, 8)
    for result in (
        mla_decode(q, None, torch.empty(2, 0, 8), None),
        mla_decode(q, None, torch.empty(0, 4, 8), None, seq_lens=int32(0, 0), block_table=int32([-1, -1], [-1, -1])),
    ):
        assert (result[0] == 0).all()
        assert (result[1] == -INF).all()


@pytest.mark.parametrize("readable", [True, False])
def test_rows_of_one_batch_do_not_touch_each_other(readable, monkeypatch):
    """A row's result has the same bits beside any neighbour, NaN ones included."""
    monkeypatch.setattr(backend, "_readable", lambda tensor: readable)
    q, ckv = torch.randn(2, 1, 4, 16), torch.randn(2, 40, 16)
    before = mla_decode(q, None, ckv, None, seq_lens=int32(40, 40))
    q[1], ckv[1] = float("nan"), float("nan")
    after = mla_decode(q, None, ckv, None, seq_lens=int32(40, 40))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[0], b[0])


def test_unread_lengths_are_clamped_to_the_cache(monkeypatch):
    """What a GPU does, where looking at values would synchronise."""
    q, ckv = torch.randn(3, 1, 2, 8), torch.randn(3, 10, 8)
    expected = mla_decode(q, None, ckv, None, seq_lens=int32(10, 0, 4), starts=int32(0, 0, 2))
    monkeypatch.setattr(backend, "_readable", lambda tensor: False)
    clamped = mla_decode(q, None, ckv, None, seq_lens=int32(99, -7, 4), starts=int32(-3, 0, 2))
    for a, b in zip(expected, clamped, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_elements", [1, 1 << 24])
def test_random_cases_on_a_gpu(chunk_elements, monkeypatch):
    monkeypatch.setattr(backend, "CHUNK_ELEMENTS", chunk_elements)
    for seed in range(200):
        assert_within_bounds(random_case(seed, replace(CaseSpace(), max_len=300), "cuda"))


def gpu_inputs(dtype=torch.float16):
    """A paged call whose index tensors can change in place."""
    torch.manual_seed(0)
    q, q_pe = torch.randn(3, 2, 8, 64), torch.randn(3, 2, 8, 16)
    pages, kpe = torch.randn(12, 16, 64), torch.randn(12, 16, 2, 16)
    options = {
        "seq_lens": int32(64, 0, 33),
        "starts": int32(5, 0, 0),
        "block_table": torch.tensor([[0, 1, 2, 3], [-1] * 4, [4, 5, 6, -1]], dtype=torch.int32),
    }
    inputs = [x.to("cuda", dtype) for x in (q, q_pe, pages, kpe)]
    return inputs, {name: value.cuda() for name, value in options.items()}


@pytest.mark.gpu
def test_gpu_values_out_of_range_are_clamped():
    inputs, options = gpu_inputs()
    options["block_table"][1] = torch.tensor([7, 8, 9, 10], dtype=torch.int32)
    options["seq_lens"].copy_(int32(64, 64, 0))
    options["starts"].copy_(int32(0, 0, 0))
    expected = mla_decode(*inputs, **options, backend="torch")
    options["seq_lens"].copy_(int32(1000, 65, -4))
    options["starts"].copy_(int32(-9, 0, -1))
    for a, b in zip(expected, mla_decode(*inputs, **options, backend="torch"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_never_synchronises():
    inputs, options = gpu_inputs()
    mla_decode(*inputs, **options, backend="torch")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mla_decode(*inputs, **options, backend="torch")
        mla_decode(*inputs, **options, softcap=20.0, causal=False, backend="torch")
        mla_decode(inputs[0], None, inputs[2][:3], None, starts=options["starts"], backend="torch")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_graph_replays_after_inputs_change_in_place():
    inputs, options = gpu_inputs()
    mla_decode(*inputs, **options, backend="torch")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = mla_decode(*inputs, **options, backend="torch")
    options["seq_lens"].copy_(int32(17, 40, 0))
    options["starts"].copy_(int32(0, 9, 0))
    options["block_table"].copy_(torch.tensor([[11, 3, -1, -1], [8, 9, 10, -1], [-1] * 4], dtype=torch.int32))
    for tensor in inputs:
        tensor.normal_()
    graph.replay()
    expected = mla_decode(*inputs, **options, backend="torch")
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.gpu
def test_gpu_peak_memory_is_that_of_a_chunk(monkeypatch):
    budget = 1 << 20
    monkeypatch.setattr(backend, "CHUNK_ELEMENTS", budget)
    q = torch.randn(4, 1, 16, 512, device="cuda", dtype=torch.float16)
    ckv = torch.randn(4, 16384, 512, device="cuda", dtype=torch.float16)
    lens = int32(16384, 16000, 3, 0, device="cuda")
    mla_decode(q, None, ckv, None, seq_lens=lens, backend="torch")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mla_decode(q, None, ckv, None, seq_lens=lens, backend="torch")
    assert torch.cuda.max_memory_allocated() - before < 4 * 4 * budget < ckv.numel() * 4 / 4
