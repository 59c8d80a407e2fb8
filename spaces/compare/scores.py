"""The tab with measured numbers: tables of `hf_qep_eval.json`, and bars drawn from the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from models import human_bytes
from views import link, problem

from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.record import EvalRecord


@dataclass(frozen=True)
class Pair:
    """One quantity of both models. stderr: of each, None if unknown. chance: score of guessing."""

    name: str
    values: tuple[float, float]
    shown: tuple[str, str]
    stderr: tuple[float | None, float | None] = (None, None)
    chance: float | None = None


@dataclass(frozen=True)
class Chart:
    """Pairs on one scale."""

    title: str
    hint: str
    pairs: tuple[Pair, ...]


def scores(record: EvalRecord | None, note: str) -> str:
    """The whole tab; `note` says why there is no record."""
    if record is None:
        return problem(note or "There is no evaluation record.")
    charts = charts_of(record)
    version = record.environment.versions.get("hf_qep") or "unknown"
    facts = (
        f"<p>{link(record.subject.name)} against {link(record.baseline.name)}, measured on "
        f"{escape(record.created[:10])} with hf-qep {escape(version)}. Every number comes from the file "
        "<code>hf_qep_eval.json</code> of the model; ± is one standard error.</p>"
    )
    drawn = "".join(f"<figure class='chart'>{_figure(chart)}</figure>" for chart in charts)
    notes = "".join(f"<li>{escape(sentence)}</li>" for sentence in record.notes)
    listed = f"<h3>Notes</h3><ul>{notes}</ul>" if notes else ""
    return f"<h2>What one bit costs</h2>{facts}{_table(record, charts)}<div class='charts'>{drawn}</div>{listed}"


def charts_of(record: EvalRecord) -> list[Chart]:
    """What can be drawn: quantities that both models have."""
    found = []
    if record.cost is not None:
        pair = (record.cost.baseline, record.cost.subject)
        sizes = [_bytes("Weights in memory", [cost.weight_bytes for cost in pair])]
        if all(cost.file_bytes for cost in pair):
            sizes.append(_bytes("Weight files", [cost.file_bytes or 0 for cost in pair]))
        found.append(Chart("Size", "shorter is better", tuple(sizes)))
    if record.text is not None:
        both = (record.text.baseline, record.text.subject)
        perplexity = _estimates("Perplexity", [score.perplexity for score in both])
        found.append(Chart("Perplexity on held-out text", "shorter is better", (perplexity,)))
    scores = [
        _estimates(f"{task.name}, {metric.name}", [metric.baseline, metric.subject], task.chance)
        for task in record.tasks
        for metric in task.metrics
    ]
    if scores:
        found.append(Chart("Tasks", "longer is better; the dashed line is guessing", tuple(scores)))
    return found


def _bytes(name: str, values: Sequence[int]) -> Pair:
    first, second = values
    return Pair(name, (float(first), float(second)), (human_bytes(first), human_bytes(second)))


def _estimates(name: str, values: Sequence[Estimate], chance: float | None = None) -> Pair:
    first, second = values
    return Pair(
        name, (first.value, second.value), (_shown(first), _shown(second)), (first.stderr, second.stderr), chance
    )


def _shown(value: Estimate) -> str:
    return f"{value.value:.4g}" + (f" ± {value.stderr:.2g}" if value.stderr is not None else "")


_BITS = {"bfloat16": "16", "float16": "16", "float32": "32"}


def _table(record: EvalRecord, charts: Sequence[Chart]) -> str:
    rows = [(pair.name, *pair.shown) for chart in charts for pair in chart.pairs]
    bits, stored = record.bits, _BITS.get(record.baseline.dtype, "–")
    rows.append(("Bits per weight, quantised layers", stored, f"{bits.linear:.3f}" if bits.linear else "–"))
    rows.append(("Bits per weight, whole model", stored, f"{bits.model:.3f}"))
    if record.text is not None:
        rows.append(("KL divergence, nats per token", "0", _shown(record.text.kl)))
        rows.append(("Same first choice as the original", "100%", f"{record.text.top1_agreement.value:.1%}"))
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(original)}</td><td>{escape(ours)}</td></tr>"
        for name, original, ours in rows
    )
    return (
        "<div class='table-scroll' tabindex='0' role='region' aria-label='Table of scores'><table class='scores'>"
        "<caption>Original and 1-bit model, same text and same protocol</caption>"
        "<thead><tr><th scope='col'>Measured</th><th scope='col'>Original</th><th scope='col'>1-bit</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


LEFT, RIGHT, BAR, GAP, LINE = 2, 104, 16, 4, 19
WIDTH = 360


def _figure(chart: Chart) -> str:
    """Grouped bars as SVG; the second of a pair is hatched, so that colour is not needed to tell them apart."""
    top = max([*(v + 2 * (s or 0) for p in chart.pairs for v, s in zip(p.values, p.stderr, strict=True)), 1e-12])
    scale = (WIDTH - LEFT - RIGHT) / top
    height_of_pair = LINE + 2 * (BAR + GAP) + 12
    parts = []
    for index, pair in enumerate(chart.pairs):
        parts.append(_pair(pair, 4 + index * height_of_pair, scale))
    words = "; ".join(f"{p.name}: original {p.shown[0]}, 1-bit {p.shown[1]}" for p in chart.pairs)
    height = height_of_pair * len(chart.pairs)
    return (
        f"<figcaption><strong>{escape(chart.title)}</strong> <span>{escape(chart.hint)}</span>{_LEGEND}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{escape(f'{chart.title}. {words}')}'>"
        f"{_HATCH}{''.join(parts)}</svg>"
    )


_HATCH = (
    "<defs><pattern id='hatch' width='6' height='6' patternUnits='userSpaceOnUse' patternTransform='rotate(45)'>"
    "<rect width='6' height='6' class='bar-one-bit'></rect><line x1='0' y1='0' x2='0' y2='6' class='hatch'></line>"
    "</pattern></defs>"
)
_LEGEND = (
    "<span class='legend'><span class='key key-original'></span>Original "
    "<span class='key key-one-bit'></span>1-bit</span>"
)


def _pair(pair: Pair, top: int, scale: float) -> str:
    parts = [f"<text x='{LEFT}' y='{top + 13}' class='bar-name'>{escape(pair.name)}</text>"]
    for row, (value, shown, stderr) in enumerate(zip(pair.values, pair.shown, pair.stderr, strict=True)):
        y = top + LINE + row * (BAR + GAP)
        width = max(1.0, value * scale)
        fill = "class='bar-original'" if row == 0 else "fill='url(#hatch)' class='bar-outline'"
        parts.append(f"<rect x='{LEFT}' y='{y}' width='{width:.1f}' height='{BAR}' rx='2' {fill}></rect>")
        end = width
        if stderr is not None:
            low, high = max(0.0, (value - stderr) * scale), (value + stderr) * scale
            middle, end = y + BAR / 2, max(width, high)
            parts.append(
                f"<path class='whisker' d='M{LEFT + low:.1f} {middle}H{LEFT + high:.1f}M{LEFT + low:.1f} {middle - 4}v8"
                f"M{LEFT + high:.1f} {middle - 4}v8'></path>"
            )
        parts.append(f"<text x='{LEFT + end + 6:.1f}' y='{y + 13}' class='bar-value'>{escape(shown)}</text>")
    if pair.chance is not None:
        x, y = LEFT + pair.chance * scale, top + LINE - 2
        parts.append(f"<path class='chance' d='M{x:.1f} {y}v{2 * BAR + GAP + 4}'></path>")
    return "".join(parts)
