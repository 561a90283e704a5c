"""Out-of-core 4D-STEM preprocessing on Dask: read, find the window, crop, check, downsample, export.

>>> import stem_dask as sd
>>> sd.__version__
'0.1.0'
"""

import importlib
from typing import Any

__version__ = "0.1.0"

#: public name -> (module, name there), as in __init__.pyi; loaded on first use, so that --help and errors come at once
_PUBLIC = {
    "connect": ("stem_dask.cluster.connect", "connect"),
    "Connection": ("stem_dask.cluster.connect", "Connection"),
    "load_config": ("stem_dask.config.load", "load_config"),
    "load_configs": ("stem_dask.config.load", "load_configs"),
    "Config": ("stem_dask.config.options", "Config"),
    "ConfigError": ("stem_dask.core.errors", "ConfigError"),
    "LockedError": ("stem_dask.core.errors", "LockedError"),
    "MemoryBudgetError": ("stem_dask.core.errors", "MemoryBudgetError"),
    "OutputExistsError": ("stem_dask.core.errors", "OutputExistsError"),
    "SourceError": ("stem_dask.core.errors", "SourceError"),
    "StemDaskError": ("stem_dask.core.errors", "StemDaskError"),
    "StoreError": ("stem_dask.core.errors", "StoreError"),
    "Window": ("stem_dask.core.model", "Window"),
    "CroppingConfig": ("stem_dask.job.cropper", "CroppingConfig"),
    "DiffractionCropper": ("stem_dask.job.cropper", "DiffractionCropper"),
    "create_test_data": ("stem_dask.job.cropper", "create_test_data"),
    "Outcome": ("stem_dask.job.outcome", "Outcome"),
    "Report": ("stem_dask.job.show", "Report"),
    "plot": ("stem_dask.job.show", "plot"),
    "report": ("stem_dask.job.show", "report"),
    "run_config": ("stem_dask.job.run", "run"),
    "analyze": ("stem_dask.stages.analyze", "analyze"),
    "Survey": ("stem_dask.stages.survey", "Survey"),
    "survey": ("stem_dask.stages.survey", "survey"),
    "fit_descan": ("stem_dask.stages.descan", "fit_descan"),
    "suspected_hot_pixels": ("stem_dask.stages.correct", "suspected_hot_pixels"),
    "choose_window": ("stem_dask.stages.crop", "choose_window"),
    "crop": ("stem_dask.stages.crop", "crop"),
    "to_detector": ("stem_dask.stages.crop", "to_detector"),
    "cast": ("stem_dask.stages.downsample", "cast"),
    "downsample": ("stem_dask.stages.downsample", "downsample"),
    "export": ("stem_dask.stages.export", "export"),
    "to_hyperspy": ("stem_dask.stages.export", "to_hyperspy"),
    "virtual_image": ("stem_dask.stages.images", "virtual_image"),
    "open": ("stem_dask.stages.open", "open_patterns"),
    "validate": ("stem_dask.stages.validate", "validate"),
    "Normalization": ("stem_dask.training.dataset", "Normalization"),
    "PatternDataset": ("stem_dask.training.dataset", "PatternDataset"),
    "loader": ("stem_dask.training.loader", "loader"),
    "load_model": ("stem_dask.training.model", "load_model"),
    "thin": ("stem_dask.training.thin", "thin"),
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'stem_dask' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    is_class = isinstance(value, type)
    if not is_class and (module.startswith("stem_dask.stages.") or name == "connect"):
        # errors of these functions name their arguments, as those of configs and commands name keys
        value = importlib.import_module("stem_dask.config.options").speaking_python(value)
        value.__module__, value.__qualname__ = __name__, name  # where pickle finds it
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
