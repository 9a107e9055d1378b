"""Features kept on disk: blocks with a checksum each, joined to one file that is verified whenever it is read.

An entry is a folder with

    key.json                    what the features are of, for people
    block_<start>.<hash>.npy    a block, named by its own sha256, until all are there and joined
    features.npy, features.json all of them, and the checksum of each block

What fails its checksum is computed again, that block alone, and said so. A flipped bit or a file of zeros is never
measured.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from utils import storage
from utils.cli import UserError

BLOCK = 1024  # images a block: a killed run loses at most this many, and several processes share the work by blocks
MOST_BLOCK = 4 << 30  # bytes


class Joined(msgspec.Struct):
    """features.json: the form of features.npy, and the sha256 of each block's numbers."""

    shape: tuple[int, int]
    dtype: str
    sha256: list[str]


class FeatureCache:
    """One entry: features (COUNT, D) of COUNT images in their order."""

    def __init__(self, entry: Path, count: int) -> None:
        self.entry, self.count = entry, count
        self.starts = range(0, count, BLOCK)

    def read(self) -> np.ndarray | None:
        """The features as a read-only memory map if they are complete and every checksum holds, else None."""
        kept, right = self._joined()
        return kept if len(right) == len(self.starts) else None

    @contextmanager
    def owned(self, what: str) -> Iterator[np.ndarray | None]:
        """The entry as its only writer; yields the features if they are complete. Waits for another run that has it."""
        waiting = f"{what}: another run is computing these features; waiting for it"
        with storage.owner_lock(self.entry / "lock", wait=waiting):
            yield self.read()

    def blocks(self, what: str) -> dict[int, np.ndarray]:
        """start -> block of what is there and right; says how many of WHAT are damaged. For the entry's owner."""
        storage.remove_leftovers(self.entry)  # of killed writers
        _, found = self._joined()
        damaged = len(self.starts) - len(found) if (self.entry / "features.npy").exists() else 0
        for path in sorted(self.entry.glob("block_*.npy")):
            block = _read_block(path)
            if block is None:
                damaged += 1
                path.unlink()
            else:
                found[int(path.name[6:14])] = block
        if damaged:
            print(f"{what}: {damaged} blocks of the feature cache fail their checksum; computed again", flush=True)
        return {start: block for start, block in found.items() if len(block) == min(BLOCK, self.count - start)}

    def write_block(self, start: int, block: np.ndarray) -> None:
        """Keep the features of the images from START on."""
        file = io.BytesIO()
        np.save(file, block)
        data = file.getvalue()
        storage.atomic_write(self.entry / f"block_{start:08d}.{storage.sha256_bytes(data)[:16]}.npy", data, fsync=True)

    def join(self, what: str) -> np.ndarray:
        """Write features.npy from all blocks, remove them, and read it. Each is verified once more on its way."""
        blocks = self.blocks(what)
        if len(blocks) < len(self.starts):
            remedy = "the disk loses data, choose another with --out"
            raise UserError(f"{self.entry}: blocks that were just written fail their checksum; {remedy}")
        first = blocks[0]
        shape = (self.count, first.shape[1])
        hashes = [storage.sha256_bytes(blocks[start].data) for start in self.starts]
        header = np.lib.format.header_data_from_array_1_0(first) | {"shape": shape}
        # The checksums first: with an older or no features.npy beside them they do not hold, and that is seen.
        storage.write_json(self.entry / "features.json", msgspec.to_builtins(Joined(shape, first.dtype.str, hashes)))
        # Written, not mapped: a full disk is then an error instead of a signal that ends the process.
        with storage.atomic_path(self.entry / "features.npy", fsync=True) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in self.starts:
                file.write(blocks[start].data)
        for path in self.entry.glob("block_*.npy"):
            path.unlink()
        return np.load(self.entry / "features.npy", mmap_mode="r")

    def _joined(self) -> tuple[np.ndarray | None, dict[int, np.ndarray]]:
        """(features.npy, start -> block of it that is right); (None, {}) where it is missing or not of its form."""
        try:
            record = storage.read_json(self.entry / "features.json", Joined)
            kept = np.load(self.entry / "features.npy", mmap_mode="r", allow_pickle=False)
        except Exception:  # a damaged header raises anything: ValueError, SyntaxError, TokenError, OverflowError ...
            return None, {}
        form = (kept.shape, kept.dtype.str, len(kept), len(record.sha256))
        if form != (record.shape, record.dtype, self.count, len(self.starts)) or not kept.flags.c_contiguous:
            return None, {}
        blocks = {start: kept[start : start + BLOCK] for start in self.starts}
        recorded = dict(zip(self.starts, record.sha256, strict=True))
        return kept, {at: one for at, one in blocks.items() if storage.sha256_bytes(one.data) == recorded[at]}


def _read_block(path: Path) -> np.ndarray | None:
    """The block in a file if its name holds the file's hash, else None."""
    try:
        data = storage.read_regular(path, MOST_BLOCK)
        if path.name.split(".")[1] != storage.sha256_bytes(data)[:16] or not path.name[6:14].isdigit():
            return None
        return np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: joining takes no memory
    except (OSError, IndexError):  # its content is what was written: np.load knows it
        return None
