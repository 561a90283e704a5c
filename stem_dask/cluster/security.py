"""Who can control a scheduler: holders of its keys with TLS, else every local user, or any user who can reach it."""

import ipaddress
import json
import os
import socket
from pathlib import Path
from typing import Any

from stem_dask.core.errors import ConfigError

#: what a plain scheduler means, beyond loopback and on it, for errors and for the run's text
LOCALLY_OPEN = "not encrypted: every user of this machine can run code as you and read the data"

OPEN = "not encrypted: any user who can reach it can run code and read the data"

_NOT_PLAIN = ("tls", "wss", "inproc")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine only; an unknown name does not."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    # an address of IPv6 may name its interface behind a %
    places = (str(place[0]).partition("%")[0] for *_, place in found)
    return all(ipaddress.ip_address(place).is_loopback for place in places)


def is_open(address: str) -> bool:
    """Whether a scheduler at this address takes plain text from other machines."""
    scheme, _, place = address.rpartition("://")
    if scheme in _NOT_PLAIN or ":" not in address:  # without a port it is none, and Dask says so
        return False
    return not is_loopback(place.rpartition(":")[0].removeprefix("[").removesuffix("]"))


def protection(address: str) -> str:
    """Who can control the scheduler at this address, for the run's text."""
    scheme = address.rpartition("://")[0]
    if scheme == "inproc":
        return "the scheduler runs within this process and listens on no port"
    if scheme in _NOT_PLAIN:
        return "TLS: only processes with the keys of this scheduler can connect"
    return OPEN if is_open(address) else LOCALLY_OPEN


def scheduler_address(address: str | None, scheduler_file: str | None, *, insecure: bool) -> str:
    """The address of a running scheduler, given itself or by the file that it wrote.

    Raises ConfigError when the file holds no address, or the scheduler accepts any user and ``insecure`` is false.
    """
    where = "cluster.address"
    if address is None:
        where = f"cluster.scheduler_file {scheduler_file}"
        try:
            with open(str(scheduler_file), encoding="utf-8") as file:
                address = json.load(file)["address"]
            if not isinstance(address, str):
                raise TypeError(f"its address is {address!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{where} is not usable ({type(error).__name__}: {error}); expected what `dask scheduler --scheduler-file` writes"
            ) from error
    if is_open(address) and not insecure:
        raise ConfigError(
            f"{where}: the scheduler at {address!r} is not on loopback and {OPEN}; start one that has a tls:// address "
            "(distributed.comm.tls in Dask's configuration), or accept it with cluster.insecure=true "
            "(stem-dask run --insecure-cluster)"
        )
    return address


def own_security(host: str, *, insecure: bool) -> Any:
    """New keys for a cluster that listens on ``host``, an address of this machine; None if the user accepts plain text."""
    from distributed.security import Security

    try:
        family, *_, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(place, family=family).close()  # Dask would not say what is wrong
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cluster.host is {host}: {error}; expected a name or address of this machine"
        ) from error
    return None if insecure else Security.temporary()


def write_keys(folder: str | Path) -> dict[str, str]:
    """Write keys for a scheduler, its workers and its clients into a folder that only its owner reads.

    Returns the environment variables that make all programs of Dask use the keys, and refuse connections without them.
    """
    from distributed.security import Security

    own, place = Security.temporary(), Path(folder).absolute()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = {"CERT": str(place / "cert.pem"), "KEY": str(place / "key.pem")}
    for part, text in (("CERT", own.tls_client_cert), ("KEY", own.tls_client_key)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with open(os.open(paths[part], flags, 0o600), "w") as file:
            file.write(text)
    comm = "DASK_DISTRIBUTED__COMM__"
    found = {f"{comm}REQUIRE_ENCRYPTION": "True", f"{comm}TLS__CA_FILE": paths["CERT"]}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        found |= {f"{comm}TLS__{role}__{part}": path for part, path in paths.items()}
    return found
