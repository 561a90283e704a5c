"""A file, or an object in an S3-compatible store: `at` and `opened_file` take paths of both.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from stem_dask.core.errors import ConfigError, SourceError, StemDaskError, StoreError

T = TypeVar("T")

SCHEME = "s3://"

KEYS = "keys come from the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"

#: larger objects are uploaded in parts of this size
PART_BYTES = 8 * 2**20

#: objects per delete request, and per page of a listing
PAGE = 1000

#: retries of obstore; the engine retries blocks after that
TRIES = 3


def is_url(path: object) -> bool:
    """Whether a path is in an object store.

    Examples
    --------
    >>> is_url("s3://lab/scan.zarr"), is_url("/data/scan.zarr")
    (True, False)
    """
    return isinstance(path, str) and path.startswith(SCHEME)


def split_url(url: str, what: str = "the URL") -> tuple[str, str]:
    """Bucket and key of ``s3://bucket/key``; a ConfigError does not show other URLs, which may contain secrets.

    Examples
    --------
    >>> split_url("s3://lab/raw/scan.zarr/")
    ('lab', 'raw/scan.zarr')
    """
    if re.search(r"://[^/\s]*[@:]", url):
        raise ConfigError(
            f"{what} has something before the name of the bucket; expected s3://bucket/key alone: {KEYS}"
        )
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    key = key.rstrip("/")
    if not is_url(url) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}", bucket):
        raise ConfigError(f"{what} has an unsupported form; expected s3://bucket/key")
    if {"", ".", ".."} & set(key.split("/")):
        raise ConfigError(
            f"{what} names the bucket {bucket} and no object in it; give s3://{bucket}/NAME.zarr"
        )
    return bucket, key


def without_secrets(words: T) -> T:
    """Return strings, also in lists and dictionaries; raise ConfigError for URLs that may contain secrets."""
    if isinstance(words, str):
        # credentials before the host or bucket, or a signature in the query
        if re.search(r"://[^/\s]*@|s3://[^/\s]*:|https?://\S*\?", words):
            split_url(words, "a URL")
    elif isinstance(words, (Mapping, list, tuple)):
        for word in [*words, *words.values()] if isinstance(words, Mapping) else words:
            without_secrets(word)
    return words


def check_path(key: str, path: object) -> None:
    """Raise ConfigError for a path that is an unsupported URL; ``key`` is the name of the option."""
    if isinstance(path, str) and "://" in path:
        split_url(path, key)


def refuse_url(key: str, path: object, way: str) -> None:
    """Raise ConfigError for a URL where a local file is required; ``way`` is the alternative."""
    check_path(key, path)
    if is_url(path):
        raise ConfigError(f"{key} is {path}: {way}")


class Status(NamedTuple):
    """Size, ETag and modification time of an object, named as in `os.stat`."""

    st_size: int
    etag: str
    st_mtime_ns: int


def _status(entry: Any) -> Status:
    """Status from obstore's; times have whole seconds, so the ETag gives the fraction: two versions always differ."""
    etag, seconds = str(entry["e_tag"]), int(entry["last_modified"].timestamp())
    return Status(int(entry["size"]), etag, seconds * 10**9 + zlib.crc32(etag.encode()) % 10**9)


@dataclass(frozen=True)
class Location:
    """An object, or all objects below a URL, with the methods of `pathlib.Path` that both need.

    Examples
    --------
    >>> folder = Location("s3://lab/scan.zarr")
    >>> str(folder / "patterns" / "zarr.json"), folder.name
    ('s3://lab/scan.zarr/patterns/zarr.json', 'scan.zarr')
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: object) -> "Location":
        return Location(f"{self.url}/{name}") if str(name) else self

    @property
    def name(self) -> str:
        """Last component of the URL."""
        return self.url.rpartition("/")[2]

    def ask(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a function of obstore on the object."""
        store, key = opened(self.url)
        import obstore

        with answered(self.url, StoreError if method in ("put", "delete") else SourceError):
            found = getattr(obstore, method)(store, key, *args, **options)
            return bytes(found.bytes()) if method == "get" else found

    def stat(self) -> Status:
        """Status of the object; raises FileNotFoundError if it does not exist."""
        return _status(self.ask("head"))

    def is_file(self) -> bool:
        """Whether the object exists."""
        with contextlib.suppress(FileNotFoundError):
            return bool(self.stat())
        return False

    def is_dir(self) -> bool:
        """Whether objects exist below this URL."""
        return next(self.below(), None) is not None

    def exists(self) -> bool:
        """Whether the object, or an object below this URL, exists."""
        return self.is_dir() or self.is_file()

    def read_bytes(self) -> bytes:
        """Content of the object; raises FileNotFoundError if it does not exist."""
        return bytes(self.ask("get"))

    def below(self) -> Iterator[tuple[str, Status]]:
        """All objects below this URL, in order: name relative to it, and status."""
        start = len(split_url(self.url)[1]) + 1
        pages = iter(self.ask("list", chunk_size=PAGE))
        page: Any = True
        while page:
            with answered(self.url, SourceError):
                page = next(pages, ())
            for entry in page:
                yield str(entry["path"])[start:], _status(entry)

    def write_bytes(self, content: bytes, *, onto: str | None = None) -> str:
        """Write the object atomically and return its ETag; raises StoreError when that fails.

        ``onto`` is the ETag of the object to replace, or "" when there must be none, else FileExistsError is raised.
        """
        mode: Any = "create" if onto == "" else "overwrite" if onto is None else {"e_tag": onto}
        large = {"use_multipart": len(content) > PART_BYTES, "chunk_size": PART_BYTES}
        return str(self.ask("put", content, mode=mode, max_concurrency=4, **large)["e_tag"])

    def unlink(self) -> None:
        """Remove the object, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.ask("delete")

    def remove_below(self) -> None:
        """Remove all objects below this URL."""
        store, key = opened(self.url)
        import obstore

        with of_output():
            names = [f"{key}/{name}" for name, _ in self.below()]
        for start in range(0, len(names), PAGE):
            with answered(self.url, StoreError):
                obstore.delete(store, names[start : start + PAGE])


def at(*names: str | Path) -> Any:
    """Join names to a `pathlib.Path`, or to a `Location` if the first is a URL.

    Examples
    --------
    >>> at("/data/scan.zarr", "patterns"), at("s3://lab/scan.zarr", "patterns")
    (PosixPath('/data/scan.zarr/patterns'), Location(url='s3://lab/scan.zarr/patterns'))
    """
    if not is_url(names[0]):
        return Path(*names)
    return functools.reduce(Location.__truediv__, names[1:], Location(str(names[0]).rstrip("/")))


class ObjectFile(io.RawIOBase):
    """An object as a readable file; its size is determined once.

    `obstore.open_reader` returns its own bytes, which `numpy.lib.format` and others do not take, and its own errors.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.location, self.position = Location(url), 0

    @functools.cached_property
    def size(self) -> int:
        return self.location.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position, and return it."""
        if whence != io.SEEK_SET:
            offset += self.position if whence == io.SEEK_CUR else self.size
        self.position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        """Read up to the size of the buffer."""
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self.size - self.position))
        if n:
            self.fill(self.position, view[:n])
            self.position += n
        return n

    def fill(self, position: int, run: memoryview) -> None:
        """Fill a buffer with the bytes from a position on, in one request; raises SourceError when the object is shorter."""
        end = position + len(run)
        found = memoryview(self.location.ask("get_range", start=position, end=end))
        if len(found) != len(run):
            raise SourceError(
                f"{self.location}: expected bytes {position:,} to {end:,}, received {len(found):,} bytes; the object was "
                "replaced while it was read"
            )
        run[:] = found


def opened_file(path: str, *, buffered: bool = True) -> Any:
    """Open a file, or an object, for reading; ``buffered`` for headers, which are read a few bytes at a time."""
    if not is_url(path):
        return open(path, "rb", buffering=-1 if buffered else 0)
    return io.BufferedReader(ObjectFile(path), 2**16) if buffered else ObjectFile(path)


@contextlib.contextmanager
def of_output() -> Iterator[None]:
    """Raise read errors as `StoreError`, for objects that belong to the output."""
    try:
        yield
    except SourceError as error:
        translated = StoreError(str(error))
        translated.errno = error.errno
        raise translated from error.__cause__


@contextlib.contextmanager
def answered(url: str, kind: type[SourceError] | type[StoreError]) -> Iterator[None]:
    """Translate errors of obstore within this context; only S3's error code is kept of their text.

    Missing and conflicting objects become FileNotFoundError and FileExistsError, others ``kind`` with an errno, from which
    the engine decides whether to retry.
    """
    try:
        yield
    except StemDaskError:
        raise
    except Exception as error:
        reason = _reason(url, kind, error)
        try:
            raise reason from reason.__cause__
        finally:
            reason.__context__ = None  # the error of obstore


#: codes of S3, an error of obstore, and what they mean
_REASONS = (
    ("NoSuchBucket", "", errno.EACCES, "there is no such bucket; check its name, AWS_ENDPOINT_URL and AWS_REGION"),
    ("InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken InvalidToken TokenRefreshRequired AuthFailure", "UnauthenticatedError", errno.EACCES,
     "the store refuses the credentials{}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE"),
    ("PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException redirect", "", errno.EACCES,
     "the bucket is in another region{}; set AWS_REGION"),
    ("AccessDenied", "PermissionDeniedError", errno.EACCES, "access is denied{}; check what these credentials may do there"),
    ("NotImplemented", "NotSupportedError", errno.ENOTSUP, "the store does not know this request{}"),
)  # fmt: skip


def _reason(
    url: str, kind: type[SourceError] | type[StoreError], error: Exception
) -> OSError | MemoryError:
    name, text = type(error).__name__, str(error)
    found = re.search(r"<Code>([A-Za-z]{3,40})</Code>", text)
    code = found[1] if found else ""
    if isinstance(error, MemoryError):
        return MemoryError(f"{url}: not enough memory")
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
        return FileNotFoundError(errno.ENOENT, "there is no such object", url)
    if name in ("AlreadyExistsError", "PreconditionError") or code == "ConditionalRequestConflict":
        return FileExistsError(errno.EEXIST, "another object is there", url)
    status = re.search(r"status code: ([1-5][0-9]{2})\b", text)
    parts = urlsplit(_endpoint(os.environ))
    where = ":".join(str(part) for part in (parts.hostname, parts.port) if part)
    number, words = errno.EIO, "the store answers with an error{}"
    if not code and not status:
        words = f"the store{where and f' at {where}'} does not answer; check AWS_ENDPOINT_URL and the network"
    word = code or ("redirect" if "redirect" in text else "")
    for codes, other, *meaning in _REASONS:
        if word in codes.split() or name == other:
            number, words = meaning  # type: ignore[assignment]
            break
    words = words.replace(
        "{}", f" ({code})" if code else f" (status {status[1]})" if status else ""
    )
    reason = kind(f"{url}: {words}")
    reason.errno, reason.__cause__ = number, OSError(number, words, url)
    return reason


def opened(url: str, *, below: bool = False) -> tuple[Any, str]:
    """obstore's store of a URL's bucket, or with ``below`` of the objects below the URL, and the URL's key.

    Raises ConfigError when obstore is not installed, there are no credentials, or the endpoint URL contains some.
    """
    bucket, key = split_url(url)
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    try:
        return _opened(bucket, key if below else None, settings), key
    except ImportError:
        raise ConfigError(
            f"{url}: object stores need the package obstore, which is not installed here: pip install 'stem_dask[cloud]'"
        ) from None


@functools.lru_cache(maxsize=16)
def _opened(bucket: str, prefix: str | None, settings: tuple[tuple[str, str], ...]) -> Any:
    from obstore.store import S3Store

    given = dict(settings)
    config = _access(given)
    endpoint = config.get("endpoint") or _endpoint(given)
    if "@" in endpoint:
        raise ConfigError(
            f"AWS_ENDPOINT_URL has something before the name of the server; give its address alone: {KEYS}"
        )
    client = {
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(seconds=30),
        "timeout": timedelta(seconds=600),
        "allow_http": endpoint.startswith("http:"),
    }
    tries: Any = {"max_retries": TRIES, "retry_timeout": timedelta(seconds=60)}
    return S3Store(bucket, prefix=prefix, client_options=client, retry_config=tries, **config)


def _endpoint(given: Mapping[str, str]) -> str:
    return given.get("AWS_ENDPOINT_URL_S3") or given.get("AWS_ENDPOINT_URL") or ""


def _access(given: Mapping[str, str]) -> dict[str, Any]:
    """What obstore, which reads the environment only, needs from the files of ``aws configure``."""
    name = given.get("AWS_PROFILE") or "default"
    found = _profile(name, given)
    config: dict[str, Any] = {}
    if "region" in found and not {"AWS_REGION", "AWS_DEFAULT_REGION"} & given.keys():
        config["region"] = found["region"]
    if "endpoint_url" in found and not _endpoint(given):
        config["endpoint"] = found["endpoint_url"]
    is_public = given.get("AWS_SKIP_SIGNATURE", "").lower() in ("true", "1")
    if is_public or given.get("AWS_ACCESS_KEY_ID"):
        return config
    if {"aws_access_key_id", "aws_secret_access_key"} <= found.keys():

        def provider() -> dict[str, Any]:
            keys = _profile(name, given)
            return {
                "access_key_id": keys["aws_access_key_id"],
                "secret_access_key": keys["aws_secret_access_key"],
                "token": keys.get("aws_session_token"),
                # then they are read again, because other programs renew them
                "expires_at": datetime.now(UTC) + timedelta(seconds=300),
            }

        return {**config, "credential_provider": provider}
    if given.get("AWS_PROFILE"):
        raise ConfigError(
            f"AWS_PROFILE is {name}, and {_files(given)[1]} has no keys of that name (roles and single sign-on are not "
            f'followed); run: eval "$(aws configure export-credentials --profile {name} --format env)"'
        )
    # obstore finds these credentials itself
    roles = ("CONTAINER_CREDENTIALS_RELATIVE_URI", "CONTAINER_CREDENTIALS_FULL_URI", "WEB_IDENTITY_TOKEN_FILE")  # fmt: skip
    if any(given.get(f"AWS_{role}") for role in roles) or _in_the_cloud(given):
        return config
    raise ConfigError(
        f"there are no credentials for an object store on {socket.gethostname()}; {KEYS} (workers have an environment of "
        "their own), or AWS_SKIP_SIGNATURE=true for a public bucket"
    )


def _files(given: Mapping[str, str]) -> list[Path]:
    config = given.get("AWS_CONFIG_FILE") or "~/.aws/config"
    keys = given.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    return [Path(config).expanduser(), Path(keys).expanduser()]


def _profile(name: str, given: Mapping[str, str]) -> dict[str, str]:
    """A profile in the files of ``aws configure``."""
    found: dict[str, str] = {}
    for file in _files(given):
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (OSError, ValueError, configparser.Error):
            raise ConfigError(
                f"{file} cannot be read as a file of profiles; mend it, or set AWS_ACCESS_KEY_ID"
            ) from None
        for section in (name, f"profile {name}"):
            found |= dict(parser[section]) if parser.has_section(section) else {}
    return found


def _in_the_cloud(given: Mapping[str, str]) -> bool:
    """Whether the metadata service of a cloud machine answers; where none does, obstore would wait for long."""
    if given.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    parts = urlsplit(given.get("AWS_METADATA_ENDPOINT") or "http://169.254.169.254")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=1).close()
    except OSError:
        return False
    return True
