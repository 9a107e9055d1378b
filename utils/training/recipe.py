"""A training recipe's values as the command line changes them; the recipes themselves stand in train.py."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from utils.cli import UserError

CHOICES = {"head": ("cosine", "linear"), "interpolation": ("bicubic", "bilinear")}
LIMITS = {  # lowest and highest value; of other numbers 0 and any
    "epochs": (1, 100_000),
    **dict.fromkeys(("batch_size", "batch_per_device"), (1, 10**9)),
    **dict.fromkeys(("global_size", "local_size", "val_resize", "val_crop"), (1, 4096)),  # pixels
    "first_size": (0, 4096),
    "global_count": (1, 1000),
    "local_count": (0, 1000),
    "warmup_epochs": (0, 100_000),
    **dict.fromkeys(("momentum", "flip", "jitter", "grayscale", "global_blur", "local_blur"), (0, 1)),
    **dict.fromkeys(("global_solarize", "local_solarize", "label_smoothing"), (0, 1)),
    "hue": (0, 0.5),  # of a turn
}


def changed(recipe: Mapping[str, Any], options: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """RECIPE with the values of OPTIONS, then of SETTINGS ("KEY=VALUE", as --set takes them).

    Of a run with fewer epochs than RECIPE the warm-up shrinks in proportion, unless a setting says how long it is: else
    ten epochs of the paper's recipe would be all warm-up. UserError for an unknown key, a value of another type, and
    one out of its LIMITS or CHOICES.
    """
    values = {**recipe, **options}
    for text in settings:
        key, _, value = text.partition("=")
        if key not in values:
            raise UserError(f"--set {text}: unknown key {key!r}; the recipe has {', '.join(values)}")
        try:
            values[key] = parse_value(value, values[key])
        except ValueError:
            raise UserError(f"--set {text}: {value!r} is no value for {key}, which is {values[key]!r}") from None
    asked = {text.partition("=")[0] for text in settings}
    if "warmup_epochs" not in asked and 0 < values["epochs"] < recipe["epochs"]:
        values["warmup_epochs"] = recipe["warmup_epochs"] * values["epochs"] / recipe["epochs"]
    for key, value in values.items():
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"--set {key}={value}: choose {' or '.join(CHOICES[key])}")
        low, high = LIMITS.get(key, (0, math.inf))
        if isinstance(value, int | float) and not (low <= value <= high and value < math.inf):
            most = f" and at most {high:,}" if high < math.inf else ""
            raise UserError(f"--set {key}={value}: must be a number, at least {low}{most}")
    return values


def parse_value(text: str, default: Any) -> Any:
    """TEXT as the type of DEFAULT: "0.4,1" -> (0.4, 1.0). ValueError if it is none."""
    if isinstance(default, tuple):
        low, high = (float(part) for part in text.split(","))
        if not 0 < low <= high <= 1:
            raise ValueError
        return (low, high)
    return type(default)(text)


def as_text(value: Any) -> str:
    """(0.25, 1.0) -> "0.25,1", 1e-06 -> "1e-06": as --set reads it."""
    if isinstance(value, tuple):
        return ",".join(map(as_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
