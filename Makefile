# `make demo` and `make test` do everything a fresh machine needs: virtual environment, dependencies, build.
# TORCH picks another torch; PYTHON another interpreter; HIP how the HIP library is built: by clang-22 where it is there.
PYTHON ?= python3
TORCH ?= torch==2.13.0
HIP ?= $(if $(shell command -v clang++-22 && command -v ld.lld-22 && command -v llvm-as-22),cross,AUTO)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(HIP)
SOURCES := $(shell find csrc_common csrc_cpu csrc_cuda csrc_hip cmake -type f 2>/dev/null) CMakeLists.txt pyproject.toml

.PHONY: demo test lint install clean

demo: install
	$(BIN)/latentkv demo

test: install
	$(BIN)/python -m pytest -n auto

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.c' '*.cu' '*.h' '*.cpp')

install: $(INSTALLED)

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '$(TORCH)' numpy
	touch $@

# Editable: changes in python/ act at once, changes in csrc_*/ rebuild the libraries.
$(INSTALLED): $(VENV)/torch $(SOURCES)
	$(BIN)/pip install --quiet 'scikit-build-core>=0.11' 'cmake>=3.26' ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]' -C cmake.define.LATENTKV_HIP=$(HIP)
	rm -f $(VENV)/installed-*
	touch $@

clean:
	rm -rf $(VENV) build dist
