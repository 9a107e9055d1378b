"""The launcher's way to SLURM: commands become jobs, submitit queues them, and a `Task` runs inside each.

submitit writes the batch script, pickles the Task and restarts it. The Task runs the script's own command in processes
of its node. Progress lives in the script's output folder only, so a restart is the same command again, whoever asks for
it: a time-out (submitit's USR2, then `scontrol requeue`), a preemption or a lost node (SLURM's own requeue).
"""

import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import JobEnvironment, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import Checkpointable

from utils.cli import UserError
from utils.launch.checks import ask_cluster, check_cluster, fill_in, last_line, resolves, show_job
from utils.launch.command import Stage
from utils.launch.processes import Team, make_team, visible_gpus
from utils.launch.watch import RECORD, log_file, watch
from utils.machine import ROOT
from utils.storage import write_json

IMAGE_PYTHON = "/opt/venv/bin/python"  # where the Dockerfile puts it
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
        team.run()
        if team.stopped_by is not None and team.failed():
            if team.stopped_by == signal.SIGUSR2:
                _requeue(requeue, node)
            print(f"launch: stopped by {signal.Signals(team.stopped_by).name}", flush=True)
            if team.stopped_by == signal.SIGTERM and in_preemption_grace():
                _await_the_end()
            sys.exit(128 + team.stopped_by)  # SLURM itself requeues what it preempts, and leaves what it cancels
        code = team.report()
        try:
            write_json(exit_file, {"code": code, "failed": [process.label for process in team.failed()]})
        except OSError as error:  # the work is done or lost whatever the log folder's disk says; SLURM keeps the code
            print(f"launch: cannot write {exit_file} ({error.strerror}); the exit code is {code}", flush=True)
        sys.exit(code)  # no result for submitit to write, no traceback: the log ends with the script's own words

    def _team(self, node: int, nodes: int) -> Team:
        # Not asking nvidia-smi, which may show GPUs of other jobs.
        gpus = visible_gpus() if "CUDA_VISIBLE_DEVICES" in os.environ else []
        several = self.ranks and nodes * self.processes > 1
        ranks = (node, nodes, master_address(), master_port()) if several else None
        command = (sys.executable, "-u", *self.command)
        return make_team(command, self.processes, self.chunks or (), self.of, gpus, ranks)

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
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the grace period is a time limit too, at which submitit requeues
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    print("launch: saved; waiting for SLURM to requeue this job", flush=True)
    time.sleep(LONGEST_GRACE_S)


def in_preemption_grace() -> bool:
    """Whether this job is being preempted but has not ended; one that SLURM ends at once or cancels is not running."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    job = show_job(JobEnvironment().job_id)
    # Where SLURM cannot be asked (in a container) a cancelled job stays for the KillWait.
    return not job or (job.get("JobState") == "RUNNING" and job.get("PreemptTime") != "None")


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


# ===== submitting =====


def run_on_slurm(stages: Sequence[Stage]) -> int:
    """Check and queue STAGES, each after the one before; with --wait stay until they end. The exit code."""
    first = stages[0].args
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = (first.log_dir or Path("runs/launch") / f"{stamp}-{stages[0].name}").resolve()
    if set("%\\") & set(str(folder)) or not str(folder).isprintable():
        raise UserError(f"--log-dir {str(folder)!r}: SLURM reads % and \\ in it as patterns; choose plain characters")
    planned = []
    for stage in stages:
        limits_min, nodes, array_size = ask_cluster(stage.args.partition)
        fill_in(stage.args, limits_min, nodes)
        tasks = tasks_of(stage, array_size)
        flags = [f"--{key}={value}" for key, value in sbatch_options(stage.args).items()]
        array = [f"--array=0-{len(tasks) - 1}"] if len(tasks) > 1 else []
        check_cluster(stage.args, nodes, flags + array, {"--log-dir": folder, "--out": Path(stage.out or "runs")})
        planned.append((stage, tasks, shlex.join(flags)))
        if first.dry_run:
            first_commands = [command for task in tasks[:3] for command in task.describe()["commands"]]
            print(f"{stage.name}: {len(tasks)} jobs, sbatch {planned[-1][-1]}", *first_commands, sep="\n  ")
    if first.dry_run:
        return 0

    folder.mkdir(parents=True, exist_ok=True)
    jobs: list[str] = []
    record = []
    try:
        for stage, tasks, options in planned:
            after = jobs[-1:] if stage.after is None else [jobs[number] for number in stage.after]
            after = after or stage.args.after
            jobs.append(submit(stage.args, tasks, folder, stage.name, after))
            record.append({"name": stage.name, "job": jobs[-1], "elements": [task.describe() for task in tasks]})
            size = f", {len(tasks)} elements, {stage.args.array_parallelism} at once" if len(tasks) > 1 else ""
            waits = f", after {' '.join(after)}" if after else ""
            print(f"launch: {stage.name}: job {jobs[-1]}{size}{waits} ({options})", flush=True)
        write_json(folder / RECORD, {"cwd": str(Path.cwd()), "stages": record})
    except BaseException:
        if jobs:  # half a pipeline, or one that nobody can watch, is of no use to anyone
            subprocess.run(["scancel", *jobs])
        raise
    log = log_file(folder, jobs[0] if len(planned[0][1]) == 1 else f"{jobs[0]}_0")
    print(f"launch: queue   squeue --jobs {','.join(jobs)}")
    print(f"launch: log     tail -F {shlex.quote(str(log))}")
    print(f"launch: wait    python -m utils.launch --watch {shlex.quote(str(folder))}")
    print(f"launch: cancel  scancel {' '.join(jobs)}", flush=True)
    try:
        return watch(folder) if first.wait else 0
    except KeyboardInterrupt:
        print("launch: no longer waiting; the jobs go on (see `wait` and `cancel` above)", file=sys.stderr)
        return 130


def tasks_of(stage: Stage, array_size: int = sys.maxsize) -> list[Task]:
    """The SLURM jobs (array elements, at most ARRAY_SIZE) of a command: chunks, or one DDP job, or one process.

    An element has a chunk a process, or as many for each as it takes to fit into the array. Without --chunks there is
    one job with a chunk a process, as on this machine.
    """
    if stage.each:
        return [Task(command) for command in stage.each]
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


def submit(args: Namespace, tasks: Sequence[Task], folder: Path, name: str, after: Sequence[str]) -> str:
    """Queue TASKS, as an array if there are several, and return the job's id."""
    python, srun_args = in_container(args, folder)
    options = {"requeue": True, "kill-on-invalid-dep": "yes", **sbatch_options(args)}
    if after:
        options["dependency"] = "afterok:" + ":".join(after)
    setup = [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    # Datasets and checkpoints record the digest, where the image is named by it.
    _, _, digest = (args.container_image or args.apptainer or "").partition("@sha256:")
    setup += [f"export IMAGE_DIGEST={shlex.quote('sha256:' + digest)}"] if digest else []
    if args.setup:  # which may hold a token: the batch script can be read by everyone, this file by the user alone
        handle, own_lines = tempfile.mkstemp(prefix="setup-", suffix=".sh", dir=folder)
        with open(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in args.setup)
        setup += [f"source {shlex.quote(own_lines)}"]
    marker = shlex.quote(str(folder)) + '/"$SLURM_JOB_ID".requeue'
    requeue = f'if [ -e {marker} ]; then rm {marker}; scontrol requeue "$SLURM_JOB_ID"; fi'
    executor = SlurmExecutor(folder, max_num_timeout=args.max_requeues, python=python)
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
        teardown=["code=$?", requeue, "exit $code"],
        additional_parameters=options,
    )
    try:
        with executor.batch():
            jobs = [executor.submit(task) for task in tasks]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused {name}: {last_line(str(error))}") from None
    except OSError as error:  # of submitit's files, whose names it does not tell
        error.filename = error.filename or str(folder)
        raise
    return str(jobs[0].job_id).split("_")[0]


def in_container(args: Namespace, folder: Path) -> tuple[str | None, list[str]]:
    """(the command that is Python in the job, further arguments of srun) for pyxis, Apptainer or neither."""
    here = str(Path.cwd())
    mounts = [f"{path}:{path}" for path in dict.fromkeys((str(ROOT), here, str(folder)))] + args.container_mounts
    if args.container_image:
        image = [f"--container-image={args.container_image}", f"--container-mounts={','.join(mounts)}"]
        return IMAGE_PYTHON, [*image, f"--container-workdir={here}"]
    if args.apptainer:
        nvidia = ["--nv"] if args.gpus_per_node else []
        binds = [part for mount in mounts for part in ("--bind", mount)]
        return shlex.join(["apptainer", "exec", *nvidia, *binds, "--pwd", here, args.apptainer, IMAGE_PYTHON]), []
    return None, []
