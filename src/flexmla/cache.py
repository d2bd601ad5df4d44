"""`PagedLatentCache`: latents and rotary keys of many sequences in pages, one merged row a token."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import count, islice

import torch
from torch import Tensor

from .cache_rows import TokenRows
from .shape import MLAShape


class CacheFullError(RuntimeError):
    """The cache has too few free pages for a request; nothing was changed.

    Attributes:
        missing: pages the request needs beyond the free ones.
    """

    def __init__(self, needed: int, free: int) -> None:
        self.missing = needed - free
        super().__init__(
            f"the cache is full, pages missing: {self.missing} ({needed} more needed, {free} free); "
            "free sequences or make the cache with a larger n_pages"
        )


class CacheSequence:
    """A sequence of a `PagedLatentCache`, which made it and keeps its books in it.

    Attributes:
        number: counts the sequences of the cache in the order they were allocated.
    """

    __slots__ = ("_length", "_owner", "_pages", "number")

    def __init__(self, number: int, owner: object) -> None:
        self.number = number
        self._owner: object | None = owner
        self._pages: array[int] = array("i")
        self._length = 0

    def __repr__(self) -> str:
        state = "freed" if self._owner is None else f"length {self._length}, {len(self._pages)} pages"
        return f"<CacheSequence {self.number}: {state}>"


class PagedLatentCache:
    """The cache of one layer for any number of growing sequences, in pages that need not follow each other.

    A row of `storage` holds a token: its latent, then its rotary keys. Books are kept on the host, and no method
    synchronises with a GPU. With several layers, one cache keeps the books (`extend`) and the others follow (`write`).
    A cache is not to be changed by two threads at once, nor on two streams that do not wait for each other.

    Args:
        shape: of the layer; `v_width` must be None.
        n_pages: pages of the cache.
        page_size: tokens a page, a power of two from 1 to 256.
        dtype: float16, bfloat16 or float32.
        device: where the cache lives.

    Attributes:
        storage: `[n_pages, page_size, dv + n_rope_heads * d_pe]`, uninitialised.
        ckv_cache: `[n_pages, page_size, dv]`, its view for `flexmla.mla_decode`.
        kpe_cache: `[n_pages, page_size, n_rope_heads, d_pe]`, the same; None where d_pe is 0.

    Raises:
        TypeError: an argument's type or dtype.
        ValueError: an argument's value.
    """

    def __init__(
        self, shape: MLAShape, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        if not isinstance(shape, MLAShape):
            raise TypeError(f"shape must be an MLAShape, got {type(shape).__name__}")
        if shape.v_width is not None:
            raise ValueError(
                f"shape must have v_width None, got {shape.v_width}; for separate value latents take "
                f"dv = {shape.dv + shape.v_width} and split ckv_cache in two"
            )
        _check_count("n_pages", n_pages, 1)
        _check_count("page_size", page_size, 1)
        if page_size > 256 or page_size & (page_size - 1):
            raise ValueError(f"page_size must be a power of two from 1 to 256, got {page_size}")
        self.shape, self.n_pages, self.page_size = shape, n_pages, page_size
        self._rows = TokenRows(shape, n_pages * page_size, dtype, device)
        self.dtype, self.device = self._rows.dtype, self._rows.device
        self.storage, self.ckv_cache, self.kpe_cache = self._rows.paged(page_size)
        self._free = list(range(n_pages - 1, -1, -1))
        self._numbers = count()
        self._owner = object()

    @property
    def n_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def allocate(self, n_tokens: int = 0) -> CacheSequence:
        """A new sequence of length 0 that holds the pages of its first `n_tokens` tokens: they can always be appended.

        Raises:
            CacheFullError: too few free pages; a RuntimeError.
        """
        _check_count("n_tokens", n_tokens, 0)
        pages = self._next_pages(self._pages_for(n_tokens))
        sequence = CacheSequence(next(self._numbers), self._owner)
        self._commit([sequence], 0, [pages])
        return sequence

    def free(self, sequence: CacheSequence) -> None:
        """Returns the pages of a sequence, which cannot be used any more.

        Raises:
            ValueError: a sequence that was freed before or is of another cache.
        """
        self._check_live("sequence", sequence)
        self._free.extend(reversed(sequence._pages))
        sequence._owner, sequence._pages, sequence._length = None, array("i"), 0

    def length(self, sequence: CacheSequence) -> int:
        """Tokens in a sequence. Raises ValueError where it was freed or is of another cache."""
        self._check_live("sequence", sequence)
        return sequence._length

    def truncate(self, sequence: CacheSequence, length: int) -> None:
        """Keeps the first `length` tokens of a sequence (rejected draft tokens leave); its pages stay with it.

        Raises:
            ValueError: a length out of range; a sequence that was freed or is of another cache.
        """
        self._check_live("sequence", sequence)
        _check_count("length", length, 0)
        if length > sequence._length:
            raise ValueError(f"length must be at most the sequence's {sequence._length} tokens, got {length}")
        sequence._length = length

    def append(
        self,
        sequences: Sequence[CacheSequence],
        ckv: Tensor,
        kpe: Tensor | None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> None:
        """Adds `n_new` tokens to every sequence: `extend` and `write` in one. On any error nothing has changed.

        Args:
            sequences: different sequences of this cache.
            ckv: `[len(sequences), n_new, dv]`, the cache's dtype: latents.
            kpe: `[len(sequences), n_new, n_rope_heads, d_pe]`, the cache's dtype: rotary keys; None where d_pe is 0.
            cos: given with sin to apply RoPE (rotate-half) to kpe on its way, of a shape `write` takes; else None.
            sin: as cos.

        Raises:
            CacheFullError: too few free pages; a RuntimeError.
            TypeError, ValueError, RuntimeError: as `extend` and `write`.
        """
        sequences = self._live(sequences)
        n_new = self._rows.check((len(sequences), None), ckv, kpe, cos, sin)
        slots, grown = self._plan(sequences, n_new)
        self._rows.write(slots, ckv, kpe, cos, sin)
        self._commit(sequences, n_new, grown)

    def extend(self, sequences: Sequence[CacheSequence], n_new: int) -> Tensor:
        """Makes every sequence `n_new` tokens longer without writing them.

        Args:
            sequences: different sequences of this cache.
            n_new: tokens a sequence.

        Returns:
            int64 `[len(sequences), n_new]` on the cache's device, the slots of the new tokens for `write`:
            slot `s` is row `s % page_size` of page `s // page_size`.

        Raises:
            CacheFullError: too few free pages for all of them; a RuntimeError. Nothing has changed.
            ValueError: a sequence that was freed, is of another cache or comes twice.
            RuntimeError: in the capture of a CUDA graph, which would repeat these slots for ever.
        """
        sequences = self._live(sequences)
        _check_count("n_new", n_new, 0)
        slots, grown = self._plan(sequences, n_new)
        self._commit(sequences, n_new, grown)
        return slots

    def write(
        self, slots: Tensor, ckv: Tensor, kpe: Tensor | None, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> None:
        """Writes tokens into slots that `extend` returned, of this cache or of another layer's with the same pages.

        One kernel on CUDA with Triton, else PyTorch's operations. Slots are read on the device, so that a captured CUDA
        graph writes where the slots then point. With cos and sin a rotary key is stored as `k * cos + rotate_half(k) *
        sin` with `rotate_half([a, b]) = [-b, a]` on the halves of d_pe: the convention of transformers' Llama, of
        MHA2MLA and of `flexmla.hf`, here in float32 and rounded once.

        Args:
            slots: int64 `[batch, n_new]`, all different; negative ones are skipped (padding).
            ckv: `[batch, n_new, dv]`, the cache's dtype.
            kpe: `[batch, n_new, n_rope_heads, d_pe]`, the cache's dtype; None where d_pe is 0.
            cos: `[1 or batch, n_new, d_pe]`, one angle for all rotary keys of a token, or
                `[1 or batch, n_new, 1 or n_rope_heads, d_pe]`; float16, bfloat16 or float32.
            sin: as cos.

        Raises:
            TypeError: an argument's type or dtype.
            ValueError: a shape, stride or device; on CPU also a slot past the cache, which is skipped on CUDA.
            RuntimeError: an input that requires grad under grad mode.
        """
        self._rows.check_slots(slots)
        self._rows.check((slots.shape[0], slots.shape[1]), ckv, kpe, cos, sin)
        self._rows.write(slots, ckv, kpe, cos, sin)

    def block_table(self, sequences: Sequence[CacheSequence]) -> Tensor:
        """int32 `[len(sequences), max_pages]` on the cache's device, for `flexmla.mla_decode`.

        A row has the pages of a sequence in order, those reserved for coming tokens included, then zeros; `max_pages`
        is that of the sequence with most pages, and at least 1.

        Raises:
            ValueError: a sequence that was freed or is of another cache.
            RuntimeError: in the capture of a CUDA graph.
        """
        return self._upload(_padded([sequence._pages for sequence in self._live(sequences)]))

    def seq_lens(self, sequences: Sequence[CacheSequence]) -> Tensor:
        """int32 `[len(sequences)]` on the cache's device: tokens in each sequence, for `flexmla.mla_decode`.

        Raises:
            ValueError: a sequence that was freed or is of another cache.
            RuntimeError: in the capture of a CUDA graph.
        """
        lengths = [sequence._length for sequence in self._live(sequences)]
        return self._upload(torch.tensor(lengths, dtype=torch.int32, device="cpu"))

    def _plan(self, sequences: Sequence[CacheSequence], n_new: int) -> tuple[Tensor, list[list[int]]]:
        """Slots of `n_new` more tokens of every sequence and the free pages each one needs; changes nothing."""
        if len(set(sequences)) < len(sequences):
            twice = next(i for i, sequence in enumerate(sequences) if sequence in sequences[:i])
            raise ValueError(f"sequences must be different, got {sequences[twice]} again at sequences[{twice}]")
        size = self.page_size
        wanted = [max(self._pages_for(s._length + n_new) - len(s._pages), 0) for s in sequences]
        pages = iter(self._next_pages(sum(wanted)))
        grown = [list(islice(pages, n)) for n in wanted]
        if not sequences or n_new == 0:
            return torch.empty((len(sequences), n_new), dtype=torch.int64, device=self.device), grown
        touched = [
            s._pages[s._length // size : self._pages_for(s._length + n_new)] + array("i", new)
            for s, new in zip(sequences, grown, strict=True)
        ]
        first = torch.tensor([s._length % size for s in sequences], device="cpu")
        offset = first[:, None] + torch.arange(n_new, device="cpu")
        slots = _padded(touched).gather(1, offset // size).long().mul_(size).add_(offset % size)
        return self._upload(slots), grown

    def _commit(self, sequences: Sequence[CacheSequence], n_new: int, grown: list[list[int]]) -> None:
        del self._free[len(self._free) - sum(map(len, grown)) :]
        for sequence, pages in zip(sequences, grown, strict=True):
            sequence._pages.extend(pages)
            sequence._length += n_new

    def _pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    def _next_pages(self, n: int) -> list[int]:
        """The `n` free pages that are next to be taken; they stay in the free list."""
        left = len(self._free) - n
        if left < 0:
            raise CacheFullError(n, len(self._free))
        return self._free[left:][::-1]

    def _live(self, sequences: Sequence[CacheSequence]) -> Sequence[CacheSequence]:
        """`sequences`, or an error that names the one that is none of this cache."""
        if not isinstance(sequences, (list, tuple)):
            raise TypeError(f"sequences must be a list or tuple of sequences, got {type(sequences).__name__}")
        for i, sequence in enumerate(sequences):
            self._check_live(f"sequences[{i}]", sequence)
        return sequences

    def _check_live(self, name: str, sequence: CacheSequence) -> None:
        if not isinstance(sequence, CacheSequence):
            raise TypeError(f"{name} must be what allocate returned, got {type(sequence).__name__}")
        if sequence._owner is not self._owner:
            state = "that was freed" if sequence._owner is None else "of another cache"
            raise ValueError(f"{name} must be a live sequence of this cache, got sequence {sequence.number} {state}")

    def _upload(self, values: Tensor) -> Tensor:
        """Host numbers on the cache's device, without waiting for it."""
        if self.device.type != "cuda":
            return values.to(self.device)
        if torch.cuda.is_current_stream_capturing():
            # Every replay would find the numbers of the capture, or what else stands in that host memory by then.
            raise RuntimeError(
                "a CUDA graph is being captured, which would keep the sequences' present pages and lengths for ever: "
                "call append, extend, block_table and seq_lens before, and only write inside"
            )
        return values.pin_memory().to(self.device, non_blocking=True)


def _padded(rows: list[array[int]]) -> Tensor:
    """int32 `[len(rows), longest row, at least 1]` on the host, padded with page 0."""
    width = max([1, *map(len, rows)])
    values = array("i")
    for row in rows:
        values.extend(row)
        values.frombytes(bytes(values.itemsize * (width - len(row))))
    if not rows:
        return torch.zeros((0, width), dtype=torch.int32, device="cpu")
    return torch.frombuffer(values, dtype=torch.int32).view(len(rows), width)


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
