# Two commands, each doing all its own set-up in .venv:
#   make demo                   draw the data, train a small detector, evaluate it (TASK=mask_rcnn, cascade or upernet)
#   make test                   run the tests
# Settings: TORCH=2.13.0 another torch, PYTHON=python3.12 another Python, TASK=upernet another demo.
TORCH ?= 2.13.0
PYTHON ?= python3
TASK ?= mask_rcnn

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready-torch-$(TORCH)
export SHAPES_ROOT ?= data/shapes
SHAPES := $(SHAPES_ROOT)/shapes.json
RUN := work_dirs/demo/$(TASK)-$(shell date +%Y%m%d-%H%M%S)
# mmcv compiles its operators against the installed torch, which only a build without isolation sees. Without -g0 the
# debug information of Python's own flags doubles the time.
INSTALL := CFLAGS=-g0 CXXFLAGS=-g0 $(BIN)/pip install --constraint $(VENV)/constraints.txt --no-build-isolation
OPERATORS_WORK := $(BIN)/python -c 'import torch; from mmcv.ops import nms; nms(torch.rand(3, 4), torch.rand(3), 0.5)'

.PHONY: setup demo test lint
setup: $(READY)

# Of the tools, all go on where they were interrupted; the stamp comes last. Another torch needs another mmcv: start anew.
$(READY): setup.py
	@$(PYTHON) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'error: $(PYTHON) is not Python 3.10 or later with venv: install one (Debian: python3-venv), or PYTHON=...' >&2; \
	  exit 2; }
	@for stamp in $(VENV)/ready-torch-*; do \
	  [ ! -e "$$stamp" ] || [ "$$stamp" = '$@' ] || { echo "$$stamp is for another torch: setting up anew"; rm -rf $(VENV); }; \
	done
	$(PYTHON) -m venv $(VENV)
	echo 'torch==$(TORCH)' > $(VENV)/constraints.txt
	$(BIN)/pip install --constraint $(VENV)/constraints.txt torch 'setuptools<81' wheel ninja psutil packaging
	$(INSTALL) --editable '.[onedl,test]'
	@$(OPERATORS_WORK) 2> $(VENV)/operators.log || { \
	  echo 'the cached mmcv was built for another torch or without its operators: building it again'; \
	  $(INSTALL) --no-cache-dir --no-deps --force-reinstall onedl-mmcv==$(shell sed -n "s/.*onedl-mmcv==\([0-9.]*\).*/\1/p" setup.py); }
	@$(OPERATORS_WORK)
	touch $@

$(SHAPES): convnext_dense/shapes.py | $(READY)
	$(BIN)/python -m convnext_dense.shapes $(SHAPES_ROOT)
	@touch $@

demo: configs/demo/$(TASK).py $(READY) $(SHAPES)
	$(BIN)/python tools/train.py configs/demo/$(TASK).py --work-dir $(RUN)
	$(BIN)/python tools/test.py configs/demo/$(TASK).py "$$(cat $(RUN)/last_checkpoint)" --work-dir $(RUN) \
	  --show-dir $(RUN)/pictures
	@echo 'predictions beside the truth: $(RUN)/pictures'

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
