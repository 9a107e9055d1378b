"""The field's k-NN classifier on frozen features: DINO's protocol, which trains nothing and has nothing to choose.

As knn_classifier of facebookresearch/dino (eval_knn.py, commit 04c0ad9): features of unit length, the 20 most similar
training images, each votes for its class with exp(similarity / 0.07). "20 is usually working the best" (ibid.).
"""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

NEIGHBOURS, TEMPERATURE = 20, 0.07
BLOCK = 1024  # test images compared at a time


def knn_top1(splits: dict[str, tuple[np.ndarray, np.ndarray]], device: Any = "cpu") -> float:
    """Top-1 in percent on splits["test"] of the neighbours in splits["trainval"]: (features (N, D), labels (N,)) each.

    With fewer than 20 training images all of them vote.
    """
    features = (torch.from_numpy(np.array(splits[name][0], np.float32)).to(device) for name in ("trainval", "test"))
    train, test = (normalize(x, dim=1) for x in features)
    labels = torch.from_numpy(np.asarray(splits["trainval"][1], np.int64)).to(device)
    k, correct = min(NEIGHBOURS, len(train)), 0
    for start in range(0, len(test), BLOCK):
        similarity, nearest = (test[start : start + BLOCK] @ train.T).topk(k)  # (B, k)
        votes = torch.zeros(len(similarity), int(labels.max()) + 1, device=device)
        votes.scatter_add_(1, labels[nearest], (similarity / TEMPERATURE).exp())
        correct += int((votes.argmax(1).cpu().numpy() == splits["test"][1][start : start + BLOCK]).sum())
    return 100 * correct / len(test)
