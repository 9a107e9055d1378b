"""Features equal a plain loop's, are computed once, survive kill -9 and two runs at a time."""

from __future__ import annotations

import copy
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.models import resnet18

from tests.fake_cuda import FakeCuda
from tests.test_machine import MEMORY_ERRORS
from utils.cli import UserError
from utils.evaluation import feature_cache, features
from utils.evaluation.matching import fingerprint

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TRANSFORM = features.Transform(72, 64, "bilinear")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[tuple[str, int]]:
    """PNG and JPEG, grey, wide, tall, and smaller than the crop."""
    folder = tmp_path_factory.mktemp("images") / "cat"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, size in enumerate([(90, 70), (70, 90), (64, 64), (300, 80), (40, 30), (200, 201), (72, 72)]):
        smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        smooth = smooth.convert("L") if index == 5 else smooth
        smooth.save(folder / f"{index}.{'jpg' if index % 2 else 'png'}")
    return [(str(path), 0) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    model = resnet18()
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))  # batch norm statistics that keep the features alive
    return model.eval().requires_grad_(False)


def extractor(backbone, dtype=torch.float32, sha256="a" * 64, batch_size=3) -> features.Extractor:
    return features.Extractor(backbone, sha256, CPU, dtype, batch_size, workers=2)


def plain(backbone, samples, interpolation=transforms.InterpolationMode.BILINEAR) -> np.ndarray:
    """The loop everybody writes: Pillow, torchvision's transforms, float32."""
    steps = transforms.Compose(
        [
            transforms.Resize(72, interpolation),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.no_grad():
        batch = torch.stack([steps(Image.open(path).convert("RGB")) for path, _ in samples])
        return backbone(batch).numpy()


def close(ours, wanted, tolerance) -> bool:
    return np.abs(ours - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_equals_the_plain_loop(images, backbone, interpolation):
    ours = extractor(backbone)(images, features.Transform(72, 64, interpolation), None, "t")
    wanted = plain(backbone, images, transforms.InterpolationMode(interpolation))
    assert ours.dtype == np.float32 and close(ours, wanted, 1e-4)
    assert not close(ours, wanted[::-1], 1e-2)  # order matters, and the images differ


def test_fused_network_equals_the_plain_one(images, backbone, monkeypatch):
    monkeypatch.setattr(features, "COMPILE_FROM", 0)
    fused = features.optimize_for_cpu(backbone, 64)
    assert isinstance(fused, torch.jit.ScriptModule)
    ours = extractor(backbone)(images, TRANSFORM, None, "t")
    assert close(ours, plain(backbone, images), 1e-4)


def test_a_network_that_tracing_would_change_is_left_alone():
    class Moody(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) * (2 if len(x) == 3 else 1)  # a trace would keep one branch only

    model = Moody()
    assert features.optimize_for_cpu(model, 8) is model


def test_bf16_stays_within_a_percent(images, backbone):
    ours = extractor(backbone, torch.bfloat16)(images, TRANSFORM, None, "t")
    assert ours.dtype == np.float16 and close(ours.astype(np.float32), plain(backbone, images), 0.02)


# ===== the cache =====


def forbid(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(features.Extractor, "_blocks", refuse)


def test_second_call_reads_the_first_ones(images, backbone, tmp_path, monkeypatch):
    first = extractor(backbone)(images, TRANSFORM, tmp_path, "t")
    forbid(monkeypatch)
    second = extractor(backbone, batch_size=2)(images, TRANSFORM, tmp_path, "t")
    assert np.array_equal(first, second) and len(first) == len(images)


def test_key_holds_what_changes_features(images, backbone, tmp_path, monkeypatch):
    extractor(backbone)(images, TRANSFORM, tmp_path, "t")
    forbid(monkeypatch)
    for run in (
        lambda: extractor(backbone, sha256="b" * 64)(images, TRANSFORM, tmp_path, "t"),
        lambda: extractor(backbone, torch.bfloat16)(images, TRANSFORM, tmp_path, "t"),
        lambda: extractor(backbone)(images, features.Transform(72, 64, "bicubic"), tmp_path, "t"),
        lambda: extractor(backbone)(images, features.Transform(72, 64, "bilinear", border=2), tmp_path, "t"),
        lambda: extractor(backbone)(images[:-1], TRANSFORM, tmp_path, "t"),
    ):
        with pytest.raises(AssertionError, match="computed again"):
            run()


def test_fingerprint_follows_the_files(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"1")
    first = fingerprint([(str(path), 0)])
    assert fingerprint([(str(path), 7)]) == first  # labels do not change features
    path.write_bytes(b"22")
    assert fingerprint([(str(path), 0)]) != first
    with pytest.raises(UserError, match="cannot read"):
        fingerprint([(str(tmp_path / "gone.png"), 0)])


def test_damaged_cache_is_computed_again(images, backbone, tmp_path):
    first = np.array(extractor(backbone)(images, TRANSFORM, tmp_path, "t"))
    (path,) = tmp_path.glob("*/features.npy")
    for damage in (path.read_bytes()[:50], b"", path.read_bytes()[:-8]):
        path.write_bytes(damage)
        assert np.array_equal(extractor(backbone)(images, TRANSFORM, tmp_path, "t"), first)


# ===== bad input =====


def test_damaged_image_is_named(images, backbone, tmp_path):
    good = Path(images[1][0]).read_bytes()
    for name, data in [("half.jpg", good[: len(good) // 2]), ("empty.png", b""), ("text.jpg", b"hello")]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"damaged image .*{name}"):
            extractor(backbone)([*images, (str(tmp_path / name), 0)], TRANSFORM, tmp_path / "cache", "t")
    assert not list(tmp_path.glob("cache/*/*.npy"))


def test_nan_and_infinite_features_are_refused(images, tmp_path):
    for value, text in ((float("nan"), "NaN for 7 of 7 images"), (float("inf"), "overflow")):

        class Broken(torch.nn.Module):
            def forward(self, x, value=value):
                return x.mean((2, 3)) * value

        with pytest.raises(UserError, match=text):
            extractor(Broken())(images, TRANSFORM, tmp_path, "t")
    assert not list(tmp_path.glob("*/features.npy"))


# ===== kill -9, and two runs at a time =====

WORKER = """
import sys, time, numpy as np, torch
from pathlib import Path
from utils.evaluation import feature_cache, features
folder, cache, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
feature_cache.BLOCK = 4
class Slow(torch.nn.Module):
    def forward(self, x):
        time.sleep(pause)
        with open(cache / "forwards.log", "a") as log:
            log.write(f"{len(x)}\\n")
        return x.mean((2, 3))
samples = [(str(path), 0) for path in sorted(folder.iterdir())]
extract = features.Extractor(Slow(), "c" * 64, torch.device("cpu"), torch.float32, 2, 1)
np.save(cache / f"out{sys.argv[4]}.npy", extract(samples, features.Transform(8, 8, "bilinear"), cache, "t"))
"""


@pytest.fixture
def many(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(16):
        Image.new("RGB", (8, 8), (index * 15, 0, 0)).save(folder / f"{index:02d}.png")
    (tmp_path / "cache").mkdir()
    return folder, tmp_path / "cache"


def start(many, pause: float, name: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(many[0]), str(many[1]), str(pause), name]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def wait_for(condition, seconds=60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_killed_run_continues_with_its_blocks(many):
    _, cache = many
    worker = start(many, 0.2, "1")
    wait_for(lambda: len(list(cache.glob("*/block_*.npy"))) >= 2)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("*/block_*.npy")}
    assert 2 <= len(kept) < 4
    (cache / "forwards.log").unlink()
    assert start(many, 0, "2").wait() == 0
    again = sum(map(int, (cache / "forwards.log").read_text().split()))
    assert again == 16 - 4 * len(kept)
    rows = np.load(cache / "out2.npy")
    assert rows.shape == (16, 3) and (np.diff(rows[:, 0]) > 0).all()
    assert not list(cache.glob("*/block_*.npy"))  # joined


def test_two_runs_at_a_time_compute_once(many):
    _, cache = many
    workers = [start(many, 0.1, name) for name in "12"]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert sum(map(int, (cache / "forwards.log").read_text().split())) == 16
    assert np.array_equal(np.load(cache / "out1.npy"), np.load(cache / "out2.npy"))


FULL_DISK = """
import resource, signal, sys, numpy as np, torch
from pathlib import Path
from utils.cli import make_parser, run
from utils.evaluation import features
from utils.evaluation.feature_cache import FeatureCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8_200, 8_200))
cache = FeatureCache(Path(sys.argv[1]), 1034)
cache.join("t")
"""


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path):
    """Joining the blocks fails half-way: the next run finds no features and no leftovers."""
    cache = feature_cache.FeatureCache(tmp_path / "entry", feature_cache.BLOCK + 10)
    cache.entry.mkdir()
    (cache.entry / ".features.npy.0000000000000000.1.tmp").write_bytes(b"of a killed run elsewhere, long ago")
    os.utime(cache.entry / ".features.npy.0000000000000000.1.tmp", (0, 0))
    blocks = [np.ones((feature_cache.BLOCK, 2), np.float32), np.zeros((10, 2), np.float32)]
    for start, block in zip((0, feature_cache.BLOCK), blocks, strict=True):
        cache.write_block(start, block)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(cache.entry)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and f"[Errno {errno.EFBIG}]" in done.stderr
    assert cache.read() is None
    names = sorted(path.name.split(".")[0] for path in cache.entry.iterdir())
    assert names == ["block_00000000", "block_00001024", "features"]  # the checksums alone
    cache.join("t")
    assert np.array_equal(cache.read(), np.concatenate(blocks))
    assert sorted(path.name for path in cache.entry.iterdir()) == ["features.json", "features.npy"]


# ===== checksums =====


@pytest.fixture
def kept(tmp_path, monkeypatch) -> tuple[feature_cache.FeatureCache, np.ndarray]:
    """A joined entry of three blocks."""
    monkeypatch.setattr(feature_cache, "BLOCK", 4)
    cache = feature_cache.FeatureCache(tmp_path / "entry", 10)
    cache.entry.mkdir()
    whole = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    for start in cache.starts:
        cache.write_block(start, whole[start : start + 4])
    cache.join("t")
    return cache, whole


def test_no_flipped_bit_is_measured(kept):
    """Every bit of features.npy and of its checksums: refused, or without effect on the numbers."""
    cache, whole = kept
    seen = 0
    for name in ("features.npy", "features.json"):
        data = (cache.entry / name).read_bytes()
        for bit in range(8 * len(data)):
            broken = bytearray(data)
            broken[bit // 8] ^= 1 << bit % 8
            (cache.entry / name).write_bytes(broken)
            found = cache.read()
            assert found is None or np.array_equal(found, whole)
            seen += found is None
        (cache.entry / name).write_bytes(data)
    assert seen > 8 * whole.nbytes  # every bit of the numbers, and most of the rest
    assert np.array_equal(cache.read(), whole)


def test_only_the_damaged_block_is_computed_again(kept, capsys):
    cache, whole = kept
    data = bytearray((cache.entry / "features.npy").read_bytes())
    data[-whole.nbytes + 4 * 3 * 4 : -whole.nbytes + 8 * 3 * 4] = bytes(4 * 3 * 4)  # zeros over the second block
    (cache.entry / "features.npy").write_bytes(data)
    assert cache.read() is None
    assert sorted(cache.blocks("mine on IN-Val")) == [0, 8]
    assert capsys.readouterr().out.startswith("mine on IN-Val: 1 blocks of the feature cache fail their checksum")
    cache.write_block(4, whole[4:8])
    cache.join("t")
    assert np.array_equal(cache.read(), whole)


def test_no_flipped_bit_of_a_block_is_joined(tmp_path):
    cache = feature_cache.FeatureCache(tmp_path, 3)
    cache.write_block(0, np.ones((3, 2), np.float16))
    (path,) = tmp_path.glob("block_*.npy")
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 3):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        assert cache.blocks("t") == {}
    path.write_bytes(data)
    assert list(cache.blocks("t")) == [0]


def test_features_of_zeros_are_computed_again(images, backbone, tmp_path, capsys):
    first = np.array(extractor(backbone)(images, TRANSFORM, tmp_path, "t"))
    (path,) = tmp_path.glob("*/features.npy")
    path.write_bytes(path.read_bytes()[:128] + bytes(first.nbytes))
    assert np.array_equal(extractor(backbone)(images, TRANSFORM, tmp_path, "t"), first)
    assert "t: 1 blocks of the feature cache fail their checksum; computed again" in capsys.readouterr().out


# ===== a GPU =====


@pytest.mark.parametrize(("kind", "message"), MEMORY_ERRORS)
def test_every_face_of_full_memory_names_the_remedy(images, tmp_path, kind, message):
    class Full(torch.nn.Module):
        def forward(self, x):
            raise kind(message)

    with pytest.raises(UserError, match=r"^--batch-size 7: the GPU is out of memory; try \d+$"):
        extractor(Full(), batch_size=7)(images, TRANSFORM, tmp_path, "t")
    assert not list(tmp_path.glob("*/features.npy"))


def test_another_error_stays_what_it_is(images):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        extractor(Broken())(images, TRANSFORM, None, "t")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_gpu_a_block_is_waited_for_once(images, backbone, monkeypatch, dtype):
    """Devices and number formats fit together, copies to the GPU are pinned and not waited for."""
    cuda, pinned = FakeCuda(), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(len(tensor)) or tensor)
    statistics = [cuda.tensor(torch.ones(3, 1, 1)) for _ in range(2)]  # ImageNet's, made once a process
    monkeypatch.setattr("utils.images._statistics", lambda device: statistics)
    model = cuda.move(copy.deepcopy(backbone), torch.channels_last)
    monkeypatch.setattr(model, "to", lambda *_, **__: model)  # it is there, and fake parameters cannot be swapped
    extract = features.Extractor(model, "", torch.device("cuda"), dtype, batch_size=3, workers=1)
    with cuda.present():
        (block,) = extract._blocks(images, TRANSFORM, "t", [0])
    assert block.shape == (7, 512) and block.dtype == (np.float32 if dtype == torch.float32 else np.float16)
    assert pinned == [3, 3, 1]
    assert cuda.waits == ["copy cuda -> cpu (7, 512)"]
