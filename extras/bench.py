"""How fast, how much memory, how large.

    python -m extras.bench speed        # fast forms against plain ones, HNT, sampling; a step of each full configuration
    python -m extras.bench memory       # what stages 1 and 2 need on a GPU, estimated without one
    python -m extras.bench params       # parameters and multiply-adds of the full models, by part

Letters: B batch, P patches, L tokens, K codes, G side of the VQGAN's grid, d width of the experts.
"""
import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import trainer
import vqgan
from extras.report import machine
from generator import GENERATORS, LOSSES
from generator import PRESETS as GENERATOR_PRESETS
from hnt import freeze_reused
from tokenizer import PRESETS, TRAINING, MoCET, Stage1, TiTok, build
from vqgan import VQGAN, ConvNeXtSmall, Discriminator


# ---------------------------------------------------------------------------------------------------------------------
# Speed: python -m extras.bench speed

# Operators whose result the CPU needs before it can go on: on a GPU it would wait for all that was asked of it before.
# (item and a tensor in an `if` both end in the first of these.)
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::equal", "aten::masked_select",
           "aten::_unique2", "aten::unique_dim", "aten::repeat_interleave"}


def speed(device, batch):
    """Print the ratios of the fast forms to what they are compared with, then seconds a step of each configuration."""
    batch = batch or (64 if device.type == "cuda" else 2)
    print(f"{machine(device)}, torch {torch.__version__}, batch {batch}. Medians of forms that took turns; the paper's "
          f"ratios were measured on an A800\n{'first / second':<54} {'first, s':>10} {'second, s':>10} {'ratio':>7} "
          f"{'paper':>7}")
    for part in (speed_mocet, speed_encoding, speed_hnt, speed_sampling, speed_steps):
        try:
            part(device, batch)
        except torch.OutOfMemoryError:
            print(f"{part.__name__}: does not fit. Try a smaller --batch_size")


def compare(what, first, second, device, rounds=5, paper=""):
    """first, second: (name, function). Prints medians, and how many times as fast the second is as the first."""
    seconds = trainer.take_turns(dict((first, second)), rounds, device)
    a, b = seconds[first[0]], seconds[second[0]]
    names = f"{what}: {first[0]} / {second[0]}"
    print(f"{names:<54} {a:>10.4f} {b:>10.4f} {a / b:>6.2f}x {paper:>7}", flush=True)


def speed_mocet(device, batch):
    for size, count in (("toy", 16), ("full", batch)):
        c = PRESETS[size]
        mocet = MoCET(c.tokens, c.expert_width, c.expert_heads, c.expert_layers).to(device)
        x_latent = torch.randn(count, c.patches, c.expert_width, device=device, requires_grad=True)     # [B, P, d]

        def step(form):
            mocet.zero_grad()
            form(x_latent).square().mean().backward()

        compare(f"MoCET {size}, batch {count}", ("plain", lambda: step(mocet.forward_plain)),
                ("fast", lambda: step(mocet.forward)), device)

        def recomputed():
            mocet.recompute = True
            step(mocet.forward)
            mocet.recompute = False

        compare(f"MoCET {size}, batch {count}", ("fast", lambda: step(mocet.forward)), ("--recompute", recomputed),
                device)


@torch.inference_mode()
def speed_encoding(device, batch):
    """Table 3c: images -> codes."""
    models = {name: build(PRESETS[name]).to(device).eval() for name in ("titok_l_32", "nativetok_32")}
    images = torch.rand(batch, 3, 256, 256, device=device)
    compare("encoding", *((name, functools.partial(model.encode, images)) for name, model in models.items()), device,
            paper="0.88x")


def hnt_steps(name, device, batch):
    """(full, frozen): steps of a NativeTok, forward, backward and AdamW, with all and with the second half training."""
    step_full = training_step(name, device, batch)
    model, optimizer = step_full.keywords["model"], step_full.keywords["optimizer"]
    trains = [p for p in model.parameters() if p.requires_grad]

    def full():
        for p in trains:
            p.requires_grad_(True)
        step_full()

    def frozen():
        freeze_reused(model, len(model.mocet.experts) // 2)     # AdamW leaves out what has no gradient
        step_full()

    return ("full", full), ("frozen", frozen)


def speed_hnt(device, batch):
    """Table 3b."""
    compare("HNT-64, a step", *hnt_steps("nativetok_64", device, batch), device, rounds=3, paper="1.33x")


@torch.inference_mode()
def speed_sampling(device, batch):
    """Drawing codes: with the cache against computing all anew, and guidance as one batch against two passes."""
    labels = torch.arange(batch, device=device)
    ar = GENERATORS["ar"](GENERATOR_PRESETS["ar_full"]).to(device).eval()
    compare("AR, 32 codes", ("recomputed", lambda: ar.generate_plain(labels)), ("cached", lambda: ar.generate(labels)),
            device)
    maskgit = GENERATORS["maskgit"](GENERATOR_PRESETS["maskgit_full"]).to(device).eval()
    codes = torch.zeros(batch, maskgit.config.tokens, dtype=torch.int64, device=device)                 # [B, L]
    drop = torch.ones(batch, dtype=torch.bool, device=device)
    compare("MaskGIT, guidance", ("two passes", lambda: (maskgit(codes, labels), maskgit(codes, labels, drop))),
            ("one", lambda: maskgit.guided_logits(codes, labels, 2.0)), device)


def training_step(name, device, batch, recompute=False):
    """A function that makes one optimizer step of a configuration on random data, as its script does but for EMA,
    logging and DDP: stage 1 of a tokenizer with random weights (its teacher's too), or a generator."""
    c = PRESETS[name] if name in PRESETS else GENERATOR_PRESETS[name]
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
    if name in PRESETS:
        model = build(c).to(device)
        teacher = VQGAN(c.vqgan).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        images, stage = torch.rand(batch, 3, c.image_size, c.image_size, device=device), Stage1(model)
        if hasattr(model, "mocet"):
            model.mocet.recompute = recompute

        def loss():
            targets = teacher.encode(images).flatten(1)                     # [B, G*G]
            with autocast():
                loss, _, latents, codes = stage(images, targets)
            model.quantizer.track_usage(latents, codes)
            return loss
    else:
        model = GENERATORS[c.mode](c).to(device)
        codes = torch.randint(c.codebook_size, (batch, c.tokens), device=device)                        # [B, L]
        labels = torch.randint(c.num_classes, (batch,), device=device)

        def loss():
            with autocast():
                return LOSSES[c.mode](model, c, codes, labels)[0]

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    return functools.partial(one_step, loss=loss, model=model, optimizer=optimizer)


def one_step(loss, model, optimizer, update=True):
    optimizer.zero_grad()
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if update:
        optimizer.step()


def operators(step, device):
    """{operator: calls} of a step. On a CPU without AdamW's part: there, unlike on a GPU, it reads its step counts one
    by one, which would count as waiting."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(update=device.type == "cuda")
    return {event.key: event.count for event in profile.key_averages() if event.key.startswith("aten::")}


def speed_steps(device, batch):
    """A step of each full configuration: samples/s, on a GPU with peak memory and the share of its bf16 peak (what a
    large matrix product reaches), and how many operators it calls, of which how many make the CPU wait."""
    cuda = device.type == "cuda"
    peak = matmul_peak(device) if cuda else None
    print(f"\n{'a training step':<34} {'batch':>5} {'seconds':>8} {'samples/s':>10} {'GiB':>6} {'of peak':>8} "
          f"{'operators':>10} {'waiting':>8}" + (f"   peak: {peak / 1e12:.0f} TFLOP/s in bf16" if cuda else ""))
    rows = [(name, batch, recompute) for name in ("nativetok_32", "nativetok_64", "nativetok_128", "titok_l_32")
            for recompute in ((False, True) if cuda and name == "nativetok_128" else (False,))]
    rows += [("ar_full", batch, False), ("maskgit_full", batch * 8 if cuda else batch, False)]
    for name, size, recompute in rows:
        label, step = name + (" --recompute" if recompute else ""), None    # None: lets go of the one before
        try:
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            step = training_step(name, device, size, recompute)
            seconds = trainer.take_turns({name: step}, 10 if cuda else 1, device)[name]
            used = torch.cuda.max_memory_allocated(device) / 2 ** 30 if cuda else None
            calls = operators(step, device)
        except torch.OutOfMemoryError:
            print(f"{label:<34} {size:>5} does not fit")
            continue
        waiting = sum(count for key, count in calls.items() if key in WAITING)
        share = f"{6 * work_of(name) * size / seconds / peak:.0%}" if cuda and not recompute else ""
        print(f"{label:<34} {size:>5} {seconds:>8.3f} {size / seconds:>10.2f} "
              f"{f'{used:.1f}' if cuda else '':>6} {share:>8} {sum(calls.values()):>10} {waiting:>8}", flush=True)


def work_of(name):
    """Multiply-adds of a forward pass of what trains, for one image: forward and backward are 6 FLOP for each."""
    if name in PRESETS:
        return sum(count for part, count in tokenizer_macs(PRESETS[name]).items() if part != "pixel decoder")
    return generator_macs(GENERATOR_PRESETS[name])


def matmul_peak(device, size=8192):
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size ** 3 / trainer.take_turns({"product": lambda: a @ a}, 20, device)["product"]


# ---------------------------------------------------------------------------------------------------------------------
# Memory: python -m extras.bench memory

def memory(batch):
    """Print an estimate of what stages 1 and 2 need on one GPU, by part, without a GPU and without the memory: the
    models run on pretended tensors, and what autograd keeps for the backward pass is added up. Left out: CUDA's own
    half GiB, workspaces, temporary gradients, fragmentation. Expect some GiB more."""
    for stage, names, measure in ((1, ("nativetok_32", "nativetok_64", "nativetok_128", "titok_l_32"), memory_of),
                                  (2, ("nativetok_32", "nativetok_64", "nativetok_128"), memory_of_stage2)):
        at_once = batch // TRAINING["full", stage].accumulate
        tables = {name: measure(name, at_once) for name in names}
        print(f"GiB on each GPU in stage {stage}, {batch} images a GPU, {at_once} at once, bf16 autocast; an estimate\n"
              f"{'':<44}" + "".join(f"{name:>15}" for name in names))
        for row in tables["nativetok_32"]:
            values = [tables[name].get(row) for name in names]
            print(f"{row:<44}" + "".join(f"{'' if v is None else f'{v / 2 ** 30:.1f}':>15}" for v in values))


def memory_of(name, batch):
    """{part: bytes}"""
    c = PRESETS[name]
    with FakeTensorMode():
        with trainer.Unfilled():
            model = build(c)
        images = torch.empty(batch, 3, c.image_size, c.image_size)
        targets = torch.zeros(batch, c.grid ** 2, dtype=torch.int64)
        parts = {}
        if c.model == "nativetok":
            x_latent, parts["kept for backward: MIT"] = kept(lambda: model.mit(images), model)
            z, parts["kept for backward: experts"] = kept(lambda: model.mocet(x_latent), model)
            longest = torch.empty(batch, c.patches + c.tokens, c.expert_width, requires_grad=True)
            one = kept(lambda: model.mocet.experts[-1](longest), model)[1]
            inputs = sum(4 * batch * (c.patches + i + 1) * c.expert_width for i in range(c.tokens))     # float32
            parts["kept for backward: encoder"] = None
            less = parts["kept for backward: experts"] - inputs - one
            z = model.to_code(z)                                            # [B, L, c]
        else:
            z, encoder = kept(lambda: model.latents(images), model)
            parts = {"kept for backward: MIT": None, "kept for backward: experts": None,
                     "kept for backward: encoder": encoder}
            less = None

        def rest():
            z_q, quantizer_loss, _ = model.quantizer(z)
            return F.cross_entropy(model.decoder(z_q).float().flatten(0, 1), targets.flatten()) + quantizer_loss

        parts["kept for backward: decoder, loss"] = kept(rest, model)[1]
    numbers, all_numbers = (sum(p.numel() for p in model.parameters() if p.requires_grad or every)
                            for every in (False, True))
    teacher = trainer.count([trainer.on_meta(lambda: VQGAN(c.vqgan))])
    fixed = {"weights, with the teacher's": 4 * (all_numbers + teacher), "averaged weights (EMA)": 4 * all_numbers,
             "gradients": 4 * numbers, "AdamW's two averages": 8 * numbers}
    total = sum(fixed.values()) + sum(v for v in parts.values() if v)
    return {**fixed, **parts, "all": total, "all with --recompute": None if less is None else total - less}


def memory_of_stage2(name, batch):
    """{part: bytes}, with ConvNeXt-S and the discriminator, at the painters' backward pass, which keeps most."""
    c = PRESETS[name]
    with FakeTensorMode():
        with trainer.Unfilled():
            model, perceptual, judge = build(c), ConvNeXtSmall(None), Discriminator()
        model.pixel_decoder.requires_grad_(True)
        images = torch.empty(batch, 3, c.image_size, c.image_size)
        logits, decoder = kept(lambda: model.decoder(torch.empty(batch, c.tokens, c.code_dim)), model)
        painted, pixels = kept(lambda: model.paint(logits), model)
        judges = [kept(lambda: perceptual.perceptual_loss(painted, images), perceptual)[1],
                  kept(lambda: judge.requires_grad_(False)(painted), judge)[1]]
    painters = trainer.count([model.decoder, model.pixel_decoder])
    parts = {"weights, ConvNeXt's and the discriminator's": 4 * trainer.count([model, perceptual, judge]),
             "averaged weights (EMA)": 4 * trainer.count([model]),
             "gradients": 4 * (painters + trainer.count([judge])),
             "AdamW's two averages": 8 * (painters + trainer.count([judge])),
             "kept for backward: token decoder": decoder, "kept for backward: pixel decoder": pixels,
             "kept for backward: ConvNeXt": judges[0],
             "kept for backward: discriminator": judges[1]}
    return {**parts, "all": sum(parts.values())}


class InFloat32(TorchFunctionMode):
    """What CUDA's autocast takes back to float32 and the CPU's does not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.group_norm, F.layer_norm, F.softmax, torch.Tensor.softmax, F.mse_loss):
            args = [a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        return function(*args, **(kwargs or {}))


def kept(forward, model):
    """(what forward() returns, bytes that autograd keeps of it for the backward pass), under bf16 autocast as CUDA has
    it. Parameters are left out, their bfloat16 copies are not."""
    own, storages = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()          # views of one storage count once
        if storage._cdata not in own:
            storages[storage._cdata] = storage      # held, or its number would be given to another
        return tensor

    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16),
          InFloat32()):
        result = forward()
    return result, sum(storage.nbytes() for storage in storages.values())


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and work: python -m extras.bench params

def parts_of(model):
    """{part: its modules and parameters}: all of the model, each number in one part."""
    if isinstance(model, TiTok):
        parts = {"encoder": [model.encoder, model.latent_tokens]}
    else:
        parts = {"MIT": [model.mit], "experts": [model.mocet]}
    return {**parts, "to_code, quantizer": [model.to_code, model.quantizer], "token decoder": [model.decoder],
            "pixel decoder": [model.pixel_codebook, model.pixel_decoder]}


def block_macs(length, width, asking=None):
    """Multiply-adds of a Block on `length` positions, of which `asking` (default: all) are wanted afterwards."""
    asking = length if asking is None else asking
    return (2 * length + 10 * asking) * width ** 2 + 2 * asking * length * width


def tokenizer_macs(config):
    """{part: multiply-adds for one image}, norms and softmax left out. The pixel decoder's are counted by torch."""
    c, cells = config, config.grid ** 2
    codes = c.tokens * c.code_dim * c.codebook_size
    read = c.patches * 3 * c.patch_size ** 2 * c.width                                  # the patch convolution
    if c.model == "nativetok":
        read += c.encoder_layers * block_macs(1 + c.patches, c.width)
        lengths = [c.patches + i + 1 for i in range(c.tokens)]
        experts = sum((c.expert_layers - 1) * block_macs(t, c.expert_width) + block_macs(t, c.expert_width, 1)
                      for t in lengths)
        parts = {"MIT": read + c.patches * c.width * c.expert_width, "experts": experts,
                 "to_code, quantizer": c.tokens * c.expert_width * c.code_dim + codes}
    else:
        parts = {"encoder": read + c.encoder_layers * block_macs(1 + c.patches + c.tokens, c.width),
                 "to_code, quantizer": c.tokens * c.width * c.code_dim + codes}
    head = cells * 2 * c.width * (c.width + c.vqgan.codebook_size)
    decoder = c.decoder_layers * block_macs(1 + cells + c.tokens, c.width) + head + c.tokens * c.code_dim * c.width
    return {**parts, "token decoder": decoder,
            "pixel decoder": pixel_macs(c.vqgan) + cells * c.vqgan.codebook_size * c.vqgan.code_dim}


@functools.cache
def pixel_macs(config):
    pixels = trainer.on_meta(lambda: vqgan.Decoder(config))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pixels(torch.empty(1, config.code_dim, config.grid, config.grid, device="meta"))
    return counter.get_total_flops() // 2


# preset: (parameters in millions, share that trains under HNT in percent), as the paper has them
PAPER = {"nativetok_32": (616, None), "nativetok_64": (666, 56), "nativetok_128": (766, 55), "titok_l_32": (641, None)}


def print_tokenizers():
    """Parameters and multiply-adds of every full preset, by part. No weights are made."""
    for name in ("nativetok_32", "nativetok_64", "nativetok_128", "titok_l_32", "titok_l_causal_32", "titok_b_64",
                 "titok_s_128"):
        config = PRESETS[name]
        model = trainer.on_meta(lambda: build(config))
        counts = {part: trainer.count(members) for part, members in parts_of(model).items()}
        total, work, (paper, paper_share) = sum(counts.values()), tokenizer_macs(config), PAPER.get(name, (None, None))
        print(f"{name:<22} {'parameters':>11} {'share':>6} {'GMACs an image':>15}")
        for part, count in counts.items():
            print(f"  {part:<20} {count / 1e6:>10.2f}M {count / total:>6.1%} {work[part] / 1e9:>15.2f}")
        print(f"  {'all':<20} {total / 1e6:>10.2f}M {'':>6} {sum(work.values()) / 1e9:>15.2f}"
              + (f"   paper: {paper}M" if paper else ""))
        if paper_share:         # frozen: MIT, the first half of the experts, to_code, quantizer; HNT's paper share
            new = trainer.count(model.mocet.experts[config.tokens // 2:])
            trains = (new + counts["token decoder"]) / (total - counts["pixel decoder"])
            print(f"  of {(total - counts['pixel decoder']) / 1e6:.2f}M without the pixel decoder {trains:.1%} train "
                  f"under HNT; paper: {paper_share} %")


def generator_macs(config):
    """Multiply-adds of one sequence's forward pass; norms and softmax left out, the causal mask not made use of."""
    c, maskgit = config, config.mode == "maskgit"
    length, hidden = c.tokens + maskgit, 8 * c.width if maskgit else 3 * c.feed_forward
    block = length * c.width * (4 * c.width + hidden) + 2 * length ** 2 * c.width
    skips = c.layers // 2 * length * 2 * c.width ** 2 if maskgit else 0
    return (c.layers + maskgit) * block + skips + c.tokens * c.width * c.codebook_size


def print_generators():
    """Parameters by part, and multiply-adds of one forward pass without guidance."""
    rows = [("llamagen_b", "VQGAN, 16384 codes", {"tokens": 256, "codebook_size": 16384}, "110.9M"),
            ("llamagen_l", "VQGAN, 16384 codes", {"tokens": 256, "codebook_size": 16384}, "343M"),
            ("llamagen_b", "NativeTok-32", {}, None), ("maskgit_uvit_l", "NativeTok-128", {}, "295.0M with 4096 codes")]
    for name, of, sizes, published in rows:
        c = replace(GENERATOR_PRESETS[name], **sizes)
        model = trainer.on_meta(lambda: GENERATORS[c.mode](c))
        parts = {part: trainer.count([module]) for part, module in model.named_children()}
        parts |= {part: p.numel() for part, p in model.named_parameters(recurse=False)}
        print(f"{name}, codes of {of}")
        for part, count in parts.items():
            if count:
                print(f"  {part:<20} {count / 1e6:>9.2f}M {count / sum(parts.values()):>6.1%}")
        print(f"  {'all':<20} {sum(parts.values()) / 1e6:>9.2f}M, {generator_macs(c) / 1e9:.2f} GMACs for {c.tokens} tokens"
              + (f"   published: {published}" if published else ""))


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def main():
    parser = trainer.ArgumentParser(__doc__, prog="-m extras.bench")
    parser.add_argument("what", choices=("speed", "memory", "params"), metavar="what", help="speed, memory or params")
    parser.add_argument("--batch_size", type=int, help="speed, memory: images a GPU, default 64; speed on a CPU: 2")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where present")
    parser.set_defaults(config=None, data=None, out=None)
    args = trainer.parse(parser)
    if args.what == "speed":
        speed(args.device, args.batch_size)
    elif args.what == "memory":
        memory(args.batch_size or 64)
    else:
        print_tokenizers()
        print_generators()


if __name__ == "__main__":
    trainer.launch(main)
