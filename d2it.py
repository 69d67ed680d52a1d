"""D2iT, the second system: detailed regions of an image get more codes than smooth ones.

    python d2it.py --stage dvae                     # 1: images <-> codes of two grains
    python d2it.py --stage grain                    # 2: class -> grain map
    python d2it.py --stage content                  # 3: class, grain map -> codes
    python d2it.py --stage content --baseline       # DiT on fine codes everywhere
    python d2it.py --sample 64 --classes 3,bag      # class -> grain map -> codes -> image
    python d2it.py --params                         # sizes, beside the paper's

A smooth region of an image is coarse, one code; a detailed one is fine, 2 x 2 codes. The grain map
says which. In training a region is fine if the entropy of its grey values is above a threshold; in
sampling a transformer draws the map.

    image -> entropy of each region -> grain map, without a network
    image -> encoder -> per region 1 coarse and 2 x 2 fine codes; the map takes one of the two
          -> decoder, which sees the map -> image                 1: Dynamic VAE (DVAE)
    class -> grain map, by unmasking                              2: Dynamic Grain Transformer
    class, map, noise -> codes, by diffusion                      3: Dynamic Content Transformer

A coarse region's code, a vector of C numbers, is copied to its four places of the fine grid. It
still is one code: one draw of noise, counted once in the loss. Only abstract, tables and captions
of the paper (arXiv 2504.09454) could be read: "paper" marks what they say. See docs/d2it.md.

Letters: B batch, H W pixels, G side of the grain map, N = G*G regions, S = H/G side of a region in
pixels, C channels of a code, D width, h heads, T length of a sequence, M the most fine regions
of an image of the batch, t time step. Images are float32 [B, 3, H, W] in [0, 1]; grain maps bool
[B, G, G], True is fine; latents z [B, C, 2G, 2G], constant in each coarse region.
"""
import math
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import trainer
import vqgan
from generator import find_classes, save_grid
from trainer import BadInput, TrainConfig


@dataclass(frozen=True)
class DVAEConfig:
    grain: Literal["entropy", "variance", "random", "fine", "coarse"] = "entropy"   # the map's rule
    fine_share: float = 0.5         # of the regions of the training set
    image_size: int = 256           # H = W
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)     # at each resolution; it halves
    stem: int = 1                   # the first resolution is image_size / stem
    res_blocks: int = 2             # residual blocks at each resolution
    norm_groups: int = 32           # of GroupNorm
    latent_channels: int = 4        # C
    sigma: float = 0.01             # of the entropy's kernel, for grey values in [0, 1]
    perceptual: Literal["small", "convnext", "none"] = "convnext"   # network of the perceptual loss
    kl_weight: float = 1.3e-8       # of the KL divergence, a mean; LDM: 1e-6 where all are sums
    other_maps: float = 0.0         # share of images that train all fine, all coarse or at random

    @property
    def grid(self) -> int:          # G
        return self.image_size // self.stem // 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class TransformerConfig:
    model: Literal["grain", "d2it", "dit"]  # read off --stage and --baseline
    width: int                      # D
    heads: int                      # h
    base_layers: int                # DiT blocks
    refine_layers: int = 0          # d2it: DiT blocks on the codes of fine regions
    patch_size: int = 2             # dit: codes per side of a token
    grid: int = 16                  # G, read off the DVAE
    latent_channels: int = 4        # C, read off the DVAE
    num_classes: int = 1000         # read off the data
    sampler: Literal["ddim", "ddpm"] = "ddim"   # of sampling
    sampling_steps: int = 50        # of the 1000
    guidance_scale: float = 1.5     # 1: none


# ---- Grain: which regions are fine, and what a code counts

def entropy(regions, sigma):
    """Grey values of regions [B, N, S*S] in [0, 1] -> their entropy [B, N], in nats.

    Paper, equations 2 and 3: a kernel density of the S*S values at S*S bins, and its Shannon
    entropy. Our choice: bins reach 4 sigma beyond black and white, which else would lose half of
    their kernel; values are rounded to 8 bits, so that a histogram times a table will do.
    """
    levels = (regions * 255).round().long()                 # [B, N, S*S]
    counts = torch.zeros(*levels.shape[:2], 256, device=levels.device)  # [B, N, 256]
    counts.scatter_add_(2, levels, torch.ones_like(regions))
    level = torch.linspace(0, 1, 256, device=levels.device)[:, None]  # [256, 1]
    bins = torch.linspace(-4 * sigma, 1 + 4 * sigma, levels.shape[2], device=levels.device)
    density = counts @ torch.exp(-0.5 * ((level - bins) / sigma) ** 2)  # [B, N, S*S]
    p = density / density.sum(-1, keepdim=True)
    return -(p * p.clamp_min(1e-40).log()).sum(-1)


def to_fine_grid(x):
    """[.., G, G] -> [.., 2G, 2G], each value copied to its 2 x 2 places."""
    return x.repeat_interleave(2, -2).repeat_interleave(2, -1)


def combine(fine, coarse, grain_map):
    """Fine [B, C, 2G, 2G] where the map is True, else copies of coarse [B, C, G, G] (paper:
    neighbour copying)."""
    return torch.where(to_fine_grid(grain_map)[:, None], fine, to_fine_grid(coarse))


def per_code_mean(values, grain_map):
    """values [B, C, 2G, 2G] -> [B], means over codes. Each copy of a coarse one weighs 1/4."""
    weights = torch.where(to_fine_grid(grain_map), 1.0, 0.25)  # [B, 2G, 2G]
    return (values.mean(1) * weights).sum((1, 2)) / weights.sum((1, 2))


# ---- Stage 1: the Dynamic VAE

class DVAE(nn.Module):
    """One chain of convolutions with two heads, the fine one before the last halving, and one
    decoder, which starts from the fine grid and sees the map (our choice)."""
    def __init__(self, config):
        super().__init__()
        self.config, widths, pixel = config, config.widths, 3 * config.stem ** 2
        fine, coarse, C = widths[-2], widths[-1], config.latent_channels

        def chain(widths):
            return nn.ModuleList(vqgan.res_blocks(c_in, c_out, config)
                                 for c_in, c_out in zip([widths[0], *widths], widths))

        def head(width, c_out):
            return nn.Sequential(vqgan.ResBlock(width, width, config.norm_groups),
                                 nn.GroupNorm(config.norm_groups, width), nn.SiLU(),
                                 nn.Conv2d(width, c_out, 3, padding=1))

        self.conv_in = nn.Conv2d(pixel, widths[0], 3, padding=1)
        self.down = chain(widths)
        self.fine_head, self.coarse_head = head(fine, 2 * C), head(coarse, 2 * C)
        self.from_codes = nn.Conv2d(C + 1, fine, 3, padding=1)
        self.up = chain(widths[-2::-1])
        self.pixel_head = head(widths[0], pixel)
        self.register_buffer("threshold", torch.zeros(()))  # above it a region is fine
        self.register_buffer("latent_std", torch.ones(2, 1, 1, 1))  # of fine and coarse codes

    def complexity(self, images):
        """Images [B, 3, H, W] -> what the threshold is for, [B, G, G]."""
        c, weights = self.config, images.new_tensor([0.299, 0.587, 0.114])
        S, grey = c.image_size // c.grid, (images * weights[:, None, None]).sum(1, keepdim=True)
        regions = F.unfold(grey, S, stride=S).transpose(1, 2)  # [B, N, S*S]
        scores = regions.var(2) if c.grain == "variance" else entropy(regions, c.sigma)  # [B, N]
        return scores.unflatten(1, (c.grid, c.grid))

    def set_threshold(self, images):
        """The percentile that makes fine_share of all regions of these images fine (paper)."""
        scores = torch.cat([self.complexity(batch).flatten() for batch in images.split(64)])
        self.threshold.copy_(torch.quantile(scores, 1 - self.config.fine_share))

    def grain_map(self, images):
        """Images [B, 3, H, W] -> bool [B, G, G], by a fixed rule: no gradient, no loss (paper)."""
        with torch.autocast(images.device.type, enabled=False):
            scores, c = self.complexity(images), self.config
        if c.grain == "random":
            return torch.rand_like(scores) < c.fine_share
        return scores > {"fine": -math.inf, "coarse": math.inf}.get(c.grain, self.threshold)

    def moments(self, images):
        """Images -> mean, log-variance of fine [B, 2C, 2G, 2G] and coarse codes [B, 2C, G, G]."""
        x = self.conv_in(F.pixel_unshuffle(images * 2 - 1, self.config.stem))
        for i, level in enumerate(self.down):
            before, x = x, level(x if i == 0 else F.avg_pool2d(x, 2))  # [B, widths[i], ..]
        return self.fine_head(before), self.coarse_head(x)

    def encode(self, images, grain_map=None):
        """Images [B, 3, H, W] -> latents z [B, C, 2G, 2G], the means, each grain scaled to mean
        square 1 (our choice); and the map [B, G, G]."""
        grain_map = self.grain_map(images) if grain_map is None else grain_map
        means = (moments.chunk(2, dim=1)[0] for moments in self.moments(images))
        fine, coarse = (mean / std for mean, std in zip(means, self.latent_std))
        return combine(fine, coarse, grain_map), grain_map

    def set_latent_std(self, images):
        """Estimate it from training images, at the end of the stage; until then it is 1."""
        self.latent_std.fill_(1.0)
        z, grain_map = map(torch.cat, zip(*map(self.encode, images.split(64))))
        for i, mine in enumerate((grain_map, ~grain_map)):
            codes = z.movedim(1, -1)[to_fine_grid(mine)]    # [codes, C]
            self.latent_std[i] = codes.square().mean().sqrt() if len(codes) else 1.0

    def decode(self, z, grain_map):
        """z [B, C, 2G, 2G], map [B, G, G] -> images [B, 3, H, W], not clamped."""
        z = combine(z * self.latent_std[0], z[..., ::2, ::2] * self.latent_std[1], grain_map)
        x = self.from_codes(torch.cat([z, to_fine_grid(grain_map)[:, None].to(z.dtype)], dim=1))
        for i, level in enumerate(self.up):
            x = level(x if i == 0 else F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.pixel_head(x), self.config.stem) / 2 + 0.5

    def forward(self, images, grain_map):
        """Images, maps [B, G, G] -> reconstruction [B, 3, H, W], KL divergence from N(0, 1)."""
        codes, kl = [], []
        for moments in self.moments(images):
            mean, log_var = moments.float().chunk(2, dim=1)
            codes.append(mean + torch.randn_like(mean) * (log_var / 2).exp())
            kl.append((mean.square() + log_var.exp() - 1 - log_var) / 2)
        z = combine(*codes, grain_map)  # after the noise, so that copies are equal
        return self.decode(z, grain_map), per_code_mean(combine(*kl, grain_map), grain_map).mean()


def dvae_loss(network, dvae, perceptual, images, labels):
    """Images [B, 3, H, W] -> loss, its parts (our choice). network: dvae, or its DDP wrapper."""
    c, B, device = dvae.config, len(images), images.device
    # other_maps of the images train all fine, all coarse or at random: one decoder for all maps
    kind = torch.rand(B, 1, 1, device=device) * 3
    random = torch.rand(B, c.grid, c.grid, device=device) < c.fine_share
    others = torch.where(kind < 2, kind < 1, random)
    grain_map = torch.where(kind % 1 < c.other_maps, others, dvae.grain_map(images))  # [B, G, G]
    reconstruction, kl = network(images, grain_map)         # [B, 3, H, W]
    l1, l2 = F.l1_loss(reconstruction, images), F.mse_loss(reconstruction, images)
    loss, parts = l1 + 10 * l2 + c.kl_weight * kl, {"l1": l1, "l2": l2, "kl": kl}
    if perceptual:
        parts["perceptual"] = perceptual.perceptual_loss(reconstruction, images)
        loss = loss + 0.1 * parts["perceptual"]
    return loss, parts


# ---- Transformer parts

def modulated(x, shift, scale):
    """adaLN: a norm of x [B, T, D] with a shift and a scale [B, 1, D] that the condition gives."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """DiT's, adaLN-zero: gates start at 0, so that a block starts as the identity."""
    def __init__(self, config):
        super().__init__()
        self.heads, width = config.heads, config.width
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"),
                                 nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition, keys=None):
        """x [B, T, D], condition [B, 1, D] -> [B, T, D]. keys bool [B, T]: what is seen, or all."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for t in self.qkv(modulated(x, shift1, scale1)).chunk(3, dim=-1))
        mask = None if keys is None else keys[:, None, None]  # [B, 1, 1, T]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, h, T, D/h]
        x = x + gate1 * self.proj(y.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(modulated(x, shift2, scale2))


def initialize(model):
    """DiT's: Xavier; std 0.02 for embeddings and time; 0 for modulations and heads."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "modulation" in name or name.endswith("head"):
                nn.init.zeros_(module.weight)
        if isinstance(module, nn.Embedding) or name in ("time.0", "time.2"):
            nn.init.normal_(module.weight, std=0.02)


# ---- Stage 2: the Dynamic Grain Transformer

MASK = 2  # a cell that is not drawn yet; coarse is 0, fine is 1


class GrainTransformer(nn.Module):
    """p(cell | class, known cells). Paper: cross-entropy on the grain of every region. Our choice:
    cells are masked at random, as in MaskGIT (2202.04200); from the class alone they would be drawn
    without regard to each other."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cell_embedding = nn.Embedding(3, config.width)
        self.class_embedding = nn.Embedding(config.num_classes, config.width)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(config.grid ** 2, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.base_layers))
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))
        self.head = nn.Linear(config.width, 2)
        initialize(self)

    def forward(self, cells, labels):
        """cells int64 [B, N] of 0, 1, MASK, labels [B] -> logits of coarse and fine [B, N, 2]."""
        condition = self.class_embedding(labels)[:, None]   # [B, 1, D]
        x = self.cell_embedding(cells) + self.position_embedding  # [B, N, D]
        for block in self.blocks:
            x = block(x, condition)
        return self.head(modulated(x, *self.final_modulation(condition).chunk(2, dim=-1)))

    @torch.no_grad()
    def generate(self, labels, generator=None):
        """labels [B] -> maps bool [B, G, G]. Cells are drawn one by one, in random order."""
        c, device = self.config, labels.device
        cells = torch.full((len(labels), c.grid ** 2), MASK, device=device)  # [B, N]
        order = torch.rand(cells.shape, generator=generator, device=device).argsort(1)  # [B, N]
        for now in order.split(1, dim=1):                   # [B, 1]
            p = self(cells, labels).softmax(-1)[..., 1].gather(1, now)
            drawn = torch.rand(p.shape, generator=generator, device=device) < p
            cells = cells.scatter(1, now, drawn.long())
        return cells.bool().unflatten(1, (c.grid, c.grid))


def grain_loss(network, config, dvae, images, labels):
    """Images [B, 3, H, W], labels [B] -> loss, its parts: cross-entropy of masked cells. As their
    number is uniform in 1 .. N, its mean is -log p of a cell when drawn one by one, in nats."""
    cells = dvae.grain_map(images).flatten(1).long()        # [B, N]
    count = torch.randint(1, cells.shape[1] + 1, (len(cells), 1), device=cells.device)
    masked = torch.rand(cells.shape, device=cells.device).argsort(1) < count  # [B, N]
    logits = network(cells.masked_fill(masked, MASK), labels).float()  # [B, N, 2]
    loss = F.cross_entropy(logits.transpose(1, 2), cells, reduction="none")  # [B, N]
    loss = (loss * masked / count).sum(1).mean()
    return loss, {"bits": loss / math.log(2)}


# ---- Diffusion of codes of two grains (DDPM, 2006.11239)

TIME_STEPS = 1000
BETAS = torch.linspace(1e-4, 0.02, TIME_STEPS, dtype=torch.float64)  # DiT's
ALPHA_BARS = torch.cat([torch.cumprod(1 - BETAS, 0), torch.ones(1)])  # at -1, clean: 1


def alpha_bar(t, like):
    """The share of z_t's variance that is signal: t int64 [B] -> [B, 1, 1, 1]."""
    return ALPHA_BARS.to(like)[t][:, None, None, None]


def draw_noise(grain_map, channels, generator=None):
    """Standard normal [B, C, 2G, 2G]: one draw per code, copied in coarse regions. With a draw per
    place the four copies would average out, and coarse codes would be at another noise level."""
    B, G, _ = grain_map.shape
    noise = torch.randn(B, channels, 2 * G, 2 * G, generator=generator, device=grain_map.device)
    return combine(noise, noise[..., ::2, ::2], grain_map)


def add_noise(z, t, noise):
    """z_t, all [B, C, 2G, 2G]."""
    a = alpha_bar(t, z)
    return a.sqrt() * z + (1 - a).sqrt() * noise


# ---- Stage 3: the Dynamic Content Transformer

def to_tokens(z, size):  # [B, C, 2G, 2G] -> [B, T, C * size * size]
    return F.pixel_unshuffle(z, size).flatten(2).transpose(1, 2)


def from_tokens(x, size):  # back
    side = math.isqrt(x.shape[1])
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), size)


class ContentTransformer(nn.Module):
    """Predicts the noise: roughly everywhere, by DiT blocks on one token per region, then corrected
    in fine regions, by refine blocks on one token per fine code.

    Paper: DiT blocks, then RefineNet blocks; a routing module; a learnable position embedding. Our
    choice, which gives the paper's parameter counts: the router is a linear layer that merges the
    embeddings of a region's places and one that expands its token; refine blocks are DiT blocks, in
    which the fine codes of an image see each other; both heads share a modulation.

    --baseline is DiT (2212.09748): patches of codes, all fine, and fixed positions.
    """
    def __init__(self, config):
        super().__init__()
        self.config, width, C = config, config.width, config.latent_channels
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)  # the last: no class
        if config.model == "dit":
            outputs = C * config.patch_size ** 2
            self.embed = nn.Linear(outputs, width)
            side, quarter = 2 * config.grid // config.patch_size, width // 4
            angles = torch.arange(side)[:, None] / 10_000 ** (torch.arange(quarter) / quarter)
            waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, D/2]
            positions = torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], dim=1)
            self.register_buffer("positions", positions, persistent=False)  # [T, D]
        else:
            outputs = 4 * C
            self.embed = nn.Linear(C, width)
            self.position_embedding = nn.Parameter(0.02 * torch.randn(config.grid ** 2, 4, width))
            self.grain_embedding = nn.Embedding(2, width)
            self.merge = nn.Linear(4 * width, width)
        self.base_blocks = nn.ModuleList(Block(config) for _ in range(config.base_layers))
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.rough_head = nn.Linear(width, outputs)
        if config.refine_layers:
            self.expand = nn.Linear(width, 4 * width)
            self.refine_blocks = nn.ModuleList(Block(config) for _ in range(config.refine_layers))
            self.fine_head = nn.Linear(width, C)
        initialize(self)

    def forward(self, z_t, t, labels, grain_map, drop_label):
        """z_t [B, C, 2G, 2G], t and labels [B], map [B, G, G], drop_label bool [B]: hides the class
        -> prediction, rough prediction, both [B, C, 2G, 2G] and constant in coarse regions."""
        c = self.config
        scale = math.log(10_000) * torch.arange(128, device=t.device) / 128
        angles = t[:, None] * torch.exp(-scale)             # [B, 128]
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))  # [B, D]
        labels = labels.masked_fill(drop_label, c.num_classes)
        condition = (time + self.class_embedding(labels))[:, None]  # [B, 1, D]
        if c.model == "dit":
            x = self.embed(to_tokens(z_t, c.patch_size)) + self.positions  # [B, T, D]
        else:
            is_fine = grain_map.flatten(1)                  # [B, N]
            places = to_tokens(z_t, 2).unflatten(2, (-1, 4)).transpose(2, 3)  # [B, N, 4, C]
            places = self.embed(places) + self.position_embedding  # [B, N, 4, D]
            x = self.merge(places.flatten(2)) + self.grain_embedding(is_fine.long())  # [B, N, D]
        for block in self.base_blocks:
            x = block(x, condition)
        last = self.final_modulation(condition).chunk(2, dim=-1)
        rough = self.rough_head(modulated(x, *last))
        if c.model == "dit":
            return (from_tokens(rough, c.patch_size),) * 2
        rough = rough.unflatten(2, (4, -1))                 # [B, N, 4, C]
        # a coarse region has one code, so one prediction
        final = rough = torch.where(is_fine[..., None, None], rough, rough.mean(2, keepdim=True))
        if c.refine_layers:
            # the fine regions of each image first, then padding; M >= 1, or DDP misses parameters
            M = max(1, int(is_fine.sum(1).max()))
            chosen = is_fine.int().argsort(dim=1, descending=True, stable=True)[:, :M]  # [B, M]
            row = torch.arange(len(x), device=x.device)[:, None]  # [B, 1]
            real = is_fine[row, chosen]                     # [B, M], False: padding
            tokens = self.expand(x[row, chosen]).unflatten(2, (4, -1)) + places[row, chosen]
            tokens = tokens.flatten(1, 2)                   # [B, M, 4, D] -> [B, 4M, D]
            # padding is no key; where no region is fine it sees itself, and its output is dropped
            keys = (real | ~real.any(1, keepdim=True)).repeat_interleave(4, 1)  # [B, 4M]
            for block in self.refine_blocks:
                tokens = block(tokens, condition, keys)
            tokens = self.fine_head(modulated(tokens, *last)).unflatten(1, (M, 4))  # [B, M, 4, C]
            tokens = tokens * real[..., None, None]
            final = rough.index_put((row, chosen), tokens, accumulate=True)
        return tuple(from_tokens(p.transpose(2, 3).flatten(2), 2) for p in (final, rough))


def content_loss(network, config, dvae, images, labels):
    """Images [B, 3, H, W], labels [B] -> loss, its parts. The dynamic grain loss (our form of it):
    squared error of the noise, each code counted once; and a quarter of the rough prediction's."""
    with torch.autocast(images.device.type, enabled=False):
        z, grain_map = dvae.encode(images)                  # [B, C, 2G, 2G]
    t = torch.randint(TIME_STEPS, (len(z),), device=z.device)  # [B]
    drop_label = torch.rand(len(z), device=z.device) < 0.1  # [B] (DiT)
    noise = draw_noise(grain_map, z.shape[1])
    final, rough = network(add_noise(z, t, noise), t, labels, grain_map, drop_label)
    mse, rough = (per_code_mean((x - noise).square(), grain_map).mean() for x in (final, rough))
    loss = mse + 0.25 * rough if config.refine_layers else mse
    return loss, {"mse": mse, "rough": rough}


@torch.no_grad()
def sample_latents(model, labels, grain_map, generator=None, **changes):
    """labels [B], maps [B, G, G] -> z [B, C, 2G, 2G]. changes: to the config."""
    c, B = replace(model.config, **changes), len(labels)
    R = 1 if c.guidance_scale == 1 else 2  # both halves of the guidance in one pass
    inputs = labels.repeat(R), grain_map.repeat(R, 1, 1), torch.arange(R * B).to(labels) >= B
    z = draw_noise(grain_map, c.latent_channels, generator)
    steps = torch.linspace(TIME_STEPS - 1, -1, c.sampling_steps + 1).round().long()
    for t, s in zip(steps, steps[1:]):  # from step t to s; the last s is -1, clean
        t, s = (step.to(z.device).expand(B) for step in (t, s))  # [B]
        noise, _ = model(z.repeat(R, 1, 1, 1), t.repeat(R), *inputs)
        if R == 2:
            noise, without_class = noise.chunk(2)
            noise = without_class + c.guidance_scale * (noise - without_class)
        a_t, a_s = alpha_bar(t, z), alpha_bar(s, z)
        estimate = (z - (1 - a_t).sqrt() * noise) / a_t.sqrt()  # of the clean latent
        if c.sampler == "ddim":  # 2010.02502: no new noise
            z = add_noise(estimate, s, noise)
        else:  # q(z_s | z_t, estimate), DDPM's equation 7
            beta, new = 1 - a_t / a_s, draw_noise(grain_map, c.latent_channels, generator)
            mean = (a_s.sqrt() * beta * estimate + (a_t / a_s).sqrt() * (1 - a_s) * z) / (1 - a_t)
            z = mean + (beta * (1 - a_s) / (1 - a_t)).sqrt() * new
    return z


# ---- Sizes, and one training loop for all stages

PRESETS = {
    "dvae_toy": DVAEConfig(image_size=32, widths=(32, 64, 96), stem=2, res_blocks=1, norm_groups=4,
                           sigma=0.02, perceptual="none", kl_weight=1e-4, other_maps=0.5),
    "dvae": DVAEConfig(),
    # width, heads, DiT blocks, refine blocks
    "grain_toy": TransformerConfig("grain", 64, 4, 3),
    "grain": TransformerConfig("grain", 384, 6, 12),            # DiT-S: our choice
    "d2it_toy": TransformerConfig("d2it", 96, 4, 4, 2, sampling_steps=25),
    "d2it_b": TransformerConfig("d2it", 768, 12, 10, 2),        # paper, Table 4
    "d2it_l": TransformerConfig("d2it", 1024, 16, 20, 4),       # of L and XL the parameters are
    "d2it_xl": TransformerConfig("d2it", 1152, 16, 24, 4),      # known, not the split
    "dit_toy": TransformerConfig("dit", 96, 4, 6, sampling_steps=25),
    "dit_b": TransformerConfig("dit", 768, 12, 12),
    "dit_l": TransformerConfig("dit", 1024, 16, 24),
    "dit_xl": TransformerConfig("dit", 1152, 16, 28)}
PAPER = {"d2it_l": "467M", "d2it_xl": "687M", "dit_l": "458M", "dit_xl": "675M"}  # parameters
TOY = TrainConfig(steps=600, batch_size=32, learning_rate=2e-3, end_learning_rate=1e-4, warmup=50,
                  weight_decay=0.0, ema=0.99, workers=0, log_every=25, save_every=200)
TOYS = {"dvae": replace(TOY, steps=700, learning_rate=4e-3), "grain": TOY,
        "content": replace(TOY, steps=540)}
FULL = TrainConfig(steps=400_000, end_learning_rate=1e-4, warmup=0, beta2=0.999, weight_decay=0.0,
                   ema=0.9999)  # DiT's recipe; the paper's is not known
CONFIGS = {"dvae": DVAEConfig, "grain": TransformerConfig, "content": TransformerConfig}
SAMPLING = "sampler", "sampling_steps", "guidance_scale"        # of the codes; maps have none


def build(config):
    kinds = {"dvae": DVAE, "grain": GrainTransformer}
    return kinds.get(getattr(config, "model", "dvae"), ContentTransformer)(config)


def print_params():
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = build(config)
        count = sum(p.numel() for p in model.parameters())
        if "it_" in name:  # published DiTs predict a variance, too: twice the heads' outputs
            count += sum(p.numel() for key, p in model.named_parameters() if "head." in key)
        print(f"{name:10} {count / 1e6:8.2f}M   {PAPER.get(name, '')}")


def load_stage(path, stage, device="cpu"):
    """A trained model, frozen, in eval mode. .classes: names; .dvae: fingerprint of its DVAE."""
    saved = trainer.load_checkpoint(path, f"d2it_{stage}", f"python d2it.py --stage {stage}")
    model = trainer.load_model(build, CONFIGS[stage], saved, path)
    model.classes, model.dvae = saved["classes"], saved["settings"].get("dvae")
    return model.to(device)


def train(args, config, training):
    """Frozen: the DVAE in later stages, and the perceptual network."""
    stage, name, dvae, settings = args.stage, f"d2it_{args.stage}", None, {}
    if stage != "dvae":
        dvae = load_stage(args.out / "d2it_dvae.pt", "dvae", args.device)
        settings = {"dvae": trainer.fingerprint(dvae)}
        if dvae.latent_std.eq(1).all():
            raise BadInput("d2it_dvae.pt: not finished. Run python d2it.py --stage dvae --resume")
    size = (dvae.config if dvae else config).image_size
    train_set = data.open_dataset(args.data, "train", size, augment=True, draft=True)
    if dvae:
        config = replace(config, grid=dvae.config.grid, num_classes=len(train_set.classes),
                         latent_channels=dvae.config.latent_channels)
        if config.model == "dit":  # full size: train its DVAE with --other_maps
            name, dvae.config = f"dit_{config.patch_size}", replace(dvae.config, grain="fine")
    run = trainer.Run(args, f"d2it_{stage}", name, config, training, train_set,
                      SAMPLING, {"classes": list(train_set.classes)}, **settings)

    if training.compile:
        trainer.compile_methods(Block, "forward")
    model = build(config).to(run.device, memory_format=torch.channels_last)  # faster
    network = run.parallel(model)
    if stage == "dvae":
        rows = np.random.default_rng(0).permutation(len(train_set))[:2048]
        some = torch.cat([x for x, _ in data.all_images(train_set, 64, rows)]).to(run.device)
        model.set_threshold(some)
        perceptual = vqgan.perceptual_network(config.perceptual, train_set, args.out, args.convnext,
                                              run.device)
        loss_fn = partial(dvae_loss, network, model, perceptual)
    else:
        loss_fn = partial(grain_loss if stage == "grain" else content_loss, network, config, dvae)
    optimizer = trainer.adamw(model, training)
    ema = trainer.Ema(model, training.ema)
    run.start(model=model, ema=ema, optimizer=optimizer)
    batches = data.batches(train_set, *run.order, training.workers)

    for step in range(run.step, training.steps):
        trainer.set_lr(optimizer, trainer.cosine(step, training))
        optimizer.zero_grad()
        for images, labels in run.micro_batches(batches, network):  # [B, 3, H, W], [B]
            with run.autocast():
                loss, parts = loss_fn(images, labels)
            (loss / run.accumulate).backward()
            run.add(loss=loss, **parts)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        ema.update(model)
        if stage == "dvae" and step + 1 == training.steps:
            ema.model.set_latent_std(some)
        run.log(step, grad_norm=grad_norm)
        run.save_if_due(step, model=model, ema=ema, optimizer=optimizer)


# ---- Pictures, command line

def map_pictures(grain_map, size):  # [n, G, G] -> [n, 3, H, W], fine regions bright
    x = 0.2 + 0.6 * grain_map[:, None].float()
    return F.interpolate(x, (size, size), mode="nearest").expand(-1, 3, -1, -1)


def sample(args):
    """--sample: new images, each beside its grain map, in one picture."""
    dvae, grain, content = (load_stage(args.out / f"d2it_{stage}.pt", stage, args.device)
                            for stage in CONFIGS)
    for stage, model in (("grain", grain), ("content", content)):
        if model.dvae != trainer.fingerprint(dvae):
            raise BadInput(f"{args.out}/d2it_{stage}.pt: trained on another d2it_dvae.pt. Train it "
                           f"again: python d2it.py --stage {stage} --overwrite")
    content.config = replace(content.config, **{
        name: getattr(args, name) for name in SAMPLING if hasattr(args, name)})
    n, names = args.sample, grain.classes
    wanted = find_classes(args.classes, names) if args.classes else range(len(names))
    labels = torch.tensor([wanted[i * len(wanted) // n] for i in range(n)], device=args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    maps = grain.generate(labels, generator)  # [n, G, G]
    z = sample_latents(content, labels, maps, generator)
    images = dvae.decode(z, maps).clamp(0, 1)  # [n, 3, H, W]
    pairs = torch.stack([images, map_pictures(maps, images.shape[-1])], 1)  # [n, 2, 3, H, W]
    path = args.output or args.out / "d2it_samples.png"
    save_grid(pairs.flatten(0, 1), path)
    print(f"{path}: {n} samples, each beside its grain map")


def main():
    stage = (re.findall(r"--stage[ =](dvae|grain)", " ".join(sys.argv)) or ["content"])[-1]
    parser = trainer.command_line(__doc__, CONFIGS[stage], TrainConfig)  # flags by stage
    add = parser.add_argument
    add("--stage", choices=tuple(CONFIGS), default="content", help="what to train")
    if stage == "dvae":
        add("--convnext", metavar="FILE", default="weights/convnext_small.pth")
    if stage == "content":
        either = parser.add_mutually_exclusive_group().add_argument
        either("--baseline", action="store_true", help="DiT on fine codes; --patch_size 1 or 2")
        either("--preset", choices=[name for name in PRESETS if "it_" in name], metavar="NAME",
               help="instead: d2it_b, dit_l, ..")
    add("--params", action="store_true", help="print sizes beside the paper's")
    add("--sample", type=int, metavar="N", help="write N new images with their grain maps")
    add("--classes", help="names or numbers, such as 3,bag")
    add("--output", metavar="FILE", help="of --sample; default: OUT/d2it_samples.png")
    args = trainer.parse(parser)
    if args.params:
        return print_params()
    if args.sample is not None:
        others = {*TrainConfig.__dataclass_fields__, *CONFIGS[stage].__dataclass_fields__}
        trainer.refuse(args, others - {*SAMPLING} | {"baseline", "preset"}, "not with --sample")
        return sample(args)
    trainer.refuse(args, ("classes", "output"), "only with --sample")
    toy, size = args.config == "toy", {"toy": "toy", "small": "b", "full": "xl"}[args.config]
    preset = f"{stage}_toy" if toy else stage
    if stage == "content":
        preset = args.preset or f"{'dit' if args.baseline else 'd2it'}_{size}"
    elif stage == "grain":
        trainer.refuse(args, (*SAMPLING, "patch_size", "refine_layers"), "not of --stage grain")
    train(args, trainer.override(PRESETS[preset], args),
          trainer.override(TOYS[stage] if toy else FULL, args))


if __name__ == "__main__":
    trainer.launch(main)
