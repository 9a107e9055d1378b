"""Feature extraction on the CPU against the loop that everybody writes, same weights, same images."""

from __future__ import annotations

import statistics
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

from benchmarks.bounds import bound, profile_if_asked  # noqa: E402
from models.fashion import read_part  # noqa: E402
from utils.evaluation import features  # noqa: E402
from utils.model import count_flops  # noqa: E402

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


ROWS = {"features_vs_plain": features_vs_plain}
