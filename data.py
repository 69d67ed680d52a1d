"""Images in: where they come from, in which order they are read, and the codes that a tokenizer makes of them once.

    python data.py                              # gets the data (Fashion-MNIST where it can be had) and says what it is
    python data.py --data shapes --preview shapes.png
    python data.py --data photos/ --image_size 256 --bench --workers 8

Three kinds of data, one interface (`open_dataset`): `fashion`, Fashion-MNIST's idx files; `shapes`, drawn on the fly,
needs nothing; and any folder of images, with `train/` and `val/` inside or not. `batches` turns one into an endless
stream whose order is a pure function of (seed, step): not of worker processes, ranks, or where a run was resumed.
`token_cache` is what generators train on.

Letters: B batch, H W pixels, n images of a dataset, L codes of an image. Images are uint8 [3, H, W] here, inside a
dataset, and float32 [B, 3, H, W] in [0, 1] for everyone else. Labels are int64.
"""
import colorsys
import difflib
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

from trainer import (
    ArgumentParser,
    BadInput,
    first_line,
    gather,
    host_group,
    launch,
    open_file,
    printable,
    write_atomically,
)


@functools.cache
def say(line):
    """Print a line once, however often a dataset is opened, and from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(line), flush=True)


class Images:
    """What every dataset has. A subclass sets the fields and writes `get`, and `skip` if files can be unreadable."""
    # fingerprint: a hash that changes when the images or their order do, as far as is seen without reading all of them
    name = where = split = fingerprint = ""
    content = ""                    # a hash that is the same for a copy of the images, and for most other images is not
    classes: list[str]
    labels: np.ndarray              # int64 [n]
    border = 0                      # pixels on each side that are padding and not picture: scores leave them out
    photographs = True              # False: drawn
    augment = False                 # True: `get` draws random views
    draft = False                   # True: large JPEGs are decoded at a fraction of their size
    in_memory = False               # True: a worker process would only slow it down
    unreadable: dict[int, str]      # index -> reason, for the files that were skipped

    def __len__(self):
        return len(self.labels)

    @property
    def kind(self):
        """What a resumed run must find again, wherever the files lie by then."""
        return f"{type(self).__name__} of {len(self)} images in {len(self.classes)} classes"

    def get(self, index, rng=None):
        """Image `index`, uint8 [3, H, W]: one fixed view, or a random one drawn with `rng` where the data allows it."""
        raise NotImplementedError

    def get_many(self, indices, rngs):
        return np.stack([self.get(index, rng) for index, rng in zip(indices, rngs)])   # [B, 3, H, W]


def hash_of(*parts):
    """16 hex digits from anything printable, and from bytes."""
    digest = hashlib.sha256()
    for part in parts:
        part = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Fashion-MNIST: 60,000 + 10,000 photographs of clothes, 28x28, grey (Xiao et al., 2017; MIT licence)

FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_FOLDER = Path(__file__).resolve().parent / "data" / "fashion-mnist"
FASHION_PLACES = [FASHION_FOLDER, Path("/usr/share/datasets/fashion-mnist")]    # the second is Debian's
# SHA-256 of the uncompressed files, which hold for any mirror. The MD5 sums that are published hold for one .gz each,
# with its name and date inside; the two were checked against each other.
FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"}


class Fashion(Images):
    """Fashion-MNIST. At image_size 32 the 28x28 picture gets a border of 2 black pixels, at any other it is resized.
    No augmentation: its shoes all point to the left, and a flipped one is not in the data."""
    name, in_memory = "fashion", True
    classes = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]

    def __init__(self, folder, split, image_size):
        self.where, self.split, self.image_size = str(folder), split, image_size
        self.border, self.unreadable = (2 if image_size == 32 else 0), {}
        part = {"train": "train", "val": "t10k"}[split]
        self.pixels = read_idx(folder, f"{part}-images-idx3-ubyte", 3)                        # uint8 [n, 28, 28]
        self.labels = read_idx(folder, f"{part}-labels-idx1-ubyte", 1).astype(np.int64)       # [n]
        if len(self.pixels) != len(self.labels) or self.pixels.shape[1:] != (28, 28) or self.labels.max() > 9:
            raise BadInput(f"{folder}: {len(self.pixels)} images, {len(self.labels)} labels of {split} do not belong "
                           f"together. Delete the folder and run python data.py")
        self.fingerprint = hash_of("fashion", split, image_size, self.pixels.tobytes(), self.labels.tobytes())
        self.content = self.fingerprint

    def get(self, index, rng=None):
        return self.get_many([index], [rng])[0]

    def get_many(self, indices, rngs):
        images = self.pixels[np.asarray(indices), None]                                       # [B, 1, 28, 28]
        if self.border:
            images = np.pad(images, ((0, 0), (0, 0), (self.border,) * 2, (self.border,) * 2))
        elif images.shape[-1] != self.image_size:
            images = torch.from_numpy(images).float()
            images = F.interpolate(images, (self.image_size,) * 2, mode="bicubic", antialias=True)
            images = images.round().clamp(0, 255).byte().numpy()
        return images.repeat(3, axis=1)                                                       # [B, 3, H, W]


LARGEST_IDX = 2 ** 27       # bytes; the largest of the four files has 47 million


def read_idx(folder, name, dimensions):
    """An idx file, .gz or not: two zero bytes, 8 for uint8, number of dimensions, each as big-endian int32, values.
    What the header says is checked before the values are read: 1 MB of gzip can be 1 GB of zeros."""
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    try:
        with open_file(path) as file:
            content = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            header = content.read(4 + 4 * dimensions)
            shape = [int(n) for n in np.frombuffer(header[4:], ">i4")]
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(shape) != dimensions:
                raise ValueError("not an idx file")
            if min(shape) < 1 or math.prod(shape) > LARGEST_IDX:
                raise ValueError(f"{shape} values")
            values = content.read(math.prod(shape) + 1)         # one more than there should be
        return np.frombuffer(values, np.uint8).reshape(shape).copy()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise BadInput(f"{path}: cannot be read ({error}). Delete it and run python data.py") from error


def has_fashion(folder):
    return all((folder / name).exists() or (folder / f"{name}.gz").exists() for name in FASHION_SHA256)


@functools.cache            # a failure takes seconds, and every run opens two splits
def find_fashion():
    """(folder, what was tried): on disk, else downloaded, else Debian's package; the folder is None if all fail.

    Under torchrun the first rank of each machine fetches and the others wait for it, then look on the disk only.
    """
    ranks, first, tried = dist.is_initialized(), os.environ.get("LOCAL_RANK", "0") == "0", []
    if ranks and not first:
        dist.barrier(host_group())
    try:
        for folder in FASHION_PLACES:
            if has_fashion(folder):
                return folder, tried
            tried.append(f"{folder} (no idx files)")
        for fetch in (fetch_fashion, install_fashion) if first else ():
            try:
                return fetch(), tried
            except BadInput as error:
                tried.append(str(error).rstrip("."))
        return None, tried
    finally:
        if ranks and first:
            dist.barrier(host_group())


def fetch_fashion(folder=None, url=FASHION_URL, timeout=4):
    """Download those of the four files that `folder` lacks and return it. A file appears there only when its checksum
    is right, under a temporary name until it is complete. Raises BadInput: no connection, truncated, wrong checksum."""
    folder = Path(folder or FASHION_FOLDER)
    for name, sha256 in FASHION_SHA256.items():
        path, source = folder / f"{name}.gz", f"{url.rstrip('/')}/{name}.gz"
        if path.exists() and checksum_fault(path.read_bytes(), sha256) is None:
            continue
        try:
            with urllib.request.urlopen(source, timeout=timeout) as answer:
                length = int(answer.headers.get("Content-Length") or 0)
                with tqdm(desc=path.name, total=length or None, unit="B", unit_scale=True, disable=None) as bar:
                    pieces = []
                    while piece := answer.read(1 << 16):
                        if 65536 * len(pieces) > LARGEST_IDX:
                            raise ValueError("too large")
                        pieces.append(piece)
                        bar.update(len(piece))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise BadInput(f"{source}: cannot be downloaded ({getattr(error, 'reason', error)})") from error
        content = b"".join(pieces)
        fault = "truncated" if len(content) < length else checksum_fault(content, sha256)
        if fault:
            raise BadInput(f"{source}: {fault}; not kept. Try again later")
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return folder


def checksum_fault(compressed, sha256):
    """None, or what is wrong with the bytes of a .gz file."""
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(compressed)).read(LARGEST_IDX)
        return None if hashlib.sha256(content).hexdigest() == sha256 else "wrong checksum"
    except EOFError:
        return "truncated"
    except (OSError, zlib.error):
        return "not a gzip file"


def install_fashion():
    """As root on Debian: apt-get install dataset-fashion-mnist. Returns its folder."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise BadInput("Debian's package dataset-fashion-mnist (needs apt-get and root)")
    say("Fashion-MNIST: apt-get install dataset-fashion-mnist")
    options = ("Acquire::Retries=0", "Acquire::http::Timeout=5", "DPkg::Lock::Timeout=120")
    apt = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    for command in (["update"], ["install", "-y", "--no-install-recommends", "dataset-fashion-mnist"]):
        try:
            subprocess.run(apt + command, timeout=240, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        except (OSError, subprocess.TimeoutExpired):
            break
    if not has_fashion(FASHION_PLACES[-1]):
        raise BadInput("apt-get install dataset-fashion-mnist (failed)")
    return FASHION_PLACES[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: drawn from signed distances, so that edges are smooth at any size and nothing but numpy is needed

def half_plane(u, v, degrees, offset):
    angle = np.deg2rad(degrees)
    return u * np.cos(angle) + v * np.sin(angle) - offset


def box(u, v, width, height):
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


def bands(u, width):
    """Negative in every second band of this width."""
    return np.abs((u / (2 * width)) % 1 - 0.5) * (2 * width) - width / 2


def star(u, v):
    angle = np.abs((np.arctan2(u, -v) / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * (2 * np.pi / 5)     # from the nearest tip
    radius, inner = np.hypot(u, v), 0.45 * np.exp(1j * np.pi / 5)       # the tip lies at 1, the next notch at inner
    edge = np.rad2deg(np.arctan2(1 - inner.real, inner.imag))
    return half_plane(radius * np.cos(angle) - 1, radius * np.sin(angle), edge, 0)


def checker(u, v):
    a, b = (bands(w.clip(-0.75, 0.75) + 0.25, 0.5) for w in (u, v))      # clipped: no further cell beyond the square
    return np.maximum(np.maximum(np.minimum(a, b), -np.maximum(a, b)), box(u, v, 1, 1))     # a xor b, inside a square


def heart(u, v):        # a square on its corner with a half disc on each upper side
    side, lobe = 0.55, 0.55 / np.sqrt(2)
    v = v - 0.1
    square = np.maximum(np.abs(u + v), np.abs(u - v)) / np.sqrt(2) - side
    return np.minimum(square, np.hypot(np.abs(u) - lobe, v + lobe) - side)


# Signed distance to the edge, negative inside, in units of the shape's radius; u points right, v down.
SHAPES = {
    "circle": lambda u, v: np.hypot(u, v) - 0.85,
    "square": lambda u, v: box(u, v, 0.8, 0.8),
    "triangle": lambda u, v: functools.reduce(np.maximum, [half_plane(u, v - 0.2, a, 0.55) for a in (90, 210, 330)]),
    "star": star,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.2,
    "cross": lambda u, v: np.minimum(box(u, v, 0.95, 0.3), box(u, v, 0.3, 0.95)),
    "stripes": lambda u, v: np.maximum(bands(v + 0.4, 0.4), box(u, v, 0.9, 1)),
    "checker": checker,
    "heart": heart,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v + 0.1)),
}


class Shapes(Images):
    """Ten classes of coloured shapes; image `index` is a pure function of (split, index). No augmentation: there are
    as many as one likes."""
    name, where, photographs, classes = "shapes", "drawn on the fly", False, list(SHAPES)

    def __init__(self, split, image_size):
        self.split, self.image_size, self.unreadable = split, image_size, {}
        self.labels = np.arange({"train": 10_000, "val": 2_000}[split]) % len(SHAPES)
        centres = (np.arange(image_size, dtype=np.float32) + 0.5) * (2 / image_size) - 1
        self.x, self.y = centres[None, :], centres[:, None]          # [1, W], [H, 1] in -1 .. 1
        self.in_memory, self.drawn = image_size <= 64, {}      # small ones are drawn once and kept: index -> image
        self.content = hash_of("shapes", split, image_size, *(self.get(i).tobytes() for i in range(20)))
        self.fingerprint = self.content

    def get(self, index, rng=None):
        if not self.in_memory:
            return self.draw(index)
        if index not in self.drawn:
            self.drawn[index] = self.draw(index)
        return self.drawn[index]

    def draw(self, index):
        rng = np.random.default_rng([{"train": 0, "val": 1}[self.split], index])
        radius, angle = rng.uniform(0.45, 0.75), rng.uniform(-0.6, 0.6)
        room = 0.95 - radius * 0.95
        x, y = self.x - rng.uniform(-room, room), self.y - rng.uniform(-room, room)
        u = (x * np.cos(angle) + y * np.sin(angle)) / radius                                 # [H, W]
        v = (y * np.cos(angle) - x * np.sin(angle)) / radius                                 # [H, W]
        distance = SHAPES[self.classes[self.labels[index]]](u, v) * (radius * self.image_size / 2)    # in pixels

        hue, dark = rng.uniform(), rng.uniform() < 0.5              # a light shape on a dark ground, or the reverse
        values = ((0.15, 0.4), (0.8, 1)) if dark else ((0.75, 1), (0.35, 0.7))
        ground = colorsys.hsv_to_rgb(hue, rng.uniform(0.15, 0.55), rng.uniform(*values[0]))
        paint = colorsys.hsv_to_rgb((hue + rng.uniform(0.2, 0.8)) % 1, rng.uniform(0.6, 1), rng.uniform(*values[1]))
        slope = rng.uniform(-0.15, 0.15, 2)
        light = 1 + slope[0] * self.x + slope[1] * self.y                                    # [H, W]
        shadow = 1 - 0.35 * np.exp(np.maximum(distance, 0) * (-16 / self.image_size))        # darker near the shape
        inside = np.clip(0.5 - distance, 0, 1)                               # share of the pixel covered
        image = (np.multiply.outer(ground, light * shadow * (1 - inside))
                 + np.multiply.outer(paint, (2 - light) * inside))                           # [3, H, W]
        return (image * 255).clip(0, 255).round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Any folder of images

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
HELD_OUT = 0.05         # share of the images that become `val` where the folder has none
UNREADABLE = 0.01       # a larger share of broken files means that something else is wrong


class Folder(Images):
    """`train/<class>/*` and `val/<class>/*`, or `<class>/*`, or bare images (one class). The last two are split by a
    hash of each file's name, so that a file stays in its split when others come or go. A file that cannot be read is
    named, and the next readable one of its class takes its place: which one depends on the files alone. More than 1 %
    of such files (and more than one) end the run."""

    def __init__(self, folder, split, image_size, augment, draft):
        self.name = self.where = printable(folder)
        self.split, self.image_size, self.augment, self.draft, self.unreadable = split, image_size, augment, draft, {}
        folder = Path(folder)
        if not os.access(folder, os.R_OK | os.X_OK):
            raise BadInput(f"{folder}: may not be read by this user. Change its rights, or copy the images")
        parts = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
        if {"train", "val"} <= parts:
            self.root, (self.classes, files) = folder / split, list_images(folder / "train")
            if split == "val":
                files = list_images(self.root)[1]
            strange = sorted({name for name, *_ in files} - set(self.classes))
            if strange:
                raise BadInput(f"{self.root / strange[0]}: a class that {folder / 'train'} lacks. Add it there too")
        elif parts & {"train", "val"} and parts <= {"train", "val", "valid", "validation", "test"}:
            raise BadInput(f"{folder}: needs both train/ and val/, and has {', '.join(sorted(parts))}. Rename what is "
                           f"there, or give one folder of classes, of which 5 % are held out")
        else:
            self.root, (self.classes, files) = folder, list_images(folder)
            files, everything = split_by_hash(files, split), len(files)
            say(f"{folder}: no train/ and val/ inside; by a hash of their names, {HELD_OUT:.0%} of the {everything:,} "
                f"images are held out as val")
        if not files:
            raise BadInput(f"{self.root}: no images. Endings that count: {' '.join(ENDINGS)}")
        self.files = [file for _, file, *_ in files]                        # relative to root, sorted by class and name
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([number[name] for name, *_ in files], dtype=np.int64)
        self.content = hash_of("folder", split, image_size, [file[:3] for file in files])     # names and sizes
        # names, sizes and times of change
        self.fingerprint = hash_of("folder", split, image_size, files, *["draft"] * draft)

    def get(self, index, rng=None):
        for other in self.in_its_place(index):
            if other not in self.unreadable:
                try:
                    image = decode(self.root / self.files[other], self.image_size, self.draft)
                    return square(image, self.image_size, rng if self.augment else None)
                except Exception as error:      # noqa: BLE001  Pillow raises a dozen kinds for broken files
                    self.skip(other, first_line(error))
        raise BadInput(f"{self.root}: no readable image of class {self.classes[self.labels[index]]}. Remove the class")

    def in_its_place(self, index):
        """index, then the others of its class, in order from there on and round."""
        yield index
        same_class = np.flatnonzero(self.labels == self.labels[index])
        yield from np.roll(same_class, -np.searchsorted(same_class, index)).tolist()[1:]

    def skip(self, index, reason):
        """Name and count a broken file. A worker process only notes it; `read` hands the note to the first process."""
        if index in self.unreadable:
            return
        self.unreadable[index] = reason
        if get_worker_info() is None:
            count = len(self.unreadable)
            print(printable(f"{self.root / self.files[index]}: skipped, cannot be read ({reason}); "
                            f"{count} of {len(self):,} so far"), flush=True)
            if count > max(1, UNREADABLE * len(self)):
                raise BadInput(f"{self.root}: {count} of {len(self):,} files cannot be read, more than "
                               f"{UNREADABLE:.0%}. Mend or remove {self.files[index]} and the ones named above")


LISTS = FASHION_FOLDER.parent / "lists"
LARGE = 20_000          # images of a folder whose list is kept


def list_images(folder):
    """(classes, [(class, relative name, size, time of change)]), both sorted. No class folders: one class, `images`.

    A look at each of a million files takes minutes on a network disk. So the list of a large folder is kept, in LISTS,
    and holds until a folder inside has another time of change: files that come, go or are renamed are seen, one that is
    overwritten in place is not. To have a list made anew, delete the old one, whose name is printed.
    """
    folder, start = folder.resolve(), time.time_ns()
    kept = LISTS / f"{hash_of(str(folder), ENDINGS)}.json"
    try:
        known = read_json(kept)
        if all(os.stat(name).st_mtime_ns == changed for name, changed in known["folders"].items()):
            found = [tuple(file) for file in known["files"]]
            if known["checksum"] == hash_of(known["folders"], found):
                say(f"{folder}: {len(found):,} images, list from {kept}")
                return sorted({name for name, *_ in found}), found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):      # no list, a damaged one, a folder that left
        pass
    found, loose, folders = [], [], {str(folder): os.stat(folder).st_mtime_ns}
    for top in os.scandir(folder):
        is_folder = os.path.isdir(top.path)             # top.is_dir() raises where links go round
        if top.is_symlink() and folder.is_relative_to(os.path.realpath(top.path)):
            say(f"{top.path}: a link to a folder that it lies in; left out")    # all images once more, as one class
            continue
        for root, inner, names in os.walk(top.path) if is_folder else [(str(folder), [], [top.name])]:
            if root not in folders:
                folders[root] = os.stat(root).st_mtime_ns
            inner[:] = [name for name in inner if not name.startswith(".")]             # thumbnails and the like
            inside = Path(root).relative_to(folder).as_posix()
            for name in names:
                if name.lower().endswith(ENDINGS) and not name.startswith(".") and not top.name.startswith("."):
                    file = os.path.join(root, name)     # strings, and one stat a file: there may be millions
                    try:
                        stat = os.stat(file)
                    except OSError:                     # a broken link: named when read
                        stat = os.lstat(file)
                    (found if is_folder else loose).append(
                        (top.name, name if inside == "." else f"{inside}/{name}", stat.st_size, stat.st_mtime_ns))
            if time.time_ns() - start > 5e9:
                say(f"{folder}: listing its images, which can take minutes the first time")
    if found and loose:
        say(f"{folder}: {len(loose):,} images that lie beside the class folders are left out")
    found = sorted(found or [("images", *rest) for _, *rest in loose])
    if len(found) > LARGE and max(folders.values()) < start - 2e9:      # not while files still come: it could miss one
        text = json.dumps({"folders": folders, "files": found, "checksum": hash_of(folders, found)})
        try:
            write_atomically(kept, lambda temporary: temporary.write_text(text))
        except BadInput:        # a disk that cannot be written: the next start takes as long as this one
            pass
    return sorted({name for name, *_ in found}), found


def split_by_hash(files, split):
    share = {file: zlib.crc32(os.fsencode(file[1])) / 2 ** 32 for file in files}
    held_out = {file for file in files if share[file] < HELD_OUT} or set(sorted(files, key=share.get)[:1])
    rest = [file for file in files if file not in held_out] or files        # one image only: it is in both
    return rest if split == "train" else sorted(held_out)


def read_json(path):
    """What a .json file holds. Raises OSError or ValueError, and nothing else."""
    try:
        with open_file(path) as file:
            return json.load(file)
    except RecursionError as error:
        raise ValueError("brackets within brackets") from error


# What Pillow may decode. Not among them: EPS, which it hands to the program Ghostscript, and a PostScript file is a
# program; IPTC, which can hold an EPS; BUFR, GRIB, HDF5, WMF, MIC, FPX, which it hands to whatever other packages have
# registered; MPEG, of which it shows nothing. In Pillow's order, the usual ones first.
KINDS = ("BMP", "DIB", "GIF", "JPEG", "PPM", "PNG", "AVIF", "BLP", "CUR", "PCX", "DCX", "DDS", "FITS", "FLI", "FTEX",
         "GBR", "JPEG2000", "ICNS", "ICO", "IM", "IMT", "TIFF", "MCIDAS", "MSP", "PCD", "PIXAR", "PSD", "QOI", "SGI",
         "SPIDER", "SUN", "TGA", "WEBP", "XBM", "XPM", "XVTHUMB")
ROWS = 256              # that are converted at once


@functools.cache
def kinds():
    Image.init()
    return tuple(kind for kind in KINDS if kind in Image.OPEN)          # AVIF and others need not be built in


def decode(path, image_size, draft=False):
    """Any picture that Pillow decodes by itself -> an RGB image as the photographer saw it. Raises many kinds of
    exceptions.

    draft: a JPEG much larger than image_size is decoded at 1/2, 1/4 or 1/8 of its size, at least twice image_size.
    That is faster, but the pixels are not quite those of a full decode: scores must not depend on it.

    Memory: 8 bytes a pixel at the peak, 16 for WebP, 25 for JPEG 2000, so at Pillow's limit of 90 megapixels 0.7 GB,
    1.4 GB, 2.2 GB (measured); what claims to be larger is not decoded. Time: some seconds at the most.
    """
    with open_file(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # of odd metadata; a file that cannot be read raises
        warnings.simplefilter("error", Image.DecompressionBombWarning)      # 90 megapixels
        try:
            image = Image.open(file, formats=kinds())
        except UnidentifiedImageError:
            raise OSError("not an image") from None             # Pillow's own words name the open file
        check_time(image, file)
        if draft:
            image.draft(None, (2 * image_size, 2 * image_size))
        image.load()                                            # animated: the first frame
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, ROWS):                    # by and by: what comes between takes up to 21 bytes a pixel
        rgb.paste(to_rgb(image.crop((0, top, image.width, min(top + ROWS, image.height)))), (0, top))
    return rgb


def check_time(image, file):
    """Raise OSError for a picture that would take minutes, however small its file is."""
    pixels = image.width * image.height
    if pixels > 2 ** 24 and any(tile[0] in Image.DECODERS for tile in image.tile):      # 1 microsecond a pixel
        raise OSError(f"{pixels} pixels of a kind that Pillow decodes in Python, a minute and more. Convert it to PNG")
    if image.format in ("JPEG", "MPO"):     # a scan takes 0.3 nanoseconds a pixel, and 100 bytes; about 10 are usual
        place = file.tell()
        file.seek(0)
        scans = sum(piece.count(b"\xff\xda") for piece in iter(lambda: file.read(2 ** 20), b""))
        file.seek(place)
        if scans * pixels > 2 ** 35:
            raise OSError(f"a JPEG of {scans} scans, which would take minutes")


def to_rgb(image):
    if image.mode.startswith("I"):                              # 16 bits a pixel, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":                                     # floats, by convention in 0 .. 1
        image = Image.fromarray((np.nan_to_num(np.asarray(image)).clip(0, 1) * 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image, image_size, rng):
    """RGB image -> uint8 [3, H, W]: a square as wide as the shorter edge, resized: the middle, or random, flipped."""
    width, height = image.size
    side = min(image.size)
    across, down = rng.uniform(size=2) if rng else (0.5, 0.5)
    left, top = across * (width - side), down * (height - side)
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    pixels = np.asarray(image).transpose(2, 0, 1)                                            # [3, H, W]
    return np.ascontiguousarray(pixels[:, :, ::-1] if rng and rng.random() < 0.5 else pixels)


# ---------------------------------------------------------------------------------------------------------------------
# One door to all of them

def open_dataset(name, split, image_size, augment=False, draft=False):
    """The dataset `name` ("fashion", "shapes", a folder, or "auto": fashion if it can be had, else shapes).

    split "train" or "val". For folders, augment: random crop and flip; draft: see `decode`, off for whatever is scored.
    Raises BadInput if there is nothing to open.
    """
    if name in ("fashion", "auto"):
        folder, tried = find_fashion()
        if folder:
            return Fashion(folder, split, image_size)
        if name == "fashion":
            raise BadInput(f"fashion: not found. Tried: {'; '.join(tried)}. Put its four idx files in "
                           f"{FASHION_FOLDER}, or use --data shapes")
        say("Fashion-MNIST cannot be had here, so the images are shapes: these are drawn and not photographed. "
            "(python data.py --data fashion says what was tried)")
    if name in ("shapes", "auto"):
        return Shapes(split, image_size)
    return Folder(find(name), split, image_size, augment, draft)


def find(name):
    """The folder of data that is one; None for the data that has a name. Raises BadInput where there is no such folder.
    """
    if name in ("fashion", "shapes", "auto"):
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    what = "is a file, and a folder is needed" if folder.exists() else "no such folder"
    near = difflib.get_close_matches(name, ("auto", "fashion", "shapes"), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise BadInput(f"{name}: {what}.{hint} --data takes a folder with train/<class>/* and val/<class>/*, or of images, "
                   f"or auto, fashion, shapes")


def row_order(n, batch_size, seed, step=0):
    """Endless (epochs [B], indices [B]) of the images of each step from `step` on. Every epoch is a permutation of all
    n, seeded by (seed, epoch), less its incomplete last batch. Where a batch needs more than n images, as many epochs
    as it takes are joined to a block, and the block loses its incomplete last batch."""
    epochs = -(-batch_size // n)                        # in a block; 1 unless the set is tiny
    steps = epochs * n // batch_size                    # of a block
    block = None
    for now in itertools.count(step):
        if now // steps != block:
            block = now // steps
            epoch = np.arange(block * epochs, (block + 1) * epochs)
            order = np.concatenate([np.random.default_rng([seed, e]).permutation(n) for e in epoch])
        rows = slice(now % steps * batch_size, (now % steps + 1) * batch_size)
        yield epoch.repeat(n)[rows], order[rows]


class Reader(torch.utils.data.Dataset):
    """(epochs, indices) -> one batch, in whichever process. The rng of a view comes from (seed, epoch, index)."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, rows):
        draw = self.seed is not None and self.dataset.augment
        views = [np.random.default_rng([self.seed, *row]) if draw else None for row in zip(*rows)]
        try:
            images = torch.from_numpy(self.dataset.get_many(rows[1], views))                 # uint8 [B, 3, H, W]
        except BadInput as error:       # as a value: a worker's exception would come with a page of traceback
            return str(error)
        return images, torch.from_numpy(self.dataset.labels[rows[1]]), self.dataset.unreadable


def ignore_interrupts(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the first process, which saves and then ends


def read(dataset, rows, seed, workers):
    reader = Reader(dataset, seed)
    if workers and not dataset.in_memory:       # own generator: else DataLoader would draw from torch's, the run's
        source = DataLoader(reader, sampler=rows, batch_size=None, num_workers=workers, prefetch_factor=4,
                            generator=torch.Generator(), worker_init_fn=ignore_interrupts)
    else:
        source = map(reader.__getitem__, rows)
    source = iter(source)
    while True:
        try:
            batch = next(source)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise BadInput(f"a process that decodes images was killed, perhaps for want of memory ({first_line(error)}). "
                           f"Go on with --resume and fewer --workers") from error
        if isinstance(batch, str):
            raise BadInput(batch)
        images, labels, unreadable = batch
        for index, reason in list(unreadable.items()):
            dataset.skip(index, reason)
        # in numpy: on a busy machine, waking torch's threads for so little costs a hundred times the work
        yield torch.from_numpy(np.divide(images.numpy(), 255, dtype=np.float32)), labels


def batches(dataset, batch_size, seed, step=0, rank=0, world=1, workers=0):
    """Endless (images float32 [B / world, 3, H, W] in [0, 1], labels int64 [B / world]), starting at `step` without
    reading what came before. batch_size B counts all ranks. Raises BadInput if it cannot be shared out equally."""
    if batch_size < 1 or batch_size % world:
        raise BadInput(f"batch_size {batch_size}: does not divide among {world} ranks. Use a multiple of {world}")
    seed %= 2 ** 32                     # numpy takes no negative seed
    mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    rows = ((epochs[mine], indices[mine]) for epochs, indices in row_order(len(dataset), batch_size, seed, step))
    return read(dataset, rows, seed, workers)


def all_images(dataset, batch_size, limit=None, workers=0, start=0):
    """Once through images start .. limit in order, fixed views: (images float32 [<=B, 3, H, W], labels int64). A broken
    file shows the next of its class, so that row i is always image i."""
    indices = np.arange(len(dataset))[start:limit]
    rows = [(indices[i:i + batch_size],) * 2 for i in range(0, len(indices), batch_size)]      # epochs are unused
    return read(dataset, rows, None, workers)


# ---------------------------------------------------------------------------------------------------------------------
# Token cache: the codes of every image, extracted once

BLOCK = 4096            # images of a part: a kill loses at most so many, of each rank


def views_of(images, views, image_size):
    """The views of images [B, 3, S, S] that codes are made of, `views` of [B, 3, H, W]. 1: the image; 2: and its flip
    (NativeTok, appendix F.1); 10: four corners and the middle of size image_size, then their flips (LlamaGen, which has
    S = int(1.1 * image_size))."""
    if views == 10:
        room = images.shape[-1] - image_size
        corners = (0, 0), (0, room), (room, 0), (room, room), (round(room / 2),) * 2
        crops = [images[..., y:y + image_size, x:x + image_size] for y, x in corners]
    else:
        crops = [images]
    return crops + [crop.flip(-1) for crop in crops] if views > 1 else crops


def token_cache(tokenizer, dataset, path, fingerprint, views=1, image_size=None, batch_size=64, device="cpu", workers=0,
                codebook=65536):
    """Codes of the whole dataset, from `path` if they are there, else extracted by all ranks, which call this together
    and see the same disk.

    tokenizer: has .encode(images) -> int64 [B, L] or [B, h, w]; fingerprint: a string that names its weights; views,
    image_size: see `views_of`. Returns (codes [views, n, L], memory-mapped uint16, or uint32 with more than 65,536
    codes; labels int64 [n]).
    Beside `path` lies a .json that says what the codes were made of, with their checksum: codes of another tokenizer or
    of other data, or damaged ones, are made anew. Until all codes are there, each BLOCK of images has its file in
    <name>.parts-*/, so that any number of ranks can go on after a kill. A rank that fails does not tell the others:
    it ends, and torchrun ends them.
    """
    path, n = Path(path), len(dataset)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    made_of = {"tokenizer": fingerprint, "data": dataset.fingerprint, "views": views, "codebook": codebook}
    folder = path.with_name(f"{path.stem}.parts-{hash_of(made_of)[:8]}")
    dtype = np.uint16 if codebook <= 65536 else np.uint32
    if gather(rank == 0 and is_whole(path, made_of, n, dtype, folder), world)[0]:
        return np.load(path, mmap_mode="r"), dataset.labels

    parts = {folder / f"{i // BLOCK:06}.npy": np.arange(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)}
    todo = {part: np.split(parts[part], range(batch_size, len(parts[part]), batch_size))
            for part in list(parts)[rank::world] if not is_part(part, (views, len(parts[part])), dtype)}
    bar = tqdm(total=sum(len(parts[part]) for part in todo), unit="image", disable=rank > 0 or not todo,
               mininterval=0.5 if sys.stderr.isatty() else 60,              # in a file a line a minute is enough
               desc=f"codes of {dataset.name} {dataset.split}" + (f", rank 0 of {world}" if world > 1 else ""))
    # one stream for all parts: workers that start anew for each would come too late
    stream = read(dataset, [(rows, rows) for batches in todo.values() for rows in batches], None, workers)
    for part, batches in todo.items():
        codes = []
        for images, _ in itertools.islice(stream, len(batches)):
            with torch.inference_mode():
                found = [tokenizer.encode(view) for view in views_of(images.to(device), views, image_size)]
            codes.append(torch.stack(found).flatten(2).cpu().numpy())                        # [views, B, L]
            bar.update(len(images))
        codes = np.concatenate(codes, axis=1)                                                # [views, rows, L]
        if codes.min() < 0 or codes.max() >= codebook:
            raise ValueError(f"codes {codes.min()} .. {codes.max()} with a codebook of {codebook}")
        write_atomically(part, functools.partial(write_part, codes=codes.astype(dtype)))
    bar.close()
    gather(None, world)                 # all parts are there
    if rank == 0:
        write_atomically(path, functools.partial(join_parts, parts=parts, n=n))
        codes = np.load(path, mmap_mode="r")
        state = json.dumps({**made_of, "shape": codes.shape, "checksum": checksum_rows(codes)}, indent=1)
        write_atomically(path.with_suffix(".json"), lambda temporary: temporary.write_text(state))
        shutil.rmtree(folder)
    gather(None, world)
    return np.load(path, mmap_mode="r"), dataset.labels


def write_part(path, codes):
    """codes [views, rows, L] as np.save writes them, and their CRC-32: a damaged part would become codes."""
    content = io.BytesIO()
    np.save(content, codes)
    path.write_bytes(content.getvalue() + zlib.crc32(content.getvalue()).to_bytes(4, "big"))


def read_part(path):
    """codes [views, rows, L]. Raises many kinds of exceptions."""
    with open_file(path) as file:
        content = file.read()
    if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "big"):
        raise ValueError("wrong checksum")
    content = io.BytesIO(content[:-4])
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError("not an array of codes")
    shape, _, dtype = np.lib.format.read_array_header_1_0(content)
    return np.frombuffer(content.read(), dtype).reshape(shape)


def join_parts(path, parts, n):
    """Files of [views, rows, L] -> one of [views, n, L]: by and by, since the whole may be larger than the memory, and
    written, not mapped: on a full disk that is an error, and not a crash."""
    with open(path, "wb") as file:
        for part, rows in parts.items():
            try:
                codes = read_part(part)
            except Exception as error:
                raise BadInput(f"{part}: damaged since it was written. Run again: it is extracted anew") from error
            views, _, length = codes.shape
            if not rows[0]:
                header = {"descr": codes.dtype.str, "fortran_order": False, "shape": (views, n, length)}
                np.lib.format.write_array_header_1_0(file, header)
                start = file.tell()
            for view in range(views):
                file.seek(start + (view * n + int(rows[0])) * length * codes.itemsize)
                file.write(codes[view].tobytes())                                            # [rows, L]


def is_part(path, shape, dtype):
    try:
        part = read_part(path)
        return part.ndim == 3 and part.shape[:2] == shape and part.dtype == dtype
    except Exception:           # noqa: BLE001  an old part, or damage: a header that is no Python, a size
        return False


def checksum_rows(codes, checksum=0):
    """CRC-32 of codes [views, rows, L], row after row, so that it does not depend on how the rows came in batches."""
    for row in range(0, codes.shape[1], 4096):          # in pieces: the whole may be larger than the memory
        checksum = zlib.crc32(np.ascontiguousarray(codes[:, row:row + 4096].transpose(1, 0, 2)), checksum)
    return checksum


def is_whole(path, made_of, n, dtype, folder):
    """True if the codes at `path` can be used. Those of another tokenizer or of other data are renamed (.old), damaged ones
    are removed, and so are parts that nobody needs."""
    note, whole, why = path.with_suffix(".json"), False, "damaged or never finished"
    try:
        state = read_json(note)
        changed = [name for name, value in made_of.items() if state[name] != value]
        if changed:
            why = f"made of another {changed[0]}"
        else:
            open_file(path).close()     # not a pipe, for which np.load would wait
            codes = np.load(path, mmap_mode="r")
            whole = (codes.ndim == 3 and codes.shape[:2] == (made_of["views"], n) and codes.dtype == dtype
                     and checksum_rows(codes) == state["checksum"] and codes.max() < made_of["codebook"])
    except FileNotFoundError:
        pass
    except OSError as error:        # a disk that fails for a moment is no reason to throw hours of work away
        raise BadInput(f"{path}: cannot be read ({error.strerror}). Try again, or remove it") from error
    except Exception:               # noqa: BLE001  damage shows as anything: a header that is no Python, a size
        pass
    stale = [other for other in path.parent.glob("*.parts-*")
             if other.name.startswith(f"{path.stem}.parts-") and (whole or other != folder)]
    try:
        for other in stale:
            shutil.rmtree(other)
        if not whole and (note.exists() or path.exists()):
            say(f"{path}: {why}; what is missing is extracted")
            for file in (note, path):           # the note first: codes without one are never used
                if why.startswith("made of") and file.exists():         # good codes of something else: hours of work
                    os.replace(file, file.with_suffix(f".old{file.suffix}"))
                file.unlink(missing_ok=True)    # not overwritten: another process may have them mapped
    except OSError as error:
        raise BadInput(f"{path}: {why}, and cannot be removed ({error.strerror}). "
                       f"Choose another folder with --out") from error
    return whole


# ---------------------------------------------------------------------------------------------------------------------
# Pictures for people

def read_image(path, image_size):
    """One picture of the user's -> float32 [3, H, W] in [0, 1], centre crop. Raises BadInput if it cannot be read."""
    try:
        return torch.from_numpy(square(decode(path, image_size), image_size, None)).float() / 255
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such picture. Check the name") from error
    except Exception as error:                  # noqa: BLE001  as in Folder.get
        raise BadInput(f"{path}: not a picture that can be read ({first_line(error)}). "
                       f"Try a .jpg or .png") from error


def picture_grid(images, columns, scale=1):
    """images float [n, 3, H, W] in [0, 1] -> a PIL image, row by row, 2 white pixels between, a pixel scale x scale."""
    n, _, height, width = images.shape
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).numpy().repeat(scale, 1).repeat(scale, 2)            # [n, H, W, 3]
    height, width = height * scale + 2, width * scale + 2
    grid = Image.new("RGB", (min(columns, n) * width - 2, -(-n // columns) * height - 2), "white")
    for i, image in enumerate(pixels):
        grid.paste(Image.fromarray(image), (i % columns * width, i // columns * height))
    return grid


def save_picture(image, path):
    """Write a PIL image; the ending of the name says how. Raises BadInput if the ending or the folder is no good."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise BadInput(f"{path}: no kind of picture ends so. Use .png")
    write_atomically(path, lambda temporary: image.save(temporary, format=kind))


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def images_a_second(dataset, workers, seed, seconds=4):
    source = batches(dataset, 64, seed, workers=workers)        # a seed of its own: not the files just read, where many
    next(source)                                    # starts the workers
    start = time.perf_counter()
    for count, _ in enumerate(source, 1):
        if time.perf_counter() - start > seconds:
            return 64 * count / (time.perf_counter() - start)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto", help="auto, fashion, shapes, or a folder of images (default: auto)")
    parser.add_argument("--image_size", type=int, default=32, help="pixels of a side (default: 32)")
    parser.add_argument("--preview", metavar="FILE.png", help="write a picture with one row of images a class")
    parser.add_argument("--note", metavar="FILE", help="write what auto came to into a file, for scripts (make demo)")
    parser.add_argument("--bench", action="store_true", help="measure images a second")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes for --bench (default: cores)")
    args = parser.parse_args()
    if args.image_size < 1:
        raise BadInput(f"--image_size {args.image_size}: must be at least 1")
    train = open_dataset(args.data, "train", args.image_size, augment=True)
    val = open_dataset(args.data, "val", args.image_size)
    print(f"data         {train.name}{'' if train.photographs else ' (drawn, not photographed)'}, {train.where}")
    size, more = args.image_size, ", ..." if len(train.classes) > 12 else ""
    print(f"images       {len(train):,} train, {len(val):,} val, {size}x{size}, border {train.border}")
    print(printable(f"classes      {len(train.classes)}: {', '.join(train.classes[:12])}{more}"))
    print(f"fingerprint  train {train.fingerprint}, val {val.fingerprint}")
    if args.note:
        write_atomically(args.note, lambda temporary: temporary.write_text(train.name))
    if args.preview:
        rows = [np.flatnonzero(val.labels == label)[:10] for label in range(len(val.classes))]
        rows = [np.resize(row, 10) for row in rows if len(row)][:20]
        images = torch.from_numpy(np.stack([val.get(int(i)) for row in rows for i in row])).float() / 255
        save_picture(picture_grid(images, 10, scale=max(1, 64 // size)), args.preview)
        print(f"preview      {args.preview}")
    if args.bench:
        torch.set_num_threads(1)                    # one process is then one core
        jpegs = any(name.lower().endswith((".jpg", ".jpeg")) for name in getattr(train, "files", ()))
        for train.draft in (False, True) if jpegs else (False,):
            how = f", draft {'on' if train.draft else 'off'}" if jpegs else ""
            print(f"bench        {images_a_second(train, 0, seed=train.draft):,.0f} images/s a core{how}")
        if args.workers and not train.in_memory:
            rate = images_a_second(train, args.workers, seed=2)
            print(f"bench        {rate:,.0f} images/s with {args.workers} workers{how}")
        print(f"unreadable   {len(train.unreadable)} of the files read")


if __name__ == "__main__":
    launch(main)
