"""A converted model in `generate`: every path gives what decompressed SDPA attention gives."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from flexmla import hf  # noqa: E402
from flexmla.hf import attention as attention_module  # noqa: E402

NEW = 10


@pytest.fixture(scope="module")
def converted(make_model):
    """Below full rank, so that the converted model is another one than the original; not to be changed."""
    return hf.patch_model(make_model(), rank=40, d_pe=8)


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[int, bool]]:
    """(q_len, has starts) of every call of mla_decode."""
    calls: list[tuple[int, bool]] = []
    real = attention_module.mla_decode

    def spy(q_nope, *args, **kwargs):
        calls.append((q_nope.shape[1], kwargs["starts"] is not None))
        return real(q_nope, *args, **kwargs)

    monkeypatch.setattr(attention_module, "mla_decode", spy)
    return calls


def generate(model, ids, **options):
    return model.generate(ids, **({"max_new_tokens": NEW, "do_sample": False} | options))


@torch.no_grad()
def without_cache(model, ids, mask=None):
    """Greedy answer by running the whole text anew for each token: prefill only, no cache and no decoding."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(NEW):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


@pytest.mark.parametrize(("svd", "d_pe"), [("joint", 0), ("joint", 8), ("joint", 16), ("split", 0), ("split", 8)])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_decoding_equals_recomputation(fresh, ids, decoded, svd, d_pe, cache):
    model = hf.patch_model(fresh, rank=24, d_pe=d_pe, svd=svd)
    expected = without_cache(model, ids)
    assert decoded == []
    assert torch.equal(generate(model, ids, cache_implementation=cache), expected)
    assert [q_len for q_len, _ in decoded] == [1] * 2 * (NEW - 1), "every step after prefill, in both layers"


def test_decompressed_decoding_equals_absorbed(converted, ids, decoded):
    absorbed = generate(converted, ids, output_logits=True, return_dict_in_generate=True)
    n_calls = len(decoded)
    hf.set_decode_mode(converted, "decompressed")
    try:
        decompressed = generate(converted, ids, output_logits=True, return_dict_in_generate=True)
    finally:
        hf.set_decode_mode(converted, "absorbed")
    assert len(decoded) == n_calls > 0
    assert torch.equal(absorbed.sequences, decompressed.sequences)
    torch.testing.assert_close(torch.stack(absorbed.logits), torch.stack(decompressed.logits), rtol=0, atol=1e-4)


def test_caches_hold_latents_and_rotary_keys(converted, ids):
    out = generate(converted, ids, return_dict_in_generate=True)
    for layer in out.past_key_values.layers:
        assert layer.keys.shape == (2, 1, 12 + NEW - 1, 40)
        assert layer.values.shape == (2, 1, 12 + NEW - 1, 3 * 8)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_layer_takes_its_cache_by_either_name(converted, name):
    """transformers 5.24 renamed the argument; a cache under a name that goes unread would be left empty."""
    layer, cache = converted.model.layers[0].self_attn, transformers.DynamicCache()
    hidden, positions = torch.randn(1, 3, 96), torch.arange(3)[None]
    layer(hidden, position_embeddings=converted.model.rotary_emb(hidden, positions), **{name: cache})
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_batch_equals_single_rows(converted, ids, decoded, cache):
    rows = [ids[0], ids[1, :5], ids[1, 4:11]]
    batch = torch.stack([torch.nn.functional.pad(row, (12 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (12 - len(row), 0)) for row in rows])
    out = generate(converted, batch, attention_mask=mask, cache_implementation=cache)
    assert all(starts for _, starts in decoded)
    assert len(decoded) == 2 * (NEW - 1)
    for row, answer in zip(rows, out, strict=True):
        assert torch.equal(generate(converted, row[None])[0, len(row) :], answer[12:])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_right_padded_prompts_are_right(converted, ids, cache):
    """Tokens after padding on the right: the mask has a hole, which no start can express."""
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    garbage = ids.clone()
    garbage[0, 7:] = 5
    full = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], dim=1)
    new = torch.tensor([[11, 12, 13], [21, 22, 23]])
    positions = full.cumsum(-1) - 1
    expected = converted(
        torch.cat([garbage, new], 1), attention_mask=full, position_ids=positions, use_cache=False
    ).logits[:, 12:]
    kind = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}[cache]
    past = kind(config=converted.config, **({"max_cache_len": 20} if cache == "static" else {}))
    with torch.no_grad():
        converted(garbage, attention_mask=mask, position_ids=positions[:, :12], past_key_values=past)
        for i in range(3):
            step = converted(
                new[:, i : i + 1],
                attention_mask=full[:, : 13 + i],
                position_ids=positions[:, 12 + i : 13 + i],
                past_key_values=past,
            ).logits
            torch.testing.assert_close(step[:, 0], expected[:, i], rtol=0, atol=1e-4)


@torch.no_grad()
def test_right_padding_without_a_cache(converted, ids):
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    padded = converted(ids, attention_mask=mask, use_cache=False).logits
    alone = converted(ids[:1, :7], use_cache=False).logits
    torch.testing.assert_close(padded[:1, :7], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunks", [[5, 4, 3], [1] * 12, [2, 10], [3, 30]])
@torch.no_grad()
def test_prefill_in_chunks(converted, cache, padded, chunks):
    """Chunks below and above the widest absorbed step, on top of what is cached, equal one prefill."""
    total = sum(chunks)
    ids = torch.randint(3, 97, (2, total), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = converted(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    kind = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}[cache]
    past = kind(config=converted.config, **({"max_cache_len": 40} if cache == "static" else {}))
    end = 0
    for chunk in chunks:
        begin, end = end, end + chunk
        out = converted(
            ids[:, begin:end],
            attention_mask=mask[:, :end] if padded else None,
            position_ids=positions[:, begin:end],
            past_key_values=past,
        ).logits
        visible = mask[:, begin:end].bool()
        torch.testing.assert_close(out[visible], expected[:, begin:end][visible], rtol=0, atol=1e-4)


def test_beams_samples_and_assistants(converted, original, ids):
    def both(**options):
        results = []
        for mode in ("absorbed", "decompressed"):
            hf.set_decode_mode(converted, mode)
            torch.manual_seed(0)
            results.append(generate(converted, ids[:1], **options))
        hf.set_decode_mode(converted, "absorbed")
        return results

    for options in (
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "cache_implementation": "static"},
        {"do_sample": True, "num_return_sequences": 4, "top_k": 20},
    ):
        absorbed, decompressed = both(**options)
        assert len(absorbed) == options.get("num_return_sequences", 1)
        assert torch.equal(absorbed, decompressed)
    # Drafts of several tokens are checked in one step of q_len > 1; greedy output stays what it is without them.
    assisted = generate(converted, ids[:1], assistant_model=copy.deepcopy(original))
    assert torch.equal(assisted, generate(converted, ids[:1]))


def test_prefill_chunk_size_of_generate(converted, ids):
    assert torch.equal(generate(converted, ids, prefill_chunk_size=5), generate(converted, ids))
    with pytest.raises(ValueError, match="no static one together with prefill_chunk_size"):
        generate(converted, ids, prefill_chunk_size=5, cache_implementation="static")


def test_a_cache_of_the_original_is_refused(converted, original, ids):
    with torch.no_grad():
        past = original(ids).past_key_values
        with pytest.raises(ValueError, match=r"holds keys \[2, 3, 12, 16\] .* caches \[batch, 1, tokens, 40\]"):
            converted(ids[:, :1], past_key_values=past)


def test_custom_masks_are_followed(converted, ids):
    """Masks that are no range go through SDPA, boolean or additive."""
    with torch.no_grad():
        past = converted(ids).past_key_values
        mask = torch.ones(2, 1, 1, 13, dtype=torch.bool)
        mask[0, ..., 4] = False
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        token, position = ids[:, :1], torch.full((2, 1), 12)
        steps = [
            converted(token, attention_mask=m, position_ids=position, past_key_values=copy.deepcopy(past)).logits
            for m in (mask, additive, torch.ones_like(mask))
        ]
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=1e-5)
    assert (steps[0][0] - steps[2][0]).abs().max() > 1e-2
    torch.testing.assert_close(steps[0][1], steps[2][1], rtol=0, atol=1e-4)


def test_other_attention_implementations_are_refused(fresh, ids):
    hf.patch_model(fresh, rank=40, d_pe=8)
    fresh.set_attn_implementation("eager")
    with pytest.raises(NotImplementedError, match=r"implementation is 'eager'.*set_attn_implementation"):
        fresh(ids)


def test_decoding_under_grad_says_what_to_do(converted, ids):
    past = converted(ids).past_key_values
    with pytest.raises(RuntimeError, match="no_grad"):
        converted(ids[:, :1], past_key_values=past)


@torch.no_grad()
def test_a_static_step_compiles_whole(converted, ids):
    """No graph break and no look at a value: what CUDA graphs and `generate`'s own compilation need."""
    pasts = []
    for _ in range(2):
        past = transformers.StaticCache(config=converted.config, max_cache_len=32)
        converted(ids, past_key_values=past)
        pasts.append(past)
    step = torch.compile(converted.forward, backend="eager", fullgraph=True)
    for i in range(3):
        mask = (torch.arange(32) < 13 + i).expand(2, 1, 1, 32).clone()
        mask[0, ..., :3] = False
        options = {"attention_mask": mask, "position_ids": torch.full((2, 1), 12 + i)}
        compiled = step(input_ids=ids[:, i : i + 1], past_key_values=pasts[0], **options).logits
        plain = converted(ids[:, i : i + 1], past_key_values=pasts[1], **options).logits
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


@pytest.mark.gpu
@torch.no_grad()
def test_static_decoding_never_waits_for_the_device(make_model, ids):
    model = hf.patch_model(make_model(), rank=64, d_pe=8).to("cuda", torch.bfloat16)
    ids = ids.cuda()
    past = transformers.StaticCache(config=model.config, max_cache_len=32)
    model(ids, past_key_values=past)
    steps = []
    for i in range(3):
        mask = (torch.arange(32, device="cuda") < 13 + i).expand(2, 1, 1, 32).clone()
        mask[0, ..., :3] = False
        steps.append({"attention_mask": mask, "position_ids": torch.full((2, 1), 12 + i, device="cuda")})
    model(ids[:, :1], past_key_values=copy.deepcopy(past), **steps[0])  # compiles what has to be compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = [model(ids[:, i : i + 1], past_key_values=past, **step).logits for i, step in enumerate(steps)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(logits.isfinite().all() for logits in out)


@pytest.mark.gpu
def test_static_generation_is_compiled_and_right(make_model, ids):
    """On CUDA, `generate` compiles steps on a static cache by itself."""
    model = hf.patch_model(make_model(), rank=64, d_pe=8).cuda()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask.cuda()}
    static = generate(model, ids.cuda(), cache_implementation="static", **options)
    assert torch.equal(static, generate(model, ids.cuda(), **options))
