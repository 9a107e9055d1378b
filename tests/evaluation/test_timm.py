"""timm's names: its own logits on its own transforms, found in the hub's cache; what is said where there is nothing."""

import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.evaluation.test_evaluate import call, make_images
from utils.classes import load_classes
from utils.cli import UserError
from utils.evaluation import checkpoints, weights
from utils.images import IMAGENET_MEAN, IMAGENET_STD
from utils.storage import read_jsonl

timm = pytest.importorskip("timm")
NAMES = ("test_resnet.r160_in1k", "test_vit.r160_in1k", "test_convnext.r160_in1k")  # small; mean and std are 0.5


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub's cache with random weights of NAMES, and no network."""
    for name in NAMES:
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False)
        folder = tmp_path / f"hub/models--timm--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("0123abc")
        (folder / "snapshots/0123abc").mkdir(parents=True)
        safetensors.torch.save_model(model, str(folder / "snapshots/0123abc/model.safetensors"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_timms_own(cache, name):
    source = checkpoints.locate(f"timm:{name}")
    classifier, how = weights.load_classifier(source), checkpoints.transform_of(source)
    assert classifier.class_ids == load_classes("1000").ids and source.label == name
    rng = np.random.default_rng(0)
    path = cache / "x.png"
    Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).resize((300, 340), 3).save(path)
    pixels = how.read(str(path)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        ours = classifier.logits(classifier.backbone((pixels - mean) / std).numpy())
        model = timm.create_model(name, pretrained=False).eval()
        safetensors.torch.load_model(model, source.path)
        transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
        theirs = model(transform(Image.open(path).convert("RGB"))[None]).numpy()
    # Two resizing filters of 8 bits differ by a grey level or two.
    np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())
    assert ours.argmax() == theirs.argmax()


def test_from_the_name_to_a_row(cache, tmp_path, monkeypatch, capsys):
    test = make_images(tmp_path / "test", load_classes("1000").ids[:7], each=1)
    monkeypatch.chdir(tmp_path)
    assert call("--checkpoint", f"tiny=timm:{NAMES[0]}", "--device", "cpu", "--test", f"t={test}") == 0, (
        capsys.readouterr()
    )
    assert "assumed: the 1000 sorted wnids" in capsys.readouterr().out
    row = read_jsonl(tmp_path / "runs/tiny/results.jsonl")[0]
    assert (row["model"], row["n"], row["protocol"]) == ("tiny", 7, "resize 168 bilinear, crop 160, fp32")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "has no pretrained cfg registered; timm.list_pretrained"),
        ("resnet50.nope", r"Invalid pretrained tag \(nope\) for resnet50; timm.list_pretrained"),
        ("resnet50.a1_in1k", r"hub cannot be reached .*hf download timm/resnet50\.a1_in1k model\.safetensors"),
    ],
)
def test_what_is_not_there_is_one_line(cache, name, message):
    with pytest.raises(UserError, match=f"--checkpoint timm:{name}: .*{message}") as caught:
        checkpoints.locate(f"timm:{name}")
    assert "\n" not in str(caught.value)
    if name == "resnet50.a1_in1k":
        assert checkpoints.locate(f"timm:{name}", download=False).sha256 == ""


def test_damaged_weights_and_no_timm(cache, monkeypatch):
    source = checkpoints.locate(f"timm:{NAMES[0]}")
    with open(source.path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="is damaged"):
        weights.load_classifier(source)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm is not installed here; pip install timm"):
        checkpoints.locate("timm:resnet50")
