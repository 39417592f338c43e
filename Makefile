# make demo    train on data made here, and draw mixed samples
# make test    lint, type check, tests
# make check   the same without the slow tests, in about a minute
# make docs    the documentation, docs/_build/html/index.html
# make bench   all measurements of a machine, into benchmarks/results/*-$(NAME).json
# make accuracy OUT=file.jsonl DATA=cifar MINUTES=9    the accuracy study, continued where it stands, $(PYTHON) as it is
# make gpu-suite OUT=folder    GPU tests and measurements in 9 minutes, with $(PYTHON) as it is, nothing installed
#
# DATA=folder  photographs in class folders, for bench and gpu-suite   NAME=...  of the machine, for the files of bench
# JOBS=...     processes that run tests, of up to 3 GB of memory
# DRY=1        gpu-suite or accuracy, small, also without a GPU      STAGES="..."  some stages only
# CONTINUE=folder  gpu-suite: only what is missing of an earlier run there (may be OUT)
# NETWORK=resnet9|resnet18  PROCESSES=2    of the accuracy study
# CUDA=cuda12|cuda13  which set of packages, see pyproject.toml   VENV=folder  where the environment goes
# PYTHON=...          the interpreter that it is made with        DEMO=folder  where the demo writes

CUDA ?= cuda12
VENV ?= .venv-$(CUDA)
PYTHON ?= python3
DEMO ?= demo
EPOCHS ?= 4
NAME ?= this-machine
JOBS ?= 2
NETWORK ?= resnet9
PROCESSES ?= 2
MINUTES ?= 9

python := $(VENV)/bin/python
installed := $(VENV)/.installed
data := $(if $(DATA),"$(DATA)")

# Where Python writes no bytecode, each process of the tests compiles all that it imports, for ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help environment demo test check lint kernels lint-and-kernels docs bench accuracy gpu-suite clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

environment: $(installed)

$(installed): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@# Python compiles a module when it is first imported; compiling all 8 GB now would take longer than unpacking them.
	$(python) -m pip install --quiet --no-compile --disable-pip-version-check -e '.[$(CUDA),compiled,train,preview,docs,test]'
	touch $@

demo: $(installed)
	rm -rf $(DEMO)/data $(DEMO)/run
	$(python) -m dali_saliencymix sample-data $(DEMO)/data
	$(python) -m dali_saliencymix preview $(DEMO)/data -o $(DEMO)/preview.png --min-crop-area 0.35 --seed 1
	$(python) train.py $(DEMO)/data -a resnet18 --epochs $(EPOCHS) -b 32 -j 1 --lr 0.05 --lr-warmup-epochs 1 \
	  --train-crop-size 48 --val-resize-size 48 --val-crop-size 48 --min-crop-area 0.35 \
	  --print-freq 10 --output-dir $(DEMO)/run
	@echo "log and checkpoints: $(abspath $(DEMO)/run)   (8 classes: chance is 12.5 %)"
	@echo "mixed samples, to look at: $(abspath $(DEMO)/preview.png)"

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

# Numba's kernels are compiled once, and not by each process of the tests at the same time.
kernels: $(installed)
	$(python) -m dali_saliencymix compile

# Both use one core each for most of their time.
lint-and-kernels: $(installed)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync lint kernels

test: lint-and-kernels
	$(python) -m pytest -n $(JOBS) --dist worksteal

check: lint-and-kernels
	$(python) -m pytest -n $(JOBS) --dist worksteal -m "not slow"

docs: $(installed)
	$(python) -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(installed)
	@test -z "$(DATA)" -o -d "$(DATA)" || { echo "error: DATA: $(DATA): no such folder" >&2; exit 1; }
	$(python) -m benchmarks.bench_ops -o benchmarks/results/ops-$(NAME).json
	$(python) -m benchmarks.bench_pipeline $(data) -o benchmarks/results/pipeline-$(NAME).json
	$(python) -m benchmarks.bench_train $(data) -o benchmarks/results/train-$(NAME).json
	$(python) -m benchmarks.bench_scale $(data) -o benchmarks/results/scale-$(NAME).json
	$(python) -m benchmarks.bench_detectors $(data) -o benchmarks/results/detectors-$(NAME).json
	$(python) -m benchmarks.render

# The processes share one file, and each does its own runs. An interrupt does not reach them: the trap ends them.
accuracy:
	@test -n "$(OUT)" -a -n "$(DATA)" || { echo "error: say where CIFAR-10 is and where the runs go: DATA=cifar OUT=file" >&2; exit 1; }
	@trap 'kill $$started 2> /dev/null' INT TERM; \
	for part in $$(seq $(PROCESSES)); do \
	  $(PYTHON) -m benchmarks.accuracy $(data) -o "$(OUT)" --network $(NETWORK) --minutes $(MINUTES) $(if $(DRY),--dry --seeds 1) \
	    --part $$part/$(PROCESSES) > /dev/null & started="$$started $$!"; \
	done; \
	for process in $$started; do wait $$process || failed=1; done; \
	test -z "$$failed" && $(PYTHON) -m benchmarks.accuracy -o "$(OUT)"

gpu-suite:
	@test -n "$(OUT)" || { echo "error: say where the results go: make gpu-suite OUT=folder" >&2; exit 1; }
	$(PYTHON) -m benchmarks.gpu_suite "$(OUT)" $(if $(DATA),--data $(data)) $(if $(DRY),--dry) \
	  $(if $(CONTINUE),--continue "$(CONTINUE)") $(if $(STAGES),--stages $(STAGES))

clean:
	rm -rf $(VENV) $(DEMO)/data $(DEMO)/run $(DEMO)/preview.png
