"""stem-dask demo: simulate a small scan, run the whole job on it, and name what to try next."""

import argparse
import os
import shlex


def add_demo_options(sub: argparse.ArgumentParser) -> None:
    """The arguments of ``stem-dask demo``."""
    text = "folder for the scan and its outputs (stem-dask-demo)"
    sub.add_argument("folder", nargs="?", default="stem-dask-demo", help=text)


def demo_command(options: argparse.Namespace) -> int:
    """Make the scan unless it is there, and crop it."""
    from stem_dask.config.load import configs_from
    from stem_dask.storage.publish import make_folder
    from stem_dask.writers.synthetic import Synthetic, write_dataset

    scan, store = (os.path.join(options.folder, name) for name in ("scan.dm4", "cropped.zarr"))
    if not os.path.exists(scan):
        print(f"simulating  {scan}: 48 x 48 patterns of 192 x 192 px")
        make_folder(os.path.abspath(scan))
        # without Bragg discs, so that 98 % of the intensity lies near the beam
        spec = Synthetic((48, 48), (192, 192), disc_radius=10.0, spots=0, descan=3.0)
        write_dataset(scan, spec)
    job = {"input": {"path": scan}, "output": {"path": store, "export": ["hspy"]}}
    from stem_dask.cli.jobs import run_all

    code = run_all(configs_from(job))
    report, own = f"{store.removesuffix('.zarr')}_report.html", "YOUR_SCAN.dm4"
    print(f"look        {report}, in a browser")
    for words in (["info", scan], ["analyze", own], ["crop", scan, "smaller.zarr", "--size", "48"]):
        print(f"next        stem-dask {shlex.join(words)}")
    return code
