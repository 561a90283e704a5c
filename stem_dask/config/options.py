"""All options of a job and their defaults: one frozen model per section.

The text in an annotated type completes "expected …" in an error message.
"""

import functools
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Annotated, Any, Literal, NoReturn, ParamSpec, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from stem_dask.core.errors import StemDaskError
from stem_dask.core.formats import FORMATS

SYNTHETIC = "synthetic"  # the word for the built-in dataset, which is not a path

# these run in pydantic's Rust, which also refuses a str that is not valid Unicode
_TEXT = r"^\P{Cc}*[^\p{Cc}\s]\P{Cc}*$"
_FILE = r"^\P{Cc}*[^\p{Cc}/]\."
_ADDRESS = r"^(tcp|tls)://(\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]]+):([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-5][0-9]{3})$"
_MEMORY = r"^(?i)0*[1-9][0-9]{0,8}(\.[0-9]{1,6})? ?([kmgt]i?b?|b)$"


def _refuse() -> NoReturn:
    raise ValueError  # the message is the text of the type


# strict models take no list for a tuple, and YAML has only lists
_List = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_Rising = AfterValidator(lambda b: b if b[0] < b[1] and b[2] < b[3] else _refuse())
_Distinct = AfterValidator(lambda names: names if len({*names}) == len(names) else _refuse())
_NotZero = AfterValidator(lambda scale: scale if scale != 0 else _refuse())
Whole = Annotated[int, Field(ge=0, lt=2**31), "a whole number of 0 or more"]
Count = Annotated[int, Field(ge=1, lt=2**31), "a whole number above 0"]
Fraction = Annotated[float, Field(gt=0, le=1), "a number above 0 and at most 1"]
Share = Annotated[float, Field(ge=0, le=1), "a number from 0 to 1"]
Amount = Annotated[float, Field(ge=0), "a number of 0 or more"]
Positive = Annotated[float, Field(gt=0), "a number above 0"]
Kilovolts = Annotated[float, Field(gt=0, le=10_000), "kilovolts, a number above 0 such as 200"]
Shape = Annotated[tuple[Count, Count], _List, "[y, x] of whole numbers above 0"]
Point = Annotated[tuple[Amount, Amount], _List, "[y, x] of numbers of 0 or more"]
Ends = Annotated[tuple[Whole, Whole], _List, "[leading, trailing]"]
Edges = tuple[Whole, Whole, Whole, Whole]
Box = Annotated[Edges, _List, _Rising, "[y0, y1, x0, x1] with y0 < y1 and x0 < x1"]
Indices = Annotated[tuple[Whole, ...], _List]
Pixels = Annotated[tuple[Annotated[tuple[Whole, Whole], _List], ...], _List]
Sizes = Annotated[
    tuple[Count, Count, Count] | tuple[Count, Count, Count, Count],
    _List,
    "[scan_y, scan_x, ky, kx] or [n, ky, kx], whole numbers above 0",
]
Dtype = Annotated[str, Field(pattern=r"^[<>=|]?[A-Za-z][A-Za-z0-9]{0,15}$"), "a numpy type such as uint16 or >u2"]  # fmt: skip
Place = Annotated[int, Field(ge=0, lt=2**62), "a whole number of 0 or more"]
Text = Annotated[str, Field(pattern=_TEXT), "text"]
Paths = Annotated[tuple[Text, ...], _List, Field(min_length=1)]
File = Annotated[str, Field(pattern=_TEXT), "the path of a file"]
Npy = Annotated[str, Field(pattern=rf"{_FILE}npy$"), "the path of a .npy file"]


def _output(path: str) -> str:
    """The path of an output; shells complete the name of a folder with a slash."""
    bare = path.removesuffix("/")
    form = FORMATS.get(PurePath(bare).suffix)
    return bare if form is not None and (bare == path or form.is_folder) else _refuse()


Product = Annotated[str, Field(pattern=rf"{_FILE}\w+/?$"), AfterValidator(_output), "a path that ends in .zarr, .zspy, .hspy, .h5, .hdf5, .emd, .npy or .pt"]  # fmt: skip
Address = Annotated[str, Field(pattern=_ADDRESS), "tcp://host:port or tls://host:port"]
Host = Annotated[str, Field(pattern=r"^[\w.:-]+$"), "a name or address of this machine"]
Memory = Annotated[str, Field(pattern=_MEMORY), "a number with its unit, such as 4GB or 4GiB"]
_WALLTIME = r"^([0-9]+-)?[0-9]+:[0-5][0-9]:[0-5][0-9]$"
Walltime = Annotated[str, Field(pattern=_WALLTIME), 'hours:minutes:seconds in quotes, such as "12:00:00" or "2-00:00:00"']  # fmt: skip
Word = Annotated[str, Field(pattern=r"^\w[\w.,:@+-]*$"), "a name"]
_Ordered = AfterValidator(lambda pair: pair if pair[0] <= pair[1] else _refuse())
JobRange = Annotated[tuple[Count, Count], _List, _Ordered, "[least, most]"]
Directive = Annotated[str, Field(pattern=r"^--?[A-Za-z][^\p{Cc}]*$")]
Directives = Annotated[tuple[Directive, ...], _List, "a list of options of sbatch such as --constraint=skylake"]  # fmt: skip
_Export = Annotated[str, AfterValidator(lambda kind: kind if f".{kind}" in FORMATS and kind != "zarr" else _refuse())]  # fmt: skip
Exports = Annotated[tuple[_Export, ...], _List, _Distinct, "a list of pt, hspy, zspy, h5, hdf5, emd and npy, each at most once"]  # fmt: skip
_MASK = "{pixels: [[y, x], ...], rows: [y, ...], columns: [x, ...]}"
_CALIBRATION = "{ky: {scale: 0.01, units: 1/nm, offset: -0.6}, ...} for scan_y, scan_x, ky, kx, with a scale other than 0"

#: (section, key, other, values): a key that is not at its default requires one of these values of the other key
NEEDS: tuple[tuple[str, str, str, tuple[str | None, ...]], ...] = (
    ("analyze", "manual_center", "center_method", ("manual",)),
    ("analyze", "guess", "center_method", ("auto", "disc", "friedel")),
    ("crop", "window", "align", ("fixed",)),
    ("crop", "k_max", "criterion", ("k_max",)),
    ("crop", "n_alpha", "criterion", ("k_max",)),
    ("crop", "window", "size", ("auto",)),
    ("downsample", "reduce", "method", ("bin",)),
    ("downsample", "sigma", "method", ("gauss",)),
    ("cluster", "host", "kind", ("local", "slurm")),
    ("cluster", "address", "kind", ("auto",)),  # one of the two would be ignored
    ("cluster", "scheduler_file", "kind", ("auto",)),
    ("cluster", "scheduler_file", "address", (None,)),
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Mask(_Section):  # bad pixels of the detector, by index
    pixels: Pixels = ()
    rows: Indices = ()
    columns: Indices = ()


class AxisScale(_Section):  # value = offset + scale * index
    scale: Annotated[float, _NotZero]
    units: Text
    offset: float | None = None  # at the first pixel of the file; null: the zero stays where it was


class Calibration(_Section):  # of the axes, where the file lacks it
    scan_y: AxisScale | None = None
    scan_x: AxisScale | None = None
    ky: AxisScale | None = None
    kx: AxisScale | None = None


class Input(_Section):  # what is read
    path: Annotated[
        Text | Paths, f"the path of a file, or {SYNTHETIC}, or a list of paths and globs"
    ]
    dataset: Whole | Annotated[Text, "a name"] | None = None
    series: bool = False
    index: Annotated[dict[str, Whole], "an index by axis, such as {t: 3}"] | None = None
    scan_shape: Shape | None = None
    scan_order: Literal["auto", "scan_first", "detector_first"] = "auto"
    scan_roi: Box | None = None
    scan_step: Count = 1
    skip_frames: Whole | Ends = 0
    drop_columns: Whole = 0
    flip: bool = False
    missing_chunks: Literal["refuse", "zero"] = "refuse"
    shape: Sizes | None = None
    dtype: Dtype | None = None
    offset: Place = 0
    frame_header: Place = 0
    frame_footer: Place = 0
    dark: Npy | None = None
    gain: Npy | None = None
    mask: Literal["auto", "stop"] | Npy | Annotated[Mask, _MASK] | None = None
    mask_fill: Literal["zero", "median"] = "zero"
    calibration: Annotated[Calibration, _CALIBRATION] | None = None
    beam_energy_kv: Kilovolts | None = None


class Analyze(_Section):  # how centers and radii are found
    center_method: Literal["auto", "disc", "centroid", "friedel", "center", "manual"] = "auto"
    manual_center: Point | None = None
    guess: Point | None = None
    disc_radius: Positive | None = None
    convergence_mrad: Positive | None = None
    calibrate: Literal["none", "disc"] = "none"
    ignore_bad_pixels: bool = True
    radius_metric: Literal["square", "circle"] = "square"
    target_retention: Fraction = 0.98
    threshold: Amount | Literal["auto"] = 0.0
    background: Literal["none", "pedestal"] = "none"
    passes: Literal["auto", "one", "two"] = "auto"
    ahead: bool = False  # without a crop, for a later one
    known: File | None = Field(default=None, alias="from")  # a precomputed analysis


class Descan(_Section):  # the smooth surface that the beam follows over the scan
    order: Literal["auto", 0, 1, 2] = "auto"
    reference: File | None = None
    region: Box | None = None


class Crop(_Section):  # what is cut from every pattern
    enabled: bool = True
    coverage: Fraction = 0.999
    margin_pixels: Whole = 3
    align: Literal["fixed", "descan", "pattern"] = "fixed"
    criterion: Literal["intensity", "scattered", "k_max"] = "intensity"
    k_max: Positive | None = None
    n_alpha: Positive | None = None
    size: Literal["auto", "fft", "common"] | Count | Shape = "auto"
    square: bool = False
    window: Box | None = None
    size_multiple: Count = 2

    @property
    def given(self) -> tuple[int, int] | None:
        """Height and width of the window if the config gives them; None if the analysis finds them."""
        if self.enabled and self.window is not None:
            y0, y1, x0, x1 = self.window
            return y1 - y0, x1 - x0
        if not self.enabled or isinstance(self.size, str):
            return None
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class Validate(_Section):  # what is checked after cropping
    min_retention: Share = 0.95


class Downsample(_Section):  # how the detector is reduced
    factor: Count = 1
    method: Literal["bin", "stride", "gauss", "fft"] = "bin"
    reduce: Literal["mean", "sum"] = "mean"
    sigma: Positive | None = None


class Output(_Section):  # what is written
    path: Product
    patterns: bool = True  # else only what the analysis finds
    dtype: Literal["auto", "float32", "float16"] = "auto"
    normalize: Literal["none", "log-zscore"] = "none"
    export: Exports = ("pt", "hspy")
    layout: Literal["scan", "nchw", "tensor"] = "scan"
    signal_type: Word | None = None  # of HyperSpy, default the input's
    codec: Literal["auto", "lz4", "zstd", "gzip", "none"] = "auto"
    rechunk: bool = True
    overwrite: bool = False
    chunk_mb: Literal["auto"] | Positive = "auto"
    figure: bool = True
    local_folder: File | None = None  # of a URL: what stays here, default the working directory

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, options: Any) -> Any:
        """Exports and figure are made from a store, so the defaults for any other format are none."""
        path = options.get("path") if isinstance(options, dict) else None
        if isinstance(path, str) and not path.rstrip("/").endswith(".zarr"):
            return {"export": (), "figure": False} | options
        return options


class Cluster(_Section):  # where the work runs; sizes are per worker
    kind: Literal["auto", "threads", "local", "slurm", "gpu"] = "auto"
    host: Host | None = None
    address: Address | None = None
    scheduler_file: File | None = None
    insecure: bool = False
    n_workers: Count | None = None
    threads_per_worker: Count | None = None
    memory_limit: Memory | None = None
    jobs: Count | JobRange = 1  # from here on: SLURM, with kind slurm or stem-dask batch --slurm
    walltime: Walltime | None = None
    queue: Word | None = None
    account: Word | None = None
    job_extra: Directives = ()
    log_directory: File | None = None


class Config(_Section):
    """All options of a job, made by `load_config` or `parse_config`, which also check keys together."""

    input: Input
    analyze: Analyze = Analyze()
    descan: Descan = Descan()
    crop: Crop = Crop()
    validation: Validate = Field(Validate(), alias="validate")  # pydantic has a method `validate`
    downsample: Downsample = Downsample()
    output: Output
    cluster: Cluster = Cluster()
    device: Literal["cpu", "gpu", "auto"] = "cpu"
    on_error: Literal["stop", "quarantine"] = "stop"  # when a part of the input cannot be read

    def __repr__(self) -> str:
        """The keys that are not at their defaults, as overrides."""
        words = []
        for name, field in type(self).model_fields.items():
            key, value = field.alias or name, getattr(self, name)
            if not isinstance(value, BaseModel):
                words += [f"{key}={value}"] if value != field.default else []
                continue
            for part, inner in type(value).model_fields.items():
                if (one := getattr(value, part)) != inner.default:
                    words.append(f"{key}.{inner.alias or part}={_shortened(one)}")
        text = ", ".join(words)
        return f"<Config {text if len(text) < 580 else text[:570] + ' …'}>"

    __str__ = __repr__


def _shortened(value: Any) -> str:
    """A value of at most 120 characters."""
    text = str(value)
    return text if len(text) <= 120 else f"{text[:60]} … {text[-50:]}"


_MODELS = (Input, Analyze, Descan, Crop, Validate, Downsample, Output, Cluster)

SECTIONS: dict[str, type[BaseModel]] = {model.__name__.lower(): model for model in _MODELS}


# --- messages for Python callers: names of arguments instead of keys ---------------------------------------------

P = ParamSpec("P")
T = TypeVar("T")

#: a key of a config in a message, and its value
_KEY = re.compile(
    r"(?<![\w./\\-])(input|analyze|descan|crop|validate|downsample|output|cluster)\.([a-z_]+)(?!\w|/|\.\w)"
    r"(?:=([\w.+-]*\w)|(?:=|: )(\[[^\]]*\]|(?:true|false|null|\d+|float\d\d|scan_first|detector_first)\b))?"
)
_VALUES = {"true": "True", "false": "False", "null": "None"}


def in_python(text: str) -> str:
    """Rewrite a message about config keys for Python arguments.

    Examples
    --------
    >>> in_python("out.pt exists; set output.overwrite=true, or give input.scan_shape: [4, 8] for input.npy")
    'out.pt exists; set overwrite=True, or give scan_shape=[4, 8] for input.npy'
    """

    def argument(found: re.Match[str]) -> str:
        section, name, value = found[1], found[2], found[3] or found[4]
        fields = SECTIONS[section].model_fields.items()
        if name not in {field.alias or own for own, field in fields}:
            return found[0]  # a file name
        if value is None:
            return name
        word = value[0].isalpha() and value not in _VALUES
        return f"{name}={repr(value) if word else _VALUES.get(value, value)}"

    return _KEY.sub(argument, text)


def speaking_python(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a public function, so that errors name its arguments instead of config keys."""

    @functools.wraps(function)
    def called(*args: P.args, **options: P.kwargs) -> T:
        try:
            return function(*args, **options)
        except StemDaskError as error:
            error.args = (in_python(str(error)),)
            raise

    return called
