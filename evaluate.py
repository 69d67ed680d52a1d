"""Scores: how good are the reconstructions and the samples of all stages, in numbers, pictures and one report.

    python evaluate.py report       # everything: <out>/report.md, <out>/scores.json and the pictures
    python evaluate.py scores       # only the table, of the stages that exist so far
    python evaluate.py speed        # MoCET's fast form against its plain form

Protocol: the first --images test images (10,000 unless the data has fewer), without their border of padding; PSNR is
the mean of the images' PSNR. Accuracy and the Frechet distance (FD) come from a small classifier that is trained here,
on the data's own training split, and that no stage was trained against. It is called FD-classifier: it is not FID, and
its values mean nothing beside values on other data. What is measured is kept in <out>/measured.json with what it was
measured on, so that a second report takes seconds.

Letters: B batch, H W pixels, n images of a set, L tokens, K codes in the codebook, D features.
Images are float32 [B, 3, H, W] in [0, 1], codes int64 [B, L], labels int64 [B].
"""
import functools
import json
import math
import os
import platform
import re
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import data
import trainer
from generator import load_generator
from tokenizer import MoCET, load_tokenizer
from trainer import BadInput
from vqgan import load_vqgan

BATCH = 250         # images at once where nothing is trained


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
    features = np.asarray(features, dtype=np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


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


# Inception's FID, Inception Score, precision and recall belong here; they need no more than features, as above.


# ---------------------------------------------------------------------------------------------------------------------
# The images that are scored

def spread_indices(dataset, limit):
    """`limit` indices (or all) spread evenly over a set: a folder's images are sorted by class."""
    return np.linspace(0, len(dataset), min(limit, len(dataset)), endpoint=False).astype(int)


def spread(dataset, limit):
    """The images of spread_indices: yields (images [BATCH, 3, H, W], labels [BATCH]), the last batch may be shorter."""
    indices = spread_indices(dataset, limit)
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
    model = FDClassifier(len(train_set.classes)).to(device, memory_format=torch.channels_last)
    if path.exists():
        checkpoint = trainer.load_checkpoint(path, "fd_classifier", make=f"rm {path}; python evaluate.py scores")
        if checkpoint["config"]["made_of"] == made_of:
            trainer.load_weights(model, checkpoint["model"], path)
            return model.eval().requires_grad_(False), checkpoint["test_accuracy"]
    with torch.random.fork_rng():
        torch.manual_seed(2718)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        batches = data.batches(train_set, batch_size, seed=2718)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in tqdm(range(steps), desc="FD-classifier", unit="step"):
            images, labels = (t.to(device) for t in next(batches))
            loss = F.cross_entropy(model(without_border(images, train_set.border)), labels)
            optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
    model.eval().requires_grad_(False)
    right = [model(without_border(images.to(device), test_set.border)).argmax(1).cpu() == labels
             for images, labels in spread(test_set, 10_000)]
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
