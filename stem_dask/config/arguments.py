"""Error messages for Python callers: names of arguments instead of config keys."""

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from stem_dask.core.errors import StemDaskError

P = ParamSpec("P")
T = TypeVar("T")

#: a key of a config in a message, and its value
_KEY = re.compile(
    r"(?<![\w./\\-])(input|analyze|crop|validate|downsample|output|cluster)\.([a-z_]+)(?!\w|/|\.\w)"
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
    from stem_dask.config.options import SECTIONS

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
