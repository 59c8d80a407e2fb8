import copy

import pytest
import torch

from hf_qep.errors import ConfigError
from hf_qep.evaluation.divergence import compare_language_models
from hf_qep.evaluation.perplexity import perplexity
from tests.evaluation.models import TableModel, random_table
from tests.evaluation.test_perplexity import stream_of

IDS = torch.randint(0, 13, (120,), generator=torch.Generator().manual_seed(0)).tolist()


def test_a_model_does_not_differ_from_itself(tiny_model):
    model = tiny_model("cohere2")
    score = compare_language_models(model, copy.deepcopy(model), stream_of(IDS), window=16)
    assert score.kl.value == pytest.approx(0, abs=1e-7)
    assert score.top1_agreement.value == 1
    assert score.baseline == score.subject


def test_divergence_equals_the_direct_sum_in_double_precision():
    p, q = random_table(13, 1), random_table(13, 2)
    score = compare_language_models(p, q, stream_of(IDS), window=16, stride=8, batch_size=3)
    log_p, log_q = (torch.log_softmax(m.table.detach().double()[IDS[:-1]], -1) for m in (p, q))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert score.kl.value == pytest.approx(expected.mean().item(), rel=1e-5)
    assert score.top1_agreement.value == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())
    assert score.kl.n == score.top1_agreement.n == len(IDS) - 1


def test_it_also_gives_the_perplexity_of_both(tiny_model):
    p, q = tiny_model("llama"), tiny_model("qwen3")
    score = compare_language_models(p, q, stream_of(IDS), window=16, stride=4)
    for ours, model in ((score.baseline, p), (score.subject, q)):
        alone = perplexity(model, stream_of(IDS), window=16, stride=4)
        assert ours.nll.value == pytest.approx(alone.nll.value, rel=1e-6)
        assert ours.nll.stderr == pytest.approx(alone.nll.stderr, rel=1e-4)


def test_divergence_is_directed():
    p, q = random_table(13, 1), TableModel(3 * random_table(13, 2).table.detach())
    forward, backward = (compare_language_models(a, b, stream_of(IDS), window=16).kl.value for a, b in ((p, q), (q, p)))
    assert forward != pytest.approx(backward, rel=1e-2)
    assert min(forward, backward) > 0


def test_tokens_masked_in_both_models_do_not_spoil_the_sum():
    p, q = (random_table(13, seed).table.detach() for seed in (1, 2))
    masked_p, masked_q = (torch.cat([table, torch.full((13, 1), -torch.inf)], 1) for table in (p, q))
    plain = compare_language_models(TableModel(p), TableModel(q), stream_of(IDS), window=16)
    masked = compare_language_models(TableModel(masked_p), TableModel(masked_q), stream_of(IDS), window=16)
    assert masked.kl.value == pytest.approx(plain.kl.value, rel=1e-6)


def test_models_of_different_vocabularies_are_refused():
    with pytest.raises(ConfigError, match="13 and 14"):
        compare_language_models(random_table(13, 0), random_table(14, 0), stream_of(IDS), window=16)
