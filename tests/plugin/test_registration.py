"""transformers knows "qep" whichever package is imported first, and `import hf_qep` costs nothing."""

from __future__ import annotations

import importlib
import sys

import pytest
from transformers.quantizers import auto

import hf_qep
from hf_qep.errors import ConfigError
from tests.plugin.processes import run_python

SHOW = """
from transformers.quantizers import auto
print(auto.AUTO_QUANTIZER_MAPPING["qep"].__name__, auto.AUTO_QUANTIZATION_CONFIG_MAPPING["qep"].__name__)
print(auto.LOADING_ATTRIBUTES_CONFIG_TYPES[-1].__name__)
"""
REGISTERED = "QepHfQuantizer QepConfig\nQepConfig\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_qep, transformers",
        "import transformers, hf_qep",
        "import transformers.quantizers.auto, hf_qep",
        "from transformers import AutoModelForCausalLM\nimport hf_qep",
        "import hf_qep\nfrom hf_qep import QepConfig",
    ],
)
def test_any_import_order_registers(imports: str) -> None:
    result = run_python(imports + SHOW)
    assert result.stdout == REGISTERED, result.stderr


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    result = run_python(
        "import hf_qep, sys; print({'torch', 'transformers', 'safetensors', 'peft'} & set(sys.modules))"
    )
    assert result.stdout == "set()\n", result.stderr


def test_a_second_copy_of_the_package_replaces_the_first() -> None:
    forget = "import sys\nfor name in [n for n in sys.modules if n.startswith('hf_qep')]: del sys.modules[name]\n"
    check = "from hf_qep import QepConfig\nassert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['qep'] is QepConfig\n"
    check += "assert [c.__name__ for c in auto.LOADING_ATTRIBUTES_CONFIG_TYPES].count('QepConfig') == 1\n"
    result = run_python(f"import hf_qep, transformers\n{forget}import hf_qep{SHOW}{check}")
    assert result.stdout == REGISTERED, result.stderr


def test_registering_again_and_reloading_change_nothing() -> None:
    before = (auto.AUTO_QUANTIZER_MAPPING["qep"], auto.LOADING_ATTRIBUTES_CONFIG_TYPES, len(sys.meta_path))
    hf_qep.register()
    importlib.reload(hf_qep)
    assert (auto.AUTO_QUANTIZER_MAPPING["qep"], auto.LOADING_ATTRIBUTES_CONFIG_TYPES, len(sys.meta_path)) == before


def test_a_name_taken_by_another_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "qep", auto.AUTO_QUANTIZER_MAPPING["gptq"])
    with pytest.raises(ConfigError, match="already registered by `transformers"):
        hf_qep.register()


def test_every_public_name_resolves_and_others_do_not() -> None:
    for name in hf_qep.__all__:
        assert getattr(hf_qep, name) is not None
        assert name in dir(hf_qep)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_qep.no_such_name
