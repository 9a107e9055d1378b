"""Draw a synthetic ImageNet from class names with Stable Diffusion: an ImageFolder that train.py reads.

Reads  a diffusers pipeline (--model, a folder or a hub id) and a class table (--classes)
Writes OUT/train/<id>/<id>_<index>.jpg, OUT/manifest/<id>.jsonl (one line an image) and OUT/dataset.json

    python generate.py --classes digits --model models/digits-sd --images-per-class 200         # a CPU, two minutes
    python generate.py --classes imagenet_100                                                    # the paper, one GPU
    python generate.py --reproduce data/imagenet_100_sd/dataset.json --sample 50                 # is it what it says?
    python -m utils.launch --launcher slurm --chunks 100 generate.py --classes imagenet_1k       # the paper, a cluster

The same command continues where it was stopped, by whatever, and ends with the same bytes on the same hardware and
software. Image k of a class depends on the recipe, --seed, the class and k alone. Batches are cut at fixed positions
within a class and drawn whole, so chunks and interruptions change nothing. Several processes may share one OUT.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.cli import Launch, UserError, command_line, make_parser, positive_float, positive_int, run
from utils.dataset import folder as datasets
from utils.dataset import inspection
from utils.dataset.folder import ClassFolder, Dataset, in_chunk
from utils.generation.drawing import CHROMA, QUALITY, draw
from utils.generation.pipeline import PipelineFolder, find_pipeline
from utils.generation.prompts import (
    NAMES,
    ClassTable,
    Template,
    images_per_class,
    load_classes,
    parse_template,
    prompt_warnings,
)
from utils.machine import snapshot
from utils.storage import AlreadyOwned, require_writable

if TYPE_CHECKING:
    from utils.generation.diffusion import Sampler

# What an image costs and how it looks. Command-line options replace single values.
RECIPES = {
    # The released models: Stable Diffusion 1.4, guidance 2 (project page); 50 steps, PNDM, 512 px: SD 1.4's defaults.
    "paper": {"scheduler": "pndm", "steps": 50, "guidance_scale": 2.0, "guidance_interval": None},
    # Not in the paper: a third of the forwards. DPM-Solver++ 2M (Lu et al. 2022) needs about 20 steps; guidance only at
    # the noise levels where it matters, (0.28, 5.42] as Kynkäänniemi et al. (NeurIPS 2024) found for latent diffusion.
    "fast": {"scheduler": "dpmpp_2m", "steps": 18, "guidance_scale": 2.0, "guidance_interval": (0.28, 5.42)},
}
DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"
SCHEDULERS = ("pndm", "ddim", "dpmpp_2m", "euler", "unipc")
DTYPE_NAMES = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}
FORMATS = tuple(datasets.SUFFIXES)
LAUNCH = Launch("generate", "chunks", whole=("preview", "pack", "reproduce"))


def get_args_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # What to draw
    parser.add_argument(
        "--classes", default="imagenet_100", help="imagenet_100, imagenet_1k, digits, .tsv, .txt or list"
    )
    parser.add_argument("--prompt", default="c, d_c", help='"c", "c, h_c", "c, d_c", "c, h_c inside b" or {name} text')
    parser.add_argument("--names", choices=NAMES, default="first", help="of a class: its first name or all")
    parser.add_argument("--images-per-class", type=count_or_imagenet, default="imagenet", metavar="N|imagenet",
                        help="a number, or as many as the real class has")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="another seed, another dataset")
    # How to draw it
    parser.add_argument("--recipe", choices=list(RECIPES), default="paper", help="sets the next three options")
    parser.add_argument("--guidance-scale", type=positive_float, help="1 is none (paper: 2, fast: 2)")
    parser.add_argument("--steps", type=positive_int, help="denoising steps (paper: 50, fast: 18)")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="sampler (paper: pndm, fast: dpmpp_2m)")
    parser.add_argument("--height", type=positive_int, metavar="PIXELS", help="the model's own size if not given")
    parser.add_argument("--width", type=positive_int, metavar="PIXELS", help="the model's own size if not given")
    # With what
    parser.add_argument("--model", help=f"folder or hub id (default: {DEFAULT_MODEL}; --reproduce: as recorded)")
    parser.add_argument("--revision", help="commit or tag of a hub id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", choices=("auto", "fp16", "bf16", "fp32"), default="auto", help="number format")
    parser.add_argument("--attention", choices=("auto", "xformers", "sdpa"), default="auto", help="attention kernels")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: minutes at start, then faster")
    parser.add_argument("--batch-size", type=auto_or_positive, default="auto", metavar="N|auto",
                        help="images drawn together; auto keeps the folder's, else suits the device")  # fmt: skip
    # What to keep
    parser.add_argument("--out", help="dataset folder (default: data/<classes>_sd)")
    parser.add_argument("--format", choices=FORMATS, default="jpg", help=f"of the images; jpg: quality {QUALITY}")
    parser.add_argument("--save-size", type=positive_int, metavar="PIXELS", help="store with this shorter side")
    parser.add_argument("--safety", choices=("redraw", "keep", "off"),
                        help="images the safety checker flags (default: redraw if the model has one)")  # fmt: skip
    parser.add_argument("--chunk", type=chunk, metavar="I/N", help="only every Nth class, from the Ith")
    # Instead of drawing
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print the plan: images, GPU hours, disk, first prompts")
    mode.add_argument("--status", action="store_true", help="print what is done, missing, damaged; also while jobs run")
    mode.add_argument("--verify", action="store_true", help="compare every file with its manifest")
    mode.add_argument("--repair", action="store_true", help="verify, then draw again what is damaged or missing")
    mode.add_argument("--preview", action="store_true", help="write contact sheets and OUT/index.html, a gallery")
    mode.add_argument("--pack", action="store_true", help="write a complete dataset as WebDataset tar shards too")
    mode.add_argument("--reproduce", type=Path, metavar="DATASET.JSON",
                      help="draw a sample of that dataset again, as it records, and compare")  # fmt: skip
    parser.add_argument("--sample", type=positive_int, default=50, metavar="N", help="images for --reproduce to draw")
    parser.add_argument("--rate", type=positive_float, metavar="IMAGES_PER_S", help="of one GPU, for --dry-run's hours")
    return parser


def main(args: argparse.Namespace) -> int:
    # ===== checking the request =====
    table, template = load_classes(args.classes), parse_template(args.prompt)
    out = Path(args.out or f"data/{table.name}_sd")
    for whole in LAUNCH.whole:
        if args.chunk and getattr(args, whole):
            raise UserError(f"--chunk: --{whole} takes all classes together; leave --chunk out")
    if args.status or args.verify or args.preview or args.pack:
        return look_at(datasets.open_dataset(out), args)
    if args.reproduce:
        return reproduce(args)
    wanted = wanted_recipe(args, table, template)
    datasets.refuse_foreign_folder(out)
    existing = datasets.open_dataset(out) if (out / "dataset.json").exists() else None
    recipe = datasets.settle_recipe(wanted, existing)
    counts = images_per_class(table, args.images_per_class)
    if args.dry_run:
        return dry_run(args, table, template, recipe, counts, out)

    # ===== finding the model =====
    folder = find_pipeline(args.model or DEFAULT_MODEL, args.revision)
    recipe = settle_with_model(recipe, folder)
    require_writable(out, "--out")
    hashes = folder.hashes(recipe["safety"] != "off")
    if existing:
        datasets.refuse_difference(existing, existing.info["model"]["files"], hashes, "model")

    # ===== what is left to do =====
    if existing and args.repair:
        repair(existing, args)
    if existing and not any(class_folder.open_batches() for class_folder in in_chunk(existing.folders, args.chunk)):
        print(
            f"{out}: nothing to do, all {sum(f.count for f in in_chunk(existing.folders, args.chunk))} images are here"
        )
        datasets.record_session(existing, {"images": 0, "seconds": 0})
        return 0

    # ===== loading the pipeline =====
    sampler, asked = load(folder, recipe, args.device)
    from utils.generation import loading  # imports torch, which a finished dataset needs not wait for

    batch_size = recipe["batch_size"] or loading.choose_batch_size(sampler)

    # ===== drawing =====
    dataset = datasets.create_dataset(
        out,
        {
            "name": out.name,
            "recipe": asked | {"batch_size": batch_size},
            "unet_forwards_per_image": sampler.forwards_per_image,
            "model": {"id": folder.name, "revision": folder.revision, "files": hashes},
            "classes": class_list(table, counts),
            "command": command_line(),
            "environment": snapshot(),
        },
    )
    recipe = datasets.settle_recipe(asked, dataset)  # another process may have been first: its batch size counts
    sampler.micro_batch = recipe["batch_size"]
    session = draw(dataset, in_chunk(dataset.folders, args.chunk), sampler, table, template)
    session |= {"device": str(sampler.device), "chunk": args.chunk and "/".join(map(str, args.chunk))}
    session["micro_batch"] = sampler.micro_batch  # less than the batch size where memory ran out
    totals = datasets.record_session(dataset, session)
    print(
        f"{out}: {totals['images']} of {totals['wanted']} images; this run drew {session['images']} in "
        f"{session['seconds']:.1f} s, {session['images_per_s']:.2f} images/s, {session['unet_forwards']} UNet forwards"
    )
    return 0


# ===== the request =====


def count_or_imagenet(text: str) -> int | str:
    return text if text == "imagenet" else positive_int(text)


def auto_or_positive(text: str) -> int | None:
    return None if text == "auto" else positive_int(text)


def chunk(text: str) -> tuple[int, int]:
    """ "3/8" -> (3, 8)"""
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 0 <= part < parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, such as 0/8 ... 7/8")
    return part, parts


def wanted_recipe(args: argparse.Namespace, table: ClassTable, template: Template) -> dict:
    """Everything that decides what the images look like; None where the device or the model decides ("auto")."""
    recipe = RECIPES[args.recipe]
    if unknown := recipe.keys() - {"scheduler", "steps", "guidance_scale", "guidance_interval"}:
        raise UserError(f"--recipe {args.recipe}: unknown keys {', '.join(sorted(unknown))} in RECIPES")
    if args.guidance_scale is not None and args.guidance_scale < 1:
        raise UserError(f"--guidance-scale {args.guidance_scale:g}: 1 means no guidance, less has no meaning here")
    steps = args.steps or recipe["steps"]
    if steps > 1000:
        raise UserError(f"--steps {steps}: the models are trained with 1000 noise levels; take at most 1000")
    interval = recipe["guidance_interval"]
    return {
        "name": args.recipe,
        "classes": table.sha256,
        "prompt": template.text,
        "names": args.names,
        "images_per_class": args.images_per_class,
        "seed": args.seed,
        "scheduler": args.scheduler or recipe["scheduler"],
        "steps": steps,
        "guidance_scale": args.guidance_scale or recipe["guidance_scale"],
        "guidance_interval": list(interval) if interval else None,
        "height": args.height,
        "width": args.width,
        "dtype": None if args.dtype == "auto" else args.dtype,
        "attention": None if args.attention == "auto" else args.attention,
        "compile": args.compile,
        "batch_size": args.batch_size,
        "safety": args.safety,
        "format": args.format,
        "quality": None if args.format == "png" else QUALITY,
        "chroma": CHROMA if args.format == "jpg" else None,
        "save_size": args.save_size,
    }


def settle_with_model(recipe: dict, folder: PipelineFolder) -> dict:
    """RECIPE with the size and the safety policy settled by what the model is. UserError if they do not go together."""
    recipe = recipe | {side: recipe[side] or folder.native_size for side in ("height", "width")}
    for side in ("height", "width"):
        if recipe[side] % folder.pixels_per_latent:
            raise UserError(f"--{side} {recipe[side]}: this model draws multiples of {folder.pixels_per_latent} pixels")
    if recipe["save_size"] and recipe["save_size"] > min(recipe["height"], recipe["width"]):
        raise UserError(f"--save-size {recipe['save_size']} is larger than the images; it only makes them smaller")
    if recipe["safety"] in ("redraw", "keep") and not folder.has_safety_checker:
        raise UserError(f"--safety {recipe['safety']}: {folder.name} has no safety checker; use --safety off")
    return recipe | {"safety": recipe["safety"] or ("redraw" if folder.has_safety_checker else "off")}


def load(folder: PipelineFolder, recipe: dict, device_name: str) -> tuple[Sampler, dict]:
    """The pipeline, ready to draw by RECIPE, and RECIPE with dtype and attention settled by the device."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle CPU threads sleep: a shared machine stays usable
    from utils.generation import diffusion, loading
    from utils.machine import resolve_device, resolve_dtype

    device = resolve_device(device_name)
    dtype = resolve_dtype(recipe["dtype"] or "auto", device)
    recipe = recipe | {"dtype": DTYPE_NAMES[str(dtype)]}
    recipe["attention"] = loading.resolve_attention(recipe["attention"] or "auto", device, dtype)
    keys = ("scheduler", "steps", "guidance_scale", "guidance_interval", "height", "width")
    sampler = loading.load_sampler(
        folder,
        diffusion.Sampling(**{key: recipe[key] for key in keys}),
        device,
        dtype,
        recipe["attention"],
        recipe["compile"],
        recipe["safety"] != "off",
    )
    return sampler, recipe


def class_list(table: ClassTable, counts: dict[str, int]) -> list[dict]:
    return [
        {"id": r.wnid, "name": r.name, "hypernym": r.hypernym, "definition": r.definition, "images": counts[r.wnid]}
        for r in table.rows
    ]


# ===== instead of drawing =====


def look_at(dataset: Dataset, args: argparse.Namespace) -> int:
    """--status, --verify, --preview, --pack: from the folder alone."""
    folders = in_chunk(dataset.folders, args.chunk)
    if args.status:
        show_status(dataset, folders)
    elif args.verify:
        bad = verify(dataset, folders)
        if bad:
            raise UserError(
                f"--verify: {bad} images of {dataset.root} are damaged or missing; --repair draws them again"
            )
    elif args.preview:
        from utils.dataset.gallery import write_gallery

        print(f"open {write_gallery(dataset)} in a browser")
    else:
        from utils.dataset.shards import write_shards

        print(write_shards(dataset))
    return 0


def show_status(dataset: Dataset, folders: list[ClassFolder]) -> None:
    """One line a class that is not complete, totals, and an ETA from the ages of the files."""
    states = list(inspection.inspect_all(folders))
    for state in states:
        if state.done < state.count:
            lost = f"{len(state.missing)} missing, {len(state.damaged)} damaged"
            print(f"{state.id}: {state.done} of {state.count} done, {lost}")
    complete = sum(state.done == state.count for state in states)
    done, missing, damaged = (
        sum(state.done for state in states), sum(len(s.missing) for s in states), sum(len(s.damaged) for s in states)
    )  # fmt: skip
    print(f"{dataset.root}: {done} of {done + missing + damaged} images done, {missing} missing, {damaged} damaged")
    print(f"classes: {complete} of {len(states)} complete")
    report_foreign(dataset, states)
    rate, age = inspection.images_per_second([moment for state in states for moment in state.times])
    if missing + damaged and rate:
        rest = datetime.timedelta(seconds=round((missing + damaged) / rate))
        state = "newest image" if age < 1800 else "idle: newest image"
        print(f"{state} {age:.0f} s old; at its last {rate:.2f} images/s the rest takes {rest}")


def verify(dataset: Dataset, folders: list[ClassFolder]) -> int:
    """Read every byte, print what is damaged or missing, return how many."""
    from tqdm import tqdm

    states = list(tqdm(inspection.inspect_all(folders, hashes=True), total=len(folders), unit="class", desc="verify"))
    for state in states:
        for word, indices in (("damaged", state.damaged), ("missing", state.missing)):
            if indices:
                shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
                print(f"{state.id}: {len(indices)} {word}: {shown}")
    bad = sum(len(state.damaged) + len(state.missing) for state in states)
    print(f"{dataset.root}: {sum(state.done for state in states)} images are as their manifests say, {bad} are not")
    report_foreign(dataset, states)
    return bad


def report_foreign(dataset: Dataset, states: list) -> None:
    for state in states:
        if state.foreign:
            print(f"warning: {state.id} holds files of other origin: {', '.join(state.foreign[:5])}", file=sys.stderr)
    if strangers := inspection.foreign_classes(dataset):
        print(f"warning: no class of this dataset, but in train/: {', '.join(strangers[:5])}", file=sys.stderr)


def repair(dataset: Dataset, args: argparse.Namespace) -> None:
    """Strike what is damaged from the manifests, class by class; drawing then fills the gaps."""
    for folder in in_chunk(dataset.folders, args.chunk):
        try:
            with folder.lock():
                state = inspection.inspect(folder, hashes=True)
                if state.damaged or state.missing:
                    print(f"{state.id}: {len(state.damaged)} damaged, {len(state.missing)} missing: to be drawn again")
                    inspection.drop_damaged(folder, state)
        except AlreadyOwned:
            print(f"{folder.id}: being drawn by another process, not verified", file=sys.stderr)


def reproduce(args: argparse.Namespace) -> int:
    """--reproduce: a sample of a dataset drawn again and compared, and in what this machine differs from its record.

    --model, --device, --dtype, --attention and --batch-size may differ from the record, to see what that does; they
    are then listed with the other differences. Exit code 0 if all images are byte-equal or near-equal, else 1.
    """
    from tqdm import tqdm

    from utils.generation import reproduction

    dataset = reproduction.open_record(args.reproduce)
    recipe, model = dataset.recipe, dataset.info["model"]
    table, template = reproduction.recorded_classes(dataset), parse_template(recipe["prompt"])
    chosen = reproduction.choose_batches(dataset, args.sample, args.seed)
    if args.model:
        folder = find_pipeline(args.model, args.revision)
    else:
        folder = find_pipeline(model["id"], model["revision"] if not Path(model["id"]).is_dir() else None)
    hashes = folder.hashes(recipe["safety"] != "off")
    for name, _, _ in reproduction.differences(model["files"], hashes):
        raise UserError(f"--model {folder.name} is not the model {dataset.root} was drawn with: {name} differs")

    sampler, used = load(folder, recipe | own_choices(args, recipe), args.device)
    sampler.micro_batch = used["batch_size"]
    images = sum(len(batch) for _, batch in chosen)
    print(f"{dataset.root}: drawing {images} of its {dataset.images} images again: {len(chosen)} whole batches of "
          f"{len({folder.id for folder, _ in chosen})} classes")  # fmt: skip
    with tqdm(total=images, unit="img", desc="reproduce", mininterval=1 if sys.stderr.isatty() else 30) as bar:
        found = list(reproduction.redraw(dataset, chosen, sampler, table, template, bar))

    for verdict in (reproduction.EQUAL, reproduction.NEAR, reproduction.DIFFERENT, reproduction.LOST):
        those = [one for one in found if one.verdict == verdict]
        lowest = min((one.psnr_db for one in those if np.isfinite(one.psnr_db)), default=None)
        shown = f", PSNR from {lowest:.1f} dB" if lowest is not None else ""
        names = ", ".join(f"{one.id}_{one.index:06d}" for one in those[:5])
        print(f"{verdict}: {len(those)}{shown}" + (f" ({names})" if names and verdict != reproduction.EQUAL else ""))
    differing = [*reproduction.differences(dataset.info["environment"], snapshot())]
    differing += reproduction.differences(recipe, used, "recipe")
    print(f"differs here from the record: {len(differing)} facts" if differing else "this machine: as recorded")
    for name, recorded, here in differing:
        print(f"  {name}: recorded {json.dumps(recorded)}, here {json.dumps(here)}")
    if others := reproduction.other_environments(dataset):
        print(f"note: {others} other environments drew parts of it (sessions.jsonl); which image each drew is not kept")
    if smaller := reproduction.smaller_batches(dataset):
        print(f"note: memory ran out in {smaller} sessions, which denoised batches in parts (micro_batch in "
              "sessions.jsonl); low bits of their images may differ")  # fmt: skip
    if sampler.micro_batch < used["batch_size"]:
        print(f"note: memory ran out here, so at most {sampler.micro_batch} images were denoised at once")
    return 0 if all(one.verdict in (reproduction.EQUAL, reproduction.NEAR) for one in found) else 1


def own_choices(args: argparse.Namespace, recipe: dict) -> dict:
    """What --reproduce does otherwise than RECIPE: as asked, or because this device cannot do it as recorded."""
    from utils.machine import resolve_device

    on_gpu = resolve_device(args.device).type == "cuda"
    return {
        "dtype": None if recipe["dtype"] == "fp16" and not on_gpu else recipe["dtype"],
        "attention": None if recipe["attention"] == "xformers" and not on_gpu else recipe["attention"],
        "batch_size": args.batch_size or recipe["batch_size"],
    } | {name: getattr(args, name) for name in ("dtype", "attention") if getattr(args, name) != "auto"}


def dry_run(
    args: argparse.Namespace, table: ClassTable, template: Template, recipe: dict, counts: dict[str, int], out: Path
) -> int:
    """What a run would draw and cost. Loads no model and downloads none; what it does not know is as in SD 1.4."""
    from utils.generation.plan import show_plan

    schedule: dict = {}
    try:
        folder = find_pipeline(args.model or DEFAULT_MODEL, args.revision, download=False)
        recipe, schedule = settle_with_model(recipe, folder), folder.scheduler_config
    except UserError as error:
        print(f"note: {error}", file=sys.stderr)
        recipe = recipe | {side: recipe[side] or 512 for side in ("height", "width")}
    show_plan(recipe, schedule, table, template, counts, args.chunk, out, args.rate)
    for warning in prompt_warnings(table, template, args.names):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, get_args_parser()))
