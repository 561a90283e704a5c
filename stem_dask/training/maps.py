"""What a training leaves besides the model: embeddings of all positions, and the picture."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import StoreError
from stem_dask.core.model import LIST_DIMS, SCAN_DIMS, Axis
from stem_dask.core.patterns import coordinate
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import opened, publish, temporary
from stem_dask.training.dataset import PatternDataset
from stem_dask.training.fit import FitOptions, pattern_losses
from stem_dask.training.loader import loader
from stem_dask.training.model import Model, import_torch

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

DPI = 100

#: datasets whose maps are in the picture
MOST_MAPS = 3

NO_MAP = "no map: the file states no scan shape; give --scan-shape Y X"

#: values of ``split``, in words
PARTS = {0: "train", 1: "val", 2: "test", 3: "guard", 255: "left out"}

_COLORS = {0: "#4c78a8", 1: "#f2a33a", 2: "#8e6bb0", 3: "#b8c4d4", 255: "white"}


@dataclass(frozen=True, eq=False)
class Embedding:
    """All positions in order: ``z`` (N, latent) and ``error`` (N,), the loss of each pattern, as float32."""

    z: NDArray
    error: NDArray


def embed_all(model: Model, patterns: PatternDataset, options: FitOptions) -> Embedding:
    """Pass all patterns through a model."""
    torch = import_torch()
    z = np.empty((len(patterns), options.latent), np.float32)
    error = np.empty(len(patterns), np.float32)
    loss_of = pattern_losses(model.network, options, patterns.normalization)
    reading = {"memory": options.memory, "threads": options.threads}
    for batch in loader(patterns, options.batch, shuffle=False, **reading):
        index = batch["index"].numpy()
        z[index] = model.embed(batch["patterns"]).cpu().numpy()
        with torch.no_grad():
            error[index] = loss_of(batch["patterns"])[0].cpu().numpy()
    return Embedding(z, error)


def scan_datasets(
    patterns: PatternDataset, found: Embedding, split: Any, loss: str
) -> "list[xr.Dataset]":
    """Per dataset z, error, split and valid on its scan, with calibrated axes."""
    import xarray as xr

    columns: tuple[Any, ...] = (found.z, found.error)
    z, error = (_listed(patterns.to_scan(values)) for values in columns)
    if split is None:  # all that has an embedding was trained on
        split = [np.where(np.isfinite(one), 0, 255) for one in error]
    out = []
    for i, (scan, part) in enumerate(zip(patterns.scans, _listed(split), strict=True)):
        axes = scan.axes[: len(scan.axes) - 2]
        dims = SCAN_DIMS if scan.is_scan else LIST_DIMS
        lead = tuple(axis.size for axis in axes) if scan.is_scan else (-1,)
        labels = {str(value): name for value, name in PARTS.items()}
        part = np.asarray(part, np.uint8).reshape(lead)
        data = {
            "z": ((*dims, "latent"), z[i].reshape(*lead, z[i].shape[-1]), {"long_name": "latent"}),
            "error": (
                dims,
                error[i].reshape(lead),
                {"long_name": f"reconstruction error ({loss})"},
            ),
            "split": (dims, part, {"long_name": "part of the training", **labels}),
            "valid": (dims, part != 255, {"long_name": "whether the position has an embedding"}),
        }
        coords = {axis.name: coordinate(axis) for axis in axes} if scan.is_scan else {}
        out.append(xr.Dataset(data, coords, {"source": str(scan.path)}))
    return out


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [values]


def write_embeddings(path: str, datasets: "Sequence[xr.Dataset]", attrs: Mapping[str, Any]) -> None:
    """Write them as a zarr store; several datasets are the groups ``0``, ``1``, …."""
    from stem_dask.writers.zarr import empty_store, finish_store, write_dataset

    built = temporary(path)
    empty_store(built)
    for i, dataset in enumerate(datasets):
        write_dataset(built, str(i) if len(datasets) > 1 else "", dataset)
    finish_store(built, attrs if len(datasets) > 1 else {**datasets[0].attrs, **attrs}, None)
    publish(path)


def write_arrays(path: str, patterns: PatternDataset, found: Embedding) -> None:
    """Write z and positions as an .npz."""
    with translate(StoreError, path), opened(temporary(path), "wb") as file:
        np.savez(file, z=found.z, positions=patterns.positions)
    publish(path)


def components(z: NDArray, n: int = 3) -> NDArray:
    """Principal components (N, n) of latents, not whitened; the largest weight of each axis is positive.

    Examples
    --------
    >>> components(np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])).tolist()
    [[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]]
    """
    centered = z.astype(np.float64) - z.mean(0, dtype=np.float64)
    _, axes = np.linalg.eigh(centered.T @ centered)
    axes = axes[:, ::-1][:, :n]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    out = np.zeros((len(z), n))
    out[:, : axes.shape[1]] = centered @ axes
    return out


def draw(
    path: str,
    model: Model,
    patterns: PatternDataset,
    found: Embedding,
    datasets: "Sequence[xr.Dataset]",
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Write the picture: maps of each dataset, losses, and reconstructions beside their originals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = components(found.z)
    low, high = np.percentile(colors, (2, 98), axis=0)
    colors = ((colors - low) / np.where(high > low, high - low, 1)).clip(0, 1)
    colors[:, high <= low] = 0.5
    maps = _listed(patterns.to_scan(colors))
    shown = min(len(datasets), MOST_MAPS)
    with _style():
        inches = 1.2 + 2.9 * shown + 2 * 2.3
        figure = Figure((12.0, inches), DPI)
        FigureCanvasAgg(figure)
        rows = figure.add_gridspec(
            shown + 2, 1, left=0.06, right=0.95, bottom=0.4 / inches, top=1 - 0.9 / inches,
            height_ratios=[2.9] * shown + [2.3] * 2, hspace=0.3,
        )  # fmt: skip
        for i, dataset in enumerate(datasets[:shown]):
            places = [figure.add_subplot(p) for p in rows[i].subgridspec(1, 4, wspace=0.55)]
            if patterns.scans[i].is_scan:
                _draw_maps(places[:3], maps[i], dataset, patterns.scans[i].axes)
            else:
                _draw_list(places[:3], colors, found, dataset)
            if i == 0:
                _draw_losses(places[3], history, model.options["loss"])
            else:
                places[3].axis("off")
        chosen = _examples(found.error, datasets)
        for row, (name, indices) in enumerate(chosen.items(), shown):
            grid = rows[row].subgridspec(1, 3, wspace=0.28)
            for place, index in zip(grid, indices, strict=False):
                pair = [figure.add_subplot(p) for p in place.subgridspec(1, 2, wspace=0.06)]
                _draw_pair(pair, name, model, patterns, found, int(index))
        n, loss = len(found.error), model.options["loss"]
        more = f", maps of the first {shown} of {len(datasets)}" if len(datasets) > shown else ""
        name = ", ".join(str(scan.path).rpartition("/")[2] for scan in patterns.scans[:shown])
        title = f"{name}{more}\n{n:,} patterns, latent {model.options['latent']}, loss {loss}"
        figure.suptitle(title.replace("$", r"\$"), y=1 - 0.12 / inches, fontsize=13)
        with translate(StoreError, path):
            # matplotlib's version in the file would make equal pictures differ
            figure.savefig(temporary(path), format="png", dpi=DPI, metadata={"Software": None})
    publish(path)


def _examples(error: NDArray, datasets: "Sequence[xr.Dataset]") -> dict[str, NDArray]:
    """Typical patterns of the validation part, or of all without one, and the worst of all."""
    split = np.concatenate([one["split"].values[one["valid"].values] for one in datasets])
    judged = np.flatnonzero(split == 1) if (split == 1).any() else np.arange(len(error))
    order = judged[np.argsort(error[judged], kind="stable")]
    typical = order[[(len(order) - 1) * part // 10 for part in (1, 5, 9)]]
    return {"typical": typical, "worst": np.argsort(-error, kind="stable")[:3]}


def _draw_maps(
    places: "Sequence[Axes]", colors: NDArray, dataset: "xr.Dataset", axes: Sequence[Axis]
) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    y, x = axes[0], axes[1]
    edges = (x.value(-0.5), x.value(x.size - 0.5), y.value(y.size - 0.5), y.value(-0.5))
    look: dict[str, Any] = {"extent": edges, "interpolation": "nearest"}
    rgb = np.where(np.isfinite(colors), colors, 0.8)
    places[0].imshow(rgb, **look)
    error = np.ma.masked_invalid(dataset["error"].values)
    most = float(np.quantile(error.compressed(), 0.99)) if error.count() else 1.0
    extend = "max" if error.count() and error.max() > most else "neither"
    _bar(places[1], places[1].imshow(error, "viridis", vmax=most, **look), extend=extend)
    split = dataset["split"].values
    names = [value for value in PARTS if (split == value).any()]
    numbers = np.searchsorted(names, split)
    cmap = ListedColormap([_COLORS[value] for value in names])
    norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
    bar = _bar(places[2], places[2].imshow(numbers, cmap, norm=norm, **look))
    bar.set_ticks(range(len(names)), labels=[PARTS[value] for value in names])
    titles = ("three principal components", str(dataset["error"].attrs["long_name"]), "split")
    for ax, title in zip(places, titles, strict=True):
        ax.set_title(title)
        ax.set(facecolor="0.8", aspect="equal" if x.units == y.units else "auto")
        ax.set_xlabel(f"{x.name} ({x.units or 'px'})")
    places[0].set_ylabel(f"{y.name} ({y.units or 'px'})")


def _draw_list(
    places: "Sequence[Axes]", colors: NDArray, found: Embedding, dataset: "xr.Dataset"
) -> None:
    """Without a scan there is no map: the components against each other, and the error along the list."""
    first, second, _ = components(found.z).T
    places[0].scatter(first, second, 6, colors)
    places[0].set(title="principal components", xlabel="component 1", ylabel="component 2")
    places[1].plot(dataset["error"].values, ".", ms=3)
    places[1].set(title=dataset["error"].attrs["long_name"], xlabel="pattern")
    places[2].axis("off")
    places[2].text(0, 0.5, NO_MAP.replace(": ", ":\n").replace("; ", ";\n"), va="center")


def _draw_losses(ax: "Axes", history: Sequence[Mapping[str, Any]], loss: str) -> None:
    from matplotlib.ticker import LogFormatter, MaxNLocator

    epochs = [one["epoch"] for one in history]
    for key, color in (("train", _COLORS[0]), ("val", _COLORS[1])):
        values = [one[key] for one in history]
        if None not in values:
            ax.plot(epochs, values, ".-", color=color, label=f"{key} {values[-1]:.3g}")
    ax.set(yscale="log", xlabel="epoch", title=f"loss ({loss})", box_aspect=1)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for which in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        which(LogFormatter(minor_thresholds=(1.2, 0.4)))
    ax.legend()


def _draw_pair(
    pair: "Sequence[Axes]",
    name: str,
    model: Model,
    patterns: PatternDataset,
    found: Embedding,
    index: int,
) -> None:
    """A pattern and its reconstruction, in normalized values of one colour scale."""
    original = np.asarray(patterns[index]["patterns"], np.float32)
    again = model.reconstruct(original[None]).cpu().numpy()[0, 0]
    values = original[0]
    low, high = float(values.min()), max(float(values.max()), float(values.min()) + 1e-6)
    for ax, image in zip(pair, (values, again), strict=True):
        shown = ax.imshow(image, "magma", vmin=low, vmax=high, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
    _bar(pair[1], shown)
    _, y, x = patterns.positions[index]
    pair[0].set_title(f"{name}: scan ({y}, {x})", loc="left")
    pair[1].set_title(f"error {found.error[index]:.3g}", loc="right")
    pair[0].set_xlabel("pattern")
    pair[1].set_xlabel("reconstruction")


def _bar(ax: "Axes", shown: Any, **look: Any) -> Any:
    """A colour bar as high as the picture."""
    return ax.figure.colorbar(shown, cax=ax.inset_axes((1.03, 0, 0.05, 1)), **look)


def _style() -> AbstractContextManager[None]:
    """Matplotlib's own defaults, so that the user's settings change nothing."""
    import matplotlib

    style: dict[Any, Any] = dict(matplotlib.rcParamsDefault)
    del style["backend"]  # which rc_context does not restore
    sizes = {"axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8}
    style |= {**sizes, "xtick.labelsize": 8, "ytick.labelsize": 8, "font.size": 9}
    return matplotlib.rc_context(style)
