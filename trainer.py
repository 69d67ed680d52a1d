"""What every stage shares and is not the method: settings, ranks, checkpoints, EMA, log. No model knows this file.

A stage uses it like this, and everything that matters stays in the stage's own loop:

    args = trainer.parse(trainer.command_line(__doc__, ModelConfig, TrainConfig))
    run = trainer.Run(args, stage, name, config, training)            # ranks, device, seed, folder; guards old results
    ...build model, optimizer = run.adamw(parameters), ema = trainer.Ema(model)...
    run.track(model=model, optimizer=optimizer, ema=ema)              # what a checkpoint holds; loads it on --resume
    batches = data.batches(..., run.piece, args.seed, run.step * training.accumulate, ...)     # where the run stopped
    for step in run.steps():                                          # continues where the checkpoint stopped
        run.set_learning_rate(optimizer, step)
        ...batch, loss, backward, optimizer.step(), ema.update(model)...
        run.log(step, loss=loss)

A run is a pure function of its settings: the data order is computed from (seed, step), the learning rate from the
step, and the random state travels in the checkpoint. That is why a resumed run equals an uninterrupted one: bit for bit
on the CPU with as many ranks and threads, up to the order of a GPU's sums on CUDA (--deterministic fixes that order).
With other --steps the cosine is another.

What can go wrong on the third night, and what is done here about it: a kill (write_atomically), a full disk
(Run._begin, Run._write), two runs in one folder (lock), a rank that dies, stops or hangs (Watch), ranks that see
different files (agree), numbers that go wrong (Run._stop_if_not_finite, Run._look_for_trouble), another machine
(Run._say_what_differs).
"""
import argparse
import copy
import dataclasses
import difflib
import errno
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import stat
import statistics
import sys
import threading
import time
import traceback
import zipfile
from collections import deque
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

try:
    import fcntl
except ImportError:     # Windows: runs are not kept apart there
    fcntl = None


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2

class BadInput(ValueError):
    """Something the user gave is wrong. The message is one line: what is wrong, where, and what to do."""


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP, after the checkpoint was written."""


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR,
               errno.EFBIG, errno.EEXIST, errno.EIO, errno.ESTALE}


def launch(main):
    """Run a script's main(): bad input ends in one line and exit code 2, Ctrl-C in one line and exit code 130, a lost
    rank in one line and exit code 1. Of several ranks that would say it, the first does."""
    name, code = Path(sys.argv[0]).name, 0
    for stream in (sys.stdout, sys.stderr):     # names of files and classes need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
        print(f"{name}: torch {torch.__version__} is too old, 2.11 is needed: pip install -r requirements.txt",
              file=sys.stderr)
        sys.exit(2)
    try:
        main()
    except BadInput as error:
        say_cause(f"{name}: {error}")
        code = 2
    except (Interrupted, KeyboardInterrupt) as error:
        say_cause(f"{name}: interrupted. {error}")
        code = 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            say_cause(f"{name}: {error.filename or 'output'}: {error.strerror}. Choose a folder that can be written with "
                      f"--out")
            code = 2
        elif "DataLoader worker" in str(error):       # torch raises it from a signal handler, wherever the code is just then
            say_cause(f"{name}: a process that decodes images was killed, perhaps for want of memory. Go on with --resume "
                      f"and fewer --workers")
        elif Watch.current is None:
            raise
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)       # torchrun's, which would come before the line is out
            say_cause(f"{name}: {Watch.current.lost_rank(error)}")
        else:
            traceback.print_exc()
            say_cause(f"{name}: rank {Watch.current.rank} ends with the error above")
        code = code or 1
    finally:
        if Watch.current is not None:
            Watch.current.stop("failed" if code else "ended")
        if dist.is_initialized():
            if code:                # leaving the group in order would wait for a rank that is gone
                sys.stdout.flush()
                os._exit(code)
            dist.destroy_process_group()
    if code:
        sys.exit(code)


def printable(words):
    """One line for a terminal: line ends, escape sequences and bytes that are no UTF-8, all of which a file's name may
    hold, are spelled out; the middle of a very long line is left out."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(words))
    return line if len(line) < 4000 else f"{line[:2000]} ... {line[-1000:]}"


def open_file(path):
    """open(path, "rb"), but an OSError where that would wait for ever or never end: a pipe, a socket, a device."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def choose(what, value, options):
    """Return value if it is one of options; else BadInput that names the near matches and all the options."""
    if value in options:
        return value
    near = difflib.get_close_matches(str(value), [str(o) for o in options], n=2)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise BadInput(f"{what} {value!r}: not known. {hint}Choose from: {', '.join(map(str, options))}")


def write_atomically(path, writer, needs=None):
    """Call writer(temporary path), then rename to path, so that path is at every moment the old file or the new one.
    needs: the bytes it will take, if known, for the message where they are not there. Raises BadInput."""
    path = Path(path)
    # a name of this rank's own, since all ranks may download the same file; and always the same, so that what a kill
    # left behind is overwritten and does not pile up
    temporary = path.with_name(f"{path.name}.writing{os.environ.get('RANK', '')}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(temporary)
        with open(temporary, "rb+") as file:    # on the disk before the name says so: a power cut must not leave a hole
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with suppress(OSError):                 # the rename too; not every disk can
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch.save reports a full disk as a RuntimeError of its writer; any other error is the caller's own
        full = isinstance(error, OSError) or any(words in str(error) for words in ("PytorchStreamWriter", "unexpected pos"))
        if not full:
            raise
        reason = getattr(error, "strerror", None) or "the disk is full or the folder cannot be written"
        was = "The file that was there is unchanged" if path.exists() else "Nothing was written"
        space, advice = "", "Choose"
        if getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            takes = f"it takes {size(needs)}, and " if needs else ""
            space, advice = f"; {takes}{size(free_space(path))} are free there", "Free some space, or choose"
        raise BadInput(f"{path}: cannot be written ({reason}){space}. {was}. {advice} another folder with --out") from error


def size(count):
    """Bytes in words: 512 KB, 9.6 GB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 999.5:
            break
        count /= 1000
    else:
        unit = "TB"
    return f"{count:.3g} {unit}"


def free_space(path):
    """Bytes that are free where path is, or would be. A user's quota is not seen."""
    path = Path(path).absolute()
    return shutil.disk_usage(next((p for p in (path, *path.parents) if p.is_dir()), "/")).free


def lock(path, what, wait=False):
    """Let one process at a time do `what` in a folder: hold the lock of file `path` until release() or the process ends.

    The system drops the lock of a process that dies, however it dies: the file may stay behind, the lock does not.
    (lockf: unlike flock's it is not handed on to worker processes, and it holds on network disks.) Where another process
    has it: wait for it, or raise BadInput. Returns the open file, or None where files cannot be locked.
    """
    if fcntl is None:
        return None
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")
        except OSError as error:
            raise BadInput(f"{path}: cannot be written ({error.strerror}). Choose another folder with --out") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.readline().strip() or "another process"
            if not wait:
                raise BadInput(f"{path.parent}: {holder} {what} there. Wait for it, end it, or choose another folder with "
                               f"--out") from None
            print(f"{path.parent}: waiting; {holder} {what} there", flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:         # a disk without locks
            file.close()
            return None
        if path.exists() and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            break
        file.close()            # the one who had it has just removed the file: a lock on that keeps nobody out
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file


def release(file):
    if file is not None:
        with suppress(OSError):
            os.unlink(file.name)        # before the lock goes: nobody can have locked it in between
        file.close()


# ---------------------------------------------------------------------------------------------------------------------
# Settings: the command line is made from the fields of the dataclasses; the comment beside a field is its help text

@dataclass(frozen=True)
class TrainConfig:
    """How a stage is trained. Defaults: the paper's Table 4."""
    steps: int = 500_000            # optimizer steps
    batch_size: int = 256           # images a step, over all ranks
    accumulate: int = 1             # cut the batch into this many pieces, to save memory
    learning_rate: float = 1e-4     # AdamW's, at its highest
    end_learning_rate: float = 1e-5  # at the last step of the cosine; equal to learning_rate: constant
    warmup: int = 5_000             # steps of linear warm-up
    beta1: float = 0.9              # AdamW: momentum
    beta2: float = 0.99             # AdamW: second moment
    weight_decay: float = 1e-4      # AdamW: on matrices and tables, not on biases and gains
    clip: float = 1.0               # largest gradient norm
    ema: float = 0.999              # decay of the averaged weights, which every later stage uses
    bf16: bool = True               # bfloat16 autocast where CUDA is present
    compile: bool = False           # torch.compile the transformer blocks: minutes at the start, faster steps on a GPU
    recompute: bool = False         # stage 1, HNT: run experts again in the backward pass, to save memory
    workers: int = 8                # processes that decode images, a rank
    draft: bool = True              # decode large JPEGs at a fraction of their size: faster, never below the crop's
    log_every: int = 100            # steps between two lines of the log
    save_every: int = 5_000         # steps between two checkpoints
    keep: int = 1                   # checkpoints kept: the newest, and keep - 1 older ones in OUT/older
    preview_every: int = 5_000      # steps between two preview pictures
    hang: int = 45                  # several ranks end when one is silent, or all are in one step, for so many seconds; 0: never

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "preview_every", "keep"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: must be at least 1")


class ArgumentParser(argparse.ArgumentParser):
    """argparse that answers an unknown flag or value with near matches, in one line."""

    def __init__(self, description=None, **kwargs):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        raise BadInput(f"{message}. All flags: python {self.prog} -h")

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        for flag in unknown:
            choose("argument", flag.split("=")[0], [o for a in self._actions for o in a.option_strings])
        return args

    def _check_value(self, action, value):
        if action.choices is not None:
            choose("/".join(action.option_strings) or action.dest, value, list(action.choices))


def command_line(description, *config_classes):
    """A parser with the flags that all stages share and one flag for each field of the given dataclasses."""
    parser = ArgumentParser(description)
    shared = parser.add_argument_group("shared by all stages")
    shared.add_argument("--config", choices=("toy", "full"), help="default: full where CUDA is present, else toy")
    shared.add_argument("--data", help="shapes, fashion, auto (fashion if it can be had) or a folder; default: auto in "
                        "toy, data/imagenet in full")
    shared.add_argument("--out", help="folder for results, default out/<config>")
    shared.add_argument("--resume", action="store_true", help="go on from the checkpoint if there is one")
    shared.add_argument("--overwrite", action="store_true", help="start anew; results of that name are deleted first")
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument("--device", help="cpu or cuda; default: cuda where present")
    shared.add_argument("--deterministic", action="store_true", help="on CUDA: sums in a fixed order, so that the same "
                        "seed gives the same bits; slower (the CPU does it anyway)")
    shared.add_argument("--tensorboard", action="store_true", help="also log for tensorboard (pip install tensorboard)")
    for cls in config_classes:
        group = parser.add_argument_group(f"{cls.__name__}: each overrides a field of the chosen --config")
        comments = dict(re.findall(r"^    (\w+): [^#\n]+#\s*(.*)$", inspect.getsource(cls), re.MULTILINE))
        for field in dataclasses.fields(cls):
            kind, text = field.type, comments.get(field.name, "").replace("%", "%%")
            if kind is bool:
                group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, help=text,
                                   default=argparse.SUPPRESS)
            elif kind in (int, float, str):
                group.add_argument(f"--{field.name}", type=kind, help=text, default=argparse.SUPPRESS, metavar="")
            elif kind == tuple[int, ...]:
                group.add_argument(f"--{field.name}", type=lambda s: tuple(map(int, s.split(","))), help=text,
                                   default=argparse.SUPPRESS, metavar="")
    return parser


def parse(parser, argv=None):
    """Parse, settle --config, --device and --out, and say on the first line which configuration runs and why."""
    args = parser.parse_args(argv)
    if args.device:
        choose("--device", args.device.split(":")[0], ("cpu", "cuda"))
    if args.device and args.device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(f"--device {args.device}: no CUDA device is present. Leave --device out to run on the CPU")
    why = "asked for" if args.config else f"CUDA is {'present' if torch.cuda.is_available() else 'not present'}"
    args.config = args.config or ("full" if torch.cuda.is_available() else "toy")
    args.data = args.data or {"toy": "auto", "full": "data/imagenet"}[args.config]
    args.out = Path(args.out or f"out/{args.config}")
    args.device = choose_device(args.device)
    if getattr(args, "deterministic", False):       # warn_only: what has no such form (README) is named, and the run goes on
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")         # cuBLAS wants it before its first call
        torch.use_deterministic_algorithms(True, warn_only=True)
    setup_ranks(args.device)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        # torchrun --max-restarts calls the same command again. It is the same run that goes on; only where --overwrite
        # had not yet come to remove the old results it still has to
        args.resume, args.overwrite = True, args.overwrite and not rank_store().check(["began"])
    if int(os.environ.get("RANK", 0)) == 0:
        print(printable(f"config: {args.config} ({why}), results in {args.out}"))
    return args


def override(preset, args):
    """The preset with every field replaced that the command line names."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(preset) if hasattr(args, f.name)}
    return dataclasses.replace(preset, **given)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def load_checkpoint(path, stage, make="", device="cpu"):
    """Read a checkpoint, a dict with at least model, config, step and stage.

    stage: the kind it must be ("vqgan", "tokenizer", "ar", "maskgit"); make: the command that makes one.
    Raises BadInput if the file is missing, is no checkpoint, is cut short or damaged, or belongs to another stage.
    """
    path, again = Path(path), f" Make it anew: {make}" if make else ""
    if not os.path.exists(path):
        raise BadInput(f"{path}: not found." + (f" Train it first: {make}" if make else ""))
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:      # torch raises many kinds here, each with a page of text
        kind = "cannot be read" if isinstance(error, OSError) else "not a checkpoint, or cut short or damaged"
        raise BadInput(f"{path}: {kind}.{again}") from error
    if not isinstance(checkpoint, dict) or not {"model", "config", "step", "stage"} <= checkpoint.keys():
        raise BadInput(f"{path}: a file of torch, but not a checkpoint of this project (model, config, step, stage)")
    settings = [checkpoint.get(name, {}) for name in ("config", "training", "settings", "machine")]
    if not (is_plain([checkpoint["stage"], checkpoint["step"], *settings]) and isinstance(checkpoint["stage"], str)
            and type(checkpoint["step"]) is int and checkpoint["step"] >= 0
            and all(isinstance(each, dict) for each in (*settings, checkpoint.get("ema", {})))):
        raise BadInput(f"{path}: not as a stage of this project writes it (model, config, step, stage).{again}")
    for weights in (checkpoint["model"], checkpoint.get("ema", {}).get("model", {})):
        check_tensors(weights, path)
    if checkpoint["stage"] != stage:
        raise BadInput(f"{path}: a checkpoint of stage {checkpoint['stage']!r}, wanted {stage!r}."
                       + (f" Make one with: {make}" if make else ""))
    return checkpoint


def check_archive(path):
    """Raise ValueError, or one of zipfile's many errors, unless a file of torch is as it was written: torch.load does
    not look at the checksums, and takes a flipped bit for another weight. Costs 0.2 s a GB, beside 0.5 s for loading.
    """
    with open_file(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        # torch compresses nothing: what would unpack to more than the file is there to fill the memory
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("compressed")
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise ValueError("larger inside than outside")
        if damaged := archive.testzip():
            raise ValueError(f"wrong checksum of {damaged}")


def is_plain(value, most=2000):
    """True for dicts, lists and tuples of short texts, numbers and None, `most` of them in all, names being texts: what
    can be compared, sorted and printed in no time. A pickle of 1 kB can hold a list of lists of more than the universe
    has atoms."""
    todo, seen = [value], 0
    while todo:
        value = todo.pop()
        if isinstance(value, (dict, list, tuple)):
            seen += len(value)
            if seen > most or isinstance(value, dict) and not all(isinstance(name, str) for name in value):
                return False
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str):
            if len(value) > 2000:
                return False
        elif not (value is None or isinstance(value, float) or isinstance(value, int) and abs(value) < 2 ** 63):
            return False
    return True


def read_config(cls, values, path):
    """The dataclass cls from a checkpoint's dict. Raises BadInput unless the names and kinds of its values are right.
    """
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    wrong = sorted(map(str, fields.keys() ^ values.keys()))
    if wrong:
        raise BadInput(f"{path}: not settings of this version: {printable(wrong[0])} is missing, or new. Make it anew")
    given = {}
    for name, kind in fields.items():
        value = values[name]
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            value = read_config(kind, value, path)
        elif kind == tuple[int, ...]:
            several = isinstance(value, (tuple, list)) and all(type(each) is int for each in value)
            kind, value = (tuple, tuple(value)) if several else (None, value)
        elif kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise BadInput(f"{path}: its setting {name} is {printable(value)[:80]}, which is no {fields[name]}. Make it anew")
        given[name] = value
    try:
        return cls(**given)
    except Exception as error:      # its own complaint names a flag and no file
        raise BadInput(f"{path}: its settings do not fit together ({first_line(error)}). Make it anew") from error


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def load_model(make, config_class, checkpoint, path):
    """make(config) with a checkpoint's averaged weights, in eval mode. Raises BadInput where they do not fit."""
    config = read_config(config_class, checkpoint["config"], path)
    return made_to_fit(lambda: make(config), checkpoint.get("ema", {}).get("model", {}), path).eval()


def made_to_fit(make, state_dict, path):
    """make() with these weights. It is made without memory first: a small file can ask for any size. Raises BadInput.
    """
    check_fit(sketch(make, len(state_dict), path), state_dict, path)
    model = make()
    model.load_state_dict(state_dict)
    return model


def sketch(make, entries, path):
    """make() on the meta device, for the shapes of a model that is to have so many weights. Raises BadInput where that
    fails or goes on and on: a file of three weights can ask for a billion layers, which take hours without memory too.
    """
    left = 2 * entries + 100            # some more than there are: what is missing is to be named

    def count_down(module, name, parameter):
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"many more weights than the {entries} in the file")

    hook = register_module_parameter_registration_hook(count_down)
    try:
        return on_meta(make)
    except Exception as error:
        raise BadInput(f"{path}: its sizes make no model ({first_line(error)}). Is it another kind of file?") from error
    finally:
        hook.remove()


def check_tensors(state_dict, path):
    """Raise BadInput unless state_dict is one: names, each with a tensor whose numbers are all there."""
    if not isinstance(state_dict, dict) or not all(isinstance(name, str) for name in state_dict):
        raise BadInput(f"{path}: holds no weights by name. Is it another kind of file?")
    for name, value in state_dict.items():
        # a stride of 0 makes one number a million, and other layouts need no numbers at all
        if not (torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta
                and not value.is_quantized and value.nbytes <= value.untyped_storage().nbytes()):
            raise BadInput(f"{path}: {printable(name)[:80]} is no plain tensor. Is it another kind of file?")


def check_fit(model, state_dict, path):
    """Raise BadInput, with a count of what does not fit, unless model.load_state_dict(state_dict) would work."""
    own = model.state_dict()
    missing, unknown = own.keys() - state_dict.keys(), state_dict.keys() - own.keys()
    both = own.keys() & state_dict.keys()
    other = [k for k in both if own[k].shape != state_dict[k].shape]
    if missing or unknown or other:
        first = sorted(missing or unknown or other)[0]
        raise BadInput(f"{path}: does not fit the model: {len(missing)} entries missing, {len(unknown)} unknown, "
                       f"{len(other)} of another shape (first: {printable(first)[:80]}). Is it of another size?")
    kinds = [k for k in both if state_dict[k].is_complex()
             or state_dict[k].is_floating_point() != own[k].is_floating_point()]
    if kinds:
        raise BadInput(f"{path}: does not fit the model: {len(kinds)} entries of another kind of number (first: "
                       f"{min(kinds)}, {state_dict[min(kinds)].dtype}). Is it another kind of file?")


def load_weights(model, state_dict, path):
    """model.load_state_dict(state_dict), with BadInput that counts what does not fit."""
    check_fit(model, state_dict, path)
    model.load_state_dict(state_dict)


def restore(part, state):
    """part.load_state_dict(state), and any error now: an optimizer takes averages of any shape, and fails in its step.
    """
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(state)
        return
    before = [{name: type(value) for name, value in group.items()} for group in part.param_groups]
    if not is_plain(state["param_groups"], 10 ** 6) or not all(
            torch.is_tensor(value) for values in state["state"].values() for value in values.values()):
        raise ValueError("an optimizer's state holds tensors")
    part.load_state_dict(state)
    if before != [{name: type(value) for name, value in group.items()} for group in part.param_groups]:
        raise ValueError("other settings of the optimizer")
    for parameter, values in part.state.items():
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        if shapes != {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}:     # AdamW's
            raise ValueError(f"an optimizer's averages of shapes {printable(shapes)[:200]}")


def compile_methods(cls, *names, backend="inductor"):
    """torch.compile these methods of a class, and so each once for all its instances: 128 experts share one graph.
    dynamic: sequences grow from expert to expert, and each length would be compiled afresh."""
    for name in names:
        setattr(cls, name, torch.compile(getattr(cls, name), dynamic=True, backend=backend))


def take_turns(forms, rounds, device):
    """{name: median seconds} of the functions {name: form}, run in turn `rounds` times after a warm-up round: on a
    shared machine two times taken minutes apart cannot be compared, their ratio within a round can."""
    seconds = {name: [] for name in forms}
    for i in range(rounds + 1):
        for name, form in forms.items():
            synchronize(device)
            started = time.perf_counter()
            form()
            synchronize(device)
            seconds[name] += [time.perf_counter() - started] if i else []
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def on_meta(build):
    """build() on the meta device: shapes without memory, and no time spent on drawing weights."""
    with torch.device("meta"), Unfilled():
        return build()


class Unfilled(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__.endswith(("normal_", "uniform_")):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def count(members):
    """Numbers in parameters and modules (buffers left out)."""
    return sum(p.numel() for m in members for p in (m.parameters() if isinstance(m, nn.Module) else [m]))


class Ema:
    """Exponential moving average of a model's weights (Polyak averaging). Early steps use a shorter memory."""

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine, new = list(self.model.parameters()), [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(mine, new, 1 - decay)      # mine + (1 - decay) * (new - mine): frozen ones stay bit-equal
        for buffer, source in zip(self.model.buffers(), model.buffers()):
            buffer.copy_(source)

    def state_dict(self):
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.updates = int(state["updates"])


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: do they agree, is each still there, and which one says why they end

def setup_ranks(device):
    """(rank, world) as torchrun set them; starts the process group (nccl on CUDA, gloo on the CPU) and the watch."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        # a prefix for each try: after a --max-restarts torch would read the addresses of the ranks that are gone
        store = dist.PrefixStore(f"try {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", rank_store())
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
        Watch.current = Watch(rank, world)
        host_group()                # all have come this far, so the watch will find a first sign of life of everybody
        Watch.current.start()
    return rank, world


@functools.cache
def rank_store():
    """A client of torchrun's key-value store, whose content outlives a --max-restarts. (Where no agent of torchrun's
    keeps one, rank 0 does.)"""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"]),
                         is_master=not agent and os.environ["RANK"] == "0", multi_tenant=True)


@functools.cache
def host_group():
    """All ranks, talking through their CPUs and as patient as extracting ImageNet's codes needs (NCCL gives up after
    ten minutes). That nobody waits for a rank that is gone is Watch's business."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def gather(value, world):
    """[value of every rank], on every rank."""
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value, group=host_group())
    return values


def agree(facts, world):
    """Raise BadInput, on all ranks, where one has other facts than rank 0. facts: {what: a short text or number}."""
    (first_host, first), *others = gather((socket.gethostname(), facts), world)
    for rank, (host, theirs) in enumerate(others, 1):
        for what in first | theirs:
            if first.get(what) != theirs.get(what):
                raise BadInput(f"rank {rank} on {host} has {what} {theirs.get(what)}, rank 0 on {first_host} has "
                               f"{first.get(what)}. Give all ranks the same command, and let them see the same files")


class Watch(threading.Thread):
    """A thread of each rank that tells the others, every second, that its process lives, which step it is at and where
    in the code. It ends the process, and one rank says why, when another rank's process is gone, when it has been silent
    for --hang seconds (it was stopped, or its machine is gone), or when all ranks are in a step and none has finished one
    for --hang seconds.

    Without it the others would wait for half an hour, and then not know for whom. (On gloo the broken connections of a
    killed rank are noticed first; see `launch`.) Seconds are counted in signs of one's own, so that a machine that sleeps,
    with all that runs on it, gives no alarm.
    """
    current = None          # this process's own, where there are several ranks

    def __init__(self, rank, world):
        super().__init__(daemon=True)
        self.rank, self.prefix = rank, f"watch {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self.keys = [f"{self.prefix} {r}" for r in range(world)]
        self.store = rank_store().clone()       # a connection of its own: one that waits holds up all who share it
        self.doing, self.step = "starting", 0
        self.hang = self.step_hang = TrainConfig.hang       # seconds: of silence, and in one step; 0: for ever
        self.signs, self.ended = [], threading.Event()
        self._tell(0, "its start")

    def _tell(self, second, where):
        sign = {"second": second, "host": socket.gethostname(), "pid": os.getpid(), "doing": self.doing,
                "step": self.step, "where": where}
        self.store.set(self.keys[self.rank], json.dumps(sign))

    def run(self):
        silent, still, second = [0] * len(self.keys), 0, 0
        while not self.ended.wait(1):
            second += 1
            try:
                self._tell(second, place())
                before, self.signs = self.signs, [json.loads(text) for text in self.store.multi_get(self.keys)]
            except RuntimeError:
                self._end("torchrun's own process is gone, and the ranks end with it")
            if not before:
                continue
            for rank, (old, new) in enumerate(zip(before, self.signs)):
                silent[rank] = silent[rank] + 1 if old["second"] == new["second"] and new["doing"] != "ended" else 0
                if silent[rank] >= 3 and new["doing"] == "failed":      # it has said why; the others wait in vain
                    self._end(f"rank {rank} has ended with an error")
                if silent[rank] >= 3 and self._is_dead(new):
                    self._end(self._gone(rank))
            in_step = all(new["doing"] == "step" == old["doing"] and new["step"] == old["step"]
                          for old, new in zip(before, self.signs))
            still = still + 1 if in_step else 0
            if self.hang and max(silent) >= self.hang:
                lost = self.signs[rank := silent.index(max(silent))]
                line = (f"rank {rank} (process {lost['pid']} on {lost['host']}) has not been heard of for {max(silent)} s: "
                        f"stopped, or its machine is gone. It was at {lost['where']}, after step {lost['step']}")
                self._end(line, kill=lost["pid"] if lost["host"] == socket.gethostname() else None)
            if self.step_hang and still >= self.step_hang:
                places = {}
                for rank, sign in enumerate(self.signs):
                    places.setdefault(sign["where"], []).append(str(rank))
                where = "; ".join(f"rank{'s' * (len(r) > 1)} {', '.join(r)} at {w}" for w, r in places.items())
                self._end(f"no step for {still} s after step {self.step}: {where}. Whoever is at another place "
                          f"than most of them hangs (a disk?). Where steps may take so long: --hang SECONDS")

    def _end(self, line, kill=None):
        say_cause(f"{Path(sys.argv[0]).name}: {line}. The last checkpoint is whole: go on with --resume")
        if kill:
            with suppress(OSError):
                os.kill(kill, signal.SIGKILL)   # a stopped process would keep torchrun waiting for another 30 s
        os._exit(1)                             # the main thread waits for a rank that will not come

    def lost_rank(self, error):
        """A line about who is gone, for a rank whose connection to it broke."""
        for _ in range(30):     # 3 s: the parent of a dead process may take a moment to see it
            for rank, sign in enumerate(self.signs):
                if sign["doing"] not in ("ended", "failed") and self._is_dead(sign):
                    return f"{self._gone(rank)}. The last checkpoint is whole: go on with --resume"
            time.sleep(0.1)
        return ("another rank has ended, or cannot be reached; if it could say why, its line stands here too "
                f"({str(error).splitlines()[0][:200]}). Go on with --resume")

    def _gone(self, rank):
        sign = self.signs[rank]
        return (f"rank {rank} (process {sign['pid']} on {sign['host']}) is gone without a word, at {sign['where']}, after "
                f"step {sign['step']}: killed, perhaps for want of memory")

    def _is_dead(self, sign):
        return sign["host"] == socket.gethostname() and is_dead(sign["pid"])

    def stop(self, how):
        self.doing = how
        self.ended.set()
        with suppress(RuntimeError):
            self._tell(-1, "its end")


def say_cause(line):
    """Print why this process ends, unless another rank has said already why all of them do."""
    watch = Watch.current
    with suppress(RuntimeError):        # no store any more: better said twice than not at all
        if watch is not None and watch.store.add(f"{watch.prefix} cause", 1) > 1:
            return
    bar_open = len(getattr(tqdm, "_instances", ()))     # then the cursor stands at the end of the bar
    print("\n" * bool(bar_open or watch is not None) + printable(line), file=sys.stderr, flush=True)


def place():
    """Where in the project's code the main thread is: "data.py:572 read"."""
    frame, here = sys._current_frames().get(threading.main_thread().ident), os.path.dirname(os.path.abspath(__file__))
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith("<") and os.path.dirname(os.path.abspath(file)) == here:
            return f"{os.path.basename(file)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "no line of this project"


def is_dead(pid):
    """True if there is no such process on this machine, or nothing is left of it but its exit code (Linux)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# A run: device, seed, folder, progress, log

def choose_device(asked):
    """--device, else this rank's GPU where CUDA is present, else the CPU."""
    if asked not in (None, "cuda"):
        return torch.device(asked)
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")


class Run:
    """One training run of one stage: its checkpoint is <out>/<name>.pt, its log <out>/<name>.jsonl.

    Raises BadInput where results exist and neither --resume nor --overwrite was given, or where they were made with
    other settings. A run that is finished already says so and leaves with exit code 0. settings: what else must be the
    same in a resumed run; free: names of settings that need not.
    """

    def __init__(self, args, stage, name, config, training, free=(), **settings):
        self.args, self.stage, self.config, self.training = args, stage, config, training
        self.settings = {"seed": args.seed, **settings}
        # not "accumulate": it changes which images a step sees
        self.free = {"steps", "workers", "log_every", "save_every", "keep", "preview_every", "hang", "bf16", "compile",
                     "recompute", *free}
        self.device = choose_device(args.device)
        self.rank, self.world = setup_ranks(self.device)
        self.main = self.rank == 0
        if Watch.current is not None:
            Watch.current.hang = training.hang
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.piece = training.batch_size // training.accumulate     # images of one forward pass, over all ranks
        if training.batch_size % (self.world * training.accumulate):
            raise BadInput(f"--batch_size {training.batch_size}: not a multiple of {self.world} ranks x "
                           f"{training.accumulate} pieces (--accumulate)")
        torch.manual_seed(args.seed)      # the same on all ranks while the model is made; see track()
        self.path, self.log_path = args.out / f"{name}.pt", args.out / f"{name}.jsonl"
        self.older, self.lock = args.out / "older", None
        self.step, self.tracked, self.seconds = 0, {}, 0.0
        self.machine = what_decides_rounding(self.device, self.world)
        self._on_main(self._take_folder)
        self.checkpoint = self._existing_results()
        agree({**dataclasses.asdict(config), **dataclasses.asdict(training), **self.settings,
               "--out": str(args.out), "--resume": args.resume, "torch": str(torch.__version__),
               f"in {self.path}": digest(self.path) if self.checkpoint is not None else "nothing"}, self.world)
        if self.checkpoint is not None:
            self.step = self.checkpoint["step"]
            self._say_what_differs(self.checkpoint.get("machine", {}))
        self.stop_asked = 0.0               # when
        self.sums, self.first_bad = {}, {}      # of each logged value: (sum, steps); its first step that is not finite
        self.saved_at, self.on_disk = -1, self.step         # on_disk: the step of the checkpoint that the next one replaces
        self.norms, self.troubles = deque(maxlen=50), set()
        self.board = self._tensorboard() if args.tensorboard and self.main else None

    def _on_main(self, action):
        """The first rank does it. Where it finds something wrong, all ranks end, and not only the one."""
        error = None
        if self.main:
            try:
                action()
            except (BadInput, OSError) as caught:
                error = str(caught)
        error = gather(error, self.world)[0]
        if error is not None:
            raise BadInput(error)

    def _take_folder(self):
        """Found out now, not after an hour at the first checkpoint: can be written, and nobody else writes there."""
        self.lock = lock(self.path.with_name(f".{self.path.stem}.lock"), f"trains {self.path.name}")
        probe = self.path.with_suffix(".probe")
        write_atomically(probe, lambda temporary: temporary.write_bytes(b""))
        probe.unlink()

    def _look_after_folder(self):
        if not self.args.out.exists():      # removed, or its disk is gone: what is in memory is worth keeping
            self.say(f"{self.args.out}: the folder has vanished, with all that was in it. It is made anew, and the run goes "
                     f"on there")
            self._take_folder()

    def _existing_results(self):
        """The checkpoint to go on from, or None."""
        if self.args.overwrite or not self.path.exists():
            return None
        checkpoint = load_checkpoint(self.path, self.stage)
        self._check_settings(checkpoint)
        if checkpoint["step"] >= self.training.steps:
            self.say(f"{self.path}: complete ({checkpoint['step']} steps); --overwrite starts anew")
            release(self.lock)
            raise SystemExit(0)
        if not self.args.resume:
            raise BadInput(f"{self.path}: holds an unfinished run, step {checkpoint['step']} of {self.training.steps}. "
                           f"Go on with --resume, or start anew with --overwrite")
        return checkpoint

    def _check_settings(self, checkpoint):
        theirs_settings = checkpoint.get("settings", {})
        for mine, theirs in ((dataclasses.asdict(self.config), checkpoint["config"]),
                             (dataclasses.asdict(self.training), checkpoint.get("training", {})),
                             # what a checkpoint of an earlier version does not say cannot be compared
                             ({k: v for k, v in self.settings.items() if k in theirs_settings}, theirs_settings)):
            for key in sorted(mine.keys() | theirs.keys()):
                if key in self.free or mine.get(key) == theirs.get(key):
                    continue
                if key in ("learning_rate", "end_learning_rate") and hasattr(self.args, key):
                    self.say(f"{self.path}: was made with {key}={theirs.get(key)}, and goes on with {mine[key]}, as asked")
                    continue
                raise BadInput(f"{self.path}: was made with {key}={theirs.get(key)}, not {mine.get(key)}. "
                               f"Choose another --out, or start anew with --overwrite")

    def _say_what_differs(self, before):
        changed = [f"{what} {before.get(what)} -> {now}" for what, now in self.machine.items() if before.get(what) != now]
        if before and changed:
            self.say(f"{self.path}: goes on elsewhere than it began ({'; '.join(changed)}), so not bit-equal to a run that "
                     f"stayed")

    def _tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BadInput("--tensorboard: the package is missing. Install it: pip install tensorboard") from error
        return SummaryWriter(self.args.out / "tensorboard" / self.path.stem)

    # -- what a stage calls --------------------------------------------------------------------------------------------

    def track(self, **parts):
        """Name what a checkpoint holds (each has state_dict and load_state_dict); restore it on --resume.

        Give the bare model, not what run.parallel made of it. Later calls exchange a part, as hnt.py does with its
        optimizer, and restore nothing.
        """
        first = not self.tracked
        self.tracked.update(parts)
        self.settled = self.step + 2    # before that a step may compile, tune and allocate, and is no measure for Watch
        self._tell("starting")
        if not first:
            return
        torch.manual_seed(self.args.seed + 1000 * self.rank)    # from here on each rank draws its own masks and dropout
        if self.checkpoint is not None:
            try:
                for name, part in self.tracked.items():
                    restore(part, self.checkpoint[name])
                if len(self.checkpoint["random"]) == self.world:
                    restore_random_state(self.checkpoint["random"][self.rank])
                else:
                    torch.manual_seed(self.args.seed + 1000 * self.rank + self.step)    # not the masks of step 0 again
                    self.say("another number of ranks than before: the random state starts anew")
                # float() raises where a damaged or hostile file has no number
                self.sums = {name: (total, int(count)) for name, (total, count)
                             in self.checkpoint.get("unlogged", {}).items() if isinstance(float(total), float)}
            except Exception as error:      # whatever stands in the file in place of what save() wrote
                raise BadInput(f"{self.path}: does not fit this run ({first_line(error)}). Start anew with --overwrite"
                               ) from error
        self.checkpoint = None

    def adamw(self, parameters, betas=None):
        """AdamW over the parameters that train and nothing else. Weight decay where ndim >= 2 (nanoGPT's rule).
        betas: others than the settings'."""
        t, parameters = self.training, [p for p in parameters if p.requires_grad]
        groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": t.weight_decay},
                  {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=t.learning_rate, betas=betas or (t.beta1, t.beta2), fused=True)

    def set_learning_rate(self, optimizer, step, scale=1.0):
        """Linear warm-up, a cosine from learning_rate to end_learning_rate, times scale: a function of the step."""
        t = self.training
        progress = max(0, step - t.warmup) / max(1, t.steps - t.warmup)
        rate = t.end_learning_rate + (t.learning_rate - t.end_learning_rate) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = scale * rate * min(1.0, (step + 1) / max(1, t.warmup))

    def parallel(self, module):
        """DistributedDataParallel under torchrun, the module itself otherwise."""
        if self.world == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # gradients live in the buckets that cross ranks, not beside them: 4 bytes a parameter less
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def pieces(self, batches, module):
        """The --accumulate pieces of one step's batch, on the device; gradients cross ranks with the last one only, so
        forward and backward must happen inside the loop over this (not over a list of it)."""
        for i in range(self.training.accumulate):
            images, labels = next(batches)
            last = i == self.training.accumulate - 1
            with nullcontext() if last or self.world == 1 else module.no_sync():
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def autocast(self):
        """bfloat16 where CUDA is present and --bf16 is on; otherwise float32 (TF32 in the products on CUDA)."""
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.training.bf16 and self.device.type == "cuda")

    def steps(self):
        """Yield the steps still to do; save every so often, at the end, and on Ctrl-C, SIGTERM or a closed terminal."""
        self._on_main(self._begin)
        signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        signals = [s for s in signals if signal.getsignal(s) != signal.SIG_IGN]         # nohup's, for a closed terminal
        before = [signal.signal(s, self._ask_to_stop) for s in signals]
        self.bar = tqdm(total=self.training.steps, initial=self.step, desc=self.path.stem, unit="step",
                        disable=None if self.main else True, mininterval=1.0, dynamic_ncols=True)     # None: no terminal
        self.started = self.logged_time = now = time.perf_counter()
        self.logged_step, shortest = self.step, math.inf
        try:
            while self.step < self.training.steps:
                self._tell("step" if self.step >= self.settled else "starting")
                yield self.step
                shortest = min(shortest, time.perf_counter() - now)
                if Watch.current is not None:       # a step that is slow by nature does not hang
                    Watch.current.step_hang = self.training.hang and max(self.training.hang, 10 * shortest)
                self.step += 1
                self.bar.update()
                if self.step % self.training.log_every == 0 or self.step == self.training.steps:
                    self._write_log()
                if self.step < self.training.steps and self._shall_stop():
                    self.save()
                    raise Interrupted(f"{self.path} holds step {self.step} of {self.training.steps}; "
                                      f"go on with --resume")
                if self.step % self.training.save_every == 0 or self.step == self.training.steps:
                    self.save()
                now = time.perf_counter()
        finally:
            self._tell("ending")
            release(self.lock)
            self.bar.close()
            if self.board:
                self.board.close()
            for s, handler in zip(signals, before):
                signal.signal(s, handler)

    def _begin(self):
        needed, free = self._checkpoint_bytes(), free_space(self.args.out)
        if needed > free:
            raise BadInput(f"{self.args.out}: a checkpoint takes {size(needed)}, and {size(free)} are free there. Free some "
                           f"space, or choose another folder with --out")
        if self.args.overwrite:         # only now, when nothing can stop the new run any more
            self.log_path.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            for old in (*self._older(), *self.older.glob(f"{self.path.stem}_before_*.pt")):
                old.unlink()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            rank_store().set("began", "")
        self._cut_log()
        keep = self.training.keep
        self.say(f"{self.args.out}: takes {size((keep + 1) * needed)} ({keep} checkpoint{'s' * (keep > 1)} of "
                 f"{size(needed)} and the one being written); {size(free)} are free")

    def _checkpoint_bytes(self):
        """What a checkpoint takes: the tensors, and two averages for each number that AdamW trains."""
        tensors = [t for part in self.tracked.values() for t in tensors_in(part.state_dict())]
        trained = [p for part in self.tracked.values() if isinstance(part, torch.optim.Optimizer) and not part.state
                   for group in part.param_groups for p in group["params"]]
        return sum(t.nbytes for t in tensors) + 2 * sum(p.nbytes for p in trained)

    def _tell(self, doing):
        if Watch.current is not None:
            Watch.current.doing, Watch.current.step = doing, self.step

    def log(self, step, **values):
        """Remember this step's values (tensors stay on the device: nothing waits for the GPU until a line is due)."""
        for name, value in values.items():
            value = value.detach().double() if torch.is_tensor(value) else float(value)
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)
            bad = torch.where(torch.isfinite(torch.as_tensor(value)), math.inf, float(step))
            known = self.first_bad.get(name)
            self.first_bad[name] = bad if known is None else torch.minimum(known, bad)

    def preview(self, step):
        """True on rank 0 when a preview picture is due."""
        due = (step + 1) % self.training.preview_every == 0 or step + 1 == self.training.steps
        if self.main and due:
            self._tell("preview")
        return self.main and due

    def say(self, line):
        if self.main:
            try:
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:         # `| tee` was killed: days of training do not end for want of a listener
                sys.stdout = open(os.devnull, "w")

    def save(self):
        """Write the checkpoint to a temporary name and rename it; all ranks call it. Raises BadInput instead where a
        loss was not finite, on all ranks."""
        self._stop_if_not_finite()
        states = gather(random_state(), self.world)
        if self.saved_at == self.step:
            return
        self._tell("saving")
        checkpoint = {"stage": self.stage, "step": self.step, "config": dataclasses.asdict(self.config),
                      "training": dataclasses.asdict(self.training), "settings": self.settings, "random": states,
                      "machine": self.machine, "unlogged": self.sums,       # so that the next line of the log is the same
                      **{name: part.state_dict() for name, part in self.tracked.items()}}
        self._on_main(lambda: self._write(checkpoint))
        self.saved_at = self.step

    def _write(self, checkpoint):
        for name in self.tracked:       # the last update may have broken weights whose loss nobody has seen yet
            if not all(t.isfinite().all() for t in tensors_in(checkpoint[name]) if t.is_floating_point()):
                raise BadInput(f"{name} is not finite after step {self.step}; {self._what_is_kept()}. Try a smaller "
                               f"--learning_rate" + " or --no-bf16" * self.training.bf16)
        self._look_after_folder()
        needs = sum(t.nbytes for t in tensors_in(checkpoint))
        if self.training.keep > 1 and self.on_disk and self.path.exists():
            # just before it is replaced: with two names for long, `cp` over the one would change the other
            write_atomically(self.older / f"{self.path.stem}_step{self.on_disk}.pt", self._second_name)
        write_atomically(self.path, functools.partial(save_to_disk, checkpoint), needs)
        self.on_disk = self.step
        for old in self._older()[:1 - self.training.keep] if self.training.keep > 1 else ():
            old.unlink()

    def _second_name(self, temporary):
        temporary.unlink(missing_ok=True)
        try:
            os.link(self.path, temporary)
        except OSError:                 # a disk without hard links
            shutil.copyfile(self.path, temporary)

    def _older(self):
        """The kept checkpoints, the oldest first: by time, since a run that went back makes steps of before anew."""
        return sorted((path for path in self.older.glob("*.pt")
                       if re.fullmatch(re.escape(self.path.stem) + r"_step\d+\.pt", path.name)),
                      key=lambda path: path.stat().st_mtime_ns)

    # -- what it does for itself --------------------------------------------------------------------------------------

    def _ask_to_stop(self, number, frame):
        # Asked again after a while: the last checkpoint is whole, so leaving at once loses only steps. Within moments
        # it is the same wish: torchrun passes on a Ctrl-C that its ranks have got already.
        if self.stop_asked and time.monotonic() > self.stop_asked + 2:
            raise KeyboardInterrupt(f"Left at once; the last checkpoint is {self.path}")
        self.stop_asked = self.stop_asked or time.monotonic()

    def _shall_stop(self):
        if self.world == 1:
            return bool(self.stop_asked)
        if self.step % 4:                   # all ranks must stop at the same step, and asking costs a round trip
            return False
        asked = torch.tensor(self.stop_asked)                   # between the hosts: no GPU is waited for
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=host_group())
        return bool(asked)

    def _what_is_kept(self):
        return f"{self.path} keeps the last good checkpoint" if self.path.exists() else "nothing was saved yet"

    def _stop_if_not_finite(self):
        """All ranks leave together, if the loss or the gradient of one was not finite."""
        if not self.first_bad:
            return
        bad = torch.stack([b.to(self.device, torch.float64) for b in self.first_bad.values()])      # [names], steps
        if self.world > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MIN)
        steps = dict(zip(self.first_bad, bad.tolist()))
        # grad_norm too: the loss is from before this step's update, so weights that a bad gradient broke would be saved
        # before a loss shows it
        watched = min(steps.get("loss", math.inf), steps.get("grad_norm", math.inf))
        if math.isfinite(watched):
            first = [name for name, step in steps.items() if step <= watched and name != "grad_norm"]
            norms = f", whose norm was about {self.norms[-1]:.2g}" if self.norms else ""
            what = f"{', '.join(first)} is" if first else f"the gradient{norms}, is"
            raise BadInput(f"not finite at step {int(watched) + 1}: {what} the first; {self._what_is_kept()}. Go on from it "
                           f"with --resume and a smaller --learning_rate" + " or --no-bf16" * self.training.bf16)

    def _look_for_trouble(self, means):
        """Say it once when the gradient's norm explodes or the codebook collapses, and put the last checkpoint aside,
        since the next one may hold what is broken. The run goes on: clipping may catch the one, revival the other."""
        norm, usual = means.get("grad_norm"), statistics.median(self.norms) if len(self.norms) >= 5 else math.inf
        codes, perplexity = getattr(self.config, "codebook_size", 0), means.get("perplexity", math.inf)
        found = {}
        if norm is not None and norm > 30 * usual:
            found["gradient"] = (f"the gradient's norm explodes: {norm:.3g}, where {usual:.3g} was usual. Likely the "
                                 f"learning rate is too high, or a batch is broken; try a smaller --learning_rate")
        # perplexity: how many codes would be in use if all were used alike
        if self.step > self.training.warmup and len(self.norms) >= 5 and perplexity < codes / 10:
            found["codebook"] = (f"the codebook collapses: perplexity {perplexity:.3g} with {codes} codes. Likely the "
                                 f"learning rate is too high, or dead codes are not revived (--revive_below)")
        for name in found.keys() - self.troubles:
            copy, kept = self.older / f"{self.path.stem}_before_{name}.pt", ""
            if self.path.exists() and not copy.exists():        # the first time's: what comes later may be worse
                write_atomically(copy, lambda temporary: shutil.copyfile(self.path, temporary))
            if copy.exists():
                kept = f". A checkpoint of before is put aside as {copy}: to go back, copy it to {self.path}"
            self.say(f"step {self.step}: {found[name]}{kept}")
        self.troubles |= found.keys()
        if norm is not None:
            self.norms.append(norm)

    def _write_log(self):
        if not self.sums:
            return
        self._stop_if_not_finite()
        sums, self.sums = self.sums, {}
        if not self.main:       # the log holds the first rank's share of the batch
            return
        self._tell("logging")           # with what may follow: a copy of the checkpoint on a slow disk
        now = time.perf_counter()
        means = {name: float(total) / count for name, (total, count) in sums.items()}
        self._look_for_trouble(means)
        rate = (self.step - self.logged_step) * self.training.batch_size / (now - self.logged_time)
        line = {"step": self.step, **means, "images_per_s": rate, "seconds": self.seconds + now - self.started}
        self.logged_time, self.logged_step = now, self.step
        self._look_after_folder()
        try:
            with open(self.log_path, "a") as file:
                file.write(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n")
        except OSError as error:        # a line is not worth a run; where the disk stays full, the next save says so
            self.say(f"{self.log_path}: a line cannot be written ({error.strerror}); the run goes on without it")
        text = f"loss {means['loss']:.3f}, {line['images_per_s']:.0f} images/s"
        self.bar.set_postfix_str(text)
        if self.bar.disable:        # a file: a bar would fill it
            self.say(f"step {self.step} of {self.training.steps}: {text}")
        for name, value in line.items() if self.board else ():
            self.board.add_scalar(name, value, self.step)

    def _cut_log(self):
        """Drop lines beyond the checkpoint (they come again) or cut short by a kill; go on counting seconds."""
        if self.step == 0 and self.log_path.exists() and not self.args.resume:      # of a run whose checkpoint was moved
            os.replace(self.log_path, self.log_path.with_suffix(".old.jsonl"))
        kept = [line for line in read_log(self.log_path) if line["step"] <= self.step]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self.norms.extend(line["grad_norm"] for line in kept if "grad_norm" in line)
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if self.log_path.exists() and self.log_path.read_text(errors="replace") != text:
            write_atomically(self.log_path, lambda temporary: temporary.write_text(text))


def read_log(path):
    """The lines of a run's JSONL log as dicts, without any that a kill cut short or a disk damaged."""
    lines = []
    for text in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else ():
        try:
            line = json.loads(text)
            if type(line["step"]) is not int or not all(isinstance(n, (int, float)) for n in (line["seconds"], *line.values())):
                continue
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        lines.append(line)
    return lines


def random_state():
    """This process's random state, of the CPU and of the current CUDA device. Nothing here draws from NumPy's."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0, dtype=torch.uint8)
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def save_to_disk(checkpoint, path):
    with open(path, "wb") as file:      # given a name, torch closes the file holding Python's lock: minutes on a slow disk
        torch.save(checkpoint, file)


def tensors_in(state):
    """All tensors of a nested dict or list."""
    if torch.is_tensor(state):
        return [state]
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for part in inside for tensor in tensors_in(part)]


def what_decides_rounding(device, world):
    """What must stay for a resumed run to be bit-equal, beside the settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"torch": str(torch.__version__), "device": name, "ranks": world, "threads": torch.get_num_threads()}


def processor():
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", cpu)
    return name[1] if name else platform.processor() or platform.machine()


def digest(path):
    """8 hex digits of what is in a checkpoint: of the checksums that its archive keeps, so nothing is read but those."""
    with zipfile.ZipFile(path) as archive:
        return hashlib.sha256(repr([(i.filename, i.CRC) for i in archive.infolist()]).encode()).hexdigest()[:8]


def restore_random_state(state):
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]):
        torch.cuda.set_rng_state(state["cuda"])


def fingerprint(module, leave_out=()):
    """16 hex digits that change when any parameter or buffer does whose name starts with none of leave_out."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not name.startswith(tuple(leave_out)):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
