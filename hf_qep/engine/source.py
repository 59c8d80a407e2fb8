"""The float model: where it is, whether its files can be trusted, and loading it."""

from __future__ import annotations

import math
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_qep.engine.headers import MANIFEST, MAX_DIMENSION, TensorEntry, check_links, read_headers, read_json
from hf_qep.engine.remote.errors import explained
from hf_qep.errors import AlreadyQuantizedError, CheckpointError, DiskSpaceError, NonFiniteError

DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]
"""Weights, configs and tokenizers; no pickles, no Python files. The README is read for the licence only."""
NOT_DOWNLOADED = [*(f"*/{pattern}" for pattern in DOWNLOADED if pattern != "*.jinja"), "consolidated*"]
"""Nothing below the folder but the templates in `additional_chat_templates`."""

SIZE_KEYS = re.compile(
    r"(moe_)?(hidden|intermediate|vocab|image|patch)_size|num_(hidden_layers|layers|attention_heads|key_value_heads|heads)"
    r"|num_(local_experts|channels)|max_position_embeddings|n_(embd|layer|head|inner|positions)"
    r"|d_(model|ff|kv)|(head|embed)_dim"
)
"""Keys of config.json that must be positive whole numbers (or null, or lists of them)."""

EXTRA_ELEMENTS = 1.5
"""A model this many times larger than its files is refused: the rest would be random numbers, or memory lost."""
NAMED = 5
"""Tensors named in one message."""
OPTIONAL_PARTS = ("pooler",)
"""Parts that encoders are often published without, and that nothing else reads."""
FINITE_CHUNK = 1 << 24


@dataclass(frozen=True)
class CheckpointSummary:
    """What the headers of a checkpoint say.

    config: content of config.json. tensors: name -> entry.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors by their headers; `total_size` of an index is never believed."""
        return sum(entry.bytes for entry in self.tensors.values())


def resolve_model(model_id_or_folder: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model; a Hub id is downloaded into the Hub cache, safetensors and json files only.

    Raises CheckpointError if there is no such folder or repository.
    """
    name = hub_name(model_id_or_folder)
    if name is None:
        return Path(model_id_or_folder).expanduser()
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED)
        )
    except Exception as error:  # the Hub client raises many kinds; all mean that it cannot be had
        raise explained(error, None, name, revision) from error


def hub_name(model: str | Path) -> str | None:
    """`model` if it can be a Hub id, None for a folder. Raises CheckpointError if it is neither."""
    path, name = Path(model).expanduser(), str(model)
    if path.is_dir():
        return None
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise CheckpointError(f"{name!r} is neither a folder nor a Hub id; give the folder of a model or 'owner/name'")
    return name


def snapshot_revision(folder: Path) -> str | None:
    """Commit of a folder in the Hub cache, None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def licence_of(folder: Path) -> str | None:
    """The `license` of the model card in `folder`, None if it has none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    head = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*['\"]?([\w.+-]+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def check_checkpoint(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    entries: Callable[[str], dict[str, TensorEntry]] | None = None,
) -> CheckpointSummary:
    """Read config.json and file headers as untrusted input; no weight is read and none is allocated.

    trust_remote_code: the model's class is code of the checkpoint; its shapes cannot be checked then.
    entries: tensors of a weight file by its name, where these files need not be in `folder` yet.

    Raises CheckpointError for missing, truncated or contradictory files, names and links that lead out of the folder,
    pickled weights, impossible sizes; AlreadyQuantizedError for a quantised checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is not a folder; give the folder of a transformers model")
    check_links(folder)
    config = read_json(folder / "config.json")
    check_not_quantized(config)
    _check_sizes(config, "")
    summary = CheckpointSummary(config, read_headers(folder, entries))
    _check_layer_count(config, len(summary.tensors))
    if not (trust_remote_code and "auto_map" in config):
        _check_shapes(folder, summary)
    return summary


def check_limits(config: dict[str, Any], tensors: int) -> None:
    """Sizes and number of layers of a config.json, before anything is built from it. tensors: how many the files hold.

    Raises CheckpointError for impossible ones, and for code of another repository.
    """
    _check_sizes(config, "")
    _check_layer_count(config, tensors)


def load_quantized(folder: Path, kind: Any = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The packed model of `folder` in eval mode. kind: its class, default is what its config says. dtype: as stored.

    Raises CheckpointError if the folder holds no packed weights.
    """
    settings = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "qep":
        raise CheckpointError(f"{folder.name!r} is no checkpoint of hf_qep; make one with: hf-qep quantize")
    kind = kind or model_class(AutoConfig.from_pretrained(folder, local_files_only=True))
    return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype or "auto").eval()


def original_of(folder: Path) -> tuple[str, str | None] | None:
    """`base_model` and `revision` of the manifest of a checkpoint, None if it names no original."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_json(folder / MANIFEST)
    name, revision = manifest.get("base_model"), manifest.get("revision")
    if not isinstance(name, str) or not name:
        return None
    return name, revision if isinstance(revision, str) else None


def check_finite(model: nn.Module, prefix: str = "") -> None:
    """Raise NonFiniteError naming the parameters in memory that hold NaN or Inf. prefix: of their names."""
    bad = [
        f"{prefix}{name}"
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point()
        and not tensor.is_meta
        and not all(part.isfinite().all() for part in tensor.detach().flatten().split(FINITE_CHUNK))
    ]
    if bad:
        raise NonFiniteError(
            f"{len(bad)} weights hold NaN or Inf: {_some(bad)}; the checkpoint is damaged or overflowed in this dtype, "
            "download it again or load it as float32"
        )


def check_complete(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Raise CheckpointError if files lack weights of a model that it needs. missing: names that were not found."""
    needed = sorted(n for n in missing if not any(part in n.split(".") for part in OPTIONAL_PARTS))
    if needed:
        raise CheckpointError(
            f"the files of {Path(model.name_or_path).name!r} lack {len(needed)} weights of {type(model).__name__}: "
            f"{_some(needed)}; they would be random numbers"
        )


def free_space_check(folder: Path, needed_bytes: int) -> None:
    """Raise DiskSpaceError if the disk of `folder` (which need not exist yet) has less than `needed_bytes` free."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise DiskSpaceError(
            f"{str(folder)!r} needs {needed_bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; free some space or "
            "choose a folder on another disk"
        )


def load_float_model(
    folder: Path, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False, device: str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """The checked model of `folder` in eval mode on `device`, with its tokenizer, processor, image processor or None.

    dtype: of the weights, such as torch.float32 or "float32"; "auto" keeps the stored one.

    The class is the one `architectures` of config.json names, else the causal language model of this model type, else
    the bare model.

    Raises what `check_checkpoint` and `check_finite` raise, and CheckpointError for weights that the files lack.
    """
    folder = Path(folder)
    check_checkpoint(folder, trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    model, info = model_class(config).from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    check_complete(model, info["missing_keys"])
    check_finite(model)
    return model.eval().to(device), load_processor(folder, trust_remote_code=trust_remote_code)


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Tokenizer, image processor or, where there are both, the processor of `folder`; None if it has neither."""
    names = {path.name for path in Path(folder).iterdir()}
    text = bool(names & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"})
    image = bool(names & {"preprocessor_config.json", "processor_config.json"})
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    kinds = {
        (True, True): ["AutoProcessor", "AutoTokenizer"],
        (True, False): ["AutoTokenizer"],
        (False, True): ["AutoImageProcessor"],
        (False, False): [],
    }[text, image]
    for kind in kinds:
        try:
            return getattr(transformers, kind).from_pretrained(folder, **options)
        except Exception as error:  # image processors need packages that a text-only installation lacks
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(f"{kind} of {Path(folder).name!r} cannot be loaded: {reason}", stacklevel=2)
    return None


def model_class(config: PreTrainedConfig) -> Any:
    """Class with `from_pretrained` and `from_config` for a config."""
    for name in config.architectures or []:
        named = getattr(transformers, str(name), None) or _neighbour(config, str(name))
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named
    own_code = getattr(config, "auto_map", None) or {}
    causal = type(config) in AutoModelForCausalLM._model_mapping or AutoModelForCausalLM.__name__ in own_code
    return AutoModelForCausalLM if causal else AutoModel


def _neighbour(config: PreTrainedConfig, name: str) -> Any:
    """What `name` is in the module of the config's class, None for nothing; students are made there by their names."""
    try:
        return getattr(sys.modules[type(config).__module__], name, None)
    except TypeError:  # a name of something that is no class, from a file that lies
        return None


def check_not_quantized(config: dict[str, Any]) -> None:
    """Raise AlreadyQuantizedError if a config.json is that of a quantised checkpoint."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("quantization_config") or part.get("compression_config")
        if not found:
            continue
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise AlreadyQuantizedError(
            f"config.json says that the model is quantised already (quant_method {str(method)!r}); start from the "
            "original float model, or load this one with its own method and dequantize=True where it offers that"
        )


def _check_sizes(config: dict[str, Any], where: str) -> None:
    """Positive whole numbers, in nested configs too, before any of them is used to build something."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, f"{where}{key}.")
            continue
        if "implementation" in key and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"config.json asks for code of another repository ({where}{key} = {value!r}); remove it"
            )
        if value is None or not SIZE_KEYS.fullmatch(key):
            continue
        for size in value if isinstance(value, list) else [value]:
            if type(size) is not int or not 0 < size <= MAX_DIMENSION:
                raise CheckpointError(
                    f"config.json has {where}{key} = {size!r}; it must be a whole number from 1 to {MAX_DIMENSION}"
                )


def _check_layer_count(config: dict[str, Any], tensors: int) -> None:
    """Each layer has a tensor of its own; building a million empty ones would take hours."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            layers = part.get(key)
            if isinstance(layers, int) and layers > tensors:
                raise CheckpointError(
                    f"config.json has {key} = {layers}, but the files hold {tensors} tensors; they do not belong "
                    "together"
                )


def _check_shapes(folder: Path, summary: CheckpointSummary) -> None:
    """Compare the model that config.json describes with the headers."""
    try:
        model = described_model(folder)
    except Exception as error:  # whatever a hostile or unknown config makes a model class raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"config.json of {folder.name!r} describes no model that can be built: {reason}; check the config, or the "
            "version of transformers"
        ) from error
    for name, tensor in model.state_dict().items():
        entry = summary.tensors.get(name)
        if entry is not None and entry.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name!r} has shape {entry.shape} in {entry.file!r}, but config.json asks for {tuple(tensor.shape)}; "
                "they do not belong together"
            )
    described = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(math.prod(entry.shape) for entry in summary.tensors.values())
    if described > EXTRA_ELEMENTS * stored:
        raise CheckpointError(
            f"config.json describes {described} weights, but the files hold {stored}; they do not belong together"
        )


def described_model(folder: Path) -> PreTrainedModel:
    """The model that config.json of a folder describes, without memory and without code of the folder.

    Raises whatever a hostile or unknown config makes a model class raise.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = model_class(config)
    with torch.device("meta"):
        if issubclass(kind, PreTrainedModel):
            return kind._from_config(config)
        return kind.from_config(config, trust_remote_code=False)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(repr(name) for name in names[:NAMED]) + more
