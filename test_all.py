"""The test suite: properties rather than snapshots. python -m pytest -q test_all.py (make test installs what it needs).

Order: what all tests use; the model; growth; training as real processes (interrupt, kill, soak, ranks); data;
generators; scores; bad input, one line each. Scripts are run as a user runs them, each as a process of its own, in a folder
`toy` that is made once, a few steps a stage, on `shapes`, so that nothing is downloaded. By hand, with more patience:

    KILLS=100 python -m pytest -q -s test_all.py -k killed_runs         SIGKILL at random moments; KILL_SEED=1: at others
    SOAK=20000 python -m pytest -q -s test_all.py -k soak               memory and open files in a long run
"""
import contextlib
import copy
import faulthandler
import functools
import glob
import gzip
import hashlib
import http.server
import inspect
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import warnings
import zipfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import generator
import hnt
import tokenizer
import trainer
import vqgan
from extras import bench, paper, pretrained, report
from generator import GeneratorConfig
from tokenizer import TokenizerConfig
from trainer import BadInput
from vqgan import ConvNeXtSmall, VectorQuantizer, VQGANConfig

ROOT = Path(__file__).resolve().parent


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
               "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split()])}   # for -m extras.x
SLOW = ["torch._dynamo", "torch.utils.data", "torch.utils.flop_counter", "scipy.linalg", "PIL.ImageOps",
        "PIL.ImageFont", "tqdm"]


@functools.cache
def warm():
    """A server that has imported what is slow to import, never computes, and forks into the scripts that running()
    names: 0.2 s for a start instead of 1.6 s. It ends with this process. Its forks have one hash seed: see alone()."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    # a killed script leaves tqdm's lock behind; it is cleaned up at the end, and that need not be said
    with mock.patch.dict(os.environ, {**ENVIRONMENT, "PYTHONWARNINGS": "ignore:resource_tracker"}):
        multiprocessing.forkserver.ensure_running()
    return context


def become(words, cwd, environment, stdout, stderr):
    """Runs in the fork: what `python words > stdout 2> stderr` does."""
    import os, runpy, signal, sys
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [cwd, *environment["PYTHONPATH"].split(os.pathsep)]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [os.path.dirname(os.path.abspath(words[0]))]
        runpy.run_path(words[0], run_name="__main__")


@contextlib.contextmanager
def running(command, cwd=ROOT, stdout=os.devnull, stderr=os.devnull):
    """`python script.py ...` or `python -m extras.x ...` as a process of its own (pid, exitcode, join()) that does not outlive the block."""
    words = (shlex.split(command)[1:], str(cwd), {**os.environ, **ENVIRONMENT}, str(stdout), str(stderr))
    # as source: a fork that had to import this file for the function would have our modules, and not the script's own
    process = warm().Process(target=exec, args=(f"{inspect.getsource(become)}\nbecome{words!r}", {}))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run(command, code=0, cwd=ROOT, fresh=False, **environment):
    """Run a command line of the README; its output. Fails unless it exits with code. fresh: in a new interpreter, even
    where a fork of the warm one would do."""
    if re.fullmatch(r"python (\S+\.py|-m extras\.\w+)( [^;|&<>$*`]*)?", command) and not fresh and not environment:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            with running(command, cwd, *files) as process:
                process.join(300)
            output, returncode = "".join(file.read_text() for file in files), process.exitcode
    else:
        command = re.sub(r"^python ", f"{sys.executable} ", command)
        command = re.sub(r"^torchrun ", f"{sys.executable} -m torch.distributed.run ", command)
        done = subprocess.run(command, shell=True, cwd=cwd, capture_output=True, text=True, timeout=300,
                              env={**os.environ, **ENVIRONMENT, **environment})
        output, returncode = done.stdout + done.stderr, done.returncode
    assert returncode == code, f"{command}\nexit code {returncode}, wanted {code}\n{output[-3000:]}"
    return output


def refused(command, *words, **kwargs):
    """The command ends with exit code 2 and one line on the screen that has all the words, and no traceback."""
    output = run(command, code=2, **kwargs)
    assert "Traceback" not in output, output
    line = output.strip().splitlines()[-1]
    for word in words:
        assert word in line, f"{word!r} not in: {line}"
    return line


SMALL = "--config toy --data shapes --log_every 2 --preview_every 100 --batch_size 8"


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A results folder with every stage in it, a few steps each, made with the README's commands."""
    out = tmp_path_factory.mktemp("toy")
    run(f"python vqgan.py {SMALL} --out {out} --steps 4")
    run(f"python tokenizer.py {SMALL} --out {out} --steps 4 --tokens 2")
    run(f"python hnt.py {SMALL} --out {out} --steps 4 --tokens 4 --strategy reuse")
    run(f"python hnt.py {SMALL} --out {out} --steps 10 --tokens 4")
    run(f"python tokenizer.py {SMALL} --out {out} --steps 4 --tokens 4 --stage 2 --discriminator_first 1")
    run(f"python generator.py {SMALL} --out {out} --steps 4 --tokens 4 --mode ar")
    run(f"python generator.py {SMALL} --out {out} --steps 4 --tokens 4 --mode maskgit")
    return out


def equal(a, b):
    """Two checkpoints (nested dicts and lists) equal bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def load(path):
    return torch.load(path, weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# The model (tokenizer.py)

TINY_VQGAN = VQGANConfig(image_size=16, channels=8, channel_mult=(1, 1, 2), res_blocks=1, code_dim=4, codebook_size=16,
                         l2_norm=True, norm_groups=4)
TINY = TokenizerConfig(tokens=4, patch_size=8, width=32, encoder_layers=2, decoder_layers=1, heads=2, expert_width=16,
                       expert_heads=2, code_dim=4, codebook_size=32, vqgan=TINY_VQGAN)


def tiny(model="nativetok", seed=0, **changes):
    torch.manual_seed(seed)
    return tokenizer.build(replace(TINY, model=model, **changes)).eval()


def pictures(n=3, size=16, seed=1):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_token_i_does_not_depend_on_later_experts():
    model, images = tiny(), pictures()
    before, codes = model.latents(images), model.encode(images)
    for i in range(1, TINY.tokens):
        changed = copy.deepcopy(model)
        for expert in changed.mocet.experts[i:]:
            for p in expert.parameters():
                p.data += torch.randn_like(p)
        after = changed.latents(images)
        assert torch.equal(after[:, :i], before[:, :i]) and torch.equal(changed.encode(images)[:, :i], codes[:, :i])
        assert not torch.allclose(after[:, i:], before[:, i:])


def test_later_tokens_read_earlier_ones():
    model, images = tiny(), pictures()
    before = model.latents(images)
    model.mocet.experts[0].blocks[-1].mlp[-1].bias.data += torch.randn(16)     # moves z_0 and nothing else directly
    moved = (model.latents(images) - before).abs().amax((0, 2))
    assert (moved > 1e-5).all()


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_fast_mocet_equals_plain_in_outputs_and_gradients(layers):
    torch.manual_seed(0)
    mocet = tokenizer.MoCET(tokens=5, width=16, heads=2, layers=layers).double()
    x_latent = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 5, 16, dtype=torch.float64)
    inputs = [x_latent, *mocet.parameters()]
    results = []
    for forward in (mocet.forward_plain, mocet.forward):
        z = forward(x_latent)
        results.append([z, *torch.autograd.grad((z * target).sum(), inputs)])
    for plain, fast in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("model", tokenizer.MODELS)
def test_decode_takes_any_prefix(model):
    model, images = tiny(model), pictures()
    codes = model.encode(images)
    assert codes.shape == (3, 4) and codes.dtype == torch.int64
    for k in range(0, 5):
        for hard in (False, True):
            decoded = model.decode_codes(codes[:, :k], hard=hard)
            assert decoded.shape == images.shape and 0 <= decoded.min() and decoded.max() <= 1
    with pytest.raises(BadInput, match="5 codes given"):
        model.decode_codes(torch.zeros(1, 5, dtype=torch.int64))


def test_hard_decode_paints_the_likeliest_codes():
    model = tiny()
    codes = torch.randint(32, (2, 4))
    logits = model.decoder(model.quantizer.lookup(codes))
    z_q = model.pixel_codebook(logits.argmax(-1)).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(model.decode_codes(codes, hard=True), model.pixel_decoder(z_q).clamp(0, 1))


@pytest.mark.parametrize("model,reaches", [("titok", True), ("titok_causal", False)])
def test_causal_mask_really_masks(model, reaches):
    model, images = tiny(model), pictures()
    before = model.latents(images)
    model.latent_tokens.data[:, 2] += torch.randn(32)
    after = model.latents(images)
    assert torch.equal(after[:, :2], before[:, :2]) != reaches
    assert not torch.allclose(after[:, 2:], before[:, 2:])


def test_only_the_encoder_differs_between_models():
    a, b = tiny().state_dict(), tiny("titok").state_dict()
    own = {k.split(".")[0] for k in a.keys() ^ b.keys()}
    assert own == {"mit", "mocet", "encoder", "latent_tokens"}


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        for tokens, millions, share in ((32, 616.2, None), (64, 666.8, 0.562), (128, 768.0, 0.553)):
            model = tokenizer.NativeTok(replace(tokenizer.PRESETS["full"], tokens=tokens))
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
            if share:
                hnt.freeze_reused(model, tokens // 2)
                own = [p for name, p in model.named_parameters() if not name.startswith("pixel_")]
                trained = sum(p.numel() for p in own if p.requires_grad)
                assert trained / sum(p.numel() for p in own) == pytest.approx(share, abs=0.0005)
        titok = tokenizer.TiTok(tokenizer.PRESETS["titok_l_32"])
        assert sum(p.numel() for p in titok.parameters()) / 1e6 == pytest.approx(641.0, abs=0.06)


def test_params_prints_the_counts_beside_the_papers():
    text = run("python -m extras.bench params")
    blocks = {lines.split()[0]: lines for lines in re.split(r"\n(?=\w)", text)}
    for name, total, paper, share in (("nativetok_32", "616.22", "616M", None), ("nativetok_64", "666.80", "666M", "56.2%"),
                                      ("nativetok_128", "767.97", "766M", "55.3%"), ("titok_l_32", "641.02", "641M", None)):
        assert total in blocks[name] and f"paper: {paper}" in blocks[name]
        assert share is None or f"{share} train" in blocks[name]
        parts = [float(m) for m in re.findall(r"^  (?!all|of).*? ([\d.]+)M", blocks[name], re.MULTILINE)]
        assert sum(parts) == pytest.approx(float(total), abs=0.03)
    assert {"titok_l_causal_32", "titok_b_64", "titok_s_128"} <= blocks.keys()
    assert all(words in text for words in ("110.89M", "published: 110.9M", "342.91M", "294.99M"))


@pytest.mark.parametrize("name", ["toy", "titok_toy"])
def test_counted_work_is_what_torch_counts(name):
    """The formulas against every matrix product and convolution that runs. (On meta: torch does not count the CPU's
    attention.)"""
    config, meta = tokenizer.PRESETS[name], torch.device("meta")
    model, counted = trainer.on_meta(lambda: tokenizer.build(config)).requires_grad_(False), bench.tokenizer_macs(config)
    tokens, grid = torch.zeros(1, config.tokens, config.code_dim, device=meta), config.grid

    def work(forward):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            forward()
        return counter.get_total_flops() / 2

    encoder = sum(counted[part] for part in ("MIT", "experts", "encoder", "to_code, quantizer") if part in counted)
    search = config.tokens * config.code_dim * config.codebook_size       # for the nearest code
    assert work(lambda: model.latents(torch.empty(1, 3, 32, 32, device=meta))) + search == encoder
    assert work(lambda: model.decoder(tokens)) == counted["token decoder"]
    logits = torch.empty(1, grid ** 2, config.vqgan.codebook_size, device=meta)
    assert work(lambda: model.paint(logits)) == counted["pixel decoder"]


@pytest.mark.parametrize("name", ["ar_toy", "maskgit_toy"])
def test_counted_work_of_generators_is_what_torch_counts(name):
    config = generator.PRESETS[name]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = generator.GENERATORS[config.mode](config)
        model(torch.zeros(1, config.tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert counter.get_total_flops() / 2 == bench.generator_macs(config)


def test_recomputed_experts_give_the_same_gradients_and_keep_less():
    model, images = tiny().train(), pictures()
    results = []
    for recompute in (False, True):
        model.zero_grad()
        model.mocet.recompute = recompute
        z, kept = bench.kept(lambda: model.latents(images), model)
        model.latents(images).square().mean().backward()
        results.append((z, [p.grad.clone() for p in model.parameters() if p.grad is not None], kept))
    (z, gradients, kept), (z_again, gradients_again, kept_less) = results
    assert equal(z, z_again) and equal(gradients, gradients_again) and kept_less < 0.7 * kept


def test_compiled_blocks_are_compiled_once_for_all_experts_and_equal_the_plain_ones():
    """In a process of its own: compiling changes the class for good."""
    done = run(f"""python -c "
import torch, trainer
from test_all import tiny, pictures
from tokenizer import Block
import torch._dynamo.utils as utils
def step(model):
    z = model.latents(pictures())
    z.square().mean().backward()
    return z.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
plain = step(tiny(tokens=12))
trainer.compile_methods(Block, 'forward', 'last_position', backend='aot_eager')
for a, b in zip(plain, step(tiny(tokens=12))):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
print('graphs', utils.counters['frames']['ok'])
" """)
    assert "graphs 3" in done       # MIT's blocks, the experts' first ones, the experts' last ones


def test_toy_baseline_has_as_many_parameters():
    sizes = [sum(p.numel() for p in tokenizer.build(tokenizer.PRESETS[name]).parameters()) for name in ("toy", "titok_toy")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_quantizer_gradient_and_losses():
    quantizer = VectorQuantizer(8, 4, l2_norm=True)
    z = torch.randn(5, 3, 4, requires_grad=True)
    z_q, loss, codes = quantizer(z)
    assert torch.allclose(z_q.norm(dim=-1), torch.ones(5, 3), atol=1e-5)
    cosine = F.normalize(z, dim=-1) @ F.normalize(quantizer.embedding.weight, dim=-1).t()
    assert torch.equal(codes, cosine.argmax(-1))
    distance = (F.normalize(z, dim=-1) - z_q).square().mean()
    assert loss.item() == pytest.approx(1.25 * distance.item(), rel=1e-4)         # codebook + 0.25 commitment
    z_q.sum().backward()
    assert z.grad.abs().sum() > 0                                                  # straight through


def test_dead_codes_are_revived_and_backward_is_not_broken():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4, l2_norm=True)
    quantizer.embedding.weight.data[8:] = -quantizer.embedding.weight.data[:1]      # 24 codes at one place
    z = F.normalize(quantizer.embedding.weight[:1].detach() + 0.3 * torch.randn(4096, 4), dim=-1).requires_grad_()
    quantizer(z)[1].backward()
    for _ in range(400):
        quantizer.track_usage(z, quantizer.codes(z), revive_below=0.1)
    quantizer(z)[1].backward()
    assert len(quantizer.codes(z).unique()) >= 28
    assert quantizer.use()["perplexity"] > 16


def test_stage2_leaves_codes_alone_and_trains_only_the_painters(toy):
    one, two = load(toy / "nativetok_4.pt")["ema"]["model"], load(toy / "nativetok_4_stage2.pt")["model"]
    for key in one:
        painter = key.startswith(("decoder.", "pixel_decoder."))
        if not painter:
            assert key.endswith("usage") or torch.equal(one[key], two[key]), key
    assert not torch.equal(one["decoder.embed.weight"], two["decoder.embed.weight"])
    assert not torch.equal(one["pixel_decoder.conv_out.weight"], two["pixel_decoder.conv_out.weight"])


def test_tokenizer_overfits_64_images():
    torch.manual_seed(0)
    images = torch.stack([torch.from_numpy(data.open_dataset("shapes", "train", 16).get(i)) for i in range(64)]) / 255
    model = tokenizer.NativeTok(replace(TINY, tokens=4, width=64, expert_width=32, codebook_size=64, revive_below=0.1))
    teacher = vqgan.VQGAN(TINY_VQGAN).eval()
    targets = teacher.encode(images).flatten(1)                                    # [64, 16]
    assert len(targets.unique()) > 4
    stage, optimizer = tokenizer.Stage1(model), torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(700):
        loss, parts, z, codes = stage(images, targets)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        model.quantizer.track_usage(z, codes, 0.1 if step < 400 else 0.0)
    with torch.no_grad():
        guess = model.decoder(model.quantizer.lookup(model.encode(images))).argmax(-1)
    assert (guess == targets).float().mean() > 0.95


# ---------------------------------------------------------------------------------------------------------------------
# Stage 0 (vqgan.py) against the public networks

def rule_weights(keys, gain=1.0):
    """Seeded weights by the rule that the golden numbers were made with: each entry from the CRC of its own
    name. gain: 2 for Inception, which is all ReLU."""
    weights = {}
    for key, shape in keys.items():
        n = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
        if key.endswith("num_batches_tracked"):
            value = np.int64(0)
        elif key.endswith("layer_scale"):
            value = np.float32(0.1) * n
        elif len(shape) >= 2:
            value = n * np.float32(math.sqrt(gain / math.prod(shape[1:])))
        elif key.endswith("running_var"):
            value = 1 + np.float32(0.1) * abs(n)
        else:
            value = np.float32(0.02) * n if key.endswith(("bias", "running_mean")) else 1 + np.float32(0.02) * n
        weights[key] = torch.from_numpy(np.asarray(value))
    return weights


def asset_keys(name):
    return json.loads((ROOT / "assets/golden" / name).read_text())


def test_maskgit_vqgan_golden():
    golden = np.load(ROOT / "assets/golden/maskgit_vqgan_golden.npz")
    model = pretrained.load_maskgit_vqgan(rule_weights(asset_keys("maskgit_vqgan_keys.json")))
    image = torch.from_numpy(golden["image"])[None]
    with torch.no_grad():
        np.testing.assert_allclose(model.encoder(image)[0], golden["z"], atol=2e-5)
        assert (model.encode(image)[0].numpy() == golden["codes"]).all()
        z_q = model.quantize.lookup(torch.from_numpy(golden["codes"])[None]).permute(0, 3, 1, 2)
        np.testing.assert_allclose(model.decoder(z_q)[0], golden["decoded"], atol=2e-4)


def test_convnext_golden():
    golden = np.load(ROOT / "assets/golden/convnext_s_golden.npz")
    model, images = ConvNeXtSmall(rule_weights(asset_keys("convnext_s_keys.json"))), torch.from_numpy(golden["images"])
    with torch.no_grad():
        np.testing.assert_allclose(model(images), golden["logits"], atol=1e-4)
        np.testing.assert_allclose(model.logits((images - model.mean) / model.std), golden["logits_native"], atol=1e-4)
        assert model.perceptual_loss(images[:1], images[1:2]).item() == pytest.approx(golden["perceptual_01"].item(), rel=1e-4)


def test_titok_golden():
    golden = np.load(ROOT / "assets/golden/titok_s_golden.npz")
    model = pretrained.load_titok(rule_weights(asset_keys("titok_s_keys.json")), image_size=64)
    image, codes = torch.from_numpy(golden["image"])[None], torch.from_numpy(golden["codes"])[None]
    with torch.no_grad():
        np.testing.assert_allclose(model.latents(image)[0].T, golden["z"][:, 0], atol=2e-5)
        assert torch.equal(model.encode(image), codes)
        z_q = model.quantizer.lookup(codes)
        np.testing.assert_allclose(z_q[0].T, golden["z_q"][:, 0], atol=1e-6)
        logits = model.decoder(z_q)                                         # [1, 16, 1024]
        np.testing.assert_allclose(logits[0].T.reshape(1024, 4, 4), golden["logits"], atol=2e-5)
        np.testing.assert_allclose(model.paint(logits)[0], golden["decoded"], atol=1e-4)


def test_titok_l_32_takes_every_key_of_the_published_file():
    keys = asset_keys("titok_l32_keys.json")
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in keys.items()}
        model = pretrained.load_titok(state)
    assert sum(map(math.prod, keys.values())) == 641_054_735
    c = model.config        # two tables of [32, 1024] are added up into one
    assert trainer.count([model]) == 641_054_735 - 32 * 1024 and (c.tokens, c.width, c.heads) == (32, 1024, 16)
    assert (c.encoder_layers, c.decoder_layers, c.codebook_size, c.code_dim, c.image_size) == (24, 24, 4096, 12, 256)


def test_titok_weights_that_do_not_fit_are_refused():
    keys = asset_keys("titok_s_keys.json")

    def refuses(change, words):
        state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
        change(state)
        with torch.device("meta"), pytest.raises(BadInput, match=words) as error:
            pretrained.load_titok(state, image_size=64)
        assert "\n" not in str(error.value)

    refuses(lambda s: s.pop("encoder.ln_post.bias"), "1 entries missing, 0 unknown")
    refuses(lambda s: s.update(more=torch.zeros(1)), "0 entries missing, 1 unknown")
    refuses(lambda s: s.update({"decoder.ffn.0.weight": s["decoder.ffn.0.weight"].transpose(0, 1)}), "1 of another shape")
    refuses(lambda s: s.pop("latent_tokens"), "no entry latent_tokens.*vq8k")
    refuses(lambda s: s.update({"encoder.positional_embedding": torch.zeros(257, 512)}), "256 patches of 16 pixels")


def test_a_public_titok_reconstructs_from_its_file(tmp_path):
    """A one-layer TiTok with the published names, from a .safetensors file (written by hand here) and from a torch file."""
    keys = {re.sub(r"512", "64", key): shape for key, shape in asset_keys("titok_s_keys.json").items()
            if not re.search(r"transformer\.[1-7]\.", key)}
    keys = {key: [257 if "positional" in key and n == 17 else n // 8 if n in (512, 1024, 1536, 2048) and "pixel" not in key
                  and not (key == "decoder.ffn.2.weight" and i == 0) and key != "decoder.ffn.2.bias" else n
                  for i, n in enumerate(shape)] for key, shape in keys.items()}
    state = rule_weights(keys)
    torch.save(state, tmp_path / "titok.bin")
    header, content = {}, b""
    for key, value in state.items():
        raw = value.contiguous().numpy().tobytes()
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(content), len(content) + len(raw)]}
        content += raw
    text = json.dumps(header).encode()
    (tmp_path / "titok.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    printed = []
    for name in ("titok.bin", "titok.safetensors"):
        text = run(f"python -m extras.pretrained titok {tmp_path}/{name} {tmp_path}/photo.png --out {tmp_path}")
        printed.append(re.search(r"photo.png: ([\d ]+)", text)[1].split())
        assert Image.open(tmp_path / "reconstruct.png").size == (2 * 256 + 2, 256)
    assert printed[0] == printed[1] and len(printed[0]) == 32
    refused(f"python -m extras.pretrained titok {tmp_path}/titok.bin", "IMAGE")
    refused(f"python -m extras.pretrained titok {tmp_path}/none.bin {tmp_path}/photo.png", "none.bin", "not found")
    refused(f"python -m extras.pretrained titok {tmp_path}/titok.safetensors {tmp_path}/photo.png",
            "pip install safetensors", PYTHONPATH=hide("safetensors", tmp_path))


def hide(package, folder):
    """A folder for PYTHONPATH in which importing the package fails as if it were not installed."""
    (folder / "hidden" / package).mkdir(parents=True)
    (folder / "hidden" / package / "__init__.py").write_text("raise ImportError('hidden by a test')")
    return folder / "hidden"


def test_weights_of_another_model_are_refused():
    state = rule_weights(asset_keys("maskgit_vqgan_keys.json"))
    state.pop("encoder.conv_in.weight")
    state["decoder.conv_in.bias"] = torch.zeros(3)
    with pytest.raises(BadInput, match="1 entries missing, 0 unknown, 1 of another shape"):
        pretrained.load_maskgit_vqgan(state)


def test_discriminator_and_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert vqgan.hinge_loss(real, fake).item() == pytest.approx((0.25 + 0.5) / 2)
    discriminator = vqgan.Discriminator(width=32)
    assert discriminator(torch.rand(2, 3, 32, 32)).shape == (2, 1, 16, 16)
    constant = discriminator.blur.sum().item()
    assert constant == pytest.approx(1.0)
    lecam = vqgan.LeCam(decay=0.5)
    assert lecam(real, fake).item() == pytest.approx((real.square().mean() + fake.square().mean()).item())
    assert lecam.real.item() == pytest.approx(real.mean().item() / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Growth (hnt.py)

def grown_model(old, tokens, seed=0):
    new = tokenizer.NativeTok(replace(old.config, tokens=tokens))
    new.load_state_dict(hnt.grow(old.state_dict(), old.config.tokens, tokens))
    return new.eval()


@pytest.mark.parametrize("tokens", [5, 8, 11])
def test_grow_keeps_the_old_tokens_to_the_bit(tokens):
    torch.set_num_threads(1)
    old, images = tiny(), pictures(8)
    new = grown_model(old, tokens)
    assert torch.equal(new.latents(images)[:, :4], old.latents(images))
    assert torch.equal(new.encode(images)[:, :4], old.encode(images))
    for j in range(tokens - 4):
        for a, b in zip(new.mocet.experts[4 + j].parameters(), old.mocet.experts[j % 4].parameters()):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def test_old_codes_survive_frozen_training_and_frozen_tensors_too():
    torch.set_num_threads(1)
    old, images = tiny(), pictures(8)
    model = grown_model(old, 8)
    hnt.freeze_reused(model, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before, latents = {k: v.clone() for k, v in model.state_dict().items()}, model.latents(images)
    ema, stage = trainer.Ema(model, 0.9), tokenizer.Stage1(model)
    for _ in range(5):
        loss, _, z, codes = stage(images, torch.randint(16, (8, 16)))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        model.quantizer.track_usage(z, codes)
        ema.update(model)
    for trained in (model, ema.model):
        assert torch.equal(trained.latents(images)[:, :4], latents[:, :4])
        assert torch.equal(trained.encode(images)[:, :4], old.encode(images))
        assert not torch.equal(trained.latents(images)[:, 4:], latents[:, 4:])
    still = [k for k in before if k.startswith(("mit.", "to_code.", "quantizer.embedding", "mocet.pad_token", "pixel_"))
             or k.startswith(tuple(f"mocet.experts.{i}." for i in range(4)))]
    assert len(still) > 50
    for key in still:
        assert torch.equal(model.state_dict()[key], before[key]) and torch.equal(ema.model.state_dict()[key], before[key])


def test_what_trains_while_frozen():
    model = grown_model(tiny(), 8)
    hnt.freeze_reused(model, 4)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    want = {n for n, _ in model.named_parameters() if n.startswith(("decoder.", *(f"mocet.experts.{i}." for i in range(4, 8))))}
    assert trains == want
    hnt.unfreeze(model)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("pixel_")}


def test_frozen_part_builds_no_graph():
    model, images = grown_model(tiny(), 8), pictures()
    hnt.freeze_reused(model, 4)
    z = model.mocet(model.mit(images))
    assert z.requires_grad and not model.mit(images).requires_grad
    seen, stack = set(), [z.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
    leaves = {id(node.variable) for node in seen if hasattr(node, "variable")}
    assert leaves == {id(p) for e in model.mocet.experts[4:] for p in e.parameters()}


def test_grow_refuses_to_shrink():
    with pytest.raises(BadInput, match="HNT grows"):
        hnt.grow(tiny().state_dict(), 4, 4)


def test_hnt_run_keeps_the_codes_until_its_last_tenth(toy):
    """In the toy folder hnt.py grew 2 -> 4 tokens with strategy reuse, so frozen to the end."""
    old, new = (tokenizer.load_tokenizer(toy / name) for name in ("nativetok_2.pt", "nativetok_4_reuse.pt"))
    images = torch.stack([torch.from_numpy(data.open_dataset("shapes", "val", 32).get(i)) for i in range(16)]) / 255
    assert torch.equal(new.encode(images)[:, :2], old.encode(images))
    optimizer = torch.load(toy / "nativetok_4_reuse.pt", weights_only=True)["optimizer"]
    held = sum(len(group["params"]) for group in optimizer["param_groups"])
    hnt.freeze_reused(new.requires_grad_(True), 2)
    assert held == sum(p.requires_grad for n, p in new.named_parameters() if not n.startswith("pixel_"))


# ---------------------------------------------------------------------------------------------------------------------
# Training as real processes (trainer.py)

STAGES = {      # what each stage's checkpoint is called, and its command without the number of steps
    "vqgan": "python vqgan.py",
    "nativetok_3": "python tokenizer.py --tokens 3",
    "nativetok_4": "python hnt.py --tokens 4",
    "nativetok_4_stage2": "python tokenizer.py --tokens 4 --stage 2 --gan_start 0 --discriminator_first 3",
    "ar_nativetok_4": "python generator.py --tokens 4 --mode ar",
    "maskgit_nativetok_4": "python generator.py --tokens 4 --mode maskgit",
}
NEEDS = ("vqgan.pt", "perceptual.pt", "nativetok_2.pt", "nativetok_4.pt", "nativetok_4_stage2.pt",
         "codes_nativetok_4_train.npy", "codes_nativetok_4_train.json")


def folder_without(toy, target, name):
    """A copy of what stage `name` needs from the toy folder."""
    target.mkdir()
    for file in NEEDS:
        if file != f"{name}.pt" and not (name.startswith("nativetok_4_") and file == "nativetok_4_stage2.pt"):
            (target / file).write_bytes((toy / file).read_bytes())
    return target


@pytest.mark.parametrize("name", ["vqgan", "ar_nativetok_4"])
def test_ctrl_c_saves_first(toy, tmp_path, name):
    """Interrupted after its first checkpoint, a run saves the step it has come to, says so, and goes on from there."""
    out, steps = folder_without(toy, tmp_path / "out", name), 200
    command = f"{STAGES[name]} {SMALL} --out {out} --steps {steps}"
    checkpoint = out / f"{name}.pt"
    with running(f"{command} --save_every 2", stderr=tmp_path / "stderr") as process:
        while process.is_alive() and not checkpoint.exists():
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
    step, said = load(checkpoint)["step"], (tmp_path / "stderr").read_text()
    assert process.exitcode == 130 and f"holds step {step} of {steps}" in said, said
    run(command.replace(f"--steps {steps}", f"--steps {step + 1} --resume"))
    assert load(checkpoint)["step"] == step + 1


KILLS, KILL_SEED = (int(os.environ.get(name, default)) for name, default in (("KILLS", 8), ("KILL_SEED", 0)))
TINY_RUN = "--resume --batch_size 4 --save_every 1 --log_every 2 --preview_every 3"
TINY_CODES = "--patch_size 4 --width 16 --heads 2 --expert_width 8 --expert_heads 2 --encoder_layers 1 --decoder_layers 1"
TINY_GENERATOR = "--tokens 4 --width 16 --heads 2 --layers 2"
KILLED = {      # command, and what it makes
    "vqgan": ("vqgan.py --image_size 16 --channels 8 --steps 10", ["vqgan*"]),
    "stage1": (f"tokenizer.py --tokens 2 {TINY_CODES} --steps 10", ["nativetok_2*"]),
    "hnt": ("hnt.py --tokens 4 --steps 10", ["nativetok_4*"]),                  # its 90 % boundary: after step 9
    "stage2": ("tokenizer.py --tokens 4 --stage 2 --gan_start 0 --discriminator_first 3 --steps 10", ["*_stage2*"]),
    "ar": (f"generator.py --mode ar {TINY_GENERATOR} --steps 10", ["ar_*"]),
    "maskgit": (f"generator.py --mode maskgit {TINY_GENERATOR} --steps 10", ["maskgit_*"]),
    "codes": (f"generator.py --mode ar {TINY_GENERATOR} --steps 1", ["ar_*", "codes_*"]),
    "evaluation": ("-m extras.report report --tokens 4 --images 50 --samples 20", []),
}
TIMES = {"seconds", "images_per_s", "step_ratio"}


def killable(stage):
    """Its command, for the folder it works in; a training goes on from where it was killed."""
    shared = "--config toy --data shapes --out . --seed 3"
    if stage == "evaluation":
        return f"python {KILLED[stage][0]} {shared}"
    return f"python {ROOT}/{KILLED[stage][0]} {shared} {TINY_RUN}"


@pytest.fixture(scope="session")
def small_stages(tmp_path_factory):
    """A folder with all stages at the smallest size."""
    folder = tmp_path_factory.mktemp("tiny")
    for stage in list(KILLED)[:6]:
        run(killable(stage), cwd=folder)
    made_of = [*(data.open_dataset("shapes", split, 16).fingerprint for split in ("train", "val")), 900, 128]
    torch.save({"stage": "fd_classifier", "model": report.FDClassifier(10).state_dict(), "step": 900,
                "test_accuracy": 0.1, "config": {"made_of": made_of}}, folder / "fd_classifier.pt")
    return folder


def copy_for(stage, folder, target):
    """A copy of the folder without what the stage makes."""
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*KILLED[stage][1]))


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return value


def content(path):
    """What must be equal in two runs: all but times."""
    if path.suffix == ".pt":
        return without_times(load(path))
    if path.name == "measured.json":        # each entry's checksum is over its times too
        return [[what, without_times(entry["made_of"]), without_times(entry["value"])]
                for what, entry in json.loads(path.read_text()).items()]
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [without_times(line) for line in map(json.loads, path.read_text().splitlines())]
    if path.suffix == ".md":
        return [line for line in path.read_text().splitlines() if not line.startswith("| | ")]      # the row of seconds
    return path.read_bytes()


def assert_same_files(a, b):
    names = [{str(file.relative_to(folder)) for file in folder.rglob("*")} for folder in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        assert equal(content(a / name), content(b / name)), name


def being_written(folder):
    """{(file, time of change)} of what write_atomically has not renamed yet."""
    found = set()
    for file in glob.glob(f"{folder}/**/*.writing*", recursive=True):
        with contextlib.suppress(FileNotFoundError):
            found.add((file, os.stat(file).st_mtime_ns))
    return found


@pytest.fixture(scope="session")
def alone(small_stages, tmp_path_factory):
    """alone(stage) -> the folders of two runs that were let alone, and the seconds of the second. The first has an
    interpreter, and so a hash seed, of its own."""
    @functools.cache
    def alone(stage):
        folders = [copy_for(stage, small_stages, tmp_path_factory.mktemp(stage) / name) for name in ("first", "second")]
        run(killable(stage), cwd=folders[0], fresh=True)
        started = time.monotonic()
        run(killable(stage), cwd=folders[1])
        return *folders, time.monotonic() - started
    return alone


@pytest.mark.parametrize("stage", KILLED)
def test_same_seed_same_files(alone, stage):
    assert_same_files(*alone(stage)[:2])


def test_another_seed_and_more_workers(folder, tmp_path):
    """Another seed gives another curve, another number of processes that decode images does not."""
    logs = []
    for i, changes in enumerate(("--seed 3 --workers 0", "--seed 3 --workers 2", "--seed 4 --workers 0")):
        run(f"python vqgan.py --config toy --data {folder} --out {tmp_path}/{i} --image_size 16 --channels 8 --steps 12 "
            f"--perceptual none {TINY_RUN} {changes}")
        logs.append(content(tmp_path / str(i) / "vqgan.jsonl"))
    assert len(logs[0]) == 6 and logs[0] == logs[1] != logs[2]


@pytest.mark.parametrize("stage", KILLED)
def test_killed_runs(alone, small_stages, tmp_path, stage):
    """SIGKILL at random moments, half of them as soon as something is saved, and on again: at the end every file is that
    of a run that was let alone, and there are no others."""
    whole, _, duration = alone(stage)
    said, chance = tmp_path / "said", np.random.default_rng([KILL_SEED, *stage.encode()])
    kills, in_a_save, finished, folder = 0, 0, 0, None
    while kills < KILLS or folder:
        folder = folder or copy_for(stage, small_stages, tmp_path / str(finished))
        left = being_written(folder)            # by earlier kills
        with running(killable(stage), folder, said, said) as process:
            process.join(chance.uniform(0, duration) if kills < KILLS else 300)
            if kills < KILLS and chance.random() < 0.5:
                while process.is_alive() and being_written(folder) <= left:
                    time.sleep(0.0002)
                time.sleep(chance.uniform(0, 0.003))
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            in_a_save += not being_written(folder) <= left
        else:
            assert process.exitcode == 0, said.read_text()[-3000:]
            assert_same_files(folder, whole)
            finished, folder = finished + 1, None
    print(f"\n{stage}: {kills} kills, {in_a_save} of these in a save; {finished} runs finished, all equal")


SOAK = int(os.environ.get("SOAK", 150))     # steps


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and open files are read off Linux's /proc")
@pytest.mark.parametrize("name, command", [
    ("vqgan", "vqgan.py --image_size 8 --channels 4 --perceptual none"),
    ("ar_nativetok_4", f"generator.py --mode ar {TINY_GENERATOR}")], ids=["vqgan", "ar"])
def test_soak(small_stages, tmp_path, name, command):
    """Tiny steps with many saves, previews and lines of the log: memory and open files stay as they were after the first
    2 % of them."""
    folder = shutil.copytree(small_stages, tmp_path / "out", ignore=shutil.ignore_patterns(f"{name}*"))
    every, seen = max(3, SOAK // 500), []
    command = (f"python {ROOT}/{command} --config toy --data shapes --out . --batch_size 2 --steps {SOAK} "
               f"--save_every {every} --log_every {every} --preview_every {every}")
    with running(command, folder, stderr=tmp_path / "said") as process:
        log, proc = folder / f"{name}.jsonl", Path(f"/proc/{process.pid}")
        while process.is_alive():
            time.sleep(0.01)
            with contextlib.suppress(OSError):          # no line yet, or it has just ended
                if every * log.read_bytes().count(b"\n") >= 0.02 * SOAK:
                    pages, files = int((proc / "statm").read_text().split()[1]), len(list((proc / "fd").iterdir()))
                    seen += [(pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20, files)] if pages else []
    assert process.exitcode == 0 and len(trainer.read_log(log)) == -(-SOAK // every), (tmp_path / "said").read_text()
    # the least of ten moments: a file may be open just then, being written
    (memory, files), (memory_after, files_after) = (map(min, zip(*ten)) for ten in (seen[:10], seen[-10:]))
    print(f"\n{name}, {SOAK} steps, {SOAK // every} saves: memory {memory:.0f} -> {memory_after:.0f} MB, "
          f"open files {files} -> {files_after}")
    assert memory_after <= 1.05 * memory + 10 and files_after <= files


def test_a_kill_during_a_save_leaves_the_last_checkpoint(tmp_path):
    path = tmp_path / "x.pt"
    trainer.write_atomically(path, lambda p: torch.save({"a": 1}, p))

    def breaks(temporary):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(BadInput, match="No space left on device.*unchanged"):
        trainer.write_atomically(path, breaks)
    assert load(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_finished_and_unfinished_runs_are_not_overwritten(toy, tmp_path):
    before = (toy / "vqgan.pt").read_bytes()
    assert "complete (4 steps); --overwrite" in run(f"python vqgan.py {SMALL} --out {toy} --steps 4")
    assert "complete (4 steps); --overwrite" in run(f"python vqgan.py {SMALL} --out {toy} --steps 4 --resume")
    refused(f"python vqgan.py {SMALL} --out {toy} --steps 6", "step 4 of 6", "--resume", "--overwrite")
    refused(f"python vqgan.py {SMALL} --out {toy} --steps 4 --seed 5", "seed=0, not 5", "--overwrite")
    assert (toy / "vqgan.pt").read_bytes() == before


def equal_steps(a, b):
    """Weights equal to 1e-6 after the same steps. A key's bias moves nothing (the softmax cancels it), so its gradient is
    rounding noise, which AdamW blows up: left out. So is the use of codes, counted on the last piece of a batch."""
    for key in a:
        left, right = a[key], b[key]
        if key.endswith("qkv.bias"):
            left, right = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (left, right))
        if not key.endswith("usage"):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-6, msg=key)


def test_two_ranks_with_half_the_batch_each_take_the_step_of_one(toy, tmp_path):
    """gloo, two real processes. Dropout and random masks are off: those differ between ranks by design."""
    commands = {"nativetok_4": "tokenizer.py --tokens 4 --revive_below 0", "ar_nativetok_4": "generator.py --tokens 4 "
                "--mode ar --dropout 0 --class_dropout 0"}
    for name, command in commands.items():
        states = []
        for ranks in (1, 2):
            out = folder_without(toy, tmp_path / f"{name}_{ranks}", name)
            launcher = "python" if ranks == 1 else f"torchrun --nproc_per_node={ranks} --master_port=29513"
            run(f"{launcher} {command} {SMALL} --out {out} --steps 2 --learning_rate 1e-4 --warmup 1")
            states.append(load(out / f"{name}.pt"))
        one, two = states
        assert len(two["random"]) == 2 and not torch.equal(two["random"][0]["cpu"], two["random"][1]["cpu"])
        moved = max((one["model"][k] - one["ema"]["model"][k]).abs().max().item() for k in one["model"])
        assert moved > 1e-5
        equal_steps(two["model"], one["model"])


def test_two_nodes_take_the_step_of_one(toy, tmp_path):
    """torchrun --nnodes=2 on the loopback: two process groups of one rank each, as on two machines that share --out."""
    outs = [folder_without(toy, tmp_path / name, "nativetok_4") for name in ("one", "two")]
    command = (f"tokenizer.py --tokens 4 --revive_below 0 {SMALL} --steps 2 --learning_rate 1e-4 --warmup 1 --out ")
    run(f"python {command} {outs[0]}")
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}",
                               "--master_addr=127.0.0.1", "--master_port=29517", "--nproc_per_node=1",
                               *f"{command} {outs[1]}".split()], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in (0, 1)]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    one, two = (load(out / "nativetok_4.pt") for out in outs)
    assert len(two["random"]) == 2
    equal_steps(two["model"], one["model"])


def test_accumulated_pieces_equal_the_whole_batch(toy, tmp_path):
    states = []
    for pieces in (1, 4):
        out = folder_without(toy, tmp_path / str(pieces), "nativetok_3")
        run(f"python tokenizer.py --tokens 3 {SMALL} --out {out} --steps 2 --accumulate {pieces} --revive_below 0 "
            f"--learning_rate 1e-4 --warmup 1")
        states.append(load(out / "nativetok_3.pt")["model"])
    equal_steps(*states)


def test_schedule_is_warm_up_and_cosine():
    class Args:
        pass
    run_ = trainer.Run.__new__(trainer.Run)
    run_.training = trainer.TrainConfig(steps=100, warmup=10, learning_rate=1.0, end_learning_rate=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)

    def rate(step):
        run_.set_learning_rate(optimizer, step)
        return optimizer.param_groups[0]["lr"]

    assert rate(0) == pytest.approx(0.1) and rate(9) == pytest.approx(1.0) and rate(10) == pytest.approx(1.0)
    assert rate(55) == pytest.approx(0.55) and rate(100) == pytest.approx(0.1)
    assert all(rate(s) >= rate(s + 1) for s in range(10, 100))


def test_every_field_is_a_flag_with_its_comment_as_help():
    for script, classes in {"vqgan": [VQGANConfig], "tokenizer": [TokenizerConfig, tokenizer.Stage2Config],
                            "generator": [generator.GeneratorConfig], "hnt": []}.items():
        text = run(f"python {script}.py -h")
        for cls in [*classes, trainer.TrainConfig]:
            for field in cls.__dataclass_fields__.values():
                if field.type is not VQGANConfig:
                    assert f"--{field.name}" in text, (script, field.name)
        assert "smallest" not in text and "AdamW" in text and "--resume" in text


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2, no traceback, nothing half-written

def test_bad_flags(tmp_path):
    refused("python tokenizer.py --token 16", "--token", "Did you mean --tokens")
    refused("python tokenizer.py --model nativetoc", "'nativetoc'", "Did you mean nativetok")
    refused("python tokenizer.py --tokens many", "--tokens", "invalid int value")
    refused("python generator.py --mode arr", "'arr'", "Did you mean ar")
    refused("python hnt.py --strategy reus", "Did you mean reuse")
    refused("python tokenizer.py --device cuda", "no CUDA device is present")
    refused("python tokenizer.py --device gpu", "'gpu'", "cpu, cuda")
    refused(f"python vqgan.py --config toy --image_size 30 --out {tmp_path}", "--image_size 30", "multiple of 4")
    refused(f"python vqgan.py --config toy --batch_size 9 --accumulate 2 --out {tmp_path}", "--batch_size 9")
    assert not list(tmp_path.iterdir())


def test_stages_out_of_order(tmp_path):
    refused(f"python tokenizer.py --config toy --out {tmp_path}", "vqgan.pt: not found", "python vqgan.py")
    refused(f"python hnt.py --config toy --out {tmp_path}", "python vqgan.py")
    refused(f"python generator.py --config toy --mode ar --out {tmp_path}", "python tokenizer.py --tokens 16")
    refused(f"python generator.py --config toy --mode ar --sample 4 --out {tmp_path}", "python tokenizer.py --tokens 16")
    refused(f"python tokenizer.py --config toy --reconstruct x.png --out {tmp_path}", "python tokenizer.py --tokens 16")
    assert not list(tmp_path.iterdir())


def test_wrong_checkpoints(toy, tmp_path):
    out = folder_without(toy, tmp_path / "out", "nativetok_4_stage2")
    refused(f"python tokenizer.py {SMALL} --out {out} --vqgan {out}/nativetok_4.pt", "stage 'tokenizer', wanted 'vqgan'")
    refused(f"python generator.py {SMALL} --mode ar --out {out} --tokenizer {out}/perceptual.pt", "wanted 'tokenizer'")
    (out / "cut.pt").write_bytes((out / "vqgan.pt").read_bytes()[:-5000])
    (out / "text.pt").write_text("not a checkpoint")
    torch.save({"hello": 1}, out / "other.pt")
    for name, words in (("cut", "cut short"), ("text", "not a checkpoint"), ("other", "not a checkpoint of this project"),
                        ("absent", "not found")):
        refused(f"python tokenizer.py {SMALL} --out {out} --vqgan {out}/{name}.pt", f"{name}.pt", words)
    other = load(out / "vqgan.pt")
    other["config"]["channels"] = 16
    torch.save(other, out / "size.pt")
    refused(f"python tokenizer.py {SMALL} --out {out} --vqgan {out}/size.pt", "size.pt", "of another shape")
    refused(f"python hnt.py {SMALL} --out {out} --tokens 2 --source {out}/nativetok_4.pt", "--tokens 2", "HNT grows")
    refused(f"python hnt.py {SMALL} --out {out} --tokens 2", "fewer than 2 tokens", "python tokenizer.py --tokens 1")


def test_stage_2_starts_from_the_stage_1_file_that_was_asked_for(toy, tmp_path):
    command = f"python tokenizer.py {SMALL} --out {tmp_path} --stage 2"
    refused(f"{command} --checkpoint {toy}/nativetok_4_stage2.pt", "stage 2 already")
    refused(f"{command} --tokens 2 --checkpoint {toy}/nativetok_4.pt", "--tokens 2", "has 4", "Leave it out")
    refused(f"{command} --model titok --checkpoint {toy}/nativetok_4.pt", "--model titok", "nativetok")
    refused(f"{command} --checkpoint {toy}/nativetok_4.pt --gan_weight 0", "--discriminator_first 100", "nobody learns")
    assert not list(tmp_path.glob("*.pt"))


def test_the_folder_that_is_missing_is_named_before_a_checkpoint_is(tmp_path):
    for command in ("vqgan.py", "tokenizer.py --tokens 128", "tokenizer.py --stage 2", "hnt.py", "generator.py --mode ar"):
        refused(f"python {command} --config full --data {tmp_path}/imagenet --out {tmp_path}/out", "imagenet: no such folder",
                "train/<class>/*")
    (tmp_path / "imagenet" / "train" / "ant").mkdir(parents=True)
    refused(f"python tokenizer.py --config full --data {tmp_path}/imagenet --out {tmp_path}/out", "vqgan.pt: not found",
            "python -m extras.pretrained vqgan")


def test_missing_optional_weights(toy, tmp_path):
    out = folder_without(toy, tmp_path / "out", "nativetok_4_stage2")
    refused(f"python tokenizer.py {SMALL} --out {out} --tokens 4 --stage 2 --perceptual convnext --discriminator patch", "convnext_small",
            "--perceptual none")


# ---------------------------------------------------------------------------------------------------------------------
# What happens when (trainer.py): disks, locks, numbers, other machines, ranks

VQGAN = f"vqgan.py {SMALL} --save_every 1"


def prepared(toy, out):
    """A folder with the perceptual network, so that vqgan.py need not train it first."""
    out.mkdir()
    shutil.copy(toy / "perceptual.pt", out)
    return out


def patched(lines):
    """vqgan.py, with these lines of Python before its main()."""
    return (f"{sys.executable} -c 'import sys, trainer, vqgan; sys.argv[0] = \"vqgan.py\"\n{lines}\n"
            f"trainer.launch(vqgan.main)' {SMALL} --save_every 1 ")


def start(words, **environment):
    """A process of this command line whose output is read later; it is ended with the test, whatever happens."""
    return subprocess.Popen([sys.executable, *words.split()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)


def test_two_runs_in_one_folder(toy, tmp_path):
    out = prepared(toy, tmp_path / "out")
    first = start(f"{VQGAN} --out {out} --steps 100000")
    try:
        wait_for(out / "vqgan.pt", first)
        refused(f"python {VQGAN} --out {out} --steps 100000 --resume", f"process {first.pid} on", "trains vqgan.pt", "--out")
        refused(f"python {VQGAN} --out {out} --steps 100000 --overwrite", f"process {first.pid} on")
    finally:
        first.kill()
        first.communicate()
    assert (out / ".vqgan.lock").exists()       # the file outlives a kill, the lock does not
    run(f"python {VQGAN} --out {out} --steps {load(out / 'vqgan.pt')['step'] + 1} --resume")
    assert not (out / ".vqgan.lock").exists()


def test_two_generators_share_the_extraction_of_codes(toy, tmp_path):
    out = folder_without(toy, tmp_path / "out", "codes")
    (out / "codes_nativetok_4_train.npy").unlink(missing_ok=True)
    both = [start(f"generator.py --mode {mode} {SMALL} --tokens 4 --steps 1 --out {out}") for mode in ("ar", "maskgit")]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    waiting = [words for words in said if re.search(r"out: waiting; process \d+ on \S+ extracts codes there", words)]
    assert len(waiting) == 1 and sum("codes of shapes train" in words for words in said) == 1, said


def test_a_decoding_process_that_is_killed(folder):
    dataset = data.open_dataset(str(folder), "train", 16)
    dataset.get = lambda index, rng=None: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(BadInput, match="was killed, perhaps for want of memory.*fewer --workers"):
        next(data.batches(dataset, 2, seed=0, workers=1))


def test_full_disk(toy, tmp_path):
    """A limit on the size of files stands for the full disk: the old checkpoint stays whole."""
    out = prepared(toy, tmp_path / "out")
    said = run(f"python {VQGAN} --out {out} --steps 1")
    assert re.search(r"out: takes 7\.\d+ MB \(1 checkpoint of 3\.\d+ MB and the one being written\); .* are free", said)
    before = (out / "vqgan.pt").read_bytes()
    refused(f"ulimit -f 2000; {sys.executable} {VQGAN} --out {out} --steps 2 --resume", "vqgan.pt: cannot be written",
            "it takes 3.", "are free there", "unchanged")
    assert (out / "vqgan.pt").read_bytes() == before and not list(out.glob("*.writing"))
    refused(patched("trainer.free_space = lambda path: 1e6") + f"--out {out} --steps 2 --resume", "a checkpoint takes 3.",
            "1 MB are free")
    assert (out / "vqgan.pt").read_bytes() == before


def test_output_folders_that_are_no_good(toy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(f"python {VQGAN} --out {tmp_path}/file/out --steps 2", "Not a directory", "--out")
    refused(f"python {VQGAN} --out /proc/nothing --steps 2", "/proc/nothing", "--out")
    refused(f"python {VQGAN} --out {tmp_path}/{'x' * 300} --steps 2", "File name too long", "--out")
    out = prepared(toy, tmp_path / "out")
    vanish = "log = trainer.Run.log\ndef gone(run, step, **values):\n log(run, step, **values)\n step != 2 or shutil.rmtree(run.args.out)"
    said = run(patched(f"import shutil\n{vanish}\ntrainer.Run.log = gone") + f"--out {out} --steps 4")
    assert "has vanished" in said and load(out / "vqgan.pt")["step"] == 4
    assert [line["step"] for line in trainer.read_log(out / "vqgan.jsonl")] == [4]


def test_a_listener_that_leaves_does_not_end_the_run(toy, tmp_path):
    out = prepared(toy, tmp_path / "out")
    run(f"{sys.executable} {VQGAN} --out {out} --steps 6 | head -1")
    assert load(out / "vqgan.pt")["step"] == 6


def test_older_checkpoints_are_kept_and_a_run_can_go_back_to_one(toy, tmp_path):
    out = prepared(toy, tmp_path / "out")

    def older():
        return {path.name for path in (out / "older").iterdir()}

    run(f"python {VQGAN} --out {out} --steps 2")
    shutil.copy(out / "vqgan.pt", tmp_path / "early.pt")
    run(f"python {VQGAN} --out {out} --steps 6 --keep 2 --resume")
    whole = load(out / "vqgan.pt")
    assert older() == {"vqgan_step5.pt"} and load(out / "older" / "vqgan_step5.pt")["step"] == 5
    assert (out / "vqgan.pt").stat().st_nlink == 1      # or cp over it would change an older one too
    shutil.copy(tmp_path / "early.pt", out / "vqgan.pt")
    run(f"python {VQGAN} --out {out} --steps 4 --keep 2 --resume")
    assert older() == {"vqgan_step3.pt"}        # the new one, not that which it went back from
    run(f"python {VQGAN} --out {out} --steps 6 --keep 2 --resume")
    assert equal(load(out / "vqgan.pt"), whole)
    (out / "vqgan.pt").unlink()         # taken away: a new run keeps the old one's log
    log = (out / "vqgan.jsonl").read_text()
    run(f"python {VQGAN} --out {out} --steps 1")
    assert (out / "vqgan.old.jsonl").read_text() == log
    run(f"python {VQGAN} --out {out} --steps 1 --overwrite")
    assert not older()


def test_a_run_that_goes_on_elsewhere_or_otherwise_says_so(toy, tmp_path):
    out = prepared(toy, tmp_path / "out")
    run(f"python {VQGAN} --out {out} --steps 2")
    checkpoint = load(out / "vqgan.pt")
    checkpoint["machine"]["torch"] = "2.11.0"
    torch.save(checkpoint, out / "vqgan.pt")
    said = run(f"python {VQGAN} --out {out} --steps 3 --resume --learning_rate 1e-5")
    assert f"elsewhere than it began (torch 2.11.0 -> {torch.__version__})" in said
    assert "was made with learning_rate=0.004, and goes on with 1e-05, as asked" in said
    said = run(f"python {VQGAN} --out {out} --steps 4 --resume --learning_rate 1e-5")
    assert "elsewhere" not in said and "as asked" not in said
    refused(f"python {VQGAN} --out {out} --steps 5 --resume", "was made with learning_rate=1e-05, not 0.004")
    refused(f"python {VQGAN} --out {out} --steps 5 --resume --learning_rate 1e-5 --data fashion", "made with data=Shapes")


def test_a_tokenizer_does_not_go_on_with_another_vqgan(toy, tmp_path):
    out = folder_without(toy, tmp_path / "out", "nativetok_3")
    command = f"python tokenizer.py --tokens 3 {SMALL} --out {out}"
    run(f"{command} --steps 1")
    run(f"python {VQGAN} --out {out} --steps 1 --seed 1 --overwrite")
    refused(f"{command} --steps 2 --resume", "was made with vqgan=", "--overwrite")


def test_numbers_that_are_not_finite(toy, tmp_path):
    out = prepared(toy, tmp_path / "out")
    refused(f"python {VQGAN} --out {out} --steps 9 --clip nan", "model is not finite after step 1", "nothing was saved yet")
    assert not (out / "vqgan.pt").exists()
    refused(f"python {VQGAN} --out {out} --steps 9 --learning_rate 1e30 --warmup 0", "not finite at step 2:", "loss",
            "keeps the last good checkpoint", "smaller --learning_rate")
    assert load(out / "vqgan.pt")["step"] == 1
    before = (out / "vqgan.pt").read_bytes()
    refused(f"python {VQGAN} --out {out} --steps 9 --clip nan --resume", "was made with clip=1.0, not nan")
    assert (out / "vqgan.pt").read_bytes() == before


def test_exploding_gradients_and_a_collapsing_codebook_are_told_and_the_last_checkpoint_is_put_aside(toy, tmp_path):
    out = prepared(toy, tmp_path / "out")
    lie = ("log = trainer.Run.log\ndef lies(run, step, **values):\n"
           " values |= {\"grad_norm\": 1e4} if step == 7 else {\"perplexity\": 20.0} if step in (9, 11) else {}\n"
           " log(run, step, **values)\ntrainer.Run.log = lies")
    said = run(patched(lie) + f"--out {out} --steps 12 --warmup 2 --log_every 1")
    lines = [line for line in said.splitlines() if re.match(r"step \d+: ", line)]
    assert len(lines) == 2, said        # each once, though the codebook recovers and is bad again
    assert lines[0].startswith("step 8: the gradient's norm explodes: 1e+04") and "vqgan_before_gradient.pt" in lines[0]
    assert lines[1].startswith("step 10: the codebook collapses: perplexity 20 with 256 codes")
    assert {p.name: load(p)["step"] for p in (out / "older").iterdir()} == {"vqgan_before_gradient.pt": 7,
                                                                           "vqgan_before_codebook.pt": 9}


def test_deterministic_is_what_the_cpu_does_anyway(toy, tmp_path):
    states = []
    for flag in ("", "--deterministic"):
        out = prepared(toy, tmp_path / f"out{flag}")
        run(f"python {VQGAN} --out {out} --steps 2 {flag}")
        states.append(load(out / "vqgan.pt"))
    assert equal(*states)


RANKS = """
import os, shutil, signal, sys, time
sys.path.insert(0, {root!r})
import data, trainer, vqgan
read, calls, first = data.Reader.__getitem__, 0, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
def get(self, rows):
    global calls
    calls += 1
    if calls == 4 and os.environ["RANK"] == "1" and first:
        {fault}
    return read(self, rows)
data.Reader.__getitem__ = get
if os.environ["RANK"] == "1" and first:
    sys.argv += {arguments}
trainer.launch(vqgan.main)
"""


def ranks(tmp_path, fault, code, flags="", more="", arguments=()):
    """vqgan.py on two ranks of which the second has a fault at its fourth batch, or other arguments: the lines that say
    why it ended, and those of its progress."""
    program = tmp_path / "vqgan.py"
    program.write_text(RANKS.format(root=str(ROOT), fault=fault, arguments=list(map(str, arguments))))
    output = run(f"torchrun --nproc_per_node=2 --master_port=29531 {flags} {program} {SMALL} "
                 f"--out {tmp_path / 'out'} --steps 6 --save_every 1 --hang 6 {more}", code)
    return [[line for line in output.splitlines() if line.startswith(start)] for start in ("vqgan.py: ", "step ")]


@pytest.fixture(scope="session")
def two_ranks(toy, tmp_path_factory):
    """The checkpoint of an undisturbed run of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    prepared(toy, folder / "out")
    assert ranks(folder, "pass", 0)[0] == []
    return load(folder / "out" / "vqgan.pt")


@pytest.mark.parametrize("fault, says", [
    ("os.kill(os.getpid(), signal.SIGKILL)", r"rank 1 \(process \d+ on \S+\) is gone without a word, at .*: killed"),
    ("os.kill(os.getpid(), signal.SIGSTOP)", r"rank 1 \(process \d+ on \S+\) has not been heard of for 6 s: stopped, .* after step \d"),
    ("time.sleep(1000)", r"no step for \d+ s after step 2: rank 0 at vqgan.py:\d+ train; rank 1 at data.py:\d+ read"),
    ("raise trainer.BadInput('no such disk')", "no such disk$"),
    ("1 / 0", "rank 1 ends with the error above")], ids=["killed", "stopped", "hung", "refuses", "fails"])
def test_a_lost_rank_ends_all_in_one_line_and_a_restart_goes_on(toy, tmp_path, two_ranks, fault, says):
    out = prepared(toy, tmp_path / "out")
    lines, steps = ranks(tmp_path, fault, 0, "--max-restarts=1", "--overwrite")
    assert len(lines) == 1 and re.search(says, lines[0]), lines
    assert [line.split(":")[0] for line in steps] == [f"step {i} of 6" for i in (2, 4, 6)]      # went on, not overwritten
    assert equal(load(out / "vqgan.pt"), two_ranks)


def test_ranks_that_see_different_things(toy, tmp_path, folder):
    other = prepared(toy, tmp_path / "out").parent / "other"
    (line,), _ = ranks(tmp_path, "pass", 1, arguments=["--seed", 1])
    assert re.search(r"rank 1 on \S+ has seed 1, rank 0 on \S+ has 0\. Give all ranks the same", line)
    (line,), _ = ranks(tmp_path, "pass", 1, arguments=["--data", folder])
    assert re.search(r"rank 1 on \S+ has data Folder of \d+ images in \d+ classes, rank 0 on \S+ has Shapes", line)
    assert not (tmp_path / "out" / "vqgan.pt").exists()
    run(f"python {VQGAN} --out {tmp_path / 'out'} --steps 3")
    shutil.copytree(tmp_path / "out", other)
    run(f"python {VQGAN} --out {other} --steps 4 --resume")
    (line,), _ = ranks(tmp_path, "pass", 1, more="--resume", arguments=["--out", other])
    assert re.search(r"rank 1 on \S+ has --out \S+other, rank 0 on \S+ has \S+out\.", line)


# ---------------------------------------------------------------------------------------------------------------------
# The commands that write pictures

def test_reconstruct_and_sample(toy, tmp_path):
    image = tmp_path / "a b.PNG"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(image)
    output = run(f"python tokenizer.py --config toy --out {toy} --tokens 4 --reconstruct '{image}' '{image}'")
    codes = [line.split(": ")[1] for line in output.splitlines() if line.startswith(str(image))]
    assert len(codes) == 2 and codes[0] == codes[1] and len(codes[0].split()) == 4
    assert Image.open(toy / "reconstruct.png").width > 200
    command = f"python generator.py --config toy --out {toy} --tokens 4 --mode ar --sample 6 --seed 1"
    one = run(f"{command} --classes 3,5 --output {tmp_path}/a.png")
    run(f"{command} --classes 3,5 --output {tmp_path}/b.png")
    run(f"{command} --classes 3,5 --seed 2 --output {tmp_path}/c.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b and a != c and str(tmp_path / "a.png") in one
    run(f"{command} --separate --output {tmp_path}/many")
    assert len(list((tmp_path / "many").glob("*.png"))) == 6
    refused(f"{command} --classes circel", "circel", "circle")
    refused(f"python tokenizer.py --config toy --out {toy} --tokens 4 --reconstruct {tmp_path}/none.png", "none.png")


# ---------------------------------------------------------------------------------------------------------------------
# Data (data.py)

@pytest.fixture(autouse=True)
def fresh_lines():
    data.say.cache_clear()              # so that each test sees the lines that are said once
    data.find_fashion.cache_clear()


def picture(seed, height=40, width=50):
    """A smooth colour picture, so that lossy formats and resizing change it little."""
    corners = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(corners, (height, width), mode="bilinear", align_corners=True)[0]
    return Image.fromarray((smooth * 255).byte().permute(1, 2, 0).numpy())


@pytest.fixture
def folder(tmp_path):
    """train/ with 3 classes of 8, val/ with 3 of 2."""
    for split, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(count):
                picture(100 * label + i).save(tmp_path / "pictures" / split / name / f"{i}.png")
    return tmp_path / "pictures"


def take(source, count):
    return list(itertools.islice(source, count))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for pair in zip(a, b) for x, y in zip(*pair))


# -- order ------------------------------------------------------------------------------------------------------------

def test_every_epoch_is_another_permutation():
    steps = take(data.row_order(10, 3, seed=0), 6)
    for epoch in (0, 1):
        rows = np.concatenate([indices for _, indices in steps[3 * epoch:3 * epoch + 3]])
        assert len(set(rows)) == 9
        assert {int(e) for epochs, _ in steps[3 * epoch:3 * epoch + 3] for e in epochs} == {epoch}
    assert not np.array_equal(steps[0][1], steps[3][1])
    assert not np.array_equal(steps[0][1], next(data.row_order(10, 3, seed=1))[1])


def test_fewer_images_than_a_batch():
    for epochs, indices in take(data.row_order(3, 8, seed=0), 4):
        assert len(indices) == 8 and set(indices) == {0, 1, 2} and len({*zip(epochs.tolist(), indices.tolist())}) == 8


def test_order_does_not_depend_on_workers_ranks_or_resuming(folder):
    dataset = data.open_dataset(str(folder), "train", 16, augment=True)
    plain = take(data.batches(dataset, 8, seed=3), 7)                                    # more than two epochs
    assert plain[0][0].shape == (8, 3, 16, 16)
    assert plain[0][0].dtype == torch.float32 and plain[0][1].dtype == torch.int64
    assert 0 <= plain[0][0].min() and plain[0][0].max() <= 1
    state = torch.get_rng_state()
    assert same(plain, take(data.batches(dataset, 8, seed=3, workers=2), 7))
    assert torch.equal(state, torch.get_rng_state())                                     # a resumed run depends on it
    assert same(plain[5:], take(data.batches(dataset, 8, seed=3, step=5), 2))
    parts = zip(*(take(data.batches(dataset, 8, seed=3, rank=r, world=2), 7) for r in (0, 1)))
    assert same(plain, [tuple(map(torch.cat, zip(*pair))) for pair in parts])
    assert not same(plain, take(data.batches(dataset, 8, seed=4), 7))
    with pytest.raises(BadInput, match="does not divide"):
        data.batches(dataset, 9, seed=0, world=2)


def test_augmentation_changes_with_the_epoch_and_fixed_views_do_not(folder):
    dataset = data.open_dataset(str(folder), "train", 16, augment=True)
    views = [dataset.get(0, np.random.default_rng(seed)) for seed in range(8)]
    assert len({view.tobytes() for view in views}) == 8
    assert np.array_equal(dataset.get(0), dataset.get(0))
    fixed = data.open_dataset(str(folder), "train", 16)
    assert np.array_equal(fixed.get(0, np.random.default_rng(1)), dataset.get(0))


def test_all_images_once_in_order(folder):
    dataset = data.open_dataset(str(folder), "train", 16, augment=True)
    seen = list(data.all_images(dataset, 7))
    assert [len(images) for images, _ in seen] == [7, 7, 7, 3]
    assert torch.equal(torch.cat([labels for _, labels in seen]), torch.from_numpy(dataset.labels))
    assert same(seen, list(data.all_images(dataset, 7, workers=2)))
    assert np.array_equal((seen[0][0][2] * 255).round().byte().numpy(), dataset.get(2))
    assert sum(len(images) for images, _ in data.all_images(dataset, 7, limit=10)) == 10


# -- kinds of data ----------------------------------------------------------------------------------------------------

def test_shapes():
    train, val = (data.open_dataset("shapes", split, 32) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes), train.photographs) == (10_000, 2_000, 10, False)
    assert train.get(7).shape == (3, 32, 32) and train.get(7).dtype == np.uint8 and train.labels.dtype == np.int64
    assert np.array_equal(train.get(7), data.open_dataset("shapes", "train", 32).get(7))
    assert not np.array_equal(train.get(7), val.get(7)) and train.fingerprint != val.fingerprint
    assert np.bincount(val.labels).tolist() == [200] * 10
    large = torch.from_numpy(data.open_dataset("shapes", "train", 128).get(3)).float()   # the same picture at any size
    small = torch.from_numpy(train.get(3)).float()
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 6
    assert train.get(3).reshape(3, -1).std(1).max() > 20                                 # there is something to see


def write_idx(folder, count=20, compress=True):
    """Files in Fashion-MNIST's format with random content; returns their checksums."""
    rng, sums = np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()
            name = f"{part}-{kind}-ubyte"
            sums[name] = hashlib.sha256(content).hexdigest()
            (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
    return sums


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without Fashion-MNIST, without connection and without apt."""
    monkeypatch.setattr(data, "FASHION_FOLDER", tmp_path / "data" / "fashion-mnist")
    monkeypatch.setattr(data, "FASHION_PLACES", [tmp_path / "data" / "fashion-mnist", tmp_path / "debian"])
    monkeypatch.setattr(data.shutil, "which", lambda program: None)

    def no_connection(*args, **kwargs):
        raise data.urllib.error.URLError("no connection")
    monkeypatch.setattr(data.urllib.request, "urlopen", no_connection)
    return tmp_path


@pytest.mark.parametrize("compress", (True, False))
def test_fashion(nowhere, compress):
    write_idx(nowhere / "debian", compress=compress)
    dataset = data.open_dataset("auto", "val", 32)
    assert (dataset.name, dataset.border, len(dataset), dataset.classes[8]) == ("fashion", 2, 20, "bag")
    image = dataset.get(3)
    assert image.shape == (3, 32, 32) and not image[:, :2].any() and not image[:, :, -2:].any()
    assert np.array_equal(image[0, 2:-2, 2:-2], dataset.pixels[3])
    assert data.open_dataset("fashion", "val", 28).get(3).shape == (3, 28, 28)
    large = data.open_dataset("fashion", "val", 64)
    assert large.get(3).shape == (3, 64, 64) and large.border == 0 and large.fingerprint != dataset.fingerprint
    assert take(data.batches(dataset, 8, seed=0), 1)[0][0].shape == (8, 3, 32, 32)


def test_damaged_idx_is_one_line(nowhere):
    write_idx(nowhere / "debian")
    file = nowhere / "debian" / "train-images-idx3-ubyte.gz"
    content = file.read_bytes()
    for bad in (content[:5000], b"hello", b"", gzip.compress(b"hello"), gzip.compress(gzip.decompress(content)[:-1])):
        file.write_bytes(bad)
        with pytest.raises(BadInput, match="train-images-idx3-ubyte.gz") as error:
            data.open_dataset("fashion", "train", 32)
        assert "\n" not in str(error.value)


def test_auto_falls_back_to_shapes_and_fashion_does_not(nowhere, capsys):
    assert data.open_dataset("auto", "train", 32).name == "shapes"
    assert data.open_dataset("auto", "val", 32).name == "shapes"
    assert capsys.readouterr().out.count("drawn and not photographed") == 1
    with pytest.raises(BadInput, match="no connection.*apt-get") as error:
        data.open_dataset("fashion", "train", 32)
    assert str(nowhere / "debian") in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def server(tmp_path):
    """A web server of tmp_path/served; the files named in its `cut` are broken off in the middle."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = (tmp_path / "served" / self.path.strip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:len(content) // 2] if self.path.strip("/") in self.server.cut else content)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.cut = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_download(tmp_path, server, monkeypatch):
    monkeypatch.setattr(data, "FASHION_SHA256", write_idx(tmp_path / "served"))
    url, home = f"http://127.0.0.1:{server.server_port}/", tmp_path / "home"
    last = "t10k-labels-idx1-ubyte.gz"

    server.cut = ["train-images-idx3-ubyte.gz"]
    with pytest.raises(BadInput, match="train-images-idx3-ubyte.gz: truncated"):
        data.fetch_fashion(home, url)
    assert not home.exists()

    server.cut = []
    right = (tmp_path / "served" / last).read_bytes()
    for wrong, fault in ((gzip.compress(b"another file"), "wrong checksum"),
                         (b"<html>log in</html>", "not a gzip file"), (right[:-9], "truncated"), (None, "cannot be downloaded")):
        (tmp_path / "served" / last).write_bytes(wrong) if wrong else (tmp_path / "served" / last).unlink()
        with pytest.raises(BadInput, match=f"{last}: {fault}"):
            data.fetch_fashion(home, url)
        assert set(os.listdir(home)) == {f"{name}.gz" for name in data.FASHION_SHA256} - {last}

    (tmp_path / "served" / last).write_bytes(gzip.compress(gzip.decompress(right), 1))       # a mirror packed it anew
    assert data.has_fashion(data.fetch_fashion(home, url))
    (home / last).write_bytes(b"damaged later")
    data.fetch_fashion(home, url)
    assert len(data.Fashion(home, "val", 32)) == 20


def test_download_without_a_connection(tmp_path, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(BadInput, match="cannot be downloaded") as error:
        data.fetch_fashion(tmp_path / "home", f"http://127.0.0.1:{server.server_port}/")
    assert not (tmp_path / "home").exists() and "\n" not in str(error.value)


def test_download_into_a_folder_that_cannot_be_written(tmp_path, server, monkeypatch):
    monkeypatch.setattr(data, "FASHION_SHA256", write_idx(tmp_path / "served"))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput):
        data.fetch_fashion(tmp_path / "file" / "home", f"http://127.0.0.1:{server.server_port}/")


# -- folders ----------------------------------------------------------------------------------------------------------

def saved(tmp_path, name, image, **options):
    image.save(tmp_path / name, **options)
    return data.read_image(tmp_path / name, 32)


def test_every_mode_shows_the_same_picture(tmp_path):
    base = picture(1)
    want = saved(tmp_path, "rgb.png", base)
    turned = Image.Exif()
    turned[0x0112] = 6                                                       # "turn 90 degrees clockwise to see it"
    blank = base.copy()
    blank.paste("black", (0, 0, *base.size))
    for image, tolerance in (
            (saved(tmp_path, "a.JPG", base, quality=95), 0.03), (saved(tmp_path, "a.WebP", base, quality=95), 0.03),
            (saved(tmp_path, "p.png", base.quantize(256)), 0.05),
            (saved(tmp_path, "cmyk.jpg", base.convert("CMYK"), quality=95), 0.06),
            (saved(tmp_path, "rgba.png", base.convert("RGBA")), 0.001),
            (saved(tmp_path, "exif.jpg", base.transpose(Image.Transpose.ROTATE_90), quality=95, exif=turned), 0.03),
            (saved(tmp_path, "two.png", base, save_all=True, append_images=[blank]), 0.001),
            (saved(tmp_path, "two.gif", base, save_all=True, append_images=[blank]), 0.1)):
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and (image - want).abs().mean() < tolerance
    grey = base.convert("L")
    want = saved(tmp_path, "l.png", grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    for image in (saved(tmp_path, "deep.png", deep), saved(tmp_path, "deep.tif", deep),
                  saved(tmp_path, "la.png", grey.convert("LA")),
                  saved(tmp_path, "float.tiff", Image.fromarray(np.asarray(grey).astype(np.float32) / 255))):
        assert (image - want).abs().max() < 0.005
    bits = saved(tmp_path, "bits.png", grey.convert("1"))
    assert (bits.mean() - want.mean()).abs() < 0.05


def test_transparent_becomes_white(tmp_path):
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([255, 0, 0])
    assert (saved(tmp_path, "rgba.png", clear) == 1).all()
    assert (saved(tmp_path, "la.png", clear.convert("LA")) == 1).all()
    assert (saved(tmp_path, "p.png", palette, transparency=0) == 1).all()


def test_any_size(tmp_path):
    for size in ((1, 1), (1, 3000), (3000, 1), (31, 33)):
        assert saved(tmp_path, "a.png", picture(0, *size)).shape == (3, 32, 32)
    halves = np.zeros((20, 60, 3), np.uint8)
    halves[:, 20:40] = 255
    assert (saved(tmp_path, "b.png", Image.fromarray(halves)) > 0.99).float().mean() > 0.85      # the middle


def test_layouts(tmp_path, capsys):
    for i in range(200):
        (tmp_path / "bare").mkdir(exist_ok=True)
        picture(i, 8, 8).save(tmp_path / "bare" / f"{i}.PNG")
    train, val = (data.open_dataset(str(tmp_path / "bare"), split, 8) for split in ("train", "val"))
    assert len(train) + len(val) == 200 and 2 <= len(val) <= 25 and not set(train.files) & set(val.files)
    assert train.classes == ["images"] and capsys.readouterr().out.count("held out") == 1
    before = set(val.files)
    picture(0, 8, 8).save(tmp_path / "bare" / "new.png")                     # a newcomer moves nobody
    assert before <= set(data.open_dataset(str(tmp_path / "bare"), "val", 8).files) | {"new.png"}
    assert data.open_dataset(str(tmp_path / "bare"), "train", 8).fingerprint != train.fingerprint or "new.png" in \
        data.open_dataset(str(tmp_path / "bare"), "val", 8).files

    for name in ("dog", "elk"):
        (tmp_path / "classes" / name / "deeper").mkdir(parents=True)
        picture(0).save(tmp_path / "classes" / name / "deeper" / "a.jpeg")
    (tmp_path / "classes" / "notes.txt").write_text("not an image")
    (tmp_path / "classes" / "empty").mkdir()
    train, val = (data.open_dataset(str(tmp_path / "classes"), split, 8) for split in ("train", "val"))
    assert train.classes == val.classes == ["dog", "elk"] and (len(train), len(val)) == (1, 1)

    (tmp_path / "one" / "fox").mkdir(parents=True)
    picture(0).save(tmp_path / "one" / "fox" / "a.png")
    only = data.open_dataset(str(tmp_path / "one"), "train", 8)
    assert only.classes == ["fox"] and next(data.batches(only, 4, seed=0))[0].shape == (4, 3, 8, 8)


def test_folder_of_splits(folder):
    train, val = (data.open_dataset(str(folder), split, 8) for split in ("train", "val"))
    assert train.classes == val.classes == ["ant", "bee", "cat"] and (len(train), len(val)) == (24, 6)
    assert train.name == str(folder) and train.fingerprint == data.open_dataset(str(folder), "train", 8).fingerprint
    assert train.fingerprint != data.open_dataset(str(folder), "train", 16).fingerprint
    picture(5).save(folder / "train" / "ant" / "0.png")
    assert train.fingerprint != data.open_dataset(str(folder), "train", 8).fingerprint
    (folder / "val" / "dog").mkdir()
    picture(5).save(folder / "val" / "dog" / "0.png")
    with pytest.raises(BadInput, match="dog"):
        data.open_dataset(str(folder), "val", 8)


def test_bad_folders(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_bytes(b"")
    (folder / "val").rename(folder / "test")
    for name, line in (("empty", "no images.*jpeg"), ("file.png", "is a file"), ("missing", "no such folder"),
                       ("pictures", "needs both train/ and val/")):
        with pytest.raises(BadInput, match=line) as error:
            data.open_dataset(str(tmp_path / name), "train", 8)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_draft_is_close_to_a_full_decode_and_off_unless_asked_for(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "jpegs" / split / "ant").mkdir(parents=True)
        for name, size in (("large", (300, 400)), ("small", (60, 50)), ("odd", (130, 129))):
            noisy = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)    # detail, so that it shows
            Image.blend(picture(1, *size), Image.fromarray(noisy), 0.3).save(tmp_path / "jpegs" / split / "ant"
                                                                             / f"{name}.jpg", quality=95)
    full, plain, draft = (data.open_dataset(str(tmp_path / "jpegs"), "train", 32, **how)
                          for how in ({}, {"draft": False}, {"draft": True}))
    assert full.files == ["ant/large.jpg", "ant/odd.jpg", "ant/small.jpg"]
    assert full.fingerprint == plain.fingerprint != draft.fingerprint                    # other pixels, another name
    for index, same_pixels in enumerate((False, False, True)):
        want, drafted = full.get(index).astype(int), draft.get(index).astype(int)
        path = full.root / full.files[index]
        assert np.array_equal(want, data.read_image(path, 32).mul(255).round().numpy())
        assert (abs(want - drafted).max() == 0) == same_pixels and abs(want - drafted).mean() < 4
        assert same_pixels or 64 <= min(data.decode(path, 32, draft=True).size) < min(data.decode(path, 32).size)


def long_ago(folder):
    """As if nothing in it had changed for an hour."""
    for root, _, _ in os.walk(folder):
        os.utime(root, (time.time() - 3600,) * 2)


def test_the_list_of_a_large_folder_is_kept_until_a_folder_changes(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "LISTS", tmp_path / "lists")
    monkeypatch.setattr(data, "LARGE", 10)

    def opened(name=str(folder)):
        data.say.cache_clear()
        dataset, said = data.open_dataset(name, "train", 16), capsys.readouterr().out
        return dataset, "list from" in said
    first, _ = opened()
    assert not (tmp_path / "lists").exists()                                 # made just now: files may still come
    long_ago(folder)
    assert not opened()[1] and len(kept := list((tmp_path / "lists").iterdir())) == 1        # of train alone
    again, from_list = opened()
    assert from_list and again.fingerprint == first.fingerprint and again.files == first.files
    assert again.classes == first.classes and np.array_equal(again.labels, first.labels)
    monkeypatch.chdir(tmp_path)                                              # however the folder is called
    assert opened("pictures")[1] and opened("pictures")[0].fingerprint == first.fingerprint

    picture(5, 9, 9).save(folder / "train" / "ant" / "0.png")                # overwritten in place: not seen
    assert opened()[0].fingerprint == first.fingerprint
    kept[0].unlink()
    overwritten, from_list = opened()
    assert not from_list and overwritten.fingerprint != first.fingerprint

    def add_deep():
        (folder / "train" / "bee" / "deep").mkdir()
        picture(1).save(folder / "train" / "bee" / "deep" / "a.png")
    for change, count in ((lambda: picture(1).save(folder / "train" / "ant" / "new.png"), 25), (add_deep, 26),
                          (lambda: picture(2).save(folder / "train" / "bee" / "deep" / "b.png"), 27),
                          (lambda: (folder / "train" / "cat" / "0.png").unlink(), 26),
                          (lambda: (folder / "train" / "cat" / "1.png").rename(folder / "train" / "cat" / "z.png"), 26),
                          (lambda: (folder / "train" / "cat").rename(folder / "other"), 19),
                          (lambda: kept[0].write_text("{"), 19), (lambda: kept[0].write_text("[]"), 19),
                          (lambda: kept[0].write_text('{"folders": {}, "files": 3}'), 19)):
        long_ago(folder)
        assert opened()[0] and opened()[1]                                   # kept, and used
        change()
        dataset, from_list = opened()
        assert not from_list and len(dataset) == count

    monkeypatch.setattr(data, "LISTS", folder / "train" / "ant" / "new.png" / "lists")       # cannot be written
    long_ago(folder)
    assert len(opened()[0]) == 19


def test_a_cmyk_jpeg_and_a_truncated_one_do_not_stop_a_run(folder, tmp_path):
    ant = folder / "train" / "ant"
    picture(1).convert("CMYK").save(ant / "0.jpg", quality=95)
    picture(1).save(ant / "1.jpg", quality=95)
    (ant / "1.jpg").write_bytes((ant / "1.jpg").read_bytes()[:-200])
    for draft in (False, True):
        dataset = data.open_dataset(str(folder), "train", 16, augment=True, draft=draft)
        take(data.batches(dataset, 13, seed=0, workers=1), 4)                # two epochs
        assert [dataset.files[index] for index in dataset.unreadable] == ["ant/1.jpg"]


@pytest.fixture
def damaged(tmp_path):
    """300 pictures in two classes, three of them broken in different ways, two of these at the end of their class."""
    for name in ("ant", "bee"):
        for split in ("train", "val"):
            (tmp_path / "damaged" / split / name).mkdir(parents=True)
        for i in range(150):
            picture(i, 12, 12).save(tmp_path / "damaged" / "train" / name / f"{i:03}.png")
        picture(0, 12, 12).save(tmp_path / "damaged" / "val" / name / "0.png")
    train = tmp_path / "damaged" / "train"
    (train / "ant" / "003.png").write_bytes((train / "ant" / "003.png").read_bytes()[:60])
    (train / "ant" / "149.png").write_bytes(b"")
    (train / "bee" / "149.png").write_text("not a picture")
    return tmp_path / "damaged"


def test_broken_files_are_named_and_skipped_alike_in_all_processes(damaged, capsys):
    dataset = data.open_dataset(str(damaged), "train", 8)
    plain = list(data.all_images(dataset, 16))
    assert [len(images) for images, _ in plain] == [16] * 18 + [12] and len(dataset.unreadable) == 3
    assert np.array_equal(dataset.get(3), dataset.get(4))                    # the next of its class
    assert np.array_equal(dataset.get(149), dataset.get(0)) and np.array_equal(dataset.get(299), dataset.get(150))
    said = capsys.readouterr().out
    assert all(said.count(name) == 1 for name in ("ant/003.png", "ant/149.png", "bee/149.png", "3 of 300"))

    data.say.cache_clear()
    parallel = data.open_dataset(str(damaged), "train", 8)
    assert same(plain, list(data.all_images(parallel, 16, workers=2))) and set(parallel.unreadable) == {3, 149, 299}
    said = capsys.readouterr().out
    assert all(said.count(name) == 1 for name in ("ant/003.png", "ant/149.png", "bee/149.png"))


@pytest.mark.parametrize("workers", (0, 2))
def test_more_than_one_percent_broken(damaged, workers):
    (damaged / "train" / "bee" / "007.png").write_bytes(b"")
    with pytest.raises(BadInput, match="4 of 300") as error:
        list(data.all_images(data.open_dataset(str(damaged), "train", 8), 16, workers=workers))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", (0, 2))
def test_a_class_without_a_readable_file(damaged, workers):
    for split in ("train", "val"):
        (damaged / split / "cat").mkdir()
    (damaged / "train" / "cat" / "0.png").write_bytes(b"")
    (damaged / "train" / "ant" / "003.png").unlink()
    with pytest.raises(BadInput, match="no readable image of class cat") as error:
        list(data.all_images(data.open_dataset(str(damaged), "train", 8), 16, workers=workers))
    assert "\n" not in str(error.value)


def test_decompression_bombs_are_unreadable(tmp_path, monkeypatch):
    picture(0, 60, 60).save(tmp_path / "a.png")
    for limit in (3000, 1000):                                               # Pillow warns, and refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadInput, match="a.png.*pixels"):
            data.read_image(tmp_path / "a.png", 8)


def test_read_image_of_nothing(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    for name in ("a.png", "b.png", "."):
        with pytest.raises(BadInput) as error:
            data.read_image(tmp_path / name, 8)
        assert "\n" not in str(error.value)


# -- token cache ------------------------------------------------------------------------------------------------------

class Brightness:
    """A tokenizer of 4 codes: the mean brightness of each quarter."""
    calls, dies_at, fails_at = 0, None, None

    def encode(self, images):
        self.calls += 1
        if self.calls == self.dies_at:
            os._exit(9)         # as kill -9
        if self.calls == self.fails_at:
            raise RuntimeError("out of order")
        return (torch.nn.functional.adaptive_avg_pool2d(images.mean(1), 2) * 255).long()     # [B, 2, 2]


@pytest.fixture
def extract(tmp_path, folder):
    def extract(tokenizer, fingerprint="one", split="train", views=2, batch_size=5, **options):
        dataset = data.open_dataset(str(folder), split, 16)
        return data.token_cache(tokenizer, dataset, tmp_path / "cache" / "codes.npy", fingerprint, views=views,
                                batch_size=batch_size, **options)
    return extract


def test_token_cache(extract, folder):
    tokenizer = Brightness()
    codes, labels = extract(tokenizer)
    assert codes.shape == (2, 24, 4) and codes.dtype == np.uint16 and isinstance(codes, np.memmap)
    assert tokenizer.calls == 10
    images = torch.cat([images for images, _ in data.all_images(data.open_dataset(str(folder), "train", 16), 24)])
    for view in (images, images.flip(-1)):
        assert np.array_equal(codes[int(view is not images)], tokenizer.encode(view).flatten(1).numpy())
    assert np.array_equal(labels, data.open_dataset(str(folder), "train", 16).labels)
    again = Brightness()
    assert np.array_equal(extract(again)[0], codes) and again.calls == 0
    assert extract(Brightness(), views=1, codebook=70_000)[0].dtype == np.uint32
    with pytest.raises(ValueError, match="codebook of 10"):
        extract(Brightness(), codebook=10)


def test_stale_and_damaged_caches_are_rebuilt(extract, folder, tmp_path, capsys):
    path, note = tmp_path / "cache" / "codes.npy", tmp_path / "cache" / "codes.json"
    want = np.array(extract(Brightness())[0])

    def flip_a_bit():
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    for damage in (flip_a_bit, note.unlink, path.unlink, lambda: note.write_text("{"), lambda: note.write_text("[]"),
                   lambda: path.write_bytes(path.read_bytes()[:-8]), lambda: path.write_bytes(b"")):
        damage()
        data.say.cache_clear()
        tokenizer = Brightness()
        assert np.array_equal(extract(tokenizer)[0], want) and tokenizer.calls == 10
        assert capsys.readouterr().out.count("what is missing is extracted") == 1
    tokenizer = Brightness()
    extract(tokenizer, fingerprint="two")                                    # another tokenizer
    picture(77).save(folder / "train" / "ant" / "0.png")                     # other data
    extract(tokenizer, fingerprint="two")
    said = capsys.readouterr().out
    assert tokenizer.calls == 20 and "another tokenizer" in said and "what is missing is extracted" in said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_killed_extraction_continues(extract, tmp_path, folder, monkeypatch):
    want = np.array(extract(Brightness())[0])
    for name in ("codes.npy", "codes.json"):
        (tmp_path / "cache" / name).unlink()
    program = f"""
import sys; sys.path[:0] = {[str(Path(data.__file__).parent), str(Path(__file__).parent)]!r}
import data, {Path(__file__).stem} as tests
data.BLOCK, tokenizer = 10, tests.Brightness(); tokenizer.dies_at = 8
data.token_cache(tokenizer, data.open_dataset({str(folder)!r}, "train", 16),
                 {str(tmp_path / "cache" / "codes.npy")!r}, "one", views=2, batch_size=5)"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120).returncode == 9
    assert [path.name for path in tmp_path.glob("cache/*/*")] == ["000000.npy"]
    monkeypatch.setattr(data, "BLOCK", 10)
    tokenizer = Brightness()
    assert np.array_equal(extract(tokenizer)[0], want) and tokenizer.calls == 6


def test_views_of_an_image():
    images = pictures(2, size=35)
    one, two, ten = data.views_of(images, 1, 32), data.views_of(images, 2, 32), data.views_of(images, 10, 32)
    assert len(one) == 1 and torch.equal(one[0], images)
    assert len(two) == 2 and torch.equal(two[0], images) and torch.equal(two[1], images.flip(-1))
    assert len(ten) == 10 and all(view.shape == (2, 3, 32, 32) for view in ten)
    assert all(torch.equal(flip, view.flip(-1)) for view, flip in zip(ten[:5], ten[5:]))
    canvas = torch.zeros_like(images)
    for view, corner in zip(ten, ((0, 0), (0, 3), (3, 0), (3, 3))):
        y, x = corner
        assert torch.equal(view, images[..., y:y + 32, x:x + 32])
        canvas[..., y:y + 32, x:x + 32] = view
    assert torch.equal(canvas, images)                                       # the four corners leave nothing out
    assert torch.equal(data.views_of(images, 10, 33)[4], images[..., 1:34, 1:34])            # the middle
    assert len(data.views_of(images, 10, 35)) == 10


def test_extract_codes_of_ten_crops(folder, tmp_path):
    dataset = data.open_dataset(str(folder), "train", int(1.1 * 16))
    model = Brightness()
    model.config = SimpleNamespace(image_size=16)
    about = SimpleNamespace(config=replace(AR, views=10, codebook_size=256), training=trainer.TrainConfig(workers=0),
                            device="cpu", main=True)
    codes, labels = generator.extract_codes(about, model, "one", dataset, tmp_path / "codes.npy")
    assert codes.shape == (10, 24, 4) and np.array_equal(labels, dataset.labels)
    assert np.array_equal(codes[5:], codes[:5][..., [1, 0, 3, 2]])           # a flip swaps left and right quarters


def test_parts_depend_neither_on_batches_nor_on_blocks(extract, tmp_path, monkeypatch):
    want, path = np.array(extract(Brightness())[0]), tmp_path / "cache" / "codes.npy"
    content, note = path.read_bytes(), path.with_suffix(".json").read_bytes()
    assert {other.name for other in path.parent.iterdir()} == {"codes.npy", "codes.json"}    # no parts are left
    for block, batch_size, workers in ((7, 5, 0), (1, 3, 0), (8, 64, 2), (24, 24, 0)):
        path.unlink()
        monkeypatch.setattr(data, "BLOCK", block)
        assert np.array_equal(extract(Brightness(), batch_size=batch_size, workers=workers)[0], want)
        assert path.read_bytes() == content and path.with_suffix(".json").read_bytes() == note


def test_only_parts_that_fit_are_used(extract, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 10)
    cache, want = tmp_path / "cache", np.array(extract(Brightness())[0])

    def cut_short(fingerprint="one"):
        """An extraction that failed in its third part of three: the two before it are there."""
        for path in cache.glob("codes.*[yn]"):
            path.unlink()
        tokenizer = Brightness()
        tokenizer.fails_at = 9
        with pytest.raises(RuntimeError, match="out of order"):
            extract(tokenizer, fingerprint)
        parts = sorted(cache.glob("codes.parts-*/*.npy"))
        assert len(parts) == 2 and tokenizer.calls == 9
        return parts
    for damage, calls in ((lambda part: None, 2), (Path.unlink, 6), (lambda part: part.write_bytes(b""), 6),
                          (lambda part: part.write_bytes(part.read_bytes()[:-1]), 6),
                          (lambda part: part.write_bytes(b"nonsense" * 20), 6),
                          (lambda part: part.with_name(f"{part.name}.writing").write_bytes(b"half"), 2),
                          (lambda part: np.save(part, np.zeros((2, 9, 4), np.uint16)), 6),
                          (lambda part: np.save(part, np.zeros((2, 10, 4), np.int64)), 6)):
        damage(cut_short()[1])
        tokenizer = Brightness()
        assert np.array_equal(extract(tokenizer)[0], want) and tokenizer.calls == calls
    stale = cut_short("two")[0].parent
    (cache / "codes_b.parts-12345678").mkdir()                               # another tokenizer's
    tokenizer = Brightness()
    assert np.array_equal(extract(tokenizer)[0], want) and tokenizer.calls == 10 and not stale.exists()
    stale.mkdir()
    extract(Brightness())                                                    # also beside a cache that is whole
    assert {path.name for path in cache.iterdir()} == {"codes.npy", "codes.json", "codes_b.parts-12345678"}


def ranks_program(tmp_path, folder, **settings):
    """A script that extracts with Brightness on every rank and prints how often that was called."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import sys; sys.path[:0] = {[str(Path(data.__file__).parent), str(Path(__file__).parent)]!r}
import torch.distributed as dist
import data, trainer, {Path(__file__).stem} as tests

def main():
    dist.init_process_group("gloo")
    data.BLOCK, tokenizer = 4, tests.Brightness()
    for name, value in {settings}.items() if dist.get_rank() == 1 else ():
        setattr(tokenizer, name, value)
    codes, labels = data.token_cache(tokenizer, data.open_dataset({str(folder)!r}, "train", 16),
                                     {str(tmp_path / "cache" / "codes.npy")!r}, "one", views=2, batch_size=5)
    assert codes.shape == (2, 24, 4) and len(labels) == 24
    sys.stdout.write(f"rank {{dist.get_rank()}}: {{tokenizer.calls}} calls\\n")
trainer.launch(main)""")
    return f"torchrun --nproc_per_node=2 --master_port={{}} {program}"


def test_ranks_share_the_parts_and_go_on_with_what_one_rank_left(extract, tmp_path, folder, monkeypatch):
    cache, want = tmp_path / "cache", np.array(extract(Brightness())[0])
    (cache / "codes.npy").unlink()
    monkeypatch.setattr(data, "BLOCK", 4)                                    # six parts
    tokenizer = Brightness()
    tokenizer.fails_at = 6                                                   # in the third
    with pytest.raises(RuntimeError, match="out of order"):
        extract(tokenizer)
    said = run(ranks_program(tmp_path, folder).format(29523))
    assert "rank 0: 4 calls" in said and "rank 1: 4 calls" in said, said     # parts 2 and 4, parts 3 and 5
    tokenizer = Brightness()
    assert np.array_equal(extract(tokenizer)[0], want) and tokenizer.calls == 0
    assert {path.name for path in cache.iterdir()} == {"codes.npy", "codes.json"}


def test_a_rank_that_fails_ends_the_others_and_what_is_done_stays(extract, tmp_path, folder, monkeypatch):
    want = np.array(extract(Brightness())[0])
    (tmp_path / "cache" / "codes.npy").unlink()
    said = run(ranks_program(tmp_path, folder, fails_at=4).format(29524), code=1)
    assert "out of order" in said and "calls" not in said                    # and did not wait for ever
    done = {int(part.stem) for part in tmp_path.glob("cache/codes.parts-*/*.npy")}
    assert 1 in done and not done & {3, 5}
    monkeypatch.setattr(data, "BLOCK", 4)
    tokenizer = Brightness()
    assert np.array_equal(extract(tokenizer)[0], want) and tokenizer.calls == 2 * (6 - len(done))


# -- pictures and the command line ------------------------------------------------------------------------------------

def test_picture_grid_and_save(tmp_path):
    grid = data.picture_grid(torch.zeros(5, 3, 4, 6), columns=3, scale=2)
    assert grid.size == (3 * 12 + 2 * 2, 2 * 8 + 2) and grid.getpixel((11, 7)) == (0, 0, 0)
    assert all(grid.getpixel(gap) == (255, 255, 255) for gap in ((12, 0), (0, 9), (39, 17)))
    data.save_picture(grid, tmp_path / "deep" / "grid.png")
    assert data.read_image(tmp_path / "deep" / "grid.png", 8).shape == (3, 8, 8)
    with pytest.raises(BadInput, match="grid.xyz"):
        data.save_picture(grid, tmp_path / "grid.xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_command_line(tmp_path):
    said = run(f"python data.py --data shapes --preview {tmp_path}/a.png", fresh=True)
    assert "10,000 train, 2,000 val" in said and "drawn" in said
    with Image.open(tmp_path / "a.png") as preview:
        assert preview.size == (10 * 66 - 2, 10 * 66 - 2)
    refused("python data.py --data fashoin", "Did you mean fashion")
    refused("python data.py --previw a.png", "--preview")
    refused("python data.py --data shapes --image_size 0", "image_size")


# ---------------------------------------------------------------------------------------------------------------------
# Generators (generator.py)

ASSETS = ROOT / "assets/golden"
AR = GeneratorConfig(tokens=9, codebook_size=24, num_classes=3, width=32, layers=2, heads=4, dropout=0.0)
MASKGIT = replace(AR, mode="maskgit", tokens=12)
LABELS = torch.tensor([0, 1, 2, 0, 1])


def random_generator(config, seed=0):
    """Weights large enough that the logits of a fresh model differ clearly."""
    torch.manual_seed(seed)
    model = generator.GENERATORS[config.mode](config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.normal_(std=0.3)
    return model


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def golden_weights(name):
    """The weight rule of the reference data: every entry from its own name and shape."""
    state = {}
    for key, shape in json.loads((ASSETS / f"{name}_keys.json").read_text()).items():
        n = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float32)
        if len(shape) >= 2:
            n = n * np.float32(1 / np.sqrt(np.prod(shape[1:])))
        else:
            n = np.float32(0.02) * n if key.endswith("bias") else 1 + np.float32(0.02) * n
        state[key] = torch.from_numpy(n)
    return state


# -- AR ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rope", ["1d", "2d"])
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0}, {"guidance_scale": 0.0}, {"top_k": 5}, {"top_k": 1},
                                      {"temperature": 0.0}, {"guidance_scale": 2.0, "top_k": 4, "temperature": 0.7}])
def test_ar_cache_and_one_guidance_pass_equal_recompute_in_two(rope, settings):
    model = random_generator(replace(AR, rope=rope))
    fast = model.generate(LABELS, generator=seeded(), **settings)
    assert fast.shape == (5, 9) and fast.dtype == torch.int64
    assert torch.equal(fast, model.generate_plain(LABELS, generator=seeded(), **settings))


def test_ar_logits_at_i_do_not_read_codes_from_i_on():
    model = random_generator(AR)
    codes = torch.randint(24, (5, 9), generator=seeded())
    before = model(codes, LABELS)
    for i in range(9):
        other = codes.clone()
        other[:, i:] = torch.randint(24, (5, 9 - i), generator=seeded(i))
        after = model(other, LABELS)
        torch.testing.assert_close(after[:, :i + 1], before[:, :i + 1], rtol=0, atol=1e-6)
        if i < 8:
            assert not torch.allclose(after[:, i + 1:], before[:, i + 1:])


def test_ar_without_class_ignores_the_class():
    model = random_generator(AR)
    codes, nobody = torch.randint(24, (5, 9)), torch.ones(5, dtype=torch.bool)
    assert torch.equal(model(codes, LABELS, nobody), model(codes, LABELS.flip(0), nobody))
    assert not torch.allclose(model(codes, LABELS), model(codes, LABELS, nobody))
    torch.testing.assert_close(model(codes, LABELS), model(codes, LABELS, ~nobody))


def test_top_k_draws_only_the_likeliest():
    model = random_generator(AR)
    codes = model.generate(LABELS.repeat(20), top_k=3, generator=seeded())
    likeliest = model(codes, LABELS.repeat(20)).topk(3, dim=-1).indices
    assert (likeliest == codes[..., None]).any(-1).all()


# -- MaskGIT ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("guidance", generator.GUIDANCE)
@pytest.mark.parametrize("steps", [1, 2, 5, 12, 30])
def test_maskgit_follows_its_counts_keeps_fixed_codes_and_leaves_no_mask(guidance, steps):
    model, seen = random_generator(MASKGIT), []
    forward = model.forward
    model.forward = lambda codes, *rest: (seen.append(codes[:5].clone()), forward(codes, *rest))[1]
    codes = model.generate(LABELS, guidance_scale=3.0, steps=steps, guidance=guidance, temperature=4.0, generator=seeded())
    seen.append(codes)
    counts = generator.mask_counts(12, min(steps, 12))
    assert [(s == model.mask).sum(1).tolist() for s in seen] == [[n] * 5 for n in [12] + counts]
    assert all(a > b for a, b in zip([12] + counts, counts)) and counts[-1] == 0
    for earlier, later in zip(seen, seen[1:]):
        fixed = earlier != model.mask
        assert torch.equal(later[fixed], earlier[fixed])
    assert codes.min() >= 0 and codes.max() < 24


def test_maskgit_counts_are_the_arccos_schedule():
    assert generator.mask_counts(128, 8) == [int(128 * np.arccos(t / 8) * 2 / np.pi) for t in range(1, 8)] + [0]


def test_maskgit_guidance_in_one_pass_equals_two():
    model = random_generator(MASKGIT)
    codes, nobody = torch.randint(25, (5, 12), generator=seeded()), torch.ones(5, dtype=torch.bool)
    with_class, without = model(codes, LABELS), model(codes, LABELS, nobody)
    torch.testing.assert_close(model.guided_logits(codes, LABELS, 2.5), without + 2.5 * (with_class - without))
    assert torch.equal(model.guided_logits(codes, LABELS, 1.0), with_class)
    assert torch.equal(model(codes, LABELS.flip(0), nobody), without)


def test_maskgit_guidance_one_is_the_same_under_every_schedule():
    model = random_generator(MASKGIT)
    a, b, c = (model.generate(LABELS, guidance=kind, generator=seeded()) for kind in generator.GUIDANCE)
    assert torch.equal(a, b) and torch.equal(a, c)


def test_maskgit_loss_weighs_hidden_and_seen():
    torch.manual_seed(0)
    codes = torch.randint(24, (64, 12))
    seen = []

    def model(given, labels, drop_label):       # sure of what it sees, uniform on what is hidden
        seen.append((given == 24).sum(1))
        return 50.0 * torch.nn.functional.one_hot(given, 25)[..., :24]

    config = replace(MASKGIT, label_smoothing=0.0)
    loss, _ = generator.maskgit_loss(model, config, codes, torch.zeros(64, dtype=torch.int64))
    hidden = seen[0].sum()
    assert seen[0].min() >= 1 and 0.5 < hidden / codes.numel() < 0.75          # the mean of arccos(u) * 2 / pi is 0.637
    expected = hidden * np.log(24) / (hidden + 0.1 * (codes.numel() - hidden))
    assert abs(loss - expected) < 1e-4


# -- both -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [AR, MASKGIT], ids=["ar", "maskgit"])
def test_same_seed_same_samples_whatever_the_batch_split(config):
    model, labels = random_generator(config), LABELS.repeat(5)
    whole = generator.sample_codes(model, labels, seed=3)
    for batch_size in (1, 4, 24):
        assert torch.equal(generator.sample_codes(model, labels, seed=3, batch_size=batch_size), whole)
    assert not torch.equal(generator.sample_codes(model, labels, seed=4), whole)
    state = torch.get_rng_state()
    generator.sample_codes(model, labels)
    assert torch.equal(torch.get_rng_state(), state)        # a preview does not disturb the training's random state


@pytest.mark.parametrize("mode, how", [("ar", {"top_k": 1}), ("maskgit", {"temperature": 0.0})])
def test_overfits_32_sequences_and_gives_them_back(mode, how):
    torch.manual_seed(0)
    config = replace(AR, mode=mode, tokens=16, codebook_size=64, num_classes=32, width=64, class_dropout=0.0)
    codes, labels = torch.randint(64, (32, 16)), torch.arange(32)
    model = generator.GENERATORS[mode](config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss, parts = generator.LOSSES[mode](model, config, codes, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["accuracy"] > 0.95
    assert torch.equal(model.eval().generate(labels, **how), codes)


def test_sample_has_the_distribution_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    uniform = generator.noise(20_000, (), seeded(), "cpu")
    for temperature in (0.5, 1.0, 2.0):
        drawn = generator.sample(logits.expand(20_000, 4), temperature, uniform)
        share = torch.bincount(drawn, minlength=4) / 20_000
        torch.testing.assert_close(share, (logits / temperature).softmax(0), rtol=0, atol=0.015)
    ends = generator.sample(torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2), 1.0, torch.tensor([2.0 ** -24, 1.0]))
    assert ends.tolist() == [1, 2]                          # never a code of probability zero, at either end


def test_code_batches_are_the_same_for_one_rank_and_two_and_from_any_step():
    codes = np.arange(2 * 20 * 3, dtype=np.uint16).reshape(2, 20, 3)
    labels = np.arange(20)
    one = generator.code_batches(codes, labels, 8, 5, 0, 0, 1)
    halves = [generator.code_batches(codes, labels, 8, 5, 0, rank, 2) for rank in (0, 1)]
    late = generator.code_batches(codes, labels, 8, 5, 4, 0, 1)
    views = set()
    for step in range(10):
        batch, names = next(one)
        assert torch.equal(batch, torch.cat([next(half)[0] for half in halves]))
        if step >= 4:
            assert torch.equal(batch, next(late)[0])
        views |= {(int(n), bool(b[0] >= 60)) for b, n in zip(batch, names)}
        assert torch.equal(names, batch[:, 0] // 3 % 20) and batch.dtype == torch.int64
    assert len(views) > 30                                  # of 20 images, most in both views


# -- public weights ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rope", ["1d", "2d"])
def test_llamagen_golden(rope):
    golden = np.load(ASSETS / "llamagen_tiny_golden.npz")
    model = pretrained.load_llamagen(golden_weights("llamagen_tiny"), heads=4, rope=rope, tokens=16)
    ids, labels = torch.from_numpy(golden["ids"]), torch.from_numpy(golden["cls"])
    for kind, drop in (("cond", None), ("uncond", torch.ones(3, dtype=torch.bool))):
        logits = model(ids, labels, drop).detach().numpy()
        np.testing.assert_allclose(logits, golden[f"logits_{kind}_{rope}"], rtol=0, atol=5e-5)
    for scale in (1, 2):
        codes = model.generate(labels, guidance_scale=scale, top_k=1)
        np.testing.assert_array_equal(codes.numpy(), golden[f"greedy_cfg{scale}_{rope}"])


def test_uvit_golden():
    golden = np.load(ASSETS / "uvit_tiny_golden.npz")
    model = pretrained.load_titok_maskgit(golden_weights("uvit_tiny"))
    ids, labels = torch.from_numpy(golden["ids"]), torch.from_numpy(golden["cls"])
    for kind, drop in (("cond", None), ("uncond", torch.ones(2, dtype=torch.bool))):
        logits = model(ids, labels, drop).detach().numpy()
        np.testing.assert_allclose(logits, golden[f"logits_{kind}"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name, load", [("llamagen_tiny", lambda state: pretrained.load_llamagen(state, 4, "1d")),
                                        ("uvit_tiny", pretrained.load_titok_maskgit)])
def test_public_weights_that_do_not_fit_are_refused_in_one_line(name, load):
    state = golden_weights(name)
    first, last = list(state)[0], list(state)[-1]
    for broken in ({k: v for k, v in state.items() if k != first}, {k: v for k, v in state.items() if k != last},
                   {**state, "another": torch.zeros(1)}, {**state, last: torch.zeros(3, 3)}, {}):
        with pytest.raises(trainer.BadInput) as error:
            load(broken)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("keys, config, millions", [
    ("llamagen_b", replace(generator.PRESETS["ar_full"], codebook_size=16384), 110.9),
    ("uvit_l", generator.PRESETS["maskgit_full"], 295.0),
    (None, replace(generator.PRESETS["llamagen_l"], codebook_size=16384), 343)])
def test_parameter_counts_and_key_lists_of_the_published_sizes(keys, config, millions):
    with torch.device("meta"):
        model = generator.GENERATORS[config.mode](config)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count - millions) < (0.05 if keys else 0.5)
    if keys:
        public = json.loads((ASSETS / f"{keys}_keys.json").read_text())
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == public


# -- command line -----------------------------------------------------------------------------------------------------

FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@pytest.mark.parametrize("text, found", [("3,bag", [3, 8]), ("BOOT", [9]), ("shirt", [6]), ("t-shirt", [0]), ("top, 9", [0, 9])])
def test_find_classes(text, found):
    assert generator.find_classes(text, FASHION) == found


@pytest.mark.parametrize("text", ["10", "boots", "", "bag,,", "-1", "t.shirt"])
def test_find_classes_refuses(text):
    with pytest.raises(trainer.BadInput, match="no such class") as error:
        generator.find_classes(text, FASHION)
    assert text != "boots" or "Did you mean boot" in str(error.value)


@pytest.mark.parametrize("change", [{"mode": "mask"}, {"rope": "3d"}, {"guidance": "cosine"}, {"heads": 5},
                                    {"views": 3}, {"mode": "maskgit", "layers": 3}, {"temperature": -1.0}])
def test_config_refuses(change):
    with pytest.raises(trainer.BadInput):
        replace(AR, **change)


# ---------------------------------------------------------------------------------------------------------------------
# Scores (evaluate.py), speed and memory (extras/bench.py)

def test_estimated_memory_is_what_a_real_run_keeps():
    """The estimate runs on pretended tensors; the bytes that autograd keeps must be those of a real run."""
    sizes = []
    for mode in (FakeTensorMode(), contextlib.nullcontext()):
        with mode:
            model, images = tokenizer.build(TINY), torch.rand(2, 3, 16, 16)
            sizes.append(bench.kept(lambda: model.decoder(model.quantizer(model.latents(images))[0]), model)[1])
    assert sizes[0] == sizes[1] > 10_000


def test_memory_table_falls_with_recompute_and_batch():
    whole, half = bench.memory_of("nativetok_32", 64), bench.memory_of("nativetok_32", 32)
    assert whole["all with --recompute"] < whole["all"] and half["all"] < whole["all"]
    kept = [key for key in whole if key.startswith("kept") and whole[key]]
    assert len(kept) == 3 and all(half[key] == pytest.approx(whole[key] / 2, rel=0.1) for key in kept)
    assert whole["gradients"] == 4 * 585_477_644


@pytest.mark.parametrize("name", ["toy", "titok_toy", "ar_toy", "maskgit_toy"])
def test_no_operator_of_a_step_makes_the_cpu_wait_for_the_gpu(name):
    step = bench.training_step(name, torch.device("cpu"), 2)
    step()
    calls = bench.operators(step, torch.device("cpu"))
    assert calls["aten::linear"] > 20 and not calls.keys() & bench.WAITING
    assert bench.operators(lambda update: torch.ones(3).sum().item(), torch.device("cpu")).keys() & bench.WAITING


# ---------------------------------------------------------------------------------------------------------------------
# Inception

INCEPTION_KEYS = json.loads((ASSETS / "inception_fid_keys.json").read_text())


@pytest.fixture(scope="module")
def inception_weights():
    return rule_weights(INCEPTION_KEYS, gain=2.0)


@pytest.fixture(scope="module")
def inception(inception_weights):
    return evaluate.InceptionFID(inception_weights)


def test_inception_golden(inception):
    golden = np.load(ASSETS / "inception_fid_golden.npz")
    images = torch.from_numpy(golden["images"])
    resized = evaluate.tf_resize(images)[0]
    assert resized.dtype == torch.float32
    for a, b in ((0, 16), (150, 166), (283, 299)):
        assert (resized[:, a:b, a:b].numpy() == golden[f"resized_{a}_{b}"]).all()
    for model in (inception, copy.deepcopy(inception).double()):            # and float32 is as good as float64
        with torch.inference_mode():
            pool, logits = model(images)
        np.testing.assert_allclose(pool, golden["pool"], atol=1e-5)
        np.testing.assert_allclose(logits, golden["logits_unbiased"], atol=1e-5)


def test_inception_keys_and_what_it_refuses(inception, inception_weights, tmp_path):
    assert {k: list(v.shape) for k, v in inception.state_dict().items()} == INCEPTION_KEYS
    without = {k: v for k, v in inception_weights.items() if not k.endswith("num_batches_tracked")}
    assert len(without) == 472 and evaluate.InceptionFID(without).fingerprint == inception.fingerprint
    for wrong in ({k: v for k, v in without.items() if k != "fc.bias"}, {**without, "AuxLogits.fc.bias": torch.ones(3)},
                  {**without, "fc.weight": torch.ones(1000, 2048)}):
        with pytest.raises(BadInput, match="does not fit the model") as error:
            evaluate.InceptionFID(wrong)
        assert "\n" not in str(error.value)
    torch.save({"fc.bias": torch.ones(1008)}, tmp_path / "inception.pth")
    for path, says in ((tmp_path / "inception.pth", "does not fit"), (tmp_path / "none.pth", "not found")):
        with pytest.raises(BadInput, match=f"{path.name}: {says}"):
            evaluate.InceptionFID(path)


def test_inception_spatial_features_are_those_of_the_branch(inception):
    seen = []
    handle = inception.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        features = inception.features(torch.randint(0, 256, (2, 3, 40, 60), dtype=torch.uint8))
    handle.remove()
    assert features["spatial"].shape == (2, 2023)
    assert torch.equal(features["spatial"].view(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))


def test_inception_looks_at_each_picture_alone(inception):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        together = inception(images)[0]
        torch.testing.assert_close(together[1:2], inception(images[1:2])[0], atol=1e-5, rtol=0)
        assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("height, width", [(299, 299), (17, 400), (600, 1)])
def test_tf_resize(height, width):
    image = torch.randint(0, 256, (1, 1, height, width), dtype=torch.uint8)
    ours, image = evaluate.tf_resize(image)[0, 0], image[0, 0].double()
    if (height, width) == (299, 299):
        assert torch.equal(ours.double(), image)

    def between(n, i):
        position = i * n / 299
        return int(position), min(int(position) + 1, n - 1), position % 1

    for i, j in [(0, 0), (298, 298), (150, 7), (33, 250)]:
        top, bottom, down = between(height, i)
        left, right, across = between(width, j)
        value = ((image[top, left] * (1 - across) + image[top, right] * across) * (1 - down)
                 + (image[bottom, left] * (1 - across) + image[bottom, right] * across) * down)
        assert ours[i, j].item() == pytest.approx(value.item(), abs=0.02)   # float32 positions near 600: 3e-5 x 255


# ---------------------------------------------------------------------------------------------------------------------
# Distances

def gaussian_sets(n1, n2, width=48, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.exp(1.5 * rng.standard_normal(width))
    return rng.standard_normal((n1, width)) * scale, rng.standard_normal((n2, width)) * scale[::-1] + 0.1


@pytest.mark.parametrize("n1, n2", [(200, 300), (30, 300), (300, 30), (30, 20), (2, 2)])
def test_fast_frechet_distance_is_the_same(n1, n2):
    """The exact value, also of singular covariances: tr (A C)^(1/2) is the sum of the singular values of X Y^T where
    A = X^T X and C = Y^T Y, and nothing is squared on the way."""
    x, y = gaussian_sets(n1, n2)
    one, two = evaluate.feature_statistics(x), evaluate.feature_statistics(y)
    cross = ((x - x.mean(0)) / math.sqrt(n1 - 1)) @ ((y - y.mean(0)) / math.sqrt(n2 - 1)).T
    traces = np.trace(one[1]) + np.trace(two[1])
    exact = np.square(one[0] - two[0]).sum() + traces - 2 * np.linalg.svd(cross, compute_uv=False).sum()
    room = 1e-12 if min(n1, n2) > 48 else 2e-9                              # of the traces; singular: roots of rounding
    assert evaluate.frechet_distance_fast(*one, *two) == pytest.approx(exact, abs=room * traces)
    assert evaluate.frechet_distance_fast(*two, *one) == pytest.approx(exact, abs=room * traces)
    assert evaluate.frechet_distance_fast(*one, *one) == pytest.approx(0, abs=room * traces)
    # sqrtm's form: the offset of 1e-6 on the diagonals moves singular ones by more
    assert evaluate.frechet_distance(*one, *two) == pytest.approx(exact, abs=(1e-10 if room < 1e-10 else 1e-7) * traces)


def test_fast_frechet_distance_golden_and_closed_forms():
    golden = np.load(ASSETS / "fid_golden.npz")
    a, b, c = (evaluate.feature_statistics(golden[f"feats_{x}"]) for x in "abc")
    assert evaluate.frechet_distance_fast(*a, *b) == pytest.approx(float(golden["fid"]), abs=1e-6)
    assert evaluate.frechet_distance_fast(*a, *c) == pytest.approx(float(golden["fid_ac"]), abs=1e-5)
    assert evaluate.frechet_distance_fast(*a, *c) == pytest.approx(float(golden["fid_ac_symmetric"]), abs=1e-6)
    rng = np.random.default_rng(0)
    mu1, mu2, s1, s2 = rng.normal(size=8), rng.normal(size=8), rng.uniform(0.5, 2, 8), rng.uniform(0.5, 2, 8)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    ours = evaluate.frechet_distance_fast(mu1, turn @ np.diag(s1 ** 2) @ turn.T, mu2, turn @ np.diag(s2 ** 2) @ turn.T)
    assert ours == pytest.approx(np.square(mu1 - mu2).sum() + np.square(s1 - s2).sum(), abs=1e-12)
    nothing = np.zeros((8, 8))                                              # rank 0
    assert evaluate.frechet_distance_fast(mu1, nothing, mu2, nothing) == pytest.approx(np.square(mu1 - mu2).sum())


def test_inception_score_golden():
    golden = np.load(ASSETS / "is_golden.npz")
    logits, value = golden["logits"], lambda name: float(golden[name])
    assert evaluate.inception_score(logits) == pytest.approx((value("is_tf_mean"), value("is_tf_std")), abs=1e-10)
    plain = value("is_tf_noshuffle_mean"), value("is_tf_noshuffle_std")
    assert evaluate.inception_score(torch.from_numpy(logits), shuffle=False) == pytest.approx(plain, abs=1e-10)
    assert evaluate.inception_score_adm(logits) == pytest.approx(value("is_adm"), abs=1e-10)
    assert evaluate.inception_score_adm(logits, part=300) == pytest.approx(value("is_adm_split300"), abs=1e-10)


def test_inception_score_closed_forms():
    uniform, sure = np.zeros((100, 10), np.float32), 1000 * np.eye(10, dtype=np.float32)[np.arange(100) % 10]
    for logits, score in ((uniform, 1.0), (sure, 10.0)):                    # sure: all other probabilities underflow
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert evaluate.inception_score(logits, shuffle=False) == pytest.approx((score, 0.0), abs=1e-9)
            assert evaluate.inception_score_adm(logits) == pytest.approx(score)
    by_class = sure[np.argsort(np.arange(100) % 10)]
    assert evaluate.inception_score(by_class, shuffle=False)[0] == pytest.approx(1.0)        # one class a split
    assert evaluate.inception_score(by_class)[0] > 4                         # and shuffled, several
    assert evaluate.inception_score_adm(by_class) == pytest.approx(10.0)     # in one part the order is nothing
    with pytest.raises(BadInput, match="needs as many pictures; here are 9"):
        evaluate.inception_score(uniform[:9])


def precision_recall_by_hand(real, fake, k):
    """All distances at once, in double precision, by differences."""
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)

    def squared(a, b):
        return np.square(a[:, None] - b[None]).sum(-1)

    balls = [np.sort(squared(x, x), axis=1)[:, k] for x in (real, fake)]
    between = squared(real, fake)
    return (between <= balls[0][:, None]).any(0).mean(), (between <= balls[1][None]).any(1).mean()


@pytest.mark.parametrize("k, precision, recall", [(2, 0.865, 0.460), (3, 0.9175, 0.544), (4, 0.9525, 0.620)])
def test_precision_recall_golden(k, precision, recall):
    golden = np.load(ASSETS / "prc_golden.npz")
    real, fake = golden["feats_ref"], golden["feats_sample"]
    assert evaluate.precision_recall(real, fake, k) == (precision, recall)
    assert evaluate.precision_recall(fake, real, k) == (recall, precision)
    for block in (37, 400):                                                 # blockwise equals whole
        assert evaluate.precision_recall(real, fake, k, block) == (precision, recall)
    if k == 3:
        assert (golden["precision"], golden["recall"]) == (precision, recall)
        np.testing.assert_allclose(evaluate.radii(torch.from_numpy(real), 3, 64).sqrt(), golden["radii_ref"], rtol=1e-6)


def hard_sets():
    """Sets on which float32 products alone decide wrongly or at random: far from 0, many duplicates, exact ties, two
    clusters far apart, an outlier."""
    rng = np.random.default_rng(1)
    plain = rng.standard_normal((2, 90, 16)).astype(np.float32)
    yield "far from 0", plain[0] + 3000, plain[1] + 3000
    yield "duplicates", plain[0][:9].repeat(10, 0), np.concatenate([plain[0][:4].repeat(20, 0), plain[1][:10]])
    grids = rng.integers(0, 3, (90, 4)), rng.integers(1, 4, (80, 4))
    yield "ties on a grid", *(grid.astype(np.float32) for grid in grids)
    side = np.where(np.arange(90) % 2, 1000, -1000).astype(np.float32)[:, None]
    yield "two clusters", plain[0] + side, plain[1] + side
    outlier = plain[0].copy()
    outlier[7] = 1e5
    yield "an outlier", outlier, plain[1]
    yield "shared rows", plain[0], np.concatenate([plain[0][:40], plain[1][:40]])
    yield "few", plain[0][:4], plain[1][:5]


@pytest.mark.parametrize("real, fake", [sets for _, *sets in hard_sets()], ids=[name for name, *_ in hard_sets()])
def test_precision_recall_is_that_of_double_precision(real, fake):
    expected = precision_recall_by_hand(real, fake, 3)
    rng = np.random.default_rng(2)
    for block in (1000, 32, 7):
        assert evaluate.precision_recall(real, fake, 3, block) == expected
        mixed = rng.permutation(real), rng.permutation(fake)                # the order is nothing
        assert evaluate.precision_recall(*mixed, 3, block) == expected


def test_precision_recall_closed_forms():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((200, 64)).astype(np.float32)
    assert evaluate.precision_recall(real, real) == (1.0, 1.0)
    same = np.ones((20, 64), np.float32)                                    # radius 0, and distance 0 is within
    assert evaluate.precision_recall(same, same) == (1.0, 1.0)
    assert evaluate.precision_recall(real, real + 100) == (0.0, 0.0)
    assert evaluate.precision_recall(real, real[:1].repeat(9, 0)) == (1.0, 1 / 200)      # all fakes are one real picture
    assert evaluate.precision_recall(real.astype(np.float64), torch.from_numpy(real[:50]))[0] == 1.0
    with pytest.raises(BadInput, match="more than 3 pictures a set; here are 200 and 3"):
        evaluate.precision_recall(real, real[:3])


def test_kernel_distance():
    a, b = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    # kernels 1 and 7^3 within the sets; 1, 1, 3^3 and 4^3 between them
    assert evaluate.kernel_distance(a, b, subsets=5, subset_size=2) == pytest.approx((1 + 343 - 2 * 93 / 4, 0.0))
    a, b = np.array([[1.0, 1.0], [2.0, 0.0]]), np.array([[0.0, 0.0], [0.0, 4.0]])       # D = 2: x.y / 2
    assert evaluate.kernel_distance(a, b, 1, 2)[0] == pytest.approx(8 + 1 - 2 * (1 + 27 + 1 + 1) / 4)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 1200, 16)).astype(np.float32)
    mean, deviation = evaluate.kernel_distance(x, y, subsets=20)
    assert abs(mean) < 0.02 and 0 < deviation < 0.05                        # one distribution: about 0
    shifted = evaluate.kernel_distance(x, y + 0.5, subsets=20)[0]
    assert shifted > 0.3 and shifted == evaluate.kernel_distance(x, y + 0.5, subsets=20)[0]
    with pytest.raises(BadInput, match="subsets of 1000 features; here are 1200 and 999"):
        evaluate.kernel_distance(x, y[:999])


def test_kernel_distance_draws_as_torch_fidelity():
    """Its documented draws: RandomState(2020), a subset of the first set, then one of the second, 100 times."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((30, 4)), rng.standard_normal((40, 4)) + 0.3
    random, values = np.random.RandomState(2020), []
    for _ in range(100):
        x, y = a[random.choice(30, 6, replace=False)], b[random.choice(40, 6, replace=False)]
        within = [(x[i] @ x[j] / 4 + 1) ** 3 + (y[i] @ y[j] / 4 + 1) ** 3 for i in range(6) for j in range(6) if i != j]
        values.append(np.sum(within) / 30 - 2 * np.mean([(p @ q / 4 + 1) ** 3 for p in x for q in y]))
    assert evaluate.kernel_distance(a, b, subset_size=6) == pytest.approx((np.mean(values), np.std(values)), abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures in and out

def test_to_uint8():
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(evaluate.to_uint8(bytes_ / 255), bytes_)              # round is lossless
    images = torch.rand(2, 3, 16, 16)
    rounded, truncated = (evaluate.to_uint8(images, how).float() for how in ("round", "truncate"))
    assert (rounded - images * 255).abs().max() <= 0.5 + 1e-4
    assert ((images * 255 - truncated) >= 0).all() and ((images * 255 - truncated) < 1).all()
    assert evaluate.to_uint8(torch.tensor([[[[-0.1, 1.2, 0.5]]]])).flatten().tolist() == [0, 255, 128]
    assert evaluate.to_uint8(torch.tensor([[[[0.5, 1.0, 0.999]]]]), "truncate").flatten().tolist() == [127, 255, 254]
    for bad in (math.nan, math.inf):
        with pytest.raises(BadInput, match="NaN"):
            evaluate.to_uint8(torch.full((1, 3, 2, 2), bad))


def test_adm_npz_there_and_back(tmp_path):
    images = torch.randint(0, 256, (230, 3, 8, 12), dtype=torch.uint8)
    evaluate.write_adm_npz(tmp_path / "samples.npz", images.split(64), 230)
    held = np.load(tmp_path / "samples.npz")                                # as ADM's evaluator reads it
    assert held.files == ["arr_0"] and held["arr_0"].dtype == np.uint8
    assert (held["arr_0"] == images.permute(0, 2, 3, 1).numpy()).all()
    assert evaluate.npz_names(tmp_path / "samples.npz") == {"arr_0"}
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]
    batches = list(evaluate.read_images(tmp_path / "samples.npz"))
    assert [len(b) for b in batches] == [100, 100, 30] and torch.equal(torch.cat(batches), images)
    for save in (np.savez, np.savez_compressed):                            # as ADM writes it, labels in arr_1
        save(tmp_path / "adm.npz", images.permute(0, 2, 3, 1).numpy(), np.zeros(230, np.int64))
        assert torch.equal(torch.cat(list(evaluate.read_images(tmp_path / "adm.npz"))), images)
    floats = images.permute(0, 2, 3, 1).numpy() / 255
    for dtype in (np.float64, np.float32, ">f4"):
        np.savez(tmp_path / "floats.npz", floats.astype(dtype))
        assert torch.equal(torch.cat(list(evaluate.read_images(tmp_path / "floats.npz"))), images)
    darker = torch.cat(list(evaluate.read_images(tmp_path / "floats.npz", "truncate")))
    assert set((images.int() - darker.int()).unique().tolist()) <= {0, 1}


def test_adm_npz_appears_whole_or_not_at_all(tmp_path):
    path, images = tmp_path / "samples.npz", torch.zeros(20, 3, 4, 4, dtype=torch.uint8)
    evaluate.write_adm_npz(path, [images], 20)
    before = path.read_bytes()
    for batches, says in (([images, images], "40 pictures came"), ([images[:9]], "9 pictures"), ([], "0 pictures"),
                          ([images, images.float()], "float32"), ([images[:1], images[:19, :, :2]], "among uint8")):
        with pytest.raises(ValueError, match=says):
            evaluate.write_adm_npz(path, batches, 20)
        assert path.read_bytes() == before
    with pytest.raises(BadInput, match="cannot be written"):
        evaluate.write_adm_npz(path / "below" / "samples.npz", [images], 20)


def test_adm_npz_streams(tmp_path):
    """50,000 pictures of 256 x 256 are 9.8 GB; here 3,000 of 64 x 64, 37 MB, pass through a few batches of 1.2 MB."""
    path = tmp_path / "many.npz"
    tracemalloc.start()
    try:
        evaluate.write_adm_npz(path, (torch.full((100, 3, 64, 64), i, dtype=torch.uint8) for i in range(30)), 3000)
        assert [int(b[0, 0, 0, 0]) for b in evaluate.read_images(path)] == list(range(30))
        assert tracemalloc.get_traced_memory()[1] < 8e6 < path.stat().st_size / 4
    finally:
        tracemalloc.stop()


def test_statistics_file(tmp_path):
    path, (mu, sigma) = tmp_path / "statistics.npz", evaluate.feature_statistics(np.random.rand(30, 5))
    np.savez(path, mu=mu, sigma=np.asfortranarray(sigma), mu_s=mu[:2].astype(np.float32), sigma_s=sigma[:2, :2])
    assert "mu" in evaluate.npz_names(path) and "arr_0" not in evaluate.npz_names(path)
    ours = evaluate.read_statistics(path)
    assert (ours[0] == mu).all() and (ours[1] == sigma).all() and ours[0].dtype == np.float64
    assert evaluate.read_statistics(path, ("mu_s", "sigma_s"))[1].shape == (2, 2)


PICTURES = np.zeros((3, 4, 4, 3), np.uint8)
MALFORMED_IMAGES = {
    "pickle": (dict(arr_0=np.array([{"a": 1}, None], dtype=object)), "pickled Python objects"),
    "int64": (dict(arr_0=PICTURES.astype(np.int64)), "arr_0 is int64"),
    "bool": (dict(arr_0=PICTURES.astype(bool)), "arr_0 is bool"),
    "text": (dict(arr_0=np.array(["a", "b"])), r"a batch of pictures is \[n, H, W, 3\]"),
    "NaN": (dict(arr_0=np.full((3, 4, 4, 3), np.nan)), "NaN"),
    "0 to 255 as floats": (dict(arr_0=np.full((3, 4, 4, 3), 255.0)), r"floats from 255 to 255; .* \[0, 1\]"),
    "-1 to 1": (dict(arr_0=np.full((3, 4, 4, 3), -1.0)), r"floats from -1 to -1"),
    "one": (dict(arr_0=PICTURES[:1]), "one picture only"),
    "none": (dict(arr_0=PICTURES[:0]), r"arr_0 is \[0, 4, 4, 3\]"),
    "channels first": (dict(arr_0=PICTURES.transpose(0, 3, 1, 2).copy()), r"arr_0 is \[3, 3, 4, 4\]"),
    "grey": (dict(arr_0=PICTURES[..., 0]), r"arr_0 is \[3, 4, 4\]"),
    "last axis first": (dict(arr_0=np.asfortranarray(PICTURES)), "ascontiguousarray"),
    "other names": (dict(images=PICTURES), "holds no array arr_0, only images"),
}
MALFORMED_STATISTICS = {
    "no sigma": (dict(mu=np.zeros(3)), "holds no array sigma, only mu"),
    "integers": (dict(mu=np.zeros(3, int), sigma=np.eye(3)), "mu is int64"),
    "shapes": (dict(mu=np.zeros(3), sigma=np.eye(4)), r"sigma is float64 \[4, 4\]"),
    "not square": (dict(mu=np.zeros(3), sigma=np.zeros((3, 2))), r"sigma is float64 \[3, 2\]"),
    "NaN": (dict(mu=np.zeros(2), sigma=np.full((2, 2), np.nan)), "sigma holds NaN"),
    "pickle": (dict(mu=np.array([None, 1], dtype=object), sigma=np.eye(2)), "pickled"),
}


@pytest.mark.parametrize("read, arrays, says", [
    *((evaluate.read_images, *case) for case in MALFORMED_IMAGES.values()),
    *((evaluate.read_statistics, *case) for case in MALFORMED_STATISTICS.values())],
    ids=[*MALFORMED_IMAGES, *MALFORMED_STATISTICS])
def test_malformed_npz_gets_one_line(tmp_path, read, arrays, says):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(BadInput, match=says) as error:
        list(read(tmp_path / "bad.npz"))
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "bad.npz"))


def test_damaged_npz_gets_one_line(tmp_path):
    whole = tmp_path / "whole.npz"
    np.savez(whole, arr_0=np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8))
    data = whole.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 255                                          # bits rotted: the archive's checksum tells
    np.savez_compressed(whole, arr_0=np.zeros((300, 16, 16, 3), np.uint8))
    packed = bytearray(whole.read_bytes())
    packed[120:160] = bytes(40)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (9, 16, 16, 3)})
        file.write(bytes(768))                                              # promises more than there is
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("arr_0.npy", "no array")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name, content in (("half.npz", data[:len(data) // 2]), ("empty.npz", b""), ("picture.npz", b"\x89PNG" * 50),
                          ("flipped.npz", flipped), ("packed.npz", packed)):
        (tmp_path / name).write_bytes(content)
    for name in ("half.npz", "empty.npz", "picture.npz", "flipped.npz", "packed.npz", "short.npz", "text.npz",
                 "array.npy", "missing.npz", "."):
        with pytest.raises(BadInput, match="cut short|not an .npz|damaged") as error:
            list(evaluate.read_images(tmp_path / name))
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def fid_folder(tmp_path_factory, inception_weights):
    """Inception weights, two folders of 12 pictures, and one of them as ADM's .npz."""
    folder, random = tmp_path_factory.mktemp("fid"), np.random.default_rng(0)
    torch.save(inception_weights, folder / "inception.pth")
    for name, high in (("a", 255), ("b", 190)):
        (folder / name).mkdir()
        for i in range(12):
            small = random.integers(0, high, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize((40, 40)).save(folder / name / f"{i:02}.png")
    np.savez(folder / "b.npz", np.stack([np.asarray(Image.open(folder / "b" / f"{i:02}.png")) for i in range(12)]))
    return folder


def fid_command(folder, words):
    return f"python evaluate.py {words} --config toy --inception {folder}/inception.pth --out {folder}/out"


def test_fid_of_a_folder_and_of_the_same_pictures_as_npz(fid_folder):
    said = run(fid_command(fid_folder, f"fid {fid_folder}/a {fid_folder}/b --json {fid_folder}/x.json "
                                       f"--save {fid_folder}/saved.npz"))
    first = json.loads((fid_folder / "x.json").read_text())
    assert first["scores"]["FID"] > 0 and 0 <= first["scores"]["recall"] <= 1 and said.count("warning") == 2
    for words in ("12 images of", "Inception of 2015", "covariance is singular"):
        assert words in said and any(words in line for line in first["protocol"])
    assert np.array_equal(np.load(fid_folder / "saved.npz")["arr_0"], np.load(fid_folder / "b.npz")["arr_0"])
    run(fid_command(fid_folder, f"fid {fid_folder}/a {fid_folder}/b.npz --json {fid_folder}/y.json"))
    assert json.loads((fid_folder / "y.json").read_text())["scores"] == first["scores"]


def test_fid_warns_and_refuses(fid_folder, tmp_path):
    said = run(fid_command(fid_folder, f"fid {fid_folder}/a {fid_folder}/a"))
    assert "12 files are in both sets" in said and re.search(r"^FID +-?0\.0000$", said, re.MULTILINE)
    picture(1, 50, 50).save(tmp_path / "1.png")
    refused(fid_command(fid_folder, f"fid {fid_folder}/a {tmp_path}"), "1 images")
    picture(1, 40, 50).save(tmp_path / "2.png")
    refused(fid_command(fid_folder, f"fid {tmp_path} {fid_folder}/a"), "another size", "--size")
    (tmp_path / "2.png").write_bytes(b"no picture")
    refused(fid_command(fid_folder, f"fid {tmp_path} {fid_folder}/a"), "2.png", "cannot be read")
    refused(fid_command(fid_folder, f"fid {fid_folder}/a {fid_folder}/none"), "none", "neither a folder")
    refused(fid_command(fid_folder, f"fid {fid_folder}/a"), "1 paths given, 2 wanted")
    refused(f"python evaluate.py fid {fid_folder}/a {fid_folder}/b --inception {tmp_path}/none.pth", "none.pth", "--inception")


def test_rfid_and_gfid_of_the_toy(toy, fid_folder):
    said = run(fid_command(fid_folder, f"rfid {toy}/nativetok_4_stage2.pt --data shapes --images 12 --rounding truncate"))
    assert "reconstructions of 12 images of shapes val" in said and "rounding to bytes: truncate" in said
    said = run(fid_command(fid_folder, f"gfid {toy}/ar_nativetok_4.pt --data shapes --images 12 --samples 12"))
    assert "12 samples, 10 classes in turn, seed 0, guidance 1.5" in said and "12 images of shapes train" in said
    refused(fid_command(fid_folder, f"gfid {toy}/ar_nativetok_4.pt --data shapes --tokenizer {toy}/nativetok_2.pt"),
            "other codes", "--tokenizer")


def test_features_go_on_after_a_kill_and_do_not_depend_on_shards(fid_folder, inception, tmp_path, monkeypatch):
    pictures, device = evaluate.folder_pictures(fid_folder / "b"), torch.device("cpu")
    whole = evaluate.features_of(pictures, inception, tmp_path / "whole", device)
    monkeypatch.setattr(evaluate, "SHARD", 5)
    reads = []
    read = pictures.read
    pictures.read = lambda start, stop: (reads.append(start), read(start, stop))[1]
    parts = evaluate.features_of(pictures, inception, tmp_path / "parts", device)
    assert reads == [0, 5, 10]
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-5)
    shard = sorted((tmp_path / "parts").glob("*/*.npz"))[1]
    shard.write_bytes(shard.read_bytes()[:100])                 # damaged: only this one is computed again
    again = evaluate.features_of(pictures, inception, tmp_path / "parts", device)
    assert reads == [0, 5, 10, 5] and all(np.array_equal(again[name], parts[name]) for name in parts)
    (fid_folder / "b" / "extra.png").write_bytes((fid_folder / "b" / "00.png").read_bytes())
    assert evaluate.folder_pictures(fid_folder / "b").key != pictures.key            # other files, another cache
    (fid_folder / "b" / "extra.png").unlink()


def test_frechet_distance_of_two_gaussians():
    rng = np.random.default_rng(0)
    mu1, mu2, s1, s2 = rng.normal(size=8), rng.normal(size=8), rng.uniform(0.5, 2, 8), rng.uniform(0.5, 2, 8)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]                         # the same axes, so that the roots commute
    closed = np.square(mu1 - mu2).sum() + np.square(s1 - s2).sum()
    ours = evaluate.frechet_distance(mu1, turn @ np.diag(s1 ** 2) @ turn.T, mu2, turn @ np.diag(s2 ** 2) @ turn.T)
    assert ours == pytest.approx(closed, abs=1e-8)
    assert evaluate.frechet_distance(mu1, np.zeros((8, 8)), mu2, np.zeros((8, 8))) == pytest.approx(
        np.square(mu1 - mu2).sum(), abs=1e-4)                               # singular: the offset


def test_frechet_distance_matches_reference():
    golden = np.load(ASSETS / "fid_golden.npz")
    a, b, c = (evaluate.feature_statistics(golden[f"feats_{x}"]) for x in "abc")
    np.testing.assert_allclose(a[0], golden["mu_a"], atol=1e-12)
    np.testing.assert_allclose(a[1], golden["sigma_a"], atol=1e-12)
    assert evaluate.frechet_distance(*a, *b) == pytest.approx(float(golden["fid"]), abs=1e-6)
    assert evaluate.frechet_distance(*a, *c) == pytest.approx(float(golden["fid_ac"]), abs=1e-5)
    assert evaluate.frechet_distance(*a, *a) == pytest.approx(0, abs=1e-8)


def test_psnr_is_of_each_image():
    a = torch.rand(3, 3, 8, 8) * 0.5
    off = torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(evaluate.psnr(a, a + off), torch.tensor([20.0, 40.0, 100.0]), atol=1e-2, rtol=0)


def test_codebook_use():
    assert evaluate.codebook_use(torch.arange(64).view(4, 16), 64) == pytest.approx((1.0, 64.0))
    assert evaluate.codebook_use(torch.full((4, 16), 3), 64) == pytest.approx((1 / 64, 1.0))
    assert evaluate.codebook_use(torch.arange(16).repeat(2, 1), 64) == pytest.approx((0.25, 16.0))


def test_score_leaves_the_border_out():
    classifier = report.FDClassifier(10).eval()
    originals, labels = torch.rand(100, 3, 32, 32), torch.arange(100) % 10
    inner = report.without_border(originals, 2)
    assert inner.shape == (100, 3, 28, 28) and torch.equal(inner, originals[:, :, 2:30, 2:30])
    assert torch.equal(report.without_border(originals, 0), originals)
    with torch.inference_mode():
        reference = evaluate.feature_statistics(classifier.features(inner))
    framed = originals.clone()
    framed[:, :, :2] = framed[:, :, 30:] = 1                                # only the border is wrong: full marks
    framed[..., :2] = framed[..., 30:] = 1
    result = report.score([(framed[:60], labels[:60], originals[:60]), (framed[60:], labels[60:], originals[60:])],
                            classifier, reference, border=2)
    assert result["psnr"] == pytest.approx(100) and result["fd"] == pytest.approx(0, abs=1e-6)
    assert set(report.score([(framed, labels, None)], classifier, reference, 2)) == {"accuracy", "fd"}


def test_classifier_cache_is_bound_to_the_data(tmp_path):
    sets = [data.open_dataset("shapes", split, 16) for split in ("train", "val")]
    path = tmp_path / "fd_classifier.pt"
    trained, accuracy = report.fd_classifier(*sets, path, steps=40, batch_size=64)
    assert 0 < accuracy < 1 and not trained.training
    written = path.stat().st_mtime_ns
    again, same_accuracy = report.fd_classifier(*sets, path, steps=40, batch_size=64)
    assert path.stat().st_mtime_ns == written and same_accuracy == accuracy
    assert all(torch.equal(a, b) for a, b in zip(trained.state_dict().values(), again.state_dict().values()))
    sets[0].fingerprint = "of other data"
    random_state = torch.get_rng_state()
    report.fd_classifier(*sets, path, steps=2, batch_size=64)
    assert path.stat().st_mtime_ns != written                               # trained anew, not taken over
    assert torch.equal(torch.get_rng_state(), random_state)                # and no trace in the caller's random state


def test_subset_takes_every_class_of_a_sorted_set():
    labels = np.arange(1000) // 100
    chosen = evaluate.subset(labels, 200)                                   # anything that has a length
    assert len(set(chosen)) == 200 and set(labels[chosen]) == set(range(10))
    assert list(evaluate.subset(labels, 5000)) == list(range(1000))


@pytest.mark.parametrize("low, high", [(0, 1), (2.31, 5.9), (-0.4, 16.4), (1234, 98765), (0.00071, 0.00094)])
def test_ticks_are_few_round_and_inside(low, high):
    found = report.ticks(low, high)
    assert 2 <= len(found) <= 7 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9


SCORES = {
    "vqgan": {"psnr", "perplexity", "accuracy", "fd"},
    "stage1": {"psnr", "psnr_argmax", "accuracy", "accuracy_argmax", "fd", "fd_argmax", "perplexity"},
    "stage2": {"psnr", "accuracy", "fd"}, "ar": {"accuracy", "fd", "guidance_scale"},
    "maskgit": {"accuracy", "fd", "guidance_scale"}, "hnt": {"step_ratio"}, "classifier": {"test_accuracy"}}


def test_report(alone, tmp_path):
    """The report on all stages: its files, its numbers' names, and nothing measured twice."""
    refused(f"python -m extras.report --config toy --data shapes --tokens 4 --out {tmp_path}", "python vqgan.py")
    assert not list(tmp_path.iterdir())
    out = shutil.copytree(alone("evaluation")[0], tmp_path / "out")
    scores, measured = json.loads((out / "scores.json").read_text()), (out / "measured.json").stat().st_mtime_ns
    assert set(scores) == {"data", "seed", "seconds", "fd_floor", *SCORES} and scores["data"] == "shapes"
    assert {name: set(scores[name]) for name in SCORES} == SCORES
    assert {"vqgan", "stage1", "hnt", "stage2", "ar", "maskgit"} <= set(scores["seconds"])
    report = (out / "report.md").read_text()
    pictures = [name for name in ("reconstructions", "prefixes", "samples_ar", "samples_maskgit", "order", "losses")
                if f"![]({name}.png)" in report and (out / f"{name}.png").exists()]
    assert len(pictures) == 6
    table = report.split("## Scores\n\n")[1].split("\n\n")[0]

    command = killable("evaluation")
    assert table in run(command, cwd=out)                                   # the same on the screen
    assert (out / "measured.json").stat().st_mtime_ns == measured
    assert json.loads((out / "scores.json").read_text()) == scores
    (out / "maskgit_nativetok_4.pt").unlink()
    partial = run(command.replace(" report ", " scores "), cwd=out)
    assert "AR samples" in partial and "not there yet" in partial
    refused("python -m extras.report repart", "Did you mean report")


# ---------------------------------------------------------------------------------------------------------------------
# Hostile files: seeded mutations of every kind of file that is read, in a process that is watched
#
#     MUTATIONS=10000 python -m pytest -q -s test_all.py -k mutated        # 10,000 pictures, 500 files of each other kind
#     MUTATIONS=10000 FIRST=4711 ...                                       # goes on at the number that failed

MUTATIONS, FIRST = int(os.environ.get("MUTATIONS", 400)), int(os.environ.get("FIRST", 0))
PATIENCE = 20           # seconds a file
GB = 2 ** 30
STARTS_SOMETHING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn",
                    "pickle.find_class", "ctypes.dlopen", "socket.connect")


def mutated(content, random, others):
    """One to three changes of the kinds that disks, networks and bad people make."""
    content = bytearray(content)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(min(len(content), 10 ** random.integers(1, 8)) + 1))   # the header as often as all else
        length = int(2 ** random.uniform(0, 9))
        piece, other = content[at:at + length], others[random.integers(len(others))]
        change = random.integers(8)
        if change == 0:                                     # flipped bits
            for i in random.integers(max(1, len(content)), size=random.integers(1, 20)) if content else ():
                content[i] ^= 1 << random.integers(8)
        elif change == 1:                                   # cut
            del content[at:]
        elif change == 2:                                   # random bytes, in between or instead
            content[at:at + length * int(random.integers(2))] = random.bytes(length)
        elif change == 3:                                   # a hole
            del content[at:at + length]
        elif change == 4:                                   # repeated
            content[at:at] = piece * int(random.integers(1, 50))
        elif change == 5:                                   # the beginning of one, the end of another
            content[at:] = other[int(random.integers(len(other) + 1)):]
        else:                                               # a number that says how many, or where
            numbers = (0, 1, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 65535, 65536, 9000, 2 ** 62, int(random.integers(2 ** 32)))
            size = int(2 ** random.integers(4))
            number = numbers[random.integers(len(numbers))] % 256 ** size
            content[at:at + size] = number.to_bytes(size, ("big", "little")[random.integers(2)])
    return bytes(content)


def watched(read, cases, folder, bound):
    """read(path) for each case (number, name, bytes, want) in a forked process, so that a crash, a hang and a hunger for
    memory are seen as such -> [(number, outcome)], the slowest and the largest. A file may take PATIENCE seconds and
    `bound` bytes. Outcomes: "read"; "refused", by BadInput with one line; all else is a fault."""
    outcomes, slowest, largest = [], (0.0, None), 0
    while len(outcomes) < len(cases):
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            answer(read, cases[len(outcomes):], folder, bound, send)
            os._exit(0)
        os.close(send)
        rest, fault, answered, before = b"", None, time.monotonic(), memory_now("VmRSS", child)
        while not fault:
            if select.select([receive], [], [], 0.1)[0]:
                if not (piece := os.read(receive, 65536)):
                    break
                *lines, rest = (rest + piece).split(b"\n")
                for number, outcome, seconds, memory in map(json.loads, lines):
                    outcomes.append((number, outcome))
                    slowest, largest = max(slowest, (seconds, number)), max(largest, memory)
                answered = time.monotonic()
            elif time.monotonic() - answered > PATIENCE:
                fault = f"no answer in {PATIENCE} s"
            elif memory_now("VmRSS", child) > before + bound:
                fault = f"takes more than {bound / GB:.1f} GB"
        os.close(receive)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if len(outcomes) < len(cases):                      # the process ended, or was ended, in the middle of a file
            outcomes.append((cases[len(outcomes)][0], fault or f"ended the process: {status}"))
    return outcomes, slowest, largest


def answer(read, cases, folder, bound, send):
    """The child of `watched`: writes a line of JSON a case."""
    log, executed = folder / "log", []
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.addaudithook(lambda event, args: event in STARTS_SOMETHING and executed.append(event))
    for case in cases:
        Path("/proc/self/clear_refs").write_text("5")       # the peak begins anew
        before, started = memory_now("VmRSS"), time.perf_counter()
        outcome = outcome_of(read, folder, *case[1:])
        seconds, memory = time.perf_counter() - started, memory_now("VmHWM") - before
        if executed:
            outcome = f"started something: {executed}"
        elif b"Traceback" in log.read_bytes():
            outcome = "printed a traceback"
        elif memory > bound:
            outcome = f"took {memory / GB:.1f} GB"
        os.write(send, json.dumps([case[0], outcome, seconds, memory]).encode() + b"\n")
        executed.clear(), os.truncate(log, 0)


def memory_now(what, process="self"):
    """VmRSS or VmHWM (its peak) of a process, in bytes; 0 once it has ended."""
    found = re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def outcome_of(read, folder, name, content, want):
    path = folder / "case" / name
    shutil.rmtree(folder / "case", ignore_errors=True)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    try:
        found = read(path)
    except BadInput as error:
        line = trainer.printable(error)
        return "refused" if str(folder / "case") in line else f"does not name the file: {line}"
    except BaseException as error:  # noqa: BLE001  what is looked for
        return f"{type(error).__name__}: {error}"[:300]
    return "read" if want in (None, found) else "silently read as something else"


def check_mutations(kind, read, make, count, folder, bound=1 * GB):
    """count cases of make(random) -> (name, bytes, what reading must give or None), each from its own seed."""
    cases = [(i, *make(np.random.default_rng([zlib.crc32(kind.encode()), i]))) for i in range(FIRST, FIRST + count)]
    outcomes, (seconds, number), memory = watched(read, cases, folder, bound)
    counts = {outcome: sum(o == outcome for _, o in outcomes) for outcome in ("read", "refused")}
    print(f"\n{kind:<12} {len(cases):>6} files: {counts['read']} read, {counts['refused']} refused; the slowest took "
          f"{seconds:.2f} s (number {number}), memory up to {memory / GB:.2f} GB", end="")
    faults = [(number, outcome) for number, outcome in outcomes if outcome not in counts]
    for number, _ in faults:
        _, name, content, _ = cases[number - FIRST]
        if keep := os.environ.get("KEEP"):
            Path(keep, f"{kind}-{number}-{name}").write_bytes(content)
    assert not faults, f"{kind}: {len(faults)} faults; FIRST=number MUTATIONS=20 makes one again\n" + "\n".join(map(str, faults[:30]))


# -- seeds ------------------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n%%EOF\n"
IPTC = b"".join(b"\x1c" + tag + len(value).to_bytes(2, "big") + value for tag, value in (      # holds the EPS
    (b"\3\x3c", b"\1\0"), (b"\3\x14", b"\0\x08"), (b"\3\x1e", b"\0\x06"), (b"\3\x78", b"\5"), (b"\x08\x0a", EPS)))


def by_hand():
    """Small pictures of kinds that Pillow reads and does not write, and two that must not be opened at all."""
    grey, rgb = picture(2, 6, 8).convert("L").tobytes(), picture(2, 6, 8).tobytes()
    words = {"SIMPLE": "T", "BITPIX": 8, "NAXIS": 2, "NAXIS1": 8, "NAXIS2": 6}
    fits = b"".join(f"{key:<8}= {value:>20}".ljust(80).encode() for key, value in words.items()) + b"END".ljust(80)
    packed = [{**words, "NAXIS": 0}, {"XTENSION": "'BINTABLE'", "BITPIX": 8, "NAXIS": 2, "NAXIS1": 0, "NAXIS2": 0,
              "ZIMAGE": "T", "ZCMPTYPE": "'GZIP_1  '", "ZBITPIX": 8, "ZNAXIS": 2, "ZNAXIS1": 8, "ZNAXIS2": 6}]
    packed = b"".join((b"".join(f"{key:<8}= {value:>20}".ljust(80).encode() for key, value in part.items())
                       + b"END".ljust(80)).ljust(2880) for part in packed)
    pcx = io.BytesIO()
    picture(2, 6, 8).save(pcx, format="PCX")
    bmp = io.BytesIO()
    picture(2, 6, 8).save(bmp, format="BMP")
    dib = bytearray(bmp.getvalue()[14:])
    dib[8:12] = (12).to_bytes(4, "little")                              # twice the height: the mask
    mcidas = np.zeros(64, ">i4")
    mcidas[[1, 8, 9, 10, 13, 33]] = 4, 6, 8, 1, 1, 256
    fli = struct.pack("<IHHHHHHI", 128 + 6 + 10 + 48, 0xAF11, 1, 8, 6, 8, 0, 5).ljust(128, b"\0")
    fli += struct.pack("<IHHQ", 16 + 6 + 48, 0xF1FA, 1, 0) + struct.pack("<IH", 6 + 48, 16) + grey
    return {
        "fits": fits.ljust(2880) + grey, "fits.gz": packed + gzip.compress(np.frombuffer(grey, np.uint8).astype(">i4").tobytes()),
        "sun": np.array([0x59A66A95, 8, 6, 8, 48, 1, 0, 0], ">i4").tobytes() + grey,
        "sun.rle": np.array([0x59A66A95, 8, 6, 24, 144, 2, 0, 0], ">i4").tobytes() + rgb.replace(b"\x80", b"\x7f") + b"\x80\x20\x01",
        "gbr": np.array([28, 2, 8, 6, 1], ">i4").tobytes() + b"GIMP" + bytes(4) + grey,
        "xv": b"P7 332\n#END_OF_COMMENTS\n8 6 255\n" + grey,
        "psd": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 6, 8, 8, 3) + bytes(12) + bytes(2) + rgb,
        "psd.rle": b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, 6, 8, 8, 1) + bytes(12) + b"\0\1" + b"\0\2" * 6 + b"\xf9\x55" * 6,
        "fli": fli, "mcidas": mcidas.tobytes() + grey, "imt": b"width 8\nheight 6\npixel n8\n\x0c" + grey,
        "ftex": b"FTEX" + struct.pack("<iiiiiiii", 0, 8, 6, 1, 1, 1, 32, 144) + rgb,
        "dxt": b"FTEX" + struct.pack("<iiiiiiii", 0, 8, 8, 1, 1, 0, 32, 32) + bytes(range(32)),
        "xpm": b'/* XPM */\nstatic char *x[] = {\n"4 2 2 1",\n"a c #FF0000",\n"b c None",\n"abab",\n"baba"\n};\n',
        "cur": struct.pack("<HHHBBBBHHII", 0, 2, 1, 8, 6, 0, 0, 0, 0, len(dib), 22) + bytes(dib) + bytes(24),
        "dcx": np.array([0x3ADE68B1, 12, 0], "<u4").tobytes() + pcx.getvalue(),
        "pixar": b"\200\350\0\0" + bytes(412) + struct.pack("<HHHHHH", 6, 8, 0, 0, 14, 2) + bytes(596) + rgb,
        "pcd": (bytes(2048) + b"PCD_IPI").ljust(96 * 2048 + 768 * 512 * 3 // 2, b"\0"), "eps": EPS, "iptc": IPTC}


@functools.cache
def pictures_of_all_kinds():
    """{name: bytes} of every kind that Pillow writes here, in every mode that the kind takes."""
    Image.init()
    found, small = by_hand(), picture(3, 20, 24)
    deep = np.arange(480, dtype=np.uint16).reshape(20, 24) * 100
    modes = {mode: small.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "F", "LA", "YCbCr", "I")}
    modes["I;16"] = Image.fromarray(deep)
    options = {"TIFF": [{"compression": name} for name in (None, "tiff_lzw", "tiff_deflate", "packbits")],
               "JPEG": [{}, {"progressive": True}], "BLP": [{}, {"blp_version": "BLP1"}],
               "WEBP": [{}, {"lossless": True}], "DDS": [{}, {"pixel_format": "DXT1"}, {"pixel_format": "DXT5"}],
               "TGA": [{}, {"compression": "tga_rle"}], "PNG": [{}, {"exif": turned()}], "ICNS": []}
    for kind, (mode, image) in itertools.product(sorted(Image.SAVE), modes.items()):
        for i, how in enumerate(options.get(kind, [{}])):
            file = io.BytesIO()
            with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):      # not of this mode
                image.save(file, format=kind, **how)
                found[f"{kind}-{mode}-{i}"] = file.getvalue()
    for mode, compression in (("1", "group4"), ("L", "jpeg"), ("RGB", "jpeg")):
        found[f"TIFF-{mode}-{compression}"] = bytes_of(modes[mode].save, format="TIFF", compression=compression)
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"):          # several pictures in one file
        file = io.BytesIO()
        with contextlib.suppress(Exception):
            small.save(file, format=kind, save_all=True, append_images=[picture(4, 20, 24)])
            found[f"{kind}-two"] = file.getvalue()
    file = io.BytesIO()
    Image.new("RGB", (128, 128)).save(file, format="ICNS")
    found["ICNS"] = file.getvalue()
    return found


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


SMALL_VQGAN = VQGANConfig(image_size=8, channels=4, channel_mult=(1, 2), res_blocks=1, code_dim=4, codebook_size=8,
                          norm_groups=2)
SMALL_MODELS = {
    "vqgan": (vqgan.VQGAN, SMALL_VQGAN),
    "tokenizer": (tokenizer.build, TokenizerConfig(tokens=2, patch_size=4, width=8, encoder_layers=1, decoder_layers=1,
                                                   heads=2, expert_width=4, expert_heads=1, code_dim=4, codebook_size=8,
                                                   vqgan=SMALL_VQGAN)),
    "ar": (generator.ARGenerator, GeneratorConfig(tokens=2, codebook_size=8, num_classes=2, width=16, layers=1, heads=2)),
    "maskgit": (generator.MaskGITGenerator, GeneratorConfig(mode="maskgit", tokens=2, codebook_size=8, num_classes=2,
                                                            width=16, layers=2, heads=2))}
LOADERS = {"vqgan": generator.open_tokenizer, "tokenizer": generator.open_tokenizer, "ar": generator.load_generator,
           "maskgit": generator.load_generator}


def small_checkpoint(stage):
    """As trainer.Run.save writes it."""
    torch.manual_seed(0)
    make, config = SMALL_MODELS[stage]
    model = make(config)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    about = {"classes": ["ant", "bee"], "tokenizer": "x.pt", "fingerprint": "0", "data": "1"}
    return {"stage": stage, "step": 4, "config": asdict(config), "training": asdict(trainer.TrainConfig()),
            "settings": {"seed": 0}, "random": [trainer.random_state()],
            "unlogged": {"loss": (torch.tensor(1.0), 2)}, "model": model.state_dict(),
            "optimizer": optimizer.state_dict(), "ema": trainer.Ema(model, 0.9).state_dict(),
            **({"about": about} if stage in ("ar", "maskgit") else {})}


def bytes_of(save, *args, **kwargs):
    file = io.BytesIO()
    save(*args, file, **kwargs)
    return file.getvalue()


def laughs():
    """A list of 2^60 lists, in 60."""
    lists = []
    for _ in range(60):
        lists = [lists, lists]
    return lists


NONSENSE = (None, True, -1, 0, 3, 10 ** 9, 2 ** 70, 10 ** 5000, math.nan, "", "\x1b[2J\n", "x" * 10 ** 6, [], {}, (), {1: 2},
            laughs(), ["a"], torch.zeros(0), torch.zeros(1).expand(10 ** 6, 10 ** 6), torch.zeros(2, 3),
            torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.int64), torch.eye(3).to_sparse(),
            torch.zeros(3, device="meta"))


def with_nonsense(tree, random):
    """One to three values of nested dicts and lists exchanged, left out or added."""
    tree = copy.deepcopy(tree)
    for _ in range(random.integers(1, 4)):
        place = tree
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = keys[random.integers(len(keys))]
            if isinstance(place[key], (dict, list)) and random.random() < 0.8 and len(place[key]) < 100:
                place = place[key]
                continue
            value = NONSENSE[random.integers(len(NONSENSE))]
            if random.random() < 0.2:
                del place[key]
            elif random.random() < 0.1 and isinstance(place, dict):
                place[(7, "new", None)[random.integers(3)]] = value
            elif torch.is_tensor(place[key]) and place[key].numel() < 10 ** 6 and random.random() < 0.5:
                place[key] = (place[key].long(), place[key][None], place[key].double(), place[key] * math.nan)[random.integers(4)]
            else:
                place[key] = value
            break
    return tree


def repacked(content, random, others):
    """An archive with one member changed and the checksums right: what nobody but a person makes."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    pickles = [name for name in members if name.endswith(".pkl")]
    name = pickles[0] if pickles and random.random() < 0.8 else list(members)[random.integers(len(members))]
    members[name] = mutated(members[name], random, others)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[int(random.random() < 0.2)]) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return packed.getvalue()


class Few(data.Images):
    """Six pictures of 16 x 16."""
    name, split, fingerprint, in_memory, classes = "few", "train", "few", True, ["a", "b"]
    labels, unreadable = np.arange(6) % 2, {}

    def get(self, index, rng=None):
        return np.random.default_rng(index).integers(0, 256, (3, 16, 16), dtype=np.uint8)


def few_codes(folder, tokenizer=None):
    return data.token_cache(tokenizer or Brightness(), Few(), folder / "codes.npy", "one", views=2, batch_size=5)[0]


# -- the mutations ----------------------------------------------------------------------------------------------------

needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="watches a forked process in /proc")


@needs_linux
def test_mutated_pictures(tmp_path):
    seeds = pictures_of_all_kinds()
    names, contents = list(seeds), list(seeds.values())
    for name in names:      # else the mutations would only be of files that are refused at once
        (tmp_path / "seed").write_bytes(seeds[name])
        if name.split("-")[0] in ("eps", "iptc", "EPS", "PALM", "PDF"):
            with pytest.raises(OSError, match="not an image"):
                data.decode(tmp_path / "seed", 32)
        else:
            assert data.decode(tmp_path / "seed", 32), name

    def make(random):
        i = random.integers(len(names))
        ending = (".jpg", ".png", ".eps", ".tif")[random.integers(4)]
        return f"x{ending}", mutated(contents[i], random, contents), None

    def read(path):
        data.read_image(path, 8)
        with contextlib.suppress(Exception):
            data.square(data.decode(path, 8, draft=True), 8, None)
    check_mutations("pictures", read, make, MUTATIONS, tmp_path, bound=3 * GB)


@needs_linux
def test_mutated_checkpoints(tmp_path):
    trees = {stage: small_checkpoint(stage) for stage in SMALL_MODELS}
    seeds = {stage: bytes_of(torch.save, tree) for stage, tree in trees.items()}

    def read(path):
        return trainer.fingerprint(LOADERS[path.stem](path))
    want = {}
    for stage, content in seeds.items():
        (tmp_path / f"{stage}.pt").write_bytes(content)
        want[stage] = read(tmp_path / f"{stage}.pt")

    def make(random):
        stage, how = list(seeds)[random.integers(len(seeds))], random.integers(3)
        if how == 0:
            return f"{stage}.pt", mutated(seeds[stage], random, list(seeds.values())), want[stage]
        if how == 1:
            return f"{stage}.pt", repacked(seeds[stage], random, list(seeds.values())), None
        return f"{stage}.pt", bytes_of(torch.save, with_nonsense(trees[stage], random)), None
    check_mutations("checkpoints", read, make, MUTATIONS // 20, tmp_path)


@needs_linux
def test_mutated_checkpoints_resumed(tmp_path):
    """Whatever a run takes up, it can go on with."""
    tree, (make, config) = small_checkpoint("vqgan"), SMALL_MODELS["vqgan"]
    content = bytes_of(torch.save, tree)
    args = trainer.parse(trainer.command_line(""), ["--config", "toy", "--device", "cpu", "--out", "x", "--resume"])

    def read(path):
        args.out = path.parent
        try:
            run = trainer.Run(args, "vqgan", "x", config, trainer.TrainConfig())
        except SystemExit as done:
            return done.code
        model = make(config)
        optimizer, ema = torch.optim.AdamW(model.parameters()), trainer.Ema(model, 0.9)
        run.track(model=model, optimizer=optimizer, ema=ema)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ema.update(model)
        return 0

    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "x.pt").write_bytes(content)
    assert read(tmp_path / "good" / "x.pt") == 0

    def make_case(random):
        how = random.integers(4)
        bad = (mutated(content, random, [content]) if how == 0 else repacked(content, random, [content]) if how == 1
               else bytes_of(torch.save, with_nonsense(tree, random)))
        return "x.pt", bad, 0
    check_mutations("resumed", read, make_case, MUTATIONS // 20, tmp_path)


@needs_linux
def test_mutated_weights(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    states = {"vqgan": small_checkpoint("vqgan")["model"], "llamagen": golden_weights("llamagen_tiny"),
              "uvit": golden_weights("uvit_tiny")}
    loaders = {"vqgan": lambda path: trainer.made_to_fit(lambda: vqgan.VQGAN(SMALL_VQGAN), vqgan.read_weights(path), path),
               "llamagen": lambda path: pretrained.load_llamagen(path, 4, "1d"), "uvit": pretrained.load_titok_maskgit}
    seeds = {f"{name}.{ending}": save(state) for name, state in states.items() for ending, save in (
        ("safetensors", safetensors.save), ("pth", lambda state: bytes_of(torch.save, state)),
        ("old.pth", lambda state: bytes_of(torch.save, state, _use_new_zipfile_serialization=False)))}

    def read(path):
        return trainer.fingerprint(loaders[path.name.split(".")[0]](path))
    for name, content in seeds.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name)

    def make(random):
        # of the largest file most is numbers, where a flip is another number: the header and the pickle count more
        name, how = list(seeds)[random.integers(len(seeds))], random.integers(3)
        if how == 0 and not name.endswith("safetensors"):
            return name, bytes_of(torch.save, with_nonsense(states[name.split(".")[0]], random)), None
        if how == 1 and name.count(".") == 1 and name.endswith("pth"):
            return name, repacked(seeds[name], random, list(seeds.values())), None
        return name, mutated(seeds[name], random, list(seeds.values())), None
    check_mutations("weights", read, make, MUTATIONS // 20, tmp_path)


@needs_linux
def test_mutated_token_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 3)
    want, tokenizer = few_codes(tmp_path / "good"), Brightness()
    tokenizer.fails_at = 4          # in the second part
    with pytest.raises(RuntimeError):
        few_codes(tmp_path / "parts", tokenizer)
    seeds = {path.relative_to(root).as_posix(): path.read_bytes() for root in (tmp_path / "good", tmp_path / "parts")
             for path in root.rglob("*") if path.is_file()}
    assert sorted(name.split("/")[-1] for name in seeds) == ["000000.npy", "codes.json", "codes.npy"]
    want = zlib.crc32(np.ascontiguousarray(want))

    def read(path):
        for name in ("codes.npy", "codes.json"):
            if path.name.startswith("codes") and not (path.parent / name).exists():
                (path.parent / name).write_bytes(seeds[name])
        return zlib.crc32(np.ascontiguousarray(few_codes(path.parent if path.name.startswith("codes") else path.parent.parent)))

    def make(random):
        name = list(seeds)[random.integers(len(seeds))]
        return name, mutated(seeds[name], random, list(seeds.values())), want
    check_mutations("token caches", read, make, MUTATIONS // 20, tmp_path)


@needs_linux
def test_mutated_npz(tmp_path):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
    features = {"pool": 2048, "logits": 1008, "spatial": 2023}
    mu, sigma = evaluate.feature_statistics(random.random((30, 4)))
    arrays = {"images": {"arr_0": pixels}, "floats": {"arr_0": pixels / 255}, "statistics": {"mu": mu, "sigma": sigma},
              "shard": {name: np.zeros((2, width), np.float32) for name, width in features.items()}}
    seeds = {f"{name}{i}.npz": bytes_of(lambda file, save=save, values=values: save(file, **values))
             for name, values in arrays.items() for i, save in enumerate((np.savez, np.savez_compressed))}

    def read(path):
        kind = path.stem[:-1]
        if kind == "statistics":
            evaluate.npz_pictures(path)
            found = evaluate.read_statistics(path)
        elif kind == "shard":
            assert evaluate.is_shard(path, 0, 2) in (True, False)
            found = evaluate.read_shard(path, 0, 2).values()
        else:
            found = [batch.numpy() for batch in evaluate.read_images(path)]
        return [zlib.crc32(np.ascontiguousarray(values)) for values in found]
    want = {}
    for name, content in seeds.items():
        (tmp_path / name).write_bytes(content)
        want[name] = read(tmp_path / name)

    def make(random):
        name = list(seeds)[random.integers(len(seeds))]
        if random.random() < 0.5:
            return name, repacked(seeds[name], random, list(seeds.values())), None
        return name, mutated(seeds[name], random, list(seeds.values())), want[name]
    check_mutations("npz", read, make, MUTATIONS // 20, tmp_path)


@needs_linux
def test_mutated_idx(tmp_path):
    write_idx(tmp_path / "idx", compress=False)
    seeds = {}
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        seeds[name] = (tmp_path / "idx" / name).read_bytes()
        seeds[f"{name}.gz"] = gzip.compress(seeds[name], mtime=0)

    def read(path):
        name = path.name.removesuffix(".gz")
        return zlib.crc32(data.read_idx(path.parent, name, int(name[-7])))
    want = {}
    for name, content in seeds.items():
        (tmp_path / name).write_bytes(content)
        want[name] = read(tmp_path / name)
        (tmp_path / name).unlink()

    def make(random):
        name = list(seeds)[random.integers(len(seeds))]
        if name.endswith(".gz") and random.random() < 0.5:
            return name, mutated(seeds[name], random, list(seeds.values())), want[name]
        content = mutated(seeds[name.removesuffix(".gz")], random, list(seeds.values()))
        return name, gzip.compress(content) if name.endswith(".gz") else content, None
    check_mutations("idx", read, make, MUTATIONS // 20, tmp_path)


@needs_linux
def test_mutated_notes(tmp_path, monkeypatch):
    """What is kept as JSON: measurements, and lists of images. Nothing else than what was kept may come out."""
    picture(0, 8, 8).save((tmp_path / "0.png"))
    (tmp_path / "ant").mkdir()
    for i in range(3):
        picture(i, 8, 8).save(tmp_path / "ant" / f"{i}.png")
    long_ago(tmp_path / "ant")
    long_ago(tmp_path)
    monkeypatch.setattr(data, "LARGE", 1)
    monkeypatch.setattr(data, "LISTS", tmp_path.parent / f"{tmp_path.name}-lists")
    listed = data.list_images(tmp_path / "ant")
    report.Notebook(tmp_path / "measured.json", [1, "a"])("x", [], lambda: {"fd": 1.25})
    seeds = {path.name: path.read_bytes() for path in (tmp_path / "measured.json", *data.LISTS.iterdir())}
    assert len(seeds) == 2

    def read(path):
        if path.name == "measured.json":
            return report.Notebook(path, [1, "a"])("x", [], lambda: {"fd": 1.25}) == {"fd": 1.25}
        data.LISTS = path.parent
        return data.list_images(tmp_path / "ant") == listed

    def make(random):
        name = list(seeds)[random.integers(len(seeds))]
        return name, mutated(seeds[name], random, list(seeds.values())), True
    check_mutations("notes", read, make, MUTATIONS // 20, tmp_path)


# -- one by one: what failed once -------------------------------------------------------------------------------------

def one_line(error, *words):
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


@needs_linux
@pytest.mark.parametrize("content", (EPS, IPTC), ids=("eps", "iptc"))
def test_no_program_is_started_for_a_picture(tmp_path, content):
    """Pillow hands an EPS to Ghostscript, and an IPTC file can hold one."""
    def read(path):
        with contextlib.suppress(BadInput):
            data.read_image(path, 8)
    assert watched(read, [(0, "x.jpg", content, None)], tmp_path, GB)[0] == [(0, "read")]

    def careless(path):         # and the harness would see it
        with Image.open(path) as image, contextlib.suppress(OSError):
            image.load()
    (tmp_path / "gs").write_text("#!/bin/sh\n")
    (tmp_path / "gs").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert "subprocess.Popen" in watched(careless, [(0, "x.jpg", content, None)], tmp_path, GB)[0][0][1]


@needs_linux
def test_the_watch_sees_crashes_hangs_hunger_and_tracebacks(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PATIENCE", 1)
    # pytest's faulthandler would print a page about a crash that is wanted
    bad = {"crash": lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGSEGV)), "hang": lambda: time.sleep(60),
           "hunger": lambda: np.ones(10 ** 8, np.uint8), "words": lambda: os.write(2, b"Traceback (most recent call"),
           "error": lambda: 1 // 0, "other": lambda: 5, "good": lambda: 7}
    cases = [(i, name, b"", 7) for i, name in enumerate(bad)]
    outcomes = watched(lambda path: bad[path.name](), cases, tmp_path, 2 ** 26)[0]
    for (_, outcome), words in zip(outcomes, ("ended the process", "no answer in 1 s", "0.1 GB", "traceback",
                                              "ZeroDivisionError", "something else", "read")):
        assert words in outcome


def pipe(path):
    os.mkfifo(path)


def special_files():
    return {"pipe": pipe, "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "folder": Path.mkdir,
            "device": lambda path: path.symlink_to("/dev/zero"), "loop": lambda path: path.symlink_to(path),
            "dangling": lambda path: path.symlink_to("nothing")}


def test_what_is_no_file_among_pictures(tmp_path, monkeypatch):
    """None of them may make the reader wait, or read for ever: the whole of it under a limit of time."""
    (tmp_path / "p").mkdir()
    for i in range(300):
        picture(i % 4, 8, 8).save(tmp_path / "p" / f"{i}.png")
    monkeypatch.chdir(tmp_path / "p")                   # a socket's name may have 108 bytes
    for name, make in special_files().items():
        make(Path(f"{name}.jpg"))
        with pytest.raises(BadInput) as error:
            data.read_image(f"{name}.jpg", 8)
        one_line(error, f"{name}.jpg")
    with pytest.raises(BadInput, match="cannot be read"):
        list(evaluate.folder_pictures(".").read(0, 400))
    dataset = data.open_dataset(str(tmp_path / "p"), "train", 8)
    with pytest.raises(BadInput, match="3 of 288 files cannot be read"):
        list(data.all_images(dataset, 16))


def test_a_pipe_in_the_place_of_any_other_file(tmp_path):
    os.mkfifo(tmp_path / "x")
    for read in (lambda path: trainer.load_checkpoint(path, "vqgan"), vqgan.read_weights, generator.load_generator,
                 generator.open_tokenizer, evaluate.npz_names, evaluate.read_images, evaluate.read_statistics,
                 evaluate.npz_pictures, lambda path: data.read_idx(tmp_path, "x", 3)):
        with pytest.raises(BadInput) as error:
            read(tmp_path / "x")
        one_line(error, str(tmp_path / "x"))
    assert evaluate.is_shard(tmp_path / "x", 0, 2) is False
    assert report.Notebook(tmp_path / "x", [])("a", [], lambda: 3) == 3
    for name in ("codes.npy", "codes.json"):
        few_codes(tmp_path / "cache")
        (tmp_path / "cache" / name).unlink()
        os.mkfifo(tmp_path / "cache" / name)
        with pytest.raises(BadInput, match="not a regular file"):
            few_codes(tmp_path / "cache")
        (tmp_path / "cache" / name).unlink()


def test_class_folders_that_go_round(tmp_path, folder, capsys):
    want = data.open_dataset(str(folder), "train", 8)
    (folder / "train" / "up").symlink_to("..")
    (folder / "train" / "here").symlink_to(".")
    (folder / "train" / "self").symlink_to("self")
    (folder / "train" / "ant" / "down").symlink_to("..")
    found = data.open_dataset(str(folder), "train", 8)
    assert found.files == want.files and found.classes == want.classes
    assert capsys.readouterr().out.count("a link to a folder that it lies in") == 2
    (tmp_path / "elsewhere").symlink_to(folder / "train" / "ant")        # a link to another place is none of these
    (folder / "train" / "bug").symlink_to(tmp_path / "elsewhere")
    (folder / "val" / "bug").mkdir()
    assert data.open_dataset(str(folder), "train", 8).classes == ["ant", "bee", "bug", "cat"]


def test_names_that_are_no_text(tmp_path):
    """Bytes that are no UTF-8, line ends and terminal escapes in names of files, classes and folders: one line each."""
    odd = [b"\xff\xfe", b"two\nlines", b"\x1b[2Jclear", "‮turned".encode()]
    for i, name in enumerate(odd):
        place = os.path.join(os.fsencode(tmp_path), b"o\xffdd\n", name)
        os.makedirs(place)
        for j in range(120):
            picture(j % 3, 8, 8).save(Path(os.fsdecode(place)) / f"{j}.png")
    bad = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"o\xffdd\n", odd[0], b"\xff\n\x1b[31m.png")))
    bad.write_bytes(b"\x1b[31m")
    for command, code in ((["--data", os.fsencode(bad.parents[1]), "--preview", tmp_path / "a.png", "--bench", "--workers", "0"], 0),
                          (["--data", os.fsencode(bad)], 2)):
        done = subprocess.run([sys.executable, data.__file__, *command], capture_output=True, timeout=120,
                              env={**os.environ, "PYTHONIOENCODING": "ascii"})
        output = done.stdout + done.stderr
        assert done.returncode == code and b"Traceback" not in output and b"\x1b" not in output, output
        assert b"\\udcff" in output and all(b": " in line or b"  " in line for line in output.splitlines()), output
    assert b"\\n\\x1b[31m.png: is a file" in output
    assert trainer.printable("a" * 10 ** 6).startswith("aaa") and len(trainer.printable("a" * 10 ** 6)) < 4000


@needs_linux
@pytest.mark.parametrize("mode", ("RGBA", "I;16", "F", "LA", "CMYK"))
def test_memory_of_a_picture(tmp_path, mode):
    """16 megapixels in a small file: 7 to 9 bytes a pixel, where float64 and the layers of compositing took up to 21."""
    image = (Image.fromarray(np.zeros((4000, 4000), np.uint16)) if mode == "I;16" else Image.new(mode, (4000, 4000)))
    content = bytes_of(image.save, format="TIFF", compression="tiff_deflate")
    read = functools.partial(data.decode, image_size=8)
    outcomes, _, memory = watched(lambda path: read(path).size, [(0, "x.tif", content, (4000, 4000))], tmp_path, GB)
    assert outcomes == [(0, "read")] and 1 < memory / 16e6 < 10       # less where freed memory is there to be used again


def test_strips_make_no_difference(tmp_path, monkeypatch):
    for name, content in pictures_of_all_kinds().items():
        (tmp_path / "x").write_bytes(content)
        try:
            monkeypatch.setattr(data, "ROWS", 7)
            strips = data.decode(tmp_path / "x", 8)
        except OSError:
            continue
        monkeypatch.setattr(data, "ROWS", 10 ** 6)
        assert strips.tobytes() == data.decode(tmp_path / "x", 8).tobytes(), name


def test_pictures_that_would_take_minutes(tmp_path):
    content = bytes_of(Image.new("L", (5000, 5000)).save, format="JPEG", progressive=True)
    scan = content[content.rfind(b"\xff\xc4", 0, content.rfind(b"\xff\xda")):-2]
    (tmp_path / "scans.jpg").write_bytes(content[:-2] + scan * 1500 + content[-2:])         # 0.2 MB
    (tmp_path / "slow.ppm").write_bytes(b"P6\n9000 9000\n100\n")
    for name, words in (("scans.jpg", "scans, which would take minutes"), ("slow.ppm", "decodes in Python")):
        with pytest.raises(BadInput, match=words) as error:
            data.read_image(tmp_path / name, 8)
        one_line(error, name)
    (tmp_path / "usual.jpg").write_bytes(content)
    assert data.read_image(tmp_path / "usual.jpg", 8).shape == (3, 8, 8)


@needs_linux
def test_idx_files_that_lie_about_their_size(tmp_path):
    head = bytes([0, 0, 8, 3])
    cases = {"bomb": gzip.compress(head + np.array([2, 28, 28], ">i4").tobytes() + bytes(2 * 10 ** 8)),
             "negative": head + np.array([-1, 28, 28], ">i4").tobytes(), "zero": head + bytes(12),
             "huge": head + np.array([2 ** 31 - 1] * 3, ">i4").tobytes(), "short": head + b"\0\0\0"}
    cases = [(i, name + ".gz" * (name == "bomb"), content, "") for i, (name, content) in enumerate(cases.items())]
    outcomes, _, memory = watched(lambda path: data.read_idx(path.parent, path.name.removesuffix(".gz"), 3), cases, tmp_path, GB)
    assert [outcome for _, outcome in outcomes] == ["refused"] * 5 and memory < 5e7


@needs_linux
def test_npz_files_that_lie_about_their_size(tmp_path):
    def npz(shape, values, name="arr_0", kind="|u1"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": kind, "fortran_order": False, "shape": shape})
            member.write(bytes(values))
        return file.getvalue()
    readers = {"images": lambda path: list(evaluate.read_images(path)), "statistics": evaluate.read_statistics,
               "features": lambda path: evaluate.read_shard(path, 0, 2)}
    cases = {"images": [npz((2, 10 ** 6, 10 ** 6, 3), 10 ** 8), npz((3, 4, 4, 3), 10 ** 8), npz((-3, 4, 4, 3), 9),
                        npz((2 ** 70, 4, 4, 3), 9), npz((2, 20_000, 20_000, 3), 10 ** 8)],
             "statistics": [npz((10 ** 7,), 8 * 10 ** 7, "mu", "<f8")],
             "features": [npz((10 ** 6, 2048), 10 ** 8, "pool", "<f4"), npz((2, 2048), 10 ** 8, "pool", "<f4")]}
    cases = [(f"{kind}{i}", f"{kind}.npz", content, "") for kind, contents in cases.items() for i, content in enumerate(contents)]
    outcomes, _, memory = watched(lambda path: readers[path.stem](path), cases, tmp_path, GB)
    assert all(outcome == "refused" for _, outcome in outcomes) and memory < 3e7, outcomes


def test_a_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    path, content = tmp_path / "x.pt", bytearray(bytes_of(torch.save, small_checkpoint("vqgan")))
    weight = small_checkpoint("vqgan")["ema"]["model"]["encoder.conv_in.weight"].numpy().tobytes()
    content[content.rindex(weight) + 3] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["ema"]["model"]["encoder.conv_in.weight"],
                           small_checkpoint("vqgan")["ema"]["model"]["encoder.conv_in.weight"])    # torch does not see it
    for read in (vqgan.load_vqgan, vqgan.read_weights):
        with pytest.raises(BadInput, match="damaged") as error:
            read(path)
        one_line(error, str(path))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def change(tree, keys, value):
    for key in keys[:-1]:
        tree = tree[key]
    tree[keys[-1]] = value


HOSTILE = [
    (["stage"], 3), (["stage"], laughs()), (["stage"], "x" * 10 ** 6), (["step"], -1), (["step"], 10 ** 5000), (["step"], True),
    (["config"], []), (["config"], laughs()), (["config", "tokens"], 10 ** 5000), (["config", "new"], 1),
    (["config", "tokens"], "2"), (["config", "heads"], 0), (["config", "expert_layers"], 10 ** 12), (["config", "width"], -8),
    (["config", "tokens"], 10 ** 12), (["config", "width"], 10 ** 12), (["config", "vqgan"], None),
    (["config", "vqgan", "channel_mult"], [1] * 1500), (["config", "vqgan", "channel_mult"], 2),
    (["config", "vqgan", "image_size"], 2 ** 40), (["config", "vqgan", "codebook_size"], math.nan), (["model"], None),
    (["model", "new"], 1), (["ema"], 1), (["ema"], {}), (["ema", "model"], [1]), (["ema", "model", 7], torch.zeros(1)),
    (["ema", "model", "decoder.class_token"], torch.zeros(1).expand(1, 1, 8)),
    (["ema", "model", "decoder.class_token"], torch.zeros(1, 1, 8, dtype=torch.complex64)),
    (["ema", "model", "decoder.class_token"], torch.zeros(1, 1, 8, dtype=torch.int64)),
    (["ema", "model", "decoder.class_token"], torch.eye(8).to_sparse()),
    (["ema", "model", "decoder.class_token"], torch.zeros(1, 1, 8, device="meta")),
    (["ema", "model", "\x1b[2J\n"], torch.zeros(1)), (["settings"], 1), (["settings"], laughs()), (["training"], None)]


def test_a_checkpoint_with_nonsense_in_it_is_one_line(tmp_path):
    for i, (keys, value) in enumerate(HOSTILE):
        checkpoint = small_checkpoint("tokenizer")
        change(checkpoint, keys, value)
        torch.save(checkpoint, tmp_path / f"{i}.pt")
        with pytest.raises(BadInput) as error:
            tokenizer.load_tokenizer(tmp_path / f"{i}.pt")
        assert len(str(error.value)) < 4000, keys
        one_line(error, str(tmp_path / f"{i}.pt"))


@pytest.mark.parametrize("about", (None, [], {}, {"classes": "ab", "tokenizer": "", "fingerprint": "", "data": ""},
                                   {"classes": ["a", 1], "tokenizer": "", "fingerprint": "", "data": ""}))
def test_a_generator_that_does_not_say_what_its_codes_mean(tmp_path, about):
    torch.save({**small_checkpoint("ar"), "about": about}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match="does not say what its codes and classes mean"):
        generator.load_generator(tmp_path / "x.pt")


def test_a_checkpoint_that_would_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, new in (("new.pt", True), ("old.pt", False)):
        torch.save({**small_checkpoint("vqgan"), "about": Evil()}, name, _use_new_zipfile_serialization=new)
    for name, read in itertools.product(("new.pt", "old.pt"), (vqgan.load_vqgan, vqgan.read_weights, generator.open_tokenizer)):
        with pytest.raises(BadInput):
            read(Path(name))
    assert not Path("executed").exists()


def test_a_compressed_checkpoint_is_a_bomb(tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in (("x/data.pkl", b"\x80\x02}."), ("x/version", b"3\n"), ("x/data/0", bytes(10 ** 7))):
            archive.writestr(member, content)
    (tmp_path / "x.pt").write_bytes(packed.getvalue())
    for read in (vqgan.load_vqgan, vqgan.read_weights):
        with pytest.raises(BadInput, match="damaged"):
            read(tmp_path / "x.pt")


WRONG_PARTS = [
    (["optimizer"], None), (["optimizer", "param_groups"], []), (["optimizer", "param_groups", 0, "lr"], "fast"),
    (["optimizer", "state", 0, "exp_avg"], laughs()), (["optimizer", "param_groups", 0, "lr"], laughs()),
    (["optimizer", "state", 0, "exp_avg"], torch.zeros(1)), (["optimizer", "state", 0], {"step": torch.tensor(1.0)}), (["optimizer", "state", 0, "step"], None), (["ema"], {}),
    (["ema", "model"], {}), (["ema", "updates"], None), (["unlogged"], None), (["unlogged"], {"loss": 3}), (["unlogged"], {"loss": ("a", 1)}), (["machine"], 3),
    (["settings"], {7: 1, "seed": 0}), (["random"], None), (["random"], [{"cpu": torch.zeros(3)}]), (["model"], {})]


def test_a_run_is_not_resumed_from_nonsense(tmp_path):
    make, config = SMALL_MODELS["vqgan"]
    resumed = trainer.parse(trainer.command_line(""), ["--config", "toy", "--device", "cpu", "--out", str(tmp_path), "--resume"])

    def track(keys, value):
        checkpoint = small_checkpoint("vqgan")
        change(checkpoint, keys, value)
        torch.save(checkpoint, tmp_path / "x.pt")
        run, model = trainer.Run(resumed, "vqgan", "x", config, trainer.TrainConfig()), make(config)
        run.track(model=model, optimizer=torch.optim.AdamW(model.parameters()), ema=trainer.Ema(model, 0.9))
    track(["settings"], {"seed": 0})
    track(["random"], [])                       # as of another number of ranks
    for keys, value in WRONG_PARTS:
        with pytest.raises(BadInput, match="x.pt") as error:
            track(keys, value)
            pytest.fail(f"{keys} = {value}: taken")
        one_line(error)


def test_a_titok_file_of_odd_shapes_is_one_line():
    keys = asset_keys("titok_s_keys.json")
    for name, shape in (("latent_tokens", (3,)), ("latent_tokens", (0, 0)), ("latent_tokens", (128, 10 ** 9)),
                        ("encoder.patch_embed.weight", (512, 3, 16, 0)), ("quantize.embedding.weight", (4096,)),
                        ("encoder.positional_embedding", ()), ("latent_token_positional_embedding", (2, 2)),
                        ("encoder.latent_token_positional_embedding", (7, 5))):
        state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
        state[name] = torch.empty(shape, device="meta")
        with pytest.raises(BadInput) as error:
            pretrained.load_titok(state, image_size=64)
        one_line(error, "TiTok weights")


def test_a_damaged_part_is_extracted_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 3)
    want = np.array(few_codes(tmp_path / "good"))
    failing, mending = Brightness(), Brightness()
    failing.fails_at = 4
    with pytest.raises(RuntimeError):
        few_codes(tmp_path / "x", failing)
    part, = (tmp_path / "x").glob("*/000000.npy")
    content = bytearray(part.read_bytes())
    content[-9] ^= 1                            # one bit of a code
    part.write_bytes(content)
    assert np.array_equal(few_codes(tmp_path / "x", mending), want) and mending.calls == 4

    class Saboteur(Brightness):                 # damages the first part after it was looked at, before all are joined
        def encode(self, images):
            for part in (tmp_path / "y").glob("*/*.npy"):
                part.write_bytes(bytes(content))
            return super().encode(images)
    with pytest.raises(BadInput, match="damaged since it was written"):
        few_codes(tmp_path / "y", Saboteur())
    mending = Brightness()
    assert np.array_equal(few_codes(tmp_path / "y", mending), want) and mending.calls == 2


# ---------------------------------------------------------------------------------------------------------------------
# The paper's tables and figures (extras/paper.py, Makefile)

class Bigram(nn.Module):
    """An AR generator whose next code is decided by the one before: table [K + 1, K], the last row is the start's."""

    def __init__(self, table, tokens):
        super().__init__()
        self.table, self.seen = nn.Parameter(torch.as_tensor(table, dtype=torch.float32)), []
        self.config = SimpleNamespace(num_classes=2, tokens=tokens, codebook_size=len(table) - 1)

    def forward(self, codes, labels):
        self.seen.append(codes.clone())
        start = torch.full_like(codes[:, :1], len(self.table) - 1)
        return self.table[torch.cat([start, codes[:, :-1]], 1)]             # [n, L, K]

    def generate(self, labels, top_k):
        assert top_k == 1
        codes = torch.zeros(len(labels), self.config.tokens, dtype=torch.int64)
        for i in range(self.config.tokens):
            codes[:, i] = self(codes, labels)[:, i].argmax(1)
        return codes


def test_changed_codes():
    """Exactly m codes differ from the greedy ones, from position i on, and they are sampled."""
    random = torch.Generator().manual_seed(0)
    ar = Bigram(torch.randn(9, 8, generator=random), tokens=7)
    labels = torch.zeros(200, dtype=torch.int64)
    greedy = ar.generate(labels, 1)
    ar.seen.clear()
    pairs = paper.changed_distributions(ar, labels, at=2, changed=3, seed=0)
    assert len(pairs) == 3
    inputs = ar.seen[-3:]                                                   # after 1, 2, 3 changes
    for m, codes in enumerate(inputs, 1):
        differs = codes != greedy
        assert differs[:, 2:2 + m].all() and not differs[:, :2].any() and not differs[:, 2 + m:].any()
        before, after = pairs[m - 1]
        assert torch.equal(before, ar.table[greedy[:, 1 + m]].softmax(-1))
        assert torch.equal(after, ar.table[codes[:, 1 + m]].softmax(-1))
    # the sampled code follows the distribution without its greedy code
    p = ar.table[greedy[0, 1]].softmax(-1).detach()
    p[greedy[0, 2]] = 0
    share = torch.bincount(inputs[0][:, 2], minlength=8) / 200
    assert (share - p / p.sum()).abs().max() < 0.1


def test_token_overlap():
    """1 where the generator does not listen, 0 where each code has successors of its own, as counted by hand else."""
    assert paper.token_overlap(Bigram([list(range(12))] * 13, 6), top=3, draws=4) == [1.0] * 4
    apart = torch.zeros(13, 12)
    for code in range(12):
        apart[code, 3 * (code % 4):3 * (code % 4) + 3] = 5.0        # codes of other remainders: other successors
    apart[12, 0] = 9.0
    found = paper.token_overlap(Bigram(apart + 0.01 * torch.arange(12), 6), top=3, draws=64)
    assert all(value < 0.35 for value in found)                     # a changed code may have the same remainder
    with pytest.raises(BadInput, match="4 tokens"):
        paper.token_overlap(Bigram(apart, 4), top=3)
    p, q = torch.tensor([[4.0, 3, 2, 1, 0]]), torch.tensor([[4.0, 0, 3, 1, 2]])
    assert [paper.overlap(p, q, top).item() for top in (1, 2, 3, 5)] == pytest.approx([1, 0.5, 2 / 3, 1])


def test_neighbour_information():
    """0 of independent codes, the entropy of codes that are repeated, and the sum it must have in between."""
    random = np.random.default_rng(0)
    first = random.integers(0, 16, 20_000)
    noisy = np.where(random.random(20_000) < 0.5, first, random.integers(0, 16, 20_000))
    codes = np.stack([first, first, random.integers(0, 16, 20_000), noisy], 1)
    again, none, _ = paper.neighbour_information(codes, 16)
    half, = paper.neighbour_information(codes[:, [0, 3]], 16)
    same = 0.5 + 0.5 / 16
    exact = 4 + same * math.log2(same) + 15 * (0.5 / 16) * math.log2(0.5 / 16)
    assert again == pytest.approx(4, abs=0.02) and none == pytest.approx(0, abs=0.01)
    assert half == pytest.approx(exact, abs=0.03)
    # many codes, few images: frequencies alone would find bits; taken off, none are left
    few = random.integers(0, 512, (2_000, 2))
    assert paper.neighbour_information(few, 512)[0] == pytest.approx(0, abs=0.05)


def test_intervals_and_claims():
    assert paper.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3 ** 0.5)       # t table, 2 degrees
    assert paper.half_width([1.0]) is None and paper.spread([1.0]) == "1.00"
    assert paper.spread([1.0, 2.0, 3.0]) == "2.00 ± 2.48"
    said = [str(paper.Claim("a less b", ours, others, -2.0)) for ours, others in
            (([1, 1.1, 0.9], [3, 3.2, 2.9]), ([3, 3.2, 2.9], [1, 1.1, 0.9]), ([1, 3, 2], [2, 1, 3]), ([1], [3]))]
    assert ["so it is here too" in said[0], "the other way round" in said[1], "not decided" in said[2],
            "one seed" in said[3]] == [True] * 4 and "paper -2.00" in said[0]


def test_plots_with_and_without_matplotlib(monkeypatch):
    """The same curves, with intervals, through both; each colour is there, and an interval adds to the picture."""
    xs, curves = [1, 2, 3], {"a": ([1, 2, 3], [3.0, 2.0, 1.0], [0.5] * 3), "b": ([1, 2, 3], [1.0, 1.5, 3.0])}
    for module in ("present", None):
        if module is None:
            monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        plot = report.line_plot("title", "x", curves)
        assert plot.size == (520, 320)
        pixels = np.asarray(plot).reshape(-1, 3).astype(int)
        for colour in ((0x1f, 0x6f, 0xb4), (0xd9, 0x54, 0x2b)):
            assert (np.abs(pixels - colour).sum(1) < 30).sum() > 50
        without = report.line_plot("title", "x", {"a": (xs, [3.0, 2.0, 1.0]), "b": curves["b"]})
        assert plot.tobytes() != without.tobytes()
    pixels = np.asarray(paper.stem_plot("t", torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.7]), 2))
    pixels = pixels.reshape(-1, 3).astype(int)
    assert {1, -1} <= {np.sign(r - b) for r, _, b in pixels if abs(r - b) > 60}          # red, blue


def test_make_paper(tmp_path, folder, fid_folder):
    """make paper from nothing, a few steps each: every table and figure, in the paper's layout; then two seeds."""
    few, out = "--steps 2 --batch_size 4", tmp_path / "paper"
    sets = [data.open_dataset(str(folder), split, 32) for split in ("train", "val")]
    out.mkdir()
    torch.save({"stage": "fd_classifier", "model": report.FDClassifier(3).state_dict(), "step": 900,
                "test_accuracy": 0.1, "config": {"made_of": [*(s.fingerprint for s in sets), 900, 128]}},
               out / "fd_classifier.pt")
    make = (f"make -o .venv/ready MAKE='make -o .venv/ready' PY={sys.executable} PAPER={out} DATA={folder} JOBS=2 "
            f"PAPER_VQGAN='{few} --perceptual none' PAPER_STAGE1='{few}' PAPER_HNT='--steps 10 --batch_size 4' "
            f"PAPER_STAGE2='{few} --perceptual none --discriminator patch' PAPER_AR='{few}'")
    text = run(f"{make} paper SEEDS=1")
    for name in paper.TABLES:
        assert (out / f"{name}.md").exists() and json.loads((out / f"{name}.json").read_text())["seeds"] == 1
        assert (out / f"{name}.png").exists() == (name.startswith("fig") or name == "order")
    table = (out / "table1.md").read_text()
    assert "Another data set and another size" in table and "5.23" in table and "1 seed, so no interval" in table
    assert "one seed cannot decide" in table and table in (out / "paper.md").read_text() and table in text
    # only what is missing is trained, and only for the table that is asked for
    plan = run(f"{make} -n table3a SEEDS=2")
    assert plan.count("tokenizer.py --config") == 3 and "seed0 --seed" not in plan and "generator.py" not in plan
    shutil.copytree(out / "seed0", out / "seed1")
    command = f"python -m extras.paper table3a --config toy --data {folder} --out {out}"
    again = run(command)
    assert "2 seeds: mean ± half" in again and re.search(r"NativeTok, 8 tokens *\| +2.28M \| +([\d.]+) ± 0.00", again)
    full = run("make -o .venv/ready table3a CONFIG=full WEIGHTS=none.bin", code=2)
    assert "none.bin: not found" in full and "python" not in full           # before anything is trained
    fid = run(f"{command} --inception {fid_folder}/inception.pth")          # another score is not taken from the notebook
    assert "rFID" in fid and "FID: Inception of 2015, weights" in fid and "rFD-classifier" not in fid
    (out / "seed0" / "titok_8.pt").unlink()
    refused(command, "titok_8.pt", "make table3a")
