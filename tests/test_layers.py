"""The house stands: folders are floors, imports go down only, heavy packages stay inside functions, totals only fall."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "stem_dask"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FILES = sorted(PACKAGE.rglob("*.py"))

#: lowest first; a folder imports from the floors below it only
FLOORS = [
    {"core", "kernels"},
    {"storage"},
    {"engine", "config", "readers"},
    {"writers", "cluster"},
    {"stages"},
    {"job", "training"},
    {"cli"},
    {"run", "train", "__init__", "__main__"},
]
#: folders that stand above a floor and are not to be known there
UNKNOWN_TO = {
    "engine": {"config", "readers", "stages", "writers"},
    "readers": {"engine", "config"},
    "writers": {"engine", "config"},
    "training": {"engine", "cluster", "config"},
}
#: the most that there may be; lower them when the package gets smaller
MOST_LINES, MOST_FILES, MOST_TOP = 34500, 151, 16
#: these cost time or memory, or exist on some systems only: never at module level
INSIDE_FUNCTIONS = {
    "torch", "hyperspy", "rsciio", "matplotlib", "cupy", "cupyx", "dask_cuda", "h5py", "hdf5plugin", "distributed",
    "imagecodecs", "dask_jobqueue", "obstore", "tifffile", "fcntl", "resource", "pwd", "grp", "rich",
}  # fmt: skip
#: loaded on every worker: what they need there is a second and 60 MB less without these at module level
ON_WORKERS = {"core", "kernels", "storage", "engine", "readers", "stages", "cluster"}
NOT_ON_WORKERS = {"dask.array", "xarray", "pandas"}
HEAVY = {"dask", "numba", "numpy", "xarray", "zarr", "scipy", "pydantic"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def folder(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    return next(i for i, folders in enumerate(FLOORS) if folder(module) in folders)


def imports(tree: ast.AST) -> set[str]:
    """Modules that are imported anywhere in a file, also within functions and for type checkers."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module.startswith("stem_dask"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """Names of the package's modules that a file imports."""
    known = {name_of(file) for file in FILES}
    found = (name.removeprefix("stem_dask.") for name in imports(parsed(path)))
    return {name for name in found if name in known} - {name_of(path)}


def module_level(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in tree.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.If)):
            found |= imports(node)
        elif isinstance(node, ast.ClassDef):
            found |= {
                name
                for part in node.body
                if not isinstance(part, FUNCTIONS)
                for name in imports(part)
            }
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    own = name_of(path)
    for module in own_imports(path):
        if folder(module) != folder(own):
            assert floor(module) < floor(own), (
                f"{own} imports {module}, which does not lie below it"
            )
            assert folder(module) not in UNKNOWN_TO.get(folder(own), ())


def test_no_circles_between_modules() -> None:
    """Imports within functions count: what needs each other belongs together."""
    needs = {name_of(path): own_imports(path) for path in FILES}
    left = dict(needs)
    while leaves := {name for name, below in left.items() if not below & left.keys()}:
        left = {name: below for name, below in left.items() if name not in leaves}
    assert not left, f"these import each other: {sorted(left)}"


def test_totals_only_fall() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in FILES)
    top = {p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or any(p.rglob("*.py"))}
    assert lines <= MOST_LINES
    assert len(FILES) <= MOST_FILES
    assert len(top) <= MOST_TOP, sorted(top)


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").rglob("*.py")), ids=name_of)
def test_kernels_know_nothing_but_numbers(path: Path) -> None:
    for module in imports(parsed(path)):
        top = module.split(".")[0]
        assert top not in {"dask", "xarray", "zarr", "distributed", "pydantic"}, module
        if top == "stem_dask":
            assert module.startswith("stem_dask.kernels"), module


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_packages_stay_inside_functions(path: Path) -> None:
    tops = {module.split(".")[0] for module in module_level(parsed(path))}
    assert not tops & INSIDE_FUNCTIONS
    if name_of(path) in ("run", "cli.run", "cli.main", "core.errors", "__init__"):
        assert not tops & HEAVY


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_workers_load_little(path: Path) -> None:
    if folder(name_of(path)) in ON_WORKERS:
        for module in module_level(parsed(path)):
            assert module not in NOT_ON_WORKERS
            assert not module.startswith("dask.array.")


def test_only_commands_print() -> None:
    for path in FILES:
        calls = [n for n in ast.walk(parsed(path)) if isinstance(n, ast.Call)]
        prints = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        # a split prints how much validation patterns resemble those of the training
        allowed = folder(name_of(path)) == "cli" or name_of(path) == "training.dataset"
        assert not prints or allowed, path


def in_a_process_of_its_own(code: str) -> "subprocess.CompletedProcess[str]":
    """What was loaded before by other tests is not there."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["crop", "--help"]])
def test_help_loads_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys, stem_dask.cli.main as c\n"
        f"try: c.main({argv!r})\n"
        "except SystemExit: pass\n"
        f"print('loaded:', sorted(set(sys.modules) & {HEAVY | INSIDE_FUNCTIONS!r}))"
    )
    done = in_a_process_of_its_own(code)
    assert done.stdout.rstrip().endswith("loaded: []")


def test_config_errors_come_before_dask() -> None:
    code = (
        "import sys, stem_dask.run as r\n"
        "print(r.main(['no-such-file.yaml']), sorted({'dask', 'numba', 'distributed'} & set(sys.modules)))"
    )
    done = in_a_process_of_its_own(code)
    assert done.stdout.strip() == "2 []"
    assert "no-such-file.yaml" in done.stderr


def test_header_faults_come_before_dask(tmp_path: Path) -> None:
    bad = tmp_path / "bad.dm4"
    bad.write_bytes(b"not a DM4 file at all, but long enough to be looked at")
    config = tmp_path / "crop.yaml"
    config.write_text(f"input: {{path: {bad}}}\noutput: {{path: {tmp_path}/out.zarr}}\n")
    code = (
        "import sys, stem_dask.run as r\n"
        f"print(r.main([{str(config)!r}]), sorted({{'dask', 'numba', 'distributed'}} & set(sys.modules)))"
    )
    done = in_a_process_of_its_own(code)
    assert done.stdout.strip() == "3 []"
    assert str(bad) in done.stderr


def test_an_open_scheduler_is_refused_before_dask(tmp_path: Path) -> None:
    config = tmp_path / "crop.yaml"
    config.write_text(
        f"input: {{path: a.dm4}}\noutput: {{path: {tmp_path}/out.zarr}}\n"
        "cluster: {address: 'tcp://192.0.2.1:8786'}\n"
    )
    code = (
        "import sys, stem_dask.run as r\n"
        f"print(r.main([{str(config)!r}]), sorted({{'dask', 'numba', 'distributed'}} & set(sys.modules)))"
    )
    done = in_a_process_of_its_own(code)
    assert done.stdout.strip() == "2 []"
    assert "tcp://192.0.2.1:8786" in done.stderr


def test_a_cluster_starts_before_the_passes_are_loaded() -> None:
    code = (
        "import sys, stem_dask.job.run\n"
        "print(sorted({'dask.array', 'numba', 'xarray'} & set(sys.modules)))"
    )
    done = in_a_process_of_its_own(code)
    assert done.stdout.strip() == "[]"


def test_the_collector_passes_over_the_libraries_of_our_workers() -> None:
    code = (
        "import gc, numpy as np\n"
        "from stem_dask.job.warm_up import play\n"
        "play(np.dtype('u2'), 'square', True)\n"
        "print(gc.get_freeze_count())\n"
        "play(np.dtype('u2'), 'square', True, owned=True)\n"
        "print((n := gc.get_freeze_count()) > 100_000)\n"
        "kept = [[] for _ in range(1000)]\n"
        "play(np.dtype('u2'), 'square', True, owned=True)\n"
        "print(gc.get_freeze_count() <= n)  # of a later job nothing is kept from the collector"
    )
    done = in_a_process_of_its_own(code)
    assert done.stdout.split() == ["0", "True", "True"]


def test_public_names_agree_with_the_stub() -> None:
    import stem_dask

    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    named = {
        a.asname: (n.module, a.name)
        for n in stub.body
        if isinstance(n, ast.ImportFrom)
        for a in n.names
    }
    assert named == stem_dask._PUBLIC
    for name in named:
        assert getattr(stem_dask, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'utils'"):
        _ = stem_dask.utils


def test_configs_and_templates_of_the_package_are_those_of_the_checkout() -> None:
    """Here they are links, in archives files."""
    inside, outside = PACKAGE / "config", PACKAGE.parent / "configs"
    for pattern in ("*.yaml", "slurm/*.sh"):
        texts = [{p.name: p.read_text() for p in f.glob(pattern)} for f in (inside, outside)]
        assert texts[0] == texts[1]


def test_public_names_are_not_modules() -> None:
    """Importing a module must not put itself in the place of a function: sd.export stays callable."""
    import stem_dask

    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        p.name for p in PACKAGE.iterdir() if p.is_dir()
    }
    assert not modules & set(stem_dask._PUBLIC)
