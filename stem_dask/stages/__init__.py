"""Lazy in, lazy out: one file a stage, the only places that call map_blocks and reductions."""
