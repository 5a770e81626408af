# The few commands. Each works in a fresh clone: what it needs is installed into .venv first.
PYTHON ?= python3
VENV := .venv
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: demo test test-all lint format docs mutation benchmark clean

demo: $(VENV)/experiments.installed  ## train digits with GO4Align + PCGrad
	$(VENV)/bin/python experiments/trainer.py --loss_method=go4align --gradient_method=pcgrad

test: $(VENV)/dev.installed  ## the fast tests
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-all: $(VENV)/dev.installed $(VENV)/ray.installed $(VENV)/dask.installed $(VENV)/server.installed  ## the slow ones too, with more random examples
	HYPOTHESIS_PROFILE=thorough $(VENV)/bin/python -m pytest -n 2 --dist loadfile -m ""

lint: $(VENV)/dev.installed  ## style, types, structure and language
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell balance experiments benchmarks tests docs README.md CHANGELOG.md Makefile pyproject.toml
	$(VENV)/bin/python tests/structure.py
	$(VENV)/bin/python tests/plain_english.py

format: $(VENV)/dev.installed  ## mend what ruff can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/dev.installed  ## the documentation site, in build/docs; a warning is an error
	$(VENV)/bin/sphinx-build --fail-on-warning --keep-going --quiet --builder html docs build/docs

mutation: $(VENV)/mutation.installed  ## small changes of the sources that the tests must notice; takes hours
	$(VENV)/bin/python tests/mutation.py

benchmark: $(VENV)/benchmark.installed  ## time and accuracy beside other libraries
	$(VENV)/bin/python benchmarks/bench_rules.py
	$(VENV)/bin/python benchmarks/bench_step.py
	$(VENV)/bin/python benchmarks/bench_jacobian.py
	$(VENV)/bin/python benchmarks/bench_distributed.py
	$(VENV)/bin/python benchmarks/bench_per_sample.py

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/%.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt 'pip>=25.1'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . --group $*
	touch $@
