"""Low-rank factors of a projection, plain or weighted by the activations it sees."""

from __future__ import annotations

import torch
from torch import Tensor


def whitening_factor(covariance: Tensor, eps: float = 1e-6) -> Tensor:
    """The Cholesky factor `S` of `S S^T = covariance + eps * mean(diag(covariance)) * I`.

    Args:
        covariance: `X^T X / n` of the calibration activations, `[hidden, hidden]`.
        eps: ridge relative to the mean variance; it keeps S invertible where the activations span less than the space.

    Returns:
        float64 lower triangular `[hidden, hidden]`.

    Raises:
        ValueError: the matrix is not square, or not a finite positive semi-definite covariance.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"covariance has shape {list(covariance.shape)}, expected [hidden, hidden]")
    cov = covariance.double()
    ridge = eps * cov.diagonal().mean()
    factor, info = torch.linalg.cholesky_ex(cov + ridge * torch.eye(len(cov), dtype=cov.dtype, device=cov.device))
    if info.item() != 0 or not bool(factor.isfinite().all()):
        raise ValueError("covariance is not a finite positive semi-definite matrix; check the calibration activations")
    return factor


def low_rank(matrix: Tensor, rank: int, whitening: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factor `matrix ~ up @ down` at the given rank.

    Plain: the truncated SVD `J = U diag(s) V^T` minimises `|J - up down|` in the Frobenius norm. With a whitening
    factor `S` (`S S^T = X^T X / n`) the SVD is taken of `J S` and undone by `S^-1`, which minimises the error of the
    *outputs* on the calibration activations, `|X (J - up down)^T|` (as SVD-LLM, https://arxiv.org/abs/2403.07378). In
    both cases `up = U diag(s)` and `down = V^T S^-1`. Whitened latents `down x` would have unit covariance; they are
    scaled by powers of two, so that a row of `down` is about as long as its column of `up`, and neither leaves the
    range of float16 where activations are small or few.

    Args:
        matrix: `J`, `[out, hidden]`.
        rank: 1 to min(out, hidden); at that maximum the product is exact.
        whitening: `S`, lower triangular `[hidden, hidden]`, or None.

    Returns:
        `up [out, rank]` and `down [rank, hidden]`, both float64.

    Raises:
        ValueError: no matrix, values that are not finite, a rank outside its range, or a whitening factor of another
            size.
    """
    if matrix.ndim != 2:
        raise ValueError(f"matrix has shape {list(matrix.shape)}, expected [out, hidden]")
    if not bool(matrix.isfinite().all()):
        raise ValueError("matrix holds values that are not finite")
    n_out, hidden = matrix.shape
    if not 1 <= rank <= min(n_out, hidden):
        raise ValueError(
            f"rank is {rank}, expected 1 to {min(n_out, hidden)}, the full rank of the {n_out} x {hidden} projection"
        )
    target = matrix.double()
    if whitening is not None:
        if tuple(whitening.shape) != (hidden, hidden):
            raise ValueError(f"whitening has shape {list(whitening.shape)}, expected {[hidden, hidden]}")
        target = target @ whitening.double()
    u, s, vh = torch.linalg.svd(target, full_matrices=False)
    up, down = u[:, :rank] * s[:rank], vh[:rank]
    if whitening is not None:
        down = torch.linalg.solve_triangular(whitening.double(), down, upper=False, left=False)
        least = torch.finfo(torch.float64).tiny
        balance = (up.norm(dim=0).clamp(min=least) / down.norm(dim=1).clamp(min=least)).log2().div(2).round().exp2()
        up, down = up / balance, down * balance[:, None]
    return up.contiguous(), down.contiguous()
