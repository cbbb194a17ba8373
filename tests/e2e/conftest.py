"""One cluster and one installed chart for all end-to-end tests; a namespace for each of them."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "hack" / "testbed"), str(Path(__file__).parent)]

from start import started  # noqa: E402
from testbed import Json, Testbed  # noqa: E402

LOGS = ROOT / "build" / "e2e"
FAILED = pytest.StashKey[bool]()
AUDIT_START = pytest.StashKey[int]()


LAST = "test_rights.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
    # It judges what all the others made the operator do. A stable sort keeps every other order.
    items.sort(key=lambda item: item.path == Path(__file__).parent / LAST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


@pytest.fixture(scope="session")
def testbed(request: pytest.FixtureRequest) -> Iterator[Testbed]:
    """A running cluster with the chart; KEEP=1 leaves it for the next run."""
    with started(keep=os.environ.get("KEEP") == "1") as bed:
        request.config.stash[AUDIT_START] = bed.audit_position()
        bed.install()
        yield bed


@pytest.fixture
def namespace(testbed: Testbed, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own; after a failure its state is written below build/e2e."""
    name = f"e2e-{time.time_ns() // 1_000_000:x}"
    testbed.kubectl("create", "namespace", name)
    yield name
    if request.node.stash.get(FAILED, True):
        LOGS.mkdir(parents=True, exist_ok=True)
        log = LOGS / f"{request.node.name}.log"
        log.write_text(testbed.diagnosis(name))
        print(f"state of the cluster at the failure: {log}")
    testbed.kubectl("delete", "infd", "--all", "-n", name, "--wait=true", seconds=90)
    testbed.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def mi300x_nodes(testbed: Testbed) -> Iterator[list[str]]:
    """Two Node objects with AMD's labels and 8 amd.com/gpu each, kept alive by kwok."""
    if not testbed.is_local:
        pytest.skip("fake nodes are added to the local cluster only")
    names = testbed.add_fake_nodes(2)
    yield names
    testbed.remove_fake_nodes()


@pytest.fixture
def session_audit(testbed: Testbed, audit_log: Path, request: pytest.FixtureRequest) -> list[Json]:
    """The API server's audit log since this session's chart was installed."""
    return testbed.audit_events(request.config.stash[AUDIT_START])


@pytest.fixture
def audit_log(testbed: Testbed) -> Path:
    """The API server's audit log, which only the local cluster shows us."""
    if testbed.audit_log is None:
        pytest.skip("the audit log of a cluster of the user's is not ours to read")
    return testbed.audit_log
