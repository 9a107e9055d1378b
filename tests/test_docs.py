"""README and docs: links lead somewhere, the tree is the tree, commands exist and those of one guide run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "prompts/README.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_readmes_tree_is_the_tree():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("## More")[0]
    names = re.findall(r"^    (\S+) {2,}\S", tree, re.M)
    assert len(names) >= 12
    for name in names:
        assert (ROOT / name).exists(), name
        assert name.endswith("/") == (ROOT / name).is_dir()
    for required in ("Dockerfile", "environment.yml", "Makefile", "generate.py", "train.py", "evaluate.py", "prompts/"):
        assert required in names


def commands(page, start):
    """Indented lines of PAGE that begin with START, without their comments."""
    lines = re.findall(rf"^    ({re.escape(start)} .*)$", page.read_text(encoding="utf-8"), re.M)
    return [re.split(r" +# ", line)[0].strip() for line in lines]


def test_make_commands_name_known_targets_and_variables():
    found = [command for page in PAGES for command in commands(page, "make")]
    assert len(found) >= 6
    for command in found:
        if "..." in command or "…" in command:
            continue
        done = subprocess.run(["bash", "-c", f"{command} --dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_options_named_in_the_docs_exist():
    import evaluate
    import generate
    import train

    for script in (generate, train, evaluate):
        known = set(re.findall(r"--[a-z][a-z0-9-]+", script.get_args_parser().format_help()))
        pattern = rf"{script.__name__}\.py ([^`\n|#]*)"
        for page in PAGES:
            text = page.read_text(encoding="utf-8").split("\n## Mistakes\n")[0]  # which shows wrong options on purpose
            for arguments in re.findall(pattern, text):
                unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", arguments)) - known - {"--debug"}
                assert not unknown, f"{page.name}: {script.__name__}.py has no {unknown}"


def test_your_own_dataset_in_four_commands(tmp_path):
    page = ROOT / "docs/your-own-dataset.md"
    table = re.findall(r"^    ([^\t\n]+\t.+)$", page.read_text(encoding="utf-8"), re.M)
    assert len(table) == 4
    (tmp_path / "birds.tsv").write_text("\n".join(table) + "\n", encoding="utf-8")
    (tmp_path / "models").symlink_to(ROOT / "models")
    four = commands(page, "python")
    assert len(four) == 4
    for command in four:
        script, *arguments = command.split()[1:]
        arguments = ["24" if argument == "40" else argument for argument in arguments]  # images a class
        if script == "generate.py":
            arguments += ["--steps", "6"]
        if script == "train.py":
            arguments += ["--epochs", "3"]
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert "birds" in done.stdout
    assert (tmp_path / "runs/birds_sd/results.jsonl").is_file()
