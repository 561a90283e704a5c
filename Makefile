# make run     set up if needed, then run the main job on a simulated dataset (ARGS="input.path=scan.dm4 ..." for yours)
# make test    set up if needed, then run the tests
# make test-lowest    the same with the lowest versions that pyproject.toml allows, in .venv-lowest; ARGS="tests/test_dm.py" for a part
# make test-faults    kill, corrupt and starve real runs
# make test-slurm     run jobs, job arrays and templates on a real SLURM; skipped with a reason if there is none
# make test-peers     open our HDF5 files in py4DSTEM, LiberTEM, pyxem and xarray (2 GB of environments in .peers)
# make slurm-ci       install a SLURM for make test-slurm on this machine (Debian, as root)
# make browser-ci     install Chromium for the tests of the report on this machine (Debian, as root)
# make docs    build the documentation in build/docs
# make lint    style and types
# make dist    build the source archive and the wheel, in dist/
# make bench   repeat rows of the benchmark table and print the difference to the committed result (benchmarks/README.md)
PYTHON ?= python3
VENV   ?= .venv
PEERS  ?= .peers
PIP    := $(VENV)/bin/python -m pip install --quiet -c constraints.txt
CONFIG ?= configs/crop.yaml
ARGS   ?=

.PHONY: run test test-faults test-lowest test-slurm test-peers slurm-ci browser-ci lint docs dist bench clean

run: $(VENV)/run.done
	$(VENV)/bin/python -m stem_dask.run $(CONFIG) $(ARGS)

# tests start many processes, and each would compile the package again if the environment disables bytecode
test: $(VENV)/test.done
	PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "not faults and not slurm" $(ARGS)

test-lowest: $(VENV)-lowest/test.done
	PYTHONDONTWRITEBYTECODE= $(VENV)-lowest/bin/python -m pytest -q -n 2 --dist worksteal -m "not faults and not slurm" $(ARGS)

test-faults: $(VENV)/test.done
	PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m faults tests/faults $(ARGS)

test-slurm: $(VENV)/test.done
	$(VENV)/bin/python -m pytest -q -m slurm tests/test_slurm.py $(ARGS)

# environments of their own, because these programs need other versions of numpy and zarr
test-peers: $(VENV)/test.done
	test -x $(PEERS)/py4dstem/bin/python || $(PYTHON) -m venv $(PEERS)/py4dstem
	test -x $(PEERS)/others/bin/python || $(PYTHON) -m venv $(PEERS)/others
	$(PEERS)/py4dstem/bin/python -m pip install --quiet 'py4DSTEM==0.14.18' hdf5plugin
	$(PEERS)/others/bin/python -m pip install --quiet 'libertem==0.16.*' 'pyxem>=0.21' h5netcdf hdf5plugin
	PEERS=$(PEERS) $(VENV)/bin/python -m pytest -q -m peers tests/test_hdf5_layout.py $(ARGS)

slurm-ci:
	command -v slurmctld munged > /dev/null || { apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge; }

browser-ci:
	command -v chromium > /dev/null || { apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; }

lint: $(VENV)/test.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

dist: $(VENV)/test.done
	$(PIP) build
	$(VENV)/bin/python -m build

docs: $(VENV)/docs.done
	$(VENV)/bin/python -m sphinx -b html -c docs -q -W --keep-going . build/docs
	@echo "open build/docs/index.html"

bench: $(VENV)/test.done
	$(VENV)/bin/python -m benchmarks.table --compare benchmarks/results/half.json $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-lowest dist out build *.egg-info

# marks the installed packages, so that a second call takes no time
$(VENV)/run.done: pyproject.toml constraints.txt
	@echo "setting up $(VENV): about 0.5 GB to download, 1 to 6 minutes; the job follows"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[torch,hyperspy]'
	@touch $@

$(VENV)/docs.done: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[torch,hyperspy,docs]'
	@touch $@

$(VENV)/test.done: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[torch,test,gpu-compile]'
	@touch $@ $(VENV)/run.done

$(VENV)-lowest/test.done: pyproject.toml constraints.txt tests/lowest.py
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python tests/lowest.py > $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/python -m pip install --quiet -c $(VENV)-lowest/lowest.txt -e '.[torch,test]'
	@touch $@
