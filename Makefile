# Works with GNU make 3.81 and /bin/sh on Linux and macOS. PYTHON=... chooses the interpreter of .venv.

VENV    = .venv
STAMP   = $(VENV)/.installed
PY      = $(VENV)/bin/python
WORKERS = 2
EXTRAS  = dev,transformers,system,joblib,submitit,optuna,deepspeed
BENCHES = moe_step train_step overhead peer_step peer_cohorts rank_memory wire
SEED    = 0
PYTEST  = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile

# A stamp that is missing, of another folder (a moved checkout), or of a Python that is gone counts for nothing.
STAMPED := $(shell $(PY) -c 'print(open("$(STAMP)").read().strip())' 2>/dev/null)
ifneq ($(STAMPED),$(CURDIR))
FRESH = fresh
endif

.PHONY: help demo test test-all check format chaos pictures results bench gpu-check clean fresh

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1	/p' Makefile | expand -t 12

demo: $(STAMP) ## the main job: one stream under several arms, a comparison table and figures (5 minutes)
	$(VENV)/bin/cl-moe -m 'experiment=glob(demo_*)'
	$(VENV)/bin/cl-moe-compare --experiment demo

test: $(STAMP) ## every test that is not slow
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.extras $(VENV)/.ray ## every test, with every extra installed
	$(PYTEST)
	OMP_NUM_THREADS=1 $(VENV)/ray/bin/python -m pytest tests/test_launchers.py -k ray

check: $(STAMP) ## format, lint, types, floors, tests; the first that fails is named
	@$(call step,format,$(PY) -m ruff format --check .)
	@$(call step,lint,$(PY) -m ruff check .)
	@$(call step,types,$(PY) -m mypy)
	@$(call step,floors,$(PY) -m pytest tests/test_architecture.py tests/test_source.py)
	@$(call step,tests,$(PYTEST) -m "not slow" --ignore=tests/test_architecture.py --ignore=tests/test_source.py)
	@echo "check: all passed"

step = echo "check: $(1)"; $(2) || { echo "check: $(1) failed" >&2; exit 1; }

format: $(STAMP) ## put the source into the one format, mend what ruff can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

chaos: $(STAMP) ## kill a run 20 times at random moments, resume it each time, compare; SEED=... chooses them
	OMP_NUM_THREADS=1 $(PY) tests/chaos.py --seed $(SEED)

pictures: $(STAMP) ## the README's pictures, of the runs that make demo left; needs Chromium
	$(VENV)/bin/cl-moe-compare --experiment demo --baseline naive
	$(PY) tests/pictures.py demo

results: $(STAMP) ## the experiments that claim something, resumable, into docs/RESULTS.md; ONLY=... names some
	$(PY) benchmarks/results.py --jobs $(or $(JOBS),1) $(ONLY)

bench: $(VENV)/.bench ## speed and memory, as ratios; all of them, then status 1 if one is over its limit (25 minutes)
	@over=; for bench in $(BENCHES); do $(PY) benchmarks/$$bench.py || over="$$over $$bench"; done; \
	if [ -n "$$over" ]; then echo "over a limit, or failed:$$over" >&2; exit 1; fi

gpu-check: $(VENV)/.bench ## layers, benches and short experiments in bfloat16 on a CUDA device, where there is one
	$(PY) benchmarks/gpu_check.py

clean: ## remove .venv, builds and caches; runs and their results stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp goes first and comes last, so that an interrupted installation is begun anew.
$(STAMP): pyproject.toml constraints.txt $(FRESH)
	@rm -f $(STAMP) $(VENV)/.extras $(VENV)/.bench $(VENV)/.ray
	@if [ -n "$(FRESH)" ]; then $(find_python); "$$python" -m venv --clear $(VENV) || { $(no_venv); exit 1; }; fi
	@echo "installing into $(VENV): a few minutes, about 2 GB (more with CUDA)"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "$(CURDIR)" > $(STAMP)

$(VENV)/.extras: $(STAMP)
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# What the ray launcher wants of others' versions stands before ours, in an environment that sees ours.
$(VENV)/.ray: $(STAMP) constraints-ray.txt
	@$(PY) -m venv --clear $(VENV)/ray
	@$(PY) -c '$(packages)' > "$$($(VENV)/ray/bin/python -c '$(packages)')/ours.pth"
	@$(VENV)/ray/bin/python -m pip install -q --disable-pip-version-check -c constraints-ray.txt -e '.[ray]'
	@touch $@

packages = import sysconfig; print(sysconfig.get_path("purelib"))

$(VENV)/.bench: $(STAMP)
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,bench,system]'
	@touch $@

# Candidates are run, not looked up: a launcher may exist without the Python that it launches.
find_python = python=; got=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3 python); do \
	  if [ "$$("$$candidate" -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)" = True ]; \
	  then python=$$candidate; break; fi; \
	  got="$$got $$candidate ($$("$$candidate" -V 2>&1 | head -n 1))"; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "got:$$got" >&2; \
	  echo "allowed: Python 3.11 or newer" >&2; \
	  echo "change: install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; fi

no_venv = echo "got: $$python, which cannot create a virtual environment" >&2; \
	echo "allowed: a Python with the venv and ensurepip modules" >&2; \
	echo "change: install them (Debian, Ubuntu: apt install python3-venv), or name another: make PYTHON=..." >&2
