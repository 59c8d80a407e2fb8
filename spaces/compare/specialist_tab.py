"""The tab where a specialist is tried beside its teacher: components, and what happens when something is clicked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
import numpy as np
import specialist_views
import texts
import torch
import views
from models import explain
from specialist_files import Offered
from specialists import Deals, Glyphs, RefusedItemError
from torch import Tensor

from hf_qep.distill.records import CATEGORY, NUMBER, RecordColumn, plain
from hf_qep.errors import QepError

CANVAS, BRUSH = 420, 7
"""Pixels of the field, and half of the width of a stroke: a thirtieth of the field, as of drawings with a pen."""
MOST_CHARS = 2000
"""Of a text field."""
HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}


def specialists_tab(offered: Sequence[Offered], queue: str) -> None:
    """All specialists, each in a tab of its own where there are several. queue: in which their questions wait."""
    gr.HTML(views.notice(texts.SPECIALISTS if offered else texts.NO_SPECIALISTS), elem_classes="specialists-intro")
    if len(offered) == 1:
        _specialist(offered[0], 0, queue)
        return
    if offered:
        with gr.Tabs():
            for number, one in enumerate(offered):
                with gr.Tab(one.name, elem_id=f"tab-specialist-{number}"):
                    _specialist(one, number, queue)


def _specialist(one: Offered, number: int, queue: str) -> None:
    found = one.specialist
    if found is None:
        gr.HTML(views.problem(f"{one.name}: {one.problem}"), elem_id=f"specialist-{number}-problem")
        return
    gr.HTML(specialist_views.about(found), elem_classes="specialist-about")
    (_deals if isinstance(found, Deals) else _glyphs)(found, f"specialist-{number}", queue)


def _deals(found: Deals, name: str, queue: str) -> None:
    if found.question:
        gr.HTML(f"{views.notice(found.question)}", elem_classes="specialist-question")
    first = found.examples[0][0]
    chooser = gr.Dropdown(
        [(f"Example {number + 1}", number) for number in range(len(found.examples))],
        value=0, label="Fill in an example", elem_id=f"{name}-example",
    )  # fmt: skip
    with gr.Row(elem_classes="specialist-fields"):
        fields = [_field(column, first[column.column], f"{name}-{n}") for n, column in enumerate(found.records.columns)]
    ask = gr.Button("Ask both", variant="primary", elem_id=f"{name}-ask")
    result = gr.HTML(views.notice("Ready."), elem_id=f"{name}-result", elem_classes="specialist-result")
    chooser.change(example_of(found), chooser, fields, queue=False, **HIDDEN)
    ask.click(judge_of(found), fields, result, concurrency_id=queue, concurrency_limit=1, **HIDDEN)


def _field(column: RecordColumn, value: Any, name: str) -> Any:
    """The component for one column: a number, a list that takes other words too, or a text."""
    words = [str(word) for _, word in column.special]
    common = {"label": column.name, "elem_id": name, "min_width": 170}
    value = shown_value(column, value)
    if column.kind == NUMBER:
        told = ", ".join(
            f"{known:g}: {word}" for known, word in zip((k for k, _ in column.special), words, strict=True)
        )
        return gr.Number(value, info=told or None, **common)
    if column.kind == CATEGORY:
        known = [*column.values, *(str(known) for known, _ in column.special)]
        return gr.Dropdown(known, value=value, allow_custom_value=True, **common)
    return gr.Textbox("" if value is None else str(value), lines=2, max_length=MOST_CHARS, **common)


def shown_value(column: RecordColumn, value: Any) -> Any:
    """A value of a row as the field of its column holds it; None for nothing."""
    if column.kind == NUMBER:
        return float(value) if isinstance(value, int | float) and value == value else None
    if column.kind == CATEGORY:
        return plain(value) or None
    return value


def example_of(found: Deals) -> Callable[[int], Any]:
    """The values of an example for all fields."""
    columns = found.records.columns

    def example(number: int) -> Any:
        row = found.examples[number][0]
        values = [shown_value(column, row[column.column]) for column in columns]
        return values if len(values) > 1 else values[0]

    return example


def judge_of(found: Deals) -> Callable[..., str]:
    """HTML of what both say of the row in the fields."""
    columns = found.records.columns

    def judge(*values: Any) -> str:
        row = {column.column: value for column, value in zip(columns, values, strict=True)}
        return _answered(
            lambda: specialist_views.deal(found, found.ask(row), found.text(row), found.outcome(row)),
        )

    return judge


def _glyphs(found: Glyphs, name: str, queue: str) -> None:
    with gr.Row():
        with gr.Column(min_width=320):
            board = gr.Sketchpad(
                label="Draw a glyph", type="numpy", image_mode="L", layers=False, transforms=(), buttons=[],
                canvas_size=(CANVAS, CANVAS), fixed_canvas=True, height=CANVAS + 120, elem_id=f"{name}-board",
                brush=gr.Brush(default_size=BRUSH, colors=["#000000"], default_color="#000000", color_mode="fixed"),
            )  # fmt: skip
            chooser = gr.Dropdown(
                [(f"Drawing {number + 1}", number) for number in range(len(found.queries))],
                value=None, label="Choose a drawing", info=texts.DRAW_HINT, elem_id=f"{name}-query",
            )  # fmt: skip
            ask = gr.Button("Ask both", variant="primary", elem_id=f"{name}-ask")
        with gr.Column(min_width=320):
            result = gr.HTML(views.notice("Ready."), elem_id=f"{name}-result", elem_classes="specialist-result")
    gr.HTML(specialist_views.support(found), elem_classes="specialist-support")
    chooser.change(drawing_of(found), chooser, board, queue=False, **HIDDEN)
    ask.click(find_of(found), board, result, concurrency_id=queue, concurrency_limit=1, **HIDDEN)


def drawing_of(found: Glyphs) -> Callable[[int | None], Any]:
    """A drawing to try, on the board."""

    def drawing(number: int | None) -> Any:
        if number is None:
            return gr.skip()
        grey = (255 * (1 - found.queries[number])).byte().numpy()
        factor = max(1, CANVAS // len(grey))
        large = np.kron(grey, np.ones((factor, factor), np.uint8))
        return {"background": large, "layers": [], "composite": large}

    return drawing


def find_of(found: Glyphs) -> Callable[[Any], str]:
    """HTML of the glyphs that both find nearest to what is on the board."""

    def find(board: Any) -> str:
        return _answered(lambda: specialist_views.glyph(found, found.ask(ink_of(board))))

    return find


def ink_of(board: Any) -> Tensor:
    """Ink of what is on the board, (height, width) float32 in [0, 1]; nothing drawn is one pixel without ink."""
    image = None if board is None else board.get("composite")
    if image is None:
        return torch.zeros(1, 1)
    return 1 - torch.from_numpy(np.asarray(image)).float() / 255


def _answered(answer: Callable[[], str]) -> str:
    """HTML of an answer, or of the sentence why there is none."""
    try:
        return answer()
    except RefusedItemError as error:
        return views.problem(str(error))
    except (QepError, RuntimeError, MemoryError) as error:
        return views.problem(explain(error, "the specialist"))
