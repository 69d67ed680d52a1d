"""D2iT, the second system: detailed regions of an image get more codes than smooth ones.

    python d2it.py --stage dvae                     # 1: images <-> codes of two grains
    python d2it.py --stage grain                    # 2: class -> grain map
    python d2it.py --stage content                  # 3: class, grain map -> codes
    python d2it.py --stage content --baseline       # DiT on fine codes everywhere
    python d2it.py --sample 64 --classes 3,bag      # class -> grain map -> codes -> image
    python d2it.py --params                         # sizes, beside the paper's

The idea (arXiv 2504.09454). A diffusion transformer such as DiT compresses all regions of an image
alike. Here a smooth region is coarse, one code, and a detailed one is fine, 2 x 2 codes. The grain
map says which is which. In training it is computed from the image: a region is fine if the entropy
of its grey values is above a threshold. When sampling there is no image yet, and a transformer
draws the map.

    image -> entropy of each region -> grain map, without a network
    image -> encoder -> per region 1 coarse and 2 x 2 fine codes; the map takes one of the two
          -> decoder, which sees the map -> image                 1: Dynamic VAE (DVAE)
    class -> grain map, by unmasking                              2: Dynamic Grain Transformer
    class, map, noise -> codes, by diffusion                      3: Dynamic Content Transformer

A code is a vector of C real numbers. To keep tensors regular, a coarse region's code is copied to
its four places of the fine grid. It still is one code: one draw of noise, counted once in the loss.
The content transformer predicts the noise roughly, by DiT blocks on one token per region; DiT
blocks on the codes of the fine regions alone then add a correction.

Sources: the paper's code is not public, and only its abstract, tables and captions could be read.
"Paper" marks what these say, "our choice" what they do not; docs/d2it.md lists all choices. The
wiring of the content transformer is ours; its parameter counts are the paper's. Three grains would
need a third head and a second copy in the DVAE, a second threshold, maps of 0, 1, 2, and a merge,
an expansion and refine blocks for each step between two grains.

Letters: B batch, H W pixels, G side of the grain map, N = G*G regions, S = H/G side of a region in
pixels, C channels of a code, D width, h heads, T length of a sequence, M most fine regions in an
image of the batch, t time step. Images are float32 [B, 3, H, W] in [0, 1]; grain maps bool
[B, G, G], True is fine; latents z [B, C, 2G, 2G], constant in each coarse region.
"""
import math
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import data
import trainer
import vqgan
from generator import find_classes
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
    l2_weight: float = 0.0          # beside 1 for L1
    perceptual: Literal["small", "convnext", "none"] = "convnext"   # network of the perceptual loss
    perceptual_weight: float = 0.1  # of its loss
    gan_weight: float = 0.1         # of the adversarial loss; 0: no discriminator
    kl_weight: float = 1.3e-8       # of the KL divergence, a mean; LDM: 1e-6 where all are sums
    other_maps: float = 0.0         # share of images that train all fine, all coarse or at random

    @property
    def region(self) -> int:        # S
        return self.stem * 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:          # G
        return self.image_size // self.region


@dataclass(frozen=True)
class GrainConfig:
    width: int = 384                # D; DiT-S is our choice
    layers: int = 12                # DiT blocks
    heads: int = 6                  # h
    grid: int = 16                  # G, from the DVAE
    num_classes: int = 1000         # from the data
    unmask_steps: int = 32          # forward passes of sampling; N: cells are drawn one by one
    temperature: float = 1.0        # of the softmax in sampling


@dataclass(frozen=True)
class ContentConfig:
    model: Literal["d2it", "dit"] = "d2it"  # dit: --baseline
    width: int = 1152               # D
    base_layers: int = 24           # DiT blocks on regions
    refine_layers: int = 4          # DiT blocks on the codes of fine regions
    heads: int = 16                 # h
    patch_size: int = 2             # dit: codes per side of a token
    grid: int = 16                  # G, from the DVAE
    latent_channels: int = 4        # C, from the DVAE
    num_classes: int = 1000         # from the data
    learn_sigma: bool = True        # predict the variance of a DDPM step as well (DiT)
    rough_weight: float = 0.25      # of the rough prediction's own loss
    class_dropout: float = 0.1      # share of images without a class in training (DiT)
    sampler: Literal["ddim", "ddpm"] = "ddpm"   # of sampling
    sampling_steps: int = 250       # of the 1000 (DiT)
    guidance_scale: float = 1.5     # 1: none


CONFIGS = {"dvae": DVAEConfig, "grain": GrainConfig, "content": ContentConfig}
# of sampling: may change when a run continues
SAMPLING = {"sampler", "sampling_steps", "guidance_scale", "unmask_steps", "temperature"}
# D2iT-B: 10 + 2 layers (paper, Table 4). Of L and XL only the parameters are known: our choice
D2IT_XL = ContentConfig()
DIT_XL = ContentConfig("dit", base_layers=28, refine_layers=0)
D2IT_TOY = ContentConfig(width=96, base_layers=4, refine_layers=2, heads=4, learn_sigma=False,
                         sampler="ddim", sampling_steps=25)
PRESETS = {
    "dvae": {"toy": DVAEConfig(image_size=32, widths=(32, 64, 96), stem=2, res_blocks=1,
                               norm_groups=4, sigma=0.02, l2_weight=10.0, perceptual="none",
                               gan_weight=0.0, kl_weight=1e-4, other_maps=0.5),
             "small": DVAEConfig(), "full": DVAEConfig()},
    "grain": {"toy": GrainConfig(width=64, layers=3, heads=4, unmask_steps=16),
              "small": GrainConfig(), "full": GrainConfig()},
    "content": {"d2it_toy": D2IT_TOY,
                "d2it_b": replace(D2IT_XL, width=768, heads=12, base_layers=10, refine_layers=2),
                "d2it_l": replace(D2IT_XL, width=1024, base_layers=20),
                "d2it_xl": D2IT_XL,
                "dit_toy": replace(D2IT_TOY, model="dit", base_layers=6, refine_layers=0),
                "dit_b": replace(DIT_XL, width=768, heads=12, base_layers=12),
                "dit_l": replace(DIT_XL, width=1024, base_layers=24),
                "dit_xl": DIT_XL}}
PAPER = {"d2it_l": "467", "d2it_xl": "687", "dit_l": "458", "dit_xl": "675"}    # M parameters
TOY = TrainConfig(steps=600, batch_size=32, learning_rate=2e-3, end_learning_rate=1e-4, warmup=50,
                  weight_decay=0.0, ema=0.99, workers=0, log_every=25, save_every=200)
# DiT's recipe; the paper's is not known
DIT = TrainConfig(steps=400_000, end_learning_rate=1e-4, warmup=0, beta2=0.999, weight_decay=0.0,
                  ema=0.9999)
DVAE_FULL = TrainConfig(micro_batch=16, beta1=0.5, beta2=0.9)              # DQ-VAE's betas
TRAINING = {
    "dvae": {"toy": replace(TOY, steps=700, learning_rate=4e-3), "small": DVAE_FULL,
             "full": DVAE_FULL},
    "grain": {"toy": TOY, "small": DIT, "full": DIT},
    "content": {"toy": replace(TOY, steps=540), "small": DIT, "full": DIT}}


# ---- Grain: which regions are fine, and what a code counts

def entropy(grey, region, sigma):
    """Grey values [B, H, W] in [0, 1] -> entropy of each region [B, G, G], in nats.

    Paper, equations 2 and 3: a kernel density of the region's S*S values at S*S bins, and its
    Shannon entropy. Our choice: bins reach 4 sigma beyond black and white, or regions of these
    would lose half of their kernel; values are rounded to 8 bits, which makes the sum over pixels
    a histogram times a table.
    """
    levels = F.unfold(grey[:, None], region, stride=region).transpose(1, 2)     # [B, N, S*S]
    levels = (levels * 255).round().long().clamp(0, 255)
    counts = torch.zeros(*levels.shape[:2], 256, device=grey.device)            # [B, N, 256]
    counts.scatter_add_(2, levels, torch.ones_like(levels, dtype=counts.dtype))
    level = torch.linspace(0, 1, 256, device=grey.device)[:, None]              # [256, 1]
    bins = torch.linspace(-4 * sigma, 1 + 4 * sigma, region ** 2, device=grey.device)
    density = counts @ torch.exp(-0.5 * ((level - bins) / sigma) ** 2)          # [B, N, S*S]
    p = density / density.sum(-1, keepdim=True)
    grid = grey.shape[-1] // region
    return -(p * p.clamp_min(1e-40).log()).sum(-1).unflatten(1, (grid, grid))


def to_fine_grid(x):
    """[.., G, G] -> [.., 2G, 2G], each value copied to its 2 x 2 places."""
    return x.repeat_interleave(2, -2).repeat_interleave(2, -1)


def combine(fine, coarse, grain_map):
    """Fine [B, C, 2G, 2G] where the map [B, G, G] is True, copies of coarse [B, C, G, G] elsewhere
    (paper: neighbour copying) -> [B, C, 2G, 2G]."""
    return torch.where(to_fine_grid(grain_map)[:, None], fine, to_fine_grid(coarse))


def per_code_mean(values, grain_map):
    """values [B, C, 2G, 2G] -> [B]: the mean over an image's N_coarse + 4 N_fine codes. Each of the
    four copies of a coarse one weighs 1/4."""
    weights = torch.where(to_fine_grid(grain_map), 1.0, 0.25)               # [B, 2G, 2G]
    return (values.mean(1) * weights).sum((1, 2)) / weights.sum((1, 2))


# ---- Stage 1: the Dynamic VAE

class DVAE(nn.Module):
    """One chain of convolutions with two heads, the fine one before the last halving, and one
    decoder, which starts from the fine grid. No attention, where DQ-VAE has some (our choice)."""
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
        self.register_buffer("threshold", torch.zeros(()))      # above it a region is fine
        self.register_buffer("latent_std", torch.ones(2, 1, 1, 1))  # of fine and coarse codes

    def complexity(self, images):
        """Images [B, 3, H, W] -> what the threshold is for, [B, G, G]."""
        rule, shape = self.config.grain, (len(images), self.config.grid, self.config.grid)
        if rule in ("fine", "coarse"):
            return torch.full(shape, math.inf if rule == "fine" else -math.inf).to(images)
        if rule == "random":
            return torch.rand(shape, device=images.device)
        grey = (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
        if rule == "entropy":
            return entropy(grey, self.config.region, self.config.sigma)
        regions = F.unfold(grey[:, None], self.config.region, stride=self.config.region)
        return regions.var(1).view(shape)               # regions: [B, S*S, N]

    @torch.no_grad()
    def set_threshold(self, images):
        """The percentile that makes fine_share of all regions of these training images fine. The
        share is the data set's, an image's own may be any (paper)."""
        if self.config.grain not in ("fine", "coarse"):
            scores = [self.complexity(batch).flatten() for batch in images.split(64)]
            self.threshold.copy_(torch.quantile(torch.cat(scores), 1 - self.config.fine_share))

    @torch.no_grad()
    def grain_map(self, images):
        """Images [B, 3, H, W] -> bool [B, G, G], by a fixed rule: no gradient, no loss (paper)."""
        with torch.autocast(images.device.type, enabled=False):
            return self.complexity(images) > self.threshold

    def moments(self, images):
        """Images [B, 3, H, W] -> mean and log-variance of fine codes [B, 2C, 2G, 2G], of coarse
        ones [B, 2C, G, G]."""
        x = self.conv_in(F.pixel_unshuffle(images * 2 - 1, self.config.stem))
        for i, level in enumerate(self.down):
            before, x = x, level(x if i == 0 else F.avg_pool2d(x, 2))  # [B, widths[i], ..]
        return self.fine_head(before), self.coarse_head(x)

    @torch.no_grad()
    def encode(self, images, grain_map=None):
        """Images [B, 3, H, W] -> latents z [B, C, 2G, 2G], the means, each grain scaled to unit
        variance (our choice: one number for both would be LDM's); and the map [B, G, G]."""
        grain_map = self.grain_map(images) if grain_map is None else grain_map
        means = (moments.chunk(2, dim=1)[0] for moments in self.moments(images))
        fine, coarse = (mean / std for mean, std in zip(means, self.latent_std))
        return combine(fine, coarse, grain_map), grain_map

    @torch.no_grad()
    def set_latent_std(self, images):
        """Estimate it from training images, at the end of the stage."""
        self.latent_std.fill_(1)
        z, grain_map = map(torch.cat, zip(*map(self.encode, images.split(64))))
        for i, mine in enumerate((grain_map, ~grain_map)):
            codes = z.movedim(1, -1)[to_fine_grid(mine)]                    # [codes, C]
            self.latent_std[i] = codes.square().mean().sqrt() if len(codes) else 1

    def decode(self, z, grain_map):
        """z [B, C, 2G, 2G], map [B, G, G] -> images [B, 3, H, W], not clamped. The map is an input
        channel (our choice), so that the decoder knows which 2 x 2 places are copies."""
        z = combine(z * self.latent_std[0], z[..., ::2, ::2] * self.latent_std[1], grain_map)
        x = self.from_codes(torch.cat([z, to_fine_grid(grain_map)[:, None].to(z.dtype)], dim=1))
        for i, level in enumerate(self.up):
            x = level(x if i == 0 else F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.pixel_head(x), self.config.stem) / 2 + 0.5

    def forward(self, images, grain_map):
        """Images [B, 3, H, W], maps [B, G, G] -> reconstruction [B, 3, H, W], mean KL divergence of
        a code's channel from N(0, 1)."""
        codes, kl = [], []
        for moments in self.moments(images):            # fine [B, 2C, 2G, 2G], coarse [B, 2C, G, G]
            mean, log_var = moments.float().chunk(2, dim=1)
            codes.append(mean + torch.randn_like(mean) * (log_var / 2).exp())
            kl.append((mean.square() + log_var.exp() - 1 - log_var) / 2)
        z = combine(*codes, grain_map)                  # after the noise, so that copies are equal
        return self.decode(z, grain_map), per_code_mean(combine(*kl, grain_map), grain_map).mean()


def training_maps(dvae, images):
    """Grain maps [B, G, G]. other_maps of the images are all fine, all coarse or random, so that
    one decoder serves every row of the toy's table."""
    c, grain_map = dvae.config, dvae.grain_map(images)
    kind = torch.rand(len(images), 1, 1, device=images.device) * 3
    random = torch.rand(grain_map.shape, device=images.device) < c.fine_share
    for i, other in enumerate((torch.ones_like(random), torch.zeros_like(random), random)):
        grain_map = torch.where((i <= kind) & (kind < i + c.other_maps), other, grain_map)
    return grain_map


def dvae_loss(network, dvae, perceptual, discriminator, adversary, images, labels):
    """Images [B, 3, H, W] -> loss, its parts: LDM's and DQ-VAE's (our choice: the paper does not
    say). network and adversary are dvae and discriminator, under torchrun wrapped."""
    c, grain_map = dvae.config, training_maps(dvae, images)
    reconstruction, kl = network(images, grain_map)     # [B, 3, H, W]
    parts = {"l1": F.l1_loss(reconstruction, images), "l2": F.mse_loss(reconstruction, images),
             "kl": kl}
    loss = parts["l1"] + c.l2_weight * parts["l2"] + c.kl_weight * kl
    if perceptual:
        parts["perceptual"] = perceptual.perceptual_loss(reconstruction, images)
        loss = loss + c.perceptual_weight * parts["perceptual"]
    if discriminator:       # it trains along from the first step, as DQ-VAE's
        frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
        parts["adversarial"] = -functional_call(discriminator, frozen, reconstruction).mean()
        both = torch.cat([images, reconstruction.detach()])
        parts["discriminator"] = vqgan.hinge_loss(*adversary(both).chunk(2))
        loss = loss + c.gan_weight * parts["adversarial"] + parts["discriminator"]
    return loss, parts


# ---- Transformer parts

class Block(nn.Module):
    """DiT's block, adaLN-zero: the condition gives shifts, scales and gates. Gates start at 0, so
    that a block starts as the identity."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"),
                                 nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, condition, keys=None):
        """x [B, T, D], condition [B, D] -> [B, T, D]; keys, if any: bool [B, T], what is seen."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(condition)[:, None].chunk(6, dim=-1))           # 6 x [B, 1, D]
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for t in self.qkv(y).chunk(3, dim=-1))                   # 3 x [B, h, T, D/h]
        mask = None if keys is None else keys[:, None, None]                # [B, 1, 1, T]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)         # [B, h, T, D/h]
        x = x + gate1 * self.proj(y.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalNorm(nn.Module):
    """DiT's last norm, with shift and scale by the condition."""
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, condition):            # [B, T, D], [B, D] -> [B, T, D]
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


def blocks(layers, config):
    return nn.ModuleList(Block(config.width, config.heads) for _ in range(layers))


def initialize(model):
    """DiT's: Xavier; std 0.02 for tables and the time's MLP; 0 for modulations and heads."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "modulation" in name or name.endswith("head"):
                nn.init.zeros_(module.weight)
        if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and ".time" in name):
            nn.init.normal_(module.weight, std=0.02)


# ---- Stage 2: the Dynamic Grain Transformer

MASK = 2        # a cell that is not drawn yet; coarse is 0, fine is 1


class GrainTransformer(nn.Module):
    """p(cell | class, the cells that are known), to draw a map cell by cell.

    Paper: cross-entropy on the grain of every region. Our choice: cells are masked at random, as in
    MaskGIT (2202.04200). From the class alone, cells would be drawn without regard to each other.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cell_embedding = nn.Embedding(3, config.width)
        self.class_embedding = nn.Embedding(config.num_classes, config.width)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(config.grid ** 2, config.width))
        self.blocks = blocks(config.layers, config)
        self.final = FinalNorm(config.width)
        self.head = nn.Linear(config.width, 2)
        initialize(self)

    def forward(self, cells, labels):
        """cells int64 [B, N] of 0, 1, MASK, labels [B] -> logits of coarse and fine [B, N, 2]."""
        condition = self.class_embedding(labels)                            # [B, D]
        x = self.cell_embedding(cells) + self.position_embedding            # [B, N, D]
        for block in self.blocks:
            x = block(x, condition)
        return self.head(self.final(x, condition))

    @torch.no_grad()
    def generate(self, labels, generator=None):
        """labels [B] -> maps bool [B, G, G]. Cells are drawn in random order, in unmask_steps
        passes; those of one pass do not know of each other, so more passes are more exact."""
        c, device = self.config, labels.device
        cells = torch.full((len(labels), c.grid ** 2), MASK, device=device)             # [B, N]
        order = torch.rand(cells.shape, generator=generator, device=device).argsort(1)  # [B, N]
        for now in order.tensor_split(min(c.unmask_steps, cells.shape[1]), dim=1):
            p = (self(cells, labels) / c.temperature).softmax(-1)[..., 1].gather(1, now)
            drawn = torch.rand(p.shape, generator=generator, device=device) < p
            cells = cells.scatter(1, now, drawn.long())
        return cells.bool().unflatten(1, (c.grid, c.grid))


def grain_loss(network, config, dvae, images, labels):
    """Images [B, 3, H, W], labels [B] -> loss, its parts: cross-entropy of masked cells. Their
    number is uniform in 1 .. N, so the expected loss is -log p of a cell, in nats, when cells are
    drawn one by one in random order."""
    cells = dvae.grain_map(images).flatten(1).long()                        # [B, N]
    count = torch.randint(1, cells.shape[1] + 1, (len(cells), 1), device=cells.device)
    masked = torch.rand(cells.shape, device=cells.device).argsort(1) < count    # [B, N]
    logits = network(cells.masked_fill(masked, MASK), labels).float()       # [B, N, 2]
    loss = F.cross_entropy(logits.flatten(0, 1), cells.flatten(), reduction="none").view_as(cells)
    loss = (loss * masked / count).sum(1).mean()
    return loss, {"bits": loss / math.log(2)}


# ---- Diffusion of codes of two grains (DDPM, 2006.11239)

TIME_STEPS = 1000
BETAS = torch.linspace(1e-4, 0.02, TIME_STEPS, dtype=torch.float64)         # DiT's
ALPHA_BARS = torch.cat([torch.cumprod(1 - BETAS, 0), torch.ones(1)])        # at -1, clean: 1


def alpha_bar(t, like):
    """The share of z_t's variance that is signal: t int64 [B] -> [B, 1, 1, 1]."""
    return ALPHA_BARS.to(like)[t][:, None, None, None]


def draw_noise(grain_map, channels, generator=None):
    """Standard normal [B, C, 2G, 2G]: one draw per code, copied in coarse regions. So z_t is
    constant there at every t, and all codes have the same signal-to-noise ratio: with a draw per
    place the four copies would average out, and coarse codes would be at another noise level."""
    B, G, _ = grain_map.shape
    noise = torch.randn(B, channels, 2 * G, 2 * G, generator=generator, device=grain_map.device)
    return combine(noise, noise[..., ::2, ::2], grain_map)


def add_noise(z, t, noise):
    """z_t, all [B, C, 2G, 2G]."""
    a = alpha_bar(t, z)
    return a.sqrt() * z + (1 - a).sqrt() * noise


def remove_noise(z_t, t, noise):
    """z, as the noise that was predicted has it."""
    a = alpha_bar(t, z_t)
    return (z_t - (1 - a).sqrt() * noise) / a.sqrt()


def posterior(z_t, z, t, s, v=-1.0):
    """q(z_s | z_t, z) of an earlier step s: mean (DDPM's equation 7) and log-variance. A learned
    variance, v = -1 .. 1, lies between the posterior's and its upper bound (2102.09672, equation
    15)."""
    a_t, a_s = alpha_bar(t, z), alpha_bar(s, z)
    beta = 1 - a_t / a_s
    mean = (a_s.sqrt() * beta * z + (a_t / a_s).sqrt() * (1 - a_s) * z_t) / (1 - a_t)
    low = (beta * (1 - a_s) / (1 - a_t)).clamp_min(1e-20).log()
    return mean, low + (v + 1) / 2 * (beta.log() - low)


# ---- Stage 3: the Dynamic Content Transformer, and DiT

class Condition(nn.Module):
    """Time steps [B] and labels [B] -> [B, D]; drop_label bool [B]: True hides the class."""
    def __init__(self, config):
        super().__init__()
        self.no_class = config.num_classes
        self.time = nn.Sequential(nn.Linear(256, config.width), nn.SiLU(),
                                  nn.Linear(config.width, config.width))
        self.classes = nn.Embedding(config.num_classes + 1, config.width)

    def forward(self, t, labels, drop_label):
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None] * frequencies                                   # [B, 128]
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return time + self.classes(labels.masked_fill(drop_label, self.no_class))


def to_tokens(z, size):         # [B, C, 2G, 2G] -> [B, T, C * size * size], size codes a side
    return F.pixel_unshuffle(z, size).flatten(2).transpose(1, 2)


def from_tokens(x, size):       # back
    side = math.isqrt(x.shape[1])
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (side, side)), size)


class ContentTransformer(nn.Module):
    """Predicts the noise: roughly everywhere, by DiT blocks on one token per region, then corrected
    in fine regions, by refine blocks on one token per fine code.

    Paper: DiT blocks, then RefineNet blocks; a routing module; a learnable position embedding. Our
    choice, which gives the paper's parameter counts: the router is a linear layer that merges the
    embeddings of a region's four places, and one that expands a region's token to four; refine
    blocks are DiT blocks, in which all fine codes of an image see each other; the correction is
    added; both heads share the final norm's modulation.
    """
    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        outputs = config.latent_channels * (1 + config.learn_sigma)
        self.condition = Condition(config)
        self.embed = nn.Linear(config.latent_channels, width)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(config.grid ** 2, 4, width))
        self.grain_embedding = nn.Embedding(2, width)
        self.merge = nn.Linear(4 * width, width)
        self.base_blocks = blocks(config.base_layers, config)
        self.final = FinalNorm(width)
        self.rough_head = nn.Linear(width, 4 * outputs)
        if config.refine_layers:
            self.expand = nn.Linear(width, 4 * width)
            self.refine_blocks = blocks(config.refine_layers, config)
            self.fine_head = nn.Linear(width, outputs)
        initialize(self)

    def forward(self, z_t, t, labels, grain_map, drop_label):
        """z_t [B, C, 2G, 2G], t and labels [B], map [B, G, G], drop_label bool [B] -> prediction,
        rough prediction, both [B, C, 2G, 2G] and constant in coarse regions. With learn_sigma 2C
        channels: noise, then v of the variance."""
        condition, is_fine = self.condition(t, labels, drop_label), grain_map.flatten(1)    # [B, N]
        places = to_tokens(z_t, 2).unflatten(2, (-1, 4)).transpose(2, 3)    # [B, N, 4, C]
        places = self.embed(places) + self.position_embedding               # [B, N, 4, D]
        x = self.merge(places.flatten(2)) + self.grain_embedding(is_fine.long())    # [B, N, D]
        for block in self.base_blocks:
            x = block(x, condition)
        rough = self.rough_head(self.final(x, condition)).unflatten(2, (4, -1))     # [B, N, 4, C]
        # a coarse region has one code, so one prediction
        rough = torch.where(is_fine[..., None, None], rough, rough.mean(2, keepdim=True))
        final = rough + self.correction(x, places, condition, is_fine)
        return tuple(from_tokens(p.transpose(2, 3).flatten(2), 2) for p in (final, rough))

    def correction(self, x, places, condition, is_fine):
        """Tokens of regions x [B, N, D], embeddings of places [B, N, 4, D], is_fine [B, N] ->
        [B, N, 4, C], 0 in coarse regions. Refine blocks see the codes of an image's fine regions,
        one token each, and nothing else."""
        if not self.config.refine_layers:
            return 0
        # the fine regions of each image first, then padding. M >= 1 also if none is fine, so that
        # DistributedDataParallel finds every parameter in use
        M = max(1, int(is_fine.sum(1).max()))
        chosen = is_fine.int().argsort(dim=1, descending=True, stable=True)[:, :M]      # [B, M]
        row = torch.arange(len(x), device=x.device)[:, None]                # [B, 1]
        real = is_fine[row, chosen]                                         # [B, M], False: padding
        tokens = self.expand(x[row, chosen]).unflatten(2, (4, -1)) + places[row, chosen]
        tokens = tokens.flatten(1, 2)       # [B, M, 4, D] -> [B, 4M, D]
        # padding is no key; in an image without fine regions it sees itself, and no one reads it
        keys = (real | ~real.any(1, keepdim=True)).repeat_interleave(4, 1)  # [B, 4M]
        for block in self.refine_blocks:
            tokens = block(tokens, condition, keys)
        tokens = self.fine_head(self.final(tokens, condition)).unflatten(1, (M, 4))  # [B, M, 4, C]
        correction = tokens.new_zeros(*places.shape[:3], tokens.shape[3])   # [B, N, 4, C]
        return correction.index_put((row, chosen), tokens * real[..., None, None])


class DiT(nn.Module):
    """The baseline (2212.09748): the same blocks on patches of a latent that is fine everywhere,
    with fixed positions. Called as the content transformer; it reads no map."""
    def __init__(self, config):
        super().__init__()
        self.config, self.patch = config, config.patch_size
        entries = config.latent_channels * self.patch ** 2
        self.condition = Condition(config)
        self.embed = nn.Linear(entries, config.width)
        self.blocks = blocks(config.base_layers, config)
        self.final = FinalNorm(config.width)
        self.head = nn.Linear(config.width, entries * (1 + config.learn_sigma))
        side, quarter = 2 * config.grid // self.patch, config.width // 4
        angles = torch.arange(side)[:, None] / 10_000 ** (torch.arange(quarter) / quarter)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)              # [side, D/2]
        positions = torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], dim=1)
        self.register_buffer("positions", positions, persistent=False)      # [T, D]
        initialize(self)

    def forward(self, z_t, t, labels, grain_map, drop_label):
        condition = self.condition(t, labels, drop_label)                   # [B, D]
        x = self.embed(to_tokens(z_t, self.patch)) + self.positions         # [B, T, D]
        for block in self.blocks:
            x = block(x, condition)
        prediction = from_tokens(self.head(self.final(x, condition)), self.patch)
        return prediction, prediction                                       # [B, C or 2C, 2G, 2G]


def content_loss(network, config, dvae, images, labels):
    """Images [B, 3, H, W], labels [B] -> loss, its parts, at random t."""
    with torch.autocast(images.device.type, enabled=False):
        z, grain_map = dvae.encode(images)                                  # [B, C, 2G, 2G]
    t = torch.randint(TIME_STEPS, (len(z),), device=z.device)               # [B]
    drop_label = torch.rand(len(z), device=z.device) < config.class_dropout
    noise = draw_noise(grain_map, z.shape[1])
    return denoising_loss(network, config, z, t, noise, labels, grain_map, drop_label)


def denoising_loss(network, config, z, t, noise, labels, grain_map, drop_label):
    """The dynamic grain loss (our choice of its form): squared error of the noise, each code
    counted once; with all regions fine, DiT's. The same of the rough prediction, with a weight."""
    C, z_t = z.shape[1], add_noise(z, t, noise)
    final, rough = network(z_t, t, labels, grain_map, drop_label)
    parts = {name: per_code_mean((prediction[:, :C] - noise).square(), grain_map).mean()
             for name, prediction in (("mse", final), ("rough", rough))}
    loss = parts["mse"]
    if config.refine_layers:
        loss = loss + config.rough_weight * parts["rough"]
    if config.learn_sigma:      # KL divergence of a DDPM step; trains the variance alone
        true_mean, log_q = posterior(z_t, z, t, t - 1)
        estimate = remove_noise(z_t, t, final[:, :C].detach())
        mean, log_p = posterior(z_t, estimate, t, t - 1, v=final[:, C:])
        kl = log_p - log_q - 1 + (log_q - log_p).exp() + (true_mean - mean) ** 2 / log_p.exp()
        parts["kl"] = (per_code_mean(kl, grain_map) * (t > 0)).mean() / 2       # t = 0: no noise
        loss = loss + parts["kl"] / math.log(2)         # in bits, as DiT's
    return loss, parts


@torch.no_grad()
def sample_latents(model, labels, grain_map, generator=None, **changes):
    """labels [B], maps [B, G, G] -> z [B, C, 2G, 2G] for DVAE.decode. changes: of ContentConfig."""
    c = replace(model.config, **changes)
    B, C, guided = len(labels), c.latent_channels, c.guidance_scale != 1
    R = 2 * B if guided else B      # both halves of the guidance are one pass, with the same map
    labels, maps = labels.repeat(R // B), grain_map.repeat(R // B, 1, 1)
    drop_label = torch.arange(R, device=labels.device) >= B                 # [R]
    z = draw_noise(grain_map, C, generator)
    steps = torch.linspace(TIME_STEPS - 1, -1, c.sampling_steps + 1).round().long()
    for t, s in zip(steps, steps[1:]):      # from step t to s; the last s is -1, clean
        t, s = (step.to(z.device).expand(B) for step in (t, s))             # [B]
        prediction, _ = model(z.repeat(R // B, 1, 1, 1), t.repeat(R // B), labels, maps, drop_label)
        noise = prediction[:B, :C]
        if guided:
            without_class = prediction[B:, :C]
            noise = without_class + c.guidance_scale * (noise - without_class)
        estimate = remove_noise(z, t, noise)
        if c.sampler == "ddim":             # 2010.02502: no new noise
            z = add_noise(estimate, s, noise)
            continue
        v = prediction[:B, C:] if c.learn_sigma else -1.0
        mean, log_variance = posterior(z, estimate, t, s, v)
        new = draw_noise(grain_map, C, generator) if s[0] >= 0 else 0
        z = mean + (log_variance / 2).exp() * new
    return z


# ---- Training: one loop for all stages, which differ in model and loss alone

def build(config):
    kind = {DVAEConfig: DVAE, GrainConfig: GrainTransformer, ContentConfig: ContentTransformer}
    return (DiT if getattr(config, "model", "") == "dit" else kind[type(config)])(config)


def load_stage(path, stage, device="cpu"):
    """A trained model of a stage: averaged weights, frozen, in eval mode. .classes: their names;
    .dvae: fingerprint of the DVAE that it was trained with."""
    saved = trainer.load_checkpoint(path, f"d2it_{stage}", f"python d2it.py --stage {stage}")
    model = trainer.load_model(build, CONFIGS[stage], saved, path)
    model.classes, model.dvae = saved["classes"], saved["settings"].get("dvae")
    return model.to(device)


def train(args, config, training):
    """All of the stage's model trains, and a discriminator with it. Frozen: the DVAE in later
    stages, the perceptual network."""
    data.find_folder(args.data)     # what is missing is named before an earlier stage is
    stage, name, dvae, settings = args.stage, f"d2it_{args.stage}", None, {}
    if stage != "dvae":
        dvae = load_stage(args.out / "d2it_dvae.pt", "dvae", args.device)
        settings = {"dvae": trainer.fingerprint(dvae)}
        if dvae.latent_std.eq(1).all():
            raise BadInput(f"{args.out}/d2it_dvae.pt: not trained to its last step. Continue with "
                           f"python d2it.py --stage dvae --resume")
    size = (dvae.config if dvae else config).image_size
    train_set = data.open_dataset(args.data, "train", size, augment=True, draft=True)
    if dvae:
        config = replace(config, grid=dvae.config.grid, num_classes=len(train_set.classes))
    if stage == "content":
        config = replace(config, latent_channels=dvae.config.latent_channels)
    if getattr(config, "model", "") == "dit":
        # full size: train its DVAE with --other_maps, or fine codes of smooth regions never train
        name, dvae.config = f"dit_{config.patch_size}", replace(dvae.config, grain="fine")
    run = trainer.Run(args, f"d2it_{stage}", name, config, training, train_set, SAMPLING,
                      {"classes": list(train_set.classes)}, **settings)

    if training.compile:
        trainer.compile_methods(Block, "forward")
    model = build(config).to(run.device, memory_format=torch.channels_last)     # faster
    network, trained, saved = run.parallel(model), nn.ModuleList([model]), {}
    if stage == "dvae":
        rows = np.random.default_rng(0).permutation(len(train_set))[:2048]
        images = torch.cat([images for images, _ in data.all_images(train_set, 64, rows)])
        some_images = images.to(run.device)
        model.set_threshold(some_images)
        perceptual = vqgan.perceptual_network(config.perceptual, train_set, args.out, args.convnext,
                                              run.device)
        discriminator = adversary = None
        if config.gan_weight:
            discriminator = vqgan.Discriminator(grid=min(16, size // 8)).to(run.device)
            adversary, saved["discriminator"] = run.parallel(discriminator), discriminator
            trained.append(discriminator)
        loss_fn = partial(dvae_loss, network, model, perceptual, discriminator, adversary)
    else:
        loss_fn = partial(grain_loss if stage == "grain" else content_loss, network, config, dvae)
    optimizer = trainer.adamw(trained, training)
    ema = trainer.Ema(model, training.ema)
    saved.update(model=model, ema=ema, optimizer=optimizer)
    run.start(**saved)
    batches = data.batches(train_set, training.batch_size, args.seed, run.step, *run.share,
                           training.workers)

    for step in range(run.step, training.steps):
        trainer.set_lr(optimizer, trainer.cosine(step, training))
        optimizer.zero_grad()
        for images, labels in run.micro_batches(batches, network):          # [B, 3, H, W], [B]
            with run.autocast():
                loss, values = loss_fn(images, labels)
            (loss / run.accumulate).backward()
            run.add(loss=loss, **values)
        grad_norm = nn.utils.clip_grad_norm_(trained.parameters(), training.clip)
        optimizer.step()
        ema.update(model)
        if stage == "dvae" and step + 1 == training.steps:
            ema.model.set_latent_std(some_images)
        run.log(step, grad_norm=grad_norm)
        run.save_if_due(step, **saved)


# ---- Pictures, sizes, command line

def map_pictures(grain_map, size):      # [n, G, G] -> [n, 3, H, W], fine regions bright
    x = 0.2 + 0.6 * grain_map[:, None].float()
    return F.interpolate(x, (size, size), mode="nearest").expand(-1, 3, -1, -1)


def generate(labels, dvae, grain, content, generator, **changes):
    """labels [n] -> images [n, 3, H, W] in [0, 1] and their maps [n, G, G], 100 at a time."""
    images, maps = [], []
    for batch in labels.split(100):
        maps.append(grain.generate(batch, generator))
        z = sample_latents(content, batch, maps[-1], generator, **changes)
        images.append(dvae.decode(z, maps[-1]).clamp(0, 1))
    return torch.cat(images), torch.cat(maps)


def sample(args):
    """--sample: new images, each beside its grain map, in one picture."""
    models = {stage: load_stage(args.out / f"d2it_{stage}.pt", stage, args.device)
              for stage in CONFIGS}
    for stage in ("grain", "content"):
        if models[stage].dvae != trainer.fingerprint(models["dvae"]):
            raise BadInput(f"{args.out}/d2it_{stage}.pt: trained on another d2it_dvae.pt. Train it "
                           f"again: python d2it.py --stage {stage} --overwrite")
    names, count = models["grain"].classes, args.sample
    wanted = find_classes(args.classes, names) if args.classes else range(len(names))
    labels = torch.tensor([wanted[i * len(wanted) // count] for i in range(count)])     # [n]
    changes = {name: getattr(args, name) for name in SAMPLING if hasattr(args, name)}
    generator = torch.Generator(args.device).manual_seed(args.seed)
    images, maps = generate(labels.to(args.device), *models.values(), generator, **changes)
    pairs = torch.stack([images, map_pictures(maps, images.shape[-1])], 1)  # [n, 2, 3, H, W]
    path = Path(args.output or args.out / "d2it_samples.png")
    scale = max(1, 64 // images.shape[-1])
    data.save_picture(data.picture_grid(pairs.flatten(0, 1), 16, scale), path)
    print(f"{path}: {count} samples, each beside its grain map")


def print_params():
    """Parameters of all presets, in millions, beside the paper's."""
    for stage, presets in PRESETS.items():
        for name, config in presets.items():
            with torch.device("meta"):
                count = sum(p.numel() for p in build(config).parameters())
            paper = f"   paper: {PAPER[name]}M" if name in PAPER else ""
            print(f"{stage:8} {name:8} {count / 1e6:8.2f}M{paper}")


def main():
    found = re.search(r"--stage[ =](dvae|grain)", " ".join(sys.argv))   # each has its own flags
    stage = found[1] if found else "content"
    parser = trainer.command_line(__doc__, CONFIGS[stage], TrainConfig)
    add = parser.add_argument
    add("--stage", choices=tuple(CONFIGS), default="content", help="what to train; -h for each")
    if stage == "dvae":
        add("--convnext", metavar="FILE", default="weights/convnext_small.pth",
            help="torchvision's convnext_small, for --perceptual convnext")
    if stage == "content":
        add("--baseline", action="store_true", help="train DiT on fine codes; --patch_size 1 or 2")
        add("--preset", choices=tuple(PRESETS["content"]), metavar="NAME",
            help="d2it_b, d2it_l, dit_l, .. (--params)")
    add("--params", action="store_true", help="print the sizes of all presets, and the paper's")
    add("--sample", type=int, metavar="N", help="write N new images with their grain maps")
    add("--classes", help="names or numbers, such as 3,bag; default: all")
    add("--output", metavar="FILE", help="of --sample; default: OUT/d2it_samples.png")
    args = trainer.parse(parser)
    if args.params:
        return print_params()
    if args.sample:
        return sample(args)
    preset = args.config
    if stage == "content":
        size = {"toy": "toy", "small": "b", "full": "xl"}[args.config]
        preset = args.preset or f"{'dit' if args.baseline else 'd2it'}_{size}"
    train(args, trainer.override(PRESETS[stage][preset], args),
          trainer.override(TRAINING[stage][args.config], args))


if __name__ == "__main__":
    trainer.launch(main)
