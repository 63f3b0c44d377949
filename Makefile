# `make demo` and `make test` set up .venv with locked versions, once, and then do what they say.
# Inside an environment that has Detectron2 already none of this is needed: `pip install -e .`

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help demo test lint clean

help:
	@echo "make demo    train FCOS on generated shapes, evaluate it, draw curves and detections"
	@echo "make test    run ruff and the tests"
	@echo "make lint    run ruff alone"
	@echo "make clean   remove .venv and caches, but neither datasets/ nor output/"
	@echo "PYTHON=...   the interpreter (3.11 or newer) that .venv is made with"

demo: $(STAMP)
	$(VENV_PYTHON) train_net.py --config-file configs/FCOS_Shapes.yaml

test: lint
	$(VENV_PYTHON) -m pytest -q

lint: $(STAMP)
	$(VENV_PYTHON) -m ruff check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last: a set-up that stopped midway is continued by the next call.
$(STAMP): requirements.txt setup.py tools/install_detectron2.py
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; \
	    sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, not {v.major}.{v.minor}: set PYTHON=")'
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV)
	$(VENV_PYTHON) -m pip install -r requirements.txt
	$(VENV_PYTHON) tools/install_detectron2.py
	$(VENV_PYTHON) -m pip install --no-deps --no-build-isolation -e .
	@touch $@
