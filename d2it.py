"""D2iT, the second system: detailed regions of an image get more codes than smooth ones.

    python d2it.py --stage dvae                     # 1: images <-> codes of two grains
    python d2it.py --stage grain                    # 2: class -> grain map
    python d2it.py --stage content                  # 3: class, grain map -> codes
    python d2it.py --stage content --baseline       # DiT on the fine codes, to compare with
    python d2it.py --sample 64 --classes 3,bag      # class -> grain map -> codes -> image
    python d2it.py --params                         # sizes, beside the paper's

The idea (D2iT, arXiv 2504.09454; the Dynamic VAE builds on DQ-VAE, arXiv 2305.11718). A diffusion
transformer such as DiT compresses all regions of an image alike. Here an image is cut into regions.
A smooth region is coarse: one code. A detailed region is fine: 2 x 2 codes. The grain map says
which is which. In training it is computed from the image: a region is fine where the entropy of its
grey values is above a threshold. When sampling there is no image yet: a transformer draws the map.

    image -> entropy of each region -> grain map                                 (no network)
    image -> encoder -> a code per region, 2 x 2 codes per region -> one of the two, by the map
          -> decoder (sees the map) -> image                                     Dynamic VAE
    class -> grain map, by unmasking                              Dynamic Grain Transformer
    class, map, noise -> codes, by diffusion                      Dynamic Content Transformer

Codes are real-valued vectors. To keep tensors regular, a coarse region's code is copied to its four
places of the fine grid; it still is one code: it gets one draw of noise, and counts once in the
loss. The content transformer predicts the noise twice: roughly, by DiT blocks on one token per
region; then DiT blocks on the fine regions' codes alone add a correction.

Sources. The paper's code is not public, and of the paper only the abstract, tables and captions
were at hand. "Paper": these say it. "Our choice": they do not; docs/d2it.md lists all of them. The
wiring of the content transformer is ours; its parameter counts agree with the paper's.

Three grains need: another head and another copy in the DVAE, a second threshold, maps of 0, 1, 2,
a merge and an expansion per step between grains, and refine blocks for each finer grain.

Letters: B batch, H W pixels, G side of the grain map, N = G*G regions, S = H/G side of a region, P
bins, C channels of a code, D width, h heads, T length of a sequence, M most fine regions in an
image of the batch, t time step. Images are float32 [B, 3, H, W] in [0, 1], grain maps bool
[B, G, G], True where fine, latents z [B, C, 2G, 2G], constant in each coarse region.
"""
import math
import re
import sys
from dataclasses import asdict, dataclass, replace
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
    grain: Literal["entropy", "variance", "random", "fine", "coarse"] = "entropy"   # what decides
    fine_share: float = 0.5         # share of the training set's regions that are fine
    image_size: int = 256           # H = W
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)     # at each resolution, half the one before
    stem: int = 1                   # pixels per side that the first convolution takes together
    res_blocks: int = 2             # residual blocks at each resolution
    norm_groups: int = 32           # of GroupNorm
    latent_channels: int = 4        # C
    sigma: float = 0.01             # of the entropy's kernel, for grey values in [0, 1]
    l1_weight: float = 1.0          # of the losses of the pixels
    l2_weight: float = 0.0          # the same, squared
    perceptual: Literal["small", "convnext", "none"] = "convnext"   # network of the perceptual loss
    perceptual_weight: float = 1.0  # of its loss
    kl_weight: float = 1e-6         # of the KL divergence to N(0, 1), summed over an image's codes
    gan_weight: float = 0.1         # of the adversarial loss; 0: no discriminator
    other_maps: float = 0.0         # share of images that train on all fine, all coarse, random maps

    @property
    def region(self) -> int:        # S, pixels
        return self.stem * 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:          # G
        return self.image_size // self.region

    def __post_init__(self):
        if self.image_size % self.region or len(self.widths) < 2:
            raise BadInput(f"--image_size {self.image_size}: not a multiple of the region's "
                           f"{self.region} pixels")


@dataclass(frozen=True)
class GrainConfig:
    width: int = 384                # D; DiT-S, which two other reimplementations took
    layers: int = 12                # DiT blocks
    heads: int = 6                  # h
    grid: int = 16                  # G, from dvae.pt
    num_classes: int = 1000         # from the data
    unmask_steps: int = 32          # forward passes when sampling; N: one cell at a time
    temperature: float = 1.0        # of the softmax, when sampling


@dataclass(frozen=True)
class ContentConfig:
    model: Literal["d2it", "dit"] = "d2it"  # dit: --baseline
    width: int = 1152               # D
    base_layers: int = 24           # DiT blocks on the regions
    refine_layers: int = 4          # DiT blocks on the codes of fine regions
    heads: int = 16                 # h
    patch_size: int = 2             # dit: codes per side of a token
    grid: int = 16                  # G, from dvae.pt
    latent_channels: int = 4        # C, from dvae.pt
    num_classes: int = 1000         # from the data
    learn_sigma: bool = True        # predict the variance of a DDPM step, too (DiT)
    rough_weight: float = 0.25      # of the rough prediction's own loss
    class_dropout: float = 0.1      # share of images without class in training (DiT)
    sampler: Literal["ddim", "ddpm"] = "ddpm"   # when sampling
    sampling_steps: int = 250       # of the 1000 (DiT)
    guidance_scale: float = 1.5     # 1: none


CONFIGS = {"dvae": DVAEConfig, "grain": GrainConfig, "content": ContentConfig}
SAMPLING = {"sampler", "sampling_steps", "guidance_scale", "unmask_steps", "temperature"}
DVAES = {
    "toy": DVAEConfig(image_size=32, widths=(32, 64, 96), stem=2, res_blocks=1, norm_groups=4,
                      sigma=0.02, l2_weight=10.0, perceptual="none", kl_weight=1e-4,
                      gan_weight=0.0, other_maps=0.5),
    "small": DVAEConfig(), "full": DVAEConfig()}
GRAINS = {
    "toy": GrainConfig(width=64, layers=3, heads=4, unmask_steps=16),
    "small": GrainConfig(), "full": GrainConfig()}
# The paper splits D2iT-B into 10 + 2 layers (Table 4); of L and XL only the parameters are known
D2IT_XL = ContentConfig()
D2IT_L = replace(D2IT_XL, width=1024, base_layers=20)
D2IT_B = replace(D2IT_XL, width=768, base_layers=10, refine_layers=2, heads=12)
D2IT_TOY = ContentConfig(width=96, base_layers=4, refine_layers=2, heads=4, learn_sigma=False,
                         sampler="ddim", sampling_steps=25)
DIT_XL = replace(D2IT_XL, model="dit", base_layers=28, refine_layers=0)
DIT_L = replace(DIT_XL, width=1024, base_layers=24)
DIT_B = replace(DIT_XL, width=768, base_layers=12, heads=12)
DIT_TOY = replace(D2IT_TOY, model="dit", base_layers=6, refine_layers=0)
PRESETS = {"toy": D2IT_TOY, "small": D2IT_B, "full": D2IT_XL,
           "d2it_b": D2IT_B, "d2it_l": D2IT_L, "d2it_xl": D2IT_XL,
           "dit_toy": DIT_TOY, "dit_small": DIT_B, "dit_full": DIT_XL,
           "dit_b": DIT_B, "dit_l": DIT_L, "dit_xl": DIT_XL}
PAPER = {"d2it_l": 467e6, "d2it_xl": 687e6, "dit_l": 457.84e6, "dit_xl": 674.83e6}  # parameters
TOY = TrainConfig(steps=600, batch_size=32, learning_rate=2e-3, end_learning_rate=1e-4, warmup=50,
                  weight_decay=0.0, beta2=0.99, ema=0.995, workers=0, log_every=50, save_every=200,
                  preview_every=600)
# DiT's recipe; the paper's is not known
DIT = TrainConfig(steps=400_000, learning_rate=1e-4, end_learning_rate=1e-4, warmup=0, beta2=0.999,
                  weight_decay=0.0, ema=0.9999, preview_every=50_000)
TRAINING = {
    ("dvae", "toy"): TOY, ("grain", "toy"): TOY, ("content", "toy"): TOY,
    ("dvae", "full"): TrainConfig(micro_batch=16, beta1=0.5, beta2=0.9),
    ("grain", "full"): DIT, ("content", "full"): DIT}
for stage in ("dvae", "grain", "content"):
    TRAINING[stage, "small"] = TRAINING[stage, "full"]


# ---- Grain: which regions are detailed

def entropy(grey, region, sigma):
    """Grey values [B, H, W] in [0, 1] -> entropy of each region [B, G, G], in nats.

    Paper, equations 2 and 3: the kernel density of a region's S*S values at P = S*S bins, then its
    Shannon entropy. Our choice: the bins reach 4 sigma beyond black and white, or regions of these
    would lose half of their kernels; and values are rounded to 8 bits, so that the sum over pixels
    is a histogram times a table.
    """
    x = F.unfold(grey[:, None], region, stride=region).transpose(1, 2)      # [B, N, S*S]
    levels = (x * 255).round().long().clamp(0, 255)
    counts = torch.zeros(*x.shape[:2], 256, device=x.device)                # [B, N, 256]
    counts.scatter_add_(2, levels, torch.ones_like(x))
    level = torch.linspace(0, 1, 256, device=x.device)
    bins = torch.linspace(-4 * sigma, 1 + 4 * sigma, region ** 2, device=x.device)      # [P]
    density = counts @ torch.exp(-0.5 * ((level[:, None] - bins) / sigma) ** 2)     # [B, N, P]
    p = density / density.sum(-1, keepdim=True)
    grid = grey.shape[-1] // region
    return -(p * p.clamp_min(1e-40).log()).sum(-1).unflatten(1, (grid, grid))       # [B, G, G]


def to_fine_grid(x):
    """[..., G, G] -> [..., 2G, 2G], each value copied to its 2 x 2 places."""
    return x.repeat_interleave(2, -2).repeat_interleave(2, -1)


def combine(fine, coarse, grain_map):
    """Neighbour copying: fine [B, C, 2G, 2G] where the map [B, G, G] is True, copies of coarse
    [B, C, G, G] elsewhere -> [B, C, 2G, 2G]."""
    return torch.where(to_fine_grid(grain_map)[:, None], fine, to_fine_grid(coarse))


def per_code_mean(values, grain_map):
    """values [B, C, 2G, 2G] -> [B], the mean over an image's codes. A coarse region's value stands
    at four places and counts once: N_coarse + 4 N_fine codes."""
    weight = torch.where(to_fine_grid(grain_map), 1.0, 0.25)                # [B, 2G, 2G]
    return (values.mean(1) * weight).sum((1, 2)) / weight.sum((1, 2))


# ---- Stage 1: the Dynamic VAE

def res_blocks(c_in, c_out, config):
    return nn.Sequential(*(vqgan.ResBlock(c_in if i == 0 else c_out, c_out, config.norm_groups)
                           for i in range(config.res_blocks)))


def head(width, c_out, groups, size=1):
    return nn.Sequential(nn.GroupNorm(groups, width, eps=1e-6), nn.SiLU(),
                         nn.Conv2d(width, c_out, size, padding=size // 2))


class DVAE(nn.Module):
    """One chain of convolutions with two heads, the fine one before the last downsampling; a
    decoder that starts from the fine grid. Without attention (our choice)."""
    def __init__(self, config):
        super().__init__()
        self.config, w, groups = config, config.widths, config.norm_groups
        moments, pixels = 2 * config.latent_channels, 3 * config.stem ** 2
        self.conv_in = nn.Conv2d(pixels, w[0], 3, padding=1)
        self.down = nn.ModuleList(res_blocks(c_in, c_out, config)
                                  for c_in, c_out in zip([w[0], *w], w))
        self.fine_head = nn.Sequential(res_blocks(w[-2], w[-2], config),
                                       head(w[-2], moments, groups))
        self.coarse_head = nn.Sequential(res_blocks(w[-1], w[-1], config),
                                         head(w[-1], moments, groups))
        self.conv_up = nn.Conv2d(config.latent_channels + 1, w[-2], 3, padding=1)
        self.up = nn.ModuleList(res_blocks(c_in, c_out, config)     # from the fine grid to pixels
                                for c_in, c_out in zip([w[-2], *w[-2::-1]], w[-2::-1]))
        self.conv_out = head(w[0], pixels, groups, size=3)
        self.register_buffer("threshold", torch.zeros(()))          # of a region's complexity

    def complexity(self, images):
        """Images [B, 3, H, W] -> what is compared with the threshold, [B, G, G]."""
        c, red_green_blue = self.config, torch.tensor([0.299, 0.587, 0.114], device=images.device)
        grey = torch.einsum("bchw,c->bhw", images, red_green_blue)
        if c.grain == "entropy":
            return entropy(grey, c.region, c.sigma)
        if c.grain == "variance":
            grey = grey.unflatten(2, (-1, c.region)).unflatten(1, (-1, c.region))
            return grey.var((2, 4))                                         # of [B, G, S, G, S]
        return torch.rand(len(images), c.grid, c.grid, device=images.device)

    @torch.no_grad()
    def set_threshold(self, images):
        """The percentile that makes fine_share of the regions of these training images fine: a
        share of the data set, not of each image (paper)."""
        if self.config.grain not in ("fine", "coarse"):
            scores = torch.cat([self.complexity(batch).flatten() for batch in images.split(64)])
            self.threshold.copy_(torch.quantile(scores, 1 - self.config.fine_share))

    @torch.no_grad()
    def grain_map(self, images):
        """Images [B, 3, H, W] -> bool [B, G, G]. A fixed rule, without gradient or loss (paper)."""
        if self.config.grain in ("fine", "coarse"):
            shape = len(images), self.config.grid, self.config.grid
            return torch.full(shape, self.config.grain == "fine", device=images.device)
        return self.complexity(images) > self.threshold

    def moments(self, images):
        """Images [B, 3, H, W] -> (mean and log-variance of fine codes [B, 2C, 2G, 2G], of coarse
        ones [B, 2C, G, G])."""
        x = self.conv_in(F.pixel_unshuffle(images * 2 - 1, self.config.stem))
        for i, blocks in enumerate(self.down):
            before, x = x, blocks(x if i == 0 else F.avg_pool2d(x, 2))      # [B, widths[i], ..]
        return self.fine_head(before), self.coarse_head(x)

    @torch.no_grad()
    def encode(self, images, grain_map=None):
        """Images [B, 3, H, W] -> latents z [B, C, 2G, 2G] (means) and the map [B, G, G]."""
        grain_map = self.grain_map(images) if grain_map is None else grain_map
        (fine, _), (coarse, _) = (m.chunk(2, dim=1) for m in self.moments(images))
        return combine(fine, coarse, grain_map), grain_map

    def decode(self, z, grain_map):
        """z [B, C, 2G, 2G], map [B, G, G] -> images [B, 3, H, W], not clamped. The decoder is told
        the map (our choice), so that it knows which 2 x 2 places are copies."""
        x = torch.cat([z, to_fine_grid(grain_map)[:, None].to(z.dtype)], dim=1)
        x = self.conv_up(x)                                                 # [B, widths[-2], 2G, 2G]
        for i, blocks in enumerate(self.up):
            x = blocks(x if i == 0 else F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.conv_out(x), self.config.stem) / 2 + 0.5


class DVAELoss(nn.Module):
    """Pixels, perceptual network, KL divergence; and a discriminator, which trains along."""
    def __init__(self, model, perceptual, discriminator):
        super().__init__()
        self.model, self.perceptual, self.discriminator = model, perceptual, discriminator

    def training_maps(self, images):
        """The grain maps, but of other_maps of the images one that is all fine, all coarse or
        random: for a decoder that serves every row of the toy's table."""
        grain_map = self.model.grain_map(images)                            # [B, G, G]
        kind = torch.rand(len(images), 1, 1, device=images.device) / self.model.config.other_maps
        random = torch.rand(grain_map.shape, device=images.device) < 0.5
        for limit, other in ((1, random), (2 / 3, False), (1 / 3, True)):
            grain_map = torch.where(kind < limit, other, grain_map)
        return grain_map

    def forward(self, images, labels=None):
        """Images [B, 3, H, W] -> loss, its parts."""
        c = self.model.config
        grain_map = (self.training_maps(images) if c.other_maps else self.model.grain_map(images))
        codes, kl = [], []
        for moments in self.model.moments(images):      # fine [B, 2C, 2G, 2G], coarse [B, 2C, G, G]
            mean, log_var = moments.float().chunk(2, dim=1)
            log_var = log_var.clamp(-30, 20)
            codes.append(mean + torch.randn_like(mean) * (log_var / 2).exp())
            kl.append((mean.square() + log_var.exp() - 1 - log_var) / 2)
        z = combine(*codes, grain_map)                  # noise is drawn before a code is copied
        reconstruction = self.model.decode(z, grain_map)
        # both sums over an image, over its pixels (LDM)
        places = torch.where(to_fine_grid(grain_map), 1.0, 0.25)            # [B, 2G, 2G]
        kl = (combine(*kl, grain_map).sum(1) * places).sum() / images.numel()
        error = reconstruction - images
        parts = {"l1": error.abs().mean(), "l2": error.square().mean(), "kl": kl,
                 "fine": grain_map.float().mean()}
        loss = c.l1_weight * parts["l1"] + c.l2_weight * parts["l2"] + c.kl_weight * kl
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual.perceptual_loss(reconstruction, images)
            loss = loss + c.perceptual_weight * parts["perceptual"]
        if self.discriminator is not None:      # from the first step, as DQ-VAE
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            parts["adversarial"] = -functional_call(self.discriminator, frozen, reconstruction).mean()
            real, fake = self.discriminator(torch.cat([images, reconstruction.detach()])).chunk(2)
            parts["discriminator"] = vqgan.hinge_loss(real, fake)
            loss = loss + c.gan_weight * parts["adversarial"] + parts["discriminator"]
        return loss, parts


# ---- Diffusion of codes of two grains

TIME_STEPS = 1000
BETAS = torch.linspace(1e-4, 0.02, TIME_STEPS, dtype=torch.float64)         # DiT's
ALPHA_BARS = torch.cumprod(1 - BETAS, 0)        # share of the signal's variance left at t


def alpha_bar(t, like):
    """t int64 [B], -1 for clean -> [B, 1, 1, 1]."""
    values = torch.cat([ALPHA_BARS, torch.ones(1, dtype=torch.float64)])    # index -1: 1
    return values.to(like)[t][:, None, None, None]


def draw_noise(grain_map, channels, generator=None):
    """Standard normal [B, C, 2G, 2G]: one draw per code, copied in coarse regions. So z_t stays
    constant there at every t, and all codes have the same ratio of signal to noise. Independent
    draws at the four places would average out: a coarse code would be at another noise level."""
    (B, G, _), device = grain_map.shape, grain_map.device
    fine = torch.randn(B, channels, 2 * G, 2 * G, generator=generator, device=device)
    return combine(fine, fine[..., ::2, ::2], grain_map)


def add_noise(z, t, noise):
    """z_t = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) noise, all [B, C, 2G, 2G]."""
    a = alpha_bar(t, z)
    return a.sqrt() * z + (1 - a).sqrt() * noise


def posterior(z_t, z, t, s):
    """q(z_s | z_t, z) for s < t, -1 for clean: mean [B, C, 2G, 2G], variance and its upper bound
    beta [B, 1, 1, 1]. DDPM (2006.11239), equation 7, for any two steps."""
    a_t, a_s = alpha_bar(t, z), alpha_bar(s, z)
    beta = 1 - a_t / a_s
    mean = (a_s.sqrt() * beta * z + (a_t / a_s).sqrt() * (1 - a_s) * z_t) / (1 - a_t)
    return mean, beta * (1 - a_s) / (1 - a_t), beta


def clean_estimate(z_t, t, noise):
    a = alpha_bar(t, z_t)
    return (z_t - (1 - a).sqrt() * noise) / a.sqrt()


def log_variance(v, variance, beta):
    """The learned variance of a DDPM step: v from -1 to 1 goes from the posterior's variance to
    beta, in logarithms (2102.09672, equation 15)."""
    low, high = variance.clamp_min(1e-20).log(), beta.log()
    return low + (v + 1) / 2 * (high - low)


# ---- Transformer parts, of the grain and the content transformer and of the baseline

class Block(nn.Module):
    """DiT's block with adaLN-zero: the condition gives shift, scale and gate of attention and MLP.
    The gates start at 0, so a block starts as the identity."""
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
        """x [B, T, D], condition [B, D] -> [B, T, D]; keys: bool [B, T], True where attended to."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(condition)[:, None].chunk(6, dim=-1))           # 6 x [B, 1, D]
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in self.qkv(y).chunk(3, dim=-1))                # 3 x [B, h, T, D/h]
        mask = None if keys is None else keys[:, None, None]                # [B, 1, 1, T]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + gate1 * self.proj(y.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalNorm(nn.Module):
    """DiT's last norm, with shift and scale from the condition."""
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, condition):            # [B, T, D], [B, D] -> [B, T, D]
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


def initialize(model):
    """DiT's: Xavier; embeddings of time and class with std 0.02; gates and heads at 0."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if ".time" in name:
                nn.init.normal_(module.weight, std=0.02)
            if "modulation" in name or name.endswith("head"):
                nn.init.zeros_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


def table(*shape):
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=0.02))


# ---- Stage 2: the Dynamic Grain Transformer, class -> grain map

MASK = 2        # a cell of which it is not known yet whether it is coarse (0) or fine (1)


class GrainTransformer(nn.Module):
    """Learns p(cell | class, any other cells), so that it can draw a map cell by cell.

    Paper: cross-entropy on the grain of every region. Our choice: the input is the map with a
    random part masked (MaskGIT, 2202.04200), the loss is on the masked cells. From the class alone
    each cell would be drawn without regard to the others, and maps would be noise.
    """
    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        self.cell_embedding = nn.Embedding(3, width)
        self.class_embedding = nn.Embedding(config.num_classes, width)
        self.position_embedding = table(config.grid ** 2, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.final = FinalNorm(width)
        self.head = nn.Linear(width, 2)
        initialize(self)

    def forward(self, cells, labels):
        """cells int64 [B, N] of 0, 1, MASK; labels [B] -> logits of coarse and fine [B, N, 2]."""
        condition = self.class_embedding(labels)                            # [B, D]
        x = self.cell_embedding(cells) + self.position_embedding            # [B, N, D]
        for block in self.blocks:
            x = block(x, condition)
        return self.head(self.final(x, condition))

    @torch.no_grad()
    def generate(self, labels, generator=None):
        """labels [B] -> grain maps bool [B, G, G]: cells are drawn in random order, in
        unmask_steps passes, each given all cells of earlier passes. More passes are more exact."""
        c, N, device = self.config, self.config.grid ** 2, labels.device
        cells = torch.full((len(labels), N), MASK, device=device)
        order = torch.rand(cells.shape, generator=generator, device=device).argsort(1)  # [B, N]
        for now in order.tensor_split(min(c.unmask_steps, N), dim=1):       # [B, N / steps]
            logits = self(cells, labels)[..., 1] - self(cells, labels)[..., 0]
            p = (logits / c.temperature).sigmoid().gather(1, now)           # of fine
            drawn = torch.rand(p.shape, generator=generator, device=device) < p
            cells = cells.scatter(1, now, drawn.long())
        return cells.bool().unflatten(1, (c.grid, c.grid))


class GrainLoss(nn.Module):
    """Cross-entropy of masked cells. How many is uniform in 1 .. N: then the expected loss is the
    mean -log p of a cell, in nats, when cells are drawn one by one in random order."""
    def __init__(self, model, dvae):
        super().__init__()
        self.model, self.dvae = model, dvae

    def forward(self, images, labels):
        """Images [B, 3, H, W], labels [B] -> loss, its parts."""
        return self.of_cells(self.dvae.grain_map(images).flatten(1).long(), labels)

    def of_cells(self, cells, labels):      # int64 [B, N]
        count = torch.randint(1, cells.shape[1] + 1, (len(cells), 1), device=cells.device)
        masked = torch.rand(cells.shape, device=cells.device).argsort(1) < count        # [B, N]
        logits = self.model(cells.masked_fill(masked, MASK), labels).float()            # [B, N, 2]
        loss = F.cross_entropy(logits.flatten(0, 1), cells.flatten(), reduction="none")
        loss = (loss.view_as(cells) * masked / count).sum(1).mean()
        return loss, {"bits": loss / math.log(2)}


# ---- Stage 3: the Dynamic Content Transformer, class and grain map -> codes

class Condition(nn.Module):
    """Of time step and class, or "no class" for classifier-free guidance, to [B, D]."""
    def __init__(self, config):
        super().__init__()
        self.no_class = config.num_classes
        self.time = nn.Sequential(nn.Linear(256, config.width), nn.SiLU(),
                                  nn.Linear(config.width, config.width))
        self.classes = nn.Embedding(config.num_classes + 1, config.width)

    def forward(self, t, labels, drop_label=None):      # [B], [B], bool [B]
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None] * frequencies                                   # [B, 128]
        if drop_label is not None:
            labels = labels.masked_fill(drop_label, self.no_class)
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.classes(labels)


def to_patches(z, size):
    """[B, C, 2G, 2G] -> [B, patches, size*size, C], row by row, also in a patch."""
    z = z.unflatten(3, (-1, size)).unflatten(2, (-1, size))     # [B, C, rows, size, columns, size]
    return z.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def from_patches(x, size):      # back
    side = math.isqrt(x.shape[1])
    x = x.unflatten(2, (size, size)).unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4)
    return x.flatten(4, 5).flatten(2, 3)


class ContentTransformer(nn.Module):
    """Predicts the noise: roughly everywhere, by DiT blocks on one token per region, then with a
    correction of the fine regions, by refine blocks on one token per fine code.

    Paper: DiT blocks, then RefineNet blocks; a routing module; a learnable position embedding.
    Our choice, which gives the paper's parameter counts: the router is a linear layer that merges a
    region's four embeddings (in a coarse region, of four copies) and one that expands a token to
    four; refine blocks are DiT blocks, all fine codes of an image attend to each other; the
    correction is added; one final norm is shared by both heads.
    """
    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.width
        channels = config.latent_channels * (1 + config.learn_sigma)
        self.condition = Condition(config)
        self.embed = nn.Linear(config.latent_channels, D)
        self.position_embedding = table(config.grid ** 2, 4, D)     # of a region's four codes
        self.merge = nn.Linear(4 * D, D)
        self.grain_embedding = nn.Embedding(2, D)
        self.base_blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.base_layers))
        self.final = FinalNorm(D)
        self.rough_head = nn.Linear(D, 4 * channels)
        if config.refine_layers:
            self.expand = nn.Linear(D, 4 * D)
            self.refine_blocks = nn.ModuleList(Block(D, config.heads)
                                               for _ in range(config.refine_layers))
            self.fine_head = nn.Linear(D, channels)
        self.register_buffer("latent_std", torch.ones(2))           # of coarse and fine codes
        initialize(self)

    def forward(self, z_t, t, labels, grain_map, drop_label=None):
        """z_t [B, C, 2G, 2G], t and labels [B], map [B, G, G], drop_label bool [B] (True: hide the
        class) -> two predictions, rough and corrected, [B, C or 2C, 2G, 2G] each, constant in
        coarse regions: the noise, and with learn_sigma v of log_variance."""
        condition, fine = self.condition(t, labels, drop_label), grain_map.flatten(1)   # [B, N]
        codes = self.embed(to_patches(z_t, 2)) + self.position_embedding    # [B, N, 4, D]
        x = self.merge(codes.flatten(2)) + self.grain_embedding(fine.long())    # [B, N, D]
        for block in self.base_blocks:
            x = block(x, condition)
        rough = self.rough_head(self.final(x, condition)).unflatten(2, (4, -1))     # [B, N, 4, C]
        # a coarse region has one code, so one prediction
        rough = torch.where(fine[..., None, None], rough, rough.mean(2, keepdim=True))
        if not self.config.refine_layers:
            return from_patches(rough, 2), from_patches(rough, 2)
        # the fine regions first, then padding; at least one, so that DDP finds all parameters used
        M = max(1, int(fine.sum(1).max()))
        chosen = fine.int().argsort(1, descending=True, stable=True)[:, :M, None]   # [B, M, 1]
        real = fine.gather(1, chosen[..., 0])                               # [B, M], False: padding
        x = self.expand(x.gather(1, chosen.expand(-1, -1, x.shape[2])))     # [B, M, 4D]
        chosen = chosen[..., None]                                          # [B, M, 1, 1]
        codes = codes.gather(1, chosen.expand(-1, -1, 4, codes.shape[3]))   # [B, M, 4, D]
        x = (x.unflatten(2, (4, -1)) + codes).flatten(1, 2)                 # [B, 4M, D]
        # padding is no key; in an image without fine regions it sees itself, and no one reads it
        keys = (real | ~real.any(1, keepdim=True)).repeat_interleave(4, 1)  # [B, 4M]
        for block in self.refine_blocks:
            x = block(x, condition, keys)
        correction = self.fine_head(self.final(x, condition)).unflatten(1, (M, 4))  # [B, M, 4, C]
        correction = correction * real[..., None, None]
        corrected = rough.scatter_add(1, chosen.expand_as(correction), correction)  # [B, N, 4, C]
        return from_patches(rough, 2), from_patches(corrected, 2)


class DiT(nn.Module):
    """The baseline (2212.09748): the same blocks on patches of the uniform fine latent, fixed
    sine-cosine positions. Called as the content transformer; all regions must be fine."""
    def __init__(self, config):
        super().__init__()
        self.config, size = config, config.patch_size
        entries = config.latent_channels * size ** 2
        self.condition = Condition(config)
        self.embed = nn.Linear(entries, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads)
                                    for _ in range(config.base_layers))
        self.final = FinalNorm(config.width)
        self.head = nn.Linear(config.width, entries * (1 + config.learn_sigma))
        self.register_buffer("latent_std", torch.ones(2))
        side, quarter = 2 * config.grid // size, config.width // 4
        angles = torch.arange(side)[:, None] / 10_000 ** (torch.arange(quarter) / quarter)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)              # [side, D/2]
        positions = torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], dim=1)
        self.register_buffer("position_embedding", positions, persistent=False)     # [T, D]
        initialize(self)

    def forward(self, z_t, t, labels, grain_map, drop_label=None):
        condition, size = self.condition(t, labels, drop_label), self.config.patch_size
        x = self.embed(to_patches(z_t, size).flatten(2)) + self.position_embedding      # [B, T, D]
        for block in self.blocks:
            x = block(x, condition)
        x = self.head(self.final(x, condition)).unflatten(2, (size ** 2, -1))
        prediction = from_patches(x, size)                                  # [B, C or 2C, 2G, 2G]
        return prediction, prediction


def scale_of(model, grain_map):
    """Standard deviation of the codes at each place [B, 1, 2G, 2G]: the two heads of the DVAE need
    not have the same (our choice; LDM has one number)."""
    return torch.where(to_fine_grid(grain_map), *model.latent_std.flip(0))[:, None]


@torch.no_grad()
def set_latent_std(model, dvae, images):
    """Estimate both on these training images."""
    z, grain_map = (torch.cat(parts) for parts in zip(*map(dvae.encode, images.split(64))))
    for i, grain in enumerate((~grain_map, grain_map)):     # a coarse code's copies weigh alike
        codes = z.movedim(1, -1)[to_fine_grid(grain)]                       # [codes, C]
        if len(codes):
            model.latent_std[i] = codes.std()


class ContentLoss(nn.Module):
    def __init__(self, model, dvae):
        super().__init__()
        self.model, self.dvae = model, dvae

    def forward(self, images, labels):
        """Images [B, 3, H, W], labels [B] -> loss, its parts."""
        with torch.autocast(images.device.type, enabled=False):
            z, grain_map = self.dvae.encode(images)                         # [B, C, 2G, 2G], frozen
        z = z / scale_of(self.model, grain_map)
        t = torch.randint(TIME_STEPS, (len(z),), device=z.device)           # [B]
        drop_label = torch.rand(len(z), device=z.device) < self.model.config.class_dropout
        noise = draw_noise(grain_map, z.shape[1])
        return self.of_noise(z, t, noise, labels, grain_map, drop_label)

    def of_noise(self, z, t, noise, labels, grain_map, drop_label=None):
        """The dynamic grain loss (our choice of its form): the mean squared error by codes, a
        coarse code counting once. The same of the rough prediction, with a weight."""
        c, z_t = self.model.config, add_noise(z, t, noise)
        rough, corrected = self.model(z_t, t, labels, grain_map, drop_label)
        C = c.latent_channels
        parts = {"mse": per_code_mean((corrected[:, :C] - noise).square(), grain_map).mean()}
        loss = parts["mse"]
        if c.refine_layers:
            parts["rough"] = per_code_mean((rough[:, :C] - noise).square(), grain_map).mean()
            loss = loss + c.rough_weight * parts["rough"]
        if c.learn_sigma:   # KL divergence of the DDPM step, which trains the variance alone
            true_mean, variance, beta = posterior(z_t, z, t, t - 1)
            z_estimate = clean_estimate(z_t, t, corrected[:, :C].detach())
            mean = posterior(z_t, z_estimate, t, t - 1)[0]
            log_p, log_q = log_variance(corrected[:, C:], variance, beta), variance.clamp_min(1e-20).log()
            kl = log_p - log_q - 1 + (log_q - log_p).exp() + (true_mean - mean) ** 2 / log_p.exp()
            kl = per_code_mean(kl, grain_map) * (t > 0) / 2     # the last step adds no noise
            parts["kl"] = kl.mean() / math.log(2)               # in bits, as DiT's
            loss = loss + parts["kl"]
        return loss, parts


# ---- Sampling

@torch.no_grad()
def sample_latents(model, labels, grain_map, generator=None, **changes):
    """labels [B], maps [B, G, G] -> z [B, C, 2G, 2G] for DVAE.decode. Changes: see ContentConfig."""
    c, B = replace(model.config, **changes), len(labels)
    R = B if c.guidance_scale == 1 else 2 * B       # both halves of the guidance in one pass
    drop_label = torch.arange(R, device=labels.device) >= B                 # [R]
    maps, classes = grain_map.repeat(R // B, 1, 1), labels.repeat(R // B)   # the same for both
    z = draw_noise(grain_map, c.latent_channels, generator)
    steps = torch.linspace(TIME_STEPS - 1, -1, c.sampling_steps + 1).round().long().tolist()
    for t, s in zip(steps, steps[1:]):              # from time step t to s, at last -1: clean
        now, later = (torch.full((R,), step, device=labels.device) for step in (t, s))
        _, prediction = model(z.repeat(R // B, 1, 1, 1), now, classes, maps, drop_label)
        noise = prediction[:B, :c.latent_channels]  # of the given class
        if R > B:
            without = prediction[B:, :c.latent_channels]
            noise = without + c.guidance_scale * (noise - without)
        now, later = now[:B], later[:B]
        estimate = clean_estimate(z, now, noise)
        if c.sampler == "ddim":                     # 2010.02502, deterministic
            z = add_noise(estimate, later, noise)
            continue
        mean, variance, beta = posterior(z, estimate, now, later)
        if c.learn_sigma:
            variance = log_variance(prediction[:B, c.latent_channels:], variance, beta).exp()
        z = mean + (s >= 0) * variance.sqrt() * draw_noise(grain_map, c.latent_channels, generator)
    return z * scale_of(model, grain_map)


# ---- Training: one loop for all stages, which differ in model and loss alone

CALIBRATION = 4096      # training images that the threshold and standard deviations come from


def build(config):
    kinds = {DVAEConfig: DVAE, GrainConfig: GrainTransformer, ContentConfig: ContentTransformer}
    return (DiT if getattr(config, "model", "") == "dit" else kinds[type(config)])(config)


def load_stage(path, stage, device="cpu"):
    """A trained model of "dvae", "grain" or "content", averaged weights, frozen, in eval mode.
    .classes: their names; .dvae: fingerprint of the DVAE that a later stage was trained on."""
    saved = trainer.load_checkpoint(path, f"d2it_{stage}", f"python d2it.py --stage {stage}")
    kind = {"dvae": DVAEConfig, "grain": GrainConfig, "content": ContentConfig}[stage]
    model = trainer.load_model(build, kind, saved, path).to(device)
    model.classes, model.trained_on = saved["classes"], saved["settings"].get("dvae")
    return model


def calibration_images(dataset):
    rows = np.random.default_rng(0).permutation(len(dataset))[:CALIBRATION]
    return torch.cat([images for images, _ in data.all_images(dataset, 64, rows)])


def train(args, config, training):
    """One stage. All of its model trains; the DVAE is frozen after its own stage."""
    data.find_folder(args.data)     # what is missing is named before an earlier stage is
    settings, dvae = {}, None
    if args.stage != "dvae":
        dvae = load_stage(args.out / "d2it_dvae.pt", "dvae", args.device)
        settings["dvae"] = trainer.fingerprint(dvae)
    size = (dvae or build(config)).config.image_size
    train_set = data.open_dataset(args.data, "train", size, augment=True, draft=True)
    if args.stage != "dvae":
        config = replace(config, grid=dvae.config.grid, num_classes=len(train_set.classes))
    if args.stage == "content":
        config = replace(config, latent_channels=dvae.config.latent_channels)
        if config.model == "dit":   # the uniform fine latent
            dvae.config = replace(dvae.config, grain="fine")
    run = trainer.Run(args, f"d2it_{args.stage}", args.name or default_name(args.stage, config),
                      config, training, train_set, may_differ=SAMPLING,
                      store={"classes": list(train_set.classes)}, **settings)
    model, more = build(config), {}
    if args.stage == "dvae":
        model.set_threshold(calibration_images(train_set))
        perceptual = vqgan.perceptual_network(config.perceptual, train_set, args.out, args.convnext,
                                              run.device)
        if config.gan_weight:
            more["discriminator"] = vqgan.Discriminator(grid=min(16, size // 8))
        loss_fn = DVAELoss(model, perceptual, more.get("discriminator"))
    elif args.stage == "grain":
        loss_fn = GrainLoss(model, dvae)
    else:
        loss_fn = ContentLoss(model, dvae)
        set_latent_std(model, dvae, calibration_images(train_set).to(run.device))
    loss_fn = run.parallel(loss_fn.to(run.device, memory_format=torch.channels_last))
    optimizer = trainer.adamw(loss_fn.parameters(), training)
    ema = trainer.Ema(model, training.ema)
    saved = dict(model=model, ema=ema, optimizer=optimizer, **more)
    run.start(**saved)
    batches = data.batches(train_set, training.batch_size, args.seed, run.step, *run.share,
                           training.workers)

    for step in range(run.step, training.steps):
        trainer.set_lr(optimizer, trainer.cosine(step, training))
        optimizer.zero_grad()
        for images, labels in run.micro_batches(batches, loss_fn):          # [B, 3, H, W], [B]
            with run.autocast():
                loss, parts = loss_fn(images, labels)
            (loss / run.accumulate).backward()
            run.add(loss=loss, **parts)
        grad_norm = nn.utils.clip_grad_norm_(loss_fn.parameters(), training.clip)
        optimizer.step()
        ema.update(model)
        run.log(step, grad_norm=grad_norm)
        run.save_if_due(step, **saved)


# ---- Pictures, sizes, command line

def default_name(stage, config):    # of a checkpoint
    return f"d2it_{stage}" if getattr(config, "model", "") != "dit" else f"dit_{config.patch_size}"


def decode(dvae, z, grain_map):
    """-> images [n, 3, H, W] in [0, 1]"""
    return torch.cat([dvae.decode(*pair).clamp(0, 1)
                      for pair in zip(z.split(100), grain_map.split(100))])


def map_pictures(grain_map, size):
    """[n, G, G] -> [n, 3, H, W], fine regions bright."""
    x = 0.2 + 0.6 * grain_map[:, None].float()
    return F.interpolate(x, size, mode="nearest").expand(-1, 3, -1, -1)


@torch.no_grad()
def sample(args):
    """--sample: pairs of a new image and its grain map, in one picture."""
    dvae, grain, content = (load_stage(args.out / f"d2it_{stage}.pt", stage, args.device)
                            for stage in ("dvae", "grain", "content"))
    for model, stage in ((grain, "grain"), (content, "content")):
        if model.trained_on != trainer.fingerprint(dvae):
            raise BadInput(f"{args.out}/d2it_{stage}.pt: not trained on the d2it_dvae.pt there. "
                           f"Train it again: python d2it.py --stage {stage} --overwrite")
    names, count = content.classes, args.sample
    wanted = find_classes(args.classes, names) if args.classes else range(len(names))
    labels = [wanted[i * len(wanted) // count] for i in range(count)]
    labels = torch.tensor(labels, device=args.device)
    changes = {name: getattr(args, name) for name in SAMPLING if hasattr(args, name)}
    generator = torch.Generator(args.device).manual_seed(args.seed)
    grain_map = grain.generate(labels, generator)
    images = decode(dvae, sample_latents(content, labels, grain_map, generator, **changes), grain_map)
    pairs = torch.stack([images, map_pictures(grain_map, images.shape[-1])], dim=1).flatten(0, 1)
    path = Path(args.output or args.out / "d2it_samples.png")
    data.save_picture(data.picture_grid(pairs, 16, scale=max(1, 64 // images.shape[-1])), path)
    print(f"{path}: {count} samples, each beside its grain map")


def print_params():
    """Parameters of all presets, in millions, beside the paper's."""
    configs = {**PRESETS, **{f"dvae_{k}": v for k, v in DVAES.items()},
               **{f"grain_{k}": v for k, v in GRAINS.items()}}
    for name, config in configs.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in build(config).parameters())
        paper = f"   paper {PAPER[name] / 1e6:.2f}M" if name in PAPER else ""
        print(f"{name:12}{count / 1e6:8.2f}M{paper}")


def main():
    found = re.search(r"--stage[ =](\w+)", " ".join(sys.argv))    # each stage has its own flags
    stage = found[1] if found and found[1] in CONFIGS else "content"
    parser = trainer.command_line(__doc__, CONFIGS[stage], TrainConfig)
    parser.add_argument("--stage", choices=("dvae", "grain", "content"), default="content")
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--preset")
    parser.add_argument("--name")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--classes")
    parser.add_argument("--output")
    parser.add_argument("--params", action="store_true")
    parser.add_argument("--convnext")
    args = trainer.parse(parser)
    if args.params:
        return print_params()
    if args.sample:
        return sample(args)
    table = {"dvae": DVAES, "grain": GRAINS, "content": PRESETS}[args.stage]
    name = args.preset or ("dit_" if args.baseline else "") + args.config
    train(args, trainer.override(table[name], args), trainer.override(TRAINING[args.stage, args.config], args))


if __name__ == "__main__":
    trainer.launch(main)
