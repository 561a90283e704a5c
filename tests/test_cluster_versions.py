"""A scheduler or worker of others with other versions is refused in one line."""

import pytest
from distributed import Client, LocalCluster

from stem_dask.cluster.connect import connect, connection_of
from stem_dask.core.errors import ConfigError
from stem_dask.engine.clients import refuse_other_versions
from stem_dask.engine.submit import in_flight


@pytest.fixture
def others():
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("package", "version", "message"),
    [
        ("python", "3.11.99.final.0", None),
        ("python", "3.10.2.final.0", r"python 3\.10, not 3\.\d+"),
        ("dask", "2020.1.0", r"dask 2020\.1\.0, not 20"),
        ("numpy", "1.2.3", r"numpy 1\.2, not \d"),
        ("stem_dask", "0.0.9", r"stem_dask 0\.0\.9, not 0\.1\.0"),
        ("stem_dask", None, r"stem_dask missing, not"),
        ("tornado", "1.0", None),
    ],
)
def test_versions_that_matter(others, monkeypatch, package, version, message):
    with Client(others) as client:
        found = client.get_versions(packages=["stem_dask"])
        found["client"]["packages"]["python"] = "3.11.2.final.0"
        for place in (found["scheduler"], *found["workers"].values()):
            place["packages"] = {**found["client"]["packages"], package: version}
        monkeypatch.setattr(Client, "get_versions", lambda self, packages: found)
        if message is None:
            refuse_other_versions(client)
            return
        with pytest.raises(ConfigError, match=f"the scheduler has {message}.*install the same"):
            connect(address=others.scheduler_address)
        found["scheduler"] = found["client"]
        with pytest.raises(ConfigError, match=f"worker inproc://.* has {message}"):
            connection_of(client)
        with pytest.raises(
            ConfigError, match=f"has {message}"
        ):  # and not the error that came of it
            list(in_flight(client, [(int, ("x",))]))


def test_a_client_of_others_is_taken_and_stays_open(others):
    with Client(others) as client:
        connection = connection_of(client)
        assert connection.client is client
        assert (connection.n_workers, connection.n_threads) == (1, 1)
        assert connection.kind == f"client at {client.scheduler.address}"
        assert client.submit(int, "7").result() == 7


def test_a_scheduler_without_workers(monkeypatch):
    monkeypatch.setattr("stem_dask.cluster.connect.WORKERS_SECONDS", 0.1)
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as empty,
        Client(empty) as client,
        pytest.raises(ConfigError, match=r"has no worker after 0\.1 s; start some"),
    ):
        connection_of(client)
