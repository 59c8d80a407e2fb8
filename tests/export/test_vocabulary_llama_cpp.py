"""llama.cpp itself makes the same tokens as transformers (skipped without llama-cpp-python, which is slow to build)."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import normalizers
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer

import hf_qep
from hf_qep.export.vocabulary import vocabulary, write
from tests.export import folders

gguf = pytest.importorskip("gguf", reason="needs the package gguf, which `make install` brings")
llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which pip builds in some minutes")
DEMO = Path(hf_qep.__file__).parent / "demo_model"


def assert_same_tokens(folder: Path, path: Path, texts: tuple[str, ...]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{name}")(64)
    writer.add_layer_norm_rms_eps(1e-5)
    write(vocabulary(folder, len(tokenizer) + 2), writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in texts:
        assert model.tokenize(text.encode(), special=True) == tokenizer(text)["input_ids"], text
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.detokenize(plain, special=True).decode() == tokenizer.decode(plain) or text in folders.MORE


@pytest.mark.parametrize("name", [name for name in folders.BYTE_LEVEL if name != "tekken"])
def test_byte_level(tmp_path, name):
    folder = folders.byte_level(tmp_path / "folder", folders.BYTE_LEVEL[name], normalizer=normalizers.NFC())
    assert_same_tokens(folder, tmp_path / "x.gguf", (*folders.TEXTS, *folders.MORE))


@pytest.mark.parametrize("whole", [True, False])
def test_words_that_merges_do_not_reach(tmp_path, whole):
    folder = folders.byte_level(tmp_path / "folder", folders.BYTE_LEVEL["llama-bpe"])
    model = folders.state(folder)["model"]
    del model["merges"][-40:]
    folders.change(folder, model=model | {"ignore_merges": whole})
    assert_same_tokens(folder, tmp_path / "x.gguf", (*folders.TEXTS, *folders.MORE))


SPM = {
    "llama 2": (None, folders.legacy()),
    "gemma": (pre.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")),
    "never": (pre.Metaspace(prepend_scheme="never", split=False), None),
}


@pytest.mark.parametrize("name", SPM)
def test_sentencepiece(tmp_path, name):
    folder = folders.spm(tmp_path / "folder", *SPM[name])
    assert_same_tokens(folder, tmp_path / "x.gguf", (*folders.TEXTS, *folders.MORE))


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_sentencepiece_as_transformers_builds_it_now(tmp_path, scheme):
    folder = folders.spm(tmp_path / "folder", pre.Metaspace(prepend_scheme=scheme, split=False))
    texts = tuple(text for text in folders.TEXTS if not text.startswith(" "))
    assert_same_tokens(folder, tmp_path / "x.gguf", texts)


def test_the_demo_model(tmp_path):
    assert_same_tokens(DEMO, tmp_path / "x.gguf", folders.TEXTS)
