# make paper              every table and figure of the mini profile, in minutes on a laptop
# make paper PROFILE=smol the same with a real model and HH-RLHF (an hour); gpu, paper: see the README
# make test               unit tests, then the committed notebooks against a fresh run of theirs
# make report             the executed notebooks, tables and figures as static pages: build/<profile>/site/index.html
# make lab                JupyterLab    make notebooks  rewrite the committed outputs    make data  rewrite data/mini
# make clean              remove results, keep .venv and downloads

PROFILE ?= mini
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT := build/$(PROFILE)/notebooks
NAMES := 00_walkthrough 01_grading 03_training 07_methods 06_ablation 04_evaluation 05_mt_bench 02_distribution

.PHONY: paper test report lab notebooks data clean help
.DELETE_ON_ERROR:

# Models as small as mini's gain little from a second thread, so its notebooks run two at a time, on one thread each, once
# 01 has made what all of them need; what two need, one makes while the other waits. NAMES is the order, longest first.
# JOBS=1 runs them one by one on all threads, as those of other profiles; so do several goals, as in `make clean paper`.
JOBS ?= 2
ifneq ($(and $(filter mini,$(PROFILE)),$(filter-out 1,$(JOBS)),$(filter 0 1,$(words $(MAKECMDGOALS)))),)
MAKEFLAGS += -j$(JOBS)
TOGETHER := $(filter-out $(OUT)/00% $(OUT)/01%,$(NAMES:%=$(OUT)/%.ipynb))
$(OUT)/01_grading.ipynb: | $(OUT)/00_walkthrough.ipynb
$(TOGETHER): | $(OUT)/01_grading.ipynb
else
.NOTPARALLEL:
endif

paper: notebooks/profiles/$(PROFILE).yaml $(NAMES:%=$(OUT)/%.ipynb)
	@echo "figures/$(PROFILE)/ and $(OUT)/ are up to date"

# What each notebook runs, directly or not; tests/test_project.py holds this against the imports.
modules = $(patsubst %,deftlib/%.py,__init__ $(1))
DATA := profile store preferences sources mini_world loop models intervals rewards subset grading distribution
SHOW := profile store report claims intervals
TRAIN := losses guidance trainers train endpoint generation
SCORE := metrics evaluate
$(OUT)/00_walkthrough.ipynb: $(call modules,$(SHOW) grading distribution losses)
$(OUT)/01_grading.ipynb: $(call modules,$(DATA) $(SHOW))
$(OUT)/02_distribution.ipynb: $(call modules,$(DATA) $(SHOW))
$(OUT)/03_training.ipynb: $(call modules,$(DATA) $(SHOW) $(TRAIN) $(SCORE))
$(OUT)/04_evaluation.ipynb: $(call modules,$(DATA) $(SHOW) $(TRAIN) $(SCORE) refine human_eval)
$(OUT)/05_mt_bench.ipynb: $(call modules,$(DATA) $(SHOW) $(TRAIN) mini_bench mt_bench)
$(OUT)/06_ablation.ipynb: $(call modules,$(DATA) $(SHOW) $(TRAIN) $(SCORE) ablation)
$(OUT)/07_methods.ipynb: $(call modules,$(DATA) $(SHOW) $(TRAIN) $(SCORE) comparison)
$(OUT)/human_rating.ipynb: $(call modules,$(DATA) $(TRAIN) $(SCORE) human_eval)

$(OUT)/%.ipynb: notebooks/%.ipynb notebooks/profiles/$(PROFILE).yaml $(wildcard data/*.* data/mini/* data/mini/*/*) | $(READY)
	@echo "== $* ($(PROFILE))"
	@$(if $(filter $@,$(TOGETHER)),OMP_NUM_THREADS=1) $(BIN)/python -m deftlib.run $< --profile $(PROFILE)

test: $(READY)
	$(BIN)/python -m pytest tests
	$(BIN)/python -m pytest --nbval --nbval-current-env $(wildcard notebooks/*.ipynb)

report: paper
	@$(BIN)/python -m deftlib.site --profile $(PROFILE)

lab: $(READY)
	$(BIN)/jupyter lab notebooks

notebooks: $(READY)
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --coalesce-streams \
		--ExecutePreprocessor.record_timing=False $(wildcard notebooks/*.ipynb)

data: $(READY)
	$(BIN)/python -m deftlib.mini_world

clean:
	rm -rf build figures/mini

help:
	@sed -n '1,6s/^# //p' Makefile

notebooks/profiles/%.yaml:
	@echo "error: no profile $*: mini, smol, gpu or paper"; exit 1

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 12) and f"error: Python 3.11 or 3.12 is needed, found {v[0]}.{v[1]}: make PYTHON=python3.12 paper")'
	@echo "setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[lora,endpoint,dev]'
	@touch $@
