# The front door. Every target sets up what it needs; `make help` lists them.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done

PROFILE ?= quickstart
# One more than the cores, since some tests wait for processes that they start.
TEST_JOBS ?= 3
# Time of `make fuzz`.
MINUTES ?= 10
RUN := $(PY) -m benchmarks

# Filters and settings become options only where they are given.
ELSEWHERE := $(if $(DATASETS),--datasets "$(DATASETS)")
FILTERS := $(if $(TASKS),--tasks $(TASKS)) $(if $(MODELS),--models $(MODELS)) \
	$(if $(METHODS),--methods $(METHODS)) $(if $(BITS),--bits $(BITS)) \
	$(if $(SEEDS),--seeds $(SEEDS)) $(if $(AXES),--axes $(AXES)) $(ELSEWHERE)
PLACES := $(if $(IMAGENET),--imagenet "$(IMAGENET)") $(if $(COCO),--coco "$(COCO)") \
	$(if $(FLICKR),--flickr "$(FLICKR)") $(if $(WEIGHTS),--weights "$(WEIGHTS)")
# RAY_ADDRESS in the environment may belong to another program: only the one behind `make` counts.
ADDRESS := $(if $(filter command,$(origin RAY_ADDRESS)),\
	$(if $(RAY_ADDRESS),--ray-address $(RAY_ADDRESS)))
SETTINGS := $(if $(DEVICE),--device $(DEVICE)) $(if $(JOBS),--jobs $(JOBS)) \
	$(if $(filter 1,$(PLAN)),--plan) $(if $(filter 1,$(REHEARSE)),--rehearse) \
	$(if $(filter 1,$(FORCE)),--force) $(if $(PLACEMENT),--placement $(PLACEMENT)) \
	$(if $(RETRIES),--retries $(RETRIES)) $(if $(ENGINE),--engine $(ENGINE)) $(ADDRESS) \
	$(if $(GPUS_PER_CELL),--gpus-per-cell $(GPUS_PER_CELL))

BENCH_OUT := results$(if $(filter 1,$(REFERENCE)),/reference)
BENCH := $(if $(DEVICE),--device $(DEVICE)) $(if $(MODELS),--models $(MODELS)) \
	$(if $(THREADS),--threads $(THREADS)) $(if $(BUDGET),--budget $(BUDGET))

.PHONY: help setup tables reproduce-table diff report doctor bench test test-quick test-portable \
	fuzz lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  reproduce-table takes one of"
	@echo "    TABLE=fimaq|fimaq-ablation|aphq|aphq-coco|adalog|repq|erq|lsvit|glfq|"
	@echo "      glfq-ablation|clip-retrieval"
	@echo "    PROFILE=quickstart|demo|frontier|paper|ablation|paper-ablation|paper-parts|quantizers"
	@echo "  with data IMAGENET=/path COCO=/path FLICKR=/path WEIGHTS=/path,"
	@echo "  filters TASKS= MODELS= METHODS= BITS=w3a3,w4a4 SEEDS= AXES=loss,k=15|none, and"
	@echo "  settings"
	@echo "    DATASETS=imagenet-r=/path,imagenet-c=/path,fog:3 (the same models on other data)"
	@echo "    DEVICE=cpu|cuda|cuda:N JOBS=N PLAN=1 REHEARSE=1 FORCE=1 PLACEMENT=device|host|disk"
	@echo "    RETRIES=N"
	@echo "    ENGINE=ray RAY_ADDRESS=host:port GPUS_PER_CELL=0.5 (on a Ray cluster)"
	@echo "  tables takes TABLE=name IMAGENET= COCO= FLICKR= WEIGHTS= DEVICE="
	@echo "  bench takes DEVICE= MODELS= THREADS=N BUDGET=seconds; it writes speed.json and export.json"
	@echo "    to results/, or with REFERENCE=1 to results/reference/"

setup: $(STAMP) ## make the virtual environment in .venv

# The stamp is written last, so that an interrupted set-up is repeated.
$(STAMP): requirements/lock.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check uv
	@echo "installing packages into $(VENV)"
	@$(PY) -m uv pip install --quiet --compile-bytecode --python $(PY) --no-deps \
		-r requirements/lock.txt
	@$(PY) -m uv pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	@touch $@

tables: $(STAMP) ## list the published tables: cells, data, weights, expected time and memory
	@$(RUN) published $(if $(TABLE),--table $(TABLE)) $(PLACES) $(if $(DEVICE),--device $(DEVICE))

reproduce-table: $(STAMP) ## measure a published table (TABLE=fimaq) or a profile
	@$(RUN) run --report $(if $(TABLE),--table $(TABLE),--profile $(PROFILE)) $(FILTERS) $(PLACES) \
		$(SETTINGS)

# Exit code 1 if results differ or are too uncertain, 2 if a record cannot be read. Without
# comparable results it is 0.
diff: $(STAMP) ## compare measured with published numbers
	@$(RUN) diff --allow-nothing

report: $(STAMP) ## write results/report.html: tables, charts, example predictions
	@$(RUN) report --profile $(PROFILE) $(ELSEWHERE) $(PLACES)

doctor: $(STAMP) ## say what this machine can run, and what to do about the rest
	@$(RUN) doctor --profile $(PROFILE) $(PLACES)

bench: $(STAMP) ## time every stage and step engine, and exports to ONNX beside float32
	@$(PY) -m benchmarks.speed $(BENCH) --output $(BENCH_OUT)/speed.json \
		--export $(BENCH_OUT)/export.json

# Tests of one file share fixtures: each worker takes its share in order, then steals from others.
TESTS := $(PY) -m pytest -n $(TEST_JOBS) --dist worksteal

test: $(STAMP) ## run all tests
	@$(TESTS)

test-quick: $(STAMP) ## run all tests but the slow ones
	@$(TESTS) -m "not slow"

test-portable: $(STAMP) ## run all tests as on other processors (RUNS="avx2-1 busy")
	@$(PY) scripts/test_portable.py --jobs $(TEST_JOBS) $(RUNS)

fuzz: $(STAMP) ## try random files of every kind for MINUTES=10, and count the cases
	@$(PY) scripts/fuzz.py --minutes $(MINUTES)

lint: $(STAMP) ## ruff, mypy (strict on fimaq_core), and which package may import which
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports --no-logo --no-cache

format: $(STAMP) ## format the code
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean: ## remove the virtual environment and everything that runs wrote
	rm -rf $(VENV) $(addprefix results/,runs tables calibration mlp reconstruction rehearsal \
		speed.json export.json report.html)
