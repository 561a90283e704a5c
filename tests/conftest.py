"""Fixtures that several test files share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


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


@pytest.fixture
def make_config(tmp_path: Path) -> Any:
    """Builds a config from sections, on threads, writing into the test's folder."""
    from stem_dask.config import parse_config

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
def beam_file(tmp_path: Path) -> Path:
    """A small scan (6, 5, 40, 36) uint16 with a moving square beam, in a .npy file."""
    data = np.zeros((6, 5, 40, 36), np.uint16)
    for y in range(6):
        for x in range(5):
            data[y, x, 16 + y // 2 : 22 + y // 2, 14 + x // 2 : 20 + x // 2] = 10 + x
    path = tmp_path / "beam.npy"
    np.save(path, data)
    return path
