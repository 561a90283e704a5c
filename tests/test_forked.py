"""Patterns in forked processes, such as the workers of PyTorch's `DataLoader`, after the parent has read some."""

import multiprocessing

import numpy as np
import pytest

import stem_dask as sd
from stem_dask.writers.synthetic import Synthetic, write_dataset

# newer Pythons warn of every fork of a process with threads
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.timeout(60),
]
SECONDS = 20
SUFFIXES = (".dm4", ".zarr", ".hspy", ".zspy", ".h5", ".npy", ".pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same scan as a file of each kind."""
    folder = tmp_path_factory.mktemp("forked")
    write_dataset(folder / "scan.dm4", Synthetic(scan_shape=(4, 3), detector_shape=(24, 20)))
    for suffix in SUFFIXES[1:]:
        sd.export(sd.open(folder / "scan.dm4"), folder / f"scan{suffix}")
    return folder


def in_a_child(function, *args):
    """Result of a function in a forked process; a child that hangs is ended."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=lambda: send.send(function(*args)))
    child.start()
    try:
        assert receive.poll(SECONDS), "the child does not answer"
        return receive.recv()
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_forked_child_reads_after_its_parent(folder, suffix):
    patterns = sd.open(folder / f"scan{suffix}")
    whole = patterns.values

    def opened():
        return sd.open(folder / f"scan{suffix}")[2, 1].values

    np.testing.assert_array_equal(in_a_child(opened), whole[2, 1])
    np.testing.assert_array_equal(in_a_child(lambda: patterns[3].values), whole[3])
    np.testing.assert_array_equal(patterns.values, whole)  # the parent reads on


def test_a_forked_child_analyzes_after_its_parent(folder):
    def analyzed():
        return sd.analyze(sd.open(folder / "scan.dm4")).compute().radius.values

    np.testing.assert_array_equal(analyzed(), in_a_child(analyzed))


def test_a_forked_child_reads_while_its_parent_has_a_cluster(folder):
    import distributed

    patterns = sd.open(folder / "scan.zarr")
    with (
        distributed.LocalCluster(
            1, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
    ):
        whole = patterns.values
        np.testing.assert_array_equal(in_a_child(lambda: patterns[1].values), whole[1])
        np.testing.assert_array_equal(patterns[1].values, whole[1])


@pytest.mark.parametrize("suffix", [".dm4", ".zarr", ".hspy"])
def test_workers_of_a_data_loader(folder, suffix):
    data = pytest.importorskip("torch.utils.data", reason="the package torch is not installed")
    patterns = sd.open(folder / f"scan{suffix}").stack(pattern=("scan_y", "scan_x"))
    patterns = patterns.transpose("pattern", "ky", "kx")
    whole = patterns.values

    class Patterns(data.Dataset):
        def __len__(self):
            return len(whole)

        def __getitem__(self, i):
            return patterns[i].values.astype("f4")

    loader = data.DataLoader(
        Patterns(), batch_size=5, num_workers=2, timeout=SECONDS, multiprocessing_context="fork"
    )
    found = np.concatenate([batch.numpy() for batch in loader])
    np.testing.assert_array_equal(found, whole)
