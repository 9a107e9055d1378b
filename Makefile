# imagenet-sd: one command a step. `make` alone prints this file's help.
# Every recipe is a plain call of generate.py, train.py or evaluate.py: copy it from the terminal and vary it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# ===== the user's variables; an empty one leaves the script's own default, which is the paper's value =====
CLASSES ?= 100
PROMPT ?=
GUIDANCE ?=
IMAGES_PER_CLASS ?=
MODEL ?=
OUT ?=
# That of CLASSES, as generate.py names its folder.
TABLE_100 := imagenet_100
TABLE_1000 := imagenet_1k
TABLE_1k := imagenet_1k
DATASET ?= $(or $(TABLE_$(CLASSES)),$(basename $(notdir $(CLASSES))))_sd
DATA_ROOT ?=
DEVICE ?=
LAUNCHER ?= inline
# Of the launcher.
SITE ?=
PARTITION ?=
NODES ?=
GPUS ?=
PROCESSES ?=
CHUNKS ?=
TIMEOUT_MIN ?=
WAIT ?=
LAUNCH_ARGS ?=
# Of the container.
RUNTIME ?=
IMAGE ?= imagenet-sd
ARGS ?=
TRAIN_ARGS ?=
EVALUATE_ARGS ?=
SEEDS ?= 0 1 2
STUDY ?= studies/fashion.toml
ONLY ?=
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell command -v python$(v))) python3)
VENV ?= .venv

VARIABLES := CLASSES PROMPT GUIDANCE IMAGES_PER_CLASS MODEL OUT DATASET DATA_ROOT DEVICE LAUNCHER SITE PARTITION NODES \
             GPUS PROCESSES CHUNKS TIMEOUT_MIN WAIT LAUNCH_ARGS RUNTIME IMAGE ARGS TRAIN_ARGS \
             EVALUATE_ARGS SEEDS STUDY ONLY PYTHON VENV
# A misspelt variable would silently leave the default in force.
UNKNOWN := $(strip $(foreach v,$(.VARIABLES),$(if $(filter command line,$(origin $(v))),$(if $(filter $(v),$(VARIABLES) MAKEFLAGS),,$(v)))))
ifneq ($(UNKNOWN),)
$(error unknown variable $(UNKNOWN); the known ones are $(VARIABLES))
endif
LAUNCHERS := inline local slurm
ifeq ($(filter $(LAUNCHER),$(LAUNCHERS)),)
$(error LAUNCHER=$(LAUNCHER) is unknown; use one of $(LAUNCHERS))
endif
# Inline the script runs without the launcher: what was meant for a cluster would run here.
UNUSED := $(strip $(foreach v,SITE PARTITION NODES GPUS PROCESSES CHUNKS TIMEOUT_MIN WAIT LAUNCH_ARGS,$(if $($v),$v)))
ifneq ($(and $(UNUSED),$(filter inline,$(LAUNCHER)),$(filter generate train evaluate study,$(MAKECMDGOALS))),)
$(error $(UNUSED) has no use with LAUNCHER=inline; give LAUNCHER=slurm or local, or leave it out)
endif
ifneq ($(and $(OUT),$(filter pipeline,$(MAKECMDGOALS))),)
$(error OUT=$(OUT) names one folder, but make pipeline fills two, data/DATASET and runs/DATASET; give DATASET)
endif
export CLASSES PROMPT GUIDANCE IMAGES_PER_CLASS MODEL OUT DATASET DATA_ROOT DEVICE

PY := $(VENV)/bin/python
ON_DEVICE = $(if $(DEVICE),--device "$$DEVICE")
LAUNCH_OPTIONS = --launcher $(LAUNCHER) $(if $(SITE),--site "$(SITE)") $(if $(PARTITION),--partition "$(PARTITION)") \
  $(if $(GPUS),--gpus-per-node $(GPUS)) $(if $(PROCESSES),--processes $(PROCESSES)) \
  $(if $(TIMEOUT_MIN),--timeout-min $(TIMEOUT_MIN)) $(if $(WAIT),--wait) $(LAUNCH_ARGS)
LAUNCH = $(strip $(PY) $(if $(filter-out inline,$(LAUNCHER)),-m utils.launch $(LAUNCH_OPTIONS) $1))
# The stamp's name holds the lock's checksum: a changed lock has no stamp yet, a fresh checkout's file times do not matter.
STAMP := $(VENV)/.installed-$(shell cat requirements.lock | cksum | cut -d' ' -f1)
DEV_STAMP := $(VENV)/.installed-dev-$(shell cat requirements.lock requirements-dev.lock | cksum | cut -d' ' -f1)

.PHONY: help setup demo test coverage fuzz lint bench generate train evaluate pipeline study docker clean lock check-prompts \
        gpu-check bench-gpu
help: ## this text
	@printf 'imagenet-sd: can synthetic images replace real ones?\n\nusage: make TARGET [VARIABLE=value ...]\n\n'
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' Makefile
	@printf '\nvariables (default):\n'
	@printf '  %-17s %s\n' \
	  CLASSES '100, 1000, fashion, a .tsv of your own classes, a .txt of ids, or id,id,... ($(CLASSES))' \
	  PROMPT '"c", "c, h_c", "c, d_c", "c, h_c inside b", or "a photo of {name}" (c, d_c)' \
	  GUIDANCE 'guidance scale: 2 for diversity, 7.5 for fidelity (2)' \
	  IMAGES_PER_CLASS 'a number, or imagenet: as many as the real class has (imagenet)' \
	  MODEL 'diffusers folder or hub id (CompVis/stable-diffusion-v1-4)' \
	  DATASET 'folder below data/ to train on, run below runs/ to evaluate (that of CLASSES: $(DATASET))' \
	  DATA_ROOT 'where the real test sets are (data)' \
	  OUT 'output folder (data/<classes>_sd, runs/<dataset>)' \
	  DEVICE 'auto, cpu, cuda, cuda:N, mps (auto)' \
	  LAUNCHER 'inline, local (one process a GPU), slurm ($(LAUNCHER)), with PARTITION, NODES, GPUS, CHUNKS,' \
	  '' 'PROCESSES, TIMEOUT_MIN, SITE=site.toml, WAIT=1 (stay until the end), the rest in LAUNCH_ARGS' \
	  RUNTIME 'of make docker: docker, podman or buildah (the first that works); IMAGE names the image ($(IMAGE))' \
	  ARGS 'any further option of the script; see e.g. `python generate.py --help`' \
	  STUDY 'the file of make study ($(STUDY))' \
	  TRAIN_ARGS 'with make pipeline: further options of train.py; EVALUATE_ARGS: of evaluate.py; ARGS: of generate.py'
	@printf '\nwithout a GPU, now:  make demo\nthe paper:           make generate CLASSES=100 && make train DATASET=imagenet_100_sd\n'

# ===== environment =====
setup: $(STAMP) ## create .venv from the hash lock (again only when the lock changes)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	  || { echo "setup: $(PYTHON) is not Python 3.11 to 3.13; install python3.11 and python3.11-venv, or give PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "setup: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "setup: filling $(VENV) from requirements.lock: downloads 3.5 GB (torch with CUDA 12.8), takes 8 GB of disk, 3 to 5 minutes on a good line."
	@echo "setup: an interrupted set-up goes on from pip's cache when you run the same command again."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.lock \
	  | { grep -v -e '^Requirement already' -e '^  Using cached' || true; }
	@rm -f $(VENV)/.installed-* && touch $@

$(DEV_STAMP): $(STAMP)
	@$(PY) -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements-dev.lock \
	  | { grep -v -e '^Requirement already' -e '^  Using cached' || true; }
	@rm -f $(VENV)/.installed-dev-* && touch $@

# ===== the whole experiment in miniature, on a CPU =====
# Networks this small gain little from a second thread, so the cores share the work by classes and by runs. In fp32 on
# every machine, though some CPUs are faster in bf16: the numbers are then those of the README.
DEMO := runs/demo
DEMO_IMAGES := $(or $(IMAGES_PER_CLASS),200)
DEMO_PROCESSES := $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 5 ? cores : 5)))
DEMO_MODELS := real synthetic_g2 synthetic_g7.5
DEMO_RUNS := $(foreach seed,$(SEEDS),$(foreach model,$(DEMO_MODELS),$(model)-seed$(seed)))
demo: $(STAMP) ## generate, train and judge pictures of clothes in minutes, without a GPU
	@$(PY) models/export_fashion.py --out data
	@for guidance in 2 7.5; do \
	  $(PY) -m utils.launch --launcher local --processes $(DEMO_PROCESSES) \
	    generate.py --classes fashion --model models/fashion-sd --prompt "c, d_c" --guidance-scale $$guidance --steps 20 \
	    --dtype fp32 --images-per-class $(DEMO_IMAGES) $(ON_DEVICE) --out data/fashion_sd_g$$guidance; \
	done
	@printf '%s\n' $(DEMO_RUNS) | OMP_NUM_THREADS=1 xargs -P $(DEMO_PROCESSES) -I RUN bash -c 'set -o pipefail; \
	  name=RUN; name=$${name%-seed*}; seed=RUN; seed=$${seed##*-seed}; \
	  case $$name in real) data=data/fashion/real;; *) data=data/fashion_sd_$${name#synthetic_};; esac; \
	  $(PY) train.py --recipe demo --data $$data --images-per-class $(DEMO_IMAGES) --name $$name --seed $$seed --workers 0 \
	    --dtype fp32 $(ON_DEVICE) --out $(DEMO)/RUN 2>&1 \
	  | awk "{ print \"[RUN] \" \$$0; fflush() }"'
	@$(PY) evaluate.py --checkpoint $(DEMO_RUNS:%=$(DEMO)/%) --test fashion=data/fashion/test \
	  --test fashion_noise=data/fashion/test_noise --transfer digits=data/digits --batch-size 250 $(ON_DEVICE)
	@$(PY) evaluate.py --report $(DEMO_RUNS:%=$(DEMO)/%/results.jsonl) --out $(DEMO) \
	  --title "Can synthetic pictures of clothes replace photographs?" --show-data real=data/fashion/real \
	  --show-data synthetic_g2=data/fashion_sd_g2 --show-data synthetic_g7.5=data/fashion_sd_g7.5
	@echo "demo: open $(DEMO)/report.html"

# ===== the paper's three steps =====
# `set -x` shows the command with its values: one that can be copied.
GENERATE = $(strip generate.py --classes "$$CLASSES" $(if $(PROMPT),--prompt "$$PROMPT") \
  $(if $(GUIDANCE),--guidance-scale "$$GUIDANCE") $(if $(IMAGES_PER_CLASS),--images-per-class "$$IMAGES_PER_CLASS") \
  $(if $(MODEL),--model "$$MODEL") $(ON_DEVICE))
TRAIN = $(strip train.py --data "data/$$DATASET" $(ON_DEVICE))
EVALUATE = $(strip evaluate.py --checkpoint "runs/$$DATASET" $(if $(DATA_ROOT),--data-root "$$DATA_ROOT") $(ON_DEVICE))

generate: $(STAMP) ## draw a synthetic dataset: make generate CLASSES=100
	@set -x; $(call LAUNCH,$(if $(CHUNKS),--chunks $(CHUNKS))) $(GENERATE) $(if $(OUT),--out "$$OUT") $(ARGS)

train: $(STAMP) ## train a ResNet50 from scratch on it: make train DATASET=imagenet_100_sd
	@set -x; $(call LAUNCH,$(if $(NODES),--nodes $(NODES))) $(TRAIN) --out "$${OUT:-runs/$$DATASET}" $(ARGS)

evaluate: $(STAMP) ## judge the trained model on real images: make evaluate DATASET=imagenet_100_sd
	@set -x; $(call LAUNCH,) $(EVALUATE) $(if $(OUT),--out "$$OUT") $(ARGS)

pipeline: $(STAMP) ## generate, verify, train, evaluate; on slurm queued at once, each waiting for the one before
	@set -x; $(PY) -m utils.launch $(strip $(LAUNCH_OPTIONS)) $(if $(CHUNKS),--chunks $(CHUNKS)) $(GENERATE) --out "data/$$DATASET" $(ARGS) \
	  --then --chunks 1 $(GENERATE) --out "data/$$DATASET" $(ARGS) --verify \
	  --then $(if $(NODES),--nodes $(NODES)) $(TRAIN) --out "runs/$$DATASET" $(TRAIN_ARGS) \
	  --then $(EVALUATE) $(EVALUATE_ARGS)

study: $(STAMP) ## curves and exchange rates from a file: make study STUDY=studies/fashion.toml LAUNCHER=local
	@$(if $(filter %fashion.toml,$(STUDY)),$(PY) models/export_fashion.py --out data)
	@set -x; $(PY) -m utils.study "$(STUDY)" $(strip $(LAUNCH_OPTIONS)) $(if $(CHUNKS),--chunks $(CHUNKS)) $(ARGS)

# ===== development =====
# check-prompts needs Debian's wordnet-base; tests/test_build_tables.py says so where it is absent.
test: $(DEV_STAMP) $(if $(wildcard /usr/share/wordnet/data.noun),check-prompts) ## every test
	$(PY) -m pytest -n 2 --dist worksteal -q

coverage: $(DEV_STAMP) ## every test, counting the lines that run, in started processes too: half as long again
	$(PY) -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered -q

fuzz: $(DEV_STAMP) ## damaged files at every reader for ten minutes, and many more random kills, 20 of each family
	FUZZ_SECONDS=30 KILLS=3 $(PY) -m pytest -n 2 --dist worksteal -q --timeout 1800 tests/test_fuzz.py tests/test_kills.py \
	  tests/test_damaged_files.py tests/generation/test_families.py::test_kills_at_random_instants_change_no_byte

check-prompts: $(DEV_STAMP) ## rebuild prompts/*.tsv from WordNet and compare byte for byte
	$(PY) prompts/build_tables.py --check

lint: $(DEV_STAMP) ## ruff, mypy and hadolint
	$(VENV)/bin/hadolint Dockerfile
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(DEV_STAMP) ## speed as ratios to the named peers: make bench [ONLY=row [ARGS=--profile]]
	$(PY) benchmarks/bench.py $(if $(ONLY),--only $(ONLY)) $(ARGS)

gpu-check: $(STAMP) ## does this GPU give the results that the CPU gives? a page in runs/gpu-check, under ten minutes
	@$(PY) benchmarks/gpu_check.py $(if $(DEVICE),--device "$$DEVICE") $(ARGS)

bench-gpu: $(STAMP) ## images a second of this GPU, for --dry-run and docs/benchmarks.md: a quarter of an hour
	@$(PY) benchmarks/bench_gpu.py $(if $(DEVICE),--device "$$DEVICE") $(ARGS)

lock: $(DEV_STAMP) ## rewrite the two locks from requirements*.in
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --custom-compile-command "make lock" requirements.in -o requirements.lock
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --custom-compile-command "make lock" requirements-dev.in -o requirements-dev.lock

# A docker client without its daemon cannot build, so docker is asked.
RUNTIMES := docker podman buildah
docker: ## build the container with docker, podman or buildah
	@runtime="$(RUNTIME)"; \
	if [ -z "$$runtime" ]; then \
	  if docker info >/dev/null 2>&1; then runtime=docker; \
	  else runtime=$$(for r in podman buildah; do if command -v $$r >/dev/null; then echo $$r; break; fi; done); fi; \
	fi; \
	case " $(RUNTIMES) " in *" $${runtime:-none} "*) ;; \
	  *) echo "docker: RUNTIME=$${runtime:-} is not one of $(RUNTIMES), or none of them works here; install one" >&2; exit 2;; esac; \
	command -v "$$runtime" >/dev/null || { echo "docker: $$runtime is not installed; RUNTIME is one of $(RUNTIMES)" >&2; exit 2; }; \
	case $$runtime in buildah) build="bud --format docker --layers";; *) build=build;; esac; \
	set -x; "$$runtime" $$build --tag "$(IMAGE)" \
	  --build-arg VERSION="$$(git describe --tags --always 2>/dev/null || echo dev)" \
	  --build-arg GIT_COMMIT="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" $(ARGS) .

clean: ## remove .venv and caches; data/ and runs/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
