"""The autoencoder, and the file of a trained one."""

import json
from collections.abc import Callable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import stem_dask
from stem_dask.core.errors import ConfigError, SourceError, StoreError
from stem_dask.core.text import by
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import opened, publish, temporary
from stem_dask.training.dataset import Normalization

if TYPE_CHECKING:
    import torch

#: an autoencoder has at most so many weights
MOST_WEIGHTS = 300_000

#: patterns of these heights and widths are accepted
SIZES = (8, 512)

#: channels after each stride-2 convolution; with one cell and a latent of 32 they give 81,681 weights
_CHANNELS = (24, 48, 64)

#: groups of a GroupNorm
_GROUPS = 8

#: patterns that `Model.embed` passes through the network at once
_BATCH = 64


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


def device_of(name: str) -> str:
    """The device of a name; ``auto`` is a GPU if there is one, else the CPU."""
    torch = import_torch()
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if n_gpus else "cpu"
    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or not n_gpus or int(number or 0) >= n_gpus):
        raise ConfigError(
            f"device is {name}, and torch finds {n_gpus} CUDA devices; use cpu, auto, or cuda"
        )
    return name


def grid(shape: tuple[int, int], latent: int) -> tuple[int, int]:
    """Cells of the feature map that the linear layers see, such that the weights stay below `MOST_WEIGHTS`.

    Larger feature maps are averaged over such cells.

    Parameters
    ----------
    shape : height and width of the patterns
    latent : number of latent dimensions

    Raises
    ------
    ConfigError
        When the patterns have an unsupported size, or even one cell has too many weights.

    Examples
    --------
    >>> grid((59, 59), 16), grid((512, 64), 32), grid((8, 8), 32)
    ((8, 8), (7, 7), (1, 1))
    """
    low, high = SIZES
    if not all(low <= n <= high for n in shape):
        raise ConfigError(
            f"patterns of {by(shape)} pixels; expected {low} to {high} each way: crop them, or use another downsample"
        )
    most = (MOST_WEIGHTS - _n_weights(0, 0)) // (2 * _CHANNELS[-1] + 1)
    if not 1 <= latent <= most:
        raise ConfigError(f"latent is {latent}; expected 1 to {most}")
    rows, columns = (-(-n // 8) for n in shape)
    while _n_weights(rows * columns, latent) > MOST_WEIGHTS:
        rows, columns = (rows - 1, columns) if rows > columns else (rows, columns - 1)
    return rows, columns


def _n_weights(cells: int, latent: int) -> int:
    """Weights of the autoencoder, biases included."""
    first, second, third = _CHANNELS
    convolutions = 9 * (first + first * second + second * third)
    biases_and_norms = 3 * (first + second + third) + 1 + 3 * (first + second)
    linear = 2 * third * cells * latent + latent + third * cells
    return 2 * convolutions + biases_and_norms + linear


def autoencoder(shape: tuple[int, int], latent: int) -> "torch.nn.Module":
    """The untrained network, a `torch.nn.Sequential` of ``encoder`` and ``decoder``.

    Three stride-2 convolutions with GroupNorm and GELU lead to a linear latent; the decoder mirrors them. It takes
    and returns (B, 1, H, W) float32; the encoder returns (B, latent).

    Parameters
    ----------
    shape : height and width of the patterns, 8 to 512 each
    latent : number of latent dimensions

    Raises
    ------
    ConfigError
        When the patterns have an unsupported size, or the latent has too many dimensions.

    Examples
    --------
    >>> sum(weights.numel() for weights in autoencoder((59, 57), 32).parameters())
    282449
    """
    from collections import OrderedDict

    nn = import_torch().nn
    cells, channels = grid(shape, latent), (1, *_CHANNELS)
    sizes = [shape]  # of the feature maps
    for _ in _CHANNELS:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    n_features = channels[-1] * cells[0] * cells[1]
    down: list[Any] = []
    up: list[Any] = []
    for coarse, fine, n_in, n_out in zip(sizes[1:], sizes, channels, channels[1:], strict=False):
        down += [nn.Conv2d(n_in, n_out, 3, 2, 1), nn.GroupNorm(_GROUPS, n_out), nn.GELU()]
        rest = (fine[0] - 2 * coarse[0] + 1, fine[1] - 2 * coarse[1] + 1)
        back = [nn.ConvTranspose2d(n_out, n_in, 3, 2, 1, rest)]
        back += [nn.GroupNorm(_GROUPS, n_in), nn.GELU()] if n_in > 1 else []
        up = back + up
    if cells != sizes[-1]:
        down.append(nn.AdaptiveAvgPool2d(cells))
        up = [nn.Upsample(sizes[-1]), *up]
    encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(n_features, latent))
    decoder = nn.Sequential(
        nn.Linear(latent, n_features), nn.Unflatten(1, (channels[-1], *cells)), *up
    )
    return nn.Sequential(OrderedDict(encoder=encoder, decoder=decoder))


class Model:
    """A trained autoencoder on one device; made by the command ``stem-dask train``, opened by `load_model`.

    Attributes
    ----------
    normalization : Normalization
        As the patterns must be normalized: ``sd.PatternDataset(path, normalize=model.normalization)``.
    options : dict
        The options of the training, and ``shape``, height and width of the patterns.
    axes : dict
        Per detector axis (``ky``, ``kx``) the ``size``, ``scale``, ``offset`` and ``units``.
    fingerprint : str
        Of the data that the model was trained on.
    """

    def __init__(
        self,
        network: "torch.nn.Module",
        *,
        normalization: Normalization,
        options: Mapping[str, Any],
        axes: Mapping[str, Any],
        fingerprint: str,
    ) -> None:
        self.network = network.eval()
        self.normalization, self.options, self.axes = normalization, dict(options), dict(axes)
        self.fingerprint = fingerprint

    def embed(self, x: Any) -> "torch.Tensor":
        """The latent of patterns.

        Parameters
        ----------
        x : (B, 1, H, W) tensor or array, as a `PatternDataset` with the model's normalization yields it

        Returns
        -------
        (B, latent) float32 tensor on the model's device

        Raises
        ------
        ConfigError
            When the patterns do not have the size that the model was trained on.
        """
        return self._passed(x, self.network.get_submodule("encoder"))

    def reconstruct(self, x: Any) -> "torch.Tensor":
        """The patterns as the model reproduces them: (B, 1, H, W) float32, from the same input as `embed`."""
        return self._passed(x, self.network)

    def _passed(self, x: Any, network: Callable[[Any], Any]) -> "torch.Tensor":
        torch = import_torch()
        x, shape = torch.as_tensor(x), tuple(self.options["shape"])
        if x.ndim != 4 or tuple(x.shape[1:]) != (1, *shape):
            raise ConfigError(
                f"x has shape {tuple(x.shape)}; expected (B, 1, {shape[0]}, {shape[1]}), as PatternDataset yields them with "
                "normalize=model.normalization and the downsample of the training"
            )
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            parts = [network(part.to(device, torch.float32)) for part in x.split(_BATCH)]
        return torch.cat(parts).clone()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model; equal models give equal bytes.

        Raises
        ------
        StoreError
            When the file cannot be written.
        """
        import torch

        versions = {"stem_dask": stem_dask.__version__, "torch": str(torch.__version__)}
        found = self.normalization
        constants = {"method": found.method, "mean": found.mean, "std": found.std}
        about = {
            "options": self.options,
            "normalization": constants,
            "axes": self.axes,
            "fingerprint": self.fingerprint,
            "versions": versions,
        }
        # through JSON, because a pickle records which texts are the same object
        content = json.loads(json.dumps(about, default=float))
        weights = self.network.state_dict()
        content["weights"] = {str(name): weights[name].cpu().clone() for name in weights}
        save(content, path)


def save(content: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Write a .pt with torch under a temporary name, sync it and rename it."""
    import torch

    with translate(StoreError, path):
        # a file object, because torch writes the stem of a path into the file
        with opened(temporary(path), "wb") as file:
            torch.save(dict(content), file)
        publish(path)


def load(path: str | PathLike[str], what: str, *keys: str) -> dict[str, Any]:
    """The content of a .pt of this package; SourceError if it is damaged, or lacks a key."""
    torch = import_torch()
    remedy = "give the file that stem-dask train wrote, or train again"
    with translate(SourceError, path, f"not a readable {what}", remedy), open(path, "rb") as file:
        found = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or (missing := [key for key in keys if key not in found]):
            raise ValueError(
                f"without {missing[0]}" if isinstance(found, dict) else "no dictionary"
            )
    return found


def load_model(path: str | PathLike[str], device: str | None = None) -> Model:
    """Open the ``model.pt`` of a training; no code in the file is executed.

    Parameters
    ----------
    path : the file
    device : such as ``"cuda"``; None for the CPU

    Returns
    -------
    Model, whose `Model.embed` gives (B, latent) for (B, 1, H, W)

    Raises
    ------
    SourceError
        When the file does not exist, is damaged, or is no model of ``stem-dask train``.

    Examples
    --------
    >>> load_model("no_such_model.pt")
    Traceback (most recent call last):
    stem_dask.core.errors.SourceError: no_such_model.pt does not exist; give the model.pt of a training
    """
    import os

    if not os.path.exists(path):
        raise SourceError(f"{path} does not exist; give the model.pt of a training")
    found = load(path, "model", "weights", "options", "normalization", "axes", "fingerprint")
    with translate(SourceError, path, "not a readable model", "train again"):
        options = found["options"]
        network = autoencoder(tuple(options["shape"]), options["latent"])
        network.load_state_dict(found["weights"])
        normalization = Normalization(**found["normalization"])
    return Model(
        network.to(device or "cpu"),
        normalization=normalization,
        options=options,
        axes=found["axes"],
        fingerprint=found["fingerprint"],
    )
