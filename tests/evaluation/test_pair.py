import copy
import json

import pytest
import torch

from hf_qep.errors import CalibrationError
from hf_qep.evaluation import EvalOptions, EvalRecord, evaluate_pair, find_tasks
from hf_qep.evaluation.memory import peak_bytes, weight_bytes
from hf_qep.evaluation.speed import SpeedOptions, compare_speed

TEXTS = ["the quick brown fox jumps over the lazy dog. " * 4, "and then it sleeps all day long. " * 4]


def disturbed(model, noise=0.02):
    changed = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return changed


def test_a_language_model_pair_gives_a_record_that_survives_its_file(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("cohere2")
    record = evaluate_pair(
        model,
        disturbed(model),
        tiny_tokenizer,
        TEXTS,
        options=EvalOptions(window=32, speed=SpeedOptions(prompt_tokens=8, new_tokens=4, repetitions=2)),
        source="two sentences",
        subject_name="owner/packed",
        command="hf-qep eval x",
    )
    assert EvalRecord.read(record.write(tmp_path / "r.json")) == record
    assert record.text.kl.value > 0 and record.text.source == "two sentences"
    assert record.embeddings is None and record.tasks == ()
    assert record.subject.name == "owner/packed" and record.subject.sha256 == {}
    assert record.bits.linear is None and record.bits.model == 32 and record.bits.file is None
    assert "two float models" in record.notes[0]
    assert record.cost.subject.speed.decode.n == 2
    assert record.environment.versions["torch"]


def test_an_encoder_pair_gives_embedding_metrics(tiny_model, tiny_tokenizer):
    model = tiny_model("bert")
    record = evaluate_pair(model, disturbed(model), tiny_tokenizer, TEXTS, options=EvalOptions(window=64))
    assert record.text is None
    assert 0 < record.embeddings.cosine_distance.value < 1
    assert record.cost.subject.speed is None and record.cost.subject.peak_bytes is None


def test_tasks_enter_the_record(tiny_model, tiny_tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"good": f"the cat {i} sleeps", "bad": f"the cat {i} sleep"} for i in range(5)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    model = tiny_model("llama")
    record = evaluate_pair(model, model, tiny_tokenizer, None, tasks=find_tasks([], tmp_path))
    (task,) = record.tasks
    assert record.text is None and task.items == 5
    assert task.metrics[0].baseline == task.metrics[0].subject
    assert EvalRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_files_of_a_folder_are_hashed_and_measured(tiny_model, tiny_tokenizer, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "saved")
    record = evaluate_pair(
        model, model, tiny_tokenizer, None, subject_name=str(tmp_path / "saved"), subject_folder=tmp_path / "saved"
    )
    assert record.subject.name == "saved"
    assert len(record.subject.sha256["model.safetensors"]) == 64
    assert record.cost.subject.file_bytes > 0 and record.cost.baseline.file_bytes is None
    assert record.bits.file > record.bits.model


def test_speed_needs_a_text(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match="speed"):
        evaluate_pair(model, model, tiny_tokenizer, None, options=EvalOptions(speed=SpeedOptions()))


def test_models_without_generation_get_a_prefill_speed_only(tiny_model):
    (speed,) = compare_speed([tiny_model("bert")], torch.tensor([[5, 6, 7]]), SpeedOptions(6, 4, 2))
    assert speed.decode is None and speed.new_tokens == 0
    assert speed.prefill.value > 0 and speed.prefill.n == 2


def test_tied_weights_are_counted_once(tiny_model):
    tied, untied = tiny_model("qwen3"), tiny_model("llama")
    assert weight_bytes(tied) < sum(t.nbytes for t in tied.state_dict().values())
    assert weight_bytes(untied) >= sum(p.nbytes for p in untied.parameters())


def test_the_peak_sees_a_large_allocation_that_is_gone_afterwards():
    def run():
        block = torch.ones(64 << 20, dtype=torch.uint8)
        for _ in range(40):
            block.add_(1)

    peak = peak_bytes(run, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system has no /proc")
    assert 40 << 20 < peak < 200 << 20
