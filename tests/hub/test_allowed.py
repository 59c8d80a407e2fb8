"""The list of names that may be published: what a checkpoint has is on it, everything else is not."""

from __future__ import annotations

import os

import pytest

from hf_qep.hub.allowed import LOADER, MADE_LATER, REQUIRED, kind_of, list_files


def test_everything_that_quantise_eval_and_card_write_is_on_the_list(finished):
    names, problems = list_files(finished)
    assert problems == []
    assert set(names) == {p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file()}
    assert set(REQUIRED) <= set(names)
    assert {"weights", "config", "tokenizer", "vocabulary", "manifest", "record", "card", "loader"} <= {
        kind_of(name) for name in names
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.safetensors", "weights"),
        ("model-00001-of-00012.safetensors", "weights"),
        ("model.safetensors.index.json", "index"),
        ("LICENSE", "licence"),
        ("USE_POLICY.md", "licence"),
        ("preprocessor_config.json", "config"),
        ("video_preprocessor_config.json", "config"),
        ("chat_template.jinja", "tokenizer"),
        ("additional_chat_templates/tool_use.jinja", "tokenizer"),
        ("sentencepiece.bpe.model", "vocabulary"),
        (LOADER, "loader"),
        ("plots/bits_per_layer.png", "plot"),
        (".eval_results/gsm8k.yaml", "result"),
        ("specialist.json", "specialist"),
        ("teacher_prompt.txt", "specialist"),
        ("support.safetensors", "specialist"),
        ("preparation.json", "specialist"),
    ],
)
def test_names_of_a_checkpoint_have_a_kind(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    "name",
    [
        "",
        "pytorch_model.bin",
        "model.pt",
        "weights.pkl",
        "model.onnx",
        "training_args.bin",
        "adapter_config.json",
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "../model.safetensors",
        "plots/../config.json",
        "plots/../../config.json",
        "plots//a.png",
        "sub/config.json",
        "sub/model.safetensors",
        "Config.json",
        "config.json\n",
        "config.json ",
        "config.json~",
        ".config.json",
        "README.md.bak",
        ".env",
        "id_rsa",
        "server.key",
        "setup.py",
        "modeling_other.py",
        "sub/modeling_qep.py",
        "run.sh",
        "start.bat",
        "model.safetensors.index.json.tmp",
        "model-1-of-2.safetensors",
        "model-٠٠٠٠١-of-٠٠٠٠٢.safetensors",
        "plots/bits\u202egnp.png",
        ".eval_results/../../x.yaml",
        ".git/config",
        ".cache/huggingface/token",
        "notes.txt",
    ],
)
def test_any_other_name_has_none(name):
    assert kind_of(name) is None


def test_what_is_made_later_is_a_part_of_the_kinds():
    names = ("README.md", "hf_qep_eval.json", "LICENSE", "p.png", ".eval_results/a.yml", "records.json", "m.gguf")
    assert {kind_of(name) for name in names} | {"manifest"} == MADE_LATER


@pytest.mark.parametrize("name", ["notes.txt", "deep/er/notes.txt", ".env", "evil.py", "config.json/config.json"])
def test_a_stray_file_is_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
    names, (problem,) = list_files(tmp_path)
    assert names == []
    assert repr(name) in problem
    assert ("code is never published" in problem) == name.endswith(".py")


@pytest.mark.parametrize("inside", [True, False])
def test_a_link_to_a_file_is_refused_wherever_it_leads(tmp_path, inside):
    folder = tmp_path / "model"
    folder.mkdir()
    target = (folder if inside else tmp_path) / "README.md"
    target.write_text("text")
    (folder / "LICENSE").symlink_to(target)
    _, (problem,) = list_files(folder)
    assert "'LICENSE' is a link" in problem


def test_a_linked_folder_is_refused_and_not_entered(tmp_path):
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    secret.mkdir()
    (secret / "a.png").write_bytes(b"")
    (folder / "plots").symlink_to(secret, target_is_directory=True)
    names, (problem,) = list_files(folder)
    assert names == []
    assert "'plots' is a link" in problem


def test_a_dangling_link_and_a_loop_are_refused(tmp_path):
    (tmp_path / "config.json").symlink_to("nowhere")
    (tmp_path / "README.md").symlink_to("README.md")
    names, problems = list_files(tmp_path)
    assert names == []
    assert len(problems) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_with_a_good_name_is_refused_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    names, (problem,) = list_files(tmp_path)
    assert names == []
    assert "no regular file" in problem


def test_links_into_the_folder_of_blobs_count_as_files_only_if_asked(tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    folder.mkdir(parents=True)
    for name, target in [("config.json", blobs / "abc"), ("README.md", tmp_path / "other")]:
        target.write_text("{}")
        (folder / name).symlink_to(target)
    assert list_files(folder)[0] == []
    names, (problem,) = list_files(folder, links_to=blobs)
    assert names == ["config.json"]
    assert "'README.md' is a link" in problem
