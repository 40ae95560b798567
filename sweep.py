"""
Run a training script many times and see which settings are best, put a claim of a paper to the test, or draw the curves
of any runs.

    python sweep.py --grid lr=1e-4:1e-1:log8 weight_decay=0,0.01,0.1 --fixed "opt=adamw steps=500" --seeds 3
    python sweep.py --random 40 --space "lr=log(1e-4,1e-1) momentum=uniform(0.5,0.99) damping=log(1e-6,1e-3)" ...
    python sweep.py --two_stage --runs 100 --space ...      a wide random search, then one around its best fifth
    python sweep.py --experiment zero_shot --plot out.png   a paper's claim, what was measured, and whether it held
    python sweep.py --curves out/a out/b --plot out.png     runs beside each other; or sweeps: means over seeds

The same command again goes on where a stopped or killed sweep was. A finished run is never run again. A half-done one
is resumed from its checkpoint. Two flags ask for less:

    --report            show what is there so far and run nothing (--report --out_dir DIR: whatever DIR holds)
    --print_commands    print the script's own command for each run that is not finished, one a line:
                        ... --print_commands | tr '\\n' '\\0' | xargs -0 -P2 -I{} sh -c {}        or a Slurm array

A key of --grid, --fixed or --space is a flag of the script, without dashes. What the script has no flag for goes into
its --opt_kwargs. (Two options of optimizers are called like flags: write opt_kwargs.dtype and opt_kwargs.seed.) Each
run has a folder under --out_dir, named by a hash of the script and its flags. Its result is in the last line of its
log.jsonl, which has "final": true: the first of bleu, test_acc, val_acc and val_loss that is there, or --metric. A test
set that settings were chosen on proves nothing any more.

Exit status: 0 all runs are done or have diverged, which is a result; 1 some failed or were killed, 2 bad input, 129,
130 or 143 stopped by SIGHUP, Ctrl-C or SIGTERM, after the runs have saved. `kill -9` leaves the runs alone: they go on
to their end, and a new sweep in the same folder waits for them.
"""
import argparse
import collections
import contextlib
import difflib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import pathlib
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from typing import NamedTuple

from tqdm import tqdm

try:
    import fcntl
except ImportError:                                 # Windows has no flock: there, start one sweep at a time
    fcntl = None

HERE = pathlib.Path(__file__).resolve().parent
METRICS = {"bleu": dict(sign=-1, digits=2), "test_acc": dict(sign=-1, digits=4), "val_acc": dict(sign=-1, digits=4),
           "val_loss": dict(sign=1, digits=4)}      # sign: -1 if more is better; digits: as printed

# What Lin et al. 2024 publish of their random search: its second stage, around the best of a first one that is not
# published. cnn: ResNet-34 on CIFAR-100. vit: Swin on ImageWoof, whose lrs they multiply by 128/512, as is done here.
# Their damping is eps in the adam and rmsprop families here, and their lr_cov is 1 - beta2 and 1 - alpha.
PAPER_SPACES = {
    "paper:cnn:sgd": "lr=log(5e-4,0.5) momentum=log(0.1,0.99) weight_decay=log(1e-4,0.05)",
    "paper:cnn:adamw": "lr=log(1e-4,8e-3) eps=log(1e-12,1e-6) beta2=one_minus_log(5e-4,1e-2) beta1=log(0.1,0.99) "
                       "weight_decay=log(5e-4,0.05)",
    "paper:cnn:rf_rmsprop": "lr=log(2e-3,1e-2) eps=log(1e-5,1e-4) alpha=one_minus_log(8e-4,5e-3) "
                            "momentum=log(0.1,0.99) weight_decay=log(1e-4,0.05)",
    "paper:vit:sgd": "lr=log(0.025,0.25) momentum=log(0.1,0.99) weight_decay=log(1e-8,1e-5)",
    "paper:vit:adamw": "lr=log(2.5e-5,7.5e-4) eps=log(1e-10,1e-7) beta2=one_minus_log(5e-4,0.1) beta1=log(0.5,0.99) "
                       "weight_decay=log(5e-4,0.1)",
    "paper:vit:rf_rmsprop": "lr=log(2.5e-5,5e-4) eps=log(5e-5,8e-4) alpha=one_minus_log(8e-3,0.1) "
                            "momentum=log(0.5,0.99) weight_decay=log(5e-5,1e-3)",
    "paper:vit:shampoo": "lr=log(1.25e-4,1.25e-2) damping=log(1e-10,1e-7) lr_cov=log(5e-4,0.1) momentum=log(0.5,0.99) "
                         "weight_decay=log(5e-4,0.1)",
    "paper:vit:if_shampoo": "lr=log(5e-5,2e-4) damping=log(5e-5,5e-4) lr_cov=log(0.2,0.8) momentum=log(0.5,0.9) "
                            "weight_decay=log(1e-6,1e-3) riemannian_momentum=log(0.1,0.8)",
}


# ---- The command line ------------------------------------------------------------------------------------------------


def fail(message, status=2):
    """The one way out for bad input: a line that says what to do, and a status. Never a traceback."""
    print(f"sweep.py: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.error = fail                                  # one line, without the usage
    kind, mode = p.add_mutually_exclusive_group(), p.add_mutually_exclusive_group()
    several, flag = dict(nargs="+", action="extend"), dict(action="store_true")
    kind.add_argument("--grid", metavar="KEY=VALUES", **several,
                      help="all combinations of these: a,b,c or 1e-4:1e-1:log8 (8 values) or 0:1:lin5")
    kind.add_argument("--random", metavar="N", type=int, help="N random draws from --space")
    kind.add_argument("--two_stage", **flag,
                      help="--runs draws from --space, then as many from the box around the best fifth of them")
    kind.add_argument("--experiment", metavar="NAME", choices=EXPERIMENTS, help=", ".join(EXPERIMENTS))
    kind.add_argument("--curves", metavar="DIR", **several, help="run nothing: compare the runs in these folders")
    mode.add_argument("--report", **flag, help="run nothing, show what is there")
    mode.add_argument("--print_commands", **flag, help="print a command for each run that is not finished")
    p.add_argument("--script", default="nanogpt_train.py", help="or cifar_train.py, translate_train.py, one like them")
    p.add_argument("--fixed", metavar="KEY=VALUE", **several, help="the same for all runs")
    p.add_argument("--seeds", metavar="N", type=int, help="each setting N times, with seed=1 to N")
    p.add_argument("--space", metavar="KEY=RANGE", **several,
                   help="log(1e-4,1e-1), one_minus_log(1e-3,0.5) for 0.5 to 0.999, uniform(0.5,0.99) or choice(a,b); "
                        "in quotes, for the shell. Or a paper's: " + ", ".join(PAPER_SPACES))
    p.add_argument("--runs", metavar="N", type=int, help="of each stage of --two_stage (default 100)")
    p.add_argument("--seed", type=int, help="of the random draws (default 0)")
    p.add_argument("--scale", choices=("cpu", "gpu"), help="of an experiment: minutes on two cores (default), or a GPU")
    p.add_argument("--jobs", metavar="N", type=int,
                   help="runs at a time (default: one per GPU, or one per core; OMP_NUM_THREADS is 1 unless it is set)")
    p.add_argument("--out_dir", help="default out/sweep-SCRIPT or out/sweep-EXPERIMENT-SCALE")
    p.add_argument("--retry", **flag, help="run again what failed (after the cause is mended)")
    p.add_argument("--keep_checkpoints", **flag, help="default: a finished run's ckpt.pt is deleted")
    p.add_argument("--metric", choices=METRICS, help="what counts (default: the first of these that is there)")
    p.add_argument("--plot", metavar="FILE", help="draw it: .png, .pdf, .svg (needs matplotlib)")
    args, unknown = p.parse_known_args()
    if unknown:
        name = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(name, p._option_string_actions, n=1, cutoff=0)[0]
        fail(f"unknown flag {name}: did you mean {near}? (flags of the script go into --fixed \"{name.strip('-')}=...\""
             " or --grid)")

    given = {name for name, value in vars(args).items() if value != p.get_default(name)}
    for name in given:
        value = getattr(args, name)
        if type(value) is int and value < (name != "seed"):
            fail(f"--{name} {value}: it must be at least {int(name != 'seed')}")
        if isinstance(value, (str, list)) and not "".join(value).strip():
            fail(f"--{name} is empty")              # a shell variable that is not set, say
    for name, owners in {"space": {"random", "two_stage"}, "seed": {"random", "two_stage"}, "runs": {"two_stage"},
                         "scale": {"experiment"}}.items():
        if name in given and not owners & given:
            fail(f"--{name} is for --{' and --'.join(sorted(owners))}: leave it out" +
                 " (the script's seed goes into --fixed seed=N; or use --seeds N)" * (name == "seed"))
    for name, others in {"experiment": {"script", "fixed", "seeds", "metric"}, "print_commands": {"plot"}, "curves": {
            "script", "fixed", "seeds", "report", "print_commands", "jobs", "out_dir", "retry"}}.items():
        if name in given and given & others:
            fail(f"--{min(given & others)} does not go together with --{name}: leave it out")
    if {"random", "two_stage"} & given and not args.space:
        fail("random draws need --space, say --space \"lr=log(1e-4,1e-1)\"")
    if not given & {"grid", "random", "two_stage", "experiment", "curves", "fixed", "seeds", "report"}:
        fail("nothing to run: give --grid, --random, --two_stage, --fixed, --seeds, --experiment, --curves or --report "
             "(--help shows examples)")
    if args.plot:                                   # before an hour of runs, not after it
        path = pathlib.Path(args.plot)
        if path.suffix.lower() not in (".png", ".pdf", ".svg") or path.is_dir() or not path.parent.is_dir():
            fail(f"--plot {args.plot}: name a .png, .pdf or .svg file in a folder that exists")
        if not importlib.util.find_spec("matplotlib"):
            fail("--plot needs matplotlib: pip install matplotlib, then the same command; nothing will be run twice")
    args.scale, args.script = args.scale or "cpu", whole_name(args.script)
    args.out_dir = pathlib.Path(args.out_dir or ("out/sweep-" + (
        f"{args.experiment}-{args.scale}" if args.experiment else pathlib.Path(args.script).stem)))
    return args


# ---- Values: grids and random draws ----------------------------------------------------------------------------------


def plain(text):
    """A number in its shortest form, so that 1e-3 and 0.001 name the same run; other text as it is."""
    try:
        x = float(text)
    except ValueError:
        return text
    if not math.isfinite(x) or "_" in text or re.match(r"[-+]?0\d", text):              # 007 is a name
        return text
    if x.is_integer() and len(text) > 15:           # 2**53: where floats get coarse
        return text
    return str(int(x)) if x.is_integer() and abs(x) < 1e15 else repr(x)


def pairs(texts, flag):
    """["lr=1 seed=2", "opt=adamw"] -> {"lr": "1", "seed": "2", "opt": "adamw"}; spaces within (...) do not separate."""
    found = {}
    for token in re.findall(r"(?:\([^()]*\)|\S)+", " ".join(texts or [])):
        key, _, value = token.partition("=")
        if not value or not re.fullmatch(r"(opt_kwargs\.)?[A-Za-z]\w*", key):
            fail(f"{flag} {token}: write it as KEY=VALUE, the key without dashes")
        if key in found:
            fail(f"{flag} has {key} twice: give all its values at once")
        if key in ("out_dir", "resume", "help", "opt_kwargs"):
            fail(f"{flag} {key}: leave it out. " + ("What the script has no flag for goes there, as KEY=VALUE"
                 if key == "opt_kwargs" else "The sweep gives every run its own folder"))
        found[key] = value
    return found


def split(text):
    """"a,(b,c)" -> ["a", "(b,c)"]."""
    return [item.strip() for item in re.findall(r"(?:\([^()]*\)|[^,])+", text)]


class Space(NamedTuple):
    """Where one hyperparameter is drawn from. values: the two ends, or all choices. In one_minus_log they are ends of
    1 - x, which is log-uniform: the way to draw a beta near 1."""
    kind: str                                       # log, one_minus_log, lin or choice
    values: tuple

    @staticmethod
    def between(kind, a, b, where):
        with contextlib.suppress(ValueError):
            ends = float(a), float(b)
            low, high = {"lin": (-math.inf, math.inf), "log": (0, math.inf), "one_minus_log": (0, 1)}[kind]
            if low < ends[0] < ends[1] < high:
                return Space(kind, ends)
        fail(f"{where}: a range goes from one number to a larger one" + ", both above 0" * (kind != "lin")
             + " and below 1" * (kind == "one_minus_log"))

    def at(self, u):
        """The value at 0 <= u <= 1, as text with six digits, ten where it may be close to 1."""
        if self.kind == "choice":
            return self.values[min(int(u * len(self.values)), len(self.values) - 1)]
        a, b = self.values
        if self.kind == "one_minus_log":
            return plain(f"{1 - a ** (1 - u) * b**u:.10g}")
        return plain(f"{a ** (1 - u) * b**u if self.kind == 'log' else a * (1 - u) + b * u:.6g}")

    def around(self, texts):
        """The smallest space of this kind that holds all these values."""
        if self.kind == "choice":
            return Space(self.kind, tuple(value for value in self.values if value in texts))
        values = [round(1 - float(text), 10) if self.kind == "one_minus_log" else float(text) for text in texts]
        return Space(self.kind, (min(values), max(values)))


def parse_space(texts):
    """["lr=log(1e-4,1e-1)", ...] -> {"lr": Space, ...}. paper:... stands for what PAPER_SPACES has under this name."""
    spaces = {}
    texts = re.sub(r"paper:\S+", lambda name: PAPER_SPACES.get(name[0]) or fail(
        f"--space {name[0]}: there is no such space, there are {', '.join(PAPER_SPACES)}"), " ".join(texts or []))
    for key, text in pairs([texts], "--space").items():
        where, parts = f"--space {key}={text}", re.fullmatch(r"(log|one_minus_log|uniform|choice)\((.*)\)", text)
        kind, values = (parts[1], split(parts[2])) if parts else ("", [])
        if not values or kind != "choice" and len(values) != 2:
            fail(f"{where}: write log(a,b), one_minus_log(a,b), uniform(a,b) or choice(a,b,...), in quotes; the rest is"
                 " for --fixed")
        spaces[key] = (Space(kind, tuple(dict.fromkeys(map(plain, values)))) if kind == "choice" else
                       Space.between("lin" if kind == "uniform" else kind, *values, where))
    return spaces


def grid_values(text, where):
    """"0,1e-3:1e-1:log3" -> ["0", "0.001", "0.01", "0.1"]."""
    if "" in text.split(","):
        fail(f"{where}: there is nothing before or after a comma")
    values = []
    for item in split(text):
        spread = re.fullmatch(r"([^:]+):([^:]+):(log|lin)(\d{1,6})", item)
        if spread and int(spread[4]) > 1:
            space, last = Space.between(spread[3], spread[1], spread[2], where), int(spread[4]) - 1
            values += [space.at(i / last) for i in range(last + 1)]
        elif re.match(r"[-+.]?\d[^:]*:", item):     # text may have a colon, too
            fail(f"{where}: write a range as FROM:TO:log8 or FROM:TO:lin8, for 8 values, and at least 2")
        else:
            values.append(plain(item))
    return list(dict.fromkeys(values))


def draws(spaces, n, seed, stage=1):
    """n settings. Draw i of a key depends on nothing but (seed, stage, key, i): a restarted sweep draws the same, and
    one with more runs begins with those of one with fewer."""
    return [{key: space.at(random.Random(f"{seed} {stage} {key} {i}").random()) for key, space in spaces.items()}
            for i in range(n)]


def planned(args):
    """-> make(flags) -> the runs of one setting, one a seed; and all settings, or for --two_stage their spaces."""
    fixed, spaces, known = pairs(args.fixed, "--fixed"), parse_space(args.space), flags_of(args.script)
    grid = {key: grid_values(text, f"--grid {key}={text}") for key, text in pairs(args.grid, "--grid").items()}
    keys = [*fixed, *grid, *spaces]
    names = [key if key in ("opt_kwargs.dtype", "opt_kwargs.seed") else key.removeprefix("opt_kwargs.") for key in keys]
    for key, name in zip(keys, names):
        if names.count(name) > 1 or key == "seed" and args.seeds:
            fail(f"{name} is given twice, fixed, varied, with opt_kwargs or by --seeds: give it once")
        if key not in known:
            import optim                            # it takes seconds, and mostly nobody needs to know
            takes = {name for kind in optim.OPTIMIZERS.values() for name in kind.takes()}
            if key.removeprefix("opt_kwargs.") not in takes:
                near = difflib.get_close_matches(key, known | takes, n=1, cutoff=0)[0]
                fail(f"{key} is neither a flag of {args.script} nor an option of an optimizer: did you mean {near}?")
    size = args.random or (args.runs or 100) * args.two_stage or math.prod(map(len, grid.values()))
    if size * (args.seeds or 1) > 10**6:
        fail("more than a million runs would not end in your lifetime: make the grid coarser")

    def make(flags):
        seeds = [{"seed": seed} for seed in range(1, args.seeds + 1)] if args.seeds else [{}]
        return [Run.of(args.script, fixed | flags | seed) for seed in seeds]
    return make, (spaces if args.two_stage else draws(spaces, args.random, args.seed or 0) if args.random else
                  [dict(zip(grid, values)) for values in itertools.product(*grid.values())])


# ---- Runs: what one is, where it lives, what came of it --------------------------------------------------------------


def whole_name(script):
    """The one name of a script, however it was given: beside this file its own, elsewhere the whole path."""
    for path in (script, HERE / script):
        if os.path.isfile(path):
            path = pathlib.Path(path).resolve()
            return path.name if path.parent == HERE else str(path)
    fail(f"--script {script}: there is no such file")


@functools.cache
def flags_of(script):
    """The flags that a script knows, read from its source, since starting it takes seconds: the fields of its class
    Settings, or what it gives to add_argument."""
    try:
        source = (HERE / script).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        fail(f"cannot read {HERE / script}: name a script in Python with --script")
    fields = re.search(r"^class Settings\b.*\n(?:(?: .*)?\n)+|\Z", source, re.M)[0]
    return {*re.findall(r"^    (\w+): \w", fields, re.M), *re.findall(r"""add_argument\(\s*["']--(\w+)""", source)}


@dataclass(frozen=True)
class Run:
    """A script and its flags: text by name, sorted, so that equal settings are one run."""
    script: str
    flags: tuple

    @staticmethod
    def of(script, flags):
        return Run(str(script), tuple(sorted((key, plain(str(value))) for key, value in flags.items())))

    @property
    def name(self):
        return hashlib.sha256(json.dumps([self.script, self.flags]).encode()).hexdigest()[:12]

    def __getitem__(self, key):
        return dict(self.flags).get(key)

    def command(self, folder):
        """The script's own. A checkpoint is resumed: what that holds is not said again, but where to compute is."""
        known = flags_of(self.script)
        flags = [f"--{key}={value}" for key, value in self.flags if key in known]
        others = [f"{key.removeprefix('opt_kwargs.')}={value}" for key, value in self.flags if key not in known]
        if (folder / "ckpt.pt").exists():
            flags, others = ["--resume"] + [flag for flag in flags if flag.startswith("--device=")], []
        return [sys.executable, str(HERE / self.script), *flags, *(["--opt_kwargs", *others] if others else []),
                f"--out_dir={folder}"]


@dataclass
class Result:
    """What came of a run: done, diverged, failed or unfinished. value: its metric at the end, if it is done."""
    run: Run
    folder: pathlib.Path
    state: str = "unfinished"
    message: str = ""                               # of one that diverged or failed
    metric: str = "val_loss"
    value: float = math.nan

    @property
    def score(self):
        """The value, but less is better, and without one it is infinite: for sorting."""
        return METRICS[self.metric]["sign"] * self.value if self.state == "done" else math.inf

    def log(self):
        return read_jsons(self.folder / "log.jsonl")


def read_jsons(path):
    """The dicts in a file, one a line; a line that a kill cut short is left out. No file: []. One that is there and
    cannot be read must not pass for that, or a run would be done again: that error is raised."""
    records = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def read_result(run, folder, metric=None):
    """Look into its folder. A log that has its last line counts, whatever happened to the process after that."""
    log, end, result = read_jsons(folder / "log.jsonl"), read_jsons(folder / "failed.json"), Result(run, folder)
    if log and log[-1].get("final"):
        there = [name for name in METRICS if name in log[-1]]
        result.metric = metric or (there or ["val_loss"])[0]
        value = log[-1].get(result.metric)
        if not isinstance(value, (int, float)):
            result.state, result.message = "failed", (f"its log ends without a number for {result.metric}; it has "
                                                      f"{', '.join(there) or 'no metric'}")
        elif not math.isfinite(value):
            result.state, result.message = "diverged", f"its {result.metric} is {value}"
        else:
            result.state, result.value = "done", value
    elif end:
        result.state, result.message = "diverged" if end[0]["status"] == 3 else "failed", end[0]["message"]
    return result


def read_run(folder):
    """The run that a folder says it holds; None if it says nothing that can be understood."""
    for known in read_jsons(folder / "run.json"):
        return Run.of(known["script"], known["flags"])


def write_atomically(path, content):
    """All of it or nothing: written beside, then renamed over the old file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content) + "\n")
    os.replace(part, path)


# ---- Running them ----------------------------------------------------------------------------------------------------

# exit statuses of a process that was stopped or killed, not of one that failed
STOPPED = {130, 143} | {-number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)}


def lock(out_dir):
    """Keep a second sweep out of a folder -> an open file. The runs inherit it, and the lock lives as long as anybody
    has it: a new sweep waits here for the runs of a killed one, so none of them is done twice."""
    file = open(out_dir / ".lock", "a")
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another sweep, or for the runs of a killed one, in {out_dir}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
    return file


def gpus():
    """The GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch                                    # it takes seconds: only where something is run
    n, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:n] if visible else [str(i) for i in range(n)]


class Unfinished(Exception):
    """Some of the runs that were asked for have no result yet: (how many, of how many)."""


class Lab:
    """Does the runs that it is asked for, or says what would have to be done. mode: run, report or print.
    strict: give up if a run failed, since an experiment cannot do without it."""

    def __init__(self, args):
        self.out_dir, self.scale, self.jobs, self.retry = args.out_dir, args.scale, args.jobs, args.retry
        self.keep_checkpoints, self.metric, self.strict = args.keep_checkpoints, args.metric, bool(args.experiment)
        self.mode = "report" if args.report else "print" if args.print_commands else "run"
        self.asked, self.lock = [], None

    def result(self, run):
        return read_result(run, self.out_dir / run.name, self.metric)

    def missing(self, runs):
        """Those that are still to be done."""
        states = ("unfinished", "failed") if self.retry else ("unfinished",)
        return [run for run in runs if self.result(run).state in states]

    def results(self, runs):
        """The results of these runs, in their order, after doing what is missing. Raises Unfinished where that is not
        to be done (a report, printing), or where a run was killed from outside."""
        runs = list(dict.fromkeys(runs))
        self.asked += [run for run in runs if run not in self.asked]
        if self.mode != "report":
            for run in runs:
                self.note(run)
        if self.mode == "run" and self.missing(runs):
            self.lock = self.lock or lock(self.out_dir)
            self.do(self.missing(runs), len(runs))  # asked again: the sweep that we waited for may have done some
        missing, results = self.missing(runs), [self.result(run) for run in runs]
        if self.mode == "print":
            for run in missing:
                print(shlex.join(run.command((self.out_dir / run.name).absolute())))
        failed = [result for result in results if result.state == "failed"]
        if failed and self.strict and not (self.mode == "print" and self.retry):
            fail(f"{len(failed)} of {len(runs)} runs failed, so nothing can be said. The first, {failed[0].folder}: "
                 f"{failed[0].message}. Mend it and add --retry", status=1)
        if n := len(missing) if self.mode == "print" else sum(r.state == "unfinished" for r in results):
            raise Unfinished(n, len(runs))
        return results

    def note(self, run):
        """Make the run's folder and write down in it what its name stands for."""
        folder = self.out_dir / run.name
        if read_run(folder) != run:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "run.json", {"script": run.script, "flags": dict(run.flags)})

    def start(self, run, gpu):
        """Start it, or resume it, on this GPU, or with one thread: N runs of one thread are done before N of N."""
        folder = self.out_dir / run.name
        (folder / "failed.json").unlink(missing_ok=True)
        where = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with open(folder / "stdout.txt", "w") as out, open(folder / "stderr.txt", "w") as err:
            return subprocess.Popen(run.command(folder), env=os.environ | where, stdin=subprocess.DEVNULL, stdout=out,
                                    stderr=err, start_new_session=True,     # Ctrl-C is for us, who pass it on
                                    pass_fds=(self.lock.fileno(),) if fcntl else ())

    def ended(self, run, status):
        """What came of a run whose process has ended. That it failed or diverged is written down, since its log can not
        say so. One that was stopped or killed stays unfinished."""
        folder, result = self.out_dir / run.name, self.result(run)
        if result.state == "unfinished" and status not in STOPPED:
            said = re.split(r"[\r\n]+", (folder / "stderr.txt").read_text(errors="replace").strip())[-1]
            message = (said or "it said nothing") if status else "it ended without a final line in log.jsonl"
            message = message.removeprefix(f"{pathlib.Path(run.script).name}: ").replace(str(folder), run.name)
            if status == 3:                         # what diverged, and when; the advice after that is for one run
                message = message.split(". ")[0]
            if status == 0:                         # a checkpoint at the end, a log that is damaged: to begin anew
                (folder / "ckpt.pt").unlink(missing_ok=True)
            write_atomically(folder / "failed.json", {"status": status, "message": message})
            result = self.result(run)
        if result.state in ("done", "diverged") and not self.keep_checkpoints:
            (folder / "ckpt.pt").unlink(missing_ok=True)
        return result

    def do(self, waiting, total):
        """Do these runs, some at a time; total: with those that are finished already."""
        devices = [] if all(run["device"] == "cpu" for run in waiting) else gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jobs, keys = self.jobs or len(devices) or cores, varied(self.asked)
        running, finished, best = {}, total - len(waiting), None        # running: {process: (run, slot)}
        stopped_by, told = [], 0
        before = {number: signal.signal(number, lambda number, frame: stopped_by.append(number))
                  for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
                  if signal.getsignal(number) is not signal.SIG_IGN}    # nohup ignores SIGHUP: so do we, then
        bar = tqdm(total=total, initial=finished, unit="run", disable=total == 1,
                   mininterval=0.5 if sys.stderr.isatty() else 30)
        while (waiting and not stopped_by) or running:
            if told < len(stopped_by):              # the first signal lets them save, the second does not
                for process in running:
                    process.send_signal(signal.SIGKILL if told else signal.SIGTERM)
                told += 1
            for process in [process for process in running if process.poll() is not None]:
                result = self.ended(running.pop(process)[0], process.returncode)
                if result.state != "unfinished":
                    finished, best = finished + 1, min(best or result, result, key=lambda result: result.score)
                    bar.write(line_of(result, keys), file=sys.stdout)
                    bar.set_postfix_str(f"best {line_of(best, keys)}" * (best.state == "done"), refresh=False)
                    bar.update()
            while waiting and len(running) < jobs and not stopped_by:
                slot = min(set(range(jobs)) - {slot for _, slot in running.values()})
                run = waiting.pop(0)
                running[self.start(run, devices[slot % len(devices)] if devices else None)] = run, slot
            time.sleep(0.05)
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        if stopped_by:
            print(f"stopped: {finished} of {total} runs are finished. The same command goes on", flush=True)
            sys.exit(128 + stopped_by[0])


def two_stage(lab, searches, n, seed):
    """Random search in two stages, the protocol of [RF]: n draws from each space, then n from the smallest box around
    the best fifth of them. searches: {name: (make, spaces)}, make(flags) -> runs. -> {name: all results}."""
    def stage(number, spaces):
        asked = {name: [run for flags in draws(spaces[name], n, seed, number) for run in searches[name][0](flags)]
                 for name in spaces}
        lab.results([run for runs in asked.values() for run in runs])
        return {name: [lab.result(run) for run in dict.fromkeys(runs)] for name, runs in asked.items()}

    first, narrow = stage(1, {name: spaces for name, (_, spaces) in searches.items()}), {}
    for name, results in first.items():
        best = [s.flags for s in by_setting(results) if s.sound][:max(2, n // 5)]
        if best:                                    # nothing to search around if none came to a result
            narrow[name] = {key: space.around([flags[key] for flags in best])
                            for key, space in searches[name][1].items()}
    second = stage(2, narrow)
    return {name: results + second.get(name, []) for name, results in first.items()}


# ---- Tables ----------------------------------------------------------------------------------------------------------


class Setting:
    """The results of one setting, one a seed. mean, spread (standard deviation): of those that are done. sound: none of
    its seeds came to grief. score: the mean, but less is better, and infinite unless sound."""

    def __init__(self, flags, results):
        done = [result for result in results if result.state == "done"]
        self.flags, self.results, self.seeds = flags, results, len(done)
        self.metric = done[0].metric if done else "val_loss"
        self.mean = statistics.fmean(result.value for result in done) if done else math.nan
        self.spread = statistics.stdev(result.value for result in done) if len(done) > 1 else 0.0
        self.sound = bool(done) and not any(result.state in ("diverged", "failed") for result in results)
        self.score = METRICS[self.metric]["sign"] * self.mean if self.sound else math.inf

    def words(self):
        """Mean and spread as text."""
        digits = METRICS[self.metric]["digits"]
        return f"{self.mean:.{digits}f}" * bool(self.seeds) + f" +- {self.spread:.{digits}f}" * (self.seeds > 1) or "-"


def by_setting(results, without={"seed"}):
    """Results that differ in the seed alone are one setting. Best first."""
    found = {}
    for result in results:
        flags = tuple(pair for pair in result.run.flags if pair[0] not in without)
        found.setdefault((result.run.script, flags), []).append(result)
    return sorted((Setting(dict(flags), results) for (_, flags), results in found.items()),
                  key=lambda s: (s.score, [(key, by_size(value)) for key, value in s.flags.items()]))


def by_size(text):
    """For sorting: numbers by size, then words; what is not set comes first."""
    try:
        return (1, float(text), "")
    except (TypeError, ValueError):
        return (0, 0.0, "") if text is None else (2, 0.0, text)


def varied(runs):
    """The flags in which these runs differ, without the seed."""
    keys = sorted({key for run in runs for key, _ in run.flags} - {"seed"})
    return [key for key in keys if len({run[key] for run in runs}) > 1]


def phrase(flags, keys):
    return ", ".join(f"{key} {value}" for key, value in dict(flags).items() if key in keys)


def tally(results):
    states = [result.state for result in results]
    return ", ".join(f"{states.count(state)} {state}" for state in ("done", "diverged", "failed", "unfinished")
                     if state in states)


def line_of(result, keys):
    """A result in one line; keys: the flags to name."""
    value = f"{result.metric} {result.value:.{METRICS[result.metric]['digits']}f}" * (result.state == "done")
    what = phrase(result.run.flags, {*keys, "seed"})
    return ": ".join(part for part in (value or result.state, what, result.message) if part)


def columns(rows):
    """Rows of text -> one text, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def crossing(cells, corner):
    """{(row, column): text} -> one text."""
    across, down = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (1, 0))
    rows = [[str(row), *(cells.get((row, column), "-") for column in across)] for row in down]
    return columns([[corner, *map(str, across)], *rows])


def table(found, keys):
    """-> text: a line a setting, best first."""
    rows = [[s.words(), str(s.seeds), *(s.flags.get(key, "") for key in keys),
             tally([result for result in s.results if result.state != "done"])] for s in found]
    return columns([[found[0].metric, "seeds", *keys, ""], *rows])


def grid_map(found, keys):
    """-> text: two flags across and down, and the mean result of each pair, the best with a star."""
    across, down = sorted(keys, key=lambda key: -len({s.flags.get(key) for s in found}))
    some = sorted(found, key=lambda s: (by_size(s.flags.get(down)), by_size(s.flags.get(across))))
    return crossing({(s.flags.get(down, "default"), s.flags.get(across, "default")): f"{s.words().split()[0]}"
                     f"{'*' * (s is found[0] and s.sound)}" for s in some}, f"{down} \\ {across}")


def is_grid(found, keys):
    """Whether a map of two flags would be filled, at least by half: random draws would give a diagonal of it."""
    return len(keys) == 2 and 2 * len(found) >= math.prod(len({s.flags.get(key) for s in found}) for key in keys)


def report(results):
    """-> text: table, map if two flags vary, and every failure, for each script that occurs."""
    lines = []
    for script in sorted({result.run.script for result in results}):
        some = [result for result in results if result.run.script == script]
        keys, found = varied([result.run for result in some]), by_setting(some)
        same = phrase(some[0].run.flags, {key for key, _ in some[0].run.flags} - {*keys, "seed"})
        lines += [f"{len(some)} runs of {pathlib.Path(script).name}: {tally(some)}",
                  f"all with {same or 'the defaults'}", table(found, keys)]
        if is_grid(found, keys):
            lines.append(grid_map(found, keys))
        lines += [line_of(result, keys) for state in ("failed", "diverged") for result in some if result.state == state]
    return "\n".join(lines)


# ---- Pictures --------------------------------------------------------------------------------------------------------

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()     # Okabe and Ito's, for the colour-blind
DASHES, MARKERS = ("-", "--", "-.", ":"), "os^Dv"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
BEST = dict(color="black", linestyle=":", marker="*", markersize=16, zorder=9)


# One pair of axes. log: those that are logarithmic, as "x", "y" or "xy"; band: a shaded range of y; border: a line at x
Panel = collections.namedtuple("Panel", "title x y log band border", defaults=("", (), None))
# y over x: numbers, or names, which stand side by side. y may be several lists: lines that share a label. low and high:
# the ends of error bars, or of a band where there are many points. style: matplotlib's, beside the usual one
Curve = collections.namedtuple("Curve", "x y low high style", defaults=([], [], {}))


def escaped(text):
    """Text for matplotlib, to which $ begins a formula."""
    return text.replace("$", r"\$")


def wrapped(text, width):
    """Text in lines of about the same length."""
    return textwrap.fill(text, len(text) // math.ceil(len(text) / width) + 8) if len(text) > width else text


def curves(title, panels, path):
    """{Panel: {label: Curve}} -> a file, and matplotlib's figure. All pictures are made here. Panels with the same
    labels, or with the same words at the y axis, stand together and share a legend. There, the same words at an axis
    mean the same range."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context({"font.size": 13, "axes.titlesize": 13, "axes.grid": True, "grid.alpha": 0.3}):
        groups = []
        for panel in panels:
            if not groups or panel.y != groups[-1][-1].y and list(panels[panel]) != list(panels[groups[-1][-1]]):
                groups.append([])
            groups[-1].append(panel)
        shapes = [(math.ceil(len(group) / 3), min(len(group), 3)) if len(group) != 4 else (2, 2) for group in groups]
        rows = [rows for rows, _ in shapes]
        figure = Figure(figsize=(13.3, max(7.5, 4.2 * sum(rows))), dpi=120, layout="constrained")
        figure.suptitle(escaped("\n".join(wrapped(line, 105) for line in title.splitlines())), fontsize=15)
        parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=rows)[:, 0]
        for group, shape, part in zip(groups, shapes, parts):
            labels, shared = {label: None for panel in group for label in panels[panel]}, {}
            for i, panel in enumerate(group):
                axes = part.add_subplot(*shape, i + 1, sharex=shared.get(("x", panel.x)),
                                        sharey=shared.get(("y", panel.y)))
                shared |= {("x", panel.x): axes, ("y", panel.y): axes}
                axes.set(xlabel=escaped(panel.x), ylabel=escaped(panel.y),
                         title=escaped(wrapped(panel.title, 90 // shape[1])))
                fill(axes, panel, panels[panel], list(labels))
                labels |= {label: line for line, label in zip(*axes.get_legend_handles_labels())}
            if len(labels) > 1:
                part.legend(labels.values(), map(escaped, labels), loc="outside right center")
        figure.savefig(path)
        print(f"figure: {path}")
        return figure


def fill(axes, panel, lines, labels):
    """Draw the curves of one panel. labels: all that share its legend; the place among them gives colour and dashes."""
    names = list(dict.fromkeys(x for curve in lines.values() for x in curve.x if isinstance(x, str)))
    for label, (xs, y, low, high, style) in lines.items():
        i = labels.index(label)
        style = dict(color=COLOURS[i % 7], linestyle="none" if names else DASHES[i % 4], linewidth=2, markersize=8,
                     marker=MARKERS[i % 5] if len(xs) <= 25 else "") | style
        if names:                                   # pairs side by side
            xs = [names.index(x) + 0.12 * (i - (len(labels) - 1) / 2) for x in xs]
        for j, line in enumerate(y if y and isinstance(y[0], list) else [y]):
            axes.plot(xs, line, label="" if j else label, **style)
        if low and style["marker"]:
            ends = [[b - a for a, b in zip(low, y)], [b - a for a, b in zip(y, high)]]
            axes.errorbar(xs, y, ends, fmt="none", ecolor=style["color"], capsize=4)
        elif low:
            axes.fill_between(xs, low, high, color=style["color"], alpha=0.2, linewidth=0)
    if panel.band:
        axes.axhspan(*panel.band, color="grey", alpha=0.2, linewidth=0)
    if panel.border is not None:
        axes.axvline(panel.border, color="grey", linestyle="--")
    if names:
        axes.set_xticks(range(len(names)), [escaped(textwrap.fill(name, 14)) for name in names],
                        **(dict(rotation=30, ha="right") if len(names) > 6 else {}))
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif "x" not in panel.log:
        axes.locator_params(axis="x", nbins=5)
    for name in panel.log:
        scale(axes, name, {x for curve in lines.values() for x in curve.x if x > 0} if name == "x" else ())


def scale(axes, name, values):
    """Make an axis logarithmic, with ticks at these values if they are few. Labels are plain: 0.001, or 2⁻¹⁰ if
    all are powers of two."""
    from matplotlib import ticker
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    low, high = getattr(axes, f"get_{name}lim")()    # of all panels that share it
    powers = values and min(values) < 1 and all(math.log2(x).is_integer() for x in values)
    between = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)
    few = 0 < len(values) <= 8
    axis.set_major_locator(ticker.FixedLocator(sorted(values)) if few else ticker.LogLocator(subs=between))
    axis.set_major_formatter(lambda x, _: "2" + f"{math.log2(x):.0f}".translate(RAISED) if powers else f"{x:.3g}")
    axis.set_minor_locator(ticker.NullLocator())


def report_panels(results):
    """Of a grid of one or two flags a panel: over the flag with more values, a line for each value of the other. Of
    anything else a panel for each flag, a point for each setting. A star: the best; a cross: one with a failed seed."""
    found, keys = [s for s in by_setting(results) if s.seeds], varied([result.run for result in results])
    if not keys:
        found, keys = by_setting([result for result in results if result.state == "done"], {}), ["seed"]
    keys.sort(key=lambda key: -len({s.flags.get(key) for s in found}))
    lines = keys[1:] if len(keys) == 1 or is_grid(found, keys) else None
    panels, alone = {}, {} if lines is not None else dict(linestyle="none")
    for key in keys if lines is None else keys[:1]:
        values, groups = sorted({s.flags.get(key) or "default" for s in found}, key=by_size), {}
        numeric = len(values) > 3 and all(by_size(value)[0] == 1 for value in values)
        log = numeric and float(values[0]) > 0 and float(values[-1]) > 10 * float(values[0])
        for s in sorted(found, key=lambda s: [by_size(s.flags.get(key)) for key in [*(lines or ()), key]]):
            label = phrase(s.flags, lines or ()) or "mean" if s.sound else "a seed diverged or failed"
            groups.setdefault(label, []).append(s)
        crossed = dict(linestyle="none", marker="x", color="black")
        panels[Panel("", key, found[0].metric, "x" * log)] = {
            label: error_bars(some, key, numeric, alone if some[0].sound else crossed) for label, some in groups.items()
        } | {f"best: {found[0].words()}": error_bars(found[:1], key, numeric, BEST)}
    return panels


def error_bars(settings, key, numeric=True, style={}):
    """Settings as a Curve over a flag of theirs: means, and standard deviations over the seeds."""
    xs = [float(s.flags[key]) if numeric else s.flags.get(key) or "default" for s in settings]
    ends = [[s.mean + sign * s.spread for s in settings] for sign in (-1, 1)]
    return Curve(xs, [s.mean for s in settings], *ends, style)


# ---- Curves of any runs ----------------------------------------------------------------------------------------------


def load(folders):
    """Runs, or whole sweeps -> {name: [the log of each seed]}. Runs whose config.json differ in the seed alone are one.
    Its name is made of the settings that tell it from the others, or is its folder."""
    groups = {}                                     # {(settings, copy): [(folder, seed), ...]}
    for folder in map(pathlib.Path, dict.fromkeys(folders)):
        homes = [folder] if (folder / "log.jsonl").exists() else [p.parent for p in sorted(folder.glob("*/log.jsonl"))]
        for home in homes or fail(f"--curves {folder}: no log.jsonl is in it, or in the folders in it"):
            config = json.loads((home / "config.json").read_text() if (home / "config.json").exists() else "{}")
            config = {key: str(value) for key, value in (config | (config.get("hyper") or {})).items()
                      if key not in ("hyper", "tuned", "out_dir", "resume")}
            seed, copy = config.pop("seed", ""), 0
            settings = tuple(sorted(config.items()))
            while seed in [seed for _, seed in groups.get((settings, copy), [])]:
                copy += 1                           # the same run twice is two curves, not two seeds
            groups.setdefault((settings, copy), []).append((home, seed))

    def count(keys):
        return len({tuple(dict(settings).get(key) for key in keys) for settings, _ in groups})
    keys, told_first = [], ["opt", "data", "model", "arch", "n_layer", "n_embd", "lr", "weight_decay"]
    for key in told_first + sorted({key for settings, _ in groups for key, _ in settings} - set(told_first)):
        keys += [key] * (count([*keys, key]) > count(keys))
    names = {}
    for (settings, copy), found in groups.items():
        name = ", ".join(f"{key} {dict(settings)[key]}" for key in keys if key in dict(settings)).removeprefix("opt ")
        names[f"{name} in {found[0][0]}".removeprefix(" in ") if copy or not name else name] = [
            read_jsons(home / "log.jsonl") for home, _ in found]
    return names


def over_seeds(logs, read):
    """-> steps, mean, low, high of what read(record) finds in all of these logs; it gives None for a record without."""
    found = [{record["step"]: value for record in log if isinstance(value := read(record), (int, float)) and
              math.isfinite(value)} for log in logs]
    steps = sorted(set.intersection(*map(set, found)))
    ys = [[values[step] for values in found] for step in steps]
    mean, spread = [statistics.fmean(y) for y in ys], [statistics.stdev(y) if len(y) > 1 else 0 for y in ys]
    return steps, mean, *([m + sign * s for m, s in zip(mean, spread)] if len(logs) > 1 else [] for sign in (-1, 1))


def angles(logs):
    """{kind of layer: Curve of the angles of all its layers}, the predicted ones dashed; {} without rotation."""
    names = list(dict.fromkeys(name for log in logs for record in log for name in record.get("rotation") or {}))
    found, predicted = {}, {}
    for name in names:
        kind = ".".join(word for word in name.split(".") if not word.isdigit() and word not in ("blocks", "weight"))
        for what, into in (("angle", found), ("predicted_angle", predicted)):
            steps, mean, *_ = over_seeds(logs, lambda record: (record.get("rotation") or {}).get(name, {}).get(what))
            if steps:
                into.setdefault(kind, (steps, []))[1].append(mean)
    lines = {kind: Curve(*curve, style=dict(color=COLOURS[i % 7], linestyle=("-", "-.", ":")[i % 3], linewidth=1.5,
                                            marker="")) for i, (kind, curve) in enumerate(found.items())}
    alike = len({tuple(f"{angle:.2g}" for angle in line) for _, some in predicted.values() for line in some}) == 1
    for i, (kind, curve) in enumerate(predicted.items()):
        lines["predicted" if alike else f"{kind}, predicted"] = Curve(*curve, style=dict(
            color="black" if alike else COLOURS[i % 7], linestyle="--", marker="", linewidth=2))
    return lines


def chart(lines, width=100, height=16):
    """{label: (x, y)} -> text: a small picture in letters, the first of which is a."""
    points = [(x, y, chr(97 + i)) for i, (xs, ys, *_) in enumerate(lines.values()) for x, y in zip(xs, ys)]
    (left, right), (low, high) = ([f(point[i] for point in points) for f in (min, max)] for i in (0, 1))
    cells = [[" "] * width for _ in range(height)]
    for x, y, letter in points:
        cells[round((high - y) / (high - low or 1) * (height - 1))][
            round((x - left) / (right - left or 1) * (width - 1))] = letter
    ends = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    return "\n".join([f"  {ends.get(i, ''):>7s} |{''.join(row).rstrip()}" for i, row in enumerate(cells)] + [
        f"{'':10s}{left:<{width - 8}g}{right:>8g} steps"])


def compare(folders, metric, plot):
    """Print a table and a small chart of these runs, and draw them: results over steps and over seconds, and angles."""
    found, panels, findings = {}, {}, []            # found: {metric: [(score, label, logs, steps, mean, low, high)]}
    for label, logs in load(folders).items():
        for name in [metric] if metric else METRICS:        # bleu is only in the last record: that is no curve
            steps, mean, *ends = over_seeds(logs, lambda record: record.get(name))
            if len(steps) > 1:
                found.setdefault(name, []).append((METRICS[name]["sign"] * mean[-1], label, logs, steps, mean, *ends))
                break
        else:
            print(f"{label}: no two records have {metric or ', '.join(METRICS)} yet")
    for name, some in found.items():
        some.sort(key=lambda row: row[0])
        rows = [["", name, "", "at step", "seconds", "seeds", ""]]
        over_steps, over_time = {}, {}
        after = int(all(steps[0] == 0 and len(steps) > 2 for _, _, _, steps, *_ in some))      # untrained, all are alike
        for i, (_, label, logs, steps, mean, *ends) in enumerate(some):
            times = dict(zip(*over_seeds(logs, lambda record: record.get("seconds") if name in record else None)[:2]))
            running = sum(not log[-1].get("final") for log in logs)
            rows.append([chr(97 + i), f"{mean[-1]:.4f}", label, str(steps[-1]), f"{times.get(steps[-1], math.nan):.1f}",
                         str(len(logs)), f"{running} not at the end" * bool(running)])
            if i < 8:                               # as many as can be told apart
                ys = [values[after:] for values in (mean, *ends)]
                over_steps[label] = Curve(steps[after:], *ys)
                over_time[label] = Curve([times.get(step, math.nan) for step in steps[after:]], *ys)
        print(columns(rows) + f"\n\n{name}\n{chart(over_steps)}\n")
        findings.append(f"{'lowest' if METRICS[name]['sign'] > 0 else 'highest'} {name}: {some[0][4][-1]:.4f}, "
                        f"{some[0][1]}" + f" (the 8 best of {len(some)})" * (len(some) > 8))
        unit = f"{name} (nats)" if name == "val_loss" else name
        panels |= {Panel("", "step", unit): over_steps, Panel("", "seconds", unit): over_time}
    turning = {label: lines for some in found.values() for _, label, logs, *_ in some[:6] if (lines := angles(logs))}
    panels |= {Panel(label, "step", "angle per step (radians)"): lines for label, lines in turning.items()}
    if not panels:
        fail("--curves: there is nothing to draw yet", status=1)
    if plot:
        curves("\n".join(findings), panels, plot)


# ---- Experiments -----------------------------------------------------------------------------------------------------
#
# Each is a block: claim, runs, criterion, picture. Its docstring is printed. It says when the claim counts as held, as
# decided before the first run at full size. (README says which set-ups have changed since.)
#
#   [RE] Rotational Equilibrium, arXiv:2305.17212     [MN] modular norm, arXiv:2405.14813     [RF] root-free, 2402.03496

# What all runs of an experiment share. Evaluated once, at the end, unless an experiment wants to see the way there.
BASE = {
    ("cpu", "gpt"): dict(device="cpu", n_layer=2, n_head=2, n_embd=64, block_size=32, batch_size=12, steps=1000,
                         warmup=100, eval_every=1000, eval_batches=100, track=0),
    ("gpu", "gpt"): dict(device="cuda", preset="shakespeare", data="python_docs", dropout=0, compile=0, steps=1000,
                         warmup=100, eval_every=1000, eval_batches=100, track=0),
    ("cpu", "cnn"): dict(device="cpu", model="resnet18", width_mult=0.0625, split=0.9, batch_size=32, steps=200,
                         warmup=20, eval_every=200, track=0),
    ("gpu", "cnn"): dict(device="cuda", model="resnet18", width_mult=0.5, split=0.9, steps=2000, warmup=200,
                         eval_every=2000, compile=0, track=0),
}
SCRIPTS = {"gpt": "nanogpt_train.py", "cnn": "cifar_train.py"}
UNTRAINED = math.log(103)                           # nats: python_docs has 103 characters. Diverged runs count as this
LOSS = "validation loss (nats)"


def model_run(lab, net, **flags):
    """A run of the experiment's GPT ("gpt") or convolutional network ("cnn"), with flags in place of BASE's."""
    return Run.of(SCRIPTS[net], BASE[lab.scale, net] | flags)


# What an experiment found. checks: [(what had to be so, with the measured numbers; whether it was)]
Finding = collections.namedtuple("Finding", "text checks panels")


def of(results, **flags):
    """Those of the results whose runs have these flags."""
    return [result for result in results if all(result.run[key] == plain(str(x)) for key, x in flags.items())]


def mean_loss(results):
    """A mean in which a run that diverged counts as one that has learned nothing."""
    return statistics.fmean(min(result.value, UNTRAINED) if result.state == "done" else UNTRAINED for result in results)


def at_most(score, limit):
    """Whether a Setting.score keeps a limit. An infinite one does not, even where the limit is infinite, too."""
    return math.isfinite(score) and score <= limit


def rotations(result):
    """-> steps, {hidden matrix: [its row of `rotation` at each of them]}: not the embeddings and the output, of which
    most rows have no gradient in a step, or whose norm matters to the loss."""
    records = [record for record in result.log() if record.get("rotation")]
    if not records:
        fail(f"{result.folder} diverged before its rotation was measured, so nothing can be said", status=1)
    names = [name for name in records[0]["rotation"] if not re.match("tokens|positions|head", name)]
    return ([record["step"] for record in records],
            {name: [record["rotation"][name] for record in records] for name in names})


def late_mean(values, share):
    """Mean over the last share of a run."""
    return statistics.fmean(values[int(len(values) * (1 - share)):])


def equilibrium(lab):
    """Claim    Weight decay brings every layer to a norm and an angle per step that follow from lr, decay and momentum
             alone (the norm under SGD: also from the gradient's size). [RE], table 1
    Done     AdamW, SGD with momentum and Lion train a GPT and a convolutional network at a constant lr, chosen with the
             decay such that the way there takes 500 and 250 steps. The theory is for weights whose norm the network
             does not feel, as before batch norm in the second; in the first it does feel it. All hidden matrices.
    Held if  in the last quarter of the run four matrices in five have an angle within 25 % of the prediction, and four
             in five a norm within 25 % of it: for each network, under each optimizer."""
    hyper = {("gpt", "adamw"): dict(lr=4e-3, weight_decay=0.25), ("gpt", "sgd"): dict(lr=0.3, weight_decay=1e-3 / 3),
             ("gpt", "lion"): dict(lr=5e-4, weight_decay=2), ("cnn", "adamw"): dict(lr=5e-3, weight_decay=0.4),
             ("cnn", "sgd"): dict(lr=0.1, weight_decay=2e-3), ("cnn", "lion"): dict(lr=1e-3, weight_decay=2)}
    length = {"gpt": dict(n_layer=4, steps=2500, eval_every=2500, save_every=500),
              "cnn": dict(steps=1200, eval_every=1200, save_every=300)}
    results = lab.results([model_run(lab, net, opt=opt, schedule="constant", warmup=50, track=50, grad_clip=0,
                                     **length[net], **h) for (net, opt), h in hyper.items()])
    rows, checks, panels = [["network", "optimizer", "measured / predicted", "least", "median", "largest"]], [], {}
    for (net, opt), result in zip(hyper, results):
        steps, matrices = rotations(result)
        grey = Panel(f"{net}, {opt}", "step", "measured / predicted\n(grey: within 25 %)", "y", band=(0.75, 1.25))
        panel = panels[grey] = {}
        for what in ("angle", "norm"):              # SGD's predicted norm changes with the gradient: its mean, too
            ratios = [[row[what] / late_mean([row[f"predicted_{what}"] for row in rows], 0.25) for row in rows]
                      for rows in matrices.values()]
            late = sorted(late_mean(ratio, 0.25) for ratio in ratios)
            near = sum(abs(ratio - 1) <= 0.25 for ratio in late)
            rows.append([net, opt, what, *(f"{x:.2f}" for x in (late[0], statistics.median(late), late[-1]))])
            checks.append((f"{net}, {opt}: the {what} of {near} of {len(late)} matrices is within 25 % of the "
                           "prediction", near >= 0.8 * len(late)))
            ordered, tenth = [sorted(column) for column in zip(*ratios)], len(ratios) // 10
            panel[f"{what}: median\nand middle 80 %"] = Curve(
                steps, [statistics.median(column) for column in ordered], [column[tenth] for column in ordered],
                [column[-1 - tenth] for column in ordered], {"marker": ""})
    return Finding("Over the matrices, means over the last quarter:\n" + columns(rows), checks, panels)


def balance(lab):
    """Claim    Under Adam with L2 in the gradient some layers turn much faster than others, under AdamW all alike. That
             is why AdamW is better, and giving Adam+L2 balanced rotation closes the gap. [RE], section 5.3
    Done     A grid of lr and decay for adam, adamw and rotational_adam (gains on, the same network for all); then the
             spread of the rotation at the best setting with decay: largest over smallest mean angle of a matrix.
    Held if  adam's spread is at least twice adamw's, adamw's best loss is at least 0.01 below adam's, and
             rotational_adam's is not more than 0.01 above adamw's."""
    lrs = (1e-3, 2e-3, 4e-3, 8e-3)
    decays = {"adam": (0, 1e-4, 1e-3, 1e-2), "adamw": (0, 0.03, 0.1, 0.3), "rotational_adam": (0.01, 0.03, 0.1, 0.3)}
    results = lab.results([model_run(lab, "gpt", opt=opt, lr=lr, weight_decay=decay, gains=1, track=50,
                                     eval_every=BASE[lab.scale, "gpt"]["steps"] // 10)
                           for opt in decays for lr in lrs for decay in decays[opt]])
    best, spread, text, losses, ways, turning = {}, {}, [], {}, {}, {}
    for opt in decays:
        found = by_setting(of(results, opt=opt))
        best[opt] = found[0].mean
        decayed = next(s for s in found if float(s.flags["weight_decay"]) > 0).results[0]
        mean_angles = [late_mean([row["angle"] for row in rows], 0.5) for rows in rotations(decayed)[1].values()]
        spread[opt] = max(mean_angles) / min(mean_angles)
        text += [f"\n{opt}: best val_loss {best[opt]:.4f}; spread of the angles at lr {decayed.run['lr']}, "
                 f"weight_decay {decayed.run['weight_decay']}: {spread[opt]:.2f}",
                 grid_map(found, ["lr", "weight_decay"])]
        at_lr = [next(s for s in found if s.flags["lr"] == plain(str(lr))) for lr in lrs]
        losses[opt] = error_bars([s for s in at_lr if s.seeds], "lr")
        ways[opt] = Curve(*over_seeds([decayed.log()[1:]], lambda record: record.get("val_loss")))
        lines = angles([decayed.log()])
        turning[Panel(f"{opt}: largest / smallest {spread[opt]:.2f}", "step", "angle per step (radians)")] = {
            name: line for name, line in lines.items() if not re.match("tokens|positions|head", name)}
    checks = [(f"spread of the angles: adam {spread['adam']:.2f}, adamw {spread['adamw']:.2f}, rotational_adam "
               f"{spread['rotational_adam']:.2f}", spread["adam"] >= 2 * spread["adamw"]),
              (f"best loss: adamw {best['adamw']:.4f}, adam {best['adam']:.4f}", best["adamw"] <= best["adam"] - 0.01),
              (f"best loss: rotational_adam {best['rotational_adam']:.4f}, adamw {best['adamw']:.4f}",
               best["rotational_adam"] <= best["adamw"] + 0.01)]
    return Finding("\n".join(text).strip(), checks, {
        Panel("the best decay of each lr", "lr", LOSS, "x"): losses,
        Panel("on the way, at the best setting with decay", "step", LOSS): ways} | turning)


def zero_shot(lab):
    """Claim    The rotational variant works at the lr and decay that the plain optimizer was tuned to, without tuning
             of its own. [RE], tables 2 and 3
    Done     adamw, sgd and lion are tuned on a grid of lr and decay with one seed; at the best of each, plain
             and rotational run with three other seeds (gains on, the same network for both).
    Held if  each rotational variant's mean loss is at most 0.02 above that of its plain optimizer."""
    grids = {"adamw": ((2e-3, 4e-3, 8e-3), (0.03, 0.1, 0.3)), "sgd": ((0.1, 0.3, 1), (1e-4, 3e-4, 1e-3)),
             "lion": ((2.5e-4, 5e-4, 1e-3), (0.3, 1, 3))}
    tuning = lab.results([model_run(lab, "gpt", opt=opt, lr=lr, weight_decay=decay, gains=1)
                          for opt, (lrs, decays) in grids.items() for lr in lrs for decay in decays])
    chosen = {opt: by_setting(of(tuning, opt=opt))[0].flags for opt in grids}
    final = by_setting(lab.results([
        model_run(lab, "gpt", opt=name, lr=h["lr"], weight_decay=h["weight_decay"], gains=1, seed=seed)
        for opt, h in chosen.items() for name in (opt, f"rotational_{opt}") for seed in (1, 2, 3)]))
    by_name = {s.flags["opt"]: s for s in final}
    checks = [(f"{opt} {by_name[opt].words()}, rotational_{opt} {by_name[f'rotational_{opt}'].words()} at "
               f"{phrase(h, ('lr', 'weight_decay'))}",
               at_most(by_name[f"rotational_{opt}"].score, by_name[opt].score + 0.02)) for opt, h in chosen.items()]
    panel = {kind: error_bars([by_name[prefix + opt] for opt in grids], "opt", False)._replace(x=list(grids))
             for kind, prefix in (("plain", ""), ("rotational", "rotational_"))}
    return Finding(table(final, ["opt", "lr", "weight_decay"]), checks, {Panel(
        "mean and standard deviation of three seeds", "optimizer, at the lr and decay of the plain one", LOSS): panel})


def warmup(lab):
    """Claim    At a large lr a plain optimizer needs a warmup, since rotation is far too fast before equilibrium is
             reached; rotational variants hold their angle from the first step and need much less. [RE], section 5.2
    Done     adamw and sgd, plain and rotational (gains on), at the tuned lr times 1, 2, 4 and 8, with the usual warmup
             and with none; two seeds. The cost of having none: the mean increase of the loss over the four lrs.
    Held if  that cost is at least 0.02 for each plain optimizer, and at most half as large for its variant."""
    hyper, factors = {"adamw": dict(lr=4e-3, weight_decay=0.1), "sgd": dict(lr=0.3, weight_decay=1e-4)}, (1, 2, 4, 8)
    names = [name for opt in hyper for name in (opt, f"rotational_{opt}")]

    def run(name, factor, warm, seed):
        h = hyper[name.removeprefix("rotational_")]
        return model_run(lab, "gpt", opt=name, lr=h["lr"] * factor, weight_decay=h["weight_decay"], gains=1, seed=seed,
                         steps=500, eval_every=500, warmup=warm)
    cases = [(name, warm, factor) for name in names for warm in (50, 0) for factor in factors]
    results = lab.results([run(name, factor, warm, seed) for name, warm, factor in cases for seed in (1, 2)])
    loss = {case: mean_loss(results[2 * i:2 * i + 2]) for i, case in enumerate(cases)}
    cost = {name: statistics.fmean(loss[name, 0, factor] - loss[name, 50, factor] for factor in factors)
            for name in names}
    text = crossing({(f"{name}, warmup {warm}", f"lr x {factor}"): f"{loss[name, warm, factor]:.4f}"
                     for name, warm, factor in cases}, "val_loss")
    checks = [(f"without warmup {opt} loses {cost[opt]:+.4f}, rotational_{opt} {cost[f'rotational_{opt}']:+.4f}",
               cost[opt] >= 0.02 and cost[f"rotational_{opt}"] <= cost[opt] / 2) for opt in hyper]
    return Finding(text, checks, {
        Panel(f"{name}: no warmup costs {cost[name]:.3f}", "lr, in multiples of the tuned one", LOSS, "x"): {
            label: Curve(list(factors), [loss[name, warm, factor] for factor in factors])
            for warm, label in ((50, "50 steps of warmup"), (0, "no warmup"))} for name in names})


def lr_transfer(lab, flag, sizes):
    """What lr_transfer_width and lr_transfer_depth share: lr grids at every size, the lr that is best at each, and what
    the lr of the smallest costs at the largest."""
    lrs = {"adam": [2.0**k for k in range(-11, -4)], "modular_adam": [2.0**k for k in range(-6, 1)],
           "sgd": [2.0**k for k in range(-4, 3)], "modular_sgd": [2.0**k for k in range(-6, 1)]}
    cases = [(opt, size, lr) for opt in lrs for size in sizes for lr in lrs[opt]]
    results = lab.results([
        model_run(lab, "gpt", opt=opt, lr=lr, weight_decay=0, schedule="linear", warmup=0, steps=400, eval_every=400,
                  arch="modular" if opt.startswith("modular") else "gpt2", **{flag: size}) for opt, size, lr in cases])
    loss = {case: mean_loss([result]) for case, result in zip(cases, results)}
    small, large, text, cost, panels = sizes[0], sizes[-1], [], {}, {}
    for opt in lrs:
        best = {size: min(lrs[opt], key=lambda lr: loss[opt, size, lr]) for size in sizes}
        cost[opt] = loss[opt, large, best[small]] - loss[opt, large, best[large]]
        shift = math.log2(best[large] / best[small])
        cells = {(f"{flag} {size}", f"lr 2^{math.log2(lr):.0f}"): f"{loss[opt, size, lr]:.4f}{'*' * (lr == best[size])}"
                 for size in sizes for lr in lrs[opt]}
        text += [crossing(cells, opt), f"  best lr from {flag} {small} to {large}: {shift:+.0f} octaves; with the lr "
                 f"of the smallest, the largest loses {cost[opt]:.4f}\n"]
        panels[Panel(opt, f"lr of {opt}", LOSS, "x")] = {
            f"{flag} {size}": Curve(lrs[opt], [loss[opt, size, lr] for lr in lrs[opt]]) for size in sizes} | {
            "the best lr": Curve(list(best.values()), [loss[opt, size, lr] for size, lr in best.items()], style=BEST)}
    checks = [(f"the smallest model's lr costs the largest {cost[f'modular_{opt}']:.4f} under modular_{opt}, "
               f"{cost[opt]:.4f} under {opt}", cost[f"modular_{opt}"] <= 0.03 and cost[f"modular_{opt}"] < cost[opt])
              for opt in ("adam", "sgd")]
    return Finding("\n".join(text).strip(), checks, panels)


def lr_transfer_width(lab):
    """Claim    Under the modular norm the best lr does not depend on the width; under Adam and SGD it does. [MN]
    Done     Seven lrs, an octave apart, at four widths: adam and sgd on the standard GPT, modular_adam and
             modular_sgd on the modular one; no decay, no warmup, lr linear to 0; one seed.
    Held if  at the largest width the lr that is best at the smallest costs the modular optimizer at most 0.03, and
             less than the plain one."""
    return lr_transfer(lab, "n_embd", (32, 64, 128, 256) if lab.scale == "cpu" else (96, 192, 384, 768))


def lr_transfer_depth(lab):
    """Claim    Under the modular norm the best lr does not depend on the depth; under Adam and SGD it does. [MN]
    Done     As for the width, at four depths.
    Held if  at the largest depth the lr that is best at the smallest costs the modular optimizer at most 0.03, and
             less than the plain one."""
    return lr_transfer(lab, "n_layer", (1, 2, 4, 8) if lab.scale == "cpu" else (2, 4, 8, 16))


def root_free(lab):
    """Claim    Adaptive methods do worse than SGD on convolutional networks because of their square root. Without it
             the gap closes, and on transformers nothing is lost. [RF]
    Done     sgd, adamw, rf_rmsprop and rf_adamw on a convolutional net and on a GPT, each tuned by a random search in
             two stages with the same number of runs, as in the paper (there: 100 in each stage); one seed.
    Held if  on the convolutional net sgd is ahead of adamw, and the better root-free method is at most 0.01 behind sgd
             in accuracy and ahead of adamw; and if on the GPT it is at most 0.03 above adamw in loss."""
    n = 8 if lab.scale == "cpu" else 40
    momentum, memory = Space("lin", (0.1, 0.99)), Space("choice", ("0.9", "0.97", "0.99", "0.997"))
    decoupled, coupled, damping = Space("log", (1e-3, 0.3)), Space("log", (1e-5, 1e-2)), Space("log", (1e-5, 1e-2))
    spaces = {"sgd": dict(lr=Space("log", (0.01, 1)), momentum=momentum, weight_decay=coupled),
              "adamw": dict(lr=Space("log", (5e-4, 2e-2)), beta1=momentum, beta2=memory, weight_decay=decoupled),
              "rf_rmsprop": dict(lr=Space("log", (1e-4, 1e-2)), momentum=momentum, alpha=memory, eps=damping,
                                 weight_decay=coupled),
              "rf_adamw": dict(lr=Space("log", (1e-3, 1e-1)), beta1=momentum, beta2=memory, eps=damping,
                               weight_decay=decoupled)}
    shorter = {"cnn": {}, "gpt": dict(steps=500, eval_every=500, warmup=50)}

    def maker(net, opt):
        return lambda flags: [model_run(lab, net, opt=opt, **shorter[net], **flags)]
    found = two_stage(lab, {(net, opt): (maker(net, opt), spaces[opt]) for net in SCRIPTS for opt in spaces}, n, 0)
    best = {case: by_setting(results)[0] for case, results in found.items()}
    rows = [[net, opt, s.words(), phrase(s.flags, spaces[opt])] for (net, opt), s in best.items()]
    words = {net: ", ".join(f"{opt} {best[net, opt].words()}" for opt in spaces) for net in SCRIPTS}
    score = {case: s.score for case, s in best.items()}         # accuracies with a minus: less is better
    rootless = {net: min(score[net, "rf_rmsprop"], score[net, "rf_adamw"]) for net in SCRIPTS}
    checks = [(f"convolutional net, sgd ahead of adamw: {words['cnn']}", score["cnn", "sgd"] < score["cnn", "adamw"]),
              ("convolutional net, root-free at most 0.01 behind sgd and ahead of adamw",
               rootless["cnn"] <= score["cnn", "sgd"] + 0.01 and rootless["cnn"] < score["cnn", "adamw"]),
              (f"GPT, root-free at most 0.03 above adamw: {words['gpt']}",
               at_most(rootless["gpt"], score["gpt", "adamw"] + 0.03))]
    panels = {}
    for net, y in (("cnn", "best accuracy so far (validation set)"), ("gpt", f"best {LOSS} so far")):
        panels[Panel(f"{net}: right of the line the second stage", "runs of the search", y, border=n + 0.5)] = {
            opt: Curve(list(range(1, len(found[net, opt]) + 1)), [abs(x) if math.isfinite(x) else math.nan for x in
                       itertools.accumulate((result.score for result in found[net, opt]), min)],
                       style={"drawstyle": "steps-post", "marker": ""}) for opt in spaces}
    return Finding(columns([["net", "optimizer", "best", "at"], *rows]), checks, panels)


def half_precision(lab):
    """Claim    Without roots and inverses Shampoo runs in bfloat16 throughout: as good as in float32, and faster
             than Shampoo, whose roots need float32. [RF]
    Done     if_shampoo with all its state and arithmetic in bfloat16 and in float32, and shampoo, which refreshes its
             roots as often (every 2nd step), each at the best of four lrs (chosen in float32, with one seed); three
             other seeds, one run at a time for the clock's sake.
    Held if  bfloat16's mean loss is at most 0.02 above float32's and shampoo's, and its step takes less time than
             either's."""
    steps, lrs = 300, {"if_shampoo": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "shampoo": (3e-4, 6e-4, 1.2e-3, 2.4e-3)}

    def run(seed, **hyper):
        return model_run(lab, "gpt", seed=seed, steps=steps, warmup=30, eval_every=steps // 2, eval_batches=30,
                         update_every=2, **hyper)
    tuning = lab.results([run(0, opt=opt, lr=lr) for opt in lrs for lr in lrs[opt]])
    best = {opt: by_setting(of(tuning, opt=opt))[0].flags["lr"] for opt in lrs}
    kinds = [("if_shampoo", "bfloat16"), ("if_shampoo", "float32"), ("shampoo", "float32")]
    lab.jobs = 1
    results = lab.results([run(seed, opt=opt, lr=best[opt], **{"opt_kwargs.dtype": dtype})
                           for opt, dtype in kinds for seed in (1, 2, 3)])
    found = {f"{opt}, {dtype}": Setting({"lr": best[opt]}, results[3 * i:3 * i + 3])
             for i, (opt, dtype) in enumerate(kinds)}

    def milliseconds(result):
        """A step of the second half of the run, with its share of the one evaluation there."""
        middle, end = [record for record in result.log() if "val_loss" in record][-2:]
        return 1e3 * (end["seconds"] - middle["seconds"]) / (end["step"] - middle["step"])
    times = {name: sorted(milliseconds(r) if r.state == "done" else math.nan for r in s.results)
             for name, s in found.items()}
    took = {name: statistics.median(some) for name, some in times.items()}
    rows = [[name, s.flags["lr"], s.words(), f"{took[name]:.1f}"] for name, s in found.items()]
    half, *others = found
    checks = [(f"val_loss {found[half].words()} in bfloat16, {found[other].words()} of {other}",
               at_most(found[half].score, found[other].score + 0.02)) for other in others]
    checks += [(f"{took[half]:.1f} ms per step in bfloat16, {took[other]:.1f} of {other}", took[half] < took[other])
               for other in others]
    names = list(found)
    return Finding(columns([["optimizer", "lr", "val_loss", "ms per step"], *rows]), checks, {
        Panel("mean and standard deviation of three seeds", "", LOSS): {
            "": error_bars(list(found.values()), "lr", False)._replace(x=names)},
        Panel("median, least and most of three seeds", "", "milliseconds per step"): {
            "": Curve(names, list(took.values()), [x[0] for x in times.values()], [x[-1] for x in times.values()])}})


EXPERIMENTS = {f.__name__: f for f in (equilibrium, balance, zero_shot, warmup, lr_transfer_width, lr_transfer_depth,
                                       root_free, half_precision)}


def experiment(lab, name, plot):
    """Do it, print what came of it, and draw it with the claim and the verdict in the title."""
    doc, finding = inspect.getdoc(EXPERIMENTS[name]), EXPERIMENTS[name](lab)
    if lab.mode == "print":
        return
    print(f"{name} at {lab.scale} scale, {len(lab.asked)} runs in {lab.out_dir}\n\n{doc}\n\n{finding.text}\n")
    for text, held in finding.checks:
        print(f"{'yes' if held else 'NO':4s}{text}")
    held = [held for _, held in finding.checks]
    verdict = "The claim held at this scale." if all(held) else (
        f"The claim did not hold at this scale: {sum(held)} of {len(held)} checks.")
    print(verdict)
    if plot:
        said = " ".join(re.search(r"Claim\s+(.*?)\nDone", doc, re.S)[1].split())
        curves(f"{said}\n{verdict}", finding.panels, plot)


# ---- From the command line to the report -----------------------------------------------------------------------------


def main():
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # what a terminal lacks must not cost the report
    args = parse()
    if args.curves:
        return compare(args.curves, args.metric, args.plot)
    lab, unfinished = Lab(args), None
    try:
        if args.experiment:
            experiment(lab, args.experiment, args.plot)
        elif args.grid or args.space or args.fixed or args.seeds:
            make, settings = planned(args)
            if args.two_stage:
                two_stage(lab, {"search": (make, settings)}, args.runs or 100, args.seed or 0)
            else:
                lab.results([run for flags in settings for run in make(flags)])
        else:                                       # --report alone
            folders = [path.parent for path in sorted(args.out_dir.glob("*/run.json"))]
            runs = [run for folder in folders if (run := read_run(folder)) and run.name == folder.name]    # no copies
            lab.results(runs or fail(f"{args.out_dir} holds no runs: was the sweep started with another --out_dir?"))
    except Unfinished as stop:
        unfinished = stop
    results = [lab.result(run) for run in lab.asked]
    failed = any(result.state == "failed" for result in results)
    if lab.mode == "print":
        if not unfinished:
            print(f"sweep.py: all runs have come to an end: {tally(results)}. --report shows them" +
                  ", --retry prints those that failed" * failed, file=sys.stderr)
        sys.exit(failed and not unfinished)
    if not args.experiment or unfinished:
        print(report(results))
    if args.plot and not args.experiment:
        if len({result.run.script for result in results}) > 1 or all(result.state != "done" for result in results):
            fail("--plot draws the results of one script, and here are none yet, or several scripts'", status=1)
        best = min(results, key=lambda result: result.score)
        curves(f"{pathlib.Path(best.run.script).name}: best {line_of(best, varied(lab.asked))}\n"
               f"{len(results)} runs: {tally(results)}", report_panels(results), args.plot)
    if unfinished:
        fail("{} of {} runs are not finished: ".format(*unfinished.args) + "the same command " +
             ("without --report does them" if lab.mode == "report" else "goes on"), status=1)
    sys.exit(failed)


if __name__ == "__main__":
    try:
        try:
            main()
        finally:                                    # main ends in sys.exit
            sys.stdout.flush()                      # here, where a pipe that nobody reads can be caught
    except KeyboardInterrupt:                       # before or after the runs: nothing to save
        sys.exit(130)
    except OSError as error:                        # `| head` has seen enough; the disk is full; a file cannot be read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        fail(f"{error.filename or 'the output'}: {error.strerror}. Mend it, or choose another --out_dir; the same "
             "command goes on", status=1)
