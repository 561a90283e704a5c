"""What a release contains, what it requires, and that its bytes do not depend on the versions of other packages."""

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import stem_dask as sd

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RECIPE = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text(encoding="utf-8"))
FOLDERS = (".ci", "benchmarks", "conda", "configs", "docs", "examples", "stem_dask", "tests")
FILES = {
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "SECURITY.md",
    "constraints.txt", "environment.yml", "pyproject.toml",
}  # fmt: skip
#: where conda-forge names a package differently
CONDA = {
    "dask": "dask-core", "matplotlib": "matplotlib-base", "hyperspy": "hyperspy-base", "torch": "pytorch",
}  # fmt: skip


def names(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in files}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive of this tree, unpacked, and the wheel built from that, unpacked."""
    folder = tmp_path_factory.mktemp("release")
    tree = folder / "tree"
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", ".*_cache", ".benchmarks")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, tree)

    def build(what: str, tree: Path) -> Path:
        code = f"from setuptools.build_meta import *; build_{what}({str(folder)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return next(folder.glob("*.tar.gz" if what == "sdist" else "*.whl"))

    with tarfile.open(build("sdist", tree)) as archive:
        archive.extractall(folder, filter="data")
    source = folder / f"stem_dask-{sd.__version__}"
    assert names(source) >= FILES
    for name in FOLDERS:
        assert names(source / name) == names(tree / name)
    with zipfile.ZipFile(build("wheel", source)) as archive:
        archive.extractall(folder / "wheel")
    return source, folder / "wheel"


def test_the_source_archive_has_what_its_tests_use(release: tuple[Path, Path]) -> None:
    source, _ = release
    words = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_layers.py",
        "-k",
        "templates",
    ]
    done = subprocess.run([sys.executable, *words], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_wheel_has_the_whole_package_with_configs_and_templates(
    release: tuple[Path, Path],
) -> None:
    source, wheel = release
    assert names(wheel / "stem_dask") == names(source / "stem_dask")
    for name in names(ROOT / "configs"):
        packed = wheel / "stem_dask" / "config" / name
        assert packed.read_bytes() == (ROOT / "configs" / name).read_bytes()
    command = [sys.executable, "-m", "stem_dask", "init", "one_node"]
    done = subprocess.run(command, cwd=wheel, check=True, capture_output=True)
    assert done.stdout == (ROOT / "configs" / "slurm" / "one_node.sh").read_bytes()


def conda(requirements: list[str]) -> set[str]:
    """Requirements of pyproject.toml in the notation of conda-forge."""
    found = set()
    for requirement in requirements:
        name, bounds = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", requirement).groups()
        found.add(f"{CONDA.get(name, name.lower())} {bounds}")
    return found


def test_conda_requires_what_pip_requires() -> None:
    required = {f"python {PROJECT['requires-python']}"} | conda(PROJECT["dependencies"])
    assert set(RECIPE["requirements"]["run"]) == required
    assert RECIPE["context"]["version"] == PROJECT["version"]
    (script,) = RECIPE["build"]["python"]["entry_points"]
    assert script == f"stem-dask = {PROJECT['scripts']['stem-dask']}"
    extras = PROJECT["optional-dependencies"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    listed = {line for line in environment["dependencies"] if isinstance(line, str)}
    assert listed == required | conda(extras["hyperspy"] + extras["torch"]) | {"pip"}


def test_a_crop_has_the_same_bytes_under_all_versions(
    beam_file: Path, tmp_path: Path, make_config: Any
) -> None:
    """`make test-lowest` runs this with the lowest versions, `make test` with those of constraints.txt."""
    output = {"export": ["pt", "npy", "zspy", "h5"], "chunk_mb": 0.02}
    outcome = sd.run_config(make_config(beam_file, output=output))
    assert outcome.exit_code == 0
    digests = {}
    for pattern in ("out.zarr/patterns/c*", "out.zspy/**/data/[0-9]*/**/*", "out.pt", "out.npy"):
        digest = hashlib.sha256()
        for file in sorted(path for path in tmp_path.glob(pattern) if path.is_file()):
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
        digests[pattern] = digest.hexdigest()[:16]
    pixels = {np.asarray(sd.open(tmp_path / f"out.{name}")).tobytes() for name in ("zarr", "h5")}
    assert len(pixels) == 1  # libraries of HDF5 lay the same pixels into different bytes
    assert digests == {
        "out.zarr/patterns/c*": "e462eec186d46c4b",
        "out.zspy/**/data/[0-9]*/**/*": "cd155c8797333ed6",
        "out.pt": "60a40ee9b00fc353",
        "out.npy": "20702b2d0acc01a2",
    }
