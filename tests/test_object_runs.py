"""Whole jobs whose input and output are in an object store: the same bytes, going on, and what is left behind."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_faults import SECRET, Between, between, error
from test_objects import upload

import stem_dask as sd
from stem_dask.cli.main import main
from stem_dask.core.errors import (
    ConfigError,
    LockedError,
    OutputExistsError,
    SourceError,
    StoreError,
)
from stem_dask.engine.lock import owned
from stem_dask.job import run as pipeline
from stem_dask.job.plan import begun, prepare
from stem_dask.storage import location
from stem_dask.storage.location import at


@pytest.fixture
def run(shared_cluster: Any) -> Callable[..., Any]:
    """Runs a job on threads that all tests share."""

    def run_it(config: Any, **options: Any) -> Any:
        return pipeline.run(config, **{"connection": shared_cluster, **options})

    return run_it


#: a block for two rows of the scan
CHUNK_MB = 0.03


@pytest.fixture
def server(s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    """Every request passes it."""
    monkeypatch.setattr(location, "TRIES", 1)
    with between(s3_server) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.address)
        yield found


@pytest.fixture
def job(make_config: Any, beam_file: Path, bucket: str, tmp_path: Path) -> Callable[..., Any]:
    """Builds a job from the file of `beam_file`, or another input, into the bucket."""

    def make(name: str = "out.zarr", source: Path | str = beam_file, **output: Any) -> Any:
        here = {"path": f"{bucket}/{name}", "local_folder": str(tmp_path), "chunk_mb": CHUNK_MB}
        return make_config(source, output={**here, **output})

    return make


def marks(url: str) -> dict[str, str]:
    """ETag of every object: that of its bytes."""
    return {name: status.etag for name, status in at(url).below()}


def test_a_job_between_object_stores_makes_the_bytes_of_a_local_one(
    run, job, make_config, beam_file, bucket, tmp_path, monkeypatch
):
    # what it shows is read from the store; drawing it takes longer than everything here
    monkeypatch.setattr(
        "stem_dask.job.passes.draw", lambda data, path: Path(path).write_text(data.title)
    )
    local = run(make_config(beam_file, "local.zarr", output={"chunk_mb": CHUNK_MB}))
    converted = {"crop": {"enabled": False}, "analyze": {"ahead": True}}
    stored = tmp_path / "stored.zarr"
    run(make_config(beam_file, stored.name, output={"chunk_mb": CHUNK_MB}, **converted))
    source, url = f"{bucket}/raw/scan.zarr", f"{bucket}/out.zarr"
    upload(stored, source)
    config = job(source=source, export=["npy"], figure=True)
    prepared = prepare(config)
    assert prepared.precomputed is not None
    assert prepared.analysis_note == f"analysis    reused from {source}"
    done = run(config)
    assert done.exit_code == local.exit_code == 0
    assert done.results["window"] == local.results["window"]
    there = {name: at(f"{url}/{name}").read_bytes() for name, _ in at(url).below()}
    here = tmp_path / "local.zarr"
    chunks = {str(f.relative_to(here)): f.read_bytes() for f in here.rglob("c.*")}
    assert len([name for name in chunks if name.startswith("patterns/")]) == 3
    assert {name: there[name] for name in chunks} == chunks
    assert sum(map(len, there.values())) == done.results["sizes"]["stored_bytes"]
    assert (tmp_path / "out_visualization.png").read_text() == "scan"
    assert np.array_equal(np.load(tmp_path / "out.npy"), sd.open(here).values)  # written here
    assert sorted(p.name for p in tmp_path.glob("out*")) == [
        "out.npy", "out.run", "out_report.html", "out_results.json", "out_visualization.png",
    ]  # fmt: skip
    assert np.array_equal(sd.open(url).values, sd.open(here).values)
    assert not at(f"{url}.owner").exists()
    assert run(config).lines == (f"already complete: {url}", *done.lines)
    with pytest.raises(OutputExistsError, match=r"made with other options \(output.codec\).*it ends as soon as the first"):  # fmt: skip
        run(job(source=source, export=["npy"], figure=True, codec="zstd"))
    at(f"{url}/patterns/c.9.9.9.9").write_bytes(b"of an older grid")
    changed = job(codec="gzip", overwrite=True)
    analyze = changed.analyze.model_copy(
        update={"known": source}
    )  # of the file that it was made from
    run(changed.model_copy(update={"analyze": analyze}))
    assert not at(f"{url}/patterns/c.9.9.9.9").exists()
    assert np.array_equal(sd.open(url).values, sd.open(here).values)


def test_keys_that_may_only_read_leave_nothing_behind(run, job, server, tmp_path):
    before = sorted(tmp_path.iterdir())
    server.answer = lambda method, path: (403, error("AccessDenied")) if method == "PUT" else None
    with pytest.raises(StoreError, match=r"out\.zarr\.owner: access is denied \(AccessDenied\)"):
        run(job())
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_that_failed_goes_on(run, job, server, bucket, tmp_path):
    config, url = job(), f"{bucket}/out.zarr"
    run(config)
    before, root = marks(url), at(f"{url}/zarr.json").read_bytes()
    at(f"{url}/zarr.json").write_bytes(root.replace(b'"token"', b'"was"'))
    server.answer = lambda method, path: (
        (503, error("SlowDown")) if method == "PUT" and "patterns/c.2." in path else None
    )
    with pytest.raises(OutputExistsError):
        run(config)
    assert "zarr.json" in dict(at(url).below())
    config = job(overwrite=True)
    with pytest.raises(StoreError, match=rf"{url}/patterns/c.2.0.0.0: the store answers with an error \(SlowDown\)"):  # fmt: skip
        run(config)
    there = [name for name, _ in at(url).below()]
    assert "zarr.json" not in there  # the older output has ended
    assert [name for name in there if name.startswith("patterns/c.")] == [
        "patterns/c.0.0.0.0",
        "patterns/c.1.0.0.0",
    ]
    assert not at(f"{url}.owner").is_file()
    # one that is cut, one that another program wrote, and one that is as it was
    shard = f"{url}/patterns/c.0.0.0.0"
    at(shard).write_bytes(at(shard).read_bytes()[:-1] + b"x")
    server.answer, server.asked = lambda method, path: None, []
    with pytest.raises(OutputExistsError, match="holds objects and is no finished output"):
        prepare(job(local_folder=str(tmp_path / "elsewhere")))
    at(f"{url}/zarr.json").write_bytes(
        b'{"attributes": {"token": "of another job, finished elsewhere"}}'
    )
    with pytest.raises(OutputExistsError):
        run(job())
    at(f"{url}/zarr.json").unlink()
    done = run(config)
    assert [path.partition("patterns/c.")[2][0] for path in server.puts("patterns/c.")] == ["2", "0"]  # fmt: skip
    assert at(f"{url}/zarr.json").read_bytes() == root.replace(b'"overwrite": false', b'"overwrite": true')  # fmt: skip
    after = marks(url)
    assert {**after, "zarr.json": ""} == {**before, "zarr.json": ""}
    assert done.exit_code == 0
    last = [path for method, path in server.asked if method == "PUT" and ".owner" not in path][-1]
    assert last.endswith("out.zarr/zarr.json")


def test_a_put_that_fails_for_a_moment_is_tried_again(run, job, server, bucket, beam_file):
    failed: list[str] = []

    def answer(method: str, path: str) -> tuple[int, bytes] | None:
        if method == "PUT" and "patterns/c.1." in path and len(failed) < 3:
            failed.append(path)
            return 500, error("InternalError")
        return None

    source = f"{bucket}/beam.npy"  # which is read by ranges
    at(source).write_bytes(beam_file.read_bytes())
    server.answer = answer
    done = run(job(source=source))
    # three answers: the library asks twice, then the block is tried again
    assert (done.exit_code, done.results["retries"], len(failed)) == (0, 1, 3)
    beam = np.load(beam_file)
    cropped = sd.open(f"{bucket}/out.zarr")
    assert cropped.shape == (6, 5, 18, 18)
    assert np.array_equal(cropped.sum(("ky", "kx")).values, beam.sum((2, 3)))


def test_access_that_is_lost_ends_the_run(run, job, server, bucket):
    server.answer = lambda method, path: (
        (403, error("AccessDenied", f"<AWSAccessKeyId>{SECRET}</AWSAccessKeyId>"))
        if method == "PUT" and "patterns/c." in path
        else None
    )
    with pytest.raises(StoreError, match=r"block .*patterns/c\..*access is denied") as caught:
        run(job())
    assert caught.value.exit_code == 5
    assert SECRET not in str(caught.value)
    server.answer = lambda method, path: (403, error("AccessDenied")) if method == "GET" else None
    with pytest.raises(StoreError, match="access is denied"):
        run(job())
    with pytest.raises(SourceError, match="access is denied") as caught:
        run(job(source=f"{bucket}/in.zarr"))
    assert caught.value.exit_code == 3


def test_a_run_that_cannot_go_on_leaves_what_was_there(run, job, bucket, tmp_path):
    url = f"{bucket}/out.zarr"
    run(job())
    before = dict(at(url).below())
    np.save(tmp_path / "empty.npy", np.zeros((4, 4, 16, 16), np.uint16))
    with pytest.raises(SourceError, match="empty"):
        run(job(source=tmp_path / "empty.npy", overwrite=True))
    assert dict(at(url).below()) == before
    assert run(job()).lines[0] == f"already complete: {url}"
    with pytest.raises(SourceError, match="empty"):
        run(job("new.zarr", source=tmp_path / "empty.npy"))
    assert not list(tmp_path.glob("new*"))
    assert list(at(bucket + "/new.zarr").below()) == []
    assert not at(f"{bucket}/new.zarr.owner").is_file()


def test_two_machines_do_not_write_one_output(run, job, bucket, tmp_path):
    url = f"{bucket}/out.zarr"
    shard = f"{url}/patterns/c.0.0.0.0"
    with owned(url, tmp_path / "elsewhere.run"):
        free = prepare(job())
        at(shard).write_bytes(b"of the other run")
        for config in (free, job(overwrite=True)):
            with pytest.raises(LockedError, match="in use by a run on"):
                run(config)
            assert not list(tmp_path.glob("out*"))
            assert at(shard).read_bytes() == b"of the other run"
    with pytest.raises(OutputExistsError, match="is no finished output"):
        run(free)
    assert not list(tmp_path.glob("out*"))
    prepared = prepare(job(overwrite=True))

    def taken_over() -> None:
        with begun(prepared) as state:
            at(f"{url}.owner").write_bytes(b'{"run": "another run"}')
            run(prepared, state=state)

    with pytest.raises(LockedError, match="another run took it over"):
        taken_over()
    assert at(shard).read_bytes() == b"of the other run"
    assert not at(f"{url}/zarr.json").is_file()
    assert at(f"{url}.owner").read_bytes() == b'{"run": "another run"}'


def test_commands_know_urls_and_nothing_tells_the_secret(
    run, bucket, beam_file, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("DEBUG")
    url = f"{bucket}/a/out.zarr"
    words = [str(Path(__file__).parents[1] / "configs" / "crop.yaml"), f"input.path={beam_file}", f"output.path={url}"]  # fmt: skip
    words += ["output.export=[]", "output.figure=false", "cluster.kind=threads"]
    assert main(["check", *words]) == 0
    said = capsys.readouterr().out
    assert f"writes      {url}: at most" in said
    assert f"free in {tmp_path}" in said
    assert main(["run", *words]) == 0
    assert f"file        {url} (" in capsys.readouterr().out
    assert main(["init", url]) == 0
    assert f'path: "{url}"' in capsys.readouterr().out
    assert main(["info", url]) == 0
    assert "patterns    6 x 5 x 18 x 18 uint16" in capsys.readouterr().out
    assert main(["verify", url]) == 0
    assert "every chunk is there" in capsys.readouterr().out
    at(f"{url}/analysis/radius/c.0.0").unlink()
    content = at(f"{url}/patterns/c.0.0.0.0").read_bytes()
    at(f"{url}/patterns/c.0.0.0.0").write_bytes(content[:40] + b"?" + content[41:])
    assert main(["verify", url]) == 5
    said = capsys.readouterr().err
    assert f"{url}/analysis/radius/c.0.0 is missing or empty" in said
    assert f"{url}/patterns/c.0.0.0.0 cannot be decoded" in said
    assert main(["verify", f"{bucket}/none.zarr"]) == 3
    assert capsys.readouterr().err.startswith(
        f"error: {bucket}/none.zarr: not a readable zarr store"
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(location, "TRIES", 0)
    assert main(["run", *words, "output.codec=zstd"]) == 5
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {url}")
    assert "does not answer" in said.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"out_results.json", "run.json", "journal"} <= {path.name for path in files}
    texts = [path.read_bytes() for path in files] + [said.err.encode(), caplog.text.encode()]
    monkeypatch.undo()
    assert not any(SECRET.encode() in text or b"canary-key" in text for text in texts)


def test_what_cannot_be_written_into_an_object_store_is_refused(
    run, job, make_config, bucket, tmp_path
):
    def refused(config: Any, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            prepare(config)

    np.save(tmp_path / "dark.npy", np.zeros((40, 36), np.float32))
    refused(make_config(tmp_path / "beam.npy", output={"local_folder": "/x"}), "local_folder is /x, .* leave it out")  # fmt: skip
    plain = {"crop": {"enabled": False}}
    refused(make_config(tmp_path / "beam.npy", output={"path": f"{bucket}/out.h5"}, **plain), "only .zarr is written")  # fmt: skip
    refused(make_config(f"{bucket}/a.zarr", output={"path": f"{bucket}/a.zarr"}), "would replace the input")  # fmt: skip
    refused(make_config(f"{bucket}/a.zarr", input={"path": f"{bucket}/a.zarr", "dark": f"{bucket}/dark.npy"}), "read from a file here")  # fmt: skip
    with pytest.raises(ConfigError, match="export writes local files"):
        sd.export(sd.open(tmp_path / "beam.npy"), f"{bucket}/out.pt")


def test_workers_have_access_of_their_own(job: Any, bucket: str, monkeypatch: Any) -> None:
    from distributed import LocalCluster

    access = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with monkeypatch.context() as without:
        for name in access:
            without.delenv(name)
        without.setenv("AWS_EC2_METADATA_DISABLED", "true")
        cluster = LocalCluster(1, threads_per_worker=1, dashboard_address=":0", processes=True)
    config = job()
    words = "a worker on .* cannot reach s3://.*/out.zarr: there are no credentials .* Start workers with"
    with cluster, cluster.get_client() as client:
        with pytest.raises(StoreError, match=words):
            pipeline.run(config, connection=client)
        client.run(lambda: os.environ.update(access))
        crop = config.crop.model_copy(update={"enabled": False})
        converted = pipeline.run(config.model_copy(update={"crop": crop}), connection=client)
    assert converted.exit_code == 0
    assert sd.open(f"{bucket}/out.zarr").shape == (6, 5, 40, 36)
