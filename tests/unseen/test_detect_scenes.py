"""Canvases: boxes are where the ink is, objects keep apart, seeds repeat."""

from __future__ import annotations

import pytest
import torch
from unseen.detect_model import Detector, SetLoss, Shape
from unseen.detect_scenes import Look, paint, textures


def squares(side=12, size=28):
    drawing = torch.zeros(1, 1, size, size)
    low = (size - side) // 2
    drawing[..., low : low + side, low : low + side] = 1
    return drawing


def scenes_of(seed=0, n=64, **look):
    generator = torch.Generator().manual_seed(seed)
    return paint(squares(), torch.zeros(n, 3, dtype=torch.int64), Look(**look), generator)


def test_boxes_lie_on_the_canvas_and_follow_the_size_of_the_drawing():
    found = scenes_of(least=28.0, most=28.0)
    x, y, width, height = (found.boxes * 64).T
    for centre, extent in ((x, width), (y, height)):
        assert (centre - extent / 2 >= 0).all() and (centre + extent / 2 <= 64).all()
        assert (extent >= 11).all() and (extent <= 12 * 1.5).all()


def test_a_box_holds_its_ink_tightly():
    found = paint(squares(), torch.zeros(64, 1, dtype=torch.int64), Look(objects=1), torch.Generator().manual_seed(0))
    for image, box in zip(found.images[:, 0], found.boxes * 64, strict=True):
        x, y, width, height = box.round(decimals=3)
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[int(y - height / 2) : int(y + height / 2), int(x - width / 2) : int(x + width / 2)] = True
        far = (image - image[int(y), int(x)]).abs()
        assert far[inside].median() < 0.1 < far[~inside].median()


def test_objects_keep_apart():
    found = scenes_of(least=24.0, most=24.0)
    for owner in range(64):
        boxes = found.boxes[found.owner == owner] * 64
        gaps = (boxes[:, None, :2] - boxes[None, :, :2]).abs().amax(-1)
        assert (gaps + 100 * torch.eye(len(boxes)) > 16).all()


def test_every_canvas_has_one_to_three_objects_in_order():
    found = scenes_of()
    counts = torch.bincount(found.owner, minlength=64)
    assert counts.min() == 1 and counts.max() <= 3 and (found.owner.diff() >= 0).all()


def test_seeds_repeat_and_differ():
    first, again, other = scenes_of(1), scenes_of(1), scenes_of(2)
    assert torch.equal(first.images, again.images) and torch.equal(first.boxes, again.boxes)
    assert not torch.equal(first.images, other.images)
    assert first.images.min() >= 0 and first.images.max() <= 1


def test_a_drawing_without_ink_is_no_object():
    generator = torch.Generator().manual_seed(0)
    found = paint(torch.zeros(1, 1, 28, 28), torch.zeros(3, 2, dtype=torch.int64), Look(), generator)
    assert len(found.owner) == len(found.boxes) == 0 and len(found.images) == 3


def test_tokens_begin_at_their_own_patch_and_matches_are_one_to_one():
    torch.manual_seed(0)
    detector, found = Detector(Shape((8, 16, 16)), 64, 8), scenes_of(n=8)
    said = detector(found.images)
    assert torch.allclose(said.boxes[0, 9, :2], torch.tensor([12.0, 12.0]) / 64, atol=1e-5)
    assert torch.allclose(said.embeddings.norm(dim=-1), torch.ones(8, 64), atol=1e-5)
    loss, (canvas, token), objects = SetLoss()(said, found)
    assert sorted(objects.tolist()) == list(range(len(found.owner)))
    assert torch.equal(canvas, found.owner[objects])
    assert len({*zip(canvas.tolist(), token.tolist(), strict=True)}) == len(objects)
    loss.backward()
    assert all(p.grad is not None for name, p in detector.named_parameters() if not name.startswith("embed"))


@pytest.mark.parametrize("side", [48, 64])
def test_textures_have_no_extreme_values(side):
    ground = textures(32, side, torch.Generator().manual_seed(0))
    assert ground.shape == (32, 1, side, side) and 0.2 < ground.mean() < 0.8 and ground.std((2, 3)).min() > 0.01
