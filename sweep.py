"""
Run a training script many times and see which settings are best; or put a claim of the three papers to the test.

    python sweep.py --grid lr=1e-4:1e-1:log8 weight_decay=0,0.01,0.1 --fixed "opt=adamw steps=500" --seeds 3
    python sweep.py --random 40 --space "lr=log(1e-4,1e-1) momentum=uniform(0.5,0.99) damping=log(1e-6,1e-3)" ...
    python sweep.py --two_stage --runs 100 --space ...      a wide random search, then one around its best fifth
    python sweep.py --experiment zero_shot --plot out.png   a paper's claim, what was measured, and whether it held

The same command again goes on where a stopped or killed sweep was: finished runs are never run again, half-done ones
are resumed from their checkpoints. With the same command

    --report            shows what is there so far and runs nothing (--report --out_dir DIR: whatever DIR holds)
    --print_commands    prints one shell command a run and nothing else, for other machines on the same file system:
                        ... --print_commands | xargs -P2 -I{} sh -c {}       or GNU parallel, or a Slurm array

A key of --grid, --fixed or --space is a flag of the script, without dashes; what the script has no flag for goes into
its --opt_kwargs. (Two options of optimizers are called like flags: write opt_kwargs.dtype and opt_kwargs.seed.) Every
run has a folder of its own under --out_dir, named by a hash of the script and its flags. Results are read from its
log.jsonl alone: the last line has "final": true and bleu, test_acc, val_acc (more is better) or val_loss: the first of
them that is there counts, or the one that --metric names (what is tuned on a test set proves nothing there any more).

Exit status: 0 all runs are done or have diverged, which is a result; 1 some failed or were killed, 2 bad input, 129,
130 or 143 stopped by SIGHUP, Ctrl-C or SIGTERM, after the runs have saved. `kill -9` leaves the runs alone: they go on
to their end, and a new sweep waits for them.
"""
import argparse
import contextlib
import csv
import difflib
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
import time
from dataclasses import dataclass, field
from typing import Callable

from tqdm import tqdm

try:
    import fcntl
except ImportError:                                 # Windows has no flock: there, start one sweep at a time
    fcntl = None

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------

# The result of a run: the first of these that the last line of its log has. digits: as printed
METRICS = {"bleu": dict(sign=-1, digits=2), "test_acc": dict(sign=-1, digits=4), "val_acc": dict(sign=-1, digits=4),
           "val_loss": dict(sign=1, digits=4)}


def fail(message, status=2):
    """The one way out for bad input: a line that says what to do, and a status. Never a traceback."""
    print(f"sweep.py: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and an unknown flag is answered with the nearest known one."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[1], flags, n=1, cutoff=0)[0]
            message = (f"unknown flag {unknown[1]}: did you mean {near}? (flags of the script go into --fixed "
                       f"\"{unknown[1].strip('-')}=...\" or --grid)")
        fail(message)


def at_least(low):
    """A type for argparse: a whole number >= low."""
    def parse(text):
        if not re.fullmatch(r"\d{1,9}", text) or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {low}")
        return int(text)
    return parse


def parse_arguments():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    g = p.add_argument_group("what to run")
    g.add_argument("--script", help="nanogpt_train.py (default), cifar_train.py, translate_train.py or one like them")
    g.add_argument("--grid", metavar="KEY=VALUES", nargs="+", action="extend",
                   help="all combinations of these: a,b,c or 1e-4:1e-1:log8 (8 values) or 0:1:lin5")
    g.add_argument("--random", type=at_least(1), metavar="N", help="N random draws from --space")
    g.add_argument("--two_stage", action="store_true",
                   help="--runs draws from --space, then as many from the box around the best fifth of them")
    g.add_argument("--space", metavar="KEY=RANGE", nargs="+", action="extend",
                   help="log(1e-4,1e-1), uniform(0.5,0.99) or choice(a,b); in quotes, for the shell")
    g.add_argument("--fixed", metavar="KEY=VALUE", nargs="+", action="extend", help="the same for all runs")
    g.add_argument("--runs", type=at_least(5), metavar="N", help="of each stage of --two_stage (default 100)")
    g.add_argument("--seeds", type=at_least(1), metavar="N", help="each setting N times, with seed=1 to N")
    g.add_argument("--seed", type=at_least(0), help="of the random draws (default 0)")
    g.add_argument("--experiment", metavar="NAME", help=f"instead of all these: {', '.join(EXPERIMENTS)}")
    g.add_argument("--scale", choices=("cpu", "gpu"), help="of an experiment: minutes on two cores (default), or a GPU")
    g = p.add_argument_group("how to run it")
    g.add_argument("--jobs", type=at_least(1), metavar="N",
                   help="runs at a time (default: one per GPU, or one per core; OMP_NUM_THREADS is 1 unless it is set)")
    g.add_argument("--out_dir", help="default out/sweep-SCRIPT or out/sweep-EXPERIMENT-SCALE; sweeps may share one")
    g.add_argument("--retry", action="store_true", help="run again what failed (after the cause is mended)")
    g.add_argument("--keep_checkpoints", action="store_true", help="default: a finished run's ckpt.pt is deleted")
    g.add_argument("--print_commands", action="store_true", help="print a command for each run that is not finished")
    g.add_argument("--run", metavar="HASH", help="do this one run: what the printed commands say")
    g = p.add_argument_group("what to see")
    g.add_argument("--report", action="store_true", help="run nothing, show what is there")
    g.add_argument("--metric", choices=tuple(METRICS), help="what counts (default: the first of these that is there)")
    g.add_argument("--plot", metavar="FILE", help="draw it: .png, .pdf, .svg (needs matplotlib)")
    g.add_argument("--csv", metavar="FILE", help="one line a run, with all its flags")
    return p.parse_args()


def settle(args):
    """Refuse what does not go together; fill in the defaults."""
    def given(*names):
        return [f"--{name}" for name in names if getattr(args, name)]
    for name in ("script", "grid", "space", "fixed", "experiment", "run", "out_dir", "plot", "csv"):
        if (value := getattr(args, name)) is not None and not "".join(value).strip():
            fail(f"--{name} is empty")              # a shell variable that is not set, say
    general = given("grid", "random", "two_stage", "space", "fixed", "seeds", "script")
    kinds = given("grid", "random", "two_stage")
    if args.run:
        if not args.out_dir:
            fail("--run needs --out_dir: the folder of the sweep")
        if others := given("grid", "random", "two_stage", "space", "fixed", "seeds", "experiment", "report"):
            fail(f"--run does one run that is known already: leave out {others[0]}")
    if args.experiment:
        if args.experiment not in EXPERIMENTS:
            near = difflib.get_close_matches(args.experiment, EXPERIMENTS, n=1)
            fail(f"--experiment {args.experiment}: " + (f"did you mean {near[0]}?" if near else
                                                        f"there are {', '.join(EXPERIMENTS)}"))
        if own := general + given("metric"):
            fail(f"--experiment {args.experiment} has its own settings: leave out {own[0]}")
    elif args.scale:
        fail("--scale is for --experiment: leave it out")
    if len(kinds) > 1:
        fail(f"{kinds[0]} or {kinds[1]}, not both")
    if bool(args.space) != bool(args.random or args.two_stage):
        fail("--space is for --random N and --two_stage: give one of them" if args.space else
             f"{kinds[0]} needs --space, say --space \"lr=log(1e-4,1e-1)\"")
    if args.runs and not args.two_stage:
        fail("--runs is for --two_stage; with --random, write --random N")
    if args.seed is not None and not args.space:
        fail("--seed is that of the random draws; the script's goes into --fixed seed=N, or use --seeds N")
    if args.print_commands and given("report", "plot", "csv", "run"):
        fail(f"--print_commands prints commands and nothing else: leave out {given('report', 'plot', 'csv', 'run')[0]}")
    if not (set(general) - {"--script"} or args.experiment or args.run or args.report):
        fail("nothing to run: give --grid, --random, --two_stage, --fixed, --seeds, --experiment or --report (--help "
             "shows examples)")
    for name in ("plot", "csv"):                    # before an hour of runs, not after it
        path = getattr(args, name)
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
            fail(f"--{name} {path}: " + ("that is a folder" if os.path.isdir(path) else "there is no such folder"))
    if args.plot and pathlib.Path(args.plot).suffix.lower() not in (".png", ".pdf", ".svg"):
        fail(f"--plot {args.plot}: name a .png, .pdf or .svg file")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        fail("--plot needs matplotlib: pip install matplotlib, then the same command again; nothing will be run twice")
    args.script = whole_name(args.script or "nanogpt_train.py")
    args.scale = args.scale or "cpu"
    args.out_dir = pathlib.Path(args.out_dir or (f"out/sweep-{args.experiment}-{args.scale}" if args.experiment else
                                                 f"out/sweep-{pathlib.Path(args.script).stem}"))
    if "\n" in str(args.out_dir):
        fail("--out_dir has a line break in it: --print_commands could not say it in a line")


# ----------------------------------------------------------------------------------------------------------------------
# Values: grids and random draws
# ----------------------------------------------------------------------------------------------------------------------


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


def number(text, where):
    try:
        if math.isfinite(x := float(text)):
            return x
    except ValueError:
        pass
    fail(f"{where}: {text!r} is not a number")


def settings(texts, flag):
    """["lr=1 seed=2", "opt=adamw"] -> {"lr": "1", "seed": "2", "opt": "adamw"}; spaces within (...) do not separate."""
    found = {}
    for token in re.findall(r"(?:\([^()]*\)|\S)+", " ".join(texts or [])):
        key, equals, value = token.partition("=")
        if not equals or not value or not re.fullmatch(r"(opt_kwargs\.)?[A-Za-z]\w*", key):
            fail(f"{flag} {token}: write it as KEY=VALUE, the key without dashes")
        if key in found:
            fail(f"{flag} has {key} twice: give all its values at once")
        if key in ("out_dir", "resume", "help"):
            fail(f"{flag} {key}: the sweep gives every run its own folder; leave it out")
        if key == "opt_kwargs":
            fail(f"{flag} {token}: leave out opt_kwargs= and write {value if '=' in value else 'KEY=VALUE'}; what the "
                 "script has no flag for goes there")
        found[key] = value
    return found


def grid_values(text, where):
    """"0,1e-3:1e-1:log3" -> ["0", "0.001", "0.01", "0.1"]."""
    items, values = re.findall(r"(?:\([^()]*\)|[^,])+", text), []
    if "" in text.split(","):
        fail(f"{where}: there is nothing before or after a comma")
    for item in items:
        if not re.match(r"[-+.]?\d[^:]*:", item):   # text may have a colon, too
            values.append(plain(item))
            continue
        parts = item.split(":")
        kind = re.fullmatch(r"(log|lin)(\d{1,6})", parts[-1])
        if len(parts) != 3 or not kind:
            fail(f"{where}: write a range as FROM:TO:log8 or FROM:TO:lin8, for 8 values")
        a, b, count = number(parts[0], where), number(parts[1], where), int(kind[2])
        if count < 2:
            fail(f"{where}: a range has at least 2 values")
        if kind[1] == "log" and not (a > 0 and b > 0):
            fail(f"{where}: a log range needs ends above 0 (0,FROM:TO:log8 has 0 as well)")
        spread = Space("log" if kind[1] == "log" else "uniform", (a, b))
        inner = [spread.at(i / (count - 1)) for i in range(1, count - 1)]
        values += [plain(parts[0]), *inner, plain(parts[1])]
        if not all(math.isfinite(float(value)) for value in inner):
            fail(f"{where}: these ends are too far apart for a computer's numbers")
    return list(dict.fromkeys(values))


@dataclass(frozen=True)
class Space:
    """Where one hyperparameter is drawn from. values: the two ends, or all choices."""
    kind: str                                       # log, uniform or choice
    values: tuple

    def at(self, u):
        """The value at 0 <= u <= 1, as text with six digits."""
        if self.kind == "choice":
            return self.values[min(int(u * len(self.values)), len(self.values) - 1)]
        a, b = self.values
        return plain(f"{a ** (1 - u) * b**u if self.kind == 'log' else a * (1 - u) + b * u:.6g}")

    def around(self, texts):
        """The smallest space of this kind that holds all these values."""
        if self.kind == "choice":
            return Space(self.kind, tuple(value for value in self.values if value in texts))
        return Space(self.kind, (min(map(float, texts)), max(map(float, texts))))


def parse_space(texts):
    spaces = {}
    for key, text in settings(texts, "--space").items():
        where, parts = f"--space {key}={text}", re.fullmatch(r"(log|uniform|choice)\((.*)\)", text)
        if not parts:
            fail(f"{where}: write log(a,b), uniform(a,b) or choice(a,b,...), in quotes; the rest is for --fixed")
        values = [value.strip() for value in re.findall(r"(?:\([^()]*\)|[^,])+", parts[2])]
        if parts[1] == "choice":
            spaces[key] = Space("choice", tuple(dict.fromkeys(plain(value) for value in values if value)))
            if not spaces[key].values:
                fail(f"{where}: there is nothing to choose from")
            continue
        if len(values) != 2:
            fail(f"{where}: it takes two numbers")
        a, b = (number(value, where) for value in values)
        if not a < b or parts[1] == "log" and a <= 0:
            fail(f"{where}: the first number must be smaller than the second" + (", and above 0" * (parts[1] == "log")))
        spaces[key] = Space(parts[1], (a, b))
    return spaces


def draw(spaces, count, seed, stage=1):
    """`count` settings. Draw i of a key depends on nothing but (seed, stage, key, i): a restarted sweep draws the same,
    and one with more runs begins with those of one with fewer."""
    return [{key: space.at(random.Random(f"{seed} {stage} {key} {i}").random()) for key, space in spaces.items()}
            for i in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# Runs: what one is, where it lives, what came of it
# ----------------------------------------------------------------------------------------------------------------------


HERE = pathlib.Path(__file__).resolve().parent


def whole_name(script):
    """The one name of a script, however it was given: beside this file its own, elsewhere the whole path."""
    for path in (script, HERE / script):
        if os.path.isfile(path):
            path = pathlib.Path(path).resolve()
            return path.name if path.parent == HERE else str(path)
    fail(f"--script {script}: there is no such file")


def flags_of(script):
    """The flags that a script knows, read from its source: asking it takes seconds, since it would import torch."""
    try:
        return set(re.findall(r"""add_argument\(\s*["']--(\w+)""", (HERE / script).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        fail(f"cannot read {HERE / script}: name a script in Python with --script")


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
        return hashlib.sha256(json.dumps([pathlib.Path(self.script).name, self.flags]).encode()).hexdigest()[:12]

    def __getitem__(self, key):
        return dict(self.flags).get(key)

    def arguments(self, known):
        """The command line; known: flags_of(self.script)."""
        flags = [f"--{key}={value}" for key, value in self.flags if key in known]
        others = [f"{key.removeprefix('opt_kwargs.')}={value}" for key, value in self.flags if key not in known]
        return flags + (["--opt_kwargs", *others] if others else [])

    def words(self, without=()):
        return ", ".join(f"{key} {value}" for key, value in self.flags if key not in without) or "the defaults"


@dataclass
class Result:
    """What came of a run. state: done, diverged, failed or unfinished; last: the last line of its log, if done."""
    run: Run
    folder: pathlib.Path
    state: str = "unfinished"
    last: dict = field(default_factory=dict)
    message: str = ""                               # of one that diverged or failed: the last line it wrote to stderr
    metrics: tuple = tuple(METRICS)                 # the first of these that it has is its result

    @property
    def metric(self):
        return next((name for name in self.metrics if name in self.last), None)

    @property
    def value(self):
        """The result as a number; nan if there is none."""
        return self.last[self.metric] if self.metric else math.nan

    @property
    def score(self):
        """The same, but less is better, and without a result it is infinite: for sorting."""
        return METRICS[self.metric]["sign"] * self.value if self.metric else math.inf

    def log(self):
        return read_log(self.folder)


def read_text(path):
    """What a file holds; "" if there is none yet. One that is there and cannot be read must not pass for that: a run
    would be done again and its results replaced."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}", status=1)


def read_log(folder):
    """The lines of log.jsonl as dicts; one that a kill cut short is left out."""
    records = []
    for line in read_text(folder / "log.jsonl").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def read_result(run, folder, metrics):
    """Look into its folder. A log that has its last line counts, whatever happened to the process after that."""
    log, result = read_log(folder), Result(run, folder, metrics=metrics)
    if log and log[-1].get("final"):
        for name in metrics:
            value = log[-1].get(name, 0)
            if not isinstance(value, (int, float)):
                result.state, result.message = "failed", f"its {name} is {value!r}, not a number"
                return result
            if not math.isfinite(value):
                result.state, result.message = "diverged", f"its {name} is {value}"
                return result
        result.state, result.last = "done", log[-1]
        return result
    with contextlib.suppress(ValueError, KeyError, TypeError):              # no such file: it did not come to an end
        end = json.loads(read_text(folder / "failed.json"))
        result.state, result.message = "diverged" if end["status"] == 3 else "failed", end["message"]
    return result


def read_run(folder):
    """The run that a folder says it holds; None if it says nothing that can be understood."""
    try:
        known = json.loads(read_text(folder / "run.json"))
        return Run.of(known["script"], known["flags"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_runs(out_dir):
    """All runs that a folder knows of, without copies that somebody made of them."""
    runs = []
    for path in sorted(out_dir.glob("*/run.json")):
        run = read_run(path.parent)
        if run is None:
            fail(f"{path} is damaged: the command that started the sweep mends it")
        if run.name == path.parent.name:
            runs.append(run)
    return runs


def write_atomically(path, text):
    """All of it or nothing: written beside, then renamed over the old file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    except OSError:                                 # a full disk, say
        with contextlib.suppress(OSError):
            part.unlink()
        raise


# ----------------------------------------------------------------------------------------------------------------------
# Running them
# ----------------------------------------------------------------------------------------------------------------------


def claim(folder):
    """Take a run's folder -> its lock, an open file; None while a run is in it, be it ours or anybody's.

    The run inherits the open file, and the lock lives as long as anybody has it: a run whose sweep was killed still
    keeps the next sweep out of its folder. `.lock` is the one that the script itself takes: somebody may have started
    it by hand. It is looked at only after ours is taken: a look at the wrong moment would stop a starting run.
    """
    if fcntl is None:
        return open(os.devnull)
    ours = open(folder / ".sweep.lock", "a")
    try:
        fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with open(folder / ".lock", "a") as theirs:
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ours
    except BlockingIOError:
        ours.close()
        return None


def last_line(path):
    """The last line in a file of messages; a progress bar writes over its own with carriage returns."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", path.read_text(errors="replace")) if line.strip()]
    return lines[-1] if lines else "it said nothing"


def gpus():
    """The GPUs that runs may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch                                    # it takes seconds: only where something is run
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


# of a process that was stopped or killed, not of one that failed
STOPPED = {130, 143} | {-number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)}


class Unfinished(Exception):
    """Some of the runs that were asked for have no result yet: (how many, of how many)."""


class Lab:
    """Does the runs that it is asked for, or says what would have to be done. mode: run, report or print.
    strict: give up if a run failed, since an experiment cannot do without it."""

    def __init__(self, args):
        self.out_dir, self.scale, self.jobs, self.retry = args.out_dir, args.scale, args.jobs, args.retry
        self.keep_checkpoints, self.strict = args.keep_checkpoints, bool(args.experiment)
        self.mode = "report" if args.report else "print" if args.print_commands else "run"
        self.metrics = (args.metric,) if args.metric else tuple(METRICS)
        self.asked = []

    def result(self, run):
        return read_result(run, self.out_dir / run.name, self.metrics)

    def is_open(self, result):
        return result.state == "unfinished" or result.state == "failed" and self.retry

    def results(self, runs):
        """The results of these runs, in their order, after doing what is missing. Raises Unfinished where that is not
        to be done (a report, printing), or where a run was killed from outside."""
        runs = list(dict.fromkeys(runs))
        self.asked += [run for run in runs if run not in self.asked]
        if self.mode != "report":
            for run in runs:
                self.note(run)
        missing = [run for run in runs if self.is_open(self.result(run))]
        if missing and self.mode == "print":
            for run in missing:
                print(self.command(run))
        elif missing and self.mode == "run":
            try:
                self.do(missing, len(runs))
            except BrokenPipeError:                 # nobody reads our output
                raise
            except OSError as error:
                fail(f"cannot write {error.filename or self.out_dir}: {error.strerror}. Make room; the same command "
                     "goes on", status=1)
        results = [self.result(run) for run in runs]
        failed = [result for result in results if result.state == "failed"]
        if failed and self.strict and not (self.mode == "print" and self.retry):
            fail(f"{len(failed)} of {len(runs)} runs failed, so nothing can be said. The first, {failed[0].folder}: "
                 f"{failed[0].message}. Mend it and add --retry", status=1)
        if count := len(missing) if self.mode == "print" else sum(r.state == "unfinished" for r in results):
            raise Unfinished(count, len(runs))
        return results

    def note(self, run):
        """Make the run's folder and write down in it what its name stands for."""
        path = self.out_dir / run.name / "run.json"
        if (known := read_run(path.parent)) == run:
            return
        if known and known.name == run.name and os.path.exists(HERE / known.script):
            fail(f"{self.out_dir} holds runs of {known.script}, which has the same name: choose another --out_dir for "
                 f"{run.script}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"script": run.script, "flags": dict(run.flags)}, indent=1) + "\n")
        except OSError as error:
            fail(f"cannot write {path}: {error.strerror}. Choose another place with --out_dir")

    def command(self, run):
        """For the shell. What the run is stands in a comment: no quotes are needed, and xargs, which would take them
        away, does no harm (but choose an --out_dir without spaces)."""
        options = ["--keep_checkpoints"] * self.keep_checkpoints + ["--retry"] * self.retry
        words = [sys.executable, os.path.abspath(__file__), "--out_dir", os.path.abspath(self.out_dir), "--run",
                 run.name, *options]
        what = [pathlib.Path(run.script).name, *(f"{key}={value}" for key, value in run.flags)]
        return f"{shlex.join(words)}  # " + " ".join(re.sub(r"[^\w.=,:/()+-]+", "_", x, flags=re.ASCII) for x in what)

    def start(self, run, lock, gpu):
        """Start it, or resume it: what the checkpoint holds is not said again, but where to compute is."""
        folder = self.out_dir / run.name
        (folder / "failed.json").unlink(missing_ok=True)
        arguments = run.arguments(flags_of(run.script))
        if (folder / "ckpt.pt").exists():
            arguments = ["--resume"] + ([f"--device={run['device']}"] if run["device"] else [])
        environment = dict(os.environ)
        if gpu is None:
            environment.setdefault("OMP_NUM_THREADS", "1")      # N runs of one thread are done before N of N threads
        else:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        streams = []
        for name in ("stdout.txt", "stderr.txt"):   # new files: an old run may still have the old ones open
            (folder / name).unlink(missing_ok=True)
            streams.append(open(folder / name, "w"))
        with streams[0], streams[1]:                # a session of its own: Ctrl-C is for us, who pass it on
            return subprocess.Popen(
                [sys.executable, HERE / run.script, *arguments, f"--out_dir={folder}"], env=environment,
                stdin=subprocess.DEVNULL, stdout=streams[0], stderr=streams[1], start_new_session=True,
                pass_fds=(lock.fileno(),) if fcntl else ())

    def ended(self, run, status):
        """What came of a run whose process has ended. That it failed or diverged is written down: its log can not say
        so. One that was stopped or killed stays unfinished."""
        folder, result = self.out_dir / run.name, self.result(run)
        if result.state != "done" and status not in STOPPED:
            message = last_line(folder / "stderr.txt") if status else "it ended without a final line in log.jsonl"
            if not status:                          # a checkpoint at the end, a log that is damaged: to begin anew
                (folder / "ckpt.pt").unlink(missing_ok=True)
            message = message.removeprefix(f"{pathlib.Path(run.script).name}: ").replace(str(folder), run.name)
            if status == 3:                         # what diverged, and when; the advice after that is for one run
                message = message.split(". ")[0]
            write_atomically(folder / "failed.json", json.dumps({"status": status, "message": message}))
            result = self.result(run)
        self.tidy(result)
        return result

    def tidy(self, result):
        """Delete the checkpoint of a run that needs it no more."""
        if result.state in ("done", "diverged") and not self.keep_checkpoints:
            (result.folder / "ckpt.pt").unlink(missing_ok=True)

    def do(self, missing, total):
        """Do these runs, some at a time; total: with those that are finished already."""
        devices = [] if all(run["device"] == "cpu" for run in missing) else gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jobs = self.jobs or len(devices) or cores
        waiting, running, stopped_by = list(missing), {}, []
        keys = varied(self.asked) if total > 1 else [key for key, _ in missing[0].flags]
        best = min((self.result(run) for run in self.asked), key=lambda result: result.score)
        finished, looked, said = total - len(missing), -math.inf, False
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {number: signal.signal(number, lambda number, frame: stopped_by.append(number)) for number in numbers
                  if signal.getsignal(number) is not signal.SIG_IGN}         # nohup ignores SIGHUP: so do we, then
        bar = tqdm(total=total, initial=finished, unit="run", disable=total == 1,
                   mininterval=0.5 if sys.stderr.isatty() else 30)

        while (waiting and not stopped_by) or running:
            for process, job in list(running.items()):
                if process.poll() is None:
                    if job["told"] < len(stopped_by):           # the first signal lets it save, the second does not
                        job["told"] += 1
                        process.send_signal(signal.SIGTERM if job["told"] == 1 else signal.SIGKILL)
                    continue
                del running[process]
                result = self.ended(job["run"], process.returncode)
                job["lock"].close()
                if result.state != "unfinished" or not stopped_by:
                    bar.write(line_of(result, keys), file=sys.stdout)
                finished += result.state != "unfinished"
                best = min(best, result, key=lambda result: result.score)
                bar.set_postfix_str(f"best {line_of(best, keys)}" if best.metric else "", refresh=False)
                bar.update(result.state != "unfinished")
            if not running or len(running) < jobs and time.time() - looked > 1:     # the folders' locks: not too often
                looked = time.time()
                for run in list(waiting):
                    if len(running) == jobs or stopped_by:
                        break
                    lock = claim(self.out_dir / run.name)
                    if lock is None:
                        continue                    # somebody is at it: another sweep, or a run of a killed one
                    waiting.remove(run)
                    if self.is_open(self.result(run)):
                        used = {job["slot"] for job in running.values()}
                        slot = next(i for i in itertools.count() if i not in used)
                        process = self.start(run, lock, devices[slot % len(devices)] if devices else None)
                        running[process] = {"run": run, "lock": lock, "slot": slot, "told": 0}
                    else:                           # done by somebody else in the meantime: it may be an orphan of ours
                        self.tidy(self.result(run))
                        lock.close()
                        finished += 1
                        bar.update()
            if waiting and not running and not said and not stopped_by:
                bar.write(f"waiting for {len(waiting)} runs that another process is at", file=sys.stderr)
                said = True
            time.sleep(0.05)
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        if stopped_by:
            print(f"stopped: {finished} of {total} runs are finished. The same command goes on", flush=True)
            sys.exit(128 + stopped_by[0])


# ----------------------------------------------------------------------------------------------------------------------
# Reports
# ----------------------------------------------------------------------------------------------------------------------


def sort_key(text):
    """Numbers by size, then words; what is not set comes first."""
    try:
        return (1, float(text), "")
    except (TypeError, ValueError):
        return (0, 0.0, "") if text is None else (2, 0.0, text)


def varied(runs):
    """The flags in which these runs differ, without the seed."""
    keys = sorted({key for run in runs for key, _ in run.flags} - {"seed"})
    return [key for key in keys if len({run[key] for run in runs}) > 1]


def line_of(result, keys):
    """A result in one line; keys: the flags to name."""
    what = ", ".join(f"{key} {value}" for key, value in result.run.flags if key in {*keys, "seed"})
    if result.metric:
        return f"{result.metric} {result.value:.{METRICS[result.metric]['digits']}f}" + f": {what}" * bool(what)
    return ": ".join(part for part in (result.state, what, result.message) if part)


@dataclass
class Setting:
    """The results of one setting: all its seeds."""
    flags: dict
    results: list

    @property
    def values(self):
        return [result.value for result in self.results if result.metric]

    @property
    def mean(self):
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def spread(self):
        """Standard deviation over the seeds; nan for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def count(self, state):
        return sum(result.state == state for result in self.results)

    @property
    def sound(self):
        """Whether it has a result, and none of its seeds came to grief."""
        return bool(self.values) and not self.count("diverged") + self.count("failed")

    @property
    def score(self):
        """Mean, but less is better; infinite unless sound."""
        return statistics.fmean(result.score for result in self.results if result.metric) if self.sound else math.inf

    def words(self, spread=True):
        """Mean and spread as text."""
        digits = next((METRICS[result.metric]["digits"] for result in self.results if result.metric), 0)
        text = f"{self.mean:.{digits}f}" if self.values else "-"
        return text + (f" +- {self.spread:.{digits}f}" if spread and len(self.values) > 1 else "")


def by_setting(results):
    """Results that differ in the seed alone are one setting. Best first."""
    found = {}
    for result in results:
        key = (result.run.script, tuple((k, v) for k, v in result.run.flags if k != "seed"))
        found.setdefault(key, Setting(dict(key[1]), [])).results.append(result)
    return sorted(found.values(), key=lambda s: (s.score, [(k, sort_key(v)) for k, v in s.flags.items()]))


def report(results):
    """-> text: table, heat map if two flags vary, and every failure, for each script that occurs."""
    lines = []
    for script in sorted({result.run.script for result in results}):
        some = [result for result in results if result.run.script == script]
        keys, found = varied([result.run for result in some]), by_setting(some)
        counts = {state: sum(result.state == state for result in some)
                  for state in ("done", "diverged", "failed", "unfinished")}
        lines += [f"{len(some)} runs of {pathlib.Path(script).name}: " +
                  ", ".join(f"{n} {state}" for state, n in counts.items() if n),
                  f"all with {some[0].run.words(without={*keys, 'seed'})}", table(found, keys)]
        if is_grid(found, keys):
            lines.append(heat_map(found, *axes_of(found, keys)))
        for state in ("failed", "diverged"):
            lines += [line_of(result, keys) for result in some if result.state == state]
    return "\n".join(lines)


def table(found, keys):
    """-> text: a line a setting, best first, with its mean and standard deviation over the seeds."""
    metric = next((result.metric for s in found for result in s.results if result.metric), "result")
    rows = [[metric, "seeds", *keys, ""]]
    for s in found:
        notes = [f"{s.count(state)} {state}" for state in ("diverged", "failed", "unfinished") if s.count(state)]
        rows.append([s.words(), str(len(s.values)), *(s.flags.get(key, "") for key in keys), ", ".join(notes)])
    return columns(rows)


def columns(rows):
    """Rows of text -> one text, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows)


def axes_of(found, keys):
    """The two flags of a map: the one with more values goes from left to right."""
    return sorted(keys, key=lambda key: len({s.flags.get(key) for s in found}), reverse=True)


def is_grid(found, keys):
    """Whether a map of two flags would be filled, at least by half: random draws would give a diagonal of it."""
    if len(keys) != 2:
        return False
    xs, ys, cells = heat(found, *keys)
    return 2 * len(cells) >= len(xs) * len(ys)


def heat(found, x, y):
    """-> the values of both flags in order, and {(x, y): the best Setting there}, for the maps."""
    cells = {}
    for s in found:                                 # best first: of several, it stays
        cells.setdefault((s.flags.get(x), s.flags.get(y)), s)
    return *(sorted({cell[i] for cell in cells}, key=sort_key) for i in (0, 1)), cells


def heat_map(found, x, y):
    """-> text: means, the darker the better, in four shades of a quarter of the cells each; the best has a star."""
    xs, ys, cells = heat(found, x, y)
    good = [s for s in cells.values() if s.sound]

    def cell(s):
        if s is None or not s.sound:
            return "-" if s is None or s.count("unfinished") else "diverged" if s.count("diverged") else "failed"
        rank = good.index(s)
        return f"{s.words(spread=False)} {'*' if rank == 0 else '▓▒░ '[4 * rank // len(good)]}"
    rows = [[f"{y} \\ {x}", *(str(value or "default") for value in xs)]]
    rows += [[str(row or "default"), *(cell(cells.get((column, row))) for column in xs)] for row in ys]
    return columns(rows)


def write_csv(results, path):
    """One line a run, in the order of the table: its folder, what came of it, and all its flags."""
    keys = sorted({key for result in results for key, _ in result.run.flags})
    metrics = [metric for metric in METRICS if any(metric in result.last for result in results)]
    try:
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            rows = csv.writer(file)
            rows.writerow(["folder", "script", "state", *metrics, *keys, "message"])
            for result in (result for setting in by_setting(results) for result in setting.results):
                rows.writerow([result.folder.name, result.run.script, result.state,
                               *(result.last.get(metric) for metric in metrics), *(result.run[key] for key in keys),
                               result.message])
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")


def figure(path, draw, *arguments, **size):
    """Make a figure, let draw(figure, ...) fill it, and save it."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a flag is a $
    picture = pyplot.figure(constrained_layout=True, **size)
    draw(picture, *arguments)
    try:
        picture.savefig(path, dpi=150)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    print(f"figure: {path}")


def is_number(text):
    return sort_key(text)[0] == 1


def draw_heat_map(axes, found, x, y):
    """Means in colours, the yellower the better."""
    xs, ys, cells = heat(found, x, y)
    grid = [[s.mean if (s := cells.get((column, row))) and s.sound else math.nan for column in xs] for row in ys]
    sign = next((METRICS[result.metric]["sign"] for s in found for result in s.results if result.metric), 1)
    known = sorted(value for line in grid for value in line if math.isfinite(value))
    # from the best to the median: a few settings that learn nothing must not make all the others look alike
    middle = len(known) // 2
    ends = ((known[0], known[middle]) if sign > 0 else (known[middle], known[-1])) if known else (0, 1)
    axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis_r" if sign > 0 else "viridis", vmin=ends[0],
                vmax=ends[1])
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            axes.text(j, i, f"{value:.3f}" if math.isfinite(value) else "-", ha="center", va="center", fontsize=7,
                      bbox=dict(facecolor="white", alpha=0.6, linewidth=0, pad=1))
    axes.set_xticks(range(len(xs)), map(str, xs), rotation=45)
    axes.set_yticks(range(len(ys)), map(str, ys))
    axes.set(xlabel=x, ylabel=y)


def draw_report(picture, results):
    """A heat map for a grid of two flags, else the result over each flag: every setting a point, with its spread, or a
    cross if some of its seeds came to grief. Where nothing but the seed varies, the result over the seed."""
    found = [s for s in by_setting(results) if s.values]
    keys = varied([result.run for result in results])
    metric = next(result.metric for result in results if result.metric)
    if is_grid(found, keys):
        axes = picture.subplots()
        draw_heat_map(axes, found, *axes_of(found, keys))
        axes.set_title(metric)
        return
    if not keys:
        axes = picture.subplots()
        axes.plot([result.run["seed"] or "default" for result in results], [result.value for result in results], "o")
        axes.set(xlabel="seed", ylabel=metric)
        return
    for axes, key in zip(picture.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys):
        some = sorted((s for s in found if s.flags.get(key) is not None), key=lambda s: sort_key(s.flags[key]))
        numbers = all(is_number(s.flags[key]) for s in some)
        for good, style in ((True, "o-" if len(keys) == 1 else "o"), (False, "x")):
            these = [s for s in some if s.sound == good]
            axes.errorbar([float(s.flags[key]) if numbers else s.flags[key] for s in these], [s.mean for s in these],
                          [0 if math.isnan(s.spread) else s.spread for s in these], fmt=style, color="C0" if good else
                          "C3", markersize=4 if good else 7)
        x = [float(s.flags[key]) for s in some] if numbers else []
        if x and min(x) > 0 and max(x) > 10 * min(x):
            axes.set_xscale("log")
        axes.set_xlabel(key)
    picture.axes[0].set_ylabel(metric)


# ----------------------------------------------------------------------------------------------------------------------
# The three papers. An experiment is a function that asks the lab for results and returns what it found. Its docstring
# is printed: the claim in our words, what is done, and when it counts as held, which was decided before the first
# run at full size. README says which set-ups have changed since.
#
#   [RE] Rotational Equilibrium, arXiv:2305.17212     [MN] modular norm, arXiv:2405.14813     [RF] root-free, 2402.03496
# ----------------------------------------------------------------------------------------------------------------------

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


def model_run(lab, net, **flags):
    """A run of the experiment's GPT ("gpt") or convolutional network ("cnn"). None takes a flag of BASE away."""
    flags = BASE[lab.scale, net] | flags
    return Run.of(SCRIPTS[net], {key: value for key, value in flags.items() if value is not None})


@dataclass
class Finding:
    """What an experiment found. checks: [(what had to be so, with the measured numbers; whether it was)]."""
    text: str
    checks: list
    draw: Callable                                  # draw(picture) fills a matplotlib figure


def capped(result):
    """A loss that can be averaged: one that diverged has learned nothing."""
    return min(result.value, UNTRAINED) if result.metric else UNTRAINED


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


def late_mean(rows, key, share):
    """Mean of rows[i][key] over the last share of the rows."""
    return statistics.fmean(row[key] for row in rows[int(len(rows) * (1 - share)):])


def equilibrium(lab):
    """Claim    Weight decay brings every layer to a norm and an angle per step that follow from lr, decay and momentum
             alone (the norm under SGD: also from the gradient's size). [RE], table 1
    Done     AdamW, SGD with momentum and Lion train a GPT and a convolutional network at a constant lr, chosen with the
             decay such that the way there takes 500 and 250 steps. The theory is for weights whose norm the network
             does not feel, as before batch norm in the second; in the first it does feel it. All hidden matrices.
    Held if  in the last quarter of the run four matrices in five have an angle within 25 % of the prediction, and four
             in five a norm within 25 % of it: for each network, under each optimizer."""
    hyper = {("gpt", "adamw"): dict(lr=4e-3, weight_decay=0.25), ("cnn", "adamw"): dict(lr=5e-3, weight_decay=0.4),
             ("gpt", "sgd"): dict(lr=0.3, weight_decay=1e-3 / 3), ("cnn", "sgd"): dict(lr=0.1, weight_decay=2e-3),
             ("gpt", "lion"): dict(lr=5e-4, weight_decay=2), ("cnn", "lion"): dict(lr=1e-3, weight_decay=2)}
    length = {"gpt": dict(n_layer=4, steps=2500, eval_every=50, eval_batches=1, save_every=500),
              "cnn": dict(steps=1200, eval_every=60, save_every=300)}
    results = dict(zip(hyper, lab.results([
        model_run(lab, net, opt=opt, schedule="constant", warmup=50, track=1, grad_clip=0, **length[net], **h)
        for (net, opt), h in hyper.items()])))
    text, checks, walks = [], [], {}                # walks: {(net, opt, what): (steps, {matrix: measured / predicted})}
    for (net, opt), result in results.items():
        steps, rows = rotations(result)
        for what in ("angle", "norm"):              # SGD's predicted norm changes with the gradient: its mean, too
            ratios = {name: [row[what] / late_mean(rows[name], f"predicted_{what}", 0.25) for row in rows[name]]
                      for name in rows}
            walks[net, opt, what] = steps, ratios
            late = [statistics.fmean(ratio[-len(ratio) // 4:]) for ratio in ratios.values()]
            near = sum(abs(ratio - 1) <= 0.25 for ratio in late)
            text.append([net, opt, what, *(f"{x:.2f}" for x in (min(late), statistics.median(late), max(late)))])
            checks.append((f"{net}, {opt}: the {what} of {near} of {len(late)} matrices is within 25 % of the "
                           "prediction", near >= 0.8 * len(late)))

    def draw(picture):
        for axes, (net, opt, what) in zip(picture.subplots(4, 3, sharex="row").T.flat, sorted(
                walks, key=lambda case: (case[1], case[0], case[2]))):
            steps, ratios = walks[net, opt, what]
            for ratio in ratios.values():
                axes.plot(steps, ratio, linewidth=0.7)
            axes.axhline(1, color="black", linestyle="--", linewidth=0.8)
            axes.set(yscale="log", ylim=(0.1, 10), ylabel=f"{what} / predicted", title=f"{opt}, {net}")
    rows = [["network", "optimizer", "measured / predicted", "least", "median", "largest"], *text]
    return Finding("Over the matrices, means over the last quarter:\n" + columns(rows), checks, draw)


def balance(lab):
    """Claim    Under Adam with L2 in the gradient some layers turn much faster than others, under AdamW all alike. That
             is why AdamW is better, and giving Adam+L2 balanced rotation closes the gap. [RE], section 5.3
    Done     A grid of lr and decay for adam, adamw and rotational_adam (gains on, the same network for all); then the
             spread of the rotation at the best setting with decay: largest over smallest mean angle of a matrix.
    Held if  adam's spread is at least twice adamw's, adamw's best loss is at least 0.01 below adam's, and
             rotational_adam's is not more than 0.01 above adamw's."""
    lrs = (1e-3, 2e-3, 4e-3, 8e-3)
    decays = {"adam": (0, 1e-4, 1e-3, 1e-2), "adamw": (0, 0.03, 0.1, 0.3), "rotational_adam": (0.01, 0.03, 0.1, 0.3)}
    steps = BASE[lab.scale, "gpt"]["steps"]
    results = lab.results([model_run(lab, "gpt", opt=opt, lr=lr, weight_decay=decay, gains=1, track=1,
                                     eval_every=steps // 10)
                           for opt in decays for lr in lrs for decay in decays[opt]])
    found = {opt: by_setting([result for result in results if result.run["opt"] == opt]) for opt in decays}
    best, spread, text = {}, {}, []
    for opt in decays:
        best[opt] = found[opt][0].mean
        decayed = next(s for s in found[opt] if float(s.flags["weight_decay"]) > 0).results[0]
        angle = [late_mean(rows, "angle", 0.5) for rows in rotations(decayed)[1].values()]
        spread[opt] = max(angle) / min(angle)
        text += [f"\n{opt}: best val_loss {best[opt]:.4f}; spread of the angles at lr {decayed.run['lr']}, "
                 f"weight_decay {decayed.run['weight_decay']}: {spread[opt]:.2f}",
                 heat_map(found[opt], "lr", "weight_decay")]
    checks = [(f"spread of the angles: adam {spread['adam']:.2f}, adamw {spread['adamw']:.2f}, rotational_adam "
               f"{spread['rotational_adam']:.2f}", spread["adam"] >= 2 * spread["adamw"]),
              (f"best loss: adamw {best['adamw']:.4f}, adam {best['adam']:.4f}", best["adamw"] <= best["adam"] - 0.01),
              (f"best loss: rotational_adam {best['rotational_adam']:.4f}, adamw {best['adamw']:.4f}",
               best["rotational_adam"] <= best["adamw"] + 0.01)]

    def draw(picture):
        for axes, opt in zip(picture.subplots(1, 3), decays):
            draw_heat_map(axes, found[opt], "lr", "weight_decay")
            axes.set_title(f"{opt}: largest angle / smallest = {spread[opt]:.1f}", fontsize=9)
    return Finding("\n".join(text).strip(), checks, draw)


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
    chosen = {opt: by_setting([result for result in tuning if result.run["opt"] == opt])[0].flags for opt in grids}
    final = by_setting(lab.results([
        model_run(lab, "gpt", opt=name, lr=h["lr"], weight_decay=h["weight_decay"], gains=1, seed=seed)
        for opt, h in chosen.items() for name in (opt, f"rotational_{opt}") for seed in (1, 2, 3)]))
    by_name, checks = {s.flags["opt"]: s for s in final}, []
    for opt, h in chosen.items():
        plain_one, rotational = by_name[opt], by_name[f"rotational_{opt}"]
        checks.append((f"{opt} {plain_one.words()}, rotational_{opt} {rotational.words()} at lr {h['lr']}, "
                       f"weight_decay {h['weight_decay']}", at_most(rotational.score, plain_one.score + 0.02)))

    def draw(picture):
        axes = picture.subplots()
        axes.bar(range(len(by_name)), [s.mean for s in by_name.values()], yerr=[s.spread for s in by_name.values()])
        axes.set_xticks(range(len(by_name)), by_name, rotation=20)
        known = [s.mean for s in by_name.values() if s.values] or [0]
        axes.set(ylabel="val_loss", ylim=(min(known) - 0.1, max(known) + 0.1))
    return Finding(table(final, ["opt", "lr", "weight_decay"]), checks, draw)


def warmup(lab):
    """Claim    At a large lr a plain optimizer needs a warmup, since rotation is far too fast before equilibrium is
             reached; rotational variants hold their angle from the first step and need much less. [RE], section 5.2
    Done     adamw and sgd, plain and rotational (gains on), at the tuned lr times 1, 2, 4 and 8, with the usual warmup
             and with none; two seeds. The cost of having none: the mean increase of the loss over the four lrs.
    Held if  that cost is at least 0.02 for each plain optimizer, and at most half as large for its variant."""
    hyper = {"adamw": dict(lr=4e-3, weight_decay=0.1), "sgd": dict(lr=0.3, weight_decay=1e-4)}
    steps, factors = 500, (1, 2, 4, 8)
    names = [name for opt in hyper for name in (opt, f"rotational_{opt}")]

    def one(name, factor, warm, seed):
        h = hyper[name.removeprefix("rotational_")]
        return model_run(lab, "gpt", opt=name, lr=h["lr"] * factor, weight_decay=h["weight_decay"], gains=1, seed=seed,
                         steps=steps, eval_every=steps, warmup=warm)
    asked = [(name, factor, warm, seed) for name in names for factor in factors for warm in (0, 50) for seed in (1, 2)]
    results = dict(zip(asked, lab.results([one(*case) for case in asked])))
    loss = {(name, factor, warm): statistics.fmean(capped(results[name, factor, warm, seed]) for seed in (1, 2))
            for name, factor, warm, _ in asked}
    cost = {name: statistics.fmean(loss[name, factor, 0] - loss[name, factor, 50] for factor in factors)
            for name in names}
    rows = [["val_loss", "warmup", *(f"lr x {factor}" for factor in factors)]]
    rows += [[name, str(warm), *(f"{loss[name, factor, warm]:.4f}" for factor in factors)]
             for name in names for warm in (50, 0)]
    checks = [(f"without warmup {opt} loses {cost[opt]:+.4f}, rotational_{opt} {cost[f'rotational_{opt}']:+.4f}",
               cost[opt] >= 0.02 and cost[f"rotational_{opt}"] <= cost[opt] / 2) for opt in hyper]

    def draw(picture):
        for axes, opt in zip(picture.subplots(1, 2, sharey=True), hyper):
            for number, name in enumerate((opt, f"rotational_{opt}")):
                for warm, style in ((50, "o-"), (0, "o--")):
                    axes.plot([hyper[opt]["lr"] * factor for factor in factors],
                              [loss[name, factor, warm] for factor in factors], style, color=f"C{number}",
                              label=f"{name}, warmup {warm}")
            axes.set(xscale="log", xlabel="lr", ylabel="val_loss")
            axes.legend(fontsize=7)
    return Finding(columns(rows), checks, draw)


def lr_transfer(lab, flag, sizes):
    """What lr_transfer_width and lr_transfer_depth share: lr grids at every size, the lr that is best at each, and what
    the lr of the smallest costs at the largest."""
    lrs = {"adam": [2.0**k for k in range(-11, -4)], "modular_adam": [2.0**k for k in range(-6, 1)],
           "sgd": [2.0**k for k in range(-4, 3)], "modular_sgd": [2.0**k for k in range(-6, 1)]}
    asked = [(opt, size, lr) for opt in lrs for size in sizes for lr in lrs[opt]]
    results = lab.results([
        model_run(lab, "gpt", opt=opt, lr=lr, weight_decay=0, schedule="linear", warmup=0, steps=400, eval_every=400,
                  arch="modular" if opt.startswith("modular") else "gpt2", **{flag: size}) for opt, size, lr in asked])
    loss = {case: capped(result) for case, result in zip(asked, results)}
    small, large, checks, text, cost = sizes[0], sizes[-1], [], [], {}
    for opt in lrs:
        best = {size: min(lrs[opt], key=lambda lr: loss[opt, size, lr]) for size in sizes}
        cost[opt] = loss[opt, large, best[small]] - loss[opt, large, best[large]]
        shift = math.log2(best[large] / best[small])
        rows = [[opt, *(f"lr 2^{math.log2(lr):.0f}" for lr in lrs[opt])]]
        rows += [[f"{flag} {size}", *(f"{loss[opt, size, lr]:.4f}{'*' * (lr == best[size])}" for lr in lrs[opt])]
                 for size in sizes]
        text += [columns(rows), f"  best lr from {flag} {small} to {large}: {shift:+.0f} octaves; with the lr of the "
                 f"smallest, the largest loses {cost[opt]:.4f}\n"]
    for opt in ("adam", "sgd"):
        modular = cost[f"modular_{opt}"]
        checks.append((f"the smallest model's lr costs the largest {modular:.4f} under modular_{opt}, {cost[opt]:.4f} "
                       f"under {opt}", modular <= 0.03 and modular < cost[opt]))

    def draw(picture):
        for axes, opt in zip(picture.subplots(2, 2).flat, lrs):
            for size in sizes:
                axes.plot(lrs[opt], [loss[opt, size, lr] for lr in lrs[opt]], "o-", label=f"{flag} {size}")
            axes.set(xscale="log", xlabel="lr", ylabel="val_loss", title=opt)
            axes.legend(fontsize=7)
    return Finding("\n".join(text).strip(), checks, draw)


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
    count = 8 if lab.scale == "cpu" else 40
    momentum, memory = Space("uniform", (0.1, 0.99)), Space("choice", ("0.9", "0.97", "0.99", "0.997"))
    decoupled, coupled, damping = Space("log", (1e-3, 0.3)), Space("log", (1e-5, 1e-2)), Space("log", (1e-5, 1e-2))
    spaces = {"sgd": dict(lr=Space("log", (0.01, 1)), momentum=momentum, weight_decay=coupled),
              "adamw": dict(lr=Space("log", (5e-4, 2e-2)), beta1=momentum, beta2=memory, weight_decay=decoupled),
              "rf_rmsprop": dict(lr=Space("log", (1e-4, 1e-2)), momentum=momentum, alpha=memory, eps=damping,
                                 weight_decay=coupled),
              "rf_adamw": dict(lr=Space("log", (1e-3, 1e-1)), beta1=momentum, beta2=memory, eps=damping,
                               weight_decay=decoupled)}
    best, text = {}, []
    shorter = {"cnn": {}, "gpt": dict(steps=500, eval_every=500, warmup=50)}

    def maker(net, opt):
        return lambda flags: [model_run(lab, net, opt=opt, **shorter[net], **flags)]
    found = two_stage(lab, {(net, opt): (maker(net, opt), spaces[opt]) for net in SCRIPTS for opt in spaces}, count, 0)
    for (net, opt), results in found.items():
        ranked = by_setting(results)
        best[net, opt] = ranked[0]
        keys = ", ".join(f"{key} {ranked[0].flags[key]}" for key in spaces[opt])
        text.append([net, opt, ranked[0].words(), keys])
    score = {case: s.score for case, s in best.items()}         # accuracies with a minus: less is better
    root_free_score = {net: min(score[net, "rf_rmsprop"], score[net, "rf_adamw"]) for net in SCRIPTS}
    words = {net: ", ".join(f"{opt} {best[net, opt].words()}" for opt in spaces) for net in SCRIPTS}
    checks = [(f"convolutional net, sgd ahead of adamw: {words['cnn']}", score["cnn", "sgd"] < score["cnn", "adamw"]),
              ("convolutional net, root-free at most 0.01 behind sgd and ahead of adamw",
               root_free_score["cnn"] <= score["cnn", "sgd"] + 0.01 and
               root_free_score["cnn"] < score["cnn", "adamw"]),
              (f"GPT, root-free at most 0.03 above adamw: {words['gpt']}",
               at_most(root_free_score["gpt"], score["gpt", "adamw"] + 0.03))]

    def draw(picture):
        for axes, net in zip(picture.subplots(1, 2), SCRIPTS):
            for opt in spaces:                      # how the best so far falls, or rises, as the search goes on
                scores = [result.score for result in found[net, opt]]
                shown = [abs(score) for score in itertools.accumulate(scores, min)]
                axes.plot(range(1, len(shown) + 1), [x if math.isfinite(x) else math.nan for x in shown], label=opt)
            axes.set(xlabel="runs of the search", ylabel=f"best {best[net, 'sgd'].results[0].metric}", title=net)
            axes.legend(fontsize=7)
    return Finding(columns([["net", "optimizer", "best", "at"], *text]), checks, draw)


def half_run(lab, steps, hyper, seed):
    return model_run(lab, "gpt", seed=seed, steps=steps, warmup=30, eval_every=steps // 2, eval_batches=30, **hyper)


def half_precision(lab):
    """Claim    Without roots and inverses Shampoo runs in bfloat16 throughout: as good as in float32, and faster
             than Shampoo, whose roots need float32. [RF]
    Done     if_shampoo with all its state and arithmetic in bfloat16 and in float32, and shampoo, which refreshes its
             roots as often (every 2nd step), each at the best of four lrs (chosen in float32, with one seed); three
             other seeds, one run at a time for the clock's sake.
    Held if  bfloat16's mean loss is at most 0.02 above float32's and shampoo's, and its step takes less time than
             either's."""
    steps, lrs = 300, {"if_shampoo": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "shampoo": (3e-4, 6e-4, 1.2e-3, 2.4e-3)}
    tuning = lab.results([half_run(lab, steps, dict(opt=opt, lr=lr, update_every=2), 0)
                          for opt in lrs for lr in lrs[opt]])
    lr = {opt: by_setting([result for result in tuning if result.run["opt"] == opt])[0].flags["lr"] for opt in lrs}
    kinds = {f"{opt}, {dtype}": {"opt": opt, "lr": lr[opt], "update_every": 2, "opt_kwargs.dtype": dtype}
             for opt, dtype in (("if_shampoo", "bfloat16"), ("if_shampoo", "float32"), ("shampoo", "float32"))}
    lab.jobs = 1
    results = lab.results([half_run(lab, steps, h, seed) for h in kinds.values() for seed in (1, 2, 3)])
    found = {name: Setting({}, results[3 * i:3 * i + 3]) for i, name in enumerate(kinds)}

    def milliseconds(result):
        """A step of the second half of the run, with its share of the one evaluation there."""
        if result.state != "done":
            return math.nan
        middle, end = result.log()[-2:]
        return 1e3 * (end["seconds"] - middle["seconds"]) / (end["step"] - middle["step"])
    took = {name: statistics.median(milliseconds(result) for result in s.results) for name, s in found.items()}
    half, single, roots = kinds
    rows = [["optimizer", "lr", "val_loss", "ms per step"]]
    rows += [[name, kinds[name]["lr"], s.words(), f"{took[name]:.1f}"] for name, s in found.items()]
    checks = [(f"val_loss {found[half].words()} in bfloat16, {found[other].words()} of {other}",
               at_most(found[half].score, found[other].score + 0.02)) for other in (single, roots)]
    checks += [(f"{took[half]:.1f} ms per step in bfloat16, {took[other]:.1f} of {other}", took[half] < took[other])
               for other in (single, roots)]

    def draw(picture):
        left, right = picture.subplots(1, 2)
        left.bar(list(kinds), [s.mean for s in found.values()], yerr=[s.spread for s in found.values()])
        right.bar(list(kinds), list(took.values()))
        left.set(ylabel="val_loss", ylim=(min(s.mean for s in found.values()) - 0.1, None))
        right.set(ylabel="ms per step")
        for axes in (left, right):
            axes.tick_params(axis="x", rotation=20, labelsize=7)
    return Finding(columns(rows), checks, draw)


EXPERIMENTS = {f.__name__: f for f in (equilibrium, balance, zero_shot, warmup, lr_transfer_width, lr_transfer_depth,
                                       root_free, half_precision)}


# ----------------------------------------------------------------------------------------------------------------------
# The three things that this program does: an experiment, a sweep, one run of it
# ----------------------------------------------------------------------------------------------------------------------


def two_stage(lab, searches, count, seed):
    """Random search in two stages, the protocol of [RF]: `count` draws from each space, then `count` from the smallest
    box around the best fifth of them. searches: {name: (make, spaces)}, make(flags) -> runs. -> {name: all results}."""
    def stage(number, spaces):
        asked = {name: [run for flags in draw(spaces[name], count, seed, number) for run in searches[name][0](flags)]
                 for name in spaces}
        lab.results([run for runs in asked.values() for run in runs])
        return {name: [lab.result(run) for run in dict.fromkeys(runs)] for name, runs in asked.items()}

    spaces = {name: spaces for name, (_, spaces) in searches.items()}
    first, narrow = stage(1, spaces), {}
    for name, results in first.items():
        best = [s.flags for s in by_setting(results) if s.sound][:max(2, count // 5)]
        if best:                                    # nothing to search around if none came to a result
            narrow[name] = {key: space.around([flags[key] for flags in best]) for key, space in spaces[name].items()}
    second = stage(2, narrow)
    return {name: results + second.get(name, []) for name, results in first.items()}


def experiment(lab, name, plot):
    """Do it and print what came of it -> whether the claim held."""
    explore = EXPERIMENTS[name]
    finding = explore(lab)
    if lab.mode == "print":
        return
    print(f"{name} at {lab.scale} scale, {len(lab.asked)} runs in {lab.out_dir}\n\n{inspect.getdoc(explore)}\n")
    print(f"{finding.text}\n")
    for words, held in finding.checks:
        print(f"{'yes' if held else 'NO':4s}{words}")
    held = [held for _, held in finding.checks]
    print("The claim held at this scale." if all(held) else
          f"The claim did not hold at this scale: {sum(held)} of {len(held)} checks.")
    if plot:
        figure(plot, finding.draw, figsize=(12, 7))


def planned(args, known):
    """-> make(flags) -> the runs of one setting, and the settings of a grid or of random draws."""
    fixed = settings(args.fixed, "--fixed")
    grid = {key: grid_values(text, f"--grid {key}={text}") for key, text in settings(args.grid, "--grid").items()}
    spaces = parse_space(args.space)
    names = [key if key in ("opt_kwargs.dtype", "opt_kwargs.seed") else key.removeprefix("opt_kwargs.")
             for key in [*fixed, *grid, *spaces]]
    for key, name in zip([*fixed, *grid, *spaces], names):
        if names.count(name) > 1:
            fail(f"{name} is given twice, fixed, varied or with opt_kwargs: give it once")
        if key == "seed" and args.seeds:
            fail("--seeds sets the seed: leave out seed=")
        if key not in known:
            import optim                            # it takes seconds, and mostly nobody needs to know
            takes = {name for kind in optim.OPTIMIZERS.values() for name in kind.takes()}
            if key.removeprefix("opt_kwargs.") not in takes:
                near = difflib.get_close_matches(key, known | takes, n=1)
                fail(f"{key} is neither a flag of {args.script} nor an option of an optimizer: " +
                     (f"did you mean {near[0]}?" if near else f"python {args.script} --help lists the flags"))

    settings_asked = args.random or (args.runs or 100) * args.two_stage or math.prod(map(len, grid.values()))
    if (count := settings_asked * (args.seeds or 1)) > 10**6:
        fail(f"{count:,} runs: more than a million would not end in your lifetime. Make the grid coarser")

    def make(flags):
        seeds = [{"seed": seed} for seed in range(1, args.seeds + 1)] if args.seeds else [{}]
        return [Run.of(args.script, fixed | flags | seed) for seed in seeds]
    if args.two_stage:
        return make, spaces
    draws = draw(spaces, args.random, args.seed or 0) if args.random else [
        dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    return make, draws


def main():
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # shades that a terminal lacks must not cost the report
    args = parse_arguments()
    settle(args)
    lab = Lab(args)
    if args.run:
        one_run(lab, args.run)
    unfinished = None
    try:
        if args.experiment:
            experiment(lab, args.experiment, args.plot)
        elif args.grid or args.space or args.fixed or args.seeds:
            make, settings_of = planned(args, flags_of(args.script))
            if args.two_stage:
                two_stage(lab, {"search": (make, settings_of)}, args.runs or 100, args.seed or 0)
            else:
                lab.results([run for flags in settings_of for run in make(flags)])
    except Unfinished as stop:
        unfinished = stop
    if lab.mode == "print":
        failed = 0 if unfinished else sum(lab.result(run).state == "failed" for run in lab.asked)
        if not unfinished:
            print("sweep.py: all runs are finished" + f", but {failed} failed (--retry prints these)" * bool(failed) +
                  "; --report instead of --print_commands shows them", file=sys.stderr)
        sys.exit(1 if failed else 0)
    results = [lab.result(run) for run in lab.asked or read_runs(lab.out_dir)]
    if not results:
        fail(f"{lab.out_dir} holds no runs: was the sweep started with another --out_dir?")
    scripts = {result.run.script for result in results}
    for script in scripts:                          # one metric for all runs of a script
        some = [result for result in results if result.run.script == script]
        metric = next((name for name in lab.metrics if any(name in result.last for result in some)), None)
        if metric is None and (done := [result for result in some if result.state == "done"]):
            there = [name for name in METRICS if name in done[0].last]
            fail(f"no run of {script} has {args.metric or ', '.join(METRICS)} in the last line of its log" +
                 f": they have {', '.join(there)}" * bool(there))
        for result in some:
            result.metrics = (metric,) if metric else lab.metrics
    if args.plot and not args.experiment:           # before the report: it may be long
        if len(scripts) > 1:
            fail(f"--plot draws the runs of one script, and here are {', '.join(sorted(scripts))}: give the flags of "
                 "one sweep")
        if not any(result.metric for result in results):
            fail("--plot: no run has a result yet", status=1)
    if not args.experiment or unfinished:
        print(report(results))
    if args.csv:
        write_csv(results, args.csv)
    if args.plot and not args.experiment:
        figure(args.plot, draw_report, results, figsize=(12, 5))
    if unfinished:
        count, total = unfinished.args
        fail(f"{count} of {total} runs are not finished: " + ("the same command without --report does them"
             if lab.mode == "report" else "they were killed; the same command goes on"), status=1)
    if count := sum(result.state == "unfinished" for result in results):
        fail(f"{count} of {len(results)} runs are not finished: the command that started them goes on", status=1)
    sys.exit(1 if any(result.state == "failed" for result in results) else 0)


def one_run(lab, name):
    """What a printed command does."""
    run = read_run(lab.out_dir / name)
    if run is None or run.name != name:
        fail(f"--run {name}: {lab.out_dir} knows no such run; print the commands again")
    lab.asked = [run]
    if lab.is_open(lab.result(run)):
        lab.do([run], 1)
    else:
        print(line_of(lab.result(run), [key for key, _ in run.flags]))
    sys.exit(0 if lab.result(run).state in ("done", "diverged") else 1)


if __name__ == "__main__":
    try:
        try:
            main()
        finally:                                    # main ends in sys.exit
            sys.stdout.flush()                      # here, where a pipe that nobody reads can be caught
    except KeyboardInterrupt:                       # before or after the runs: nothing to save
        sys.exit(130)
    except OSError as error:                        # `| head` has seen enough; or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        fail(f"cannot write {error.filename or 'the output'}: {error.strerror}", status=1)
