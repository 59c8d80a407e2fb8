"""Spend a budget of bits over items, each of which can be had at several prices.

Every item has options (bits, error); one of each is to be chosen so that the bits stay within the budget and the sum of
the errors is least: the multiple-choice knapsack problem, solved by dynamic programming over the budget.  Unlike a
greedy walk along convex hulls it is exact, never worse with more budget, and needs no curve to be convex.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

Option = tuple[int, float]
"""Bits and error."""
MOST_UNITS = 1 << 16
"""Steps into which the budget beyond the cheapest options is divided, where the bits have no common divisor that needs
fewer."""


def spend(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Index of the chosen option of every item: least sum of errors with a sum of bits of at most `budget`.

    Exact where the differences of bits are multiples of 1 / MOST_UNITS of the room that the cheapest options leave;
    otherwise prices are rounded up to such steps, and what the rounding leaves over is spent greedily.
    Raises ValueError if the cheapest options take more than the budget.
    """
    cheapest = [min(bits for bits, _ in item) for item in options]
    room = budget - sum(cheapest)
    if room < 0:
        raise ValueError(f"the cheapest options take {sum(cheapest)} bits, the budget is {budget}")
    extra = [[bits - least for bits, _ in item] for item, least in zip(options, cheapest, strict=True)]
    room = min(room, sum(map(max, extra)))  # more than the dearest options cannot be spent
    common = math.gcd(*(bits for item in extra for bits in item)) or 1
    unit = common * max(1, -(-room // (common * MOST_UNITS)))
    steps = [[-(-bits // unit) for bits in item] for item in extra]
    chosen = _least_error([[error for _, error in item] for item in options], steps, room // unit)
    return _spend_rest(options, chosen, room - sum(item[k] for item, k in zip(extra, chosen, strict=True)))


def _least_error(errors: list[list[float]], steps: list[list[int]], room: int) -> list[int]:
    """Options with the least sum of errors among those whose steps sum to at most `room`."""
    best = np.zeros(room + 1)
    picks = []
    for item_errors, item_steps in zip(errors, steps, strict=True):
        new, pick = np.full(room + 1, np.inf), np.zeros(room + 1, dtype=np.int32)
        for k, (error, step) in enumerate(zip(item_errors, item_steps, strict=True)):
            if step <= room:
                found = best[: room + 1 - step] + error
                better = found < new[step:]
                new[step:][better], pick[step:][better] = found[better], k
        best = new
        picks.append(pick)
    chosen = []
    for pick, item_steps in zip(reversed(picks), reversed(steps), strict=True):
        chosen.append(int(pick[room]))
        room -= item_steps[chosen[-1]]
    return chosen[::-1]


def _spend_rest(options: Sequence[Sequence[Option]], chosen: list[int], rest: int) -> list[int]:
    """Take the change of one item's option that lowers the error most and still fits, until there is none."""
    chosen = list(chosen)
    while True:
        changes = [
            (options[i][k][1] - options[i][now][1], options[i][k][0] - options[i][now][0], i, k)
            for i, now in enumerate(chosen)
            for k in range(len(options[i]))
            if options[i][k][1] < options[i][now][1] and options[i][k][0] - options[i][now][0] <= rest
        ]
        if not changes:
            return chosen
        _, bits, item, option = min(changes)
        chosen[item], rest = option, rest - bits


LARGEST_LOG = 700.0
"""Of a value far before the first of two points that fall steeply; its exponential is still a number."""


def interpolate(points: Mapping[float, float], x: float) -> float:
    """Value at x of a curve through points x -> y, both positive, that is straight between their logarithms.

    Before the first and behind the last point the nearest piece goes on; y never rises with x, so that noise of a
    measurement does not make a dearer option look worse. With one point y falls as 1 / x.
    """
    known = sorted((math.log(px), math.log(max(py, 1e-300))) for px, py in points.items())
    falling: list[tuple[float, float]] = []
    for at, value in known:
        falling.append((at, min(value, falling[-1][1]) if falling else value))
    if len(falling) == 1:
        (at, value), slope = falling[0], -1.0
        return math.exp(value + slope * (math.log(x) - at))
    k = 0
    while k < len(falling) - 2 and math.log(x) > falling[k + 1][0]:
        k += 1
    (x0, y0), (x1, y1) = falling[k : k + 2]
    return math.exp(min(y0 + (y1 - y0) / (x1 - x0) * (math.log(x) - x0), LARGEST_LOG))
