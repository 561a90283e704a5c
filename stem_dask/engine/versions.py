"""Whether the other end of a connection has the versions that this one has: what differs fails late and in odd ways."""

import functools
import importlib
import platform
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from stem_dask.core.errors import ConfigError

#: what has to agree, and in how many parts of its version; None: in all
COMPARED = {"python": 2, "dask": None, "distributed": None, "numpy": 2, "stem_dask": None}


def refuse_other_versions(client: Any) -> None:
    """Compare scheduler and workers of a `distributed.Client` with this process.

    Raises
    ------
    ConfigError
        When one of them differs in a version that matters.
    """
    found = differences(client.get_versions(packages=["stem_dask"]))
    if found:
        raise ConfigError(
            f"the scheduler at {client.scheduler.address} has other versions: {'; '.join(found)}; "
            "install the same ones there (pip install -c constraints.txt), or start this command with theirs"
        )


@functools.cache
def own_versions() -> tuple[str, ...]:
    """What has to agree, of this process, in the order of `COMPARED`."""
    found = {
        name: importlib.import_module(name).__version__ for name in COMPARED if name != "python"
    }
    found["python"] = platform.python_version()
    return tuple(_part(found[name], parts) for name, parts in COMPARED.items())


def refuse_task_of_others(versions: Sequence[str]) -> None:
    """On a worker, before a task is begun: workers may join when those that there were have been compared.

    Parameters
    ----------
    versions : `own_versions` of who submitted the task

    Raises
    ------
    ConfigError
        When those of this process differ.

    Examples
    --------
    >>> refuse_task_of_others(own_versions())
    """
    if tuple(versions) == own_versions():
        return
    pairs = zip(COMPARED, own_versions(), versions, strict=False)
    found = [f"{name} {here}, the run has {there}" for name, here, there in pairs if here != there]
    raise ConfigError(
        f"a worker on {socket.gethostname()} that joined has {'; '.join(found) or 'other versions'}; stop it, and the same "
        "command goes on; or install the same ones there (pip install -c constraints.txt)"
    )


def differences(versions: Mapping[str, Any]) -> list[str]:
    """What `distributed.Client.get_versions` tells, as one text for each version that differs.

    Examples
    --------
    >>> of = lambda dask: {"packages": {"python": "3.11.2.final.0", "dask": dask}}
    >>> differences({"client": of("2026.7.1"), "scheduler": of("2026.7.1"), "workers": {"tcp://a:1": of("2026.1.0")}})
    ['worker tcp://a:1 has dask 2026.1.0, here is 2026.7.1']
    """
    here = versions["client"]["packages"]
    places = {"the scheduler": versions["scheduler"]}
    places |= {f"worker {address}": told for address, told in versions["workers"].items()}
    found: dict[str, list[str]] = {}
    for place, told in places.items():
        there = (told or {}).get("packages", {})
        for package, parts in COMPARED.items():
            mine, theirs = (_part(seen.get(package), parts) for seen in (here, there))
            if mine != theirs:
                found.setdefault(f"{package} {theirs}, here is {mine}", []).append(place)
    return [f"{_named(where)} has {what}" for what, where in found.items()]


def _named(places: list[str]) -> str:
    """The first of them and how many more there are: a cluster may have hundreds of workers.

    Examples
    --------
    >>> _named(["worker tcp://a:1"] * 40)
    'worker tcp://a:1 (and 39 more)'
    """
    return places[0] + (f" (and {len(places) - 1} more)" if len(places) > 1 else "")


def _part(version: str | None, parts: int | None) -> str:
    return "missing" if version is None else ".".join(version.split(".")[:parts])
