# Every command does its own set-up in .venv; `make` alone lists them.
PYTHON := .venv/bin/python
SETUP_INPUTS := scripts/setup pyproject.toml setup.py $(wildcard wave_proxy/_fast/*.pyx)
KERNELS := wave_proxy._fast.digest wave_proxy._fast.manifest wave_proxy._fast.window
ARGS ?=
SIDE_BY_SIDE ?= --numprocesses 2 --dist loadfile

.PHONY: help demo test check conformance bench bench-kernels venv docs dist clean

help:
	@echo 'make demo    start everything on free ports, request an image, pull it with 50 clients, show how fast'
	@echo 'make test    run the tests (ARGS="-k name" for some); installs missing Debian packages when it may'
	@echo 'make check   ruff, mypy, the stubs of the kernels, the import rules'
	@echo 'make conformance   the distribution spec'"'"'s own suite against local repositories (needs Go)'
	@echo 'make bench   wave-proxy beside nginx and distribution, a quick run (ARGS="--only warm-manifest" for a part)'
	@echo 'make bench-kernels   the Cython kernels beside plain Python'
	@echo 'make venv    only the environment for development: .venv, with the kernels compiled in place'
	@echo 'make docs    write docs/configuration.md and docs/api.md from the code'
	@echo 'make dist    source distribution and wheel, in dist/'
	@echo 'make clean   remove what the commands above have made, .venv too'

demo: .venv/.ready-runtime
	$(PYTHON) -m bench.demo $(ARGS)

test: .venv/.ready-test
	@scripts/setup tools
	PATH="$(CURDIR)/.venv/bin:$$PATH:/usr/sbin:/sbin" $(PYTHON) -m pytest $(SIDE_BY_SIDE) $(ARGS)

check: .venv/.ready-check
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy.stubtest $(KERNELS)
	$(PYTHON) -m pytest -q tests/test_architecture.py

conformance: .venv/.ready-test
	PYTHONPATH="$(CURDIR)" $(PYTHON) scripts/conformance/run.py

bench: .venv/.ready-runtime
	$(PYTHON) -m bench --quick $(ARGS)

bench-kernels: .venv/.ready-test
	$(PYTHON) -m pytest bench/bench_*.py --benchmark-only $(ARGS)

venv: .venv/.ready-check

docs: .venv/.ready-runtime
	$(PYTHON) scripts/document-configuration.py >docs/configuration.md
	$(PYTHON) scripts/document-api.py >docs/api.md

dist: .venv/.ready-test
	$(PYTHON) -m build

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	rm -f wave_proxy/_fast/*.c wave_proxy/_fast/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready-%: $(SETUP_INPUTS)
	@scripts/setup $*
	@touch $@
