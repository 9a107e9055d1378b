"""The rules of the tree, read from the imports: which stage may use which, and how large anything may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UTILS = ROOT / "utils"
SHARED = {"cli", "storage", "machine", "classes", "images", "model", "metrics"}
STAGES = {"generation", "dataset", "training", "evaluation", "report", "launch", "study"}
CROSSINGS = {("generation", "dataset"), ("report", "evaluation")}
# A study runs through the launcher and reads what evaluate.py wrote, as a report does.
CROSSINGS |= {("study", "launch"), ("study", "evaluation"), ("study", "report")}
MOST_LINES = 15_885  # scripts and utils together
SCRIPTS = ("generate.py", "train.py", "evaluate.py")
SOURCES = [ROOT / name for name in SCRIPTS] + sorted(UTILS.rglob("*.py"))


def imports(source: str) -> set[str]:
    """Dotted names that a source imports, wherever in the file: "utils.cli", "utils.training.step" ..."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def stage_of(path: Path) -> str:
    """The stage that a file of utils belongs to; "" for the shared ones."""
    parent = path.relative_to(UTILS).parts[0]
    return parent if parent in STAGES else ""


def wrong_arrows(stage: str, source: str) -> set[str]:
    """What a source of STAGE imports and may not."""
    allowed = {stage} | {target for user, target in CROSSINGS if user == stage}
    used = {name.split(".")[1] for name in imports(source) if name.startswith("utils.")}
    scripts = {name.split(".")[0] for name in imports(source)} & {name.removesuffix(".py") for name in SCRIPTS}
    return {name for name in used if name not in SHARED | allowed} | scripts


@pytest.mark.parametrize("path", sorted(UTILS.rglob("*.py")), ids=lambda path: str(path.relative_to(UTILS)))
def test_a_stage_imports_itself_and_the_shared_files_only(path):
    assert not wrong_arrows(stage_of(path), path.read_text(encoding="utf-8"))


def test_a_forbidden_arrow_is_seen():
    assert wrong_arrows("training", "from utils.evaluation import probes") == {"evaluation"}
    assert wrong_arrows("dataset", "def f():\n    import utils.generation.plan") == {"generation"}
    assert wrong_arrows("", "from utils.report.page import write_report") == {"report"}
    assert (
        wrong_arrows("evaluation", "from train import main") == wrong_arrows("evaluation", "import train") == {"train"}
    )
    assert not wrong_arrows("report", "from utils.evaluation import jobs\nfrom utils.cli import run")


def test_no_script_imports_another():
    for name in SCRIPTS:
        found = imports((ROOT / name).read_text(encoding="utf-8"))
        assert not {other.split(".")[0] for other in found} & {script.removesuffix(".py") for script in SCRIPTS}


def test_the_listing_is_the_architecture():
    entries = {path.name for path in UTILS.iterdir()} - {"__pycache__"}
    assert entries == {f"{name}.py" for name in SHARED} | STAGES | {"__init__.py"}
    assert len(entries) <= 15
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} >= STAGES
    for path in UTILS.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} does not say what it holds"


def test_files_and_functions_stay_readable():
    total = 0
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        total += lines
        assert lines <= (450 if path.parent == ROOT else 350), f"{path.name} has {lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 90, f"{path.name}: {node.name} has {length} lines"
    assert total <= MOST_LINES, f"{total} lines: a new capability is paid for by what it lets you delete"


def test_no_library_takes_a_script_s_arguments():
    own_parser = {
        UTILS / "launch",
        UTILS / "study" / "__main__.py",
        UTILS / "generation" / "prompts.py",
        UTILS / "cli.py",
    }
    for path in SOURCES:
        if path.parent == ROOT or {path, path.parent} & own_parser:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                notes = [ast.unparse(argument.annotation) for argument in node.args.args if argument.annotation]
                assert not any("Namespace" in note for note in notes), f"{path.name}: {node.name}"


def test_public_functions_say_what_they_do():
    silent = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                silent += [f"{path.name}:{node.name}"] * (ast.get_docstring(node) is None)
    assert not silent, ", ".join(silent)
