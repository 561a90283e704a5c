"""A whole job: `prepare` its config, connect to a cluster, run all passes."""

import contextlib
import importlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stem_dask.cluster.connect import Connection, connect, connection_of
from stem_dask.cluster.local import end_if_read_again
from stem_dask.config.options import Config
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
    config: Config | Plan,
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
    config : validated options with absolute paths, or the result of `stem_dask.job.plan.prepare`
    say : called with each line of text for the user
    progress : called with a `Step` after each block
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
    plan = config if isinstance(config, Plan) else prepare(config)
    with contextlib.ExitStack() as stack:
        if state is None and not plan.complete:
            state = stack.enter_context(begun(plan, restart=restart))
        if state is None or state.is_complete:
            from stem_dask.job.results import already_complete

            return already_complete(plan.config, plan.outputs)
        started = time.perf_counter()
        for line in input_lines(plan, state):
            say(line)
        if connection is None:
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
        with connected(connection.client):
            outcome: Outcome = importlib.import_module(PASSES).complete(
                plan, state, connection, progress,
                started=started, common=common, alone=alone, command=command,
            )  # fmt: skip
            return outcome
