"""Public weights as models: what NativeTok builds on or is compared with.

    python -m extras.pretrained vqgan FILE              # MaskGIT-VQGAN: out/full/vqgan.pt
    python -m extras.pretrained titok FILE a.png b.jpg  # TiTok: original, reconstruction, codes
    python -m extras.pretrained half FILE --out FOLDER  # averaged weights of a run, to give away

docs/full_size.md says where the files are published. Models come in eval mode, without gradients.
Tests compare each network with the official code's outputs on seeded random weights; the published
files themselves have not been loaded.

Letters: B batch, H W pixels, L tokens, D width, c length of a code vector, K codes.
"""
from dataclasses import asdict, replace
from pathlib import Path

import generator
import trainer
import vqgan
from tokenizer import TiTok, TokenizerConfig, reconstruct
from trainer import BadInput
from vqgan import ConvNeXtSmall  # noqa: F401, public weights, too


def layers_of(state, prefix):
    """How many numbers follow prefix in the names."""
    return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})


def load_maskgit_vqgan(path_or_state_dict):
    """The public MaskGIT-VQGAN (168 entries, 54.5M numbers) as a VQGAN."""
    state = trainer.read_weights(path_or_state_dict)
    model = vqgan.VQGAN(vqgan.PRESETS["full"])
    model.load_state_dict({"quantize.usage": model.quantize.usage, **state})    # ours alone
    return model.eval().requires_grad_(False)


# ---- TiTok (arXiv 2406.07550)

TITOK_NAMES = (     # theirs -> ours, in this order
    ("pixel_quantize.embedding", "pixel_codebook"), ("quantize.embedding", "quantizer.embedding"),
    ("latent_token_positional_embedding", "latent_positions"),
    ("positional_embedding", "position_embedding"), ("class_embedding", "class_token"),
    ("encoder.conv_out", "to_code"), ("decoder_embed", "embed"), (".ffn.", ".head."),
    (".transformer.", ".blocks."), (".ln_1.", ".norm1."), (".ln_2.", ".norm2."),
    ("attn.in_proj_", "qkv."), ("attn.out_proj", "proj"), ("mlp.c_fc", "mlp.0"),
    ("mlp.c_proj", "mlp.2"))


def load_titok(path_or_state_dict, image_size=256):
    """The public TiTok-L-32, -B-64 or -S-128 as a TiTok, sizes read off the shapes.

    They were trained with a bug: before the last layer the encoder's [L, D] numbers are
    reinterpreted, not transposed, as [D, L], so each latent mixes many tokens (`legacy`).
    """
    state = trainer.read_weights(path_or_state_dict)
    tokens, width = state["latent_tokens"].shape                            # L, D
    codebook_size, code_dim = state["quantize.embedding.weight"].shape      # K, c
    model = TiTok(TokenizerConfig(
        model="titok", tokens=tokens, patch_size=state["encoder.patch_embed.weight"].shape[-1],
        width=width, heads=width // 64, encoder_layers=layers_of(state, "encoder.transformer."),
        decoder_layers=layers_of(state, "decoder.transformer."),
        code_dim=code_dim, codebook_size=codebook_size,
        vqgan=replace(vqgan.PRESETS["full"], image_size=image_size)))
    ours = model.state_dict()
    new = {"quantizer.usage": ours["quantizer.usage"]}      # ours alone
    for name, value in state.items():
        for theirs, mine in TITOK_NAMES:
            name = name.replace(theirs, mine)
        new[name] = value
    # two tables [L, D], only added up
    new["latent_tokens"] = (new["latent_tokens"] + new.pop("encoder.latent_positions"))[None]
    for name in new.keys() & ours.keys():       # 1x1 convolutions, and a leading 1
        if new[name].squeeze().shape == ours[name].squeeze().shape:
            new[name] = new[name].reshape(ours[name].shape)
    model.load_state_dict(new)
    model.legacy = True
    return model.eval().requires_grad_(False)


# ---- Generators. Their attribute names are those of the public weights

def load_llamagen(path_or_state_dict, heads, rope, tokens=256):
    """Public class-conditional LlamaGen weights as an ARGenerator. The shapes do not tell heads (12
    for B, 16 for L), rope ("2d" for the published files), and how many tokens `generate` makes."""
    state = trainer.read_weights(path_or_state_dict)
    rows, width = state["cls_embedding.embedding_table.weight"].shape
    model = generator.ARGenerator(generator.GeneratorConfig(
        mode="ar", tokens=tokens, codebook_size=len(state["output.weight"]), width=width,
        num_classes=rows - 1, layers=layers_of(state, "layers."), heads=heads, rope=rope))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def load_titok_maskgit(path_or_state_dict, heads=16):
    """The public generator of TiTok-S-128 (a U-ViT; those of L-32 and B-64 are BERTs) as a
    MaskGITGenerator. No shape tells the heads."""
    state = trainer.read_weights(path_or_state_dict)
    (rows, width), codes = state["embeddings.weight"].shape, len(state["lm_head.weight"])
    model = generator.MaskGITGenerator(replace(
        generator.PRESETS["maskgit_full"], tokens=state["pos_embed"].shape[1] - 1,
        codebook_size=codes, num_classes=rows - codes - 2,      # 2: the mask, and no class
        width=width, layers=2 * layers_of(state, "in_blocks."), heads=heads))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


# ---- Command line

def write_vqgan(file, path):
    """The checkpoint that stage 0 would write after training."""
    model = load_maskgit_vqgan(file)
    trainer.save({"stage": "vqgan", "step": 0, "config": asdict(model.config), "settings": {},
                  "model": model.state_dict()}, path)


def write_half(file, path):
    """A checkpoint's averaged weights in half precision, without what only --resume reads."""
    saved = trainer.load_checkpoint(file, ("tokenizer", "ar", "maskgit"), "see README.md")
    kept = ("stage", "step", "config", "training", "settings", "classes", "class_counts",
            "tokenizer")
    checkpoint = {name: saved[name] for name in kept if name in saved}
    checkpoint["model"] = {name: value.half() if value.is_floating_point() else value
                           for name, value in saved["ema"]["model"].items()}
    if "tokenizer" in saved:        # the generator's, whose weights are rounded, too
        tokenizer = generator.load_pair(file)[1].half().float()
        checkpoint["tokenizer_fingerprint"] = generator.codes_fingerprint(tokenizer)
    trainer.save(checkpoint, path)


def main():
    parser = trainer.make_parser(__doc__, prog="-m extras.pretrained")
    parser.add_argument("what", choices=("vqgan", "titok", "half"))
    parser.add_argument("file", help="the downloaded weights; half: a checkpoint")
    parser.add_argument("images", nargs="*", help="titok: what to encode and decode")
    parser.add_argument("--config", choices=("full", "small"), default="full")
    parser.add_argument("--out", type=Path, help="folder for results, default out/<config>")
    parser.add_argument("--overwrite", action="store_true", help="replace the file there")
    args = parser.parse_args()
    out = args.out or Path("out", args.config)
    if args.what == "titok":
        if not args.images:
            raise BadInput("titok: name one image or more after the weights")
        reconstruct(load_titok(args.file), args.images, out / "reconstruct.png")
        return print(f"{out}/reconstruct.png: originals beside reconstructions")
    path = out / ("vqgan.pt" if args.what == "vqgan" else Path(args.file).name)
    if path.exists() and not args.overwrite:
        raise BadInput(f"{path}: exists. Give --overwrite or another --out")
    {"vqgan": write_vqgan, "half": write_half}[args.what](args.file, path)
    print(f"{path}: written")


if __name__ == "__main__":
    trainer.launch(main)
