"""Dark and gain: what they do to the patterns, what is refused, and that their content is part of the job."""

import re

import numpy as np
import pytest
import xarray as xr
import zarr

from stem_dask.core.batches import PIECE_BYTES
from stem_dask.core.errors import ConfigError, OutputExistsError
from stem_dask.job.budget import PASSING, memory_of, shapes
from stem_dask.job.plan import find_input, prepare
from stem_dask.job.run import run
from stem_dask.stages import correct as planes
from stem_dask.stages.open import open_patterns


@pytest.fixture
def files(beam_file, tmp_path):
    """The beam with a background and uneven pixels, and the references that take both away."""
    rng = np.random.default_rng(0)
    dark = rng.integers(1, 9, (40, 36)).astype(np.float32)
    gain = 2.0 ** rng.integers(-2, 3, (40, 36))
    seen = np.load(beam_file) * 4 / gain + dark
    np.save(tmp_path / "seen.npy", seen.astype(np.uint16))
    np.save(tmp_path / "dark.npy", dark)
    np.save(tmp_path / "gain.npy", gain)
    return {name: str(tmp_path / f"{name}.npy") for name in ("dark", "gain")}


def test_a_corrected_file_is_the_clean_one(files, beam_file, tmp_path, make_config):
    clean = 4 * np.load(beam_file).astype(np.float32)
    patterns = open_patterns(tmp_path / "seen.npy", **files)
    assert patterns.dtype == np.float32
    assert patterns.attrs["corrected"] == ["dark", "gain"]
    np.testing.assert_array_equal(patterns.values, clean)
    arrays = {name: np.load(path) for name, path in files.items()}
    np.testing.assert_array_equal(open_patterns(tmp_path / "seen.npy", **arrays).values, clean)
    masked = open_patterns(tmp_path / "seen.npy", **files, mask={"pixels": [[3, 4]]})
    assert not masked.values[..., 3, 4].any()  # the mask comes last
    config = make_config(tmp_path / "seen.npy", input=files, crop={"size": 20})
    outcome = run(config)
    root = xr.open_zarr(config.output.path)
    analysis = xr.open_zarr(config.output.path, group="analysis")
    y, x = int(analysis.window_y[0, 0]), int(analysis.window_x[0, 0])
    np.testing.assert_array_equal(root.patterns.values, clean[:, :, y : y + 20, x : x + 20])
    assert root.patterns.dtype == np.float32
    assert np.array_equal(analysis.total, clean.sum((2, 3)))
    assert outcome.results["input"]["dtype"] == "uint16"
    assert outcome.results["sizes"]["input_bytes"] == 6 * 5 * 40 * 36 * 2


def test_blocks_that_cannot_be_read_are_zeros(files, tmp_path, make_config):
    store = tmp_path / "input.zarr"
    zarr.create_array(str(store), data=np.load(tmp_path / "seen.npy"), chunks=(2, 5, 40, 36))
    (store / "c" / "1" / "0" / "0" / "0").write_bytes(b"not what was written")
    block = {"chunk_mb": 10 * 40 * 36 * 2 / 2**20}
    config = make_config(store, input=files, output=block, on_error="quarantine")
    assert run(config).exit_code == 7
    patterns = xr.open_zarr(config.output.path).patterns.values
    assert not patterns[2:4].any()
    assert patterns[0].any()


def test_another_content_is_another_job(files, tmp_path, make_config):
    np.save(tmp_path / "mask.npy", np.zeros((40, 36), bool))
    given = {**files, "mask": str(tmp_path / "mask.npy")}
    config = make_config(tmp_path / "seen.npy", input=given)
    run(config)
    assert prepare(config).complete
    for key, path in given.items():
        before = np.load(path)
        changed = before.copy()
        changed[0, 0] = 1 if key == "mask" else changed[0, 0] + 1
        np.save(path, changed)
        with pytest.raises(OutputExistsError, match=rf"other options \(input\.{key}\)"):
            run(config)
        np.save(path, before)
    assert prepare(config).complete


def test_a_changed_file_refuses_to_resume(files, tmp_path, make_config, monkeypatch):
    config = make_config(tmp_path / "seen.npy", input=files, output={"chunk_mb": 0.02})

    def full(*args, **kwargs):
        raise OSError(28, "no room")

    with monkeypatch.context() as patched:
        patched.setattr("stem_dask.writers.zarr.StoreSink", full)
        with pytest.raises(OSError, match="no room"):
            run(config)
    np.save(files["gain"], np.load(files["gain"]) * 2)
    with pytest.raises(ConfigError, match=r"unfinished run that differs in input\.gain"):
        run(config)


def test_a_file_that_changes_meanwhile(files, tmp_path):
    patterns = open_patterns(tmp_path / "seen.npy", **files)
    np.save(files["dark"], np.load(files["dark"]) + 1)
    planes.plane_of_file.cache_clear()
    with pytest.raises(ConfigError, match=r"input\.dark .*dark\.npy was changed while"):
        patterns.compute()


BAD = [
    ("dark", np.zeros((36, 40), "f4"), r"dark\.npy has shape (36, 40), the detector (40, 36)"),
    ("gain", np.zeros(3, "f4"), r"gain\.npy has shape (3,), the detector (40, 36)"),
    ("gain", np.zeros((40, 36), "f4"), "gain.npy is 0.0 at pixel [0, 0] and not usable at 1,440 of 1,440"),
    ("gain", np.full((40, 36), -1), "is -1 at pixel [0, 0]"),
    ("gain", np.full((40, 36), np.nan), "expected numbers above 0"),
    ("dark", np.full((40, 36), np.inf), "is inf at pixel [0, 0]"),
    ("dark", np.full((40, 36), 1e300), "expected finite numbers"),
    ("dark", np.full((40, 36), "a"), "holds <U1; expected bool, integer or real numbers"),
    ("dark", np.full((40, 36), 1j), "holds complex128; expected"),
    ("mask", np.zeros((36, 40), bool), r"mask.npy has shape (36, 40), the detector (40, 36)"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "values", "expected"), BAD)
def test_refused(key, values, expected, beam_file, tmp_path, make_config):
    path = tmp_path / f"{key}.npy"
    np.save(path, values)
    for call in (
        lambda: prepare(make_config(beam_file, input={key: str(path)})),
        lambda: open_patterns(beam_file, **{key: str(path)}),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected.replace("\\", ""))) as caught:
            call()
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"text", None, "npz", "objects"])
@pytest.mark.parametrize("key", ["dark", "gain", "mask"])
def test_unreadable(key, content, beam_file, tmp_path, make_config):
    path = tmp_path / f"{key}.npy"
    if content == "npz":
        np.savez(tmp_path / "a.npz", np.ones((40, 36)))
        (tmp_path / "a.npz").rename(path)
    elif content == "objects":
        np.save(path, np.full((40, 36), None), allow_pickle=True)
    elif content is not None:
        path.write_bytes(content)
    expected = rf"input\.{key} .*{key}\.npy cannot be read: .*expected a \.npy file"
    with pytest.raises(ConfigError, match=expected):
        prepare(make_config(beam_file, input={key: str(path)}))


def test_bytes(files, tmp_path, make_config):
    """Pieces of float32 in place of uint16; dark, gain, and what reading one takes."""
    pixels = 40 * 36
    plain = make_config(tmp_path / "seen.npy")
    config = make_config(tmp_path / "seen.npy", input=files)
    found = find_input(config)
    before, sizes = memory_of(plain, found), memory_of(config, found)
    piece = PIECE_BYTES // (2 * pixels) * pixels
    assert sizes["analyze"].per_position == before["analyze"].per_position
    assert sizes["analyze"].fixed == before["analyze"].fixed + 2 * PASSING * piece + 20 * pixels
    masked = make_config(tmp_path / "seen.npy", input={**files, "mask": {"rows": [1]}})
    assert memory_of(masked, found) == sizes
    assert shapes(config, found).dtype == np.float32
