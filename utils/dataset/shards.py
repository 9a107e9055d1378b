"""A complete dataset as WebDataset tar shards: OUT/shards/<name>-<nnnnnn>.tar and OUT/shards/index.json.

A sample is three members of the same stem: <id>_<index>.jpg, .json (id, label, prompt, seed, ...) and .cls, the
label. Samples are spread over the shards by the hash of their file, so that a shard read from its
start is a random mix of classes. The same dataset gives the same bytes. Imports no torch.
"""

from __future__ import annotations

import io
import json
import tarfile
from functools import cache
from pathlib import Path

from utils.cli import UserError
from utils.dataset.folder import Dataset
from utils.storage import atomic_path, sha256_bytes, sha256_file, write_json

IMAGES_A_SHARD = 10_000  # about 1 GB at 512 px: WebDataset's own advice


def write_shards(dataset: Dataset) -> str:
    """Write what is missing of the shards; return one line about them. UserError if an image is missing."""
    from tqdm import tqdm

    samples = []  # (hash, class position, index): 100 bytes an image
    for label, folder in enumerate(dataset.folders):
        done = folder.done()
        if len(done) < folder.count:
            raise UserError(
                f"--pack: {folder.id} has {len(done)} of {folder.count} images; draw the rest first (same command "
                "without --pack)"
            )
        samples += [(entry["sha256"], label, index) for index, entry in done.items()]
    samples.sort()
    parts = [samples[start : start + IMAGES_A_SHARD] for start in range(0, len(samples), IMAGES_A_SHARD)]

    target = dataset.root / "shards"
    target.mkdir(exist_ok=True)
    index = []
    for number, part in enumerate(tqdm(parts, unit="shard", desc="pack")):
        path = target / f"{dataset.info['name']}-{number:06d}.tar"
        digest = sha256_bytes(json.dumps(part).encode())
        note = path.with_suffix(".json")
        if not (path.exists() and note.exists() and json.loads(note.read_text())["samples"] == digest):
            write_shard(dataset, path, part)
            write_json(note, {"file": path.name, "images": len(part), "samples": digest, "sha256": sha256_file(path)})
        index.append(json.loads(note.read_text()))
    write_json(target / "index.json", {"images": len(samples), "shards": index})
    return f"{target}: {len(samples)} images in {len(parts)} shards"


def write_shard(dataset: Dataset, path: Path, part: list[tuple[str, int, int]]) -> None:
    entries_of = cache(lambda label: dataset.folders[label].entries())  # each manifest is read once a shard
    with atomic_path(path, fsync=True) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sha256, label, index in part:
            folder = dataset.folders[label]
            entry = entries_of(label)[index]
            data = folder.path(index).read_bytes()
            if sha256_bytes(data) != sha256:
                raise UserError(f"--pack: {folder.path(index)} is damaged; run --repair first")
            stem = folder.path(index).stem.replace(".", "_")  # WebDataset cuts names at their first dot
            about = json.dumps(entry | {"label": label}, ensure_ascii=False).encode()
            for suffix, content in ((folder.suffix, data), (".json", about), (".cls", str(label).encode())):
                member = tarfile.TarInfo(stem + suffix)
                member.size, member.mode = len(content), 0o644  # time and owner stay 0
                tar.addfile(member, io.BytesIO(content))
