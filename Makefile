# make demo    sets everything up, then runs the sweep of scripts/iris/sweep.toml
# make test    sets everything up, then runs the tests
# make test-long   sets everything up, then runs the suites that take longer: faults, object stores
# make lint    sets everything up, then lint, format and types
# make clean   removes what the other targets made

# Most tests wait for processes. tests/conftest.py says which do not run side by side.
SIDE_BY_SIDE = -n 2
SLOWEST = --durations=15

# Images for containers often set it. Here each process would then compile anew what it imports, since set-up compiles nothing.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long lint clean

demo:
	@scripts/setup.sh --model
	@.venv/bin/bt-ray sweep scripts/iris/sweep.toml --run-dir runs/iris

test:
	@scripts/setup.sh
	@.venv/bin/python -m pytest $(SLOWEST) $(SIDE_BY_SIDE) -m "not long"

test-long:
	@scripts/setup.sh
	@.venv/bin/python -m pytest $(SLOWEST) $(SIDE_BY_SIDE) -m "long and not alone"
	@.venv/bin/python -m pytest $(SLOWEST) -m "long and alone"

lint:
	@scripts/setup.sh
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

clean:
	rm -rf .venv .venv-gpu gpu_check models runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
