# Everything from a fresh clone: Python 3.11 or later and make are all that has to be there.
#
#   make demo       an image on disk, from nothing
#   make test       the test suite              ARGS="-k schedule" chooses among the tests
#   make test-full  the tests of the full-size model: minutes, 10 GB of memory, 15 GB of disk
#   make check      ruff and mypy
#   make clean      remove what was built; make distclean removes .venv as well

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := build/demo
ARGS ?=

.PHONY: demo test test-full check clean distclean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/python -m bench.checkpoints $(DEMO)/checkpoint --form diffusers --size tiny
	$(BIN)/sdrt build --ckpt $(DEMO)/checkpoint -o $(DEMO)/bundle --force
	$(BIN)/sdrt run "Great Wall photo" --bundle $(DEMO)/bundle --steps 20 --seed 42 -W 256 -H 256 -o demo.png
	@echo "The picture is in $(CURDIR)/demo.png (of a small model with random weights, hence noise)"

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

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
	rm -rf $(VENV)

# The file comes last, so an interrupted set-up runs again; pip then keeps what is whole.
$(READY): pyproject.toml constraints.txt src/sdrt/_version.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sdrt needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + ": run make PYTHON=python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing sdrt with its tools into $(VENV): PyTorch is among them, so the first time takes minutes"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[cpu,export,test,dev]'
	@touch $@
