"""The benchmark page: verdicts and layout. Speeds themselves are never tested."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench, bench_generate, bench_gpu, bounds
from tests.tiny_families import build_tiny
from tests.tiny_sd import build_tiny_sd
from utils.cli import UserError, run
from utils.generation import plan
from utils.generation.pipeline import PipelineFolder
from utils.generation.recipe import Recipe
from utils.storage import read_json

RESULT = {
    "row": "loader_vs_dino",
    "ours": 300.0,
    "peer": 60.0,
    "unit": "img/s",
    "ratio": 5.0,
    "target": 5.0,
    "what": "512 px JPEGs to crops.",
    "notes": ["one core"],
    "machine": "a CPU, 2 cores",
    "versions": {"torch": "2.10.0", "xformers": None},
    "git_commit": "0123456789abcdef",
    "time": "2026-01-02T03:04:05+00:00",
}


def test_a_reached_target_is_met_and_a_missed_one_is_not():
    assert bench.verdict_of(RESULT) == "met"
    assert bench.verdict_of(RESULT | {"ratio": 4.99}) == "not met"
    share = RESULT | {"ratio": None, "ours": 0.04, "target": 0.05, "lower_is_better": True}
    assert bench.verdict_of(share) == "met"
    assert bench.verdict_of(share | {"ours": 0.06}) == "not met"


def test_the_page_shows_the_newest_result_of_each_row():
    page = bench.as_page([RESULT | {"ours": 1.0}, RESULT], [])
    assert "| `loader_vs_dino` | 300 | 60 | img/s | 5 | 5.0 | met |  |  |" in page
    assert "512 px JPEGs to crops." in page and "- one core" in page and "torch 2.10.0" in page
    assert "- 2026-01-02, a CPU, 2 cores, commit 0123456789\n" in page
    other = RESULT | {"row": "augment_share", "versions": {"torch": "2.11.0"}}
    page = bench.as_page([RESULT, other], [])
    assert "- torch 2.10.0 (loader_vs_dino)\n- torch 2.11.0 (augment_share)\n" in page


def test_figures_of_other_machines_stand_beside_the_newest():
    older = [RESULT | {"machine": "a GPU", "ratio": ratio} for ratio in (7.0, 8.0)]
    page = bench.as_page([*older, RESULT], [])
    assert "- elsewhere: 300 img/s, ratio 8; 2026-01-02, a GPU, commit 0123456789\n" in page
    assert page.count("elsewhere") == 1


def test_the_share_of_the_bound_is_reached_from_below_by_rates_and_from_above_by_seconds():
    bounded = RESULT | {"bound": 400.0, "bound_is": "decoding alone"}
    assert bench.share_of(bounded) == "75 %" and bench.share_of(RESULT) == ""
    assert bench.share_of(bounded | {"unit": "s a probe", "ours": 800.0}) == "50 %"
    page = bench.as_page([bounded], [])
    assert "| met | 400 | 75 % |" in page and "- bound: decoding alone" in page


def test_a_share_of_time_lost_is_turned_round_and_memory_is_reached_from_above():
    lost = RESULT | {"unit": "% of a step", "ours": 10.0, "bound": 1.0, "bound_is": "a copy"}
    assert bench.share_of(lost) == "91 %"  # 90 of 99
    assert bench.share_of(lost | {"bound": 0.0}) == "90 %"
    assert bench.share_of(RESULT | {"unit": "MB", "ours": 500.0, "bound": 400.0, "bound_is": "less"}) == "80 %"


def test_the_bound_is_at_the_best_of_all_formats(monkeypatch):
    rates = {torch.float32: 2e11, torch.bfloat16: 8e11}
    monkeypatch.setattr(bounds, "peak_flops", lambda device, dtype: rates[dtype])
    found = bounds.bound(4e9, torch.device("cpu"))
    assert found["bound"] == 200 and "200 in float32, 800 in bfloat16" in found["bound_is"]
    assert bounds.bound(4e9, torch.device("cpu"), formats=[torch.float32])["bound"] == 50


def test_a_profile_names_what_takes_the_time_and_takes_the_rows_place(monkeypatch, capsys):
    a = torch.ones(400, 400)
    assert bounds.profile_if_asked(lambda: a @ a) is None
    monkeypatch.setattr(bounds, "profiling", True)
    with pytest.raises(SystemExit):
        bounds.profile_if_asked(lambda: [a @ a for _ in range(50)])
    first, *rows = capsys.readouterr().out.splitlines()
    assert " s, of which " in first and rows[0].endswith("aten::mm") and " 50 calls" in rows[0]
    assert bench.run(bench.main, bench.get_args_parser(), ["--profile"]) == 2


def test_the_rows_of_generation_draw_with_todays_records(tmp_path):
    """Without measuring: a batch of the embedded model, and the dataset whose status is timed."""
    one = bench_generate.Ours(
        bench_generate.ROOT / "models" / "fashion-sd", "coat", 1, torch.device("cpu"), torch.float32
    )
    assert one.images_per_s(2) > 0 and "GFLOP an image" in one.bound()["bound_is"]
    bench_generate.fake_dataset(tmp_path / "fake", 2, 3)
    assert bench_generate.measure(["--out", str(tmp_path / "fake"), "--status"])[0] > 0


def test_the_list_names_every_row_without_measuring():
    shown = subprocess.run(
        [sys.executable, bench.__file__, "--list"], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[0] for line in shown.splitlines()] == list(bench.ROWS)


# ===== images a second on GPUs =====


def measure_gpu(tmp_path, *options: str) -> list[dict]:
    arguments = ["--device", "cpu", "--out", str(tmp_path / "rates.json"), *options]
    assert run(bench_gpu.main, bench_gpu.get_args_parser(), arguments) == 0
    return json.loads((tmp_path / "rates.json").read_text())


def test_every_setting_is_measured_written_and_read_by_the_planner(tmp_path, monkeypatch, capsys):
    def drawing(device, model, settings):
        if settings["attention"] == "xformers":
            raise UserError("--attention xformers: no kernels")
        return {"images_per_s": 4.0 if settings["compile"] else 2.0, "forwards": 102, "pixels": 512**2}

    measures = {"generation": drawing, "training": lambda *_: {"images_per_s": 900.0},
                "features": lambda *_: {"images_per_s": 5000.0}}  # fmt: skip
    monkeypatch.setattr(bench_gpu, "MEASURES", measures)
    rows = measure_gpu(tmp_path)
    said = capsys.readouterr().out
    assert "xformers, batch 16: left out (--attention xformers: no kernels)" in said
    assert len(rows) == len(bench_gpu.ROWS) - 1 and all(row["card"] and row["time"] for row in rows)
    for key, values in {"dtype": 3, "compile": 2, "batch_size": 4, "recipe": 2}.items():
        assert len({row[key] for row in rows if row["what"] == "generation"}) == values
    assert len(read_json(tmp_path / "rates.json", list[plan.Rate])) == len(rows)  # as the planner reads it

    table = list(bench_gpu.as_table([{**rows[0], "images_per_s": 1.0}, *rows]))
    assert len(table) == 2 + len(rows)  # the newest of each
    assert table[2].startswith(f"| {rows[0]['card']} | generation, paper, fp16, sdpa, batch 16 | 2 | 20")
    page = bench.as_page([RESULT], rows)
    assert "| training, paper, fp16, compiled | 900 |" in page and "None measured yet" in bench.as_page([RESULT], [])
    assert len(measure_gpu(tmp_path, "--only", "training")) == len(rows) + 2  # appended


def test_the_page_is_that_of_the_tables():
    assert bench.PAGE.read_text() == bench.as_page(read_json(bench.RESULTS, list), read_json(plan.RATES, list))


@pytest.mark.timeout(600)
def test_what_is_measured_is_really_drawn_trained_and_read(tmp_path, monkeypatch):
    """End to end with a random pipeline; speeds are not looked at."""
    rows = [("generation", bench_gpu.DRAWING | {"recipe": "fast", "dtype": "fp32", "batch_size": 2}),
            ("training", bench_gpu.TRAINING | {"dtype": "fp32"}), ("features", {"dtype": "fp32"})]  # fmt: skip
    monkeypatch.setattr(bench_gpu, "ROWS", rows)
    measured = measure_gpu(tmp_path, "--model", str(build_tiny_sd(tmp_path / "tiny")))
    assert [row["what"] for row in measured] == ["generation", "training", "features"]
    assert all(row["images_per_s"] > 0 for row in measured)
    assert (measured[0]["pixels"], measured[0]["forwards"]) == (16 * 16, 32)


def test_a_batch_that_does_not_fit_is_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_generate.Ours, "warm_up", lambda self: None)

    def halved(self, images):
        self.sampler.denoising.size //= 2
        return 1.0

    monkeypatch.setattr(bench_generate.Ours, "images_per_s", halved)
    settings = bench_gpu.DRAWING | {"dtype": "fp32", "batch_size": 4}
    with pytest.raises(UserError, match="--batch-size 4: does not fit"):
        bench_gpu.drawing_rate(torch.device("cpu"), str(build_tiny_sd(tmp_path / "tiny")), settings)


def test_without_a_gpu_the_bench_says_what_it_needs():
    done = subprocess.run(
        [sys.executable, bench_gpu.__file__], env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "no GPU here that torch can use" in done.stderr


H100 = {"card": "NVIDIA H100 80GB HBM3", "what": "generation", "time": "2026-12-24T10:00:00+00:00"}
TABLE = [
    H100 | {"images_per_s": 3.0},
    H100 | {"images_per_s": 0.7, "batch_size": 1},
    H100 | {"images_per_s": 0.9, "dtype": "fp32"},
    H100 | {"images_per_s": 2.5, "attention": "xformers"},
    H100 | {"images_per_s": 4.0, "compile": True},
    H100 | {"images_per_s": 9.0, "forwards": 32, "recipe": "fast"},
    H100 | {"images_per_s": 999.0, "what": "training"},
]


@pytest.mark.parametrize(
    ("cards", "asked", "forwards", "rate"),
    [
        (["NVIDIA H100 80GB HBM3"] * 8, {}, 102, 3.0),
        (["NVIDIA H100 80GB HBM3"], {"dtype": "bf16"}, 102, 3.0),
        (["NVIDIA H100 80GB HBM3"], {"dtype": "fp32"}, 102, 0.9),
        (["NVIDIA H100 80GB HBM3"], {"batch_size": 2}, 102, 0.7),
        (["NVIDIA H100 80GB HBM3"], {"attention": "xformers"}, 102, 2.5),
        (["NVIDIA H100 80GB HBM3"], {"compile": True}, 102, 4.0),
        (["NVIDIA H100 80GB HBM3"], {}, 32, 9.0),
        # 0.803 TFLOP a forward and 2.5 of the VAE: twice the forwards, nearly twice the time
        (["NVIDIA H100 80GB HBM3"], {}, 204, 3.0 * (102 * 0.803 + 2.5) / (204 * 0.803 + 2.5)),
        (["NVIDIA H100 80GB HBM3"], {"height": 256, "width": 512}, 102, 6.0),
        (["NVIDIA H100 80GB HBM3", "NVIDIA T4"], {}, 102, None),
        (["NVIDIA H100 PCIe"], {}, 102, None),
        ([], {}, 102, 1.08),  # an A100's published figure, of which the table has no row
    ],
)
def test_the_planner_reads_the_row_that_is_nearest(tmp_path, monkeypatch, cards, asked, forwards, rate):
    (tmp_path / "rates.json").write_text(json.dumps(TABLE))
    monkeypatch.setattr(plan, "RATES", tmp_path / "rates.json")
    monkeypatch.setattr(plan, "gpus", lambda: {"gpus": cards})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    recipe = Recipe(**{"dtype": None, **asked})
    found, unit, how = plan.expected_rate(recipe, None, "CompVis/stable-diffusion-v1-4", "auto", forwards)
    assert found == pytest.approx(rate or 0.0, rel=1e-3) and unit == "GPU"
    assert how.startswith("measured on NVIDIA H100 80GB HBM3, 2026-12-24: ") is (rate is not None and bool(cards))


def test_other_models_slices_and_the_cpu_have_no_row(tmp_path, monkeypatch):
    (tmp_path / "rates.json").write_text(json.dumps(TABLE))
    monkeypatch.setattr(plan, "RATES", tmp_path / "rates.json")
    monkeypatch.setattr(plan, "gpus", lambda: {"gpus": [H100["card"]]})
    sd1 = "CompVis/stable-diffusion-v1-4"
    for model, device, visible in (
        ("stabilityai/stable-diffusion-2-1", "auto", "0"), (sd1, "cpu", "0"), (sd1, "auto", "MIG-3f2a")
    ):  # fmt: skip
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert plan.expected_rate(Recipe(), None, model, device, 102)[0] == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert plan.expected_rate(Recipe(), None, sd1, "auto", 102)[0] == pytest.approx(3.0)
    (tmp_path / "rates.json").write_text('[{"card": 3}]')
    with pytest.raises(UserError, match=r"rates\.json.*take it from the repository again"):
        plan.expected_rate(Recipe(), None, sd1, "auto", 102)


def test_a_gpu_without_room_leaves_the_plan_its_other_lines(monkeypatch, capsys):
    monkeypatch.setattr(plan, "gpus", lambda: {"gpus": ["NVIDIA A100-SXM4-80GB"]})

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GB\nmore")

    monkeypatch.setattr("utils.generation.loading.measured_rate", full)
    sd2 = "stabilityai/stable-diffusion-2-1"
    assert plan.expected_rate(Recipe(), "a folder", sd2, "auto", 102)[0] == 0
    assert "note: CUDA out of memory. Tried to allocate 20 GB" in capsys.readouterr().err


def test_a_model_needs_what_its_weights_and_images_take(tmp_path):
    """The float32 files of Stable Diffusion 1.4, bytes as the hub lists them: 6 GB at 512 px in fp16 are enough."""
    sizes = {"unet": 3_438_167_540, "vae": 334_643_276, "text_encoder": 492_265_880, "safety_checker": 1_215_981_830}
    folder = PipelineFolder("sd", None, build_tiny_sd(tmp_path / "tiny", with_safety_checker=True))
    fp16 = Recipe(dtype="fp16", height=512, width=512)
    assert plan.memory_gb(folder, replace(fp16, height=16, width=16)) < 0.1
    for part, size in sizes.items():
        (file,) = folder.weights(part)
        only_shapes(file, size // 4, "F32")
    assert 5.5 < plan.memory_gb(folder, fp16) < 6
    assert plan.memory_gb(folder, replace(fp16, dtype="fp32")) > 8
    assert plan.memory_gb(folder, replace(fp16, height=256, width=256)) < 3.6
    assert plan.memory_gb(folder, replace(fp16, safety="off")) < 5.3


def only_shapes(file: Path, count: int, dtype: str) -> None:
    """In the place of FILE weights of COUNT numbers that take no room on the disk."""
    width = {"F32": 4, "BF16": 2}[dtype]
    header = json.dumps({"w": {"dtype": dtype, "shape": [count], "data_offsets": [0, width * count]}}).encode()
    with open(file, "wb") as written:
        written.write(len(header).to_bytes(8, "little") + header)
        written.truncate(8 + len(header) + width * count)


def test_parts_that_take_turns_need_the_memory_of_the_larger_one(tmp_path):
    """Flux, whose weights are on the hub in bfloat16: 11.9e9 of the transformer, 4.9e9 of the two encoders."""
    folder = PipelineFolder("flux.1-dev", None, build_tiny("flux.1-dev", tmp_path / "flux.1-dev"))
    counts = {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656, "text_encoder": 123_060_480}
    for part, count in counts.items():
        (file,) = folder.weights(part)
        only_shapes(file, count, "BF16")
    recipe = Recipe(name="flux-dev", dtype="bf16", height=1024, width=1024, safety="off")
    assert 22.1 < plan.memory_gb(folder, recipe) - plan.WORK_GB < 22.3  # not 31: a card of 40 GB draws it
