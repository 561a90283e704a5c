"""Fixtures that several test files share."""

import contextlib
import gc
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from stem_dask.core.machine import USUAL, postpone_collection

postpone_collection()  # what is loaded to collect five thousand tests is no garbage

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_finish() -> None:
    """Rounds of the garbage collector within tests pass over it."""
    gc.freeze()
    gc.set_threshold(*USUAL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real and simulated files with known answers, which lies beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the shared test data do not lie beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _no_scheduler_left_behind() -> Any:
    """A test that fails with a client open must not take the others along."""
    import dask

    yield
    dask.config.set(scheduler=None)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics of the tests' files are not left in the cache of the user, nor found there."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _any_port() -> Iterator[None]:
    """Tests that run at the same time must not race for the dashboard's usual port."""
    with pytest.MonkeyPatch.context() as patched:
        for module in ("local", "slurm"):
            patched.setattr(f"stem_dask.cluster.{module}.usual_port", lambda: 0)
        yield


@pytest.fixture(scope="session", autouse=True)
def retry_seconds() -> Iterator[tuple[float, ...]]:
    """What is read or written in vain is tried again at once, which does not reach processes; gives how long it would wait."""
    from stem_dask.engine import run as engine

    usual = engine.RETRY_SECONDS
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "RETRY_SECONDS", (0.0,) * len(usual))
        yield usual


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a server on this machine that speaks S3."""
    pytest.importorskip("obstore", reason="the package obstore is not installed (extra test)")
    for name in ("moto", "flask", "flask_cors"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the package {name} is not installed (extra test)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert server.poll() is None, "the server of moto ended"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new bucket, with credentials in the environment and nothing else there."""
    from s3_faults import SECRET

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "canary-key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"b{uuid4().hex}"
    request = urllib.request.Request(f"{s3_server}/{name}", method="PUT")
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200
    return f"s3://{name}"


@pytest.fixture
def make_config(tmp_path: Path) -> Any:
    """Builds a config from sections, on threads, writing into the test's folder."""
    from stem_dask.config.load import parse_config

    def make(path: Path | str, name: str = "out.zarr", **sections: Any) -> Any:
        options: dict[str, Any] = {
            "input": {"path": str(path)},
            "output": {"path": str(tmp_path / name), "export": [], "figure": False},
            "cluster": {"kind": "threads", "threads_per_worker": 2},
        }
        for section, values in sections.items():
            options[section] = (
                {**options.get(section, {}), **values} if isinstance(values, dict) else values
            )
        return parse_config(options)

    return make


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without cupy, whatever this one has."""
    import sys

    monkeypatch.setitem(sys.modules, "cupy", None)


@pytest.fixture(scope="session")
def beam() -> Any:
    """A small scan (6, 5, 40, 36) uint16 with a moving square beam; nobody writes into it."""
    data = np.zeros((6, 5, 40, 36), np.uint16)
    for y in range(6):
        for x in range(5):
            data[y, x, 16 + y // 2 : 22 + y // 2, 14 + x // 2 : 20 + x // 2] = 10 + x
    data.setflags(write=False)
    return data


@pytest.fixture
def beam_file(beam: Any, tmp_path: Path) -> Path:
    """The same in a .npy file."""
    path = tmp_path / "beam.npy"
    np.save(path, beam)
    return path


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Any]:
    """Threads that several runs share."""
    import stem_dask.job.run  # noqa: F401  takes the true connect before a test puts another in its place
    from stem_dask.cluster.connect import connect

    with connect("threads", threads_per_worker=2) as connection:
        yield connection


@pytest.fixture
def connects(shared_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One cluster for the tests of a file; the bytes that each call to connect was told."""
    told: list[int] = []

    @contextlib.contextmanager
    def connect(**options: Any) -> Iterator[Any]:
        told.append(options["input_bytes"])
        yield shared_cluster

    monkeypatch.setattr("stem_dask.cluster.connect.connect", connect)
    return told


@pytest.fixture
def batch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connects: list[int]) -> Path:
    """A working directory with three small scans and a config for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    from batches import BEAMS, write_beam

    for name, half in BEAMS.items():
        write_beam(name, half)
    (tmp_path / "batch.yaml").write_text(
        "input:\n  path: raw/*.npy\ncrop:\n  margin_pixels: 1\noutput:\n  path: out/{stem}.zarr\n  export: []\n"
        "  figure: false\n  chunk_mb: 0.01\n"
    )
    return tmp_path
