"""Several local processes as one: started, listened to, signalled and judged together.

Used by the launcher on this machine and, inside a SLURM job, on every node: a process is one chunk of classes or one
DDP rank.
"""

from __future__ import annotations

import ctypes
import io
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

from utils.machine import gpus

# Between the first stop signal and SIGKILL: a checkpoint takes seconds, SLURM's own KillWait is 30 s by default.
GRACE_S = 60
TAIL_LINES = 10
PROGRESS_S = 10  # between two states of one process's progress bar
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Process:
    """One command: LABEL names it to people ("chunk 3/8"), ENV is added to this process's environment."""

    label: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How PROCESS ended: CODE as a shell reports it (128 + n for signal n), None if it was never started."""

    process: Process
    code: int | None
    tail: tuple[str, ...] = ()


@dataclass
class Team:
    """Runs PROCESSES, at most PARALLEL at once, each on one of DEVICES (entries of CUDA_VISIBLE_DEVICES) if given.

    TOGETHER: they are ranks of one job, so when one fails the others are ended. Else they are independent: the others
    go on, and the failure is reported at the end. A stop signal is handed on to all, and nothing more is started.
    """

    processes: Sequence[Process]
    parallel: int
    together: bool = False
    devices: Sequence[str] = ()
    stopped_by: int | None = field(default=None, init=False)
    _kill_at: float = field(default=float("inf"), init=False)
    _running: dict[int, _Child] = field(default_factory=dict, init=False)

    def run(self) -> list[Outcome]:
        """Run all to their end. Signal handlers are set for that time, so this is called from the main thread."""
        before = {number: signal.signal(number, self._on_signal) for number in FORWARDED}
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> list[Outcome]:
        outcomes = [Outcome(process, None) for process in self.processes]
        idle_devices = deque(self.devices)
        waiting = deque(range(len(self.processes)))
        while self._running or (waiting and self._kill_at == float("inf")):
            while waiting and len(self._running) < self.parallel and self._kill_at == float("inf"):
                index = waiting.popleft()
                device = idle_devices.popleft() if idle_devices else None
                self._running[index] = _Child(self.processes[index], device, alone=len(self.processes) == 1)
                if self.stopped_by is not None:  # the signal came while this one was being started
                    self._running[index].popen.send_signal(self.stopped_by)
            for index, child in list(self._running.items()):
                if (code := child.finished()) is not None:
                    del self._running[index]
                    idle_devices += [] if child.device is None else [child.device]
                    outcomes[index] = Outcome(child.process, code, tuple(child.tail))
                    if code and self.together and self._kill_at == float("inf"):
                        self._send(signal.SIGTERM)
            if time.monotonic() > self._kill_at:
                self._send(signal.SIGKILL)
            time.sleep(0.05)
        return outcomes

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.stopped_by is None or number == signal.SIGINT:
            self._send(number if self.stopped_by is None else signal.SIGKILL)  # a second Ctrl-C means now
        self.stopped_by = self.stopped_by or number

    def _send(self, number: int) -> None:
        self._kill_at = min(self._kill_at, time.monotonic() + GRACE_S)
        for child in list(self._running.values()):
            child.popen.send_signal(number)  # does nothing to one that has ended


class _Child:
    """A started process; of several, each line it prints goes to this process's output behind its label."""

    def __init__(self, process: Process, device: str | None, alone: bool) -> None:
        self.process = process
        self.device = device
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        pipe = None if alone else subprocess.PIPE
        visible = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        self.popen = subprocess.Popen(
            process.command,
            env={**os.environ, **visible, **process.env},
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=subprocess.STDOUT if pipe else None,
            preexec_fn=_die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, daemon=True) if pipe else None
        if self._reader:
            self._reader.start()

    def finished(self) -> int | None:
        """Its exit code as a shell reports it, once it has ended and its last lines are printed."""
        code = self.popen.poll()
        if code is None:
            return None
        if self._reader:
            self._reader.join(timeout=5)  # a grandchild may hold the pipe open; do not wait for it
        return 128 - code if code < 0 else code

    def _read(self) -> None:
        """Print lines as they end; of a progress bar (redraws begin with \\r) its state now and then, and the last."""
        assert isinstance(self.popen.stdout, io.BufferedReader)
        rest, bar, bar_at = b"", "", -float("inf")
        while data := self.popen.stdout.read1():
            *lines, rest = (rest + data).split(b"\n")
            for line in map(_last_state, lines):
                self.tail.append(line)
                if not bar or line != bar:  # not the end of a bar that stands there already
                    self._print(line)
                bar = ""
            if b"\r" in rest and (state := _last_state(rest)) and time.monotonic() >= bar_at + PROGRESS_S:
                bar, bar_at = state, time.monotonic()
                self._print(bar)
            rest = rest[rest.rfind(b"\r", 0, -1) + 1 :]
        if (line := _last_state(rest)) and line != bar:  # a process that was killed ends no line
            self.tail.append(line)
            self._print(line)

    def _print(self, line: str) -> None:
        print(f"[{self.process.label}] {line}", flush=True)


def _last_state(line: bytes) -> str:
    """What a terminal would show of LINE: what stands behind its last \\r that is not its end."""
    return line.decode(errors="replace").rstrip().rpartition("\r")[2]


def _die_with_parent() -> None:
    """In the child: be ended when the launcher dies, even by SIGKILL, so that no orphan keeps a GPU or a lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def report(outcomes: Sequence[Outcome]) -> int:
    """Say which processes failed and how to run each again; the exit code is the first failure's, 0 without one."""
    failed = [outcome for outcome in outcomes if outcome.code != 0]
    for outcome in failed:
        again = shlex.join(part for part in outcome.process.command if part != "-u")
        ending = "was not started" if outcome.code is None else f"ended with exit code {outcome.code}"
        if outcome.code == 128 + signal.SIGKILL:
            ending += " (killed; out of memory? give more with --mem-gb)"
        print(f"launch: {outcome.process.label} {ending}", file=sys.stderr)
        for line in outcome.tail:
            print(f"launch:   | {line}", file=sys.stderr)
        print(f"launch:   run it again alone: {again}", file=sys.stderr, flush=True)
    codes = [outcome.code for outcome in failed if outcome.code]
    return codes[0] if codes else int(bool(failed))


# ===== what the processes are =====


def chunk_processes(command: Sequence[str], chunks: Sequence[int], of: int) -> list[Process]:
    """COMMAND once a chunk, with `--chunk I/OF`."""
    return [Process(f"chunk {chunk}/{of}", (*command, "--chunk", f"{chunk}/{of}")) for chunk in chunks]


def rank_processes(command: Sequence[str], count: int, node: int, nodes: int, address: str, port: int) -> list[Process]:
    """COMMAND COUNT times as the ranks of NODE of NODES, with the variables that torchrun sets."""
    shared = {"WORLD_SIZE": nodes * count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": address, "MASTER_PORT": port}
    ranks = [{"RANK": node * count + local, "LOCAL_RANK": local, **shared} for local in range(count)]
    variables = [{name: str(value) for name, value in rank.items()} for rank in ranks]
    return [Process(f"rank {env['RANK']}", tuple(command), env) for env in variables]


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as entries of CUDA_VISIBLE_DEVICES; [] where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [entry for entry in visible.split(",") if entry and entry != "-1"]
    return [str(index) for index in range(len(gpus()["gpus"]))]


def share(devices: Sequence[str], count: int) -> list[str]:
    """The GPU of each of COUNT processes: every GPU once before any is used twice."""
    return [devices[place % len(devices)] for place in range(count)] if devices else []


def local_ranks(command: Sequence[str], count: int) -> list[Process]:
    """COMMAND as COUNT ranks on this machine alone, which meet at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return rank_processes(command, count, 0, 1, "127.0.0.1", probe.getsockname()[1])
