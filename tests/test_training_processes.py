"""Datasets for training in other processes: forked after reads, spawned, workers of a DataLoader, ranks of torch.distributed."""

import multiprocessing
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training_made as made

import stem_dask as sd

torch = pytest.importorskip("torch", reason="the package torch is not installed")

pytestmark = [
    pytest.mark.timeout(120),
    # newer Pythons warn of every fork of a process with threads
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:block. K:UserWarning"),
]
SECONDS = 60
DATA = made.counts((6, 11))
KINDS = {"run": made.run_of, "zspy": made.exported("a.zspy"), "zarr of others": made.zarr_of_others, "hspy": made.exported("a.hspy"),
         "h5 split": made.FORMATS["h5 split"], "npy": made.npy, "pt": made.exported("a.pt")}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("processes")
    return {name: write(folder, DATA) for name, write in KINDS.items()}


def answer(send: Any, function: Any, *args: Any) -> None:
    send.send(function(*args))


def in_a_child(method: str, function: Any, *args: Any) -> Any:
    """Result of a function in another process; one that hangs is ended."""
    context = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(send, function, *args))
    child.start()
    send.close()
    try:
        assert receive.poll(SECONDS), "the child does not answer"
        return receive.recv()
    finally:
        child.kill()
        child.join()


def found_in(ds: Any, loader: Any = None) -> tuple[Any, Any]:
    """All patterns by number, and the order of a block loader, which is made here if it is not given."""
    every = np.stack([s["patterns"].numpy()[0] for s in ds.__getitems__(range(len(ds)))])
    loader = sd.loader(ds, 5, memory=200_000, cache=False, threads=2) if loader is None else loader
    batches = [(b["index"].tolist(), b["patterns"].numpy()) for b in loader]
    for index, patterns in batches:
        np.testing.assert_array_equal(patterns[:, 0], every[index])
    return every, [index for index, _ in batches]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forked_child_reads_after_its_parent(kind: str, paths: dict[str, Path]) -> None:
    ds = sd.PatternDataset(paths[kind], fields=("position",))
    every, order = found_in(ds)
    loader = sd.loader(ds, 5, memory=200_000, cache=False, threads=2)
    next(iter(loader))
    for args in ((ds,), (ds, loader)):
        theirs = in_a_child("fork", found_in, *args)
        np.testing.assert_array_equal(theirs[0], every)
        assert theirs[1] == order
    np.testing.assert_array_equal(found_in(ds)[0], every)  # the parent reads on


def test_spawned(paths: dict[str, Path]) -> None:
    ds = sd.PatternDataset([paths["run"], paths["zspy"]], normalize="log")
    every, order = found_in(ds)
    theirs = in_a_child("spawn", found_in, ds)
    np.testing.assert_array_equal(theirs[0], every)
    assert theirs[1] == order


@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_a_data_loader_by_fork(kind: str, paths: dict[str, Path]) -> None:
    ds = sd.PatternDataset(paths[kind], fields=("position",))
    every, _ = found_in(ds)
    for n in (0, 2):
        how = {"timeout": SECONDS, "multiprocessing_context": "fork"} if n else {}
        check(torch.utils.data.DataLoader(ds, 7, num_workers=n, **how), every, ds)


def test_workers_of_a_data_loader_by_a_server(paths: dict[str, Path]) -> None:
    ds = sd.PatternDataset(paths["run"], fields=("position",))
    how = {"timeout": SECONDS, "multiprocessing_context": "forkserver", "shuffle": True}
    check(torch.utils.data.DataLoader(ds, 7, num_workers=2, **how), found_in(ds)[0], ds)


def check(loader: Any, every: Any, ds: Any) -> None:
    batches = list(loader)
    index = torch.cat([b["index"] for b in batches])
    assert sorted(index.tolist()) == list(range(66))
    found = torch.cat([b["patterns"] for b in batches])
    np.testing.assert_array_equal(found[:, 0].numpy(), every[index])
    places = torch.cat([b["position"] for b in batches]).numpy()
    np.testing.assert_array_equal(places, ds.positions[index, 1:])


def rank(number: int, address: str, path: str) -> Any:
    import torch.distributed

    import stem_dask.training.loader as loaders

    torch.distributed.init_process_group("gloo", init_method=address, rank=number, world_size=2)
    try:
        loader = sd.loader(sd.PatternDataset(path), 5, memory=200_000, cache=False)
        lengths = [None, None]
        torch.distributed.all_gather_object(lengths, len(loader))
        found = [b["index"].tolist() for b in loader]
        # one rank has room for all patterns, the other one for few
        loaders.free_bytes = lambda: (10**9, 800_000)[number]
        auto = sd.loader(sd.PatternDataset(path), 5)
        lengths.append((auto.plan.mode, auto.plan.memory))
        return loader.rank, loader.world_size, lengths, found
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_of_torch_distributed(paths: dict[str, Path], tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    address = f"file://{tmp_path}/meeting"
    pairs = [context.Pipe(duplex=False) for _ in range(2)]
    children = [
        context.Process(target=answer, args=(send, rank, i, address, str(paths["run"])))
        for i, (_, send) in enumerate(pairs)
    ]
    for child in children:
        child.start()
    try:
        assert all(receive.poll(SECONDS) for receive, _ in pairs), "a rank does not answer"
        found = [receive.recv() for receive, _ in pairs]
    finally:
        for child in children:
            child.kill()
            child.join()
    assert [(*one[:2], one[2][:2]) for one in found] == [(0, 2, [6, 6]), (1, 2, [6, 6])]
    assert found[0][2][2] == found[1][2][2]
    assert found[0][2][2][1] <= 200_000
    index = [i for one in found for batch in one[3] for i in batch]
    assert len(index) == len(set(index)) == 60
    ds = sd.PatternDataset(paths["run"])
    for i in range(2):
        ours = sd.loader(ds, 5, memory=200_000, cache=False, rank=i, world_size=2)
        assert [b["index"].tolist() for b in ours] == found[i][3]


def test_a_pickle_is_small_and_refuses_another_file(paths: dict[str, Path], tmp_path: Path) -> None:
    ds = sd.PatternDataset(list(paths.values()), scan_step=2, fields=("position",))
    for one in (ds, *ds.split(val=0.2, test=0.1).values()):
        blob = pickle.dumps(one)
        assert len(blob) < 10_000
        again = pickle.loads(blob)
        assert (len(again), again.fingerprint, again.normalization) == (
            len(one),
            one.fingerprint,
            one.normalization,
        )
        assert again.leak == one.leak
        assert found_in(again)[1] == found_in(one)[1]
        np.testing.assert_array_equal(again.positions, one.positions)
        for mine, theirs in zip(again.mask, one.mask, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_neither_the_package_nor_a_dataset_imports_torch() -> None:
    import subprocess

    code = """
import sys, stem_dask as sd
sd.PatternDataset, sd.loader, sd.thin, sd.Normalization
assert "torch" not in sys.modules
sys.modules["torch"] = None
from stem_dask.cli.main import main
assert main(["--help"]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
