"""The rows of a paged cache, `[latent | rotary keys]` a token: their layout, and writing new tokens into them."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .plan import device_record
from .shape import MLAShape

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SLOTS = (torch.int64,)
_TRITON_CAPABILITY = (8, 0)  # the least that Triton supports


class TokenRows:
    """Memory for `n_slots` tokens of one layer.

    Args:
        shape: of the layer.
        n_slots: tokens.
        dtype: float16, bfloat16 or float32.
        device: where the rows live.

    Attributes:
        rows: `[n_slots + 1, dv + n_rope_heads * d_pe]`, uninitialised. The last row belongs to no slot: PyTorch's
            operations cannot skip a token whose slot the host does not know, and write it there.
    """

    def __init__(self, shape: MLAShape, n_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        if dtype not in _DTYPES:
            raise TypeError(f"dtype must be {_either(_DTYPES)}, got {dtype}")
        device_record(device)  # which says in a sentence where there is no such device
        self.shape, self.n_slots, self.dtype = shape, n_slots, dtype
        self.rope_width = shape.n_rope_heads * shape.d_pe
        # An inference tensor could not be written to outside inference mode.
        with torch.inference_mode(False):
            self.rows = torch.empty((n_slots + 1, shape.dv + self.rope_width), dtype=dtype, device=device)
        self.device = self.rows.device

    def paged(self, page_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """All slots in pages, and the latents and rotary keys in them.

        Returns:
            `[n_pages, page_size, dv + n_rope_heads * d_pe]`, and views of it: `[n_pages, page_size, dv]` and
            `[n_pages, page_size, n_rope_heads, d_pe]` (None where d_pe is 0).
        """
        with torch.inference_mode(False):
            storage = self.rows[: self.n_slots].view(-1, page_size, self.rows.shape[1])
            ckv = storage[..., : self.shape.dv]
            if self.shape.d_pe == 0:
                return storage, ckv, None
            kpe = storage[..., self.shape.dv :].unflatten(2, (self.shape.n_rope_heads, self.shape.d_pe))
            return storage, ckv, kpe

    def check_slots(self, slots: Tensor) -> None:
        """Raises where `slots` are not int64 `[batch, n_new]` on this device, or on a CPU past the last."""
        shapes = [tuple(slots.shape)] if isinstance(slots, Tensor) and slots.dim() == 2 else []
        self._check("slots", slots, "[batch, n_new]", shapes, _SLOTS)
        if slots.is_cpu and slots.numel() and int(slots.max()) >= self.n_slots:
            raise ValueError(f"slots must be below n_pages * page_size = {self.n_slots}, got {int(slots.max())}")

    def check(
        self, tokens: tuple[int, int | None], ckv: Tensor, kpe: Tensor | None, cos: Tensor | None, sin: Tensor | None
    ) -> int:
        """Raises where `write` cannot take these arguments for `(batch, n_new)` tokens.

        Returns:
            `n_new`, which is ckv's where `tokens` leaves it open.
        """
        (batch, n_new), (dv, groups, d_pe) = tokens, (self.shape.dv, self.shape.n_rope_heads, self.shape.d_pe)
        if n_new is None:
            n_new = ckv.shape[1] if isinstance(ckv, Tensor) and ckv.dim() == 3 else -1
        dtypes = (self.dtype,)
        accepted = f"[batch, n_new, dv] = [{batch}, {n_new if n_new >= 0 else 'n_new'}, {dv}]"
        self._check("ckv", ckv, accepted, ((batch, n_new, dv),), dtypes)
        if d_pe == 0:
            for name, value in (("kpe", kpe), ("cos", cos), ("sin", sin)):
                if value is not None:
                    raise ValueError(f"{name} must be None for a shape of d_pe 0, got {type(value).__name__}")
            return n_new
        if kpe is None:
            raise ValueError(f"kpe must be given for a shape of d_pe {d_pe}, got None")
        accepted = f"[batch, n_new, n_rope_heads, d_pe] = [{batch}, {n_new}, {groups}, {d_pe}]"
        self._check("kpe", kpe, accepted, ((batch, n_new, groups, d_pe),), dtypes)
        if cos is None and sin is None:
            return n_new
        if d_pe % 2:
            raise ValueError(f"cos and sin must be None for an odd d_pe, which has no halves, got d_pe {d_pe}")
        accepted = f"[1 or {batch}, {n_new}, {d_pe}] or [1 or {batch}, {n_new}, 1 or {groups}, {d_pe}]"
        shapes = [(n, n_new, *heads, d_pe) for n in (1, batch) for heads in ((), (1,), (groups,))]
        for name, angles in (("cos", cos), ("sin", sin)):
            if angles is None:
                raise ValueError(f"{name} must be given where the other of cos and sin is, got None")
            self._check(name, angles, accepted, shapes, _DTYPES)
        return n_new

    def write(self, slots: Tensor, ckv: Tensor, kpe: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
        """Writes checked tokens into `slots`, int64 `[batch, n_new]`; a slot that does not exist is skipped."""
        if slots.numel() == 0:
            return
        if kpe is not None and cos is not None and sin is not None:
            cos, sin = (t.unsqueeze(2).expand_as(kpe) if t.dim() == 3 else t.expand_as(kpe) for t in (cos, sin))
        if self.device.type == "cuda" and _has_triton(self.device):
            from .cache_kernel import write_tokens

            with torch.cuda.device(self.device):
                write_tokens(self.rows, self.n_slots, slots, ckv, kpe, cos, sin)
            return
        if kpe is not None and cos is not None and sin is not None:
            kpe = _rotate(kpe, cos, sin)
        target = slots.reshape(-1)
        # Not `where`, which would copy the number to the device and wait.
        target = target.masked_fill((target < 0) | (target >= self.n_slots), self.n_slots)
        self.rows[:, : self.shape.dv].index_copy_(0, target, ckv.reshape(-1, self.shape.dv))
        if kpe is not None:
            self.rows[:, self.shape.dv :].index_copy_(0, target, kpe.reshape(-1, self.rope_width))

    def _check(
        self,
        name: str,
        tensor: Tensor,
        accepted: str,
        shapes: Collection[tuple[int, ...]],
        dtypes: tuple[torch.dtype, ...],
    ) -> None:
        """Raises where `tensor` is not of one of `shapes` and `dtypes`, here, with a contiguous last dimension."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {_either(dtypes)}, got {tensor.dtype}")
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} must be {accepted}, got {tuple(tensor.shape)}")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on the cache's device {self.device}, got {tensor.device}")
        # An empty tensor's strides say nothing: PyTorch leaves an expanded one as it is in `contiguous()`.
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have a contiguous last dimension (stride 1), got strides {tensor.stride()}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} requires grad, but the cache is inference only: use torch.no_grad()")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in float32, rounded to x's dtype; the order of operations is that of the kernel, for equal bits."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos.float() + torch.cat([-second, first], dim=-1) * sin.float()).to(x.dtype)


@cache
def _has_triton(device: torch.device) -> bool:
    """Whether the fused kernel runs there; Triton comes with CUDA builds of PyTorch, but not on every platform."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= _TRITON_CAPABILITY


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(str, dtypes))
