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

    Examples
    --------
    >>> found_inputs(["/b.dm4", "/a.dm4", "/b.dm4"]), found_inputs("synthetic")
    (['/a.dm4', '/b.dm4'], ['synthetic'])
    """
    found: set[str] = set()
    for text in [given] if isinstance(given, str) else given:
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

    Examples
    --------
    >>> named_outputs(["/raw/a.dm4", "/raw/b.zarr"], "/out/{parent}_{stem}.zarr")
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
