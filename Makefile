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
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

GPU_BIN := .venv-gpu/bin
GPU_PIP := $(GPU_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve test test-slow fuzz attack gpu check format bench docs clean

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

.venv/python.ok:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mixmim-serve needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/serve.ok: .venv/python.ok pyproject.toml constraints.txt
	$(PIP) --editable '.[cpu,openvino]'
	@touch $@

.venv/dev.ok: .venv/python.ok pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/serve.ok

.venv/docs.ok: .venv/python.ok pyproject.toml constraints.txt
	$(PIP) --editable '.[docs]'
	@touch $@

.venv-serving/ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-serving
	.venv-serving/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[cpu,test-serving]'
	@touch $@

# An environment of its own: onnxruntime and onnxruntime-gpu must not meet. The package of TensorRT fetches the rest of
# itself from elsewhere; where that fails, its rows are missing and nothing else.
.venv-gpu/gpu.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-gpu
	$(GPU_PIP) --editable '.[gpu,test]'
	-$(GPU_PIP) --editable '.[tensorrt]'
	@touch $@

clean:
	rm -rf .venv .venv-gpu .venv-serving build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
