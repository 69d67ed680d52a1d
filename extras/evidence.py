"""Scores of one seed of the study that tests the paper's claims: longer training, several seeds.

    make evidence SEEDS=5       # trains and scores the seeds that assets/paper/ lacks

A seed's scores are in seedN.json; extras/paper.py makes the tables and the figure of them.
Fashion-MNIST, 16 tokens, equal parameters, one VQGAN for all.

Letters: B batch, L tokens, K codes in a codebook, G side of the VQGAN's grid, n images or draws.
"""
import json
import math

import torch
import torch.nn.functional as F

import trainer
from evaluate import BATCH
from extras.report import Bench, machine, order_curves
from generator import load_pair, open_tokenizer

BUDGETS, GUIDANCE = (200, 700, 3500), (1.0, 1.5, 2.0)       # of AR: training steps; sampling
STUDY = {"NativeTok": "nativetok_16", "TiTok": "titok_16", "TiTok (causal)": "titok_causal_16",
         "full": "hnt/nativetok_16_full", "reuse": "hnt/nativetok_16_reuse",
         "reuse + fine-tune": "hnt/nativetok_16"}


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


# ---- Scores

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
    return {"parameters": sum(p.numel() for p in model.parameters()), **scores}


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
        path, stage2 = folder / f"{name}.pt", generators.get(name)
        saved = trainer.load_checkpoint(path, ("vqgan", "tokenizer", "ar"), "make evidence")
        trained[name] = saved["step"]
        scores[name] = (
            score_generator(bench, path, folder / f"{stage2}.pt", scores[stage2]["fd"])
            if stage2 else score_tokenizer(bench, path, teacher))
        print(f"{path}: scored", flush=True)
        if args.seed == 0:
            lines = trainer.read_log((args.out if name == "vqgan" else folder) / f"{name}.jsonl")
            kept = lines[:-1:1 + len(lines) // 20] + lines[-1:]
            write_text(args.numbers / f"{name.replace('/', '_')}.jsonl",
                       "".join(json.dumps(line) + "\n" for line in kept))
    write_text(args.numbers / f"seed{args.seed}.json", json.dumps({
        "seed": args.seed, "machine": f"{machine(bench.device)}; torch {torch.__version__}",
        "settings": {"data": bench.test.name, "images": len(bench.labels),
                     "samples": len(bench.sample_labels), "vqgan": trainer.fingerprint(teacher),
                     "classifier": trainer.fingerprint(bench.classifier), "steps": trained},
        "scores": scores}, indent=1) + "\n")


def write_text(path, text):
    trainer.write_atomically(path, lambda temporary: temporary.write_text(text))
