"""What a machine, a cgroup and a batch system allow; how the dashboard is reached from afar; how a process ends."""

import os
import subprocess
import sys
import tempfile

import dask
import psutil
import pytest

from stem_dask.cluster.connect import tunnel
from stem_dask.core.machine import (
    cgroup_bytes,
    machine_bytes,
    node_folder,
    slurm_bytes,
    slurm_cores,
    usable_cores,
)

GIB = 2**30
LINK = "http://127.0.0.1:8787/status"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_CPUS_ON_NODE": "64"}, 64),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "64"}, 4),
        ({"SLURM_CPUS_PER_TASK": "", "SLURM_CPUS_ON_NODE": "8(x2)"}, None),
        ({"SLURM_CPUS_PER_TASK": "0", "SLURM_CPUS_ON_NODE": "3"}, 3),
    ],
)
def test_cores_of_slurm(environment, expected):
    assert slurm_cores(environment) == expected


def test_cores_are_what_the_narrowest_allows(monkeypatch):
    monkeypatch.setattr(dask.system, "CPU_COUNT", 8)
    assert usable_cores({}) == 8
    assert usable_cores({"SLURM_CPUS_PER_TASK": "3"}) == 3
    assert usable_cores({"SLURM_CPUS_PER_TASK": "64"}) == 8  # bound to fewer by the system


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_MEM_PER_NODE": "16384"}, 16 * GIB),
        ({"SLURM_MEM_PER_NODE": "16384", "SLURM_MEM_PER_CPU": "1"}, 16 * GIB),
        ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "2"}, 16 * GIB),
        ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_PER_TASK": "2"}, 4 * GIB),
        ({"SLURM_MEM_PER_CPU": "2048"}, 2 * GIB),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_NODE": "all"}, None),
    ],
)  # fmt: skip
def test_memory_of_slurm(environment, expected):
    assert slurm_bytes(environment) == expected


@pytest.mark.parametrize(
    ("environment", "cores"),
    [
        ({"NCPUS": "3"}, 3),  # PBS Professional
        ({"PBS_NUM_PPN": "2", "PBS_NP": "8"}, 2),  # Torque: of this node, and of four
        ({"PBS_NP": "5"}, 5),
        ({"LSB_DJOB_NUMPROC": "4", "LSB_MAX_NUM_PROCESSORS": "6"}, 4),
        ({"LSB_MAX_NUM_PROCESSORS": "6"}, 6),
        ({"NSLOTS": "2"}, 2),
        ({"NSLOTS": "2", "SLURM_CPUS_PER_TASK": "1"}, 1),
        ({"NSLOTS": "undefined", "NCPUS": "0", "PBS_NP": ""}, 8),
        ({"NSLOTS": "64"}, 8),
    ],
)
def test_cores_of_other_batch_systems(monkeypatch, environment, cores):
    monkeypatch.setattr(dask.system, "CPU_COUNT", 8)
    assert usable_cores(environment) == cores


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PBS_RESC_MEM": str(3 * 2**20)}, 3 * 2**20),
        ({"PBS_RESC_MEM": "512mb"}, 512 * 2**20),
        ({"LSB_CG_MEMLIMIT": "0x20000000"}, 512 * 2**20),
        ({"SGE_HGR_m_mem_free": "0.500G", "NSLOTS": "4"}, 512 * 2**20),
        ({"SGE_HGR_h_vmem": "64.000M", "NSLOTS": "4"}, 256 * 2**20),
        ({"SGE_HGR_h_vmem": "64M"}, 64 * 2**20),
        ({"PBS_RESC_MEM": "9gb", "SLURM_MEM_PER_NODE": "100"}, 100 * 2**20),
        ({"PBS_RESC_MEM": "lots", "LSB_CG_MEMLIMIT": "", "SGE_HGR_h_vmem": "0"}, None),
    ],
)
def test_memory_of_other_batch_systems(monkeypatch, environment, expected):
    monkeypatch.setattr("stem_dask.core.machine.cgroup_bytes", lambda: None)
    total = psutil.virtual_memory().total
    assert machine_bytes(environment) == min(total, expected or total)


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB),
        (  # as in a step of SLURM, where the job has the limit
            {
                "proc/self/cgroup": "0::/slurm/job_7/step_0/task_0\n",
                "sys/fs/cgroup/slurm/job_7/step_0/task_0/memory.max": "max\n",
                "sys/fs/cgroup/slurm/job_7/step_0/memory.max": f"{3 * GIB}\n",
                "sys/fs/cgroup/slurm/job_7/memory.max": f"{2 * GIB}\n",
            },
            2 * GIB,
        ),
        (  # version 1, where no limit is the largest number, and other controllers do not count
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/slurm/uid_1/job_7\n0::/\n",
                "sys/fs/cgroup/memory/slurm/uid_1/job_7/memory.limit_in_bytes": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            4 * GIB,
        ),
        (  # in a container the path is that of the host, and the limit stands in the outermost group
            {
                "proc/self/cgroup": "4:memory:/docker/0123\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
            },
            GIB,
        ),
    ],
)
def test_memory_of_a_cgroup(tmp_path, files, expected):
    write(tmp_path, files)
    assert cgroup_bytes(tmp_path) == expected


def test_memory_is_what_the_narrowest_allows(monkeypatch):
    total = psutil.virtual_memory().total
    monkeypatch.setattr("stem_dask.core.machine.cgroup_bytes", lambda: None)
    assert machine_bytes({}) == total
    assert machine_bytes({"SLURM_MEM_PER_NODE": "100"}) == 100 * 2**20
    assert machine_bytes({"SLURM_MEM_PER_NODE": str(2**40)}) == total
    monkeypatch.setattr("stem_dask.core.machine.cgroup_bytes", lambda: 99 * 2**20)
    assert machine_bytes({"SLURM_MEM_PER_NODE": "100"}) == 99 * 2**20


def test_workers_write_on_the_node(tmp_path):
    assert node_folder({"SLURM_TMPDIR": str(tmp_path)}) == str(tmp_path)
    assert node_folder({"SLURM_TMPDIR": str(tmp_path / "gone")}) == tempfile.gettempdir()
    assert os.path.isdir(node_folder({}))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SSH_CLIENT": "192.0.2.7 50000 22"}, None),
        ({"SSH_CONNECTION": "192.0.2.7 50000 192.0.2.1 22"}, "ada@192.0.2.1"),
        ({"SLURM_JOB_ID": "7"}, "ada@node5"),
        ({"SLURM_JOB_ID": "7", "SLURM_SUBMIT_HOST": "node5"}, "ada@node5"),
        ({"SLURM_JOB_ID": "7", "SLURM_SUBMIT_HOST": "login"}, "-J ada@login ada@node5"),
        (  # the user came to the login node by this address
            {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_HOST": "login", "SSH_CONNECTION": "192.0.2.7 50000 192.0.2.1 22"},
            "-J ada@192.0.2.1 ada@node5",
        ),
    ],
)  # fmt: skip
def test_the_way_to_the_dashboard(environment, expected):
    found = tunnel(LINK, {"USER": "ada", **environment}, "node5")
    assert found == (expected and f"ssh -N -L 8787:127.0.0.1:8787 {expected}")


@pytest.mark.parametrize("link", ["http://10.0.0.7:8787/status", "", "inproc://a/b"])
def test_no_way_to_the_dashboard_of_others(link):
    assert tunnel(link, {"USER": "ada", "SLURM_JOB_ID": "7"}, "node5") is None


def test_a_process_ends_after_its_background_imports(tmp_path):
    """One that was stopped within an import hung, or crashed: h5py must take its types back before Python ends."""
    # the module is complete only when the main thread has ended
    late = """
import atexit, threading
threading.main_thread().join()
atexit.register(print, "ended")
print("loaded", flush=True)
"""
    (tmp_path / "late.py").write_text(late)
    (tmp_path / "later.py").write_text("print('not begun any more')")
    script = "from stem_dask.core.machine import load_meanwhile; load_meanwhile('late', 'later')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "loaded\nended\n"), done.stderr
