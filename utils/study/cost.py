"""A study on paper: its commands, and what drawing and training will take. What is done already is counted too."""

import contextlib
import io
import math
import re
import shlex

from utils.study.plan import Dataset, Plan
from utils.study.spec import Study, asked, checked, script


def show(plan: Plan) -> None:
    """The commands, and what they cost: --dry-run."""
    for dataset in plan.datasets.values():
        if dataset.words:
            print(shlex.join(("python", "generate.py", *dataset.words)))
    for point in plan.points:
        print(shlex.join(("python", *point.command)))
    print()
    for line in costs(plan):
        print(line)


def costs(plan: Plan) -> list[str]:
    """Lines on images, forwards, hours and disk of the whole study, what is done already included."""
    images = forwards = 0
    hours, disk, rates = 0.0, 0.0, dict[str, float]()
    for dataset in filter(lambda one: one.words, plan.datasets.values()):
        its_images, its_forwards, its_disk = (
            float(re.findall(pattern, dataset.plan, re.M)[0].replace(",", ""))
            for pattern in (r"^images: (\S+)", r"an image, (\S+) in all", r"^disk: about (\S+) GB")
        )
        images, forwards, disk = images + int(its_images), forwards + int(its_forwards), disk + its_disk
        model = next((word for word in dataset.words if word.startswith("--model=")), "")
        if model not in rates:
            rates[model] = forwards_per_s(plan.study, dataset, its_forwards / its_images)
        hours += its_forwards / rates[model] / 3600 if rates[model] else math.nan
    seen, speed = sum(point.seen for point in plan.points), plan.study.images_per_s
    drawing = "hours not known: give [generate] rate" if math.isnan(hours) else f"{hours:,.2f} device hours"
    training = f"{seen / speed / 3600:,.2f} device hours" if speed else "hours not known: give images_per_s"
    return [
        f"{len(plan.points)} runs on {len({point.title for point in plan.points})} training sets",
        f"drawing: {images:,} images, {forwards:,} UNet forwards, {disk:,.2f} GB, {drawing}",
        f"training: {seen:,} images seen, {training}",
    ]


def forwards_per_s(study: Study, dataset: Dataset, an_image: float) -> float:
    """UNet forwards a second of one device: as the study gives it, else as `generate.py --dry-run` measures it; or 0.

    Measured once a model, with AN_IMAGE forwards an image: other rows differ by their forwards.
    """
    args = checked(study, f"[rows.{dataset.name}] generate", "generate", dataset.words)
    if args.rate:
        return args.rate * an_image
    args.dry_run, said = True, io.StringIO()
    with contextlib.redirect_stdout(said):
        asked(study, f"[rows.{dataset.name}] generate", lambda: script("generate")["main"](args))
    found = re.search(r"hours: \S+ at (\S+) images/s", said.getvalue())
    return float(found[1].replace(",", "")) * an_image if found else 0.0
