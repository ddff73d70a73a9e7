# `make` lists the targets. Each sets up everything it needs.
#
# An active virtual or conda environment is used as it is; otherwise .venv is made, which sees a system-wide torch. torch is
# installed only where it cannot be imported, and never replaced.
TORCH ?= torch==2.13.0
# The GPU kernels are tested without a GPU. torch for CUDA brings the triton it wants, torch for CPUs none.
TRITON ?= triton>=3.6
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifneq ($(VIRTUAL_ENV)$(CONDA_PREFIX),)
PYTHON := $(shell command -v python)
ENVIRONMENT := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
else
PYTHON := .venv/bin/python
ENVIRONMENT := .venv
endif
STAMP := $(ENVIRONMENT)/.fused_l2-installed
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-integrations test-matrix stress stress-asan bench gpu-report sanitize lint format wheels docs clean

# Another checkout may have installed itself into the same environment since.
INSTALLED := import importlib.util, os, sys; spec = importlib.util.find_spec('fused_l2'); \
  sys.exit(spec is None or not os.path.samefile(os.path.dirname(spec.origin), 'fused_l2'))
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell $(PYTHON) -c "$(INSTALLED)" 2>/dev/null && echo yes),yes)
$(shell rm -f $(STAMP))
endif
endif

# What the extras named need, and nothing of ours: installing `.[docs]` would compile the library again.
REQUIREMENTS = import importlib.metadata as m; wanted = ['extra == \"%s\"' % e for e in '$(1)'.split()]; \
  print('\n'.join(r.split(';')[0] for r in m.requires('fused_l2') if any(w in r for w in wanted)))
install = $(PYTHON) -c "$(REQUIREMENTS)" | xargs $(PYTHON) -m pip install -q -c $(ENVIRONMENT)/.fused_l2-torch

help:
	@echo "make demo               train on handwritten digits: what lambda does, and the bits of torch.optim (under a minute)"
	@echo "make test               the tests, with a sample of the long lists of combinations (five minutes)"
	@echo "make test-all           the tests, with all of them (a quarter of an hour)"
	@echo "make test-integrations  the tests in the trainers of others, which it installs"
	@echo "make test-matrix        make test with other versions of torch and triton, which it installs (15 GB, three quarters of an hour)"
	@echo "make lint, make format  ruff, mypy, clang-format"
	@echo "make stress             random programs of training against torch's for-loop (ten minutes, or any time)"
	@echo "make sanitize           the C++, alone and driven from Python, under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make bench              figures for this machine (ten minutes)"
	@echo "make gpu-report         on a machine with a GPU: its tests and figures (eight minutes)"
	@echo "make docs, make wheels  the site; sdist and wheel"
	@echo "make clean              remove what these made"

demo: $(STAMP)
	$(PYTHON) -m fused_l2.demo

# One process for each core. Threads that wait for others sleep, or those of one process would keep those of another from working.
# pytest-benchmark, which only bench/ needs, warns where tests run in parallel.
PYTEST := OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -n auto --dist loadfile -p no:benchmark
test: $(STAMP)
	$(PYTEST) --sample

test-all: $(STAMP)
	$(PYTEST)

# Our optimizers in the trainers of others. timm comes without what it requires: PyPI's torchvision is built for one torch with CUDA, and
# asking for it would replace torch. peft and diffusers, whose models the doctor examines, need nothing that is not there.
test-integrations: $(STAMP)
	$(call install,accelerate lightning transformers) huggingface_hub pillow pyyaml requests
	$(PYTHON) -m pip install -q --no-deps 'timm>=1.0.12' peft diffusers
	$(PYTHON) -m pytest tests/integrations tests/test_docs.py

# With other torches and tritons, in environments of their own in build/matrix (15 GB); MATRIX="2.13.0+3.6.0" for one of them.
test-matrix: $(STAMP)
	$(PYTHON) tests/try_matrix.py $(MATRIX)

# Random programs of training against torch's for-loop and the written definition, for any time; the first that differs is printed
# at its shortest; then interrupts at random moments. To repeat: make stress STRESS="--seed N". stress-asan: the same with the C++ library under AddressSanitizer.
STRESS ?= --seconds 600
stress: $(STAMP)
	PYTHONPATH=tests $(PYTHON) -m stress $(STRESS)
	$(PYTHON) tests/stress/signals.py $(STRESS)

# libasan goes first, because the interpreter was linked without it. Leaks are not looked for: the interpreter and torch leave
# blocks behind at exit by design. Nothing else is switched off.
stress-asan: $(STAMP) build/asan.so
	rm -rf build/asan && mkdir -p build/asan && cp -RL fused_l2 build/asan/ && rm -rf build/asan/fused_l2/kernels
	cp -R kernels build/asan/fused_l2/ && cp build/asan.so build/asan/fused_l2/libfused_l2.so
	LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=tests:build/asan $(PYTHON) -m stress $(STRESS)

# Figures for this machine. For a file to keep: make bench BENCH="--json bench/results/<date>-<machine>.json"
bench: $(STAMP)
	PYTHONSAFEPATH= PYTHONPATH=. $(PYTHON) -m bench $(BENCH)

# On a machine with a GPU, in eight minutes: the tests marked gpu, the assumptions of docs/design.md, steps against torch fused.
# For a file to keep: make gpu-report GPU_REPORT="--json bench/results/<date>-<gpu>.json"
gpu-report: $(STAMP)
	PYTHONSAFEPATH= PYTHONPATH=. $(PYTHON) -m bench.gpu_report $(GPU_REPORT)

# The C++ alone, without torch or Python: under AddressSanitizer with UndefinedBehaviorSanitizer, and with threads under
# ThreadSanitizer. Then the whole, driven from Python, under the first two. A file at a time, with as many jobs as there are
# cores; adam.cpp takes minutes.
CXX ?= g++
SANITIZE := -std=c++17 -O1 -g0 -fPIC -ffp-contract=off -fno-math-errno -w -Icsrc -pthread
# Not all of -fsanitize=undefined: its checks of every pointer, which AddressSanitizer's make superfluous, take the compiler ten minutes.
UNDEFINED := shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow,bounds
address_FLAGS := -fsanitize=address,$(UNDEFINED) -fno-sanitize-recover=all
thread_FLAGS := -fsanitize=thread
CORE := $(notdir $(filter-out csrc/library.cpp csrc/torch_abi.cpp csrc/look.cpp,$(wildcard csrc/*.cpp))) fuzz_kernels.cpp
sanitize:
	@mkdir -p build/address build/thread
	$(MAKE) -j$(shell getconf _NPROCESSORS_ONLN) build/fuzz-address build/fuzz-thread
	build/fuzz-address 600
	build/fuzz-thread 40
	$(MAKE) stress-asan STRESS="--seconds 60"
vpath %.cpp csrc tests
build/fuzz-%: $(CORE:%.cpp=build/\%/%.o)
	$(CXX) $($*_FLAGS) $^ -pthread -o $@
build/asan.so: $(patsubst csrc/%.cpp,build/address/%.o,$(wildcard csrc/*.cpp))
	$(CXX) $(address_FLAGS) -shared $^ -pthread -ldl -o $@
build/address/%.o: %.cpp $(wildcard csrc/*.h)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) $(address_FLAGS) -c $< -o $@
build/thread/%.o: %.cpp $(wildcard csrc/*.h)
	$(CXX) $(SANITIZE) $(thread_FLAGS) -c $< -o $@

lint: $(STAMP)
	$(PYTHON) -c "import mypy, ruff, clang_format" 2>/dev/null || \
	  $(call install,dev)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	$(dir $(PYTHON))clang-format --dry-run --Werror csrc/*.h csrc/*.cpp bench/*.h bench/*.cpp tests/*.cpp

format: $(STAMP)
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format
	$(dir $(PYTHON))clang-format -i csrc/*.h csrc/*.cpp bench/*.h bench/*.cpp tests/*.cpp

# dist/: the sdist, and a wheel made from it, which is then tried in fresh environments (tests/try_wheel.py): with the torch of this one,
# and in each Python of PYTHONS as far as loading the library. A wheel for older systems than this one: cibuildwheel, see pyproject.toml.
PYTHONS ?= $(wildcard $(foreach minor,10 11 12 13 14,$(HOME)/.pyenv/versions/3.$(minor).*/bin/python))
wheels: $(STAMP)
	$(call install,release)
	rm -rf dist && mkdir -p dist
	FUSED_L2_CPP=require $(PYTHON) -m build --outdir dist/built .
	mv dist/built/*.tar.gz dist/
	if [ "$$(uname)" = Linux ]; then PATH="$(abspath $(dir $(PYTHON))):$$PATH" $(PYTHON) -m auditwheel repair -w dist dist/built/*.whl; \
	  else mv dist/built/*.whl dist/; fi
	rm -rf dist/built
	$(PYTHON) tests/try_wheel.py dist/*.whl
	$(if $(PYTHONS),$(PYTHON) tests/try_wheel.py dist/*.whl --torch none $(addprefix --python ,$(PYTHONS)))
	$(PYTHON) -m pytest -q tests/test_wheel.py
	ls -l dist

# site/: the documentation. Fails on a warning.
docs: $(STAMP)
	$(call install,docs)
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs site
	@echo "site/index.html"

clean:
	rm -rf build dist site .editable fused_l2.egg-info fused_l2/libfused_l2.* .venv

.venv/bin/python:
	python3 -m venv --system-site-packages .venv

# An editable install does not compile again by itself: the stamp depends on the C++ sources.
$(STAMP): $(SOURCES) | $(PYTHON)
	$(PYTHON) -c "import torch" 2>/dev/null || $(PYTHON) -m pip install "$(TORCH)"
	$(PYTHON) -c "import torch; print('torch==' + torch.__version__)" > $(ENVIRONMENT)/.fused_l2-torch
	$(PYTHON) -m pip install -c $(ENVIRONMENT)/.fused_l2-torch -e '.[demo,test]'
	$(PYTHON) -c "import triton" 2>/dev/null || $(PYTHON) -m pip install "$(TRITON)" || \
	  echo "No triton for this platform: the tests of the GPU kernels will be skipped."
	@touch $@

