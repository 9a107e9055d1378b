"""What a model has cost, from records planted beside a report: each dataset once, runs as a mean, gaps as gaps."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from utils.report import page
from utils.report.costs import as_text, cost_columns
from utils.report.records import Cost, Sidecar, Source, Training
from utils.report.tables import Model, make_tables
from utils.storage import write_json


def dataset(folder: Path, **cost) -> Source:
    folder.mkdir()
    write_json(folder / "dataset.json", {"classes": [], "recipe": {}, "cost": cost})
    return Source(str(folder), synthetic=True)


def judged(seconds: float) -> Sidecar:
    return Sidecar(dataset="toys", checkpoint_sha256="a" * 64, cost=Cost(seconds=seconds, flops=1e9))


def test_costs_are_those_recorded(tmp_path):
    """Two seeds trained on the same two datasets, judged on two sets each."""
    sources = [dataset(tmp_path / "one", seconds=60.0, flops=2e12, gpu_joules=3.6e6),
               dataset(tmp_path / "two", seconds=30.0, flops=1e12, gpu_joules=1.8e6, cpu_joules=9.0)]  # fmt: skip
    runs = [Training(sources=sources, cost=Cost(seconds=s, flops=4e15, cpu_joules=7.2e5)) for s in (100.0, 300.0)]
    model = Model("drawn", trainings=runs, checkpoints={"a", "b"}, sidecars=[judged(s) for s in (1.0, 2.0, 3.0, 4.0)])
    assert {head: cells[0] for head, cells in cost_columns([model]).items()} == {
        "drawing": "0:01:30, 3 TFLOP, 1.5 kWh GPU",  # one of the two does not know its processors'
        "training a run": "0:03:20, 4 PFLOP, 0.2 kWh CPU",
        "judging a run": "0:00:05, 2 GFLOP",
    }


def test_models_without_records_have_no_columns_of_costs():
    """As those of earlier versions and published ones: the table is then the one it was."""
    bare, known = Model("bare"), Model("known", trainings=[Training(cost=Cost(seconds=5.0))])
    assert cost_columns([bare]) == {"drawing": [""], "training a run": [""], "judging a run": [""]}
    assert cost_columns([bare, known])["training a run"] == ["", "0:00:05"]
    half = Model("half", trainings=[Training(cost=Cost(seconds=5.0)), Training()])
    assert cost_columns([half])["training a run"] == [""]  # the mean of some of its runs would not be its own


@pytest.mark.parametrize(
    ("flops", "shown"), [(0, "0 FLOP"), (999.6, "1 kFLOP"), (84.4e12, "84.4 TFLOP"), (4e25, "4e+04 ZFLOP")]
)  # fmt: skip
def test_operations_have_the_prefixes_of_the_si(flops, shown):
    assert as_text({"flops": flops}) == shown


@pytest.mark.parametrize("value", [-1, 1e300, float("nan"), "much", [1]])
def test_a_cost_that_cannot_be_is_refused(value):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"cost": {"seconds": value}}, Training)


def test_the_columns_stand_before_the_numbers_of_the_first_table():
    from tests.report.test_verdicts import run_cell

    model = Model("known", trainings=[Training(cost=Cost(seconds=5.0))], cells={("toys", "top1"): run_cell(5, 9)})
    rows = [page.Row(model="known", dataset="toys", metric="top1", value=55.0)]
    (made,) = make_tables([model], rows)
    assert made["facts"][-1] == "training a run" and made["rows"][0]["facts"][-1] == "0:00:05"
