"""What a job is said to need, against what it takes."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

from stem_dask.core.batches import PIECE_BYTES
from stem_dask.core.errors import DiskFullError, MemoryBudgetError
from stem_dask.core.model import USABLE_SHARE, WORKER_BYTES, Worker
from stem_dask.engine.state import RunState
from stem_dask.job import budget as projection
from stem_dask.job.budget import (
    PASSING,
    DiskNeed,
    Footprint,
    check_memory,
    disk_need,
    enough_room,
    fitting_block,
    memory_of,
    shapes,
)
from stem_dask.job.plan import find_input
from stem_dask.job.run import run
from stem_dask.job.summary import tree_bytes
from stem_dask.readers.containers import HDF5_BYTES


def noise(path: Path, dtype: str = "u2") -> Path:
    """A scan (8, 6) of 64 x 48 patterns that no codec makes much smaller."""
    rng = np.random.default_rng(0)
    if dtype[0] == "f":
        data = rng.random((8, 6, 64, 48)).astype(dtype)
    else:
        data = rng.integers(0, np.iinfo(dtype).max, (8, 6, 64, 48), dtype)
    np.save(path, data)
    return path


# --- disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "sections"),
    [
        ("u1", {}),
        ("f4", {"crop": {"size": 20}}),
        ("u2", {"crop": {"size": [20, 48]}, "downsample": {"factor": 2}}),
        ("u2", {"crop": {"enabled": False}, "downsample": {"factor": 2, "reduce": "sum"}}),
        ("u1", {"output": {"export": [], "dtype": "float32"}}),
    ],
)
def test_bytes_on_disk(
    dtype: str, sections: dict[str, Any], make_config: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """What is there before the end lies between the two limits, for data that cannot be compressed."""
    output = {"export": ["pt", "hspy"], "chunk_mb": 0.1, **sections.get("output", {})}
    path = noise(tmp_path / "noise.npy", dtype)
    config = make_config(path, **{**sections, "output": output, "validate": {"min_retention": 0}})
    found = find_input(config)
    made = []
    complete = RunState.complete

    def measure(state: RunState, report: Any) -> None:
        names = ("out.zarr", "out.pt", "out.hspy", "out.run")
        made.append(sum(tree_bytes(tmp_path / name) for name in names))
        complete(state, report)

    monkeypatch.setattr(RunState, "complete", measure)
    results = run(config).results
    window = results["analysis"]["cropped_shape"] if config.crop.enabled else None
    block = fitting_block(config, found, Worker(None, 1))
    n_blocks = int(np.prod([-(-n // b) for n, b in zip((8, 6), block, strict=True)]))
    need = disk_need(config, found, n_blocks, window)
    overhead = 200_000  # axes, metadata, names: what does not grow with the data
    assert need.least <= made[0] <= need.most + overhead
    assert disk_need(config, found, n_blocks).least <= need.least


@pytest.mark.parametrize("free", [99, 100, 149, 150])
def test_free_space(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(projection, "free_bytes", lambda folder: free)
    (tmp_path / "made").write_bytes(bytes(10))
    room = enough_room(tmp_path, DiskNeed(110, 160), [str(tmp_path / "made")], warn=True)
    if free < 100:
        told = r"at least 100 B more .* up to 150 B .* has 99 B free"
        with pytest.raises(DiskFullError, match=told), room:
            pass
    else:
        with room:
            assert ("may become full" in caplog.text) == (free < 150)


def test_free_space_of_a_folder_that_will_be_made(tmp_path: Path) -> None:
    here = projection.free_bytes(tmp_path)
    assert projection.free_bytes(tmp_path / "a" / "b") == pytest.approx(here, rel=0.1)


@pytest.mark.parametrize("kind", [DiskFullError, OSError])
def test_a_full_disk_is_told_with_the_need(kind: type[OSError], tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(bytes(1000))
    error = kind("no room") if kind is DiskFullError else OSError(28, "no room", "file")
    with (
        pytest.raises(DiskFullError, match=r"no room.*up to 4 kB more \(4,000 bytes\)"),
        enough_room(tmp_path, DiskNeed(0, 5000), [str(tmp_path / "made")]),
    ):
        raise error


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one pattern."""
    monkeypatch.setattr(projection, "READ_PIECE_BYTES", 6144)


@pytest.mark.usefixtures("single")
def test_a_block_that_fits(make_config: Any, tmp_path: Path) -> None:
    """By hand: uint16 patterns of 64 x 48 pass one at a time; a .pt holds 3 x 6,144 bytes a position."""
    config, found = both(make_config, noise(tmp_path / "noise.npy"), output={"export": ["pt"]})
    sizes = memory_of(config, found)
    assert sizes["crop"] == Footprint(PASSING * 6144 + 8 * 6144 + 8 * 3072, 8 + 2 * 8)
    normalized = both(make_config, tmp_path / "noise.npy", output={"normalize": "log-zscore"})
    assert memory_of(*normalized)["crop"] == Footprint(PASSING * 12288 + 8 * 12288, 8)
    assert sizes["export"] == Footprint(0, 3 * 6144)
    limit = round((WORKER_BYTES + 2 * 12 * 3 * 6144) / USABLE_SHARE) + 100
    assert fitting_block(config, found, Worker(limit, 2)) == (2, 6)
    need = check_memory(config, found, (2, 6), Worker(limit, 2))
    assert need == WORKER_BYTES + 2 * sizes["export"].bytes(12)
    for kind in ("hspy", "h5"):  # whose blocks are packed as a whole
        more = both(make_config, tmp_path / "noise.npy", output={"export": ["pt", kind]})
        assert memory_of(*more)["export"] == Footprint(0, 4 * 6144)
    assert "export" not in memory_of(*both(make_config, tmp_path / "noise.npy"))


def test_what_passes(make_config: Any, tmp_path: Path) -> None:
    """Buffers of a piece each, as wide as the widest type on the way; chunks of HDF5 wait until their block is complete.

    With sums of the patterns and of their logarithms; of float patterns, the logarithms of four.
    """
    path = noise(tmp_path / "noise.npy")
    piece = PIECE_BYTES // 6144 * 6144 // 2
    config, found = both(make_config, path)
    assert memory_of(config, found)["crop"].fixed == PASSING * piece * 2 + 8 * 6144 + 8 * 3072
    config, found = both(make_config, path, downsample={"factor": 4})
    logs = 8 * (3072 // 16) * (1 + 4)
    assert memory_of(config, found)["crop"].fixed == PASSING * piece * 4 + 8 * 6144 // 8 + logs
    config, found = both(make_config, path, name="out.h5", crop={"enabled": False})
    assert memory_of(config, found)["crop"].per_position == 8 + 2 * 6144


def test_a_block_that_does_not(make_config: Any, tmp_path: Path) -> None:
    """Patterns of 8 MiB: four fit, sixteen do not."""
    np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint16, (4, 4, 2048, 2048))
    config = make_config(tmp_path / "large.npy", output={"chunk_mb": 128, "export": ["pt"]})
    found = find_input(config)
    limit = 435 * 10**6
    block = fitting_block(config, found, Worker(limit, 1))
    assert block == (4, 4)  # as it was asked for
    told = r"blocks of 16 patterns and has 435 MB; output\.chunk_mb=32 fits"
    with pytest.raises(MemoryBudgetError, match=told):
        check_memory(config, found, block, Worker(limit, 1))
    smaller = make_config(tmp_path / "large.npy", output={"chunk_mb": 32, "export": ["pt"]})
    block = fitting_block(smaller, found, Worker(limit, 1))
    assert check_memory(smaller, found, block, Worker(limit, 1)) <= limit
    auto = make_config(tmp_path / "large.npy", output={"export": ["pt"]})
    assert fitting_block(auto, found, Worker(limit, 1)) == block == (1, 4)


def test_not_even_one_pattern(make_config: Any, tmp_path: Path) -> None:
    config = make_config(noise(tmp_path / "noise.npy"))
    with pytest.raises(
        MemoryBudgetError, match=r"200 MB for 3 threads cannot hold .* needs 271 MB"
    ):
        fitting_block(config, find_input(config), Worker(200 * 10**6, 3))


def test_copies(make_config: Any, tmp_path: Path) -> None:
    """Another order of the axes takes more; a mask, another byte order and half precision a piece at a time."""
    plain = memory_of(*both(make_config, noise(tmp_path / "a.npy")))["analyze"].per_position
    np.save(tmp_path / "mask.npy", np.zeros((64, 48), bool))
    mask = {"mask": str(tmp_path / "mask.npy"), "path": str(tmp_path / "a.npy")}
    masked = memory_of(*both(make_config, tmp_path / "a.npy", input=mask))
    assert masked["analyze"].per_position == plain
    np.save(tmp_path / "b.npy", np.load(tmp_path / "a.npy").astype(">u2"))
    swapped = memory_of(*both(make_config, tmp_path / "b.npy"))
    assert swapped["analyze"].per_position == plain
    half = memory_of(*both(make_config, noise(tmp_path / "c.npy", "f2")))
    assert half["analyze"].per_position == plain
    order = {"scan_order": "detector_first", "path": str(tmp_path / "a.npy")}
    turned = memory_of(*both(make_config, tmp_path / "a.npy", input=order))
    n_radii = 9  # of the detector of 8 x 6 that the file then has
    assert turned["analyze"].per_position == 2 * 8 * 6 * 2 + 4 * n_radii + 80


def test_what_only_looks_other_is_no_copy(make_config: Any, tmp_path: Path) -> None:
    """Patterns that are turned, or of a folded stack, come a few at a time, too; and so do those of a store."""
    path = noise(tmp_path / "a.npy")
    plain = memory_of(*both(make_config, path))
    assert memory_of(*both(make_config, path, input={"path": str(path), "flip": True})) == plain
    np.save(tmp_path / "list.npy", np.load(path).reshape(48, 64, 48))
    folded = {"path": str(tmp_path / "list.npy"), "scan_shape": [8, 6]}
    assert memory_of(*both(make_config, tmp_path / "list.npy", input=folded)) == plain
    zarr.create_array(str(tmp_path / "in.zarr"), data=np.load(path))
    stored = memory_of(*both(make_config, tmp_path / "in.zarr"))
    assert stored["analyze"].fixed == plain["analyze"].fixed


def test_an_older_output_is_no_room(
    beam_file: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What will be replaced stays until the new one is complete: its bytes are not taken for the new one's."""
    run(make_config(beam_file))
    monkeypatch.setattr(projection, "free_bytes", lambda folder: 1000)
    with pytest.raises(DiskFullError, match=r"at least .* more are needed.*has 1 kB free"):
        run(make_config(beam_file, output={"overwrite": True}))


def both(make_config: Any, path: Path, **sections: Any) -> Any:
    config = make_config(path, **sections)
    return config, find_input(config)


def test_shapes_of_a_window_that_is_known(make_config: Any, tmp_path: Path) -> None:
    config, found = both(make_config, noise(tmp_path / "a.npy"), downsample={"factor": 4})
    guessed, known = shapes(config, found), shapes(config, found, (32, 48))
    assert (guessed.window, guessed.out, guessed.known) == ((64, 48), (16, 12), False)
    assert (known.window, known.out, known.dtype) == ((32, 48), (8, 12), np.float32)


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("kind", ["h5", "zarr", "shards"])
@pytest.mark.parametrize("more", [{}, {"flip": True}, {"scan_roi": [0, 4, 0, 6]}])
def test_a_chunk_is_held_while_it_is_decoded(
    make_config: Any, tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    """As it lies in the file and decoded: it may be larger than the block that is taken from it."""
    data, path = (
        np.load(noise(tmp_path / "a.npy")),
        tmp_path / f"in.{kind.replace('shards', 'zarr')}",
    )
    if kind == "h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("d", data=data, chunks=(8, 6, 32, 48), compression="gzip")
    elif kind == "zarr":
        zarr.create_array(str(path), data=data, chunks=(8, 6, 32, 48))
    else:
        zarr.create_array(str(path), data=data, chunks=(1, 6, 32, 48), shards=(8, 6, 32, 48))
    config, found = both(
        make_config, path, input={"path": str(path), **more}, output={"export": ["pt"]}
    )
    sizes, chunk = memory_of(config, found), 8 * 6 * 32 * 48 * 2
    library = HDF5_BYTES if kind == "h5" else 0
    assert sizes["read"].fixed == 2 * chunk + library
    assert sizes["analyze"].fixed == (16 + PASSING) * 6144 + library
    chunk += library // 2
    assert sizes["read"].per_position == 6144 * (1 + ("flip" in more))
    limit = round((WORKER_BYTES + 2 * chunk + 6 * 4 * 6144) / USABLE_SHARE)
    assert int(np.prod(fitting_block(config, found, Worker(limit, 1)))) >= 6
    with pytest.raises(MemoryBudgetError, match="cannot hold a single pattern"):
        fitting_block(config, found, Worker(round((WORKER_BYTES + 2 * chunk) / USABLE_SHARE), 1))
