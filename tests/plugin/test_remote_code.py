"""With `modeling_qep.py` in the folder, `trust_remote_code=True` replaces `import hf_qep`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_qep import add_remote_code
from hf_qep.errors import CheckpointError
from tests.plugin.conftest import Packed
from tests.plugin.packing import logits
from tests.plugin.processes import BLOCKED, QUIET, run_python

LOAD = """
for auto, folder in {loads!r}:
    batch, expected = torch.load(folder + "/expected.pt")
    for again in ("", "/again"):
        model = getattr(transformers, auto).from_pretrained(folder + again, trust_remote_code=True)
        with torch.no_grad():
            print((model(**batch)[0] - expected).abs().max().item())
        model.save_pretrained(folder + "/again")
"""
AUTO = {"llama": "AutoModelForCausalLM", "qwen3_moe": "AutoModelForCausalLM", "vit": "AutoModelForImageClassification"}


@pytest.fixture
def with_code(packed: Callable[[str], Packed], tmp_path: Path) -> Callable[[str], Path]:
    """`with_code(family)`: copy of a checkpoint with remote code, a batch and its logits."""

    def build(family: str) -> Path:
        saved = packed(family)
        folder = Path(shutil.copytree(saved.folder, tmp_path / family))
        add_remote_code(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the other process: sums may be split between threads
        torch.save((saved.batch, logits(saved.model, saved.batch)), folder / "expected.pt")
        torch.set_num_threads(threads)
        return folder

    return build


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_process_that_never_imports_the_package_loads_saves_and_loads_again(
    with_code: Callable[[str], Path], tmp_path: Path
) -> None:
    loads = [(auto, str(with_code(family))) for family, auto in AUTO.items()]
    result = run_python(QUIET + LOAD.format(loads=loads), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.stdout.split() == ["0.0"] * 2 * len(loads), result.stderr


def test_a_pipeline_runs_from_the_folder_alone(
    with_code: Callable[[str], Path], tiny_tokenizer: object, tmp_path: Path
) -> None:
    folder = with_code("llama")
    tiny_tokenizer.save_pretrained(folder)
    code = f"""
pipe = transformers.pipeline("text-generation", {str(folder)!r}, trust_remote_code=True, device="cpu")
print(pipe("abc", max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"][:3])
"""
    result = run_python(QUIET + code, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.stdout.startswith("abc"), result.stderr
    assert "not supported" not in result.stderr


def test_without_the_package_the_message_says_what_to_install(with_code: Callable[[str], Path], tmp_path: Path) -> None:
    loads = [("AutoModelForCausalLM", str(with_code("llama")))]
    result = run_python(BLOCKED + QUIET + LOAD.format(loads=loads), HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.returncode != 0
    assert "pip install hf-qep" in result.stderr.strip().splitlines()[-1]


def test_without_trust_the_checkpoint_still_fails_loudly_or_loads_natively(
    with_code: Callable[[str], Path], packed: Callable[[str], Packed]
) -> None:
    folder = with_code("llama")
    assert packed("llama").difference(AutoModelForCausalLM.from_pretrained(folder)) == 0.0  # hf_qep is imported here
    result = run_python(QUIET + f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    assert "RuntimeError" in result.stderr.strip().splitlines()[-1]


def test_adding_the_code_twice_gives_the_same_files(with_code: Callable[[str], Path]) -> None:
    folder = with_code("vit")
    before = {name: (folder / name).read_bytes() for name in ("modeling_qep.py", "config.json")}
    assert add_remote_code(str(folder)) == folder / "modeling_qep.py"
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM(object):\n    import os\nclass X", "os", "PreTrainedModel", "BertModel", "", 3],
)
def test_class_names_that_transformers_does_not_list_are_refused(
    architecture: object, with_code: Callable[[str], Path]
) -> None:
    folder = with_code("llama")
    (folder / "modeling_qep.py").unlink()
    change_config(folder, architectures=[architecture])
    with pytest.raises(CheckpointError, match="no 'llama' model class"):
        add_remote_code(folder)
    assert not (folder / "modeling_qep.py").exists()


def test_only_qep_checkpoints_get_the_code(with_code: Callable[[str], Path], tmp_path: Path) -> None:
    folder = with_code("llama")
    change_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="method qep"):
        add_remote_code(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        add_remote_code(tmp_path / "nothing")
