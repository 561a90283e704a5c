"""What a training leaves besides the model: the embeddings of all positions, and the picture."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stem_dask.core.errors import StoreError
from stem_dask.core.model import LIST_DIMS, SCAN_DIMS
from stem_dask.core.patterns import coordinate
from stem_dask.storage.errors import translate
from stem_dask.storage.publish import opened, publish, temporary
from stem_dask.training import import_torch
from stem_dask.training.dataset import PatternDataset
from stem_dask.training.fit import FitOptions, pattern_losses
from stem_dask.training.loader import loader
from stem_dask.training.model import Model

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

#: datasets whose maps are in the picture
MOST_MAPS = 3

NO_MAP = "no map: the data state no scan shape; give --scan-shape Y X"

#: values of ``split``: name and colour
PARTS = {0: ("train", "#4c78a8"), 1: ("val", "#f2a33a"), 2: ("test", "#8e6bb0"), 3: ("guard", "#b8c4d4"), 255: ("left out", "white")}  # fmt: skip


def embed_all(
    model: Model, patterns: PatternDataset, options: FitOptions
) -> tuple[NDArray, NDArray]:
    """Latents (N, latent) and losses (N,) of all patterns, as float32."""
    torch = import_torch()
    z = np.empty((len(patterns), options.latent), np.float32)
    error = np.empty(len(patterns), np.float32)
    loss_of = pattern_losses(model.network, options, patterns.normalization)
    reading: dict[str, Any] = {"memory": options.memory, "threads": options.threads}
    for batch in loader(patterns, options.batch, shuffle=False, **reading):
        index = batch["index"].numpy()
        z[index] = model.embed(batch["patterns"]).cpu().numpy()
        with torch.no_grad():
            error[index] = loss_of(batch["patterns"])[0].cpu().numpy()
    return z, error


def scan_datasets(
    patterns: PatternDataset, z: NDArray, error: NDArray, split: Any, loss: str
) -> "list[xr.Dataset]":
    """Per dataset ``z``, ``error``, ``split`` and ``valid`` on its scan, with calibrated axes.

    ``split`` is the mask of the training part; None if all patterns belong to it.
    """
    import xarray as xr

    out, columns = [], [_listed(patterns.to_scan(values)) for values in (z, error)]
    masks = [np.where(np.isfinite(one), 0, 255) for one in columns[1]]
    masks = masks if split is None else _listed(split)
    for scan, latent, loss_map, mask in zip(patterns.scans, *columns, masks, strict=True):
        axes = scan.axes[:2] if scan.is_scan else ()
        dims = SCAN_DIMS if scan.is_scan else LIST_DIMS
        lead = [axis.size for axis in axes] or [-1]
        part = np.asarray(mask, np.uint8).reshape(lead)
        names = {str(value): name for value, (name, _) in PARTS.items()}
        data = {
            "z": ((*dims, "latent"), latent.reshape(*lead, z.shape[1]), {"long_name": "latent"}),
            "error": (dims, loss_map.reshape(lead), {"long_name": f"reconstruction error ({loss})"}),
            "split": (dims, part, {"long_name": "part of the training", **names}),
            "valid": (dims, part != 255, {"long_name": "whether the position has an embedding"}),
        }  # fmt: skip
        coords = {axis.name: coordinate(axis) for axis in axes}
        out.append(xr.Dataset(data, coords, {"source": str(scan.path)}))
    return out


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def write_embeddings(path: str, datasets: "Sequence[xr.Dataset]", about: Mapping[str, Any]) -> None:
    """Write them as a zarr store; several datasets are the groups ``0``, ``1``, …."""
    from stem_dask.writers.zarr import empty_store, finish_store, write_dataset

    built, several = temporary(path), len(datasets) > 1
    empty_store(built)
    for i, dataset in enumerate(datasets):
        write_dataset(built, str(i) if several else "", dataset)
    finish_store(built, about if several else {**datasets[0].attrs, **about}, None)
    publish(path)


def write_arrays(path: str, **arrays: Any) -> None:
    """Write an .npz."""
    with translate(StoreError, path), opened(temporary(path), "wb") as file:
        np.savez(file, **arrays)
    publish(path)


def components(z: NDArray) -> NDArray:
    """The first three principal components (N, 3) of latents, not whitened; the largest weight of each axis is positive.

    Examples
    --------
    >>> components(np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]])).tolist()
    [[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]]
    """
    centered = z.astype(np.float64) - z.mean(0, dtype=np.float64)
    axes = np.linalg.eigh(centered.T @ centered)[1][:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    return np.pad(centered @ axes, ((0, 0), (0, 3 - axes.shape[1])))


def draw(
    path: str,
    model: Model,
    patterns: PatternDataset,
    z: NDArray,
    datasets: "Sequence[xr.Dataset]",
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Write the picture: maps of each dataset, losses, and reconstructions beside their originals."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict(matplotlib.rcParamsDefault)  # the user's settings change nothing
    del style["backend"]  # which rc_context does not restore
    style |= {"font.size": 9, "axes.titlesize": 10, "image.interpolation": "nearest"}
    style |= dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 8)
    low, high = np.percentile(components(z), (2, 98), axis=0)
    colors = ((components(z) - low) / np.where(high > low, high - low, np.inf)).clip(0, 1)
    maps, shown = _listed(patterns.to_scan(colors)), min(len(datasets), MOST_MAPS)
    heights, loss = [2.9] * shown + [2.1] * 2, model.options["loss"]
    inches = 1.1 + sum(heights)
    with matplotlib.rc_context(style):
        figure = Figure((12.0, inches), 100)
        FigureCanvasAgg(figure)
        around = {"left": 0.06, "right": 0.95, "bottom": 0.4 / inches, "top": 1 - 0.9 / inches}
        rows = figure.add_gridspec(shown + 2, 1, height_ratios=heights, hspace=0.25, **around)
        for i, dataset in enumerate(datasets[:shown]):
            places: Any = rows[i].subgridspec(1, 4, wspace=0.55).subplots()
            if patterns.scans[i].is_scan:
                _draw_maps(places, maps[i], dataset, *patterns.scans[i].axes[:2])
            else:
                _draw_list(places, z, colors, dataset)
            if i == 0:
                _draw_losses(places[3], history, loss)
            else:
                places[3].axis("off")
            if len(datasets) > 1:
                places[0].set_title(f"file {i}: principal components")
        error = np.concatenate([one["error"].values[one["valid"].values] for one in datasets])
        split = np.concatenate([one["split"].values[one["valid"].values] for one in datasets])
        order = np.argsort(error, kind="stable")
        judged = order[split[order] == 1] if (split == 1).any() else order
        typical = judged[[(len(judged) - 1) * part // 10 for part in (1, 5, 9)]]
        for row, name, chosen in ((-2, "typical", typical), (-1, "worst", order[:-4:-1])):
            grid = rows[row].subgridspec(1, 3, wspace=0.28)
            for k, index in enumerate(chosen):
                pair: Any = grid[0, k].subgridspec(1, 2, wspace=0.06).subplots()
                _draw_pair(pair, name, model, patterns, error, int(index))
        height, width = model.options["shape"]
        title = ", ".join(str(scan.path).rpartition("/")[2] for scan in patterns.scans[:shown])
        title += f" and {len(datasets) - shown} more" * (len(datasets) > shown)
        title += f"\n{len(z):,} patterns of {height} x {width} ({patterns.normalization.method})"
        title += f", latent {z.shape[1]}, loss {loss}"
        figure.suptitle(title.replace("$", r"\$"), y=1 - 0.12 / inches, fontsize=13)
        with translate(
            StoreError, path
        ):  # without matplotlib's version, equal data give equal bytes
            figure.savefig(temporary(path), format="png", dpi=100, metadata={"Software": None})
    publish(path)


def _draw_maps(places: Any, colors: NDArray, dataset: "xr.Dataset", y: Any, x: Any) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    edges = (x.value(-0.5), x.value(x.size - 0.5), y.value(y.size - 0.5), y.value(-0.5))
    places[0].imshow(np.where(np.isfinite(colors), colors, 0.8), extent=edges)
    error = np.ma.masked_invalid(dataset["error"].values)
    most = np.quantile(error.compressed(), 0.99) if error.count() else None
    _bar(places[1], places[1].imshow(error, vmax=most, extent=edges), extend="max")
    split = dataset["split"].values
    values = [value for value in PARTS if (split == value).any()]
    cmap = ListedColormap([PARTS[value][1] for value in values])
    norm = BoundaryNorm(np.arange(len(values) + 1) - 0.5, len(values))
    bar = _bar(places[2], places[2].imshow(np.searchsorted(values, split), cmap, norm, extent=edges))  # fmt: skip
    bar.set_ticks(range(len(values)), labels=[PARTS[value][0] for value in values])
    titles = ("three principal components", str(dataset["error"].attrs["long_name"]), "split")
    for ax, title in zip(places, titles, strict=False):
        ax.set(title=title, facecolor="0.8", xlabel=f"{x.name} ({x.units or 'px'})")
        ax.set_aspect("equal" if x.units == y.units else "auto")
    places[0].set_ylabel(f"{y.name} ({y.units or 'px'})")


def _draw_list(places: Any, z: NDArray, colors: NDArray, dataset: "xr.Dataset") -> None:
    """Two components against each other, and the error along the list."""
    first, second, _ = components(z).T
    places[0].scatter(first, second, 6, colors)
    places[0].set(
        title="principal components", xlabel="component 1", ylabel="component 2", box_aspect=1
    )
    places[1].plot(dataset["error"].values, ".", ms=3)
    places[1].set(title=dataset["error"].attrs["long_name"], xlabel="pattern", box_aspect=1)
    places[2].axis("off")
    places[2].text(0, 0.5, NO_MAP.replace(": ", ":\n").replace("; ", ";\n"), va="center")


def _draw_losses(ax: "Axes", history: Sequence[Mapping[str, Any]], loss: str) -> None:
    from matplotlib.ticker import LogFormatter, MaxNLocator

    for key, color in (PARTS[0], PARTS[1]):
        values = [one[key] for one in history]
        if None not in values:
            ax.plot(range(1, len(values) + 1), values, ".-", color=color, label=f"{key} {values[-1]:.3g}")  # fmt: skip
    ax.set(yscale="log", xlabel="epoch", title=f"loss ({loss})", box_aspect=1)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.4)))
    ax.legend()


def _draw_pair(
    pair: Any,
    name: str,
    model: Model,
    patterns: PatternDataset,
    error: NDArray,
    index: int,
) -> None:
    """A pattern and its reconstruction on one colour scale, in normalized values."""
    from matplotlib.colors import PowerNorm

    x = np.asarray(patterns[index]["patterns"])[None]
    low, high = float(x.min()), float(x.max())
    norm = PowerNorm(0.6, low, max(high, low + 1e-6))  # so that weak discs are visible
    file, row, column = patterns.positions[index]
    where = f"scan ({row}, {column})" if patterns.scans[file].is_scan else f"pattern {column}"
    where = f"file {file} ({row}, {column})" if len(patterns.scans) > 1 else where
    titles = (f"{name}: {where}", f"error {error[index]:.3g}")
    for i, image in enumerate((x, model.reconstruct(x).cpu().numpy())):
        shown = pair[i].imshow(image[0, 0], "magma", norm=norm)
        pair[i].set(xticks=[], yticks=[], xlabel=("pattern", "reconstruction")[i])
        pair[i].set_title(titles[i], loc=("left", "right")[i])
    _bar(pair[1], shown)


def _bar(ax: "Axes", shown: Any, **look: Any) -> Any:
    """A colour bar as high as the picture."""
    return ax.figure.colorbar(shown, cax=ax.inset_axes((1.03, 0, 0.05, 1)), **look)
