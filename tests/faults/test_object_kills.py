"""SIGKILL while a run writes into an object store: the same command goes on, and writes only what is missing."""

import hashlib
import json
import os
import signal

import pytest
from forks import Fork
from harness import PATIENCE, read
from s3_faults import between
from small import CONFIGS, N_BLOCKS

from stem_dask.storage.location import at

pytestmark = pytest.mark.faults

#: what is being put when the process is killed, and whether it arrives: shards, and the document that makes them an output
MOMENTS = [("scan.zarr/patterns/c.2.", True), ("scan.zarr/zarr.json", False)]


def test_kills_of_a_run_into_an_object_store(
    forks, small, s3_server, bucket, tmp_path, monkeypatch
):
    url, journal = f"{bucket}/scan.zarr", tmp_path / "scan.run" / "journal"
    words = [f"{key}={value}" for key, value in CONFIGS["A"].items()]
    words += [f"output.path={url}", f"output.local_folder={tmp_path}", "output.export=[]"]
    running: list[Fork] = []

    def run() -> tuple[int, str]:
        how = {"environment": dict(os.environ), "folder": str(tmp_path), "pool": True}
        argv = [str(small.folder / "crop.yaml"), *words, "cluster.threads_per_worker=2"]
        log = tmp_path / "log"
        running.append(forks.start("stem_dask.run", argv, log, **how))
        return running[-1].wait(PATIENCE), log.read_text()

    def noted() -> set[int]:
        whole = [line for line in read(journal).splitlines() if line.endswith(b"}")]
        return {line["index"] for line in map(json.loads, whole) if line["job"] == "crop"}

    with between(s3_server) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        for part, arrives in MOMENTS:

            def answer(
                method: str, path: str, part: str = part, arrives: bool = arrives
            ) -> tuple[int, bytes] | None:
                if method != "PUT" or part not in path:
                    return None
                os.killpg(running[-1].pid, signal.SIGKILL)
                return None if arrives else (500, b"")

            before = noted()
            server.asked, server.answer = [], answer
            code, text = run()
            assert code == -9, text
            written = {int(p.partition("patterns/c.")[2][0]) for p in server.puts("patterns/c.")}
            assert not written & before
            assert before <= noted()
            assert not at(f"{url}/zarr.json").is_file()
            assert at(f"{url}.owner").is_file()  # of a run that died here: taken over at once
        assert noted() == set(range(N_BLOCKS))
        server.asked, server.answer = [], lambda method, path: None
        code, text = run()
        assert code == 0, text
        assert server.puts("patterns/c.") == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    marks = {name: status.etag.strip('"') for name, status in at(url).below()}
    for name, content in small.references["A"][
        ".zarr"
    ].items():  # but the documents, with the output's name
        assert marks[name] == hashlib.md5(content).hexdigest(), name
    assert not at(f"{url}.owner").is_file()
