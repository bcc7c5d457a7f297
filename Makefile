# make demo | test | proofs | reliability | bench | gpu; all of them make .venv first if it is missing. See README.md.
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
PYTHON ?= python3
VENV := $(ROOT).venv
BIN := $(VENV)/bin
RUN := cd $(ROOT) &&
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c $(ROOT)constraints-cpu.txt")
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check install --no-compile $(CONSTRAINTS)
TEST_TOOLS = $(shell $(BIN)/python -c "import tomllib; print(*tomllib.load(open('$(ROOT)pyproject.toml', 'rb'))['dependency-groups']['test'])")

export PATH := $(BIN):$(PATH)

.PHONY: demo test proofs reliability bench gpu clean

demo: $(VENV)/.installed
	@rm -rf $(ROOT)runs/demo
	@echo "== The baseline: the study's recipe on the sample of 128 typefaces, 8 epochs =="
	@$(RUN) python -m engine.run --baseline --epochs 8 --out runs/demo/baseline
	@echo "== The fast path: bf16, channels-last, fused optimiser, resident data, CUDA graphs where there is a GPU, 8 epochs =="
	@$(RUN) torchrun -m engine.run --amp --cuda-graphs --epochs 8 --out runs/demo/fast
	@$(RUN) python -m tools.profile compare runs/demo/baseline runs/demo/fast --out runs/demo
	@$(RUN) python -m tools.predict runs/demo/fast --out runs/demo/predictions.png

test: $(VENV)/.installed-test
	@$(RUN) ruff format --check . && ruff check . && mypy && pytest -n 2 --dist loadfile

proofs: $(VENV)/.installed-test
	@$(RUN) python -m tests.reliability $(RELIABILITY_ARGS)
	@$(RUN) TRITON_INTERPRET=1 pytest -q tests/kernels/interpreted.py
	@$(RUN) pytest -q tests/kernels/compiled.py

reliability: $(VENV)/.installed-test
	@$(RUN) python -m tests.reliability --full --json runs/reliability.json $(RELIABILITY_ARGS)

bench: $(VENV)/.installed-test
	@$(RUN) python -m tests.bench.all $(BENCH_ARGS)

gpu: $(VENV)/.installed-test
	@$(RUN) python -m tools.gpu $(GPU_ARGS)

$(VENV)/.installed: $(ROOT)pyproject.toml $(ROOT)constraints-cpu.txt
	@echo "making $(VENV) with $$($(PYTHON) --version): torch first, then the rest (downloads some 700 MB once)"
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and 'error: Python 3.11 to 3.13 is needed; name one with make PYTHON=python3.12')"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) 'torch>=2.11,<2.15'
	@$(PIP) -e $(ROOT)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "adding the test tools"
	@$(PIP) $(addsuffix ',$(addprefix ',$(TEST_TOOLS)))
	@touch $@

clean:
	rm -rf $(VENV) $(ROOT)runs
