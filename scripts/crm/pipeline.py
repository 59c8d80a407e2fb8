"""The negative control: a sales pipeline that was made up without a rule, so that nobody can foretell its deals.

Maven Analytics' "CRM sales opportunities" (a fictitious company). Only what is known when a deal opens is kept; the
date and the value of the closing tell the outcome. A method that does better than chance here has seen the answer.

Of the date of opening only the weekday is kept. The table holds deals that were closed from March to December 2017, and
lost ones closed sooner (median 14 days) than won ones (57): of those opened in 2016 only slow ones are in it, and 82 %
of them were won, against 62 % later. December 2017 is cut off in the same manner. The name of the month would thus tell
what came after the opening: boosting reaches an area under the curve of 0.54 with it, 0.50 without.
"""

from __future__ import annotations

import csv
import io
from datetime import date
from pathlib import Path

from crm.tabular import Table, split_in_time

from hf_qep.distill.records import Row
from hf_qep.errors import ConfigError

LOCAL = "crm/maven-sales-pipeline-negative-control.csv"
KEPT = ("sales_agent", "product", "account")
OUTCOMES = {"Won": True, "Lost": False}
NEEDED = (*KEPT, "deal_stage", "engage_date")
TEST, VALID = 0.2, 0.1
"""Shares of the deals, the latest ones."""
WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
NAMES = {"engage_weekday": "weekday of opening"}


def load_pipeline(data: Path | None) -> Table:
    """The table from `data`/crm. Raises ConfigError where there is none, or one without the columns."""
    path = None if data is None else data / LOCAL
    if path is None or not path.is_file():
        raise ConfigError(f"the negative control needs the file {LOCAL}; give the folder that holds it as --data")
    rows, yes = read_pipeline(path.read_text(encoding="utf-8"))
    parts = split_in_time(rows, yes, round(len(rows) * VALID), round(len(rows) * TEST))
    return Table("pipeline", "will the deal be won ?", *parts, text={"names": NAMES})


def read_pipeline(text: str) -> tuple[list[Row], list[bool]]:
    """Closed deals in the order of their opening: what was known then, and whether they were won.

    Raises ConfigError if columns are missing or a date is none.
    """
    read = csv.DictReader(io.StringIO(text))
    if missing := set(NEEDED) - set(read.fieldnames or ()):
        raise ConfigError(f"the sales pipeline lacks the columns {', '.join(sorted(missing))}")
    closed = sorted((line for line in read if line["deal_stage"] in OUTCOMES), key=lambda line: line["engage_date"])
    return [_opening(line) for line in closed], [OUTCOMES[line["deal_stage"]] for line in closed]


def _opening(line: dict[str, str]) -> Row:
    try:
        opened = date.fromisoformat(line["engage_date"])
    except ValueError as error:
        raise ConfigError(f"the column 'engage_date' says {line['engage_date']!r}, which is no date") from error
    return {column: line[column] or None for column in KEPT} | {"engage_weekday": WEEKDAYS[opened.weekday()]}
