"""The processor kernels as torch operators, chosen once per process.

    operator  library with a torch operator over the stable ABI, built when the package was installed beside torch
    ctypes    plain library, called through ctypes; built at installation, or at first use if there is a compiler
    torch     neither: the reference computes everything

HF_QEP_KERNELS=operator|ctypes|torch takes that one or raises; HF_QEP_ISA=avx512|avx2|neon|scalar takes a lesser
instruction set than the machine has. Both are for tests and for bug reports.

    hf_qep::sign_linear(x, tiles, row_scale, column_scale, bias, out_features, activation)
    hf_qep::factored_linear(x, left, right, row, middle, column, bias, activation)
    hf_qep::integer_linear(x, words, bias, bits, groups, activation)

Tiles are those of `kernels/tiling.py`; bias has the dtype of x; activation is 0 (float32 sums) or 1 (int8 activations).
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_qep.errors import KernelError
from hf_qep.kernels import build

ABI = 1
BACKENDS = ("operator", "ctypes", "torch")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SCHEMAS = {
    "sign_linear": "(Tensor x, Tensor tiles, Tensor row_scale, Tensor? column_scale, Tensor? bias, "
    "int out_features, int activation) -> Tensor",
    "factored_linear": "(Tensor x, Tensor left, Tensor right, Tensor row, Tensor middle, Tensor column, "
    "Tensor? bias, int activation) -> Tensor",
    "integer_linear": "(Tensor x, Tensor words, Tensor? bias, int bits, int groups, int activation) -> Tensor",
}

_log = logging.getLogger(__name__)
_library = torch.library.Library("hf_qep", "FRAGMENT")


@dataclass(frozen=True)
class Kernels:
    """What was chosen. The three products are operators; None for `torch`."""

    backend: str
    isa: str | None = None
    why: str | None = None
    """for `torch`: what is missing"""
    sign_linear: Any = None
    factored_linear: Any = None
    integer_linear: Any = None

    @property
    def native(self) -> bool:
        """Whether the operators are there."""
        return self.sign_linear is not None


_chosen: Kernels | None = None


def kernels() -> Kernels:
    """The choice of this process; the first call makes it. Raises KernelError if HF_QEP_KERNELS cannot be had."""
    global _chosen
    if _chosen is None:
        _chosen = _choose(os.environ.get("HF_QEP_KERNELS") or None)
    return _chosen


def folders() -> list[Path]:
    """Where built libraries are looked for: beside this file, then in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return [Path(__file__).parent, (Path(cache) if cache else Path.home() / ".cache") / "hf_qep" / "kernels"]


def _choose(wanted: str | None) -> Kernels:
    if wanted not in (None, *BACKENDS):
        raise KernelError(f"HF_QEP_KERNELS must be one of {', '.join(BACKENDS)}, not {wanted!r}")
    problems = []
    for name, open_it in (("operator", _open_operator), ("ctypes", _open_ctypes)):
        if wanted not in (None, name):
            continue
        try:
            library = open_it()
            isa = _instruction_set(library)
        except (OSError, AttributeError, RuntimeError) as error:  # a missing file, a foreign one, a failed build
            problems.append(f"{name}: {error}")
            continue
        return Kernels(name, isa, None, *(getattr(torch.ops.hf_qep, product).default for product in SCHEMAS))
    if wanted in ("operator", "ctypes"):
        raise KernelError(f"HF_QEP_KERNELS={wanted} cannot be had ({problems[0]}); leave it out, or install a compiler")
    return Kernels("torch", why="; ".join(problems) or "HF_QEP_KERNELS=torch")


def _find(name: str) -> Path | None:
    return next((folder / name for folder in folders() if (folder / name).is_file()), None)


def _open_operator() -> ctypes.CDLL:
    found = _find(build.operator_name())
    if found is None:
        raise FileNotFoundError("the operator was not built at installation")
    library = _checked(ctypes.CDLL(str(found)))
    _define()
    torch.ops.load_library(str(found))
    return library


def _open_ctypes() -> ctypes.CDLL:
    found = _find(build.library_name())
    if found is None:
        _log.warning("building the kernels for this processor, once; it takes up to a minute")
        found = build.build_library(folders()[-1])
    library = _checked(ctypes.CDLL(str(found)))
    _define()
    _implement(library)
    return library


def _checked(library: ctypes.CDLL) -> ctypes.CDLL:
    if library.hfq_abi() != ABI:
        raise OSError(f"the built library has interface {library.hfq_abi()} and {ABI} is needed; install again")
    library.hfq_isa.restype = library.hfq_isas.restype = ctypes.c_char_p
    library.hfq_set_isa.argtypes = [ctypes.c_char_p]
    return library


def _instruction_set(library: ctypes.CDLL) -> str:
    wanted = os.environ.get("HF_QEP_ISA")
    if wanted and library.hfq_set_isa(wanted.encode()):
        raise KernelError(f"HF_QEP_ISA={wanted} is not to be had here, only {library.hfq_isas().decode()}")
    return library.hfq_isa().decode()


# ---- operators ----


def _define() -> None:
    """Schemas and fakes; once, whichever library comes behind them."""
    if hasattr(torch.ops.hf_qep, "sign_linear"):
        return
    for name, schema in SCHEMAS.items():
        _library.define(name + schema)
    fakes: dict[str, Callable[..., Tensor]] = {
        "sign_linear": lambda x, tiles, row_scale, column_scale, bias, out_features, activation: x.new_empty(
            *x.shape[:-1], out_features
        ),
        "factored_linear": lambda x, left, right, row, *rest: x.new_empty(*x.shape[:-1], row.shape[0]),
        "integer_linear": lambda x, words, *rest: x.new_empty(*x.shape[:-1], words.shape[0]),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"hf_qep::{name}", fake, lib=_library)


def _implement(library: ctypes.CDLL) -> None:
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    sign, factored, integer = (getattr(library, f"hfq_{name}") for name in SCHEMAS)
    sign.argtypes = [pointer, pointer, number, size, size, size, pointer, pointer, size, pointer, pointer]
    factored.argtypes = [pointer, pointer, number, size, size, size, size, *[pointer] * 6]
    integer.argtypes = [pointer, pointer, number, size, size, size, pointer, size, number, size, pointer]
    for function in (sign, factored, integer):
        function.argtypes += [number, number]

    def sign_linear(x, tiles, row_scale, column_scale, bias, out_features, activation):
        x, y, tokens = _prepared(x, out_features)
        groups = row_scale.shape[1] if row_scale.dim() == 3 else 1
        held = _pointers(tiles, row_scale), _pointers(column_scale, bias)
        sizes = (DTYPES[x.dtype], tokens, out_features, x.shape[-1])
        _check(
            sign(y.data_ptr(), x.data_ptr(), *sizes, *held[0], groups, *held[1], activation, torch.get_num_threads())
        )
        return y

    def factored_linear(x, left, right, row, middle, column, bias, activation):
        x, y, tokens = _prepared(x, row.shape[0])
        held = _pointers(left, right, row, middle, column, bias)
        sizes = (DTYPES[x.dtype], tokens, row.shape[0], middle.shape[0], x.shape[-1])
        _check(factored(y.data_ptr(), x.data_ptr(), *sizes, *held, activation, torch.get_num_threads()))
        return y

    def integer_linear(x, words, bias, bits, groups, activation):
        x, y, tokens = _prepared(x, words.shape[0])
        sizes = (DTYPES[x.dtype], tokens, words.shape[0], x.shape[-1])
        packed = (*_pointers(words), words.shape[1], bits, groups, *_pointers(bias))
        _check(integer(y.data_ptr(), x.data_ptr(), *sizes, *packed, activation, torch.get_num_threads()))
        return y

    for function in (sign_linear, factored_linear, integer_linear):
        _library.impl(function.__name__, function, "CPU")


def _prepared(x: Tensor, out_features: int) -> tuple[Tensor, Tensor, int]:
    x = x.contiguous()
    return x, x.new_empty(*x.shape[:-1], out_features), x.numel() // max(x.shape[-1], 1)


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def _check(status: int) -> None:
    if status:
        raise RuntimeError(
            "out of memory in a packed product" if status == 2 else "sizes of a packed product do not fit"
        )
