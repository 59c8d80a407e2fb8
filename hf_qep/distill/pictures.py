"""Images of rows, and the objects on them, as tensors."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_qep.distill.samples import DETECTION, TaskData
from hf_qep.errors import ConfigError
from hf_qep.extras import require

AT_ONCE = 64
"""Images that are decoded at the same time."""
OVERHANG = 1.0
"""Pixels that a box may reach beyond its image: annotators round."""


def pixels(values: Sequence[Any], processor: Any, beside: Path) -> Tensor:
    """Images as an image processor makes them, (rows, channels, height, width).

    values: paths, relative to the folder `beside` or to the current one, or dicts with `bytes` or `path`. Raises
    ConfigError for an image that cannot be read.
    """
    parts = [processor(part, return_tensors="pt")["pixel_values"] for part in _in_parts(values, beside)]
    return torch.cat(parts)


def detection(
    values: Sequence[Any], objects: Sequence[Any], processor: Any, beside: Path, classes: Sequence[str] | None
) -> TaskData:
    """Images and the objects on them as rows of a detector; images of different sizes are padded.

    objects: per image a dict of lists, `bbox` (x, y, width, height in pixels) and `category` (number, or one of
    `classes`), or a list of such dicts. Raises ConfigError for boxes that are none or lie outside of their image.
    """
    images = [image for part in _in_parts(values, beside) for image in part]
    notes = [_coco(n, *pair, classes) for n, pair in enumerate(zip(images, objects, strict=True))]
    encoded = processor(images, annotations=notes, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("pixel_values", "pixel_mask") if name in encoded}
    labels = [{name: row[name] for name in ("class_labels", "boxes")} for row in encoded["labels"]]
    return TaskData(DETECTION, inputs, labels, None if classes is None else tuple(classes))


def _in_parts(values: Sequence[Any], beside: Path) -> Iterator[list[Any]]:
    for start in range(0, len(values), AT_ONCE):
        yield [_opened(start + n, value, beside) for n, value in enumerate(values[start : start + AT_ONCE])]


def _opened(number: int, value: Any, beside: Path) -> Any:
    """An image of PIL in RGB."""
    image = require("distill", "PIL.Image")
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = beside / value if (beside / value).is_file() else Path(value)
    if not isinstance(value, bytes | Path):
        raise ConfigError(f"row {number} has no image but {value!r}; give a path, or bytes of a file")
    try:
        with image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as found:
            return found.convert("RGB")
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise ConfigError(f"the image of row {number} cannot be read: {error}") from error


def _coco(number: int, image: Any, objects: Any, classes: Sequence[str] | None) -> dict[str, Any]:
    """Annotations of one image as image processors take them."""
    try:
        each = objects if isinstance(objects, list) else _listed(objects)
        pairs = [(one["category"], [float(side) for side in one["bbox"]]) for one in each]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"the objects of row {number} are no `bbox` and `category` of equal number ({error})"
        ) from error
    boxes = [
        {"category_id": _category(number, category, classes), "bbox": box, "area": box[2] * box[3]}
        for category, box in pairs
        if _checked(number, box, image.size)
    ]
    notes = [box | {"image_id": number, "iscrowd": 0} for box in boxes]
    return {"image_id": number, "annotations": notes}


def _listed(objects: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    pairs = zip(objects["category"], objects["bbox"], strict=True)
    return [{"category": category, "bbox": box} for category, box in pairs]


def _category(number: int, category: Any, classes: Sequence[str] | None) -> int:
    if classes is not None and category in classes:
        return list(classes).index(category)
    if isinstance(category, bool) or not isinstance(category, int) or category < 0:
        known = ", ".join(classes[:10]) if classes is not None else "numbers from 0"
        raise ConfigError(f"row {number} has an object of the category {category!r}, which is none of {known}")
    return category


def _checked(number: int, box: Sequence[float], size: tuple[int, int]) -> bool:
    """True. Raises ConfigError for a box that is none on this image."""
    if len(box) != 4 or not all(side > 0 for side in box[2:]):
        raise ConfigError(f"row {number} has the box {box}; a box is x, y, width and height, the last two above 0")
    ends = [box[0] + box[2] - size[0], box[1] + box[3] - size[1], -box[0], -box[1]]
    if not all(end <= OVERHANG for end in ends):
        raise ConfigError(f"the box {box} of row {number} lies outside of its image of {size[0]} x {size[1]} pixels")
    return True


def centred(images: Tensor) -> Tensor:
    """Drawings (rows, 1, side, side) float32 moved so that the middle of their ink is the middle of the image.

    An image without ink stays as it is. Where on a sheet a character stands says nothing about which one it is.
    """
    side = images.shape[-1]
    ink = images.sum((1, 2, 3)).clamp_min(1e-6)
    axis = (torch.arange(side, device=images.device) + 0.5) / side * 2 - 1
    moves = torch.zeros(len(images), 2, 3, device=images.device)
    moves[:, 0, 0] = moves[:, 1, 1] = 1
    moves[:, 0, 2] = (images.sum((1, 2)) * axis).sum(-1) / ink
    moves[:, 1, 2] = (images.sum((1, 3)) * axis).sum(-1) / ink
    return F.grid_sample(images, F.affine_grid(moves, list(images.shape), align_corners=False), align_corners=False)
