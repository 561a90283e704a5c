"""From paths, globs and an output pattern to one job for each input."""

from pathlib import Path
from typing import Any

import pytest

from stem_dask.config.load import load_config, load_configs, parse_config
from stem_dask.core.errors import ConfigError
from stem_dask.job.plan import find_input


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose name looks like a glob, with files to be found."""
    folder = tmp_path / "run [1]"
    for name in ("raw/a.dm4", "raw/b.dm4", "raw/c.hspy", "raw/deep/a.dm4", "raw/x[1].npy"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "raw/s.zarr").mkdir()
    monkeypatch.chdir(folder)
    return folder


def jobs(given: Any, output: str, *overrides: str) -> list[tuple[str, str]]:
    """(input, output) of every job, relative to the working directory."""
    Path("job.yaml").write_text(f"input:\n  path: {given}\noutput:\n  path: '{output}'\n")
    folder = Path.cwd()
    configs = load_configs("job.yaml", overrides)
    pairs = [(config.input.path, config.output.path) for config in configs]
    return [tuple(str(Path(str(path)).relative_to(folder)) for path in pair) for pair in pairs]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "output", "expected"),
    [
        ("raw/a.dm4", "o.zarr", [("raw/a.dm4", "o.zarr")]),
        ("[raw/a.dm4]", "o.zarr", [("raw/a.dm4", "o.zarr")]),
        ("raw/a.dm4", "o/{stem}.zarr", [("raw/a.dm4", "o/a.zarr")]),
        ("raw/*.dm4", "o/{stem}.zarr", [("raw/a.dm4", "o/a.zarr"), ("raw/b.dm4", "o/b.zarr")]),
        ("raw/[b-z].*", "{stem}.zarr", [("raw/b.dm4", "b.zarr"), ("raw/c.hspy", "c.zarr"), ("raw/s.zarr", "s.zarr")]),
        ("raw/*.dm4", "o/{name}.zarr", [("raw/a.dm4", "o/a.dm4.zarr"), ("raw/b.dm4", "o/b.dm4.zarr")]),
        (
            "raw/**/a.dm4",
            "o/{parent}/{stem}_c.zarr",
            [("raw/a.dm4", "o/raw/a_c.zarr"), ("raw/deep/a.dm4", "o/deep/a_c.zarr")],
        ),
        (
            "[raw/b.dm4, 'raw/*.dm4', raw/../raw/a.dm4, gone.npy]",
            "o/{stem}.zarr",
            [("gone.npy", "o/gone.zarr"), ("raw/a.dm4", "o/a.zarr"), ("raw/b.dm4", "o/b.zarr")],
        ),
        ("'raw/x[1].npy'", "o/{stem}.zarr", [("raw/x[1].npy", "o/x[1].zarr")]),
        ("raw/?.hspy", "raw/{stem}.zarr", [("raw/c.hspy", "raw/c.zarr")]),
        ("raw/*.dm4", "raw/o/{stem}.zarr", [("raw/a.dm4", "raw/o/a.zarr"), ("raw/b.dm4", "raw/o/b.zarr")]),
    ],
)  # fmt: skip
def test_paths_and_globs(here: Path, given: str, output: str, expected: list) -> None:
    assert jobs(given, output, "output.export=[]") == expected


@pytest.mark.parametrize(
    ("given", "output", "overrides", "words"),
    [
        ("raw/*.mib", "{stem}.zarr", [], ["line 2: input.path is raw/*.mib", "nothing matches"]),
        ("raw/*.dm4", "o.zarr", [], ["line 4: output.path is", "2 inputs", "a.dm4", "{stem}"]),
        ("'raw/**/*.dm4'", "o/{stem}.zarr", [], ["raw/a.dm4 and ", "raw/deep/a.dm4 would both become", "{parent}"]),
        ("raw/*.dm4", "o/{step}.zarr", [], ["{step} is no placeholder", "{stem}", "{name}", "{parent}"]),
        ("raw/a.dm4", "o/{}.zarr", [], ["{} is no placeholder"]),
        ("[raw/a.zarr, raw/b.npy]", "raw/{stem}.zarr", [], ["raw/a.zarr, which is an input"]),
        ("raw/*.zarr", "raw/{stem}_c.zarr", [], ["s_c.zarr, which matches raw/*.zarr", "another folder"]),
        ("'raw/**/a.*'", "raw/o/a.zarr", ["input.path=[raw/deep/*.dm4, raw/**/a.z*]"], ["nothing matches", "a.z*"]),
        ("'raw/**/[cs].*'", "raw/new/{stem}.zarr", [], ["raw/new/c.zarr, which matches"]),
        ("'raw/*.hspy'", "raw/{stem}_c.zarr", ["output.export=[hspy]"], ["c_c.hspy, which matches"]),
        ("raw/*.dm4", "{stem}.zarr", ["analyze.from=known.zarr"], ["override analyze.from", "there are 2"]),
    ],
)  # fmt: skip
def test_what_cannot_be_told_apart_is_refused(
    here: Path, given: str, output: str, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        jobs(given, output, *overrides)
    for word in words:
        assert word in str(caught.value)


def test_overrides_name_several_too(here: Path) -> None:
    expected = [("raw/a.dm4", "o/a.zarr"), ("raw/c.hspy", "o/c.zarr")]
    assert jobs("gone", "o/{stem}.zarr", "input.path=[raw/a.dm4, raw/c.hspy]") == expected
    assert jobs("gone", "o.zarr", "input.path=raw/?.hspy", "output.path={stem}.zarr") == [
        ("raw/c.hspy", "c.zarr")
    ]


def test_where_one_job_is_expected_several_are_refused(here: Path) -> None:
    Path("job.yaml").write_text("input: {path: raw/*.dm4}\noutput: {path: '{stem}.zarr'}\n")
    with pytest.raises(ConfigError, match=r"names 2 inputs .*a\.dm4.*load_configs"):
        load_config("job.yaml")
    config = parse_config({"input": {"path": ["a.npy", "b.npy"]}, "output": {"path": "a.zarr"}})
    with pytest.raises(ConfigError, match=r"names 2 inputs.*load_configs"):
        find_input(config)
