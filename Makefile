# make paper              every table and figure of the mini profile, in minutes on a laptop
# make paper PROFILE=smol the same with a real model and HH-RLHF (three hours); gpu, paper: see the README
# make plan PROFILE=gpu   what that profile will do, before it does it: stages, GPU time, disk
# make test               unit tests, then the committed notebooks against a fresh run of theirs
# make report             the executed notebooks, tables and figures as static pages: build/<profile>/site/index.html
# make lab                JupyterLab    make notebooks  rewrite the committed outputs    make data  rewrite data/mini
# make fuzz               feed every reader with nonsense, 100,000 times each: an hour (make test: 250 times)
# make kills              kill every long work at random moments, 50 times each: a quarter of an hour (make test: once)
# make audit              look for published weaknesses of the pinned packages, with pip-audit
# make bench              measure what speed and size cost here, as ratios: figures/bench/ (a quarter of an hour)
# make statistics         simulate how often the intervals hold the truth: figures/statistics/
# make clean              remove results (kept answers of judges and ratings of people too), keep .venv and downloads

PROFILE ?= mini
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT := build/$(PROFILE)/notebooks
OLD := $(OUT)/.old
NAMES := 01_grading 00_walkthrough 07_methods 06_ablation 03_training 04_evaluation 05_mt_bench 02_distribution

.PHONY: paper plan test fuzz kills audit report lab notebooks data statistics bench clean help
.DELETE_ON_ERROR:

.NOTPARALLEL:

# Models as small as mini's gain little from a second thread, so its notebooks run two at a time, on one thread each; what
# two need, one makes while the other waits. JOBS=1 runs them one by one on all threads, as those of other profiles.
JOBS ?= $(if $(filter mini,$(PROFILE)),2,1)

# Profiles that take hours and money say first what they will do, and stop there if a training cannot fit.
PLAN := $(if $(filter gpu paper,$(PROFILE)),build/$(PROFILE)/plan.txt)
$(NAMES:%=$(OUT)/%.ipynb): | $(PLAN)

# The notebooks that are older than what they rest on run together, in one command.
paper: notebooks/profiles/$(PROFILE).yaml $(NAMES:%=$(OUT)/%.ipynb)
	@if [ -s $(OLD) ]; then $(if $(filter-out 1,$(JOBS)),OMP_NUM_THREADS=1) $(BIN)/deft run \
		$$(cat $(OLD)) --profile $(PROFILE) --at-once $(JOBS); else echo "figures/$(PROFILE)/ and $(OUT)/ are up to date"; fi

# The rooms whose code each notebook runs; tests/test_house.py holds this against the imports.
rooms = $(wildcard $(patsubst %,deftlib/%/*.py,$(1)))
MOST := method preferences reporting models training
$(OUT)/00_walkthrough.ipynb: $(call rooms,method reporting)
$(patsubst %,$(OUT)/%.ipynb,01_grading 03_training 04_evaluation 05_mt_bench human_rating): $(call rooms,$(MOST) evaluation)
$(OUT)/02_distribution.ipynb: $(call rooms,$(MOST) studies)
$(patsubst %,$(OUT)/%.ipynb,06_ablation 07_methods): $(call rooms,$(MOST) evaluation studies)

$(OUT)/07_methods.ipynb: $(wildcard figures/smol/table_first_updates.csv)

# What all of them rest on: paper.yaml too, since what leaves the published setting is told beside the claims. A package
# that is installed makes its folder newer.
$(OUT)/%.ipynb: notebooks/%.ipynb notebooks/profiles/$(PROFILE).yaml notebooks/profiles/paper.yaml \
		$(wildcard data/*.* data/mini/* data/mini/*/*) $(wildcard deftlib/*.py) $(READY) $(wildcard $(VENV)/lib/python*/site-packages)
	@echo $< >> $(OLD)
$(NAMES:%=$(OUT)/%.ipynb): | forget
.PHONY: forget
forget:
	@mkdir -p $(OUT) && : > $(OLD)

build/%/plan.txt: notebooks/profiles/%.yaml $(READY)
	@mkdir -p $(@D)
	@$(BIN)/deft plan --profile $* --here > $@ 2>&1; code=$$?; cat $@; exit $$code

plan: $(READY)
	@$(BIN)/deft plan --profile $(PROFILE)

# Two workers take file by file, in the order that tests/warm_notebooks.py gives.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval --nbval-current-env -p tests.warm_notebooks \
		-n 2 --dist loadfile --no-loadscope-reorder tests $(wildcard notebooks/*.ipynb)

fuzz: $(READY)
	DEFT_FUZZ=100000 $(BIN)/python -m pytest tests/test_fuzz.py

kills: $(READY)
	DEFT_KILLS=50 $(BIN)/python -m pytest tests/test_kills.py

audit: | build
	@$(PYTHON) -m venv build/.audit && build/.audit/bin/python -m pip install -q --disable-pip-version-check pip-audit
	@build/.audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

build:
	@mkdir -p $@

report: paper
	@$(BIN)/deft site --profile $(PROFILE)

lab: $(READY)
	$(BIN)/jupyter lab notebooks

notebooks: $(READY)
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --coalesce-streams \
		--ExecutePreprocessor.record_timing=False $(wildcard notebooks/*.ipynb)

data: $(READY)
	$(BIN)/deft mini-world
	$(BIN)/deft mini-start

statistics: $(READY)
	$(BIN)/deft statistics

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/deft bench

clean:
	rm -rf build figures/mini figures/mini,*

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

notebooks/profiles/%.yaml:
	@echo "error: no profile $*: mini, smol, gpu or paper"; exit 1

# torch comes by pip, whose settings may name another build of it, and the rest by uv in a fifth of pip's time; by pip
# where uv, which reads none of those settings, finds no packages.
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
BY_UV = $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt

# Two that start at once: the first sets up, the other waits and finds it done. A shell holds the lock as its file 9.
$(READY): pyproject.toml constraints.txt | build
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; \
		sys.exit(sys.version_info < (3, 11) and f"error: Python 3.11 or newer is needed, found {v}: make PYTHON=python3.13 paper")'
	@exec 9> build/.set-up.lock && $(PYTHON) -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'; \
	[ $@ -nt pyproject.toml ] && [ $@ -nt constraints.txt ] && exit 0; \
	echo "setting up $(VENV) (once; a minute or two)" && $(PYTHON) -m venv $(VENV) && $(INSTALL) uv torch && \
		{ $(BY_UV) -e '.[all]' || { echo "by pip, then"; $(INSTALL) -e '.[all]'; }; } && touch $@
