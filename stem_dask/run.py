"""``python -m stem_dask.run CONFIG [key=value …]``: the main job."""

from stem_dask.cli.run import main
from stem_dask.cli.signals import program

if __name__ == "__main__":
    program(main)
