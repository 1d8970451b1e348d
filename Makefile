# Each target makes the environment it needs (.venv) and finds it ready the next time.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: help pretrain sft rl recipe test test-library test-engines test-long test-plain lab bench readme pictures docs

PYTHON ?= python3
VENV ?= .venv
FAMILY ?= nano3
CONFIG ?= tiny
WORKERS ?= 2
# A fifth of its time a test waits for a process that it has started: three testers keep two cores busy.
TESTERS ?= 3
# Threads that wait must not spin for long: on a machine that does anything else, that makes small steps many times slower.
GOMP_SPINCOUNT ?= 1000
export PYTHON VENV TORCH_INDEX_URL GOMP_SPINCOUNT

# Tests use one thread each, and no hub: a name that is not in the cache is answered at once.
ALONE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
IN := PATH="$(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin:$$PATH"
quote = '$(subst ','\'',$(1))'

help:  ## this list
	@echo "make TARGET [NAME=value ...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo ""
	@echo "  make sft DATA=chats.jsonl             train on your own chats (OpenAI format, one JSON object a line)"
	@echo "  make sft TOKENIZER=tekken             another tokenizer: tiny, tekken, a folder, or a hub name"
	@echo '  make sft ARGS="train.train_iters=50"  any setting, as key=value; see them all with ARGS=--dry-run'
	@echo "  make ... PYTHON=python3.12            another interpreter (3.11 or newer)"
	@echo "  make ... TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu   PyTorch from another index"

pretrain:  ## text to a small base model, and a report (needs no GPU and no network); DATA=docs.jsonl reads your own text
	@.ci/setup run
	@$(IN) nemotron $(FAMILY) pretrain -c $(call quote,$(CONFIG)) $(if $(DATA),$(call quote,data.path=$(DATA))) $(if $(TOKENIZER),$(call quote,data.tokenizer=$(TOKENIZER))) $(ARGS)

sft:  ## chats to packs, a small model trained on them, and a report (needs no GPU and no network)
	@.ci/setup run
	@$(IN) nemotron $(FAMILY) sft -c $(call quote,$(CONFIG)) $(if $(DATA),$(call quote,data.path=$(DATA))) $(if $(TOKENIZER),$(call quote,data.tokenizer=$(TOKENIZER))) $(ARGS)

rl:  ## a careless small model learns from rewards, and a report (needs no GPU and no network)
	@.ci/setup run
	@$(IN) nemotron $(FAMILY) rl -c $(call quote,$(CONFIG)) $(if $(DATA),$(call quote,data.path=$(DATA))) $(ARGS)

recipe:  ## the whole way: text, made rows, chats, rewards, preferences, evaluation, FP8; a report card (the same command again goes on)
	@.ci/setup run
	@$(IN) nemotron $(FAMILY) recipe -c $(call quote,$(CONFIG)) $(ARGS)

test:  ## notebooks in step with the library, every notebook executed, then pytest
	@.ci/setup dev
	@$(IN) .ci/sync
	@$(MAKE) --no-print-directory --output-sync=target -j 2 test-library test-engines

ENGINES := tests/megatron tests/slurm tests/lab

# Two targets that "make test" runs side by side: the second waits for Slurm, for browsers and for ranks most of its time.
test-library:
	@$(IN) $(ALONE) python .ci/notebooks --n-workers $(WORKERS)
	@$(IN) $(ALONE) python -m pytest -n $(TESTERS) --dist loadfile -m "not long" $(ENGINES:%=--ignore %)

test-engines:
	@$(IN) $(ALONE) python -m pytest -m "not long" tests/megatron
	@$(IN) $(ALONE) python -m pytest -m "not long" tests/slurm tests/lab

test-long:  ## the tests that take minutes each and are not part of "make test"
	@.ci/setup dev
	@$(IN) $(ALONE) python -m pytest -m long $(ENGINES:%=--ignore %)
	@$(IN) $(ALONE) python -m pytest -m long tests/megatron
	@$(IN) $(ALONE) python -m pytest -m long tests/slurm tests/lab

# What decides the order of sums on this processor, set to the plainest. Hardware of another maker adds in yet another order.
PLAIN := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE MKL_ENABLE_INSTRUCTIONS=SSE4_2 OPENBLAS_CORETYPE=Nehalem OMP_NUM_THREADS=1
NUMERIC := accounting batches checkpoint evaluate fused kernel leaks lora loss_stages model mtp parallel rl_advantage rl_grpo rl_policy scan torch_engine two_stage

test-plain:  ## the tests and lessons with numbers again, as a processor without vector instructions would compute them
	@.ci/setup dev
	@$(IN) $(PLAIN) python -m pytest -n $(WORKERS) --dist loadfile -m "not long" $(NUMERIC:%=tests/test_%.py)
	@for room in loss train; do $(IN) $(PLAIN) python .ci/notebooks nbs/$$room --n-workers $(WORKERS); done

lab:  ## JupyterLab on the notebooks
	@.ci/setup dev
	@$(IN) jupyter lab nbs $(if $(filter 0,$(shell id -u)),--allow-root)

bench:  ## run every benchmark and print its table; ARGS="--nemotron CHECKOUT --trl FOLDER" sets others beside it
	@.ci/setup dev
	@$(IN) python benchmarks/all.py $(ARGS)

readme:  ## write README.md from nbs/index.ipynb
	@.ci/setup run
	@$(IN) python -c 'from nemotron_nb.ops.readme import write_readme; print(write_readme())'

pictures:  ## draw the pictures of the front page again, from the tour (needs Chromium)
	@.ci/setup run
	@$(IN) python -c 'from nemotron_nb.ops.readme import write_pictures; print(*write_pictures(), sep="\n")'

docs:  ## the notebooks as a website, in output/docs
	@.ci/setup dev
	@$(IN) python -c 'from nemotron_nb.ops.docs import build_site; build_site()'
