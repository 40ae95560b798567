"""
Run a training script many times and see which settings are best, put a claim of a paper to the test, or draw the curves
of any runs.

    python sweep.py --grid lr=1e-4:1e-1:log4 weight_decay=0,0.1 --fixed "opt=adamw steps=500" --seeds 3
    python sweep.py --grid "lr,weight_decay=(1e-3,1),(1e-2,0.1)" ...            pairs, in place of all combinations
    python sweep.py --random 40 --space "lr=log(1e-4,1e-1) momentum=uniform(0.5,0.99) damping=log(1e-6,1e-3)" ...
    python sweep.py --two_stage --runs 100 --space ...      a wide random search, one around its best fifth, then the
                                                            best setting again with three fresh seeds
    python sweep.py --experiment zero_shot --plot out.png   a paper's claim, what was measured, and whether it held
    python sweep.py --curves out/a out/b --plot out.png     runs beside each other; or sweeps: means over seeds

The same command again goes on where a stopped or killed sweep was: a finished run is never run again, a half-done one
is resumed from its checkpoint. --report shows what is there so far and runs nothing (--report --out_dir DIR: whatever
DIR holds). --print_commands prints the script's own command for each run that is not finished, one a line, for a Slurm
array, or for      ... --print_commands | tr '\\n' '\\0' | xargs -0 -P2 -I{} sh -c {}

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
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

from tqdm import tqdm

try:
    import fcntl
except ImportError:                                 # Windows has no flock: there, start one sweep at a time
    fcntl = None

HERE = pathlib.Path(__file__).resolve().parent
# Metrics, best first. sign: -1 if more is better; digits: as printed
METRICS = {"bleu": dict(sign=-1, digits=2), "test_acc": dict(sign=-1, digits=4), "val_acc": dict(sign=-1, digits=4),
           "val_loss": dict(sign=1, digits=4)}

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
    several, flag, number = dict(nargs="+", action="extend"), dict(action="store_true"), dict(metavar="N", type=int)
    kind.add_argument("--grid", metavar="KEY=VALUES", **several,
                      help="all combinations of these: a,b,c or 1e-4:1e-1:log8 (8 values) or 0:1:lin5")
    kind.add_argument("--random", **number, help="N random draws from --space")
    kind.add_argument("--two_stage", **flag, help="--runs draws from --space, as many around the best fifth of them")
    kind.add_argument("--experiment", metavar="NAME", choices=EXPERIMENTS, help=", ".join(EXPERIMENTS))
    kind.add_argument("--curves", metavar="DIR", **several, help="run nothing: compare the runs in these folders")
    mode.add_argument("--report", **flag, help="run nothing, show what is there")
    mode.add_argument("--print_commands", **flag, help="print a command for each run that is not finished")
    p.add_argument("--script", default="nanogpt_train.py", help="or cifar_train.py, translate_train.py, one like them")
    p.add_argument("--fixed", metavar="KEY=VALUE", **several, help="the same for all runs")
    p.add_argument("--seeds", **number, help="each setting with seed=1 to N; in an experiment: 10 N more for all seeds")
    p.add_argument("--space", metavar="KEY=RANGE", **several,
                   help="log(1e-4,1e-1), one_minus_log(1e-3,0.5) for 0.5 to 0.999, uniform(0.5,0.99) or choice(a,b), "
                        "in quotes; or a paper's: " + ", ".join(PAPER_SPACES))
    p.add_argument("--runs", **number, help="of each stage of --two_stage (default 100) or of an experiment's search")
    p.add_argument("--seed", type=int, default=0, help="of the random draws (default 0)")
    p.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="of an experiment, for two cores or a GPU")
    p.add_argument("--jobs", **number, help="runs at a time (default: one per GPU, or per core, there of one thread)")
    p.add_argument("--out_dir", help="default out/sweep-SCRIPT or out/sweep-EXPERIMENT-SCALE")
    p.add_argument("--retry", **flag, help="run again what failed (after the cause is mended)")
    p.add_argument("--keep_checkpoints", **flag, help="default: a finished run's ckpt.pt is deleted")
    p.add_argument("--metric", choices=METRICS, help="what counts (default: the first of these that is there)")
    p.add_argument("--plot", metavar="FILE", help="draw it: .png, .pdf, .svg (needs matplotlib)")
    args, unknown = p.parse_known_args()
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], map("--{}".format, vars(args)), n=1, cutoff=0.7)
        fail(f"unknown flag {unknown[0]}: " + (f"did you mean {near[0]}?" if near else "--help shows those of a sweep; "
             "a flag of the script goes into --fixed or --grid, without dashes"))

    always = {"out_dir", "plot", "report", "print_commands", "jobs", "retry", "keep_checkpoints"}
    sweep = always | {"script", "fixed", "seeds", "metric"}
    takes = {"grid": sweep, "random": sweep | {"space", "seed"}, "two_stage": sweep | {"space", "seed", "runs"},
             "experiment": always | {"scale", "seeds", "runs"}, "curves": {"metric", "plot"}}
    words = {word.partition("=")[0] for word in sys.argv}
    given = {name: value for name, value in vars(args).items() if f"--{name}" in words}
    kind = next((name for name in takes if name in given), None)
    for name, value in given.items():
        least = int(name != "seed")
        if type(value) is int and value < least:
            fail(f"--{name} {value}: it must be at least {least}")
        if isinstance(value, (str, list)) and not "".join(value).strip():
            fail(f"--{name} is empty")              # a shell variable that is not set, say
        if name != kind and name not in takes.get(kind, sweep):
            fail(f"--{name} is only for --{', --'.join(kind for kind in takes if name in takes[kind])}: leave it out")
    if args.experiment and args.runs and "--runs" not in EXPERIMENTS[args.experiment].__doc__:
        fail(f"--experiment {args.experiment} searches nothing: leave out --runs")
    if args.print_commands and args.plot:
        fail("--print_commands has nothing to draw: leave out --plot")
    if kind in ("random", "two_stage") and not args.space:
        fail("random draws need --space, say --space \"lr=log(1e-4,1e-1)\"")
    if not (kind or args.fixed or args.seeds or args.report):
        fail("nothing to run: give --grid, --random, --two_stage, --fixed, --seeds, --experiment, --curves or --report "
             "(--help shows examples)")
    if args.plot:                                   # before an hour of runs, not after it
        path = pathlib.Path(args.plot)
        if path.suffix.lower() not in (".png", ".pdf", ".svg") or path.is_dir() or not path.parent.is_dir():
            fail(f"--plot {args.plot}: name a .png, .pdf or .svg file in a folder that exists")
        if not importlib.util.find_spec("matplotlib"):
            fail("--plot needs matplotlib: pip install matplotlib, then the same command; nothing will be run twice")
    script = next((path for path in (pathlib.Path(args.script), HERE / args.script) if path.is_file()), None)
    script = (script or fail(f"--script {args.script}: there is no such file")).resolve()
    args.script = script.name if script.parent == HERE else str(script)         # its one name, however it was given
    name = f"{args.experiment}-{args.scale}" if args.experiment else script.stem
    args.out_dir = pathlib.Path(args.out_dir or f"out/sweep-{name}")
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
    if x.is_integer() and len(text) > 15:           # from 2**53 on floats leave out some
        return text
    return str(int(x)) if x.is_integer() and abs(x) < 1e15 else repr(x)


def pairs(texts, flag):
    """["lr=1 seed=2", "opt=adamw"] -> {"lr": "1", "seed": "2", "opt": "adamw"}; spaces within (...) do not separate."""
    found = {}
    for token in re.findall(r"(?:\([^()]*\)|\S)+", " ".join(texts or [])):
        keys, _, value = token.partition("=")
        if not value or not re.fullmatch(r"(opt_kwargs\.)?[A-Za-z]\w*" + r"(,[A-Za-z]\w*)*" * (flag == "--grid"), keys):
            fail(f"{flag} {token}: write it as KEY=VALUE, the key without dashes")
        for key in keys.split(","):
            if any(key in other.split(",") for other in found):
                fail(f"{flag} has {key} twice: give all its values at once")
            if key in ("out_dir", "resume", "help", "opt_kwargs"):
                fail(f"{flag} {key}: leave it out. The sweep gives every run its own folder; what the script has no "
                     "flag for goes into its opt_kwargs, as KEY=VALUE")
        found[keys] = value
    return found


def split(text):
    """"a,(b,c)" -> ["a", "(b,c)"]."""
    return [item.strip() for item in re.split(r",(?![^()]*\))", text)]


@dataclass(frozen=True)
class Space:
    """Where one hyperparameter is drawn from. values: the two ends, or all choices. In one_minus_log they are ends of
    1 - x, which is log-uniform: the way to draw a beta near 1."""
    kind: str                                       # log, one_minus_log, lin or choice
    values: tuple

    @staticmethod
    def between(kind, ends, where):
        low, high = {"lin": (-math.inf, math.inf), "log": (0, math.inf), "one_minus_log": (0, 1)}[kind]
        with contextlib.suppress(ValueError):       # no numbers, or not two
            a, b = map(float, ends)
            if low < a < b < high:
                return Space(kind, (a, b))
        fail(f"{where}: a range goes from one number to a larger one" + ", both above 0" * (low == 0) +
             " and below 1" * (high == 1))

    def at(self, u):
        """The value at 0 <= u < 1 (or 1, if it is no choice), as text with six digits, ten where it may be near 1."""
        if self.kind == "choice":
            return self.values[int(u * len(self.values))]
        a, b = self.values
        x = a * (1 - u) + b * u if self.kind == "lin" else a ** (1 - u) * b**u
        return plain(f"{1 - x:.10g}" if self.kind == "one_minus_log" else f"{x:.6g}")

    def near_edge(self, text):
        """Whether a value lies in the first or last twentieth of the range, so that a better one may lie beyond."""
        if self.kind == "choice":
            return False
        low, high = sorted(float(self.at(u)) for u in (0.05, 0.95))
        return not low <= float(text) <= high

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
        parts = re.fullmatch(r"(log|one_minus_log|uniform|choice)\((.*)\)", text)
        if not parts or "" in split(parts[2]):
            fail(f"--space {key}={text}: write log(a,b), one_minus_log(a,b), uniform(a,b) or choice(a,b,c), in quotes")
        kind, values = parts[1], split(parts[2])
        spaces[key] = (Space(kind, tuple(dict.fromkeys(map(plain, values)))) if kind == "choice" else
                       Space.between("lin" if kind == "uniform" else kind, values, f"--space {key}={text}"))
    return spaces


def grid_values(text, where):
    """"0,1e-3:1e-1:log3" -> ["0", "0.001", "0.01", "0.1"]."""
    values = []
    for item in split(text):
        spread = re.fullmatch(r"([^:]+):([^:]+):(log|lin)(\d{1,6})", item)
        if spread and int(spread[4]) > 1:
            space, last = Space.between(spread[3], spread.groups()[:2], where), int(spread[4]) - 1
            values += [space.at(i / last) for i in range(last + 1)]
        elif not item or re.match(r"[-+.]?\d[^:]*:", item):     # text may have a colon, too
            fail(f"{where}: write a comma between values; FROM:TO:log8 or FROM:TO:lin8 are 8 values, and at least 2")
        else:
            values.append(plain(item))
    return list(dict.fromkeys(values))


def grid_flags(keys, text):
    """"lr,weight_decay", "(1,2),(3,4)" -> [{"lr": "1", "weight_decay": "2"}, {"lr": "3", "weight_decay": "4"}]."""
    names, rows = keys.split(","), [[value] for value in grid_values(text, f"--grid {keys}={text}")]
    if len(names) > 1:
        rows = [[plain(x) for x in split(value[1:-1])] if value[0] + value[-1] == "()" else [] for value, in rows]
        if {len(row) for row in rows} != {len(names)}:
            fail(f"--grid {keys}={text}: give a value for each key, as in \"lr,weight_decay=(1e-3,1),(1e-2,0.1)\"")
    return [dict(zip(names, row)) for row in rows]


def draws(spaces, n, seed, stage=1):
    """n settings. Draw i of a key depends on nothing but (seed, stage, key, i): a restarted sweep draws the same, and
    one with more runs begins with those of one with fewer."""
    return [{key: space.at(random.Random(f"{seed} {stage} {key} {i}").random()) for key, space in spaces.items()}
            for i in range(n)]


def planned(args):
    """-> make(flags), which gives the runs of one setting, one a seed; all settings; and the spaces of a search."""
    fixed, spaces, known = pairs(args.fixed, "--fixed"), parse_space(args.space), flags_of(args.script)
    grid = [grid_flags(*pair) for pair in pairs(args.grid, "--grid").items()]
    keys = [*fixed, *(key for flags in grid for key in flags[0]), *spaces, *["seed"] * bool(args.seeds)]
    names = [key if key in ("opt_kwargs.dtype", "opt_kwargs.seed") else key.removeprefix("opt_kwargs.") for key in keys]
    for key, name in zip(keys, names):
        if names.count(name) > 1:
            fail(f"{name} is given twice, fixed, varied, with opt_kwargs or by --seeds: give it once")
        if key not in known:
            import optim                            # it takes seconds, and mostly nobody needs to know
            takes = {name for kind in optim.OPTIMIZERS.values() for name in kind.takes()}
            if key.removeprefix("opt_kwargs.") not in takes:
                near = difflib.get_close_matches(key, known | takes, n=1, cutoff=0)[0]
                fail(f"{key} is neither a flag of {args.script} nor an option of an optimizer: did you mean {near}?")
    size = args.random or (args.runs or 100) * args.two_stage or math.prod(map(len, grid))
    if size * (args.seeds or 1) > 10**6:
        fail("more than a million runs would not end in your lifetime: make the grid coarser")
    seeds = [{"seed": seed + 1} for seed in range(args.seeds or 0)] or [{}]

    def make(flags):
        return [Run.of(args.script, fixed | flags | seed) for seed in seeds]
    settings = [dict(collections.ChainMap(*parts)) for parts in itertools.product(*grid)]
    return make, draws(spaces, args.random, args.seed) if args.random else settings, spaces


# ---- Runs: what one is, where it lives, what came of it --------------------------------------------------------------


@functools.cache
def flags_of(script):
    """The flags that a script knows, read from its source, since starting it takes seconds: the fields of its class
    Settings, or what it gives to add_argument."""
    source = (HERE / script).read_text(encoding="utf-8", errors="replace")
    fields = re.search(r"^class Settings\b.*\n(?:(?: .*)?\n)+|\Z", source, re.M)[0]
    return {*re.findall(r"^    (\w+): \w", fields, re.M), *re.findall(r"""add_argument\(\s*["']--(\w+)""", source)} or (
        fail(f"no flags are to be found in {HERE / script}: name a script in Python with --script"))


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
        """The script's own. A checkpoint is resumed: what that holds is not said again, but where to compute is. The
        flag `change` is no flag of a script: it asks for one of CHANGES, in which this file starts the script."""
        start, flags, options = [str(HERE / self.script)], [], []
        for key, value in self.flags:
            if key == "change":
                start = [str(HERE / "sweep.py"), "--change", value, *start]
            elif key in flags_of(self.script):
                flags.append(f"--{key}={value}")
            else:
                options.append(f"{key.removeprefix('opt_kwargs.')}={value}")
        if (folder / "ckpt.pt").exists():
            flags, options = ["--resume"] + [flag for flag in flags if flag.startswith("--device=")], []
        return [sys.executable, *start, *flags, *["--opt_kwargs"] * bool(options), *options, f"--out_dir={folder}"]


@dataclass
class Result:
    """What came of a run: done, diverged, failed or unfinished. value: its metric at the end, if it is done."""
    run: Run
    folder: pathlib.Path
    state: str = "unfinished"
    message: str = ""                               # of one that diverged or failed
    metric: str = "val_loss"
    value: float = math.nan

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

# Exit statuses of a process that was stopped or killed, not of one that failed. Windows has no name for SIGKILL, 9.
STOPPED = {130, 143, -signal.SIGINT, -signal.SIGTERM, -9}


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
    """Does the runs that it is asked for, or says what would have to be done. args: the command line."""

    def __init__(self, args):
        self.args, self.out_dir, self.asked, self.lock = args, args.out_dir, [], None

    def result(self, run):
        """What its folder says. A log that has its last line counts, whatever happened to the process after that."""
        result = Result(run, self.out_dir / run.name)
        log, end = result.log(), read_jsons(result.folder / "failed.json")
        if log and log[-1].get("final"):
            there = [name for name in METRICS if name in log[-1]]
            result.metric = self.args.metric or (there or ["val_loss"])[0]
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

    def unfinished(self, runs):
        return [run for run in runs if self.result(run).state == "unfinished"]

    def results(self, runs):
        """The results of these runs, in their order, after doing what is missing. Raises Unfinished where that is not
        to be done (a report, printing), or where a run was killed from outside."""
        runs = list(dict.fromkeys(runs))
        self.asked += [run for run in runs if run not in self.asked]
        if not self.args.report:
            for run in runs:
                self.note(run)
        if not (self.args.report or self.args.print_commands) and self.unfinished(runs):
            self.lock = self.lock or lock(self.out_dir)
            self.do(runs)
        missing, results = self.unfinished(runs), [self.result(run) for run in runs]
        if self.args.print_commands:
            for run in missing:
                print(shlex.join(run.command((self.out_dir / run.name).absolute())))
        failed = [result for result in results if result.state == "failed"]
        if failed and self.args.experiment:         # which cannot do without it
            fail(f"{len(failed)} of {len(runs)} runs failed, so nothing can be said. The first, {failed[0].folder}: "
                 f"{failed[0].message}. Mend it and add --retry", status=1)
        if missing:
            raise Unfinished(len(missing), len(runs))
        return results

    def note(self, run):
        """Make the run's folder and write down in it what its name stands for. With --retry, forget that it failed."""
        folder = self.out_dir / run.name
        if read_run(folder) != run:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "run.json", {"script": run.script, "flags": dict(run.flags)})
        if self.args.retry and self.result(run).state == "failed":
            (folder / "failed.json").unlink(missing_ok=True)

    def start(self, run, gpu):
        """Start it, or resume it, on this GPU, or with one thread: N runs of one thread are done before N of N."""
        folder = self.out_dir / run.name
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
            said = (folder / "stderr.txt").read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            message = said[-1] if status else "it ended without a final line in log.jsonl"
            message = message.removeprefix(f"{pathlib.Path(run.script).name}: ").replace(str(folder), run.name)
            if status == 3:                         # what diverged, and when; the advice after that is for one run
                message = message.split(". ")[0]
            if status == 0:                         # a checkpoint at the end, a log that is damaged: to begin anew
                (folder / "ckpt.pt").unlink(missing_ok=True)
            write_atomically(folder / "failed.json", {"status": status, "message": message})
            result = self.result(run)
        if result.state in ("done", "diverged") and not self.args.keep_checkpoints:
            (folder / "ckpt.pt").unlink(missing_ok=True)
        return result

    def do(self, runs):
        """Do what is missing of these runs, some at a time. The sweep that the lock waited for may have done some."""
        waiting = self.unfinished(runs)
        devices = [] if all(run["device"] == "cpu" for run in waiting) else gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jobs = self.args.jobs or len(devices) or cores
        free = list(itertools.islice(itertools.cycle(devices or [None]), jobs))         # a place for each run: its GPU
        keys, running, signals, passed_on = varied(self.asked), {}, [], 0
        before = {number: signal.signal(number, lambda number, frame: signals.append(number))
                  for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
                  if signal.getsignal(number) is not signal.SIG_IGN}    # nohup ignores SIGHUP: so do we, then
        bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", disable=len(runs) == 1,
                   mininterval=0.5 if sys.stderr.isatty() else 30)
        while running or (waiting and not signals):
            while waiting and free and not signals:
                run, gpu = waiting.pop(0), free.pop(0)
                running[self.start(run, gpu)] = run, gpu
            if passed_on < len(signals):            # the first signal lets them save, the second does not
                for process in running:
                    process.kill() if passed_on else process.terminate()
                passed_on += 1
            for process in [process for process in running if process.poll() is not None]:
                run, gpu = running.pop(process)
                free.append(gpu)
                result = self.ended(run, process.returncode)
                if result.state != "unfinished":
                    bar.write(line_of(result, keys), file=sys.stdout)
                    bar.update()
            time.sleep(0.05)
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        if signals:
            print(f"stopped: {len(runs) - len(self.unfinished(runs))} of {len(runs)} runs are finished. The same "
                  "command goes on", flush=True)
            sys.exit(128 + signals[0])


def two_stage(lab, searches, n, seed):
    """Random search in two stages, the protocol of [RF]: n draws from each space, then n from the smallest box around
    the best fifth of them. searches: {name: (make, spaces)}, make(flags) -> runs. -> {name: all results}."""
    found, narrowed = {name: [] for name in searches}, {name: spaces for name, (_, spaces) in searches.items()}
    for stage in (1, 2):
        asked = {name: [run for flags in draws(spaces, n, seed, stage) for run in searches[name][0](flags)]
                 for name, spaces in narrowed.items()}
        lab.results(itertools.chain(*asked.values()))
        narrowed = {}
        for name, runs in asked.items():
            found[name] += [lab.result(run) for run in dict.fromkeys(runs)]
            best = [s.flags for s in by_setting(found[name]) if s.sound][:max(2, n // 5)]
            if best:                                # nothing to search around if none came to a result
                narrowed[name] = {key: space.around([flags[key] for flags in best])
                                  for key, space in searches[name][1].items()}
    return found


def at_edges(spaces, flags):
    """-> text: which of these values lie near an edge of their space, "" if none does."""
    near = [f"{key} {flags[key]}" for key, space in spaces.items() if space.near_edge(flags[key])]
    return "near an edge of the search, so look beyond it: " * bool(near) + ", ".join(near)


def again(lab, results, spaces):
    """The best of a search is partly luck: it is done again with three fresh seeds. -> text."""
    best = by_setting(results)[0]
    if not best.sound:
        return "no setting came to a result with all its seeds"
    first = 1 + max(int(result.run["seed"] or 0) for result in results)
    fresh = lab.results(Run.of(results[0].run.script, best.flags | {"seed": first + i}) for i in range(3))
    edges = at_edges(spaces, best.flags)
    return (f"the best, {phrase(best.flags, spaces)}, again with three fresh seeds: "
            f"{Setting(best.flags, fresh).words()}" + f"\n{edges}" * bool(edges))


# ---- Tables ----------------------------------------------------------------------------------------------------------


class Setting:
    """The results of one setting, one a seed. mean, spread (standard deviation): of those that are done. sound: none of
    its seeds came to grief. score: the mean, but less is better, and infinite unless sound."""

    def __init__(self, flags, results):
        done = [result for result in results if result.state == "done"]
        values = [result.value for result in done]
        self.flags, self.results, self.seeds = flags, results, len(done)
        self.metric = done[0].metric if done else "val_loss"
        self.mean = statistics.fmean(values) if done else math.nan
        self.spread = statistics.stdev(values) if len(done) > 1 else 0.0
        self.sound = bool(done) and all(result.state in ("done", "unfinished") for result in results)
        self.score = METRICS[self.metric]["sign"] * self.mean if self.sound else math.inf

    def number(self):
        """Mean and spread as text."""
        digits = METRICS[self.metric]["digits"]
        return f"{self.mean:.{digits}f}" * bool(self.seeds) + f" +- {self.spread:.{digits}f}" * (self.seeds > 1) or "-"

    def words(self):
        """The same, and how many seeds diverged, which are not in the mean."""
        lost = sum(result.state == "diverged" for result in self.results)
        return self.number() + f", {lost} of {len(self.results)} diverged" * bool(lost)


def by_setting(results):
    """Results that differ in the seed alone are one setting. Best first."""
    found = {}
    for result in results:
        flags = tuple(pair for pair in result.run.flags if pair[0] != "seed")
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


def grid_map(found, keys):
    """-> text: two flags across and down, and the mean result of each pair, the best with a star."""
    across, down = sorted(keys, key=lambda key: -len({s.flags.get(key) for s in found}))
    some = sorted(found, key=lambda s: (by_size(s.flags.get(down)), by_size(s.flags.get(across))))
    return crossing({(s.flags.get(down, "default"), s.flags.get(across, "default")): f"{s.number().split()[0]}"
                     f"{'*' * (s is found[0] and s.sound)}" for s in some}, f"{down} \\ {across}")


def is_grid(found, keys):
    """Whether a map of two flags would be filled, at least by half: random draws would give a diagonal of it."""
    return len(keys) == 2 and 2 * len(found) >= math.prod(len({s.flags.get(key) for s in found}) for key in keys)


def report(results):
    """-> text, for each script that occurs: a table, a line a setting; a map if two flags vary; and every failure."""
    lines = []
    for script in sorted({result.run.script for result in results}):
        some = [result for result in results if result.run.script == script]
        keys, found = varied([result.run for result in some]), by_setting(some)
        same = phrase(some[0].run.flags, {key for key, _ in some[0].run.flags} - {*keys, "seed"})
        rows = [[s.number(), str(s.seeds), *(s.flags.get(key, "") for key in keys),
                 tally([result for result in s.results if result.state != "done"])] for s in found]
        lines += [f"{len(some)} runs of {pathlib.Path(script).name}: {tally(some)}",
                  f"all with {same or 'the defaults'}", columns([[found[0].metric, "seeds", *keys, ""], *rows])]
        if is_grid(found, keys):
            lines.append(grid_map(found, keys))
        lines += [line_of(result, keys) for state in ("failed", "diverged") for result in some if result.state == state]
    return "\n".join(lines)


# ---- Pictures --------------------------------------------------------------------------------------------------------

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()     # Okabe and Ito's, for the colour-blind
DASHES, MARKERS = ("-", "--", "-.", ":"), "os^Dv"
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
FAILED = "a seed diverged or failed", dict(color="black", linestyle="none", marker="x")
BEST = dict(color="black", linestyle=":", marker="*", markersize=16, zorder=9)


# One pair of axes. log: those that are logarithmic, as "x", "y" or "xy"; band: a shaded range of y
Panel = collections.namedtuple("Panel", "title x y log band", defaults=("", ()))
# y over x: numbers, or names, which stand side by side. y may be several lists: lines that share a label. low and high:
# the ends of error bars, or of a band where there are many points. style: matplotlib's, beside the usual one
Curve = collections.namedtuple("Curve", "x y low high style", defaults=([], [], {}))


def curves(title, panels, path):
    """{Panel: {label: Curve}} -> a file, and matplotlib's figure. All pictures are made here. Panels with the same y
    stand together and share a legend. There, the same words at an axis mean the same range."""
    import matplotlib
    from matplotlib.figure import Figure
    groups = [list(group) for _, group in itertools.groupby(panels, key=lambda panel: panel.y)]
    shapes = [(2, 2) if len(group) == 4 else (math.ceil(len(group) / 3), min(len(group), 3)) for group in groups]
    rows = [rows for rows, _ in shapes]
    with matplotlib.rc_context({"font.size": 13, "axes.titlesize": 13, "axes.grid": True, "grid.alpha": 0.3,
                                "text.parse_math": False}):
        figure = Figure(figsize=(13.3, max(7.5, 4.2 * sum(rows))), dpi=120, layout="constrained")
        figure.suptitle("\n".join(textwrap.fill(line, 105) for line in title.splitlines()), fontsize=15)
        parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=rows)[:, 0]
        for group, shape, part in zip(groups, shapes, parts):
            labels, shared = {label: None for panel in group for label in panels[panel]}, {}
            for i, panel in enumerate(group):
                axes = part.add_subplot(*shape, i + 1, sharex=shared.get(panel.x), sharey=shared.get(panel.y))
                shared |= {panel.x: axes, panel.y: axes}
                axes.set(xlabel=panel.x, ylabel=panel.y, title=textwrap.fill(panel.title, 90 // shape[1]))
                fill(axes, panel, panels[panel], list(labels))
                labels |= {label: line for line, label in zip(*axes.get_legend_handles_labels())}
            if len(labels) > 1:
                part.legend(labels.values(), labels, loc="outside right center")
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
        axes.plot(xs, list(zip(*y)) if y and isinstance(y[0], list) else y, label=label, **style)
        if low and style["marker"]:
            axes.vlines(xs, low, high, color=style["color"])
        elif low:
            axes.fill_between(xs, low, high, color=style["color"], alpha=0.2, linewidth=0)
    if panel.band:
        axes.axhspan(*panel.band, color="grey", alpha=0.2, linewidth=0)
    if names:
        axes.set_xticks(range(len(names)), [textwrap.fill(name, 11, break_long_words=False) for name in names],
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
    axis.set_major_formatter(lambda x, _: "2" + f"{math.log2(x):.0f}".translate(RAISED) if powers else f"{x:.4g}")
    axis.set_minor_locator(ticker.NullLocator())


def report_panels(results):
    """Of a grid of one or two flags a panel: over the flag with more values, a line for each value of the other. Of
    anything else a panel for each flag, a point for each setting. A star: the best; a cross: one with a failed seed."""
    found, keys = [s for s in by_setting(results) if s.seeds], varied([result.run for result in results])
    if not keys:                                    # one setting: its seeds beside each other
        found = [Setting(dict(result.run.flags), [result]) for result in results if result.state == "done"]
        found, keys = sorted(found, key=lambda s: s.score), ["seed"]
    keys.sort(key=lambda key: -len({s.flags.get(key) for s in found}))
    joined = len(keys) == 1 or is_grid(found, keys)
    panels, lines, style = {}, keys[1:] if joined else [], {} if joined else dict(linestyle="none")
    for key in keys[:1] if joined else keys:
        values, groups = sorted({s.flags.get(key) or "default" for s in found}, key=by_size), {}
        numeric = len(values) > 3 and all(by_size(value)[0] == 1 for value in values)
        log = numeric and float(values[0]) > 0 and float(values[-1]) > 10 * float(values[0])
        for s in sorted(found, key=lambda s: [by_size(s.flags.get(key)) for key in [*lines, key]]):
            label, of_group = (phrase(s.flags, lines) or "mean", style) if s.sound else FAILED
            groups.setdefault(label, (of_group, []))[1].append(s)
        groups[f"best: {found[0].words()}"] = BEST, found[:1]
        panels[Panel("", key, found[0].metric, "x" * log)] = {
            label: error_bars([float(s.flags[key]) if numeric else s.flags.get(key) or "default" for s in some], some,
                              of_group) for label, (of_group, some) in groups.items()}
    return panels


def error_bars(xs, settings, style={}):
    """Means as a Curve, with standard deviations over the seeds."""
    ends = [[s.mean + sign * s.spread for s in settings] for sign in (-1, 1)]
    return Curve(list(xs), [s.mean for s in settings], *ends, style)


# ---- Curves of any runs ----------------------------------------------------------------------------------------------


def load(folders):
    """Runs, or whole sweeps -> {name: [the log of each seed]}. Runs whose config.json differ in the seed alone are one.
    Its name is made of the settings that tell it from the others, or is its folder."""
    groups, seen = {}, collections.Counter()        # {(settings, copy): folders}
    for folder in map(pathlib.Path, dict.fromkeys(folders)):
        homes = [folder] if (folder / "log.jsonl").exists() else [p.parent for p in sorted(folder.glob("*/log.jsonl"))]
        for home in homes or fail(f"--curves {folder}: no log.jsonl is in it, or in the folders in it"):
            config = json.loads((home / "config.json").read_text() if (home / "config.json").exists() else "{}")
            config |= config.get("hyper") or {}
            settings = tuple(sorted((key, str(value)) for key, value in config.items()
                                    if key not in ("hyper", "tuned", "out_dir", "resume", "seed")))
            run = settings, config.get("seed")
            groups.setdefault((settings, seen[run]), []).append(home)
            seen[run] += 1                          # the same run twice is two curves, not two seeds

    def told_apart(keys):
        return len({tuple(dict(settings).get(key) for key in keys) for settings, _ in groups})
    keys, first = [], ["opt", "data", "model", "arch", "n_layer", "n_embd", "lr", "weight_decay"]
    for key in first + sorted({key for settings, _ in groups for key, _ in settings} - set(first)):
        keys += [key] * (told_apart([*keys, key]) > told_apart(keys))
    names = {}
    for (settings, copy), homes in groups.items():
        name = ", ".join(f"{key} {dict(settings)[key]}" for key in keys if key in dict(settings)).removeprefix("opt ")
        if copy or not name:
            name = f"{name} in {homes[0]}".removeprefix(" in ")
        names[name] = [read_jsons(home / "log.jsonl") for home in homes]
    return names


def over_seeds(logs, read):
    """-> steps, mean, low, high of what read(record) finds in all of these logs; it gives None for a record without."""
    found = [{record["step"]: value for record in log if isinstance(value := read(record), (int, float)) and
              math.isfinite(value)} for log in logs]
    steps = sorted(set.intersection(*map(set, found)))
    ys = [[values[step] for values in found] for step in steps]
    mean = [statistics.fmean(y) for y in ys]
    spread = [statistics.stdev(y) for y in ys] if len(logs) > 1 else []        # of one there is none to show
    return steps, mean, [m - s for m, s in zip(mean, spread)], [m + s for m, s in zip(mean, spread)]


def angles(logs):
    """{kind of layer: Curve of the angles of all its layers}, the predicted ones dashed; {} without rotation."""
    names = dict.fromkeys(name for log in logs for record in log for name in record.get("rotation") or {})
    found = {"angle": {}, "predicted_angle": {}}    # {what: {kind: (steps, [a line for each layer])}}
    for name, (what, kinds) in itertools.product(names, found.items()):
        kind = ".".join(word for word in name.split(".") if not word.isdigit() and word not in ("blocks", "weight"))
        steps, mean, *_ = over_seeds(logs, lambda record: (record.get("rotation") or {}).get(name, {}).get(what))
        if steps:
            kinds.setdefault(kind, (steps, []))[1].append(mean)
    measured, predicted = found.values()
    lines = {kind: Curve(*curve, style=dict(color=COLOURS[i % 7], linestyle=("-", "-.", ":")[i % 3], linewidth=1.5,
                                            marker="")) for i, (kind, curve) in enumerate(measured.items())}
    alike = len({tuple(f"{angle:.2g}" for angle in line) for _, some in predicted.values() for line in some}) == 1
    for i, (kind, curve) in enumerate(predicted.items()):
        lines["predicted" if alike else f"{kind}, predicted"] = Curve(*curve, style=dict(
            color="black" if alike else COLOURS[i % 7], linestyle="--", marker=""))
    return lines


def chart(lines):
    """{label: Curve} -> text: a small picture in letters, the first of which is a."""
    points = [(x, y, chr(97 + i)) for i, curve in enumerate(lines.values()) for x, y in zip(curve.x, curve.y)]
    xs, ys, _ = zip(*points)
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    cells = [[" "] * 100 for _ in range(16)]
    for x, y, letter in points:
        cells[round(15 * (high - y) / (high - low or 1))][round(99 * (x - left) / (right - left or 1))] = letter
    ends = [f"{high:.4g}", *[""] * 14, f"{low:.4g}"]
    rows = [f"  {end:>7s} |{''.join(row).rstrip()}" for end, row in zip(ends, cells)]
    return "\n".join([*rows, f"{'':10s}{left:<92g}{right:>8g} steps"])


def compare(folders, metric, plot):
    """Print a table and a small chart of these runs, and draw them: results over steps and over seconds, and angles."""
    found, panels, findings = {}, {}, []            # found: {metric: [(label, logs, steps, mean, low, high)]}
    for label, logs in load(folders).items():
        for name in [metric] if metric else METRICS:        # bleu is only in the last record: that is no curve
            steps, *ys = over_seeds(logs, lambda record: record.get(name))
            if len(steps) > 1:
                found.setdefault(name, []).append((label, logs, steps, *ys))
                break
        else:
            print(f"{label}: no two records have {metric or ', '.join(METRICS)} yet")
    for name, some in found.items():
        sign = METRICS[name]["sign"]
        some.sort(key=lambda row: sign * row[3][-1])
        after = int(all(steps[0] == 0 and len(steps) > 2 for _, _, steps, *_ in some))      # untrained, all are alike
        rows, over_steps, over_time = [["", name, "", "at step", "seconds", "seeds", ""]], {}, {}
        for letter, (label, logs, steps, *ys) in zip(map(chr, itertools.count(97)), some):
            times = dict(zip(*over_seeds(logs, lambda record: record.get("seconds") if name in record else None)[:2]))
            running = sum(not log[-1].get("final") for log in logs)
            rows.append([letter, f"{ys[0][-1]:.4f}", label, str(steps[-1]), f"{times.get(steps[-1], math.nan):.1f}",
                         str(len(logs)), f"{running} not at the end" * bool(running)])
            if len(over_steps) < 8:                 # as many as can be told apart
                ys = [values[after:] for values in ys]
                over_steps[label] = Curve(steps[after:], *ys)
                over_time[label] = Curve([times.get(step, math.nan) for step in steps[after:]], *ys)
        print(columns(rows) + f"\n\n{name}\n{chart(over_steps)}\n")
        findings.append(f"{'lowest' if sign > 0 else 'highest'} {name}: {rows[1][1]}, {some[0][0]}" +
                        f" (the 8 best of {len(some)})" * (len(some) > 8))
        unit = f"{name} (nats)" if name == "val_loss" else name
        panels |= {Panel("", "step", unit): over_steps, Panel("", "seconds", unit): over_time}
    for label, logs, *_ in itertools.chain(*(some[:6] for some in found.values())):
        if lines := angles(logs):
            panels[Panel(label, "step", "angle per step (radians)")] = lines
    if not panels:
        fail("--curves: there is nothing to draw yet", status=1)
    if plot:
        curves("\n".join(findings), panels, plot)


# ---- Experiments: what they share ------------------------------------------------------------------------------------
#
# Each experiment is a block: claim, set-up, criterion, figures. Its docstring is printed. The criteria were written
# down before the first full run. The set-ups were found with the seeds 1337 and 0 to 2, on which nothing is decided.
# (README says what has changed since.)
#
#   [RE] Rotational Equilibrium, arXiv:2305.17212     [MN] modular norm, arXiv:2405.14813     [RF] root-free, 2402.03496

# What all runs on a network share. They are evaluated at their end, unless an experiment wants to see the way there.
BASE = {
    ("cpu", "gpt"): dict(device="cpu", n_layer=2, n_head=2, n_embd=64, block_size=32, batch_size=12, steps=1000,
                         warmup=100, eval_every=1000, eval_batches=100, track=0),
    ("gpu", "gpt"): dict(device="cuda", preset="shakespeare", data="python_docs", dropout=0, compile=0, steps=1000,
                         warmup=100, eval_every=1000, eval_batches=100, track=0),
    ("cpu", "resnet"): dict(device="cpu", model="resnet18", width=4, split=0.9, batch_size=32, track=0),
    # 1000 images, seen 13 times: so few that optimizers differ in accuracy
    ("cpu", "vgg"): dict(device="cpu", model="vgg16", width=8, split=0.05, crop=0, flip=0, batch_size=32, steps=400,
                         warmup=20, eval_every=400, track=0),
    ("cpu", "resmlp"): dict(device="cpu", model="resmlp", width=64, depth=2, split=0.9, crop=0, flip=0, batch_size=64,
                            steps=300, eval_every=240, track=0),
}
BASE |= {("gpu", net): BASE["cpu", net] | {"device": "cuda", "compile": 0} | larger for net, larger in {
    "resnet": dict(width=32, batch_size=64),
    "vgg": dict(width=32, split=0.25, batch_size=128, steps=2000, warmup=100, eval_every=2000),
    "resmlp": dict(width=128, batch_size=128, steps=2000, eval_every=1600)}.items()}
LOSS, ACCURACY = "validation loss (nats)", "validation accuracy"


# What an experiment found. checks: [(what had to be so, with the measured numbers; whether it was)]; said: the sentence
# for a lecture; untested: what of the claim could not be checked
Finding = collections.namedtuple("Finding", "text checks panels said untested", defaults=("",))


def model_run(lab, net, seed=0, **flags):
    """A run on one of the networks of BASE, with flags in place of BASE's. Seed 0 is for tuning, 1, 2, ... decide. The
    script's own is 10 more, and `--seeds N` adds 10 N."""
    return Run.of("nanogpt_train.py" if net == "gpt" else "cifar_train.py", BASE[lab.args.scale, net] | flags | {
        "seed": 10 + seed + 10 * (lab.args.seeds or 0)})


def measured(lab, net, cases, seeds):
    """{case: flags} -> {case: Setting with a run for each seed}."""
    runs = {case: [model_run(lab, net, seed, **flags) for seed in seeds] for case, flags in cases.items()}
    lab.results([run for some in runs.values() for run in some])
    return {case: Setting(flags, [lab.result(run) for run in runs[case]]) for case, flags in cases.items()}


def tuned(lab, net, grids, **shared):
    """Grids of lr and decay, one seed. {opt: (lrs, decays)} -> {opt: the flags of the best}; text, which says where the
    best lr or decay is the first or the last of three or more."""
    best, text = {}, []
    found = measured(lab, net, {(opt, lr, decay): dict(opt=opt, lr=lr, weight_decay=decay, **shared) for opt, (
        lrs, decays) in grids.items() for lr in lrs for decay in decays}, [0])
    for opt, (lrs, decays) in grids.items():
        some = sorted((s for s in found.values() if s.flags["opt"] == opt), key=lambda s: s.score)
        best[opt] = some[0].flags
        if not some[0].sound:
            fail(f"all {len(some)} runs that tune {opt} diverged, so nothing can be said", status=1)
        edge = "".join(f", the best {key} is at the edge" for key, values in (("lr", lrs), ("weight_decay", decays))
                       if len(values) > 2 and best[opt][key] in (values[0], values[-1]))
        text.append(f"{opt}, tuned with one seed{edge}\n{grid_map(some, ['lr', 'weight_decay'])}")
    return best, "\n".join(text)


def searched(lab, spaces, flags, stored):
    """The random search in two stages for each of {(net, opt): spaces}; flags(net, opt) are those of all its runs.
    -> {(net, opt): the flags of the best run}; text, which says where these lie near an edge of their space. At cpu
    scale the search is only done with --runs. Else its results are taken from {(net, opt): flags} in `stored`."""
    if lab.args.scale == "cpu" and not lab.args.runs:
        return {case: flags(*case) | stored[case] for case in spaces}, ""
    results = two_stage(lab, {(net, opt): (
        lambda drawn, net=net, opt=opt: [model_run(lab, net, **flags(net, opt), **drawn)], space)
        for (net, opt), space in spaces.items()}, lab.args.runs or 40, lab.args.seeds or 0)
    best = {case: by_setting(some)[0].flags for case, some in results.items()}
    edges = {case: at_edges(space, best[case]) for case, space in spaces.items()}
    return ({case: flags(*case) | {key: best[case][key] for key in space} for case, space in spaces.items()},
            "".join(f"{', '.join(case)}: {words}\n" for case, words in edges.items() if words))


def losses(setting, classes=103):
    """The loss of each seed: of ResMLP on training images, as in [MN]. A run that diverged counts as one that has
    learned nothing: log(classes). python_docs has 103 characters."""
    found = [(r.value if r.metric == "val_loss" else r.log()[-1]["train_loss"]) if r.state == "done" else math.inf
             for r in setting.results]
    return [min(loss, math.log(classes)) for loss in found]


def spread(values, digits=3):
    """Numbers, one a seed -> "mean +- standard deviation" of the finite ones, or "-" of fewer than two."""
    some = [x for x in values if math.isfinite(x)]
    return f"{statistics.fmean(some):.{digits}f} +- {statistics.stdev(some):.{digits}f}" if len(some) > 1 else "-"


def at_most(score, limit):
    """Whether a Setting.score keeps a limit. If either is infinite something diverged, and nothing is shown."""
    return math.isfinite(score) and math.isfinite(limit) and score <= limit


def rotations(result, *keys):
    """-> steps, {hidden matrix: [its row of `rotation` at each of them]}: not the embeddings and the output, of which
    most rows have no gradient in a step, or whose norm matters to the loss. Steps at which one of the keys is null
    for one of the matrices are left out."""
    rows = {record["step"]: {name: row for name, row in record["rotation"].items()
                             if not re.match("tokens|positions|head", name)}
            for record in result.log() if record.get("rotation")}
    rows = {step: of_step for step, of_step in rows.items()
            if all(row[key] is not None for row in of_step.values() for key in keys)}
    if not rows:
        fail(f"{result.folder} has no step with a number for each of {', '.join(keys)}, so nothing can be said", 1)
    return list(rows), {name: [of_step[name] for of_step in rows.values()] for name in next(iter(rows.values()))}


def late_mean(values, share):
    """Mean over the last share of a run."""
    return statistics.fmean(values[int(len(values) * (1 - share)):])


# ---- What an experiment may change in optim.py before a script starts ------------------------------------------------


def radial(optim, _):
    """The probe also measures how far gradients point along the weights: the mean over neurons of g.w / (|g| |w|)."""
    import torch

    class Probe(optim.RotationProbe):
        def _after(self, optimizer, *arguments):
            parts = {optim.name_of(group, i, index): torch.cosine_similarity(
                         self._copies[p].flatten(1), p.grad.flatten(1)).mean().item()
                     for index, group in enumerate(optimizer.param_groups)
                     for i, p in enumerate(group["params"]) if p in self._copies and p.grad is not None}
            super()._after(optimizer, *arguments)
            self.rows = [row | {"radial": parts[row["name"]]} for row in self.rows]
    optim.RotationProbe = Probe


def turn(optim, factors):
    """Rotational matrices turn by multiples of their angle: a factor for each, in their order in the model. Or a single
    factor, for the first tenth of the neurons of each."""
    import torch
    even, factors, order = optim.Rotational.move, list(map(float, factors.split(","))), {}

    def move(self, w, d, state, h):
        i, some = order.setdefault(w.data_ptr(), len(order)), torch.ones_like(state["radius"])
        if len(factors) == 1:
            some[:math.ceil(len(w) / 10)] = factors[0]
        else:
            some *= factors[i]
        even(self, w, d, state, h | {"angle": h["angle"] * some})
    optim.Rotational.move, optim.Rotational.by_row = move, lambda self, h: False        # no part of a matrix by itself


def start(optim, batch_size):
    """The v of RMSProp starts at 1/B, as the s of rf_rmsprop does, in place of 0."""
    import torch
    zero, first = optim.rmsprop.start, 1 / int(batch_size)
    optim.rmsprop.start = lambda self, w, h: zero(self, w, h) | {"square_avg": torch.full_like(w, first)}


CHANGES = {f.__name__: f for f in (radial, turn, start)}


def run_changed(name_and_value, script, *flags):
    """`sweep.py --change NAME=VALUE SCRIPT FLAGS`: a script, after one of CHANGES."""
    import optim
    name, _, value = name_and_value.partition("=")
    CHANGES[name](optim, value)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


# ---- Experiments on rotation -----------------------------------------------------------------------------------------


def equilibrium(lab):
    """Claim    Weight decay brings every layer to a norm and an angle per step that follow from lr, decay and momentum
             alone (the norm under SGD: also from the gradient's size). [RE], table 1
    Done     AdamW, SGD with momentum and Lion train a GPT and a ResNet at a constant lr, chosen with the decay such
             that the way there takes 500 and 250 steps. The theory is for weights whose norm the network does not feel,
             as before batch norm in the ResNet. Their gradients have no radial part g.w / (|g| |w|). So that is
             measured, too, every 10 steps: its mean over neurons and the run. All hidden matrices, one seed.
    Held if  in the last quarter four matrices in five have an angle within 25 % of the prediction, and four in five a
             norm within 25 % of it: for each network, under each optimizer. And if the radial part explains the misses
             of the GPT: under each optimizer its median size over the matrices with a miss is at least twice that over
             the others."""
    hyper = {("gpt", "adamw"): dict(lr=4e-3, weight_decay=0.25), ("gpt", "sgd"): dict(lr=0.3, weight_decay=1e-3 / 3),
             ("gpt", "lion"): dict(lr=5e-4, weight_decay=2), ("resnet", "adamw"): dict(lr=5e-3, weight_decay=0.4),
             ("resnet", "sgd"): dict(lr=0.1, weight_decay=2e-3), ("resnet", "lion"): dict(lr=1e-3, weight_decay=2)}
    length = {"gpt": dict(n_layer=4, steps=2500, eval_every=2500, save_every=500),
              "resnet": dict(steps=1200, eval_every=1200, save_every=300)}
    results = lab.results([model_run(lab, net, 1, opt=opt, schedule="constant", warmup=50, track=10, grad_clip=0,
                                     change="radial", **length[net], **h) for (net, opt), h in hyper.items()])
    rows, checks = [["network", "optimizer", "measured / predicted", "least", "median", "largest"]], []
    panels, scatter, misses, late = {}, {}, [], {}
    hits, times = [], {}                            # of the GPT: which matrices keep both; {optimizer: radial, times}
    for (net, opt), result in zip(hyper, results):
        if result.state != "done":
            checks.append((f"{net}, {opt}: diverged", False))
            continue
        steps, matrices = rotations(result, "angle", "norm", "predicted_angle", "predicted_norm", "radial")
        missed, lines = set(), {}
        panels[Panel(f"{net}, {opt}", "step", "measured / predicted", "y", (0.75, 1.25))] = lines
        for what in ("angle", "norm"):              # SGD's predicted norm changes with the gradient: its mean, too
            ratios = {name: [row[what] / late_mean([row[f"predicted_{what}"] for row in some], 0.25) for row in some]
                      for name, some in matrices.items()}
            late[what] = {name: late_mean(ratio, 0.25) for name, ratio in ratios.items()}
            far = {name for name, ratio in late[what].items() if abs(ratio - 1) > 0.25}
            missed |= far
            rows.append([net, opt, what, *(f"{f(late[what].values()):.2f}" for f in (min, statistics.median, max))])
            near = len(matrices) - len(far)
            checks.append((f"{net}, {opt}: the {what} of {near} of {len(matrices)} matrices is within 25 % of the "
                           "prediction", near >= 0.8 * len(matrices)))
            ordered, tenth = [sorted(column) for column in zip(*ratios.values())], len(ratios) // 10
            lines[f"{what}: median\nand middle 80 %"] = Curve(
                steps, [statistics.median(column) for column in ordered], [column[tenth] for column in ordered],
                [column[-1 - tenth] for column in ordered], {"marker": ""})
        parts = {name: statistics.fmean(row["radial"] for row in some) for name, some in matrices.items()}
        if net == "gpt":
            hits += [name not in missed for name in matrices]
        if net == "gpt" and missed:                 # else there is nothing to explain
            far, near = (statistics.median([abs(parts[name]) for name in some] or [math.nan])
                         for some in (missed, matrices.keys() - missed))
            times[opt] = far / near
            checks.append((f"gpt, {opt}: median size of the radial part {far:.4f} of {len(missed)} matrices with a "
                           f"miss, {near:.4f} of the other {len(matrices) - len(missed)}", far >= 2 * near))
        misses += [f"  {net}, {opt}: {name}, radial part {parts[name]:+.4f}" for name in sorted(missed)]
        scatter[f"{net}, {opt}"] = Curve(list(parts.values()), list(late["norm"].values()),
                                         style={"linestyle": "none"})
    panels[Panel("each hidden matrix", "radial part of the gradient: g.w / (|g| |w|)", "norm: measured / predicted",
                 "y", (0.75, 1.25))] = scatter
    text = "\n".join(["Over the matrices, means over the last quarter:", columns(rows), "Misses:", *misses])
    return Finding(text, checks, panels,
                   f"Of the GPT's {len(hits)} cases {sum(hits)} turn and grow as the formulas say." + "".join(
                       f" Under {opt} the gradient's radial part is {x:.1f} times as large in the others."
                       for opt, x in times.items() if math.isfinite(x)))


def balance(lab):
    """Claim    Under Adam with L2 in the gradient some layers turn much faster than others, under AdamW all alike. That
             is why AdamW is better, and giving Adam+L2 balanced rotation closes the gap. [RE], section 5.3
    Done     VGG-16 on 1000 images, with gains for all. The decay of adam, adamw and rotational_adam is tuned with one
             seed, at the better of the lrs 0.003 and 0.01. Three other seeds run at the best. The spread of the
             rotation: largest over smallest mean angle of a matrix in the second half. Then the reason:
             rotational_adam is made as uneven as adam. Each layer's angle is multiplied by its mean angle under adam,
             over the geometric mean of all layers'. Its decay is tuned anew.
    Held if  adam's spread is at least twice adamw's; adamw's mean accuracy is at least 0.02 above adam's;
             rotational_adam's is at most 0.02 below adamw's; and adam's angles cost rotational_adam at least half of
             its lead over adam."""
    rotational, seeds = {"rotational_adam": ((1e-2,), (0.1, 0.5, 2))}, (1, 2, 3)
    best, text = tuned(lab, "vgg", {"adam": ((3e-3,), (0.03, 0.1, 0.3)), "adamw": ((3e-3,), (1.5, 4, 12))} | rotational,
                       gains=1, track=20)
    found = measured(lab, "vgg", best, seeds)

    def angles_of(s):
        """Of each hidden matrix, in the second half of the run: the mean over the seeds that did not diverge."""
        of_runs = [[late_mean([row["angle"] for row in rows], 0.5) for rows in rotations(result, "angle")[1].values()]
                   for result in s.results if result.state == "done"]
        if not of_runs:
            fail(f"{s.flags['opt']} diverged with every seed at its best setting, so nothing can be said", status=1)
        return list(map(statistics.fmean, zip(*of_runs)))
    adams, name = angles_of(found["adam"]), "rotational_adam, as uneven as adam"
    factors = [f"{angle / statistics.geometric_mean(adams):.3g}" for angle in adams] + ["1"]    # the output's: as it is
    tuned_anew, more = tuned(lab, "vgg", rotational, gains=1, track=20, change="turn=" + ",".join(factors))
    found |= measured(lab, "vgg", {name: tuned_anew["rotational_adam"]}, seeds)
    apart = {opt: max(angles_of(s)) / min(angles_of(s)) for opt, s in found.items()}
    score = {opt: s.score for opt, s in found.items()}              # less accuracy; infinite if a seed diverged
    adam, adamw, even, uneven = score.values()
    lost, lead = (f"{x:+.4f}" if math.isfinite(x) else "diverged" for x in (uneven - even, adam - even))
    checks = [(f"spread of the angles: adam {apart['adam']:.2f}, adamw {apart['adamw']:.2f}",
               apart["adam"] >= 2 * apart["adamw"]),
              (f"accuracy: adamw {found['adamw'].words()}, adam {found['adam'].words()}", at_most(adamw, adam - 0.02)),
              (f"accuracy: rotational_adam {found['rotational_adam'].words()}, adamw {found['adamw'].words()}",
               at_most(even, adamw + 0.02)),
              (f"adam's angles cost rotational_adam {lost}; its lead over adam is {lead}",
               at_most((adam + even) / 2, uneven) and even < adam)]
    rows = [["three other seeds", "accuracy", "spread of the angles", "at"]] + [
        [opt, s.words(), f"{apart[opt]:.2f}", phrase(s.flags, ("lr", "weight_decay"))] for opt, s in found.items()]
    return Finding(f"{text}\n{name}, {more}\n{columns(rows)}", checks, {
        Panel("mean and standard deviation of three seeds", "", ACCURACY): {"": error_bars(found, found.values())}} | {
        Panel(f"{opt}: largest / smallest {apart[opt]:.2f}", "step", "angle per step (radians)", "y"): {
            label: line for label, line in angles([s.results[0].log()]).items() if not label.startswith("head")}
        for opt, s in found.items()},
        f"Adam's layers turn at speeds up to {apart['adam']:.1f} times apart, AdamW's {apart['adamw']:.1f} times; even "
        f"rotation moves Adam from {found['adam'].words()} to {found['rotational_adam'].words()}, uneven rotation back "
        f"to {found[name].words()}.")


def imbalance(lab):
    """Claim    Neurons should turn equally fast: where some turn much faster or slower than the others, the network
             learns less. [RE], appendix J.6
    Done     VGG-16 on 1000 images, rotational_adamw. The first tenth of the neurons of each layer turns 10 or 3 times
             as far as the others in each step, or a third or a tenth as far. The decay, which all angles follow, is
             tuned for each of these with one seed, as in the paper; then three other seeds at the best.
    Held if  at 10 times and at a tenth the mean accuracy is at least 0.01 below that of even rotation, and at 3 times
             and at a third it is at most 0.01 above it."""
    best, text = {}, []
    for speed, factor in {"1/10": 0.1, "1/3": 0.333, "1": 1, "3": 3, "10": 10}.items():
        of_speed, more = tuned(lab, "vgg", {"rotational_adamw": ((1e-2,), (0.25, 1))}, change=f"turn={factor}")
        best[speed] = of_speed["rotational_adamw"]
        text.append(f"a tenth of the neurons at {speed}: {more}")
    found = measured(lab, "vgg", best, (1, 2, 3))
    rows = [["speed of a tenth", "accuracy", "less than even, seed by seed", "weight_decay"]] + [
        [speed, s.words(), spread([even.value - r.value for r, even in zip(s.results, found["1"].results)], 4),
         str(s.flags["weight_decay"])] for speed, s in found.items()]
    checks = [(f"a tenth at {speed}: accuracy {found[speed].words()}, even {found['1'].words()}",
               at_most(found["1"].score, found[speed].score + more))        # scores are accuracies with a minus
              for speed, more in (("10", -0.01), ("1/10", -0.01), ("3", 0.01), ("1/3", 0.01))]
    return Finding("\n".join([*text, "three other seeds:", columns(rows)]), checks, {
        Panel("mean and standard deviation of three seeds", "speed of a tenth of the neurons, over that of the rest",
              ACCURACY): {"": error_bars(found, found.values())}},
        f"If a tenth of the neurons turns ten times as fast as the rest, accuracy goes from "
        f"{found['1'].words()} to {found['10'].words()}; ten times as slowly, to {found['1/10'].words()}.")


def lr_against_decay(lab):
    """Claim    At a constant product of lr and decay, and so at a constant angle in equilibrium, plain AdamW still
             depends on lr, which sets how long the way to equilibrium is. The rotational variant is there from the
             first step, and hardly depends on it. [RE], section 5.2
    Done     A GPT with gains, adamw and rotational_adamw: five lrs over two decades, each with the decay that keeps lr
             * weight_decay at 4e-4; three seeds. The range: largest less smallest mean loss.
    Held if  adamw's range is at least 0.05, and rotational_adamw's at most half of it."""
    lrs = (4e-4, 1.26e-3, 4e-3, 1.26e-2, 4e-2)
    opts = ("adamw", "rotational_adamw")
    found = measured(lab, "gpt", {(opt, lr): dict(opt=opt, lr=lr, weight_decay=round(4e-4 / lr, 4), gains=1)
                                  for opt in opts for lr in lrs}, (1, 2, 3))
    means = {opt: [statistics.fmean(losses(found[opt, lr])) for lr in lrs] for opt in opts}
    plain, rotational = (max(means[opt]) - min(means[opt]) for opt in opts)
    return Finding(crossing({(opt, f"lr {lr:g}"): spread(losses(s)) for (opt, lr), s in found.items()}, "val_loss"), [
        (f"range over the lrs: adamw {plain:.4f}", plain >= 0.05),
        (f"range over the lrs: rotational_adamw {rotational:.4f}, adamw {plain:.4f}", rotational <= plain / 2)], {
        Panel("mean and standard deviation of three seeds", "lr, at lr x weight decay = 0.0004", LOSS, "x"): {
            opt: error_bars(lrs, [found[opt, lr] for lr in lrs]) for opt in opts}},
        f"With lr times decay held fixed, a hundredfold change of lr moves AdamW's loss by {plain:.2f} nats and the "
        f"rotational variant's by {rotational:.2f}.")


def zero_shot(lab):
    """Claim    The rotational variant works at the lr and decay that the plain optimizer was tuned to, without tuning
             of its own. [RE], tables 2 and 3
    Done     adamw, sgd and lion are tuned on a grid of lr and decay with one seed, 500 steps; at the best of each,
             plain and rotational run with three other seeds (gains on, the same network for both).
    Held if  each rotational variant's mean loss is at most 0.02 above that of its plain optimizer."""
    best, text = tuned(lab, "gpt", {
        "adamw": ((2e-3, 4e-3, 8e-3), (0.03, 0.1, 0.3)), "sgd": ((0.1, 0.3, 1), (1e-4, 3e-4, 1e-3)),
        "lion": ((2.5e-4, 5e-4, 1e-3), (0.3, 1, 3))}, gains=1, steps=500, eval_every=500)
    found = measured(lab, "gpt", {prefix + opt: h | {"opt": prefix + opt} for opt, h in best.items()
                                  for prefix in ("", "rotational_")}, (1, 2, 3))
    pair = {opt: (found[opt], found[f"rotational_{opt}"]) for opt in best}
    checks = [(f"{opt} {plain.words()}, rotational_{opt} {rotational.words()} at "
               f"{phrase(best[opt], ('lr', 'weight_decay'))}", at_most(rotational.score, plain.score + 0.02))
              for opt, (plain, rotational) in pair.items()]
    rows = [["three other seeds", "plain", "rotational"],
            *([opt, *(s.words() for s in some)] for opt, some in pair.items())]
    return Finding(f"{text}\n{columns(rows)}", checks, {
        Panel("mean and standard deviation of three seeds", "optimizer, at the lr and decay of the plain one", LOSS): {
            kind: error_bars(pair, [some[i] for some in pair.values()])
            for i, kind in enumerate(("plain", "rotational"))}},
        "At the plain optimizer's own settings, rotation changes the loss by " + ", ".join(
            f"{rotational.mean - plain.mean:+.3f} ({opt})" for opt, (plain, rotational) in pair.items()) + " nats.")


def warmup(lab):
    """Claim    At a large lr a plain optimizer needs a warmup, since rotation is far too fast before equilibrium is
             reached; rotational variants hold their angle from the first step and need much less. [RE], section 5.2
    Done     adamw and sgd, plain and rotational, on a GPT with gains, each at two lrs at which the plain one trains
             with a warmup: with 50 steps of it and with none; four seeds. The cost of none: the mean increase of the
             loss.
    Held if  that cost is at least 0.02 for each plain optimizer, and at most half as large for its variant."""
    plain = ("adamw", (4e-3, 8e-3), 0.1), ("sgd", (0.15, 0.3), 1e-4)
    hyper = {prefix + opt: (opt, lrs, decay) for opt, lrs, decay in plain for prefix in ("", "rotational_")}
    found = measured(lab, "gpt", {
        (name, lr, warm): dict(opt=name, lr=lr, weight_decay=decay, gains=1, steps=500, eval_every=500, warmup=warm)
        for name, (_, lrs, decay) in hyper.items() for lr in lrs for warm in (50, 0)}, (1, 2, 3, 4))
    costs = {}                                      # {optimizer: of each seed, the mean over the lrs}
    for name, (_, lrs, _) in hyper.items():
        of_lrs = [[cold - warm for warm, cold in zip(losses(found[name, lr, 50]), losses(found[name, lr, 0]))]
                  for lr in lrs]
        costs[name] = list(map(statistics.fmean, zip(*of_lrs)))
    cost = {name: statistics.fmean(values) for name, values in costs.items()}
    checks = [(f"no warmup costs {opt} {spread(costs[opt])}, {name} {spread(costs[name])}",
               cost[opt] >= 0.02 and cost[name] <= cost[opt] / 2) for name, (opt, _, _) in hyper.items() if name != opt]
    return Finding(crossing({(f"{name}, lr {lr:g}", f"{warm} steps of warmup"): spread(losses(s))
                             for (name, lr, warm), s in found.items()}, "val_loss"), checks, {
        Panel(f"{name}: cost {spread(costs[name])}", f"lr of {name}", LOSS): {
            label: error_bars([f"{lr:g}" for lr in lrs], [found[name, lr, warm] for lr in lrs])
            for warm, label in ((50, "50 steps of warmup"), (0, "no warmup"))} for name, (_, lrs, _) in hyper.items()},
        "Leaving out the warmup costs " + ", ".join(f"{name} {x:.3f}" for name, x in cost.items()) + " nats.")


# ---- Experiments on the modular norm ---------------------------------------------------------------------------------


def octaves(first, last, step=1):
    return [2.0**k for k in range(first, last + 1, step)]


def lr_transfer(lab, net, flag, sizes, lrs, **flags):
    """{opt: lrs} at two sizes of a network -> text, checks, panels, {opt: the mean cost}. One seed finds the best lr at
    each size, two others decide. The cost: what the lr that is best at the first size loses at the second. A check for
    each pair is [MN]'s claim: the modular optimizer loses at most 0.03, and less than the plain one. A best lr at an
    edge of its grid makes the cost a lower bound and the check fail."""
    def loss_of(some, seeds):
        """{(opt, size, lr)} -> {each: its losses}."""
        cases = {(opt, size, lr): dict(opt=opt, lr=lr, weight_decay=0, schedule="linear", warmup=0, **flags, **{
            flag: size}, **({"arch": "modular" if opt.startswith("modular") else "gpt2"} if net == "gpt" else {}))
                 for opt, size, lr in some}
        return {case: losses(s, 103 if net == "gpt" else 10) for case, s in measured(lab, net, cases, seeds).items()}

    first = {case: value for case, (value,) in loss_of(
        [(opt, size, lr) for opt in lrs for size in sizes for lr in lrs[opt]], [0]).items()}
    best = {opt: [min(lrs[opt], key=lambda lr: first[opt, size, lr]) for size in sizes] for opt in lrs}
    (small, large), text, costs, panels, edge = sizes, [], {}, {}, {}
    loss = loss_of([(opt, large, lr) for opt in lrs for lr in dict.fromkeys(best[opt])], (1, 2))
    for opt in lrs:
        here, there = (loss[opt, large, lr] for lr in best[opt])
        costs[opt] = [a - b for a, b in zip(here, there)]
        edge[opt] = any(lr in (lrs[opt][0], lrs[opt][-1]) for lr in best[opt])
        text += [crossing({(f"{flag} {size}", f"lr 2^{math.log2(lr):.0f}"): f"{first[opt, size, lr]:.3f}" + "*" * (
                     lr == best[opt][i]) for i, size in enumerate(sizes) for lr in lrs[opt]},
                          f"{net}, {opt}, one seed"),
                 f"  best lr from {flag} {small} to {large}: {math.log2(best[opt][1] / best[opt][0]):+.0f} octaves" +
                 ", one is at the edge" * edge[opt],
                 f"  two other seeds at {flag} {large}: {spread(here)} at the first, {spread(there)} at the second"]
        panels[Panel(f"{net}, {opt}, one seed", f"lr of {opt}", LOSS if net == "gpt" else "training loss (nats)",
                     "x")] = {
            f"{flag} {size}": Curve(lrs[opt], [first[opt, size, lr] for lr in lrs[opt]]) for size in sizes} | {
            "the best lr": Curve(best[opt], [first[opt, size, lr] for size, lr in zip(sizes, best[opt])], style=BEST)}
    cost = {opt: statistics.fmean(values) for opt, values in costs.items()}
    words = {opt: spread(costs[opt]) + " (a lower bound: a best lr is at the edge)" * edge[opt] for opt in lrs}
    checks = [(f"{net}: the lr of {flag} {small} costs {flag} {large} {words[f'modular_{opt}']} under modular_{opt}, "
               f"{words[opt]} under {opt}", not (edge[opt] or edge[f"modular_{opt}"])
               and cost[f"modular_{opt}"] <= 0.03 and cost[f"modular_{opt}"] < cost[opt])
              for opt in lrs if not opt.startswith("modular")]
    return "\n".join(text), checks, panels, cost


def lr_transfer_width(lab):
    """Claim    Under the modular norm the best lr does not depend on the width; under Adam and SGD it does. [MN]
    Done     Two widths, no decay, no warmup, lr linear to 0. One seed finds the best lrs, two others decide. First a
             GPT, the standard one for adam, the modular one for modular_adam (lrs an octave apart): networks differ as
             well as optimizers. Then ResMLP, one network for adam, sgd and their modular kin (training loss, as in the
             paper; lrs two octaves apart): only the optimizers differ.
    Held if  at the large width the lr that is best at the small one costs the modular optimizer at most 0.03, and less
             than the plain one: on the GPT, and on ResMLP. No best lr may be at an edge of what was tried."""
    sizes, wide = ((32, 256) if lab.args.scale == "cpu" else (96, 768)), octaves(-3, 3, 2)
    text, checks, panels, cost = lr_transfer(lab, "gpt", "n_embd", sizes, {
        "adam": octaves(-11, -6), "modular_adam": octaves(-3, 1)}, steps=250, eval_every=250, eval_batches=60)
    more, same, drawn, _ = lr_transfer(lab, "resmlp", "width", sizes, {
        "adam": octaves(-10, -4, 2), "modular_adam": wide, "sgd": octaves(-8, -2, 2), "modular_sgd": wide})
    return Finding(f"{text}\n{more}", checks + same, panels | drawn, f"From width {sizes[0]} to {sizes[1]} the narrow "
                   "GPT's lr costs " + ", ".join(f"{opt} {x:.2f}" for opt, x in cost.items()) + " nats.")


def lr_transfer_depth(lab):
    """Claim    Under the modular norm the best lr does not depend on the depth (GPT only), and depth helps; under Adam
             the best lr falls (GPT only), and under Adam and SGD depth does not help unless lr is tuned again. [MN]
    Done     No decay, no warmup, lr linear to 0. First a GPT of 2 and of 24 layers, 5 lrs an octave apart, the standard
             one for adam, the modular one for modular_adam. One seed finds the best lrs, two others decide. A
             difference may come from the network. Then ResMLP, one network for adam, sgd and their modular kin, with 2,
             8 and 32 blocks, two seeds, at a fixed lr, that of its 2 blocks: what depth gains there is the optimizer's.
             These lrs were found at cpu scale; at gpu scale they are not tuned. The trial study found that with the
             network held equal Adam's best lr hardly moves with depth, as in the paper's figures: it is not tested.
    Held if  on the GPT the lr that is best at 2 layers costs the modular optimizer at most 0.03 at 24, and less than
             the plain one, with no best lr at an edge of what was tried; and if on ResMLP the training loss at 32
             blocks is below that at 2 under both modular optimizers, and not below it under the plain ones."""
    sizes, small = ((2, 24), dict(n_embd=32)) if lab.args.scale == "cpu" else ((2, 48), {})
    text, checks, panels, cost = lr_transfer(lab, "gpt", "n_layer", sizes, {
        "adam": octaves(-10, -6), "modular_adam": octaves(-3, 1)}, steps=250, eval_every=250, eval_batches=60, **small)
    fixed, depths = {"adam": 2.0**-7, "modular_adam": 0.5, "sgd": 2.0**-4, "modular_sgd": 0.5}, (2, 8, 32)
    loss = {case: losses(s, 10) for case, s in measured(lab, "resmlp", {
        (opt, depth): dict(opt=opt, lr=lr, depth=depth, weight_decay=0, schedule="linear", warmup=0)
        for opt, lr in fixed.items() for depth in depths}, (1, 2)).items()}
    gains = {opt: [a - b for a, b in zip(loss[opt, 2], loss[opt, 32])] for opt in fixed}
    gain = {opt: statistics.fmean(values) for opt, values in gains.items()}
    checks += [(f"resmlp: 32 blocks in place of 2 gain {spread(gains[f'modular_{opt}'])} under modular_{opt}, "
                f"{spread(gains[opt])} under {opt}", gain[f"modular_{opt}"] > 0 >= gain[opt])
               for opt in ("adam", "sgd")]
    panels[Panel("resmlp at the lr of its 2 blocks", "blocks", "training loss (nats), least and most", "x")] = {
        opt: Curve(list(depths), *([f(loss[opt, depth]) for depth in depths] for f in (statistics.fmean, min, max)))
        for opt in fixed}
    rows = crossing({(f"resmlp, {opt}, lr {fixed[opt]:.3g}", f"depth {depth}"): spread(values)
                     for (opt, depth), values in loss.items()}, "training loss")
    return Finding(f"{text}\n{rows}", checks, panels,
                   f"From {sizes[0]} to {sizes[1]} layers the shallow GPT's lr costs Adam {cost['adam']:.2f} nats and "
                   f"modular Adam {cost['modular_adam']:.2f}; in one and the same ResMLP depth gains "
                   f"{gain['adam']:+.2f} under Adam and {gain['modular_adam']:+.2f} under modular Adam.")


# ---- Experiments on root-free methods --------------------------------------------------------------------------------


def root_free(lab):
    """Claim    Without its square root an adaptive method loses nothing: on a transformer it stays level with AdamW,
             and on a convolutional network it gains. [RF]
    Done     adamw, rmsprop and rf_rmsprop on a GPT and on VGG-16 with 1000 images, and a control: rmsprop whose average
             starts at 1/B, as rf_rmsprop's does. Each was tuned by a random search in two stages of 8 runs each, with
             one seed (`--runs 8` does it again; 40 runs at gpu scale; in the paper 100). Four other seeds run at the
             best. The control has no decay, which enters elsewhere in rf_rmsprop, and is compared with rf_rmsprop at
             its best, but without decay. Their eps differs, too: only rf_rmsprop's is tuned, since it has other units
             without the root. (In the paper the gain closes a gap between AdamW and SGD. The trial study found no such
             gap on small networks: SGD was nowhere ahead of a tuned AdamW. So that part cannot be shown here.)
    Held if  on the GPT rf_rmsprop's mean loss is at most 0.03 above adamw's and below rmsprop's; on VGG its accuracy is
             at least rmsprop's and at most 0.02 below adamw's; and on both, without decay, it is ahead of the
             control."""
    control, undecayed = "rmsprop from 1/B", "rf_rmsprop, decay 0"
    spaces = {opt: parse_space([text]) for opt, text in {
        "adamw": "lr=log(1e-3,3e-2) beta1=uniform(0.5,0.95) beta2=choice(0.97,0.99,0.999) weight_decay=log(0.01,4)",
        "rmsprop": "lr=log(1e-4,1e-2) momentum=uniform(0.5,0.95) alpha=choice(0.97,0.99) weight_decay=log(1e-4,1e-2)",
        control: "lr=log(1e-4,1e-2) momentum=uniform(0.5,0.95) alpha=choice(0.97,0.99)",
        "rf_rmsprop": "lr=log(1e-3,0.2) momentum=uniform(0.5,0.95) alpha=choice(0.97,0.99) weight_decay=log(1e-4,1e-2) "
                      "eps=log(1e-7,5e-4)"}.items()}
    size = dict(n_embd=32, batch_size=32) if lab.args.scale == "cpu" else dict(block_size=256, batch_size=64)

    def flags(net, opt):
        more = size | dict(steps=250, eval_every=250, warmup=20) if net == "gpt" else {}
        base = BASE[lab.args.scale, net] | more
        B = base["batch_size"] * base.get("block_size", 1)          # the loss is a mean over tokens, or over images
        return more | dict(opt=opt.split()[0]) | (dict(change=f"start={B}", weight_decay=0) if opt == control else {})
    best, edges = searched(lab, {(net, opt): space for net in ("gpt", "vgg") for opt, space in spaces.items()}, flags, {
        ("gpt", "adamw"): dict(lr=0.01306, beta1=0.7818, beta2=0.999, weight_decay=0.0346),
        ("gpt", "rmsprop"): dict(lr=0.00296, momentum=0.7683, alpha=0.97, weight_decay=1.516e-4),
        ("gpt", control): dict(lr=0.003259, momentum=0.8641, alpha=0.97),
        ("gpt", "rf_rmsprop"): dict(lr=0.05467, momentum=0.8302, alpha=0.97, weight_decay=2.77e-4, eps=1.309e-7),
        ("vgg", "adamw"): dict(lr=0.009819, beta1=0.5306, beta2=0.999, weight_decay=0.01166),
        ("vgg", "rmsprop"): dict(lr=0.001119, momentum=0.7426, alpha=0.99, weight_decay=8.777e-4),
        ("vgg", control): dict(lr=0.00327, momentum=0.83, alpha=0.97),
        ("vgg", "rf_rmsprop"): dict(lr=0.0128, momentum=0.5372, alpha=0.97, weight_decay=5.239e-4, eps=4.069e-7)})
    found = {net: measured(lab, net, {opt: best[net, opt] for opt in spaces} | {
        undecayed: best[net, "rf_rmsprop"] | dict(weight_decay=0)}, (1, 2, 3, 4)) for net in ("gpt", "vgg")}
    checks = [(f"{net}: {ours} {found[net][ours].words()}, {opt} {found[net][opt].words()}",
               at_most(found[net][ours].score, found[net][opt].score + more))       # accuracies with a minus
              for net, nearly in (("gpt", 0.03), ("vgg", 0.02)) for ours, opt, more in (
                  ("rf_rmsprop", "adamw", nearly), ("rf_rmsprop", "rmsprop", 0), (undecayed, control, 0))]
    rows = [["network", "optimizer", "four seeds", "at"]] + [
        [net, opt, s.words(), phrase(s.flags, {*spaces["adamw"], *spaces["rf_rmsprop"]})]
        for net in found for opt, s in found[net].items()]
    return Finding(edges + columns(rows), checks, {
        Panel(f"{net}: mean and standard deviation of four seeds", "", y): {"": error_bars(some, some.values())}
        for (net, some), y in zip(found.items(), (LOSS, ACCURACY))}, "; ".join(
            f"{what} goes from {found[net]['rmsprop'].mean:.3f} to {found[net]['rf_rmsprop'].mean:.3f} when RMSProp "
            f"loses its root, and AdamW's is {found[net]['adamw'].mean:.3f}"
            for net, what in (("gpt", "The GPT's loss"), ("vgg", "the accuracy of VGG"))) + ".")


HALF, FULL, SHAMPOO = "if_shampoo, bfloat16", "if_shampoo, float32", "shampoo, float32"


def step_times(path):
    """-> {kind: milliseconds of an optimizer step on 512 x 512 and 1024 x 512 matrices with random gradients; the same
    over that of HALF, timed in turn}, empty where bfloat16 is emulated; the time of a product in bfloat16 over that of
    one in float32. They are measured once: a report reads them from this file."""
    if not path.exists():
        import torch
        import optim
        steps, times, device = {}, {}, "cuda" if torch.cuda.is_available() else "cpu"
        half, full = (torch.randn(512, 512, device=device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        product = optim.in_turn(lambda: half @ half, lambda: full @ full, repeats=3)[1]
        for kind in (HALF, FULL, SHAMPOO) if product < 1 else ():       # emulated, a step may take minutes
            opt, dtype = kind.split(", ")
            weights = [torch.nn.Parameter(torch.randn(n, 512, device=device)) for n in (512, 1024)]
            for w in weights:
                w.grad = torch.randn_like(w)
            extra = dict(dtype=getattr(torch, dtype), batch_size=1) if opt == "if_shampoo" else {}
            steps[kind] = optim.OPTIMIZERS[opt](weights, lr=1e-3, update_every=1, **extra).step
            steps[kind]()                           # the first makes the state
            times[kind] = optim.in_turn(steps[kind], steps[HALF], repeats=3)
        write_atomically(path, {"times": times, "product": product})
    return [read_jsons(path)[0][key] for key in ("times", "product")]


def half_precision(lab):
    """Claim    Without roots and inverses Shampoo runs in bfloat16 throughout: as good as in float32, and faster than
             Shampoo, whose roots need float32. [RF]
    Done     A GPT, 1000 steps. if_shampoo and shampoo, which refreshes its roots as often (every 2nd step), were tuned
             in float32 by a random search in two stages of 8 runs each, with one seed (`--runs 8` does it again; 40
             runs at gpu scale). Three other seeds run at the best, if_shampoo with all its state and arithmetic in
             bfloat16 and in float32. The time of an optimizer step with a refresh is measured on its own, on matrices
             512 wide. It is a matter of the processor: where products in bfloat16 are no faster than in float32, no
             times are compared.
    Held if  bfloat16's mean loss is at most 0.02 above float32's and shampoo's, and its step takes less time than
             either's."""
    spaces = {("gpt", opt): parse_space([text]) for opt, text in {
        "if_shampoo": "lr=log(3e-4,3e-2) momentum=uniform(0.5,0.95) damping=log(1e-5,1e-3) lr_cov=log(0.03,0.5) "
                      "riemannian_momentum=uniform(0,0.9)",
        "shampoo": "lr=log(3e-4,1e-2) momentum=uniform(0.5,0.95) damping=log(1e-9,1e-5) lr_cov=log(0.01,0.3)"}.items()}
    best, edges = searched(lab, spaces, lambda net, opt: dict(opt=opt, update_every=2), {
        ("gpt", "if_shampoo"): dict(lr=0.004776, momentum=0.7539, damping=6.171e-4, lr_cov=0.09012,
                                    riemannian_momentum=0.3806),
        ("gpt", "shampoo"): dict(lr=0.002347, momentum=0.5375, damping=1.931e-6, lr_cov=0.03644)})
    final = measured(lab, "gpt", {kind: best["gpt", opt] | {"opt_kwargs.dtype": dtype} for kind in (HALF, FULL, SHAMPOO)
                                  for opt, dtype in [kind.split(", ")]}, (1, 2, 3))
    times, product = step_times(lab.out_dir / "step_times.json")
    checks = [(f"val_loss {final[HALF].words()} of {HALF}, {final[other].words()} of {other}",
               at_most(final[HALF].score, final[other].score + 0.02)) for other in (FULL, SHAMPOO)]
    checks += [(f"a step of {other} takes {times[other][1]:.2f} of the time of {HALF}", times[other][1] > 1)
               for other in (FULL, SHAMPOO) if times]
    rows = crossing({(kind, column): text for kind, s in final.items() for column, text in {
        "val_loss": s.words(), **({"ms a step": f"{times[kind][0]:.1f}"} if times else {}),
        "at": phrase(s.flags, spaces["gpt", "if_shampoo"])}.items()}, "")
    panels = {Panel("mean and standard deviation of three seeds", "", LOSS): {"": error_bars(final, final.values())}}
    if times:
        panels[Panel("optimizer step on matrices 512 wide", "", "milliseconds")] = {"time": Curve(
            list(times), [milliseconds for milliseconds, _ in times.values()])}
    return Finding(f"{edges}{rows}\nA product in bfloat16 takes {product:.2f} of the time of one in float32 "
                   "here" + ", so no times are compared" * (not times) + ".", checks, panels,
        f"Inverse-free Shampoo entirely in bfloat16 reaches a loss of {final[HALF].mean:.3f}, in float32 "
        f"{final[FULL].mean:.3f}, Shampoo {final[SHAMPOO].mean:.3f}" +
        (f" in {times[SHAMPOO][1]:.1f} times the time" if times else "") + ".",
        "the times, since bfloat16 is no faster here" * (not times))


def second_order(lab):
    """Claim    Root-free methods are second-order methods. Where the loss is a mean negative log-likelihood,
             rf_rmsprop's s times the batch size B tends to the diagonal of the Hessian, and if_shampoo's K K^T to its
             inverse. [RF]
    Done     Least squares in 8 dimensions, y = x.w + noise of variance 1, whose Hessian H is the mean of x x^T. The
             weights stay at the minimum (lr = 0), and gradients are means over B new examples in every step; B is 10
             and 100. Relative errors: |B s - diag H| / |diag H|, and |K^T (H + damping) K - I| / |I|. As a control the
             s of B = 100 is taken as it is, without the factor B.
    Held if  the mean errors from step 2000 to 3000 are at most 0.15 (B s) and 0.35 (K K^T), for both B; and the
             control's is at least 0.9."""
    if lab.args.print_commands:
        fail("second_order has no runs to print: it computes by itself. Leave out --print_commands")
    import torch
    import optim
    rng, d, damping, errors = torch.Generator().manual_seed(11 + 10 * (lab.args.seeds or 0)), 8, 1e-3, {}
    root = torch.linalg.qr(torch.randn(d, d, generator=rng))[0] * torch.logspace(-0.5, 0.5, d)     # x = root z
    H, one = root @ root.T, torch.eye(d)
    for B in (10, 100):
        ws = [torch.nn.Parameter(torch.zeros(d)) for _ in range(2)]
        rmsprop = optim.RootFreeRMSProp(ws[:1], lr=0.0, alpha=0.998, batch_size=B)
        shampoo = optim.InverseFreeShampoo(ws[1:], lr=0.0, lr_cov=0.01, damping=damping, batch_size=B)
        for step in range(1, 3001):
            x, noise = torch.randn(B, d, generator=rng) @ root.T, torch.randn(B, 1, generator=rng)
            for w, optimizer in zip(ws, (rmsprop, shampoo)):
                w.grad = -(x * noise).mean(0)
                optimizer.step()
            if step in (1, 2, 5, 10, 20) or step % 50 == 0:
                s, K = rmsprop.state[ws[0]]["square_avg"], shampoo.state[ws[1]]["K0"]
                for what, found, right in (("B s", B * s, H.diagonal()), ("s alone", s, H.diagonal()),
                                           ("K K^T", K.T @ (H + damping * one) @ K, one)):
                    label = f"{what}, B = {B}"
                    errors.setdefault(label, {})[step] = ((found - right).norm() / right.norm()).item()
    del errors["s alone, B = 10"]
    late = {label: statistics.fmean(error for step, error in line.items() if step > 2000)
            for label, line in errors.items()}
    checks = [(f"{label}: relative error {late[label]:.3f}, at most {limit}", late[label] <= limit) for B in (10, 100)
              for label, limit in ((f"B s, B = {B}", 0.15), (f"K K^T, B = {B}", 0.35))]
    checks.append((f"s alone, B = 100: relative error {late['s alone, B = 100']:.3f}", late["s alone, B = 100"] >= 0.9))
    rows = [["relative error of", "step 1", "step 100", "steps 2000 to 3000"]] + [
        [label, f"{line[1]:.3f}", f"{line[100]:.3f}", f"{late[label]:.3f}"] for label, line in errors.items()]
    return Finding(columns(rows), checks, {
        Panel("", "step", "relative error", "xy"): {label: Curve(list(line), list(line.values()), style={"marker": ""})
                                                    for label, line in errors.items()}},
        f"From gradients alone, B s finds the diagonal of the Hessian up to {late['B s, B = 100']:.0%}, and K K^T its "
        f"inverse up to {late['K K^T, B = 100']:.0%}.")


EXPERIMENTS = {f.__name__: f for f in (
    equilibrium, balance, imbalance, lr_against_decay, zero_shot, warmup, lr_transfer_width, lr_transfer_depth,
    root_free, half_precision, second_order)}


def experiment(lab, name, plot):
    """Do it, print what came of it, and draw it with the claim and the verdict in the title."""
    doc, finding = inspect.getdoc(EXPERIMENTS[name]), EXPERIMENTS[name](lab)
    if lab.args.print_commands:
        return
    print(f"{name} at {lab.args.scale} scale, {len(lab.asked)} runs in {lab.out_dir}\n\n{doc}\n\n{finding.text}\n")
    for text, held in finding.checks:
        print(f"{'yes' if held else 'NO':4s}{text}")
    held = [held for _, held in finding.checks]
    verdict = "The claim held at this scale." if all(held) else (
        f"The claim did not hold at this scale: only {sum(held)} of {len(held)} checks held.")
    verdict += f" Not compared: {finding.untested}." * bool(finding.untested)
    print(f"{verdict}\n{finding.said}")
    if plot:
        claim = " ".join(re.search(r"Claim\s+(.*?)\nDone", doc, re.S)[1].split())
        curves(f"{claim}\n{verdict}", finding.panels, plot)


# ---- From the command line to the report -----------------------------------------------------------------------------


def main():
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # what a terminal lacks must not cost the report
    args = parse()
    if args.curves:
        return compare(args.curves, args.metric, args.plot)
    lab, unfinished, said = Lab(args), None, ""
    try:
        if args.experiment:
            experiment(lab, args.experiment, args.plot)
        elif args.grid or args.space or args.fixed or args.seeds:
            make, settings, spaces = planned(args)
            if args.two_stage:
                found = two_stage(lab, {"search": (make, spaces)}, args.runs or 100, args.seed)["search"]
                said = again(lab, found, spaces)
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
    if args.print_commands:
        if not unfinished:
            print(f"sweep.py: all runs have come to an end: {tally(results)}. --report shows them" +
                  ", --retry prints those that failed" * failed, file=sys.stderr)
        elif args.two_stage or args.experiment:
            print("sweep.py: more runs may follow from these: when they are finished, print again", file=sys.stderr)
        sys.exit(failed and not unfinished)
    if not args.experiment or unfinished:
        print(report(results) + f"\n{said}" * bool(said))
    if args.plot and not args.experiment:
        if len({result.run.script for result in results}) > 1 or all(result.state != "done" for result in results):
            fail("--plot draws the results of one script, and here are none yet, or several scripts'", status=1)
        best = next(s for s in by_setting(results) if s.seeds)
        curves(f"{pathlib.Path(results[0].run.script).name}: best {best.metric} {best.words()}: "
               f"{phrase(best.flags, varied(lab.asked)) or 'the only setting'}\n{len(results)} runs: {tally(results)}",
               report_panels(results), args.plot)
    if unfinished:
        fail("{} of {} runs are not finished: ".format(*unfinished.args) + "the same command " +
             ("without --report does them" if args.report else "goes on"), status=1)
    sys.exit(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--change"]:
        run_changed(*sys.argv[2:])
        sys.exit()
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
