"""Asked to stop, started twice, started with other options."""

import json
import os
import signal

import pytest
from harness import N_BLOCKS, Command, Started, assert_identical, members, n_lines, read

pytestmark = pytest.mark.faults

#: seconds that a way out may take
WAY_OUT = 25.0


def _stopped(run: Started, *, noise: bool = False) -> None:
    """Exit code 75 in time, nothing alive. ``noise``: dask's workers may have said what ended them."""
    assert run.wait(WAY_OUT) == 75, run.text
    assert run.gone() == []
    assert "the same command goes on" in run.text
    assert noise or "Traceback" not in run.text


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "Ctrl-C"])
def test_signals(how: str, command: Command, reference: Command) -> None:
    """To the client alone, and, as a terminal does it, SIGINT to the workers too."""
    run = command.start(own_python=how == "Ctrl-C")
    run.until(lambda: n_lines(command, "crop") >= 4, "four cropped rows")
    if how == "Ctrl-C":
        os.killpg(run.process.pid, signal.SIGINT)
    else:
        run.process.send_signal(getattr(signal, how))
    _stopped(run, noise=how == "Ctrl-C")
    assert n_lines(command, "crop") < N_BLOCKS, "too late to be a test"
    assert not command.store.exists()
    known = read(command.journal)
    run = command.finish(kind="threads")
    assert run.code == 0, run.text
    assert read(command.journal).startswith(known)
    assert_identical(command, reference)


def test_a_stop_while_the_cluster_starts(command: Command, reference: Command) -> None:
    """What an earlier start had finished stays."""
    run = command.start(kind="threads")
    run.until(lambda: n_lines(command, "crop") >= 4, "four cropped rows")
    run.kill()
    known = read(command.journal)
    run = command.start()
    run.until(lambda: "resuming" in run.text, "the first words")
    run.process.send_signal(signal.SIGTERM)
    _stopped(run, noise=True)
    assert read(command.journal).startswith(known)
    # and one that cannot even begin
    run = command.finish("cluster.scheduler_file=missing.json", kind="auto")
    assert run.code == 2
    assert "missing.json" in run.text
    assert read(command.journal).startswith(known)
    run = command.finish(kind="threads")
    assert run.code == 0, run.text
    assert_identical(command, reference)


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C"])
def test_a_stop_while_workers_start_is_one_line(how: str, command: Command) -> None:
    """Half a cluster cannot be closed, and its processes hear Ctrl-C too: nothing of that is shown, and nothing stays."""
    for words in ("input ", "spawn_main", "dashboard "):  # in the output, or among the processes
        run = command.start(own_python=True)
        run.until(
            lambda run=run, words=words: (
                words in run.text or any(words in line for line in members(run.process.pid))
            ),
            words,
        )
        if how == "Ctrl-C":
            os.killpg(run.process.pid, signal.SIGINT)
        else:
            run.process.send_signal(signal.SIGTERM)
        _stopped(run)
        told = run.text[run.text.index("error: ") :]
        assert told == "error: asked to stop; the same command goes on where this one ended\n"
    assert not command.store.exists()


def test_a_stop_before_anything_is_begun(command: Command) -> None:
    """While the first packages are loaded."""
    run = command.start(own_python=True, fault="interrupt numpy.linalg")
    assert run.wait(WAY_OUT) == 75, run.text
    assert run.text == "interrupted; the same command goes on where this one ended\n"


def test_a_stop_waits_for_no_package(command: Command) -> None:
    """On a cluster's disk packages take a while to load, which is begun beside the start of the workers."""
    run = command.start(own_python=True, fault="endless h5py")
    run.until(lambda: "dashboard " in run.text, "the cluster")
    os.killpg(run.process.pid, signal.SIGINT)
    _stopped(run)


def test_a_time_limit(command: Command, reference: Command) -> None:
    """Again and again with little time: each start gets further, the last one finishes."""
    run = command.finish("--time-limit", "1", kind="threads", own_python=True)
    _stopped(run, noise=True)
    for seconds in ("1", "2", "4"):
        known = read(command.journal)
        run = command.finish("--time-limit", seconds)
        assert read(command.journal).startswith(known)
        if run.code == 0:
            break
        _stopped(run, noise=True)  # of workers that were just starting
    run = command.finish(kind="threads")
    assert run.code == 0, run.text
    assert_identical(command, reference)


def test_two_at_once(command: Command, reference: Command) -> None:
    """Three races; then the owner is killed, and the next start takes over at once."""
    for race in range(3):
        pair = [command.start("--restart", kind="threads", own_python=not race) for _ in range(2)]
        if race < 2:
            pair[0].until(
                lambda pair=pair: pair[1].process.poll() is not None or _second(pair), "an end"
            )
            loser, winner = sorted(pair, key=lambda run: run.process.poll() is None)
            assert loser.wait() == 6, loser.text
            assert "Traceback" not in loser.text
            assert f"process {winner.process.pid}" in loser.text
            winner.until(lambda: n_lines(command, "analyze") >= 2, "two rows")
            winner.kill()
        else:
            codes = sorted(run.wait() for run in pair)
            assert codes == [0, 6], [run.text for run in pair]
    assert_identical(command, reference)


def _second(pair: list[Started]) -> bool:
    return pair[0].process.poll() is not None


def test_other_options(command: Command, reference: Command) -> None:
    run = command.start(kind="threads")
    run.until(lambda: n_lines(command, "crop") >= 4, "four cropped rows")
    run.kill()
    known = read(command.journal)
    refused = command.finish("crop.margin_pixels=1", kind="threads")
    assert refused.code == 2
    assert "crop.margin_pixels" in refused.text
    assert "--restart" in refused.text
    refused = command.finish("output.chunk_mb=0.3", kind="threads")
    assert refused.code == 2
    assert "output.chunk_mb" in refused.text
    assert read(command.journal) == known
    fresh = command.start("--restart", "crop.margin_pixels=1", "output.export=[]", kind="threads")
    fresh.until(lambda: _margin(command) == 1, "a fresh run.json")
    fresh.until(lambda: n_lines(command, "crop") >= 2, "two cropped rows of the fresh run")
    fresh.kill()
    assert not read(command.journal).startswith(known)
    fresh = command.finish("--restart", kind="threads")  # and back, to the options of the reference
    assert fresh.code == 0, fresh.text
    assert "resuming" not in fresh.text
    assert_identical(command, reference)
    done = command.finish(kind="threads")
    assert done.code == 0
    assert "already complete" in done.text
    assert_identical(command, reference)


def _margin(command: Command) -> int:
    words = json.loads(read(command.run_folder / "run.json") or b"{}")
    return words["options"]["crop"]["margin_pixels"] if words else 0


def test_other_memory(command: Command) -> None:
    """With chunk_mb: auto the blocks follow the memory of the first start: two grids must not mix."""
    import numpy as np
    import xarray as xr

    data = np.zeros((24, 16, 256, 256), np.uint16)
    data[:, :, 120:136, 118:138] = np.arange(24)[:, None, None, None] + 1
    np.save(command.folder / "large.npy", data)
    options = (
        f"input.path={command.folder}/large.npy",
        "output.chunk_mb=auto",
        "output.export=[pt]",
    )
    small = ("cluster.memory_limit=950MB", "cluster.threads_per_worker=16")
    run = command.finish(*options, *small, kind="threads", fault="after analysis/000001.block")
    assert run.code == -9, run.text
    run = command.finish(*options, kind="threads")
    assert run.code == 0, run.text
    jobs = ("analyze", "crop", "export .pt scan")
    lines = {line for line in command.lines() if line[0] != "survey"}
    assert lines == {(job, i) for job in jobs for i in range(6)}
    patterns = xr.open_zarr(command.store).patterns.load()
    assert (patterns.max(("scan_x", "ky", "kx")) == np.arange(24) + 1).all()
    assert int(patterns.sum()) == int(data.sum())


def test_a_stop_within_an_import(command: Command, reference: Command) -> None:
    run = command.start(kind="threads", fault="interrupt h5py._hl.files", own_python=True)
    _stopped(run, noise=True)
    assert command.counts()["crop"] == N_BLOCKS
    run = command.finish(kind="threads")
    assert run.code == 0, run.text
    assert_identical(command, reference)
