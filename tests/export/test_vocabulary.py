"""A tokenizer written to a GGUF file and read back: tokens, types, special tokens, templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, processors
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer

import hf_qep
from hf_qep.errors import CheckpointError, ExportError
from hf_qep.export.vocabulary import TokenType, vocabulary, write
from tests.export import folders

gguf = pytest.importorskip("gguf", reason="needs the package gguf, which `make install` brings")
DEMO = Path(hf_qep.__file__).parent / "demo_model"


@pytest.fixture
def bpe_folder(tmp_path):
    return folders.byte_level(tmp_path / "bpe", folders.BYTE_LEVEL["llama-bpe"])


@pytest.fixture
def spm_folder(tmp_path):
    return folders.spm(tmp_path / "spm", normalizer=folders.legacy())


def read_back(exported, path: Path) -> dict:
    """Key without `tokenizer.` -> value, of a file that holds nothing but the tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    write(exported, writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = gguf.GGUFReader(path).fields
    return {key.removeprefix("tokenizer."): f.contents() for key, f in fields.items() if key.startswith("tokenizer.")}


def test_types_are_those_of_gguf():
    assert {kind.name: int(kind) for kind in TokenType} == {kind.name: int(kind) for kind in gguf.TokenType}


def test_a_byte_level_file_holds_all_that_makes_the_tokens(bpe_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bpe_folder)
    read = read_back(vocabulary(bpe_folder, len(tokenizer) + 3), tmp_path / "x.gguf")
    assert (read["ggml.model"], read["ggml.pre"]) == ("gpt2", "llama-bpe") and "ggml.scores" not in read
    vocab = {token: number for number, token in enumerate(read["ggml.tokens"])}
    again = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair.split(" ")) for pair in read["ggml.merges"]]))
    again.pre_tokenizer = pre.Sequence(folders.splits(folders.LLAMA3))
    for text in folders.TEXTS:
        assert [read["ggml.bos_token_id"], *again.encode(text).ids] == tokenizer(text)["input_ids"]
    assert read["ggml.add_bos_token"] is True and read["ggml.add_eos_token"] is False


def test_the_demo_model_is_exported(tmp_path):
    exported = vocabulary(DEMO, 2048)
    assert (exported.model, exported.pre, exported.notes) == ("gpt2", "gpt-2", ())
    assert exported.special == {"bos": 1, "eos": 2, "pad": 0} and exported.add_bos and not exported.add_eos
    assert exported.types[:4] == (TokenType.CONTROL,) * 3 + (TokenType.NORMAL,)
    assert len(read_back(exported, tmp_path / "x.gguf")["ggml.tokens"]) == 2048


def test_types_and_scores_of_a_sentencepiece_vocabulary(spm_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(spm_folder)
    exported = vocabulary(spm_folder, len(tokenizer))
    types = dict(zip(exported.tokens, exported.types, strict=True))
    assert exported.model == "llama" and exported.add_space_prefix and exported.merges is None
    assert types["<unk>"] == TokenType.UNKNOWN and types["<s>"] == types["<|im_start|>"] == TokenType.CONTROL
    assert types["<0x0A>"] == TokenType.BYTE and types["<think>"] == TokenType.USER_DEFINED
    assert types["▁▁"] == TokenType.NORMAL and types["▁▁▁"] == TokenType.NORMAL
    read = read_back(exported, tmp_path / "x.gguf")
    assert read["ggml.pre"] == "default" and read["ggml.add_space_prefix"] is True
    assert tuple(read["ggml.scores"]) == exported.scores and read["ggml.unknown_token_id"] == 0


@pytest.mark.parametrize(("scheme", "prefix", "notes"), [("always", True, 1), ("first", True, 2), ("never", False, 0)])
def test_metaspace_says_whether_a_space_comes_first(tmp_path, scheme, prefix, notes):
    folder = folders.spm(tmp_path, pre.Metaspace(prepend_scheme=scheme, split=False))
    exported = vocabulary(folder, 3000)
    assert exported.add_space_prefix is prefix and len(exported.notes) == notes


def test_rows_without_a_token_become_unused_ones_and_a_short_embedding_is_refused(bpe_folder):
    size = len(AutoTokenizer.from_pretrained(bpe_folder))
    model = folders.state(bpe_folder)["model"]
    model["vocab"][f"[PAD{size + 1}]"] = size
    folders.change(bpe_folder, model=model)
    exported = vocabulary(bpe_folder, size + 4)
    assert exported.tokens[size:] == tuple(f"[PAD{size + 1}]" if i in (0,) else _pad(size, i) for i in range(4))
    assert exported.types[size:] == (TokenType.NORMAL, *(TokenType.UNUSED,) * 3)
    assert len(set(exported.tokens)) == size + 4
    with pytest.raises(ExportError, match=f"up to number {size}, the embedding has {size} rows"):
        vocabulary(bpe_folder, size)


def _pad(size: int, place: int) -> str:
    return f"[[PAD{size + 1}]]" if place == 1 else f"[PAD{size + place}]"


def test_tokens_around_a_text_come_from_the_post_processor(bpe_folder):
    core = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    around = [("<s>", 1), ("<|im_start|>", core.token_to_id("<|im_start|>"))]
    core.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(single="$A <|im_start|>", special_tokens=around)]
    )
    core.save(str(bpe_folder / "tokenizer.json"))
    exported = vocabulary(bpe_folder, 3000)
    assert (exported.add_bos, exported.add_eos) == (False, True)
    assert exported.special["eos"] == around[1][1] and exported.special["eot"] == 2 and exported.special["bos"] == 1
    # transformers goes by tokenizer.json alone, whatever its own configuration says.
    folders.change(bpe_folder, "tokenizer_config.json", add_bos_token=True, add_eos_token=False)
    ids = AutoTokenizer.from_pretrained(bpe_folder)("hello")["input_ids"]
    assert ids[0] != exported.special["bos"] and ids[-1] == exported.special["eos"]
    assert vocabulary(bpe_folder, 3000) == exported


def test_more_than_one_token_before_a_text_is_refused(bpe_folder):
    core = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    core.post_processor = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 1)])
    core.save(str(bpe_folder / "tokenizer.json"))
    with pytest.raises(ExportError, match="puts 2 tokens before"):
        vocabulary(bpe_folder, 3000)


def test_all_ends_of_generation_are_told_where_llama_cpp_has_a_place(bpe_folder):
    folders.change(bpe_folder, "generation_config.json", eos_token_id=[2, 300, 301, 302], pad_token_id=-1)
    special = vocabulary(bpe_folder, 3000).special
    assert special["eos"] == 2 and special["eot"] == 300 and "pad" not in special
    assert any("'301'" in note for note in vocabulary(bpe_folder, 3000).notes)
    folders.change(bpe_folder, "generation_config.json", eos_token_id=4000)
    with pytest.raises(ExportError, match="number 4000"):
        vocabulary(bpe_folder, 3000)


def test_without_an_end_llama_cpp_would_choose_one(bpe_folder):
    folders.change(bpe_folder, "tokenizer_config.json", eos_token=None, bos_token=None)
    with pytest.raises(ExportError, match="no token ends a text"):
        vocabulary(bpe_folder, 3000)
    folders.change(bpe_folder, "config.json", eos_token_id=7)
    folders.change(bpe_folder, post_processor=None)
    exported = vocabulary(bpe_folder, 3000)
    assert exported.special["eos"] == exported.special["bos"] == 7 and not exported.add_bos
    assert exported.types[7] == TokenType.CONTROL


def test_templates_of_conversations(bpe_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bpe_folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(bpe_folder)
    read = read_back(vocabulary(bpe_folder, 3000), tmp_path / "1.gguf")
    assert read["chat_template"] == tokenizer.chat_template
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(bpe_folder)
    read = read_back(vocabulary(bpe_folder, 3000), tmp_path / "2.gguf")
    assert (read["chat_template"], read["chat_template.tool_use"]) == ("{{ 1 }}", "{{ 2 }}")
    for path in bpe_folder.rglob("*.jinja"):
        path.unlink()
    listed = [{"name": "default", "template": "{{ 3 }}"}, {"name": "rag", "template": "{{ 4 }}"}]
    folders.change(bpe_folder, "tokenizer_config.json", chat_template=listed)
    assert vocabulary(bpe_folder, 3000).chat_templates == {"default": "{{ 3 }}", "rag": "{{ 4 }}"}


def test_special_tokens_agree_with_the_official_reader(bpe_folder, spm_folder):
    for folder in (bpe_folder, spm_folder, DEMO):
        official = gguf.SpecialVocab(folder, load_merges=True, n_vocab=3000)
        exported = vocabulary(folder, 3000)
        assert official.special_token_ids.items() <= exported.special.items()
        assert official.add_special_token.get("bos", False) == exported.add_bos
        assert exported.merges is None or list(exported.merges) == official.merges


def test_added_tokens_that_llama_cpp_would_find_elsewhere_are_refused_or_said(spm_folder, bpe_folder):
    for folder, flag, words in ((spm_folder, "normalized", "behind a space"), (bpe_folder, "lstrip", "lstrip")):
        added = folders.state(folder)["added_tokens"]
        changed = [token | {flag: True} if token["content"] == "<think>" else token for token in added]
        with pytest.raises(ExportError, match=words):
            vocabulary(folders.change(folder, added_tokens=changed), 3000)
        changed = [token | {"rstrip": True} if token["content"] == "</s>" else token for token in added]
        assert any("</s>" in note for note in vocabulary(folders.change(folder, added_tokens=changed), 3000).notes)


def test_files_that_are_missing_or_broken_are_named(bpe_folder):
    (bpe_folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        vocabulary(bpe_folder, 3000)
    (bpe_folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="save_pretrained"):
        vocabulary(bpe_folder, 3000)
