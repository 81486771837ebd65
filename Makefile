# Everything a user or developer runs. Only Python 3.11, git and make are needed.
PYTHON ?= python3.11
VENV := .venv
ON_PATH := $(VENV)/lib/python3.11/site-packages/on_path.pth
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PYTHONPATH="src$${PYTHONPATH:+:$$PYTHONPATH}"
LINT := ruff check . && ruff format --check . && mypy
PYTEST := python -m pytest --numprocesses 2 --dist worksteal

.PHONY: help repro setup check-params check test format golden accept docs docs-site study sweep study-sweep
.PHONY: negative test-looks lock
.PHONY: export-setup export-test exports test-jax test-torch
.PHONY: image docker-repro docker-shell image-test browser-test bench
.DELETE_ON_ERROR:

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' Makefile

repro: setup check-params  ## run the study in params.yaml: only what changed
	$(RUN) python -m flatmin.prune
	$(RUN) dvc repro
	@$(TO_KEEP)

# DVC's own hint names dvc.lock alone. Edited code belongs to its result.
TO_KEEP := [ -z "$$(git status --porcelain dvc.lock metrics params.yaml plots)" ] || { \
	for path in accepted.json dvc.lock dvc.yaml metrics params.yaml plots src stages; do \
	[ -z "$$(git status --porcelain $$path)" ] || set -- "$$@" $$path; done; \
	echo "to keep this result: git add $$* && git commit"; }

# LOCK=gpu, given with any of these, installs the CUDA wheels too.
setup: $(VENV)/$(or $(LOCK),cpu).done $(VENV)/bin/flatmin $(ON_PATH)  ## make .venv from the locked requirements
	@. ./$(VENV)/bin/activate && test "$$VIRTUAL_ENV" -ef $(VENV) || { echo "error: $(VENV): expected an environment that was" \
		"made here, received that of $$VIRTUAL_ENV: remove $(VENV) and run make again" >&2; exit 1; }

# What the environment's programs start finds its python, also where nobody activated it: `.venv/bin/dvc repro`.
$(ON_PATH): | $(VENV)/$(or $(LOCK),cpu).done
	echo 'import os, sys; os.environ["PATH"] = f"{sys.prefix}/bin:" + os.environ.get("PATH", "")' >$@

check-params: setup  ## check params.yaml without running anything
	@$(RUN) python -m flatmin.check

# TESTS narrows either: make test TESTS=tests/test_sam_step.py
check: setup $(VENV)/dev.done  ## lint, types and unit tests, in a minute
	$(RUN) sh -c '$(LINT)'
	$(RUN) $(PYTEST) -m "not slow" $(TESTS)

test: setup $(VENV)/dev.done  ## lint, types and all tests, in a quarter of an hour
	$(RUN) sh -c '$(LINT)'
	$(RUN) $(PYTEST) $(TESTS)

format: setup $(VENV)/dev.done  ## format the code, with what lint can fix by itself
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .

# After a change of numbers that is meant; raise RESULTS_VERSION with it.
golden: setup $(VENV)/dev.done  ## write the golden test's numbers again
	$(RUN) python tests/golden.py --write

accept: setup $(VENV)/dev.done  ## record in dvc.lock that a change of code changed no number, without a rerun
	$(RUN) python scripts/accept.py

docs: setup  ## write the generated parts of every page (numbers, params, commands)
	$(RUN) python scripts/pages.py
	$(RUN) python bench/page.py
	$(RUN) python studies/cifar100/results.py

# A warning, such as of a link that leads nowhere, is an error.
docs-site: setup $(VENV)/docs.done  ## build the pages as a site: build/site/index.html
	$(RUN) python -m sphinx --fail-on-warning --keep-going --quiet -c docs . build/site

$(VENV)/dev.done $(VENV)/export.done $(VENV)/docs.done: | setup
$(VENV)/%.done: requirements/%.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $<
	touch $@

# The command `flatmin`, which runs this checkout's source.
$(VENV)/bin/flatmin: pyproject.toml | $(VENV)/$(or $(LOCK),cpu).done
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --editable .
	touch $@

# A study runs in a clone, so that the checkout's own params, metrics and plots stay as they are.
study: setup  ## run studies/NAME/params.yaml: make study NAME=digits
	@$(RUN) sh scripts/study.sh "$(NAME)"

# JOBS: the number of runs at a time. GRID: another grid of the study.
sweep: setup check-params  ## run the grid of the default study: table and picture in studies/digits
	@$(RUN) python scripts/sweep.py studies/digits/sweep.yaml $(if $(JOBS),--jobs $(JOBS))

study-sweep: setup  ## run the grid of a study in its clone: make study-sweep NAME=digits
	@$(RUN) sh scripts/study.sh "$(NAME)" sweep $(if $(JOBS),--jobs $(JOBS))

negative: setup check-params  ## run the negative controls of the default study: studies/digits/negative.md
	@$(RUN) python scripts/sweep.py studies/digits/negative.yaml $(if $(JOBS),--jobs $(JOBS))
	@$(RUN) dvc repro --quiet prepare
	@$(RUN) python scripts/negative_controls.py

test-looks: setup  ## count the sets of models that were ever scored on test
	@$(RUN) python scripts/test_looks.py

export-setup: $(VENV)/export.done  ## add what `flatmin export --format onnx` needs

exports: setup $(VENV)/export.done  ## export the default study's model in every format: bench/exports.json
	$(RUN) python bench/exports.py

export-test: setup $(VENV)/dev.done $(VENV)/export.done  ## test ONNX export, with the packages it needs
	$(RUN) python -m pytest tests/test_use_onnx.py

# flatmin.sam and flatmin.sharpness on Keras' other backends. torch is the CUDA build, some 6 GB; it runs on a CPU.
# Keras 3.15's variables on JAX, with NumPy 2, are warned of.
BACKEND_TESTS = KERAS_BACKEND=$* PYTHONPATH=src:tests build/$*/bin/python -m pytest --confcutdir $(BACKENDS) $(BACKENDS) \
	-W "ignore:__array__ implementation:DeprecationWarning"
BACKENDS := tests/keras_backends
test-jax:  ## test flatmin.sam and flatmin.sharpness on JAX, in a separate environment
test-torch:  ## test flatmin.sam and flatmin.sharpness on PyTorch, in a separate environment
test-jax test-torch: test-%: build/%/done
	$(BACKEND_TESTS)

build/%/done: requirements/%.txt
	$(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $<
	touch $@

COMPILE := uv pip compile --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet
lock:  ## compile the locks again (needs uv)
	cd requirements && $(COMPILE) --override overrides.txt cpu.in -o cpu.txt
	cd requirements && $(COMPILE) --override overrides.txt gpu.in -o gpu.txt
	cd requirements && $(COMPILE) dev.in -o dev.txt
	cd requirements && $(COMPILE) export.in -o export.txt
	cd requirements && $(COMPILE) browser.in -o browser.txt
	cd requirements && $(COMPILE) docs.in -o docs.txt
	cd requirements && $(COMPILE) jax.in -o jax.txt
	cd requirements && $(COMPILE) torch.in -o torch.txt

# LOCK=cpu leaves out the CUDA wheels; ENGINE=podman replaces docker. See docs/container.md.
ENGINE ?= docker
IMAGE := flatmin$(if $(filter cpu,$(LOCK)),-cpu)
INSIDE := ENGINE=$(ENGINE) IMAGE=$(IMAGE) scripts/container.sh

image:  ## build the image: Debian, Python and the locked wheels
	$(ENGINE) build --tag $(IMAGE) --build-arg LOCK=$(or $(LOCK),gpu) $(if $(BASE),--build-arg BASE=$(BASE)) \
		--build-arg REVISION=$$(git log -1 --format=%H -- Dockerfile requirements) .

docker-repro: image  ## run the study in the image, on the GPUs where there are any
	$(INSIDE) sh -c 'export PYTHONPATH=src; python -m flatmin.check && python -m flatmin.prune && exec dvc repro'
	@$(TO_KEEP)

docker-shell: image  ## open a shell in the image
	$(INSIDE) bash

image-test: setup  ## build the image without a registry, run the study in it, compare (root on Debian)
	scripts/image_test.sh

browser-test: setup $(VENV)/dev.done $(VENV)/browser.done  ## look at reports in Chromium, if it and npm are here (or root on Debian)
	@$(RUN) scripts/browser_test.sh

# QUICK=1 measures less, in minutes, into bench/results-quick.json. After a kill speed.py, the longest, resumes.
bench: setup  ## compare Flatmin with the usual pipelines: bench/results.json and docs/speed.md
	$(RUN) python bench/sam_cost.py $(if $(QUICK),--quick)
	$(RUN) python bench/speed.py $(if $(QUICK),--quick)
	$(if $(QUICK),,$(RUN) python bench/page.py)
