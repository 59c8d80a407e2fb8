"""Scores merge as ranks do, and a tokenizer of which llama.cpp would make another one is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from tokenizers import pre_tokenizers as pre

from hf_qep.errors import ExportError
from hf_qep.export.vocabulary import vocabulary
from hf_qep.export.vocabulary_spm import check_pieces, pieces_by_score, scores_of
from tests.export import folders

TOKENS = st.lists(st.text("abc▁", min_size=2, max_size=5), unique=True, max_size=12)


def slowly(text: str, scores: dict[str, float]) -> list[str]:
    """The rule itself: look for the best two neighbours again after each merge."""
    parts = list(text)
    while found := [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]:
        place = -max(found)[1]
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
    return parts


@given(TOKENS, st.text("abc▁", max_size=14))
def test_the_queue_merges_what_the_rule_says(tokens, text):
    scores = {token: -float(number) for number, token in enumerate(tokens)}
    assert pieces_by_score(text, scores) == slowly(text, scores)


@pytest.mark.parametrize("text", [*folders.TEXTS, *folders.MORE])
def test_scores_cut_texts_as_the_merges_of_sentencepiece_do(spm_folder, text):
    core = Tokenizer.from_file(str(spm_folder / "tokenizer.json"))
    exported = vocabulary(spm_folder, core.get_vocab_size())
    scores = dict(zip(exported.tokens, exported.scores, strict=True))
    known = [sign if sign in scores else "a" for sign in text.replace(" ", "▁")]
    merges = models.BPE(vocab=folders.state(spm_folder)["model"]["vocab"], merges=merges_of(spm_folder))
    assert pieces_by_score("".join(known), scores) == [token.value for token in merges.tokenize("".join(known))]


@pytest.fixture(scope="module")
def spm_folder(tmp_path_factory):
    return folders.spm(tmp_path_factory.mktemp("spm"), normalizer=folders.legacy())


def merges_of(folder):
    return [tuple(pair) for pair in folders.state(folder)["model"]["merges"]]


@pytest.mark.parametrize(
    "merges",
    [
        [("b", "c"), ("a", "b"), ("ab", "c")],
        [("a", "b"), ("c", "b"), ("b", "c"), ("a", "bc")],
    ],
    ids=["a token that merges never reach", "a pair that no merge joins"],
)
def test_merges_that_no_scores_can_say_are_refused(merges):
    tokens = sorted({part for pair in merges for part in (*pair, "".join(pair))})
    vocab = {token: number for number, token in enumerate(tokens)}
    scores = dict(zip(tokens, scores_of(tokens, merges), strict=True))
    with pytest.raises(ExportError, match="one score per token"):
        check_pieces({"vocab": vocab}, merges, scores)


@pytest.mark.parametrize("name", folders.BYTE_LEVEL)
def test_the_pre_tokenizer_is_known_by_its_expressions(tmp_path, name):
    folder = folders.byte_level(tmp_path, folders.BYTE_LEVEL[name])
    assert vocabulary(folder, 3000).pre == name


def test_expressions_are_the_same_with_written_line_breaks_and_as_matches_that_are_removed(tmp_path):
    folder = folders.byte_level(tmp_path, folders.BYTE_LEVEL["qwen2"])
    split = {"type": "Split", "pattern": {"Regex": folders.QWEN2.replace(r"\r", "\r").replace(r"\n", "\n")}}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = [split | {"behavior": "Removed", "invert": True}, last]
    folders.change(folder, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    assert vocabulary(folder, 3000).pre == "qwen2"


def test_a_name_is_chosen_that_looks_words_up_only_where_the_tokenizer_does(tmp_path):
    folder = folders.byte_level(tmp_path, folders.BYTE_LEVEL["llama-bpe"])
    model = folders.state(folder)["model"]
    del model["merges"][-40:]
    names = {}
    for whole in (True, False):
        folders.change(folder, model=model | {"ignore_merges": whole})
        names[whole] = vocabulary(folder, 3000).pre
    assert names == {True: "llama-bpe", False: "smaug-bpe"}
    folder = folders.byte_level(tmp_path / "qwen", folders.BYTE_LEVEL["qwen2"])
    model = folders.state(folder)["model"]
    del model["merges"][-40:]
    folders.change(folder, model=model | {"ignore_merges": True})
    with pytest.raises(ExportError, match="ignore_merges"):
        vocabulary(folder, 3000)


@pytest.mark.parametrize(
    "steps",
    [
        folders.splits(r"\p{L}+|\p{N}+"),
        [pre.Whitespace(), pre.ByteLevel(add_prefix_space=False)],
        [pre.ByteLevel(add_prefix_space=True)],
        [pre.ByteLevel(add_prefix_space=False), pre.Digits()],
    ],
    ids=["an expression", "whitespace", "a space in front", "digits behind bytes"],
)
def test_a_pre_tokenizer_that_llama_cpp_has_not_is_refused_unless_it_is_named(tmp_path, steps):
    folder = folders.byte_level(tmp_path, steps)
    with pytest.raises(ExportError, match="name it"):
        vocabulary(folder, 3000)
    named = vocabulary(folder, 3000, pre="falcon")
    assert named.pre == "falcon" and "given by name" in named.notes[0]


def test_a_pre_tokenizer_is_named_only_for_byte_level_tokenizers(spm_folder):
    with pytest.raises(ExportError, match="leave `pre` out"):
        vocabulary(spm_folder, 3000, pre="llama-bpe")


def test_normalizers_besides_nfc_are_refused(tmp_path):
    nfc = folders.byte_level(tmp_path / "nfc", folders.BYTE_LEVEL["qwen2"], normalizer=normalizers.NFC())
    assert "NFC" in vocabulary(nfc, 3000).notes[0]
    lower = folders.byte_level(tmp_path / "low", folders.BYTE_LEVEL["qwen2"], normalizer=normalizers.Lowercase())
    with pytest.raises(ExportError, match="Lowercase"):
        vocabulary(lower, 3000)
    strip = folders.spm(tmp_path / "spm", pre.Metaspace(split=False), normalizers.NFKC())
    with pytest.raises(ExportError, match="NFKC"):
        vocabulary(strip, 3000)


def test_splitting_at_spaces_before_merging_is_refused_where_tokens_hold_several_spaces(tmp_path):
    with pytest.raises(ExportError, match="splits at spaces"):
        vocabulary(folders.spm(tmp_path, pre.Metaspace(split=True)), 3000)


def test_bytes_that_are_missing_are_refused_or_said(tmp_path):
    folder = folders.spm(tmp_path / "spm", normalizer=folders.legacy())
    model = folders.state(folder)["model"]
    del model["vocab"]["<0x0A>"]
    with pytest.raises(ExportError, match="lacks 1 of 256"):
        vocabulary(folders.change(folder, model=model), 3000)
    folder = folders.byte_level(tmp_path / "bytes", folders.BYTE_LEVEL["gpt-2"])
    model = folders.state(folder)["model"]
    del model["vocab"]["ÿ"]
    assert "1 of 256 bytes" in vocabulary(folders.change(folder, model=model), 3000).notes[0]
    with pytest.raises(ExportError, match="writes '<unk>'"):
        vocabulary(folders.change(folder, model=model | {"unk_token": "<unk>"}), 3000)


@pytest.mark.parametrize("kind", [models.WordPiece({"a": 0}), models.WordLevel({"a": 0}), models.Unigram([("a", 0.0)])])
def test_other_kinds_than_bpe_are_refused(tmp_path, kind):
    Tokenizer(kind).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ExportError, match=type(kind).__name__):
        vocabulary(tmp_path, 10)
