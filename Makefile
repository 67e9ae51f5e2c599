# Each target does all its own set-up in .venv (the classic distribution's in .venv-classic):
#   make demo                   draw the data, train a small detector, evaluate it, predict images without labels
#                               (TASK=mask_rcnn, cascade, upernet, upernet_swin, dino or mask2former)
#   make test                   run the tests
#   make benchmark              the backbone next to other libraries', which get an environment of their own (.venv-baselines)
#   make benchmark-gpu          on a machine with a GPU: the GPU tests, and the tables of docs/performance.md
#   make docs                   the documentation as a site, in site/ (a minute, then seconds; .venv-docs, without torch)
#   make tutorial               the notebook docs/tutorial.ipynb executed again, and its page
#   make picture                the picture of README.md, from the last `make demo`
# Variables: OPENMMLAB=classic the classic distribution of OpenMMLab, TORCH=2.13.0 another torch, PYTHON=python3.12
# another Python, TASK=upernet another demo, TESTS=... of pytest (tests/optim, -k NAME).
OPENMMLAB ?= $(or $(LINE),onedl)
$(if $(LINE),$(warning LINE=$(LINE) is now OPENMMLAB=$(LINE)))
TORCH ?= 2.13.0
PYTHON ?= python3
TASK ?= mask_rcnn

# A distribution's environment and its extra in setup.py: the two have the same import names, so each has a place of
# its own.
DISTRIBUTION_onedl := .venv onedl
DISTRIBUTION_classic := .venv-classic openmmlab
VENV := $(word 1,$(DISTRIBUTION_$(OPENMMLAB)))
EXTRA := $(word 2,$(DISTRIBUTION_$(OPENMMLAB)))
$(if $(VENV),,$(error no OPENMMLAB '$(OPENMMLAB)': onedl or classic))

BIN := $(VENV)/bin
READY := $(VENV)/ready-torch-$(TORCH)
KERNELS := $(wildcard convnext_dense/ops/*.c)
export SHAPES_ROOT ?= data/shapes
SHAPES := $(SHAPES_ROOT)/shapes.json
RUN := work_dirs/demo/$(TASK)-$(shell date +%Y%m%d-%H%M%S)
# mmcv compiles its operators against the installed torch, which only a build without isolation sees. Without -g0 the
# debug information of Python's own flags doubles the time.
INSTALL := CFLAGS=-g0 CXXFLAGS=-g0 $(BIN)/pip install --constraint $(VENV)/constraints.txt --no-build-isolation
OPERATORS_WORK := $(BIN)/python -c 'import torch; from mmcv.ops import nms; nms(torch.rand(3, 4), torch.rand(3), 0.5)'

.PHONY: setup demo test lint benchmark benchmark-gpu docs picture tutorial
setup: $(READY)

# Of the tools, all go on where they were interrupted; the stamp comes last. Another torch needs another mmcv: start anew.
$(READY): setup.py $(KERNELS)
	@$(PYTHON) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'error: $(PYTHON) is not Python 3.10 or later with venv: install one (Debian: python3-venv), or PYTHON=...' >&2; \
	  exit 2; }
	@for stamp in $(VENV)/ready-torch-*; do \
	  [ ! -e "$$stamp" ] || [ "$$stamp" = '$@' ] || { echo "$$stamp is for another torch: setting up anew"; rm -rf $(VENV); }; \
	done
	$(PYTHON) -m venv $(VENV)
	echo 'torch==$(TORCH)' > $(VENV)/constraints.txt
	$(BIN)/pip install --constraint $(VENV)/constraints.txt torch 'setuptools<81' wheel ninja psutil packaging
	$(INSTALL) --editable '.[$(EXTRA),test]'
	@$(OPERATORS_WORK) 2> $(VENV)/operators.log || { \
	  echo 'the cached mmcv was built for another torch or without its operators: building it again'; \
	  $(INSTALL) --no-cache-dir --no-deps --force-reinstall "$$($(BIN)/pip freeze | grep mmcv==)"; }
	@$(OPERATORS_WORK)
	@# pip hides why an optional extension was not built.
	@[ "$$(uname -sm)" != 'Linux x86_64' ] || ls convnext_dense/ops/avx512_kernels.*.so > /dev/null 2>&1 || \
	  echo 'warning: the AVX-512 kernels were not compiled, so the backbone is slower on a CPU (docs/install.md)' >&2
	touch $@

$(SHAPES): convnext_dense/datasets/toy_shapes.py | $(READY)
	$(BIN)/python -m convnext_dense.datasets.toy_shapes $(SHAPES_ROOT)
	@touch $@

demo: configs/demo/$(TASK).py $(READY) $(SHAPES)
	$(BIN)/python tools/train.py configs/demo/$(TASK).py --work-dir $(RUN)
	$(BIN)/python tools/test.py configs/demo/$(TASK).py "$$(cat $(RUN)/last_checkpoint)" --work-dir $(RUN) \
	  --show-dir $(RUN)/visualizations
	@echo 'predictions next to the ground truth: $(RUN)/visualizations'
	$(BIN)/python -m convnext_dense.datasets.toy_shapes $(RUN)/unlabeled --unlabeled 12
	$(BIN)/python tools/predict.py $(RUN) $(RUN)/unlabeled --out $(RUN)/predictions

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(TESTS)

# Of what the baselines depend on, timm and torchvision name another torch: without dependencies they keep to this one.
BASELINES := .venv-baselines
ARGS ?= --sizes T B
$(BASELINES)/ready-torch-$(TORCH): setup.py Makefile $(KERNELS)
	$(PYTHON) -m venv $(BASELINES)
	echo 'torch==$(TORCH)' > $(BASELINES)/constraints.txt
	$(BASELINES)/bin/pip install --constraint $(BASELINES)/constraints.txt torch 'setuptools<81' wheel ninja psutil packaging
	CFLAGS=-g0 CXXFLAGS=-g0 $(BASELINES)/bin/pip install --constraint $(BASELINES)/constraints.txt --no-build-isolation \
	  --editable '.[onedl]' onedl-mmpretrain 'transformers<5'
	$(BASELINES)/bin/pip install --no-deps timm
	-$(BASELINES)/bin/pip install --no-deps torchvision==0.$$(( $$(echo $(TORCH) | cut -d. -f2) + 15 ))
	touch $@

benchmark: $(BASELINES)/ready-torch-$(TORCH)
	$(BASELINES)/bin/python tools/benchmark.py $(ARGS)

benchmark-gpu: $(BASELINES)/ready-torch-$(TORCH)
	$(BASELINES)/bin/pip install --quiet pytest
	$(BASELINES)/bin/python -m pytest -m gpu
	$(BASELINES)/bin/python -m benchmarks.gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The site needs no torch: mkdocstrings reads the sources. Its packages stay out of the environment that runs the code.
DOCS := .venv-docs
$(DOCS)/ready: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --requirement docs/requirements.txt
	@touch $@

docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo 'the site: site/index.html'

picture: $(READY)
	$(BIN)/python docs/draw_demo.py "$$(ls -td work_dirs/demo/mask_rcnn-*/ | head -n 1)" docs/images/demo.png

tutorial: $(READY)
	$(BIN)/python docs/run_tutorial.py --execute
