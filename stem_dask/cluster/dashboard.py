"""Dask's dashboard, loaded when somebody opens it: Bokeh takes longer to load than a small job takes as a whole."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from stem_dask.cluster.local import LOOPBACK
from stem_dask.core.machine import load

#: of a `distributed.Scheduler` whose dashboard comes later; its HTTP server listens all the same
LATER = {"dashboard": False}

USUAL_PORT = 8787

PAGES = "distributed.dashboard.scheduler"


def usual_port() -> int:
    """The port of dashboards when it is free, so that a tunnel can be set up beforehand; else 0, which stands for any."""
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, USUAL_PORT))
        except OSError:
            return 0
    return USUAL_PORT


def load_when_opened(scheduler: Any) -> None:
    """Have the first request to the scheduler's HTTP server load the pages, and all requests wait until they are there.

    Parameters
    ----------
    scheduler : `distributed.Scheduler` of this process, begun with `LATER`
    """
    from tornado.web import RequestHandler

    application, loading = scheduler.http_application, asyncio.Lock()

    async def loaded() -> None:
        # beside the scheduler's own work, which goes on
        await asyncio.get_running_loop().run_in_executor(None, load, PAGES)
        async with loading:
            if "find_handler" in vars(application):
                from distributed.dashboard.scheduler import connect

                connect(application, scheduler.http_server, scheduler)
                del application.find_handler

    class First(RequestHandler):
        async def prepare(self) -> None:
            await loaded()
            self.redirect(self.request.uri or "/", status=307)  # the same request once more

    application.find_handler = lambda request, **_: application.get_handler_delegate(request, First)
