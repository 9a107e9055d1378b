"""What a result records about where it was made."""

from __future__ import annotations

import json
import subprocess
import sys

from utils import environment


def test_a_snapshot_is_plain_json_and_names_the_lock_and_versions():
    taken = environment.snapshot()
    assert json.loads(json.dumps(taken)) == taken
    assert len(taken["lock_sha256"]) == 64
    assert taken["packages"]["torch"].startswith("2.10.0")
    assert taken["cores"] >= 1 and taken["cpu"]


def test_a_snapshot_imports_no_torch():
    code = "import sys; from utils.environment import snapshot; snapshot(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=environment.ROOT).returncode == 0


def test_bf16_is_asked_of_the_cpu_flags(monkeypatch):
    for flags, expected in [("fpu avx512_bf16", False), ("fpu amx_bf16", True), ("fpu avx2", False), ("", False)]:
        monkeypatch.setattr(environment, "_cpuinfo", lambda flags=flags: f"model name : x\nflags : {flags}\n")
        environment.cpu_has_bf16.cache_clear()
        assert environment.cpu_has_bf16() is expected
    environment.cpu_has_bf16.cache_clear()
