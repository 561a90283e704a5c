"""Objects in a store that speaks S3: what is read and written, whose they are, and what is said when it fails."""

import errno
import sys
import time
from pathlib import Path

import frames_made
import numpy as np
import pytest
import zarr
from s3_faults import SECRET, between, error

from stem_dask.cli.main import main
from stem_dask.config.load import config_of, parse_config
from stem_dask.core.errors import ConfigError, LockedError, SourceError, StemDaskError, StoreError
from stem_dask.engine.lock import owned
from stem_dask.job.plan import prepare
from stem_dask.job.warm_up import unreached
from stem_dask.readers.open import find
from stem_dask.storage import location
from stem_dask.storage.location import at, split_url
from stem_dask.writers.synthetic import write_dm4

WHOLE = (slice(None),) * 4


@pytest.fixture
def few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "TRIES", 1)


def upload(folder: Path, url: str) -> None:
    """A store that was written here, as objects."""
    for file in folder.rglob("*"):
        if file.is_file():
            at(f"{url}/{file.relative_to(folder)}").write_bytes(file.read_bytes())


def test_objects_are_written_listed_and_removed(bucket: str) -> None:
    url = f"{bucket}/a.zarr"
    mark = at(f"{url}/c/0").write_bytes(b"abc")
    at(f"{url}/zarr.json").write_bytes(b"{}")
    at(f"{bucket}/a.zarr.owner").write_bytes(b"beside")
    large = bytes(location.PART_BYTES) + b"in two parts"
    at(f"{url}/large").write_bytes(large)
    status = at(f"{url}/c/0").stat()
    assert (status.st_size, status.etag) == (3, mark)
    assert abs(status.st_mtime_ns / 1e9 - time.time()) < 60
    assert [name for name, _ in at(url).below()] == ["c/0", "large", "zarr.json"]
    assert at(f"{url}/large").read_bytes() == large
    place = at(url)
    assert (place.is_dir(), place.is_file(), (place / "c" / "0").is_file()) == (True, False, True)
    at(url).remove_below()
    at(f"{url}/none").unlink()
    assert not place.exists()
    assert at(f"{bucket}/a.zarr.owner").read_bytes() == b"beside"
    with pytest.raises(FileNotFoundError, match=r"there is no such object: 's3://.*c/0'"):
        at(f"{url}/c/0").read_bytes()


def test_writing_on_condition(bucket: str) -> None:
    url = f"{bucket}/a"
    first = at(url).write_bytes(b"1", onto="")
    with pytest.raises(FileExistsError, match="another object is there"):
        at(url).write_bytes(b"2", onto="")
    at(url).write_bytes(b"2", onto=first)
    with pytest.raises(FileExistsError):
        at(url).write_bytes(b"3", onto=first)
    assert at(url).read_bytes() == b"2"


@pytest.mark.parametrize(
    ("url", "match"),
    [
        (f"s3://key:{SECRET}@lab/a.zarr", "something before the name of the bucket"),
        (f"https://lab/a.zarr?X-Amz-Signature={SECRET}", "expected s3://bucket/key"),
        (f"s3://key:{SECRET}/a.zarr", "something before the name of the bucket"),
    ],
)
def test_what_may_be_secret_in_a_url_is_never_shown(url, match, tmp_path, capsys):
    config = tmp_path / "job.yaml"
    config.write_text(f"input: {{path: '{url}'}}\noutput: {{path: out.zarr}}\n")
    plain = tmp_path / "plain.yaml"
    plain.write_text("input: {path: a.npy}\noutput: {path: out.zarr}\n")
    commands: list[list[str]] = [
        ["check", str(config)],
        ["check", str(plain), f"output.path={url}"],
        ["info", url, "b.npy"],
        ["verify", url],
        ["crop", "--input", "a.npy", "--output", url],
    ]
    commands.append(["check", str(plain), f"output.path:{url}"])
    with pytest.raises(ConfigError, match=match):
        parse_config({"input": {"path": [url]}, "output": {"path": "a.zarr"}})
    commands.append(
        ["run", str(plain), "--quiet", f"output.path={url}"]
    )  # which argparse does not take
    for command in commands:
        assert main(command) == 2, command
        said = capsys.readouterr()
        assert match in said.err
        assert SECRET not in said.err + said.out
    for url in ("s3://lab", "s3://lab/../a.zarr", "s3://lab//a.zarr"):
        with pytest.raises(ConfigError, match="names the bucket lab and no object"):
            split_url(url)


@pytest.mark.usefixtures("few_tries")
def test_errors_are_told_in_our_words(s3_server, bucket, monkeypatch):
    with between(s3_server) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        leaks = f"<AWSAccessKeyId>{SECRET}</AWSAccessKeyId><StringToSign>{SECRET}</StringToSign>"
        for code, status, number, words in [
            ("AccessDenied", 403, errno.EACCES, r"access is denied \(AccessDenied\)"),
            ("InvalidAccessKeyId", 403, errno.EACCES, "the store refuses the credentials"),
            ("ExpiredToken", 400, errno.EACCES, "the store refuses the credentials"),
            ("PermanentRedirect", 301, errno.EACCES, "is in another region.*set AWS_REGION"),
            ("NotImplemented", 501, errno.ENOTSUP, "does not know this request"),
            ("SlowDown", 503, errno.EIO, r"answers with an error \(SlowDown\)"),
            ("", 500, errno.EIO, r"answers with an error \(status 500\)"),
        ]:
            body = error(code, leaks)
            server.answer = lambda method, path, said=(status, body): said
            for kind, call in (
                (SourceError, lambda: at(f"{bucket}/a").read_bytes()),
                (StoreError, lambda: at(f"{bucket}/a").write_bytes(b"1")),
                (SourceError, lambda: list(at(f"{bucket}/a").below())),
            ):
                with pytest.raises(kind, match=f"^{bucket}/a: .*{words}") as caught:
                    call()
                assert caught.value.errno == number
                chain = [caught.value, caught.value.__cause__]
                assert SECRET not in "".join(map(str, chain))
                # what the library raised does not go along
                assert caught.value.__cause__.__context__ is None
                assert caught.value.__context__ is None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=r"the store at 127.0.0.1:9 does not answer; check AWS"):
        at(f"{bucket}/a").read_bytes()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    with pytest.raises(SourceError, match="there is no such bucket"):
        at("s3://nowhere/a").read_bytes()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:1")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL has something before") as refused:
        at(f"{bucket}/a").read_bytes()
    assert SECRET not in str(refused.value)


def test_credentials_come_from_a_profile(bucket, tmp_path, monkeypatch):
    url = f"{bucket}/a"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=r"there are no credentials .* on .*; keys come from"):
        at(url).write_bytes(b"1")
    assert "there are no credentials" in unreached([url])[2]
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    at(url).write_bytes(b"public")
    monkeypatch.delenv("AWS_SKIP_SIGNATURE")
    keys, config = tmp_path / "keys", tmp_path / "config"
    keys.write_text(f"[lab]\naws_access_key_id = k\naws_secret_access_key = {SECRET}%\n")
    config.write_text("[profile lab]\nregion = eu-west-1\n[profile sso]\nsso_session = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.delenv("AWS_REGION")
    at(url).write_bytes(b"2")
    assert at(url).read_bytes() == b"2"
    assert unreached([url]) is None
    assert location.opened(url)[0].config["region"] == "eu-west-1"
    monkeypatch.setenv("AWS_PROFILE", "sso")
    with pytest.raises(
        ConfigError, match=r"no keys of that name .*export-credentials --profile sso"
    ):
        at(url).read_bytes()
    keys.write_text("no section")
    with pytest.raises(ConfigError, match="cannot be read as a file of profiles"):
        at(url).read_bytes()


def test_a_missing_library_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    location._opened.cache_clear()
    for name in ("obstore", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=r"the package obstore, .*pip install 'stem_dask\[cloud\]'"
    ):
        at(f"{bucket}/a").stat()


def test_an_output_has_one_owner(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/out.zarr"
    with owned(url, tmp_path / "here.run") as check:
        check()
        with (
            pytest.raises(
                LockedError, match=r"out.zarr is in use by a run on .*process \d+, since"
            ),
            owned(url, tmp_path / "elsewhere.run"),
        ):
            raise AssertionError("two have it")
        # of a run that died here, in this folder, we hold the lock of the file system
        with owned(url, tmp_path / "here.run") as second:
            with pytest.raises(LockedError, match="another run took it over"):
                check()
            second()
        with pytest.raises(LockedError, match=r"out.zarr.owner was removed"):
            check()
        at(f"{url}.owner").write_bytes(b'{"run": "another run"}')
    assert at(f"{url}.owner").read_bytes() == b'{"run": "another run"}'
    at(f"{url}.owner").unlink()  # as the message says
    with owned(url, tmp_path / "elsewhere.run") as check:
        check()
    assert not at(f"{url}.owner").is_file()


@pytest.mark.usefixtures("few_tries")
def test_a_store_without_conditions_is_told(s3_server, bucket, tmp_path, monkeypatch, caplog):
    with between(s3_server) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        server.answer = lambda method, path: (501, error("NotImplemented")) if method == "PUT" else None  # fmt: skip
        with owned(f"{bucket}/out.zarr", tmp_path) as check:
            check()
    assert "runs on two machines are not kept apart" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"zarr_format": 2, "chunks": (2, 3, 8, 8)},
        {"zarr_format": 2, "chunks": (2, 3, 8, 8), "chunk_key_encoding": {"name": "v2", "separator": "/"}},
        {"chunks": (1, 1, 8, 8), "shards": (2, 2, 8, 8)},
    ],
    ids=["v2", "v2 nested", "v3 sharded"],
)  # fmt: skip
def test_stores_of_others_are_read(bucket: str, tmp_path: Path, options: dict) -> None:
    data = np.arange(1, 4 * 6 * 8 * 8 + 1).reshape(4, 6, 8, 8).astype("u2")
    root = zarr.open_group(tmp_path / "in.zarr", mode="w", zarr_format=options.pop("zarr_format", 3))  # fmt: skip
    root.create_array("data", shape=data.shape, dtype=data.dtype, **options)[...] = data
    url = f"{bucket}/in.zarr"
    upload(tmp_path / "in.zarr", url)
    found = find(url)
    assert np.array_equal(found.source[WHOLE], data)
    assert np.array_equal(found.source[(slice(1, 4, 2), slice(2, 5), *WHOLE[2:])], data[1:4:2, 2:5])
    assert find(tmp_path / "in.zarr").info.chunks == found.info.chunks
    names = [name for name, _ in at(f"{url}/data").below() if not name.startswith((".z", "z"))]
    lost, damaged = sorted(names)[-1], sorted(names)[0]
    at(f"{url}/data/{damaged}").write_bytes(b"nothing of use")
    at(f"{url}/data/{lost}").unlink()
    assert any("1 of" in note and lost in note for note in find(url).info.notes)
    with pytest.raises(SourceError, match=f"{url}/data/{lost} is missing; copy it again"):
        found.source[(slice(3, 4), slice(5, 6), *WHOLE[2:])]
    with pytest.raises(SourceError, match=f"{url}/data/{damaged} cannot be decoded"):
        found.source[(slice(1), slice(1), *WHOLE[2:])]
    assert not find(url, missing_chunks="zero").source[(slice(3, 4), slice(5, 6), *WHOLE[2:])].any()


def test_what_an_object_store_does_not_hold_is_refused(bucket: str, tmp_path: Path) -> None:
    for path, kind, match in [
        (
            f"{bucket}/scan.hspy",
            SourceError,
            r"only .zarr, .dm3, .dm4, .npy, .raw, .mib, .blo, .mrc are read; copy the file here first",
        ),
        (f"{bucket}/scan.dm4", SourceError, "there is nothing of this name"),
        (f"{bucket}/none.zarr", SourceError, "there is nothing of this name"),
        (f"{bucket}/*.zarr", ConfigError, "globs are for files here"),
    ]:
        with pytest.raises(kind, match=match) as caught:
            find(config_of(path).input.path)
        assert isinstance(caught.value, StemDaskError)
    at(f"{bucket}/odd.zarr/readme").write_bytes(b"not a store")
    with pytest.raises(SourceError, match=r"odd.zarr: not a readable zarr store"):
        find(f"{bucket}/odd.zarr")


@pytest.mark.usefixtures("few_tries")
def test_files_in_one_piece_are_read_by_ranges(s3_server, bucket, tmp_path, monkeypatch):
    data = np.arange(4 * 6 * 16 * 12).reshape(4, 6, 16, 12).astype("u2")
    np.save(tmp_path / "scan.npy", data)
    (tmp_path / "scan.raw").write_bytes(b"head" + data.tobytes())
    write_dm4(tmp_path / "scan.dm4", data, (4, 6), (16, 12), data.dtype)
    part = (slice(1, 4, 2), slice(2, 5), slice(3, 9), slice(1, 7))
    with between(s3_server) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        for name, options in [
            ("scan.npy", {}),
            ("scan.raw", {"shape": data.shape, "dtype": "u2", "offset": 4}),
            ("scan.dm4", {}),
        ]:
            here, url = tmp_path / name, f"{bucket}/{name}"
            at(url).write_bytes(here.read_bytes())
            found = find(url, **options)
            assert np.array_equal(found.source[WHOLE], data)
            assert np.array_equal(found.source[part], data[part])
            assert found.info.axes == find(here, **options).info.axes
            server.asked.clear()
            rows = found.source[(slice(1, 3), *WHOLE[1:])]
            assert np.array_equal(rows, data[1:3])
            # one look at its size, and one request for all
            assert [method for method, _ in server.asked] == ["HEAD", "GET"]
        server.answer = lambda method, path: (503, error("SlowDown")) if method == "GET" else None
        with pytest.raises(SourceError, match=r"scan.dm4: the store answers with an error"):
            found.source[WHOLE]
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    at(f"{bucket}/scan.dm4").write_bytes((tmp_path / "scan.dm4").read_bytes()[:8000])
    with pytest.raises(SourceError, match=r"scan.dm4: the file ends at byte 8,000"):
        found.source[WHOLE]
    with pytest.raises(SourceError, match=r"scan.dm4: "):
        find(f"{bucket}/scan.dm4")
    at(f"{bucket}/odd.npy").write_bytes((tmp_path / "scan.dm4").read_bytes())
    with pytest.raises(SourceError, match=r"by its content it is a Gatan DM4 file; rename it"):
        find(f"{bucket}/odd.npy")
    np.save(tmp_path / "turned.npy", data.transpose(2, 3, 0, 1).copy())
    at(f"{bucket}/turned.npy").write_bytes((tmp_path / "turned.npy").read_bytes())
    config = config_of(f"{bucket}/turned.npy", ["input.scan_order=detector_first"])
    with pytest.raises(ConfigError, match=r"the detector's axes come first in it.* copy it here"):
        prepare(config)


@pytest.mark.usefixtures("few_tries")
def test_cameras_files_are_read_by_ranges(s3_server, bucket, tmp_path, monkeypatch):
    """As here, with the files beside them; patterns behind headers some at a time, however few of their rows are wanted."""
    array = frames_made.numbers((12, 6, 8))
    frames_made.mib(tmp_path / "scan.mib", array)
    frames_made.hdr(tmp_path / "scan.mib", ScanX=4, ScanY=3)
    frames_made.raw_mib(tmp_path / "raw.mib", array % 4096, 12)
    frames_made.by_turns(tmp_path / "turns.mib", array, "0101")
    frames_made.blo(tmp_path / "scan.blo", array.reshape(3, 4, 6, 8)[..., :6] % 250)
    with open(tmp_path / "scan.blo", "ab") as file:
        file.write(bytes(100))  # no pattern, but as long as two
    frames_made.info(frames_made.mrc(tmp_path / "scan.mrc", array), "scan_info.txt")
    for file in tmp_path.iterdir():
        at(f"{bucket}/{file.name}").write_bytes(file.read_bytes())
    part = (slice(0, 3, 2), slice(1, 4), slice(2, 5), slice(1, 6, 2))
    with between(s3_server) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        for name, options in [
            ("scan.mib", {}),
            ("raw.mib", {"scan_shape": (3, 4)}),
            ("turns.mib", {"dataset": "counter 1", "scan_shape": (2, 3)}),
            ("scan.blo", {}),
            ("scan.mrc", {}),
        ]:
            here, found = find(tmp_path / name, **options), find(f"{bucket}/{name}", **options)
            assert (found.info.axes, found.info.notes) == (here.info.axes, here.info.notes)
            assert found.source.shape == here.source.shape
            assert np.array_equal(found.source[part], here.source[part])
            server.asked.clear()
            assert np.array_equal(found.source[WHOLE], here.source[WHOLE])
            heads = ["HEAD"] * (name == "scan.mrc")  # of a file in one piece the size is looked at
            assert [method for method, _ in server.asked] == [*heads, "GET"]
        frame = array[0].nbytes + 384
        monkeypatch.setattr("stem_dask.readers.flat.REQUEST_BYTES", 5 * frame)
        source, expected = find(f"{bucket}/scan.mib").source, find(tmp_path / "scan.mib").source
        for wanted, n in [(WHOLE, 3), ((slice(None), slice(0, 4, 2), *WHOLE[2:]), 3)]:
            server.asked.clear()
            assert np.array_equal(source[wanted], expected[wanted])
            assert len(server.asked) == n
    cut = (tmp_path / "scan.mib").read_bytes()[: 5 * frame]
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    at(f"{bucket}/scan.mib").write_bytes(cut)
    with pytest.raises(SourceError, match=r"scan.mib: expected bytes .*, received .*; the object was rep|InvalidRange"):  # fmt: skip
        source[WHOLE]
    at(f"{bucket}/scan.mib").write_bytes(cut[:300])
    with pytest.raises(SourceError, match="300 bytes are fewer than the header of a Merlin"):
        find(f"{bucket}/scan.mib")
