# Tandem's commands; `make` alone prints them. CI (.ci/run) runs these and nothing else.

.DEFAULT_GOAL := help
SHELL := /bin/bash
BIN := .venv/bin
READY := .venv/.ready
# The other SGLang that the worker is tested with, in an environment of its own.
OTHER_SGLANG := 0.5.18
OTHER := .venv-sglang-$(OTHER_SGLANG)
# FastChat and LLaVA, whose processes tests/interop runs beside ours.
FASTCHAT := .venv-fastchat
# The first of these that is 3.11 or 3.12; or say `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
  2>/dev/null && echo $$python && break; done)
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"

.PHONY: help demo test test-sglang-versions check fmt lock clean

help:
	@echo "make <target>"
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 24

demo: $(READY) ## a whole cluster on this machine: controller, two kinds of worker, one small model
	@$(BIN)/python -m cluster up

test: export HF_HUB_OFFLINE = 1
test: export HF_HUB_DISABLE_TELEMETRY = 1
test: export DO_NOT_TRACK = 1
test: $(READY) $(FASTCHAT)/.ready ## all tests; no GPU and no network needed
	@command -v curl >/dev/null || { apt-get update -qq && apt-get install -y -qq curl; } # the README uses it
	@command -v chromium >/dev/null || { apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium fonts-inter fonts-noto-core; } # tests/browser
	@$(BIN)/python -m pytest

# What older libraries do to each other, such as deprecations, is no concern of ours.
test-sglang-versions: export HF_HUB_OFFLINE = 1
test-sglang-versions: export HF_HUB_DISABLE_TELEMETRY = 1
test-sglang-versions: export DO_NOT_TRACK = 1
test-sglang-versions: $(READY) $(OTHER)/.ready ## the worker contract with both SGLang versions; not in CI
	@failed=0; for environment in .venv $(OTHER); do \
	  $$environment/bin/python -c 'import importlib.metadata as m; print("SGLang", m.version("sglang"))'; \
	  $$environment/bin/python -m pytest tests/contract tests/*/test_sglang*.py \
	    -k "sglang or not (echo or hf)" -W ignore::DeprecationWarning || failed=1; done; \
	exit $$failed

check: $(READY) ## style, types and import rules; looks and never writes
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy --strict
	@$(BIN)/lint-imports

fmt: $(READY) ## write the style that check wants
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

lock: $(READY) ## resolve requirements/*.txt anew from pyproject.toml
	@$(COMPILE) --upgrade --extra hf --extra sglang --extra otel --extra ui --extra bench --extra dev -o requirements/all.txt pyproject.toml
	@$(COMPILE) --upgrade -c requirements/all.txt -o requirements/controller.txt pyproject.toml
	@$(COMPILE) --upgrade -o requirements/fastchat.txt requirements/fastchat.in
	@echo 'llava-torch==1.2.2.post1' | $(COMPILE) --no-deps -o requirements/llava.txt -
	@echo 'pydantic<2' | $(COMPILE) --upgrade -o requirements/pydantic1.txt -

clean: ## remove everything made here, the environment too
	@rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache run bench/out
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, once for each lock.
$(READY): requirements/all.txt requirements/install.py
	@if [ -z "$(PYTHON)" ]; then \
	  echo "Tandem needs Python 3.11 or 3.12, and none is here; install one, or: make PYTHON=/path/to/python3.12"; \
	  exit 1; fi
	@$(PYTHON) requirements/install.py .venv requirements/all.txt
	@touch $@

$(OTHER)/.ready: pyproject.toml requirements/sglang-$(OTHER_SGLANG).txt requirements/install.py
	@$(or $(PYTHON),python3) requirements/install.py $(OTHER) pyproject.toml \
	  --extra hf --extra sglang --extra dev --overrides requirements/sglang-$(OTHER_SGLANG).txt
	@touch $@

# Its own versions of what they quarrel about; torch and the like are looked for in .venv after those.
# FastChat's OpenAI server streams with pydantic 1 only, its Gradio server starts with pydantic 2 only.
$(FASTCHAT)/.ready: $(READY) requirements/fastchat.txt requirements/llava.txt requirements/pydantic1.txt
	@$(BIN)/python requirements/install.py $(FASTCHAT) requirements/fastchat.txt
	@$(BIN)/python requirements/install.py $(FASTCHAT) requirements/llava.txt --no-deps
	@$(BIN)/python requirements/install.py $(FASTCHAT) requirements/pydantic1.txt --target $(FASTCHAT)/pydantic1
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(BIN)/python -c "$$site" > "$$($(FASTCHAT)/bin/python -c "$$site")/torch-from-tandem.pth"
	@touch $@
