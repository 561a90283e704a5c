"""Measurements: kernels against yardsticks, memory and time against the size of the dataset."""
