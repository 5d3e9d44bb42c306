"""Hosts made of namespaces, once for all tests of this directory, which are skipped where that is not possible."""

from collections.abc import Iterator

import pytest

from tools.benchmarks.testbed import NetnsHosts, why_not


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetnsHosts]:
    """Two hosts of two slots on unshaped links; a test that changes a link restores it."""
    reason = why_not()
    if reason:
        pytest.skip(f"lab of hosts: {reason}")
    with NetnsHosts(tmp_path_factory.mktemp("lab"), hosts=2, slots=2) as hosts:
        yield hosts
