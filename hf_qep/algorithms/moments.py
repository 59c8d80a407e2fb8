"""Second moments of activations, their damping and their Cholesky factor.

Everything a solver knows about the data is in H = E[x̂ x̂ᵀ] and C = E[(x - x̂) x̂ᵀ], where x̂ is what the linear reads in
the partly quantised model and x what it reads in the float model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_qep.errors import IllConditionedError, NonFiniteError

RETRIES = 5
ARRANGED_ROWS = 256
PART_BYTES = 32 << 20
"""Most bytes of a part of a moment that is added, or sent, at a time."""

PRIOR = 2
"""Tokens' worth of ridge per input. Tokens of one text resemble each other, so it takes more than one of them to settle
one direction; 1 to 4 do nearly as well on real models of width 64 to 1536 with 2,000 to 16,000 tokens."""


class Moments:
    """Running means over tokens, so that their meaning does not depend on how many batches came.

    in_features: width of the activations.
    cross: also keep C, the moment that QEP needs.
    device: where the moments live; batches are moved there.
    outputs: width of the output whose gap to the float stream is kept too, 0 for none.

    `centered=True` gives a moment about the means instead of about zero. It is the one to solve with where a bias can
    take up the mean of the output: minimising over the bias first leaves exactly the centred objective.
    """

    def __init__(
        self, in_features: int, cross: bool = False, device: torch.device | str = "cpu", *, outputs: int = 0
    ) -> None:
        self.count = 0
        """Tokens seen."""
        self._mass = 0.0
        square = (in_features, in_features)
        self._hessian = torch.zeros(square, dtype=torch.float32, device=device)
        self._cross = torch.zeros(square, dtype=torch.float32, device=device) if cross else None
        self._gap = torch.zeros((outputs, in_features), dtype=torch.float32, device=device) if outputs else None
        self._mean_gap = torch.zeros(outputs, dtype=torch.float64, device=device)
        # The mean feeds a bias correction: it is a difference of nearly equal numbers, hence float64.
        self._mean_quantized = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._mean_float = torch.zeros(in_features, dtype=torch.float64, device=device)

    def update(
        self,
        x_quantized: Tensor,
        x_float: Tensor | None = None,
        gap: Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> None:
        """Add tokens: `x_quantized` and `x_float` are (..., in), any float dtype; `x_float` defaults to the former.

        gap: (..., outputs), output of the float minus output of the quantised stream.
        token_weight: (...), positive: how much a token counts in every mean; default 1 each.
        Raises ValueError when the float stream or the gap is missing although its moment is kept.
        """
        if self._gap is not None and gap is None:
            raise ValueError("the output gap is kept: pass gap with the same tokens")
        if self._cross is not None and x_float is None:
            raise ValueError("the cross moment needs the float stream: pass x_float with the same tokens")
        xq = self._rows(x_quantized)
        if not len(xq):
            return
        xf = xq if x_float is None else self._rows(x_float)
        share = self._shares(len(xq), token_weight)
        old, weighted = max(0.0, 1 - share.sum().item()), xq * share.unsqueeze(1)
        self.count += len(xq)
        self._hessian.mul_(old).addmm_(weighted.T, xq)
        if self._cross is not None:
            self._cross.mul_(old).addmm_((xf - xq).T, weighted)
        means = [(self._mean_quantized, xq), (self._mean_float, xf)]
        if self._gap is not None:
            gap = self._rows(gap)
            self._gap.mul_(old).addmm_(gap.T, weighted)
            means.append((self._mean_gap, gap))
        for mean, x in means:
            mean.mul_(old).add_(x.double().T @ share.double())

    def _shares(self, tokens: int, token_weight: Tensor | None) -> Tensor:
        """Weights of new tokens in the means over all tokens so far, (tokens,) float32."""
        if token_weight is None:
            self._mass += tokens
            return self._hessian.new_full((tokens,), 1 / self._mass)
        weight = token_weight.reshape(-1).to(self._hessian)
        self._mass += weight.sum(dtype=torch.float64).item()
        return weight / self._mass

    @property
    def seen(self) -> tuple[int, float]:
        """Tokens, and their weights together."""
        return self.count, self._mass

    @seen.setter
    def seen(self, seen: tuple[int, float]) -> None:
        """Say what the parts that were overwritten have seen."""
        self.count, self._mass = seen

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return sum(part.nbytes for part in self.parts())

    def parts(self) -> list[Tensor]:
        """All that is kept as views of at most PART_BYTES, or a row, to be read and overwritten."""
        kept = [self._hessian, self._cross, self._gap, self._mean_gap, self._mean_quantized, self._mean_float]
        return [part for moment in kept if moment is not None for part in moment.split(_rows_of_a_part(moment))]

    def add_before(self, seen: tuple[int, float], parts: Iterable[Tensor]) -> None:
        """Add tokens that came before those that are here.

        seen, parts: of moments of the same kind, such as those of another process; the tensors are overwritten.
        """
        count, mass = seen
        total = mass + self._mass
        earlier, later = (mass / total, self._mass / total) if total else (0.0, 0.0)
        for own, part in zip(self.parts(), parts, strict=True):
            own.mul_(later).add_(part.mul_(earlier))
        self.count, self._mass = count + self.count, total

    @property
    def has_output_gap(self) -> bool:
        """Whether the gap of the output is kept."""
        return len(self._mean_gap) > 0

    def hessian(self, *, centered: bool = False) -> Tensor:
        """H = E[x̂ x̂ᵀ], (in, in) float32; zeros before the first token. Raises NonFiniteError on NaN or Inf."""
        hessian = _checked(self._hessian, "the second moment of the activations")
        return hessian - _outer(self._mean_quantized, self._mean_quantized) if centered else hessian

    def cross(self, *, centered: bool = False) -> Tensor:
        """C = E[(x - x̂) x̂ᵀ], (in, in) float32. Raises NonFiniteError on NaN or Inf, ValueError if it was not kept."""
        if self._cross is None:
            raise ValueError("the cross moment was not kept: build Moments with cross=True")
        cross = _checked(self._cross, "the cross moment of the activations")
        return cross - _outer(self._mean_float - self._mean_quantized, self._mean_quantized) if centered else cross

    def take_output_gap(self, *, centered: bool = False) -> Tensor:
        """G = E[(y - ŷ) x̂ᵀ], (outputs, in) float32, which is not kept any longer.

        Raises NonFiniteError on NaN or Inf, ValueError if it was not kept or was taken before.
        """
        if self._gap is None:
            raise ValueError("the output gap was not kept: build Moments with outputs")
        gap, self._gap = _checked(self._gap, "the gap between the two streams"), None
        return gap - _outer(self._mean_gap, self._mean_quantized) if centered else gap

    def mean_gap(self) -> Tensor:
        """E[y - ŷ], (outputs,) float32."""
        return self._mean_gap.float()

    def mean_quantized(self) -> Tensor:
        """E[x̂], (in,) float32."""
        return self._mean_quantized.float()

    def mean_float(self) -> Tensor:
        """E[x], (in,) float32."""
        return self._mean_float.float()

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).to(self._hessian)


def ridge(damping: float, width: int, tokens: int) -> float:
    """Ridge for an estimate from `tokens` tokens, in units of the mean diagonal: damping + PRIOR · width / tokens.

    The second term is the shrinkage of a prior that knows only the mean energy of an input and is worth PRIOR tokens
    per input: it fades as tokens come, and few tokens do not overfit.
    """
    return damping + PRIOR * width / max(tokens, 1)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + λI with λ = damping · mean(diag H); an input that never fired gets the mean diagonal of the others.

    hessian: (in, in) float32. A dead input has a zero row and column, so any positive diagonal makes the metric
    definite and leaves its weights uncoupled; the mean keeps them as important as an average input.
    """
    H = hessian.clone()
    H.diagonal().copy_(damped_diagonal(hessian.diagonal(), damping))
    return H


@contextmanager
def damped_in_place(hessian: Tensor, damping: float) -> Iterator[Tensor]:
    """The same matrix while the body runs, as before afterwards: a wide Hessian is not copied for its diagonal."""
    before = hessian.diagonal().clone()
    hessian.diagonal().copy_(damped_diagonal(before, damping))
    try:
        yield hessian
    finally:
        hessian.diagonal().copy_(before)


def cholesky_damped(hessian: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """Lower factor L of the damped matrix, H + λI = L Lᵀ, (in, in) float32, and the damping that it took.

    hessian: (in, in) float32; damping: fraction of the mean diagonal, raised tenfold up to 5 times when there is no
    factor. order: (in,) arrangement of rows and columns to factorise, default as they are. It takes one more matrix of
    the size. Raises IllConditionedError when that does not help, or when the matrix holds NaN or Inf.
    """
    if not all_finite(hessian):
        raise IllConditionedError("the Hessian holds NaN or Inf; check the weights and activations of the model")
    factor = hessian.new_empty(hessian.shape).mT  # column by column, as LAPACK overwrites it
    attempts = [damping] + [max(damping, 1e-6) * 10.0**k for k in range(1, RETRIES + 1)]
    for attempt in attempts:
        _arrange(factor, hessian, order)
        factor.diagonal().copy_(damped_diagonal(factor.diagonal().clone(), attempt))
        found, info = torch.linalg.cholesky_ex(factor, out=(factor, hessian.new_empty((), dtype=torch.int32)))
        if not info.any():
            return found, attempt
    raise IllConditionedError(
        f"no Cholesky factor of the {len(hessian)}-wide Hessian, even with damping {attempts[-1]:g} of its mean "
        f"diagonal; use more calibration tokens or a damping above {damping:g}"
    )


def all_finite(matrix: Tensor) -> bool:
    """Whether a tensor, not empty, holds neither NaN nor Inf; `torch.isfinite` would take another of its size."""
    return all(bound.isfinite().item() for bound in torch.aminmax(matrix))


def _arrange(out: Tensor, matrix: Tensor, order: Tensor | None) -> None:
    """Rows and columns of `matrix` in another order, a few rows at a time."""
    if order is None:
        out.copy_(matrix)
        return
    for rows, some in zip(out.split(ARRANGED_ROWS), order.split(ARRANGED_ROWS), strict=True):
        rows.copy_(matrix.index_select(0, some).index_select(1, order))


def damped_diagonal(diagonal: Tensor, damping: float) -> Tensor:
    """Diagonal of `damped(H, damping)` from that of H, both (in,)."""
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else diagonal.new_ones(())
    return torch.where(live, diagonal + damping * mean, mean)


def _rows_of_a_part(moment: Tensor) -> int:
    return max(1, PART_BYTES // max(1, moment[:1].nbytes))


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return torch.outer(left, right).float()


def _checked(moment: Tensor, what: str) -> Tensor:
    if not all_finite(moment):
        raise NonFiniteError(f"{what} holds NaN or Inf; the model overflows on the calibration data")
    return moment
