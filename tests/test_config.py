"""Options: what is accepted, what is refused and with which words, and that nothing else is ever raised."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_dask.config import load as module
from stem_dask.config.load import defaults, load_config, parse_config, to_dict
from stem_dask.config.options import Config
from stem_dask.core.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "configs" / "crop.yaml"
MINIMAL = "input: {path: synthetic}\noutput: {path: a.zarr}\n"
SECTIONS = ["input", "analyze", "descan", "crop", "validate", "downsample", "output", "cluster"]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a config from text, as ``crop.yaml`` in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def load(text: str | bytes, *overrides: str) -> Config:
        Path("crop.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config("crop.yaml", overrides)

    return load


def options(**sections):
    return {"input": {"path": "a.dm4"}, "output": {"path": "a.zarr"}} | sections


def message(call, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    assert len(caught.value.args) == 1
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


# ---- defaults and round trips


def test_the_shipped_config_shows_every_key_at_its_default(load, tmp_path):
    """And those are the documented ones of a minimal config."""
    shipped = yaml.safe_load(SHIPPED.read_text())
    config = load_config(SHIPPED)
    assert config.input.path == "synthetic"
    assert config.output.path == os.path.abspath("out/synthetic.zarr")
    plain = to_dict(parse_config({k: {"path": shipped[k]["path"]} for k in ("input", "output")}))
    assert shipped == plain
    minimal = to_dict(load(MINIMAL))
    assert minimal.pop("output") == {**plain["output"], "path": str(tmp_path / "a.zarr")}
    assert minimal == {key: plain[key] for key in minimal}
    assert [*shipped] == [*plain] == [*SECTIONS, "device", "on_error"]
    for section in SECTIONS:
        assert [*shipped[section]] == [*plain[section]]


def test_defaults_are_those_of_the_config():
    config = parse_config(options())
    for section in SECTIONS:
        given = getattr(config, "validation" if section == "validate" else section)
        values = given.model_dump(by_alias=True)
        values.pop("path", None)
        assert defaults(section) == values


FULL = options(
    input={
        "path": "a.dm4", "dataset": 3, "scan_shape": [4, 5], "scan_order": "detector_first", "scan_roi": [0, 2, 1, 3],
        "scan_step": 2, "skip_frames": 3, "drop_columns": 1, "flip": True, "missing_chunks": "zero", "shape": [23, 6, 7],
        "dtype": ">u2", "offset": 16, "dark": "dark.npy", "gain": "gain.npy", "mask_fill": "median", "beam_energy_kv": 200,
        "mask": {"pixels": [[1, 2]], "rows": [3], "columns": [4, 5]},
        "calibration": {"ky": {"scale": -0.5, "units": "1/nm"}, "scan_x": {"scale": 2, "units": "nm", "offset": 1}},
    },
    analyze={"center_method": "manual", "manual_center": [1, 2.5], "radius_metric": "circle"},
    crop={"coverage": 1, "size": [40, 44], "align": "pattern"},
    validate={"min_retention": 0.5},
    downsample={"factor": 2, "method": "gauss", "sigma": 1},
    output={"path": "a.zarr", "export": ["hspy"], "chunk_mb": 32, "layout": "nchw"},
    cluster={"address": "tls://[::1]:8786", "memory_limit": "4GiB", "n_workers": 2},
    device="auto",
)  # fmt: skip


@pytest.mark.parametrize("given", [options(), FULL], ids=["minimal", "full"])
def test_round_trips(given, load):
    config = parse_config(given)
    plain = to_dict(config)
    assert parse_config(plain) == config
    assert parse_config(json.loads(json.dumps(plain))) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(plain))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    absolute = load(yaml.safe_dump(plain))
    assert load(yaml.safe_dump(to_dict(absolute))) == absolute
    assert hash(config) == hash(parse_config(plain))


def test_values_have_the_types_that_callers_use():
    config = parse_config(FULL)
    assert config.crop.size == (40, 44)
    assert config.analyze.manual_center == (1.0, 2.5)
    assert config.input.mask.pixels == ((1, 2),)
    assert isinstance(config.crop.coverage, float)
    assert isinstance(config.output.chunk_mb, float)
    assert config.validation.min_retention == 0.5
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.crop.enabled = False


def test_tuples_are_taken_as_lists():
    assert parse_config(options(crop={"size": (2, 4)})).crop.size == (2, 4)


def test_an_empty_section_has_its_defaults(load):
    assert load(f"{MINIMAL}crop:\n  # size: 3\n") == load(MINIMAL)


# ---- what is refused

BAD = [
    # input
    ("input: {path: 3}", "input.path is 3; expected the path of a file, or synthetic"),
    ("input: {path: 2020-01-01}", "input.path is 2020-01-01; expected the path"),
    ('input: {path: "a\\uD800"}', "input.path is"),
    ("input: {path: []}", "input.path is []; expected the path"),
    ("input: {path: [a, 3]}", "input.path[1] is 3; expected the path"),
    ("input: {dataset: 1.5}", "input.dataset is 1.5; expected a whole number of 0 or more, a name or null"),
    ("input: {scan_shape: [0, 3]}", "input.scan_shape[0] is 0; expected [y, x] of whole numbers above 0"),
    ("input: {scan_shape: [3, 4, 5]}", "input.scan_shape is [3, 4, 5]; expected [y, x]"),
    ("input: {scan_order: first}", "expected auto, scan_first or detector_first"),
    ("input: {scan_roi: [2, 2, 0, 1]}", "input.scan_roi is [2, 2, 0, 1]; expected [y0, y1, x0, x1]"),
    ("input: {scan_step: 0}", "input.scan_step is 0; expected a whole number above 0"),
    ("input: {scan_step: '3'}", "is '3'; expected a whole number above 0 (this is text in YAML; write 3)"),
    ("input: {scan_step: 2.0}", "input.scan_step is 2.0; expected a whole number above 0"),
    ("input: {skip_frames: -1}", "input.skip_frames is -1; expected a whole number of 0 or more or [leading, trailing]"),
    ("input: {shape: [4, 5]}", "input.shape is [4, 5]; expected [scan_y, scan_x, ky, kx] or [n, ky, kx]"),
    ("input: {dtype: '>u 2'}", "input.dtype is '>u 2'; expected a numpy type such as uint16"),
    ("input: {dark: 3}", "input.dark is 3; expected the path of a .npy file or null"),
    ("input: {mask: bad.txt}", "input.mask is bad.txt; expected auto or stop, the path of a .npy file, {pixels:"),
    ("input: {mask: {pixels: [[1, 2], [3, 4O]]}}", "input.mask.pixels[1][1] is 4O; expected"),
    ("input: {mask: {row: [1]}}", "input.mask.row is not a key; did you mean rows? Valid keys: pixels"),
    ("input: {mask_fill: mean}", "input.mask_fill is mean; expected zero or median"),
    ("input: {calibration: 3}", "input.calibration is 3; expected {ky: {scale: 0.01, units: 1/nm, offset: -0.6}, ...} for"),
    ("input: {calibration: {kz: {scale: 1, units: nm}}}", "input.calibration.kz is not a key. Valid keys: scan_y, scan_x, ky, kx"),
    ("input: {calibration: {ky: {scale: 1, unit: nm, units: nm}}}", "input.calibration.ky.unit is not a key; did you mean units? Valid keys: scale, units, offset"),
    ("input: {calibration: {ky: {scale: 0, units: nm}}}", "input.calibration.ky.scale is 0; expected {ky: "),
    ("input: {calibration: {ky: {scale: 1}}}", "input.calibration.ky.units is missing; expected"),
    ("input: {beam_energy_kv: 0}", "input.beam_energy_kv is 0; expected kilovolts, a number above 0 such as 200 or null"),
    # analyze
    ("analyze: {center_method: manual}", "analyze.manual_center is missing; center_method: manual"),
    ("analyze: {manual_center: [1, 2]}", "needs center_method: manual, but it is auto"),
    ("analyze: {target_retention: 1.5}", "analyze.target_retention is 1.5; expected a number above"),
    ("analyze: {threshold: -1}", "analyze.threshold is -1; expected a number of 0 or more"),
    ("analyze: {threshold: .nan}", "analyze.threshold is .nan; expected"),
    ("analyze: {threshold: 1e-5}", "is 1e-5; expected a number of 0 or more or auto (this is text in YAML; write 1.0e-05)"),
    # crop
    ("crop: 3", "crop is 3; expected a section with the keys enabled, coverage"),
    ("crop: {enabled: 1}", "crop.enabled is 1; expected true or false"),
    ("crop: {margin_pixels: -1}", "crop.margin_pixels is -1; expected a whole number of 0 or more"),
    ("crop: {align: patern}", "crop.align is patern; expected fixed, descan or pattern"),
    ("crop: {size: small}", "crop.size is small; expected auto, fft or common, a whole number above 0 or [y, x]"),
    ("crop: {size: '40'}", "(this is text in YAML; write 40)"),
    ("crop: {size: 0xFFFFFFFFFFFFFFFFFFFFFF}", "crop.size is 309485009821345068724781055; expected"),
    ("crop: {size: 2020-99-99}", "crop.size is '2020-99-99'; expected"),
    ("crop: {window: [1, 2, 3, 4], align: pattern}", "which needs align: fixed, but it is pattern"),
    ("crop: {window: [1, 2, 3, 4], size: 40}", "crop.window is [1, 2, 3, 4], which needs size: auto, but it is 40"),
    ("crop: {size: 41}", "crop.size is 41; expected a multiple of 2 (size_multiple x downsampling): 40 or 42"),
    ("crop: {size: 42, size_multiple: 4}\ndownsample: {factor: 2}", "crop.size is 42; expected a multiple of 8 (size_multiple x downsampling): 40 or 48"),
    ("crop: {margin_pixel: 3}", "crop.margin_pixel is not a key; did you mean margin_pixels? Valid keys: enabled, coverage, margin_pixels, align, criterion, k_max, n_alpha, size, square, window, size_multiple"),
    # validate
    ("validate: {min_retention: 1.1}", "validate.min_retention is 1.1; expected a number from 0 to 1"),
    ("validate: {min_retention: 0.99}", "is 0.99, more than analyze.target_retention, which is 0.98"),
    ("analyze: {target_retention: 0.9}", "validate.min_retention is 0.95, more than analyze.target_ret"),
    ("validation: {min_retention: 0.9}", "validation is not a key; did you mean validate?"),
    # downsample
    ("downsample: {method: fft, reduce: sum}", "downsample.reduce is sum, which needs method: bin, but it is fft"),
    ("downsample: {sigma: 1}", "downsample.sigma is 1.0, which needs method: gauss, but it is bin"),
    ("downsample: {method: gauss, sigma: 0}", "downsample.sigma is 0; expected a number above 0 or null"),
    # output
    ("output: {path: a.zip}", "output.path is a.zip; expected a path that ends in .zarr"),
    ("output: {path: out/.zarr}", "output.path is out/.zarr; expected"),
    ("output: {export: pt}", "output.export is pt; expected a list of pt, hspy, zspy, h5, hdf5, emd and npy, each at most once"),
    ("output: {export: [pt, mat]}", "output.export[1] is mat; expected a list of pt, hspy, zspy, h5, hdf5, emd and npy"),
    ("output: {export: [pt, pt]}", "output.export is [pt, pt]; expected"),
    ("output: {overwrite: 'yes'}", "output.overwrite is 'yes'; expected true or false"),
    ("output: {chunk_mb: 0}", "output.chunk_mb is 0; expected auto or a number above 0"),
    # cluster, device and the top
    ("cluster: {kind: slurm, memory_limit: 4GB}", "cluster.kind is slurm, which needs cluster.walltime"),
    ("cluster: {kind: slurm, walltime: '1:00:00'}", "cluster.kind is slurm, which needs cluster.memory_limit"),
    ("cluster: {walltime: 2:00:00}", "cluster.walltime is 7200; expected hours:minutes:seconds in quotes, such as"),
    ("cluster: {jobs: 0}", "cluster.jobs is 0; expected a whole number above 0 or [least, most]"),
    ("cluster: {jobs: [4, 2]}", r"cluster.jobs is [4, 2]; expected a whole number above 0 or [least, most]"),
    ("cluster: {queue: 'a b'}", "cluster.queue is a b; expected a name or null"),
    ("cluster: {job_extra: --constraint=a}", "expected a list of options of sbatch such as --constraint=skylake"),
    ("cluster: {job_extra: [constraint=a]}", "cluster.job_extra[0] is constraint=a; expected a list of options of sbatch"),
    ("cluster: {address: 'localhost:8786'}", "expected tcp://host:port or tls://host:port or null"),
    ("cluster: {address: 'tcp://localhost:70000'}", "expected tcp://host:port"),
    ("cluster: {address: 'tcp://a:1', scheduler_file: s.json}", "which needs address: null, but it is tcp://a:1"),
    ("cluster: {address: 'tcp://a:1', kind: threads}", "which needs kind: auto, but it is threads"),
    ("cluster: {host: 10.0.0.5}", "cluster.host is 10.0.0.5, which needs kind: local or slurm, but it is auto"),
    ("cluster: {host: 10.0.0.5, kind: local, address: 'tls://a:1'}", "which needs kind: auto, but it is local"),
    ("cluster: {host: 'tcp://a:1'}", "cluster.host is tcp://a:1; expected a name or address of this machine or null"),
    ("cluster: {insecure: 1}", "cluster.insecure is 1; expected true or false"),
    ("cluster: {memory_limit: 4}", "cluster.memory_limit is 4; expected a number with its unit, such as 4GB or 4GiB or null"),
    ("cluster: {memory_limit: 0GB}", "cluster.memory_limit is 0GB; expected"),
    ("device: cuda", "device is cuda; expected cpu, gpu or auto"),
    ("crops: {size: 3}", "crops is not a key; did you mean crop? Valid keys: input, analyze, descan, crop, validate, "),
    ("1: 2", "1 is not a key. Valid keys: input"),
    ("[1, 2]: 3", "a sequence is not a key. Valid keys: input"),
    ("<<: {device: gpu}", "<< is not a key. Valid keys"),
    ('"\\e[31m": 3', r"\x1b[31m is not a key"),
]  # fmt: skip


def merged(text: str) -> str:
    """The bad line in a file that is complete otherwise."""
    key = text.split(":")[0]
    rest = [line for line in MINIMAL.splitlines() if line.split(":")[0] != key]
    if key in ("input", "output") and "path" not in text:
        path = "synthetic" if key == "input" else "a.zarr"
        text = text.replace("{", f"{{path: {path}, ", 1)
    return "\n".join([*rest, text])


@pytest.mark.parametrize(("text", "expected"), BAD, ids=[text for text, _ in BAD])
def test_a_bad_value_is_named_with_what_was_expected(text, expected, load):
    said = message(load, merged(text))
    assert expected in said
    assert re.fullmatch(r"crop\.yaml, line [123]: .*", said)  # one problem, one line
    assert said.isprintable()


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 40)
)
BAD_FILES = [
    (BOMB, "crop.yaml, line 1: not usable as YAML: anchors, aliases and tags"),
    ("", "crop.yaml: the content is empty; expected a section with the keys input"),
    ("- 1\n- 2", "crop.yaml: the content is [1, 2]; expected"),
    ("a: [1", "crop.yaml, line 1: not usable as YAML: "),
    ("a: 1\n\tb: 2", "crop.yaml, line 2: not usable as YAML: "),
    (f"{MINIMAL}---\n{MINIMAL}", "expected a single document in the stream"),
    (f"{MINIMAL}crop: {{}}\ndevice: cpu\ncrop: {{}}", "line 5: not usable as YAML: crop is given twice, the first time in line 3"),
    (f"{MINIMAL}crop:\n  size: 3\n  size: 4", "line 5: not usable as YAML: crop.size is given twice, the first time in line 4"),
    ("a: &x 1\nb: *x", "crop.yaml, line 1: not usable as YAML: anchors, aliases and tags"),
    ("a: 1\nb: !!python/object/apply:os.system [ls]", "crop.yaml, line 2: not usable as YAML: anchors, aliases and tags"),
    ("[" * 60_000, "crop.yaml: not usable as YAML: maximum recursion depth exceeded"),
    ('a: "\\UFFFFFFFF"', "crop.yaml: not usable as YAML"),
    (b"\xff\xfe\x00binary", "crop.yaml: not UTF-8 text; expected a YAML file"),
    (b"a: \x00", "crop.yaml: not usable as YAML: unacceptable character"),
    (b"#" * (2**16 + 1), "crop.yaml is larger than 64 KiB; expected a YAML file of a few kB"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_that_is_no_config_gets_one_clear_message(text, expected, load):
    said = message(load, text)
    assert expected in said
    assert "\n" not in said


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(
        ConfigError, match=r"none\.yaml: No such file or directory; expected a YAML"
    ):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r": Is a directory; expected a YAML file"):
        load_config(tmp_path)


def test_all_problems_are_listed_each_with_the_line_of_its_key(load):
    said = message(
        load,
        "# a job\ninput:\n  mask:\n    rows: [1,\n      x]\noutput: {path: a.zarr}\n\n"
        "crop:\n  margin_pixel: 3\n  align: patern\n  siez: 4\nvalidate: 3\n",
    )
    assert sorted(said.splitlines()) == sorted(
        [
            "crop.yaml, line 2: input.path is missing; expected the path of a file, or synthetic, or a list of paths "
            "and globs",
            "crop.yaml, line 5: input.mask.rows[1] is x; expected auto or stop, the path of a .npy file, "
            "{pixels: [[y, x], ...], rows: [y, ...], columns: [x, ...]} or null",
            "crop.yaml, line 10: crop.align is patern; expected fixed, descan or pattern",
            "crop.yaml, line 9: crop.margin_pixel is not a key; did you mean margin_pixels? "
            "Valid keys: enabled, coverage, margin_pixels, align, criterion, k_max, n_alpha, size, square, window, size_multiple",
            "crop.yaml, line 11: crop.siez is not a key; did you mean size? "
            "Valid keys: enabled, coverage, margin_pixels, align, criterion, k_max, n_alpha, size, square, window, size_multiple",
            "crop.yaml, line 12: validate is 3; expected a section with the keys min_retention",
        ]
    )


def test_all_contradictions_are_listed(load):
    said = message(
        load,
        f"{MINIMAL}crop:\n  align: pattern\n  window: [1, 2, 3, 4]\ndownsample:\n  sigma: 2\n"
        "analyze:\n  target_retention: 0.9",
    )
    assert [line.split(" is ")[0] for line in said.splitlines()] == [
        "crop.yaml, line 9: validate.min_retention",  # the key that is at its default has no line
        "crop.yaml, line 5: crop.window",
        "crop.yaml, line 7: downsample.sigma",
    ]


def test_missing_sections(load):
    said = message(load, "device: cpu").splitlines()
    assert said[0].startswith("crop.yaml: input is missing; expected a section with the keys path")
    assert said[1].startswith("crop.yaml: output is missing; expected a section with the keys path")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "the content is empty"),
        ([], "the content is []; expected a section with the keys input"),
        (options(crop={1: 2}), "crop.1 is not a key. Valid keys: enabled"),
        ({1: 2}, "1 is not a key. Valid keys: input"),
        (options(crop={"size": object()}), "crop.size is a object; expected auto"),
        (options(crop={"size": {40, 44}}), "crop.size is "),
        (options(**{"a\ud800": 1}), "expected a section with the keys input"),
        (options(crop={"margin_pixels": "3"}), "crop.margin_pixels is '3'; expected a whole number"),
    ],
)  # fmt: skip
def test_python_callers_get_the_same_words_without_a_file(given, expected):
    said = message(parse_config, given)
    assert expected in said
    assert "line" not in said


def test_long_values_are_cut():
    said = message(parse_config, options(crop={"align": "x" * 10_000}))
    assert len(said) < 200
    assert "x …; expected fixed, descan or pattern" in said


def test_a_long_number_stays_readable(load):
    for digits in (100, 2000, 5000, 100_000):
        assert "expected" in message(load, f"{MINIMAL}crop: {{size: 0x{'f' * digits}}}")


# ---- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("analyze.target_retention=0.99", "analyze.target_retention", 0.99),
        ("output.export=[pt]", "output.export", ["pt"]), ("output.export=[]", "output.export", []),
        ("crop.size=[40,44]", "crop.size", [40, 44]), ("crop.size=auto", "crop.size", "auto"),
        (" crop.size = 40 ", "crop.size", 40),
        ("crop.enabled=false", "crop.enabled", False), ("device=gpu", "device", "gpu"),
        ("input.path=/d/scan.dm4", "input.path", "/d/scan.dm4"),
        ("input.path=/d/scan #3.dm4", "input.path", "/d/scan #3.dm4"),
        ("input.path=/d/a=b: c.dm4", "input.path", "/d/a=b: c.dm4"),
        ("input.path='/d/a b.dm4'", "input.path", "/d/a b.dm4"),
        ("input.path=s3://bucket/a.zarr", "input.path", "s3://bucket/a.zarr"),
        ("input.path=synthetic", "input.path", "synthetic"), ("input.dataset=3", "input.dataset", 3),
        ("input.dataset='3'", "input.dataset", "3"),
        ("input.dataset=2020-01-01", "input.dataset", "2020-01-01"),
        ("input.dataset=true", "input.dataset", "true"),
        ("input.dataset=null", "input.dataset", None), ("input.dataset=", "input.dataset", None),
        ("input.mask=/m.npy", "input.mask", "/m.npy"),
        ("input.mask={rows: [3]}", "input.mask", {"pixels": [], "rows": [3], "columns": []}),
        ("output.path=/d/[1].zarr", "output.path", "/d/[1].zarr"),
        ("output.path=/d/a.zarr/", "output.path", "/d/a.zarr"),
        ("output.chunk_mb=32", "output.chunk_mb", 32.0),
        ("cluster.address=tcp://node:8786", "cluster.address", "tcp://node:8786"),
        ("cluster.memory_limit=4GB", "cluster.memory_limit", "4GB"),
        ("cluster.walltime=2:00:00", "cluster.walltime", "2:00:00"),
        ("cluster.jobs=[1, 8]", "cluster.jobs", [1, 8]),
        ("validate.min_retention=0.5", "validate.min_retention", 0.5),
    ],
)  # fmt: skip
def test_overrides(override, key, value, load):
    result = to_dict(load(MINIMAL, override))
    for part in key.split("."):
        result = result[part]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("name", ["2020-01-01", "1e3", "3", "null", "~", "{a: b}", "'", "#"])
def test_a_path_is_taken_as_it_was_typed(name, load, tmp_path):
    expected = os.path.expanduser("~") if name == "~" else str(tmp_path / name)
    assert load(MINIMAL, f"input.path={name}").input.path == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("analyze.target_retention=1.5", "analyze.target_retention is 1.5; expected a number above 0"),
        ("crop.margin_pixel=3", "crop.margin_pixel is not a key; did you mean margin_pixels? Valid keys: enabled"),
        ("crp.size=3", "crp is not a key; did you mean crop? Valid keys: input, analyze"),
        ("foo=3", "foo is not a key. Valid keys: input, analyze"),
        ("crop=3", "crop is 3; expected a section with the keys enabled"),
        ("crop.size", "expected key=value. Valid keys: enabled, coverage"),
        ("foo", "expected key=value. Valid keys: input, analyze, descan, crop, validate"),
        ("=3", "expected key=value. Valid keys: input"),
        (".size=3", "expected key=value. Valid keys: input"),
        ("crop.=3", "crop. is not a key. Valid keys: enabled"),
        ("crop.size.y=3", "crop.size.y is not a key; did you mean size?"),
        ("crop.size=[40,", "crop.size is '[40,'; expected auto"),
        ("crop.size='40'", "crop.size is '40'; expected auto"),
        ("crop.enabled=", "crop.enabled is null; expected true or false"),
        ("input.path=", "input.path is null; expected the path"),
        ("output.path=a", "output.path is a; expected a path that ends in .zarr"),
        ("input.mask={rows: [a]}", "input.mask.rows[0] is a; expected"),
        ("input.mask={rows: [1], rows: [2]}", "input.mask is '{rows: [1], rows: [2]}'; expected"),
        ("crop.size=!!python/name:os.system", "crop.size is '!!python/name:os.system'; expected"),
        ("analyze.target_retention=0.5", "validate.min_retention is 0.95, more than"),
        ("crop.align=\x1b[31m", "crop.align is "),
    ],
)  # fmt: skip
def test_a_bad_override_is_named(override, expected, load):
    said = message(load, MINIMAL, override)
    assert said.startswith(f"override {repr(override)[1:-1]}: ")
    assert expected in said
    assert said.isprintable()


def test_overrides_mix_with_what_the_file_has(load):
    text = f"{MINIMAL}crop:\nanalyze: {{threshold: 5}}\ndevice: gpu\n"
    config = load(text, "crop.size=4", "analyze.target_retention=1", "crop.size=6", "device=cpu")
    assert (config.crop.size, config.analyze.threshold, config.device) == (6, 5.0, "cpu")
    assert load_config("crop.yaml", "crop.size=8").crop.size == 8  # one, not in a list


def test_problems_of_file_and_overrides_are_told_apart(load):
    text = f"{MINIMAL}crop:\n  size: 0\n  coverage: 2\n"
    said = message(load, text, "crop.size=-1", "analyze.threshold=x").splitlines()
    assert [line.split(": ")[0] for line in said] == [
        "override analyze.threshold=x",
        "crop.yaml, line 5",
        "override crop.size=-1",
    ]
    assert message(load, f"{MINIMAL}crop: 3", "crop.size=4").startswith(
        "crop.yaml, line 3: crop is 3"
    )
    assert message(load, "", "crop.size=4").startswith("crop.yaml: the content is empty")


# ---- paths


def test_relative_paths_become_absolute(load, tmp_path):
    text = "input: {path: d/a.dm4, mask: m.npy}\noutput: {path: ~/a.zarr}\ncluster: {scheduler_file: s}"
    config = load(text)
    assert config.input.path == str(tmp_path / "d" / "a.dm4")
    assert config.input.mask == str(tmp_path / "m.npy")
    assert config.output.path == os.path.expanduser("~/a.zarr")
    assert config.cluster.scheduler_file == str(tmp_path / "s")
    assert parse_config({"input": {"path": "a"}, "output": {"path": "b.zarr"}}).input.path == "a"


def test_the_mask_given_by_index_is_no_path(load):
    assert load(f"{MINIMAL}", "input.mask={rows: [1]}").input.mask.rows == (1,)


# ---- nothing but ConfigError, ever


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "crop.yaml"


def only_config_errors(path: Path, content: bytes, *overrides: str) -> None:
    path.write_bytes(content)
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        assert str(error)  # noqa: PT017
    else:
        assert parse_config(to_dict(config)) == config


@given(content=st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(max_examples=300, deadline=None)
def test_random_files(scratch, content):
    only_config_errors(scratch, content)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_random_mutations_of_the_shipped_config(scratch, data):
    text = SHIPPED.read_text()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(start + 30, len(text))))
        piece = st.sampled_from([*"\t\n:#[]{}&*!|>%@`'\"?,-=", "<<: ", "0x_", "1:99", "- ", "null"])
        text = text[:start] + data.draw(piece | st.text(max_size=5)) + text[end:]
    only_config_errors(scratch, text.encode("utf-8", "surrogatepass"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(data=st.data(), value=VALUES)
@settings(max_examples=200, deadline=None)
def test_random_values_of_every_key(scratch, data, value):
    section = data.draw(st.sampled_from(SECTIONS))
    given = to_dict(parse_config(options()))
    given[section][data.draw(st.sampled_from([*given[section]]))] = value
    try:
        config = parse_config(given)
    except ConfigError as error:
        assert str(error).startswith((f"{section}.", "analyze.", "validate."))  # noqa: PT017
    else:
        assert parse_config(to_dict(config)) == config


@given(
    key=st.sampled_from(["input.path", "input.mask", "crop.size", "crop", "a.b"]), text=st.text()
)
@settings(max_examples=200, deadline=None)
def test_random_overrides(scratch, key, text):
    only_config_errors(scratch, MINIMAL.encode(), f"{key}={text}", text)


# ---- the module itself


def test_nothing_heavy_is_imported():
    code = (
        "import sys, stem_dask.config.load; "
        "print(*sorted({'numpy', 'dask', 'xarray', 'zarr', 'numba', 'torch'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_type_has_words_for_its_error():
    for model in (module.Config, *module.SECTIONS.values()):
        for hint in model.__annotations__.values():
            assert len(module._expected(hint)) > 3
