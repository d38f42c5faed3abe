# `make` lists the targets. DEVICE=gpu uses the GPU lock, and later calls keep it; PORT is where `make ui` listens.
# REMOTE is a folder or s3://BUCKET/PREFIX, ENDPOINT the address of an S3 store other than Amazon's.
# RUNS names judged runs; see docs/compare.md.
# STUDY is staleness, sizes, samples, asynchronous or remax, HOURS how long cells are started, WORKSPACE where they run.
# SET holds settings of an experiment, TEMP=1 runs it in a folder of its own; see docs/dvc.md.
DEVICE ?= $(or $(shell cat .venv/device 2>/dev/null),cpu)
PYTHON ?= python3.11
PORT ?= 5000
STAGE ?=
MODEL ?=
DATA ?=
OPTIONS ?=
STUDY ?=
HOURS ?= 3
WORKSPACE ?= .slipstream/study
POOLS ?=
DEVICES ?=
RECIPE ?=
REMOTE ?=
ENDPOINT ?=
SET ?=
SIZE ?= 135m
TEMP ?=
RUNS ?=
LOCK := requirements/$(DEVICE).lock
BIN := .venv/bin
STAMP := .venv/installed.sha256
UV := .slipstream/uv/bin/uv
# Files are dealt out in this order, the long ones first; what a file's tests share is made once.
TWO_AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder
NOISE := .*(_s|_bytes|_histogram.*|_dropped.*|_first)$$
COMPILE = $(UV) pip compile -q pyproject.toml --extra dev --override requirements/overrides.txt \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help setup run plan test check format-and-types lock ui lineage compare chat export drill bench bench-gpu clean-work worker services services-stop services-status experiment experiments remote push pull study

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: ## create .venv with exactly the packages of the lock (DEVICE=cpu or gpu, by default the one it has)
	@test -f $(LOCK) || { echo "DEVICE=$(DEVICE): there is no $(LOCK)" >&2; exit 2; }
	@test -x $(BIN)/python || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@if [ "$$(cat $(STAMP) 2>/dev/null)" != "$$(sha256sum < $(LOCK))" ]; then \
		rm -f $(STAMP); \
		echo "installing $$(grep -c '^[a-zA-Z0-9]' $(LOCK)) pinned packages of $(LOCK), about 2-4 minutes"; \
		$(BIN)/python -m pip install -qq --no-deps -r $(LOCK) && sha256sum < $(LOCK) > $(STAMP); \
	fi
	@echo $(DEVICE) > .venv/device

run: setup ## bring the whole pipeline (or STAGE=name) up to date; RECIPE=name: of recipes/, in a workspace of its own
ifeq ($(RECIPE),)
	@$(BIN)/python -m stages.check_params
	@$(BIN)/python -m flows.dvc $(STAGE)
	@$(BIN)/python -m stages.report
else
	@$(BIN)/python -m flows.recipe "$(RECIPE)" $(STAGE)
endif

plan: setup ## what a run would do and need (RECIPE=name; DEVICES=8x80 for GPUs that are not here)
	@$(BIN)/python -m flows.plan $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(DEVICES),--devices "$(DEVICES)")

experiment: setup ## run once with other settings and keep the result (SET="rl.algorithm.name=remax rl.seed=1")
	@PATH="$(CURDIR)/$(BIN):$$PATH" MLFLOW_TRACKING_URI="$$($(BIN)/python -c 'from stages.common import tracking_client; print(tracking_client.tracking_uri())')" \
		$(BIN)/dvc exp run $(if $(TEMP),--temp) $(foreach setting,$(SET),--set-param "$(setting)")

experiments: setup ## what differs between experiments, times and counts left out
	@$(BIN)/dvc exp show --only-changed --drop '$(NOISE)'

remote: setup ## set where `make push` sends artifacts (REMOTE=, ENDPOINT=), or say what is set
	@$(BIN)/python -m flows.remote $(if $(REMOTE),"$(REMOTE)") $(if $(ENDPOINT),--endpoint "$(ENDPOINT)")

push: setup ## send artifacts and the run cache to the remote
	@$(BIN)/dvc push --run-cache

pull: setup ## fetch the artifacts that dvc.lock names, and the run cache, from the remote
	@$(BIN)/dvc pull --run-cache

test: setup format-and-types ## everything CI runs
	$(BIN)/python -m pytest -q $(TWO_AT_ONCE) tests/tools tests/integration tests/architecture tests/unit

check: setup format-and-types ## the fast part of `make test`
	$(BIN)/python -m pytest -q tests/unit tests/architecture

format-and-types:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(UV):
	$(PYTHON) -m venv .slipstream/uv
	.slipstream/uv/bin/python -m pip install -qq uv

lock: $(UV) ## pin every package anew, after a change of pyproject.toml
	UV_FIND_LINKS=$${UV_FIND_LINKS:-$$PIP_FIND_LINKS} $(COMPILE) --extra cpu -o requirements/cpu.lock
	$(COMPILE) --extra gpu -o requirements/gpu.lock

ui: setup ## MLflow's page on http://127.0.0.1:PORT
	@if [ -n "$$MLFLOW_TRACKING_URI" ]; then echo "runs are kept at MLFLOW_TRACKING_URI=$$MLFLOW_TRACKING_URI"; exit; fi; \
	if [ -f .slipstream/services/tracking_uri ]; then echo "services are up: $$(cat .slipstream/services/tracking_uri)"; exit; fi; \
	$(BIN)/python -c 'from stages.common.tracking_client import connect, prepare_library; prepare_library(); connect()' && \
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true MLFLOW_MODEL_CATALOG_URI= \
		$(BIN)/mlflow server --backend-store-uri sqlite:///$(CURDIR)/mlflow.db \
		--artifacts-destination $(CURDIR)/mlruns --host 127.0.0.1 --port $(PORT) --workers 1

lineage: setup ## where MODEL=champion comes from (default: the last run), or which runs read DATA=hash-or-path
	@$(BIN)/python -m stages.lineage $(if $(DATA),--data "$(DATA)",$(MODEL))

compare: setup ## judged runs side by side on one page (RUNS="latest 20261121-101500-1a2b")
	@$(BIN)/python -m stages.compare_runs $(RUNS)

worker: setup ## run flows of POOLS="local control" on DEVICES (cpu:0-1, gpu:0,2; default: all GPUs, else all cores)
	@$(BIN)/python -m flows.worker $(foreach pool,$(POOLS),--pool $(pool)) $(if $(DEVICES),--devices $(DEVICES))

services: setup ## PostgreSQL, Prefect's server on port 4200 and MLflow's on 5000 (OPTIONS="--sqlite …")
	@$(BIN)/python -m flows.services up $(OPTIONS)

services-stop: setup ## end them
	@$(BIN)/python -m flows.services down $(OPTIONS)

services-status: setup ## how each of them is
	@$(BIN)/python -m flows.services status $(OPTIONS)

chat: setup ## talk to the policy
	@$(BIN)/python -m stages.chat

export: setup ## write the policy as a plain model folder
	@$(BIN)/python -m stages.export

drill: setup ## crash drill of the RL stage: 55 times SIGKILL or SIGSTOP in 40 minutes
	@$(BIN)/python bench/drill.py

bench: setup ## all benchmarks at a small size, in one table with their targets (about 15 minutes; OPTIONS="--only ranks.py")
	@$(BIN)/python bench/all.py $(OPTIONS)

study: setup ## the papers' tables on this code, a queue that goes on where it was (STUDY=staleness HOURS=3 WORKSPACE=DIR)
	@mkdir -p .slipstream/bench
	@$(BIN)/python bench/study.py "$(STUDY)" --hours $(HOURS) --workspace "$(WORKSPACE)" \
		--out ".slipstream/bench/study-$(STUDY).json" $(OPTIONS)

bench-gpu: setup ## benchmarks for GPUs (SIZE=1b, OPTIONS="--device cpu --smallest" where there is none)
	@bench/gpu/run_all.sh .slipstream/bench-gpu --size $(SIZE) $(OPTIONS)

clean-work: ## forget what interrupted stages would resume from
	rm -rf .slipstream/work
