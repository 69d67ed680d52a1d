"""Toy scores, pictures and the report of `make demo`.

    python -m extras.report             # report.html, scores.json, curves.json, pictures, in --out
    python -m extras.report scores      # only the table, of the stages that exist so far

Accuracy and the Fréchet distance (not FID) come from the FD-classifier, a small network trained to
classify the training images: on first use, but Fashion-MNIST's is in assets/. No stage trains
against it.

Letters: B batch, H W pixels, n images of a set, L tokens, K codes in a codebook, F features of the
classifier. Images are float32 [B, 3, H, W] in [0, 1], codes int64 [B, L], labels int64 [B].
"""
import functools
import html
import importlib.util
import io
import json
import math
import os
import platform
import re
import string
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import data
import trainer
from evaluate import BATCH, feature_statistics, frechet_distance, psnr, subset
from extras.bench import step_ratio
from generator import codes_fingerprint, load_pair, open_tokenizer, sample_codes
from trainer import BadInput


class FDClassifier(nn.Module):
    """The input of its last layer, 64 numbers, are the features of the Fréchet distance."""
    def __init__(self, classes):
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.body = nn.Sequential(
            conv(3, 32), nn.BatchNorm2d(32), nn.MaxPool2d(2), nn.ReLU(),
            conv(32, 64), nn.BatchNorm2d(64), nn.MaxPool2d(2), nn.ReLU(),
            conv(64, 128), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(128 * 2 * 2, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, images):
        """Images [B, 3, H, W] in [0, 1], without border -> features [B, F], logits [B, classes]."""
        if images.shape[-1] > 64:       # large images are scored small
            images = F.interpolate(images, (64, 64), mode="bilinear", antialias=True)
        images = images.contiguous(memory_format=torch.channels_last)       # faster on a CPU
        features = self.body(images)
        return features, self.head(features)


def without_border(images, border):     # [B, 3, H, W] -> [B, 3, H - 2 border, W - 2 border]
    return F.pad(images, 4 * (-border,))


def perplexity(codes, codebook_size):
    """exp(entropy) of codes: 1 (one code) .. K (all used equally)."""
    share = torch.bincount(codes.flatten(), minlength=codebook_size) / codes.numel()        # [K]
    return torch.special.entr(share.double()).sum().exp().item()


# of Fashion-MNIST, so that distances of all machines can be compared
SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "fd_classifier.pt"


def fd_classifier(dataset, path, device="cpu", steps=900, batch_size=128):
    """An FDClassifier in eval mode, from path or SHIPPED if that was trained on the same data; else
    trained with a fixed seed, 70 seconds on one core."""
    config = {"data": dataset.fingerprint, "steps": steps, "batch_size": batch_size}
    with torch.random.fork_rng():
        torch.manual_seed(2718)
        model = FDClassifier(len(dataset.classes)).to(device, memory_format=torch.channels_last)
    for file in filter(Path.exists, (path, SHIPPED)):
        saved = trainer.load_checkpoint(file, "fd_classifier", f"rm {file} and run this again")
        if saved["config"] == config:
            model.load_state_dict(saved["model"])
            return model.eval().requires_grad_(False)
    batches = data.batches(dataset, batch_size, seed=2718)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), "FD-classifier", leave=False, disable=None):
        images, labels = (trainer.to_device(x, torch.device(device)) for x in next(batches))
        logits = model(without_border(images, dataset.border))[1]           # [B, classes]
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    trainer.save({"stage": "fd_classifier", "step": steps, "config": config,
                  "model": model.state_dict()}, path)
    return model.eval().requires_grad_(False)


class Bench:
    """What all scores share: images, labels, classifier, the test images' statistics."""
    def __init__(self, args, image_size):
        self.out, self.seed, self.device, self.codes = args.out, args.seed, args.device, {}
        if self.device.type == "cpu":
            torch.set_num_threads(1)        # in_threads has threads of its own
        self.train, self.test = (data.open_dataset(args.data, split, image_size)
                                 for split in ("train", "val"))
        self.indices = subset(self.test, args.images)
        self.labels = torch.from_numpy(self.test.labels[self.indices])      # [n]
        # fewer labels, in the same balance of classes
        picks = np.linspace(0, len(self.labels) - 1, min(args.samples, len(self.labels))).round()
        self.sample_labels = self.labels.sort().values[picks.astype(int)]   # [samples]

    @functools.cached_property
    def classifier(self):
        return fd_classifier(self.train, self.out / "fd_classifier.pt", self.device)

    @functools.cached_property
    def reference(self):
        return feature_statistics(self.look(self.images(self.test))[0])

    def images(self, dataset, count=None):
        """`count` random images, by default as many as are scored, as batches (images, labels)."""
        return data.all_images(dataset, BATCH, subset(dataset, count or len(self.indices)))

    def examples(self):
        """The first test image of each class, then others: [10, 3, H, W]."""
        first = np.unique(self.test.labels, return_index=True)[1]
        chosen = np.concatenate([first, np.setdiff1d(self.indices, first)])[:10]
        return next(data.all_images(self.test, 10, chosen))[0].to(self.device)

    def in_threads(self, function, batches):
        """[function(*batch), ...], on a CPU in one thread per core."""
        cores = 1 if self.device.type == "cuda" else os.cpu_count()
        with ThreadPoolExecutor(cores) as pool:
            return list(pool.map(lambda batch: function(*batch), batches))

    def encode(self, model):
        """Codes [n, L] of the test images. Once for stages 1 and 2: only their decoders differ."""
        key = codes_fingerprint(model)
        if key not in self.codes:
            self.codes[key] = torch.cat(self.in_threads(
                lambda images, _: model.encode(images.to(self.device)).cpu(),
                self.images(self.test)))
        return self.codes[key]

    def look(self, batches, decode=lambda images: images):
        """[features [n, F], is the class right [n]] of batches (images [B, 3, H, W], or codes for
        decode; labels [B]), and dB [n] if they have originals, too; without the test set's border.
        """
        classifier, border = self.classifier, self.test.border      # before the threads start

        def one(images, labels, *originals):
            images = without_border(decode(images.to(self.device)), border)
            features, logits = classifier(images)                           # [B, F], [B, classes]
            decibels = [psnr(images, without_border(x.to(self.device), border)) for x in originals]
            return features, logits.argmax(1) == labels.to(self.device), *decibels

        return [torch.cat(parts).cpu() for parts in zip(*self.in_threads(one, batches))]

    def score(self, batches, decode=lambda images: images):
        """{"psnr": dB, "accuracy": 0 .. 1, "fd"}; without "psnr" if there are no originals."""
        features, right, *decibels = self.look(batches, decode)
        scores = {"psnr": decibels[0].mean().item()} if decibels else {}
        return {**scores, "accuracy": right.float().mean().item(),
                "fd": frechet_distance(*feature_statistics(features), *self.reference)}

    def score_reconstructions(self, model, **how):
        """score() of the test images' reconstructions, and the codes' perplexity. how: for
        decode_codes."""
        codes = self.encode(model)                                          # [n, L]
        batches = ((rows, labels, originals) for rows, (originals, labels)
                   in zip(codes.split(BATCH), self.images(self.test)))
        return {**self.score(batches, functools.partial(model.decode_codes, **how)),
                "perplexity": perplexity(codes, model.config.codebook_size)}

    def score_samples(self, generator, tokenizer, **changes):
        """score() of what a generator samples for sample_labels. changes: of its config."""
        parts = self.sample_labels.split(BATCH)
        codes = self.in_threads(        # [[BATCH, L], ...]
            lambda i, labels: sample_codes(generator, labels, self.seed * 10 ** 9 + i, **changes),
            enumerate(parts))
        return self.score(zip(codes, parts), tokenizer.decode_codes)


def measure(bench, files):
    """({title: scores}, {picture: its rows}) of the stages that exist, and of images to compare
    with. Saves the pictures."""
    images = bench.examples()                                               # [10, 3, H, W]
    scores = {"test images": {"accuracy": bench.score(bench.images(bench.test))["accuracy"]},
              "as many training images": {"fd": bench.score(bench.images(bench.train))["fd"]}}
    pictures = {"reconstructions": [("original", images)]}
    for title, stage, how in (("VQGAN", "vqgan", {}), ("stage 1, soft", "stage1", {}),
                              ("stage 1, argmax", "stage1", {"hard": True}),
                              ("stage 2", "stage2", {})):
        if files[stage].exists():
            model = open_tokenizer(files[stage], bench.device)
            scores[title] = bench.score_reconstructions(model, **how)
            decoded = model.decode_codes(model.encode(images), **how)
            pictures["reconstructions"].append((title, decoded))

    for title, stage in (("AR samples", "ar"), ("MaskGIT samples", "maskgit")):
        if files[stage].exists() and files["stage2"].exists():
            generator, tokenizer = load_pair(files[stage], files["stage2"], bench.device)
            scores[title] = {**bench.score_samples(generator, tokenizer),
                             "guidance_scale": generator.config.guidance_scale}
            pictures[f"samples_{stage}"] = sample_rows(bench, generator, tokenizer)
    for name, rows in pictures.items():
        data.save_picture(picture_of(rows), bench.out / f"{name}.png")
    return scores, pictures


def order_curves(bench, ar, tokenizer):
    """{"bits", "unigram", "lengths", "mse"}: what a code costs by its position in the test images'
    codes, mean -log2 p(code_i | class, codes before) under the AR generator; the entropy of code_i
    alone; the error of 250 images after the first `lengths` codes."""
    codes, bits = bench.encode(tokenizer), []                               # [n, L]
    for batch, labels in zip(codes.split(BATCH), bench.labels.split(BATCH)):
        batch, labels = batch.to(bench.device), labels.to(bench.device)
        logits = ar(batch, labels).float()      # [B, L, K]; at position i after codes[:, :i]
        loss = F.cross_entropy(logits.transpose(1, 2), batch, reduction="none")     # [B, L]
        bits.append(loss.cpu() / math.log(2))
    unigram = [math.log2(perplexity(column, ar.config.codebook_size)) for column in codes.T]
    tokens = codes.shape[1]
    lengths = [round(k) for k in np.linspace(1, tokens, min(tokens, 32))]

    def errors_of(images, _):
        images = images.to(bench.device)
        batch = tokenizer.encode(images)                                    # [B, L]
        error = torch.stack([tokenizer.decode_codes(batch[:, :k]) - images for k in lengths])
        error = without_border(error, bench.test.border)                    # [lengths, B, 3, H, W]
        return error.square().mean((2, 3, 4)).cpu()

    errors = bench.in_threads(errors_of, bench.images(bench.test, min(250, len(codes))))
    return {"bits": torch.cat(bits).mean(0).tolist(), "unigram": unigram, "lengths": lengths,
            "mse": torch.cat(errors, 1).mean(1).tolist()}


# ---- Pictures

def picture_of(rows, scale=None):
    """[(name, images [n, 3, H, W]), ...] -> a picture with one named row each."""
    names, images = zip(*rows)
    scale = scale or max(1, 96 // images[0].shape[-1])
    grid = data.picture_grid(torch.cat(images), len(images[0]), scale)
    font = ImageFont.load_default(14)
    margin = int(max(map(font.getlength, names))) + 14
    picture = Image.new("RGB", (grid.width + margin, grid.height), "white")
    picture.paste(grid, (margin, 0))
    for i, name in enumerate(names):
        place = margin - 8, (i + 0.5) * (grid.height + 2) / len(names)
        ImageDraw.Draw(picture).text(place, name, "black", font, anchor="rm")
    return picture


def sample_rows(bench, generator, tokenizer):
    """Ten samples of each class, at most 20 classes, as rows for picture_of."""
    labels = bench.sample_labels.unique()[:20]
    codes = sample_codes(generator, labels.repeat_interleave(10), bench.seed)      # [10 rows, L]
    images = tokenizer.decode_codes(codes).split(10)
    return [(bench.test.classes[label], row) for label, row in zip(labels, images)]


def line_plot(title, x_name, curves, levels=None):
    """{name: (xs [n], ys [n], or [seeds, n] with the 95 % interval as a band)} -> a PIL image.
    levels: {name: y} of dotted lines, in the colors of the curves; then both axes are logarithmic.
    Needs matplotlib."""
    from matplotlib.figure import Figure        # optional
    figure = Figure((5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, (xs, ys) in curves.items():
        seeds = np.atleast_2d(ys)                                           # [seeds, n]
        mean = seeds.mean(0)
        line, = axes.plot(xs, mean, marker="o" if len(xs) <= 40 else None, markersize=3, label=name)
        if len(seeds) > 1:
            half = half_width(seeds)                                        # [n]
            axes.fill_between(xs, mean - half, mean + half, alpha=0.2, color=line.get_color())
    for number, (name, y) in enumerate((levels or {}).items()):
        axes.axhline(y, linestyle=":", color=f"C{number}", label=name)
    if levels:
        axes.loglog()
        axes.minorticks_off()
        axes.set_xticks(xs, [f"{x:,}" for x in xs])
        axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.set_ylim(bottom=0.7 * min(levels.values()))
    axes.set(title=title, xlabel=x_name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")


def order_plots(orders):
    """{name: [order_curves() of a seed, ...]} -> two plots."""
    bits, errors = {}, {}
    for name, seeds in orders.items():
        positions = range(1, len(seeds[0]["bits"]) + 1)
        bits[f"{name}AR generator"] = positions, [seed["bits"] for seed in seeds]
        bits[f"{name}entropy of the code alone"] = positions, [seed["unigram"] for seed in seeds]
        errors[f"{name}stage 2"] = seeds[0]["lengths"], [seed["mse"] for seed in seeds]
    return [line_plot("Bits per token", "position in the sequence", bits),
            line_plot("Mean squared error", "first k codes decoded", errors)]


def two_columns(pictures):
    """An even number of PIL images of one size as one."""
    rows = [np.hstack(pair) for pair in zip(pictures[::2], pictures[1::2])]
    return Image.fromarray(np.vstack(rows))


# ---- The report

def inline(picture):
    """A PIL image as HTML that holds all of it."""
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=95, lossless=picture.width <= 64)
    return f'<img alt="" src="data:image/webp;base64,{b64encode(file.getvalue()).decode()}">\n'


def rows_of(named):
    """[(name, images [n, 3, H, W]), ...] as HTML, one named row each."""
    text = ""
    for name, images in named:
        scale = max(1, 64 // images.shape[-1])
        pictures = [inline(data.picture_grid(image[None], 1, scale)) for image in images]
        text += f'<div class="row"><span>{html.escape(name)}</span>\n{"".join(pictures)}</div>\n'
    return text


def markdown(rows):
    """Rows of texts, the first is the head -> a Markdown table, aligned."""
    first, *others = (max(map(len, column)) for column in zip(*rows))       # widths
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    lines = [" | ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)])
             for row in (rows[0], rule, *rows[1:])]
    return "\n".join(f"| {line} |" for line in lines)


def half_width(values):
    """Half of the 95 % interval of the mean by Student's t, of one value per seed or of arrays
    [seeds, ...]; None of a single seed."""
    if (n := len(values)) > 1:
        return scipy.special.stdtrit(n - 1, 0.975) * np.std(values, 0, ddof=1) / math.sqrt(n)


def spread(values, form=".2f"):
    """One value per seed -> "mean ± half_width"; of one seed the value alone."""
    half = half_width(values)
    return f"{np.mean(values):{form}}" + ("" if half is None else f" ± {half:{form.strip('+')}}")


def table(bench, scores):
    """(rows of texts, what they were measured on)."""
    forms = {"psnr": ("PSNR, dB", ".2f"), "accuracy": ("accuracy", ".3f"), "fd": ("FD", ".2f"),
             "perplexity": ("perplexity", ".0f"), "guidance_scale": ("guidance", "g")}
    rows = [["", *(head for head, _ in forms.values())]]
    for title, values in scores.items():
        rows.append([title, *(f"{values[key]:{form}}" if key in values else ""
                              for key, (_, form) in forms.items())])
    return rows, f"""{len(bench.indices):,} images of {bench.test.name}, \
{len(bench.sample_labels):,} samples. Accuracy and FD (Fréchet
distance; not FID) by a small network trained on the training images. Soft: the pixel decoder reads
embeddings averaged by probability; argmax: the most probable."""


def machine(device):
    """The GPU, or the CPU and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{name[1] if name else platform.machine()}, threads: {torch.get_num_threads()}"


def report(args, bench, files, seed):
    """Measure, write report.html, scores.json, curves.json and the pictures, print the table."""
    started = time.perf_counter()
    scores, pictures = measure(bench, files)
    ar, tokenizer = load_pair(files["ar"], files["stage2"], bench.device)
    order, ratio = order_curves(bench, ar, tokenizer), step_ratio(files["stage1"], bench.device)
    originals, prefixes, tokens = pictures["reconstructions"][:1], [], tokenizer.config.tokens
    titok = args.out / f"titok_{tokens}_stage2.pt"
    models = {"NativeTok": tokenizer}
    if titok.exists():
        models["TiTok"] = open_tokenizer(titok, bench.device)
    for name, model in models.items():
        codes = model.encode(originals[0][1])                               # [10, L]
        prefixes += [(f"{name}, {k} of {tokens}", model.decode_codes(codes[:, :k]))
                     for k in range(tokens + 1)]
    powers = [prefixes[2 ** i] for i in range(tokens.bit_length())]     # 1, 2, 4, ... codes
    data.save_picture(picture_of(originals + powers), args.out / "prefixes.png")
    settings = trainer.load_checkpoint(files["stage1"], "tokenizer", "python hnt.py")["settings"]
    logs = {stage: trainer.read_log(path.with_suffix(".jsonl")) for stage, path in files.items()}
    if reused := settings.get("reused"):        # grown by hnt.py from a shorter one
        shorter = trainer.read_log(args.out / f"nativetok_{reused}.jsonl")
        logs = {"vqgan": logs.pop("vqgan"), "stage1": shorter, "hnt": logs.pop("stage1"), **logs}
    seconds = {stage: round(log[-1]["seconds"], 1) for stage, log in logs.items() if log}
    seconds["evaluate"] = round(time.perf_counter() - started, 1)
    plots = []
    if importlib.util.find_spec("matplotlib"):
        plots = order_plots({"": [order]})
        data.save_picture(two_columns(plots), args.out / "order.png")
        for stage, log in logs.items():
            loss = [line["step"] for line in log], [line["loss"] for line in log]
            plots.append(line_plot("Training loss", "step", {stage: loss}))
    else:
        print("matplotlib is missing: no curves (pip install matplotlib)")

    test, size, (cells, note) = bench.test, bench.test.image_size, table(bench, scores)
    page = string.Template(Path(__file__).with_suffix(".html").read_text()).substitute(
        {name: rows_of(rows) for name, rows in pictures.items()},
        title=f"NativeTok, {args.config}", size=64 if size <= 64 else 128, tokens=tokens,
        about=f"""{html.escape(test.name + test.note)}: {len(bench.train):,} training and
{len(test):,} test images, {size}x{size}. {machine(bench.device)}; torch {torch.__version__};
seed {seed}.<br>
Seconds: {", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items())}.""",
        originals=rows_of(originals), prefixes=rows_of(prefixes),
        scores="".join(f"\n<tr><td>{'<td>'.join(line)}" for line in cells),
        note=f"""{html.escape(note)}<br>
Bits per image under the AR generator: {sum(order["bits"]):.1f}; of the codes one by one:
{sum(order["unigram"]):.1f}.<br>
Time of a frozen step of HNT: {f"{ratio:.2f} of a full one" if ratio else "not grown"}.""",
        curves="".join(map(inline, plots)))
    three = ("psnr", "accuracy", "fd")
    argmax = {f"{key}_argmax": scores["stage 1, argmax"][key] for key in three}
    numbers = {"data": test.name, "seed": seed, "seconds": seconds, "vqgan": scores["VQGAN"],
               "stage1": {**scores["stage 1, soft"], **argmax},
               "stage2": {key: scores["stage 2"][key] for key in three},
               "ar": scores["AR samples"], "maskgit": scores["MaskGIT samples"],
               "hnt": {"step_ratio": ratio}, "fd_floor": scores["as many training images"]["fd"],
               "classifier": {"test_accuracy": scores["test images"]["accuracy"]}}
    for name, content in (("report.html", page), ("scores.json", json.dumps(numbers, indent=1)),
                          ("curves.json", json.dumps(order, indent=1))):
        trainer.write_text(args.out / name, content + "\n")
    print(f"{markdown(cells)}\n\n{note}\n\n{args.out / 'report.html'}: open it in a browser")


def main():
    parser = trainer.command_line(__doc__, prog="-m extras.report")
    add = parser.add_argument
    add("what", nargs="?", choices=("report", "scores"), default="report")
    add("--tokens", type=int, help="of the tokenizer; default: 16 (toy) or 32")
    add("--images", type=int, default=10_000, help="test images to score")
    add("--samples", type=int, default=2_500, help="new images to score")
    args = trainer.parse(parser)
    tokens = args.tokens or (16 if args.config == "toy" else 32)
    name = f"nativetok_{tokens}"
    files = {}
    for stage, file, command in (
            ("vqgan", "vqgan", "vqgan.py"), ("stage1", name, f"hnt.py --tokens {tokens}"),
            ("stage2", f"{name}_stage2", f"tokenizer.py --stage 2 --tokens {tokens}"),
            ("ar", f"ar_{name}", f"generator.py --mode ar --tokens {tokens}"),
            ("maskgit", f"maskgit_{name}", f"generator.py --mode maskgit --tokens {tokens}")):
        files[stage] = args.out / f"{file}.pt"
        if args.what == "report" and not files[stage].exists():
            raise BadInput(f"{files[stage]}: not found. Train it first: python {command}")
    vqgan = trainer.load_checkpoint(files["vqgan"], "vqgan", "python vqgan.py")
    bench = Bench(args, vqgan["config"]["image_size"])
    if vqgan["settings"].get("data") not in (None, bench.train.content):    # None: public weights
        raise BadInput(f"{files['vqgan']}: trained on other images than --data {args.data}")
    if args.what == "report":
        report(args, bench, files, vqgan["settings"].get("seed"))
    else:
        cells, note = table(bench, measure(bench, files)[0])
        print(f"{markdown(cells)}\n\n{note}")


if __name__ == "__main__":
    trainer.launch(main)
