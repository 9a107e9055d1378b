"""README and docs: links lead somewhere, trees are true, figures and messages are the programs' own, commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import evaluate
import generate
import train
from models import export_fashion
from utils.launch import command as launch
from utils.launch.command import site_options

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "prompts/README.md"])
SCRIPTS = {"generate.py": generate, "train.py": train, "evaluate.py": evaluate}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ===== links, trees, maps =====


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_an_anchor_is_made_as_github_makes_it():
    assert slug("`data wait` is high: what now?") == "data-wait-is-high-what-now"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), f"{page.name} links to {link}"


def test_the_readmes_tree_is_the_tree():
    tree = read("README.md").split("## The tree")[1].split("## More")[0]
    names = re.findall(r"^    (\S+) {2,}\S", tree, re.M)
    assert len(names) >= 12
    for name in names:
        assert (ROOT / name).exists(), name
        assert name.endswith("/") == (ROOT / name).is_dir()
    for required in ("Dockerfile", "environment.yml", "Makefile", "generate.py", "train.py", "evaluate.py", "prompts/"):
        assert required in names


def test_the_design_page_has_a_row_for_each_of_the_eighteen_habits():
    rows = re.findall(r"^\| (\d+)\. .+? \| .+ \| .+ \|$", read("docs/design.md"), re.M)
    assert list(map(int, rows)) == list(range(1, 19))


@pytest.mark.parametrize("page", ["docs/design.md"])
def test_functions_named_with_their_file_are_there(page):
    found = re.findall(r"`(\w+)` (?:in|of) `(\w[\w/]*\.py)`", read(page))
    assert len(found) >= 10
    for name, file in found:
        assert re.search(rf"\b{name}\b", read(file)), f"{name} is not in {file}"


# ===== commands =====


def commands(page: Path, start: str) -> list[str]:
    """Indented lines of PAGE that begin with START, and those of its table cells, without their comments."""
    text = page.read_text(encoding="utf-8")
    lines = re.findall(rf"^ {{4,}}({re.escape(start)} .*)$", text, re.M)
    lines += re.findall(rf"(?<=\| )`({re.escape(start)} [^`]*)`(?= \|)", text)
    return [re.split(r" +# ", line)[0].strip() for line in lines]


MAKE_COMMANDS = sorted({command for page in PAGES for command in commands(page, "make")})


@pytest.mark.parametrize("command", [command for command in MAKE_COMMANDS if not re.search(r"\.\.\.|…", command)])
def test_make_commands_name_known_targets_variables_and_options(command):
    done = subprocess.run(["bash", "-c", f"{command} --dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for script, arguments in re.findall(r"(\w+\.py) (.*)", done.stdout):
        if script in SCRIPTS and command.split()[1] in ("generate", "train", "evaluate"):
            assert not unknown_options(script, arguments), command


def unknown_options(script: str, arguments: str) -> set[str]:
    known = set(re.findall(r"--[a-z][a-z0-9-]+", SCRIPTS[script].get_args_parser().format_help()))
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", arguments)) - known


def test_options_named_in_the_docs_exist():
    for script in SCRIPTS:
        for page in PAGES:
            text = page.read_text(encoding="utf-8").split("\n## Mistakes\n")[0]  # which shows wrong options on purpose
            for arguments in re.findall(rf"\b{re.escape(script)} ([^`\n|#]*)", text):
                assert not unknown_options(script, arguments), f"{page.name}: {script} {arguments}"


def test_the_papers_rows_have_three_commands_each_that_the_scripts_understand():
    page = ROOT / "docs/reproduce-the-paper.md"
    text = page.read_text(encoding="utf-8").split("## Commands")[1].split("## Cost")[0]
    rows = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 14
    for drawn, trained, judged in rows:
        assert drawn == "none" or drawn.startswith("`make generate CLASSES=1")
        assert trained.startswith(("`make train DATASET=", "`python train.py "))
        assert judged.startswith(("`make evaluate DATASET=", "`python evaluate.py "))
        if drawn != "none":  # what is drawn is what is trained on and judged
            out = re.search(r"OUT=data/(\S+?)`", drawn)
            folder = out[1] if out else {"100": "imagenet_100_sd", "1000": "imagenet_1k_sd"}[drawn.split("=")[1][:-1]]
            assert f"DATASET={folder}`" in trained and f"DATASET={folder} " in judged
    for command in commands(page, "python"):
        _, script, *arguments = shlex.split(command)
        SCRIPTS[script].get_args_parser().parse_args(arguments)


def test_your_own_dataset_in_four_commands(tmp_path):
    page = ROOT / "docs/your-own-dataset.md"
    table = re.findall(r"^    ([^\t\n]+\t.+)$", page.read_text(encoding="utf-8"), re.M)
    assert len(table) == 4
    (tmp_path / "my_classes.tsv").write_text("\n".join(table) + "\n", encoding="utf-8")
    (tmp_path / "models").symlink_to(ROOT / "models")
    preparation, *four, packing = commands(page, "python")
    assert preparation.startswith("python models/") and len(four) == 4 and packing.endswith(" --pack")
    printed = {}
    for command in [preparation, *four, packing]:
        script, *arguments = command.split()[1:]
        arguments = ["24" if argument == "200" else argument for argument in arguments]  # images a class
        if script == "generate.py":
            arguments += ["--steps", "6"]
        if script == "train.py":
            arguments += ["--epochs", "3"]
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        printed[script] = done.stdout
    real = sum(len(list((tmp_path / "data/fashion/test" / line.split("\t")[0]).iterdir())) for line in table[1:])
    assert re.search(rf"my_classes_sd +real .* {real:,} +3$", printed["evaluate.py"], re.M)
    assert (tmp_path / "runs/my_classes_sd/results.jsonl").is_file()
    assert (tmp_path / "data/my_classes_sd/shards/README.md").is_file()


# ===== figures, messages, settings =====


@pytest.fixture(scope="module")
def plans() -> dict[str, dict[str, float]]:
    """Of ImageNet-100, some multiples of it and -1K: what `generate.py --dry-run` prints."""
    found = {}
    for classes in ("100", "1000", "10x", "20x", "50x"):
        chosen = ["100", "--images-per-class", classes] if classes.endswith("x") else [classes]
        command = [sys.executable, "generate.py", "--classes", *chosen, "--dry-run"]
        without_cards = os.environ | {"PATH": ""}  # no nvidia-smi: the figures are those of a machine without a GPU
        done = subprocess.run(command, cwd=ROOT, env=without_cards, capture_output=True, text=True, check=True)
        words = {"images": r"^images: (\S+)", "hours": r"^GPU hours: (\S+)", "GB": r"^disk: about (\S+) GB"}
        values = {key: re.search(pattern, done.stdout, re.M) for key, pattern in words.items()}
        found[classes] = {key: float(value[1].replace(",", "")) for key, value in values.items() if value}
        assert "published for Stable Diffusion 1.x on an A100" in done.stdout
        assert len(found[classes]) == 3
    return found


def agrees(shown: str, value: float) -> bool:
    """Whether SHOWN ("237", "23.5", "1,281,167") is VALUE, rounded to the digits shown."""
    digits = len(shown.partition(".")[2])
    return float(shown.replace(",", "")) == round(value, digits)


def test_the_readmes_figures_are_the_planners(plans):
    for label, key in {"images": "images", "GPU hours of generation": "hours", r"disk \(JPEG, 512 px\)": "GB"}.items():
        row = re.search(rf"^\| {label}[^|]*\| ([\d,.]+)(?: GB)? \| ([\d,.]+)(?: GB)? \|$", read("README.md"), re.M)
        assert row, label
        assert agrees(row[1], plans["100"][key]) and agrees(row[2], plans["1000"][key]), row[0]


def test_the_papers_costs_are_the_planners(plans):
    rows = re.findall(r"^\| [^|]+ \| ([\d,]+) \| ([\d.]+) \| (\d+) GB \|", read("docs/reproduce-the-paper.md"), re.M)
    assert len(rows) == 12
    for images, hours, disk in rows:
        plan = next(plan for plan in plans.values() if agrees(images, plan["images"]))
        assert agrees(hours, plan["hours"]) and agrees(disk, plan["GB"])


def test_the_disk_of_features_is_counted():
    from utils.evaluation.catalog import SETS

    counts = {"ImageNet test sets": sum(row.images[1] for row in SETS.values() if row.group == "imagenet")}
    for group, name in {"small": "small transfer sets", "inat": "iNaturalist", "cog": "ImageNet-CoG"}.items():
        counts[name] = sum(row.trainval + row.images[1] for row in SETS.values() if row.group == group)
    counts["| all"] = sum(counts.values())
    rows = re.findall(r"^ +(\|.+) \| ([\d,]+) \| ([\d.]+) GB \|$", read("docs/reproduce-the-paper.md"), re.M)
    assert len(rows) == len(counts) == 5
    for (label, images, size), (name, count) in zip(rows, counts.items(), strict=True):
        assert name in label and agrees(images, count) and agrees(size, count * 2048 * 2 / 1e9)


def test_messages_that_head_an_answer_are_in_the_code():
    """Of a heading in backticks every part between its `…` is part of a message of some program."""
    code = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py")])
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # neighbouring literals are one
    code = re.sub(r"\{[^{}]*\}", "…", code)  # values of an f-string
    messages = re.findall(r"^## `(.+)`$", read("docs/faq.md"), re.M)
    assert len(messages) >= 5
    for message in messages:
        for part in filter(None, (part.strip(" …") for part in message.split("…"))):
            assert part in code, f"{part!r} of {message!r}"


def test_the_site_file_of_the_cluster_page_is_understood(tmp_path):
    (block,) = re.findall(
        r"^ {4}\S.*\n(?:(?: {4}.*)?\n)*", read("docs/cluster.md").split("## A site file")[1].split("\n## ")[0], re.M
    )
    site = tmp_path / "site.toml"
    site.write_text(textwrap.dedent(block))
    options = {name: site_options(site, [name], launch.get_args_parser()) for name in ("generate", "train", "evaluate")}
    assert "--partition=gpu" in options["evaluate"] and len(options["evaluate"]) == 8
    assert "--array-parallelism=64" in options["generate"] and "--nodes=2" in options["train"]
    for script, chosen in options.items():
        args = launch.get_args_parser().parse_args([*chosen, f"{script}.py"])
        assert args.gpus_per_node == {"generate": 1, "train": 4, "evaluate": 1}[script]


# ===== the mistakes of the first hour =====


def mistakes() -> list[tuple[str, str]]:
    """(command, what it prints) of the page's section, without those that need a trained run: they name runs/."""
    section = read("docs/first-hour.md").split("\n## Mistakes\n")[1]
    found = []
    for block in re.findall(r"^```\n(.*?)^```$", section, re.M | re.S):
        for piece in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, *printed = piece.splitlines()
            assert printed, f"{command} prints nothing"
            found.append((command, " ".join(printed)))
    assert len(found) >= 40
    return [(command, printed) for command, printed in found if "runs/" not in command]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """This repository as links in a folder whose data/ and runs/ are its own, with the demo's real images."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in ("data", "runs") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    for part in ("real", "test"):
        export_fashion.write_set(folder / "data/fashion" / part, export_fashion.clothes(part))
    return folder


@pytest.fixture(scope="module")
def cut(clone) -> None:
    """data/cut as the page begins it, with no image drawn: of 11 chunks the last has none of ten classes."""
    (command, *_) = re.findall(r"^\$ python (generate\.py .* --out data/cut)$", read("docs/first-hour.md"), re.M)
    arguments = [*shlex.split(command), "--chunk", "10/11"]
    subprocess.run([sys.executable, *arguments], cwd=clone, capture_output=True, check=True)


@pytest.mark.parametrize("command,printed", mistakes(), ids=lambda text: text[:60])
def test_a_mistake_is_refused_in_the_words_of_the_page(command, printed, clone, request):
    if "data/cut" in command:
        request.getfixturevalue("cut")
    before = sorted(path for path in clone.glob("data/**/*") if path.is_file())
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=clone, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2
    lines = [
        re.sub(r"\b\d+ CUDA devices", "0 CUDA devices", re.sub(r"^Makefile:\d+:", "Makefile:", line)).removesuffix(
            ".  Stop."
        )
        for line in done.stderr.splitlines()
    ]
    pattern = ".*".join(map(re.escape, printed.split("...")))  # where the page leaves something out
    assert any(re.fullmatch(pattern, line) for line in lines), done.stderr
    assert sorted(path for path in clone.glob("data/**/*") if path.is_file()) == before
    assert not (clone / "runs").exists()


# ===== the table of faults =====


def test_every_fault_of_the_reliability_page_is_held_by_a_test_that_is_there():
    rows = [line for line in read("docs/reliability.md").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| tried |")]
    assert len(rows) >= 80
    for row in rows:
        found = re.search(r"\| `([\w/]+\.py)::(test_\w+)` \|$", row)
        assert found and re.search(rf"^def {found[2]}\(", read(f"tests/{found[1]}"), re.M), row
