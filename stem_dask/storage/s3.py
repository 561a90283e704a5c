"""Objects in S3-compatible stores, through obstore, whose errors are translated here.

The text of obstore's errors never reaches a message, because it contains addresses, key names and server responses.
"""

import configparser
import contextlib
import errno
import functools
import io
import os
import re
import socket
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from stem_dask.core.errors import ConfigError, SourceError, StemDaskError, StoreError
from stem_dask.storage.urls import KEYS, is_url, split_url

T = TypeVar("T")

Kind = type[SourceError] | type[StoreError]

#: larger objects are uploaded in parts of this size, this many at once
PART_BYTES, PARTS_AT_ONCE = 8 * 2**20, 4

#: objects per delete request, and per page of a listing
PAGE = 1000

_CODE = re.compile(r"<Code>([A-Za-z]{3,40})</Code>")

_STATUS = re.compile(r"status code: ([1-5][0-9]{2})\b")

_REFUSED = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthFailure",
}  # fmt: skip

_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}  # fmt: skip


@dataclass(frozen=True)
class Status:
    """Size, ETag and modification time of an object, named as in `os.stat`."""

    st_size: int
    etag: str
    st_mtime_ns: int


@dataclass(frozen=True)
class ObjectPath:
    """A URL with the methods of `pathlib.Path` that readers of zarr stores use.

    Examples
    --------
    >>> folder = ObjectPath("s3://lab/scan.zarr")
    >>> str(folder / "patterns" / "zarr.json"), folder.name
    ('s3://lab/scan.zarr/patterns/zarr.json', 'scan.zarr')
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: object) -> "ObjectPath":
        return ObjectPath(f"{self.url}/{name}") if str(name) else self

    @property
    def name(self) -> str:
        """Last component of the URL."""
        return self.url.rpartition("/")[2]

    def stat(self) -> Status:
        """Status of the object; raises FileNotFoundError if it does not exist."""
        return look(self.url)

    def is_file(self) -> bool:
        """Whether the object exists."""
        try:
            look(self.url)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether objects exist below this URL."""
        return next(below(self.url), None) is not None

    def exists(self) -> bool:
        """Whether the object, or an object below this URL, exists."""
        return self.is_dir() or self.is_file()

    def read_bytes(self) -> bytes:
        """Content of the object; raises FileNotFoundError if it does not exist."""
        return read(self.url)


def at(*names: str | Path) -> Any:
    """Join names to a `pathlib.Path`, or to an `ObjectPath` if the first is a URL.

    Examples
    --------
    >>> at("/data/scan.zarr", "patterns"), at("s3://lab/scan.zarr", "patterns")
    (PosixPath('/data/scan.zarr/patterns'), ObjectPath(url='s3://lab/scan.zarr/patterns'))
    """
    if not is_url(names[0]):
        return Path(*names)
    place = ObjectPath(str(names[0]).rstrip("/"))
    for name in names[1:]:
        place = place / name
    return place


@contextlib.contextmanager
def of_output() -> Iterator[None]:
    """Raise read errors as `StoreError`, for objects that belong to the output."""
    try:
        yield
    except SourceError as error:
        translated = StoreError(str(error))
        translated.errno = error.errno
        raise translated from error.__cause__


def look(url: str) -> Status:
    """Status of an object; raises FileNotFoundError if it does not exist."""
    return _status(_request(SourceError, url, "head"))


def read(url: str) -> bytes:
    """Read an object; raises FileNotFoundError if it does not exist."""
    found = _request(SourceError, url, "get")
    return _translated(SourceError, url, lambda: bytes(found.bytes()))


def below(url: str) -> Iterator[tuple[str, Status]]:
    """Iterate over all objects below a URL, in order: name relative to the URL, and status."""
    start = len(split_url(url)[1]) + 1
    pages = iter(_request(SourceError, url, "list", chunk_size=PAGE))
    while page := _translated(SourceError, url, lambda: next(pages, None)):
        for entry in page:
            yield str(entry["path"])[start:], _status(entry)


def put(url: str, content: bytes, *, onto: str | None = None) -> str:
    """Write an object atomically and return its ETag.

    Parameters
    ----------
    onto : ETag of the object to replace; "" requires that none exists; None replaces any

    Raises
    ------
    FileExistsError
        When another object exists than ``onto`` states.
    StoreError
        When the object cannot be written.
    """
    found = _request(
        StoreError,
        url,
        "put",
        content,
        mode="create" if onto == "" else "overwrite" if onto is None else {"e_tag": onto},
        use_multipart=len(content) > PART_BYTES,
        chunk_size=PART_BYTES,
        max_concurrency=PARTS_AT_ONCE,
    )
    return str(found["e_tag"])


def remove(url: str) -> None:
    """Remove an object, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        _request(StoreError, url, "delete")


def remove_below(url: str) -> None:
    """Remove all objects below a URL."""
    store, key = located(url)
    import obstore

    with of_output():
        names = [f"{key}/{name}" for name, _ in below(url)]
    for start in range(0, len(names), PAGE):
        page = names[start : start + PAGE]
        _translated(StoreError, url, lambda page=page: obstore.delete(store, page))  # type: ignore[misc]


def located(url: str) -> tuple[Any, str]:
    """The opened bucket and the key of a URL.

    Raises
    ------
    ConfigError
        When the URL is invalid, obstore is not installed, or there are no credentials.
    """
    bucket, key = split_url(url)
    try:
        return opened(bucket), key
    except ImportError:
        raise ConfigError(
            f"{url}: object stores need the package obstore, which is not installed here: pip install 'stem_dask[cloud]'"
        ) from None


def _request(kind: Kind, url: str, method: str, *args: Any, **options: Any) -> Any:
    """Call a function of obstore on an object, with errors translated."""
    store, key = located(url)
    import obstore

    return _translated(kind, url, lambda: getattr(obstore, method)(store, key, *args, **options))


def _translated(kind: Kind, url: str, call: Callable[[], T]) -> T:
    """Result of a call of obstore; see `explained` for its errors."""
    try:
        return call()
    except Exception as error:
        reason = explained(kind, url, error)
    raise reason from reason.__cause__  # outside the except block, so that obstore's error is not its context


async def asked_later(url: str, answer: Awaitable[T]) -> T:
    """Await a call of obstore that reads input; see `explained` for its errors."""
    try:
        return await answer
    except StemDaskError:
        raise
    except Exception as error:
        reason = explained(SourceError, url, error)
    raise reason from reason.__cause__


def explained(kind: Kind, url: str, error: Exception) -> OSError | MemoryError:
    """Translate an error of obstore; only S3's error code is kept of its text.

    Missing and conflicting objects become FileNotFoundError and FileExistsError, others ``kind`` with an errno, from which
    the engine decides whether to retry.
    """
    if isinstance(error, MemoryError):
        return MemoryError(f"{url}: not enough memory")
    name, text = type(error).__name__, str(error)
    found = _CODE.search(text)
    code = found[1] if found else ""
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
        return FileNotFoundError(errno.ENOENT, "there is no such object", url)
    if name in ("AlreadyExistsError", "PreconditionError") or code == "ConditionalRequestConflict":
        return FileExistsError(errno.EEXIST, "another object is there", url)
    number, words = _words(name, code, text)
    translated = kind(f"{url}: {words}")
    translated.errno = number
    translated.__cause__ = OSError(number, words, url)
    return translated


def _words(name: str, code: str, text: str) -> tuple[int, str]:
    """errno and message for an error of obstore."""
    named = f" ({code})" if code else ""
    if code == "NoSuchBucket":
        return errno.EACCES, "there is no such bucket; check its name, AWS_ENDPOINT_URL and AWS_REGION"  # fmt: skip
    if code in _REFUSED or name == "UnauthenticatedError":
        return errno.EACCES, f"the store refuses the credentials{named}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE"  # fmt: skip
    if code in _ELSEWHERE or "redirect" in text:
        return errno.EACCES, f"the bucket is in another region{named}; set AWS_REGION"
    if name == "PermissionDeniedError" or code == "AccessDenied":
        return errno.EACCES, f"access is denied{named}; check what these credentials may do there"
    if name == "NotSupportedError" or code == "NotImplemented":
        return errno.ENOTSUP, f"the store does not know this request{named}"
    if code == "SlowDown" or code:
        return errno.EIO, f"the store answers with an error{named}"
    if status := _STATUS.search(text):
        return errno.EIO, f"the store answers with an error (status {status[1]})"
    return errno.EIO, f"{_endpoint()} does not answer; check AWS_ENDPOINT_URL and the network"


def _endpoint() -> str:
    """Host and port of the server, without credentials that the URL may contain."""
    text = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    parts = urlsplit(text)
    if not parts.hostname:
        return "the store"
    return f"the store at {parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _status(entry: Any) -> Status:
    """Status from obstore's; times have whole seconds, so the ETag gives the fraction: two versions always differ."""
    etag = str(entry["e_tag"])
    seconds = int(entry["last_modified"].timestamp())
    return Status(int(entry["size"]), etag, seconds * 10**9 + zlib.crc32(etag.encode()) % 10**9)


#: retries of obstore; the engine retries blocks after that
TRIES, TRIES_SECONDS = 3, 60

CONNECT_SECONDS, SILENT_SECONDS, REQUEST_SECONDS = 5, 30, 600

#: seconds after which the keys of a profile are read again, because other programs renew them
PROFILE_SECONDS = 300

#: environment variables from which obstore finds credentials itself
_ROLES = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_WEB_IDENTITY_TOKEN_FILE",
)  # fmt: skip

_MACHINE = "http://169.254.169.254"  # metadata service of cloud machines


def opened(bucket: str) -> Any:
    """obstore's store for a bucket, cached while the environment does not change.

    Raises
    ------
    ConfigError
        When there are no credentials, or the endpoint URL contains some.
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
    """Endpoint and region of the profile, and its credential provider unless the environment has credentials."""
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
    """A profile in the files of ``aws configure``; calling it reads the keys again, as obstore's credential provider."""

    def __init__(self, name: str, given: Mapping[str, str]) -> None:
        home, self.name, self.given = Path("~/.aws"), name, given
        self.files = [
            Path(given.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials").expanduser(),
            Path(given.get("AWS_CONFIG_FILE") or home / "config").expanduser(),
        ]

    def __call__(self) -> dict[str, Any]:
        found = self._read()
        return {
            "access_key_id": found["aws_access_key_id"],
            "secret_access_key": found["aws_secret_access_key"],
            "token": found.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + timedelta(seconds=PROFILE_SECONDS),
        }

    def has_keys(self) -> bool:
        """Whether the profile has static keys."""
        return {"aws_access_key_id", "aws_secret_access_key"} <= self._read().keys()

    def places(self) -> dict[str, str | None]:
        """Region and endpoint, unless environment variables set them."""
        found = self._read()
        variables = {
            "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
            "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        }
        keys = {"region": "region", "endpoint": "endpoint_url"}
        return {
            name: found.get(keys[name])
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
    """Whether a metadata service answers; where none does, obstore would wait for long."""
    if given.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    parts = urlsplit(given.get("AWS_METADATA_ENDPOINT") or _MACHINE)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=1).close()
    except OSError:
        return False
    return True


#: bytes per request when headers are read
HEADER_BYTES = 2**16


class ObjectFile(io.RawIOBase):
    """An object as a readable file; its size is determined once."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.place = url, 0

    @functools.cached_property
    def size(self) -> int:
        """Bytes."""
        return look(self.url).st_size

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Current position."""
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = start + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        """Read up to the size of the buffer."""
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self.size - self.place))
        if n:
            self.fill(self.place, view[:n])
            self.place += n
        return n

    def fill(self, position: int, run: memoryview) -> None:
        """Fill a buffer with the bytes from a position on, in one request.

        Raises
        ------
        SourceError
            When the object is shorter, or cannot be read.
        """
        end = position + len(run)
        found = _request(SourceError, self.url, "get_range", start=position, end=end)
        if len(found) != len(run):
            raise SourceError(
                f"{self.url}: expected bytes {position:,} to {end:,}, received {len(found):,} bytes; the object was "
                "replaced while it was read"
            )
        run[:] = memoryview(found)


def opened_file(path: str, *, buffered: bool = True) -> Any:
    """Open a file, or an object, for reading.

    Parameters
    ----------
    buffered : for headers, which are read a few bytes at a time
    """
    if not is_url(path):
        return open(path, "rb", buffering=-1 if buffered else 0)
    file = ObjectFile(path)
    return io.BufferedReader(file, HEADER_BYTES) if buffered else file
