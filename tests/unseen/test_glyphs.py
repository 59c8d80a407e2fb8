"""Omniglot's zips, made here in small: what is read, what is passed over, what is refused."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch
from PIL import Image
from unseen.glyphs import load_glyphs, load_runs, shared_drawings, zip_of

from hf_qep.errors import CheckpointError, ConfigError


def drawing(column: int, size: int = 105) -> bytes:
    """A PNG with a black bar in one column of five."""
    image = Image.new("1", (size, size), 1)
    image.paste(0, (column * 21, 0, column * 21 + 21, size))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def background(tmp_path):
    path = tmp_path / "small.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for n, name in enumerate(["Greek/character01", "Greek/character02", "Latin/character01"]):
            for drawer in (1, 2):
                archive.writestr(f"small/{name}/000{n}_{drawer:02}.png", drawing(n))
        archive.writestr("__MACOSX/small/Greek/character01/._0000_01.png", b"no image")
    return path


def test_characters_are_read_as_ink_on_ground(background):
    found = load_glyphs(background, 5)
    assert found.images.shape == (6, 1, 5, 5)
    assert found.characters == ("Greek/character01", "Greek/character02", "Latin/character01")
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.drawers.tolist() == [1, 2] * 3
    assert torch.equal(found.images[2, 0], torch.eye(5)[1].expand(5, 5))  # the second column is ink


def test_alphabets_can_be_taken_and_left_out(background):
    found = load_glyphs(background)
    assert found.alphabets == ("Greek", "Latin")
    latin = found.without(["Greek"])
    assert latin.characters == ("Latin/character01",) and latin.labels.tolist() == [0, 0]
    assert shared_drawings(found.digests, latin.digests) == 2
    with pytest.raises(ConfigError, match="Cyrillic"):
        found.of(["Cyrillic"])


def test_runs_name_the_class_of_every_query(tmp_path):
    path = tmp_path / "all_runs.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for n in (1, 2, 3):
            archive.writestr(f"run01/training/class0{n}.png", drawing(n))
            archive.writestr(f"run01/test/item0{n}.png", drawing(4 - n))
        pairs = [f"run01/test/item0{n}.png run01/training/class0{4 - n}.png" for n in (1, 2, 3)]
        archive.writestr("run01/class_labels.txt", "\n".join(pairs) + "\n")
    (run,) = load_runs(path, 5)
    assert run.name == "run01" and run.answers.tolist() == [2, 1, 0]
    assert torch.equal(run.queries, run.support[run.answers])


def test_what_is_no_omniglot_is_refused(tmp_path):
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no zip"):
        load_glyphs(broken)
    small = tmp_path / "other.zip"
    with zipfile.ZipFile(small, "w") as archive:
        archive.writestr("a/Greek/character01/0001_01.png", drawing(0, 60))
    with pytest.raises(CheckpointError, match="pixels"):
        load_glyphs(small)
    with pytest.raises(ConfigError, match="--fetch"):
        zip_of(tmp_path, "small1")


def test_the_shared_omniglot_is_as_its_page_says(shared_data):
    from unseen.glyphs import zip_of as place
    from unseen.material import check_apart, load_material
    from unseen.presets import PRESETS

    data = shared_data / "data"
    if not (data / "vision" / "omniglot").is_dir():
        pytest.skip("no Omniglot in the shared data")
    found = load_material(PRESETS["default"](), data)
    assert (len(found.seen), len(found.unseen), len(found.known), len(found.runs)) == (1000, 2120, 4840, 20)
    check_apart(found)
    more = load_glyphs(place(data, "small2"))
    assert shared_drawings(found.seen.digests, more.digests) == 1000
