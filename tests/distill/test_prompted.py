"""A teacher behind a prompt says what it says about the whole text."""

import pytest
import torch

from hf_qep.distill.checks import check_teacher, classes_of
from hf_qep.distill.prompted import PromptedTeacher
from hf_qep.distill.said import take_said
from hf_qep.distill.samples import CAUSAL_LM, IGNORED, TaskData
from hf_qep.distill.store import teacher_fingerprint
from hf_qep.errors import ConfigError
from tests import tiny_models

PROMPT = torch.tensor([1, 7, 9, 4, 11, 2])


@pytest.fixture(params=["llama", "qwen3", "cohere2"])
def model(request):
    return tiny_models.build_model(request.param).eval()


def rows(size: int = 5) -> TaskData:
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (size, 8), generator=make)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.full_like(ids, IGNORED)
    last = mask.sum(1) - 1
    labels[torch.arange(size), last] = ids[torch.arange(size), last]
    return TaskData(CAUSAL_LM, {"input_ids": ids, "attention_mask": mask}, labels)


def test_says_what_the_model_says_about_prompt_and_row(model):
    data = rows()
    with torch.no_grad():
        whole = torch.cat([PROMPT.expand(len(data), -1), data.inputs["input_ids"]], 1)
        mask = torch.cat([torch.ones(len(data), len(PROMPT), dtype=torch.int64), data.inputs["attention_mask"]], 1)
        wanted = model(input_ids=whole, attention_mask=mask).logits[:, len(PROMPT) :]
        found = PromptedTeacher(model, PROMPT)(**data.inputs).logits
    seen = data.inputs["attention_mask"].bool()
    assert torch.allclose(found[seen], wanted[seen], atol=1e-4)


def test_rows_do_not_change_what_is_kept_of_the_prompt(model):
    teacher, data = PromptedTeacher(model, PROMPT), rows()
    first = take_said(teacher, data, batch_size=2)
    again = take_said(teacher, data, batch_size=5)
    assert torch.allclose(first.log_p.float(), again.log_p.float(), atol=2e-3)
    bare = take_said(model, data, batch_size=5)
    assert not torch.allclose(first.log_p.float(), bare.log_p.float(), atol=2e-3)


def test_another_prompt_is_another_teacher(model):
    one, two = PromptedTeacher(model, PROMPT), PromptedTeacher(model, PROMPT[:-1])
    assert teacher_fingerprint(one) != teacher_fingerprint(two)


def test_a_prompt_has_no_weights_and_the_classes_are_the_models(model):
    teacher = PromptedTeacher(model, PROMPT)
    assert teacher.num_parameters() == model.num_parameters()
    assert classes_of(teacher, CAUSAL_LM) == model.config.vocab_size
    check_teacher(model, teacher, CAUSAL_LM, None)


def test_impossible_prompts_are_refused(model):
    room, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    for ids in (torch.zeros(0, dtype=torch.int64), PROMPT.unsqueeze(0), torch.tensor([vocabulary])):
        with pytest.raises(ConfigError):
            PromptedTeacher(model, ids)
    with pytest.raises(ConfigError, match="no room"):
        PromptedTeacher(model, torch.ones(room, dtype=torch.int64))
    long = PromptedTeacher(model, torch.ones(room - 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="fewer examples"):
        long(rows().inputs["input_ids"])
