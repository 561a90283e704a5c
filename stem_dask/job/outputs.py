"""Names of all files that a run writes: next to its first output, or in a local folder if that is in an object store."""

import os
from dataclasses import dataclass
from pathlib import Path

from stem_dask.config.options import Config
from stem_dask.core.errors import ConfigError
from stem_dask.job.precomputed import analysis_path
from stem_dask.stages.correct import KEYS
from stem_dask.storage.location import at, check_path, is_url, refuse_url
from stem_dask.storage.publish import refuse_existing, run_folder, stem, temporary_names

#: packages that this process imports to write a format
LIBRARIES = {".hspy": "h5py", ".h5": "h5py"}


@dataclass(frozen=True)
class Outputs:
    """The files of a run, in the folder of the first one: a .zarr store, or one file of another format.

    For an object store, ``url`` is the final place and ``path`` the local folder of its metadata and of the other files.
    """

    path: str
    exports: tuple[str, ...]
    results: str
    figure: str | None
    analysis: str | None
    url: str | None = None

    @classmethod
    def of(cls, config: Config) -> "Outputs":
        """NAME.zarr, and a crop into any format, gives NAME_results.json and NAME_visualization.png."""
        path, url = config.output.path, None
        if is_url(path):
            path, url = (
                str(Path(config.output.local_folder or ".", Path(path).name).absolute()),
                path,
            )
        name = os.path.splitext(path)[0] if config.crop.enabled else stem(path)
        alone = config.analyze.ahead and analysis_path(path) != path
        return cls(
            path,
            tuple(f"{name}.{kind}" for kind in config.output.export),
            f"{name}_results.json",
            f"{name}_visualization.png" if config.output.figure else None,
            analysis_path(path) if alone else None,
            url,
        )

    @property
    def store(self) -> str:
        """Final path or URL of the first output."""
        return self.path if self.url is None else self.url

    def libraries(self) -> tuple[str, ...]:
        """Packages that the run's own process imports to write the outputs; they take a second to load."""
        kinds = [Path(path).suffix for path in (self.path, *self.exports)]
        names = [LIBRARIES[kind] for kind in kinds if kind in LIBRARIES]
        return (*names, *["zarr"] * bool(self.exports))  # exports are made from the store

    def all(self) -> tuple[str, ...]:
        """All outputs, with the URL for an object store."""
        return (self.store, *self.local()[1:])

    def local(self) -> tuple[str, ...]:
        """All local outputs."""
        more = (name for name in (self.analysis, self.figure) if name is not None)
        return (self.path, *self.exports, self.results, *more)


#: bytes of the longest path below an output or a run's folder, such as /patterns/c.0.0.0.0.HEX.partial
BELOW_BYTES = 160


def refuse_other_kinds(outputs: Outputs) -> None:
    """Refuse outputs whose place holds a link, a folder instead of a file, or a file instead of a folder.

    Raises
    ------
    OutputExistsError
    """
    paths = outputs.local()
    for path in paths if outputs.url is None else paths[1:]:
        refuse_existing(path, overwrite=True)


def check_lengths(outputs: Outputs) -> None:
    """Refuse outputs whose name, or that of a temporary file, is too long for the file system.

    Raises
    ------
    ConfigError
    """
    paths = outputs.local()
    made = [name for path in paths for name in temporary_names(path)]
    for path in map(os.path.abspath, (*paths, *made, run_folder(outputs.path))):
        there = next(str(folder) for folder in Path(path).parents if os.path.isdir(folder))
        longest, whole = os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX")
        for name in Path(path).parts:
            if 0 < longest < len(os.fsencode(name)):
                raise ConfigError(
                    f"output.path is {outputs.store}, and the run needs the name {name}: it has {len(os.fsencode(name))} "
                    f"bytes, and a name may have {longest}; choose a shorter output.path"
                )
        if 0 < whole <= len(os.fsencode(path)) + BELOW_BYTES:
            raise ConfigError(
                f"output.path is {outputs.store}: a path with what the run makes below it may have {whole:,} bytes; choose a "
                "shorter output.path"
            )


def is_there(path: str) -> bool:
    """Whether a file or folder exists, or any object below a URL."""
    return bool(at(path).exists()) if is_url(path) else os.path.lexists(path)


def check_places(config: Config, outputs: Outputs) -> None:
    """Refuse combinations of URLs and local paths that are not supported.

    Raises
    ------
    ConfigError
    """
    for key in KEYS:
        refuse_url(
            f"input.{key}", getattr(config.input, key), "it is read from a file here; copy it"
        )
    for key, path in (("output.path", outputs.store), ("analyze.from", config.analyze.known)):
        check_path(key, path)
    source, url = config.input.path, outputs.url
    check_path("input.path", source)
    check_lengths(outputs)
    if url is None:
        if config.output.local_folder is not None:
            raise ConfigError(
                f"output.local_folder is {config.output.local_folder}, which is for an output.path that is a URL, and it is "
                f"{outputs.path}; leave it out"
            )
        return
    if Path(url).suffix != ".zarr":
        raise ConfigError(
            f"output.path is {url}: into an object store only .zarr is written; write the file here, and copy it there"
        )
    if is_url(source) and (f"{source}/".startswith(f"{url}/") or url.startswith(f"{source}/")):
        raise ConfigError(
            f"the output {url} would replace the input {source}; choose another output.path"
        )
