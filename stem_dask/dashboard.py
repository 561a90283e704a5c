"""Dask's dashboard, loaded when somebody opens it: Bokeh takes longer to load than a small job takes as a whole."""

from __future__ import annotations

import asyncio
from typing import Any

from stem_dask.loading import load

#: of a `distributed.Scheduler` whose dashboard comes later; its HTTP server listens all the same
LATER = {"dashboard": False}
PAGES = "distributed.dashboard.scheduler"


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
