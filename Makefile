# make demo: set up, train Nano on five kinds of the embedded emoji for some minutes, look at samples.png.
# make text: the same for a model that reads sentences, on the names of the emoji; text.png. About an hour.
# make test: set up, run the tests that need the five packages only; those of optional packages are skipped and counted.
# make page: set up with gradio, open the page on the models of this repository.
# make test-all: install the optional packages too and run everything: the slow tests, and those of the page, which need
# Chromium or Chrome.
# make test-gpu: what only a GPU can show, some minutes on one; ends in a table for docs/gpus.md. Skipped without a GPU.
# It needs Python 3.11 or newer and a network for pip. PyTorch's small build for CPUs, on Linux:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
RUN = .venv/bin/python
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check
OPTIONAL = $(wildcard requirements-*.txt)

demo: .venv/ready
	$(RUN) train.py --classes face-smiling:5,person:3,food-fruit:4,food-sweet:4,country-flag --steps 1300 \
		--repa 0.5 --repa-block 4 --dino emoji --out runs/demo
	cp runs/demo/samples.png samples.png
	@echo "Look at samples.png: one row per class, drawn by the model that you just trained."

text: .venv/ready
	$(RUN) train.py --recipe emoji-text --out runs/text
	$(RUN) sample.py --ckpt runs/text/last.pt --prompts assets/invented_prompts.txt --out text.png
	@echo "Look at text.png: what the model makes of sentences that no emoji has."

page: .venv/ready-for-page
	$(RUN) app.py --open

test: .venv/ready
	$(RUN) -m pytest -q -rs -m "not slow and not browser" tests

test-all: .venv/ready-for-all
	$(RUN) -m pytest -q -rs tests

test-gpu: .venv/ready
	$(RUN) -m pytest -q -rs -m gpu --durations=10 tests

# Each marker is written last, so a broken installation is not taken for a finished one.
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	touch $@

.venv/ready-for-page: .venv/ready requirements-page.txt
	$(INSTALL) -r requirements.txt -r requirements-page.txt
	touch $@

.venv/ready-for-all: .venv/ready $(OPTIONAL)
	$(INSTALL) -r requirements.txt $(OPTIONAL:%=-r %)
	touch $@

clean:
	rm -rf .venv samples.png

.PHONY: demo text page test test-all test-gpu clean
