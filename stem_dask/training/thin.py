"""Two independent halves of counts."""

from typing import Any

from stem_dask.core.errors import ConfigError
from stem_dask.training import import_torch


def thin(counts: Any, p: float, generator: Any = None) -> tuple[Any, Any]:
    """Divide counts at random into two parts: each electron goes to the first with probability ``p``.

    Parts of Poisson counts are independent Poisson counts with means ``p`` and ``1 - p`` of the whole, so that a network which
    predicts one from the other learns the pattern without its noise.

    Parameters
    ----------
    counts : tensor of a whole-number type, 0 or more
    p : 0 to 1
    generator : `torch.Generator`, of the device of ``counts``

    Returns
    -------
    Two tensors of the same shape and type, whose sum is ``counts``

    Raises
    ------
    ConfigError
        For floats, negative values, or another ``p``.

    Examples
    --------
    >>> import torch
    >>> a, b = thin(torch.tensor([3, 0, 7]), 0.5, torch.Generator().manual_seed(0))
    >>> (a + b).tolist()
    [3, 0, 7]
    """
    torch = import_torch()

    if not isinstance(counts, torch.Tensor):
        raise ConfigError(f"counts are a {type(counts).__name__}; expected a tensor")
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise ConfigError(
            f"counts are {counts.dtype}; expected whole numbers, as of PatternDataset(normalize='none', dtype='stored')"
        )
    if not 0 <= p <= 1:
        raise ConfigError(f"p is {p}; expected 0 <= p <= 1")
    whole = counts.to(torch.int64)
    if whole.numel() and int(whole.min()) < 0:
        raise ConfigError(f"counts go down to {int(whole.min())}; expected 0 or more")
    trials = whole.to(torch.float64)
    first = torch.binomial(trials, torch.full_like(trials, p), generator=generator).to(torch.int64)
    return first.to(counts.dtype), (whole - first).to(counts.dtype)
