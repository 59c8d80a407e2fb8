"""Round to nearest on the 1-bit grid {-s, +s}."""

from __future__ import annotations

from torch import Tensor


def group_means(weight: Tensor, group_size: int | None = None) -> Tensor:
    """Mean magnitude of each row or row group: the s that minimises ‖W - s·sign(W)‖².

    weight: (out, in). Returns (out, in / group_size), or (out, 1) without groups.
    """
    size = group_size or weight.shape[1]
    return weight.abs().unflatten(1, (-1, size)).mean(2)


def round_to_nearest(weight: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Signs (out, in) bool, True = +1, and scales (out, groups) of the nearest point of the grid; zero rounds up."""
    return weight >= 0, group_means(weight, group_size)
