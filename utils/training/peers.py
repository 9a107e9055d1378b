"""The ranks of a job tell each other when one has failed: NCCL would wait for it until a time-out.

Each rank keeps a connection to rank 0, which passes the first failure on. The kernel closes that of a killed process:
its end is news too. A rank that hears of a failure ends with one line that names the rank: by itself where its
collective breaks (gloo), else through the thread that listens here. Without a connection nobody hears anything.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
from pathlib import Path
from typing import TextIO

from utils.cli import UserError

NEWS_S = 5  # seconds: for the news to follow the collective that broke, and for a rank to end by itself
CONNECT_S = 30
LONGEST = 1000  # characters of a message
EXIT_CODE = 2  # of a process that ends because another one has failed


class Peers:
    """The other ranks of a job of SIZE processes. Each rank makes one at the same time, when its group is there.

    ADDRESS: where rank 0 runs, as in MASTER_ADDR.
    """

    def __init__(self, rank: int, size: int, address: str) -> None:
        from torch.distributed import broadcast_object_list

        self._rank = rank
        self._first: tuple[int, str] | None = None  # the rank that has failed first, and how
        self._lock, self._heard, self._left = threading.Lock(), threading.Event(), threading.Event()
        self._connections: dict[int, socket.socket] = {}  # of rank 0: to all others; of these: to rank 0
        self._readers: dict[int, TextIO] = {}  # one each: it may hold more than the line that was asked for
        box: list = [None]
        if rank == 0:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            server = socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=both)
            box = [(server.getsockname()[1], secrets.token_hex(16))]
        broadcast_object_list(box)
        port, token = box[0]
        with contextlib.suppress(OSError):
            if rank == 0:
                self._welcome(server, token, size - 1)
            else:
                connection = socket.create_connection((address, port), CONNECT_S)
                connection.settimeout(None)
                connection.sendall(f"{token} {rank}\n".encode())
                self._connections[0], self._readers[0] = connection, connection.makefile(errors="replace")
        os.register_at_fork(after_in_child=self._let_go)
        for other, reader in self._readers.items():
            threading.Thread(target=self._listen, args=(other, reader), daemon=True).start()

    def _welcome(self, server: socket.socket, token: str, count: int) -> None:
        """Accept COUNT connections that know the TOKEN; they come at once."""
        server.settimeout(CONNECT_S)
        with server:
            while len(self._connections) < count:
                connection, _ = server.accept()
                connection.settimeout(10)
                reader = connection.makefile(errors="replace")
                said, _, rank = _line(reader).partition(" ")
                if secrets.compare_digest(said.encode(), token.encode()):
                    connection.settimeout(None)
                    self._connections[int(rank)], self._readers[int(rank)] = connection, reader

    def failed(self, error: BaseException) -> None:
        """This rank ends with ERROR: UserError that names another rank if that broke a collective, else told to all."""
        if isinstance(error, RuntimeError) and self._heard.wait(NEWS_S):
            raise UserError(self._said()) from None
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self._tell(self._rank, f"has failed: {text}")

    def leave(self) -> None:
        """This rank is done with the others."""
        self._left.set()
        self._send("left")

    def _said(self) -> str:
        assert self._first
        rank, how = self._first
        return f"rank {rank} {how} (all processes of this job end with it)"

    def _tell(self, rank: int, how: str) -> bool:
        """Pass the news on that RANK has failed; whether it is the first."""
        with self._lock:
            if self._first is not None:
                return False
            self._first = rank, how
        if self._rank in (0, rank):
            self._send(f"{rank} {how}")
        return True

    def _send(self, text: str) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{text[:LONGEST]}\n".encode(errors="replace"))

    def _listen(self, other: int, reader: TextIO) -> None:
        said = _line(reader)
        if said == "left":
            return
        rank, _, how = said.partition(" ")
        news = (int(rank), how) if said else (other, "is gone: killed, out of memory, or its machine is lost")
        if news[0] == self._rank or not self._tell(*news):
            return
        self._heard.set()
        if not self._left.wait(NEWS_S):  # it waits in a collective that knows nothing of this
            print(f"{Path(sys.argv[0]).name}: error: {ascii(self._said())[1:-1]}", file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)

    def _let_go(self) -> None:
        """In a forked process, such as a loader's: it would hold the connection open after this one's end."""
        for connection in self._connections.values():
            os.close(connection.detach())
        self._connections = {}


def _line(reader: TextIO) -> str:
    """The next line from there; "" once the other side has gone."""
    try:
        return reader.readline(2 * LONGEST).strip()
    except OSError:
        return ""
