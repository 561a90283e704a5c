"""``python -m stem_dask``: as the command ``stem-dask``."""

from stem_dask.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
