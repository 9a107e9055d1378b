"""The four files that describe one environment (requirements.in, its lock, environment.yml, Dockerfile) agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.11"


def pins(name: str) -> dict[str, Requirement]:
    """The direct requirements of a .in file, comments and `-c` lines left out."""
    lines = [line.split("  #")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def locked(name: str) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """{package: [(requirement, hashes), ...]} of a lock; a package may have several lines, apart by their markers."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(), flags=re.M).replace("\\\n", " ")
    entries: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for line in filter(str.strip, text.splitlines()):
        words = line.split("--hash=")
        requirement = Requirement(words[0].strip())
        entries.setdefault(canonicalize_name(requirement.name), []).append(
            (requirement, [word.strip() for word in words[1:]])
        )
    return entries


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_every_pin_is_in_the_lock_at_its_version(name):
    lock = locked(f"{name}.lock")
    wanted = pins(f"{name}.in")
    assert len(wanted) >= 10
    for package, requirement in wanted.items():
        assert str(requirement.specifier).startswith("=="), f"{requirement} is not pinned"
        assert package in lock, f"{package} is in {name}.in, not in {name}.lock: make lock"
        assert {str(entry.specifier) for entry, _ in lock[package]} == {str(requirement.specifier)}, package


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_every_locked_package_has_one_version_and_hashes(name):
    for package, entries in locked(name).items():
        for requirement, hashes in entries:
            assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), requirement
            assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), package


def test_the_two_locks_hold_the_same_version_of_what_both_need():
    runtime, development = locked("requirements.lock"), locked("requirements-dev.lock")
    both = runtime.keys() & development.keys()
    assert "torch" in both  # through timm
    for package in both:
        assert {str(r.specifier) for r, _ in development[package]} <= {str(r.specifier) for r, _ in runtime[package]}


def test_xformers_is_wanted_on_linux_on_x86_64_only():
    ((requirement, _),) = locked("requirements.lock")["xformers"]
    for marker in (pins("requirements.in")["xformers"].marker, requirement.marker):
        assert marker is not None
        where = {"platform_system": "Linux", "sys_platform": "linux", "platform_machine": "x86_64"}
        assert marker.evaluate(where)
        assert not marker.evaluate({**where, "platform_machine": "aarch64"})
        assert not marker.evaluate({**where, "platform_system": "Darwin", "sys_platform": "darwin"})


def test_conda_gets_the_same_python_and_the_same_lock():
    wanted = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert wanted["name"] == "imagenet-sd"
    conda = [entry for entry in wanted["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in wanted["dependencies"] if isinstance(entry, dict)]
    # Nothing but Python itself from conda: a second torch or numpy beside the lock's would win or lose by chance.
    assert conda == [f"python={PYTHON}", "pip"]
    assert pip == ["-r requirements.lock"]


def test_the_image_has_the_same_python_and_installs_the_same_lock_by_hash():
    dockerfile = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    assert set(re.findall(r"\bpython(3\.\d+)", dockerfile)) == {PYTHON}
    (install,) = re.findall(r"pip\"? install (.*)", dockerfile)
    assert "--require-hashes" in install and "-r /app/requirements.lock" in install
    # The lock is the whole resolution. Resolving again fails as soon as a package that some other one asks for with an
    # extra (coverage[toml]) has a newer release: pip wants the hash of that.
    installs = re.findall(r"pip\"? install .*-r \S*requirements.*", dockerfile + read("Makefile").replace("\\\n", " "))
    assert len(installs) == 3 and all("--no-deps --require-hashes" in line for line in installs)
    assert "COPY requirements.lock /app/requirements.lock" in dockerfile
    # The Makefile inside the image must find its stamp, or it would install into the image at run time.
    assert "cksum < /app/requirements.lock" in dockerfile and "cat requirements.lock | cksum" in read("Makefile")


def test_the_tools_are_set_to_the_same_python():
    assert f'python_version = "{PYTHON}"' in read("pyproject.toml")
    assert f'target-version = "py{PYTHON.replace(".", "")}"' in read("pyproject.toml")
    assert f"--python-version {PYTHON}" in read("Makefile")
    assert f"foreach v,{PYTHON} " in read("Makefile"), "the Makefile prefers another Python"


def read(name: str) -> str:
    return (ROOT / name).read_text()
