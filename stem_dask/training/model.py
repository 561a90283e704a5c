"""The autoencoder, and the file of a trained one."""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import stem_dask
from stem_dask.core.errors import ConfigError, SourceError, StoreError
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import opened, publish, temporary
from stem_dask.training import import_torch
from stem_dask.training.dataset import Normalization

if TYPE_CHECKING:
    import torch

#: an autoencoder has at most so many weights
MOST_WEIGHTS = 300_000

#: channels after each stride-2 convolution: few where feature maps are large, which takes the time, and many where they are small
_CHANNELS = (16, 32, 112)

_REMEDY = "give the file that stem-dask train wrote, or move it away and train again"


def device_of(name: str) -> str:
    """The device of a name; ``auto`` is a GPU if there is one, else the CPU."""
    torch = import_torch()
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except Exception as error:  # RuntimeError, AssertionError, NotImplementedError
        raise ConfigError(f"device is {name}, which torch does not find; use cpu or auto") from error  # fmt: skip
    return name


def grid(shape: tuple[int, int], latent: int) -> tuple[int, int]:
    """Cells of the last feature map for the linear layers: all that keep the weights below `MOST_WEIGHTS`.

    Examples
    --------
    >>> grid((59, 59), 16), grid((512, 64), 32), grid((5, 7), 32)
    ((8, 7), (6, 5), (1, 1))
    """
    first, second, third = _CHANNELS
    convolutions = 18 * (first + first * second + second * third)
    others = convolutions + 6 * (first + second) + 3 * third + 1  # biases, GroupNorm
    most = (MOST_WEIGHTS - others - third) // (2 * third + 1)
    if not 1 <= latent <= most:
        raise ConfigError(f"latent is {latent}; expected 1 to {most}")
    most_cells = (MOST_WEIGHTS - others - latent) // (third * (2 * latent + 1))
    rows, columns = (-(-n // 8) for n in shape)
    while rows * columns > most_cells:
        rows, columns = (rows - 1, columns) if rows > columns else (rows, columns - 1)
    return rows, columns


def autoencoder(shape: tuple[int, int], latent: int) -> "torch.nn.Module":
    """The untrained network, a `torch.nn.Sequential` of ``encoder`` and ``decoder``.

    Three stride-2 convolutions with GroupNorm and GELU lead to a linear latent; the decoder mirrors them. Large feature maps are
    averaged over the cells of `grid` before the linear layer. It takes and returns (B, 1, H, W) float32, the encoder returns
    (B, latent). Raises ConfigError when the patterns (``shape`` is height and width) are not 8 to 512 pixels each way, or the
    latent is too large.

    Examples
    --------
    >>> sum(weights.numel() for weights in autoencoder((59, 57), 32).parameters())
    293073
    """
    nn, cells, channels = import_torch().nn, grid(shape, latent), (1, *_CHANNELS)
    down: list[Any] = []
    up: list[Any] = []
    fine = shape
    for n_in, n_out in zip(channels, _CHANNELS, strict=False):
        down += [nn.Conv2d(n_in, n_out, 3, 2, 1), nn.GroupNorm(8, n_out), nn.GELU()]
        rest = ((fine[0] + 1) % 2, (fine[1] + 1) % 2)  # of an even size
        act = [nn.GroupNorm(8, n_in), nn.GELU()] if n_in > 1 else []
        up = [nn.ConvTranspose2d(n_out, n_in, 3, 2, 1, rest), *act, *up]
        fine = (-(-fine[0] // 2), -(-fine[1] // 2))
    if cells != fine:
        down, up = [*down, nn.AdaptiveAvgPool2d(cells)], [nn.Upsample(fine), *up]
    n = channels[-1] * cells[0] * cells[1]
    encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(n, latent))
    nn.init.zeros_(up[-1].weight)  # begins with the mean pattern instead of noise
    decoder = nn.Sequential(nn.Linear(latent, n), nn.Unflatten(1, (channels[-1], *cells)), *up)
    return nn.Sequential(OrderedDict(encoder=encoder, decoder=decoder))


@dataclass(eq=False)
class Model:
    """A trained autoencoder on one device; ``stem-dask train`` writes it, `load_model` opens it.

    ``normalization`` is what its patterns need: ``sd.PatternDataset(path, normalize=model.normalization)``. ``options`` are
    those of the training, and ``shape``, height and width of the patterns. ``axes`` has size, scale, offset and units of
    ``ky`` and ``kx``; ``fingerprint`` is that of the data.
    """

    network: "torch.nn.Module"
    normalization: Normalization
    options: Mapping[str, Any]
    axes: Mapping[str, Any]
    fingerprint: str

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
        """The patterns as the model reproduces them, (B, 1, H, W) float32, from the same ``x`` as `embed`."""
        return self._passed(x, self.network)

    def _passed(self, x: Any, network: Any) -> "torch.Tensor":
        torch = import_torch()
        x, expected = torch.as_tensor(x), (1, *self.options["shape"])
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ConfigError(
                f"x has shape {tuple(x.shape)}; expected (B, {', '.join(map(str, expected))}), as PatternDataset yields it with "
                "normalize=model.normalization and the downsample of the training"
            )
        device = next(self.network.parameters()).device
        with torch.no_grad():  # a few at a time, because feature maps are larger than patterns
            return torch.cat([network(part.to(device, torch.float32)) for part in x.split(64)])

    def save(self, path: str) -> None:
        """Write the model; equal models give equal bytes; StoreError where that fails."""
        torch = import_torch()
        about = {
            "options": self.options,
            "normalization": asdict(self.normalization),
            "axes": self.axes,
            "fingerprint": self.fingerprint,
            "versions": {"stem_dask": stem_dask.__version__, "torch": str(torch.__version__)},
        }
        weights = self.network.state_dict()
        # through JSON, because a pickle records which texts are the same object
        content = json.loads(json.dumps(about, default=float))
        save({**content, "weights": {name: weights[name].cpu() for name in weights}}, path)


def save(content: Mapping[str, Any], path: str) -> None:
    """Write a .pt with torch under a temporary name, sync it and rename it."""
    with translate(StoreError, path):
        # a file object, because torch writes the stem of a path into the file
        with opened(temporary(path), "wb") as file:
            import_torch().save(dict(content), file)
        publish(path)


def load(path: str | os.PathLike[str], what: str, *keys: str) -> dict[str, Any]:
    """The content of a .pt of this package; SourceError if it is damaged, or lacks a key."""
    torch = import_torch()
    with translate(SourceError, path, f"not a readable {what}", _REMEDY), open(path, "rb") as file:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return {key: found[key] for key in keys}


def load_model(path: str | os.PathLike[str], device: str | None = None) -> Model:
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
    >>> load_model("missing.pt")
    Traceback (most recent call last):
    stem_dask.core.errors.SourceError: missing.pt does not exist; give the model.pt of a training
    """
    if not os.path.exists(path):
        raise SourceError(f"{path} does not exist; give the model.pt of a training")
    found = load(path, "model", "options", "normalization", "axes", "fingerprint", "weights")
    with translate(SourceError, path, "not a readable model", _REMEDY):
        network = autoencoder(tuple(found["options"]["shape"]), found["options"]["latent"])
        network.load_state_dict(found.pop("weights"))
        found["normalization"] = Normalization(**found["normalization"])
    return Model(network.to(device_of(device or "cpu")).eval(), **found)
