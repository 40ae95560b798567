"""
Train an image classifier with any optimizer of optim.py. One file, top to bottom: settings, data, models, files,
training. The training loop is in `main`, the last page: begin there.

    python cifar_train.py                                     AdamW, a narrow ResNet-18, drawn shapes: offline
    python cifar_train.py --opt rotational_lion               any name of optim.OPTIMIZERS, with its tuned defaults
    python cifar_train.py --show shapes.png                   what the pictures look like (needs matplotlib)
    python cifar_train.py --data cifar10 --model resnet20     photographs, downloaded; or a folder of the .bin files
    python cifar_train.py --opt rotational_lion --resume      goes on after a kill, a crash, Ctrl-C: add --resume
    python cifar_train.py --preset paper_resnet20_rotational_adamw    a paper's settings (a GPU is advisable)
    python cifar_train.py --bench                             images per second, and where the time of a step goes

A run writes config.json, ckpt.pt and log.jsonl under --out_dir. log.jsonl has one JSON object a line, of two kinds:

    {"step": 312, "train_loss": ..., "train_acc": ..., "test_loss": ..., "test_acc": ..., "lr": ..., ...}
    {"step": 350, "lr": ..., "rotation": {"conv.weight": {"angle": ..., "norm": ...}, ...}}          in the 351st step

The first is of an evaluation, after 312 steps. The log's last line has "final": true. The angle is the mean over the
neurons of a weight, in radians, for that one step. Theory's predicted_angle and predicted_norm stand beside it. Exit
status: 0 done, 2 bad input, 3 the loss is no number any more, 130 or 143 stopped by Ctrl-C or SIGTERM after saving.

References of the presets: Kosson et al. 2024 (Rotational Equilibrium), Large et al. 2024 (Scalable Optimization in the
Modular Norm), Lin et al. 2024 (root-free methods). Each model names its own.
"""
import argparse
import ast
import collections
import difflib
import errno
import functools
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import sys
import tarfile
import time
import zipfile
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import optim

try:
    import fcntl
except ImportError:                                 # Windows has none: nothing keeps two runs out of one folder there
    fcntl = None

SCRIPT = "cifar_train.py"


def fail(message, status=2):
    """The one way out for bad input: a line that says what to do, and a status. Never a traceback."""
    print(f"{SCRIPT}: {message}", file=sys.stderr)
    sys.exit(status)


# ---- Settings: the command line overrides the preset, and the preset the defaults ------------------------------------


# A line is a flag:  name: type = default  # its help, which may begin with limits, [low, high) or {a, b}.  Read it as
# s.name. If it leaves what is learned unchanged, add it to ASIDE. LIMITS has the limits of every flag, or "".
class Settings:
    # optimizer (what is not given comes from the preset, else from TUNED, else from the optimizer's class)
    opt: str = "adamw"              # any name of optim.OPTIMIZERS
    lr: float = None                # [0, inf) peak learning rate
    weight_decay: float = None      # [0, inf) of matrices and filters; biases and gains have none
    beta1: float = None             # [0, 1) of optimizers with betas
    beta2: float = None             # [0, 1) likewise
    momentum: float = None          # [0, 1) of the sgd, rmsprop and shampoo families
    eps: float = None               # [0, inf) of the adam and rmsprop families (modular_adam has none)
    opt_kwargs: list = None         # KEY=VALUE ... anything else that the optimizer's class takes
    # training
    preset: str = None              # a name of PRESETS; default: --model's own, else cpu, with CUDA resnet18 on shapes
    schedule: str = "cosine"        # {cosine, linear, constant, step} after the warmup; step: lr / 10 at 1/3 and 2/3
    warmup: int = 60                # [0, 1e9] steps over which lr rises linearly; if not given, at most half of a run
    steps: int = None               # [1, 1e9] optimizer steps, instead of epochs
    epochs: int = None              # [1, 1e9] passes over the training images
    batch_size: int = 64            # [1, 1e6] images per step
    grad_clip: float = 0.0          # [0, inf) largest gradient norm; 0: no clipping
    loss: str = "ce"                # {ce, mse30} cross-entropy, or a square error: see loss_of
    label_smoothing: float = 0.0    # [0, 1] share of the target spread over all classes (of ce)
    seed: int = 1337                # [0, 1e18] of weights, batches and augmentation
    # model
    model: str = "resnet18"         # resnet18, vgg16, vit, gnn, swin, ...: an unknown name lists them all
    width: int = None               # [1, 1e5] channels of the first stage, or of every layer where all are alike
    depth: int = None               # [1, 1e4] blocks, or layers, of all models but ResNets and VGG
    gains: bool = None              # {0, 1} a learnable gain per output neuron; default: with rotational optimizers
    # data and files
    data: str = "shapes"            # shapes, cifar10, cifar100, a folder with CIFAR's .bin files, imagenet32:FOLDER
    split: float = 1.0              # (0, 1] train on this share, evaluate on the rest instead of the test set: to tune
    crop: int = 4                   # [0, 1e3] shift images by up to this many pixels
    flip: bool = True               # {0, 1} mirror half of the images
    data_dir: str = "data"          # where downloads and drawn images are kept
    out_dir: str = None             # default: out/cifar-OPT-MODEL-DATA and the other flags that were given
    resume: bool = False            # {0, 1} go on from ckpt.pt in out_dir, with the settings in it
    save_every: int = None          # [1, 1e9] steps between checkpoints; default: as eval_every
    eval_every: int = None          # [1, 1e9] steps between evaluations; default: an epoch
    # machine
    device: str = None              # {cpu, cuda, mps} default: the best there is
    dtype: str = None               # {float32, bfloat16} of autocast; default: bfloat16 on GPUs that compute in it
    compile: bool = None            # {0, 1} torch.compile the model and the optimizer; default: with CUDA
    track: int = 50                 # [0, 1e9] steps between records of how far neurons turn; 0: none
    bench: bool = False             # {0, 1} time a step and its parts, then leave; writes nothing
    show: str = None                # draw a sheet of training images into this file, then leave (needs matplotlib)


# Every line of Settings as (name, comment, its range or choices). A heading has an empty name.
FLAGS = re.findall(r"^    (?:(\w+): .*?)?# (([\[(].+?[])]|\{.+?\})?.*)", inspect.getsource(Settings), re.M)
LIMITS = {name: limits for name, _, limits in FLAGS if name}
# HYPER are the optimizer's. COMMAND are of one command, not of the run. ASIDE leave what is learned unchanged.
HYPER = {"lr", "weight_decay", "beta1", "beta2", "momentum", "eps", "opt_kwargs"}
COMMAND = {"resume", "bench", "show"}
ASIDE = COMMAND | {"data_dir", "out_dir", "save_every", "eval_every", "device", "compile", "track"}
ALIASES = {"learning_rate": "lr", "max_iters": "steps", "eval_interval": "eval_every", "warmup_iters": "warmup",
           "dataset": "data"}                       # nanoGPT's


def parse(argv=None):
    """The flags that were given, as a dict. Every line of Settings is a flag, and its comment the help."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False, argument_default=argparse.SUPPRESS)
    p.error, group = fail, p                        # an error is one line, without the usage
    for name, words, limits in FLAGS:
        if not name:
            group = p.add_argument_group(words)
            continue
        kind, default = Settings.__annotations__[name], getattr(Settings, name)
        how = {bool: {"type": int, "nargs": "?", "const": 1}, list: {"nargs": "+", "action": "extend"}}
        how = how.get(kind, {"type": kind})
        if limits.startswith("{"):
            how["choices"] = [how["type"](word) for word in limits[1:-1].split(", ")]
        words = words.replace("%", "%%") + (f" (default {default})" if default is not None else "")
        group.add_argument(f"--{name}", help=words, **how)
    given, unknown = p.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        near = ALIASES.get(name) or difflib.get_close_matches(name, LIMITS, n=1, cutoff=0)[0]
        fail(f"unknown argument {unknown[0]}: did you mean --{near}? (--help lists them all)")
    for name, value in vars(given).items():
        if value == "":
            fail(f"--{name} is empty: give at least one character, or leave the flag out")
        limits = LIMITS[name]
        if limits[:1] in ("[", "("):
            low, high = map(float, limits[1:-1].split(", "))
            if not (low < value < high or value == low and "[" in limits or value == high and "]" in limits):
                fail(f"--{name} {value} is out of range: it must be in {limits}")
    return vars(given)


# What the presets of a paper have in common.
# Kosson et al. 2024 (Rotational Equilibrium): 200 epochs, of which 5 are warmup, in float32. Their cosine lies over the
# whole run, ours after the warmup.
KOSSON = dict(data="cifar10", epochs=200, gains=False, dtype="float32")
# Large et al. 2024 (Modular Norm): 3 blocks of width 128, no decay, in float32. They use AutoAugment, too.
LARGE = dict(data="cifar10", width=128, depth=3, steps=10_000, batch_size=128, schedule="linear", warmup=0,
             dtype="float32")
# Lin et al. 2024 (root-free methods). They decay biases and gains, too, and drop lr an epoch earlier each time.
LIN = dict(data="cifar100", epochs=210, batch_size=128, schedule="step", warmup=0, gains=False)


def paper(setup, opt, **hyper):
    """A preset. `tuned` stands in for the table TUNED, for the optimizers that it names."""
    return setup | dict(opt=opt, tuned={opt: hyper})


PRESETS = {
    # The default without CUDA: two or three minutes on two cores.
    "cpu": dict(model="resnet18", width=8, epochs=3, compile=False),
    # The defaults of these models, two or three minutes on two cores. Shapes lie anywhere already: without shifts a
    # short training gets further. With all but gnn adamw learns nothing at the lr of ResNets. Its values are a guess,
    # those of rotational_adamw and rf_rmsprop the best of a few.
    "gnn": dict(model="gnn", epochs=10, crop=0),
    **{name: dict(model=name, epochs=epochs, crop=0, tuned={
        **dict.fromkeys(("adamw", "rotational_adamw"), dict(lr=2e-3, beta1=0.9, beta2=0.99, weight_decay=0.05)),
        "rf_rmsprop": dict(lr=lr, momentum=0.9, alpha=0.97, eps=1e-3)})
       for name, epochs, lr in (("swin", 3, 1.25e-3), ("gcvit", 4, 4e-4), ("focalnet", 3, 1.25e-3),
                                ("vmamba", 3, 1.25e-3))},
    # The default with CUDA, then on shapes: a sound set-up of no paper.
    "resnet18": dict(data="cifar10", model="resnet18", epochs=30, batch_size=256, warmup=400, label_smoothing=0.1),

    # Kosson et al., ResNet-20 in large batches: the baselines, and the rotational variants with the same values
    # ("zero-shot"). Retuned ("best-shot"), those have --weight_decay 0.08 (adamw), 2e-4 (sgd), 2 (lion). In batches of
    # 128 (--batch_size 128 --warmup 1950) both kinds have --lr 0.05 (adamw), 0.5 (sgd), 5e-4 (lion).
    **{f"paper_resnet20_{geometry}{direction}": paper(
        KOSSON | dict(model="resnet20", batch_size=2048, warmup=120), geometry + direction, **hyper)
       for geometry in ("", "rotational_") for direction, hyper in {
           "adamw": dict(lr=0.16, beta1=0.9, beta2=0.999, weight_decay=0.01),
           "sgd": dict(lr=4.8, momentum=0.9, weight_decay=1e-4),
           "lion": dict(lr=0.016, beta1=0.9, beta2=0.99, weight_decay=1.0)}.items()},
    # Kosson et al., ResNet-18: Adam against AdamW, whose angle rotational_adam takes over. rotational_sgd has the
    # middle of their sensitivity study, which is of a pre-activation ResNet-18.
    **{f"paper_resnet18_{opt}": paper(KOSSON | dict(model="resnet18", batch_size=256, warmup=975), opt, **hyper)
       for opt, hyper in {
           **dict.fromkeys(("adamw", "rotational_adamw", "rotational_adam"),
                           dict(lr=0.0125, beta1=0.9, beta2=0.999, weight_decay=0.08)),
           "rotational_sgd": dict(lr=1.0, momentum=0.9, weight_decay=5e-4)}.items()},

    # Kosson et al., ImageNet: here in 32 x 32 pixels; theirs have 224 x 224, random crops of any size and, for DeiT,
    # RandAugment, mixup and cutmix. rotational_sgd has the values of sgd, as theirs are not published.
    **{f"paper_{model}_imagenet32_{geometry}{opt}": paper(
        setup | dict(model=model, data="imagenet32:data"), geometry + opt, **hyper)
       for geometry in ("", "rotational_") for model, opt, hyper, setup in (
           ("resnet50", "sgd", dict(lr=0.1, momentum=0.9, weight_decay=1e-4),
            dict(epochs=90, batch_size=256, warmup=5004, gains=False)),
           ("vit", "adamw", dict(lr=5e-4, beta1=0.9, beta2=0.999, weight_decay=0.05),
            dict(epochs=300, batch_size=1024, warmup=6255, label_smoothing=0.1)))},

    # Large et al.: the lr with the lowest training loss at this size, in their stored figures.
    **{f"paper_{model}_{opt}": paper(LARGE | dict(model=model), opt, weight_decay=0.0, **hyper)
       for model, opt, hyper in (
           ("resmlp", "modular_adam", dict(lr=0.25, beta1=0.9, beta2=0.99)),
           ("resmlp", "modular_sgd", dict(lr=0.25, momentum=0.9)),
           ("rescnn", "modular_adam", dict(lr=0.25, beta1=0.9, beta2=0.99)),
           ("rescnn", "modular_sgd", dict(lr=4.0, momentum=0.9)))},

    # Lin et al.: the best of their random search (best_run.sh). Their lr_cov is 1 - beta2 and 1 - alpha here.
    **{f"paper_{name}_{opt}": paper(LIN | setup, opt, **hyper) for name, setup, runs in (
        ("resnet34", dict(model="resnet34"), {
            "sgd": dict(lr=0.2086, momentum=0.3160, weight_decay=1.597e-3),
            "adamw": dict(lr=2.427e-4, beta1=0.2766, beta2=1 - 5.136e-4, eps=5.426e-11, weight_decay=0.04467),
            "rf_rmsprop": dict(lr=4.978e-3, momentum=0.9614, alpha=1 - 1.184e-3, eps=5.577e-5, weight_decay=2.325e-3)}),
        ("densenet121", dict(model="densenet121", width=32, depth=6), {
            "sgd": dict(lr=0.1833, momentum=0.1285, weight_decay=1.648e-3),
            "adamw": dict(lr=4.114e-4, beta1=0.5408, beta2=1 - 9.653e-4, eps=1.150e-10, weight_decay=0.04332),
            "rf_rmsprop": dict(lr=0.09845, momentum=0.6044, alpha=1 - 5.626e-4, eps=5.306e-6, weight_decay=1.956e-3)}),
        ("vgg16", dict(model="vgg16"), {
            "sgd": dict(lr=0.03737, momentum=0.3385, weight_decay=0.01126),
            "adamw": dict(lr=2.743e-3, beta1=7.497e-3, beta2=1 - 5.389e-3, eps=1.833e-10, weight_decay=0.08979),
            "rf_rmsprop": dict(lr=0.01727, momentum=0.5657, alpha=1 - 5.792e-4, eps=1.851e-5, weight_decay=0.01719)}),
        ("resnet50", dict(model="resnet50", epochs=120), {
            "sgd": dict(lr=0.07363, momentum=0.4077, weight_decay=5.295e-3),
            "adamw": dict(lr=6.057e-4, beta1=0.3506, beta2=1 - 1.178e-4, eps=1.984e-10, weight_decay=0.08983),
            "rf_rmsprop": dict(lr=6.658e-3, momentum=0.8772, alpha=1 - 1.496e-3, eps=1.953e-4, weight_decay=6.989e-3)}),
        ("resnet50_mse", dict(model="resnet50", epochs=120, loss="mse30"), {
            "sgd": dict(lr=0.02629, momentum=0.01885, weight_decay=0.01503),
            "adamw": dict(lr=7.941e-4, beta1=0.05651, beta2=1 - 2.323e-3, eps=1.762e-7, weight_decay=0.08533),
            "rf_rmsprop": dict(lr=0.02533, momentum=8.169e-3, alpha=1 - 1.162e-4, eps=5.128e-7, weight_decay=0.01338)}),
    ) for opt, hyper in runs.items()},
}

# Tuned for the cpu preset on shapes, one seed, the test set untouched. The lr of each NAME was swept in octaves:
#     python sweep.py --script cifar_train.py --grid opt=NAME lr=1e-3,2e-3,4e-3 --fixed "epochs=1 split=0.9"
# The other numbers are by hand. For the rotational ones they give angles of 0.02 to 0.07.
TUNED = {}
for direction, plain, rotational, modular, shared in (          # lr and weight_decay of each geometry
        ("sgd", (0.4, 5e-4), (0.5, 2.5e-3), (2.0, 0.0), dict(momentum=0.9)),
        ("adam", (1e-2, 0.0), (1e-2, 1.0), (2.0, 0.0), dict(beta1=0.9, beta2=0.99)),
        ("adamw", (1e-2, 0.05), (1e-2, 1.0), None, dict(beta1=0.9, beta2=0.99)),
        ("lion", (3e-3, 0.5), (2e-3, 20.0), (1.0, 0.0), dict(beta1=0.9, beta2=0.99)),
        ("rmsprop", (6e-3, 0.0), (2e-3, 1.0), (1.0, 0.0), dict(alpha=0.99)),
        ("rf_rmsprop", (2e-2, 0.0), (4e-3, 0.25), (2.0, 0.0), dict(alpha=0.97, momentum=0.9, eps=1e-3)),
        ("rf_adamw", (0.1, 0.05), (2e-2, 0.5), (2.0, 0.0), dict(beta1=0.9, beta2=0.97, eps=1e-3)),
        ("muon", (0.08, 0.05), (0.03, 3.0), (4.0, 0.0),
         dict(momentum=0.95, beta1=0.9, beta2=0.99, adamw_lr_scale=0.25)),
        ("shampoo", (3e-3, 0.0), (1e-3, 0.5), (1.0, 0.0),
         dict(momentum=0.9, lr_cov=0.05, damping=1e-6, update_every=10)),
        ("if_shampoo", (2e-2, 0.0), (2e-3, 0.25), (2.0, 0.0), dict(momentum=0.9, lr_cov=0.1, damping=3e-4))):
    for geometry, pair in (("", plain), ("rotational_", rotational), ("modular_", modular)):
        if pair:
            TUNED[geometry + direction] = dict(lr=pair[0], weight_decay=pair[1], **shared)
TUNED["modular_rmsprop"]["momentum"] = 0.9
TUNED["rotational_muon"]["adamw_lr_scale"], TUNED["modular_muon"]["adamw_lr_scale"] = 0.5, 1.0
TUNED["shampoo"]["graft"] = TUNED["rotational_shampoo"]["graft"] = "adam"


def settle(given):
    """All settings of a new run: the command line over the preset over the defaults; the optimizer's own in s.hyper.
    `main` adds those that depend on the number of images."""
    device = pick_device(given.get("device"))
    own = given.get("model") if given.get("model") in ("gnn", *MIXERS) else None    # the preset of the same name
    name = given.get("preset", own or ("resnet18" if device == "cuda" else "cpu"))
    preset = PRESETS.get(name) or fail(f"--preset {name}: invalid choice, there are {', '.join(PRESETS)}")
    preset = preset | ({} if "preset" in given else {"data": Settings.data})       # nobody asked for a download
    model = given.get("model", preset["model"])
    if model not in MODELS:
        fail(f"--model {model}: invalid choice, there are {', '.join(MODELS)}")
    _, width, depth = MODELS[model]
    replaced = {"steps", "epochs"} if given.keys() & {"steps", "epochs"} else set()
    if model != preset["model"]:                    # a preset's sizes are its model's
        replaced |= {"width", "depth"}
    preset = {key: value for key, value in preset.items() if key not in replaced}
    chosen = {key: getattr(Settings, key) for key in LIMITS} | preset | given | {"preset": name, "device": device}
    s = argparse.Namespace(**{key: chosen[key] for key in LIMITS if key not in HYPER})
    try:
        kind = optim.find_optimizer(s.opt)
    except ValueError as error:
        fail(error)

    if kind.geometry is optim.MODULAR and model in NO_TREE:
        fail(f"--opt {s.opt}: {model} has no modular tree, since {NO_TREE[model]}. Take another --model or --opt")

    said, tuned = said_by_hand(given), preset.get("tuned", {})
    s.lr_from = ("given" if "lr" in said else f"preset {name}" if s.opt in tuned else
                 "tuned for preset cpu" if s.opt in TUNED else "default of its class, tuned by nobody")
    s.hyper = {"lr": kind.takes()["lr"]} | tuned.get(s.opt, TUNED.get(s.opt, {})) | said
    if "batch_size" in kind.takes():                # over how many images the loss is a mean
        s.hyper.setdefault("batch_size", s.batch_size)

    s.width, s.depth = s.width or width, depth and (s.depth or depth)
    if "depth" in given and not depth:
        fail(f"--depth: {model} has only the depth in its name; all but ResNets and VGG have a choice")
    if s.loss != "ce" and "label_smoothing" in given:
        fail(f"--label_smoothing is of the cross-entropy: leave it out with --loss {s.loss}")
    if s.gains is None:
        s.gains = kind.geometry is optim.ROTATIONAL
    if s.compile is None:
        s.compile = device == "cuda"                # compiling for a CPU takes half a minute
    if s.dtype is None:                             # older GPUs have bfloat16, but only emulate it
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        s.dtype = "bfloat16" if native else "float32"
    words = ["cifar", s.opt, model, pathlib.Path(s.data).name, *given.get("opt_kwargs", [])]
    words += [f"{key}={value}" for key, value in given.items()
              if key not in ASIDE | {"opt", "model", "data", "opt_kwargs"}]
    s.out_dir = s.out_dir or "out/" + re.sub(r"[^\w.=+-]", "_", "-".join(words))
    return s


def said_by_hand(given):
    """The hyperparameters on the command line as one dict, whether by their own flags or by --opt_kwargs."""
    said = {key: value for key, value in given.items() if key in HYPER - {"opt_kwargs"}}
    for pair in given.get("opt_kwargs", []):
        key, equals, text = pair.partition("=")
        if not equals or key in said or key == "betas":
            fail(f"--opt_kwargs {pair}: write KEY=VALUE, give no KEY twice, and betas by --beta1 and --beta2")
        try:
            said[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            said[key] = text                        # a word, as in graft=adam
    return said


def resumed(given):
    """-> settings and checkpoint of the run to go on with. A flag given again must have the value of the first time,
    unless it is the length, the dtype or one of ASIDE."""
    out_dir = given.get("out_dir") or settle(given).out_dir
    ckpt, said = load_checkpoint(pathlib.Path(out_dir) / "ckpt.pt"), said_by_hand(given)
    length = {"steps", "epochs"}                    # where one is given, the other no longer counts
    s = argparse.Namespace(**ckpt["config"] | {key: getattr(Settings, key) for key in COMMAND}
                           | dict.fromkeys(length if given.keys() & length else ())
                           | {key: given[key] for key in given.keys() & (ASIDE | length | {"dtype"})})
    s.out_dir, s.device = out_dir, pick_device(s.device)
    other = [key for key in given.keys() - HYPER if getattr(s, key) != given[key]]
    for key in other + [key for key in said if s.hyper.get(key) != said[key]]:
        fail(f"--{key} {(given | said)[key]} is not what {out_dir}/ckpt.pt was made with: leave it out to go on, or "
             "start a new run in another --out_dir")
    return s, ckpt


def pick_device(name):
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name not in (None, "cpu", best):
        fail(f"--device {name}: this machine (or this build of torch) has none; use --device cpu")
    return name or best


# ---- Data: all images as bytes, (N, 32, 32, 3), the three colours of a pixel side by side ----------------------------

SIZE = 32                                           # height and width of an image
TORONTO = "https://www.cs.toronto.edu/~kriz/"
# name: (archive, sha256, classes, bytes of label before each image, files for training, for testing, with the names)
CIFAR = {
    "cifar10": ("cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                10, 1, [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], "batches.meta.txt"),
    "cifar100": ("cifar-100-binary.tar.gz", "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                 100, 2, ["train.bin"], ["test.bin"], "fine_label_names.txt"),
}
SHAPES = ("disc", "ring", "square", "triangle", "pentagon", "star", "cross", "crescent", "heart", "bars")
# Images: uint8 (N, 32, 32, 3). Labels: int64 (N,), from 0. names: of the classes. fingerprint: sha256 of all four.
Images = collections.namedtuple("Images", "train train_labels test test_labels names fingerprint")


def download(url, sha256, path):
    """Fetch url to path, unless it is there. It is checked before it counts."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, sha256)
        elif sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            fail(f"{path} is not the file that {url} should give: delete it, then start again")
        return path
    except (OSError, RuntimeError, http.client.HTTPException) as error:    # no network, no such file, another file, ...
        fail(f"cannot download {url}: {' '.join(str(error).split())}. Fetch it by hand and put it at {path} "
             "(--data_dir), or leave out --data: the default needs none")


def load_data(name, data_dir):
    """-> Images, by the name of a data set or from a folder with CIFAR's .bin files."""
    data_dir = pathlib.Path(data_dir)
    try:
        if name.startswith("imagenet32:"):
            arrays, names = load_imagenet32(pathlib.Path(name.removeprefix("imagenet32:")), data_dir)
        else:
            arrays, names = load_shapes(data_dir) if name == "shapes" else load_cifar(name, data_dir)
    except OSError as error:
        fail(f"cannot read or write {error.filename or data_dir}: {error.strerror or error}. Choose another place with "
             "--data or --data_dir")
    arrays = [np.ascontiguousarray(array) for array in arrays]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array)
    return Images(*map(torch.from_numpy, arrays), names, digest.hexdigest())


def load_cifar(name, data_dir):
    """CIFAR-10 or CIFAR-100, from the archive or from a folder of its files -> four arrays, the names of the classes. A
    record has one or two bytes of label, of which the last one counts, then the planes of red, green and blue."""
    folder = pathlib.Path(name)
    if name in CIFAR:
        folder = download(TORONTO + CIFAR[name][0], CIFAR[name][1], data_dir / CIFAR[name][0])
        with tarfile.open(folder) as tar:           # nothing is unpacked to the disk
            files = {pathlib.Path(entry.name).name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}
    elif folder.is_dir():
        name = "cifar100" if (folder / "train.bin").exists() else "cifar10"
        *_, train, test, names = CIFAR[name]
        files = {file: (folder / file).read_bytes() for file in (*train, *test, names) if (folder / file).exists()}
    else:
        fail(f"--data {name}: no such folder; the data sets are shapes, {', '.join(CIFAR)}, imagenet32:FOLDER")
    _, _, n_classes, label_bytes, *parts, names = CIFAR[name]
    arrays, length = [], label_bytes + 3 * SIZE * SIZE
    for part in parts:
        for file in part:
            if not files.get(file):
                fail(f"--data {folder}: {file} is missing or empty. The folder must hold the .bin files of CIFAR-10 or "
                     f"of CIFAR-100 in the binary version, with images of {SIZE} x {SIZE} pixels")
        blob = b"".join(files[file] for file in part)
        if len(blob) % length or max(blob[label_bytes - 1::length]) >= n_classes:
            fail(f"--data {folder}: {', '.join(part)} must hold records of {length} bytes, each with a label below "
                 f"{n_classes} and {SIZE} x {SIZE} pixels. Is a file damaged, or are the images of another size?")
        records = np.frombuffer(blob, np.uint8).reshape(-1, length)
        labels = records[:, label_bytes - 1].astype(np.int64)
        arrays += [records[:, label_bytes:].reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1), labels]
    names = files.get(names, b"").decode(errors="replace").split()
    return arrays, names if len(names) == n_classes else [str(k) for k in range(n_classes)]


def load_imagenet32(folder, data_dir):
    """ImageNet in 32 x 32 pixels (Chrabaszcz et al. 2017) -> four arrays, the names of the classes. An archive holds
    data (N, 3072), planes as CIFAR's, and labels from 1. All are unpacked once, as bytes under data_dir (3.9 GB)."""
    names = {f"train_data_batch_{i}.npz": "train" for i in range(1, 11)} | {"val_data.npz": "val"}
    known = str([(name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns) for name in names])
    unpacked = data_dir / f"imagenet32-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    only_one = None if unpacked.exists() else lock(data_dir, "--data_dir", wait=True)       # another run may unpack now
    if not unpacked.exists():
        part = data_dir / "imagenet32.part"         # renamed when it is whole
        shutil.rmtree(part, ignore_errors=True)     # what a killed run left
        part.mkdir()
        for name, use in tqdm(names.items(), desc="unpacking", delay=2):
            try:
                with np.load(folder / name) as archive:
                    labels, data = archive["labels"].astype(np.int64) - 1, archive["data"].reshape(-1, 3, SIZE, SIZE)
                good = data.dtype == np.uint8 and len(data) == len(labels) and {*labels} <= {*range(1000)}
            except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
                good = False
            if not good:
                fail(f"--data imagenet32:{folder}: {name} must hold data, bytes of shape (N, 3072), and labels from 1 "
                     "to 1000. Is it damaged?")
            for kind, array in (("images", data.transpose(0, 2, 3, 1)), ("labels", labels)):
                with open(part / f"{use}.{kind}", "ab") as file:
                    file.write(array.tobytes())
        os.rename(part, unpacked)
    kinds = ("images", np.uint8, (SIZE, SIZE, 3)), ("labels", np.int64, ())
    return [np.memmap(unpacked / f"{use}.{kind}", dtype, "c").reshape(-1, *shape)
            for use in ("train", "val") for kind, dtype, shape in kinds], [str(k) for k in range(1000)]


def inside(shape, u, v):
    """How far inside the shape the points (u, v) lie, in units of its radius; negative outside. Arrays in and out."""
    def within_edges(n, distance):                  # n lines at the same distance from the centre
        return distance - np.max([u * np.cos(a) + v * np.sin(a) for a in 2 * np.pi * np.arange(n) / n], axis=0)
    r, x, y = np.hypot(u, v), np.abs(u), np.abs(v)
    return {
        "disc": lambda: 0.85 - r,
        "ring": lambda: 0.22 - np.abs(r - 0.75),
        "square": lambda: 0.75 - np.maximum(x, y),
        "triangle": lambda: within_edges(3, 0.55),
        "pentagon": lambda: within_edges(5, 0.75),
        "star": lambda: 0.68 + 0.3 * np.cos(5 * np.arctan2(v, u)) - r,
        "cross": lambda: np.maximum(np.minimum(0.9 - x, 0.28 - y), np.minimum(0.9 - y, 0.28 - x)),
        "crescent": lambda: np.minimum(0.95 - r, np.hypot(u - 0.5, v) - 0.75),
        "heart": lambda: 0.8 - np.hypot(u, v + 0.2 - 0.8 * np.sqrt(x)),
        "bars": lambda: np.minimum(0.2 - np.abs(x - 0.5), 0.85 - y),
    }[shape]()


def draw_shapes(count, rng):
    """`count` pictures of the ten SHAPES in turn -> images, labels. Place, size, angle, stretch, colours, texture,
    noise and clutter are random. No pixel and no colour tells the class, only the outline does."""
    def uniform(low, high, *shape):
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    def paint(image, cover, colour):                # cover: how much of each pixel is painted, (count, 32, 32)
        image += np.clip(cover, 0, 1)[..., None] * (colour - image)

    def waves():                                    # stripes of any width and direction, from 0 to 1
        kx, ky, phase = uniform(-9, 9, 1, 1), uniform(-9, 9, 1, 1), uniform(0, 6.3, 1, 1)
        return 0.5 + 0.5 * np.sin(kx * x + ky * y + phase)[..., None]

    def blot():                                     # a small disc of any colour, anywhere
        far = np.hypot(x - uniform(-1, 1, 1, 1), y - uniform(-1, 1, 1, 1))
        paint(image, (uniform(0.08, 0.25, 1, 1) - far) * SIZE / 2, uniform(0, 255, 1, 1, 3))

    labels = np.arange(count) % len(SHAPES)
    y, x = np.meshgrid(*[((np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1)] * 2, indexing="ij")
    ground, figure = uniform(30, 225, 1, 1, 3), uniform(0, 1, 1, 1, 3)
    figure = ground + np.where(ground < 128, 1, -1) * (80 + 80 * figure)            # stands out, in a colour of its own
    image = ground + waves() * uniform(-60, 60, 1, 1, 3)
    blot(), blot()

    # The shape's own coordinates (u, v) are the picture's (x, y), shifted, scaled, turned and stretched.
    radius, angle, stretch = uniform(0.6, 0.9, 1, 1), uniform(-0.6, 0.6, 1, 1), np.exp(uniform(-0.15, 0.15, 1, 1))
    dx, dy = (x - uniform(-0.2, 0.2, 1, 1)) / radius, (y - uniform(-0.2, 0.2, 1, 1)) / radius
    u = (np.cos(angle) * dx + np.sin(angle) * dy) * stretch
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / stretch
    depth = np.empty_like(u)
    for k, shape in enumerate(SHAPES):
        depth[labels == k] = inside(shape, u[labels == k], v[labels == k])
    paint(image, 0.5 + depth * radius * SIZE / 2, figure + waves() * uniform(-30, 30, 1, 1, 3))

    slope = uniform(0, np.pi, 1, 1)                 # a line right across
    line = np.abs(np.cos(slope) * x + np.sin(slope) * y - uniform(-0.8, 0.8, 1, 1))
    paint(image, (uniform(0.03, 0.08, 1, 1) - line) * SIZE / 2, uniform(0, 255, 1, 1, 3))
    image += uniform(2, 12, 1, 1, 1) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), labels


def load_shapes(data_dir, n_train=20_000, n_test=4_000):
    """The drawn data set -> four arrays, the names of the classes. Drawing takes seconds, so the pictures are kept in a
    file. Its name holds a hash of the code that draws, so changed code draws anew."""
    recipe = f"{n_train} {n_test} {SHAPES} {inspect.getsource(inside)} {inspect.getsource(draw_shapes)}"
    path = data_dir / f"shapes-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.npz"
    only_one = None if path.exists() else lock(data_dir, "--data_dir", wait=True)       # another run may draw them now
    if not path.exists():
        rng, chunk = np.random.default_rng(0), 1000
        parts = [draw_shapes(chunk, rng) for _ in tqdm(range((n_train + n_test) // chunk), desc="drawing", delay=2)]
        images, labels = (np.concatenate(part) for part in zip(*parts))
        buffer = io.BytesIO()
        np.savez(buffer, images[:n_train], labels[:n_train], images[n_train:], labels[n_train:])
        write(path, buffer.getbuffer())
    with np.load(path) as file:
        return [file[f"arr_{i}"] for i in range(4)], list(SHAPES)


def show(images, path):
    """Write a sheet of training images, a class a row. A pixel of an image is 2 x 2 of the sheet's."""
    side, rows = SIZE + 2, len(images.names)        # side: of an image with its margin
    sheet = torch.full((rows * side, 16 * side, 3), 255, dtype=torch.uint8)
    for row in range(rows):
        for column, image in enumerate(images.train[images.train_labels == row][:16]):
            sheet[row * side:, column * side:][:SIZE, :SIZE] = image
    try:
        import matplotlib.image
        matplotlib.image.imsave(path, sheet.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy())
    except (ImportError, OSError, ValueError, KeyError) as error:       # no such folder; an ending that is no picture's
        fail(f"--show {path}: {error}. It needs matplotlib, and the name of a .png in a folder that exists")
    print(f"{path}: a class a row, {', '.join(images.names)}")


def split(images, share, seed):
    """-> train, train_labels, held out, its labels. With share < 1 a part of the training images is held out."""
    if share == 1:
        return images[:4]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images.train)))
    ours, rest = order[:int(share * len(order))], order[int(share * len(order)):]       # the rest is never empty
    return images.train[ours], images.train_labels[ours], images.train[rest], images.train_labels[rest]


class Batches:
    """Training batches, made on the device from bytes, with no worker processes. A batch depends on (seed, step) alone,
    so that a resumed run needs no random state. The padded images lie in one long list of pixels. A crop is a table of
    places in that list, which runs backwards where the image is mirrored."""

    def __init__(self, images, labels, s):
        self.s, self.count, self.an_epoch = s, len(labels), len(labels) // s.batch_size
        self.side, self.across = SIZE + 2 * s.crop, torch.arange(SIZE, device=s.device)
        padded = F.pad(images, (0, 0, s.crop, s.crop, s.crop, s.crop))              # black, as usual
        self.pixels, self.labels = padded.view(-1, 3).to(s.device), labels.to(s.device)       # (N * side * side, 3)
        moments = [torch.std_mean(images[..., colour].float(), correction=0) for colour in range(3)]
        std, mean = (torch.stack(values).to(s.device) for values in zip(*moments))  # (3,) each
        self.mean, self.std = mean, std.clamp(min=1)        # a colour that hardly changes would become all noise
        self.epoch, self.order = None, None

    def draw(self, step):
        """The random numbers of a step, (4, B) int64: image, top, left, mirrored."""
        epoch, place = divmod(step, self.an_epoch)
        B, seed, shifts = self.s.batch_size, self.s.seed, 2 * self.s.crop + 1
        if epoch != self.epoch:                     # every epoch shuffles anew and leaves out the odd images at its end
            self.epoch, self.order = epoch, np.random.default_rng([seed, 1, epoch]).permutation(self.count)
        rng = np.random.default_rng([seed, 2, step])
        return torch.from_numpy(np.stack([
            self.order[place * B:(place + 1) * B], rng.integers(shifts, size=B), rng.integers(shifts, size=B),
            rng.integers(2, size=B) * self.s.flip]))

    def __call__(self, step):
        """-> x (B, 3, 32, 32) float32, normalised, channels last in memory; y (B,) int64."""
        numbers = self.draw(step)
        if self.s.device == "cuda":                 # pinned and asynchronous: copied while the GPU is still computing
            numbers = numbers.pin_memory().to("cuda", non_blocking=True)
        index, top, left, mirrored = numbers.to(self.s.device)[:, :, None]                          # each (B, 1)
        rows = top + self.across                                                                    # (B, 32)
        columns = left + torch.where(mirrored == 1, SIZE - 1 - self.across, self.across)
        where = (index * self.side + rows)[:, :, None] * self.side + columns[:, None, :]            # (B, 32, 32)
        x = self.normalise(self.pixels.index_select(0, where.flatten()).view(*where.shape, 3))
        return x, self.labels[index[:, 0]]

    def normalise(self, pixels):
        """Bytes (B, 32, 32, 3) -> float32 (B, 3, 32, 32) of mean 0 and standard deviation 1 per colour."""
        return ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)


# ---- Models: images (B, 3, 32, 32) -> logits (B, classes). B images, C channels, H x W pixels, T tokens --------------
# modular_tree() is the model as an expression of its weights, for modular optimizers: "The modular tree" in optim.py.


class Linear(nn.Linear):
    """nn.Linear, with a learnable gain per output neuron if asked for:  y = (gain * W) x + b.  A rotational optimizer
    keeps the norm of every row of W. The gain can still make the neuron louder."""

    def __init__(self, n_in, n_out, bias, gain):
        super().__init__(n_in, n_out, bias=bias)
        self.gain = nn.Parameter(torch.ones(n_out)) if gain else None

    def forward(self, x):
        weight = self.weight if self.gain is None else self.gain[:, None] * self.weight
        return F.linear(x, weight, self.bias)


class Conv(nn.Conv2d):
    """A k x k convolution that keeps H and W, but for the stride. No bias: the normalisation after it has one."""

    def __init__(self, n_in, n_out, k, stride=1):
        super().__init__(n_in, n_out, k, stride, padding=k // 2, bias=False)


def he_initialise(model):
    """He et al. 2015, by fan-out, for convolutions: gradients keep their size on the way back."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def chain(*trees):
    """Modules of a modular tree, the first one first."""
    return functools.reduce(lambda inner, outer: outer @ inner, trees)


def residuals(steps):
    """The tree of x + f1 + f2 + ..., where all that read it normalise it first, so that it may be taken for its mean.
    The k-th step is then  k/(k+1) x + 1/(k+1) f."""
    return chain(*(k / (k + 1) * optim.bond("identity") + 1 / (k + 1) * f for k, f in enumerate(steps, start=1)))


def attention_and_mlp(block):
    """The trees of the two steps of a transformer's block. Attention passes on changes of q, of k and of v, so its
    sensitivity is 3."""
    norm, gelu, attention = optim.bond("layernorm"), optim.bond("gelu", 0.5**0.5), optim.bond("attention", 3.0)
    return (optim.weight(block.mixer.out) @ attention @ optim.weight(block.mixer.qkv) @ norm,
            optim.weight(block.down) @ gelu @ optim.weight(block.up) @ norm)


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + f(x)).  f is two 3x3 convolutions or, as a bottleneck, 1x1, 3x3, and 1x1 to 4 times the
    channels. A normalisation follows each of them, and relu lies in between."""

    def __init__(self, n_in, channels, stride, bottleneck):
        super().__init__()
        plan = [(3, channels, stride), (3, channels, 1)]                            # kernel, channels out, stride
        if bottleneck:
            plan = [(1, channels, 1), (3, channels, stride), (1, 4 * channels, 1)]
        self.convs, self.norms, self.n_out = nn.ModuleList(), nn.ModuleList(), n_in
        for k, n, step in plan:
            self.convs.append(Conv(self.n_out, n, k, step))
            self.norms.append(nn.BatchNorm2d(n))
            self.n_out = n
        self.stride, self.projection = stride, None
        if stride > 1 or n_in != self.n_out:        # the shape changes
            self.projection = nn.Sequential(Conv(n_in, self.n_out, 1), nn.BatchNorm2d(self.n_out))

    def forward(self, x):                                                           # (B, C, H, W)
        h = self.norms[0](self.convs[0](x))
        for conv, norm in zip(self.convs[1:], self.norms[1:]):
            h = norm(conv(F.relu(h)))
        if self.projection is not None:
            # The pooling takes every stride-th pixel. A 1x1 convolution with that stride would be the same, but on CPUs
            # without AVX-512 torch 2.13 crashes in the backward pass of one with fewer than 8 channels.
            x = self.projection(F.avg_pool2d(x, 1, self.stride))
        return F.relu(h + x)

    def modular_tree(self):
        # relu counts as 1/sqrt(2), though the next norm makes up for it. That is a convention, no bound.
        norm, relu = optim.bond("norm"), optim.bond("relu", 0.5**0.5)
        f = chain(norm @ optim.weight(self.convs[0]), *(norm @ optim.weight(conv) @ relu for conv in self.convs[1:]))
        shortcut = optim.bond("identity") if self.projection is None else norm @ optim.weight(self.projection[0])
        return relu @ (shortcut + f)


class ResNet(nn.Module):
    """He et al. 2016 for 32x32 images: a 3x3 stem, stages of blocks, global average pooling. Each stage but the first
    halves H and W and doubles C. `blocks`: how many a stage has."""

    def __init__(self, s, n_classes, blocks, bottleneck=False):
        super().__init__()
        self.conv, self.norm = Conv(3, s.width, 3), nn.BatchNorm2d(s.width)
        self.blocks, n_in = nn.ModuleList(), s.width
        for stage, count in enumerate(blocks):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                self.blocks.append(ResidualBlock(n_in, s.width * 2**stage, stride, bottleneck))
                n_in = self.blocks[-1].n_out
        self.head = Linear(n_in, n_classes, True, s.gains)
        he_initialise(self)

    def forward(self, x):
        h = F.relu(self.norm(self.conv(x)))                                         # (B, width, 32, 32)
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean((2, 3)))

    def modular_tree(self):
        stem = chain(optim.weight(self.conv), optim.bond("norm"), optim.bond("relu", 0.5**0.5))
        blocks = chain(*(block.modular_tree() for block in self.blocks))
        return chain(stem, blocks.tare(20), optim.bond("average pool"), optim.weight(self.head))


class VGG(nn.Module):
    """VGG-16 (Simonyan, Zisserman 2015) with normalisation and a single Linear, for 32x32 images."""

    def __init__(self, s, n_classes):
        super().__init__()
        layers, n_in = [], 3
        for multiple, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(count):
                n = s.width * multiple
                layers += [Conv(n_in, n, 3), nn.BatchNorm2d(n), nn.ReLU()]
                n_in = n
            layers.append(nn.MaxPool2d(2))
        self.features, self.head = nn.Sequential(*layers), Linear(n_in, n_classes, True, s.gains)
        he_initialise(self)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))                               # five poolings: 1 pixel is left

    def modular_tree(self):
        convs = [module for module in self.features if isinstance(module, Conv)]
        # relu makes its input smaller by sqrt(2), and the next normalisation makes up for it. Both together count as 1.
        stem, *others = (optim.bond("norm, relu") @ optim.weight(conv) for conv in convs)
        return chain(stem, chain(*others).tare(20), optim.weight(self.head))


class Block(nn.Module):
    """x <- x + mixer(norm(x)), then x <- x + MLP(norm(x))."""

    def __init__(self, s, C, mixer):
        super().__init__()
        self.norm1, self.mixer, self.norm2 = nn.LayerNorm(C), mixer, nn.LayerNorm(C)
        self.up, self.down = Linear(C, 4 * C, True, s.gains), Linear(4 * C, C, True, s.gains)

    def forward(self, x, query=None):                                               # (B, ..., C)
        x = x + self.mixer(self.norm1(x), query)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Attention(nn.Module):
    """Attention among all tokens, with a head for every 64 channels."""

    def __init__(self, s):
        super().__init__()
        self.heads = max(1, s.width // 64)
        self.qkv, self.out = Linear(s.width, 3 * s.width, True, s.gains), Linear(s.width, s.width, True, s.gains)

    def forward(self, x, query):                                                    # (B, T, C); query is of GCViT
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))     # (B, T, C)


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021), by default of the size of DeiT-tiny (Touvron et al. 2021). Tokens
    are 64 patches of 4x4 pixels and a class token, which is its row of the position embedding and nothing else."""

    def __init__(self, s, n_classes):
        super().__init__()
        if s.width >= 64 and s.width % (s.width // 64):
            fail(f"--width {s.width}: vit has a head for every 64 channels, and {s.width} cannot be shared by "
                 f"{s.width // 64}: use a multiple of 64")
        self.patches, self.positions = nn.Conv2d(3, s.width, 4, 4), nn.Embedding(1 + (SIZE // 4) ** 2, s.width)
        self.blocks = nn.ModuleList(Block(s, s.width, Attention(s)) for _ in range(s.depth))
        self.norm, self.head = nn.LayerNorm(s.width), Linear(s.width, n_classes, True, s.gains)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)                        # (B, 64, C)
        h = F.pad(patches, (0, 0, 1, 0)) + self.positions.weight                    # (B, 65, C)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, 0]))

    def modular_tree(self):
        first = (optim.weight(self.patches) + optim.weight(self.positions)).tare(1)
        blocks = residuals([step for block in self.blocks for step in attention_and_mlp(block)])
        return chain(first, blocks.tare(5), optim.bond("layernorm"), optim.weight(self.head))


class WellNormed(nn.Module):
    """ResMLP and ResCNN (`convolutional`) of Large et al. 2024 (Modular Norm): L blocks  x <- (1 - 1/L) x + (1/L) f(x).
    f is, twice over: divide by the RMS, a weight layer, absolute value, subtract the mean. No biases. With the modular
    optimizers one learning rate serves all widths and depths. `mass`: of all blocks together."""

    def __init__(self, s, n_classes, convolutional):
        super().__init__()
        self.convolutional, self.mass = convolutional, 20.0 if convolutional else 1.0
        layer = functools.partial(Conv, k=3) if convolutional else functools.partial(Linear, bias=False, gain=s.gains)
        self.first = layer(3 if convolutional else 3 * SIZE * SIZE, s.width)
        self.blocks = nn.ModuleList(nn.ModuleList(layer(s.width, s.width) for _ in range(2)) for _ in range(s.depth))
        self.head = Linear(s.width, n_classes, False, s.gains)
        optim.initialise(self.modular_tree())

    def forward(self, x):
        h = self.first(x if self.convolutional else x.flatten(1))                   # (B, width, ...)
        for pair in self.blocks:
            f = h
            for layer in pair:
                f = layer(F.rms_norm(f, f.shape[1:])).abs()
                f = f - f.mean(tuple(range(1, f.dim())), keepdim=True)
            h = h + (f - h) / len(self.blocks)
        return self.head(h.mean((2, 3)) if self.convolutional else h)

    def modular_tree(self):
        L = len(self.blocks)
        before, after = optim.bond("rms divide"), optim.bond("mean subtract") @ optim.bond("abs")
        f = chain(*(after @ optim.weight(*copies) @ before for copies in zip(*self.blocks)))        # a copy per block
        block = (1 - 1 / L) * optim.bond("identity") + 1 / L * f if L > 1 else f
        return chain(optim.weight(self.first), (block**L).tare(self.mass), optim.weight(self.head))


class DenseNet(nn.Module):
    """DenseNet (Huang et al. 2017) for 32x32 images. A layer reads all that its stage has so far, and adds `width`
    channels:  x <- cat(x, conv3(relu(norm(conv1(relu(norm(x)))))).  Between stages conv1(relu(norm(x))) halves the
    channels, and a pooling H and W. The first stage has `depth` layers: 6 in DenseNet-121."""

    def __init__(self, s, n_classes):
        super().__init__()
        def conv(n_in, n_out, k):
            return [nn.BatchNorm2d(n_in), nn.ReLU(), Conv(n_in, n_out, k)]
        n, self.layers = 2 * s.width, nn.ModuleList()
        self.conv = Conv(3, n, 3)
        for count in (s.depth, 2 * s.depth, 4 * s.depth, 8 * s.depth // 3):         # 6, 12, 24, 16
            if self.layers:
                self.layers.append(nn.Sequential(*conv(n, n // 2, 1), nn.AvgPool2d(2)))
                n //= 2
            for _ in range(count):
                self.layers.append(nn.Sequential(*conv(n, 4 * s.width, 1), *conv(4 * s.width, s.width, 3)))
                n += s.width
        self.norm, self.head = nn.BatchNorm2d(n), Linear(n, n_classes, True, s.gains)
        he_initialise(self)

    def forward(self, x):
        h = self.conv(x)                                                            # (B, 2 width, 32, 32)
        for layer in self.layers:                   # a transition, or (B, C, H, W) -> (B, C + width, H, W)
            h = layer(h) if isinstance(layer[-1], nn.AvgPool2d) else torch.cat([h, layer(h)], 1)
        return self.head(F.relu(self.norm(h)).mean((2, 3)))

    def modular_tree(self):
        """cat(x, f) of n and g channels counts as their mean,  n/(n+g) x + g/(n+g) f.  As in VGG the next norm makes up
        for relu, and both together count as 1."""
        parts = []
        for layer in self.layers:
            convs = [module for module in layer if isinstance(module, Conv)]
            n, g = convs[0].in_channels, convs[-1].out_channels
            f = chain(*(optim.weight(conv) @ optim.bond("norm, relu") for conv in convs))
            parts.append(f if len(convs) == 1 else n / (n + g) * optim.bond("identity") + g / (n + g) * f)
        return chain(optim.weight(self.conv), chain(*parts).tare(20), optim.bond("norm, relu, average pool"),
                     optim.weight(self.head))


class GNN(nn.Module):
    """A graph network, in the manner of Kipf, Welling 2017. Lin et al. name one, but do not publish theirs. Nodes are
    64 patches of 4x4 pixels, each tied to its 8 nearest in (mean colour, place), and they to it.

        h = relu(W x);      h <- h + relu(W A^ norm(h)),      A^ = D^-1/2 (A + I) D^-1/2,      D: the row sums of A + I

    The largest eigenvalue of A^ is exactly 1, as  A^ (D^1/2 1) = D^1/2 1.  To the modular tree it is a bond of 1."""

    def __init__(self, s, n_classes):
        super().__init__()
        self.first, self.head = Linear(3 * 16 + 2, s.width, True, s.gains), Linear(s.width, n_classes, True, s.gains)
        self.norms = nn.ModuleList(nn.LayerNorm(s.width) for _ in range(s.depth + 1))
        self.layers = nn.ModuleList(Linear(s.width, s.width, True, s.gains) for _ in range(s.depth))

    @staticmethod
    @torch.no_grad()
    def graph(x):
        """Images -> what a node knows, its pixels, row and column (B, 64, 50); and A^ (B, 64, 64)."""
        pixels = F.unfold(x, 4, stride=4).mT                                        # (B, 64, 3 * 16)
        places = torch.cartesian_prod(*[torch.linspace(-1, 1, SIZE // 4).to(x)] * 2).expand(len(x), -1, -1)
        points = torch.cat([pixels.unflatten(2, (3, 16)).mean(3), 4 * places], 2)                     # (B, 64, 5)
        far = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")                # 0 from itself
        ties = far <= far.topk(9, largest=False).values[..., -1:]                   # A + I, but one-sided
        ties = (ties | ties.mT).to(x.dtype)
        root = ties.sum(2).rsqrt()                                                  # D^-1/2, (B, 64)
        return torch.cat([pixels, places], 2), root[:, :, None] * ties * root[:, None, :]

    def forward(self, x):
        nodes, average = self.graph(x)
        h = F.relu(self.first(nodes))                                               # (B, 64, C)
        for norm, layer in zip(self.norms, self.layers):
            h = h + F.relu(layer(average @ norm(h)))
        return self.head(self.norms[-1](h).mean(1))

    def modular_tree(self):
        norm, relu = optim.bond("layernorm"), optim.bond("relu", 0.5**0.5)
        steps = [chain(norm, optim.bond("A^"), optim.weight(layer), relu) for layer in self.layers]
        return chain(optim.weight(self.first).tare(1), relu, residuals(steps).tare(5), norm, optim.weight(self.head))


WINDOW = 4                                          # height and width of a window of attention


def windows(x):
    """(B, H, W, C) -> (B, windows, 16, C)."""
    x = x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW))                     # (B, H/4, 4, W/4, 4, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    """Attention among the 16 pixels of a window, with a learned bias for each head and offset of two pixels.

    shifted (Swin)     The windows lie half a window further. What moves out of the image comes in at the other side,
                       where pixels that are no neighbours in the image do not see each other.
    queried (GCViT)    q is given: one for each pixel of a window, the same for all windows."""

    def __init__(self, s, C, side, shifted=False, queried=False):
        super().__init__()
        self.heads, self.shift = max(1, s.width // 32) * C // s.width, WINDOW // 2 * (shifted and side > WINDOW)
        self.qkv, self.out = Linear(C, (2 if queried else 3) * C, True, s.gains), Linear(C, C, True, s.gains)
        self.bias = nn.Parameter(torch.zeros(self.heads * (2 * WINDOW - 1) ** 2))   # 1-D: no neurons, no decay
        rows = torch.arange(side).roll(-self.shift)
        places = windows(torch.cartesian_prod(rows, rows).view(1, side, side, 2))[0]        # (windows, 16, 2)
        apart = places[:, :, None] - places[:, None]                                # (windows, 16, 16, 2)
        self.register_buffer("near", (apart.abs() < WINDOW).all(-1)[:, None], persistent=False)
        y, x = (apart[0] + WINDOW - 1).unbind(-1)                                   # no border cuts the first window
        self.register_buffer("offset", (2 * WINDOW - 1) * y + x, persistent=False)

    def forward(self, x, query):                                                    # (B, H, W, C), (B, 4, 4, C)
        B, H, W, C = x.shape
        def by_head(h):                             # (B, windows, 16, n C) -> (n, B, windows, heads, 16, C / heads)
            return h.unflatten(3, (-1, self.heads, C // self.heads)).permute(3, 0, 1, 4, 2, 5)
        *q, k, v = by_head(self.qkv(windows(x.roll((-self.shift, -self.shift), (1, 2)))))
        q = q[0] if q else by_head(windows(query))[0].expand_as(k)
        bias = self.bias.view(self.heads, -1)[:, self.offset].masked_fill(~self.near, -math.inf)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)     # bias: (windows, heads, 16, 16)
        y = self.out(y.transpose(2, 3).flatten(3)).view(B, H // WINDOW, W // WINDOW, WINDOW, WINDOW, C)
        return y.transpose(2, 3).reshape(B, H, W, C).roll((self.shift, self.shift), (1, 2))


class FocalModulation(nn.Module):
    """y = out(q * mix(sum of gate_l * context_l)).  context_l = gelu(depthwise convolution of context_(l-1)) sees more
    with every level. The last one is the mean over the image. Source: Yang et al. 2022 (FocalNet)."""

    def __init__(self, s, C, kernels=(3, 5)):
        super().__init__()
        self.sizes = C, C, len(kernels) + 1
        self.split = Linear(C, sum(self.sizes), True, s.gains)
        self.mix, self.out = Linear(C, C, True, s.gains), Linear(C, C, True, s.gains)
        self.convs = nn.ModuleList(nn.Conv2d(C, C, k, padding=k // 2, groups=C, bias=False) for k in kernels)

    def forward(self, x, query):                                                    # (B, H, W, C)
        q, context, gates = self.split(x).permute(0, 3, 1, 2).split(self.sizes, 1)  # (B, C or levels, H, W)
        *gates, last = gates.split(1, 1)                                            # (B, 1, H, W) each
        total = 0
        for conv, gate in zip(self.convs, gates):
            context = F.gelu(conv(context))
            total = total + gate * context
        total = total + last * F.gelu(context.mean((2, 3), keepdim=True))
        return self.out(q.permute(0, 2, 3, 1) * self.mix(total.permute(0, 2, 3, 1)))


def scan(a, b):
    """h_t = a_t h_(t-1) + b_t  from 0, for all t. a, b, h: (B, T, C), T a power of 2. Two steps are one of the same
    form,  h_(t+1) = a_(t+1) a_t h_(t-1) + (a_(t+1) b_t + b_(t+1)),  so a scan of half the length gives every second h.
    In all, it computes twice what a loop over t does, in log2(T) operations."""
    if b.shape[1] == 1:
        return b
    (a0, a1), (b0, b1) = (x.unflatten(1, (-1, 2)).unbind(2) for x in (a, b))        # at even and at odd t
    odd = scan(a1 * a0, a1 * b0 + b1)                                               # h_1, h_3, ...
    even = b0 + a0 * F.pad(odd, (0, 0, 1, -1))                                      # h_0, h_2, ... from 0, h_1, ...
    return torch.stack([even, odd], 2).flatten(1, 2)


class SelectiveScan(nn.Module):
    """A state-space model that reads the pixels in four orders: by rows, by columns, and both backwards. In each, with
    a W, A and D of its own, and one number of state per channel:

        delta_t, B_t, C_t = W u_t,      h_t = exp(-delta_t A) h_(t-1) + delta_t B_t u_t,      y_t = C_t h_t + D u_t

    Source: VMamba (Liu et al. 2024), with the one number that its authors chose later, and no gate. Lin et al. name
    one, but do not publish theirs."""

    def __init__(self, s, C):
        super().__init__()
        self.rank = max(1, C // 16)                 # of W's part for delta, which is a product of two matrices
        self.enter, self.out, self.norm = Linear(C, C, True, s.gains), Linear(C, C, True, s.gains), nn.LayerNorm(C)
        self.conv = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.select = nn.Conv1d(4 * C, 4 * (self.rank + 2), 1, groups=4, bias=False)           # a group is an order
        self.delta = nn.Conv1d(4 * self.rank, 4 * C, 1, groups=4)
        self.A_log, self.D = nn.Parameter(torch.zeros(4 * C)), nn.Parameter(torch.ones(4 * C))
        step = torch.empty(4 * C).uniform_(math.log(1e-3), math.log(0.1)).exp()     # delta, as it begins
        self.delta.bias.data = torch.log(torch.expm1(step))                         # softplus gives it back

    def forward(self, x, query):                                                    # (B, H, W, C)
        B, H, W, C = x.shape
        u = F.silu(self.conv(self.enter(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        rows, columns = u.flatten(1, 2), u.transpose(1, 2).flatten(1, 2)            # (B, T, C), T = H W
        u = torch.cat([rows, columns, rows.flip(1), columns.flip(1)], 2)            # (B, T, 4 C)
        low, b, c = self.select(u.mT).mT.unflatten(2, (4, -1)).split([self.rank, 1, 1], 3)     # b, c: (B, T, 4, 1)
        b, c = (z.squeeze(3).repeat_interleave(C, 2) for z in (b, c))               # (B, T, 4 C)
        delta = F.softplus(self.delta(low.flatten(2).mT).mT.to(self.A_log.dtype))   # float32, under autocast, too
        y = c * scan(torch.exp(-delta * self.A_log.exp()), delta * b * u) + self.D * u
        rows, columns = (y[..., :2 * C] + y[..., 2 * C:].flip(1)).split(C, 2)       # (B, T, C)
        y = rows.unflatten(1, (H, W)) + columns.unflatten(1, (W, H)).transpose(1, 2)           # (B, H, W, C)
        return self.out(self.norm(y))


# What mixes the pixels in the i-th block of a stage, of `side` x `side` pixels and C channels.
MIXERS = {
    "swin": lambda s, C, side, i: WindowAttention(s, C, side, shifted=i % 2 == 1),
    "gcvit": lambda s, C, side, i: WindowAttention(s, C, side, queried=i % 2 == 1),
    "focalnet": lambda s, C, side, i: FocalModulation(s, C),
    "vmamba": lambda s, C, side, i: SelectiveScan(s, C),
}


class Pyramid(nn.Module):
    """Three stages of `depth` blocks, on 16x16, 8x8 and 4x4 pixels of 1, 2 and 4 times `width` channels. MIXERS make it
    Swin (Liu et al. 2021), GCViT (Hatamizadeh et al. 2023), FocalNet or VMamba."""

    def __init__(self, s, n_classes):
        super().__init__()
        if s.model in ("swin", "gcvit") and s.width % max(1, s.width // 32):
            fail(f"--width {s.width}: {s.model} has a head for every 32 channels, use a multiple of 32")
        n_in, self.norms, self.merges, self.queries, self.stages = 3, *(nn.ModuleList() for _ in range(4))
        for stage in range(3):
            C, side = s.width * 2**stage, SIZE // 2 >> stage
            self.norms.append(nn.LayerNorm(n_in) if stage else nn.Identity())
            self.merges.append(nn.Conv2d(n_in, C, 2, 2))
            self.queries.append(Linear(C, C, True, s.gains) if s.model == "gcvit" and s.depth > 1 else nn.Identity())
            self.stages.append(nn.ModuleList(Block(s, C, MIXERS[s.model](s, C, side, i)) for i in range(s.depth)))
            n_in = C
        self.norm, self.head = nn.LayerNorm(C), Linear(C, n_classes, True, s.gains)

    def forward(self, x):
        h = x.permute(0, 2, 3, 1)                                                   # (B, H, W, C)
        for norm, merge, query, blocks in zip(self.norms, self.merges, self.queries, self.stages):
            h = merge(norm(h).permute(0, 3, 1, 2))                                  # (B, C or 2 C, H/2, W/2)
            # GCViT's query of a stage comes from its image, averaged down to one window
            q = query(F.adaptive_avg_pool2d(h, WINDOW).permute(0, 2, 3, 1))         # (B, 4, 4, C)
            h = h.permute(0, 2, 3, 1)
            for block in blocks:
                h = block(h, q)
        return self.head(self.norm(h).mean((1, 2)))


class Swin(Pyramid):
    def modular_tree(self):
        """As of ViT. The biases of attention are 1-D and stand outside."""
        norm, parts = optim.bond("layernorm"), []
        for merge, blocks in zip(self.merges, self.stages):
            parts += [norm, optim.weight(merge)] if parts else []
            parts.append(residuals([step for block in blocks for step in attention_and_mlp(block)]))
        return chain(optim.weight(self.merges[0]), chain(*parts).tare(5), norm, optim.weight(self.head))


# A line for each name of --model: build(s, n_classes) -> a module; its usual width; its usual number of blocks, where
# --depth can change it.
MODELS = {
    "resnet20": (lambda s, n_classes: ResNet(s, n_classes, (3, 3, 3)), 16, None),
    "resnet18": (lambda s, n_classes: ResNet(s, n_classes, (2, 2, 2, 2)), 64, None),
    "resnet34": (lambda s, n_classes: ResNet(s, n_classes, (3, 4, 6, 3)), 64, None),
    "resnet50": (lambda s, n_classes: ResNet(s, n_classes, (3, 4, 6, 3), bottleneck=True), 64, None),
    "vgg16": (VGG, 64, None),
    "resmlp": (lambda s, n_classes: WellNormed(s, n_classes, convolutional=False), 128, 3),
    "rescnn": (lambda s, n_classes: WellNormed(s, n_classes, convolutional=True), 128, 3),
    "vit": (ViT, 192, 12),
    "densenet121": (DenseNet, 4, 2),
    "gnn": (GNN, 64, 4),
    "swin": (Swin, 16, 2),
    "gcvit": (Pyramid, 16, 2),
    "focalnet": (Pyramid, 16, 2),
    "vmamba": (Pyramid, 16, 1),
}

# What the modular norm has no rule for, in the models without a modular_tree().
NO_TREE = {
    "gcvit": "its query goes into several blocks, so that it has no share of its own",
    "focalnet": "a product of activations has no bounded sensitivity, and depthwise filters no known norm",
    "vmamba": "products of activations have no bounded sensitivity, and depthwise filters no known norm",
}


# ---- Files that survive a kill at any moment -------------------------------------------------------------------------


def write(path, data):
    """All of a file or nothing: written beside, flushed to the disk, then renamed over the old one."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:                                        # a full disk, say
        part.unlink(missing_ok=True)


def append(path, record):
    """One line of JSON more."""
    with open(path, "a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def lock(folder, flag, wait=False):
    """Make the folder, and keep a second run out of it or let it wait. -> the lock, which ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return file
    except BlockingIOError:
        fail(f"another run is writing to {folder}: choose another {flag}")
    except OSError as error:
        fail(f"cannot write {folder}: {error.strerror}. Choose another place with {flag}")


def start_files(out_dir, s, ckpt):
    """Write config.json and log.jsonl. A resumed run keeps the log up to its checkpoint, whose evaluation is repeated.
    A new run replaces an old one, unless that is finished and has other settings."""
    config, log = out_dir / "config.json", out_dir / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    if not ckpt and lines and '"final"' in lines[-1]:
        old = json.loads(config.read_text())
        old, new = old | old["hyper"], vars(s) | s.hyper
        other = [key for key in new.keys() - ASIDE - {"hyper", "lr_from"} if old.get(key) != new[key]]
        if other:
            fail(f"{out_dir} holds a finished run with another {', '.join(other)}: choose another --out_dir, or "
                 "delete that folder")
    if not ckpt:                                    # an older run's must not be taken for this one's
        (out_dir / "ckpt.pt").unlink(missing_ok=True)
    # A kill can cut the last line short. It then lacks its end.
    kept = [line for line in lines if ckpt and line.endswith("\n") and json.loads(line)["step"] < ckpt["step"]]
    write(config, json.dumps(vars(s) | {"torch": torch.__version__}, indent=1).encode())
    write(log, "".join(kept).encode())


def save(path, s, model, optimizer, bar, **progress):
    """Write a checkpoint, unless a number in it is not finite. It holds settings, weights, the optimizer's state and
    `progress`: step, seconds, losses since the last evaluation, a hash of the data. Batches depend on (seed, step)
    alone, so a resumed run needs no random state."""
    held = [*model.state_dict().values(), *(x for state in optimizer.state.values() for x in state.values())]
    if not all(x.isfinite().all() for x in held if torch.is_tensor(x)):
        diverged("a weight, or what the optimizer remembers, is not finite", progress["step"], bar, s)
    buffer = io.BytesIO()
    torch.save({"script": SCRIPT, "config": vars(s), "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), **progress}, buffer)
    write(path, buffer.getbuffer())


def load_checkpoint(path):
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        damaged = zipfile.ZipFile(path).testzip()   # torch.load compares no checksums
        if damaged or ckpt["script"] != SCRIPT or not LIMITS.keys() - HYPER <= ckpt["config"].keys():
            raise ValueError
        return ckpt
    except FileNotFoundError:
        fail(f"there is no {path}: name the folder of a run with --out_dir, or train one first")
    except Exception:                               # torch.load raises half a dozen kinds, by what is broken
        fail(f"{path} is not a whole checkpoint of this script as it is now: name another --out_dir, or delete it")


def diverged(what, step, bar, s):
    bar.close()
    fail(f"{what} at step {step}: training diverged. Try a smaller --lr; the last good checkpoint, if any, is "
         f"{s.out_dir}/ckpt.pt", status=3)


# ---- Training --------------------------------------------------------------------------------------------------------


def lr_at(step, peak, s):
    """Learning rate of step 0, 1, ...: a linear warmup that never starts at 0, then the schedule. A schedule of your
    own goes into the dict below, and its name into the comment of Settings.schedule. All entries are computed at every
    step, so yours must be a number at done = 0, too: "rsqrt": (1 + step - s.warmup) ** -0.5, say."""
    if step < s.warmup:
        return peak * (step + 1) / (s.warmup + 1)
    done = (step - s.warmup) / max(s.steps - s.warmup, 1)
    return peak * {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2,
                   "step": 0.1 ** math.floor(3 * done)}[s.schedule]


def loss_of(logits, y, kind, smoothing=0.0):
    """Mean loss over the batch. logits (B, classes), y (B,). ce: cross-entropy in nats. mse30: square error, where the
    targets are one-hot times 30, and the right class counts 15 times (Hui, Belkin 2021, as in Lin et al.)."""
    logits = logits.float()
    if kind == "ce":
        return F.cross_entropy(logits, y, label_smoothing=smoothing)
    right = F.one_hot(y, logits.shape[1])
    return ((1 + 14 * right) * (logits - 30 * right).square()).mean()


def make_model(s, n_classes):
    """The model of the settings s, on the CPU, its weights drawn from torch's random numbers."""
    model = MODELS[s.model][0](s, n_classes)
    if optim.find_optimizer(s.opt).geometry is optim.MODULAR:
        optim.initialise(model.modular_tree())      # a modular lr is relative to the norms that weights get here
    return model


def make_optimizer(s, model):
    hyper, takes = dict(s.hyper), optim.OPTIMIZERS[s.opt].takes()
    if "betas" in takes:
        hyper["betas"] = tuple(hyper.pop(f"beta{i}", default) for i, default in enumerate(takes["betas"], start=1))
    if "dtype" in hyper:                            # a word, as in --opt_kwargs dtype=bfloat16
        hyper["dtype"] = getattr(torch, str(hyper["dtype"]), hyper["dtype"])
    try:
        return optim.build(s.opt, model, compile=bool(s.compile), **hyper)
    except (ValueError, TypeError) as error:        # a value out of its range
        fail(error)


@torch.no_grad()
def evaluate(model, images, labels, batches, s, autocast, stopped_by=()):
    """Mean loss (without smoothing) and share of right answers over the held-out images. None, None: a signal came."""
    model.eval()
    loss = right = 0.0
    for begin in range(0, len(images), 1000):
        if stopped_by:
            return None, None
        x, y = batches.normalise(images[begin:begin + 1000]), labels[begin:begin + 1000]
        with autocast:
            logits = model(x)
        loss = loss + loss_of(logits, y, s.loss) * len(y)
        right = right + (logits.argmax(1) == y).sum()
    model.train()
    return loss.item() / len(images), right.item() / len(images)


def gradients(network, x, y, s, autocast):
    """Forward and backward pass over a batch -> (2,) on the device: its loss, and its share of right answers."""
    with autocast:
        logits = network(x)
        loss = loss_of(logits, y, s.loss, s.label_smoothing)
    loss.backward()
    return torch.stack([loss.detach(), (logits.detach().argmax(1) == y).float().mean()])


def catch_signals():
    """-> a list that gets the first Ctrl-C or SIGTERM, after which the loop saves and leaves. A second one kills."""
    stopped_by = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (stopped_by.append(number), signal.signal(number, signal.SIG_DFL)))
    return stopped_by


def main():
    given = parse()
    if {"steps", "epochs"} <= given.keys():
        fail("--steps and --epochs say the same thing: give one of them")
    s, ckpt = resumed(given) if given.get("resume") else (settle(given), None)
    out_dir, held_out = pathlib.Path(s.out_dir), "val" if s.split < 1 else "test"
    if s.device == "cuda":
        # TF32 where autocast leaves float32; but Shampoo's matrices need all of float32's digits
        torch.set_float32_matmul_precision("highest" if s.opt.endswith("shampoo") else "high")
        torch.backends.cudnn.benchmark = True       # all batches are alike: worth looking for the fastest algorithm
    autocast = torch.autocast(s.device, torch.bfloat16, enabled=s.dtype == "bfloat16")

    # ---- data
    images = load_data(s.data, s.data_dir)
    if s.show:
        return show(images, s.show)
    if ckpt and images.fingerprint != ckpt["fingerprint"]:
        fail(f"--data {s.data} is not the data that this run began with: bring it back, or start without --resume")
    train, train_labels, test, test_labels = split(images, s.split, s.seed)
    if s.batch_size > len(train):
        fail(f"--batch_size {s.batch_size} is more than the {len(train)} training images: make it smaller")
    batches, test, test_labels = Batches(train, train_labels, s), test.to(s.device), test_labels.to(s.device)
    s.steps = s.steps or s.epochs * batches.an_epoch
    s.eval_every = s.eval_every or batches.an_epoch
    s.save_every = s.save_every or s.eval_every
    if not ckpt and "warmup" not in given:
        s.warmup = min(s.warmup, s.steps // 2)      # a preset's warmup, in a much shorter run

    # ---- model and optimizer
    torch.manual_seed(s.seed)
    model = make_model(s, len(images.names)).to(s.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(s, model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    step, spent, losses = 0, 0.0, []                # losses: of every step since the last evaluation, on the device
    if ckpt:
        model.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
        step, spent, losses = ckpt["step"], ckpt["seconds"], list(torch.tensor(ckpt["losses"], device=s.device))
        if s.steps < step:
            fail(f"--steps {s.steps}: {out_dir} has done {step} steps already, give at least as many")
    probe = optim.RotationProbe(optimizer)
    network = torch.compile(model) if s.compile else model
    hyper = ", ".join(f"{key} {value}" for key, value in s.hyper.items())
    print(f"{s.opt} ({hyper}; lr: {s.lr_from}) on {s.data}: {len(train):,} + {len(test):,} images, {len(images.names)} "
          f"classes; {s.model} with {sum(p.numel() for p in model.parameters()):,} parameters"
          f"{', gains' if s.gains else ''}; {s.device}, {s.dtype}{', compiled' if s.compile else ''}; {s.steps} steps "
          f"-> {out_dir}")
    if s.bench:
        x, y = batches(0)
        return bench(len(x), "images", data=lambda: batches(0),
                     forward_and_backward=lambda: gradients(network, x, y, s, autocast), optimizer=optimizer.step)

    # ---- files, signals
    only_one = lock(out_dir, "--out_dir")           # held until the process ends
    start_files(out_dir, s, ckpt)
    stopped_by = catch_signals()

    # ---- the loop: evaluate and save where it is time to, then take a step
    began = time.time() - spent
    with tqdm(total=s.steps, initial=step, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        while True:
            last, leave = step == s.steps, bool(stopped_by)
            evaluate_now = last or step % s.eval_every == 0
            if evaluate_now:
                val_loss, val_acc = evaluate(model, test, test_labels, batches, s, autocast, stopped_by)
                leave = val_loss is None
                if not (leave or math.isfinite(val_loss)):
                    diverged(f"the {held_out} loss is {val_loss}", step, bar, s)
            if last or leave or step % s.save_every == 0:
                save(out_dir / "ckpt.pt", s, model, optimizer, bar, step=step, seconds=time.time() - began,
                     losses=torch.stack(losses).tolist() if losses else [], fingerprint=images.fingerprint)
            if evaluate_now and not leave:
                record = {"step": step, f"{held_out}_loss": val_loss, f"{held_out}_acc": val_acc,
                          "lr": optimizer.param_groups[0]["lr"] if step else 0.0,
                          "seconds": round(time.time() - began, 3)}
                if losses:
                    train_loss, train_acc = torch.stack(losses).mean(0).tolist()
                    record |= {"train_loss": train_loss, "train_acc": train_acc,
                               "epoch": step * s.batch_size / len(train)}
                    bar.write(f"step {step:6d}   train_loss {train_loss:.4f}   {held_out}_loss {val_loss:.4f}   "
                              f"{held_out}_acc {100 * val_acc:5.2f} %   {record['seconds']:6.1f} s", file=sys.stdout)
                append(out_dir / "log.jsonl", record | ({"final": True} if last else {}))
                losses = []
            if last or leave:
                break

            # a step: the loss and its gradients, then the optimizer
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = lr_at(step, peak, s)
            losses.append(gradients(network, *batches(step), s, autocast))
            if step % 10 == 0:                      # not oftener: it waits for the device
                loss = losses[-1][0].item()
                if not math.isfinite(loss):
                    diverged(f"the loss is {loss}", step + 1, bar, s)
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            if s.grad_clip:
                nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
            measure = s.track and step and step % s.track == 0
            if measure:
                probe.measure_next_step()
            optimizer.step()
            optimizer.zero_grad()
            if measure:
                append(out_dir / "log.jsonl", {"step": step, "lr": optimizer.param_groups[0]["lr"],
                                               "rotation": probe.as_json()})
            step += 1
            bar.update()

    # ---- the result
    if leave:
        print(f"stopped after step {step}. To go on: "
              + shlex.join([sys.executable, sys.argv[0], "--resume", "--out_dir", str(out_dir)]))
        sys.exit(128 + stopped_by[0])
    print(f"{held_out}_acc {100 * val_acc:.2f} % ({held_out}_loss {val_loss:.4f}) after {step} steps of {s.opt} in "
          f"{time.time() - began:.0f} s: {out_dir}")


def bench(count, what, **parts):
    """Print how long the parts of a step take, run in turn: medians of 60 steps."""
    times = [[optim.milliseconds(part) for part in parts.values()] for _ in range(68)]
    ms = dict(zip(parts, np.median(times[8:], axis=0)))             # the first ones warm up
    step = sum(ms.values())
    print(f"{1e3 * count / step:,.0f} {what}/s, {step:.2f} ms a step: "
          + ", ".join(f"{name} {t:.2f} ({t / step:.0%})" for name, t in ms.items()))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")           # what a terminal cannot show must not cost the result
    try:
        main()
        sys.stdout.flush()                          # here, where a full disk or a closed pipe can be caught
    except KeyboardInterrupt:                       # before training, or without catch_signals
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)            # or Python's own flush at the end fails again
        fail(f"cannot write: {error.strerror}. The last checkpoint, if any, is whole: --resume goes on from it",
             status=1 if error.errno == errno.EPIPE else 2)     # 1: `| head` has seen enough
    except (MemoryError, RuntimeError) as error:
        if re.search("MemoryError|out of memory|allocate memory|ALLOC_FAILED", repr(error)):
            fail("out of memory: make the model or the batch smaller")
        if re.search(r"C(\+\+)? compiler|triton installation", str(error)):
            fail("torch.compile needs a C++ compiler, and Triton on a GPU: --compile 0 does without")
        raise
