"""Feature extraction on the CPU against the loop that everybody writes, same weights, same images."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets, models, transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench_train import write_images  # noqa: E402
from benchmarks.bounds import bound, profile_if_asked  # noqa: E402
from models.fashion import read_part  # noqa: E402
from utils.evaluation import features  # noqa: E402
from utils.evaluation.feature_cache import BLOCK  # noqa: E402
from utils.model import build_model, count_flops, export_state_dict  # noqa: E402

ROUNDS = 3  # of ours and the peer in turn; medians are compared
IMAGES = 224  # a round: different test images in each
HEAD_IMAGES = 300  # training images behind the classifier


def write_clothes(folder: Path, part: str, count: int, side: tuple[int, int] = (500, 375)) -> list[tuple[str, int]]:
    """Photographs of clothes as JPEGs of ImageNet's usual size, grey background, the garment in the middle."""
    _, labels, pixels = read_part(part)
    samples = []
    for index in range(count):
        image = Image.new("RGB", side, (96, 96, 96))
        garment = Image.fromarray(pixels[index]).resize((300, 300), Image.Resampling.BICUBIC)
        image.paste(garment, ((side[0] - 300) // 2, (side[1] - 300) // 2))
        path = folder / str(labels[index]) / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
        samples.append((str(path), int(labels[index])))
    return samples


class Listed(torch.utils.data.Dataset):
    """The peer's dataset: Pillow and torchvision's transforms, image by image."""

    steps = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def __init__(self, samples: list[tuple[str, int]]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.steps(datasets.folder.pil_loader(self.samples[index][0]))


def plain_loop(model: torch.nn.Module, samples: list[tuple[str, int]]) -> np.ndarray:
    """The peer's features (N, D): a DataLoader with a worker a core."""
    loader = torch.utils.data.DataLoader(Listed(samples), batch_size=64, num_workers=torch.get_num_threads())
    with torch.no_grad():
        return torch.cat([model(batch) for batch in loader]).numpy()


def make_backbone(samples: list[tuple[str, int]]) -> torch.nn.Module:
    """A ResNet50 whose batch norm has seen the training images: live features, though its kernels are random."""
    torch.manual_seed(0)
    model = models.resnet50()
    model.fc = torch.nn.Identity()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain average
    batch = torch.stack([Listed(samples)[index] for index in range(0, len(samples), 10)])
    with torch.no_grad():
        model.train()(batch)
    return model.eval().requires_grad_(False)


def features_vs_plain() -> dict:
    """The row of the benchmark, see bench.py."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with tempfile.TemporaryDirectory() as folder:
        train = write_clothes(Path(folder) / "train", "real", HEAD_IMAGES)
        test = write_clothes(Path(folder) / "test", "test", ROUNDS * IMAGES)
        backbone = make_backbone(train)
        workers = torch.get_num_threads()
        ours = features.Extractor(backbone, "0" * 64, torch.device("cpu"), torch.float32, 64, workers)
        transform = features.Transform(256, 224, "bilinear")
        started = time.perf_counter()
        learned = ours(train, transform, None, "head")  # also traces and fuses the network once
        start_up = time.perf_counter() - started
        # The peer gets its own copy: fusing has laid out the weights anew.
        peer = make_backbone(train)

        profile_if_asked(lambda: ours(test[:IMAGES], transform, None, "profile"))
        rates: dict[str, list[float]] = {"ours": [], "peer": []}
        found: dict[str, list[np.ndarray]] = {"ours": [], "peer": []}
        for start in range(0, len(test), IMAGES):
            part = test[start : start + IMAGES]
            for name, run in (
                ("peer", lambda part: plain_loop(peer, part)),
                ("ours", lambda part: ours(part, transform, None, "round")),
            ):
                started = time.perf_counter()
                found[name].append(run(part))
                rates[name].append(len(part) / (time.perf_counter() - started))
    mine, theirs = (np.concatenate(found[name]) for name in ("ours", "peer"))
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    head.fit(learned, [label for _, label in train])
    labels = np.array([label for _, label in test])
    predicted = {name: head.predict(np.concatenate(found[name])) for name in found}
    top1 = {name: 100 * float((predicted[name] == labels).mean()) for name in found}
    rate = {name: statistics.median(values) for name, values in rates.items()}
    distance = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
    return {
        "row": "features_vs_plain",
        "ours": rate["ours"],
        "peer": rate["peer"],
        "unit": "img/s",
        "ratio": statistics.median(a / b for a, b in zip(rates["ours"], rates["peer"], strict=True)),
        "target": 2.7,
        **bound(count_flops(lambda: peer(torch.zeros(1, 3, 224, 224))), torch.device("cpu"), formats=[torch.float32]),
        "what": (
            "ResNet50 features of 500x375 JPEGs at 224 px in float32 on the CPU: decoding, resizing, the network. "
            "The peer: torchvision's transforms, a DataLoader a worker a core, batches of 64, eval mode."
        ),
        "notes": [
            f"largest difference of a feature: {distance:.1e} of the largest feature (tolerance 1e-4)",
            f"top-1 of a linear classifier on {len(test)} photographs of clothes: ours {top1['ours']:.2f} %, "
            f"peer {top1['peer']:.2f} %, {int((predicted['ours'] != predicted['peer']).sum())} predictions differ",
            f"the ratio of each round: {', '.join(f'{a / b:.2f}' for a, b in zip(*rates.values(), strict=True))}",
            f"not counted: {start_up:.0f} s for {len(train)} images with fusing the network first, once a process",
        ],
        "tolerance_met": distance <= 1e-4,
    }


def evaluate_two_processes() -> dict:
    """evaluate.py as two processes, a core each, against one process on one of these cores; the same feature file."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise RuntimeError("evaluate_two_processes needs two cores")
    count = 2 * BLOCK  # images: processes share the work by blocks
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "test", count, side=320)
        run = folder / "photos-seed0"
        run.mkdir()
        torch.manual_seed(0)
        torch.save(export_state_dict(build_model("resnet18", 2)), run / "photos.pth")
        described = {"arch": "resnet18", "head": "linear", "class_ids": ["n00000000", "n00000001"], "dataset": "photos"}
        (run / "args.json").write_text(json.dumps(described | {"class_names": ["a", "b"], "seed": 0}))

        def seconds(name: str, launcher: list[str], allowed: list[int]) -> float:
            argv = ["evaluate.py", "--checkpoint", run, "--test", f"photos={folder / 'test'}", "--out", folder / name]
            argv += ["--device", "cpu", "--workers", "1"]
            command = [sys.executable, *launcher, *map(str, argv)]
            bind = functools.partial(os.sched_setaffinity, 0, allowed)
            started = time.perf_counter()
            subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr, preexec_fn=bind)
            return time.perf_counter() - started

        two = ["-m", "utils.launch", "--launcher", "local", "--processes", "2"]
        ours, peer = [], []
        for number in range(ROUNDS):
            peer.append(seconds(f"one{number}", [], cores[:1]))
            ours.append(seconds(f"two{number}", two, cores))
        kept = {path.read_bytes() for path in folder.glob("*/features/*/features.npy")}
    mine, theirs = (count / statistics.median(values) for values in (ours, peer))
    return {
        "row": "evaluate_two_processes",
        "ours": mine,
        "peer": theirs,
        "unit": "img/s",
        "ratio": statistics.median(b / a for a, b in zip(ours, peer, strict=True)),
        "target": 1.7,
        "bound": 2 * theirs,
        "bound_is": "twice the rate of one process",
        "what": (
            f"The whole of `evaluate.py` on {count} JPEGs of 320 pixels, ResNet18 in float32, two processes, "
            "a core each. The peer: the same command in one process on one of these cores."
        ),
        "notes": [
            f"feature files of all {2 * ROUNDS} runs: {'the same bytes' if len(kept) == 1 else 'they differ'}",
            f"the ratio of each round: {', '.join(f'{b / a:.2f}' for a, b in zip(ours, peer, strict=True))}",
        ],
        "tolerance_met": len(kept) == 1,
    }


ROWS = {"features_vs_plain": features_vs_plain, "evaluate_two_processes": evaluate_two_processes}
