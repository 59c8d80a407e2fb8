"""Drawings that are moved, varied and invented."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unseen import strokes
from unseen.material import Material, check_apart, invented_material, joined
from unseen.warps import VARIANTS, distorted, turned

from hf_qep.distill.pictures import centred
from hf_qep.errors import ConfigError


def dot(x: int, y: int) -> torch.Tensor:
    image = torch.zeros(1, 1, 29, 29)
    image[0, 0, y - 1 : y + 2, x - 1 : x + 2] = 1
    return image


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 24), st.integers(4, 24))
def test_centring_takes_ink_to_the_middle_from_anywhere(x, y):
    assert torch.allclose(centred(dot(x, y)), dot(14, 14), atol=1e-4)


def test_an_empty_image_stays_empty():
    assert not centred(torch.zeros(2, 1, 8, 8)).any()


def test_the_eight_variants_of_a_drawing_differ_and_none_changes_it():
    image = torch.rand(1, 1, 6, 6).expand(VARIANTS, -1, -1, -1)
    found = turned(image, torch.arange(VARIANTS))
    assert torch.equal(found[0], image[0])
    assert len({tuple(row.flatten().tolist()) for row in found}) == VARIANTS


def test_distortion_keeps_most_of_the_ink_and_follows_its_seed():
    image = dot(14, 14).expand(16, -1, -1, -1)
    first, again, other = (distorted(image, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert 0.4 < first.sum() / image.sum() < 2.0


def test_two_drawings_of_an_invented_character_are_nearer_than_those_of_others():
    make = torch.Generator().manual_seed(0)
    characters = strokes.invent(40, make)
    first, second = (centred(strokes.drawn(characters, make)).flatten(1) for _ in range(2))
    assert first.min() >= 0 and first.max() <= 1
    near = torch.nn.functional.normalize(first, dim=1) @ torch.nn.functional.normalize(second, dim=1).T
    assert (near.argmax(1) == torch.arange(40)).float().mean() > 0.7


def test_a_drawing_that_is_tested_must_not_be_learned_from():
    found = invented_material(16)
    check_apart(found)
    leaking = Material(found.seen, found.seen, found.seen, found.runs)
    with pytest.raises(ConfigError, match="seen and the unseen"):
        check_apart(leaking)


def test_joined_characters_are_numbered_one_part_after_the_other():
    found = invented_material(16, ways=3, drawers=2)
    both = joined(found.seen, found.unseen)
    assert both.characters == found.seen.characters + found.unseen.characters
    assert both.labels.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
