"""The launcher's way to SLURM: what is checked before anything is queued, what is submitted, what runs in the job.

submitit writes the batch script, pickles a `Task` and restarts it; the Task runs the script's own command in processes
of this node. Progress lives in the script's output folder only, so a restart is the same command again, whoever asks
for it: a time-out (submitit's USR2, then `scontrol requeue`), a preemption or a lost node (SLURM's own requeue).
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.helpers import Checkpointable

from utils.cli import UserError
from utils.launch.processes import Process, Team, chunk_processes, rank_processes, report, share, visible_gpus
from utils.launch.slurm_checks import last_line, resolves
from utils.machine import ROOT
from utils.storage import write_json

IMAGE_PYTHON = "/opt/venv/bin/python"  # where the Dockerfile puts it
# Below the range that kernels hand out themselves (32768 and above on Linux): nobody has them by chance.
FIRST_PORT, PORTS = 20000, 12000
LONGEST_GRACE_S = 3600  # a partition's GraceTime is minutes; a bound, should SLURM change its mind
OWN_SBATCH_KEYS = {"array", "output", "error", "signal", "requeue", "open-mode", "dependency", "wrap", "job-name"}


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
        _exit_file(node).unlink(missing_ok=True)  # of an earlier start of this job
        team = self._team(node, nodes)
        # submitit's handler checkpoints and requeues; it may do so only when the processes have saved and left.
        requeue = signal.getsignal(signal.SIGUSR2)
        outcomes = team.run()
        if team.stopped_by == signal.SIGUSR2 and any(outcome.code != 0 for outcome in outcomes):
            self._requeue(requeue, node)
        if team.stopped_by is not None and any(outcome.code != 0 for outcome in outcomes):
            print(f"launch: stopped by {signal.Signals(team.stopped_by).name}", flush=True)
            if team.stopped_by == signal.SIGTERM and in_preemption_grace():
                self._await_the_end()
            sys.exit(128 + team.stopped_by)  # SLURM itself requeues what it preempts, and leaves what it cancels
        code = report(outcomes)
        write_json(_exit_file(node), {"code": code, "failed": [o.process.label for o in outcomes if o.code != 0]})
        if code:
            sys.exit(code)  # not an exception: the log shall end with the script's own words

    def _team(self, node: int, nodes: int) -> Team:
        command = (sys.executable, "-u", *self.command)
        if self.chunks is not None and self.of > 1:
            # Not asking nvidia-smi, which may show GPUs of other jobs.
            gpus = visible_gpus() if "CUDA_VISIBLE_DEVICES" in os.environ else []
            return Team(
                chunk_processes(command, self.chunks, self.of), self.processes, devices=share(gpus, self.processes)
            )
        if self.ranks and nodes * self.processes > 1:
            ranks = rank_processes(command, self.processes, node, nodes, master_address(), master_port())
            return Team(ranks, self.processes, together=True)
        return Team([Process(Path(self.command[0]).name, command)], 1)

    def _requeue(self, submitit_handler: Any, node: int) -> None:
        if node == 0:
            try:
                submitit_handler(signal.SIGUSR2, None)  # pickles this Task again, `scontrol requeue`, SystemExit
            except FileNotFoundError:  # inside a container without SLURM's programs: the batch script requeues instead
                requeue_marker().touch()
                sys.exit(128 + signal.SIGUSR2)
        # Another node's task leaves when the requeue ends the job; leaving first would end node 0 before it has saved.
        time.sleep(120)

    def _await_the_end(self) -> None:
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
    from submitit import JobEnvironment

    try:
        result = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", JobEnvironment().job_id],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    words = dict(word.split("=", 1) for word in result.stdout.split() if "=" in word)
    return result.returncode != 0 or (words.get("JobState") == "RUNNING" and words.get("PreemptTime") != "None")


def _exit_file(node: int) -> Path:
    from submitit import JobEnvironment

    return Path(os.environ["SUBMITIT_FOLDER"]) / f"{JobEnvironment().job_id}-node{node}.exit.json"


def requeue_marker() -> Path:
    return Path(os.environ["SUBMITIT_FOLDER"]) / f"{os.environ['SLURM_JOB_ID']}.requeue"


def master_address() -> str:
    """The job's first node: by its name where that resolves, else by the address its step was started from."""
    from submitit import JobEnvironment

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


# ===== submitting =====


def sbatch_parameters(args: Namespace) -> dict[str, Any]:
    """The options of sbatch (as submitit names them) that ARGS ask for. One SLURM task a node starts the processes."""
    wanted = {
        "partition": args.partition,
        "account": args.account,
        "qos": args.qos,
        "constraint": args.constraint,
        "exclude": args.exclude,
        "nodes": args.nodes,
        "ntasks_per_node": 1,
        "time": args.timeout_min,
        "gpus_per_node": args.gpus_per_node or None,
        "cpus_per_task": args.cpus_per_task * args.processes if args.cpus_per_task else None,
        "mem": f"{int(args.mem_gb * 1024)}M" if args.mem_gb else None,
    }
    return {key: value for key, value in wanted.items() if value is not None}


def sbatch_flags(args: Namespace) -> list[str]:
    pairs = {key.replace("_", "-"): value for key, value in sbatch_parameters(args).items()}
    return [f"--{key}={value}" for key, value in {**pairs, **dict(args.sbatch)}.items()]


def submit(args: Namespace, tasks: Sequence[Task], folder: Path, name: str, after: Sequence[str]) -> str:
    """Queue TASKS, as an array if there are several, and return the job's id."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    python, srun_args = in_container(args, folder)
    executor = submitit.SlurmExecutor(folder, max_num_timeout=args.max_requeues, python=python)
    parameters = sbatch_parameters(args)
    extra = {"requeue": True, "kill-on-invalid-dep": "yes", **dict(args.sbatch)}
    if after:
        extra["dependency"] = "afterok:" + ":".join(after)
    if "mem" in parameters:  # submitit would read a number of GB here
        extra["mem"] = parameters.pop("mem")
    digest = [f"export IMAGE_DIGEST={shlex.quote(digest)}"] if (digest := image_digest(args)) else []
    marker = shlex.quote(str(folder)) + '/"$SLURM_JOB_ID".requeue'
    executor.update_parameters(
        **parameters,
        job_name=name,
        array_parallelism=args.array_parallelism,
        signal_delay_s=args.signal_delay_s,
        stderr_to_stdout=True,
        setup=[f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}", *digest, *args.setup],
        # A rank that fails ends the others at once, not after the process group's time-out.
        srun_args=["--kill-on-bad-exit=1", *srun_args],
        teardown=[
            "code=$?",
            f'if [ -e {marker} ]; then rm {marker}; scontrol requeue "$SLURM_JOB_ID"; fi',
            "exit $code",
        ],
        additional_parameters=extra,
    )
    try:
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused {name}: {last_line(str(error))}") from None
    return str(jobs[0].job_id).split("_")[0]


def describe(command: tuple[str, ...], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """For people: what each job (array element) draws, and the shell commands that do it alone."""
    described = []
    for task in tasks:
        chunks = task.chunks or (None,)
        label = "" if task.chunks is None else f"chunk {', '.join(map(str, task.chunks))} of {task.of}"
        parts = [("--chunk", f"{chunk}/{task.of}") if chunk is not None else () for chunk in chunks]
        described.append({"label": label, "commands": [shlex.join(("python", *command, *part)) for part in parts]})
    return described


def in_container(args: Namespace, folder: Path) -> tuple[str | None, list[str]]:
    """(the command that is Python in the job, further arguments of srun) for pyxis, Apptainer or neither."""
    own = dict.fromkeys((str(ROOT), str(Path.cwd()), str(folder)))
    mounts = [f"{path}:{path}" for path in own] + args.container_mounts
    if args.container_image:
        return IMAGE_PYTHON, [
            f"--container-image={args.container_image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={Path.cwd()}",
        ]
    if args.apptainer:
        nvidia = ["--nv"] if args.gpus_per_node else []
        binds = [part for mount in mounts for part in ("--bind", mount)]
        command = ["apptainer", "exec", *nvidia, *binds, "--pwd", str(Path.cwd()), args.apptainer, IMAGE_PYTHON]
        return shlex.join(command), []
    return None, []


def image_digest(args: Namespace) -> str | None:
    """The digest that datasets and checkpoints record, where the image is named by it (name@sha256:...)."""
    image = args.container_image or args.apptainer or ""
    return image[image.index("sha256:") :] if "@sha256:" in image else None
