"""The demo's world: the three parts of Fashion-MNIST, the exporter, the embedded model and how it was trained.

pytest tests/test_fashion_model.py
"""

from __future__ import annotations

import gzip
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from models import export_fashion, fashion, measure_fashion, train_fashion_sd
from utils.classes import ClassRow, load_classes
from utils.cli import UserError, run
from utils.generation.prompts import TEMPLATES, parse_template, prompt_text
from utils.storage import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "fashion-sd"
ROWS = load_classes("fashion").rows
needs_originals = pytest.mark.skipif(
    not Path(fashion.DEBIAN).is_dir(), reason=f"no {fashion.DEBIAN} (apt-get install dataset-fashion-mnist); CI has it"
)


def unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


@pytest.fixture(scope="module")
def real() -> tuple[list[int], np.ndarray, np.ndarray]:
    return fashion.read_part("real")


@pytest.fixture(scope="module")
def test() -> tuple[list[int], np.ndarray, np.ndarray]:
    return fashion.read_part("test")


# ===== the three parts =====


def test_the_parts_are_disjoint_by_number_and_balanced(real, test):
    split = fashion.read_split()
    assert not set(split.real) & set(split.excluded) and set(split.real + split.excluded) < set(range(60_000))
    assert len(split.real) == 10_000 and 60_000 - len(split.real) - len(split.excluded) == 49_973
    for numbers, labels, images in (real, test):
        assert np.bincount(labels).tolist() == [1000] * 10
        assert images.shape == (10_000, 32, 32) and images.dtype == np.uint8 and len(numbers) == 10_000
        frame = images.copy()
        frame[:, 2:-2, 2:-2] = 0
        assert not frame.any()


def test_no_real_image_is_nearly_a_test_image(real, test):
    """Every pair, by |a|^2 - 2 a b + |b|^2, where models/fashion.py looks for neighbours in a tree."""
    rows, others = (images.reshape(len(images), -1).astype(np.float32) for _, _, images in (real, test))
    lengths = (others**2).sum(1)
    closest = min(
        ((block**2).sum(1)[:, None] - 2 * block @ others.T + lengths).min() for block in np.array_split(rows, 20)
    )
    found = np.sqrt(closest) / 28  # 28 x 28 pixels: the frame differs in none
    assert fashion.NEAR <= found < 2 * fashion.NEAR  # a bound that nothing comes near would prove nothing


@needs_originals
def test_the_parts_are_rebuilt_from_the_originals(tmp_path, capsys):
    assert run(fashion.main, fashion.get_args_parser(), ["--out", str(tmp_path)]) == 0
    assert "49973 images for the generator, 10000 real, 10000 test images; 27 near" in capsys.readouterr().out
    ours, again = (read_json(folder / "split.json") for folder in (fashion.FOLDER, tmp_path))
    names = sorted(ours.pop("sha256"))
    again.pop("sha256")  # another zlib may pack the same bytes otherwise
    assert ours == again
    for name in names:
        assert unpacked(tmp_path / name) == unpacked(fashion.FOLDER / name)
    for name in fashion.ORIGINALS:
        if name.startswith("t10k"):
            assert (fashion.FOLDER / name).read_bytes() == (Path(fashion.DEBIAN) / name).read_bytes()


@needs_originals
def test_the_generators_part_shares_no_pixels_with_the_others(real, test):
    numbers, labels, images = fashion.read_part("generator")
    assert len(images) == 49_973 and not set(numbers) & set(real[0])
    others = {image.tobytes() for _, _, images in (real, test) for image in images}
    assert len(others) == 20_000
    assert not any(image.tobytes() in others for image in images)
    whole, its_labels = fashion.read_original(fashion.DEBIAN, "train")
    assert (images[7, 2:-2, 2:-2] == whole[numbers[7]]).all() and (labels == its_labels[numbers]).all()


def test_near_is_what_a_plain_loop_finds():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 28, 28)).astype(np.uint8)
    others = rng.integers(0, 256, (20, 28, 28)).astype(np.uint8)
    for number, level in zip((3, 8, 11, 40), (0, 7, 8, 9), strict=True):  # root mean square of the change
        others[number // 3] = np.where(images[number] < 128, images[number] + level, images[number] - level)
    wanted = [
        number
        for number, image in enumerate(images)
        if any(np.sqrt(((image.astype(float) - other) ** 2).mean()) < fashion.NEAR for other in others)
    ]
    assert wanted == fashion.near(images, others).tolist() == [3, 8]


# ===== files that are not as they should be: one line, the remedy, exit code 2 =====


def refused(capsys, main, parser, *argv) -> str:
    assert run(main, parser, [str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def test_originals_that_are_missing_or_others_are_refused(tmp_path, capsys):
    def cut(source: Path) -> str:
        return refused(capsys, fashion.main, fashion.get_args_parser(), "--source", source, "--out", tmp_path / "out")

    assert "train-images-idx3-ubyte.gz is missing; apt-get install dataset-fashion-mnist" in cut(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"something else")
    assert "has another checksum than the file that was split; apt-get install" in cut(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "harm, message",
    [
        ("missing", "real-images-idx3-ubyte.gz is missing; restore it from the repository: git checkout"),
        ("other", "real-images-idx3-ubyte.gz has another checksum than the file that was split; restore it"),
        ("overlap", "split.json: an image is in two parts; restore it from the repository"),
        ("twice", "split.json: an image is in two parts"),
        ("torn", "split.json"),
        ("no split", "split.json"),
    ],
)
def test_shipped_files_that_are_not_as_they_were_are_refused(tmp_path, monkeypatch, capsys, harm, message):
    folder = tmp_path / "fashion"
    shutil.copytree(fashion.FOLDER, folder)
    images, split = folder / "real-images-idx3-ubyte.gz", folder / "split.json"
    content = read_json(split)
    if harm == "missing":
        images.unlink()
    elif harm == "other":
        images.write_bytes(images.read_bytes()[:-1] + b"x")
    elif harm in ("overlap", "twice"):
        write_json(split, content | {{"overlap": "excluded", "twice": "real"}[harm]: [*content["real"], 3]})
    elif harm == "torn":
        split.write_bytes(split.read_bytes()[:1000])
    else:
        split.unlink()
    monkeypatch.setattr(export_fashion, "read_part", lambda part: fashion.read_part(part, folder=folder))
    said = refused(capsys, export_fashion.main, export_fashion.get_args_parser(), "--out", tmp_path / "data")
    assert message in said and "restore it" in said
    assert not list((tmp_path / "data").rglob("*.png"))


# ===== the exporter =====


def test_export_gives_each_part_under_its_own_numbers(real, test):
    sets = {name: list(images) for name, images in export_fashion.all_sets()}
    assert {name: len(images) for name, images in sets.items()} == {
        "fashion/real": 10_000,
        "fashion/test": 10_000,
        "fashion/test_noise": 2_000,
        "digits/train": 898,
        "digits/test": 899,
    }
    for name, (numbers, labels, images) in (("fashion/real", real), ("fashion/test", test)):
        assert [(one, int(number)) for one, number, _ in sets[name]] == [
            (fashion.WNIDS[label], number) for label, number in zip(labels, numbers, strict=True)
        ]
        assert all((pixels == image).all() for (_, _, pixels), image in zip(sets[name], images, strict=True))


def test_noise_is_of_the_stated_strength_and_is_drawn_once_for_all():
    clean = {place: pixels for *place, pixels in map(tuple, export_fashion.clothes("test")) for place in [tuple(place)]}
    noisy, again = (list(export_fashion.with_noise(export_fashion.clothes("test"))) for _ in range(2))
    assert all((one[2] == other[2]).all() for one, other in zip(noisy, again, strict=True))
    changes = np.stack([pixels.astype(float) - clean[class_id, number] for class_id, number, pixels in noisy])
    middle = np.stack([((grey := clean[one[0], one[1]]) > 100) & (grey < 155) for one in noisy])
    # Medians do not see what was clipped to black or white; a Gaussian's quartiles lie 0.6745 deviations off.
    assert np.median(abs(changes[middle])) / 0.6745 / 255 == pytest.approx(export_fashion.NOISE, rel=0.015)
    assert abs(np.median(changes[middle])) <= 1
    assert not np.array_equal(changes[0][middle[0] & middle[1]], changes[1][middle[0] & middle[1]])


def test_digits_are_the_enlarged_originals_in_their_order():
    data = load_digits()
    halves = [list(export_fashion.digits(half)) for half in ("train", "test")]
    both = halves[0] + halves[1]
    assert [int(one) for one, _, _ in both] == data.target.tolist()
    images = np.stack([pixels for _, _, pixels in both])
    blocks = images.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))  # back to 8x8
    assert np.corrcoef(blocks.ravel(), data.images.ravel())[0, 1] > 0.99
    assert not {image.tobytes() for image in images[:898]} & {image.tobytes() for image in images[898:]}


def test_export_writes_once_and_mends_damage(tmp_path, monkeypatch, capsys):
    few = {part: tuple(column[:40] for column in fashion.read_part(part)) for part in ("real", "test")}
    monkeypatch.setattr(export_fashion, "read_part", few.__getitem__)
    some = {half: list(islice(export_fashion.digits(half), 40)) for half in ("train", "test")}
    monkeypatch.setattr(export_fashion, "digits", some.__getitem__)

    def export() -> str:
        assert run(export_fashion.main, export_fashion.get_args_parser(), ["--out", str(tmp_path)]) == 0
        return capsys.readouterr().out

    assert f"{tmp_path}/fashion/real: 40 images, 40 of them written now" in export()
    files = sorted(tmp_path.rglob("*.png"))
    content, times = files[7].read_bytes(), [file.stat().st_mtime_ns for file in files]
    assert len(files) == 5 * 40
    number, label, pixels = (column[3] for column in few["test"])
    class_id = fashion.WNIDS[label]
    with Image.open(tmp_path / f"fashion/test/{class_id}/{class_id}_{number:05d}.png") as image:
        assert image.mode == "L" and (np.asarray(image) == pixels).all()
    files[7].write_bytes(content[:50])  # torn
    assert "40 images, 1 of them written now" in export()
    assert files[7].read_bytes() == content
    changed = [file for file, time in zip(files, times, strict=True) if file.stat().st_mtime_ns != time]
    assert changed == [files[7]] and "1 of them" not in export()


# ===== the tokenizer =====


def test_merges_make_each_known_word_one_token():
    merges = train_fashion_sd.learn_merges({"one": 3, "none": 1, "on": 2}, 50)
    assert merges[0] == ("n", "e</w>")  # the most frequent pair: 4 of one, none; (o, n</w>) only 2
    assert {left + right for left, right in merges} >= {"one</w>", "none</w>", "on</w>"}
    assert merges == train_fashion_sd.learn_merges({"one": 3, "none": 1, "on": 2}, 50)


@pytest.fixture(scope="module")
def pipeline():
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_tokenizer_knows_every_text(pipeline):
    tokenizer = pipeline.tokenizer
    end = tokenizer.eos_token_id  # CLIP's unknown token is its end token: an unknown would show as one too early
    texts = [
        prompt_text(row, parse_template(template), 7, names)
        for row in ROWS
        for template in TEMPLATES
        for names in ("first", "all")
    ]
    texts += ["A goldfish, café, 数字 nine! \N{PILE OF POO}", "\x7f ~ |", ""]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert end not in ids[1:-1], text
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == end
    assert all(len(tokenizer(text).input_ids) <= 77 for text in texts)
    assert len({tuple(tokenizer(row.first_name).input_ids) for row in ROWS}) == 10
    assert tokenizer.tokenize("sandal, a shoe") == ["sandal</w>", ",</w>", "a</w>", "shoe</w>"]


# ===== the folder =====


def test_the_folder_is_complete_small_and_safe():
    files = {str(path.relative_to(MODEL)) for path in MODEL.rglob("*") if path.is_file()}
    weights = {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert files == weights | {
        "README.md",
        "model_index.json",
        "nearest.png",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "vae/config.json",
    }
    assert sum((MODEL / file).stat().st_size for file in files) <= 15e6
    for file in weights:
        with safe_open(MODEL / file, "np") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - not a dict
        assert dtypes - {"I64"} == {"F16"}, file


def test_the_card_says_what_a_user_must_know():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    for word in ("MIT", "minutes", "loss", "Known flaws", "generator's part", "train_fashion_sd.py"):
        assert word in card
    assert "| coverage, % |" in card and "Not measured yet" not in card and (MODEL / "nearest.png").is_file()
    assert "{" not in card.replace('{"c', "").split("## Training")[1]  # every placeholder was filled


def test_the_scheduler_is_stable_diffusions():
    config = read_json(MODEL / "scheduler" / "scheduler_config.json")
    assert config["_class_name"] == "PNDMScheduler"
    assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
    assert config["prediction_type"] == "epsilon" and config["skip_prk_steps"] and config["steps_offset"] == 1


# ===== what it draws =====


def draw(pipeline, texts: list[str], guidance: float, steps: int = 10) -> np.ndarray:
    """(N, 32, 32) in 0..1; image i of any call starts from the same latents."""
    import torch

    generators = [torch.Generator().manual_seed(index) for index in range(len(texts))]
    images = pipeline(
        texts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np"
    ).images
    return images.mean(axis=-1)


class Judge:
    """A linear classifier of photographs in a tenth of their pixels, which the tests below ask what is drawn."""

    def __init__(self, real) -> None:
        _, labels, images = real
        self.model = LogisticRegression(max_iter=200).fit(self.small(images[::4] / 255), labels[::4])

    @staticmethod
    def small(images: np.ndarray) -> np.ndarray:
        return images.reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Wnids of images (N, 32, 32) in 0..1."""
        return np.array(fashion.WNIDS)[self.model.predict(self.small(images))]


@pytest.fixture(scope="module")
def judge(real) -> Judge:
    return Judge(real)


def test_the_judge_is_fair(judge, test):
    _, labels, images = test
    assert (judge(images / 255) == np.array(fashion.WNIDS)[labels]).mean() > 0.75


def right(judge, images: np.ndarray) -> float:
    """The share of IMAGES, as many of each row, that the judge takes for their class."""
    return (judge(images) == np.repeat([row.wnid for row in ROWS], len(images) // len(ROWS))).mean()


def test_prompts_draw_their_class_and_definitions_draw_it_best(pipeline, judge):
    shares = {}
    for template, names in (("c", "first"), ("c, h_c", "all"), ("c, d_c", "first")):
        texts = [prompt_text(row, parse_template(template), 0, names) for row in ROWS for _ in range(6)]
        images = draw(pipeline, texts, guidance=2.0)
        assert np.isfinite(images).all()
        shares[template] = right(judge, images)
    assert min(shares.values()) >= 0.5 and shares["c, d_c"] >= 0.7  # chance: 0.1
    assert shares["c, d_c"] > shares["c"]


def test_guidance_trades_diversity_for_typicality(pipeline):
    texts = [prompt_text(row, parse_template("c, d_c"), 0) for row in ROWS for _ in range(6)]
    low, high = draw(pipeline, texts, 2.0), draw(pipeline, texts, 7.5)
    assert not np.allclose(low, high, atol=0.05)
    assert diversity(high) < diversity(low)


def diversity(images: np.ndarray) -> float:
    """Mean distance of an image to its class's mean, each image at unit norm: bolder pictures alone do not count."""
    flat = images.reshape(10, -1, 32 * 32)
    flat = flat / np.linalg.norm(flat, axis=2, keepdims=True)
    return np.linalg.norm(flat - flat.mean(axis=1, keepdims=True), axis=2).mean()


def test_the_empty_prompt_draws_anything(pipeline, judge):
    assert len(set(judge(draw(pipeline, [""] * 40, guidance=1.0)))) >= 5


def test_a_seed_is_an_image(pipeline):
    texts = [prompt_text(ROWS[3], parse_template("c"), 0)] * 2
    first, second = draw(pipeline, texts, 2.0, steps=3), draw(pipeline, texts, 2.0, steps=3)
    assert np.array_equal(first, second) and not np.allclose(first[0], first[1])


# ===== the training script's parts =====


def training(work: Path, *more: str):
    command = ["--out", str(work / "model"), "--work", str(work / "work"), "--threads", "1", *more]
    return train_fashion_sd.get_args_parser().parse_args(command)


def test_the_training_script_reads_the_generators_part_alone(monkeypatch, tmp_path, real):
    """The script's main, run up to its first loss: it trains on the generator's part, and read nothing else."""
    parts, seen = [], []

    class Stop(Exception):
        pass

    def reading(part, source):
        parts.append(part)
        return tuple(column[:500] for column in real)

    def stop(vae, pixels, rng):
        seen.append(pixels)
        raise Stop

    monkeypatch.setattr(train_fashion_sd, "read_part", reading)
    monkeypatch.setattr(train_fashion_sd, "vae_loss", stop)
    with pytest.raises(Stop):
        train_fashion_sd.main(training(tmp_path))
    assert parts == ["generator"]
    assert np.array_equal(seen[0][:, 0].numpy(), real[2][:500])
    assert not (tmp_path / "model").exists()


def test_training_without_the_originals_is_refused(tmp_path, capsys):
    argv = ["--source", str(tmp_path), "--out", str(tmp_path / "model"), "--work", str(tmp_path / "work")]
    said = refused(capsys, train_fashion_sd.main, train_fashion_sd.get_args_parser(), *argv)
    assert "train-images-idx3-ubyte.gz is missing; apt-get install dataset-fashion-mnist" in said


class Tokenizer:
    """Keeps the texts that it was given."""

    def __call__(self, texts, **_):
        import torch

        self.texts = texts
        return type("Tokens", (), {"input_ids": torch.zeros(len(texts), 77, dtype=torch.long)})


def test_captions_name_the_class_of_their_images():
    import torch

    tokenizer = Tokenizer()
    rows = [ClassRow("a", "ant", "insect", "six legs"), ClassRow("b", "bat", "mammal", "it flies")]
    labels = torch.tensor([0, 1, 0, 1, 1])
    numbers, _ = train_fashion_sd.Captions(rows, labels, tokenizer).draw(torch.Generator().manual_seed(0))
    assert len(numbers) == 64 and len(tokenizer.texts) == 17 and tokenizer.texts[-1] == ""
    for text, group in zip(tokenizer.texts, numbers.split(4), strict=False):
        assert ("ant" in text) == (labels[group] == 0).all() and ("bat" in text) == (labels[group] == 1).all()


def test_loose_captions_name_another_of_the_kind_as_often_as_stated_and_definitions_never():
    import torch

    tokenizer = Tokenizer()
    captions = train_fashion_sd.Captions(ROWS, torch.arange(10), tokenizer)  # image k shows class k
    kind_of = {wnid: kind for kind in train_fashion_sd.KINDS for wnid in kind}
    seen = {template: [0, 0] for template in train_fashion_sd.TEMPLATE_SHARES}  # of classes with kin: all, misnamed
    for draw_number in range(200):
        numbers, _ = captions.draw(torch.Generator().manual_seed(draw_number))
        for text, group in zip(tokenizer.texts, numbers.split(4), strict=False):
            shown = ROWS[group[0]]
            found = {
                (row.wnid, template)
                for row in ROWS
                for template in seen
                for names in ("first", "all")
                if text.split(" inside ")[0]
                == prompt_text(row, parse_template(template), 0, names).split(" inside ")[0]
                and (" inside " in text) == template.endswith(" b")
            }
            ((named, template),) = found
            assert named == shown.wnid or named in kind_of[shown.wnid]
            if shown.wnid in kind_of:
                seen[template][0] += 1
                seen[template][1] += named != shown.wnid
    for template, (count, misnamed) in seen.items():
        wanted = train_fashion_sd.MISNAMED.get(template, 0)
        assert abs(misnamed - count * wanted) <= 4 * (count * wanted * (1 - wanted)) ** 0.5, template


def test_training_resumes_where_it_stopped(monkeypatch, tmp_path):
    """Stopped by an error after 6 of 10 steps and run again: the same weights as an undisturbed run."""
    import torch

    def run(work: Path, stop_at: int | None = None) -> torch.Tensor:
        work.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss_of(step, rng):
            if step == stop_at:
                raise KeyboardInterrupt
            return (model(torch.randn(4, 3, generator=rng)) - 1).square().mean()

        train_fashion_sd.train("part", {"model": model}, loss_of, 10, 0.1, args, work)
        return model.weight.detach()

    monkeypatch.setattr(train_fashion_sd, "SAVE_EVERY_S", -1)  # after every step
    args = train_fashion_sd.get_args_parser().parse_args([])
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=6)
    assert torch.equal(run(tmp_path / "cut"), whole)
    assert torch.equal(run(tmp_path / "cut"), whole)  # finished: loads, trains nothing
    args.seed = 1
    with pytest.raises(UserError, match=r"--work .* belongs to a run with"):
        run(tmp_path / "cut")


def test_learning_rate_warms_up_then_falls():
    shares = [train_fashion_sd.lr_share(step, 1000) for step in range(1000)]
    peak = train_fashion_sd.WARMUP_STEPS
    assert shares[peak] == 1.0 == max(shares) and 0 < shares[0] < 0.01 and shares[-1] < 0.011
    assert shares[:peak] == sorted(shares[:peak]) and shares[peak:] == sorted(shares[peak:], reverse=True)


# ===== measuring the model =====


def test_copies_of_training_images_would_be_seen(real):
    _, _, images = real
    rows = images[:400].reshape(400, -1).astype(np.float32)
    samples = np.stack([images[7], np.clip(images[50].astype(int) + 3, 0, 255).astype(np.uint8), images[900]])
    distances, numbers = measure_fashion.neighbours(samples, rows)
    assert numbers[:2, 0].tolist() == [7, 50] and distances[0, 0] == 0 and 2 < distances[1, 0] < 3.5
    plain = sorted(np.sqrt(((row - samples[2].ravel().astype(float)) ** 2).sum() / 784) for row in rows)[:3]
    assert distances[2] == pytest.approx(plain, rel=1e-5) and plain[0] > fashion.NEAR
    sheet = measure_fashion.picture(samples[:2], images[numbers[:2]])
    assert sheet.shape[1] == 2 * (8 * 34 - 2) and (sheet[:64:2, :64:2, 0] == sheet[:64:2, 68:132:2, 0]).all()


def test_a_card_without_a_place_for_the_figures_is_refused(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# a model\n")
    argv = ("--data", tmp_path, "--checkpoint", tmp_path, "--card", tmp_path)
    said = refused(capsys, measure_fashion.main, measure_fashion.get_args_parser(), *argv)
    assert f"--card {tmp_path}: its README.md has no section for this" in said
