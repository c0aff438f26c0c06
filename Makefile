# Every target makes its own environment: python3 (3.11 or newer, for the pinned versions) and make are enough.
PYTHON ?= python3
BIN := .venv/bin
OFFLINE := HF_HUB_OFFLINE=1
# make test K=esd runs the tests whose names contain esd
K ?=
GRID ?= bench/canvas_first.yaml

.PHONY: demo test check fix docs bench clean setup
.DEFAULT_GOAL := demo

demo: .venv/.ready
	$(BIN)/unlearn demo

test: .venv/.ready
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q $(if $(K),-k '$(K)')

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(OFFLINE) $(BIN)/python -m pytest -q tests/shape

fix: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.ready
	$(OFFLINE) $(BIN)/mkdocs build --strict

bench: .venv/.ready
	$(BIN)/unlearn bench $(GRID) --check

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis site build src/*.egg-info

setup: .venv/.ready

# uv comes first because it installs the rest in a tenth of the time; its version is pinned with the others.
.venv/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned versions need Python 3.11 or newer; run: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^uv==' requirements.txt)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@
