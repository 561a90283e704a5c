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
from collections.abc import Mapping
from pathlib import Path

import dask

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
    systems = (  # PBS (Torque, PBS Professional), LSF, Grid Engine; the first that is set counts
        ("PBS_NUM_PPN", "NCPUS", "PBS_NP"),
        ("LSB_DJOB_NUMPROC", "LSB_MAX_NUM_PROCESSORS"),
        ("NSLOTS",),
    )
    given = [_first(environment, *names) for names in systems]
    # Dask looks at the affinity and at the quota of versions 1 and 2 of cgroups
    return min([dask.system.CPU_COUNT, *filter(None, [slurm_cores(environment), *given])])


def slurm_cores(environment: Mapping[str, str]) -> int | None:
    """Cores that SLURM gave this task, or else the job on this node; None outside of a job."""
    return _first(environment, "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")


def machine_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """Memory that this process may use: the machine's, or less where a container or batch system limits it.

    Dask's own limit does not see what a batch system gave: it reads the outermost cgroup only, and no variables.

    Examples
    --------
    >>> machine_bytes({"PBS_RESC_MEM": "16kb"}), machine_bytes({"SGE_HGR_h_vmem": "2.000K", "NSLOTS": "4"})
    (16384, 8192)
    """
    import psutil  # type: ignore[import-untyped]  # comes with distributed

    slots = _first(environment, "NSLOTS") or 1
    per = {"PBS_RESC_MEM": 1, "LSB_CG_MEMLIMIT": 1, "SGE_HGR_m_mem_free": 1, "SGE_HGR_h_vmem": slots}  # fmt: skip
    given = [n * _bytes(environment.get(name, "")) for name, n in per.items()]
    limits = [slurm_bytes(environment), cgroup_bytes(), *given]
    return min([psutil.virtual_memory().total, *filter(None, limits)])


def _bytes(text: str) -> int:
    """Bytes, from ``0x…``, or a decimal number with or without a unit (in powers of 1024); 0 for anything else."""
    if re.fullmatch("0x[0-9a-fA-F]{1,16}", text):
        return int(text, 16)
    found = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,9})?)([kmgt]?)b?", text.lower())
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2] or " ")) if found else 0


def slurm_bytes(environment: Mapping[str, str]) -> int | None:
    """Memory that SLURM gave the job on this node, from MiB for the node or for each of its cores; None without a limit.

    Examples
    --------
    >>> slurm_bytes({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "8"}) == 8 * 2**30
    True
    >>> slurm_bytes({"SLURM_MEM_PER_NODE": "0"})  # as `--mem=0`: all of the node
    """
    node, core = (_first(environment, f"SLURM_MEM_PER_{per}") for per in ("NODE", "CPU"))
    if node or not core:
        return node and node * 2**20
    return core * (_first(environment, "SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK") or 1) * 2**20


def _first(environment: Mapping[str, str], *names: str) -> int | None:
    """The first of some variables that is a whole number above 0."""
    texts = (environment.get(name, "") for name in names)
    return next((int(text) for text in texts if text.isdecimal() and int(text)), None)


def cgroup_bytes(root: str | Path = "/") -> int | None:
    """The lowest memory limit of this process's cgroup and of those that hold it, versions 1 and 2; None without one.

    Parameters
    ----------
    root : the folder that has ``proc`` and ``sys``
    """
    return min((limit for _, limit in _cgroups(root)), default=None)


def _cgroups(root: str | Path) -> list[tuple[Path, int]]:
    """Folder and memory limit of this process's cgroup and of those that hold it, as far as they have one."""
    mount, found = Path(root, "sys/fs/cgroup"), []
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = Path(path.lstrip("/"))
        folder, name = mount, "memory.max"
        if controllers:
            folder, name = mount / "memory", "memory.limit_in_bytes"
        if not controllers or "memory" in controllers.split(","):
            for group in (inside, *inside.parents):
                with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                    found.append((folder / group, int((folder / group / name).read_text())))
    # a limit above this is how version 1 says that there is none
    return [(group, limit) for group, limit in found if 0 < limit < 2**62]


def free_bytes(root: str | Path = "/") -> int:
    """Memory that this process can still take: of the machine, or less where its cgroup limits it."""
    import psutil

    free = [psutil.virtual_memory().available, machine_bytes() - psutil.Process().memory_info().rss]
    for folder, limit in _cgroups(root):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            name = (
                "memory.current"
                if (folder / "memory.current").exists()
                else "memory.usage_in_bytes"
            )
            lines = (folder / "memory.stat").read_text().splitlines()
            caches = ("inactive_file", "total_inactive_file")  # which the system gives back first
            cached = next(int(line.split()[1]) for line in lines if line.split()[0] in caches)
            free.append(limit - int((folder / name).read_text()) + cached)
    return max(0, min(free))


#: types of file systems whose files come over a network; those of FUSE often do, but for some on local disks
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|lustre|gpfs|beegfs\w*|ceph|glusterfs|afs|panfs|wekafs|fuse(\.(?!fuse-overlayfs|ntfs|exfat).*)?"
)


def network_file_system(path: str | Path, mounts: str | Path = "/proc/self/mounts") -> str:
    """Type of the file system of a file, if its files come over a network, else empty; also empty where the system does not tell."""
    try:
        lines = os.fsencode(Path(mounts).read_text("utf-8", "surrogateescape")).splitlines()
    except OSError:
        return ""
    found, longest = "", -1
    place = Path(os.path.realpath(path))
    for line in lines:
        _, point, kind, *_ = line.split()
        # spaces and others are written as \\ooo
        plain = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), point)
        folder = Path(os.fsdecode(plain))
        if place.is_relative_to(folder) and len(folder.parts) >= longest:
            found, longest = os.fsdecode(kind), len(folder.parts)  # of two on one folder the later
    return found if _NETWORK.fullmatch(found) else ""


def node_folder(environment: Mapping[str, str] = os.environ) -> str:
    """A folder on a disk of this node for the files of workers: SLURM's for the job, else as TMPDIR says, else /tmp."""
    own = environment.get("SLURM_TMPDIR", "")
    return own if os.path.isdir(own) else tempfile.gettempdir()


@functools.cache
def keep_freed_memory() -> None:
    """Undo Dask's MALLOC_TRIM_THRESHOLD_ in this process: with it encoding takes twice as long.

    Every buffer above 128 kB would be new memory. Nothing changes without that setting, or with another C library than glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if "MALLOC_TRIM_THRESHOLD_" in os.environ and mallopt is not None:
        mallopt(
            -3, 4 * 2**20
        )  # M_MMAP_THRESHOLD: larger buffers come from and return to the system
        mallopt(-1, 16 * 2**20)  # M_TRIM_THRESHOLD: freed memory below this is kept for reuse
        mallopt(-8, 1)  # M_ARENA_MAX


#: Python's own thresholds of the garbage collector
USUAL = gc.get_threshold()


def postpone_collection() -> None:
    """Postpone garbage collection until `exempt_from_collection`; it takes a third of the time that imports need.

    Only for processes that end with the run.
    """
    gc.set_threshold(200_000)


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
                if not threading.main_thread().is_alive():
                    return
                importlib.import_module(name)

    # No daemon: what is imported while the process ends can no longer register its own end, and h5py then crashes.
    threading.Thread(target=load).start()
