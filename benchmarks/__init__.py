"""Benchmarks: kernels against references, jobs against other libraries, memory and time against size."""
