"""A vacuum scan as reference for the descan: its analysis, its file, and what is refused."""

import json
import os

import numpy as np
import pytest

import stem_dask as sd
from stem_dask.cli.batch import main as batch_main  # noqa: F401
