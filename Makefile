# make run: everything from nothing.  make test: what CI runs.  See README.md.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
NOTEBOOKS := $(sort $(wildcard notebooks/0*.ipynb))
export TF_CPP_MIN_LOG_LEVEL ?= 3
export TF_ENABLE_ONEDNN_OPTS ?= 1

.PHONY: run update pretrain report test test-all lab lint bench
.DEFAULT_GOAL := run

# The versions of constraints.txt, by uv where it is installed.
UV := $(shell command -v uv)
PIP := $(if $(UV),$(UV) pip install -q --python $(BIN)/python,$(BIN)/python -m pip install -q --disable-pip-version-check)
$(STAMP): requirements.txt pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -r requirements.txt -e ".[test]"
	$(PIP) --no-deps segmentation-models-3D==1.1.1 classification-models-3D==1.1.0
	touch $@

# The newest versions of everything; commit them once `make test` passes.
update:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --extra test --no-annotate \
	  --custom-compile-command "make update" requirements.txt pyproject.toml -o constraints.txt

# Prints a plan, then a line for each cell.
run: $(STAMP)
	@$(BIN)/python notebooks/run.py $(NOTEBOOKS)

# New pretrained weights, from nothing: hours. They overwrite those of the package.
pretrain: $(STAMP)
	$(BIN)/python benchmarks/pretrain.py

# Notebook 04 as one page that opens without Jupyter: no code, nothing fetched.
REPORT := data/report.html
report: $(STAMP)
	$(BIN)/jupyter nbconvert --log-level ERROR --to html --no-input \
	  --HTMLExporter.mathjax_url= --HTMLExporter.require_js_url= \
	  --output $(abspath $(REPORT)) notebooks/04_train_predict.ipynb
	@echo $(REPORT)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pytest -m ""

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Peers that are not installed are left out and named: see benchmarks/requirements.txt.
# Of the recipes, two hours of training, only the table of former runs is printed.
BENCHES := common imports prepare generator step predict score scale reader
bench: $(STAMP)
	for bench in $(BENCHES); do $(BIN)/python benchmarks/$$bench.py || exit 1; done > benchmarks/results.md
	$(BIN)/python benchmarks/compare.py >> benchmarks/results.md
	cat benchmarks/results.md
