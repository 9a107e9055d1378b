"""What runs inside a SLURM job: submitit pickles a `Task`, starts it on every node of the job, and restarts it.

The Task runs the script's own command in processes of its node. Progress lives in the script's output folder only, so
a restart is the same command again, whoever asks for it: a time-out (submitit's USR2, then `scontrol requeue`), a
preemption or a lost node (SLURM's own requeue).
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.helpers import Checkpointable

from utils.cli import UserError
from utils.launch.checks import fields, resolves
from utils.launch.processes import Process, Team, chunk_processes, rank_processes, report, share, visible_gpus
from utils.storage import write_json

# Below the range that kernels hand out themselves (32768 and above on Linux): nobody has them by chance.
FIRST_PORT, PORTS = 20000, 12000
LONGEST_GRACE_S = 3600  # a partition's GraceTime is minutes; a bound, should SLURM change its mind


@dataclass
class Task(Checkpointable):
    """What one job (or array element) runs on each of its nodes; pickled by submitit, free of any progress.

    chunks: the chunks of `of` that this element draws; None for a command of one process or of DDP ranks.
    processes: at once on a node. ranks: they form one DDP job over all nodes.
    """

    command: tuple[str, ...]
    processes: int = 1
    chunks: tuple[int, ...] | None = None
    of: int = 1
    ranks: bool = False

    def __call__(self) -> None:
        node, nodes = int(os.environ.get("SLURM_NODEID", 0)), int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
        exit_file = Path(os.environ["SUBMITIT_FOLDER"]) / f"{JobEnvironment().job_id}-node{node}.exit.json"
        exit_file.unlink(missing_ok=True)  # of an earlier start of this job
        team = self._team(node, nodes)
        # submitit's handler checkpoints and requeues; it may do so only when the processes have saved and left.
        requeue = signal.getsignal(signal.SIGUSR2)
        outcomes = team.run()
        failed = [outcome.process.label for outcome in outcomes if outcome.code != 0]
        if team.stopped_by is not None and failed:
            if team.stopped_by == signal.SIGUSR2:
                _requeue(requeue, node)
            print(f"launch: stopped by {signal.Signals(team.stopped_by).name}", flush=True)
            if team.stopped_by == signal.SIGTERM and in_preemption_grace():
                _await_the_end()
            sys.exit(128 + team.stopped_by)  # SLURM itself requeues what it preempts, and leaves what it cancels
        code = report(outcomes)
        write_json(exit_file, {"code": code, "failed": failed})
        if code:
            sys.exit(code)  # not an exception: the log shall end with the script's own words

    def _team(self, node: int, nodes: int) -> Team:
        command = (sys.executable, "-u", *self.command)
        if self.chunks is not None and self.of > 1:
            # Not asking nvidia-smi, which may show GPUs of other jobs.
            gpus = visible_gpus() if "CUDA_VISIBLE_DEVICES" in os.environ else []
            processes = chunk_processes(command, self.chunks, self.of)
            return Team(processes, self.processes, devices=share(gpus, self.processes))
        if self.ranks and nodes * self.processes > 1:
            ranks = rank_processes(command, self.processes, node, nodes, master_address(), master_port())
            return Team(ranks, self.processes, together=True)
        return Team([Process(Path(self.command[0]).name, command)], 1)

    def describe(self) -> dict[str, Any]:
        """For people: what this job draws, and the shell commands that do it alone."""
        chunks, command = self.chunks or (), ("python", *self.command)
        commands = [(*command, "--chunk", f"{chunk}/{self.of}") for chunk in chunks] or [command]
        label = f"chunk {', '.join(map(str, chunks))} of {self.of}" if chunks else ""
        return {"label": label, "commands": [shlex.join(command) for command in commands]}


def _requeue(submitit_handler: Any, node: int) -> None:
    if node == 0:
        try:
            submitit_handler(signal.SIGUSR2, None)  # pickles this Task again, `scontrol requeue`, SystemExit
        except FileNotFoundError:  # inside a container without SLURM's programs: the batch script requeues instead
            Path(os.environ["SUBMITIT_FOLDER"], f"{os.environ['SLURM_JOB_ID']}.requeue").touch()
            sys.exit(128 + signal.SIGUSR2)
    # Another node's task leaves when the requeue ends the job; leaving first would end node 0 before it has saved.
    time.sleep(120)


def _await_the_end() -> None:
    """Stay until SLURM ends the job at the end of its GraceTime: it requeues no job that ended before by itself."""
    # The grace period is a time limit too, at which submitit would requeue.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print("launch: saved; waiting for SLURM to requeue this job", flush=True)
    time.sleep(LONGEST_GRACE_S)


def in_preemption_grace() -> bool:
    """Whether this job is being preempted but not ended yet. A job that SLURM ends at once or cancels is not running.

    True as well where SLURM cannot be asked (in a container): then a cancelled job stays for the KillWait.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return False
    command = ["scontrol", "--oneliner", "show", "job", JobEnvironment().job_id]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return True
    job = fields(result.stdout)
    return result.returncode != 0 or (job.get("JobState") == "RUNNING" and job.get("PreemptTime") != "None")


def master_address() -> str:
    """The job's first node: by its name where that resolves, else by the address its step was started from."""
    first = JobEnvironment().hostnames[0]
    for address in (first, os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "")):
        if address and resolves(address):
            return address
    here = socket.gethostname()
    raise UserError(f"MASTER_ADDR: the node name {first} does not resolve on {here}; mend DNS or /etc/hosts")


def master_port() -> int:
    """A port for this job's own use: jobs that share a node have different ids, a requeued job takes another one."""
    job, restarts = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return FIRST_PORT + (job + 997 * restarts) % PORTS
