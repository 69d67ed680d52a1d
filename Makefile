# make demo          the whole pipeline at toy size, 12 to 15 minutes on two CPU cores; ends in out/toy/report.md
# make demo LONG=1   the same models trained five times longer, in out/toy_long
# make test          the test suite, under 10 minutes
# Other data:        make demo DATA=folder        Other results folder: make demo OUT=folder

PYTHON ?= python3
PY := .venv/bin/python
DATA ?= auto
SEED ?= 0

ifdef LONG
OUT ?= out/toy_long
VQGAN_STEPS := --steps 7500
TOKENIZER_STEPS := --steps 8000
HNT_STEPS := --steps 5000
STAGE2_STEPS := --steps 2000
AR_STEPS := --steps 3500
MASKGIT_STEPS := --steps 4000
else
OUT ?= out/toy
endif

# what `auto` came to is noted once, so that all stages use the same data
FLAGS = --config toy --data "$$(cat $(OUT)/data)" --out $(OUT) --seed $(SEED) --resume

.PHONY: demo test clean
demo: .venv/ready
	$(PY) data.py --data $(DATA) --note $(OUT)/data
	$(PY) vqgan.py $(FLAGS) $(VQGAN_STEPS)
	$(PY) tokenizer.py $(FLAGS) --tokens 8 $(TOKENIZER_STEPS)
	$(PY) hnt.py $(FLAGS) --tokens 16 $(HNT_STEPS)
	$(PY) tokenizer.py $(FLAGS) --tokens 16 --stage 2 $(STAGE2_STEPS)
	$(PY) generator.py $(FLAGS) --mode ar $(AR_STEPS)
	$(PY) generator.py $(FLAGS) --mode maskgit $(MASKGIT_STEPS)
	$(PY) evaluate.py report --config toy --data "$$(cat $(OUT)/data)" --out $(OUT) --seed $(SEED)

test: .venv/ready
	$(PY) -m pip install --quiet --disable-pip-version-check pytest safetensors
	$(PY) -m pytest -q test_all.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready

clean:
	rm -rf .venv __pycache__ .pytest_cache
