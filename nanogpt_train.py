"""
Train a GPT-2 on text with any optimizer of optim.py. One file, top to bottom: settings, data, model, files, training.
The training loop is in `main`, the last page: begin there.

    python nanogpt_train.py                                   AdamW, a 0.8M-parameter GPT, Python's own manual: offline
    python nanogpt_train.py --opt rotational_lion             any name of optim.OPTIMIZERS, with its tuned defaults
    python nanogpt_train.py --data my_novel.txt --sample 500  any text; at the end 500 characters in its style
    python nanogpt_train.py --opt rotational_lion --resume    goes on after a kill, a crash, Ctrl-C: add --resume
    python nanogpt_train.py --preset shakespeare              nanoGPT's 10M-parameter model (a GPU is advisable)
    torchrun --nproc_per_node=8 nanogpt_train.py --preset gpt2    GPT-2 124M on OpenWebText, on 8 GPUs
    python nanogpt_train.py --bench                           tokens per second, and where the time of a step goes

A run writes config.json, ckpt.pt and log.jsonl under --out_dir. log.jsonl has one JSON object a line, of two kinds:

    {"step": 500, "train_loss": ..., "val_loss": ..., "lr": ..., "seconds": ..., "tokens": ...}      after 500 steps
    {"step": 550, "lr": ..., "rotation": {"blocks.0.up.weight": {"angle": ..., "norm": ...}, ...}}   in the 551st step

The log's last line has "final": true. The angle is the mean over the neurons of a weight, in radians, for that one
step. Theory's predicted_angle and predicted_norm stand beside it. Exit status: 0 done, 2 bad input, 3 the loss is no
number any more, 130 or 143 stopped by Ctrl-C or SIGTERM after saving (not under torchrun). Sizes and spirit are those
of Karpathy's nanoGPT.
"""
import argparse
import ast
import difflib
import errno
import hashlib
import http.client
import inspect
import io
import json
import lzma
import math
import os
import pathlib
import re
import shlex
import signal
import sys
import tarfile
import time
import urllib.request
import zipfile

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

SCRIPT = "nanogpt_train.py"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))         # set by torchrun


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
    weight_decay: float = None      # [0, inf) of matrices and embeddings; biases and gains have none
    beta1: float = None             # [0, 1) of optimizers with betas
    beta2: float = None             # [0, 1) likewise
    momentum: float = None          # [0, 1) of the sgd, rmsprop and shampoo families
    eps: float = None               # [0, inf) of the adam and rmsprop families (modular_adam has none)
    opt_kwargs: list = None         # KEY=VALUE ... anything else that the optimizer's class takes
    # training
    preset: str = None              # a name of PRESETS; default: cpu (lstm), with CUDA shakespeare on python_docs
    schedule: str = "cosine"        # {cosine, linear, constant} after the warmup
    warmup: int = 100               # [0, 1e9] steps over which lr rises linearly; if not given, at most half of a run
    steps: int = 2000               # [1, 1e9] optimizer steps
    batch_size: int = 12            # [1, 1e6] sequences in one forward pass
    grad_accum: int = 1             # [1, 1e6] a step averages over batch_size * grad_accum sequences, of all GPUs
    grad_clip: float = 1.0          # [0, inf) largest gradient norm; 0: no clipping
    seed: int = 1337                # [0, 1e18] of weights, batches and dropout
    # model
    n_layer: int = 4                # [1, 1e4]
    n_head: int = 4                 # [1, 1e4]
    n_embd: int = 128               # [1, 1e5] width
    block_size: int = 64            # [1, 1e6] context length
    dropout: float = 0.0            # [0, 1]
    arch: str = None                # {gpt2, modular, lstm} default: gpt2; modular with modular optimizers
    gains: bool = None              # {0, 1} a learnable gain per output neuron; default: with rotational optimizers
    # data and files
    data: str = "python_docs"       # python_docs, shakespeare, tinystories, wikitext, openwebtext or a text file
    tokenizer: str = None           # {char, gpt2} default: char; gpt2 for tinystories, wikitext, openwebtext
    data_dir: str = "data"          # where downloads and token files are kept
    out_dir: str = None             # default: out/nanogpt-OPT-DATA and the other flags that were given
    resume: bool = False            # {0, 1} go on from ckpt.pt in out_dir, with the settings in it
    save_every: int = None          # [1, 1e9] steps between checkpoints; default: as eval_every
    eval_every: int = 500           # [1, 1e9] steps between evaluations
    eval_batches: int = 60          # [1, 1e6] batches of the fixed validation set
    # machine
    device: str = None              # {cpu, cuda, mps} default: the best there is
    dtype: str = None               # {float32, bfloat16} of autocast; default: bfloat16 on GPUs that compute in it
    compile: bool = None            # {0, 1} torch.compile the model and the optimizer; default: with CUDA
    track: int = 50                 # [0, 1e9] steps between records of how far neurons turn; 0: none
    bench: bool = False             # {0, 1} time a step and its parts, then leave; writes nothing
    # text
    sample: int = 0                 # [0, 1e9] print this many tokens of text at the end
    prompt: str = None              # what the text begins with; default: the first token of the training text
    temperature: float = 0.8        # (0, inf) the lower, the likelier the text


# Every line of Settings as (name, comment, its range or choices). A heading has an empty name.
FLAGS = re.findall(r"^    (?:(\w+): .*?)?# (([\[(].+?[])]|\{.+?\})?.*)", inspect.getsource(Settings), re.M)
LIMITS = {name: limits for name, _, limits in FLAGS if name}
# HYPER are the optimizer's. COMMAND are of one command, not of the run. ASIDE leave what is learned unchanged.
HYPER = {"lr", "weight_decay", "beta1", "beta2", "momentum", "eps", "opt_kwargs"}
COMMAND = {"resume", "bench", "sample", "prompt", "temperature"}
ASIDE = COMMAND | {"data_dir", "out_dir", "save_every", "eval_every", "device", "compile", "track"}
ALIASES = {"learning_rate": "lr", "max_iters": "steps", "eval_interval": "eval_every", "eval_iters": "eval_batches",
           "warmup_iters": "warmup", "dataset": "data", "gradient_accumulation_steps": "grad_accum"}    # nanoGPT's


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


# `tuned` stands in for the table TUNED. Nobody has tried the values of TUNED at other sizes.
PRESETS = {
    # The default without CUDA: the size of nanoGPT's CPU example, two or three minutes on two cores.
    "cpu": dict(compile=False),
    # The same with --arch lstm: three quarters of the weights. A test bed of the kind of Lin et al. 2024.
    "lstm": dict(compile=False, arch="lstm", n_layer=2, n_embd=192),
    # The default with CUDA, then on python_docs: nanoGPT's config/train_shakespeare_char.py.
    "shakespeare": dict(data="shakespeare", n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2, batch_size=64,
                        steps=5000, warmup=100, eval_every=250, eval_batches=40,
                        tuned={"adamw": dict(lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.99)}),
    # Kosson et al. 2024, GPT2-124M on OpenWebText: 491,520 tokens a step, 20 tokens per parameter, 5 % warmup. Their
    # AdamW runs at lr 4.8e-3, its rotational variant at the same lr (zero-shot) or at twice that (tuned: used here).
    "gpt2": dict(data="openwebtext", n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.0, batch_size=12,
                 grad_accum=40, steps=5000, warmup=250, eval_every=250, eval_batches=100,
                 tuned={"adamw": dict(lr=4.8e-3, weight_decay=0.1, beta1=0.9, beta2=0.95),
                        "rotational_adamw": dict(lr=9.6e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)}),
    # Kosson et al. 2024, GPT on Wikitext-103: 84,480 tokens a step. Unlike the paper we decay embeddings, and evaluate
    # on the validation split.
    "wikitext": dict(data="wikitext", n_layer=12, n_head=12, n_embd=768, block_size=512, dropout=0.2, batch_size=55,
                     grad_accum=3, steps=15000, warmup=300, grad_clip=0.0, eval_every=250, eval_batches=24,
                     tuned={"adamw": dict(lr=5e-3, weight_decay=0.5, beta1=0.9, beta2=0.95),
                            "rotational_adamw": dict(lr=5e-3, weight_decay=0.5, beta1=0.9, beta2=0.95)}),
    # Large et al. 2024, the GPT of the sweeps over width (--n_embd 32 to 1024) and depth (--n_layer 2 to 64).
    "modular_gpt": dict(opt="modular_adam", data="shakespeare", n_layer=3, n_head=8, n_embd=128, block_size=128,
                        dropout=0.0, batch_size=128, steps=10000, warmup=0, schedule="linear", grad_clip=0.0,
                        eval_every=100, eval_batches=100, dtype="float32",
                        tuned={"modular_adam": dict(lr=0.25, beta1=0.9, beta2=0.99, weight_decay=0.0),
                               "modular_sgd": dict(lr=0.25, momentum=0.9, weight_decay=0.0)}),
}
# Tuned for the cpu preset on python_docs, one seed. The lr of each NAME was swept in octaves:
#     python sweep.py --grid opt=NAME lr=1e-3,2e-3,4e-3,8e-3 --fixed "steps=500 warmup=50 eval_every=500"
# The other numbers are by hand. For the rotational ones they give angles of 0.01 to 0.024.
TUNED = {}
for direction, plain, rotational, modular, shared in (          # lr and weight_decay of each geometry
        ("sgd", (0.3, 1e-4), (1.0, 1.2e-4), (0.25, 0.0), dict(momentum=0.9)),
        ("adam", (4e-3, 0.0), (1e-2, 0.14), (0.35, 0.0), dict(beta1=0.9, beta2=0.99)),
        ("adamw", (4e-3, 0.1), (1e-2, 0.14), None, dict(beta1=0.9, beta2=0.99)),
        ("lion", (1e-3, 1.0), (2e-3, 2.5), (0.25, 0.0), dict(beta1=0.9, beta2=0.99)),
        ("rmsprop", (2e-3, 0.0), (4e-2, 7e-3), (0.25, 0.0), dict(alpha=0.99)),
        ("rf_rmsprop", (1e-3, 0.0), (5e-4, 0.28), (0.25, 0.0), dict(alpha=0.97, momentum=0.9, eps=1e-3)),
        ("rf_adamw", (1e-2, 0.1), (3e-3, 0.46), (0.25, 0.0), dict(beta1=0.9, beta2=0.97, eps=1e-3)),
        ("muon", (0.02, 0.05), (0.03, 0.15), (0.15, 0.0),
         dict(momentum=0.95, beta1=0.9, beta2=0.99, adamw_lr_scale=0.25)),
        ("shampoo", (3e-4, 0.0), (2e-3, 0.07), (0.25, 0.0),
         dict(momentum=0.9, lr_cov=0.05, damping=1e-6, update_every=10)),
        ("if_shampoo", (2e-3, 0.0), (4e-3, 0.05), (0.25, 0.0), dict(momentum=0.9, lr_cov=0.1, damping=3e-4))):
    for geometry, pair in (("", plain), ("rotational_", rotational), ("modular_", modular)):
        if pair:
            TUNED[geometry + direction] = dict(lr=pair[0], weight_decay=pair[1], **shared)
TUNED["modular_rmsprop"]["momentum"] = 0.9
TUNED["modular_muon"]["adamw_lr_scale"] = 1.0
TUNED["shampoo"]["graft"] = TUNED["rotational_shampoo"]["graft"] = "adam"


def settle(given):
    """All settings of a new run: the command line over the preset over the defaults; the optimizer's own in s.hyper."""
    device = pick_device(given.get("device"))
    name = given.get("preset", "lstm" if given.get("arch") == "lstm" else "shakespeare" if device == "cuda" else "cpu")
    preset = PRESETS.get(name) or fail(f"--preset {name}: invalid choice, there are {', '.join(PRESETS)}")
    preset = preset | ({} if "preset" in given else {"data": Settings.data})       # nobody asked for a download
    chosen = {key: getattr(Settings, key) for key in LIMITS} | preset | given | {"preset": name, "device": device}
    s = argparse.Namespace(**{key: chosen[key] for key in LIMITS if key not in HYPER})
    try:
        kind = optim.find_optimizer(s.opt)
    except ValueError as error:
        fail(error)

    said, tuned = said_by_hand(given), preset.get("tuned", {})
    s.lr_from = ("given" if "lr" in said else f"preset {name}" if s.opt in tuned else
                 "tuned for preset cpu" if s.opt in TUNED else "default of its class, tuned by nobody")
    s.hyper = {"lr": kind.takes()["lr"]} | tuned.get(s.opt, TUNED.get(s.opt, {})) | said
    if "batch_size" in kind.takes():                # over how many tokens the loss is a mean
        s.hyper.setdefault("batch_size", s.batch_size * s.grad_accum * s.block_size)

    s.arch = s.arch or ("modular" if kind.geometry is optim.MODULAR else "gpt2")
    if s.gains is None:
        s.gains = kind.geometry is optim.ROTATIONAL and s.arch != "modular"
    if s.arch != "modular" and kind.geometry is optim.MODULAR:
        why = ": its recurrent matrix is used at every time step, so it has no share of its own" * (s.arch == "lstm")
        fail(f"--arch {s.arch} has no modular norm{why}. Take --arch modular, or an --opt without modular_")
    if s.arch == "modular" and s.gains:
        fail("--arch modular has no gains: leave out --gains, or use --arch gpt2")
    if s.bench and WORLD > 1:
        fail("--bench times one process: leave out torchrun")
    if "warmup" not in given:
        s.warmup = min(s.warmup, s.steps // 2)      # a preset's warmup, in a much shorter run
    s.tokenizer = s.tokenizer or ("gpt2" if s.data in LARGE else "char")
    s.save_every = s.save_every or s.eval_every
    if s.compile is None:
        s.compile = device == "cuda"                # compiling for a CPU takes half a minute
    if s.dtype is None:                             # older GPUs have bfloat16, but only emulate it
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        s.dtype = "bfloat16" if native else "float32"
    words = ["nanogpt", s.opt, pathlib.Path(s.data).stem, *given.get("opt_kwargs", [])]
    words += [f"{key}={value}" for key, value in given.items() if key not in ASIDE | {"opt", "data", "opt_kwargs"}]
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
    s = argparse.Namespace(**ckpt["config"] | {key: getattr(Settings, key) for key in COMMAND}
                           | {key: given[key] for key in given.keys() & (ASIDE | {"steps", "dtype"})})
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


# ---- Data: text -> token files (uint16, memory-mapped), made once and kept under --data_dir --------------------------

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
WIKITEXT = ("https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
            "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794")
HUB = "https://huggingface.co/datasets/"
TINYSTORIES = HUB + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{}.txt"
OPENWEBTEXT = HUB + "Skylion007/openwebtext/resolve/main/subsets/urlsf_subset{:02d}.tar"        # 00 to 20
LARGE = ("tinystories", "wikitext", "openwebtext")  # do not fit in memory
END = "<|endoftext|>"                               # GPT-2's mark between documents


def download(url, sha256, path):
    """Fetch url to path, unless it is there. It is checked before it counts. sha256=None: what Hugging Face says."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not sha256:                          # git keeps a large file's sha256 in its place
                with urllib.request.urlopen(url.replace("/resolve/", "/raw/"), timeout=60) as pointer:
                    sha256, = re.findall(r"sha256:(\w+)", pointer.read().decode())
            torch.hub.download_url_to_file(url, path, sha256)
        elif sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            fail(f"{path} is not the file that {url} should give: delete it, then start again")
        return path
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:     # no network, another file, ...
        fail(f"cannot download {url}: {' '.join(str(error).split())}. Fetch it by hand and put it at {path} "
             "(--data_dir), or leave out --data: the default needs none")


def openwebtext_documents(folder, validation):
    """Documents of OpenWebText, straight from the 21 archives (a tar of .xz files, each a tar of texts). Every 2000th
    one is for validation, as many as nanoGPT holds out."""
    count = 0
    for i in range(21):
        with tarfile.open(download(OPENWEBTEXT.format(i), None, folder / f"urlsf_subset{i:02d}.tar")) as outer:
            for member in (member for member in outer if member.name.endswith(".xz")):
                with tarfile.open(fileobj=io.BytesIO(lzma.decompress(outer.extractfile(member).read()))) as inner:
                    for text in filter(tarfile.TarInfo.isfile, inner):
                        count += 1
                        if (count % 2000 == 0) == validation:
                            yield inner.extractfile(text).read().decode(errors="replace") + END


def single_text(name, data_dir):
    """Python's manual, Shakespeare or the user's own text, which fits in memory."""
    if name == "python_docs":
        import pydoc_data.topics                    # the language reference behind help("topics"): part of CPython
        return "\n".join(pydoc_data.topics.topics.values())
    path = download(*SHAKESPEARE, data_dir / "shakespeare.txt") if name == "shakespeare" else pathlib.Path(name)
    try:
        return path.read_text("utf-8-sig")          # a byte-order mark is dropped, and \r\n becomes \n
    except UnicodeDecodeError:
        fail(f"--data {name}: not UTF-8 text. If it is text in another encoding, convert it: iconv -t UTF-8")
    except OSError as error:
        fail(f"--data {name}: no such text file ({error.strerror}); the data sets are python_docs, shakespeare, "
             f"{', '.join(LARGE)}")


def read_part(name, part, data_dir):
    """The "train" or "valid" part of a text, in pieces, since not every text fits in memory."""
    if name == "openwebtext":
        return openwebtext_documents(data_dir / "openwebtext", validation=part == "valid")
    if name == "tinystories":
        file = open(download(TINYSTORIES.format(part), None, data_dir / f"tinystories-{part}.txt"), encoding="utf-8")
    elif name == "wikitext":
        archive = zipfile.ZipFile(download(*WIKITEXT, data_dir / "wikitext-103-raw-v1.zip"))
        file = io.TextIOWrapper(archive.open(f"wikitext-103-raw/wiki.{part}.raw"), "utf-8")
    else:                                           # split 90 / 10 by characters
        text = single_text(name, data_dir)
        cut = int(0.9 * len(text))
        return [text[:cut] if part == "train" else text[cut:]]
    return iter(lambda: "".join(file.readlines(1 << 22)), "")       # whole lines: no word is cut


class Characters:
    """Every distinct character of the text is a token. `chars`: all of them, sorted."""

    def __init__(self, chars):
        self.chars, self.ids, self.n_vocab = chars, {c: i for i, c in enumerate(chars)}, len(chars)

    def encode(self, text):
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:                   # only a --prompt has a character that is not in the text
            fail(f"--prompt: {error.args[0]!r} does not occur in the text: use its characters, or --tokenizer gpt2")

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)


class GPT2Tokens:
    """GPT-2's byte pairs, from tiktoken (which downloads them once). 50,257, padded to a multiple of 64: faster."""
    n_vocab = 50304

    def __init__(self):
        import tiktoken
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:                  # requests, os and tiktoken each have their own exceptions
            said = f"{type(error).__name__}, {error}".partition("\n")[0][:100]
            fail(f"cannot load GPT-2's tokens: {said}. tiktoken downloads them once; "
                 "without a network, set TIKTOKEN_CACHE_DIR to a folder that holds them, or use --tokenizer char")

    def encode(self, text):
        return self.bpe.encode(text, allowed_special={END})

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i < self.bpe.n_vocab])       # the padding has no text


def load_data(name, data_dir, tokenizer):
    """-> train and val, 1-D uint16 arrays mapped from files; the tokenizer; a hash of the text. The first run makes the
    files. Their folder is named by that hash, so they are never out of date. It has this name only when it is whole."""
    data_dir = pathlib.Path(data_dir)
    text = name if name in LARGE else single_text(name, data_dir)
    if len(text) < 2:
        fail(f"--data {name} is empty: too few tokens")
    key = hashlib.sha256(f"{text} {tokenizer}".encode()).hexdigest()[:12]
    folder = data_dir / f"{pathlib.Path(name).stem}-{tokenizer}-{key}"
    only_one = None if folder.exists() else lock(data_dir, "--data_dir", wait=True)         # another run may make them
    if not folder.exists():
        unfinished, parts, chars = folder.with_name(f"{folder.name}.part"), ("train", "valid"), ""
        unfinished.mkdir(exist_ok=True)
        if tokenizer == "char":
            pieces = (piece for part in parts for piece in read_part(name, part, data_dir))
            chars = "".join(sorted(set().union(*pieces)))
        codec = Characters(chars) if chars else GPT2Tokens()
        for part in parts:
            pieces = read_part(name, part, data_dir)
            with open(unfinished / f"{part}.bin", "wb") as file:
                for piece in tqdm(pieces, desc=f"tokens, {part}", delay=2):
                    file.write(np.array(codec.encode(piece), np.uint16).tobytes())
        (unfinished / "chars.txt").write_bytes(chars.encode())
        os.rename(unfinished, folder)
    train, val = (np.memmap(folder / f"{part}.bin", np.uint16, "r") for part in ("train", "valid"))
    codec = GPT2Tokens() if tokenizer == "gpt2" else Characters((folder / "chars.txt").read_bytes().decode())
    return train, val, codec, key


def get_windows(data, rng, count, s, mine=slice(None)):
    """`count` windows of block_size + 1 tokens from random places, or only this process's share `mine` of them:
    (count, block_size + 1) int64, on the device."""
    starts = rng.integers(0, len(data) - s.block_size, size=count)[mine]
    windows = torch.from_numpy(data[starts[:, None] + np.arange(s.block_size + 1)].astype(np.int64))
    if s.device == "cuda":                          # pinned and asynchronous: copied while the GPU is still computing
        windows = windows.pin_memory()
    return windows.to(s.device, non_blocking=s.device == "cuda")


# ---- Models. Shapes: B sequences, T tokens each, C = n_embd, H heads, V tokens in the vocabulary --------------------


class Linear(nn.Linear):
    """nn.Linear, with a learnable gain per output neuron if asked for:  y = (gain * W) x + b.  A rotational optimizer
    keeps the norm of every row of W. The gain can still make the neuron louder."""

    def __init__(self, n_in, n_out, bias, gain):
        super().__init__(n_in, n_out, bias=bias)
        self.gain = nn.Parameter(torch.ones(n_out)) if gain else None

    def forward(self, x):
        weight = self.weight if self.gain is None else self.gain[:, None] * self.weight
        return F.linear(x, weight, self.bias)


class Attention(nn.Module):
    def __init__(self, n_head, n_embd, dropout, gain):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.qkv = Linear(n_embd, 3 * n_embd, False, gain)
        self.out = Linear(n_embd, n_embd, False, gain)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                        # each (B, H, T, C / H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, n_head, n_embd, dropout, gain):
        super().__init__()
        self.norm1 = nn.LayerNorm(n_embd, bias=False)
        self.attention = Attention(n_head, n_embd, dropout, gain)
        self.norm2 = nn.LayerNorm(n_embd, bias=False)
        self.up = Linear(n_embd, 4 * n_embd, False, gain)
        self.down = Linear(4 * n_embd, n_embd, False, gain)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Model(nn.Module):
    """What all three have in common. self.hidden(x): what the head reads, (B, T, C)."""

    def forward(self, x, y=None):
        """x, y: (B, T) tokens -> logits of the last token (B, V) without y; with y the mean cross-entropy in nats."""
        h = self.hidden(x)
        if y is None:
            return self.head(h[:, -1])
        return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


class GPT(Model):
    """GPT-2 (Radford et al. 2019) without biases."""

    def __init__(self, n_vocab, n_layer, n_head, n_embd, block_size, dropout, gain):
        super().__init__()
        self.block_size = block_size
        self.tokens = nn.Embedding(n_vocab, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(n_head, n_embd, dropout, gain) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, bias=False)
        self.head = Linear(n_embd, n_vocab, False, gain)
        self.head.weight = self.tokens.weight       # tied: one parameter with two uses (the gain belongs to the head)
        # GPT-2's 0.02 at GPT-2's width, and in proportion to 1/sqrt(width) at others. A narrow model would start too
        # quiet, which matters most where weights keep their norm.
        std = 0.02 * math.sqrt(768 / n_embd)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
        with torch.no_grad():
            for block in self.blocks:               # 2 n_layer terms add up in the residual stream: keep the sum small
                block.attention.out.weight /= math.sqrt(2 * n_layer)
                block.down.weight /= math.sqrt(2 * n_layer)

    def hidden(self, x):
        h = self.dropout(self.tokens(x) + self.positions.weight[:x.shape[1]])       # (B, T, C)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)


class LSTM(Model):
    """An LSTM language model (Hochreiter, Schmidhuber 1997; Zaremba et al. 2014). The state starts at zero in every
    window. A gain belongs to one gate of one unit."""

    def __init__(self, n_vocab, n_layer, n_embd, block_size, dropout, gain):
        super().__init__()
        self.block_size, self.tokens, self.dropout = block_size, nn.Embedding(n_vocab, n_embd), nn.Dropout(dropout)
        self.lstm = nn.LSTM(n_embd, n_embd, n_layer, batch_first=True, dropout=dropout if n_layer > 1 else 0.0)
        self.gains = nn.ParameterList(torch.ones(4 * n_embd) for _ in range(2 * n_layer if gain else 0))
        self.head = Linear(n_embd, n_vocab, False, gain)
        self.head.weight = self.tokens.weight       # tied
        nn.init.normal_(self.tokens.weight, std=0.02 * math.sqrt(768 / n_embd))             # as in GPT

    def hidden(self, x):
        weights = {name: p for name, p in self.lstm.named_parameters() if p.dim() == 2}     # (4 C, C) each
        louder = {name: gain[:, None] * p for (name, p), gain in zip(weights.items(), self.gains)}
        h = self.dropout(self.tokens(x))                                            # (B, T, C)
        with torch.autocast("cpu", enabled=False):  # most CPUs have no LSTM in bfloat16
            return self.dropout(torch.func.functional_call(self.lstm, louder, (h,))[0])


class ModularBlock(nn.Module):
    """Two half-blocks  x <- (1 - s) x + s f(x): attention, then MLP. Norms have no gain, and nothing has a bias."""

    def __init__(self, n_layer, n_head, n_embd, dropout):
        super().__init__()
        self.n_head, self.s = n_head, 1 / (2 * n_layer)
        self.q, self.k, self.v, self.out = (nn.Linear(n_embd, n_embd, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(n_embd, 4 * n_embd, bias=False), nn.Linear(4 * n_embd, n_embd, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        h = parameter_free_norm(x)
        q, k, v = (layer(h).view(B, T, self.n_head, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        # The paper divides the logits by d = C / H, not by its root, and q, k and v by 3 each, which gives attention
        # sensitivity 1. Both together: logits over 9 d, and the output over 3.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.n_head / (9 * C)) / 3
        x = torch.lerp(x, self.dropout(self.out(y.transpose(1, 2).reshape(B, T, C))).to(x.dtype), self.s)
        h = math.sqrt(2) * F.gelu(self.up(parameter_free_norm(x)))         # gelu alone has sensitivity 1 / sqrt(2)
        return torch.lerp(x, self.dropout(self.down(h)).to(x.dtype), self.s)


def parameter_free_norm(x):
    """LayerNorm without gain and bias. The paper's has no eps; 1e-12 keeps a row of equal numbers from becoming NaN."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-12)


class ModularGPT(Model):
    """The GPT of the modular norm paper (Large et al. 2024): every part has sensitivity 1, whatever width and depth
    are. The authors multiply weights of norm 1 by their usual size in the forward pass. Here they have that size."""

    def __init__(self, n_vocab, n_layer, n_head, n_embd, block_size, dropout):
        super().__init__()
        self.block_size = block_size
        self.tokens, self.positions = nn.Embedding(n_vocab, n_embd), nn.Embedding(block_size, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(ModularBlock(n_layer, n_head, n_embd, dropout) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, n_vocab, bias=False)
        optim.initialise(self.modular_tree())

    def hidden(self, x):
        h = self.dropout((self.tokens(x) + self.positions.weight[:x.shape[1]]) / 2)
        for block in self.blocks:
            h = block(h)
        return parameter_free_norm(h)

    def modular_tree(self):
        """The expression of this network; print it for the share of every weight. A half-block is the average
        (1 - s) x + s f(x)  with s = 1 / (2 n_layer), and all of them together have mass 5."""
        def each(name):
            return optim.weight(*(getattr(block, name) for block in self.blocks))
        norm, third, s = optim.bond("layernorm"), 1 / 3, self.blocks[0].s
        attention = each("out") @ optim.bond("attention") @ (third * each("q"), third * each("k"), third * each("v"))
        mlp = each("down") @ optim.bond("sqrt(2) gelu") @ each("up")
        first, then = ((1 - s) * optim.bond("x") + s * (f @ norm) for f in (attention, mlp))
        embedding = (0.5 * optim.weight(self.tokens) + 0.5 * optim.weight(self.positions)).tare(1)
        return optim.weight(self.head) @ norm @ ((then @ first) ** len(self.blocks)).tare(5) @ embedding


@torch.no_grad()
def generate(model, ids, count, temperature, seed):
    """Continue the list of tokens `ids` by `count` sampled ones, each (1, T) -> (1, V) -> 1 token."""
    device, new, generator = model.tokens.weight.device, [], torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.tensor([(ids + new)[-model.block_size:]], device=device)
        logits = model(x)[0].cpu().double()
        p = F.softmax((logits - logits.max()) / temperature, dim=-1)
        new.append(torch.multinomial(p, 1, generator=generator).item())
    return new


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
    `progress`: step, seconds, losses since the last evaluation, a hash of the data. Batches and dropout depend on seed,
    step and process alone, so a resumed run needs no random state."""
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
    return peak * {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[s.schedule]


def make_model(s, n_vocab):
    if s.arch == "lstm":
        return LSTM(n_vocab, s.n_layer, s.n_embd, s.block_size, s.dropout, s.gains)
    if s.n_embd % s.n_head:
        fail(f"--n_embd {s.n_embd} is not a multiple of --n_head {s.n_head}: try --n_embd "
             f"{max(s.n_embd // s.n_head, 1) * s.n_head}")
    shape = n_vocab, s.n_layer, s.n_head, s.n_embd, s.block_size, s.dropout
    return ModularGPT(*shape) if s.arch == "modular" else GPT(*shape, s.gains)


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
def evaluate(model, val, s, autocast, stopped_by=()):
    """Mean loss over the validation windows, the same for every run with equal data and sizes. None: a signal came."""
    model.eval()
    rng, losses = np.random.default_rng(0), []
    for _ in range(s.eval_batches):
        if stopped_by:
            return None
        windows = get_windows(val, rng, s.batch_size, s)
        with autocast:
            losses.append(model(windows[:, :-1], windows[:, 1:]))
    model.train()
    return torch.stack(losses).float().mean().item()


def gradients(network, windows, s, autocast):
    """Forward (the loss: Model.forward) and backward passes over this process's windows, batch_size at a time -> the
    mean loss, on the device."""
    total, parts = 0.0, windows.split(s.batch_size)
    for i, part in enumerate(parts):
        if WORLD > 1:                               # the processes exchange their gradients once a step
            network.require_backward_grad_sync = i == len(parts) - 1
        with autocast:
            loss = network(part[:, :-1], part[:, 1:]) * (len(part) / len(windows))
        loss.backward()
        total = total + loss.detach()
    if WORLD > 1:                                   # the mean over all processes
        torch.distributed.all_reduce(total)
        total /= WORLD
    return total


def catch_signals():
    """-> a list that gets the first Ctrl-C or SIGTERM, after which the loop saves and leaves. A second one kills."""
    stopped_by = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (stopped_by.append(number), signal.signal(number, signal.SIG_DFL)))
    return stopped_by


def main():
    given = parse()
    s, ckpt = resumed(given) if given.get("resume") else (settle(given), None)
    out_dir, say = pathlib.Path(s.out_dir), print if RANK == 0 else lambda *words: None
    if s.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # TF32 where autocast leaves float32; but Shampoo's matrices need all of float32's digits
        torch.set_float32_matmul_precision("highest" if s.opt.endswith("shampoo") else "high")
    autocast = torch.autocast(s.device, torch.bfloat16, enabled=s.dtype == "bfloat16")

    # ---- data
    train, val, tokenizer, fingerprint = load_data(s.data, s.data_dir, s.tokenizer)
    if min(len(train), len(val)) <= s.block_size:
        fail(f"--data {s.data} has {len(train)} training and {len(val)} validation tokens, too few for --block_size "
             f"{s.block_size}: use more text or a smaller block")
    if ckpt and fingerprint != ckpt["fingerprint"]:
        fail(f"--data {s.data} is not the text that this run began with: bring it back, or start without --resume")
    sequences = s.batch_size * s.grad_accum         # of a step, all processes together
    if sequences % WORLD:
        fail(f"batch_size * grad_accum = {sequences} sequences cannot be shared by {WORLD} processes: use a multiple")
    mine = slice(RANK * sequences // WORLD, (RANK + 1) * sequences // WORLD)
    prompt = tokenizer.encode(s.prompt) if s.prompt else train[:1].tolist()

    # ---- model and optimizer
    torch.manual_seed(s.seed)
    model = make_model(s, tokenizer.n_vocab).to(s.device)
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
    say(f"{s.opt} ({hyper}; lr: {s.lr_from}) on {s.data}: {len(train):,} + {len(val):,} tokens, vocabulary "
        f"{tokenizer.n_vocab}; {type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters"
        f"{', gains' if s.gains else ''}; {s.device}, {s.dtype}{', compiled' if s.compile else ''}; -> {out_dir}")
    if s.bench:
        windows = get_windows(train, np.random.default_rng(0), sequences, s)
        return bench(windows[:, 1:].numel(), "tokens",
                     data=lambda: get_windows(train, np.random.default_rng(0), sequences, s),
                     forward_and_backward=lambda: gradients(network, windows, s, autocast), optimizer=optimizer.step)

    # ---- processes, files, signals
    if WORLD > 1:                                   # not before: each process has found by itself what is wrong so far
        try:
            torch.distributed.init_process_group("nccl" if s.device == "cuda" else "gloo")
        except ValueError as error:                 # MASTER_ADDR, RANK, ... are missing
            fail(f"WORLD_SIZE is {WORLD}, but: {error}. Start the script with torchrun, or unset WORLD_SIZE")
        network = nn.parallel.DistributedDataParallel(network)
    if RANK == 0:
        only_one = lock(out_dir, "--out_dir")       # held until the process ends
        start_files(out_dir, s, ckpt)
    stopped_by = catch_signals() if WORLD == 1 else []          # torchrun's would stop at different steps

    # ---- the loop: evaluate and save where it is time to, then take a step
    began = time.time() - spent
    with tqdm(total=s.steps, initial=step, disable=RANK > 0, unit="step",
              mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        while True:
            last, leave = step == s.steps, bool(stopped_by)
            evaluate_now = last or step % s.eval_every == 0
            if evaluate_now:
                val_loss = evaluate(model, val, s, autocast, stopped_by)
                leave = val_loss is None
                if not (leave or math.isfinite(val_loss)):
                    diverged(f"the validation loss is {val_loss}", step, bar, s)
            if RANK == 0 and (last or leave or step % s.save_every == 0):
                save(out_dir / "ckpt.pt", s, model, optimizer, bar, step=step, seconds=time.time() - began,
                     losses=torch.stack(losses).tolist() if losses else [], fingerprint=fingerprint)
            if evaluate_now and not leave:
                record = {"step": step, "val_loss": val_loss, "lr": optimizer.param_groups[0]["lr"] if step else 0.0,
                          "seconds": round(time.time() - began, 3)}
                if losses and RANK == 0:
                    record |= {"train_loss": torch.stack(losses).mean().item(),
                               "tokens": step * sequences * s.block_size}
                    bar.write(f"step {step:6d}   train_loss {record['train_loss']:.4f}   val_loss {val_loss:.4f}   "
                              f"{record['seconds']:6.1f} s", file=sys.stdout)
                if RANK == 0:
                    append(out_dir / "log.jsonl", record | ({"final": True} if last else {}))
                losses = []
            if last or leave:
                break

            # a step: the loss and its gradients, then the optimizer
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = lr_at(step, peak, s)
            if s.dropout:                           # dropout depends on seed, step and process: nothing to restore
                torch.manual_seed(int(np.random.SeedSequence([s.seed, step, RANK]).generate_state(1)[0]))
            windows = get_windows(train, np.random.default_rng([s.seed, step]), sequences, s, mine)
            losses.append(gradients(network, windows, s, autocast))
            if step % 10 == 0:                      # not oftener: it waits for the device
                loss = losses[-1].item()
                if not math.isfinite(loss):
                    diverged(f"the loss is {loss}", step + 1, bar, s)
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            if s.grad_clip:
                nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
            measure = RANK == 0 and s.track and step and step % s.track == 0
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
        say(f"stopped after step {step}. To go on: "
            + shlex.join([sys.executable, sys.argv[0], "--resume", "--out_dir", str(out_dir)]))
        sys.exit(128 + stopped_by[0])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)       # all is saved: nothing to wait for any more
    if s.sample and RANK == 0:
        text = tokenizer.decode(prompt + generate(model.eval(), prompt, s.sample, s.temperature, s.seed))
        say(f"---\n{text}\n---")
    say(f"val_loss {val_loss:.4f} (perplexity {math.exp(min(val_loss, 700)):.2f}) after {step} steps of {s.opt} in "
        f"{time.time() - began:.0f} s: {out_dir}")
    if WORLD > 1:                                   # one that leaves first makes torchrun stop the others
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)                                 # freeing DDP can deadlock with gloo's threads


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
