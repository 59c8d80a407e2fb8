"""Contenders of `bench_speed.py kernels` and `overhead`, and how they take turns.

A contender goes through copies of its weights, which together are larger than any cache.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peer_llamacpp import Ggml
from speed_models import TABLE_GROUP, random_floats, random_integers, random_words, rank_of, repeated
from torch import Tensor

from hf_qep.bitorder import scale_words, words_for
from hf_qep.formats import sign
from hf_qep.kernels import dispatch
from hf_qep.modules import QepLinear

try:  # a tree without native kernels
    from hf_qep.kernels.native import kernels
except ImportError:
    kernels = None

DENSE_POOL = 1.25
"""Bytes of dense copies in those of packed ones: 200 MB to 160 MB."""
GROUP = 128
TILE = 64
SCALE = 0.02
EXACT, INT8 = 0, 1
Run = Callable[[int], float]
"""Calls -> seconds."""


# ---- rounds ----


def in_turns(slices: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """What every slice gave in each round."""
    found: dict[str, list[Any]] = {name: [] for name in slices}
    for _ in range(rounds):
        for name, take in slices.items():
            found[name].append(take())
    return found


def calls_in(run: Callable[[int], float], seconds: float) -> int:
    """Calls that take about so long, after a warm-up."""
    run(1)
    return max(1, min(5000, int(seconds / max(run(2) / 2, 1e-7)) + 1))


def per_call(runs: dict[str, Callable[[int], float]], seconds: float, rounds: int) -> dict[str, tuple[float, float]]:
    """Name -> median seconds of a call and its spread."""
    counts = {name: calls_in(run, seconds) for name, run in runs.items()}
    slices = {name: lambda run=run, n=counts[name]: run(n) / n for name, run in runs.items()}
    return {name: (statistics.median(values), spread(values)) for name, values in in_turns(slices, rounds).items()}


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, as a fraction of the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / statistics.median(values)


def reading(megabytes: float) -> tuple[Callable[[int], float], float]:
    """A contender that reads so much memory, and its bytes."""
    block = torch.ones(int(megabytes * 1e6) // 4)

    def run(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            block.sum()
        return time.perf_counter() - began

    return run, 4.0 * block.numel()


# ---- products ----


@dataclass
class Contender:
    """Weights and a product with them. product: x (batch, in) and one copy of the weights -> (batch, out)."""

    bits: float
    weights: Sequence[Any]
    product: Callable[[Tensor, Any], object]
    columns: int
    dtype: torch.dtype = torch.bfloat16

    def runner(self, batch: int, threads: int) -> Run:
        """threads: what torch is set to."""
        x = torch.randn(batch, self.columns).to(self.dtype)
        return in_a_row([partial(self.product, x, weight) for weight in self.weights])


@dataclass
class GgmlContender:
    """A product that the harness holds."""

    bits: float
    ggml: Ggml
    name: str

    def runner(self, batch: int, threads: int) -> Run:
        """batch: what it was made for."""
        return partial(self.ggml.run, self.name, threads=threads)

    def close(self) -> None:
        """Free the weights."""
        self.ggml.drop(self.name)


def in_a_row(calls: Sequence[Callable[[], object]]) -> Run:
    """Runs go on with the call after the last one."""
    endless = itertools.cycle(calls)

    def run(count: int) -> float:
        began = time.perf_counter()
        for call in itertools.islice(endless, count):
            call()
        return time.perf_counter() - began

    return run


def contenders_of(out: int, into: int, pool: float) -> dict[str, Contender]:
    """Ours and torch's. pool: bytes of all copies of packed weights."""
    ours = native_contenders if kernels is not None and kernels().native else reference_contenders
    return ours(out, into, pool) | torch_contenders(out, into, DENSE_POOL * pool)


def native_contenders(out: int, into: int, pool: float) -> dict[str, Contender]:
    """The operators of the native kernels; exact and int8 go through the same copies."""
    chosen = kernels()
    rank = rank_of(out, into)
    sizes = {"1-bit": out * into, "1-bit group 128": out * into, "factored 1 bit": rank * (out + into)}

    def scales(*shape: int, size: float = 1.0) -> Tensor:
        return torch.full(shape, size, dtype=torch.float16)

    rows = scales(out, 1, size=SCALE)
    grouped = scales(-(-out // TILE), max(1, into // GROUP), TILE, size=SCALE)
    middle, columns = scales(rank), scales(into)

    def plain(how: int, x: Tensor, tiles: Tensor) -> Tensor:
        return chosen.sign_linear(x, tiles, rows, columns, None, out, how)

    def by_group(how: int, x: Tensor, tiles: Tensor) -> Tensor:
        return chosen.sign_linear(x, tiles, grouped, None, None, out, how)

    def factors(how: int, x: Tensor, tiles: tuple[Tensor, Tensor]) -> Tensor:
        return chosen.factored_linear(x, *tiles, rows.view(-1), middle, columns, None, how)

    found = {}
    for (name, bits), product in zip(sizes.items(), (plain, by_group, factors), strict=True):
        copies = math.ceil(pool / (bits / 8))
        if product is factors:
            weights = list(zip(tiles_of(copies, out, rank), tiles_of(copies, rank, into), strict=True))
        else:
            weights = tiles_of(copies, out, into)
        for label, how in (("exact", EXACT), ("int8", INT8)):
            found[f"{name}, {label}"] = Contender(bits / (out * into), weights, partial(product, how), into)
    return found | table_contenders(out, into, pool)


def table_contenders(out: int, into: int, pool: float) -> dict[str, Contender]:
    """The operator of embeddings and heads in 4 bits."""
    chosen, groups = kernels(), into // TABLE_GROUP
    bits = 4 + 16 / TABLE_GROUP
    size = torch.Size((out, scale_words(groups) + words_for(into, 4)))
    weights = [random_integers(size, groups) for _ in range(math.ceil(pool / (bits * out * into / 8)))]

    def product(how: int, x: Tensor, words: Tensor) -> Tensor:
        return chosen.integer_linear(x, words, None, 4, groups, how)

    ways = (("exact", EXACT), ("int8", INT8))
    return {f"4-bit, {label}": Contender(bits, weights, partial(product, how), into) for label, how in ways}


def tiles_of(copies: int, rows: int, columns: int) -> list[Tensor]:
    """Random signs in the order of the native kernels."""
    return list(random_words((copies, -(-rows // TILE), -(-columns // 32), TILE)))


def reference_contenders(out: int, into: int, pool: float) -> dict[str, Contender]:
    """What there is without native kernels."""
    copies = math.ceil(pool / (out * into / 8))
    words = list(random_words((copies, out, into // 32)))
    rows, columns = torch.full((out, 1), SCALE).half(), torch.ones(into).half()

    def product(x: Tensor, packed: Tensor) -> Tensor:
        return dispatch.sign_linear(x, packed, rows, columns, None)

    return {"1-bit, torch reference": Contender(1.0, words, product, into)}


def torch_contenders(out: int, into: int, pool: float) -> dict[str, Contender]:
    """What torch has itself: float weights, 8 bits with a scale per row, 4 bits with one per 128 inputs."""
    count = out * into
    half = random_floats("weight", torch.empty(count, dtype=torch.bfloat16, device="meta")).view(out, into)
    codes = torch.randint(0, 16, (out, into), dtype=torch.int32)
    nibbles = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    octets = repeated(torch.randint(-127, 128, (min(count, 1 << 22),), dtype=torch.int8), (out, into))
    scale8, scale4 = torch.full((out,), 1e-4).bfloat16(), torch.full((into // GROUP, out, 2), 1e-3).bfloat16()

    def copies(weight: Tensor) -> list[Tensor]:
        more = math.ceil(pool / (weight.numel() * weight.itemsize)) - 1
        return [weight, *(weight.clone() for _ in range(more))]

    def int8(x: Tensor, weight: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, weight, scale8)

    def int4(x: Tensor, weight: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, weight, GROUP, scale4)

    return {
        "torch bf16": Contender(16.0, copies(half), F.linear, into),
        "torch fp32": Contender(32.0, copies(half.float()), F.linear, into, torch.float32),
        "torch int8 weights": Contender(8.0, copies(octets), int8, into),
        "torch int4 weights": Contender(4.25, copies(nibbles), int4, into),
    }


def ggml_contenders(
    ggml: Ggml, kinds: list[str], sizes: tuple[int, int, int], pool: float, absent: list[str]
) -> dict[str, GgmlContender]:
    """llama.cpp's types. sizes: out, in, batch; types that do not serve them are told in `absent`."""
    out, into, batch = sizes
    found = {}
    for kind in kinds:
        try:
            bits, _ = ggml.make(kind, kind, out, into, batch, pool)
        except RuntimeError as error:
            absent.append(f"llama.cpp {kind} at {out}x{into}: {error}")
            continue
        found[f"llama.cpp {kind}"] = GgmlContender(bits, ggml, kind)
    return found


# ---- overhead of a call ----


def overhead_calls() -> dict[str, Callable[[], object]]:
    """Ways to multiply 64 x 64 signs by one token, from the bare function to the module."""
    size, x = TILE, torch.randn(1, TILE).bfloat16()
    module = QepLinear(size, size, False, sign.Spec(), torch.bfloat16)
    linear = torch.nn.Linear(size, size, False, dtype=torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {}
    if kernels is not None and kernels().native:
        module.tile()
        chosen, (tiles,) = kernels(), tiles_of(1, size, size)
        rows = torch.full((size, 1), SCALE).half()
        y = torch.empty_like(x)
        for label, how in (("exact", EXACT), ("int8", INT8)):
            bare = bare_function(y, x, tiles, rows, how)
            if bare is not None:
                calls[f"ctypes, {label}"] = bare
            calls[f"torch operator, {label}"] = partial(chosen.sign_linear, x, tiles, rows, None, None, size, how)
            calls[f"QepLinear, {label}"] = partial(module_call, module, label, x)
    else:
        calls["QepLinear, torch reference"] = partial(module, x)
    calls["F.linear bf16"] = partial(F.linear, x, linear.weight)
    calls["nn.Linear bf16"] = partial(linear, x)
    return calls


def module_call(module: QepLinear, how: str, x: Tensor) -> Tensor:
    """Forward of the module with exact or rounded inputs."""
    module.activation = how
    return module(x)


def bare_function(y: Tensor, x: Tensor, tiles: Tensor, rows: Tensor, how: int) -> Callable[[], int] | None:
    """The C function with all arguments made beforehand; None if no library is found."""
    from hf_qep.kernels import build, native

    names = (build.operator_name(), build.library_name())
    found = [folder / name for folder in native.folders() for name in names if (folder / name).is_file()]
    if not found:
        return None
    function = ctypes.CDLL(str(found[0])).hfq_sign_linear
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    words = [pointer(y.data_ptr()), pointer(x.data_ptr()), native.DTYPES[x.dtype], size(1), size(y.shape[-1])]
    words += [size(x.shape[-1]), pointer(tiles.data_ptr()), pointer(rows.data_ptr()), size(1), None, None, how, 1]
    bare = partial(function, *words)
    bare.held = (y, x, tiles, rows)  # the words are addresses
    return bare
