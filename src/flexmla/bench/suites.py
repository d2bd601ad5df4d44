"""What is measured: cases, how many bytes and operations they take, and the suites they come in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from flexmla.models import model_shapes
from flexmla.shape import MLAShape


@dataclass(frozen=True)
class Case:
    """One decode step to measure: contiguous caches, every row `max_len` tokens long.

    Attributes:
        suite: the suite it belongs to.
        shape: the layer.
        batch: rows.
        max_len: visible tokens a row.
        dtype: of queries and caches.
        label: the model or models it stands for, for people.
        score_scale: whether a float32 `score_scale [batch, max_len, n_rope_heads]` is passed.
        softcap: cap of the scores, 0 for none.
    """

    suite: str
    shape: MLAShape
    batch: int
    max_len: int
    dtype: torch.dtype = torch.float16
    label: str = ""
    score_scale: bool = False
    softcap: float = 0.0

    q_len = 1

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("max_len", self.max_len)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.shape.v_width is not None:
            raise ValueError(f"shape must have no v_width in a bench case, got {self.shape.v_width}")

    @property
    def tokens(self) -> int:
        """Visible tokens, summed over the batch."""
        return self.batch * self.max_len

    @property
    def n_bytes(self) -> int:
        """The visible cache once, the query and the output."""
        shape = self.shape
        per_token = shape.bytes_per_token(self.dtype) + (4 * shape.n_rope_heads if self.score_scale else 0)
        per_head = (shape.dv + shape.d_pe + shape.out_width) * self.dtype.itemsize
        return self.tokens * per_token + self.batch * self.q_len * shape.n_heads * per_head

    @property
    def flop(self) -> int:
        """Multiplications and additions of the two products: scores over dv + d_pe, values over the output's width."""
        shape = self.shape
        return 2 * shape.n_heads * self.q_len * self.tokens * (shape.dv + shape.d_pe + shape.out_width)

    def __str__(self) -> str:
        return f"{self.suite} {self.layer} {self.size}"

    @property
    def layer(self) -> str:
        """Heads, rope heads and widths for people, `32/1 512+16`."""
        return f"{self.shape.n_heads}/{self.shape.n_rope_heads} {self.shape.dv}+{self.shape.d_pe}"

    @property
    def size(self) -> str:
        """Batch and length for people, `64 x 8K`."""
        length = f"{self.max_len // 1024}K" if self.max_len % 1024 == 0 else str(self.max_len)
        return f"{self.batch} x {length}"


def _cases(suite: str, shapes: Iterable[MLAShape], sizes: Sequence[tuple[int, int]]) -> list[Case]:
    return [Case(suite, shape, batch, max_len) for shape in shapes for batch, max_len in sizes]


_LLAMA2_SIZES = ((8, 2048), (8, 4096), (64, 2048), (64, 8192))


def _llama2() -> list[Case]:
    """Llama-2-7B at latent 16 a head, one shared rope key."""
    return _cases("llama2", [MLAShape(32, 1, 512, 16)], _LLAMA2_SIZES)


def _per_head() -> list[Case]:
    """The same with a rope key a head, as MHA2MLA leaves it."""
    return _cases("per-head", [MLAShape(32, 32, 512, 16)], _LLAMA2_SIZES)


def _deepseek() -> list[Case]:
    """DeepSeek-V3's layer whole and split over 2, 8 and 16 ranks."""
    long = _cases("deepseek", [MLAShape(h, 1, 512, 64) for h in (8, 16, 64, 128)], [(64, 8192)])
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
        for case in _cases("models", [shape], [(64, 8192), (8, 2048)])
    ]


SUITES: dict[str, Callable[[], list[Case]]] = {
    "llama2": _llama2,
    "per-head": _per_head,
    "deepseek": _deepseek,
    "small-latent": _small_latent,
    "models": _models,
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
