# The few commands. Each works in a fresh clone: what it needs is installed into .venv first.
# make test PYTHON=python3.10 VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt  # with the oldest versions that are supported
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PIP_INSTALL = $(VENV)/bin/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: demo test test-all coverage lint format docs notebooks package mutation benchmark clean

demo: $(VENV)/experiments.installed  ## train digits with GO4Align + PCGrad
	$(VENV)/bin/python experiments/trainer.py --loss_method=go4align --gradient_method=pcgrad

test: $(VENV)/dev.installed  ## the fast tests
	$(PYTEST)

test-all: $(VENV)/dev.installed $(VENV)/ray.installed $(VENV)/dask.installed $(VENV)/server.installed  ## the slow ones too, with more random examples
	HYPOTHESIS_PROFILE=thorough $(PYTEST) -m ""

coverage: $(VENV)/dev.installed  ## the fast tests, and the lines that they run, in build/coverage
	mkdir -p build
	$(PYTEST) --cov --cov-report=term --cov-report=html --cov-report=xml

lint: $(VENV)/dev.installed  ## style, types, structure and language
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell balance experiments benchmarks tests docs .github *.md CITATION.cff Makefile pyproject.toml
	$(VENV)/bin/python tests/structure.py
	$(VENV)/bin/python tests/plain_english.py

format: $(VENV)/dev.installed  ## mend what ruff can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/dev.installed  ## the documentation site, in build/docs; a warning is an error
	$(VENV)/bin/sphinx-build --fail-on-warning --keep-going --quiet --builder html docs build/docs

notebooks: $(VENV)/dev.installed  ## execute the notebooks of the documentation anew, and store their outputs
	$(VENV)/bin/python tests/notebooks.py

package: $(VENV)/dev.installed  ## wheel and source distribution, in dist
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python -m twine check --strict dist/*

mutation: $(VENV)/mutation.installed  ## small changes of the sources that the tests must notice; takes hours
	$(VENV)/bin/python tests/mutation.py

benchmark: $(VENV)/benchmark.installed  ## time and accuracy beside other libraries
	$(VENV)/bin/python benchmarks/bench_rules.py
	$(VENV)/bin/python benchmarks/bench_overhead.py
	$(VENV)/bin/python benchmarks/bench_step.py
	$(VENV)/bin/python benchmarks/bench_jacobian.py
	$(VENV)/bin/python benchmarks/bench_distributed.py
	$(VENV)/bin/python benchmarks/bench_per_sample.py
	$(VENV)/bin/python benchmarks/bench_many_tasks.py

clean:  ## remove all that the commands above make
	rm -rf $(VENV) .venv* runs build dist *.egg-info .*_cache .hypothesis mlflow.db mlruns docs/methods/loss docs/methods/gradient
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/%.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) 'pip>=25.1'
	$(PIP_INSTALL) -e . --group $*
	touch $@
