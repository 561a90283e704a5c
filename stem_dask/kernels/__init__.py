"""Pure functions on blocks of patterns ``(n, ky, kx)``: numpy and numba, nothing else of the package.

A block is read only, C-contiguous and in native byte order; ``native`` makes it so. Each pattern is brought
from memory once and worked on while it lies in cache.
"""
