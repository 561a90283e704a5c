"""Datasets, loader and model for PyTorch; torch is imported inside functions only."""
