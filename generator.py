"""Stage 3: a generator learns which codes follow which, and a sampled code sequence becomes a new image.

    python generator.py --mode ar                       # train on the codes of out/<config>'s NativeTok (--tokens)
    python generator.py --mode maskgit                  # the same with the other generator
    python generator.py --mode ar --sample 64 --classes 3,bag --seed 1 --guidance_scale 2     # only pictures, please
    python generator.py --mode ar --tokenizer out/toy/vqgan.pt      # any tokenizer; here the 2-D VQGAN (Table 1, row 1)

Both generators know nothing of images: they model p(codes | class), where codes are L numbers below K.
- AR (LlamaGen): p(code_0 | class) p(code_1 | class, code_0) ...: one code after the other, in the sequence's order.
  NativeTok's tokenizer made token i from the image and the tokens before it, so that this order is the natural one.
- MaskGIT (U-ViT): guesses all hidden codes at once, keeps those it is surest of, hides the rest and guesses again.
Both also learn p(codes) without a class, for classifier-free guidance: logits move away from those without a class.
What trains here: all of the generator. The tokenizer is frozen; its codes of all images are extracted once.

Letters: B batch, L tokens, K codes in the codebook, D width, h heads, T positions read at once (L, 1 + L, or 1),
n images of a data set, R rows of a batch with guidance (2B, or B without), H W pixels.
"""
import difflib
import math
import re
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import trainer
from tokenizer import default_tokenizer, load_tokenizer
from trainer import BadInput, TrainConfig
from vqgan import load_vqgan

GUIDANCE = ("constant", "linear", "power-cosine")
SAMPLING = ("guidance_scale", "guidance", "temperature", "top_k", "sampling_steps")     # may change after training


@dataclass(frozen=True)
class GeneratorConfig:
    mode: str = "ar"                # ar: one code after the other; maskgit: many at once
    tokens: int = 32                # L; picks the tokenizer's file in --out; with --tokenizer it is that one's
    codebook_size: int = 4096       # K; read off the tokenizer
    num_classes: int = 1000         # read off the data
    width: int = 768                # D
    layers: int = 12                # blocks; MaskGIT has one more, in the middle
    heads: int = 12                 # h
    dropout: float = 0.1            # AR: on embeddings, attention output and feed-forward output
    class_dropout: float = 0.1      # share of the training images whose class is hidden
    views: int = 2                  # of an image: 1 is its middle, 2 its flip too (paper, F.1), 10 LlamaGen's ten crops
    rope: str = "1d"                # AR: positions of a sequence (1d) or of a square grid (2d)
    label_smoothing: float = 0.1    # MaskGIT
    unmasked_weight: float = 0.1    # MaskGIT: weight of the codes it can see, beside 1 for hidden ones
    guidance_scale: float = 2.0     # sampling: 1 is without guidance
    guidance: str = "constant"      # sampling, MaskGIT alone: constant, linear or power-cosine over the steps
    temperature: float = 1.0        # sampling: of the softmax (AR), or of the noise, falling to 0 (MaskGIT)
    top_k: int = 0                  # sampling, AR: only the k likeliest codes; 0: all
    sampling_steps: int = 8         # sampling, MaskGIT: forward passes

    def __post_init__(self):
        trainer.choose("--mode", self.mode, ("ar", "maskgit"))
        trainer.choose("--rope", self.rope, ("1d", "2d"))
        trainer.choose("--guidance", self.guidance, GUIDANCE)
        if self.heads < 1 or self.width % (4 * self.heads):
            raise BadInput(f"--width {self.width}: not a multiple of 4 times --heads {self.heads}")
        if self.mode == "maskgit" and self.layers % 2:
            raise BadInput(f"--layers {self.layers}: a U-ViT needs an even number, half before its middle, half after")
        if self.views not in (1, 2, 10):
            raise BadInput(f"--views {self.views}: must be 1, 2 or 10")
        for name, least in {"temperature": 0, "top_k": 0, "sampling_steps": 1, "layers": 1}.items():
            if not getattr(self, name) >= least:
                raise BadInput(f"--{name} {getattr(self, name)}: must be at least {least}")

    @property
    def feed_forward(self) -> int:  # SwiGLU has three matrices where others have two: 2/3 of 4 D, a multiple of 256
        return -(-int(2 / 3 * 4 * self.width) // 256) * 256


LLAMAGEN_B = GeneratorConfig()
UVIT_L = GeneratorConfig(mode="maskgit", tokens=128, width=1024, layers=20, heads=16, guidance_scale=6.9,
                         guidance="power-cosine", temperature=2.8, sampling_steps=64)      # sampled as TiTok-S-128
TOY = GeneratorConfig(tokens=16, codebook_size=512, num_classes=10, width=128, layers=4, heads=4, dropout=0.0,
                      views=1, guidance_scale=1.5)
PRESETS = {
    "ar_toy": TOY,
    "maskgit_toy": replace(TOY, mode="maskgit", temperature=2.75),     # at 1 the samples of a class repeat each other
    "ar_full": LLAMAGEN_B,                                                              # paper, Table 1
    "llamagen_b": LLAMAGEN_B,
    "llamagen_l": replace(LLAMAGEN_B, width=1024, layers=24, heads=16),
    "maskgit_full": UVIT_L,                                                             # paper, Table 2
    "maskgit_uvit_l": UVIT_L,
}
TOY_TRAINING = TrainConfig(steps=700, batch_size=64, learning_rate=1e-3, end_learning_rate=1e-4, warmup=50, beta2=0.95,
                           weight_decay=0.05, ema=0.99, workers=0, log_every=25, save_every=350, preview_every=350)
LLAMAGEN_TRAINING = TrainConfig(steps=1_500_000, end_learning_rate=1e-4, warmup=0, beta2=0.95, weight_decay=0.05)
TRAINING = {
    "ar_toy": TOY_TRAINING,
    "maskgit_toy": replace(TOY_TRAINING, steps=1100, beta2=0.96, weight_decay=0.03, save_every=400, preview_every=550),
    "ar": LLAMAGEN_TRAINING,            # 300 epochs of ImageNet, constant learning rate
    "maskgit": TrainConfig(batch_size=2048, learning_rate=2e-4, warmup=10_000, beta2=0.96, weight_decay=0.03),
}


# ---------------------------------------------------------------------------------------------------------------------
# Drawing a code from logits: shared by both generators

def noise(count, shape, generator, device):
    """Uniform numbers in (0, 1], [count, *shape].

    Each sample takes one number from `generator` (None: torch's own) and makes all its noise from that alone. So sample
    j of a seed is the same whether it is drawn in one batch with the others or in many, one after the other (as far as
    the network's own rounding does not depend on the batch).
    """
    where = generator.device if generator is not None else "cpu"
    seeds = torch.randint(2 ** 62, (count,), generator=generator, device=where).tolist()
    return torch.stack([1 - torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)


def sample(logits, temperature, uniform):
    """Codes [...] drawn from softmax(logits / temperature): logits [..., K], uniform [...] in (0, 1].

    The code at which the summed probabilities reach the uniform number times their total, which rounding leaves at
    not quite 1; at temperature 0 the likeliest code. It has the distribution of argmax(logits + temperature * Gumbel
    noise), MaskGIT's way, for one random number instead of K.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    reached = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1)            # [..., K], ends at about 1
    return (reached < uniform[..., None] * reached[..., -1:]).sum(dim=-1)


def guide(logits, scale):
    """Classifier-free guidance. logits [2B, ...], with the class and then without -> [B, ...]. Scale 1: no change."""
    with_class, without = logits.chunk(2)
    return without + scale * (with_class - without)


# ---------------------------------------------------------------------------------------------------------------------
# AR: LlamaGen (arXiv 2406.06525). Attribute names are those of the public weights: these load without a table of names

def rotary(length, head_width, kind, device):
    """How far each position turns each pair of channels: complex [T, D/h/2]. Row 0 is the class token's, row 1 + i that
    of code i, which is turned by i.

    The class token's numbers are zero, not one: its query and key vanish, and later positions give it the logit 0.
    LlamaGen was trained so. 2d: the first half of the pairs turns by the code's row, the second half by its column.
    """
    position = torch.arange(length - 1, device=device)                                 # of the codes: the first has 0
    parts = [position] if kind == "1d" else [position // math.isqrt(length), position % math.isqrt(length)]
    pairs = head_width // 2 // len(parts)
    speed = 10_000.0 ** (-torch.arange(pairs, device=device) / pairs)
    angle = torch.cat([torch.outer(part, speed) for part in parts], dim=1)             # [T - 1, D/h/2]
    return F.pad(torch.polar(torch.ones_like(angle), angle), (0, 0, 1, 0))             # a row of zeros in front


def turn(x, rotation):
    """Rotate neighbouring channels (2i, 2i + 1), seen as one complex number. x [B, h, T, D/h], rotation [T, D/h/2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))                    # complex [B, h, T, D/h/2]
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, hidden = config.width, config.feed_forward
        self.heads, self.dropout = config.heads, nn.Dropout(config.dropout)
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = nn.ModuleDict({"wqkv": nn.Linear(width, 3 * width, bias=False),
                                        "wo": nn.Linear(width, width, bias=False)})
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.feed_forward = nn.ModuleDict({"w1": nn.Linear(width, hidden, bias=False),
                                           "w3": nn.Linear(width, hidden, bias=False),
                                           "w2": nn.Linear(hidden, width, bias=False)})

    def forward(self, x, rotation, cache=None, position=0):
        """x [B, T, D] -> [B, T, D], each position attending to itself and those before it.

        With a cache, [2, B, h, L, D/h] of the keys and values so far, T is 1: the token at `position`, which is written
        to the cache and attends to all that is there.
        """
        q, k, v = self.attention.wqkv(self.attention_norm(x)).chunk(3, dim=-1)         # 3 x [B, T, D]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))    # 3 x [B, h, T, D/h]
        q, k = turn(q, rotation), turn(k, rotation)
        if cache is not None:
            cache[:, :, :, position:position + 1] = torch.stack([k, v])
            k, v = cache[:, :, :, :position + 1]                                       # 2 x [B, h, position + 1, D/h]
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)        # [B, h, T, D/h]
        x = x + self.dropout(self.attention.wo(seen.transpose(1, 2).flatten(2)))       # [B, T, D]
        y, f = self.ffn_norm(x), self.feed_forward
        return x + self.dropout(f.w2(F.silu(f.w1(y)) * f.w3(y)))                       # SwiGLU


class ARGenerator(nn.Module):
    """p(codes | class) as a product over positions: logits at position i read the class and codes[:, :i]."""

    def __init__(self, config):
        super().__init__()
        if config.rope == "2d" and math.isqrt(config.tokens) ** 2 != config.tokens:
            raise BadInput(f"--rope 2d: {config.tokens} tokens are not a square grid. Use --rope 1d")
        self.config = config
        self.cls_embedding = nn.ModuleDict({                                           # the last row: "no class"
            "embedding_table": nn.Embedding(config.num_classes + 1, config.width)})
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)                                           # GPT-2's, as LlamaGen

    def class_token(self, labels, drop_label):                                         # [B], bool [B] -> [B, 1, D]
        return self.cls_embedding.embedding_table(labels.masked_fill(drop_label, self.config.num_classes))[:, None]

    def forward(self, codes, labels, drop_label=None):
        """codes int64 [B, L] below K, labels int64 [B], drop_label bool [B] (True: hide the class) -> logits [B, L, K].

        Nobody reads the last code: there is nothing after it to predict.
        """
        drop_label = torch.zeros_like(labels, dtype=torch.bool) if drop_label is None else drop_label
        x = torch.cat([self.class_token(labels, drop_label), self.tok_embeddings(codes[:, :-1])], dim=1)
        x, rotation = self.dropout(x), self.rotation(codes.shape[1])                   # [B, L, D], [L, D/h/2]
        for layer in self.layers:
            x = layer(x, rotation)
        return self.output(self.norm(x))                                               # [B, L, K]

    def rotation(self, length):
        return rotary(length, self.config.width // self.config.heads, self.config.rope, self.output.weight.device)

    @torch.no_grad()
    def generate_plain(self, labels, guidance_scale=1.0, temperature=1.0, top_k=0, generator=None):
        """labels int64 [B] -> codes int64 [B, L]. The plain version: the whole sequence is computed again for every
        code, and guidance in a second pass. `generate` gives the same codes, faster."""
        device, tokens = self.output.weight.device, self.config.tokens
        uniform = noise(len(labels), (tokens,), generator, device)                     # [B, L]
        codes = torch.zeros(len(labels), tokens, dtype=torch.int64, device=device)    # nobody reads codes not yet drawn
        for i in range(tokens):
            logits = self(codes, labels)[:, i]                                         # [B, K]
            if guidance_scale != 1:
                without = self(codes, labels, torch.ones_like(labels, dtype=torch.bool))[:, i]
                logits = without + guidance_scale * (logits - without)
            codes[:, i] = sample(keep_likeliest(logits, top_k), temperature, uniform[:, i])
        return codes

    @torch.no_grad()
    def generate(self, labels, guidance_scale=1.0, temperature=1.0, top_k=0, generator=None):
        """labels int64 [B] -> codes int64 [B, L].

        guidance_scale s: logits are without + s * (with class - without), 1 is no guidance. top_k: only the k likeliest
        codes, 0 is all, 1 is greedy. generator: see `noise`. Keys and values of earlier positions are kept, and both
        halves of the guidance are one batch: R rows, 2B with guidance and B without.
        """
        c, device, count = self.config, self.output.weight.device, len(labels)
        uniform = noise(count, (c.tokens,), generator, device)                         # [B, L]
        repeats = 1 if guidance_scale == 1 else 2
        drop_label = torch.arange(repeats * count, device=device) >= count             # [R]
        cache = torch.zeros(c.layers, 2, repeats * count, c.heads, c.tokens, c.width // c.heads, device=device,
                            dtype=self.output.weight.dtype)                            # [layers, 2, R, h, L, D/h]
        rotation, codes = self.rotation(c.tokens), []
        x = self.class_token(labels.repeat(repeats), drop_label)                       # [R, 1, D]
        for i in range(c.tokens):
            for layer, kept in zip(self.layers, cache):
                x = layer(x, rotation[i:i + 1], kept, i)
            logits = self.output(self.norm(x[:, 0]))                                   # [R, K]
            logits = logits if guidance_scale == 1 else guide(logits, guidance_scale)  # [B, K]
            codes.append(sample(keep_likeliest(logits, top_k), temperature, uniform[:, i]))
            x = self.tok_embeddings(codes[-1].repeat(repeats))[:, None]                # [R, 1, D]
        return torch.stack(codes, dim=1)


def keep_likeliest(logits, k):
    """logits [B, K] with -inf for all but the k largest; k = 0 keeps all."""
    if k == 0:
        return logits
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


# ---------------------------------------------------------------------------------------------------------------------
# MaskGIT (arXiv 2202.04200) with a U-ViT (arXiv 2209.12152), as TiTok has it; names are those of its weights again

class UViTBlock(nn.Module):
    """A pre-norm transformer block. Those after the middle first take in what their mirror block gave (skip)."""

    def __init__(self, config, skip=False):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, 4 * width), gelu=nn.GELU(),
                                             fc2=nn.Linear(4 * width, width)))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x, skip=None):                                                   # [B, T, D] -> [B, T, D]
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)                        # 3 x [B, T, D]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))    # [B, h, T, D/h]
        seen = F.scaled_dot_product_attention(q, k, v)                                 # all see all
        x = x + self.attn.proj(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class MaskGITGenerator(nn.Module):
    """Logits for every position from the codes that are not hidden. A code equal to K is the mask.

    One table embeds all: K codes, the mask (K), the classes (K + 1 ...), and "no class" (the last).
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.mask = config, config.codebook_size
        self.embeddings = nn.Embedding(config.codebook_size + config.num_classes + 2, config.width)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.tokens, config.width))
        self.in_blocks = nn.ModuleList(UViTBlock(config) for _ in range(config.layers // 2))
        self.mid_block = UViTBlock(config)
        self.out_blocks = nn.ModuleList(UViTBlock(config, skip=True) for _ in range(config.layers // 2))
        self.norm = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.codebook_size)
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                nn.init.trunc_normal_(p, std=0.02)                                     # ViT's
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, codes, labels, drop_label=None):
        """codes int64 [B, L], K being the mask; labels [B]; drop_label bool [B] hides the class -> logits [B, L, K]."""
        drop_label = torch.zeros_like(labels, dtype=torch.bool) if drop_label is None else drop_label
        class_token = self.mask + 1 + labels.masked_fill(drop_label, self.config.num_classes)       # [B]
        x = self.embeddings(torch.cat([class_token[:, None], codes], dim=1)) + self.pos_embed       # [B, 1 + L, D]
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())                                                  # the last first: a U
        return self.lm_head(self.norm(x[:, 1:]))                                       # [B, L, K]

    @torch.no_grad()
    def generate(self, labels, guidance_scale=1.0, steps=8, guidance="constant", temperature=1.0, generator=None):
        """labels int64 [B] -> codes int64 [B, L], in `steps` forward passes (not more than L: a step fixes a code).

        Logits are without + s * (with class - without), s at step t = 0 .. steps-1 and r = t / steps being
            constant        guidance_scale
            linear          1 + (guidance_scale - 1) * r
            power-cosine    1 + (guidance_scale - 1) * (1 - cos(pi * r^3)) / 2
        TiTok publishes numbers for with class + s * (with class - without): its 4.5 constant or linear is 5.5 here. Its
        power-cosine numbers are the same here. temperature: step t has noise of temperature * (1 - (t + 1) /
        steps), which is 0 at the last. It is in the choice of each code and in which codes are kept. generator: see
        `noise`.
        """
        trainer.choose("guidance", guidance, GUIDANCE)
        device, tokens = self.pos_embed.device, self.config.tokens
        steps = min(steps, tokens)
        uniform = noise(len(labels), (steps, 2, tokens), generator, device)            # [B, steps, 2, L]
        codes = torch.full((len(labels), tokens), self.mask, device=device)            # [B, L], all hidden
        for t, still_hidden in enumerate(mask_counts(tokens, steps)):
            r = t / steps
            strength = {"constant": 1.0, "linear": r, "power-cosine": (1 - math.cos(math.pi * r ** 3)) / 2}[guidance]
            logits = self.guided_logits(codes, labels, 1 + (guidance_scale - 1) * strength)         # [B, L, K]
            heat = temperature * (1 - (t + 1) / steps)
            guess = sample(logits, heat, uniform[:, t, 0])                             # [B, L]
            gumbel = -torch.log(-torch.log(uniform[:, t, 1].clamp(max=1 - 1e-6)))      # [B, L]
            sure = logits.gather(-1, guess[..., None])[..., 0] + heat * gumbel         # [B, L], by logit, as TiTok
            hidden = codes == self.mask
            codes = torch.where(hidden, guess, codes)
            sure = sure.masked_fill(~hidden, math.inf)                                 # what is fixed stays fixed
            codes = codes.scatter(1, sure.topk(still_hidden, largest=False).indices, self.mask)
        return codes

    def guided_logits(self, codes, labels, scale):                                     # [B, L], [B] -> [B, L, K]
        if scale == 1:
            return self(codes, labels)
        drop_label = torch.arange(2 * len(labels), device=labels.device) >= len(labels)
        return guide(self(codes.repeat(2, 1), labels.repeat(2), drop_label), scale)    # both halves in one pass


def mask_counts(tokens, steps):
    """How many codes are still hidden after each step: the arccos schedule, at least one fewer each time, and 0."""
    counts, hidden = [], tokens
    for t in range(1, steps):
        hidden = max(1, min(hidden - 1, int(tokens * math.acos(t / steps) * 2 / math.pi)))
        counts.append(hidden)
    return counts + [0]


# ---------------------------------------------------------------------------------------------------------------------
# Losses

def ar_loss(model, config, codes, labels):
    """Next-token cross-entropy, mean over positions. codes [B, L], labels [B] -> (loss, values for the log)."""
    drop_label = torch.rand(len(labels), device=labels.device) < config.class_dropout  # [B]
    logits = model(codes, labels, drop_label).float()                                  # [B, L, K]
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    return loss, {"accuracy": (logits.argmax(-1) == codes).float().mean()}


def maskgit_loss(model, config, codes, labels):
    """Hide a random share of the codes and predict them all. codes [B, L], labels [B] -> (loss, values for the log).

    The share is arccos(u) * 2 / pi for uniform u: mostly large, as in the first sampling steps, which matter most.
    """
    drop_label = torch.rand(len(labels), device=labels.device) < config.class_dropout  # [B]
    share = torch.acos(torch.rand(len(codes), 1, device=codes.device)) * 2 / math.pi   # [B, 1]
    count = (share * codes.shape[1]).round().clamp(min=1)                              # [B, 1], at least one hidden
    hidden = torch.rand(codes.shape, device=codes.device).argsort(dim=1) < count       # [B, L]
    logits = model(codes.masked_fill(hidden, config.codebook_size), labels, drop_label).float()     # [B, L, K]
    # flat: for [B, K, L] CUDA has no form of this loss that sums in a fixed order (--deterministic)
    each = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none",
                           label_smoothing=config.label_smoothing).view_as(codes)      # [B, L]
    weight = torch.where(hidden, 1.0, config.unmasked_weight)                          # [B, L]
    right = (logits.argmax(-1) == codes) & hidden                                      # [B, L]
    return (each * weight).sum() / weight.sum(), {"accuracy": right.sum() / hidden.sum()}


GENERATORS = {"ar": ARGenerator, "maskgit": MaskGITGenerator}
LOSSES = {"ar": ar_loss, "maskgit": maskgit_loss}


# ---------------------------------------------------------------------------------------------------------------------
# Loading, and sampling in bulk

def stage_of(path):
    """What a checkpoint says it is; None if it says nothing, and then whoever opens it next says what is wrong."""
    try:
        with trainer.open_file(path):       # a pipe: whoever opens it waits
            stage = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["stage"]
        return stage if isinstance(stage, str) else None
    except Exception:                                                                  # torch raises many kinds here
        return None


def load_generator(path, device="cpu"):
    """A trained ARGenerator or MaskGITGenerator in eval mode, with its averaged weights. Its `.about` is a dict:
    classes (names), tokenizer (path), fingerprint (tokenizer's), data. Raises BadInput if the file is not one."""
    stage = stage_of(path) or Path(path).name.split("_")[0]     # a file that says nothing: its name, for the advice
    mode = stage if stage in GENERATORS else "ar"
    checkpoint = trainer.load_checkpoint(path, mode, make=f"python generator.py --mode {mode}", device=device)
    model = trainer.load_model(GENERATORS[mode], GeneratorConfig, checkpoint, path)
    model.about = checkpoint.get("about")
    texts = {"tokenizer", "fingerprint", "data"}
    if not (isinstance(model.about, dict) and model.about.keys() == texts | {"classes"}
            and all(isinstance(model.about[name], str) for name in texts)
            and isinstance(model.about["classes"], list) and len(model.about["classes"]) == model.config.num_classes
            and all(isinstance(name, str) for name in model.about["classes"])):
        raise BadInput(f"{path}: does not say what its codes and classes mean. Train it again: python generator.py "
                       f"--mode {mode} --overwrite")
    return model.to(device)


def sample_codes(model, labels, seed=0, batch_size=500, **changes):
    """labels int64 [n] -> codes int64 [n, L] on the CPU, the same for every batch_size. Sampling settings are those of
    the model's config; changes: others instead."""
    c = replace(model.config, **changes)
    how = {"guidance_scale": c.guidance_scale, "temperature": c.temperature}
    how |= {"top_k": c.top_k} if c.mode == "ar" else {"steps": c.sampling_steps, "guidance": c.guidance}
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    parts = tqdm(labels.split(batch_size), "sampling", unit="batch", disable=len(labels) <= batch_size or None, leave=False)
    return torch.cat([model.generate(part.to(device), generator=generator, **how).cpu() for part in parts])


class RasterVQGAN(nn.Module):
    """A VQGAN as if it were a 1-D tokenizer: its G x G grid of codes row by row, L = G * G."""

    def __init__(self, vqgan):
        super().__init__()
        self.vqgan, c = vqgan, vqgan.config
        self.config = SimpleNamespace(tokens=c.grid ** 2, codebook_size=c.codebook_size, image_size=c.image_size)

    def encode(self, images):                                                          # [B, 3, H, W] -> [B, L]
        return self.vqgan.encode(images).flatten(1)

    def decode_codes(self, codes):                                                     # [B, L] -> [B, 3, H, W]
        return self.vqgan.decode_codes(codes.unflatten(1, (self.vqgan.config.grid, -1)))


def codes_name(tokenizer_path):
    """What the codes are called in file names: stage 2 changes how codes are painted, not the codes."""
    return Path(tokenizer_path).stem.removesuffix("_stage2")


def codes_fingerprint(tokenizer):
    """Changes with whatever decides the codes, and not with what paints them. What starts with one of the names below
    is left out; a tokenizer with other names for its decoder must be listed here."""
    return trainer.fingerprint(tokenizer, leave_out=("decoder.", "pixel_", "vqgan.decoder.", "quantizer.usage",
                                                     "vqgan.quantize.usage"))


def open_tokenizer(path, device="cpu"):
    return RasterVQGAN(load_vqgan(path, device)) if stage_of(path) == "vqgan" else load_tokenizer(path, device)


# ---------------------------------------------------------------------------------------------------------------------
# Training

class About:
    """Facts that a checkpoint carries along: what the codes and labels mean."""

    def __init__(self, **facts):
        self.facts = facts

    def state_dict(self):
        return self.facts

    def load_state_dict(self, facts):
        pass        # Run compares tokenizer and data, as settings


def code_batches(codes, labels, batch_size, seed, step, rank, world):
    """Endless (codes int64 [B, L], labels int64 [B]) of this rank; batch_size counts all ranks. A pure function of the
    seed and the step to start at. codes uint16 [views, n, L]: the views of an image take turns, epoch after epoch."""
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    for epochs, rows in data.row_order(len(labels), batch_size, seed % 2 ** 32, step):
        epochs, rows = epochs[mine], rows[mine]
        yield (torch.from_numpy(codes[(epochs + rows) % len(codes), rows].astype(np.int64)),
               torch.from_numpy(labels[rows]))


def extract_codes(run, tokenizer, fingerprint, dataset, path):
    """(codes uint16 [views, n, L], labels int64 [n]) of all images, made by all ranks together if not there yet."""
    if not path.exists():
        numbers = run.config.views * len(dataset) * run.config.tokens
        data.say(f"{path}: takes {trainer.size(2 * numbers)}, and as much again for a moment")
    # AR and MaskGIT may be started side by side: then the second waits for the first one's codes
    held = trainer.lock(path.with_name(f".{path.stem}.lock"), "extracts codes", wait=True) if run.main else None
    try:
        return data.token_cache(tokenizer, dataset, path, fingerprint, run.config.views, tokenizer.config.image_size,
                                device=run.device, workers=run.training.workers, codebook=run.config.codebook_size)
    finally:
        trainer.release(held)


def train(args, config, training, tokenizer_path):
    tokenizer = open_tokenizer(tokenizer_path)
    size = tokenizer.config.image_size
    size = int(1.1 * size) if config.views == 10 else size      # room for crops: LlamaGen's
    dataset = data.open_dataset(args.data, "train", size, draft=training.draft)
    found = {"tokens": tokenizer.config.tokens, "codebook_size": tokenizer.config.codebook_size,
             "num_classes": len(dataset.classes)}
    for name, value in found.items():
        if getattr(args, name, value) != value:
            raise BadInput(f"--{name} {getattr(args, name)}: {tokenizer_path} and the data have {value}. Leave it out")
    config = replace(config, **found)
    fingerprint = codes_fingerprint(tokenizer)
    run = trainer.Run(args, config.mode, f"{config.mode}_{codes_name(tokenizer_path)}", config, training, SAMPLING,
                      images=dataset.content, tokenizer=fingerprint)

    if training.compile:
        trainer.compile_methods({"ar": LlamaBlock, "maskgit": UViTBlock}[config.mode], "forward")
    model = GENERATORS[config.mode](config).to(run.device)
    parallel, loss_function = run.parallel(model), LOSSES[config.mode]
    optimizer = run.adamw(model.parameters())
    ema = trainer.Ema(model, training.ema)
    run.track(model=model, optimizer=optimizer, ema=ema,
              about=About(classes=list(dataset.classes), tokenizer=str(tokenizer_path), fingerprint=fingerprint,
                          data=dataset.fingerprint))
    tokenizer.to(run.device)
    path = args.out / f"codes_{codes_name(tokenizer_path)}_train.npy"
    all_codes, all_labels = extract_codes(run, tokenizer, fingerprint, dataset, path)  # [views, n, L], [n]
    batches = code_batches(all_codes, all_labels, run.piece, args.seed, run.step * training.accumulate, run.rank,
                           run.world)

    for step in run.steps():
        run.set_learning_rate(optimizer, step)
        optimizer.zero_grad()
        for codes, labels in run.pieces(batches, parallel):     # [B, L], [B]
            with run.autocast():
                loss, parts = loss_function(parallel, config, codes, labels)
            (loss / training.accumulate).backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        ema.update(model)
        run.log(step, loss=loss, grad_norm=grad_norm, **parts)
        if run.preview(step):                                   # a row a class
            shown = torch.arange(min(10, config.num_classes)).repeat_interleave(8)
            path = run.path.with_name(f"{run.path.stem}_preview.png")
            save_grid(decode(tokenizer, sample_codes(ema.model, shown), run.device), 8, path)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def decode(tokenizer, codes, device):
    """codes [n, L] -> images [n, 3, H, W] on the CPU."""
    return torch.cat([tokenizer.decode_codes(batch.to(device)).cpu() for batch in codes.split(100)])


def save_grid(images, columns, path):
    data.save_picture(data.picture_grid(images, columns, scale=max(1, 64 // images.shape[-1])), path)


def find_classes(text, names):
    """Class numbers for "3,bag": a class's name, its number, or words of its name (then all classes with them).

    Case does not matter. Raises BadInput with near matches.
    """
    names, found = [name.lower() for name in names], []
    for word in (part.strip().lower() for part in text.split(",")):
        if word in names:
            found.append(names.index(word))
        elif word.isdecimal() and int(word) < len(names):
            found.append(int(word))
        else:
            fits = [i for i, name in enumerate(names) if word and re.search(rf"\b{re.escape(word)}\b", name)]
            if not fits:
                words = {*names, *(w for name in names for w in re.split(r"\W+", name))}
                near = difflib.get_close_matches(word, words, n=3)
                hint = f"Did you mean {' or '.join(near)}? " if near else ""
                known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
                raise BadInput(f"--classes {word}: no such class. {hint}There are 0 to {len(names) - 1}: {known}")
            found += fits
    return found


def sample_pictures(args, tokenizer_path, path):
    """The --sample flag: args.sample pictures as one grid, or with --separate as files in a folder."""
    model = load_generator(path, args.device)
    tokenizer = open_tokenizer(tokenizer_path, args.device)
    if model.about["fingerprint"] != codes_fingerprint(tokenizer):
        raise BadInput(f"{path}: {tokenizer_path} is not what this was trained on, so its codes mean something else. "
                       f"Train it again: python generator.py --mode {model.config.mode} --overwrite")
    for name, value in asdict(model.config).items():
        if name not in SAMPLING and getattr(args, name, value) != value:
            raise BadInput(f"--{name} {getattr(args, name)}: {path} was trained with {value}. Leave it out")
    if args.sample < 1:
        raise BadInput(f"--sample {args.sample}: must be at least 1")
    names = model.about["classes"]
    wanted = torch.tensor(find_classes(args.classes, names) if args.classes else range(len(names)))
    labels = wanted[torch.arange(args.sample) * len(wanted) // args.sample]            # [n], class after class
    output = Path(args.output or args.out / f"{path.stem}_samples{'' if args.separate else '.png'}")
    if output.exists() and not args.overwrite and (args.output or args.separate):
        raise BadInput(f"{output}: exists. Replace it with --overwrite, or choose another --output")
    changes = {name: getattr(args, name) for name in SAMPLING if hasattr(args, name)}
    images = decode(tokenizer, sample_codes(model, labels, args.seed, **changes), args.device)
    if args.separate:
        for i, (image, label) in enumerate(zip(images, labels.tolist())):
            name = f"{i:05d}_{re.sub(r'[^a-z0-9]+', '-', names[label].lower())}.png"
            data.save_picture(data.picture_grid(image[None], 1), output / name)
    else:
        each = len(labels) // len(wanted)
        rows_of_one_class = each * len(wanted) == len(labels) and each <= 16
        save_grid(images, each if rows_of_one_class else math.ceil(math.sqrt(len(labels))), output)
    shown = ", ".join(names[i] for i in labels.unique_consecutive()[:12])
    print(trainer.printable(f"{output}: {len(labels)} samples of {shown}"))


def main():
    parser = trainer.command_line(__doc__, GeneratorConfig, TrainConfig)
    parser.add_argument("--tokenizer", metavar="FILE", help="whose codes; also a VQGAN. Default: the newest in --out")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: <mode>_<config>")
    pictures = parser.add_argument_group("pictures instead of training")
    pictures.add_argument("--sample", type=int, metavar="N", help="write N new images and stop")
    pictures.add_argument("--classes", help="names or numbers, such as 3,bag; default: all")
    pictures.add_argument("--separate", action="store_true", help="a folder of files instead of one grid")
    pictures.add_argument("--output", metavar="PATH", help="where to write: a .png, or with --separate a folder")
    args = trainer.parse(parser)
    mode = trainer.choose("--mode", getattr(args, "mode", "ar"), tuple(GENERATORS))
    preset = args.preset or f"{mode}_{args.config}"
    config = trainer.override(PRESETS[preset], args)
    training = trainer.override(TRAINING[preset if preset in TRAINING else config.mode], args)
    if args.sample is None:
        data.find(args.data)
    tokenizer_path = Path(args.tokenizer or default_tokenizer(args.out, config.tokens))
    if args.sample is not None:
        return sample_pictures(args, tokenizer_path, args.out / f"{config.mode}_{codes_name(tokenizer_path)}.pt")
    train(args, config, training, tokenizer_path)


if __name__ == "__main__":
    trainer.launch(main)
