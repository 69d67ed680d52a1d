"""Scores: how good are the reconstructions and the samples of all stages, in numbers, pictures and one report.

    python evaluate.py report       # everything: <out>/report.md, <out>/scores.json and the pictures
    python evaluate.py scores       # only the table, of the stages that exist so far
    python evaluate.py fid A B      # FID, sFID, IS, KID, precision, recall of B (folder or .npz) against A
    python evaluate.py rfid TOKENIZER --data DIR        # of a tokenizer's reconstructions of val
    python evaluate.py gfid GENERATOR --reference PATH  # of 50,000 samples
    python evaluate.py speed        # fast forms against plain ones, HNT, sampling; a step of each full configuration
    make paper                      # the paper's tables and figures (make table1 ... one), from models it trains
    python evaluate.py memory       # what stage 1 needs on a GPU, estimated without one

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
import contextlib
import functools
import json
import math
import os
import re
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import data
import trainer
from generator import GENERATORS, LOSSES, codes_fingerprint, load_generator, open_tokenizer, sample_codes
from generator import PRESETS as GENERATOR_PRESETS
from generator import macs as generator_macs
from hnt import freeze_reused
from tokenizer import MODELS, PRESETS, TRAINING, MoCET, Stage1, build, load_tokenizer
from tokenizer import macs as tokenizer_macs
from trainer import BadInput
from vqgan import VQGAN, ConvNeXtSmall, Discriminator, VQGANConfig, load_vqgan, read_weights

LARGEST_D = 4096            # features of a statistics file; Inception has 2,048
LARGEST_PICTURE = 2 ** 24   # pixels of a picture in an .npz
BATCH = 100         # images at once where nothing is trained: larger ones fall out of a CPU's caches
bar = functools.partial(tqdm, leave=False, disable=None)       # shown on a terminal only, and gone when done


# ---------------------------------------------------------------------------------------------------------------------
# The metrics, on arrays

def psnr(a, b):
    """Peak signal-to-noise ratio of images [B, 3, H, W] in [0, 1], in dB, of each image: [B]. Equal images: 100."""
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


def codebook_use(codes, codebook_size):
    """(share of the codebook that occurs in codes, perplexity = exp(entropy): 1 .. K, K where all are used alike)."""
    share = torch.bincount(codes.flatten(), minlength=codebook_size) / codes.numel()        # [K]
    return (share > 0).float().mean().item(), torch.special.entr(share.double()).sum().exp().item()


def feature_statistics(features):
    """Features [n, D] -> (mean [D], covariance [D, D] with n - 1), in double precision."""
    features = np.asarray(features).astype(np.float64)  # a copy of ours: 50,000 of 2,048 are 0.8 GB, not one more each
    mean = features.mean(axis=0)
    features -= mean
    return mean, features.T @ features / (len(features) - 1)            # np.cov, in fewer passes


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    As in Heusel et al., 2017 (1706.08500), and computed as pytorch-fid does, in double precision: the real part of the
    root, and a small offset on both diagonals where the product is singular and has no finite root. Two equal
    arguments give 0 up to rounding, which may be slightly negative.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # newer versions of SciPy warn of a singular matrix, handled below
        root = scipy.linalg.sqrtm(sigma1 @ sigma2)
        if not np.isfinite(root).all():
            offset = 1e-6 * np.eye(len(sigma1))
            root = scipy.linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


def frechet_distance_fast(mu1, sigma1, mu2, sigma2):
    """frechet_distance by symmetric eigenvalues: several times as fast, without complex numbers and without an offset.

    With sigma1 = R R^T the eigenvalues of sigma1 sigma2 are those of the symmetric R^T sigma2 R. Where a covariance is
    singular, eigenvalues that should be 0 are rounding, whose root counts: off by up to 1e-9 of the traces (measured
    against the exact value; the form by sqrtm: 1e-8).
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    # Cholesky with pivots: stops at the rank where the plain one fails, and takes a ninth of the time of a root by eigh
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma1, lower=1)
    root = np.tril(factor)[np.argsort(pivots), :rank]                       # R [D, rank]
    values = np.linalg.eigvalsh(root.T @ sigma2 @ root)                     # negative ones are rounding too
    traces = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(np.maximum(values, 0)).sum()
    return float(np.square(mu1 - mu2).sum() + traces)


def split_score(logits):
    """exp of the mean KL divergence of the rows' classes from all rows' classes: 1 .. classes. logits [n, classes]."""
    log_p = torch.as_tensor(logits).double().log_softmax(1)     # never the log of a p that underflowed to 0
    log_marginal = log_p.logsumexp(0) - np.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item()


def inception_score(logits, splits=10, shuffle=True):
    """(mean, standard deviation over the splits) of the Inception Score, torch-fidelity's convention. logits [n, 1008].

    Rows shuffled by RandomState(2020), 10 consecutive splits, double precision, deviation with n and not n - 1.
    shuffle False: the rows as they come, which scores lower where they are sorted by class. Raises BadInput where there
    are fewer rows than splits. Salimans et al., 2016 (1606.03498).
    """
    if len(logits) < splits:
        raise BadInput(f"the Inception Score in {splits} splits needs as many pictures; here are {len(logits)}")
    logits = torch.as_tensor(logits)
    if shuffle:
        logits = logits[torch.from_numpy(np.random.RandomState(2020).permutation(len(logits)))]
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = [split_score(logits[start:end]) for start, end in zip(bounds, bounds[1:])]
    return float(np.mean(scores)), float(np.std(scores))


def inception_score_adm(logits, part=5000):
    """The Inception Score in ADM's convention: consecutive parts of 5,000 rows, unshuffled, the last may be shorter and
    counts as much; the mean of their scores. In double precision: ADM's is single, and NaN where a probability is 0."""
    return float(np.mean([split_score(rows) for rows in torch.as_tensor(logits).split(part)]))


def kernel_distance(a, b, subsets=100, subset_size=1000):
    """KID: (mean, standard deviation) of the squared maximum mean discrepancy of random subsets of features [n, D].

    Kernel (x.y / D + 1)^3, unbiased, so about 0 and as often below for sets of one distribution; subsets drawn as
    torch-fidelity does, from a then from b by RandomState(2020). Raises BadInput where a set is smaller than a subset.
    Binkowski et al., 2018 (1801.01401).
    """
    if min(len(a), len(b)) < subset_size:
        raise BadInput(f"KID draws subsets of {subset_size} features; here are {len(a)} and {len(b)}")

    def kernel(x, y):
        inner = x @ y.T / x.shape[1] + 1
        return inner * inner * inner            # NumPy's ** 3 takes ten times as long

    random, values, m = np.random.RandomState(2020), [], subset_size
    for _ in range(subsets):
        x, y = (np.asarray(s[random.choice(len(s), m, replace=False)], dtype=np.float64) for s in (a, b))
        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        others = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)          # no row with itself
        values.append(others / (m * (m - 1)) - 2 * xy.mean())
    return float(np.mean(values)), float(np.std(values))


class Cloud:
    """Features [n, D] ready for distances: float32 products pick, float64 differences decide what is too close to call.

    A float32 |x|^2 + |y|^2 - 2 xy is off by less than `unsure` (|x|^2 + |y|^2), after both moved to a centre.
    """

    def __init__(self, features, centre):
        self.rows = features
        self.moved = (features - centre).float()        # any centre near them will do
        self.norms = self.moved.square().sum(1)
        self.unsure = 4 * features.shape[1] ** 0.5 * torch.finfo(torch.float32).eps

    def blocks(self, size, start=0):
        return [slice(i, min(i + size, len(self.rows))) for i in range(start, len(self.rows), size)]

    def distances(self, rows, other, columns):
        """Squared, in float32: [rows, columns]."""
        products = torch.addmm(other.norms[columns], self.moved[rows], other.moved[columns].T, alpha=-2)
        return products.add_(self.norms[rows, None])

    def exact(self, rows, other, columns):
        """Squared, in float64 and by differences, so that equal pairs tie exactly. Row by row: [rows]."""
        return (self.rows[rows].double() - other.rows[columns].double()).square().sum(1)


def radii(features, k, block):
    """Squared distance of each row [n, D] to its k-th nearest other row: [n] float64. Duplicates are others."""
    cloud, kept = Cloud(features, features.mean(0)), k + 4
    best = torch.full((len(features), kept), torch.inf)                     # the nearest so far, by float32
    who = torch.zeros((len(features), kept), dtype=torch.int64)
    for i in cloud.blocks(block):
        for j in cloud.blocks(block, i.start):                              # each pair of blocks once, read both ways
            distances = cloud.distances(i, cloud, j)
            if i == j:
                distances.fill_diagonal_(torch.inf)
            for rows, columns, part in [(i, j, distances)] + [(j, i, distances.T)] * (i != j):
                near, at = part.topk(min(kept, part.shape[1]), largest=False)
                best[rows], order = torch.cat([best[rows], near], 1).topk(kept, largest=False)
                who[rows] = torch.cat([who[rows], at + columns.start], 1).gather(1, order)
    result = torch.empty(len(features), dtype=torch.float64)
    for i in cloud.blocks(64):                                              # in the cache
        exact = torch.stack([cloud.exact(i, cloud, who[i, c]) for c in range(kept)], 1)
        result[i] = exact.masked_fill(best[i] == torch.inf, torch.inf).kthvalue(k).values
    # Could one that was not kept be nearer? A row nearer than the result has |y|^2 <= 2 |x|^2 + 2 result.
    slack = cloud.unsure * (3 * cloud.norms + 2 * result)
    for row in ((result > best[:, -1] - slack) & (result > 0)).nonzero().flatten():         # hardly ever
        all_of_them = torch.cat([cloud.exact(row, cloud, j) for j in cloud.blocks(block)])
        result[row] = all_of_them.kthvalue(k + 1).values                    # itself is one of them
    return result


def precision_recall(real, fake, k=3, block=1024):
    """(precision, recall) of fake features [m, D] to real ones [n, D], each 0 .. 1 (Kynkaanniemi et al., 1904.06991).

    Precision: share of fake rows within a real row's ball, which reaches to the k-th nearest other real row; recall:
    the other way round. On the edge is within. Products are float32 and what they cannot tell is decided in float64:
    the result is that of float64 whatever the block. Memory: a block of distances, and the features twice. Raises
    BadInput where a set has no k others.
    """
    real, fake = (torch.as_tensor(x).cpu() for x in (real, fake))
    if min(len(real), len(fake)) <= k:
        raise BadInput(f"precision and recall with k = {k} need more than {k} pictures a set; here are {len(real)} "
                       f"and {len(fake)}")
    balls = radii(real, k, block), radii(fake, k, block)
    centre = (real.mean(0) + fake.mean(0)) / 2
    real, fake = Cloud(real, centre), Cloud(fake, centre)
    covered = torch.zeros(len(fake.rows), dtype=torch.bool), torch.zeros(len(real.rows), dtype=torch.bool)

    def cover(covered, points, rows, centres, columns, radii, distances):
        """covered [rows] |= the row lies in the ball of one of the columns."""
        gaps = distances - radii[columns].float()                           # [rows, columns]
        margin = points.unsure * (points.norms[rows] + centres.norms[columns].max())
        lowest = gaps.amin(1)
        covered[rows] |= lowest < -margin
        for row in (~covered[rows] & (lowest <= margin)).nonzero().flatten():               # hardly ever
            close = (gaps[row] <= margin[row]).nonzero().flatten() + columns.start
            covered[rows.start + row] |= (points.exact(rows.start + row, centres, close) <= radii[close]).any()

    for i in real.blocks(block):
        for j in fake.blocks(block):
            distances = real.distances(i, fake, j)
            cover(covered[0], fake, j, real, i, balls[0], distances.T)
            cover(covered[1], real, i, fake, j, balls[1], distances)
    return tuple(c.double().mean().item() for c in covered)


# ---------------------------------------------------------------------------------------------------------------------
# The Inception network that FID, sFID, IS, KID, precision and recall look through

def tf_resize(images, size=299):
    """TensorFlow 1's bilinear resize, which FID was defined with: [B, 3, H, W] -> float32 [B, 3, size, size].

    Output i reads position i * (n / size): no half pixel as in today's resizes, no antialiasing where it shrinks, and
    0 .. 255 stays so, unrounded. Positions in float32, width before height: equal to TensorFlow's to the last bit.
    """
    x = images.float()
    for _ in ("width", "height"):
        n = x.shape[-1]
        # the ratio by NumPy: a GPU would multiply by 1 / size, which is another number
        position = torch.arange(size, dtype=torch.float32, device=x.device) * float(np.float32(n) / np.float32(size))
        low = position.long()
        left, right = x[..., low], x[..., (low + 1).clamp(max=n - 1)]
        x = (left + (right - left) * (position - low)).transpose(2, 3)      # turned twice, and so upright at the end
    return x


class ConvNormReLU(nn.Module):
    def __init__(self, channels, width, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)       # as in TensorFlow, and in torchvision's

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))


class MixedBlock(nn.Module):
    """Branches side by side on the same input, joined by channel: [B, channels, H, W] -> [B, self.width, H', W'].

    branches: {name: [(width, kernel), ...]}; convolution i of a branch is called name_i, or name where it is alone. A
    list in place of the last one forks: both read the same (name_2a, name_2b). branch_pool pools first. stride: of
    each branch's last convolution.
    """

    def __init__(self, channels, pool, branches, stride=1):
        super().__init__()
        self.pool, self.paths, self.width = pool, {}, 0
        for branch, steps in branches.items():
            width, forks, self.paths[branch] = channels, [()], []
            for i, step in enumerate(steps, 1):
                inside, forks = width, step if isinstance(step, list) else [step]
                number, letters = f"_{i}" if len(steps) > 1 else "", "ab" if len(forks) > 1 else [""]
                names = [branch + number + letter for letter in letters]
                for name, (width, kernel) in zip(names, forks):
                    halve = (2, "valid") if stride == 2 and i == len(steps) else ()
                    setattr(self, name, ConvNormReLU(inside, width, kernel, *halve))
                self.paths[branch].append(names)
            self.width += width * len(forks)

    def forward(self, x):
        outputs = []
        for branch, path in self.paths.items():
            ends = [self.pool(x) if branch == "branch_pool" else x]
            for names in path:
                ends = [getattr(self, name)(ends[0]) for name in names]
            outputs += ends
        return torch.cat(outputs, 1)


# torchvision counts the padding as zeros in these average pools; the network of 2015 divides by the pixels there are.
AVERAGE = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAXIMUM = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
HALVE = functools.partial(F.max_pool2d, kernel_size=3, stride=2)


def mixed_a(pool):          # 35 x 35
    return AVERAGE, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
                     "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(pool, 1)]}


def mixed_c(inner):         # 17 x 17
    row, column = (1, 7), (7, 1)
    return AVERAGE, {"branch1x1": [(192, 1)], "branch7x7": [(inner, 1), (inner, row), (192, column)],
                     "branch7x7dbl": [(inner, 1), (inner, column), (inner, row), (inner, column), (192, row)],
                     "branch_pool": [(192, 1)]}


def mixed_e(pool):          # 8 x 8
    fork = [(384, (1, 3)), (384, (3, 1))]
    return pool, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork],
                  "branch3x3dbl": [(448, 1), (384, 3), fork], "branch_pool": [(192, 1)]}


MIXED = {
    "Mixed_5b": mixed_a(32), "Mixed_5c": mixed_a(64), "Mixed_5d": mixed_a(64),
    "Mixed_6a": (HALVE, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": []}, 2),
    "Mixed_6b": mixed_c(128), "Mixed_6c": mixed_c(160), "Mixed_6d": mixed_c(160), "Mixed_6e": mixed_c(192),
    "Mixed_7a": (HALVE, {"branch3x3": [(192, 1), (320, 3)],
                         "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)], "branch_pool": []}, 2),
    "Mixed_7b": mixed_e(AVERAGE),
    "Mixed_7c": mixed_e(MAXIMUM)}       # torchvision averages here too; the network of 2015 does not


class InceptionFID(nn.Module):
    """The Inception-v3 of 5 December 2015, whose features are what "FID" means: fixed, never trained here.

    path_or_state_dict: the public weights in PyTorch's form (pytorch-fid's and torch-fidelity's files have these
    keys; num_batches_tracked may be missing). forward: uint8 [B, 3, H, W] of any size -> (pool [B, 2048], logits
    [B, 1008]); the resize to 299 and the scaling are inside. Raises BadInput for weights that do not fit. On a CPU 20
    pictures at once are a quarter faster than 100; on CUDA torch.backends.cudnn.allow_tf32 (on by default) should be
    off. Checked on a CPU only, against numbers of torch-fidelity 0.4.0.
    Unlike torchvision's inception_v3: TensorFlow's resize, (x - 128) / 128, two kinds of pooling (see MIXED), 1008
    outputs without their bias, no auxiliary head.
    """

    def __init__(self, path_or_state_dict):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, 2, "valid")             # [B, 32, 149, 149]
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3, 1, "valid")            # [B, 32, 147, 147]
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3)                        # [B, 64, 147, 147], then pooled to 73
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)                        # [B, 80, 73, 73]
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3, 1, "valid")           # [B, 192, 71, 71], then pooled to 35
        width = 192
        for name, (pool, branches, *stride) in MIXED.items():
            setattr(self, name, MixedBlock(width, pool, branches, *stride))
            width = getattr(self, name).width                               # 256, 288, 288, 768 x 5, 1280, 2048, 2048
        self.fc = nn.Linear(2048, 1008)
        weights = read_weights(path_or_state_dict)
        # Nothing reads these counters. Files have them or not, and the same weights should have the same fingerprint.
        weights.update({k: v for k, v in self.state_dict().items() if k.endswith("num_batches_tracked")})
        given = path_or_state_dict if isinstance(path_or_state_dict, (str, Path)) else "Inception weights"
        trainer.load_weights(self, weights, given)
        self.fingerprint = trainer.fingerprint(self)                        # for the protocol that is printed
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def features(self, images):
        """{"pool": [B, 2048], "logits": [B, 1008], "spatial": [B, 2023]} of uint8 [B, 3, H, W], in one pass.

        spatial: what ADM's sFID reads, 7 channels of TensorFlow's mixed_6/conv at 17 x 17 places, channel last as in
        ADM's statistics files. By its name that is Mixed_6d.branch1x1. Here it is after the ReLU; whether ADM's tensor
        is before or after was not checked.
        """
        x = (tf_resize(images) - 128) / 128                                 # [B, 3, 299, 299] in -1 .. 0.992
        x = x.to(self.fc.weight.dtype, memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(HALVE(x)))
        x = HALVE(x)                                                        # [B, 192, 35, 35]
        for name in MIXED:
            x = getattr(self, name)(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)           # branch1x1 comes first in the block
        pool = x.mean((2, 3))                                               # of [B, 2048, 8, 8]
        logits = F.linear(pool, self.fc.weight)                             # the Inception Score is without the bias
        return {"pool": pool, "logits": logits, "spatial": spatial}

    def forward(self, images):
        features = self.features(images)
        return features["pool"], features["logits"]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures as bytes, and the .npz files that they are passed around in

def to_uint8(images, rounding="round"):
    """Float [B, 3, H, W] in [0, 1] -> uint8, as every FID is computed on bytes; values outside are clamped.

    rounding: "round", as pictures are saved, or "truncate", as TiTok's evaluator does (1d-tokenizer, both for real and
    for reconstructed pictures); truncated pictures are half a grey level darker. Raises BadInput for NaN.
    """
    if not torch.isfinite(images).all():
        raise BadInput("pictures with NaN or infinite values cannot be scored")
    scaled = images.float().clamp(0, 1) * 255       # float32: 0.5 in half precision is not 127.5
    return {"round": torch.round, "truncate": torch.trunc}[rounding](scaled).to(torch.uint8)


def npz_names(path):
    """Names of the arrays in an .npz: arr_0 is a batch of pictures, mu and sigma are statistics; ADM's reference files
    hold both. Raises BadInput."""
    try:
        with trainer.open_file(path) as file, zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception as error:      # zipfile raises many kinds
        raise BadInput(f"{path}: not an .npz archive, or cut short ({trainer.first_line(error)})") from error


@contextlib.contextmanager
def open_npz(path, name):
    """One array of an .npz, without loading or unpickling anything: (read, shape, dtype), where read(shape) gives the
    next values. NumPy's own reader loads arrays whole, and 50,000 pictures of 256 x 256 are 9.8 GB. The header may say
    anything: look at shape and dtype before asking for values. Raises BadInput."""
    if name not in npz_names(path):
        raise BadInput(f"{path}: holds no array {name}, only {', '.join(sorted(npz_names(path))) or 'nothing'}")
    try:
        with (trainer.open_file(path) as file, zipfile.ZipFile(file) as archive,
              archive.open(f"{name}.npy") as stream):
            if np.lib.format.read_magic(stream) != (1, 0):      # 2.0 is for headers of more than 64 kB
                raise ValueError("not an array of numbers")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
            left = math.prod(shape)
            if dtype.hasobject:
                raise BadInput(f"{path}: {name} holds pickled Python objects, which could run any code and are not "
                               f"read. Save a plain array")
            if fortran_order and len(shape) > 2:            # of a symmetric matrix the order does not matter
                raise BadInput(f"{path}: {name} is stored last axis first. Save np.ascontiguousarray of it")

            def read(shape):
                nonlocal left
                left -= math.prod(shape)
                values = np.frombuffer(stream.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
                if not left and stream.read(1):     # the archive's checksum is compared at the end, so go there
                    raise ValueError("longer than its header says")
                if dtype.kind == "f" and not np.isfinite(values).all():
                    raise BadInput(f"{path}: {name} holds NaN or infinite values")
                return values

            yield read, shape, dtype
    except BadInput:
        raise
    except Exception as error:      # damage shows as anything: a checksum, a header that is no Python, a size
        raise BadInput(f"{path}: {name} is damaged or cut short") from error


def read_statistics(path, names=("mu", "sigma")):
    """(mean [D], covariance [D, D]) in float64 from a statistics file, ADM's or pytorch-fid's. For ADM's sFID the names
    are mu_s, sigma_s. Raises BadInput."""
    values = []
    for name in names:
        with open_npz(path, name) as (read, shape, dtype):
            rank = 1 + len(values)                          # [D], then [D, D] with the same D
            if (dtype.kind != "f" or len(shape) != rank or len({*shape, *map(len, values)}) != 1
                    or not 0 < shape[0] <= LARGEST_D):
                raise BadInput(f"{path}: {name} is {dtype} {list(shape)[:8]}; statistics are floats, [D] and [D, D], D "
                               f"up to {LARGEST_D}")
            values.append(read(shape).astype(np.float64))
    return tuple(values)


def read_images(path, rounding="round"):
    """The pictures of an .npz in ADM's format, arr_0 [n, H, W, 3]: yields uint8 [BATCH, 3, H, W], the last one shorter,
    all shorter where a batch would be more than 200 MB.

    Floats in [0, 1] become bytes by to_uint8(..., rounding). One batch is in memory at a time. Raises BadInput at once
    for what the header shows, and while reading for values outside [0, 1], NaN and damage.
    """
    with open_npz(path, "arr_0") as (_, shape, dtype):
        if len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or shape[1] * shape[2] > LARGEST_PICTURE:
            raise BadInput(f"{path}: arr_0 is {list(shape)[:8]}; a batch of pictures is [n, H, W, 3], of at most "
                           f"{LARGEST_PICTURE:,} pixels each")
        if dtype != np.uint8 and dtype.kind != "f":
            raise BadInput(f"{path}: arr_0 is {dtype}; pictures are uint8, or floats in [0, 1]")
        if shape[0] == 1:
            raise BadInput(f"{path}: holds one picture only; a distribution needs more")

    def batches():
        with open_npz(path, "arr_0") as (read, _, _):
            count = min(BATCH, max(1, 200_000_000 // (math.prod(shape[1:]) * dtype.itemsize)))
            for start in range(0, shape[0], count):
                values = read((min(count, shape[0] - start), *shape[1:])).transpose(0, 3, 1, 2)     # [B, 3, H, W]
                if dtype == np.uint8:
                    yield torch.from_numpy(values.copy())
                    continue
                if values.min() < 0 or values.max() > 1:
                    raise BadInput(f"{path}: floats from {values.min():.3g} to {values.max():.3g}; pictures are uint8, "
                                   f"or floats in [0, 1]")
                yield to_uint8(torch.from_numpy(values.astype(np.float32)), rounding)

    return batches()


def write_adm_npz(path, batches, count):
    """Write pictures as ADM's evaluator reads them: arr_0 uint8 [count, H, W, 3], uncompressed, as np.savez does.

    batches: yields uint8 [B, 3, H, W], one in memory at a time. count stands at the start of the file, so it must be
    known before: ValueError where another number comes. The file appears whole or not at all. Raises BadInput.
    """
    def write(temporary):
        shape, written = None, 0
        with zipfile.ZipFile(temporary, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for images in batches:
                rows = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()                # [B, H, W, 3]
                shape = shape or rows.shape[1:]
                if rows.dtype != np.uint8 or rows.shape[1:] != shape:
                    raise ValueError(f"pictures of {rows.dtype} {rows.shape[1:]} among uint8 {shape}")
                if not written:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(rows)
                written += len(rows)
        if written != count:
            raise ValueError(f"{written} pictures came, {count} were announced")

    trainer.write_atomically(path, write)


# ---------------------------------------------------------------------------------------------------------------------
# FID, sFID, IS, KID, precision and recall of pictures: python evaluate.py fid | rfid | gfid

SHARD = 1_000           # pictures whose features are one file
LOOK = 20               # pictures that Inception sees at once on a CPU: a quarter faster than 100


@dataclass
class Pictures:
    """A set of pictures to be scored, however they come about."""
    name: str                               # in words, for the protocol
    count: int
    key: str                                # changes when the pictures do
    read: Callable                          # read(start, stop) yields uint8 [B, 3, H, W] of those pictures, in order
    files: frozenset = frozenset()          # paths, to see whether two sets share some
    notes: tuple[str, ...] = ()             # what else a score should be read with
    moments: dict = field(default_factory=dict)     # statistics that came ready-made: {"pool": (mu, sigma), ...}


def folder_pictures(path, size=None):
    """All images in a folder and in those inside it, at their own size, which must be one; with `size`: the middle
    square, resized. Raises BadInput, also for a file that cannot be read: a score must not leave one out."""
    listed = data.list_images(Path(path))[1]
    files = [Path(path) / file for _, file, *_ in listed]
    if len(files) < 2:
        raise BadInput(f"{path}: {len(files)} images; a distribution needs more. Endings that count: "
                       f"{' '.join(data.ENDINGS)}")
    shape = None

    def read(start, stop):
        nonlocal shape
        for i in range(start, stop, LOOK):
            batch = []
            for file in files[i:min(i + LOOK, stop)]:
                try:
                    image = data.decode(file, size or 0)
                except Exception as error:      # noqa: BLE001  Pillow raises a dozen kinds for broken files
                    raise BadInput(f"{file}: cannot be read ({data.first_line(error)}). Mend or remove it") from error
                batch.append(torch.from_numpy(data.square(image, size, None) if size
                                              else np.asarray(image).transpose(2, 0, 1).copy()))     # [3, H, W]
                shape = shape or batch[-1].shape
                if batch[-1].shape != shape:
                    raise BadInput(f"{file}: {image.size[0]}x{image.size[1]} pixels, another size than the first. Crop "
                                   f"and resize all with --size N")
            yield torch.stack(batch)                                        # [B, 3, H, W]

    jpegs = sum(file.suffix.lower() in (".jpg", ".jpeg") for file in files)
    resized = f", middle square resized to {size} (bicubic)" if size else ""
    return Pictures(f"{len(files):,} images of {path}{resized}", len(files), data.hash_of("folder", size, listed), read,
                    frozenset(Path(os.path.realpath(f)) for f in files),        # resolve() raises where links go round
                    (f"{jpegs:,} of {path} are JPEGs, whose compression is scored with them",) if jpegs else ())


def npz_pictures(path):
    """An .npz of ADM's kind: pictures (arr_0), statistics (mu, sigma), or both, as ADM's reference files have it."""
    names, moments = npz_names(path), {}
    if {"mu", "sigma"} <= names:
        moments["pool"] = read_statistics(path)
    if {"mu_s", "sigma_s"} <= names:
        moments["spatial"] = read_statistics(path, ("mu_s", "sigma_s"))
    if not moments and "arr_0" not in names:
        raise BadInput(f"{path}: holds neither arr_0 (pictures) nor mu and sigma, only {', '.join(sorted(names))}")
    stat, count = Path(path).stat(), 0
    if "arr_0" in names:
        with open_npz(path, "arr_0") as (_, shape, _):
            count = shape[0]
        read_images(path)               # refuses at once what its header shows

    def read(start, stop):
        done = 0
        for batch in read_images(path):                                     # [B, 3, H, W]
            part = batch[max(0, start - done):max(0, stop - done)]
            done += len(batch)
            yield from part.split(LOOK) if len(part) else ()
            if done >= stop:
                return

    return Pictures(f"{count:,} pictures of {path}" if count else f"the statistics in {path}", count,
                    data.hash_of("npz", str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns), read,
                    frozenset([Path(path).resolve()]),
                    (f"its statistics are those stored in {path}; precision and recall use its pictures",)
                    if moments and count else (), moments)


def open_pictures(path, size=None):
    if Path(path).is_dir():
        return folder_pictures(path, size)
    if Path(path).suffix == ".npz" and Path(path).is_file():
        return npz_pictures(path)
    raise BadInput(f"{path}: neither a folder of images nor an .npz file. Check the name")


def dataset_pictures(dataset, limit, rounding, repaint=None, **how):
    """Images of a data set as a tokenizer sees them (all, or the `subset` of `limit`); with repaint, a tokenizer, its
    reconstructions of them. how: for its decode_codes."""
    indices = subset(dataset, limit)

    def read(start, stop):
        rows = np.split(indices[start:stop], range(LOOK, stop - start, LOOK))
        for images, _ in data.read(dataset, [(part, part) for part in rows], None, 0):      # [B, 3, H, W]
            if repaint is not None:
                with torch.inference_mode():
                    codes = repaint.encode(images.to(next(repaint.parameters()).device))
                    images = repaint.decode_codes(codes, **how).cpu()
            yield to_uint8(images, rounding)

    side, key = dataset.image_size, data.hash_of(dataset.fingerprint, len(indices), rounding)
    name = f"{len(indices):,} images of {dataset.name} {dataset.split}, {side}x{side}"
    if repaint is not None:
        name, key = f"reconstructions of {name}", data.hash_of(key, trainer.fingerprint(repaint), *how.items())
    return Pictures(name, len(indices), key, read)


def samples(generator, tokenizer, count, seed, rounding, device):
    """Pictures drawn from a generator, classes in turn. Picture i depends on the seed and on its shard alone, so that a
    cut-short run goes on, on any number of ranks."""
    classes = generator.config.num_classes

    def read(start, stop):
        for first in range(start - start % SHARD, stop, SHARD):
            labels = torch.arange(first, min(first + SHARD, count)) % classes
            codes = sample_codes(generator, labels, seed * 10 ** 9 + first, BATCH // 2)         # [n, L]
            for part in codes[max(0, start - first):stop - first].split(LOOK):
                with torch.inference_mode():
                    yield to_uint8(tokenizer.decode_codes(part.to(device)).cpu(), rounding)

    c = generator.config
    how = f"guidance {c.guidance_scale:g}, temperature {c.temperature:g}" + (
        f", {c.guidance}, {c.sampling_steps} steps" if c.mode == "maskgit" else f", top_k {c.top_k}")
    key = data.hash_of(*map(trainer.fingerprint, (generator, tokenizer)), how, seed, count, rounding)
    return Pictures(f"{count:,} samples, {classes} classes in turn, seed {seed}, {how}", count, key, read)


def features_of(pictures, inception, folder, device):
    """{"pool": [n, 2048], "logits": [n, 1008], "spatial": [n, 2023]} of all pictures, 20 kB each. A shard is a file in
    `folder`; those that are there are not computed again, and under torchrun the ranks share them out."""
    folder = Path(folder) / f"{pictures.key}-{inception.fingerprint}"
    shards = [(folder / f"{start:07}.npz", start, min(start + SHARD, pictures.count))
              for start in range(0, pictures.count, SHARD)]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    todo = [shard for shard in shards[rank::world] if not is_shard(*shard)]
    with bar(total=sum(stop - start for _, start, stop in todo), desc=f"features of {pictures.name}"[:60]) as progress:
        for path, start, stop in todo:
            found = []
            for images in pictures.read(start, stop):
                # TF32, on by default, is 10 bits of mantissa
                with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
                    found.append({k: v.float().cpu().numpy() for k, v in inception.features(images.to(device)).items()})
                progress.update(len(images))
            arrays = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
            trainer.write_atomically(path, lambda temporary: save_npz(temporary, arrays))
    trainer.gather(None, world)         # all shards are there
    loaded = {"pool": [], "logits": [], "spatial": []}
    for path, start, stop in shards:
        for name, values in read_shard(path, start, stop).items():
            loaded[name].append(values)
    return {name: np.concatenate(parts) for name, parts in loaded.items()}


def save_npz(path, arrays):
    with open(path, "wb") as file:      # given a name, np.savez would add .npz to it
        np.savez(file, **arrays)


def read_shard(path, start, stop):
    """The features of pictures start .. stop. Raises BadInput where that is not what the file holds."""
    found = {}
    for name, width in (("pool", 2048), ("logits", 1008), ("spatial", 2023)):
        with open_npz(path, name) as (read, shape, dtype):
            if shape != (stop - start, width) or dtype != np.float32:
                raise BadInput(f"{path}: {name} is {dtype} {list(shape)[:8]}. Remove it and run again")
            found[name] = read(shape)
    return found


def is_shard(path, start, stop):
    try:
        return bool(read_shard(path, start, stop))
    except BadInput:
        return False


def frechet_scores(real, fake, inception, out, device):
    """({"FID", "sFID"}, as far as statistics can be had; {"real": features, "fake": features}) of two Pictures."""
    sets = {"real": real, "fake": fake}
    found = {name: features_of(s, inception, out / "features", device) if s.count else {} for name, s in sets.items()}

    def moments(name, kind):
        if kind in sets[name].moments:
            return sets[name].moments[kind]
        return feature_statistics(found[name][kind]) if found[name] and not sets[name].moments else None

    scores = {}
    for score, kind in (("FID", "pool"), ("sFID", "spatial")):
        both = moments("real", kind), moments("fake", kind)
        if None not in both:
            scores[score] = frechet_distance_fast(*both[0], *both[1])
    return scores, found


def compare_pictures(real, fake, inception, out, device):
    """{score: value} of the pictures `fake` against the reference `real`, and the protocol they were computed under,
    lines that are printed with them."""
    sets = {"real": real, "fake": fake}
    scores, found = frechet_scores(real, fake, inception, out, device)
    if found["fake"]:
        logits = found["fake"]["logits"]
        scores["IS (ADM: parts of 5,000)"] = inception_score_adm(logits)
        if len(logits) >= 10:
            mean, deviation = inception_score(logits)
            scores |= {"IS (torch-fidelity: 10 shuffled splits)": mean, "  its deviation": deviation}
    if found["real"] and found["fake"]:
        a, b = (torch.from_numpy(found[name]["pool"]) for name in ("real", "fake"))
        if min(len(a), len(b)) > 3:
            scores["precision"], scores["recall"] = precision_recall(a, b)
        size = min(1000, len(a), len(b))
        mean, deviation = kernel_distance(a.numpy(), b.numpy(), subset_size=size)
        scores |= {f"KID x 1000 (100 subsets of {size:,})": 1000 * mean, "  its deviation x 1000": 1000 * deviation}
    protocol = [f"reference: {real.name}", f"scored: {fake.name}",
                f"network: Inception of 2015, weights {inception.fingerprint}, TensorFlow's resize to 299, float32; "
                f"distances in float64", *(f"note: {note}" for note in real.notes + fake.notes)]
    for s in sets.values():
        if 0 < s.count < 2048:
            protocol.append(f"warning: {s.name}: fewer than the 2,048 features, so its covariance is singular and the "
                            f"FID too high. Compare only with scores of as many pictures")
    if shared := real.files & fake.files:
        protocol.append(f"warning: {len(shared):,} files are in both sets, such as {min(shared)}")
    sizes = {name: next(iter(s.read(0, 1))).shape[-2:] for name, s in sets.items() if s.count}
    if len(set(sizes.values())) > 1:
        protocol.append(f"warning: sizes differ: {' and '.join(f'{h}x{w}' for h, w in sizes.values())}. FID sees it")
    return scores, protocol


def open_inception(args):
    path = args.inception or Path("weights/pt_inception-2015-12-05-6726825d.pth")
    if not path.is_file():
        raise BadInput(f"{path}: not found. FID needs the Inception weights that everyone uses, as "
                       f"pytorch-fid (pt_inception-2015-12-05-6726825d.pth) or torch-fidelity publish them: name it "
                       f"with --inception FILE")
    return InceptionFID(path).to(args.device)


def fid(args):
    """The sub-commands fid, rfid and gfid."""
    wanted = {"fid": 2, "rfid": 1, "gfid": 1}[args.what]
    if len(args.paths) != wanted:
        raise BadInput(f"{args.what}: {len(args.paths)} paths given, {wanted} wanted. See python evaluate.py -h")
    inception = open_inception(args)        # what is missing is said before anything is computed
    more, count = {}, args.samples or 50_000
    if args.what == "fid":
        real, fake = (open_pictures(path, args.size) for path in args.paths)
    elif args.what == "rfid":
        tokenizer = open_tokenizer(args.paths[0], args.device)
        dataset = data.open_dataset(args.data, "val", tokenizer.config.image_size)
        real = dataset_pictures(dataset, args.images, args.rounding)
        fake = dataset_pictures(dataset, args.images, args.rounding, repaint=tokenizer)
    else:
        generator = load_generator(args.paths[0], args.device)
        # the file it was trained on, which stands beside it unless it was moved
        beside = Path(args.paths[0]).with_name(Path(generator.about["tokenizer"]).name)
        tokenizer = open_tokenizer(args.tokenizer or beside, args.device)
        if generator.about["fingerprint"] != codes_fingerprint(tokenizer):
            raise BadInput(f"{args.paths[0]}: trained on other codes than those of this tokenizer. Name the right one "
                           f"with --tokenizer FILE")
        fake = samples(generator, tokenizer, count, args.seed, args.rounding, args.device)
        real = (open_pictures(args.reference, args.size) if args.reference else dataset_pictures(
            data.open_dataset(args.data, "train", tokenizer.config.image_size), args.images, args.rounding))
    if args.what != "fid":
        more["rounding to bytes"] = args.rounding
    scores, protocol = compare_pictures(real, fake, inception, args.out, args.device)
    protocol += [f"{name}: {value}" for name, value in more.items()]
    if int(os.environ.get("RANK", 0)) == 0:
        lines = [f"{name:<42} {value:.4f}" for name, value in scores.items()] + protocol
        print("\n".join(map(trainer.printable, lines)))        # they have names of folders and files in them
        if args.json:
            text = json.dumps({"scores": scores, "protocol": protocol}, indent=1) + "\n"
            trainer.write_atomically(args.json, lambda temporary: temporary.write_text(text))
        if args.save:
            write_adm_npz(args.save, fake.read(0, fake.count), fake.count)
            print(f"{args.save}: {fake.name}, in ADM's format")


# ---------------------------------------------------------------------------------------------------------------------
# The images that are scored

def subset(dataset, limit):
    """`limit` indices of a set (or all), drawn with a fixed seed and sorted: the first ones might be of one class."""
    return np.sort(np.random.default_rng(0).permutation(len(dataset))[:limit])


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
        checkpoint = trainer.load_checkpoint(path, "fd_classifier", make=f"rm {path}; python evaluate.py scores")
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
            *(stamp(Path(__file__).with_name(f"{name}.py"))
              for name in ("data", "trainer", "vqgan", "tokenizer", "hnt", "generator", "evaluate"))]


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
# Speed: python evaluate.py speed

# Operators whose result the CPU needs before it can go on: on a GPU it would wait for all that was asked of it before.
# (item and a tensor in an `if` both end in the first of these.)
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::equal", "aten::masked_select",
           "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave"}


def speed(device, batch):
    """Print the ratios of the fast forms to what they are compared with, then seconds a step of each configuration."""
    batch = batch or (64 if device.type == "cuda" else 2)
    print(f"{machine(device)}, torch {torch.__version__}, batch {batch}. Medians of forms that took turns; the paper's "
          f"ratios were measured on an A800\n{'first / second':<54} {'first, s':>10} {'second, s':>10} {'ratio':>7} "
          f"{'paper':>7}")
    for part in (speed_mocet, speed_encoding, speed_hnt, speed_sampling, speed_steps):
        try:
            part(device, batch)
        except torch.OutOfMemoryError:
            print(f"{part.__name__}: does not fit. Try a smaller --batch_size")


def compare(what, first, second, device, rounds=5, paper=""):
    """first, second: (name, function). Prints medians, and how many times as fast the second is as the first."""
    seconds = trainer.take_turns(dict((first, second)), rounds, device)
    a, b = seconds[first[0]], seconds[second[0]]
    names = f"{what}: {first[0]} / {second[0]}"
    print(f"{names:<54} {a:>10.4f} {b:>10.4f} {a / b:>6.2f}x {paper:>7}", flush=True)


def speed_mocet(device, batch):
    for size, count in (("toy", 16), ("full", batch)):
        c = PRESETS[size]
        mocet = MoCET(c.tokens, c.expert_width, c.expert_heads, c.expert_layers).to(device)
        x_latent = torch.randn(count, c.patches, c.expert_width, device=device, requires_grad=True)     # [B, P, d]

        def step(form):
            mocet.zero_grad()
            form(x_latent).square().mean().backward()

        compare(f"MoCET {size}, batch {count}", ("plain", lambda: step(mocet.forward_plain)),
                ("fast", lambda: step(mocet.forward)), device)

        def recomputed():
            mocet.recompute = True
            step(mocet.forward)
            mocet.recompute = False

        compare(f"MoCET {size}, batch {count}", ("fast", lambda: step(mocet.forward)), ("--recompute", recomputed),
                device)


@torch.inference_mode()
def speed_encoding(device, batch):
    """Table 3c: images -> codes."""
    models = {name: build(PRESETS[name]).to(device).eval() for name in ("titok_l_32", "nativetok_32")}
    images = torch.rand(batch, 3, 256, 256, device=device)
    compare("encoding", *((name, functools.partial(model.encode, images)) for name, model in models.items()), device,
            paper="0.88x")


def hnt_steps(name, device, batch):
    """(full, frozen): steps of a NativeTok, forward, backward and AdamW, with all and with the second half training."""
    step_full = training_step(name, device, batch)
    model, optimizer = step_full.keywords["model"], step_full.keywords["optimizer"]
    trains = [p for p in model.parameters() if p.requires_grad]

    def full():
        for p in trains:
            p.requires_grad_(True)
        step_full()

    def frozen():
        freeze_reused(model, len(model.mocet.experts) // 2)     # AdamW leaves out what has no gradient
        step_full()

    return ("full", full), ("frozen", frozen)


def speed_hnt(device, batch):
    """Table 3b."""
    compare("HNT-64, a step", *hnt_steps("nativetok_64", device, batch), device, rounds=3, paper="1.33x")


@torch.inference_mode()
def speed_sampling(device, batch):
    """Drawing codes: with the cache against computing all anew, and guidance as one batch against two passes."""
    labels = torch.arange(batch, device=device)
    ar = GENERATORS["ar"](GENERATOR_PRESETS["ar_full"]).to(device).eval()
    compare("AR, 32 codes", ("recomputed", lambda: ar.generate_plain(labels)), ("cached", lambda: ar.generate(labels)),
            device)
    maskgit = GENERATORS["maskgit"](GENERATOR_PRESETS["maskgit_full"]).to(device).eval()
    codes = torch.zeros(batch, maskgit.config.tokens, dtype=torch.int64, device=device)                 # [B, L]
    drop = torch.ones(batch, dtype=torch.bool, device=device)
    compare("MaskGIT, guidance", ("two passes", lambda: (maskgit(codes, labels), maskgit(codes, labels, drop))),
            ("one", lambda: maskgit.guided_logits(codes, labels, 2.0)), device)


def training_step(name, device, batch, recompute=False):
    """A function that makes one optimizer step of a configuration on random data, as its script does but for EMA,
    logging and DDP: stage 1 of a tokenizer with random weights (its teacher's too), or a generator."""
    c = PRESETS[name] if name in PRESETS else GENERATOR_PRESETS[name]
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
    if name in PRESETS:
        model = build(c).to(device)
        teacher = VQGAN(c.vqgan).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        images, stage = torch.rand(batch, 3, c.image_size, c.image_size, device=device), Stage1(model)
        if hasattr(model, "mocet"):
            model.mocet.recompute = recompute

        def loss():
            targets = teacher.encode(images).flatten(1)                     # [B, G*G]
            with autocast():
                loss, _, latents, codes = stage(images, targets)
            model.quantizer.track_usage(latents, codes)
            return loss
    else:
        model = GENERATORS[c.mode](c).to(device)
        codes = torch.randint(c.codebook_size, (batch, c.tokens), device=device)                        # [B, L]
        labels = torch.randint(c.num_classes, (batch,), device=device)

        def loss():
            with autocast():
                return LOSSES[c.mode](model, c, codes, labels)[0]

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    return functools.partial(one_step, loss=loss, model=model, optimizer=optimizer)


def one_step(loss, model, optimizer, update=True):
    optimizer.zero_grad()
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if update:
        optimizer.step()


def operators(step, device):
    """{operator: calls} of a step. On a CPU without AdamW's part: there, unlike on a GPU, it reads its step counts one
    by one, which would count as waiting."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(update=device.type == "cuda")
    return {event.key: event.count for event in profile.key_averages() if event.key.startswith("aten::")}


def speed_steps(device, batch):
    """A step of each full configuration: samples/s, on a GPU with peak memory and the share of its bf16 peak (what a
    large matrix product reaches), and how many operators it calls, of which how many make the CPU wait."""
    cuda = device.type == "cuda"
    peak = matmul_peak(device) if cuda else None
    print(f"\n{'a training step':<34} {'batch':>5} {'seconds':>8} {'samples/s':>10} {'GiB':>6} {'of peak':>8} "
          f"{'operators':>10} {'waiting':>8}" + (f"   peak: {peak / 1e12:.0f} TFLOP/s in bf16" if cuda else ""))
    rows = [(name, batch, recompute) for name in ("nativetok_32", "nativetok_64", "nativetok_128", "titok_l_32")
            for recompute in ((False, True) if cuda and name == "nativetok_128" else (False,))]
    rows += [("ar_full", batch, False), ("maskgit_full", batch * 8 if cuda else batch, False)]
    for name, size, recompute in rows:
        label, step = name + (" --recompute" if recompute else ""), None    # None: lets go of the one before
        try:
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            step = training_step(name, device, size, recompute)
            seconds = trainer.take_turns({name: step}, 10 if cuda else 1, device)[name]
            used = torch.cuda.max_memory_allocated(device) / 2 ** 30 if cuda else None
            calls = operators(step, device)
        except torch.OutOfMemoryError:
            print(f"{label:<34} {size:>5} does not fit")
            continue
        waiting = sum(count for key, count in calls.items() if key in WAITING)
        share = f"{6 * work_of(name) * size / seconds / peak:.0%}" if cuda and not recompute else ""
        print(f"{label:<34} {size:>5} {seconds:>8.3f} {size / seconds:>10.2f} "
              f"{f'{used:.1f}' if cuda else '':>6} {share:>8} {sum(calls.values()):>10} {waiting:>8}", flush=True)


def work_of(name):
    """Multiply-adds of a forward pass of what trains, for one image: forward and backward are 6 FLOP for each."""
    if name in PRESETS:
        return sum(count for part, count in tokenizer_macs(PRESETS[name]).items() if part != "pixel decoder")
    return generator_macs(GENERATOR_PRESETS[name])


def matmul_peak(device, size=8192):
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size ** 3 / trainer.take_turns({"product": lambda: a @ a}, 20, device)["product"]


# ---------------------------------------------------------------------------------------------------------------------
# Memory: python evaluate.py memory

def memory(batch):
    """Print an estimate of what stages 1 and 2 need on one GPU, by part, without a GPU and without the memory: the
    models run on pretended tensors, and what autograd keeps for the backward pass is added up. Left out: CUDA's own
    half GiB, workspaces, temporary gradients, fragmentation. Expect some GiB more."""
    for stage, names, measure in ((1, ("nativetok_32", "nativetok_64", "nativetok_128", "titok_l_32"), memory_of),
                                  (2, ("nativetok_32", "nativetok_64", "nativetok_128"), memory_of_stage2)):
        at_once = batch // TRAINING["full", stage].accumulate
        tables = {name: measure(name, at_once) for name in names}
        print(f"GiB on each GPU in stage {stage}, {batch} images a GPU, {at_once} at once, bf16 autocast; an estimate\n"
              f"{'':<44}" + "".join(f"{name:>15}" for name in names))
        for row in tables["nativetok_32"]:
            values = [tables[name].get(row) for name in names]
            print(f"{row:<44}" + "".join(f"{'' if v is None else f'{v / 2 ** 30:.1f}':>15}" for v in values))


def memory_of(name, batch):
    """{part: bytes}"""
    c = PRESETS[name]
    with FakeTensorMode():
        with trainer.Unfilled():
            model = build(c)
        images = torch.empty(batch, 3, c.image_size, c.image_size)
        targets = torch.zeros(batch, c.grid ** 2, dtype=torch.int64)
        parts = {}
        if c.model == "nativetok":
            x_latent, parts["kept for backward: MIT"] = kept(lambda: model.mit(images), model)
            z, parts["kept for backward: experts"] = kept(lambda: model.mocet(x_latent), model)
            longest = torch.empty(batch, c.patches + c.tokens, c.expert_width, requires_grad=True)
            one = kept(lambda: model.mocet.experts[-1](longest), model)[1]
            inputs = sum(4 * batch * (c.patches + i + 1) * c.expert_width for i in range(c.tokens))     # float32
            parts["kept for backward: encoder"] = None
            less = parts["kept for backward: experts"] - inputs - one
            z = model.to_code(z)                                            # [B, L, c]
        else:
            z, encoder = kept(lambda: model.latents(images), model)
            parts = {"kept for backward: MIT": None, "kept for backward: experts": None,
                     "kept for backward: encoder": encoder}
            less = None

        def rest():
            z_q, quantizer_loss, _ = model.quantizer(z)
            return F.cross_entropy(model.decoder(z_q).float().flatten(0, 1), targets.flatten()) + quantizer_loss

        parts["kept for backward: decoder, loss"] = kept(rest, model)[1]
    numbers, all_numbers = (sum(p.numel() for p in model.parameters() if p.requires_grad or every)
                            for every in (False, True))
    teacher = trainer.count([trainer.on_meta(lambda: VQGAN(c.vqgan))])
    fixed = {"weights, with the teacher's": 4 * (all_numbers + teacher), "averaged weights (EMA)": 4 * all_numbers,
             "gradients": 4 * numbers, "AdamW's two averages": 8 * numbers}
    total = sum(fixed.values()) + sum(v for v in parts.values() if v)
    return {**fixed, **parts, "all": total, "all with --recompute": None if less is None else total - less}


def memory_of_stage2(name, batch):
    """{part: bytes}, with ConvNeXt-S and the discriminator, at the painters' backward pass, which keeps most."""
    c = PRESETS[name]
    with FakeTensorMode():
        with trainer.Unfilled():
            model, perceptual, judge = build(c), ConvNeXtSmall(None), Discriminator()
        model.pixel_decoder.requires_grad_(True)
        images = torch.empty(batch, 3, c.image_size, c.image_size)
        logits, decoder = kept(lambda: model.decoder(torch.empty(batch, c.tokens, c.code_dim)), model)
        painted, pixels = kept(lambda: model.paint(logits), model)
        judges = [kept(lambda: perceptual.perceptual_loss(painted, images), perceptual)[1],
                  kept(lambda: judge.requires_grad_(False)(painted), judge)[1]]
    painters = trainer.count([model.decoder, model.pixel_decoder])
    parts = {"weights, ConvNeXt's and the discriminator's": 4 * trainer.count([model, perceptual, judge]),
             "averaged weights (EMA)": 4 * trainer.count([model]),
             "gradients": 4 * (painters + trainer.count([judge])),
             "AdamW's two averages": 8 * (painters + trainer.count([judge])),
             "kept for backward: token decoder": decoder, "kept for backward: pixel decoder": pixels,
             "kept for backward: ConvNeXt": judges[0],
             "kept for backward: discriminator": judges[1]}
    return {**parts, "all": sum(parts.values())}


class InFloat32(TorchFunctionMode):
    """What CUDA's autocast takes back to float32 and the CPU's does not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.group_norm, F.layer_norm, F.softmax, torch.Tensor.softmax, F.mse_loss):
            args = [a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        return function(*args, **(kwargs or {}))


def kept(forward, model):
    """(what forward() returns, bytes that autograd keeps of it for the backward pass), under bf16 autocast as CUDA has
    it. Parameters are left out, their bfloat16 copies are not."""
    own, storages = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()          # views of one storage count once
        if storage._cdata not in own:
            storages[storage._cdata] = storage      # held, or its number would be given to another
        return tensor

    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16),
          InFloat32()):
        result = forward()
    return result, sum(storage.nbytes() for storage in storages.values())


# ---------------------------------------------------------------------------------------------------------------------
# The paper's tables and figures: make paper, or make table1, table3a ...

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
        return (f"FD-classifier: evaluate.py's own small network, not FID. r: reconstructions of "
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
    parser = trainer.ArgumentParser(__doc__)
    parser.add_argument("what", choices=("report", "scores", "fid", "rfid", "gfid", "speed", "memory", "paper",
                                             *TABLES), metavar="what", help="report, scores, fid, rfid, gfid, speed, "
                        "memory; paper, or one of its tables and figures: " + ", ".join(TABLES))
    parser.add_argument("paths", nargs="*", help="fid: the reference and what is scored, folders or .npz; rfid: a "
                        "tokenizer or VQGAN; gfid: a generator")
    parser.add_argument("--config", choices=("toy", "full"), help="default: full where CUDA is present, else toy")
    parser.add_argument("--data", help="as in training: shapes, fashion, auto or a folder")
    parser.add_argument("--out", help="folder of the results, default out/<config>")
    parser.add_argument("--model", choices=MODELS, default="nativetok", help="the tokenizer's kind")
    parser.add_argument("--tokens", type=int, help="its length, default 16 (toy) or 32 (full)")
    parser.add_argument("--images", type=int, help="images of the data to score on, default 10,000; rfid, gfid: all")
    parser.add_argument("--samples", type=int, help="new images to score, default 2,500; gfid: 50,000")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--seeds", type=int, help="paper: of how many seeds; default: all in --out")
    parser.add_argument("--batch_size", type=int, help="speed, memory: images a GPU, default 64; speed on a CPU: 2")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where present")
    inception = parser.add_argument_group("fid, rfid, gfid, and paper at full size")
    inception.add_argument("--inception", metavar="FILE", type=Path, help="the public weights, default "
                           "weights/pt_inception-2015-12-05-6726825d.pth. paper at toy size: FID with these")
    inception.add_argument("--size", type=int, help="fid: take the middle square of each image, resized to this")
    inception.add_argument("--rounding", choices=("round", "truncate"), default="round",
                           help="of what a model painted, to bytes; truncate: as TiTok's evaluator")
    inception.add_argument("--tokenizer", metavar="FILE", help="gfid: that paints; default: the one it was trained on")
    inception.add_argument("--reference", metavar="PATH", help="gfid: folder or ADM's .npz; default: --data, train")
    inception.add_argument("--json", metavar="FILE", type=Path, help="write scores and protocol here too")
    inception.add_argument("--save", metavar="FILE.npz", type=Path, help="write what was scored, for ADM's evaluator")
    args = trainer.parse(parser)
    if args.what in ("fid", "rfid", "gfid"):
        return fid(args)
    args.images, args.samples = args.images or 10_000, args.samples or 2_500
    if args.what == "speed":
        return speed(args.device, args.batch_size)
    if args.what == "memory":
        return memory(args.batch_size or 64)
    tokens = args.tokens or PRESETS[args.config].tokens
    if tokens < 1 or min(args.images, args.samples) < 2:
        raise BadInput(f"--tokens {tokens} --images {args.images} --samples {args.samples}: at least 1 token, 2 images "
                       f"and 2 samples")
    if args.what in ("paper", *TABLES):
        return paper(args)
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
