# make demo          the whole pipeline at toy size, 12 to 15 minutes on two CPU cores; ends in out/toy/report.md
# make demo LONG=1   the same models trained five times longer, in out/toy_long
# make test          the test suite, under 10 minutes
# make paper         the paper's tables and figures at toy size, see below
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
	$(PY) -m extras.report --config toy --data "$$(cat $(OUT)/data)" --out $(OUT) --seed $(SEED)

test: .venv/ready
	$(PY) -m pip install --quiet --disable-pip-version-check pytest safetensors matplotlib
	$(PY) -m pytest -q test_all.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready

clean:
	rm -rf .venv __pycache__ extras/__pycache__ .pytest_cache

# ---- The paper's tables and figures: make paper, or make table1, table3a ... one by one.
# Trains what is missing, SEEDS times (all but the VQGAN), in out/paper_toy/seed0, seed1, ..., then extras/paper.py draws them.
# CONFIG=full: the paper's own sizes, on GPUS GPUs, ImageNet in DATA, with the public files named below.
# Steps changed here do not train again what is there: remove its .done and .pt, or choose another PAPER=folder.
TABLES := table1 table3a table3b table3c table5 table6 fig5 fig6 fig7 fig8 order
CONFIG ?= toy
PAPER ?= out/paper_$(CONFIG)
ifeq ($(CONFIG),toy)
SEEDS ?= 3
# small (S), medium (M), large (L) number of tokens: 32, 64, 128 in the paper
S := 8
M := 16
L := 32
RUN := OMP_NUM_THREADS=1 $(PY)
JOBS ?= $(shell nproc)
PAPER_STAGE0 = vqgan.py $(IN) --out $(PAPER) $(PAPER_VQGAN)
PAPER_STAGE1 := --steps 700
PAPER_HNT := --steps 500
PAPER_STAGE2 := --steps 300
PAPER_AR := --steps 400
PAPER_TITOK := --encoder_layers 8
PAPER_SCORES := --images 2500
else
SEEDS ?= 1
GPUS ?= 4
S := 32
M := 64
L := 128
RUN := $(PY) -m torch.distributed.run --nproc_per_node=$(GPUS)
JOBS := 1
ifeq ($(DATA),auto)
override DATA := data/imagenet
endif
WEIGHTS ?= weights/maskgit-vqgan-imagenet-f16-256.bin
INCEPTION ?= weights/pt_inception-2015-12-05-6726825d.pth
# ADM's file, whose statistics gFID is computed against
REFERENCE ?= weights/VIRTUAL_imagenet256_labeled.npz
PAPER_STAGE0 = -m extras.pretrained vqgan $(WEIGHTS) --out $(PAPER)
PAPER_FILES := $(WEIGHTS) $(INCEPTION) $(REFERENCE) weights/convnext_small.pth
PAPER_SCORES := --inception $(INCEPTION) --reference $(REFERENCE)
endif
DONE_IN = $(foreach n,$(shell seq 0 $$(($(SEEDS) - 1))),$(addprefix $(PAPER)/seed$(n)/,$(addsuffix .done,$(1))))

PAIR := nativetok_$(S) titok_$(S)
ARS := $(addprefix ar_,$(PAIR))
NEEDS_table1 := $(addsuffix _stage2,$(PAIR)) $(ARS) ar_vqgan
NEEDS_table3a := $(PAIR) titok_causal_$(S)
NEEDS_table3b := nativetok_$(M)_full nativetok_$(M)_reuse nativetok_$(M)
NEEDS_table3c := $(PAIR)
NEEDS_table5 := $(foreach n,$(S) $(M) $(L),nativetok_$(n)_stage2)
NEEDS_table6 := $(ARS)
NEEDS_fig5 := $(ARS)
NEEDS_fig6 := $(addsuffix _stage2,$(PAIR))
NEEDS_fig7 := $(NEEDS_table5)
NEEDS_fig8 := $(ARS) $(addsuffix _stage2,$(PAIR))
NEEDS_order := $(NEEDS_fig8)
NEEDS_paper := $(sort $(foreach t,$(TABLES),$(NEEDS_$(t))))

# one process a core, each with one thread: at this size faster than one process with all threads
.PHONY: paper $(TABLES)
ifeq ($(MAKELEVEL),0)       # make -j table1 table3a: one after the other, each with its own JOBS
.NOTPARALLEL:
endif
paper $(TABLES): .venv/ready
	@for file in $(PAPER_FILES); do test -e $$file || { echo "$$file: not found. See README, Full size" >&2; exit 2; }; done
	$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync=target $(call DONE_IN,$(NEEDS_$@))
	$(PY) -m extras.paper $@ --config $(CONFIG) --data "$$(cat $(PAPER)/data)" --out $(PAPER) --seeds $(SEEDS) $(PAPER_SCORES)

# what a stage's files are called is the stages' own business: a mark beside them says that one has ended
IN = --config $(CONFIG) --data "$$(cat $(PAPER)/data)" --resume
HERE = $(IN) --out $(@D) --seed $(patsubst seed%,%,$(notdir $(@D)))
.SECONDARY:
$(PAPER)/vqgan.done: | .venv/ready
	$(PY) data.py --data $(DATA) --note $(PAPER)/data
	$(PY) $(PAPER_STAGE0) && touch $@
%/vqgan.done: $(PAPER)/vqgan.done
	mkdir -p $(@D) && cp $(PAPER)/*.pt $(@D) && touch $@
%/nativetok_$(S).done: %/vqgan.done
	$(RUN) tokenizer.py $(HERE) --tokens $(S) $(PAPER_STAGE1) && touch $@
%/titok_$(S).done: %/vqgan.done
	$(RUN) tokenizer.py $(HERE) --tokens $(S) --model titok $(PAPER_TITOK) $(PAPER_STAGE1) && touch $@
%/titok_causal_$(S).done: %/vqgan.done
	$(RUN) tokenizer.py $(HERE) --tokens $(S) --model titok_causal $(PAPER_TITOK) $(PAPER_STAGE1) && touch $@
%/nativetok_$(M)_full.done: %/nativetok_$(S).done
	$(RUN) hnt.py $(HERE) --tokens $(M) --strategy full $(PAPER_HNT) && touch $@
%/nativetok_$(M)_reuse.done: %/nativetok_$(S).done
	$(RUN) hnt.py $(HERE) --tokens $(M) --strategy reuse $(PAPER_HNT) && touch $@
%/nativetok_$(M).done: %/nativetok_$(S).done
	$(RUN) hnt.py $(HERE) --tokens $(M) $(PAPER_HNT) && touch $@
%/nativetok_$(L).done: %/nativetok_$(M).done
	$(RUN) hnt.py $(HERE) --tokens $(L) $(PAPER_HNT) && touch $@
%_stage2.done: %.done
	$(RUN) tokenizer.py $(HERE) --stage 2 --checkpoint $*.pt $(PAPER_STAGE2) && touch $@
%/ar_vqgan.done: %/vqgan.done
	$(RUN) generator.py $(HERE) --mode ar --tokenizer $(@D)/vqgan.pt $(PAPER_AR) && touch $@
%/ar_nativetok_$(S).done: %/nativetok_$(S)_stage2.done
	$(RUN) generator.py $(HERE) --mode ar --tokenizer $(@D)/nativetok_$(S)_stage2.pt $(PAPER_AR) && touch $@
%/ar_titok_$(S).done: %/titok_$(S)_stage2.done
	$(RUN) generator.py $(HERE) --mode ar --tokenizer $(@D)/titok_$(S)_stage2.pt $(PAPER_AR) && touch $@
