"""Every option of the job: one frozen model per section, read from YAML with errors that name the line.

The defaults stand here and nowhere else. The text in a type completes "expected …" in an error.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from stem_dask.errors import ConfigError

MAX_FILE_BYTES = 2**20  # a job's file is a few kB; more is a mistake, and slow to parse
MAX_VALUE_CHARACTERS = 2048  # even a hexadecimal number of this length can be shown
MAX_DEPTH = 32  # input.mask.pixels needs 5; the time PyYAML takes grows with the square
_OPENING = ("[", "{", "<block sequence start>", "<block mapping start>")
_CLOSING = ("]", "}", "<block end>")
SYNTHETIC = "synthetic"  # the word for the built-in dataset, which is not a path
_PATHS = ("input.path", "input.mask", "output.path", "cluster.scheduler_file")
_SHOWN_CHARACTERS = 80
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]{1,2})?", re.IGNORECASE)
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
_Bare = AfterValidator(lambda path: path.rstrip("/"))  # shells complete a directory's name with one
Whole = Annotated[int, Field(ge=0, lt=2**31), "a whole number of 0 or more"]
Count = Annotated[int, Field(ge=1, lt=2**31), "a whole number above 0"]
Fraction = Annotated[float, Field(gt=0, le=1), "a number above 0 and at most 1"]
Share = Annotated[float, Field(ge=0, le=1), "a number from 0 to 1"]
Amount = Annotated[float, Field(ge=0), "a number of 0 or more"]
Positive = Annotated[float, Field(gt=0), "a number above 0"]
Shape = Annotated[tuple[Count, Count], _List, "[y, x] of whole numbers above 0"]
Point = Annotated[tuple[Amount, Amount], _List, "[y, x] of numbers of 0 or more"]
Edges = tuple[Whole, Whole, Whole, Whole]
Box = Annotated[Edges, _List, _Rising, "[y0, y1, x0, x1] with y0 < y1 and x0 < x1"]
Indices = Annotated[tuple[Whole, ...], _List]
Pixels = Annotated[tuple[Annotated[tuple[Whole, Whole], _List], ...], _List]
Text = Annotated[str, Field(pattern=_TEXT), "text"]
File = Annotated[str, Field(pattern=_TEXT), "the path of a file"]
Npy = Annotated[str, Field(pattern=rf"{_FILE}npy$"), "the path of a .npy file"]
Zarr = Annotated[str, Field(pattern=rf"{_FILE}zarr/?$"), _Bare, "a path that ends in .zarr"]
Address = Annotated[str, Field(pattern=_ADDRESS), "tcp://host:port or tls://host:port"]
Host = Annotated[str, Field(pattern=r"^[\w.:-]+$"), "a name or address of this machine"]
Bytes = Annotated[int, Field(gt=0, lt=2**63), "bytes"]
Memory = Annotated[str, Field(pattern=_MEMORY), "text such as 4GB or 4GiB"]
Formats = tuple[Literal["pt", "hspy"], ...]
Exports = Annotated[Formats, _List, _Distinct, "a list of pt and hspy, each at most once"]
_MASK = "{pixels: [[y, x], ...], rows: [y, ...], columns: [x, ...]}"

#: in a section, a key that is not at its default needs another key to have this value
_NEEDS: tuple[tuple[str, str, str, str | None], ...] = (
    ("analyze", "manual_center", "center_method", "manual"),
    ("crop", "window", "align", "fixed"),
    ("crop", "window", "size", "auto"),
    ("downsample", "reduce", "method", "bin"),
    ("downsample", "sigma", "method", "gauss"),
    ("cluster", "host", "kind", "local"),
    ("cluster", "address", "kind", "auto"),  # one of the two would be ignored
    ("cluster", "scheduler_file", "kind", "auto"),
    ("cluster", "scheduler_file", "address", None),
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Mask(_Section):  # bad pixels of the detector, by index
    pixels: Pixels = ()
    rows: Indices = ()
    columns: Indices = ()


class Input(_Section):  # what is read
    path: Annotated[Text, f"the path of a file, or {SYNTHETIC}"]
    dataset: Whole | Annotated[Text, "a name"] | None = None
    scan_shape: Shape | None = None
    scan_order: Literal["auto", "scan_first", "detector_first"] = "auto"
    scan_roi: Box | None = None
    scan_step: Count = 1
    mask: Npy | Annotated[Mask, _MASK] | None = None
    mask_fill: Literal["zero", "median"] = "zero"


class Analyze(_Section):  # how centers and radii are found
    center_method: Literal["centroid", "center", "manual"] = "centroid"
    manual_center: Point | None = None
    radius_metric: Literal["square", "circle"] = "square"
    target_retention: Fraction = 0.98
    threshold: Amount = 0.0


class Crop(_Section):  # what is cut from every pattern
    enabled: bool = True
    coverage: Fraction = 0.999
    margin_pixels: Whole = 3
    align: Literal["fixed", "pattern"] = "fixed"
    size: Literal["auto"] | Count | Shape = "auto"
    window: Box | None = None
    size_multiple: Count = 2


class Validate(_Section):  # what is checked after cropping
    min_retention: Share = 0.95


class Downsample(_Section):  # how the detector is reduced
    factor: Count = 1
    method: Literal["bin", "stride", "gauss", "fft"] = "bin"
    reduce: Literal["mean", "sum"] = "mean"
    sigma: Positive | None = None


class Output(_Section):  # what is written
    path: Zarr
    dtype: Literal["auto", "float32", "float16"] = "auto"
    export: Exports = ("pt", "hspy")
    layout: Literal["scan", "nchw", "tensor"] = "scan"
    overwrite: bool = False
    chunk_mb: Literal["auto"] | Positive = "auto"
    figure: bool = True


class Cluster(_Section):  # where the work runs; sizes are per worker
    kind: Literal["auto", "threads", "local"] = "auto"
    host: Host | None = None
    address: Address | None = None
    scheduler_file: File | None = None
    insecure: bool = False
    n_workers: Count | None = None
    threads_per_worker: Count | None = None
    memory_limit: Bytes | Memory | None = None


class Config(_Section):
    """All options of a job, made by `load_config` or `parse_config`, which also check keys together."""

    input: Input
    analyze: Analyze = Analyze()
    crop: Crop = Crop()
    validation: Validate = Field(Validate(), alias="validate")  # pydantic has a method `validate`
    downsample: Downsample = Downsample()
    output: Output
    cluster: Cluster = Cluster()
    device: Literal["cpu", "gpu", "auto"] = "cpu"


_MODELS = (Input, Analyze, Crop, Validate, Downsample, Output, Cluster)
_SECTIONS: dict[str, type[BaseModel]] = {model.__name__.lower(): model for model in _MODELS}


def defaults(section: str) -> dict[str, Any]:
    """Every key of a section that has a default, and this default."""
    fields = _SECTIONS[section].model_fields.items()
    return {name: field.default for name, field in fields if not field.is_required()}


def to_dict(config: Config) -> dict[str, Any]:
    """The options as plain dictionaries, lists and numbers, for YAML, JSON and `parse_config`."""
    return config.model_dump(mode="json", by_alias=True)


def parse_config(options: Mapping[str, Any]) -> Config:
    """Options from one dictionary per section; paths are taken as they are.

    Examples
    --------
    >>> config = parse_config({"input": {"path": "a.dm4"}, "output": {"path": "a.zarr"}})
    >>> config.crop.margin_pixels, to_dict(config)["validate"], defaults("validate")
    (3, {'min_retention': 0.95}, {'min_retention': 0.95})
    """
    return _validated(options, {})


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Options from a YAML file (at most 1 MiB; no anchors, aliases, tags), relative paths made absolute.

    An override is ``key=value``; the value is YAML, or text where the key takes text. A `ConfigError`
    lists the problems, one a line, each with the line of its key.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
    ...     print("{input: {path: synthetic}, output: {path: a.zarr}}", file=file, flush=True)
    ...     load_config(file.name, ["crop.size=[40, 44]"]).crop.size
    (40, 44)
    """
    places = {"": os.fspath(path)}
    data = _parse(_read(places[""]), places)
    for text in [overrides] if isinstance(overrides, str) else overrides:
        _override(data, text, places)
    options = to_dict(_validated(data, places))
    for section, key in (dotted.split(".") for dotted in _PATHS):
        text = options[section][key]
        if isinstance(text, str) and text != SYNTHETIC and "://" not in text:
            options[section][key] = os.path.abspath(os.path.expanduser(text))
    return parse_config(options)


def _read(name: str) -> str:
    try:
        with open(name, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"{name} is larger than 1 MiB; expected a YAML file of a few kB")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "not UTF-8 text")
        raise ConfigError(f"{name}: {reason}; expected a YAML file") from None


def _parse(text: str, places: dict[str, str]) -> Any:
    """The value of one YAML document; ``places`` gets the line of every key."""
    place, loader, depth = places[""], yaml.SafeLoader(""), 0
    try:
        for token in yaml.scan(text):  # before anything is built from it
            kind = getattr(token, "id", "")  # the type stubs do not know it
            depth += (kind in _OPENING) - (kind in _CLOSING)
            if kind in ("<anchor>", "<alias>", "<tag>") or depth > MAX_DEPTH:
                refused = "anchors, aliases, tags (&, *, ! before a value) or too deep nesting"
                raise yaml.MarkedYAMLError(problem=refused, problem_mark=token.start_mark)
        node = yaml.compose(text, yaml.SafeLoader)
        return None if node is None else _plain(loader, node, "", places)
    except yaml.MarkedYAMLError as error:
        place += f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
    raise ConfigError(f"{place}: not usable as YAML: {reason}")


def _plain(loader: yaml.SafeLoader, node: yaml.Node, key: str, places: dict[str, str]) -> Any:
    places.setdefault(key, f"{places['']}, line {node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, n, f"{key}[{i}]", places) for i, n in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        with suppress(yaml.YAMLError, ValueError, OverflowError):  # such as the date 2020-99-99
            if len(node.value) <= MAX_VALUE_CHARACTERS:
                return loader.construct_object(node)
        return node.value
    result: dict[str, Any] = {}
    for name, value in node.value:
        word = repr(name.value)[1:-1] if isinstance(name.value, str) else f"a {name.id}"
        full = f"{key}.{word}".lstrip(".")
        if word in result:
            problem = f"{full} is given twice, the first time in{places[full].rpartition(',')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=name.start_mark)
        places[full] = f"{places['']}, line {name.start_mark.line + 1}"
        result[word] = _plain(loader, value, full, places)
    return result


def _override(data: Any, text: str, places: dict[str, str]) -> None:
    """Set one key; what is wrong with it is found when all options are validated."""
    name, equals, value = (part.strip() for part in text.partition("="))
    section, dot, key = name.partition(".")
    model, place = _SECTIONS.get(section, Config), f"override {repr(text)[1:-1]}"
    if not equals or not section:
        raise ConfigError(f"{place}: expected key=value. Valid keys: {', '.join(_keys(model))}")
    data = data if isinstance(data, dict) else {}  # what else it is comes out then, too
    inside = [old for old in places if old.startswith((f"{name}.", f"{name}["))]
    places |= {section: places.get(section, place)} | dict.fromkeys([name, *inside], place)
    if dot and data.get(section) is None:
        data[section] = {}
    target, leaf = (data[section], key) if dot else (data, section)
    if isinstance(target, dict):
        target[leaf] = _chosen(value, model.__annotations__.get(leaf))


def _chosen(text: str, hint: Any) -> Any:
    """The YAML value of an override, or its text where only that suits the key."""
    value: Any = text
    with suppress(ConfigError):
        value = _parse(text, {"": ""})
    if isinstance(value, str):
        return value if text[:1] in ("'", '"') else text  # YAML ends `scan #3.dm4` at the #
    for candidate in (value, text):
        with suppress(pydantic.ValidationError):
            pydantic.TypeAdapter(hint).validate_python(candidate, strict=True)
            return candidate
    return value


def _validated(options: Any, places: dict[str, str]) -> Config:
    if isinstance(options, Mapping):
        # the keys of a section may all be commented out, which makes it null
        options = {k: {} if v is None and k in _SECTIONS else v for k, v in options.items()}
    try:
        config = Config.model_validate(options)
        problems = _contradictions(config)
    except pydantic.ValidationError as error:
        problems = _explained(error, options)
    if problems:
        raise ConfigError("\n".join(_place(places, key) + text for key, text in problems))
    return config


def _place(places: dict[str, str], key: str) -> str:
    """Where a key was given, or else what would hold it."""
    while key and key not in places:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return f"{places[key]}: " if key in places else ""


def _contradictions(config: Config) -> list[tuple[str, str]]:
    """What is right alone and wrong together, as (key, message)."""
    found = []
    least, target = config.validation.min_retention, config.analyze.target_retention
    if config.analyze.center_method == "manual" and config.analyze.manual_center is None:
        text = "analyze.manual_center is missing; center_method: manual needs it, as [y, x]"
        found.append(("analyze.center_method", text))
    if least > target:
        keys = ("validate.min_retention", "analyze.target_retention")
        text = f"{keys[0]} is {least}, more than {keys[1]}, which is {target}; change one of them"
        found.append((keys[not config.validation.model_fields_set], text))  # the one that was given
    for section, key, other, need in _NEEDS:
        value, seen = (getattr(getattr(config, section), name) for name in (key, other))
        if value != defaults(section)[key] and seen != need:
            text = f"{section}.{key} is {_show(value)}, which needs {other}: {_show(need)}"
            found.append((f"{section}.{key}", f"{text}, but it is {_show(seen)}"))
    return found


def _explained(error: pydantic.ValidationError, options: Any) -> list[tuple[str, str]]:
    """One message per key: of the branches of a union, the one that got deepest says most."""
    found: dict[Any, tuple[str, str]] = {}
    for detail in error.errors(include_url=False):
        loc, kind, key, value = detail["loc"], detail["type"], "", options
        for step in loc:  # the names of a union's branches are not in the options
            if isinstance(value, Mapping) and step in value:
                key, value = f"{key}.{step}".lstrip("."), value[step]
            elif isinstance(value, list | tuple) and isinstance(step, int) and step < len(value):
                key, value = f"{key}[{step}]", value[step]
        top, leaf = (*map(str, loc), "", "")[:2]
        model = _SECTIONS.get(top, Config)
        hint = model.__annotations__.get(leaf or top, model)
        if kind in ("extra_forbidden", "invalid_key"):
            valid = _keys(Config if len(loc) < 2 else model if len(loc) == 2 else Mask)
            close = difflib.get_close_matches(str(loc[-1]), valid, 1)
            text = f"{key} is not a key" + (f"; did you mean {close[0]}?" if close else ".")
            text += f" Valid keys: {', '.join(valid)}"
        elif kind == "missing" and isinstance(loc[-1], str):
            key = ".".join(map(str, loc))
            text = f"{key} is missing; expected {_expected(hint)}"
        else:
            shown = "empty" if value is None and not key else _show(value)
            text = f"{key or 'the content'} is {shown}; expected {_expected(hint)}"
            numeric = kind in ("int_type", "float_type") and isinstance(value, str)
            if numeric and _NUMBER.fullmatch(value):  # 1e-3 is text in YAML 1.1, and so is "3"
                number = float(value)
                shown = _show(int(number) if number.is_integer() else number)
                text += f" (this is text in YAML; write {shown})"
        if [*map(len, (key, text))] > [*map(len, found.get((top, leaf), ("", "")))]:
            found[top, leaf] = (key, text)
    return list(found.values())


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _expected(hint: Any) -> str:
    """The words for a type, such as "auto, a whole number above 0 or null"."""
    texts = [text for text in get_args(hint) if isinstance(text, str)]
    if isinstance(hint, type):
        names = {type(None): "null", bool: "true or false"}
        return names.get(hint) or f"a section with the keys {', '.join(_keys(hint))}"
    if get_origin(hint) is Annotated:
        return texts[-1]
    words = texts or [_expected(part) for part in get_args(hint)]
    return " or ".join([", ".join(words[:-1]), words[-1]][len(words) == 1 :])


def _show(value: Any) -> str:
    """A value as YAML would have it, cut to a readable length."""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=2**20, allow_unicode=True)
    except (yaml.YAMLError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} …"
