"""The loader: which sample comes when, what its crops are, and what happens to damaged images and odd folders."""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile
import time

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from utils.cli import UserError
from utils.images import BadImage
from utils.storage import sha256_file, write_json
from utils.training import loader
from utils.training.image_sets import FolderImages, TarImages, class_names, open_images, open_sources, open_validation
from utils.training.loader import CropBatches, CropSpec, Request, crop_box, epoch_order, make_loader, random_crops
from utils.training.step import Schedule
from utils.training.validation import validation_on

SPECS = [CropSpec(24, 1, (0.25, 1.0)), CropSpec(12, 3, (0.05, 0.25))]


def picture(seed: int, width: int = 48, height: int = 40) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(seed: int, width: int = 48, height: int = 40) -> bytes:
    return simplejpeg.encode_jpeg(picture(seed, width, height), quality=95)


@pytest.fixture
def folder(tmp_path):
    """Two classes with 5 and 1 images."""
    for class_id, count in (("n01", 5), ("n02", 1)):
        (tmp_path / "data" / class_id).mkdir(parents=True)
        for index in range(count):
            path = tmp_path / "data" / class_id / f"{class_id}_{index:06d}.jpg"
            path.write_bytes(jpeg(index + 10 * len(class_id)))
    return tmp_path / "data"


def batches_of(*sets, weights=None, seed=0) -> CropBatches:
    return CropBatches(sets, weights or [1.0] * len(sets), lambda epoch: SPECS, seed)


def test_the_same_crops_are_cut_in_every_epoch_whatever_their_size(folder):
    """Of a run whose crops grow: each batch has its epoch's size, and shows the same part of the picture."""
    growing = CropBatches([FolderImages(folder)], [1.0], lambda epoch: [CropSpec(16 + 8 * epoch, 1, (0.3, 1.0))], 0)
    fixed = CropBatches([FolderImages(folder)], [1.0], lambda epoch: [CropSpec(32, 1, (0.3, 1.0))], 0)
    for epoch in (0, 2):
        (grown,), (whole,) = growing[Request(epoch, 0, 6)]["crops"], fixed[Request(epoch, 0, 6)]["crops"]
        assert grown.shape == (6, 1, 16 + 8 * epoch, 16 + 8 * epoch, 3)
        small = torch.nn.functional.interpolate(
            whole[:, 0].permute(0, 3, 1, 2).float(), size=grown.shape[2], mode="area"
        )
        assert (small - grown[:, 0].permute(0, 3, 1, 2).float()).abs().mean() < 6  # another region: some 50


# ===== order =====


def test_an_epoch_holds_every_sample_once_and_differs_from_the_next():
    first, second = (epoch_order((50,), (1.0,), 0, epoch) for epoch in (0, 1))
    assert sorted(first[0]) == list(range(50)) and first[0].tolist() != second[0].tolist()
    assert set(first[1]) == {0} and set(second[1]) == {1}
    assert epoch_order((50,), (1.0,), 1, 0)[0].tolist() != first[0].tolist()


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=3),
    shares=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    seed=st.integers(0, 5),
)
def test_a_mix_gives_each_set_its_share_and_each_image_its_turn(sizes, shares, seed):
    weights = [float(share) for share in shares[: len(sizes)]]
    total, counts = sum(sizes), loader.share_out(sum(sizes), weights)
    assert sum(counts) == total
    assert all(abs(count - total * weight / sum(weights)) < 1 for count, weight in zip(counts, weights, strict=True))
    starts = np.cumsum([0, *sizes])
    orders = [epoch_order(tuple(sizes), tuple(weights), seed, epoch) for epoch in range(4)]
    samples = np.concatenate([order[0] for order in orders])
    for low, high, count in zip(starts, starts[1:], counts, strict=False):
        uses = np.bincount(samples[(samples >= low) & (samples < high)] - low, minlength=high - low)
        assert uses.sum() == 4 * count and uses.max() - uses.min() <= 1
    # (sample, pass) is unique, so no two uses of an image share their random numbers
    pairs = {pair for order in orders for pair in zip(*order.tolist(), strict=True)}
    assert len(pairs) == len(samples)


@given(world=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 4]), skip=st.integers(0, 6))
def test_processes_and_micro_batches_cut_the_same_batches(world, micro, skip):
    """Whatever the cut, step t is rows t*16 .. t*16+15 of its epoch; resuming at `skip` gives the rest."""
    plan = Schedule(48, 16, micro, world, steps_per_epoch=3, epochs=3, warmup_steps=0, peak_lr=0.1, final_lr=0.0)
    rows: dict[tuple[int, int], list[int]] = {}
    for rank in range(world):
        for number, request in enumerate(plan.requests(range(skip, 7), rank)):
            step = skip + number // micro
            rows.setdefault((step, request.epoch), []).extend(range(request.start, request.stop))
    assert {key: sorted(value) for key, value in rows.items()} == {
        (step, step // 3): list(range(step % 3 * 16, step % 3 * 16 + 16)) for step in range(skip, 7)
    }


# ===== crops =====


def test_crops_follow_torchvisions_rule():
    """Areas and aspect ratios within the asked range, inside the image, spread over it."""
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(500, 375, (0.25, 1.0), rng.random((10, 4)).tolist()) for _ in range(3000)])
    top, left, high, wide = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + high <= 375).all() and (left + wide <= 500).all()
    area = high * wide / (500 * 375)
    assert area.min() > 0.245 and area.max() <= 1.0 and area.min() < 0.27 and area.max() > 0.9
    aspect = wide / high
    assert aspect.min() > 0.74 and aspect.max() < 1.35 and aspect.min() < 0.78 and aspect.max() > 1.29
    assert top.max() > 150 and left.max() > 180
    # 1:10 images admit no such box: the central crop with the nearest aspect ratio, as torchvision does
    assert crop_box(1000, 100, (0.9, 1.0), rng.random((10, 4)).tolist()) == (0, 433, 100, 133)


def resized(image: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """(size, size, 3) of (h, w, 3), written into the second of three slots: the others stay as they are."""
    slots = torch.full((3, size, size, 3), 7, dtype=torch.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    loader.resize(planes, slots.permute(0, 3, 1, 2)[1:2], interpolation)
    assert (slots[0] == 7).all() and (slots[2] == 7).all()
    return slots[1].numpy()


@pytest.mark.parametrize("interpolation", loader.KERNELS)
def test_a_resize_has_the_bits_of_torch_s_public_function(interpolation):
    """And an image of the wanted size stays as it is."""
    image = picture(3, 70, 50) ^ np.random.default_rng(0).integers(0, 32, (50, 70, 3), dtype=np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    for part in (planes, planes[:, :, 3:40, 11:65], planes[:, :, 5:29, 7:31]):
        wanted = torch.nn.functional.interpolate(part, (24, 24), mode=interpolation, antialias=True)
        slot = torch.empty(1, 24, 24, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        loader.resize(part, slot, interpolation)
        assert torch.equal(slot, wanted)
    assert torch.equal(slot, part)


@pytest.mark.parametrize(("interpolation", "levels", "at_edges"), [("bicubic", 2, 32), ("bilinear", 1, 1)])
def test_resize_equals_pillow_within_two_grey_levels(interpolation, levels, at_edges):
    """Of pictures with some noise; pure black and white noise, where bicubic's overshoot is clipped, differs more."""
    rng = np.random.default_rng(0)
    for number in range(60):
        wide = int(rng.integers(20, 300))
        tall = round(wide * np.exp(rng.uniform(*np.log(loader.ASPECT))))
        image = picture(number, wide, tall) // 2 + 50 + rng.integers(0, 25, (tall, wide, 3), dtype=np.uint8)
        if number % 3 == 0:
            image = (rng.integers(0, 2, (tall, wide, 3)) * 255).astype(np.uint8)
        size = int(rng.choice([24, 96, 224]))
        ours = resized(image, size, interpolation).astype(int)
        filter_ = Image.Resampling[interpolation.upper()]
        theirs = np.asarray(Image.fromarray(image).resize((size, size), filter_)).astype(int)
        assert np.abs(ours - theirs).max() <= (levels if number % 3 else at_edges), (image.shape, size)


def test_crops_equal_the_per_image_reference():
    """The same boxes, cut and resized by Pillow from the fully decoded image."""
    data = jpeg(1, 200, 160)
    draws = np.random.default_rng(4).random(4 * loader.DRAWS_PER_CROP)
    out = [torch.empty(spec.count, spec.size, spec.size, 3, dtype=torch.uint8) for spec in SPECS]
    random_crops(data, SPECS, draws, out)
    whole = Image.fromarray(simplejpeg.decode_jpeg(data))
    rows = iter(draws.reshape(-1, 10, 4).tolist())
    for spec, crops in zip(SPECS, out, strict=True):
        for crop in crops:
            top, left, high, wide = crop_box(200, 160, spec.scale, next(rows))
            cut = whole.crop((left, top, left + wide, top + high))
            wanted = np.asarray(cut.resize((spec.size, spec.size), Image.Resampling.BICUBIC)).astype(float)
            difference = np.abs(crop.numpy() - wanted)
            # Scaled decoding (here 1/2) moves box edges by half a pixel and filters in another place.
            assert difference.mean() < 3, spec


def test_scaled_decoding_never_enlarges(monkeypatch):
    """The decoded size is the smallest of 1, 1/2, 1/4, 1/8 that keeps every crop at least as large as its output."""
    shapes = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: shapes.append((r := decode(*a, **k)).shape[:2]) or r)
    data = jpeg(2, 512, 512)
    for size, count, scale, wanted in ((224, 1, (1.0, 1.0), 256), (60, 1, (1.0, 1.0), 64), (96, 8, (0.05, 0.25), 512)):
        spec = CropSpec(size, count, scale)
        out = torch.empty(count, size, size, 3, dtype=torch.uint8)
        random_crops(data, [spec], np.full(count * loader.DRAWS_PER_CROP, 0.5 if count == 1 else 0.01), [out])
        assert shapes.pop() == (wanted, wanted)


def test_batches_do_not_depend_on_workers_or_on_the_batch(folder):
    images = FolderImages(folder)
    wanted = [Request(0, 0, 3), Request(0, 3, 6), Request(2, 0, 6)]

    def load(batches, wanted, workers=0) -> list[dict]:
        with make_loader(batches, iter(wanted), workers, False) as loader:
            return list(loader)

    alone = load(batches_of(images), wanted)
    helped = load(batches_of(images), wanted, workers=2)
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one["crops"], other["crops"], strict=True))
        assert torch.equal(one["labels"], other["labels"]) and np.array_equal(one["samples"], other["samples"])
    single = load(batches_of(images), [Request(2, 4, 5)])
    assert torch.equal(single[0]["crops"][1][0], alone[2]["crops"][1][4])
    other_seed = load(batches_of(images, seed=1), [Request(2, 0, 6)])
    assert not torch.equal(other_seed[0]["crops"][0], alone[2]["crops"][0])
    assert alone[0]["crops"][0].shape == (3, 1, 24, 24, 3) and alone[0]["crops"][1].shape == (3, 3, 12, 12, 3)


class Refusing:
    """Items of which the second one is a UserError."""

    def __getitem__(self, request: int) -> dict:
        if request:
            raise UserError(f"--data: item {request} cannot be read; repair it")
        return {"item": request}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_its_message_and_ends_the_workers(workers):
    with pytest.raises(UserError) as caught, make_loader(Refusing(), iter([0, 1]), workers, False) as batches:
        items = iter(batches)
        assert next(items) == {"item": 0} and len(multiprocessing.active_children()) == workers
        next(items)
    assert str(caught.value) == "--data: item 1 cannot be read; repair it"
    assert multiprocessing.active_children() == []  # though the exception still holds the frames of the block


class Named:
    """Each item names the process that made it."""

    def __getitem__(self, request: int) -> dict:
        time.sleep(0.05)  # so that each worker has its turn
        return {"pid": os.getpid()}


def test_workers_live_on_from_pass_to_pass_as_validations_do_over_epochs(folder):
    with make_loader(Named(), range(6), 2, False) as items:
        passes = [{item["pid"] for item in items} for _ in range(3)]
    assert passes[0] == passes[1] == passes[2] and len(passes[0]) == 2 and os.getpid() not in passes[0]
    recipe = {"val_resize": 20, "val_crop": 16}
    with validation_on(FolderImages(folder), recipe, 1, False) as validation:
        workers = []
        for _ in range(2):  # epochs
            assert sum(len(batch["labels"]) for batch in validation.batches) == validation.count > 0
            workers.append(multiprocessing.active_children())
    assert workers[0] == workers[1] and len(workers[0]) == 1


def test_requests_are_made_when_they_are_due():
    made = []
    wanted = (made.append(0) or 0 for _ in range(10**9))
    with make_loader(Refusing(), wanted, 1, False) as batches:
        next(iter(batches))
    assert len(made) <= 4


# ===== where images come from =====


def test_labels_are_places_in_the_sorted_class_list(folder):
    images = FolderImages(folder)
    assert images.class_ids == ["n01", "n02"] and images.labels.tolist() == [0] * 5 + [1]
    batch = batches_of(images)[Request(0, 0, 6)]
    assert [int(images.labels[sample]) for sample in batch["samples"]] == batch["labels"].tolist()


def test_subsets_are_the_first_images_of_each_class_and_nested(folder):
    images = FolderImages(folder)
    images.limit(2)
    assert [images.name(i).rsplit("/", 1)[1] for i in range(len(images))] == [
        "n01_000000.jpg",
        "n01_000001.jpg",
        "n02_000000.jpg",
    ]


def test_each_data_may_have_a_limit_of_its_own(folder):
    few, more = open_sources([folder, folder], [1, 3])
    assert [len(few), len(more)] == [2, 4] and {*few.names.tolist()} < {*more.names.tolist()}
    with pytest.raises(UserError, match="--images-per-class: 3 numbers for 2 --data; give one or as many"):
        open_sources([folder, folder], [1, 2, 3])


def pack(folder, shards, flat: bool) -> None:
    """Tar shards as WebDataset names them: `<id>_<index>.jpg` (flat) or `<id>/<id>_<index>.jpg`."""
    shards.mkdir()
    paths = sorted(folder.glob("*/*.jpg"))
    for number in range(2):
        with tarfile.open(shards / f"shard-{number:06d}.tar", "w") as tar:
            for path in paths[number::2]:
                tar.add(path, path.name if flat else f"{path.parent.name}/{path.name}")
                note = tarfile.TarInfo(path.with_suffix(".json").name)
                note.size = 2
                tar.addfile(note, io.BytesIO(b"{}"))


@pytest.mark.parametrize("flat", [True, False])
def test_tar_shards_give_the_same_batches_as_folders(folder, tmp_path, flat):
    pack(folder, tmp_path / "shards", flat)
    packed, images = open_images(tmp_path / "shards"), open_images(folder)
    assert isinstance(packed, TarImages) and packed.class_ids == images.class_ids
    assert packed.summary() == images.summary()  # so a run may move from one to the other
    one, other = (batches_of(source)[Request(0, 0, 6)] for source in (packed, images))
    assert torch.equal(one["crops"][0], other["crops"][0]) and torch.equal(one["labels"], other["labels"])
    packed.limit(1)
    assert len(packed) == 2 and packed.read(1) == images.read(5)


def test_a_shard_that_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "shard-000000.tar")
    with pytest.raises(UserError, match=r"shard-000000\.tar is no readable tar file .*not a regular file"):
        open_images(tmp_path)


def test_ids_with_dots_survive_packing(tmp_path):
    """WebDataset's stems have no dots: dataset.json tells how the class is really called."""
    shards = tmp_path / "set" / "shards"
    shards.mkdir(parents=True)
    (tmp_path / "plain" / "v1.0").mkdir(parents=True)
    (tmp_path / "plain" / "v1.0" / "v1_0_000000.jpg").write_bytes(jpeg(0))
    with tarfile.open(shards / "set-000000.tar", "w") as tar:
        tar.add(tmp_path / "plain" / "v1.0" / "v1_0_000000.jpg", "v1_0_000000.jpg")
    write_json(tmp_path / "set" / "dataset.json", {"classes": [{"id": "v1.0", "name": "old"}]})
    assert open_images(tmp_path / "set").class_ids == open_images(shards).class_ids == ["v1.0"]


def test_a_set_may_have_more_shards_than_a_process_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.image_sets.MOST_OPEN", 2)
    for number in range(5):
        with tarfile.open(tmp_path / f"s{number}.tar", "w") as tar:
            for name in (f"bus/._{number}.jpg", f"bus/{number}.jpg"):  # the first: macOS's, and no image
                member = tarfile.TarInfo(name)
                member.size = len(jpeg(number))
                tar.addfile(member, io.BytesIO(jpeg(number)))
    images = open_images(tmp_path)
    assert len(images) == 5
    open_before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [images.read(index) for index in range(5)] == [jpeg(number) for number in range(5)]
    assert len(os.listdir("/proc/self/fd")) == open_before + 2


@pytest.mark.parametrize("classes", [["a", "b"], {"a": 1}, [{"id": "a"}], 3, None])
def test_someone_elses_dataset_json_is_left_alone(folder, classes):
    write_json(folder.parent / "dataset.json", {"classes": classes})
    images = open_images(folder)
    assert class_names(images.class_ids, [images])


def test_a_truncated_shard_is_named(folder, tmp_path):
    pack(folder, tmp_path / "shards", flat=True)
    shard = tmp_path / "shards" / "shard-000000.tar"
    images = open_images(tmp_path / "shards")
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(BadImage, match=r"shard-000000\.tar is truncated"):
        [images.read(i) for i in range(len(images))]
    shard.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"shard-000000\.tar is no readable tar"):
        open_images(tmp_path / "shards")


def test_a_generated_dataset_must_hold_the_classes_it_names(folder, tmp_path):
    out = tmp_path / "digits_sd"
    out.mkdir()
    folder.rename(out / "train")
    classes = [{"id": "n01", "name": "zero, nought"}, {"id": "n02", "name": "one"}]
    write_json(out / "dataset.json", {"classes": classes})
    images = open_images(out)
    assert images.class_ids == ["n01", "n02"] and class_names(["n01", "n02"], [images]) == ["zero", "one"]
    write_json(out / "dataset.json", {"classes": [*classes, {"id": "n03", "name": "two"}]})
    with pytest.raises(UserError, match=r"1 missing \(n03\)"):
        open_images(out)
    write_json(out / "dataset.json", {"classes": classes[:1]})
    with pytest.raises(UserError, match=r"1 extra \(n02\)"):
        open_images(out)


def test_missing_and_empty_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        open_images(tmp_path / "nowhere")
    (folder / "n03").mkdir()
    with pytest.raises(UserError, match=r"n03 holds no image"):
        open_images(folder)


def test_sources_of_a_mix_must_agree_on_classes(folder, tmp_path):
    other = tmp_path / "other"
    for class_id in ("n01", "n04"):
        (other / class_id).mkdir(parents=True)
        (other / class_id / "a.jpg").write_bytes(jpeg(0))
    with pytest.raises(UserError, match=r"1 missing \(n02\); 1 extra \(n04\)"):
        open_sources([folder, other], None)


def test_validation_may_hold_more_classes_or_fewer_but_not_both(folder, tmp_path, capsys):
    val = tmp_path / "val"
    for class_id in ("n00", "n01", "n02", "n04"):
        (val / class_id).mkdir(parents=True)
        (val / class_id / "a.jpg").write_bytes(jpeg(0))
    more = open_validation(str(val), ["n01", "n02"])
    assert more.labels.tolist() == [0, 1] and more.name(0) == f"{val}/n01/a.jpg"
    assert capsys.readouterr().out == f"--val {val}: 2 class folders that the training data lack are ignored\n"
    assert open_validation(str(val), ["n00", "n01", "n02", "n03", "n04"]).labels.tolist() == [0, 1, 2, 4]
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"--val .*: 1 training classes are missing, e.g. n03, and 3 class .* n00"):
        open_validation(str(val), ["n01", "n03"])


def test_classes_select_folders(folder, tmp_path):
    (folder / "n03").mkdir()
    (folder / "n03" / "a.jpg").write_bytes(jpeg(0))
    table = tmp_path / "two.tsv"
    table.write_text("id\tname\nn03\tthree\nn01\tone\n")
    (images,) = open_sources([folder], None, str(table))
    assert images.class_ids == ["n01", "n03"] and images.labels.tolist() == [0] * 5 + [1]
    assert images.name(5) == f"{folder}/n03/a.jpg"
    (folder / "n02").rename(tmp_path / "n02")
    assert images.summary() == open_images(folder).summary()  # the same images, so the same run
    pack(folder, tmp_path / "shards", flat=False)
    (packed,) = open_sources([tmp_path / "shards"], 1, str(table))
    assert packed.class_ids == ["n01", "n03"] and packed.read(1) == images.read(5)
    table.write_text("id\tname\nn01\tone\nn09\tnine\n")
    with pytest.raises(UserError, match=r"--data .*differ from --classes .*two.tsv: 1 missing \(n09\)"):
        open_sources([folder], None, str(table))


def test_an_unfinished_dataset_is_used_with_a_warning(folder, tmp_path, capsys):
    out = tmp_path / "set"
    out.mkdir()
    folder.rename(out / "train")
    rows = [{"id": "n01", "name": "one", "images": 5}, {"id": "n02", "name": "two", "images": 4}]
    write_json(out / "dataset.json", {"classes": rows})
    for path in (out, out / "train"):
        open_sources([path], None)
        warning = f"warning: --data {out / 'train'}: 3 images that dataset.json wants are missing; "
        assert capsys.readouterr().err == warning + f"`python generate.py --out {out} --status` shows where\n"
    rows[1]["images"] = 1
    write_json(out / "dataset.json", {"classes": rows})
    open_sources([out], None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("packed", [False, True])
def test_a_generated_dataset_is_what_its_manifest_knows(folder, tmp_path, capsys, packed):
    """Planted strays of every kind are left out and named; a changed byte is found."""
    out = tmp_path / "set"
    out.mkdir()
    known = [
        (class_id, {path.name: sha256_file(path) for path in sorted((folder / class_id).glob("*.jpg"))})
        for class_id in ("n01", "n02")
    ]
    rows = [{"id": class_id, "name": class_id, "images": len(hashes)} for class_id, hashes in known]
    write_json(out / "dataset.json", {"classes": rows})
    strays = ["n01/copy of n01_000000.jpg", "n01/n01_000099.jpg", "n02/a/n02_000000.jpg"][: 2 if packed else 3]
    for name in strays:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(jpeg(3))
    flipped = folder / "n01" / "n01_000002.jpg"
    data = bytearray(flipped.read_bytes())
    data[-20] ^= 1
    flipped.write_bytes(data)
    if packed:
        pack(folder, out / "shards", flat=False)
    else:
        folder.rename(out / "train")
    (images,) = open_sources([out], None, None, lambda root: iter(known) if root == out else None)
    err = capsys.readouterr().err
    assert f"{len(strays)} files that the dataset's manifest does not know are left out: " in err
    assert all(name in err for name in strays) and len(images) == 6 and "are missing" not in err
    assert [images.file_name(row) for row in range(6)] == [name for _, hashes in known for name in hashes]
    batches = batches_of(images)
    for epoch in (0, 1):
        (bad,) = batches[Request(epoch, 0, 6)]["bad"]  # a decodable picture: only its hash tells
        assert (
            "n01_000002.jpg: not the bytes that the dataset's manifest records" in bad
            and ("--pack" if packed else "--repair") in bad
        )
    subset = open_sources([out], 2, None, lambda root: iter(known))[0]
    assert len(subset) == 3 and subset.read_verified(2)


def test_damaged_images_are_named_and_replaced_by_the_next_one(folder):
    damaged = folder / "n01" / "n01_000002.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    empty = folder / "n01" / "n01_000003.jpg"
    empty.write_bytes(b"")
    images = FolderImages(folder)
    batch = batches_of(images)[Request(0, 0, 6)]
    assert len(batch["bad"]) == 3  # 2 (then 3), and 3 itself
    assert {message.split(":")[0] for message in batch["bad"]} == {str(damaged), str(empty)}
    place = batch["samples"].tolist().index(3)
    draws = loader.uniforms(4 * loader.DRAWS_PER_CROP, "crops", 0, np.array([0]), np.array([3]))[0]
    out = [torch.empty(spec.count, spec.size, spec.size, 3, dtype=torch.uint8) for spec in SPECS]
    random_crops(images.read(4), SPECS, draws, out)
    assert torch.equal(batch["crops"][0][place], out[0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_odd_image_modes_become_three_channels(tmp_path, mode):
    grey = Image.fromarray(picture(0)[:, :, 0].astype(np.uint16) * 257)  # of 16 bits
    image = Image.fromarray(picture(0)).convert(mode) if mode != "I;16" else grey
    stream = io.BytesIO()
    image.save(stream, "JPEG" if mode == "CMYK" else "PNG")
    out = [torch.empty(1, 24, 24, 3, dtype=torch.uint8)]
    random_crops(stream.getvalue(), SPECS[:1], np.full(loader.DRAWS_PER_CROP, 0.5), out)
    assert out[0].float().std() > 5
