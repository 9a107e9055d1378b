"""A complete dataset as WebDataset tar shards: OUT/shards/<name>-<nnnnnn>.tar and OUT/shards/index.json.

A sample is three members of the same stem: <id>_<index>.jpg, .json (id, label, prompt, seed, ...) and .cls, the
label. Samples are spread over the shards by the hash of their file, so that a shard read from its start is a random mix
of classes. The same dataset gives the same bytes; a shard that is there is kept if it has the hash that lies beside it,
else made again. A card makes the folder one to upload, see card.py. Imports no torch.
"""

import glob
import io
import json
import tarfile
from functools import cache
from pathlib import Path

from tqdm import tqdm

from utils.cli import UserError
from utils.dataset.card import withdraw_card, write_card
from utils.dataset.folder import Dataset
from utils.images import MOST_BYTES
from utils.storage import atomic_path, read_json, read_regular, remove_leftovers, sha256_bytes, sha256_file, write_json

IMAGES_A_SHARD = 10_000  # about 1 GB at 512 px: WebDataset's own advice


def write_shards(dataset: Dataset) -> str:
    """Write what is missing of the shards; return one line about them. UserError if an image is missing."""
    ids, samples = [stem_of(folder.id) for folder in dataset.folders], []  # (hash, class position, index)
    if twice := [one for one in ids if ids.count(one) > 1]:
        same = " and ".join(folder.id for folder in dataset.folders if stem_of(folder.id) == twice[0])
        raise UserError(f"--pack: {same} have one name in WebDataset, which ends names at a dot; use the folders")
    for label, folder in enumerate(dataset.folders):
        done = folder.done()
        if len(done) < folder.count:
            raise UserError(f"--pack: {folder.id} has {len(done)} of {folder.count} images; draw the rest first (same "
                            "command without --pack)")  # fmt: skip
        samples += [(entry["sha256"], label, index) for index, entry in done.items()]
    samples.sort()
    parts = [samples[start : start + IMAGES_A_SHARD] for start in range(0, len(samples), IMAGES_A_SHARD)]

    target, name = dataset.root / "shards", dataset.info["name"]
    target.mkdir(exist_ok=True)
    remove_leftovers(target)
    index, written = [], 0
    found = target.glob(f"{glob.escape(name)}-[0-9][0-9][0-9][0-9][0-9][0-9].tar")
    for path in [path for path in found if int(path.stem[-6:]) >= len(parts)]:
        withdraw_card(target)  # of an earlier packing: train.py would read it too
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink()
    for number, part in enumerate(tqdm(parts, unit="shard", desc="pack")):
        path = target / f"{name}-{number:06d}.tar"
        note = {"file": path.name, "images": len(part), "samples": sha256_bytes(json.dumps(part).encode())}
        if not is_as_written(path, note):
            withdraw_card(target)
            write_shard(dataset, path, part)
            written += 1
            write_json(path.with_suffix(".json"), note | {"sha256": sha256_file(path)})
        index.append(read_json(path.with_suffix(".json")))
    write_json(target / "index.json", {"images": len(samples), "shards": index})
    write_card(dataset, index, ids)
    return f"{target}: {len(samples)} images in {len(parts)} shards; {written} written now, the others were whole"


def is_as_written(path: Path, note: dict) -> bool:
    """Whether the shard PATH is there with the samples of NOTE and the hash that lies beside it."""
    try:
        return read_json(path.with_suffix(".json")) == note | {"sha256": sha256_file(path)}
    except (UserError, OSError):
        return False


def stem_of(name: str) -> str:
    """WebDataset cuts names at their first dot."""
    return name.replace(".", "_")


def write_shard(dataset: Dataset, path: Path, part: list[tuple[str, int, int]]) -> None:
    """The samples PART (hash, class position, index) as a tar. UserError names an image that its manifest belies."""
    entries_of = cache(lambda label: dataset.folders[label].entries())  # each manifest is read once a shard
    with atomic_path(path, fsync=True) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sha256, label, index in part:
            folder = dataset.folders[label]
            data = read_regular(folder.path(index), MOST_BYTES)
            if sha256_bytes(data) != sha256:
                raise UserError(f"--pack: {folder.path(index)} is damaged; run --repair first")
            about = json.dumps(entries_of(label)[index] | {"label": label}, ensure_ascii=False).encode()
            for suffix, content in ((folder.suffix, data), (".json", about), (".cls", str(label).encode())):
                member = tarfile.TarInfo(stem_of(folder.path(index).stem) + suffix)
                member.size, member.mode = len(content), 0o644  # time and owner stay 0
                tar.addfile(member, io.BytesIO(content))
