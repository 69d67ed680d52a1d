"""Stages 1 and 2: NativeTok turns an image into a short ordered sequence of codes, and back.

    python tokenizer.py --tokens 8                # stage 1, after vqgan.py
    python tokenizer.py --tokens 8 --stage 2      # stage 2; after hnt.py with --tokens 16
    python tokenizer.py --model titok             # the baseline
    python tokenizer.py --reconstruct a.png b.jpg
    torchrun --nproc_per_node=4 tokenizer.py --tokens 128

The idea. A transformer, the Meta Image Transformer (MIT), reads the image once. Its result X_latent
is shared: all experts read the same one, and their gradients train MIT. Then L small
transformers, the experts (MoCET), write one token each, in order: expert i sees X_latent and the
tokens z_0 .. z_{i-1}, and writes z_i. So token i cannot depend on a later one, and a generator that
predicts z_i from z_0 .. z_{i-1} follows the order in which the tokens were made.

    image -> MIT -> X_latent -> experts -> z [L, d] -> to_code [L, c] -> quantizer -> codes [L]
    codes -> code vectors [L, c] -> token decoder -> logits over the VQGAN's codes, per cell
          -> softmax-weighted VQGAN vectors -> VQGAN decoder -> image

What trains. Stage 1: MIT, experts, to_code, quantizer and token decoder, by cross-entropy against
the codes that the frozen VQGAN (vqgan.py) gives the image, plus the quantizer's own loss. Stage 2:
the token decoder and copies of the VQGAN's codebook and decoder, on the pixels, with a perceptual
network and a discriminator. All that decides the codes is frozen there, so generators trained on
them stay valid.

Letters: B batch, H W pixels, N patches, L tokens, D width of MIT and decoder, d width of an expert,
c length of a code vector, K codes, G side of the VQGAN's grid, V codes of the VQGAN, C entries of
their vectors, h heads, T length of a sequence (T_i in an equation is expert i). Images are float32
[B, 3, H, W] in [0, 1]. Sections, equations and tables are those of the paper, "NativeTok: Native
Visual Tokenization for Improved Image Generation".
"""
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import data
import trainer
import vqgan
from trainer import BadInput, TrainConfig
from vqgan import VectorQuantizer, VQGANConfig


@dataclass(frozen=True)
class TokenizerConfig:
    model: Literal["nativetok", "titok", "titok_causal"] = "nativetok"  # which tokenizer
    tokens: int = 32                    # L: length of the code sequence
    patch_size: int = 16                # pixels per side of a patch that the encoder sees
    width: int = 1024                   # D: of MIT (or TiTok's encoder) and of the decoder
    encoder_layers: int = 18            # MIT 18; TiTok-L 24
    decoder_layers: int = 24            # of the token decoder
    heads: int = 16                     # h: of MIT and decoder
    expert_width: int = 256             # d
    expert_layers: int = 2              # the only depth that gives the paper's parameter counts
    expert_heads: int = 4               # of each expert
    code_dim: int = 12                  # c: length of a code vector
    codebook_size: int = 4096           # K
    revive_below: float = 0.0           # revive codes below this share of the average use; 0: never
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)     # read from vqgan.pt

    def __post_init__(self):
        if isinstance(self.vqgan, dict):                        # as a checkpoint holds it
            object.__setattr__(self, "vqgan", VQGANConfig(**self.vqgan))

    @property
    def image_size(self) -> int:        # H = W
        return self.vqgan.image_size

    @property
    def patches(self) -> int:           # N
        return (self.image_size // self.patch_size) ** 2


# ---- Transformer parts, shared by all models below

def normal(*shape, std):
    """A parameter of this shape, drawn from N(0, std^2)."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=std))


class Block(nn.Module):
    """Pre-norm transformer block: attention and a four times wider MLP. D is its own width, d in an
    expert."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def attend(self, q, k, v, mask=None):
        """q [B, Tq, D] over k, v [B, T, D] -> [B, Tq, D]."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, h, Tq, D/h]
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x, mask=None):
        """x [B, T, D] -> [B, T, D]; mask, if any: bool [T, T], True where row may see column."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)  # 3 x [B, T, D]
        x = x + self.attend(q, k, v, mask)
        return x + self.mlp(self.norm2(x))

    def last_position(self, x):
        """forward(x)[:, -1:], faster: every position gives its key and value, but only the last
        one's query and MLP are needed."""
        width = x.shape[-1]
        weight, bias = (p.split([width, 2 * width]) for p in (self.qkv.weight, self.qkv.bias))
        y = self.norm1(x)  # [B, T, D]
        q = F.linear(y[:, -1:], weight[0], bias[0])  # [B, 1, D]
        k, v = F.linear(y, weight[1], bias[1]).chunk(2, dim=-1)  # 2 x [B, T, D]
        x = x[:, -1:] + self.attend(q, k, v)  # [B, 1, D]
        return x + self.mlp(self.norm2(x))


class ImageTransformer(nn.Module):
    """A ViT, TiTok's with latent tokens beside the patches, NativeTok's without."""
    def __init__(self, config):
        super().__init__()
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.class_token = normal(1, 1, width, std=width ** -0.5)
        self.position_embedding = normal(1, config.patches + 1, width, std=width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.heads)
                                    for _ in range(config.encoder_layers))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, images, latents=None, mask=None):
        """Images [B, 3, H, W], latents [B, L, D] -> [B, 1 + N (+ L), D]: class token, patches,
        latents."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, N, D]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)  # [B, 1 + N, D]
        x = x + self.position_embedding
        if latents is not None:
            x = torch.cat([x, latents], dim=1)  # [B, 1 + N + L, D]
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.ln_post(x)


class TokenDecoder(nn.Module):
    """Code vectors -> logits over the VQGAN's codes for every grid cell (TiTok's decoder)."""
    def __init__(self, config):
        super().__init__()
        width, cells = config.width, config.vqgan.tokens  # G*G
        self.embed = nn.Linear(config.code_dim, width)
        self.class_token = normal(1, 1, width, std=width ** -0.5)
        self.mask_token = normal(1, 1, width, std=width ** -0.5)  # the same for all grid cells
        self.position_embedding = normal(1, cells + 1, width, std=width ** -0.5)
        self.latent_positions = normal(1, config.tokens, width, std=width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.heads)
                                    for _ in range(config.decoder_layers))
        self.ln_post = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(),
                                  nn.Linear(2 * width, config.vqgan.codebook_size))

    def forward(self, z_q):
        """z_q [B, k, c], any prefix of the tokens (k <= L) -> logits [B, G*G, V]."""
        cells = self.position_embedding.shape[1] - 1  # G*G
        x = torch.cat([self.class_token, self.mask_token.expand(1, cells, -1)], dim=1)
        x = (x + self.position_embedding).expand(len(z_q), -1, -1)  # [B, 1 + G*G, D]
        latents = self.embed(z_q) + self.latent_positions[:, :z_q.shape[1]]  # [B, k, D]
        x = self.ln_pre(torch.cat([x, latents], dim=1))  # [B, 1 + G*G + k, D]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_post(x[:, 1:1 + cells]))  # [B, G*G, V]


# ---- NativeTok's encoder

class MetaImageTransformer(nn.Module):
    """MIT: image -> X_latent [B, N, d], all that the experts will know of the image (section 3.1,
    equation 2)."""
    def __init__(self, config):
        super().__init__()
        self.transformer = ImageTransformer(config)
        # the paper's dimension switcher, D -> d
        self.to_expert_width = nn.Linear(config.width, config.expert_width)

    def forward(self, images):
        x = self.transformer(images)[:, 1:]  # [B, N, D], without the class token
        return self.to_expert_width(x)  # [B, N, d]


class Expert(nn.Module):
    """The transformer that writes one token: it reads [X_latent, z_0 .. z_{i-1}, pad] and keeps
    what comes out at the pad's position. No final norm: to_code reads z_i as it is, and the next
    experts begin with a norm of their own (our choice; the paper does not say)."""
    def __init__(self, width, heads, layers):
        super().__init__()
        self.position_embedding = normal(width, std=0.02)  # of token i, for later experts too
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x):
        """x [B, N + i + 1, d], pad last -> z_i [B, 1, d]. Of the last block only the pad's position
        is computed, for speed."""
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1].last_position(x)


class MoCET(nn.Module):
    """Mixture of Causal Expert Transformers: L experts write z_0 .. z_{L-1} in order (section 3.1,
    equation 4). Later experts read the vectors z_j, not their codes: quantization comes after the
    whole sequence (figure 2)."""
    def __init__(self, tokens, width, heads, layers):
        super().__init__()
        self.recompute = False  # True: run experts again in the backward pass, to save memory
        self.pad_token = normal(1, 1, width, std=0.02)  # z_padding, one for all experts
        self.experts = nn.ModuleList(Expert(width, heads, layers) for _ in range(tokens))

    def forward_plain(self, x_latent):
        """x_latent [B, N, d] -> z [B, L, d], as in equation 4."""
        z = []
        for expert in self.experts:
            pad = self.pad_token.expand(len(x_latent), -1, -1)  # [B, 1, d]
            earlier = [z_j + self.experts[j].position_embedding for j, z_j in enumerate(z)]
            # z_i = T_i(X_latent, z_0, ..., z_{i-1}, z_padding), at z_padding's position
            x = torch.cat([x_latent, *earlier, pad + expert.position_embedding], dim=1)
            for block in expert.blocks:
                x = block(x)  # [B, N + i + 1, d]
            z.append(x[:, -1:])  # [B, 1, d]
        return torch.cat(z, dim=1)

    def forward(self, x_latent):
        """The same values, faster: the sequence that all experts share is extended, not rebuilt,
        and each expert's last block computes the pad's position only."""
        sequence, z = x_latent, []  # [B, N + i, d]
        for expert in self.experts:
            pad = (self.pad_token + expert.position_embedding).expand(len(x_latent), -1, -1)
            x = torch.cat([sequence, pad], dim=1)  # [B, N + i + 1, d]
            if self.recompute:  # an expert draws no random numbers: no state to put back
                z_i = checkpoint(expert, x, use_reentrant=False, preserve_rng_state=False)
            else:
                z_i = expert(x)  # [B, 1, d]
            sequence = torch.cat([sequence, z_i + expert.position_embedding], dim=1)
            z.append(z_i)
        return torch.cat(z, dim=1)  # [B, L, d]


# ---- The tokenizers

class NativeTok(nn.Module):
    """encode: images -> codes int64 [B, L]; decode_codes: codes or a prefix of them -> images."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.make_encoder(config)
        # Another quantizer goes here; vqgan.VectorQuantizer says which methods it needs.
        self.quantizer = VectorQuantizer(config.codebook_size, config.code_dim, l2_norm=True,
                                         unit_rows=config.revive_below > 0)
        self.decoder = TokenDecoder(config)
        # the VQGAN's codebook and decoder, which stage 2 trains
        self.pixel_codebook = nn.Embedding(config.vqgan.codebook_size, config.vqgan.code_dim)
        self.pixel_decoder = vqgan.Decoder(config.vqgan)
        self.pixel_codebook.requires_grad_(False)
        self.pixel_decoder.requires_grad_(False)
        self.apply(initialize)

    def make_encoder(self, config):
        self.mit = MetaImageTransformer(config)
        self.mocet = MoCET(config.tokens, config.expert_width, config.expert_heads,
                           config.expert_layers)
        self.to_code = nn.Linear(config.expert_width, config.code_dim)  # d -> c

    def latents(self, images):
        """Images [B, 3, H, W] in [0, 1] -> [B, L, c], before quantization. latents[:, i] does not
        depend on experts after i (equation 1)."""
        return self.to_code(self.mocet(self.mit(images)))

    @torch.no_grad()
    def encode(self, images):
        """Images [B, 3, H, W] in [0, 1] -> codes int64 [B, L]."""
        return self.quantizer.codes(self.latents(images))

    @torch.no_grad()
    def decode_codes(self, codes, hard=False):
        """Codes int64 [B, k], k <= L -> images [B, 3, H, W] in [0, 1]. The pixel decoder reads the
        VQGAN's code vectors averaged with the predicted probabilities, as stage 2 trains it; with
        hard=True the most probable one."""
        logits = self.decoder(self.quantizer.lookup(codes))  # [B, G*G, V]
        if hard:
            best = logits.argmax(-1, keepdim=True)  # [B, G*G, 1]
            logits = torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
        return self.decode_logits(logits).clamp(0, 1)

    def decode_logits(self, logits):
        """Logits over the VQGAN's codes [B, G*G, V] -> images [B, 3, H, W], not clamped."""
        expected = logits.softmax(-1) @ self.pixel_codebook.weight  # [B, G*G, C]
        grid = expected.transpose(1, 2).unflatten(2, (self.config.vqgan.grid, -1))  # [B, C, G, G]
        return self.pixel_decoder(grid)


class TiTok(NativeTok):
    """The baseline (arXiv 2406.07550): latent tokens stand beside the patches in one transformer,
    and all see each other. titok_causal (Table 3a): a latent sees the image and the latents up to
    itself, and the image sees no latent, or a later one would reach an earlier one through it."""
    legacy = False  # True: the order of numbers in the published weights, see extras/pretrained

    def make_encoder(self, config):
        self.encoder = ImageTransformer(config)
        self.latent_tokens = normal(1, config.tokens, config.width, std=config.width ** -0.5)
        self.to_code = nn.Linear(config.width, config.code_dim)  # D -> c
        mask = None
        if config.model == "titok_causal":
            image = config.patches + 1  # class token, patches
            column = torch.arange(image + config.tokens)  # [T]
            mask = (column <= column[:, None]) | (column < image)  # [T, T]
        self.register_buffer("mask", mask, persistent=False)

    def latents(self, images):
        latents = self.latent_tokens.expand(len(images), -1, -1)  # [B, L, D]
        latents = self.encoder(images, latents, self.mask)[:, -self.config.tokens:]
        if self.legacy:  # memory of [L, D] read as if it were [D, L], then transposed
            latents = latents.reshape(len(images), -1, self.config.tokens).transpose(1, 2)
        return self.to_code(latents)  # [B, L, c]


def initialize(module):
    """Xavier for linear layers and the patch convolution. With TiTok's std of 0.02 the narrow toy
    experts hardly change their pad token, all z_i look alike, and the codebook nearly collapses."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, ImageTransformer):
        nn.init.xavier_uniform_(module.patch_embed.weight.flatten(1))
        nn.init.zeros_(module.patch_embed.bias)


def build(config):
    return (NativeTok if config.model == "nativetok" else TiTok)(config)


def load_tokenizer(path, device="cpu", make="python tokenizer.py"):
    """A trained NativeTok or TiTok with its averaged weights, frozen and in eval mode; fine_tuned:
    has been through stage 2. Raises BadInput, with the command `make`, where there is none."""
    saved = trainer.load_checkpoint(path, "tokenizer", make)
    model = trainer.load_model(build, TokenizerConfig, saved, path)
    model.fine_tuned = "losses" in saved["settings"]  # which stage 2 alone has
    return model.to(device)


def default_tokenizer(out, tokens, model="nativetok"):
    """The file of this tokenizer in the folder out, after stage 2 if it is there, else BadInput."""
    for name in (f"{model}_{tokens}_stage2.pt", f"{model}_{tokens}.pt"):
        if (Path(out) / name).exists():
            return Path(out) / name
    raise BadInput(f"{out}: no {model} of {tokens} tokens there. Train it first: python "
                   f"tokenizer.py --tokens {tokens} --model {model}")


# ---- Sizes, and how they are trained (paper, Table 4; the decoder as TiTok-L's)

FULL = TokenizerConfig()
SMALL = replace(FULL, width=512, encoder_layers=12, decoder_layers=12, heads=8, expert_width=192,
                expert_heads=3)  # for one GPU of 24 GB
TOY = TokenizerConfig(tokens=16, patch_size=8, width=128, encoder_layers=4, decoder_layers=2,
                      heads=4, expert_width=64, expert_heads=2, code_dim=8, codebook_size=512,
                      revive_below=0.05, vqgan=vqgan.PRESETS["toy"])
TITOK_L = replace(FULL, model="titok", encoder_layers=24)
PRESETS = {
    "toy": TOY,
    "small": SMALL,
    "full": FULL,
    "titok_toy": replace(TOY, model="titok", encoder_layers=12),  # as many parameters as TOY
    "titok_small": replace(SMALL, model="titok", encoder_layers=21),
    "titok_full": TITOK_L,
    "titok_l_32": TITOK_L,
}
PRESETS |= {f"nativetok_{tokens}": replace(FULL, tokens=tokens) for tokens in (32, 64, 128)}
TOY_TRAINING = TrainConfig(steps=1200, batch_size=16, learning_rate=1e-3, end_learning_rate=5e-5,
                           warmup=50, ema=0.99, workers=0, log_every=50, save_every=300,
                           preview_every=600)
TRAINING = {  # by --config and stage
    ("toy", 1): TOY_TRAINING,
    ("toy", 2): replace(TOY_TRAINING, steps=500, learning_rate=2e-4, end_learning_rate=1e-5,
                        warmup=20, beta2=0.999, log_every=25, save_every=200, preview_every=200),
    ("small", 1): TrainConfig(),
    ("small", 2): TrainConfig(beta2=0.999, micro_batch=16),
    ("full", 1): TrainConfig(),
    ("full", 2): TrainConfig(beta2=0.999, micro_batch=32),  # 64 at once do not fit in 80 GB
}


# ---- Stage 1: predict the VQGAN's codes

class Stage1Loss(nn.Module):
    """Cross-entropy and the quantizer's losses (codebook, commitment; straight-through gradient). A
    module, so that DistributedDataParallel can wrap it."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, targets):
        """Images [B, 3, H, W] and the VQGAN's codes of them [B, G*G] -> loss, its parts."""
        z_q, quantizer_loss = self.model.quantizer(self.model.latents(images))  # [B, L, c]
        logits = self.model.decoder(z_q)  # [B, G*G, V]
        cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        parts = {"cross_entropy": cross_entropy, "quantizer": quantizer_loss}
        return cross_entropy + quantizer_loss, parts


def prepare(model, training):
    """Set up --compile and --recompute, which change values by rounding only."""
    if training.compile:
        trainer.compile_methods(Block, "forward", "last_position")
    if hasattr(model, "mocet"):
        model.mocet.recompute = training.recompute


def train_stage1(args, config):
    # at full size more than 64 tokens leave too little of 80 GB without --recompute
    training = replace(TRAINING[args.config, 1], recompute=config.tokens > 64)
    training = trainer.override(training, args)
    teacher = vqgan.load_vqgan(args.out / "vqgan.pt", args.device)  # frozen
    config = replace(config, vqgan=teacher.config)
    train_set = data.open_dataset(args.data, "train", config.image_size, augment=True, draft=True)
    val_set = data.open_dataset(args.data, "val", config.image_size)
    originals, _ = next(data.all_images(val_set, 16))  # for previews, [16, 3, H, W]
    run = trainer.Run(args, "tokenizer", f"{config.model}_{config.tokens}", config, training,
                      train_set, vqgan=trainer.fingerprint(teacher))

    model = build(config)
    model.pixel_codebook.weight.data.copy_(teacher.quantize.codebook())
    model.pixel_decoder.load_state_dict(teacher.decoder.state_dict())
    prepare(model, training)
    model = model.to(run.device)  # all of it trains but pixel_codebook and pixel_decoder
    loss_fn = run.parallel(Stage1Loss(model))
    optimizer = trainer.adamw(model, training)
    ema = trainer.Ema(model, training.ema)
    run.start(model=model, ema=ema, optimizer=optimizer)
    batches = data.batches(train_set, *run.order, training.workers)

    for step in range(run.step, training.steps):
        trainer.set_lr(optimizer, trainer.cosine(step, training))
        optimizer.zero_grad()
        for images, _ in run.micro_batches(batches, loss_fn):  # [B, 3, H, W]
            targets = teacher.encode(images)  # [B, G*G], in float32
            with run.autocast():
                loss, parts = loss_fn(images, targets)
            (loss / run.accumulate).backward()
            run.add(loss=loss, **parts)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        # no revival in the last fifth: the averaged weights need time to follow a moved code
        revive_below = config.revive_below if step < 0.8 * training.steps else 0.0
        model.quantizer.update_usage(revive_below)
        ema.update(model)
        run.log(step, grad_norm=grad_norm, **model.quantizer.stats())
        vqgan.preview_if_due(run, step, ema.model, originals)
        run.save_if_due(step, model=model, ema=ema, optimizer=optimizer)


# ---- Stage 2: fine-tune the token decoder and the pixel decoder on the pixels

@dataclass(frozen=True)
class Stage2Config:
    """The losses of stage 2 (TiTok's public recipe)."""
    perceptual: Literal["convnext", "small", "none"] = "convnext"   # the perceptual network
    perceptual_weight: float = 0.1      # beside 1 for L2
    gan_weight: float = 0.01            # of the decoders' adversarial loss
    gan_start: int = 20_000             # step at which the discriminator starts
    lecam_weight: float = 0.001         # LeCam regularization of the discriminator
    discriminator: Literal["patch", "features"] = "patch"   # TiTok's; or heads on perceptual small
    discriminator_first: int = 0        # its first steps, in which the decoders wait
    sharpen: float = 1.0                # multiply the decoder's logits by this at the start


STAGE2 = {  # a PatchGAN needs thousands of steps, the toy has 500: docs/results.md
    "toy": Stage2Config(perceptual="small", gan_weight=0.1, gan_start=0, sharpen=8.0,
                        discriminator="features", discriminator_first=100),
    "small": Stage2Config(), "full": Stage2Config()}


class Stage2Loss(nn.Module):
    """The decoders' loss: L2, perceptual and, once the discriminator has started, adversarial. The
    decoders run under autocast, all after them in float32, as in TiTok: bf16's rounding would
    hide small perceptual differences."""
    def __init__(self, model, perceptual, config):
        super().__init__()
        self.model, self.perceptual, self.config = model, perceptual, config

    def forward(self, images, discriminator=None):
        """Images [B, 3, H, W] -> loss, its parts, reconstruction [B, 3, H, W]. discriminator: None
        before gan_start."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            z_q = self.model.quantizer.lookup(self.model.encode(images))  # [B, L, c], frozen
        reconstruction = self.model.decode_logits(self.model.decoder(z_q)).float()
        with torch.autocast(images.device.type, enabled=False):
            parts = {"l2": F.mse_loss(reconstruction, images)}  # [B, 3, H, W] both
            loss = parts["l2"]
            if self.perceptual is not None:
                parts["perceptual"] = self.perceptual.perceptual_loss(reconstruction, images)
                loss = loss + self.config.perceptual_weight * parts["perceptual"]
            if discriminator is not None:
                parts["adversarial"] = -discriminator(reconstruction).mean()  # look real
                loss = loss + self.config.gan_weight * parts["adversarial"]
        return loss, parts, reconstruction


class DiscriminatorLoss(nn.Module):
    """Hinge loss on images and their reconstructions, and LeCam regularization: the mean logits of
    real and fake stay near each other's running means (2104.03310)."""
    def __init__(self, discriminator, lecam_weight, decay=0.999):
        super().__init__()
        self.discriminator, self.lecam_weight, self.decay = discriminator, lecam_weight, decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, images, reconstruction):
        """Both [B, 3, H, W] -> scalar. The discriminator gives one logit per region."""
        logits = self.discriminator(torch.cat([images, reconstruction]))  # [2B, regions]
        real, fake = logits.chunk(2)
        hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        real, fake = real.mean(), fake.mean()
        lecam = F.relu(real - self.fake_mean).square() + F.relu(self.real_mean - fake).square()
        with torch.no_grad():
            self.real_mean.lerp_(real, 1 - self.decay)
            self.fake_mean.lerp_(fake, 1 - self.decay)
        return hinge + self.lecam_weight * lecam


def train_stage2(args):
    if args.checkpoint:
        trainer.refuse(args, ("tokens",), "--checkpoint has its own")
    tokens = args.tokens or PRESETS[args.config].tokens
    source = args.checkpoint or args.out / f"nativetok_{tokens}.pt"
    model = load_tokenizer(source, make=f"python tokenizer.py --tokens {tokens}")
    if model.fine_tuned:
        raise BadInput(f"{source}: has been through stage 2 already. Start from the stage 1 file")
    config, training = model.config, trainer.override(TRAINING[args.config, 2], args)
    losses = trainer.override(STAGE2[args.config], args)
    if losses.discriminator == "features" and losses.perceptual != "small":
        raise BadInput("--discriminator features: needs --perceptual small. Or give patch")
    train_set = data.open_dataset(args.data, "train", config.image_size, augment=True, draft=True)
    val_set = data.open_dataset(args.data, "val", config.image_size)
    originals, _ = next(data.all_images(val_set, 16))  # for previews, [16, 3, H, W]
    run = trainer.Run(args, "tokenizer", f"{source.stem}_stage2", config, training, train_set,
                      losses=asdict(losses), source=trainer.fingerprint(model))
    perceptual = vqgan.perceptual_network(losses.perceptual, train_set, args.out, args.convnext,
                                          run.device)

    prepare(model, training)
    model = model.to(run.device, memory_format=torch.channels_last)  # faster convolutions
    for p in model.decoder.head[-1].parameters():  # on --resume, run.start overwrites this
        p.data *= losses.sharpen
    # what trains, beside the discriminator; all else came frozen from load_tokenizer
    for part in (model.decoder, model.pixel_codebook, model.pixel_decoder):
        part.requires_grad_(True)
    decoder_parameters = [p for p in model.parameters() if p.requires_grad]
    if losses.discriminator == "patch":
        discriminator = vqgan.Discriminator(grid=min(16, config.image_size // 8))
        relative_rate, betas = 1.0, (0.9, 0.999)  # as TiTok
    else:
        discriminator = vqgan.FeatureDiscriminator(perceptual)
        relative_rate, betas = 5.0, (0.5, 0.99)
    adversary = DiscriminatorLoss(discriminator, losses.lecam_weight)
    adversary = adversary.to(run.device, memory_format=torch.channels_last)
    gan_training = replace(training, steps=training.steps - losses.gan_start)
    loss_fn = run.parallel(Stage2Loss(model, perceptual, losses))
    discriminator_loss_fn = run.parallel(adversary)
    optimizer = trainer.adamw(model, training)
    discriminator_optimizer = trainer.adamw(discriminator, training, betas)
    ema = trainer.Ema(model, training.ema)
    saved = dict(model=model, ema=ema, optimizer=optimizer, discriminator=adversary,
                 discriminator_optimizer=discriminator_optimizer)
    run.start(**saved)
    batches = data.batches(train_set, *run.order, training.workers)

    for step in range(run.step, training.steps):
        adversarial = step >= losses.gan_start and losses.gan_weight > 0
        decoders_wait = adversarial and step < losses.gan_start + losses.discriminator_first
        # a rate of 0, not a skipped step: AdamW's averages are ready when the decoders start
        trainer.set_lr(optimizer, 0.0 if decoders_wait else trainer.cosine(step, training))
        gan_step = max(0, step - losses.gan_start)  # its own warm-up and cosine begin there
        trainer.set_lr(discriminator_optimizer,
                       relative_rate * trainer.cosine(gan_step, gan_training))
        optimizer.zero_grad()
        discriminator_optimizer.zero_grad()
        for images, _ in run.micro_batches(batches, loss_fn):  # [B, 3, H, W]
            opponent = discriminator if adversarial else None
            with run.autocast():
                loss, parts, reconstruction = loss_fn(images, opponent)
            # inputs: this leaves no gradient in the discriminator
            (loss / run.accumulate).backward(inputs=decoder_parameters)
            if adversarial:     # now the discriminator, on the same reconstruction
                parts["discriminator"] = discriminator_loss_fn(images, reconstruction.detach())
                (parts["discriminator"] / run.accumulate).backward()
            run.add(loss=loss, **parts)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        if adversarial:
            nn.utils.clip_grad_norm_(discriminator.parameters(), training.clip)
            discriminator_optimizer.step()
        ema.update(model)
        run.log(step, grad_norm=grad_norm)
        vqgan.preview_if_due(run, step, ema.model, originals)
        run.save_if_due(step, **saved)


# ---- Command line

def reconstruct(model, names, path):
    """Write each image beside its reconstruction, and print the codes."""
    size, device = model.config.image_size, next(model.parameters()).device
    images = torch.stack([torch.from_numpy(data.read_image(name, size)) for name in names]) / 255
    codes = model.encode(images.to(device))  # [n, L]
    for name, row in zip(names, codes.tolist()):
        print(f"{name}: {' '.join(map(str, row))}")
    pairs = torch.stack([images, model.decode_codes(codes).cpu()], dim=1).flatten(0, 1)
    data.save_picture(data.picture_grid(pairs, 2, scale=max(1, 128 // size)), path)


def main():
    stage2 = "--stage 2" in " ".join(sys.argv).replace("=", " ")  # each stage has its own flags
    parser = trainer.command_line(__doc__, TrainConfig, Stage2Config if stage2 else TokenizerConfig)
    add = parser.add_argument
    add("--stage", type=int, choices=(1, 2), default=1,
        help="1: predict codes; 2: fine-tune the decoders; -h for each")
    if stage2:
        add("--tokens", type=int, help="L: of the NativeTok in --out")
        add("--checkpoint", metavar="FILE", type=Path,
            help="the tokenizer, instead of --tokens; the result's name is this and _stage2")
        add("--convnext", metavar="FILE", default="weights/convnext_small.pth",
            help="torchvision's convnext_small, for --perceptual convnext")
        return train_stage2(trainer.parse(parser))
    add("--reconstruct", metavar=("IMAGE", "..."), nargs="+", help="do this instead of training")
    args = trainer.parse(parser)
    titok = "titok" in getattr(args, "model", "")
    if titok:
        experts = [name for name in vars(args) if name.startswith("expert_")]
        trainer.refuse(args, experts, "TiTok has no experts")
    config = trainer.override(PRESETS[f"titok_{args.config}" if titok else args.config], args)
    if not args.reconstruct:
        return train_stage1(args, config)
    sizes = {*TokenizerConfig.__dataclass_fields__} - {"model", "tokens"}
    trainer.refuse(args, {*TrainConfig.__dataclass_fields__} | sizes, "not with --reconstruct")
    path = default_tokenizer(args.out, config.tokens, config.model)
    picture = args.out / "reconstruct.png"
    reconstruct(load_tokenizer(path, args.device), args.reconstruct, picture)
    print(f"{picture}: original beside reconstruction, by {path}")


if __name__ == "__main__":
    trainer.launch(main)
