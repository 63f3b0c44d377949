# Every target creates .venv with the locked versions first, once.
# In an environment that already has Detectron2, `pip install -e .` is enough.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help demo test test-fast coverage lint docs clean

help:
	@echo "make demo       train FCOS on generated shapes, evaluate it, draw curves and detections"
	@echo "make test       run the linters and all tests"
	@echo "make test-fast  run the tests that are not marked slow"
	@echo "make coverage   run all tests and report the lines that they miss"
	@echo "make lint       run ruff, mypy and import-linter"
	@echo "make docs       build the documentation into site/"
	@echo "make clean      remove .venv, site/ and caches, but keep datasets/ and output/"
	@echo "PYTHON=...      interpreter for .venv (Python 3.10 or newer)"

demo: $(STAMP)
	$(VENV_PYTHON) train_net.py --config-file configs/FCOS_Shapes.yaml

test: lint
	$(VENV_PYTHON) -m pytest -q

test-fast: $(STAMP)
	$(VENV_PYTHON) -m pytest -q -m "not slow"

coverage: $(STAMP)
	$(VENV_PYTHON) -m pytest -q --cov

lint: $(STAMP)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy
	$(VENV)/bin/lint-imports

docs: $(STAMP)
	$(VENV_PYTHON) tools/config_page.py
	$(VENV_PYTHON) -m mkdocs build --strict

clean:
	rm -rf $(VENV) site build *.egg-info .coverage .mypy_cache .import_linter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an interrupted set-up continues with the next call.
$(STAMP): requirements.txt setup.py tools/install_detectron2.py
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; \
	    sys.exit(v < (3, 10) and f"Python 3.10 or newer is required, not {v.major}.{v.minor}: set PYTHON=")'
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	$(VENV_PYTHON) -m pip install -r requirements.txt
	$(VENV_PYTHON) tools/install_detectron2.py
	$(VENV_PYTHON) -m pip install --no-deps --no-build-isolation -e .
	@touch $@
