"""The counting behind the table of costs, and the table against it."""

from __future__ import annotations

import json

import pytest
import torch

from hf_qep.engine.planning import costs
from tests.script_modules import imported


@pytest.fixture(scope="module")
def bench_scale():
    """The bench as a module."""
    with imported("bench_scale") as modules:
        yield modules.bench_scale


def test_peak_is_that_of_the_moment_when_most_is_held(bench_scale):
    def run():
        first = torch.zeros(1000, dtype=torch.float32)
        del first
        second = torch.zeros(3000, dtype=torch.float32)
        return second + 1

    assert bench_scale.peak_allocated(run) == pytest.approx(2 * 3000 * 4, abs=256)


@pytest.mark.parametrize("method", ["sign", "gptq", "onebit"])
@pytest.mark.parametrize("shape", [(1024, 1024), (340, 1024), (2400, 800)])
def test_planned_workspace_is_what_the_engine_allocates(bench_scale, method, shape):
    planned = costs.load_costs().workspace_bytes(method, *shape)
    assert planned == pytest.approx(bench_scale.workspace_bytes(method, *shape), rel=0.15)


def test_a_table_is_found_in_the_cache_of_the_user_before_that_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shipped = costs.load_costs()
    own = {"version": costs.VERSION, "phases": {}, "workspace": {}, "rate": 1.0, "disk": 1.0, "about": {}}
    costs.cost_file().parent.mkdir(parents=True)
    costs.cost_file().write_text(json.dumps(own))
    assert costs.load_costs().rate == 1.0 != shipped.rate
    costs.cost_file().write_text(json.dumps(own | {"version": 99}))
    with pytest.raises(costs.ConfigError, match="measure it again"):
        costs.load_costs()


def test_costs_between_two_widths_lie_between_theirs_and_beyond_them_stay():
    table = costs.CostTable({"solve": [[100, 4e-9], [400, 1e-9]]}, {}, 1.0, 1.0, {})
    assert table.seconds("solve", 200, 1e9) == pytest.approx(2.0)
    assert table.seconds("solve", 50, 1e9) == pytest.approx(4.0)
    assert table.seconds("solve", 4000, 1e9) == pytest.approx(1.0)
