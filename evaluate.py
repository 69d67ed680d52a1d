"""Scores of pictures (fid), a tokenizer's reconstructions (rfid), a generator's samples (gfid).

    python evaluate.py fid A B                          # of B against A: folders or .npz files
    python evaluate.py rfid TOKENIZER --data DIR        # of the reconstructions of DIR's val
    python evaluate.py gfid GENERATOR --reference PATH  # of 50,000 samples
    torchrun --nproc_per_node=4 evaluate.py gfid ...    # the ranks share the pictures

FID as pytorch-fid, but with TensorFlow's resize and scale; Inception Score and KID as
torch-fidelity; precision and recall, and the Inception Score once more, as ADM. The protocol is
printed with the scores; docs/fid.md explains it.

Letters: B batch, H W pixels, n images of a set, F features of the network, L tokens, K codes in a
codebook. Images are float32 [B, 3, H, W] in [0, 1], pictures the same in bytes.
"""
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import trainer
from generator import (NO_FLAGS, SAMPLING, GeneratorConfig, load_pair, open_tokenizer,
                       sample_codes)
from trainer import BadInput

BATCH = 100         # images at once, and samples that are drawn by one random generator
FEATURES = 2048     # F of Inception's pool
WEIGHTS = Path("weights/pt_inception-2015-12-05-6726825d.pth")      # pytorch-fid's file


# ---- The metrics, on arrays

def psnr(a, b):
    """Peak signal-to-noise ratio in dB of each image [B, 3, H, W]: [B]. Equal images: 100."""
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


def feature_statistics(features):
    """Features [n, F] -> float64 (mean [F], covariance [F, F] with n - 1)."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), as pytorch-fid; at times just
    below 0. Heusel et al., 2017 (1706.08500)."""
    warnings.filterwarnings("ignore", "Matrix is singular")     # SciPy's, of fewer than F images
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)                                  # [F, F]
    if not np.isfinite(root).all():     # singular
        offset = 1e-6 * np.eye(len(sigma1))
        root = scipy.linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
    traces = np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real
    return float(np.square(mu1 - mu2).sum() + traces)


def split_score(logits):
    """exp of the rows' mean KL divergence from the mean of all rows, as probabilities."""
    log_p = torch.as_tensor(logits).double().log_softmax(1)                     # [n, classes]
    log_mean = log_p.logsumexp(0) - np.log(len(log_p))                          # [classes]
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item()


def inception_score(logits, splits=10):
    """(mean, standard deviation over shuffled splits) of logits [n, 1008], as torch-fidelity.
    Salimans et al., 2016 (1606.03498)."""
    order = np.random.RandomState(2020).permutation(len(logits))
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = [split_score(logits[order[a:b]]) for a, b in zip(bounds, bounds[1:])]
    return float(np.mean(scores)), float(np.std(scores))


def inception_score_adm(logits, part=5000):
    """The Inception Score as ADM's evaluator: over parts of 5,000 rows, not shuffled."""
    return float(np.mean([split_score(rows) for rows in torch.as_tensor(logits).split(part)]))


def kernel_distance(a, b, subsets=100, subset_size=1000):
    """KID: (mean, standard deviation) over subsets of features [n, F] of the squared MMD with the
    kernel (x.y / F + 1)^3, unbiased: it may be negative. Binkowski et al., 2018 (1801.01401)."""
    m, random, values = subset_size, np.random.RandomState(2020), []    # as torch-fidelity
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    for _ in range(subsets):
        x, y = (s[random.choice(len(s), m, replace=False)].double() for s in (a, b))    # [m, F]
        xx, yy, xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()      # no row with itself
        values.append((within / (m * (m - 1)) - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values))


def precision_recall(real, fake, k=3, block=512):
    """(share of fake rows in a real row's ball, of real rows in a fake row's); a ball reaches to
    the k-th nearest other of its set. Kynkäänniemi et al., 2019 (1904.06991)."""
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()

    def covered(points, centres):
        reach = torch.cat([torch.cdist(rows, centres).kthvalue(k + 1).values    # itself is nearest
                           for rows in centres.split(block)])                   # [n]
        inside = [(torch.cdist(rows, centres) <= reach).any(1) for rows in points.split(block)]
        return torch.cat(inside).double().mean().item()

    return covered(fake, real), covered(real, fake)


# ---- The Inception network, whose features are compared

def tf_resize(images, size=299):
    """TensorFlow 1's bilinear resize, bit for bit: [B, 3, H, W] -> float32 [B, 3, size, size].
    Output i reads position i * length / size, without half pixels and antialiasing."""
    x = images.float()
    for _ in range(2):      # along the width, then along the height
        length = x.shape[-1]
        ratio = float(np.float32(length) / np.float32(size))    # a GPU would multiply by 1 / size
        position = torch.arange(size, dtype=torch.float32, device=x.device) * ratio     # [size]
        low = position.long()
        left, right = x[..., low], x[..., (low + 1).clamp(max=length - 1)]
        x = (left + (right - left) * (position - low)).transpose(2, 3)
    return x


average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)     # torchvision counts the padding
maximum = nn.MaxPool2d(3, 1, 1)
halve = nn.MaxPool2d(3, 2)


class InceptionFID(nn.Module):
    """The Inception-v3 of 2015-12-05 as functions of its weights, from pytorch-fid's file or state
    dict, which has the names and sizes.
    Pictures uint8 [B, 3, H, W] of any size -> (pool [B, 2048], logits [B, 1008] without bias)."""
    def __init__(self, path_or_state_dict):
        super().__init__()
        for name, value in sorted(trainer.read_weights(path_or_state_dict).items()):
            if value.ndim == 4:
                value = value.contiguous(memory_format=torch.channels_last)     # faster
            if value.ndim > 0:              # without counters
                self.register_buffer(name.replace(".", "/"), value.float())     # no "." allowed
        if sum(value.numel() for value in self.buffers()) != 23_885_392:      # torchvision's differ
            raise BadInput("--inception: not pytorch-fid's weights of the Inception of 2015")
        self.fingerprint = trainer.fingerprint(self)

    def get(self, name):
        return getattr(self, name.replace(".", "/"))

    def conv(self, x, name, stride=1, padding="same"):
        """[B, C_in, H, W] -> [B, C_out, H', W']: convolution, batch norm, ReLU."""
        weight, *norm = (self.get(f"{name}.{part}") for part in (   # in batch_norm's order
            "conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias"))
        x = F.conv2d(x, weight, stride=stride, padding=padding)
        return F.relu(F.batch_norm(x, *norm, eps=1e-3), inplace=True)       # TensorFlow's eps

    def chain(self, x, name, count, **last):
        """Convolutions name_1 .. name_count; last: for the last one."""
        for i in range(1, count + 1):
            x = self.conv(x, f"{name}_{i}", **(last if i == count else {}))
        return x

    def mixed(self, x, name, **chains):
        """Branches, joined by channel. chains: {branch: number of its convolutions}."""
        found = [self.chain(x, f"{name}.{branch}", count) for branch, count in chains.items()]
        return torch.cat([self.conv(x, f"{name}.branch1x1"), *found,
                          self.conv(average(x), f"{name}.branch_pool")], 1)

    def mixed_7(self, x, name, pool):       # [B, 1280 or 2048, 8, 8]
        single = self.conv(x, f"{name}.branch3x3_1")
        double = self.chain(x, f"{name}.branch3x3dbl", 2)
        return torch.cat([self.conv(x, f"{name}.branch1x1"),
                          *(self.conv(single, f"{name}.branch3x3_2{side}") for side in "ab"),
                          *(self.conv(double, f"{name}.branch3x3dbl_3{side}") for side in "ab"),
                          self.conv(pool(x), f"{name}.branch_pool")], 1)

    def features(self, x):      # [B, 3, 299, 299] -> [B, 2048, 8, 8]
        half = {"stride": 2, "padding": 0}
        x = self.conv(self.conv(x, "Conv2d_1a_3x3", **half), "Conv2d_2a_3x3", padding=0)
        x = halve(self.conv(x, "Conv2d_2b_3x3"))                            # [B, 64, 73, 73]
        x = self.conv(self.conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", padding=0)
        x = halve(x)                                                        # [B, 192, 35, 35]
        for letter in "bcd":
            x = self.mixed(x, f"Mixed_5{letter}", branch5x5=2, branch3x3dbl=3)  # [B, 288, 35, 35]
        x = torch.cat([self.conv(x, "Mixed_6a.branch3x3", **half),
                       self.chain(x, "Mixed_6a.branch3x3dbl", 3, **half), halve(x)], 1)
        for letter in "bcde":
            x = self.mixed(x, f"Mixed_6{letter}", branch7x7=3, branch7x7dbl=5)  # [B, 768, 17, 17]
        x = torch.cat([self.chain(x, "Mixed_7a.branch3x3", 2, **half),
                       self.chain(x, "Mixed_7a.branch7x7x3", 4, **half), halve(x)], 1)
        x = self.mixed_7(x, "Mixed_7b", average)                            # [B, 2048, 8, 8]
        return self.mixed_7(x, "Mixed_7c", maximum)     # torchvision: average here, too

    def forward(self, images):
        x = (tf_resize(images) - 128) / 128                                 # [B, 3, 299, 299]
        x = x.contiguous(memory_format=torch.channels_last)
        weight = self.get("fc.weight")                                      # [1008, 2048]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):    # it rounds to 10 bits
            pool = self.features(x).mean((2, 3), keepdim=True)              # [B, 2048, 1, 1]
            logits = F.conv2d(pool, weight[:, :, None, None])               # linear may use TF32
        return pool.flatten(1), logits.flatten(1)


# ---- Pictures: from folders, .npz files, data sets and generators

@dataclass
class Pictures:
    """A set of pictures to be scored, or only its statistics."""
    name: str                       # for the protocol
    count: int                      # n
    size: tuple                     # (H, W)
    read: callable                  # read(start, stop) -> uint8 [stop - start, 3, H, W]
    statistics: tuple = ()          # of the features, ready-made: (mu, sigma)

    def __post_init__(self):
        if self.count < 10 and not self.statistics:
            raise BadInput(f"{self.name}: too few. Give 10 or more")


def to_uint8(images):
    """Images -> pictures."""
    if not images.isfinite().all():
        raise BadInput("images with NaN or infinite values cannot be scored")
    return (images.float().clamp(0, 1) * 255).round().byte()


def npz_pictures(path):
    """ADM's .npz: pictures (arr_0), FID's statistics (mu, sigma), or both."""
    found, statistics = np.load(path), ()
    rows = found["arr_0"] if "arr_0" in found else np.zeros((0, 0, 0, 3), np.uint8)
    if rows.dtype != np.uint8 or rows.shape[3:] != (3,):
        raise BadInput(f"{path}: arr_0 is {rows.dtype} {rows.shape}, not uint8 [n, H, W, 3]")
    name = f"{len(rows):,} pictures of {path}"
    if "mu" in found:
        name += ", for FID the statistics in it"
        statistics = np.float64(found["mu"]), np.float64(found["sigma"])
        if [x.shape for x in statistics if np.isfinite(x).all()] != [(FEATURES,), 2 * (FEATURES,)]:
            raise BadInput(f"{path}: mu is {found['mu'].shape}: not FID's {FEATURES} or not finite")
    return Pictures(name, len(rows), rows.shape[1:3], lambda start, stop: torch.from_numpy(
        rows[start:stop]).permute(0, 3, 1, 2), statistics)


def open_pictures(path, size=None):
    """An .npz, or all images in a folder and its folders, of one size; with `size`: their middle
    squares, resized. Raises BadInput for one that cannot be read."""
    if Path(path).is_file():
        return npz_pictures(path)
    if not Path(path).is_dir():
        raise BadInput(f"{path}: not a folder of images and not an .npz")
    found, left_out = data.list_images(path, by_class=False)
    files = [Path(path) / name for _, name, *_ in found]
    shape = data.read_image(files[0], size).shape if files else (3, 0, 0)

    def read(start, stop):
        images = [data.read_image(file, size) for file in files[start:stop]]   # [3, H, W] each
        for file, image in zip(files[start:], images):
            if image.shape != shape:
                raise BadInput(f"{file}: not {shape[1:]} pixels as the others. Use --size N")
        return torch.from_numpy(np.stack(images))

    name = f"{len(files):,} images of {path}{left_out}"
    name += f", middle squares resized to {size}" if size else ""
    return Pictures(name, len(files), shape[1:], read)


def dataset_pictures(dataset, limit, tokenizer=None, **how):
    """The `subset` of a data set; with a tokenizer its reconstructions. how: for decode_codes."""
    indices = subset(dataset, limit)

    def read(start, stop):
        images, _ = next(data.all_images(dataset, stop - start, indices[start:stop]))
        if tokenizer:
            codes = tokenizer.encode(images.to(next(tokenizer.parameters()).device))    # [B, L]
            images = tokenizer.decode_codes(codes, **how).cpu()
        return to_uint8(images)

    name = f"{len(indices):,} images of {dataset.name} {dataset.split}{dataset.note}"
    if tokenizer:
        decode = ", argmax" if how.get("hard") else ""
        name = f"by {tokenizer.path}{decode}, reconstructions of {name}"
    return Pictures(name, len(indices), (dataset.image_size,) * 2, read)


def samples(generator, tokenizer, count, seed, **changes):
    """Classes drawn as often as in the training data. A batch is seeded by (seed, start): the same
    on any number of ranks. changes: of the generator's config."""
    c = replace(generator.config, **changes)
    shares = np.divide(generator.class_counts, sum(generator.class_counts))             # [classes]

    def read(start, stop):
        labels = np.random.default_rng([seed, start]).choice(len(shares), stop - start, p=shares)
        codes = sample_codes(generator, torch.from_numpy(labels), seed * 10 ** 9 + start, **changes)
        return to_uint8(tokenizer.decode_codes(codes).cpu())

    used = [name for name in SAMPLING if name not in NO_FLAGS[c.mode]]
    if unused := changes.keys() - used:
        raise BadInput(f"--{min(unused)}: the generator is of mode {c.mode}, without it")
    how = ", ".join(f"{name} {getattr(c, name)}" for name in used)
    return Pictures(
        f"{count:,} samples, {len(shares)} classes at random ({min(shares):.2%} to "
        f"{max(shares):.2%} each), seed {seed}, {how}, decoded by {tokenizer.path}",
        count, (tokenizer.config.image_size,) * 2, read)


def subset(dataset, limit):
    """`limit` random indices (None: all), sorted; the first ones might be of one class."""
    return np.sort(np.random.default_rng(0).permutation(len(dataset))[:limit])


# ---- Scores of pictures

@torch.inference_mode()
def features_of(pictures, inception, device, copy=None):
    """{"pool": float32 [n, 2048], "logits": [n, 1008]}, or {} of statistics alone, on every rank;
    each computes a share. copy: uint8 [n, H, W, 3], filled with the pictures."""
    rank, world = trainer.setup_ranks(device)
    starts, found = range(0, pictures.count, BATCH), []
    mine = starts[len(starts) * rank // world:len(starts) * (rank + 1) // world]
    for start in tqdm(mine, "features", unit="batch", leave=False, disable=rank > 0 or None):
        images = pictures.read(start, min(start + BATCH, pictures.count))       # [B, 3, H, W]
        found.append([values.cpu().numpy() for values in inception(images.to(device))])
        if copy is not None:
            copy[start:start + len(images)] = images.permute(0, 2, 3, 1)
    found = sum(trainer.gather(found), [])      # in order
    return dict(zip(("pool", "logits"), map(np.concatenate, zip(*found))))


def compare(real, fake, x, y):
    """{score: value} of two Pictures: FID, of ready-made statistics where there are some; with
    features of the second the Inception Scores, with both features the others, too."""
    gaussians = [pictures.statistics or feature_statistics(features["pool"])
                 for pictures, features in ((real, x), (fake, y))]
    scores = {"FID": frechet_distance(*gaussians[0], *gaussians[1])}
    if y:
        mean, deviation = inception_score(y["logits"])
        scores |= {"IS (torch-fidelity: 10 splits)": mean, "IS, its deviation": deviation,
                   "IS (ADM: parts of 5,000)": inception_score_adm(y["logits"])}
    if x and y:
        size = min(1000, real.count, fake.count)
        mean, deviation = kernel_distance(x["pool"], y["pool"], subset_size=size)
        scores |= {f"KID x 1000 (100 subsets of {size:,})": 1000 * mean,
                   "KID x 1000, its deviation": 1000 * deviation}
        scores["precision"], scores["recall"] = precision_recall(x["pool"], y["pool"])
    return scores


# ---- Command line

def open_both(args):
    """(reference, [what is scored]) of the command."""
    if args.command == "fid":
        return open_pictures(args.reference, args.size), [open_pictures(args.pictures, args.size)]
    if args.command == "rfid":
        tokenizer = open_tokenizer(args.tokenizer, args.device)
        dataset = data.open_dataset(args.data, "val", tokenizer.config.image_size)
        # after stage 1 first the likeliest codes, as in Table 5; then as stage 2 decodes
        decodes = [{}] if tokenizer.fine_tuned else [{"hard": True}, {}]
        return (dataset_pictures(dataset, args.images),
                [dataset_pictures(dataset, args.images, tokenizer=tokenizer, **how)
                 for how in decodes])
    generator, tokenizer = load_pair(args.generator, args.tokenizer, args.device)
    changes = {name: getattr(args, name) for name in SAMPLING if hasattr(args, name)}
    fake = samples(generator, tokenizer, args.samples, args.seed, **changes)
    if args.reference:
        return open_pictures(args.reference, args.size), [fake]
    dataset = data.open_dataset(args.data, "train", args.size or tokenizer.config.image_size)
    if list(dataset.classes) != generator.classes:
        raise BadInput(f"{args.generator}: trained on other classes than --data {args.data}'s")
    return dataset_pictures(dataset, args.images), [fake]


def main():
    parser = trainer.make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, prog=parser.prog,
                                     parser_class=trainer.make_parser)
    fid, rfid, gfid = (commands.add_parser(name, description=__doc__)
                       for name in ("fid", "rfid", "gfid"))
    fid.add_argument("reference", metavar="A", help="folder, or .npz of pictures or statistics")
    fid.add_argument("pictures", metavar="B", help="what is scored, as A")
    rfid.add_argument("tokenizer", help="a checkpoint")
    gfid.add_argument("generator", help="a checkpoint")
    gfid.add_argument("--tokenizer", metavar="FILE", help="default: its own, after stage 2")
    gfid.add_argument("--samples", type=int, default=50_000)
    gfid.add_argument("--seed", type=int, default=0, help="of the samples")
    trainer.add_fields(gfid, GeneratorConfig, SAMPLING)
    either = gfid.add_mutually_exclusive_group()
    either.add_argument("--reference", metavar="PATH", help="as A; default: --data's train")
    for command in (rfid, either):
        command.add_argument("--images", type=int, help="images of the data; default: all")
    for command in (rfid, gfid):
        command.add_argument("--data", default="data/imagenet", help="as in training")
    for command in (fid, gfid):
        command.add_argument("--size", type=int, help="take images' middle square, resized to this")
    for command in (fid, rfid, gfid):
        command.add_argument("--inception", metavar="FILE", type=Path, default=WEIGHTS)
        command.add_argument("--json", metavar="FILE", type=Path, help="for scores and protocol")
        command.add_argument("--save", metavar="FILE.npz", help="what is scored, in ADM's format")
        command.add_argument("--device", help="cpu or cuda; default: cuda if present")
    args = parser.parse_args()
    args.device = trainer.choose_device(args.device)
    rank, _ = trainer.setup_ranks(args.device)
    real, fakes = open_both(args)
    copy = inception = None
    if any(pictures.count for pictures in (real, *fakes)):      # not statistics alone
        if not args.inception.exists():
            raise BadInput(f"{args.inception}: not found. Get pytorch-fid's {WEIGHTS.name}, or "
                           f"name it with --inception FILE")
        inception = InceptionFID(args.inception).to(args.device)
    if args.save:
        raw, fake = Path(f"{args.save}.npy"), fakes[0]
        if rank == 0:
            raw.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(raw, "w+", np.uint8, (fake.count, *fake.size, 3))
        trainer.gather(None)
        copy = np.load(raw, mmap_mode="r+")                 # each rank writes its share
    x, results = features_of(real, inception, args.device), []
    for i, fake in enumerate(fakes):
        y = features_of(fake, inception, args.device, None if i else copy)
        if rank:
            continue
        scores = compare(real, fake, x, y)
        protocol = [f"reference: {real.name}", f"scored: {fake.name}"]
        if inception:
            protocol.append(f"network: Inception of 2015, weights {inception.fingerprint}, float32")
        protocol += [f"warning: {pictures.name}: fewer than FID's 2,048 features"
                     for pictures in (real, fake) if pictures.count < FEATURES
                     and not pictures.statistics]
        if x and y and real.size != fake.size:
            protocol.append(f"warning: heights and widths {real.size} and {fake.size}: FID sees it")
        print(*[f"{name:<42} {value:.4f}" for name, value in scores.items()], *protocol, "",
              sep="\n")
        results.append({"scores": scores, "protocol": protocol})
    if args.save and rank == 0:
        np.savez(args.save, copy)       # as arr_0, never all in memory
        raw.unlink()
    if args.json and rank == 0:
        found = results[0] | {"others": results[1:]}
        trainer.write_text(args.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    trainer.launch(main)
