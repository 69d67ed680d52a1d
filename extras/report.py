"""The toy's report: how good are the reconstructions and the samples of all stages, in numbers and pictures.

    python -m extras.report report      # everything: <out>/report.md, <out>/scores.json and the pictures
    python -m extras.report scores      # only the table, of the stages that exist so far

Protocol: 10,000 test images (--images; all where the data has fewer), without their border of padding; 2,500 samples
(--samples), with the same balance of classes. PSNR is the mean of the images' PSNR. Accuracy and the Frechet distance
(FD) come from a small network that is trained here to name the classes of the data's own training split, and that no
stage was trained against. That distance is printed as FD-classifier: it is not FID, and its values mean nothing beside
values on other data. "Test images" are the data's split val.
What is measured is kept in <out>/measured.json with what it was measured on (data, number of images, seed, checkpoints,
the source files), so that a second report takes seconds.

Letters: B batch, H W pixels, n images of a set, L tokens, K codes in a codebook (the tokenizer's or the VQGAN's own),
D features.
Images are float32 [B, 3, H, W] in [0, 1], codes int64 [B, L], labels int64 [B].
"""
import functools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import data
import trainer
from evaluate import BATCH, bar, codebook_use, feature_statistics, frechet_distance, psnr, subset
from generator import codes_fingerprint, load_generator, open_tokenizer, sample_codes
from tokenizer import MODELS, PRESETS, load_tokenizer
from trainer import BadInput
from vqgan import VQGANConfig, load_vqgan

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------------------------
# The images that are scored

def images_of(dataset, limit):
    """The images of the subset: yields (images [BATCH, 3, H, W], labels [BATCH]); the last batch may be shorter."""
    indices = subset(dataset, limit)
    return data.read(dataset, [(rows, rows) for rows in np.split(indices, range(BATCH, len(indices), BATCH))], None, 0)


def without_border(images, border):
    """Cut `border` pixels of padding off each side: [B, 3, H, W] -> [B, 3, H - 2 border, W - 2 border]."""
    height, width = images.shape[-2:]
    return images[..., border:height - border, border:width - border]


# ---------------------------------------------------------------------------------------------------------------------
# The FD-classifier: the network that looks at the pictures

class FDClassifier(nn.Module):
    """Three convolutions and two linear layers. What the last one reads, 64 numbers, are the features of the FD."""

    def __init__(self, classes):
        super().__init__()
        layers, channels = [], 3
        for width, pool in ((32, nn.MaxPool2d(2)), (64, nn.MaxPool2d(2)), (128, nn.AdaptiveAvgPool2d(2))):
            # Pooling the maximum before the ReLU gives the same as after it, at a quarter of the ReLU's work.
            middle = [pool, nn.ReLU()] if isinstance(pool, nn.MaxPool2d) else [nn.ReLU(), pool]
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), *middle]
            channels = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 2 * 2, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def features(self, images):
        """Images [B, 3, H, W] in [0, 1], without border -> [B, 64]."""
        if images.shape[-1] > 64:       # large pictures are looked at small: this is a toy's measure
            images = F.interpolate(images, (64, 64), mode="bilinear", antialias=True)
        return self.body(images.contiguous(memory_format=torch.channels_last))      # a third faster on a CPU

    def forward(self, images):
        return self.head(self.features(images))         # [B, classes]


def fd_classifier(train_set, test_set, path, device="cpu", steps=900, batch_size=128):
    """(FDClassifier in eval mode, its accuracy on the test set), from path if that was trained on the same data.

    900 steps of 128 images: about 40 seconds on two cores and 90 % on Fashion-MNIST. The seed is its own, so that the
    same data give the same network whatever --seed is.
    """
    made_of, path = [train_set.fingerprint, test_set.fingerprint, steps, batch_size], Path(path)
    with torch.random.fork_rng():
        torch.manual_seed(2718)
        model = FDClassifier(len(train_set.classes)).to(device, memory_format=torch.channels_last)
    if path.exists():
        checkpoint = trainer.load_checkpoint(path, "fd_classifier", make=f"rm {path}; python -m extras.report scores")
        if checkpoint["config"].get("made_of") == made_of and isinstance(checkpoint.get("test_accuracy"), float):
            trainer.load_weights(model, checkpoint["model"], path)
            return model.eval().requires_grad_(False), checkpoint["test_accuracy"]
    batches = data.batches(train_set, batch_size, seed=2718)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), "FD-classifier", unit="step", mininterval=1.0, disable=None):
        images, labels = (t.to(device) for t in next(batches))
        loss = F.cross_entropy(model(without_border(images, train_set.border)), labels)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
    model.eval().requires_grad_(False)
    right = [model(without_border(images.to(device), test_set.border)).argmax(1).cpu() == labels
             for images, labels in images_of(test_set, 10_000)]
    accuracy = torch.cat(right).float().mean().item()
    checkpoint = {"stage": "fd_classifier", "model": model.state_dict(), "step": steps, "test_accuracy": accuracy,
                  "config": {"made_of": made_of}}
    trainer.write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))
    return model, accuracy


@torch.inference_mode()
def score(pictures, classifier, reference, border=0):
    """Score pictures in one pass: {"psnr": dB, "accuracy": 0 .. 1, "fd"}; no "psnr" where there are no originals.

    pictures: yields (images [B, 3, H, W], labels [B], originals [B, 3, H, W] or None); classifier: an FDClassifier;
    reference: feature_statistics of the set that the FD is to. Everything is scored without `border`.
    """
    features, right, decibels = [], [], []
    for images, labels, originals in pictures:
        images = without_border(images, border).clamp(0, 1)
        features.append(classifier.features(images))                                        # [B, 64]
        right.append(classifier.head(features[-1]).argmax(1) == labels.to(images.device))
        if originals is not None:
            decibels.append(psnr(images, without_border(originals, border)))
    result = {"psnr": torch.cat(decibels).mean().item()} if decibels else {}
    statistics_of_these = feature_statistics(torch.cat(features).cpu())
    return {**result, "accuracy": torch.cat(right).float().mean().item(),
            "fd": frechet_distance(*statistics_of_these, *reference)}


# ---------------------------------------------------------------------------------------------------------------------
# What is measured, stage by stage

class Bench:
    """What all scores of one run share: the test images, the classifier, and the test set's statistics. Each is made
    when it is first asked for, so that a report whose numbers are all kept needs none of them."""

    def __init__(self, args, image_size):
        self.out, self.seed = args.out, args.seed
        self.device = args.device
        self.train, self.test = (data.open_dataset(args.data, split, image_size) for split in ("train", "val"))
        self.side = image_size - 2 * self.test.border                       # pixels of the picture that is scored
        self.indices = subset(self.test, args.images)
        self.labels = torch.from_numpy(self.test.labels[self.indices])      # [n]
        picks = np.linspace(0, len(self.labels) - 1, min(args.samples, len(self.labels))).round()
        self.sample_labels = self.labels.sort().values[picks.astype(int)]   # fewer, in the same balance of classes
        self.codes = {}

    @functools.cached_property
    def classifier_and_accuracy(self):
        return fd_classifier(self.train, self.test, self.out / "fd_classifier.pt", self.device)

    @functools.cached_property
    def reference(self):
        return self.statistics(self.test)

    def images(self, dataset):
        return images_of(dataset, len(self.indices))

    def examples(self, count=10):
        """[count, 3, H, W]: the first test image of each class, then others."""
        first = np.unique(self.test.labels, return_index=True)[1]
        chosen = np.concatenate([first, np.setdiff1d(self.indices, first)])[:count]
        return torch.from_numpy(self.test.get_many(chosen, [None] * len(chosen))).to(self.device).float() / 255

    @torch.inference_mode()
    def statistics(self, dataset):
        """feature_statistics of as many images of a set as are scored."""
        classifier = self.classifier_and_accuracy[0]
        return feature_statistics(torch.cat([
            classifier.features(without_border(images.to(self.device), dataset.border)).cpu()
            for images, _ in bar(self.images(dataset), f"features of {dataset.split}")]))

    @torch.inference_mode()
    def encode(self, model):
        """The codes of the test images, [n, L] or [n, h, w]. Once for stages 1 and 2: only their decoders differ."""
        key = codes_fingerprint(model)
        if key not in self.codes:
            batches = bar(self.images(self.test), "codes")
            self.codes[key] = torch.cat([model.encode(images.to(self.device)).cpu() for images, _ in batches])
        return self.codes[key]

    def score_reconstructions(self, codes, decode):
        """codes [n, ...] of the test images."""
        batches = zip(bar(codes.split(BATCH), "decoding"), self.images(self.test))
        return score(((decode(batch.to(self.device)), labels, images.to(self.device))
                      for batch, (images, labels) in batches),
                     self.classifier_and_accuracy[0], self.reference, self.test.border)

    def score_samples(self, codes, decode):
        """codes [samples, L], made for sample_labels."""
        batches = zip(bar(codes.split(BATCH), "decoding"), self.sample_labels.split(BATCH))
        return score(((decode(batch.to(self.device)), labels, None) for batch, labels in batches),
                     self.classifier_and_accuracy[0], self.reference, self.test.border)


def measure_data(bench):
    """What to compare with: the classifier on the test images themselves, and the FD of training to test images."""
    accuracy = bench.classifier_and_accuracy[1]
    print(f"FD-classifier: accuracy {accuracy:.3f} on the test images"
          + (". There is one class only, so that accuracy means nothing" if len(bench.test.classes) == 1 else ""))
    return {"test_accuracy": accuracy, "fd_floor": frechet_distance(*bench.statistics(bench.train), *bench.reference)}


def measure_vqgan(bench, path):
    model = load_vqgan(path, bench.device)
    codes = bench.encode(model)                                             # [n, h, w]
    used, perplexity = codebook_use(codes, model.config.codebook_size)
    return {**bench.score_reconstructions(codes, model.decode_codes), "used": used, "perplexity": perplexity}


def measure_stage1(bench, path):
    """Both decodes: soft (expected VQGAN embedding) wins PSNR, argmax (most probable code) wins accuracy and FD."""
    model = load_tokenizer(path, bench.device)
    codes = bench.encode(model)                                             # [n, L]
    used, perplexity = codebook_use(codes, model.config.codebook_size)
    hard = bench.score_reconstructions(codes, functools.partial(model.decode_codes, hard=True))
    return {**bench.score_reconstructions(codes, model.decode_codes), "used": used, "perplexity": perplexity,
            **{f"{name}_argmax": value for name, value in hard.items()}}


def measure_stage2(bench, path):
    model = load_tokenizer(path, bench.device)
    return bench.score_reconstructions(bench.encode(model), model.decode_codes)


def measure_samples(bench, path, tokenizer_path, picture):
    """New images for bench.sample_labels, and a picture of them with one row a class.

    "repeats": how many of the first 100 samples of a class have the codes of an earlier one, summed over classes.
    """
    generator, tokenizer = load_pair(bench, path, tokenizer_path)
    # half a batch, since guidance doubles it
    codes = sample_codes(generator, bench.sample_labels, bench.seed, BATCH // 2)                        # [samples, L]
    data.save_picture(samples_grid(bench, codes, tokenizer), picture)
    of_class = [codes[bench.sample_labels == label][:100] for label in bench.sample_labels.unique()]
    return {**bench.score_samples(codes, tokenizer.decode_codes), "guidance_scale": generator.config.guidance_scale,
            "repeats": sum(len(rows) - len(rows.unique(dim=0)) for rows in of_class)}


def load_pair(bench, path, tokenizer_path):
    """(generator, tokenizer), checked to speak of the same codes."""
    generator, tokenizer = load_generator(path, bench.device), open_tokenizer(tokenizer_path, bench.device)
    if generator.about["fingerprint"] != codes_fingerprint(tokenizer):
        raise BadInput(f"{path}: trained on other codes than those of {tokenizer_path}. Train it again: "
                       f"python generator.py --mode {generator.config.mode} --overwrite")
    return generator, tokenizer


@torch.inference_mode()
def order_curves(bench, ar_path, tokenizer_path):
    """Two curves that would show that the tokens have an order.

    bits: mean -log2 p(code_i | class, codes before it) under the AR generator, on the test images' codes; unigram: the
    entropy of code_i alone in them, which is what a generator without context could reach. mse, psnr: reconstructions
    of 250 test images from their first `lengths` codes.
    """
    ar, tokenizer = load_pair(bench, ar_path, tokenizer_path)
    codes, border = bench.encode(tokenizer), bench.test.border                                          # [n, L]
    bits = []
    for batch, labels in zip(bar(codes.split(BATCH), "bits a token"), bench.labels.split(BATCH)):
        # position i of the logits has read the class and codes[:, :i]
        logits = ar(batch.to(bench.device), labels.to(bench.device)).float()                            # [B, L, K]
        bits.append(F.cross_entropy(logits.transpose(1, 2), batch.to(bench.device), reduction="none") / math.log(2))
    unigram = [math.log2(codebook_use(column, ar.config.codebook_size)[1]) for column in codes.T]

    tokens = codes.shape[1]
    lengths = sorted({round(k) for k in np.linspace(1, tokens, min(tokens, 32))})
    errors, decibels = [], []
    for images, _ in bar(images_of(bench.test, min(250, len(codes))), "prefixes"):
        images = images.to(bench.device)
        prefix_codes, originals = tokenizer.encode(images), without_border(images, border)              # [B, L]
        decoded = [without_border(tokenizer.decode_codes(prefix_codes[:, :k]), border) for k in lengths]
        errors.append(torch.stack([(d - originals).square().mean((1, 2, 3)) for d in decoded]))         # [lengths, B]
        decibels.append(torch.stack([psnr(d, originals) for d in decoded]))
    return {"bits": torch.cat(bits).mean(0).tolist(), "unigram": unigram, "lengths": lengths,
            "mse": torch.cat(errors, 1).mean(1).tolist(), "psnr": torch.cat(decibels, 1).mean(1).tolist()}


def measure_order(bench, ar_path, tokenizer_path, picture):
    """order_curves, and a picture of them."""
    curves = order_curves(bench, ar_path, tokenizer_path)
    positions = range(1, len(curves["bits"]) + 1)
    data.save_picture(side_by_side([
        line_plot("Bits a token, by position", "position in the sequence",
                  {"under the AR generator": (positions, curves["bits"]),
                   "entropy of the code alone": (positions, curves["unigram"])}),
        line_plot("Error, by length of the prefix", "first k codes decoded",
                  {"mean squared error": (curves["lengths"], curves["mse"])})], 2), picture)
    return curves


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def name_rows(grid, names):
    """A picture_grid with the name of each row at its left."""
    font, height = ImageFont.load_default(14), (grid.height + 2) / len(names)
    margin = int(max(font.getlength(name) for name in names)) + 14
    image = Image.new("RGB", (grid.width + margin, grid.height), "white")
    image.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(image)
    for i, name in enumerate(names):
        draw.text((margin - 8, (i + 0.5) * height), name, "black", font, anchor="rm")
    return image


def side_by_side(images, columns):
    """Images of one size as one, row by row."""
    width, height = images[0].size
    sheet = Image.new("RGB", (width * min(columns, len(images)), height * -(-len(images) // columns)), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def ticks(low, high, most=7):
    """At most `most` round numbers within low .. high: multiples of 1, 2 or 5 times a power of ten."""
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(size * m for m in (1, 2, 5, 10, 20) if (high - low) / (size * m) <= most - 1)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


COLOURS = ("#1f6fb4", "#d9542b", "#3a9a4e", "#7a55a8")


def line_plot(title, x_name, curves, width=520, height=320):
    """curves {name: (xs, ys)} or {name: (xs, ys, half widths of intervals)} -> a PIL image of width x height, drawn by
    matplotlib where that is installed, else by Pillow."""
    curves = {name: (list(xs), list(ys), half[0] if half else None) for name, (xs, ys, *half) in curves.items()}
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg     # optional; asks for no window system
        from matplotlib.figure import Figure
    except ImportError:
        return pillow_plot(title, x_name, curves, width, height)
    figure = Figure((width / 100, height / 100), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (name, (xs, ys, half)), colour in zip(curves.items(), COLOURS):
        axes.plot(xs, ys, color=colour, marker="o" if len(xs) <= 40 else None, markersize=3, label=name)
        if half:
            axes.fill_between(xs, np.subtract(ys, half), np.add(ys, half), color=colour, alpha=0.2, linewidth=0)
    axes.set(title=title, xlabel=x_name)
    axes.grid(alpha=0.3)
    axes.legend()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def pillow_plot(title, x_name, curves, width, height):
    """line_plot without matplotlib: the same points and intervals. Drawn twice as large, then halved: smooth."""
    def span(values):
        room = 0.05 * (max(values) - min(values)) or 0.5                    # all alike: an axis needs a length
        return min(values) - room, max(values) + room

    ends = {name: (np.subtract(ys, half or 0).tolist(), np.add(ys, half or 0).tolist())
            for name, (_, ys, half) in curves.items()}
    x_low, x_high = span([x for xs, *_ in curves.values() for x in xs])
    y_low, y_high = span([y for low, high in ends.values() for y in low + high])
    left, top, right, bottom = 140, 110, 2 * width - 40, 2 * height - 100   # of the axes, in pixels of the large image
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    draw, small, large = ImageDraw.Draw(image), ImageFont.load_default(24), ImageFont.load_default(30)

    def across(x):
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def up(y):
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    for y in ticks(y_low, y_high):
        draw.line([(left, up(y)), (right, up(y))], "#e4e4e4", 2)
        draw.text((left - 14, up(y)), f"{y:.6g}", "#333333", small, anchor="rm")
    for x in ticks(x_low, x_high):
        draw.line([(across(x), bottom), (across(x), bottom + 10)], "#333333", 2)
        draw.text((across(x), bottom + 16), f"{x:.6g}", "#333333", small, anchor="ma")
    draw.line([(left, top), (left, bottom), (right, bottom)], "#333333", 3)
    draw.text((left, 16), title, "black", large)
    draw.text((right, 2 * height - 16), x_name, "#333333", small, anchor="rd")
    legend = left
    for (name, (xs, ys, half)), colour in zip(curves.items(), COLOURS):
        if half:
            for x, low, high in zip(xs, *ends[name]):
                draw.line([(across(x), up(low)), (across(x), up(high))], colour, 3)
        points = [(across(x), up(y)) for x, y in zip(xs, ys)]
        draw.line(points, colour, 5, joint="curve")
        for x, y in points if len(points) <= 40 else ():
            draw.ellipse([x - 7, y - 7, x + 7, y + 7], colour)
        draw.line([(legend, 80), (legend + 50, 80)], colour, 5)
        draw.text((legend + 62, 80), name, "#333333", small, anchor="lm")
        legend += 62 + small.getlength(name) + 40
    return image.resize((width, height), Image.Resampling.LANCZOS)


@torch.inference_mode()
def samples_grid(bench, codes, tokenizer):
    """codes [samples, L], made for bench.sample_labels -> a picture with a row a class, up to 20 rows of 10."""
    of_class = [codes[bench.sample_labels == label] for label in bench.sample_labels.unique()[:20]]
    columns = min(10, *map(len, of_class))
    names = [bench.test.classes[label] for label in bench.sample_labels.unique()[:20]]
    rows = [(name, tokenizer.decode_codes(rows[:columns].to(bench.device))) for name, rows in zip(names, of_class)]
    return picture_of(rows, 64 // bench.side)


@torch.inference_mode()
def draw_reconstructions(bench, files, reconstructions, prefixes):
    """Two pictures, one test image of each class in a column: every stage's reconstruction, and the last stage's from
    the first 1, 2, 4, ... codes (the paper's Fig. 6)."""
    images = bench.examples()
    rows = {"original": images}
    vqgan = load_vqgan(files["vqgan"], bench.device)
    rows["VQGAN"] = vqgan.decode_codes(vqgan.encode(images))
    stage1 = load_tokenizer(files["stage1"], bench.device)
    rows["stage 1, soft"] = stage1.decode_codes(stage1.encode(images))
    rows["stage 1, argmax"] = stage1.decode_codes(stage1.encode(images), hard=True)
    stage2 = load_tokenizer(files["stage2"], bench.device)
    codes = stage2.encode(images)                                           # [10, L]
    rows["stage 2"] = stage2.decode_codes(codes)
    data.save_picture(picture_of(rows.items(), 84 // bench.side), reconstructions)
    tokens = codes.shape[1]
    lengths = [2 ** i for i in range(tokens.bit_length()) if 2 ** i < tokens] + [tokens]
    rows = [("original", images), *((f"{k} code{'s'[:k > 1]}", stage2.decode_codes(codes[:, :k])) for k in lengths)]
    data.save_picture(picture_of(rows, 84 // bench.side), prefixes)


def picture_of(rows, scale):
    """[(name, images [n, 3, H, W]), ...] -> a picture with one row each, a pixel at least 1 x 1."""
    names, images = zip(*rows)
    return name_rows(data.picture_grid(torch.cat(images), len(images[0]), max(1, scale)), names)


# ---------------------------------------------------------------------------------------------------------------------
# The report

class Notebook:
    """Measurements in a file, each with what it was made of: what has not changed is not measured again."""

    def __init__(self, path, made_of):
        self.path, self.made_of, self.seconds = path, made_of, 0.0          # seconds: of all that was asked for
        try:        # each entry has its own checksum: one damaged digit would be another score
            self.kept = {name: entry for name, entry in data.read_json(path).items()
                         if isinstance(entry, dict) and entry.pop("checksum", None) == data.hash_of(entry)}
        except (OSError, ValueError, AttributeError, RecursionError):       # none yet, or damaged: measure
            self.kept = {}

    def __call__(self, name, files, measure, *pictures):
        """measure(), or what it returned last time if files (and all else it depends on) and pictures still stand."""
        made_of = [*self.made_of, *(stamp(file) for file in files)]
        entry = self.kept.get(name)
        if entry is None or entry["made_of"] != made_of or not all(picture.exists() for picture in pictures):
            started = time.perf_counter()
            value = measure()
            entry = {"made_of": made_of, "value": value, "seconds": time.perf_counter() - started}
            self.kept[name] = json.loads(json.dumps(entry))     # as it will be read: tuples become lists
            text = json.dumps({name: entry | {"checksum": data.hash_of(entry)} for name, entry in self.kept.items()},
                              indent=1)
            trainer.write_atomically(self.path, lambda temporary: temporary.write_text(text))
        self.seconds += entry["seconds"]
        return entry["value"]


def made_of_all(args, bench):
    """What every measurement depends on: data, numbers of images, seed, source files."""
    return [bench.train.fingerprint, bench.test.fingerprint, len(bench.indices), len(bench.sample_labels), args.seed,
            *(stamp(ROOT / f"{name}.py")
              for name in ("data", "trainer", "vqgan", "tokenizer", "hnt", "generator", "evaluate", "extras/report",
                           "extras/bench", "extras/paper"))]


def stamp(path):
    """[name, size, time of change] of a file."""
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]


def stage_files(out, model, tokens):
    """({stage: file}, {stage: the command that makes it}). "half" is the tokenizer of L / 2 tokens that hnt.py grew
    into that of L, "stage1"."""
    name = f"{model}_{tokens}"
    tokenizer = "" if model == "nativetok" else f" --tokenizer {out / name}_stage2.pt"
    grown = "python hnt.py" if model == "nativetok" else f"python tokenizer.py --model {model}"
    return ({"vqgan": out / "vqgan.pt", "half": out / f"{model}_{tokens // 2}.pt", "stage1": out / f"{name}.pt",
             "stage2": out / f"{name}_stage2.pt", "ar": out / f"ar_{name}.pt", "maskgit": out / f"maskgit_{name}.pt"},
            {"vqgan": "python vqgan.py", "stage1": f"{grown} --tokens {tokens}",
             "stage2": f"python tokenizer.py --model {model} --stage 2 --tokens {tokens}",
             "ar": f"python generator.py --mode ar --tokens {tokens}{tokenizer}",
             "maskgit": f"python generator.py --mode maskgit --tokens {tokens}{tokenizer}"})


def measure_all(bench, notebook, files):
    """{stage: its scores} of every stage that exists; "data" is what the others are compared with."""
    there = {stage: path for stage, path in files.items() if path.exists()}
    scores = {"data": notebook("data", [], lambda: measure_data(bench))}
    for stage, measure in (("vqgan", measure_vqgan), ("stage1", measure_stage1), ("stage2", measure_stage2)):
        if stage in there:
            scores[stage] = notebook(stage, [there[stage]], lambda: measure(bench, there[stage]))
    for stage in ("ar", "maskgit"):
        if stage in there and "stage2" in there:
            picture = bench.out / f"samples_{stage}.png"
            scores[stage] = notebook(stage, [there[stage], there["stage2"]],
                                     lambda: measure_samples(bench, there[stage], there["stage2"], picture), picture)
    return scores


def score_table(scores, name):
    """A Markdown table, a row a stage and decode, aligned so that it reads well on the screen too."""
    def row(stage, decode, s, suffix=""):
        return [stage, decode, *(f"{s[key + suffix]:{form}}" if key + suffix in s else "" for key, form in
                                 (("psnr", ".2f"), ("accuracy", ".3f"), ("fd", ".2f"), ("used", ".0%"),
                                  ("perplexity", ".0f")))]

    model, tokens = name.rsplit("_", 1)
    model = {"nativetok": "NativeTok", "titok": "TiTok", "titok_causal": "TiTok (causal)"}[model]
    rows = [["stage", "decode", "PSNR, dB", "accuracy", "FD-classifier", "codes used", "perplexity"],
            ["the test images themselves", "", "", f"{scores['data']['test_accuracy']:.3f}", "0", "", ""],
            ["as many training images", "", "", "", f"{scores['data']['fd_floor']:.2f}", "", ""]]
    if "vqgan" in scores:
        rows += [row("0: VQGAN", "", scores["vqgan"])]
    if "stage1" in scores:
        rows += [row(f"1: {model}-{tokens}", "soft", scores["stage1"]),
                 row(f"1: {model}-{tokens}", "argmax", scores["stage1"], "_argmax")]
    if "stage2" in scores:
        rows += [row(f"2: {model}-{tokens}, decoder fine-tuned", "soft", scores["stage2"])]
    for stage, title in (("ar", "AR"), ("maskgit", "MaskGIT")):
        if stage in scores:
            rows += [row(f"3: {title} samples, guidance {scores[stage]['guidance_scale']:g}", "soft", scores[stage])]
    return markdown(rows, left=2)


def markdown(rows, left=1):
    """Rows of texts, the first of them the head -> a Markdown table; all but the first `left` columns at the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [" | ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
             for cells in rows]
    rule = " | ".join("-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def protocol(bench):
    classes = "" if len(bench.test.classes) > 1 else " There is one class only, so that accuracy means nothing."
    border = f" without its border of {bench.test.border} pixels" if bench.test.border else ""
    shrunk = " Accuracy and FD see the picture shrunk to 64x64." if bench.side > 64 else ""
    return (f"Scored on {len(bench.indices):,} test images of {bench.test.name}, on the {bench.side}x{bench.side} "
            f"picture{border}; {len(bench.sample_labels):,} samples, in the same balance of classes.\n"
            f"PSNR: mean of the images'. FD: Frechet distance to these images on 64 features of the FD-classifier, a "
            f"small network trained on the training split; it is not FID. It grows as images get fewer: "
            f"compare samples with samples.{shrunk}\n"
            f"Accuracy: share that the same network gives the right class.{classes} Guidance makes samples typical of "
            f"their class, so theirs can exceed that of reconstructions.\n"
            f"Soft: the pixel decoder reads the VQGAN's embedding averaged with the predicted probabilities; argmax: "
            f"that of the most probable code.")


def machine(device):
    """The machine in words: GPU, or CPU and cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{trainer.processor()}, {torch.get_num_threads()} threads"


def seconds_of(files, notebook):
    """{stage: seconds}, from the training logs; "evaluate": what all measurements took, the classifier included."""
    logs = {stage: trainer.read_log(path.with_suffix(".jsonl")) for stage, path in files.items()}
    grown = bool(logs["stage1"]) and "frozen" in logs["stage1"][-1]         # then "half" is stage 1, and this is HNT
    names = {"vqgan": "vqgan", "half": "stage1", "stage1": "hnt"} if grown else {"vqgan": "vqgan", "stage1": "stage1"}
    names |= {stage: stage for stage in ("stage2", "ar", "maskgit")}
    seconds = {name: round(logs[stage][-1]["seconds"], 1) for stage, name in names.items() if logs[stage]}
    return {**seconds, "evaluate": round(notebook.seconds, 1)}


def draw_losses(files, path):
    titles = {"vqgan": "Stage 0: VQGAN", "half": "Stage 1: half the tokens", "stage1": "Stage 1: all tokens",
              "stage2": "Stage 2: decoder fine-tune", "ar": "AR generator", "maskgit": "MaskGIT generator"}
    logs = {stage: trainer.read_log(files[stage].with_suffix(".jsonl")) for stage in titles}
    curves = {stage: ([line["step"] for line in log], [line["loss"] for line in log]) for stage, log in logs.items()}
    plots = [line_plot(titles[stage], "step", {"loss": curve}) for stage, curve in curves.items() if curve[0]]
    if plots:
        data.save_picture(side_by_side(plots, 2), path)
    return bool(plots)


def report(args, bench, notebook, files, name, seed):
    """Write report.md, scores.json and the pictures; print the table."""
    out, scores = bench.out, measure_all(bench, notebook, files)
    drawn = [out / "reconstructions.png", out / "prefixes.png"]
    notebook("pictures", [files[s] for s in ("vqgan", "stage1", "stage2")],
             lambda: draw_reconstructions(bench, files, *drawn), *drawn)
    order = notebook("order", [files["ar"], files["stage2"]],
                     lambda: measure_order(bench, files["ar"], files["stage2"], out / "order.png"), out / "order.png")
    has_losses = draw_losses(files, out / "losses.png")
    seconds = seconds_of(files, notebook)
    where = notebook("machine", [], lambda: f"{machine(bench.device)}; torch {torch.__version__}")    # that measured
    log = trainer.read_log(files["stage1"].with_suffix(".jsonl"))
    ratio = log[-1].get("step_ratio") if log else None                      # None: not grown, but trained at once

    def only(stage, *keys):
        return {key: scores[stage][key] for key in keys}

    numbers = {
        "data": bench.test.name, "seed": seed, "seconds": seconds,
        "vqgan": only("vqgan", "psnr", "perplexity", "accuracy", "fd"),
        "stage1": only("stage1", "psnr", "psnr_argmax", "accuracy", "accuracy_argmax", "fd", "fd_argmax", "perplexity"),
        "stage2": only("stage2", "psnr", "accuracy", "fd"),
        "ar": only("ar", "accuracy", "fd", "guidance_scale"),
        "maskgit": only("maskgit", "accuracy", "fd", "guidance_scale"),
        "hnt": {"step_ratio": ratio},
        "classifier": {"test_accuracy": scores["data"]["test_accuracy"]}, "fd_floor": scores["data"]["fd_floor"]}
    table = score_table(scores, name)
    total = sum(seconds.values())
    kind = "photographed" if bench.test.photographs else "drawn, not photographed"
    times = " | ".join(seconds), " | ".join("---:" for _ in seconds), " | ".join(f"{s:.0f}" for s in seconds.values())
    repeats = {stage: scores[stage]["repeats"] for stage in ("ar", "maskgit")}
    bits, unigram = sum(order["bits"]), sum(order["unigram"])

    def first_and_last(values, form):
        return f"{values[0]:{form}} at the first to {values[-1]:{form}} at the last"

    text = f"""# {name}, {args.config}: report

Data: {bench.test.name} ({kind}), {len(bench.train):,} training and {len(bench.test):,} test images,
{bench.test.image_size}x{bench.test.image_size}. Machine: {where}.
Seed of stage 0 {seed}, of the samples {bench.seed}.

| seconds | {times[0]} | all |
| --- | {times[1]} | ---: |
| | {times[2]} | {total:.0f} |

## Scores

{table}

{protocol(bench)}

- Of the first 100 samples of each class, {repeats['ar']} (AR) and {repeats['maskgit']} (MaskGIT) repeat the codes of
  an earlier one. 0: no two are alike.
- A frozen step of Hierarchical Native Training takes {f"{ratio:.2f} times as long as a full one" if ratio else
  "less than a full one: how much less is not known, since these tokens were not grown"}.

## Pictures

![](reconstructions.png)

Original test images over their reconstructions. Look for what gets lost on the way: the VQGAN blurs a little; stage 1
must say it all with {len(order['bits'])} codes and loses prints and textures first; stage 2 should be sharper than
stage 1, soft, and truer than argmax.

![](prefixes.png)

The same images from the first 1, 2, 4, ... codes alone. Look for what comes first: kind and outline, then tone and
detail. The decoder was trained on whole sequences, so short prefixes also show what it takes for likely.

![](samples_ar.png)

New images from the AR generator, one row a class. Look for variety within a row, and whether each image belongs to the
row's class.

![](samples_maskgit.png)

The same from the MaskGIT generator, in a few passes instead of one a code. Look for parts that do not fit each other.

![](order.png)

Left: what a code costs under the AR generator, {first_and_last(order['bits'], '.2f')} position, {bits:.1f} bits
an image; without class and context it would be {unigram:.1f}. Look for the gap between the lines: it is what the
class and the codes before it tell of the next one. Right: the error of the first k codes,
{first_and_last(order['mse'], '.4f')}. Look for a fall that is steep at first: early codes carry most.

""" + ("""![](losses.png)

Loss by step, a panel a stage. Look for curves that flatten, not rise; in "all tokens" for the small step down near the
end, where everything trains again. Stage 2's loss holds an adversarial part and need not fall.
""" if has_losses else "")
    for path, content in ((out / "report.md", text), (out / "scores.json", json.dumps(numbers, indent=1) + "\n"),
                          (out / "curves.json", json.dumps(order, indent=1) + "\n")):
        trainer.write_atomically(path, lambda temporary: temporary.write_text(content))
    print(f"{table}\n{protocol(bench)}\nseconds: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
          + f"; all {total:.0f}\n{out / 'report.md'}: the same with pictures")


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def main():
    parser = trainer.ArgumentParser(__doc__, prog="-m extras.report")
    parser.add_argument("what", nargs="?", choices=("report", "scores"), metavar="what", default="report",
                        help="report (default) or scores")
    parser.add_argument("--config", choices=("toy", "full"), help="default: full where CUDA is present, else toy")
    parser.add_argument("--data", help="as in training: shapes, fashion, auto or a folder")
    parser.add_argument("--out", help="folder of the results, default out/<config>")
    parser.add_argument("--model", choices=MODELS, default="nativetok", help="the tokenizer's kind")
    parser.add_argument("--tokens", type=int, help="its length, default 16 (toy) or 32 (full)")
    parser.add_argument("--images", type=int, default=10_000, help="images of the data to score on, default 10,000")
    parser.add_argument("--samples", type=int, default=2_500, help="new images to score, default 2,500")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where present")
    args = trainer.parse(parser)
    tokens = args.tokens or PRESETS[args.config].tokens
    if tokens < 1 or min(args.images, args.samples) < 2:
        raise BadInput(f"--tokens {tokens} --images {args.images} --samples {args.samples}: at least 1 token, 2 images "
                       f"and 2 samples")
    name, (files, commands) = f"{args.model}_{tokens}", stage_files(args.out, args.model, tokens)
    missing = [stage for stage in commands if not files[stage].exists()]
    if "vqgan" in missing or (args.what == "report" and missing):
        raise BadInput(f"{files[missing[0]]}: not found. Train it first: {commands[missing[0]]}")
    checkpoint = trainer.load_checkpoint(files["vqgan"], "vqgan", make=commands["vqgan"])
    bench = Bench(args, trainer.read_config(VQGANConfig, checkpoint["config"], files["vqgan"]).image_size)
    notebook = Notebook(args.out / "measured.json", made_of_all(args, bench))
    if args.what == "report":
        return report(args, bench, notebook, files, name, checkpoint.get("settings", {}).get("seed"))
    print(f"{score_table(measure_all(bench, notebook, files), name)}\n{protocol(bench)}")
    for stage in missing:
        print(f"not there yet: {files[stage]}. It comes from: {commands[stage]}")


if __name__ == "__main__":
    trainer.launch(main)
