"""From a study to plain commands: which datasets to draw, which points to train and judge, and what all of it costs.

A point's folder is named after what its numbers depend on, so a study that was changed finds what still holds and
leaves alone what does not. A point's state is read from its folder: nothing else remembers it.
"""

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from utils.classes import images_per_class, load_classes
from utils.evaluation.results import Row as Result
from utils.images import list_image_folder
from utils.storage import read_json, read_jsonl, sha256_json
from utils.study.spec import Mix, Row, Study, asked, checked, script, sizes_of, words_of

# Options that say where and how fast, not what: a point that was trained with others still holds.
MACHINE = {"device", "workers", "batch_per_device", "log_every", "checkpoint_minutes", "max_bad_images", "val",
           "val_every", "no_leak_check"}  # fmt: skip
# Words of generate.py that may change without the images of a point changing: a set grows, image k stays image k.
DRAWN_WHERE = {"--images-per-class", "--out", "--device", "--rate"}
MOST_UNEVEN = 0.1  # of the steps asked for: epochs are whole


class Trained(msgspec.Struct):
    """What a run's args.json says of its end."""

    weights_sha256: str = ""


@dataclass
class Dataset:
    """A row's images: COUNTS by class; of a drawn one the words of generate.py that draw them."""

    name: str
    folder: Path
    counts: dict[str, int]
    words: tuple[str, ...] = ()
    plan: str = ""  # what `generate.py --dry-run` says

    def images(self, size: int) -> int:
        """How many the first SIZE of each class are."""
        return sum(min(size, count) for count in self.counts.values())

    @property
    def drawn(self) -> bool:
        """Whether all of its images are there; of a folder nothing is drawn."""
        if not self.words:
            return True
        try:
            counts = read_json(self.folder / "dataset.json").get("counts") or {}
        except Exception:  # missing, or being written: drawing tells
            return False
        return counts.get("images", 0) >= sum(self.counts.values())


@dataclass(kw_only=True)
class Point:
    """One training set of a row or mix with one seed: the commands that train and judge it, and its folder."""

    group: str  # the row or mix
    title: str  # of all its seeds: "g2-n100"
    size: int  # images a class: of a row; of a mix's shares, each of its rows; of its added images, those
    share: float | None = None  # of a mix: the second row's weight
    first: int | None = None  # of a mix: images a class of the first row
    seed: int
    rows: tuple[str, ...]
    folder: Path
    judged: Path  # where its results are
    train: tuple[str, ...]
    evaluate: tuple[str, ...]
    images: int  # in all
    seen: int  # by training

    @property
    def name(self) -> str:
        """As its model is called."""
        return f"{self.title}-seed{self.seed}"

    @property
    def command(self) -> tuple[str, ...]:
        """The launcher's: train, then judge, on all GPUs that it is given."""
        run = ("-m", "utils.launch", "--launcher", "local")
        return (*run, "train.py", *self.train, "--then", "evaluate.py", *self.evaluate)

    @property
    def trained(self) -> str:
        """The sha256 of its weights; "" before they are there."""
        path = self.folder / "args.json"
        return read_json(path, Trained, "delete its folder").weights_sha256 if path.is_file() else ""

    def results(self) -> list[Result]:
        """The top-1 of its weights, one a test that has been judged."""
        path = self.judged / "results.jsonl"
        if not path.is_file() or not (weights := self.trained):
            return []
        found = [row for row in read_jsonl(path, Result) if row.metric == "top1" and row.checkpoint_sha256 == weights]
        return list({row.dataset: row for row in found}.values())

    def reached(self) -> str:
        """ "fashion 83.21, ...": its results, for the terminal."""
        return ", ".join(f"{row.dataset} {row.value:.2f}" for row in self.results())

    def state(self, tests: Sequence[str]) -> str:
        """ "done", "trained", "begun" or "to do"."""
        if {row.dataset for row in self.results()} >= {*tests}:
            return "done"
        return "trained" if self.trained else "begun" if (self.folder / "args.json").is_file() else "to do"


@dataclass
class Plan:
    """All that a study asks for."""

    study: Study
    datasets: dict[str, Dataset]
    points: list[Point] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """The study's folder."""
        return Path(self.study.out)

    def stale(self) -> list[Path]:
        """Folders of points, and of results, that an earlier form of the study left: they no longer hold."""
        wanted = {point.folder for point in self.points} | {point.judged for point in self.points}
        found = [*(self.out / "points").glob("*-seed*-*"), *(self.out / "points").glob("*-seed*-*/judged-*")]
        return sorted(path for path in found if path not in wanted and path.is_dir())


def make_plan(study: Study, on_paper: bool = False) -> Plan:
    """Expand STUDY; UserError for options that a script refuses, and for what its folders cannot give.

    ON_PAPER: folders that are not here count as holding what is asked, so that a laptop can reckon what a cluster does.
    """
    most = {name: max(sizes_of(study, row)) for name, row in study.rows.items()}
    for mix in study.mixes.values():
        for place, name in enumerate(mix.rows):
            most[name] = max(most[name], mix.first if mix.first and place == 0 else max(sizes_of(study, mix)))
    datasets = {name: find_images(study, name, row, most[name], on_paper) for name, row in study.rows.items()}
    plan = Plan(study, datasets)
    evaluate = words_of(study, "evaluate", study.evaluate, "[evaluate]")
    evaluate += [f"--test={name}={folder}" for name, folder in study.tests.items()]
    evaluate += ["--datasets", *study.datasets] if study.datasets else []
    checked(study, "[evaluate]", "evaluate", evaluate)
    for name, folder in study.tests.items():
        if not Path(folder).is_dir() and not on_paper:
            raise study.wrong(f"[tests] {name}", f"no folder {folder}; expected {folder}/<class id>/<images>")
    base = words_of(study, "train", study.train, "[train]")
    given = checked(study, "[train]", "train", ["--data=x", *base])
    recipe = asked(study, "[train]", lambda: script("train")["make_recipe"](given))
    for group, part in {**study.rows, **study.mixes}.items():
        for parts, facts in sets_of(study, group, part):
            for seed in dict.fromkeys(part.seeds or study.seeds):
                plan.points.append(make_point(plan, group, parts, facts, seed, base, evaluate, recipe))
    return plan


def sets_of(study: Study, group: str, part: Row | Mix) -> Iterator[tuple[list[tuple[str, int, float]], dict]]:
    """([(row, first images a class, weight), ...], facts) of each training set of a row or mix."""
    for size in sizes_of(study, part):
        if isinstance(part, Row):
            yield [(group, size, 1.0)], {"title": f"{group}-n{size}", "size": size}
            continue
        one, other = part.rows
        if part.first:
            facts = {"title": f"{group}-n{part.first}+{size}", "size": size, "first": part.first}
            yield [(one, part.first, part.first), (other, size, size)], facts  # as weights: all equally often
        for share in part.shares or ():
            facts = {"title": f"{group}-n{size}-share{share:g}", "size": size, "share": share}
            yield [(one, size, round(1 - share, 9)), (other, size, share)], facts


def make_point(
    plan: Plan, group: str, parts: list, facts: dict, seed: int, base: list[str], evaluate: list[str], recipe: dict
) -> Point:
    """One point; its folder carries a hash of what its weights depend on, its results' folder of what they do."""
    study = plan.study
    images = sum(plan.datasets[row].images(size) for row, size, _ in parts)
    epochs, train = int(recipe["epochs"]), list(base)
    if study.steps:
        a_epoch = images // recipe["batch_size"]
        epochs = max(1, round(study.steps / max(1, a_epoch)))
        if a_epoch and abs(epochs * a_epoch / study.steps - 1) > MOST_UNEVEN:
            why = f"{study.steps} are no whole number of epochs of {facts['title']}, which has {a_epoch} steps in one"
            raise study.wrong("steps", f"{why}; choose a multiple of it, or a larger number")
        warmup = recipe["warmup_epochs"] * epochs / recipe["epochs"]  # the same share of every run
        train += [f"--epochs={epochs}", f"--set=warmup_epochs={warmup:.6g}"]
    if images < recipe["batch_size"]:
        few = f"{facts['title']} has {images} images, fewer than a batch of {recipe['batch_size']}"
        raise study.wrong("sizes", f"{few}; give more, or a smaller [train] batch_size")
    data = [f"--data={plan.datasets[row].folder}:{weight:g}" for row, _, weight in parts]
    limits = ",".join(str(size) for _, size, _ in parts)
    train += [*data, f"--images-per-class={limits}", f"--seed={seed}", f"--name={group}"]
    own = {key: value for key, value in study.train.items() if key not in MACHINE}
    words = [plan.datasets[row].words for row, _, _ in parts]
    drawn = [[word for word in its if word.partition("=")[0] not in DRAWN_WHERE] for its in words]
    judged = {key: value for key, value in study.evaluate.items() if key not in MACHINE | {"batch_size"}}
    title = facts["title"]
    folder = plan.out / "points" / f"{title}-seed{seed}-{sha256_json([own, epochs, data, limits, seed, drawn])[:8]}"
    results = folder / f"judged-{sha256_json([judged, study.tests, study.datasets])[:8]}"
    return Point(
        group=group,
        **facts,
        seed=seed,
        rows=tuple(row for row, _, _ in parts),
        folder=folder,
        judged=results,
        train=(*train, f"--out={folder}"),
        evaluate=(f"--checkpoint={title}-seed{seed}={folder}", *evaluate, f"--out={results}"),
        images=images,
        seen=epochs * images,
    )


# ===== where images come from =====


def find_images(study: Study, name: str, row: Row, most: int, on_paper: bool) -> Dataset:
    """The row's dataset: the folder's images, which must reach MOST a class, or what generate.py would draw."""
    if row.generate is not None:
        return _to_draw(study, name, row, most)
    place, folder = f"[rows.{name}] folder", Path(row.folder).expanduser()
    classes = study.train.get("classes")
    wanted = asked(study, "[train] classes", lambda: load_classes(classes).ids) if classes else None
    if on_paper and not folder.is_dir():
        print(f"note: [rows.{name}] folder: {folder} is not here; it counts as complete", file=sys.stderr)
        spec = classes or study.generate.get("classes", "imagenet_1k")
        return Dataset(name, folder, images_per_class(load_classes(spec), "imagenet" if classes else most))
    root = folder / "train" if (folder / "train").is_dir() else folder
    if wanted and not (folder / "train").is_dir() and [*folder.glob("*.tar"), *folder.glob("shards/*.tar")]:
        return Dataset(name, folder, dict.fromkeys(wanted, most))  # train.py counts what shards hold
    with contextlib.redirect_stderr(io.StringIO()):  # on files that are no images: train.py says so too
        ids, samples = list_image_folder(root, f"{study.path}: {place}")
    counts = dict.fromkeys(ids, 0)
    for _, label in samples:
        counts[ids[label]] += 1
    if wanted:
        if missing := [one for one in wanted if one not in counts]:
            raise study.wrong(place, f"{root} has no class folder {missing[0]}, which [train] classes names")
        counts = {one: counts[one] for one in wanted}
    if most > max(counts.values()):
        raise study.wrong(f"[rows.{name}] sizes", f"{most} a class, but {root} holds at most {max(counts.values())}")
    return Dataset(name, folder, counts)


def _to_draw(study: Study, name: str, row: Row, most: int) -> Dataset:
    """What generate.py would draw; its own dry run refuses bad options, and a folder that was drawn with others."""
    place, out = f"[rows.{name}] generate", Path(study.data) / name
    words = words_of(study, "generate", study.generate | (row.generate or {}), place)
    args = checked(study, place, "generate", words)
    table = asked(study, place, lambda: load_classes(args.classes))
    if (out / "dataset.json").is_file():  # a set grows and never shrinks
        recorded = read_json(out / "dataset.json").get("recipe", {}).get("images_per_class")
        most = max(most, recorded) if isinstance(recorded, int) else most
    words += [f"--images-per-class={most}", f"--out={out}"]
    args = checked(study, place, "generate", words)
    args.dry_run, args.rate = True, args.rate or 1.0  # a given rate is not measured, which would take seconds
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        asked(study, f"{place} ({out})", lambda: script("generate")["main"](args))
    return Dataset(name, out, dict.fromkeys(table.ids, most), tuple(words), said.getvalue())


# ===== the quality of datasets =====


def quality_of(plan: Plan, row: str) -> tuple[Path, tuple[str, ...]] | None:
    """(folder, evaluate.py's words) of the look at a row's dataset through the reference's largest network.

    The real images that it must cover are the first test's, which no row was trained on. None where the study wants no
    such look, or has no test folder.
    """
    study = plan.study
    if not study.quality or not study.tests:
        return None
    size = max(sizes_of(study, study.rows[study.reference]))
    judge = next(point for point in plan.points if point.group == study.reference and point.size == size)
    dataset, (real, *_) = plan.datasets[row], study.tests.values()
    digest = sha256_json([judge.folder.name, dataset.words, sum(dataset.counts.values()), real])[:8]
    folder = plan.out / "quality" / f"{row}-{digest}"
    kept = {"device", "dtype", "interpolation", "batch_size", "workers"}
    options = {key: value for key, value in study.evaluate.items() if key in kept}
    words = [f"--dataset-report={dataset.folder}", f"--real={real}", f"--checkpoint={judge.folder}", f"--out={folder}"]
    return folder, (*words, *words_of(study, "evaluate", options, "[evaluate]"))
