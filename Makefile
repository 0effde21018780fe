# Two commands on a fresh machine: `make smoke` and `make test`. Each makes .venv from requirements.lock first.
PYTHON ?= python3
PIP_FLAGS ?=
export PYTHONDONTWRITEBYTECODE ?= 1
BIN := .venv/bin
SMOKE_RUN ?=

.PHONY: smoke test test-slow bench soak lint format audit lock clean

# Stale when the lock or the project file changes.
.venv: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Telar needs Python 3.11 or 3.12, {sys.executable} is {v[0]}.{v[1]}; run make PYTHON=/path/to/python3.11")'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	touch -d @0 .venv  # stays stale until the last line: an interrupted installation is made anew
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch .venv

# The main job on an embedded local Ray, through the Ray Jobs API; leaves runs/smoke-*/report.html.
smoke: .venv
	$(BIN)/telar submit configs/smoke.yaml --embedded --wait --down $(if $(SMOKE_RUN),--set run.name=$(SMOKE_RUN))

# Two at a time; tests/conftest.py keeps all that use Ray in one of the two.
test: .venv
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: .venv
	$(BIN)/python -m pytest -m slow -n 2

# All benchmarks at small sizes, one after the other (an hour or so); leaves runs/bench/summary.md and .json.
bench: .venv
	$(BIN)/python -m tests.bench.summary

# One elastic run under random kills, then the same steps undisturbed.
SOAK_MINUTES ?= 10
soak: .venv
	$(BIN)/python -m tests.bench.soak --minutes $(SOAK_MINUTES) --out runs/bench/soak.json

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Known vulnerabilities of the versions in the lock; asks api.osv.dev.
audit:
	$(PYTHON) -m venv .tools/audit
	.tools/audit/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) pip-audit
	.tools/audit/bin/pip-audit -r requirements.lock --no-deps --disable-pip --vulnerability-service osv

# Resolve pyproject.toml in a throw-away environment and write the versions down.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet $(PIP_FLAGS) torch==2.13.0
	.venv-lock/bin/python -m pip install --quiet $(PIP_FLAGS) -e '.[dev]'
	( sed -n '/^#/p' requirements.lock; \
	  .venv-lock/bin/python -m pip freeze --all --exclude-editable --exclude pip | grep -viE '^(nvidia|triton|cuda)' | sed 's/+[a-z0-9.]*$$//' | sort -f ) > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .venv .venv-lock *.egg-info .pytest_cache .ruff_cache .hypothesis
