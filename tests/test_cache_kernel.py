from __future__ import annotations

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import flexmla
from flexmla import MLAShape, PagedLatentCache

SRC = Path(__file__).parent.parent / "src"
NAN = float("nan")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Shapes of every branch of the kernel: several blocks, sizes that are no powers of two, no rope, odd d_pe.
KERNEL_SHAPES = [(32, 1, 512, 16), (6, 3, 40, 8), (6, 6, 13, 5), (4, 2, 1100, 640), (4, 1, 24, 0), (9, 3, 7, 6)]
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")


def poisoned(shape, n_pages, page_size, dtype, device):
    cache = PagedLatentCache(shape, n_pages, page_size, dtype, device)
    cache._rows.rows.fill_(NAN)  # with the row that belongs to no slot
    return cache


def tokens_of(shape, batch, n_new, dtype, device="cpu"):
    ckv = torch.randn(batch, n_new, shape.dv).to(device, dtype)
    kpe = torch.randn(batch, n_new, shape.n_rope_heads, shape.d_pe).to(device, dtype) if shape.d_pe else None
    return ckv, kpe


def angles_of(layout, device="cpu"):
    angle = torch.rand(layout) * 6.28
    return angle.cos().to(device), angle.sin().to(device)


# Compares the kernel with the PyTorch path bit for bit in a process of its own: Triton reads the setting at import.
# Without bfloat16, to which the interpreter truncates where a GPU rounds.
INTERPRETED = """
import torch
from flexmla import MLAShape
from flexmla.cache_kernel import write_tokens
from flexmla.cache_rows import TokenRows

torch.manual_seed(0)
for n_heads, groups, dv, d_pe in {shapes}:
    for dtype in (torch.float16, torch.float32):
        for turn in (False, True)[: 1 if d_pe % 2 or d_pe == 0 else 2]:
            expected = TokenRows(MLAShape(n_heads, groups, dv, d_pe), 20, dtype, "cpu")
            expected.rows.fill_(7.0)
            rows = expected.rows.clone()
            slots = torch.randperm(20)[:6].view(2, 3)
            slots[0, 2] = slots[1, 1] = -1
            ckv = torch.randn(3, 2, dv + 3).transpose(0, 1)[..., :dv].to(dtype)
            kpe = torch.randn(2, 3, groups, d_pe).to(dtype) if d_pe else None
            cos, sin = (torch.randn(1, 3, 1, d_pe), torch.randn(2, 3, groups, d_pe)) if turn else (None, None)
            expected.write(slots, ckv, kpe, cos, sin)
            slots[0, 2] = 20
            if turn:
                cos, sin = cos.expand_as(kpe), sin.expand_as(kpe)
            write_tokens(rows, 20, slots, ckv, kpe, cos, sin)
            torch.testing.assert_close(rows[:20], expected.rows[:20], rtol=0, atol=0)
            assert (rows[20] == 7.0).all()
print("same bits")
"""


@pytest.mark.skipif(
    not find_spec("triton") or not find_spec("numpy"), reason="needs Triton and its interpreter's NumPy"
)
def test_the_kernel_interpreted_on_the_cpu():
    code = INTERPRETED.format(shapes=KERNEL_SHAPES)
    path = os.pathsep.join([str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same bits"


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_heads", "groups", "dv", "d_pe"), KERNEL_SHAPES)
def test_gpu_kernel_writes_the_bits_of_the_torch_path_and_nothing_else(n_heads, groups, dv, d_pe, dtype):
    """Same calls on a CPU cache: new tokens and the NaN of all other rows are the same bits."""
    torch.manual_seed(5)
    shape = MLAShape(n_heads, groups, dv, d_pe)
    layouts = [None, (1, 3, d_pe), (4, 3, groups, d_pe)] if d_pe and d_pe % 2 == 0 else [None]
    for page_size, layout in itertools.product((1, 4, 16, 64, 256), layouts):
        caches = [poisoned(shape, 8 + 24 // page_size, page_size, dtype, device) for device in ("cpu", "cuda")]
        ckv, kpe = tokens_of(shape, 4, 3, dtype)
        cos, sin = angles_of(layout) if layout else (None, None)
        for cache in caches:
            sequences = [cache.allocate(n) for n in (0, 5, 0, 2)]
            cache.extend(sequences[::2], 2)  # the second write starts inside a page, and these rows stay unwritten
            on = [None if x is None else x.to(cache.device) for x in (ckv, kpe, cos, sin)]
            cache.append(sequences, *on)
            cache.append(sequences[1:], *(None if x is None else x[-3:] for x in on))
        expected, got = caches[0].storage, caches[1].storage.cpu()
        assert expected.isnan().any()
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert caches[1]._rows.rows[-1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_triton), False])
def test_gpu_never_synchronises(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr("flexmla.cache_rows._has_triton", lambda device: False)
    torch.manual_seed(6)
    shape = MLAShape(32, 32, 512, 16)
    cache = PagedLatentCache(shape, 64, 4, torch.float16, "cuda")
    sequences = [cache.allocate() for _ in range(3)]
    ckv, kpe = tokens_of(shape, 3, 5, torch.float16, "cuda")
    cos, sin = angles_of((1, 5, 16), device="cuda")
    cache.write(torch.full((3, 5), -1, device="cuda"), ckv, kpe, cos, sin)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.append(sequences, ckv, kpe, cos, sin)
        slots = cache.extend(sequences, 5)
        cache.write(slots, ckv, kpe)
        table, lens = cache.block_table(sequences), cache.seq_lens(sequences)
        cache.free(sequences[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert lens.tolist() == [10, 10, 10]
    assert table.cpu().unique().numel() == 9
    assert torch.equal(cache.kpe_cache.flatten(0, 1)[slots], kpe)


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "page_size"), [(1, 64), (32, 16)])
def test_gpu_decodes_what_was_appended(groups, page_size):
    """Through the views, against the reference over a CPU cache of the same tokens."""
    torch.manual_seed(7)
    shape = MLAShape(32, groups, 512, 16)
    lens = [200, 1, 77]
    ckv, kpe = tokens_of(shape, 3, max(lens), torch.float16)
    cos, sin = angles_of((1, max(lens), 16))
    q_nope, q_pe = (torch.randn(3, 1, 32, d).half() for d in (512, 16))
    results = []
    for device, decode in (("cpu", flexmla.reference.mla_decode), ("cuda", flexmla.mla_decode)):
        cache = poisoned(shape, 320 // page_size + 4, page_size, torch.float16, device)
        sequences = [cache.allocate() for _ in lens]
        for b, n in enumerate(lens):
            new = ckv[b : b + 1, :n], kpe[b : b + 1, :n], cos[:, :n], sin[:, :n]
            cache.append([sequences[b]], *(x.to(device) for x in new))
        out, lse = decode(
            q_nope.to(device),
            q_pe.to(device),
            cache.ckv_cache,
            cache.kpe_cache,
            block_table=cache.block_table(sequences),
            seq_lens=cache.seq_lens(sequences),
        )
        results.append((out.cpu().double(), lse.cpu().double()))
    (expected, expected_lse), (out, lse) = results
    assert ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max() <= 2e-3
    torch.testing.assert_close(lse, expected_lse, rtol=2e-4, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_triton), False])
def test_gpu_graph_follows_slots_that_change(fused, monkeypatch):
    if not fused:
        monkeypatch.setattr("flexmla.cache_rows._has_triton", lambda device: False)
    torch.manual_seed(8)
    shape = MLAShape(8, 2, 64, 16)
    cache = poisoned(shape, 16, 2, torch.float16, "cuda")
    ckv, kpe = tokens_of(shape, 4, 1, torch.float16, "cuda")
    slots = torch.full((4, 1), -1, device="cuda")
    cache.write(slots, ckv, kpe)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.write(slots, ckv, kpe)
    sequences = [cache.allocate() for _ in range(3)]
    for _ in range(3):
        slots[:3].copy_(cache.extend(sequences, 1))
        ckv.normal_()
        graph.replay()
        assert torch.equal(cache.ckv_cache.flatten(0, 1)[slots[:3, 0]], ckv[:3, 0])
    assert (~cache.ckv_cache.isnan()).any(-1).sum() == 9


@pytest.mark.gpu
def test_gpu_books_are_not_captured():
    shape = MLAShape(8, 2, 64, 0)
    cache = PagedLatentCache(shape, 16, 2, torch.float16, "cuda")
    sequence = cache.allocate()
    ckv = torch.zeros(1, 1, 64, dtype=torch.float16, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="CUDA graph is being captured"):
        cache.append([sequence], ckv, None)
    assert (cache.length(sequence), cache.n_free_pages) == (0, 16)


@pytest.mark.gpu
@needs_triton
def test_gpu_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of GPU memory")
    shape = MLAShape(8, 1, 2048, 64)
    n_pages = 2**31 // (2112 * 256) + 2
    cache = PagedLatentCache(shape, n_pages, 256, torch.float16, "cuda")
    assert cache.storage.numel() > 2**31
    cache.storage[-1].fill_(NAN)
    last = n_pages * 256 - 1
    ckv, kpe = tokens_of(shape, 1, 2, torch.float16, "cuda")
    cache.write(torch.tensor([[last, last + 1]], device="cuda"), ckv, kpe)
    assert torch.equal(cache.ckv_cache[-1, -1], ckv[0, 0])
    assert torch.equal(cache.kpe_cache[-1, -1], kpe[0, 0])
    assert cache.storage[-1, :-1].isnan().all()
