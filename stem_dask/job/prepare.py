"""Plan a job before anything runs: check its input and outputs, and whether it is complete already."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stem_dask.cluster.gpu import chosen_device
from stem_dask.cluster.security import scheduler_address
from stem_dask.config.load import to_dict
from stem_dask.config.options import SYNTHETIC, Cluster, Config
from stem_dask.core.errors import ConfigError, OutputExistsError, StemDaskError
from stem_dask.core.text import size
from stem_dask.core.window import check_center, check_factor, check_size, check_window
from stem_dask.engine.lock import owned
from stem_dask.engine.state import (
    RunState,
    open_state,
    refuse_damaged,
    refuse_foreign,
    unfinished_token,
    unfinished_url,
)
from stem_dask.job.outputs import Outputs, check_places, is_there, refuse_other_kinds
from stem_dask.job.precomputed import Precomputed, find_precomputed
from stem_dask.readers.detector_first import detector_first
from stem_dask.readers.open import Found, find
from stem_dask.readers.user_calibration import with_given
from stem_dask.readers.views import DETECTOR_SLOWEST
from stem_dask.stages.correct import KEYS, digest_of, read_plane, reference
from stem_dask.storage.location import at, is_url, of_output, refuse_url
from stem_dask.storage.publish import (
    DOCUMENT,
    make_folder,
    read_document,
    refuse_existing,
    run_folder,
    temporary,
)
from stem_dask.storage.zarr_store import zarr_store

#: output options that do not change the bytes of the store
_NOT_DECIDING = ("path", "overwrite", "export", "layout", "figure", "local_folder")

#: formats whose bytes depend on the layout
_LAYOUT_DECIDES = (".pt",)


@dataclass(frozen=True)
class Prepared:
    """A checked job, or one that is ``complete`` already; its ``device`` is cpu or gpu."""

    config: Config
    outputs: Outputs
    found: Found
    complete: bool
    #: identifies the job: options and inputs that change bytes of the output
    token: str
    #: digests of the mask, dark and gain files
    contents: Mapping[str, str]
    precomputed: Precomputed | None = None
    #: reports the device that ``auto`` chose
    device_note: str = ""


def prepare(config: Config, outputs: Outputs | None = None) -> Prepared:
    """Check everything that can be checked before dask is imported or a cluster is started.

    Parameters
    ----------
    config : of the job
    outputs : names of its files, by default from the config

    Raises
    ------
    StemDaskError
        If the device, the scheduler, the input or an existing output rules the job out.
    """
    device, why = chosen_device(config.device, config.cluster)
    config = config.model_copy(update={"device": device})
    check_scheduler(config.cluster)
    outputs = Outputs.of(config) if outputs is None else outputs
    check_places(config, outputs)
    found = described(config, find_input(config))
    check_planes(config, found)
    check_detector(config, found)
    if is_url(found.info.path) and detector_first(found.source) is not None:
        refuse_url("input.path", found.info.path, DETECTOR_SLOWEST)
    source = Path(found.info.path).resolve()
    for path in outputs.all():
        if source == Path(path).resolve() or Path(path).resolve() in source.parents:
            raise ConfigError(
                f"the output {path} would replace the input {source}; choose another output.path"
            )
    files = contents(config)
    mark = token(config, found, files)
    complete = check_outputs(config, outputs, mark, files)
    if not complete:
        refuse_other_kinds(outputs)
        refuse_foreign(Path(run_folder(outputs.path)))
    precomputed = None if complete else find_precomputed(config, found, files)
    return Prepared(config, outputs, found, complete, mark, files, precomputed, why)


def refuse_too_small(prepared: Prepared) -> None:
    """Refuse workers without memory for the job before they are started, as far as the config states their memory.

    Of workers that can at least load their code, only SLURM's are projected now, because its jobs wait in a queue; for
    others the projection, which takes a second to load, follows when they have been started.

    Raises
    ------
    MemoryBudgetError
        When a worker will not have the memory.
    """
    from stem_dask.cluster.connect import planned  # loads dask

    config, found = prepared.config, prepared.found
    worker = planned(config.cluster, found.n_bytes, config.device)
    if worker.room is not None and (worker.room <= 0 or config.cluster.kind == "slurm"):
        refuse_unfit(prepared)


def refuse_unfit(prepared: Prepared) -> None:
    """Refuse planned workers of any kind without memory for the job; raises as `refuse_too_small`."""
    from stem_dask.cluster.connect import planned
    from stem_dask.job.memory_and_disk import check_memory, fitting_block, with_cuda

    config, found = prepared.config, prepared.found
    worker = with_cuda(config, planned(config.cluster, found.n_bytes, config.device))
    check_memory(config, found, fitting_block(config, found, worker), worker)


@contextlib.contextmanager
def begun(prepared: Prepared, *, restart: bool = False) -> Iterator[RunState]:
    """Hold the output's lock and open its journal; see `stem_dask.engine.state.open_state`."""
    config, outputs = prepared.config, prepared.outputs
    make_folder(outputs.path)
    options = _deciding(to_dict(config), prepared.contents)
    # the owner of an output in an object store, which other machines see
    elsewhere, checks = contextlib.ExitStack(), list[Callable[[], None]]()

    def is_complete() -> bool:
        if outputs.url is not None:
            checks.append(elsewhere.enter_context(owned(outputs.url, run_folder(outputs.path))))
        try:
            return check_outputs(config, outputs, prepared.token, prepared.contents)
        except BaseException:
            elsewhere.close()  # removes its file, so that the folder can be removed
            raise

    state_of = open_state(
        outputs.local(), prepared.token, options, restart=restart, is_complete=is_complete
    )
    try:
        with state_of as state, elsewhere:  # released before the local lock
            state.elsewhere += checks
            try:
                yield state
            except BaseException:
                if not state.goes_on and outputs.url is not None:
                    _remove_shards(outputs, state)
                raise
    finally:
        elsewhere.close()


def _remove_shards(outputs: Outputs, state: RunState) -> None:
    """Remove the shards of a run that failed and cannot resume, but no complete output and nothing of another run."""
    begun_here = os.path.lexists(temporary(outputs.path))
    if outputs.url is None or state.is_complete or not begun_here:
        return
    with contextlib.suppress(StemDaskError):  # the first error is raised
        state.check_ownership()
        if not at(outputs.url, DOCUMENT).is_file():
            at(outputs.url).remove_below()


def input_lines(prepared: Prepared, state: RunState) -> list[str]:
    """Lines about the input, and about the finished blocks of a resumed run."""
    found = prepared.found
    shape, dtype = found.source.shape, found.source.dtype
    what = f"{' x '.join(map(str, shape))} {dtype}, {size(found.n_bytes)}"
    lines = [f"input       {found.info.path} ({what})"]
    notes = (*found.info.notes, *([prepared.precomputed.note] if prepared.precomputed else []))
    lines += [f"            {note}" for note in notes]
    n_done = sum(len(records) for records in state.journal.known.values())
    if n_done:
        lines.append(f"resuming    {n_done:,} finished blocks; they are checked again")
    return lines


def find_input(config: Config) -> Found:
    """Open the input; ``synthetic`` is first written next to the output.

    Raises
    ------
    SourceError
        If the input cannot be used.
    """
    options = config.input
    path = options.path
    if not isinstance(path, str):
        raise ConfigError(
            f"input.path names {len(path)} inputs, and this takes one; sd.load_configs makes a job of each"
        )
    if path == SYNTHETIC:
        from stem_dask.writers.synthetic import write_dataset

        path = str(Path(Outputs.of(config).path).absolute().parent / "synthetic.dm4")
        make_folder(path)
        if not Path(path).exists():
            write_dataset(path)
    return find(
        path,
        dataset=options.dataset,
        scan_shape=options.scan_shape,
        scan_order=options.scan_order,
        scan_roi=options.scan_roi,
        scan_step=options.scan_step,
        skip_frames=options.skip_frames,
        drop_columns=options.drop_columns,
        flip=options.flip,
        missing_chunks=options.missing_chunks,
        shape=options.shape,
        dtype=options.dtype,
        offset=options.offset,
        frame_header=options.frame_header,
        frame_footer=options.frame_footer,
    )


def described(config: Config, found: Found) -> Found:
    """The input with calibration and beam energy from the config."""
    options = config.input
    calibration = None if options.calibration is None else options.calibration.model_dump()
    return with_given(
        found, calibration, options.beam_energy_kv, options.scan_roi, options.scan_step
    )


def check_scheduler(options: Cluster) -> None:
    """Refuse a scheduler without TLS; a scheduler file that does not exist yet is checked on connection."""
    file = options.scheduler_file
    if options.address is not None or (file is not None and Path(file).exists()):
        scheduler_address(options.address, file, insecure=options.insecure)


def check_planes(config: Config, found: Found) -> None:
    """Refuse a mask, dark or gain file that does not match the detector; mask values are checked later."""
    detector = found.source.shape[-2:]
    for key, path in _plane_files(config).items():
        (read_plane if key == "mask" else reference)(path, key, detector)


def check_detector(config: Config, found: Found) -> None:
    """Refuse a window, a center or a factor that does not fit the detector, before anything is read.

    Raises
    ------
    ConfigError
        If one of them does not fit.
    """
    detector, crop = found.source.shape[-2:], config.crop
    check_factor(config.downsample.factor, detector)
    if crop.enabled and crop.window is not None:
        check_window(crop.window, detector)
    if crop.given is not None:
        multiple = crop.size_multiple * config.downsample.factor
        whole, given = crop.align == "pattern", f"crop.size is {to_dict(config)['crop']['size']}"
        if crop.window is not None:
            given = f"crop.window is {list(crop.window)}"
        check_size(crop.given, detector, multiple, keeps_whole=whole, given=given)
    if config.analyze.center_method == "manual" and config.analyze.manual_center is not None:
        check_center(config.analyze.manual_center, detector)


def contents(config: Config) -> dict[str, str]:
    """Digests of the mask, dark and gain files of a config."""
    return {key: digest_of(path, key) for key, path in _plane_files(config).items()}


def token(config: Config, found: Found, files: Mapping[str, str]) -> str:
    """Identifies a job: the options that change bytes of the output, the state of the input, the digests of its files."""
    options = _deciding(to_dict(config), files)
    text = json.dumps([options, found.identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_outputs(config: Config, outputs: Outputs, mark: str, files: Mapping[str, str]) -> bool:
    """Whether a run with this token is complete already; raises for any other existing output.

    Raises
    ------
    OutputExistsError
        If an output of another run exists, without ``output.overwrite``.
    """
    if config.output.overwrite:
        return False
    with of_output():
        there = _output_is_there(outputs)
    if unfinished_token(outputs.path) == mark and not (there and _of_others(outputs, mark)):
        return False
    if not there:
        for path in outputs.all():
            if outputs.url is not None and os.path.lexists(path):
                raise OutputExistsError(
                    f"{path} exists and belongs to another output of this name; choose another output.local_folder, or "
                    "set output.overwrite=true to replace it"
                )
            refuse_existing(path, overwrite=False)
        return False
    attrs = _about(outputs)
    missing = [Path(path).name for path in outputs.all() if not is_there(path)]
    if attrs.get("token") == mark and not missing:
        return True
    refuse_damaged(Path(run_folder(outputs.path)), "--restart --overwrite")
    when = "replace it when the new one is complete"
    if outputs.url is not None:
        when = "replace it; it ends as soon as the first shard of the new one is written"
        missing = [f"{name} (in {Path(outputs.path).parent}, see output.local_folder)" for name in missing]  # fmt: skip
        if not attrs:
            raise OutputExistsError(
                f"{outputs.url} holds objects and is no finished output: they are of something else, or of a run that did "
                f"not end and has its folder elsewhere (output.local_folder). Choose another output.path, go on with that "
                "run, or set output.overwrite=true to remove them"
            )
    raise OutputExistsError(
        f"{outputs.store} exists{_difference(attrs, config, files, missing)}. Choose another output.path, or set "
        f"output.overwrite=true to {when}"
    )


def _output_is_there(outputs: Outputs) -> bool:
    """Whether the first output exists; the shards of this job's unfinished run do not count."""
    if outputs.url is None or unfinished_url(outputs.path) != outputs.url:
        return is_there(outputs.store)
    return bool(at(outputs.url, DOCUMENT).is_file())


def _of_others(outputs: Outputs, mark: str) -> bool:
    """Whether an output in an object store was finished by another job after this one was interrupted."""
    return outputs.url is not None and _about(outputs).get("token") != mark


def _about(outputs: Outputs) -> dict[str, Any]:
    """Provenance of an existing output: the attributes of a store, results.json of any other format."""
    if outputs.url is not None:
        with of_output():
            attrs = (read_document(outputs.url) or {}).get("attributes", {})
        return attrs if isinstance(attrs, dict) else {}
    import zarr

    try:
        if Path(outputs.path).is_dir() and outputs.path.endswith(".zarr"):
            return dict(zarr.open_group(zarr_store(outputs.path), mode="r").attrs)
        results = json.loads(Path(outputs.results).read_text())
        status = os.stat(outputs.path)
        if results["of"] == [status.st_size, status.st_mtime_ns]:
            return {name: results[name] for name in ("token", "config", "contents", "quarantined")}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def n_quarantined(outputs: Outputs) -> int:
    """Number of patterns of a finished output that could not be read."""
    found = _about(outputs).get("quarantined", 0)
    number = found.get("n_patterns", 0) if isinstance(found, dict) else found
    return number if isinstance(number, int) else 0


def _plane_files(config: Config) -> dict[str, str]:
    given = {key: getattr(config.input, key) for key in KEYS}
    return {
        key: value for key, value in given.items() if isinstance(value, str) and value != "auto"
    }


def _deciding(options: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """The options that change bytes of the output, with the digests of the files they name."""
    sections = ("input", "analyze", "crop", "validate", "downsample", "output")
    kept = {name: dict(options[name]) for name in sections}
    suffix = Path(options["output"]["path"]).suffix
    for key in _NOT_DECIDING:
        if key != "layout" or suffix not in _LAYOUT_DECIDES:
            kept["output"].pop(key, None)
    if is_url(options["output"]["path"]):
        kept["output"]["url"] = options["output"]["path"]
    if suffix != ".zarr":
        kept["output"]["format"] = suffix
    kept["input"] |= {key: [options["input"].get(key), digest] for key, digest in files.items()}
    return {**kept, "device": options["device"]}


def _difference(
    attrs: Mapping[str, Any], config: Config, files: Mapping[str, str], missing: list[str]
) -> str:
    """How an existing output differs, as far as its attributes tell."""
    before, files_before = attrs.get("config"), attrs.get("contents", {})
    if not isinstance(before, dict) or not isinstance(files_before, dict):
        return ""
    now = to_dict(config)
    old, new = _deciding({**now, **before}, files_before), _deciding(now, files)
    changed = [
        f"{section}.{key}"
        for section, options in new.items()
        if isinstance(options, dict)
        for key in options
        if old[section].get(key) != options[key]
    ]
    changed += ["device"] * (old["device"] != new["device"])
    if changed:
        return f", made with other options ({', '.join(changed)})"
    return (
        f", but {', '.join(missing)} is missing"
        if missing
        else ", made from another state of the input"
    )
