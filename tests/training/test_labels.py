"""Others' datasets: numbered folders, other names of classes, samples named by number, compressed shards."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.evaluation.test_evaluate import call, make_images, make_run
from utils.cli import UserError
from utils.storage import read_jsonl
from utils.training.image_sets import open_images, open_sources, open_validation
from utils.training.labels import read_label_map

NUMBERS = [str(number) for number in range(12)]
WNIDS = [f"n{number:08d}" for number in (5, 11, 2, 9, 1, 8, 4, 10, 3, 7, 6, 12)]  # of the numbers, in their order


def table(path: Path, ids=WNIDS, names=NUMBERS) -> Path:
    path.write_text("name\tid\n" + "".join(f"{name}\t{wnid}\n" for name, wnid in zip(names, ids, strict=False)))
    return path


@pytest.fixture
def numbered(tmp_path) -> Path:
    return make_images(tmp_path / "numbered", NUMBERS, each=2)


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


# ===== numbered folders =====


def test_numbers_sort_as_numbers_whatever_holds_them(numbered, tmp_path):
    images = open_images(numbered)
    assert images.class_ids == NUMBERS
    assert [images.name(row).split("/")[-2] for row in range(len(images))] == [n for n in NUMBERS for _ in range(2)]
    members = {f"{n}/{k}.png": (numbered / n / f"{k}.png").read_bytes() for n in NUMBERS for k in range(2)}
    shard(tmp_path / "tars/a.tar", members)
    packed = open_images(tmp_path / "tars")
    assert packed.class_ids == NUMBERS and packed.labels.tolist() == images.labels.tolist()
    assert packed.summary() == images.summary()
    (numbered / "cat").mkdir()
    (numbered / "0/0.png").rename(numbered / "cat/0.png")
    assert open_images(numbered).class_ids == sorted([*NUMBERS, "cat"])  # as torchvision


# ===== --label-map =====


def test_a_map_renames_and_numbers_by_the_new_ids(numbered, tmp_path):
    label_map = read_label_map(table(tmp_path / "map.tsv"))
    (images,) = open_sources([numbered], 1, None, label_map=label_map)
    assert images.class_ids == sorted(WNIDS) and images.labels.tolist() == list(range(12))
    assert [images.name(row).split("/")[-2] for row in range(12)] == [NUMBERS[WNIDS.index(w)] for w in sorted(WNIDS)]
    assert images.rows_of(WNIDS[0]) == range(4, 5)
    listed = tmp_path / "map.txt"
    listed.write_text("# of index 0, 1, ...\n" + "\n".join(WNIDS))
    assert read_label_map(listed) == label_map
    val = open_validation(make_images(tmp_path / "val", ["3", "4"], each=1), images.class_ids, label_map)
    assert val.labels.tolist() == sorted(sorted(WNIDS).index(WNIDS[number]) for number in (3, 4))
    chosen = open_images(numbered, classes=str(table(tmp_path / "three.tsv", WNIDS[:3])), label_map=label_map)
    assert chosen.class_ids == sorted(WNIDS[:3]) and len(chosen) == 6


def test_a_generated_set_keeps_its_own_ids(numbered, tmp_path):
    made = tmp_path / "sd"
    make_images(made / "train", WNIDS, each=1)
    (made / "dataset.json").write_text(json.dumps({"classes": [{"id": w, "name": w} for w in WNIDS]}))
    real, sd = open_sources([numbered, made], None, label_map=read_label_map(table(tmp_path / "map.tsv")))
    assert real.class_ids == sd.class_ids == sorted(WNIDS)


@pytest.mark.parametrize(
    ("names", "ids", "message"),
    [
        (NUMBERS[:11], WNIDS[:11], "--label-map: no line for 11 of --data"),
        (["0", "0"], WNIDS[:2], r"line 3: '0' or 'n00000011' stands there twice"),
        (["0", "1"], ["n1", "n1"], "line 3: '1' or 'n1' stands there twice"),
        (["0"], ["../x"], "line 2"),
        (NUMBERS[:11], [*WNIDS[:10], "11"], "--label-map: 11 is one class already and another's new name"),
    ],
)
def test_maps_that_would_mix_classes_up_are_refused(numbered, tmp_path, names, ids, message):
    with pytest.raises(UserError, match=message):
        open_images(numbered, label_map=read_label_map(table(tmp_path / "map.tsv", ids, names)))


def test_a_model_of_numbered_folders_is_judged_on_wordnet_ids(tmp_path, capsys):
    """Once each of the two messages about --classes sent to the other; now both name what works."""
    run, test = make_run(tmp_path / "runs/toy", NUMBERS), make_images(tmp_path / "test", WNIDS)
    command = ["--checkpoint", run, "--device", "cpu", "--test", f"t={test}"]
    assert call(*command) == 2
    assert "t: no class of the set" in (error := capsys.readouterr().err) and "--label-map FILE" in error
    (tmp_path / "ids.txt").write_text("\n".join(NUMBERS[:3]))
    assert call(*command, "--classes", table(tmp_path / "map.tsv")) == 2
    assert "leave it out; --label-map FILE renames them" in capsys.readouterr().err
    assert call(*command, "--label-map", tmp_path / "map.tsv") == 0, capsys.readouterr().err
    renamed = {row["metric"]: row["value"] for row in read_jsonl(run / "results.jsonl")}
    # The same images in folders of the model's own names give the same numbers.
    same = tmp_path / "same"
    same.mkdir()
    for number, wnid in zip(NUMBERS, WNIDS, strict=True):
        (same / number).symlink_to(test / wnid)
    assert call("--checkpoint", run, "--device", "cpu", "--test", f"s={same}") == 0
    plain = {row["metric"]: row["value"] for row in read_jsonl(run / "results.jsonl") if row["dataset"] == "s"}
    assert renamed == plain and 0 < renamed["top5"] < 100
    # And the other way about: the model knows WordNet's ids, the folders are numbers.
    other = make_run(tmp_path / "runs/other", WNIDS)
    assert (
        call("--checkpoint", other, "--device", "cpu", "--test", f"s={same}", "--label-map", tmp_path / "map.tsv") == 0
    )


# ===== shards of others =====


def test_samples_named_by_number_have_their_class_beside_them(numbered, tmp_path):
    members = {}
    for number in NUMBERS[:3]:
        key = f"{5 - int(number):09d}"
        members |= {f"{key}.cls": number.encode() + b"\n", f"{key}.json": b"{}"}
        members |= {f"{key}.png": (numbered / number / "0.png").read_bytes()}
    shard(tmp_path / "tars/a.tar", members)
    images = open_images(tmp_path / "tars")
    assert images.class_ids == NUMBERS[:3] and images.labels.tolist() == [0, 1, 2]
    assert [images.read(row) for row in range(3)] == [(numbered / n / "0.png").read_bytes() for n in NUMBERS[:3]]
    mapped = open_images(tmp_path / "tars", label_map=dict(zip(NUMBERS, WNIDS, strict=True)))
    assert mapped.class_ids == sorted(WNIDS[:3]) and mapped.read(0) == images.read(2)
    named = {key.replace("00000", "img_0"): value for key, value in members.items()}  # a prefix that is no class
    shard(tmp_path / "more/a.tar", named)
    assert open_images(tmp_path / "more").labels.tolist() == [0, 1, 2]
    del members["000000004.cls"]
    shard(tmp_path / "torn/a.tar", members)
    with pytest.raises(UserError, match=r"a\.tar: nothing says of which class 000000004\.png is; name members"):
        open_images(tmp_path / "torn")


def test_compressed_shards_are_named_with_the_way_out(tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/a.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"a\.tar\.gz is compressed.*unpack all: gunzip .*/\*gz"):
        open_images(tmp_path / "tars")
