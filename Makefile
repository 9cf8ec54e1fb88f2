# The README's commands. Everything happens in .venv; nothing is done twice.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two processes, whatever the cores: each holds a PyTorch. Threads that wait leave their core to
# the other process.
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest --numprocesses 2 --dist worksteal
QUALITY := --out benchmarks/results
SOURCES := $(shell find csrc -type f)
# What `make asan` checks: the instruction set that this machine uses, or DEFAULT, AVX2, ...
ISA := best
# Before Python itself, which is not built with them: the sanitizers', and C++'s, which they need.
CHECKED := detect_leaks=0:allocator_may_return_null=1
RUNTIMES = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))

.PHONY: sample test test-slow asan bench bench-unet quality theory gpu-audit cuda-check lint format doctor venv clean

sample: venv  ## draw the digits 0-9 with the model that comes with fastdiff: samples.png
	$(RUN) -m fastdiff sample --out samples.png --per-class 5 --compare

test: venv  ## the whole test suite
	$(PYTEST)

test-slow: venv  ## the tests that `make test` leaves out for their time: 15 minutes
	$(PYTEST) -m slow

asan: venv  ## the operations' tests, their C++ under the address and undefined behaviour sanitizers
	rm -rf build/asan
	FASTDIFF_SANITIZE=$(ISA) FASTDIFF_CPU=1 FASTDIFF_CUDA=0 \
		$(RUN) -W ignore setup.py -q build --build-lib build/asan
	cd build/asan && LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=$(CHECKED) \
		$(abspath $(RUN)) -m pytest -c $(CURDIR)/pyproject.toml $(CURDIR)/tests/ops $(ASAN)

bench: venv  ## the benchmarks, peers side by side
	$(RUN) -m pytest benchmarks --benchmark-only --figures benchmarks/results

bench-unet: $(VENV)/.peers  ## a U-Net compiled by fastdiff and by every peer: tables, an hour
	$(RUN) -m benchmarks.unet --sampling --breakdown $(UNET)

quality: $(VENV)/.plot  ## Frechet distance of every sampler against evaluations: table and plot, 40 minutes
	$(RUN) -m benchmarks.sampler_quality $(QUALITY)

theory: $(VENV)/.plot  ## train every objective on the digits and measure it: tables and pictures, 2 hours
	$(RUN) -m benchmarks.objectives --out benchmarks/results --runs runs/objectives
	$(RUN) -m benchmarks.adaptive_steps --checkpoint runs/objectives/dsm-vp --out benchmarks/results

gpu-audit: venv  ## compile every GPU kernel for sm_80, 90 and 100: registers, spills, access widths, bytes
	$(RUN) -m tools.audit $(AUDIT)

cuda-check: venv  ## compile and link the CUDA part with nvcc, against whatever torch there is
	$(RUN) -m tools.build.cuda_check

lint: $(VENV)/.lint  ## ruff, mypy and clang-format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(filter %.cpp %.h %.cu %.cuh,$(SOURCES))

format: $(VENV)/.lint  ## rewrite the sources in the project's format
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(filter %.cpp %.h %.cu %.cuh,$(SOURCES))

doctor: venv  ## what runs here, and whether it is right
	$(RUN) -m fastdiff doctor

venv: $(VENV)/.built  ## set up .venv and build the C++ extension

clean:  ## remove what the commands above made
	rm -rf $(VENV) build fastdiff/_C.* fastdiff/_cuda.* fastdiff.egg-info samples.png

$(VENV)/.torch: constraints.txt
	@echo "setting up $(VENV)" >&2
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools ninja pybind11
	touch $@

$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	@echo "building the C++ extension" >&2
	$(PIP) --no-build-isolation --editable '.[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.built
	$(PIP) --no-build-isolation --editable '.[lint]'
	touch $@

$(VENV)/.plot: $(VENV)/.built
	$(PIP) --no-build-isolation --editable '.[plot]'
	touch $@

$(VENV)/.peers: $(VENV)/.built
	$(PIP) --no-build-isolation --editable '.[peers]'
	touch $@
