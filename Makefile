# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
# PYTHON names the interpreter that makes it, 3.11 or newer:  make demo PYTHON=python3.12
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$name && break; done)

.PHONY: demo test lint clean
.DEFAULT_GOAL := demo

# Git does not keep the reference checkpoints' code beside their weights.
REFERENCE_CODE = .venv/bin/python -m adavtp.hub_cards.reference_code

demo: .venv/.installed
	$(REFERENCE_CODE)
	.venv/bin/adavtp demo

test: .venv/.installed-with-tests
	$(REFERENCE_CODE)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/.installed-with-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf .venv build *.egg-info hub_cards/*/adavtp_code

# The stamps are newer than the files that say what is installed, or the installation runs again.
.venv/.installed: setup.cfg setup.py constraints.txt pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-with-tests: setup.cfg setup.py constraints.txt pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --no-deps lmms-eval
# What reads videos, for the tests that ask for it: see tests/fixtures/video_packages.py.
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/videos \
		av torchvision
	touch $@ .venv/.installed

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "AdaVTP needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
