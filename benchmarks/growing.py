"""One job of `benchmarks.growth` in a separate process: the whole job on a repeated or generated source.

python -m benchmarks.growing OUTPUT.zarr --tiled FILE.dm4 --rows 1000
python -m benchmarks.growing OUTPUT.zarr --blocks-made 4000
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.growth import job_of, made_source, tiled
from benchmarks.rows import SETTINGS

#: blocks per task in a run of 1 TB: each has 250 MB and takes 0.1 s to analyze, 0.2 s to crop
CALLS_OF_TERABYTE = 4


def main(argv: list[str] | None = None) -> None:
    """Run the job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiled", type=Path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--blocks-made", type=int)
    parser.add_argument("--setting", choices=SETTINGS, default="2x1")
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args(argv)
    from stem_dask.engine import submit as submission
    from stem_dask.job.run import run

    overrides = [text.format(cores=options.cores) for text in SETTINGS[options.setting]]
    if options.tiled is not None:
        source, path = tiled(options.tiled, options.rows), options.tiled
        changed: Any = nullcontext()
    else:
        source, path = made_source(options.blocks_made), options.output.with_name("made.npy")
        np.save(path, source[(slice(0, 1), slice(0, 1), slice(None), slice(None))])
        overrides.append(f"output.chunk_mb={source.pattern.nbytes / 2**20 * 1.01}")
        # otherwise dozens of these short blocks would share a task
        most = CALLS_OF_TERABYTE * options.cores * submission.IN_FLIGHT
        changed = patch.object(submission, "CALLS_IN_FLIGHT", most)
    with changed:
        run(job_of(source, path, options.output, overrides))


if __name__ == "__main__":
    main()
