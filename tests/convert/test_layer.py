"""A converted layer against the attention it stands for, written out by the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexmla import MLAShape
from flexmla.convert import ActivationStats, AttentionWeights, MLAWeights, check_options, convert_attention

HEAD_DIM, HIDDEN, TOKENS = 8, 40, 11
CAUSAL = torch.ones(TOKENS, TOKENS).tril().bool()


def make(n_heads: int, n_kv_heads: int, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> AttentionWeights:
    generator = torch.Generator().manual_seed(n_heads)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows_q, rows_kv = n_heads * HEAD_DIM, n_kv_heads * HEAD_DIM
    return AttentionWeights(
        tensor(rows_q, HIDDEN) / HIDDEN**0.5,
        tensor(rows_kv, HIDDEN) / HIDDEN**0.5,
        tensor(rows_kv, HIDDEN) / HIDDEN**0.5,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        q_bias=tensor(rows_q) if bias else None,
        k_bias=tensor(rows_kv) if bias else None,
        v_bias=tensor(rows_kv) if bias else None,
    )


def inputs() -> Tensor:
    return torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def stats_of(weights: AttentionWeights) -> ActivationStats:
    stats = ActivationStats(weights)
    stats.update(torch.randn(300, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(8)))
    return stats


def rotate(vectors: Tensor, freq: Tensor) -> Tensor:
    """RoPE of one head: `[tokens, width]` by the angles `position * freq`, the second half of freq like the first."""
    angle = torch.arange(TOKENS)[:, None] * freq
    first, second = vectors.chunk(2, dim=-1)
    return vectors * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()


def frequencies(dims: Tensor) -> Tensor:
    """The original frequency of each dimension of a head."""
    return 10000.0 ** (-(dims % (HEAD_DIM // 2)).double() / (HEAD_DIM // 2))


def partial_rope_attention(weights: AttentionWeights, x: Tensor, rope_index: Tensor) -> Tensor:
    """Causal attention of the original weights with RoPE on the kept dimensions: `[tokens, n_heads, D]`."""
    heads, groups = weights.n_heads, weights.n_kv_heads

    def project(weight: Tensor, bias: Tensor | None, n: int) -> Tensor:
        return (x @ weight.T + (0 if bias is None else bias)).view(TOKENS, n, HEAD_DIM)

    q = project(weights.q_proj, weights.q_bias, heads)
    k = project(weights.k_proj, weights.k_bias, groups)
    v = project(weights.v_proj, weights.v_bias, groups)
    out = torch.empty(TOKENS, heads, HEAD_DIM, dtype=torch.float64)
    for h in range(heads):
        g = h // (heads // groups)
        kept = torch.zeros(HEAD_DIM, dtype=torch.float64)
        kept[rope_index[g]] = 1
        freq = frequencies(torch.arange(HEAD_DIM)) * kept  # a dimension that is not kept does not turn
        scores = rotate(q[:, h], freq) @ rotate(k[:, g], freq).T * HEAD_DIM**-0.5
        out[:, h] = scores.masked_fill(~CAUSAL, -torch.inf).softmax(-1) @ v[:, g]
    return out


def mla_attention(weights: MLAWeights, x: Tensor, *, absorbed: bool) -> Tensor:
    """The converted layer by the formulas of `MLAWeights`: `[tokens, n_heads, D]`."""
    heads, groups, p = weights.n_heads, weights.n_kv_heads, weights.d_pe
    q = (x @ weights.q_proj.T + (0 if weights.q_bias is None else weights.q_bias)).view(TOKENS, heads, HEAD_DIM)
    q_c, q_pe = q.split([HEAD_DIM - p, p], dim=-1)
    k_pe = x @ weights.k_rope_proj.T + (0 if weights.k_rope_bias is None else weights.k_rope_bias)
    k_pe = k_pe.view(TOKENS, groups, p)
    c_k = x @ weights.down_k.T
    c_v = c_k if weights.down_v is None else x @ weights.down_v.T
    out = torch.empty(TOKENS, heads, HEAD_DIM, dtype=torch.float64)
    for h in range(heads):
        g = h // (heads // groups)
        up_k, up_v = weights.up_k[g], weights.up_v[g]
        freq = frequencies(weights.rope_index[g])
        nope = (q_c[:, h] @ up_k) @ c_k.T if absorbed else q_c[:, h] @ (c_k @ up_k.T).T
        scores = (nope + rotate(q_pe[:, h], freq) @ rotate(k_pe[:, g], freq).T) * weights.scale
        probabilities = scores.masked_fill(~CAUSAL, -torch.inf).softmax(-1)
        out[:, h] = (probabilities @ c_v) @ up_v.T if absorbed else probabilities @ (c_v @ up_v.T)
        if weights.v_bias is not None:
            out[:, h] += weights.v_bias[g]
    return out


FULL = {(4, 4): {4: 40, 8: 32, 0: 40}, (4, 2): {4: 24, 8: 16, 0: 32}, (3, 1): {4: 12, 8: 8, 0: 16}}


@pytest.mark.parametrize("heads", FULL)
@pytest.mark.parametrize("d_pe", [0, 4, 8])
@pytest.mark.parametrize("rope_dims", ["high", "low", "uniform", "2-norm"])
@pytest.mark.parametrize("bias", [False, True])
def test_full_rank_joint_conversion_is_exact(heads, d_pe, rope_dims, bias):
    weights, x = make(*heads, bias=bias), inputs()
    stats = stats_of(weights) if rope_dims == "2-norm" else None
    converted = convert_attention(weights, rank=FULL[heads][d_pe], d_pe=d_pe, rope_dims=rope_dims, stats=stats)
    expected = partial_rope_attention(weights, x, converted.rope_index)
    for absorbed in (True, False):
        torch.testing.assert_close(mla_attention(converted, x, absorbed=absorbed), expected, rtol=0, atol=1e-10)


def test_with_all_rotary_dimensions_the_original_attention_comes_back():
    weights, x = make(4, 2), inputs()
    converted = convert_attention(weights, rank=16, d_pe=8)
    original = partial_rope_attention(weights, x, torch.arange(8).expand(2, 8))
    torch.testing.assert_close(mla_attention(converted, x, absorbed=True), original, rtol=0, atol=1e-10)


@pytest.mark.parametrize("whiten", [False, True])
def test_full_rank_split_conversion_is_exact(whiten):
    weights, x = make(4, 2), inputs()
    converted = convert_attention(
        weights, rank=(8, 16), d_pe=4, rope_dims="high", svd="split", stats=stats_of(weights), whiten=whiten
    )
    assert converted.shape == MLAShape(4, 2, dv=8, d_pe=4, v_width=16)
    expected = partial_rope_attention(weights, x, converted.rope_index)
    for absorbed in (True, False):
        torch.testing.assert_close(mla_attention(converted, x, absorbed=absorbed), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("svd", ["joint", "split"])
def test_absorbed_equals_decompressed_below_full_rank(svd):
    weights, x = make(4, 2), inputs()
    converted = convert_attention(weights, rank=6, d_pe=4, svd=svd, stats=stats_of(weights))
    absorbed, decompressed = (mla_attention(converted, x, absorbed=mode) for mode in (True, False))
    torch.testing.assert_close(absorbed, decompressed, rtol=0, atol=1e-12)
    exact = partial_rope_attention(weights, x, converted.rope_index)
    assert (absorbed - exact).norm() > 1e-3 * exact.norm(), "rank 6 loses something, or this test shows nothing"


def test_whitening_helps_on_the_activations_it_saw():
    weights = make(4, 2)
    scales = torch.logspace(0, -2, HIDDEN, dtype=torch.float64)
    x = torch.randn(500, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * scales
    stats = ActivationStats(weights)
    stats.update(x)

    def value_error(whiten: bool) -> float:
        c = convert_attention(weights, rank=8, d_pe=4, stats=stats, whiten=whiten)
        values = torch.einsum("tl,gdl->tgd", x @ c.down_k.T, c.up_v).flatten(1)
        return (values - x @ weights.v_proj.T).norm().item()

    assert value_error(True) < 0.7 * value_error(False)


def test_defaults_depend_on_the_calibration():
    weights, stats = make(4, 2), None
    plain = convert_attention(weights, rank=6, d_pe=4)
    assert plain.rope_index.tolist() == [[0, 2, 4, 6]] * 2
    stats = stats_of(weights)
    calibrated = convert_attention(weights, rank=6, d_pe=4, stats=stats)
    explicit = convert_attention(weights, rank=6, d_pe=4, rope_dims="2-norm", stats=stats, whiten=True)
    assert torch.equal(calibrated.down_k, explicit.down_k)
    assert torch.equal(calibrated.rope_index, explicit.rope_index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_result_keeps_the_dtype_and_the_originals(dtype):
    weights = make(4, 2, dtype=dtype)
    before = [weights.q_proj.clone(), weights.k_proj.clone(), weights.v_proj.clone()]
    converted = convert_attention(weights, rank=6, d_pe=4)
    tensors = [converted.q_proj, converted.down_k, converted.k_rope_proj, converted.up_k, converted.up_v]
    assert {t.dtype for t in tensors} == {dtype}
    assert converted.rope_index.dtype == torch.int64
    assert [list(t.shape) for t in tensors] == [[32, HIDDEN], [6, HIDDEN], [8, HIDDEN], [2, 4, 6], [2, 8, 6]]
    for old, new in zip(before, (weights.q_proj, weights.k_proj, weights.v_proj), strict=True):
        assert torch.equal(old, new)
    assert converted.scale == HEAD_DIM**-0.5
    assert converted.shape.bytes_per_token(dtype) == (6 + 2 * 4) * dtype.itemsize
    moved = converted.to(dtype=torch.float32)
    assert moved.up_k.dtype == torch.float32
    assert moved.rope_index.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0, expected 1 to 24, the full rank of the joint keys and values"),
        ({"rank": 25}, "rank is 25, expected 1 to 24"),
        ({"rank": (6, 6)}, r"rank is \(6, 6\), expected one number with joint SVD"),
        (
            {"rank": (9, 6), "svd": "split"},
            r"rank is \(9, 6\), expected 1 to 8 for the keys and 1 to 16 for the values",
        ),
        ({"rank": (1, 2, 3), "svd": "split"}, r"rank is \(1, 2, 3\), expected 1 to 8"),
        ({"rank": 9, "svd": "split"}, "rank is 9, expected 1 to 8 for the keys"),
        ({"d_pe": 8, "svd": "split"}, "d_pe is head_dim 8, which leaves split SVD no unrotated keys"),
        ({"d_pe": 3}, "d_pe is 3, expected an even number from 0 to head_dim 8"),
        ({"d_pe": 10}, "d_pe is 10, expected an even number from 0 to head_dim 8"),
        ({"svd": "both"}, "svd is 'both', expected 'joint' or 'split'"),
        ({"rope_dims": "best"}, "rope_dims is 'best', expected one of high, low, uniform, 2-norm"),
        ({"rope_dims": "2-norm"}, "'2-norm' needs calibration activations"),
        ({"whiten": True}, "whiten=True needs calibration activations"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        convert_attention(make(4, 2), **({"rank": 6, "d_pe": 4} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_pe": "4"}, "d_pe is '4', expected an int"),
        ({"d_pe": 4.0}, "d_pe is 4.0, expected an int"),
        ({"rank": True}, "rank is True, expected an int"),
        ({"rank": (1.5, 2), "svd": "split"}, "rank is 1.5, expected an int"),
    ],
)
def test_ranks_and_widths_are_ints(options, message):
    with pytest.raises(TypeError, match=message):
        convert_attention(make(4, 2), **({"rank": 6, "d_pe": 4} | options))


def test_statistics_of_something_else_are_refused():
    weights = make(4, 2)
    with pytest.raises(TypeError, match="stats is str, expected ActivationStats"):
        convert_attention(weights, rank=6, d_pe=4, stats="x")
    with pytest.raises(ValueError, match="stats are of a layer with other sizes"):
        convert_attention(weights, rank=6, d_pe=4, stats=stats_of(make(4, 1)))


def test_values_that_are_not_finite_are_refused():
    weights = make(4, 2)
    broken = replace(weights, k_proj=weights.k_proj.clone().fill_diagonal_(torch.inf))
    with pytest.raises(ValueError, match="k_proj holds values that are not finite"):
        convert_attention(broken, rank=6, d_pe=4)
    large = replace(make(4, 2, dtype=torch.float16), v_proj=torch.full((16, HIDDEN), 6e4).half())
    with pytest.raises(ValueError, match=r"up_v does not fit torch.float16; convert in float32 or bfloat16"):
        convert_attention(large, rank=6, d_pe=4)


def test_check_options_tells_the_ranks():
    weights = make(4, 2)
    assert check_options(weights, rank=6, d_pe=4) == (6, 6)
    assert check_options(weights, rank=(3, 5), d_pe=4, svd="split") == (3, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q_proj": torch.ones(32)}, ValueError, r"q_proj has shape \[32\], expected \[n_heads \* head_dim, hidden\]"),
        ({"q_proj": torch.ones(32, HIDDEN, dtype=torch.int8)}, TypeError, "q_proj is torch.int8; conversion takes"),
        ({"q_proj": torch.ones(32, HIDDEN, device="meta")}, ValueError, "q_proj is on the meta device"),
        (
            {"q_proj": torch.ones(28, HIDDEN)},
            ValueError,
            "q_proj has 28 rows, expected n_heads 4 times an even head_dim",
        ),
        ({"k_proj": None}, TypeError, "k_proj is NoneType, expected a tensor"),
        ({"n_kv_heads": 3}, ValueError, "n_heads 4 is not a positive multiple of n_kv_heads 3"),
        ({"n_kv_heads": 0}, ValueError, "n_heads 4 is not a positive multiple of n_kv_heads 0"),
        ({"k_proj": torch.ones(24, HIDDEN)}, ValueError, r"k_proj has shape \[24, 40\], expected \[16, 40\]"),
        ({"v_proj": torch.ones(16, 41)}, ValueError, r"v_proj has shape \[16, 41\], expected \[16, 40\]"),
        ({"v_proj": torch.ones(16, HIDDEN).half()}, TypeError, "v_proj is torch.float16, but q_proj is torch.float64"),
        ({"q_bias": "x"}, TypeError, "q_bias is str, expected a tensor"),
        ({"q_bias": torch.ones(16)}, ValueError, r"q_bias has shape \[16\], expected \[32\]"),
        ({"k_bias": torch.ones(32)}, ValueError, r"k_bias has shape \[32\], expected \[16\]"),
        ({"v_bias": torch.ones(16, device="meta").double()}, ValueError, "v_bias is on meta, but q_proj is on cpu"),
    ],
)
def test_bad_weights(change, error, message):
    with pytest.raises(error, match=message):
        replace(make(4, 2), **change)
