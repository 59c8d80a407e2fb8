"""What an agent needs besides weights survives quantisation: templates, special tokens, how calls are read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qep import QepConfig
from hf_qep.engine.source import DOWNLOADED, NOT_DOWNLOADED, load_processor
from hf_qep.engine.writer import save_checkpoint
from hf_qep.hub.allowed import kind_of
from tests.evaluation.templates import ASKED, CONVERSATION, RESPONSE, TEMPLATES, TOOL
from tests.plugin.packing import pack_model


@pytest.fixture(params=sorted(TEMPLATES))
def original(request, tiny_model, tiny_tokenizer, tmp_path) -> Path:
    """A tiny checkpoint with the template of a family, another one by name, and special tokens of its own."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = {"default": TEMPLATES[request.param], "rag": "{{ bos_token }}{{ documents }}\n"}
    tokenizer.response_template = RESPONSE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    _with_schema(tmp_path / "original" / "tokenizer_config.json")
    return tmp_path / "original"


def _with_schema(path: Path) -> None:
    """The older way to say how answers are read, which files on the Hub still have."""
    settings = json.loads(path.read_text())
    settings["response_schema"] = {"x-regex": r"\s*<tool_call>\s*(?P<call>.*)", "type": "object"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def asked(tokenizer, messages):
    """Ids of a request with a tool."""
    made = tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, return_dict=True)
    return made["input_ids"]


def test_templates_and_what_reads_the_answers_are_the_same_afterwards(original, tmp_path):
    model = pack_model(AutoModelForCausalLM.from_pretrained(original))
    packed = save_checkpoint(model, tmp_path / "packed", tokenizer=load_processor(original), manifest={})
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        assert (packed / name).read_bytes() == (original / name).read_bytes()
        assert kind_of(name) == "tokenizer"  # so that push takes it along
    before, after = (json.loads((f / "tokenizer_config.json").read_text()) for f in (original, packed))
    for key in ("response_template", "response_schema", "bos_token", "eos_token", "additional_special_tokens"):
        assert after.get(key) == before.get(key), key
    theirs, ours = AutoTokenizer.from_pretrained(original), AutoTokenizer.from_pretrained(packed)
    for messages in (ASKED, CONVERSATION):
        assert asked(ours, messages) == asked(theirs, messages)
    assert ours.chat_template == theirs.chat_template
    assert ours.all_special_tokens == theirs.all_special_tokens
    said = 'Well.\n<tool_call>\n{"name": "forecast", "arguments": {"days": 2}}\n</tool_call><|im_end|>'
    read = [t.parse_response(said, prefix="<|im_start|>assistant\n") for t in (theirs, ours)]
    assert read[0] == read[1]
    assert read[1]["tool_calls"][0]["function"] == {"name": "forecast", "arguments": {"days": 2}}


def test_quantising_while_loading_leaves_the_template_alone(original, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(original)
    config = QepConfig(dataset=["a b c d e f g h " * 64], num_samples=8, seq_len=96, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    assert asked(AutoTokenizer.from_pretrained(tmp_path / "packed"), CONVERSATION) == asked(tokenizer, CONVERSATION)


def test_templates_below_the_folder_are_downloaded_and_nothing_else_from_there():
    from huggingface_hub.utils import filter_repo_objects

    there = ["model.safetensors", "chat_template.jinja", "additional_chat_templates/rag.jinja", "tokenizer.json"]
    more = ["onnx/model.safetensors", "original/params.json", "original/tokenizer.model", "assets/a.png", "code.py"]
    assert (
        list(filter_repo_objects([*there, *more], allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED)) == there
    )
