"""What SLURM would refuse late, or accept and lose, is refused here before anything is queued: one line, one remedy."""

import re
import shlex
import shutil
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from utils.cli import UserError

LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
DEFAULT_MIN = 240  # of a job in a partition without a time limit
UNSET_MB = 1024  # below it a node's RealMemory was never configured


def ask_cluster(partition: str | None) -> tuple[dict[str, float], list[dict[str, str]], int]:
    """({partition: its limit in minutes}, [facts of its nodes], most elements of an array), of several with commas."""
    for program in ("sbatch", "srun", "squeue", "sinfo", "scontrol"):
        if shutil.which(program) is None:
            raise UserError(f"--launcher slurm: no `{program}` on PATH; run on a login node, or use --launcher local")
    rows = [line.split() for line in ask("sinfo", "--noheader", "--format=%R %P %l").splitlines()]
    default = {name for name, shown, _ in rows if shown.endswith("*")}
    limits = {name: minutes(limit) for name, _, limit in rows}
    wanted = set(partition.split(",")) if partition else default
    if unknown := sorted(wanted - set(limits)):
        known = ", ".join(sorted(limits))
        raise UserError(f"--partition {', '.join(unknown)}: unknown; this cluster has {known}")
    lines = ask("scontrol", "--oneliner", "show", "nodes").splitlines()
    nodes = [fields(line) for line in lines if "NodeName=" in line]
    nodes = [node for node in nodes if not wanted or wanted & set(node.get("Partitions", "").split(","))]
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.M)
    return {name: limits[name] for name in sorted(wanted)}, nodes, int(size[1]) if size else sys.maxsize


def fill_in(args: Namespace, limits_min: dict[str, float], nodes: Sequence[dict[str, str]]) -> None:
    """Set the time limit, cores and memory that ARGS leave open: the partition's own limit, a GPU's share of a node.

    SLURM's own default is one core for all processes of a node with their loaders. Nodes may differ: the smallest share
    counts. A process without a GPU gets one core, and as much memory as SLURM gives by itself.
    """
    if args.timeout_min is None:
        shortest = min(limits_min.values(), default=float("inf"))
        args.timeout_min = DEFAULT_MIN if shortest == float("inf") else max(1, int(shortest))
    for name, limit in limits_min.items():
        if args.timeout_min > limit:  # sbatch accepts it, and the job waits for ever (reason PartitionTimeLimit)
            less = "give less (a job that reaches its limit saves and is requeued) or another --partition"
            raise UserError(f"--timeout-min {args.timeout_min}: partition {name} allows {limit:.0f} at most; {less}")
    shares = []
    for node in nodes:
        # "gpu:a100:4(S:0-1),shard:8"
        gpus = sum(map(int, re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", node.get("Gres", ""))))
        if 0 < args.gpus_per_node <= gpus:
            cores = int(node.get("CPUEfctv", node.get("CPUTot", 1)))  # less those that SLURM keeps for itself
            memory_mb = int(node.get("RealMemory", 0)) - int(node.get("MemSpecLimit", 0))
            shares.append([value * args.gpus_per_node // gpus for value in (cores, memory_mb)])
    cores, memory_mb = map(min, zip(*shares, strict=True)) if shares else (args.processes, 0)
    if args.cpus_per_task is None:
        args.cpus_per_task = max(1, cores // args.processes)
    own_memory = any(key.startswith("mem") for key, _ in args.sbatch)  # --mem-per-gpu and the like exclude --mem
    if args.mem_gb is None and not own_memory and memory_mb > UNSET_MB:
        args.mem_gb = memory_mb // 1024


def check_cluster(
    args: Namespace, nodes: Sequence[dict[str, str]], flags: Sequence[str], folders: dict[str, Path]
) -> None:
    """ARGS: the launcher's options, FLAGS: the same as sbatch's, FOLDERS: option -> a folder that it names."""
    if args.signal_delay_s >= args.timeout_min * 60:
        when = f"a job lasts {args.timeout_min} min (--timeout-min), so it would be stopped at its start"
        raise UserError(f"--signal-delay-s {args.signal_delay_s}: {when}; give less")
    elsewhere = any(node["NodeHostName"] != socket.gethostname() for node in nodes)
    for option, path in folders.items():
        resolved = path.resolve()  # a job finds nothing in a /tmp of its node's own, and what it writes there is lost
        if elsewhere and any(resolved.is_relative_to(folder) for folder in LOCAL_FOLDERS):
            its = f"each node has its own /{resolved.parts[1]}"
            raise UserError(f"{option} {path}: {its}; choose a folder that all share")
    for node in nodes if args.nodes > 1 else ():
        names = (node["NodeName"], node.get("NodeAddr", ""))
        if not any(map(resolves, names)):
            fault = f"node {names[0]} (address {names[1]}) does not resolve here, so it cannot be the master address"
            remedy = f"mend DNS or /etc/hosts, or leave it out with --exclude {names[0]}"
            raise UserError(f"--nodes {args.nodes}: {fault}; {remedy}")
    for option, image in (("--container-image", args.container_image), ("--apptainer", args.apptainer)):
        # Names of a registry (docker://..., user/name:tag) are left to the runtime.
        is_file = image and "://" not in image and (image[0] in "/." or image.endswith((".sif", ".sqsh")))
        if is_file and not Path(image).exists():
            raise UserError(f"{option} {image}: no such file; docs/cluster.md shows how to make it from the Dockerfile")
    for job in args.after:
        if not re.fullmatch("[0-9]+(_[0-9]+)?", job) or not show_job(job):
            known = "SLURM knows no such job, and forgets those that ended minutes ago"
            raise UserError(f"--after {job}: {known}; leave it out if that one has succeeded")
    refused = subprocess.run(["sbatch", "--test-only", *flags, "--wrap", "true"], capture_output=True, text=True)
    if refused.returncode:
        message = last_line(refused.stderr)
        # MaxSubmitJobs of the user, the account or the quality of service: an array counts with all its elements.
        fewer = "; give fewer --chunks, or more --processes a node" if "submit limit" in message else ""
        raise UserError(f"sbatch refuses these options: {message}{fewer} ({shlex.join(flags)})")


def minutes(limit: str) -> float:
    """SLURM's "[days-]hours:minutes:seconds", "minutes:seconds" or "infinite" in minutes."""
    if not limit[0].isdigit():
        return float("inf")
    days, _, clock = limit.rpartition("-")
    hours, minute, second = ["0", *clock.split(":")][-3:]
    return int(days or 0) * 1440 + int(hours) * 60 + int(minute) + int(second) / 60


def fields(line: str) -> dict[str, str]:
    """The NAME=VALUE words of a line of `scontrol --oneliner show`."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def show_job(job: str) -> dict[str, str]:
    """What SLURM remembers of JOB, for minutes after its end; {} where it cannot be asked, or knows none."""
    command = ["scontrol", "--oneliner", "show", "job", job]
    try:
        return fields(subprocess.run(command, capture_output=True, text=True, timeout=10).stdout)
    except (OSError, subprocess.TimeoutExpired):
        return {}


def ask(*command: str) -> str:
    """The output of one of SLURM's programs; its refusal is a UserError."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = last_line(result.stderr)
        raise UserError(f"`{shlex.join(command)}` failed: {said}; is the cluster up, seen from here?")
    return result.stdout


def last_line(text: str) -> str:
    """The last line of a program's complaint that says something."""
    return ([line for line in text.strip().splitlines() if line] or ["no message"])[-1]


def resolves(name: str) -> bool:
    """Whether this machine finds an address for NAME."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True
