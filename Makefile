# make demo: set up, train Nano on five kinds of the embedded emoji for some minutes, look at samples.png.
# make test: set up and run all tests but the slow ones; make test-all: the slow ones too.
# Nothing else is needed but Python 3.11 or newer and a network for pip.

PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python

demo: $(VENV)/ready
	$(RUN) train.py --classes face-smiling:5,person:3,food-fruit:4,food-sweet:4,country-flag --steps 1300 \
		--repa 0.5 --repa-block 4 --dino emoji --out runs/demo
	cp runs/demo/samples.png samples.png
	@echo "Look at samples.png: one row per class, drawn by the model that you just trained."

test: $(VENV)/ready-to-test
	$(RUN) -m pytest -q -m "not slow" tests

test-all: $(VENV)/ready-to-test
	$(RUN) -m pytest -q tests

# Made again when requirements.txt changes; the marker is written last, so a broken installation is not taken for one.
$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# The tests also use the optional packages behind --tensorboard and --wandb.
$(VENV)/ready-to-test: requirements-extra.txt $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-extra.txt
	touch $@

clean:
	rm -rf $(VENV) samples.png

.PHONY: demo test test-all clean
