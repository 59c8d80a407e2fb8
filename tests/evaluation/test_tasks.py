import json
import sys

import pytest

from hf_qep.errors import ConfigError, ExtraMissingError, UnknownNameError
from hf_qep.evaluation.prompts import load_task
from hf_qep.evaluation.tasks import answer_tasks, compare_answers, find_tasks

ROWS = {
    "pick": [{"query": f"question {i}", "choices": ["yes it is", "no"], "gold": i % 2} for i in range(9)],
    "winogrande": [
        {
            "context_options": ["the cat saw the dog so it", "the cat saw the dog so he"],
            "continuation": "ran",
            "gold": 1,
        }
    ]
    * 3,
    "lambada": [{"context": "one two three", "continuation": "four"}, {"context": "a b c", "continuation": "d"}],
    "blimp": [{"good": "cats sleep", "bad": "cats sleeps", "phenomenon": "agreement"}] * 4,
    "japanese": [{"question": "what", "choice0": "a", "choice1": "bb", "choice2": "ccc", "label": 2}] * 5,
}


@pytest.fixture
def tasks_dir(tmp_path):
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def offline_lm_eval(monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def direct_log_likelihood(model, tokenizer, context, continuation):
    """log p(continuation | context), tokenised as one string after BOS."""
    import torch

    whole, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logits[t - 1, whole[t]].item() for t in range(start, len(whole)))


def test_all_layouts_run_through_lm_eval_offline(tiny_model, tiny_tokenizer, tasks_dir, offline_lm_eval):
    tasks = find_tasks([], tasks_dir)
    answers = answer_tasks(tiny_model("llama"), tiny_tokenizer, tasks)
    results = {r.name: r for r in compare_answers(tasks, answers, answers)}
    assert {name: r.items for name, r in results.items()} == {name: len(rows) for name, rows in ROWS.items()}
    assert {name: r.chance for name, r in results.items()} == {
        "pick": 0.5, "winogrande": 0.5, "lambada": 0.0, "blimp": 0.5, "japanese": pytest.approx(1 / 3)
    }  # fmt: skip
    assert [m.name for m in results["pick"].metrics] == ["acc", "acc_norm"]
    assert [m.name for m in results["lambada"].metrics] == ["acc"]
    assert results["pick"].prompt == "own:pick" and results["pick"].form == "continuation"
    assert results["pick"].majority == pytest.approx(5 / 9)
    assert results["blimp"].majority is None


def test_scores_are_those_of_direct_log_likelihoods(tiny_model, tiny_tokenizer, tasks_dir, offline_lm_eval):
    model, tasks = tiny_model("llama"), find_tasks(["pick", "japanese"], tasks_dir)
    answers = answer_tasks(model, tiny_tokenizer, tasks, batch_size=3)
    for task, delimiter in zip(tasks, [" ", ""], strict=True):
        for index, item in enumerate(task.local.items):
            likelihoods = [
                direct_log_likelihood(model, tiny_tokenizer, item.contexts[0], delimiter + c)
                for c in item.continuations
            ]
            per_character = [l / len(c) for l, c in zip(likelihoods, item.continuations, strict=True)]  # noqa: E741
            scores = answers[task.name].scores
            assert scores["acc"][index] == (likelihoods.index(max(likelihoods)) == item.gold)
            assert scores["acc_norm"][index] == (per_character.index(max(per_character)) == item.gold)


def test_a_limit_draws_the_same_sample_from_the_whole_file(tasks_dir):
    some = load_task("pick", tasks_dir / "pick.jsonl", limit=4, seed=1)
    again = load_task("pick", tasks_dir / "pick.jsonl", limit=4, seed=1)
    contexts = [item.contexts[0] for item in some.items]
    assert some == again and len(contexts) == 4 and some.rows_in_file == 9
    assert contexts == sorted(contexts)
    assert any(load_task("pick", tasks_dir / "pick.jsonl", limit=4, seed=s).items != some.items for s in range(5))


def test_questions_get_an_answer_prompt_and_the_form_says_so(tmp_path):
    (tmp_path / "arc_easy.json").write_text(json.dumps([{"query": "Question: why?", "choices": ["a", "b"], "gold": 0}]))
    task = load_task("arc_easy", tmp_path / "arc_easy.json")
    assert (task.form, task.items[0].contexts) == ("answer", ("Question: why?\nAnswer:",))


def test_tasks_are_named_by_file_by_folder_or_by_lm_eval(tasks_dir):
    by_file, own, theirs = find_tasks([f"mine={tasks_dir / 'blimp.jsonl'}", "own:pick", "arc_easy"], tasks_dir)
    assert (by_file.name, by_file.local.form) == ("mine", "minimal_pair")
    assert own.name == "pick" and own.local is not None
    assert theirs.local is None


@pytest.mark.parametrize(
    "names, message", [(["own:nothing"], "no file"), (["=x"], "no name"), (["a=b.jsonl"], "exist")]
)
def test_tasks_without_a_file_are_refused(names, message):
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        find_tasks(names)


def test_one_name_for_two_tasks_is_refused(tasks_dir):
    with pytest.raises(ConfigError, match="more than once"):
        find_tasks(["pick", f"pick={tasks_dir / 'blimp.jsonl'}"], tasks_dir)


def test_unknown_lm_eval_task_names_the_nearest(tiny_model, tiny_tokenizer, offline_lm_eval):
    with pytest.raises(UnknownNameError, match="did you mean"):
        answer_tasks(tiny_model("llama"), tiny_tokenizer, find_tasks(["arc_easyy"]))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "gold=2 but 2 options"),
        ({"query": "q", "choices": "ab", "gold": 0}, "list of texts"),
        ({"something": "else"}, "fit no task layout"),
    ],
)
def test_bad_rows_are_refused(tmp_path, row, message):
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        load_task("t", tmp_path / "t.jsonl")


def test_a_later_row_without_its_columns_is_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"good": "a", "bad": "b"}\n{"good": "a"}\n')
    with pytest.raises(ConfigError, match="row 1 .* lacks the column 'bad'"):
        load_task("t", tmp_path / "t.jsonl")


def test_an_empty_file_and_a_bad_limit_are_refused(tmp_path, tasks_dir):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no rows"):
        load_task("empty", tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="limit=0"):
        load_task("pick", tasks_dir / "pick.jsonl", limit=0)


def test_solved_examples_are_refused_for_local_files(tiny_model, tiny_tokenizer, tasks_dir):
    with pytest.raises(ConfigError, match="num_fewshot=2"):
        answer_tasks(tiny_model("llama"), tiny_tokenizer, find_tasks(["pick"], tasks_dir), num_fewshot=2)


def test_without_the_extra_the_message_names_it(tiny_model, tiny_tokenizer, tasks_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ExtraMissingError, match=r"hf-qep\[eval\]"):
        answer_tasks(tiny_model("llama"), tiny_tokenizer, find_tasks(["pick"], tasks_dir))


def test_the_note_says_when_the_float_model_does_not_beat_the_most_frequent_answer(
    tiny_model, tiny_tokenizer, tmp_path, offline_lm_eval
):
    rows = [{"query": "q", "choices": ["x", "y"], "gold": 0 if i else 1} for i in range(6)]
    (tmp_path / "uneven.json").write_text(json.dumps(rows))
    tasks = find_tasks([], tmp_path)
    answers = answer_tasks(tiny_model("llama"), tiny_tokenizer, tasks)
    (result,) = compare_answers(tasks, answers, answers)
    assert "most frequent position gives 0.833" in result.note
