"""See what enters a linear, whatever module calls it.

Hooks on modules miss experts, which are slices of a 3-D parameter handed to `torch.nn.functional.linear` by the code
around them. A torch function mode sees every call, and the address of the weight says which linear it is.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_qep.architectures.parts import LinearRef

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


SUMS = ("add", "__add__", "__radd__", "add_", "__iadd__")
"""Names of the functions that add two tensors."""


class StopForward(Exception):
    """Raised to end a forward pass early; whoever raises it on purpose also catches it."""


def collect_outputs(outputs: dict[LinearRef, Tensor]) -> Callable[[LinearRef, Tensor], Tensor]:
    """An `on_output` that puts outputs into the dict so that gradients can be taken at them."""

    def keep(ref: LinearRef, output: Tensor) -> Tensor:
        outputs[ref] = output if output.requires_grad else output.requires_grad_()
        return output if output.grad_fn is not None else output.clone()

    return keep


class LinearObserver(TorchFunctionMode):
    """While active, calls `callback(ref, x)` before each product x W^T with one of `weights`; x (..., in_features).

    weights: LinearRef -> weight (out, in), as `access.get_weight` gives it. Seen are `functional.linear` (linears and
    expert slices), `torch.addmm` (Conv1D) and `x @ weight.T` (Falcon). Other weights are ignored, among them those that
    a quantised module dequantises for one call. Exceptions of the callback pass through the model's forward, so
    StopForward ends it. Inside the callback nothing is observed.
    on_sum: called with the total when the output of a product is first a term of a sum, as where a block adds it to its
    residual stream.
    on_output: called with the output of a product; what it returns takes the place of the output.
    """

    def __init__(
        self,
        weights: Mapping[LinearRef, Tensor],
        callback: Callable[[LinearRef, Tensor], None],
        on_sum: Callable[[LinearRef, Tensor], None] | None = None,
        on_output: Callable[[LinearRef, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._callback, self._on_sum, self._on_output = callback, on_sum, on_output
        self._outputs: dict[LinearRef, Tensor] = {}
        self._weights: dict[int, tuple[LinearRef, Tensor]] = {}
        self.learn(weights)

    def learn(self, weights: Mapping[LinearRef, Tensor]) -> None:
        """Watch for these weights too; those on meta are not in memory and cannot be seen."""
        # The tensors are kept as well: an address is only unique while its tensor lives.
        self._weights |= {w.data_ptr(): (ref, w) for ref, w in weights.items() if not w.is_meta}

    def forget(self, refs: Container[LinearRef]) -> None:
        """Let go of the weights of these linears."""
        self._weights = {at: found for at, found in self._weights.items() if found[0] not in refs}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, ref = kwargs or {}, None
        if func is torch.nn.functional.linear:
            ref = self._see(_argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"))
        elif func is torch.addmm:
            ref = self._see(_argument(args, kwargs, 1, "mat1"), _argument(args, kwargs, 2, "mat2").mT)
        elif func in MATMULS and (right := _argument(args, kwargs, 1, "other")).ndim == 2:
            ref = self._see(_argument(args, kwargs, 0, "input"), right.mT)
        result = func(*args, **kwargs)
        if self._on_output is not None and ref is not None:
            result = self._on_output(ref, result)
        if self._on_sum is not None:
            if ref is not None:
                self._outputs[ref] = result
            elif self._outputs and getattr(func, "__name__", "") in SUMS:
                self._see_sum(args, result)
        return result

    def _see(self, x: Tensor, weight: Tensor) -> LinearRef | None:
        ref, known = self._weights.get(weight.data_ptr(), (None, None))
        # A square matrix that is used the other way round has the address and the shape, but not the strides.
        if ref is None or weight.shape != known.shape or weight.stride() != known.stride():
            return None
        self._callback(ref, x)
        return ref

    def _see_sum(self, terms: tuple, total: Tensor) -> None:
        for ref, output in list(self._outputs.items()):
            if any(_same_memory(term, output) for term in terms):
                del self._outputs[ref]
                if total.numel() == output.numel():
                    self._on_sum(ref, total)


def _same_memory(term: Any, output: Tensor) -> bool:
    """Views (Conv1D) and dropout at rest hand on the memory, not the object."""
    if not isinstance(term, Tensor):
        return False
    return term.data_ptr() == output.data_ptr() and term.numel() == output.numel()


def _argument(args: tuple, kwargs: dict[str, Any], position: int, name: str) -> Tensor:
    return args[position] if len(args) > position else kwargs[name]
