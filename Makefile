# Every command a person needs. Nothing has to be activated or exported.
#   make setup PYTHON=python3.12        another interpreter (3.11 to 3.14)
#   make setup TORCH_INDEX=https://...  torch, and nothing else, from this index
#   make setup GPU=1                    for the CUDA card of this machine
#   make rehearsal TOKENIZER=dir        with Llama 3's tokenizer from that directory
#   make test ARGS='tests/unit -x'      arguments for pytest
#   make test WORKERS=1                 one test after the other; two at a time by default
#   make gate MAIN=main                 against another branch than origin/main; so does make comment

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHON PYTORCH TORCH_INDEX GPU CARD
MAIN ?= origin/main
WORKERS ?= 2
export HF_HUB_DISABLE_TELEMETRY := 1
# As in pipeline/run.py: on a busy machine, OpenMP threads that spin slow a training step several times.
export GOMP_SPINCOUNT := 1000
# pip would keep torch for the CPU: its version is the same.
ifeq ($(if $(GPU),$(shell cat .venv/ready 2>/dev/null)),constraints.txt)
$(error .venv was made without GPU=1; remove it (`rm -rf .venv`), then run this again)
endif
pytest = .venv/bin/python -m pytest $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist worksteal)

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 14

repro: .venv/ready  ## run the pipeline, then show its result
	@.venv/bin/python -m pipeline check-params
	.venv/bin/dvc repro
	.venv/bin/python -m pipeline summary

test: .venv/ready  ## run the tests of every day
	$(pytest) $(ARGS)

test-all: .venv/ready  ## run all tests that need no card
	$(pytest) -m 'not gpu' $(ARGS)

check: .venv/ready  ## check format, lint, types, imports, and README's results against the committed run
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/pyright
	.venv/bin/lint-imports --no-logo
	.venv/bin/python -m benchmarks.record --check

plots: .venv/ready  ## draw the plots into a page that needs no network
	.venv/bin/python -m pipeline plots

push: .venv/ready  ## push the run to your own remote (docs/remotes.md)
	@[ "$$(dvc config core.remote)" != release ] || { echo "push: the default remote is .dvc/release, which git holds for" \
		"the tiny default; set yours: .venv/bin/dvc remote add --default --local NAME URL" >&2; exit 1; }
	.venv/bin/dvc push

release-run: .venv/ready  ## keep the run in dvc.lock in git, for `dvc pull` on a fresh clone
	.venv/bin/python -m pipeline release-run

publish: .venv/ready  ## list what would go to REPO=owner/name on the Hugging Face hub; with PUBLISH=1, upload it
	@.venv/bin/python -m pipeline publish '$(REPO)' $(if $(PUBLISH),--upload)

rehearsal: .venv/ready  ## run PROFILE on random weights: its VRAM, disk and time, before the real download
	.venv/bin/python -m benchmarks.rehearsal --profile profiles/$(or $(PROFILE),llama3-8b-t4).yaml \
		$(addprefix --tokenizer ,$(TOKENIZER)) $(addprefix --pubmedqa ,$(PUBMEDQA)) $(ARGS)

first-run: .venv/ready  ## print a report of the last run, to paste into an issue
	@.venv/bin/python -m benchmarks.first_run

lock: .venv/ready  ## check that dvc.lock agrees with code, parameters and results; needs no data
	@.venv/bin/python -m pipeline lock

gate: .venv/ready  ## fail if the tuned model is worse than MAIN's or than its own base
	@.venv/bin/python -m pipeline gate '$(MAIN)'

comment: .venv/ready  ## print what a pull request does to the results, as Markdown, against MAIN
	@.venv/bin/python -m pipeline comment '$(MAIN)' $(addprefix --pictures ,$(PICTURES))

setup: .venv/ready  ## create .venv with the pinned packages and llama.cpp (the others do it when needed)
	@echo "setup: .venv is ready; to create it again, remove it and run this again"

constraints:  ## resolve package versions again in a new .venv, and write constraints.txt
	rm -rf .venv
	LOCK=1 setup/install.sh

.venv/ready: pyproject.toml constraints.txt $(wildcard setup/*)
	@setup/install.sh

.PHONY: help repro test test-all check plots push publish release-run rehearsal first-run lock gate comment setup constraints
