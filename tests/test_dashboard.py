"""The dashboard is there for who opens it, and costs nobody else anything."""

import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urljoin

import pytest

from stem_dask.cluster.connect import connect


def opened(link: str) -> tuple[int, str, str]:
    """(status, address after redirections, text) of a page."""
    try:
        with urllib.request.urlopen(link, timeout=60) as page:
            return page.status, page.url, page.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.url or "", ""


@pytest.mark.parametrize("kind", ["threads", "local"])
def test_the_first_who_opens_a_page_gets_it(kind):
    """Also when several do at the same time, and whatever they ask for: JupyterLab asks for the list of plots first."""
    with connect(kind, n_workers=1, threads_per_worker=1, memory_limit="1GB") as connection:
        link = connection.dashboard
        asked = [urljoin(link, name) for name in ("/individual-plots.json", "/", "/status")]
        with ThreadPoolExecutor(3) as pool:
            plots, root, status = pool.map(opened, asked)
        assert root[:2] == status[:2] == (200, link)
        assert "<title>Dask Diagnostic UI</title>" in status[2]
        assert plots[0] == 200
        assert '"Individual Task Stream": "/individual-task-stream"' in plots[2]
        assert opened(urljoin(link, "/health"))[::2] == (200, "ok")
        assert opened(urljoin(link, "/no-such-page"))[0] == 404
        assert connection.client.submit(int, "7").result() == 7


def test_bokeh_is_loaded_by_the_first_request_only():
    code = """
import sys, urllib.request
from stem_dask.cluster.connect import connect
with connect("threads", memory_limit="1GB") as connection:
    print("bokeh" in sys.modules)
    urllib.request.urlopen(connection.dashboard, timeout=60).close()
    print("bokeh" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
