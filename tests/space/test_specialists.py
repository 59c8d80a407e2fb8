"""Specialists beside their teachers: loaded or explained, asked, and shown in the page."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from settings import Settings
from specialist_files import load_specialists
from specialists import Deals, Glyphs, RefusedItemError, fitted

from hf_qep.files import listed_models
from hf_qep.students.saving import load_student
from tests.space.conftest import HOSTILE
from tests.space.specialist_folders import PROMPT, ROWS, SIDE, deals_folder, glyphs_folder
from tests.space.test_views import Tags
from tests.students.teachers import teacher
from tests.tiny_models import build_tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Both specialists with their teachers; do not change it."""
    folder = tmp_path_factory.mktemp("specialists")
    deals_folder(folder)
    glyphs_folder(folder)
    return folder


@pytest.fixture
def own(work, tmp_path) -> Path:
    """A copy that may be spoiled."""
    shutil.copytree(work, tmp_path / "own")
    return tmp_path / "own"


def spoil_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def offered(*folders: Path):
    return load_specialists(Settings(specialists=", ".join(map(str, folders))))


@pytest.fixture(scope="module")
def both(work):
    found = offered(work / "deals", work / "glyphs")
    assert [one.problem for one in found] == ["", ""] and [one.specialist.note for one in found] == ["", ""]
    return found


@pytest.fixture(scope="module")
def deals(both) -> Deals:
    return both[0].specialist


@pytest.fixture(scope="module")
def glyphs(both) -> Glyphs:
    return both[1].specialist


def test_the_list_of_the_settings_has_revisions_and_folders(tmp_path):
    (tmp_path / "a@b").mkdir()
    assert listed_models(f" acme/deals@0123abc,acme/glyphs, {tmp_path / 'a@b'},") == [
        ("acme/deals", "0123abc"),
        ("acme/glyphs", None),
        (str(tmp_path / "a@b"), None),
    ]
    assert listed_models("") == []


# --- deals


def expected(model, tokenizer, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    no, yes = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("no", "yes"))
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1, [no, yes]].softmax(-1)[1].item()


def test_a_deal_is_judged_by_the_student_alone_and_the_teacher_behind_its_prompt(deals, work):
    row = {"size": 30, "kind": "old", "note": "was late"}
    text = "size p25 ; kind old ; note was late ->"
    assert deals.text(row) == text
    mine, theirs = (dict(opinion.chances)["yes"] for opinion in reversed(deals.ask(row)))
    student = load_student(work / "deals")
    assert mine == pytest.approx(expected(student, deals.parties[1].processor, text), abs=1e-4)
    ids = build_tokenizer()(PROMPT)["input_ids"] + build_tokenizer()(text)["input_ids"]
    with torch.no_grad():
        logits = teacher("llama").eval()(input_ids=torch.tensor([ids])).logits[0, -1]
    no, yes = (build_tokenizer()(word, add_special_tokens=False)["input_ids"][0] for word in ("no", "yes"))
    assert theirs == pytest.approx(logits[[no, yes]].softmax(-1)[1].item(), abs=1e-4)
    assert theirs != pytest.approx(expected(teacher("llama"), build_tokenizer(), text), abs=1e-4), "without its prompt"
    assert [opinion.party.who for opinion in deals.ask(row)] == ["teacher", "student"]
    assert all(opinion.seconds > 0 and opinion.chances[0][1] >= opinion.chances[1][1] for opinion in deals.ask(row))


def test_the_form_holds_an_example_and_gives_it_back(deals):
    from specialist_tab import example_of, judge_of

    for number, row in enumerate(ROWS):
        values = example_of(deals)(number)
        assert deals.text(dict(zip(("size", "kind", "note"), values, strict=True))) == deals.text(row)
        page = Tags(judge_of(deals)(*values))
        assert f"What happened: {'yes' if row['won'] else 'no'}." in page.text
        assert deals.text(row) in page.text
        assert {"table", "caption", "th"} <= set(page.names)
    chances = re.findall(r"(\d+\.\d)%", page.text)
    yes = [dict(opinion.chances)["yes"] for opinion in deals.ask(ROWS[-1])]
    assert chances == [f"{100 * chance:.1f}" for chance in yes]


def test_a_deal_that_was_changed_has_no_outcome_and_may_hold_anything(deals):
    from specialist_tab import judge_of

    for hostile in HOSTILE:
        html = judge_of(deals)(None, hostile, hostile)
        found = Tags(html)
        assert "What happened" not in found.text and "size missing ; kind other" in found.text
        assert not {"img", "script", "h1"} & set(found.names)


def test_a_deal_that_is_too_long_is_refused_with_what_helps(deals):
    from specialist_tab import judge_of

    with pytest.raises(RefusedItemError, match="Shorten"):
        deals.ask(ROWS[0] | {"note": "long " * 40})
    html = judge_of(deals)(1, "new", "long " * 40)
    assert "class='problem'" in html and "Traceback" not in html


def test_a_teacher_that_is_not_here_leaves_the_student(own):
    shutil.rmtree(own / "teacher")
    (found,) = offered(own / "deals")
    assert [party.who for party in found.specialist.parties] == ["student"]
    assert "alone" in found.specialist.note and "'teacher' beside" in found.specialist.note
    assert len(found.specialist.ask(ROWS[0])) == 1


def test_a_teacher_that_does_not_fit_leaves_the_student(own, monkeypatch):
    monkeypatch.setattr("specialist_files.free_bytes", lambda device: 1000)
    (found,) = offered(own / "deals")
    assert "1 kB are free" in found.specialist.note.replace("1.00", "1")


@pytest.mark.parametrize("name", ["/etc", "../teacher", "..", "", None, 7, "a/b/c"])
def test_no_teacher_is_read_from_elsewhere(own, name):
    spoil_json(own / "deals/specialist.json", teacher=name)
    (found,) = offered(own / "deals")
    assert len(found.specialist.parties) == 1 and found.specialist.note


@pytest.mark.parametrize("prompt", ["../teacher/config.json", "gone.txt", "/etc/hostname"])
def test_no_prompt_is_read_from_elsewhere(own, prompt):
    spoil_json(own / "deals/specialist.json", teacher_prompt=prompt)
    (found,) = offered(own / "deals")
    assert prompt in found.specialist.note.replace("\\", "")


def test_a_teacher_without_a_prompt_is_asked_as_it_is(own):
    spoil_json(own / "deals/specialist.json", teacher_prompt=None)
    (found,) = offered(own / "deals")
    opinion = found.specialist.ask(ROWS[0])[0]
    text = found.specialist.text(ROWS[0])
    assert dict(opinion.chances)["yes"] == pytest.approx(expected(teacher("llama"), build_tokenizer(), text), abs=1e-4)


# --- glyphs


def test_a_glyph_finds_itself(glyphs):
    for number, image in enumerate(glyphs.images):
        large = image.repeat_interleave(7, 0).repeat_interleave(7, 1)
        for opinion in glyphs.ask(large):
            assert opinion.chances[0][0] == number and opinion.chances[0][1] == pytest.approx(1, abs=1e-4)
            cosines = [cosine for _, cosine in opinion.chances]
            assert len(cosines) == 3 and cosines == sorted(cosines, reverse=True)


def test_where_a_glyph_is_drawn_says_nothing_to_models_that_know_only_the_middle(glyphs):
    drawing = torch.zeros(SIDE, SIDE)
    drawing[1:5, 1:4] = 1
    drawing[2, 4] = 1
    moved = drawing.roll((4, 5), (0, 1))
    told = replace(glyphs, centres=True)
    here, there = ([o.chances for o in told.ask(one)] for one in (drawing, moved))
    for one, other in zip(here, there, strict=True):
        assert [n for n, _ in one] == [n for n, _ in other]
        assert [c for _, c in one] == pytest.approx([c for _, c in other], abs=1e-3)
    assert [o.chances for o in glyphs.ask(drawing)] != [o.chances for o in glyphs.ask(moved)]


def test_the_board_gives_ink_and_the_page_shows_glyphs(glyphs):
    from specialist_tab import drawing_of, find_of, ink_of

    board = drawing_of(glyphs)(3)
    assert torch.equal(fitted(ink_of(board), SIDE), glyphs.queries[3])
    page = Tags(find_of(glyphs)(board))
    assert page.names.count("img") == 6 and "<i>d</i>: 1.00" in page.text
    assert "Glyph <i>d</i>" in [value for name, value in page.attributes if name == "alt"]
    assert "i" not in page.names


@pytest.mark.parametrize("board", [None, {"composite": None}, "white"])
def test_an_empty_board_is_a_sentence(glyphs, board):
    import numpy as np
    from specialist_tab import find_of

    board = {"composite": np.full((30, 30), 255, np.uint8)} if board == "white" else board
    assert "Nothing is drawn" in find_of(glyphs)(board)


def test_a_drawing_that_is_not_square_keeps_its_shape():
    wide = torch.ones(8, 16)
    square = fitted(wide, 16)
    assert square.shape == (16, 16) and square.sum() == 8 * 16 and square[4:12].sum() == 8 * 16


# --- what is wrong is said


SPOILED = {
    "no specialist": (lambda f: (f / "deals/specialist.json").unlink(), "'specialist.json' is missing"),
    "kind": (lambda f: spoil_json(f / "deals/specialist.json", kind="cats"), "the kind 'cats'"),
    "answers": (lambda f: spoil_json(f / "deals/specialist.json", answers=["yes"]), "two texts"),
    "same answers": (lambda f: spoil_json(f / "deals/specialist.json", answers=["yes", "yeah"]), "same token"),
    "no records": (lambda f: (f / "deals/records.json").unlink(), "'records.json' is missing"),
    "records": (lambda f: (f / "deals/records.json").write_text("{}"), "no text of records"),
    "no examples": (lambda f: (f / "deals/examples.json").write_text("[]"), "no example"),
    "examples": (lambda f: (f / "deals/examples.json").write_text('[{"row": 3}]'), "examples.json"),
    "other column": (lambda f: (f / "deals/examples.json").write_text('[{"row": {"x": 1}}]'), "no column 'size'"),
    "no weights": (lambda f: (f / "deals/model.safetensors").unlink(), "neither"),
    "no tokenizer": (lambda f: [p.unlink() for p in (f / "deals").glob("tokenizer*")], "no tokenizer"),
    "no support": (lambda f: (f / "glyphs/support.safetensors").unlink(), "'support.safetensors' is missing"),
    "names": (lambda f: spoil_json(f / "glyphs/specialist.json", names=["a"]), "5 names"),
    "size": (lambda f: spoil_json(f / "glyphs/specialist.json", image_size=28), "(n, 28, 28)"),
    "support elsewhere": (
        lambda f: spoil_json(f / "glyphs/specialist.json", support="../seer/model.safetensors"),
        "is missing",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_missing_or_wrong_is_a_sentence_in_the_page(own, live_models, case):
    spoil, said = SPOILED[case]
    spoil(own)
    found = offered(own / "deals", own / "glyphs")
    (bad,) = [one for one in found if one.specialist is None]
    assert said in bad.problem and str(own) not in bad.problem
    shown = " ".join(Tags(str(part["props"].get("value"))).text for part in components(found, live_models))
    assert f"Problem: {bad.name}: {bad.problem}" in shown


def test_a_specialist_that_is_nowhere_is_a_sentence():
    (found,) = load_specialists(Settings(specialists="acme/nowhere@abc"))
    assert found.specialist is None and "cannot be reached" in found.problem


def test_a_specialist_comes_from_the_hub_at_its_commit_and_runs_no_code(loopback_hub, work, tmp_path):
    files = {path.name: path.read_bytes() for path in (work / "deals").iterdir()}
    assert "modeling_student.py" in files
    files["modeling_student.py"] = b"raise SystemExit('code of a repository was run')"
    files["specialist.json"] = json.dumps(json.loads(files["specialist.json"]) | {"teacher": "acme/large"}).encode()
    loopback_hub.add_repo("acme/deals", files=files)
    large = {path.name: path.read_bytes() for path in (work / "teacher").iterdir()}
    loopback_hub.add_repo("acme/large", files=large)
    head = loopback_hub.repo("acme/deals").branches["main"]
    (found,) = load_specialists(Settings(specialists=f"acme/deals@{head}"))
    assert (found.problem, found.specialist.note) == ("", "")
    assert [(p.name, p.revision and len(p.revision)) for p in found.specialist.parties] == [
        ("acme/large", 40),
        ("acme/deals", 40),
    ]
    assert found.specialist.parties[1].revision == head
    (wrong,) = load_specialists(Settings(specialists="acme/deals@no-such"))
    assert "no such revision" in wrong.problem


# --- the page


def components(found, models):
    from page import build
    from stops import Stops

    return build(models, Stops(), lambda request, ticket: iter(()), found).get_config_file()["components"]


def test_without_specialists_the_tab_says_how_to_add_one(live_models):
    values = [str(part["props"].get("value")) for part in components((), live_models)]
    assert any("SPECIALISTS" in value and "specialist.json" in value for value in values)
    assert not [value for value in values if "class='problem'" in value]


def test_the_page_has_a_labelled_field_for_every_column_and_a_board(live_models, both):
    parts = components(both, live_models)
    by_id = {part["props"].get("elem_id"): part for part in parts if part["props"].get("elem_id")}
    kinds = [(by_id[f"specialist-0-{n}"]["type"], by_id[f"specialist-0-{n}"]["props"]["label"]) for n in range(3)]
    assert kinds == [("number", "size"), ("dropdown", "kind"), ("textbox", "note")]
    assert by_id["specialist-1-board"]["type"] in ("sketchpad", "imageeditor")
    assert by_id["specialist-0-0"]["props"]["info"] == "0: none"
    values = " ".join(str(part["props"].get("value")) for part in parts)
    assert "Is it &lt;b&gt;won&lt;/b&gt;?" in values and "licence" in values
