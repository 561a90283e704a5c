"""A crop that reads its input once: the same bytes as with two passes, whatever happens on the way."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from stem_dask.core.batches import pieces
from stem_dask.core.errors import SourceError, StoreError
from stem_dask.core.machine import network_file_system
from stem_dask.core.model import Progress
from stem_dask.job import budget
from stem_dask.job.describe import describe_job, job_document
from stem_dask.job.plan import find_input, prepare
from stem_dask.job.run import run
from stem_dask.readers.flat import FlatFile
from stem_dask.writers.spool import PatternSpool

#: rows of the scan, one of which is a block; the sample has 256 of the 24 x 16 patterns, and none of row 1
N_ROWS, BLOCK = 24, 16 * 48 * 44 * 2 / 2**20


@pytest.fixture(scope="module")
def scan() -> np.ndarray:
    """(24, 16, 48, 44) uint16: a disc that wanders over the scan, in Poisson noise."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:48, :44]
    data = np.zeros((N_ROWS, 16, 48, 44), np.uint16)
    for i, j in np.ndindex(N_ROWS, 16):
        disc = (y - 22 - i / 8) ** 2 + (x - 20 + j / 8) ** 2 < 25
        data[i, j] = rng.poisson(60.0 * disc + 0.02)
    data.setflags(write=False)
    return data


@pytest.fixture
def path(scan: np.ndarray, tmp_path: Path) -> Path:
    np.save(tmp_path / "scan.npy", scan)
    return tmp_path / "scan.npy"


@pytest.fixture(scope="module")
def unchanged(scan: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for several tests, which leave it as it is."""
    path = tmp_path_factory.mktemp("scan") / "scan.npy"
    np.save(path, scan)
    return path


@pytest.fixture(scope="module")
def reference(
    unchanged: Path, shared_cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of the crop in two passes."""
    folder = tmp_path_factory.mktemp("reference")
    output = {
        "path": str(folder / "out.zarr"),
        "figure": False,
        "chunk_mb": BLOCK,
        "export": ["pt"],
    }
    config = {"input": {"path": str(unchanged)}, "analyze": {"passes": "two"}, "output": output}
    run(config, connection=shared_cluster)
    return folder


Make = Callable[..., Any]


@pytest.fixture
def make(make_config: Any, tmp_path: Path) -> Make:
    """A config for one or two passes; its output is in a folder of that name."""

    def config(path: Path, passes: str, **sections: Any) -> Any:
        (tmp_path / passes).mkdir(exist_ok=True)
        analyze = {"passes": passes, **sections.pop("analyze", {})}
        output = {"chunk_mb": BLOCK, **sections.pop("output", {})}
        return make_config(path, f"{passes}/out.zarr", analyze=analyze, output=output, **sections)

    return config


def without_config(text: bytes) -> dict[str, Any]:
    """A zarr.json without the options, in which the two runs differ."""
    document: dict[str, Any] = json.loads(text)
    document["attributes"].pop("config", None)
    return document


def assert_same(folder: Path, reference: Path | None = None) -> None:
    """Stores, exports and results of both runs are equal, and nothing is left of what was kept."""
    one, two = folder / "one", reference or folder / "two"
    names = sorted(p.relative_to(two) for p in (two / "out.zarr").rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(one) for p in (one / "out.zarr").rglob("*") if p.is_file())
    for name in names:
        ours, theirs = (one / name).read_bytes(), (two / name).read_bytes()
        if name == Path("out.zarr/zarr.json"):
            assert without_config(ours) == without_config(theirs)
        else:
            assert ours == theirs, name
    for export in ("out.pt", "out.hspy"):
        if (two / export).exists():
            assert (one / export).read_bytes() == (two / export).read_bytes()
    results = [json.loads((where / "out_results.json").read_text()) for where in (one, two)]
    for found in results:
        for name in (
            "config", "processing_time", "speed", "memory", "peak_memory", "commands", "cluster",
        ):  # fmt: skip
            found.pop(name, None)
        found["sizes"].pop("stored_bytes")  # with the config
    assert results[0] == results[1]
    left = {p.name for p in (one / "out.run").iterdir()}
    assert left == {"journal", "report.json", "run.json"}


def both(make: Make, path: Path, cluster: Any, **sections: Any) -> list[str]:
    """Run with two passes and with one; what the second says of its passes."""
    said: list[str] = []
    run(make(path, "two", **sections), connection=cluster)
    run(make(path, "one", **sections), connection=cluster, say=said.append)
    return [line.removeprefix("passes      ") for line in said if line.startswith("passes")]


CASES: dict[str, dict[str, Any]] = {
    "fixed": {"output": {"figure": True, "export": ["hspy"]}},
    "descan": {"crop": {"align": "descan"}},
    "pattern": {"crop": {"align": "pattern"}, "downsample": {"factor": 2}},
    "window": {"crop": {"window": [12, 36, 10, 30]}, "validate": {"min_retention": 0}},
    "k_max": {"crop": {"criterion": "k_max", "n_alpha": 1.5}},
    "centroid": {"analyze": {"center_method": "centroid", "ignore_bad_pixels": False, "radius_metric": "circle"}},
    "mask": {"input": {"mask": {"pixels": [[22, 20]], "rows": [4]}, "mask_fill": "median"}},
    "floats": {"output": {"normalize": "log-zscore"}, "downsample": {"factor": 2, "method": "gauss"}},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_pass_gives_the_bytes_of_two(
    name: str, path: Path, make: Make, tmp_path: Path, shared_cluster: Any
) -> None:
    said = both(make, path, shared_cluster, **CASES[name])
    assert said == ["one: analyze.passes is one"]
    assert_same(tmp_path)


def test_references_and_real_numbers(
    scan: np.ndarray, path: Path, make: Make, tmp_path: Path, shared_cluster: Any
) -> None:
    """Dark and gain make float32 patterns, whose sums depend on the order of the additions."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "dark.npy", rng.random((48, 44)) * 0.01)
    np.save(tmp_path / "gain.npy", 1 + rng.random((48, 44)) * 0.1)
    references = {"dark": str(tmp_path / "dark.npy"), "gain": str(tmp_path / "gain.npy")}
    sections = {"input": references, "analyze": {"threshold": 0.5}}
    assert len(both(make, path, shared_cluster, **sections)) == 1
    assert_same(tmp_path)


@pytest.mark.parametrize("kind", ["list", ">i4"])
def test_lists_and_other_byte_orders(
    kind: str, scan: np.ndarray, make: Make, tmp_path: Path, shared_cluster: Any
) -> None:
    data = scan.reshape(-1, 48, 44) if kind == "list" else scan.astype(kind)
    np.save(tmp_path / "other.npy", data)
    both(make, tmp_path / "other.npy", shared_cluster)
    assert_same(tmp_path)


def test_processes(unchanged: Path, reference: Path, make: Make, tmp_path: Path) -> None:
    processes = {"kind": "local", "n_workers": 2, "threads_per_worker": 1}
    run(make(unchanged, "one", cluster=processes, output={"export": ["pt"]}))
    found = json.loads((tmp_path / "one" / "out_results.json").read_text())
    assert found["cluster"].startswith("local")
    assert_same(tmp_path, reference)


def test_a_common_size(path: Path, make: Make, tmp_path: Path, shared_cluster: Any) -> None:
    """Larger than what the sample needs alone, and inside of what is kept, or not."""
    said: list[str] = []
    for size, again in (((28, 28), False), ((40, 40), True)):
        sections = {"crop": {"size": "common"}}
        for passes in ("two", "one"):
            shutil.rmtree(tmp_path / passes, ignore_errors=True)
            config = make(path, passes, **sections)
            run(config, connection=shared_cluster, common=size, say=said.append)
        assert any(line.startswith("passes      all blocks") for line in said) == again
        assert_same(tmp_path)


def test_an_unreadable_block(
    scan: np.ndarray, make: Make, tmp_path: Path, shared_cluster: Any
) -> None:
    """Row 1, of which the sample has nothing."""
    store = tmp_path / "input.zarr"
    zarr.create_array(str(store), data=scan, chunks=(1, 16, 48, 44))
    (store / "c" / "1" / "0" / "0" / "0").write_bytes(b"not what was written")
    both(make, store, shared_cluster, on_error="quarantine")
    assert_same(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scan rows of the input that were read; the patterns of a sample are, too."""
    found: list[int] = []
    plain = FlatFile.read_into

    def read_into(file: FlatFile, part: Any, out: np.ndarray, *more: Any) -> None:
        if file.path.endswith("scan.npy") and out.shape[:2] == (1, 16):
            found.append(part[0].start)
        plain(file, part, out, *more)

    monkeypatch.setattr(FlatFile, "read_into", read_into)
    return found


@pytest.mark.parametrize("align", ["fixed", "pattern"])
def test_an_outlier_that_the_sample_misses(
    align: str, scan: np.ndarray, path: Path, make: Make, tmp_path: Path, shared_cluster: Any,
    reads: list[int],
) -> None:  # fmt: skip
    """A fixed window changes for all blocks, one around each pattern leaves what was kept in a single block."""
    data = scan.copy()
    data[1, 3] = np.roll(scan[1, 3], (9, 8), (0, 1))
    np.save(path, data)
    centers = {"center_method": "centroid"}  # which follow it
    sections = {"crop": {"align": align, "coverage": 1.0}, "analyze": centers}
    run(make(path, "two", **sections), connection=shared_cluster)
    reads.clear()
    said: list[str] = []
    run(make(path, "one", **sections), connection=shared_cluster, say=said.append)
    again = "1 of 24 blocks are" if align == "pattern" else "all blocks are"
    assert f"passes      {again} read again" in "\n".join(said)
    often = [1 if align == "pattern" and row != 1 else 2 for row in range(N_ROWS)]
    assert [reads.count(row) for row in range(N_ROWS)] == often
    assert_same(tmp_path)


def test_every_block_is_read_once(
    path: Path, make: Make, shared_cluster: Any, reads: list[int]
) -> None:
    config = make(path, "one", output={"figure": True})
    run(config, connection=shared_cluster)
    assert sorted(reads) == list(range(N_ROWS))


def test_bytes_read(
    make_config: Any, tmp_path: Path, shared_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an input of 94 MB: each byte once, and the sample. Of all files, own ones included: less than with two passes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96]
    patterns = rng.poisson(50.0 * ((y - 48) ** 2 + (x - 47) ** 2 < 50) + 0.01, (64, 96, 96))
    data = np.tile(patterns.astype("u2"), (80, 1, 1, 1))
    np.save(tmp_path / "large.npy", data)
    plain, of_input = os.preadv, list[int]()

    def preadv(file: int, buffers: Any, position: int) -> int:
        n = plain(file, buffers, position)
        if os.readlink(f"/proc/self/fd/{file}").endswith("large.npy"):
            of_input.append(n)
        return n

    monkeypatch.setattr(os, "preadv", preadv)
    total = {}
    for name, passes in (("first", "two"), ("two", "two"), ("one", "one")):
        of_input.clear()
        before = bytes_read()
        options = {"analyze": {"passes": passes}, "output": {"chunk_mb": 8}}
        config = make_config(tmp_path / "large.npy", f"{name}.zarr", **options)
        run(config, connection=shared_cluster)
        total[name] = bytes_read() - before
    assert sum(of_input) == data.nbytes + 256 * 96 * 96 * 2 <= 1.1 * data.nbytes
    assert sum(of_input) < total["one"] < total["two"]


def bytes_read() -> int:
    """By this process, from the cache of the system or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def stopping(stage: str, done: int) -> Progress:
    def step(step: Any) -> None:
        if step.stage == stage and step.done == done:
            raise KeyboardInterrupt

    return step


@pytest.mark.parametrize(
    ("stage", "done"),
    [("analyze", 1), ("analyze", 24), ("crop", 3), ("crop", 24), ("export pt", 1)],
)
def test_resuming(
    stage: str, done: int, unchanged: Path, reference: Path, make: Make, tmp_path: Path,
    shared_cluster: Any,
) -> None:  # fmt: skip
    """The passes stay as they were begun, also if the option changes."""
    config = make(unchanged, "one", output={"export": ["pt"]})
    with pytest.raises(KeyboardInterrupt):
        run(config, connection=shared_cluster, progress=stopping(stage, done))
    kept = tmp_path / "one" / "out.run" / "kept"
    assert kept.is_dir() == (stage != "export pt")
    two = config.analyze.model_copy(update={"passes": "two"})
    said: list[str] = []
    run(config.model_copy(update={"analyze": two}), connection=shared_cluster, say=said.append)
    assert "passes      one: analyze.passes is one" in said
    assert_same(tmp_path, reference)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_kept_block_that_was_damaged_is_made_again(
    damage: str, unchanged: Path, reference: Path, make: Make, tmp_path: Path, shared_cluster: Any,
    reads: list[int],
) -> None:  # fmt: skip
    config = make(unchanged, "one", output={"export": ["pt"]})
    with pytest.raises(KeyboardInterrupt):
        run(config, connection=shared_cluster, progress=stopping("crop", 2))
    file = tmp_path / "one" / "out.run" / "kept" / "000005.block"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    if damage == "gone":
        file.unlink()
    reads.clear()
    run(config, connection=shared_cluster)
    assert reads == [5]
    assert_same(tmp_path, reference)


def test_the_input_must_not_change_in_between(
    scan: np.ndarray, path: Path, make: Make, shared_cluster: Any
) -> None:
    def change(step: Any) -> None:
        if step.stage == "crop" and step.done == 3:
            np.save(path, scan[:, :, ::-1])

    with pytest.raises(SourceError, match="changed while it was read"):
        run(make(path, "one"), connection=shared_cluster, progress=change)


# --- what was kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u2", "f4", "u8"])
@pytest.mark.parametrize("shape", [(3, 5, 7, 6), (17, 200, 300), (1, 1, 900, 800)])
def test_a_spool_of_patterns(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Batches of any size give back what was written; damage is found wherever it is."""
    rng = np.random.default_rng(0)
    data = (rng.random(shape) * 200).astype(dtype)
    spool = PatternSpool(str(tmp_path / "kept"))
    spool.create(resume=False)
    region = tuple(slice(0, n) for n in shape[:-2])
    spool.write(4, region, {"patterns": data})
    for most in (1, 4, 1000):
        back = spool.patterns(4, shape, np.dtype(dtype), most)
        assert np.array_equal(np.asarray(back), data)
        lengths = [len(piece) for piece in pieces(back)]
        assert max(lengths) <= most
        assert sum(lengths) == np.prod(shape[:-2])
    file = tmp_path / "kept" / "000004.block"
    content = file.read_bytes()
    for place in (3, 7, 8, len(content) // 2, len(content) - 1):
        wrong = bytearray(content)
        wrong[place] ^= 128
        file.write_bytes(wrong)
        with pytest.raises(StoreError, match=r"000004\.block does not hold what was written"):
            np.asarray(spool.patterns(4, shape, np.dtype(dtype), 4))


# --- which it is ------------------------------------------------------------------------------------------------


def reason(config: Any) -> tuple[int, str]:
    return budget.passes(config, find_input(config), 100)


def test_auto(path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input is read once if it would not stay in the cache, or comes over a network."""
    n_bytes = find_input(make(path, "auto")).n_bytes
    monkeypatch.setattr(budget, "usable_cores", lambda: 0)
    monkeypatch.setattr(budget, "free_memory", lambda: 2 * n_bytes)
    monkeypatch.setattr(budget, "network_file_system", lambda path: "")
    assert reason(make(path, "auto")) == (2, "")
    monkeypatch.setattr(budget, "free_memory", lambda: 2 * n_bytes - 2)
    n, why = reason(make(path, "auto"))
    assert n == 1
    assert why == "the input is larger than half of the 3.24 MB of memory that are free to cache it"
    assert reason(make(path, "two")) == (2, "")
    monkeypatch.setattr(budget, "free_memory", lambda: 10 * n_bytes)
    monkeypatch.setattr(budget, "network_file_system", lambda path: "nfs4")
    assert reason(make(path, "auto")) == (1, "the input is on a network file system (nfs4)")
    monkeypatch.setattr(budget, "is_url", lambda path: True)
    assert reason(make(path, "auto")) == (1, "the input is in an object store")


def test_what_takes_two_passes(
    path: Path, make: Make, make_config: Any, shared_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line gives the reason, and the output is that of two passes."""

    def said(config: Any) -> str:
        lines: list[str] = []
        run(config, connection=shared_cluster, say=lines.append)
        (line,) = [line for line in lines if line.startswith("passes")]
        return line.removeprefix("passes      ")

    noise = np.random.default_rng(0).integers(0, 2**16, (6, 16, 48, 44), np.uint16)
    np.save(path, noise)  # that no codec makes smaller
    lax = {"validate": {"min_retention": 0}}
    line = said(make(path, "one", crop={"size": [24, 24]}, **lax))
    assert line.startswith("two: analyze.passes is one, but 5")
    assert line.endswith("% of its size would be kept for the crop")
    np.save(path, noise // 10000)
    monkeypatch.setattr(budget, "free_memory", lambda: 0)
    line = said(make_config(path, "auto.zarr", crop={"size": [36, 36]}, **lax))
    assert line.startswith("two: the input is larger than half of the 0 B of memory")
    assert line.endswith(", but windows take 92% of the detector")
    np.save(path, np.zeros_like(noise))
    with pytest.raises(SourceError, match="every pattern is empty"):
        said(make_config(path, "empty.zarr"))


def test_a_small_disk(
    path: Path, make: Make, shared_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(path, "one", output={"path": str(path.parent / "one" / "out.zarr"), "export": []})
    found = find_input(config)
    least = budget.disk_need(config, found, N_ROWS, (20, 20)).least
    monkeypatch.setattr(budget, "free_bytes", lambda folder: least + 100_000)
    said: list[str] = []
    run(config, connection=shared_cluster, say=said.append)
    (line,) = [line for line in said if line.startswith("passes")]
    assert line.startswith(
        "passes      two: analyze.passes is one, but the disk is too small: up to"
    )


def test_check_projects_what_is_kept(path: Path, make: Make, tmp_path: Path) -> None:
    texts = {}
    for passes in ("one", "two"):
        plan = prepare(make(path, passes))
        texts[passes] = describe_job(plan)
        document = job_document(plan)
        assert document["passes"] == {"one": 1, "two": 2}[passes]
        if passes == "one":
            most = document["disk_most"]
    kept = budget.usual_kept_bytes(make(path, "one"), find_input(make(path, "one")))
    assert most - document["disk_most"] == kept
    assert "reads       1.62 MB, once (analyze.passes is one)" in texts["one"]
    assert "reads       1.62 MB, twice: once to analyze, once to crop" in texts["two"]
    assert any(line.startswith("keeps       about ") for line in texts["one"])
    assert not any(line.startswith("keeps") for line in texts["two"])


MOUNTS = r"""/dev/root / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/data /data nfs4 rw 0 0
/dev/sdb1 /data/local xfs rw 0 0
sshfs#lab: /home/with\040space fuse.sshfs rw 0 0
/dev/sdc1 /mnt/stick fuseblk rw 0 0
//nas/share /mnt cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/scan.dm4", ""), ("/data/scan.dm4", "nfs4"), ("/data", "nfs4"), ("/database/scan.dm4", ""),
        ("/data/local/scan.dm4", ""), ("/home/with space/a.mib", "fuse.sshfs"), ("/mnt/stick/a", ""),
        ("/mnt/a/b", "cifs"),
    ],
)  # fmt: skip
def test_network_file_systems(path: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    assert network_file_system(path, tmp_path / "mounts") == kind
    assert network_file_system(path, tmp_path / "none") == ""
