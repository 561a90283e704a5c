"""analyze.ingest: the first pass keeps a compressed copy, and the second does not look at the input again."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from stem_dask.config import load_config
from stem_dask.describe import describe_job
from stem_dask.errors import ConfigError
from stem_dask.pipeline import run
from stem_dask.preflight import prepare


def chunk_files(store: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if not name.endswith("zarr.json")}


@pytest.fixture
def plain(beam_file: Path, make_config: Any, tmp_path: Path) -> dict[str, bytes]:
    run(make_config(beam_file, "plain.zarr", output={"chunk_mb": 0.01}))
    return chunk_files(tmp_path / "plain.zarr")


def test_the_crop_does_not_look_at_the_input_again(
    beam_file: Path, make_config: Any, tmp_path: Path, plain: dict[str, bytes]
) -> None:
    """Stopped in the crop, with other patterns in the input from then on: the copy is all that counts."""
    config = make_config(
        beam_file, "kept.zarr", analyze={"ingest": True}, output={"chunk_mb": 0.01}
    )

    def stop(step: Any) -> None:
        if step.stage == "crop":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, progress=stop)
    assert list((tmp_path / "kept.run").glob("*ingested*"))
    before = beam_file.stat()
    np.save(beam_file, np.full_like(np.load(beam_file), 7))
    os.utime(beam_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    stages: list[tuple[str, int]] = []
    run(config, progress=lambda step: stages.append((step.stage, step.done)))
    assert {stage for stage, _ in stages} == {"ingest", "crop"}
    assert chunk_files(tmp_path / "kept.zarr") == plain
    assert not list((tmp_path / "kept.run").glob("*ingested*"))
    attrs = zarr.open_group(tmp_path / "kept.zarr", mode="r")["patterns"].attrs.asdict()
    expected = zarr.open_group(tmp_path / "plain.zarr", mode="r")["patterns"].attrs.asdict()
    assert attrs == expected


def test_it_is_the_same_job(beam_file: Path, make_config: Any, plain: dict[str, bytes]) -> None:
    """Where the patterns wait changes no byte, so that a complete output is complete."""
    again = make_config(
        beam_file, "plain.zarr", analyze={"ingest": True}, output={"chunk_mb": 0.01}
    )
    assert prepare(again).complete


def test_with_hot_pixels_masked(beam_file: Path, make_config: Any, tmp_path: Path) -> None:
    data = np.load(beam_file)
    data[..., 3, 5] = 4000
    np.save(tmp_path / "hot.npy", data)
    stages: set[str] = set()
    for name, ingest in (("a.zarr", False), ("b.zarr", True)):
        config = make_config(
            tmp_path / "hot.npy",
            name,
            input={"path": str(tmp_path / "hot.npy"), "mask": "auto"},
            analyze={"ingest": ingest},
        )
        run(config, progress=lambda step: stages.add(step.stage))
    assert stages == {"analyze", "analyze again", "ingest", "crop"}
    assert chunk_files(tmp_path / "a.zarr") == chunk_files(tmp_path / "b.zarr")


def test_check_says_that_the_input_is_read_once(beam_file: Path, make_config: Any) -> None:
    config = make_config(beam_file, analyze={"ingest": True})
    told = "\n".join(describe_job(config, prepare(config).found))
    assert "once: the crop reads a compressed copy in the run's folder" in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("crop.enabled=false", "analyze.ingest needs crop.enabled: true"),
        ("analyze.from=other.zarr", "with analyze.from nothing is analyzed"),
    ],
)
def test_where_there_is_nothing_to_keep(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config("configs/crop.yaml", ["analyze.ingest=true", override])
