# make lab    set up everything and open the series in JupyterLab
# make test   set up everything and run all tests
# Everything installed goes into .venv; delete that folder to start afresh.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PORT ?= 8888
READY := $(VENV)/.ready

# One thread a process: two torch processes with two threads each on two cores wait for each other.
notebooks figures fuzz bench: export OMP_NUM_THREADS ?= 1
test-processors notebooks figures fuzz bench: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: lab test course test-processors notebooks lint format phantoms heads figures fuzz bench quality clean help

help:
	@sed -n '/^[a-z-]*:.*##/s/:.*##/\t/p' $(MAKEFILE_LIST)

# The import at the end: a torch and a torchvision that do not fit fail here, not in a notebook.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11. Install a newer Python and run: make PYTHON=python3.12 …"; exit 1; }
	@echo "Installing the packages into $(VENV) (some minutes, 6 GB, once)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	$(PY) -c 'import torch, torchvision; print("torch", torch.__version__, "torchvision", torchvision.__version__)'
	@touch $@

phantoms: $(READY) ## make the default phantom set (once, about a minute)
	@$(PY) -m oasis_helpers phantoms

heads: phantoms ## make the fresh heads that samples are compared with (once, some minutes)
	@$(PY) -c 'from oasis_helpers.phantoms import fresh_heads; fresh_heads()'

lab: $(READY) ## open the series in JupyterLab; PORT=8889 for another port, HEADLESS=1 for no browser
	$(PY) -m oasis_helpers lab --port $(PORT) $(if $(HEADLESS),--headless)

test: $(READY) ## unit tests, and every notebook against its stored outputs
	$(PY) -m oasis_helpers test

course: $(READY) ## student and instructor editions and slides, in build/course
	rm -rf build/course
	$(PY) -m oasis_helpers course build/course

test-processors: heads ## every notebook as other processors and two threads run it (an hour or two)
	$(PY) tests/processors.py

notebooks: heads ## run the notebooks and store their outputs
	$(PY) tests/notebook_tools.py

lint: $(READY) ## ruff over code and notebooks
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

figures: phantoms ## redraw the pictures in figures/
	$(PY) figures/make_figures.py

fuzz: $(READY) ## damaged archives and pictures by the thousand (some minutes)
	$(PY) -m pytest tests/fuzz.py -q -p no:cacheprovider

bench: phantoms ## measure phantoms, loading, conversion, registration and resuming
	$(PY) benchmarks/data.py
	$(PY) benchmarks/conversion.py
	$(PY) benchmarks/volumes.py
	$(PY) benchmarks/resume.py

LARGE ?= runs/phantoms-large
quality: heads ## train the weights that ship and measure everything that takes hours (see benchmarks/)
	[ -d $(LARGE) ] || $(PY) -m oasis_helpers phantoms $(LARGE) --cases 302 35 17
	$(PY) benchmarks/realism.py
	$(PY) benchmarks/segmenter.py $(LARGE)
	$(PY) benchmarks/minutes.py $(LARGE) runs/minutes
	cp runs/minutes/laptop-60-minutes.safetensors oasis_helpers/weights/phantoms-64.safetensors
	$(PY) benchmarks/weightings.py $(LARGE) runs/weightings
	$(PY) benchmarks/time_to_quality.py $(LARGE)
	$(PY) benchmarks/samplers.py $(LARGE)
	$(PY) benchmarks/evaluation.py $(LARGE) runs/minutes
	$(PY) benchmarks/guided.py $(LARGE) runs/guided
	cp runs/guided/guided-64.safetensors runs/guided/guided-64-early.safetensors oasis_helpers/weights/
	$(PY) benchmarks/obedience.py
	$(PY) benchmarks/latent.py $(LARGE) runs/latent
	cp runs/latent/autoencoder-256.safetensors runs/latent/latent-256.safetensors oasis_helpers/weights/
	$(PY) benchmarks/first_stage.py $(LARGE)
	$(PY) benchmarks/first_stage.py $(LARGE) --terms
	$(PY) benchmarks/prompts.py $(LARGE) runs/latent
	$(PY) benchmarks/pixel_or_latent.py $(LARGE) runs/latent
	$(PY) benchmarks/pixel_or_latent.py --speeds
	$(PY) benchmarks/card.py
	$(PY) benchmarks/ablations.py
	$(PY) benchmarks/networks.py
	$(PY) benchmarks/scaling.py

clean: ## remove the environment and caches of this checkout
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .coverage build *.egg-info
