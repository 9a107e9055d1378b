"""The benchmark page: verdicts and layout. Speeds themselves are never tested."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks import bench, bench_generate, bounds

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
    page = bench.as_page([RESULT | {"ours": 1.0}, RESULT])
    assert "| `loader_vs_dino` | 300 | 60 | img/s | 5 | 5.0 | met |  |  |" in page
    assert "512 px JPEGs to crops." in page and "- one core" in page and "torch 2.10.0" in page
    assert "- 2026-01-02, a CPU, 2 cores, commit 0123456789\n" in page
    other = RESULT | {"row": "augment_share", "versions": {"torch": "2.11.0"}}
    page = bench.as_page([RESULT, other])
    assert "- torch 2.10.0 (loader_vs_dino)\n- torch 2.11.0 (augment_share)\n" in page


def test_figures_of_other_machines_stand_beside_the_newest():
    older = [RESULT | {"machine": "a GPU", "ratio": ratio} for ratio in (7.0, 8.0)]
    page = bench.as_page([*older, RESULT])
    assert "- elsewhere: 300 img/s, ratio 8; 2026-01-02, a GPU, commit 0123456789\n" in page
    assert page.count("elsewhere") == 1


def test_the_share_of_the_bound_is_reached_from_below_by_rates_and_from_above_by_seconds():
    bounded = RESULT | {"bound": 400.0, "bound_is": "decoding alone"}
    assert bench.share_of(bounded) == "75 %" and bench.share_of(RESULT) == ""
    assert bench.share_of(bounded | {"unit": "s a probe", "ours": 800.0}) == "50 %"
    page = bench.as_page([bounded])
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
