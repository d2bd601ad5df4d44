from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

import flexmla
from flexmla import CacheFullError, MLAShape, PagedLatentCache

ROOT = Path(__file__).parent.parent
NAN = float("nan")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def poisoned(shape, n_pages, page_size, dtype=torch.float32, device="cpu"):
    cache = PagedLatentCache(shape, n_pages, page_size, dtype, device)
    cache.storage.fill_(NAN)
    return cache


def tokens_of(shape, batch, n_new, dtype=torch.float32, device="cpu"):
    ckv = torch.randn(batch, n_new, shape.dv).to(device, dtype)
    kpe = torch.randn(batch, n_new, shape.n_rope_heads, shape.d_pe).to(device, dtype) if shape.d_pe else None
    return ckv, kpe


def angles_of(layout, dtype=torch.float32, device="cpu"):
    """cos and sin as transformers makes them: the halves of the last dimension are equal."""
    angle = torch.rand(*layout[:-1], layout[-1] // 2) * 6.28
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotated(kpe, cos, sin):
    """RoPE by the formula in float64, every pair (i, i + d_pe / 2) turned as a complex number."""
    if cos.dim() == 3:
        cos, sin = cos[:, :, None], sin[:, :, None]
    half = kpe.shape[-1] // 2
    pairs = torch.complex(kpe[..., :half].double(), kpe[..., half:].double())
    turned = pairs * torch.complex(cos[..., :half].double(), sin[..., :half].double())
    return torch.cat([turned.real, turned.imag], -1)


def rows_of(cache, sequence):
    """What a sequence holds, read through the block table: `[length, dv]` and `[length, n_rope_heads, d_pe]`."""
    pages = cache.block_table([sequence])[0].long()
    n = cache.length(sequence)
    kpe = None if cache.kpe_cache is None else cache.kpe_cache[pages].flatten(0, 1)[:n]
    return cache.ckv_cache[pages].flatten(0, 1)[:n], kpe


@pytest.mark.parametrize("page_size", [1, 2, 16, 256])
@pytest.mark.parametrize(
    ("n_heads", "groups", "dv", "d_pe"), [(6, 1, 32, 8), (6, 6, 24, 5), (6, 3, 13, 16), (4, 1, 9, 0)]
)
def test_decoding_from_the_cache_equals_decoding_from_contiguous_caches(n_heads, groups, dv, d_pe, page_size):
    torch.manual_seed(0)
    shape = MLAShape(n_heads, groups, dv, d_pe)
    cache = poisoned(shape, 512 // page_size + 4, page_size)
    lens = [37, 5, 0, 64]
    ckv, kpe = tokens_of(shape, len(lens), max(lens))
    sequences = [cache.allocate() for _ in lens]
    for t in range(max(lens)):  # token by token, so that the sequences' pages lie between each other
        rows = [b for b, n in enumerate(lens) if t < n]
        cache.append([sequences[b] for b in rows], ckv[rows, t : t + 1], None if kpe is None else kpe[rows, t : t + 1])

    q_nope = torch.randn(len(lens), 1, n_heads, dv)
    q_pe = torch.randn(len(lens), 1, n_heads, d_pe) if d_pe else None
    paged = flexmla.mla_decode(
        q_nope,
        q_pe,
        cache.ckv_cache,
        cache.kpe_cache,
        block_table=cache.block_table(sequences),
        seq_lens=cache.seq_lens(sequences),
    )
    contiguous = flexmla.mla_decode(q_nope, q_pe, ckv, kpe, seq_lens=torch.tensor(lens, dtype=torch.int32))
    for a, b in zip(paged, contiguous, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_random_lives_of_sequences_against_lists_of_tokens(seed):
    """Every token is marked by its number; no step may lose one, overlap two, or lose a page."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4, 8, 64])
    n_pages = rng.randint(1, 40)
    shape = MLAShape(2, 2, 3, 2)
    cache = poisoned(shape, n_pages, page_size)
    model, reserved, token = {}, {}, 0
    refused = 0

    def held(sequence, extra=0):
        return max(reserved[sequence], math.ceil((len(model[sequence]) + extra) / page_size))

    for _ in range(150):
        free = n_pages - sum(map(held, model))
        assert cache.n_free_pages == free
        kind = rng.random()
        if kind < 0.2:
            n_tokens = rng.choice([0, 0, rng.randint(1, 3 * page_size)])
            pages = math.ceil(n_tokens / page_size)
            if pages > free:
                with pytest.raises(CacheFullError):
                    cache.allocate(n_tokens)
                continue
            sequence = cache.allocate(n_tokens)
            model[sequence], reserved[sequence] = [], pages
        elif kind < 0.3 and model:
            sequence = rng.choice(list(model))
            cache.free(sequence)
            del model[sequence], reserved[sequence]
        elif kind < 0.4 and model:
            sequence = rng.choice(list(model))
            reserved[sequence] = held(sequence)
            model[sequence] = model[sequence][: rng.randint(0, len(model[sequence]))]
            cache.truncate(sequence, len(model[sequence]))
        elif model:
            batch = rng.sample(list(model), rng.randint(1, len(model)))
            n_new = rng.choice([0, 1, 1, 1, rng.randint(2, 2 * page_size + 3)])
            numbers = torch.arange(token, token + len(batch) * n_new).float().view(len(batch), n_new, 1)
            missing = sum(held(s, n_new) - held(s) for s in batch) - free
            before = cache.storage.clone(), [cache.length(s) for s in model]
            arguments = batch, numbers.expand(-1, -1, 3).contiguous(), numbers[..., None].repeat(1, 1, 2, 2)
            if missing > 0:
                refused += 1
                with pytest.raises(CacheFullError, match=f"pages missing: {missing} ") as full:
                    cache.append(*arguments)
                assert full.value.missing == missing
                torch.testing.assert_close(cache.storage, before[0], rtol=0, atol=0, equal_nan=True)
                assert [cache.length(s) for s in model] == before[1]
            else:
                cache.append(*arguments)
                token += len(batch) * n_new
                for sequence, row in zip(batch, numbers[..., 0].tolist(), strict=True):
                    model[sequence] += row
        lens = cache.seq_lens(list(model))
        assert lens.dtype == torch.int32
        assert lens.tolist() == [cache.length(s) for s in model] == list(map(len, model.values()))
        table = cache.block_table(list(model))
        assert table.dtype == torch.int32
        assert table.shape == (len(model), max([1, *map(held, model)]))
        pages = [page for row, s in zip(table.tolist(), model, strict=True) for page in row[: held(s)]]
        assert len(set(pages)) == len(pages)
        assert set(pages) <= set(range(n_pages))
        for sequence, numbers in model.items():
            ckv, kpe = rows_of(cache, sequence)
            expected = torch.tensor(numbers)
            assert torch.equal(ckv, expected[:, None].expand(-1, 3))
            assert torch.equal(kpe, expected[:, None, None].expand(-1, 2, 2))
    for sequence in list(model):
        cache.free(sequence)
    assert cache.n_free_pages == n_pages
    assert refused or n_pages * page_size > 200


def test_a_full_cache_says_how_many_pages_are_missing_and_changes_nothing():
    shape = MLAShape(4, 1, 8, 8)
    cache = poisoned(shape, 5, 4)
    first, second = cache.allocate(), cache.allocate()
    cache.append([first, second], *tokens_of(shape, 2, 3))
    stored, table = cache.storage.clone(), cache.block_table([first, second])
    with pytest.raises(CacheFullError, match=r"pages missing: 3 \(6 more needed, 3 free\); free sequences"):
        cache.append([first, second], *tokens_of(shape, 2, 13))
    with pytest.raises(RuntimeError, match=r"pages missing: 1 \(4 more needed, 3 free\)"):
        cache.allocate(13)
    with pytest.raises(CacheFullError):
        cache.extend([first], 14)
    assert cache.n_free_pages == 3
    assert cache.seq_lens([first, second]).tolist() == [3, 3]
    assert torch.equal(cache.block_table([first, second]), table)
    torch.testing.assert_close(cache.storage, stored, rtol=0, atol=0, equal_nan=True)
    cache.append([first], *tokens_of(shape, 1, 13))
    assert (cache.length(first), cache.n_free_pages) == (16, 0)


def test_a_failed_write_changes_no_books(monkeypatch):
    shape = MLAShape(1, 1, 8, 0)
    cache = PagedLatentCache(shape, 4, 4, torch.float32, "cpu")
    sequence = cache.allocate()

    def fail(*_):
        raise OSError("no compiler")

    monkeypatch.setattr(cache._rows, "write", fail)
    with pytest.raises(OSError, match="no compiler"):
        cache.append([sequence], *tokens_of(shape, 1, 5))
    assert (cache.length(sequence), cache.n_free_pages) == (0, 4)


@pytest.mark.parametrize(("groups", "dv", "d_pe"), [(1, 512, 64), (6, 13, 5), (1, 13, 0)])
def test_the_caches_are_views_of_merged_rows(groups, dv, d_pe):
    cache = PagedLatentCache(MLAShape(6, groups, dv, d_pe), 3, 2, torch.float16, "cpu")
    assert cache.storage.shape == (3, 2, dv + groups * d_pe)
    assert cache.storage.is_contiguous()
    cache.storage.copy_(torch.arange(cache.storage.numel()).view_as(cache.storage) % 2000)
    assert torch.equal(cache.ckv_cache, cache.storage[..., :dv])
    if d_pe == 0:
        assert cache.kpe_cache is None
        return
    assert cache.kpe_cache.shape == (3, 2, groups, d_pe)
    assert torch.equal(cache.kpe_cache.flatten(2), cache.storage[..., dv:])
    cache.ckv_cache.fill_(1.0)
    cache.kpe_cache.fill_(2.0)
    assert cache.storage.sum() == 6 * (dv + 2 * groups * d_pe)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [(1, 5, 8), (3, 5, 8), (1, 5, 1, 8), (3, 5, 4, 8)])
def test_rotary_keys_are_turned_in_float32_and_rounded_once(layout, angle_dtype, dtype):
    torch.manual_seed(1)
    shape = MLAShape(4, 4, 6, 8)
    cache = poisoned(shape, 12, 2, dtype)
    sequences = [cache.allocate() for _ in range(3)]
    ckv, kpe = tokens_of(shape, 3, 5, dtype)
    cos, sin = angles_of(layout, angle_dtype)
    cache.append(sequences, ckv, kpe, cos, sin)
    exact = rotated(kpe, cos, sin)
    eps = torch.finfo(dtype).eps
    for b, sequence in enumerate(sequences):
        latents, keys = rows_of(cache, sequence)
        assert torch.equal(latents, ckv[b])
        bound = 0.5001 * eps * exact[b].abs() + 4 * torch.finfo(torch.float32).eps * kpe[b].abs().amax()
        assert ((keys.double() - exact[b]).abs() <= bound).all()
        if dtype != torch.float32:
            assert (keys == exact[b].to(dtype)).double().mean() > 0.99


def test_angles_of_a_converted_transformers_layer():
    """The stored key is what `flexmla.hf` caches for the same projection, cos, sin and frequencies a head."""
    attention = pytest.importorskip("flexmla.hf.attention")
    torch.manual_seed(2)
    shape = MLAShape(4, 2, 8, 6)
    cos, sin = (torch.randn(1, 3, 16) for _ in range(2))
    rope_index = torch.stack([torch.randperm(16)[:6] for _ in range(2)])
    ckv, kpe = tokens_of(shape, 1, 3)
    layer = type("Layer", (), {"rope_index": rope_index, "n_kv_heads": 2})()
    _, expected = attention.MLAAttention._rotate(layer, torch.randn(1, 3, 4, 6), kpe, (cos, sin))
    cache = PagedLatentCache(shape, 2, 2, torch.float32, "cpu")
    sequence = cache.allocate()
    cache.append([sequence], ckv, kpe, cos[..., rope_index], sin[..., rope_index])
    torch.testing.assert_close(rows_of(cache, sequence)[1], expected[0])


def test_strided_tokens():
    torch.manual_seed(3)
    shape = MLAShape(4, 2, 8, 4)
    cache = PagedLatentCache(shape, 9, 2, torch.float32, "cpu")
    merged = torch.randn(5, 3, 8 + 2 * 4).transpose(0, 1)
    ckv, kpe = merged[..., :8], merged[..., 8:].unflatten(-1, (2, 4))
    sequences = [cache.allocate() for _ in range(3)]
    cache.append(sequences, ckv, kpe)
    for b, sequence in enumerate(sequences):
        latents, keys = rows_of(cache, sequence)
        assert torch.equal(latents, ckv[b])
        assert torch.equal(keys, kpe[b])


def test_other_layers_follow_the_slots_of_the_first():
    torch.manual_seed(4)
    shape = MLAShape(4, 2, 8, 4)
    caches = [poisoned(shape, 8, 2) for _ in range(3)]
    sequences = [caches[0].allocate() for _ in range(2)]
    slots = caches[0].extend(sequences, 3)
    assert slots.shape == (2, 3)
    assert slots.dtype == torch.int64
    table = caches[0].block_table(sequences).long()
    assert torch.equal(slots, table.gather(1, torch.tensor([[0, 0, 1]] * 2)) * 2 + torch.tensor([0, 1, 0]))
    for cache in caches:
        ckv, kpe = tokens_of(shape, 2, 3)
        cos, sin = angles_of((1, 3, 4))
        cache.write(slots, ckv, kpe, cos, sin)
        assert torch.equal(cache.ckv_cache.flatten(0, 1)[slots], ckv)
        stored = cache.kpe_cache.flatten(0, 1)[slots]
        torch.testing.assert_close(stored.double(), rotated(kpe, cos, sin), rtol=1e-5, atol=1e-6)
        assert cache.ckv_cache.isnan().sum() == (16 - 6) * 8


def test_negative_slots_are_skipped():
    shape = MLAShape(4, 1, 8, 8)
    cache = poisoned(shape, 2, 2)
    ckv, kpe = tokens_of(shape, 3, 1)
    cache.write(torch.tensor([[-1], [2], [-7]]), ckv, kpe)
    written = ~cache.storage.isnan().flatten(0, 1).all(1)
    assert written.tolist() == [False, False, True, False]
    assert torch.equal(cache.ckv_cache[1, 0], ckv[1, 0])


def test_nothing_to_do():
    shape = MLAShape(2, 1, 8, 4)
    cache = PagedLatentCache(shape, 4, 2, torch.float32, "cpu")
    sequence = cache.allocate()
    cache.append([], *tokens_of(shape, 0, 3))
    cache.append([sequence], *tokens_of(shape, 1, 0))
    assert cache.block_table([]).shape == (0, 1)
    assert cache.seq_lens([]).shape == (0,)
    assert cache.block_table([sequence]).tolist() == [[0]]
    assert (cache.length(sequence), cache.n_free_pages) == (0, 4)


@pytest.mark.parametrize("inside", [False, True])
def test_inference_mode(inside):
    """Made in or outside inference mode, written in the other."""
    shape = MLAShape(2, 1, 8, 4)
    with torch.inference_mode(inside):
        cache = PagedLatentCache(shape, 4, 2, torch.float32, "cpu")
    sequence = cache.allocate()
    with torch.inference_mode(not inside):
        ckv, kpe = tokens_of(shape, 1, 3)
        cache.append([sequence], ckv, kpe, *angles_of((1, 3, 4)))
    assert torch.equal(rows_of(cache, sequence)[0], ckv[0])


def test_another_default_device_does_not_matter():
    shape = MLAShape(2, 1, 8, 0)
    cache = PagedLatentCache(shape, 4, 2, torch.float32, "cpu")
    sequence = cache.allocate()
    ckv, _ = tokens_of(shape, 1, 3)
    with torch.device("meta"):
        cache.append([sequence], ckv, None)
        assert cache.seq_lens([sequence]).tolist() == [3]
        assert cache.block_table([sequence]).tolist() == [[0, 1]]
        assert cache.block_table([]).device.type == "cpu"


def test_sequences_that_are_none():
    shape = MLAShape(2, 1, 8, 0)
    cache, other = (PagedLatentCache(shape, 4, 2, torch.float32, "cpu") for _ in range(2))
    freed, live, foreign = cache.allocate(), cache.allocate(), other.allocate()
    cache.free(freed)
    ckv = torch.zeros(2, 1, 8)
    with pytest.raises(
        ValueError, match=r"sequences\[1\] must be a live sequence of this cache, got .* that was freed"
    ):
        cache.append([live, freed], ckv, None)
    with pytest.raises(ValueError, match=r"sequences\[1\] must be .*, got sequence 0 of another cache"):
        cache.append([live, foreign], ckv, None)
    with pytest.raises(ValueError, match=r"sequences must be different, got .* again at sequences\[1\]"):
        cache.append([live, live], ckv, None)
    with pytest.raises(TypeError, match="sequences must be a list or tuple of sequences, got CacheSequence"):
        cache.append(live, ckv, None)
    with pytest.raises(TypeError, match=r"sequences\[0\] must be what allocate returned, got int"):
        cache.seq_lens([1])
    for method in (cache.free, cache.length):
        with pytest.raises(ValueError, match=r"sequence must be .*, got sequence 0 that was freed"):
            method(freed)
        with pytest.raises(ValueError, match=r"sequence must be .*, got sequence 0 of another cache"):
            method(foreign)
    with pytest.raises(ValueError, match="length must be at most the sequence's 0 tokens, got 1"):
        cache.truncate(live, 1)
    assert (cache.length(live), cache.n_free_pages) == (0, 4)


GOOD = {
    "ckv": torch.zeros(2, 3, 8),
    "kpe": torch.zeros(2, 3, 2, 4),
    "cos": torch.zeros(1, 3, 4),
    "sin": torch.zeros(2, 3, 2, 4),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ckv": [1.0]}, TypeError, "ckv must be a tensor, got list"),
        ({"ckv": torch.zeros(2, 8)}, ValueError, r"ckv must be \[batch, n_new, dv\] = \[2, n_new, 8\], got \(2, 8\)"),
        ({"ckv": torch.zeros(2, 3, 9)}, ValueError, r"ckv must be .* = \[2, 3, 8\], got \(2, 3, 9\)"),
        ({"ckv": torch.zeros(2, 3, 8).half()}, TypeError, "ckv must be torch.float32, got torch.float16"),
        ({"ckv": torch.zeros(2, 3, 8, device="meta")}, ValueError, "ckv must be on the cache's device cpu, got meta"),
        ({"ckv": torch.zeros(2, 3, 16)[..., ::2]}, ValueError, "ckv must have a contiguous last dimension"),
        ({"ckv": torch.zeros(2, 3, 8, requires_grad=True)}, RuntimeError, "ckv requires grad"),
        ({"kpe": None}, ValueError, "kpe must be given for a shape of d_pe 4, got None"),
        ({"kpe": torch.zeros(2, 3, 1, 4)}, ValueError, r"kpe must be .* = \[2, 3, 2, 4\], got \(2, 3, 1, 4\)"),
        ({"sin": None}, ValueError, "sin must be given where the other of cos and sin is"),
        (
            {"cos": torch.zeros(3, 4)},
            ValueError,
            r"cos must be \[1 or 2, 3, 4\] or \[1 or 2, 3, 1 or 2, 4\], got \(3, 4\)",
        ),
        ({"sin": torch.zeros(2, 1, 4)}, ValueError, r"sin must be .*, got \(2, 1, 4\)"),
        ({"cos": torch.zeros(1, 3, 4).double()}, TypeError, "cos must be torch.float16 or .*, got torch.float64"),
    ],
)
def test_bad_tokens(change, error, message):
    cache = PagedLatentCache(MLAShape(4, 2, 8, 4), 8, 2, torch.float32, "cpu")
    sequences = [cache.allocate(), cache.allocate()]
    with pytest.raises(error, match=message):
        cache.append(sequences, **{**GOOD, **change})
    assert cache.seq_lens(sequences).tolist() == [0, 0]
    assert cache.n_free_pages == 8
    cache.append(sequences, **GOOD)


def test_what_a_shape_has_no_use_for_is_refused():
    ckv, kpe, cos = torch.zeros(1, 1, 8), torch.zeros(1, 1, 1, 5), torch.zeros(1, 1, 5)
    cache = PagedLatentCache(MLAShape(4, 1, 8, 0), 8, 2, torch.float32, "cpu")
    for name, value in (("kpe", kpe), ("cos", cos), ("sin", cos)):
        with pytest.raises(ValueError, match=f"{name} must be None for a shape of d_pe 0, got Tensor"):
            cache.append([cache.allocate()], **{"ckv": ckv, "kpe": None, name: value})
    cache = PagedLatentCache(MLAShape(4, 1, 8, 5), 8, 2, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"cos and sin must be None for an odd d_pe, .* got d_pe 5"):
        cache.append([cache.allocate()], ckv, kpe, cos, cos)


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        (torch.tensor([0]), ValueError, r"slots must be \[batch, n_new\], got \(1,\)"),
        (torch.tensor([[0]], dtype=torch.int32), TypeError, "slots must be torch.int64, got torch.int32"),
        (torch.tensor([[16]]), ValueError, r"slots must be below n_pages \* page_size = 16, got 16"),
    ],
)
def test_bad_slots(slots, error, message):
    cache = PagedLatentCache(MLAShape(4, 1, 8, 0), 8, 2, torch.float32, "cpu")
    with pytest.raises(error, match=message):
        cache.write(slots, torch.zeros(1, 1, 8), None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"shape": MLAShape(4, 1, 8, 0, 16)},
            ValueError,
            "v_width None, got 16; for separate value latents take dv = 24",
        ),
        ({"n_pages": 2.0}, TypeError, "n_pages must be an int, got float"),
        ({"page_size": 48}, ValueError, "page_size must be a power of two from 1 to 256, got 48"),
        ({"page_size": 512}, ValueError, "page_size must be a power of two from 1 to 256, got 512"),
        ({"page_size": 0}, ValueError, "page_size must be at least 1, got 0"),
        ({"dtype": torch.float64}, TypeError, "dtype must be torch.float16 or .*, got torch.float64"),
        ({"device": "gpu!"}, ValueError, "device must be a PyTorch device such as cpu or cuda:0, got 'gpu!'"),
        ({"device": "cuda:99"}, ValueError, "device must be one that PyTorch finds .*, got 'cuda:99'"),
        ({"device": None}, TypeError, "device must be a torch.device, a str or a DeviceRecord, got NoneType"),
    ],
)
def test_bad_caches(change, error, message):
    arguments = {"shape": MLAShape(4, 1, 8, 0), "n_pages": 4, "page_size": 4, "dtype": torch.float16, "device": "cpu"}
    with pytest.raises(error, match=message):
        PagedLatentCache(**{**arguments, **change})


def test_the_documented_example_runs(capsys):
    example = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    promised = example.rstrip().rsplit("# ", 1)[1]
    exec(compile(example, "serving.md", "exec"), {})
    assert capsys.readouterr().out.strip() == promised
