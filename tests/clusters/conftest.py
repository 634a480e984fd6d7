from collections.abc import Iterator

import pytest
from pytest_django import DjangoDbBlocker

from project.postgres.launcher import scratch_server
from tests.clusters.throwaway import Cluster


@pytest.fixture(autouse=True)
def unblocked(django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    """These tests use no database of the project, so that none has to be flushed."""
    with django_db_blocker.unblock():
        yield


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with scratch_server() as server:
        yield Cluster(server)


@pytest.fixture(scope="session")
def other_cluster() -> Iterator[Cluster]:
    with scratch_server() as server:
        yield Cluster(server)


@pytest.fixture
def database(cluster: Cluster) -> Iterator[str]:
    """The alias of a new database in ``cluster``."""
    with cluster.database() as alias:
        yield alias
