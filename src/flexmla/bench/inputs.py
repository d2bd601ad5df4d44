"""Random inputs of a case, and what a right result for them is: latent attention, and the MHA it stands in for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .suites import Case

MHA_HEAD_DIM = 128


class Inputs(Protocol):
    """One set of inputs on a device."""

    @classmethod
    def random(cls, case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
        """Standard normal inputs of a case (zeros would run faster than real data does)."""

    @staticmethod
    def n_bytes(case: Case) -> int:
        """Bytes a step must move: the visible cache once, the query and the output."""

    @staticmethod
    def flop(case: Case) -> int:
        """Operations of a step."""

    def expected(self) -> tuple[Tensor, Tensor]:
        """The result in float32, from the same values: out `[batch, 1, n_heads, width]`, lse `[batch, n_heads, 1]`."""


@dataclass(frozen=True)
class LatentInputs:
    """What `flexmla.mla_decode` takes.

    Attributes:
        case: where they belong.
        q_nope: `[batch, 1, n_heads, dv]`.
        q_pe: `[batch, 1, n_heads, d_pe]`, None where d_pe is 0.
        ckv: `[batch, max_len, dv]`.
        kpe: `[batch, max_len, n_rope_heads, d_pe]`, None where d_pe is 0.
        seq_lens: int32 `[batch]`, all max_len.
        score_scale: float32 `[batch, max_len, n_rope_heads]` between 0.5 and 1.5, or None.
    """

    case: Case
    q_nope: Tensor
    q_pe: Tensor | None
    ckv: Tensor
    kpe: Tensor | None
    seq_lens: Tensor
    score_scale: Tensor | None

    @classmethod
    def random(cls, case: Case, device: torch.device, generator: torch.Generator) -> LatentInputs:
        shape, b, n = case.shape, case.batch, case.max_len

        def normal(*size: int) -> Tensor:
            return torch.randn(size, dtype=case.dtype, device=device, generator=generator)

        score_scale = None
        if case.score_scale:
            score_scale = torch.rand((b, n, shape.n_rope_heads), device=device, generator=generator) + 0.5
        return cls(
            case=case,
            q_nope=normal(b, 1, shape.n_heads, shape.dv),
            q_pe=normal(b, 1, shape.n_heads, shape.d_pe) if shape.d_pe else None,
            ckv=normal(b, n, shape.dv),
            kpe=normal(b, n, shape.n_rope_heads, shape.d_pe) if shape.d_pe else None,
            seq_lens=torch.full((b,), n, dtype=torch.int32, device=device),
            score_scale=score_scale,
        )

    @staticmethod
    def n_bytes(case: Case) -> int:
        return case.n_bytes

    @staticmethod
    def flop(case: Case) -> int:
        return case.flop

    @property
    def softmax_scale(self) -> float:
        """The default of `mla_decode`: `(dv + d_pe) ** -0.5`."""
        return (self.case.shape.dv + self.case.shape.d_pe) ** -0.5

    def expected(self) -> tuple[Tensor, Tensor]:
        """A batch row at a time, so that the float32 copy is one row's cache."""
        rows = [self._expected_row(b) for b in range(self.case.batch)]
        return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])

    def _expected_row(self, b: int) -> tuple[Tensor, Tensor]:
        groups = self.case.shape.n_rope_heads
        with _full_float32():
            ckv = self.ckv[b].float()  # [n, dv]
            scores = torch.einsum("hd,td->ht", self.q_nope[b, 0].float(), ckv)
            if self.q_pe is not None and self.kpe is not None:
                q_pe = self.q_pe[b, 0].float().unflatten(0, (groups, -1))  # [g, rep, d_pe]
                scores += torch.einsum("grp,tgp->grt", q_pe, self.kpe[b].float()).flatten(0, 1)
            scores *= self.softmax_scale
            if self.score_scale is not None:
                scores *= self.score_scale[b].T.repeat_interleave(self.case.shape.n_heads // groups, 0)
            if self.case.softcap:
                scores = self.case.softcap * torch.tanh(scores / self.case.softcap)
            return torch.einsum("ht,td->hd", scores.softmax(-1), ckv)[None], scores.logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class MHAInputs:
    """A plain multi-head cache of `n_heads` x 128 keys and values: what a model holds before its conversion.

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
    def flop(case: Case) -> int:
        return 4 * case.shape.n_heads * case.q_len * case.tokens * MHA_HEAD_DIM

    def expected(self) -> tuple[Tensor, Tensor]:
        rows = []
        with _full_float32():
            for q, k, v in zip(self.q, self.k, self.v, strict=True):
                scores = torch.einsum("hid,htd->hit", q.float(), k.float()) * MHA_HEAD_DIM**-0.5
                rows.append((torch.einsum("hit,htd->ihd", scores.softmax(-1), v.float()), scores.logsumexp(-1)))
        return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products in float32, not TF32, whatever the process has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
