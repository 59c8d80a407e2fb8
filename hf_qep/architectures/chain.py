"""Find the chain of blocks: the list of modules that are called one after the other, each on the last one's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_qep.architectures.access import get_weight, on_demand
from hf_qep.architectures.families import LANGUAGE_MODEL
from hf_qep.architectures.linears import input_key
from hf_qep.architectures.observe import LinearObserver
from hf_qep.architectures.parts import LinearRef
from hf_qep.architectures.skeleton import run_model, split_call
from hf_qep.errors import ArchitectureError


@dataclass
class MemberCall:
    """One call of a member of a list."""

    index: int
    entered: tuple[int, ...] | None = None
    """Key of the hidden state that came in; None if there was none."""
    left: tuple[int, ...] | None = None
    outputs: int | None = None
    """Length of the tuple that was returned; None for a bare tensor."""
    returned: str = "nothing"
    """Type that was returned."""


@dataclass
class Trace:
    """What one forward pass showed."""

    products: list[tuple[LinearRef, tuple[int, ...]]] = field(default_factory=list)
    """Linear and key of its input, in order of execution."""
    calls: dict[str, list[MemberCall]] = field(default_factory=dict)
    """Name of a list -> calls of its members, in order."""
    last_output: dict[str, Tensor] = field(default_factory=dict)
    """Name of a list -> copy of what its last member returned last."""
    alive: list[Tensor] = field(default_factory=list)
    """Everything a key was taken of: freed memory would be used again, and its address would lie."""

    def key(self, tensor: Tensor) -> tuple[int, ...]:
        """Key of `tensor`, which is kept alive."""
        self.alive.append(tensor)
        return input_key(tensor)


@dataclass(frozen=True)
class Chain:
    """The list that was found."""

    name: str
    members: tuple[str, ...]
    outputs: tuple[int | None, ...]
    """Per member, as in Block.outputs."""
    final: Tensor
    """Output of the last member in the sample forward pass."""


def trace_forward(model: PreTrainedModel, sample: dict[str, Tensor], weights: dict[LinearRef, Tensor]) -> Trace:
    """Run the model once and record every product with one of `weights` and every call of a member of a ModuleList.

    A product counts only inside the forward of its own module: code that takes `module.weight` for itself would not
    find a float weight there once the module is packed. Raises ArchitectureError if the model cannot run the sample.
    """
    trace, running = Trace(), []

    def see(ref: LinearRef, x: Tensor) -> None:
        if ref.expert is not None or ref.name in running:
            trace.products.append((ref, trace.key(x)))

    observer = LinearObserver(weights, see)
    with ExitStack() as undo:
        for name, member in on_demand(model).items():
            undo.enter_context(_learnt(observer, model, name, member, weights))
        for ref in weights:
            if ref.expert is None:
                undo.enter_context(_marked_running(running, ref.name, model.get_submodule(ref.name)))
        for name in block_lists(model, weights):
            trace.calls[name] = []
            members = model.get_submodule(name)
            for index, member in enumerate(members):
                undo.enter_context(_watched(trace, name, index, index == len(members) - 1, member))
        undo.enter_context(observer)
        try:
            run_model(model, sample)
        except Exception as error:  # whatever the model's code raises, the sample does not suit it
            raise ArchitectureError(
                f"{type(model).__name__} cannot run the sample batch with {', '.join(sample)}: {error}"
            ) from error
    return trace


def block_lists(model: nn.Module, refs: Iterable[LinearRef]) -> list[str]:
    """Names of the ModuleLists that hold linears, outer ones first."""
    holders = {holder for ref in refs for holder in _ancestors(ref.name)}
    return [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and name in holders]


def find_chain(model: PreTrainedModel, trace: Trace, refs: Iterable[LinearRef]) -> Chain:
    """The one list whose members form a chain. Raises ArchitectureError with the reason if there is none or a choice.

    In a model with a language model inside only that is searched. Lists inside the members of a list that is called
    belong to that list. The largest list must be a chain, so that no model is quantised in a side branch only.
    """
    sizes = _sizes(trace, refs)
    inside = {name: size for name, size in sizes.items() if LANGUAGE_MODEL in name.split(".")}
    sizes = inside or sizes
    if not sizes:
        raise ArchitectureError(
            f"{type(model).__name__} calls no list of modules that hold linears, so it has no chain of blocks"
        )
    largest = max(sizes, key=lambda name: sizes[name])
    if (problem := _problem(trace, largest, len(model.get_submodule(largest)))) is not None:
        raise ArchitectureError(f"{type(model).__name__} has no chain of blocks: {problem}")
    rivals = [n for n in sizes if n != largest and not _problem(trace, n, len(model.get_submodule(n)))]
    if rivals:
        raise ArchitectureError(
            f"{type(model).__name__} has several chains of blocks, {', '.join(sorted([largest, *rivals]))}; "
            "quantise the models it is made of one by one"
        )
    calls = trace.calls[largest]
    members = tuple(f"{largest}.{call.index}" for call in calls)
    return Chain(largest, members, tuple(call.outputs for call in calls), trace.last_output[largest])


def _sizes(trace: Trace, refs: Iterable[LinearRef]) -> dict[str, int]:
    """Outermost lists that were called -> weights in their linears."""
    called = [name for name, calls in trace.calls.items() if calls]
    sizes = {name: 0 for name in called if not any(holder in called for holder in _ancestors(name))}
    for ref in refs:
        for holder in _ancestors(ref.name):
            if holder in sizes:
                sizes[holder] += ref.out_features * ref.in_features
    return sizes


def _problem(trace: Trace, name: str, length: int) -> str | None:
    """Why the members of a list are no chain, or None if they are."""
    calls = trace.calls[name]
    for index in range(length):
        times = sum(call.index == index for call in calls)
        if times != 1:
            return f"`{name}.{index}` is called {times} times in one forward pass, and must be called once"
    for before, call in zip([None, *calls], calls, strict=False):
        member = f"`{name}.{call.index}`"
        if call.entered is None:
            return f"{member} gets no hidden state, neither as first argument nor as `hidden_states`"
        if call.left is None:
            return f"{member} returns {call.returned}, not a tensor or a tuple that opens with one"
        if before is not None and before.left != call.entered:
            return f"the output of `{name}.{before.index}` is not the input of {member}"
    return None


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


@contextmanager
def _learnt(
    observer: LinearObserver, model: nn.Module, name: str, member: nn.Module, refs: Iterable[LinearRef]
) -> Iterator[None]:
    """Let the observer know the weights of a member while it runs: they are in memory only then."""
    inside = [ref for ref in refs if name in _ancestors(f"{ref.name}.")]
    before = member.register_forward_pre_hook(lambda *_: observer.learn({r: get_weight(model, r) for r in inside}))
    with before, member.register_forward_hook(lambda *_: observer.forget(inside), always_call=True):
        yield


@contextmanager
def _marked_running(running: list[str], name: str, module: nn.Module) -> Iterator[None]:
    """Keep `name` in `running` while the module's forward runs."""
    before = module.register_forward_pre_hook(lambda *_: running.append(name))
    with before, module.register_forward_hook(lambda *_: running.remove(name), always_call=True):
        yield


@contextmanager
def _watched(trace: Trace, name: str, index: int, last: bool, member: nn.Module) -> Iterator[None]:
    """Hooks on one member that write its calls into the trace."""
    before = member.register_forward_pre_hook(_enter_hook(trace, name, index), with_kwargs=True)
    with before, member.register_forward_hook(_leave_hook(trace, name, index, last)):
        yield


def _enter_hook(trace: Trace, name: str, index: int) -> Callable[..., None]:
    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = MemberCall(index)
        trace.calls[name].append(call)
        try:
            hidden, _ = split_call(args, kwargs)
        except ArchitectureError:  # the list is then refused with the name of the member
            return
        call.entered = trace.key(hidden)

    return enter


def _leave_hook(trace: Trace, name: str, index: int, last: bool) -> Callable[..., None]:
    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        call = next(call for call in reversed(trace.calls[name]) if call.index == index)
        call.returned = type(output).__name__
        hidden = output[0] if type(output) is tuple and output else output
        if not isinstance(hidden, Tensor):
            return
        call.left = trace.key(hidden)
        call.outputs = len(output) if type(output) is tuple else None
        if last:
            trace.last_output[name] = hidden.clone()

    return leave
