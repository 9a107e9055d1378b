"""What a model of the report has cost: seconds, operations and energy of drawing, training and judging, as recorded."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from utils.machine import add_costs
from utils.report.records import Cost, Described, dataset_root, read_record

if TYPE_CHECKING:
    from utils.report.tables import Model

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")  # of the SI, by thousands
JOULES_A_KWH = 3.6e6


def cost_columns(models: Sequence["Model"]) -> dict[str, list[str]]:
    """{head: a cell a model}: of the datasets that a model's runs were trained on, then of one of its runs."""
    return {
        "drawing": [as_text(drawing(model)) for model in models],
        "training a run": [as_text(mean_cost([one.cost for one in model.trainings])) for model in models],
        "judging a run": [
            as_text(mean_cost([one.cost for one in model.sidecars], len(model.checkpoints))) for model in models
        ],
    }


def drawing(model: "Model") -> dict[str, float]:
    """Of all generated datasets that MODEL was trained on; what one of them does not record is left out."""
    places = {Path(source.path) for run in model.trainings for source in run.data() if source.synthetic}
    roots = {root for root in map(dataset_root, places) if root}
    found = [read_record(root / "dataset.json", Described) for root in sorted(roots)]
    return mean_cost([one.cost for one in found if one], 1)


def mean_cost(costs: Sequence[Cost], runs: int | None = None) -> dict[str, float]:
    """The sum of COSTS over RUNS, or over as many runs as there are costs."""
    total = add_costs(*map(msgspec.structs.asdict, costs))
    return {key: value / (runs or len(costs)) for key, value in total.items()}


def as_text(cost: dict[str, float]) -> str:
    """ "0:12:05, 3.4 PFLOP, 0.05 kWh CPU, 0.4 kWh GPU", as far as COST knows."""
    parts = []
    if "seconds" in cost:
        parts.append(str(timedelta(seconds=round(cost["seconds"]))))
    if "flops" in cost:
        value, prefix = cost["flops"], 0
        while value >= 999.5 and prefix < len(PREFIXES) - 1:
            value, prefix = value / 1000, prefix + 1
        parts.append(f"{value:.3g} {PREFIXES[prefix]}FLOP")
    for key, name in (("cpu_joules", "CPU"), ("gpu_joules", "GPU")):
        if key in cost:
            parts.append(f"{cost[key] / JOULES_A_KWH:.2g} kWh {name}")
    return ", ".join(parts)
