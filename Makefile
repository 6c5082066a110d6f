# make demo, make test: each installs into .venv first if that is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
RANKS ?= $(shell $(VENV)/bin/python -c "import torch; print(min(2, torch.cuda.device_count()) or 2)")

.PHONY: help install demo test mutants lint format clean

help:
	@echo "make demo    train a small model on two ranks (GPUs if there are any), in about three minutes"
	@echo "make test    run all tests"
	@echo "make mutants plant faults in a copy of the code and see the tests catch each"
	@echo "make lint    check style;  make format  apply it"
	@echo "make install create $(VENV) and install into it;  make clean  remove it"

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

demo: install
	OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --nproc-per-node=$(RANKS) -m gqa_parallel.launch.train \
		experiment=demo parallel.tp=$(RANKS) $(ARGS)

test: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(ARGS)

mutants: install
	$(VENV)/bin/python -m tests.mutation_check

lint: install
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

format: install
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .ruff_cache
