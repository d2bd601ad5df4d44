from __future__ import annotations

import pytest
import torch

from flexmla.convert import ActivationStats, AttentionWeights

HEADS, GROUPS, HEAD_DIM, HIDDEN = 4, 2, 6, 10


@pytest.fixture
def weights() -> AttentionWeights:
    torch.manual_seed(0)
    return AttentionWeights(
        torch.randn(HEADS * HEAD_DIM, HIDDEN),
        torch.randn(GROUPS * HEAD_DIM, HIDDEN),
        torch.randn(GROUPS * HEAD_DIM, HIDDEN),
        n_heads=HEADS,
        n_kv_heads=GROUPS,
        q_bias=torch.randn(HEADS * HEAD_DIM),
        k_bias=torch.randn(GROUPS * HEAD_DIM),
    )


def test_sums_do_not_depend_on_how_the_tokens_are_cut(weights):
    x = torch.randn(2, 7, HIDDEN)
    whole, parts = ActivationStats(weights), ActivationStats(weights)
    whole.update(x)
    for token in x.flatten(0, 1):
        parts.update(token)
    assert whole.n_tokens == parts.n_tokens == 14
    flat = x.flatten(0, 1).double()
    torch.testing.assert_close(whole.covariance, flat.T @ flat / 14)
    torch.testing.assert_close(parts.covariance, whole.covariance)
    torch.testing.assert_close(parts.pair_scores, whole.pair_scores)


def test_pair_scores_are_mean_norms_by_the_formula(weights):
    x = torch.randn(9, HIDDEN)
    stats = ActivationStats(weights)
    stats.update(x)
    q = (x @ weights.q_proj.T + weights.q_bias).view(9, HEADS, HEAD_DIM)
    k = (x @ weights.k_proj.T + weights.k_bias).view(9, GROUPS, HEAD_DIM)
    half = HEAD_DIM // 2
    for g in range(GROUPS):
        for f in range(half):
            products = [
                (q[i, h, f].hypot(q[i, h, f + half]) * k[j, g, f].hypot(k[j, g, f + half])).item()
                for h in (2 * g, 2 * g + 1)
                for i in range(9)
                for j in range(9)
            ]
            assert stats.pair_scores[g, f].item() == pytest.approx(sum(products) / len(products), rel=1e-5)


def test_misuse(weights):
    stats = ActivationStats(weights)
    for name in ("covariance", "pair_scores"):
        with pytest.raises(ValueError, match="no calibration activations were given"):
            getattr(stats, name)
    with pytest.raises(ValueError, match=r"x has shape \[3, 4\], expected \[..., 10\]"):
        stats.update(torch.ones(3, 4))
