"""The launcher's way to SLURM: commands become jobs, jobs become options of sbatch, and submitit queues them.

Each stage is one job or one array; those of a pipeline wait for each other by dependencies. What was queued is recorded
in the log folder, from which utils/launch/watch.py follows it.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from utils.cli import UserError
from utils.launch.checks import ask_cluster, check_cluster, fill_in, last_line
from utils.launch.slurm import Task
from utils.launch.watch import RECORD, log_file, watch
from utils.machine import ROOT
from utils.storage import write_json

if TYPE_CHECKING:
    from utils.launch.command import Stage

IMAGE_PYTHON = "/opt/venv/bin/python"  # where the Dockerfile puts it


def run_on_slurm(stages: Sequence[Stage]) -> int:
    """Check and queue STAGES, each after the one before; with --wait stay until they end. The exit code."""
    first = stages[0].args
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = (first.log_dir or Path("runs/launch") / f"{stamp}-{stages[0].name}").resolve()
    if not str(folder).isprintable() or set("%\\") & set(str(folder)):
        raise UserError(f"--log-dir {str(folder)!r}: SLURM reads % and \\ in it as patterns; choose plain characters")
    planned = []
    for stage in stages:
        cluster = ask_cluster(stage.args.partition)
        fill_in(stage.args, cluster)
        tasks = tasks_of(stage, cluster.array_size)
        array = [f"--array=0-{len(tasks) - 1}"] if len(tasks) > 1 else []
        check_cluster(stage.args, cluster, [*sbatch_flags(stage.args), *array], folder, stage.outputs)
        planned.append((stage, tasks))
    if first.dry_run:
        for stage, tasks in planned:
            print(f"{stage.name}: {len(tasks)} jobs, sbatch {shlex.join(sbatch_flags(stage.args))}")
            for task in tasks[:3]:
                print("  " + "\n  ".join(task.describe()["commands"]))
        return 0

    folder.mkdir(parents=True, exist_ok=True)
    jobs: list[str] = []
    record = []
    try:
        for stage, tasks in planned:
            after = jobs[-1:] or stage.args.after
            jobs.append(submit(stage.args, tasks, folder, stage.name, after))
            record.append({"name": stage.name, "job": jobs[-1], "elements": [task.describe() for task in tasks]})
            size = f", {len(tasks)} elements, {stage.args.array_parallelism} at once" if len(tasks) > 1 else ""
            waits = f", after {' '.join(after)}" if after else ""
            print(f"launch: {stage.name}: job {jobs[-1]}{size}, {resources(stage.args)}{waits}", flush=True)
    except BaseException:
        if jobs:  # half a pipeline is of no use to anyone
            subprocess.run(["scancel", *jobs])
        raise
    write_json(folder / RECORD, {"cwd": str(Path.cwd()), "stages": record})
    first_log = log_file(folder, jobs[0] if len(record[0]["elements"]) == 1 else f"{jobs[0]}_0")
    print(f"launch: queue   squeue --jobs {','.join(jobs)}")
    print(f"launch: log     tail -F {shlex.quote(str(first_log))}")
    print(f"launch: wait    python -m utils.launch --watch {shlex.quote(str(folder))}")
    print(f"launch: cancel  scancel {' '.join(jobs)}", flush=True)
    if not first.wait:
        return 0
    try:
        return watch(folder)
    except KeyboardInterrupt:
        print("launch: no longer waiting; the jobs go on (see `wait` and `cancel` above)", file=sys.stderr)
        return 130


def resources(args: Namespace) -> str:
    """What a job of ARGS has on each node, for people."""
    gpus = f"{args.gpus_per_node} GPUs, " if args.gpus_per_node else ""
    memory = f", {args.mem_gb:g} GB" if args.mem_gb else ""
    nodes = f" on each of {args.nodes} nodes" if args.nodes > 1 else ""
    return f"{gpus}{args.cpus_per_task * args.processes} cores{memory}{nodes}, {args.timeout_min} min"


def tasks_of(stage: Stage, array_size: int = sys.maxsize) -> list[Task]:
    """The SLURM jobs (array elements, at most ARRAY_SIZE) of a command: chunks, or one DDP job, or one process.

    An element has a chunk a process, or as many for each as it takes to fit into the array. Without --chunks there is
    one job with a chunk a process, as on this machine.
    """
    count, at_once = stage.args.chunks or stage.args.processes, stage.args.processes
    if stage.mode == "chunks" and count > 1:
        size = at_once * math.ceil(count / at_once / array_size)
        groups = [tuple(range(start, min(start + size, count))) for start in range(0, count, size)]
        return [Task(stage.command, at_once, chunks=group, of=count) for group in groups]
    return [Task(stage.command, at_once, ranks=stage.mode == "ranks")]


def sbatch_options(args: Namespace) -> dict[str, Any]:
    """The options of sbatch, as it spells them, that ARGS ask for. One SLURM task a node starts the processes."""
    wanted = {
        **{key: getattr(args, key) for key in ("partition", "account", "qos", "constraint", "exclude", "nodes")},
        "ntasks-per-node": 1,
        "time": args.timeout_min,
        "gpus-per-node": args.gpus_per_node or None,
        "cpus-per-task": args.cpus_per_task * args.processes,
        "mem": f"{int(args.mem_gb * 1024)}M" if args.mem_gb else None,
        **dict(args.sbatch),
    }
    return {key: value for key, value in wanted.items() if value is not None}


def sbatch_flags(args: Namespace) -> list[str]:
    """The same as words of a command line."""
    return [f"--{key}={value}" for key, value in sbatch_options(args).items()]


def submit(args: Namespace, tasks: Sequence[Task], folder: Path, name: str, after: Sequence[str]) -> str:
    """Queue TASKS, as an array if there are several, and return the job's id."""
    python, srun_args = in_container(args, folder)
    executor = submitit.SlurmExecutor(folder, max_num_timeout=args.max_requeues, python=python)
    options = {**sbatch_options(args), "requeue": True, "kill-on-invalid-dep": "yes"}
    if after:
        options["dependency"] = "afterok:" + ":".join(after)
    # Datasets and checkpoints record the digest, where the image is named by it.
    _, _, digest = (args.container_image or args.apptainer or "").partition("@sha256:")
    setup = [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    setup += [f"export IMAGE_DIGEST={shlex.quote('sha256:' + digest)}"] if digest else []
    if args.setup:  # which may hold a token: the batch script can be read by everyone, this file by the user alone
        handle, own_lines = tempfile.mkstemp(prefix="setup-", suffix=".sh", dir=folder)
        with open(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in args.setup)
        setup += [f"source {shlex.quote(own_lines)}"]
    marker = shlex.quote(str(folder)) + '/"$SLURM_JOB_ID".requeue'
    executor.update_parameters(
        nodes=args.nodes,
        time=args.timeout_min,
        job_name=name,
        array_parallelism=args.array_parallelism,
        signal_delay_s=args.signal_delay_s,
        stderr_to_stdout=True,
        setup=setup,
        # srun does not take over sbatch's number of cores (SLURM 22.05 to 23.02 do not hand it on). A rank that fails
        # ends the others at once, not after the process group's time-out.
        srun_args=[f"--cpus-per-task={options['cpus-per-task']}", "--kill-on-bad-exit=1", *srun_args],
        teardown=[
            "code=$?",
            f'if [ -e {marker} ]; then rm {marker}; scontrol requeue "$SLURM_JOB_ID"; fi',
            "exit $code",
        ],
        additional_parameters=options,
    )
    try:
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused {name}: {last_line(str(error))}") from None
    return str(jobs[0].job_id).split("_")[0]


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
