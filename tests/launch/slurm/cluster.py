"""A real SLURM on this machine: munge, one controller, two nodes of four CPUs, two partitions, all under one folder.

Nothing of the machine's own SLURM or munge is used or changed: key, sockets, ports, state and configuration are the
cluster's own, the daemons are children of this process and are ended by their pids.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

NODES = ("n1", "n2")
# As many cores as this machine has, so that a step can be bound to those it asked for; a node needs two for the tests.
CORES = max(2, min(4, len(os.sched_getaffinity(0))))
GPUS = 2  # counted by SLURM; no device stands behind them
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing_programs() -> list[str]:
    return [name for name in NEEDED if shutil.which(name, path=SEARCH_PATH) is None]


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """`low`, `grace` and `high` are partitions over both nodes; a job of `high` preempts (requeues) those of the rest.

    Jobs of `grace` are told GraceTime seconds before they are ended.
    """

    def __init__(self) -> None:
        # Unix socket paths are limited to 107 characters: a short folder of its own.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.env.update(PATH=SEARCH_PATH, SLURM_CONF=str(self.folder / "slurm.conf"))
        self._seen_waiting: dict[str, float] = {}  # requeued job -> when it was first seen so
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    # ===== starting and ending =====

    def start(self) -> None:
        self._write_configuration()
        munge = self.folder / "munge"
        self._spawn(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket"),
            *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        self._await(lambda: (munge / "socket").exists(), "munged makes its socket")
        self._spawn("slurmctld", "slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        for node in NODES:
            self.start_node(node)
        self._await(lambda: self._states() == ["idle", "idle"], "both nodes are idle")

    def start_node(self, node: str) -> None:
        self._spawn(node, "slurmd", "-D", "-N", node, "-f", self.env["SLURM_CONF"])

    def kill_node(self, node: str) -> None:
        """A power cut: the node's daemon and everything that ran on it, gone at once.

        All are frozen before the first is killed: else a step's supervisor would live just long enough to report its
        processes' end, and the controller would see a job that failed instead of a node that was lost.
        """
        daemon = self.daemons.pop(node)
        lost: set[int] = set()
        while len(found := {daemon.pid, *self._pids_of(node)}) > len(lost):  # one may have forked meanwhile
            lost |= found
            for pid in lost:
                _signal(pid, signal.SIGSTOP)
        self.scontrol("update", f"NodeName={node}", "State=DOWN", "Reason=power")
        for pid in lost:
            _signal(pid, signal.SIGKILL)
        daemon.wait()

    def revive_node(self, node: str) -> None:
        self.start_node(node)
        self._await(lambda: "DOWN" in self.node_state(node) or "IDLE" in self.node_state(node), f"{node} answers")
        # It may have returned by itself meanwhile, and is then not to be resumed.
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        self._await(lambda: "IDLE" in self.node_state(node), f"{node} is back")

    def stop(self) -> None:
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        deadline = time.monotonic() + 10
        while (left := self._pids_here()) and time.monotonic() < deadline:  # slurmstepd and what it had started
            for pid in left:
                _signal(pid, signal.SIGKILL)
            time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ===== asking and telling =====

    def run(self, *command: str, check: bool = True, **options) -> str:
        result = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, **options)
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr}\n{self.logs()}")
        return result.stdout

    def scontrol(self, *arguments: str) -> str:
        return self.run("scontrol", *arguments)

    def jobs(self) -> dict[str, str]:
        """State of every job still known to the queue, array elements apart: {"7_0": "RUNNING"}."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").split("\n")
        return dict(line.split() for line in lines if line.strip())

    def node_state(self, node: str) -> str:
        return (
            self.run("sinfo", "--noheader", "--Node", "--nodes", node, "--partition=low", "--format=%T").strip().upper()
        )

    def start_requeued_now(self) -> None:
        """A requeued job waits about two minutes (reason BeginTime): let it go after three seconds.

        Not at once: the end of its first run, reported late, would be taken for the end of the second.
        """
        for line in self.run("squeue", "--noheader", "--array", "--format=%i %r").splitlines():
            job, _, reason = line.partition(" ")
            if reason == "BeginTime" and time.monotonic() > self._seen_waiting.setdefault(job, time.monotonic()) + 3:
                del self._seen_waiting[job]  # it may be requeued once more
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def cancel_all(self) -> None:
        jobs = sorted({job.split("_")[0] for job in self.jobs()})
        if jobs:
            self.run("scancel", *jobs, check=False)
        self._await(lambda: not self.jobs(), "the queue is empty", seconds=40)

    def logs(self) -> str:
        tails = [
            f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        ]
        return "\n".join(tails)

    # ===== parts =====

    def _write_configuration(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o700)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        controller, *nodes = free_ports(1 + len(NODES))
        user, host = getpass.getuser(), socket.gethostname()
        node_lines = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} RealMemory=8000 Gres=gpu:{GPUS} "
            f"CPUs={CORES} Boards=1 SocketsPerBoard=1 CoresPerSocket={CORES} ThreadsPerCore=1"
            for node, port in zip(NODES, nodes, strict=True)
        )
        for gpu in range(GPUS):
            (self.folder / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        (self.folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={munge}/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
TaskPluginParam=Cores
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={self.folder}/state
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdSpoolDir={self.folder}/spool.%n
SlurmdPidFile={self.folder}/slurmd.%n.pid
SlurmdLogFile={self.folder}/slurmd.%n.log
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,preempt_youngest_first
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout=30
MinJobAge=300
OverTimeLimit=0
{node_lines}
PartitionName=low Nodes={",".join(NODES)} Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=grace Nodes={",".join(NODES)} MaxTime=60 State=UP PriorityTier=1 GraceTime=10
PartitionName=high Nodes={",".join(NODES)} MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
""")

    def _spawn(self, name: str, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=SEARCH_PATH)
        with open(self.folder / f"{name}.out.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                [path or program, *arguments], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T", check=False).split()

    def _await(self, condition, what: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"{name} ended with {daemon.returncode} before {what}\n{self.logs()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {seconds} s in vain until {what}\n{self.logs()}")
            time.sleep(0.2)

    def _pids_here(self, also: str | None = None) -> list[int]:
        """Processes whose environment names this cluster (and ALSO): jobs, steps, never this process."""
        mine = f"SLURM_CONF={self.env['SLURM_CONF']}"
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                except OSError:  # it has ended, or is another user's
                    continue
                if mine in variables and (also is None or also in variables):
                    found.append(int(entry.name))
        return found

    def _pids_of(self, node: str) -> list[int]:
        """What runs on NODE for its jobs, with the slurmstepd above it (which has no variable to know it by)."""
        jobs = self._pids_here(f"SLURMD_NODENAME={node}")
        parents = {_parent(pid) for pid in jobs}
        return jobs + [pid for pid in self._pids_here() if pid in parents and _name(pid) == "slurmstepd"]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:  # it has ended
        return 0


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, number)
