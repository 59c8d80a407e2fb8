import copy

import pytest
import torch

from hf_qep.errors import CalibrationError
from hf_qep.evaluation.embeddings import compare_encoders, embed, neighbour_overlap

WORDS = ["sun", "moon", "sea", "wind", "rain", "snow", "fire", "sand"]
TEXTS = [f"sentence number {i} about {word}" for i, word in enumerate(WORDS * 3)]


@pytest.mark.parametrize("family", ["bert", "bert_classifier"])
def test_an_encoder_does_not_differ_from_itself(tiny_model, tiny_tokenizer, family):
    model = tiny_model(family)
    score = compare_encoders(model, copy.deepcopy(model), tiny_tokenizer, TEXTS, neighbours=5)
    assert score.cosine_distance.value == pytest.approx(0, abs=1e-9)
    assert score.neighbour_overlap.value == 1
    assert score.sentences == score.cosine_distance.n == len(TEXTS)


def test_noise_moves_embeddings_away(tiny_model, tiny_tokenizer):
    model = tiny_model("bert")
    distances = []
    for noise in (0.02, 0.1):
        noisy = copy.deepcopy(model)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in noisy.parameters():
                p.add_(noise * torch.randn_like(p))
        distances.append(compare_encoders(model, noisy, tiny_tokenizer, TEXTS).cosine_distance.value)
    assert 0 < distances[0] < distances[1]


def test_padding_does_not_change_an_embedding(tiny_model):
    model, ids = tiny_model("bert"), torch.randint(3, 100, (1, 9))
    alone = embed(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 5, dtype=torch.long)], 1)
    torch.testing.assert_close(embed(model, {"input_ids": padded, "attention_mask": mask}), alone)


def test_overlap_counts_common_neighbours_without_the_item_itself():
    eye = torch.eye(6, dtype=torch.float64)
    first = torch.nn.functional.normalize(eye + 0.1 * eye[[1, 0, 3, 2, 5, 4]], dim=-1)  # pairs 01, 23, 45
    second = torch.nn.functional.normalize(eye + 0.1 * eye[[1, 0, 4, 5, 2, 3]], dim=-1)  # pairs 01, 24, 35
    assert neighbour_overlap(first, second, 1).value == pytest.approx(2 / 6)
    assert neighbour_overlap(first, first, 1).value == 1


def test_overlap_is_left_out_when_there_are_too_few_texts(tiny_model, tiny_tokenizer):
    model = tiny_model("bert")
    score = compare_encoders(model, model, tiny_tokenizer, TEXTS[:5], neighbours=10)
    assert score.neighbour_overlap is None and score.neighbours is None


def test_empty_text_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(CalibrationError, match="empty"):
        compare_encoders(tiny_model("bert"), tiny_model("bert"), tiny_tokenizer, [" "])
