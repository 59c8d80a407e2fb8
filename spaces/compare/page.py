"""The page: components, their order, and what happens when something is clicked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import lanes
import texts
import views
from gradio.utils import get_space
from lanes import Lanes
from models import Models
from prompts import MAX_SEED, MAX_TEMPERATURE, RefusedError, Request, has_chat_template, make_request
from scores import scores
from specialist_files import Offered
from specialist_tab import specialists_tab
from stops import Stops

STYLE = Path(__file__).resolve().parent / "style.css"
ONE_AT_A_TIME = "generate"
"""Name of the queue: the page and the interface for programs share one place."""

ON_LOAD = """() => {
  const set = (id, attributes) => {
    const element = document.getElementById(id);
    for (const name in element ? attributes : {}) element.setAttribute(name, attributes[name]);
  };
  set("status", { role: "status", "aria-live": "polite" });
  set("delta", { role: "status", "aria-live": "polite" });
  for (const part of document.querySelectorAll(".specialist-result")) {
    part.setAttribute("role", "status");
    part.setAttribute("aria-live", "polite");
  }
  set("examples", { role: "group", "aria-label": "Examples" });
  const fold = document.querySelector("#settings > button");
  if (!fold) return;
  const tell = () => fold.setAttribute("aria-expanded", String(fold.classList.contains("open")));
  fold.querySelector(".icon")?.setAttribute("aria-hidden", "true");
  tell();
  new MutationObserver(tell).observe(fold, { attributeFilter: ["class"] });
}"""
"""What the components do not say by themselves: which parts a screen reader announces when they change (not the texts,
which would be read token by token), what the examples are, and whether the settings are open."""

SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK JP", "sans-serif"]
MONO_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Noto Sans Mono", "monospace"]

Run = Callable[[Request, int], Iterator[Lanes]]
"""Runs both lanes for a request; the number is the ticket that stops it."""


@dataclass(frozen=True)
class Desk:
    """What the handlers work with."""

    models: Models
    stops: Stops
    run: Run

    def views(self, both: Lanes) -> tuple[str, str, str]:
        """HTML of both lanes and the delta line."""
        return views.lane(both[0], self.models), views.lane(both[1], self.models), views.delta(both)


def theme() -> gr.themes.Base:
    """System fonts, so that no font is fetched; quiet colours with enough contrast."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        font=SYSTEM_FONTS,
        font_mono=MONO_FONTS,
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def build(models: Models, stops: Stops, run: Run, specialists: Sequence[Offered] = ()) -> gr.Blocks:
    """The whole application. specialists: of the settings, loaded."""
    desk = Desk(models, stops, run)
    with gr.Blocks(title=texts.TITLE, analytics_enabled=False) as page:
        gr.HTML(views.header(models), elem_id="header")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                _compare_tab(desk)
            with gr.Tab("Scores", id="scores", elem_id="tab-scores"):
                gr.HTML(scores(models.record, models.scores_note or models.problem), elem_id="scores")
            with gr.Tab("Specialists", id="specialists", elem_id="tab-specialists"):
                specialists_tab(specialists, ONE_AT_A_TIME)
        gr.HTML(views.footer(models), elem_id="footer")
        if get_space():
            gr.DuplicateButton(texts.DUPLICATE, variant="secondary", elem_id="duplicate")
        page.unload(_leave_of(desk))
    page.queue(max_size=models.settings.queue_size, default_concurrency_limit=1)
    return page


def _compare_tab(desk: Desk) -> None:
    inputs = _inputs(desk.models)
    with gr.Row(elem_id="buttons"):
        generate = gr.Button("Generate", variant="primary", elem_id="generate")
        stop = gr.Button("Stop", elem_id="stop")
    status = gr.HTML(views.notice("Ready."), elem_id="status")
    rest = desk.views(lanes.at_rest(desk.models))
    with gr.Row(elem_id="lanes", equal_height=True):
        original = gr.HTML(rest[0], elem_id="lane-original")
        one_bit = gr.HTML(rest[1], elem_id="lane-one-bit")
    delta = gr.HTML(rest[2], elem_id="delta")
    _connect(desk, inputs, generate, stop, status, [original, one_bit, delta])


def _inputs(models: Models) -> list[Any]:
    """Prompt, system prompt, temperature, seed, new tokens: in the order of `make_request`."""
    settings = models.settings
    prompt = gr.Textbox(
        label="Prompt",
        info=texts.PROMPT_HINT + (f" {texts.NO_CHAT_TEMPLATE}" if _continues_text(models) else ""),
        placeholder="Type something, or choose an example below.",
        lines=3,
        max_lines=12,
        max_length=settings.max_chars,
        elem_id="prompt",
    )
    examples = _examples(models)
    chooser = gr.Dataset(
        components=["textbox"],
        samples=[[example.prompt] for example in examples],
        sample_labels=[example.label for example in examples],
        label="Recorded prompts" if models.mode == "recorded" else "Examples",
        elem_id="examples",
    )
    chooser.click(lambda sample: sample[0], chooser, prompt, queue=False, api_visibility="private")
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        system = gr.Textbox(label="System prompt", lines=2, max_length=settings.max_chars, elem_id="system")
        with gr.Row():
            new_tokens = gr.Slider(
                1,
                settings.max_new_tokens,
                value=settings.default_new_tokens,
                step=1,
                label="New tokens",
                info="At most; a model may end earlier.",
                buttons=[],
                elem_id="new-tokens",
            )
            temperature = gr.Slider(
                0,
                MAX_TEMPERATURE,
                value=0,
                step=0.05,
                label="Temperature",
                info="0: the most probable token each time.",
                buttons=[],
                elem_id="temperature",
            )
            seed = gr.Number(
                0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed", info="For both lanes.", elem_id="seed"
            )
    return [prompt, system, temperature, seed, new_tokens]


def _continues_text(models: Models) -> bool:
    return models.tokenizer is not None and not has_chat_template(models.tokenizer)


def _examples(models: Models) -> list[texts.Example]:
    if models.mode != "recorded" or models.samples is None:
        return list(texts.EXAMPLES)
    return [texts.Example(_short(item.prompt), item.prompt) for item in models.samples.items]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 48 else f"{line[:47]}…"


def _connect(desk: Desk, inputs: list[Any], generate: Any, stop: Any, status: Any, outputs: list[Any]) -> None:
    """Two steps for a run: one at once, which takes a ticket, and one that waits for its turn."""
    ticket = gr.State(None)

    def enter(request: gr.Request) -> tuple[int, str]:
        return desk.stops.issue(_session(request)), views.notice(texts.QUEUED)

    def run(request: gr.Request, number: int, *values: Any) -> Iterator[tuple[str, ...]]:
        yield from _run(desk, _session(request), number, values)

    def halt(request: gr.Request) -> str:
        stopped = desk.stops.stop_session(_session(request))
        return views.notice(texts.STOPPING if stopped else texts.NOTHING_TO_STOP)

    hidden = {"show_progress": "hidden", "api_visibility": "private"}
    entered = gr.on([generate.click, inputs[0].submit], enter, None, [ticket, status], queue=False, **hidden)
    entered.then(
        run, [ticket, *inputs], [status, *outputs], concurrency_id=ONE_AT_A_TIME, concurrency_limit=1, **hidden
    )
    stop.click(halt, None, status, queue=False, **hidden)
    gr.api(_program_interface(desk), api_name="compare", concurrency_id=ONE_AT_A_TIME, concurrency_limit=1)


def _run(desk: Desk, session: str, ticket: int, values: tuple[Any, ...]) -> Iterator[tuple[str, ...]]:
    """(status, original, 1-bit, delta) as HTML until both lanes are done."""
    try:
        request = make_request(desk.models.settings, *values)
        if desk.models.one_bit is None:
            raise RefusedError(desk.models.problem)
    except RefusedError as error:
        desk.stops.finish(session, ticket)
        yield views.problem(str(error)), *(gr.skip(),) * 3
        return
    said = ""
    try:
        for both in desk.run(request, ticket):
            sentence = summary(both)
            # The same status again would be read aloud again.
            yield (gr.skip() if sentence == said else views.notice(sentence)), *desk.views(both)
            said = sentence
    finally:
        desk.stops.finish(session, ticket)


def summary(both: Lanes) -> str:
    """One sentence about the state of both lanes."""
    said = [f"{texts.NAMES[lane.lane]}: {texts.STATUS[lane.status].lower()}." for lane in both]
    return " ".join(said)


def _program_interface(desk: Desk) -> Callable[..., Any]:
    limit = desk.models.settings.default_new_tokens

    def compare(
        request: gr.Request,
        prompt: str,
        system: str = "",
        temperature: float = 0.0,
        seed: int = 0,
        max_new_tokens: int = limit,
    ) -> Iterator[dict]:
        """Run both models on one prompt; each update holds the lanes `original` and `one_bit` and `differences`."""
        try:
            wanted = make_request(desk.models.settings, prompt, system, temperature, seed, max_new_tokens)
            if desk.models.one_bit is None:
                raise RefusedError(desk.models.problem)
        except RefusedError as error:
            raise gr.Error(str(error), print_exception=False) from None
        session = f"api-{_session(request)}"
        ticket = desk.stops.issue(session)
        try:
            for both in desk.run(wanted, ticket):
                yield {lane.lane: lane.to_dict() for lane in both} | {"differences": views.differences(both)}
        finally:
            desk.stops.finish(session, ticket)

    return compare


def _leave_of(desk: Desk) -> Callable[[gr.Request], None]:
    def leave(request: gr.Request) -> None:
        """A visitor has closed the page: nobody waits for the text any more."""
        for session in (_session(request), f"api-{_session(request)}"):
            desk.stops.stop_session(session)

    return leave


def _session(request: gr.Request | None) -> str:
    return str(getattr(request, "session_hash", None) or "none")
