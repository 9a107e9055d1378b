"""The ImageNet family: each set's real layout in miniature, and every trap of the sources as a test."""

from __future__ import annotations

import dataclasses
import json
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from utils import metrics
from utils.classes import load_classes
from utils.cli import UserError
from utils.evaluation import catalog, imagenet_sets
from utils.evaluation.matching import LoadedSet, NoSharedClass, match
from utils.evaluation.results import Row, with_v2_mean
from utils.images import load_eval_image

TIMM = files("timm.data") / "_info"
IDS = imagenet_sets.imagenet_ids()
IDS_100 = tuple(load_classes("imagenet_100").ids)
PNG = b"not decoded by these tests"


def timm_lines(name: str) -> list[str]:
    return (TIMM / name).read_text().split()


@pytest.fixture
def counts(monkeypatch):
    """Switch a row's counts to a miniature's: only tests can."""

    def switch(name: str, classes: int, images: int) -> None:
        row = dataclasses.replace(catalog.SETS[name], classes=classes, images=(images, images))
        monkeypatch.setitem(catalog.SETS, name, row)

    return switch


def fill(folder, names, data: bytes = PNG) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(data)


# ===== the shipped indices against an independent source =====


def test_label_order_is_timms():
    assert list(IDS) == timm_lines("imagenet_synsets.txt")


@pytest.mark.parametrize("letter, shared", [("r", 19), ("a", 15)])
def test_subset_indices_are_timms(letter, shared):
    ours = [wnid for (wnid,) in imagenet_sets.read_index(f"imagenet_{letter}.txt")]
    assert ours == timm_lines(f"imagenet_{letter}_synsets.txt")
    assert [IDS.index(wnid) for wnid in ours] == [int(i) for i in timm_lines(f"imagenet_{letter}_indices.txt")]
    assert len(set(ours) & set(IDS_100)) == shared


def test_six_imagenet_100_classes_are_in_both_subsets():
    r, a = ({wnid for (wnid,) in imagenet_sets.read_index(f"imagenet_{letter}.txt")} for letter in "ra")
    assert len(r & a & set(IDS_100)) == 6


def test_objectnet_map_counts():
    rows = imagenet_sets.read_index("objectnet.txt")
    assert len(rows) == 125 and len({number for _, number in rows}) == 113
    assert {wnid for wnid, _ in rows} <= set(IDS)
    covered = [(wnid, number) for wnid, number in rows if wnid in IDS_100]
    assert len(covered) == 13


# ===== IN-Val =====


def test_val_folders(tmp_path, counts):
    counts("IN-Val", 3, 6)
    for wnid in (IDS[5], IDS[0], IDS[900]):
        fill(tmp_path / "imagenet/val" / wnid, ["b.JPEG", "a.JPEG"])
    loaded = catalog.SETS["IN-Val"].load(tmp_path)
    assert loaded.class_ids == [IDS[0], IDS[5], IDS[900]]
    matched = match(loaded, IDS)
    assert matched.labels.tolist() == [0, 0, 5, 5, 900, 900]
    assert len(matched.columns) == 1000 and matched.labels.ndim == 1


def write_devkit(folder, numbers: list[int], wnid_of: dict[int, str]) -> None:
    """meta.mat as the devkit has it: a struct array whose inner nodes (num_children > 0) come last."""
    from scipy.io import savemat

    names = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    rows = [(number, wnid, "name", "gloss", 0, np.array([0]), 0, 1300) for number, wnid in wnid_of.items()]
    rows.append((1001, "n00001740", "entity", "gloss", 2, np.array([1, 2]), 9, 0))
    synsets = np.array(rows, dtype=[(name, object) for name in names])
    (folder / "data").mkdir(parents=True)
    savemat(folder / "data" / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    text = "".join(f"{number}\n" for number in numbers)
    (folder / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(text)


def test_val_flat_files_with_the_devkit(tmp_path, counts):
    """The devkit numbers classes 1..1000 in an order that is not the wnids'."""
    counts("IN-Val", 3, 5)
    fill(tmp_path / "imagenet/val", [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 6)])
    wnid_of = {1: IDS[7], 2: IDS[3], 3: IDS[11]}
    write_devkit(tmp_path / "imagenet/ILSVRC2012_devkit_t12", [2, 1, 1, 3, 2], wnid_of)
    matched = match(catalog.SETS["IN-Val"].load(tmp_path), IDS)
    by_file = dict(zip([path[-13:-5] for path, _ in matched.samples], matched.labels.tolist(), strict=True))
    assert by_file == {"00000001": 3, "00000002": 7, "00000003": 7, "00000004": 11, "00000005": 3}


def test_val_flat_files_without_devkit_say_what_is_missing(tmp_path):
    fill(tmp_path / "imagenet/val", ["ILSVRC2012_val_00000001.JPEG"])
    with pytest.raises(UserError, match=r"ILSVRC2012_devkit_t12\.tar\.gz"):
        catalog.SETS["IN-Val"].load(tmp_path)


def test_val_flat_files_with_a_damaged_devkit(tmp_path):
    fill(tmp_path / "imagenet/val", ["ILSVRC2012_val_00000001.JPEG"])
    write_devkit(tmp_path / "imagenet/ILSVRC2012_devkit_t12", [7], {1: IDS[0]})
    with pytest.raises(UserError, match="not the ILSVRC2012 devkit"):
        catalog.SETS["IN-Val"].load(tmp_path)


def test_incomplete_copy_is_refused(tmp_path, counts):
    counts("IN-Val", 2, 4)
    for wnid in IDS[:2]:
        fill(tmp_path / "imagenet/val" / wnid, ["a.JPEG"])
    with pytest.raises(UserError, match=r"2 images of 2 classes; a right copy has 4 images of 2 classes"):
        catalog.SETS["IN-Val"].load(tmp_path)


def test_real_counts_refuse_a_miniature(tmp_path):
    fill(tmp_path / "sketch" / IDS[0], ["a.JPEG"])
    with pytest.raises(UserError, match=r"50,000 to 50,889 images of 1,000 classes"):
        catalog.SETS["IN-Sketch"].load(tmp_path)


def test_strange_folder_is_refused(tmp_path):
    fill(tmp_path / "sketch" / "backup", ["a.JPEG"])
    with pytest.raises(UserError, match="no ImageNet class"):
        catalog.SETS["IN-Sketch"].load(tmp_path)


# ===== IN-v2: the order of its folders =====


@pytest.mark.parametrize(
    "name, folder", [("matched", "matched-frequency"), ("0.7", "threshold0.7"), ("top", "top-images")]
)
def test_v2_folders_are_numbers(tmp_path, counts, name, folder):
    """In each of the three variants as they are published."""
    counts(f"IN-v2-{name}", 1000, 1000)
    root = tmp_path / f"imagenetv2-{folder}-format-val"
    for number in range(1000):
        fill(root / str(number), ["x.jpeg"])
    loaded = catalog.SETS[f"IN-v2-{name}"].load(tmp_path)
    for path, label in loaded.samples:
        assert int(path.split("/")[-2]) == label
    assert match(loaded, IDS).labels.tolist() == list(range(1000))
    as_text = sorted(str(number) for number in range(1000))
    assert sum(int(text) == label for label, text in enumerate(as_text)) == 12  # what ImageFolder would get right
    cut = match(loaded, IDS_100)
    assert [IDS_100[column] for column in cut.labels] == [IDS[int(path.split("/")[-2])] for path, _ in cut.samples]
    (root / "999" / "x.jpeg").unlink()
    (root / "999").rmdir()
    with pytest.raises(UserError, match="folders 0 to 999"):
        catalog.SETS[f"IN-v2-{name}"].load(tmp_path)


def test_v2_stands_for_its_variants(tmp_path):
    for folder in ("threshold0.7", "top-images"):
        (tmp_path / f"imagenetv2-{folder}-format-val").mkdir()
    assert [one.name for one in catalog.choose(["IN-v2"], [], tmp_path)] == ["IN-v2-0.7", "IN-v2-top"]
    assert [one.name for one in catalog.choose(["IN-v2"], [], tmp_path / "empty")] == list(catalog.V2_VARIANTS)


def test_the_mean_of_the_three_variants_by_hand():
    def row(dataset, value, **more):
        facts = {"model": "m", "checkpoint_sha256": "c", "metric": "top1", "seed": 0, "num_classes": 1000, "n": 10_000}
        return Row(**facts | {"dataset": dataset, "value": value, "low": value - 1, "high": value + 2} | more)

    rows = [row("IN-v2-matched", 60.0), row("IN-v2-0.7", 69.0), row("IN-Val", 71.0)]
    assert with_v2_mean(rows) == rows  # a mean of two would be another quantity
    (mean,) = with_v2_mean([*rows, row("IN-v2-top", 75.0), row("IN-v2-top", 90.0, model="other")])[5:]
    assert (mean.dataset, mean.value, mean.low, mean.high, mean.n) == ("IN-v2", 68.0, 67.0, 70.0, 30_000)
    published = row("IN-v2", 72.3, source="published")
    assert with_v2_mean([published]) == [published]
    (old,) = with_v2_mean([row("IN-v2", 60.0, source="measured")])  # the earlier version knew this variant alone
    assert old.dataset == "IN-v2-matched"


# ===== IN-R and IN-A: logits cut to the set's classes =====


@pytest.fixture
def subset(tmp_path, counts):
    def make(letter: str) -> LoadedSet:
        counts(f"IN-{letter.upper()}", 200, 200)
        for wnid in timm_lines(f"imagenet_{letter}_synsets.txt"):
            fill(tmp_path / f"imagenet-{letter}" / wnid, ["x.jpg"])
        return catalog.SETS[f"IN-{letter.upper()}"].load(tmp_path)

    return make


@pytest.mark.parametrize("letter", ["r", "a"])
def test_masked_accuracy_equals_timms_way(subset, letter):
    loaded = subset(letter)
    matched = match(loaded, IDS)
    logits = np.random.default_rng(0).normal(size=(200, 1000))
    indices = [int(i) for i in timm_lines(f"imagenet_{letter}_indices.txt")]
    # timm: output[:, valid_labels], and the folder's position as target
    cut, target = logits[:, indices], np.array([label for _, label in loaded.samples])
    for k in (1, 5):
        wanted = sum(target[i] in np.argsort(-cut[i])[:k] for i in range(200))
        assert metrics.topk_correct(logits[:, matched.columns], matched.labels, (k,))[k] == wanted


@pytest.mark.parametrize("letter, shared", [("r", 19), ("a", 15)])
def test_masked_set_and_a_100_class_model_meet_in_the_shared_classes(subset, letter, shared):
    matched = match(subset(letter), IDS_100)
    assert len(matched.class_ids) == len(matched.columns) == len(matched.samples) == shared
    assert [IDS_100[column] for column in matched.columns] == matched.class_ids
    assert [matched.class_ids[label] for label in matched.labels] == [
        path.split("/")[-2] for path, _ in matched.samples
    ]
    assert (matched.classes_in_set, matched.images_in_set) == (200, 200)


def test_subset_with_a_wrong_class_is_refused(tmp_path, subset):
    subset("r")
    (tmp_path / "imagenet-r" / "n01443537").rename(tmp_path / "imagenet-r" / "n01440764")
    with pytest.raises(UserError, match="2 classes differ"):
        catalog.SETS["IN-R"].load(tmp_path)


# ===== ReaL =====


@pytest.fixture
def real_labels(tmp_path):
    fill(tmp_path / "imagenet", [])
    text = (TIMM / "imagenet_real_labels.json").read_text()
    (tmp_path / "imagenet/real.json").write_text(text)
    return json.loads(text)


def test_real_skips_3163_images_and_is_offset_by_one(tmp_path, real_labels, monkeypatch):
    """On the names of all 50,000 files, against timm's own counter on the same logits."""
    from timm.data import RealLabelsImagenet

    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)]
    fill(tmp_path / "imagenet/val", names[:1])
    val = LoadedSet("IN-Val", list(IDS), [(f"val/{name}", 0) for name in names])
    monkeypatch.setattr(imagenet_sets, "read_val", lambda *_: val)
    loaded = catalog.SETS["IN-ReaL"].load(tmp_path)
    assert len(loaded.samples) == 46_837 and sum(not labels for labels in real_labels) == 3_163
    matched = match(loaded, IDS)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50_000, 1000)).astype(np.float32)
    some = rng.random(50_000) < 0.7  # random logits alone would be right on 0.2 %
    for i in np.flatnonzero(some):
        if real_labels[i]:
            logits[i, real_labels[i][0]] += 3.5
    import torch

    timm = RealLabelsImagenet(names, real_json=str(tmp_path / "imagenet/real.json"))
    timm.add_result(torch.from_numpy(logits))
    kept = [int(path[-13:-5]) - 1 for path, _ in matched.samples]
    correct = metrics.topk_correct(logits[kept], matched.labels, (1, 5))
    for k in (1, 5):
        assert 100 * correct[k] / 46_837 == pytest.approx(timm.get_accuracy(k), abs=1e-9)
    assert 20 < 100 * correct[1] / 46_837 < 95  # the comparison had something to compare


def test_corrected_labels_are_another_set(tmp_path, real_labels, monkeypatch):
    """The images are the same, but results with the old labels must not count as done."""
    name = "ILSVRC2012_val_00000001.JPEG"
    fill(tmp_path / "imagenet/val", [name])
    val = LoadedSet("IN-Val", list(IDS), [(f"{tmp_path}/imagenet/val/{name}", 0)])
    monkeypatch.setattr(imagenet_sets, "read_val", lambda *_: val)
    folder = tmp_path / "imagenet/val"
    before = imagenet_sets.read_real("IN-ReaL", folder, tmp_path).fingerprint
    assert imagenet_sets.read_real("IN-ReaL", folder, tmp_path).fingerprint == before
    (tmp_path / "imagenet/real.json").write_text(json.dumps([[7], *real_labels[1:]]))
    assert imagenet_sets.read_real("IN-ReaL", folder, tmp_path).fingerprint != before


def test_real_and_100_classes(tmp_path):
    """Images of the model's classes only: a stray label among ReaL's does not bring in an image of another class."""
    loaded = LoadedSet(
        "IN-ReaL",
        ["ant", "bee", "cow"],
        [("1", 0), ("2", 1), ("3", 2)],
        sample_answers=[("ant",), ("ant", "bee"), ("cow", "ant")],
    )
    matched = match(loaded, ["ant", "cow"])
    assert [path for path, _ in matched.samples] == ["1", "3"] and matched.class_ids == ["ant", "cow"]
    assert matched.labels.tolist() == [[True, False], [True, True]]


def test_real_is_found_by_its_labels(tmp_path):
    fill(tmp_path / "imagenet/val", [])
    assert catalog.SETS["IN-Val"].find(tmp_path)
    assert not catalog.SETS["IN-ReaL"].find(tmp_path)
    (tmp_path / "imagenet/real.json").write_text("[]")
    assert catalog.SETS["IN-ReaL"].find(tmp_path)


def test_real_refuses_other_file_names(tmp_path, real_labels, counts):
    counts("IN-ReaL", 1, 1)
    fill(tmp_path / "imagenet/val" / IDS[0], ["kitten.JPEG"])
    with pytest.raises(UserError, match="not named like a validation file"):
        catalog.SETS["IN-ReaL"].load(tmp_path)


# ===== ObjectNet =====


@pytest.fixture
def objectnet(tmp_path, counts):
    """Its folders, its four mapping files and one class that ImageNet lacks, built from the published id map."""
    counts("ObjectNet", 113, 113)
    root = tmp_path / "objectnet-1.0"
    groups: dict[str, list[str]] = {}
    for wnid, number in imagenet_sets.read_index("objectnet.txt"):
        groups.setdefault(f"c{int(number):03d}", []).append(wnid)
    for folder in [*groups, "zipper"]:
        fill(root / "images" / folder, ["x.png"])
    lines = [f"name of {wnid}, second name" for wnid in sorted(IDS, reverse=True)]  # their file has its own order
    row_of = {wnid: row for row, wnid in enumerate(sorted(IDS, reverse=True))}
    mappings = root / "mappings"
    fill(mappings, [])
    labels = {folder: folder.upper() for folder in [*groups, "zipper"]}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    to_imagenet = {labels[f]: "; ".join(lines[row_of[wnid]] for wnid in group) for f, group in groups.items()}
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(to_imagenet))
    outputs = {str(index): row_of[wnid] for index, wnid in enumerate(IDS)}
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(outputs))
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    return root, groups


def test_objectnet_answers(tmp_path, objectnet):
    _, groups = objectnet
    loaded = catalog.SETS["ObjectNet"].load(tmp_path)
    assert len(loaded.class_ids) == 113 and "zipper" not in loaded.class_ids
    matched = match(loaded, IDS)
    assert len(matched.columns) == 1000  # not masked: the authors count a prediction outside the 125 as wrong
    assert matched.labels.shape == (113, 1000) and matched.labels.sum() == 125
    # The authors' way: the predicted index through the id map, or -1
    id_map = {IDS.index(wnid): int(number) for wnid, number in imagenet_sets.read_index("objectnet.txt")}
    logits = np.random.default_rng(1).normal(size=(113, 1000))
    logits[np.arange(0, 113, 2), [IDS.index(groups[c][-1]) for c in loaded.class_ids[::2]]] += 9
    truth = [int(path.split("/")[-2][1:]) for path, _ in matched.samples]
    for k in (1, 5):
        top = np.argsort(-logits, axis=1)[:, :k]
        wanted = sum(truth[i] in [id_map.get(int(p), -1) for p in top[i]] for i in range(113))
        assert metrics.topk_correct(logits, matched.labels, (k,))[k] == wanted >= 57


def test_objectnet_and_100_classes(tmp_path, objectnet):
    matched = match(catalog.SETS["ObjectNet"].load(tmp_path), IDS_100)
    assert len(matched.class_ids) == 13 and matched.labels.ndim == 1


def test_objectnet_with_another_mapping_is_refused(tmp_path, objectnet):
    root, _ = objectnet
    path = root / "mappings/objectnet_to_imagenet_1k.json"
    mapping = json.loads(path.read_text())
    first, second = list(mapping)[:2]
    mapping[first] = mapping[first] + "; " + mapping.pop(second)
    path.write_text(json.dumps(mapping))
    with pytest.raises(UserError, match="maps other classes"):
        catalog.SETS["ObjectNet"].load(tmp_path)


def test_objectnet_border_is_cut(tmp_path, objectnet):
    loaded = catalog.SETS["ObjectNet"].load(tmp_path)
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:] = ([255, 0, 0],) * 4
    Image.fromarray(pixels).save(tmp_path / "red.png")
    assert load_eval_image(tmp_path / "red.png", 16, 16, border=loaded.border).max() == 0
    assert load_eval_image(tmp_path / "red.png", 20, 20).max() == 255


# ===== matching =====


def test_any_folder(tmp_path):
    for class_id in ("cat", "dog"):
        fill(tmp_path / class_id, ["1.png"])
    loaded = catalog.folder_set(f"pets={tmp_path}").load(tmp_path)
    matched = match(loaded, ["dog", "bird", "cat"])  # a model's order need not be sorted
    assert matched.labels.tolist() == [2, 0] and matched.class_ids == ["cat", "dog"]


def test_no_shared_class_names_both_sides(tmp_path):
    fill(tmp_path / "cat", ["1.png"])
    with pytest.raises(NoSharedClass, match=r"\(cat\).*\(dog\).*--classes"):
        match(catalog.folder_set(f"pets={tmp_path}").load(tmp_path), ["dog"])


def test_absent_set_says_where_to_get_it(tmp_path):
    for name, row in catalog.SETS.items():
        assert not catalog.SETS[name].find(tmp_path)
        with pytest.raises(UserError, match="--data-root") as error:
            catalog.SETS[name].load(tmp_path)
        assert row.where in str(error.value)
