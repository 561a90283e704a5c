"""torch on the CPU: batches of patterns as tensors, on all threads that torch takes."""

import numpy as np
import torch
from torch.nn.functional import avg_pool2d

from benchmarks.peers import CHUNK, Task, empty_zarr, note, row_of, timed, window_of

#: patterns of a batch: larger ones leave the cache
BATCH = 16


def run(task: Task) -> float:
    """Seconds of a row."""
    import zarr  # noqa: F401

    torch.set_num_threads(task.cores)
    with torch.inference_mode():
        return timed(row_of(ROWS, task))


def _centers_and_radii(block: torch.Tensor, target: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums by Chebyshev distance from each rounded centroid, and where they reach the target."""
    n, height, width = block.shape
    y, x = (torch.arange(size, dtype=torch.float64) for size in (height, width))
    rows, cols = block.sum(2).double(), block.sum(1).double()
    total = rows.sum(1)
    center = torch.stack([rows @ y, cols @ x], 1) / total[:, None]
    nearest = center.round().int()
    dy = torch.arange(height, dtype=torch.int32)[None] - nearest[:, :1]
    dx = torch.arange(width, dtype=torch.int32)[None] - nearest[:, 1:]
    dy, dx = torch.where(dy < 0, -dy, dy + 1), torch.where(dx < 0, -dx, dx + 1)
    size = max(height, width) + 1
    ring = torch.maximum(dy[:, :, None], dx[:, None, :])
    ring += size * torch.arange(n, dtype=torch.int32)[:, None, None]
    rings = torch.bincount(ring.flatten(), block.flatten(), n * size).reshape(n, size)
    inside = rings.double().cumsum(1)
    return center, (inside < target * total[:, None]).sum(1).clamp(min=1)


def _tensor(block: np.ndarray) -> torch.Tensor:
    """float32, which is exact here: torch has no arithmetic for uint16."""
    return torch.from_numpy(block.astype(np.float32))


def _analyzed(task: Task) -> tuple[np.ndarray, np.ndarray]:
    found = [_centers_and_radii(_tensor(part), task.target) for _, part in task.batches(BATCH)]
    centers, radii = zip(*found, strict=True)
    return torch.cat(centers).numpy(), torch.cat(radii).numpy().astype(float)


def _analysis(task: Task) -> None:
    note(task, *_analyzed(task))


def _crop(task: Task) -> None:
    y0, y1, x0, x1 = window_of(task, *_analyzed(task))
    n = task.shape[0] * task.shape[1]
    out = empty_zarr(task, (n, y1 - y0, x1 - x0), task.dtype, (CHUNK["crop"],))
    inside = torch.empty(n, dtype=torch.float64)
    for part, block in task.batches():
        cut = np.ascontiguousarray(block[:, y0:y1, x0:x1])
        inside[part] = _tensor(cut).sum((1, 2)).double()
        out[part] = cut


def _bin(task: Task) -> None:
    n, height, width = task.shape[0] * task.shape[1], task.shape[2] // 2, task.shape[3] // 2
    out = empty_zarr(task, (n, height, width), np.float32, (CHUNK["bin"],))
    for part, block in task.batches():
        out[part] = avg_pool2d(_tensor(block)[:, None], 2)[:, 0].numpy()


def _pt(task: Task) -> None:
    small = [avg_pool2d(_tensor(part)[:, None], 2) for _, part in task.batches()]
    torch.save(torch.cat(small), task.output)


ROWS = {"analysis": _analysis, "crop": _crop, "cold": _crop, "bin": _bin, "pt": _pt}
