# hapnb: `make help` lists what can be done. Each target first makes .venv and installs what it needs.
# Variables: PYTHON (which python makes .venv), STUDY and PROFILE (for reproduce), ARGS (passed on), JOBS (test processes).
PYTHON  ?= python3
PROFILE ?= quick
STUDY   ?=
ARGS    ?=
JOBS    ?= 2
BIN     := .venv/bin
READY   := .venv/.installed
DOCS    := .venv/.docs

.DEFAULT_GOAL := help
.PHONY: help install reproduce test gpu-check lab docs slides prepare render course clean

help:
	@echo "make reproduce   regenerate tables and figures (STUDY=10_benchmark, PROFILE=smoke|quick|full|network|paper)"
	@echo "make test        run every notebook and every test (ARGS='-k plots' for a part, ARGS=--cov for coverage)"
	@echo "make gpu-check   on a machine with a GPU: check it in 8 minutes (ARGS='--device cpu' rehearses without one)"
	@echo "make lab         open the notebooks in JupyterLab"
	@echo "make docs        build the site: the book, the studies, the reference (_docs/index.html; the first time needs npm)"
	@echo "make slides      slides of every lesson (_slides/; they need no network)"
	@echo "make prepare     after editing notebooks: export hapnb/, clean, register claims, rewrite README.md"
	@echo "make render      execute the notebooks that changed and keep their outputs (ARGS=nbs/15_metrics.ipynb: these)"
	@echo "make course      the students' notebooks from nbs/course/source (ARGS='--nbgrader FOLDER': a folder for nbgrader)"
	@echo "make clean       remove caches and build leftovers (keeps .venv and runs)"

# The stamp is newer than settings.ini and setup.py as long as nothing needs installing.
$(READY): settings.ini setup.py
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('hapnb needs Python 3.10 or newer, this is ' + sys.version.split()[0] + ': try make PYTHON=python3.12 ...')"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@echo "installing into .venv (the first time this downloads PyTorch and takes minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

install: $(READY)

reproduce: $(READY)
	@$(BIN)/hapnb reproduce $(STUDY) --profile $(PROFILE) $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest tests -q -n $(JOBS) --dist worksteal --durations=8 $(ARGS)

gpu-check: $(READY)
	@$(BIN)/python tools/gpu_check.py $(ARGS)

# The kernel of tools/lab is ipykernel with a name and version that no machine changes: opening a notebook leaves it as is.
lab: $(READY)
	@JUPYTER_PATH=$(CURDIR)/tools/lab $(BIN)/jupyter lab nbs $(ARGS)

$(DOCS): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: $(DOCS)
	@$(BIN)/python site/build.py $(ARGS)

slides: $(DOCS)
	@$(BIN)/python site/slides.py $(ARGS)

prepare: $(READY)
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean
	@$(BIN)/python tools/claims.py
	@$(BIN)/python tools/readme.py

render: $(READY)
	@$(BIN)/python tools/render.py --jobs $(JOBS) $(ARGS)
	@$(BIN)/python tools/course.py

course: $(READY)
	@$(BIN)/python tools/diagrams.py
	@$(BIN)/python tools/course.py $(ARGS)

clean:
	@rm -rf build dist _proc _docs _slides htmlcov .coverage .coverage.* .pytest_cache .hypothesis
	@find . \( -path ./.venv -o -path ./runs -o -path ./data \) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
