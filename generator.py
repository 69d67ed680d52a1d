"""Stage 3: a generator learns which codes follow which, and its samples decode to new images.

    python generator.py --mode ar  # or maskgit; on the codes of the tokenizer in --out
    python generator.py --mode ar --sample 64 --classes 3,bag --seed 1
    python generator.py --mode ar --tokenizer out/toy/vqgan.pt  # the 2-D VQGAN (Table 1, row 1)

Both model p(codes | class), codes of a frozen tokenizer, and p(codes) for classifier-free guidance:
- AR (LlamaGen): p(code_0 | class) p(code_1 | class, code_0) ..., the order NativeTok is made for.
- MaskGIT (U-ViT): predicts all masked codes at once, keeps those it is most confident of, repeats.

Letters: B batch, H W pixels, L tokens, K codes in the codebook, D width, h heads, T length of a
sequence, n images of a set. With guidance, R = 2B sequences: with their class, then without.
"""
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import trainer
from tokenizer import default_tokenizer, load_tokenizer
from trainer import BadInput, TrainConfig
from vqgan import load_vqgan


@dataclass(frozen=True)
class GeneratorConfig:
    mode: Literal["ar", "maskgit"] = "ar"   # one code after the other, or many at once
    tokens: int = 32                # L: picks the tokenizer in --out
    codebook_size: int = 4096       # K: read off the tokenizer
    num_classes: int = 1000         # read off the data
    width: int = 768                # D
    layers: int = 12                # blocks; MaskGIT: an even number, and one more in the middle
    heads: int = 12                 # h
    dropout: float = 0.1            # AR: on embeddings, attention and feed-forward output
    class_dropout: float = 0.1      # share of the training images whose class is hidden
    views: Literal[1, 2, 10] = 2    # of an image; 2: and its flip (F.1), 10: LlamaGen's crops
    rope: Literal["1d", "2d"] = "1d"        # AR: positions of a sequence or of a square grid
    label_smoothing: float = 0.1    # MaskGIT
    unmasked_weight: float = 0.1    # MaskGIT: weight of the codes it can see; masked ones have 1
    guidance_scale: float = 2.0     # sampling: 1 is without guidance
    guidance: Literal["constant", "linear", "power-cosine"] = "constant"    # sampling, MaskGIT
    temperature: float = 1.0        # sampling: of the softmax (AR), of the noise (MaskGIT)
    top_k: int = 0                  # sampling, AR: only the k likeliest codes; 0: all
    sampling_steps: int = 8         # sampling, MaskGIT: forward passes
    softmax_temperature_annealing: bool = False     # sampling, MaskGIT: see generate


SAMPLING = ("guidance_scale", "guidance", "temperature", "top_k", "sampling_steps",
            "softmax_temperature_annealing")
NO_FLAGS = {    # settings that a mode does not have
    "ar": {"label_smoothing", "unmasked_weight", "guidance", "sampling_steps",
           "softmax_temperature_annealing"},
    "maskgit": {"dropout", "rope", "top_k"}}


# ---- Drawing a code from logits

def gumbel(like, generator=None):
    return -torch.empty_like(like).exponential_(generator=generator).clamp(min=1e-10).log()


def sample(logits, temperature, generator=None, top_k=0):
    """logits [..., K] -> codes [...] drawn from softmax(logits / temperature), of the top_k
    likeliest (0: all)."""
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]   # [..., 1]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    return (logits + temperature * gumbel(logits, generator)).argmax(dim=-1)    # Gumbel-max trick


def guide(logits, scale):
    """Classifier-free guidance: logits [2B, ...] -> [B, ...]. Scale 1 is without guidance."""
    with_class, without = logits.chunk(2)
    return without + scale * (with_class - without)


# ---- AR: LlamaGen (arXiv 2406.06525). Attribute names are those of its public weights

def rotary(config, length, device):
    """Cosine and sine of each position's rotation of each pair of channels: [2, T, D/h/2]. 2d: half
    of the pairs turn by the code's row in the grid, half by its column. The class token, in front,
    has 0 for both, which makes its query and key 0, as LlamaGen was trained. T = L: the last code
    is not read."""
    position, grid = torch.arange(length - 1, device=device), math.isqrt(length)
    parts = [position] if config.rope == "1d" else [position // grid, position % grid]
    pairs = config.width // config.heads // 2 // len(parts)
    frequency = 10_000.0 ** (-torch.arange(pairs, device=device) / pairs)
    angle = torch.cat([torch.outer(part, frequency) for part in parts], dim=1)  # [T - 1, D/h/2]
    return F.pad(torch.stack([angle.cos(), angle.sin()]), (0, 0, 1, 0))     # [2, T, D/h/2]


def apply_rotary(x, rotation):
    """Rotate channels (2i, 2i + 1) as the real and imaginary part of a number. x [B, h, T, D/h]."""
    cos, sin = rotation  # 2 x [T, D/h/2]
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # 2 x [B, h, T, D/h/2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.width
        hidden = -(-int(2 / 3 * 4 * width) // 256) * 256  # SwiGLU has 3 matrices, not 2
        self.heads, self.dropout = config.heads, nn.Dropout(config.dropout)
        linear = partial(nn.Linear, bias=False)
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = nn.ModuleDict({"wqkv": linear(width, 3 * width),
                                        "wo": linear(width, width)})
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.feed_forward = nn.ModuleDict({"w1": linear(width, hidden), "w3": linear(width, hidden),
                                           "w2": linear(hidden, width)})

    def forward(self, x, rotation, cache=None, position=0):
        """x [B, T, D] -> [B, T, D]; each position attends to itself and those before it. With a
        cache [2, B, h, L, D/h] of keys and values, x is the one token at `position`."""
        q, k, v = self.attention.wqkv(self.attention_norm(x)).chunk(3, dim=-1)  # 3 x [B, T, D]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = apply_rotary(q, rotation), apply_rotary(k, rotation)  # [B, h, T, D/h]
        if cache is not None:
            cache[:, :, :, position:position + 1] = torch.stack([k, v])
            k, v = cache[:, :, :, :position + 1]    # 2 x [B, h, position + 1, D/h]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)   # [B, h, T, D/h]
        x = x + self.dropout(self.attention.wo(y.transpose(1, 2).flatten(2)))  # [B, T, D]
        y, f = self.ffn_norm(x), self.feed_forward
        return x + self.dropout(f.w2(F.silu(f.w1(y)) * f.w3(y)))  # SwiGLU


class ARGenerator(nn.Module):
    """Logits at position i read the class and codes[:, :i]."""
    def __init__(self, config):
        super().__init__()
        if config.rope == "2d" and math.isqrt(config.tokens) ** 2 != config.tokens:
            raise BadInput(f"--rope 2d: {config.tokens} tokens are not a square grid")
        self.config = config
        self.cls_embedding = nn.ModuleDict({  # the last row: "no class"
            "embedding_table": nn.Embedding(config.num_classes + 1, config.width)})
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)  # GPT-2's, as LlamaGen
        nn.init.zeros_(self.output.weight)      # all codes equally likely

    def class_token(self, labels, drop_label=None):  # [B], bool [B] -> [B, 1, D]
        if drop_label is not None:
            labels = labels.masked_fill(drop_label, self.config.num_classes)
        return self.cls_embedding.embedding_table(labels)[:, None]

    def forward(self, codes, labels, drop_label=None):
        """codes int64 [B, L], labels int64 [B], drop_label bool [B] (True: hide the class) ->
        logits [B, L, K]. The last code is not read."""
        x = [self.class_token(labels, drop_label), self.tok_embeddings(codes[:, :-1])]
        x = self.dropout(torch.cat(x, dim=1))  # [B, L, D]
        rotation = rotary(self.config, codes.shape[1], codes.device)  # [2, L, D/h/2]
        for layer in self.layers:
            x = layer(x, rotation)
        return self.output(self.norm(x))  # [B, L, K]

    @torch.no_grad()
    def generate_plain(self, labels, guidance_scale=1.0, temperature=1.0, top_k=0, generator=None):
        """The same codes as from `generate`, with the whole sequence computed for every code."""
        codes = labels.new_zeros(len(labels), self.config.tokens)  # [B, L]
        for i in range(self.config.tokens):     # logits at i do not read the zeros
            logits = self(codes, labels)[:, i]  # [B, K]
            if guidance_scale != 1:
                without = self(codes, labels, torch.ones_like(labels, dtype=torch.bool))[:, i]
                logits = without + guidance_scale * (logits - without)
            codes[:, i] = sample(logits, temperature, generator, top_k)
        return codes

    @torch.no_grad()
    def generate(self, labels, guidance_scale=1.0, temperature=1.0, top_k=0, generator=None):
        """labels int64 [B] -> codes int64 [B, L]. Keeps keys and values of earlier positions; both
        halves of the guidance are one batch. See guide and sample."""
        c, B, device = self.config, len(labels), labels.device
        R = B if guidance_scale == 1 else 2 * B
        drop_label = torch.arange(R, device=device) >= B  # [R]
        cache = torch.zeros(c.layers, 2, R, c.heads, c.tokens, c.width // c.heads, device=device,
                            dtype=self.output.weight.dtype)     # of keys and values
        rotation, codes = rotary(c, c.tokens, device), []       # [2, L, D/h/2]
        x = self.class_token(labels.repeat(R // B), drop_label)  # [R, 1, D]
        for i in range(c.tokens):
            for layer, kept in zip(self.layers, cache):  # kept: [2, R, h, L, D/h]
                x = layer(x, rotation[:, i:i + 1], kept, i)
            logits = self.output(self.norm(x[:, 0]))  # [R, K]
            logits = logits if R == B else guide(logits, guidance_scale)  # [B, K]
            codes.append(sample(logits, temperature, generator, top_k))
            x = self.tok_embeddings(codes[-1].repeat(R // B))[:, None]  # [R, 1, D]
        return torch.stack(codes, dim=1)


# ---- MaskGIT (arXiv 2202.04200) with a U-ViT (arXiv 2209.12152), as TiTok; its weights' names

class UViTBlock(nn.Module):
    """Blocks after the middle first take in the output of their mirror block (skip)."""
    def __init__(self, config, skip=False):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width, bias=False),
                                   "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width),
                                  "fc2": nn.Linear(4 * width, width)})
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x, skip=None):  # [B, T, D] -> [B, T, D]
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        q, k, v = self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)  # 3 x [B, T, D]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)  # [B, h, T, D/h], no mask
        x = x + self.attn.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class MaskGITGenerator(nn.Module):
    """One table embeds all: K codes, the mask (K), the classes (K + 1 ...), "no class" (last)."""
    def __init__(self, config):
        super().__init__()
        self.config, self.mask = config, config.codebook_size
        self.embeddings = nn.Embedding(self.mask + config.num_classes + 2, config.width)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.tokens, config.width))
        if config.layers % 2:
            raise BadInput(f"--layers {config.layers}: a U-ViT needs an even number, for its skips")
        half = config.layers // 2
        self.in_blocks = nn.ModuleList(UViTBlock(config) for _ in range(half))
        self.mid_block = UViTBlock(config)
        self.out_blocks = nn.ModuleList(UViTBlock(config, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.codebook_size)
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                nn.init.trunc_normal_(p, std=0.02)  # ViT's
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, codes, labels, drop_label=None):
        """codes int64 [B, L] (K: masked), labels int64 [B], drop_label bool [B] (True: hide the
        class) -> logits [B, L, K]."""
        if drop_label is not None:
            labels = labels.masked_fill(drop_label, self.config.num_classes)
        x = torch.cat([self.mask + 1 + labels[:, None], codes], dim=1)  # [B, 1 + L]
        x, skips = self.embeddings(x) + self.pos_embed, []  # [B, 1 + L, D]
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())  # the last first: a U
        return self.lm_head(self.norm(x[:, 1:]))  # [B, L, K]

    @torch.no_grad()
    def generate(self, labels, guidance_scale=1.0, steps=8, guidance="constant", temperature=1.0,
                 softmax_temperature_annealing=False, generator=None):
        """labels int64 [B] -> codes int64 [B, L], in `steps` forward passes, at most L. The scale
        is constant or grows from 1 (TiTok's constant and linear s are 1 + s here). The noise's
        temperature falls to 0; annealing divides the logits by 0.5 + 0.8 x share of steps left."""
        tokens, device = self.config.tokens, self.pos_embed.device
        steps = min(steps, tokens)
        codes = torch.full((len(labels), tokens), self.mask, device=device)  # [B, L]
        for t, still_masked in enumerate(mask_counts(tokens, steps)):
            r, remaining = t / steps, 1 - (t + 1) / steps
            strength = {"constant": 1.0, "linear": r,
                        "power-cosine": (1 - math.cos(math.pi * r ** 3)) / 2}[guidance]
            scale = 1 + (guidance_scale - 1) * strength
            logits = self.guided_logits(codes, labels, scale)  # [B, L, K]
            if softmax_temperature_annealing:
                logits = logits / (0.5 + 0.8 * remaining)
            noise_temperature = temperature * remaining
            guess = sample(logits, noise_temperature, generator)  # [B, L]
            logit = logits.gather(-1, guess[..., None])[..., 0]   # [B, L]
            # as TiTok: of the logit, not the probability
            confidence = logit + noise_temperature * gumbel(logit, generator)
            masked = codes == self.mask
            codes = torch.where(masked, guess, codes)
            confidence = confidence.masked_fill(~masked, math.inf)  # what is fixed stays fixed
            again = confidence.topk(still_masked, largest=False).indices
            codes = codes.scatter(1, again, self.mask)
        return codes

    def guided_logits(self, codes, labels, scale):  # [B, L], [B] -> [B, L, K]
        if scale == 1:
            return self(codes, labels)
        drop_label = torch.arange(2 * len(labels), device=labels.device) >= len(labels)  # [R]
        return guide(self(codes.repeat(2, 1), labels.repeat(2), drop_label), scale)


def mask_counts(tokens, steps):
    """How many codes are masked after each step: arccos schedule, each time at least one fewer."""
    counts = [tokens]
    for t in range(1, steps):
        counts.append(min(counts[-1] - 1, int(tokens * math.acos(t / steps) * 2 / math.pi)))
    return counts[1:] + [0]


# ---- Losses: (model, config, codes int64 [B, L], labels int64 [B]) -> (loss, values for the log)

def ar_loss(model, config, codes, labels):
    """Next-token cross-entropy, mean over positions."""
    drop_label = torch.rand(len(labels), device=labels.device) < config.class_dropout  # [B]
    logits = model(codes, labels, drop_label).float()  # [B, L, K]
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    return loss, {"accuracy": (logits.argmax(-1) == codes).float().mean()}


def maskgit_loss(model, config, codes, labels):
    """Cross-entropy after masking a random share of the codes: arccos(u) * 2 / pi for uniform u,
    which is mostly large."""
    drop_label = torch.rand(len(labels), device=labels.device) < config.class_dropout  # [B]
    share = torch.acos(torch.rand(len(codes), 1, device=codes.device)) * 2 / math.pi  # [B, 1]
    # round, where mask_counts rounds down: as TiTok
    count = (share * codes.shape[1]).round().clamp(min=1)  # [B, 1]
    masked = torch.rand(codes.shape, device=codes.device).argsort(dim=1) < count  # [B, L]
    logits = model(codes.masked_fill(masked, config.codebook_size), labels, drop_label).float()
    # flat: for [B, K, L] it is not deterministic with CUDA
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none",
                           label_smoothing=config.label_smoothing).view_as(codes)  # [B, L]
    weight = torch.where(masked, 1.0, config.unmasked_weight)  # [B, L]
    right = (logits.argmax(-1) == codes) & masked  # [B, L]
    return (loss * weight).sum() / weight.sum(), {"accuracy": right.sum() / masked.sum()}


GENERATORS = {"ar": ARGenerator, "maskgit": MaskGITGenerator}
LOSSES = {"ar": ar_loss, "maskgit": maskgit_loss}


# ---- Sizes, and how they are trained (paper, Table 4)

UVIT_L = GeneratorConfig("maskgit", tokens=128, width=1024, layers=20, heads=16, guidance_scale=5.5,
                         softmax_temperature_annealing=True)  # 8 steps, as in Table 2
TOY = GeneratorConfig(tokens=16, codebook_size=512, num_classes=10, width=128, layers=4, heads=4,
                      dropout=0.0, views=1, guidance_scale=1.5)
PRESETS = {
    "ar_toy": TOY,
    "ar_small": GeneratorConfig(),  # LlamaGen-B
    "ar_full": GeneratorConfig(),
    "llamagen_l": GeneratorConfig(width=1024, layers=24, heads=16),
    "maskgit_toy": replace(TOY, mode="maskgit", sampling_steps=10,
                           temperature=2.5),  # at 1, samples repeat
    "maskgit_small": replace(UVIT_L, tokens=32, width=768, layers=12, heads=12),
    "maskgit_full": UVIT_L,
    "titok_s_128": replace(UVIT_L, temperature=2.8, guidance_scale=6.9, guidance="power-cosine",
                           sampling_steps=64),  # its published samples
}
TOY_TRAINING = TrainConfig(steps=700, batch_size=64, learning_rate=1e-3, end_learning_rate=1e-4,
                           warmup=50, beta2=0.95, weight_decay=0.05, ema=0.99, workers=0,
                           log_every=25, save_every=350, preview_every=350)
AR_TRAINING = TrainConfig(steps=1_500_000, micro_batch=256, end_learning_rate=1e-4, warmup=0,
                          beta2=0.95, weight_decay=0.05, ema=0.9999)  # 300 epochs, constant rate
MASKGIT_TRAINING = TrainConfig(batch_size=2048, micro_batch=512, learning_rate=2e-4, warmup=10_000,
                               beta2=0.96, weight_decay=0.03)
TRAINING = {
    "ar_toy": TOY_TRAINING,
    "ar_small": replace(AR_TRAINING, micro_batch=128),
    "ar_full": AR_TRAINING,
    "maskgit_toy": replace(TOY_TRAINING, steps=900, learning_rate=2e-3, beta2=0.99,
                           weight_decay=0.03),
    "maskgit_small": replace(MASKGIT_TRAINING, micro_batch=128),
    "maskgit_full": MASKGIT_TRAINING,
}


# ---- The code cache: the codes of all images, extracted once, in <out>/codes_<tokenizer>

def open_tokenizer(path, device="cpu"):
    """A trained NativeTok, TiTok or VQGAN, frozen and in eval mode; its .path is path."""
    checkpoint = trainer.load_checkpoint(path, ("vqgan", "tokenizer"), "python tokenizer.py")
    load = load_vqgan if checkpoint["stage"] == "vqgan" else load_tokenizer
    tokenizer = load(path, device)
    tokenizer.path = path
    return tokenizer


def codes_name(tokenizer_path):
    """The tokenizer in file names. Stage 2 changes how codes decode, not the codes."""
    return Path(tokenizer_path).stem.removesuffix("_stage2")


def codes_fingerprint(tokenizer):
    """A hash of the weights that decide the codes; the decoder's do not."""
    leave_out = "decoder.", "pixel_", "quantizer.usage", "quantize.usage"
    return trainer.fingerprint(tokenizer, leave_out)


def views_of(images, views, size):
    """images [B, 3, S, S], S >= size -> a list of views [B, 3, H, W] of `size` pixels: the image,
    its flip; 10: corners and middle, then their flips."""
    room = images.shape[-1] - size
    corners = [(0, 0), (0, room), (room, 0), (room, room), (round(room / 2),) * 2]
    crops = [images[..., y:y + size, x:x + size] for y, x in corners[:5 if views == 10 else 1]]
    return (crops + [crop.flip(-1) for crop in crops])[:views]


@torch.no_grad()
def extract_codes(run, tokenizer, fingerprint, dataset, folder):
    """codes [views, n, L] of all images, kept in a file; each rank makes a part of them."""
    n, views, codebook_size = len(dataset), run.config.views, run.config.codebook_size
    key = data.hash_of(fingerprint, dataset.fingerprint, n, views, codebook_size)
    file = folder / f"{views}_{key}.npy"
    if run.main:    # AR and MaskGIT may start side by side: the second waits for the first
        lock = trainer.lock(folder / ".lock", wait=True)  # noqa: F841, held until the return
    if trainer.gather(run.main and file.exists())[0]:       # as rank 0 sees it
        codes = np.load(file)
    else:
        run.say(f"{folder}: codes of {n:,} images")
        rows, codes = np.array_split(np.arange(n), run.world)[run.rank], []
        for images, _ in data.all_images(dataset, 64, rows, run.training.workers):  # [64, 3, S, S]
            crops = views_of(images.to(run.device), views, tokenizer.config.image_size)
            codes.append(torch.stack([tokenizer.encode(crop) for crop in crops]).cpu())
        codes = torch.cat(codes, dim=1).numpy()  # [views, rows, L]
        codes = codes.astype(np.uint16 if codebook_size <= 2 ** 16 else np.uint32)
        codes = np.concatenate(trainer.gather(codes), axis=1)  # [views, n, L]
        if run.main:
            for old in folder.glob(f"{views}_*.npy*"):
                old.unlink()  # of another tokenizer or other data
            trainer.write_atomically(file, lambda temporary: np.save(temporary, codes))
    trainer.gather(None)    # all ranks have them: the lock may go
    return codes


def code_batches(codes, labels, batch_size, seed, step=0, rank=0, world=1, accumulate=1):
    """As data.batches, for codes [views, n, L]: endless (codes int64 [b, L], labels int64 [b]). An
    image's views take turns by epoch."""
    order = data.row_order(len(labels), batch_size, seed, step, rank, world, accumulate)
    for epochs, rows in order:  # [b] each: which epoch, which image
        batch = codes[(epochs + rows) % len(codes), rows].astype(np.int64)
        yield torch.from_numpy(batch), torch.from_numpy(labels[rows])


# ---- Training

def train(args, config, tokenizer_path):
    training = trainer.override(TRAINING[f"{config.mode}_{args.config}"], args)
    tokenizer = open_tokenizer(tokenizer_path, args.device)
    room = 1.1 if config.views == 10 else 1  # for ten crops
    size = int(room * tokenizer.config.image_size)
    dataset = data.open_dataset(args.data, "train", size, draft=True)
    if getattr(args, "tokens", tokenizer.config.tokens) != tokenizer.config.tokens:
        raise BadInput(f"--tokens {args.tokens}: {tokenizer_path} has {tokenizer.config.tokens}")
    config = replace(config, tokens=tokenizer.config.tokens, num_classes=len(dataset.classes),
                     codebook_size=tokenizer.config.codebook_size)
    name, fingerprint = codes_name(tokenizer_path), codes_fingerprint(tokenizer)
    counts = np.bincount(dataset.labels, minlength=config.num_classes).tolist()
    run = trainer.Run(args, config.mode, f"{config.mode}_{name}", config, training, dataset,
                      may_differ=SAMPLING, tokenizer=fingerprint,
                      store={"classes": list(dataset.classes), "tokenizer": str(tokenizer_path),
                             "tokenizer_fingerprint": fingerprint, "class_counts": counts})
    if training.compile:
        trainer.compile_methods(LlamaBlock if config.mode == "ar" else UViTBlock, "forward")
    model = GENERATORS[config.mode](config).to(run.device)
    parallel, loss_function = run.parallel(model), LOSSES[config.mode]
    no_decay = trainer.NO_DECAY if config.mode == "maskgit" else ()  # LlamaGen decays tables, too
    optimizer = trainer.adamw(model, training, no_decay=no_decay)
    ema = trainer.Ema(model, training.ema)
    all_codes = extract_codes(run, tokenizer, fingerprint, dataset, args.out / f"codes_{name}")
    batches = code_batches(all_codes, dataset.labels, *run.order)
    run.start(model=model, ema=ema, optimizer=optimizer)

    for step in range(run.step, training.steps):
        trainer.set_lr(optimizer, trainer.cosine(step, training))
        optimizer.zero_grad()
        for codes, labels in run.micro_batches(batches, parallel):  # [B, L], [B]
            with run.autocast():
                loss, parts = loss_function(parallel, config, codes, labels)
            (loss / run.accumulate).backward()
            run.add(loss=loss, **parts)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        ema.update(model)
        run.log(step, grad_norm=grad_norm)
        if run.preview_due(step):
            shown = torch.arange(min(10, config.num_classes)).repeat_interleave(8)  # 8 per row
            images = tokenizer.decode_codes(sample_codes(ema.model, shown))
            save_grid(images, run.path.with_name(f"{run.path.stem}_preview.png"))
        run.save_if_due(step, model=model, ema=ema, optimizer=optimizer)


# ---- Pictures

def load_generator(path, device="cpu"):
    """A trained generator (EMA weights, eval mode) with .classes (names), .class_counts (of the
    training images), .tokenizer_path and .tokenizer_fingerprint."""
    checkpoint = trainer.load_checkpoint(path, tuple(GENERATORS), "python generator.py")
    model = trainer.load_model(GENERATORS[checkpoint["stage"]], GeneratorConfig, checkpoint, path)
    model.classes, model.tokenizer_path = checkpoint["classes"], checkpoint["tokenizer"]
    model.class_counts = checkpoint.get("class_counts", [1] * len(model.classes))
    model.tokenizer_fingerprint = checkpoint["tokenizer_fingerprint"]
    return model.to(device)


def load_pair(path, tokenizer_path=None, device="cpu"):
    """(generator, tokenizer); by default the one it was trained on, in the same folder, after stage
    2 if it is there. Raises BadInput if it was trained on other codes."""
    generator = load_generator(path, device)
    beside = Path(path).with_name(Path(generator.tokenizer_path).name)
    stage2 = beside.with_name(f"{codes_name(beside)}_stage2.pt")
    tokenizer = open_tokenizer(tokenizer_path or (stage2 if stage2.exists() else beside), device)
    if generator.tokenizer_fingerprint != codes_fingerprint(tokenizer):
        raise BadInput(f"{path}: not trained on the codes of {tokenizer.path}. Name its "
                       f"--tokenizer, or train again with --overwrite")
    return generator, tokenizer


def sample_codes(model, labels, seed=0, **changes):
    """labels int64 [B] -> codes int64 [B, L], sampled as the model's config with changes says."""
    c, device = replace(model.config, **changes), next(model.parameters()).device
    how = {"top_k": c.top_k} if c.mode == "ar" else {
        "steps": c.sampling_steps, "guidance": c.guidance,
        "softmax_temperature_annealing": c.softmax_temperature_annealing}
    return model.generate(
        labels.to(device), guidance_scale=c.guidance_scale, temperature=c.temperature,
        generator=torch.Generator(device).manual_seed(seed), **how)


def save_grid(images, path):
    data.save_picture(data.picture_grid(images, 8, scale=max(1, 64 // images.shape[-1])), path)


def find_classes(text, names):
    """Class numbers of names or numbers, such as "3,bag"."""
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    try:
        return [numbers[word.strip()] for word in text.split(",")]
    except KeyError as word:
        raise BadInput(f"--classes {word}: no such class. Choose from 0 to {len(names) - 1}, or "
                       f"{', '.join(names[:12])} ..") from None


def sample_pictures(args, tokenizer_path, path, changes):
    """--sample: new images in one grid, or with --separate as files in a folder."""
    model, tokenizer = load_pair(path, tokenizer_path, args.device)
    output = Path(args.output or args.out / f"{path.stem}_samples{'' if args.separate else '.png'}")
    if (args.separate or args.output) and output.exists() and not args.overwrite:
        raise BadInput(f"{output}: exists. Choose another --output, or give --overwrite")
    names, count, grid = model.classes, args.sample, []
    wanted = find_classes(args.classes, names) if args.classes else range(len(names))
    labels = torch.tensor([wanted[i * len(wanted) // count] for i in range(count)])  # [n]
    for file in output.glob("[0-9]" * 5 + "_*.png") if args.separate else ():
        file.unlink()
    for i, batch in enumerate(labels.split(100)):
        codes = sample_codes(model, batch, args.seed + 10 ** 9 * i, **changes)  # [100, L]
        images = tokenizer.decode_codes(codes).cpu()
        if not args.separate:
            grid.append(images)
            continue
        for number, image in enumerate(images, 100 * i):
            file = output / f"{number:05}_{names[labels[number]]}.png"
            data.save_picture(data.picture_grid(image[None], 1), file)
    if grid:
        save_grid(torch.cat(grid), output)
    print(f"{output}: {count} samples")


def main():
    parser = trainer.command_line(__doc__, TrainConfig, GeneratorConfig)
    add = parser.add_argument
    add("--tokenizer", metavar="FILE", help="default: the NativeTok of --tokens in --out")
    add("--preset", choices=tuple(PRESETS), metavar="NAME",
        help="default <mode>_<config>; also llamagen_l, titok_s_128")
    add("--sample", type=int, metavar="N", help="write N new images and stop")
    add("--classes", help="of --sample: names or numbers, such as 3,bag; default: all")
    add("--separate", action="store_true", help="of --sample: files in a folder, not a grid")
    add("--output", metavar="PATH", help="of --sample: a .png, or with --separate a folder")
    args = trainer.parse(parser)
    preset = args.preset or f"{getattr(args, 'mode', 'ar')}_{args.config}"
    config = trainer.override(PRESETS[preset], args)
    trainer.refuse(args, NO_FLAGS[config.mode], f"not of --mode {config.mode}")
    if config.mode != PRESETS[preset].mode:
        raise BadInput(f"--mode {config.mode}: --preset {preset} is {PRESETS[preset].mode}")
    if args.sample is None:
        trainer.refuse(args, ("classes", "separate", "output"), "only with --sample")
    else:
        others = TrainConfig.__dataclass_fields__ | GeneratorConfig.__dataclass_fields__
        trainer.refuse(args, others.keys() - {"mode", "tokens", *SAMPLING}, "not with --sample")
    tokenizer_path = args.tokenizer or default_tokenizer(args.out, config.tokens)
    if args.sample is not None:
        path = args.out / f"{config.mode}_{codes_name(tokenizer_path)}.pt"
        # a named preset's settings of sampling, else the trained generator's; flags come first
        given = [name for name in SAMPLING if args.preset or hasattr(args, name)]
        changes = {name: getattr(config, name) for name in given}
        return sample_pictures(args, tokenizer_path, path, changes)
    train(args, config, tokenizer_path)


if __name__ == "__main__":
    trainer.launch(main)
