"""Limits, prompts, stopping and measuring: the Space without its page."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import lanes
import pytest
import texts
import torch
from models import Models, explain, free_bytes, human_bytes, shown_name, weight_digests
from prompts import RefusedError, encode, make_request
from settings import Settings, SettingsError, read_settings
from stops import Stops

from tests.space.conftest import LONG, generations
from tests.tiny_models import build_tokenizer


def request_for(models, prompt="The river", tokens=12, **changes):
    values = {"system": "", "temperature": 0, "seed": 0, "max_new_tokens": tokens} | changes
    return make_request(models.settings, prompt, *values.values())


def finished(models, request, stopped=lambda: False):
    return list(lanes.compare(models, request, stopped))[-1]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MAX_NEW_TOKENS": "many"}, "MAX_NEW_TOKENS='many'"),
        ({"QUEUE_SIZE": "0"}, "QUEUE_SIZE='0'"),
        ({"MAX_CHARS": "99999999"}, "1000000"),
        ({"ORIGINAL": "maybe"}, "auto, live, recorded, off"),
        ({"DTYPE": "int8"}, "DTYPE='int8'"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named_with_its_value(environment, said, tmp_path):
    with pytest.raises(SettingsError, match=said):
        read_settings(environment, tmp_path / "none.json")


def test_the_environment_wins_over_the_settings_file(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"MODEL_ID": "acme/stored", "BASE_ID": "acme/base"}))
    found = read_settings({"MODEL_ID": "acme/other", "MAX_NEW_TOKENS": " 64 "}, file)
    assert (found.model_id, found.base_id, found.max_new_tokens, found.default_new_tokens) == (
        "acme/other",
        "acme/base",
        64,
        64,
    )
    file.write_text('{"MODELID": "typo"}')
    with pytest.raises(SettingsError, match="MODEL_ID"):
        read_settings({}, file)


@pytest.mark.parametrize(
    "values",
    [
        ("", "", 0, 0, 8),
        (" \n", "", 0, 0, 8),
        (None, "", 0, 0, 8),
        (["x"], "", 0, 0, 8),
        ("x", {}, 0, 0, 8),
        ("x", "", -0.1, 0, 8),
        ("x", "", float("nan"), 0, 8),
        ("x", "", 0, 2**40, 8),
        ("x", "", 0, True, 8),
        ("x", "", 0, 0, 0),
        ("x", "", 0, 0, 10**9),
        ("x", "", 0, 0, "8"),
    ],
)
def test_a_request_outside_the_limits_is_refused(values):
    with pytest.raises(RefusedError):
        make_request(Settings(), *values)


def test_a_prompt_of_too_many_characters_or_tokens_keeps_its_end_and_says_so():
    request = make_request(Settings(max_chars=100), "a" * 200 + "end", "", 0, 0, 8)
    assert len(request.prompt) == 100
    assert request.prompt.endswith("end")
    assert request.warnings == (texts.TRIMMED_CHARS.format(limit=100),)
    tokenizer = build_tokenizer()
    encoded = encode(tokenizer, request, 10)
    text = tokenizer.decode(encoded.inputs["input_ids"][0])
    assert "user: aaaaaaaend</s>assistant: " in text, "the template stays whole"
    assert encoded.warning == texts.TRIMMED_TOKENS.format(kept=10, all=100)


def test_a_lone_surrogate_does_not_break_the_tokenizer():
    request = make_request(Settings(), "broken \ud83d here", "", 0, 0, 8)
    assert encode(build_tokenizer(), request, 100).tokens > 5


def test_a_system_prompt_goes_through_the_template_or_before_the_text():
    tokenizer = build_tokenizer()
    request = make_request(Settings(), "Hello", "Be kind", 0, 0, 8)

    def text():
        return tokenizer.decode(encode(tokenizer, request, 100).inputs["input_ids"][0])

    assert text() == "<s>system: Be kind</s>user: Hello</s>assistant: "
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    assert text() == "<s>user: Be kind\n\nHello</s>assistant: "
    tokenizer.chat_template = None
    assert text() == "<s>Be kind\n\nHello"


def test_the_examples_are_of_all_kinds_and_inside_the_limits():
    japanese = [e for e in texts.EXAMPLES if not e.prompt.isascii()]
    assert len(japanese) == 2
    assert len(texts.EXAMPLES) >= 7
    assert any("fail" in e.label for e in texts.EXAMPLES)
    assert all(make_request(Settings(), e.prompt, "", 0, 0, 8) for e in texts.EXAMPLES)


def test_both_lanes_write_what_generate_writes_and_are_measured(live_models):
    request = request_for(live_models, tokens=12)
    original, one_bit = finished(live_models, request)
    for lane, loaded in ((original, live_models.original), (one_bit, live_models.one_bit)):
        inputs = encode(loaded.tokenizer, request, 60).inputs
        out = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert lane.text == loaded.tokenizer.decode(new, skip_special_tokens=True)
        assert (lane.status, lane.tokens, list(lane.ids)) == ("done", 12, new.tolist())
        assert lane.first_token > 0
        assert lane.tokens_per_second > 0
        assert lane.peak_bytes >= lane.weight_bytes > 0
    assert one_bit.weight_bytes < original.weight_bytes


def test_text_arrives_in_pieces_and_the_lanes_take_turns(live_models):
    seen = [
        (original.status, one_bit.status, len(original.text))
        for original, one_bit in lanes.compare(live_models, request_for(live_models, tokens=300), lambda: False)
    ]
    assert seen[0][:2] == ("writing", "waiting")
    assert len({length for *_, length in seen}) > 2, "the text was not streamed"
    assert ("done", "writing") in {s[:2] for s in seen}
    assert seen[-1][:2] == ("done", "done")


def test_a_seed_fixes_a_sampled_text_and_another_seed_changes_it(live_models):
    drawn = [
        finished(live_models, request_for(live_models, tokens=24, temperature=1.0, seed=seed))[0].text
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_stop_ends_generate_itself(live_models):
    stops = Stops()
    ticket = stops.issue("visitor")
    seen = []
    for both in lanes.compare(live_models, request_for(live_models, tokens=LONG), lambda: stops.is_stopped(ticket)):
        seen.append(both)
        if both[0].tokens and generations():
            stops.stop_session("visitor")
    original, one_bit = seen[-1]
    assert original.status == one_bit.status == "stopped"
    assert 0 < original.tokens < LONG
    assert one_bit.text == ""
    assert not generations()


def test_leaving_the_stream_ends_generate_as_well(live_models, forwards):
    stream = lanes.compare(live_models, request_for(live_models, tokens=LONG), lambda: False)
    while not next(stream)[0].tokens:
        pass
    assert generations()
    stream.close()
    assert not generations()
    assert len(forwards) < LONG


def test_a_flag_set_here_is_seen_in_a_forked_worker():
    import multiprocessing

    stops = Stops()
    ticket = stops.issue("visitor")
    context = multiprocessing.get_context("fork")
    ready, answers = context.Event(), context.SimpleQueue()

    def work():
        answers.put(stops.is_stopped(ticket))
        ready.wait(30)
        answers.put(stops.is_stopped(ticket))

    worker = context.Process(target=work)
    worker.start()
    assert answers.get() is False
    stops.stop(ticket)
    ready.set()
    assert answers.get() is True
    worker.join()


def test_a_new_run_of_a_visitor_stops_the_old_one_and_nobody_elses():
    stops = Stops()
    first, other, second = stops.issue("a"), stops.issue("b"), stops.issue("a")
    assert (stops.is_stopped(first), stops.is_stopped(other), stops.is_stopped(second)) == (True, False, False)
    stops.finish("a", first)
    assert stops.stop_session("a"), "an old run that ends must not forget the new one"
    stops.finish("a", second)
    assert not stops.stop_session("a")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_is_told_in_its_lane_and_the_other_lane_runs(live_models, monkeypatch, error):
    def fail(**kwargs):
        raise error

    monkeypatch.setattr(live_models.original.model, "generate", fail)
    original, one_bit = finished(live_models, request_for(live_models))
    assert (original.status, original.notes) == ("error", (texts.OUT_OF_MEMORY,))
    assert one_bit.status == "done"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_id": ""}, "MODEL_ID"),
        ({"model_id": "acme/not-there"}, "cannot be reached"),
        ({"model_id": "not a name"}, "neither a folder nor a Hub id"),
    ],
)
def test_a_model_that_cannot_be_had_is_a_sentence_on_the_page(settings_for, changes, said):
    models = Models(settings_for(**changes))
    assert models.one_bit is None
    assert said in models.problem
    assert lanes.at_rest(models)[1].status == "error"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gated", "is gated"),
        ("private", "it is private"),
        ("missing", "does not exist"),
        ("revision", "no such revision"),
    ],
)
def test_what_the_hub_refuses_is_told_with_what_helps(loopback_hub, settings_for, monkeypatch, kind, said):
    if kind != "missing":
        loopback_hub.add_repo(
            "acme/model",
            files={"config.json": b"{}"},
            private=kind == "private",
            gated="auto" if kind == "gated" else False,
        )
    monkeypatch.setenv("HF_TOKEN", loopback_hub.other_token)
    revision = "no-such" if kind == "revision" else ""
    models = Models(settings_for(model_id="acme/model", model_revision=revision))
    assert said in models.problem
    assert loopback_hub.other_token not in models.problem


def test_a_gated_original_leaves_the_1_bit_lane_running(loopback_hub, settings_for, monkeypatch):
    loopback_hub.add_repo("acme/base", files={"config.json": b"{}", "model.safetensors": b"0" * 64}, gated="manual")
    monkeypatch.setenv("HF_TOKEN", loopback_hub.other_token)
    models = Models(settings_for(base_id="acme/base", original="live"))
    assert models.one_bit is not None
    assert models.mode == "recorded"
    assert "HF_TOKEN" in models.original_note


def test_a_float_model_is_refused_as_one_bit_model(settings_for, pair):
    assert "hf-qep quantize" in Models(settings_for(model_id=str(pair[0]))).problem


def test_an_index_that_leads_out_of_the_folder_is_not_followed(settings_for, pair, tmp_path):
    import shutil

    folder = tmp_path / "evil"
    shutil.copytree(pair[1], folder)
    (folder / "model.safetensors").rename(tmp_path / "foreign.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "../foreign.safetensors"}})
    )
    models = Models(settings_for(model_id=str(folder)))
    assert models.one_bit is None
    assert "foreign" in models.problem or "index" in models.problem


@pytest.mark.parametrize("how", ["recorded", "does not fit", "missing"])
def test_without_a_live_original_recorded_outputs_stand_in_and_say_so(settings_for, monkeypatch, how):
    if how == "does not fit":
        monkeypatch.setattr("models.free_bytes", lambda device: 1000)
    changes = {"recorded": {"original": "recorded"}, "missing": {"base_id": "acme/gone"}}.get(how, {})
    models = Models(settings_for(**changes))
    assert (models.mode, models.original) == ("recorded", None)
    assert ("fit" not in how) or "1 kB are free" in models.original_note
    item = models.samples.items[0]
    original, one_bit = finished(models, request_for(models, item.prompt))
    assert (original.status, original.text) == ("recorded", item.baseline)
    assert models.samples.created[:10] in original.notes[0]
    assert "Recorded, not run now" in original.notes[0]
    assert original.tokens_per_second is original.peak_bytes is original.first_token is None
    assert one_bit.status == "done"
    original, _ = finished(models, request_for(models, "never recorded"))
    assert (original.status, original.text, original.notes) == ("off", "", (texts.NO_RECORDING,))
    original, _ = finished(models, request_for(models, item.prompt, temperature=0.5))
    assert texts.RECORDED_GREEDY in original.notes


def test_without_recordings_the_lane_is_off_and_says_why(settings_for, pair, tmp_path):
    import shutil

    folder = tmp_path / "bare"
    shutil.copytree(pair[1], folder)
    (folder / "hf_qep_samples.json").unlink()
    models = Models(settings_for(model_id=str(folder), original="recorded"))
    assert (models.mode, models.original_note) == ("off", texts.NOT_RECORDED_AT_ALL)
    models = Models(replace(settings_for(model_id=str(folder)), original="off"))
    assert lanes.at_rest(models)[0].notes == (texts.TURNED_OFF,)


@pytest.mark.parametrize("file", ["hf_qep_samples.json", "hf_qep_eval.json"])
def test_recordings_and_scores_of_other_weights_are_not_shown(settings_for, pair, tmp_path, file):
    import shutil

    folder = tmp_path / "mixed"
    shutil.copytree(pair[1], folder)
    values = json.loads((folder / file).read_text())
    values["subject"]["sha256"] = {"model.safetensors": "0" * 64}
    (folder / file).write_text(json.dumps(values))
    models = Models(settings_for(model_id=str(folder), original="recorded"))
    assert models.one_bit is not None
    if file == "hf_qep_samples.json":
        assert (models.mode, models.samples) == ("off", None)
        assert "of other weights" in lanes.at_rest(models)[0].notes[0]
        assert models.record is not None
    else:
        assert (models.mode, models.record) == ("recorded", None)
        assert "of other weights" in models.scores_note


def test_the_cache_of_the_hub_tells_digests_without_reading_the_weights(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for name in ("a" * 64, "b" * 40):
        (tmp_path / "blobs" / name).write_bytes(b"weights")
    (tmp_path / "snapshot" / "model-1.safetensors").symlink_to(tmp_path / "blobs" / ("a" * 64))
    (tmp_path / "snapshot" / "model-2.safetensors").symlink_to(tmp_path / "blobs" / ("b" * 40))
    known = hashlib.sha256(b"weights").hexdigest()
    assert weight_digests(tmp_path / "snapshot") == {"model-1.safetensors": "a" * 64, "model-2.safetensors": known}


def test_memory_is_read_from_the_machine_and_numbers_are_readable():
    assert free_bytes(torch.device("cpu")) > 0
    assert [human_bytes(n) for n in (0, 999, 1000, 5_511_216, 207_100_000_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "5.51 MB",
        "207 GB",
    ]
    assert shown_name("acme/model") == "acme/model"


def test_an_explanation_holds_no_token():
    token = "hf_" + "a1B2" * 9
    assert token not in explain(RuntimeError(f"401 for {token} at x"), "acme/model")
