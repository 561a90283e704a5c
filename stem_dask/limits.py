"""What this process may use of its machine: cores, memory, and a disk of the node; SLURM and cgroups may allow a part."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import dask

#: a memory limit above this is how version 1 of cgroups says that there is none
_NO_LIMIT = 2**62
#: libraries that would start a thread for every core of the machine, in each of our workers: one thread each
ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS", "BLOSC_NTHREADS",
    )
}  # fmt: skip


def usable_cores(environment: Mapping[str, str] = os.environ) -> int:
    """Cores that this process may use: of its affinity, its cgroup's quota, and what SLURM gave.

    Examples
    --------
    >>> usable_cores({"SLURM_CPUS_PER_TASK": "1", "SLURM_CPUS_ON_NODE": "64"})
    1
    """
    given = slurm_cores(environment)
    # Dask looks at the affinity and at the quota of versions 1 and 2 of cgroups
    return dask.system.CPU_COUNT if given is None else min(given, dask.system.CPU_COUNT)


def slurm_cores(environment: Mapping[str, str]) -> int | None:
    """Cores that SLURM gave this task, or else the job on this node; None outside of a job.

    Examples
    --------
    >>> slurm_cores({"SLURM_CPUS_ON_NODE": "8"}), slurm_cores({})
    (8, None)
    """
    task = _number(environment, "SLURM_CPUS_PER_TASK")
    return task or _number(environment, "SLURM_CPUS_ON_NODE")


def machine_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """Memory that this process may use: the machine's, or less where a container or batch system limits it.

    Dask's own limit does not see what a batch system gave: it reads the outermost cgroup only, and not SLURM's variables.
    """
    import psutil  # type: ignore[import-untyped]  # comes with distributed

    limits = [psutil.virtual_memory().total, slurm_bytes(environment), cgroup_bytes()]
    return min(limit for limit in limits if limit is not None)


def slurm_bytes(environment: Mapping[str, str]) -> int | None:
    """Memory that SLURM gave the job on this node, from MiB for the node or for each of its cores; None without a limit.

    Examples
    --------
    >>> slurm_bytes({"SLURM_MEM_PER_NODE": "4096"}) == 4 * 2**30
    True
    >>> slurm_bytes({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "8"}) == 8 * 2**30
    True
    >>> slurm_bytes({"SLURM_MEM_PER_NODE": "0"})  # as `--mem=0`: all of the node
    """
    node, core = (_number(environment, f"SLURM_MEM_PER_{per}") for per in ("NODE", "CPU"))
    if node or not core:
        return node and node * 2**20
    cores = _number(environment, "SLURM_CPUS_ON_NODE") or slurm_cores(environment) or 1
    return core * cores * 2**20


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """A whole number above 0."""
    text = environment.get(name, "")
    return (int(text) or None) if text.isdecimal() else None


def cgroup_bytes(root: str | Path = "/") -> int | None:
    """The lowest memory limit of this process's cgroup and of those that hold it, versions 1 and 2; None without one.

    Parameters
    ----------
    root : the folder that has ``proc`` and ``sys``
    """
    return min(
        (limit for file in _limit_files(Path(root)) if (limit := _limit(file))), default=None
    )


def _limit_files(root: Path) -> Iterator[Path]:
    """Where limits may stand: of the own group, of all that hold it, and of the outermost."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):
            if not controllers:
                yield mount / group / "memory.max"
            elif "memory" in controllers.split(","):
                yield mount / "memory" / group / "memory.limit_in_bytes"


def _limit(file: Path) -> int | None:
    try:
        limit = int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
    return limit if 0 < limit < _NO_LIMIT else None


def node_folder(environment: Mapping[str, str] = os.environ) -> str:
    """A folder on a disk of this node for the files of workers: SLURM's for the job, else as TMPDIR says, else /tmp."""
    own = environment.get("SLURM_TMPDIR", "")
    return own if os.path.isdir(own) else tempfile.gettempdir()
