"""convert and preprocess as commands; an analysis that rides along, and the crop that takes it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import stem_dask as sd
from stem_dask.cli import main as cli
from stem_dask.cli import run
from stem_dask.config.load import load_config, parse_config
from stem_dask.core.errors import ConfigError, OutputExistsError
from stem_dask.job.run import run as run_job

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
THREADS = ("cluster.kind=threads", "cluster.threads_per_worker=2")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def convert(*argv: str) -> int:
    return cli.main(["convert", "--input", "beam.npy", "--output", *argv, *THREADS])


def read(path: Path) -> np.ndarray:
    """The patterns of a file, by the library its users have."""
    if path.suffix == ".zarr":
        return np.asarray(xr.open_zarr(path).patterns)
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".pt":
        return np.asarray(torch.load(path)["patterns"])
    if path.suffix in (".h5", ".hdf5", ".emd"):
        import h5py

        with h5py.File(path) as file:
            return np.asarray(file["patterns"])
    import hyperspy.api as hs

    return np.asarray(hs.load(path, lazy=True).data)


def test_patterns_without_any_intensity_are_told(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (np.nan, -2.0):
        np.save("beam.npy", np.full((2, 3, 8, 8), value, np.float32))
        assert convert("a.zarr", "--overwrite") == 0
        assert "no value is above 0: all are zero, negative or NaN" in capsys.readouterr().out
    np.save("beam.npy", np.array([[[[-1.0, np.nan], [1.0, 0.0]]]], np.float32))
    assert convert("a.zarr", "--overwrite") == 0
    assert "no value is above 0" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["a.zarr", "a.hspy", "a.zspy", "a.h5", "a.hdf5", "a.emd", "a.npy", "a.pt"]
)
@pytest.mark.parametrize("flags", [(), ("--no-rechunk", "--chunk-mb", "0.02", "--analyze")])
def test_every_format_holds_the_patterns(
    here: Path, beam_file: Path, name: str, flags: tuple[str, ...]
) -> None:
    assert convert(name, *flags) == 0
    np.testing.assert_array_equal(read(here / name), np.load(beam_file))
    analysis = {"a.zarr": "a.zarr"}.get(name, f"{name}_analysis.zarr")
    beside = {"beam.npy", name, f"{name.removesuffix('.zarr')}_results.json"}
    assert {path.name for path in here.iterdir() if path.suffix != ".run"} == (
        beside | ({analysis} if flags else set())
    )
    if flags:
        found = xr.open_zarr(here / analysis, group="analysis")
        np.testing.assert_array_equal(found.total, np.load(beam_file).sum((2, 3)))
        assert found.profile.shape == (6, 5, 41)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i2", "f4"])
@pytest.mark.parametrize("threshold", ["0", "3"])
def test_the_analysis_on_the_way_changes_nothing(here: Path, dtype: str, threshold: str) -> None:
    """Sums and the largest value come from the analysis, where that counts every value, and else from a second look."""
    patterns = np.random.default_rng(5).integers(0, 9, (6, 5, 16, 12)).astype(dtype)
    patterns[2, 3, 4, 5] = 100
    patterns[1, 1] = -4 if dtype in ("i2", "f4") else 0
    np.save("beam.npy", patterns)
    small = ("--chunk-mb", "0.002", f"analyze.threshold={threshold}", "--no-rechunk")
    assert convert("a.zarr", *small) == convert("b.zarr", "--analyze", *small) == 0
    for name in ("a.zarr", "b.zarr"):
        assert xr.open_zarr(here / name).patterns.attrs["maximum"] == 100
    assert (
        convert("a.hspy") == convert("b.hspy", "--analyze", f"analyze.threshold={threshold}") == 0
    )
    assert (here / "a.hspy").read_bytes() == (here / "b.hspy").read_bytes()


def test_the_same_command_again(here: Path, beam_file: Path, capsys: Any) -> None:
    assert convert("a.hspy") == 0
    stamp = (here / "a.hspy").stat().st_mtime_ns
    capsys.readouterr()
    assert convert("a.hspy") == 0
    assert capsys.readouterr().out.startswith(f"already complete: {here}/a.hspy\n")
    assert (here / "a.hspy").stat().st_mtime_ns == stamp
    assert convert("a.hspy", "--codec", "none") == 2
    assert "made with other options (output.codec)" in capsys.readouterr().err
    assert convert("a.hspy", "--codec", "none", "--overwrite") == 0
    np.testing.assert_array_equal(read(here / "a.hspy"), np.load(beam_file))
    (here / "a.hspy").write_bytes(b"mine")
    assert convert("a.hspy", "--codec", "none") == 2
    assert (here / "a.hspy").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["a.zarr", "a.hspy", "a.pt", "a.npy"])
def test_what_was_stopped_goes_on(
    beam_file: Path, tmp_path: Path, make_config: Any, name: str
) -> None:
    def job(name: str) -> Any:
        output = {"chunk_mb": 0.02}
        analyze = {"ahead": True}
        return make_config(beam_file, name, crop={"enabled": False}, output=output, analyze=analyze)

    def content(name: str) -> bytes:
        path = tmp_path / name
        if path.suffix != ".zarr":
            return path.read_bytes()
        parts = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "zarr.json")
        return b"".join(p.read_bytes() for p in parts)

    def stop(step: Any) -> None:
        if step.stage == "convert" and step.done == 3:
            raise KeyboardInterrupt

    suffix = Path(name).suffix
    run_job(job(f"whole{suffix}"))
    with pytest.raises(KeyboardInterrupt):
        run_job(job(name), progress=stop)
    assert not (tmp_path / name).exists()
    said: list[str] = []
    run_job(job(name), say=said.append)
    assert any(line.startswith("resuming    ") for line in said)
    assert content(name) == content(f"whole{suffix}")


# --- an analysis that was made before -------------------------------------------------------------------------------


def crop(here: Path, path: str, name: str, **sections: Any) -> Any:
    options: dict[str, Any] = {
        "input": {"path": str(here / path), **sections.pop("input", {})},
        "output": {"path": str(here / name), "export": [], "figure": False, "chunk_mb": 0.03},
        "cluster": {"kind": "threads", "threads_per_worker": 2},
    }
    return parse_config({**options, **sections})


def chunks(store: Path) -> dict[str, bytes]:
    files = (path for path in store.rglob("*") if path.is_file() and path.name != "zarr.json")
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def stages(config: Any) -> list[str]:
    seen: list[str] = []
    run_job(config, progress=lambda step: seen.append(step.stage))
    return sorted({*seen} - {"survey"})


@pytest.mark.parametrize(("name", "target"), [("a.zarr", 0.7), ("a.hspy", 0.98)])
def test_a_crop_of_a_converted_file_needs_no_analysis(
    here: Path, beam_file: Path, name: str, target: float
) -> None:
    assert convert(name, "--analyze", "--chunk-mb", "0.02") == 0
    options = {"analyze": {"target_retention": target}, "validate": {"min_retention": 0.5}}
    assert stages(crop(here, "beam.npy", "plain.zarr", **options)) == ["analyze", "crop"]
    assert stages(crop(here, name, "own.zarr", **options)) == ["crop"]
    named = {**options, "analyze": {**options["analyze"], "from": str(here / name)}}
    assert stages(crop(here, "beam.npy", "named.zarr", **named)) == ["crop"]
    for group in (None, "analysis"):  # blocks follow the chunks of what is read, values do not
        one, own, named = (
            xr.open_zarr(here / f"{n}.zarr", group=group) for n in ("plain", "own", "named")
        )
        xr.testing.assert_equal(one, own)
        xr.testing.assert_equal(one, named)
    assert chunks(here / "plain.zarr") == chunks(here / "named.zarr")
    one, two = (xr.open_zarr(here / f"{n}.zarr", group="analysis") for n in ("plain", "own"))
    kept = {
        "radius_metric",
        "target_retention",
        "window_size",
        "global_radius",
        "coverage",
        "odd_pixels",
    }
    assert {key: one.attrs[key] for key in kept} == {key: two.attrs[key] for key in kept}


def as_before(store: Path) -> None:
    """Make of a store what earlier versions wrote: the dimension of profiles bore the name of the radius, without coordinate."""

    def renamed(document: Any) -> Any:
        if isinstance(document, dict):
            return {
                key: renamed(value)
                for key, value in document.items()
                if not key.endswith("profile_radius")
            }
        if isinstance(document, list):
            return [renamed(item) for item in document]
        return "radius" if document == "profile_radius" else document

    shutil.rmtree(store / "analysis" / "profile_radius")
    for file in store.rglob("zarr.json"):
        file.write_text(json.dumps(renamed(json.loads(file.read_text()))))


def test_the_analysis_of_an_earlier_version_is_read(here: Path, beam_file: Path) -> None:
    assert convert("a.zarr", "--analyze", "--chunk-mb", "0.02") == 0
    options = {"analyze": {"target_retention": 0.7}, "validate": {"min_retention": 0.5}}
    assert stages(crop(here, "a.zarr", "new.zarr", **options)) == ["crop"]
    as_before(here / "a.zarr")
    assert xr.open_zarr(here / "a.zarr", group="analysis").curve_min.dims == ("radius",)
    assert cli.main(["verify", "a.zarr"]) == 0
    assert stages(crop(here, "a.zarr", "old.zarr", **options)) == ["crop"]
    for group in (None, "analysis"):
        xr.testing.assert_equal(
            *(xr.open_zarr(here / f"{n}.zarr", group=group) for n in ("old", "new"))
        )
    stored = xr.open_zarr(here / "a.zarr", group="analysis").load()
    assert sd.choose_window(stored, target_retention=0.7).global_radius == int(
        xr.open_zarr(here / "new.zarr").patterns.global_radius
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"analyze": {"threshold": 2.0}},
        {"input": {"scan_step": 2}},
        {"input": {"mask": {"rows": [3]}}},
        {"input": {"flip": True}},
        {"analyze": {"center_method": "center"}},
    ],
)
def test_an_analysis_of_something_else_is_not_taken(
    here: Path, beam_file: Path, sections: dict[str, Any]
) -> None:
    assert convert("a.zarr", "--analyze") == 0
    assert stages(crop(here, "a.zarr", "b.zarr", **sections)) == ["analyze", "crop"]
    ((section, ((key, _),)),) = ((name, tuple(value.items())) for name, value in sections.items())
    analyze = {**sections.get("analyze", {}), "from": str(here / "a.zarr")}
    other = crop(here, "beam.npy", "c.zarr", **{**sections, "analyze": analyze})
    with pytest.raises(ConfigError, match=rf"analyze\.from is .*{section}\.{key} was"):
        run_job(other)


def test_a_file_that_has_changed(here: Path, beam_file: Path) -> None:
    assert convert("a.hspy", "--analyze") == 0
    np.save(beam_file, np.load(beam_file)[::-1])
    named = {"from": str(here / "a.hspy")}
    with pytest.raises(ConfigError, match="another file, or another state of it"):
        run_job(crop(here, "beam.npy", "b.zarr", analyze=named))
    with pytest.raises(ConfigError, match=r"beam\.npy, which holds no analysis"):
        run_job(crop(here, "beam.npy", "b.zarr", analyze={"from": str(beam_file)}))
    # a later file of the same name is not what was analyzed
    assert convert("a.hspy", "--overwrite") == 0
    assert stages(crop(here, "a.hspy", "b.zarr")) == ["analyze", "crop"]


def test_another_dataset_of_the_same_file(here: Path, beam_file: Path) -> None:
    """As large as the one that was analyzed, and not the same."""
    import h5py

    with h5py.File(here / "two.h5", "w") as file:
        file["one"] = np.load(beam_file)
        file["two"] = np.roll(np.load(beam_file), 5, axis=-1)
    argv = ["convert", "--input", "two.h5", "--output", "a.zarr", "--analyze", "input.dataset=one"]
    assert cli.main([*argv, *THREADS]) == 0
    named = {"analyze": {"from": str(here / "a.zarr")}}
    assert stages(crop(here, "two.h5", "b.zarr", input={"dataset": "one"}, **named)) == ["crop"]
    with pytest.raises(ConfigError, match=r"input\.dataset was one, and is two"):
        run_job(crop(here, "two.h5", "c.zarr", input={"dataset": "two"}, **named))
    assert stages(crop(here, "a.zarr", "d.zarr", input={"dataset": "patterns"})) == ["crop"]


def test_a_finished_crop_stays_finished_without_the_analysis(here: Path, beam_file: Path) -> None:
    import shutil

    assert convert("a.hspy", "--analyze") == 0
    assert stages(crop(here, "a.hspy", "b.zarr")) == ["crop"]
    shutil.rmtree(here / "a.hspy_analysis.zarr")
    assert run_job(crop(here, "a.hspy", "b.zarr")).lines[0].startswith("already complete")


def test_a_crop_is_no_analysis_of_whole_patterns(here: Path, beam_file: Path) -> None:
    run_job(crop(here, "beam.npy", "b.zarr"))
    assert stages(crop(here, "b.zarr", "c.zarr")) == ["analyze", "crop"]


@pytest.mark.parametrize(
    "sections",
    [
        {"crop": {"size": 16}},
        {"crop": {"coverage": 0.9, "margin_pixels": 0, "align": "pattern"}},
        {"analyze": {"target_retention": 0.7}, "validate": {"min_retention": 0.5}},
        {"crop": {"size": 12}, "downsample": {"factor": 2}, "output": {"dtype": "float32"}},
    ],
)
@pytest.mark.parametrize("mask", [None, "auto"])
def test_a_finished_crop_lends_its_analysis(
    here: Path, beam_file: Path, sections: dict[str, Any], mask: str | None
) -> None:
    """Another target, coverage, margin or size takes one pass, and gives what an analysis of its own gives."""
    data = np.load(beam_file)
    data[:, :, 30, 5] = 900  # a hot pixel
    np.save(beam_file, data)
    given = {"mask": mask}
    run_job(crop(here, "beam.npy", "first.zarr", input=given))
    plain, reused = ({"output": {}, **sections} for _ in range(2))
    for name, options in (("plain", plain), ("reused", reused)):
        fixed = {
            "path": str(here / f"{name}.zarr"),
            "export": [],
            "figure": False,
            "chunk_mb": 0.03,
        }
        options["output"] = {**options["output"], **fixed}
    reused["analyze"] = {**reused.get("analyze", {}), "from": str(here / "first.zarr")}
    run_job(crop(here, "beam.npy", "plain.zarr", input=given, **plain))
    assert stages(crop(here, "beam.npy", "reused.zarr", input=given, **reused)) == ["crop"]
    for group in (None, "analysis"):
        one, two = (
            xr.open_zarr(here / f"{name}.zarr", group=group) for name in ("plain", "reused")
        )
        xr.testing.assert_equal(one, two)
        assert one.attrs.get("hot_pixels") == two.attrs.get("hot_pixels")
        assert one.attrs.get("odd_pixels") == two.attrs.get("odd_pixels")
    assert chunks(here / "plain.zarr") == chunks(here / "reused.zarr")


def test_a_finished_crop_lends_its_analysis_on_the_command_line(
    here: Path, beam_file: Path, capsys: Any
) -> None:
    argv = [str(CONFIGS / "crop.yaml"), "input.path=beam.npy", "output.export=[]", *THREADS]
    argv += ["output.figure=false"]
    assert run.main([*argv, "output.path=a1.zarr"]) == 0
    assert "analyze " in capsys.readouterr().out
    from_a1 = ["crop.size=[30, 28]", "analyze.from=a1.zarr"]
    check = ["check", *argv, *from_a1, "output.path=b.zarr"]
    assert cli.main(check) == 0
    assert "analysis    reused from" in capsys.readouterr().out
    assert run.main([*argv, *from_a1, "output.path=b.zarr"]) == 0
    assert "analyze " not in capsys.readouterr().out
    assert xr.open_zarr("b.zarr").patterns.shape[-2:] == (30, 28)
    # also in place, where the older output is kept until the new one is complete
    assert run.main([*argv, *from_a1, "output.path=a1.zarr", "output.overwrite=true"]) == 0
    assert "analyze " not in capsys.readouterr().out
    for group in (None, "analysis"):
        xr.testing.assert_equal(*(xr.open_zarr(f"{n}.zarr", group=group) for n in ("b", "a1")))


@pytest.mark.parametrize(
    "sections",
    [
        {"analyze": {"threshold": 2.0}},
        {"analyze": {"radius_metric": "circle"}},
        {"input": {"scan_step": 2}},
        {"input": {"scan_roi": [0, 3, 0, 3]}},
        {"input": {"mask": "auto"}},
    ],
)
def test_a_crop_with_another_analysis_does_not_lend_its_own(
    here: Path, beam_file: Path, sections: dict[str, Any]
) -> None:
    run_job(crop(here, "beam.npy", "a.zarr"))
    ((section, ((key, _),)),) = ((name, tuple(value.items())) for name, value in sections.items())
    analyze = {**sections.get("analyze", {}), "from": str(here / "a.zarr")}
    with pytest.raises(ConfigError, match=rf"analyze\.from is .*{section}\.{key} was"):
        run_job(crop(here, "beam.npy", "b.zarr", **{**sections, "analyze": analyze}))


def test_an_analysis_with_another_dark_reference(here: Path, beam_file: Path) -> None:
    """The name of the file is the same, its content is not."""
    np.save("dark.npy", np.zeros((40, 36), np.float32))
    given = {"dark": str(here / "dark.npy")}
    run_job(crop(here, "beam.npy", "a.zarr", input=given))
    np.save("dark.npy", np.ones((40, 36), np.float32))
    named = {"from": str(here / "a.zarr")}
    with pytest.raises(ConfigError, match=r"the content of input\.dark has changed"):
        run_job(crop(here, "beam.npy", "b.zarr", input=given, analyze=named))


def test_a_crop_does_not_lend_its_analysis_to_its_own_patterns(here: Path, beam_file: Path) -> None:
    run_job(crop(here, "beam.npy", "a.zarr", crop={"size": [40, 36]}))
    named = {"from": str(here / "a.zarr")}
    with pytest.raises(ConfigError, match="another file, or another state of it"):
        run_job(crop(here, "a.zarr", "b.zarr", analyze=named))


# --- preprocess -----------------------------------------------------------------------------------------------------


def test_preprocess_as_the_earlier_script(here: Path, beam_file: Path, capsys: Any) -> None:
    argv = ["preprocess", "--input", "beam.npy", "--output", "y.pt", "--downsample", "2", "--mode", "stride"]  # fmt: skip
    argv += ["--scan_step", "2", "--dtype", "float16", "--chunk_size", "4", "--memory_efficient"]
    assert cli.main([*argv, *THREADS]) == 0
    tensor = torch.load(here / "y.pt")
    wanted = np.load(beam_file)[::2, ::2, ::2, ::2].astype(np.float16)
    np.testing.assert_array_equal(tensor.numpy(), wanted.reshape(-1, 1, 20, 18))
    out = capsys.readouterr().out
    assert "raw counts; earlier versions stored log z-scores" in out
    assert "3/3" in out  # one scan row of three patterns is less than --chunk_size 4


def test_a_chunk_of_no_patterns(here: Path, beam_file: Path, capsys: Any) -> None:
    argv = ["preprocess", "--input", "beam.npy", "--output", "y.pt", "--chunk_size", "0"]
    assert cli.main(argv) == 2
    assert "--chunk_size is 0" in capsys.readouterr().err


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "made"), [("convert.yaml", "out/converted.hspy"), ("preprocess.yaml", "out/train.pt")]
)
def test_the_shipped_configs(here: Path, name: str, made: str) -> None:
    assert run.main([str(CONFIGS / name), *THREADS]) == 0
    results = json.loads((here / f"{made}_results.json").read_text())
    assert (here / made).stat().st_size == results["of"][0]
    assert ("normalization" in results) == (name == "preprocess.yaml")


@pytest.mark.parametrize("name", ["convert.yaml", "preprocess.yaml"])
def test_their_keys_are_those_of_crop_yaml(here: Path, name: str) -> None:
    import yaml

    shipped = yaml.safe_load((CONFIGS / name).read_text())
    every = yaml.safe_load((CONFIGS / "crop.yaml").read_text())
    for section, keys in shipped.items():
        assert set(keys) <= set(every[section])
    load_config(CONFIGS / name)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("output.path=a.pt", r"output.export is \[pt, hspy\], which needs a store"),
        ("analyze.ahead=true", "a crop analyzes in any case"),
    ],
)
def test_a_crop_refuses(here: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(CONFIGS / "crop.yaml", [override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["output.export=[pt]"], "output.export is .*needs a store"),
        (["output.figure=true"], "output.figure is true, which needs a store"),
        (["downsample.factor=2"], "analyze.ahead needs patterns as they are read"),
        (["analyze.from=a.zarr"], "analyze.from needs crop.enabled: true"),
        (["output.path=a.npy", "output.codec=lz4"], "a .npy file is not compressed"),
        (
            ["output.path=a.mat"],
            "a path that ends in .zarr, .zspy, .hspy, .h5, .hdf5, .emd, .npy or .pt",
        ),
    ],
)
def test_a_conversion_refuses(here: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(CONFIGS / "convert.yaml", overrides)


def test_somebody_elses_file_stays(here: Path, beam_file: Path) -> None:
    (here / "a.npy").write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"a\.npy exists"):
        run_job(crop(here, "beam.npy", "a.npy", crop={"enabled": False}))
    assert (here / "a.npy").read_bytes() == b"mine"


def test_several_files(here: Path, beam_file: Path, capsys: Any) -> None:
    np.save(here / "late.npy", np.load(beam_file)[::-1])
    (here / "torn.npy").write_bytes(beam_file.read_bytes()[:3000])
    argv = ["convert", "--input", "*.npy", "--output", "out/{stem}.zspy", *THREADS]
    assert cli.main(argv) == 3
    np.testing.assert_array_equal(read(here / "out" / "late.zspy"), np.load(here / "late.npy"))
    np.testing.assert_array_equal(read(here / "out" / "beam.zspy"), np.load(beam_file))
    assert not (here / "out" / "torn.zspy").exists()
    assert "torn.npy" in capsys.readouterr().err
    argv = ["preprocess", "--input", "beam.npy", "late.npy", "--output", "{stem}.pt"]
    assert cli.main([*argv, "--chunk_size", "7", *THREADS]) == 0
    assert torch.load(here / "late.pt").shape == (30, 1, 40, 36)
