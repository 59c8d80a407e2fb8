"""UCI Bank Marketing: will a client who is called open a term deposit?

45,211 calls of a Portuguese bank, 2008 to 2010, in the order of time (Moro, Cortez and Rita 2014; CC BY 4.0). The
length of the call is dropped, since it is known only afterwards and gives the outcome away.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import urllib.request
import zipfile
from pathlib import Path

from crm.tabular import Table, split_in_time

from hf_qep.distill.records import Row
from hf_qep.errors import ConfigError
from hf_qep.files import write_text_aside

SOURCE = "https://archive.ics.uci.edu/static/public/222/bank+marketing.zip"
MEMBER, INNER = "bank-full.csv", "bank.zip"
"""The table, and the archive within the archive that holds it."""
LOCAL = "crm/bank-marketing.csv"
MOST_BYTES = 50_000_000

COLUMNS = ("age", "job", "marital", "education", "default", "balance", "housing", "loan", "contact", "day", "month")
COLUMNS += ("duration", "campaign", "pdays", "previous", "poutcome", "y")
NUMBERS = ("age", "balance", "day", "campaign", "pdays", "previous")
DROPPED = ("duration",)
ROWS = 45_211
DIGEST = "ffdffb4771578d982a2eb36367531276808d29b620d4e9fd4f1741c1e22a907d"
"""SHA-256 of the values of COLUMNS joined by ";", one line a row: the same for every way of writing the table."""
TEST, VALID = 9_043, 4_521
"""Rows to test by, the last 20 %, and 10 % before them."""

NAMES = {
    "marital": "marital status",
    "default": "credit in default",
    "housing": "housing loan",
    "loan": "personal loan",
    "contact": "contact by",
    "day": "day of month",
    "campaign": "contacts this campaign",
    "pdays": "days since last contact",
    "previous": "earlier contacts",
    "poutcome": "previous outcome",
}


def load_bank(data: Path | None = None, cache: Path | None = None) -> Table:
    """The table from `data`/crm, else from `cache`, else from UCI into `cache`.

    cache: default: `hf_qep/crm` in the user's cache folder. Raises ConfigError if the table is not the known one, or
    lies nowhere and cannot be fetched.
    """
    local = None if data is None else data / LOCAL
    if local is not None and local.is_file():
        rows, yes = read_bank(local.read_text(encoding="utf-8"))
    else:
        rows, yes = read_bank(_fetched(cache or _cache_folder()))
    parts = split_in_time(rows, yes, VALID, TEST)
    text = {"names": NAMES, "special": {"pdays": {-1: "never"}}, "negative": ("balance",)}
    return Table("bank", "will the client open a term deposit ?", *parts, numbers=NUMBERS, text=text)


def read_bank(text: str) -> tuple[list[Row], list[bool]]:
    """Rows without the outcome and without what is known only after the call, and the outcomes.

    text: the table with a header, values separated by "," or ";". Raises ConfigError unless it is the known table.
    """
    header = text.partition("\n")[0]
    read = csv.DictReader(io.StringIO(text), delimiter=";" if ";" in header else ",")
    if missing := set(COLUMNS) - set(read.fieldnames or ()):
        raise ConfigError(f"the table of the bank lacks the columns {', '.join(sorted(missing))}")
    lines = list(read)
    told = "\n".join(";".join(str(line[c]) for c in COLUMNS) for line in lines)
    if len(lines) != ROWS or (digest := hashlib.sha256(told.encode()).hexdigest()) != DIGEST:
        what = f"{len(lines):,} rows" if len(lines) != ROWS else f"other values (SHA-256 {digest})"
        raise ConfigError(
            f"the table of the bank has {what}, not the {ROWS:,} rows of UCI; fetch it again from {SOURCE}"
        )
    kept = [c for c in COLUMNS if c not in DROPPED and c != "y"]
    rows = [{c: int(line[c]) if c in NUMBERS else line[c] for c in kept} for line in lines]
    return rows, [line["y"] == "yes" for line in lines]


def _fetched(cache: Path) -> str:
    path = cache / MEMBER
    if not path.is_file():
        try:
            with urllib.request.urlopen(SOURCE, timeout=60) as answer:
                text = _unpacked(answer.read(MOST_BYTES))
        except (OSError, zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the table of the bank cannot be fetched from {SOURCE} ({error}); put {MEMBER} into the folder "
                f"{cache.name!r} of --cache, or give a folder with {LOCAL} as --data"
            ) from error
        read_bank(text)
        write_text_aside(path, text)
    return path.read_text(encoding="utf-8")


def _unpacked(packed: bytes) -> str:
    """The table in the archive, or in the archive within it."""
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        name = MEMBER if MEMBER in archive.namelist() else INNER
        with archive.open(name) as member:
            content = member.read(MOST_BYTES)
    return content.decode("utf-8") if name == MEMBER else _unpacked(content)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_qep" / "crm"
