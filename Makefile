# The commands of this project; BIN is where the environment's programs are.
BIN ?= .venv/bin/
QUICK := not slow and not gpu and not te and not flash_attn and not network

.PHONY: help setup test test-fast test-slow test-gpu gpu lint format docs first-light

help:            ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup:           ## make .venv with everything the tests need
	python3 -m venv .venv
	$(BIN)python -m pip install -r requirements.txt
	$(BIN)python -m pip install -e ".[dev]"

first-light:     ## text -> tokenizer -> binarized corpus -> torchrun pretraining -> sample
	bash examples/first_light/run.sh

test:            ## everything that runs on a laptop
	OMP_NUM_THREADS=1 $(BIN)python -m pytest -n 2 --dist worksteal -m "$(QUICK)"

test-fast:       ## without processes and runs: seconds
	$(BIN)python -m pytest -m "$(QUICK)" tests/architecture tests/plans tests/unit

test-slow:       ## the longer ones
	$(BIN)python -m pytest -m slow

test-gpu:        ## what needs a GPU
	$(BIN)python -m pytest -m gpu

# Runs wherever PyTorch sees a GPU, such as in its CUDA image: without an environment of this project python3 serves.
GPU_PYTHON ?= $(if $(wildcard $(BIN)python),$(BIN)python,python3)
gpu: export CUDA_DEVICE_MAX_CONNECTIONS = 1
gpu:             ## GPU tests, then speed beside HuggingFace and plain PyTorch: at most 9 minutes on one H200
	status=0; timeout 150 $(GPU_PYTHON) -m pytest -m gpu tests/kernels || status=$$?; \
	$(GPU_PYTHON) benchmarks/gpu_pretrain.py --minutes 5 || status=$$?; exit $$status

lint:            ## style, types, import layers
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy -p megatron.core
	$(BIN)lint-imports

format:          ## reformat
	$(BIN)ruff format .
	$(BIN)ruff check --fix .

docs:            ## generated pages
	$(BIN)python tools/gen_flag_docs.py
