"""How a bucket is reached: server, region and credentials from the environment or a profile, never from a config.

What is secret goes from here into the library and nowhere else: nothing of it is in a message, a task or a file.
"""

import configparser
import functools
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stem_dask.errors import ConfigError
from stem_dask.urls import KEYS

#: what the library does by itself before it gives up; the engine tries again after that
TRIES, TRIES_SECONDS = 3, 60
CONNECT_SECONDS, SILENT_SECONDS, REQUEST_SECONDS = 5, 30, 600
#: the key of a profile is read again after so many seconds: others renew it
PROFILE_SECONDS = 300
#: variables that have the library find credentials by itself
_ROLES = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_WEB_IDENTITY_TOKEN_FILE",
)  # fmt: skip
_MACHINE = "http://169.254.169.254"  # where a machine in the cloud asks who it is


def opened(bucket: str) -> Any:
    """A bucket as the library knows it, one for each process as long as the environment stays.

    Raises
    ------
    ConfigError
        When there are no credentials, or the address of the server holds some.
    """
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    return _opened(bucket, settings)


@functools.lru_cache(maxsize=16)
def _opened(bucket: str, settings: tuple[tuple[str, str], ...]) -> Any:
    from obstore.store import S3Store

    given = dict(settings)
    config, provider = _access(given)
    endpoint = config.get("endpoint") or given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL") or ""  # fmt: skip
    if "@" in endpoint:
        raise ConfigError(
            f"AWS_ENDPOINT_URL has something before the name of the server; give its address alone: {KEYS}"
        )
    client = {
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=SILENT_SECONDS),
        "timeout": timedelta(seconds=REQUEST_SECONDS),
        "allow_http": urlsplit(endpoint).scheme == "http",
    }
    tries = {"max_retries": TRIES, "retry_timeout": timedelta(seconds=TRIES_SECONDS)}
    options: dict[str, Any] = {"client_options": client, "retry_config": tries, **config}
    if provider is not None:
        options["credential_provider"] = provider
    return S3Store(bucket, **options)


def _access(given: Mapping[str, str]) -> tuple[dict[str, str], Any]:
    """What a profile says of server and region, and what gives its keys; nothing where the environment says all."""
    name = given.get("AWS_PROFILE")
    profile = Profile(name or "default", given)
    config = {key: value for key, value in profile.places().items() if value}
    signed = given.get("AWS_SKIP_SIGNATURE", "").lower() not in ("true", "1")
    if not signed or given.get("AWS_ACCESS_KEY_ID"):
        return config, None
    if profile.has_keys():
        return config, profile
    if name:
        raise ConfigError(
            f"AWS_PROFILE is {name}, and {profile.files[0]} has no keys of that name (roles and single sign-on are not "
            f'followed); run: eval "$(aws configure export-credentials --profile {name} --format env)"'
        )
    if any(given.get(variable) for variable in _ROLES) or _in_the_cloud(given):
        return config, None
    raise ConfigError(
        f"there are no credentials for an object store on {socket.gethostname()}; {KEYS} (workers have an environment "
        "of their own), or AWS_SKIP_SIGNATURE=true for a public bucket"
    )


class Profile:
    """A section of the files that ``aws configure`` writes; called, it gives the keys, read anew."""

    def __init__(self, name: str, given: Mapping[str, str]) -> None:
        home, self.name, self.given = Path("~/.aws"), name, given
        self.files = [
            Path(given.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials").expanduser(),
            Path(given.get("AWS_CONFIG_FILE") or home / "config").expanduser(),
        ]

    def __call__(self) -> dict[str, Any]:
        said = self._read()
        return {
            "access_key_id": said["aws_access_key_id"],
            "secret_access_key": said["aws_secret_access_key"],
            "token": said.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + timedelta(seconds=PROFILE_SECONDS),
        }

    def has_keys(self) -> bool:
        """Whether there are keys that can be used as they are."""
        return {"aws_access_key_id", "aws_secret_access_key"} <= self._read().keys()

    def places(self) -> dict[str, str | None]:
        """Region and server, where the environment does not say them."""
        said = self._read()
        variables = {
            "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
            "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        }
        keys = {"region": "region", "endpoint": "endpoint_url"}
        return {
            name: said.get(keys[name])
            for name, names in variables.items()
            if not any(self.given.get(variable) for variable in names)
        }

    def _read(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for file in reversed(self.files):
            parser = configparser.RawConfigParser()
            try:
                parser.read(file, encoding="utf-8")
            except (OSError, ValueError, configparser.Error):
                raise ConfigError(
                    f"{file} cannot be read as a file of profiles; mend it, or set AWS_ACCESS_KEY_ID"
                ) from None
            for section in (self.name, f"profile {self.name}"):
                if parser.has_section(section):
                    found |= dict(parser[section])
        return found


def _in_the_cloud(given: Mapping[str, str]) -> bool:
    """Whether a machine's own credentials can be asked for; elsewhere the library would wait for long."""
    if given.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    parts = urlsplit(given.get("AWS_METADATA_ENDPOINT") or _MACHINE)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=1).close()
    except OSError:
        return False
    return True
