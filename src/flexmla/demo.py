"""`flexmla demo`: a real model, converted to MLA, answers beside the original."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from .convert import check_options
from .plan import plan
from .weights import load_model

# What the original writes to these is what the conversion is calibrated on.
CALIBRATION_PROMPTS = (
    "Explain how plants make food from sunlight.",
    "Write a short story about a dragon who is afraid of fire.",
    "Give me a simple recipe for pancakes.",
    "What are the main differences between a city and a village?",
    "Write a Python function that checks whether a number is prime.",
    "Tell me about the history of the Roman Empire.",
    "How can I sleep better at night?",
    "What is the meaning of friendship?",
    "Explain what a computer program is to a child.",
    "List five tips for saving money.",
)
# Answers to these, and to the user's prompt, are what both models are scored on.
HELD_OUT_PROMPTS = (
    "Why do seasons change during the year?",
    "Who was Marie Curie, and why is she famous?",
    "How do I start learning to draw?",
    "Explain the difference between weather and climate.",
)
DEFAULT_PROMPT = "Explain in simple words why the sky is blue."
CALIBRATION_TOKENS = 160
ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Dialogue:
    """Token ids of a prompt and of an answer to it, int64 `[tokens]` each, without padding."""

    prompt: Tensor
    answer: Tensor

    @property
    def ids(self) -> Tensor:
        return torch.cat([self.prompt, self.answer])


class Chat:
    """A model with its tokenizer and a progress display.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; without a chat template, prompts go in as they are.
        progress: a running rich display.
    """

    def __init__(self, model: Any, tokenizer: Any, progress: Progress) -> None:
        self.model, self.tokenizer, self.progress = model, tokenizer, progress
        ends = model.generation_config.eos_token_id
        self.ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def encode(self, prompt: str) -> Tensor:
        """int64 `[tokens]`, on the CPU."""
        text = prompt
        if self.tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids: Tensor = self.tokenizer(
            text, return_tensors="pt", add_special_tokens=self.tokenizer.chat_template is None
        ).input_ids[0]
        return ids

    def decode(self, ids: Tensor) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    @torch.no_grad()
    def answer(self, prompts: Sequence[Tensor], max_new_tokens: int, label: str) -> list[Dialogue]:
        """Greedy answers to prompts of any lengths, in one left-padded batch, with a bar that counts tokens."""
        length = max(len(ids) for ids in prompts)
        pad = self.ends[0] if self.ends else 0
        batch = torch.stack([F.pad(ids, (length - len(ids), 0), value=pad) for ids in prompts])
        mask = torch.stack([F.pad(torch.ones_like(ids), (length - len(ids), 0)) for ids in prompts])
        task = self.progress.add_task(label, total=max_new_tokens)

        def count(ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            self.progress.advance(task)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        out = self.model.generate(
            batch.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            stopping_criteria=[count],
        )
        self.progress.update(task, completed=max_new_tokens)
        return [Dialogue(ids, self._until_end(row)) for ids, row in zip(prompts, out[:, length:].cpu(), strict=True)]

    def _until_end(self, ids: Tensor) -> Tensor:
        """Cut after the first end token."""
        ends = torch.isin(ids, torch.tensor(self.ends, dtype=ids.dtype)).nonzero()
        return ids[: int(ends[0]) + 1] if len(ends) else ids

    def timed_answer(self, prompt: Tensor, label: str) -> tuple[Dialogue, float]:
        """The answer to one prompt and the tokens a second it was written at, prefill included."""
        if self.model.device.type == "cuda":
            self.answer([prompt], ANSWER_TOKENS, f"{label}, warm-up")  # compiles what a first run compiles
            torch.cuda.synchronize(self.model.device)
        began = time.perf_counter()
        (dialogue,) = self.answer([prompt], ANSWER_TOKENS, label)
        return dialogue, len(dialogue.answer) / (time.perf_counter() - began)

    @torch.no_grad()
    def nll(self, dialogues: Sequence[Dialogue]) -> float:
        """Mean negative log-likelihood, in nats, of the answers' tokens."""
        total, n_tokens = 0.0, 0
        for dialogue in dialogues:
            logits = self.model(dialogue.ids[None].to(self.model.device)).logits[0, len(dialogue.prompt) - 1 : -1]
            target = dialogue.answer.to(logits.device)
            total += F.cross_entropy(logits.float(), target, reduction="sum").item()
            n_tokens += len(target)
        return total / n_tokens

    @torch.no_grad()
    def cache_bytes_per_token(self, prompt: Tensor) -> int:
        """Bytes one token takes in the caches of all layers, counted from the tensors."""
        cache = self.model(prompt[None].to(self.model.device), use_cache=True).past_key_values
        return int(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)) // len(prompt)

    @torch.no_grad()
    def step_logits(self, dialogue: Dialogue, label: str) -> Tensor:
        """Logits after each answer token fed alone on top of the prompt's cache, float32 `[tokens, vocabulary]`."""
        ids = dialogue.ids[None].to(self.model.device)
        cache = self.model(ids[:, : len(dialogue.prompt)], use_cache=True).past_key_values
        # transformers 5.24 renamed the argument
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        steps = range(len(dialogue.prompt), ids.shape[1])
        logits = []
        for i in self.progress.track(steps, description=label):
            logits.append(self.model(ids[:, i : i + 1], **{name: cache}).logits[0, -1].float())
        return torch.stack(logits)


def run(
    *,
    prompt: str = DEFAULT_PROMPT,
    rank: int = 192,
    d_pe: int = 32,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    weights: Path | None = None,
    json_path: Path | None = None,
    console: Console | None = None,
) -> dict[str, str | float | int]:
    """Convert a model with activation-whitened joint SVD and compare it with the original.

    The original answers built-in prompts; these texts calibrate the conversion. Then both models answer `prompt`, and
    are scored on the original's answers to it and to prompts that were not calibrated on.

    Args:
        prompt: what both models answer.
        rank: latent width of the converted model.
        d_pe: rotary dimensions it keeps in each head.
        device: default: CUDA where there is a GPU.
        dtype: what the models run in. Default: float32 on a CPU, bfloat16 on CUDA. The conversion starts from float32.
        weights: a .gguf file or model folder; default: SmolLM2-135M-Instruct, downloaded once.
        json_path: file for the figures.
        console: where to print.

    Returns:
        The figures: `answer_original`, `answer_converted`, `nll_original`, `nll_converted` (nats a token), `logit_diff`
        (largest difference between decoding through `mla_decode` and decoding the same converted weights decompressed),
        `cache_bytes_per_token_original`, `cache_bytes_per_token_converted`, `tokens_per_second_original`,
        `tokens_per_second_converted`, `backend`, `device`, `seconds`.

    Raises:
        ImportError: transformers, gguf or accelerate is missing.
        ValueError: rank or d_pe do not fit the model, an empty prompt, or paths that do not exist.
        NotImplementedError: a model that is not a Llama.
        RuntimeError: the model could not be fetched or read.
    """
    began = time.perf_counter()
    console = console or Console()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if not prompt.strip():
        raise ValueError("prompt is empty, expected a text for the models to answer")
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise ValueError(f"json_path {json_path} is in a folder that does not exist")

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        model, tokenizer = _load(weights, progress)
        from . import hf  # after load_model, which says what is missing

        check_options(hf.attention_weights(model)[0], rank=rank, d_pe=d_pe)
        chat = Chat(model.to(device), tokenizer, progress)
        calibration = [chat.encode(text) for text in CALIBRATION_PROMPTS if text != prompt]
        texts = [d.ids[None] for d in chat.answer(calibration, CALIBRATION_TOKENS, "Original writes calibration texts")]
        task = progress.add_task("Converting", total=None)
        converted = hf.convert_model(
            model,
            rank=rank,
            d_pe=d_pe,
            calibration=texts,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )

        model.to(dtype)
        question = chat.encode(prompt)
        original, speed_original = chat.timed_answer(question, "Original answers")
        held_out = [chat.encode(text) for text in HELD_OUT_PROMPTS if text != prompt]
        scored = [original, *chat.answer(held_out, ANSWER_TOKENS, "Original answers held-out prompts")]
        nll_original, bytes_original = chat.nll(scored), chat.cache_bytes_per_token(question)

        max_len = len(question) + ANSWER_TOKENS
        chosen = plan(converted[0].shape, 1, max_len, dtype=dtype, device=device)
        # Named, so that what is reported is what runs.
        hf.patch_model(model, converted, backend=chosen.backend)
        answer, speed_converted = chat.timed_answer(question, "Converted answers")
        nll_converted, bytes_converted = chat.nll(scored), chat.cache_bytes_per_token(question)
        absorbed = chat.step_logits(original, "Decoding absorbed")
        hf.set_decode_mode(model, "decompressed")
        decompressed = chat.step_logits(original, "Decoding decompressed")

    result: dict[str, str | float | int] = {
        "answer_original": chat.decode(original.answer),
        "answer_converted": chat.decode(answer.answer),
        "nll_original": nll_original,
        "nll_converted": nll_converted,
        "logit_diff": (absorbed - decompressed).abs().max().item(),
        "cache_bytes_per_token_original": bytes_original,
        "cache_bytes_per_token_converted": bytes_converted,
        "tokens_per_second_original": speed_original,
        "tokens_per_second_converted": speed_converted,
        "backend": chosen.backend,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "seconds": time.perf_counter() - began,
    }
    _show(console, prompt, result, f"{converted[0].shape}", str(dtype).removeprefix("torch."), chosen.reason)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _load(weights: Path | None, progress: Progress) -> tuple[Any, Any]:
    download = progress.add_task("Downloading SmolLM2-135M-Instruct", total=None, visible=False)
    loading = progress.add_task("Loading the model", total=None)

    def downloaded(done: int, total: int) -> None:
        progress.update(download, completed=done, total=total, visible=True)

    loaded = load_model(weights, progress=downloaded)
    progress.update(loading, total=1, completed=1)
    return loaded


def _show(console: Console, prompt: str, result: dict[str, Any], shape: str, dtype: str, reason: str) -> None:
    """Both answers and the figures."""
    for kind in ("original", "converted"):
        console.print(Panel(Text(result[f"answer_{kind}"]), title=Text(f"{kind}: {prompt}"), title_align="left"))
    saving = 1 - result["cache_bytes_per_token_converted"] / result["cache_bytes_per_token_original"]
    table = Table("", "original", "converted")
    for name, key, form in (
        ("NLL of the original's answers (nats a token)", "nll", "{:.3f}"),
        ("cache bytes a token", "cache_bytes_per_token", "{:,}"),
        ("tokens a second", "tokens_per_second", "{:.1f}"),
    ):
        table.add_row(name, *(form.format(result[f"{key}_{kind}"]) for kind in ("original", "converted")))
    console.print(table)
    console.print(f"cache saved: {saving:.1%}", highlight=False)
    console.print(f"largest logit difference, absorbed against decompressed decoding: {result['logit_diff']:.2e}")
    console.print(
        f"device: {result['device']}, {dtype}; backend: {result['backend']} ({escape(reason)})", highlight=False
    )
    console.print(f"converted layer: {shape}; {result['seconds']:.0f} s in all", highlight=False)
