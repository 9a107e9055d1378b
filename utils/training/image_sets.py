"""Where training images come from: class folders or tar shards, by number, in compact arrays that workers can share."""

import hashlib
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.classes import load_classes
from utils.cli import UserError, few
from utils.images import IMAGE_SUFFIXES, BadImage, in_label_order, list_image_folder, read_image, stat_files
from utils.storage import open_regular, read_json
from utils.training.distributed import print0
from utils.training.labels import Places, class_beside, class_of, renamed

MOST_OPEN = 64  # shards a process keeps open: a limit of 1024 files is usual, and a set may have more shards


class ImageSet:
    """Images 0..N-1 with labels (N,), sorted by class id and name. Subclasses read them."""

    mend = "--verify` finds such images, --repair draws them again"

    def __init__(self, root: Path, class_ids: list[str], labels: np.ndarray, names: np.ndarray):
        self.root, self.class_ids, self.labels, self.names = root, class_ids, labels, names
        self.digests: np.ndarray | None = None  # (N, 32) uint8: SHA-256 of each file, where a manifest records it

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def synthetic(self) -> bool:
        """Whether the images are a generated dataset's, which has a dataset.json."""
        ours = self.home == self.root or self.root.name in ("train", "shards")
        return ours and (self.home / "dataset.json").is_file()

    @property
    def home(self) -> Path:
        """The folder whose dataset.json, if there is one, describes the images."""
        return self.root.parent

    def source(self) -> dict[str, str | bool]:
        """As args.json records it: a report says what models were trained on, and by which grade of supervision."""
        recipe = read_json(self.home / "dataset.json").get("recipe") if self.synthetic else {}
        grade = recipe.get("supervision") if isinstance(recipe, dict) else None
        return {"path": str(self.root.resolve()), "synthetic": self.synthetic, "supervision": str(grade or "")}

    def name(self, index: int) -> str:
        """The image's path as a person would look for it."""
        return f"{self.root}/{os.fsdecode(self.names[index])}"

    def read(self, index: int) -> bytes:
        """The encoded image. Raises BadImage."""
        raise NotImplementedError

    def locations(self) -> list[str | tuple[str, int, int]]:
        """Where each image lies: a file, or (tar file, offset, bytes)."""
        return [self.name(index) for index in range(len(self))]

    def stamps(self) -> np.ndarray:
        """(N, 2) int32: size and time of change of each file modulo 2^31, -1 where it is gone."""
        stamps = stat_files([self.name(row) for row in range(len(self))])
        return np.where(stamps < 0, -1, stamps % 2**31).astype(np.int32)

    def keep(self, rows: np.ndarray) -> None:
        """Keep only ROWS."""
        self.labels, self.names = self.labels[rows], self.names[rows]
        self.digests = self.digests[rows] if self.digests is not None else None

    def keep_known(self, known: Iterable[tuple[str, Mapping[str, str]]]) -> list[str]:
        """Keep the images of a manifest, KNOWN: (class id, {file name: sha256}) ...; the names of the others."""
        digests, is_known = np.zeros((len(self), 32), np.uint8), np.zeros(len(self), bool)
        for class_id, hashes in known:
            packed = {as_packed(name): bytes.fromhex(sha256) for name, sha256 in hashes.items()}
            for row in self.rows_of(class_id):
                if digest := packed.get(as_packed(self.file_name(row))):
                    digests[row], is_known[row] = np.frombuffer(digest, np.uint8), True
        strays = [self.name(row) for row in np.flatnonzero(~is_known).tolist()]
        self.digests = digests
        self.keep(np.flatnonzero(is_known))
        return strays

    def rows_of(self, class_id: str) -> range:
        """The images of a class, none if it is not in the set."""
        label = self.class_ids.index(class_id) if class_id in self.class_ids else -1
        return range(*np.searchsorted(self.labels, [label, label + 1]).tolist())

    def file_name(self, row: int) -> str:
        """The image's path below its class folder."""
        return os.fsdecode(self.names[row]).partition("/")[2]

    def read_verified(self, index: int) -> bytes:
        """As `read`, and BadImage if a manifest records other bytes. Hashing takes a hundredth of decoding's time."""
        data = self.read(index)
        if self.digests is not None and hashlib.sha256(data).digest() != self.digests[index].tobytes():
            remedy = f"`python generate.py --out {self.root.parent} {self.mend}"
            raise BadImage(f"{self.name(index)}: not the bytes that the dataset's manifest records; {remedy}")
        return data

    def limit(self, images_per_class: int) -> None:
        """Keep the first IMAGES_PER_CLASS images of every class: subsets are nested, larger ones hold smaller ones."""
        counts = np.bincount(self.labels, minlength=len(self.class_ids))
        first = np.cumsum(counts) - counts
        self.keep(np.flatnonzero(np.arange(len(self)) - first[self.labels] < images_per_class))

    def select(self, class_ids: list[str]) -> None:
        """Keep the images of CLASS_IDS and number the classes as it does, those without an image included."""
        number_of = {class_id: label for label, class_id in enumerate(class_ids)}
        self.labels = np.array([number_of.get(one, -1) for one in self.class_ids])[self.labels]
        self.class_ids = list(class_ids)
        rows = np.argsort(self.labels, kind="stable")
        self.keep(rows[self.labels[rows] >= 0])

    def rename(self, label_map: Mapping[str, str]) -> None:
        """Give the classes that LABEL_MAP names its ids, and number all in the order of the new ids."""
        self.class_ids = renamed(self.class_ids, label_map)
        self.select(in_label_order(self.class_ids))

    def summary(self) -> str:
        """Their number and a hash of which images of which classes these are: a resumed run must see the same list."""
        digest = hashlib.sha256("\n".join(self.class_ids).encode())
        digest.update(self.labels.tobytes())
        digest.update(b"\n".join(name.rpartition(b"/")[2] for name in self.names.tolist()))
        return f"{len(self)} images {digest.hexdigest()[:16]}"


class FolderImages(ImageSet):
    """ROOT/<class id>/<image>."""

    def __init__(self, root: Path, option: str = "--data"):
        ids, samples = list_image_folder(root, option)
        names = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in samples])
        super().__init__(root, ids, np.array([label for _, label in samples]), names)

    def read(self, index: int) -> bytes:
        return read_image(self.name(index))


class TarImages(ImageSet):
    """Images inside uncompressed tar shards, read by position: shuffled as freely as files, far fewer inodes.

    The class id is the member's folder (`<id>/<name>.jpg`) or, as in WebDataset's flat naming, what precedes the
    last underscore (`<id>_000001.jpg`). Where names tell no classes apart (`000001.jpg`), it is the number in the
    `.cls` of the same stem.
    """

    mend = "--pack` writes such shards again, those of a dataset that has grown since too"

    def __init__(self, root: Path, shards: list[Path]):
        found = []
        labels: Places = {}  # of the .cls members
        for number, shard in enumerate(shards):
            try:
                with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in filter(tarfile.TarInfo.isfile, tar):
                        name, place = member.name, (member.offset_data, member.size)
                        if name.rpartition("/")[2].startswith("."):
                            continue  # no image: macOS puts what it knows of 1.jpg into ._1.jpg
                        if name.lower().endswith(IMAGE_SUFFIXES):
                            found.append((class_of(name), name, number, *place))
                        elif name.endswith(".cls"):
                            labels[shard, name[:-4]] = place
            except (tarfile.TarError, OSError) as error:
                raise UserError(f"--data: {shard} is no readable tar file ({error}); pack it again") from None
        if not found:
            raise UserError(f"--data: the tar files in {root} hold no image")
        self.root = root
        if len({row[0] for row in found}) == 1 and labels:
            found = [(class_beside(shards[row[2]], row[1], labels), *row[1:]) for row in found]
        # WebDataset cuts names at their first dot, so a packed id has none: dataset.json knows how it was written.
        spelt = {row["id"].replace(".", "_"): row["id"] for row in _dataset_classes(self.home)}
        ids = in_label_order({spelt.get(row[0], row[0]) for row in found})
        number_of = {class_id: label for label, class_id in enumerate(ids)}
        rows = sorted((number_of[spelt.get(row[0], row[0])], *row[1:]) for row in found)
        names = np.array([os.fsencode(row[1]) for row in rows])
        super().__init__(root, ids, np.array([row[0] for row in rows]), names)
        self.shards = [str(shard) for shard in shards]
        self.places = np.array([row[2:] for row in rows], dtype=np.int64)  # (N, 3): shard, offset, size
        self._files: dict[int, int] = {}

    @property
    def home(self) -> Path:
        """That of the dataset around the shards; published ones have its dataset.json beside them."""
        around = (self.root.parent / "dataset.json").is_file() or not (self.root / "dataset.json").is_file()
        return self.root.parent if around else self.root

    def keep(self, rows: np.ndarray) -> None:
        super().keep(rows)
        self.places = self.places[rows]

    def stamps(self) -> np.ndarray:
        return np.stack([self.places[:, 2] % 2**31, np.zeros(len(self))], 1).astype(np.int32)

    def locations(self) -> list[str | tuple[str, int, int]]:
        return [(self.shards[shard], offset, size) for shard, offset, size in self.places.tolist()]

    def file_name(self, row: int) -> str:
        return os.fsdecode(self.names[row]).rpartition("/")[2]

    def read(self, index: int) -> bytes:
        shard, offset, size = self.places[index].tolist()
        if shard not in self._files:
            if len(self._files) == MOST_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        data = os.pread(self._files[shard], size, offset)  # no shared file position: safe after a fork
        if len(data) < size:
            raise BadImage(f"{self.name(index)}: {self.shards[shard]} is truncated")
        return data


def as_packed(name: str) -> str:
    """How a shard spells a file's name: WebDataset cuts at the first dot, so only the suffix has one."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem.replace('.', '_')}{dot}{suffix}"


def open_images(path: str | Path, classes: str | None = None, label_map: Mapping[str, str] | None = None) -> ImageSet:
    """The images at PATH: a generated dataset (PATH/train/<id>/), class folders, or a folder of tar shards.

    A generated dataset names its classes in dataset.json: a class folder that is missing or extra is a UserError.
    With CLASSES (a class table, list or file) the set is cut down to those, each of which must be there. LABEL_MAP, see
    read_label_map, renames the classes of any other folder or shards, all of which it must know.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"--data: no folder {path}; generate it first, or name a folder of class folders")
    if (path / "train").is_dir():
        images: ImageSet = FolderImages(path / "train")
    elif packed := [folder for folder in (path, path / "shards") if any(folder.glob("*.tar"))]:
        images = TarImages(packed[0], sorted(packed[0].glob("*.tar")))
    elif shards := sorted([*path.glob("*.tar.gz"), *path.glob("*.tgz")]):
        remedy = f"unpack all: gunzip {path}/*gz"  # which makes a .tar of a .tgz as well
        raise UserError(f"--data: {shards[0]} is compressed, and images are read by their place in a tar; {remedy}")
    else:
        images = FolderImages(path)
    if label_map and not _dataset_classes(images.home):
        if strange := sorted({*images.class_ids} - {*label_map, *label_map.values()}):
            raise UserError(f"--label-map: no line for {few(strange)} of --data {images.root}; add one for each")
        images.rename(label_map)
    if classes:
        wanted = load_classes(classes).ids
        found = sorted({*images.class_ids} & {*wanted})
        require_same_classes(found, wanted, f"--data {images.root}", f"--classes {classes}")
        images.select(wanted)
    elif (isinstance(images, TarImages) or images.root != path) and (rows := _dataset_classes(images.home)):
        expected = sorted(row["id"] for row in rows)
        require_same_classes(images.class_ids, expected, f"--data {images.root}", "dataset.json")
    return images


def _dataset_classes(folder: Path) -> list[dict]:
    """The classes that FOLDER/dataset.json describes; none without one."""
    path = folder / "dataset.json"
    described = read_json(path) if path.exists() else {}
    rows = described.get("classes") if isinstance(described, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"id", "name"} <= row.keys() for row in rows):
        return []  # someone else's dataset.json
    return rows


def require_same_classes(found: list[str], expected: list[str], where: str, reference: str) -> None:
    """UserError that lists the classes missing from and extra in WHERE, compared with REFERENCE."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        kinds = {"missing": missing, "extra": extra}
        parts = [f"{len(names)} {kind} ({few(names, 5)})" for kind, names in kinds.items() if names]
        raise UserError(f"{where}: class folders differ from {reference}: {'; '.join(parts)}")


def open_sources(
    paths: Sequence[Path],
    images_per_class: int | Sequence[int] | None,
    classes: str | None = None,
    manifests: Callable[[Path], Iterable[tuple[str, Mapping[str, str]]] | None] = lambda dataset: None,
    label_map: Mapping[str, str] | None = None,
) -> list[ImageSet]:
    """The ImageSets of --data, which must agree on their classes; an unfinished dataset is used with a warning.

    IMAGES_PER_CLASS: the first so many of each class only, of all sets alike or one number a set.

    MANIFESTS(folder) -> (class id, {file name: sha256}) ... of a generated dataset, None of any other folder. Files
    that it does not name are left out, with a warning; the others are compared with their hashes when they are read.
    """
    images = [open_images(path, classes=classes, label_map=label_map) for path in paths]
    for one in images:
        dataset = one.root.parent
        known = manifests(dataset) if one.root.name in ("train", "shards") else None
        if known is not None and (strays := one.keep_known(known)):
            strangers = f"{len(strays)} files that the dataset's manifest does not know are left out: {few(strays)}"
            print0(f"warning: --data {one.root}: {strangers}", file=sys.stderr)
        wanted = [(row.get("images", 0), row["id"]) for row in _dataset_classes(one.home) if row["id"] in one.class_ids]
        if missing := sum(max(0, count - len(one.rows_of(class_id))) for count, class_id in wanted):
            lacks = f"{missing} images that dataset.json wants are missing"
            where = f"`python generate.py --out {dataset} --status` shows where"
            print0(f"warning: --data {one.root}: {lacks}; {where}", file=sys.stderr)
    for path, other in zip(paths[1:], images[1:], strict=True):
        require_same_classes(other.class_ids, images[0].class_ids, f"--data {path}", f"--data {paths[0]}")
    if images_per_class:
        limits = [images_per_class] * len(images) if isinstance(images_per_class, int) else images_per_class
        if len(limits) != len(images):
            raise UserError(f"--images-per-class: {len(limits)} numbers for {len(images)} --data; give one or as many")
        for one, limit in zip(images, limits, strict=True):
            one.limit(limit)
    return images


def open_validation(path: str | Path, class_ids: list[str], label_map: Mapping[str, str] | None = None) -> ImageSet:
    """Validation images with the labels of the training classes, of which it may hold more or fewer, but not both."""
    images = FolderImages(Path(path), "--val")
    images.rename(label_map or {})
    missing, extra = sorted({*class_ids} - {*images.class_ids}), sorted({*images.class_ids} - {*class_ids})
    if missing and extra:
        raise UserError(
            f"--val {path}: {len(missing)} training classes are missing, e.g. {missing[0]}, and {len(extra)} class "
            f"folders are none, e.g. {extra[0]}; name the validation images of the training classes"
        )
    if extra:
        print0(f"--val {path}: {len(extra)} class folders that the training data lack are ignored")
    images.select(class_ids)
    return images


def class_names(class_ids: list[str], images: list[ImageSet]) -> list[str]:
    """Names from dataset.json beside the images, else from ImageNet's and the demo's tables, else the ids."""
    names = {row.wnid: row.first_name for table in ("imagenet_1k", "fashion") for row in load_classes(table).rows}
    for one in images:
        names |= {row["id"]: row["name"].split(",")[0].strip() for row in _dataset_classes(one.home)}
    return [names.get(class_id, class_id) for class_id in class_ids]


def dataset_name(path: Path) -> str:
    """The data folder's name; of PATH/train the parent's."""
    path = path.resolve()
    return path.parent.name if path.name in ("train", "shards") else path.name
