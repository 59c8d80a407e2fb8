"""A trimmed vocabulary encodes the task as before, and the student agrees with its teacher on what stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hf_qep
from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.students.family import teacher_shape
from hf_qep.students.materialize import count_parameters, materialize
from hf_qep.students.vocabulary import VocabularyMap, trim_tokenizer, used_tokens
from tests.students.teachers import batch, teacher
from tests.tiny_models import BOS, EOS, PAD

DEMO = Path(hf_qep.__file__).parent / "demo_model"
TEXTS = [
    "The harbour at dawn was quiet, and three boats left.",
    "Account: Müller GmbH. Notes: call again on 12 May 2024, € 3,500. Won?",
    "it it it  is\n\tnot", "日本語 🙂",
]  # fmt: skip
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def wordpiece() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIALS, show_progress=False)
    core.train_from_iterator([*TEXTS, "entirely other words, unlike these"] * 3, trainer)
    sep, cls = (("[SEP]", core.token_to_id("[SEP]")), ("[CLS]", core.token_to_id("[CLS]")))
    core.post_processor = processors.BertProcessing(sep, cls)
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def unigram() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator([*TEXTS, "entirely other words, unlike these"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """BPE as of sentencepiece: signs that it lacks become bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *map(chr, range(33, 127))]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "s"), ("▁", "is"), ("x", "y"), ("xy", "z"), ("▁", "t")]
    merges += [("▁t", "h"), ("▁th", "e")]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*tokens, *("".join(m) for m in merges)]))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def parts_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """What the classes of one family build themselves of."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


BUILDERS = {
    "demo": lambda: AutoTokenizer.from_pretrained(DEMO),
    "byte_fallback": byte_fallback,
    "llama": lambda: tf.LlamaTokenizer(**parts_of(byte_fallback())),
    "wordpiece": wordpiece,
    "bert": lambda: tf.BertTokenizer(vocab=wordpiece().get_vocab()),
    "unigram": unigram,
}


def assert_same_encoding(tokenizer, trimmed, kept, texts):
    vocabulary = VocabularyMap(kept, max(len(tokenizer), kept[-1] + 1))
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert vocabulary.encode(torch.tensor(ids)).tolist() == trimmed(text)["input_ids"]
        assert trimmed.decode(trimmed(text)["input_ids"]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", BUILDERS)
def test_the_texts_of_the_task_become_the_same_tokens(kind, tmp_path):
    tokenizer = BUILDERS[kind]()
    before = tokenizer.backend_tokenizer.to_str()
    kept = used_tokens(tokenizer, TEXTS[:2])
    assert len(kept) < len(tokenizer)
    trimmed = trim_tokenizer(tokenizer, kept)
    assert len(trimmed) == len(kept)
    assert_same_encoding(tokenizer, trimmed, kept, TEXTS[:2])
    assert set(trimmed.special_tokens_map) == set(tokenizer.special_tokens_map)
    trimmed.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == trimmed.get_vocab()
    assert_same_encoding(tokenizer, again, kept, TEXTS[:2])
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("kind", ["demo", "byte_fallback"])
def test_bytes_and_letters_stay_so_that_no_text_is_lost(kind):
    tokenizer = BUILDERS[kind]()
    trimmed = trim_tokenizer(tokenizer, used_tokens(tokenizer, TEXTS[:1]))
    for text in [*TEXTS, "Zebra quartz 987 ~ ñ 漢"]:
        assert trimmed.decode(trimmed(text)["input_ids"], skip_special_tokens=True) == tokenizer.decode(
            tokenizer(text)["input_ids"], skip_special_tokens=True
        )
    fewer = used_tokens(tokenizer, TEXTS[:1], keep_bytes=False, keep_special=False)
    assert len(fewer) < len(trimmed)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(alphabet="the isxyz é", min_size=1, max_size=12), min_size=1, max_size=4))
def test_any_texts_of_a_task_keep_their_encoding(texts):
    tokenizer = byte_fallback()
    kept = used_tokens(tokenizer, texts, keep_bytes=False)
    assert_same_encoding(tokenizer, trim_tokenizer(tokenizer, kept), kept, texts)


def test_both_parts_of_every_merge_of_a_kept_token_stay():
    tokenizer = byte_fallback()
    vocabulary = tokenizer.get_vocab()
    kept = used_tokens(tokenizer, [torch.tensor([[vocabulary["▁the"], -100]])], keep_special=False, keep_bytes=False)
    names = {token for token, number in vocabulary.items() if number in kept}
    assert names == {"▁the", "▁", "the", "th", "e", "t", "h", "▁th", "▁t", "<unk>"}


def test_the_size_can_be_rounded_up_with_the_lowest_ids():
    tokenizer = BUILDERS["demo"]()
    plain, rounded = (used_tokens(tokenizer, TEXTS, multiple=m) for m in (1, 64))
    assert len(rounded) % 64 == 0
    assert set(plain) <= set(rounded)
    assert 0 <= len(rounded) - len(plain) < 64
    assert_same_encoding(tokenizer, trim_tokenizer(tokenizer, rounded), rounded, TEXTS)
    assert len(used_tokens(tokenizer, TEXTS, multiple=10**6)) == len(tokenizer)
    with pytest.raises(ConfigError, match="multiple"):
        used_tokens(tokenizer, TEXTS, multiple=0)


def test_the_student_agrees_with_its_teacher_on_the_tokens_that_stay():
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    kept = used_tokens(tokenizer, TEXTS, multiple=64)
    shape = teacher_shape(model)
    spec = replace(shape.identity(), vocabulary=kept)
    student, trimmed = materialize(model, spec), trim_tokenizer(tokenizer, kept)
    assert type(student) is type(model)
    assert student.config.vocab_size == len(kept) == student.get_input_embeddings().num_embeddings
    assert sum(count_parameters(model, spec).values()) == student.num_parameters()
    old, new = (t(TEXTS[1], return_tensors="pt")["input_ids"] for t in (tokenizer, trimmed))
    with torch.no_grad():
        theirs, ours = model(old).logits, student(new).logits
    assert torch.allclose(ours, theirs[..., VocabularyMap(kept, shape.vocab_size).to_old], atol=1e-5)
    assert student.generation_config.eos_token_id == trimmed.eos_token_id == student.config.eos_token_id
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_heads_over_the_vocabulary_with_biases_are_cut_too():
    model = teacher("bert")
    kept = (0, *range(3, 127, 2))
    student = materialize(model, replace(teacher_shape(model).identity(), vocabulary=kept))
    ids = VocabularyMap(kept, 128).decode(torch.randint(1, len(kept), (2, 9)))
    ours = student(VocabularyMap(kept, 128).encode(ids)).logits
    assert torch.allclose(ours, model(ids).logits[..., list(kept)], atol=1e-5)


def test_special_tokens_must_stay():
    model = teacher("llama")
    spec = replace(teacher_shape(model).identity(), vocabulary=tuple(range(BOS, 100)))
    with pytest.raises(ConfigError, match=f"`pad_token_id` is {PAD}"):
        materialize(model, spec)
    model.config.eos_token_id = [EOS, 101]
    with pytest.raises(ConfigError, match="`eos_token_id` is 101"):
        materialize(model, replace(spec, vocabulary=tuple(range(100))))
    tokenizer = wordpiece()
    with pytest.raises(ConfigError, match=r"'\[UNK\]' is not among"):
        trim_tokenizer(tokenizer, tuple(n for n in range(len(tokenizer)) if n != 1))
    with pytest.raises(ConfigError, match="token 128 is not in the teacher's vocabulary of 128"):
        materialize(model, replace(spec, vocabulary=(0, 1, 2, 128)))
    images = teacher("vit")
    with pytest.raises(ConfigError, match="not in the teacher's vocabulary of None"):
        materialize(images, replace(teacher_shape(images).identity(), vocabulary=(0, 1)))


def test_a_map_goes_to_a_file_and_back(tmp_path):
    vocabulary = VocabularyMap((1, 4, 9), 12)
    vocabulary.save(tmp_path)
    assert VocabularyMap.load(tmp_path) == vocabulary
    assert vocabulary.encode(torch.tensor([9, -100, 1])).tolist() == [2, -100, 0]
    assert vocabulary.decode(torch.tensor([2, -100, 0])).tolist() == [9, -100, 1]
    with pytest.raises(ConfigError, match=r"does not keep the tokens \[2\]"):
        vocabulary.encode(torch.tensor([1, 2]))
    for wrong in ((), (1, 1), (3, 2), (1, 12), (-1, 2)):
        with pytest.raises(ConfigError, match="rising ids below 12"):
            VocabularyMap(wrong, 12)
    (tmp_path / "vocab_map.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        VocabularyMap.load(tmp_path)


def test_tokenizers_that_cannot_be_cut_are_refused():
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        used_tokens(tf.CanineTokenizer(), ["a"])


def test_inputs_of_a_batch_can_be_counted_instead_of_texts():
    tokenizer = byte_fallback()
    ids = batch("llama")["input_ids"]
    kept = used_tokens(tokenizer, [ids], keep_special=False, keep_bytes=False)
    assert set(ids.unique().tolist()) <= set(kept)
