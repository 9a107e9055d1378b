"""The catalogue of test sets: one row each for ImageNet's sets, fifteen transfer datasets, and any folder of classes.

A row says where to get the set, what lies where below --data-root, which function reads it, and the counts of a right
copy: those of its paper or archive and, for transfer datasets, of t-ReX's suite. A copy that differs is refused: its
numbers could not be compared. The order is that of reports. To add a set, add a row.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from utils.cli import UserError, safe_name, shortened
from utils.evaluation import imagenet_sets, transfer_sets
from utils.evaluation.matching import LoadedSet
from utils.images import list_image_folder

# As the paper's tables and its radar plot group the sets. In the last three a linear probe is trained and judged.
GROUPS = {"imagenet": "ImageNet test sets", "small": "8 small sets", "inat": "iNaturalist", "cog": "ImageNet-CoG"}
# ImageNet-V2 is three sets of other images. Which of them the paper's one figure belongs to is not known: in the quoted
# tables it is 1 point below IN-Val, where others' models lose 6 to 8 on the first. Beside it stands the mean of all,
# which flatters nobody should it be the easiest, the last.
V2, V2_VARIANTS = "IN-v2", ("IN-v2-matched", "IN-v2-0.7", "IN-v2-top")
PAPERS_FIVE = ("IN-Val", V2, "IN-Sketch", "IN-R", "IN-A")  # ImageNet sets of the paper's tables, in their order


@dataclass(frozen=True)
class TestSet:
    """One row: how to get the set, what lies where, and the counts that a right copy has."""

    __test__ = False  # not a pytest class

    name: str
    group: str  # one of GROUPS; or a user's own, "folder" for the model's classifier and "transfer" for a probe
    read: Callable[[str, Path, Path], LoadedSet]  # (name, its folder, data root)
    folders: tuple[str, ...]  # tried in this order below --data-root
    classes: int = 0  # 0: any number
    images: tuple[int, int] = (0, 0)  # lowest and highest count of images to judge on; (0, 0): any
    trainval: int = 0  # images to train the probe on
    markers: tuple[str, ...] = ("",)  # one of these lies in the folder, or beside it as "../name"
    layout: str = ""  # below --data-root
    where: str = ""
    note: str = ""
    # Of a set that a call has chosen:
    data_root: str = ""
    asked_for: bool = False  # by name: then a model without its classes is an error

    @property
    def probed(self) -> bool:
        """Whether a linear probe is trained on the set; else the model's own classifier answers."""
        return self.group not in ("imagenet", "folder")

    @property
    def probe(self) -> str:
        """Its kind: the suite's logistic regression on the 8 small sets and a user's own, SGD on the large ones."""
        return "logreg" if self.group in ("small", "transfer") else "sgd"

    @property
    def counts(self) -> str:
        """The counts of a right copy in words."""
        low, high = self.images
        images = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        return _in_words(self.trainval, images, self.classes) + (f"; {self.note}" if self.note else "")

    def find(self, data_root: str | Path) -> Path | None:
        """The set's folder below DATA_ROOT, or None. Looks at names only: counting 50,000 files takes a while."""
        places = (Path(data_root) / folder for folder in self.folders)
        return next((place for place in places if place.is_dir() and self._is_marked(place)), None)

    def _is_marked(self, place: Path) -> bool:
        return any((place.parent / mark[3:] if mark[:3] == "../" else place / mark).exists() for mark in self.markers)

    @cached_property
    def loaded(self) -> LoadedSet:
        """The chosen set, read from disk once; see load."""
        return self.load(self.data_root)

    def load(self, data_root: str | Path) -> LoadedSet:
        """Read the set and check its counts. UserError if it is absent or is not a right copy."""
        folder = self.find(data_root)
        if folder is None:
            where = f"{self.layout}. {self.where}"
            raise UserError(f"{self.name}: not found below {data_root} (--data-root); expected {where}")
        try:
            loaded = self.read(self.name, folder, Path(data_root))
        except OSError as error:
            fault = f"cannot read {error.filename} ({error.strerror})"
            raise UserError(f"{self.name}: {fault}; expected {self.layout}") from None
        except (KeyError, ValueError, IndexError, TypeError) as error:
            fault = f"the annotations below {folder} are not as published ({error!r})"
            raise UserError(f"{self.name}: {fault}; get it again") from None
        low, high = self.images
        found = (len(loaded.class_ids), len(loaded.trainval))
        if high and (found != (self.classes, self.trainval) or not low <= len(loaded.samples) <= high):
            has = _in_words(len(loaded.trainval), f"{len(loaded.samples):,}", found[0])
            remedy = f"a right copy has {self.counts}. Unpack it again. {self.where}"
            raise UserError(f"{self.name}: {folder} has {has}; {remedy}")
        if strays := {label for _, label in [*loaded.samples, *loaded.trainval]} - set(range(found[0])):
            fault = f"the annotations below {folder} have {len(strays)} labels outside of its {found[0]:,} classes"
            raise UserError(f"{self.name}: {fault}; get it again. {self.where}")
        return loaded


def _in_words(trainval: int, images: str, classes: int) -> str:
    both = f"{trainval:,} trainval and {images} test images" if trainval else f"{images} images"
    return f"{both} of {classes:,} classes"


def folder_set(spec: str, rename: Callable[[list[str]], list[str]] = list) -> TestSet:
    """`--test NAME=DIR`: any folder of DIR/<class id>/<images> as a row. UserError if SPEC is none or DIR is absent.

    RENAME gives the ids of its classes other names, see --label-map.
    """
    name, folder = _name_and_folder("--test", spec, "fashion=data/fashion/test", "<class id>/<images>")

    def read(name: str, folder: Path, data_root: Path) -> LoadedSet:
        class_ids, samples = list_image_folder(folder, option=f"--test {name}")
        return LoadedSet(name, rename(class_ids), samples)

    return TestSet(name, "folder", read, (folder,))


def transfer_set(spec: str) -> TestSet:
    """`--transfer NAME=DIR`: any classes, DIR/train/<class>/<images> and DIR/test/<class>/<images>, as a row."""
    name, folder = _name_and_folder("--transfer", spec, "digits=data/digits", "train/<class>/<images> and test/...")

    def read(name: str, folder: Path, data_root: Path) -> LoadedSet:
        halves = {part: list_image_folder(folder / part, option=f"--transfer {name}") for part in ("train", "test")}
        (classes, trainval), (others, samples) = halves.values()
        if differing := sorted(set(classes) ^ set(others)):
            raise UserError(
                f"--transfer {name}: class {differing[0]} is not in both of {folder}/train and {folder}/test"
            )
        return LoadedSet(name, [str(label) for label in range(len(classes))], samples, trainval=trainval)

    return TestSet(name, "transfer", read, (folder,))


def _name_and_folder(option: str, spec: str, example: str, layout: str) -> tuple[str, str]:
    """(name, absolute path) of SPEC, NAME=DIR."""
    name, _, folder = spec.partition("=")
    if not name or not folder or "/" in name:
        raise UserError(f"{option} {shortened(spec)}: expected NAME=DIR, such as {example}")
    safe_name(name, option)
    if not Path(folder).is_dir():
        raise UserError(f"{option} {name}: no folder {folder}; expected {folder}/{layout}")
    return name, str(Path(folder).absolute())


# ===== the sets of one call =====


def choose(
    names: Sequence[str],
    folders: Sequence[str],
    data_root: str,
    transfers: Sequence[str] = (),
    rename: Callable[[list[str]], list[str]] = list,
) -> list[TestSet]:
    """NAMES of sets or groups (--datasets), FOLDERS (--test) and TRANSFERS (--transfer); else every set that is found.

    RENAME: of class folders, see folder_set. UserError for an unknown or doubled name, or where nothing is found.
    """
    chosen: list[TestSet] = []
    for row in [*(folder_set(spec, rename) for spec in folders), *map(transfer_set, transfers)]:
        if row.name in SETS or row.name in (other.name for other in chosen):
            option = "--transfer" if row.probed else "--test"
            raise UserError(f"{option}: the name {row.name} is taken; choose another")
        chosen.append(replace(row, data_root=data_root, asked_for=True))
    if chosen and not names:
        return chosen
    if V2 in names:
        names = [*names, *([name for name in V2_VARIANTS if SETS[name].find(data_root)] or V2_VARIANTS)]
    if unknown := [name for name in names if name not in (*SETS, *GROUPS, V2, "all")]:
        allowed = ", ".join((*GROUPS, "all", *SETS, V2))
        raise UserError(f"--datasets {unknown[0]}: unknown; use {allowed}")
    for row in SETS.values():
        if row.name in names:
            chosen.append(replace(row, data_root=data_root, asked_for=True))
        elif (not names or {row.group, "all"} & set(names)) and row.find(data_root):
            chosen.append(replace(row, data_root=data_root))
    if not chosen:
        remedy = "--list-datasets says where to get them, --test NAME=DIR judges on any folder"
        raise UserError(f"--data-root {data_root}: none of the datasets is there; {remedy}")
    return chosen


def read_all(chosen: Sequence[TestSet], look_at_images: bool) -> tuple[list[TestSet], int]:
    """(the right copies, how many others there are), by their counts and, if wanted, by asking for every image file."""
    whole = []
    for one in chosen:
        try:
            _ = one.loaded.fingerprint if look_at_images else one.loaded
            whole.append(one)
        except UserError as error:
            if one.asked_for:  # by name; one that was merely found is left out
                raise
            print(f"left out: {error}", file=sys.stderr, flush=True)
    return whole, len(chosen) - len(whole)


def list_sets(data_root: str) -> None:
    """Print each set: whether it is found below DATA_ROOT, what belongs where, and where to get it."""
    for row in SETS.values():
        folder = row.find(data_root)
        print(f"{row.name:14} {f'found at {folder}' if folder else 'not found'}")
        print(f"{'':14} layout   {data_root}/{row.layout}")
        print(f"{'':14} content  {row.counts}")
        print(f"{'':14} source   {row.where}\n")
    print("any folder     --test NAME=DIR with DIR/<class id>/<images>, of classes that the model knows")
    print("any classes    --transfer NAME=DIR with DIR/train/<class>/<images> and DIR/test/<class>/<images>: a probe")


# ===== the rows =====


def _imagenet(name: str, read: Callable, images: int | tuple[int, int], classes: int = 1000, **facts) -> TestSet:
    images = (images, images) if isinstance(images, int) else images
    return TestSet(name, "imagenet", read, classes=classes, images=images, **facts)


def _transfer(name: str, read: Callable, counts: tuple[int, int, int], group: str = "small", **facts) -> TestSet:
    """READ: folder -> (trainval, test, classes). COUNTS: (classes, trainval, test)."""
    classes, trainval, test = counts

    def read_set(name: str, folder: Path, data_root: Path) -> LoadedSet:
        train, judged, found = read(folder)
        return LoadedSet(name, [str(label) for label in range(found)], judged, trainval=train)

    return TestSet(name, group, read_set, classes=classes, images=(test, test), trainval=trainval, **facts)


def _v2(name: str, variant: str, *folders: str) -> TestSet:
    return _imagenet(
        f"{V2}-{name}", imagenet_sets.read_v2, 10_000, note="folders are label numbers",
        folders=(f"imagenetv2-{variant}-format-val", f"imagenetv2-{variant}", *folders),
        layout=f"imagenetv2-{variant}-format-val/<0..999>/*.jpeg",
        where=f"Get imagenetv2-{variant}.tar.gz: github.com/modestyachts/ImageNetV2",
    )  # fmt: skip


def _inat(year: int, counts: tuple[int, int, int]) -> TestSet:
    return _transfer(
        f"iNat{year}", partial(transfer_sets.read_inat, year), counts, "inat",
        folders=(f"inat{year}", f"iNat{year}"), markers=(f"train{year}.json",),
        layout=f"inat{year}/train_val{year}/... with train{year}.json and val{year}.json",
        where=f"Get it from github.com/visipedia/inat_comp, {year}",
    )  # fmt: skip


def _cog(level: int, trainval: int) -> TestSet:
    return _transfer(
        f"CoG-L{level}", partial(transfer_sets.read_cog, level), (1000, trainval, 50_000), "cog",
        folders=("cog", "imagenet-cog"), markers=("cog_levels_mapping_file.pkl",),
        layout="cog/images/<wnid>/*.JPEG with cog_levels_mapping_file.pkl and cog_concepts_split_file.pkl",
        where="Get the two pickles: europe.naverlabs.com/cog-benchmark; the images: ImageNet-21K (image-net.org)",
    )  # fmt: skip


# fmt: off
ROWS = [
    _imagenet("IN-Val", imagenet_sets.read_val, 50_000, folders=("imagenet/val", "IN-Val"),
              layout="imagenet/val/<wnid>/*.JPEG, or flat files there and imagenet/ILSVRC2012_devkit_t12/",
              where="Get it from image-net.org (ILSVRC2012_img_val.tar; account needed)"),
    _v2("matched", "matched-frequency", "IN-v2"), _v2("0.7", "threshold0.7"), _v2("top", "top-images"),
    # IN-Sketch: the paper says 50,000, the archive holds 50,889.
    _imagenet("IN-Sketch", imagenet_sets.read_wnid_folders, (50_000, 50_889),
              folders=("sketch", "imagenet-sketch", "IN-Sketch"), layout="sketch/<wnid>/*.JPEG",
              where="Get ImageNet-Sketch.zip: github.com/HaohanWang/ImageNet-Sketch"),
    _imagenet("IN-R", imagenet_sets.read_subset("imagenet_r.txt"), 30_000, 200, note="logits cut to its 200 classes",
              folders=("imagenet-r", "IN-R"), layout="imagenet-r/<wnid>/*.jpg",
              where="Get imagenet-r.tar: github.com/hendrycks/imagenet-r"),
    _imagenet("IN-A", imagenet_sets.read_subset("imagenet_a.txt"), 7_500, 200, note="logits cut to its 200 classes",
              folders=("imagenet-a", "IN-A"), layout="imagenet-a/<wnid>/*.jpg",
              where="Get imagenet-a.tar: github.com/hendrycks/natural-adv-examples"),
    # IN-ReaL: 3,163 of the 50,000 have no label.
    _imagenet("IN-ReaL", imagenet_sets.read_real, 46_837, note="several answers are right",
              folders=("imagenet/val", "IN-Val"), markers=("../real.json",),
              layout="imagenet/val (as for IN-Val) and imagenet/real.json",
              where="Get real.json: github.com/google-research/reassessed-imagenet"),
    # ObjectNet: of its 50,273 images, those whose class ImageNet has.
    _imagenet("ObjectNet", imagenet_sets.read_objectnet, 18_574, 113, note="125 ImageNet classes answer for its 113",
              folders=("objectnet-1.0/images", "ObjectNet/images"), markers=("../mappings",),
              layout="objectnet-1.0/images/<folder>/*.png and objectnet-1.0/mappings/",
              where="Get objectnet-1.0.zip: objectnet.dev (test use only, see its licence)"),
    _transfer("Aircraft", transfer_sets.read_aircraft, (100, 6_667, 3_333),
              folders=("fgvc-aircraft-2013b/data", "aircraft/data", "aircraft"),
              markers=("images_variant_trainval.txt",),
              layout="fgvc-aircraft-2013b/data/images/*.jpg with images_variant_{trainval,test}.txt",
              where="Get fgvc-aircraft-2013b.tar.gz: robots.ox.ac.uk/~vgg/data/fgvc-aircraft"),
    _transfer("Cars196", transfer_sets.read_cars, (196, 8_144, 8_041),
              folders=("stanford_cars", "cars196"), markers=("cars_annos.mat", "devkit"),
              layout="stanford_cars/car_ims/*.jpg with cars_annos.mat, or cars_train/, cars_test/ and devkit/",
              where="Get Stanford Cars (its first home is gone; copies: kaggle.com, search 'stanford cars dataset')"),
    _transfer("DTD", transfer_sets.read_dtd, (47, 3_760, 1_880),
              folders=("dtd", "dtd/dtd"), markers=("labels/train1.txt",),
              layout="dtd/images/<class>/*.jpg with labels/{train,val,test}1.txt",
              where="Get dtd-r1.0.1.tar.gz: robots.ox.ac.uk/~vgg/data/dtd"),
    _transfer("EuroSAT", transfer_sets.read_eurosat, (10, 18_900, 8_100),
              folders=("eurosat/2750", "EuroSAT/2750", "eurosat", "EuroSAT"), markers=("AnnualCrop",),
              layout="eurosat/2750/<class>/*.jpg", where="Get EuroSAT.zip (RGB): github.com/phelber/EuroSAT"),
    _transfer("Flowers", transfer_sets.read_flowers, (102, 2_040, 6_149),
              folders=("flowers-102", "flowers"), markers=("setid.mat",),
              layout="flowers-102/jpg/*.jpg with imagelabels.mat and setid.mat",
              where="Get 102flowers.tgz, imagelabels.mat, setid.mat: robots.ox.ac.uk/~vgg/data/flowers/102"),
    _transfer("Pets", transfer_sets.read_pets, (37, 3_680, 3_669),
              folders=("oxford-iiit-pet", "pets"), markers=("annotations/trainval.txt",),
              layout="oxford-iiit-pet/images/*.jpg with annotations/{trainval,test}.txt",
              where="Get images.tar.gz and annotations.tar.gz: robots.ox.ac.uk/~vgg/data/pets"),
    _transfer("Food101", transfer_sets.read_food, (101, 75_750, 25_250),
              folders=("food-101", "food101"), markers=("meta/train.txt",),
              layout="food-101/images/<class>/*.jpg with meta/{train,test}.txt",
              where="Get food-101.tar.gz: data.vision.ee.ethz.ch/cvl/datasets_extra/food-101"),
    _transfer("SUN397", transfer_sets.read_sun, (397, 19_850, 19_850), folders=("SUN397",),
              markers=("Training_01.txt", "Partitions/Training_01.txt", "partitions/Training_01.txt"),
              layout="SUN397/<letter>/<class>/*.jpg with ClassName.txt, Training_01.txt, Testing_01.txt (or in "
                     "Partitions/)",
              where="Get SUN397.tar.gz and Partitions.zip: vision.princeton.edu/projects/2010/SUN"),
    _inat(2018, (8_142, 437_513, 24_426)),
    _inat(2019, (1_010, 265_213, 3_030)),
    _cog(1, 1_118_804), _cog(2, 1_115_788), _cog(3, 1_095_203), _cog(4, 1_107_128), _cog(5, 1_091_654),
]
# fmt: on
SETS = {row.name: row for row in ROWS}
