"""Stages 1 and 2: NativeTok turns an image into a short ordered sequence of codes, and back; TiTok for comparison.

    python tokenizer.py --tokens 8                    # stage 1, toy (what runs without a GPU): 8 codes an image
    python tokenizer.py --tokens 16 --stage 2         # stage 2: fine-tune what turns codes into pixels
    python tokenizer.py --tokens 16 --model titok     # the baseline; at 16 tokens with equal parameters
    python tokenizer.py --reconstruct a.png b.jpg     # original beside reconstruction, and the codes
    torchrun --nproc_per_node=4 tokenizer.py --tokens 128     # full (what runs where CUDA is present), 4 GPUs

The idea. An image is read once by a transformer (the Meta Image Transformer, MIT); its result X_latent is locked: all
experts read the same and none rewrites it (gradients do flow back into MIT). Then L small transformers, the experts (MoCET), write one token each, in
order: expert i sees X_latent and the tokens z_0 .. z_{i-1} that are already written, and writes z_i. So token i cannot
depend on a later one, and what a generator has to learn afterwards, p(z_i | z_0 .. z_{i-1}), is how the tokens were
made in the first place.

    image -> MIT -> X_latent -> experts 0 .. L-1 -> z [L x d] -> to_code [L x c] -> quantizer -> codes [L]
    codes -> code vectors [L x c] -> token decoder -> a VQGAN code for every grid cell -> VQGAN decoder -> image

What trains. Stage 1: MIT, experts, to_code, quantizer and token decoder, by cross-entropy against the codes that the
frozen VQGAN (vqgan.py) gives the image, plus the quantizer's own loss. Stage 2: the token decoder and the VQGAN's
pixel decoder (the painters), on the pixels, and beside them a discriminator that is thrown away afterwards; everything
that decides the codes is frozen, so that generators trained on the codes stay valid. (hnt.py: from L to more tokens.)

A code is a number 0 .. K-1; its code vector, a row of the codebook, has c entries.
Letters: B batch, H W pixels, P patches the MIT sees, L tokens, D width of MIT and decoder, d width of the experts,
c length of a code vector, K codes, G side of the VQGAN's grid, V codes of the VQGAN and C entries of their vectors,
h heads, T a sequence's length (but T_i, in the equations, is expert i).
Images are float32 [B, 3, H, W] in [0, 1]. Section and equation numbers are the paper's.
"""
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import data
import trainer
import vqgan
from trainer import BadInput, TrainConfig
from vqgan import VectorQuantizer, VQGANConfig

MODELS = ("nativetok", "titok", "titok_causal")


@dataclass(frozen=True)
class TokenizerConfig:
    model: str = "nativetok"            # nativetok, titok, or titok_causal (causal mask over the latent tokens)
    tokens: int = 32                    # L: length of the code sequence
    patch_size: int = 16                # pixels of a patch that the encoder sees, each way
    width: int = 1024                   # D: of MIT (or TiTok's encoder) and of the decoder
    encoder_layers: int = 18            # MIT 18; TiTok-L 24
    decoder_layers: int = 24            # of the token decoder
    heads: int = 16                     # of MIT and decoder
    expert_width: int = 256             # d
    expert_layers: int = 2              # 2: the only depth that gives the paper's parameter counts
    expert_heads: int = 4               # of each expert
    code_dim: int = 12                  # c: length of a code vector
    codebook_size: int = 4096           # K
    revive_below: float = 0.0           # revive codes used less than this share of the average; 0: never
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)     # whose codes are predicted; read off vqgan.pt

    def __post_init__(self):
        trainer.choose("--model", self.model, MODELS)
        if isinstance(self.vqgan, dict):                        # as a checkpoint holds it
            object.__setattr__(self, "vqgan", VQGANConfig(**self.vqgan))
        if self.tokens < 1:
            raise BadInput(f"--tokens {self.tokens}: at least 1")
        if self.image_size % self.patch_size:
            raise BadInput(f"--patch_size {self.patch_size}: does not divide the image's {self.image_size} pixels")
        for width, heads in (("width", "heads"), ("expert_width", "expert_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise BadInput(f"--{width} {getattr(self, width)}: not a multiple of --{heads} {getattr(self, heads)}")

    @property
    def image_size(self) -> int:        # H = W
        return self.vqgan.image_size

    @property
    def patches(self) -> int:           # P
        return (self.image_size // self.patch_size) ** 2

    @property
    def grid(self) -> int:              # G
        return self.vqgan.grid


TOY = TokenizerConfig(tokens=16, patch_size=8, width=128, encoder_layers=4, decoder_layers=2, heads=4, expert_width=64,
                      expert_heads=2, code_dim=8, codebook_size=512, revive_below=0.05, vqgan=vqgan.PRESETS["toy"])
FULL = TokenizerConfig()
TITOK_L = replace(FULL, model="titok", encoder_layers=24)
PRESETS = {
    "toy": TOY,
    "titok_toy": replace(TOY, model="titok", encoder_layers=12),                # as many parameters as NativeTok-16
    "full": FULL,
    "nativetok_32": FULL,
    "nativetok_64": replace(FULL, tokens=64),
    "nativetok_128": replace(FULL, tokens=128),
    "titok_l_32": TITOK_L,
    "titok_l_causal_32": replace(TITOK_L, model="titok_causal"),                # paper, Table 3a
    "titok_b_64": replace(TITOK_L, tokens=64, width=768, heads=12, encoder_layers=12, decoder_layers=12),
    "titok_s_128": replace(TITOK_L, tokens=128, width=512, heads=8, encoder_layers=8, decoder_layers=8),
}
TRAINING = {
    ("toy", 1): TrainConfig(steps=1600, batch_size=16, learning_rate=1e-3, end_learning_rate=5e-5, warmup=50, ema=0.99,
                            workers=0, log_every=50, save_every=300, preview_every=600),
    ("toy", 2): TrainConfig(steps=400, batch_size=16, learning_rate=2e-4, end_learning_rate=1e-5, warmup=20, ema=0.99,
                            beta2=0.999, workers=0, log_every=25, save_every=200, preview_every=200),
    ("full", 1): TrainConfig(),
    ("full", 2): TrainConfig(beta2=0.999, accumulate=2),        # 64 images at once are more than 80 GB hold
}


@dataclass(frozen=True)
class Stage2Config:
    """Weights of the stage 2 losses (TiTok's public recipe)."""
    perceptual: str = "convnext"        # perceptual network: small, convnext or none
    perceptual_weight: float = 0.1      # beside 1 for L2
    gan_weight: float = 0.01            # of the generator's adversarial loss
    gan_start: int = 20_000             # step at which the discriminator comes in
    lecam_weight: float = 0.001         # LeCam regularization of the discriminator
    discriminator: str = "patch"        # patch: TiTok's; features: heads on the perceptual network small, for few steps
    discriminator_rate: float = 1.0     # its learning rate / the painters'
    discriminator_first: int = 0        # steps at the start in which only it learns; needs gan_start 0
    discriminator_beta1: float = 0.9    # its AdamW: momentum
    discriminator_beta2: float = 0.999  # its AdamW: second moment
    sharpen: float = 1.0                # multiply the decoder's logits by this at the start: see README, choices

    def __post_init__(self):
        trainer.choose("--perceptual", self.perceptual, ("small", "convnext", "none"))
        trainer.choose("--discriminator", self.discriminator, ("patch", "features"))
        if self.discriminator_first and (self.gan_start or self.gan_weight <= 0):
            raise BadInput(f"--discriminator_first {self.discriminator_first}: needs --gan_start 0 and a --gan_weight, or "
                           f"nobody learns in these steps. Set it to 0")
        if self.discriminator == "features" and self.perceptual != "small":
            raise BadInput(f"--discriminator features: needs --perceptual small, not {self.perceptual}. Use patch")


STAGE2 = {"toy": Stage2Config(perceptual="small", gan_weight=0.1, gan_start=0, sharpen=8.0,
                              discriminator="features", discriminator_rate=5.0, discriminator_first=100,
                              discriminator_beta1=0.5, discriminator_beta2=0.99), "full": Stage2Config()}


# ---------------------------------------------------------------------------------------------------------------------
# Transformer parts, shared by all models below

def normal(*shape, std):
    """A parameter of this shape, drawn from N(0, std^2)."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=std))


class Block(nn.Module):
    """Pre-norm transformer block: attention and an MLP four times as wide, each with a skip. In an expert D is d."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, q, k, v, mask=None):
        """q [B, Tq, D] over k, v [B, T, D] -> [B, Tq, D]."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))    # [B, h, Tq or T, D/h]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def forward(self, x, mask=None):
        """x [B, T, D]; mask, if any: bool [T, T], True where row may look at column."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)                  # 3 x [B, T, D]
        x = x + self.attend(q, k, v, mask)
        return x + self.mlp(self.norm2(x))

    def last_position(self, x):
        """forward(x)[:, -1:] for less: every position gives its key and value, but only the last one asks, and only
        its MLP runs. What the other positions would become, nobody reads."""
        width = x.shape[-1]
        y = self.norm1(x)                                                   # [B, T, D]
        q = F.linear(y[:, -1:], self.qkv.weight[:width], self.qkv.bias[:width])             # [B, 1, D]
        k, v = F.linear(y, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, dim=-1)     # 2 x [B, T, D]
        x = x[:, -1:] + self.attend(q, k, v)                                # [B, 1, D]
        return x + self.mlp(self.norm2(x))


class ImageTransformer(nn.Module):
    """A ViT: image -> one vector a patch. TiTok appends latent tokens to the patches, NativeTok does not."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.class_token = normal(1, 1, width, std=width ** -0.5)
        self.positions = normal(1, config.patches + 1, width, std=width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.encoder_layers))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, images, latents=None, mask=None):
        """Images [B, 3, H, W], latents [B, L, D] -> [B, 1 + P (+ L), D]: class token, patches, latents."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2)             # [B, P, D]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions    # [B, 1 + P, D]
        if latents is not None:
            x = torch.cat([x, latents], dim=1)                              # [B, 1 + P + L, D]
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.ln_post(x)


class TokenDecoder(nn.Module):
    """Quantized tokens -> logits over the VQGAN's codes for every grid cell (TiTok's decoder)."""

    def __init__(self, config):
        super().__init__()
        width, cells = config.width, config.grid ** 2
        self.embed = nn.Linear(config.code_dim, width)
        self.class_token = normal(1, 1, width, std=width ** -0.5)
        self.mask_token = normal(1, 1, width, std=width ** -0.5)        # stands at each grid cell
        self.positions = normal(1, cells + 1, width, std=width ** -0.5)
        self.latent_positions = normal(1, config.tokens, width, std=width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.decoder_layers))
        self.ln_post = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(),
                                  nn.Linear(2 * width, config.vqgan.codebook_size))

    def forward(self, z_q):
        """z_q [B, k, c], any prefix of the tokens (k <= L) -> logits [B, G*G, V]."""
        cells = self.positions.shape[1] - 1
        x = torch.cat([self.class_token, self.mask_token.expand(1, cells, -1)], dim=1)  # [1, 1 + G*G, D]
        x = x + self.positions
        latents = self.embed(z_q) + self.latent_positions[:, :z_q.shape[1]]             # [B, k, D]
        x = self.ln_pre(torch.cat([x.expand(len(z_q), -1, -1), latents], dim=1))        # [B, 1 + G*G + k, D]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_post(x[:, 1:1 + cells]))                               # [B, G*G, V]


# ---------------------------------------------------------------------------------------------------------------------
# NativeTok's encoder

class MetaImageTransformer(nn.Module):
    """MIT: image -> X_latent [B, P, d], everything the experts will know of the image (section 3.1, equation 2)."""

    def __init__(self, config):
        super().__init__()
        self.transformer = ImageTransformer(config)
        self.switch = nn.Linear(config.width, config.expert_width)          # the dimension switcher, D -> d

    def forward(self, images):
        return self.switch(self.transformer(images)[:, 1:])                 # [B, P, d], without the class token


class Expert(nn.Module):
    """The transformer that writes a token: reads [X_latent, z_0 .. z_{i-1}, pad], keeps what comes out for the pad."""

    def __init__(self, width, heads, layers):
        super().__init__()
        self.position = normal(width, std=0.02)             # marks token i, here and for later experts
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x):
        """x [B, P + i + 1, d], pad last -> z_i [B, 1, d]."""
        for block in self.blocks[:-1]:
            x = block(x)                                                    # [B, P + i + 1, d]
        return self.blocks[-1].last_position(x)

    def forward_plain(self, x):
        """The same in plain words (read this first; a test holds both equal): run all blocks on all, keep the last."""
        for block in self.blocks:
            x = block(x)
        return x[:, -1:]


class MoCET(nn.Module):
    """Mixture of Causal Expert Transformers: L experts write z_0 .. z_{L-1} in order (section 3.1, equation 4).

    Later experts read the vectors z_j, not their codes: quantization comes after the whole sequence (figure 2).
    """

    def __init__(self, tokens, width, heads, layers):
        super().__init__()
        self.recompute = False      # True: keep of an expert's insides nothing for the backward pass, but run it again
        self.pad_token = normal(1, 1, width, std=0.02)      # z_padding, one for all experts
        self.experts = nn.ModuleList(Expert(width, heads, layers) for _ in range(tokens))

    def forward_plain(self, x_latent):
        """x_latent [B, P, d] -> z [B, L, d], to be read with equation 4 beside it."""
        z = []
        for expert in self.experts:
            pad = self.pad_token.expand(len(x_latent), -1, -1)              # [B, 1, d]
            marked = [z_j + self.experts[j].position for j, z_j in enumerate(z)] + [pad + expert.position]
            # eq. 4: z_i = T_i(X_latent, z_0, ..., z_{i-1}, z_padding), kept at the position of z_padding
            z.append(expert.forward_plain(torch.cat([x_latent, *marked], dim=1)))       # T = P + i + 1
        return torch.cat(z, dim=1)

    def forward(self, x_latent):
        """The same values for less: in an expert's last block only z_i's own query and MLP are computed, and the
        sequence that all experts share is extended instead of being put together anew."""
        sequence, z = x_latent, []                                          # sequence: [B, P + i, d]
        for expert in self.experts:
            pad = (self.pad_token + expert.position).expand(len(x_latent), -1, -1)      # [B, 1, d]
            x = torch.cat([sequence, pad], dim=1)                           # [B, P + i + 1, d]
            z_i = checkpoint(expert, x, use_reentrant=False) if self.recompute else expert(x)      # [B, 1, d]
            sequence = torch.cat([sequence, z_i + expert.position], dim=1)
            z.append(z_i)
        return torch.cat(z, dim=1)                                          # [B, L, d]


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizers

class NativeTok(nn.Module):
    """encode: images -> codes int64 [B, L]; decode_codes: codes, or any prefix of them, back to images."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.make_encoder(config)
        # Another quantizer goes here, with the methods of vqgan.VectorQuantizer: q(z) -> (z_q, straight-through; loss;
        # codes), codes(z), lookup(codes), track_usage(z, codes, revive_below), use() -> {name: value} for the log. It
        # wants a field of TokenizerConfig that chooses it; in extras/, load_titok and tokenizer_macs know this one.
        self.quantizer = VectorQuantizer(config.codebook_size, config.code_dim, l2_norm=True)      # as TiTok's
        self.decoder = TokenDecoder(config)
        # The VQGAN's codebook and decoder travel in the tokenizer's file, since stage 2 changes the decoder.
        self.pixel_codebook = nn.Embedding(config.vqgan.codebook_size, config.vqgan.code_dim).requires_grad_(False)
        self.pixel_decoder = vqgan.Decoder(config.vqgan).requires_grad_(False)
        self.apply(initialize)

    def make_encoder(self, config):
        self.mit = MetaImageTransformer(config)
        self.mocet = MoCET(config.tokens, config.expert_width, config.expert_heads, config.expert_layers)
        self.to_code = nn.Linear(config.expert_width, config.code_dim)      # d -> c

    def latents(self, images):
        """Images [B, 3, H, W] in [0, 1] -> [B, L, c], before quantization. latents[:, i] does not depend on
        experts after i (equation 1)."""
        return self.to_code(self.mocet(self.mit(images)))

    @torch.no_grad()
    def encode(self, images):
        """Images [B, 3, H, W] in [0, 1] -> codes int64 [B, L]."""
        return self.quantizer.codes(self.latents(images))

    @torch.no_grad()
    def decode_codes(self, codes, hard=False):
        """Codes int64 [B, k], k <= L -> images [B, 3, H, W] in [0, 1].

        hard=False: the pixel decoder reads the VQGAN embedding averaged with the predicted probabilities, as stage 2
        trains it. hard=True: the embedding of the most probable code. Raises BadInput where k > L.
        """
        if codes.shape[1] > self.config.tokens:
            raise BadInput(f"{codes.shape[1]} codes given: this tokenizer has {self.config.tokens} tokens")
        logits = self.decoder(self.quantizer.lookup(codes))                 # [B, G*G, V]
        if hard:
            logits = torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
        return self.paint(logits).clamp(0, 1)

    def paint(self, logits):
        """Logits over the VQGAN's codes [B, G*G, V] -> images [B, 3, H, W], not clamped."""
        embedding = logits.softmax(-1) @ self.pixel_codebook.weight         # [B, G*G, C], the expected embedding
        grid = embedding.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))     # [B, C, G, G]
        return self.pixel_decoder(grid)


class TiTok(NativeTok):
    """The baseline (2406.07550): latent tokens stand beside the patches in one transformer, and all see each other.

    model "titok_causal" (the paper's Table 3a): a latent token sees the image and the latents up to itself, and the
    image sees no latent, or a later latent would reach an earlier one through it.
    """

    legacy = False      # True: the published weights' own order of numbers, see load_titok in extras/pretrained.py

    def make_encoder(self, config):
        self.encoder = ImageTransformer(config)
        self.latent_tokens = normal(1, config.tokens, config.width, std=config.width ** -0.5)
        self.to_code = nn.Linear(config.width, config.code_dim)             # D -> c
        mask = None
        if config.model == "titok_causal":
            seen_by_all, length = config.patches + 1, config.patches + 1 + config.tokens
            row, column = torch.arange(length)[:, None], torch.arange(length)[None]
            mask = (column <= row) | (column < seen_by_all)                 # [T, T]
        self.register_buffer("mask", mask, persistent=False)

    def latents(self, images):
        latents = self.latent_tokens.expand(len(images), -1, -1)            # [B, L, D]
        latents = self.encoder(images, latents, self.mask)[:, -self.config.tokens:]        # [B, L, D]
        if self.legacy:     # the memory of [L, D] read as if it were [D, L], then transposed: each latent is a mix
            latents = latents.reshape(len(images), -1, self.config.tokens).transpose(1, 2)
        return self.to_code(latents)                                        # [B, L, c]


def initialize(module):
    """Xavier for linear layers and the patch convolution. With TiTok's std 0.02 the narrow toy experts hardly touch
    their pad token, all z_i look alike, and the codebook comes close to collapse."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, ImageTransformer):
        nn.init.xavier_uniform_(module.patch_embed.weight.flatten(1))
        nn.init.zeros_(module.patch_embed.bias)


def build(config):
    return (NativeTok if config.model == "nativetok" else TiTok)(config)


def checkpoint_name(config, stage=1):
    """nativetok_16 or nativetok_16_stage2: how a tokenizer's files are called."""
    return f"{config.model}_{config.tokens}" + ("_stage2" if stage == 2 else "")


def load_tokenizer(path, device="cpu"):
    """A trained tokenizer (NativeTok or TiTok) in eval mode, with its averaged weights.

    Raises BadInput if the file is missing, cut short, or not a tokenizer's.
    """
    checkpoint = trainer.load_checkpoint(path, "tokenizer", make="python tokenizer.py", device=device)
    model = trainer.load_model(build, TokenizerConfig, checkpoint, path)
    model.fine_tuned = "losses" in checkpoint.get("settings", {})           # True: after stage 2
    return model.to(device).requires_grad_(False)


def default_tokenizer(out, tokens, model="nativetok"):
    """The file of this model and length in the folder out, after stage 2 if there is one. Raises BadInput if none."""
    for name in (f"{model}_{tokens}_stage2.pt", f"{model}_{tokens}.pt"):
        if (Path(out) / name).exists():
            return Path(out) / name
    other = "" if model == "nativetok" else f"--model {model} "
    raise BadInput(f"{out}: no {model} of {tokens} tokens there. Train it first: python tokenizer.py {other}"
                   f"--tokens {tokens}")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: predict the VQGAN's codes

class Stage1(nn.Module):
    """The loss as a module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, targets):
        """images [B, 3, H, W]; targets: the VQGAN's codes [B, G*G] -> loss, its parts, latents [B, L, c], codes [B, L].
        """
        latents = self.model.latents(images)                                # [B, L, c]
        z_q, quantizer_loss, codes = self.model.quantizer(latents)
        logits = self.model.decoder(z_q)                                    # [B, G*G, V]
        cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        parts = {"cross_entropy": cross_entropy, "quantizer": quantizer_loss}
        return cross_entropy + quantizer_loss, parts, latents, codes


def stage1_gradients(run, stage, teacher, batches):
    """Forward and backward of one step's batch; the codes to predict come from the frozen VQGAN, the teacher."""
    seen = []
    for images, _ in run.pieces(batches, stage):                            # [B, 3, H, W]
        targets = teacher.encode(images).flatten(1)                         # [B, G*G]; not in bfloat16: labels
        with run.autocast():
            loss, parts, latents, codes = stage(images, targets)
        (loss / run.training.accumulate).backward()
        seen.append((latents.detach(), codes))
    return loss, parts, *(torch.cat(tensors) for tensors in zip(*seen))     # loss and parts: of the last piece


def save_preview(model, originals, path):
    """Originals over reconstructions, as one picture."""
    reconstructions = model.decode_codes(model.encode(originals))
    data.save_picture(data.picture_grid(torch.cat([originals, reconstructions]).cpu(), len(originals), scale=2), path)


def chosen_config(args):
    """The preset that the command line names or implies, with what it overrides."""
    titok = getattr(args, "model", "nativetok") != "nativetok"
    default = {"toy": "titok_toy", "full": "titok_l_32"}[args.config] if titok else args.config
    return trainer.override(PRESETS[args.preset or default], args)


def prepare(model, training):
    """--compile: Block's methods, for every model of this process. --recompute: MoCET.forward, in training. What they
    compute is the same but for rounding."""
    if training.compile:
        trainer.compile_methods(Block, "forward", "last_position")
    if hasattr(model, "mocet"):
        model.mocet.recompute = training.recompute
    elif training.recompute:
        raise BadInput("--recompute: is for experts, and only NativeTok has them. Use --accumulate to save memory")


def train_stage1(args):
    config, training = chosen_config(args), trainer.override(TRAINING[args.config, 1], args)
    data.find(args.data)        # what takes a user longest to get is missed first
    teacher = vqgan.load_vqgan(args.vqgan_file or args.out / "vqgan.pt", make=vqgan.MAKE[args.config])
    config = replace(config, vqgan=teacher.config)
    train_set = data.open_dataset(args.data, "train", config.image_size, augment=True, draft=training.draft)
    run = trainer.Run(args, "tokenizer", checkpoint_name(config), config, training, data=train_set.kind,
                      images=train_set.content, vqgan=trainer.fingerprint(teacher))
    originals = next(data.all_images(data.open_dataset(args.data, "val", config.image_size), 16))[0].to(run.device)

    teacher = teacher.to(run.device, memory_format=torch.channels_last).requires_grad_(False)   # faster convolutions
    model = build(config)
    model.pixel_codebook.weight.data.copy_(teacher.quantize.codebook())
    model.pixel_decoder.load_state_dict(teacher.decoder.state_dict())
    prepare(model, training)
    model = model.to(run.device)
    stage = run.parallel(Stage1(model))
    optimizer = run.adamw(model.parameters())           # it takes what requires a gradient: all but the VQGAN's part
    ema = trainer.Ema(model, training.ema)
    run.track(model=model, optimizer=optimizer, ema=ema)        # saved in each checkpoint; --resume: loaded here
    batches = data.batches(train_set, run.piece, args.seed, run.step * training.accumulate, run.rank, run.world,
                           training.workers)

    for step in run.steps():
        run.set_learning_rate(optimizer, step)
        optimizer.zero_grad()
        loss, parts, latents, codes = stage1_gradients(run, stage, teacher, batches)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        # no revival in the last fifth: the averaged weights need time to follow a moved code
        model.quantizer.track_usage(latents, codes, config.revive_below if step < 0.8 * training.steps else 0.0)
        ema.update(model)
        run.log(step, loss=loss, grad_norm=grad_norm, **parts, **model.quantizer.use())
        if run.preview(step):
            save_preview(ema.model, originals, run.path.with_name(f"{run.path.stem}_preview.png"))


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: fine-tune the token decoder and the pixel decoder on the pixels

class Stage2(nn.Module):
    """The loss of what paints: L2, perceptual and, once the discriminator is in, adversarial."""

    def __init__(self, model, perceptual, config):
        super().__init__()
        self.model, self.perceptual, self.config = model, perceptual, config

    def forward(self, images, discriminator=None):
        """images [B, 3, H, W]; discriminator None before gan_start -> loss, its parts, reconstruction [B, 3, H, W]."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):    # float32, as encode() in use
            z_q = self.model.quantizer.lookup(self.model.encode(images))    # [B, L, c]
        reconstruction = self.model.paint(self.model.decoder(z_q))          # [B, 3, H, W]
        parts = {"l2": F.mse_loss(reconstruction, images)}
        loss = parts["l2"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual.perceptual_loss(reconstruction, images)
            loss = loss + self.config.perceptual_weight * parts["perceptual"]
        if discriminator is not None:
            parts["adversarial"] = -discriminator(reconstruction).mean()    # be taken for real
            loss = loss + self.config.gan_weight * parts["adversarial"]
        return loss, parts, reconstruction


class DiscriminatorLoss(nn.Module):
    """Hinge loss with LeCam regularization, on real images and on reconstructions without their gradient."""

    def __init__(self, discriminator, lecam_weight):
        super().__init__()
        self.discriminator, self.lecam, self.lecam_weight = discriminator, vqgan.LeCam(), lecam_weight

    def forward(self, images, reconstruction):
        """Both [B, 3, H, W] -> scalar. The discriminator gives one logit for each region of a picture."""
        real, fake = self.discriminator(torch.cat([images, reconstruction])).chunk(2)       # 2 x [B, regions]
        return vqgan.hinge_loss(real, fake) + self.lecam_weight * self.lecam(real, fake)


def train_stage2(args):
    data.find(args.data)
    source = default_stage1(args)
    model = load_tokenizer(source)
    for name in ("model", "tokens"):
        if getattr(args, name, getattr(model.config, name)) != getattr(model.config, name):
            raise BadInput(f"--{name} {getattr(args, name)}: {source} has {getattr(model.config, name)}. Leave it out")
    if model.fine_tuned:
        raise BadInput(f"{source}: has been through stage 2 already. Start from the stage 1 file")
    config, training = model.config, trainer.override(TRAINING[args.config, 2], args)
    weights = trainer.override(STAGE2[args.config], args)
    train_set = data.open_dataset(args.data, "train", config.image_size, augment=True, draft=training.draft)
    run = trainer.Run(args, "tokenizer", checkpoint_name(config, stage=2), config, training, losses=asdict(weights),
                      data=train_set.kind, images=train_set.content)
    originals = next(data.all_images(data.open_dataset(args.data, "val", config.image_size), 16))[0].to(run.device)
    perceptual = vqgan.perceptual_network(weights.perceptual, train_set, args.out, args.convnext, run.device)

    prepare(model, training)
    model = model.to(run.device, memory_format=torch.channels_last)         # faster convolutions, same numbers
    for p in model.decoder.head[-1].parameters():       # a resumed run's state comes later, with run.track
        p.data *= weights.sharpen
    for part in (model.decoder, model.pixel_decoder):                       # everything else stays frozen
        part.requires_grad_(True)
    if weights.discriminator == "patch":
        discriminator = vqgan.Discriminator(grid=min(16, config.image_size // 8))
    else:
        discriminator = vqgan.FeatureDiscriminator(perceptual)
    discriminator = discriminator.to(run.device, memory_format=torch.channels_last)
    judging = [p for p in discriminator.parameters() if p.requires_grad]    # the judge: discriminator with its loss
    stage = run.parallel(Stage2(model, perceptual, weights))
    judge = DiscriminatorLoss(discriminator, weights.lecam_weight).to(run.device)
    judge_stage = run.parallel(judge)
    optimizer = run.adamw(model.parameters())
    judge_optimizer = run.adamw(judging, (weights.discriminator_beta1, weights.discriminator_beta2))
    ema = trainer.Ema(model, training.ema)
    run.track(model=model, optimizer=optimizer, ema=ema, discriminator=judge, discriminator_optimizer=judge_optimizer)
    batches = data.batches(train_set, run.piece, args.seed, run.step * training.accumulate, run.rank, run.world,
                           training.workers)

    for step in run.steps():
        run.set_learning_rate(optimizer, step, scale=float(step >= weights.discriminator_first))
        run.set_learning_rate(judge_optimizer, step, scale=weights.discriminator_rate)
        adversarial = step >= weights.gan_start and weights.gan_weight > 0
        optimizer.zero_grad()
        judge_optimizer.zero_grad()
        for images, _ in run.pieces(batches, stage):                        # [B, 3, H, W]
            for p in judging:       # the painters first: their loss must leave no gradient in the judge
                p.requires_grad_(False)
            with run.autocast():
                loss, parts, reconstruction = stage(images, discriminator if adversarial else None)
            (loss / training.accumulate).backward()
            for p in judging:       # then the judge, on the same reconstruction
                p.requires_grad_(True)
            if adversarial:
                with run.autocast():
                    parts["discriminator"] = judge_stage(images, reconstruction.detach())
                (parts["discriminator"] / training.accumulate).backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        if adversarial:
            nn.utils.clip_grad_norm_(judging, training.clip)
            judge_optimizer.step()
        ema.update(model)
        run.log(step, loss=loss, grad_norm=grad_norm, **parts)
        if run.preview(step):
            save_preview(ema.model, originals, run.path.with_name(f"{run.path.stem}_preview.png"))


def default_stage1(args):
    """The stage 1 file that stage 2 starts from: --checkpoint, or the one of --model and --tokens in the folder."""
    if args.checkpoint:
        return args.checkpoint
    asked = chosen_config(args)
    path = args.out / f"{checkpoint_name(asked)}.pt"
    if not path.exists():
        raise BadInput(f"{path}: not found. Train it first: python tokenizer.py --model {asked.model} "
                       f"--tokens {asked.tokens}")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def reconstruct(args):
    """Write original beside reconstruction for each image, and print the codes."""
    config = chosen_config(args)
    path = args.checkpoint or default_tokenizer(args.out, config.tokens, config.model)
    write_reconstructions(load_tokenizer(path, args.device), path, args.reconstruct, args)


def write_reconstructions(model, path, pictures, args):
    """path: that the model came from."""
    images = torch.stack([data.read_image(p, model.config.image_size) for p in pictures])     # [B, 3, H, W]
    codes = model.encode(images.to(args.device))                   # [B, L]
    both = torch.stack([images, model.decode_codes(codes).cpu()], dim=1).flatten(0, 1)
    target = args.out / "reconstruct.png"
    data.save_picture(data.picture_grid(both, 2, scale=max(1, 128 // model.config.image_size)), target)
    for name, row in zip(pictures, codes.tolist()):
        print(f"{trainer.printable(name)}: {' '.join(map(str, row))}")
    print(trainer.printable(f"{target}: original beside reconstruction, by {path}"))


def main():
    parser = trainer.command_line(__doc__, TokenizerConfig, TrainConfig, Stage2Config)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1, help="1: predict codes; 2: decoder fine-tune")
    parser.add_argument("--vqgan", metavar="FILE", type=Path, dest="vqgan_file",
                        help="the stage 0 checkpoint, default OUT/vqgan.pt")
    parser.add_argument("--checkpoint", metavar="FILE", type=Path,
                        help="the stage 1 tokenizer that --stage 2 starts from, or the one that --reconstruct uses")
    parser.add_argument("--convnext", metavar="FILE", default="weights/convnext_small.pth",
                        help="torchvision's convnext_small weights, for --perceptual convnext")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: that of --model and --config")
    parser.add_argument("--reconstruct", metavar="IMAGE", nargs="+", help="do this instead of training")
    args = trainer.parse(parser)
    if args.reconstruct:
        reconstruct(args)
    elif args.stage == 1:
        train_stage1(args)
    else:
        train_stage2(args)


if __name__ == "__main__":
    trainer.launch(main)
