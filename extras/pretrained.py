"""Public weights of others as our models; whoever reads for the method needs none of this.

    python -m extras.pretrained vqgan FILE          # MaskGIT-VQGAN's, as stage 0 of the full size: writes OUT/vqgan.pt
    python -m extras.pretrained titok FILE a.png    # TiTok's (L-32, B-64 or S-128): original beside reconstruction

Each file is read by what it holds, and refused where keys or shapes are not those of the published one.
"""
from dataclasses import asdict, replace

import torch

import generator
import trainer
import vqgan
from generator import ARGenerator, GeneratorConfig, MaskGITGenerator
from tokenizer import TiTok, TokenizerConfig, write_reconstructions
from trainer import BadInput
from vqgan import VQGAN, ConvNeXtSmall, VQGANConfig, name_of, read_weights  # noqa: F401


def load_maskgit_vqgan(path_or_state_dict):
    """The public MaskGIT-VQGAN weights (maskgit-vqgan-imagenet-f16-256.bin) as a VQGAN in eval mode.

    Raises BadInput if the file's keys or shapes are not those of the published one (168 entries, 54.5M numbers).
    """
    state = read_weights(path_or_state_dict)
    model = VQGAN(vqgan.PRESETS["full"])
    state.setdefault("quantize.usage", model.quantize.usage)    # ours alone: the public file does not count use
    trainer.load_weights(model, state, name_of(path_or_state_dict, "weights"))
    return model.eval()


def load_titok(path_or_state_dict, image_size=256):
    """The public weights of TiTok-L-32, -B-64 or -S-128 as a TiTok in eval mode; sizes are read off the shapes.

    These three were trained with a slip: before the last layer the encoder's [L, D] numbers are reinterpreted, not
    transposed, as [D, L], so that each latent mixes many tokens. Their weights mean nothing without it (`legacy`).
    Raises BadInput if keys or shapes are not theirs; TiTok's later models (vq8k, vae) are others.
    """
    state, what = read_weights(path_or_state_dict), name_of(path_or_state_dict, "TiTok weights")
    for name, dimensions in {"latent_tokens": 2, "encoder.patch_embed.weight": 4, "encoder.positional_embedding": 2,
                             "decoder.ffn.0.weight": 4, "quantize.embedding.weight": 2,
                             "pixel_quantize.embedding.weight": 2}.items():
        if name not in state or state[name].ndim != dimensions:
            raise BadInput(f"{what}: no entry {name} of {dimensions} dimensions among {len(state)}. Is it TiTok-L-32, "
                           f"-B-64 or -S-128? The later ones, vq8k and vae, are not supported")
    (tokens, width), patch_size = state["latent_tokens"].shape, state["encoder.patch_embed.weight"].shape[-1]
    patches = len(state["encoder.positional_embedding"]) - 1
    if not patch_size or patches != (image_size // patch_size) ** 2:
        raise BadInput(f"{what}: for {patches} patches of {patch_size} pixels, not for --image_size {image_size}")
    encoder, decoder = (len({name.split(".")[2] for name in state if name.startswith(f"{part}.transformer.")})
                        for part in ("encoder", "decoder"))
    codebook_size, code_dim = state["quantize.embedding.weight"].shape

    def make():
        return TiTok(TokenizerConfig(model="titok", tokens=tokens, patch_size=patch_size, width=width, heads=width // 64,
                                     encoder_layers=encoder, decoder_layers=decoder, code_dim=code_dim,
                                     codebook_size=codebook_size, vqgan=VQGANConfig(image_size=image_size)))

    model = trainer.sketch(make, len(state), what)
    ours = {}
    for name, value in state.items():
        for theirs, mine in TITOK_NAMES:
            name = name.replace(theirs, mine)
        ours[name] = value
    # two tables that are only ever added up, and numbers that they store in other shapes
    added = ours.pop("encoder.latent_positions", torch.zeros(1))
    if added.shape not in ((1,), ours["latent_tokens"].shape):
        raise BadInput(f"{what}: {list(added.shape)} positions of latents that are {list(ours['latent_tokens'].shape)}")
    ours["latent_tokens"] = (ours["latent_tokens"] + added)[None]           # [1, L, D]
    for name, value in model.state_dict().items():
        if name in ours and [n for n in ours[name].shape if n > 1] == [n for n in value.shape if n > 1]:
            ours[name] = ours[name].reshape(value.shape)            # 1x1 convolutions, and a leading 1
    ours.setdefault("quantizer.usage", torch.ones(codebook_size))   # ours alone: the public files do not count use
    model = trainer.made_to_fit(make, ours, what)
    model.legacy = True
    return model.eval().requires_grad_(False)


TITOK_NAMES = (     # theirs -> ours, in this order
    ("pixel_quantize.embedding", "pixel_codebook"), ("quantize.embedding", "quantizer.embedding"),
    ("latent_token_positional_embedding", "latent_positions"), ("positional_embedding", "positions"),
    ("class_embedding", "class_token"), ("encoder.conv_out", "to_code"), ("decoder_embed", "embed"),
    (".ffn.", ".head."), (".transformer.", ".blocks."), (".ln_1.", ".norm1."), (".ln_2.", ".norm2."), ("attn.in_proj_", "qkv."),
    ("attn.out_proj", "proj"), ("mlp.c_fc", "mlp.0"), ("mlp.c_proj", "mlp.2"))


def load_llamagen(path_or_state_dict, heads, rope, tokens=256):
    """Public LlamaGen weights (class-conditional) as an ARGenerator in eval mode; sizes are read off the shapes.

    heads: 12 for B, 16 for L; rope: "2d" for the published ones; tokens: how many `generate` makes, which the weights
    do not say (256: 16 x 16). Raises BadInput if keys or shapes are not LlamaGen's.
    """
    state, what = read_weights(path_or_state_dict), name_of(path_or_state_dict, "LlamaGen weights")
    state = state.get("model", state)                                                  # as the published files have it
    rows, width = shape_of(state, "cls_embedding.embedding_table.weight", 2, what)
    codebook_size = shape_of(state, "output.weight", 2, what)[0]
    layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    return trainer.made_to_fit(lambda: ARGenerator(GeneratorConfig(
        mode="ar", tokens=tokens, codebook_size=codebook_size, num_classes=rows - 1, width=width, layers=layers,
        heads=heads, rope=rope)), state, what).eval()


def load_titok_maskgit(path_or_state_dict, heads=None):
    """The public generator of TiTok-S-128 (a U-ViT) as a MaskGITGenerator in eval mode; sizes are read off the shapes.

    heads, which the shapes do not say: 16 as published; 4 for a width below 512. Raises BadInput if keys or shapes are
    not a U-ViT's (the generators of TiTok-L-32 and -B-64 are BERTs and do not fit).
    """
    state, what = read_weights(path_or_state_dict), name_of(path_or_state_dict, "TiTok U-ViT weights")
    codebook_size = shape_of(state, "lm_head.weight", 2, what)[0]
    rows, width = shape_of(state, "embeddings.weight", 2, what)
    tokens = shape_of(state, "pos_embed", 3, what)[1] - 1
    layers = 2 * len({name.split(".")[1] for name in state if name.startswith("in_blocks.")})
    return trainer.made_to_fit(lambda: MaskGITGenerator(replace(
        generator.PRESETS["maskgit_full"], tokens=tokens, codebook_size=codebook_size, width=width, layers=layers,
        num_classes=rows - codebook_size - 2, heads=heads or (16 if width >= 512 else 4))), state, what).eval()


def shape_of(state, name, dimensions, what):
    if name not in state or state[name].ndim != dimensions:
        raise BadInput(f"{what}: no entry {name} of {dimensions} dimensions among {len(state)}. Is it another model's "
                       f"file?")
    return state[name].shape


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def take_vqgan(args):
    model = load_maskgit_vqgan(args.file)
    path = args.out / "vqgan.pt"
    if path.exists() and not args.overwrite:
        raise BadInput(f"{path}: exists. Replace it with --overwrite, or choose another --out")
    state = model.state_dict()
    checkpoint = {"stage": "vqgan", "model": state, "ema": {"model": state, "updates": 0}, "step": 0,
                  "config": asdict(model.config)}
    trainer.write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))
    print(f"{path}: written from {args.file}")


def main():
    parser = trainer.ArgumentParser(__doc__, prog="-m extras.pretrained")
    parser.add_argument("what", choices=("vqgan", "titok"), metavar="what", help="vqgan or titok")
    parser.add_argument("file", metavar="FILE", help="the public weights")
    parser.add_argument("images", metavar="IMAGE", nargs="*", default=[], help="titok: what to reconstruct")
    parser.add_argument("--out", help="folder of the results, default out/full")
    parser.add_argument("--overwrite", action="store_true", help="vqgan: replace OUT/vqgan.pt")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where present")
    parser.set_defaults(config="full", data=None)
    args = trainer.parse(parser)
    if (args.what == "titok") != bool(args.images):
        raise BadInput("titok: name the pictures to reconstruct: titok FILE IMAGE..." if args.what == "titok" else
                       f"{args.images[0]}: vqgan takes no pictures")
    if args.what == "vqgan":
        take_vqgan(args)
    else:
        write_reconstructions(load_titok(args.file).to(args.device), args.file, args.images, args)


if __name__ == "__main__":
    trainer.launch(main)
