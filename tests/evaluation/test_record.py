import dataclasses
import json

import pytest

from hf_qep.errors import CheckpointError, FormatVersionError
from hf_qep.evaluation.divergence import TextScore
from hf_qep.evaluation.environment import Environment, ModelFacts
from hf_qep.evaluation.estimates import Estimate
from hf_qep.evaluation.perplexity import LanguageScore
from hf_qep.evaluation.record import SCHEMA_VERSION, Bits, Cost, EvalRecord, PairCost, json_schema
from hf_qep.evaluation.retention import Interval, Retention
from hf_qep.evaluation.speed import Speed
from hf_qep.evaluation.tasks import TaskMetric, TaskResult


@pytest.fixture
def record():
    some = Estimate(1.5, 0.1, 10)
    score = LanguageScore(some, some.exponential(), None)
    metric = TaskMetric("acc", some, some, Retention(Interval(1.0, 0.9, 1.1), None, True, "near chance"))
    facts = ModelFacts("owner/model", "0" * 40, {"model.safetensors": "f" * 64}, "float16", 1000)
    return EvalRecord(
        subject=facts,
        baseline=dataclasses.replace(facts, revision=None, sha256={}),
        environment=Environment({"torch": "2", "lm_eval": None}, "Linux", None, 2, None, None, 1),
        bits=Bits(1.2, 2.3, None),
        command="hf-qep eval folder",
        seeds={"tasks": 0},
        text=TextScore(score, score, some, some, 3, 64, 32, "window", "\n\n", 2, None, "held_out.txt"),
        tasks=(TaskResult("t", "own:t", "cloze", 0, 10, 20, 0, 0.0, None, (metric,)),),
        cost=PairCost(Cost(10, None, None, Speed(some, None, 8, 0)), Cost(20, 30)),
        notes=("ärger",),
    )


def test_a_record_comes_back_from_its_file_as_it_was(record, tmp_path):
    path = record.write(tmp_path)
    assert path.name == "hf_qep_eval.json"
    assert EvalRecord.read(tmp_path) == EvalRecord.read(path) == record


def test_what_was_not_measured_is_null_and_present(record):
    values = record.to_dict()
    assert values["embeddings"] is None
    assert values["cost"]["baseline"]["speed"] is None
    assert values["text"]["subject"]["bits_per_byte"] is None
    assert list(values)[:2] == ["schema", "schema_version"]


def test_a_record_of_a_newer_schema_is_refused(record):
    values = record.to_dict() | {"schema_version": SCHEMA_VERSION + 1, "invented_later": 1}
    with pytest.raises(FormatVersionError, match="upgrade"):
        EvalRecord.from_dict(values)


def broken(values, *path, value):
    *parents, last = path
    place = values
    for key in parents:
        place = place[key]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return values


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("bits", "model"), "2.3", r"record\.bits\.model is '2\.3'; it must be of type number"),
        (("bits", "model"), True, r"record\.bits\.model is True"),
        (("bits", "model"), float("nan"), r"use null"),
        (("bits", "model"), None, r"record\.bits\.model is None"),
        (("bits", "model"), KeyError, r"record\.bits lacks the field\(s\) model"),
        (("bits", "modle"), 1.0, r"unknown field\(s\) modle"),
        (("text", "kl", "n"), 2.5, r"record\.text\.kl\.n"),
        (("text", "kl", "n"), 0, r"n >= 1"),
        (("text", "kl", "stderr"), -1.0, r"standard error >= 0"),
        (("tasks", 0, "metrics", 0, "retention"), [], r"record\.tasks\[0\]\.metrics\[0\]\.retention"),
        (("seeds",), [0], r"record\.seeds is \[0\]; it must be an object"),
        (("schema",), "another", r"no evaluation record"),
    ],
)
def test_a_malformed_record_is_refused_with_the_place(record, path, value, message):
    with pytest.raises(CheckpointError, match=message):
        EvalRecord.from_dict(broken(record.to_dict(), *path, value=value))


def test_a_whole_number_is_read_where_a_fraction_is_allowed(record):
    read = EvalRecord.from_dict(broken(record.to_dict(), "bits", "model", value=2))
    assert read.bits.model == 2.0 and isinstance(read.bits.model, float)


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CheckpointError):
        EvalRecord.read(tmp_path / "x.json")


def test_a_missing_record_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="hf-qep eval"):
        EvalRecord.read(tmp_path)


def test_the_json_schema_describes_every_field_and_accepts_a_record(record):
    schema = json_schema()
    definitions = schema["$defs"]
    assert set(definitions["EvalRecord"]["properties"]) == set(record.to_dict())
    for name, definition in definitions.items():
        for field, value in definition["properties"].items():
            assert value.get("description"), f"{name}.{field} has no description"
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(json.dumps(record.to_dict())), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record.to_dict() | {"invented": 1}, schema)
