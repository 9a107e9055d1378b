"""Where an image's class is written: in the name of its folder or tar member, in a .cls beside it, in --label-map."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.classes import read_list, read_table, safe_id
from utils.cli import UserError
from utils.storage import open_regular

Places = dict[tuple[Path, str], tuple[int, int]]  # (shard, stem of a sample) -> (offset, size) of its .cls


def class_of(member: str) -> str:
    """The class id in the name of a tar member: its folder, else what precedes the last underscore, else ""."""
    folder, _, name = member.rpartition("/")
    return folder.rpartition("/")[2] if folder not in ("", ".") else name.rpartition("_")[0]


def class_beside(shard: Path, name: str, labels: Places) -> str:
    """The class number in the .cls beside the image NAME of SHARD. UserError without one."""
    offset, size = labels.get((shard, name.rpartition(".")[0]), (0, 0))
    with open_regular(shard) as file:
        text = os.pread(file.fileno(), min(size, 20), offset).decode(errors="replace").strip()
    if not text.isdecimal():
        remedy = "name members <id>/<name> or <id>_<number>, or add a .cls with a number"
        raise UserError(f"--data: {shard}: nothing says of which class {name} is; {remedy}")
    return str(int(text))


def read_label_map(path: Path) -> dict[str, str]:
    """{name or index: class id} of --label-map: a .tsv with the columns `name` and `id`, or a list of ids from index 0.

    UserError if a name or an id stands there twice: two classes would become one.
    """
    if path.suffix.lower() == ".tsv":
        rows = read_table(path, {"name": "name", "index": "name", "id": "id", "wnid": "id"}, required=("name", "id"))
        pairs = [(line, cells["name"], cells["id"]) for line, cells in rows]
    else:
        pairs = [(line, str(index), entry) for index, (line, entry) in enumerate(read_list(path))]
    found: dict[str, str] = {}
    for line, name, wnid in pairs:
        if name in found or safe_id(wnid, f"{path}, line {line}") in found.values():
            raise UserError(f"--label-map {path}, line {line}: {name!r} or {wnid!r} stands there twice; name each once")
        found[name] = wnid
    return found


def renamed(class_ids: Sequence[str], label_map: Mapping[str, str]) -> list[str]:
    """CLASS_IDS with those of LABEL_MAP for the names it has. UserError if two classes would become one."""
    found = [label_map.get(one, one) for one in class_ids]
    if twice := [one for one in found if found.count(one) > 1]:
        raise UserError(f"--label-map: {twice[0]} is one class already and another's new name; each needs its own")
    return found
