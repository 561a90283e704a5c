"""Every benchmark also runs as a test, on next to no data; commands run in this process, which has loaded all."""

import contextlib
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import (
    agreement,
    centers,
    data,
    detector_first,
    growth,
    kernels,
    limits,
    loading,
    once,
    resume,
    rows,
    show,
    table,
)
from benchmarks.peers import Task, centers_and_radii
from benchmarks.watch import Watched, watch
from stem_dask.kernels.analysis import analyze_patterns

TINY = ["--gb", "0.0003", "--scan-x", "4", "--detector", "64", "--rounds", "1", "--written-bytes", "1048576"]  # fmt: skip


def in_process(command: Sequence[str], **options: Any) -> Watched:
    """Run a command of `watch` in this process."""
    from importlib import import_module

    python, flag, module, *words = command
    assert (python, flag) == (sys.executable, "-m")
    name = "benchmarks.peers.__main__" if module == "benchmarks.peers" else module
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert not import_module(name).main(words)
    return Watched(1.0, 0.5, 10**8, output.getvalue())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes."""
    for module in (table, growth, loading):
        monkeypatch.setattr(module, "watch", in_process)


def test_data_stream_into_a_scan(tmp_path: Path) -> None:
    from stem_dask import open as open_patterns

    path = data.write_scan(tmp_path / "scan.dm4", 6, scan_x=3, detector=32, electrons=500)
    patterns = open_patterns(path)
    assert patterns.shape == (6, 3, 32, 32)
    assert np.array_equal(patterns[0].values, patterns[4].values)
    assert not np.array_equal(patterns[0].values, patterns[1].values)
    assert data.scan_rows(2_147_483_648) == 128


def test_a_source_without_end_repeats_a_file() -> None:
    class Held:
        shape, dtype = (3, 2, 1, 1), np.dtype("u2")

        def __getitem__(self, part: tuple[slice, ...]) -> Any:
            return np.arange(6, dtype="u2").reshape(self.shape)[part]

    source = data.Tiled(Held(), 8)
    whole = (slice(None), slice(None), slice(None))
    assert source.shape == (8, 2, 1, 1)
    assert source[(slice(3, 6), *whole)].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert source[(slice(2, 4), *whole)].ravel().tolist() == [4, 5, 0, 1]
    assert source[(slice(6, 8), slice(1, 2), *whole[1:])].ravel().tolist() == [1, 3]


@pytest.mark.parametrize("shape", [(5, 40, 36), (3, 31, 48)])
def test_peers_agree_with_the_kernel(shape: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.peers.torch import _centers_and_radii

    rng = np.random.default_rng(1)
    block = rng.poisson(1, shape).astype(np.uint16)
    block[:, 12:20, 9:22] += rng.poisson(40, (shape[0], 8, 13)).astype(np.uint16)
    expected = analyze_patterns(
        block, target_retention=0.9, threshold=0, center=None, metric="square"
    )
    center, radius = centers_and_radii(block, 0.9)
    assert np.allclose(center, expected.center, rtol=1e-12)
    assert np.array_equal(radius, expected.radius)
    center, radius = _centers_and_radii(torch.from_numpy(block.astype(np.float32)), 0.9)
    assert np.allclose(center, expected.center, rtol=1e-12)
    assert np.array_equal(radius, expected.radius)


def test_differences_are_reported(tmp_path: Path) -> None:
    import zarr

    def store(name: str, value: int, lead: tuple[int, ...]) -> Path:
        patterns = np.arange(24, dtype="u2").reshape(*lead, 2, 2)
        patterns[..., 0, 0] += value
        zarr.create_array(f"{tmp_path}/{name}.zarr/patterns", data=patterns)
        return tmp_path / f"{name}.zarr"

    reference = store("reference", 0, (2, 3))
    agreement.check_patterns(reference, store("same", 0, (6,)))
    with pytest.raises(SystemExit, match=r"other\.zarr differs from"):
        agreement.check_patterns(reference, store("other", 1, (6,)))


def test_the_limit_adds_up() -> None:
    machine = limits.Machine(cores=2, read=10e9, read_cold=1e9, write=1e9)
    result = rows.JobResult(seconds=1, input_bytes=10**9, output_bytes=10**8, stored_bytes=10**9)
    patterns = np.ones((4, 8, 8), "u2")
    assert limits.limit_of(rows.ROWS["analysis"], result, machine, patterns).seconds == 0.1
    tensor = limits.limit_of(rows.ROWS["pt"], result, machine, patterns)
    assert (tensor.seconds, tensor.encode, tensor.write) == (1.0, 0.0, 1.0)
    cold = limits.limit_of(rows.ROWS["cold"], result, machine, patterns)
    assert 2.0 <= cold.seconds == 1.0 + max(0.1 + cold.encode, 1.0)


def test_table_comparison_and_picture(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that a row needs, in one setting; the picture and the comparison come from what it wrote."""
    path = tmp_path / "table.json"
    options = ["--rows", "crop", "convert-analyze", "--settings", "1x2", "--peers", "numpy", "dask"]
    result = table.main([*TINY, *options, "--memory", "0.0003", "--json", str(path)])
    (crop, convert) = result["rows"]
    assert list(crop["runs"]) == ["stem_dask 1x2", "numpy", "dask"]
    assert all(run["seconds"] > 0 for runs in crop["runs"].values() for run in runs)
    assert crop["bytes"] == 9 * 4 * 64 * 64 * 2
    assert crop["goal"] == pytest.approx(1.2 * crop["bytes"] / rows.GOAL_BYTES)
    assert 0 < crop["limit"]["seconds"] < crop["best"]
    assert convert["goal"] is None
    assert convert["left_out"] == dict.fromkeys(["numpy", "dask"], "would be its analysis, then its conversion")  # fmt: skip
    assert [one["who"] for one in result["memory"]] == ["stem_dask 1x2", "numpy", "dask"]
    assert json.loads(path.read_text())["rows"] == result["rows"]
    readme = tmp_path / "README.md"
    readme.write_text(f"before {show.BEGIN} old {show.END} after")
    text = show.main([str(path), str(readme), str(tmp_path / "a.png")])
    assert text.splitlines()[-2].startswith("| the same with the analysis | ")
    assert readme.read_text() == f"before {show.BEGIN}\n{text}\n{show.END} after"
    assert (tmp_path / "a.png").stat().st_size > 10_000
    capsys.readouterr()
    table.main(["--compare", str(path), "--rows", "crop", *TINY[2:]])
    assert re.search(
        r"^crop +stem_dask 1x2 +[\d.]+ -> [\d.]+ s per GB \(", capsys.readouterr().out, re.MULTILINE
    )


def test_a_peer_that_fails_is_left_out(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(command: Sequence[str], **options: Any) -> Watched:
        if "benchmarks.peers" in command:
            raise SystemExit("ended with exit code 1: …\nMemoryError: too much")
        return in_process(command, **options)

    monkeypatch.setattr(table, "watch", fails)
    options = ["--rows", "convert", "--settings", "1x2", "--peers", "numpy", "--memory", "0.0003"]
    result = table.main([*TINY, *options])
    assert result["rows"][0]["left_out"] == {"numpy": "failed: MemoryError: too much"}
    assert [one["who"] for one in result["memory"]] == ["stem_dask 1x2"]
    assert "memory numpy at 0.0003 GB failed: MemoryError: too much" in capsys.readouterr().out


def test_every_row_has_a_command() -> None:
    from stem_dask.cli.main import _parser

    for row in rows.ROWS.values():
        _, _, module, *words = rows.job_command(row, "2x1", Path("a.dm4"), Path("b.zarr"), 2)  # fmt: skip
        if module == "stem_dask.cli.main":
            options = _parser().parse_args(words)
            given = vars(options).get("overrides") or options.words
            assert "cluster.threads_per_worker=1" in given
        else:
            assert words[:3] == [words[0], "input.path=a.dm4", "output.path=b.zarr"]
        assert not {"{", "}"} & set("".join(words))


def test_kernels_are_measured() -> None:
    options = ["--patterns", "1", "--detectors", "32", "48", "--repeat", "1"]
    found = kernels.main([*options, "--dtypes", "uint16", "float32"])
    assert len(found) == 4 * 8
    assert min(min(speed.speed, speed.copy, speed.twin) for speed in found) > 0


def test_kernels_do_what_their_twins_do() -> None:
    works = kernels.works(kernels.beams(8, 32, "uint16"))
    assert np.array_equal(works["stride 2"][0](), works["stride 2"][1]())
    assert np.allclose(works["bin 2"][0](), works["bin 2"][1](), rtol=1e-6)
    assert np.array_equal(works["analyze square"][0]().radius, works["analyze square"][1]()[1])
    assert np.array_equal(works["analyze circle"][0]().radius, works["analyze circle"][1]())
    for name in ("gauss 2", "fft 2"):
        assert np.allclose(works[name][0](), works[name][1](), atol=1e-4)
    assert np.allclose(works["logarithms"][0](), works["logarithms"][1](), rtol=1e-12)
    assert np.array_equal(works["crop + retention"][0](), works["crop + retention"][1]())


def test_growth_is_measured(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = growth.main(
        ["--sizes", "0.0003", "0.0009", "--tile", "0.0003", "--scan-x", "4", "--detector", "32", "--setting", "1x2",
         "--blocks", "6", "--few", "2"]
    )  # fmt: skip
    small, large = found["sizes"]
    assert large["gigabytes"] > 2 * small["gigabytes"]
    assert min(small["seconds"], large["seconds"]) > 0
    assert found["blocks"]["blocks"] == 6
    assert "1 TB in 4,000 blocks" in capsys.readouterr().out


def test_loading_is_measured(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    path, picture = tmp_path / "loading.json", tmp_path / "loading.png"
    options = ["--quick", "--json", str(path), "--picture", str(picture)]
    result = loading.main(options)
    cpu = result["microseconds"]
    assert min(cpu.values()) > 0
    parts = [cpu[f"limit: {part}"] for part in ("decode", "checksum", "gather")]
    assert cpu[loading.LIMIT] == pytest.approx(sum(parts))
    own = {f"stem_dask {s}, {mode}" for s in loading.SUFFIXES for mode in ("blocks", "in memory")}
    assert own < cpu.keys()
    assert list(result["first_batch"]) == list(loading.SUFFIXES)
    assert result["memory"][0]["peak"] > 0
    assert json.loads(path.read_text())["microseconds"] == cpu
    assert picture.stat().st_size > 10_000
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + len(cpu)
    assert sum(line.startswith("noise, K = ") for line in lines) == 3


def test_the_limit_gathers_by_a_table() -> None:
    patterns, out = np.arange(12, dtype="u2").reshape(4, 3), np.empty((2, 3), "f4")
    limits._gather(patterns, np.array([3, 1]), np.arange(12, dtype="f4") * 2, out)
    assert out.tolist() == [[18, 20, 22], [6, 8, 10]]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_command_is_watched() -> None:
    code = "held = bytearray(b'1') * 60_000_000; import time; time.sleep(0.15); print('done')"
    watched = watch([sys.executable, "-c", code], memory=True)
    assert watched.output == "done\n"
    assert 60_000_000 < watched.peak_bytes < 120_000_000
    assert 0 < watched.cpu_seconds < watched.seconds + 1
    with pytest.raises(SystemExit, match=r"(?s)exit code 3.*-c.*why"):
        watch([sys.executable, "-c", "print('why'); raise SystemExit(3)"])


@pytest.mark.skipif(sys.platform != "linux", reason="bytes are read from /proc")
def test_transposing_is_measured() -> None:
    """Every pass reads its file once; the rest is what Python itself reads."""
    options = ["--size", "0.02", "--detector", "64", "--slab", "1", "--block", "1", "--direct", "2"]
    found = detector_first.main(options)
    assert list(found) == ["transpose", "transposed", "scan first", "direct"]
    for name in ("transpose", "transposed", "scan first"):
        assert 1 <= found[name]["calls"] <= 1.2
        assert found[name]["rate"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="bytes are read from /proc")
def test_one_pass_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gb", "0.02", "--detector", "64", "--rounds", "1", "--mb-per-second", "2000"]
    found = once.main([*options, "crop.size=16", "validate.min_retention=0"])
    assert [*found] == ["two", "one"]
    assert all(one["rchar"] > 0.02e9 and one["seconds"] > 0 for one in found.values())
    assert "one / two: " in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process group")
def test_resuming_is_measured() -> None:
    found = resume.main(["--finished", "20"])
    assert found["finished"] >= 20
    assert 0 < found["after_cluster"] < found["seconds"]


def test_a_task_knows_its_patterns(tmp_path: Path) -> None:
    path = tmp_path / "scan.bin"
    np.arange(4 * 6, dtype="u2").tofile(path)
    task = Task("numpy", "crop", str(path), 8, (2, 2, 1, 5), "uint16", "", "", 2)
    assert task.patterns().shape == (4, 1, 5)
    assert [part for part, _ in task.batches(3)] == [slice(0, 3), slice(3, 4)]
    assert task.patterns()[0].ravel().tolist() == [4, 5, 6, 7, 8]


def test_centers_are_compared_with_the_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ((name, off),) = centers.main([str(tmp_path)])
    assert name == "drawn"
    assert (off["descan"] < off["disc"]).all()
    assert (off["disc"] < off["centroid"] / 5).all()
    assert "| drawn | " in capsys.readouterr().out


def test_scans_with_a_truth_are_found(shared_data: Path) -> None:
    found = {scan.name: scan for scan in centers.scans([shared_data / "trust"])}
    scan = found["dpc_domains_descan"]
    assert scan.patterns.shape[:2] == scan.beam.shape[:2]
    assert 1 < np.linalg.norm(scan.beam - scan.descan, axis=-1).max() < 1.5


def test_the_cost_of_a_disc_is_measured() -> None:
    (speed,) = centers.main(["--speed", "--detectors", "64", "--repeat", "1"])
    assert speed.detector == 64
    assert 0 < speed.centroid < 1
    assert 0 < speed.disc < 1
    assert 0 < speed.survey < 10
