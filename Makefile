# make demo    train, check, export and card a GPT on text that every Python has: two minutes after installation
# make test    what CI runs: lint, types, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# where torch comes from, for example PyTorch's own index of CPU builds; empty: wherever pip is set up to look
TORCH_INDEX ?=

.PHONY: demo test slow faults bench clean

demo: $(VENV)/demo.stamp
	$(BIN)/handmill demo

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not faults"

slow: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# kills, flipped bits, full disks, hung processes: real ones, into real runs of every family; writes docs/faults.md
faults: $(VENV)/test.stamp
	rm -f faults.jsonl
	OMP_NUM_THREADS=1 HANDMILL_FAULTS=$(CURDIR)/faults.jsonl $(BIN)/python -m pytest tests/faults
	$(BIN)/python tests/faults/table.py faults.jsonl > docs/faults.md

bench: $(VENV)/test.stamp
	$(BIN)/python benchmarks/shakespeare.py
	$(BIN)/python benchmarks/step.py

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f'Handmill needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)

# torch goes first and pinned: what comes after finds it there and brings no other build with gigabytes of CUDA packages
$(VENV)/torch.stamp: $(VENV)/bin/python constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[serve,onnx]'
	touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info
