"""The processor kernels through their C interface, every instruction set of this machine against numpy."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from hf_qep.kernels.build import SOURCES, build_library, compiler

F32, F16, BF16 = 0, 1, 2
EXACT, INT8 = 0, 1
OK, BAD_ARGUMENT = 0, 1
BLOCK = 128
TOLERANCE = {F32: 3e-6, F16: 5e-4, BF16: 4e-3}
"""Of a result as a whole; the second and third are the rounding of the dtype."""
GUARD = 64
MARK = 0x5A


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if compiler() is None:
        pytest.skip("no C++ compiler on the path")
    found = ctypes.CDLL(str(build_library(tmp_path_factory.mktemp("kernels"))))
    found.hfq_isa.restype = found.hfq_isas.restype = ctypes.c_char_p
    pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    head = [pointer, pointer, integer]
    found.hfq_sign_linear.argtypes = [*head, *[size] * 3, pointer, pointer, size, pointer, pointer, integer, integer]
    found.hfq_factored_linear.argtypes = [*head, *[size] * 4, *[pointer] * 6, integer, integer]
    found.hfq_integer_linear.argtypes = [*head, *[size] * 3, pointer, size, integer, size, pointer, integer, integer]
    return found


SETS = {"x86_64": ["avx512vnni", "avx512", "avx2"], "aarch64": ["neon"]}.get(platform.machine(), [])


@pytest.fixture(params=[*SETS, "scalar"])
def lib(library, request):
    """The library with each instruction set in turn."""
    before = library.hfq_isa()
    if library.hfq_set_isa(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    yield library
    library.hfq_set_isa(before)


# --- numpy's side ---


def bf16(x):
    """Bits of the nearest bfloat16, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def to_dtype(x, dtype):
    return np.ascontiguousarray({F32: np.float32, F16: np.float16, BF16: bf16}[dtype](x))


def to_float(x, dtype):
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == BF16 else x.astype(np.float32)


def aligned(array):
    """A copy that starts on a cache line."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def tile(rows):
    """(rows, k) -> (ceil(rows/64), k, 64)."""
    padded = np.pad(rows, ((0, -len(rows) % 64), (0, 0)))
    return aligned(padded.reshape(-1, 64, rows.shape[1]).transpose(0, 2, 1))


def tile_signs(signs):
    bits = np.pad(signs > 0, ((0, 0), (0, -signs.shape[1] % 32)))
    return tile(np.packbits(bits, axis=1, bitorder="little").view(np.uint32))


def at(array):
    return None if array is None else array.ctypes.data


def rounded_blocks(x, size):
    """float32 (tokens, in) as the kernels round it: one int8 scale per block; blocks begin anew every `size` inputs."""
    out = np.empty(x.shape, np.float64)
    for group in range(0, x.shape[1], size):
        for start in range(group, min(group + size, x.shape[1]), BLOCK):
            part = x[:, start : min(start + BLOCK, group + size)]
            top = np.abs(part).max(1, keepdims=True)
            scale = np.where(top < 1e-36, np.float32(1e-38), top / np.float32(127))
            inverse = np.where(top < 1e-36, np.float32(1e38), np.float32(127) / np.maximum(top, np.float32(1e-36)))
            out[:, start : start + part.shape[1]] = np.rint(part * inverse).astype(np.float64) * scale
    return out


def distance(y, expected):
    """Of the worst token, against the length of what was expected."""
    return (np.linalg.norm(y - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-30)).max()


class Result:
    """Memory for y that shows whether anything was written beyond it."""

    def __init__(self, tokens, out, dtype):
        self.shape, self.dtype = (tokens, out), dtype
        self.raw = np.full(tokens * out * (4 if dtype == F32 else 2) + GUARD, MARK, np.uint8)

    def values(self):
        assert (self.raw[-GUARD:] == MARK).all(), "written beyond the result"
        kind = {F32: np.float32, F16: np.float16, BF16: np.uint16}[self.dtype]
        return to_float(self.raw[:-GUARD].view(kind), self.dtype).reshape(self.shape)

    def untouched(self):
        return bool((self.raw == MARK).all())


@dataclass
class Sign:
    """One call of hfq_sign_linear."""

    x: np.ndarray
    signs: np.ndarray
    row: np.ndarray
    column: np.ndarray | None = None
    bias: np.ndarray | None = None
    dtype: int = F32
    activation: int = EXACT
    threads: int = 1

    @classmethod
    def random(cls, tokens, out, width, groups=1, seed=0, with_column=True, with_bias=True, dtype=F32, **rest):
        rng = np.random.default_rng([tokens, out, width, groups, seed])
        return cls(
            x=to_dtype(rng.standard_normal((tokens, width)), dtype),
            signs=rng.choice(np.array([-1.0, 1.0]), (out, width)),
            row=rng.uniform(0.5, 1.5, (out, groups)).astype(np.float16),
            column=rng.uniform(0.5, 1.5, width).astype(np.float16) if with_column else None,
            bias=to_dtype(rng.standard_normal(out), dtype) if with_bias else None,
            dtype=dtype,
            **rest,
        )

    def activations(self):
        x = to_float(self.x, self.dtype)
        return x if self.column is None else x * self.column.astype(np.float32)

    def expected(self):
        x, groups = self.activations(), self.row.shape[1]
        if self.activation == INT8:
            x = rounded_blocks(x, x.shape[1] // groups)
        dense = self.signs.reshape(len(self.signs), groups, -1) * self.row.astype(np.float64)[..., None]
        y = x.astype(np.float64) @ dense.reshape(self.signs.shape).T
        return y if self.bias is None else y + to_float(self.bias, self.dtype)

    def call(self, lib, result, **changed):
        groups = self.row.shape[1]
        scale = tile(self.row) if groups > 1 else self.row
        tiles = tile_signs(self.signs)
        a = dict(y=at(result.raw), x=at(self.x), dtype=self.dtype, tokens=len(self.x), out=len(self.signs))
        a |= dict(width=self.x.shape[1], tiles=at(tiles), row=at(scale), groups=groups, column=at(self.column))
        a |= dict(bias=at(self.bias), activation=self.activation, threads=self.threads)
        return lib.hfq_sign_linear(*(a | changed).values())

    def run(self, lib):
        result = Result(len(self.x), len(self.signs), self.dtype)
        assert self.call(lib, result) == OK
        return result.values()


@dataclass
class Factored:
    """One call of hfq_factored_linear."""

    x: np.ndarray
    left: np.ndarray
    right: np.ndarray
    row: np.ndarray
    middle: np.ndarray
    column: np.ndarray
    bias: np.ndarray | None
    activation: int
    threads: int = 1

    @classmethod
    def random(cls, tokens, out, rank, width, activation=EXACT, threads=1):
        rng = np.random.default_rng([tokens, out, rank, width])
        left, right = Sign.random(tokens, out, rank), Sign.random(tokens, rank, width)
        middle = rng.uniform(0.5, 1.5, rank).astype(np.float16)
        return cls(right.x, left.signs, right.signs, left.row, middle, right.column, left.bias, activation, threads)

    def expected(self):
        right = Sign(self.x, self.right, self.middle[:, None], self.column, None, F32, self.activation)
        middle = right.expected().astype(np.float32)
        return Sign(middle, self.left, self.row, None, self.bias, F32, self.activation).expected()

    def call(self, lib, result, **changed):
        left, right = tile_signs(self.left), tile_signs(self.right)
        a = dict(y=at(result.raw), x=at(self.x), dtype=F32, tokens=len(self.x), out=len(self.left))
        a |= dict(rank=len(self.right), width=self.x.shape[1], left=at(left), right=at(right), row=at(self.row))
        a |= dict(middle=at(self.middle), column=at(self.column), bias=at(self.bias), activation=self.activation)
        a |= dict(threads=self.threads)
        return lib.hfq_factored_linear(*(a | changed).values())

    def run(self, lib):
        result = Result(len(self.x), len(self.left), F32)
        assert self.call(lib, result) == OK
        return result.values()


@dataclass
class Integer:
    """One call of hfq_integer_linear."""

    x: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    bits: int
    bias: np.ndarray | None = None
    dtype: int = F32
    activation: int = EXACT
    threads: int = 1
    spare_words: int = 0

    @classmethod
    def random(cls, tokens, out, width, bits, groups=1, dtype=F32, **rest):
        rng = np.random.default_rng([tokens, out, width, bits, groups])
        half = 1 << (bits - 1)
        return cls(
            x=to_dtype(rng.standard_normal((tokens, width)), dtype),
            codes=rng.integers(-half, half, (out, width)),
            scale=(rng.uniform(0.5, 1.5, (out, groups)) * rng.choice([-1, 1], (out, groups))).astype(np.float16),
            bits=bits,
            bias=to_dtype(rng.standard_normal(out), dtype),
            dtype=dtype,
            **rest,
        )

    def words(self):
        out, width = self.codes.shape
        stored = (self.codes + (1 << (self.bits - 1))).astype(np.uint8)
        bits = np.unpackbits(stored.reshape(out, width, 1), axis=2, bitorder="little")[..., : self.bits]
        bits = bits.reshape(out, -1)
        bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 32)), constant_values=1)  # padding that must not matter
        scale = np.pad(self.scale, ((0, 0), (0, self.scale.shape[1] % 2))).view(np.uint32)
        spare = np.full((out, self.spare_words), 0xFFFFFFFF, np.uint32)
        codes = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
        return np.concatenate([scale, codes, spare], axis=1)

    def expected(self):
        x, (out, groups) = to_float(self.x, self.dtype), self.scale.shape
        size = x.shape[1] // groups
        if self.activation == INT8 and (groups == 1 or size % BLOCK == 0):
            x = rounded_blocks(x, x.shape[1])
        dense = self.codes.reshape(out, groups, -1) * self.scale.astype(np.float64)[..., None]
        y = x.astype(np.float64) @ dense.reshape(self.codes.shape).T
        return y if self.bias is None else y + to_float(self.bias, self.dtype)

    def call(self, lib, result, **changed):
        words = self.words()
        a = dict(y=at(result.raw), x=at(self.x), dtype=self.dtype, tokens=len(self.x), out=len(self.codes))
        a |= dict(width=self.x.shape[1], words=at(words), row_words=words.shape[1], bits=self.bits)
        a |= dict(groups=self.scale.shape[1], bias=at(self.bias), activation=self.activation, threads=self.threads)
        return lib.hfq_integer_linear(*(a | changed).values())

    def run(self, lib):
        result = Result(len(self.x), len(self.codes), self.dtype)
        assert self.call(lib, result) == OK
        return result.values()


def check(lib, call, tolerance=None):
    if tolerance is None:
        tolerance = max(TOLERANCE[getattr(call, "dtype", F32)], 1e-5 if call.activation == INT8 else 0)
    found = distance(call.run(lib), call.expected())
    assert found <= tolerance, f"{found:.2e} from {type(call).__name__} {call.x.shape}, dtype {call.dtype}"


SHAPES = [  # tokens, out, in
    (1, 1, 1), (1, 63, 31), (2, 64, 32), (1, 65, 33), (3, 200, 172), (1, 200, 4128), (2, 65, 1000), (5, 64, 1000),
    (6, 1, 4128), (7, 63, 33), (13, 200, 1000), (40, 65, 172), (4, 130, 4096), (40, 64, 1),
]  # fmt: skip


# --- products ---


@pytest.mark.parametrize("activation", [EXACT, INT8])
def test_signs(lib, activation):
    for i, (tokens, out, width) in enumerate(SHAPES):
        for dtype in (F32, F16, BF16) if i % 3 == 0 else (F32,):
            options = dict(with_column=i % 2 == 0, with_bias=i % 4 < 2, dtype=dtype, activation=activation)
            check(lib, Sign.random(tokens, out, width, **options))


@pytest.mark.parametrize("activation", [EXACT, INT8])
def test_signs_with_group_scales(lib, activation):
    for size, count in [(32, 3), (64, 5), (128, 8), (96, 4), (160, 3), (1280, 2), (2048, 2)]:
        for tokens, out in [(1, 65), (2, 64), (7, 130)]:
            check(lib, Sign.random(tokens, out, size * count, groups=count, activation=activation))


@pytest.mark.parametrize("activation", [EXACT, INT8])
def test_factored(lib, activation):
    for rank in (8, 40, 200):
        for tokens, out, width in [(1, 200, 172), (2, 65, 1000), (7, 130, 33), (300, 65, 64)]:
            call = Factored.random(tokens, out, rank, width, activation)
            # One step of int8 more or less where the middle is next to a tie.
            assert distance(call.run(lib), call.expected()) <= (3e-3 if activation == INT8 else 3e-6)


@pytest.mark.parametrize("activation", [EXACT, INT8])
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_codes(lib, bits, activation):
    for i, (tokens, out, width) in enumerate(SHAPES):
        dtype = (F32, F16, BF16)[i % 3]
        check(lib, Integer.random(tokens, out, width, bits, dtype=dtype, activation=activation, spare_words=i % 2))
    for tokens, width, groups in [(1, 1024, 8), (3, 1024, 4), (9, 768, 3), (1, 384, 12), (5, 63, 7), (2, 40, 40)]:
        check(lib, Integer.random(tokens, 70, width, bits, groups, activation=activation))


# --- numbers at their limits ---


@pytest.mark.parametrize("activation", [EXACT, INT8])
def test_the_largest_sums_do_not_overflow(lib, activation):
    for value in (1.0, -1.0):
        for tokens in (1, 2, 5):
            wide = Sign.random(tokens, 64, 65536, with_column=False, with_bias=False, activation=activation)
            call = replace(wide, x=np.full_like(wide.x, value), signs=np.ones_like(wide.signs))
            assert np.allclose(call.run(lib), call.expected(), rtol=2e-6)
        for bits in (4, 8):
            for code in (-(1 << (bits - 1)), (1 << (bits - 1)) - 1):
                codes = Integer.random(2, 5, 16384, bits, activation=activation)
                call = replace(codes, x=np.full_like(codes.x, value), codes=np.full_like(codes.codes, code))
                assert np.allclose(call.run(lib), call.expected(), rtol=2e-6)


def test_an_outlier_spoils_only_its_own_block(lib):
    call = Sign.random(1, 200, 1024, with_column=False, with_bias=False, activation=INT8)
    call.x[0, 300] = 1000
    exact = replace(call, activation=EXACT)
    outlier = slice(256, 384)
    for one in (call, exact):
        one.signs = call.signs.copy()
    call.x[0, outlier] = np.where(np.arange(256, 384) == 300, 1000, 0)
    assert distance(call.run(lib), exact.expected()) < 1e-2
    rest = np.delete(call.x, np.s_[outlier], axis=1), np.delete(call.signs, np.s_[outlier], axis=1)
    expected = (rest[0].astype(np.float64) @ rest[1].T) * call.row.astype(np.float64).T
    spike = call.signs[:, 300] * 1000.0 * call.row[:, 0].astype(np.float64)
    assert distance(call.run(lib) - spike, expected) < 2e-2


@pytest.mark.parametrize("activation", [EXACT, INT8])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(lib, value, activation):
    for tokens in (1, 2, 3, 7):
        calls = [Sign.random(tokens, 70, 300), Sign.random(tokens, 70, 256, groups=2)]
        calls += [Factored.random(tokens, 70, 40, 300), *(Integer.random(tokens, 70, 300, bits) for bits in (4, 8))]
        for call in calls:
            call.activation = activation
            call.x[-1, 37] = value
            if isinstance(call, Integer):
                call.codes[:, 37] = np.where(call.codes[:, 37] == 0, 1, call.codes[:, 37])
            y = call.run(lib)
            assert not np.isfinite(y[-1]).any()
            assert np.isfinite(y[:-1]).all()


def test_half_precision_at_its_limits(lib):
    """The conversions themselves: one +1 weight and row scale 1 give every value back."""
    every = np.arange(1 << 16, dtype=np.uint16)
    for dtype, x in ((F16, every.view(np.float16)), (BF16, every)):
        call = Sign(x.reshape(-1, 1), np.ones((1, 1)), np.ones((1, 1), np.float16), dtype=dtype)
        with np.errstate(invalid="ignore"):
            assert np.array_equal(call.run(lib)[:, 0], to_float(x, dtype), equal_nan=True)
    odd = np.array([1e-8, 6e-8, 3e-5, 65519, 65520, 1e30, 1.0009765, 2049, 2051, -1e-8], np.float32)
    call = Sign(np.ones((1, 1), np.float16), np.ones((len(odd), 1)), np.ones((len(odd), 1), np.float16), dtype=F16)
    call.bias = None
    call.row = np.float16(odd.clip(-65504, 65504)).reshape(-1, 1)
    assert np.array_equal(call.run(lib)[0], call.row[:, 0].astype(np.float32))


@pytest.mark.parametrize("size", [1e-44, 1e-37, 1e-30, 1e30])
def test_int8_of_very_small_and_large_numbers(lib, size):
    call = Sign.random(1, 64, 256, with_column=False, with_bias=False, activation=INT8)
    call.x = (call.x * np.float32(size)).astype(np.float32)
    y = call.run(lib)
    assert np.isfinite(y).all()
    if size > 1e-38:
        assert distance(y, call.expected()) < 1e-2


# --- threads ---


@pytest.mark.parametrize("activation", [EXACT, INT8])
def test_the_number_of_threads_changes_no_bit(lib, activation):
    calls = [Sign.random(1, 1100, 4096), Sign.random(2, 1100, 4096, groups=32), Sign.random(29, 700, 1024)]
    calls += [Factored.random(1, 2048, 2100, 2048), Integer.random(1, 600, 2048, 4), Integer.random(9, 300, 2048, 8, 4)]
    for call in calls:
        call.activation = activation
        one, two, three = (replace(call, threads=n).run(lib) for n in (1, 2, 3))
        assert one.tobytes() == two.tobytes() == three.tobytes()


def test_exact_results_do_not_depend_on_the_batch(lib):
    for groups in (1, 8):
        call = Sign.random(9, 200, 2048, groups=groups)
        together = call.run(lib)
        for t in (0, 5, 8):
            assert replace(call, x=call.x[t : t + 1]).run(lib).tobytes() == together[t : t + 1].tobytes()


def test_callers_in_several_threads_do_not_disturb_each_other(library):
    calls = [Sign.random(1 + i % 3, 1100, 4096, activation=i % 2, threads=2 + i % 2) for i in range(4)]
    expected = [call.run(library).tobytes() for call in calls]

    def repeat(i):
        return all(calls[i].run(library).tobytes() == expected[i] for _ in range(8))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


def test_a_forked_child_can_call(library):
    call = Sign.random(1, 1100, 4096, threads=3)
    expected = call.run(library).tobytes()  # the parent has helpers now

    def child(pipe):
        pipe.send(call.run(library).tobytes() == expected)

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    assert here.poll(60) and here.recv()
    process.join(60)
    assert process.exitcode == 0
    assert call.run(library).tobytes() == expected


# --- the interface ---


def test_names(library):
    names = library.hfq_isas().decode().split(",")
    assert library.hfq_abi() == 1
    assert library.hfq_isa().decode() == names[0] and names[-1] == "scalar"
    assert library.hfq_set_isa(b"none such") == BAD_ARGUMENT and library.hfq_set_isa(None) == BAD_ARGUMENT
    assert library.hfq_isa().decode() == names[0]


COMMON = [
    dict(y=None), dict(x=None), dict(dtype=3), dict(dtype=-1), dict(tokens=-1), dict(out=0), dict(width=0),
    dict(out=1 << 31), dict(activation=2), dict(threads=0),
]  # fmt: skip


def test_bad_arguments_write_nothing(library):
    odd = aligned(np.zeros(64, np.uint32)).ctypes.data + 4
    sign, factored = Sign.random(2, 64, 96), Factored.random(2, 64, 40, 96)
    integer = Integer.random(2, 64, 96, 4)
    cases = [(sign, change) for change in COMMON]
    cases += [(sign, c) for c in (dict(tiles=None), dict(tiles=odd), dict(row=None), dict(groups=0), dict(groups=2))]
    cases += [(factored, change) for change in COMMON]
    cases += [(factored, {name: None}) for name in ("left", "right", "row", "middle", "column")]
    cases += [(factored, dict(rank=0)), (factored, dict(left=odd)), (factored, dict(right=odd))]
    cases += [(integer, change) for change in COMMON]
    cases += [
        (integer, c) for c in (dict(words=None), dict(bits=5), dict(groups=5), dict(groups=97), dict(row_words=12))
    ]
    for call, change in cases:
        result = Result(2, 64, F32)
        assert call.call(library, result, **change) == BAD_ARGUMENT, change
        assert result.untouched()


def test_no_tokens_are_no_error(library):
    for call in (Sign.random(2, 64, 96), Factored.random(2, 64, 40, 96), Integer.random(2, 64, 96, 4)):
        result = Result(2, 64, F32)
        assert call.call(library, result, tokens=0) == OK
        assert result.untouched()


def test_neon_under_emulation(tmp_path):
    """The units of another architecture against plain C++, with and without the dot product instructions."""
    cxx, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not cxx or not emulator:
        pytest.skip("aarch64-linux-gnu-g++ or qemu-aarch64 is not on the path")
    units = json.loads((SOURCES / "units.json").read_text())
    jobs = [(SOURCES / source, flags) for source, flags in units["any"] + units["aarch64"]]
    jobs.append((Path(__file__).parent / "neon_check.cpp", [f"-I{SOURCES}"]))

    def compile_one(job):
        source, flags = job
        made = tmp_path / f"{source.stem}.o"
        subprocess.run([cxx, "-O1", "-std=c++20", "-pthread", *flags, "-c", source, "-o", made], check=True)
        return made

    harness = tmp_path / "neon_check"
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    subprocess.run([cxx, "-static", "-pthread", *objects, "-o", harness], check=True)
    for cpu in ("cortex-a53", "neoverse-n1"):
        done = subprocess.run([emulator, "-cpu", cpu, harness], capture_output=True, text=True)
        assert done.returncode == 0, f"{cpu}: {done.stdout}{done.stderr}"
