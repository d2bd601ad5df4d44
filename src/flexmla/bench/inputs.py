"""Random inputs of a case, and what a right result for them is: latent attention, and the MHA it stands in for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .case import Case

MHA_HEAD_DIM = 128
READ_CHUNK = 16384  # int32 values that one program reads


class Inputs(Protocol):
    """One set of inputs on a device."""

    @classmethod
    def random(cls, case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
        """Standard normal inputs of a case (zeros would run faster than real data does)."""

    @staticmethod
    def n_bytes(case: Case) -> int:
        """Bytes a step must move: the visible cache once, the query and the output."""

    @staticmethod
    def held_bytes(case: Case) -> int:
        """Bytes of device memory that the inputs and the output take."""

    @staticmethod
    def flop(case: Case) -> int:
        """Operations of a step."""

    def expected(self) -> tuple[Tensor, Tensor]:
        """The result in float32, from the same values: `[batch, q_len, n_heads, width]`, `[batch, n_heads, q_len]`."""


@dataclass(frozen=True)
class LatentInputs:
    """What `flexmla.mla_decode` takes.

    A paged cache is merged: `ckv` and `kpe` are views into rows `[n_pages, page_size, dv + n_rope_heads * d_pe]`, and
    the pages of the batch lie in it in random order.

    Attributes:
        case: where they belong.
        q_nope: `[batch, q_len, n_heads, dv]`.
        q_pe: `[batch, q_len, n_heads, d_pe]`, None where d_pe is 0.
        ckv: `[batch, max_len, dv]` or `[n_pages, page_size, dv]`.
        kpe: `[batch, max_len, n_rope_heads, d_pe]` or `[n_pages, page_size, n_rope_heads, d_pe]`, None where d_pe is 0.
        seq_lens: int32 `[batch]`.
        block_table: int32 `[batch, max_len / page_size]`, -1 past a row's pages; None for contiguous caches.
        score_scale: float32 `[batch, max_len, n_rope_heads]` or `[n_pages, page_size, n_rope_heads]`, between 0.5 and
            1.5, or None.
    """

    case: Case
    q_nope: Tensor
    q_pe: Tensor | None
    ckv: Tensor
    kpe: Tensor | None
    seq_lens: Tensor
    block_table: Tensor | None
    score_scale: Tensor | None

    @classmethod
    def random(cls, case: Case, device: torch.device, generator: torch.Generator) -> LatentInputs:
        shape, b, slots = case.shape, case.batch, case.slots
        rope = (shape.n_rope_heads, shape.d_pe)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, dtype=case.dtype, device=device, generator=generator)

        kpe = None
        if case.page_size:
            rows = normal(*slots, shape.dv + shape.n_rope_heads * shape.d_pe)
            ckv = rows[..., : shape.dv]
            if shape.d_pe:
                kpe = rows[..., shape.dv :].unflatten(-1, rope)
        else:
            ckv = normal(*slots, shape.dv)
            if shape.d_pe:
                kpe = normal(*slots, *rope)
        score_scale = None
        if case.score_scale:
            score_scale = torch.rand((*slots, shape.n_rope_heads), device=device, generator=generator) + 0.5
        return cls(
            case=case,
            q_nope=normal(b, case.q_len, shape.n_heads, shape.dv),
            q_pe=normal(b, case.q_len, shape.n_heads, shape.d_pe) if shape.d_pe else None,
            ckv=ckv,
            kpe=kpe,
            seq_lens=torch.tensor(case.row_lens, dtype=torch.int32, device=device),
            block_table=_random_table(case, device, generator) if case.page_size else None,
            score_scale=score_scale,
        )

    @staticmethod
    def n_bytes(case: Case) -> int:
        return case.n_bytes

    @staticmethod
    def held_bytes(case: Case) -> int:
        return case.held_bytes

    @staticmethod
    def flop(case: Case) -> int:
        return case.flop

    @property
    def softmax_scale(self) -> float:
        """The default of `mla_decode`: `(dv + d_pe) ** -0.5`."""
        return (self.case.shape.dv + self.case.shape.d_pe) ** -0.5

    def expected(self) -> tuple[Tensor, Tensor]:
        """A batch row at a time, so that copies are of one row's visible cache."""
        with _full_float32():
            rows = [self._expected_row(b) for b in range(self.case.batch)]
        return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])

    def _expected_row(self, b: int) -> tuple[Tensor, Tensor]:
        """`[q_len, n_heads, dv]` and `[n_heads, q_len]` of row b."""
        shape, q_len, n = self.case.shape, self.case.q_len, self.case.row_lens[b]
        out = torch.zeros((q_len, shape.n_heads, shape.dv), device=self.ckv.device)
        lse = torch.full((shape.n_heads, q_len), float("-inf"), device=self.ckv.device)
        ckv, kpe, score_scale = (self._visible(cache, b) for cache in (self.ckv, self.kpe, self.score_scale))
        assert ckv is not None, "every cache has latents"
        for i in range(q_len):
            end = n - q_len + i + 1
            if end <= 0:  # the query is older than the row's first token
                continue
            scores = torch.einsum("hd,td->ht", self.q_nope[b, i].float(), ckv[:end])
            if self.q_pe is not None and kpe is not None:
                q_pe = self.q_pe[b, i].float().unflatten(0, (shape.n_rope_heads, -1))  # [g, rep, d_pe]
                scores += torch.einsum("grp,tgp->grt", q_pe, kpe[:end]).flatten(0, 1)
            scores *= self.softmax_scale
            if score_scale is not None:
                scores *= score_scale[:end].T.repeat_interleave(shape.n_heads // shape.n_rope_heads, 0)
            if self.case.softcap:
                scores = self.case.softcap * torch.tanh(scores / self.case.softcap)
            out[i] = torch.einsum("ht,td->hd", scores.softmax(-1), ckv[:end])
            lse[:, i] = scores.logsumexp(-1)
        return out, lse

    def _visible(self, cache: Tensor | None, b: int) -> Tensor | None:
        """The visible tokens of row b in float32, `[seq_len, ...]`."""
        if cache is None:
            return None
        n = self.case.row_lens[b]
        if self.block_table is None:
            return cache[b, :n].float()
        pages = self.block_table[b, : -(-n // self.case.page_size)]
        return cache[pages].flatten(0, 1)[:n].float()


def _random_table(case: Case, device: torch.device, generator: torch.Generator) -> Tensor:
    """Gives every row of a paged case its pages, in random order: `[batch, max_len / page_size]`."""
    column = torch.arange(case.max_len // case.page_size, device=device)
    used = column < torch.tensor(case.row_pages, device=device)[:, None]
    table = torch.full(used.shape, -1, dtype=torch.int32, device=device)
    table[used] = torch.randperm(case.slots[0], device=device, generator=generator).int()
    return table


@dataclass(frozen=True)
class MHAInputs:
    """A plain multi-head cache of `n_heads` x 128 keys and values: what a model holds before its conversion.

    For one query token and full, contiguous rows.

    Attributes:
        case: the latent case it stands beside.
        q: `[batch, n_heads, 1, 128]`.
        k, v: `[batch, n_heads, max_len, 128]`.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device, generator: torch.Generator) -> MHAInputs:
        q, k, v = (
            torch.randn(
                (case.batch, case.shape.n_heads, n, MHA_HEAD_DIM), dtype=case.dtype, device=device, generator=generator
            )
            for n in (1, case.max_len, case.max_len)
        )
        return cls(case, q, k, v)

    @staticmethod
    def n_bytes(case: Case) -> int:
        rows = 2 * case.tokens + 2 * case.batch * case.q_len
        return rows * case.shape.n_heads * MHA_HEAD_DIM * case.dtype.itemsize

    @staticmethod
    def held_bytes(case: Case) -> int:
        return MHAInputs.n_bytes(case)

    @staticmethod
    def flop(case: Case) -> int:
        return 4 * case.shape.n_heads * case.q_len * case.tokens * MHA_HEAD_DIM

    def expected(self) -> tuple[Tensor, Tensor]:
        rows = []
        with _full_float32():
            for q, k, v in zip(self.q, self.k, self.v, strict=True):
                scores = torch.einsum("hid,htd->hit", q.float(), k.float()) * MHA_HEAD_DIM**-0.5
                rows.append((torch.einsum("hit,htd->ihd", scores.softmax(-1), v.float()), scores.logsumexp(-1)))
        return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


@dataclass(frozen=True)
class ReadInputs:
    """As many bytes as a step must move, for a contender that only reads them.

    Attributes:
        case: the latent case it stands beside.
        chunks: int32 `[n_chunks, READ_CHUNK]`; what is left over of the bytes is not there.
    """

    case: Case
    chunks: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device, generator: torch.Generator) -> ReadInputs:
        size = (max(1, case.n_bytes // (4 * READ_CHUNK)), READ_CHUNK)
        return cls(case, torch.randint(-(2**31), 2**31, size, dtype=torch.int32, device=device, generator=generator))

    @staticmethod
    def n_bytes(case: Case) -> int:
        return case.n_bytes

    @staticmethod
    def held_bytes(case: Case) -> int:
        return case.n_bytes

    @staticmethod
    def flop(case: Case) -> int:
        return 0

    def expected(self) -> tuple[Tensor, Tensor]:
        """The sum of each chunk, as int32 wraps: `[1, 1, n_chunks, 1]`, and nothing else to compare."""
        sums = torch.stack([chunk.sum(dtype=torch.int64) for chunk in self.chunks])
        wrapped = (sums + 2**31) % 2**32 - 2**31
        return wrapped.int()[None, None, :, None], torch.zeros((1, 1, 1), device=sums.device)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products in float32, not TF32, whatever the process has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
