"""Each transfer dataset in its real layout, in miniature; the counts of a right copy are shrunk by a table here."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from utils.cli import UserError
from utils.evaluation import catalog, transfer_sets

ROOT = Path(__file__).resolve().parents[2]


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image of " + path.name.encode())


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def aircraft(root):
    base = root / "fgvc-aircraft-2013b/data"
    write(base / "variants.txt", "707-320\nA340 200\n")
    write(base / "images_variant_trainval.txt", "0001 A340 200\n0002 707-320\n0003 707-320\n")
    write(base / "images_variant_test.txt", "0004 A340 200\n")
    touch(*(base / f"images/000{number}.jpg" for number in range(1, 5)))
    return [("0001.jpg", 1), ("0002.jpg", 0), ("0003.jpg", 0)], [("0004.jpg", 1)]


def cars_in_one(root):
    base = root / "stanford_cars"
    kind = [("relative_im_path", object), ("class", object), ("test", object)]
    rows = [("car_ims/1.jpg", 2, 0), ("car_ims/2.jpg", 1, 0), ("car_ims/3.jpg", 1, 1)]
    base.mkdir(parents=True)
    savemat(base / "cars_annos.mat", {"annotations": np.array(rows, dtype=kind)})
    touch(*(base / f"car_ims/{number}.jpg" for number in (1, 2, 3)))
    return [("1.jpg", 1), ("2.jpg", 0)], [("3.jpg", 0)]


def cars_in_two(root):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    kind = [("bbox_x1", object), ("class", object), ("fname", object)]
    trainval = np.array([(5, 2, "1.jpg"), (6, 1, "2.jpg")], dtype=kind)
    test = np.array([(5, 1, "1.jpg"), (5, 2, "2.jpg")], dtype=kind)
    savemat(base / "devkit/cars_train_annos.mat", {"annotations": trainval})
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": test})
    touch(*(base / f"{part}/{n}.jpg" for part in ("cars_train", "cars_test") for n in (1, 2)))
    return [("1.jpg", 1), ("2.jpg", 0)], [("1.jpg", 0), ("2.jpg", 1)]


def dtd(root):
    base = root / "dtd"
    write(base / "labels/train1.txt", "dotted/dotted_1.jpg\n")
    write(base / "labels/val1.txt", "banded/banded_1.jpg\n")
    write(base / "labels/test1.txt", "banded/banded_2.jpg\n")
    for name in ("dotted/dotted_1.jpg", "banded/banded_1.jpg", "banded/banded_2.jpg"):
        touch(base / "images" / name)
    return [("dotted_1.jpg", 1), ("banded_1.jpg", 0)], [("banded_2.jpg", 0)]


def flowers(root):
    base = root / "flowers-102"
    base.mkdir(parents=True)
    savemat(base / "imagelabels.mat", {"labels": np.array([[2, 1, 2, 1]])})
    savemat(base / "setid.mat", {"trnid": np.array([[3, 2]]), "valid": np.array([[1, 4]]), "tstid": np.array([[4, 1]])})
    touch(*(base / f"jpg/image_0000{number}.jpg" for number in range(1, 5)))
    return (
        [("image_00001.jpg", 1), ("image_00002.jpg", 0), ("image_00003.jpg", 1), ("image_00004.jpg", 0)],
        [("image_00001.jpg", 1), ("image_00004.jpg", 0)],
    )


def pets(root):
    base = root / "oxford-iiit-pet"
    write(base / "annotations/trainval.txt", "Abyssinian_100 1 1 1\nbeagle_9 2 2 1\n")
    write(base / "annotations/test.txt", "#Image CLASS-ID SPECIES BREED ID\nbeagle_1 2 2 1\n")
    touch(*(base / f"images/{name}.jpg" for name in ("Abyssinian_100", "beagle_9", "beagle_1")))
    return [("Abyssinian_100.jpg", 0), ("beagle_9.jpg", 1)], [("beagle_1.jpg", 1)]


def food(root):
    base = root / "food-101"
    write(base / "meta/train.txt", "waffles/2\napple_pie/1\n")
    write(base / "meta/test.txt", "apple_pie/3\n")
    touch(*(base / f"images/{name}.jpg" for name in ("waffles/2", "apple_pie/1", "apple_pie/3")))
    return [("2.jpg", 1), ("1.jpg", 0)], [("3.jpg", 0)]


def sun(root):
    base = root / "SUN397"
    write(base / "Partitions/ClassName.txt", "/a/abbey\n/w/waterfall/block\n")
    write(base / "Partitions/Training_01.txt", "/w/waterfall/block/sun_1.jpg\n/a/abbey/sun_2.jpg\n")
    write(base / "Partitions/Testing_01.txt", "/a/abbey/sun_3.jpg\n")
    touch(base / "w/waterfall/block/sun_1.jpg", base / "a/abbey/sun_2.jpg", base / "a/abbey/sun_3.jpg")
    return [("sun_1.jpg", 1), ("sun_2.jpg", 0)], [("sun_3.jpg", 0)]


def inat(year, root, first="train_val/Aves/30/a.jpg"):
    base = root / f"inat{year}"
    base.mkdir(parents=True)
    categories = [{"id": 30}, {"id": 4}]  # not in order, not from 0

    def record(pairs):
        images = [{"id": number, "file_name": name} for number, (name, _) in enumerate(pairs, 7)]
        rows = [{"id": 1, "image_id": number, "category_id": kind} for number, (_, kind) in enumerate(pairs, 7)]
        return {"images": images[::-1], "annotations": rows, "categories": categories}

    write(base / f"train{year}.json", json.dumps(record([(first, 30), ("train_val/b.jpg", 4)])))
    write(base / f"val{year}.json", json.dumps(record([("train_val/c.jpg", 30)])))
    touch(base / "train_val/Aves/30/a.jpg", base / "train_val/b.jpg", base / "train_val/c.jpg")
    return [("a.jpg", 1), ("b.jpg", 0)], [("c.jpg", 1)]


def cog(root):
    base = root / "cog"
    base.mkdir(parents=True)
    # As published: one list a level. Labels follow the sorted concepts, not this order.
    levels = [["n0009"], np.array(["n0002", "n0001"]), [], [], []]
    files = {
        "n0001": {"train": ["n0001_1.JPEG"], "test": ["n0001_2.JPEG"]},
        "n0002": {"train": np.array(["n0002_1.JPEG", "n0002_3.JPEG"]), "test": ["n0002_2.JPEG"]},
    }
    (base / "cog_levels_mapping_file.pkl").write_bytes(pickle.dumps(levels))
    (base / "cog_concepts_split_file.pkl").write_bytes(pickle.dumps(files))
    for concept in files:
        touch(*(base / f"images/{concept}/{concept}_{number}.JPEG" for number in (1, 2, 3)))
    return ([("n0001_1.JPEG", 0), ("n0002_1.JPEG", 1), ("n0002_3.JPEG", 1)], [("n0001_2.JPEG", 0), ("n0002_2.JPEG", 1)])


LAYOUTS = {
    "aircraft": ("Aircraft", aircraft),
    "cars in one folder": ("Cars196", cars_in_one),
    "cars in two folders": ("Cars196", cars_in_two),
    "dtd": ("DTD", dtd),
    "flowers": ("Flowers", flowers),
    "pets": ("Pets", pets),
    "food": ("Food101", food),
    "sun": ("SUN397", sun),
    "inat 2018": ("iNat2018", lambda root: inat(2018, root)),
    "inat 2019": ("iNat2019", lambda root: inat(2019, root)),
    "cog": ("CoG-L2", cog),
}


def shrink(monkeypatch, name, trainval, test, classes=2):
    row = replace(catalog.SETS[name], trainval=trainval, images=(test, test), classes=classes)
    monkeypatch.setitem(catalog.SETS, name, row)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_official_split_is_read(tmp_path, monkeypatch, layout):
    name, make = LAYOUTS[layout]
    assert not catalog.SETS[name].find(tmp_path)
    trainval, test = make(tmp_path)
    assert catalog.SETS[name].find(tmp_path)
    with pytest.raises(UserError, match=rf"{name}: .*a right copy has {catalog.SETS[name].trainval:,} trainval"):
        catalog.SETS[name].load(tmp_path)
    shrink(monkeypatch, name, len(trainval), len(test))
    loaded = catalog.SETS[name].load(tmp_path)
    assert [(Path(path).name, label) for path, label in loaded.splits["trainval"]] == trainval
    assert [(Path(path).name, label) for path, label in loaded.splits["test"]] == test
    assert all(Path(path).is_file() for samples in loaded.splits.values() for path, _ in samples)
    assert len(loaded.class_ids) == 2

    before = loaded.fingerprint
    victim = Path(loaded.splits["test"][0][0])
    victim.write_bytes(b"another image")
    assert catalog.SETS[name].load(tmp_path).fingerprint != before
    victim.unlink()
    with pytest.raises(UserError, match=rf"{name}: \d of {len(trainval + test)} images are missing .*{victim.name}"):
        _ = catalog.SETS[name].load(tmp_path).fingerprint


def make_eurosat(root, per_class):
    for kind in ("AnnualCrop", "Forest"):
        touch(*(root / f"eurosat/2750/{kind}/{kind}_{number}.jpg" for number in range(1, per_class + 1)))


def test_eurosats_split_is_the_same_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer_sets, "EUROSAT_TEST", 3)
    shrink(monkeypatch, "EuroSAT", 4, 6)
    make_eurosat(tmp_path, 5)
    splits = catalog.SETS["EuroSAT"].load(tmp_path).splits
    names = {split: [Path(path).stem for path, _ in samples] for split, samples in splits.items()}
    assert names["trainval"] == EUROSAT_GOLDEN
    assert len(set(names["trainval"] + names["test"])) == 10  # disjoint
    assert [label for _, label in splits["test"]] == [0, 0, 0, 1, 1, 1]


EUROSAT_GOLDEN = ["AnnualCrop_1", "AnnualCrop_2", "Forest_3", "Forest_4"]


def test_counts_are_the_suites():
    counts = {row.name: (row.classes, row.trainval, row.images[1]) for row in catalog.SETS.values() if row.probed}
    assert all(low == high for row in catalog.SETS.values() if row.probed for low, high in [row.images])
    assert len(counts) == 15
    assert counts["EuroSAT"] == (10, 18_900, 8_100) and 10 * transfer_sets.EUROSAT_TEST == 8_100
    assert sum(test for _, _, test in counts.values()) == 3_333 + 8_041 + 1_880 + 8_100 + 6_149 + 3_669 + 25_250 + (
        19_850 + 24_426 + 3_030 + 5 * 50_000
    )
    assert [row.group for row in catalog.SETS.values() if row.probed] == ["small"] * 8 + ["inat"] * 2 + ["cog"] * 5


@pytest.mark.parametrize("name", ["/etc/passwd", "/../../etc/passwd", "a/../../b.jpg", ""])
def test_annotations_do_not_lead_out_of_the_folder(tmp_path, name):
    inat(2018, tmp_path, first=name)
    with pytest.raises(UserError, match="outside of the dataset"):
        catalog.SETS["iNat2018"].load(tmp_path)


def test_a_malicious_split_file_is_refused(tmp_path):
    cog(tmp_path)
    (tmp_path / "cog/cog_concepts_split_file.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"asks for (os|posix).system"):
        catalog.SETS["CoG-L2"].load(tmp_path)


def test_missing_and_broken_annotations_are_named(tmp_path):
    aircraft(tmp_path)
    (tmp_path / "fgvc-aircraft-2013b/data/variants.txt").unlink()
    with pytest.raises(UserError, match=r"Aircraft: cannot read .*variants.txt"):
        catalog.SETS["Aircraft"].load(tmp_path)
    pets(tmp_path)
    write(tmp_path / "oxford-iiit-pet/annotations/test.txt", "beagle_1\n")
    with pytest.raises(UserError, match=r"annotations/test\.txt is not as published"):
        catalog.SETS["Pets"].load(tmp_path)
    with pytest.raises(UserError, match=r"DTD: not found below .*--data-root.*expected dtd/images"):
        catalog.SETS["DTD"].load(tmp_path)


def test_cogs_file_names_do_not_lead_out_of_the_folder(tmp_path):
    cog(tmp_path)
    files = {name: {"train": ["../../secret.JPEG"], "test": []} for name in ("n0001", "n0002")}
    (tmp_path / "cog/cog_concepts_split_file.pkl").write_bytes(pickle.dumps(files))
    with pytest.raises(UserError, match="outside of the dataset"):
        catalog.SETS["CoG-L2"].load(tmp_path)


@pytest.mark.parametrize(
    "name, make, file",
    [
        ("Pets", pets, "oxford-iiit-pet/annotations/test.txt"),
        ("Flowers", flowers, "flowers-102/setid.mat"),
        ("CoG-L2", cog, "cog/cog_concepts_split_file.pkl"),
        ("iNat2018", LAYOUTS["inat 2018"][1], "inat2018/val2018.json"),
    ],
)
def test_only_regular_annotation_files_are_opened(tmp_path, name, make, file):
    """A FIFO in its place would be waited for until the end of time."""
    make(tmp_path)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises(UserError, match=rf"{Path(file).name}.*not a regular file"):
        catalog.SETS[name].load(tmp_path)


def test_lists_that_share_their_parts_are_refused_at_once(tmp_path):
    """The text of fifty nested lists of twice the same list would have 2**50 parts."""
    cog(tmp_path)
    nested = ["n0001"]
    for _ in range(50):
        nested = [nested, nested]
    for file, content in (
        ("cog_levels_mapping_file.pkl", [[nested]] * 5),
        ("cog_concepts_split_file.pkl", {"n0001": {"train": [nested], "test": []}, "n0002": {}}),
    ):
        good = (tmp_path / "cog" / file).read_bytes()
        (tmp_path / "cog" / file).write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=rf"{file} is not as published"):
            catalog.SETS["CoG-L2"].load(tmp_path)
        (tmp_path / "cog" / file).write_bytes(good)


@pytest.mark.parametrize("kept", [0, 50, 130, 200])
def test_a_torn_mat_file_is_named(tmp_path, kept):
    flowers(tmp_path)
    path = tmp_path / "flowers-102/imagelabels.mat"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"imagelabels\.mat is damaged"):
        catalog.SETS["Flowers"].load(tmp_path)


@pytest.mark.parametrize(
    "name, make, file",
    [
        ("Aircraft", aircraft, "fgvc-aircraft-2013b/data/images_variant_test.txt"),
        ("SUN397", sun, "SUN397/Partitions/Testing_01.txt"),
        ("iNat2019", lambda root: inat(2019, root), "inat2019/val2019.json"),
        ("CoG-L2", cog, "cog/cog_concepts_split_file.pkl"),
    ],
    ids=["aircraft", "sun", "inat", "cog"],
)
def test_an_annotation_that_does_not_fit_is_named(tmp_path, name, make, file):
    make(tmp_path)
    text = {"json": b'{"images": [], "annotations": [{"image_id": 9}]}', "pkl": pickle.dumps({"n0001": 3})}
    (tmp_path / file).write_bytes(text.get(file.rpartition(".")[2], b"x unknown\n"))
    with pytest.raises(UserError, match=rf"{Path(file).name} is not as published"):
        catalog.SETS[name].load(tmp_path)


def test_labels_outside_of_the_classes_are_refused(tmp_path, monkeypatch):
    pets(tmp_path)
    write(tmp_path / "oxford-iiit-pet/annotations/trainval.txt", "Abyssinian_100 0 1 1\nbeagle_9 2 2 1\n")
    shrink(monkeypatch, "Pets", 2, 1)
    with pytest.raises(UserError, match=r"Pets: .* 1 labels outside of its 2 classes"):
        catalog.SETS["Pets"].load(tmp_path)


def test_missing_images_are_counted_and_the_first_three_named(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer_sets, "EUROSAT_TEST", 3)
    shrink(monkeypatch, "EuroSAT", 4, 6)
    make_eurosat(tmp_path, 5)
    loaded = catalog.SETS["EuroSAT"].load(tmp_path)
    paths = [path for samples in loaded.splits.values() for path, _ in samples]
    for path in paths[:5]:
        Path(path).unlink()
    with pytest.raises(UserError, match="EuroSAT: 5 of 10 images are missing") as refused:
        _ = loaded.fingerprint
    assert [path in str(refused.value) for path in paths[:5]] == [True] * 3 + [False] * 2


def test_listing_names_every_dataset_and_what_was_found(tmp_path):
    food(tmp_path)
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--list-datasets", "--data-root", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name, row in catalog.SETS.items():
        assert name in done.stdout and row.where in done.stdout
    assert f"Food101        found at {tmp_path / 'food-101'}" in done.stdout
    assert done.stdout.count("not found") == 23
