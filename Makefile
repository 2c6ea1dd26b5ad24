# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_ENV := TOKENIZERS_PARALLELISM=false

.PHONY: demo control test lint all-tests clean

demo: $(VENV)/ready
	$(RUN_ENV) $(BIN)/accelerate launch --quiet --config_file recipes/accelerate/cpu.yaml recipes/grpo_steer.py \
		--config recipes/configs/demo.yaml

# The same run with rewards that mean nothing: its accuracy must stay where it was.
control: $(VENV)/ready
	$(RUN_ENV) $(BIN)/accelerate launch --quiet --config_file recipes/accelerate/cpu.yaml recipes/grpo_steer.py \
		--config recipes/configs/demo.yaml --rewards random --reward_weights 1.0 --output_dir runs/control

test: $(VENV)/ready
	$(RUN_ENV) $(BIN)/python -m pytest

all-tests: $(VENV)/ready
	$(RUN_ENV) $(BIN)/python -m pytest -m "not gpu"

lint: $(VENV)/ready
	$(BIN)/ruff check .
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
