"""Hierarchical Native Training (section 3.2): grow a NativeTok of few tokens into one of many, and train the new part.

    python tokenizer.py --tokens 8      # first a short one, all of it
    python hnt.py --tokens 16           # then this: toy 8 -> 16
    torchrun --nproc_per_node=4 hnt.py --tokens 64      # full (what runs on CUDA): 32 -> 64; again with --tokens 128

NativeTok in one breath (tokenizer.py has it in full): the Meta Image Transformer (MIT) reads the image once, X_latent;
expert i, a small transformer, reads X_latent, the tokens z_0 .. z_{i-1} and a pad token, and what comes out for the pad
is kept: z_i. One linear layer (to_code) and a quantizer make z_i a code; the token decoder reads all codes.

Experts are independent modules, and none reads what a later one writes. So a NativeTok of 16 tokens can keep the first
8 experts of a trained one as they are: as long as these are frozen, their tokens come out the same, to the bit. Growing
is surgery on the state dict (`grow`): MIT and experts 0 .. 7 are kept, expert 8 + j starts as a copy of expert j. Then

    for 90 % of the steps   new experts and token decoder train;
                            MIT, old experts, pad token, to_code and quantizer are frozen
    for the last 10 %       everything trains

Frozen modules get no gradient (to_code and quantizer still pass one on to the new experts). MIT and the old experts,
whose inputs need none either, build no graph at all: torch records nothing where neither parameters nor inputs need a
gradient. So a frozen step is cheaper (the paper: 1.15 s instead of 1.53 s); this script measures by how much.

--strategy (Table 3b):  full             random weights, everything trains: what HNT is compared with
                                         (of the source it takes the sizes and the VQGAN's part, pixel_*)
                        reuse            grow; MIT and old experts stay frozen to the end
                        reuse+finetune   grow, 90 % frozen, then everything (default)

Letters as in tokenizer.py: B batch, H W pixels, L tokens, D width of the decoder, c length of a code vector.
"""
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import data
import tokenizer
import trainer
import vqgan
from tokenizer import NativeTok, Stage1
from trainer import BadInput, TrainConfig

STRATEGIES = ("full", "reuse", "reuse+finetune")
FROZEN_SHARE = 0.9      # of the steps, under reuse+finetune (section 3.2)
TRAINING = {
    "toy": TrainConfig(steps=1000, batch_size=16, learning_rate=1e-3, end_learning_rate=5e-5, warmup=20, ema=0.99,
                       workers=0, log_every=40, save_every=300, preview_every=600),
    "full": TrainConfig(steps=450_000),     # appendix F.1
}


def grow(state_dict, old_tokens, new_tokens):
    """The state dict of a NativeTok of old_tokens -> one of new_tokens, whose first old_tokens tokens are the same.

    Expert old + j and its row in the decoder's latent positions start as copies of those of token j (of j modulo old,
    where new > 2 old). Everything else is taken over. Raises BadInput unless new_tokens > old_tokens.
    """
    if new_tokens <= old_tokens:
        raise BadInput(f"--tokens {new_tokens}: HNT grows; the tokenizer it starts from has {old_tokens} already")
    # origin: new token -> the old one whose weights it starts with
    origin = [i if i < old_tokens else (i - old_tokens) % old_tokens for i in range(new_tokens)]
    grown = {}
    for key, value in state_dict.items():
        if key == "decoder.latent_positions":
            grown[key] = value[:, origin].clone()                           # [1, new, D]
        elif not key.startswith("mocet.experts."):
            grown[key] = value.clone()
    for token, source in enumerate(origin):
        prefix = f"mocet.experts.{source}."
        for key, value in state_dict.items():
            if key.startswith(prefix):
                grown[f"mocet.experts.{token}.{key[len(prefix):]}"] = value.clone()
    return grown


def freeze_reused(model, reused_tokens):
    """Freeze what decides the first reused_tokens codes: MIT, their experts, pad token, to_code, quantizer.

    What is left to train: the new experts and the token decoder (56 % of NativeTok-64's parameters, 55 % of -128's).
    """
    for part in (model.mit, *model.mocet.experts[:reused_tokens], model.to_code, model.quantizer):
        part.requires_grad_(False)
    model.mocet.pad_token.requires_grad_(False)


def unfreeze(model):
    """Everything trains, but for the VQGAN's part (pixel_codebook, pixel_decoder), which stage 1 leaves alone."""
    for part in (model.mit, model.mocet, model.to_code, model.quantizer, model.decoder):
        part.requires_grad_(True)


def find_source(args, tokens):
    """The checkpoint to grow: --source, or the longest shorter nativetok_N.pt in the folder."""
    if args.source:
        return args.source
    found = [(int(m[1]), p) for p in args.out.glob("nativetok_*.pt") if (m := re.fullmatch(r"nativetok_(\d+)", p.stem))]
    shorter = [pair for pair in found if pair[0] < tokens]
    if not shorter:
        raise BadInput(f"{args.out}: no NativeTok of fewer than {tokens} tokens there to grow. Train it first: "
                       f"python tokenizer.py --tokens {max(1, tokens // 2)}")
    return max(shorter)[1]


def step_ratio(run, model, reused, teacher, images):
    """Seconds of a frozen forward and backward / those of a full one, taken in turn. Leaves all of the model to train.
    """
    stage = Stage1(model)

    def step(prepare, *args):
        prepare(model, *args)
        with run.autocast():
            loss = stage(images, teacher.encode(images).flatten(1))[0]
        loss.backward()
        model.zero_grad()

    unfreeze(model)
    seconds = trainer.take_turns({"full": lambda: step(unfreeze), "frozen": lambda: step(freeze_reused, reused)}, 5,
                                 images.device)
    unfreeze(model)
    return seconds["frozen"] / seconds["full"]


def train(args):
    data.find(args.data)
    teacher = vqgan.load_vqgan(args.vqgan_file or args.out / "vqgan.pt", make=vqgan.MAKE[args.config])
    tokens = {"toy": 16, "full": 64}[args.config] if args.tokens is None else args.tokens
    if tokens < 2:
        raise BadInput(f"--tokens {tokens}: HNT grows a tokenizer, so at least 2")
    source_path = find_source(args, tokens)
    source = tokenizer.load_tokenizer(source_path)
    if source.config.model != "nativetok":
        raise BadInput(f"{source_path}: a {source.config.model}; HNT grows experts, and only NativeTok has them")
    config, reused = replace(source.config, tokens=tokens), source.config.tokens
    training = trainer.override(TRAINING[args.config], args)
    grown = grow(source.state_dict(), reused, tokens)
    suffix = "" if args.strategy == "reuse+finetune" else f"_{args.strategy}"
    frozen_steps = {"full": 0, "reuse": training.steps, "reuse+finetune": int(FROZEN_SHARE * training.steps)}
    frozen_steps = frozen_steps[args.strategy]
    train_set = data.open_dataset(args.data, "train", config.image_size, augment=True, draft=training.draft)
    run = trainer.Run(args, "tokenizer", tokenizer.checkpoint_name(config) + suffix, config, training, reused=reused,
                      strategy=args.strategy, frozen_steps=frozen_steps, data=train_set.kind,
                      images=train_set.content, vqgan=trainer.fingerprint(teacher))
    originals = next(data.all_images(data.open_dataset(args.data, "val", config.image_size), 16))[0].to(run.device)

    teacher = teacher.to(run.device, memory_format=torch.channels_last).requires_grad_(False)   # faster convolutions
    model = NativeTok(config)
    if args.strategy == "full":     # random weights, but for the VQGAN's part
        grown = {**model.state_dict(), **{k: v for k, v in grown.items() if k.startswith("pixel_")}}
    model.load_state_dict(grown)
    tokenizer.prepare(model, training)
    model = model.to(run.device)

    sample = [torch.from_numpy(train_set.get(i)) for i in range(min(run.piece // run.world, len(train_set)))]
    ratio = step_ratio(run, model, reused, teacher, torch.stack(sample).to(run.device) / 255)     # [B, 3, H, W]
    # <=: the checkpoint at exactly frozen_steps was saved before the switch below, with the optimizer of what trained
    frozen = frozen_steps > 0 and run.step <= frozen_steps
    if frozen:
        freeze_reused(model, reused)
    stage = run.parallel(Stage1(model))
    optimizer = run.adamw(model.parameters())   # holds what trains and nothing else
    ema = trainer.Ema(model, training.ema)
    run.track(model=model, optimizer=optimizer, ema=ema)
    run.say(f"{source_path}: {reused} tokens, grown to {tokens}; {args.strategy}: frozen for the first {frozen_steps} "
            f"of {training.steps} steps. A frozen forward and backward takes {ratio:.2f} times as long as a full one")
    batches = data.batches(train_set, run.piece, args.seed, run.step * training.accumulate, run.rank, run.world,
                           training.workers)

    for step in run.steps():
        if frozen and step == frozen_steps:     # the last 10 %: everything trains, with AdamW's averages starting anew
            frozen = False
            unfreeze(model)
            stage = run.parallel(Stage1(model))
            optimizer = run.adamw(model.parameters())
            run.track(optimizer=optimizer)
        run.set_learning_rate(optimizer, step)
        optimizer.zero_grad()
        # latents [B, L, c], codes [B, L]
        loss, parts, latents, codes = tokenizer.stage1_gradients(run, stage, teacher, batches)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        model.quantizer.track_usage(latents, codes)     # counted; never revived, which would change the old tokens
        ema.update(model)
        run.log(step, loss=loss, grad_norm=grad_norm, **parts, **model.quantizer.use(), frozen=float(frozen),
                step_ratio=ratio)
        if run.preview(step):
            tokenizer.save_preview(ema.model, originals, run.path.with_name(f"{run.path.stem}_preview.png"))


def main():
    parser = trainer.command_line(__doc__, TrainConfig)
    parser.add_argument("--tokens", type=int, default=None, help="L to grow to")
    parser.add_argument("--source", metavar="FILE", type=Path, help="the tokenizer to grow; default: the longest "
                        "shorter nativetok_N.pt in the results folder")
    parser.add_argument("--strategy", choices=STRATEGIES, default="reuse+finetune", help="Table 3b, see above")
    parser.add_argument("--vqgan", metavar="FILE", type=Path, dest="vqgan_file",
                        help="the stage 0 checkpoint, default OUT/vqgan.pt")
    train(trainer.parse(parser))


if __name__ == "__main__":
    trainer.launch(main)
