"""A whole job: `prepare` its config, connect to a cluster, run all passes."""

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from stem_dask.cluster.connect import Connection, connect, connection_of
from stem_dask.cluster.local import end_if_read_again
from stem_dask.config.load import configs_from, load_config, only, to_dict
from stem_dask.config.options import Config
from stem_dask.core.errors import ConfigError
from stem_dask.core.formats import format_of
from stem_dask.core.machine import load_meanwhile
from stem_dask.core.model import Progress
from stem_dask.engine.clients import connected, refuse_no_client
from stem_dask.engine.state import RunState
from stem_dask.job.plan import Plan, begun, input_lines, prepare, refuse_too_small

if TYPE_CHECKING:
    from distributed import Client

    from stem_dask.job.outcome import Outcome

#: imported while the workers start, which takes as long
PASSES = "stem_dask.job.passes"


def run(
    config: Config | Plan | Mapping[str, Any] | str | PathLike[str],
    overrides: Iterable[str] = (),
    *,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    state: RunState | None = None,
    restart: bool = False,
    connection: "Connection | Client | None" = None,
    common: Sequence[int] | None = None,
    alone: bool = False,
    command: str = "",
) -> "Outcome":
    """Run the whole job of a config.

    Parameters
    ----------
    config : path of a YAML file, one dictionary per section, the result of `stem_dask.load_config`, or that of
        `stem_dask.job.plan.prepare`
    overrides : ``key=value``, for a path or a dictionary
    say : called with each line of text for the user
    progress : called with a `Step` after each block; in a notebook, the default shows a line per stage
    state : lock and journal of the run, if the caller holds them (see `stem_dask.job.plan.begun`)
    restart : drop an unfinished run of this output
    connection : a cluster that several runs share (see `stem_dask.connect`), or a `distributed.Client`; by default the
        cluster of the config is started for this run
    common : size of the window that several datasets share, for ``crop.size: common``
    alone : whether the process ends with this run
    command : the shell command that makes this run, for results.json and advice

    Returns
    -------
    Outcome; its exit code is 0, 4 when too many patterns are below ``validate.min_retention``, or 7 when a part of the
    input could not be read (``on_error: quarantine``)

    Raises
    ------
    StemDaskError
        If the job fails; no output appears under its final name, and older outputs stay.
    """
    end_if_read_again()
    say = say or (lambda text: None)
    if connection is not None and not isinstance(connection, Connection):
        refuse_no_client(connection)
    plan = config if isinstance(config, Plan) else prepare(_config(config, overrides))
    with contextlib.ExitStack() as stack:
        if state is None and not plan.complete:
            state = stack.enter_context(begun(plan, restart=restart))
        is_complete = state is None or state.is_complete
        missing = plan.outputs.missing_exports() if is_complete else ()
        if is_complete and not missing:
            return _already_complete(plan)
        if state is None:
            state = stack.enter_context(begun(plan))
        if progress is None and "IPython" in sys.modules:
            from stem_dask.job.progress import notebook_progress

            progress = notebook_progress()
        started = time.perf_counter()
        for line in input_lines(plan, state):
            say(line)
        if connection is None:
            if not missing:
                refuse_too_small(plan)
            device, outputs = plan.config.device, plan.outputs
            options = plan.config.cluster.model_dump()
            options |= {"input_bytes": plan.found.n_bytes, "device": device, "say": say}
            # what this process imports to write the outputs takes a second to load, too
            forms = (format_of(path) for path in (outputs.path, *outputs.exports))
            libraries = {form.library for form in forms if form is not None and form.library}
            load_meanwhile(PASSES, *libraries)
            connection = stack.enter_context(connect(**options))
            for line in connection.lines(f"{device}{plan.device_note}"):
                say(line)
        elif not isinstance(connection, Connection):
            with connected(connection):
                connection = connection_of(connection, say=say)
        passes = importlib.import_module(PASSES)
        with connected(connection.client):
            if missing:
                passes.export_missing(plan, connection, missing, progress)
                return _already_complete(plan)
            outcome: Outcome = passes.complete(
                plan, state, connection, progress, say=say,
                started=started, common=common, alone=alone, command=command,
            )  # fmt: skip
            return outcome


def _already_complete(plan: Plan) -> "Outcome":
    from stem_dask.job.results import already_complete, stored_results

    found = already_complete(plan.config, plan.outputs)
    known = {"config": to_dict(plan.config), **stored_results(plan.outputs)}
    return found if found.results else replace(found, results=known)


def _config(given: Any, overrides: Iterable[str]) -> Config:
    """The options that a path, a dictionary or a config stands for."""
    if isinstance(given, (str, PathLike)):
        return load_config(given, overrides)
    if isinstance(given, Mapping):
        return only(configs_from(_plain(given), overrides))
    if not isinstance(given, Config):
        raise ConfigError(
            f"the config is a {type(given).__name__}; expected the path of a YAML file, a dictionary, or a Config"
        )
    if [*overrides]:
        raise ConfigError("overrides are for a path or a dictionary; give them to load_config")
    return given


def _plain(value: Any) -> Any:
    """Paths in a dictionary or list as text."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return os.fspath(value) if isinstance(value, PathLike) else value
