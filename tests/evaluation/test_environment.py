import sys

import pytest

from hf_qep.evaluation.environment import command_line, describe_environment, describe_model


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["eval", "packed", "--text", "a b.txt"], "hf-qep eval packed --text 'a b.txt'"),
        (["eval", "/somewhere/deep/packed", "--out=/tmp/x.json"], "hf-qep eval packed --out=x.json"),
        (["--tasks", "a=/data/a.jsonl,b=b.jsonl,own:c"], "hf-qep --tasks a=a.jsonl,b=b.jsonl,own:c"),
        (["org/name", "--bits", "1.0,1.5"], "hf-qep org/name --bits 1.0,1.5"),
    ],
)
def test_the_command_line_can_be_typed_again_and_shows_no_folders(monkeypatch, arguments, expected):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hf-qep", *arguments])
    assert command_line() == expected


def test_the_revision_is_that_of_the_hub_cache(tiny_model, tmp_path):
    model, folder = tiny_model("llama"), tmp_path / "snapshots" / ("a" * 40)
    model.save_pretrained(folder)
    facts = describe_model(model, name="owner/name", folder=folder)
    assert (facts.name, facts.revision) == ("owner/name", "a" * 40)
    assert describe_model(model, name="owner/name").revision is None


def test_parameters_count_what_the_model_stands_for(tiny_model):
    facts = describe_model(tiny_model("qwen3"))
    assert facts.parameters == tiny_model("qwen3").num_parameters()
    assert facts.dtype == "float32"


def test_the_environment_names_its_versions(tiny_model):
    import torch

    found = describe_environment(tiny_model("llama"))
    assert found.versions["torch"] == torch.__version__
    assert found.cores >= 1 and found.accelerator is None
