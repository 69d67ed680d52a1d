"""The paper's tables and figures, from the models that the Makefile trains.

    make paper                          # all at toy size, three seeds: trains what is missing
    make table3a SEEDS=5                # or another of NAMES below
    make evidence SEEDS=5               # the claims, tested with longer training
    python -m extras.paper evidence     # its tables and figure, from assets/paper/seed*.json alone

Reads seed0, seed1, ... in --out; writes NAME.md, .json and .png there, and paper.md.
Letters: B batch, H W pixels, L tokens, K codes in a codebook, n images or draws.
"""
import json
import math
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import trainer
from evaluate import BATCH
from extras.bench import count, interleave, step_ratio
from extras.report import (Bench, half_width, line_plot, machine, markdown, order_curves,
                           order_plots, picture_of, sample_rows, spread, two_columns)
from generator import load_pair, open_tokenizer
from trainer import BadInput

NAMES = ("table1", "table3a", "table3b", "table3c", "table5", "table6",
         "fig5", "fig6", "fig7", "fig8", "order")
INTERVAL = "± half of the 95 % interval (Student's t)"


def difference(ours, others, paper):
    """Cells of a table: the difference of two models' scores (one per seed), the paper's, and
    whether ours has its sign. paper: a number, "lower", "higher", or "" if it claims nothing."""
    gaps = np.subtract(ours, others)                                        # [seeds]
    half, claim = half_width(gaps), paper if isinstance(paper, str) else f"{paper:+.2f}"
    if not claim:
        verdict = ""
    elif half is None or abs(gaps.mean()) <= half:
        verdict = "undecided"
    else:
        agrees = (gaps.mean() < 0) == claim.startswith(("lower", "-"))
        verdict = "holds" if agrees else "does not at this scale"
    return [spread(gaps, "+.2f"), claim, verdict]


def compare(models, claims, notes=()):
    """For `publish`, of {model: {head: cell}}: a row per model, then the claims, each (head, model,
    another). A cell is a text, or a score ([ours, one value per seed], the paper's)."""
    rows = [["", *next(iter(models.values()))]]
    for name, cells in models.items():
        rows.append([name, *(cell if isinstance(cell, str) else
                             f"{spread(cell[0])} (paper {cell[1]:.2f})"
                             for cell in cells.values())])
    claimed = [["", "difference", "paper", "verdict"]]
    for head, a, b in claims:
        (ours, paper), (others, of_other) = models[a][head], models[b][head]
        claimed.append([f"{head}, {a} minus {b}", *difference(ours, others, paper - of_other)])
    return {"tables": [rows, claimed] if claims else [rows], "numbers": models, "notes": [*notes]}


# ---- Table 6: does the generator listen to the codes before?

def changed_distributions(ar, labels, at, changed, seed):
    """Section 4.4. labels [n] -> for m = 1 .. changed (before [n, K], after [n, K]): probabilities
    of code at + m where all codes before are greedy, and where codes at .. at + m - 1 are sampled.

    Our choices: no guidance, temperature 1; never the greedy code, so that exactly m differ; what
    is compared is the code right after them.
    """
    device, random = next(ar.parameters()).device, torch.Generator().manual_seed(seed)
    labels = labels.to(device)
    greedy = ar.generate(labels, top_k=1)                                   # [n, L]
    before = ar(greedy, labels).softmax(-1)                                 # [n, L, K]
    codes, after, pairs = greedy.clone(), before, []
    for i in range(at, at + changed):
        others = after[:, i].scatter(1, greedy[:, i, None], 0.0)            # [n, K]
        codes[:, i] = torch.multinomial(others.cpu(), 1, generator=random)[:, 0].to(device)
        after = ar(codes, labels).softmax(-1)                               # [n, L, K]
        pairs.append((before[:, i + 1], after[:, i + 1]))
    return pairs


def likeliest(p):
    """Of p [..., K], the codes that are compared: the paper's top 100, at most a tenth."""
    return p.topk(min(100, p.shape[-1] // 10)).indices


def overlap(p, q):
    """Share of the likeliest codes that p and q [n, K] have in common, [n]."""
    p, q = (torch.zeros_like(x).scatter(1, likeliest(x), 1.0) for x in (p, q))
    return (p * q).sum(1) / p.sum(1)


def token_overlap(ar, draws=256):
    """Table 6: the mean overlap after 1, 2, 3, 4 changes, over classes and all positions (the paper
    does not say which). A small one alone is no merit."""
    classes, found = ar.config.num_classes, []
    labels = torch.arange(classes).repeat(-(-draws // classes))             # [n]
    for at in range(ar.config.tokens - 4):
        pairs = changed_distributions(ar, labels, at, changed=4, seed=at)
        found.append(torch.stack([overlap(p, q) for p, q in pairs], 1))     # [n, 4]
    return torch.cat(found).mean(0).tolist()


# ---- Tables and figures

class Paper:
    """One method per table and figure: its docstring is the title; it returns a dict of any of
    tables (rows of texts), numbers, notes, picture."""
    def __init__(self, args):
        self.args, self.fid = args, args.config == "full"
        self.seeds = range(args.seeds or len(list(args.out.glob("seed[0-9]*"))))
        self.small, self.medium, self.large = (8, 16, 32) if args.config == "toy" else (32, 64, 128)
        self.pair = {"NativeTok": f"nativetok_{self.small}", "TiTok": f"titok_{self.small}"}
        self.bench = Bench(args, open_tokenizer(self.file("vqgan")).config.image_size)
        self.r, self.g = ("rFID", "gFID, AR") if self.fid else ("rFD", "gFD, AR")

    def file(self, name, seed=0):
        name = f"{name}.pt".replace("vqgan_stage2", "vqgan")        # a VQGAN has no stage 2
        path = self.args.out / f"seed{seed}" / name
        if not path.exists():
            raise BadInput(f"{path}: not found. Run make {self.args.what} "
                           f"CONFIG={self.args.config}")
        return path

    def load(self, name, seed=0):
        return open_tokenizer(self.file(name, seed), self.bench.device)

    def ar_pair(self, name, seed=0):
        return load_pair(self.file(f"ar_{name}", seed), self.file(f"{name}_stage2", seed),
                         self.bench.device)

    @cache        # several tables show the same score
    def scores(self, name):
        """FID or FD, one per seed, of an AR generator's samples or of the test images'
        reconstructions; of stage 1 by argmax, for its softmax blurs."""
        values = []
        for seed in self.seeds[:1] if name.startswith("vqgan") else self.seeds:     # all share it
            if self.fid:
                scored = json.loads(self.file(name, seed).with_suffix(".json").read_text())
                values.append(scored["scores"]["FID"])      # by evaluate.py: see the Makefile
            elif name.startswith("ar_"):
                values.append(self.bench.score_samples(*self.ar_pair(name[3:], seed))["fd"])
            else:
                tokenizer = self.load(name, seed)
                hard = {} if tokenizer.fine_tuned else {"hard": True}
                values.append(self.bench.score_reconstructions(tokenizer, **hard)["fd"])
        return values

    def row(self, name, rfid, stage=""):
        """Cells for `compare`. rfid: the paper's."""
        model = self.load(name)
        return {"parameters": f"{count(model) / 1e6:.2f}M", "tokens": str(model.config.tokens),
                f"{self.r}{stage}": (self.scores(name), rfid)}

    def table1(self):
        """Table 1: tokenizers under one AR generator"""
        models = {}
        for model, rfid, gfid in (("VQGAN", 2.19, 5.46), ("TiTok", 2.21, 7.45),
                                  ("NativeTok", 2.57, 5.23)):
            name = self.pair.get(model, "vqgan")
            models[model] = {**self.row(f"{name}_stage2", rfid),
                             self.g: (self.scores(f"ar_{name}"), gfid)}
        return compare(models, [(self.g, "NativeTok", "TiTok"), (self.g, "NativeTok", "VQGAN"),
                                (self.r, "NativeTok", "TiTok")],
                       ["VQGAN: here stage 0's; the paper's is LlamaGen's VQ-16, of 256 tokens and "
                        "16,384 codes. Its generator turns by row and column (--rope 2d)."])

    def table3a(self):
        """Table 3a: kinds of attention, stage 1 alone, equal steps and parameters"""
        return compare({"TiTok": self.row(f"titok_{self.small}", 12.99),
                        "TiTok (causal)": self.row(f"titok_causal_{self.small}", 12.95),
                        "NativeTok": self.row(f"nativetok_{self.small}", 11.19)},
                       [(self.r, "NativeTok", "TiTok"), (self.r, "NativeTok", "TiTok (causal)")])

    def table3b(self):
        """Table 3b: training strategies of HNT"""
        name = f"nativetok_{self.medium}"
        ratio = step_ratio(self.file(name), self.bench.device)
        return compare(
            {"full": self.row(f"{name}_full", 6.50), "reuse": self.row(f"{name}_reuse", 6.46),
             "reuse + fine-tune": self.row(name, 6.22)},
            [(self.r, "reuse", "full"), (self.r, "reuse + fine-tune", "reuse")],
            [f"Grown from {self.small} tokens; full starts from random weights.",
             f"A frozen step takes {ratio:.2f} of a full one (paper: 1.15 s of 1.53 s, 0.75)."])

    def table3c(self):
        """Table 3c: encoding speed"""
        size, device = self.bench.test.image_size, self.bench.device
        images = torch.rand(64, 3, size, size, device=device)
        seconds = interleave({model: partial(self.load(name).encode, images) for model, name in
                              (("VQGAN", "vqgan"), *self.pair.items())}, 9)
        models = {}
        for model, paper in (("VQGAN", 233.02), ("TiTok", 136.32), ("NativeTok", 119.85)):
            models[model] = {
                "images/s": ([64 / seconds[model]], paper),
                "relative to TiTok": ([seconds["TiTok"] / seconds[model]], paper / 136.32)}
        return compare(models, [], ["Batch 64. Compare the ratios, not the times."])

    def table5(self):
        """Table 5: number of tokens, before and after the decoder's fine-tuning"""
        models = {}
        for tokens, rfid1, rfid2 in ((self.small, 5.10, 2.57), (self.medium, 3.54, 1.89),
                                     (self.large, 2.86, 1.19)):
            name = f"nativetok_{tokens}"
            models[f"NativeTok-{tokens}"] = {**self.row(name, rfid1, ", stage 1"),
                                             **self.row(f"{name}_stage2", rfid2, ", stage 2")}
        small, medium, large = models
        second = f"{self.r}, stage 2"
        return compare(models, [(second, medium, small), (second, large, medium)])

    def table6(self):
        """Table 6: overlap of the likeliest next codes after earlier ones were changed"""
        models = {}
        for model, paper in (("NativeTok", (56.26, 50.89, 48.34, 48.44)),
                             ("TiTok", (78.66, 75.78, 73.43, 68.37))):
            ars = [self.ar_pair(self.pair[model], seed)[0] for seed in self.seeds]
            shares = np.transpose([token_overlap(ar) for ar in ars]) * 100  # [4, seeds]
            models[model] = {f"{m} changed, %": (ours.tolist(), theirs)
                             for m, ours, theirs in zip((1, 2, 3, 4), shares, paper)}
        size = ars[0].config.codebook_size
        top = len(likeliest(torch.zeros(size)))
        return compare(models, [(head, "NativeTok", "TiTok") for head in models["TiTok"]],
                       [f"The {top} likeliest; by chance {top / size:.1%}."])

    def fig5(self):
        """Fig. 5: the next code's distribution before (up) and after (down) codes were changed"""
        def stems(p, sign):     # a line up and back per code; roots, or only a few would show
            codes = likeliest(p[0]).sort().values.cpu()
            heights = sign * p[0].cpu()[codes, None].sqrt() * torch.tensor([0, 1, 0])
            return codes.repeat_interleave(3), heights.flatten()

        plots, label = [], torch.zeros(1, dtype=torch.int64)
        for changed in (2, 4):
            for model, name in self.pair.items():
                p, q = changed_distributions(self.ar_pair(name)[0], label, 1, changed, seed=0)[-1]
                title = f"{model}, {changed} codes changed: {overlap(p, q).item():.0%} overlap"
                curves = {"before": stems(p, 1), "after": stems(q, -1)}
                plots.append(line_plot(title, "code", curves))
        return {"picture": two_columns(plots),
                "notes": ["Class 0, changed from the second code on. Table 6 has the mean."]}

    def fig6(self):
        """Fig. 6: the first codes decoded, and the original at the right"""
        rows, lengths = [], range(0, self.small + 1, max(1, self.small // 16))
        for image in self.bench.examples()[:9:4].split(1):                  # [1, 3, H, W]
            for model, name in self.pair.items():
                tokenizer = self.load(f"{name}_stage2")
                codes = tokenizer.encode(image)                             # [1, L]
                decoded = [tokenizer.decode_codes(codes[:, :k]) for k in lengths]
                rows.append((model, torch.cat([*decoded, image])))
        return {"picture": picture_of(rows), "notes": [f"Codes: {', '.join(map(str, lengths))}."]}

    def fig7(self):
        """Fig. 7: reconstructions by number of tokens"""
        images = self.bench.examples()
        rows = [("original", images)]
        for tokens in (self.large, self.medium, self.small):
            tokenizer = self.load(f"nativetok_{tokens}_stage2")
            rows.append((f"NativeTok-{tokens}", tokenizer.decode_codes(tokenizer.encode(images))))
        return {"picture": picture_of(rows)}

    def fig8(self):
        """Fig. 8: samples of the AR generator over NativeTok (left) and TiTok (right)"""
        left, right = (sample_rows(self.bench, *self.ar_pair(name)) for name in self.pair.values())
        return {"picture": picture_of([(title, torch.cat([a, b]))
                                       for (title, a), (_, b) in zip(left, right)])}

    def order(self):
        """Order of the codes (not in the paper)"""
        rows, orders = [["", "bits per image under the AR generator", "entropies of the codes, "
                         "summed", "explained by class and context, %"]], {}
        for model, name in self.pair.items():
            seeds = [order_curves(self.bench, *self.ar_pair(name, seed)) for seed in self.seeds]
            orders[f"{model}, "] = seeds
            costs = [[*cost_of_codes(curves).values()] for curves in seeds]
            rows.append([model, *map(spread, zip(*costs))])
        return {"tables": [rows], "numbers": orders, "picture": two_columns(order_plots(orders))}


def publish(paper, name):
    """Print one table or figure, write NAME.md, .json and .png; returns the text."""
    args, bench, method = paper.args, paper.bench, getattr(paper, name)
    seeds = 1 if name == "table3c" or name.startswith("fig") else len(paper.seeds)
    made = {"title": method.__doc__, "seeds": seeds, "tables": [], "notes": [], **method()}
    scored = "" if paper.fid else (f", {len(bench.labels):,} images of {bench.test.name}, "
                                   f"{len(bench.sample_labels):,} samples")
    made["notes"].append(f"{args.config} size{scored}; {machine(bench.device)}; torch "
                         f"{torch.__version__}. Seeds: {seeds}, {INTERVAL}.")
    if paper.r in str(made["tables"]):
        made["notes"].append("FID by evaluate.py, its protocol in the .json files." if paper.fid
                             else "FD: Fréchet distance by a small network; not FID. Compare which "
                             "is lower, not the values.")
    blocks = [f"### {made['title']}", *map(markdown, made["tables"])]
    if picture := made.pop("picture", None):
        data.save_picture(picture, args.out / f"{name}.png")
        blocks.append(f"![]({name}.png)")
    blocks.append("\n".join(f"- {line}" for line in made["notes"]))
    text = "\n\n".join(blocks) + "\n"
    trainer.write_text(args.out / f"{name}.md", text)
    trainer.write_text(args.out / f"{name}.json", json.dumps(made, indent=1) + "\n")
    print(text, flush=True)
    return text


# ---- The study: longer training, Fashion-MNIST, 16 tokens, equal parameters, one VQGAN for all

BUDGETS, GUIDANCE = (200, 700, 3500), (1.0, 1.5, 2.0)       # of AR: training steps; sampling
STUDY = {"NativeTok": "nativetok_16", "TiTok": "titok_16", "TiTok (causal)": "titok_causal_16",
         "full": "hnt/nativetok_16_full", "reuse": "hnt/nativetok_16_reuse",
         "reuse + fine-tune": "hnt/nativetok_16"}


def cost_of_codes(curves):
    """Of order_curves(): bits of an image under AR; the entropies of its codes, summed; the share
    of these that class and context explain, %."""
    bits, alone = sum(curves["bits"]), sum(curves["unigram"])
    return {"bits": bits, "entropies": alone, "explained": 100 - 100 * bits / (alone or math.nan)}


def score_tokenizer(bench, path, teacher):
    """Of the test images' reconstructions; of stage 1 also by argmax, and the cross-entropy."""
    model = open_tokenizer(path, bench.device)
    scores = bench.score_reconstructions(model)
    if not model.fine_tuned:
        def cross_entropy(codes, targets):      # [B, L] and the VQGAN's [B, G*G] -> [B, G*G]
            logits = model.decoder(model.quantizer.lookup(codes.to(bench.device)))
            return F.cross_entropy(logits.transpose(1, 2), targets.to(bench.device),
                                   reduction="none")

        both = (bench.encode(model).split(BATCH), bench.encode(teacher).split(BATCH))
        losses = torch.cat(bench.in_threads(cross_entropy, zip(*both)))     # [n, G*G]
        scores["cross_entropy"] = losses.mean().item()
        hard = bench.score_reconstructions(model, hard=True)
        scores |= {f"{key}_argmax": value for key, value in hard.items()}
    return {"parameters": count(model), **scores}


def score_generator(bench, path, tokenizer_path, rfd):
    """Of samples at each guidance; bits under AR and of each code alone; Table 6."""
    (ar, tokenizer), scores = load_pair(path, tokenizer_path, bench.device), {}
    for scale in GUIDANCE:
        sampled = bench.score_samples(ar, tokenizer, guidance_scale=scale)
        scores |= {f"{key}, guidance {scale:g}": value for key, value in sampled.items()}
    scores["fd minus rfd"] = scores["fd, guidance 1.5"] - rfd
    scores |= cost_of_codes(order_curves(bench, ar, tokenizer))
    return scores | {f"overlap {m}": 100 * share for m, share in enumerate(token_overlap(ar), 1)}


def score_seed(args):
    """Score a seed's models -> seedN.json in --numbers; seed 0 leaves its logs there, too."""
    folder, trained, scores = args.out / f"seed{args.seed}", {}, {}
    teacher = open_tokenizer(folder / "vqgan.pt", args.device)
    bench = Bench(args, teacher.config.image_size)
    generators = {f"ar{steps}/ar_{name}": f"{name}_stage2"      # of causal, the longest run only
                  for name in [*STUDY.values()][:3]
                  for steps in (BUDGETS[-1:] if "causal" in name else BUDGETS)}
    names = ["vqgan", "hnt/nativetok_8", *STUDY.values(), *sorted({*generators.values()})]
    for name in (*names, *generators):
        path = folder / f"{name}.pt"
        saved = trainer.load_checkpoint(path, ("vqgan", "tokenizer", "ar"), "make evidence")
        trained[name] = saved["step"]
        if stage2 := generators.get(name):
            scores[name] = score_generator(bench, path, folder / f"{stage2}.pt",
                                           scores[stage2]["fd"])
        else:
            scores[name] = score_tokenizer(bench, path, teacher)
        print(f"{path}: scored", flush=True)
        if args.seed == 0:
            lines = trainer.read_log((args.out if name == "vqgan" else folder) / f"{name}.jsonl")
            kept = lines[:-1:1 + len(lines) // 20] + lines[-1:]
            trainer.write_text(args.numbers / f"{name.replace('/', '_')}.jsonl",
                               "".join(json.dumps(line) + "\n" for line in kept))
    trainer.write_text(args.numbers / f"seed{args.seed}.json", json.dumps({
        "seed": args.seed, "machine": f"{machine(bench.device)}; torch {torch.__version__}",
        "settings": {"data": bench.test.name, "images": len(bench.labels),
                     "samples": len(bench.sample_labels), "vqgan": trainer.fingerprint(teacher),
                     "classifier": trainer.fingerprint(bench.classifier), "steps": trained},
        "scores": scores}, indent=1) + "\n")


# what, its key in a model's scores, the model; the paper's claim, or its NativeTok minus TiTok
STAGE1 = [("PSNR after stage 1, soft, dB", "psnr", "{}", "higher"),
          ("PSNR after stage 1, argmax, dB", "psnr_argmax", "{}", "higher"),
          ("cross-entropy of stage 1", "cross_entropy", "{}", "lower")]
LATER = [
    ("PSNR after stage 2, dB", "psnr", "{}_stage2", ""),
    ("rFD after stage 2", "fd", "{}_stage2", 0.36),
    *((f"gFD after {steps:,} AR steps, guidance {scale:g}", f"fd, guidance {scale:g}",
       f"ar{steps}/ar_{{}}", -2.22) for steps in BUDGETS for scale in GUIDANCE),
    *((f"gFD minus rFD after {steps:,} AR steps, guidance 1.5", "fd minus rfd",
       f"ar{steps}/ar_{{}}", -2.58) for steps in BUDGETS),
    ("bits of an image under AR", "bits", "ar3500/ar_{}", "lower"),
    ("entropies of its codes, summed", "entropies", "ar3500/ar_{}", ""),
    ("of these explained by class and context, %", "explained", "ar3500/ar_{}", "higher"),
    *((f"overlap after {m} changed, %", f"overlap {m}", "ar3500/ar_{}", paper)
      for m, paper in enumerate((-22.40, -24.89, -25.09, -19.93), 1))]


def evidence(args):
    """Print what the seeds' files show, and draw the figure beside their folder."""
    seeds = [json.loads(file.read_text()) for file in sorted(args.numbers.glob("seed*.json"))]
    if not seeds:
        raise BadInput(f"{args.numbers}: no seed0.json there. Run make evidence")
    if any(seed["settings"] != seeds[0]["settings"] for seed in seeds):
        raise BadInput(f"{args.numbers}: the seeds' settings differ. Remove those of one kind")

    def of(model, key):
        return [seed["scores"][model][key] for seed in seeds]

    print(f"Seeds: {', '.join(str(seed['seed']) for seed in seeds)}, {INTERVAL}; differences seed "
          f"by seed.\n\n{'; '.join(sorted({seed['machine'] for seed in seeds}))}.\n")
    print(*(f"- {key}: {value}" for key, value in seeds[0]["settings"].items()), sep="\n")
    for title, one, other, rfid in (        # rfid: the paper's difference after stage 1
            ("Tables 1, 3a and 6", "NativeTok", "TiTok", -1.80),
            ("Table 3a", "NativeTok", "TiTok (causal)", -1.76),
            ("Table 3b", "reuse", "full", -0.04),
            ("Table 3b", "reuse + fine-tune", "reuse", -0.24)):
        cells = [["", one, other, "difference", "paper", "verdict"]]
        # it claims nothing of generators on TiTok (causal)
        later = LATER if other == "TiTok" else [(*row[:3], "") for row in LATER]
        stage1 = [*STAGE1, ("rFD after stage 1, argmax", "fd_argmax", "{}", rfid)]
        for what, key, where, paper in stage1 + later:
            ours, theirs = (where.format(STUDY[model]) for model in (one, other))
            if theirs not in seeds[0]["scores"]:
                continue
            a, b = of(ours, key), of(theirs, key)
            cells.append([what, spread(a), spread(b), *difference(a, b, paper)])
        print(f"\n### {title}: {one} and {other}\n\n{markdown(cells)}")
    curves, levels = {}, {}
    for model in ("NativeTok", "TiTok"):
        gfd = [of(f"ar{steps}/ar_{STUDY[model]}", "fd, guidance 1.5") for steps in BUDGETS]
        curves[f"{model}, samples"] = BUDGETS, np.transpose(gfd)            # [seeds, budgets]
        levels[f"{model}, reconstructions"] = np.mean(of(f"{STUDY[model]}_stage2", "fd"))
    picture = line_plot("Fréchet distance to test images (lower is better)",
                        "training steps of the AR generator", curves, levels)
    data.save_picture(picture, args.numbers.parent / "evidence.png")


def main():
    parser = trainer.command_line(__doc__, prog="-m extras.paper")
    commands = {"seed": score_seed, "evidence": evidence}       # of the study
    add = parser.add_argument
    add("what", choices=(*NAMES, "paper", *commands))
    add("--seeds", type=int, help="how many; default: all")
    add("--images", type=int, default=10_000, help="test images to score")
    add("--samples", type=int, default=2_500, help="samples to score")
    add("--numbers", type=Path, default="assets/paper", help="of the study: its files")
    args = trainer.parse(parser)
    if args.what in commands:
        return commands[args.what](args)
    paper = Paper(args)
    texts = [publish(paper, name) for name in (NAMES if args.what == "paper" else (args.what,))]
    if args.what == "paper":
        trainer.write_text(args.out / "paper.md", "\n".join(texts))


if __name__ == "__main__":
    trainer.launch(main)
