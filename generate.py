"""Draw a synthetic ImageNet from class names with Stable Diffusion: an ImageFolder that train.py reads.

Reads  a diffusers pipeline (--model, a folder or a hub id) and a class table (--classes)
Writes OUT/train/<id>/<id>_<index>.jpg, OUT/manifest/<id>.jsonl (one line an image) and OUT/dataset.json

    python generate.py --classes fashion --model models/fashion-sd --images-per-class 200       # a CPU, two minutes
    python generate.py --classes imagenet_100                                                    # the paper, one GPU
    python generate.py --reproduce data/imagenet_100_sd/dataset.json --sample 50                 # is it what it says?
    python -m utils.launch --launcher slurm --chunks 100 generate.py --classes imagenet_1k       # the paper, a cluster

The same command continues where it was stopped, by whatever, and ends with the same bytes on the same hardware and
software. Image k of a class depends on the recipe, --seed, the class and k alone. Batches are cut at fixed positions
within a class and drawn whole, so chunks and interruptions change nothing. Several processes may share one OUT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import cli
from utils.classes import FACTOR, ClassTable, images_per_class, load_classes
from utils.cli import UserError, positive_int
from utils.dataset import folder as datasets
from utils.dataset import inspection
from utils.dataset.folder import Dataset, in_chunk
from utils.dataset.gallery import write_gallery
from utils.dataset.shards import write_shards
from utils.generation import drawing, plan, reproduction
from utils.generation.drawing import Batch, ProgressBar
from utils.generation.families import OWN, SD, Family, find_family
from utils.generation.pipeline import PipelineFolder, find_pipeline
from utils.generation.prompt_files import PromptFile, read_prompts, recorded_template
from utils.generation.prompts import NAMES, SUPERVISION, Templates, parse_template, supervision_of
from utils.generation.recipe import QUALITY, RECIPES, SCHEDULERS, Recipe, refuse_difference
from utils.machine import require_memory, resolve_device, snapshot
from utils.storage import require_writable

if TYPE_CHECKING:
    from utils.generation.diffusion import Sampler

DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"
LAUNCH = cli.Launch("generate", "chunks", whole=("preview", "pack", "reproduce"))


def get_args_parser() -> argparse.ArgumentParser:
    """The options; their defaults are the paper's."""
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    # What to draw
    add("--classes", default="imagenet_100", help="imagenet_100, imagenet_1k, fashion, .tsv, .txt, list")
    add("--prompt", help='"c", "c, h_c", "c, d_c" (default), "c, h_c inside b" or {name} text')
    add("--prompts", type=cli.any_path, metavar="FILE", help="texts of each class: .tsv, .jsonl, ...")
    add("--supervision", choices=list(SUPERVISION), help="what the prompts or the model were made from")
    add("--names", choices=NAMES, default="first", help="of a class: its first name or all")
    add("--images-per-class", type=image_count, default="imagenet", metavar="N|imagenet|Nx",
        help="a number, as many as the real class, or 10x as many ...; may grow")  # fmt: skip
    add("--seed", type=cli.seed_number, default=0, help="another seed, another dataset")
    # How to draw it
    add("--recipe", choices=list(RECIPES), help="sets the next four options (default: paper; models "
        "other than Stable Diffusion 1.x and 2.x have their published values)")  # fmt: skip
    add("--guidance-scale", type=cli.positive_float, help="1 is none (paper: 2, fast: 2)")
    interval = partial(rising, ",", float, "LO,HI with 0 <= LO < HI, such as 0.28,5.42 or 0,inf")
    add("--guidance-interval", type=interval, metavar="LO,HI", help="guide at noise levels above LO "
        "and up to HI only; 0,inf guides everywhere (paper: 0,inf, fast: 0.28,5.42)")  # fmt: skip
    add("--steps", type=positive_int, help="denoising steps (paper: 50, fast: 18)")
    add("--scheduler", choices=[*SCHEDULERS, OWN], help="sampler (paper: pndm, fast: dpmpp_2m); own: "
        "the one saved with the model")  # fmt: skip
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    add("--height", type=positive_int, metavar="PIXELS", help="the model's own size if not given")
    add("--width", type=positive_int, metavar="PIXELS", help="the model's own size if not given")
    # With what
    add("--model", help=f"folder or hub id (default: {DEFAULT_MODEL}; --reproduce: as recorded)")
    add("--revision", help="commit or tag of a hub id")
    add("--lora", action="append", metavar="FILE_OR_ID[:WEIGHT]", help="LoRA weights to merge into the "
        "model's, .safetensors; may be given again")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", choices=("auto", "fp16", "bf16", "fp32"), default="auto", help="number format")
    add("--attention", choices=("auto", "sdpa", "xformers"), default="auto", help="auto: the fastest")
    add("--compile", action="store_true", help="torch.compile the UNet: minutes at start, then faster")
    add("--batch-size", type=auto_or_positive, default="auto", metavar="N|auto",
        help="images drawn together; auto keeps the folder's, else suits the device")  # fmt: skip
    # What to keep
    add("--out", type=cli.any_path, help="dataset folder (default: data/<classes>_sd)")
    add("--format", choices=list(datasets.SUFFIXES), default="jpg", help=f"of the images; jpg: quality {QUALITY}")
    add("--save-size", type=positive_int, metavar="PIXELS", help="store with this shorter side")
    add("--safety", choices=("redraw", "keep", "off"),
        help="images the safety checker flags (default: redraw if the model has one)")  # fmt: skip
    part = partial(rising, "/", int, "I/N with 0 <= I < N, such as 0/8 ... 7/8")
    add("--chunk", type=part, metavar="I/N", help="only every Nth class, from the Ith")
    # Instead of drawing
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--dry-run", action="store_true", help="print the plan: images, GPU hours, disk, first prompts")
    mode("--status", action="store_true", help="print what is done, missing, damaged; also while jobs run")
    mode("--verify", action="store_true", help="compare every file with its manifest")
    mode("--repair", action="store_true", help="verify, then draw again what is damaged or missing")
    mode("--preview", action="store_true", help="write contact sheets and OUT/index.html, a gallery")
    mode("--pack", action="store_true", help="write a complete dataset as WebDataset tar shards too")
    mode("--reproduce", type=cli.any_path, metavar="DATASET.JSON",
        help="draw a sample of that dataset again, as it records, and compare")  # fmt: skip
    add("--sample", type=positive_int, default=50, metavar="N", help="images for --reproduce to draw")
    add("--rate", type=cli.positive_float, metavar="IMAGES_PER_S", help="of one GPU, for --dry-run's hours")
    return parser


def main(args: argparse.Namespace) -> int:
    """Draw what is asked and not here yet, or do what one of the modes says. Returns the exit code."""
    # ===== checking the request =====
    table = load_classes(args.classes)
    out = args.out or Path(f"data/{table.name}_sd")
    for whole in LAUNCH.whole:
        if args.chunk and getattr(args, whole):
            raise UserError(f"--chunk: --{whole} takes all classes together; leave --chunk out")
    if args.status or args.verify or args.preview or args.pack:
        return look_at(datasets.open_dataset(out), args)
    model = (args.model, args.revision) if args.model else None
    if args.reproduce:
        asked = {"dtype": args.dtype, "attention": args.attention, "batch_size": args.batch_size}
        choices = {key: value for key, value in asked.items() if value != "auto"}
        return reproduction.reproduce(args.reproduce, args.sample, args.seed, model, args.device, choices, draw)
    template = asked_prompts(args.prompt, args.prompts, table)
    inspection.refuse_foreign_folder(out)
    existing = datasets.open_dataset(out) if args.repair or (out / "dataset.json").exists() else None
    if args.repair and existing:  # by the folder's own record, whatever the options say
        table, recipe = existing.table, Recipe.of(existing)
        recipe = recipe if args.attention == "auto" else replace(recipe, attention=args.attention)
        template, counts = recorded_template(existing), {folder.id: folder.count for folder in existing.folders}
        folder = find_pipeline(*model or reproduction.recorded_model(existing), recipe.lora or ())
    else:
        counts = images_per_class(table, args.images_per_class)
        folder, recipe = asked_generator(args, table.sha256, template, existing, counts)
        if not recipe.supervision:
            made = f"what the {'LoRA was tuned on' if recipe.lora else 'prompts were made from'}"
            print(f"note: say with --supervision {made}; reports show it", file=sys.stderr)
    if args.dry_run or not folder:
        name, where = args.model or DEFAULT_MODEL, (args.chunk, out, args.device, args.rate)
        plan.show_plan(recipe, name, folder, table, template, counts, *where)
        return 0

    # ===== what the images follow from =====
    recipe = recipe.with_model(folder)
    require_writable(out, "--out")
    about: dict[str, Any] = {
        "name": cli.safe_name(out.resolve().name.lstrip(". ")[: cli.LONGEST_NAME] or "dataset", "--out"),
        "recipe": recipe.record(),
        "model": {"id": folder.name, "revision": folder.revision, "files": folder.hashes(recipe.safety != "off")},
        "classes": [
            {"id": r.wnid, "name": r.name, "hypernym": r.hypernym, "definition": r.definition, "images": counts[r.wnid]}
            for r in table.rows
        ],
        "command": cli.command_line(),
    }

    # ===== what is left to do =====
    if existing:
        refuse_difference(existing, existing.info["model"]["files"], about["model"]["files"], "model")
        folders = in_chunk(datasets.enlarged(existing, about).folders, args.chunk)
        if args.repair:
            inspection.repair(folders)
        if not any(class_folder.open_batches() for class_folder in folders):
            print(f"{out}: nothing to do, all {sum(f.count for f in folders)} images are here")
            datasets.record_session(existing, {"images": 0, "seconds": 0})
            return 0

    # ===== loading the pipeline =====
    from utils.generation import loading  # imports torch, which nothing above waits for

    device = resolve_device(args.device)
    require_memory(device, plan.memory_gb(folder, recipe), "--height and --width")
    recipe = recipe.with_device(device)
    sampler = loading.load_sampler(folder, recipe, device)
    settled = replace(recipe, batch_size=recipe.batch_size or loading.choose_batch_size(sampler))
    about |= {"recipe": settled.record(), "unet_forwards_per_image": sampler.forwards_per_image}
    if device.type == "cuda" and not existing and args.attention == "auto":
        about["attention_ms"] = loading.attention_ms(device, sampler.dtype)

    # ===== drawing =====
    prompts = template.content if isinstance(template, PromptFile) else b""
    dataset = datasets.create_dataset(out, about | {"environment": snapshot()}, prompts)
    # Another process may have been first: its batch size counts.
    recipe = replace(recipe, attention=None).settle(dataset, counts)
    sampler.denoising.size = recipe.batch_size or 1
    session = drawing.Session(dataset, in_chunk(dataset.folders, args.chunk), recipe, device)
    with session.bar:
        for batch, entries in draw(session.open_batches(table, template), recipe, sampler, session.bar):
            session.commit(batch, entries)
    summary = session.summary(sampler, loading.flops_per_image(sampler))
    summary["chunk"] = args.chunk and "/".join(map(str, args.chunk))
    totals = datasets.record_session(dataset, summary)
    print(
        f"{out}: {totals['images']} of {totals['wanted']} images; this run drew {summary['images']} in "
        f"{summary['seconds']:.1f} s, {summary['images_per_s']:.2f} images/s, {summary['unet_forwards']} UNet forwards"
    )
    return 0


def draw(
    batches: Iterable[Batch | None], recipe: Recipe, sampler: Sampler, bar: ProgressBar
) -> Iterator[tuple[Batch, dict[int, dict]]]:
    """(batch, {index: manifest entry}) of BATCHES, each drawn as a whole: prompts, latents, denoising, decoding, files.

    One batch is denoised while the one before is decoded and written. Images that are black, broken or flagged by the
    safety checker are drawn again together, with the seeds of their next attempt.
    """

    def denoise(batch: Batch):
        """(B, 4, H/8, W/8) float32 clean latents of B prompts, from noise that is each image's own."""
        seeds, texts = [prompt.seed for prompt in batch.prompts], [prompt.text for prompt in batch.prompts]
        return sampler.denoise(seeds, texts, bar.show_step)

    def decode(latents):
        """uint8 (B, H, W, 3), [what is wrong with an image, or ""], [the safety checker's flag, or None]."""
        pixels, faults = sampler.decode(latents)
        return pixels.numpy(), faults, sampler.flagged(pixels) if recipe.safety != "off" else [None] * len(pixels)

    def write(batch: Batch, pixels, faults, flags):
        """The files; ({index: manifest entry}, {index: why it must be drawn again})."""
        return drawing.write_images(batch, recipe, pixels, faults, flags, beside_unet=sampler.device.type == "cpu")

    for batch, (entries, rejected) in drawing.overlapped(batches, denoise, decode, write, sampler):
        attempt = batch
        while rejected:
            attempt = attempt.again(rejected, recipe.seed)
            more, rejected = write(attempt, *decode(denoise(attempt)))
            entries |= more
        yield batch, entries


# ===== the request =====


def image_count(text: str) -> int | str:
    """Of --images-per-class: "imagenet", a factor of it such as "10x", or a number."""
    if text in ("imagenet", "1x"):
        return "imagenet"
    if FACTOR.fullmatch(text):
        return text
    if text.endswith("x"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole factor, such as 10x, 20x or 50x")
    return positive_int(text)


def rising(mark: str, kind: type, wanted: str, text: str) -> tuple:
    """ "3/8" -> (3, 8): numbers of a KIND, MARK between them, the first not below 0 and below the second, as WANTED."""
    try:
        low, high = map(kind, text.split(mark))
    except ValueError:
        low, high = kind(1), kind(0)
    if not 0 <= low < high:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return low, high


def auto_or_positive(text: str) -> int | str:
    """Of --batch-size."""
    return text if text == "auto" else positive_int(text)


def asked_prompts(prompt: str | None, file: Path | None, table: ClassTable) -> Templates:
    """--prompt or --prompts, which exclude each other."""
    if prompt and file:
        raise UserError("--prompt: --prompts has the texts; leave --prompt out, or write it into the file")
    return read_prompts(file, table) if file else parse_template(prompt or "c, d_c")


def asked_generator(
    args: argparse.Namespace, classes_sha256: str, template: Templates, existing: Dataset | None, counts: dict[str, int]
) -> tuple[PipelineFolder | None, Recipe]:
    """The model and the recipe of the command line; no model where --dry-run does not find it here.

    What contradicts a family that is known by its name is told before anything is fetched.
    """
    model, loras = args.model or DEFAULT_MODEL, args.lora or ()

    def settled(family: Family) -> Recipe:
        return asked_recipe(args, classes_sha256, template, family).settle(existing, counts)

    known = None if Path(model).is_dir() else find_family(None, [model, *loras])
    recipe = settled(known) if known else None
    folder: PipelineFolder | None = None
    try:
        folder = find_pipeline(model, args.revision, loras, download=not args.dry_run)
    except UserError as error:
        if not args.dry_run:
            raise
        print(f"note: {error}", file=sys.stderr)
    family = folder.family if folder else known or SD
    return folder, recipe if recipe and family == known else settled(family)


def asked_recipe(args: argparse.Namespace, classes_sha256: str, template: Templates, family: Family = SD) -> Recipe:
    """The recipe as the command line has it; None where the folder, the model or the device decides ("auto")."""
    names = [key.name for key in fields(Recipe) if key.name in args]
    options = {name: None if getattr(args, name) == "auto" else getattr(args, name) for name in names}
    told = None if args.lora else supervision_of(template)  # nobody knows what a LoRA was tuned on
    grade = SUPERVISION[args.supervision] if args.supervision else told
    prompts = template.sha256 if isinstance(template, PromptFile) else None
    said = {"classes": classes_sha256, "prompt": template.text, "prompts": prompts, "supervision": grade}
    return Recipe.asked(args.recipe, family, **options | said)


# ===== instead of drawing =====


def look_at(dataset: Dataset, args: argparse.Namespace) -> int:
    """--status, --verify, --preview, --pack: from the folder alone."""
    folders = in_chunk(dataset.folders, args.chunk)
    if args.status:
        inspection.show_status(dataset, folders)
    elif args.preview:
        print(f"open {write_gallery(dataset)} in a browser")
    elif args.pack:
        print(write_shards(dataset))
    elif bad := inspection.verify(dataset, folders):
        raise UserError(f"--verify: {bad} images of {dataset.root} are damaged or missing; --repair draws them again")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main, get_args_parser()))
