"""What passes through one layer of a model: what its writers read, and the residual stream after each addition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_qep.architectures.skeleton import HIDDEN
from hf_qep.students.modeling_student import Layout
from hf_qep.students.spec import ATTENTION, MLP


@dataclass
class Seen:
    """Tensors (rows, tokens, width) of the last forward pass through a layer; None where nothing passed."""

    enter: Tensor | None = None
    """What came into the layer."""
    attention_read: Tensor | None = None
    """Input of the linear that writes what attention found."""
    attention_wrote: Tensor | None = None
    mlp_enter: Tensor | None = None
    """Input of the MLP."""
    mlp_read: Tensor | None = None
    mlp_wrote: Tensor | None = None
    leave: Tensor | None = None
    """What the layer returned."""

    def clear(self) -> None:
        """Forget the last pass."""
        for name in vars(self):
            setattr(self, name, None)

    def after(self, part: str, layout: Layout) -> Tensor:
        """The residual stream after `attention` or `mlp` was added to it, before any norm, (rows, tokens, hidden).

        A sub-block that the layer skips adds nothing.
        """
        mid = self.enter if self.attention_wrote is None else self.enter + self.attention_wrote
        if part == ATTENTION or self.mlp_wrote is None:
            return mid
        before = self.mlp_enter if layout.normalised_after else mid
        return before + self.mlp_wrote

    def read(self, part: str) -> Tensor:
        """Input of the linear that writes the output of a sub-block."""
        return self.attention_read if part == ATTENTION else self.mlp_read


@contextmanager
def watched(layer: nn.Module, layout: Layout) -> Iterator[Seen]:
    """Fill a `Seen` at every pass through the layer while the body runs. Sub-blocks that are skipped leave None."""
    seen = Seen()
    reader = submodule(layer, layout.mlp_in[0])

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.clear()
        seen.enter = args[0] if args else kwargs[HIDDEN]

    def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.leave = output if isinstance(output, Tensor) else output[0]

    with ExitStack() as undo:
        undo.callback(layer.register_forward_pre_hook(entering, with_kwargs=True).remove)
        undo.callback(layer.register_forward_hook(leaving).remove)
        for part, writer in writers_of(layer, layout).items():
            undo.callback(writer.register_forward_hook(_noting(seen, part)).remove)
        if reader is not None:
            undo.callback(reader.register_forward_pre_hook(lambda m, args: setattr(seen, "mlp_enter", args[0])).remove)
        yield seen


@contextmanager
def all_watched(layers: Sequence[nn.Module], layout: Layout) -> Iterator[list[Seen]]:
    """`watched` for several layers at once."""
    with ExitStack() as undo:
        yield [undo.enter_context(watched(layer, layout)) for layer in layers]


def writers_of(layer: nn.Module, layout: Layout) -> dict[str, nn.Linear]:
    """Sub-block -> the linear that writes what it found into the residual stream; skipped ones are missing."""
    found = {part: submodule(layer, name) for part, name in ((ATTENTION, layout.attention_out), (MLP, layout.mlp_out))}
    return {part: linear for part, linear in found.items() if linear is not None}


def submodule(layer: nn.Module, name: str) -> nn.Linear | None:
    """A linear of a layer by its name in the layout; None where the layer skips it."""
    module: nn.Module = layer
    for part in name.split("."):
        module = getattr(module, part, None)
        if module is None:
            return None
    return module if isinstance(module, nn.Linear) else None


def _noting(seen: Seen, part: str) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        setattr(seen, f"{part}_read", args[0])
        setattr(seen, f"{part}_wrote", output)

    return note
