"""See what enters a linear, whatever module calls it.

Hooks on modules miss experts, which are slices of a 3-D parameter handed to `torch.nn.functional.linear` by the code
around them. A torch function mode sees every call, and the address of the weight says which linear it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_qep.architectures.parts import LinearRef


class StopForward(Exception):
    """Raised to end a forward pass early; whoever raises it on purpose also catches it."""


class LinearObserver(TorchFunctionMode):
    """While active, calls `callback(ref, x)` before each product with one of `weights`; x (..., in_features).

    weights: LinearRef -> weight (out, in), or a view of it, as `access.get_weight` gives it. Seen are
    `functional.linear` (linears and expert slices) and `torch.addmm` (Conv1D). Other weights are ignored, among them
    those that a quantised module dequantises for one call. Exceptions of the callback pass through the model's forward,
    so StopForward ends it. Inside the callback nothing is observed.
    """

    def __init__(self, weights: Mapping[LinearRef, Tensor], callback: Callable[[LinearRef, Tensor], None]) -> None:
        super().__init__()
        self._callback = callback
        # The tensors are kept as well: an address is only unique while its tensor lives.
        self._weights = {(w.data_ptr(), ref.kind == "conv1d"): (ref, w) for ref, w in weights.items()}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            self._see(_argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight"), False)
        elif func is torch.addmm:
            self._see(_argument(args, kwargs, 1, "mat1"), _argument(args, kwargs, 2, "mat2"), True)
        return func(*args, **kwargs)

    def _see(self, x: Tensor, weight: Tensor, transposed: bool) -> None:
        ref, known = self._weights.get((weight.data_ptr(), transposed), (None, None))
        if ref is None:
            return
        matrix = weight.T if transposed else weight
        # A transposed square matrix has the address and the shape of the linear, but is another product.
        if matrix.shape == known.shape and matrix.stride() == known.stride():
            self._callback(ref, x)


def _argument(args: tuple, kwargs: dict[str, Any], position: int, name: str) -> Tensor:
    return args[position] if len(args) > position else kwargs[name]
