"""What D2iT shows at toy size: the tables of `make d2it`, d2it.json, two pictures.

    python -m extras.d2it_report                # seed 0 is in --out, others in --out/d2it_seed1, ..
    python -m extras.d2it_report classifier     # only the FD-classifier, which needs no stage

FD is the Fréchet distance of extras/report.py's classifier, not FID; it depends on the number of
images, so compare equal numbers only. Letters as in d2it.py; n images.
"""
import copy
import json
import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import d2it
import data
import trainer
from evaluate import feature_statistics, frechet_distance, without_border
from extras.paper import spread
from extras.report import Bench, markdown, picture_of


def fd(bench, images):
    """Images [n, 3, H, W] on the CPU -> Fréchet distance to the test images."""
    batches = ((part, torch.zeros(len(part))) for part in images.split(250))
    return frechet_distance(*feature_statistics(bench.look(batches)[0]), *bench.reference)


def rate_distortion(bench, dvae):
    """{rule: codes per image, mse, fd} of the test images, all in one decoder."""
    train_images, rows = next(data.all_images(bench.train, 4096))[0], {}
    for rule in ("coarse", "fine", "entropy", "variance", "random"):
        chooser, errors, decoded, share = copy.deepcopy(dvae), [], [], []
        chooser.config = replace(dvae.config, grain=rule)
        chooser.set_threshold(train_images)
        for images, _ in bench.images(bench.test):
            z, grain_map = dvae.encode(images, chooser.grain_map(images))
            decoded.append(dvae.decode(z, grain_map).clamp(0, 1))
            error = without_border(decoded[-1] - images, bench.test.border)
            errors.append(error.square().mean((1, 2, 3)))
            share.append(grain_map.float().mean((1, 2)))
        rows[rule] = {"codes": dvae.config.grid ** 2 * (1 + 3 * torch.cat(share).mean().item()),
                      "mse": torch.cat(errors).mean().item(), "fd": fd(bench, torch.cat(decoded))}
    return rows


def noise_errors(bench, dvae, content):
    """{"coarse", "fine"}: [rough, corrected], the squared error of the noise of such codes of the
    test images, at one random t and noise each."""
    generator, errors = torch.Generator().manual_seed(0), {"coarse": [], "fine": []}
    for images, labels in bench.images(bench.test):
        z, grain_map = dvae.encode(images)                      # [B, C, 2G, 2G]
        t = torch.randint(d2it.TIME_STEPS, (len(z),), generator=generator)
        noise = d2it.draw_noise(grain_map, z.shape[1], generator)
        no = torch.zeros(len(z), dtype=torch.bool)
        final, rough = content(d2it.add_noise(z, t, noise), t, labels, grain_map, no)
        both = (torch.stack([rough, final]) - noise).square().mean(2)       # [2, B, 2G, 2G]
        is_fine = d2it.to_fine_grid(grain_map)                  # [B, 2G, 2G]
        errors["coarse"].append(both[:, ~is_fine])
        errors["fine"].append(both[:, is_fine])
    return {grain: torch.cat(parts, 1).mean(1).tolist() for grain, parts in errors.items()}


def grain_bits(grain, maps, labels):
    """Bits per cell of the test maps [n, G, G]: -log2 p of cells one by one in random order."""
    cells, bits = maps.flatten(1).long(), 0.0                   # [n, N]
    order = torch.rand(cells.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    known = torch.full_like(cells, d2it.MASK)
    for now in order.split(1, dim=1):                           # [n, 1]
        log_p = grain(known, labels).log_softmax(-1)            # [n, N, 2]
        log_p = log_p.gather(2, cells[..., None])[..., 0].gather(1, now)
        bits -= log_p.mean().item() / math.log(2)
        known = known.scatter(1, now, cells.gather(1, now))
    return bits / cells.shape[1]


def compute(path, encoded, labels):
    """FLOPs of training on encoded images, forward and backward, padding of fine codes included.
    Those of the frozen DVAE are not counted."""
    saved = trainer.load_checkpoint(path, "d2it_content", "make d2it")
    model = d2it.build(d2it.TransformerConfig(**saved["config"]))
    dvae = SimpleNamespace(encode=lambda images: encoded)
    with FlopCounterMode(display=False) as counter:
        d2it.content_loss(model, model.config, dvae, encoded[0], labels)[0].backward()
    flops = counter.get_total_flops() / len(labels)
    return {"mflop_per_image": flops / 1e6, "steps": saved["step"],
            "tflop": flops * saved["step"] * saved["training"]["batch_size"] / 1e12}


def sampled_fd(bench, dvae, content, maps):
    """FD of new images for bench.sample_labels with these maps [n, G, G], without guidance."""
    def one(labels, grain_map, seed):
        generator = torch.Generator().manual_seed(seed)
        z = d2it.sample_latents(content, labels, grain_map, generator, guidance_scale=1.0)
        return dvae.decode(z, grain_map).clamp(0, 1)

    batches = zip(bench.sample_labels.split(125), maps.split(125), range(1000))
    return fd(bench, torch.cat(bench.in_threads(one, batches)))


def picture(bench, dvae, path):
    """Test images, their entropy, their maps, and what is decoded from their codes."""
    images = bench.examples(10).cpu()
    entropies = dvae.complexity(images)                         # [10, G, G]
    grey = F.interpolate(entropies[:, None] / entropies.max(), images.shape[-1]).expand_as(images)
    z, grain_map = dvae.encode(images)
    rows = [("image", images), ("entropy", grey), ("grain map", d2it.map_pictures(grain_map, 32)),
            ("decoded", dvae.decode(z, grain_map).clamp(0, 1))]
    data.save_picture(picture_of(rows, 2), path)


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
    fine, scores, grain_rows = torch.ones_like(true), defaultdict(list), []
    for grain, content, dit_2, dit_1 in zip(*load.values()):
        drawn = grain.generate(labels, torch.Generator().manual_seed(0))
        for name, model, which in (("random", content, random), ("true", content, true),
                                   ("generated", content, drawn), ("dit_2", dit_2, fine),
                                   ("dit_1", dit_1, fine)):
            scores[name].append(sampled_fd(bench, dvae, model, which))
        grain_rows.append({"bits": grain_bits(grain, maps, bench.labels), "share": {
            bench.test.classes[c]: [maps[place[c]].float().mean().item(),
                                    drawn[labels == c].float().mean().item()] for c in place}})
    some_images, some_labels = next(data.all_images(bench.train, 32))
    encoded = dvae.encode(some_images)      # a DiT does not read the map
    picture(bench, dvae, args.out / "d2it_maps.png")
    return {"seeds": args.seeds, "images": len(bench.indices), "samples": len(labels),
            "rate_distortion": rate_distortion(bench, dvae), "fd": scores, "grain": grain_rows,
            "noise_mse": [noise_errors(bench, dvae, model) for model in load["d2it_content"]],
            "compute": {name: compute(args.out / f"{name}.pt", encoded, some_labels)
                        for name in ("dit_2", "dit_1", "d2it_content")}}


def tables(numbers):
    """The numbers as text: means and 95 % intervals over seeds."""
    scores = numbers["fd"]
    dvae = [["1. DVAE", "codes per image", "MSE", "FD"]] + [
        [rule, f"{row['codes']:.1f}", f"{row['mse']:.5f}", f"{row['fd']:.2f}"]
        for rule, row in numbers["rate_distortion"].items()]
    source = [["2. map in sampling", "FD", "minus true"]] + [
        [name, spread(scores[name]), difference(scores[name], scores["true"])]
        for name in ("random", "true", "generated")]
    noise = [["3. noise MSE", "coarse codes", "fine codes"]] + [
        [name, *(spread([row[grain][i] for row in numbers["noise_mse"]], ".4f")
                 for grain in ("coarse", "fine"))] for i, name in enumerate(("rough", "corrected"))]
    compute = [["4. equal compute", "steps", "MFLOP an image", "TFLOP in all", "FD", "minus D2iT"]]
    for name, row in numbers["compute"].items():
        fds = scores.get(name, scores["generated"])
        compute.append([name, f"{row['steps']}", f"{row['mflop_per_image']:.0f}",
                        f"{row['tflop']:.2f}", spread(fds), difference(fds, scores["generated"])])
    grain = [["5. fine share", "true", "generated"]]
    for name, (true, _) in numbers["grain"][0]["share"].items():
        drawn = [row["share"][name][1] for row in numbers["grain"]]
        grain.append([name, f"{true:.2f}", f"{sum(drawn) / len(drawn):.2f}"])
    bits = spread([row["bits"] for row in numbers["grain"]], ".3f")
    tables = "\n\n".join(map(markdown, (dvae, source, noise, compute, grain)))
    return f"{tables}\n\nGrain model: {bits} bits per cell"


def difference(a, b):
    return spread([x - y for x, y in zip(a, b)], "+.2f")


def main():
    parser = trainer.command_line(__doc__)
    add = parser.add_argument
    add("what", nargs="?", choices=("report", "classifier"), default="report")
    add("--seeds", type=int, default=3, help="how many were trained")
    add("--images", type=int, default=3_000, help="test images to score")
    add("--samples", type=int, default=300, help="new images to score")
    args = trainer.parse(parser)
    torch.set_num_threads(1)            # Bench has threads of its own
    bench = Bench(args, d2it.PRESETS["dvae_toy"].image_size)
    if args.what == "classifier":
        return bench.classifier
    numbers = measure(args, bench)
    trainer.write_atomically(args.out / "d2it.json",
                             lambda file: file.write_text(json.dumps(numbers, indent=1) + "\n"))
    print(tables(numbers), f"\n\n{args.out}/d2it.json, d2it_maps.png")
    args.sample, args.classes, args.output = 40, None, None
    d2it.sample(args)


if __name__ == "__main__":
    trainer.launch(main)
