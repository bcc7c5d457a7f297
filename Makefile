# make demo | check | test | proofs | resolve | reliability | bench | gpu
# All of them make .venv first if it is missing (tools/set_up.py). See README.md.
ifeq ($(wildcard tools/set_up.py),)
$(error run make in the checkout's folder, or make -C FOLDER)
endif
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Some images set it; each process would then compile torch's modules anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check test proofs resolve reliability bench gpu clean

demo: .venv/.installed
	@rm -rf runs/demo
	@echo "== The baseline: the study's recipe on the sample of 128 typefaces, 8 epochs =="
	@python -m engine.run --baseline --epochs 8 --out runs/demo/baseline
	@echo "== The recipe fast: 2 epochs, first layer whitened and frozen, bf16, CUDA graphs where there is a GPU =="
	@torchrun -m engine.run --amp --cuda-graphs --out runs/demo/fast
	@python -m tools.profile compare runs/demo/baseline runs/demo/fast --out runs/demo
	@python -m tools.predict runs/demo/fast --out runs/demo/predictions.png

check: .venv/.installed-test
	@ruff format --check . && ruff check . && mypy

test: .venv/.installed-test
	@ruff format --check . && ruff check .
	@python -m tests

proofs: .venv/.installed-test
	@python -m tests.reliability $(RELIABILITY_ARGS)
	@python -m tests.kernels
	@pytest -q -n 2 --dist load -m "slow and not long" --ignore tests/test_reliability.py

resolve: .venv/.installed-test
	@python -m tests.resolve

reliability: .venv/.installed-test
	@python -m tests.reliability --full --json runs/reliability.json $(RELIABILITY_ARGS)
	@python -m tests.kernels --full
	@pytest -q -n 2 --dist load -m long

bench: .venv/.installed-test
	@python -m tests.bench.all $(BENCH_ARGS)

gpu: .venv/.installed-test
	@python -m tools.gpu $(GPU_ARGS)

.venv/.installed: pyproject.toml tools/set_up.py
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and 'error: Python 3.11 to 3.13 is needed; name one with make PYTHON=python3.12')"
	@echo "making $(CURDIR)/.venv with $$($(PYTHON) --version): torch first, then the rest"
	@$(PYTHON) tools/set_up.py
	@touch $@

.venv/.installed-test: .venv/.installed
	@$(PYTHON) tools/set_up.py --test
	@touch $@

clean:
	rm -rf .venv runs
