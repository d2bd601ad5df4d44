from __future__ import annotations

import builtins
import importlib
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from flexmla import MLAShape  # noqa: E402
from flexmla.hf import (  # noqa: E402
    MLAAttention,
    attention_weights,
    convert_model,
    patch_model,
    set_decode_mode,
)


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(6, 6), (6, 3), (6, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_with_nothing_dropped_the_model_stays_the_same(make_model, ids, n_heads, n_kv_heads, bias):
    model = make_model(n_heads=n_heads, n_kv_heads=n_kv_heads, bias=bias).double()
    before = logits(model, ids)
    patched = patch_model(model, rank=n_kv_heads * 16, d_pe=16)
    assert patched is model
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("svd", "rank"), [("joint", 72), ("split", (24, 48))])
def test_full_rank_equals_the_unconverted_weights_with_partial_rope(fresh, original, ids, svd, rank):
    """Dropping RoPE from a frequency is the same as setting that frequency to zero."""
    patch_model(fresh, rank=rank, d_pe=8, svd=svd, rope_dims="high")
    model = original
    kept = model.model.rotary_emb.inv_freq.clone()
    try:
        model.model.rotary_emb.inv_freq[4:] = 0
        expected = logits(model, ids)
    finally:
        model.model.rotary_emb.inv_freq.copy_(kept)
    torch.testing.assert_close(logits(fresh, ids), expected, rtol=0, atol=2e-4)
    assert (expected - logits(model, ids)).abs().max() > 0.1, "RoPE matters here, or this test shows nothing"


@pytest.mark.parametrize(("d_pe", "rank"), [(0, 96), (8, 72), (16, 48)])
def test_a_rotary_embedding_with_a_gain(make_model, ids, d_pe, rank):
    """YaRN multiplies cos and sin, and with them all scores; at position 0 nothing else is lost with the rotation."""
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    model = make_model(rope_scaling=yarn)
    assert model.model.rotary_emb.attention_scaling > 1.1
    start = torch.zeros_like(ids)
    expected = logits(model, ids, position_ids=start)
    patch_model(model, rank=rank, d_pe=d_pe)
    torch.testing.assert_close(logits(model, ids, position_ids=start), expected, rtol=0, atol=2e-4)


def test_calibration_decides_dimensions_and_factors(fresh, ids):
    steps = []
    texts = [ids, ids[0, :7], ids[:1, 3:]]
    weights = convert_model(fresh, rank=40, d_pe=8, calibration=texts, progress=lambda *step: steps.append(step))
    assert steps == [(i, 5) for i in range(1, 6)]
    assert len(weights) == 2
    plain = convert_model(fresh, rank=40, d_pe=8)
    assert not torch.equal(weights[0].rope_index, plain[0].rope_index)
    one_text = convert_model(fresh, rank=40, d_pe=8, calibration=ids)
    assert not torch.allclose(weights[1].up_v, one_text[1].up_v)
    for layer in fresh.model.layers:
        assert not layer.self_attn._forward_pre_hooks, "calibration leaves no hook behind"

    # The statistics are those of the inputs each layer is given.
    seen = []
    layer = fresh.model.layers[1].self_attn
    handle = layer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    logits(fresh, ids)
    handle.remove()
    from flexmla.convert import ActivationStats, convert_attention

    stats = ActivationStats(attention_weights(fresh)[1])
    stats.update(seen[0])
    by_hand = convert_attention(attention_weights(fresh)[1], rank=40, d_pe=8, stats=stats)
    torch.testing.assert_close(by_hand.up_v, one_text[1].up_v)
    assert torch.equal(by_hand.rope_index, one_text[1].rope_index)


def test_converted_weights_can_be_applied_later(fresh, original, ids):
    weights = convert_model(original, rank=40, d_pe=8)
    assert not any(isinstance(m, MLAAttention) for m in original.modules())
    patch_model(fresh, weights)
    from_weights = logits(fresh, ids)
    for i, layer in enumerate(fresh.model.layers):
        assert isinstance(layer.self_attn, MLAAttention)
        assert layer.self_attn.shape == MLAShape(6, 3, dv=40, d_pe=8)
        assert layer.self_attn.layer_idx == i
        assert layer.self_attn.o_proj.weight.shape == (96, 96)
    names = dict(fresh.named_parameters())
    assert "model.layers.0.self_attn.k_proj.weight" not in names
    assert "model.layers.0.self_attn.up_k" in names
    assert from_weights.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_the_model(fresh, original, ids, dtype):
    weights = convert_model(original, rank=48, d_pe=16)
    patch_model(fresh.to(dtype), weights)
    assert {p.dtype for p in fresh.parameters()} == {dtype}
    assert fresh.model.layers[0].self_attn.rope_index.dtype == torch.int64
    out = fresh.generate(ids, max_new_tokens=6, do_sample=False)
    assert out.shape == (2, 18)
    full = patch_model(original.__class__(original.config).eval(), weights)
    full.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in fresh.state_dict().items()})
    error = (logits(fresh, out).float() - logits(full, out)).norm() / logits(full, out).norm()
    assert error < {torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]


def test_bad_options(fresh, ids):
    with pytest.raises(ValueError, match="patch_model needs rank and d_pe, or weights from convert_model"):
        patch_model(fresh, rank=40)
    weights = convert_model(fresh, rank=40, d_pe=8)
    with pytest.raises(ValueError, match="patch_model got weights and conversion options"):
        patch_model(fresh, weights, rank=40)
    with pytest.raises(ValueError, match="patch_model got weights and conversion options"):
        patch_model(fresh, weights, svd="split")
    with pytest.raises(ValueError, match="backend must be 'auto', 'tilelang' or 'torch', got 'fast'"):
        patch_model(fresh, rank=40, d_pe=8, backend="fast")
    with pytest.raises(TypeError, match=r"weights\[0\] is NoneType, expected MLAWeights"):
        patch_model(fresh, [None, None])
    with pytest.raises(ValueError, match="weights has 1 layers, but the model has 2"):
        patch_model(fresh, weights[:1])
    with pytest.raises(ValueError, match="rank is 200, expected 1 to 72"):
        patch_model(fresh, rank=200, d_pe=8, calibration=ids)
    foreign = ids.clone()
    foreign[0, -1] = fresh.config.vocab_size
    for bad in ([], [ids.float()], [ids.int()], ["text"], [ids[:, :0]], [ids[None]], foreign, [ids, -1 - ids]):
        with pytest.raises(ValueError, match=r"calibration (is empty|holds .*), expected"):
            convert_model(fresh, rank=40, d_pe=8, calibration=bad)
    assert not any(isinstance(m, MLAAttention) for m in fresh.modules()), "a refused conversion changes nothing"
    with pytest.raises(ValueError, match="mode is 'fast', expected 'absorbed' or 'decompressed'"):
        set_decode_mode(fresh, "fast")
    with pytest.raises(ValueError, match="model has no converted attention layers"):
        set_decode_mode(fresh, "absorbed")


def test_weights_of_another_model_are_refused(fresh, make_model):
    weights = convert_model(make_model(n_heads=6, n_kv_heads=1), rank=20, d_pe=8)
    with pytest.raises(ValueError, match=r"weights\[0\] has .* \(96, 6, 1, 16\), but .* \(96, 6, 3, 16\)"):
        patch_model(fresh, weights)


def test_a_converted_model_is_not_converted_again(fresh):
    patch_model(fresh, rank=40, d_pe=8)
    for again in (lambda: patch_model(fresh, rank=40, d_pe=8), lambda: attention_weights(fresh)):
        with pytest.raises(ValueError, match="model is already converted"):
            again()


def test_other_models_are_refused(original):
    config = transformers.Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(NotImplementedError, match="model is of type 'qwen2'; patch_model takes Llama models"):
        patch_model(transformers.Qwen2ForCausalLM(config), rank=8, d_pe=8)
    with pytest.raises(NotImplementedError, match="model is of type 'Linear'"):
        patch_model(torch.nn.Linear(2, 2), rank=8, d_pe=8)


def test_adapted_projections_are_refused(fresh):
    class Adapted(torch.nn.Linear):
        pass

    fresh.model.layers[1].self_attn.k_proj = Adapted(96, 48)
    with pytest.raises(NotImplementedError, match="k_proj is a Adapted; conversion takes plain linear layers"):
        patch_model(fresh, rank=8, d_pe=8)


def test_bidirectional_models_are_refused(fresh):
    fresh.config.is_causal = False
    with pytest.raises(NotImplementedError, match="model attends in both directions"):
        patch_model(fresh, rank=8, d_pe=8)


def test_without_transformers_the_install_line_is_told(monkeypatch):
    real_import = builtins.__import__

    def no_transformers(name, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ImportError("No module named 'transformers'")
        return real_import(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("flexmla.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", no_transformers)
    with pytest.raises(ImportError, match=r"pip install 'flexmla\[hf\]'"):
        importlib.import_module("flexmla.hf")
