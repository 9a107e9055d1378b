"""Several local processes as one: started, listened to, signalled and judged together.

Used by the launcher on this machine and, inside a SLURM job, on every node: a process is one chunk of classes or one
DDP rank.
"""

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
from pathlib import Path
from types import FrameType
from typing import Any

from utils.machine import gpus

# Between the first stop signal and SIGKILL: a checkpoint takes seconds, SLURM's own KillWait is 30 s by default.
GRACE_S = 60
TAIL_LINES = 10
PROGRESS_S = 10  # between two states of one process's progress bar
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(eq=False)
class Process:
    """One command: LABEL names it to people ("chunk 3/8"), ENV is added to this process's environment.

    CODE is how it ended, as a shell reports it (128 + n for signal n); None before that, or if it was never started.
    """

    label: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    code: int | None = None
    device: str | None = None  # its entry of CUDA_VISIBLE_DEVICES
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))  # its last lines

    def start(self, alone: bool) -> None:
        """Start it. ALONE it has the terminal; of several, each line that it prints is shown behind its label."""
        pipe = None if alone else subprocess.PIPE
        visible = {} if self.device is None else {"CUDA_VISIBLE_DEVICES": self.device}
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe and subprocess.STDOUT}
        env = {**os.environ, **visible, **self.env}
        self.popen = subprocess.Popen(self.command, env=env, preexec_fn=_die_with_parent, **streams)
        self._reader = threading.Thread(target=self._read, daemon=True)
        if pipe:
            self._reader.start()

    def has_ended(self) -> bool:
        """Whether it has ended and its last lines are printed; its code is then known."""
        status = self.popen.poll()
        if status is not None and self._reader.ident:
            self._reader.join(timeout=5)  # a grandchild may hold the pipe open; do not wait for it
        self.code = 128 - status if status is not None and status < 0 else status
        return status is not None

    def _read(self) -> None:
        """Print lines as they end; of a progress bar (redraws begin with \\r) its state now and then, and the last."""
        assert isinstance(self.popen.stdout, io.BufferedReader)
        rest, bar, bar_at = b"", "", -float("inf")
        while data := self.popen.stdout.read1():
            *lines, rest = (rest + data).split(b"\n")
            for line in map(last_state, lines):
                self.tail.append(line)
                if not bar or line != bar:  # not the end of a bar that stands there already
                    self.show(line)
                bar = ""
            if b"\r" in rest and (state := last_state(rest)) and time.monotonic() >= bar_at + PROGRESS_S:
                bar, bar_at = state, time.monotonic()
                self.show(bar)
            rest = rest[rest.rfind(b"\r", 0, -1) + 1 :]
        if (line := last_state(rest)) and line != bar:  # a process that was killed ends no line
            self.tail.append(line)
            self.show(line)

    def show(self, line: str) -> None:
        """Tell a LINE that the process printed."""
        print(f"[{self.label}] {line}", flush=True)


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
    stopped_by: int | None = None
    cause: Process | None = None  # of ranks the one whose failure has ended the others
    _kill_at: float = float("inf")  # finite once the team is being ended
    _running: list[Process] = field(default_factory=list)

    def run(self) -> None:
        """Run all to their end. Signal handlers are set for that time, so this is called from the main thread."""
        before = {number: signal.signal(number, self._on_signal) for number in FORWARDED}
        waiting, idle = deque(self.processes), deque(self.devices)
        try:
            while self._running or (waiting and self._kill_at == float("inf")):
                while waiting and len(self._running) < self.parallel and self._kill_at == float("inf"):
                    process = waiting.popleft()
                    process.device = idle.popleft() if idle else None
                    process.start(alone=len(self.processes) == 1)
                    self._running.append(process)
                    if self.stopped_by is not None:  # the signal came while this one was being started
                        process.popen.send_signal(self.stopped_by)
                for process in [process for process in self._running if process.has_ended()]:
                    self._running.remove(process)
                    idle += [] if process.device is None else [process.device]
                    if process.code and self.together and self._kill_at == float("inf"):
                        self.cause = process
                        self._send(signal.SIGTERM)
                if time.monotonic() > self._kill_at:
                    self._send(signal.SIGKILL)
                time.sleep(0.05)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def failed(self) -> list[Process]:
        """Those that did not end well, or were not started."""
        return [process for process in self.processes if process.code != 0]

    def report(self) -> int:
        """Say which processes failed and how to run each again; the exit code is that of the first which failed.

        Of ranks only the first is told of: the others were ended because of it.
        """
        told = [self.cause] if self.cause else self.failed()
        for process in told:
            again = shlex.join(part for part in process.command if part != "-u")
            ending = "was not started" if process.code is None else f"ended with exit code {process.code}"
            if process.code == 128 + signal.SIGKILL:
                ending += " (killed; out of memory? give more with --mem-gb)"
            lines = [f"launch: {process.label} {ending}", *(f"  | {line}" for line in process.tail)]
            print(*lines, f"  run it again alone: {again}", sep="\nlaunch: ", file=sys.stderr, flush=True)
        return next((process.code or 1 for process in told), 0)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.stopped_by is None or number == signal.SIGINT:
            self._send(number if self.stopped_by is None else signal.SIGKILL)  # a second Ctrl-C means now
        self.stopped_by = self.stopped_by or number

    def _send(self, number: int) -> None:
        self._kill_at = min(self._kill_at, time.monotonic() + GRACE_S)
        for process in list(self._running):
            process.popen.send_signal(number)  # does nothing to one that has ended


def last_state(line: bytes) -> str:
    """What a terminal would show of LINE: what stands behind its last \\r that is not its end."""
    return line.decode(errors="replace").rstrip().rpartition("\r")[2]


def _die_with_parent() -> None:
    """In the child: be ended when the launcher dies, even by SIGKILL, so that no orphan keeps a GPU or a lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def make_team(
    command: tuple[str, ...], count: int, chunks: Sequence[int], of: int, gpus: Sequence[str], ranks: tuple | None
) -> Team:
    """COMMAND in COUNT processes at once on this node: CHUNKS of OF, each GPU used once before any is used twice.

    Or as DDP ranks, with the variables that torchrun sets: RANKS is (node, nodes, master's address, port). Else alone.
    """
    if of > 1:
        parts = [Process(f"chunk {chunk}/{of}", (*command, "--chunk", f"{chunk}/{of}")) for chunk in chunks]
        return Team(parts, count, devices=[gpus[place % len(gpus)] for place in range(count)] if gpus else [])
    node, nodes, address, port = ranks or (0, 0, "", 0)
    if nodes * count <= 1:
        return Team([Process(Path(next(word for word in command if word.endswith(".py"))).name, command)], 1)
    shared = {"WORLD_SIZE": nodes * count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": address, "MASTER_PORT": port}
    own = [{"RANK": node * count + local, "LOCAL_RANK": local, **shared} for local in range(count)]
    environments = [{name: str(value) for name, value in variables.items()} for variables in own]
    return Team([Process(f"rank {env['RANK']}", command, env) for env in environments], count, together=True)


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as entries of CUDA_VISIBLE_DEVICES; [] where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [entry for entry in visible.split(",") if entry and entry != "-1"]
    return [str(index) for index in range(len(gpus()["gpus"]))]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
