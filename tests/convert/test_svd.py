from __future__ import annotations

import pytest
import torch

from flexmla.convert import low_rank, whitening_factor


@pytest.fixture
def activations() -> torch.Tensor:
    """Activations with very unequal directions, `[tokens, hidden]`."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    return torch.randn(400, 12, dtype=torch.float64, generator=generator) * torch.logspace(0, -3, 12).double() @ mix


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_full_rank_is_exact(matrix, activations):
    for whitening in (None, whitening_factor(activations.T @ activations / len(activations))):
        up, down = low_rank(matrix, 12, whitening)
        assert (up.shape, down.shape) == ((20, 12), (12, 12))
        torch.testing.assert_close(up @ down, matrix, rtol=0, atol=1e-10)


def test_plain_truncation_is_the_best_approximation(matrix):
    up, down = low_rank(matrix, 5)
    error = torch.linalg.matrix_norm(matrix - up @ down)
    # Eckart-Young: the error of the best rank-5 approximation is the norm of the dropped singular values.
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix)[5:].norm())


def test_whitened_truncation_is_the_best_on_the_activations(matrix, activations):
    covariance = activations.T @ activations / len(activations)
    whitening = whitening_factor(covariance, eps=0.0)
    up, down = low_rank(matrix, 5, whitening)
    error = torch.linalg.matrix_norm(activations @ (matrix - up @ down).T)
    best = torch.linalg.svdvals(activations @ matrix.T)[5:].norm()
    torch.testing.assert_close(error, best)
    plain_up, plain_down = low_rank(matrix, 5)
    assert torch.linalg.matrix_norm(activations @ (matrix - plain_up @ plain_down).T) > 1.5 * error


def test_whitened_latents_are_uncorrelated_and_both_factors_alike(matrix, activations):
    covariance = activations.T @ activations / len(activations)
    up, down = low_rank(matrix, 5, whitening_factor(covariance, eps=0.0))
    variances = down @ covariance @ down.T
    torch.testing.assert_close(variances, variances.diagonal().diag())
    halvings = variances.diagonal().log2() / 2
    torch.testing.assert_close(halvings, halvings.round())  # unit variance, times powers of two
    ratio = up.norm(dim=0) / down.norm(dim=1)
    assert bool(((ratio >= 0.5) & (ratio <= 2)).all())


@pytest.mark.parametrize("std", [1e-4, 0.005, 1.0])
def test_whitened_factors_keep_their_precision_in_half(std):
    """Of few and small activations the inverse of the whitening is huge, and what it is multiplied with tiny."""
    generator = torch.Generator().manual_seed(3)
    activations = std * torch.randn(40, 64, dtype=torch.float64, generator=generator)
    matrix = torch.randn(48, 64, dtype=torch.float64, generator=generator) / 8
    up, down = (x.half().double() for x in low_rank(matrix, 48, whitening_factor(activations.T @ activations / 40)))
    assert torch.linalg.matrix_norm(up @ down - matrix) < 2e-3 * torch.linalg.matrix_norm(matrix)


def test_what_is_no_finite_matrix_is_refused(matrix):
    with pytest.raises(ValueError, match=r"matrix has shape \[2, 3, 4\], expected \[out, hidden\]"):
        low_rank(torch.ones(2, 3, 4), 1)
    matrix[0, 0] = torch.nan
    with pytest.raises(ValueError, match="matrix holds values that are not finite"):
        low_rank(matrix, 5)


def test_whitening_factor_adds_a_ridge_to_a_singular_covariance():
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    covariance = x.T @ x / 3
    factor = whitening_factor(covariance, eps=1e-3)
    ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.T, covariance + ridge)
    assert torch.equal(factor, factor.tril())


@pytest.mark.parametrize("rank", [0, 13, -1])
def test_rank_outside_its_range(matrix, rank):
    with pytest.raises(ValueError, match=f"rank is {rank}, expected 1 to 12, the full rank of the 20 x 12 projection"):
        low_rank(matrix, rank)


def test_bad_covariances(matrix):
    with pytest.raises(ValueError, match=r"covariance has shape \[3, 4\]"):
        whitening_factor(torch.ones(3, 4))
    for bad in (-torch.eye(3), torch.full((3, 3), torch.nan), torch.full((3, 3), torch.inf), torch.zeros(3, 3)):
        with pytest.raises(ValueError, match="covariance is not a finite positive semi-definite matrix"):
            whitening_factor(bad)
    with pytest.raises(ValueError, match=r"whitening has shape \[3, 3\], expected \[12, 12\]"):
        low_rank(matrix, 4, torch.eye(3))
