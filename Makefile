# The two commands that bring along what they need: make demo, make test.
# make test PYTHON=python3.12 chooses the interpreter that .venv is made with.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test pytest crash fuzz faults kill verify load mutants bench compare lint format typecheck man setup clean distclean
.NOTPARALLEL:

PY := .venv/bin/python
# Passed on to pytest: make test ARGS="-k mount -x"
ARGS ?=
# Processes among which the tests are divided; WORKERS=0 runs all in one, in order. Most tests wait
# for programs that they start. A worker that runs out of tests takes some of the other's.
WORKERS ?= 2

# The tests mount, attach loop devices and make users. Without being root they go through sudo, and
# then leave no files of root's in the tree.
ifeq ($(shell id -u),0)
AS_ROOT := $(PY)
PYTEST := .ci/rooted $(PY) -m pytest
else
AS_ROOT := sudo env PYTHONDONTWRITEBYTECODE=1 $(PY)
PYTEST := sudo env PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/imagofs-hypothesis \
	.ci/rooted $(PY) -m pytest -p no:cacheprovider
endif

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | \
		while IFS='|' read -r target text; do printf '  make %-10s %s\n' "$$target" "$$text"; done

demo: ## install what is missing, then mount, read and write a small image
	@.ci/setup demo
	@tests/demo

test: ## install what the tests need, then run lint, types and every test
test: setup lint typecheck
	$(PYTEST) -n $(WORKERS) --dist worksteal $(ARGS)

setup: ## install what the tests need, no more
	@.ci/setup test

pytest: ## the tests alone, with ARGS="..." for pytest
pytest: setup
	$(PYTEST) -n $(WORKERS) --dist worksteal $(ARGS)

crash: ## try what power cuts leave of images: 100,000 of them, CRASH="--seed 7 --images 1000000"
crash: setup
	$(PY) -m tests.trust.crash $(CRASH)

fuzz: ## hostile images for ten minutes, FUZZ="--seed 7 --seconds 3600"
fuzz: setup
	$(PY) -m pip install -q atheris || echo "atheris cannot be installed here"
	$(PY) -m tests.fuzz $(FUZZ)

faults: ## let every call of workloads fail, and fill a disk, FAULTS="--seed 7 --rounds 5"
faults: setup
	$(AS_ROOT) -m tests.trust.faults $(FAULTS)

kill: ## kill -9 the daemon during random writes, KILL="--moments 100 --seed 7"
kill: setup
	$(AS_ROOT) -m tests.trust.kill $(KILL)

verify: ## let fio verify mounts amid trims and zeroes, VERIFY="--megabytes 512 --seed 7"
verify: setup
	$(AS_ROOT) -m tests.trust.verify $(VERIFY)

load: ## load a mount with 32 jobs for minutes, see that nothing grows, LOAD="--requests 5000000"
load: setup
	$(AS_ROOT) -m tests.trust.load $(LOAD)

mutants: ## break the code in many ways and see that the tests notice, MUTANTS="snapshot"
mutants: setup
	$(PY) -m tests.trust.mutants $(MUTANTS)

bench: ## measure parsing, mapping, access and mounts; writes bench.json and bench.md
bench: setup
	$(PY) -m pip install -q pytest-benchmark
	$(PY) -m pytest tests/benchmarks -o python_files='bench_*.py' -o python_functions='bench_*' \
		--benchmark-json=bench.json $(ARGS)
	$(PY) -m tests.benchmarks.table bench.json | tee bench.md

compare: ## measure beside qemu-storage-daemon (as root; ten minutes on an idle machine)
compare: setup
	sh tests/benchmarks/setup_peer.sh
	$(PY) -m tests.benchmarks.compare --pairs 5 $(ARGS)
	$(PY) -m tests.benchmarks.growth
	$(PY) -m tests.benchmarks.check

lint: ## ruff: rules and format
lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: ## let ruff rewrite what it can
format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

typecheck: ## mypy --strict
typecheck: setup
	$(PY) -m mypy --strict

man: ## build the manual pages in build/share/man
man: setup
	.venv/bin/imagofs install-manual --prefix build

clean: ## remove caches and builds
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find imagofs tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: ## the same, and .venv
distclean: clean
	rm -rf .venv
