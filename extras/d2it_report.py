"""What D2iT shows at toy size: the tables of `make d2it`, d2it.json, two pictures.

    python -m extras.d2it_report    # seed 0 is in --out, others in --out/d2it_seed1, ..

FD is the Fréchet distance of extras/report.py's classifier, not FID; it depends on the number of
images, so compare equal numbers only. Letters as in d2it.py; n images.
"""
import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import d2it
import data
import trainer
from extras.report import Bench, markdown, picture_of, spread, without_border


def fd(bench, images):
    """Images [n, 3, H, W] on the CPU -> Fréchet distance to the test images."""
    return bench.score((part, torch.zeros(len(part))) for part in images.split(250))["fd"]


def rate_distortion(bench, dvae):
    """{rule: codes per image, mse, fd} of the test images, all in one decoder. "evenly": the error
    of as many codes as the entropy map's, spread evenly: on the straight line, in logarithms of
    codes and error, from all coarse to all fine."""
    torch.manual_seed(0)        # of the random maps
    train_images, rows = torch.cat([x for x, _ in bench.images(bench.train, 4096)]), {}
    for rule in ("coarse", "fine", "entropy", "variance", "random"):
        chooser, errors, decoded, share = copy.deepcopy(dvae), [], [], []
        chooser.config = replace(dvae.config, grain=rule)
        chooser.set_threshold(train_images)
        for images, _ in bench.images(bench.test):
            z, grain_map = chooser.encode(images)
            decoded.append(chooser.decode(z, grain_map).clamp(0, 1))
            error = without_border(decoded[-1] - images, bench.test.border)
            errors.append(error.square().mean((1, 2, 3)))
            share.append(grain_map.float().mean((1, 2)))
        rows[rule] = {"codes": dvae.config.grid ** 2 * (1 + 3 * torch.cat(share).mean().item()),
                      "mse": torch.cat(errors).mean().item(), "fd": fd(bench, torch.cat(decoded))}
    coarse, fine, codes = rows["coarse"], rows["fine"], rows["entropy"]["codes"]
    way = math.log(codes / coarse["codes"], fine["codes"] / coarse["codes"])    # 0 .. 1
    rows["evenly"] = {"codes": codes, "mse": coarse["mse"] * (fine["mse"] / coarse["mse"]) ** way}
    return rows


def noise_errors(bench, dvae, content):
    """{"coarse", "fine"}: [rough, corrected], squared errors of the noise by codes of test images,
    each at one random t."""
    generator, errors = torch.Generator().manual_seed(0), {"coarse": [], "fine": []}
    for images, labels in bench.images(bench.test):
        z, grain_map = dvae.encode(images)  # [B, C, 2G, 2G]
        t = torch.randint(d2it.TIME_STEPS, (len(z),), generator=generator)
        noise = d2it.draw_noise(grain_map, z.shape[1], generator)
        keep_class = torch.zeros(len(z), dtype=torch.bool)
        final, rough = content(d2it.add_noise(z, t, noise), t, labels, grain_map, keep_class)
        both = (torch.stack([rough, final]) - noise).square().mean(2)  # [2, B, 2G, 2G]
        is_fine = d2it.to_fine_grid(grain_map)
        errors["coarse"].append(both[:, ~is_fine])
        errors["fine"].append(both[:, is_fine])
    return {grain: torch.cat(parts, 1).mean(1).tolist() for grain, parts in errors.items()}


def grain_bits(grain, maps, labels):
    """Bits per cell of the test maps [n, G, G]: the model's loss, mean of 16 random orders."""
    dvae = SimpleNamespace(grain_map=lambda images: maps)
    torch.manual_seed(0)
    draws = [d2it.grain_loss(grain, None, dvae, None, labels)[1]["bits"] for _ in range(16)]
    return sum(draws).item() / 16


def compute(path, encoded, labels):
    """FLOPs of training on encoded images, forward and backward, padding of fine codes included."""
    saved = trainer.load_checkpoint(path, "d2it_content", "make d2it")
    model = d2it.build(d2it.TransformerConfig(**saved["config"]))
    dvae = SimpleNamespace(encode=lambda images: encoded)
    with FlopCounterMode(display=False) as counter:
        d2it.content_loss(model, model.config, dvae, encoded[0], labels)[0].backward()
    flops = counter.get_total_flops() / len(labels)
    return {"mflop_per_image": flops / 1e6, "steps": saved["step"]}


def sampled_fd(bench, dvae, content, maps):
    """FD of new images for bench.sample_labels with these maps [n, G, G], without guidance."""
    def one(labels, grain_map, seed):
        generator = torch.Generator().manual_seed(seed)
        z = d2it.sample_latents(content, labels, grain_map, generator, guidance_scale=1.0)
        return dvae.decode(z, grain_map).clamp(0, 1)

    batches = zip(bench.sample_labels.split(125), maps.split(125), range(1000))
    return fd(bench, torch.cat(bench.in_threads(one, batches)))


def picture(bench, dvae):
    """Test images, their entropy, their maps, and what is decoded from their codes."""
    images = bench.examples().cpu()
    entropies = dvae.complexity(images)  # [10, G, G]
    grey = F.interpolate(entropies[:, None] / entropies.max(), images.shape[-1]).expand_as(images)
    z, grain_map = dvae.encode(images)
    rows = [("image", images), ("entropy", grey), ("grain map", d2it.map_pictures(grain_map, 32)),
            ("decoded", dvae.decode(z, grain_map).clamp(0, 1))]
    data.save_picture(picture_of(rows, 2), bench.out / "d2it_maps.png")


def measure(args, bench):
    """All numbers, as they stand in d2it.json."""
    folders = [args.out, *(args.out / f"d2it_seed{seed}" for seed in range(1, args.seeds))]
    load = {name: [d2it.load_stage(folder / f"{name}.pt", stage) for folder in folders]
            for name, stage in (("d2it_grain", "grain"), ("d2it_content", "content"),
                                ("dit_2", "content"), ("dit_1", "content"))}
    dvae = d2it.load_stage(args.out / "d2it_dvae.pt", "dvae")
    maps = torch.cat([dvae.grain_map(images) for images, _ in bench.images(bench.test)])
    labels, share = bench.sample_labels, maps.float().mean()
    # a true map for each sample, of a test image of its class
    place = {c: torch.where(bench.labels == c)[0] for c in labels.unique().tolist()}
    true = maps[torch.stack([place[c][i % len(place[c])] for i, c in enumerate(labels.tolist())])]
    random = torch.rand(true.shape, generator=torch.Generator().manual_seed(0)) < share
    drawn = torch.stack([grain.generate(labels, torch.Generator().manual_seed(0))
                         for grain in load["d2it_grain"]])  # [seeds, n, G, G]
    fine, scores = torch.ones_like(true), {}
    for name, kind, which in (("random", "d2it_content", random), ("true", "d2it_content", true),
                              ("generated", "d2it_content", drawn), ("dit_2", "dit_2", fine),
                              ("dit_1", "dit_1", fine)):
        scores[name] = [sampled_fd(bench, dvae, model, its_maps)
                        for model, its_maps in zip(load[kind], which.expand_as(drawn))]
    some_images, some_labels = next(data.all_images(bench.train, 32))
    encoded = dvae.encode(some_images)      # a DiT does not read the map
    picture(bench, dvae)
    return {"seeds": args.seeds, "images": len(bench.indices), "samples": len(labels),
            "rate_distortion": rate_distortion(bench, dvae), "fd": scores,
            "grain_bits": [grain_bits(grain, maps, bench.labels) for grain in load["d2it_grain"]],
            "fine_share": {bench.test.classes[c]: [maps[place[c]].float().mean().item(),
                                                   drawn[:, labels == c].float().mean().item()]
                           for c in place},        # true, generated
            "noise_mse": [noise_errors(bench, dvae, model) for model in load["d2it_content"]],
            "compute": {name: compute(args.out / f"{name}.pt", encoded, some_labels)
                        for name in ("dit_2", "dit_1", "d2it_content")}}


def tables(numbers):
    """The numbers as text: means and 95 % intervals over seeds."""
    def minus(name, other):
        return spread([a - b for a, b in zip(scores[name], scores[other])], "+.2f")

    scores = numbers["fd"]
    dvae = [["1. DVAE", "codes per image", "MSE", "FD"]] + [
        [rule, f"{row['codes']:.1f}", f"{row['mse']:.5f}",
         f"{row['fd']:.2f}" if "fd" in row else ""]
        for rule, row in numbers["rate_distortion"].items()]
    source = [["2. map in sampling", "FD", "minus true"]] + [
        [name, spread(scores[name]), minus(name, "true")]
        for name in ("random", "true", "generated")]
    noise = [["3. noise MSE", "coarse codes", "fine codes"]] + [
        [name, *(spread([row[grain][i] for row in numbers["noise_mse"]], ".4f")
                 for grain in ("coarse", "fine"))] for i, name in enumerate(("rough", "corrected"))]
    compute = [["4. equal compute", "steps", "MFLOP per image", "FD", "minus D2iT"]]
    for (model, row), name in zip(numbers["compute"].items(), ("dit_2", "dit_1", "generated")):
        compute.append([model, f"{row['steps']}", f"{row['mflop_per_image']:.0f}",
                        spread(scores[name]), minus(name, "generated")])
    grain = [["5. fine share", "true", "generated"]] + [
        [name, *(f"{share:.2f}" for share in pair)] for name, pair in numbers["fine_share"].items()]
    tables = "\n\n".join(map(markdown, (dvae, source, noise, compute, grain)))
    return f"{tables}\n\nGrain model: {spread(numbers['grain_bits'], '.3f')} bits per cell"


def main():
    parser = trainer.command_line(__doc__, prog="-m extras.d2it_report")
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="how many were trained")
    add("--images", type=int, default=3_000, help="test images to score")
    add("--samples", type=int, default=300, help="new images to score")
    args = trainer.parse(parser)
    numbers = measure(args, Bench(args, d2it.PRESETS["dvae_toy"].image_size))
    trainer.write_text(args.out / "d2it.json", json.dumps(numbers, indent=1) + "\n")
    print(tables(numbers), f"\n\n{args.out}/d2it.json, d2it_maps.png")
    args.sample, args.classes, args.output = 40, None, None     # what d2it.sample reads
    d2it.sample(args)


if __name__ == "__main__":
    trainer.launch(main)
