"""Stage 0: a 2-D VQGAN turns an image into a grid of codes, and the codes into an image.

    python vqgan.py     # train (toy: a minute on two CPU cores)

Stage 1 (tokenizer.py) predicts this network's codes; stage 2 fine-tunes a copy of its decoder. The
network is MaskGIT-VQGAN's, whose public weights the paper builds on. The toy is smaller, compares
codes by direction, revives dead ones, and is trained here, without a discriminator.

Letters: B batch, H W pixels, G side of the code grid, L = G*G codes of an image in raster order,
K codes in the codebook, c length of a code vector, C channels (in tokenizer.py this K is V, and
this c is C). Images: float32 [B, 3, H, W] in [0, 1].
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import trainer
from trainer import BadInput, TrainConfig


@dataclass(frozen=True)
class VQGANConfig:
    image_size: int = 256           # H = W
    channels: int = 128             # C at full resolution
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)     # C at each resolution, half the one before
    res_blocks: int = 2             # residual blocks at each resolution
    code_dim: int = 256             # c
    codebook_size: int = 1024       # K
    l2_norm: bool = False           # scale code vectors to length 1
    norm_groups: int = 32
    perceptual: Literal["small", "convnext", "none"] = "none"   # network of the perceptual loss
    perceptual_weight: float = 0.1  # beside 1 for L2
    revive_below: float = 0.0       # revive codes used less than this share of the average

    @property
    def grid(self) -> int:  # G
        return self.image_size // 2 ** (len(self.channel_mult) - 1)

    @property
    def tokens(self) -> int:  # L
        return self.grid ** 2


PRESETS = {
    "toy": VQGANConfig(image_size=32, channels=24, channel_mult=(1, 1, 2), res_blocks=1, code_dim=8,
                       codebook_size=256, l2_norm=True, norm_groups=4, perceptual="small",
                       perceptual_weight=0.03, revive_below=0.05),
    "small": VQGANConfig(), "full": VQGANConfig()}
TRAINING = {
    "toy": TrainConfig(steps=900, batch_size=16, learning_rate=4e-3, end_learning_rate=1e-4,
                       warmup=50, ema=0.995, workers=0, log_every=25, save_every=200,
                       preview_every=200),
    "small": TrainConfig(), "full": TrainConfig()}


# ---- The network. Attribute names are those of the public weights

class ResBlock(nn.Module):
    """Where the width changes, the public weights add a 1x1 convolution of the *result*."""
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_out, c_out, 1, bias=False)

    def forward(self, x):                           # [B, c_in, H, W]
        y = self.conv1(F.silu(self.norm1(x)))       # [B, c_out, H, W]
        y = self.conv2(F.silu(self.norm2(y)))       # [B, c_out, H, W]
        return x + y if x.shape == y.shape else y + self.nin_shortcut(y)


def res_blocks(c_in, c_out, config):
    return nn.Sequential(*(ResBlock(c_in if i == 0 else c_out, c_out, config.norm_groups)
                           for i in range(config.res_blocks)))


class Encoder(nn.Module):
    """Images -> one vector per grid cell [B, c, G, G]."""
    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(nn.ModuleDict({"block": res_blocks(c_in, c_out, config)})
                                  for c_in, c_out in zip([config.channels, *widths], widths))
        self.mid = res_blocks(widths[-1], widths[-1], config)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 1)

    def forward(self, images):
        x = self.conv_in(images)                    # [B, C, H, W]
        for i, level in enumerate(self.down):
            if i > 0:
                x = F.avg_pool2d(x, 2)
            x = level.block(x)                      # [B, C, H / 2^i, W / 2^i]
        x = self.mid(x)                             # [B, C, G, G]
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, c, G, G]


class Decoder(nn.Module):
    """One vector per grid cell [B, c, G, G] -> images [B, 3, H, W], not clamped."""
    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(config.code_dim, widths[-1], 3, padding=1)
        self.mid = res_blocks(widths[-1], widths[-1], config)
        self.up = nn.ModuleList()   # by resolution: run from last to first
        for i, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths)):
            self.up.append(nn.ModuleDict({"block": res_blocks(c_in, c_out, config)}))
            if i > 0:
                self.up[i]["upsample_conv"] = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_q):
        x = self.mid(self.conv_in(z_q))             # [B, C, G, G]
        for i, level in reversed(list(enumerate(self.up))):
            x = level.block(x)                      # [B, C, H / 2^i, W / 2^i]
            if i > 0:
                x = level.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, 3, H, W]


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest row of a codebook, whose index is the code (1711.00937).
    l2_norm: both are scaled to length 1, which keeps more codes in use (2110.04627). Losses are
    means: summed over c they would outweigh the reconstruction, and the codebook would collapse.
    Another quantizer needs codes, lookup, forward, update_usage, stats; a VQGAN's also codebook."""
    def __init__(self, codebook_size, code_dim, l2_norm, commitment=0.25, unit_rows=False):
        super().__init__()
        self.l2_norm, self.commitment = l2_norm, commitment
        self.embedding = nn.Embedding(codebook_size, code_dim)
        if unit_rows:   # the toy's: length about 1, as of the vectors that revived codes become
            nn.init.normal_(self.embedding.weight, std=code_dim ** -0.5)
        else:           # TiTok's: a step turns short rows far, and with l2_norm only angles count
            nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        self.register_buffer("usage", torch.ones(codebook_size))    # [K], 1: the average
        self.pending = []   # (vectors, codes) of this step's micro-batches

    def normalize(self, vectors):
        return F.normalize(vectors, dim=-1) if self.l2_norm else vectors

    def codebook(self):
        return self.normalize(self.embedding.weight)    # [K, c]

    def codes(self, z):
        """Vectors [..., c] -> codes int64 [...]. In float32: bf16 mixes up neighbours."""
        with torch.autocast(z.device.type, enabled=False):
            book = self.codebook().float()                          # [K, c]
            closeness = 2 * self.normalize(z.float()) @ book.t()    # [..., K]
            if not self.l2_norm:        # |z - e|^2 = |z|^2 - 2 z e + |e|^2
                closeness = closeness - book.square().sum(-1)
            return closeness.argmax(-1)

    def lookup(self, codes):
        return self.normalize(self.embedding(codes))    # [..., c]

    def forward(self, z):
        """z [..., c] -> (z_q [..., c], whose gradient passes to the normalized z; loss)."""
        codes = self.codes(z)
        z_q = self.lookup(codes).float()
        z = self.normalize(z.float())
        if self.training:
            self.pending.append((z.detach().flatten(0, -2), codes.flatten()))   # for update_usage
        loss = F.mse_loss(z_q, z.detach()) + self.commitment * F.mse_loss(z, z_q.detach())
        return z + (z_q - z).detach(), loss

    @torch.no_grad()
    def update_usage(self, revive_below=0.0, decay=0.98):
        """Once per step: move codes used less than revive_below times the average onto vectors of
        this step. After optimizer.step, which would push a moved code by its old gradient."""
        z, codes = map(torch.cat, zip(*self.pending))   # [vectors of this step, c] and their codes
        self.pending = []
        counts = torch.zeros_like(self.usage)   # [K]; bincount would wait for the GPU
        counts.scatter_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype))
        if dist.is_initialized():
            dist.all_reduce(counts)
        self.usage.lerp_(counts * len(counts) / counts.sum(), 1 - decay)
        if revive_below > 0:
            candidates = z[torch.randint(len(z), (len(counts),), device=z.device)]      # [K, c]
            if dist.is_initialized():
                dist.broadcast(candidates, src=0)   # all ranks move codes alike
            dead = self.usage < revive_below        # [K]
            weight = self.embedding.weight
            weight.copy_(torch.where(dead[:, None], candidates, weight))
            self.usage.masked_fill_(dead, 1.0)

    def stats(self):
        """The perplexity of the running use: 1 (one code) .. K (all alike)."""
        share = self.usage / self.usage.sum()
        return {"perplexity": torch.exp(-(share * share.clamp_min(1e-12).log()).sum())}


class VQGAN(nn.Module):
    """Images <-> codes int64 [B, L] in raster order."""
    fine_tuned = True       # its decoder was trained on pixels, as a tokenizer's after stage 2

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantize = VectorQuantizer(config.codebook_size, config.code_dim, config.l2_norm,
                                        unit_rows=config.revive_below > 0)
        self.decoder = Decoder(config)

    def latents(self, images):
        return self.encoder(images).flatten(2).transpose(1, 2)          # [B, L, c]

    def decode(self, z_q):                          # [B, L, c]
        grid = z_q.transpose(1, 2).unflatten(2, (self.config.grid, -1))     # [B, c, G, G]
        return self.decoder(grid)                   # [B, 3, H, W], not clamped

    @torch.no_grad()
    def encode(self, images):
        return self.quantize.codes(self.latents(images))

    @torch.no_grad()
    def decode_codes(self, codes):
        return self.decode(self.quantize.lookup(codes)).clamp(0, 1)

    def forward(self, images):
        z_q, loss = self.quantize(self.latents(images))
        return self.decode(z_q), loss


def load_vqgan(path, device="cpu"):
    """A trained VQGAN, frozen and in eval mode."""
    make = "python vqgan.py, or take the public weights: python -m extras.pretrained vqgan FILE"
    checkpoint = trainer.load_checkpoint(path, "vqgan", make)
    model = trainer.load_model(VQGAN, VQGANConfig, checkpoint, path)
    return model.to(device, memory_format=torch.channels_last)      # faster convolutions


# ---- Perceptual networks (stages 0 and 2) and discriminators (stage 2)

class SmallPerceptual(nn.Module):
    """The toy's perceptual network, trained to classify the training split. The report has another
    one: no score may come from a network that was trained against. It sees brightness only: with
    three channels, trained on grey images, it let stage 2 color them."""
    def __init__(self, classes):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c_in, c_out, size, stride=2, padding=size // 2)
                                   for c_in, c_out, size in ((1, 32, 5), (32, 64, 3), (64, 128, 3)))
        self.head = nn.Linear(128 * 4 * 4, classes)

    def features(self, images):
        maps, x = [], images.mean(1, keepdim=True) * 2 - 1  # [B, 1, H, W]
        for conv in self.convs:
            x = F.gelu(conv(x))
            maps.append(x)
        return maps     # [B, 32, H/2, W/2], [B, 64, H/4, W/4], [B, 128, H/8, W/8]

    def forward(self, images):
        x = F.adaptive_avg_pool2d(self.features(images)[-1], 4)
        return self.head(x.flatten(1))              # [B, classes]

    def perceptual_loss(self, a, b):
        """Squared difference of the maps, each pixel scaled to length 1 (LPIPS, 1801.03924)."""
        return sum((F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()
                   for x, y in zip(self.features(a), self.features(b)))


def small_perceptual(dataset, path, device="cpu", steps=400, batch_size=64):
    """A trained SmallPerceptual, from path if that was trained on this data."""
    saved = torch.load(path, map_location="cpu", weights_only=True) if Path(path).exists() else {}
    with torch.random.fork_rng():       # leaves the run's random state alone
        torch.manual_seed(4321)
        model = SmallPerceptual(len(dataset.classes)).to(device)
        if saved.get("data") == dataset.fingerprint:
            model.load_state_dict(saved["model"])
            return model.eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        batches = data.batches(dataset, batch_size, seed=4321)
        for _ in range(steps):
            images, labels = (trainer.to_device(x, torch.device(device)) for x in next(batches))
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()   # after the last, too: stage 2 would count them when it clips
    trainer.save({"data": dataset.fingerprint, "model": model.state_dict()}, path)
    return model.eval().requires_grad_(False)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):                           # [B, C, H, W], over C
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width), nn.Identity(),
            nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.GELU(),
            nn.Linear(4 * width, width))
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x):                           # [B, C, H, W]
        y = self.block[0](x).permute(0, 2, 3, 1)    # [B, H, W, C]
        return x + self.layer_scale * self.block[1:](y).permute(0, 3, 1, 2)


class ConvNeXtSmall(nn.Module):
    """torchvision's convnext_small (IMAGENET1K_V1), TiTok's perceptual network, of its .pth file or
    state dict."""
    def __init__(self, path_or_state_dict):
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(3, 96, 4, stride=4), LayerNorm2d(96, eps=1e-6))]
        for width, depth in ((96, 3), (192, 3), (384, 27), (768, 3)):
            layers.append(nn.Sequential(*(ConvNeXtBlock(width) for _ in range(depth))))
            layers.append(nn.Sequential(LayerNorm2d(width, eps=1e-6),
                                        nn.Conv2d(width, 2 * width, 2, stride=2)))
        self.features = nn.Sequential(*layers[:-1])
        # nn.Identity: a Permute or Flatten of torchvision's, so that the numbers are the same
        self.classifier = nn.Sequential(nn.LayerNorm(768, eps=1e-6), nn.Identity(),
                                        nn.Linear(768, 1000))
        mean_std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        self.register_buffer("mean_std", mean_std, persistent=False)
        self.load_state_dict(trainer.read_weights(path_or_state_dict))
        self.eval().requires_grad_(False)

    def forward(self, images):
        """Images of any size -> logits [B, 1000], as 1d-tokenizer."""
        mean, std = self.mean_std
        x = F.interpolate(images, (224, 224), mode="bilinear", align_corners=False, antialias=True)
        x = self.features((x - mean) / std)         # [B, 768, 7, 7]
        return self.classifier(x.mean((2, 3)))

    def perceptual_loss(self, a, b):
        return F.mse_loss(self(a), self(b))


class BlurPool(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2]: blur, then every second pixel (1904.11486)."""
    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(row, row) / 64, persistent=False)

    def forward(self, x):
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


class Discriminator(nn.Sequential):
    """TiTok's PatchGAN: images -> logits [B, 1, grid, grid]; real is positive."""
    def __init__(self, width=128, grid=16):
        layers = [nn.Conv2d(3, width, 5, padding=2), nn.LeakyReLU(0.1)]
        for c_in, c_out in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), BlurPool(), nn.GroupNorm(32, c_out),
                       nn.LeakyReLU(0.1)]
        layers += [nn.AdaptiveMaxPool2d(grid), nn.Conv2d(c_out, c_out, 1), nn.LeakyReLU(0.1),
                   nn.Conv2d(c_out, 1, 5, padding=2)]
        super().__init__(*layers)


class FeatureDiscriminator(nn.Module):
    """The toy's: small heads on the frozen maps of a SmallPerceptual (projected GAN, 2111.01007),
    which learn in tens of steps what takes a PatchGAN thousands."""
    def __init__(self, perceptual, width=64):
        super().__init__()
        self.perceptual = perceptual
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(conv.out_channels, width, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 1))
            for conv in perceptual.convs)

    def forward(self, images):
        pairs = zip(self.heads, self.perceptual.features(images))
        return torch.cat([head(x).flatten(1) for head, x in pairs], dim=1)  # [B, all cells]


def perceptual_network(kind, dataset, out, weights, device):
    if kind == "small":
        return small_perceptual(dataset, Path(out) / "perceptual.pt", device)
    if kind == "none":
        return None
    if not Path(weights).exists():
        raise BadInput(f"{weights}: not found. Get torchvision's convnext_small for --convnext, or "
                       f"give --perceptual none")
    return ConvNeXtSmall(weights).to(device)


# ---- Training

def preview_if_due(run, step, model, originals):
    """A picture of original images over their reconstructions."""
    if run.preview_due(step):
        images = originals.to(run.device)
        both = torch.cat([images, model.decode_codes(model.encode(images))])
        path = run.path.with_name(f"{run.path.stem}_preview.png")
        data.save_picture(data.picture_grid(both, len(images), scale=2), path)


def train(args):
    """All of the VQGAN; the perceptual network is frozen."""
    config = trainer.override(PRESETS[args.config], args)
    training = trainer.override(TRAINING[args.config], args)
    train_set = data.open_dataset(args.data, "train", config.image_size, augment=True, draft=True)
    val_set = data.open_dataset(args.data, "val", config.image_size)
    originals, _ = next(data.all_images(val_set, 16))   # for previews, [16, 3, H, W]
    run = trainer.Run(args, "vqgan", "vqgan", config, training, train_set)

    model = VQGAN(config).to(run.device, memory_format=torch.channels_last)
    perceptual = perceptual_network(config.perceptual, train_set, args.out, args.convnext,
                                    run.device)
    parallel = run.parallel(model)
    optimizer = trainer.adamw(model, training)
    ema = trainer.Ema(model, training.ema)
    run.start(model=model, ema=ema, optimizer=optimizer)  # loads them on --resume
    batches = data.batches(train_set, *run.order, training.workers)

    for step in range(run.step, training.steps):
        trainer.set_lr(optimizer, trainer.cosine(step, training))
        optimizer.zero_grad()
        for images, _ in run.micro_batches(batches, parallel):  # [B, 3, H, W]
            with run.autocast():
                reconstruction, quantizer_loss = parallel(images)
                parts = {"l2": F.mse_loss(reconstruction, images), "quantizer": quantizer_loss}
                loss = parts["l2"] + quantizer_loss
                if perceptual:
                    parts["perceptual"] = perceptual.perceptual_loss(reconstruction, images)
                    loss = loss + config.perceptual_weight * parts["perceptual"]
            (loss / run.accumulate).backward()
            run.add(loss=loss, **parts)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        # no revival in the last fifth: the averaged weights need time to follow a moved code
        model.quantize.update_usage(config.revive_below if step < 0.8 * training.steps else 0.0)
        ema.update(model)
        run.log(step, grad_norm=grad_norm, **model.quantize.stats())
        preview_if_due(run, step, ema.model, originals)
        run.save_if_due(step, model=model, ema=ema, optimizer=optimizer)


def main():
    parser = trainer.command_line(__doc__, VQGANConfig, TrainConfig)
    parser.add_argument("--convnext", metavar="FILE", default="weights/convnext_small.pth")
    train(trainer.parse(parser))


if __name__ == "__main__":
    trainer.launch(main)
