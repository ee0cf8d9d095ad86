# Everything runs in .venv, which is made or brought up to date only when it has to be.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PACKAGING := pyproject.toml setup.py constraints.txt

.PHONY: demo test check docs clean

demo: .venv/.installed
	$(BIN)/hwmpq quantize zoo:digits_cnn --data digits --calib-data digits#train --latency 0.7x --max-drop 0.5 --out build/demo

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/.installed-dev
	tools/check

docs: .venv/.installed-docs
	$(BIN)/python tools/results_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

# torch first and by its exact version: what depends on it must not choose another build.
.venv/.installed: $(PACKAGING)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hwmpq needs Python 3.11 or later: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	touch $@

.venv/.installed-dev .venv/.installed-docs: .venv/.installed-%: .venv/.installed
	$(PIP) --editable '.[$*]'
	touch $@
