from stem_dask.cluster import connect as connect
from stem_dask.config import load_config as load_config
from stem_dask.config import load_configs as load_configs
from stem_dask.cropper import CroppingConfig as CroppingConfig
from stem_dask.cropper import DiffractionCropper as DiffractionCropper
from stem_dask.cropper import create_test_data as create_test_data
from stem_dask.errors import StemDaskError as StemDaskError
from stem_dask.exports import export as export
from stem_dask.io.lazy import open_patterns as open
from stem_dask.pipeline import run as run_config
from stem_dask.stages.analyze import analyze as analyze
from stem_dask.stages.crop import crop as crop
from stem_dask.stages.crop import to_detector as to_detector
from stem_dask.stages.downsample import cast as cast
from stem_dask.stages.downsample import downsample as downsample
from stem_dask.stages.mask import suspected_hot_pixels as suspected_hot_pixels
from stem_dask.stages.validate import validate as validate
from stem_dask.stages.window import choose_window as choose_window

__version__: str
__all__ = [
    "CroppingConfig",
    "DiffractionCropper",
    "StemDaskError",
    "__version__",
    "analyze",
    "cast",
    "choose_window",
    "connect",
    "create_test_data",
    "crop",
    "downsample",
    "export",
    "load_config",
    "open",
    "run_config",
    "suspected_hot_pixels",
    "to_detector",
    "validate",
]
