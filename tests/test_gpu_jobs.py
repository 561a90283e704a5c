"""Whole jobs with device: gpu, on a GPU that is played (see fake_cupy.py): outputs, copies, and what is refused."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import dask.array as da
import fake_cupy
import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Nanny

import stem_dask as sd
from benchmarks import gpu
from stem_dask.cli import main as cli
from stem_dask.cluster.connect import connect
from stem_dask.cluster.gpu import chosen_device, refuse_missing
from stem_dask.config.options import Cluster
from stem_dask.core.errors import ConfigError, MemoryBudgetError, NoMemoryError, OutputExistsError
from stem_dask.job.cropper import CroppingConfig, DiffractionCropper
from stem_dask.job.describe import describe_job
from stem_dask.job.plan import prepare
from stem_dask.job.run import run
from stem_dask.kernels.gpu.device import missing_gpu

REAL = missing_gpu()
#: the GPU finds no discs, whose intensity would also be in the result
PLAIN = {"center_method": "centroid", "ignore_bad_pixels": False}

BLOCKS = {"output": {"chunk_mb": 0.02}, "analyze": PLAIN}


@pytest.fixture
def played(monkeypatch, connects):
    """What the GPU counts."""
    monkeypatch.setattr("stem_dask.kernels.gpu.analysis.ANALYSIS_THREADS", 64)
    monkeypatch.setattr("stem_dask.kernels.gpu.crop.CROP_THREADS", 64)
    return fake_cupy.install(monkeypatch)


def contents(folder):
    """The files of a store, but for the attributes that name the job."""
    files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
    return {name: f.read_bytes() for name, f in files.items() if name != "zarr.json"}


def test_a_job_on_the_gpu_writes_the_same_bytes(beam_file, make_config, played):
    """Every pattern goes up once a pass, of the second what its window may need; only results come back."""
    sections = {**BLOCKS, "crop": {"align": "pattern"}, "downsample": {"factor": 2}}
    assert run(make_config(beam_file, "cpu.zarr", **sections)).exit_code == 0
    assert not played
    config = make_config(beam_file, "gpu.zarr", **sections, device="gpu")
    assert run(config).exit_code == 0
    folder = Path(config.output.path).parent
    assert contents(folder / "gpu.zarr") == contents(folder / "cpu.zarr")
    n_blocks, n = 6, 30
    assert {name: played[name] for name in played if "launches" in name} == {
        "launches of analyze": n_blocks, "launches of fold": n_blocks, "launches of crop": n_blocks,
    }  # fmt: skip
    origins = json.loads((folder / "gpu_results.json").read_text())["analysis"]
    height = int(origins["cropped_shape"][0]) + 2  # windows begin in rows that differ by 2
    places = 2 * 4 * n
    assert played["bytes up"] == n * 40 * 36 * 2 + n * height * 36 * 2 + places
    # a block's patterns: what is known of each, their sum, their maximum; and its windows
    assert played["downloads"] == n_blocks * (1 + 2) + n_blocks
    memory = json.loads((folder / "gpu.run" / "report.json").read_text())["memory"]["gpu"]
    assert 0 < memory["measured"] <= memory["projected"]
    with pytest.raises(OutputExistsError, match=r"with other options \(device\)"):
        run(make_config(beam_file, "gpu.zarr", **sections))


@pytest.mark.parametrize(
    ("launched", "sections"),
    [
        ("crop", {"crop": {"enabled": False}, "downsample": {"factor": 2, "method": "stride"}}),
        ("analyze", {"crop": {"enabled": False}, "analyze": {**PLAIN, "ahead": True}}),
        ("analyze", {"analyze": {**PLAIN, "threshold": 11.0, "radius_metric": "circle"}}),
    ],
    ids=["converted", "analyzed ahead", "circles"],
)
def test_other_jobs_too(launched, sections, beam_file, make_config, played):
    """Beside a mask, which the CPU applies before."""
    path = {"path": str(beam_file), "mask": {"pixels": [[18, 16]]}}
    for device in ("cpu", "gpu"):
        options = {**BLOCKS, **sections, "input": path, "device": device}
        run(make_config(beam_file, f"{device}.zarr", **options))
    folder = beam_file.parent
    assert contents(folder / "gpu.zarr") == contents(folder / "cpu.zarr")
    assert played[f"launches of {launched}"] == 6


@pytest.mark.parametrize(
    "how", [{"method": "bin"}, {"method": "gauss", "sigma": 0.8}, {"method": "fft"}]
)
def test_the_functions_on_the_gpu(how, played):
    """Of floats, in blocks of a list; a second downsampling starts from what came back."""
    data = np.random.default_rng(3).normal(1, 2, (7, 20, 24)).astype("f4")
    data[2] = 0
    patterns = xr.DataArray(da.from_array(data, chunks=(3, -1, -1)), dims=("pattern", "ky", "kx"))
    found, made = {}, {}
    for device in ("cpu", "gpu"):
        found[device] = sd.analyze(patterns, target_retention=0.8, device=device, **PLAIN).compute()
        window = sd.choose_window(found["cpu"], size=[12, 16], align="pattern")
        cut = sd.crop(patterns, found["cpu"], window, device=device)
        small = sd.downsample(cut, 2, **how, device=device)
        kept = sd.validate(patterns, cut, found["cpu"]).compute()
        made[device] = cut, small, sd.downsample(small, 2, device=device), kept.retention
    xr.testing.assert_allclose(found["gpu"], found["cpu"], rtol=1.2e-7)
    for mine, theirs in zip(made["gpu"], made["cpu"], strict=True):
        np.testing.assert_allclose(mine.values, theirs.values, rtol=1e-5, atol=1e-5)


def test_a_device_that_is_none():
    patterns = xr.DataArray(np.ones((2, 4, 4)), dims=("pattern", "ky", "kx"))
    analysis = sd.analyze(patterns).compute()
    window = sd.choose_window(analysis, size=2)
    for call in (
        lambda: sd.analyze(patterns, device="cuda"),
        lambda: sd.crop(patterns, analysis, window, device="auto"),
        lambda: sd.downsample(patterns, 2, device="GPU"),
    ):
        with pytest.raises(ConfigError, match="expected cpu or gpu"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["bin", "gauss", "fft"])
def test_a_job_on_a_real_gpu(method, tmp_path, make_config, connects):
    """The CPU's results, in no more memory than was projected."""
    if REAL is not None:
        pytest.skip(f"no GPU: {REAL}")
    data = np.random.default_rng(5).poisson(3, (24, 20, 96, 128)).astype("u2")
    data[:, :, 30:50, 40:70] += 50
    np.save(tmp_path / "scan.npy", data)
    sections = {"output": {"chunk_mb": 6}, "downsample": {"factor": 2, "method": method}}
    for device in ("cpu", "gpu"):
        run(make_config(tmp_path / "scan.npy", f"{device}.zarr", **sections, device=device))
    if method == "bin":
        assert contents(tmp_path / "gpu.zarr") == contents(tmp_path / "cpu.zarr")
    made = {device: sd.open(tmp_path / f"{device}.zarr").values for device in ("cpu", "gpu")}
    np.testing.assert_allclose(made["gpu"], made["cpu"], rtol=1e-5, atol=1e-4)
    memory = json.loads((tmp_path / "gpu.run" / "report.json").read_text())["memory"]["gpu"]
    assert 0 < memory["measured"] <= memory["projected"]


def test_the_cropper_on_the_gpu(played):
    data = torch.zeros((12, 1, 24, 20), dtype=torch.int16)
    for i in range(12):
        data[i, 0, 8 + i // 4 : 13 + i // 4, 7:12] = 5 + i
    options: dict[str, Any] = {"verbose": False, "chunk_size": 5}
    expected, told = DiffractionCropper(CroppingConfig(**options)).process_dataset(data)
    config = CroppingConfig(**options, use_gpu=True)
    found, told_too = DiffractionCropper(config).process_dataset(data)
    assert torch.equal(found, expected)
    assert told_too["validation"] == told["validation"]
    np.testing.assert_equal(told_too["analysis"], told["analysis"])
    assert played["launches of analyze"] == 3


def test_a_detector_too_large_for_the_gpu(beam_file, make_config, played, monkeypatch):
    device = ModuleType("device")
    device.attributes = {"MaxSharedMemoryPerBlockOptin": 1000}  # type: ignore[attr-defined]
    monkeypatch.setattr(sys.modules["cupy.cuda"], "Device", lambda: device)
    with pytest.raises(
        ConfigError, match=r"40 x 36 pixels needs \d+ bytes .* has 1000; set device: cpu"
    ):
        run(make_config(beam_file, device="gpu"))


def test_a_gpu_that_is_missing(no_gpu, beam_file, make_config, capsys, connects):
    """Asked for it is an error before anything is written; auto says what it chose."""
    words = "device is gpu, but no GPU can be used: cupy cannot be loaded"
    with pytest.raises(ConfigError, match=words):
        run(make_config(beam_file, device="gpu"))
    output = beam_file.parent / "cli.zarr"
    job = ["run", "configs/crop.yaml", f"input.path={beam_file}", f"output.path={output}"]
    job += ["output.export=[]", "output.figure=false"]
    assert cli.main([*job, "device=gpu"]) == 2
    assert words in capsys.readouterr().err
    assert not output.exists()
    assert cli.main([*job, "device=auto", "cluster.kind=threads"]) == 0
    assert "device cpu; chosen by auto, because no GPU can be used" in capsys.readouterr().out
    attrs = json.loads((output / "zarr.json").read_text())["attributes"]
    assert attrs["config"]["device"] == "cpu"
    assert cli.main([*job, "device=cpu"]) == 0  # the same job
    assert "already complete" in capsys.readouterr().out


def test_a_gpu_too_small(beam_file, make_config, played, monkeypatch):
    config = make_config(beam_file, **BLOCKS, device="gpu")
    told = describe_job(prepare(config))
    line = next(line for line in told if line.startswith("gpu "))
    assert line.endswith("kB of its memory for the tasks of a worker")
    runtime = sys.modules["cupy.cuda"].runtime
    monkeypatch.setattr(runtime, "memGetInfo", lambda: (9000, 2**30))
    words = r"of 1 worker need \d+ kB on the GPU 0000:00:00.0 of .*, which has 1.07 GB, 9 kB of it free; use"
    with pytest.raises(MemoryBudgetError, match=words):
        run(config)

    def full():
        raise runtime.CUDARuntimeError(2)

    monkeypatch.setattr(runtime, "memGetInfo", full)
    with pytest.raises(MemoryBudgetError, match=r"0000:00:00.0 of .* is full: cudaErrorMemory"):
        run(config)


def test_a_gpu_that_becomes_full(beam_file, make_config, played, monkeypatch):
    """One task finds no room: the others end, it is told, and the same command goes on when there is some."""
    run(make_config(beam_file, "cpu.zarr", **BLOCKS))
    pool, taken = sys.modules["cupy"].get_default_memory_pool(), Counter[str]()
    take = pool.take

    def once_full(array):
        taken["arrays"] += 1
        pool.limit = pool.held if taken["arrays"] == 16 else np.inf
        take(array)

    monkeypatch.setattr(pool, "take", once_full)
    config = make_config(beam_file, "gpu.zarr", **BLOCKS, device="gpu")
    words = (
        r"block \[.*\]: the memory of the GPU 0000:00:00\.0 of .* is full: Out of memory allocating [\d,]+ bytes "
        r"\(.*\); 1,073,741,824 of its 2,147,483,648 bytes are free\. .*; device: cpu does without it; lower "
        r"output\.chunk_mb, or use fewer cluster\.threads_per_worker"
    )
    with pytest.raises(NoMemoryError, match=words) as caught:
        run(config)
    assert (caught.value.exit_code, caught.value.__context__) == (5, None)
    del caught
    journal = beam_file.parent / "gpu.run" / "journal"
    noted = journal.read_bytes().count(b'"job": "analyze"')
    assert played["launches of analyze"] == 5  # of all but that one
    assert run(config).exit_code == 0
    assert played["launches of analyze"] == 5 + 6 - noted
    assert contents(beam_file.parent / "gpu.zarr") == contents(beam_file.parent / "cpu.zarr")
    assert pool.held == 0


def test_a_toolkit_that_is_missing(beam_file, make_config, played, monkeypatch):
    """cupy loads parts of it when they are needed first."""
    down = {"downsample": {"factor": 2, "method": "fft"}}
    with monkeypatch.context() as without:
        without.delattr(sys.modules["cupy.cuda"], "cufft")
        with pytest.raises(ConfigError, match=r"fft needs cuFFT \(cannot import .*\): install the CUDA toolkit"):  # fmt: skip
            run(make_config(beam_file, "fft.zarr", **BLOCKS, **down, device="gpu"))

    def missing(module, name):
        raise RuntimeError("CuPy failed to load libnvrtc.so.13: OSError\nand more")

    monkeypatch.setattr(fake_cupy.RawModule, "get_function", missing)
    words = r"kernels cannot be compiled \(CuPy failed to load libnvrtc.so.13: OSError\): install the CUDA toolkit"
    for sections in ({}, {**down, "crop": {"enabled": False}}):
        with pytest.raises(ConfigError, match=words):
            run(make_config(beam_file, "none.zarr", **BLOCKS, **sections, device="gpu"))


def test_what_says_that_a_gpu_is_full(played, monkeypatch):
    """CUDA by a number, also where not even that much is left that it could be asked."""
    from stem_dask.kernels.gpu.device import translate_full_gpu

    error = sys.modules["cupy.cuda"].runtime.CUDARuntimeError

    def failing(number):
        raise error(number)

    with pytest.raises(MemoryError, match=r"is full: cudaErrorMemoryAllocation: out of memory; 1,0.* free"):  # fmt: skip
        translate_full_gpu(failing)(2)
    with pytest.raises(error, match=r"^\?$"):
        translate_full_gpu(failing)(700)
    monkeypatch.setattr(sys.modules["cupy.cuda"].runtime, "memGetInfo", lambda: failing(2))
    with pytest.raises(MemoryError, match=r"is full: cudaErrorMemoryAllocation: out of memory\. An"):  # fmt: skip
        translate_full_gpu(failing)(2)


def test_the_benchmark_runs(played, capsys):
    words = "--gb 0.00002 --detector 32 --dtypes uint16 --rounds 1 --job-gb 0.00003"
    found = gpu.main(words.split())
    assert [*found] == [
        line[:24].strip() + " " + line[25:33].strip()
        for line in capsys.readouterr().out.splitlines()
    ]
    assert len(found) == 10
    assert all(speed > 0 for speed in found.values())


def test_which_device_is_chosen(played, monkeypatch):
    assert chosen_device("auto", Cluster()) == ("gpu", "; chosen by auto")
    assert chosen_device("gpu", Cluster(kind="gpu")) == ("gpu", "")
    with pytest.raises(ConfigError, match="leaves them idle; set device: gpu"):
        chosen_device("cpu", Cluster(kind="gpu"))
    far = Cluster(address="tls://node1:8786")
    assert chosen_device("auto", far) == ("cpu", "; auto does not look for GPUs of others")
    runtime = sys.modules["cupy.cuda"].runtime
    monkeypatch.setattr(runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(ConfigError, match=r"cluster\.kind is gpu, but .*: the machine has none"):
        chosen_device("auto", Cluster(kind="gpu"))
    assert chosen_device("gpu", far) == ("gpu", "")  # the workers are asked, when there are some
    monkeypatch.setattr(runtime, "getDeviceCount", lambda: 1 / 0)
    with pytest.raises(ConfigError, match=r"the driver finds none \(division by zero\)"):
        chosen_device("gpu", Cluster())


@pytest.mark.parametrize(
    ("has", "told"),
    [
        (0, r"NVIDIA's driver is not installed \(nvidia-smi"),
        (12040, r"NVIDIA's driver is for CUDA 12\.4, and cupy for 13\.2; install a newer driver, or a cupy for CUDA 12: pip"),
        (13000, r"the driver finds none \(no device\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_driver(played, monkeypatch, has, told):
    """CUDA says of no driver at all that it is too old."""
    runtime = sys.modules["cupy.cuda"].runtime

    def none():
        raise RuntimeError("no device")

    monkeypatch.setattr(runtime, "getDeviceCount", none)
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: has, raising=False)
    monkeypatch.setattr(runtime, "runtimeGetVersion", lambda: 13020, raising=False)
    with pytest.raises(ConfigError, match=f"device is gpu, but no GPU can be used: {told}"):
        chosen_device("gpu", Cluster())


def test_stages_in_python_on_a_machine_without_a_gpu(no_gpu, beam_file):
    """What cupy raises would say neither what was asked for nor what to do."""
    patterns = sd.open(beam_file)
    words = r"device is gpu, but no GPU can be used: cupy cannot be loaded .*Or set device: cpu"
    analyzed = sd.analyze(patterns).compute()
    window = sd.choose_window(analyzed)
    for lazy in (
        sd.analyze(patterns, device="gpu"),
        sd.crop(patterns, analyzed, window, device="gpu"),
        sd.downsample(patterns, 2, device="gpu"),
    ):
        with pytest.raises(ConfigError, match=words):
            lazy.compute()


def test_workers_without_a_gpu_are_refused(no_gpu, shared_cluster):
    with pytest.raises(ConfigError, match=r"the worker \S+ can use none: cupy cannot be loaded"):
        refuse_missing(shared_cluster.client)


def test_a_process_for_each_gpu(played, monkeypatch):
    """dask-cuda is told what a cluster of ours is told, and asked for only then."""
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with pytest.raises(ConfigError, match=r"needs dask-cuda .*pip install"), connect("gpu"):
        pass
    told: dict[str, Any] = {}

    def begin(**options):
        told.update(options)
        raise InterruptedError

    cuda = ModuleType("dask_cuda")
    cuda.LocalCUDACluster = begin  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dask_cuda", cuda)
    with pytest.raises(InterruptedError), connect("gpu", memory_limit="3GB"):
        pass
    expected = {"n_workers": 1, "threads_per_worker": 1, "memory_limit": 3 * 10**9, "device_memory_limit": 0}  # fmt: skip
    assert expected.items() <= told.items()
    assert issubclass(told["worker_class"], Nanny)  # of ours, with one thread for each library
    for options, words in (
        ({"threads_per_worker": 2}, "one thread a worker"),
        ({"n_workers": 2}, "n_workers is 2, and there are 1 GPUs"),
    ):
        with pytest.raises(ConfigError, match=words), connect("gpu", **options):
            pass
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ConfigError, match=r"is gpu, but no GPU can be used"), connect("gpu"):
        pass
