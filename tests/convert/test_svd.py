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


def test_whitened_latent_has_unit_covariance(matrix, activations):
    covariance = activations.T @ activations / len(activations)
    _, down = low_rank(matrix, 5, whitening_factor(covariance, eps=0.0))
    torch.testing.assert_close(down @ covariance @ down.T, torch.eye(5, dtype=torch.float64))


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
