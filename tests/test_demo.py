from __future__ import annotations

import importlib.util
import io
import json

import pytest
import torch
from rich.console import Console

pytest.importorskip("gguf")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from flexmla import demo  # noqa: E402

KEYS = {
    "answer_original": str,
    "answer_converted": str,
    "nll_original": float,
    "nll_converted": float,
    "logit_diff": float,
    "cache_bytes_per_token_original": int,
    "cache_bytes_per_token_converted": int,
    "tokens_per_second_original": float,
    "tokens_per_second_converted": float,
    "backend": str,
    "device": str,
    "seconds": float,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture(scope="session")
def save_model(tmp_path_factory):
    """Saves a small Llama with random weights and a tokenizer of bytes; returns its folder."""

    def save(*, n_heads=6, n_kv_heads=3, hidden=96, head_dim=16, layers=2, chat=True):
        special = ["<end>", "<user>", "<bot>"]
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate([*special, *letters])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<end>", additional_special_tokens=special[1:]
        )
        fast.chat_template = CHAT_TEMPLATE if chat else None
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=hidden,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=head_dim,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        folder = tmp_path_factory.mktemp("model")
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        fast.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 20)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 12)


def run(folder, **options):
    printed = io.StringIO()
    console = Console(file=printed, width=100)
    return demo.run(weights=folder, console=console, **({"device": "cpu", "rank": 24, "d_pe": 8} | options)), printed


@pytest.mark.usefixtures("brief")
def test_figures_are_those_of_the_models(save_model, tmp_path):
    figures, printed = run(save_model(), prompt="Why?", json_path=tmp_path / "figures.json")
    assert {key: type(value) for key, value in figures.items()} == KEYS
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert figures["cache_bytes_per_token_original"] == 2 * 2 * 3 * 16 * 4  # layers, K and V, heads, width, float32
    assert figures["cache_bytes_per_token_converted"] == 2 * (24 + 3 * 8) * 4
    assert 0 < figures["logit_diff"] <= 1e-3
    assert figures["nll_converted"] > figures["nll_original"] > 0, "greedy answers suit the original best"
    assert (figures["backend"], figures["device"]) == ("torch", "cpu")
    assert figures["tokens_per_second_original"] > 0
    assert figures["tokens_per_second_converted"] > 0
    text = printed.getvalue()
    for expected in (
        "original: Why?",
        "converted: Why?",
        f"{figures['nll_original']:.3f}",
        f"{figures['nll_converted']:.3f}",
        "768",
        "384",
        "cache saved: 50.0%",
        f"{figures['logit_diff']:.2e}",
        "backend: torch",
    ):
        assert expected in text


@pytest.mark.usefixtures("brief")
def test_with_nothing_dropped_both_models_agree(save_model):
    figures, _ = run(save_model(chat=False), rank=48, d_pe=16)
    assert figures["answer_converted"] == figures["answer_original"]
    assert figures["nll_converted"] == pytest.approx(figures["nll_original"], abs=1e-4)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(save_model, dtype):
    figures, _ = run(save_model(), dtype=dtype)
    assert figures["cache_bytes_per_token_converted"] == 2 * (24 + 3 * 8) * 2
    assert 0 < figures["logit_diff"] < 0.2


@pytest.mark.usefixtures("brief")
def test_markup_in_prompts_is_text(save_model):
    _, printed = run(save_model(), prompt="[bold]x[/nothing]")
    assert "[bold]x[/nothing]" in printed.getvalue()


def test_scored_prompts_are_not_calibrated_on():
    assert not set(demo.CALIBRATION_PROMPTS) & {*demo.HELD_OUT_PROMPTS, demo.DEFAULT_PROMPT}
    assert demo.DEFAULT_PROMPT not in demo.HELD_OUT_PROMPTS


@pytest.mark.usefixtures("brief")
def test_a_built_in_prompt_is_not_calibrated_on(save_model, monkeypatch):
    batches = []
    real = demo.Chat.answer
    monkeypatch.setattr(
        demo.Chat, "answer", lambda self, prompts, *rest: batches.append(len(prompts)) or real(self, prompts, *rest)
    )
    run(save_model(), prompt=demo.CALIBRATION_PROMPTS[0])
    assert batches[0] == len(demo.CALIBRATION_PROMPTS) - 1


@pytest.fixture
def chat(save_model):
    folder = save_model()
    with demo.Progress(console=Console(file=io.StringIO())) as progress:
        yield demo.Chat(
            transformers.AutoModelForCausalLM.from_pretrained(folder).eval(),
            transformers.AutoTokenizer.from_pretrained(folder),
            progress,
        )


def test_prompts_are_wrapped_by_the_chat_template(chat):
    assert chat.tokenizer.decode(chat.encode("Hi there")) == "<user>Hi there<end><bot>"


def test_answers_of_a_batch_are_those_of_single_prompts(chat):
    prompts = [chat.encode(text) for text in ("A", "A longer prompt", "B?")]
    batch = chat.answer(prompts, 12, "batch")
    for prompt, dialogue in zip(prompts, batch, strict=True):
        (alone,) = chat.answer([prompt], 12, "alone")
        assert torch.equal(dialogue.prompt, prompt)
        assert torch.equal(dialogue.answer, alone.answer)


def test_answers_end_with_the_end_token(chat):
    chat.ends = [7, 9]
    assert chat._until_end(torch.tensor([3, 9, 4, 7])).tolist() == [3, 9]
    assert chat._until_end(torch.tensor([3, 4])).tolist() == [3, 4]


@torch.no_grad()
def test_nll_is_the_mean_over_answer_tokens(chat):
    dialogues = [
        demo.Dialogue(torch.tensor([5, 6, 7]), torch.tensor([8, 9])),
        demo.Dialogue(torch.tensor([10]), torch.tensor([11, 12, 13])),
    ]
    losses = []
    for dialogue in dialogues:
        logits = chat.model(dialogue.ids[None]).logits[0].double().log_softmax(-1)
        start = len(dialogue.prompt)
        losses += [-logits[start + i - 1, token].item() for i, token in enumerate(dialogue.answer)]
    assert chat.nll(dialogues) == pytest.approx(sum(losses) / 5, rel=1e-5)


@torch.no_grad()
def test_step_logits_are_those_of_the_whole_text(chat):
    dialogue = demo.Dialogue(torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10]))
    expected = chat.model(dialogue.ids[None]).logits[0, 3:]
    torch.testing.assert_close(chat.step_logits(dialogue, "steps"), expected, rtol=0, atol=1e-4)


def test_bad_input(save_model, tmp_path, monkeypatch):
    folder = save_model()
    with pytest.raises(ValueError, match="prompt is empty"):
        run(folder, prompt="  ")
    with pytest.raises(ValueError, match=r"json_path .* is in a folder that does not exist"):
        run(folder, json_path=tmp_path / "nowhere" / "figures.json")
    monkeypatch.setattr(demo.Chat, "answer", lambda *args: pytest.fail("generated before the options were checked"))
    with pytest.raises(ValueError, match="rank is 90, expected 1 to 72"):
        run(folder, rank=90)
    with pytest.raises(ValueError, match="d_pe is 5, expected an even number"):
        run(folder, d_pe=5)
    other = tmp_path / "other"
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=300)
    ).save_pretrained(other)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    with pytest.raises(NotImplementedError, match="model is of type 'gpt2'"):
        run(other)


@pytest.mark.gpu
@pytest.mark.usefixtures("brief")
def test_the_demo_shape_decodes_on_tilelang(save_model):
    """Nine heads, three rope heads, dv 192, d_pe 32: the layer of the model the demo downloads."""
    folder = save_model(n_heads=9, n_kv_heads=3, hidden=576, head_dim=64, layers=1)
    figures, _ = run(folder, device="cuda", rank=192, d_pe=32)
    hopper = torch.cuda.get_device_capability() == (9, 0) and importlib.util.find_spec("tilelang") is not None
    assert figures["backend"] == ("tilelang" if hopper else "torch")
    assert figures["cache_bytes_per_token_converted"] == (192 + 3 * 32) * 2
    assert 0 < figures["logit_diff"] < 0.5


@pytest.mark.slow
def test_the_real_model_stays_fluent():
    """SmolLM2-135M-Instruct, downloaded where it is not cached, with the defaults."""
    figures = demo.run(device="cpu", console=Console(file=io.StringIO()))
    assert figures["nll_original"] < 0.8
    assert figures["nll_converted"] < 1.3
    assert figures["logit_diff"] <= 1e-3
    assert figures["cache_bytes_per_token_original"] == 46080
    assert figures["cache_bytes_per_token_converted"] == 34560
    assert "light" in figures["answer_converted"]
