"""Secrets and places of a machine are found in every kind of file, and never repeated in what is said about them."""

from __future__ import annotations

import json
import struct

import pytest

from hf_qep.hub import secrets

TOKEN = "hf_" + "aB3" * 12  # put together here, because no file of the repository may hold one
HOME = "/" + "home"

SECRETS = {
    "a Hugging Face token": [TOKEN, "api_org_" + "x1" * 17, "hf_oauth_" + "eyJhbGciOiJI.eyJzdWIiOiIx.abc_-9"],
    "a key of a cloud provider": ["AKIA" + "ABCDEFGHIJKLMNOP", "AIza" + "a" * 35],
    "a GitHub token": ["ghp_" + "a1" * 18, "github_pat_" + "A1" * 15],
    "an API key": ["sk-" + "ab12" * 9, "sk-ant-" + "ab12" * 9, "xoxb-" + "1234567890"],
    "a private key": ["-----BEGIN " + "OPENSSH PRIVATE KEY-----", "-----BEGIN " + "PRIVATE KEY-----"],
    "a signed web token": ["eyJ" + "hbGciOiJI" * 2 + ".eyJ" + "zdWIiOiIx" * 2 + ".x"],
    "a header with a credential": [
        "Authorization: " + "Bearer " + "q" * 20,
        '"authorization": "' + "Basic " + "Q" * 20,
    ],
    "an address with a password": ["https://me:" + "secret@host.example/x", "redis://u:" + "pw1234@h"],
    "a password or key": [
        "api_key = " + "abcdefgh12345678",
        '"client_secret": "' + "abcdefgh12345678",
        "AWS_SECRET_ACCESS_KEY=" + "abcdefgh/12345678",
        "HF_TOKEN=" + "abcdefgh12345678",
        "password: " + "correct1horse2battery",
    ],
}


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, texts in SECRETS.items() for t in texts])
def test_each_kind_of_secret_is_found_with_its_line_and_not_shown(kind, text):
    found = secrets.scan_text(f"first line\nbefore {text} after\n", "config.json")
    assert f"'config.json' line 2 holds {kind}; remove it" in found
    assert not any(text in sentence for sentence in found)


@pytest.mark.parametrize(
    "text",
    [
        "hf_qep_eval.json and hf_qep_manifest.json",
        "set HF_TOKEN, or log in with: hf auth login",
        '"eos_token": "<|endoftext|>", "access_token": null',
        '"tokenizer_class": "PreTrainedTokenizerFast"',
        "the secret of the ferryman: 17 rivers",
        '"password": 123, "secret": 4567',
        "https://huggingface.co/acme/model/blob/main/README.md",
        "sha256 " + "0123456789abcdef" * 4,
        "arXiv 2504.09629, 10.1 nats, ratio 3/4, and/or, n/a",
        "see ../plots/bits.png, ./config.json and ~/models",
        "https://example.com/home/page and http://example.com/tmp/x",
        "paths such as / and /etc, or /usr/bin/env",
        "me@example.com wrote to you: hello@example.com",
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert secrets.scan_text(text, "README.md") == []


@pytest.mark.parametrize(
    "place",
    [
        f"{HOME}/alice/models/x",
        f'"{HOME}/alice"',
        f"={HOME}/alice",
        f"`{HOME}/alice`",
        "/" + "root/x",
        "/" + "Users/alice",
        "/" + "mnt/disk",
        "/tmp/build",
        "/data/checkpoints",
        "C:\\" + "Users\\alice",
        json.dumps("C:\\" + "Users\\alice"),
        f"{HOME}/alice".replace("/", "\\/"),
        "file:///x/y",
    ],
)
def test_places_of_a_machine_are_found_but_not_in_vocabularies(place):
    assert secrets.scan_text(place, "config.json") == [
        "'config.json' line 1 holds an absolute path of a machine; remove it"
    ]
    assert secrets.scan_text(place, "tokenizer.json", places=False) == []


def test_the_folders_of_this_process_are_found_wherever_they_lie(tmp_path, monkeypatch):
    odd = tmp_path / "odd" / "place"
    odd.mkdir(parents=True)
    monkeypatch.chdir(odd)
    monkeypatch.setattr(secrets, "_ROOTS", "nothing")
    assert secrets.scan_text(f"made in {odd}", "README.md") != []


def test_the_token_of_the_login_is_found_whatever_it_looks_like(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain words as a token")
    tokens = secrets.own_tokens("another one", None, True, "short")
    assert tokens == ("plain words as a token", "another one")
    path = tmp_path / "tokenizer.json"
    path.write_text('{"a": "another one"}')
    (found,) = secrets.scan(path, "tokenizer.json", tokens=tokens, places=False)
    assert "the token you are logged in with" in found
    assert "another one" not in found


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_the_encoding_of_a_text_hides_nothing(tmp_path, encoding):
    path = tmp_path / "README.md"
    path.write_bytes(f"é {TOKEN}".encode(encoding))
    assert len(secrets.scan(path, "README.md")) == 1


def test_bytes_that_are_no_text_around_it_hide_nothing(tmp_path):
    path = tmp_path / "bits.png"
    path.write_bytes(bytes(range(256)) + TOKEN.encode() + bytes(range(255, -1, -1)))
    assert any("a Hugging Face token" in s for s in secrets.scan(path, "bits.png"))


def test_headers_of_weight_files_are_read_and_their_data_is_not(tmp_path):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"__metadata__": {"note": TOKEN, "from": f"{HOME}/alice/x"}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert len(secrets.scan(path, path.name)) == 2
    path.write_bytes(struct.pack("<Q", 2) + b"{}" + TOKEN.encode())
    assert secrets.scan(path, path.name) == []


@pytest.mark.parametrize("raw", [b"", b"\0" * 3, struct.pack("<Q", 2**64 - 1) + b"{}"])
def test_a_damaged_weight_file_is_no_crash(tmp_path, raw):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    assert secrets.scan(path, path.name) == []


def test_a_long_word_takes_no_long_time():
    # A pattern that backtracks over both ends would need hours for this.
    assert secrets.scan_text("secret" * 40_000 + "_token" * 40_000, "merges.txt") == []


def test_messages_are_cleared_of_tokens_and_signed_addresses():
    said = secrets.redact(
        f"403 for https://cdn.example/x?X-Amz-Signature=abc&b=1 with {TOKEN} and my word; Authorization: Bearer "
        + "q" * 20,
        ["my word"],
    )
    for secret in (TOKEN, "my word", "Signature", "q" * 20):
        assert secret not in said
    assert said.startswith("403 for https://cdn.example/x?[...] with [token]")
