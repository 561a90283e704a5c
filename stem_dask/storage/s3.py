"""Objects in a store that speaks S3: the only module that knows the protocol's library (obstore), and what its errors mean.

Nothing that the library says reaches a message as it is: its texts hold addresses, keys' names and answers of the server.
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

#: an object of more bytes is sent in parts of so many, of which so many are under way at once
PART_BYTES, PARTS_AT_ONCE = 8 * 2**20, 4

#: objects that one request removes or a page of a listing holds
PAGE = 1000

_CODE = re.compile(r"<Code>([A-Za-z]{3,40})</Code>")

_STATUS = re.compile(r"status code: ([1-5][0-9]{2})\b")

_REFUSED = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthFailure",
}  # fmt: skip

_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}  # fmt: skip


@dataclass(frozen=True)
class Status:
    """What a store says of an object: bytes, its mark (ETag), and when it was written, with the names of `os.stat`."""

    st_size: int
    etag: str
    st_mtime_ns: int


@dataclass(frozen=True)
class ObjectPath:
    """A place in an object store, with what those who read a zarr store ask of a `pathlib.Path`.

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
        """The last part."""
        return self.url.rpartition("/")[2]

    def stat(self) -> Status:
        """Of the object; FileNotFoundError when there is none."""
        return look(self.url)

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        try:
            look(self.url)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there are objects below this name."""
        return next(below(self.url), None) is not None

    def exists(self) -> bool:
        """Whether there is anything."""
        return self.is_dir() or self.is_file()

    def read_bytes(self) -> bytes:
        """The whole object; FileNotFoundError when there is none."""
        return read(self.url)


def at(*names: str | Path) -> Any:
    """The place that joined names tell: a `pathlib.Path`, or its twin in an object store.

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
    """What cannot be read within is told as an error of the output, not of the input.

    Raises
    ------
    StoreError

    Examples
    --------
    >>> with of_output():
    ...     raise SourceError("s3://lab/scan.zarr: access is denied")
    Traceback (most recent call last):
    stem_dask.core.errors.StoreError: s3://lab/scan.zarr: access is denied
    """
    try:
        yield
    except SourceError as error:
        ours = StoreError(str(error))
        ours.errno = error.errno
        raise ours from error.__cause__


def look(url: str) -> Status:
    """What the store says of an object; FileNotFoundError when there is none."""
    store, key = located(url)
    import obstore

    said = asked(SourceError, url, lambda: obstore.head(store, key))
    return _status(said)


def read(url: str) -> bytes:
    """A whole object; FileNotFoundError when there is none."""
    store, key = located(url)
    import obstore

    return asked(SourceError, url, lambda: bytes(obstore.get(store, key).bytes()))


def below(url: str) -> Iterator[tuple[str, Status]]:
    """Names, from the URL on, and states of all objects below it, in the order of their names."""
    store, key = located(url)
    import obstore

    pages = iter(asked(SourceError, url, lambda: obstore.list(store, key, chunk_size=PAGE)))
    while page := asked(SourceError, url, lambda: next(pages, None)):
        for said in page:
            yield str(said["path"])[len(key) + 1 :], _status(said)


def put(url: str, content: bytes, *, onto: str | None = None) -> str:
    """Write an object, all of it or nothing; returns its mark (ETag).

    Parameters
    ----------
    onto : the mark of the object that it replaces; "" when there must be none. Default: whatever is there.

    Raises
    ------
    FileExistsError
        When something else is there than ``onto`` says.
    StoreError
        When it cannot be written.
    """
    store, key = located(url)
    import obstore

    mode: Any = "create" if onto == "" else "overwrite" if onto is None else {"e_tag": onto}
    large = len(content) > PART_BYTES
    said = asked(
        StoreError,
        url,
        lambda: obstore.put(
            store,
            key,
            content,
            mode=mode,
            use_multipart=large,
            chunk_size=PART_BYTES,
            max_concurrency=PARTS_AT_ONCE,
        ),
    )
    return str(said["e_tag"])


def remove(url: str) -> None:
    """Remove an object; a missing one is fine."""
    store, key = located(url)
    import obstore

    try:
        asked(StoreError, url, lambda: obstore.delete(store, key))
    except FileNotFoundError:
        return


def remove_below(url: str) -> None:
    """Remove all objects below a URL."""
    store, key = located(url)
    import obstore

    with of_output():
        names = [f"{key}/{name}" for name, _ in below(url)]
    for start in range(0, len(names), PAGE):
        page = names[start : start + PAGE]
        asked(StoreError, url, lambda page=page: obstore.delete(store, page))  # type: ignore[misc]


def located(url: str) -> tuple[Any, str]:
    """The bucket, opened, and the key in it.

    Raises
    ------
    ConfigError
        When the text is no such URL, the library is missing, or there are no credentials.
    """
    bucket, key = split_url(url)
    try:
        return opened(bucket), key
    except ImportError:
        raise ConfigError(
            f"{url}: object stores need the package obstore, which is not installed here: pip install 'stem_dask[cloud]'"
        ) from None


def asked(kind: type[SourceError] | type[StoreError], url: str, call: Callable[[], T]) -> T:
    """What a call of the library returns; what it raises is told in our words.

    Raises
    ------
    FileNotFoundError, FileExistsError
        When the object is not there, or not as it was expected.
    SourceError, StoreError
        As ``kind`` says; with the number of a system's error, by which the engine tells whether to try again.
    """
    try:
        return call()
    except Exception as error:
        reason = explained(kind, url, error)
    raise reason from reason.__cause__  # not within the except, where the library's error would go along


async def asked_later(url: str, answer: Awaitable[T]) -> T:
    """The same of an answer that is waited for; errors are of the input."""
    try:
        return await answer
    except StemDaskError:
        raise
    except Exception as error:
        reason = explained(SourceError, url, error)
    raise reason from reason.__cause__


def explained(
    kind: type[SourceError] | type[StoreError], url: str, error: Exception
) -> OSError | MemoryError:
    """An error of ours for one of the library, without any of its words but a code of S3's own list."""
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
    ours = kind(f"{url}: {words}")
    ours.errno = number
    ours.__cause__ = OSError(number, words, url)
    return ours


def _words(name: str, code: str, text: str) -> tuple[int, str]:
    """Number of a system's error, and what to say."""
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
    """The server, as far as it can be told: without what may stand before its name."""
    text = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    parts = urlsplit(text)
    if not parts.hostname:
        return "the store"
    return f"the store at {parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _status(said: Any) -> Status:
    """As the library tells it; a time of whole seconds gets the mark for its fraction, so that two states differ."""
    etag = str(said["e_tag"])
    seconds = int(said["last_modified"].timestamp())
    return Status(int(said["size"]), etag, seconds * 10**9 + zlib.crc32(etag.encode()) % 10**9)


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


#: bytes that are asked for when a header is read
HEADER_BYTES = 2**16


class ObjectFile(io.RawIOBase):
    """An object as a file that is open for reading; its size is that of when it was first asked for."""

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
        """Where the next byte is."""
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go elsewhere."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = start + offset
        return self.place

    def readinto(self, buffer: Any) -> int:
        """The next bytes, as many as there are and the buffer takes."""
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self.size - self.place))
        if n:
            self.fill(self.place, view[:n])
            self.place += n
        return n

    def fill(self, position: int, run: memoryview) -> None:
        """The bytes from a position on into all of a buffer, in one request.

        Raises
        ------
        SourceError
            When the object has not got them, or cannot be read.
        """
        store, key = located(self.url)
        import obstore

        end = position + len(run)
        found: Any = asked(
            SourceError, self.url, lambda: obstore.get_range(store, key, start=position, end=end)
        )
        if len(found) != len(run):
            raise SourceError(
                f"{self.url}: bytes {position:,} to {end:,} were asked for, and {len(found):,} came; it was replaced "
                "while it was read"
            )
        run[:] = memoryview(found)


def opened_file(path: str, *, buffered: bool = True) -> Any:
    """A file, or an object, open for reading.

    Parameters
    ----------
    buffered : for headers, which are read in a few bytes at a time
    """
    if not is_url(path):
        return open(path, "rb", buffering=-1 if buffered else 0)
    file = ObjectFile(path)
    return io.BufferedReader(file, HEADER_BYTES) if buffered else file
