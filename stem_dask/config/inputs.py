"""Several inputs of one config: expand paths and globs, and name one output per input."""

import fnmatch
import glob
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from stem_dask.config.options import SYNTHETIC
from stem_dask.core.errors import ConfigError
from stem_dask.storage.location import check_path, is_url

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")

_WAYS = "{stem} (the input's name without its suffix), {name} or {parent} (the folder it is in)"

#: bytes of a file name that are not UTF-8, as surrogate escapes
NO_UTF8 = re.compile("[\udc80-\udcff]")


def found_inputs(given: str | Sequence[str]) -> list[str]:
    """Absolute paths of all inputs that a path, a glob, or a list of them names: sorted, without duplicates.

    An existing name is a path even if it looks like a glob. A path that does not exist is kept; its job reports it.

    Raises
    ------
    ConfigError
        If nothing matches a glob.

    Examples
    --------
    >>> found_inputs(["/b.dm4", "/a.dm4", "/b.dm4"]), found_inputs("synthetic")
    (['/a.dm4', '/b.dm4'], ['synthetic'])
    """
    texts = [given] if isinstance(given, str) else given
    return sorted({path for text in texts for path in _found(text)})


def _found(text: str) -> list[str]:
    check_path("input.path", text)
    if is_url(text):
        if glob.has_magic(text):
            raise ConfigError(
                f"input.path is {text}: globs are for files here; give the URLs one by one, as a list"
            )
        return [text.rstrip("/")]
    if text == SYNTHETIC:
        return [text]
    path = os.path.expanduser(text)
    if not glob.has_magic(path) or os.path.lexists(path):
        return [os.path.abspath(path)]
    matches = glob.glob(path, recursive=True)
    if not matches:
        raise ConfigError(f"input.path is {text}, and nothing matches it (from {os.getcwd()})")
    return [os.path.abspath(match) for match in matches]


def renamed(path: str, *, of_input: bool) -> str:
    r"""Message about a name with bytes that are not UTF-8, such as Latin-1, with a command that renames the file.

    Examples
    --------
    >>> renamed("5_" + chr(0xDCB5) + "m.npy", of_input=True)
    '5_\\xb5m.npy, which is not UTF-8; rename the file: mv 5_*m.npy 5__m.npy'
    """
    shown = os.fsencode(path).decode("utf-8", "backslashreplace")
    if not of_input:
        return f"{shown}, which is not UTF-8; choose another name"
    old, new = (NO_UTF8.sub(sign, path) for sign in "*_")
    pattern = "*".join(shlex.quote(part) if part else "" for part in old.split("*"))
    return f"{shown}, which is not UTF-8; rename the file: mv {pattern} {shlex.quote(new)}"


def named_outputs(inputs: Sequence[str], pattern: str) -> list[str]:
    """The output of every input, with the placeholders of the pattern replaced.

    Raises
    ------
    ConfigError
        For an unknown placeholder, several inputs and no placeholder, two inputs with one output.

    Examples
    --------
    >>> named_outputs(["/raw/a.dm4", "/raw/b.zarr"], "/out/{parent}_{stem}.zarr")
    ['/out/raw_a.zarr', '/out/raw_b.zarr']
    """
    unknown = [name for name in _PLACEHOLDER.findall(pattern) if name not in _values("")]
    if unknown:
        raise ConfigError(
            f"output.path is {pattern}, and {{{unknown[0]}}} is no placeholder; valid are {_WAYS}"
        )
    if len(inputs) > 1 and not _PLACEHOLDER.search(pattern):
        raise ConfigError(
            f"output.path is {pattern}, one name for {len(inputs)} inputs ({inputs[0]} … {inputs[-1]}); put a "
            f"placeholder into it: {_WAYS}"
        )
    makers: dict[str, str] = {}
    for path in inputs:
        output = _filled(pattern, path)
        other = makers.setdefault(output, path)
        if other != path:
            raise ConfigError(
                f"output.path is {pattern}: {other} and {path} would both become {output}; tell them apart with "
                "{parent} (the folder they are in) or {name} (with the suffix)"
            )
    return list(makers)


def _filled(pattern: str, path: str) -> str:
    values = _values(path)
    return _PLACEHOLDER.sub(lambda found: values[found[1]], pattern)


def _values(path: str) -> dict[str, str]:
    """The value of each placeholder."""
    return {"stem": Path(path).stem, "name": Path(path).name, "parent": Path(path).parent.name}


def refuse_circles(
    inputs: Sequence[str], given: str | Sequence[str], outputs: Sequence[str], kinds: Sequence[str]
) -> None:
    """Refuse an output that is an input, or that matches a glob and would be an input when the command resumes.

    Parameters
    ----------
    inputs : of all jobs
    given : the paths and globs of the config
    outputs : first output of every job
    kinds : suffixes of the exports

    Raises
    ------
    ConfigError
    """
    # `prepare` checks a single job
    sources = {os.path.realpath(path) for path in inputs} if len(inputs) > 1 else set()
    globs = _globs(given)
    for output in outputs:
        for path in (output, *(str(Path(output).with_suffix(f".{kind}")) for kind in kinds)):
            if os.path.realpath(path) in sources:
                raise ConfigError(
                    f"output.path gives {path}, which is an input of the same command; write into another folder, or "
                    "name the inputs more narrowly"
                )
            for text in globs:
                if _matches(Path(path).parts, _parts(text)):
                    raise ConfigError(
                        f"output.path gives {path}, which matches {text}: it would be an input when the same command "
                        "goes on; write into another folder, or name the inputs more narrowly"
                    )


def _globs(given: str | Sequence[str]) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    return [text for text in texts if glob.has_magic(text) and not os.path.lexists(text)]


def _parts(text: str) -> tuple[str, ...]:
    """The parts of an absolute glob; the working directory is escaped."""
    text = os.path.expanduser(text)
    return Path(os.path.normpath(os.path.join(glob.escape(os.getcwd()), text))).parts


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a glob matches a path, part by part."""
    if not wanted or not parts:
        return not parts and all(part == "**" for part in wanted)
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or _matches(parts[1:], wanted)
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])
