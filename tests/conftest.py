"""Fixtures that several test files share."""

from __future__ import annotations

import os

# Tests share few cores and start many processes: one thread each keeps them fast and their timing calm.
# Set before torch is imported anywhere; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in the suite may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list) -> None:
    """SLURM's tests first: they mostly wait, beside the others' work, and would do it alone in the end."""
    items.sort(key=lambda item: "launch/slurm" not in item.nodeid)
