"""What SLURM would refuse late, or accept and lose, is refused here before anything is queued: one line, one remedy."""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from utils.cli import UserError

LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def check_cluster(args: Namespace, flags: Sequence[str], folder: Path, outputs: Sequence[Path]) -> None:
    """ARGS: the launcher's options, FLAGS: the same as sbatch's, FOLDER: for logs, OUTPUTS: where the script writes."""
    for program in ("sbatch", "srun", "squeue", "sinfo", "scontrol"):
        if shutil.which(program) is None:
            raise UserError(f"--launcher slurm: no `{program}` on PATH; run on a login node, or use --launcher local")
    partitions = ask("sinfo", "--noheader", "--format=%R").split()
    if args.partition and (unknown := sorted(set(args.partition.split(",")) - set(partitions))):
        known = ", ".join(sorted(set(partitions)))
        raise UserError(f"--partition {', '.join(unknown)}: unknown; this cluster has {known}")
    check_time_limit(args)
    nodes = [
        fields(line) for line in ask("scontrol", "--oneliner", "show", "nodes").splitlines() if "NodeName=" in line
    ]
    if not all(node["NodeHostName"] == socket.gethostname() for node in nodes):
        for option, path in [("--log-dir", folder), *(("--out", output) for output in outputs)]:
            require_shared(option, path)
    if args.nodes > 1:
        wanted = set((args.partition or "").split(",")) - {""}
        for node in nodes:
            names = (node["NodeName"], node.get("NodeAddr", ""))
            if (not wanted or wanted & set(node.get("Partitions", "").split(","))) and not any(map(resolves, names)):
                raise UserError(
                    f"--nodes {args.nodes}: node {names[0]} (address {names[1]}) does not resolve here, so it cannot "
                    f"be the master address; mend DNS or /etc/hosts, or leave it out with --exclude {names[0]}"
                )
    check_image("--container-image", args.container_image)
    check_image("--apptainer", args.apptainer)
    refused = subprocess.run(["sbatch", "--test-only", *flags, "--wrap", "true"], capture_output=True, text=True)
    if refused.returncode:
        raise UserError(f"sbatch refuses these options: {last_line(refused.stderr)} ({shlex.join(flags)})")


def check_time_limit(args: Namespace) -> None:
    """sbatch accepts a job longer than its partition allows, and it waits for ever (reason PartitionTimeLimit)."""
    wanted = set((args.partition or "").split(",")) - {""}
    for line in ask("sinfo", "--noheader", "--format=%R %P %l").splitlines():
        name, shown, limit = line.split()
        # `%P` marks the default partition with a star.
        if (name in wanted or (not wanted and shown.endswith("*"))) and args.timeout_min > minutes(limit):
            raise UserError(
                f"--timeout-min {args.timeout_min}: partition {name} allows {minutes(limit):.0f} at most; "
                "give less (a job that reaches its limit saves and is requeued) or another --partition"
            )


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


def require_shared(option: str, path: Path) -> None:
    """Every node has a /tmp of its own: a job there finds nothing, and what it writes is lost."""
    resolved = path.resolve()
    if any(resolved.is_relative_to(folder) for folder in LOCAL_FOLDERS):
        raise UserError(f"{option} {path}: each node has its own /{resolved.parts[1]}; choose a folder that all share")


def check_image(option: str, image: str | None) -> None:
    """An image given as a file must be there; names of a registry (docker://..., user/name:tag) the runtime finds."""
    if image is None or "://" in image:
        return
    is_file = image.startswith(("/", ".")) or image.endswith((".sif", ".sqsh"))
    if is_file and not Path(image).exists():
        raise UserError(f"{option} {image}: no such file; docs/cluster.md shows how to make it from the Dockerfile")


def ask(*command: str) -> str:
    """The output of one of SLURM's programs; its refusal is a UserError."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(
            f"`{shlex.join(command)}` failed: {last_line(result.stderr)}; is the cluster up, seen from here?"
        )
    return result.stdout


def last_line(text: str) -> str:
    return ([line for line in text.strip().splitlines() if line] or ["no message"])[-1]


def resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True
