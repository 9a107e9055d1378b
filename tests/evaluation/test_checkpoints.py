"""Checkpoints of every origin give the outputs of the network they came from; everything else is refused in a line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from argparse import Namespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18, resnet50

from utils.classes import load_classes
from utils.cli import UserError
from utils.evaluation import checkpoints, weights
from utils.model import build_model, export_state_dict

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def outputs(classifier: weights.Classifier) -> torch.Tensor:
    with torch.no_grad():
        return classifier.head(classifier.backbone(IMAGES))


def expect(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def randomise(model: nn.Module) -> nn.Module:
    """Batch norm statistics that differ from a fresh model's: else a lost buffer would go unseen."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return randomise(resnet18(num_classes=100))


def open_file(path) -> weights.Classifier:
    return weights.load_classifier(checkpoints.locate(str(path)))


def test_the_authors_release(tmp_path):
    """resnet50 whose fc is Linear(2048, 100, bias=False), as the project page loads it."""
    torch.manual_seed(0)
    net = randomise(resnet50())
    net.fc = nn.Linear(2048, 100, bias=False)
    torch.save(net.state_dict(), tmp_path / "imagenet_100_sd.pth")
    classifier = open_file(tmp_path / "imagenet_100_sd.pth")
    assert torch.equal(outputs(classifier), expect(net))
    assert (classifier.source.label, classifier.arch) == ("imagenet_100_sd", "resnet50")
    assert classifier.class_ids == load_classes("imagenet_100").ids == sorted(classifier.class_ids)
    assert classifier.classes_from.startswith("assumed")
    assert checkpoints.transform_of(classifier.source) == checkpoints.Transform(256, 224, "bilinear")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "args": {"lr": 0.1}},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if "num_batches_tracked" not in key},
    ],
    ids=["plain", "state_dict", "ddp", "compiled", "lightning", "old"],
)
def test_wrappers_and_prefixes(tmp_path, small, wrap):
    torch.save(wrap(small.state_dict()), tmp_path / "w.pth")
    classifier = open_file(tmp_path / "w.pth")
    assert classifier.arch == "resnet18"
    assert torch.equal(outputs(classifier), expect(small))


def test_half_precision_file_is_computed_in_float32(tmp_path, small):
    torch.save({key: value.half() for key, value in small.state_dict().items()}, tmp_path / "half.pth")
    assert outputs(open_file(tmp_path / "half.pth")).dtype == torch.float32


def test_safetensors(tmp_path, small):
    save_file(small.state_dict(), str(tmp_path / "model.safetensors"))
    assert torch.equal(outputs(open_file(tmp_path / "model.safetensors")), expect(small))


def test_timm_resnet_has_torchvisions_names(tmp_path):
    import timm

    torch.manual_seed(0)
    net = randomise(timm.create_model("resnet18", num_classes=100))
    torch.save(net.state_dict(), tmp_path / "timm.pth")
    assert torch.allclose(outputs(open_file(tmp_path / "timm.pth")), expect(net), atol=1e-5)


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "convnext_tiny"])
def test_other_torchvision_architectures_are_recognised(tmp_path, arch):
    from torchvision.models import get_model

    torch.manual_seed(0)
    net = get_model(arch, weights=None, num_classes=100).eval()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    classifier = open_file(tmp_path / "w.pth")
    assert classifier.arch == arch
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(classifier.head(classifier.backbone(images)), net(images))


def test_named_architecture_that_cannot_be_built_without_numbers(tmp_path):
    torch.manual_seed(0)
    net = build_model("regnet_y_400mf", 2, "linear")
    torch.save(net.state_dict(), tmp_path / "w.pth")
    (tmp_path / "args.json").write_text(json.dumps({"arch": "regnet_y_400mf", "class_ids": ["a", "b"]}))
    assert torch.equal(outputs(open_file(tmp_path / "w.pth")), expect(net))


@pytest.mark.parametrize("head", ["cosine", "linear"])
def test_our_run_folder(tmp_path, head):
    torch.manual_seed(0)
    net = randomise(build_model("resnet10", 3, head))
    folder = tmp_path / "digits_sd"
    folder.mkdir()
    torch.save(export_state_dict(net), folder / "digits.pth")
    args = {"arch": "resnet10", "head": head, "class_ids": ["b", "a", "c"], "class_names": ["B", "A", "C"]}
    args |= {"dataset": "digits", "image_size": 32, "resize": 36, "seed": 7}
    (folder / "args.json").write_text(json.dumps(args))
    for spec in (folder, folder / "digits.pth"):
        classifier = open_file(spec)
        assert torch.allclose(outputs(classifier), expect(net), atol=1e-5)
        assert classifier.class_ids == ["b", "a", "c"] and classifier.source.label == "digits_sd"
        assert checkpoints.transform_of(classifier.source) == checkpoints.Transform(36, 32, "bilinear")
    assert open_file(f"mine={folder}").source.label == "mine"


def test_run_that_is_still_training(tmp_path):
    torch.manual_seed(0)
    net = build_model("resnet10", 3, "cosine")
    torch.save({"model": net.state_dict(), "epoch": 1}, tmp_path / "checkpoint.pth")
    args = {"arch": "resnet10", "head": "cosine", "class_ids": ["a", "b", "c"], "dataset": "x"}
    (tmp_path / "args.json").write_text(json.dumps(args))
    assert torch.allclose(outputs(open_file(tmp_path)), expect(net), atol=1e-5)


def test_no_classifier(tmp_path, small):
    state = {key: value for key, value in small.state_dict().items() if not key.startswith("fc.")}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="only transfer datasets"):
        open_file(tmp_path / "w.pth").require_head()
    classifier = open_file(tmp_path / "w.pth")
    assert isinstance(classifier.head, checkpoints.NoClassifier) and classifier.backbone(IMAGES).shape == (2, 512)


# ===== public trainers' layouts =====


def under(prefix: str, state: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


def headless(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def layout(trainer: str, state: dict, other: dict) -> tuple[dict, str]:
    """(the file's content as TRAINER writes it, OTHER being its second network; the place of the second one)"""
    body, extra = headless(state), torch.zeros(4, 512)
    matrix = {"head.mlp.0.weight": extra, "head.last_layer.weight_v": extra}
    averaged = {"n_averaged": torch.tensor(7), **under("module.", state)}
    moco = under("module.encoder_q.", state) | under("module.encoder_k.", other) | {"module.queue": extra}
    projected = under("module.encoder_q.", body | {"fc.0.weight": torch.zeros(512, 512), "fc.2.weight": extra})
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        "torchvision references": ({"model": state, "optimizer": optimizer, "args": Namespace(lr=0.1)}, ""),
        "torchvision references, EMA": ({"model": state, "model_ema": under("module.", other)}, "model_ema"),
        "timm": (
            {"state_dict": state, "state_dict_ema": other, "epoch": 3, "metric": np.float64(70.1)},
            "state_dict_ema",
        ),
        "PyTorch's ImageNet example": ({"state_dict": under("module.", state), "best_acc1": torch.tensor(70.0)}, ""),
        "DINO": (
            {
                "teacher": under("backbone.", body) | matrix,
                "student": under("module.backbone.", headless(other)) | matrix,
            },
            "student",
        ),
        "MoCo v1": ({"state_dict": moco, "arch": "resnet18"}, ""),
        "MoCo v2": ({"state_dict": projected}, ""),
        "SimSiam": ({"state_dict": under("module.encoder.", body) | {"module.predictor.0.weight": extra}}, ""),
        "BYOL": (
            {"online_network": under("encoder.", body), "target_network": under("encoder.", headless(other))},
            "target_network",
        ),
        "Lightning": ({"state_dict": under("model.", state) | {"criterion.weight": extra[0]}, "callbacks": {}}, ""),
        "solo-learn": ({"state_dict": under("backbone.", body) | {"classifier.weight": extra}}, ""),
        "AveragedModel": (averaged, ""),
        "compile and DDP": ({"model_state_dict": under("_orig_mod.module.", state)}, ""),
        "Composer": ({"state": {"model": under("module.", state), "run_name": "a"}}, ""),
        "deep": ({"a": {"b": {"model": state}}}, ""),
    }[trainer]


TRAINERS = ["torchvision references", "torchvision references, EMA", "timm", "PyTorch's ImageNet example", "DINO"]
TRAINERS += ["MoCo v1", "MoCo v2", "SimSiam", "BYOL", "Lightning", "solo-learn", "AveragedModel", "compile and DDP"]
TRAINERS += ["Composer", "deep"]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_public_trainers_layouts(tmp_path, small, trainer, capsys):
    """The usual network is taken, the other one is named and can be chosen, what is left out is said."""
    torch.manual_seed(1)
    second = randomise(resnet18(num_classes=100))
    content, other = layout(trainer, small.state_dict(), second.state_dict())
    torch.save(content, tmp_path / "w.pth")
    classifier = open_file(tmp_path / "w.pth")
    assert (classifier.arch, classifier.source.label) == ("resnet18", "w")
    said = capsys.readouterr().out
    if other:
        assert f"FILE:{other} judges those" in said and said.count("\n") == 1
    for chosen, network in [(classifier, small)] + (
        [(open_file(f"{tmp_path}/w.pth:{other}"), second)] if other else []
    ):
        if not isinstance(chosen.head, checkpoints.NoClassifier):
            assert torch.equal(outputs(chosen), expect(network))
        network.fc, fc = nn.Identity(), network.fc
        with torch.no_grad():
            assert torch.equal(chosen.backbone(IMAGES), network.eval()(IMAGES))
        network.fc = fc
    if trainer in ("DINO", "MoCo v1", "Lightning", "solo-learn", "SimSiam"):
        assert "is taken, without" in said
    keyed = checkpoints.locate(f"{tmp_path}/w.pth:{other or 'state_dict'}")
    assert keyed.sha256 != classifier.source.sha256 and keyed.label == f"w.{other or 'state_dict'}"


def test_a_place_that_is_not_in_the_file(tmp_path, small):
    torch.save({"state_dict": small.state_dict(), "state_dict_ema": small.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no weights at ema; the file has them at state_dict, state_dict_ema$"):
        open_file(f"{tmp_path}/w.pth:ema")
    torch.save({"state_dict": {"head.weight": torch.zeros(3, 4)}, "ema": small.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"fits no architecture.*x\.pth:ema fits$"):
        open_file(tmp_path / "x.pth")


def test_the_refusal_of_another_kind_of_file_does_not_name_a_resnet(tmp_path):
    torch.save({f"transformer.h.{i}.attn.weight": torch.zeros(4, 4) for i in range(9)}, tmp_path / "gpt.pth")
    with pytest.raises(UserError, match=r"transformer\.h\.0\.attn\.weight.* not those of a torchvision") as refused:
        open_file(tmp_path / "gpt.pth")
    assert "conv1" not in str(refused.value) and "resnet" not in str(refused.value)


def test_objects_beside_the_weights_do_nothing(tmp_path, small):
    """A Namespace, a numpy number, a class that runs code when it is built: none of them is built."""
    flag = tmp_path / "ran"
    extra = {"args": Namespace(lr=0.1), "best": np.float64(0.5), "counts": np.arange(3), "evil": Touch(str(flag))}
    torch.save({"state_dict": small.state_dict(), **extra}, tmp_path / "w.pth")
    assert torch.equal(outputs(open_file(tmp_path / "w.pth")), expect(small))
    assert not flag.exists()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return shutil.copy, (__file__, self.path)


def test_checkpoints_that_hold_themselves_or_share_lists(tmp_path, small):
    itself = {"epoch": 1}
    itself["state_dict"] = itself
    torch.save(itself, tmp_path / "a.pth")
    with pytest.raises(UserError, match="no state dict in it"):
        open_file(tmp_path / "a.pth")
    shared = {"x": 1}
    for _ in range(60):
        shared = {"a": shared, "b": shared}
    torch.save(shared | {"model": small.state_dict()}, tmp_path / "b.pth")
    assert open_file(tmp_path / "b.pth").arch == "resnet18"


def test_a_compressed_checkpoint_is_refused_before_it_takes_memory(tmp_path):
    torch.save({"a.weight": torch.zeros(10_000_000)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as plain, zipfile.ZipFile(tmp_path / "z.pth", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "z.pth").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"z\.pth: damaged or not a checkpoint \(.* is compressed"):
        open_file(tmp_path / "z.pth")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(UserError, match="neither a folder nor a regular file"):
        checkpoints.locate(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("content", ["[]", "5", '{"class_ids": 3}', '{"resize": "x"}', '{"image_size": 0}', "{"])
def test_an_args_json_of_another_kind_is_named(tmp_path, small, content):
    torch.save(small.state_dict(), tmp_path / "w.pth")
    (tmp_path / "args.json").write_text(content)
    for spec in (tmp_path, tmp_path / "w.pth"):
        with pytest.raises(UserError, match=r"args\.json") as refused:
            checkpoints.locate(str(spec))
        assert "\n" not in str(refused.value)


# ===== what the outputs mean =====


def source(**args) -> checkpoints.Source:
    return checkpoints.Source("m", "m.pth", "0" * 64, args)


def test_a_txt_of_ids_keeps_its_order(tmp_path):
    ids = load_classes("imagenet_100").ids[::-1]
    (tmp_path / "order.txt").write_text("\n".join(ids))
    assert checkpoints.name_outputs(source(), 100, str(tmp_path / "order.txt"))[0] == ids


def test_unknown_number_of_outputs_asks_for_classes():
    with pytest.raises(UserError, match=r"37 outputs of unknown classes.*--classes"):
        checkpoints.name_outputs(source(), 37, None)


def test_wrong_number_of_classes():
    with pytest.raises(UserError, match="names 100 classes but the checkpoint has 1000"):
        checkpoints.name_outputs(source(), 1000, "100")
    with pytest.raises(UserError, match=r"args\.json .*names 2 classes but the checkpoint has 3"):
        checkpoints.name_outputs(source(class_ids=["a", "b"]), 3, None)


def test_names_that_do_not_belong_to_the_classes():
    with pytest.raises(UserError, match=r"args\.json .*has 1 class_names for 2 class_ids"):
        checkpoints.name_outputs(source(class_ids=["a", "b"], class_names=["A"]), 2, None)


def test_classes_must_not_contradict_the_run():
    with pytest.raises(UserError, match="records other classes"):
        checkpoints.name_outputs(source(class_ids=["a"] * 100), 100, "100")


# ===== refusals =====


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_not_run(tmp_path):
    flag = tmp_path / "ran"
    for name, content in [("a.pth", {"state_dict": Evil(str(flag))}), ("b.pth", Evil(str(flag)))]:
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match="can run code"):
            open_file(tmp_path / name)
    (tmp_path / "c.pth").write_bytes(pickle.dumps(Evil(str(flag))))
    with pytest.raises(UserError, match=r"c\.pth"):
        open_file(tmp_path / "c.pth")
    assert not flag.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_file(tmp_path, small, suffix):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(small.state_dict(), path)
    else:
        save_file(small.state_dict(), str(path))
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        open_file(path)


def test_no_flipped_bit_of_an_export_is_measured(tmp_path):
    """Each is refused or leaves every weight as it was; of the weights' own bits each is refused."""
    torch.manual_seed(0)
    state = nn.Sequential(nn.Linear(16, 10), nn.BatchNorm1d(10)).state_dict()
    torch.save(state, tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()
    at = data.index(state["0.weight"].numpy().tobytes())
    own = set(range(at, at + state["0.weight"].nbytes))
    refused = set()
    structure = data.index(b"PK\x01\x02")  # the archive's directory, where a flip does the strangest things
    for bit in [*range(0, 8 * structure, 29), *range(8 * structure, 8 * len(data), 2), 8 * structure + 8 * 38 + 4]:
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        (tmp_path / "broken.pth").write_bytes(broken)
        try:
            found = weights.read_weights(tmp_path / "broken.pth")[""]
        except UserError as error:
            refused.add(bit // 8)
            assert "broken.pth" in str(error) and "\n" not in str(error)
        else:
            assert bit // 8 not in own
            assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    assert structure + 38 in refused  # "this record is a folder": torch.load would take chance for its content
    assert len(refused) > 500


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_not_a_checkpoint(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth"):
        open_file(tmp_path / "w.pth")


def test_foreign_keys_and_shapes_are_refused(tmp_path, small):
    state = small.state_dict()
    broken = {
        "extra": state | {"projector.weight": torch.zeros(3, 3, 3)},
        "missing": {key: value for key, value in state.items() if key != "layer1.0.conv1.weight"},
        "shape": state | {"layer1.0.conv1.weight": torch.zeros(1, 1, 3, 3)},
    }
    run = {"arch": "resnet18", "class_ids": []}
    (tmp_path / "args.json").write_text(json.dumps(run))  # a known architecture: nothing to guess, one clear reason
    for name, state_dict in broken.items():
        torch.save(state_dict, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=r"projector|layer1\.0\.conv1"):
            open_file(tmp_path / f"{name}.pth")


def test_no_tensors_inside(tmp_path):
    torch.save({"epoch": 3, "best": 0.5}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no state dict in it \(it has epoch, best\)"):
        open_file(tmp_path / "w.pth")


def test_missing_file_folder_and_name(tmp_path):
    for spec in ("gone.pth", str(tmp_path / "gone"), "resnet5000"):
        with pytest.raises(UserError, match="--checkpoint"):
            checkpoints.locate(spec)
    with pytest.raises(UserError, match="no weights in this folder"):
        checkpoints.locate(str(tmp_path))


# ===== torchvision's names =====


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_torchvision_name_without_network(hub, monkeypatch):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"cannot download .*resnet18-f37072fd\.pth .*put it at .*hub"):
        checkpoints.locate("resnet18")
    assert checkpoints.locate("resnet18", download=False).sha256 == ""


def test_torchvision_name_from_the_cache(hub, monkeypatch):
    torch.manual_seed(0)
    net = randomise(resnet18())
    hub.mkdir(parents=True)
    torch.save(net.state_dict(), hub / "resnet18-f37072fd.pth")
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth fails its checksum; delete it"):
        open_file("resnet18:IMAGENET1K_V1")
    monkeypatch.setattr(checkpoints, "sha256_file", lambda path: "f37072fd" + 56 * "0")
    classifier = open_file("resnet18:IMAGENET1K_V1")
    assert torch.equal(outputs(classifier), expect(net))
    assert classifier.source.label == "resnet18.IMAGENET1K_V1"
    assert classifier.class_ids == load_classes("1000").ids
    assert checkpoints.transform_of(classifier.source) == checkpoints.Transform(256, 224, "bilinear")


def test_unknown_torchvision_weights():
    with pytest.raises(UserError, match="torchvision has IMAGENET1K_V1, IMAGENET1K_V2 for resnet50"):
        checkpoints.locate("resnet50:V7")
