# make sample        64 new images in out/samples.png, from trained toy weights in assets/toy
# make demo          the whole pipeline at toy size on two CPU cores; ends in out/toy/report.html
# make demo LONG=1   the same models trained several times longer, in out/toy_long
# make test          the test suite
# make paper         the paper's tables and figures at toy size, see below
# make evidence      its claims tested with longer training, see below
# make d2it          the second system, D2iT, at toy size; ends in out/toy/d2it.json and a table
# Other data:        make demo DATA=folder        Other results folder: make demo OUT=folder

PYTHON ?= python3
PY := .venv/bin/python
DATA ?= auto
SEED ?= 0
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

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

# what `auto` is gets written down once, so that all stages use the same data
FLAGS = --config toy --data "$$(cat $(OUT)/data)" --out $(OUT) --seed $(SEED)

# One thread per process: threads that wait for each other slow everything on a busy machine. The
# first three stages run as two ranks, the later ones side by side.
RANKS := $(shell test $$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1) -ge 2 && echo 2 || echo 1)
TWO_RANKS := OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc_per_node=$(RANKS)
GET_DATA = if [ "$(DATA)" = auto ]; then $(MAKE) --no-print-directory data/fashion-mnist; fi
.PHONY: demo vqgan stage1 hnt stage2 ar maskgit sample test clean
demo: .venv/ready
	@$(PIP) matplotlib
	+@$(GET_DATA)
	$(PY) data.py --data $(DATA) --note $(OUT)/data
	$(MAKE) --no-print-directory --jobs=3 maskgit ar stage2
	$(PY) -m extras.report $(FLAGS) --images 2500 --samples 1500
vqgan:
	$(TWO_RANKS) vqgan.py $(FLAGS) --resume $(VQGAN_STEPS)
stage1: vqgan
	$(TWO_RANKS) tokenizer.py $(FLAGS) --resume --tokens 8 $(TOKENIZER_STEPS)
hnt: stage1
	$(TWO_RANKS) hnt.py $(FLAGS) --resume --tokens 16 $(HNT_STEPS)
stage2: hnt
	$(PY) tokenizer.py $(FLAGS) --resume --tokens 16 --stage 2 $(STAGE2_STEPS)
# stage 2 does not change the codes, so generators need not wait for it
ar: hnt
	$(PY) generator.py $(FLAGS) --resume --mode ar --tokenizer $(OUT)/nativetok_16.pt $(AR_STEPS)
maskgit: hnt
	$(PY) generator.py $(FLAGS) --resume --mode maskgit --tokenizer $(OUT)/nativetok_16.pt $(MASKGIT_STEPS)

sample: .venv/ready
	$(PY) generator.py --config toy --mode ar --sample 64 --seed $(SEED) --out assets/toy \
	    --output out/samples.png --overwrite

# ---- The second system: D2iT (d2it.py), and plain DiT on patches of 2 x 2 and of 1 code. One DVAE;
# the others three times, seed 0 in OUT. The steps give all three as many FLOPs.
D2IT = OMP_NUM_THREADS=1 $(PY) d2it.py --config toy --data "$$(cat $(OUT)/data)" --resume
SEED_IN = --seed $* --out $(OUT)$(patsubst /d2it_seed0,,/d2it_seed$*)
D2IT_RUNS := $(foreach n,0 1 2,d2it_content_$(n) d2it_dit2_$(n) d2it_dit1_$(n) d2it_grain_$(n))
.PHONY: d2it d2it_dvae
d2it: .venv/ready
	+@$(GET_DATA)
	$(PY) data.py --data $(DATA) --note $(OUT)/data
	$(MAKE) --no-print-directory --jobs=2 d2it_dvae $(D2IT_RUNS)
	$(PY) -m extras.d2it_report $(FLAGS)
d2it_dvae:
	$(D2IT) --stage dvae --out $(OUT)
	@for n in 1 2; do mkdir -p $(OUT)/d2it_seed$$n; cp $(OUT)/d2it_dvae.pt $(OUT)/d2it_seed$$n; done
d2it_grain_%: d2it_dvae
	$(D2IT) --stage grain $(SEED_IN)
d2it_content_%: d2it_dvae
	$(D2IT) --stage content $(SEED_IN)
d2it_dit2_%: d2it_dvae
	$(D2IT) --stage content --baseline --patch_size 2 --steps 1030 $(SEED_IN)
d2it_dit1_%: d2it_dvae
	$(D2IT) --stage content --baseline --patch_size 1 --steps 265 $(SEED_IN)

# Fashion-MNIST where it is, from its own site, or Debian's package; without it the demo draws shapes
FASHION := http://fashion-mnist.s3-website.eu-central-1.amazonaws.com
data/fashion-mnist:
	@if [ -e /usr/share/datasets/fashion-mnist ]; then exit 0; fi; set -x; mkdir -p $@.part; \
	if curl -fsS --fail-early --connect-timeout 5 -o "$@.part/#1-ubyte.gz" \
	    "$(FASHION)/{train-images-idx3,train-labels-idx1,t10k-images-idx3,t10k-labels-idx1}-ubyte.gz"; \
	then mv $@.part $@; else rm -r $@.part; apt-get install -y dataset-fashion-mnist || true; fi

test: .venv/ready
	$(PIP) pytest safetensors matplotlib
	$(PY) -m pytest -q test_all.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch .venv/ready

clean:
	rm -rf .venv __pycache__ extras/__pycache__ .pytest_cache

# ---- The paper's tables and figures: make paper, or one by one make table1, make table3a, ...
# Trains what is missing, SEEDS times (all but the VQGAN), in out/paper_toy/seed0, seed1, ...
# CONFIG=full: the paper's own sizes, on GPUS GPUs, ImageNet in DATA, with the public files below.
# Changed steps do not train again what is there: remove its .done and .pt, or give another PAPER.
TABLES := table1 table3a table3b table3c table5 table6 fig5 fig6 fig7 fig8 order
CONFIG ?= toy
PAPER ?= out/$(if $(STUDY),evidence,paper_$(CONFIG))
ifeq ($(CONFIG),toy)
SEEDS ?= 3
# small (S), medium (M), large (L) number of tokens: 32, 64, 128 in the paper
S := 8
M := 16
L := 32
RUN := OMP_NUM_THREADS=1 $(PY)
JOBS ?= $(shell env -u OMP_NUM_THREADS nproc)
PAPER_STAGE1 := --steps 700
PAPER_HNT := --steps 500
PAPER_STAGE2 := --steps 300
PAPER_AR := --steps 400
PAPER_TITOK := --encoder_layers 8
PAPER_SCORES := --images 2500
MAKE_VQGAN = $(TWO_RANKS) vqgan.py $(IN) --out $(PAPER) $(PAPER_VQGAN)
DONE = touch $@
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
PAPER_FILES := $(WEIGHTS) $(INCEPTION) $(REFERENCE) weights/convnext_small.pth
# FID of each model, in a .json beside it
SCORED = $(if $(findstring /ar_,$@),gfid --reference $(REFERENCE),rfid --data $(DATA))
DONE = $(RUN) evaluate.py $(SCORED) $(basename $@).pt --inception $(INCEPTION) \
    --json $(basename $@).json && touch $@
MAKE_VQGAN = $(PY) -m extras.pretrained vqgan $(WEIGHTS) --out $(PAPER) --overwrite
endif
ifdef STUDY     # make evidence, below, sets it
S := 16
M := 32
L := 64
PAPER_VQGAN := --steps 7500
PAPER_STAGE1 := --steps 8000
PAPER_STAGE2 := --steps 2000
PAPER_AR := 200 700 3500
PAPER_TITOK :=
PAPER_HNT_SOURCE := --steps 1600
PAPER_HNT := --steps 1000
PAPER_SCORES := --samples 10000
endif
SEED_FOLDERS := $(foreach n,$(shell seq 0 $$(($(SEEDS) - 1))),$(PAPER)/seed$(n)/)
DONE_IN = $(foreach folder,$(SEED_FOLDERS),$(addprefix $(folder),$(addsuffix .done,$(1))))

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
NEEDS_fig8 := $(ARS)
NEEDS_order := $(ARS)
NEEDS_paper := $(sort $(foreach t,$(TABLES),$(NEEDS_$(t))))

# one process per core, each with one thread: at toy size faster than one with all threads
.PHONY: paper $(TABLES)
ifeq ($(MAKELEVEL),0)       # make -j table1 table3a: one after the other, each with its own JOBS
.NOTPARALLEL:
endif
paper $(TABLES): .venv/ready
	@for file in $(PAPER_FILES); do test -e $$file || \
	    { echo "$$file: not found. See docs/full_size.md and docs/fid.md" >&2; exit 2; }; done
	$(PIP) matplotlib
	$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync=target $(call DONE_IN,$(NEEDS_$@))
	$(PY) -m extras.paper $@ --config $(CONFIG) --data "$$(cat $(PAPER)/data)" --out $(PAPER) \
	    --seeds $(SEEDS) $(PAPER_SCORES)

# a .done beside a stage's files says that it has ended
IN = --config $(CONFIG) --data "$$(cat $(PAPER)/data)" --resume
HERE = $(IN) --out $(@D) --seed $(patsubst seed%,%,$(notdir $(@D)))
.SECONDARY:
$(PAPER)/vqgan.done: | .venv/ready
	+@$(GET_DATA)
	$(PY) data.py --data $(DATA) --note $(PAPER)/data
	$(MAKE_VQGAN) && touch $@
%/vqgan.done: $(PAPER)/vqgan.done
	mkdir -p $(@D) && cp $(PAPER)/*.pt $(@D) && $(DONE)
%/nativetok_$(S).done: %/vqgan.done
	$(RUN) tokenizer.py $(HERE) --tokens $(S) $(PAPER_STAGE1) && $(DONE)
%/titok_$(S).done: %/vqgan.done
	$(RUN) tokenizer.py $(HERE) --tokens $(S) --model titok $(PAPER_TITOK) $(PAPER_STAGE1) && $(DONE)
%/titok_causal_$(S).done: %/vqgan.done
	$(RUN) tokenizer.py $(HERE) --tokens $(S) --model titok_causal $(PAPER_TITOK) $(PAPER_STAGE1) && $(DONE)
%/nativetok_$(M)_full.done: %/nativetok_$(S).done
	$(RUN) hnt.py $(HERE) --tokens $(M) --strategy full $(PAPER_HNT) && $(DONE)
%/nativetok_$(M)_reuse.done: %/nativetok_$(S).done
	$(RUN) hnt.py $(HERE) --tokens $(M) --strategy reuse $(PAPER_HNT) && $(DONE)
%/nativetok_$(M).done: %/nativetok_$(S).done
	$(RUN) hnt.py $(HERE) --tokens $(M) $(PAPER_HNT) && $(DONE)
%/nativetok_$(L).done: %/nativetok_$(M).done
	$(RUN) hnt.py $(HERE) --tokens $(L) $(PAPER_HNT) && $(DONE)
%_stage2.done: %.done
	$(RUN) tokenizer.py $(HERE) --stage 2 --checkpoint $*.pt $(PAPER_STAGE2) && $(DONE)
%/ar_vqgan.done: %/vqgan.done
	$(RUN) generator.py $(HERE) --mode ar --rope 2d --tokenizer $(@D)/vqgan.pt $(PAPER_AR) && $(DONE)
%/ar_nativetok_$(S).done: %/nativetok_$(S)_stage2.done
	$(RUN) generator.py $(HERE) --mode ar --tokenizer $(@D)/nativetok_$(S)_stage2.pt $(PAPER_AR) && $(DONE)
%/ar_titok_$(S).done: %/titok_$(S)_stage2.done
	$(RUN) generator.py $(HERE) --mode ar --tokenizer $(@D)/titok_$(S)_stage2.pt $(PAPER_AR) && $(DONE)

# ---- The study: make evidence SEEDS=5 trains seeds 0 to 4 in out/evidence, two processes side by
# side. A seed whose numbers are in assets/paper/ is complete: nothing of it is trained or scored.
# If it is stopped, the same command continues. The tables and the figure come from these files.
NUMBERS ?= assets/paper
.PHONY: evidence seeds
evidence: .venv/ready
	$(PIP) matplotlib
	$(MAKE) --no-print-directory --jobs=2 STUDY=1 CONFIG=toy seeds
	$(PY) -m extras.paper evidence --numbers $(NUMBERS)
SEED_FILES := $(patsubst $(PAPER)/%/,$(NUMBERS)/%.json,$(SEED_FOLDERS))
seeds: $(filter-out $(wildcard $(NUMBERS)/*.json),$(SEED_FILES))
$(SEED_FILES): $(NUMBERS)/%.json: $(addprefix $(PAPER)/%/,$(addsuffix .done,$(foreach model,\
    nativetok titok titok_causal,$(model)_$(S)_generators $(model)_$(S)_stage2) hnt))
	$(RUN) -m extras.paper seed --config toy --data "$$(cat $(PAPER)/data)" --out $(PAPER) \
	    --seed $(*:seed%=%) --numbers $(NUMBERS) $(PAPER_SCORES)
# AR, trained for each number of steps in a folder of its own, over the same codes; for the causal
# TiTok, which the paper has no generator for, the longest only
%_generators.done: %.done
	set -e; mkdir -p $(@D)/codes_$(*F); \
	for steps in $(if $(findstring causal,$*),$(lastword $(PAPER_AR)),$(PAPER_AR)); do \
	    mkdir -p $(@D)/ar$$steps; ln -sfn ../codes_$(*F) $(@D)/ar$$steps; \
	    $(RUN) generator.py $(HERE) --out $(@D)/ar$$steps --mode ar --tokenizer $*.pt \
	        --steps $$steps; done; touch $@
# HNT: a short tokenizer grows in three ways
%/hnt.done: %/vqgan.done
	set -e; mkdir -p $*/hnt; cp $*/vqgan.pt $*/hnt; \
	$(RUN) tokenizer.py $(HERE) --out $*/hnt --tokens 8 $(PAPER_HNT_SOURCE); \
	for strategy in full reuse reuse+finetune; do \
	    $(RUN) hnt.py $(HERE) --out $*/hnt --tokens $(S) --strategy $$strategy $(PAPER_HNT); \
	done; touch $@
