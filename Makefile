# Everything from a fresh clone: Python 3.11 or later and make are all that has to be there.
#
#   make demo       an image on disk, without PyTorch: a minute, and the model comes with sdrt
#   make test       the test suite              ARGS="-k schedule" chooses among the tests, WORKERS=8 runs so many at once
#   make test-full  the tests of the full-size model: minutes, 10 GB of memory, 15 GB of disk
#   make check      ruff and mypy
#   make clean      remove what was built; make distclean removes .venv as well

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := build/demo-venv
ARGS ?=
WORKERS ?= 2
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sdrt needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + ": run make PYTHON=python3.11")'

.PHONY: demo test test-full check clean distclean
.DELETE_ON_ERROR:

# As a user installs it, without PyTorch; the model comes with sdrt.
demo:
	@$(CHECK_PYTHON)
	@test -x $(DEMO)/bin/python || $(PYTHON) -m venv --clear $(DEMO)
	@echo "Installing sdrt and onnxruntime into $(DEMO)"
	@rm -rf build/lib* build/temp.* build/bdist.*
	@$(DEMO)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt '.[cpu]'
	$(DEMO)/bin/sdrt run "a large red star on a blue background" --bundle demo --steps 20 --seed 42 -o demo.png
	@echo "The picture is in $(CURDIR)/demo.png"

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-full: $(READY)
	$(BIN)/python -m pytest -m full_size $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist demo.png src/*.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find bench engines export runtime src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) runtime/*.so.1

# The file comes last, so an interrupted set-up runs again; pip then keeps what is whole.
$(READY): pyproject.toml setup.py $(wildcard runtime/*.[ch]) constraints.txt src/sdrt/_version.py
	@$(CHECK_PYTHON)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing sdrt with its tools into $(VENV): PyTorch is among them, so the first time takes minutes"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[cpu,export,test,dev]'
	@touch $@
