# make run: everything from nothing.  make test: what CI runs.  See README.md.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
NOTEBOOKS := $(sort $(wildcard notebooks/0*.ipynb))
export TF_CPP_MIN_LOG_LEVEL ?= 3
export TF_ENABLE_ONEDNN_OPTS ?= 1

.PHONY: run pretrain report test test-all lab lint bench
.DEFAULT_GOAL := run

$(STAMP): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -e ".[test]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps segmentation-models-3D==1.1.1 classification-models-3D==1.1.0
	touch $@

# Prints a plan, then a line for each cell.
run: $(STAMP)
	@$(BIN)/python notebooks/run.py $(NOTEBOOKS)

# The weights that come with the package, from nothing: hours.
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
