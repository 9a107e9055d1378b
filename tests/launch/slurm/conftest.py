"""A running cluster for the tests of this folder, or a clear reason why there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.launch.slurm.cluster import NODES, Cluster, missing_programs


@pytest.fixture(scope="session")
def started_cluster() -> Iterator[Cluster]:
    if missing := missing_programs():
        reason = f"no {', '.join(missing)}; on Debian: apt install slurm-wlm munge"
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(started_cluster: Cluster) -> Iterator[Cluster]:
    yield started_cluster
    started_cluster.cancel_all()
    for node in NODES:
        if node not in started_cluster.daemons:  # a test has killed it
            started_cluster.revive_node(node)
