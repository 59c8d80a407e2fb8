"""Recorded samples: prompts, continuations, file."""

from __future__ import annotations

import json

import pytest

from hf_qep.errors import CheckpointError, FormatVersionError
from hf_qep.evaluation import EvalOptions, evaluate_pair
from hf_qep.evaluation.samples import (
    CHAT_NOTE,
    CHAT_PROMPTS,
    SCHEMA_VERSION,
    SampleItem,
    Samples,
    agreement,
    choose_prompts,
    json_schema,
    openings,
    record_samples,
)
from tests.evaluation.test_eval_command import checkpoints, run  # noqa: F401  (a fixture)

TEXT = "A TITLE OF FEW WORDS\n" + "\n\n".join(
    f"Chapter {n} begins here, with a sentence about the river and the old mill. Then another follows it slowly."
    for n in range(6)
)


@pytest.fixture(scope="module")
def pair(tiny_model):
    """A model and the same with other weights in its last layer."""
    changed = tiny_model("llama")
    head = changed.get_output_embeddings()
    head.weight.data = head.weight.data.flip(0)
    return tiny_model("llama").eval(), changed.eval()


@pytest.fixture(scope="module")
def plain_tokenizer(tiny_tokenizer):
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module")
def record(pair, plain_tokenizer):
    return evaluate_pair(*pair, plain_tokenizer, [TEXT], options=EvalOptions(window=64, max_tokens=100))


def test_equal_models_agree_and_different_ones_do_not(pair, plain_tokenizer, record):
    model, changed = pair
    same = record_samples(model, model, plain_tokenizer, [TEXT], record, count=3, max_new_tokens=8)
    assert [item.agreement for item in same.items] == [1.0] * 3
    assert all(item.baseline == item.subject for item in same.items)
    other = record_samples(model, changed, plain_tokenizer, [TEXT], record, count=3, max_new_tokens=8)
    assert min(item.agreement for item in other.items) < 1
    assert [i.prompt for i in other.items] == [i.prompt for i in same.items]
    assert [i.baseline for i in other.items] == [i.baseline for i in same.items]


def test_samples_are_greedy_whatever_the_model_prefers(pair, plain_tokenizer, record):
    import copy

    eager = copy.deepcopy(pair[0])
    eager.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    samples = record_samples(pair[0], eager, plain_tokenizer, [TEXT], record, count=2, max_new_tokens=8)
    assert [item.agreement for item in samples.items] == [1.0, 1.0]


def test_a_chat_template_asks_questions_and_says_so(pair, tiny_tokenizer, plain_tokenizer, record):
    prompts = choose_prompts(tiny_tokenizer, [TEXT], 2)
    assert prompts == [(question, CHAT_NOTE) for question in CHAT_PROMPTS[:2]]
    many = choose_prompts(tiny_tokenizer, [TEXT], len(CHAT_PROMPTS) + 2)
    assert [note for _, note in many[-2:]] == [None, None] and all(prompt for prompt, _ in many)
    samples = record_samples(*pair, tiny_tokenizer, [TEXT], record, count=1, max_new_tokens=4)
    assert samples.items[0].note == CHAT_NOTE


def test_openings_are_spread_cut_between_words_and_no_headings(plain_tokenizer):
    found = openings(plain_tokenizer, [TEXT], 4)
    assert len(found) == len(set(found)) == 4
    for opening in found:
        assert opening in TEXT and TEXT[TEXT.index(opening) + len(opening)] == " "
        assert len(plain_tokenizer(opening)["input_ids"]) <= 24 + 2
        assert not opening.startswith("A TITLE")
    assert [TEXT.index(opening) for opening in found] == sorted(TEXT.index(opening) for opening in found)


def test_short_texts_give_fewer_prompts_instead_of_bad_ones(plain_tokenizer):
    assert openings(plain_tokenizer, ["Too short.", ""], 4) == []
    assert (
        1
        <= len(openings(plain_tokenizer, ["One sentence that is long enough to be the beginning of a prompt."], 4))
        < 4
    )


def test_nothing_is_recorded_for_zero_prompts_or_models_that_write_nothing(pair, tiny_model, plain_tokenizer, record):
    assert record_samples(*pair, plain_tokenizer, [TEXT], record, count=0) is None
    encoder = tiny_model("bert")
    assert record_samples(encoder, encoder, plain_tokenizer, [TEXT], record) is None


@pytest.mark.parametrize(
    "theirs, ours, share", [([1, 2, 3, 4], [1, 2, 4, 4], 0.75), ([1, 2], [1], 0.5), ([], [], 1.0), ([], [1], 0.0)]
)
def test_agreement_counts_positions(theirs, ours, share):
    assert agreement(theirs, ours) == share


def test_samples_come_back_from_their_file(pair, plain_tokenizer, record, tmp_path):
    samples = record_samples(*pair, plain_tokenizer, [TEXT], record, count=2, max_new_tokens=4)
    assert samples.write(tmp_path).name == "hf_qep_samples.json"
    assert Samples.read(tmp_path) == samples
    assert samples.items[samples.worst].agreement == min(item.agreement for item in samples.items)
    assert set(json_schema()["$defs"]["Samples"]["properties"]) == set(samples.to_dict())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"schema": "other"}, CheckpointError, "no file of recorded samples"),
        ({"schema_version": SCHEMA_VERSION + 1}, FormatVersionError, "upgrade"),
        ({"do_sample": True}, CheckpointError, "do_sample"),
        ({"extra": 1}, CheckpointError, "extra"),
        ({"items": [{"prompt": "a", "baseline": "b", "subject": "c", "agreement": 1.5}]}, CheckpointError, "agreement"),
        ({"items": [{"prompt": "a", "baseline": "b", "subject": "c"}]}, CheckpointError, "agreement"),
    ],
)
def test_malformed_samples_are_refused(pair, plain_tokenizer, record, tmp_path, change, error, message):
    samples = record_samples(*pair, plain_tokenizer, [TEXT], record, count=1, max_new_tokens=2)
    (tmp_path / "hf_qep_samples.json").write_text(json.dumps(samples.to_dict() | change))
    with pytest.raises(error, match=message):
        Samples.read(tmp_path)


def test_an_agreement_outside_of_its_range_is_no_sample():
    with pytest.raises(ValueError, match="between 0 and 1"):
        SampleItem("a", "b", "c", -0.1)


def test_missing_and_broken_files_say_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="run: hf-qep eval"):
        Samples.read(tmp_path)
    (tmp_path / "hf_qep_samples.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        Samples.read(tmp_path)


def test_eval_writes_samples_beside_the_record_unless_told_not_to(checkpoints, tmp_path):  # noqa: F811
    model, packed, text = checkpoints
    words = ("eval", packed, "--baseline", model, "--text", text, "--window", 32, "--quiet")
    none, two = tmp_path / "none" / "r.json", tmp_path / "two" / "r.json"
    for out, count in ((none, 0), (two, 2)):
        out.parent.mkdir()
        done = run(*words, "--out", out, "--samples", count)
        assert done.exit_code == 0, done.output
    assert [p.name for p in none.parent.iterdir()] == ["r.json"]
    samples = Samples.read(two.parent)
    assert len(samples.items) == 2
    assert samples.subject.sha256 == json.loads(two.read_text())["subject"]["sha256"]
    assert run(*words, "--samples", -1).exit_code == 2
