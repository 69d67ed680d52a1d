"""Hierarchical Native Training (section 3.2): grow a NativeTok of few tokens into one of many.

    python tokenizer.py --tokens 8      # first a short one, all of which trains
    python hnt.py --tokens 16           # then this: 8 -> 16 in the toy
    torchrun --nproc_per_node=4 hnt.py --tokens 64      # full: 32 -> 64; again with --tokens 128

Experts are separate modules, and none reads what a later one writes. So a NativeTok of 16 tokens
can keep the first 8 experts of a trained one: while they are frozen, their tokens stay the same, to
the bit. Growing is surgery on the state dict (`grow`): MIT and experts 0 .. 7 are kept, expert
8 + j starts as a copy of expert j. Then

    for 90 % of the steps   the new experts and the token decoder train;
                            MIT, old experts, pad token, to_code and quantizer are frozen
    for the last 10 %       everything trains

MIT and old experts, frozen and with inputs that need no gradient, build no graph, so a frozen step
is cheaper (the paper: 1.15 s instead of 1.53 s). --strategy (Table 3b): reuse+finetune is the
above; reuse stays frozen to the end; full, the comparison, trains everything from random weights.

Letters as in tokenizer.py: B batch, H W pixels, G side of the VQGAN's grid, D width of the decoder.
"""
from dataclasses import replace
from pathlib import Path

import data
import tokenizer
import trainer
import vqgan
from tokenizer import NativeTok, Stage1Loss
from torch import nn
from trainer import BadInput, TrainConfig

FROZEN_SHARE = {"full": 0.0, "reuse": 1.0, "reuse+finetune": 0.9}       # of the steps
TRAINING = {
    "toy": replace(tokenizer.TOY_TRAINING, steps=700, warmup=20, log_every=40),
    "small": TrainConfig(), "full": TrainConfig()}    # 450,000 steps frozen, as in appendix F.1


def grow(state_dict, old_tokens, new_tokens):
    """The state dict of a NativeTok of old_tokens -> that of one of new_tokens, whose first
    old_tokens tokens are the same. Expert old + j and its row of the decoder's latent positions
    start as copies of those of token j modulo old. Everything else is kept."""
    if new_tokens <= old_tokens:
        raise BadInput(f"--tokens {new_tokens}: HNT grows, and its source has {old_tokens} already")
    origin = [token % old_tokens for token in range(new_tokens)]  # whose weights each starts with
    grown = {key: value.clone() for key, value in state_dict.items()
             if not key.startswith("mocet.experts.")}
    positions = grown["decoder.latent_positions"]  # [1, old, D]
    grown["decoder.latent_positions"] = positions[:, origin]  # [1, new, D]
    for token, source in enumerate(origin):
        prefix = f"mocet.experts.{source}."
        for key, value in state_dict.items():
            if key.startswith(prefix):
                grown[f"mocet.experts.{token}.{key.removeprefix(prefix)}"] = value.clone()
    return grown


def freeze_reused(model, reused_tokens):
    """Freeze what decides the first reused_tokens codes. The new experts and the token decoder are
    left to train: 56 % of NativeTok-64's parameters, the VQGAN's not counted, 55 % of 128's."""
    for part in (model.mit, *model.mocet.experts[:reused_tokens], model.to_code, model.quantizer):
        part.requires_grad_(False)
    model.mocet.pad_token.requires_grad_(False)


def unfreeze(model):
    """Everything trains but the VQGAN's part (pixel_codebook, pixel_decoder), as in stage 1."""
    for part in (model.mit, model.mocet, model.to_code, model.quantizer, model.decoder):
        part.requires_grad_(True)


def train(args):
    tokens = args.tokens or {"toy": 16}.get(args.config, 64)
    # at full size more than 64 tokens leave too little of 80 GB without --recompute
    training = replace(TRAINING[args.config], recompute=tokens > 64)
    training = trainer.override(training, args)
    teacher = vqgan.load_vqgan(args.out / "vqgan.pt", args.device)  # frozen
    source_path = args.source or args.out / f"nativetok_{tokens // 2}.pt"
    source = tokenizer.load_tokenizer(
        source_path, make=f"python tokenizer.py --tokens {tokens // 2}, or hnt.py, or --source")
    if source.config.model != "nativetok":
        raise BadInput(f"{source_path}: a {source.config.model}, which has no experts to grow")
    if trainer.fingerprint(source.pixel_decoder) != trainer.fingerprint(teacher.decoder):
        raise BadInput(f"{source_path}: trained with another VQGAN than {args.out}/vqgan.pt, or "
                       f"after stage 2")
    config, reused = replace(source.config, tokens=tokens), source.config.tokens
    frozen_steps = int(FROZEN_SHARE[args.strategy] * training.steps)
    suffix = "" if args.strategy == "reuse+finetune" else f"_{args.strategy}"
    grown = grow(source.state_dict(), reused, tokens)
    train_set = data.open_dataset(args.data, "train", config.image_size, augment=True, draft=True)
    val_set = data.open_dataset(args.data, "val", config.image_size)
    originals, _ = next(data.all_images(val_set, 16))  # for previews, [16, 3, H, W]
    run = trainer.Run(args, "tokenizer", f"nativetok_{tokens}{suffix}", config, training, train_set,
                      reused=reused, frozen_steps=frozen_steps, vqgan=trainer.fingerprint(teacher),
                      source=trainer.fingerprint(source))

    model = NativeTok(config)
    if args.strategy == "full":  # random weights, but for the VQGAN's part
        grown = {key: value for key, value in grown.items() if key.startswith("pixel_")}
    model.load_state_dict(grown, strict=args.strategy != "full")
    tokenizer.prepare(model, training)
    model = model.to(run.device)
    # <=: a checkpoint at exactly frozen_steps was saved before unfreezing, with the old optimizer
    frozen = 0 < frozen_steps and run.step <= frozen_steps
    if frozen:
        freeze_reused(model, reused)
    loss_fn = run.parallel(Stage1Loss(model))
    optimizer = trainer.adamw(model, training)  # holds what trains, nothing else
    ema = trainer.Ema(model, training.ema)
    run.say(f"{source_path}: {reused} -> {tokens} tokens; {frozen_steps} steps with the old frozen")
    run.start(model=model, ema=ema, optimizer=optimizer)
    batches = data.batches(train_set, *run.order, training.workers)

    for step in range(run.step, training.steps):
        if frozen and step == frozen_steps:  # now everything trains; AdamW starts again
            frozen = False
            unfreeze(model)
            loss_fn = run.parallel(Stage1Loss(model))
            optimizer = trainer.adamw(model, training)
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
        model.quantizer.update_usage()  # without revival, which would change the old tokens
        ema.update(model)
        run.log(step, grad_norm=grad_norm, frozen=float(frozen), **model.quantizer.stats())
        vqgan.preview_if_due(run, step, ema.model, originals)
        run.save_if_due(step, model=model, ema=ema, optimizer=optimizer)


def main():
    parser = trainer.command_line(__doc__, TrainConfig)
    parser.add_argument("--tokens", type=int, help="L to grow to; default: 16 (toy) or 64")
    parser.add_argument("--source", metavar="FILE", type=Path,
                        help="the tokenizer to grow; default: that of half the --tokens, in --out")
    parser.add_argument("--strategy", choices=tuple(FROZEN_SHARE), default="reuse+finetune",
                        metavar="", help=f"Table 3b: {', '.join(FROZEN_SHARE)}")
    train(trainer.parse(parser))


if __name__ == "__main__":
    trainer.launch(main)
