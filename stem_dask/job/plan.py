"""`prepare`: everything about a job that can be known before dask is imported and a cluster is started, as one `Plan`."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stem_dask.cluster.gpu import chosen_device
from stem_dask.cluster.security import scheduler_address
from stem_dask.config.load import defaults, to_dict
from stem_dask.config.options import SYNTHETIC, Config
from stem_dask.core.errors import ConfigError, OutputExistsError, StemDaskError
from stem_dask.core.metadata import tree_at
from stem_dask.core.text import by, size
from stem_dask.core.window import check_center, check_factor, check_size, check_window
from stem_dask.engine.lock import owned
from stem_dask.engine.state import (
    RunState,
    changed_options,
    open_state,
    refuse_damaged,
    refuse_foreign,
    unfinished_token,
    unfinished_url,
)
from stem_dask.readers.detector_first import detector_first
from stem_dask.readers.open import Found, find, with_given
from stem_dask.readers.source import identity
from stem_dask.stages.correct import KEYS, digest_of, read_plane
from stem_dask.storage.location import at, check_path, is_url, of_output, refuse_url
from stem_dask.storage.publish import (
    DOCUMENT,
    make_folder,
    read_document,
    refuse_existing,
    run_folder,
    stem,
    temporary,
    temporary_names,
)
from stem_dask.storage.zarr_store import zarr_store

#: options of the input that `find` does not take
_AFTER_READING = {"path", "dark", "gain", "mask", "mask_fill", "calibration", "beam_energy_kv"}

#: name of the vacuum scan among the contents
_REFERENCE = "reference"


@dataclass(frozen=True)
class Outputs:
    """The files of a run, in the folder of the first one: a .zarr store, or one file of another format.

    For an object store, ``url`` is the final place and ``path`` the local folder of its metadata and of the other files.
    """

    path: str
    exports: tuple[str, ...]
    results: str
    figure: str | None
    report: str | None
    analysis: str | None
    url: str | None = None

    @classmethod
    def of(cls, config: Config) -> "Outputs":
        """NAME.zarr, and a crop into any format, gives NAME_results.json, NAME_visualization.png, and NAME_report.html."""
        path, url = config.output.path, None
        if is_url(path):
            here = Path(config.output.local_folder or ".", Path(path).name).absolute()
            path, url = str(here), path
        name = os.path.splitext(path)[0] if config.crop.enabled else stem(path)
        if not config.output.patterns:
            page = f"{name.removesuffix('_analysis')}_report.html" if config.output.figure else None
            results = os.path.join(run_folder(path), "results.json")
            return cls(path, (), results, None, page, None, url)
        alone = config.analyze.ahead and analysis_path(path) != path
        return cls(
            path,
            tuple(f"{name}.{kind}" for kind in config.output.export),
            f"{name}_results.json",
            f"{name}_visualization.png" if config.output.figure else None,
            f"{name}_report.html" if config.output.figure else None,
            analysis_path(path) if alone else None,
            url,
        )

    @property
    def store(self) -> str:
        """Final path or URL of the first output."""
        return self.path if self.url is None else self.url

    def missing_exports(self) -> tuple[str, ...]:
        """Exports that are not there."""
        return tuple(path for path in self.exports if not is_there(path))

    def all(self) -> tuple[str, ...]:
        """All outputs, with the URL for an object store."""
        return (self.store, *self.local()[1:])

    def local(self) -> tuple[str, ...]:
        """All local outputs."""
        more = (self.analysis, self.figure, self.report)
        return (
            self.path,
            *self.exports,
            self.results,
            *(name for name in more if name is not None),
        )


@dataclass(frozen=True)
class Precomputed:
    """A store with the analysis of the patterns that a job reads; the crop is the same as with a new analysis."""

    store: str


@dataclass(frozen=True)
class Plan:
    """A checked job, or one that is ``complete`` already; the ``device`` of its config is cpu or gpu."""

    config: Config
    outputs: Outputs
    found: Found
    #: the output exists and carries the same token
    complete: bool
    #: identifies the job: options and inputs that change bytes of the output
    token: str
    #: digests of the mask, dark and gain files, and the state of the vacuum scan
    contents: Mapping[str, str]
    precomputed: Precomputed | None = None
    #: reports the device that ``auto`` chose
    device_note: str = ""
    #: reports which analysis is reused, or why one that was found is not
    analysis_note: str = ""

    @property
    def is_unfinished(self) -> bool:
        """Whether an earlier command left this job unfinished."""
        return unfinished_token(self.outputs.path) == self.token

    def is_current(self) -> bool:
        """Whether the input and the files of the config are still as they were when the plan was made."""
        return self.found.change() is None and self.contents == _digests(self.config)


def prepare(config: Config) -> Plan:
    """Check everything that can be checked before dask is imported or a cluster is started; raises StemDaskError."""
    device, device_note = chosen_device(config.device, config.cluster)
    config = config.model_copy(update={"device": device})
    scheduler = config.cluster
    file = scheduler.scheduler_file
    # a scheduler file that does not exist yet is checked on connection
    if scheduler.address is not None or (file is not None and Path(file).exists()):
        scheduler_address(scheduler.address, file, insecure=scheduler.insecure)
    outputs = Outputs.of(config)
    _check_places(config, outputs)
    found = find_input(config)
    _check_detector(config, found)
    _check_reference(config, found)
    if is_url(found.info.path) and detector_first(found.source) is not None:
        why = "the detector's axes come first in it, so that every pattern is spread over all of it; copy it here first"
        refuse_url("input.path", found.info.path, why)
    source = Path(found.info.path).resolve()
    for path in outputs.all():
        if source == Path(path).resolve() or Path(path).resolve() in source.parents:
            raise ConfigError(
                f"the output {path} would replace the input {source}; choose another output.path"
            )
    contents = _digests(config)
    text = json.dumps([_deciding(to_dict(config), contents), found.identity], sort_keys=True)
    token = hashlib.sha256(text.encode()).hexdigest()[:16]
    complete = _is_complete(config, outputs, token, contents)
    precomputed, note = None, ""
    if not complete:
        local = outputs.local()
        for path in local if outputs.url is None else local[1:]:
            refuse_existing(path, overwrite=True)  # a link, or a folder in place of a file
        refuse_foreign(Path(run_folder(outputs.path)))
        precomputed, note = find_precomputed(config, found, contents)
    return Plan(config, outputs, found, complete, token, contents, precomputed, device_note, note)


def find_input(config: Config) -> Found:
    """Open the input, with calibration and beam energy from the config; ``synthetic`` is first written next to the output."""
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
    given = None if options.calibration is None else options.calibration.model_dump()
    found = with_given(
        find(path, **options.model_dump(exclude=_AFTER_READING)),
        given,
        options.beam_energy_kv,
        options.scan_roi,
        options.scan_step,
    )
    if config.output.signal_type is None:
        return found
    tree = deepcopy(found.info.about.get("metadata", {}))
    tree = tree_at({"Signal.signal_type": config.output.signal_type}, tree)
    about = {**found.info.about, "metadata": tree}
    return replace(found, info=replace(found.info, about=about))


def reference_of(config: Config) -> str | Found | None:
    """The vacuum scan of ``descan.reference``: the store of its analysis, or its patterns, which are read as the input is."""
    path = config.descan.reference
    if path is None:
        return None
    store = analysis_path(path)
    about = analysis_in(store)
    try:
        # an analysis beside a file is of that file as long as the file is the same
        if about is not None and (store == path or about.get("of") == list(identity(path)[1:])):
            return store
        # all of it, whatever part of the input is read: the fit is of the scan as acquired
        other = config.input.model_copy(update={"path": path, "scan_roi": None, "scan_step": 1})
        found = find_input(config.model_copy(update={"input": other}))
    except StemDaskError as error:
        raise type(error)(f"descan.reference: {error}") from error
    if found.info.about.get("k_origin") in ("window_center", "beam"):
        raise ConfigError(
            f"descan.reference is {path}, in which every pattern was cut around its own beam, so that its descan is lost; name the "
            ".zarr of that crop, which also holds the analysis, or the file as acquired"
        )
    return found


def refuse_too_small(plan: Plan, *, queued_only: bool = True) -> None:
    """Raise MemoryBudgetError for planned workers without memory for the job, as far as the config states their memory.

    The projection takes a second to load. With ``queued_only`` it is made now only for SLURM, whose jobs wait in a queue,
    and for workers that cannot even load their code; for others it follows when they have been started.
    """
    from stem_dask.cluster.connect import planned  # loads dask

    config, found = plan.config, plan.found
    worker = planned(config.cluster, found.n_bytes, config.device)
    starts = worker.room is None or (worker.room > 0 and config.cluster.kind != "slurm")
    if queued_only and starts:
        return
    from stem_dask.job.budget import check_memory, fitting_block, with_cuda

    worker = with_cuda(config, worker)
    check_memory(config, found, fitting_block(config, found, worker), worker)


@contextlib.contextmanager
def begun(plan: Plan, *, restart: bool = False) -> Iterator[RunState]:
    """Hold the output's lock and open its journal; see `stem_dask.engine.state.open_state`."""
    outputs = plan.outputs
    make_folder(outputs.path)
    options = _deciding(to_dict(plan.config), plan.contents)
    elsewhere = contextlib.ExitStack()  # the owner file in an object store, for other machines
    checks = list[Callable[[], None]]()

    def is_complete() -> bool:
        if outputs.url is not None:
            checks.append(elsewhere.enter_context(owned(outputs.url, run_folder(outputs.path))))
        try:
            return _is_complete(plan.config, outputs, plan.token, plan.contents)
        except BaseException:
            elsewhere.close()  # removes its file, so that the folder can be removed
            raise

    opened = open_state(
        outputs.local(), plan.token, options, restart=restart, is_complete=is_complete
    )
    try:
        with opened as state, elsewhere:  # released before the local lock
            state.holds += checks
            try:
                yield state
            except BaseException:
                # a run that failed and cannot resume leaves no shards, but a complete output and those of another run
                begun_here = os.path.lexists(temporary(outputs.path)) and not state.is_complete
                if outputs.url is not None and begun_here and not state.goes_on:
                    with contextlib.suppress(StemDaskError):  # the first error is raised
                        state.check_ownership()
                        if not at(outputs.url, DOCUMENT).is_file():
                            at(outputs.url).remove_below()
                raise
    finally:
        elsewhere.close()


def input_lines(plan: Plan, state: RunState) -> list[str]:
    """Lines about the input, and about the finished blocks of a resumed run."""
    source, info = plan.found.source, plan.found.info
    what = f"{' x '.join(map(str, source.shape))} {source.dtype}, {size(plan.found.n_bytes)}"
    lines = [f"input       {info.path} ({what})", *(f"            {note}" for note in info.notes)]
    lines += [plan.analysis_note] * bool(plan.analysis_note)
    n_done = sum(len(records) for records in state.journal.known.values())
    if n_done:
        lines.append(f"resuming    {n_done:,} finished blocks; they are checked again")
    return lines


# --- checks of places, sizes and files --------------------------------------------------------------------------


def _check_places(config: Config, outputs: Outputs) -> None:
    """Refuse combinations of URLs and local paths that are not supported, and names that are too long."""
    for key in KEYS:
        refuse_url(
            f"input.{key}", getattr(config.input, key), "it is read from a file here; copy it"
        )
    source, url = config.input.path, outputs.url
    check_path("output.path", outputs.store)
    check_path("analyze.from", config.analyze.known)
    check_path("input.path", source)
    _check_lengths(outputs)
    if url is None and config.output.local_folder is not None:
        raise ConfigError(
            f"output.local_folder is {config.output.local_folder}, which is for an output.path that is a URL, and it is "
            f"{outputs.path}; leave it out"
        )
    if url is not None and Path(url).suffix != ".zarr":
        raise ConfigError(
            f"output.path is {url}: into an object store only .zarr is written; write the file here, and copy it there"
        )
    nested = f"{source}/".startswith(f"{url}/") or f"{url}".startswith(f"{source}/")
    if url is not None and is_url(source) and nested:
        raise ConfigError(
            f"the output {url} would replace the input {source}; choose another output.path"
        )


def _check_lengths(outputs: Outputs) -> None:
    """Refuse outputs whose name, or that of a temporary file, is too long for the file system."""
    paths = outputs.local()
    made = [name for path in paths for name in temporary_names(path)]
    for path in map(os.path.abspath, (*paths, *made, run_folder(outputs.path))):
        there = next(str(folder) for folder in Path(path).parents if os.path.isdir(folder))
        longest, whole = os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX")
        name = max(Path(path).parts, key=lambda part: len(os.fsencode(part)))
        length, problem = len(os.fsencode(name)), ""
        if 0 < longest < length:
            problem = f"and the run needs the name {name}: it has {length} bytes, and a name may have {longest}"
        # 160 bytes for the longest path below it, such as /patterns/c.0.0.0.0.HEX.partial
        if 0 < whole <= len(os.fsencode(path)) + 160:
            problem = f"a path with what the run makes below it may have {whole:,} bytes"
        if problem:
            raise ConfigError(
                f"output.path is {outputs.store}, {problem}; choose a shorter output.path"
            )


def is_there(path: str) -> bool:
    """Whether a file or folder exists, or any object below a URL."""
    return bool(at(path).exists()) if is_url(path) else os.path.lexists(path)


def _check_detector(config: Config, found: Found) -> None:
    """Refuse a mask, dark, gain, window, center or factor that does not fit the detector."""
    detector, crop = found.source.shape[-2:], config.crop
    for key, path in _files(config).items():
        read_plane(path, key, detector)
    check_factor(config.downsample.factor, detector)
    if crop.enabled and crop.window is not None:
        check_window(crop.window, detector)
    if crop.given is not None:
        multiple = crop.size_multiple * config.downsample.factor
        given = f"crop.size is {to_dict(config)['crop']['size']}"
        if crop.window is not None:
            given = f"crop.window is {list(crop.window)}"
        align, square = crop.align, crop.square
        check_size(crop.given, detector, multiple, align=align, square=square, given=given)
    if config.analyze.center_method == "manual" and config.analyze.manual_center is not None:
        check_center(config.analyze.manual_center, detector)


def _check_reference(config: Config, found: Found) -> None:
    """Refuse a vacuum scan of another shape before the pass over the input."""
    where = reference_of(config)
    if where is None:
        return
    if isinstance(where, Found):
        shape, part = where.source.shape[:-2], where.info.scan_part
    else:
        about = analysis_in(where) or {}
        shape, part = about["shape"][:-2], about["scan_part"]
    here = _acquired(found.source.shape[:-2], found.info.scan_part)
    there = _acquired(shape, part)
    if len(here) != 2 or here != there:
        of = "a list of patterns" if len(here) == 1 else f"a scan of {by(here)} positions"
        raise ConfigError(
            f"descan.reference is {config.descan.reference}, with {by(there)} positions, and the input is {of}; expected a vacuum "
            "scan of the shape and step of the input"
        )


def _acquired(shape: Sequence[int], part: Sequence[Sequence[int]]) -> list[int]:
    """Shape of the scan as acquired, of which ``part`` was read."""
    return [size for size, _, _ in part] if part else list(shape)


def _files(config: Config) -> dict[str, str]:
    """The mask, dark and gain files of a config."""
    given = {key: getattr(config.input, key) for key in KEYS}
    return {
        k: value
        for k, value in given.items()
        if isinstance(value, str) and value not in ("auto", "stop")
    }


def _digests(config: Config) -> dict[str, str]:
    found = {key: digest_of(path, key) for key, path in _files(config).items()}
    where = reference_of(config)
    if where is not None:
        _, n_bytes, changed = where.identity if isinstance(where, Found) else identity(where)
        found[_REFERENCE] = f"{n_bytes} bytes, {changed} ns"
    return found


# --- existing outputs -------------------------------------------------------------------------------------------


def _deciding(options: Mapping[str, Any], contents: Mapping[str, Any]) -> dict[str, Any]:
    """The options that change bytes of the output, with the digests of the files they name."""
    sections = ("input", "analyze", "descan", "crop", "validate", "downsample", "output")
    kept = {name: dict(options[name]) for name in sections}
    path = options["output"]["path"]
    suffix = Path(path).suffix
    for key in ("path", "overwrite", "export", "layout", "figure", "local_folder"):
        if key != "layout" or suffix != ".pt":
            kept["output"].pop(key, None)
    if kept["output"].get("signal_type") is None:  # as in outputs of earlier versions
        kept["output"].pop("signal_type", None)
    del kept["analyze"]["passes"]  # changes no byte of the output
    if is_url(path):
        kept["output"]["url"] = path
    if suffix != ".zarr":
        kept["output"]["format"] = suffix
    for key, state in contents.items():
        section = kept["descan" if key == _REFERENCE else "input"]
        section[key] = [section.get(key), state]
    return {**kept, "device": options["device"]}


def _is_complete(config: Config, outputs: Outputs, token: str, contents: Mapping[str, str]) -> bool:
    """Whether the outputs of this token are complete: the first one states the token, and the others are there, but for exports,
    which are made from the store.

    Raises OutputExistsError if an output of another run exists, without ``output.overwrite``.
    """
    if config.output.overwrite:
        return False
    url = outputs.url
    with of_output():
        if url is not None and unfinished_url(outputs.path) == url:
            # the shards of this job's unfinished run do not count
            there = bool(at(url, DOCUMENT).is_file())
        else:
            there = is_there(outputs.store)
    # unless another job finished an output in an object store after this one was interrupted
    of_another = there and url is not None and _about(outputs).get("token") != token
    if unfinished_token(outputs.path) == token and not of_another:
        return False
    if not there:
        for path in outputs.all():
            if url is not None and os.path.lexists(path):
                raise OutputExistsError(
                    f"{path} exists and belongs to another output of this name; choose another output.local_folder, or "
                    "set output.overwrite=true to replace it"
                )
            refuse_existing(path, overwrite=False)
        return False
    about, folder = _about(outputs), Path(outputs.path).parent
    missing = [Path(path).name for path in outputs.all() if not is_there(path)]
    exports = {Path(path).name for path in outputs.exports}
    if about.get("token") == token and exports.issuperset(missing):
        return True
    refuse_damaged(Path(run_folder(outputs.path)), "--restart --overwrite")
    when = "replace it when the new one is complete"
    if url is not None:
        when = "replace it; it ends as soon as the first shard of the new one is written"
        missing = [f"{name} (in {folder}, see output.local_folder)" for name in missing]
        if not about:
            raise OutputExistsError(
                f"{url} holds objects and is no finished output: they are of something else, or of a run that did "
                "not end and has its folder elsewhere (output.local_folder). Choose another output.path, go on with that "
                "run, or set output.overwrite=true to remove them"
            )
    raise OutputExistsError(
        f"{outputs.store} exists{_difference(about, config, contents, missing)}. Choose another output.path, or set "
        f"output.overwrite=true to {when}"
    )


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


def _difference(
    about: Mapping[str, Any], config: Config, contents: Mapping[str, str], missing: list[str]
) -> str:
    """How an existing output differs, as far as its attributes tell."""
    before, contents_before = about.get("config"), about.get("contents", {})
    if not isinstance(before, dict) or not isinstance(contents_before, dict):
        return ""
    now = to_dict(config)
    old, new = _deciding({**now, **before}, contents_before), _deciding(now, contents)
    if changed := changed_options(old, new):
        return f", made with other options ({', '.join(changed)})"
    if missing:
        return f", but {', '.join(missing)} is missing"
    return ", made from another state of the input"


# --- a precomputed analysis -------------------------------------------------------------------------------------


def analysis_path(path: str | Path) -> str:
    """Path of the analysis that is written with a file: a .zarr store itself, else a store next to the file.

    Examples
    --------
    >>> analysis_path("scan.zarr"), analysis_path("scan.hspy")
    ('scan.zarr', 'scan.hspy_analysis.zarr')
    """
    return str(path) if stem(path) != str(path) else f"{path}_analysis.zarr"


def find_precomputed(
    config: Config, found: Found, contents: Mapping[str, str]
) -> tuple[Precomputed | None, str]:
    """The analysis that ``analyze.from`` names or that lies near the input, None without one, and a line about it.

    Raises ConfigError if the named one was made from other patterns or with other options.
    """
    if not config.crop.enabled:
        return None, ""
    named = config.analyze.known
    if named is None:
        return _found_analysis(config, found, contents)
    store = named if named.rstrip("/").endswith(".zarr") else analysis_path(named)
    about = analysis_in(store)
    if about is None:
        raise ConfigError(
            f"analyze.from is {named}, which holds no analysis of whole patterns; name a finished crop of this input, or the "
            "output of stem-dask convert --analyze, or leave analyze.from out"
        )
    together = _together(found, store, about)
    different = _different(config, found, about, None if together else contents)
    if different:
        raise ConfigError(
            f"analyze.from is {named}, which was made from other patterns or with other options: "
            f"{'; '.join(different)}; change them, or leave analyze.from out"
        )
    return Precomputed(store), f"analysis    reused from {named}"


def _found_analysis(
    config: Config, found: Found, contents: Mapping[str, str]
) -> tuple[Precomputed | None, str]:
    """The analysis that was written with the input, or that ``stem-dask analyze`` left beside it or in the working directory."""
    path, note = found.info.path, ""
    own, name = analysis_path(path), f"{Path(path).stem}_analysis.zarr"
    stores = [own]
    if config.output.patterns and not is_url(path):
        stores += [os.path.join(os.path.dirname(path), name), os.path.abspath(name)]
    for store in dict.fromkeys(stores):
        about = analysis_in(store)
        if about is None:
            continue
        together = _together(found, store, about)
        if store == own and not together:
            continue
        different = _different(config, found, about, None if together else contents)
        shown = os.path.basename(store) if os.path.dirname(store) == os.getcwd() else store
        if not different:
            return Precomputed(store), f"analysis    reused from {shown}"
        if store != own:
            note = f"analysis    not reused from {shown}: {'; '.join(different)}"
    return None, note


def _together(found: Found, store: str, about: Mapping[str, Any]) -> bool:
    """Whether the input was written together with the analysis; a crop writes other patterns than it analyzes."""
    return not about["config"]["crop"]["enabled"] and (
        os.path.realpath(found.info.path) == os.path.realpath(store)
        or about.get("of") == list(found.identity[1:])
    )


def analysis_in(path: str) -> dict[str, Any] | None:
    """Attributes of a store, and the shape of the patterns of its analysis; None without an analysis of whole patterns."""

    def document(*names: str) -> dict[str, Any]:
        return read_document(os.path.join(path, *names)) or {}

    try:
        attrs: dict[str, Any] = dict(document()["attributes"])
        attrs["scan_part"] = document("analysis")["attributes"].get("scan_part")
        arrays = [document("analysis", name) for name in ("center_y", "mean_pattern")]
        attrs["shape"] = [n for array in arrays for n in array["shape"]]
        config = attrs["config"]
        return attrs if config["analyze"]["ahead"] or config["crop"]["enabled"] else None
    except (KeyError, TypeError):
        return None


def _different(
    config: Config, found: Found, about: Mapping[str, Any], contents: Mapping[str, str] | None
) -> list[str]:
    """Differences between a job and the run that made an analysis; ``contents`` are None if it wrote the input, too."""
    options, before = to_dict(config), about["config"]
    decisive = (
        "center_method", "manual_center", "guess", "disc_radius", "ignore_bad_pixels", "radius_metric", "threshold",
        "background",
    )  # fmt: skip
    # the options that stored profiles cannot answer for
    out = [
        f"analyze.{key} was {before['analyze'].get(key)}, and is {options['analyze'][key]}"
        for key in decisive
        if before["analyze"].get(key) != options["analyze"][key]
    ]
    if about["shape"] != list(found.source.shape):
        out.append(f"shape was {about['shape']}, and is {list(found.source.shape)}")
    was = before["input"]
    if contents is None:
        # such an input holds the analyzed patterns, and must be read unchanged; its array may be given by name
        was = {**defaults("input"), "dataset": options["input"]["dataset"]}
    out += [
        f"input.{key} was {was.get(key)}, and is {value}"
        for key, value in options["input"].items()
        if key not in ("path", "calibration", "beam_energy_kv") and was.get(key) != value
    ]
    if contents is None:
        return out
    digests = about.get("contents", {})
    changed = [key for key in contents if key != _REFERENCE and digests.get(key) != contents[key]]
    out += [f"the content of input.{key} has changed" for key in changed]
    if about.get("quarantined"):
        out.append(f"it lacks {about['quarantined']:,} patterns that could not be read")
    made_from = about["input"]
    if (made_from["bytes"], made_from["modified_ns"]) != tuple(found.identity[1:]):
        out.append(f"it was made from another file, or another state of it ({made_from['path']})")
    return out
