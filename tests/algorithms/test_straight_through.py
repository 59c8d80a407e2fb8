from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_qep.algorithms.straight_through import LEAST, MOST, start_latents, trained_sign


def test_the_forward_pass_is_the_sign_and_the_backward_pass_the_identity():
    latent = torch.tensor([-2.0, -0.1, 0.0, 0.3], requires_grad=True)
    out = trained_sign(latent)
    assert out.tolist() == [-1, -1, 1, 1]
    (out * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert latent.grad.tolist() == [1, 2, 3, 4]


@given(ratio=st.lists(st.floats(-10, 10), min_size=1, max_size=20), seed=st.integers(0, 9))
def test_latents_have_the_signs_that_were_solved_and_stay_within_bounds(ratio, seed):
    ratio = torch.tensor(ratio, dtype=torch.float32)
    signs = torch.rand(ratio.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    latents = start_latents(signs, ratio)
    assert torch.equal(latents >= 0, signs)
    assert ((latents.abs() >= LEAST) & (latents.abs() <= MOST)).all()


def test_a_sign_that_was_turned_against_its_weight_turns_back_more_easily():
    ratio = torch.tensor([0.8, 0.8])
    kept, turned = start_latents(torch.tensor([True, False]), ratio).abs().tolist()
    assert kept == pytest.approx(0.8)
    assert turned < 0.2 * kept
