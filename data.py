"""Images: Fashion-MNIST, shapes drawn on the fly, or any folder, and the order they are read in.

    python data.py --data photos/       what is read

The order is a pure function of (seed, step): neither workers nor ranks, accumulation or a resumed
run change which images a step sees.

Letters: B batch, H W pixels, n images of a set. A data set's images are uint8 [3, H, W], those of
all_images float32 [B, 3, H, W] in [0, 1].
"""
import colorsys
import gzip
import hashlib
import itertools
import os
import signal
import zlib
from collections import Counter
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from trainer import BadInput, first_line, launch, make_parser, write_atomically, write_text

say = cache(partial(print, flush=True))     # prints a line, the same one once per process


def hash_of(*parts):
    """16 hex digits of anything with a repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Images:
    """What every data set has, beside name, split, image_size and classes (their names)."""
    labels: np.ndarray          # int64 [n]
    fingerprint: str            # a hash; of a folder: of each file's path, size and time of change
    content: str                # a hash; of a folder: of names and sizes, so the same for a copy
    border = 0                  # pixels of padding on each side: scores leave them out
    note = ""                   # for the log: "" or ", ..."
    in_memory = False           # too fast for worker processes to help

    def __len__(self):
        return len(self.labels)

    def get(self, index, rng=None):
        """uint8 [3, H, W]: one fixed view, or with rng and augment a random one."""

    def __getitem__(self, row):
        """(epochs [b], indices [b], seed) -> (uint8 [b, 3, H, W], labels [b]). A view is a function
        of (seed, epoch, index) alone; seed None: fixed views."""
        epochs, indices, seed = row
        rngs = [None] * len(indices)
        if seed is not None and not self.in_memory:
            rngs = [np.random.default_rng([seed % 2 ** 32, *pair]) for pair in zip(epochs, indices)]
        return np.stack([*map(self.get, indices, rngs)]), self.labels[indices]


# ---- Fashion-MNIST: 60,000 + 10,000 grey 28x28 photographs of clothes (Xiao et al., 2017)

FASHION_PLACES = [Path(__file__).resolve().parent / "data" / "fashion-mnist",
                  Path("/usr/share/datasets/fashion-mnist")]        # Debian's package


class Fashion(Images):
    """Resized, but at image_size 32 with a border of 2 black pixels. No augmentation: its shoes
    all point to the left."""
    name, in_memory = "fashion", True
    classes = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
               "bag", "ankle boot"]

    def __init__(self, folder, split, image_size):
        self.split, self.image_size = split, image_size
        part = {"train": "train", "val": "t10k"}[split]
        images, labels = (gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes())
                          for kind in ("images-idx3", "labels-idx1"))
        self.pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28).copy()
        self.labels = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
        sums = zlib.crc32(self.pixels), zlib.crc32(self.labels)
        self.fingerprint = self.content = hash_of("fashion", split, image_size, sums)
        if image_size == 32:
            self.border = 2
            self.pixels = np.pad(self.pixels, ((0, 0), (2, 2), (2, 2)))  # [n, 32, 32]

    def get(self, index, rng=None):
        image = self.pixels[index]  # [28, 28]
        if len(image) != self.image_size:
            image = F.interpolate(torch.from_numpy(image)[None, None].float(), self.image_size,
                                  mode="bicubic", antialias=True)
            image = image[0, 0].round().clamp(0, 255).byte().numpy()  # [H, W]
        return np.stack([image] * 3)    # [3, H, W]


# ---- Shapes, drawn from the distance to their edge, so that it is smooth at any size

SHAPES = {      # distance in radii, negative inside; u points right, v down
    "circle": lambda u, v: np.hypot(u, v) - 0.85,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) - 0.7,
    "triangle": lambda u, v: np.maximum(0.87 * abs(u) - v / 2, v) - 0.5,
    "star": lambda u, v: np.hypot(u, v) - 0.65 - 0.22 * np.cos(5 * np.arctan2(u, -v)),
    "heart": lambda u, v: np.hypot(u, v + 0.7 * np.sqrt(abs(u)) - 0.25) - 0.8,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.7) - 0.2,
    "frame": lambda u, v: abs(np.maximum(abs(u), abs(v)) - 0.56) - 0.14,
    "cross": lambda u, v: np.maximum(np.minimum(abs(u), abs(v)) - 0.28,
                                     np.maximum(abs(u), abs(v)) - 0.9),
    "stripes": lambda u, v: np.maximum(abs(v % 0.7 - 0.35) - 0.17, np.hypot(u, v) - 0.9),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.9, 0.75 - np.hypot(u - 0.5, v)),
}


class Shapes(Images):
    """Ten classes; image `index` is a pure function of (split, index)."""
    name, note, classes = "shapes", ", drawn, not photographed", list(SHAPES)

    def __init__(self, split, image_size):
        self.split, self.image_size = split, image_size
        self.labels = np.arange({"train": 10_000, "val": 2_000}[split]) % len(SHAPES)
        self.in_memory = image_size <= 64
        self.fingerprint = self.content = hash_of("drawn", split, image_size)

    def get(self, index, rng=None):
        rng = np.random.default_rng([self.split == "val", index])
        radius, angle, hue = rng.uniform((0.45, -0.6, 0), (0.75, 0.6, 1))
        centre = rng.uniform(radius - 1, 1 - radius, 2)
        axis = (np.arange(self.image_size) + 0.5) * (2 / self.image_size) - 1   # in -1 .. 1
        x, y = axis - centre[0], axis[:, None] - centre[1]      # [W], [H, 1]
        u = (x * np.cos(angle) + y * np.sin(angle)) / radius    # [H, W]
        v = (y * np.cos(angle) - x * np.sin(angle)) / radius    # [H, W]
        distance = SHAPES[self.classes[self.labels[index]]](u, v)
        inside = np.clip(0.5 - distance * radius * self.image_size / 2, 0, 1)   # share of the pixel
        values = rng.permutation([rng.uniform(0.2, 0.5), rng.uniform(0.8, 1)])  # dark and light
        ground = colorsys.hsv_to_rgb(hue, 0.4, values[0])
        shape = colorsys.hsv_to_rgb((hue + rng.uniform(0.3, 0.7)) % 1, 0.75, values[1])
        image = np.multiply.outer(ground, 1 - inside) + np.multiply.outer(shape, inside)
        return (image * 255).round().astype(np.uint8)   # [3, H, W]


# ---- Any folder of images

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "BMP", "GIF", "TIFF")     # EPS would run programs
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}
HELD_OUT = 0.05         # share that becomes `val` where the folder has none


class Folder(Images):
    """`train/<class>/*` and `val/<class>/*`, or other names in SPLITS, in any case; or `<class>/*`
    or bare images (one class), split by a hash of each file's name. In training (draft or random
    views) the next of its class replaces a broken file."""

    def __init__(self, folder, split, image_size, augment=False, draft=False):
        self.name, self.split, self.image_size = str(folder), split, image_size
        self.augment, self.draft = augment, draft
        top = [path for path in folder.iterdir() if path.name[0] != "."]
        inside = {path.name.lower(): path for path in top if path.is_dir()}
        roots = {part: inside[name] for part, names in SPLITS.items()
                 for name in names[::-1] if name in inside}     # of several the first name
        if len(roots) == 1:
            if inside.keys() <= set(sum(SPLITS.values(), ())):
                raise BadInput(f"{folder}: needs both train/ and val/, or folders of classes")
            roots = {}      # a class of that name
        self.root = roots.get(split, folder)
        files, left_out = list_images(self.root)
        train_files = list_images(roots["train"])[0] if roots else files
        self.classes = sorted({name for name, *_ in train_files})
        if not roots:
            share = [zlib.crc32(os.fsencode(file)) / 2 ** 32 for _, file, *_ in files]
            limit = max([HELD_OUT, *sorted(share)[:2]])     # at least two files
            files = [file for file, s in zip(files, share) if (s <= limit) == (split == "val")]
            self.note = f", {HELD_OUT:.0%} of the folder, at least 2, held out as val"
        elif len(top) > 2:
            self.note = f", all but train and val of {folder} left out"
        self.note += left_out
        if len(files) < (2 if split == "val" else 1):       # a score's covariance needs two
            raise BadInput(f"{self.root}: {len(files)} images for {split}: too few{left_out}")
        if unknown := {name for name, *_ in files} - set(self.classes):
            raise BadInput(f"{self.root}: class {min(unknown)} is not in {roots['train']}")
        self.files = [file for _, file, *_ in files]    # relative to root, by class and name
        self.labels = np.searchsorted(self.classes, [name for name, *_ in files])       # int64 [n]
        self.content = hash_of("folder", split, image_size, [file[:3] for file in files])
        self.fingerprint = hash_of(str(self.root.resolve()), split, image_size, draft, files)

    def get(self, index, rng=None):
        first, end = np.searchsorted(self.labels, self.labels[index] + [0, 1])  # its class
        for i in itertools.chain(range(index, end), range(first, index)):
            file = self.root / self.files[i]
            try:
                image = decode_image(file, self.image_size, self.draft)
                return square(image, self.image_size, rng if self.augment else None)
            except Exception as error:      # Pillow raises a dozen kinds
                if not (self.draft or rng):
                    raise BadInput(f"{file}: cannot be read, so not scored ({first_line(error)}). "
                                   f"Remove or replace it") from error
                say(f"{file}: cannot be read, left out ({first_line(error)})")
        raise BadInput(f"{file}: cannot be read, nor any other of its class")


def list_images(folder, by_class=True):
    """([(class, relative name, size, time of change in ns)], sorted; what is left out, in words).
    by_class: images beside the folders of classes are left out; without such folders the class of
    all is `images`. Hidden files and folders are never listed."""
    found, left_out, visited = [], Counter(), set()
    ends = tuple(end for end, kind in Image.registered_extensions().items() if kind in FORMATS)
    for root, inner, names in os.walk(folder, followlinks=True):
        inside = Path(root).relative_to(folder).as_posix()          # "." at the top
        if (real := os.path.realpath(root)) in visited:     # or a link in a circle would not end
            left_out["folders by a second link"] += 1
            inner[:] = names = []
        visited.add(real)
        inner[:] = sorted(name for name in inner if name[0] != ".")     # thumbnails
        if inside == ".":
            empty = set(inner)
        for name in names:
            if name.lower().endswith(ends) and name[0] != ".":
                stat = os.stat(os.path.join(root, name))
                file = f"{inside}/{name}".removeprefix("./")
                found.append((inside.split("/")[0], file, stat.st_size, stat.st_mtime_ns))
            elif name[0] != ".":
                left_out[Path(name).suffix.lower() or "without extension"] += 1
    files = [file for file in found if file[0] != "." or not by_class]
    if empty := sorted(empty - {name for name, *_ in found}):
        left_out[f"folders without images ({', '.join(empty)[:100]})"] = len(empty)
    if files and len(files) < len(found):
        left_out["images beside the folders of classes"] = len(found) - len(files)
    words = ", ".join(f"{count:,} {what}" for what, count in left_out.items())
    return (sorted(files or [("images", *file[1:]) for file in found]),
            f", left out: {words[:300]}" if words else "")


def decode_image(path, image_size, draft=False):
    """The first frame as an RGB PIL image, turned as EXIF says, transparent on white. draft: a
    large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, at least twice image_size (used only for
    this): faster, but not quite the same pixels, so not for scores."""
    Image.init()
    with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        stored = image.tile[0][3] if image.format in ("PNG", "TIFF") else ""
        if image.format == "TIFF" and (image.mode in ("F", "I") or "I;12" in stored):
            raise ValueError("the range of its pixels is not known; up to 8, or 16 bits are read")
        scale = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}.get(stored)
        if scale and "transparency" in image.info:      # Pillow scales the pixels only
            clear = np.multiply(image.info["transparency"], scale).astype(int)
            image.info["transparency"] = clear.tolist()
        if draft:
            image.draft(None, (2 * image_size, 2 * image_size))
        image = ImageOps.exif_transpose(image)
        if image.mode[0] == "I":        # 16 bits: Pillow would clip
            pixels = np.asarray(image)
            pixels = np.where(pixels == image.info.get("transparency", -1), 65535, pixels)
            image = Image.fromarray((pixels / 257).round().astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def square(image, image_size, rng=None):
    """RGB PIL image -> uint8 [3, H, W]: its largest square, resized; the middle one, or with a
    numpy rng a random one, flipped half of the time."""
    side = min(image.size)
    left, top = (np.array(image.size) - side) * (rng.uniform(size=2) if rng else 0.5)
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC,
                         (left, top, left + side, top + side))
    pixels = np.asarray(image).transpose(2, 0, 1)   # [3, H, W]
    return np.ascontiguousarray(pixels[:, :, ::-1] if rng and rng.random() < 0.5 else pixels)


# ---- Any of the three, in batches

def open_dataset(name, split, image_size, augment=False, draft=False):
    """The split, "train" or "val", of "fashion", "shapes", a folder, or "auto": fashion if it is
    there, else shapes. augment (see square), draft (see decode_image): for folders. Raises BadInput
    if it is not there."""
    if name not in ("auto", "fashion", "shapes"):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise BadInput(f"--data {name}: no such folder. Give one of images, or of "
                           "train/<class>/* and val/<class>/*, or auto, fashion or shapes")
        return Folder(folder, split, image_size, augment, draft)
    found = [folder for folder in FASHION_PLACES if len([*folder.glob("*-ubyte.gz")]) >= 4]
    if found and name != "shapes":
        return Fashion(found[0], split, image_size)
    if name == "fashion":
        raise BadInput("--data fashion: not found. Install Debian's dataset-fashion-mnist, or put "
                       f"the files from github.com/zalandoresearch in {FASHION_PLACES[0]}")
    return Shapes(split, image_size)


def row_order(n, batch_size, seed, step=0, rank=0, world=1, accumulate=1):
    """This rank's (epochs [b], indices [b]), endless, `accumulate` per step, from `step` on. The
    batch_size images of a step are cut into world x accumulate equal parts; each rank takes
    `accumulate` in a row. An epoch is a permutation of all n, seeded by (seed, epoch), minus its
    incomplete last batch."""
    size = batch_size // (world * accumulate)   # b
    joined = -(-batch_size // n)            # epochs that a batch needs: 1 unless the set is tiny
    steps = joined * n // batch_size        # in these epochs
    for now in itertools.count(step):
        block, row = divmod(now, steps)
        if row == 0 or now == step:
            epochs = np.arange(block * joined, (block + 1) * joined)
            order = np.concatenate([
                np.random.default_rng([seed % 2 ** 32, epoch]).permutation(n) for epoch in epochs])
        for part in range(rank * accumulate, (rank + 1) * accumulate):
            places = row * batch_size + part * size + np.arange(size)   # in these epochs, [b]
            yield epochs[0] + places // n, order[places]


def ignore_signals(worker):     # the main process saves and then ends its workers
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):       # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def read(dataset, rows, workers):
    # rows: whole batches, not single indices; its own generator leaves the run's random state alone
    return iter(DataLoader(dataset, sampler=rows, batch_size=None, generator=torch.Generator(),
                           num_workers=0 if dataset.in_memory else workers,
                           worker_init_fn=ignore_signals))


def batches(dataset, batch_size, seed, step=0, rank=0, world=1, accumulate=1, workers=0):
    """The micro-batches of row_order: (images uint8 [b, 3, H, W], labels int64 [b]), for
    trainer.to_device, which makes images float32 in [0, 1]."""
    order = row_order(len(dataset), batch_size, seed, step, rank, world, accumulate)
    return read(dataset, ((*row, seed) for row in order), workers)


def all_images(dataset, batch_size, indices=None, workers=0):
    """Once through all or `indices`, in order, fixed views: (float32 [B, 3, H, W], int64 [B])."""
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    rows = [(None, indices[start:start + batch_size], None)
            for start in range(0, len(indices), batch_size)]
    for images, labels in read(dataset, rows, workers):
        yield images.float() / 255, labels


# ---- Pictures in and out, command line

def read_image(path, image_size=None):
    """A picture, uint8 [3, H, W]; with image_size its middle square, resized. Raises BadInput if it
    is not one."""
    try:
        image = decode_image(path, image_size)
        return square(image, image_size) if image_size else np.asarray(image).transpose(2, 0, 1)
    except Exception as error:
        raise BadInput(f"{path}: cannot be read ({first_line(error)})") from error


def picture_grid(images, columns, scale=1):
    """Images [n, 3, H, W] in [0, 1] -> a PIL image, row by row, 2 white pixels between."""
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    pixels = pixels.numpy().repeat(scale, 1).repeat(scale, 2)   # [n, H, W, 3]
    n, height, width = len(pixels), pixels.shape[1] + 2, pixels.shape[2] + 2
    size = min(columns, n) * width - 2, -(-n // columns) * height - 2
    grid = Image.new("RGB", size, "white")
    for i, image in enumerate(pixels):
        grid.paste(Image.fromarray(image), (i % columns * width, i // columns * height))
    return grid


def save_picture(image, path):
    """Write a PIL image, as PNG unless the path's ending says otherwise."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower(), "PNG")
    write_atomically(path, lambda file: image.save(file, format=kind))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="auto", help="auto, fashion, shapes or a folder")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--note", metavar="FILE", help="write the data set's name to FILE")
    args = parser.parse_args()
    train, val = (open_dataset(args.data, split, args.image_size) for split in ("train", "val"))
    for part in (train, val):
        print(f"{part.split}: {len(part):,} images of {part.name}{part.note}")
    print(f"{len(train.classes)} classes: {', '.join(train.classes[:12])}")
    if args.note:
        write_text(args.note, train.name)


if __name__ == "__main__":
    launch(main)
