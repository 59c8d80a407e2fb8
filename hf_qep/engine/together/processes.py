"""One process that does a job alone, or several that do it together through torch.distributed.

All meet again and again (`gather`). What goes wrong in one of them it says when it meets the others next, so all end
with the same error and none waits for what will not come. One that dies says nothing: its connections break, and the
others end with LostProcessError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_qep.errors import LostProcessError, QepError


class Processes:
    """One process that does all of it; `Together` is one of several."""

    index = 0
    count = 1
    neighbours = 1
    """Processes on this machine."""
    doing = "before the first block"
    """Where the job is, for messages."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.index == 0

    def gather(self, value: Any = None) -> list[Any]:
        """The values of all processes, by index. value: small, to be pickled, tensors on the CPU.

        Raises the error of a process that failed since they met last, LostProcessError if one is gone.
        """
        return [value]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the first process, on all of them. Raises what it raises there, on all of them."""
        return self.gather(make() if self.first else None)[0]

    def first_ahead(self, make: Callable[[], Any]) -> Any:
        """What `make` returns here, called on the first process before all others."""
        if self.first:
            made = make()
        self.gather()
        return made if self.first else make()

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """An error that ends the body has been told to the other processes when it goes on from here."""
        yield

    @contextmanager
    def moving(self, value: Any = None) -> Iterator[list[Any]]:
        """`gather`; then the body moves tensors by `send`, `receive` and `spread`, in the same order on all."""
        yield self.gather(value)

    def send(self, tensor: Tensor, to: int) -> None:
        """Give a tensor to another process, which calls `receive`."""

    def receive(self, tensor: Tensor, sender: int) -> Tensor:
        """Overwrite a tensor by that which another process sends, and return it."""
        return tensor

    def spread(self, tensor: Tensor, sender: int) -> None:
        """Overwrite a tensor on all processes by that of one of them."""


class Together(Processes):
    """One of several processes. device: where moments are computed; that of CUDA moves between GPUs without the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        self.neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        self._device = device if device.type == "cuda" and dist.is_nccl_available() else torch.device("cpu")
        self._over = False

    def gather(self, value: Any = None) -> list[Any]:
        """See `Processes.gather`."""
        found: list[Any] = [None] * self.count
        self._reach(lambda: dist.all_gather_object(found, value))
        if failed := [each for each in found if isinstance(each, _Failure)]:
            self._over = True
            raise failed[0].error
        return found

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """See `Processes.agreeing`."""
        try:
            yield
        except Exception as error:
            if self._over:
                raise
            failure = _Failure(self._portable(error))
            try:
                self.gather(failure)
            except Exception as agreed:  # always: that of the first process which failed
                if not isinstance(agreed, LostProcessError) and agreed.args != failure.error.args:
                    raise
            raise

    @contextmanager
    def moving(self, value: Any = None) -> Iterator[list[Any]]:
        """See `Processes.moving`."""
        found = self.gather(value)
        try:
            yield found
        except BaseException:  # the others wait for a tensor, not for words: they find the connection closed
            self._over = True
            raise

    def send(self, tensor: Tensor, to: int) -> None:
        """See `Processes.send`."""
        there = tensor.to(self._device).contiguous()
        self._reach(lambda: dist.send(there, to))

    def receive(self, tensor: Tensor, sender: int) -> Tensor:
        """See `Processes.receive`."""
        return self._through(tensor, lambda there: dist.recv(there, sender))

    def spread(self, tensor: Tensor, sender: int) -> None:
        """See `Processes.spread`."""
        self._through(tensor, lambda there: dist.broadcast(there, sender))

    def _through(self, tensor: Tensor, move: Callable[[Tensor], Any]) -> Tensor:
        there = tensor.to(self._device).contiguous()
        self._reach(lambda: move(there))
        return tensor if there is tensor else tensor.copy_(there)

    def _reach(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:
            self._over = True
            raise LostProcessError(
                f"process {self.index} of {self.count} lost another one {self.doing} (it died, or said nothing for too "
                "long); blocks that are done are kept, start all processes again with --resume"
            ) from error

    def _portable(self, error: Exception) -> Exception:
        """An error that other processes can be given."""
        if isinstance(error, QepError):
            return error
        if isinstance(error, OSError):
            return OSError(error.errno, error.strerror) if error.strerror else OSError(str(error))
        where = f"process {self.index} of {self.count} failed {self.doing}"
        return LostProcessError(f"{where}, {type(error).__name__}: {error}")


@dataclass(frozen=True)
class _Failure:
    error: Exception
