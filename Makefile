# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

# The lock leaves torch out, so that its build (CPU, CUDA) can be chosen. It is installed first and by itself.
TORCH ?= torch==2.13.0
# Exact versions of all other packages. LOCK=/dev/null takes the newest that pyproject.toml allows.
LOCK ?= requirements.lock
PIP := $(BIN)/pip --quiet --disable-pip-version-check
QUANTIZATION := bitsandbytes==0.50.2 torchao==0.18.0
# gptqmodel asks for a newer torch than the lock has, and works with the lock's. So its dependencies are named here.
QUANTIZATION += gptqmodel==7.7.0 optimum==2.3.0 defuser==0.0.28 device-smi==0.5.7 logbar==0.4.15 pypcre==0.6.4 \
	threadpoolctl==3.8.0 tokenicer==0.0.14

# Ray and the packages it needs besides those of the lock.
RAY := ray==2.60.0 msgpack==1.2.4 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 \
	rpds-py==2026.9.1

.PHONY: help test test-kills test-malformed test-quantized test-ray test-regress regress ray-costs baselines lint docs peft-suite examples lock tiny-base leaderboard report check-tables reproduce-table10 reproduce-fig4 clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z0-9%-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

.venv/ready: pyproject.toml $(LOCK)
	$(PYTHON) -m venv .venv
	$(PIP) install --constraint $(LOCK) $(TORCH)
	$(PIP) install --constraint $(LOCK) --editable '.[dev]'
	touch $@

test: .venv/ready ## run the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -q $(if $(ARGS),,--junitxml=results/local/test-suite.xml) $(ARGS)

regress: .venv/ready ## compare a short run and timings with the committed figures (ARGS=--update writes them again)
	$(BIN)/python -m bench.regress $(ARGS)

# The file is not collected by itself, because it takes a minute.
test-regress: .venv/ready ## check that `make regress` finds regressions that are planted
	$(BIN)/python -m pytest -q tests/bench/regress/planted_regressions.py $(ARGS)

test-malformed: .venv/ready ## run the tests of malformed input with 20,000 inputs instead of 2,000
	MALORA_MALFORMED=20000 $(BIN)/python -m pytest -q tests/bench/cli/test_malformed.py $(ARGS)

# In a folder of their own: PEFT imports them wherever it finds them, which slows down every other command.
.quantization/ready: .venv/ready
	$(PIP) install --no-deps --upgrade --target .quantization $(QUANTIZATION)
	touch $@

test-kills: .venv/ready ## kill commands at 100 random moments, and check what they leave (nightly; takes minutes)
	MALORA_KILLS=100 $(BIN)/python -m pytest -q tests/bench/cli/test_kills.py $(ARGS)

test-quantized: .quantization/ready ## run the tests of quantized models: bitsandbytes, torchao, GPTQ
	PYTHONPATH=$(CURDIR)/.quantization $(BIN)/python -m pytest -q -k "quantiz or bitsandbytes or torchao or qlora" \
		tests/malora/test_layer.py tests/malora/test_quantized_bases.py tests/bench/models/test_quantized.py \
		tests/examples $(ARGS)

# In a folder of its own: it is large, and only --engine ray needs it.
.ray/ready: .venv/ready
	$(PIP) install --no-deps --upgrade --target .ray $(RAY)
	touch $@

test-ray: .ray/ready ## run the tests of --engine ray on a cluster of this machine, one of whose workers is killed
	PYTHONPATH=$(CURDIR)/.ray $(BIN)/python -m pytest -q tests/bench/runs/test_ray_engine.py $(ARGS)

ray-costs: .ray/ready ## measure what Ray and the shared folder cost per run, and simulate 10,000 runs on 100 GPUs
	PYTHONPATH=$(CURDIR):$(CURDIR)/.ray $(BIN)/python .ci/ray_costs.py $(ARGS)

# In a folder of their own: Unsloth patches transformers, and wants other versions of some packages.
.baselines/ready: .venv/ready bench/speed/loops/external/requirements.txt
	$(PIP) install --no-deps --upgrade --target .baselines --requirement bench/speed/loops/external/requirements.txt
	touch $@

baselines: .baselines/ready ## install what bench.speed --loop compares with in a worker process: Unsloth

lint: .venv/ready ## check style, formatting, types, spelling and which package imports which
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLW1514 .  # text files are UTF-8, whatever the locale
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

docs: .venv/ready ## build the documentation into site/
	$(BIN)/mkdocs build --strict

peft-suite: .venv/ready ## run PEFT's own tests with our adapters (ARGS=--all: every method)
	$(BIN)/python .ci/peft_suite $(ARGS)

examples: .venv/ready ## run each example with two steps
	$(BIN)/python -m pytest -q tests/examples $(ARGS)

reproduce-%: .venv/ready ## run table1, 2, 3, 11, 12, fig2, 3 or 5 at this machine's size, into results/local
	$(BIN)/python -m bench $* $(ARGS)

reproduce-table10: .venv/ready ## measure Table 10 and Figure 4c on this machine, into results/local/speed
	$(BIN)/python -m bench.speed --variant all $(ARGS)

reproduce-fig4: reproduce-table11 reproduce-table12 ## run Figures 4a and 4b; 4c is reproduce-table10

tiny-base: .venv/ready ## train the tiny base again into results/local/tiny-base, and compare it with the shipped one
	$(BIN)/python -m bench.models.make_tiny results/local/tiny-base

leaderboard: .venv/ready ## write the tables and the README's leaderboard from the published records
	$(BIN)/python -m bench leaderboard

report: .venv/ready ## write one HTML page of all published records, into results/local
	$(BIN)/python -m bench report

check-tables: .venv/ready ## check that the tables match the records
	$(BIN)/python -m bench leaderboard --check

lock: ## resolve requirements.lock again, with the newest versions that pyproject.toml allows
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip --quiet --disable-pip-version-check install $(TORCH)
	.venv-lock/bin/pip --quiet --disable-pip-version-check install --editable '.[dev]'
	.venv-lock/bin/python .ci/lock.py >$(LOCK)
	rm -rf .venv-lock

clean: ## remove the virtual environment and this machine's results
	rm -rf .venv .venv-lock .quantization .ray .baselines results/local site
