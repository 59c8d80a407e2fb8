"""Code of a checkpoint is never published: files by their names, and keys of configs that lead to code elsewhere."""

from __future__ import annotations

import pytest

from hf_qep.hub.allowed import LOADER
from hf_qep.hub.preflight import check_folder
from tests.hub.checkpoints import edit_json, reseal
from tests.hub.test_preflight import one_problem

CODE = {"AutoModelForCausalLM": "evil.Model"}


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("config.json", {"trust_remote_code": True}, "trust_remote_code"),
        ("config.json", {"text_config": {"auto_map": CODE}}, "text_config.auto_map"),
        ("config.json", {"parts": [{"deep": {"trust_remote_code": 1}}]}, "parts.deep.trust_remote_code"),
        ("config.json", {"custom_pipelines": {"x": {"impl": "evil.P"}}}, "custom_pipelines"),
        ("config.json", {"_attn_implementation_internal": "eager"}, "_attn_implementation_internal"),
        ("config.json", {"attn_implementation": "somebody/kernel"}, "attn_implementation"),
        ("config.json", {"_attn_implementation": {"text_config": "some/kernel:f"}}, "_attn_implementation.text_config"),
        ("config.json", {"_experts_implementation": ["somebody/kernel"]}, "_experts_implementation"),
        ("generation_config.json", {"custom_generate": "somebody/generate"}, "custom_generate"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "auto_map"),
    ],
)
def test_a_key_that_leads_to_code_is_refused_in_every_config(checkpoint, name, change, key):
    edit_json(checkpoint / name, lambda config: config.update(change))
    problem = one_problem(reseal(checkpoint), unsafe=True)
    assert repr(name) in problem
    assert repr(key) in problem


def test_a_key_without_a_value_leads_nowhere(checkpoint):
    empty = {"trust_remote_code": False, "text_config": {"auto_map": {}}, "_attn_implementation": "eager"}
    edit_json(checkpoint / "config.json", lambda config: config.update(empty))
    assert check_folder(reseal(checkpoint)).problems == []


@pytest.mark.parametrize("added", ["\nimport os\n", "# a comment\n"])
def test_a_loader_that_is_not_ours_byte_for_byte_is_refused(checkpoint, added):
    with (checkpoint / LOADER).open("a") as file:
        file.write(added)
    assert f"{LOADER!r} is not the file that hf_qep writes" in one_problem(reseal(checkpoint), unsafe=True)


def test_the_loader_cannot_be_pointed_to_other_code(checkpoint):
    edit_json(checkpoint / "config.json", lambda config: config["auto_map"].update(AutoConfig="somebody/repo--evil.C"))
    assert "'auto_map' of 'config.json' is not what hf_qep writes" in one_problem(reseal(checkpoint), unsafe=True)


def test_an_auto_map_without_the_loader_is_refused(checkpoint):
    (checkpoint / LOADER).unlink()
    assert "'config.json' has 'auto_map'" in one_problem(reseal(checkpoint), unsafe=True)


def test_a_checkpoint_without_loader_and_auto_map_is_fine(checkpoint):
    (checkpoint / LOADER).unlink()
    edit_json(checkpoint / "config.json", lambda config: config.pop("auto_map"))
    assert check_folder(reseal(checkpoint)).problems == []


@pytest.mark.parametrize("name", ["evil.py", "modeling_llama.py", "sub/modeling_qep.py", "run.sh", "x.so"])
def test_code_is_never_on_the_list(checkpoint, name):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("x")
    assert "code is never published" in one_problem(checkpoint, unsafe=True)


@pytest.mark.parametrize(
    ("inside", "safe"),
    [
        ("<path d='M0 0L9 9'/><text>one on two = three</text>", True),
        ("<script>alert(1)</script>", False),
        ("<svg:script>alert(1)</svg:script>", False),
        ("<g onload='alert(1)'/>", False),
        ("<a href='javascript:alert(1)'/>", False),
        ("<foreignObject><p/></foreignObject>", False),
        ("<!DOCTYPE x [<!ENTITY e SYSTEM 'x'>]>", False),
    ],
)
def test_a_drawing_that_can_run_code_is_refused(checkpoint, inside, safe):
    (checkpoint / "bits.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'>{inside}</svg>")
    problems = check_folder(checkpoint).unsafe
    assert problems == [] if safe else "'bits.svg' is a drawing that can run code" in problems[0]


def test_a_checkpoint_of_another_method_is_refused(checkpoint):
    edit_json(checkpoint / "config.json", lambda c: c["quantization_config"].update(quant_method="gptq"))
    assert "not that of a checkpoint of hf_qep" in one_problem(reseal(checkpoint), unsafe=True)
