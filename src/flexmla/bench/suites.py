"""What is measured: the cases of each suite."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from flexmla.models import model_shapes
from flexmla.shape import MLAShape

from .case import Case

SHARED = MLAShape(32, 1, 512, 16)  # Llama-2-7B at latent 16 a head, one shared rope key
PER_HEAD = MLAShape(32, 32, 512, 16)  # the same with a rope key a head, as MHA2MLA leaves it


def _cases(suite: str, shapes: Iterable[MLAShape], sizes: Sequence[tuple[int, int]], **options: Any) -> list[Case]:
    return [Case(suite, shape, batch, max_len, **options) for shape in shapes for batch, max_len in sizes]


_LLAMA2_SIZES = ((8, 2048), (8, 4096), (64, 2048), (64, 8192))


def _llama2() -> list[Case]:
    """One rope key that all heads share."""
    return _cases("llama2", [SHARED], _LLAMA2_SIZES)


def _per_head() -> list[Case]:
    """A rope key a head."""
    return _cases("per-head", [PER_HEAD], _LLAMA2_SIZES)


def _deepseek() -> list[Case]:
    """DeepSeek-V3's layer whole and split over 2, 8 and 16 ranks, and head counts between them."""
    long = _cases("deepseek", [MLAShape(h, 1, 512, 64) for h in (8, 16, 24, 40, 48, 64, 128)], [(64, 8192)])
    short = _cases("deepseek", [MLAShape(16, 1, 512, 64)], [(128, 1024)])
    return long + short + _cases("deepseek", [MLAShape(128, 1, 512, 64)], [(64, 4096), (128, 4096)])


def _small_latent() -> list[Case]:
    """Latents of 128 and 256, with shared and per-head rope keys."""
    shapes = [
        MLAShape(h, rope_heads, dv, d_pe)
        for dv in (128, 256)
        for h in (16, 24, 32)
        for rope_heads in (1, h)
        for d_pe in (16, 32)
    ]
    return _cases("small-latent", shapes, [(64, 8192)])


def _models() -> list[Case]:
    """Every model of `shapes.json`; models whose layers are the same share a case."""
    layers: dict[tuple[MLAShape, bool, float], list[str]] = {}
    for model in model_shapes():
        layers.setdefault((model.shape, model.score_scale, model.softcap), []).append(model.name)
    return [
        replace(case, label=", ".join(names), score_scale=score_scale, softcap=softcap)
        for (shape, score_scale, softcap), names in layers.items()
        for case in _cases("models", [shape], [(64, 8192), (8, 2048), (1, 128)])
    ]


def _paged() -> list[Case]:
    """Pages of every size for one long batch, pages of 64 for the smaller ones."""
    cases = []
    for shape, page_sizes in ((SHARED, (1, 2, 4, 8, 16, 32, 64, 128, 256)), (PER_HEAD, (1, 16, 64))):
        for page_size in page_sizes:
            cases += _cases("paged", [shape], [(64, 8192)], page_size=page_size)
        cases += _cases("paged", [shape], [(8, 2048), (8, 4096), (64, 2048)], page_size=64)
    return cases


def _ragged() -> list[Case]:
    """One very long row beside short ones and the same tokens in even rows; a mix of lengths; few and many rows."""
    uneven = [131072] + [1024] * 63
    even = [sum(uneven) // len(uneven)] * len(uneven)
    # Paged, as contiguous caches would have room for 128K tokens in all 64 rows.
    pair = [Case.ragged("ragged", SHARED, lens, page_size=64) for lens in (uneven, even)]
    mix = [Case.ragged("ragged", SHARED, mixed_lens(256, 8192))]
    return pair + mix + _cases("ragged", [SHARED], [(1, 32768), (1, 131072), (1024, 128)])


def mixed_lens(batch: int, longest: int) -> list[int]:
    """Lengths as a server sees them, the same every time: all magnitudes up to `longest` equally often, and one 0."""
    rng = random.Random(0)
    lens = [0, 1, longest] + [int(longest ** rng.random()) for _ in range(batch - 3)]
    rng.shuffle(lens)
    return lens


def _mtp() -> list[Case]:
    """Several query tokens a row, as speculative decoding verifies them, beside one."""
    size = [(64, 8192)]
    return [
        *(case for q_len in (1, 2, 4) for case in _cases("mtp", [MLAShape(16, 1, 512, 64)], size, q_len=q_len)),
        *_cases("mtp", [MLAShape(16, 1, 512, 64)], size, q_len=4, page_size=64),
        *(case for q_len in (1, 2) for case in _cases("mtp", [SHARED], size, q_len=q_len)),
        *_cases("mtp", [PER_HEAD], size, q_len=2),
        *_cases("mtp", [MLAShape(64, 1, 512, 64)], size, q_len=2),
    ]


SUITES: dict[str, Callable[[], list[Case]]] = {
    "llama2": _llama2,
    "per-head": _per_head,
    "deepseek": _deepseek,
    "small-latent": _small_latent,
    "models": _models,
    "paged": _paged,
    "ragged": _ragged,
    "mtp": _mtp,
}


def suite_cases(names: Iterable[str], dtype: torch.dtype = torch.float16) -> list[Case]:
    """The cases of the named suites, in order.

    Raises:
        ValueError: where a name is not a suite.
    """
    cases = []
    for name in names:
        if name not in SUITES:
            raise ValueError(f"suites must be among {', '.join(SUITES)}, got {name!r}")
        cases += [replace(case, dtype=dtype) for case in SUITES[name]()]
    return cases


def overhead_cases(dtype: torch.dtype = torch.float16) -> list[Case]:
    """Steps so small that the host is what takes time: contiguous, and paged."""
    return [Case("overhead", SHARED, 8, 128, dtype, page_size=page_size) for page_size in (0, 64)]
