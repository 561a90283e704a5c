"""Scheduler and workers of others have the versions that this process has, or are refused."""

import pytest
from distributed import Client, LocalCluster

from stem_dask.cluster.connect import connect, connection_of
from stem_dask.core.errors import ConfigError
from stem_dask.engine.versions import differences

HERE = {
    "python": "3.11.2.final.0", "dask": "2026.7.1", "distributed": "2026.7.1", "numpy": "2.3.1",
    "stem_dask": "0.1.0", "tornado": "6.5",
}  # fmt: skip


def versions(worker):
    here = {"packages": HERE}
    return {"client": here, "scheduler": here, "workers": {"tcp://a:1": worker}}


@pytest.mark.parametrize(
    ("package", "version", "told"),
    [
        ("python", "3.11.9.final.0", None),
        ("python", "3.12.2.final.0", "python 3.12, here is 3.11"),
        ("dask", "2026.7.0", "dask 2026.7.0, here is 2026.7.1"),
        ("distributed", "2026.7.0", "distributed 2026.7.0, here is 2026.7.1"),
        ("numpy", "2.3.4", None),
        ("numpy", "2.2.1", "numpy 2.2, here is 2.3"),
        ("stem_dask", "0.0.9", "stem_dask 0.0.9, here is 0.1.0"),
        ("stem_dask", None, "stem_dask missing, here is 0.1.0"),
        ("tornado", "1.0", None),
    ],
)
def test_what_matters(package, version, told):
    found = differences(versions({"packages": {**HERE, package: version}}))
    assert found == ([] if told is None else [f"worker tcp://a:1 has {told}"])


def test_a_worker_that_says_nothing_differs():
    assert len(differences(versions(None))) == 5


@pytest.fixture
def others():
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


def test_other_versions_are_refused(others, monkeypatch):
    found = versions({"packages": {**HERE, "dask": "2026.1.0"}})
    monkeypatch.setattr(Client, "get_versions", lambda self, packages: found)
    with (
        pytest.raises(
            ConfigError, match=r"has other versions: worker tcp://a:1 has dask 2026\.1\.0"
        ),
        connect(address=others.scheduler_address),
    ):
        pass


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
