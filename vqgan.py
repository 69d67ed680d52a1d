"""Stage 0: a 2-D VQGAN turns an image into a grid of codes and paints the image back from them.

    python vqgan.py                     # train (toy: about a minute and a half on two CPU cores)
    python -m extras.pretrained vqgan FILE          # take the public MaskGIT-VQGAN weights instead of training (full)

NativeTok does not predict pixels. Stage 1 (tokenizer.py) predicts this network's codes, and this network's decoder
paints them. So it is trained first; stage 1 uses it unchanged, stage 2 fine-tunes a copy of the decoder. The
architecture is MaskGIT-VQGAN's (1024 codes of 256 numbers, factor 16), whose public weights the paper builds on; the
toy is the same code with smaller numbers, codes compared by direction (l2_norm), and revival of dead codes.
The file also holds the networks that judge pictures: the perceptual network, for this stage and stage 2, and the
discriminators, LeCam and hinge loss, for stage 2 only.

Letters: B batch, H W pixels, h w code grid, C channels, K codes in the codebook, D numbers in a code, M vectors of a
batch. Images are float32 [B, 3, H, W] in [0, 1]. What trains here: encoder, codebook and decoder, on L2, the
quantizer's two losses and, unless it is none, a frozen perceptual network (the toy trains one first, in seconds). No
adversarial loss.
"""
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import trainer
from trainer import BadInput, TrainConfig


@dataclass(frozen=True)
class VQGANConfig:
    image_size: int = 256               # H = W, pixels
    channels: int = 128                 # width at full resolution
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # width at each resolution, each half the one before
    res_blocks: int = 2                 # residual blocks at each resolution
    code_dim: int = 256                 # D: numbers in a code
    codebook_size: int = 1024           # K
    l2_norm: bool = False               # compare codes by direction only (ViT-VQGAN); MaskGIT-VQGAN does not
    norm_groups: int = 32               # GroupNorm
    perceptual: str = "none"            # perceptual network: small, convnext or none
    perceptual_weight: float = 0.1      # of the perceptual loss, beside 1 for L2
    revive_below: float = 0.0           # revive codes used less than this share of the average; 0: never

    def __post_init__(self):
        trainer.choose("--perceptual", self.perceptual, ("small", "convnext", "none"))
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        if not self.factor <= self.image_size <= 8192:          # a checkpoint may say anything
            raise BadInput(f"--image_size {self.image_size}: from {self.factor} to 8192")
        if self.image_size % self.factor:
            raise BadInput(f"--image_size {self.image_size}: not a multiple of {self.factor}, by which this VQGAN "
                           f"shrinks an image")

    @property
    def factor(self) -> int:            # pixels a code covers, each way
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def grid(self) -> int:              # h = w
        return self.image_size // self.factor


PRESETS = {
    "toy": VQGANConfig(image_size=32, channels=24, channel_mult=(1, 1, 2), res_blocks=1, code_dim=8, codebook_size=256,
                       l2_norm=True, norm_groups=4, perceptual="small", perceptual_weight=0.03, revive_below=0.05),
    "full": VQGANConfig(),
}
TRAINING = {
    "toy": TrainConfig(steps=1500, batch_size=16, learning_rate=4e-3, end_learning_rate=1e-4, warmup=50, ema=0.995,
                       workers=0, log_every=25, save_every=200, preview_every=200),
    "full": TrainConfig(),
}


# ---------------------------------------------------------------------------------------------------------------------
# The network. Attribute names are those of the public weights, so that these load without a table of names.

class ResBlock(nn.Module):
    """Two convolutions and a skip. Where the width changes, the public weights add a 1x1 convolution of the *result*
    (not of the input, as other VQGANs do): such a block has no skip from its input."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_out, c_out, 1, bias=False)

    def forward(self, x):                                       # [B, c_in, height, width], of any resolution
        y = self.conv1(F.silu(self.norm1(x)))                   # [B, c_out, height, width]
        y = self.conv2(F.silu(self.norm2(y)))                   # [B, c_out, height, width]
        return x + y if x.shape == y.shape else y + self.nin_shortcut(y)


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> one vector a grid cell [B, D, h, w]."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList()
        c = config.channels
        for width in widths:
            level = nn.Module()
            level.block = nn.ModuleList(ResBlock(c if i == 0 else width, width, config.norm_groups)
                                        for i in range(config.res_blocks))
            self.down.append(level)
            c = width
        self.mid = nn.ModuleList(ResBlock(c, c, config.norm_groups) for _ in range(config.res_blocks))
        self.norm_out = nn.GroupNorm(config.norm_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, config.code_dim, 1)

    def forward(self, images):
        x = self.conv_in(images)                                # [B, C, H, W]
        for i, level in enumerate(self.down):
            if i > 0:
                x = F.avg_pool2d(x, 2)                          # [B, C, H / 2^i, W / 2^i]
            for block in level.block:
                x = block(x)
        for block in self.mid:
            x = block(x)                                        # [B, C, h, w]
        return self.conv_out(F.silu(self.norm_out(x)))          # [B, D, h, w]


class Decoder(nn.Module):
    """One vector a grid cell [B, D, h, w] -> image [B, 3, H, W], not clamped."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(config.code_dim, c, 3, padding=1)
        self.mid = nn.ModuleList(ResBlock(c, c, config.norm_groups) for _ in range(config.res_blocks))
        self.up = nn.ModuleList()                               # numbered by resolution: run from the last to the first
        for i, width in enumerate(widths):
            c = widths[min(i + 1, len(widths) - 1)]
            level = nn.Module()
            level.block = nn.ModuleList(ResBlock(c if j == 0 else width, width, config.norm_groups)
                                        for j in range(config.res_blocks))
            if i > 0:
                level.upsample_conv = nn.Conv2d(width, width, 3, padding=1)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_q):
        x = self.conv_in(z_q)                                   # [B, C, h, w], C the last width
        for block in self.mid:
            x = block(x)
        for i, level in reversed(list(enumerate(self.up))):
            for block in level.block:
                x = block(x)                                    # [B, C of this level, H / 2^i, W / 2^i]
            if i > 0:
                x = level.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))    # twice the resolution
        return self.conv_out(F.silu(self.norm_out(x)))          # [B, 3, H, W]


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest row of a codebook; the row's number is the code (VQ-VAE, 1711.00937).

    With l2_norm both are set to length 1 first, which keeps more of the codebook in use (ViT-VQGAN, 2110.04627).
    Losses are means over all entries: summed over D they outweigh the reconstruction and the codebook collapses.
    Another quantizer needs the same five methods: codes, lookup, forward, track_usage, use.
    """

    def __init__(self, codebook_size, code_dim, l2_norm, commitment=0.25):
        super().__init__()
        self.l2_norm, self.commitment = l2_norm, commitment
        self.embedding = nn.Embedding(codebook_size, code_dim)
        nn.init.normal_(self.embedding.weight, std=code_dim ** -0.5)     # rows of length about 1
        self.register_buffer("usage", torch.ones(codebook_size))         # running use of each code; 1 is the average

    def codebook(self):
        """[K, D], as compared and looked up."""
        return F.normalize(self.embedding.weight, dim=-1) if self.l2_norm else self.embedding.weight

    def codes(self, z):
        """Vectors [..., D] -> the nearest codes, int64 [...]. In float32 always: bf16 would mix up near ones."""
        with torch.autocast(z.device.type, enabled=False):
            z, book = z.float(), self.codebook().float()
            if self.l2_norm:
                return (F.normalize(z, dim=-1) @ book.t()).argmax(-1)       # nearest = largest cosine
            flat = z.reshape(-1, z.shape[-1])                               # [M, D]
            distance = flat.square().sum(1, keepdim=True) - 2 * flat @ book.t() + book.square().sum(1)     # [M, K]
            return distance.argmin(-1).view(z.shape[:-1])

    def lookup(self, codes):
        """Codes [...] -> codebook rows [..., D]."""
        rows = self.embedding(codes)
        return F.normalize(rows, dim=-1) if self.l2_norm else rows

    def forward(self, z):
        """z [..., D] -> (z_q [..., D] with the gradient of z, loss, codes [...])."""
        codes = self.codes(z)
        z_q = self.lookup(codes).float()
        z = F.normalize(z.float(), dim=-1) if self.l2_norm else z.float()
        loss = F.mse_loss(z_q, z.detach()) + self.commitment * F.mse_loss(z, z_q.detach())
        return z + (z_q - z).detach(), loss, codes              # straight through: forward z_q, backward as if z

    @torch.no_grad()
    def track_usage(self, z, codes, revive_below=0.0, decay=0.98):
        """After the optimizer's step: update the running use; move codes that died onto vectors of this batch.

        After the step, or the optimizer would push the moved code by what was meant for the old one. Nothing here makes
        the CPU wait for the GPU (bincount would: it must know the largest number first). Under torchrun all ranks see
        the same use. z, codes: of this step's batch. While codes are revived none falls to a use of 0.01, so codes_used
        reads 1: look at the perplexity, or at the end of the run.
        """
        counts = torch.zeros_like(self.usage)                                                   # [K]
        counts.scatter_add_(0, codes.flatten(), torch.ones_like(codes.flatten(), dtype=counts.dtype))
        if dist.is_initialized():
            dist.all_reduce(counts)
        self.usage.lerp_(counts * len(counts) / counts.sum(), 1 - decay)
        if revive_below > 0:
            vectors = z.detach().float().flatten(0, -2)                                         # [M, D]
            candidates = vectors[torch.randint(len(vectors), (len(counts),), device=z.device)]      # [K, D]
            if dist.is_initialized():
                dist.broadcast(candidates, src=0)
            dead = self.usage < revive_below                                                    # [K]
            if self.l2_norm:
                candidates = F.normalize(candidates, dim=-1)
            self.embedding.weight.copy_(torch.where(dead[:, None], candidates, self.embedding.weight))
            self.usage.masked_fill_(dead, 1.0)

    def use(self):
        """{"codes_used": share of the codebook in use, "perplexity": exp(entropy)} of the running use."""
        share = self.usage / self.usage.sum()
        return {"codes_used": (self.usage > 0.01).float().mean(),
                "perplexity": torch.exp(-(share * share.clamp_min(1e-12).log()).sum())}


class VQGAN(nn.Module):
    """encode: images -> codes int64 [B, h, w]; decode_codes: back to images in [0, 1]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantize = VectorQuantizer(config.codebook_size, config.code_dim, config.l2_norm)
        self.decoder = Decoder(config)

    def latents(self, images):
        """Images [B, 3, H, W] -> vectors before quantization, channels last [B, h, w, D]."""
        return self.encoder(images).permute(0, 2, 3, 1)

    @torch.no_grad()
    def encode(self, images):
        return self.quantize.codes(self.latents(images))        # [B, h, w]

    @torch.no_grad()
    def decode_codes(self, codes):
        """Codes [B, h, w] -> images [B, 3, H, W] in [0, 1]."""
        return self.decoder(self.quantize.lookup(codes).permute(0, 3, 1, 2)).clamp(0, 1)

    def forward(self, images):
        """Images -> (reconstruction, not clamped; quantizer loss; z [B, h, w, D]; codes [B, h, w])."""
        z = self.latents(images)
        z_q, loss, codes = self.quantize(z)
        return self.decoder(z_q.permute(0, 3, 1, 2)), loss, z, codes


MAKE = {"toy": "python vqgan.py", "full": "python -m extras.pretrained vqgan maskgit-vqgan-imagenet-f16-256.bin"}


def load_vqgan(path, device="cpu", make=MAKE["toy"]):
    """A trained VQGAN in eval mode, with its averaged weights. Raises BadInput if the file is not one; make: the
    command that it then names."""
    checkpoint = trainer.load_checkpoint(path, "vqgan", make=make, device=device)
    return trainer.load_model(VQGAN, VQGANConfig, checkpoint, path).to(device)


def name_of(path_or_state_dict, otherwise):
    return path_or_state_dict if isinstance(path_or_state_dict, (str, Path)) else otherwise


def read_weights(path_or_state_dict):
    """A state dict as it is, or read from a .safetensors file (package safetensors) or a torch file. Raises BadInput
    unless that holds tensors by name, and as many numbers as they have."""
    if not isinstance(path_or_state_dict, (str, Path)):
        return dict(path_or_state_dict)
    path = Path(path_or_state_dict)
    if not os.path.isfile(path):        # pipes are none: who opens one waits
        raise BadInput(f"{path}: not found, or no file")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise BadInput(f"{path}: reading it needs a package: pip install safetensors") from error
        try:
            state = load_file(path)
        except Exception as error:
            raise BadInput(f"{path}: not a file of safetensors, or cut short") from error
    else:
        try:
            if zipfile.is_zipfile(path):        # files from before torch 1.6 are none, and have no checksums
                trainer.check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise BadInput(f"{path}: not a file of torch weights, or cut short or damaged") from error
        for name in ("state_dict", "model"):        # as some are published; LlamaGen's: model
            if isinstance(state, dict) and isinstance(state.get(name), dict):
                state = state[name]
    trainer.check_tensors(state, path)
    return dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# Networks and losses that judge pictures: perceptual here and in stage 2, adversarial in stage 2 only

class SmallPerceptual(nn.Module):
    """The toy's perceptual network: trained in seconds to name the classes of the data's own training split.

    Strided convolutions with GELU and no batch norm, on purpose not the architecture (nor the seed) of the FD-classifier
    (extras/report.py): nothing is scored by a network that was trained against. It sees brightness only: colour is left to
    L2. (A version with three channels, trained on grey pictures, never learned what a tint means: stage 2 went pink.)
    """

    def __init__(self, classes, width=32):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, width, 5, stride=2, padding=2),                # [B, 32, H/2, W/2]
                                    nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),        # [B, 64, H/4, W/4]
                                    nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1)])   # [B, 128, H/8, W/8]
        self.head = nn.Linear(4 * width * 16, classes)

    def features(self, images):
        """Images in [0, 1] -> the maps after each convolution."""
        maps, x = [], images.mean(1, keepdim=True) * 2 - 1                  # [B, 1, H, W]
        for conv in self.convs:
            x = F.gelu(conv(x))
            maps.append(x)
        return maps

    def forward(self, images):
        """Images in [0, 1] -> logits [B, classes]."""
        return self.head(F.adaptive_avg_pool2d(self.features(images)[-1], 4).flatten(1))

    def perceptual_loss(self, a, b):
        """Mean squared difference of the maps, each pixel's vector set to length 1 (as LPIPS, 1801.03924). Scalar."""
        return sum((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()
                   for x, y in zip(self.features(a), self.features(b)))


def small_perceptual(dataset, path, device="cpu", steps=400, batch_size=64):
    """The trained SmallPerceptual for this data set, from path if it is there and was made from the same data."""
    path = Path(path)
    with torch.random.fork_rng():                               # its own seed, and no trace in the stage's random state
        torch.manual_seed(4321)
        model = SmallPerceptual(len(dataset.classes)).to(device)
        if path.exists():
            checkpoint = trainer.load_checkpoint(path, "perceptual", make=f"rm {path} and run again")
            if checkpoint["config"].get("data") == dataset.fingerprint:
                trainer.load_weights(model, checkpoint["model"], path)
                return model.eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        batches = data.batches(dataset, batch_size, seed=4321)
        for step in range(steps):
            images, labels = (t.to(device) for t in next(batches))
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
    checkpoint = {"stage": "perceptual", "model": model.state_dict(), "step": steps,
                  "config": {"data": dataset.fingerprint}}
    trainer.write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))
    return model.eval().requires_grad_(False)


class ConvNeXtSmall(nn.Module):
    """--perceptual convnext, as stage 2's full preset has it: torchvision's convnext_small (IMAGENET1K_V1), as TiTok.

    forward: images in [0, 1], any size -> logits [B, 1000]; the resize to 224 and the normalization are inside.
    Source of the numbers: torchvision (public weights) and 1d-tokenizer (resize, loss on logits).
    """

    def __init__(self, path_or_state_dict):
        super().__init__()
        def norm(width):
            return nn.LayerNorm(width, eps=1e-6)

        def block(width):
            layer = nn.Module()
            layer.block = nn.Sequential(nn.Conv2d(width, width, 7, padding=3, groups=width), nn.Identity(), norm(width),
                                        nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            layer.layer_scale = nn.Parameter(torch.empty(width, 1, 1))
            return layer

        widths, depths = (96, 192, 384, 768), (3, 3, 27, 3)
        self.features = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, 96, 4, stride=4), norm(96)])])
        for i, (width, depth) in enumerate(zip(widths, depths)):
            if i > 0:
                self.features.append(nn.ModuleList([norm(widths[i - 1]), nn.Conv2d(widths[i - 1], width, 2, stride=2)]))
            self.features.append(nn.ModuleList(block(width) for _ in range(depth)))
        self.classifier = nn.ModuleList([norm(768), nn.Identity(), nn.Linear(768, 1000)])
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        if path_or_state_dict is not None:      # None: to count with
            trainer.load_weights(self, read_weights(path_or_state_dict), name_of(path_or_state_dict, "ConvNeXt-S weights"))
        self.eval().requires_grad_(False)

    def forward(self, images):
        x = F.interpolate(images, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        return self.logits((x - self.mean) / self.std)

    def logits(self, x):
        """Normalized images [B, 3, H, W] -> logits [B, 1000]; channels are kept last between the convolutions."""
        def conv(layer, x):
            return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

        stem, *stages = self.features
        x = stem[1](conv(stem[0], x.permute(0, 2, 3, 1)))                   # [B, H/4, W/4, 96]
        for i, stage in enumerate(stages):
            if i % 2:                                                       # LayerNorm and a 2x2 convolution
                x = conv(stage[1], stage[0](x))                             # half the resolution, twice the width
                continue
            for layer in stage:
                y = conv(layer.block[0], x)
                for part in layer.block[1:]:
                    y = part(y)
                x = x + layer.layer_scale.flatten() * y                     # [B, h, w, C]
        norm, _, linear = self.classifier
        return linear(norm(x.mean((1, 2))))

    def perceptual_loss(self, a, b):
        """Mean squared difference of the logits of two batches of images in [0, 1]. Scalar."""
        return F.mse_loss(self(a), self(b))


class Discriminator(nn.Module):
    """TiTok's PatchGAN: images [B, 3, H, W] -> a logit for each of grid x grid regions; real is positive.

    grid is 16 in TiTok, at 256 pixels: three halvings leave 32 x 32, pooled to it. 32 pixels leave no more than 4. The
    toy's preset uses FeatureDiscriminator."""

    def __init__(self, width=128, grid=16):
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 5, padding=2)
        self.stages = nn.ModuleList()
        c = width
        for c_out in (width, 2 * width, 4 * width):
            self.stages.append(nn.ModuleList([nn.Conv2d(c, c_out, 3, padding=1), nn.GroupNorm(32, c_out)]))
            c = c_out
        self.pool = nn.AdaptiveMaxPool2d(grid)
        self.to_logits = nn.Sequential(nn.Conv2d(c, c, 1), nn.LeakyReLU(0.1), nn.Conv2d(c, 1, 5, padding=2))
        kernel = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", torch.outer(kernel, kernel) / 64, persistent=False)        # sums to 1

    def forward(self, images):
        x = F.leaky_relu(self.conv_in(images), 0.1)             # [B, C, H, W]
        for conv, norm in self.stages:
            x = conv(x)
            x = F.pad(x, (1, 1, 1, 1), mode="reflect")          # blur, then take every second pixel (1904.11486)
            x = F.conv2d(x, self.blur.to(x.dtype).expand(x.shape[1], 1, 4, 4), stride=2, groups=x.shape[1])
            x = F.leaky_relu(norm(x), 0.1)                      # half the resolution
        return self.to_logits(self.pool(x))                     # [B, 1, grid, grid]


class FeatureDiscriminator(nn.Module):
    """The toy's discriminator: small heads on the frozen maps of the perceptual network (projected GAN, 2111.01007).

    Images [B, 3, H, W] -> logits [B, cells of all maps]; real is positive. It tells blurred from sharp after some tens
    of steps, where a PatchGAN from nothing needs thousands.
    """

    def __init__(self, perceptual, width=64):
        super().__init__()
        self.perceptual = perceptual
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(conv.out_channels, width, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 1)) for conv in perceptual.convs)

    def forward(self, images):
        maps = self.perceptual.features(images)
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, maps)], dim=1)


class LeCam(nn.Module):
    """LeCam regularization (2104.03310): keeps the discriminator's logits near running means of the other side's."""

    def __init__(self, decay=0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real, fake):
        """Logits of real and of fake images -> scalar; also moves the running means."""
        loss = F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()
        with torch.no_grad():
            self.real.lerp_(real.mean().float(), 1 - self.decay)
            self.fake.lerp_(fake.mean().float(), 1 - self.decay)
        return loss


def hinge_loss(real, fake):
    """The discriminator's loss on its logits of real and of fake images. Scalar."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def perceptual_network(kind, dataset, out, weights, device):
    """The network that kind names, or None. weights: the ConvNeXt file. Raises BadInput if it is missing."""
    if kind == "none":
        return None
    if kind == "small":
        return small_perceptual(dataset, Path(out) / "perceptual.pt", device)
    if weights is None or not Path(weights).is_file():
        raise BadInput(f"--perceptual convnext: needs torchvision's convnext_small weights (IMAGENET1K_V1), not found "
                       f"at {weights}. Name the file with --convnext FILE, or go on without: --perceptual none")
    return ConvNeXtSmall(weights).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Training

class Stage0(nn.Module):
    """The loss as a module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model, perceptual, perceptual_weight):
        super().__init__()
        self.model, self.perceptual, self.perceptual_weight = model, perceptual, perceptual_weight

    def forward(self, images):
        reconstruction, quantizer_loss, z, codes = self.model(images)
        parts = {"l2": F.mse_loss(reconstruction, images), "quantizer": quantizer_loss}
        loss = parts["l2"] + quantizer_loss
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual.perceptual_loss(reconstruction, images)
            loss = loss + self.perceptual_weight * parts["perceptual"]
        return loss, parts, z, codes


def train(args):
    config = trainer.override(PRESETS[args.config], args)
    training = trainer.override(TRAINING[args.config], args)
    train_set = data.open_dataset(args.data, "train", config.image_size, augment=True, draft=training.draft)
    run = trainer.Run(args, "vqgan", "vqgan", config, training, data=train_set.kind, images=train_set.content)
    preview_set = data.open_dataset(args.data, "val", config.image_size)
    originals = next(data.all_images(preview_set, 16))[0].to(run.device)

    model = VQGAN(config).to(run.device, memory_format=torch.channels_last)      # faster convolutions, same numbers
    perceptual = perceptual_network(config.perceptual, train_set, args.out, args.convnext, run.device)
    stage = run.parallel(Stage0(model, perceptual, config.perceptual_weight))
    optimizer = run.adamw(model.parameters())
    ema = trainer.Ema(model, training.ema)
    run.track(model=model, optimizer=optimizer, ema=ema)        # saved in each checkpoint; --resume: loaded here
    batches = data.batches(train_set, run.piece, args.seed, run.step * training.accumulate, run.rank, run.world,
                           training.workers)

    for step in run.steps():
        run.set_learning_rate(optimizer, step)
        optimizer.zero_grad()
        seen = []
        for images, _ in run.pieces(batches, stage):            # [B, 3, H, W], 1 / accumulate of the batch
            with run.autocast():
                loss, parts, z, codes = stage(images)
            (loss / training.accumulate).backward()
            seen.append((z.detach(), codes))
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        # no revival in the last fifth: the averaged weights need time to follow a moved code
        z, codes = (torch.cat(pieces) for pieces in zip(*seen))
        model.quantize.track_usage(z, codes, config.revive_below if step < 0.8 * training.steps else 0.0)
        ema.update(model)
        run.log(step, loss=loss, grad_norm=grad_norm, **parts, **model.quantize.use())
        if run.preview(step):
            reconstructions = ema.model.decode_codes(ema.model.encode(originals))
            data.save_picture(data.picture_grid(torch.cat([originals, reconstructions]).cpu(), 16, scale=2),
                              args.out / "vqgan_preview.png")


def main():
    parser = trainer.command_line(__doc__, VQGANConfig, TrainConfig)
    parser.add_argument("--convnext", metavar="FILE", default="weights/convnext_small.pth",
                        help="torchvision's convnext_small weights, for --perceptual convnext")
    train(trainer.parse(parser))


if __name__ == "__main__":
    trainer.launch(main)
