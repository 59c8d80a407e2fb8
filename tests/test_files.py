from __future__ import annotations

import re

import pytest

from hf_qep.errors import CheckpointError, ConfigError, OutputExistsError
from hf_qep.files import canonical_json, parse_size, safe_join, write_aside, write_text_aside


def test_the_folder_appears_only_when_it_is_complete(tmp_path):
    final = tmp_path / "out"
    with write_aside(final) as aside:
        (aside / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(error), write_aside(tmp_path / "out") as aside:
        (aside / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_kept_unless_overwriting(tmp_path):
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").touch()
    with pytest.raises(OutputExistsError, match="not empty"), write_aside(final):
        pass
    with write_aside(final, overwrite=True) as aside:
        (aside / "new").touch()
    assert [p.name for p in final.iterdir()] == ["new"]


def test_the_old_folder_survives_a_failed_overwrite(tmp_path):
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").touch()
    with pytest.raises(ZeroDivisionError), write_aside(final, overwrite=True):
        raise ZeroDivisionError
    assert [p.name for p in final.iterdir()] == ["old"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="outside"):
        safe_join(tmp_path, name)


def test_equal_values_give_equal_json():
    assert canonical_json({"b": 1, "a": "é"}) == canonical_json({"a": "é", "b": 1}) == '{"a":"é","b":1}'


def test_a_text_file_is_replaced_in_one_step(tmp_path):
    write_text_aside(tmp_path / "f", "1")
    write_text_aside(tmp_path / "f", "2")
    assert (tmp_path / "f").read_text() == "2" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [("14GB", 14 * 10**9), ("1.5 GiB", 3 << 29), ("900mb", 9 * 10**8), ("12B", 12), ("2kB", 2000), (77, 77)],
)
def test_sizes_are_read_as_they_are_written_on_the_hub(size, expected):
    assert parse_size(size) == expected


def test_no_bytes_are_a_size_where_that_is_asked_for():
    assert parse_size("0B", zero=True) == parse_size("0MB", zero=True) == 0


@pytest.mark.parametrize("size", ["14", "GB", "-1GB", "0GB", "1e3MB", 0, -5, True, 1.5, None])
def test_what_is_no_size_is_refused_with_its_value(size):
    with pytest.raises(ConfigError, match=re.escape(repr(size))):
        parse_size(size)
