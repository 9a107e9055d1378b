"""Several processes as one: ranks from the environment, the process group, and the few collectives the scripts need.

The only contract is torchrun's variables: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
torchrun, `python -m utils.launch` and a shell all set the same; without them there is one process, and no set-up.
Importing this module does not import torch: ranks are known before it is loaded.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import UserError
from utils.training.peers import Peers

if TYPE_CHECKING:
    import torch

# A peer that died is noticed after this long at the latest. Rank 0 may decode a validation set alone for minutes.
TIMEOUT = timedelta(minutes=30)  # not in paper: our choice


@dataclass(frozen=True)
class Ranks:
    """Who this process is: RANK of WORLD_SIZE in the job, LOCAL_RANK of LOCAL_WORLD_SIZE on its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether it is the one that prints, writes checkpoints and logs."""
        return self.rank == 0


def ranks() -> Ranks:
    """Read the launcher's variables; half a set of them, or ranks that cannot be, is a UserError."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Ranks()
    texts = {"LOCAL_WORLD_SIZE": "1"} | os.environ
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if not (text := texts.get(name, "")).isdigit():
            state = f"{text!r}" if text else "not set"
            remedy = "start several processes with `torchrun` or `python -m utils.launch`, or unset RANK and WORLD_SIZE"
            raise UserError(f"{name} is {state} but others of its kind are; {remedy} for a single one")
        values[name.lower()] = int(text)
    found = Ranks(**values)
    size = found.world_size
    if found.rank >= size or found.local_rank >= size:
        given = f"RANK={found.rank} LOCAL_RANK={found.local_rank}"
        raise UserError(f"{given} do not fit WORLD_SIZE={size}; they begin at 0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and not os.environ.get(name):
            raise UserError(f"{name} is not set with WORLD_SIZE={size}; torchrun and utils.launch do")
    return found


def take_own_cores() -> None:
    """Bind this process, if it is one of several ranks on a node, to its own share of the cores that it may use.

    Ranks then do not push each other and each other's loaders around. The shares are whole physical cores side by side,
    in the order of local ranks. Where ranks outnumber the cores they stay as they are. Call this once, before torch is
    imported: it counts the cores for its threads.
    """
    found = ranks()
    if found.local_world_size == 1 or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0), key=_place)
    share = len(cores) // found.local_world_size
    if share:
        os.sched_setaffinity(0, cores[found.local_rank * share : (found.local_rank + 1) * share])


def _place(cpu: int) -> tuple[int, int, int]:
    """Sorts hyperthreads of one core together, and cores of one socket."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text()), cpu
    except (OSError, ValueError):
        return 0, cpu, cpu


def print0(*values: Any, **options: Any) -> None:
    """print(), by rank 0 only, flushed: logs of a job are read while it runs."""
    if ranks().is_main:
        print(*values, **{"flush": True, **options})


def device_name(requested: str) -> str:
    """This process's device: with several processes, `auto` and `cuda` become its own GPU, cuda:LOCAL_RANK."""
    found = ranks()
    if found.world_size == 1 or requested not in ("auto", "cuda"):
        return requested  # without torch, which a dry run does not wait for
    import torch

    if torch.cuda.is_available():
        return f"cuda:{found.local_rank}"
    return "cpu" if requested == "auto" else requested


@contextmanager
def process_group(device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Join the job's process group (nccl on CUDA, gloo elsewhere), yield the ranks, leave it at the end.

    One process alone needs no group: nothing is set up. After an error the group is dropped without waiting for peers,
    and they hear of it: a collective that it breaks on them becomes a UserError that names this rank.
    """
    found = ranks()
    if found.world_size == 1:
        yield found
        return
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:  # the store would try a name that nobody knows again and again until its time-out
        socket.getaddrinfo(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except (OSError, ValueError) as error:
        where = f"MASTER_ADDR:MASTER_PORT {address} cannot be resolved on {socket.gethostname()} ({error})"
        raise UserError(f"{where}; give a host name or address that every node knows, and a port number") from None
    import torch
    import torch.distributed as dist

    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            rank=found.rank,
            world_size=found.world_size,
            timeout=timeout,
            device_id=device if on_cuda else None,
        )
    except (RuntimeError, ValueError) as error:  # DistNetworkError and DistStoreError are RuntimeErrors
        raise UserError(
            f"rank {found.rank} of {found.world_size} cannot join the others at MASTER_ADDR:MASTER_PORT {address} "
            f"({str(error).strip().splitlines()[0]}); check that rank 0 runs there and the port is free"
        ) from error
    peers = Peers(found.rank, found.world_size, os.environ["MASTER_ADDR"])
    try:
        yield found
    except BaseException as error:
        # What the error's frames hold, the DDP module above all, must be gone before its group: freed later, it waits
        # for ever for threads of the group that wait for Python.
        traceback.clear_frames(error.__traceback__)
        peers.failed(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        peers.leave()


def barrier() -> None:
    """Wait until every process of the group is here; nothing to wait for without a group."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def sum_counts(counts: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sum named counts over the processes (float64: exact up to 2^53). Every process passes the same names."""
    import torch
    import torch.distributed as dist

    names = sorted(counts)
    # MPS has no float64, and never has a process group: keep its numbers on the CPU.
    where = device if device.type == "cuda" else torch.device("cpu")
    totals = torch.tensor([counts[name] for name in names], dtype=torch.float64, device=where)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals, op=dist.ReduceOp.SUM)
    return dict(zip(names, totals.tolist(), strict=True))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether FLAG holds on any process: how all ranks stop at the same step when one receives a signal."""
    if ranks().world_size == 1:
        return flag  # no copy to a GPU and back
    return sum_counts({"flag": float(flag)}, device)["flag"] > 0
