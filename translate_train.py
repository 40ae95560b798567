"""
Train a Transformer to translate German to English with any optimizer of optim.py. One file, top to bottom: settings,
data, byte pairs, batches, BLEU, model, beam search, files, training. The training loop is in `main`, the last page:
begin there.

    python translate_train.py                                 AdamW, a 0.9M-parameter Transformer, numbers: offline
    python translate_train.py --opt rotational_lion           any name of optim.OPTIMIZERS, with its tuned defaults
    python translate_train.py --translate "halb acht"         with the trained model; --translate - reads lines
    python translate_train.py --opt rotational_lion --resume  goes on after a kill, a crash, Ctrl-C: add --resume
    python translate_train.py --preset multi30k               image captions: 15 minutes or more on a CPU
    python translate_train.py --preset multi30k --data corpus     text of your own: corpus/train.de, train.en, ...
    python translate_train.py --preset iwslt                  6 + 6 layers on IWSLT'14 (a GPU is advisable)
    python translate_train.py --bench                         tokens per second, and where the time of a step goes

A run writes config.json, ckpt.pt, log.jsonl and hypotheses.en (its translation of the test set) under --out_dir.
log.jsonl has one JSON object a line, of three kinds:

    {"step": 250, "train_loss": ..., "val_loss": ..., "lr": ..., "seconds": ..., "tokens": ...}         after 250 steps
    {"step": 300, "lr": ..., "rotation": {"source.weight": {"angle": ..., "norm": ...}, ...}}          in the 301st step
    {"step": 1000, "val_loss": ..., "bleu": ..., "beam": 5, "length_penalty": 1.0, ..., "final": true}        the result

The angle is the mean over the neurons of a weight, in radians, for that one step. Theory's predicted_angle and
predicted_norm stand beside it. Exit status: 0 done, 2 bad input, 3 the loss is no number any more, 130 or 143 stopped
by Ctrl-C or SIGTERM after saving.

The default data, `numbers`, comes out of a grammar in this file. A number or time of its test set is never one of
the training set (a number may occur there as the minutes of a time). Text of your own is a folder with train.de and
train.en, or their .gz, and with valid and test named the same way. Line n of one language translates line n of the
other.

References: Vaswani et al. 2017 (Transformer); Sennrich et al. 2016 (byte-pair encoding); Papineni et al. 2002 (BLEU);
Post 2018 (sacrebleu, whose figures `bleu` gives); Kosson et al. 2024 (Rotational Equilibrium) for the preset iwslt.
"""
import argparse
import ast
import collections
import difflib
import errno
import gzip
import hashlib
import html
import http.client
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import shlex
import signal
import sys
import tarfile
import time
import unicodedata
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

SCRIPT = "translate_train.py"


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
    preset: str = None              # a name of PRESETS; default: cpu
    schedule: str = "cosine"        # {cosine, linear, constant} after the warmup
    warmup: int = 100               # [0, 1e9] steps over which lr rises linearly; if not given, at most half of a run
    steps: int = 1000               # [1, 1e9] optimizer steps
    max_tokens: int = 1024          # [1, 1e9] of a batch, in each language, padding counted
    label_smoothing: float = 0.1    # [0, 1] of the training loss
    grad_clip: float = 1.0          # [0, inf) largest gradient norm; 0: no clipping
    seed: int = 1337                # [0, 1e18] of weights, batches and dropout
    # model
    n_layer: int = 2                # [1, 1e4] of the encoder, and as many of the decoder
    n_head: int = 4                 # [1, 1e4]
    n_embd: int = 128               # [1, 1e5] width
    n_ffn: int = 256                # [1, 1e6] width inside the feed-forward part
    dropout: float = 0.0            # [0, 1]
    gains: bool = None              # {0, 1} a learnable gain per output neuron; default: with rotational optimizers
    # data and files
    data: str = "numbers"           # numbers, multi30k, iwslt14, or a folder with your own train.de, train.en, ...
    test: str = None                # another test set: PREFIX of PREFIX.de and PREFIX.en (or .gz)
    vocab: int = 1000               # [260, 1e6] tokens, both languages together: bytes, byte pairs, 3 marks
    data_dir: str = "data"          # where downloads and byte pairs are kept
    out_dir: str = None             # default: out/translate-OPT-DATA and the other flags that were given
    resume: bool = False            # {0, 1} go on from ckpt.pt in out_dir, with the settings in it
    save_every: int = None          # [1, 1e9] steps between checkpoints; default: as eval_every
    eval_every: int = 250           # [1, 1e9] steps between evaluations
    # machine
    device: str = None              # {cpu, cuda, mps} default: the best there is
    dtype: str = None               # {float32, bfloat16} of autocast; default: bfloat16 on GPUs that compute in it
    compile: bool = None            # {0, 1} torch.compile the model and the optimizer; default: with CUDA, under iwslt
    track: int = 50                 # [0, 1e9] steps between records of how far neurons turn; 0: none
    bench: bool = False             # {0, 1} time a step and its parts, then leave; writes nothing
    # translation
    beam: int = 5                   # [1, 1000] hypotheses kept for every sentence; 1: greedy
    length_penalty: float = 1.0     # [0, 10] score = log-probability / length^this; 0 favours short translations
    translate: str = None           # translate this text with the model in out_dir; -: the lines of standard input


# Every line of Settings as (name, comment, its range or choices). A heading has an empty name.
FLAGS = re.findall(r"^    (?:(\w+): .*?)?# (([\[(].+?[])]|\{.+?\})?.*)", inspect.getsource(Settings), re.M)
LIMITS = {name: limits for name, _, limits in FLAGS if name}
# HYPER are the optimizer's. COMMAND are of one command, not of the run. ASIDE leave what is learned unchanged.
HYPER = {"lr", "weight_decay", "beta1", "beta2", "momentum", "eps", "opt_kwargs"}
COMMAND = {"resume", "bench", "translate"}
ASIDE = COMMAND | {"test", "data_dir", "out_dir", "save_every", "eval_every", "device", "compile", "track", "beam",
                   "length_penalty"}
ALIASES = {"learning_rate": "lr", "max_update": "steps", "warmup_updates": "warmup", "lenpen": "length_penalty",
           "clip_norm": "grad_clip", "save_dir": "out_dir"}     # fairseq's


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
    # The default: two or three minutes on two cores.
    "cpu": dict(compile=False),
    # Captions of images, for a CPU: nine epochs of a small model.
    "multi30k": dict(data="multi30k", vocab=4000, n_layer=3, n_head=4, n_embd=128, n_ffn=256, dropout=0.1,
                     max_tokens=1024, steps=4851, warmup=400, eval_every=539, compile=False),
    # Kosson et al. 2024: fairseq's transformer_iwslt_de_en. The paper picks the checkpoint with the best BLEU on the
    # validation set. Here the last one is taken, since the learning rate has come down to 0 by then.
    "iwslt": dict(data="iwslt14", vocab=10000, n_layer=6, n_head=4, n_embd=512, n_ffn=1024, dropout=0.3,
                  max_tokens=4096, steps=22021, warmup=4000, grad_clip=0.0, eval_every=1000,
                  tuned={"adamw": dict(lr=5e-4, weight_decay=1e-4, beta1=0.9, beta2=0.98),
                         "rotational_adamw": dict(lr=5e-4, weight_decay=0.4, beta1=0.9, beta2=0.98)}),
}

# Tuned for the cpu preset, one seed, by validation loss. (The grammar then had dates and prices, too.) The lr of each
# NAME was swept in octaves:
#     python sweep.py --script translate_train.py --metric val_loss --grid opt=NAME lr=1e-3,2e-3 --fixed "beam=1"
# The other numbers are those of nanogpt_train.py. With max_dim the Shampoos keep a diagonal for the vocabulary, whose
# matrix would take most of their time. With betas (0.9, 0.99) lion reached BLEU 41, with these 99. (modular_lion: 36.)
TUNED = {}
for direction, plain, rotational, modular, shared in (          # lr and weight_decay of each geometry
        ("sgd", (0.2, 1e-4), (0.25, 1.2e-4), (0.08, 0.0), dict(momentum=0.9)),
        ("adam", (2e-3, 0.0), (2.5e-3, 0.14), (0.08, 0.0), dict(beta1=0.9, beta2=0.99)),
        ("adamw", (2e-3, 0.1), (5e-3, 0.14), None, dict(beta1=0.9, beta2=0.99)),
        ("lion", (4e-4, 1.0), (1e-3, 2.5), (0.08, 0.0), dict(beta1=0.9, beta2=0.99)),
        ("rmsprop", (2e-3, 0.0), (1e-2, 7e-3), (0.08, 0.0), dict(alpha=0.99)),
        ("rf_rmsprop", (1.2e-3, 0.0), (1.25e-4, 0.28), (0.08, 0.0), dict(alpha=0.97, momentum=0.9, eps=1e-3)),
        ("rf_adamw", (1e-2, 0.1), (1.5e-3, 0.46), (0.08, 0.0), dict(beta1=0.9, beta2=0.97, eps=1e-3)),
        ("muon", (0.02, 0.05), (0.03, 0.05), (0.04, 0.0),
         dict(momentum=0.95, beta1=0.9, beta2=0.99, adamw_lr_scale=0.1)),
        ("shampoo", (1.5e-4, 0.0), (1e-3, 0.07), (0.08, 0.0),
         dict(momentum=0.9, lr_cov=0.05, damping=1e-6, update_every=10, max_dim=512)),
        ("if_shampoo", (1e-3, 0.0), (2e-3, 0.05), (0.08, 0.0),
         dict(momentum=0.9, lr_cov=0.1, damping=3e-4, max_dim=512))):
    for geometry, pair in (("", plain), ("rotational_", rotational), ("modular_", modular)):
        if pair:
            TUNED[geometry + direction] = dict(lr=pair[0], weight_decay=pair[1], **shared)
TUNED["modular_rmsprop"]["momentum"] = 0.9
TUNED["rotational_muon"]["adamw_lr_scale"], TUNED["modular_muon"]["adamw_lr_scale"] = 0.25, 1.0
TUNED["shampoo"]["graft"] = TUNED["rotational_shampoo"]["graft"] = "adam"
TUNED["lion"]["beta2"] = TUNED["modular_lion"]["beta2"] = 0.9


def settle(given):
    """All settings of a new run: the command line over the preset over the defaults; the optimizer's own in s.hyper."""
    device = pick_device(given.get("device"))
    name = given.get("preset", "cpu")
    preset = PRESETS.get(name) or fail(f"--preset {name}: invalid choice, there are {', '.join(PRESETS)}")
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

    if s.gains is None:
        s.gains = kind.geometry is optim.ROTATIONAL
    if "warmup" not in given:
        s.warmup = min(s.warmup, s.steps // 2)      # a preset's warmup, in a much shorter run
    s.save_every = s.save_every or s.eval_every
    if s.compile is None:
        s.compile = device == "cuda"                # compiling for a CPU takes half a minute
    if s.dtype is None:                             # older GPUs have bfloat16, but only emulate it
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        s.dtype = "bfloat16" if native else "float32"
    words = ["translate", s.opt, pathlib.Path(s.data).name, *given.get("opt_kwargs", [])]
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


# ---- Data, 1: numbers, from a grammar of German and English ----------------------------------------------------------

DE_ONES = ("null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
           "siebzehn achtzehn neunzehn").split()
DE_TENS = ". . zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
EN_ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen nineteen").split()
EN_TENS = ". . twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {
    "city": dict(München="Munich", Köln="Cologne", Wien="Vienna", Zürich="Zurich", Genf="Geneva", Nürnberg="Nuremberg",
                 Straßburg="Strasbourg", Basel="Basel", Hamburg="Hamburg", Berlin="Berlin"),
    "day": dict(Montag="Monday", Dienstag="Tuesday", Mittwoch="Wednesday", Donnerstag="Thursday", Freitag="Friday",
                Samstag="Saturday", Sonntag="Sunday"),
    "things": dict(Bücher="books", Äpfel="apples", Stühle="chairs", Schlüssel="keys", Brötchen="rolls", Hüte="hats",
                   Fahrräder="bicycles", Blumen="flowers", Briefe="letters", Karten="tickets")}
# Who acts, with the verbs that agree: haben, sein, müssen, wollen, wissen.
VERBS = ("who", "have", "be", "must", "want", "know")
PEOPLE = [(f"{de}|{verbs_de}".split("|"), f"{en}|{verbs_en}".split("|")) for de, en, verbs_de, verbs_en in [
    ("ich", "I", "habe|bin|muss|will|weiß", "have|am|have to|want|know"),
    ("wir", "we", "haben|sind|müssen|wollen|wissen", "have|are|have to|want|know"),
    *((de, en, "hat|ist|muss|will|weiß", "has|is|has to|wants|knows") for de, en in [
        ("er", "he"), ("Jürgen", "Jürgen"), ("Anna", "Anna"), ("der Lehrer", "the teacher"),
        ("die Ärztin", "the doctor"), ("mein Bruder", "my brother"), ("ihre Tochter", "her daughter")])]]
# Every {name} is drawn, {who} together with the verbs. {time2} is a second time.
SENTENCES = [
    ("der Zug nach {city} fährt um {time} ab.", "the train to {city} leaves at {time}."),
    ("{who} {know}, dass der Zug aus {city} um {time} ankommt.",
     "{who} {know} that the train from {city} arrives at {time}."),
    ("am {day} {have} {who} {count} {things} gekauft.", "{who} bought {count} {things} on {day}."),
    ("wenn der Film um {time} anfängt, {must} {who} um {time2} gehen.",
     "if the film starts at {time}, {who} {must} go at {time2}."),
    ("am {day} {must} {who} um {time} aufstehen.", "{who} {must} get up at {time} on {day}."),
    ("weil der Zug nach {city} ausgefallen ist, {be} {who} erst um {time} angekommen.",
     "because the train to {city} was cancelled, {who} did not arrive until {time}."),
    ("{who} {want} am {day} {count} {things} nach {city} bringen.",
     "{who} {want} to take {count} {things} to {city} on {day}."),
    ("seit {day} {have} {who} {count} {things} verkauft.", "{who} {have} sold {count} {things} since {day}."),
    ("das Museum ist am {day} von {time} bis {time2} geöffnet.",
     "the museum is open from {time} to {time2} on {day}."),
    ("es heißt, dass {who} am {day} {count} {things} verloren {have}.",
     "they say that {who} lost {count} {things} on {day}."),
    ("{count} {things} kosten in {city} {count2} Euro.", "{count} {things} cost {count2} euros in {city}."),
]


def german(n, one="eins", ein="ein"):
    """n in German words, 0 <= n < 10^6. one: what a 1 at the end is called. ein: what stands before a single hundert or
    tausend, since tausend and eintausend are both right."""
    for size, name in ((1000, "tausend"), (100, "hundert")):
        if n >= size:
            count, rest = divmod(n, size)
            return (ein if count == 1 else german(count, "ein", ein)) + name + (german(rest, one) if rest else "")
    tens, ones = divmod(n, 10)
    if n >= 20:
        return (f"{DE_ONES[ones]}und" if ones else "") + DE_TENS[tens]
    return one if n == 1 else DE_ONES[n]


def english(n):
    """n in British English words, 0 <= n < 10^6: with `and` before the last two digits."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if n >= size:
            count, rest = divmod(n, size)
            joint = " and " if rest < 100 else " "
            return f"{english(count)} {name}" + (joint + english(rest) if rest else "")
    tens, ones = divmod(n, 10)
    return EN_ONES[n] if n < 20 else EN_TENS[tens] + (f"-{EN_ONES[ones]}" if ones else "")


def clock(h, m):
    """The time as people say it in (German, English), h = 1 .. 12, m = 5, 10, .. 55. From 25 past on, German counts
    to the next hour. Halb acht is half past seven."""
    following, distance = h % 12 + 1, min(m, 60 - m)
    de = "Viertel" if distance == 15 else german(distance)
    de = {25: "fünf vor halb", 30: "halb", 35: "fünf nach halb"}.get(m) or f"{de} {'nach' if m < 30 else 'vor'}"
    en = {15: "a quarter", 30: "half"}.get(distance) or english(distance)
    return (f"{de} {german(h if m < 25 else following)}",
            f"{en} {'past' if m <= 30 else 'to'} {english(h if m <= 30 else following)}")


def timetable(h, m):
    """The time as timetables have it in (German, English), h = 0 .. 23, m = 0 .. 59."""
    minutes = "" if m == 0 else f" oh {english(m)}" if m < 10 else f" {english(m)}"
    return (german(h, "ein") + " Uhr" + (f" {german(m)}" if m else ""),
            f"{english((h - 1) % 12 + 1)}{minutes} {'p.m.' if h >= 12 else 'a.m.'}")


class Grammar:
    """Draws pairs (German, English) for one part of the data. `contents` collects what the pairs are about."""

    def __init__(self, part, seed):
        self.part, self.random, self.contents = part, random.Random(seed), set()

    def draw(self, name, *choices):
        """A value from each range or function in `choices`. Their hash decides whose part they are."""
        while True:
            content = (name, *(choice() if callable(choice) else self.random.choice(choice) for choice in choices))
            hashed = hashlib.sha256(repr(content).encode()).digest()[0] % 16
            if self.part == {0: "test", 1: "valid"}.get(hashed, "train"):
                self.contents.add(content)
                return content[1:]

    def slot(self, name):
        """-> (German, English) of a number, a count, a time, or a word of WORDS."""
        if name in WORDS:
            return self.random.choice(list(WORDS[name].items()))
        if name == "time" and self.random.random() < 0.5:
            return clock(*self.draw("clock", range(1, 13), range(5, 60, 5)))
        if name == "time":
            return timetable(*self.draw("time", range(24), range(60)))
        digits = {"number": 6, "count": 3}[name]
        n, = self.draw("number", lambda: self.random.randrange(1, 10 ** self.random.randint(1, digits)))
        if name == "count" and n % 100 == 1:        # one, and a hundred and one, would ask for a singular
            return self.slot(name)
        return german(n, ein=self.random.choice(("ein", ""))), english(n)

    def pair(self):
        kind = self.random.choices(("number", "time", "sentence"), (4, 2, 10))[0]
        if kind != "sentence":
            return self.slot(kind)
        patterns, person, words = self.random.choice(SENTENCES), self.random.choice(PEOPLE), {}
        for name in re.findall(r"{(\w+)}", patterns[0]):
            words[name] = ([forms[VERBS.index(name)] for forms in person] if name in VERBS
                           else self.slot(name.rstrip("2")))
        texts = [text.format(**{name: pair[i] for name, pair in words.items()}) for i, text in enumerate(patterns)]
        return tuple(text[0].upper() + text[1:].replace(".m..", ".m.") for text in texts)        # p.m. ends a sentence


def numbers(part):
    """The pairs of one part, every German side once: the same for everybody, whatever the seed of the run."""
    grammar, pairs = Grammar(part, seed=part), {}
    while len(pairs) < {"train": 24_000, "valid": 500, "test": 1000}[part]:
        pairs.setdefault(*grammar.pair())
    return list(pairs.items())


# ---- Data, 2: texts. -> {"train": [(German, English), ...], "valid": ..., "test": ...} -------------------------------

MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
MULTI30K_FILES = (                                  # there, here, sha256
    ("train.de.gz", "train.de.gz", "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"),
    ("train.en.gz", "train.en.gz", "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
    ("val.de.gz", "valid.de.gz", "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"),
    ("val.en.gz", "valid.en.gz", "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"),
    ("test_2016_flickr.de.gz", "test.de.gz", "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"),
    ("test_2016_flickr.en.gz", "test.en.gz", "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"))
IWSLT14 = "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
IWSLT14_MD5 = "10936dfdf616504ddbd844e91b94ef4a"


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


def sentence(text):
    """A sentence as the model sees it, however it was typed. Letters are in composed form (an umlaut is one letter).
    White space of any kind is one space between words. Byte-order marks go."""
    return " ".join(unicodedata.normalize("NFC", text.replace("\ufeff", "")).split())


def sentences(data, where):
    """Bytes of UTF-8 -> a sentence for every line. str.splitlines would also cut at rarer characters than \\n, and put
    the two languages out of step."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fail(f"{where}, line {line}: not UTF-8 text. If it is in another encoding, convert it: iconv -t UTF-8")
    return [sentence(line) for line in text.removesuffix("\n").split("\n")] if text else []


def read_pairs(prefix):
    """The line-aligned files PREFIX.de and PREFIX.en, or their .gz -> pairs."""
    sides = []
    for language in ("de", "en"):
        path = pathlib.Path(f"{prefix}.{language}")
        try:
            data = path.read_bytes() if path.exists() else gzip.decompress(
                path.with_name(f"{path.name}.gz").read_bytes())
        except (OSError, EOFError, zlib.error) as error:        # no such file; not a gzip file, or half of one
            fail(f"cannot read {path} nor {path}.gz: {error}")
        sides.append(sentences(data, path))
    empty = [n for n, pair in enumerate(itertools.zip_longest(*sides), start=1) if not all(pair)]
    if empty or not sides[0]:
        fail(f"{prefix}, line {(empty or [1])[0]}: empty in one language. Line n of .de must translate line n of .en")
    return list(zip(*sides))


def iwslt14(data_dir):
    """IWSLT'14, cleaned as fairseq's recipe does: tags dropped, lower case, no pair over 175 words or over 1.5 times as
    long in one language; every 23rd pair is for validation, five sets of talks for the test. The recipe has a tokenizer
    before byte pairs, and we have none. So BLEU is on other words than in papers that follow the recipe."""
    path, pairs = download(IWSLT14, None, data_dir / "iwslt14-de-en.tgz"), {"train": [], "valid": [], "test": []}
    if hashlib.md5(path.read_bytes()).hexdigest() != IWSLT14_MD5:
        fail(f"{path} is not the file that {IWSLT14} should give: delete it, then start again")
    tests = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
    with tarfile.open(path) as archive:
        train, *tests = ([sentences(archive.extractfile(f"de-en/{name.format(language)}").read(), path)
                          for language in ("de", "en")]
                         for name in ("train.tags.de-en.{}", *(f"IWSLT14.{test}.de-en.{{}}.xml" for test in tests)))
    train = [[re.sub("</?(title|description)>", "", line) for line in lines
              if not re.search("<(url|talkid|keywords)>", line)] for lines in train]
    count = 0
    for pair in zip(*train, strict=True):
        words = [len(re.findall(r"\w+|[^\w\s]", side)) for side in pair]
        if 1 <= min(words) and max(words) <= min(175, 1.5 * min(words)):
            count += 1
            pairs["valid" if count % 23 == 0 else "train"].append(tuple(sentence(side.lower()) for side in pair))
    for sides in tests:
        segments = (re.findall("<seg[^>]*>(.*?)</seg>", "\n".join(lines)) for lines in sides)
        pairs["test"] += [tuple(sentence(html.unescape(side).replace("’", "'").lower()) for side in pair)
                          for pair in zip(*segments, strict=True)]
    return pairs


def load_corpus(name, data_dir, test):
    """--data and --test -> the pairs of train, valid and test."""
    folder, parts = pathlib.Path(name), ("train", "valid", "test")
    if name == "numbers":
        pairs = {part: numbers(part) for part in parts}
    elif name == "iwslt14":
        pairs = iwslt14(pathlib.Path(data_dir))
    else:
        if name == "multi30k":
            folder = pathlib.Path(data_dir) / name
            for there, here, sha256 in MULTI30K_FILES:
                download(MULTI30K + there, sha256, folder / here)
        elif not folder.is_dir():
            fail(f"--data {name}: there is no such folder; the data sets are numbers, multi30k, iwslt14")
        pairs = {part: read_pairs(folder / part) for part in parts[:2 if test else 3]}
    return pairs | ({"test": read_pairs(test)} if test else {})


# ---- Byte pairs: text -> UTF-8 bytes; the most frequent pair of neighbours becomes a token, again and again ----------

# Pairs form inside of a word only: letters and digits, or other signs, with the space before them. Remaining white
# space makes words of its own. Python's `re` and tiktoken read this pattern alike, and it misses no character.
WORD = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+"


def learn_byte_pairs(lines, count):
    """Byte-pair encoding (Sennrich et al. 2016) of the lines -> at most `count` tokens, in the order learned.

    Every word is a list of tokens, single bytes at first. The pair of neighbours that is most frequent in the text (of
    equals the one with the smaller bytes) is joined wherever it occurs; then the next. A pair is known by its bytes
    together, as to tiktoken: a + bc and ab + c give the same token. A token is a string with one character (of Latin-1)
    for each byte, since JSON holds no bytes."""
    frequency = collections.Counter(word for line in lines for word in re.findall(WORD, " " + line))
    words, weights = [list(word.encode().decode("latin-1")) for word in frequency], list(frequency.values())
    pairs, where, tokens = collections.Counter(), collections.defaultdict(set), []  # where: the words that hold a pair

    def count_pairs(i, word, weight):
        for pair in map(str.__add__, word, word[1:]):
            pairs[pair] += weight
            if pairs[pair]:
                where[pair].add(i)
            else:
                del pairs[pair]                     # a third of all; the search for the best looks at every pair

    for i, word in enumerate(words):
        count_pairs(i, word, weights[i])
    for _ in tqdm(range(count), desc="learning byte pairs", delay=2):
        most = max(pairs.values(), default=0)
        if most < 2:
            break                                   # what occurs once is not worth a token
        best = min([pair for pair, n in pairs.items() if n == most])
        tokens.append(best)
        for i in where.pop(best):
            old, words[i] = words[i], []
            for part in old:                        # joined from left to right
                if words[i] and words[i][-1] + part == best:
                    words[i][-1] = best
                else:
                    words[i].append(part)
            count_pairs(i, words[i], weights[i])
            count_pairs(i, old, -weights[i])
    return tokens


class BytePairs:
    """Text <-> lists of token ids, by tiktoken with our own byte pairs. Ids: 256 single bytes, `tokens` in the order
    learned, then the marks pad, begin, end. `encode` puts a space in front of a line, so that a word is the same token
    at its beginning as within. `decode` takes it away."""

    def __init__(self, tokens):
        import tiktoken
        ranks = {token.encode("latin-1"): i for i, token in enumerate([*map(chr, range(256)), *tokens])}
        self.tokens, self.n_vocab = tokens, len(ranks) + 3
        self.pad, self.begin, self.end = range(len(ranks), self.n_vocab)
        self.core = tiktoken.Encoding("byte pairs", pat_str=WORD, mergeable_ranks=ranks, special_tokens={
            "<pad>": self.pad, "<begin>": self.begin, "<end>": self.end})

    def encode(self, lines):
        """-> a list of ids for every line, without marks."""
        return self.core.encode_ordinary_batch([" " + line for line in lines])

    def decode(self, ids):
        """-> one line. Bytes that are not UTF-8, which an untrained model may produce, show as U+FFFD."""
        data = self.core.decode_bytes([i for i in ids if i < self.pad])
        return data.decode("utf-8", errors="replace").removeprefix(" ")


def byte_pairs_of(pairs, vocab, data_dir, name):
    """The byte pairs of a training set: learned once, then kept under --data_dir in a file named after their text."""
    lines = [line for pair in pairs for line in pair]
    key = hashlib.sha256("\n".join([str(vocab), WORD, *lines]).encode()).hexdigest()[:12]
    path = pathlib.Path(data_dir) / f"bpe-{name}-{vocab}-{key}.json"
    only_one = None if path.exists() else lock(path.parent, "--data_dir", wait=True)        # another run may learn them
    if not path.exists():
        write(path, json.dumps(learn_byte_pairs(lines, vocab - 259)).encode())
    return BytePairs(json.loads(path.read_text()))


# ---- Batches: pairs of like length together, as many as fit into max_tokens ------------------------------------------


class Batches:
    """Token ids of one part of the data, in batches of pairs sorted by length. In every epoch pairs of exactly the same
    lengths trade places and the batches come in another order, so there are as many batches, of the same `sizes`. The
    pairs that are `too_long` for a batch are left out. tokens_per_batch: English ones, on average, without padding."""

    def __init__(self, pairs, bpe, max_tokens):
        self.pad = bpe.pad
        sources, targets = (bpe.encode(side) for side in zip(*pairs))
        self.source = [torch.tensor([*ids, bpe.end]) for ids in sources]
        self.target = [torch.tensor([bpe.begin, *ids, bpe.end]) for ids in targets]
        lengths = np.array([(len(s), len(t) - 1) for s, t in zip(self.source, self.target)])
        self.fits = np.flatnonzero(lengths.max(axis=1) <= max_tokens)
        self.too_long, self.lengths = len(pairs) - len(self.fits), lengths[self.fits]
        self.sizes, longest = [], 0
        for length in self.lengths[self.order()].max(axis=1).tolist():
            longest = max(longest, length)
            if self.sizes and (self.sizes[-1] + 1) * longest <= max_tokens:
                self.sizes[-1] += 1
            else:                                   # a new batch
                self.sizes.append(1)
                longest = length
        self.tokens_per_batch = self.lengths[:, 1].sum() / max(len(self.sizes), 1)
        self.drawn = None, []                       # an epoch, and its batches

    def order(self, rng=None):
        """Indices of `fits`, from short to long; equal lengths in the order of the text, or by chance."""
        ties = np.arange(len(self.fits)) if rng is None else rng.random(len(self.fits))
        return np.lexsort((ties, self.lengths[:, 1], self.lengths[:, 0]))           # the last key counts most

    def epoch(self, seed=None):
        """The batches of one epoch: a list of arrays of indices, the same for the same seed. Without one: in order."""
        rng = None if seed is None else np.random.default_rng(seed)
        batches = np.split(self.fits[self.order(rng)], np.cumsum(self.sizes)[:-1])
        return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]

    def __call__(self, step, s):
        """The batch of a step."""
        epoch, place = divmod(step, len(self.sizes))
        if epoch != self.drawn[0]:
            self.drawn = epoch, self.epoch([s.seed, epoch])
        return self.get(self.drawn[1][place], s.device)

    def get(self, indices, device):
        """-> source (B, S), what the decoder reads (B, T), what it should say (B, T): that, one token on."""
        source = rectangle([self.source[i] for i in indices], self.pad, device)
        target = rectangle([self.target[i] for i in indices], self.pad, device)
        return source, target[:, :-1], target[:, 1:]


def rectangle(rows, pad, device):
    """Rows of different lengths -> one int64 tensor on the device, padded at the end."""
    x = nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=pad)
    if device == "cuda":                            # pinned and asynchronous: copied while the GPU is still computing
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


# ---- BLEU, as sacrebleu computes it: signature nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp --------------------------


def tokenize_13a(line):
    """Words and signs of a line, cut as NIST's mteval-v13a.pl does it."""
    line = line.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        line = line.replace(entity, sign)
    line = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {line} ")      # ASCII signs but ' , - .
    line = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", line)                          # . and , unless between digits
    line = re.sub(r"([\.,])([^0-9])", r" \1 \2", line)
    line = re.sub(r"([0-9])(-)", r"\1 \2 ", line)                               # - after a digit
    return line.split()


def bleu(hypotheses, references):
    """Corpus BLEU (Papineni et al. 2002), 0 to 100, of lines of text with one reference each:

        BP * exp( 1/4 sum over n = 1..4 of log p_n )        BP = min(1, exp(1 - reference words / hypothesis words))

    p_n: how many of all n-grams of the hypotheses are found in their own reference, each at most as often as it occurs
    there. Counts of the whole corpus are summed before they are divided. If no n-gram of a length is found, the first
    such p_n is taken as half an n-gram, the next as a quarter, and so on."""
    found, total, said, wanted = [0] * 4, [0] * 4, 0, 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        words, right = tokenize_13a(hypothesis), tokenize_13a(reference)
        said, wanted = said + len(words), wanted + len(right)
        for n in range(1, 5):
            ours, theirs = (collections.Counter(zip(*(text[i:] for i in range(n)))) for text in (words, right))
            found[n - 1] += (ours & theirs).total()                 # the smaller count of each n-gram
            total[n - 1] += ours.total()
    if not any(found) or not all(total):
        return 0.0
    log_precision, halving = 0.0, 1.0
    for f, t in zip(found, total):
        if f == 0:
            halving *= 2
        log_precision += math.log(f / t if f else 1 / (halving * t)) / 4
    return 100 * min(1.0, math.exp(1 - wanted / said)) * math.exp(log_precision)


# ---- Model: Transformer. Shapes: B sentences, S source and T target tokens each, C = n_embd, H heads, V tokens in all

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
    """Attention of x to keys and values, which are of x itself, of tokens before it, or of another sequence."""

    def __init__(self, n_head, n_embd, gain):
        super().__init__()
        self.n_head = n_head
        self.q, self.k, self.v, self.out = (Linear(n_embd, n_embd, True, gain) for _ in range(4))

    def heads(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)                   # (B, T, C) -> (B, H, T, C / H)

    def keys_values(self, x):
        return self.heads(self.k(x)), self.heads(self.v(x))

    def forward(self, x, keys, values, mask=None, causal=False):
        y = F.scaled_dot_product_attention(self.heads(self.q(x)), keys, values, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))                               # (B, T, C)


class Layer(nn.Module):
    """x <- norm(x + f(x)), as in 2017. f is attention within the sentence, then (in the decoder) attention to the
    source, and last an MLP."""

    def __init__(self, n_head, n_embd, n_ffn, dropout, gain, decoder):
        super().__init__()
        self.attention = Attention(n_head, n_embd, gain)
        self.cross = Attention(n_head, n_embd, gain) if decoder else None
        self.up, self.down = Linear(n_embd, n_ffn, True, gain), Linear(n_ffn, n_embd, True, gain)
        self.norms = nn.ModuleList(nn.LayerNorm(n_embd) for _ in range(3 if decoder else 2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, memory=None, past=None):
        """x: (B, T, C). mask: which tokens of the source are no padding. memory: keys and values of the source
        (B, H, S, C / H), in the decoder, where each token of x sees those before it. With `past`, the keys and values
        of the tokens before, x is one token of each of K hypotheses, (B, K, C), and `past` grows by that token's."""
        if past is None:
            own = {"mask": mask} if self.cross is None else {"causal": True}
            f = self.attention(x, *self.attention.keys_values(x), **own)
        else:
            one = x.flatten(0, 1)[:, None]                                          # (B K, 1, C)
            new = self.attention.keys_values(one)
            past[:] = [torch.cat(pair, dim=2) for pair in zip(past, new)] if past else new
            f = self.attention(one, *past).view_as(x)
        x = self.norms[0](x + self.dropout(f))
        if self.cross is not None:
            x = self.norms[1](x + self.dropout(self.cross(x, *memory, mask)))
        return self.norms[-1](x + self.dropout(self.down(F.relu(self.up(x)))))


class Translator(nn.Module):
    """The Transformer of 2017. modular=True: the same network, started as the modular geometry wants it."""

    def __init__(self, n_vocab, pad, n_layer, n_head, n_embd, n_ffn, dropout, gain, modular=False):
        super().__init__()
        self.pad, sizes = pad, (n_head, n_embd, n_ffn, dropout, gain)
        self.source, self.target = nn.Embedding(n_vocab, n_embd), nn.Embedding(n_vocab, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(Layer(*sizes, decoder=False) for _ in range(n_layer))
        self.decoder = nn.ModuleList(Layer(*sizes, decoder=True) for _ in range(n_layer))
        self.head = Linear(n_embd, n_vocab, False, gain)
        self.head.weight = self.target.weight       # tied: one parameter with two uses (the gain belongs to the head)
        # fairseq's start: rows of embeddings have norm 1 (times sqrt(C) where they are read). Matrices are Glorot's,
        # those of queries, keys and values as if they were one.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=2**-0.5 if name[-2:] in (".q", ".k", ".v") else 1.0)
                if module.bias is not None:         # the head has none
                    nn.init.zeros_(module.bias)
        for embedding in (self.source, self.target):
            nn.init.normal_(embedding.weight, std=n_embd**-0.5)
        self.source_scale = self.target_scale = math.sqrt(n_embd)
        if modular:                                 # there, rows of an embedding have norm sqrt(C) themselves
            self.source_scale = 1.0
            optim.initialise(self.modular_tree())

    def modular_tree(self):
        """The modular tree (see optim.py) of a network that was not made for it. Updates are balanced between layers,
        but no bound holds, and the best lr may move with width and depth. Every decoder layer reads the encoder's
        output, which comes in once here. A sum x + f(x) is written as an average. Gains of norms are outside of the
        tree. Attention is sharper than its bond says. The tied weight is the head's, and its other use is a bond."""
        def layers(stack, *names):                  # all of them together of mass 5, as in the paper's GPT
            s, tree, norm = 1 / (len(names) * len(stack)), optim.bond("x"), optim.bond("layernorm")
            for name in names:
                def each(x):
                    return optim.weight(*(layer.get_submodule(name + x) for layer in stack))
                if name:                            # the paper's three factors 1/3 are in the bond
                    f = each(".out") @ optim.bond("attention", 1 / 3) @ (each(".q"), each(".k"), each(".v"))
                else:
                    f = each("down") @ optim.bond("relu", 0.5**0.5) @ each("up")
                tree = ((1 - s) * optim.bond("x") + s * (f @ norm)) @ tree
            return (tree ** len(stack)).tare(5)

        encoder, decoder = layers(self.encoder, "attention", ""), layers(self.decoder, "attention", "cross", "")
        read = (optim.bond("tied embedding"), encoder @ optim.weight(self.source))
        return optim.weight(self.head) @ optim.bond("layernorm") @ decoder @ read

    def encode(self, source):
        """(B, S) tokens -> what the decoder looks at: keys and values for each of its layers; which are no padding."""
        mask = (source != self.pad)[:, None, None]                                  # (B, 1, 1, S)
        h = self.source(source) * self.source_scale
        h = self.dropout(h + positions(0, source.shape[1], h.shape[-1], h.device))
        for layer in self.encoder:
            h = layer(h, mask)
        return [layer.cross.keys_values(h) for layer in self.decoder], mask

    def forward(self, source, target):
        """(B, S) and (B, T) tokens -> logits (B, T, V) of the token after each of the target."""
        return self.decode(target, 0, *self.encode(source))

    def decode(self, target, start, memory, mask, pasts=None):
        """Target tokens (B, T) from place `start` on, and what `encode` gave -> logits (B, T, V) of the next ones. With
        `pasts`, which Layer keeps, they are the tokens at one place of K hypotheses, (B, K) -> (B, K, V)."""
        h = self.target(target) * self.target_scale
        h = self.dropout(h + positions(start, 1 if pasts else target.shape[1], h.shape[-1], h.device))
        for layer, keys_values, past in zip(self.decoder, memory, pasts or [None] * len(memory)):
            h = layer(h, mask, keys_values, past)
        return self.head(h)


def positions(start, count, width, device):
    """Sinusoidal positions `start` and on (Vaswani et al. 2017, section 3.5), sines first: (count, width)."""
    frequency = torch.exp(torch.arange(width // 2, device=device) * (-math.log(10000) / max(width // 2 - 1, 1)))
    angle = torch.arange(start, start + count, device=device)[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=1)


# ---- Beam search -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def beam_search(model, source, begin, end, beam, length_penalty, longest=(1.2, 10)):
    """Translate a batch: source (B, S) tokens -> for each of the B the ids of the best hypothesis found, without marks.

    Every sentence has K = beam hypotheses, all of t tokens. Of the V * K ways to go on, the 2 K best (by the sum of
    log-probabilities) are looked at. Those of the first K that are `end` are finished, with score sum / length^penalty,
    `end` counted. The K best of the others go on. A sentence is done when K of its hypotheses are finished and the best
    of them scores at least as high as the best that goes on would if it ended here. It is done in any case at a S + b
    tokens, (a, b) = longest, where all have to end."""
    B, K, device = len(source), beam, source.device
    memory, mask = model.encode(source)
    limits = ((source != model.pad).sum(1) * longest[0] + longest[1]).long()        # (B,)
    pasts = [[] for _ in memory]                    # keys and values of every layer, (B K, H, t, C / H)
    last = torch.full((B, K), begin, device=device)
    scores = torch.full((B, K), -math.inf, device=device)
    scores[:, 0] = 0.0                              # the K hypotheses are still the same one: count it once
    said = torch.empty(B, K, 0, dtype=torch.long, device=device)
    live, finished = list(range(B)), [[] for _ in range(B)]
    for t in range(int(limits.max())):
        logp = F.log_softmax(model.decode(last, t, memory, mask, pasts).float(), dim=-1)      # (B, K, V)
        V = logp.shape[-1]
        must_end = (limits == t + 1)[:, None, None] & (torch.arange(V, device=device) != end)
        total = (scores[:, :, None] + logp).masked_fill(must_end, -math.inf).flatten(1)     # (B, K V)
        top, index = total.topk(min(2 * K, V * K))
        parent, token = index // V, index % V
        over = (token == end) & top.isfinite()
        over[:, K:] = False
        i, j = over.nonzero().unbind(1)
        for b, score, ids in zip(i.tolist(), top[i, j].tolist(), said[i, parent[i, j]].tolist()):
            finished[live[b]].append((score / (t + 1) ** length_penalty, ids))
        scores, rank = top.masked_fill(token == end, -math.inf).topk(K)
        parent, last = parent.gather(1, rank), token.gather(1, rank)
        hopes = (scores[:, 0] / (t + 1) ** length_penalty).tolist()
        rows = [i for i, (b, limit, hope) in enumerate(zip(live, limits.tolist(), hopes))
                if limit > t + 1 and (len(finished[b]) < K or max(finished[b])[0] < hope)]
        if not rows:
            break
        live, rows = [live[i] for i in rows], torch.tensor(rows, device=device)
        scores, parent, last, limits, mask = scores[rows], parent[rows], last[rows], limits[rows], mask[rows]
        said = torch.cat((said[rows].gather(1, parent[:, :, None].expand(-1, -1, t)), last[:, :, None]), dim=2)
        flat = (rows[:, None] * K + parent).flatten()
        pasts = [[x[flat] for x in past] for past in pasts]
        memory = [[x[rows] for x in keys_values] for keys_values in memory]
    return [max(hypotheses)[1] for hypotheses in finished]


def translate(model, bpe, lines, s, autocast):
    """German sentences -> English ones, in the same order; an empty one stays empty. Batches are sorted by length."""
    sources, out = [[*ids, bpe.end] for ids in bpe.encode(lines)], [""] * len(lines)
    order = sorted((i for i, line in enumerate(lines) if line), key=lambda i: len(sources[i]))
    model.eval()
    with tqdm(total=len(order), desc="translating", unit=" lines", delay=5) as bar:
        while order:
            count = max(1, s.max_tokens // (s.beam * len(sources[order[-1]])))      # the longest of all: never too many
            batch, order = order[-count:], order[:-count]
            with autocast:
                ids = beam_search(model, rectangle([sources[i] for i in batch], bpe.pad, s.device), bpe.begin, bpe.end,
                                  s.beam, s.length_penalty)
            for i, hypothesis in zip(batch, ids):
                out[i] = sentence(bpe.decode(hypothesis))
            bar.update(len(batch))
    return out


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
        for name in ("ckpt.pt", "hypotheses.en"):
            (out_dir / name).unlink(missing_ok=True)
    # A kill can cut the last line short. It then lacks its end.
    kept = [line for line in lines if ckpt and line.endswith("\n") and json.loads(line)["step"] < ckpt["step"]]
    write(config, json.dumps(vars(s) | {"torch": torch.__version__}, indent=1).encode())
    write(log, "".join(kept).encode())


def save(path, s, model, optimizer, bar, **progress):
    """Write a checkpoint, unless a number in it is not finite. It holds settings, weights, the optimizer's state and
    `progress`: step, seconds, losses since the last evaluation, byte pairs, a hash of the data. Batches and dropout
    depend on (seed, step) alone, so a resumed run needs no random state."""
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


def loss_of(model, pad, source, x, y, smoothing=0.0):
    """Mean cross-entropy in nats per target token, padding left out."""
    logits = model(source, x)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=pad, label_smoothing=smoothing)


def make_model(s, bpe):
    if s.n_embd % (2 * s.n_head):
        fail(f"--n_embd {s.n_embd} is not a multiple of 2 * --n_head = {2 * s.n_head}: try --n_embd "
             f"{max(s.n_embd // (2 * s.n_head), 1) * 2 * s.n_head}")
    shape = bpe.n_vocab, bpe.pad, s.n_layer, s.n_head, s.n_embd, s.n_ffn, s.dropout, s.gains
    return Translator(*shape, modular=optim.find_optimizer(s.opt).geometry is optim.MODULAR)


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
def evaluate(model, valid, s, autocast, stopped_by=()):
    """Mean loss per English token of the whole validation set, without smoothing. None: a signal came."""
    model.eval()
    total, count = 0.0, 0
    for indices in valid.epoch():
        if stopped_by:
            return None
        source, x, y = valid.get(indices, s.device)
        with autocast:
            loss = loss_of(model, model.pad, source, x, y)
        tokens = (y != valid.pad).sum()
        total, count = total + loss.cpu().double() * tokens.cpu(), count + tokens.cpu()         # MPS has no float64
    model.train()
    return (total / count).item()


def gradients(network, batch, s, autocast):
    """Forward and backward pass over a batch -> its loss, on the device."""
    with autocast:
        loss = loss_of(network, network.pad, *batch, s.label_smoothing)
    loss.backward()
    return loss.detach()


def catch_signals():
    """-> a list that gets the first Ctrl-C or SIGTERM, after which the loop saves and leaves. A second one kills."""
    stopped_by = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (stopped_by.append(number), signal.signal(number, signal.SIG_DFL)))
    return stopped_by


def translate_text(s, ckpt, bpe, autocast):
    """--translate: print the translation of a text, or of the lines of standard input, by the model of a checkpoint."""
    data = sys.stdin.buffer.read() if s.translate == "-" else s.translate.encode("utf-8", "surrogatepass")
    lines = sentences(data, "standard input" if s.translate == "-" else "--translate")
    model = make_model(s, bpe).to(s.device)
    model.load_state_dict(ckpt["model"])
    for line in translate(model, bpe, lines, s, autocast):
        print(line)


def main():
    given = parse()
    s, ckpt = resumed(given) if given.get("resume") or given.get("translate") else (settle(given), None)
    out_dir = pathlib.Path(s.out_dir)
    if s.device == "cuda":
        # TF32 where autocast leaves float32; but Shampoo's matrices need all of float32's digits
        torch.set_float32_matmul_precision("highest" if s.opt.endswith("shampoo") else "high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention makes a plan for every shape: most batches
    autocast = torch.autocast(s.device, torch.bfloat16, enabled=s.dtype == "bfloat16")
    bpe = BytePairs(ckpt["bpe"]) if ckpt else None
    if s.translate:
        return translate_text(s, ckpt, bpe, autocast)

    # ---- data
    pairs = load_corpus(s.data, s.data_dir, s.test)
    fingerprint = hashlib.sha256(json.dumps([pairs["train"], pairs["valid"]]).encode()).hexdigest()
    if ckpt and fingerprint != ckpt["fingerprint"]:
        fail(f"--data {s.data} is not the text that this run began with: bring it back, or start without --resume")
    bpe = bpe or byte_pairs_of(pairs["train"], s.vocab, s.data_dir, pathlib.Path(s.data).name)
    train, valid = (Batches(pairs[part], bpe, s.max_tokens) for part in ("train", "valid"))
    for part, batches in (("training", train), ("validation", valid)):
        if not batches.sizes:
            fail(f"none of the {part} pairs is short enough for --max_tokens {s.max_tokens}: make it larger")
        if batches.too_long:
            print(f"{batches.too_long} {part} pairs are longer than --max_tokens {s.max_tokens} and left out")
    if "batch_size" in optim.OPTIMIZERS[s.opt].takes():         # over how many tokens the loss is a mean
        s.hyper.setdefault("batch_size", round(train.tokens_per_batch))

    # ---- model and optimizer
    torch.manual_seed(s.seed)
    model = make_model(s, bpe).to(s.device)
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
    network = torch.compile(model, dynamic=True) if s.compile else model       # batches come in many shapes
    hyper = ", ".join(f"{key} {value}" for key, value in s.hyper.items())
    print(f"{s.opt} ({hyper}; lr: {s.lr_from}) on {s.data}: {' + '.join(f'{len(part):,}' for part in pairs.values())} "
          f"pairs, {len(train.sizes)} batches of {train.tokens_per_batch:,.0f} English tokens, {bpe.n_vocab} in the "
          f"vocabulary; {sum(p.numel() for p in model.parameters()):,} parameters{', gains' if s.gains else ''}; "
          f"{s.device}, {s.dtype}{', compiled' if s.compile else ''}; -> {out_dir}")
    if s.bench:
        batch = train(0, s)
        return bench((batch[2] != bpe.pad).sum().item(), "English tokens", data=lambda: train(0, s),
                     forward_and_backward=lambda: gradients(network, batch, s, autocast), optimizer=optimizer.step)

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
                val_loss = evaluate(model, valid, s, autocast, stopped_by)
                leave = val_loss is None
                if not (leave or math.isfinite(val_loss)):
                    diverged(f"the validation loss is {val_loss}", step, bar, s)
            if last or leave or step % s.save_every == 0:
                save(out_dir / "ckpt.pt", s, model, optimizer, bar, step=step, seconds=time.time() - began,
                     losses=torch.stack(losses).tolist() if losses else [], fingerprint=fingerprint, bpe=bpe.tokens)
            if evaluate_now and not leave:
                record = {"step": step, "val_loss": val_loss, "lr": optimizer.param_groups[0]["lr"] if step else 0.0,
                          "seconds": round(time.time() - began, 3)}
                if losses:
                    record |= {"train_loss": torch.stack(losses).mean().item(),
                               "tokens": round(step * train.tokens_per_batch)}
                    bar.write(f"step {step:6d}   train_loss {record['train_loss']:.4f}   val_loss {val_loss:.4f}   "
                              f"{record['seconds']:6.1f} s", file=sys.stdout)
                append(out_dir / "log.jsonl", record)
                losses = []
            if last or leave:
                break

            # a step: the loss and its gradients, then the optimizer
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = lr_at(step, peak, s)
            if s.dropout:                           # dropout depends on seed and step: nothing to restore
                torch.manual_seed(int(np.random.SeedSequence([s.seed, step]).generate_state(1)[0]))
            losses.append(gradients(network, train(step, s), s, autocast))
            if step % 10 == 0:                      # not oftener: it waits for the device
                loss = losses[-1].item()
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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)       # all is saved: nothing to wait for any more
    seconds, (german_side, english_side) = time.time() - began, zip(*pairs["test"])
    hypotheses = translate(model, bpe, german_side, s, autocast)
    decoding, score = time.time() - began - seconds, bleu(hypotheses, english_side)
    write(out_dir / "hypotheses.en", "".join(line + "\n" for line in hypotheses).encode())
    append(out_dir / "log.jsonl", {
        "step": step, "val_loss": val_loss, "seconds": round(seconds, 3), "bleu": score, "beam": s.beam,
        "length_penalty": s.length_penalty, "decode_seconds": round(decoding, 3), "final": True})
    triples = list(zip(german_side, hypotheses, english_side))
    for de, ours, en in random.Random(s.seed).sample(triples, min(10, len(triples))):
        print(f"  {de}\n  -> {ours}" + ("" if ours == en else f"\n     (reference: {en})"))
    print(f"BLEU {score:.2f} on {len(triples)} test pairs (beam {s.beam}, {len(triples) / decoding:.0f} sentences/s), "
          f"val_loss {val_loss:.4f} after {step} steps of {s.opt} in {seconds:.0f} s: {out_dir}")


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
