# `make check`, `make test` and `make demo` set up their own .venv and can each be the first command on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where a real ComfyUI may be, as training/host_path.py looks for it; the host tests run when one is found, else they skip with one line.
TOKENIZER := comfy/sd1_tokenizer/vocab.json
HOSTS := $(COMFYUI_PATH) $(if $(filter custom_nodes,$(notdir $(abspath ..))),../..) $(HOME)/comfy/ComfyUI
COMFYUI := $(abspath $(patsubst %/$(TOKENIZER),%,$(firstword $(wildcard $(HOSTS:%=%/$(TOKENIZER))))))
# torchaudio, which ComfyUI imports, was last released for torch 2.11: with a host the three are installed as a set. This is a choice of
# this test environment, not a requirement of the pack.
HOST_TORCH ?= torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0

# The models of the tests are so small that a second thread only gets in the way; a second process halves the time.
JOBS ?= 2

# Once torch is chosen, nothing that is installed after it may change it: .torch lists the set with its versions.
INSTALL := $(BIN)/python -m pip install --quiet --constraint $(VENV)/.torch

.PHONY: check test test-slow demo bench bench-merge gpu gpu-pack gpu-report clean always
.DELETE_ON_ERROR:

# Style, types and the tests that need nothing but torch: minutes before a commit instead of a run of everything.
check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLR0917 dmm_core training  # five arguments or more go by keyword
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/core -n $(JOBS)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --run-slow --run-browser

demo: $(VENV)/.demo
	$(BIN)/dmm demo run

# Plain DMM against the options on the demo family; more arms, steps and devices: BENCH="--arms all --steps 3000 --device cuda"
bench-merge: $(VENV)/.demo
	$(BIN)/python -m comfyui_dmm.tests.benches.merge $(BENCH)

# Every ratio of speed in one table: minutes; lines of sampling and loading need a ComfyUI. BENCH="--only training --rounds 25"
bench: $(if $(COMFYUI),$(VENV)/.test,$(VENV)/.demo)
	OMP_NUM_THREADS=1 $(BIN)/python -m comfyui_dmm.tests.benches.all $(BENCH)

# All that a GPU can tell, stage by stage; call it again until nothing is left (tests/gpu/runner.py). GPU="--list" or "--only step --again".
# With a .venv it runs in that; without one in $(PYTHON)'s own packages and, where `make gpu-pack` was carried along, its wheels and host.
# It never asks a network for anything.
DEVICE ?= cuda
SIZE ?= sd15
GPU_BIN := $(if $(wildcard $(BIN)/dmm),$(BIN)/python,$(PYTHON))
GPU_HOST := $(or $(COMFYUI),$(if $(wildcard .gpu-pack/host.tar.xz),$(abspath .gpu/host)))
GPU_RUN = PYTHONPATH=$(abspath .gpu/name):$(abspath .gpu/packages)$${PYTHONPATH:+:$$PYTHONPATH} $(if $(GPU_HOST),COMFYUI_PATH='$(GPU_HOST)') $(GPU_BIN) -m

gpu: .gpu/.ready
	$(GPU_RUN) comfyui_dmm.tests.gpu.runner --device $(DEVICE) --size $(SIZE) $(GPU)

gpu-pack: .gpu/.name
	$(GPU_RUN) comfyui_dmm.tests.gpu.pack $(PACK)

gpu-report: .gpu/.name
	$(GPU_RUN) comfyui_dmm.tests.gpu.report

# The pack's import name, whatever the checkout's folder is called.
.gpu/.name:
	mkdir -p .gpu/name
	ln -sfn ../.. .gpu/name/comfyui_dmm
	touch $@

.gpu/.ready: .gpu/.name $(wildcard .gpu-pack/wheels .gpu-pack/host.tar.xz)
ifeq ($(GPU_BIN),$(PYTHON))
ifneq ($(wildcard .gpu-pack/wheels/*.whl),)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target .gpu/packages .gpu-pack/wheels/*.whl
endif
ifneq ($(wildcard .gpu-pack/host.tar.xz),)
	tar -xJf .gpu-pack/host.tar.xz -C .gpu && mkdir -p .gpu/host/custom_nodes
endif
endif
	touch $@

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# The host that this environment is made for and what it asks for. Written only when that changes, so that a host which comes later, goes,
# is updated or gives way to another COMFYUI_PATH sets off what is below, and nothing else does.
$(VENV)/.host: always | $(VENV)/.created
	@{ echo '$(or $(COMFYUI),no host)'; $(if $(COMFYUI),echo '$(HOST_TORCH)'; cat '$(COMFYUI)/requirements.txt';) } > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# Without a host any torch will do: the one that is there, or the newest, with the pack.
$(VENV)/.torch: $(VENV)/.host
	rm -f $@
ifneq ($(COMFYUI),)
	$(BIN)/python -m pip install --quiet $(HOST_TORCH)
	$(BIN)/python -m pip list --format=freeze | grep -E '^torch(vision|audio)?==' > $@
endif
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) -e '.[headless]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(INSTALL) -e '.[headless,test]' $(if $(COMFYUI),-r '$(COMFYUI)/requirements.txt')
	touch $@

# mypy needs a name to import the pack by, whatever the checkout's folder is called.
$(VENV)/.check: $(VENV)/.test pyproject.toml
	$(INSTALL) -e '.[headless,test,dev]'
	mkdir -p $(VENV)/pack
	ln -sfn ../.. $(VENV)/pack/comfyui_dmm
	touch $@

clean:
	rm -rf $(VENV) .gpu out build *.egg-info
