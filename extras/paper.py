"""The paper's tables and figures, from the models that make paper, or make table1, table3a ... trains.

    make paper                          # trains what is missing, then calls
    python -m extras.paper paper        # all of them: <out>/paper.md, and each as .md, .json and .png
    python -m extras.paper table1       # or one: table1 table3a table3b table3c table5 table6 fig5 fig6 fig7 fig8 order

Scores are the FD-classifier's of extras/report.py at toy size, FID (evaluate.py) at full size and with --inception.
Letters: n images of a set, L tokens, K codes in the codebook.
"""
import functools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import trainer
from evaluate import BATCH, dataset_pictures, frechet_scores, open_inception, open_pictures, samples
from extras.bench import hnt_steps
from extras.report import (
    Bench,
    Notebook,
    line_plot,
    load_pair,
    machine,
    made_of_all,
    markdown,
    order_curves,
    picture_of,
    samples_grid,
    side_by_side,
)
from generator import load_generator, open_tokenizer, sample_codes
from tokenizer import load_tokenizer
from trainer import BadInput
from vqgan import VQGANConfig

TABLES = ("table1", "table3a", "table3b", "table3c", "table5", "table6", "fig5", "fig6", "fig7", "fig8", "order")
CHANGED = (1, 2, 3, 4)          # Table 6


@dataclass
class Claim:
    """A difference that the paper reports, beside ours: seed by seed, since the seeds of both start alike."""
    words: str
    ours: list[float]
    others: list[float]
    paper: float                # ours less others in the paper

    def __str__(self):
        gaps = np.subtract(self.ours, self.others)
        half = half_width(gaps)
        verdict = ("not a number" if not np.isfinite(gaps).all() else "one seed cannot decide" if half is None
                   else "not decided by these seeds" if abs(gaps.mean()) <= half
                   else "so it is here too" if gaps.mean() * self.paper > 0 else "here it is the other way round")
        return f"{self.words}: {spread(gaps, '+.2f')} (paper {self.paper:+.2f}): {verdict}."


def half_width(values):
    """Half of the 95 % interval of the mean by Student's t; None of a single value."""
    n = len(values)
    return None if n < 2 else float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def spread(values, form=".2f"):
    """The text "mean ± half of the 95 % interval" of one value a seed; of a single one the value alone."""
    half = half_width(values)
    return f"{np.mean(values):{form}}" + ("" if half is None else f" ± {half:{form.lstrip('+')}}")


class Paper:
    """The models that `make paper` trained: <out>/vqgan.pt, and everything else once a seed, <out>/seed0, seed1, ...

    A method for each table and figure, of the name it is called by, returns what `publish` writes. Scores: FID at full
    size and where --inception is given, else the FD-classifier's; see protocol. Parameters are seed 0's.
    """

    def __init__(self, args, bench, made_of):
        self.bench, self.args = bench, args
        self.out, self.kept = args.out, Notebook(args.out / "measured.json", made_of)
        found = [(int(m[1]), path) for path in args.out.glob("seed*") if (m := re.fullmatch(r"seed(\d+)", path.name))]
        self.folders = [path for _, path in sorted(found)][:args.seeds]
        self.small, self.medium, self.large = {"toy": (8, 16, 32), "full": (32, 64, 128)}[args.config]
        self.pair = {"NativeTok": f"nativetok_{self.small}", "TiTok": f"titok_{self.small}"}

    @functools.cached_property
    def inception(self):
        """None: the FD-classifier scores."""
        return open_inception(self.args) if self.args.config == "full" or self.args.inception else None

    @property
    def score(self):
        return "FID" if self.inception else "FD-classifier"

    @property
    def scored(self):
        return (f"FID, {self.inception.fingerprint}, {self.args.rounding}, {self.args.reference}" if self.inception
                else self.score)

    def protocol(self):
        """What a score was computed on."""
        if self.inception:
            return (f"FID: Inception of 2015, weights {self.inception.fingerprint}, {self.args.rounding} to bytes. r: "
                    f"all images of val against their reconstructions; g: 50,000 samples against "
                    f"{self.args.reference or 'the training images'}.")
        return (f"FD-classifier: extras/report.py's own small network, not FID. r: reconstructions of "
                f"{len(self.bench.indices):,} test images against these images; g: {len(self.bench.sample_labels):,} "
                f"samples against the same images. Stage 1 is decoded by argmax, stage 2 by its softmax.")

    def of_seeds(self, what, measure, *names):
        """[measure(*files) for each seed], from the notebook where files have not changed. names: of checkpoints."""
        result = []
        for folder in self.folders:
            files = [folder / f"{name}.pt" for name in names]
            for file in files:
                if not file.exists():
                    raise BadInput(f"{file}: not found. {self.args.what} needs it. Make it anew: rm -f "
                                   f"{file.with_suffix('.done')}; make {self.args.what} CONFIG={self.args.config}")
            result.append(self.kept(f"{folder.name}: {what} of {', '.join(names)}", files, lambda: measure(*files)))
        return result

    def fid(self, real, fake):
        return frechet_scores(real, fake, self.inception, self.out, self.bench.device)[0]["FID"]

    def reconstructions(self, name):
        """Score of the test images' reconstructions, a value a seed. Stage 1 is decoded by argmax: its softmax blurs,
        which no stage 2 has learned to mend yet, and a Frechet distance counts that most."""
        def measure(path):
            tokenizer = open_tokenizer(path, self.bench.device)
            hard = {"hard": True} if getattr(tokenizer, "fine_tuned", True) is False else {}
            if self.inception:
                test = functools.partial(dataset_pictures, self.bench.test, None, self.args.rounding)
                return self.fid(test(), test(tokenizer, **hard))
            decode = functools.partial(tokenizer.decode_codes, **hard)
            return self.bench.score_reconstructions(self.bench.encode(tokenizer), decode)["fd"]

        return self.of_seeds(f"{self.scored} of reconstructions", measure, name)

    def samples(self, ar, name):
        """Score of an AR generator's samples, a value a seed."""
        def measure(ar_path, path):
            generator, tokenizer = load_pair(self.bench, ar_path, path)
            if self.inception:
                fake = samples(generator, tokenizer, 50_000, self.bench.seed, self.args.rounding, self.bench.device)
                return self.fid(open_pictures(self.args.reference) if self.args.reference else
                                dataset_pictures(self.bench.train, None, self.args.rounding), fake)
            codes = sample_codes(generator, self.bench.sample_labels, self.bench.seed, BATCH // 2)      # [samples, L]
            return self.bench.score_samples(codes, tokenizer.decode_codes)["fd"]

        return self.of_seeds(f"{self.scored} of samples", measure, ar, name)

    def parameters(self, name):
        """Millions, the pixel decoder included, as in the paper's tables."""
        model = open_tokenizer(self.folders[0] / f"{name}.pt")
        return f"{trainer.count([model]) / 1e6:.{0 if trainer.count([model]) > 1e8 else 2}f}M"

    def table1(self):
        """Three tokenizers under one AR generator. NativeTok, TiTok: stage 2's, equal steps and parameters."""
        rows, numbers = [["tokenizer", "parameters", "tokens", f"r{self.score}", "paper: rFID", f"g{self.score}, AR",
                          "paper: gFID"]], {}
        for title, name, ar, published in (
                ("VQGAN", "vqgan", "ar_vqgan", ("2.19", "5.46")),
                ("TiTok", f"titok_{self.small}_stage2", f"ar_titok_{self.small}", ("2.21", "7.45")),
                ("NativeTok", f"nativetok_{self.small}_stage2", f"ar_nativetok_{self.small}", ("2.57", "5.23"))):
            r, g = self.reconstructions(name), self.samples(ar, name)
            tokens = open_tokenizer(self.folders[0] / f"{name}.pt").config.tokens
            # all seeds share the VQGAN
            rows.append([title, self.parameters(name), str(tokens), spread(r[:1] if title == "VQGAN" else r),
                         published[0], spread(g), published[1]])
            numbers[title] = {"reconstructions": r, "samples": g}
        n, t, v = (numbers[k]["samples"] for k in ("NativeTok", "TiTok", "VQGAN"))
        claims = [Claim("samples, NativeTok less TiTok", n, t, 5.23 - 7.45),
                  Claim("samples, NativeTok less VQGAN", n, v, 5.23 - 5.46),
                  Claim("reconstructions, NativeTok less TiTok",
                        *(numbers[k]["reconstructions"] for k in ("NativeTok", "TiTok")), 2.57 - 2.21)]
        return Published("Table 1: tokenizers under one AR generator", rows, numbers, claims)

    def table3a(self):
        """Kinds of attention: stage 1 alone, equal steps and parameters."""
        published = {"TiTok": 12.99, "TiTok (causal)": 12.95, "NativeTok": 11.19}
        names = {"TiTok": f"titok_{self.small}", "TiTok (causal)": f"titok_causal_{self.small}",
                 "NativeTok": f"nativetok_{self.small}"}
        numbers = {title: self.reconstructions(name) for title, name in names.items()}
        rows = [["model", "parameters", f"r{self.score}", "paper: rFID"]]
        rows += [[f"{title}, {self.small} tokens", self.parameters(names[title]), spread(numbers[title]),
                  str(published[title])] for title in names]
        claims = [Claim(f"NativeTok less {other}", numbers["NativeTok"], numbers[other], 11.19 - published[other])
                  for other in ("TiTok", "TiTok (causal)")]
        return Published("Table 3a: attention", rows, numbers, claims)

    def table3b(self):
        """HNT's strategies. Seconds: forms that took turns in one run, on random images, once for all seeds."""
        name = f"nativetok_{self.medium}"
        batch = {"toy": 16, "full": 64}[self.args.config]
        numbers = {"full": self.reconstructions(f"{name}_full"), "reuse": self.reconstructions(f"{name}_reuse"),
                   "reuse + fine-tune": self.reconstructions(name)}
        seconds = self.kept(f"seconds a step, {machine(self.bench.device)}", [], lambda: trainer.take_turns(
            dict(hnt_steps("toy" if self.args.config == "toy" else name, self.bench.device, batch)), 5,
            self.bench.device))
        published = {"full": ("6.50", "1.53 s"), "reuse": ("6.46", "1.15 s"), "reuse + fine-tune": ("6.22", "-")}
        own = {"full": f"{seconds['full']:.3f} s", "reuse": f"{seconds['frozen']:.3f} s", "reuse + fine-tune": "-"}
        rows = [["strategy", f"r{self.score}", "paper: rFID", "a step", "paper: a step"]]
        rows += [[title, spread(numbers[title]), published[title][0], own[title], published[title][1]]
                 for title in numbers]
        claims = [Claim("reuse less full", numbers["reuse"], numbers["full"], 6.46 - 6.50),
                  Claim("reuse + fine-tune less reuse", numbers["reuse + fine-tune"], numbers["reuse"], 6.22 - 6.46)]
        return Published(f"Table 3b: training strategies, {self.medium} tokens grown from {self.small}", rows,
                         {**numbers, "seconds": seconds}, claims,
                         [f"A step, frozen / full: {seconds['frozen'] / seconds['full']:.2f} (paper 0.75); batch "
                          f"{batch}. full starts at random: it does without the steps that the others' source had."])

    def table3c(self):
        """Encoding speed: images -> codes, forms that take turns in one run. Weights do not matter, so seed 0's."""
        batch = 64
        models = {"VQGAN": "vqgan", **self.pair}
        size = self.bench.test.image_size

        @torch.inference_mode()
        def measure(*paths):
            images = torch.rand(batch, 3, size, size, device=self.bench.device)
            forms = {title: functools.partial(open_tokenizer(path, self.bench.device).encode, images)
                     for title, path in zip(models, paths)}
            return trainer.take_turns(forms, 9, self.bench.device)

        files = [self.folders[0] / f"{name}.pt" for name in models.values()]
        seconds = self.kept(f"encoding, {machine(self.bench.device)}", files, lambda: measure(*files))
        speed = {title: batch / value for title, value in seconds.items()}
        rows = [["model", "images/s", "of TiTok's", "paper: images/s", "of TiTok's"]]
        for title, published in (("VQGAN", 233.02), ("TiTok", 136.32), ("NativeTok", 119.85)):
            rows.append([title, f"{speed[title]:.1f}", f"{speed[title] / speed['TiTok']:.2f}", f"{published:.2f}",
                         f"{published / 136.32:.2f}"])
        return Published("Table 3c: encoding speed", rows, speed, all_seeds=False, notes=[
            f"Batch {batch}. Times of a shared machine: compare the ratios."])

    def table5(self):
        """Number of tokens and stage. medium and large are grown (HNT), for fewer steps each than small was trained."""
        published = {self.small: ("5.10", "2.57"), self.medium: ("3.54", "1.89"), self.large: ("2.86", "1.19")}
        rows, numbers = [["model", "parameters", f"r{self.score}, stage 1", "paper: rFID", f"r{self.score}, stage 2",
                          "paper: rFID"]], {}
        for tokens, (first, second) in published.items():
            name = f"nativetok_{tokens}"
            numbers[name] = {"stage 1": self.reconstructions(name), "stage 2": self.reconstructions(f"{name}_stage2")}
            rows.append([f"NativeTok-{tokens}", self.parameters(name), spread(numbers[name]["stage 1"]), first,
                         spread(numbers[name]["stage 2"]), second])
        s, m, l = (numbers[f"nativetok_{n}"]["stage 2"] for n in published)
        claims = [Claim(f"stage 2, {self.medium} less {self.small} tokens", m, s, 1.89 - 2.57),
                  Claim(f"stage 2, {self.large} less {self.medium} tokens", l, m, 1.19 - 1.89)]
        return Published("Table 5: number of tokens, before and after the decoder's fine-tuning", rows, numbers, claims)

    def table6(self):
        top, share = self.top()
        numbers = {title: self.of_seeds("overlap", lambda *pair: token_overlap(load_pair(self.bench, *pair)[0], top),
                                        f"ar_{name}", f"{name}_stage2") for title, name in self.pair.items()}
        published = {"NativeTok": (56.26, 50.89, 48.34, 48.44), "TiTok": (78.66, 75.78, 73.43, 68.37)}
        rows = [["codes changed", *(head for title in numbers for head in (title, f"paper: {title}"))]]
        rows += [[str(n), *(cell for title in numbers for cell in (
            spread([100 * seed[i] for seed in numbers[title]], ".1f") + " %", f"{published[title][i]:.1f} %"))]
            for i, n in enumerate(CHANGED)]
        claims = [Claim(f"{n} changed, NativeTok less TiTok, points",
                        *([100 * seed[i] for seed in numbers[title]] for title in self.pair),
                        published["NativeTok"][i] - published["TiTok"][i]) for i, n in enumerate(CHANGED)]
        return Published(f"Table 6: overlap of the {top} likeliest next codes (by chance {share:.1%})", rows, numbers,
                         claims)

    def top(self):
        """(how many of the likeliest codes are compared, their share): the paper's 100 of 4096; of fewer a tenth."""
        size = load_generator(self.folders[0] / f"ar_{self.pair['NativeTok']}.pt").config.codebook_size
        top = 100 if size >= 4096 else size // 10
        return top, top / size

    @torch.inference_mode()
    def fig5(self):
        """Two next-code distributions, of the greedy prefix and of one with its last 2 or 4 codes changed; class 0, the
        position after `at` + changed codes, seed 0. The overlap of one such pair says little: Table 6 has the mean."""
        top, at, plots, numbers = self.top()[0], 1, [], {}
        for changed in (2, 4):
            for title, name in self.pair.items():
                ar, _ = load_pair(self.bench, *(self.folders[0] / f"{n}.pt" for n in (f"ar_{name}", f"{name}_stage2")))
                before, after = changed_distributions(ar, torch.zeros(1, dtype=torch.int64), at, changed, seed=0)[-1]
                share = overlap(before, after, top).item()
                numbers[f"{title}, {changed} changed"] = {"overlap": share, "before": before[0].tolist(),
                                                          "after": after[0].tolist()}
                plots.append(stem_plot(f"{title}, {changed} codes changed: {share:.0%} overlap", before[0].cpu(),
                                       after[0].cpu(), top))
        return Published("Fig. 5: the next code's distribution, before (up) and after (down)", [], numbers,
                         picture=side_by_side(plots, 2), all_seeds=False)

    @torch.inference_mode()
    def fig6(self):
        """The first 0, 1, ... codes decoded, for three images; NativeTok above TiTok, the original at the right."""
        images, rows = self.bench.examples()[:9:4], []
        models = {title: load_tokenizer(self.folders[0] / f"{name}_stage2.pt", self.bench.device)
                  for title, name in self.pair.items()}
        for image in images.split(1):
            for title, model in models.items():
                codes = model.encode(image)                                 # [1, L]
                lengths = sorted({round(k) for k in np.linspace(0, codes.shape[1], min(codes.shape[1], 16) + 1)})
                rows.append((title, torch.cat([model.decode_codes(codes[:, :k]) for k in lengths] + [image])))
        return Published(f"Fig. 6: the first {', '.join(map(str, lengths))} codes, and the original", [], {},
                         picture=picture_of(rows, 64 // self.bench.side), all_seeds=False)

    @torch.inference_mode()
    def fig7(self):
        images = self.bench.examples()
        rows = [("original", images)]
        for tokens in (self.large, self.medium, self.small):
            model = load_tokenizer(self.folders[0] / f"nativetok_{tokens}_stage2.pt", self.bench.device)
            rows.append((f"NativeTok-{tokens}", model.decode_codes(model.encode(images))))
        return Published("Fig. 7: reconstructions", [], {}, picture=picture_of(rows, 64 // self.bench.side),
                         all_seeds=False)

    @torch.inference_mode()
    def fig8(self):
        """Samples of the AR generator over NativeTok and over TiTok, seed 0, one row a class."""
        grids = []
        for name in self.pair.values():
            generator, tokenizer = load_pair(self.bench, *(self.folders[0] / f"{n}.pt" for n in
                                                           (f"ar_{name}", f"{name}_stage2")))
            codes = sample_codes(generator, self.bench.sample_labels, self.bench.seed, BATCH // 2)
            grids.append(samples_grid(self.bench, codes, tokenizer))
        return Published("Fig. 8: samples, NativeTok left, TiTok right", [], {}, picture=side_by_side(grids, 2),
                         all_seeds=False)

    def order(self):
        """Beyond the paper: bits a token by position and error by prefix (test images), and what a code tells of the
        next one (training images, of which there are more)."""
        def measure(ar, path):
            curves = order_curves(self.bench, ar, path)
            file = path.with_name(f"codes_{path.stem.removesuffix('_stage2')}_train.npy")
            if not file.exists():
                raise BadInput(f"{file}: not found. It comes with {ar}, which must be trained again without it")
            codes = np.load(file)[0]                                        # [n, L], of the training images
            return {**curves, "neighbours": neighbour_information(codes, load_generator(ar).config.codebook_size)}

        numbers = {title: self.of_seeds("order", measure, f"ar_{name}", f"{name}_stage2")
                   for title, name in self.pair.items()}

        def plot(title, x_name, key, xs):
            curves = {}
            for name, seeds in numbers.items():
                values = np.array([seed[key] for seed in seeds])            # [seeds, positions]
                half = [half_width(column) or 0.0 for column in values.T]
                curves[name] = (xs or seeds[0]["lengths"], values.mean(0).tolist(), half)
            return line_plot(title, x_name, curves)

        tokens = self.small
        plots = [plot("Bits a token under the AR generator", "position", "bits", range(1, tokens + 1)),
                 plot("Entropy of the code alone, bits", "position", "unigram", range(1, tokens + 1)),
                 plot("Error by prefix (mean squared)", "first k codes decoded", "mse", None),
                 plot("Bits a code tells of the next one", "position of the first", "neighbours", range(1, tokens))]
        rows = [["", *numbers]]
        for title, value in (
                ("bits an image under the AR generator", lambda s: sum(s["bits"])),
                ("entropies of the codes alone, summed", lambda s: sum(s["unigram"])),
                ("of these class and context explain, %", lambda s: 100 - 100 * sum(s["bits"]) / sum(s["unigram"])),
                ("bits a code tells of the next one, mean", lambda s: np.mean(s["neighbours"])),
                ("error of half the codes / of all", lambda s: s["mse"][len(s["mse"]) // 2 - 1] / s["mse"][-1])):
            rows.append([title, *(spread([value(seed) for seed in seeds]) for seeds in numbers.values())])
        return Published("Order of the codes (not in the paper)", rows, numbers, picture=side_by_side(plots, 2))


@dataclass
class Published:
    """A table or figure: title, rows of texts (the first is the head), numbers for the JSON, and a picture."""
    title: str
    rows: list
    numbers: dict
    claims: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    picture: Image.Image | None = None
    all_seeds: bool = True                  # False: of seed 0


def changed_distributions(ar, labels, at, changed, seed):
    """What the next code is thought to be, after a greedy prefix and after one whose last codes were changed.

    labels [n]; at: i, codes before it are kept. Returns for m = 1 .. changed (before [n, K], after [n, K]), the
    probabilities of code i + m where codes i .. i + m - 1 are the greedy ones, and where they are others. Section 4.4's
    method, step by step; where its text leaves a choice, ours stands in brackets:
    1. A condition C is given. [A class; the same for both inputs; no guidance, temperature 1.]
    2. Codes before i are "deterministically selected as the most probable choices": greedy.
    3. Codes i .. j - 1 are "sampled according to their probability distribution". [In one of the two inputs; the other
       goes on greedily. The paper may as well have sampled both. The code that greedy takes is left out of the draw, so
       that exactly m codes differ: the table's "number of inconsistent tokens".]
    4. The distributions of the next code under the two inputs are compared. [Code j, right after the changed ones; the
       text says "position j + 1", and may count from 1.]
    """
    device = next(ar.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    labels = labels.to(device)
    greedy = ar.generate(labels, top_k=1)                                   # [n, L]
    before = ar(greedy, labels).softmax(-1)                                 # [n, L, K]
    codes, after, result = greedy.clone(), before, []
    for position in range(at, at + changed):
        others = after[:, position].scatter(1, greedy[:, position, None], 0.0)                          # [n, K]
        codes[:, position] = torch.multinomial(others.cpu(), 1, generator=generator)[:, 0].to(device)
        after = ar(codes, labels).softmax(-1)
        result.append((before[:, position + 1], after[:, position + 1]))
    return result


def overlap(p, q, top):
    """Share of the `top` likeliest codes that two sets of distributions [n, K] have in common: [n], 0 .. 1."""
    members = [torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(top).indices, True) for x in (p, q)]
    return (members[0] & members[1]).sum(1) / top


@torch.inference_mode()
def token_overlap(ar, top, draws=256, seed=0):
    """Table 6: [overlap for m in CHANGED], each the mean over all positions i that leave room for four changed codes
    and one more, and at each of them over all classes, each drawn as often as makes `draws` or more. See
    changed_distributions. [The paper averages over 1,000 classes; its i is not told. Here: the same for all m.]
    A small overlap says that the generator reacts to the codes before; whether it is right to is what its loss says:
    one that was never trained reacts as well. Raises BadInput with fewer than 5 tokens.
    """
    classes, positions = ar.config.num_classes, range(ar.config.tokens - max(CHANGED))
    if not positions:
        raise BadInput(f"{ar.config.tokens} tokens: changing up to {max(CHANGED)} needs more")
    found = []
    for first, labels in enumerate(torch.arange(classes).repeat(-(-draws // classes)).split(500)):
        for at in positions:
            pairs = changed_distributions(ar, labels, at, max(CHANGED), seed + 1000 * first + at)
            found.append(torch.stack([overlap(before, after, top) for before, after in pairs], 1))      # [n, m]
    return torch.cat(found).mean(0).tolist()


def neighbour_information(codes, codebook_size, seed=0):
    """Mutual information of codes i and i + 1 in bits, [L - 1], of codes [n, L].

    Counted frequencies alone find information where there is none: so many pairs never come twice. What they find where
    the second codes are shuffled over the images, and nothing can be there, is taken off. That takes off too much where
    codes do depend on each other, so the result is a lower bound, roughly; at equal n and codebook it compares.
    """
    def entropy(values):
        share = np.unique(values, return_counts=True)[1] / len(values)
        return -(share * np.log2(share)).sum()

    random, result = np.random.default_rng(seed), []
    for first, second in zip(codes.T.astype(np.int64), codes.T[1:].astype(np.int64)):
        joint = entropy(first * codebook_size + second)
        shuffled = entropy(first * codebook_size + random.permutation(second))
        result.append(float(shuffled - joint))      # the two codes' own entropies are the same in both
    return result


def stem_plot(title, p, q, top, width=520, height=320):
    """Two distributions [K] over a codebook, p up and q down, of each the `top` likeliest codes: blue where both have
    them, red where only one has. Heights are square roots of probabilities, or only the first few could be seen."""
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    draw, font, middle = ImageDraw.Draw(image), ImageFont.load_default(28), height + 20
    members = [set(x.topk(top).indices.tolist()) for x in (p, q)]
    tallest = max(p.max(), q.max()).item() ** 0.5
    for x, own, direction in ((p, members[0], -1), (q, members[1], 1)):
        for code in sorted(own):
            across = 40 + code / len(p) * (2 * width - 80)
            length = (height - 70) * x[code].item() ** 0.5 / tallest
            colour = "#1f6fb4" if code in members[0] & members[1] else "#d9542b"
            draw.line([(across, middle), (across, middle + direction * length)], colour, 4)
    draw.line([(40, middle), (2 * width - 40, middle)], "#333333", 2)
    draw.text((40, 16), title, "black", font)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def publish(paper, name):
    """Print a table or figure; write <out>/<name>.md, .json and .png. Numbers of all seeds are in the JSON."""
    made, bench, seeds = getattr(paper, name)(), paper.bench, len(paper.folders)
    where = [f"{paper.args.config} size, {bench.test.name}; {machine(bench.device)}; torch {torch.__version__}."]
    if paper.args.config == "toy":
        where.append("Another data set and another size than the paper's: compare which is lower, not the values.")
    if not made.all_seeds:
        where.append("Seed 0.")
    elif seeds == 1:
        where.append("1 seed, so no interval.")
    else:
        where.append(f"{seeds} seeds: mean ± half of the 95 % interval (Student's t), of each number by itself. "
                     f"VQGAN, data and the network that scores are the same for all.")
    if made.rows and any(head.startswith("rF") for head in made.rows[0]):
        where.append(paper.protocol())
    picture = f"{name}.png" if made.picture is not None else None
    if picture:
        data.save_picture(made.picture, paper.out / picture)
    lines = [f"### {made.title}", "", *([markdown(made.rows), ""] if made.rows else []),
             *([f"![]({picture})", ""] if picture else []), *(f"- {claim}" for claim in made.claims),
             *(f"- {note}" for note in made.notes + where)]
    text = "\n".join(lines) + "\n"
    facts = {"title": made.title, "config": paper.args.config, "data": bench.test.name, "seeds": seeds,
             "numbers": made.numbers, "table": made.rows, "claims": [str(c) for c in made.claims],
             "protocol": made.notes + where}
    for ending, content in ((".md", text), (".json", json.dumps(facts, indent=1) + "\n")):
        trainer.write_atomically(paper.out / f"{name}{ending}", lambda temporary: temporary.write_text(content))
    print(text, flush=True)
    return text


def paper(args):
    """make paper, make table1 ...: what is asked for, from what is trained."""
    path = args.out / "vqgan.pt"
    checkpoint = trainer.load_checkpoint(path, "vqgan", make=f"make {args.what} CONFIG={args.config}")
    bench = Bench(args, trainer.read_config(VQGANConfig, checkpoint["config"], path).image_size)
    it = Paper(args, bench, made_of_all(args, bench))
    if not it.folders:
        raise BadInput(f"{args.out}: holds no folder seed0. Train first: make {args.what} CONFIG={args.config}")
    names = TABLES if args.what == "paper" else (args.what,)
    texts = [publish(it, name) for name in names]
    if args.what == "paper":
        trainer.write_atomically(args.out / "paper.md", lambda temporary: temporary.write_text("\n".join(texts)))
        print(f"{args.out / 'paper.md'}: all of it, with pictures")


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def main():
    parser = trainer.ArgumentParser(__doc__, prog="-m extras.paper")
    parser.add_argument("what", choices=("paper", *TABLES), metavar="what",
                        help="paper, or one of its tables and figures: " + ", ".join(TABLES))
    parser.add_argument("--config", choices=("toy", "full"), help="default: full where CUDA is present, else toy")
    parser.add_argument("--data", help="as in training: shapes, fashion, auto or a folder")
    parser.add_argument("--out", help="folder of the results, default out/<config>")
    parser.add_argument("--images", type=int, default=10_000, help="images of the data to score on, default 10,000")
    parser.add_argument("--samples", type=int, default=2_500, help="new images to score, default 2,500")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--seeds", type=int, help="of how many seeds; default: all in --out")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where present")
    inception = parser.add_argument_group("at full size")
    inception.add_argument("--inception", metavar="FILE", type=Path, help="the public weights, default "
                           "weights/pt_inception-2015-12-05-6726825d.pth. At toy size: FID with these")
    inception.add_argument("--rounding", choices=("round", "truncate"), default="round",
                           help="of what a model painted, to bytes; truncate: as TiTok's evaluator")
    inception.add_argument("--reference", metavar="PATH", help="folder or ADM's .npz; default: --data, train")
    args = trainer.parse(parser)
    if min(args.images, args.samples) < 2:
        raise BadInput(f"--images {args.images} --samples {args.samples}: at least 2 images and 2 samples")
    paper(args)


if __name__ == "__main__":
    trainer.launch(main)
