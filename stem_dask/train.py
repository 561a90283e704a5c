"""``python -m stem_dask.train --data FILE --output_dir FOLDER``: train an autoencoder."""

from stem_dask.cli.signals import program
from stem_dask.cli.train import main as main

if __name__ == "__main__":
    program(main)
