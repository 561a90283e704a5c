"""Who can give a scheduler orders: on loopback this machine, with TLS who has its keys, in plain text everybody."""

import ipaddress
import json
import os
import socket
from pathlib import Path
from typing import Any

from stem_dask.errors import ConfigError

#: what a plain scheduler beyond loopback means, for errors and for the run's text
OPEN = "not encrypted: everybody who can reach it can run code and read the data"

_NOT_PLAIN = ("tls", "wss", "inproc")


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine only; a name that nobody knows does not.

    Examples
    --------
    >>> [is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "192.0.2.1", "::", "")]
    [True, True, True, False, False, False]
    """
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    # an address of IPv6 may name its interface behind a %
    places = (str(place[0]).partition("%")[0] for *_, place in found)
    return all(ipaddress.ip_address(place).is_loopback for place in places)


def is_open(address: str) -> bool:
    """Whether a scheduler at this address takes plain text from other machines.

    Examples
    --------
    >>> [is_open(a) for a in ("tcp://[::1]:8786", "tls://node1:8786", "tcp://192.0.2.1:8786")]
    [False, False, True]
    """
    scheme, _, place = address.rpartition("://")
    if scheme in _NOT_PLAIN or ":" not in address:  # without a port it is none, and Dask says so
        return False
    return not is_loopback(place.rpartition(":")[0].removeprefix("[").removesuffix("]"))


def scheduler_address(address: str | None, scheduler_file: str | None, *, insecure: bool) -> str:
    """The address of a scheduler that is there already, given itself or by the file that it wrote.

    Raises
    ------
    ConfigError
        When the file holds no address, or the scheduler is open to everybody and ``insecure`` is false.
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
    """What a cluster of ours that listens on ``host`` needs: None on loopback, else keys of this run.

    Raises
    ------
    ConfigError
        When this machine has no such address, or the package for the keys is missing.
    """
    from distributed.security import Security

    try:
        family, *_, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(place, family=family).close()  # Dask would not say what is wrong
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cluster.host is {host}: {error}; expected a name or address of this machine"
        ) from error
    if insecure or is_loopback(host):
        return None
    try:
        return Security.temporary()
    except ImportError as error:
        raise ConfigError(
            f"cluster.host is {host}, beyond loopback, where TLS needs the package cryptography, which is missing; "
            "pip install cryptography, or leave cluster.host at null"
        ) from error


def write_keys(folder: str | Path) -> dict[str, str]:
    """Make keys for a scheduler, its workers and its clients, and write them into a folder.

    Who can read the folder can give the scheduler orders; only its owner reads the files.

    Returns
    -------
    dict
        Variables of the environment that have all programs of Dask use the keys, and nothing without them.

    Raises
    ------
    ConfigError
        When the package for the keys is missing.
    """
    from distributed.security import Security

    try:
        own = Security.temporary()
    except ImportError as error:
        raise ConfigError(
            "keys for TLS need the package cryptography, which is missing; pip install -c constraints.txt cryptography"
        ) from error
    place = Path(folder).absolute()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = {"CERT": str(place / "cert.pem"), "KEY": str(place / "key.pem")}
    texts = {"CERT": own.tls_client_cert, "KEY": own.tls_client_key}
    for part, path in paths.items():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(texts[part])
    comm = "DASK_DISTRIBUTED__COMM__"
    found = {f"{comm}REQUIRE_ENCRYPTION": "True", f"{comm}TLS__CA_FILE": paths["CERT"]}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        found |= {f"{comm}TLS__{role}__{part}": path for part, path in paths.items()}
    return found
