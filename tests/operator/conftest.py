"""Fixtures of the tests against a real API server; see apiserver.py."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.operator.apiserver import ApiServer, Namespace, running
from tests.operator.processes import FakeKubelet, OperatorProcess


@pytest.fixture(scope="session")
def apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    folder: Path = tmp_path_factory.mktemp("apiserver")
    with running(folder) as api:
        yield api


@pytest.fixture
def namespace(apiserver: ApiServer, request: pytest.FixtureRequest) -> Namespace:
    name = request.node.name.removeprefix("test_").replace("_", "-").split("[")[0][:40].strip("-")
    return Namespace(apiserver, name)


@pytest.fixture
def start(namespace: Namespace) -> Iterator[Callable[[str], OperatorProcess]]:
    """Starts operators of the test's namespace; they end with the test."""
    processes: list[OperatorProcess] = []

    def start(user: str) -> OperatorProcess:
        processes.append(OperatorProcess(namespace, user))
        return processes[-1]

    yield start
    for process in processes:
        process.stop()


@pytest.fixture
def operator(start: Callable[[str], OperatorProcess]) -> OperatorProcess:
    """One operator that leads."""
    process = start("operator-a")
    process.wait_leads()
    return process


@pytest.fixture
def kubelet(namespace: Namespace) -> Iterator[FakeKubelet]:
    fake = FakeKubelet(namespace)
    yield fake
    fake.close()
