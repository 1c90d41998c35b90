# make .venv   the pinned environment    make test   all tests
# make demo    train, prune and report   make check  those of torch alone
# make lint    the style checks              make docs    the site, in site/
# make test-old-stack TORCH=2.5.1   tests with the original mm stack
# make clean   remove what make made, and caches; work_dirs and data stay
#
# PYTHON chooses the interpreter (3.10, 3.11 or 3.12); by default the first
# one found.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := .venv

PYTHONS := $(or $(PYTHON),python3 python3.12 python3.11 python3.10)
BIN := .venv/bin
# Written last: an environment without it is incomplete and made anew.
STAMP := .venv/.complete
# The pip of the target's environment.
PIP = $(@D)/bin/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet --no-deps --no-build-isolation --use-pep517 --editable .
WORKERS := --numprocesses 2 --dist loadscope --no-loadscope-reorder
TORCH := 2.5.1
# The tests in which mmengine, mmcv, mmseg and mmpretrain do most: hooks and
# checkpoints, exports, and the whole way of a user, tool by tool.
OLD_STACK := tests/engine tests/export $(addprefix tests/e2e/test_,old_stack.py stock_tools.py classifier.py)
TORCH_ONLY := analysis gates cost surgery pruner report
# One line per package.
PROGRESS := { grep --line-buffered -oE '^ *(Collecting [^ ;]+|Installing collected)' || true; }

.PHONY: .venv demo test test-old-stack check lint docs clean
# An environment is kept, though make regards it as an intermediate file.
.PRECIOUS: .venv-old-%/.complete

.venv: $(STAMP)

# Create the environment of the target, unless it is complete.
define CREATE
@python=; for candidate in $(PYTHONS); do \
    if "$$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
        python=$$candidate; break; \
    fi; \
done; \
if [ -z "$$python" ]; then \
    echo "expected Python 3.10, 3.11 or 3.12, but got none from: $(PYTHONS); pass make PYTHON=/path/to/python" >&2; \
    exit 2; \
fi; \
if [ ! -e $@ ]; then \
    echo "Creating $(@D) with $$("$$python" --version)"; \
    "$$python" -m venv --clear $(@D); \
fi
@rm -f $@
endef

$(STAMP): setup.py $(filter-out requirements/docs.txt,$(wildcard requirements/*.txt))
	$(CREATE)
	@echo 'Installing requirements/pins.txt (several GB at the first time)'
	@# pip builds mmcv in isolation, where torch is absent: that gives the
	@# pure Python build, in seconds. Do not add --no-build-isolation here.
	@$(PIP) install --requirement requirements/pins.txt | $(PROGRESS)
	@$(INSTALL)
	@$(PIP) check
	@touch $@

# The original mm stack, with any version of torch.
.venv-old-%/.complete: setup.py requirements/old_stack.txt
	$(CREATE)
	@echo 'Installing requirements/old_stack.txt and torch $* (several GB)'
	@# Before torch: that gives the pure Python build of mmcv, in seconds.
	@$(PIP) install --quiet --constraint requirements/old_stack.txt setuptools
	@$(PIP) install --quiet --no-deps --no-build-isolation --use-pep517 mmcv==2.1.0
	@$(PIP) install torch==$* --requirement requirements/old_stack.txt | $(PROGRESS)
	@cp tests/helpers/mmcv_ext.py "$$($(@D)/bin/python -c 'import mmcv; print(*mmcv.__path__)')/_ext.py"
	@$(INSTALL)
	@$(PIP) check
	@touch $@

demo: .venv
	$(BIN)/python tools/demo.py

# One thread in each of two processes: runs are small, machines shared.
test check test-old-stack: export OMP_NUM_THREADS := 1

test: .venv
	$(BIN)/python -m pytest $(WORKERS)

test-old-stack: .venv-old-$(TORCH)/.complete
	$(<D)/bin/python -m pytest --verbose $(WORKERS) $(OLD_STACK)

# What needs no mm package: under a minute.
check: .venv
	$(BIN)/python -m pytest $(WORKERS) -m 'not mm' $(foreach folder,$(TORCH_ONLY),tests/$(folder) gdp_mmseg/$(folder))

lint: .venv
	$(BIN)/python -m pre_commit run --all-files

# An environment of its own, without torch. A warning is an error.
.venv-docs/.complete: requirements/docs.txt
	$(CREATE)
	@$(PIP) install --quiet --requirement $<
	@touch $@

docs: .venv-docs/.complete
	.venv-docs/bin/python -m sphinx --fail-on-warning --keep-going --quiet docs site
	@echo Wrote site/index.html

clean:
	rm -rf .venv .venv-old-* .venv-docs site build dist *.egg-info .pytest_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
