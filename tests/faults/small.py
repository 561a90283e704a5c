"""A scan of 6 x 4 patterns of 16 x 16, one row a block, and what undisturbed runs make of it: for very many commands."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from forks import Ended, Forks, Moment
from harness import tree

#: overrides of the two configs
CONFIGS = {
    "A": {"crop.margin_pixels": 1, "analyze.target_retention": 0.98},
    "B": {"crop.margin_pixels": 2, "analyze.target_retention": 0.9},
}
N_BLOCKS = 6
STORE, RESULTS = ".zarr", "_results.json"
#: the job that makes an output, as the journal calls it
JOBS = {STORE: "crop", ".pt": "export .pt scan", ".hspy": "export .hspy"}


class Small:
    """The data, a server of forks, and the outputs of undisturbed runs."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder, self.forks = folder, forks
        rng = np.random.default_rng(1)
        y, x = np.mgrid[:16, :16]
        data = np.zeros((N_BLOCKS, 4, 16, 16), np.uint16)
        for i, j in np.ndindex(N_BLOCKS, 4):
            disc = (y - 7 - i / 4) ** 2 + (x - 8 + j / 4) ** 2 < 5
            data[i, j] = rng.poisson(60.0 * disc + 0.05)
        np.save(folder / "beam.npy", data)
        (folder / "crop.yaml").write_text(
            f"input: {{path: {folder}/beam.npy}}\n"
            "output: {path: scan.zarr, figure: false, chunk_mb: 0.002}\n"
            "validate: {min_retention: 0.1}\n"
        )
        self.references = {config: self._reference(config) for config in CONFIGS}

    def _reference(self, config: str) -> dict[str, Any]:
        (self.folder / config).mkdir()
        ended = self.run(self.folder / config, config, kinds=("pt", "hspy"))
        assert ended.code == 0, ended.text
        return {name: content(self.folder / config / f"scan{name}") for name in (*JOBS, RESULTS)}

    def run(
        self,
        folder: Path,
        config: str,
        *flags: str,
        kinds: Sequence[str] = ("pt",),
        at: Moment | None = None,
        pool: bool = True,
    ) -> Ended:
        """The command line of a run to its end."""
        overrides = [f"{key}={value}" for key, value in CONFIGS[config].items()]
        overrides += [f"output.path={folder}/scan.zarr", f"output.export=[{', '.join(kinds)}]"]
        argv = [*flags, str(self.folder / "crop.yaml"), *overrides, "cluster.threads_per_worker=2"]
        return self.forks.finish("stem_dask.run", *argv, at=at, pool=pool)


def content(path: Path) -> Any:
    """What lies at a path, to be compared; None for nothing. Of results.json what decides: it holds times too."""
    if path.is_dir():
        return tree(path)
    if not path.exists():
        return None
    if path.name.endswith(RESULTS):
        return deciding(json.loads(path.read_text())["config"])
    return path.read_bytes()


def deciding(options: dict[str, Any]) -> dict[str, Any]:
    """The options in which the configs differ."""
    keys = [(key, *key.split(".")) for key in CONFIGS["A"]]
    return {key: options[section][name] for key, section, name in keys}
