"""A whole job: its config, its cluster, and all passes."""

import importlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stem_dask.cluster.connect import Connection, connect, connection_of
from stem_dask.cluster.local import end_if_read_again
from stem_dask.config.options import Config
from stem_dask.core.machine import load_meanwhile
from stem_dask.core.model import Progress
from stem_dask.engine.clients import connected, refuse_no_client
from stem_dask.engine.state import RunState
from stem_dask.job.prepare import Prepared, begun, input_lines, prepare, refuse_too_small

if TYPE_CHECKING:
    from distributed import Client

    from stem_dask.job.results import Outcome


#: imported while the workers start, which takes as long
PASSES = "stem_dask.job.passes"


def run(
    config: Config | Prepared,
    *,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    state: RunState | None = None,
    connection: "Connection | Client | None" = None,
    common: Sequence[int] | None = None,
    alone: bool = False,
) -> "Outcome":
    """Run the whole job of a config.

    Parameters
    ----------
    config : validated options with absolute paths, or the result of `stem_dask.job.prepare.prepare`
    say : called with each line of text for the user
    progress : called with a `Step` after each block
    state : lock and journal of the run, if the caller holds them (see `stem_dask.job.prepare.begun`)
    connection : a cluster that several runs share (see `stem_dask.connect`), or a `distributed.Client`; by default the
        cluster of the config is started for this run
    common : size of the window that several datasets share, for ``crop.size: common``
    alone : whether the process ends with this run

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
    prepared = config if isinstance(config, Prepared) else prepare(config)
    options: dict[str, Any] = {"progress": progress, "common": common, "alone": alone}
    if not prepared.complete and state is None:
        with begun(prepared) as state:
            return run(prepared, say=say, state=state, connection=connection, **options)
    if state is None or state.is_complete:
        from stem_dask.job.results import already_complete

        return already_complete(prepared.config, prepared.outputs)
    options["started"] = time.perf_counter()
    for line in input_lines(prepared, state):
        say(line)
    if connection is not None:
        if not isinstance(connection, Connection):
            with connected(connection):
                connection = connection_of(connection, say=say)
        with connected(connection.client):
            return importlib.import_module(PASSES).complete(prepared, state, connection, **options)
    refuse_too_small(prepared)
    device = prepared.config.device
    cluster = prepared.config.cluster.model_dump()
    cluster |= {"input_bytes": prepared.found.n_bytes, "device": device}
    load_meanwhile(PASSES, *prepared.outputs.libraries())
    with connect(**cluster, say=say) as connection:
        for line in connection.lines(f"{device}{prepared.device_note}"):
            say(line)
        with connected(connection.client):
            return importlib.import_module(PASSES).complete(prepared, state, connection, **options)
