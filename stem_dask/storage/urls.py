"""URLs of object stores: s3://bucket/key; all others are refused."""

import re
from collections.abc import Mapping
from typing import TypeVar

from stem_dask.core.errors import ConfigError

T = TypeVar("T")

SCHEME = "s3://"

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")

#: credentials before the host or bucket, or a signature in the query, which must not be shown
_SECRET = re.compile(r"://[^/\s]*@|s3://[^/\s]*:|https?://\S*\?")

_BEFORE = re.compile(r"://[^/\s]*[@:]")

KEYS = "keys come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


def is_url(path: object) -> bool:
    """Whether a path is in an object store.

    Examples
    --------
    >>> is_url("s3://lab/scan.zarr"), is_url("/data/scan.zarr")
    (True, False)
    """
    return isinstance(path, str) and path.startswith(SCHEME)


def split_url(url: str, what: str = "the URL") -> tuple[str, str]:
    """Bucket and key of a URL.

    Parameters
    ----------
    url : ``s3://bucket/key``
    what : name of the option, for errors, which do not show the URL because it may contain secrets

    Raises
    ------
    ConfigError
        When it has another form.

    Examples
    --------
    >>> split_url("s3://lab/raw/scan.zarr/")
    ('lab', 'raw/scan.zarr')
    """
    if _BEFORE.search(url):
        raise ConfigError(
            f"{what} has something before the name of the bucket; expected s3://bucket/key alone: {KEYS}"
        )
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    key = key.rstrip("/")
    if not is_url(url) or not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"{what} has an unsupported form; expected s3://bucket/key")
    if {"", ".", ".."} & set(key.split("/")):
        raise ConfigError(
            f"{what} names the bucket {bucket} and no object in it; give s3://{bucket}/NAME.zarr"
        )
    return bucket, key


def without_secrets(words: T) -> T:
    """Return strings, also in lists and dictionaries, unchanged; refuse URLs that may contain secrets.

    Raises
    ------
    ConfigError

    Examples
    --------
    >>> without_secrets(["input.path=s3://lab/scan.zarr"])
    ['input.path=s3://lab/scan.zarr']
    """
    if isinstance(words, str):
        if _SECRET.search(words):
            split_url(words, "a URL")
    elif isinstance(words, Mapping):
        without_secrets([*words, *words.values()])
    elif isinstance(words, (list, tuple)):
        for word in words:
            without_secrets(word)
    return words


def check_path(key: str, path: object) -> None:
    """Refuse a path that is an unsupported URL; ``key`` is the name of the option.

    Raises
    ------
    ConfigError

    Examples
    --------
    >>> check_path("input.path", "/data/scan.dm4")
    >>> check_path("input.path", "https://lab/scan.dm4?signature=1")
    Traceback (most recent call last):
    stem_dask.core.errors.ConfigError: input.path has an unsupported form; expected s3://bucket/key
    """
    if isinstance(path, str) and "://" in path:
        split_url(path, key)


def refuse_url(key: str, path: object, way: str) -> None:
    """Refuse a URL where a local file is required; ``way`` is the alternative.

    Raises
    ------
    ConfigError

    Examples
    --------
    >>> refuse_url("path", "s3://lab/scan.pt", "export writes local files")
    Traceback (most recent call last):
    stem_dask.core.errors.ConfigError: path is s3://lab/scan.pt: export writes local files
    """
    check_path(key, path)
    if is_url(path):
        raise ConfigError(f"{key} is {path}: {way}")
