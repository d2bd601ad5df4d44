from __future__ import annotations

import inspect

import pytest
import torch

from flexmla import compat, reference
from flexmla.check import bounds, row_errors
from flexmla.compat import SchedulerMetadata, flash_mla_with_kvcache, get_mla_metadata

INF = float("inf")
LENS = [37, 0, 5, 1, 64]
# heads, head_dim, head_dim_v, page size, q_len
SHAPES = [(16, 576, 512, 64, 1), (8, 80, 64, 16, 2), (5, 24, 24, 1, 1), (12, 264, 256, 256, 3)]


def inputs(n_heads, head_dim, page_size, q_len, dtype, device="cpu"):
    noise = torch.Generator(device).manual_seed(0)
    columns = -(-max(LENS) // page_size) + 1
    n_pages = len(LENS) * columns
    k_cache = torch.randn(n_pages, page_size, 1, head_dim, generator=noise, device=device).to(dtype)
    q = torch.randn(len(LENS), q_len, n_heads, head_dim, generator=noise, device=device).to(dtype)
    table = torch.randperm(n_pages, generator=noise, device=device).view(len(LENS), columns).int()
    lens = torch.tensor(LENS, dtype=torch.int32, device=device)
    unused = torch.arange(columns, device=device) * page_size >= lens[:, None]
    return q, k_cache, table.masked_fill(unused, -1), lens


def assert_right(result, q, k_cache, table, lens, head_dim_v, dtype, **options):
    rope = head_dim_v < q.shape[3]
    right, right_lse = reference.mla_decode(
        q[..., :head_dim_v],
        q[..., head_dim_v:] if rope else None,
        k_cache[:, :, 0, :head_dim_v],
        k_cache[..., head_dim_v:] if rope else None,
        seq_lens=lens,
        block_table=table,
        **options,
    )
    right_lse[right_lse == -INF] = INF
    assert (right_lse == INF).any()
    out, lse = result
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert row_errors(out, lse, right, right_lse).within(bounds(dtype))


@pytest.mark.parametrize(("n_heads", "head_dim", "head_dim_v", "page_size", "q_len"), SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_both_forms_are_right(n_heads, head_dim, head_dim_v, page_size, q_len, causal):
    dtype = torch.float32
    q, k_cache, table, lens = inputs(n_heads, head_dim, page_size, q_len, dtype)
    old = get_mla_metadata(lens, q_len * n_heads, 1)
    results = [
        flash_mla_with_kvcache(q, k_cache, table, lens, head_dim_v, *old, causal=causal),
        flash_mla_with_kvcache(q, k_cache, table, lens, head_dim_v, *get_mla_metadata(), None, causal),
    ]
    for result in results:
        assert_right(result, q, k_cache, table, lens, head_dim_v, dtype, causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n_heads", "head_dim", "head_dim_v", "page_size", "q_len"), SHAPES)
def test_on_a_gpu(n_heads, head_dim, head_dim_v, page_size, q_len, dtype):
    q, k_cache, table, lens = inputs(n_heads, head_dim, page_size, q_len, dtype, "cuda")
    result = flash_mla_with_kvcache(q, k_cache, table, lens, head_dim_v, *get_mla_metadata(), causal=True)
    assert_right(result, q, k_cache, table, lens, head_dim_v, dtype, causal=True)


def test_scale_is_passed_on():
    q, k_cache, table, lens = inputs(4, 40, 16, 1, torch.float32)
    result = flash_mla_with_kvcache(q, k_cache, table, lens, 32, softmax_scale=0.3)
    assert_right(result, q, k_cache, table, lens, 32, torch.float32, softmax_scale=0.3, causal=False)


def test_nothing_is_copied(monkeypatch):
    q, k_cache, table, lens = inputs(4, 40, 16, 1, torch.float32)
    honest, seen = compat.mla_decode, {}

    def decode(*args, **options):
        seen["args"] = args
        return honest(*args, **options)

    monkeypatch.setattr(compat, "mla_decode", decode)
    flash_mla_with_kvcache(q, k_cache, table, lens, 32, *get_mla_metadata())
    owners = [x.untyped_storage().data_ptr() for x in seen["args"]]
    assert owners == [x.untyped_storage().data_ptr() for x in (q, q, k_cache, k_cache)]


def test_metadata_of_the_older_form_fits_buffers_made_for_another_batch_of_the_size():
    kept = get_mla_metadata(torch.tensor([3, 4, 5], dtype=torch.int32), 16, 1)
    for buffer, new in zip(kept, get_mla_metadata(torch.tensor([9, 0, 1], dtype=torch.int32), 16, 1), strict=True):
        assert buffer.dtype == torch.int32
        buffer.copy_(new)
    assert kept[1].shape == (4,)
    assert get_mla_metadata() == (SchedulerMetadata(), None)


@pytest.mark.parametrize(
    "name",
    ["is_fp8_kvcache", "indices", "attn_sink", "extra_k_cache", "extra_indices_in_kvcache", "topk_length",
     "extra_topk_length"],
)  # fmt: skip
def test_what_is_lacking_is_named(name):
    q, k_cache, table, lens = inputs(4, 40, 16, 1, torch.float32)
    assert name in inspect.signature(flash_mla_with_kvcache).parameters
    with pytest.raises(NotImplementedError, match=f"^{name} is not supported"):
        flash_mla_with_kvcache(q, k_cache, table, lens, 32, **{name: True})


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
        ({"block_table": None}, TypeError, "block_table must be a tensor, got NoneType"),
        ({"q": torch.zeros(5, 4, 40)}, ValueError, "q must be .*head_dim"),
        ({"k_cache": torch.zeros(3, 16, 2, 40)}, ValueError, r"k_cache must be .*1, 40\], got \(3, 16, 2, 40\)"),
        ({"head_dim_v": 41}, ValueError, "head_dim_v must be from 1 to head_dim 40, got 41"),
        ({"head_dim_v": 0}, ValueError, "head_dim_v must be from 1 to head_dim 40, got 0"),
        ({"q": torch.zeros(5, 1, 4, 40).double()}, TypeError, "q must be torch.float16 or .*, got torch.float64"),
        ({"q": torch.zeros(5, 1, 0, 40)}, ValueError, r"q must be .* with no empty part, got \(5, 1, 0, 40\)"),
        ({"q": torch.zeros(5, 1, 4, 80)[..., ::2]}, ValueError, "q must have a contiguous last dimension"),
        ({"q": torch.zeros(5, 1, 4, 40, requires_grad=True)}, RuntimeError, "q requires grad"),
        ({"k_cache": torch.zeros(3, 16, 40)}, ValueError, r"k_cache must be .*1, 40\], got \(3, 16, 40\)"),
        ({"k_cache": torch.zeros(3, 0, 1, 40)}, ValueError, "k_cache must have a page_size of at least 1, got 0"),
        ({"k_cache": torch.zeros(3, 16, 1, 40).half()}, TypeError, "k_cache must be torch.float32, got torch.float16"),
        ({"k_cache": torch.zeros(3, 16, 1, 40, device="meta")}, ValueError, "k_cache must be on q's device cpu, got"),
        ({"k_cache": torch.zeros(3, 16, 1, 40, requires_grad=True)}, RuntimeError, "k_cache requires grad"),
        ({"cache_seqlens": torch.zeros(5).long()}, TypeError, "cache_seqlens must be torch.int32, got torch.int64"),
        ({"cache_seqlens": torch.zeros(4).int()}, ValueError, r"cache_seqlens must be \[batch\] = \(5,\), got \(4,\)"),
        ({"cache_seqlens": torch.full((5,), 999).int()}, ValueError, "cache_seqlens must be 0 to .* got 999"),
        ({"cache_seqlens": torch.full((5,), -1).int()}, ValueError, "cache_seqlens must be 0 to .* got -1"),
        ({"block_table": torch.zeros(5, 3)}, TypeError, "block_table must be torch.int32, got torch.float32"),
        ({"block_table": torch.zeros(4, 3).int()}, ValueError, r"block_table must be .* = \(5, 3\), got \(4, 3\)"),
    ],
)
def test_bad_input_is_named(change, error, sentence):
    q, k_cache, table, lens = inputs(4, 40, 16, 1, torch.float32)
    call = {"q": q, "k_cache": k_cache, "block_table": table, "cache_seqlens": lens, "head_dim_v": 32}
    with pytest.raises(error, match=sentence):
        flash_mla_with_kvcache(**{**call, **change})


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((torch.zeros(3).int(), 4, 2), ValueError, "num_heads_k must be 1"),
        (([3, 4], 4, 1), TypeError, "cache_seqlens must be a tensor, got list"),
        ((torch.zeros(3), 4, 1), TypeError, "cache_seqlens must be torch.int32, got torch.float32"),
        ((torch.zeros(3, 4).int(), 4, 1), ValueError, r"cache_seqlens must be \[batch\], got \(3, 4\)"),
        ((torch.tensor(3).int(), 4, 1), ValueError, r"cache_seqlens must be \[batch\], got \(\)"),
    ],
)
def test_bad_metadata_input_is_named(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        get_mla_metadata(*arguments)
