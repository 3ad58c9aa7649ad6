# make install | demo | results | test | test-all | test-fast | lint | clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEACHER := results/weights/digits-resnet20.safetensors

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no virtual environment could be made (on Debian: apt-get install python3-venv)"; exit 1; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,export]'
	@touch $@

$(TEACHER): | install
	$(BIN)/dfqbench pretrain digits --out $@

demo: install $(TEACHER)
	$(BIN)/dfqbench run quickstart
	$(BIN)/dfqbench table quickstart
	$(BIN)/dfqbench plot quickstart

# tables, plots and report of every reference store, from its files alone; the same files give the same bytes
results: install
	@set -e; for store in $(sort $(patsubst %/runs/,%,$(dir $(wildcard results/reference/*/runs/*)))); do \
		mkdir -p $$store/tables; \
		for format in markdown:table.md latex:table.tex csv:cells.csv csv-means:means.csv; do \
			$(BIN)/dfqbench table --results $$store --format $${format%%:*} > $$store/tables/$${format#*:}; \
		done; \
		$(BIN)/dfqbench plot --results $$store; \
		$(BIN)/dfqbench report --results $$store; \
	done

test: install
	$(BIN)/pytest --numprocesses auto --ignore tests/slurm
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder tests/slurm

# and the cases of long tables of networks and formats that `make test` leaves out
test-all: install
	$(BIN)/pytest --numprocesses auto --ignore tests/slurm --thorough
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder tests/slurm

# all but the slow tests and Slurm's: under 90 seconds on two cores
test-fast: install
	$(BIN)/pytest --numprocesses auto --ignore tests/slurm -m 'not slow'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .grimp_cache dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: install demo results test test-all test-fast lint clean
