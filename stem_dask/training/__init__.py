"""Datasets, loader and model for PyTorch; torch is imported inside functions only."""

from typing import Any

from stem_dask.core.errors import ConfigError


def import_torch() -> Any:
    """The module torch, or a ConfigError that says how to install it."""
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"training needs PyTorch, which cannot be imported ({error}); install the extra: "
            "pip install -c constraints.txt -e '.[torch]'"
        ) from error
    return torch
