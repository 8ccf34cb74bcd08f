# What a person does with PascalVL. `make help` lists it.

MODEL   ?= tests/nano/checkpoint
BACKEND ?= auto
# The KV cache: a format, k8v8, k8v4, k4v4, f16 or f32, and options such as k8v4,window=64+8192,pin=image (see README.md).
KV      ?= k8v8
# The weights: a format, f32, f16, w8 or w4, and options such as w4,group=64,layer.0=w8 (see README.md). By default f32,
# or as the checkpoint has them in codes of 4 bits; for a GPU the most exact for which the card has room.
GPU_FITTING := $(shell nvidia-smi --list-gpus > /dev/null 2>&1 && echo auto)
W       ?= $(if $(filter tensorrt cuda,$(BACKEND)),auto,$(if $(filter auto,$(BACKEND)),$(GPU_FITTING)))
# A folder of your own prompts and pictures, by which an export fits weights of 4 bits, keys and values.
CALIBRATE ?=
IMAGE   ?= tests/nano/pictures/sample.png
PROMPT  ?= Describe the picture.
# Further options of `pascalvl run`, `chat` and `serve`, for example --max-pixels 1000000.
OPTIONS ?=
# Where `make serve` listens.
HOST    ?= 127.0.0.1
PORT    ?= 8000
# What `make eval` measures: kv or weights.
EVAL    ?= kv
# Further options of `pascalvl build`, for example --max-pixels 500000 (of TensorRT's engines).
BUILD_OPTIONS ?=
export IMAGE PROMPT

# For `make plugin`: the major version of TensorRT, 8 (for 8.6 and 9.x) or 10; and, to compile against their headers, the
# folders of TensorRT and CUDA, which hold include/.
TENSORRT_MAJOR ?= 8
TENSORRT_ROOT  ?=
CUDA_ROOT      ?= /usr/local/cuda
HEADERS     := --headers $(TENSORRT_ROOT)/include --headers $(CUDA_ROOT)/include
PLUGIN_ARGS := --major $(TENSORRT_MAJOR) $(if $(TENSORRT_ROOT),$(HEADERS))

PYTHON  ?= python3
# Further arguments for pip, for example an index with CPU-only wheels of torch (much smaller than the default ones).
PIP_ARGS ?=
TORCH       := 2.13.0
TORCHVISION := 0.28.0

comma  := ,
space  := $() $()
quoted  = '$(subst ','\'',$(1))'
# Names of folders without what make and the shell give a meaning to.
plain   = $(subst :,,$(subst +,-,$(subst =,,$(subst $(comma),-,$(1)))))
LABEL  := $(subst /,-,$(patsubst tests/%,%,$(patsubst %/,%,$(patsubst %/checkpoint,%,$(subst ',-,$(subst $(space),-,$(MODEL)))))))
# What of KV an export depends on.
RANK   := $(filter rv=%,$(subst $(comma), ,$(KV)))
MODEL_LABEL := $(call plain,$(LABEL)$(addprefix -,$(W) $(RANK))$(if $(CALIBRATE),-calibrated))
BUNDLE := build/model/$(subst $(space),,$(MODEL_LABEL))
ENGINE := build/engine/$(subst $(space),,$(MODEL_LABEL))-$(BACKEND)-$(call plain,$(KV))
# What of the checkpoint is newer than its model bundle.
NEWER  := $(shell find $(call quoted,$(MODEL)) -maxdepth 1 -newer $(BUNDLE)/manifest.json 2> /dev/null)

VENV   := .venv
BIN    := $(VENV)/bin
# Progress on a terminal alone.
QUIET  := $(shell test -t 2 || echo --quiet)
PIP    := $(BIN)/python -m pip --disable-pip-version-check $(QUIET)
RUN    := $(BIN)/pascalvl

.DEFAULT_GOAL := help
.PHONY: help setup demo export engine run serve chat validate inspect eval kernels plugin wheel test lint clean FORCE

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo 'with MODEL=<checkpoint> BACKEND=$(BACKEND) W=<weights> KV=$(KV) IMAGE=<picture> PROMPT=<text>, as they apply'

setup: $(VENV)/installed ## a virtual environment in .venv with everything that is needed but for tests

demo: validate run ## export the nano checkpoint, check its engines against PyTorch, describe a picture

export: $(BUNDLE)/manifest.json ## checkpoint MODEL to ONNX model bundle in build/model

engine: $(ENGINE)/manifest.json ## model bundle to engine bundle for BACKEND and KV in build/engine

run: engine ## ask PROMPT about IMAGE
	@$(RUN) run $(ENGINE) --image "$$IMAGE" --prompt "$$PROMPT" $(OPTIONS)

serve: engine ## answer over HTTP, as OpenAI's interface has it, at HOST and PORT
	@$(RUN) serve $(ENGINE) --host $(HOST) --port $(PORT) --sequences 4 $(OPTIONS)

chat: engine ## talk to the model
	@$(RUN) chat $(ENGINE) $(OPTIONS)

validate: engine ## compare the engines with the PyTorch model, output by output
	@$(RUN) validate $(ENGINE) --reference $(call quoted,$(MODEL))

inspect: engine ## what the engine bundle is, and the memory it needs
	@$(RUN) inspect $(ENGINE)

eval: $(VENV)/tests $(VENV)/torchvision ## what formats of the cache (EVAL=kv) or weights (EVAL=weights) do to nano's answers
	$(BIN)/python -m tests.nano.questions build/questions
	$(BIN)/python -m tests.nano.questions build/calibration --calibration
	$(RUN) eval $(EVAL) tests/nano/checkpoint --data build/questions --calibrate build/calibration \
	    --json build/eval-$(EVAL).json $(if $(filter kv,$(EVAL)),--plot build/eval-kv.png)

test: $(VENV)/tests $(VENV)/torchvision ## the tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Not in build/lib: what lies there, setuptools packs into wheels.
kernels: setup ## the CUDA kernels' library, build/native/libpascalvl.so
	$(BIN)/python -m pascalvl.plugins.kernels.build build/native/libpascalvl.so

plugin: setup ## the TensorRT plugin's library, build/native/libpascalvl_plugin.so, for TENSORRT_MAJOR
	$(BIN)/python -m pascalvl.plugins.tensorrt.build build/native/libpascalvl_plugin.so $(PLUGIN_ARGS)

wheel: setup ## a wheel with the kernels and the plugin in it, in build/dist
	$(BIN)/python -m pip wheel --no-deps --wheel-dir build/dist .

lint: $(VENV)/tests ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard plugins/*/*.c* plugins/*/*.h tests/*.cpp tests/plugins/*/*.cu)

clean: ## remove what was built, and the environment
	rm -rf build $(VENV)

# What is done on the way to something else is told on stderr: make run > answer.txt holds the answer alone. The link is
# for type checkers and editors (see pyproject.toml): they do not run what finds an editable install's packages.
$(VENV)/installed: pyproject.toml
	@set -x && $(PYTHON) -m venv $(VENV) >&2
	@set -x && $(PIP) install $(PIP_ARGS) torch==$(TORCH) >&2
	@set -x && $(PIP) install $(PIP_ARGS) -e '.[engines,export,serve,video]' >&2
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/pascalvl
	@touch $@

$(VENV)/tests: $(VENV)/installed
	@set -x && $(PIP) install $(PIP_ARGS) -e '.[dev]' >&2
	@touch $@

# Reference for video preprocessing. It stays out of the environment: beside a CPU-only torch, torchvision's default
# wheel breaks every import of transformers, for which the tests alone have a cure.
$(VENV)/torchvision: $(VENV)/tests
	@set -x && $(PIP) install $(PIP_ARGS) --no-deps --upgrade --target $@ torchvision==$(TORCHVISION) >&2

$(BUNDLE)/manifest.json: $(VENV)/installed $(wildcard export/*.py plugins/*.py plugins/ops/*.py plugins/ops/*/*.py) $(if $(NEWER),FORCE)
	@set -x && $(RUN) export $(call quoted,$(MODEL)) --output $(BUNDLE) --kv '$(KV)' $(if $(W),--weights '$(W)') \
	    $(if $(CALIBRATE),--calibrate $(call quoted,$(CALIBRATE))) >&2

$(ENGINE)/manifest.json: $(BUNDLE)/manifest.json $(wildcard engines/*.py engines/*/*.py)
	@set -x && $(RUN) build $(BUNDLE) --output $(ENGINE) --backend $(BACKEND) --kv '$(KV)' $(BUILD_OPTIONS) >&2
