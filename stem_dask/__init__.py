"""Out-of-core 4D-STEM preprocessing on Dask: read, find the window, crop, check, downsample, export.

>>> import stem_dask as sd
>>> sd.__version__
'0.1.0'
"""

import importlib
from typing import Any

__version__ = "0.1.0"

#: public name -> (module, name there); loaded on first use, so that --help and errors come at once
_PUBLIC = {
    "open": ("stem_dask.stages.open", "open_patterns"),
    "suspected_hot_pixels": ("stem_dask.stages.correct", "suspected_hot_pixels"),
    "analyze": ("stem_dask.stages.analyze", "analyze"),
    "choose_window": ("stem_dask.stages.crop", "choose_window"),
    "crop": ("stem_dask.stages.crop", "crop"),
    "to_detector": ("stem_dask.stages.crop", "to_detector"),
    "validate": ("stem_dask.stages.validate", "validate"),
    "downsample": ("stem_dask.stages.downsample", "downsample"),
    "cast": ("stem_dask.stages.downsample", "cast"),
    "to_hyperspy": ("stem_dask.stages.export", "to_hyperspy"),
    "export": ("stem_dask.stages.export", "export"),
    "connect": ("stem_dask.cluster.connect", "connect"),
    "load_config": ("stem_dask.config.load", "load_config"),
    "load_configs": ("stem_dask.config.load", "load_configs"),
    "run_config": ("stem_dask.job.run", "run"),
    "DiffractionCropper": ("stem_dask.job.cropper", "DiffractionCropper"),
    "CroppingConfig": ("stem_dask.job.cropper", "CroppingConfig"),
    "create_test_data": ("stem_dask.job.cropper", "create_test_data"),
    "StemDaskError": ("stem_dask.core.errors", "StemDaskError"),
    "ConfigError": ("stem_dask.core.errors", "ConfigError"),
    "SourceError": ("stem_dask.core.errors", "SourceError"),
    "StoreError": ("stem_dask.core.errors", "StoreError"),
    "OutputExistsError": ("stem_dask.core.errors", "OutputExistsError"),
    "MemoryBudgetError": ("stem_dask.core.errors", "MemoryBudgetError"),
    "LockedError": ("stem_dask.core.errors", "LockedError"),
}

#: functions whose errors name their arguments, as those of configs and commands name keys
_OF_ARRAYS = {
    "open", "suspected_hot_pixels", "analyze", "choose_window", "crop", "to_detector", "validate", "downsample", "cast", "export",
    "to_hyperspy", "connect",
}  # fmt: skip

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'stem_dask' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    if name in _OF_ARRAYS:
        value = importlib.import_module("stem_dask.config.arguments").speaking_python(value)
        value.__module__, value.__qualname__ = __name__, name  # where pickle finds it
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
