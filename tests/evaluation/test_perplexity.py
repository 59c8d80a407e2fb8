import math

import pytest
import torch

from hf_qep.errors import CalibrationError, ConfigError, NonFiniteError
from hf_qep.evaluation.perplexity import (
    UNSCORED,
    TokenStream,
    check_window,
    count_windows,
    perplexity,
    token_stream,
    window_batches,
)
from tests.evaluation.models import TableModel, fading, random_table, uniform


def stream_of(ids, prefix=None):
    ids = torch.tensor(ids)
    return TokenStream(ids, torch.ones(len(ids), dtype=torch.bool), torch.ones_like(ids), prefix, "none", 1, "")


def naive_nll(model, ids, prefix, window, stride):
    """Every token by a forward pass of its own, with the context that its window gives it."""
    total, scored = 0.0, 0
    first_end = window if prefix is not None else window + 1
    for t in range(0 if prefix is not None else 1, len(ids)):
        if t < first_end:
            low = 0
        else:
            end = min(len(ids), first_end + stride * (1 + (t - first_end) // stride))
            low = end - 1 - (window - (prefix is not None))
        context = ([prefix] if prefix is not None else []) + ids[low:t]
        assert 1 <= len(context) <= window
        logits = model(input_ids=torch.tensor([context])).logits[0, -1]
        total -= torch.log_softmax(logits.double(), -1)[ids[t]].item()
        scored += 1
    return total / scored, scored


def test_uniform_logits_give_the_vocabulary_as_perplexity():
    score = perplexity(uniform(37), stream_of([i % 37 for i in range(100)]), window=16, stride=8)
    assert score.perplexity.value == pytest.approx(37, rel=1e-5)
    assert score.perplexity.stderr == pytest.approx(0, abs=1e-4)
    assert score.nll.n == 99
    assert score.bits_per_byte.value == pytest.approx(math.log2(37), rel=1e-5)


@pytest.mark.parametrize("prefix", [None, 1])
@pytest.mark.parametrize("window, stride", [(8, 8), (8, 3), (8, 1), (16, 5), (64, 32)])
def test_windows_score_every_token_once_as_single_passes_do(prefix, window, stride):
    model = fading(50, 0)
    ids = torch.randint(3, 50, (45,), generator=torch.Generator().manual_seed(3)).tolist()
    expected, scored = naive_nll(model, ids, prefix, window, stride)
    score = perplexity(model, stream_of(ids, prefix), window=window, stride=stride, batch_size=3)
    assert score.nll.n == scored
    assert score.nll.value == pytest.approx(expected, rel=1e-5)


def test_one_window_equals_the_loss_of_the_model(tiny_model):
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(4))
    score = perplexity(model, stream_of(ids[0].tolist()), window=64)
    assert score.nll.value == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize("length", [2, 8, 9, 10, 33])
@pytest.mark.parametrize("prefix", [None, 5])
def test_windows_cover_the_stream_and_are_counted_right(length, prefix):
    stream = stream_of(list(range(length)), prefix)
    batches = list(window_batches(stream, 8, 3, batch_size=2))
    targets = torch.cat([t[t != UNSCORED] for _, t, _ in batches])
    assert sorted(targets.tolist()) == list(range(0 if prefix is not None else 1, length))
    assert sum(len(i) for i, _, _ in batches) == count_windows(stream, 8, 3)
    assert all(i.shape == t.shape and i.shape[1] <= 8 for i, t, _ in batches)


def test_batch_size_does_not_change_the_score():
    model, stream = fading(50, 0), stream_of([i * 7 % 50 for i in range(60)])
    one, many = (perplexity(model, stream, window=12, stride=6, batch_size=b) for b in (1, 5))
    assert one.nll.value == pytest.approx(many.nll.value, rel=1e-6)
    assert one.nll.stderr == pytest.approx(many.nll.stderr, rel=1e-4)


def test_bytes_of_the_tokens_add_up_to_the_text(tiny_tokenizer):
    text = "plain words, and more of them"
    stream = token_stream(tiny_tokenizer, [text, text], bos="document")
    assert stream.token_bytes.sum() == 2 * len(text.encode())
    joined = token_stream(tiny_tokenizer, [text, text], bos="none", separator="\n\n")
    assert joined.token_bytes.sum() == 2 * len(text.encode()) + 2


def test_document_bos_is_context_and_is_not_scored(tiny_tokenizer):
    stream = token_stream(tiny_tokenizer, ["abc", "de"], bos="document")
    assert (stream.ids == tiny_tokenizer.bos_token_id).tolist() == (~stream.scored).tolist()
    assert (~stream.scored).sum() == 2
    targets = torch.cat([t for _, t, _ in window_batches(stream, 4, 2, 1)], dim=1)
    assert (targets != UNSCORED).sum() == 5


def test_auto_bos_follows_the_tokenizer(tiny_tokenizer):
    first = tiny_tokenizer("a")["input_ids"][0]
    expected = "window" if first == tiny_tokenizer.bos_token_id else "none"
    assert token_stream(tiny_tokenizer, ["abc"]).bos == expected


def test_max_tokens_cuts_the_stream(tiny_tokenizer):
    stream = token_stream(tiny_tokenizer, ["abcdefgh"], bos="none", max_tokens=5)
    assert len(stream.ids) == len(stream.scored) == len(stream.token_bytes) == 5


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_empty_text_is_refused(tiny_tokenizer, texts):
    with pytest.raises(CalibrationError, match="empty"):
        token_stream(tiny_tokenizer, texts)


def test_unknown_bos_rule_is_refused(tiny_tokenizer):
    with pytest.raises(ConfigError, match="document"):
        token_stream(tiny_tokenizer, ["abc"], bos="always")


@pytest.mark.parametrize("window, stride", [(1, 1), (65, 1), (16, 0), (16, 17)])
def test_impossible_windows_are_refused(window, stride):
    with pytest.raises(ConfigError, match=r"outside"):
        check_window(uniform(5), window, stride)


def test_default_window_is_the_longest_input_and_half_of_it_the_stride():
    assert check_window(uniform(5), None, None) == (64, 32)
    assert check_window(uniform(5), 10, None) == (10, 5)


def test_a_broken_model_is_refused():
    table = torch.zeros(9, 9)
    table[4] = torch.nan
    with pytest.raises(NonFiniteError, match="nll"):
        perplexity(TableModel(table), stream_of([1, 4, 2, 3]), window=8)


def test_perplexity_of_a_table_is_that_of_its_entries():
    model, ids = random_table(11, 0), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    log_p = torch.log_softmax(model.table.double(), -1)
    expected = -sum(log_p[a, b].item() for a, b in zip(ids, ids[1:], strict=False)) / (len(ids) - 1)
    assert perplexity(model, stream_of(ids), window=4, stride=2).nll.value == pytest.approx(expected, rel=1e-6)


def test_perplexity_of_the_stories_model_is_the_documented_one(shared_data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read_table = pytest.importorskip("pyarrow.parquet").read_table
    folder = shared_data / "data" / "models" / "stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    stories = read_table(shared_data / "data" / "text" / "tinystories.parquet")["text"].to_pylist()[::20]
    score = perplexity(model, token_stream(tokenizer, stories, bos="document"), window=512, stride=512)
    # 5.84 over all 700 stories; these are every twentieth of them
    assert abs(score.perplexity.value - 5.84) < 3 * score.perplexity.stderr
    assert score.perplexity.stderr < 0.8
