"""How right a frozen model is: its features and logits, and from logits or a probe to metrics with their intervals."""

import base64
from typing import Any

import numpy as np
import torch

from utils import metrics
from utils.evaluation.checkpoints import Source
from utils.evaluation.features import Extractor, Share
from utils.evaluation.jobs import Job, Measured
from utils.evaluation.matching import LoadedSet, MatchedSet, Samples
from utils.evaluation.weights import Classifier, load_classifier
from utils.machine import Meter, resolve_dtype

MAX_CONFUSION = 200  # classes: a larger matrix is too large to read


class FrozenModel:
    """A checkpoint in memory with the machine it runs on: `features` of images, `classifier` for their logits."""

    def __init__(
        self, source: Source, classes: str | None, device: torch.device, batch_size: int, workers: int, share: Share
    ) -> None:
        """CLASSES: as the option of this name. UserError if the weights are of no use."""
        self.source, self.device, self.batch_size, self.workers, self.share = source, device, batch_size, workers, share
        self.classifier: Classifier = load_classifier(source, classes)
        if self.classifier.classes_from.startswith("assumed"):
            print(f"{source.label}: outputs {self.classifier.classes_from} (else give --classes)", flush=True)
        self._extractors: dict[str, Extractor] = {}  # by number format
        self._meter, self._told = Meter(device), 0

    def features(self, job: Job, samples: Samples, stamps: np.ndarray, split: str = "") -> np.ndarray:
        """(N, D) features of SAMPLES as JOB wants them, from its cache where they are known. STAMPS: stat_files'."""
        if job.number_format not in self._extractors:
            dtype = resolve_dtype(job.number_format, self.device)
            model, how = self.classifier.backbone, (self.batch_size, self.workers, self.share)
            self._extractors[job.number_format] = Extractor(model, self.source.sha256, self.device, dtype, *how)
        extract, title = self._extractors[job.number_format], job.title + (f", {split}" if split else "")
        return extract(samples, job.transform, job.out / "features", title, stamps)

    def cost(self) -> dict[str, float]:
        """Seconds, joules and operations (of features that were not kept already) since the last call."""
        flops = sum(extract.flops() for extract in self._extractors.values())
        spent = self._meter.read() | {"flops": flops - self._told}
        self._told = flops
        return spent


def metrics_of_logits(logits: np.ndarray, matched: MatchedSet, model: Classifier) -> tuple[Measured, dict, dict]:
    """(metrics, facts, sidecar) of logits (N, compared classes): counts first, one division at the end.

    top5 only where more than five classes are compared. Raises UserError if a logit is NaN.
    """
    ranks = metrics.best_ranks(logits, matched.labels)
    labels = np.array([label for _, label in matched.samples])
    n, correct, classes = len(ranks), ranks == 0, len(matched.class_ids)
    measured: dict[str, tuple[float, Any]] = {}
    for k in (1, 5) if logits.shape[1] > 5 else (1,):
        among = int((ranks < k).sum())
        measured[f"top{k}"] = 100 * among / n, metrics.wilson_interval(among, n)
    mean, low, high = metrics.mean_per_class(correct, labels, classes)
    measured["mean_per_class"] = mean, (low, high)
    error, low, high = metrics.ece_with_interval(logits, correct)
    measured["ece"] = error, (low, high)
    facts = {
        "n": n,
        "num_classes": classes,
        "compared": logits.shape[1],  # classes the argmax is over
        "seed": model.source.recorded.seed,
    }

    counts, accuracies = metrics.per_class(correct, labels, classes)
    names = dict(zip(model.class_ids, model.class_names, strict=True))
    sidecar: dict[str, Any] = {
        "class_ids": matched.class_ids,
        "class_names": [names.get(class_id, class_id) for class_id in matched.class_ids],
        "classes_in_set": matched.classes_in_set,
        "images_in_set": matched.images_in_set,
        "per_class": [
            {"id": class_id, "n": int(count), "top1": round(float(accuracy), 4)}
            for class_id, count, accuracy in zip(matched.class_ids, counts, accuracies, strict=True)
        ],
        "correct": base64.b64encode(np.packbits(correct).tobytes()).decode(),  # one bit an image, for paired intervals
    }
    compared = [model.class_ids[column] for column in matched.columns]
    # Where some image has several right classes, a confusion matrix means nothing.
    if matched.labels.ndim == 1 and compared == matched.class_ids and len(compared) <= MAX_CONFUSION:
        table = metrics.confusion(logits.argmax(1), matched.labels, len(compared))
        sidecar["confusion"] = table.tolist()
    return measured, facts, sidecar


def metrics_of_probe(
    result: dict[str, Any], loaded: LoadedSet, seed: int, earlier: list[dict]
) -> tuple[Measured, dict, dict]:
    """(metrics, facts, sidecar) of RESULT, what probes.run_probe found with SEED; EARLIER: runs of other seeds.

    RESULT may also hold "knn", the top-1 of neighbours.knn_top1, which is the same for every seed.
    """
    n = len(loaded.samples)
    measured: dict[str, tuple[float, Any]] = {
        name: (result[name], metrics.wilson_interval(round(result[name] * n / 100), n))
        for name in ("top1", "knn")
        if name in result
    }
    measured["mean_per_class"] = (result["mean_per_class"], None)
    run = {"seed": seed, **{key: result[key] for key in ("top1", "chosen", "held_out")}}
    runs = [*(other for other in earlier if other["seed"] != seed), run]
    facts = {"n": n, "num_classes": len(loaded.class_ids), "seed": seed, "chosen": result["chosen"]}
    return measured, facts, {"class_ids": [], "class_names": [], "per_class": [], "runs": runs}
