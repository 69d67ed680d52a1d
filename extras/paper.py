"""The paper's tables and figures, from the models that the Makefile trains.

    make paper                  # all at toy size, three seeds: trains what is missing
    make table3a SEEDS=5        # or another of NAMES below
    make evidence               # tested with longer training: extras/evidence.py

Reads seed0, seed1, ... in --out; writes NAME.md, .json and .png there, and paper.md.
Letters: B batch, H W pixels, L tokens, K codes in a codebook, n images or draws, F features.
"""
import json
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import data
import trainer
from evaluate import (WEIGHTS, InceptionFID, dataset_pictures, feature_statistics, features_of,
                      frechet_distance, open_pictures, samples, without_border)
from extras.bench import PRESETS, hnt_steps, interleave
from extras.evidence import (changed_distributions, evidence, half_width, likeliest, normal,
                             overlap, score_seed, spread, token_overlap, verdict)
from extras.report import (Bench, line_plot, machine, markdown, order_curves, picture_of,
                           samples_grid, side_by_side)
from generator import load_codes, load_pair, open_tokenizer, sample_codes
from trainer import BadInput

NAMES = ("table1", "table3a", "table3b", "table3c", "table5", "table6",
         "fig5", "fig6", "fig7", "fig8", "order")
COMMANDS = {"seed": score_seed, "evidence": evidence, "normal": normal}     # of the study


def claim(words, one, other):
    """The difference of two models' scores (ours, one value per seed; the paper's) in a sentence,
    seed by seed."""
    gaps, paper = np.subtract(one[0], other[0]), one[1] - other[1]          # [seeds]
    return f"{words}: {spread(gaps, '+.2f')} (paper {paper:+.2f}): {verdict(gaps, paper)}."


def compare(models, claims, notes=()):
    """For `publish`, of {model: {head: cell}}: a row per model. A cell is a text or a score as in
    `claim`. claims: [(head, model, another)]."""
    heads, rows = [], []
    for name, cells in models.items():
        heads, row = [""], [name]
        for head, cell in cells.items():
            is_text = isinstance(cell, str)
            heads += [head] if is_text else [head, "paper"]
            row += [cell] if is_text else [spread(cell[0]), f"{cell[1]:.2f}"]
        rows.append(row)
    sentences = [claim(f"{head}, {a} minus {b}", models[a][head], models[b][head])
                 for head, a, b in claims]
    return {"rows": [heads, *rows], "numbers": models, "claims": sentences, "notes": [*notes]}


# ---- Parts of the figures

def stem_plot(title, p, q):
    """The likeliest codes of p [K] up, of q [K] down; square roots, or only a few would show."""
    up, down = likeliest(p), likeliest(q)
    codes, heights = torch.cat([up, down]), torch.cat([p[up].sqrt(), -q[down].sqrt()])
    both, curves = torch.cat([torch.isin(up, down), torch.isin(down, up)]), {}
    for name, shown in (("in both", both), ("in one", ~both)):
        stems = heights[shown, None] * torch.tensor([0, 1, 0])      # a line up and back, per code
        curves[name] = codes[shown].repeat_interleave(3).tolist(), stems.flatten().tolist()
    return line_plot(title, "code", curves)


def neighbour_information(codes):
    """Mutual information in bits of codes i and i + 1, [L - 1], of codes [n, L], minus that of
    shuffled ones: most pairs occur once."""
    def entropy(values):
        return stats.entropy(np.unique(values, return_counts=True)[1], base=2)

    random, bits = np.random.default_rng(0), []
    columns = codes.T.astype(np.int64)                                      # [L, n]
    for first, second in zip(columns * (columns.max() + 1), columns[1:]):   # sums name the pair
        joint, shuffled = entropy(first + second), entropy(first + random.permutation(second))
        bits.append(shuffled - joint)       # both contain the same two single entropies
    return bits


# ---- The tables and figures

class Paper:
    """One method per table and figure: its docstring is the title; it returns a dict of any of rows
    (of texts), numbers, claims, notes, picture."""
    def __init__(self, args):
        fid = bool(args.inception or args.config == "full")
        self.args, self.fid, self.count = args, fid, 50_000 if fid else args.samples
        self.seeds = range(args.seeds or len(list(args.out.glob("seed[0-9]*"))))
        self.small, self.medium, self.large = (8, 16, 32) if args.config == "toy" else (32, 64, 128)
        self.pair = {"NativeTok": f"nativetok_{self.small}", "TiTok": f"titok_{self.small}"}
        self.bench = Bench(args, open_tokenizer(self.file("vqgan")).config.image_size)
        self.r, self.g = ("rFID", "gFID, AR") if fid else ("rFD-classifier", "gFD-classifier, AR")
        self.pictures = partial(
            dataset_pictures, limit=None if fid else args.images, rounding="round")
        self.real = self.pictures(self.bench.test)
        self.real_g = (open_pictures(args.reference) if args.reference else
                       self.pictures(self.bench.train if fid else self.bench.test))

    @cached_property      # the FD-classifier may have to be trained
    def network(self):
        if self.fid:
            return InceptionFID(self.args.inception or WEIGHTS).to(self.args.device)
        classifier, border = self.bench.classifier, self.bench.test.border
        return lambda images: classifier(without_border(images.float() / 255, border))  # [B, F], ..

    def distance(self, real, fake):
        """FID, or the same of the FD-classifier. Pictures keep their statistics."""
        for pictures in (real, fake):
            if "pool" not in pictures.statistics:
                features = features_of(pictures, self.network, self.bench.device)["pool"]
                pictures.statistics["pool"] = feature_statistics(features)
        return frechet_distance(*real.statistics["pool"], *fake.statistics["pool"])

    def file(self, name, seed=0):
        name = f"{name}.pt".replace("vqgan_stage2", "vqgan")        # it has no stage 2
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
    def reconstructions(self, name):
        """Score of the test images' reconstructions, one per seed. Stage 1 by argmax: its softmax
        blurs, which a Fréchet distance punishes."""
        values = []
        for seed in self.seeds[:1] if "vqgan" in name else self.seeds:      # all share the VQGAN
            tokenizer = self.load(name, seed)
            hard = {} if getattr(tokenizer, "fine_tuned", True) else {"hard": True}
            fake = self.pictures(self.bench.test, tokenizer=tokenizer, **hard)
            values.append(self.distance(self.real, fake))
        return values

    @cache
    def samples(self, name):
        """Score of an AR generator's samples, one per seed."""
        return [self.distance(self.real_g, samples(*self.ar_pair(name, seed), self.count, 0,
                                                   "round")) for seed in self.seeds]

    def row(self, name, rfid, stage=""):
        """Cells for `compare`. rfid: the paper's."""
        model = self.load(name)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        return {"parameters": f"{millions:.{0 if millions > 100 else 2}f}M",
                "tokens": str(model.config.tokens),
                f"{self.r}{stage}": (self.reconstructions(name), rfid)}

    def table1(self):
        """Table 1: tokenizers under one AR generator"""
        models = {}
        for model, rfid, gfid in (("VQGAN", 2.19, 5.46), ("TiTok", 2.21, 7.45),
                                  ("NativeTok", 2.57, 5.23)):
            name = self.pair.get(model, "vqgan")
            models[model] = {**self.row(f"{name}_stage2", rfid), self.g: (self.samples(name), gfid)}
        vqgan = self.load("vqgan").config
        return compare(models, [(self.g, "NativeTok", "TiTok"), (self.g, "NativeTok", "VQGAN"),
                                (self.r, "NativeTok", "TiTok")],
                       [f"VQGAN: here stage 0's, {vqgan.tokens} tokens, {vqgan.codebook_size:,} "
                        "codes; the paper's is LlamaGen's VQ-16, 256 tokens, 16,384 codes. Its "
                        "generator turns by row and column (--rope 2d)."])

    def table3a(self):
        """Table 3a: kinds of attention, stage 1 alone, equal steps and parameters"""
        return compare({"TiTok": self.row(f"titok_{self.small}", 12.99),
                        "TiTok (causal)": self.row(f"titok_causal_{self.small}", 12.95),
                        "NativeTok": self.row(f"nativetok_{self.small}", 11.19)},
                       [(self.r, "NativeTok", "TiTok"), (self.r, "NativeTok", "TiTok (causal)")])

    def table3b(self):
        """Table 3b: training strategies of HNT"""
        name, device = f"nativetok_{self.medium}", self.bench.device
        preset, batch = ("toy", 16) if self.args.config == "toy" else (name, 64)
        steps = interleave(hnt_steps(PRESETS[preset], device, batch), 5, device)
        return compare(
            {"full": self.row(f"{name}_full", 6.50), "reuse": self.row(f"{name}_reuse", 6.46),
             "reuse + fine-tune": self.row(name, 6.22)},
            [(self.r, "reuse", "full"), (self.r, "reuse + fine-tune", "reuse")],
            [f"Grown from {self.small} tokens; full starts from random weights.",
             f"A step, batch {batch}: full {steps['full']:.3f} s, reuse {steps['frozen']:.3f} s, "
             f"{steps['frozen'] / steps['full']:.2f} of it (paper: 1.53 s, 1.15 s, 0.75)."])

    def table3c(self):
        """Table 3c: encoding speed"""
        size, device = self.bench.test.image_size, self.bench.device
        images = torch.rand(64, 3, size, size, device=device)
        seconds = interleave({model: partial(self.load(name).encode, images) for model, name in
                              (("VQGAN", "vqgan"), *self.pair.items())}, 9, device)
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
        plots, label = [], torch.zeros(1, dtype=torch.int64)
        for changed in (2, 4):
            for model, name in self.pair.items():
                p, q = changed_distributions(self.ar_pair(name)[0], label, 1, changed, seed=0)[-1]
                title = f"{model}, {changed} codes changed: {overlap(p, q).item():.0%} overlap"
                plots.append(stem_plot(title, p[0].cpu(), q[0].cpu()))
        return {"picture": side_by_side(plots, 2),
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
        return {"picture": picture_of(rows, 64 // self.bench.side),
                "notes": [f"Codes: {', '.join(map(str, lengths))}."]}

    def fig7(self):
        """Fig. 7: reconstructions by number of tokens"""
        images = self.bench.examples()
        rows = [("original", images)]
        for tokens in (self.large, self.medium, self.small):
            tokenizer = self.load(f"nativetok_{tokens}_stage2")
            rows.append((f"NativeTok-{tokens}", tokenizer.decode_codes(tokenizer.encode(images))))
        return {"picture": picture_of(rows, 64 // self.bench.side)}

    def fig8(self):
        """Fig. 8: samples of the AR generator over NativeTok (left) and TiTok (right)"""
        grids = []
        for ar, tokenizer in map(self.ar_pair, self.pair.values()):
            codes = sample_codes(ar, self.bench.sample_labels, self.bench.seed)     # [n, L]
            grids.append(samples_grid(self.bench, codes, tokenizer))
        return {"picture": side_by_side(grids, 2)}

    def order(self):
        """Order of the codes (not in the paper)"""
        numbers = {model: [] for model in self.pair}
        for model, name in self.pair.items():
            for seed in self.seeds:
                ar, path = self.file(f"ar_{name}", seed), self.file(f"{name}_stage2", seed)
                curves = order_curves(self.bench, ar, path)
                codes = load_codes(path.with_name(f"codes_{name}"))[0]      # [n, L], of train
                told = curves["neighbours"] = neighbour_information(codes)
                bits, alone, error = sum(curves["bits"]), sum(curves["unigram"]), curves["mse"]
                numbers[model].append({**curves, "means": {
                    "bits per image under the AR generator": bits,
                    "entropies of the codes alone, summed": alone,
                    "of these class and context explain, %": 100 - 100 * bits / (alone or np.nan),
                    "bits a code tells about the next, mean": np.mean(told),
                    "error of half the codes / of all": error[len(error) // 2 - 1] / error[-1]}})
        rows, plots = [["", *numbers]], []
        for title, x_name, key in (
                ("Bits per token under the AR generator", "position", "bits"),
                ("Entropy of the code alone, bits", "position", "unigram"),
                ("Error by prefix (mean squared)", "first k codes decoded", "mse"),
                ("Bits a code tells about the next", "position of the first", "neighbours")):
            curves = {}
            for model, seeds in numbers.items():
                values = np.array([seed[key] for seed in seeds])            # [seeds, positions]
                xs = seeds[0]["lengths"] if key == "mse" else range(1, values.shape[1] + 1)
                curves[model] = xs, values.mean(0), [half_width(v) or 0.0 for v in values.T]
            plots.append(line_plot(title, x_name, curves))
        for title in numbers["TiTok"][0]["means"]:
            rows.append([title, *(spread([seed["means"][title] for seed in seeds])
                                  for seeds in numbers.values())])
        return {"rows": rows, "numbers": numbers, "picture": side_by_side(plots, 2)}


def publish(paper, name):
    """Print one table or figure, write NAME.md, .json and .png; returns the text."""
    args, bench, method = paper.args, paper.bench, getattr(paper, name)
    made = {"title": method.__doc__, "seeds": len(paper.seeds),
            "rows": [], "claims": [], "notes": [], **method()}
    text, notes = f"### {made['title']}\n\n", made["notes"]
    notes.append(f"{args.config} size, {bench.test.name}; {machine(bench.device)}; torch "
                 f"{torch.__version__}.")
    notes.append("Seed 0." if name == "table3c" or name.startswith("fig") else
                 f"Seeds: {made['seeds']}. ± half of the 95 % interval (Student's t). All share "
                 "VQGAN, data and scoring network.")
    if paper.r in str(made["rows"]):
        notes.append(f"r: {paper.real.name} and reconstructions, of stage 1 by argmax; g: "
                     f"{paper.count:,} samples and {paper.real_g.name}. Rounded to bytes.")
        notes.append(f"FID: Inception of 2015, weights {paper.network.fingerprint}." if paper.fid
                     else "FD-classifier: a small network trained on the training images; not FID.")
    if args.config == "toy":
        notes.append("Other data and size than the paper's: compare which is lower, not values.")
    if made["rows"]:
        text += markdown(made["rows"]) + "\n\n"
    if picture := made.pop("picture", None):
        data.save_picture(picture, args.out / f"{name}.png")
        text += f"![]({name}.png)\n\n"
    text += "".join(f"- {line}\n" for line in made["claims"] + notes)
    (args.out / f"{name}.md").write_text(text)
    (args.out / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")
    print(text, flush=True)
    return text


def main():
    parser = trainer.ArgumentParser(__doc__)
    parser.set_defaults(overwrite=False, deterministic=False)
    add = parser.add_argument
    add("what", choices=(*NAMES, "paper", *COMMANDS))
    add("--config", choices=("toy", "full"), help="default: full with CUDA")
    add("--data", help="as in training")
    add("--out", help="with seed0, ...; default: out/<config>")
    add("--seeds", type=int, help="how many; default: all")
    add("--device", help="cpu or cuda; default: cuda if present")
    add("--images", type=int, default=10_000, help="FD-classifier: test images")
    add("--samples", type=int, default=2_500, help="FD-classifier: samples")
    add("--inception", metavar="FILE", type=Path, help="score by FID; full: always")
    add("--reference", metavar="PATH", help="of gFID; default: training images")
    add("--seed", type=int, default=0, help="of the study: which")
    add("--numbers", type=Path, default="assets/paper", help="of the study: its files")
    args = trainer.parse(parser)
    if args.what in COMMANDS:
        return COMMANDS[args.what](args)
    paper = Paper(args)
    texts = [publish(paper, name) for name in (NAMES if args.what == "paper" else (args.what,))]
    if args.what == "paper":
        (args.out / "paper.md").write_text("\n".join(texts))
        print(args.out / "paper.md")


if __name__ == "__main__":
    trainer.launch(main)
