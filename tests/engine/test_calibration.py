"""Calibration: every kind of data a user may give, packed without padding, the same for the same seed."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_qep.engine.calibration import advise, load_calibration, read_texts
from hf_qep.engine.packing import cut_rows, pack_rows
from hf_qep.engine.text_sources import TextSource, apportion
from hf_qep.errors import CalibrationError

STORIES = [f"{word} sat on the mat and looked at the sea, number {i}. " * 3 for i, word in enumerate(["a cat"] * 40)]
CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good day to you"}]


def load(data, tokenizer, num_samples=4, seq_len=16, seed=0, model=None):
    return load_calibration(data, tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed, model=model)


@pytest.fixture(scope="module")
def word_tokenizer():
    """Words as tokens; adds nothing, has an EOS (as GPT-2)."""
    return _words({}, None, eos_token="</s>")


@pytest.fixture(scope="module")
def bert_tokenizer():
    """Words as tokens; writes [CLS] text [SEP] (as BERT)."""
    ends = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    return _words({"[CLS]": 0, "[SEP]": 1}, ends, cls_token="[CLS]", sep_token="[SEP]")


def _words(special, post_processor, **marks):
    names = [*special, "</s>", "[UNK]", *(f"w{i}" for i in range(60))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post_processor is not None:
        core.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **marks)


def words(numbers):
    return " ".join(f"w{i}" for i in numbers)


# --- where texts come from


def write_rows(folder, kind, rows):
    """A file of `kind` with columns `text` and `other`."""
    path = folder / f"rows.{kind}"
    records = [{"text": text, "other": f"other {i}"} for i, text in enumerate(rows)]
    if kind == "txt":
        path.write_text("\n".join(rows))
    elif kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif kind == "csv":
        path.write_text("text,other\n" + "\n".join(f'"{r["text"]}","{r["other"]}"' for r in records))
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_table_gives_its_text_column_unless_another_is_named(tmp_path, kind):
    path = write_rows(tmp_path, kind, ["first", "second"])
    assert read_texts(str(path)) == ["first", "second"]
    assert read_texts(f"{path}:other") == read_texts(f"{path}#other") == ["other 0", "other 1"]


def test_a_text_file_is_one_document_with_plain_line_ends(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"one\r\ntwo")
    assert read_texts(path) == ["one\ntwo"]


def test_a_limit_draws_documents_by_seed():
    texts = [str(i) for i in range(50)]
    drawn = read_texts(texts, limit=5, seed=1)
    assert len(set(drawn)) == 5 and drawn == read_texts(texts, limit=5, seed=1)
    assert drawn != read_texts(texts, limit=5, seed=2)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 500))
def test_shares_add_up_and_stay_within_one_of_the_exact_share(weights, total):
    shares = apportion(weights, total)
    assert sum(shares) == total
    assert all(abs(share - w / sum(weights) * total) < 1.0001 for share, w in zip(shares, weights, strict=True))


@pytest.mark.parametrize("as_text", [True, False])
def test_a_mix_gives_each_source_its_share_of_the_rows(tmp_path, word_tokenizer, as_text):
    low, high = tmp_path / "low.txt", tmp_path / "high.txt"
    low.write_text(words([1, 2] * 200))
    high.write_text(words([50, 51] * 200))
    spec = f"{low}*0.75,{high}*0.25" if as_text else [(str(low), 0.75), (str(high), 0.25)]
    ids = load(spec, word_tokenizer, num_samples=8).inputs["input_ids"]
    assert int((ids.float().mean(1) < 20).sum()) == 6


def test_sources_of_a_record_show_no_folder(tmp_path, word_tokenizer):
    path = write_rows(tmp_path, "jsonl", [words(range(40))] * 4)
    description = load(f"{path}:text", word_tokenizer).description
    assert description["sources"][0]["name"] == "rows.jsonl:text"
    assert str(tmp_path) not in json.dumps(description)


# --- packing


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=80), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(0, 3),
)
def test_packing_uses_every_token_of_every_document_once(word_tokenizer, documents, seq_len, seed):
    source = TextSource("list", [words(numbers) for numbers in documents])
    rows = pack_rows(source, word_tokenizer, num_rows=10**6, seq_len=seq_len, seed=seed)
    eos = word_tokenizer.eos_token_id
    given_counts = torch.bincount(torch.tensor([i + 2 for d in documents for i in d]), minlength=64)
    packed = torch.bincount(rows.ids.flatten(), minlength=64)
    packed[eos] = 0
    lost = given_counts - packed
    assert rows.documents == len(documents)
    assert int(lost.min()) >= 0 and int(lost.sum()) < seq_len


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(3, 20))
def test_an_encoder_gets_one_text_per_row_between_its_marks(bert_tokenizer, lengths, seq_len):
    source = TextSource("list", [words(range(n)) for n in lengths])
    rows = pack_rows(source, bert_tokenizer, num_rows=10**6, seq_len=seq_len, seed=0)
    sizes = rows.mask.sum(1)
    assert (rows.ids[:, 0] == bert_tokenizer.cls_token_id).all()
    assert all(row[size - 1] == bert_tokenizer.sep_token_id for row, size in zip(rows.ids, sizes, strict=True))
    assert all(mask[:size].all() and not mask[size:].any() for mask, size in zip(rows.mask, sizes, strict=True))
    inner = rows.ids[rows.mask.bool()]
    assert int((inner > 1).sum()) == sum(lengths)  # every word once
    assert int((inner == bert_tokenizer.sep_token_id).sum()) == len(rows.ids)


def test_rows_that_are_filled_up_come_with_their_mask(bert_tokenizer):
    found = load([words([3] * 5), words([4] * 20)], bert_tokenizer, num_samples=2, seq_len=12)
    assert [1] * 7 + [0] * 5 in found.inputs["attention_mask"].tolist()
    assert found.tokens == int(found.inputs["attention_mask"].sum()) < found.inputs["input_ids"].numel()


def test_bos_opens_each_document_and_no_eos_is_added_then(tiny_tokenizer):
    ids = load(STORIES, tiny_tokenizer, num_samples=40, seq_len=64).inputs["input_ids"]
    assert int((ids == tiny_tokenizer.bos_token_id).sum()) >= 20
    assert not (ids == tiny_tokenizer.eos_token_id).any()


def test_one_long_book_cannot_fill_everything(word_tokenizer):
    book, notes = words([5] * 50_000), [words([7] * 16)] * 15
    ids = load([book, *notes], word_tokenizer, num_samples=8).inputs["input_ids"]
    assert (ids == word_tokenizer("w5")["input_ids"][0]).sum() <= 4 * 16


def test_only_what_the_rows_need_is_tokenised(word_tokenizer):
    seen = []

    class Counting:
        eos_token_id = None

        def __call__(self, texts, **options):
            seen.append(sum(map(len, texts)))
            return word_tokenizer(texts, **options)

    load([words([5] * 20_000) for _ in range(20)], Counting(), num_samples=8)
    assert sum(seen) < 40_000  # of 1.2 million characters


def test_the_seed_decides_rows_and_fingerprint(word_tokenizer):
    texts = [words([i % 60] * 40) for i in range(60)]
    first, again, other = (load(texts, word_tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first.inputs["input_ids"], again.inputs["input_ids"])


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=10), st.integers(1, 12))
def test_cut_rows_keep_the_order(sequences, seq_len):
    flat = [i for ids in sequences for i in ids]
    rows = list(cut_rows(sequences, seq_len))
    assert [i for row in rows for i in row] == flat[: len(flat) // seq_len * seq_len]


# --- chats, tensors, images


def test_chats_are_rendered_by_the_template_without_a_second_bos(tiny_tokenizer):
    text = tiny_tokenizer.apply_chat_template(CHAT, tokenize=False)
    whole = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = load([CHAT] * 8, tiny_tokenizer, num_samples=2, seq_len=len(whole)).inputs["input_ids"]
    assert ids.tolist() == [whole, whole]


def test_jsonl_messages_are_chats(tmp_path, tiny_tokenizer):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(8)))
    assert len(load(str(path), tiny_tokenizer)) == 4


def test_a_token_tensor_is_kept_as_rows(tiny_tokenizer):
    ids = torch.arange(4 * 10).reshape(4, 10) % 100
    calibration = load(ids, tiny_tokenizer, seq_len=16)
    assert torch.equal(calibration.inputs["input_ids"], ids)
    assert (calibration.tokens, calibration.description["seq_len"]) == (40, 10)


def test_more_rows_than_asked_are_drawn_by_seed():
    ids = torch.arange(100)[:, None].expand(100, 8)
    drawn = load(ids, None, num_samples=5).inputs["input_ids"][:, 0].tolist()
    assert len(drawn) == 5 and drawn == sorted(set(drawn)) and drawn != [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rows", [[[1] * 10, [2] * 30], [torch.ones(10).long(), torch.full((1, 30), 2)]])
def test_id_lists_of_unequal_length_are_joined_and_cut(rows):
    ids = load(rows, None, num_samples=2, seq_len=20).inputs["input_ids"]
    assert ids.tolist() == [[1] * 10 + [2] * 10, [2] * 20]


def test_images_become_pixel_values_and_count_patches(tiny_model):
    calibration = load(torch.rand(4, 3, 16, 16), None, model=tiny_model("vit"))
    assert set(calibration.inputs) == {"pixel_values"} and calibration.tokens == 4 * 16


def test_a_dict_of_tensors_is_batched_together(tiny_batch):
    batch = tiny_batch("bert", batch_size=4)
    calibration = load(dict(batch), None)
    parts = calibration.batches(3)
    assert [len(next(iter(part.values()))) for part in parts] == [3, 1]
    for name, tensor in calibration.inputs.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)


# --- the model's own text


@pytest.mark.parametrize("data", [None, "self"])
def test_self_calibration_is_deterministic_and_leaves_no_trace(tiny_model, tiny_tokenizer, data):
    model = tiny_model("llama")
    settings_before, state = model.generation_config, torch.get_rng_state()
    first, again, other = (load(data, tiny_tokenizer, seed=seed, model=model) for seed in (3, 3, 4))
    assert first.inputs["input_ids"].shape == (4, 16)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert (first.inputs["input_ids"][:, 0] == tiny_tokenizer.bos_token_id).all()
    assert model.generation_config is settings_before and torch.equal(torch.get_rng_state(), state)


def test_self_calibration_does_not_stop_at_the_end_of_a_text(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is equally likely: EOS comes soon
    ids = load(None, None, num_samples=16, seq_len=100, model=model).inputs["input_ids"]
    assert (ids == model.config.eos_token_id).any() and ids.unique().numel() > 100
    assert not (ids[:, -20:] == 0).all()


def test_self_calibration_without_bos_starts_at_random_tokens(tiny_model):
    model = tiny_model("llama")
    model.config.bos_token_id = None
    assert load(None, None, num_samples=16, model=model).inputs["input_ids"][:, 0].unique().numel() > 4


@pytest.mark.parametrize("family", ["bert", "bert_classifier", "vit"])
def test_models_that_cannot_write_ask_for_a_data_set(tiny_model, family):
    with pytest.raises(CalibrationError, match="pass dataset="):
        load(None, None, model=tiny_model(family))


def test_a_processor_lends_its_tokenizer(word_tokenizer):
    class Processor:
        tokenizer = word_tokenizer

    assert len(load([words(range(60))] * 4, Processor())) == 4


# --- warnings and refusals


def test_fewer_rows_than_asked_warn_with_the_numbers(word_tokenizer):
    with pytest.warns(UserWarning, match="2 of 4 samples"):
        assert len(load([words(range(20)), words(range(20))], word_tokenizer)) == 2


def test_a_sequence_longer_than_the_model_is_shortened_with_a_warning(tiny_model, tiny_tokenizer):
    with pytest.warns(UserWarning, match="500.*128"):
        calibration = load(STORIES, tiny_tokenizer, seq_len=500, model=tiny_model("llama"))
    assert calibration.inputs["input_ids"].shape[1] == 128


def test_advice_comes_only_when_there_are_fewer_tokens_than_inputs():
    assert advise(64, 64) is None
    assert "256" in advise(63, 64)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "empty.txt", "empty.*non-empty row"),
        ("  \n ", "blank.txt", "empty"),
        ('{"text": "a"', "cut.jsonl", "cannot read 'cut.jsonl' as jsonl"),
        ('{"text": "a"}', "object.json", "list of strings or objects"),
        ('{"a": "x", "b": "y"}', "two.jsonl", "name one of its columns"),
        ('{"text": "x"}\n{"b": "y"}', "ragged.jsonl", "row 1 .* no column 'text'"),
        ('{"text": 7}', "number.jsonl", "a row of 'number.jsonl' is a int"),
        ("x", "notes.docx", "unknown file type '.docx'.*\\.parquet"),
        ("x", "broken.parquet", "cannot read 'broken.parquet' as parquet"),
        ("a,b\n1,2", "table.csv:text", "no column 'text'; its columns: a, b"),
        ("x", "plain.txt:text", "no column 'text'"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_by_name(tmp_path, word_tokenizer, content, name, message):
    (tmp_path / name.split(":")[0]).write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load(str(tmp_path / name), word_tokenizer)


@pytest.mark.parametrize("name", ["absent.txt", "absent/deep/folder/file"])
def test_a_missing_file_is_not_taken_for_a_hub_id(tmp_path, word_tokenizer, name):
    with pytest.raises(CalibrationError, match="does not exist"):
        load(str(tmp_path / name), word_tokenizer)


def test_a_data_set_that_the_hub_does_not_give_is_refused(word_tokenizer):
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError, match="cannot load the data set 'nobody/nothing'"):
        load("nobody/nothing", word_tokenizer)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no text"),
        (["", "  "], "holds no text"),
        (["w1 w2"], "fewer than 16 tokens"),
        ([CHAT[0]], "a row of 'list in memory' is a dict"),
        ([CHAT], "no chat template"),
        (3, "type int"),
        ({}, "dict of calibration tensors is empty"),
        ({"input_ids": [1, 2]}, "'input_ids' is a list"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, "differ in their first dimension"),
        ({"pixel_values": torch.full((1, 2), float("nan"))}, "'pixel_values' holds NaN"),
        (torch.zeros(0, 8).long(), "0 samples"),
        (torch.rand(2, 3), r"shape \(2, 3\) is not \(N, C, H, W\)"),
        (torch.full((2, 8), 999), "token id 999 is outside the vocabulary of 62"),
        (torch.full((2, 8), -100), "negative id -100"),
        ([[1, 2, 3]], "3 tokens, fewer than one row of 16"),
        ([("a", 0.0)], "weight 0.0 of 'a'"),
        ("a.txt*x,b.txt*1", "weight 'x' of 'a.txt'"),
    ],
)
def test_data_that_cannot_serve_is_refused_with_the_value(word_tokenizer, data, message):
    with pytest.raises(CalibrationError, match=message):
        load(data, word_tokenizer)


def test_a_share_without_a_row_is_refused(word_tokenizer):
    texts = [words(range(60))] * 9
    with pytest.raises(CalibrationError, match="gives none of 4 rows"):
        load([(texts, 0.99), (texts, 0.01)], word_tokenizer)


def test_text_without_a_tokenizer_asks_for_token_ids():
    with pytest.raises(CalibrationError, match="no tokenizer; pass token ids"):
        load(STORIES, None)


def test_the_vocabulary_of_the_model_counts(tiny_model):
    with pytest.raises(CalibrationError, match="token id 128 is outside the vocabulary of 128"):
        load(torch.full((4, 8), 128), None, model=tiny_model("llama"))


@pytest.mark.parametrize("option", [{"num_samples": 0}, {"seq_len": -1}, {"seq_len": 2.0}, {"num_samples": True}])
def test_sizes_must_be_positive_whole_numbers(word_tokenizer, option):
    with pytest.raises(CalibrationError, match=next(iter(option))):
        load(STORIES, word_tokenizer, **option)


def test_real_books_give_rows_from_as_many_books(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "data/models/stories260k")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration = load(str(shared_data / "data/text/books-train.parquet"), tokenizer, num_samples=64, seq_len=256)
    assert calibration.inputs["input_ids"].shape == (64, 256)
    assert calibration.description["documents"] >= 60
