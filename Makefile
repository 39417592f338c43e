# make demo       train on generated data, and draw mixed samples
# make test       lint, type check and all tests
# make check      the same without the slow tests, in about a minute
# make docs       build the documentation, docs/_build/html/index.html
# make dist       build and check the sdist and the wheel, in dist/
# make bench      run all measurements of this machine, into benchmarks/results/*-$(NAME).json
# make accuracy   run the accuracy study, or continue it: OUT=file.jsonl DATA=cifar MINUTES=9
# make gpu-suite  run GPU tests and measurements in 9 minutes: OUT=folder
# accuracy and gpu-suite use $(PYTHON) directly and install nothing.
#
# CUDA=cuda12|cuda13  set of packages, see pyproject.toml
# VENV=folder         virtual environment
# PYTHON=...          interpreter; creates the virtual environment
# DATA=folder         for bench and gpu-suite: photographs in class folders; for accuracy: CIFAR-10
# NAME=...            for bench: name of the machine in the result files
# JOBS=...            for test and check: test processes, each with up to 3 GB of memory
# DRY=1               for gpu-suite and accuracy: a small run that needs no GPU
# STAGES="..."        for gpu-suite: run only these stages
# CONTINUE=folder     for gpu-suite: run only what is missing from an earlier run there (may be OUT)
# NETWORK=resnet9|resnet18  PROCESSES=2    for accuracy
# DEMO=folder         for demo: output folder

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

# The newest PyTorch for each CUDA version, which pip would otherwise search for.
torch-cuda12 := torch<2.11
torch-cuda13 := torch>=2.11

python := $(VENV)/bin/python
installed := $(VENV)/.installed
data := $(if $(DATA),"$(DATA)")

# Without bytecode files, each test process spends ten seconds compiling its imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help environment demo test check lint kernels lint-and-kernels docs dist bench accuracy gpu-suite clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

environment: $(installed)

$(installed): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@# --no-compile: compiling all 9 GB takes longer than unpacking them, and Python compiles on first import anyway.
	$(python) -m pip install --quiet --no-compile --disable-pip-version-check \
	  -e '.[$(CUDA),compiled,train,preview,docs,test]' '$(torch-$(CUDA))'
	touch $@

demo: $(installed)
	rm -rf $(DEMO)/data $(DEMO)/run
	$(python) -m dali_saliencymix sample-data $(DEMO)/data
	$(python) -m dali_saliencymix preview $(DEMO)/data -o $(DEMO)/preview.png --min-crop-area 0.35 --seed 1
	$(python) train.py $(DEMO)/data -a resnet18 --epochs $(EPOCHS) -b 32 -j 1 --lr 0.05 --lr-warmup-epochs 1 \
	  --train-crop-size 48 --val-resize-size 48 --val-crop-size 48 --min-crop-area 0.35 \
	  --print-freq 10 --output-dir $(DEMO)/run
	@echo "log and checkpoints: $(abspath $(DEMO)/run)   (8 classes: chance is 12.5 %)"
	@echo "mixed samples: $(abspath $(DEMO)/preview.png)"

lint: $(installed)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

# Compiles Numba's kernels once, so that the test processes do not all compile them at the same time.
kernels: $(installed)
	$(python) -m dali_saliencymix compile

# lint and kernels each use one core for most of their time, so they run in parallel.
lint-and-kernels: $(installed)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync lint kernels

test: lint-and-kernels
	$(python) -m pytest -n $(JOBS) --dist worksteal

check: lint-and-kernels
	$(python) -m pytest -n $(JOBS) --dist worksteal -m "not slow"

docs: $(installed)
	$(python) -m sphinx -W --keep-going -b html docs docs/_build/html

# In an environment of its own, without the 9 GB of the other.
dist:
	$(PYTHON) -m venv --clear .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check build twine
	rm -rf dist
	.venv-dist/bin/python -m build
	.venv-dist/bin/python -m twine check --strict dist/*

bench: $(installed)
	@test -z "$(DATA)" -o -d "$(DATA)" || { echo "error: DATA: $(DATA): no such folder" >&2; exit 1; }
	$(python) -m benchmarks.bench_ops -o benchmarks/results/ops-$(NAME).json
	$(python) -m benchmarks.bench_pipeline $(data) -o benchmarks/results/pipeline-$(NAME).json
	$(python) -m benchmarks.bench_train $(data) -o benchmarks/results/train-$(NAME).json
	$(python) -m benchmarks.bench_scale $(data) -o benchmarks/results/scale-$(NAME).json
	$(python) -m benchmarks.bench_detectors $(data) -o benchmarks/results/detectors-$(NAME).json
	$(python) -m benchmarks.render

# The processes share one file, and each has its own runs. An interrupt does not reach them, so the trap kills them.
accuracy:
	@test -n "$(OUT)" -a -n "$(DATA)" || { echo "error: DATA and OUT are required: make accuracy DATA=cifar OUT=file" >&2; exit 1; }
	@trap 'kill $$started 2> /dev/null' INT TERM; \
	for part in $$(seq $(PROCESSES)); do \
	  $(PYTHON) -m benchmarks.accuracy $(data) -o "$(OUT)" --network $(NETWORK) --minutes $(MINUTES) $(if $(DRY),--dry --seeds 1) \
	    --part $$part/$(PROCESSES) > /dev/null & started="$$started $$!"; \
	done; \
	for process in $$started; do wait $$process || failed=1; done; \
	test -z "$$failed" && $(PYTHON) -m benchmarks.accuracy -o "$(OUT)"

gpu-suite:
	@test -n "$(OUT)" || { echo "error: OUT is required: make gpu-suite OUT=folder" >&2; exit 1; }
	$(PYTHON) -m benchmarks.gpu_suite "$(OUT)" $(if $(DATA),--data $(data)) $(if $(DRY),--dry) \
	  $(if $(CONTINUE),--continue "$(CONTINUE)") $(if $(STAGES),--stages $(STAGES))

clean:
	rm -rf $(VENV) .venv-dist dist $(DEMO)/data $(DEMO)/run $(DEMO)/preview.png
