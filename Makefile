# Needs Python 3.11 or newer; everything else is installed into .venv, in two layers: what running needs (core), and on
# top of it what tests need (torch, diffusers, pytest, ruff). Stamp files make a second call quick.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
CORE   := $(VENV)/.core
TESTS  := $(VENV)/.tests
TESTS_CORE := $(VENV)/.tests-core
CLIENTS := .cache/clients
CUDNN  := .cache/cudnn
FUZZ   := $(VENV)/.fuzz
APP    := $(VENV)/app
APP_PY := $(APP)/bin/python
DOCS   := $(VENV)/docs
DEMO   ?= $(PY) -m experiments.shapes_lcm.demo

.PHONY: help demo demo-full app gpu-day evidence stale notebooks test test-core test-parity test-mutants test-slow \
  test-slow-part test-gpu test-aot test-clients test-cudnn test-app fuzz docs figures lint install install-test clean

help:
	@echo "make demo       distil the embedded teacher, export, sample: images and a table in four to eight minutes"
	@echo "make demo-full  the same, with the teacher's rows of the table computed anew"
	@echo "make app        a page on this machine: its image follows what is typed; runs the demo first, if it has not run"
	@echo "make gpu-day    all that needs a GPU, in BUDGET_S=1500 seconds; resumes when called again; DEVICE=cpu rehearses"
	@echo "make evidence   every experiment whose numbers stand in README and docs; resumes, keeps what is current; hours"
	@echo "make stale      which of them are not current, and why        ONLY=demo,table1: make evidence of some"
	@echo "make notebooks  execute notebooks/ from clean kernels, outputs in place"
	@echo "make test       the default suite        make test-slow  all that takes minutes; test-slow-part: a 14th"
	@echo "make test-core  the tests that need no torch, for a Python that has none (PYTHON=python3.13 VENV=.venv313)"
	@echo "make test-gpu   tests on an accelerator  make test-aot   compiling for GPUs and TPUs, without one"
	@echo "make test-clients  programs that nobody here wrote, on our files: stable-diffusion.cpp, LyCORIS; minutes, 13 GB"
	@echo "make test-cudnn  cuDNN's own answers for GPUs that are not here; 10 minutes, 2.2 GB, needs gcc"
	@echo "make test-app   the page in a headless Chromium; says what to install if there is none"
	@echo "make test-parity   tests against torch and closed forms, and which come nearest to their bounds"
	@echo "make test-mutants  wrong answers that the tests must notice, one after another: 15 minutes"
	@echo "make fuzz       odd files for every reader, SECONDS=600 in all; TARGET=lora: one of them"
	@echo "make docs       the pages of docs/ and of all docstrings: .cache/site/index.html; fails at a link to nowhere"
	@echo "make figures    the figures of README and docs, from stored results"
	@echo "make lint       ruff, and its formatter    make clean"

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11;" \
	  "give another with: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(CORE): setup.py constraints.txt | $(PY)
	$(PIP) --editable .
	@touch $@

$(TESTS): $(CORE)
	$(PIP) --editable '.[test]'
	@touch $@

$(TESTS_CORE): $(CORE)
	$(PIP) --editable '.[test-core]'
	@touch $@

$(FUZZ): $(TESTS)
	$(PIP) --editable '.[fuzz]'
	@touch $@

# A layer on the others, which are tested with a newer Pillow than Gradio takes.
$(APP)/.app: $(CORE)
	$(PY) -m venv $(APP)
	@$(PY) -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > $$($(APP_PY) -c 'import site; print(site.getsitepackages()[0])')/below.pth
	@sed 's/^pillow==.*/pillow==12.3.0/' constraints.txt > $(APP)/constraints.txt
	$(APP_PY) -m pip install --disable-pip-version-check --quiet --constraint $(APP)/constraints.txt --editable '.[app]'
	@touch $@

$(APP)/.tests: $(TESTS) $(APP)/.app
	$(APP_PY) -m pip install --disable-pip-version-check --quiet --constraint $(APP)/constraints.txt \
	  --editable '.[app,test-app]'
	@touch $@

install: $(CORE)

install-test: $(TESTS)

demo: $(CORE)
	$(DEMO)

demo-full: $(CORE)
	$(DEMO) --full

runs/shapes_lcm/export/model_index.json: | $(CORE)
	$(DEMO)

# Compiled programs are kept, so that it starts sooner the next time.
app: $(APP)/.app runs/shapes_lcm/export/model_index.json
	JAX_COMPILATION_CACHE_DIR=.cache/jax $(APP_PY) -m lcm_jax.app --model=runs/shapes_lcm/export \
	  --prompt="a large red star at the left on a white background" --guidance_scale=2

# The accelerator's own jax comes from the extras "cuda" or "tpu".
BUDGET_S ?= 1500
OUT      ?= runs/gpu_day
DEVICE   ?= gpu
gpu-day: $(TESTS)
	$(PY) -m experiments.gpu_day --device=$(DEVICE) --budget_s=$(BUDGET_S) --out=$(OUT)

# Published files and experiments/evidence.json are to be committed together.
ONLY ?=
evidence: $(TESTS)
	$(PY) -m experiments.evidence --only=$(ONLY)

stale: $(CORE)
	$(PY) -m experiments.evidence --stale

# Each has a kernel of its own and trains what it needs.
notebooks: $(TESTS)
	$(PY) -m nbconvert --to notebook --execute --inplace notebooks/*.ipynb

# A file's tests stay in one process: they share models and compiled programs. In the order of tests/conftest.py.
PYTEST := $(PY) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

test: $(TESTS)
	$(PYTEST)

test-core: $(TESTS_CORE)
	$(PYTEST) --without-torch

# Where error over bound is above 1/3 a bound wants a reason: see tests/parity.py. Other processors are imitated by
# XLA_FLAGS=--xla_cpu_max_isa=AVX2, ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and MKL_ENABLE_INSTRUCTIONS=AVX2,
# each alone and together, and `taskset -c 0`; JAX_COMPILATION_CACHE_DIR of its own for each.
test-parity: $(TESTS)
	$(PYTEST) --parity=20 $$(grep --files-with-matches --word-regexp parity tests/test_*.py)

test-mutants: $(TESTS)
	$(PY) tests/mutants.py

test-slow: $(TESTS)
	$(PYTEST) -m slow

# The slow tests in fourteen parts, another one every day: what CI runs. DAY=1 to 14 chooses one.
DAY ?= $(shell date +%j)
test-slow-part: $(TESTS)
	$(PYTEST) -m slow --part=$(DAY)/14

# SECONDS are spread over the readers; TARGET, one of them or several, is in tests/fuzz_targets.py.
SECONDS ?= 600
TARGET  ?=
fuzz: $(FUZZ)
	$(PY) tests/fuzz.py --seconds=$(SECONDS) $(TARGET)

test-gpu: $(TESTS)
	LCM_JAX_TEST_PLATFORMS= $(PY) -m pytest -m gpu

# Every config is traced and lowered; a few programs are compiled, by one process, because libtpu serves no second one.
test-aot: $(TESTS)
	$(PIP) --editable '.[tpu,cuda-aot]'
	$(PYTEST) --dist=load -m aot
	JAX_PLATFORMS=cpu $(PY) -m pytest -m "tpu_aot or gpu_aot"

# A folder of their own keeps them out of the environment that everything else is tested in. Wheels of Python 3.11.
$(CLIENTS)/.installed: Makefile | $(TESTS)
	$(PIP) --no-deps --upgrade --target $(CLIENTS) cyllama==0.2.18 lycoris-lora==4.1.3
	@touch $@

test-clients: $(TESTS) $(CLIENTS)/.installed
	PYTHONPATH=$(CLIENTS) $(PY) -m pytest -m clients

# All in one call: pip replaces the folder nvidia/ as a whole.
$(CUDNN)/.installed: Makefile | $(TESTS)
	$(PIP) --no-deps --upgrade --target $(CUDNN) nvidia-cudnn-cu12==9.28.0.42 nvidia-cudnn-frontend==1.32.0 \
	  nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cublas-cu12==12.9.3.13
	@touch $@

$(CUDNN)/libcuda.so.1: tests/cuda_without_gpu.c $(CUDNN)/.installed
	$(CC) -shared -fPIC -Wall -Wextra -Wl,-soname,$(@F) $< -o $@

test-cudnn: $(TESTS) $(CUDNN)/libcuda.so.1
	LD_LIBRARY_PATH=$$(echo $(CUDNN) $(CUDNN)/nvidia/*/lib | tr ' ' :) PYTHONPATH=$(CUDNN) JAX_PLATFORMS=cpu \
	  $(PY) -m pytest -m cudnn

test-app: $(APP)/.tests
	$(APP_PY) -m pytest -m app tests/test_app.py
	$(APP_PY) -m pytest tests/test_page.py

# A layer on the others, which the site's packages are no part of. Docstrings are read from the sources, not imported.
$(DOCS)/.docs: $(CORE)
	$(PY) -m venv $(DOCS)
	@$(PY) -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > $$($(DOCS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/below.pth
	$(DOCS)/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(DOCS)/.docs
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "$(CURDIR)/.cache/site/index.html"

figures: $(TESTS)
	$(PY) -m experiments.figures

lint: $(TESTS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build dist lcm_jax.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
