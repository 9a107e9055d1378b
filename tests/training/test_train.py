"""train.py as a user runs it: what it writes, what it refuses, and what it says."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from tests.training_runs import ROOT, STEPS, TINY, finish, log_without_clock, make_images, start, weights
from utils.cli import UserError
from utils.training.checkpoint import is_finished, make_identity, run_name
from utils.training.image_sets import dataset_name
from utils.training.step import Schedule, Training, make_schedule


def parse(*options: object):
    return train.get_args_parser().parse_args([*map(str, options)])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """34 images of three classes, one of which has a single image."""
    return make_images(tmp_path_factory.mktemp("data") / "shapes", {"n01": 20, "n02": 13, "n03": 1})


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A finished run with validation, every third epoch and after the last one."""
    run = tmp_path_factory.mktemp("runs") / "shapes"
    out, _ = finish(start("--data", images, "--val", images, "--out", run, "--val-every", 3, *TINY))
    return run, out


def test_a_run_writes_what_it_promises(finished, images):
    run, out = finished
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert {"checkpoint.pth", "checkpoint_previous.pth", "shapes.pth", "args.json", "log.jsonl", "curves.png"} <= names
    assert (run / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    described = json.loads((run / "args.json").read_text())
    assert [source["synthetic"] for source in described["sources"]] == [False]
    assert described["class_ids"] == ["n01", "n02", "n03"] and described["dataset"] == "shapes"
    assert (described["arch"], described["head"], described["image_size"], described["resize"]) == (
        "resnet10",
        "cosine",
        32,
        36,
    )
    assert (
        described["plan"]["epochs"] * described["plan"]["steps_per_epoch"] == STEPS
        and described["environment"]["packages"]["torch"]
    )
    assert "batch   8 images = 1 process x 2 micro-batches x 4" in out
    assert "lr      peak 0.003125 = 0.1 x 8 / 256; 4 steps of warm-up, then cosine to 1e-06" in out
    assert "fc.bias" not in weights(run / "shapes.pth")


def test_the_log_has_a_line_an_interval_and_an_epoch(finished):
    run, out = finished
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    wanted = {"loss", "lr", "top1", "images_per_s", "data_wait", "eta_s", "memory_mb", "bad_images", "epoch", "time"}
    assert wanted <= steps[0].keys() and all(0 <= line["data_wait"] <= 1 for line in steps)
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert [("val_top1" in line) for line in epochs] == [False, False, True] and epochs[-1]["val_n"] == 34
    assert np.mean([line["loss"] for line in steps[-4:]]) == pytest.approx(epochs[-1]["loss"], rel=1e-6)
    assert f"epoch 3/3 step {STEPS}/{STEPS} loss" in out and "validation top-1" in out


def test_the_same_command_leaves_a_finished_run_alone(finished, images):
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    out, _ = finish(start("--data", images, "--out", run, *TINY, patch="sys.modules['torch'] = None"))  # torch-free
    assert "finished already" in out
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}


def test_another_recipe_or_other_images_into_the_same_run_are_refused(finished, images, tmp_path):
    run, _ = finished
    _, err = finish(start("--data", images, "--out", run, *TINY, "--lr", 0.2), 2)
    assert "holds another run: lr was 0.1, now 0.2" in err
    _, err = finish(start("--data", images, "--out", run, *TINY, "--images-per-class", 12), 2)
    assert "data was ['34 images" in err and "now ['25 images" in err and "Traceback" not in err


def test_weights_of_an_earlier_run_are_not_those_of_the_next(images, tmp_path):
    """The first one's checkpoints are deleted, its weights are forgotten, and the second one is killed."""
    first = ["--data", images, "--out", tmp_path, *TINY, "--epochs", 1]
    finish(start(*first))
    for path in tmp_path.glob("checkpoint*.pth"):
        path.unlink()
    second = [*first, "--lr", 0.2]
    patch = (
        "import os; from utils.training.step import Training; Training.end_step = lambda self: os.kill(os.getpid(), 9)"
    )
    finish(start(*second, patch=patch), -9)
    assert not (tmp_path / "shapes.pth").exists()
    out, _ = finish(start(*second))
    assert "finished already" not in out and "wrote" in out


def test_a_run_is_finished_under_its_own_name_only(finished, images):
    run, _ = finished
    identity = json.loads((run / "args.json").read_text())["identity"]
    (run / "other.pth").write_bytes(b"")
    assert is_finished(run, "shapes", identity) and not is_finished(run, "other", identity)
    (run / "other.pth").unlink()


def test_weights_without_their_hash_are_exported_again(finished, images, tmp_path):
    """A kill, or a full disk, between the two: the run is not finished, and is finished by the next command."""
    run, options = tmp_path / "run", ("--data", images, "--out", tmp_path / "run", *TINY)
    finish(start(*options, patch="import os\ntrain.sha256_file = lambda path: os.kill(os.getpid(), 9)"), -9)
    described = json.loads((run / "args.json").read_text())
    assert (run / "shapes.pth").is_file() and not is_finished(run, "shapes", described["identity"])
    finish(start(*options))
    whole = json.loads((finished[0] / "args.json").read_text())["weights_sha256"]
    assert json.loads((run / "args.json").read_text())["weights_sha256"] == whole


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
def test_damaged_weights_do_not_count_as_finished(finished, images, tmp_path, damage):
    """They are exported again from the checkpoint; where there is none, the run says so and trains nothing."""
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    weights_file = run / "shapes.pth"
    good = weights_file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    weights_file.write_bytes({"truncated": good[:-1000], "one bit": bytes(flipped), "empty": b""}[damage])
    identity = json.loads((run / "args.json").read_text())["identity"]
    assert not is_finished(run, "shapes", identity)
    if damage == "one bit":
        finish(start("--data", images, "--out", run, *TINY))
        assert weights_file.read_bytes() == good and is_finished(run, "shapes", identity)
        weights_file.write_bytes(bytes(flipped))
    for path in run.glob("checkpoint*.pth"):
        path.unlink()
    with pytest.raises(UserError, match=r"shapes\.pth is damaged: its sha256 is not that in args\.json; restore it"):
        train.main(parse("--data", images, "--out", run, *TINY))


def test_images_that_changed_between_stop_and_resume_are_named(tmp_path):
    data = make_images(tmp_path / "data", {"n01": 8, "n02": 8})
    run = tmp_path / "run"
    options = ["--data", data, "--out", run, *TINY, "--epochs", 2, "--checkpoint-minutes", "0.00001"]
    killed = """
        import os
        from utils.training.step import Training
        Training.flush_interval = lambda self: os.kill(os.getpid(), 9)
    """
    finish(start(*options, "--log-every", 2, patch=killed), -9)
    victim = data / "n02" / "n02_000003.jpg"
    good, times = victim.read_bytes(), victim.stat().st_mtime_ns
    flipped = bytearray(good)
    flipped[-30] ^= 1
    victim.write_bytes(flipped)  # as long as it was
    _, err = finish(start(*options), 2)
    assert f"1 images are not what they were when this run was last saved, e.g. {victim}; put them back" in err
    victim.write_bytes(good)
    os.utime(victim, ns=(times, times))
    copy = Path(shutil.copytree(data, tmp_path / "copies" / "data", copy_function=shutil.copy))
    out, _ = finish(start("--data", copy, *options[2:]))
    assert "the images have new dates and their old sizes, as a copy has" in out and "resuming from" in out


def test_dry_run_prints_the_plan_and_writes_nothing(images, tmp_path):
    out, _ = finish(start("--data", images, "--out", tmp_path / "run", *TINY, "--dry-run"))
    assert "34 images, 3 classes" in out and "1.23 M parameters" in out
    assert f"steps   {STEPS} = 3 epochs x 4" in out
    assert f"probe   {STEPS} steps, median" in out and f"{STEPS} steps take about" in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_can_be_interrupted(images, tmp_path):
    patch = """
        import os, signal
        from utils.training.step import Training
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
        Training.end_step = lambda self: os.kill(os.getpid(), signal.SIGINT)
    """
    _, err = finish(start("--data", images, "--out", tmp_path / "run", *TINY, "--dry-run", patch=patch), 130)
    assert "interrupted" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"step": 1_000_000}, "step 1000000 of 12 cannot be; delete it to go on without"),
        (lambda state: state | {"step": -1}, "step -1 of 12 cannot be"),
        (
            lambda state: state | {"model": {"conv1.weight": state["model"]["conv1.weight"]}},
            "does not fit this run's model",
        ),
        (lambda state: state | {"optimizer": {"state": {}, "param_groups": []}}, "does not fit this run's model"),
        (lambda state: state | {"identity": state["identity"] | {"seed": 5}}, "holds another run: seed was 5, now 0"),
    ],
)
def test_a_checkpoint_that_cannot_be_of_this_run_is_refused(finished, images, tmp_path, change, message):
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    torch.save(change(weights(run / "checkpoint.pth")), run / "checkpoint.pth")
    (run / "shapes.pth").unlink()
    with pytest.raises(UserError) as caught:
        train.main(parse("--data", images, "--out", run, *TINY))
    assert message in str(caught.value) and not (run / "shapes.pth").exists()


def test_damaged_images_stop_the_run_unless_allowed(tmp_path):
    data = make_images(tmp_path / "data", {"n01": 8, "n02": 8})
    damaged = data / "n01" / "n01_000003.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    _, err = finish(start("--data", data, "--out", tmp_path / "run", *TINY, "--epochs", 1), 2)
    assert "--max-bad-images 0: 1 damaged" in err and str(damaged) in err
    run = tmp_path / "allowed"
    _, err = finish(start("--data", data, "--out", run, *TINY, "--epochs", 1, "--max-bad-images", 1))
    assert "damaged image 1, the next one takes its place" in err and str(damaged) in err
    assert log_without_clock(run)[-2]["bad_images"] == 1


def test_a_damaged_validation_image_is_one_line_and_costs_no_epoch(images, tmp_path):
    """The error comes from a worker that ignores SIGTERM: the process must end all the same."""
    val = make_images(tmp_path / "val", {"n01": 3})
    (val / "n01" / "junk.jpg").write_bytes(b"junk")
    run = tmp_path / "run"
    _, err = finish(start("--data", images, "--val", val, "--out", run, *TINY), 2)
    assert err.splitlines() == [err.rstrip()] and "error: damaged validation image" in err and "junk.jpg" in err
    assert weights(run / "checkpoint.pth")["step"] == 4  # the first epoch
    (val / "n01" / "junk.jpg").unlink()
    finish(start("--data", images, "--val", val, "--out", run, *TINY))
    assert [line["epoch"] for line in log_without_clock(run) if line["kind"] == "epoch"] == [1, 2, 3]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(images, tmp_path):
    patch = """
        from utils.training.step import Training
        augmented = Training.augmented
        def poisoned(self, batch):
            if self.step == 6:
                self.model.fc.weight.data[0, 0] = float("inf")
            return augmented(self, batch)
        Training.augmented = poisoned
    """
    _, err = finish(start("--data", images, "--out", tmp_path, *TINY, patch=patch), 2)
    assert "the loss is not finite at epoch 1, step 6, learning rate" in err and "--lr" in err
    state = weights(tmp_path / "checkpoint.pth")
    assert state["step"] == 4 and all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "local_cuont=4"], "unknown key 'local_cuont'; the recipe has arch, head"),
        (["--set", "global_scale=2"], "no value for global_scale"),
        (["--set", "epochs=many"], "'many' is no value for epochs"),
        (["--set", "epochs=0"], "--set epochs=0: must be a number, at least 1"),
        (["--set", "batch_per_device=0"], "--set batch_per_device=0: must be a number, at least 1"),
        (["--set", "warmup_epochs=-1"], "at least 0"),
        (["--set", "weight_decay=inf"], "at least 0"),
        (["--set", "flip=nan"], "at least 0 and at most 1"),
        (["--set", "hue=0.6"], "--set hue=0.6: must be a number, at least 0 and at most 0.5"),
        (["--set", "epochs=1" + "0" * 30], "at least 1 and at most 100,000"),
        (["--set", "global_size=1000000"], "at least 1 and at most 4,096"),
        (["--name", "checkpoint"], "--name checkpoint: RUN/checkpoint.pth is what a stopped run continues from"),
        (["--name", "checkpoint_previous"], "give another --name"),
        (["--set", "interpolation=nearest"], "--set interpolation=nearest: choose bicubic or bilinear"),
        (["--set", "head=round"], "--set head=round: choose cosine or linear"),
        (["--classes", "fashion"], "differ from --classes fashion: 10 missing"),
        (["--batch-size", "999"], "--batch-size 999: only 34 images"),
        (["--data", "nowhere"], "no folder nowhere"),
        (["--data", "nowhere:0"], "weight must be above 0"),
        (["--val", "nowhere"], "--val: no folder nowhere"),
        (["--arch", "resnet51"], "--arch resnet51: unknown"),
        (["--arch", "vit_b_32"], "cannot take"),
        (["--device", "tpu"], "--device tpu"),
        (["--dtype", "fp16"], "--dtype fp16"),
        (["--dtype", "bf16"], "--dtype bf16: gradients of crops of 16 pixels may be wrong"),  # TINY has such
    ],
)
def test_mistakes_are_named(images, tmp_path, options, message):
    with pytest.raises(UserError) as caught:
        train.main(parse("--data", images, "--out", tmp_path / "run", *TINY, *options))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "a/b"], "'a/b' cannot name a file"),
        (["--name", "../esc"], "'../esc' cannot name a file"),
        (["--name", "n" * 245], "is too long (245 characters); use at most 100"),
        (["--epochs", "1" + "0" * 30], "is more than the 100,000 that are possible"),
        (["--seed", str(2**70)], "is more than the 9,223,372,036,854,775,807 that are possible"),
        (["--out", "o" * 300], "is too long for a path"),
    ],
)
def test_what_could_only_fail_at_the_end_is_refused_at_the_door(images, capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        parse("--data", images, *options)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_mix_of_many_folders_needs_a_name():
    paths = [Path(f"data/a_rather_long_name_of_a_folder_{number}") for number in range(4)]
    with pytest.raises(UserError, match=r"--name: 'a_rather.* is too long"):
        run_name(None, paths)
    assert run_name(None, paths[:2]).count("+") == 1 and run_name("short", paths) == "short"


def test_a_run_folder_in_the_home_folder(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--data", images, "--out=~/run").out == tmp_path / "run"


def test_an_unwritable_run_folder_is_named(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: cannot write to"):
        train.main(parse("--data", images, "--out", tmp_path / "file" / "run", *TINY))


def test_recipes_are_flat_and_complete():
    for name, recipe in train.RECIPES.items():
        assert recipe.keys() == train.PAPER.keys(), name
        assert all(isinstance(value, str | int | float | tuple) for value in recipe.values())
    paper = train.make_recipe(parse("--data", "x"))
    wanted = {"arch": "resnet50", "epochs": 100, "batch_size": 256, "lr": 0.1, "weight_decay": 1e-4, "final_lr": 1e-6}
    assert wanted.items() <= paper.items()
    changed = train.make_recipe(parse("--data", "x", "--set", "local_scale=0.05,0.4", "--set", "hue=0"))
    assert changed["local_scale"] == (0.05, 0.4) and changed["hue"] == 0.0


@pytest.mark.parametrize("name", train.RECIPES)
def test_short_runs_warm_up_for_their_share_and_anneal(name):
    recipe = train.RECIPES[name]
    share = recipe["warmup_epochs"] / recipe["epochs"]
    for epochs in (1, 3, min(10, recipe["epochs"])):
        short = train.make_recipe(parse("--data", "x", "--recipe", name, "--epochs", epochs))
        schedule = make_schedule(short, 100 * short["batch_size"], 1)
        assert schedule.warmup_steps == round(share * 100 * epochs)
        rates = [schedule.lr(step) for step in range(schedule.total_steps)]
        assert max(rates) == pytest.approx(schedule.peak_lr) and rates[-1] == pytest.approx(recipe["final_lr"])
        assert rates.index(max(rates)) < 0.2 * len(rates)
    assert train.make_recipe(parse("--data", "x", "--recipe", name)) == recipe  # at its own length, as it was
    longer = train.make_recipe(parse("--data", "x", "--recipe", name, "--epochs", 2 * recipe["epochs"]))
    assert longer["warmup_epochs"] == recipe["warmup_epochs"]
    asked = train.make_recipe(parse("--data", "x", "--recipe", name, "--epochs", 4, "--set", "warmup_epochs=1.5"))
    assert asked["warmup_epochs"] == 1.5


@pytest.mark.parametrize(("images", "quoted"), [(130_000, 13_000), (1_281_167, 130_000), (6_500_000, 635_000)])
def test_a_batch_of_1024_gives_the_iterations_that_are_quoted_for_the_paper(images, quoted):
    """Deliberate Practice (ICML 2025), Table 1, rounded there to thousands; at our default four times as many."""
    recipe = train.make_recipe(parse("--data", "x", "--batch-size", 1024))
    schedule = make_schedule(recipe, images, 1)
    assert schedule.total_steps == pytest.approx(quoted, rel=0.04) and schedule.peak_lr == pytest.approx(0.4)
    assert make_schedule(train.PAPER, images, 1).total_steps == pytest.approx(4 * quoted, rel=0.04)


def test_every_key_of_a_recipe_is_read():
    """A key that no code reads would be a lie about what was done."""
    after_the_recipes = (ROOT / "train.py").read_text().split("def get_args_parser")[1]
    source = after_the_recipes + "".join(path.read_text() for path in (ROOT / "utils/training").glob("*.py"))
    assert [key for key in train.PAPER if f'"{key}"' not in source] == []


def test_a_run_is_named_after_its_data_folder():
    assert dataset_name(Path("data/digits/train")) == "digits"
    assert dataset_name(Path("data/imagenet_100_sd/")) == "imagenet_100_sd"


def test_plans_keep_the_batch_on_any_number_of_devices():
    recipe = train.PAPER
    for world, micro in ((1, 4), (2, 2), (4, 1), (8, 1)):
        plan = make_schedule(recipe, 126_689, world)
        assert (plan.batch_size, plan.micro_batches) == (256, micro)
        at_once = plan.batch_size // (plan.micro_batches * world)
        assert at_once * plan.micro_batches * world == 256 and at_once <= 64
        assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (494, 49_400, 4_940)
    assert make_schedule(recipe, 1000, 3 * 64 // 64 + 1).world == 4
    with pytest.raises(UserError, match="cannot be shared by 3 processes"):
        make_schedule(recipe, 1000, 3)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    """Without batch norm a step is the same to rounding, in however many parts it is computed."""
    batch = {
        "crops": [torch.randint(0, 256, (8, 1, 8, 8, 3), dtype=torch.uint8)],
        "labels": torch.arange(8) % 3,
        "samples": np.arange(8),
        "passes": np.zeros(8, dtype=int),
        "bad": [],
    }

    def one_step(parts: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))
        plan = Schedule(8, 8, parts, 1, 1, 2, 0, 0.1, 0.0)
        forward = type("One", (nn.Module,), {"forward": lambda self, views: model(views[0])})()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        recipe = train.PAPER | {"local_count": 0}
        training = Training(model, forward, optimizer, scaler, torch.device("cpu"), torch.float32, recipe, plan, 0, {})
        pieces = []
        for part in range(parts):
            rows = slice(part * 8 // parts, (part + 1) * 8 // parts)
            pieces.append(
                {key: [crops[rows] for crops in batch[key]] if key == "crops" else batch[key][rows] for key in batch}
            )
        train.train_step(training, iter(pieces), nullcontext(), 0)
        return model

    whole = one_step(1)
    for parts in (2, 4):
        for one, other in zip(whole.parameters(), one_step(parts).parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_moves_the_biases_by_what_the_formula_says(smoothing):
    """From all zeros every class has probability 1/3; the targets are (1 - s) of the label and s of all alike."""
    labels = torch.tensor([0, 0, 0, 1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    forward = type("One", (nn.Module,), {"forward": lambda self, views: model(views[0])})()
    recipe = train.PAPER | {"local_count": 0, "label_smoothing": smoothing}
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False)
    plan = Schedule(4, 4, 1, 1, 1, 1, 0, 0.3, 0.3)
    training = Training(model, forward, optimizer, scaler, torch.device("cpu"), torch.float32, recipe, plan, 0, {})
    crops = torch.zeros(4, 1, 8, 8, 3, dtype=torch.uint8)
    batch = {"crops": [crops], "labels": labels, "samples": np.arange(4), "passes": np.zeros(4, int), "bad": []}
    train.train_step(training, iter([batch]), nullcontext(), 0)
    wanted = -0.3 * (1 - smoothing) * (1 / 3 - np.array([3, 1, 0]) / 4)
    assert model[1].bias.detach().numpy() == pytest.approx(wanted, abs=1e-6)


def test_values_that_change_nothing_are_no_part_of_a_runs_identity():
    """So that runs made before there were these values go on, and finished ones are known."""
    later = {"first_size", "growth", "label_smoothing"}
    whole = train.PAPER | {"first_size": train.PAPER["global_size"], "growth": (0.1, 0.2)}
    for recipe in (train.PAPER, whole):
        assert make_identity(recipe, [], [], 0).keys() == train.PAPER.keys() - later - {"batch_per_device"} | {
            "seed",
            "weights",
            "data",
        }
    assert later <= make_identity(train.QUICK, [], [], 0).keys()


@pytest.mark.parametrize("copied", ["itself", "some, under other names"])
def test_validation_on_training_images_is_refused(images, tmp_path, copied):
    val = images
    if copied != "itself":
        val = tmp_path / "val"
        for number, path in enumerate(sorted(images.rglob("*.jpg"))[::5]):
            (val / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, val / path.parent.name / f"{number}.jpg")
    strict = [option for option in TINY if option != "--no-leak-check"]
    _, err = finish(start("--data", images, "--val", val, "--out", tmp_path / "run", *strict), 2)
    assert "images are among the training images" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
