"""The Triton products against float64, in Triton's interpreter, and their compilation for two GPUs without having one.

Triton decides at its import whether it interprets, so each check is a pytest of this file in a process of its own; the
variable HF_QEP_TRITON_CHECK says which.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_qep.bitorder import pack_signs, unpack_signs
from hf_qep.errors import ConfigError
from hf_qep.kernels import reference, triton_sign
from hf_qep.kernels.tiling import k_major

CHECK = os.environ.get("HF_QEP_TRITON_CHECK", "")
LIMIT = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}
"""Relative error: float32 sums, then one rounding; bfloat16 column scales are rounded too."""


def packed(rows: int, columns: int) -> Tensor:
    return pack_signs(torch.rand(rows, columns) > 0.5)


def dense(words: Tensor, columns: int, row_scale: Tensor, column_scale: Tensor | None) -> Tensor:
    """Float64, nothing rounded."""
    signs = unpack_signs(words, columns, torch.float64).unflatten(-1, (row_scale.shape[1], -1))
    matrix = (signs * row_scale.double().unsqueeze(-1)).flatten(-2)
    return matrix if column_scale is None else matrix * column_scale.double()


def assert_close(y: Tensor, wanted: Tensor, dtype: torch.dtype, factor: float = 1) -> None:
    assert y.dtype == dtype and y.shape == wanted.shape
    assert (y.double() - wanted).norm() <= factor * LIMIT[dtype] * wanted.norm()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


if not CHECK:

    def in_another_process(check: str, tmp_path: Path) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed; run: pip install 'hf-qep[gpu]'")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
        kept |= {"HF_QEP_TRITON_CHECK": check, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        kept |= {"TRITON_INTERPRET": "1"} if check == "interpret" else {}
        command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    @pytest.mark.parametrize("check", ["interpret", "compile"])
    def test_in_another_process(check, tmp_path):
        in_another_process(check, tmp_path)

    def test_no_product_on_a_processor_without_the_interpreter():
        assert not triton_sign.available(torch.device("cpu"))
        with pytest.raises(NotImplementedError, match="triton_sign_linear"):
            triton_sign.sign_linear(torch.ones(1, 32), k_major(packed(2, 32)), torch.ones(2, 1), None, None)

    def test_shapes_are_known_without_a_product():
        meta = {"device": "meta"}
        x, words = torch.empty(2, 3, 100, dtype=torch.bfloat16, **meta), torch.empty(4, 63, dtype=torch.int32, **meta)
        y = triton_sign.sign_linear(x, words, torch.empty(63, 1, **meta), None, None)
        assert y.shape == (2, 3, 63) and y.dtype == torch.bfloat16 and y.is_meta
        left = torch.empty(1, 7, dtype=torch.int32, **meta)
        vectors = [torch.empty(n, **meta) for n in (7, 24, 100)]
        assert triton_sign.factored_linear(x, left, words[:, :24], *vectors, None).shape == (2, 3, 7)

    @pytest.mark.parametrize("rank", [8, 40, 64])
    def test_a_matrix_of_whole_bytes_is_padded_to_words(rank):
        positive = torch.rand(5, rank) > 0.5
        octets = pack_signs(positive).view(torch.uint8)[:, : rank // 8]
        assert torch.equal(k_major(octets), pack_signs(positive).t())

    def test_what_is_served():
        x = torch.ones(2, 96)
        assert all(triton_sign.serves(x.to(d), g) for d in triton_sign.DTYPES for g in (1, 3))
        assert not triton_sign.serves(x, 2) and not triton_sign.serves(x, 5) and not triton_sign.serves(x.double())
        assert not triton_sign.serves(x.requires_grad_())

    def test_programs_share_long_rows_only():
        split = {shape: triton_sign._splits(*shape, torch.device("cpu")) for shape in [(64, 31), (64, 64), (64, 999)]}
        assert list(split.values()) == [1, 2, 8] and triton_sign._splits(99999, 999, torch.device("cpu")) == 1


if CHECK == "interpret":
    # 65 and 66 words make two programs share a row.
    SHAPES = [(1, 31, 1), (63, 32, 1), (200, 100, 1), (63, 256, 1), (1, 2080, 1), (63, 2112, 33)]
    GROUPS = [(200, 256, 32), (65, 256, 64), (40, 384, 128), (5, 192, 96)]

    @pytest.mark.parametrize("tokens", [1, 2, 3, 5, 17])
    @pytest.mark.parametrize(("rows", "columns", "groups"), SHAPES + [(r, c, c // size) for r, c, size in GROUPS])
    def test_signs(rows, columns, groups, tokens):
        # Of the dtypes one per case, in turn; scales and bias in every other one.
        dtype = triton_sign.DTYPES[(rows + groups + tokens) % 3]
        more = (columns // 2 + tokens) % 2
        words, scale = packed(rows, columns), (torch.rand(rows, groups) - 0.3).half()
        column_scale = torch.randn(columns).half() if more else None
        bias = torch.randn(rows).to(dtype) if more else None
        x = torch.randn(tokens, columns).to(dtype)
        wanted = x.double() @ dense(words, columns, scale, column_scale).t() + (0 if bias is None else bias.double())
        kwords = k_major(words)
        y = triton_sign.sign_linear(x, kwords, scale.t().contiguous().t(), column_scale, bias)
        assert_close(y, wanted, dtype)
        assert torch.equal(y, triton_sign.sign_linear(x, kwords, scale, column_scale, bias))
        if dtype == torch.float32:
            assert_close(reference.sign_linear(x, words, scale, column_scale, bias), wanted, dtype)

    @pytest.mark.parametrize("case", ["row", "group", "column", "factored"])
    def test_layers_hold_one_tile_and_go_through_these_products(case, monkeypatch):
        from hf_qep.formats import factored, sign
        from hf_qep.modules import QepLinear

        specs = {
            "row": sign.Spec(),
            "group": sign.Spec(group_size=32),
            "column": sign.Spec(column_scale=True),
            "factored": factored.Spec(rank=40, flat=True),
        }
        layer, x = QepLinear(64, 72, True, specs[case], torch.float32), torch.randn(2, 3, 64)
        layer.load_packed(
            {
                name: torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
                if dtype == torch.int32
                else (torch.rand(shape) + 0.1).to(dtype)
                for name, (shape, dtype) in layer.format.layout(layer.spec, 72, 64).items()
            }
        )
        wanted = x.double() @ layer.dequantize(torch.float32).double().t()
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.tile()
        assert layer.tiled and layer.weight.shape == (1, 2, 40 if case == "factored" else 72)
        with torch.no_grad():
            assert_close(layer(x), wanted, torch.float32, 20)
        assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in state.items())
        x.requires_grad_(True)
        layer(x).sum().backward()  # by the reference, from the same tile
        assert (x.grad - layer.dequantize(torch.float32).sum(0)).abs().max() < 1e-3

    @pytest.mark.parametrize("dtype", triton_sign.DTYPES)
    @pytest.mark.parametrize("tokens", [1, 4, 17])
    @pytest.mark.parametrize(("rank", "columns", "flat"), [(8, 31, True), (40, 256, True), (64, 2080, False)])
    def test_factored(rank, columns, flat, tokens, dtype):
        rows = 63
        left, right = packed(rows, rank), packed(rank, columns)
        row, middle, column = (torch.randn(n).half() for n in (rows, rank, columns))
        bias, x = torch.randn(rows).to(dtype), torch.randn(tokens, 1, columns).to(dtype)
        inner = x.double() @ dense(right, columns, middle.unsqueeze(-1), column).t()
        wanted = inner @ dense(left, rank, row.unsqueeze(-1), None).t() + bias.double()
        stored = left.view(torch.uint8)[:, : rank // 8] if flat else left
        kleft, kright = k_major(stored), k_major(right)
        y = triton_sign.factored_linear(x, kleft, kright, row, middle, column, bias)
        assert_close(y, wanted, dtype, factor=2)

    def test_an_input_that_is_not_contiguous_and_no_tokens():
        words, scale = packed(5, 64), torch.rand(5, 1)
        x = torch.randn(64, 6).t().unflatten(0, (2, 3))
        y = triton_sign.sign_linear(x, k_major(words), scale, None, None)
        assert_close(y, x.double() @ dense(words, 64, scale, None).t(), torch.float32)
        assert triton_sign.sign_linear(x[:0], k_major(words), scale, None, None).shape == (0, 3, 5)

    def test_large_inputs_and_column_scales_stay_finite_in_half_precision():
        words, scale = packed(3, 64), torch.full((3, 1), 2.0**-12).half()
        column_scale, x = torch.full((64,), 512.0).half(), torch.full((9, 64), 256.0).half()
        y = triton_sign.sign_linear(x, k_major(words), scale, column_scale, None)
        assert_close(y, x.double() @ dense(words, 64, scale, column_scale).t(), torch.float16)

    def test_wrong_arguments_are_refused():
        words, scale, x = k_major(packed(4, 96)), torch.ones(4, 1), torch.ones(1, 96)
        for wrong in [
            (torch.ones(1, 64), words, scale, None),
            (x, words.t(), scale, None),
            (x, words, torch.ones(5, 1), None),
            (x, words, torch.ones(4, 2), None),
            (x, words, scale, torch.ones(95)),
            (x.double(), words, scale, None),
        ]:
            with pytest.raises(ConfigError):
                triton_sign.sign_linear(*wrong, None)

    @pytest.mark.parametrize("tokens", [1, 5])
    def test_the_operators_are_sound_and_compile_into_one_graph(tokens):
        words, scale, x = k_major(packed(6, 64)), torch.rand(6, 1), torch.randn(tokens, 64)
        left, vectors = k_major(packed(7, 6)), (torch.rand(7), torch.rand(6), torch.rand(64))
        torch.library.opcheck(torch.ops.hf_qep.triton_sign_linear, (x, words, scale, None, torch.rand(6)))
        torch.library.opcheck(torch.ops.hf_qep.triton_factored_linear, (x, left, words, *vectors, None))

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            first = triton_sign.sign_linear(x * 2, words, scale, None, None)
            return first + 1, triton_sign.factored_linear(x, left, words, *vectors, None)

        for compiled, eager in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x), strict=True):
            assert torch.equal(compiled, eager)


if CHECK == "compile":

    def test_importing_the_file_did_not_import_triton():
        assert "triton" not in sys.modules

    class Driver:
        """Stands for a GPU as far as compilation goes; nothing runs. Tuning compiles every tile or only the chosen."""

        def __init__(self, target: object, every: bool) -> None:
            self.get_current_target = lambda: target
            self.get_current_device = lambda: target.arch
            self.get_current_stream = lambda device: 0
            self.get_benchmarker = lambda: lambda launch, quantiles: (every and launch(), [1.0, 1.0, 1.0])[1]

    @pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
    @pytest.mark.parametrize(("capability", "every"), [(90, True), (80, False)])
    def test_kernels_compile_for_a_gpu_that_is_not_there(capability, every, monkeypatch):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.jit import JITFunction

        launch, compiled = JITFunction.run, []

        def compile_only(kernel: JITFunction, *args: object, **how: object) -> object:
            result = launch(kernel, *args, **{**how, "warmup": True})
            compiled.append((kernel.fn.__name__, how.get("BN"), how.get("num_warps"), "cubin" in result.asm))
            return result

        monkeypatch.setattr(JITFunction, "run", compile_only)
        triton.runtime.driver.set_active(Driver(GPUTarget("cuda", capability, 32), every))
        triton_sign._kernels.cache_clear()
        words, scale = k_major(packed(256, 4096)), torch.rand(256, 1).half()
        triton_sign._sign_linear(torch.randn(1, 4096).bfloat16(), words, scale, None, None)  # split: two launches
        triton_sign._sign_linear(torch.randn(17, 4096).half(), words, torch.rand(256, 32), scale.new_ones(4096), None)
        assert {name for name, *_ in compiled} == {"_gemv", "_finish", "_gemm"} and all(done for *_, done in compiled)
        if every:
            tiles = {(name, rows, warps) for name, rows, warps, _ in compiled}
            assert tiles >= {("_gemv", *tile) for tile in triton_sign.GEMV_TILES}
            assert tiles >= {("_gemm", *tile[:2]) for tile in triton_sign.GEMM_TILES}

        if not every:
            return
        compiled.clear()
        triton.runtime.driver.set_active(Driver(GPUTarget("cuda", capability, 32), every=False))
        triton_sign._kernels.cache_clear()
        left, vectors = k_major(packed(64, 256)), [torch.rand(n).half() for n in (64, 256, 4096)]
        for x, name in ((torch.randn(2, 4096).bfloat16(), "_gemv"), (torch.randn(5, 4096), "_gemm")):
            triton_sign._factored_linear(x, left, words, *vectors, torch.rand(64))
            assert [call[0] for call in compiled] == [name, name] and all(done for *_, done in compiled)
            compiled.clear()
