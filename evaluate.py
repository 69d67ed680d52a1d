"""Scores that others can check: FID, sFID, IS, KID, precision and recall, by the Inception network that everyone uses.

    python evaluate.py fid A B      # FID, sFID, IS, KID, precision, recall of B (folder or .npz) against A
    python evaluate.py rfid TOKENIZER --data DIR        # of a tokenizer's reconstructions of val
    python evaluate.py gfid GENERATOR --reference PATH  # of 50,000 samples

The toy's report and the network that scores it: extras/report.py. The paper's tables: extras/paper.py. Speed and
memory: extras/bench.py.

Letters: B batch, H W pixels, n images of a set, L tokens, K codes in a codebook (the tokenizer's or the VQGAN's own),
D features.
Images are float32 [B, 3, H, W] in [0, 1], codes int64 [B, L], labels int64 [B].
"""
import contextlib
import functools
import json
import math
import os
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
from torch import nn
from tqdm import tqdm

import data
import trainer
from generator import codes_fingerprint, load_generator, open_tokenizer, sample_codes
from trainer import BadInput
from vqgan import read_weights

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


def subset(dataset, limit):
    """`limit` indices of a set (or all), drawn with a fixed seed and sorted: the first ones might be of one class."""
    return np.sort(np.random.default_rng(0).permutation(len(dataset))[:limit])


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
# Command line

def main():
    parser = trainer.ArgumentParser(__doc__)
    parser.add_argument("what", choices=("fid", "rfid", "gfid"), metavar="what", help="fid, rfid or gfid")
    parser.add_argument("paths", nargs="*", help="fid: the reference and what is scored, folders or .npz; rfid: a "
                        "tokenizer or VQGAN; gfid: a generator")
    parser.add_argument("--config", choices=("toy", "full"), help="default: full where CUDA is present, else toy")
    parser.add_argument("--data", help="as in training: shapes, fashion, auto or a folder")
    parser.add_argument("--out", help="folder of the results, default out/<config>")
    parser.add_argument("--images", type=int, help="images of the data to score on, default: all")
    parser.add_argument("--samples", type=int, help="gfid: new images to score, default 50,000")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where present")
    parser.add_argument("--inception", metavar="FILE", type=Path, help="the public weights, default "
                        "weights/pt_inception-2015-12-05-6726825d.pth")
    parser.add_argument("--size", type=int, help="fid: take the middle square of each image, resized to this")
    parser.add_argument("--rounding", choices=("round", "truncate"), default="round",
                        help="of what a model painted, to bytes; truncate: as TiTok's evaluator")
    parser.add_argument("--tokenizer", metavar="FILE", help="gfid: that paints; default: the one it was trained on")
    parser.add_argument("--reference", metavar="PATH", help="gfid: folder or ADM's .npz; default: --data, train")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write scores and protocol here too")
    parser.add_argument("--save", metavar="FILE.npz", type=Path, help="write what was scored, for ADM's evaluator")
    fid(trainer.parse(parser))


if __name__ == "__main__":
    trainer.launch(main)
