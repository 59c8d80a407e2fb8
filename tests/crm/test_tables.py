"""The two real tables: how they are read, split and written; what must not be in them."""

from __future__ import annotations

import io
import urllib.error
import zipfile

import numpy as np
import pytest
from crm import bank, pipeline
from crm.scores import score
from crm.tabular import boosting, majority, split_in_time

from hf_qep.algorithms.ranks import area_under_curve
from hf_qep.errors import ConfigError

LINE = "58;management;married;tertiary;no;{balance};yes;no;unknown;5;may;261;1;{pdays};0;unknown;{y}"


def bank_text(separator=";", number=False, count=40):
    """A small table as UCI writes it, or with the running number and the commas of the local copy."""
    quote = '"' if separator == ";" else ""
    lines = [";".join(bank.COLUMNS)]
    lines += [
        LINE.format(balance=100 * n - 500, pdays=n if n % 4 else -1, y="yes" if n % 3 else "no") for n in range(count)
    ]
    written = [separator.join(f"{quote}{v}{quote}" if v.isalpha() else v for v in line.split(";")) for line in lines]
    if number:
        written = [f"{n or 'Cust_num'}{separator}{line}" for n, line in enumerate(written)]
    return "\n".join(written) + "\n"


@pytest.fixture
def small(monkeypatch):
    """The small table is the known one."""
    monkeypatch.setattr(bank, "ROWS", 40)
    monkeypatch.setattr(bank, "TEST", 8)
    monkeypatch.setattr(bank, "VALID", 4)
    with pytest.raises(ConfigError, match="SHA-256") as error:
        bank.read_bank(bank_text())
    monkeypatch.setattr(bank, "DIGEST", str(error.value).split("SHA-256 ")[1].split(")")[0])


def archive(text, nested):
    """The archive of UCI: the table in it, or in an archive within it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as inner:
        inner.writestr("bank-full.csv", text)
    if nested:
        outer = io.BytesIO()
        with zipfile.ZipFile(outer, "w") as whole:
            whole.writestr("bank.zip", packed.getvalue())
        return outer.getvalue()
    return packed.getvalue()


def test_both_ways_of_writing_the_bank_table_give_the_same_rows(small):
    assert bank.read_bank(bank_text()) == bank.read_bank(bank_text(",", number=True))
    rows, yes = bank.read_bank(bank_text())
    assert (
        not {"duration", "Cust_num", "y"} & set(rows[0])
        and rows[0]["balance"] == -500
        and yes[:3] == [False, True, True]
    )


@pytest.mark.parametrize("nested", [False, True])
def test_the_bank_table_is_fetched_once(small, monkeypatch, tmp_path, nested):
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(archive(bank_text(), nested))

    monkeypatch.setattr(bank.urllib.request, "urlopen", answer)
    tables = [bank.load_bank(None, tmp_path / "cache") for _ in range(2)]
    assert asked == [bank.SOURCE] and tables[0].test.rows == tables[1].test.rows
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["bank-full.csv"]
    table = tables[0]
    assert (len(table.train), len(table.valid), len(table.test)) == (28, 4, 8)
    assert table.test.rows[-1]["balance"] == 100 * 39 - 500


def test_the_local_copy_comes_before_the_network(small, monkeypatch, tmp_path):
    (tmp_path / "crm").mkdir()
    (tmp_path / bank.LOCAL).write_text(bank_text(",", number=True))
    monkeypatch.setattr(bank.urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    table = bank.load_bank(tmp_path)
    line = table.records().text(table.test.rows[-1])
    assert "days since last contact p90" in line and "balance p90" in line and "marital status married" in line
    assert "days since last contact never" in table.records().text(table.train.rows[0])
    assert "balance negative" in table.records().text(table.train.rows[0])


def test_a_table_that_is_another_or_cannot_be_fetched_is_refused(monkeypatch, tmp_path):
    def offline(url, timeout):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(bank.urllib.request, "urlopen", offline)
    with pytest.raises(ConfigError, match="no network.*--data"):
        bank.load_bank(tmp_path, tmp_path)
    monkeypatch.setattr(bank.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(archive(bank_text(), True)))
    with pytest.raises(ConfigError, match="40 rows"):
        bank.load_bank(None, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="duration"):
        bank.read_bank(bank_text().replace("duration", "length"))


def pipeline_text(count=200):
    """Deals in the wrong order, whose value gives the outcome away, and some that are still open."""
    stages = ("Won", "Lost", "Engaging", "Won", "Prospecting")
    lines = ["opportunity_id,sales_agent,product,account,deal_stage,engage_date,close_date,close_value"]
    for n in range(count):
        stage = stages[n % 5]
        day = f"2017-{1 + (n * 7) % 12:02d}-{1 + n % 28:02d}" if stage != "Prospecting" else ""
        lines.append(
            f"X{n},Moses Frase,GTX-Pro,{'' if n % 4 else 'Isdom'},{stage},{day},2017-12-31,{99 * (stage == 'Won')}"
        )
    return "\n".join(lines) + "\n"


def test_the_pipeline_knows_only_what_stands_when_a_deal_opens(tmp_path):
    (tmp_path / "crm").mkdir()
    (tmp_path / pipeline.LOCAL).write_text(pipeline_text())
    table = pipeline.load_pipeline(tmp_path)
    assert set(table.train.rows[0]) == {"sales_agent", "product", "account", "engage_weekday"}
    assert (len(table.train), len(table.valid), len(table.test)) == (84, 12, 24)
    text = table.records().texts(table.train.rows)
    assert any("account missing" in line for line in text) and all("product gtx pro" in line for line in text)


def test_the_pipeline_is_in_the_order_of_time():
    lines = pipeline_text().splitlines()
    rows, yes = pipeline.read_pipeline("\n".join([lines[0], *reversed(lines[1:])]))
    days = sorted(line.split(",")[5] for line in lines[1:] if line.split(",")[4] in ("Won", "Lost"))
    weekdays = [pipeline.WEEKDAYS[pipeline.date.fromisoformat(day).weekday()] for day in days]
    assert [row["engage_weekday"] for row in rows] == weekdays and sum(yes) == 80


def test_a_pipeline_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--data"):
        pipeline.load_pipeline(tmp_path)
    with pytest.raises(ConfigError, match="account"):
        pipeline.read_pipeline(pipeline_text().replace("account", "customer"))
    with pytest.raises(ConfigError, match="no date"):
        pipeline.read_pipeline(pipeline_text().replace("2017-01-01", "soon"))


def test_no_training_row_is_later_than_a_test_row():
    parts = split_in_time([{"n": n} for n in range(10)], [n % 2 for n in range(10)], 2, 3)
    assert [[row["n"] for row in part.rows] for part in parts] == [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]
    assert parts[2].yes.tolist() == [True, False, True]
    with pytest.raises(ConfigError, match="cannot give"):
        split_in_time([{}] * 5, [True] * 5, 2, 3)


def test_the_real_bank_table_can_be_learned_without_the_length_of_the_call(shared_data):
    pytest.importorskip("sklearn")
    table = bank.load_bank(shared_data / "data")
    assert (len(table.train), len(table.valid), len(table.test)) == (31_647, 4_521, 9_043)
    assert table.train.yes.sum() + table.valid.yes.sum() + table.test.yes.sum() == 5_289
    assert "test 9,043 rows, 31.6% yes" in table.explain() and "47.1%" in table.explain()
    assert area_under_curve(boosting(table).probability(table.test.rows), table.test.yes) > 0.66


def test_nothing_can_be_learned_from_the_real_pipeline(shared_data):
    pytest.importorskip("sklearn")
    table = pipeline.load_pipeline(shared_data / "data")
    found = {}
    for fit in (majority, boosting):
        judged = [fit(table).probability(part.rows) for part in (table.valid, table.test)]
        found[fit] = score(judged[0], table.valid.yes, judged[1], table.test.yes).metrics()
    error = np.sqrt(0.25 / len(table.test))
    assert found[boosting]["auc"] < 0.54
    assert found[boosting]["accuracy"] < found[majority]["accuracy"] + 2 * error
