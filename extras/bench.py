"""How fast, how much memory, how large.

    python -m extras.bench speed        # the fast forms, HNT, a step of each full preset
    python -m extras.bench params       # parameters and multiply-adds, beside the paper's

Letters: B batch, H W pixels, N patches, L tokens, d width of an expert, G side of the VQGAN's grid.
"""
import statistics
from dataclasses import replace
from functools import partial

import torch
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

import generator
import hnt
import tokenizer
import trainer
import vqgan

PRESETS = tokenizer.PRESETS | generator.PRESETS
FULL_SIZE = ("nativetok_32", "nativetok_64", "nativetok_128", "titok_l_32")


# ---- Speed

def interleave(forms, rounds):
    """{name: median seconds} of {name: function}, called in turn `rounds` times after a warm-up: on
    a shared machine only times taken side by side can be compared."""
    seconds = {name: [] for name in forms}
    for _ in range(1 + rounds):
        for name, form in forms.items():
            started = timer()       # waits for the GPU
            form()
            seconds[name].append(timer() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def training_step(config, device, batch, recompute=False):
    """(model, step): step() is one of stage 1 or generator.py on random data, without EMA."""
    c, training = config, trainer.TrainConfig(recompute=recompute)
    is_generator = isinstance(c, generator.GeneratorConfig)
    if is_generator:
        model = generator.GENERATORS[c.mode](c).to(device)
        codes = torch.randint(c.codebook_size, (batch, c.tokens), device=device)        # [B, L]
        labels = torch.randint(c.num_classes, (batch,), device=device)
        loss_fn = partial(generator.LOSSES[c.mode], model, c, codes, labels)
    else:
        model = tokenizer.build(c).to(device)
        tokenizer.prepare(model, training)
        teacher = vqgan.VQGAN(c.vqgan).to(device, memory_format=torch.channels_last).eval()
        images = torch.rand(batch, 3, c.image_size, c.image_size, device=device)    # [B, 3, H, W]
        loss_fn = partial(tokenizer.Stage1Loss(model), images)
    optimizer = trainer.adamw(model, training)

    def step():
        optimizer.zero_grad()
        targets = () if is_generator else (teacher.encode(images),)         # [B, G*G], in float32
        with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            loss, _ = loss_fn(*targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        if not is_generator:
            model.quantizer.update_usage()
    return model, step


def hnt_steps(config, device, batch, reused=None):
    """{"full": step, "frozen": step} of a NativeTok: all of it trains, or what decides its first
    `reused` codes (None: half of them) is frozen."""
    model, step = training_step(config, device, batch)

    def step_after(change, *args):
        change(model, *args)
        step()      # AdamW skips what has no gradient
    return {"full": partial(step_after, hnt.unfreeze),
            "frozen": partial(step_after, hnt.freeze_reused, reused or config.tokens // 2)}


def step_ratio(path, device):
    """Seconds of a frozen step / of a full one, of a checkpoint; None if not grown."""
    saved = trainer.load_checkpoint(path, "tokenizer", "python hnt.py")
    if reused := saved["settings"].get("reused"):
        config = tokenizer.TokenizerConfig(**saved["config"])
        seconds = interleave(hnt_steps(config, device, 16, reused), 5)
        return seconds["frozen"] / seconds["full"]


def compare(device, batch):
    """Seconds of two ways to do something, their ratio, and the paper's."""
    native = tokenizer.build(PRESETS["nativetok_32"]).to(device).eval()
    titok = tokenizer.build(PRESETS["titok_l_32"]).to(device).eval()
    ar = generator.ARGenerator(PRESETS["ar_full"]).to(device).eval()
    c, labels = native.config, torch.arange(batch, device=device)
    x_latent = torch.randn(batch, c.patches, c.expert_width, device=device)         # [B, N, d]
    images = torch.rand(batch, 3, c.image_size, c.image_size, device=device)        # [B, 3, H, W]
    print(f"{'first / second':<42}{'first, s':>10}{'second, s':>10}{'ratio':>8}{'paper':>8}")
    for what, paper, forms in (
            ("MoCET", "", {"plain": lambda: native.mocet.forward_plain(x_latent).sum().backward(),
                           "fast": lambda: native.mocet(x_latent).sum().backward()}),
            ("AR sampling", "", {"plain": lambda: ar.generate_plain(labels),
                                 "cached": lambda: ar.generate(labels)}),
            ("Table 3c, encoding", "0.88x", {"TiTok": lambda: titok.encode(images),
                                             "NativeTok": lambda: native.encode(images)}),
            ("Table 3b, a step", "1.33x", hnt_steps(PRESETS["nativetok_64"], device, batch))):
        a, b = interleave(forms, 5).values()
        what += f": {' / '.join(forms)}"
        print(f"{what:<42}{a:>10.4f}{b:>10.4f}{a / b:>7.2f}x{paper:>8}")


def speed(args):
    device = trainer.choose_device(args.device)
    cuda = device.type == "cuda"
    batch = args.batch_size or (64 if cuda else 2)
    gpu = torch.cuda.get_device_name(device) if cuda else "no GPU"
    print(f"{gpu}, torch {torch.__version__}, batch {batch}")
    compare(device, batch)
    size = 8192 if cuda else 512
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    peak = 2 * size ** 3 / interleave({"": lambda: x @ x}, 20)[""]      # bf16
    print(f"{'one step':<26}{'seconds':>9}{'samples/s':>10}{'GiB':>6}  of {peak:.1e} FLOP/s")
    for name in (*FULL_SIZE, "nativetok_128 --recompute", "ar_full", "maskgit_full"):
        config, step = PRESETS[name.split()[0]], None       # drops the model before
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        try:
            step = training_step(config, device, batch, "--recompute" in name)[1]
            seconds = interleave({name: step}, 10 if cuda else 1)[name]
        except torch.OutOfMemoryError:
            print(f"{name:<26} does not fit. Try a smaller --batch_size")
            continue
        used = torch.cuda.max_memory_allocated() / 2 ** 30      # 0 without CUDA
        # FLOP per multiply-add: 2 forward and 4 backward; the teacher, forward alone
        flops = sum(n * {"pixels": 0, "teacher": 2}.get(part, 6)
                    for part, n in work_of(config)[1].items())
        share = flops * batch / seconds / peak
        print(f"{name:<26}{seconds:>9.3f}{batch / seconds:>10.2f}{used:>6.1f}{share:>9.0%}")


# ---- Parameters and multiply-adds

def count(module, trained=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def work_of(config):
    """(model on the meta device, {part: its multiply-adds for one image or sequence}); teacher: of
    the VQGAN's codes that stage 1 predicts."""
    c, macs = config, {}
    with torch.device("meta"):
        if isinstance(c, generator.GeneratorConfig):
            model, x = generator.GENERATORS[c.mode](c), torch.zeros(1, dtype=torch.int64)
            work = {"forward": lambda labels: model(labels.expand(1, c.tokens), labels)}
        else:
            model, x = tokenizer.build(c), torch.empty(1, 3, c.image_size, c.image_size)
            teacher, images = vqgan.VQGAN(c.vqgan), x
            work = {"encode": model.latents, "decode": model.decoder,
                    "pixels": model.decode_logits, "teacher": lambda _: teacher.latents(images)}
        for name, forward in work.items():
            with FlopCounterMode(display=False) as counter:
                x = forward(x)      # what the part before has made
            macs[name] = counter.get_total_flops() // 2
    return model, macs


# what: (preset, changes, parameters as published and share that trains under HNT)
COUNTED = {
    "NativeTok-32": ("nativetok_32", {}, "616M"), "NativeTok-64": ("nativetok_64", {}, "666M, 56%"),
    "NativeTok-128": ("nativetok_128", {}, "766M, 55%"), "TiTok-L-32": ("titok_l_32", {}, "641M"),
    "LlamaGen-B, VQGAN": ("ar_full", {"tokens": 256, "codebook_size": 16384}, "111M"),
    "LlamaGen-L, VQGAN": ("llamagen_l", {"tokens": 256, "codebook_size": 16384}, "343M"),
    "U-ViT-L": ("maskgit_full", {}, "287M")}


def params(args):
    for what, (preset, changes, paper) in COUNTED.items():
        model, macs = work_of(replace(PRESETS[preset], **changes))
        parts = {name: count(part) for name, part in model.named_children()}
        print(f"{what}: {count(model) / 1e6:.2f}M parameters   (paper: {paper})")
        print("  " + ", ".join(f"{part} {n / 1e6:.2f}M" for part, n in parts.items() if n))
        print("  GMACs: " + ", ".join(f"{name} {n / 1e9:.2f}" for name, n in macs.items()))
        if preset in ("nativetok_64", "nativetok_128"):     # half of the tokens are new
            own = count(model, trained=True)        # all but the VQGAN's part
            hnt.freeze_reused(model, model.config.tokens // 2)
            print(f"  {count(model, trained=True) / own:.1%} of all but the VQGAN train under HNT")


def main():
    parser = trainer.make_parser(__doc__, prog="-m extras.bench")
    parser.add_argument("what", choices=("speed", "params"))
    parser.add_argument("--batch_size", type=int, help="default 64; on a CPU 2")
    parser.add_argument("--device", help="cpu, cuda or mps; default: cuda if present")
    args = parser.parse_args()
    {"speed": speed, "params": params}[args.what](args)


if __name__ == "__main__":
    trainer.launch(main)
