"""What this process may use of its machine: cores, memory, and a disk of the node; batch systems and cgroups may allow a part."""

import contextlib
import ctypes
import functools
import gc
import importlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import dask

#: a memory limit above this is how version 1 of cgroups says that there is none
_NO_LIMIT = 2**62

#: variables in which PBS (Torque, PBS Professional), LSF and Grid Engine state the cores of a job: the first that is set counts
_CORES = (
    ("PBS_NUM_PPN", "NCPUS", "PBS_NP"),
    ("LSB_DJOB_NUMPROC", "LSB_MAX_NUM_PROCESSORS"),
    ("NSLOTS",),
)

#: variables in which they state the memory of a job on this node, and the memory of each of its slots
_MEMORY = ("PBS_RESC_MEM", "LSB_CG_MEMLIMIT", "SGE_HGR_m_mem_free")

_SLOT_MEMORY = ("SGE_HGR_h_vmem",)

#: libraries that would start a thread for every core of the machine, in each of our workers: one thread each
ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS", "BLOSC_NTHREADS",
    )
}  # fmt: skip


def usable_cores(environment: Mapping[str, str] = os.environ) -> int:
    """Cores that this process may use: the least of its affinity, its cgroup's quota, and what a batch system gave.

    Examples
    --------
    >>> usable_cores({"SLURM_CPUS_PER_TASK": "1", "SLURM_CPUS_ON_NODE": "64"}), usable_cores({"NSLOTS": "1"})
    (1, 1)
    """
    given = [slurm_cores(environment), *batch_cores(environment)]
    # Dask looks at the affinity and at the quota of versions 1 and 2 of cgroups
    return min([dask.system.CPU_COUNT, *(cores for cores in given if cores is not None)])


def batch_cores(environment: Mapping[str, str]) -> list[int]:
    """Cores that PBS, LSF and Grid Engine gave the job.

    Examples
    --------
    >>> batch_cores({"PBS_NUM_PPN": "4", "PBS_NP": "16"}), batch_cores({})
    ([4], [])
    """
    found = ((_number(environment, name) for name in names) for names in _CORES)
    first = (next((cores for cores in system if cores), None) for system in found)
    return [cores for cores in first if cores is not None]


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

    Dask's own limit does not see what a batch system gave: it reads the outermost cgroup only, and no variables.
    """
    import psutil  # type: ignore[import-untyped]  # comes with distributed

    limits = [psutil.virtual_memory().total, slurm_bytes(environment), cgroup_bytes()]
    limits += batch_bytes(environment)
    return min(limit for limit in limits if limit is not None)


def batch_bytes(environment: Mapping[str, str]) -> list[int]:
    """Memory that PBS, LSF and Grid Engine gave the job on this node: bytes, LSF's in hexadecimal, or with a unit.

    Examples
    --------
    >>> batch_bytes({"PBS_RESC_MEM": "16gb"})[0] == batch_bytes({"LSB_CG_MEMLIMIT": "0x400000000"})[0] == 16 * 2**30
    True
    >>> batch_bytes({"SGE_HGR_h_vmem": "2.000G", "NSLOTS": "4"})[0] == 8 * 2**30
    True
    """
    slots = _number(environment, "NSLOTS") or 1
    found = [_bytes(environment.get(name, "")) for name in _MEMORY]
    found += [slots * _bytes(environment.get(name, "")) for name in _SLOT_MEMORY]
    return [limit for limit in found if limit]


def _bytes(text: str) -> int:
    """Bytes, from ``0x…``, or a decimal number with or without a unit (in powers of 1024); 0 for anything else."""
    if re.fullmatch("0x[0-9a-fA-F]{1,16}", text):
        return int(text, 16)
    found = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,9})?)([kmgt]?)b?", text.lower())
    if found is None:
        return 0
    number, unit = found.groups()
    return int(float(number) * 1024 ** " kmgt".index(unit or " "))


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


#: in bytes: larger buffers are allocated by and returned to the system; freed memory below this is kept for reuse
FROM_SYSTEM, KEPT = 4 * 2**20, 16 * 2**20

#: thresholds of the garbage collector: Python's own, and while packages are loaded
USUAL, MANY = gc.get_threshold(), 200_000

#: names of these in the C library (malloc.h of glibc)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


@functools.cache
def keep_freed_memory() -> None:
    """Undo Dask's MALLOC_TRIM_THRESHOLD_ in this process: with it encoding takes twice as long.

    Every buffer above 128 kB would be new memory. Nothing changes without that setting, or with another C library than glibc.
    """
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, FROM_SYSTEM)
        mallopt(_TRIM_THRESHOLD, KEPT)
        mallopt(_ARENA_MAX, 1)


def postpone_collection() -> None:
    """Postpone garbage collection until `exempt_from_collection`; it takes a third of the time that imports need.

    Only for processes that end with the run.
    """
    gc.set_threshold(MANY)


@functools.cache
def exempt_from_collection() -> None:
    """Exempt all present objects from garbage collection, which takes 0.1 s for those of loaded libraries.

    Only for processes that end with the run, where garbage may stay, and once per process.
    """
    gc.freeze()
    gc.set_threshold(*USUAL)


def load_meanwhile(*names: str) -> None:
    """Import modules in a background thread; an import error is raised again by the module's next user."""
    import distributed  # noqa: F401  first, because two threads must not import it at the same time

    def load() -> None:
        with contextlib.suppress(Exception):
            for name in names:
                importlib.import_module(name)

    threading.Thread(target=load, daemon=True).start()  # the process may end before
