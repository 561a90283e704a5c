from stem_dask.cluster.connect import Connection as Connection
from stem_dask.cluster.connect import connect as connect
from stem_dask.config.load import load_config as load_config
from stem_dask.config.load import load_configs as load_configs
from stem_dask.config.options import Config as Config
from stem_dask.core.errors import ConfigError as ConfigError
from stem_dask.core.errors import LockedError as LockedError
from stem_dask.core.errors import MemoryBudgetError as MemoryBudgetError
from stem_dask.core.errors import OutputExistsError as OutputExistsError
from stem_dask.core.errors import SourceError as SourceError
from stem_dask.core.errors import StemDaskError as StemDaskError
from stem_dask.core.errors import StoreError as StoreError
from stem_dask.core.model import Window as Window
from stem_dask.job.cropper import CroppingConfig as CroppingConfig
from stem_dask.job.cropper import DiffractionCropper as DiffractionCropper
from stem_dask.job.cropper import create_test_data as create_test_data
from stem_dask.job.outcome import Outcome as Outcome
from stem_dask.job.run import run as run_config
from stem_dask.job.show import Report as Report
from stem_dask.job.show import plot as plot
from stem_dask.job.show import report as report
from stem_dask.stages.analyze import analyze as analyze
from stem_dask.stages.correct import suspected_hot_pixels as suspected_hot_pixels
from stem_dask.stages.crop import choose_window as choose_window
from stem_dask.stages.crop import crop as crop
from stem_dask.stages.crop import to_detector as to_detector
from stem_dask.stages.descan import fit_descan as fit_descan
from stem_dask.stages.downsample import cast as cast
from stem_dask.stages.downsample import downsample as downsample
from stem_dask.stages.export import export as export
from stem_dask.stages.export import to_hyperspy as to_hyperspy
from stem_dask.stages.images import virtual_image as virtual_image
from stem_dask.stages.open import open_patterns as open
from stem_dask.stages.survey import Survey as Survey
from stem_dask.stages.survey import survey as survey
from stem_dask.stages.validate import validate as validate
from stem_dask.training.dataset import Normalization as Normalization
from stem_dask.training.dataset import PatternDataset as PatternDataset
from stem_dask.training.loader import loader as loader
from stem_dask.training.model import load_model as load_model
from stem_dask.training.thin import thin as thin

__version__: str
__all__ = [
    "Config",
    "ConfigError",
    "Connection",
    "CroppingConfig",
    "DiffractionCropper",
    "LockedError",
    "MemoryBudgetError",
    "Normalization",
    "Outcome",
    "OutputExistsError",
    "PatternDataset",
    "Report",
    "SourceError",
    "StemDaskError",
    "StoreError",
    "Survey",
    "Window",
    "__version__",
    "analyze",
    "cast",
    "choose_window",
    "connect",
    "create_test_data",
    "crop",
    "downsample",
    "export",
    "fit_descan",
    "load_config",
    "load_configs",
    "load_model",
    "loader",
    "open",
    "plot",
    "report",
    "run_config",
    "survey",
    "suspected_hot_pixels",
    "thin",
    "to_detector",
    "to_hyperspy",
    "validate",
    "virtual_image",
]
