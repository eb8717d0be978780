# make demo | make test | make check | make bench: each creates the environment itself where it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# the demo needs two unequal ranks; more processes than cores would hide imbalance, and more than 8 show no more
RANKS ?= $(shell $(PYTHON) -c 'import os; print(max(2, min(8, len(os.sched_getaffinity(0)))))' 2>/dev/null || echo 2)

.PHONY: demo test check bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py --ranks $(RANKS)

# more tests at a time than cores, as most wait for processes; then those that other tests would disturb; a second part
# also when tests of the first failed, but not after Ctrl-C
test: check
	@$(BIN)/python -m pytest -m "not alone" -n 4 --dist worksteal; first=$$?; \
	[ $$first -le 1 ] && $(BIN)/python -m pytest -m alone && { \
		[ $$first -eq 0 ] || echo "tests of the first part failed: see its summary above"; exit $$first; }

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# the installed package, as a user has it: a plain install beside the editable one
	rm -rf build
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation --no-compile --upgrade --target build/installed .
	MYPYPATH=build/installed $(BIN)/mypy -p heteromesh
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python benchmarks/planner.py
	$(BIN)/python benchmarks/even_split.py
	$(BIN)/python benchmarks/trainer_overhead.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("heteromesh needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "creating the environment in $(VENV) (once; a minute or so)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@
