# The project's commands; `make help` lists them. Everything happens in .venv, and what is there is
# not made again. `make PYTHON=python3.12 ...` chooses the Python that .venv is made with.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Without bytecode for thousands of modules: Python writes what it imports. -qq: errors alone.
PIP := $(RUN) -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt
# Two processes, whatever the cores: each holds a PyTorch. Threads that wait leave their core to
# the other process.
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest --numprocesses 2 --dist worksteal
QUALITY := --out benchmarks/results
AUDIT := --figures benchmarks/results
# Everything that a compiled extension depends on: it is built again when one of these changes.
BUILT_FROM := setup.py pyproject.toml $(shell find csrc tools/build -type f -not -name '*.pyc')
FORMATTED := $(shell find csrc tests tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The instruction set that `make asan` checks: the one that this machine uses (best), or DEFAULT,
# AVX2, AVX512, AVX512_BF16.
ISA := best
# `make asan` preloads the sanitizers and the C++ library that they need, since Python was not
# linked with them. PyTorch never frees some memory and tries to allocate too much on purpose.
CHECKED := detect_leaks=0:allocator_may_return_null=1
RUNTIMES = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))

# $(call timed,what,command) runs the command and notes its seconds, for `make sample` to show.
timed = began=$$(date +%s) && $(2) && \
	echo "$(1): $$(($$(date +%s) - began)) s" >> $(VENV)/took

.PHONY: help sample test test-slow diffusers-tests asan bench bench-unet bench-bf16 bench-train \
	bench-distributed bench-pipelines learning scaling quality theory few-step emoji emoji-quality soak gpu \
	gpu-audit cuda-check wheel lint format doctor venv clean

help:  ## list these commands
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*## +/\t/' | expand -t 14

sample: venv  ## draw the digits 0-9 with the model that comes with fastdiff: samples.png
	@$(call timed,sampled,$(RUN) -m fastdiff sample --out samples.png --per-class 5 --compare)
	@echo && cat $(VENV)/took && rm $(VENV)/took
	@echo "Next: '$(VENV)/bin/fastdiff --help' for sampling and training of your own," \
		"'make doctor' for what runs here, 'make help' for the rest."

test: $(VENV)/.test  ## the whole test suite
	$(PYTEST)

test-slow: $(VENV)/.test  ## the tests that `make test` leaves out for their time: 15 minutes
	$(PYTEST) -m slow

diffusers-tests: $(VENV)/.test  ## diffusers' own tests with fastdiff's classes; CHECKOUT is its repository
	$(RUN) -m tools.diffusers_tests $(CHECKOUT) $(TESTS)

# pythonpath is without the root, whose fastdiff has an extension without sanitizers.
asan: $(VENV)/.test  ## the operations' tests, their C++ under the address and undefined behaviour sanitizers
	rm -rf build/asan
	FASTDIFF_SANITIZE=$(ISA) FASTDIFF_CPU=1 FASTDIFF_CUDA=0 \
		$(RUN) -W ignore setup.py -q build --build-lib build/asan
	cd build/asan && LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=$(CHECKED) \
		$(abspath $(RUN)) -m pytest -c $(CURDIR)/pyproject.toml -o pythonpath=tests/ops \
		$(CURDIR)/tests/ops $(ASAN)

bench: $(VENV)/.test  ## the benchmarks, peers side by side
	$(RUN) -m pytest benchmarks --benchmark-only --figures benchmarks/results

bench-unet: $(VENV)/.test $(VENV)/.peers  ## a U-Net compiled by fastdiff and by every peer: tables, an hour
	$(RUN) -m benchmarks.unet --sampling --breakdown $(UNET)

bench-bf16: $(VENV)/.test $(VENV)/.peers  ## float32 and bfloat16 beside the best peers: time, memory, first calls
	$(RUN) -m benchmarks.unet --suite bfloat16 $(UNET)

bench-train: $(VENV)/.test $(VENV)/.peers  ## whole training steps by fastdiff and every peer: time, memory, parts
	$(RUN) -m benchmarks.training $(TRAIN)

bench-distributed: $(VENV)/.test  ## training steps by one process of two threads and by two processes of one
	$(RUN) -m benchmarks.distributed $(DISTRIBUTED)

bench-pipelines: $(VENV)/.test $(VENV)/.peers  ## whole calls of a diffusers pipeline by fastdiff and every peer
	$(RUN) -m benchmarks.pipelines $(PIPELINES)

learning: $(VENV)/.plot  ## train the digits in eager mode and compiled, three seeds: table and picture
	$(RUN) -m benchmarks.learning $(QUALITY)

scaling: $(VENV)/.test $(VENV)/.peers $(VENV)/.plot  ## time against batch, image size and threads: table and plot, an hour
	$(RUN) -m benchmarks.unet --suite scaling --resume --limit 300 $(UNET)

quality: $(VENV)/.plot  ## Frechet distance of every sampler against evaluations: table and plot, 40 minutes
	$(RUN) -m benchmarks.sampler_quality $(QUALITY)

theory: $(VENV)/.plot  ## train every objective on the digits and measure it: tables and pictures, 2 hours
	$(RUN) -m benchmarks.objectives --out benchmarks/results --runs runs/objectives
	$(RUN) -m benchmarks.adaptive_steps --checkpoint runs/objectives/dsm-vp --out benchmarks/results

few-step: $(VENV)/.test  ## train models for a few steps on the digits, beside their teachers: table and picture, an hour
	$(RUN) -m benchmarks.few_steps --out benchmarks/results --runs runs/few-steps

# One thread and these options are what the model that comes along was trained with.
emoji: $(VENV)/.emoji data/emoji  ## train the emoji model that comes along: images, 10000 steps, float16; 1.5 hours
	$(RUN) -m fastdiff train --data data/emoji --image-size 32 --out runs/emoji \
		--channels 32,64,96,96 --attention 2,3 --label-dropout 0.1 --weighting min_snr \
		--timestep-sampler low-discrepancy --batch-size 32 --steps 10000 --warmup 300 --bf16 --threads 1
	$(RUN) -m fastdiff export --checkpoint runs/emoji --out runs/emoji/float16 --dtype float16

emoji-quality: venv data/emoji  ## the emoji model by guidance, sampler, precision, beside held-out emoji: table, 15 minutes
	$(RUN) -m benchmarks.emoji_quality $(QUALITY)

data/emoji: | $(VENV)/.emoji
	$(RUN) -m tools.emoji_images --out $@

soak: $(VENV)/.test  ## interrupt a training run again and again; nothing may be lost: 10 minutes
	$(RUN) -m tools.soak $(SOAK)

gpu:  ## on a machine with a GPU and a PyTorch of its own: test and time all kernels, 10 minutes
	$(PYTHON) -m tools.gpu $(GPU)

gpu-audit: $(VENV)/.test  ## compile every GPU kernel for sm_80, 90 and 100: registers, spills, access widths, bytes
	$(RUN) -m tools.audit $(AUDIT)

cuda-check: venv  ## compile and link the CUDA part with nvcc, against whatever torch there is
	$(RUN) -m tools.build.cuda_check

wheel: venv  ## a wheel with the kernels for every instruction set: dist/
	$(RUN) -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist/*.whl

lint: $(VENV)/.lint  ## ruff, mypy and clang-format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/.lint  ## rewrite the sources in the project's format
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

doctor: venv  ## what runs here, and whether it is right
	$(RUN) -m fastdiff doctor

venv: $(VENV)/.built  ## set up .venv and build the C++ extension

clean:  ## remove what the commands above made
	rm -rf $(VENV) build dist fastdiff/_C.* fastdiff/_cuda.* fastdiff.egg-info samples.png

$(VENV)/.torch: constraints.txt
	@echo "installing PyTorch into $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(call timed,installed PyTorch,$(PIP) torch setuptools ninja pybind11)
	@touch $@

# With what fastdiff itself needs and no more; the tests' packages are not waited for.
$(VENV)/.built: $(VENV)/.torch $(BUILT_FROM)
	@echo "compiling the C++ extension for this processor: a minute or two" >&2
	@$(call timed,compiled and installed fastdiff,$(PIP) --no-build-isolation --editable .)
	@touch $@

# .venv/.test, .lint, .plot, .peers: the extras of pyproject.toml, beside what is installed.
$(VENV)/.%: $(VENV)/.built
	@echo "installing what 'make $(firstword $(MAKECMDGOALS))' needs besides: fastdiff[$*]" >&2
	@$(PIP) 'fastdiff[$*]'
	@touch $@
