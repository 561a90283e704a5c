"""A SLURM of one node on this machine, for the tests: its own keys, ports and folders, gone when they end."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
PATIENCE = 60.0


def need_jobqueue() -> None:
    """Skip a test where dask-jobqueue is not installed; to load it here would have Ctrl-C end this process with code 0."""
    if importlib.util.find_spec("dask_jobqueue") is None:
        pytest.skip("kind: slurm needs the extra hpc")


#: no accounting, no cgroups; credentials expire soon, because a job that is requeued waits for that
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=8000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE DefMemPerCPU=500 State=UP
"""


def missing() -> str:
    """Why there can be no SLURM here; empty when there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)} missing); make slurm-ci installs it"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start the daemons; gives the environment in which SLURM's commands find them."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host, controller, daemon = socket.gethostname().split(".")[0], _port(), _port()
    text = CONF.format(
        host=host, controller=controller, daemon=daemon, folder=folder, cores=os.cpu_count()
    )
    (folder / "slurm.conf").write_text(text)
    # a GPU in name only, for scripts that ask for one
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    munge = [
        f"--{name}={folder}/munge.{name}"
        for name in ("key-file", "socket", "pid-file", "log-file", "seed-file")
    ]
    munge[0] = f"--key-file={folder}/munge.key"
    lines = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    ]
    processes = []
    try:
        with open(folder / "daemons.log", "wb") as log:
            for line in lines:
                processes.append(
                    subprocess.Popen(line, stdout=log, stderr=log, env=environment, cwd=folder)
                )
        _until_idle(environment, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, timeout=20, check=False)
        for process in reversed(processes):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _until_idle(environment: dict[str, str], folder: Path) -> None:
    end = time.monotonic() + PATIENCE
    while _said(["sinfo", "--noheader", "--format=%t"], environment).strip() != "idle":
        logs = "\n".join(file.read_text() for file in folder.glob("*.log"))
        assert time.monotonic() < end, logs
        time.sleep(0.2)


def _said(line: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False).stdout


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
