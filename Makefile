# Brewline. `make` or `make help` lists the targets; every variable below can be given on the command line.

PYTHON      ?= python3
VENV        ?= .venv
GPU         ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

WORK    ?= demo
DATA    ?=
MINUTES ?=
ENCODER ?= $(WORK)/encoder
RANKER  ?= $(WORK)/ranker
STORE   ?= $(WORK)/store
MEMBERS ?=
AS_OF   ?=
PORT    ?= 50051
EXTRAS  ?=

BIN       := $(VENV)/bin
BREWLINE  := $(BIN)/brewline
TOOLS     := build/tools
FLAVOUR   := $(if $(GPU),gpu,cpu)
STAMP     := $(VENV)/.installed-$(FLAVOUR)
OTHER     := $(VENV)/.installed-$(if $(GPU),cpu,gpu)
COMMA     := ,
TORCH     := torch==$(shell sed -n 's/^torch==//p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo check test audit soak proto nightly serve bench clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Make the environment in .venv (CPU torch; GPU=1 takes the CUDA builds; EXTRAS=kernels, PYTHON, TORCH_INDEX)

demo: $(STAMP) ## World, training, snapshot, server, questions over gRPC, a report (DATA=folder for your own data, MINUTES, WORK)
	$(BREWLINE) demo --work $(WORK) $(if $(DATA),--data $(DATA)) $(if $(MINUTES),--minutes $(MINUTES))

check: $(STAMP) ## Lint, formatting, types, import contracts, and the size of each room
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@for room in index retrieval ranking tests; do \
	  find $$room -name '*.py' ! -name '*_pb2*' -exec cat {} + | awk -v room=$$room 'END { printf "  %-10s %6d lines\n", room, NR }'; \
	done
	@find index retrieval ranking tests -name '*.py' ! -name '*_pb2*' -exec wc -l {} + | grep -v ' total$$' | sort -rn | head -n 5

test: check ## Everything that a change must pass: `make check` and the tests
	$(BIN)/python -m pytest

# Known holes of the pinned versions are a question to the network, so they are asked only where pip-audit is installed.
audit: $(STAMP) ## Pins, licences, dangerous calls; known holes where pip-audit is installed
	$(BIN)/python -m pytest -q tests/test_audit.py
	@if command -v pip-audit >/dev/null; then \
	  pip-audit --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	else \
	  echo "pip-audit is not installed: known holes were not looked for (pipx install pip-audit; it asks PyPI)"; \
	fi

soak: $(STAMP) ## The long versions of the tests
	$(BIN)/python -m pytest -m soak

# Stubs made by the oldest supported grpcio-tools run with every newer protobuf and grpcio; the newest tools' stubs refuse
# older ones. 1.62 has wheels up to Python 3.12 and imports pkg_resources, which setuptools dropped in 81.
# `-I ranking/serving=proto` makes the stubs say `from ranking.serving import recommender_pb2`.
proto: ## Regenerate the gRPC stubs in ranking/serving from proto/recommender.proto (Python 3.11 or 3.12)
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install -q 'grpcio-tools==1.62.3' 'setuptools<81'
	$(TOOLS)/bin/python -W ignore -m grpc_tools.protoc -I ranking/serving=proto \
	  --python_out=. --pyi_out=. --grpc_python_out=. ranking/serving/recommender.proto

nightly: $(STAMP) ## One night: counts, changed texts, vectors, index, gates, publish (DATA, ENCODER, RANKER, STORE, MEMBERS, AS_OF)
	$(BREWLINE) nightly $(or $(DATA),$(WORK)/world) --encoder $(ENCODER) --ranker $(RANKER) --store $(STORE) \
	  $(if $(MEMBERS),--members $(MEMBERS)) $(if $(AS_OF),--as-of $(AS_OF))

serve: $(STAMP) ## Serve what the night published (ENCODER, RANKER, STORE, MEMBERS, PORT)
	$(BREWLINE) serve --store $(STORE) --encoder $(ENCODER) --ranker $(RANKER) $(if $(MEMBERS),--members $(MEMBERS)) --port $(PORT)

bench: $(STAMP) ## Time the prefill engine on this machine; one JSON object on stdout
	$(BREWLINE) bench prefill --json

clean: ## Remove the environment, the caches and the folder demo/
	rm -rf .venv demo build dist brewline.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find index retrieval ranking tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The CPU build of torch goes first: on Linux the version alone would let PyPI's CUDA build in. It comes from where pip
# looks anyway (find-links) or from TORCH_INDEX; elsewhere than on Linux PyPI's build is the CPU build. pip compiles bytecode
# on one core, compileall on all; files that some wheels carry for other Pythons make it fail, which means nothing.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13: name one, as in make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(if $(wildcard $(OTHER)),--clear) $(VENV)
ifeq ($(FLAVOUR)-$(shell uname -s),cpu-Linux)
	@echo "Installing the CPU build of $(TORCH)"
	@$(BIN)/pip install --no-compile --no-deps --no-index $(TORCH)+cpu 2>/dev/null || \
	  $(BIN)/pip install --no-compile --no-deps --timeout 15 --retries 2 --index-url $(TORCH_INDEX) $(TORCH)+cpu || \
	  { echo "error: no CPU build of $(TORCH) in pip's find-links nor at $(TORCH_INDEX): give TORCH_INDEX=URL, or GPU=1 for the CUDA build" >&2; exit 1; }
endif
	$(BIN)/pip install --no-compile -c constraints.txt -e '.[$(FLAVOUR),evaluate,dev$(addprefix $(COMMA),$(EXTRAS))]'
	@$(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib >/dev/null || true
	@touch $@
