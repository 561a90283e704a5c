"""Out-of-core 4D-STEM preprocessing on Dask: read, find the window, crop, check, downsample, export.

>>> import stem_dask as sd
>>> sd.__version__
'0.1.0'
"""

import importlib
import re
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")

#: public name -> (module, name there), as in the stub; loaded on first use, so that --help and errors come at once
_PUBLIC = {
    name: (module, attribute)
    for module, attribute, name in re.findall(r"^from (\S+) import (\w+) as (\w+)$", _STUB, re.M)
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'stem_dask' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    if module.startswith("stem_dask.stages.") or name == "connect":
        # errors of these functions name their arguments, as those of configs and commands name keys
        value = importlib.import_module("stem_dask.config.arguments").speaking_python(value)
        value.__module__, value.__qualname__ = __name__, name  # where pickle finds it
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
