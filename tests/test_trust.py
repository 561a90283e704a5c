"""Who can give a scheduler orders."""

import json
import socket

import pytest

from stem_dask.cluster.security import (
    is_loopback,
    is_open,
    own_security,
    protection,
    scheduler_address,
)
from stem_dask.core.errors import ConfigError


@pytest.fixture
def names(monkeypatch):
    """What names resolve to, without a network."""
    known = {
        "localhost": ["127.0.0.1", "::1"],
        "here": ["127.0.1.1"],
        "node1": ["192.0.2.1"],
        "both": ["127.0.0.1", "192.0.2.1"],
        "link": ["fe80::1%eth0"],
    }
    real = socket.getaddrinfo

    def look(host, *rest, **options):
        if host in known:
            return [(0, 0, 0, "", (address, 0)) for address in known[host]]
        return real(host, *rest, flags=socket.AI_NUMERICHOST)

    monkeypatch.setattr(socket, "getaddrinfo", look)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.255.0.9", "::1", "localhost", "here"])
def test_this_machine_only(names, host):
    assert is_loopback(host)
    place = f"[{host}]" if ":" in host else host
    assert not is_open(f"tcp://{place}:8786")


@pytest.mark.parametrize(
    "host",
    ["192.0.2.1", "0.0.0.0", "::", "fd00::2", "node1", "both", "link", "unknown", "", "a\0b"],
)
def test_other_machines_too(names, host):
    """A name that nobody knows now may be known when it is connected to."""
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "address",
    ["tls://node1:8786", "wss://node1:8786", "inproc://192.0.2.1/1/1", "localhost:8786", "ws://localhost:8786", "no address at all"],
)  # fmt: skip
def test_closed_schedulers(names, address):
    assert not is_open(address)
    assert scheduler_address(address, None, insecure=False) == address


@pytest.mark.parametrize(
    "address",
    # for Dask node1:8786 is tcp
    ["tcp://node1:8786", "tcp://[fd00::2]:8786", "ws://node1:8786", "ws://node1", "ucx://node1:8786", "node1:8786",
     "tcp://:8786", "ws://localhost:1@node1:8786", "ws://node1/localhost:8786"],
)  # fmt: skip
def test_open_schedulers(names, address):
    assert is_open(address)
    with pytest.raises(ConfigError) as caught:
        scheduler_address(address, None, insecure=False)
    for words in (address, "not encrypted", "run code", "tls://", "cluster.insecure=true"):
        assert words in str(caught.value)
    assert scheduler_address(address, None, insecure=True) == address


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("tls://127.0.0.1:8786", "TLS: only processes with the keys"),
        ("tls://node1:8786", "TLS: only processes with the keys"),
        ("tcp://127.0.0.1:8786", "not encrypted: every user of this machine can run code as you"),
        ("tcp://node1:8786", "not encrypted: any user who can reach it"),
        ("inproc://192.0.2.1/1/1", "listens on no port"),
    ],
)
def test_the_protection_in_words(names, address, words):
    assert words in protection(address)


def test_the_address_in_a_schedulers_file(tmp_path):
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": "tcp://192.0.2.1:8786"}))
    with pytest.raises(
        ConfigError, match=r"scheduler_file .*scheduler\.json: the scheduler at 'tcp"
    ):
        scheduler_address(None, str(file), insecure=False)
    assert scheduler_address(None, str(file), insecure=True) == "tcp://192.0.2.1:8786"


@pytest.mark.parametrize("text", ["", "{}", "[1]", "tcp://node1:8786", '{"address": 3}', "\udcff"])
def test_a_file_of_something_else(tmp_path, text):
    file = tmp_path / "scheduler.json"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(
        ConfigError, match=r"scheduler\.json is not usable .*expected what `dask sch"
    ):
        scheduler_address(None, str(file), insecure=True)


@pytest.mark.parametrize("host", ["192.0.2.77", "no.such.name.invalid", "127.0.0.1:80"])
def test_a_host_that_is_not_this_machine(host):
    with pytest.raises(
        ConfigError, match=f"cluster.host is {host}: .*; expected a name or address"
    ):
        own_security(host, insecure=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_keys_are_new_each_time(host):
    assert own_security(host, insecure=True) is None
    first, second = (own_security(host, insecure=False) for _ in range(2))
    assert first.require_encryption
    assert first.tls_scheduler_key != second.tls_scheduler_key
