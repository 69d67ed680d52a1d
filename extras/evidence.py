"""The study of the paper's claims: longer training, several seeds, a verdict for each.

    make evidence SEEDS=5               # trains and scores the seeds that assets/paper/ lacks
    python -m extras.paper evidence     # tables and figure, from the files there alone
    python -m extras.paper normal       # what is normal, from the logs there

A seed's scores are in seedN.json. Fashion-MNIST, 16 tokens, equal parameters, one VQGAN for all.
Letters: B batch, L tokens, K codes in a codebook, G side of the VQGAN's grid, n images or draws.
"""
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

import data
import trainer
from evaluate import BATCH
from extras.report import Bench, line_plot, machine, markdown, order_curves
from generator import load_pair, open_tokenizer, sample_codes
from trainer import BadInput

BUDGETS, GUIDANCE = (200, 700, 3500), (1.0, 1.5, 2.0)       # of AR: training steps; sampling
STUDY = {"NativeTok": "nativetok_16", "TiTok": "titok_16", "TiTok (causal)": "titok_causal_16",
         "full": "hnt/nativetok_16_full", "reuse": "hnt/nativetok_16_reuse",
         "reuse + fine-tune": "hnt/nativetok_16"}
STAGE1 = [      # what, its key in a model's scores, the model; the paper claims:
    ("PSNR after stage 1, soft, dB", "psnr", "{}", "higher"),
    ("PSNR after stage 1, argmax, dB", "psnr_argmax", "{}", "higher"),
    ("cross-entropy of stage 1", "cross_entropy", "{}", "lower"),
    ("rFD after stage 1, argmax", "fd_argmax", "{}", "lower")]
LATER = [       # the same; the paper's difference, NativeTok minus TiTok
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


def half_width(values):
    """Half of the 95 % interval of the mean by Student's t; None of a single value."""
    if len(values) > 1:
        return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def spread(values, form=".2f"):
    """One value per seed -> "mean ± half_width"; of one seed the value alone."""
    half = half_width(values)
    return f"{np.mean(values):{form}}" + ("" if half is None else f" ± {half:.2f}")


def verdict(gaps, paper):
    """Does the difference of two models (ours, one per seed) have the sign of the paper's?"""
    half = half_width(gaps)
    if half is None or abs(np.mean(gaps)) <= half:
        return "undecided"
    return "holds" if np.mean(gaps) * paper > 0 else "does not at this scale"


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


# ---- Scores of one seed

def write_json(path, value):
    text = json.dumps(value, indent=1) + "\n"
    trainer.write_atomically(path, lambda temporary: temporary.write_text(text))


def score_tokenizer(bench, path, teacher):
    """Of the test images' reconstructions; of stage 1 also by argmax, and the cross-entropy."""
    model = open_tokenizer(path, bench.device)
    scores = bench.score_reconstructions(model)
    if not getattr(model, "fine_tuned", True):
        def cross_entropy(codes, targets):      # [B, L] and the VQGAN's [B, G*G] -> [B, G*G]
            logits = model.decoder(model.quantizer.lookup(codes.to(bench.device)))
            return F.cross_entropy(logits.transpose(1, 2), targets.to(bench.device),
                                   reduction="none")

        both = (bench.encode(model).split(BATCH), bench.encode(teacher).split(BATCH))
        losses = torch.cat(bench.in_threads(cross_entropy, zip(*both)))     # [n, G*G]
        scores["cross_entropy"] = losses.mean().item()
        hard = bench.score_reconstructions(model, hard=True)
        scores |= {f"{key}_argmax": value for key, value in hard.items()}
    return {"parameters": sum(p.numel() for p in model.parameters()), **scores}


def score_generator(bench, path, tokenizer_path, rfd):
    """Of samples at each guidance; bits under AR and of each code alone; Table 6."""
    ar, tokenizer = load_pair(path, tokenizer_path, bench.device)
    drawn, scores = bench.in_threads(                                       # [samples, L] each
        lambda scale: sample_codes(ar, bench.sample_labels, bench.seed, guidance_scale=scale),
        [(scale,) for scale in GUIDANCE]), {}
    for scale, codes in zip(GUIDANCE, drawn):
        scores |= {f"{key}, guidance {scale:g}": value
                   for key, value in bench.score_samples(codes, tokenizer).items()}
    curves = order_curves(bench, path, tokenizer_path)
    bits, alone = sum(curves["bits"]), sum(curves["unigram"])
    shares = {f"overlap {m}": 100 * share for m, share in enumerate(token_overlap(ar), 1)}
    return {**scores, "fd minus rfd": scores["fd, guidance 1.5"] - rfd, "bits": bits,
            "entropies": alone, "explained": 100 - 100 * bits / (alone or math.nan), **shares}


def score_seed(args):
    """Score a seed's models -> seedN.json in --numbers; seed 0 leaves its logs there, too. What
    there is of a scoring that was stopped is kept."""
    folder, trained = args.out / f"seed{args.seed}", {}
    begun = folder / "scores.json"
    scores = json.loads(begun.read_text()) if begun.exists() else {}
    teacher = open_tokenizer(folder / "vqgan.pt", args.device)
    bench = Bench(args, teacher.config.image_size)
    generators = {f"ar{steps}/ar_{name}": f"{name}_stage2"      # of causal, the longest run only
                  for name in [*STUDY.values()][:3]
                  for steps in (BUDGETS[-1:] if "causal" in name else BUDGETS)}
    names = ["vqgan", "hnt/nativetok_8", *STUDY.values(), *sorted({*generators.values()})]
    for name in (*names, *generators):
        path, stage2 = folder / f"{name}.pt", generators.get(name)
        saved = trainer.load_checkpoint(path, ("vqgan", "tokenizer", "ar"), "make evidence")
        trained[name] = saved["step"]
        if name not in scores:
            scores[name] = (
                score_generator(bench, path, folder / f"{stage2}.pt", scores[stage2]["fd"])
                if stage2 else score_tokenizer(bench, path, teacher))
            write_json(begun, scores)
            print(f"{path}: scored", flush=True)
        if args.seed == 0:
            lines = trainer.read_log((args.out if name == "vqgan" else folder) / f"{name}.jsonl")
            kept = lines[:1] + lines[:0:-1 - len(lines) // 20][::-1]    # the last is one of them
            text = "".join(json.dumps(line) + "\n" for line in kept)
            trainer.write_atomically(args.numbers / f"{name.replace('/', '_')}.jsonl",
                                     lambda temporary: temporary.write_text(text))
    write_json(args.numbers / f"seed{args.seed}.json", {
        "seed": args.seed, "machine": f"{machine(bench.device)}; torch {torch.__version__}",
        "settings": {"data": bench.test.name, "images": len(bench.labels),
                     "samples": len(bench.sample_labels), "vqgan": trainer.fingerprint(teacher),
                     "classifier": trainer.fingerprint(bench.classifier), "steps": trained},
        "scores": scores})
    begun.unlink()


# ---- What the seeds show

def evidence(args):
    """Print what the seeds' files show, and draw the figure beside their folder."""
    seeds = [json.loads(file.read_text()) for file in sorted(args.numbers.glob("seed*.json"))]
    if not seeds:
        raise BadInput(f"{args.numbers}: no seed0.json there. Run make evidence")
    if any(seed["settings"] != seeds[0]["settings"] for seed in seeds):
        raise BadInput(f"{args.numbers}: the seeds' settings differ. Remove those of one kind")

    def of(name, key):
        return np.array([seed["scores"][name][key] for seed in seeds])      # [seeds]

    print(f"Seeds: {', '.join(str(seed['seed']) for seed in seeds)}. ± half of the 95 % interval "
          f"(Student's t); differences seed by seed.\n\n"
          f"{'; '.join(sorted({seed['machine'] for seed in seeds}))}.\n")
    print(*(f"- {key}: {value}" for key, value in seeds[0]["settings"].items()), sep="\n")
    for title, one, other, rows, rfid in (
            ("Tables 1, 3a and 6", "NativeTok", "TiTok", STAGE1 + LATER, -1.80),
            ("Table 3a", "NativeTok", "TiTok (causal)", STAGE1 + LATER, -1.76),
            ("Table 3b", "reuse", "full", STAGE1, -0.04),
            ("Table 3b", "reuse + fine-tune", "reuse", STAGE1, -0.24)):
        cells = [["", one, other, "difference", "paper", "verdict"]]
        for what, key, where, paper in rows:
            if where.format(STUDY[other]) not in seeds[0]["scores"]:
                continue
            if key == "fd_argmax":
                paper = rfid
            elif other == "TiTok (causal)" and where != "{}":
                paper = ""      # it has no generator for it
            a, b = (of(where.format(STUDY[name]), key) for name in (one, other))
            sign = {"lower": -1, "higher": 1}.get(paper, paper)
            cells.append([what, spread(a), spread(b), spread(a - b, "+.2f"),
                          paper if isinstance(paper, str) else f"{paper:+.2f}",
                          verdict(a - b, sign) if sign else ""])
        print(f"\n### {title}: {one} and {other}\n\n{markdown(cells)}")
    curves, floors = {}, {}
    for model in ("NativeTok", "TiTok"):
        gfd = np.array([of(f"ar{steps}/ar_{STUDY[model]}", "fd, guidance 1.5")
                        for steps in BUDGETS])                              # [budgets, seeds]
        curves[f"{model}, samples"] = BUDGETS, gfd.mean(1), [half_width(v) or 0.0 for v in gfd]
        floors[f"{model}, reconstructions"] = of(f"{STUDY[model]}_stage2", "fd").mean()
    picture = line_plot("Fréchet distance to test images (lower is better)",
                        "training steps of the AR generator", curves, floors)
    data.save_picture(picture, args.numbers.parent / "evidence.png")


def normal(args):
    """Print three lines of each log in --numbers, or in a folder of trained models."""
    keys = "loss", "cross_entropy", "perplexity", "accuracy"
    rows = [["log", "step", *keys, "PSNR of the mean L2"]]
    for path in sorted(args.numbers.glob("*.jsonl")):
        lines = trainer.read_log(path)
        for line in (lines[0], lines[len(lines) // 2], lines[-1]):
            psnr = f"{-10 * math.log10(line['l2']):.2f}" if "l2" in line else ""
            rows.append([path.stem, f"{line['step']:,}",
                         *(f"{line[key]:.3g}" if key in line else "" for key in keys), psnr])
    print(markdown(rows))
