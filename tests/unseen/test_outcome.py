"""Episodes, intervals, tables: what is said of the results."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unseen import fetch, photos, show
from unseen.episodes import episodes, interval, official
from unseen.glyphs import Run
from unseen.material import invented_material
from unseen.methods import OURS, with_best
from unseen.outcome import summary

from hf_qep.errors import CheckpointError, ConfigError


def flat(images):
    return images.flatten(1)


def test_a_query_that_is_a_support_drawing_is_named_rightly():
    support = torch.rand(5, 1, 4, 4)
    order = torch.randperm(5)
    run = Run("run01", support, support[order], order, ())
    assert official(flat, [run, run]).all() and official(flat, [run]).shape == (1, 5)


def test_episodes_ask_for_other_drawings_and_need_enough_characters():
    glyphs = invented_material(16, ways=6, drawers=2).seen
    by_label = {id(glyphs): glyphs.labels}

    def knows(images):
        return torch.nn.functional.one_hot(by_label[id(glyphs)], 6).float()

    assert episodes(knows, glyphs, 10, ways=5).all()
    blind = episodes(lambda images: torch.ones(len(images), 3), glyphs, 50, ways=5)
    assert 0.0 < blind.float().mean() < 0.5
    with pytest.raises(ConfigError, match="20 characters, not 6"):
        episodes(knows, glyphs, 1)


@settings(max_examples=10, deadline=None)
@given(st.floats(-0.5, 0.5), st.integers(0, 50))
def test_an_interval_moves_with_the_difference(shift, seed):
    make = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.rand(3, 40, generator=make) for _ in range(2))
    low, high = interval(ours, theirs, draws=400)
    assert low < (ours.mean() - theirs.mean()).item() < high
    moved = interval(ours + shift, theirs, draws=400)
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-6)


def test_the_same_trials_are_drawn_for_both_sides():
    hard = torch.rand(1, 200)
    assert interval(hard + 0.1, hard, draws=200) == pytest.approx((0.1, 0.1))
    with pytest.raises(ConfigError, match="40 trials"):
        interval(torch.rand(2, 40), torch.rand(2, 50))


def results_with(values):
    """A JSON value as the pipeline makes it: share of right answers by method."""
    methods = with_best("kd")
    units = {
        name: {str(s): {"official": _right(values.get(name, 0.3), s), "seconds": 1.0} for s in range(3)}
        for name in methods
    }
    cost = {"parameters": 2e5, "latency_ms": 2.0}
    return {
        "task": "omniglot",
        "measure": "official",
        "best": "kd",
        "references": {"nearest": 0.2},
        "teacher": {"official": _right(0.95, 0)},
        "shown": {name: method.shown for name, method in methods.items()},
        "shrunk": {"costs": dict.fromkeys(("teacher", "usual", "ours"), cost), "batch": 32},
        "units": units,
    }


def _right(share, seed):
    make = torch.Generator().manual_seed(seed)
    return (torch.rand(20, 20, generator=make) < share).float().tolist()


@pytest.mark.parametrize("ours, met", [(0.8, True), (0.68, False), (0.4, False)])
def test_the_bar_is_met_only_ten_points_above_the_best_baseline(ours, met):
    found = summary(results_with({"kd": 0.6, OURS: ours}))
    assert found["best"] == "kd" and found["met"] is met
    ahead = found["ahead"]["kd"]
    assert ahead["interval"][0] < ahead["points"] < ahead["interval"][1]
    assert ahead["relative"] == pytest.approx(100 * ahead["points"] / found["methods"]["kd"]["official"]["mean"])


def test_table_and_plot_show_every_method(tmp_path):
    results = results_with({"kd": 0.6, OURS: 0.4})
    found = summary(results)
    text = show.table(results, found)
    assert all(method.shown in text for method in with_best("kd").values()) and "**not met**" in text
    show.draw(results, found, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_text_goes_between_the_markers_of_a_page(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- omniglot -->\nold\n<!-- /omniglot -->\nb\n")
    show.insert(page, "omniglot", r"new \1" + "\n")
    assert page.read_text() == "a\n<!-- omniglot -->\nnew \\1\n<!-- /omniglot -->\nb\n"
    with pytest.raises(ConfigError, match="cifar"):
        show.insert(page, "cifar", "x")


def test_a_fetched_file_that_is_another_one_is_refused(tmp_path, monkeypatch):
    right = b"omniglot"
    known = fetch.Known(len(right), hashlib.sha256(right).hexdigest())
    monkeypatch.setattr(fetch, "SUMS", {"runs": known})
    monkeypatch.setattr(fetch, "_read", lambda address, size: b"another!")
    with pytest.raises(CheckpointError, match="8 bytes"):
        fetch.fetch_omniglot(tmp_path)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    monkeypatch.setattr(fetch, "_read", lambda address, size: right)
    fetch.fetch_omniglot(tmp_path)
    monkeypatch.setattr(fetch, "_read", None)  # what is there is not fetched again
    fetch.fetch_omniglot(tmp_path)


def test_photos_are_mirrored_and_moved_and_nothing_else():
    make = torch.Generator().manual_seed(0)
    image = torch.arange(64.0).view(1, 1, 8, 8).expand(50, 3, -1, -1)
    found = photos.moved(image, make)
    assert found.shape == image.shape and torch.equal(found[:, 0], found[:, 2])
    slopes = {round(step) for step in found[:, 0].diff(dim=2)[:, 3, 3].tolist()}
    assert slopes <= {1, -1} and len(slopes) == 2
