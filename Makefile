# Everything runs in .venv, which is made when first needed.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

# Installed first and by itself, so that nothing else decides which build comes.
TORCH ?= torch==2.13.0

.PHONY: test lint leaderboard report check-tables reproduce-table10 reproduce-fig4 clean
.DEFAULT_GOAL := help

help: ## what there is
	@grep -E '^[a-z0-9%-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

test: .venv/ready ## the whole test suite
	$(BIN)/python -m pytest -n 2 -q $(ARGS)

lint: .venv/ready ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

reproduce-%: .venv/ready ## table1, 2, 3, 11, 12, fig2, 3, 5 at the size this machine can do, into results/local
	$(BIN)/python -m bench $* $(ARGS)

reproduce-table10: .venv/ready ## Table 10 and Figure 4c on this machine, into results/local/speed
	$(BIN)/python -m bench.speed --variant all $(ARGS)

reproduce-fig4: reproduce-table11 reproduce-table12 ## Figures 4a and 4b; 4c is reproduce-table10

leaderboard: .venv/ready ## tables and the README's leaderboard, from the published records
	$(BIN)/python -m bench leaderboard

report: .venv/ready ## one HTML page of all published records, into results/local
	$(BIN)/python -m bench report

check-tables: .venv/ready ## whether they are what the records give
	$(BIN)/python -m bench leaderboard --check

clean: ## the virtual environment and what this machine has run
	rm -rf .venv results/local
