"""`QepConfig`: what a checkpoint is and how it was, or shall be, made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_qep.errors import CheckpointError, ConfigError, FormatVersionError
from hf_qep.files import parse_size
from hf_qep.formats.integer import BITS
from hf_qep.kernels.dispatch import ACTIVATIONS
from hf_qep.public_names import public_name
from hf_qep.registry import FORMATS, METHODS

FORMAT_VERSION = 2
"""Raised whenever a checkpoint is written that this version could not read."""

AUTO = "auto"
"""No method of its own, but the choice of `sign` or `factored` for each linear."""
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"num_samples": 128, "tune_epochs": 0, "distill_epochs": 0},
    "balanced": {"num_samples": 512, "tune_epochs": 0, "distill_epochs": 2},
    "best": {"num_samples": 2048, "tune_epochs": 0, "distill_epochs": 4},
}
"""Effort -> what it sets, unless it is given. Without one they are as for "fast"."""
SIGNS_THAT_TRAIN = 10**9
"""Most signs that are trained together unless more are asked for."""

EXPORTS = {"gguf": 128}
"""Format of another program -> columns of a row that share a scale in it."""

_LOADING = ("dequantize", "trainable_scales")
_RUNTIME = ("tokenizer", *_LOADING)


@dataclass
class QepConfig(QuantizationConfigMixin):
    """Quantisation config of method "qep"; pass it to `from_pretrained` as `quantization_config`.

    Args:
        bits: bits per weight of the quantised linears. `sign`, `qqa`, `onebit`, `gptq` and `rtn` have exactly one
            sign per weight (1.0) plus scales; `factored` takes any value from 0.3 to 2.5, scales included; for `auto`
            it is the average over all linears, scales and padding included.
        method: solver, a file name in `hf_qep.methods`; "auto" gives each linear `sign` or a rank of `factored`,
            whichever lowers the model's error most per bit.
        max_memory: instead of `bits`, for `auto` only: most bytes of the weight files, such as "14GB" or "14GiB".
        group_size: columns that share one row scale; None is one scale per row.
        propagation: alpha of QEP (arXiv 2504.09629), 0 (off) to 1: how much of the error made upstream each layer's
            target corrects.
        residual: where a layer's output is added to the residual stream, let its target also correct the error which
            that stream carries past the layer, as far as the layer's input predicts it.
        damping: ridge of the Hessian in units of its mean diagonal; 2 * width / tokens is added to it, so that few
            calibration tokens are not fitted more closely than they deserve.
        dataset: calibration data: Hub id, file, list of strings, token tensor, weighted mix or chat messages; None
            samples text from the model itself.
        effort: how much time to spend: "fast" solves each layer from 128 rows; "balanced" takes 512 and also trains the
            whole model towards the float one for 2 passes over them; "best" takes 2,048 rows and 4 passes. Sets
            num_samples, tune_epochs and distill_epochs where they are not given.
        num_samples, seq_len: calibration rows (default 128) and tokens per row.
        batch_size: rows per forward pass while calibrating.
        skip_modules: names of modules that stay float, besides the embeddings and the head.
        seed: seed of sampling and of the solvers.
        bias_correction: let each layer's bias, where it has one, take up the mean output error, and solve for the rest.
        output_curvature: for `factored`: estimate how the errors of a layer's outputs weigh in the model's output, one
            by one and together, and let the shared middle of a factored weight serve those that weigh most.
        tune_epochs: passes over the calibration rows in which signs, scales, norms and biases of each block are trained
            together after they were solved, towards the outputs of the float model; 0 is none.
        tune_lookahead: float blocks between a tuned block and its loss; None is all of them and the head.
        distill_epochs: passes over the calibration rows in which all layers are trained together, last of all, towards
            the outputs of the float model; 0 is none.
        distill_signs: whether signs train in them as well as scales, norms and biases, which takes 24 bytes of memory
            per weight; None is yes for up to a thousand million quantised weights.
        embedding_bits, head_bits: bits, 4 or 8, of the whole numbers as which word embeddings and output head are
            stored, scales apart; None leaves them float. Where the two are tied, one option is enough.
        export: another program that shall read the checkpoint: "gguf" keeps method `sign` to what llama.cpp's Q1_0
            holds, one scale for 128 columns of a row (or a multiple of 128) and none for a column, so that `hf-qep
            export gguf` loses nothing; columns are made alike beforehand by way of the norms.
        activation: how packed linears take their inputs on a processor: "exact" (float32) or "int8" (rounded, one scale
            per token and 128 inputs; faster). What is given while loading goes before what the checkpoint says; None
            is what it says, or "exact".
        tokenizer: tokenizer for `dataset` when quantising on the fly; default: the model's own. Not stored.
        dequantize: give back a plain float model while loading. Not stored.
        trainable_scales: keep float32 scales that train while loading (quantisation-aware training). Not stored.
        layers: the quantised modules, grouped by format; written by the engine, read while loading.
        format_version: layout version of the checkpoint.

    Raises ConfigError for a value out of range, UnknownNameError for an unknown method or format,
    FormatVersionError for a checkpoint of a newer version.
    """

    def __init__(
        self,
        bits: float = 1.0,
        method: str = "sign",
        group_size: int | None = None,
        propagation: float = 1.0,
        residual: bool = True,
        damping: float = 0.03,
        dataset: Any = None,
        num_samples: int | None = None,
        seq_len: int = 512,
        batch_size: int = 8,
        skip_modules: list[str] | None = None,
        seed: int = 0,
        bias_correction: bool = True,
        output_curvature: bool = True,
        tune_epochs: int | None = None,
        tune_lookahead: int | None = None,
        distill_epochs: int | None = None,
        distill_signs: bool | None = None,
        embedding_bits: int | None = None,
        head_bits: int | None = None,
        max_memory: str | int | None = None,
        effort: str | None = None,
        export: str | None = None,
        activation: str | None = None,
        tokenizer: Any = None,
        dequantize: bool = False,
        trainable_scales: bool = False,
        layers: list[dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        **unknown: Any,  # keys of later versions: a checkpoint that needs them raises its format version
    ) -> None:
        self.quant_method = "qep"
        self.format_version = format_version
        self.bits, self.method, self.group_size = bits, method, group_size
        self.max_memory, self.export = max_memory, export
        self.propagation, self.residual, self.damping = propagation, residual, damping
        self.dataset, self.seq_len, self.batch_size = dataset, seq_len, batch_size
        self.skip_modules, self.seed, self.bias_correction = skip_modules, seed, bias_correction
        self.output_curvature = output_curvature
        self.effort, self.tune_lookahead, self.distill_signs = effort, tune_lookahead, distill_signs
        given = {"num_samples": num_samples, "tune_epochs": tune_epochs, "distill_epochs": distill_epochs}
        self.__dict__ |= _effort(effort) | {name: value for name, value in given.items() if value is not None}
        self.embedding_bits, self.head_bits = embedding_bits, head_bits
        self.activation, self.layers = activation, layers
        self.tokenizer, self.dequantize, self.trainable_scales = tokenizer, dequantize, trainable_scales
        self.post_init()

    def post_init(self) -> None:
        """Refuse what cannot work, before any weight is read."""
        if not isinstance(self.format_version, int) or self.format_version > FORMAT_VERSION:
            raise FormatVersionError(
                f"this checkpoint has qep format version {self.format_version!r} and this hf_qep reads up to "
                f"{FORMAT_VERSION}; run: pip install --upgrade hf-qep"
            )
        if self.activation not in (None, *ACTIVATIONS):
            raise ConfigError(
                f"activation must be {', '.join(map(repr, ACTIVATIONS))} or None, not {self.activation!r}"
            )
        if self.layers is not None:
            self._check_layers()
            return
        self._check_method()
        if self.group_size is not None:
            _whole("group_size", self.group_size, 1)
        self._check_export()
        _in_range("bits", self.bits, 0.3, 2.5)
        _in_range("propagation", self.propagation, 0.0, 1.0)
        _in_range("damping", self.damping, 1e-6, 10.0)
        for name in ("num_samples", "seq_len", "batch_size"):
            _whole(name, getattr(self, name), 1)
        _whole("seed", self.seed, 0)
        _whole("tune_epochs", self.tune_epochs, 0)
        _whole("distill_epochs", self.distill_epochs, 0)
        if self.distill_signs not in (None, True, False):
            raise ConfigError(f"distill_signs must be true, false or None, not {self.distill_signs!r}")
        if self.output_curvature not in (True, False):
            raise ConfigError(f"output_curvature must be true or false, not {self.output_curvature!r}")
        if self.tune_lookahead is not None:
            _whole("tune_lookahead", self.tune_lookahead, 0)
        for name in ("embedding_bits", "head_bits"):
            if (value := getattr(self, name)) is not None and (isinstance(value, float) or value not in BITS):
                raise ConfigError(f"{name} must be None or one of {BITS}, not {value!r}")
        if isinstance(self.skip_modules, str):
            raise ConfigError(f"skip_modules must be a list of names, not the string {self.skip_modules!r}")

    def _check_method(self) -> None:
        if self.method != AUTO:
            METHODS.get(self.method)
        elif self.group_size is not None:
            raise ConfigError(f"method `{AUTO}` has one scale per row; leave group_size={self.group_size} out")
        if self.max_memory is None:
            return
        parse_size(self.max_memory)
        if self.method != AUTO:
            raise ConfigError(f"max_memory needs method `{AUTO}`, which spends it; method is `{self.method}`")

    def _check_export(self) -> None:
        if self.export is None:
            return
        if self.export not in EXPORTS:
            raise ConfigError(f"export must be {', '.join(map(repr, EXPORTS))} or None, not {self.export!r}")
        columns = EXPORTS[self.export]
        self.group_size = columns if self.group_size is None else self.group_size
        if self.method != "sign" or self.group_size % columns:
            raise ConfigError(
                f'export="{self.export}" needs method `sign` and a group size that is a multiple of {columns} (or none '
                f"given), not method `{self.method}` and {self.group_size}"
            )

    def _check_layers(self) -> None:
        for entry in self.layers or []:
            if not isinstance(entry, dict) or not isinstance(entry.get("modules"), list):
                raise CheckpointError(f"`layers` in the quantization config holds {entry!r}, which names no modules")
            self._spec_of(entry)

    @staticmethod
    def _spec_of(entry: dict[str, Any]) -> Any:
        options = {k: v for k, v in entry.items() if k != "modules"}
        module = FORMATS.get(str(options.get("format")))
        try:
            return module.Spec(**options)
        except TypeError as error:
            raise CheckpointError(f"the options {options!r} do not fit format `{module.NAME}`: {error}") from error

    def trains_signs(self, weights: int) -> bool:
        """Whether distillation trains the signs of a model with so many quantised weights."""
        wanted = weights <= SIGNS_THAT_TRAIN if self.distill_signs is None else self.distill_signs
        return bool(self.distill_epochs) and wanted

    def layer_specs(self) -> dict[str, Any]:
        """Module name -> format spec of every quantised module."""
        return {name: self._spec_of(e) for e in self.layers or [] for name in e["modules"]}

    def set_layers(self, specs: dict[str, Any]) -> None:
        """Record the quantised modules, grouped by equal spec, in model order."""
        grouped: dict[Any, list[str]] = {}
        for name, spec in specs.items():
            grouped.setdefault(spec, []).append(name)
        self.layers = [{k: v for k, v in asdict(s).items()} | {"modules": names} for s, names in grouped.items()]

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json: plain values only."""
        stored = {k: copy.deepcopy(v) for k, v in self.__dict__.items() if k not in (*_RUNTIME, "dataset")}
        stored["dataset"] = public_name(self.dataset) if isinstance(self.dataset, str) else None
        return stored

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def get_loading_attributes(self) -> dict[str, Any]:
        """Options a user may give although the checkpoint has a config of its own."""
        given = {} if self.activation is None else {"activation": self.activation}
        return given | {name: getattr(self, name) for name in _LOADING}

    def __deepcopy__(self, memo: dict[int, Any]) -> QepConfig:
        # from_pretrained deep-copies configs; calibration data may be large or impossible to copy (generators).
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            shared = name in _RUNTIME or name == "dataset"
            new.__dict__[name] = value if shared else copy.deepcopy(value, memo)
        return new


def _effort(name: str | None) -> dict[str, Any]:
    found = EFFORTS.get(name or "fast")
    if found is None:
        raise ConfigError(f"effort must be {', '.join(map(repr, EFFORTS))} or None, not {name!r}")
    return found


def _in_range(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")


def _whole(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be a whole number of at least {low}, not {value!r}")
