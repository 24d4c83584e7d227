# The two commands of the README, and the checks that CI runs. Everything lives in .venv.
PYTHON ?= python3
PORT ?= 3000
BUNDLE ?= tiny
FUZZ ?= 50
BIN := .venv/bin
# Two processes; a file stays in one of them, because its tests share what they build, and the longest come first.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# The tests start a hundred interpreters, and each would compile everything again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := python -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/$(INSTALL) --constraint constraints.txt

GPU_BIN := .venv-gpu/bin
GPU_PIP := $(GPU_BIN)/$(INSTALL) --constraint constraints.txt
RELEASE_BIN := .venv-release/bin

.PHONY: serve test test-slow test-serving fuzz attack gpu check format bench docs lock sbom audit clean

serve: .venv/serve.ok  ## install what serving needs (no torch) and serve the shipped model
	$(BIN)/mixmim serve $(BUNDLE) --port $(PORT)

test: .venv/dev.ok  ## the whole default test suite
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PARALLEL)

test-slow: .venv/dev.ok  ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu" $(PARALLEL)

test-serving: .venv/dev.ok .venv-serving/ok  ## what serves without torch, on another Python: make test-serving PYTHON=python3.13
	$(BIN)/python tests/exporting.py .venv-serving/bundle
	MIXMIM_TEST_BUNDLE=.venv-serving/bundle .venv-serving/bin/python -m pytest -m "not slow and not gpu" $(PARALLEL)

fuzz: .venv/dev.ok  ## the fuzzers on FUZZ times as many cases, new ones each time; what fails is left in tests/data/fuzz
	FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/test_fuzz.py tests/security/test_fuzz_protocol.py

attack: .venv/dev.ok  ## a good client next to attacks of every kind, with the bar that it must meet (half an hour)
	$(BIN)/python -m benchmarks.attacks

gpu: .venv-gpu/gpu.ok  ## all that needs a CUDA device: tests, the training step against a plain one, every engine
	$(GPU_BIN)/python -m pytest -m gpu
	$(GPU_BIN)/python -m benchmarks.train_step --device cuda --steps 10 --output benchmarks/results/train_step_gpu.md
	$(GPU_BIN)/python -m benchmarks.engines_gpu $(if $(BASE),--base $(BASE))

check: .venv/dev.ok  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.ok
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev.ok  ## k-nearest-neighbour accuracy of the shipped model; DATA is a folder with clothing10 in it
	$(BIN)/python -m benchmarks.knn $(BUNDLE) $(DATA)/clothing10 --untrained

docs: .venv/docs.ok  ## build the documentation into site/; `.venv/bin/mkdocs serve` shows it while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lock: .venv-release/ok  ## requirements/serve.txt: what serving installs, with hashes, in the versions of constraints.txt
	echo setuptools | $(RELEASE_BIN)/uv pip compile pyproject.toml - --extra cpu --extra openvino --quiet \
		--constraints constraints.txt --python-version 3.11 --universal --no-emit-package cffi --no-emit-package pycparser \
		--generate-hashes --only-binary :all: --emit-build-options --no-annotate --custom-compile-command 'make lock' \
		--output-file requirements/serve.txt > /dev/null

sbom: .venv/serve.ok .venv-release/ok  ## mixmim_serve/sbom.cdx.json: what requirements/serve.txt installs
	$(RELEASE_BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible $(BIN)/python | \
		$(BIN)/python requirements/sbom.py mixmim_serve/sbom.cdx.json

audit: .venv-release/ok  ## known vulnerabilities of what serving installs, and bandit; the first needs the internet
	$(RELEASE_BIN)/bandit --quiet --configfile pyproject.toml --recursive mixmim_serve export training
	$(RELEASE_BIN)/pip-audit --strict --require-hashes --disable-pip --requirement requirements/serve.txt

.venv/python.ok:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mixmim-serve needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

# Nothing is installed that a hash does not name: only wheels, and the build of this package asks no index.
.venv/serve.ok: .venv/python.ok pyproject.toml requirements/serve.txt
	$(BIN)/$(INSTALL) --require-hashes --requirement requirements/serve.txt
	$(BIN)/$(INSTALL) --no-index --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev.ok: .venv/serve.ok constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@

.venv/docs.ok: .venv/python.ok pyproject.toml constraints.txt
	$(PIP) --editable '.[docs]'
	@touch $@

.venv-serving/ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-serving
	.venv-serving/bin/$(INSTALL) --constraint constraints.txt --editable '.[cpu,test-serving]'
	@touch $@

# An environment of its own: onnxruntime and onnxruntime-gpu must not meet. The package of TensorRT fetches the rest of
# itself from elsewhere; where that fails, its rows are missing and nothing else.
.venv-gpu/gpu.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	$(GPU_PIP) --editable '.[gpu,test]'
	-$(GPU_PIP) --editable '.[tensorrt]'
	@touch $@

.venv-release/ok: constraints.txt
	$(PYTHON) -m venv .venv-release
	$(RELEASE_BIN)/$(INSTALL) --constraint constraints.txt bandit cyclonedx-bom pip-audit uv
	@touch $@

clean:
	rm -rf .venv .venv-gpu .venv-serving .venv-release build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
