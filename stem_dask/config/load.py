"""Load options from YAML and the command line, for one input or several; errors name the key, the line and the valid keys."""

import difflib
import fnmatch
import glob
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pydantic
import yaml
from pydantic import BaseModel

from stem_dask.config.options import NEEDS, SECTIONS, SYNTHETIC, Config
from stem_dask.core.errors import ConfigError
from stem_dask.core.formats import FORMATS
from stem_dask.core.text import next_multiples
from stem_dask.storage.location import check_path, is_url, without_secrets

MAX_FILE_BYTES = 2**16  # a config has a few kB; anything larger is likely the data file

_PATHS = (
    "input.dark", "input.gain", "input.mask", "analyze.from", "descan.reference", "output.path", "cluster.scheduler_file",
    "cluster.log_directory", "output.local_folder",
)  # fmt: skip

_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]{1,2})?", re.IGNORECASE)

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")

_WAYS = "{stem} (the input's name without its suffix), {name} or {parent} (the folder it is in)"

#: bytes of a file name that are not UTF-8, as surrogate escapes
_NO_UTF8 = re.compile("[\udc80-\udcff]")


def defaults(section: str) -> dict[str, Any]:
    """The defaults of a section, by key."""
    fields = SECTIONS[section].model_fields.items()
    return {f.alias or name: f.default for name, f in fields if not f.is_required()}


def to_dict(config: Config) -> dict[str, Any]:
    """The options as dictionaries, lists and numbers, for YAML, JSON and `parse_config`."""
    return config.model_dump(mode="json", by_alias=True)


def parse_config(options: Mapping[str, Any]) -> Config:
    """Options from one dictionary per section; paths are not changed.

    Examples
    --------
    >>> config = parse_config({"input": {"path": "a.dm4"}, "output": {"path": "a.zarr"}})
    >>> config.crop.margin_pixels, to_dict(config)["validate"], defaults("validate")
    (3, {'min_retention': 0.95}, {'min_retention': 0.95})
    """
    return _validated(options, {})


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Options of one job from a YAML file (at most 64 KiB; no anchors, aliases, tags), relative paths made absolute.

    An override is ``key=value``; the value is YAML, or text where the key takes text. A `ConfigError` lists all
    problems, one per line, each with the line of its key. Several inputs are refused (see `load_configs`).

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
    ...     print("{input: {path: synthetic}, output: {path: a.zarr}}", file=file, flush=True)
    ...     load_config(file.name, ["crop.size=[40, 44]"]).crop.size
    (40, 44)
    """
    return only(load_configs(path, overrides))


def load_configs(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> list[Config]:
    """As `load_config`, for every input that ``input.path`` names: a path, a glob, or a list.

    In ``output.path``, ``{stem}`` stands for the name of the input without its suffix, ``{name}`` for the name with it,
    ``{parent}`` for the name of its folder.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
    ...     print("{input: {path: [/b.dm4, /a.dm4]}, output: {path: '/out/{stem}.zarr'}}", file=file, flush=True)
    ...     [(config.input.path, config.output.path) for config in load_configs(file.name)]
    [('/a.dm4', '/out/a.zarr'), ('/b.dm4', '/out/b.zarr')]
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "not UTF-8 text")
        raise ConfigError(f"{name}: {reason}; expected a YAML file") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{name} is larger than 64 KiB; expected a YAML file of a few kB (a long input.mask goes into a .npy file)"
        )
    places = {"": name}
    return _overridden(_parse(text, places), overrides, places)


def config_of(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Default options for an input file, with overrides as in `load_config`."""
    data = {"input": {"path": os.fspath(path)}, "output": {"path": "not-written.zarr"}}
    return only(configs_from(data, overrides))


def configs_from(options: Mapping[str, Any], overrides: Iterable[str] = ()) -> list[Config]:
    """As `parse_config`, for every input, with overrides as in `load_config` and absolute paths."""
    copied = {key: dict(v) if isinstance(v, Mapping) else v for key, v in options.items()}
    return _overridden(copied, overrides, {"": "the command line"})


def only(configs: list[Config]) -> Config:
    """The one config of a list; a `ConfigError` where there are several."""
    if len(configs) == 1:
        return configs[0]
    raise ConfigError(
        f"input.path names {len(configs)} inputs ({configs[0].input.path} …), and one is expected here; "
        "run and check take several, and so does sd.load_configs"
    )


def _overridden(data: Any, overrides: Iterable[str], places: dict[str, str]) -> list[Config]:
    """Validated options of every job, with its own input and output, and absolute paths."""
    for text in without_secrets([overrides] if isinstance(overrides, str) else [*overrides]):
        _override(data, text, places)
    options = to_dict(_validated(data, places))
    for section, key in (dotted.split(".") for dotted in _PATHS):
        text = options[section][key]
        if isinstance(text, str) and text not in (SYNTHETIC, "auto", "stop") and "://" not in text:
            options[section][key] = os.path.abspath(os.path.expanduser(text))
    given, output, known = options["input"]["path"], options["output"], options["analyze"]["from"]
    try:
        inputs = found_inputs(given, series=options["input"]["series"])
        if len(inputs) > 1 and known is not None:
            raise ConfigError(
                f"analyze.from is {known}, the analysis of one input, and there are {len(inputs)}; leave it out"
            )
        paths = _named_outputs(inputs, output["path"])
        refuse_circles(inputs, given, paths, output["export"])
        jobs = []
        for path, name in zip(inputs, paths, strict=True):
            own = {"input": {**options["input"], "path": path}, "output": {**output, "path": name}}
            jobs.append(parse_config({**options, **own}))
        return jobs
    except ConfigError as error:
        key = str(error).partition(" ")[0]  # every message starts with its key
        raise ConfigError(_place(places, key) + str(error)) from None


def found_inputs(given: str | Sequence[str], *, series: bool = False) -> list[str]:
    """Absolute paths of all inputs that a path, a glob, or a list of them names: sorted, without duplicates.

    An existing name is a path even if it looks like a glob. A path that does not exist is kept; its job reports it. The files of
    a ``series`` are one input, a folder or glob.

    Examples
    --------
    >>> found_inputs(["/b.dm4", "/a.dm4", "/b.dm4"]), found_inputs("synthetic")
    (['/a.dm4', '/b.dm4'], ['synthetic'])
    """
    found: set[str] = set()
    texts = [given] if isinstance(given, str) else given
    if series:
        if len(texts) > 1:
            raise ConfigError(
                f"input.path names {len(texts)} files, and input.series is true; give their folder, or a glob in quotes, such as "
                f"'{Path(texts[0]).parent / '*'}{Path(texts[0]).suffix}'"
            )
        return [texts[0] if is_url(texts[0]) else os.path.abspath(os.path.expanduser(texts[0]))]
    for text in texts:
        check_path("input.path", text)
        path = os.path.expanduser(text)
        if is_url(text):
            if glob.has_magic(text):
                raise ConfigError(
                    f"input.path is {text}: globs are for files here; give the URLs one by one, as a list"
                )
            found.add(text.rstrip("/"))
        elif text == SYNTHETIC:
            found.add(text)
        elif not glob.has_magic(path) or os.path.lexists(path):
            found.add(os.path.abspath(path))
        else:
            matches = glob.glob(path, recursive=True)
            if not matches:
                raise ConfigError(
                    f"input.path is {text}, and nothing matches it (from {os.getcwd()})"
                )
            found.update(map(os.path.abspath, matches))
    return sorted(found)


def _renamed(path: str, *, of_input: bool) -> str:
    r"""Message about a name with bytes that are not UTF-8, such as Latin-1, with a command that renames the file.

    Examples
    --------
    >>> _renamed("5_" + chr(0xDCB5) + "m.npy", of_input=True)
    '5_\\xb5m.npy, which is not UTF-8; rename the file: mv 5_*m.npy 5__m.npy'
    """
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")
    if not of_input:
        return f"{shown}, which is not UTF-8; choose another name"
    old, new = (_NO_UTF8.sub(sign, path) for sign in "*_")
    pattern = "*".join(shlex.quote(part) if part else "" for part in old.split("*"))
    return f"{shown}, which is not UTF-8; rename the file: mv {pattern} {shlex.quote(new)}"


def _named_outputs(inputs: Sequence[str], pattern: str) -> list[str]:
    """The output of every input, with the placeholders of the pattern replaced.

    Examples
    --------
    >>> _named_outputs(["/raw/a.dm4", "/raw/b.zarr"], "/out/{parent}_{stem}.zarr")
    ['/out/raw_a.zarr', '/out/raw_b.zarr']
    """
    names = _PLACEHOLDER.findall(pattern)
    unknown = [name for name in names if name not in ("stem", "name", "parent")]
    if unknown:
        raise ConfigError(
            f"output.path is {pattern}, and {{{unknown[0]}}} is no placeholder; valid are {_WAYS}"
        )
    if len(inputs) > 1 and not names:
        raise ConfigError(
            f"output.path is {pattern}, one name for {len(inputs)} inputs ({inputs[0]} … {inputs[-1]}); put a "
            f"placeholder into it: {_WAYS}"
        )
    makers: dict[str, str] = {}
    for text in inputs:
        path = Path(text)
        if glob.has_magic(path.name) and not os.path.lexists(path):  # of a series
            path = path.parent
        values = {"stem": path.stem, "name": path.name, "parent": path.parent.name}
        output = _PLACEHOLDER.sub(lambda found, values=values: values[found[1]], pattern)  # type: ignore[misc]
        other = makers.setdefault(output, text)
        if other != text:
            raise ConfigError(
                f"output.path is {pattern}: {other} and {text} would both become {output}; tell them apart with "
                "{parent} (the folder they are in) or {name} (with the suffix)"
            )
    return list(makers)


def refuse_circles(
    inputs: Sequence[str], given: str | Sequence[str], outputs: Sequence[str], kinds: Sequence[str]
) -> None:
    """Refuse an output that is an input, or that matches a glob and would be an input when the command resumes.

    ``given`` are the paths and globs of the config, ``kinds`` the suffixes of the exports.
    """
    # `prepare` checks a single job
    sources = {os.path.realpath(path) for path in inputs} if len(inputs) > 1 else set()
    texts = [given] if isinstance(given, str) else given
    globs = [text for text in texts if glob.has_magic(text) and not os.path.lexists(text)]
    why = "write into another folder, or name the inputs more narrowly"
    for output in outputs:
        for path in (output, *(str(Path(output).with_suffix(f".{kind}")) for kind in kinds)):
            if os.path.realpath(path) in sources:
                raise ConfigError(
                    f"output.path gives {path}, which is an input of the same command; {why}"
                )
            for text in globs:
                # the working directory is escaped
                whole = os.path.join(glob.escape(os.getcwd()), os.path.expanduser(text))
                if _matches(Path(path).parts, Path(os.path.normpath(whole)).parts):
                    raise ConfigError(
                        f"output.path gives {path}, which matches {text}: it would be an input when the same command "
                        f"goes on; {why}"
                    )


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a glob matches a path, part by part."""
    if not wanted or not parts:
        return not parts and all(part == "**" for part in wanted)
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or _matches(parts[1:], wanted)
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


class _Loader(yaml.SafeLoader):
    """A safe loader without anchors, aliases and tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem="anchors, aliases and tags (&, *, ! before a value) are not supported",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


def _parse(text: str, places: dict[str, str]) -> Any:
    """The value of one YAML document; ``places`` receives the line of every key."""
    place = places[""]
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _construct(loader, node, "", places)
    except yaml.MarkedYAMLError as error:
        place += f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())
    raise ConfigError(f"{place}: not usable as YAML: {reason}")


def _construct(loader: yaml.SafeLoader, node: yaml.Node, key: str, places: dict[str, str]) -> Any:
    places.setdefault(key, f"{places['']}, line {node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, n, f"{key}[{i}]", places) for i, n in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        with suppress(yaml.YAMLError, ValueError, OverflowError):  # such as the date 2020-99-99
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
        result[word] = _construct(loader, value, full, places)
    return result


def _override(data: Any, text: str, places: dict[str, str]) -> None:
    """Set one key; it is validated later, with all others."""
    name, equals, value = (part.strip() for part in text.partition("="))
    section, dot, key = name.partition(".")
    hints, place = _hints(SECTIONS.get(section, Config)), f"override {repr(text)[1:-1]}"
    if not equals or not section:
        raise ConfigError(f"{place}: expected key=value. Valid keys: {', '.join(hints)}")
    data = data if isinstance(data, dict) else {}  # anything else is reported then, too
    inside = [old for old in places if old.startswith((f"{name}.", f"{name}["))]
    places |= {section: places.get(section, place)} | dict.fromkeys([name, *inside], place)
    if dot and data.get(section) is None:
        data[section] = {}
    target, leaf = (data[section], key) if dot else (data, section)
    if isinstance(target, dict):
        target[leaf] = _chosen(value, hints.get(leaf))


def _chosen(text: str, hint: Any) -> Any:
    """The YAML value of an override, or its text if only that is valid for the key."""
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
        # a section whose keys are all commented out is null
        options = {k: {} if v is None and k in SECTIONS else v for k, v in options.items()}
    try:
        config = Config.model_validate(without_secrets(options))
        problems = [*_contradictions(config)]
    except pydantic.ValidationError as error:
        problems = _explained(error, options)
    if problems:
        raise ConfigError("\n".join(_place(places, key) + text for key, text in problems))
    return config


def _place(places: dict[str, str], key: str) -> str:
    """Where a key was given, or else its nearest parent."""
    while key and key not in places:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return f"{places[key]}: " if key in places else ""


def _contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Contradictions between keys, as (key, message)."""
    output, analyze, crop = config.output, config.analyze, config.crop.enabled
    least, target, suffix = (
        config.validation.min_retention,
        analyze.target_retention,
        os.path.splitext(output.path)[1],
    )
    shown = to_dict(config)
    if analyze.center_method == "manual" and analyze.manual_center is None:
        text = "analyze.manual_center is missing; center_method: manual needs it, as [y, x]"
        yield "analyze.center_method", text
    if least > target:
        keys = ("validate.min_retention", "analyze.target_retention")
        text = f"{keys[0]} is {least}, more than {keys[1]}, which is {target}; change one of them"
        yield keys[not config.validation.model_fields_set], text  # the one that was given
    needs_store = {
        "crop.size": crop and config.crop.size == "common",
        "output.export": bool(output.export),
        "output.figure": output.figure and not crop,
    }
    for key in (key for key, given in needs_store.items() if given and suffix != ".zarr"):
        section, _, name = key.partition(".")
        value = _show(shown[section][name])
        yield key, f"{key} is {value}, which needs a store: output.path must end in .zarr"
    if output.codec not in ("auto", "none") and not FORMATS[suffix].is_packed:
        text = f"output.codec is {output.codec}, and a {suffix} file is not compressed; use auto"
        yield "output.codec", text
    if analyze.ahead and crop:
        yield (
            "analyze.ahead",
            "analyze.ahead needs crop.enabled: false; a crop analyzes in any case",
        )
    if not output.patterns and (not crop or suffix != ".zarr" or "://" in output.path):
        yield (
            "output.patterns",
            "output.patterns false needs crop.enabled: true and a local output.path that ends in .zarr",
        )
    changed = config.downsample.factor > 1 or (output.dtype, output.normalize) != ("auto", "none")
    if analyze.ahead and changed:
        text = "analyze.ahead needs patterns as they are read: downsample.factor 1, output.dtype auto, no normalize"
        yield "analyze.ahead", text
    multiple = config.crop.size_multiple * config.downsample.factor
    for n in () if config.crop.window else sorted({*(config.crop.given or ())}):
        if n % multiple:
            text = f"crop.size is {_show(shown['crop']['size'])}; {next_multiples(n, multiple)}"
            yield "crop.size", text
    for key in ("walltime", "memory_limit"):
        if config.cluster.kind == "slurm" and getattr(config.cluster, key) is None:
            yield "cluster.kind", f"cluster.kind is slurm, which needs cluster.{key}"
    if analyze.known is not None and not crop:
        yield "analyze.from", "analyze.from needs crop.enabled: true"
    for section, key, other, need in NEEDS:
        value, seen = (getattr(getattr(config, section), name) for name in (key, other))
        if value != defaults(section)[key] and seen not in need:
            text = f"{section}.{key} is {_show(value)}, which needs {other}: {' or '.join(map(_show, need))}"
            yield f"{section}.{key}", f"{text}, but it is {_show(seen)}"


def _explained(error: pydantic.ValidationError, options: Any) -> list[tuple[str, str]]:
    """One message per key; of the branches of a union, the error at the deepest location."""
    found: dict[Any, tuple[str, str]] = {}
    for detail in error.errors(include_url=False):
        loc, kind, key, value = detail["loc"], detail["type"], "", options
        model: type[BaseModel] = Config
        for i, step in enumerate(loc):  # the location also names branches of unions
            if isinstance(value, Mapping) and step in value:
                key, value = f"{key}.{step}".lstrip("."), value[step]
            elif isinstance(value, list | tuple) and isinstance(step, int) and step < len(value):
                key, value = f"{key}[{step}]", value[step]
            if i < len(loc) - 1:
                model = next(_models_in(_hints(model).get(step)), model)
        top, leaf = (*map(str, loc), "", "")[:2]
        section = SECTIONS.get(top, Config)
        hint = _hints(section).get(leaf or top) or section
        if kind in ("extra_forbidden", "invalid_key"):
            close = difflib.get_close_matches(str(loc[-1]), _hints(model), 1)
            if model is Config:  # a key without its section
                close = _dotted(str(loc[-1])) or close
            text = f"{key} is not a key" + (f"; did you mean {close[0]}?" if close else ".")
            text += f" Valid keys: {', '.join(_hints(model))}"
        elif kind == "missing" and isinstance(loc[-1], str):
            key = ".".join(map(str, loc))
            text = f"{key} is missing; expected {_expected(hint)}"
        elif isinstance(value, str) and _NO_UTF8.search(value):
            text = f"{key} is {_renamed(value, of_input=top == 'input')}"
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


def _dotted(name: str) -> list[str]:
    """Keys of sections with this name, or the one whose name is nearest.

    Examples
    --------
    >>> _dotted("target_retention"), _dotted("target_retenton"), _dotted("outputs")
    (['analyze.target_retention'], ['analyze.target_retention'], [])
    """
    keys: dict[str, list[str]] = {}
    for section, model in SECTIONS.items():
        for key in _hints(model):
            keys.setdefault(key, []).append(f"{section}.{key}")
    known = [*keys, *SECTIONS, "device", "on_error"]
    close = difflib.get_close_matches(name, known, 1, 0.75)
    return keys.get(close[0], []) if close else []


def _hints(model: type[BaseModel]) -> dict[Any, Any]:
    """The annotated type of every key of a section."""
    fields = model.model_fields.items()
    return {field.alias or name: model.__annotations__[name] for name, field in fields}


def _models_in(hint: Any) -> Iterator[type[BaseModel]]:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
    for part in get_args(hint):
        yield from _models_in(part)


def _expected(hint: Any) -> str:
    """The description of a type, such as "auto, a whole number above 0 or null"."""
    texts = [text for text in get_args(hint) if isinstance(text, str)]
    if isinstance(hint, type):
        names = {type(None): "null", bool: "true or false"}
        return names.get(hint) or f"a section with the keys {', '.join(_hints(hint))}"
    if get_origin(hint) is Annotated:
        return texts[-1]
    words = texts or [_expected(part) for part in get_args(hint)]
    return " or ".join([", ".join(words[:-1]), words[-1]][len(words) == 1 :])


def _show(value: Any) -> str:
    """A value as YAML, cut to a readable length."""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=2**20, allow_unicode=True)
    except (yaml.YAMLError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 80 else f"{text[:80]} …"
