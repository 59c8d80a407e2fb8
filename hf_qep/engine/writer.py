"""A quantised model to a folder that is complete or not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_qep.accounting import bits_report
from hf_qep.engine.assembly import SHARD_SIZE, save_assembled
from hf_qep.engine.headers import CODE_KEYS, INDEX_FILE, MANIFEST, read_headers
from hf_qep.engine.manifest import MANIFEST_VERSION, file_table, versions
from hf_qep.engine.source import free_space_check
from hf_qep.errors import CheckpointError
from hf_qep.files import check_output, write_aside
from hf_qep.public_names import without_folders

SPARE_BYTES = 64 << 20
"""Room for headers, config, tokenizer and manifest."""

_NOT_SETTINGS = ("tokenizer.json", "vocab.json", INDEX_FILE)
"""json files whose strings are tokens or tensor names, never paths."""
_TEMPLATES = ("chat_template", "response_template", "response_schema")
"""Settings whose strings are templates and regular expressions, which may look like paths: `\\s*<tool_call>\\s*`."""


def save_checkpoint(
    model: PreTrainedModel,
    out_dir: str | Path,
    *,
    tokenizer: Any,
    manifest: dict[str, Any],
    overwrite: bool = False,
    max_shard_size: str | int = SHARD_SIZE,
    remote_code: bool = False,
    blocks: Sequence[Path] = (),
) -> Path:
    """Write model, tokenizer or processor (or None) and `hf_qep_manifest.json` to `out_dir`; returns it.

    manifest: from `build_manifest`; bits, versions, sha256 and size of every file are added here.
    overwrite: replace a folder that is not empty.
    remote_code: add the files with which the checkpoint loads without this package (trust_remote_code=True).
    blocks: files that hold what is on meta in the model, see `assembly.save_assembled`.

    Everything is written to a hidden sibling that ends in `.partial`, checked, and renamed once. On an error or
    KeyboardInterrupt the sibling is removed; after a kill it remains and can be deleted.

    Raises OutputExistsError, DiskSpaceError, CheckpointError if the written files are not what was asked.
    """
    out_dir = Path(out_dir)
    check_output(out_dir, overwrite=overwrite)
    bits = bits_report(model)
    free_space_check(out_dir, bits["weight_bytes"] + SPARE_BYTES)
    with write_aside(out_dir, overwrite=overwrite) as aside:
        if blocks:
            save_assembled(model, aside, blocks, max_shard_size)
        else:
            model.save_pretrained(aside, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        _clean_settings(aside, drop_code=type(model).__module__.startswith("transformers."))
        if remote_code:
            from hf_qep.remote_code import add_remote_code

            add_remote_code(aside)
        _verify(aside, bits["weight_bytes"])
        _share(aside)
        written = manifest | {
            "manifest_version": MANIFEST_VERSION,
            "bits": bits_report(model, aside),
            "files": file_table(aside),
            "versions": versions(),
        }
        text = json.dumps(without_folders(written), indent=2, ensure_ascii=False, allow_nan=False, sort_keys=True)
        (aside / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return out_dir


def _clean_settings(folder: Path, *, drop_code: bool) -> None:
    """Configs of models and tokenizers remember the folder they came from, which is nobody else's business.

    drop_code: they also name code of the original, which was not run and is not in the folder.
    """
    for path in folder.glob("*.json"):
        if path.name in _NOT_SETTINGS:
            continue
        settings = json.loads(path.read_text(encoding="utf-8"))
        clean = {key: value if key in _TEMPLATES else without_folders(value) for key, value in settings.items()}
        if drop_code:
            clean = _without_code(clean)
        if clean != settings:
            path.write_text(json.dumps(clean, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_code(value: Any) -> Any:
    """A json value without the keys that make a reader run code of the repository."""
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key not in CODE_KEYS}
    return [_without_code(item) for item in value] if isinstance(value, list) else value


def _share(folder: Path) -> None:
    """safetensors makes its files readable by their owner only; give them the mode that all other files got."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _verify(folder: Path, expected_bytes: int) -> None:
    """Read the written headers back. Names may differ from the model's (old names are restored), bytes may not."""
    written = sum(entry.bytes for entry in read_headers(folder).values())
    if written < expected_bytes:
        raise CheckpointError(
            f"the written checkpoint holds {written} bytes of weights, but the model has {expected_bytes}; nothing was "
            "kept, free some space and save again"
        )
