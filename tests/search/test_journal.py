from __future__ import annotations

import pytest

from hf_qep.errors import CheckpointError, ConfigError
from hf_qep.search.journal import Journal

FINGERPRINT = {"space": {"layers": [1, 2]}, "seed": 0}


def test_results_are_there_again_after_opening(tmp_path):
    path = tmp_path / "run" / "journal.jsonl"
    journal = Journal(path, FINGERPRINT)
    journal.add("a", value=1.5, text="größer")
    assert "a" in journal and journal.get("b") is None
    again = Journal(path, FINGERPRINT)
    assert again.get("a") == {"value": 1.5, "text": "größer"}


@pytest.mark.parametrize("cut", range(1, 22))
def test_a_line_that_a_kill_cut_off_is_dropped_and_the_next_is_whole(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, FINGERPRINT)
    journal.add("a", value=1)
    journal.add("b", value=2)
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, FINGERPRINT)
    assert again.get("a") == {"value": 1} and "b" not in again
    again.add("c", value=3)
    assert Journal(path, FINGERPRINT).get("c") == {"value": 3}


def test_a_header_that_was_cut_off_begins_anew(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"finger')
    Journal(path, FINGERPRINT).add("a", value=1)
    assert Journal(path, FINGERPRINT).get("a") == {"value": 1}


def test_two_that_began_together_read_each_other(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, FINGERPRINT).add("a", value=1)
    path.write_text(path.read_text() + path.read_text().replace('"a"', '"b"'))
    both = Journal(path, FINGERPRINT)
    assert both.get("a") == both.get("b") == {"value": 1}


def test_another_search_is_refused_with_the_part_that_differs(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, FINGERPRINT)
    with pytest.raises(ConfigError, match="`seed` is not the same"):
        Journal(path, FINGERPRINT | {"seed": 1})
    with pytest.raises(ConfigError, match="`limits`, `space` are not the same"):
        Journal(path, {"space": {}, "seed": 0, "limits": 3})


@pytest.mark.parametrize("content", ['{"fingerprint": {"seed": 0}}\nnonsense\n{"key": "a"}\n', '{"key": "a"}\n'])
def test_what_is_no_journal_is_refused(tmp_path, content):
    path = tmp_path / "journal.jsonl"
    path.write_text(content)
    with pytest.raises(CheckpointError):
        Journal(path, {"seed": 0})


def test_nan_is_not_written(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", FINGERPRINT)
    with pytest.raises(ValueError):
        journal.add("a", value=float("nan"))
    assert "a" not in journal
