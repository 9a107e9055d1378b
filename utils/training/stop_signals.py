"""Leaving in order when a scheduler asks: SIGTERM (preemption), SIGUSR1/USR2 (time limit ahead), SIGINT (a person)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from utils.training.distributed import any_rank

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopRequested(BaseException):
    """Raised inside an interruptible block; not an Exception, so that no library's handler swallows it."""


class StopSignals:
    """Remembers the first stop signal. Inside `interruptible()` it is raised at once as StopRequested.

    Outside, where state is being changed or written, the caller calls `check` when it is done: a training step of
    minutes is left within seconds, and a half-made optimizer step never is. Several processes (not ALONE) are left at
    `check` only, all at the same one: a rank that leaves in mid-step breaks or blocks the others' collectives.
    """

    def __init__(self, alone: bool) -> None:
        self.received: int | None = None
        self._alone = alone
        self._interruptible = False

    def install(self) -> None:
        """From now on STOP_SIGNALS are remembered instead of ending the process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it: SIGTERM 143, SIGUSR1 138, SIGUSR2 140, SIGINT 130."""
        return 128 + (self.received or 0)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a signal may leave at any moment, by StopRequested; several processes stay in it."""
        self._interruptible = self._alone
        try:
            if self._alone and self.received is not None:
                raise StopRequested
            yield
        finally:
            self._interruptible = False

    def check(self, device: torch.device) -> None:
        """Raise StopRequested if any process of the job has received a signal; every process calls this."""
        if any_rank(self.received is not None, device):
            self.received = self.received or signal.SIGTERM  # told by another rank
            raise StopRequested

    def _handle(self, number: int, _frame: object) -> None:
        if self.received is None:
            self.received = number
            if self._interruptible:
                self._interruptible = False
                raise StopRequested
