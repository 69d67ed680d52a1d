"""What D2iT shows at toy size: the tables of `make d2it`, d2it.json, two pictures.

    python -m extras.d2it_report                # seed 0 is in --out, others in --out/d2it_seed1, ..
    python -m extras.d2it_report classifier     # only the FD-classifier, which needs no stage

FD is the Fréchet distance of extras/report.py's classifier, not FID; it depends on the number of
images, so compare equal numbers only.

Letters: B batch, H W pixels, n images, N regions of an image, G side of the grain map, C channels
of a code.
"""
import json
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import d2it
import data
import trainer
from evaluate import feature_statistics, frechet_distance, without_border
from extras.paper import half_width, spread
from extras.report import Bench, markdown, picture_of

RULES = ("coarse", "fine", "entropy", "variance", "random")


def verdict(worse, better):
    """Of two lists of scores by seed, lower is better: does the 95 % interval of the difference
    leave out 0?"""
    gaps = [a - b for a, b in zip(worse, better)]
    half = half_width(gaps)
    decided = half is not None and abs(sum(gaps) / len(gaps)) > half
    return f"{spread(gaps, '+.2f')}{'' if decided else ', not decided'}"


def fd(bench, images):
    """Images [n, 3, H, W] on the CPU -> Fréchet distance to the test images."""
    batches = ((part, torch.zeros(len(part))) for part in images.split(250))
    return frechet_distance(*feature_statistics(bench.look(batches)[0]), *bench.reference)


def with_rule(dvae, rule, images):
    """A DVAE that only chooses maps, by another rule, its threshold from these images."""
    other = d2it.DVAE(replace(dvae.config, grain=rule)).to(images.device)
    other.set_threshold(images)
    return other


@torch.no_grad()
def rate_distortion(bench, dvae):
    """{rule: fine_share, codes per image, mse, fd} of the test images, all in one decoder.
    "uniform": the error of as many codes as the entropy map's, if they were spread evenly: on the
    straight line, in logarithms of codes and error, from all coarse to all fine."""
    train_images, rows = next(data.all_images(bench.train, 4096))[0], {}
    for rule in RULES:
        chooser, errors, decoded, share = with_rule(dvae, rule, train_images), [], [], []
        for images, _ in bench.images(bench.test):
            z, grain_map = dvae.encode(images, chooser.grain_map(images))
            decoded.append(dvae.decode(z, grain_map).clamp(0, 1))
            error = without_border(decoded[-1] - images, bench.test.border)
            errors.append(error.square().mean((1, 2, 3)))
            share.append(grain_map.float().mean((1, 2)))
        share = torch.cat(share).mean().item()
        rows[rule] = {"fine_share": share, "codes": dvae.config.grid ** 2 * (1 + 3 * share),
                      "mse": torch.cat(errors).mean().item(), "fd": fd(bench, torch.cat(decoded))}
    codes = [rows[rule]["codes"] for rule in ("coarse", "fine", "entropy")]
    logs = [math.log(rows[rule]["mse"]) for rule in ("coarse", "fine")]
    part = math.log(codes[2] / codes[0]) / math.log(codes[1] / codes[0])
    rows["uniform"] = {"codes": codes[2], "mse": math.exp(logs[0] + part * (logs[1] - logs[0]))}
    return rows


@torch.no_grad()
def noise_errors(bench, dvae, content, seed=0):
    """{"coarse", "fine", "all"}: mean squared error of the noise by codes, (rough, corrected), of
    the test images at one random t and noise each."""
    generator, sums = torch.Generator().manual_seed(seed), torch.zeros(2, 2)
    count = torch.zeros(2)
    for images, labels in bench.images(bench.test):
        z, grain_map = dvae.encode(images)                      # [B, C, 2G, 2G]
        t = torch.randint(d2it.TIME_STEPS, (len(z),), generator=generator)
        noise = d2it.draw_noise(grain_map, z.shape[1], generator)
        no = torch.zeros(len(z), dtype=torch.bool)
        predictions = content(d2it.add_noise(z, t, noise), t, labels, grain_map, no)
        where = d2it.to_fine_grid(grain_map)                    # [B, 2G, 2G]
        for j, (mine, weight) in enumerate(((~where, 0.25), (where, 1.0))):
            count[j] += mine.sum() * weight
            for i, prediction in enumerate(predictions[::-1]):  # rough, corrected
                error = (prediction[:, :z.shape[1]] - noise).square().mean(1)
                sums[i, j] += error[mine].sum() * weight
    rough, corrected = torch.cat([sums / count, sums.sum(1, True) / count.sum()], 1).tolist()
    return {grain: pair for grain, *pair in zip(("coarse", "fine", "all"), rough, corrected)}


@torch.no_grad()
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


def independent_bits(train_maps, train_labels, maps, labels):
    """The same of the best model that draws cells independently, given the class."""
    classes = int(train_labels.max()) + 1
    p = torch.stack([train_maps[train_labels == i].float().mean(0) for i in range(classes)])
    p = p.clamp(1e-3, 1 - 1e-3)[labels]                         # [n, G, G]
    return -torch.where(maps, p.log2(), (1 - p).log2()).mean().item()


def step_flops(model, dvae, images, labels):
    """Of training, per image: forward and backward, padding of fine codes included."""
    with FlopCounterMode(display=False) as counter:
        d2it.content_loss(model, model.config, dvae, images, labels)[0].backward()
    with FlopCounterMode(display=False) as encoding:            # the frozen DVAE is not counted
        dvae.encode(images)
    return (counter.get_total_flops() - encoding.get_total_flops()) / len(images)


@torch.no_grad()
def draw(bench, dvae, content, maps):
    """Images [n, 3, H, W] of bench.sample_labels with these maps [n, G, G]."""
    def one(labels, grain_map, seed):
        generator = torch.Generator().manual_seed(seed)
        z = d2it.sample_latents(content, labels, grain_map, generator, guidance_scale=1.0)
        return dvae.decode(z, grain_map).clamp(0, 1)

    batches = zip(bench.sample_labels.split(125), maps.split(125), range(1000))
    return torch.cat(bench.in_threads(one, batches))


# ---- The report

def seed_folders(out, seeds):
    return [out / f"d2it_seed{seed}" if seed else out for seed in range(seeds)]


def pictures(bench, dvae, grain, content, out):
    """d2it_maps.png: images, their entropy, their maps. d2it_samples.png: samples, their maps."""
    images = bench.examples(10).cpu()
    entropies = dvae.complexity(images)                         # [10, G, G]
    grey = F.interpolate(entropies[:, None] / entropies.max(), images.shape[-1]).expand_as(images)
    grain_map = dvae.grain_map(images)
    decoded = dvae.decode(*dvae.encode(images)).clamp(0, 1)
    rows = [("image", images), ("entropy", grey), ("grain map", d2it.map_pictures(grain_map, 32)),
            ("decoded", decoded)]
    data.save_picture(picture_of(rows, 2), out / "d2it_maps.png")
    names = bench.test.classes
    labels = torch.arange(min(10, len(names))).repeat(4)
    drawn, maps = d2it.generate(labels, dvae, grain, content, torch.Generator().manual_seed(0))
    size, rows = drawn.shape[-1], []
    for part, its_maps in zip(drawn.chunk(4), maps.chunk(4)):
        rows += [("sample", part), ("its map", d2it.map_pictures(its_maps, size))]
    data.save_picture(picture_of(rows, 2), out / "d2it_samples.png")


def measure(args, bench, seeds):
    """All numbers, as they stand in d2it.json."""
    folders = seed_folders(args.out, seeds)
    load = {name: [d2it.load_stage(folder / f"{name}.pt", stage) for folder in folders]
            for name, stage in (("d2it_grain", "grain"), ("d2it_content", "content"),
                                ("dit_2", "content"), ("dit_1", "content"))}
    dvae = d2it.load_stage(args.out / "d2it_dvae.pt", "dvae")
    numbers = {"seeds": seeds, "images": len(bench.indices), "samples": len(bench.sample_labels)}
    numbers["rate_distortion"] = rate_distortion(bench, dvae)
    numbers["noise_mse"] = [noise_errors(bench, dvae, model) for model in load["d2it_content"]]

    maps = torch.cat([dvae.grain_map(images) for images, _ in bench.images(bench.test)])
    train = [(dvae.grain_map(images), labels) for images, labels in
             data.all_images(bench.train, 250, range(20_000))]
    train_maps, train_labels = map(torch.cat, zip(*train))
    labels = bench.sample_labels
    # a true map for each sample, of a test image of its class
    place = {c: torch.where(bench.labels == c)[0] for c in labels.unique().tolist()}
    picks = [place[c][i % len(place[c])] for i, c in enumerate(labels.tolist())]
    true, share = maps[torch.stack(picks)], maps.float().mean()
    random = torch.rand(true.shape, generator=torch.Generator().manual_seed(0)) < share
    scores = {"random": [], "true": [], "generated": [], "dit_2": [], "dit_1": []}
    grain_rows = []
    for grain, content, dit_2, dit_1 in zip(*load.values()):
        generated = grain.generate(labels, torch.Generator().manual_seed(0))
        for name, which in (("random", random), ("true", true), ("generated", generated)):
            scores[name].append(fd(bench, draw(bench, dvae, content, which)))
        for name, model in (("dit_2", dit_2), ("dit_1", dit_1)):
            scores[name].append(fd(bench, draw(bench, dvae, model, torch.ones_like(true))))
        grain_rows.append({"bits": grain_bits(grain, maps, bench.labels), "share": {
            bench.test.classes[c]: [maps[bench.labels == c].float().mean().item(),
                                    generated[labels == c].float().mean().item()]
            for c in place}})
    numbers["fd"], numbers["grain"] = scores, grain_rows
    numbers["independent_bits"] = independent_bits(train_maps, train_labels, maps, bench.labels)
    images, some_labels = next(data.all_images(bench.train, 32))
    numbers["compute"] = {}
    for name in ("d2it_content", "dit_2", "dit_1"):
        saved = trainer.load_checkpoint(args.out / f"{name}.pt", "d2it_content", "make d2it")
        model, batch = d2it.build(load[name][0].config), saved["training"]["batch_size"]
        flops = step_flops(model, dvae if name == "d2it_content" else
                           with_rule(dvae, "fine", images), images, some_labels)
        numbers["compute"][name] = {"mflop_per_image": flops / 1e6, "steps": saved["step"],
                                    "tflop": flops * saved["step"] * batch / 1e12}
    pictures(bench, dvae, load["d2it_grain"][0], load["d2it_content"][0], args.out)
    return numbers


def tables(numbers):
    """The numbers as text."""
    rows = [["", "codes", "MSE", "FD"]]
    for rule, row in numbers["rate_distortion"].items():
        rows.append([rule, f"{row['codes']:.1f}", f"{row['mse']:.5f}",
                     f"{row['fd']:.2f}" if "fd" in row else ""])
    text = ["1. DVAE: codes per image and error, one decoder", markdown(rows)]
    scores, compute = numbers["fd"], numbers["compute"]
    rows = [["map", "FD by seed", "mean"]]
    for name in ("random", "true", "generated"):
        rows.append([name, " ".join(f"{x:.1f}" for x in scores[name]), spread(scores[name])])
    text += ["2. Where the map comes from when sampling", markdown(rows),
             f"random minus true: {verdict(scores['random'], scores['true'])}; generated minus "
             f"true: {verdict(scores['generated'], scores['true'])}"]
    rows = [["noise MSE by code", "coarse", "fine", "all"]]
    for i, name in enumerate(("rough", "corrected")):
        rows.append([name] + [spread([row[grain][i] for row in numbers["noise_mse"]], ".4f")
                              for grain in ("coarse", "fine", "all")])
    text += ["3. Rough prediction and correction", markdown(rows)]
    rows = [["", "steps", "MFLOP an image", "TFLOP in all", "FD"]]
    for name, key in (("dit_2", "dit_2"), ("dit_1", "dit_1"), ("d2it_content", "generated")):
        row = compute[name]
        rows.append([name, f"{row['steps']}", f"{row['mflop_per_image']:.0f}",
                     f"{row['tflop']:.2f}", spread(scores[key])])
    text += ["4. Equal compute", markdown(rows), *(
        f"{name} minus D2iT: {verdict(scores[name], scores['generated'])}"
        for name in ("dit_2", "dit_1"))]
    bits = [row["bits"] for row in numbers["grain"]]
    rows = [["fine share", "true", "generated"]]
    for name, (true, _) in numbers["grain"][0]["share"].items():
        drawn = [row["share"][name][1] for row in numbers["grain"]]
        rows.append([name, f"{true:.2f}", f"{sum(drawn) / len(drawn):.2f}"])
    text += [f"5. Grain model: {spread(bits, '.3f')} bits a cell; cells independent given the "
             f"class: {numbers['independent_bits']:.3f}", markdown(rows)]
    return "\n\n".join(text)


def main():
    parser = trainer.command_line(__doc__)
    add = parser.add_argument
    add("what", nargs="?", choices=("report", "classifier"), default="report")
    add("--seeds", type=int, default=3, help="how many were trained")
    add("--images", type=int, default=3_000, help="test images to score")
    add("--samples", type=int, default=300, help="new images to score")
    args = trainer.parse(parser)
    torch.set_num_threads(1)            # Bench has threads of its own
    bench = Bench(args, d2it.PRESETS["dvae"]["toy"].image_size)
    if args.what == "classifier":
        return bench.classifier
    numbers = measure(args, bench, args.seeds)
    trainer.write_atomically(args.out / "d2it.json",
                             lambda file: file.write_text(json.dumps(numbers, indent=1) + "\n"))
    print(tables(numbers))
    print(f"\n{args.out}/d2it.json; pictures: d2it_maps.png, d2it_samples.png")


if __name__ == "__main__":
    trainer.launch(main)
