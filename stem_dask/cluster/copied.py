"""What worker processes are copies of: one process loads this, and nobody else does."""

import gc

from stem_dask.core.machine import load, postpone_collection
from stem_dask.kernels.blas import load_numba

postpone_collection()

load("distributed.nanny")

load("stem_dask.job.warm_up")

load_numba()

gc.freeze()  # a round of a copy's collector over what it shares would make that its own
