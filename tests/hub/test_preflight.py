"""Everything about a folder that must be right before it leaves this machine; each check meets what it is there for."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from hf_qep.engine.headers import INDEX_FILE, MANIFEST, SINGLE_FILE
from hf_qep.files import sha256
from hf_qep.hub import allowed
from hf_qep.hub.allowed import LOADER, kind_of
from hf_qep.hub.preflight import RECORD, SAMPLES, check_disk, check_folder, git_oid
from tests.hub.checkpoints import edit_json, make_shards, reseal

TOKEN = "hf_" + "aB3" * 12
PLACE = "/" + "home/alice/checkpoints"


def one_problem(folder, *, unsafe: bool) -> str:
    """The only sentence about `folder`, which must be unsafe or not."""
    report = check_folder(folder)
    (problem,) = report.problems
    assert report.unsafe == ([problem] if unsafe else [])
    return problem


def test_a_finished_checkpoint_has_no_problem_and_its_digests_are_those_of_its_files(finished):
    report = check_folder(finished)
    assert report.problems == report.unsafe == report.warnings == []
    assert {f.path: (f.size, f.sha256) for f in report.files} == {
        p.name: (p.stat().st_size, sha256(p)) for p in finished.iterdir()
    }
    assert report.weight_bytes == (finished / SINGLE_FILE).stat().st_size
    assert report.card == (finished / "README.md").read_text()


def test_shards_with_an_index_have_no_problem(checkpoint):
    report = check_folder(make_shards(checkpoint))
    assert report.problems == []
    assert sum(file.is_weights for file in report.files) == 2


def test_nothing_but_a_folder_is_accepted(finished, tmp_path):
    assert "is not a folder" in one_problem(finished / "config.json", unsafe=False)
    assert "is not a folder" in one_problem(tmp_path / "nowhere", unsafe=False)
    (tmp_path / "link").symlink_to(finished, target_is_directory=True)
    assert "'link' is a link" in one_problem(tmp_path / "link", unsafe=True)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("README.md", "hf-qep card"),
        (MANIFEST, "hf-qep quantize"),
        (RECORD, "hf-qep eval"),
        (SINGLE_FILE, "give the folder"),
    ],
)
def test_a_missing_file_is_named_with_what_makes_it(checkpoint, name, remedy):
    (checkpoint / name).unlink()
    report = check_folder(checkpoint)
    assert any(name in problem and remedy in problem for problem in report.problems)


def test_all_problems_are_named_at_once(checkpoint):
    (checkpoint / RECORD).unlink()
    (checkpoint / "README.md").write_text(f"no metadata, but {PLACE}\n")
    edit_json(checkpoint / "tokenizer_config.json", lambda c: c.update(extra=1))
    problems = " ".join(check_folder(checkpoint).problems)
    for part in ("absolute path", RECORD, "'tokenizer_config.json' has", "the card:"):
        assert part in problems


def test_nothing_is_opened_before_the_list_of_names_is_clean(checkpoint):
    (checkpoint / "notes.txt").write_text("x")
    (checkpoint / "config.json").write_text("{" * 1000)
    assert "'notes.txt'" in one_problem(checkpoint, unsafe=True)
    assert check_folder(checkpoint).files == []


# --- the files against the manifest


def flip(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", [SINGLE_FILE, "config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_that_was_changed_after_it_was_made_is_named(checkpoint, name):
    if name == SINGLE_FILE:
        flip(checkpoint / name)
    else:
        (checkpoint / name).write_text((checkpoint / name).read_text() + " ")
    report = check_folder(checkpoint)
    assert any(f"'{name}' has" in p and "changed after it was made" in p for p in report.problems)


def test_a_file_that_the_manifest_does_not_list_is_named(checkpoint):
    (checkpoint / "vocab.json").write_text("{}")
    assert "'vocab.json' is not listed" in one_problem(checkpoint, unsafe=False)


def test_a_file_that_the_manifest_lists_must_be_there(checkpoint):
    (checkpoint / "tokenizer_config.json").unlink()
    assert "'tokenizer_config.json' is missing" in one_problem(checkpoint, unsafe=False)


@pytest.mark.parametrize("files", [None, [], {"config.json": 1}])
def test_a_manifest_without_a_list_of_files_is_refused(checkpoint, files):
    edit_json(checkpoint / MANIFEST, lambda manifest: manifest.update(files=files))
    assert "lists no files" in one_problem(checkpoint, unsafe=False)


@pytest.mark.parametrize("value", ["[1]", "{", "", '{"files": 1, "files": 2}', "[" * 900 + "]" * 900])
def test_a_manifest_that_is_no_json_object_is_refused(checkpoint, value):
    (checkpoint / MANIFEST).write_text(value)
    assert MANIFEST in one_problem(checkpoint, unsafe=False)


# --- weights and index


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../other.safetensors", "a/b.safetensors", "model.bin", "..", 7, None, "x\0.safetensors"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(checkpoint, name):
    make_shards(checkpoint)
    edit_json(checkpoint / INDEX_FILE, lambda i: i["weight_map"].update({"model.norm.weight": name}))
    problems = check_folder(reseal(checkpoint)).problems
    assert any("only plain file names inside the folder" in problem for problem in problems)


def test_a_shard_of_the_index_that_is_missing_is_refused(checkpoint):
    make_shards(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    assert any("'model-00002-of-00002.safetensors' is missing" in p for p in check_folder(reseal(checkpoint)).problems)


def test_a_shard_that_the_index_does_not_use_is_refused(checkpoint):
    make_shards(checkpoint)
    shutil.copy(checkpoint / "model-00002-of-00002.safetensors", checkpoint / "model-00003-of-00003.safetensors")
    assert "does not use 'model-00003-of-00003" in one_problem(reseal(checkpoint), unsafe=False)


def test_a_tensor_that_the_index_hides_is_refused(checkpoint):
    make_shards(checkpoint)
    edit_json(checkpoint / INDEX_FILE, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert "holds 'model.norm.weight', which" in one_problem(reseal(checkpoint), unsafe=False)


def test_two_ways_to_load_are_one_too_many(checkpoint):
    whole = (checkpoint / SINGLE_FILE).read_bytes()
    make_shards(checkpoint)
    (checkpoint / SINGLE_FILE).write_bytes(whole)
    assert f"both {SINGLE_FILE!r} and {INDEX_FILE!r}" in one_problem(reseal(checkpoint), unsafe=False)


def test_a_shard_without_an_index_belongs_to_nothing(checkpoint):
    shutil.copy(checkpoint / SINGLE_FILE, checkpoint / "model-00002-of-00002.safetensors")
    assert "belong to nothing" in one_problem(reseal(checkpoint), unsafe=False)


def test_weights_that_are_no_safetensors_are_refused(checkpoint):
    (checkpoint / SINGLE_FILE).write_bytes(b"\x80\x04\x95" + b"pickle" * 40)
    assert "claims a header" in one_problem(reseal(checkpoint), unsafe=False)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "optimizer.pth", "x.pkl", "x.ckpt", "x.h5", "x.npz"])
def test_a_pickle_is_refused_by_its_name_and_never_opened(checkpoint, tmp_path, name):
    trap = b"cos\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR."
    (checkpoint / name).write_bytes(trap)
    assert repr(name) in one_problem(checkpoint, unsafe=True)
    assert not (tmp_path / "opened").exists()


# --- depth


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", RECORD])
@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_a_file_nested_without_end_is_no_crash(checkpoint, name, depth):
    deep = '{"trust_remote_code": 1, "a": ' * depth + "1" + "}" * depth
    text = (checkpoint / name).read_text().rstrip()
    (checkpoint / name).write_text(text[:-1] + f', "deep": {deep}}}')
    assert check_folder(reseal_without_reading(checkpoint)).problems != []


def reseal_without_reading(folder):
    """`reseal` for a record that Python cannot read."""
    record = (folder / RECORD).read_bytes()
    (folder / RECORD).unlink()
    reseal(folder)
    (folder / RECORD).write_bytes(record)
    return folder


# --- secrets, in every kind of file


def put(folder, kind: str, text: str) -> str:
    """Hide `text` in a file of this kind, sealed again; returns its name."""
    json_of = {"config": "generation_config.json", "tokenizer": "tokenizer_config.json", "vocabulary": "tokenizer.json"}
    json_of |= {"manifest": MANIFEST, "record": RECORD, "index": INDEX_FILE}
    other = {"card": "README.md", "licence": "LICENSE", "plot": "bits.png", "result": ".eval_results/gsm8k.yaml"}
    other |= {"specialist": "teacher_prompt.txt", "gguf": "m.gguf"}
    name = (json_of | other | {"weights": SINGLE_FILE, "loader": LOADER})[kind]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if kind == "index":
        make_shards(folder)
    if kind == "weights":
        save_file(load_file(path), path, metadata={"format": "pt", "note": text})
    elif kind in json_of:
        if kind == "manifest":
            reseal(folder)
        edit_json(path, lambda value: value.update(a_note=text))
    else:
        with path.open("ab") as file:
            file.write(f"\n{text}\n".encode())
    if kind != "manifest":
        reseal(folder)
    return name


KINDS = sorted(allowed._ALLOWED)


@pytest.mark.parametrize("kind", KINDS)
def test_a_secret_in_any_kind_of_file_blocks_the_push(checkpoint, kind):
    name = put(checkpoint, kind, TOKEN)
    assert kind_of(name) == kind
    report = check_folder(checkpoint)
    assert any(f"{name!r} line" in p and "a Hugging Face token" in p for p in report.unsafe)
    assert not any(TOKEN in problem for problem in report.problems)


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_of_this_machine_in_any_kind_of_file_without_tokens_blocks_the_push(checkpoint, kind):
    name = put(checkpoint, kind, PLACE)
    report = check_folder(checkpoint)
    assert any(f"{name!r} line" in p and "an absolute path" in p for p in report.unsafe) == (
        kind not in allowed.HOLD_TOKENS
    )
    assert not any(PLACE in problem for problem in report.problems)


def test_the_token_that_is_used_for_the_push_is_looked_for(checkpoint):
    put(checkpoint, "record", "an unusual token")
    assert not check_folder(checkpoint).unsafe
    assert "the token you are logged in with" in check_folder(checkpoint, tokens=("an unusual token",)).unsafe[0]


# --- the record and the card


def test_a_record_of_other_weights_is_refused(checkpoint):
    other = {SINGLE_FILE: "0" * 64}
    edit_json(checkpoint / RECORD, lambda record: record["subject"].update(sha256=other))
    assert "measured on other weights" in one_problem(checkpoint, unsafe=False)


def test_samples_of_other_weights_are_refused(checkpoint):
    edit_json(checkpoint / SAMPLES, lambda samples: samples["subject"].update(sha256={SINGLE_FILE: "0" * 64}))
    assert "comes from other weights" in one_problem(checkpoint, unsafe=False)


def test_samples_that_are_none_are_refused_and_their_absence_is_fine(checkpoint):
    edit_json(checkpoint / SAMPLES, lambda samples: samples.update(do_sample=True))
    assert "samples is malformed" in one_problem(checkpoint, unsafe=False)
    (checkpoint / SAMPLES).unlink()
    assert check_folder(checkpoint).problems == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "x"}, "no evaluation record"),
        ({"kl": 0.1}, "malformed"),
        ({"schema_version": 99}, "schema version 99"),
    ],
)
def test_a_record_that_is_none_is_refused(checkpoint, change, message):
    edit_json(checkpoint / RECORD, lambda record: record.update(change))
    assert message in one_problem(checkpoint, unsafe=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no metadata"), ("---\nlicense: [\n---\n# x\n", "YAML"), ("---\nlicense: mit\n---\n# x\n", "library_name")],
)
def test_problems_of_the_card_are_problems_of_the_folder(checkpoint, text, message):
    (checkpoint / "README.md").write_text(text)
    problems = check_folder(checkpoint).problems
    assert any(problem.startswith("the card: ") and message in problem for problem in problems)


def test_a_card_that_names_places_outside_the_hub_as_its_original_is_refused(checkpoint):
    card = checkpoint / "README.md"
    for name in ("../../etc", "a/../b", "/etc/x"):
        text = card.read_text()
        card.write_text(text.replace("base_model: acme/tiny-llama", f"base_model: {json.dumps(name)}"))
        assert any("`base_model` names" in problem for problem in check_folder(checkpoint).problems)
        card.write_text(text)


# --- the rest


def test_disk_space_is_compared_with_what_is_free(tmp_path):
    assert check_disk(tmp_path / "not" / "there", 1) is None
    assert "MB are free" in check_disk(tmp_path, 2**62)


@pytest.mark.parametrize(
    ("data", "oid"),
    [(b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"), (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a")],
)
def test_names_of_small_files_are_those_of_git(data, oid):
    assert git_oid(data) == oid
