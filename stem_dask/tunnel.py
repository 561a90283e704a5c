"""How to see a dashboard that listens on loopback of another machine: the ssh command for the user's computer."""

import getpass
from collections.abc import Mapping
from urllib.parse import urlsplit


def tunnel(link: str, environment: Mapping[str, str], host: str) -> str | None:
    """The command that brings a dashboard here to the user's computer; None where nothing says that he sits elsewhere.

    Two signs are sure: a session by ssh, and a job of SLURM. A job keeps the variables of the session that submitted it,
    so that a job's node is reached over that machine.

    Parameters
    ----------
    link : of the dashboard
    environment : of this process
    host : name of this machine

    Examples
    --------
    >>> tunnel("http://127.0.0.1:8787/status", {"USER": "ada", "SSH_CONNECTION": "192.0.2.7 50000 192.0.2.1 22"}, "lab")
    'ssh -N -L 8787:127.0.0.1:8787 ada@192.0.2.1'
    >>> job = {"USER": "ada", "SLURM_JOB_ID": "17", "SLURM_SUBMIT_HOST": "login1"}
    >>> tunnel("http://127.0.0.1:8787/status", job, "node5")
    'ssh -N -L 8787:127.0.0.1:8787 -J ada@login1 ada@node5'
    """
    place = urlsplit(link)
    if place.hostname != "127.0.0.1" or not place.port:
        return None  # of somebody else, who knows how to reach it
    session = environment.get("SSH_CONNECTION", "").split()
    reached = session[2] if len(session) == 4 else ""
    user = environment.get("USER") or getpass.getuser()
    forward = f"ssh -N -L {place.port}:127.0.0.1:{place.port}"
    if "SLURM_JOB_ID" in environment:
        submitted = environment.get("SLURM_SUBMIT_HOST", "")
        login = reached or submitted
        over = f" -J {user}@{login}" if login and submitted != host else ""
        return f"{forward}{over} {user}@{host}"
    return f"{forward} {user}@{reached}" if reached else None
