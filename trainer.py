"""What all stages share beside the method: flags, checkpoints, ranks, the log.

A resumed run equals an uninterrupted one, bit for bit on a CPU: the order of images is a function
of (seed, step), the learning rate one of the step, and the random state is saved with the weights.
"""
import argparse
import copy
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
from torch import nn


class BadInput(ValueError):
    """One line for the user: what is wrong, where, and what to do."""


def launch(main):
    """Run main(). BadInput ends in one line and exit code 2, Ctrl-C in one line and code 130."""
    try:
        main()
    except (BadInput, KeyboardInterrupt) as error:
        # a worker's error comes with its traceback: the last line
        line = (str(error).strip() or "interrupted").splitlines()[-1]
        with suppress(OSError):     # a pipe or terminal may be closed
            print(f"{sys.argv[0]}: {line.removeprefix('trainer.BadInput: ')}", file=sys.stderr)
        os._exit(2 if isinstance(error, BadInput) else 130)     # waits for no other rank
    except Exception:
        if not multiprocessing.active_children():
            raise
        with suppress(OSError):
            traceback.print_exc()
        os._exit(1)     # workers ignore SIGTERM: Python would wait for them forever
    if dist.is_initialized():
        patient_group.cache_clear()     # else its threads would outlive it, and may abort at exit
        dist.destroy_process_group()


# ---- Settings: each field of a dataclass is a flag, and the comment beside it is the flag's help,
# unless it says that the field is "read off" something: then it is not a flag

@dataclass(frozen=True)
class TrainConfig:
    """How a stage is trained. Defaults: the paper's Table 4."""
    steps: int = 500_000                # optimizer steps
    batch_size: int = 256               # images per step, over all ranks
    micro_batch: int = 64               # most images on one GPU at once; the rest is accumulated
    learning_rate: float = 1e-4         # AdamW: after the warm-up
    end_learning_rate: float = 1e-5     # AdamW: at the last step of the cosine
    warmup: int = 5_000                 # steps of linear warm-up
    beta1: float = 0.9                  # AdamW: momentum
    beta2: float = 0.99                 # AdamW: second moment
    weight_decay: float = 1e-4          # AdamW: on matrices and convolutions
    clip: float = 1.0                   # largest gradient norm
    ema: float = 0.999                  # decay of the averaged weights, used by all later stages
    bf16: bool = True                   # bfloat16 autocast on CUDA
    compile: bool = False               # torch.compile the transformer blocks
    recompute: bool = False             # run experts again in backward; default above 64 tokens
    workers: int = 8                    # processes that decode images, per rank
    log_every: int = 100                # steps between two lines of the log
    save_every: int = 5_000             # steps between two checkpoints
    preview_every: int = 5_000          # steps between two preview pictures


def make_parser(description, **kwargs):
    """An argparse parser with one line of help per flag, and errors of one line."""
    return argparse.ArgumentParser(
        description=description.split("\n\n")[0], usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=36, width=120), **kwargs)


def command_line(description, *config_classes, **kwargs):
    """A parser with the flags that stages share, and one for each field of these dataclasses."""
    parser = make_parser(description, **kwargs)
    add = parser.add_argument
    add("--config", choices=("toy", "small", "full"), metavar="NAME",
        help="toy, small or full; default: full with CUDA, else toy")
    add("--data", help="shapes, fashion, auto or a folder; default: toy auto, else data/imagenet")
    add("--out", help="folder for results; default: out/<config>")
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda or mps; default: cuda if present, else cpu")
    if config_classes:      # something is trained
        either = parser.add_mutually_exclusive_group().add_argument
        either("--resume", action="store_true", help="continue from the checkpoint if there is one")
        either("--overwrite", action="store_true", help="start again and replace the old results")
        add("--tensorboard", action="store_true", help="log for tensorboard, too")
    for cls in config_classes:
        add_fields(parser.add_argument_group(f"{cls.__name__}, defaults by --config"), cls)
    return parser


def add_fields(parser, cls, names=None):
    """A flag for each field of the dataclass, or only for those in names."""
    comments = dict(re.findall(r"(?m)^    (\w+): [^#\n]+#\s*(.*)$", inspect.getsource(cls)))
    for field in fields(cls):
        kind, text = field.type, comments.get(field.name, "")
        if is_dataclass(kind) or "read off" in text or (names and field.name not in names):
            continue
        how = {"metavar": "", "type": finite if kind is float else kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind == tuple[int, ...]:
            how["type"] = lambda value: tuple(map(int, value.split(",")))
        elif choices := get_args(kind):     # Literal["a", "b"]
            how = {"metavar": "", "choices": choices, "type": type(choices[0])}
            text += ": %(choices)s"
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **how)


def finite(text):
    """The value of a float flag: NaN would pass every comparison."""
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def refuse(args, names, why):
    """Raise BadInput if one of these flags was given."""
    for name in names:
        value = getattr(args, name, None)
        if value is not None and value is not False:
            raise BadInput(f"--{name}: {why}")


def parse(parser):
    """Parse the flags and fill in --config, --data, --out and --device."""
    args = parser.parse_args()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        refuse(args, ["overwrite"], "a restart would delete what is saved. Give --resume")
    default = ("full", "CUDA is present") if torch.cuda.is_available() else ("toy", "no CUDA here")
    args.config, args.why = (args.config, "asked for") if args.config else default
    args.data = args.data or ("auto" if args.config == "toy" else "data/imagenet")
    args.out = Path(args.out or f"out/{args.config}")
    args.device = choose_device(args.device)
    return args


def choose_device(asked=None):
    """The torch.device of --device; by default this rank's GPU with CUDA, else the CPU."""
    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise BadInput(f"--device {name}: CUDA is not present here. Give --device cpu")
    device = torch.device(name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)     # it plans for each length: MoCET has L
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # less fragmentation, unless the user has chosen
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    return device


def override(preset, args):
    """The preset with every field replaced that the command line names."""
    given = {f.name: getattr(args, f.name) for f in fields(preset) if hasattr(args, f.name)}
    return replace(preset, **given)


# ---- Files

def write_atomically(path, write):
    """Call write(a temporary file), then rename that: at path is a whole file, old or new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.writing{os.environ.get('RANK', '')}")
    with open(temporary, "w+b") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())     # before the rename, or a power cut could leave a hole
    os.replace(temporary, path)


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def save(checkpoint, path):
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def lock(path, wait=False):
    """Lock a file until the returned one is closed. If another process has it: wait, or fail."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except ImportError:     # Windows: two runs in one folder are not kept apart
        pass
    except (BlockingIOError, PermissionError):
        raise BadInput(f"{path.parent}: another run writes there. Choose another --out") from None
    return file


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def read_weights(source):
    """A state dict, itself or in a file; all its numbers are finite."""
    if isinstance(source, dict):
        state = source
    elif Path(source).suffix == ".safetensors":
        from safetensors.torch import load_file         # an optional package
        state = load_file(source)
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):    # LlamaGen's flags
            state = torch.load(source, map_location="cpu", weights_only=True)
    state = state.get("model", state)       # our checkpoints, LlamaGen's: {"model": {..}, ..}
    for name, tensor in state.items():
        if not tensor.is_meta and not tensor.isfinite().all():
            raise BadInput(f"{name} has numbers that are not finite")
    # without the prefixes that torch's wrappers put before the names
    return {name.replace("_orig_mod.", "").removeprefix("module."): tensor
            for name, tensor in state.items()}


def load_checkpoint(path, stages, make):
    """A checkpoint's dict. stages: the kind it must be, or a tuple of kinds (vqgan, tokenizer, ar,
    maskgit). make: the command that makes one."""
    if not Path(path).exists():
        raise BadInput(f"{path}: not found. Train it first: {make}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        stage = checkpoint["stage"]
    except Exception as error:          # torch raises many kinds here
        raise BadInput(f"{path}: not a checkpoint, or cut short ({first_line(error)}). Make it "
                       f"again: {make}") from error
    stages = (stages,) if isinstance(stages, str) else stages
    if stage not in stages:
        raise BadInput(f"{path}: of stage {stage!r}, wanted {' or '.join(stages)}. Make it: {make}")
    return checkpoint


def load_model(make, config_class, checkpoint, path):
    """make(config) with a checkpoint's averaged weights, frozen and in eval mode."""
    try:
        model = make(config_class(**checkpoint["config"]))
        model.load_state_dict(read_weights(checkpoint.get("ema", checkpoint)))
    except Exception as error:
        raise BadInput(f"{path}: of another version or size, or damaged "
                       f"({first_line(error)}). Make it again") from error
    return model.eval().requires_grad_(False)


def fingerprint(module, leave_out=()):
    """16 hex digits of all parameters and buffers whose names start with none of leave_out."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not name.startswith(tuple(leave_out)):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_log(path):
    """The lines of a run's log as dicts, without a last one that a kill cut short."""
    text = Path(path).read_text() if Path(path).exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


# ---- Optimizer, schedule, averaged weights

NO_DECAY = "embed", "token", "position", "codebook"     # in a parameter's name, as TiTok


def adamw(module, training, betas=None, no_decay=NO_DECAY):
    """AdamW over the parameters that train, with weight decay on matrices and convolutions."""
    groups = {True: [], False: []}      # by whether they decay
    for name, p in module.named_parameters():
        if p.requires_grad:
            groups[p.ndim >= 2 and not any(word in name for word in no_decay)].append(p)
    groups = [{"params": parameters, "weight_decay": training.weight_decay * decays}
              for decays, parameters in groups.items()]
    betas = betas or (training.beta1, training.beta2)
    return torch.optim.AdamW(groups, training.learning_rate, betas, fused=True)


def cosine(step, training):
    """The learning rate of a step: linear warm-up, then a cosine to end_learning_rate."""
    high, low, warmup = training.learning_rate, training.end_learning_rate, training.warmup
    progress = max(0, step - warmup) / max(1, training.steps - warmup)
    rate = low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
    return rate * min(1.0, (step + 1) / max(1, warmup))


def set_lr(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


class Ema:
    """Exponential moving average of a model's weights. Early steps use a shorter memory."""
    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        new = [p.detach() for p in model.parameters()]      # frozen weights stay bit-equal
        torch._foreach_lerp_(list(self.model.parameters()), new, 1 - decay)
        for buffer, source in zip(self.model.buffers(), model.buffers()):
            buffer.copy_(source)

    def state_dict(self):
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


def compile_methods(cls, *names):
    """Compile methods once for all instances: 128 experts, of different lengths, share a graph."""
    torch._dynamo.config.optimize_ddp = False   # would cut each graph where DDP's buckets end
    for name in names:
        setattr(cls, name, torch.compile(getattr(cls, name), dynamic=True))


# ---- Ranks: the processes that torchrun starts, one per GPU

def setup_ranks(device):
    """(rank, world size) as torchrun set them; starts the process group."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(minutes=10))
    return rank, world


def to_device(x, device):
    """A tensor of a batch on the device; images move as bytes and become float32 in [0, 1]."""
    x = x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
    return x.float() / 255 if x.dtype == torch.uint8 else x


@cache
def patient_group():
    """All ranks, for longer waits, as for another rank's share of the codes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def gather(value):
    """[value of every rank], on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=patient_group())
    return values


# ---- A run

MAY_DIFFER = {"steps", "micro_batch", "learning_rate", "end_learning_rate", "workers", "log_every",
              "save_every", "preview_every", "bf16", "compile", "recompute"}    # in a resumed run


class Run:
    """One training run: its checkpoint is <out>/<name>.pt, its log <out>/<name>.jsonl.

    store: facts for the checkpoint. must_match: what else, beside config, training and data, must
    be the same in a resumed run; may_differ: settings that need not be.
    """
    def __init__(self, args, stage, name, config, training, dataset, may_differ=(), store=None,
                 **must_match):
        self.args, self.stage, self.device = args, stage, args.device
        self.config, self.training, self.store = config, training, store or {}
        self.settings = {"seed": args.seed, "data": dataset.content, **must_match}
        self.path, self.log_path = args.out / f"{name}.pt", args.out / f"{name}.jsonl"
        self.step, self.sums, self.stop_asked = 0, {}, 0.0
        self.rank, self.world = setup_ranks(self.device)
        self.main = self.rank == 0
        share = training.batch_size // self.world       # of a step's images, on this rank
        if share < 1 or share * self.world != training.batch_size:
            raise BadInput(f"--batch_size {training.batch_size}: give a multiple of the number of "
                           f"ranks, {self.world}")
        self.accumulate = next(n for n in range(1, share + 1)
                               if share % n == 0 and share // n <= max(1, training.micro_batch))
        self.lock = self.main and lock(args.out / f".{name}.lock")
        self.checkpoint = self._existing_results(MAY_DIFFER | set(may_differ))
        self.order = (training.batch_size, args.seed, self.step, self.rank, self.world,
                      self.accumulate)      # for data.row_order: which images each step reads
        if args.config == "toy" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)    # docs/results.md: threads that wait slow all others
        facts = [asdict(config), asdict(training), self.settings, self.step]
        if any(other != facts for other in gather(facts)):
            raise BadInput("ranks differ in settings, data or checkpoint: give all the same")
        torch.manual_seed(args.seed)    # the same on all ranks while the model is made
        if args.tensorboard and self.main:
            from torch.utils.tensorboard import SummaryWriter       # pip install tensorboard
            self.board = SummaryWriter(args.out / "tensorboard" / name, purge_step=self.step + 1,
                                       flush_secs=1)
        state = f"resumed at step {self.step} of" if self.step else "new run of"
        self.say(f"config {args.config} ({args.why}), {self.path}: {state} {training.steps} steps")
        self.say(f"data {dataset.name}: {len(dataset):,} images, {len(dataset.classes)} classes"
                 f"{dataset.note}")
        unit = ("rank" if self.device.type == "cpu" else "GPU") + "s" * (self.world > 1)
        self.say(f"device {self.device}; batch {training.batch_size} = {self.world} {unit} x "
                 f"{share // self.accumulate} x {self.accumulate}")

    def _existing_results(self, may_differ):
        """The checkpoint to continue from, or None."""
        if self.args.overwrite or not self.path.exists():
            return None
        checkpoint = load_checkpoint(self.path, self.stage, "with --overwrite")
        old = {**checkpoint["config"], **checkpoint["training"], **checkpoint["settings"]}
        new = {**asdict(self.config), **asdict(self.training), **self.settings}
        for key in sorted((old.keys() | new.keys()) - may_differ):
            if old.get(key) != new.get(key):
                raise BadInput(f"{self.path}: made with {key}={old.get(key)}, not {new.get(key)}. "
                               f"Choose another --out, or --overwrite")
        self.step = checkpoint["step"]
        if self.step >= self.training.steps:
            self.say(f"{self.path}: complete ({self.step} steps); --overwrite starts again")
            raise SystemExit(0)
        if not self.args.resume:
            raise BadInput(f"{self.path}: step {self.step} of {self.training.steps}. Give --resume "
                           f"to continue, or --overwrite to start again")
        return checkpoint

    def parallel(self, module):
        """DistributedDataParallel under torchrun, the module itself otherwise."""
        if self.world == 1:
            return module
        warnings.filterwarnings("ignore", "Grad strides")       # of dimensions of size 1
        return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)

    def start(self, **parts):
        """On --resume load the parts, which a checkpoint holds by these names. From here on Ctrl-C
        saves before it ends the run."""
        # each rank's own masks and dropout
        torch.manual_seed(self.args.seed + 1000 * self.rank + self.step)
        if self.checkpoint:
            for name, part in parts.items():
                part.load_state_dict(self.checkpoint[name])
            if len(self.checkpoint["ranks"]) == self.world:
                rank = self.checkpoint["ranks"][self.rank]
                torch.set_rng_state(rank["cpu"])
                if rank["cuda"] is not None:
                    torch.cuda.set_rng_state(rank["cuda"])
                self.sums = rank["unlogged"]
        elif self.main:
            self.path.unlink(missing_ok=True)       # --overwrite
        self.checkpoint = None
        # steps beyond the checkpoint are taken again, and logged again
        kept = [line for line in read_log(self.log_path) if line["step"] <= self.step]
        if self.main:
            write_text(self.log_path, "".join(json.dumps(line) + "\n" for line in kept))
        trained = sum(p.numel() for p in parts["model"].parameters() if p.requires_grad)
        self.say(f"{trained / 1e6:.2f}M parameters train")
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
            if signal.getsignal(number) != signal.SIG_IGN:      # nohup ignores SIGHUP
                signal.signal(number, self._ask_to_stop)
        self.logged_step, self.logged_at = self.step, time.perf_counter()
        self.started = self.logged_at - (kept[-1]["seconds"] if kept else 0)

    def micro_batches(self, batches, module):
        """The micro-batches of one step on the device, images as float32 in [0, 1]. Forward and
        backward must happen inside the loop over this: ranks average their gradients in the last
        one only."""
        for i in range(self.accumulate):
            last = i == self.accumulate - 1
            with nullcontext() if last or self.world == 1 else module.no_sync():
                yield [to_device(x, self.device) for x in next(batches)]

    def autocast(self):
        """bfloat16 on CUDA with --bf16; otherwise float32."""
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.training.bf16 and self.device.type == "cuda")

    def add(self, **values):
        """Remember a micro-batch's values: a line of the log has the mean over its steps,
        micro-batches and ranks. Nothing waits for the GPU before a line is due."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + torch.as_tensor(value).detach().float(), count + 1)

    def log(self, step, **values):
        """Remember a step's values, and write a line to the log when one is due."""
        self.add(**values)
        self.step = step + 1
        if self.step % self.training.log_every and self.step < self.training.steps:
            return
        means = torch.stack([torch.as_tensor(total, device=self.device) / count
                             for total, count in self.sums.values()])       # [values]
        if self.world > 1:
            dist.all_reduce(means)
        means = dict(zip(self.sums, (means / self.world).tolist()))
        self._stop_if_not_finite(means)
        now, steps = time.perf_counter(), self.step - self.logged_step
        line = {"step": self.step, **means,
                "images_per_s": self.training.batch_size * steps / (now - self.logged_at),
                "seconds": now - self.started}
        self.sums, self.logged_at, self.logged_step = {}, now, self.step
        if not self.main:
            return
        with open(self.log_path, "a") as file:
            file.write(json.dumps({name: round(v, 6) for name, v in line.items()}) + "\n")
        self.say(f"{self.path.stem}, step {self.step} of {self.training.steps}: "
                 f"loss {line['loss']:.3f}, {line['images_per_s']:.0f} images/s")
        for name, value in line.items() if self.args.tensorboard else ():
            self.board.add_scalar(name, value, self.step)

    def preview_due(self, step):
        """True on rank 0 when a preview picture is due."""
        last = step + 1 == self.training.steps
        return self.main and (last or (step + 1) % self.training.preview_every == 0)

    def save_if_due(self, step, **parts):
        """Save every so often, at the last step, and where Ctrl-C asked for it, then leave."""
        self.step = step + 1
        stop, end = self.stop_asked, self.step == self.training.steps
        if self.world > 1:      # all stop at the same step; to ask at every step takes time
            stop = self.step % 4 == 0 and max(gather(stop))
        if not (stop or end or self.step % self.training.save_every == 0):
            return
        weights = sum(p.detach().sum() for p in parts["model"].parameters())
        self._stop_if_not_finite({"a weight": weights})         # after the last update
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        sums = {name: (float(total), count) for name, (total, count) in self.sums.items()}
        ranks = gather({"cpu": torch.get_rng_state(), "cuda": cuda, "unlogged": sums})
        if self.main:
            save({"stage": self.stage, "step": self.step, "config": asdict(self.config),
                  "training": asdict(self.training), "settings": self.settings, "ranks": ranks,
                  **self.store, **{name: part.state_dict() for name, part in parts.items()}},
                 self.path)
        gather(None)        # none leaves before it is written: torchrun would end the others
        if stop and not end:
            raise KeyboardInterrupt(f"interrupted. {self.path} holds step {self.step} of "
                                    f"{self.training.steps}; continue with --resume")

    def say(self, line):
        if self.main:
            print(line, flush=True)

    def _ask_to_stop(self, number, frame):
        # torchrun passes on a Ctrl-C that its ranks have got already: a second counts after 2 s
        if self.stop_asked and time.monotonic() > self.stop_asked + 2:
            raise KeyboardInterrupt(f"left at once; the last checkpoint is {self.path}")
        if self.main and not self.stop_asked:
            with suppress(OSError):     # a pipe or terminal may be closed
                os.write(2, b"stopping; saves first. A second Ctrl-C, after 2 s, does not save\n")
        self.stop_asked = self.stop_asked or time.monotonic()

    def _stop_if_not_finite(self, values):
        for name, value in values.items():
            if not math.isfinite(value):
                raise BadInput(f"{name} is not finite at step {self.step}; {self.path} is not "
                               f"replaced. Try a smaller --learning_rate, or --no-bf16")
