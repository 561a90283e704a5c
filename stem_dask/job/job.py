"""One run: its plan, cluster and state, and what the passes have found so far."""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stem_dask.cluster.connect import Connection
from stem_dask.core.errors import SourceError
from stem_dask.core.model import Device, Progress, Record, Region, Step, Window
from stem_dask.core.patterns import lead_dims
from stem_dask.engine import run as engine
from stem_dask.engine.journal import Tally
from stem_dask.engine.state import SAMPLES, RunState
from stem_dask.job import budget
from stem_dask.job.plan import Plan
from stem_dask.job.summary import tree_bytes
from stem_dask.stages.correct import apply_mask, read_mask
from stem_dask.stages.crop import Kept
from stem_dask.stages.descan import Fit
from stem_dask.stages.survey import Survey, needs_survey
from stem_dask.storage.location import at
from stem_dask.storage.publish import DOCUMENT, temporary

#: time per byte that an export or a normalization writes, relative to a byte of the input: with the input on a disk that reads
#: 1 to 2 GB/s, exports write 0.25 to 0.65 GB/s
WRITTEN_BYTE = 4


class Job:
    """One run: its plan, cluster and state, and what the passes have found so far."""

    def __init__(
        self,
        plan: Plan,
        state: RunState,
        connection: Connection,
        progress: Progress | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.plan, self.state, self.connection, self.progress = plan, state, connection, progress
        #: takes a line for the user
        self.say = say
        self.config, self.outputs, self.folder = plan.config, plan.outputs, str(state.folder)
        #: where the kernels run
        self.device: Device = "gpu" if plan.config.device == "gpu" else "cpu"
        #: the worker with the least memory per thread
        self.worker = budget.with_cuda(plan.config, connection.worker)
        self.warnings: list[str] = []
        self.tally = Tally()
        #: detector pixels of one transpose task, of a detector-first input
        self.slab: tuple[int, int] | None = None
        #: the lazy input: transposed if necessary, corrected, bad pixels masked
        self.patterns: xr.DataArray
        #: (ky, kx) in source pixels, True for a bad one
        self.mask: NDArray[np.bool_] | None = None
        #: the input as read, transposed if necessary
        self.found = plan.found
        #: what the first pass keeps of each pattern, if the input is read once
        self.kept: Kept | None = None
        #: about how many bytes that takes, and how many the pass that writes reads
        self.kept_bytes, self.again = 0, plan.found.n_bytes
        #: whether the sample is read without a survey
        self.samples = False
        #: number of positions of a block
        self.positions = 1
        #: the centers by symmetry, which do not come from each pattern itself
        self.friedel: Fit | None = None
        #: what the sample says; None if no option needs it
        self.survey: Survey | None = None
        #: the scale of the detector by the direct disc; empty where it is not known
        self.calibration: dict[str, Any] = {}
        #: (ky, kx), pixels that are hot in the mean pattern, and were not in the sample
        self.left: NDArray[np.bool_] | None = None
        #: without the profiles, which are too many to be held; with the retention after a crop
        self.analysis: xr.Dataset | None = None
        #: yields region and profiles of each block
        self.profiles: Callable[[], Iterable[tuple[Region, Mapping[str, NDArray]]]]
        #: small images of some patterns, for the report; None if a precomputed analysis has none
        self.thumbnails: xr.Dataset | None = None
        #: the store that holds analysis and profiles
        self.profile_store: str | None = None
        self.window: Window | None = None
        #: the lazy output, its mean pattern and highest value, and which of its patterns could be read
        self.out: xr.DataArray
        self.mean: NDArray[np.float64]
        self.highest = -math.inf
        self.valid: NDArray[np.bool_]
        #: mean and standard deviation, of a run that normalizes
        self.constants: dict[str, float] | None = None
        #: number of the stage that the job has reached
        self.reached = 0

    @property
    def n_blocks(self) -> int:
        """Number of blocks of every pass."""
        return math.prod(self.patterns.data.numblocks)

    def gpu_bytes(self, positions: int) -> int:
        """Upper bound of the GPU memory that the tasks of one worker use."""
        what = budget.shapes(self.config, self.plan.found)
        return self.worker.threads * budget.task_memory(self.config, what, positions).on_gpu

    def masked(self, patterns: xr.DataArray, mask: Any) -> xr.DataArray:
        """Mask bad pixels, and keep the mask."""
        self.mask = read_mask(mask, patterns.shape[-2:])
        return apply_mask(patterns, self.mask, self.config.input.mask_fill)

    def compute(self, stage: str, outputs: Mapping[str, da.Array], sink: engine.Sink) -> None:
        """Run the lazy outputs of one stage into a sink."""
        n_bytes, unreadable = self.plan.found.n_bytes, self.tally.unreadable
        if stage != "analyze":
            n_bytes = self.again
        self.tally.note(
            self.run(stage, outputs, sink, len(lead_dims(self.patterns)), n_bytes, unreadable)
        )

    def run(
        self,
        stage: str,
        outputs: Mapping[str, da.Array],
        sink: engine.Sink,
        n_lead: int,
        n_bytes: int,
        unreadable: Mapping[int, str] = MappingProxyType({}),
    ) -> list[Record]:
        """Run lazy outputs that read ``n_bytes`` of the input; see `stem_dask.engine.run.run`."""
        try:
            records = engine.run(
                outputs,
                n_lead,
                sink,
                client=self.connection.client,
                progress=self.reporter(stage, n_bytes),
                journal=self.state.journal,
                job=stage,
                quarantine=self.config.on_error == "quarantine",
                unreadable=unreadable,
            )
        except SourceError as error:
            self.refuse_changed_input()
            hint = "the same command goes on when it can be read, or with on_error=quarantine without it"
            if stage in SAMPLES:  # its blocks are none of the scan
                error = SourceError(f"while a sample was read: {str(error).partition(': ')[2]}")
            raise SourceError(f"{self.with_path(error)}; {hint}") from error
        self.refuse_changed_input()
        return records

    def refuse_changed_input(self) -> None:
        """Raise SourceError when the input is not the file that was opened; the results so far are then useless."""
        change = self.plan.found.change()
        if change is not None:
            with self.state.nothing_to_go_on_with():
                raise SourceError(
                    f"{self.plan.found.info.path} changed while it was read ({change}); the results so far are dropped: "
                    "run the same command again when nothing writes to the file any more"
                )

    def with_path(self, error: Exception) -> str:
        """The message of an error about the data, including the input's path."""
        path = self.plan.found.info.path
        return str(error) if path in str(error) else f"{path}: {error}"

    def room(self, n_blocks: int, *, warn: bool = False) -> contextlib.AbstractContextManager[None]:
        """Check the disk for what is still to be written; see `stem_dask.job.budget.enough_room`."""
        shape = None if self.window is None else self.window.shape
        n_kept = 0
        if self.kept is not None:  # once the window is known, nothing more is kept
            n_kept = self.kept_bytes if shape is None else tree_bytes(self.kept.folder)
        need = budget.disk_need(self.config, self.plan.found, n_blocks, shape, n_kept)
        paths = self.outputs.local()
        # an older output keeps its disk space until the new one replaces it
        kept = [path for path in paths if not self.state.is_older(path)]
        names = (self.folder, *map(temporary, paths), *kept)
        return budget.enough_room(Path(self.outputs.path).parent, need, names, warn=warn)

    @property
    def last_stage(self) -> str:
        """Name of the stage that writes the output."""
        if self.config.output.normalize != "none":
            return "normalize"
        return "crop" if self.config.crop.enabled else "convert"

    def is_published(self) -> bool:
        """Whether an interrupted run had already published its output."""
        path, url, stage = self.outputs.path, self.outputs.url, self.last_stage
        if url is None:
            return self.state.published(path, stage, self.n_blocks)
        noted = len(self.state.journal.records(stage)) == self.n_blocks
        # the older output's root document is removed before the first block is written
        return noted and not os.path.lexists(temporary(path)) and bool(at(url, DOCUMENT).is_file())

    def reporter(self, stage: str, input_bytes: int) -> engine.Progress | None:
        """Callback that reports every finished block to ``progress``."""
        progress = self.progress
        if progress is None:
            return None
        work = self.stages()
        # a resumed run may read its sample again at the end
        self.reached = max(self.reached, 1 + [*work].index(stage))
        later = sum([*work.values()][self.reached :]) / work[stage] if work[stage] else None
        place = (self.reached, len(work), later)
        return lambda done, n, record: progress(Step(stage, done, n, input_bytes, record, *place))

    def stages(self) -> dict[str, float]:
        """The stages of the job in their order, and the work of each in bytes of input; 0 for samples."""
        config, found = self.config, self.plan.found
        read, work = found.n_bytes, dict[str, float]()
        window = None if self.window is None else self.window.shape
        what, n_patterns = budget.shapes(config, found, window), math.prod(found.source.shape[:-2])
        written = (
            WRITTEN_BYTE * n_patterns * what.out_bytes * (1 if what.known else budget.USUAL_WINDOW)
        )
        if budget.transposed_bytes(found):
            work["turn"] = read
        if self.plan.precomputed is None:
            if self.surveys or self.samples:
                work["survey"] = 0
                if config.analyze.center_method == "friedel":
                    work["friedel"] = 0
            if config.crop.enabled:
                work["analyze"] = read
        if config.output.patterns:
            if config.output.normalize != "none":
                work["downsample"] = self.again
            work[self.last_stage] = self.again if config.output.normalize == "none" else written
        return work | {export_stage(path): written for path in self.outputs.exports}

    @property
    def survey_options(self) -> dict[str, Any]:
        """The options of the survey."""
        names = {
            "center_method", "threshold", "background", "disc_radius", "ignore_bad_pixels", "guess",
        }  # fmt: skip
        asked: dict[str, Any] = self.config.analyze.model_dump(include=names)
        asked["ignore_bad_pixels"] |= self.config.input.mask in ("auto", "stop")
        return asked

    @property
    def surveys(self) -> bool:
        """Whether an option needs a sample of the patterns."""
        config = self.config
        analyzes = config.crop.enabled or config.analyze.ahead
        calibrates = config.analyze.calibrate == "disc"
        masks = config.input.mask in ("auto", "stop")
        return (analyzes and needs_survey(**self.survey_options)) or calibrates or masks


def export_stage(path: str) -> str:
    """The name of the stage that writes an export."""
    return f"export {Path(path).suffix[1:]}"
