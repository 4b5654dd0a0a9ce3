# A fresh machine needs Python 3.10 to 3.13 and nothing else. Everything goes into .venv; the ComfyUI that the tests
# start lies in ~/.cache/pctalk-tests.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.cli
	mkdir -p out
	$(BIN)/pctalk talk web/examples/portrait.jpg web/examples/speech.flac --emotion happy:all:0.5 -o out/demo.mp4

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .

bench: $(VENV)/.cli
	$(BIN)/pctalk bench

# Torch comes first and alone: the release named here, whichever build the platform offers.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.cli: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[cli]"
	touch $@

$(VENV)/.test: $(VENV)/.cli
	$(BIN)/python -m pip install --quiet --editable ".[cli,test]"
	touch $@

clean:
	rm -rf $(VENV) out build *.egg-info
