# make run    the main job: FedPEAT over 2,000 devices on real text, a report at the end
# make quick  lint, layers, and all tests that need no Ray and are no sweeps, some two minutes: while you work
# make test   lint, layers, types, all tests, and some that compare numbers once more as a plainer processor computes
# make full   the same, all of these once more as two others do, more cases of what starts processes, and the memory
#             model on many more random settings
# make cluster-test  Slurm, `ray up`, an autoscaler and what else needs servers or pretend machines, where their packages
#             are installed
# make bench  the benchmarks (minutes; run them on a quiet machine)
# Each sets up .venv first if there is none. ARGS="--rounds 20" goes to the main job.

PYTHON ?= python3
VENV = .venv/bin
SETUP = .venv/installed

# Compiled modules are kept, whatever the environment says: a hundred processes would each compile ours.
unexport PYTHONDONTWRITEBYTECODE

# A worker a core, no more than there is work for: what shares a Ray is one's (tests/conftest.py).
PYTEST = $(VENV)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# Two computations of one number are compared: what passes on this machine's vector instructions must pass without.
NUMBERS = tests/parity $(addprefix tests/unit/test_,foundation.py emulator.py proxy.py vit_emulator.py) \
	--ignore tests/parity/test_memory_model.py --ignore tests/parity/test_embedded_models.py

.PHONY: run quick test full parity-elsewhere parity-plain parity-avx2 check lint types tests cluster-test bench
run: $(SETUP)
	$(VENV)/python workloads/large_scale.py --fleet.memory-scale 0.045 --rounds 8 --evaluation.every 2 $(ARGS)

quick: lint
	$(PYTEST) --ignore tests/ray -m "not sweep and not full and not cluster"

test: lint
	$(MAKE) --jobs 2 tests types
	$(MAKE) parity-plain SOME='-m "not sweep and not full"'

full: test parity-elsewhere
	$(PYTEST) -m full
	FEDPEAT_MEMORY_SETTINGS=40 $(PYTEST) --dist load tests/parity/test_memory_model.py

parity-elsewhere: parity-plain parity-avx2

parity-plain: $(SETUP)
	ATEN_CPU_CAPABILITY=default $(PYTEST) $(SOME) $(NUMBERS)

parity-avx2: $(SETUP)
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) $(NUMBERS)

check: lint types

lint: $(SETUP)
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/lint-imports --no-logo

types: $(SETUP)
	$(VENV)/pyrefly check --python-interpreter-path $(VENV)/python --output-format min-text --progress-bar no

tests: $(SETUP)
	$(PYTEST) -m "not full and not cluster"

cluster-test: $(SETUP)
	$(VENV)/pytest -m cluster -ra tests

bench: $(SETUP)
	$(VENV)/python workloads/benchmarks/client_batch.py

# Of 20,000 modules 4,000 are ever imported, and compiled when they are.
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@
