"""Moments, their damping and the factor of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_qep.algorithms.moments import Moments, cholesky_damped, damped, damped_in_place, ridge
from hf_qep.errors import IllConditionedError, NonFiniteError


def streams(tokens=60, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) + 1
    return x + 0.1 * torch.randn(tokens, width, generator=generator), x


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5))
def test_moments_are_the_direct_means_however_the_tokens_are_batched(cuts):
    xq, xf = streams()
    moments = Moments(7, cross=True)
    edges = [0, *sorted(cuts), 60]
    for start, stop in zip(edges, edges[1:], strict=False):
        moments.update(xq[start:stop], xf[start:stop])
    q, f = xq.double(), xf.double()
    assert moments.count == 60
    torch.testing.assert_close(moments.hessian().double(), q.T @ q / 60, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.cross().double(), (f - q).T @ q / 60, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.mean_quantized().double(), q.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments.mean_float().double(), f.mean(0), rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 59), seed=st.integers(0, 9))
def test_a_token_of_weight_two_counts_like_two_tokens(cut, seed):
    xq, xf = streams()
    gap = (xf - xq)[:, :3]
    times = torch.randint(1, 4, (60,), generator=torch.Generator().manual_seed(seed))
    weighted, repeated = Moments(7, cross=True, outputs=3), Moments(7, cross=True, outputs=3)
    for rows in (slice(0, cut), slice(cut, 60)):
        weighted.update(xq[rows], xf[rows], gap[rows], token_weight=times[rows].float() * 5)
        again = [t[rows].repeat_interleave(times[rows], 0) for t in (xq, xf, gap)]
        repeated.update(*again)
    assert weighted.count == 60
    for name in ("hessian", "cross", "take_output_gap", "mean_quantized", "mean_float", "mean_gap"):
        one, other = getattr(weighted, name)(), getattr(repeated, name)()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_centred_moments_give_the_regression_with_an_intercept():
    xq, xf = streams()
    weight = torch.randn(4, 7, generator=torch.Generator().manual_seed(5))
    wanted = xf @ weight.T
    moments = Moments(7, cross=True, outputs=4)
    moments.update(xq, xf, wanted - xq @ weight.T)
    design = torch.cat([xq, torch.ones(60, 1)], 1).double()
    best = torch.linalg.lstsq(design, wanted.double()).solution[:7].T
    H = moments.hessian(centered=True).double()
    for gap in (moments.take_output_gap(centered=True), weight @ moments.cross(centered=True)):
        found = weight.double() + torch.linalg.solve(H, gap.double().T).T
        torch.testing.assert_close(found, best, rtol=1e-2, atol=1e-3)


def test_the_ridge_fades_as_tokens_come():
    ridges = [ridge(0.03, 64, tokens) for tokens in (0, 1, 64, 640, 64_000_000)]
    assert ridges == sorted(ridges, reverse=True)
    assert ridges[-1] == pytest.approx(0.03, rel=1e-3) and ridges[2] > 1


def test_a_moment_that_was_not_kept_is_refused():
    with pytest.raises(ValueError, match="outputs"):
        Moments(2).take_output_gap()
    with pytest.raises(ValueError, match="cross=True"):
        Moments(2).cross()


def test_half_precision_tokens_are_summed_in_float32():
    x = torch.full((4096, 2), 0.1, dtype=torch.bfloat16)
    moments = Moments(2)
    moments.update(x)
    torch.testing.assert_close(moments.hessian(), torch.full((2, 2), x[0, 0].item() ** 2), rtol=1e-4, atol=0)


def test_moments_without_tokens_are_zero():
    moments = Moments(3, cross=True)
    moments.update(torch.empty(0, 3), torch.empty(0, 3))
    assert moments.count == 0 and not moments.hessian().any() and not moments.cross().any()


def test_activations_that_are_not_finite_are_refused():
    moments = Moments(2)
    moments.update(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        moments.hessian()


def test_a_cross_moment_needs_the_float_stream():
    with pytest.raises(ValueError, match="float stream"):
        Moments(2, cross=True).update(torch.ones(1, 2))


def test_damping_is_a_fraction_of_the_mean_diagonal_of_live_inputs():
    H = torch.diag(torch.tensor([1.0, 3.0, 0.0]))
    torch.testing.assert_close(damped(H, 0.1).diagonal(), torch.tensor([1.2, 3.2, 2.0]))
    torch.testing.assert_close(damped(torch.zeros(2, 2), 0.1), torch.eye(2))


def test_a_singular_hessian_has_a_factor_once_damped():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    factor, used = cholesky_damped(x.T @ x, 0.01)
    assert used == 0.01
    torch.testing.assert_close(factor @ factor.T, damped(x.T @ x, used), rtol=1e-4, atol=1e-4)


def test_a_factor_in_another_order_is_that_of_the_arranged_matrix():
    x = torch.randn(700, 300, generator=torch.Generator().manual_seed(0))
    H, order = x.T @ x / 700, torch.randperm(300, generator=torch.Generator().manual_seed(1))
    before = H.clone()
    assert torch.equal(cholesky_damped(H, 0.01, order)[0], cholesky_damped(H[order][:, order], 0.01)[0])
    assert torch.equal(H, before)


def test_damping_in_place_ends_with_the_body():
    H = torch.diag(torch.tensor([1.0, 3.0, 0.0]))
    with pytest.raises(KeyError), damped_in_place(H, 0.1) as inside:
        assert inside is H and torch.equal(H, damped(torch.diag(torch.tensor([1.0, 3.0, 0.0])), 0.1))
        raise KeyError
    assert torch.equal(H, torch.diag(torch.tensor([1.0, 3.0, 0.0])))


def test_damping_grows_until_there_is_a_factor():
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    H[0, 1] = H[1, 0] = 1.05
    _, used = cholesky_damped(H, 0.001)
    assert used == pytest.approx(0.1)


@pytest.mark.parametrize("entry", [float("inf"), float("nan"), 1e6])
def test_a_matrix_without_a_factor_is_refused(entry):
    H = torch.eye(3)
    H[0, 1] = H[1, 0] = entry
    with pytest.raises(IllConditionedError):
        cholesky_damped(H, 0.01)
