"""What D2iT shows at toy size: the tables of `make d2it`, d2it.json, two pictures.

    python -m extras.d2it_report --seeds 3      # reads --out and, of seeds 1, 2, --out/d2it_seed1, ..

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
from evaluate import feature_statistics, frechet_distance, images_of, without_border
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
def rate_distortion(bench, dvae, uniform):
    """{rule: codes per image, mse, fd} of the test images in one decoder; and of the uniform one,
    whose codes are coarse, but with as many numbers as the entropy map's."""
    train_images = next(data.all_images(bench.train, 4096))[0]
    rows = {}
    for rule, model in (*((rule, dvae) for rule in RULES), ("uniform", uniform)):
        chooser = with_rule(dvae, rule, train_images) if model is dvae else model
        errors, decoded, share = [], [], []
        for images, _ in bench.images(bench.test):
            z, grain_map = model.encode(images, chooser.grain_map(images))
            decoded.append(model.decode(z, grain_map).clamp(0, 1))
            error = without_border(decoded[-1] - images, bench.test.border)
            errors.append(error.square().mean((1, 2, 3)))
            share.append(grain_map.float().mean((1, 2)))
        share, cells = torch.cat(share).mean().item(), model.config.grid ** 2
        numbers = cells * (1 + 3 * share) * model.config.latent_channels
        rows[rule] = {"fine_share": share, "numbers": numbers,
                      "mse": torch.cat(errors).mean().item(), "fd": fd(bench, torch.cat(decoded))}
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


def all_fine(maps):
    return torch.ones_like(maps)


@torch.no_grad()
def draw(bench, dvae, content, maps):
    """Images [n, 3, H, W] of bench.sample_labels with these maps [n, G, G]."""
    def one(labels, grain_map, seed):
        generator = torch.Generator().manual_seed(seed)
        z = d2it.sample_latents(content, labels, grain_map, generator, guidance_scale=1.0)
        return dvae.decode(z, grain_map).clamp(0, 1)

    batches = zip(bench.sample_labels.split(125), maps.split(125), range(1000))
    return torch.cat(bench.in_threads(one, batches))
