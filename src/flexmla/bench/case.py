"""One decode step to measure: its sizes, and how many bytes and operations it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexmla.shape import MLAShape, Scoring


@dataclass(frozen=True)
class Case:
    """One decode step to measure, causal.

    Attributes:
        suite: the suite it belongs to.
        shape: the layer.
        batch: rows.
        max_len: tokens that a row's cache has room for; a multiple of `page_size` where the cache is paged.
        dtype: of queries and caches.
        label: the model or models it stands for, for people.
        score_scale: whether a float32 `score_scale`, `n_rope_heads` wide, is passed.
        softcap: cap of the scores, 0 for none.
        q_len: query tokens a row.
        page_size: tokens a page, 0 for contiguous caches.
        lens: visible tokens of each row; None where every row is full (`max_len`).

    Raises:
        ValueError: where a size is out of range, or sizes contradict each other.
    """

    suite: str
    shape: MLAShape
    batch: int
    max_len: int
    dtype: torch.dtype = torch.float16
    label: str = ""
    score_scale: bool = False
    softcap: float = 0.0
    q_len: int = 1
    page_size: int = 0
    lens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch", self.batch, 1),
            ("max_len", self.max_len, 1),
            ("q_len", self.q_len, 1),
            ("page_size", self.page_size, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.shape.v_width is not None:
            raise ValueError(f"shape must have no v_width in a bench case, got {self.shape.v_width}")
        if self.page_size and self.max_len % self.page_size:
            raise ValueError(f"max_len must be a multiple of page_size {self.page_size}, got {self.max_len}")
        if self.lens is None:
            return
        if len(self.lens) != self.batch:
            raise ValueError(f"lens must hold a length for each of the {self.batch} rows, got {len(self.lens)}")
        for n in self.lens:
            if not 0 <= n <= self.max_len:
                raise ValueError(f"lens must be 0 to max_len {self.max_len}, got {n}")
        if self.tokens == 0:
            raise ValueError("lens must hold a visible token, got only 0")

    @classmethod
    def ragged(cls, suite: str, shape: MLAShape, lens: Sequence[int], *, page_size: int = 0, **options: Any) -> Case:
        """A case whose rows have these lengths, in a cache with just room for the longest."""
        longest = max((1, *lens))  # of lengths that are all 0 the case itself says so
        max_len = -(-longest // page_size) * page_size if page_size > 0 else longest
        return cls(suite, shape, len(lens), max_len, page_size=page_size, lens=tuple(lens), **options)

    @property
    def scoring(self) -> Scoring:
        """What is done to scores."""
        return Scoring.of_layer(self.shape, self.softcap, self.score_scale)

    @property
    def row_lens(self) -> tuple[int, ...]:
        """Visible tokens of each row."""
        return (self.max_len,) * self.batch if self.lens is None else self.lens

    @property
    def row_pages(self) -> tuple[int, ...]:
        """Pages that each row uses, of a paged cache."""
        return tuple(-(-n // self.page_size) for n in self.row_lens)

    @property
    def slots(self) -> tuple[int, int]:
        """The first two dimensions of the caches: `batch, max_len`, or the pages that are in use and `page_size`."""
        return (sum(self.row_pages), self.page_size) if self.page_size else (self.batch, self.max_len)

    @property
    def tokens(self) -> int:
        """Visible tokens, summed over the batch."""
        return sum(self.row_lens)

    @property
    def n_bytes(self) -> int:
        """Bytes a step must move: the visible cache once, the query and the output."""
        return self._bytes(self.tokens)

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that caches, queries and output take: what no query sees is there too."""
        slots, slot_len = self.slots
        return self._bytes(slots * slot_len)

    def _bytes(self, cached_tokens: int) -> int:
        shape = self.shape
        per_token = shape.bytes_per_token(self.dtype) + (4 * shape.n_rope_heads if self.score_scale else 0)
        per_head = (shape.dv + shape.d_pe + shape.out_width) * self.dtype.itemsize
        return cached_tokens * per_token + self.batch * self.q_len * shape.n_heads * per_head

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
        """Rows, lengths, page size and query tokens for people, `1 x 128K + 63 x 1K, page 64, q_len 2`."""
        groups = Counter(self.row_lens)
        if len(groups) <= 3:
            size = " + ".join(f"{count} x {_short(n)}" for n, count in groups.items())
        else:
            size = f"{self.batch} x {_short(min(groups))}..{_short(max(groups))}"
        if self.page_size:
            size += f", page {self.page_size}"
        return size if self.q_len == 1 else f"{size}, q_len {self.q_len}"


def _short(n: int) -> str:
    return f"{n // 1024}K" if n and n % 1024 == 0 else str(n)
