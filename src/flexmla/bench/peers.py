"""What is timed: flexmla itself, the peers that PyTorch brings, and the floor, a read of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flexmla
from flexmla.plan import plan_scored

from .case import Case
from .inputs import READ_CHUNK, Inputs, LatentInputs, MHAInputs, ReadInputs
from .report import FLOOR

TORCH_BACKEND = "flexmla-torch"


@dataclass(frozen=True)
class Contender:
    """Something that decodes a case.

    Attributes:
        name: as rows and tables have it.
        inputs: the kind of inputs it takes.
        decode: from such inputs to `[batch, q_len, n_heads, width]`, and `lse [batch, n_heads, q_len]` or None.
    """

    name: str
    inputs: type[Inputs]
    decode: Callable[[Any], tuple[Tensor, Tensor | None]]


def flexmla_contender(case: Case, device: torch.device, given: bool = False) -> Contender:
    """`flexmla.mla_decode` with its plan: `flexmla` on the TileLang kernels, `flexmla-torch` on the torch backend.

    Args:
        given: whether `out` and `lse` are the caller's, the same ones each time; the name then ends in `-into`.
    """
    plan = plan_scored(
        case.shape,
        case.batch,
        case.max_len,
        q_len=case.q_len,
        page_size=case.page_size or None,
        dtype=case.dtype,
        device=device,
        scoring=case.scoring,
    )
    out = lse = None
    if given:
        shape, rows = case.shape, case.batch
        out = torch.empty(rows, case.q_len, shape.n_heads, shape.dv, dtype=case.dtype, device=device)
        lse = torch.empty(rows, shape.n_heads, case.q_len, device=device)

    def decode(inputs: LatentInputs) -> tuple[Tensor, Tensor]:
        return _decode(inputs, out=out, lse=lse, plan=plan, backend=plan.backend)

    name = ("flexmla" if plan.backend == "tilelang" else TORCH_BACKEND) + ("-into" if given else "")
    return Contender(name, LatentInputs, decode)


def _decode(inputs: LatentInputs, **arguments: Any) -> tuple[Tensor, Tensor]:
    """`flexmla.mla_decode` of the inputs; `arguments` are added."""
    return flexmla.mla_decode(
        inputs.q_nope,
        inputs.q_pe,
        inputs.ckv,
        inputs.kpe,
        seq_lens=inputs.seq_lens,
        block_table=inputs.block_table,
        softcap=inputs.case.softcap,
        score_scale=inputs.score_scale,
        **arguments,
    )


def torch_eager(inputs: LatentInputs) -> tuple[Tensor, None]:
    """Absorbed MLA the way one writes it in PyTorch, in the inputs' dtype: two batched products, softmax, one more."""
    groups = inputs.case.shape.n_rope_heads
    scores = inputs.q_nope[:, 0] @ inputs.ckv.mT  # [b, h, n]
    if inputs.q_pe is not None and inputs.kpe is not None:
        q_pe = inputs.q_pe[:, 0].unflatten(1, (groups, -1))  # [b, g, rep, d_pe]
        scores = scores + (q_pe @ inputs.kpe.permute(0, 2, 3, 1)).flatten(1, 2)
    scores = scores * inputs.softmax_scale
    if inputs.score_scale is not None:
        rep = inputs.case.shape.n_heads // groups
        scores = scores * inputs.score_scale.mT.to(scores.dtype).repeat_interleave(rep, 1)
    if inputs.case.softcap:
        scores = inputs.case.softcap * torch.tanh(scores / inputs.case.softcap)
    return (scores.softmax(-1) @ inputs.ckv)[:, None], None


def torch_backend(inputs: LatentInputs) -> tuple[Tensor, Tensor]:
    """`flexmla.mla_decode` without kernels of its own."""
    return _decode(inputs, backend="torch")


def sdpa_mha(inputs: MHAInputs) -> tuple[Tensor, None]:
    """PyTorch's flash attention over the cache of the original multi-head model."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v).transpose(1, 2), None


def read(inputs: ReadInputs) -> tuple[Tensor, None]:
    """No peer but the floor: the step's bytes are read and added up, and nothing else is done."""
    from .read_kernel import read_sum

    n_chunks = inputs.chunks.shape[0]
    sums = inputs.chunks.new_empty(n_chunks)
    read_sum[(n_chunks,)](inputs.chunks, sums, 1, READ_CHUNK // 4, 4, num_warps=4)
    return sums[None, None, :, None], None


PEERS = (
    Contender(FLOOR, ReadInputs, read),
    Contender("torch-eager", LatentInputs, torch_eager),
    Contender(TORCH_BACKEND, LatentInputs, torch_backend),
    Contender("sdpa-mha", MHAInputs, sdpa_mha),
)


def peers_of(case: Case) -> tuple[Contender, ...]:
    """The peers that a case can be compared with: they take one query token and full, contiguous rows only."""
    return PEERS if case.q_len == 1 and case.page_size == 0 and case.lens is None else ()
