"""
tests.py: what optim.py promises, checked. Every test compares with something computed independently: torch.optim, a
slow transcription in numpy, a closed form, or a quantity that has to stay the same.

    python tests.py                 all tests, one a core: a line each, then what was counted; status 1 if any failed
    python tests.py probe errors    only the tests whose name contains one of the words, one after the other
    python tests.py --long killed   runs of the scripts are killed and resumed 20 times each instead of 4
    python -m pytest tests.py       the same under pytest (not needed)

A test is a function; its docstring is the claim it checks. Add one by writing it: no registration, no fixtures.
"""
import collections
import concurrent.futures
import contextlib
import copy
import functools
import gzip
import hashlib
import importlib
import inspect
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socketserver
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import unittest
import unittest.mock
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
import tqdm
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

try:
    import fcntl
    import resource
except ImportError:                                 # Windows has neither: what needs them is skipped
    fcntl = resource = None

import cifar_train
import nanogpt_train
import optim
import sweep
import translate_train


KILLS = 20 if "--long" in sys.argv else 4           # per script and optimizer
TALLY = collections.Counter()                       # what the tests count, for the last line


# ---- Helpers ---------------------------------------------------------------------------------------------------------

# Strong settings: every mechanism (momentum, decay, both averages) shows within a few steps.
STRONG = {"lr": 0.02, "momentum": 0.8, "betas": (0.9, 0.97), "alpha": 0.95, "weight_decay": 0.1, "batch_size": 4,
          "damping": 0.01, "lr_cov": 0.1, "update_every": 2}
OWN = {"sgd": {"lr": 0.05}, "adam": {"weight_decay": 0.2}, "adamw": {"weight_decay": 0.2}, "rmsprop": {"lr": 0.01},
       "lion": {"lr": 0.005, "weight_decay": 0.5}, "rf_rmsprop": {"lr": 0.05, "eps": 1e-3},
       "rf_adamw": {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.2}, "if_shampoo": {"lr": 0.05, "lr_cov": 0.2},
       "muon": {"weight_decay": 0.2, "adamw_lr_scale": 1.5},
       "modular_sgd": {"lr": 0.2}, "modular_adam": {"lr": 0.2, "weight_decay": 0.1}}
DIRECTIONS = ("sgd", "adam", "adamw", "lion", "rmsprop", "rf_rmsprop", "rf_adamw", "muon", "shampoo",
              "if_shampoo")
ROTATIONAL = tuple(f"rotational_{name}" for name in DIRECTIONS)
MODULAR = tuple(f"modular_{name}" for name in DIRECTIONS if name != "adamw")
ALL = tuple(optim.OPTIMIZERS)
ROOTLESS = tuple(name for name, kind in optim.OPTIMIZERS.items() if "batch_size" in kind.takes())
TORCH_TWINS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
               "rmsprop": torch.optim.RMSprop}
MIXED = [(4, 6), (3, 2, 3, 3), (5,), ()]        # two tensors that turn under a rotational optimizer, two that do not
FLOATS = torch.float64, torch.float32, torch.bfloat16, torch.float16
TURNING = [(5, 24), (4, 3, 3, 3)]               # wide enough that the signs of a neuron are hardly ever all equal


def base(name):
    """The name of the direction."""
    return name.removeprefix("rotational_").removeprefix("modular_")


def settings(name, **options):
    """The strong settings of an optimizer, as far as it takes them, some of them replaced."""
    known = optim.OPTIMIZERS[name].takes()
    return {k: v for k, v in STRONG.items() if k in known} | OWN.get(name, OWN.get(base(name), {})) | options


def required(name):
    """The arguments that have no default, with any value: none but the batch size of the root-free directions."""
    return {"batch_size": 7} if name in ROOTLESS else {}


def make(name, params, **options):
    return optim.OPTIMIZERS[name](params, **settings(name, **options))


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weight(*shape, fill=None, rows=..., dtype=torch.float32):
    """A parameter with random entries, of which rows may be filled with one value."""
    w = normal(0, *shape, dtype=dtype)
    if fill is not None:
        w[rows] = fill
    return nn.Parameter(w)


def parameters(shapes, dtype=torch.float64, seed=0):
    return [nn.Parameter(normal(seed + i, *shape, dtype=dtype)) for i, shape in enumerate(shapes)]


def noise(shapes, steps, dtype=torch.float64, seed=1000):
    """A list of `steps` lists of gradients: drawn in advance, so that every optimizer can be fed the same ones."""
    return [[normal(seed + 100 * t + i, *shape, dtype=dtype) for i, shape in enumerate(shapes)] for t in range(steps)]


def run(optimizer, gradients, lrs=None):
    """Feed a list of gradients per step (None: the parameter gets none), with a learning rate per step if given."""
    for t, step_gradients in enumerate(gradients):
        for group in optimizer.param_groups if lrs is not None else ():
            group["lr"] = lrs[t]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for p, g in zip(params, step_gradients, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


def values(params):
    return [p.detach().clone() for p in params]


def tensors(state):
    return {key: value for key, value in state.items() if torch.is_tensor(value)}


def close(ours, theirs, tolerance, what, scale=None):
    """max |ours - theirs| <= tolerance * scale;  scale: max |theirs| if none is given. NaN is never close."""
    TALLY["references compared"] += 1
    ours, theirs = (np.asarray(x.detach() if torch.is_tensor(x) else x, dtype=np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape, f"{what}: shapes {ours.shape} and {theirs.shape}"
    if ours.size:
        error, scale = np.abs(ours - theirs).max(), np.abs(theirs).max() if scale is None else scale
        assert error <= tolerance * scale, f"{what}: off by {error:.3g}, allowed {tolerance:g} x {scale:.3g}"


def all_close(ours, theirs, tolerance, what, starts=None):
    """Two lists of tensors are close, relative to the largest entry or 1, or to the largest distance from `starts`."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        b = b.detach().double()
        scale = b.abs().max().clamp(min=1) if starts is None else (b - starts[i].detach()).abs().max()
        close(a.detach().double(), b, tolerance, f"{what}, tensor {i}", scale=scale.item())


def same_bits(ours, theirs, what):
    TALLY["references compared"] += 1
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{what}: tensor {i} differs"


def refused(kind, words, call):
    """`call` must raise `kind` with a message of one line that contains all the words."""
    with unittest.TestCase().assertRaises(kind, msg=f"accepted, though it should be refused with {words}") as caught:
        call()
    message = str(caught.exception)
    assert "\n" not in message, f"message has several lines: {message!r}"
    for word in words:
        assert word in message, f"{word!r} is missing in the message {message!r}"


def rows_of(p, per_neuron=True):
    return p.detach().reshape(len(p) if per_neuron else 1, -1)


def angles(before, after, per_neuron=True):
    """Angles between rows in float64 as 2 atan2(|u-v|, |u+v|), which is accurate for small and large angles alike."""
    u, v = (rows_of(x, per_neuron).double() for x in (before, after))
    u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    return 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))


def through_a_file(thing):
    """torch.save, then torch.load in the mode that trusts nothing but tensors and plain containers."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def in_blocks(entries):
    """While it is on, tensors with more than so many entries are cut into blocks of rows."""
    return unittest.mock.patch.object(optim, "block_size", lambda *_, **__: entries)


class Single(nn.Linear):
    """A network of one layer, for whatever needs no more; it states its modular tree."""

    def modular_tree(self):
        return optim.weight(self)


# ---- The same numbers by hand: the papers' algorithms in numpy, one weight at a time; and by torch -------------------

DECOUPLED = ("adamw", "lion", "rf_adamw", "muon", "modular_sgd", "modular_adam")    # decay bypasses the direction
BY_ENTRY = ("sgd", "adam", "adamw", "lion", "rmsprop", "rf_rmsprop", "rf_adamw")
HEAVY_BALL = ("sgd", "rmsprop", "rf_rmsprop", "shampoo", "if_shampoo")


def elementwise_by_hand(name, h, shape):
    """The directions without matrices, from the papers' formulas -> a function of gradients.

    `l2` is what goes through the direction beside the gradient: weight_decay * w, or 0. With `only_v` it reaches Adam's
    second moment and not its first.
    """
    rootless, t, m = name.startswith("rf_"), 0, np.zeros(shape)
    v = np.full(shape, 1 / h["batch_size"] if rootless else 0.0)
    b1, b2 = h.get("betas", (h.get("momentum"), h.get("alpha", 0.0)))
    assert name in BY_ENTRY + ("modular_sgd", "modular_adam"), f"no transcription of {name}"

    def direction(g, l2=0, only_v=False):
        nonlocal t, m, v
        t, x = t + 1, g + l2
        if name in ("modular_sgd", "modular_adam"):         # averages that start warm, at the first gradient
            m = m + (1 - b1) ** ((t - 1) / t) * (g - m)
            v = v + (1 - b2) ** ((t - 1) / t) * (g * g - v)
            return m if name == "modular_sgd" else np.divide(m, np.sqrt(v), out=np.zeros_like(m), where=v > 0)
        if name == "lion":
            d, m = np.sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g
            return d
        v = b2 * v + (1 - b2) * (g if rootless else x) ** 2
        if name in HEAVY_BALL:
            if name == "rmsprop":
                x = x / (np.sqrt(v) + h.get("eps", 1e-8))
            if name == "rf_rmsprop":                        # the decay joins after the division
                x = g / (h["batch_size"] * v + h["eps"]) + l2
            m = b1 * m + x
            return m
        m = b1 * m + (1 - b1) * (g if only_v or rootless else x)
        if rootless:
            c1, c2 = (1 - b1**t, 1 - b2**t) if h.get("bias_correction") else (1, 1)
            return m / c1 / (h["batch_size"] * v / c2 + h["eps"])
        return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + h.get("eps", 1e-8))
    return direction


def unfold(x, i):
    """The matrix (d_i, all the rest) that has mode i of x as its rows."""
    return np.moveaxis(x, i, 0).reshape(x.shape[i], -1)


def times(x, i, F):
    """x with mode i multiplied by F: the new unfolding along mode i is F^T times the old one."""
    return np.moveaxis(np.tensordot(F, x, (0, i)), 0, i)


def quintics(x):
    """Every singular value of x over its norm goes through five quintics; the singular vectors stay."""
    x = x / (np.linalg.norm(x) or 1)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


def muon_by_hand(h, shape):
    """Muon, one matrix at a time."""
    mu, (out, rest) = h["momentum"], (shape[0], math.prod(shape[1:]))
    factor, m = math.sqrt(max(1, out / rest)), np.zeros((out, rest))
    if h.get("adjust") == "match_rms_adamw":
        factor = 0.2 * math.sqrt(max(out, rest))

    def direction(g):
        nonlocal m
        x = g.reshape(out, rest)
        m = mu * m + (1 - mu) * x
        x = (1 - mu) * x + mu * m if h.get("nesterov", True) else m
        return (factor * quintics(x)).reshape(g.shape)
    return direction


def shampoo_by_hand(h, shape):
    """Root-based Shampoo, mode by mode. A diagonal is kept as a full matrix whose other entries are set to 0."""
    sizes, b, t, m, v = tuple(shape) or (1,), h["lr_cov"], 0, np.zeros(shape), np.zeros(shape)
    L, R, k = [np.zeros((n, n)) for n in sizes], [np.eye(n) for n in sizes], len(sizes)

    def direction(g, l2=0):
        nonlocal t, m, v
        t, x = t + 1, g.reshape(sizes)
        for i, n in enumerate(sizes):
            C = unfold(x, i) @ unfold(x, i).T
            L[i] = (1 - b) * L[i] + b * (np.diag(np.diag(C)) if n > h.get("max_dim", 2048) else C)
            if t % h["update_every"] == 0:
                eigenvalues, Q = np.linalg.eigh(L[i] + h["damping"] * np.eye(n))
                R[i] = Q @ np.diag(eigenvalues ** (-1 / (2 * k))) @ Q.T
        for i in range(k):
            x = times(x, i, R[i])
        d, v = x.reshape(g.shape), (1 - b) * v + b * g**2   # v: of the Adam whose norm is borrowed
        if h.get("graft"):
            size = g if h["graft"] == "sgd" else g / (np.sqrt(v / (1 - (1 - b) ** t)) + 1e-8)
            d = d * np.linalg.norm(size) / np.linalg.norm(d)
        m = h["momentum"] * m + d + l2
        return m
    return direction


def if_shampoo_by_hand(h, shape):
    """Inverse-free Shampoo, mode by mode, every A_i formed for itself as (rest, d_i)."""
    sizes, rho, t, m = tuple(n for n in shape if n != 1) or (1,), h.get("riemannian_momentum", 0.5), 0, np.zeros(shape)
    K, M, k = [np.eye(n) for n in sizes], [np.zeros((n, n)) for n in sizes], len(sizes)
    due = 0                                                 # the next preconditioner step; t counts from 0

    def direction(g, l2=0):
        nonlocal t, m, due
        x = g.reshape(sizes)
        if t == due:
            due, H = t + min(max(math.floor(math.log(t + 1, 4) + 1e-9), 1), h["update_every"]), []
            for i, d_i in enumerate(sizes):
                A, c = math.sqrt(h["batch_size"]) * x, 1.0
                for j, d_j in enumerate(sizes):
                    A = times(A, j, K[j] if j == i else K[j] / math.sqrt(d_j))
                    c *= np.trace(K[j].T @ K[j]) / d_j if j != i else 1
                A = unfold(A, i).T
                H_i = 0.5 * (A.T @ A + h["damping"] * c * K[i].T @ K[i] - np.eye(d_i))
                H.append(np.diag(np.diag(H_i)) if d_i > h.get("max_dim", 2048) else H_i)
            for i in range(k):
                M[i] = rho * M[i] + (1 - rho) * H[i]
                lr_cov = h["lr_cov"] * h.get("lr_cov_scale", 1.0) / max(1.0, np.linalg.norm(M[i]))
                K[i] = K[i] - lr_cov * K[i] @ M[i]
        for i in range(k):
            x = times(x, i, K[i] @ K[i].T)
        t, m = t + 1, h["momentum"] * m + x.reshape(g.shape) + l2
        return m
    return direction


def direction_by_hand(name, h, shape):
    """-> a function (g, l2) -> d. modular_sgd and modular_adam have directions of their own."""
    kinds = {"muon": muon_by_hand, "shampoo": shampoo_by_hand, "if_shampoo": if_shampoo_by_hand}
    if base(name) in kinds:
        return kinds[base(name)](h, shape)
    return elementwise_by_hand(name if name in ("modular_sgd", "modular_adam") else base(name), h, shape)


def plain_by_hand(name, w, gradients, lrs, h):
    """One parameter under the plain rule. Yields w after every step."""
    direction, wd = direction_by_hand(name, h, w.shape), h["weight_decay"]
    for g, lr in zip(gradients, lrs):
        if name in DECOUPLED or base(name) in DECOUPLED:
            w = (1 - lr * wd) * w - lr * direction(g)
        else:
            w = w - lr * direction(g, wd * w)
        yield w


def angle_by_hand(name, h):
    """The average rotation per step, kappa sqrt(2 lr gain wd). With c_k, the weights with which one gradient enters the
    updates that follow, kappa = sqrt(sum c_k^2) / sum c_k and gain = sum c_k (of averages: 1)."""
    name, k, mu, (b1, b2) = base(name), np.arange(20_000), h.get("momentum", 0.0), h.get("betas", (0.0, 0.0))
    if name in HEAVY_BALL:
        c = mu**k
    elif name == "muon":                                    # of x = (1-mu) g + mu m, or of m
        c = (1 - mu) * mu**k
        if h.get("nesterov", True):
            c = mu * c + (1 - mu) * (k == 0)
    elif name == "lion":                                    # of the average inside; then what the sign takes away
        c = math.sqrt(math.pi / 2) * np.where(k == 0, 1 - b1, b1 * (1 - b2) * b2 ** (k - 1.0))
    else:
        c = (1 - b1) * b1**k
    gain = c.sum() if name in HEAVY_BALL else 1
    return math.sqrt((c**2).sum()) / gain * math.sqrt(2 * h["lr"] * gain * h["weight_decay"])


def rotational_by_hand(name, w, gradients, lrs, h):
    """One parameter under Algorithm 1 of the rotational equilibrium paper, neuron by neuron. Yields w at each step."""
    shape, wd, beta = w.shape, h["weight_decay"], h.get("update_norm_decay_factor", 0.9)
    zero_mean, direction = h.get("zero_mean", True), direction_by_hand(name, h, w.shape)
    neurons = [row.flatten() for row in (w if h.get("per_neuron", True) else w[None])]
    if zero_mean:                                           # centre, and give the neuron its old length back
        for i, row in enumerate(neurons):
            residue = row - row.mean()
            neurons[i] = residue * np.linalg.norm(row) / np.linalg.norm(residue)
    lengths, U = [np.linalg.norm(row) for row in neurons], [0.0] * len(neurons)
    for t, (g, lr) in enumerate(zip(gradients, lrs), start=1):
        w = np.stack(neurons).reshape(shape)
        d = direction(g, wd * w, only_v=True) if base(name) == "adam" else direction(g)
        turn = angle_by_hand(name, h | {"lr": lr})
        for i, u in enumerate(d.reshape(len(neurons), -1)):
            row, n = neurons[i], lengths[i]
            if zero_mean:
                u = u - u.mean()
            u = u - row * np.dot(u, row) / n**2             # tangent: without the part along the neuron itself
            U[i] = beta * U[i] + (1 - beta) * np.dot(u, u)
            row = row - turn * n * u / (np.sqrt(U[i] / (1 - beta**t)) + 1e-8)
            neurons[i] = row * n / np.linalg.norm(row)
        yield np.stack(neurons).reshape(shape)


def modular_by_hand(name, w, gradients, lrs, h):
    """The modular update, kernel position by kernel position, row by row; yields w after every step."""
    n_out, n_in, kernel, share, w = w.shape[0], w.shape[1], w.shape[2:], h.get("share", 1.0), w.copy()
    direction = direction_by_hand(name, h, w.shape)
    u = torch.randn(w.shape[1:], generator=torch.Generator().manual_seed(h.get("seed", 0)), dtype=torch.float64).numpy()
    for g, lr in zip(gradients, lrs):
        d = direction(g)
        if h.get("norm") == "rows":
            length = h.get("scale") or math.sqrt(n_in)
            for i in range(n_out):
                size = np.sqrt((d[i] ** 2).sum())
                w[i] -= lr * share * length * d[i] / size if size else 0
                w[i] *= length / np.sqrt((w[i] ** 2).sum()) if lr else 1
        else:
            scale = h.get("scale") or math.sqrt(n_out / n_in) / np.prod(kernel, initial=1)
            for at in np.ndindex(kernel):
                D = d[(..., *at)]
                left = D @ u[(..., *at)]
                u[(..., *at)] = D.T @ (left / np.linalg.norm(left))
                w[(..., *at)] -= lr * share * scale * D / np.linalg.norm(u[(..., *at)])
            w *= 1 - lr * share * h["weight_decay"]
        yield w.copy()


def by_hand(name, w, gradients, lrs, h):
    """h: the optimizer's settings and the group's own. Yields w after every step."""
    rule, alone = plain_by_hand, w.ndim < 2 or not w.size   # a bias, a gain
    if base(name) == "muon" and (alone or not h.get("use_muon", True)):     # adamw's, at a learning rate of its own
        scale = h.get("adamw_lr_scale", 1.0 if name in MODULAR else 0.1)
        name, lrs, h = name.replace("muon", "adamw"), [lr * scale for lr in lrs], {"betas": (0.9, 0.999)} | h
    if name.startswith("rotational_") and not alone and h["weight_decay"] and h.get("rotational") is not False:
        rule = rotational_by_hand
    if name.startswith("modular_") and not alone:
        rule = modular_by_hand
    return rule(name, w, gradients, lrs, h)


def follows(name, shapes, h, lrs, own=None, gradients=None, tolerance=1e-10):
    """The optimizer `name` equals its transcription at every step, to `tolerance` of the distance moved so far.

    own: what a parameter's group has of its own, by index."""
    own, gradients, params = own or {}, gradients or noise(shapes, len(lrs)), parameters(shapes)
    starts = [p.detach().numpy().copy() for p in params]
    optimizer = optim.OPTIMIZERS[name]([{"params": [p]} | own.get(i, {}) for i, p in enumerate(params)], **h)
    traces = [by_hand(name, start, [step[i].numpy() for step in gradients], lrs, h | own.get(i, {}))
              for i, start in enumerate(starts)]
    for t in range(len(lrs)):
        run(optimizer, gradients[t:t + 1], lrs[t:t + 1])
        for i, (p, start, trace) in enumerate(zip(params, starts, traces)):
            w = next(trace)
            close(p, w, tolerance, f"{name} {h} {own} parameter {i} {tuple(p.shape)} step {t + 1}",
                  scale=max(np.abs(w - start).max(initial=0), 1e-4 * np.abs(w).max(initial=0)))


def test_every_optimizer_equals_its_transcription():
    """For random shapes of 0 to 5 dims, hyperparameters, groups (without decay, exempt, with shares and norms of their
    own) and schedules, where some neurons have no gradient for a while, or never, to 1e-9 of the distance moved."""
    for name, case in itertools.product((name for name in optim.OPTIMIZERS if base(name) in DIRECTIONS), range(6)):
        known, r = optim.OPTIMIZERS[name].takes(), random.Random(f"{name} {case}")
        sizes = (1, 3, 5) if name == "modular_lion" else (1, 2, 3, 4, 5)        # signs cancel in even numbers
        shapes = [tuple(r.choice(sizes) for _ in range(dims)) for dims in (r.randint(0, 1), 2, 2, 3, r.randint(3, 5))]
        h = {"momentum": r.choice([0.0, r.uniform(0, 0.95)]), "betas": (r.uniform(0, 0.95), r.uniform(0.5, 0.999)),
             "alpha": r.uniform(0.5, 0.99), "eps": 10 ** r.uniform(-8, -1), "weight_decay": r.uniform(0, 0.5),
             "batch_size": r.choice([0.5, 1, 100]), "damping": 10 ** r.uniform(-3, 0), "lr_cov": r.uniform(0.01, 0.5),
             "update_every": r.choice([1, 3, 10]), "riemannian_momentum": r.uniform(0, 0.9), "seed": case,
             "max_dim": r.choice([0, 3, 2048]), "graft": r.choice([None, "sgd", "adam"]),
             "adjust": r.choice(["original", "match_rms_adamw"]), "adamw_lr_scale": r.random(),
             "update_norm_decay_factor": r.choice([0.0, r.random()])}
        h |= {key: r.random() < 0.5 for key in ("zero_mean", "nesterov", "per_neuron", "bias_correction")}
        h, own = {key: value for key, value in h.items() if key in known}, {}
        for i, shape in enumerate(shapes):
            drawn = {"weight_decay": r.choice([0.0, 0.3]), "lr_cov_scale": r.choice([0.25, 2.0]), "share": r.random(),
                     "norm": r.choice(["spectral", "rows"]) if len(shape) == 2 else "spectral",
                     "scale": r.choice([None, 3.0]), "use_muon": r.random() < 0.5}
            own[i] = {key: value for key, value in drawn.items() if key in known and r.random() < 0.5}
            stuck = name in ROTATIONAL and math.prod(shape[h["per_neuron"]:]) < 2 + h["zero_mean"]
            if len(shape) > 1 and (stuck or name in ROTATIONAL and i == 2):
                own[i]["rotational"] = False
        shapes += [] if "shampoo" in name else [(0,), (0, 5), (3, 0)]           # numpy has no unfolding of these
        steps = 20 if "muon" in name else 10
        gradients = noise(shapes, steps)
        for t, step in enumerate(gradients) if "shampoo" not in name else ():   # its eigenvectors come out of rounding
            for g in step[1:2] if t < 5 else step[1:3]:
                g[-1] *= 0 if len(g) > 1 and t > 1 else 1                       # tokens that do not occur
        lrs = [r.choice([0, r.uniform(0, 0.1)]) for _ in range(steps)]
        follows(name, shapes, h | {"lr": 0.0}, lrs, own, gradients, tolerance=1e-9)
    for update_every in (2, 10):                            # if_shampoo refreshes ever more seldom, over 300 steps
        follows("if_shampoo", [(2, 2)], settings("if_shampoo", update_every=update_every), [0.01] * 300)


def test_worked_example():
    """The numbers of the first page of optim.py, and those of the 2 x 2 example in muon's section."""
    W, G = (torch.tensor(x, dtype=torch.float64) for x in ([[3, 4], [1, 0]], [[1, 0], [0, 2]]))
    for name, options, steps, printed in (
            ("sgd", {}, 1, [[2.75, 3.8], [0.95, -0.2]]), ("modular_sgd", {}, 60, [[2.8025, 3.8], [0.95, -0.095]]),
            ("rotational_sgd", {"zero_mean": False}, 1, [[1.6543, 4.7184], [0.9535, -0.3015]])):
        w = nn.Parameter(W.clone())
        optimizer = optim.OPTIMIZERS[name]([w], lr=0.1, momentum=0.0, weight_decay=0.5, **options)
        for _ in range(steps):                              # power iteration needs a few steps to find the 2
            w.data.copy_(W)
            run(optimizer, [[G]])
        close(w, printed, 5e-5, name, scale=1)
    close(optim.orthogonalise(G).diagonal(), [1.114, 0.689], 1e-3, "muon")


def test_plain_equals_torch():
    """SGD, Adam, AdamW, RMSProp equal torch.optim to 1e-11, for all shapes, by default and with options, under
    schedulers, those that start at 0, end below 0 or move momentum or beta1 among them, with hyperparameters edited by
    hand in mid-run, and from torch's checkpoints. (RotationalSGD only has to run under the schedulers and edits.)"""
    cases = [("sgd", {}), ("sgd", {"momentum": 0.8, "weight_decay": 0.3}), ("adam", {}), ("adamw", {}),
             *((name, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1}) for name in ("adam", "adamw")),
             ("rmsprop", {}), ("rmsprop", {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9, "weight_decay": 0.1}),
             ("rotational_sgd", {"momentum": 0.8})]

    def edited(optimizer):                                  # a scheduler of our own
        edits = itertools.cycle([{"lr": 0.1}, {"weight_decay": 0.7}, {"weight_decay": 0.01}, {"alpha": 0.3, "eps": 0.1},
                                 {"momentum": 0.1, "betas": (0.0, 0.5)}, {"momentum": 0.0},
                                 {"momentum": 0.95, "betas": (0.95, 0.9)},
                                 {"weight_decay": 0}, {"lr": 0}])
        group = optimizer.param_groups[0]
        return types.SimpleNamespace(step=lambda: group.update(
            {key: x for key, x in next(edits).items() if key in optimizer.defaults and (key != "momentum" or cycles)}))

    S, shapes = torch.optim.lr_scheduler, [(), (1,), (5,), (4, 7), (6, 4, 3, 3)]
    schedulers = [edited, lambda o: S.LambdaLR(o, lambda t: 50 * math.sin(t / 5) ** 2),
                  lambda o: S.OneCycleLR(o, 0.1, 30, cycle_momentum=cycles),
                  lambda o: S.CyclicLR(o, 0.001, 0.05, 3, cycle_momentum=cycles),
                  lambda o: S.LinearLR(o, end_factor=0, total_iters=4)]                 # ends at lr = -4e-19
    for (name, hyper), (i, make_scheduler) in itertools.product(cases, enumerate(schedulers)):
        ours, theirs = parameters(shapes), parameters(shapes)
        cycles = name != "rmsprop" or bool(hyper)           # without momentum torch's has no buffer, and would fail
        for kind, params in ((optim.OPTIMIZERS[name], ours), (TORCH_TWINS.get(name, optim.OPTIMIZERS[name]), theirs)):
            optimizer = kind(params, **hyper)
            scheduler = make_scheduler(optimizer)
            for gradients in noise(shapes, 20):
                run(optimizer, [gradients])
                scheduler.step()
        all_close(ours, theirs, 1e-11, f"{name} {hyper}, scheduler {i}")
        if name in TORCH_TWINS:                             # its checkpoint goes on here
            resumed = optim.OPTIMIZERS[name](ours, lr=0.5)
            resumed.load_state_dict(optimizer.state_dict())
            for one in (resumed, optimizer):
                run(one, noise(shapes, 3, seed=9))
            all_close(ours, theirs, 1e-11, f"{name} {hyper}, scheduler {i}, from torch's checkpoint")


def test_defaults_are_the_papers():
    """Those that torch.optim does not have are set as in their papers. A signature shows every argument. state_bytes
    counts 4 for each average, 8 for each matrix of a mode."""
    expected = {"lion": {"betas": (0.9, 0.99)}, "rf_rmsprop": {"alpha": 0.99, "momentum": 0.9},
                "modular_adam": {"betas": (0.9, 0.99)}, "shampoo": {"momentum": 0.9, "damping": 1e-6},
                "if_shampoo": {"momentum": 0.9, "damping": 1e-4, "riemannian_momentum": 0.5},
                "rotational_adam": {"update_norm_decay_factor": 0.9, "per_neuron": True, "zero_mean": True}}
    for name, kind in optim.OPTIMIZERS.items():
        takes = kind.takes()
        assert expected.get(name, {}).items() <= takes.items(), f"{name}: {takes}"
        shown = {key: argument.default for key, argument in inspect.signature(kind).parameters.items()}
        del shown["params"]                                 # help() and a notebook's pop-up show the rest
        assert shown == takes and kind.__doc__, f"{name}: {shown}"
    for name, count in zip(DIRECTIONS, (4, 8, 8, 4, 8, 8, 8, 4, 20, 20)):       # on a matrix of 1000 x 1000
        close(optim.state_bytes(optim.OPTIMIZERS[name]), count, 0, f"state of {name}")


# ---- Rotation: random walks settle where the closed forms say, and what turning neurons keep -------------------------


def settled_by_hand(name, h, C, sigma):
    """(norm, angle per step) of a neuron of C weights, from growth = decay, written out for each optimizer but Muon."""
    total = h["lr"] / (1 - h.get("momentum", 0))            # one gradient's whole effect, with momentum
    angle, size = angle_by_hand(name, h), math.sqrt(total * C / (2 * h["weight_decay"]))
    if name in ("adam", "rmsprop"):                         # L2: the decay is divided by the gradient's RMS as well
        return size * math.sqrt(sigma), angle / math.sqrt(sigma)
    if name == "shampoo":                                   # its size depends on the shape: no closed form is offered
        return math.nan, angle
    if "batch_size" in h:                                   # root-free: entries of sigma over the damped curvature
        size *= sigma / (h["batch_size"] * sigma**2 + h["damping" if name == "if_shampoo" else "eps"])
    if name == "lion":
        size *= math.sqrt(2 * h["lr"] * h["weight_decay"]) / angle
    return size * (sigma if name == "sgd" else 1), angle


def lion_norm_by_arcsine(h, C, most=2000):
    """Lion's norm from the correlation of signs at all lags k, (2/pi) asin(rho_k), weakened by the decay in between.

    rho_k is the autocorrelation of the average inside, from its filter: c_0 = 1-b1, c_k = b1 (1-b2) b2^(k-1).
    """
    (b1, b2), k = h["betas"], np.arange(-most, most + 1)
    c = np.concatenate([[1 - b1], b1 * (1 - b2) * b2 ** np.arange(most)])
    rho = np.correlate(c, c, "full") / np.dot(c, c)
    power = 2 / math.pi * np.arcsin(np.clip(rho, -1, 1)) * (1 - h["lr"] * h["weight_decay"]) ** np.abs(k)
    return math.sqrt(h["lr"] * C / (2 * h["weight_decay"]) * power.sum())


def test_random_walks_settle_where_theory_says():
    """Random walks settle at the norm and angle of `equilibrium`: within 1.5 %, Muon and the root-free 2 %, Lion 4 %
    and 1 % with the arcsine law. Four times larger gradients halve the angle of Adam+L2."""
    # Two things limit the root-free, 1 % each: g takes part in the s that divides it, with weight 1-a; and what is left
    # of the long early steps, before s (or K) has forgotten its start, which was 1 where B sigma^2 + damping is 2.5.
    adam, ball = {"lr": 0.01, "betas": (0.8, 0.999), "weight_decay": 0.2}, {"momentum": 0.8, "batch_size": 4}
    cases = [("sgd", 0.7, 0.015, {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.008}),
             ("adam", 0.5, 0.015, adam), ("adam", 2, 0.015, adam), ("adamw", 0.7, 0.015, adam),
             ("rmsprop", 0.5, 0.015, {"lr": 0.005, "alpha": 0.99, "momentum": 0.8, "weight_decay": 0.04}),
             ("lion", 0.7, 0.04, {"lr": 0.005, "betas": (0.9, 0.95), "weight_decay": 0.2}),
             ("muon", 0.7, 0.02, {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.05}),
             ("rf_rmsprop", 0.7, 0.02, ball | {"lr": 0.05, "alpha": 0.99, "eps": 0.5, "weight_decay": 0.01}),
             ("rf_adamw", 0.7, 0.02, {"lr": 0.02, "betas": (0.8, 0.99), "eps": 0.5, "weight_decay": 0.1,
                                      "batch_size": 4}),
             ("if_shampoo", 0.7, 0.02, ball | {"lr": 0.05, "damping": 0.5, "lr_cov": 0.2, "riemannian_momentum": 0.5,
                                               "weight_decay": 0.02, "update_every": 10})]
    for name, sigma, tolerance, h in cases:                 # 48 neurons of 256 weights
        own = optim.OPTIMIZERS[name].takes() | h
        norm, angle = optim.equilibrium(optim.DIRECTIONS[name], own, 256, sigma, (48, 256))
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(48, 256) * (0.7 * norm / math.sqrt(256)))
        # How fast ||w||^2 forgets: 2 lr wd a step, over 1-mu for momentum, over sigma where that divides the decay.
        rate = 2 * h["lr"] * h["weight_decay"] / (sigma if name in ("adam", "rmsprop") else 1)
        rate /= 1 if name == "muon" else 1 - h.get("momentum", 0)
        [trace] = optim.random_walk(optim.OPTIMIZERS[name]([w], **h), [w], round(7 / rate), [sigma])
        settled = np.mean([row[1:] for row in trace if row[0] * rate > 3], axis=0)      # norm, angle
        close(settled / (norm, angle), np.ones(2), tolerance, f"norm and angle of {name}")
        if name == "lion":
            exact = lion_norm_by_arcsine(h, 256)
            close(settled[0], exact, 0.01, "norm of lion, arcsine law")
            close(optim.lion_walk_norm(h, 256), exact, 1e-9, "lion_walk_norm")


def test_rotational_neurons_keep_norm_and_mean_and_turn_by_the_angle():
    """In float32 neurons keep their norm and a mean of zero, to 1e-5; one that was rescaled and shifted gets its norm
    back in one step. The first step turns by exactly arctan(eta_r); all do so if update_norm_decay_factor is 0. A decay
    that is scheduled to 0 stops them, also after a checkpoint, until it returns."""
    decays = [0.1] * 4 + [0.0] * 3 + [0.3] * 5
    for name, per_neuron, factor in itertools.product(ROTATIONAL, (True, False), (0.0, 0.9)):
        [p], what = parameters(TURNING[:1], torch.float32), f"{name} {per_neuron} {factor}"
        options = {"per_neuron": per_neuron, "update_norm_decay_factor": factor, "rotational_eps": 0.0}
        norm, optimizer = rows_of(p, per_neuron).norm(dim=1), make(name, [p], **options)
        for t, (decay, gradients) in enumerate(zip(decays, noise(TURNING[:1], len(decays), torch.float32))):
            optimizer.param_groups[0]["weight_decay"] = decay
            if t == 5:
                saved, optimizer = through_a_file(optimizer.state_dict()), make(name, [p], **options)
                optimizer.load_state_dict(saved)
            if t == 11:
                p.data.mul_(1.3).add_(0.01)
            start = p.detach().clone()
            run(optimizer, [gradients])
            row, turned = rows_of(p, per_neuron).double(), angles(start, p, per_neuron)
            close(row.norm(dim=1), norm, 1e-5, f"norm, {what}")
            if t < 11:
                close(row.mean(dim=1) / norm, 0 * norm, 1e-5, f"mean, {what}", scale=1)
            if t == 0 or decay == 0 or t < 11 and factor == 0:
                angle = math.atan(angle_by_hand(name, settings(name, weight_decay=decay)))
                close(turned, torch.full_like(turned, angle), 2e-4, f"angle, {what}")


def test_centring():
    """What is centred, rounding and drift included, is not centred again, to the bit, in all four types. A new neuron
    is, also in bfloat16, whose mean is smaller than the rounding of an entry; and one that is off by 1e-4 of its norm.
    add_param_group does the same."""
    for name, dtype in itertools.product(ROTATIONAL, FLOATS):
        params, late, what = parameters(TURNING, dtype), parameters(TURNING, dtype), f"{name} {dtype}"
        optimizer = make(name, params)
        optimizer.add_param_group({"params": late})
        same_bits(late, params, f"{what}: a group added later")
        for steps in (0, 10):                               # centred just now, and after a while of rounding
            run(optimizer, [step * 2 for step in noise(TURNING, steps, dtype)])
            here = values(params)
            make(name, params)
            same_bits(params, here, f"{what}: centred twice, {steps} steps on")
    for [p], most in ((parameters([(5, 24)], torch.float32), 1e-5), (parameters([(5, 1024)], torch.bfloat16), 0.032)):
        for _ in range(2):
            make("rotational_sgd", [p])
            close(p.double().sum(dim=1) / p.double().norm(dim=1), np.zeros(5), most, "sum over norm", scale=1)
            p.data.add_(1e-4 * p.detach().norm(dim=1, keepdim=True))


def test_weights_that_change_before_their_first_step():
    """A layer that was frozen when the optimizer was made moves, once thawed, as one that never was: centred first. One
    that became all zero since then is refused by the first step, which moves and counts nothing."""
    [thawed], [never] = parameters([(5, 24)]), parameters([(5, 24)])
    for one, trained in ((thawed, False), (never, True)):
        optimizer = make("rotational_adamw", [one.requires_grad_(trained)])
        one.requires_grad_(True)
        run(optimizer, noise([(5, 24)], 2))
    same_bits([thawed], [never], "thawed")
    good, bad = parameters([(4, 6), (3, 5)])
    optimizer = make("rotational_adamw", [good, bad])
    good.data.add_(1.0)                                     # off centre, as loaded weights are
    bad.data[1] = 0
    start = values([good])
    refused(ValueError, ["RotationalAdamW", "parameter 1 of group 0", "all zeros"],
            lambda: run(optimizer, noise([(4, 6), (3, 5)], 1)))
    same_bits([good], start, "a weight beside the refused one")
    assert not optimizer.state.get(good), "a step that was refused is counted"


# ---- The modular norm: shares, sizes, bounds. Matrices: muon, shampoo, if_shampoo ------------------------------------


def linears(count, n_in=6, n_out=None):
    return [nn.Linear(n_in, n_out or n_in, bias=False) for _ in range(count)]


def shares(tree):
    return [w.share for w in tree.weights()]


def test_modular_shares_of_random_trees():
    """share = mass / total mass / sensitivity of all that comes after the weight, in 200 random expressions."""
    draw = random.Random(0)

    def part():
        """-> a tree, [(mass, sensitivity of what comes after it in here), ...] in forward order, sensitivity"""
        kind, mass, s, L = draw.choice(("weight", "bond", "power")), draw.uniform(0.1, 3), draw.uniform(0.5, 2), 3
        if kind == "weight":
            return optim.weight(nn.Linear(2, 2), mass=mass), [(mass, 1.0)], 1.0
        if kind == "bond":
            return optim.bond("b", s), [], s
        return (s * optim.weight(*linears(L, 2))) ** L, [(1, s ** (L - i)) for i in range(L)], s**L

    def join(kind, one, two):
        (tree, leaves, s), (other, others, t), a = one, two, draw.uniform(0.5, 2)
        if kind == "scale":
            return [two, (-a * tree, [(mass, a * after) for mass, after in leaves], a * s)]
        if kind == "tare" and leaves:
            total = sum(mass for mass, _ in leaves)
            return [two, (tree.tare(5), [(mass * 5 / total, after) for mass, after in leaves], s)]
        if kind == "compose":
            return [(other @ tree, [(mass, after * t) for mass, after in leaves] + others, s * t)]
        return [(tree + other if kind == "sum" else optim.as_tree((tree, other)), leaves + others, s + t)]

    for _ in range(200):
        parts = [part() for _ in range(draw.randint(1, 8))]
        while len(parts) > 1:
            draw.shuffle(parts)
            kind = draw.choice(("compose", "compose", "tuple", "sum", "scale", "tare"))
            parts += join(kind, parts.pop(), parts.pop())
        [(tree, leaves, sensitivity)], total = parts, sum(mass for mass, _ in parts[0][1])
        close([tree.mass, tree.sensitivity], [total, sensitivity], 1e-12, repr(tree))
        close([w.mass for w in tree.weights()], [mass for mass, _ in leaves], 1e-12, repr(tree))
        close(shares(tree), [mass / total / after for mass, after in leaves], 1e-12, repr(tree))


def test_trees_in_words_and_in_order():
    """M ** L takes the i-th run of every leaf's layers for copy i, nested or not. A tree prints as the expression that
    made it, whatever its bonds are called, and str shows its weights."""
    layers, a, b = linears(6), optim.bond("a"), optim.bond("b")
    tree = (2 * (0.5 * optim.weight(*layers)) ** 3) ** 2
    assert [w.layer for w in tree.weights()] == layers
    assert str(tree).count("Linear 6x6  spectral") == 6 and "sensitivity 0.0625" in str(tree), tree
    for tree, text in (((b @ a) ** 2, "(b @ a) ** 2"), (2 * (a + b) ** 3, "2 * ((a + b) ** 3)"),
                       (a + b @ a, "(a + b @ a)"), (optim.bond("C++") @ a, "C++ @ a"),
                       ((0.5 * optim.weight(*layers)).tare(3), "(0.5 * Linear 6x6 (of 6)).tare(3)"),
                       ((a, b) + a * 2, "((a, b) + 2 * a)")):
        assert repr(tree) == text, repr(tree)
    assert str(optim.weight(*layers)) == "Linear 6x6 (of 6)", "its shares are not known yet"


def test_modular_sizes():
    """Once power iteration has settled, an update's largest singular value (by SVD), at each kernel position, is
    lr * share * scale. For an update orthogonal to the kept vector the Frobenius norm stands in at once. A row of zeros
    stays zero where rows are put back to their norm."""
    first, hidden = (torch.zeros(4, 5, dtype=torch.float64) for _ in "ab")
    first[1, 1], hidden[2, 0], hidden[3, 2] = 1.0, 1.0, 0.5             # the kept vector takes on e_1 at once
    for start, g in ((first, hidden), (first[..., None].expand(4, 5, 2), hidden[..., None].expand(4, 5, 2)),
                     (normal(8, 20, 30), normal(9, 20, 30)), (normal(8, 30, 20, 3, 3), normal(9, 30, 20, 3, 3))):
        w, scale = nn.Parameter(0 * g), 0.7 * math.sqrt(g.shape[0] / g.shape[1]) / math.prod(g.shape[2:])
        optimizer = optim.ModularSGD([{"params": [w], "share": 0.7}], lr=1.0, momentum=0.0)
        run(optimizer, [[start], [g]])
        if len(g) == 4:
            close(w, -scale * (start + g / math.sqrt(1.25)), 1e-12, f"{tuple(g.shape)}: at once")
        run(optimizer, [[g]] * 150)
        before = w.detach().clone()
        run(optimizer, [[g]])
        for step in (w.detach() - before).reshape(*g.shape[:2], -1).unbind(-1):
            close(np.linalg.norm(step.numpy(), 2), scale, 1e-3, f"{tuple(g.shape)}")
    [w], gradients = parameters([(6, 5)]), noise([(6, 5)], 3)
    for x in (w.data, *(g for [g] in gradients)):
        x[2] = 0                                            # an Embedding's padding_idx
    run(make("modular_adam", [w], norm="rows"), gradients)
    close(w.norm(dim=1), math.sqrt(5) * np.array([1, 1, 0, 1, 1, 1]), 1e-12, "rows")


def test_initialise():
    """initialise: singular values sqrt(out/in), for a Conv at each kernel position over k^2; rows of norm sqrt(dim),
    and zeros at padding_idx; in bfloat16, too. A computed weight is refused."""
    up, down, conv = nn.Linear(3, 12), nn.Linear(12, 3, dtype=torch.bfloat16), nn.Conv2d(4, 8, 3)
    conv.weight.data = conv.weight.data.mT.contiguous().mT              # no kernel lies in one piece
    padded = nn.Embedding(4, 5, padding_idx=2)
    optim.initialise(optim.as_tree(tuple(map(optim.weight, (up, down, conv, padded)))))
    positions = [(position, math.sqrt(2) / 9, 1e-5) for position in conv.weight.flatten(2).unbind(2)]
    for w, expected, tolerance in [(up.weight, 2.0, 1e-5), (down.weight, 0.5, 0.01), *positions]:
        found = np.linalg.svd(w.detach().float().numpy())[1]
        close(found, np.full_like(found, expected), tolerance, f"{tuple(w.shape)}")
    close(padded.weight.norm(dim=1), math.sqrt(5) * np.array([1, 1, 0, 1]), 1e-5, "padding")
    made = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    refused(ValueError, ["initialise", "computed", "weight_norm"], lambda: optim.initialise(optim.weight(made)))


def test_modular_bound():
    """To first order, an update of modular norm 1 changes the output's RMS by at most 1, at any width and depth; the
    worst found reaches 0.05 of it or more."""
    # The update: for each weight a matrix of spectral norm share * scale and rank 1 that changes <c, output> most, with
    # c random: from the SVD of its gradient. The change: exact to first order, by forward differentiation.
    for width, L in ((4, 1), (16, 2), (64, 3), (16, 12)):
        torch.manual_seed(width + L)
        first, *inner, last = layers = nn.ModuleList(
            [*linears(1, 5, width), *linears(L, width), *linears(1, width, 3)]).double()
        block = (1 - 1 / L) * optim.bond("x") + 1 / L * (optim.bond("abs") @ optim.weight(*inner))
        tree = optim.weight(last) @ block ** L @ optim.weight(first)
        optim.initialise(tree)
        weights = [layer.weight.detach() for layer in layers]
        x, worst = normal(0, 5), 0.0
        x *= math.sqrt(5) / x.norm()                                    # RMS 1

        def function(weights):
            head, *blocks, tail = weights
            h = head @ x
            for w in blocks:
                h = (1 - 1 / L) * h + 1 / L * (w @ h).abs()
            return tail @ h

        for c in normal(1, 10, 3):
            slopes, update = torch.func.grad(lambda ws: c @ function(ws))(weights), []
            for share, slope in zip(shares(tree), slopes, strict=True):
                U, _, V = torch.linalg.svd(slope, full_matrices=False)
                update.append(share * math.sqrt(slope.shape[0] / slope.shape[1]) * U[:, :1] @ V[:1])
            _, change = torch.func.jvp(function, (weights,), (update,))
            worst = max(worst, change.square().mean().sqrt().item())
        assert 0.05 <= worst <= 1 + 1e-9, f"width {width}, {L} blocks: the output changes by {worst}"


def test_shampoo_at_the_limits_of_its_type():
    """A matrix with eigenvalues from 0 to 10^6 has its roots in float32. An index without gradient until now has L = 0,
    so its roots are damping^(-1/4), in a matrix as in a diagonal."""
    here, there = (torch.diag(torch.tensor(x, dtype=torch.float64)) for x in ([1, 0], [0, 1]))
    for max_dim in (2, 1):
        w = weight(2, 2, fill=0.0, dtype=torch.float64)
        # the roots of step 5 know nothing of index 1
        run(optim.Shampoo([w], lr=1.0, momentum=0.0, damping=1e-4, update_every=5, max_dim=max_dim),
            [[0 * here]] + [[here]] * 5 + [[there]])
        close(w[1], -there[1] * 1e-4 ** -0.5, 1e-12, f"max_dim={max_dim}")
    a, b = (normal(i, 30, dtype=torch.float32) for i in range(2))
    g = 1e3 * torch.outer(a / a.norm(), b / b.norm())       # on a gradient of rank 1, s u v^T, both roots act as
    w = weight(30, 30, fill=0.0)                            # (s^2 + damping)^(-1/4): d = g / sqrt(s^2 + damping)
    run(optim.Shampoo([w], lr=1.0, momentum=0.0, damping=1e-6, lr_cov=1.0, update_every=1), [[g]])
    close(w.norm(), 1.0, 0.1, "the step")


def test_if_shampoo_finds_the_inverse():
    """On gradients whose mean square is S, one mode settles at K K^T = (B S + damping)^-1."""
    d, B, damping, X = 4, 5, 0.3, normal(1, 4, 4)
    S = X @ X.T / d + 0.1 * torch.eye(d, dtype=torch.float64)
    w, average = nn.Parameter(torch.zeros(d, dtype=torch.float64)), 0
    # Momentum 0.95 keeps ||M|| under 1: where the step is clipped, the average is not that of H.
    optimizer = optim.InverseFreeShampoo([w], lr=0.0, momentum=0.0, damping=damping, lr_cov=0.01, update_every=1,
                                         riemannian_momentum=0.95, batch_size=B)
    for t in range(1200):                                   # in turn: the mean of g g^T over any 4 steps is S
        run(optimizer, [[torch.linalg.cholesky(S)[:, t % d] * math.sqrt(d)]])
        average = average + (optimizer.state[w]["K0"] @ optimizer.state[w]["K0"].T / 4 if t >= 1196 else 0)
    target = np.linalg.inv((B * S + damping * torch.eye(d, dtype=torch.float64)).numpy())
    close(average, target, 0.01, "K K^T")


def test_if_shampoo_does_not_feel_any_linear_map():
    """w = P u with any invertible P, one mode, damping 0: the same trajectory, if K of u starts at P^-1, not at I."""
    # It is Newton's invariance: K^T g is the same vector in both coordinates. Started from K = I as always, it is lost
    # unless P is orthogonal. Decay takes part, since P (wd u) = wd w.
    P, [w] = normal(1, 5, 5) + 2 * torch.eye(5, dtype=torch.float64), parameters([(5,)])
    u = nn.Parameter(torch.linalg.solve(P, w.detach()))
    ours, theirs = (make("if_shampoo", [x], lr_cov=0.0, damping=0.0, update_every=1) for x in (w, u))
    for optimizer in (ours, theirs):
        run(optimizer, [[0 * w.detach()]], [0.0])           # makes the state and moves nothing: lr = lr_cov = 0
        optimizer.param_groups[0].update(lr=0.05, lr_cov=0.2)
    theirs.state[u]["K0"].copy_(torch.linalg.inv(P))
    for t, [g] in enumerate(noise([(5,)], 30)):
        run(ours, [[g]])
        run(theirs, [[P.T @ g]])                            # the gradient of u, by the chain rule
        close(P @ u.detach(), w, 1e-10, f"step {t + 1}")


def test_if_shampoo_runs_in_bfloat16():
    """dtype=bfloat16: weights stay float32, and the run close to that of float32. In float16, whose largest number is
    2^16, factors of 2^10 and 2^-10 do not lead beyond it on the way to d."""
    shapes, kinds = MIXED[:2], (torch.float32, torch.bfloat16)
    starts, fine, coarse = (parameters(shapes, torch.float32) for _ in "abc")
    for params, dtype in zip((fine, coarse), kinds):
        run(make("if_shampoo", params, dtype=dtype, batch_size=32, weight_decay=1e-3), noise(shapes, 20, torch.float32))
    all_close(coarse, fine, 0.1, "after 20 steps", starts)
    assert not any(map(torch.equal, coarse, fine)), "bfloat16 was not felt at all"
    g, eye = 2**7 * torch.arange(1.0, 5.0).view(2, 2), torch.eye(2, dtype=torch.float16)
    state = {"K0": 2**10 * eye, "K1": 2**-10 * eye, "M0": 0 * eye, "M1": 0 * eye}
    d = optim.DIRECTIONS["if_shampoo"].update(g, state, {"refresh": False, "momentum": 0})
    close(d, g, 0, "K0 = 2^10, K1 = 2^-10")


def test_muon_equals_torch():
    """With iterations in bfloat16 Muon equals torch.optim.Muon within 1 % of the distance moved (bfloat16 has 8 bits),
    defaults included; vectors equal torch.optim.AdamW at a tenth of the learning rate."""
    shapes, other = [(4, 8), (8, 4), (5, 5), (9,)], {"lr": 0.02, "momentum": 0.9, "nesterov": False}
    gradients = noise(shapes, 20, torch.float32)
    for hyper, adjust in itertools.product(({}, other), ("original", "match_rms_adamw")):
        starts, ours, theirs = (parameters(shapes, torch.float32) for _ in "abc")
        run(optim.Muon(ours, dtype=torch.bfloat16, adjust=adjust, **hyper), gradients)
        run(torch.optim.Muon(theirs[:-1], adjust_lr_fn=adjust, **hyper), [step[:-1] for step in gradients])
        adamw = torch.optim.AdamW(theirs[-1:], lr=hyper.get("lr", 1e-3) / 10, weight_decay=0.1)
        run(adamw, [step[-1:] for step in gradients])
        all_close(ours[:-1], theirs[:-1], 0.01, f"{hyper} {adjust}", starts)
        all_close(ours[-1:], theirs[-1:], 1e-5, f"{hyper} {adjust}, the vector", starts[-1:])


def test_muon_singular_values():
    """Muon's d has the singular vectors of the gradient, and singular values in [0.68, 1.21] from 0.0015 of its norm
    upwards, none above; zero gives zero."""
    Q, R = (torch.linalg.qr(normal(seed, 40, 20))[0] for seed in (1, 2))
    sizes = torch.logspace(0, -6, 20, dtype=torch.float64)
    d = Q.T @ optim.orthogonalise(1e-9 * Q @ torch.diag(sizes) @ R.T) @ R
    found, felt = d.diagonal(), sizes / sizes.norm() > 0.0015
    assert found[felt].min() > 0.68 and 0 < found.min() and found.max() < 1.21, found
    close(d, torch.diag(found), 1e-9, "singular vectors", scale=1)
    assert optim.orthogonalise(torch.zeros(4, 3)).abs().max() == 0


# ---- What directions and geometries do not feel ----------------------------------------------------------------------

ORDER, SIGNS = torch.randperm(24, generator=torch.Generator().manual_seed(1)), normal(2, 4, 6).sign()
P, Q = (torch.linalg.qr(normal(seed, n, n))[0] for seed, n in ((3, 4), (4, 6)))
STILL = (lambda x: x, lambda x: x)
TURNED = (lambda x: P.T @ x @ Q, lambda x: P @ x @ Q.T)
PERMUTED = (lambda x: x.flatten()[ORDER].view(4, 6), lambda x: x.flatten()[ORDER.argsort()].view(4, 6))
FLIPPED = (lambda x: SIGNS * x, lambda x: SIGNS * x)


# The claim; who does not feel it; who does; the map of weights and its inverse; the factor of gradients; settings;
# factors of settings; how far off weights may end (0: not a bit), of the distance moved.
UNFELT = [
    ("lr times 4, decay over 4", {*ROTATIONAL} - {"rotational_adam"}, ("rotational_adam", "adamw"), STILL, 1, {},
     {"lr": 4, "weight_decay": 1 / 4}, 0),                  # the denominator of rotational_adam sees weight_decay * w
    ("gradients times 1000", ("rotational_sgd", "rotational_adamw", "rotational_lion", "adamw", "lion"),
     ("rotational_rf_adamw", "sgd"), STILL, 1000, {"eps": 0.0}, {}, 1e-7),
    ("gradients over 2^300", ("modular_sgd", "modular_adam", "modular_lion", "lion"), ("sgd", "rf_adamw"), STILL,
     2.0**-300, {}, {}, 0),
    ("the loss times 2", (), ("rf_rmsprop", "rf_adamw", "if_shampoo"), STILL, 2, {}, {}, 0),
    *((f"the loss times {c}, B over {c * c}: d grows by {c}", ("rf_rmsprop", "rf_adamw", "if_shampoo"), (), STILL, c,
       {}, {"batch_size": 1 / c**2, "lr": 1 / c, "weight_decay": c}, 0) for c in (2, 1 / 8)),
    ("another order of weights", BY_ENTRY, ("shampoo", "if_shampoo"), PERMUTED, 1, {}, {}, 0),
    ("other signs of weights", BY_ENTRY, ("shampoo", "if_shampoo"), FLIPPED, 1, {}, {}, 0),
    # A factor starts as a multiple of I, which looks alike in all orthogonal coordinates, and then turns with the
    # gradient. Damping and decay are round as well, so they need not be 0.
    ("turns of both modes", ("sgd", "shampoo", "if_shampoo"), {*BY_ENTRY} - {"sgd"}, TURNED, 1, {}, {}, 1e-10),
]


def test_what_is_not_felt():
    """The change in a row of UNFELT leaves the weights of its first optimizers as they were, and alters its second."""
    gradients = noise([(4, 6)], 20)
    for claim, names, felt_by, (there, back), factor, own, factors, tolerance in UNFELT:
        for name in (*names, *felt_by):
            kind, [w], [u], [start] = optim.OPTIMIZERS[name], *(parameters([(4, 6)]) for _ in "abc")
            h = settings(name) | {key: value for key, value in own.items() if key in kind.takes()}
            u.data = there(u.data)
            run(kind([w], **h), gradients)
            run(kind([u], **{key: value * factors[key] if key in factors else value for key, value in h.items()}),
                [[factor * there(g)] for [g] in gradients])
            moved, what = (w - start).abs().max().item(), f"{claim}: {name}"
            if name in felt_by:
                assert (back(u.detach()) - w).abs().max() > 1e-3 * moved, f"{what} does not feel it"
            elif tolerance:
                close(back(u.detach()), w, tolerance, what, scale=moved)
            else:
                same_bits([back(u.detach())], [w], what)


# ---- The optimizer: do this in mid-run, get the same numbers ---------------------------------------------------------


class Trial:
    """Three steps of an optimizer on named parameters of all types, and whatever an act puts in place of its parts."""
    KINDS = [((4, 6), torch.float32), ((3, 2, 3, 3), torch.float64), ((5, 3), torch.bfloat16),
             ((5,), torch.float32), ((), torch.float64), ((3,), torch.bfloat16)]

    def __init__(self, name, options):
        self.name, self.options, self.left = name, options, []
        self.take, self.around = lambda: self.optimizer.step(), contextlib.nullcontext
        kinds = [kind for kind in self.KINDS if len(kind[0]) < 3 or "norm" not in options]      # "rows" has no filters
        self.params = [nn.Parameter(normal(i, *shape, dtype=dtype)) for i, (shape, dtype) in enumerate(kinds)]
        self.gradients = noise([shape for shape, _ in kinds], 3)
        self.begin()

    def named(self):
        return list(zip("abcdef", self.params))

    def begin(self, groups=None):
        self.optimizer = make(self.name, groups or self.named(), **self.options)

    def leave(self, found):
        """These tensors must not change any more."""
        self.left += [(x, x.detach().clone()) for x in found]

    def states(self):
        return [x for state in self.optimizer.state.values() for x in tensors(state).values()]

    def step(self, t):
        self.given = [g.to(p.dtype) for p, g in zip(self.params, self.gradients[t])]
        for p, g in zip(self.params, self.given):
            p.grad = g
        self.leave(self.given)
        with self.around():
            self.take()
        same_bits(*zip(*self.left), "a gradient, or a tensor that is not part of it")

    def reload(self, edit=lambda saved: saved, file=through_a_file, order=1, hook=lambda saved: None):
        """Weights from a file, then an optimizer on them with other settings, then its state: a resumed run."""
        self.leave(self.states())
        saved = file({"params": values(self.params), "optimizer": self.optimizer.state_dict()})
        self.params = [nn.Parameter(x) for x in saved["params"]]
        options = {key: value for key, value in self.options.items() if key != "dtype"}
        self.optimizer = optim.OPTIMIZERS[self.name](self.named()[::order], **required(self.name), **options)
        self.optimizer.register_load_state_dict_pre_hook(lambda optimizer, saved: hook(saved))
        self.optimizer.load_state_dict(edit(saved["optimizer"]))

    def of_torch(self):
        """torch's own checkpoints, which go by the model's names and take a step with lr 0 on a fresh optimizer."""
        from torch.distributed.checkpoint import state_dict as checkpoints
        saved = checkpoints.get_optimizer_state_dict(nn.ParameterDict(self.named()), self.optimizer)
        self.params = [nn.Parameter(p.detach().clone()) for p in self.params]
        self.begin()
        checkpoints.set_optimizer_state_dict(nn.ParameterDict(self.named()), self.optimizer, saved)

    def become(self, duplicate):
        self.leave([*self.params, *self.states()])
        self.params, self.optimizer = duplicate((self.params, self.optimizer))

    def added(self):
        self.begin(self.named()[:2])
        for pair in self.named()[2:]:
            self.optimizer.add_param_group({"params": [pair]})

    def in_turns(self):
        """One parameter after the other has a gradient. The rest must not be felt, and gets no state."""
        def take():
            for p, g in zip(self.params, self.given):
                self.optimizer.zero_grad()
                p.grad, known = g, {*self.optimizer.state, p}
                self.optimizer.step()
                assert {*self.optimizer.state} == known, "state without a gradient"
        self.take = take

    def closure(self):
        def compute():
            self.optimizer.zero_grad()
            loss = sum((p * g).sum().double() for p, g in zip(self.params, self.given))
            loss.backward()                                     # needs gradients enabled
            return loss

        def take():
            assert torch.is_tensor(self.optimizer.step(compute)), "the loss of a closure is not returned"
        self.take = take

    def laid_out(self):
        for p in self.params:
            if p.dim() == 2:
                p.data = p.data.mT.contiguous().mT
            if p.dim() == 4:
                p.data = p.data.to(memory_format=torch.channels_last)
        self.begin()


FOREIGN = {"lr_scale": 0.5, "tag": "head", "layer": 3, "name": "body", "initial_lr": 1.0, "max_lr": 1.0, "min_lr": 0.0,
           "base_momentum": 0.1, "max_momentum": 0.9, "swa_lr": 0.1, "wd_multiplier": 1.0}


def by_others(saved):
    """A state_dict of a compiled run, with step counts as torch.optim writes them, and what nobody here knows."""
    saved["param_groups"] = [group | FOREIGN | {"compile": True} for group in saved["param_groups"]]
    for state in saved["state"].values():
        state |= {"step": torch.tensor(float(state["step"])), "ema": torch.ones(2), "note": "mine"}
    return saved


MATMULS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def precisions():
    return [backend.fp32_precision for backend in MATMULS]


@contextlib.contextmanager
def coarse_products(*owners):
    """Fast and coarse matrix products, wherever the hardware has them. A step must have fine ones, all the same."""
    def update(work, original=optim.update):
        work, found = list(work), precisions()
        products = any(geometry is optim.MODULAR or not direction.by_entry for direction, geometry, *_ in work)
        assert found == ["ieee" if products else "tf32"] * 2, found
        original(work)

    for owner in owners:
        owner.fp32_precision = "tf32"
    with unittest.mock.patch.object(optim, "update", update):
        yield
    after = precisions()
    for owner in owners:
        owner.fp32_precision = "none"
    assert (after, precisions()) == (["tf32"] * 2, ["none"] * 2), "the step leaves another one behind"


def under(around):
    return lambda trial: setattr(trial, "around", around)


SAME = [    # the claim; the step before which it happens; the act; how far off weights may end, in eps of their type
    ("a checkpoint resumes", 1, Trial.reload, 0),
    ("a checkpoint before the first step", 0, Trial.reload, 0),
    ("a checkpoint with foreign keys and entries", 1, lambda trial: trial.reload(by_others), 0),
    ("a checkpoint in another order", 1, lambda trial: trial.reload(order=-1), 0),
    ("a checkpoint that a hook mends", 1, lambda trial: trial.reload(
        lambda saved: {"mine": saved}, hook=lambda saved: saved["mine"]), 0),
    ("a state_dict handed over in memory", 1, lambda trial: trial.reload(file=lambda saved: saved), 0),
    ("torch's own checkpoints", 1, Trial.of_torch, 0),
    ("pickle", 1, lambda trial: trial.become(lambda pair: pickle.loads(pickle.dumps(pair))), 0),
    ("deepcopy", 1, lambda trial: trial.become(copy.deepcopy), 0),
    ("groups added one by one", 0, Trial.added, 0),
    ("one gradient at a time", 0, Trial.in_turns, 0),
    ("foreign keys from the start", 0, lambda trial: trial.begin([{"params": trial.named()} | FOREIGN]), 0),
    ("lr as a tensor", 1, lambda trial: trial.optimizer.param_groups[0].update(
        lr=torch.tensor([settings(trial.name)["lr"]], dtype=torch.float64)), 16),
    ("autocast to float16", 1, under(lambda: torch.autocast("cpu", torch.float16)), 0),
    ("another precision of all products", 1, under(lambda: coarse_products(torch.backends)), 0),
    ("another precision of matrix products", 1, under(lambda: coarse_products(*MATMULS)), 0),
    ("another default device", 0, lambda trial: (under(lambda: torch.device("meta"))(trial), trial.begin()), 0),
    ("other random numbers", 0, lambda trial: (torch.manual_seed(9), trial.begin()), 0),
    ("a closure", 1, Trial.closure, 0),
    ("other memory layouts", 0, Trial.laid_out, 64),
    ("a measured step", 1, lambda trial: optim.RotationProbe(trial.optimizer).measure_next_step(), 0),
    ("tensors cut into blocks", 1, under(lambda: in_blocks(7)), 0),
]
VARIANTS = [("shampoo", {"graft": "adam", "dtype": torch.float64}), ("if_shampoo", {"dtype": torch.bfloat16}),
            ("rotational_adamw", {"per_neuron": False}), ("modular_adam", {"norm": "rows"})]


def test_same_numbers_whatever_is_done():
    """For every optimizer and every row of SAME: three steps with the act in between end where three steps end. State
    is float32, or the parameter's type if that is wider, or `dtype`."""
    problems = []
    for name, options in [(name, {}) for name in optim.OPTIMIZERS] + VARIANTS:
        straight = Trial(name, options)
        for t in range(3):
            straight.step(t)
        for p in straight.params:
            wide = torch.promote_types(p.dtype, torch.float32)
            for key, x in tensors(straight.optimizer.state[p]).items():
                matrix = key[0] in "LRKM" or key == "momentum_buffer" and "if_shampoo" in name
                assert x.dtype == (options.get("dtype", wide) if matrix else wide), f"{name} {options}: {key} {x.dtype}"
        for claim, when, act, tolerance in SAME:
            with collected(problems, f"{name} {options}, {claim}"):
                trial = Trial(name, options)
                for t in range(3):
                    if t == when:
                        act(trial)
                    trial.step(t)
                for p, q in zip(trial.params, straight.params):
                    assert p.dtype == q.dtype
                    all_close([p], [q], tolerance * torch.finfo(p.dtype).eps, "a parameter")
                group = trial.optimizer.param_groups[0]
                assert not group["compile"], "compile has been loaded"
                assert "foreign" not in claim or FOREIGN.items() <= group.items(), "lost"
    assert not problems, "\n".join(problems)


def test_foreign_checkpoints_are_refused():
    """The state_dict of another kind of optimizer, or model, is a ValueError, and nothing has been loaded."""
    cases = [(name, other, {"w": (4, 6)}, {"w": (4, 6)}, []) for name, other in (
        ("adamw", torch.optim.SGD), ("rotational_sgd", "sgd"), ("adamw", "rotational_adamw"), ("sgd", "rmsprop"),
        ("shampoo", "if_shampoo"), ("modular_adam", "modular_lion"),    # the last: the same settings, one average less
        ("sgd", functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True)), ("adamw", torch.optim.NAdam),
        ("rmsprop", functools.partial(torch.optim.RMSprop, centered=True)),
        ("adam", functools.partial(torch.optim.Adam, decoupled_weight_decay=True)))]
    for name in optim.OPTIMIZERS:
        cases += [(name, name, {"w": (4, 6)}, {"w": (4, 8)}, ["another model", "w (4, 8) is (4, 6)"]),
                  (name, name, {"w": (4, 6), "q": (3, 4)}, {"w": (4, 6), "k": (3, 4)}, ["k", "q"])]
    for name, other, saved, here, words in cases:
        theirs, ours = (list(zip(named, parameters(named.values()))) for named in (saved, here))
        other = make(other, theirs, lr=0.5) if isinstance(other, str) else other(theirs, lr=0.5)
        run(other, noise(saved.values(), 2))
        optimizer = make(name, ours)
        refused(ValueError, [type(optimizer).__name__, *words], lambda: optimizer.load_state_dict(other.state_dict()))
        assert not optimizer.state and optimizer.param_groups[0]["lr"] == settings(name)["lr"], f"{name}: half loaded"


def test_standing_still():
    """A step with lr 0 changes no weight of any type, to the bit, on a fresh optimizer and later. Updates of zero turn
    nothing and add nothing, nor do those that are the same for all weights of a neuron; the next ones do."""
    zero = torch.zeros_like
    rows = [(optim.OPTIMIZERS, {"lr": 0.0}, MIXED, torch.clone),
            (MODULAR, {"lr": 0.0, "norm": "rows"}, [(6, 5)], torch.clone),
            *((ROTATIONAL, {"rotational_eps": eps}, TURNING, zero) for eps in (1e-8, 0.0)),
            (MODULAR, {"weight_decay": 0.0}, TURNING, zero),
            (["shampoo"], {"weight_decay": 0.0, "graft": "adam"}, TURNING, zero),
            (["rotational_sgd"], {}, TURNING, lambda g: torch.full_like(g, 0.1)),
            (["rotational_lion"], {}, TURNING, lambda g: g.abs() + 0.1)]
    for names, options, shapes, change in rows:
        for name, dtype in itertools.product(names, FLOATS):
            params, what = parameters(shapes, dtype), f"{name} {options} {dtype}"
            optimizer, moving = make(name, params, **options), noise(shapes, 2, dtype, seed=7)
            starts = values(params)
            run(optimizer, [[change(g) for g in step] for step in noise(shapes, 3, dtype)])
            same_bits(params, starts, what)
            run(optimizer, moving, [settings(name)["lr"]] * 2)
            moved = values(params)
            assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(params, starts)), f"{what}: stuck"
            run(optimizer, moving, [0.0] * 2)
            same_bits(params, moved, f"{what}, later")


def test_precisions():
    """bfloat16, float16 and float32 parameters follow float64 ones as closely as one rounding a step allows."""
    for name, dtype in itertools.product(optim.OPTIMIZERS, FLOATS[1:]):
        gradients, params = noise(MIXED, 6, dtype), parameters(MIXED, dtype)
        exact = [nn.Parameter(p.detach().double()) for p in params]
        starts, tolerance = values(exact), 6 * torch.finfo(dtype).eps
        # rounding costs at most half an eps of the weight each step: only larger steps show in 16 bits
        lr = settings(name)["lr"] if dtype == torch.float32 else max(0.06, settings(name)["lr"])
        run(make(name, params, lr=lr), gradients)
        run(make(name, exact, lr=lr), [[g.double() for g in step] for step in gradients])
        all_close(params, exact, tolerance, f"{name} {dtype}")
        moved = max(((q - start).abs().max() / q.abs().max().clamp(min=1)).item() for q, start in zip(exact, starts))
        assert moved > 2 * tolerance, f"{name} {dtype}: hardly moved ({moved}), so this shows nothing"


def test_nan_is_not_hidden():
    """A NaN or an Inf in one step's gradients shows in the weight by the next: no method mends it and trains on in
    silence. Lion's sign would: there it shows in the average."""
    for name, bad in itertools.product(optim.OPTIMIZERS, (math.nan, math.inf)):
        [w], [[first], [second]] = parameters([(6, 5)]), noise([(6, 5)], 2)
        first[1, 2] = bad
        optimizer = make(name, [w])
        run(optimizer, [[first], [second]])
        shown = [w, *(x for key, x in tensors(optimizer.state[w]).items() if key == "exp_avg")]
        assert not all(x.isfinite().all() for x in shown), f"{name}: {bad} in a gradient went unnoticed"


class Watch(TorchDispatchMode):
    """Sees every operation while it is on: how often a number was fetched from a tensor, which makes the host wait for
    the device, and how many entries the largest tensor has that any operation returns."""
    fetched = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fetched += func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out


def test_no_step_waits_for_the_device():
    """Once its state exists, no optimizer fetches a number from a tensor during step(), nor makes tensors elsewhere:
    meta tensors, which have no numbers, get through. A checkpoint brings state to its parameter's device. Directions by
    entry, on rows that move by themselves, make no tensor larger than a block."""
    with Watch() as watch:
        torch.ones(1).item()
    assert watch.fetched == 1, "the watch is blind"
    for name, options in [(name, {}) for name in optim.OPTIMIZERS] + [
            ("shampoo", own) for own in ({"graft": "sgd"}, {"graft": "adam"}, {"compile": True})]:
        by_block = base(name) in BY_ENTRY
        rows = {"norm": "rows"} if by_block and name in MODULAR else {}
        shapes = [(50, 8), (90,), ()] + [(7, 3, 2, 2)] * (not rows)
        params, gradients = parameters(shapes, torch.float32), noise(shapes, 2, torch.float32)
        with unittest.mock.patch.object(optim, "update_compiled", optim.update), in_blocks(45):    # what is compiled
            optimizer = make(name, params, **options, **rows)
            run(optimizer, gradients)
            with Watch() as watch:
                optimizer.step()
        assert watch.fetched == 0, f"{name} {options}: {watch.fetched} numbers fetched in a step"
        assert 0 < watch.largest <= 45 or not by_block, f"{name} made a tensor of {watch.largest} entries"
        far = [nn.Parameter(p.detach().to("meta")) for p in params]
        for saved in (None, optimizer.state_dict()) if not options else ():
            loaded = make(name, far, **rows)
            if saved:
                loaded.load_state_dict(saved)
            run(loaded, [[torch.empty_like(p) for p in far]])
            held = [x for p in far for x in tensors(loaded.state[p]).values()]
            assert held and all(x.is_meta for x in held), name


def network(seed=0):
    """Two layers in float64."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    for i, p in enumerate(model.parameters()):
        p.data = normal(seed + i, *p.shape)
    return model


def train(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()


def replica(rank, folder):
    """One of two processes of DistributedDataParallel: half of every batch, and the weights that come out of it."""
    from torch.distributed.fsdp import fully_shard
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    weights, batches = {}, [normal(t, 8, 6).chunk(2)[rank] for t in range(3)]
    for name in optim.OPTIMIZERS:
        model = nn.parallel.DistributedDataParallel(network(seed=rank))         # both start from the weights of rank 0
        train(model, make(name, model.parameters()), batches)
        weights[name] = values(model.parameters())
        model = network()
        fully_shard(model)
        try:
            optimizer = make(name, model.parameters())
            optim.build(name, model, **settings(name))      # accepts what the class accepts
            with in_blocks(10):
                train(model, optimizer, batches)
            weights[f"sharded {name}"] = values(p.full_tensor() for p in model.parameters())
        except ValueError as error:
            weights[f"sharded {name}"] = str(error)
    torch.save(weights, f"{folder}/{rank}.pt")
    torch.distributed.barrier()                             # nobody leaves while the other still talks to it
    torch.distributed.destroy_process_group()


def test_data_parallel_replicas():
    """Two DDP processes hold the same weights to the bit, and those of one process with the whole batch. So do two FSDP
    ones; where the update needs whole matrices, they are refused, by parameter."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(replica, (folder,), nprocs=2)
        one, two = (torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2))
    for name in optim.OPTIMIZERS:
        model, found = network(), one[f"sharded {name}"]
        train(model, make(name, model.parameters()), [normal(t, 8, 6) for t in range(3)])
        same_bits(one[name], two[name], f"{name}: the replicas drift apart")
        if name in MODULAR or not optim.OPTIMIZERS[name].direction.by_entry:
            assert "parameter 0 of group 0 (5, 6) is a DTensor" in found, found
        for reached in [one[name]] + [found] * (not isinstance(found, str)):
            all_close(reached, model.parameters(), 1e-10, f"{name}: two processes beside one")


def test_compiled_steps_are_one_graph():
    """torch.compile finds nothing in a step of any optimizer that it has to leave to Python."""
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)       # raises where a graph would break
    with unittest.mock.patch.object(torch, "compile", lambda function, **_: whole(function)):
        for name in (*DIRECTIONS, "rotational_adam", "modular_sgd", "modular_adam"):       # every factor once
            torch._dynamo.reset()
            optim.compiled_update.cache_clear()
            run(make(name, parameters(MIXED[:1]), compile=True), noise(MIXED[:1], 1))
    optim.compiled_update.cache_clear()


def test_compiled_equals_eager():
    """compile=True gives the numbers of eager mode under a changing lr, for tensors in blocks, of 0 dims, embeddings,
    and compiles nothing after the first step (tried with rotational and modular SGD)."""
    if not any(map(shutil.which, [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"])):
        raise unittest.SkipTest("torch.compile needs a C++ compiler: none of $CXX, c++, g++, clang++ was found")
    from torch._dynamo.utils import counters
    shapes, lrs = [(8, 6), ()], [0.01 * t for t in range(4)]
    for name, small, options in (("rotational_sgd", 24, {}),                    # 24: twice 4 rows
                                 ("modular_sgd", sys.maxsize, {"norm": "rows"})):           # torch's compiler has a bug
        torch._dynamo.reset()
        counters.clear()
        params, compiled, graphs = parameters(shapes), parameters(shapes), []
        optimizer = make(name, compiled, compile=True, **options)
        run(make(name, params, **options), noise(shapes, 4), lrs)
        with in_blocks(small):
            for lr, step in zip(lrs, noise(shapes, 4)):
                run(optimizer, [step], [lr])
                graphs.append(counters["stats"]["unique_graphs"])
        all_close(compiled, params, 1e-12, name)
        assert 0 < graphs[0] == graphs[-1], f"{name}: compiled again and again, or never: {graphs}"


# ---- What is refused, whether the message names the offender and the way out, and what build makes of a model --------


def test_errors_of_values():
    """A hyperparameter out of range or of the wrong type is a ValueError that shows name, value, range and group, from
    the constructor and in mid-run, where nothing moves."""
    nan, inf, bad = math.nan, math.inf, {}
    for keys, values_of, words in (
            ("lr weight_decay eps rotational_eps damping lr_cov lr_cov_scale adamw_lr_scale share",
             (-1e-9, nan, inf, None, "0.1", torch.ones(2)), "[0, inf)"),
            ("momentum alpha update_norm_decay_factor riemannian_momentum", (-0.1, 1.0, nan, None), "[0, 1)"),
            ("betas", ((0.9, 1.0), (-0.1, 0.9), (0.9,), (0.9, 0.9, 0.9), (nan, 0.9), 0.9, None, ("a", "b")), "[0, 1)"),
            ("per_neuron zero_mean compile bias_correction nesterov use_muon", (1, "yes", None), "True, False"),
            ("adjust", (None, "spectral"), "'original', 'match_rms_adamw'"),
            ("rotational", ("yes", 2), "True, False"), ("batch_size", (None, 0, -1, nan, inf, "4"), "examples"),
            ("update_every", (0, -1, 1.5, nan, None), "whole"), ("seed", (-1, 0.5, 2**63, None), "whole"),
            ("max_dim", (-1, nan, None), "[0, inf"), ("scale", (0, -1.0, nan, inf), "(0, inf)"),
            ("graft", ("lion", "Adam", True, 0), "'sgd', 'adam'"), ("norm", ("x", None), "'spectral', 'rows'"),
            ("dtype", (torch.int32, torch.complex64, torch.float8_e4m3fn, "float32", 16), "float32")):
        bad |= {key: (values_of, words) for key in keys.split()}
    for name, kind in optim.OPTIMIZERS.items():
        optimizer = make(name, [weight(3, 4)])
        run(optimizer, [[weight(3, 4)]])
        [group], before = optimizer.param_groups, repr(optimizer.state_dict())
        for key in kind.takes() if base(name) in DIRECTIONS else ():
            for value in bad[key][0]:
                shown = [kind.__name__, f"{key}={value!r}", bad[key][1], "group"]
                groups = [{"params": [weight(3, 4)]}, {"params": [weight(2, 5)], key: value}]
                refused(ValueError, shown + ["group 1"], lambda: kind(groups, **required(name)))
                kept, group[key] = group[key], value        # by hand, in mid-run
                refused(ValueError, shown + ["group 0"], optimizer.step)
                group[key] = kept
        group["maximize"] = True
        refused(ValueError, ["maximize", "not offered"], optimizer.step)
        del group["maximize"]
        assert before == repr(optimizer.state_dict()), f"{name}: moved by a step that it refuses"


exempt, off_centre = {"rotational": False}, {"zero_mean": False}
ROOTED = "shampoo", "rotational_shampoo", "modular_shampoo"
# Of whom; the parameter, alone in its group; what else is in the group; words of the ValueError, or None: accepted.
BAD_GROUPS = [
    (ALL, weight(3, 4), {"weigth_decay": 0.1}, ["'weigth_decay'", "'weight_decay'", "group 0"]),
    (ALL, weight(3, 4), {"learning_rate": 0.1}, None),                  # a user's own, and far from any
    *((ALL, weight(3, 4), {key: True}, [key, "not offered"]) for key in ("amsgrad", "dampening", "centered")),
    (("adam", "sgd"), weight(3, 4), {"decoupled_weight_decay": True}, ["decoupled_weight_decay", "not offered"]),
    (ALL, weight(3, 4), {"dampening": 0, "capturable": False}, None),
    (("adamw",), weight(3, 4), {"decoupled_weight_decay": True}, None),
    (ALL, weight(4, dtype=torch.complex64), {}, ["parameter 0 of group 0", "complex64", "view_as_real"]),
    (ALL, ("head.w", weight(3, 4, dtype=torch.complex64)), {}, ["head.w", "complex64"]),
    (ALL, nn.Parameter(weight(3, 4).detach().to_sparse()), {}, ["sparse_coo", "dense"]),
    (ALL, nn.Parameter(weight(4).detach().expand(3, 4)), {}, ["(3, 4)", "expanded", "clone()"]),
    (ALL, nn.Parameter(weight().detach().expand(1)), {}, None),         # stride 0, but of one entry
    *((ROTATIONAL, p, h, ["parameter 0 of group 0", str(tuple(p.shape)), why, "rotational=False"]) for p, h, why in (
        (weight(4, 1), off_centre, "1 weight,"), (weight(3, 2, 1, 1), {}, "2 weights"),
        (weight(4), {"rotational": True}, "1 weight,"), (weight(3, 24, fill=math.nan, rows=1), {}, "NaN"),
        (weight(3, 24, fill=0.0, rows=1), {}, "all zeros"), (weight(3, 24, fill=0.0, rows=1), off_centre, "all zeros"),
        (weight(3, 24, fill=0.1, rows=1), {}, "equal"), (weight(3, 4, fill=0.1, dtype=torch.bfloat16), {}, "equal"),
        (weight(3, 24, fill=math.inf, rows=1), off_centre, "infinity"),
        (weight(3, 4), {"rotational": True, "weight_decay": 0.0}, "weight_decay=0"))),
    *((ROTATIONAL, p, own, None) for p, own in (
        (weight(4, 1), exempt), (weight(3, 24, fill=0.0, rows=1), exempt), (weight(3, 4, fill=0.1), exempt),
        (weight(3, 4, fill=0.1), {"weight_decay": 0.0}),                # without decay nothing is asked to turn
        (weight(4, 2), off_centre), (weight(3, 24, fill=0.1, rows=1), off_centre))),    # a circle; a row that can turn
    (ROOTLESS, weight(3, 4), {"batch_size": None}, ["batch_size=None", "examples", "group 0"]),
    (ROOTED, weight(3, 4), {"damping": 0.0}, ["damping=0"]),
    *((ROOTED, weight(3, 4), {"lr_cov": x}, [f"lr_cov={x}"]) for x in (0.0, 1.5)),
    (ROOTED, weight(3, 4), {"dtype": torch.bfloat16}, ["bfloat16", "roots", "float32", "if_shampoo"]),
    (MODULAR, weight(3, 4, 5), {"norm": "rows"}, ["norm='rows'"]),
]


def test_errors_of_groups():
    """Each row of BAD_GROUPS is refused in words, by the constructor and by add_param_group, which leave no trace, not
    even on weights beside it. So are arguments that do not exist, nothing to train, and sparse gradients."""
    for name, kind in optim.OPTIMIZERS.items():
        optimizer = make(name, parameters([(3, 4)]))
        before = repr(optimizer.state_dict())
        for who, bad, own, words in (row for row in BAD_GROUPS if name in row[0]):
            [good], p = parameters([(4, 6)]), bad[1] if isinstance(bad, tuple) else bad
            start, alone, group = values([good]), [{"params": [bad], **own}], {"params": [p], **own}
            if words is None:
                kind(alone, **required(name))
                continue
            there = [word.replace("group 0", "group 1") for word in words if p is bad]
            refused(ValueError, [kind.__name__, *words], lambda: kind(alone, **required(name)))
            refused(ValueError, there, lambda: kind([{"params": [good]}, group], **required(name)))
            refused(ValueError, there, lambda: optimizer.add_param_group(group.copy()))
            same_bits([good], start, f"{name}: {words}: refused, and yet changed")
            assert repr(optimizer.state_dict()) == before, f"{name}: {words} left a trace"
        refused(TypeError, [kind.__name__, "learning_rate", *kind.takes()],
                lambda: kind([weight(3, 4)], learning_rate=0.1))
        refused(ValueError, ["empty"], lambda: kind([], **required(name)))
        [p] = parameters([(3, 4)])
        p.grad = p.detach().to_sparse()
        refused(ValueError, [kind.__name__, "sparse", "sparse=False"], make(name, [p]).step)


def test_errors_of_trees():
    """What has no modular norm, or no sense, is refused with words that lead somewhere."""
    w, x, a = optim.weight, optim.bond("x"), optim.weight(nn.Linear(4, 5))
    for kind, words, call in (
            (TypeError, ["BatchNorm1d"], lambda: w(nn.BatchNorm1d(3))), (TypeError, ["LSTM"], lambda: w(nn.LSTM(3, 4))),
            (TypeError, ["groups"], lambda: w(nn.Conv2d(4, 4, 3, groups=2))),
            (TypeError, ["MultiheadAttention", "q, k, v"], lambda: w(nn.MultiheadAttention(4, 2))),
            (TypeError, ["optim.weight"], lambda: a @ nn.ReLU()), (TypeError, ["finite number"], lambda: "3" * a),
            (ValueError, ["run the model once"], lambda: w(nn.LazyLinear(4))), (ValueError, ["same"], lambda: w()),
            (ValueError, ["same type and shape"], lambda: w(nn.Linear(4, 5), nn.Linear(5, 4))),
            (ValueError, ["mass=-1"], lambda: w(nn.Linear(7, 8), mass=-1)),
            (ValueError, ["** 0"], lambda: a ** 0), (ValueError, ["norm="], lambda: w(nn.Conv2d(3, 4, 3), norm="rows")),
            (ValueError, ["sensitivity=nan"], lambda: optim.bond("x", math.nan)),
            (ValueError, ["tare(2)"], lambda: x.tare(2)), (ValueError, ["tare(nan)"], lambda: a.tare(math.nan)),
            (ValueError, ["sensitivity 0"], lambda: a @ (0 * x) @ a), (ValueError, ["** 2 needs 2"], lambda: a ** 2),
            (ValueError, ["sensitivity 0", "last one"], lambda: (w(*linears(2)) @ optim.bond("x", 0)) ** 2)):
        refused(kind, words, call)


def zoo():
    """A model with one of everything that a model may hold."""
    model = nn.ModuleDict({
        "embedding": nn.Embedding(7, 6), "conv": nn.Conv2d(2, 4, 3), "norm": nn.LayerNorm(6), "hidden": nn.Linear(6, 5),
        "one_input": nn.Linear(1, 4), "zero_start": nn.Linear(6, 3),    # their neurons cannot turn
        "frozen": nn.Linear(6, 6).requires_grad_(False), "head": nn.Linear(6, 7, bias=False)})
    model.temperature = nn.Parameter(torch.tensor(1.0))
    model.head.weight = model.embedding.weight              # tied
    nn.init.zeros_(model.zero_start.weight)
    leaves = map(optim.weight, (model.zero_start, model.one_input, model.hidden, model.embedding, model.conv))
    zero_start, one_input, hidden, embedding, conv = leaves
    model.modular_tree = lambda: optim.bond("head") @ (zero_start, one_input @ hidden) @ (embedding, conv)
    return model


def cells(optimizer):
    """The table as {name of the parameter: the other cells of its row}."""
    _, *rows = [re.split("  +", line) for line in optim.table(optimizer).splitlines()]
    assert len({row[0] for row in rows}) == len(rows), f"a row stands twice: {rows}"
    return {row[0]: row[1:] for row in rows}


def test_build_rules():
    """build turns and decays matrices, not vectors; stuck ones take the plain rule, and table says why; tied ones count
    once, frozen ones not; names of no_decay neither decay nor turn."""
    # the matrices: why they are stuck, and their shares of 1/5, halved in front of something of sensitivity 2
    matrices = {"embedding.weight": ("", 0.1), "conv.weight": ("", 0.1), "hidden.weight": ("", 0.2),
                "one_input.weight": ("1 weight", 0.2), "zero_start.weight": ("zero", 0.2)}
    for name, no_decay in itertools.product(optim.OPTIMIZERS, ((), ("hidden.weight", "head*"))):        # a second name
        model, h, spared = zoo(), settings(name), {"hidden.weight", "embedding.weight"} if no_decay else set()
        optimizer = optim.build(name, model, no_decay=no_decay, **h)
        rows = cells(optimizer)
        trained = {label: p for label, p in model.named_parameters() if p.requires_grad}
        assert rows.keys() == trained.keys(), f"{name}: a name is missing: {rows}"
        factors = {n: g.get("lr_cov_scale") for g in optimizer.param_groups for n in g["param_names"]}
        for label, (shape, rule, lr, wd) in rows.items():
            (stuck, share), vector, what = matrices.get(label, ("", 0)), label not in matrices, f"{name} {label}"
            expected, factor = "plain", 1
            if name in ROTATIONAL and not vector and not stuck and label not in spared:
                expected = "rotational"
            if name in MODULAR and not vector:
                expected = f"modular {'rows' if label == 'embedding.weight' else 'spectral'}, share {share}"
            elif name in MODULAR:
                factor = 0.01
            if base(name) == "muon" and (vector or label == "embedding.weight"):
                factor *= h["adamw_lr_scale"]
                assert ", by adamw" in rule, f"{what}: {rule}"
            assert rule.startswith(expected) and (name not in ROTATIONAL or stuck in rule), f"{what}: {rule}"
            assert shape == ("x".join(map(str, trained[label].shape)) or "scalar"), f"{what}: {shape}"
            close(float(lr), h["lr"] * factor, 1e-5, f"{what}: lr")
            assert float(wd) == (0 if vector or label in spared else h["weight_decay"]), f"{what}: decay {wd}"
            scale = None if "lr_cov_scale" not in optimizer.defaults else 0.25 if vector else 1.0
            assert factors[label] == scale, f"{what}: lr_cov_scale"


NET = nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(5, 3)})
A, B = optim.weight(NET.a), optim.weight(NET.b)
SPOILT, SHARED = Single(4, 3), nn.Sequential(*linears(2))
SHARED[1].weight = nn.Parameter(SHARED[0].weight.data)      # the same memory, but another nn.Parameter
SPOILT.weight.data[0, 0] = math.nan
# Of whom; the model; the options of build; the error and its words.
BAD_MODELS = [
    (ALL, Single(4, 3).requires_grad_(False), {}, ValueError, ["no trainable parameters"]),
    (ALL, Single(4, 3), {"learning_rate": 0.1}, TypeError, ["learning_rate"]),
    (ALL, SHARED, {}, ValueError, ["0.weight", "1.weight", "share memory"]),
    (ALL, Single(4, 3).parameters(), {}, TypeError, ["model"]),
    (ALL, nn.DataParallel(Single(4, 3)), {}, ValueError, ["model.module"]),
    (ALL, nn.Sequential(nn.LazyLinear(4)), {}, ValueError, ["run the model once first"]),
    (ALL, Single(4, 3), {"no_decay": ["wieght"]}, ValueError, ["'wieght'"]),
    (ROOTLESS, Single(4, 3), {"batch_size": None}, ValueError, ["batch_size=None", "examples"]),
    (ROTATIONAL, Single(4, 3), {"weight_decay": 0.0}, ValueError, ["weight_decay=0"]),
    (ROTATIONAL, Single(4, 3), {"rotational": False}, ValueError, ["rotational", "no_decay="]),
    (MODULAR, Single(4, 3), {"share": 0.5}, ValueError, ["share", "tree="]),
    (ROTATIONAL, SPOILT, {}, ValueError, ["weight", "NaN"]),
    (MODULAR, Single(4, 3), {"lr": "0.1"}, ValueError, ["lr='0.1'"]),
    *((MODULAR, model, {"tree": tree}, ValueError, words) for model, tree, words in (
        (nn.utils.parametrizations.weight_norm(Single(4, 3)), None, ["computed", "weight_norm"]),
        (NET, A, ["b.weight", "(3, 5)", "not in the modular tree"]), (NET, B @ A @ A, ["a.weight", "twice"]),
        (NET, A @ optim.weight(nn.Linear(7, 8)), ["Linear 8x7", "not in the model"]),
        (NET, None, ["ModuleDict has no method modular_tree()", "tree="]),
        (nn.ModuleDict({"module": NET}), None, ["module"]),
        (NET, optim.weight(NET.b, nn.Linear(5, 3)), ["2 layers", "**"]),
        (nn.ModuleDict({"att": nn.MultiheadAttention(4, 2)}), optim.bond("x"), ["att.in_proj_weight", "q, k, v"])))]


def test_build_of_odd_models():
    """A model that build cannot use is refused with what to give instead. Several parameters without numbers are not
    taken for shared memory; options decide who can turn; a frozen weight is nobody's business."""
    empty = nn.ParameterDict({name: torch.zeros(shape) for name, shape in (("a", (0,)), ("b", (0, 4)), ("c", (2,)))})
    for name in optim.OPTIMIZERS:
        for who, model, options, error, words in BAD_MODELS:
            if name in who:
                refused(error, words, lambda: optim.build(name, model, **required(name) | options))
        if name not in MODULAR:
            optim.build(name, empty, **settings(name))
    for typo, meant in {"rotational_adam_w": "rotational_adamw", "Lion": "lion"}.items():
        refused(ValueError, [repr(typo), f"did you mean {meant!r}"], lambda: optim.build(typo, Single(4, 3)))
    for zero_mean, rule in ((True, "plain"), (False, "rotational")):            # two weights to a neuron: a circle
        rows = cells(optim.build("rotational_sgd", Single(2, 3), zero_mean=zero_mean))
        assert rows["weight"][1].startswith(rule), rows
    model = nn.Sequential(*linears(2))                      # alike but for their masses
    tree = optim.weight(model[1], mass=3) @ optim.weight(model[0])
    for expected in ([0.25, 0.75], [0.25]):                 # the second time one of them is frozen
        groups = optim.build("modular_adam", model, tree=tree).param_groups
        close([group["share"] for group in groups], expected, 1e-12, "shares")
        model[1].weight.requires_grad_(False)
    compiled = torch.compile(nn.Sequential(nn.EmbeddingBag(7, 6)))
    rows = cells(optim.build("muon", compiled, no_decay=[name for name, _ in compiled.named_parameters()]))
    assert rows["0.weight"][1::2] == ["plain, by adamw", "0"], rows


def test_table_of_any_optimizer():
    """table lists the parameters of any torch optimizer, with names or without, each once, by group and place."""
    for kind in (optim.SGD, torch.optim.SGD, torch.optim.Rprop):                # the last has no decay
        rows = cells(kind([{"params": [weight(3, 4), weight(4)]}, {"params": [weight(2, 5)], "lr": 0.5}]))
        assert list(rows) == [f"parameter {place}" for place in ("0 of group 0", "1 of group 0", "0 of group 1")], rows
        assert rows["parameter 0 of group 1"][:3] == ["2x5", "plain", "0.5"], f"{kind}: {rows}"
    rows = cells(torch.optim.SGD([("head.weight", weight(3, 4))], lr=torch.tensor([0.5])))
    assert rows == {"head.weight": ["3x4", "plain", "0.5", "0"]}, rows
    optimizer = optim.SGD([("head.weight", weight(3, 4))])
    optimizer.param_groups[0]["params"].append(weight(2, 2))
    assert list(cells(optimizer)) == ["head.weight", "parameter 1 of group 0"], "one that was put in by hand"


# ---- RotationProbe: what it measures and predicts. The lesson, and a row of one's own --------------------------------


def probed(optimizer, gradients):
    """One measured step -> the probe."""
    probe = optim.RotationProbe(optimizer)
    probe.measure_next_step()
    run(optimizer, [gradients])
    return probe


def test_probe_measures():
    """The probe's norm and angle equal float64 numbers by hand, down to 1e-5 rad in float32, of neurons, or of whole
    tensors under per_neuron=False. What has no gradient, number or neuron has no row; a zero neuron is left out of the
    mean angle; half a turn is pi; a step that it is not asked about is not measured."""
    shapes, whole = [(5, 24), (4, 3, 3, 3), (6,), (0, 4), (3, 0), (2, 7)], {"per_neuron": False}
    for (name, options), dtype in itertools.product(
            [("sgd", {}), ("rotational_adamw", {}), ("rotational_adamw", whole)], FLOATS[:3]):
        params, gradients, per_neuron = parameters(shapes, dtype), noise(shapes, 3, dtype), not options
        for x in (params[0].data, *(step[0] for step in gradients)) if name == "sgd" else ():
            x[1] = 0                                        # a zero neuron, which cannot turn
        optimizer = make(name, params, **options)
        run(optimizer, gradients[:2])
        starts = values(params)
        rows = probed(optimizer, gradients[2][:-1] + [None]).rows
        assert [row["name"] for row in rows] == ["parameter 0 of group 0", "parameter 1 of group 0"], f"{name}: {rows}"
        for row, p, start in zip(rows, params, starts):     # below float64, they are measured in float32
            what, fine = f"{name} {options} {dtype}", dtype == torch.float64
            close(row["norm"], rows_of(p, per_neuron).double().norm(dim=1).mean(), 1e-12 if fine else 1e-6, what)
            close(row["angle"], angles(start, p, per_neuron).nanmean(), 1e-9 if fine else 1e-4, what)
    [p] = parameters([(64, 256)], torch.float32)            # tiny angles: set them by lr * wd = 1e-10 / 2
    optimizer = optim.RotationalSGD([p], lr=1e-9, momentum=0.0, weight_decay=0.05)
    start, [row] = p.detach().clone(), probed(optimizer, noise([(64, 256)], 1, torch.float32)[0]).rows
    close([row["angle"]] * 2, [angles(start, p).mean(), 1e-5], 1e-2, "a tiny angle, as moved, as meant")
    [w] = parameters([(200, 7)])
    optimizer = torch.optim.SGD([w], lr=1.0)
    probe = probed(optimizer, [2 * w.detach()])
    run(optimizer, [[w.detach() / 2]])
    close(probe.rows[0]["angle"], math.pi, 1e-6, "half a turn, and not what came after it")
    w = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    assert not probed(torch.optim.SGD([w], lr=0.1), [torch.ones_like(w)]).rows, "complex neurons have no angle here"


def test_probe_predicts():
    """The probe predicts what `equilibrium` says of the layer, also of torch's optimizers, and how many steps it takes;
    kept norm and set angle where rotational; nan without decay or theory (Nesterov, AMSGrad, .., modular)."""
    gradient, torchs, nothing = normal(3, 5, 24), torch.optim, (math.nan, math.nan)
    gradient *= 0.3 / gradient.square().mean().sqrt()
    h, adamw = {"lr": 0.02, "weight_decay": 0.2}, settings("adamw")

    def theory(name, own):
        return optim.equilibrium(optim.DIRECTIONS[name], optim.OPTIMIZERS[name].takes() | own, 24, 0.3, (5, 24))

    by_torch = h | {"momentum": 0.8}
    cases = [(torchs.Muon, by_torch, theory("muon", by_torch)),
             (torchs.Adam, adamw | {"decoupled_weight_decay": True}, theory("adamw", adamw))]
    for name in DIRECTIONS:
        own = settings(name)
        if name != "muon":                                  # whose walk alone says what its equilibrium is
            np.testing.assert_allclose(theory(name, own), settled_by_hand(name, own, 24, 0.3), err_msg=name, rtol=1e-12)
        cases += [(optim.OPTIMIZERS[name], own, theory(name, own)),
                  (optim.OPTIMIZERS[f"rotational_{name}"], own, (None, math.atan(angle_by_hand(name, own))))]
        if name in TORCH_TWINS:
            cases += [(TORCH_TWINS[name], own, theory(name, own))]
    cases += [(kind, h | options, nothing) for kind, options in (
        (torchs.SGD, {"momentum": 0.9, "nesterov": True}), (torchs.SGD, {"momentum": 0.9, "dampening": 0.5}),
        (torchs.SGD, {"maximize": True}), (torchs.AdamW, {"amsgrad": True}), (torchs.RMSprop, {"centered": True}),
        (torchs.Adagrad, {}), (optim.ModularAdam, {}), (optim.SGD, {"weight_decay": 0.0}), (optim.SGD, {"lr": 0.0}))]
    for kind, options, (norm, angle) in cases:
        [p] = parameters([(5, 24)])
        optimizer = kind([("w", p)], **options)
        kept, probe = p.norm(dim=1).mean().item(), probed(optimizer, [gradient])
        found = [probe.rows[0][key] for key in ("predicted_norm", "predicted_angle")]
        np.testing.assert_allclose(found, [kept if norm is None else norm, angle], err_msg=f"{kind} {options}",
                                   rtol=1e-12)              # nan equals nan
        if kind is optim.AdamW:
            assert "125" in str(probe).splitlines()[-1], f"1 / (2 lr wd) = 125 steps are not in {probe}"


def test_lesson():
    """python optim.py prints every optimizer and walk in 80 columns: sgd has one angle for all sizes of the gradient,
    adam has not, and what is off is measured over predicted. --plot draws angles and norms of adam + L2 and of adamw,
    predictions dashed."""
    walk, traces = optim.walk, {}
    small = unittest.mock.patch.multiple(
        optim, NEURONS=4, state_bytes=lambda _: 0.0,
        walk=lambda name, h, sigmas, steps: traces.setdefault(name, walk(name, h, sigmas, 40)))
    with temporary_folder() as folder, small:
        plot = ["--plot", folder / "walk.png"] if importlib.util.find_spec("matplotlib") else []
        status, out, err = call_main(optim, *plot)
    lines = [line for line in out.splitlines() if "picture: " not in line]
    assert status == 0 and not err and max(map(len, lines)) <= 80, out + err
    table = [line.split()[0] for line in lines if re.match(r"\w+ +0[.]0 ", line)]
    assert table == list(optim.OPTIMIZERS), out
    rows = [line.replace("adam + L2", "adam").split() for line in lines if re.search("[+-][0-9.]+%", line)]
    for name, sigma, *numbers in rows:
        for predicted, measured, off in (numbers[:3], numbers[3:]):
            close(1 + float(off[:-1]) / 100, float(measured) / float(predicted), 0.01, f"{name}: off")
    predicted = {(name, sigma): float(angle) for name, sigma, _, _, _, angle, *_ in rows}
    assert {name for name, _ in predicted} == {*DIRECTIONS, "exact"} - {"shampoo"}, out
    assert predicted["sgd", "0.5"] == predicted["sgd", "2"], out
    close(predicted["adam", "0.5"] / predicted["adam", "2"], 2, 0.01, "adam's angles over sizes")
    if plot:
        from matplotlib import pyplot
        for axes, (column, name) in zip(pyplot.gcf().axes, itertools.product((2, 1), ("adam", "adamw")), strict=True):
            drawn = [([*line.get_ydata()], line.get_linestyle()) for line in axes.lines]
            for trace, target in traces[name].values():     # angles above, norms below
                assert [row[column] for row in trace] in [y for y, _ in drawn], drawn
                assert ([target[column - 1]] * 2, "--") in drawn, drawn
        pyplot.close("all")


def test_walks_of_ones_own():
    """--walk prints, for three sizes of the gradient, what is predicted and measured, within 3 %; what it cannot walk
    is refused in one line, as are flags, names and files that are none."""
    out = succeed(optim, "--walk", "adamw", "lr=0.01", "weight_decay=0.5", "betas=(0.8,0.99)")
    angle = angle_by_hand("adamw", {"lr": 0.01, "weight_decay": 0.5, "betas": (0.8, 0.99)})
    norm = math.sqrt(0.01 * optim.C / (2 * 0.5))
    rows = [line.split() for line in out.splitlines() if "%" in line]
    assert [row[:2] for row in rows] == [["adamw", "0.5"], ["adamw", "1"], ["adamw", "2"]], out
    for _, _, *numbers in rows:
        numbers = [float(x) for x in numbers if "%" not in x]
        close(np.divide(numbers, [norm, norm, angle, angle]), np.ones(4), 0.03, "predicted and measured")
    with temporary_folder() as folder:
        for arguments, words, found in (
                ("--walk adamww", "adamw", None), ("--walk adamw rr=0.1", "rr", None),
                ("--walk adamw lr=-1", "lr=-1", None), ("--walk adamw lr", "lr", None),
                ("--walk adamw weight_decay=0", "weight_decay", None), ("--benchh", "unrecognized", None),
                ("--bench rotational_lyon", "did you mean 'rotational_lion'", None),
                ("--bench sgd --plot a.png", "leave out --bench", None),
                ("--plot a.png", "--plot needs matplotlib", None), ("--plot .", "name a file", True),
                ("--plot none/walk.png", "in a folder that is there", True)):
            with unittest.mock.patch("importlib.util.find_spec", lambda name: found):
                check_refused(optim, folder, arguments.split(), words)


def test_bench_of_steps():
    """--bench prints the time of a step and how many times that of the reference it is, eager and compiled, over whole
    rounds where steps differ."""
    ticks = itertools.count()                               # one passes in each measurement: here of 2 steps, or of 1
    small = parameters([(9, 4), (5, 4), (4, 4), (4,)], torch.float32)
    for p in small:
        p.grad = torch.ones_like(p)
    with unittest.mock.patch.multiple(optim, gpt2_parameters=lambda *_: small, update_compiled=optim.update), \
            unittest.mock.patch("optim.time.perf_counter", lambda: next(ticks) / 1e3):
        out = succeed(optim, "--bench", "adamw", "shampoo")
    assert re.search("adamw +8.0 B/weight +1.0 ms  1.00x +1.0 ms  1.00x", out), out
    assert re.search("shampoo +20.0 B/weight +0.5 ms  0.50x +0.5 ms  0.50x", out), out


def snippets():
    """The python code of README."""
    readme = pathlib.Path(__file__).with_name("README.md").read_text()
    return re.findall(r"```python\n(.*?)```", readme, re.S)


def test_readme_snippets():
    """README's snippets run as pasted, behind a model and a loss of one's own: the probe's text has the layer's names,
    and the modular network turns inputs of RMS 1 into outputs of no more."""
    first, second, *_ = snippets()
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), normal(0, 16, 8, dtype=torch.float32)
    loss = types.SimpleNamespace(backward=lambda: model(x).square().mean().backward())
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(first, {"model": model, "loss": loss})
        exec(second, own := {"nn": nn, "optim": optim})
    assert out.getvalue().count("2.weight") == 2 and "share" in out.getvalue(), out.getvalue()
    x = normal(1, 64, 784, dtype=torch.float32)
    y = own["model"](x / x.square().mean(1, keepdim=True).sqrt())
    assert y.square().mean().sqrt() < 1 and type(own["optimizer"]) is optim.ModularAdam


ROWS = """
@row
class normalised_sgd(Direction):
    defaults = {"lr": 0.1, "weight_decay": 0.0}
    update = lambda self, g, state, h, decay=0: g / g.norm() + decay

@row
class unranged(normalised_sgd):
    defaults = {"lr": 0.1, "weight_decay": 0.0, "strength": 1.0}
"""


def test_rows_of_ones_own():
    """The rows in README's recipe, pasted into a copy of optim.py, work under all three geometries: Signum has its
    kappa in closed form, and turns by it. The defaults are safe: normalised SGD, which says nothing of its kappa,
    refuses to rotate, predicts no norm, is not cut into blocks or shown by the lesson; no range is refused."""
    rows = "\n\n\n".join(re.findall(r"^@row\nclass .*?(?=\n\S|\Z)", "\n".join(snippets()), re.S | re.M))
    source, mine = pathlib.Path(optim.__file__).read_text(), types.ModuleType("optim_with_rows")
    before, lion, after = source.partition("@row\nclass lion(")
    sys.modules[mine.__name__] = mine                       # where dataclass looks for its module
    with unittest.mock.patch(f"{__name__}.optim", mine):
        exec(compile(f"{before}{rows}\n{ROWS}\n\n{lion}{after}", mine.__name__, "exec"), vars(mine))
        signum, h = mine.DIRECTIONS["signum"], {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.2}
        kappa = math.sqrt(math.pi / 2 * (0.2**2 / (1 - 0.8**2)))
        close(signum.kappa(h), kappa, 1e-9, "kappa of Signum")
        [w] = parameters([(5, 24)])
        start = w.detach() - w.detach().mean(dim=1, keepdim=True)
        run(mine.OPTIMIZERS["rotational_signum"]([w], rotational_eps=0.0, **h), noise([(5, 24)], 1))
        close(angles(start, w), [math.atan(kappa * math.sqrt(2 * 0.002))] * 5, 1e-9, "the angle of its first step")
        for name in mine.OPTIMIZERS:                        # the tables of settings above know what to do
            [w], [other] = parameters([(50, 8)]), parameters([(50, 8)])
            if name == "rotational_normalised_sgd" or "unranged" in name:
                words = ["strength", "ranges"] if "unranged" in name else ["kappa", "normalised_sgd"]
                refused(ValueError, words, lambda: make(name, [w]))
                continue
            run(make(name, [w]), noise([(50, 8)], 2))
            with in_blocks(45):
                run(make(name, [other]), noise([(50, 8)], 2))
            same_bits([w], [other], f"{name} in blocks")
        norm, _ = mine.equilibrium(mine.DIRECTIONS["normalised_sgd"], h, 256, 1.0)
        assert math.isnan(norm), "a norm without a contribution"
        listed = mine.working()
        assert "rotational_signum" in listed and "rotational_normalised_sgd" not in listed, "the lesson leaves it out"


# ---- Helpers for the scripts -----------------------------------------------------------------------------------------

SCRIPTS = (nanogpt_train, cifar_train, translate_train)


def command_line(script, arguments):
    """argv of a script, which is its module. A sweep computes nothing, but its runs do, with flags of their own."""
    device = () if script in (sweep, optim) else ("--device", "cpu")
    return [script.__file__, *device, *map(str, arguments)]


def start_script(script, folder, *arguments, launcher=()):
    """Start it in a folder of its own. One thread: small models gain nothing from two, and two runs at a time then
    share the machine instead of fighting over it."""
    return subprocess.Popen([sys.executable, *launcher, *command_line(script, arguments)], cwd=folder,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}, encoding="utf-8",
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_script(script, folder, *arguments, status=0, launcher=()):
    """Run it to its end -> (stdout, stderr); the exit status must be the expected one."""
    process = start_script(script, folder, *arguments, launcher=launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}, not {status}:\n{out[-2000:]}\n{err}"
    return out, err


def call_main(script, *arguments):
    """script.main() in this process, with one thread and our handlers of signals -> (exit status, stdout, stderr).
    Faster than a new process."""
    stdout, stderr, threads, status = io.StringIO(), io.StringIO(), torch.get_num_threads(), 0
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), \
                unittest.mock.patch.object(signal, "signal"), \
                unittest.mock.patch.object(sys, "argv", command_line(script, arguments)):
            script.main()
    except SystemExit as stop:
        status = stop.code
    finally:
        torch.set_num_threads(threads)
    return status, stdout.getvalue(), stderr.getvalue()


def succeed(script, *arguments):
    """call_main, which must end well -> stdout."""
    status, out, err = call_main(script, *arguments)
    assert status == 0, f"{script.__name__} {arguments}: status {status}, {err}"
    return out


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def read_log(folder):
    """log.jsonl without the times, which differ between two runs of the same numbers."""
    return [{key: x for key, x in record.items() if not key.endswith("seconds")} for record in records(folder)]


def checkpoint(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def tensors_of(ckpt):
    """Of the model and the optimizer."""
    return list(filter(torch.is_tensor, torch.utils._pytree.tree_leaves([ckpt["model"], ckpt["optimizer"]])))


def same_run(one, other):
    """Two folders hold the same weights, the same state of the optimizer and the same log, bit for bit."""
    left, right = checkpoint(one), checkpoint(other)
    assert str([left["model"].keys(), left["optimizer"]]) == str([right["model"].keys(), right["optimizer"]]), other
    same_bits(tensors_of(left), tensors_of(right), other)
    assert read_log(one) == read_log(other), f"{other}: another log"
    for name in ("hypotheses.en", "bpe.json"):
        found = [path.read_bytes() if path.exists() else None for path in (one / name, other / name)]
        assert found[0] == found[1], f"{other}: another {name}"


FORKS = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else None
if FORKS:                                           # it imports once what takes seconds; from there on it forks
    FORKS.set_forkserver_preload(["torch._dynamo", "sweep", *(script.__name__ for script in SCRIPTS)])


def run_fork(script, folder, *arguments, status=(0,), meanwhile=None, **fate):
    """run_script in a process forked from one that has imported torch already, with one of these exit statuses. It
    writes to stdout.txt and stderr.txt in the folder. meanwhile(process): what is done after its start."""
    if not FORKS:
        raise unittest.SkipTest("needs fork and signals, which this system does not have")
    process = FORKS.Process(target=in_fork, args=(command_line(script, arguments), folder), kwargs=fate, daemon=True)
    process.start()
    if meanwhile:
        meanwhile(process)
    process.join(timeout=300)
    out, err = ((folder / name).read_text() for name in ("stdout.txt", "stderr.txt"))
    assert process.exitcode in status, f"status {process.exitcode}, not {status}:\n{out[-2000:]}\n{err[-2000:]}"
    return out, err


def in_fork(argv, folder, event=None, number=1, act=None, file_size=None, mortal=False, out="stdout.txt"):
    """event, number, act: the n-th time that a file in the folder is opened, renamed or removed ("file"), a step of the
    optimizer begins ("step") or the model evaluates a batch ("evaluation"), a signal comes, an exception is raised or
    some of a gradient becomes infinite ("inf"). file_size: no file can grow beyond that, as if the disk were full;
    if mortal, trying to is death, in the middle of the write. out: where standard output goes; "closed": a pipe that
    nobody reads."""
    os.chdir(folder)
    read, write = os.pipe()
    for to, name in ((1, out), (2, "stderr.txt")):
        os.dup2(write if name == "closed" else os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), to)
    os.close(read), os.close(write)
    sys.stdout, sys.stderr = (open(to, "w", closefd=False) for to in (1, 2))        # not those of a tty or file
    tqdm.tqdm.set_lock(threading.RLock())           # its own is for several processes, and would outlive a killed one
    torch.set_num_threads(1)
    home, count = os.getcwd(), itertools.count(1)

    def happen(optimizer=None, *_):
        n = next(count)
        assert event != "evaluation" or n <= number, "it goes on with its evaluation after the signal"
        if n == number and isinstance(act, Exception):
            raise act
        if n == number and act == "inf":
            optimizer.param_groups[0]["params"][0].grad[..., 0] = math.inf
        elif n == number:
            os.kill(os.getpid(), act)

    def on_file(kind, args):
        if kind in ("open", "os.rename", "os.remove") and os.path.abspath(str(args[0])).startswith(home):
            happen()

    def on_pass(module, _):
        if hasattr(module, "head") and not module.training:
            happen()
    if event == "file":
        sys.addaudithook(on_file)
    if event == "step":
        register_optimizer_step_pre_hook(happen)
    if event == "evaluation":
        nn.modules.module.register_module_forward_pre_hook(on_pass)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))        # the signal would leave a core file
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if mortal else signal.SIG_IGN)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def check_refused(script, folder, arguments, words):
    """Status 2, one line on stderr with these words, and no folder/never left behind."""
    status, out, err = call_main(script, *arguments)
    TALLY["bad inputs tried"] += 1
    assert status == 2, f"{arguments}: status {status}, {out[-500:]}{err}"
    assert words in err and len(err.strip().splitlines()) == 1, f"{arguments}: {err}"
    assert err.startswith(f"{pathlib.Path(script.__file__).name}: ") and "Traceback" not in err, f"{arguments}: {err}"
    assert not (folder / "never").exists(), f"{arguments} left a folder behind"


@contextlib.contextmanager
def temporary_folder():
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)


# Flags of small runs.
TINY = ("--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --dropout 0.1 --steps 24 --warmup 2 "
        "--eval_every 8 --save_every 6 --eval_batches 2").split()
CIFAR_TINY = "--width 4 --batch_size 20 --steps 24 --warmup 3 --eval_every 8 --save_every 6".split()
TINY_TRANSLATE = ("--n_layer 1 --n_head 2 --n_embd 16 --n_ffn 32 --vocab 300 --max_tokens 200 --dropout 0.1 --steps 24 "
                  "--warmup 2 --eval_every 8 --save_every 6 --beam 2").split()


def cifar_folder(folder, n_train=100, n_test=40):
    """Noise with a redness that tells the class, in the official layout of CIFAR-10, in folder/bins -> train images and
    labels, test images and labels."""
    (folder / "bins").mkdir(exist_ok=True)
    rng, sets = np.random.default_rng(5), []
    for names, n in (([f"data_batch_{i}.bin" for i in range(1, 6)], n_train), (["test_batch.bin"], n_test)):
        images, labels = rng.integers(0, 60, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10
        images[..., 0] += 20 * labels[:, None, None].astype(np.uint8)
        records = np.hstack([labels[:, None].astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(n, -1)])
        for name, part in zip(names, np.array_split(records, len(names))):
            (folder / "bins" / name).write_bytes(part.tobytes())        # a label; planes of red, green and blue
        sets += [images, labels]
    return sets


def write_corpus(folder, train=200, zipped=False):
    """Number words, train, val and test, in PREFIX.de and PREFIX.en or their .gz -> {part: [(German, English), ..]}."""
    folder.mkdir(exist_ok=True)
    numbers = iter(random.Random(0).sample(range(10_000), train + 35))
    pairs = {part: [(translate_train.german(n), translate_train.english(n)) for n in itertools.islice(numbers, count)]
             for part, count in (("train", train), ("valid", 20), ("test", 15))}
    for part, (i, language) in itertools.product(pairs, enumerate(("de", "en"))):
        data = "".join(f"{pair[i]}\n" for pair in pairs[part]).encode()
        (folder / f"{part}.{language}{'.gz' * zipped}").write_bytes(gzip.compress(data) if zipped else data)
    return pairs


def tiny(script, folder, model=("resmlp", "--depth", "1")):
    """Flags of a run of 24 steps, on data that is made in the folder."""
    if script is nanogpt_train:
        return [*TINY, "--data_dir", folder / "data"]
    if script is cifar_train:
        cifar_folder(folder)
        return [*CIFAR_TINY, "--data", folder / "bins", "--model", *model]
    write_corpus(folder / "corpus")
    return [*TINY_TRANSLATE, "--data", folder / "corpus", "--data_dir", folder / "data"]


def flags_of(**settings):
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


# ---- The life of a run -----------------------------------------------------------------------------------------------

# The fates of a run, one after the other: the fate (arguments of in_fork), the exit status, words of the last line, the
# step of the checkpoint afterwards.
LIFE = (
    (dict(event="step", number=5, act=signal.SIGINT), 130, "stopped after step 5", 5),
    (dict(event="step", act=RuntimeError("a bug")), 1, "RuntimeError: a bug", 5),
    (dict(event="step", act=MemoryError()), 2, "out of memory: make", 5),
    (dict(event="step", number=7, act="inf"), 3, "diverged", 10),           # in step 12, which is logged, too
    (dict(file_size=9000), 2, "cannot write", 10),                          # a full disk
    (dict(event="evaluation", act=signal.SIGTERM), 143, "stopped after step 30", 30),
)


def survive(script, folder, model, opt, seed):
    """A run that suffers LIFE, is killed KILLS times and resumed each time ends with the bits of one left alone. Of
    every three kills one is at a random file operation, one in the middle of a write, one at any time."""
    chance, run, killed = random.Random(seed), folder / "it's a run", (-signal.SIGKILL,)
    flags = [*tiny(script, folder, model),
             *flags_of(opt=opt, steps=30 + 18 * KILLS, warmup=20 + 10 * KILLS, eval_every=30, save_every=2, track=12)]
    if script is cifar_train:
        cifar_folder(folder, 100, 1100)             # evaluated in two batches
    run_fork(script, folder, *flags, "--out_dir", "calm")
    size, command = (folder / "calm/ckpt.pt").stat().st_size, [*flags, "--out_dir", run.name]
    shutil.rmtree(folder / "data", ignore_errors=True)
    for moment in (5, 9):                           # killed while it makes its data files
        run_fork(script, folder, *command, status=killed, event="file", number=moment, act=signal.SIGKILL)
    for fate, status, words, done in LIFE:
        before = (run / "ckpt.pt").read_bytes() if (run / "ckpt.pt").exists() else b""
        out, err = run_fork(script, folder, *command, status=(status,), **fate)
        stopped = status > 128                      # by a signal
        said = (out if stopped else err).strip().splitlines()[-1]
        assert words in said and (status == 1) == ("Traceback" in err), f"{fate}: {out}{err}"
        assert not list(run.glob("*.part")), f"{fate} leaves {os.listdir(run)}"
        assert checkpoint(run)["step"] == done, f"{fate}: {checkpoint(run)['step']}"
        assert all(x.isfinite().all() for x in tensors_of(checkpoint(run))), f"{fate}: what is not finite was saved"
        assert "file_size" not in fate or (run / "ckpt.pt").read_bytes() == before
        command = [*flags, "--out_dir", run.name, "--resume"]
        if stopped:                                 # as somebody would paste it
            command = shlex.split(said.partition("To go on: ")[2])[2:]

    def kill_after_a_checkpoint(process):
        changed = (run / "ckpt.pt").stat().st_mtime_ns
        while process.is_alive() and (run / "ckpt.pt").stat().st_mtime_ns == changed:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
    for i in range(KILLS):
        fate = ({"event": "file", "number": chance.randint(1, 30), "act": signal.SIGKILL},
                {"file_size": chance.randint(1, size - 1), "mortal": True, "status": (-signal.SIGXFSZ,)},
                {"meanwhile": kill_after_a_checkpoint})[i % 3]
        run_fork(script, folder, *command, **{"status": killed} | fate)
        TALLY["kills survived"] += 1
    for command in (command, ["--resume", "--out_dir", run.name]):      # the second time nothing is left to do
        run_fork(script, folder, *command)
        same_run(folder / "calm", run)
    assert not list(folder.rglob("*.part"))
    seconds = [record["seconds"] for record in records(run) if "seconds" in record]
    assert seconds == sorted(seconds), "the clock goes on where it was"
    for out, status in (("closed", (0, 1)), ("/dev/full", (2,))):       # `script | head`, and a full disk
        _, err = run_fork(script, folder, *command, status=status, out=out)
        assert not re.search("Traceback|BrokenPipe|Exception", err), (out, err)
        assert out == "closed" or "No space left" in err, err


def test_nanogpt_survives():
    """nanogpt_train.py: Ctrl-C, SIGTERM, Inf, a full disk and kills at any moment cost no bit of the result."""
    with temporary_folder() as folder:
        survive(nanogpt_train, folder, (), "if_shampoo", 0)


def test_cifar_survives():
    """cifar_train.py: the same, with the statistics of batch normalisation."""
    with temporary_folder() as folder:
        survive(cifar_train, folder, "vgg16 --width 2 --batch_size 4".split(), "rotational_lion", 1)


def test_translate_survives():
    """translate_train.py: the same, and its translations of the test set."""
    with temporary_folder() as folder:
        survive(translate_train, folder, (), "modular_adam", 2)


def test_nanogpt_data_parallel():
    """Two processes with half a batch each see the same losses as one process with the whole batch, one line a step;
    each refuses bad input by itself, before it would wait for the others."""
    with temporary_folder() as folder:
        common = tiny(nanogpt_train, folder) + flags_of(dropout=0, batch_size=2, grad_accum=3, opt="rotational_adamw")
        succeed(nanogpt_train, *common, "--out_dir", folder / "one")
        launcher = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
        out, _ = run_script(nanogpt_train, folder, *common, "--out_dir", "two", launcher=launcher)
        steps = re.findall(r"^step +(\d+)", out, re.M)
        assert steps and len(steps) == len(set(steps)), f"every process prints its own: {out}"
        for one, two in zip(read_log(folder / "one"), read_log(folder / "two"), strict=True):
            for key in one.keys() & {"train_loss", "val_loss"}:
                assert abs(one[key] - two[key]) < 1e-4, (key, one, two)
        with unittest.mock.patch.multiple(nanogpt_train, RANK=1, WORLD=2):
            for flags, words in ((["--data", folder / "none.txt"], "no such"), (["--batch_size", 3], "multiple"),
                                 (["--bench"], "one process")):
                check_refused(nanogpt_train, folder, [*common, *flags, "--out_dir", folder / "never"], words)


def test_scripts_replace_and_go_on():
    """A longer run goes on in the log, with one last line, to the --steps or --epochs it was last told; --resume
    alone gives the result again; the old checkpoint is gone before a new run's first. --bench writes nothing. A loss
    that is no number ends a run with status 3 at most ten steps later; the last good checkpoint stays."""
    with temporary_folder() as folder:
        for script in SCRIPTS:
            run = folder / script.__name__
            flags, last_line = [*tiny(script, folder), "--out_dir", run], re.compile(r"\n(.*?)(,| \(beam| after ).*\n$")
            out = succeed(script, *flags, "--bench")
            assert re.search(r"[\d,]+ (English )?(tokens|images)/s.*data.*forward", out) and not run.exists(), out
            result = last_line.search(succeed(script, *flags))[1]
            assert last_line.search(succeed(script, "--resume", "--out_dir", run))[1] == result, result
            before = [record for record in records(run) if record["step"] < 24]
            succeed(script, "--resume", "--steps", 48, "--out_dir", run)
            after = records(run)
            assert after[:len(before)] == before, script.__name__
            assert [r["step"] for r in after if "bleu" not in r] == list(range(0, 49, 8))
            assert [r.get("final", False) for r in after] == [False] * (len(after) - 1) + [True]
            with unittest.mock.patch.object(script, "evaluate", side_effect=KeyboardInterrupt):
                refused(KeyboardInterrupt, [], lambda: call_main(script, *flags, "--steps", 48))
            assert not (run / "ckpt.pt").exists(), "an older run's would be taken for this one's"
            assert not (run / "hypotheses.en").exists(), "nor its translations"
            status, _, err = call_main(script, *flags, *flags_of(
                opt="sgd", lr=1e25, warmup=0, grad_clip=0, save_every=24, eval_every=24))
            assert status == 3 and re.search(r"step 1?1\b.*diverged.*--lr.*ckpt\.pt$", err.strip()), err
            assert "Traceback" not in err and checkpoint(run)["step"] == 0, script.__name__
        run, flags = folder / "epochs", re.sub("--(steps|warmup) ([^ ]+) ", "", " ".join(CIFAR_TINY)).split()
        succeed(cifar_train, *flags, *flags_of(
            data=folder / "bins", model="resmlp", depth=1, opt="rf_rmsprop", track=0, epochs=1, out_dir=run))
        s = config(run)
        for more, steps in (("", s.steps), (f"--steps {s.steps + 3}", s.steps + 3), ("", s.steps + 3),
                            ("--epochs 2", 2 * s.steps), ("", 2 * s.steps)):
            succeed(cifar_train, "--resume", "--out_dir", run, *more.split())
            assert read_log(run)[-1]["step"] == config(run).steps == steps, more


def test_scripts_compile_and_bfloat16():
    """A checkpoint of a wrapped model (--compile, whose compiler is switched off here) is resumed without the wrapper
    and the other way round, with the same numbers; another seed gives others. bfloat16 losses are near, and others."""
    runs = itertools.count()
    with temporary_folder() as folder, torch.compiler.set_stance("force_eager"):
        for script in SCRIPTS:
            def log_of(first, then, seed=1, opt="adamw", dtype="float32"):
                run = folder / f"run{next(runs)}"
                succeed(script, *tiny(script, folder), *flags_of(
                    opt=opt, compile=first, seed=seed, dtype=dtype, steps=12, out_dir=run))
                succeed(script, "--resume", "--out_dir", run, *flags_of(steps=24, compile=then))
                return read_log(run)
            assert log_of(0, 1) == log_of(1, 0) != log_of(0, 1, seed=2), script.__name__
            for opt in ("rotational_adamw", "modular_adam"):
                losses = [log[-1].get("val_loss", log[-1].get("test_loss")) for log in (
                    log_of(0, 0, opt=opt, dtype=dtype) for dtype in ("float32", "bfloat16"))]
                assert 0 < abs(losses[1] - losses[0]) < 0.3, f"{script.__name__}, {opt}: {losses}"


# ---- Bad input: exit status 2, one line that names the mend, no traceback, nothing written ---------------------------

# Initials of the scripts: flags, or several of them; what the line must hold. @ is a folder with FILES, a finished
# run, @/run, and one whose data changed afterwards, @/elsewhere. The flags come after those of a small run; with
# --resume or --translate they stand alone.
BAD = {
    "NCT": (
        ("--lr -1; --lr nan; --eps inf; --grad_clip -1", "[0, inf)"), ("--lr fast", "invalid float"),
        ("--beta1 1; --beta2 nan; --opt sgd --momentum 2", "[0, 1)"), ("--track -1; --seed -1", "[0, "),
        ("--save_every 0; --steps 0", "[1, "), ("--steps 1.5", "invalid int"),
        ("--schedule exp; --preset gpt3; --compile 2", "invalid choice"), ("--opt Adamw", "did you mean 'adamw'?"),
        ("--optt adam", "did you mean --opt?"), ("--learning_rate 1", "did you mean --lr?"),
        ("--opt if_shampoo --opt_kwargs damping=-1", "damping"), ("--opt_kwargs dtype=float", "dtype"),
        ("--opt_kwargs eps={1}", "eps"), ("--opt_kwargs lr", "KEY=VALUE"), ("--opt sgd --beta1 0.9", "takes no beta1"),
        ("--opt_kwargs betas=(0.5,0.6)", "--beta1"), ("--opt_kwargs per_neuron=True", "takes no per_neuron"),
        ("--lr 1 --opt_kwargs lr=2", "twice"),
        ("--opt rotational_lion --weight_decay 0", "weight_decay > 0"),
        ("--device mps" if torch.cuda.is_available() else "--device cuda", "--device cpu"), ("--out_dir ''", "empty"),
        ("--out_dir @/file", "--out_dir"), ("--out_dir @/run --lr 1", "finished run with another"),
        ("--out_dir @/used", "another run is writing") if fcntl else ("--out_dir ''", "empty"),
        ("--out_dir @/run --steps 25", "another steps"), ("--resume --out_dir @/none", "there is no"),
        ("--resume --out_dir @/elsewhere", "is not the"), ("--resume --out_dir @/run --steps 23", "24 steps already"),
        ("--resume --out_dir @/run --opt sgd; --resume --out_dir @/run --beta1 0.1", "is not what")),
    "NT": (
        ("--dropout 1.5", "[0, 1]"), ("--n_layer 0", "[1, "), ("--n_head 3", "not a multiple"),
        ("--data_dir @/file", "--data_dir"), ("--resume --out_dir @/run --n_layer 2", "is not what")),
    "N": (
        ("--prompt ''", "empty"), ("--data shakespear", "shakespeare"), ("--block_size 100000", "smaller block"),
        ("--data @; --data @/none.txt", "no such text file"), ("--data @/short.txt; --data @/file", "too few"),
        ("--data @/latin1.txt; --data @/binary.txt", "UTF-8"), ("--batch_size 0", "[1, "),
        ("--data shakespeare --data_dir @/stale", "delete it"), ("--data shakespeare --data_dir @/file", "--data_dir"),
        ("--arch modular --gains 1", "--gains"), ("--arch lstm --opt modular_lion", "every time step"),
        ("--resume --out_dir @/run --prompt 日", "does not occur")),
    "C": (
        ("--modle vit", "did you mean --model?"), ("--epochs 0; --batch_size 0", "[1, "), ("--split 0", "(0, 1]"),
        ("--model resnet21", "invalid choice"), ("--show ''", "empty"), ("--batch_size 101", "make it smaller"),
        ("--show @/none/sheet.png; --show @/sheet.foo", "--show"), ("--data shape", "shapes"),
        ("--data cifar-10", "cifar10"), ("--data @/file", "no such folder"), ("--data @/labels", "label"),
        ("--data @; --data @/empty", "data_batch_1.bin"), ("--data @/cut", "damaged"), ("--data @/larger", "32 x 32"),
        ("--data @/lacking", "data_batch_2.bin is missing"), ("--data cifar10 --data_dir @/stale", "delete it"),
        ("--data cifar100 --data_dir @/file", "cannot download"), ("--data shapes --data_dir @/file", "--data_dir"),
        ("--steps 9 --epochs 1; --resume --out_dir @/run --steps 30 --epochs 2", "give one"),
        ("--model resnet18 --depth 2", "only the depth in its name"), ("--model vit --width 200", "multiple of 64"),
        ("--loss mse30 --label_smoothing 0.1", "leave it out"), ("--model focalnet --opt modular_adam", "product"),
        ("--model vmamba --opt modular_adam", "depthwise"), ("--model gcvit --opt modular_adam", "query"),
        ("--resume --out_dir @/run --model vit", "is not what")),
    "T": (
        ("--warmup-updates 1", "did you mean --warmup?"), ("--vocab 200", "[260, "), ("--beam 0", "[1, "),
        ("--label_smoothing 2", "[0, 1]"), ("--length_penalty 1000", "[0, 10]"), ("--max_tokens 2", "make it larger"),
        ("--data number", "numbers"), ("--data multi30k", "delete it"), ("--data @/zip", "cannot read"),
        ("--data iwslt14 --data_dir @/file", "cannot download"), ("--data @/unequal", "line 2: empty"),
        ("--data @/hollow", "line 2: empty"), ("--data @/void", "line 1: empty"), ("--test @/tset", "tset.de"),
        ("--data @/latin", "line 2: not UTF-8"), ("--data @/alone", "train.en"), ("--data @/lonely", "valid.de"),
        ("--translate x --out_dir @/none", "train one first"), ("--translate \udcff --out_dir @/run", "UTF-8")),
}
FILES = {
    "file": b"", "short.txt": b"too short", "used/.lock": b"", "my.txt": b"To be, or not to be. " * 20,
    "latin1.txt": "Zwölf Boxkämpfer".encode("latin-1") * 100, "binary.txt": random.Random(0).randbytes(5000),
    "stale/shakespeare.txt": b"To be, or not to be.\n", "stale/cifar-10-binary.tar.gz": b"<html>Please log in</html>",
    "data/multi30k/train.de.gz": b"something else", "unequal/train.de": b"a\nb\n", "unequal/train.en": b"a\n",
    "hollow/train.de": b"a\n \nb\n", "hollow/train.en": b"a\nb\nc\n", "void/train.de": b"", "void/train.en": b"",
    "alone/train.de": b"a\n", "lonely/train.de": b"a\n", "lonely/train.en": b"a\n",
    "latin/train.de": "gut\nfünf\n".encode("latin-1"), "latin/train.en": b"good\nfive\n",
    "empty/data_batch_1.bin": b"", "lacking/data_batch_1.bin": bytes(3073),
    "zip/train.de.gz": gzip.compress(b"a line\n" * 999)[:-9],
} | {f"{name}/data_batch_{i}.bin": data for i in range(1, 6)
     for name, data in (("labels", b"\x0a" * 3073), ("cut", bytes(3072)), ("larger", bytes(1 + 3 * 64 * 64)))}


def foreign_checkpoints(path):
    """Damaged, foreign and edited checkpoints -> {kind: its bytes, or None for a folder}."""
    whole, archive, edited = path.read_bytes(), io.BytesIO(), {"config": {}, "script": "other_train.py"}
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.txt", "text")
    with zipfile.ZipFile(path) as file:
        place = whole.index(file.read(max(file.infolist(), key=lambda entry: entry.file_size)))
    damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]
    found = {"one bit of a tensor": damaged, "no checkpoint": archive.getvalue(), "code": b"cos\nmkdir\n(S'never'\ntR.",
             "a folder": None} | {f"{n} bytes": whole[:n] for n in (0, 100, len(whole) // 2, len(whole) - 1)}
    for key, value in edited.items():
        torch.save(checkpoint(path.parent) | {key: value}, file := io.BytesIO())
        found[f"{key}: {value}"] = file.getvalue()
    return found


@contextlib.contextmanager
def collected(problems, what=""):
    """Go on after an error: a table is more useful when all its failures are seen."""
    try:
        yield
    except Exception as error:
        problems.append(f"{what} {type(error).__name__}: {error}")


def test_scripts_bad_input():
    """Every bad flag, file or value, and every damaged, foreign or edited checkpoint: exit status 2 and one line that
    names the mend, no traceback, nothing written, no code run. What a run was made with can be said again, and a
    finished run be done again."""
    problems, data = [], {"N": ("my.txt", "my.txt"), "C": ("bins", "bins/test_batch.bin"),
                          "T": ("corpus", "corpus/valid.en")}       # of the run elsewhere, and the part that changes
    for script in SCRIPTS:
        initial = script.__name__[0].upper()
        with temporary_folder() as folder, contextlib.chdir(folder):
            for name, content in FILES.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            common, (elsewhere, changed) = tiny(script, folder), (folder / name for name in data[initial])
            succeed(script, *common, "--data", elsewhere, "--out_dir", folder / "elsewhere")
            changed.write_bytes(changed.read_bytes()[:-2] + b"\1\n")    # two characters, or one pixel of a test image
            succeed(script, *common, "--out_dir", folder / "run")
            before = {path.name: path.read_bytes() for path in (folder / "run").iterdir()}
            with open(folder / "used/.lock") as used:
                if fcntl:
                    fcntl.flock(used, fcntl.LOCK_SH)    # as another run would, but less jealously
                for line, message in itertools.chain(*(rows for initials, rows in BAD.items() if initial in initials)):
                    for words in map(shlex.split, line.replace("@", str(folder)).split("; ")):
                        alone = "--resume" in words or "--translate" in words
                        flags = [*common, *words] if not alone else words
                        with collected(problems):
                            check_refused(script, folder, flags + ["--out_dir", "never"] * ("--out_dir" not in words),
                                          message)
                        shutil.rmtree("never", ignore_errors=True)
            with collected(problems):
                assert before == {path.name: path.read_bytes() for path in (folder / "run").iterdir()}, "it was touched"
            for what, content in foreign_checkpoints(folder / "run/ckpt.pt").items():
                path = folder / "foreign/ckpt.pt"
                (path if content is None else path.parent).mkdir(parents=True)
                content is None or path.write_bytes(content)
                with collected(problems, f"{script.__name__}, {what}"):
                    check_refused(script, folder, ["--resume", "--out_dir", "foreign"], "")
                    assert os.listdir("foreign") == ["ckpt.pt"]
                shutil.rmtree("foreign")
            for flags in ([], ["--resume"], ["--resume", "--lr", script.TUNED["adamw"]["lr"], "--gains", "0"]):
                with collected(problems):
                    succeed(script, *common, *flags, "--out_dir", folder / "run")
    assert not problems, "\n".join(problems)


# ---- Numbers of a run: one loop by hand for all three scripts, with torch's optimizers -------------------------------


def config(folder):
    return types.SimpleNamespace(**json.loads((folder / "config.json").read_text()))


def check_by_hand(folder, model, kind, hyper, losses_of, evaluate, watch, noise):
    """The log of the run in the folder, and its weights, are those of a plain loop with torch's optimizer `kind`.
    losses_of: step -> a list of losses whose mean is minimised, and the accuracy if it is logged; evaluate -> what an
    evaluation logs; watch: name of a weight whose angle is compared; noise: step -> what seeds dropout."""
    def evaluated():
        model.eval()
        with torch.no_grad():
            found = evaluate()
        model.train()
        return found
    s, named = config(folder), dict(model.named_parameters())
    matrices, vectors = ([p for p in named.values() if (p.dim() > 1) == many] for many in (True, False))
    optimizer = kind([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], **hyper)
    expected, turned, seen = [{"step": 0, "lr": 0.0, **evaluated()}], {}, []
    for step in range(s.steps):
        done = (step - s.warmup) / (s.steps - s.warmup)
        share = {"linear": 1 - done, "cosine": math.cos(math.pi * done / 2) ** 2, "constant": 1.0}[s.schedule]
        for group in optimizer.param_groups:
            group["lr"] = s.hyper["lr"] * ((step + 1) / (s.warmup + 1) if step < s.warmup else share)
        torch.manual_seed(int(np.random.SeedSequence(noise(step)).generate_state(1)[0]))
        losses, *accuracy = losses_of(step)
        (sum(losses) / len(losses)).backward()
        seen.append([sum(losses).item() / len(losses), *accuracy])
        nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        before = named[watch].detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        turned[step] = angles(before, named[watch]).mean().item()
        if (step + 1) % s.eval_every == 0:
            means = dict(zip(("train_loss", "train_acc"), np.mean(seen, 0)))
            expected.append({"step": step + 1, "lr": optimizer.param_groups[0]["lr"], **means, **evaluated()})
            seen.clear()
    log = read_log(folder)
    rotations = {record["step"]: record["rotation"][watch] for record in log if "rotation" in record}
    assert list(rotations) == list(range(s.track, s.steps, s.track)), "every --track steps, but not the last"
    for step, row in rotations.items():
        close(row["angle"], turned[step], 1e-3, f"angle of step {step}")
        assert row.keys() >= {"norm", "predicted_angle", "predicted_norm"}, row
    ours = [record for record in log if "rotation" not in record and "bleu" not in record]
    for record, by_hand in zip(ours, expected, strict=True):
        for key, value in by_hand.items():          # other orders of summation may decide a close call otherwise
            close(record[key], value, *((0.01, f"{key}", 1) if key.endswith("_acc") else (1e-4, f"{key}")))
    for key, value in checkpoint(folder)["model"].items():
        if value.is_floating_point():
            close(model.state_dict()[key], value, 1e-3, key, scale=max(value.abs().max(), 0.1))
    return ours


def test_nanogpt_equals_a_loop_by_hand():
    """Losses, lr, angles, weights, tokens, perplexity and samples are those of a plain loop on the same windows."""
    text = "".join(random.Random(1).choices("abcdefgh ", range(1, 10), k=3000))
    ids = torch.tensor([sorted(set(text)).index(c) for c in text])
    with temporary_folder() as folder:
        (folder / "my.txt").write_text(text)
        run = folder / "run"
        out = succeed(nanogpt_train, *TINY, *flags_of(
            grad_accum=2, gains=1, opt="adamw", lr=0.02, weight_decay=0.5, seed=7, beta1=0.8, beta2=0.9,
            eps=0.003, grad_clip=0.3, track=5, data=folder / "my.txt", data_dir=folder / "data", out_dir=run))
        torch.manual_seed(7)
        model = nanogpt_train.GPT(9, 1, 2, 16, 16, 0.1, True)

        def windows(part, rng, count):
            return torch.stack([part[i:i + 17] for i in rng.integers(0, len(part) - 16, size=count)])

        def losses_of(step):
            parts = windows(ids[:2700], np.random.default_rng([7, step]), 8).split(4)
            return [model(part[:, :16], part[:, 1:]) for part in parts],

        def evaluate():
            rng = np.random.default_rng(0)          # whatever the seed of the run is
            parts = [windows(ids[2700:], rng, 4) for _ in range(2)]
            return {"val_loss": np.mean([model(part[:, :16], part[:, 1:]).item() for part in parts])}
        log = check_by_hand(run, model, torch.optim.AdamW, dict(betas=(0.8, 0.9), eps=0.003, weight_decay=0.5),
                            losses_of, evaluate, "blocks.0.up.weight", lambda step: [7, step, 0])
        assert log[-1]["tokens"] == 24 * 8 * 16
        assert f"val_loss {log[-1]['val_loss']:.4f} (perplexity {math.exp(log[-1]['val_loss']):.2f})" in out, out

        out = succeed(nanogpt_train, "--resume", *flags_of(sample=30, temperature=0.3, prompt="bad", out_dir=run))
        model.load_state_dict(checkpoint(run)["model"])
        model.eval()
        written, generator = "bad", torch.Generator().manual_seed(7)
        for _ in range(30):
            x = torch.tensor([sorted(set(text)).index(c) for c in written[-16:]])
            p = model(x[None])[0].double().exp() ** (1 / 0.3)
            written += sorted(set(text))[torch.multinomial(p / p.sum(), 1, generator=generator)]
        assert f"---\n{written}\n---" in out, f"{written} should be in {out}"


def test_cifar_equals_a_loop_by_hand():
    """Losses, accuracies, lr, angles and weights are those of a plain loop on the same batches; label smoothing and
    --split reach where they should, and the test set is left alone by --split."""
    with temporary_folder() as folder:
        images = cifar_train.Images(*map(torch.from_numpy, cifar_folder(folder, 2200, 1030)), [""] * 10, "")
        for own in (dict(split=1, label_smoothing=0), dict(split=0.5, label_smoothing=0.3)):
            run = folder / str(own["split"])
            if own["split"] < 1:                    # other test images
                (folder / "bins/test_batch.bin").write_bytes(bytes(3073 * 7))
            succeed(cifar_train, *flags_of(
                data=folder / "bins", model="vgg16", width=2, batch_size=20, steps=12, eval_every=6, warmup=2,
                opt="sgd", lr=0.1, weight_decay=0.02, grad_clip=0.05, seed=7, schedule="linear", track=5, loss="ce",
                out_dir=run, **own))
            s = config(run)
            train, train_labels, held_out, labels = cifar_train.split(images, own["split"], 7)
            mean, std = train.double().mean((0, 1, 2)).float(), train.double().std((0, 1, 2), correction=0).float()
            batches = cifar_train.Batches(train, train_labels, s)
            torch.manual_seed(7)
            model = cifar_train.make_model(s, 10)

            def accuracy(logits, y):
                return (logits.argmax(1) == y).double().mean().item()

            def losses_of(step):
                x, y = batches(step)
                logits = model(x)
                return [F.cross_entropy(logits, y, label_smoothing=own["label_smoothing"])], accuracy(logits, y)

            def evaluate():
                logits = model(((held_out - mean) / std).permute(0, 3, 1, 2))
                name = "val" if own["split"] < 1 else "test"
                return {f"{name}_loss": F.cross_entropy(logits, labels).item(), f"{name}_acc": accuracy(logits, labels)}
            log = check_by_hand(run, model, torch.optim.SGD, dict(lr=1.0, momentum=0.9, weight_decay=0.02),
                                losses_of, evaluate, "features.3.weight", lambda step: [step])
            assert log[-1]["epoch"] == 12 * 20 / len(train)


def test_translate_equals_a_loop_by_hand():
    """Losses, lr, angles, weights and tokens are those of a plain loop on the same batches."""
    for schedule, clip, smoothing, seed in (("linear", 0.3, 0.2, 5), ("constant", 0, 0.0, 6)):
        with temporary_folder() as folder:
            pairs, run = write_corpus(folder / "corpus", train=60), folder / "run"
            succeed(translate_train, *TINY_TRANSLATE, *flags_of(
                data=folder / "corpus", data_dir=folder / "data", opt="sgd", lr=0.4, momentum=0.5, weight_decay=0,
                schedule=schedule, grad_clip=clip, label_smoothing=smoothing, seed=seed, max_tokens=150, steps=12,
                warmup=4, eval_every=6, track=5, out_dir=run))
            codec = translate_train.BytePairs(checkpoint(run)["bpe"])
            batches, valid = (translate_train.Batches(pairs[part], codec, 150) for part in ("train", "valid"))
            torch.manual_seed(seed)
            model, held = translate_train.make_model(config(run), codec), len(batches.sizes)
            assert codec.n_vocab == 300 and 12 > held > 2 and len(valid.sizes) > 2, f"{held} batches"

            def loss_of(part, indices, weight):
                x, y, z = part.get(indices, "cpu")
                logp, real = model(x, y).log_softmax(dim=-1), z != codec.pad
                picked = logp.gather(2, z[:, :, None])[:, :, 0]
                return -(((1 - weight) * picked + weight * logp.mean(dim=2)) * real).sum(), real.sum()

            def losses_of(step):
                total, count = loss_of(batches, batches.epoch([seed, step // held])[step % held], smoothing)
                return [total / count],

            def evaluate():                         # a sum over all tokens, then divided
                totals, counts = zip(*(loss_of(valid, indices, 0.0) for indices in valid.epoch()))
                return {"val_loss": sum(totals).item() / sum(counts).item()}
            log = check_by_hand(run, model, torch.optim.SGD, dict(lr=1.0, momentum=0.5), losses_of, evaluate,
                                "encoder.0.up.weight", lambda step: [seed, step])
            said = sum(len(ids) + 1 for ids in codec.encode([en for _, en in pairs["train"]]))
            assert log[-1]["tokens"] == round(12 * said / held)


def small_translator(n_vocab=9, seed=0, **changes):
    """A Translator with large random weights, so that every token matters; the last ids are pad, begin, end."""
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, n_ffn=32, dropout=0.0, gain=False) | changes
    model = translate_train.Translator(n_vocab, n_vocab - 3, **sizes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@torch.no_grad()
def slow_beam_search(model, source, begin, end, beam, penalty):
    """Beam search of one sentence (1, S), as its docstring says it: no cache, no batch, plain lists."""
    live, finished, limit = [(0.0, [])], [], int(1.2 * source.shape[1] + 10)
    for t in range(1, limit + 1):
        ways = []
        for score, said in live:
            logp = model(source, torch.tensor([[begin, *said]]))[0, -1].log_softmax(dim=0).tolist()
            ways += [(score + logp[token], said, token) for token in range(len(logp)) if t < limit or token == end]
        ways.sort(key=lambda way: -way[0])
        finished += [(score / t**penalty, said) for score, said, token in ways[:beam] if token == end]
        live = [(score, [*said, token]) for score, said, token in ways if token != end][:beam]
        if len(finished) >= beam and max(finished)[0] >= max((score / t**penalty for score, _ in live), default=0):
            break
    return max(finished)[1]


def test_translate_translations():
    """Translations of the test set, of a text and of standard input equal those of a slow beam search with the same
    beam and length penalty, in the order of the text, without dropout, however it was typed. The BLEU is theirs."""
    with temporary_folder() as folder:
        short = sorted(write_corpus(folder / "corpus", zipped=True)["test"], key=lambda pair: len(pair[0]))
        test = dict(short[2:5] + short[:2])     # in another order than batches have them
        for language, lines in (("de", test), ("en", test.values())):
            (folder / f"corpus/few.{language}").write_text("".join(line + "\n" for line in lines))
        run = ["--out_dir", folder / "run"]
        succeed(translate_train, *TINY_TRANSLATE, *run, *flags_of(
            data=folder / "corpus", test=folder / "corpus/few", data_dir=folder / "data", dropout=0.5, steps=3,
            warmup=1))
        ckpt, found = checkpoint(folder / "run"), set()
        codec = translate_train.BytePairs(ckpt["bpe"])
        model = small_translator(codec.n_vocab, n_layer=1)  # one that has something to say, and may end it anywhere
        model.target.weight.data.mul_(0.5)[codec.end] = F.normalize(model.decoder[0].norms[2].bias.data, dim=0)
        torch.save(ckpt | {"model": model.state_dict()}, folder / "run/ckpt.pt")
        for beam, penalty in ((1, 1.0), (3, 0.0), (4, 1.0), (2, 2.0)):
            how, hypotheses = ["--beam", beam, "--length_penalty", penalty], []
            for ids in codec.encode([*test]):
                ids = torch.tensor([[*ids, codec.end]])
                said = codec.decode(slow_beam_search(model, ids, codec.begin, codec.end, beam, penalty))
                hypotheses.append(" ".join(unicodedata.normalize("NFC", said.replace("\ufeff", "")).split()))
            out = succeed(translate_train, "--translate", "\n".join(test), *run, *how)
            assert out.split("\n") == [*hypotheses, ""], how
            found |= set(hypotheses)
        assert len(found) > 5, "it says little"
        out = succeed(translate_train, "--resume", *run, *how)
        score = translate_train.bleu(hypotheses, list(test.values()))
        assert f"BLEU {score:.2f} on 5 test pairs" in out and out.count("\n  -> ") == 5, out
        assert (folder / "run/hypotheses.en").read_text().split("\n") == [*hypotheses, ""], how
        assert read_log(folder / "run")[-1]["bleu"] == score
        shutil.rmtree(folder / "corpus")        # not needed any more
        first, last = [*test][0], [*test][-1]
        for spelling in (f"\ufeff{first}\r\n\r\n{last}\r\n",
                         unicodedata.normalize("NFD", f" {first} \n \n{last}").replace(" ", "\xa0 ")):
            with unittest.mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(spelling.encode()))):
                out = succeed(translate_train, "--translate", "-", *run, *how)
            assert out.split("\n") == [hypotheses[0], "", hypotheses[-1], ""], repr(spelling)
            assert succeed(translate_train, "--translate", spelling, *run, *how) == out, repr(spelling)


# ---- Settings --------------------------------------------------------------------------------------------------------


def settled(script, *arguments):
    """Settings of a new run with these flags, as the script settles them."""
    return script.settle(script.parse(["--device", "cpu", *" ".join(map(str, arguments)).split()]))


def test_scripts_every_optimizer():
    """Every optimizer has tuned defaults, gets them, and moves every matrix and filter of a network."""
    sizes = "--n_layer 1 --n_embd 16", "--model rescnn --width 4", "--n_layer 1 --n_embd 16"
    for script, size, what in zip(SCRIPTS, sizes, (9, 10, translate_train.BytePairs([]))):
        for name, kind in optim.OPTIMIZERS.items():
            given = [f"{key}={x}" for key, x in (("eps", 0.5), ("batch_size", 7)) if key in kind.takes()]
            s = settled(script, size, "--opt", name, *(["--opt_kwargs", *given] if given else []))
            model, tuned = script.make_model(s, what), script.TUNED[name]
            optimizer, before = script.make_optimizer(s, model), values(model.parameters())
            group = max(optimizer.param_groups, key=lambda group: group["weight_decay"])
            found = group["lr"], group["weight_decay"], *group.get("betas", ())
            assert found == tuple(tuned[key] for key in ("lr", "weight_decay", "beta1", "beta2") if key in tuned), name
            assert group.get("eps", 0.5) == 0.5, name
            for i, p in enumerate(model.parameters()):
                p.grad = normal(i, *p.shape, dtype=p.dtype)
            optimizer.step()
            for (n, p), start in zip(model.named_parameters(), before):
                assert p.isfinite().all() and (p.dim() < 2 or not torch.equal(p, start)), f"{name}: {n}"


# Initials of the scripts: flags; settings they give; hyperparameters they give.
SETTLED = {
    "NCT": (
        ("--opt rf_adamw --opt_kwargs batch_size=7 --lr 1 --weight_decay 2 --beta1 0.3 --beta2 0.4 --eps 0.5",
         dict(gains=0), dict(lr=1, weight_decay=2, beta1=0.3, beta2=0.4, eps=0.5, batch_size=7)),
        ("--opt sgd --momentum 0 --lr 0", {}, dict(momentum=0, lr=0)),      # 0 is a value like others
        ("--opt if_shampoo --opt_kwargs damping=1e-2 update_every=3", {}, dict(damping=0.01, update_every=3)),
        ("--warmup 0 --grad_clip 0 --track 0 --seed 0", dict(warmup=0, grad_clip=0, track=0, seed=0), {}),
        ("--opt rotational_adamw", dict(gains=1), {}), ("--opt modular_adam", dict(gains=0), {}),
        ("--opt lion --gains 1", dict(gains=1), {}), ("", dict(opt="adamw", gains=0), {})),
    "N": (
        ("--opt rf_rmsprop --batch_size 6 --grad_accum 5 --block_size 7 --steps 90",        # a shorter warmup
         dict(warmup=45), dict(batch_size=6 * 5 * 7)),
        ("--preset shakespeare --dropout 0 --opt modular_adam",
         dict(dropout=0, n_layer=6, data="shakespeare", arch="modular", steps=5000), {}),
        ("--preset modular_gpt",
         dict(n_embd=128, n_layer=3, block_size=128, batch_size=128, steps=10_000, dtype="float32"), {})),
    "C": (
        ("--opt rf_rmsprop --batch_size 6", {}, dict(batch_size=6)),
        ("--model resnet20 --crop 0 --flip 0 --steps 9",        # a preset's width is its model's
         dict(crop=0, flip=0, width=16, epochs=None, steps=9), {}),
        ("--preset paper_resnet20_adamw --opt sgd", {}, cifar_train.TUNED["sgd"]),
        ("--preset paper_resnet20_rotational_sgd",
         dict(batch_size=2048, epochs=200, warmup=120, schedule="cosine"), dict(lr=4.8, weight_decay=1e-4)),
        ("--preset paper_resmlp_modular_adam",
         dict(batch_size=128, steps=10_000, warmup=0, schedule="linear", dtype="float32"), dict(lr=0.25)),
        ("--preset paper_resnet50_mse_sgd",
         dict(data="cifar100", epochs=120, warmup=0, schedule="step"), dict(lr=0.02629, weight_decay=0.01503))),
    "T": (
        ("--preset iwslt --lr 7 --n_head 8", dict(n_head=8), dict(lr=7, weight_decay=1e-4, beta1=0.9, beta2=0.98)),
        ("--preset iwslt --opt lion", {}, translate_train.TUNED["lion"])),
}


def test_scripts_settings():
    """Flags override a preset, and that the defaults and TUNED; 0 is a value like others. Every preset can be started,
    with its own optimizer, and has the values of its paper. Gains come with rotation. A root-free batch_size counts
    what the loss is a mean of. The default folder is named by what was said by hand."""
    for script in SCRIPTS:
        for flags, expected, hyper in itertools.chain(
                *(rows for initials, rows in SETTLED.items() if script.__name__[0].upper() in initials)):
            s = settled(script, flags)
            found = {key: vars(s)[key] for key in expected}, {key: s.hyper[key] for key in hyper}
            assert found == (expected, hyper), (script.__name__, flags, found)
        assert settled(script, "--opt adamw --beta2 0.4").hyper == script.TUNED["adamw"] | {"beta2": 0.4}
        for name, preset in script.PRESETS.items():
            s = settled(script, "--preset", name)
            assert s.opt == preset.get("opt", "adamw"), name
            script.make_optimizer(s, Single(3, 4))
        plain, other = (settled(script, flags).out_dir for flags in ("", "--lr 1 --opt_kwargs eps=2 --data_dir x"))
        assert other.startswith(plain) and "lr=1" in other and "eps=2" in other and "data_dir" not in other
        different = "", "--lr 1", "--lr 2", "--steps 7", "--opt lion"
        assert len({settled(script, flags).out_dir for flags in different}) == 5
        with unittest.mock.patch.object(script, "pick_device", lambda name: "cuda"):
            assert script.settle({}).data in ("python_docs", "shapes", "numbers"), "still no download"


def test_scripts_schedule():
    """Warmup is a straight line that never starts at 0; cosine, linear, constant and step go as their formulas say."""
    schedules = {"cosine": [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4], "linear": [1, 0.75, 0.5, 0.25],
                 "constant": [1, 1, 1, 1], "step": [1, 1, 0.1, 0.01]}
    for script, (name, shares) in itertools.product(SCRIPTS, schedules.items()):
        if name != "step" or script is cifar_train:
            s = types.SimpleNamespace(warmup=10, steps=110, schedule=name)
            found = [script.lr_at(step, 11.0, s) for step in (*range(10), 10, 35, 60, 85)]
            close(found, [*range(1, 11), *(11 * share for share in shares)], 1e-12, name)


# ---- Data ------------------------------------------------------------------------------------------------------------


def tar_of(files, mode="w"):
    """{name: bytes} -> the bytes of a tar archive."""
    blob = io.BytesIO()
    with tarfile.open(fileobj=blob, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return blob.getvalue()


def test_nanogpt_text():
    """Any text is split 90 / 10 by characters and comes back from its token files unchanged, but for a byte-order mark
    and carriage returns; a changed text of the same size and time is read anew; one process makes it, others wait."""
    text = "".join(random.Random(0).choices("\n ab\u00e4a\u0308\u20ac\U0001f600", k=4999))
    with temporary_folder() as folder:
        my, data, x, y = folder / "my.txt", folder / "data", text + "x", text + "y"
        for spelling, expected in ((x, x), (x, x), ("\ufeff" + x, x), (x.replace("\n", "\r\n"), x), (x, x), (y, y)):
            my.write_bytes(spelling.encode())
            os.utime(my, (1e9, 1e9))
            *parts, codec, _ = nanogpt_train.load_data(str(my), data, "char")
            assert [codec.decode(part.tolist()) for part in parts] == [expected[:4500], expected[4500:]]
        if fcntl:                                   # while another process makes token files, this one waits
            (folder / "other").mkdir()
            with open(folder / "other/.lock", "w") as lock, concurrent.futures.ThreadPoolExecutor() as pool:
                fcntl.flock(lock, fcntl.LOCK_EX)
                found = pool.submit(nanogpt_train.load_data, str(my), folder / "other", "char")
                time.sleep(0.1)
                assert os.listdir(folder / "other") == [".lock"] and not found.done()
                fcntl.flock(lock, fcntl.LOCK_UN)
                assert len(found.result(20)[0]) == 4500


def test_nanogpt_large_texts():
    """TinyStories and WikiText keep their own split; of OpenWebText, every 2000th document is held out."""
    documents, held_out = [f"document {n}, größer" for n in range(4200)], slice(1999, None, 2000)
    with temporary_folder() as folder, unittest.mock.patch.object(
            nanogpt_train, "download", lambda url, sha256, path: folder / url.rpartition("/")[2]):
        for i in range(21):                         # in each archive an .xz file of 200 documents, and something else
            inner = tar_of({f"{n}.txt": documents[n].encode() for n in range(200 * i, 200 * i + 200)})
            (folder / f"urlsf_subset{i:02d}.tar").write_bytes(
                tar_of({"part.xz": lzma.compress(inner, preset=0), "README": b"no archive"}))
        valid = documents[held_out]
        del documents[held_out]
        for part, expected in (("valid", valid), ("train", documents)):
            with zipfile.ZipFile(folder / "wikitext-103-raw-v1.zip", "a") as file:
                file.writestr(f"wikitext-103-raw/wiki.{part}.raw", f"wikitext {part}")
            (folder / f"TinyStoriesV2-GPT4-{part}.txt").write_text(f"tinystories {part}")
            read = nanogpt_train.read_part("openwebtext", part, folder)
            assert list(read) == [text + "<|endoftext|>" for text in expected], part
            for name in ("tinystories", "wikitext"):
                assert "".join(nanogpt_train.read_part(name, part, folder)) == f"{name} {part}"
                assert settled(nanogpt_train, "--data", name).tokenizer == "gpt2"


def test_nanogpt_byte_pairs():
    """A text is encoded by GPT-2's byte pairs and its mark, and decoded to the same text; padding has none."""
    import tiktoken
    ranks = {token: rank for rank, token in enumerate([b"a", b"b", b" ", b"\n", b"!", b"  ", b"\n\n", b" a", b"ab"])}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""     # as GPT-2 splits text
    codec = tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 11})
    with unittest.mock.patch.object(tiktoken, "get_encoding", lambda name: {"gpt2": codec}[name]), \
            temporary_folder() as folder:
        tokens = nanogpt_train.GPT2Tokens()
        assert tokens.encode("ab!<|endoftext|>a") == [8, 4, 11, 0], "the end of a document is one token"
        assert tokens.decode([8, 4, 11, 12, tokens.n_vocab - 1, 0]) == "ab!<|endoftext|>a", "padding has no text"
        (folder / "my.txt").write_text("ab !\n" * 200)
        train, val, found, _ = nanogpt_train.load_data(str(folder / "my.txt"), folder, "gpt2")
        assert found.decode(train.tolist()) + found.decode(val.tolist()) == "ab !\n" * 200
        assert train.tolist() == codec.encode("ab !\n" * 180)


def test_cifar_archives():
    """CIFAR-10's, CIFAR-100's and ImageNet-32's layouts are read pixel by pixel as documented: CIFAR's from a folder
    and an archive; ImageNet's unpacked once, then mapped, and damage to it is named."""
    rng = np.random.default_rng(0)

    def drawn(classes, *parts):                     # -> the bytes and labels of each file, and what to read from all
        files, arrays = {}, []
        for names in parts:
            pixels = rng.integers(0, 256, (4 * len(names), 3072), dtype=np.uint8)
            labels = rng.integers(0, classes, len(pixels))
            files |= dict(zip(names, zip(np.split(pixels, len(names)), np.split(labels, len(names)))))
            n, row, column, colour = np.indices((len(pixels), 32, 32, 3))       # planes of red, green and blue
            arrays += map(torch.from_numpy, (pixels[n, 1024 * colour + 32 * row + column], labels))
        return files, arrays
    for name, classes, *parts in (
            ("cifar10", 10, [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
            ("cifar100", 100, ["train.bin"], ["test.bin"])):
        with temporary_folder() as folder:
            (files, expected), inside = drawn(classes, *parts), {"../outside": b""}
            for file, (pixels, labels) in files.items():        # CIFAR-100 has a coarse label before the other one
                start = [rng.integers(0, 20, len(labels)), labels] if classes == 100 else [labels]
                inside[f"inner/{file}"] = np.column_stack([*start, pixels]).astype(np.uint8).tobytes()
                (folder / file).write_bytes(inside[f"inner/{file}"])
            archive, _, *layout = cifar_train.CIFAR[name]
            (folder / archive).write_bytes(blob := tar_of(inside, "w:gz"))
            known = {name: (archive, hashlib.sha256(blob).hexdigest(), *layout)}
            with unittest.mock.patch.dict(cifar_train.CIFAR, known):
                both = cifar_train.load_data(str(folder), folder), cifar_train.load_data(name, folder)
            for images in both:
                same_bits(images[:4], expected, name)
                assert len(images.names) == classes and images.fingerprint == both[0].fingerprint
            assert not (folder.parent / "outside").exists(), "nothing is unpacked"

    with temporary_folder() as folder:
        name, val = f"imagenet32:{folder}", folder / "val_data.npz"
        files, expected = drawn(1000, [f"train_data_batch_{i}.npz" for i in range(1, 11)], ["val_data.npz"])
        for file, (pixels, labels) in files.items():
            np.savez_compressed(folder / file, data=pixels, labels=labels + 1, mean=np.zeros(3072))
        images = cifar_train.load_data(name, folder / "data")
        with unittest.mock.patch.object(np.lib.npyio.NpzFile, "__getitem__", side_effect=AssertionError):
            again = cifar_train.load_data(name, folder / "data")                # no archive is opened again
        for found in (images, again):
            same_bits(found[:4], expected, name)
        assert len(images.names) == 1000 and again.fingerprint == images.fingerprint
        flags = [*CIFAR_TINY, *"--model gnn --depth 1 --data_dir".split(), folder / "data", "--data", name, "--out_dir"]
        succeed(cifar_train, *flags, folder / "run")
        for damage, words in ((lambda: val.write_bytes(val.read_bytes()[:200]), "val_data.npz"),
                              (lambda: np.savez(val, data=np.zeros((4, 12), np.uint8), labels=[1, 2, 3, 4]), "3072"),
                              (lambda: np.savez(val, data=pixels, labels=np.zeros(4, int)), "1 to 1000"),
                              (val.unlink, "val_data.npz: No such file")):
            damage()
            check_refused(cifar_train, folder, [*flags, folder / "never"], words)
        assert len(list((folder / "data").glob("imagenet32-*"))) == 1, "nothing half made is taken for the whole"


def test_cifar_shapes():
    """The drawn images are drawn once, the same for everyone, as many of each class, and none for the test is among
    those for training. Areas of the shapes equal closed forms."""
    with temporary_folder() as folder, contextlib.redirect_stderr(io.StringIO()):       # a progress bar
        drawn, found = (cifar_train.load_shapes(folder, 5000, 1000)[0] for _ in range(2))
        assert len(list(folder.glob("*.npz"))) == 1 and all(np.array_equal(a, b) for a, b in zip(drawn, found))
    assert not {image.tobytes() for image in drawn[0]} & {image.tobytes() for image in drawn[2]}, "trained on the test"
    assert np.bincount(drawn[1]).tolist() == [500] * 10 and np.bincount(drawn[3]).tolist() == [100] * 10

    u, v = np.meshgrid(*[(np.arange(800) + 0.5) / 400 * 1.25 - 1.25] * 2)
    lens = sum(r**2 * math.acos((0.25 + r**2 - other**2) / r) for r, other in ((0.95, 0.75), (0.75, 0.95)))
    lens -= math.sqrt((1.7**2 - 0.25) * (0.25 - 0.2**2)) / 2                        # what two discs have in common
    areas = {"disc": math.pi * 0.85**2, "ring": math.pi * (0.97**2 - 0.53**2), "square": 1.5**2,
             "triangle": 3 * math.sqrt(3) * 0.55**2, "pentagon": 5 * math.tan(math.pi / 5) * 0.75**2,
             "star": math.pi * (0.68**2 + 0.3**2 / 2), "cross": 2 * 1.8 * 0.56 - 0.56**2,
             "crescent": math.pi * 0.95**2 - lens, "bars": 2 * 0.4 * 1.7, "heart": math.pi * 0.8**2}    # a sheared disc
    for shape in cifar_train.SHAPES:
        close((cifar_train.inside(shape, u, v) > 0).mean() * 2.5**2, areas[shape], 0.004, shape)


def test_cifar_show():
    """--show draws the first images of each class in a row, every pixel as it is, doubled."""
    if not importlib.util.find_spec("matplotlib"):
        raise unittest.SkipTest("needs matplotlib")
    import matplotlib.image
    with temporary_folder() as folder:
        succeed(cifar_train, *tiny(cifar_train, folder), "--out_dir", folder / "run", "--show", folder / "sheet.png")
        sheet = np.round(matplotlib.image.imread(folder / "sheet.png")[..., :3] * 255)[:, -16 * 68:]
        assert sheet.shape[:2] == (10 * 68, 16 * 68) and not (folder / "run").exists()
        train, labels, _, _ = cifar_folder(folder)
    for k, column in itertools.product(range(10), range(16)):
        image = train[labels == k][column] if column < 10 else np.full((32, 32, 3), 255)
        assert (sheet[68 * k:, 68 * column:][:64, :64] == image.repeat(2, 0).repeat(2, 1)).all(), (k, column)


def test_cifar_batches():
    """A batch equals a per-image transcription of crop, mirror and normalise; an epoch shows no image twice; a part
    held out is random, and disjoint."""
    images = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (50, 32, 32, 3), np.uint8))
    labels = torch.arange(50)
    mean, std = (getattr(images.double(), kind)((0, 1, 2)).numpy() for kind in ("mean", "std"))

    def batches(pixels=images, **how):
        s = dict(crop=4, flip=1, batch_size=12, seed=9, device="cpu") | how
        return cifar_train.Batches(pixels, labels, types.SimpleNamespace(**s))
    for pad, flip in ((4, 1), (0, 0), (2, 1)):
        ours, seen = batches(crop=pad, flip=flip), []
        for step in range(8):                       # two epochs of 4 batches; two images are left over
            (x, y), draws = ours(step), ours.draw(step)
            assert x.shape == (12, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
            seen += y.tolist()
            for i, (n, top, left, mirrored) in enumerate(draws.T.tolist()):
                image = F.pad(images[n].permute(2, 0, 1), (pad,) * 4)[:, top:top + 32, left:left + 32].numpy()
                by_hand = (image.transpose(1, 2, 0)[:, ::-1 if mirrored else 1] - mean) / std
                close(x[i], by_hand.transpose(2, 0, 1), 1e-4, f"step {step}, image {i}")
        assert len({*seen[:48]}) == len({*seen[48:]}) == 48 and seen[:48] != seen[48:]
    assert (batches(seed=1).draw(0) != batches(seed=2).draw(0)).any(1).all(), "all four draws depend on the seed"
    draws = torch.cat([batches().draw(step) for step in range(200)], dim=1)
    for shifts in draws[1:3]:
        assert shifts.bincount(minlength=9).min() > 0 and shifts.max() == 8, "a crop can begin in any of 9 places"
    assert 0.45 < draws[3].double().mean() < 0.55, "every other image is mirrored"
    assert batches(torch.full_like(images, 7))(0)[0].isfinite().all(), "a single colour has no deviation to divide by"

    whole = cifar_train.Images(labels[:, None, None, None], labels, labels[:0], labels[:0], [""] * 50, "")
    train, train_labels, rest, rest_labels = cifar_train.split(whole, 0.7, 3)
    assert len(train) == 35 and sorted([*train_labels.tolist(), *rest_labels.tolist()]) == labels.tolist()
    assert torch.equal(train.flatten(), train_labels) and torch.equal(rest.flatten(), rest_labels)
    assert train_labels.tolist() != sorted(train_labels.tolist()), "a random part, not the first images"


def test_translate_grammar():
    """Numbers and times are spelled as German and English spell them; no content of the test or the validation set, and
    no sentence, occurs in the training set."""
    for name, given, de, en in re.findall(r"(\w+) ([\d ]+): (.+?) = (.+?)(?:;|$)", """
            number 0: null = zero; number 30: dreißig = thirty; number 66: sechsundsechzig = sixty-six
            number 101011: einhunderteintausendelf = one hundred and one thousand and eleven
            number 2001: zweitausendeins = two thousand and one
            number 12900: zwölftausendneunhundert = twelve thousand nine hundred
            clock 7 30: halb acht = half past seven; clock 12 30: halb eins = half past twelve
            clock 7 15: Viertel nach sieben = a quarter past seven; clock 7 45: Viertel vor acht = a quarter to eight
            clock 12 50: zehn vor eins = ten to one; clock 7 25: fünf vor halb acht = twenty-five past seven
            clock 7 35: fünf nach halb acht = twenty-five to eight; timetable 8 0: acht Uhr = eight a.m.
            timetable 23 15: dreiundzwanzig Uhr fünfzehn = eleven fifteen p.m.; timetable 12 0: zwölf Uhr = twelve p.m.
            timetable 0 5: null Uhr fünf = twelve oh five a.m.
            timetable 1 31: ein Uhr einunddreißig = one thirty-one a.m.""", re.M):
        words = getattr(translate_train, name, lambda n: (translate_train.german(n), translate_train.english(n)))
        assert words(*map(int, given.split())) == (de, en), (name, given)
    contents, sources = {}, {}
    for part, count in (("train", 24_000), ("valid", 500), ("test", 1000)):
        grammar, drawn = translate_train.Grammar(part, seed=part), {}
        while len(drawn) < count:
            drawn.setdefault(*grammar.pair())
        contents[part], sources[part] = grammar.contents, set(drawn)
        assert part == "train" or list(drawn.items()) == translate_train.numbers(part), part
        assert all(text == translate_train.sentence(text) for pair in drawn.items() for text in pair)
    for a, b in itertools.combinations(sources, 2):
        assert not contents[a] & contents[b] and not sources[a] & sources[b], (a, b)
    # independent of the grammar's own books: no long number word of the test set is a word of the training set
    words = {part: {word for de in sources[part] for word in re.findall(r"\w{25,}", de)} for part in sources}
    assert len(words["test"]) > 100 and not words["test"] & words["train"], len(words["test"])


def test_translate_corpora():
    """A corpus is the same however its sentences were typed: mark, carriage return, spaces, decomposed letters. --test
    is another test set than that of the folder; each text has its vocabulary. IWSLT'14 is cleaned as the recipe says.
    (Tried on a made-up archive of the same layout.)"""
    odd = ("\ufeffHört hört um acht {}", "Hört hört um acht {}\r", " Hört  hört um acht {} ",
           "Ho\u0308rt\u00a0hört\u2009um\tacht {}", "\u3000Hört hört um acht {}\u00a0")
    with temporary_folder() as folder, unittest.mock.patch.object(translate_train, "download",
                                                                  lambda url, checksum, path: path):
        parts = "train", "valid", "test"
        (folder / "multi30k").mkdir()
        for name, language in itertools.product(parts, ("de", "en")):
            data = gzip.compress("".join(line.format(name + language) + "\n" for line in odd).encode())
            (folder / f"multi30k/{name}.{language}.gz").write_bytes(data)
        plain = translate_train.load_corpus("multi30k", folder, None)
        other = translate_train.load_corpus("multi30k", folder, str(folder / "multi30k/valid"))
        assert plain == {part: [(f"Hört hört um acht {part}de", f"Hört hört um acht {part}en")] * 5 for part in parts}
        assert other == plain | {"test": plain["valid"]}
        for pairs in (plain["train"], plain["train"] + plain["test"]) * 2:
            bpe = translate_train.byte_pairs_of(pairs, 270, folder, "x")
            assert bpe.tokens == translate_train.learn_byte_pairs([side for pair in pairs for side in pair], 11)
        assert len(list(folder.glob("bpe-x-270-*.json"))) == 2
        others = ("GRÜSSE um halb acht", "Grüßeum halb acht", "Grüsse um halb acht", "Grüße um halb acht.", "Grüße um")
        assert len({translate_train.sentence(text) for text in others}) == 5, "what differs otherwise is kept"

        head, files = "<url>http</url>\n<talkid>1</talkid>\n<keywords>k</keywords>\n<title>Der Titel</title>\n", {}
        for language, end in (("de", "eins zwei drei vier\n\n"), ("en", "one two\nempty\n")):           # 2 : 1; nothing
            text = head + "".join(f"Satz {i} {language} ({i}).\n" for i in range(60)) + end + "wort " * 176 + "\n"
            files[f"de-en/train.tags.de-en.{language}"] = text.encode()
            for i, name in enumerate("TED.dev2010 TEDX.dev2012 TED.tst2010 TED.tst2011 TED.tst2012".split()):
                files[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = (
                    f'<doc>\n<seg id="1"> Test {i} &amp; so’s {language} </seg>\n<seg id="2">Zwei</seg>\n').encode()
        (folder / "iwslt14-de-en.tgz").write_bytes(data := tar_of(files, "w:gz"))
        with unittest.mock.patch.object(translate_train, "IWSLT14_MD5", hashlib.md5(data).hexdigest()):
            pairs = translate_train.load_corpus("iwslt14", folder, None)
    right = [("der titel", "der titel")] + [(f"satz {i} de ({i}).", f"satz {i} en ({i}).") for i in range(60)]
    assert pairs["valid"] == [right[22], right[45]]
    assert pairs["train"] == [pair for i, pair in enumerate(right) if i not in (22, 45)]
    assert len(pairs["test"]) == 10 and pairs["test"][0] == ("test 0 & so's de", "test 0 & so's en")


def test_translate_byte_pairs():
    """Any Unicode text survives encoding and decoding unchanged, and its ids never include a mark. The trainer learns
    what counting all pairs again for every token does; tiktoken joins as it did."""
    chance = random.Random(0)
    samples = ["", " ", "halb acht", "  zwei  Leerzeichen ", "Grüße: 5 €, 30 %!", "e\u0301 a\u0308\u0323", "İıſß",
               "👩‍👩‍👧‍👦 🇩🇪", "日本語のテキスト", "\u2028\u2029\ufeff\ufffd", "<end><pad>", "tab\tand\r", "\0\x01\x1c\x85",
               "\U0010ffff"]
    numbers = [words(n) for n in chance.sample(range(10**6), 300)
               for words in (translate_train.german, translate_train.english)]
    codec = translate_train.BytePairs(translate_train.learn_byte_pairs(numbers + samples * 3, 300))
    for i in range(400):
        top = [chance.choice([0x80, 0x250, 0x3000, 0x110000]) for _ in range(20)]
        text = samples[i] if i < len(samples) else "".join(map(chr, map(chance.randrange, top)))
        text = text.encode(errors="ignore").decode()
        ids, = codec.encode([text])
        assert codec.decode(ids) == text and max(ids, default=0) < codec.pad, repr(text)
    for case in range(12):
        lines = numbers[case * 20:][:20] if case >= 8 else [
            "".join(chance.choice("aab c.") for _ in range(chance.randint(0, 40))) for _ in range(8)]
        codec = translate_train.BytePairs(translate_train.learn_byte_pairs(lines, 60))
        learned = [codec.core.decode_single_token_bytes(i) for i in range(256, codec.pad)]
        words = [[bytes([byte]) for byte in word.encode()]
                 for line in lines for word in re.findall(translate_train.WORD, " " + line)]
        assert b"".join(b"".join(word) for word in words) == "".join(" " + line for line in lines).encode()
        for k in range(60):
            counts = collections.Counter(a + b for word in words for a, b in zip(word, word[1:]))
            best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
            if best is None or counts[best] < 2:
                assert len(learned) == k
                break
            assert learned[k] == best, (case, k, learned[k], best)
            for word in words:
                i = 0
                while i + 1 < len(word):
                    if word[i] + word[i + 1] == best:
                        word[i:i + 2] = [best]
                    i += 1
        cut = [codec.core.decode_single_token_bytes(i) for ids in codec.encode(lines) for i in ids]
        assert cut == [token for word in words for token in word], case


def test_translate_batches():
    """An epoch has every pair once, in batches no larger than asked, hardly padded; its seed repeats its order."""
    numbers = random.Random(0).sample(range(10**6), 500)
    pairs = [(translate_train.german(n), translate_train.english(n)) for n in numbers] + [("wort " * 300, "word")]
    lines = [side for pair in pairs[:300] for side in pair]
    bpe = translate_train.BytePairs(translate_train.learn_byte_pairs(lines, 60))
    batches, real, held = translate_train.Batches(pairs, bpe, 400), 0, 0
    one, two = batches.epoch([1, 0]), batches.epoch([1, 1])
    for indices in one:
        source, x, y = batches.get(indices, "cpu")
        assert max(source.numel(), x.numel()) <= 400 and x.shape == y.shape and torch.equal(x[:, 1:], y[:, :-1])
        assert (x[:, 0] == bpe.begin).all()
        for i, *rows in zip(indices, source, y):
            for side, row in zip(pairs[i], rows):
                assert bpe.decode(row[row != bpe.pad].tolist()) == side and row[row != bpe.pad][-1] == bpe.end
        real += (source != bpe.pad).sum().item() + (y != bpe.pad).sum().item()
        held += source.numel() + y.numel()
    assert 1 - real / held < 0.15 and batches.too_long == 1
    assert all(sorted(i for batch in epoch for i in batch) == list(range(500)) for epoch in (one, two))
    assert sorted(map(len, one)) == sorted(map(len, two)) == sorted(batches.sizes) != [*map(len, one)]
    assert all(np.array_equal(a, b) for a, b in zip(one, batches.epoch([1, 0]), strict=True))
    members = [{frozenset(batch.tolist()) for batch in epoch} for epoch in (one, two)]
    assert len(members[0] & members[1]) < len(one) / 2, "pairs of the same lengths should trade places"
    longest = max(len(ids) + 1 for ids in bpe.encode(pairs[0]))         # as long as is allowed, by either language
    for pair in (pairs[0], pairs[0][::-1]):
        for room, sizes in ((longest, [1, 1]), (2 * longest - 1, [1, 1]), (2 * longest, [2]), (longest - 1, [])):
            assert translate_train.Batches([pair] * 2, bpe, room).sizes == sizes, room


def test_scripts_downloads():
    """Downloads are checked before they count: whatever a server does, it is one line, and leaves nothing behind."""
    body = b"text " * 1000
    ok, sized, right = "200 OK", f"200 OK\r\nContent-Length: {len(body)}", hashlib.sha256(body).hexdigest()
    answers = {                                     # to /KIND; what the script says to that (None: all is well)
        "good": (sized, body, None), "moved": ("302 Found\r\nLocation: /good", b"", None),
        "wrong": (ok, body.upper(), "invalid hash"), "page": (ok, b"<html>Log in</html>", "invalid hash"),
        "short": (sized, body[:-10], "invalid hash"), "missing": ("404 Not Found", b"", "Not Found"),
        "loop": ("302 Found\r\nLocation: /loop", b"", "cannot download"), "garbage": ("?", b"", "cannot download"),
        "chunked": (f"{ok}\r\nTransfer-Encoding: chunked", b"4\r\nabcd\r\nff\r\nabc", "cannot download"),  # breaks off
        "resolve/told": (sized, body, None), "resolve/lied": (sized, body, "invalid hash"),
        "resolve/mute": (sized, body, "cannot download")}
    pointers = {f"raw/{kind}": (ok, f"oid sha256:{sha256}".encode(), None) for kind, sha256 in (
        ("told", right), ("lied", right[::-1]), ("mute", ""))}      # git's, which hold the sha256

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            kind = self.rfile.readline().split()[1].decode().strip("/")
            while self.rfile.readline().strip():    # headers
                pass
            head, data, _ = (answers | pointers)[kind]
            self.wfile.write(f"HTTP/1.1 {head}\r\n\r\n".encode() + data)

    def fetch(script, kind, path):                  # -> the path, or what went wrong
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                address = f"http://127.0.0.1:{listening.server_address[1]}/{kind}"
                return script.download(address, None if "/" in kind else right, path)
        except SystemExit as stop:
            assert stop.code == 2 and "Traceback" not in stderr.getvalue()
            TALLY["bad inputs tried"] += 1
            return stderr.getvalue().splitlines()[-1]

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening, temporary_folder() as folder:
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        path = folder / "deep/er/file"
        for kind, (_, _, words) in answers.items():
            for script in SCRIPTS if "/" not in kind else [nanogpt_train]:
                found = fetch(script, kind, path)
                if words is None:
                    assert found == path and path.read_bytes() == body, (kind, found)
                    path.unlink()
                else:
                    assert re.search(f"({words}).*Fetch it by hand and put it at {path}", str(found)), (kind, found)
                assert not os.listdir(path.parent), f"{script.__name__}: {kind} left something behind"
        (folder / "file").write_text("an older download")
        for script in SCRIPTS:
            for path, words in ((folder / "file", "delete it"), (folder / "file/x", "by hand"), (folder, "by hand")):
                assert words in fetch(script, "good", path)
        assert sorted(os.listdir(folder)) == ["deep", "file"]
        assert (folder / "file").read_text() == "an older download"
        listening.shutdown()


# ---- Models ----------------------------------------------------------------------------------------------------------


def image_model(flags, classes=10):
    return cifar_train.make_model(settled(cifar_train, flags), classes)


def loud(layer):
    """The weight of a layer, its gain multiplied into it."""
    return layer.weight if getattr(layer, "gain", None) is None else layer.gain[:, None] * layer.weight


def linear(layer, x):
    """A Linear of the scripts, or a 1x1 Conv1d without groups, written out."""
    return x @ loud(layer).T + (0 if layer.bias is None else layer.bias)


def torchs(kind, heads, parts, **options):
    """A layer of torch in float64. parts: how its parameters begin -> our layers, side by side; no bias is 0."""
    up, = parts["linear1."]
    twin = kind(up.in_features, heads, up.out_features, 0.0, batch_first=True, dtype=torch.float64, **options)
    state = {key: torch.zeros_like(x) for key, x in twin.state_dict().items()}
    for begin, layers in parts.items():
        state[f"{begin}weight"] = torch.cat([loud(layer) for layer in layers])
        if layers[0].bias is not None:
            state[f"{begin}bias"] = torch.cat([layer.bias for layer in layers])
    twin.load_state_dict(state)
    return twin.train()                             # in eval() torch takes another path


def half_blocks(block, attention, heads):
    """Attention and MLP of a Block as torch's layer."""
    return torchs(nn.TransformerEncoderLayer, heads, {
        "norm1.": [block.norm1], "self_attn.in_proj_": [attention.qkv], "self_attn.out_proj.": [attention.out],
        "norm2.": [block.norm2], "linear1.": [block.up], "linear2.": [block.down]}, activation=F.gelu, norm_first=True)


def test_scripts_sizes():
    """Models have as many parameters as published."""
    s = settled(translate_train, "--preset iwslt")
    with torch.device("meta"):
        models = [(image_model(f"--model {name}"), size, 0.01e6) for name, size in (
            ("resnet20", 0.27e6), ("resnet18 --width 64", 11.17e6), ("resnet34", 21.28e6), ("resnet50", 23.52e6),
            ("vgg16", 14.72e6), ("vit", 5.36e6))]
        models += [(image_model("--model densenet121 --width 32 --depth 6", 1000),      # torchvision's, another stem
                    7_978_856 - 64 * 3 * 7 * 7 - 2 * 64 + 64 * 3 * 3 * 3, 0),
                   (nanogpt_train.GPT(50257, 12, 12, 768, 1024, 0.0, False),            # GPT-2's, without the biases
                    124_439_808 - 12 * 11 * 768 - 768, 0),
                   (translate_train.Translator((8848 + 6632) // 2, 0, s.n_layer, s.n_head, s.n_embd, s.n_ffn, 0, False),
                    39_469_056, 0)]        # fairseq's, with two vocabularies
    for model, size, tolerance in models:
        found = sum(p.numel() for p in model.parameters())
        assert abs(found - size) <= tolerance, f"{type(model)}: {found}, not {size}"


def test_nanogpt_models():
    """GPT equals torch's own layers and starts as GPT-2 does; ModularGPT computes what the paper's network does, the
    LSTM what its cells do; dropout is where it should be; a gain of 1 changes nothing, one of 3 triples its neuron."""
    torch.manual_seed(0)
    V, L, H, C, T = 11, 3, 2, 8, 5
    gpt = nanogpt_train.GPT(V, L, H, C, T + 1, 0.4, True).double().eval()
    lstm = nanogpt_train.LSTM(V, L, C, T, 0.4, True).double().eval()
    for p in (*gpt.parameters(), *lstm.parameters()):
        nn.init.normal_(p)                          # so that no part is too small to matter
    x, y = torch.randint(V, (2, 4, T))
    h, mask = gpt.tokens.weight[x] + gpt.positions.weight[:T], torch.full((T, T), -math.inf).triu(1).double()
    for b in gpt.blocks:
        h = half_blocks(b, b.attention, H)(h, mask, is_causal=True)
    of_gpt = F.layer_norm(h, (C,), gpt.norm.weight, gpt.norm.bias) @ (gpt.head.gain * gpt.tokens.weight.T)

    h, gains = lstm.tokens.weight[x], iter(lstm.gains)
    for layer in range(L):
        cell, state, steps = nn.LSTMCell(C, C, dtype=torch.float64), None, []       # the state starts at zero
        cell.load_state_dict({key: getattr(lstm.lstm, f"{key}_l{layer}") * (next(gains)[:, None] if p.dim() == 2 else 1)
                              for key, p in cell.named_parameters()})
        for t in range(T):
            state = cell(h[:, t], state)
            steps.append(state[0])
        h = torch.stack(steps, 1)
    of_lstm = h @ (lstm.head.gain * lstm.tokens.weight.T)

    modular = nanogpt_train.ModularGPT(V, L, H, C, T, 0.4).double().eval()
    h = 0.5 * modular.tokens.weight[x] + 0.5 * modular.positions.weight

    def norm(h):
        return F.layer_norm(h, (C,), eps=0)
    for b in modular.blocks:
        q, k, v = ((norm(h) @ w.weight.T / 3).view(4, T, H, C // H).transpose(1, 2) for w in (b.q, b.k, b.v))
        attention = (q @ k.mT / (C // H) + mask).softmax(-1) @ v
        h = (1 - 1 / (2 * L)) * h + attention.transpose(1, 2).reshape(4, T, C) @ b.out.weight.T / (2 * L)
        up = norm(h) @ b.up.weight.T
        h = (1 - 1 / (2 * L)) * h + math.sqrt(2) * F.gelu(up) @ b.down.weight.T / (2 * L)
    of_modular = norm(h) @ modular.head.weight.T
    for model, logits, drops in ((gpt, of_gpt, 1 + 2 * L), (modular, of_modular, 1 + 2 * L), (lstm, of_lstm, 2)):
        name = type(model).__name__
        close(model(x), logits[:, -1], 1e-9, f"{name}: logits of the last token, without dropout")
        close(model(x, y), F.cross_entropy(logits.flatten(0, 1), y.flatten()), 1e-9, f"{name}: loss")
        dropped, model = [], model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda module, args, out: dropped.append(out.eq(0).double().mean().item()))
        model(x, y)
        assert len(dropped) == drops and 0.2 < np.mean(dropped) < 0.6, f"{name}: after embeddings and each part: 0.4"
    assert lstm.lstm.dropout == 0.4, "between its layers"
    gpt = nanogpt_train.GPT(500, 8, 2, 48, 64, 0.0, False)
    for name, p in gpt.named_parameters():          # 0.02 at width 768: 0.08 at a sixteenth; 2 x 8 terms are added up
        if p.dim() == 2:
            close(p.std(), 0.08 / 4 if name.endswith(("out.weight", "down.weight")) else 0.08, 0.08, name)
        else:
            assert (p == ("norm" in name and name.endswith("weight"))).all(), name
    for script in SCRIPTS:
        layer, h = script.Linear(16, 4, True, True), normal(0, 5, 16, dtype=torch.float32)
        close(layer(h), h @ layer.weight.T + layer.bias, 1e-6, "a gain of 1")
        layer.gain.data[1] = 3.0
        close(layer(h)[:, 1], 3 * (h @ layer.weight[1]) + layer.bias[1], 1e-6, "a gain of 3")


def convolutional_by_hand(model, x, name):
    """resnet18, resnet50 or vgg16, layer by layer; normalisations as they begin, over a batch."""
    def conv(h, layer, stride=1):                   # and its normalisation
        h = F.conv2d(h, layer.weight, stride=stride, padding=layer.weight.shape[-1] // 2)
        return F.batch_norm(h, None, None, training=True)
    if name == "vgg16":
        h = x
        for i, layer in enumerate(m for m in model.features if isinstance(m, nn.Conv2d)):
            h = F.relu(conv(h, layer))
            h = F.max_pool2d(h, 2) if i in (1, 3, 6, 9, 12) else h
    else:
        h, blocks = F.relu(conv(x, model.conv)), iter(model.blocks)
        for stage, count in enumerate({"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}[name]):
            for i in range(count):
                block, stride, f = next(blocks), 2 if stage and not i else 1, h
                for k, layer in enumerate(block.convs):
                    f = conv(F.relu(f) if k else f, layer, stride if k == len(block.convs) - 2 else 1)
                h = F.relu(f + (h if f.shape == h.shape else conv(h, block.projection[0], stride)))
    return linear(model.head, h.mean((2, 3)))


def test_cifar_models():
    """ResNets, VGG-16 and the modular paper's networks equal their layers written out, ViT torch's own layers; all
    start as published."""
    torch.manual_seed(0)
    x = normal(2, 3, 3, 32, 32)
    for name in ("resnet18", "resnet50", "vgg16"):
        model = image_model(f"--model {name} --width 4").double()
        close(model(x), convolutional_by_hand(model, x, name), 1e-7, name)
    for name, L in (("resmlp", 1), ("resmlp", 3), ("rescnn", 2)):
        model, flat = image_model(f"--model {name} --width 8 --depth {L}").double(), name == "resmlp"
        first, *inner, head = (p for p in model.parameters())
        apply, dims = (F.linear, (1,)) if flat else (lambda h, w: F.conv2d(h, w, padding=1), (1, 2, 3))
        h = apply(x.flatten(1) if flat else x, first)
        for k in range(L):
            f = h
            for w in inner[2 * k:2 * k + 2]:
                f = apply(f / f.square().mean(dims, keepdim=True).sqrt(), w).abs()
                f = f - f.mean(dims, keepdim=True)
            h = (1 - 1 / L) * h + f / L
        close(model(x), (h if flat else h.mean((2, 3))) @ head.T, 1e-9, f"{name} of {L} blocks")
    model = image_model("--model vit --width 128 --depth 2 --gains 1").double()
    for name, p in model.named_parameters():
        if name.startswith(("blocks", "head", "positions")) and not name.endswith("gain"):
            close(p.std(correction=0), 0.02 if p.dim() == 2 else 0.0, 0.08, f"vit's {name}", scale=0.02)
        nn.init.normal_(p, std=0.3)
    patches = torch.stack([model.patches.weight.flatten(1) @ x[:, :, i:i + 4, j:j + 4].flatten(1).T
                           for i in range(0, 32, 4) for j in range(0, 32, 4)]).permute(2, 0, 1) + model.patches.bias
    h = torch.cat([torch.zeros(3, 1, 128), patches], 1) + model.positions.weight
    for b in model.blocks:
        h = half_blocks(b, b.mixer, 2)(h)
    last = F.layer_norm(h[:, 0], (128,), model.norm.weight, model.norm.bias)
    close(model(x), linear(model.head, last), 1e-9, "vit")

    first = image_model("--model resnet20 --width 16").blocks[3].convs[0].weight        # from 16 to 32 channels
    close(first.std(), math.sqrt(2 / (9 * 32)), 0.05, "He's deviation by fan-out")
    sizes = torch.linalg.svdvals(image_model("--model resnet20 --width 4 --opt modular_adam").blocks[3].convs[0].weight
                                 .permute(2, 3, 0, 1))
    close(sizes, torch.full_like(sizes, math.sqrt(2) / 9), 1e-5, "modular optimizers begin with weights of their size")
    logits, y = normal(0, 5, 4), torch.tensor([3, 0, 1, 1, 2])
    by_hand = np.mean([(1 + 14 * (k == y[i])) * (logits[i, k] - 30 * (k == y[i])) ** 2
                       for i in range(5) for k in range(4)])
    close(cifar_train.loss_of(logits, y, "mse30", 0.0), by_hand, 1e-6, "mse30")     # the others are in the loop by hand


def test_scripts_modular_trees():
    """Every tree holds each weight of its model once, and shares equal closed forms: every one of the modular paper's
    networks and of the graph network, for every depth, one block included; of the others that of the head, which tells
    the masses. In no bed is what is not a neuron's weight taken for one."""
    def check(model, expected, what):
        names = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() > 1}
        leaves = [(names[id(w.layer.weight)], w.share) for w in model.modular_tree().weights()]
        assert sorted(name for name, _ in leaves) == sorted(names.values()), what
        close([dict(leaves)[name] for name in expected], list(expected.values()), 1e-9, what)
    for (name, mass), L in itertools.product((("resmlp", 1), ("rescnn", 20)), (1, 2, 5)):
        model, T = image_model(f"--width 4 --model {name} --depth {L}"), 2 + mass
        inner = {f"blocks.{i}.{k}": mass / (2 * T) for i in range(L) for k in range(2)}
        check(model, {"first": 1 / T, "head": 1 / T} | inner, f"{name} of {L} blocks")
        close(model.modular_tree().sensitivity, 1, 1e-12, f"{name} of {L} blocks: sensitivity")
    relu, later = 0.5**0.5, [1, (3 + 0.5**0.5) / 4, (3 + 0.5**0.5) / 4 * (2 + 0.5**0.5) / 3]    # sensitivity behind
    gnn = {f"layers.{k - 1}": 5 / 7 / 3 * (k + 1) / relu / later[3 - k] for k in (1, 2, 3)}
    gnn |= {"head": 1 / 7, "first": 1 / 7 / relu / (later[2] * (1 + relu) / 2)}
    heads = {name: {"head": 1 / mass} for name, mass in (           # stem 1, blocks 20 or 5, head 1
        ("resnet20", 22), ("resnet34", 22), ("resnet50", 22), ("vgg16", 22), ("vit", 7), ("swin", 7))}
    known = heads | {"gnn": gnn, "densenet121": {"head": 1 / 22, "conv": 1 / 22}}
    for name in cifar_train.MODELS.keys() - cifar_train.NO_TREE.keys():
        check(image_model(f"--width 4 --model {name}" + " --depth 3" * (name == "gnn")), known.get(name, {}), name)
    check(small_translator(modular=True), {"target": 1 / 12}, "translator")         # 5, 5, 1 and the tied head 1
    check(nanogpt_train.ModularGPT(11, 3, 2, 8, 16, 0.0), {"head": 1 / 7, "blocks.2.down": 6 * 5 / 18 / 7}, "modular")
    for name, keys in (("vmamba", ("A_log", "D", "delta.bias")), ("swin", ("mixer.bias",))):
        some = [p for key, p in image_model(f"--width 4 --model {name}").named_parameters() if key.endswith(keys)]
        assert some and all(p.dim() == 1 for p in some), f"{name}'s {keys} would turn"


def test_translate_model():
    """The network is torch's own layers in float64, between tied embeddings and positions by the formula; its weights
    start as Glorot says; with dropout 1 nothing of the text is left; no token sees a later one or padding; the loss is
    the mean over the tokens that are no padding, smoothing gives every token its part."""
    C, source, target = 16, torch.tensor([[0, 3, 5, 1], [2, 4, 6, 6]]), torch.tensor([[7, 1, 2], [7, 5, 6]])
    angle = np.arange(4)[:, None] / 10000 ** (np.arange(C // 2) / (C // 2 - 1))
    where = torch.from_numpy(np.hstack([np.sin(angle), np.cos(angle)]))
    close(translate_train.positions(1, 3, C, "cpu").double(), where[1:], 1e-6, "positions")

    def twin(kind, layer):
        parts = {"linear1.": [layer.up], "linear2.": [layer.down]}
        parts |= {f"norm{i}.": [norm] for i, norm in enumerate(layer.norms, 1)}
        for name, ours in (("self_attn", layer.attention), ("multihead_attn", layer.cross)):
            if ours:
                parts |= {f"{name}.in_proj_": [ours.q, ours.k, ours.v], f"{name}.out_proj.": [ours.out]}
        return torchs(kind, 2, parts)
    model = small_translator().double()
    h = model.source.weight[source] * C**0.5 + where
    for layer in model.encoder:
        h = twin(nn.TransformerEncoderLayer, layer)(h, src_key_padding_mask=source == 6)
    memory, h = h, model.target.weight[target] * C**0.5 + where[:3]
    for layer in model.decoder:
        h = twin(nn.TransformerDecoderLayer, layer)(
            h, memory, tgt_mask=torch.ones(3, 3).triu(1).bool(), memory_key_padding_mask=source == 6)
    logits, y = h @ model.target.weight.T, torch.tensor([[0, 1, 8], [3, 8, 6]])
    with unittest.mock.patch.object(translate_train, "positions", lambda _, count, *others: where[:count]):
        close(model(source, target), logits, 1e-9, "logits")            # the script's positions are float32
        for smoothing in (0.0, 0.1):
            by_hand = F.cross_entropy(logits.flatten(0, 1)[:5], y.flatten()[:5], label_smoothing=smoothing)
            close(translate_train.loss_of(model, 6, source, target, y, smoothing), by_hand, 1e-9, "loss")
    model, h = small_translator(dropout=1.0).train(), torch.zeros(C)
    for layer in model.decoder:
        for norm in layer.norms:
            h = norm(h)
    close(model(source, target), (h @ model.target.weight.T).expand(2, 3, -1), 1e-5, "dropout 1")
    model = translate_train.Translator(999, 0, 1, 2, 64, 192, 0.0, False)
    for name, rms in (("source", 1 / 8), ("target", 1 / 8), ("encoder.0.attention.q", 128**-0.5),
                      ("decoder.0.cross.v", 128**-0.5), ("decoder.0.cross.out", 64**-0.5),
                      ("decoder.0.up", 128**-0.5)):
        assert abs(model.get_submodule(name).weight.square().mean().sqrt().item() / rms - 1) < 0.05, name
    for flags, rows in (("", 1), ("--opt modular_adam", math.sqrt(128))):
        model = translate_train.make_model(settled(translate_train, flags), translate_train.BytePairs([]))
        close(model.source.weight.norm(dim=1).mean(), rows, 0.02, "rows of a modular network have norm sqrt(C)")


def test_translate_bleu():
    """BLEU equals sacrebleu 2.6.0 (nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp), whose figures stand here."""
    plain = (["The cat sat on the mat.", 'He said: "It costs $3.50, not 4,000-odd!"',
              "the twenty-first of March nineteen eighty-three", "A man, a plan & a canal (1904-1914)."],
             ["The cat is sitting on the mat.", 'He said, "it costs $3.50, not 4,000-odd."',
              "the twenty-first of March nineteen eighty-three", "A man, a plan and a canal: 1904-1914."])
    short = (["half past seven", "It's 5 o'clock", " ", " no match here at all"],
             ["half past eight", "It is five o'clock", "x", "something completely different was said"])
    signs = (["&quot;Tom&amp;Jerry&quot; don't run.", "Zürich (pop. 400,000) is big...", "1,5 or 2.5?"],
             ['"Tom & Jerry" do not run.', "Zürich (pop. 400.000) is large.", "1.5 or 2,5?"])
    both = tuple(a + b for a, b in zip(plain, signs))
    for (ours, right), score in ((plain, 54.8959), (short, 11.9791), (signs, 37.4783), (both, 49.1775),
                                 ((["half past"], ["half past seven in the evening"]), 0.0)):
        assert abs(translate_train.bleu(ours, right) - score) < 1e-4, (ours, score)
    assert abs(translate_train.bleu(plain[1], plain[1]) - 100) < 1e-9


# ---- The test beds of the root-free paper ----------------------------------------------------------------------------


def bed(flags):
    """An image model in float64, in eval mode, with weights so large that every part of it shows."""
    torch.manual_seed(0)
    model = image_model(flags).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def windows_by_hand(mixer, x, query, shifted, queried):
    """Pixel by pixel: in which window does it lie, which pixels of the image are in it, and what do these say?"""
    B, H, W, C = x.shape
    heads, shift, out = mixer.heads, 2 if shifted and H > 4 else 0, torch.zeros_like(x)
    table = mixer.bias.view(heads, 7, 7)            # offsets -3 to 3, from the one that is seen to the one that sees
    qkv, query = linear(mixer.qkv, x).view(B, H, W, -1, heads, C // heads), query.view(B, 4, 4, heads, C // heads)
    for i, j in itertools.product(range(H), range(W)):
        top, left = (i - shift) // 4 * 4 + shift, (j - shift) // 4 * 4 + shift
        rows, columns = (torch.arange(max(a, 0), min(a + 4, H)) for a in (top, left))
        q = query[:, i - top, j - left] if queried else qkv[:, i, j, 0]                     # (B, heads, c)
        k, v = (qkv[:, rows][:, :, columns, n - queried].flatten(1, 2) for n in (1, 2))     # (B, up to 16, heads, c)
        score = torch.einsum("bhc,bnhc->bhn", q, k) / math.sqrt(C // heads)
        score = score + table[:, i - rows + 3][:, :, j - columns + 3].flatten(1)
        out[:, i, j] = torch.einsum("bhn,bnhc->bhc", score.softmax(2), v).flatten(1)
    return linear(mixer.out, out)


def depthwise_by_hand(conv, x):
    """x (B, H, W, C): each channel with its own filter."""
    channels = [F.conv2d(x[..., [c]].movedim(3, 1), conv.weight[[c]], padding="same") for c in range(x.shape[-1])]
    return torch.cat(channels, 1).movedim(1, 3) + (0 if conv.bias is None else conv.bias)


def focal_by_hand(mixer, x, query):
    C = x.shape[-1]
    z = linear(mixer.split, x)
    q, context, gates, total = z[..., :C], z[..., C:2 * C], z[..., 2 * C:], 0
    for level, conv in enumerate(mixer.convs):
        context = F.gelu(depthwise_by_hand(conv, context))
        total = total + gates[..., level, None] * context
    total = total + gates[..., 2, None] * F.gelu(context.mean((1, 2)))[:, None, None]
    return linear(mixer.out, q * linear(mixer.mix, total))


def selective_scan_by_hand(mixer, x, query):
    """One order after the other, one pixel after the other."""
    B, H, W, C = x.shape
    u, y, rank = F.silu(depthwise_by_hand(mixer.conv, linear(mixer.enter, x))), torch.zeros_like(x), mixer.rank
    rows = [(i, j) for i in range(H) for j in range(W)]
    columns = [(i, j) for j in range(W) for i in range(H)]
    for d, order in enumerate((rows, columns, rows[::-1], columns[::-1])):
        mine, state = slice(d * C, (d + 1) * C), torch.zeros(B, C, dtype=x.dtype)
        select = mixer.select.weight[d * (rank + 2):(d + 1) * (rank + 2), :, 0]
        for i, j in order:
            z = u[:, i, j] @ select.T               # (B, rank + 2)
            delta = z[:, :rank] @ mixer.delta.weight[mine, :, 0].T + mixer.delta.bias[mine]
            delta = torch.log1p(torch.exp(delta))
            state = torch.exp(-delta * mixer.A_log[mine].exp()) * state + delta * z[:, rank, None] * u[:, i, j]
            y[:, i, j] += z[:, rank + 1, None] * state + mixer.D[mine] * u[:, i, j]
    return linear(mixer.out, F.layer_norm(y, (C,), mixer.norm.weight, mixer.norm.bias))


@torch.no_grad()
def test_cifar_beds():
    """Swin, GCViT, FocalNet and VMamba equal their mixers written out pixel by pixel, and the pyramid around them;
    DenseNet its layers."""
    by_hand = {"swin": lambda mixer, x, q, i: windows_by_hand(mixer, x, q, i % 2 == 1, False),
               "gcvit": lambda mixer, x, q, i: windows_by_hand(mixer, x, q, False, i % 2 == 1),
               "focalnet": lambda mixer, x, q, i: focal_by_hand(mixer, x, q),
               "vmamba": lambda mixer, x, q, i: selective_scan_by_hand(mixer, x, q)}
    x = normal(5, 2, 3, 32, 32)
    for name, mix in by_hand.items():
        model = bed(f"--model {name} --width 4 --depth 2 --gains 1")
        h = x.permute(0, 2, 3, 1)
        for stage, blocks in enumerate(model.stages):
            h, merge = model.norms[stage](h) if stage else h, model.merges[stage]
            h = sum(h[:, a::2, b::2] @ merge.weight[:, :, a, b].T for a in (0, 1) for b in (0, 1)) + merge.bias
            side = h.shape[1] // 4
            query = torch.stack([h[:, i * side:(i + 1) * side, j * side:(j + 1) * side].mean((1, 2))
                                 for i in range(4) for j in range(4)], 1).view(2, 4, 4, -1)
            if name == "gcvit":
                query = linear(model.queries[stage], query)
            for i, block in enumerate(blocks):
                assert block.norm1.weight.shape == (4 * 2**stage,) and h.shape[1:3] == (16 >> stage, 16 >> stage)
                expected = mix(block.mixer, block.norm1(h), query, i)
                close(block.mixer(block.norm1(h), query), expected, 1e-9, f"{name}: mixer {i} of stage {stage}")
                h = h + expected
                h = h + linear(block.down, F.gelu(linear(block.up, block.norm2(h))))
        close(model(x), linear(model.head, model.norm(h).mean((1, 2))), 1e-9, name)

    x, model = normal(7, 2, 3, 32, 32), bed("--model densenet121 --width 3 --depth 6").train()

    def conv(layer, h):                             # norm, relu, convolution
        norm, _, filters = layer
        h = F.relu(F.batch_norm(h, None, None, norm.weight, norm.bias, training=True))
        return F.conv2d(h, filters.weight, padding="same")
    h, layers = F.conv2d(x, model.conv.weight, padding=1), iter(model.layers)
    for stage, count in enumerate((6, 12, 24, 16)):
        if stage:
            h, channels = F.avg_pool2d(conv(next(layers)[:3], h), 2), h.shape[1]
            assert h.shape[1] == channels // 2
        for layer in itertools.islice(layers, count):
            h = torch.cat([h, conv(layer[3:], conv(layer[:3], h))], 1)
    h = F.relu(F.batch_norm(h, None, None, model.norm.weight, model.norm.bias, training=True)).mean((2, 3))
    close(model(x), linear(model.head, h), 1e-7, "densenet121")


def test_cifar_graph_network():
    """A^ has spectral norm 1 and equals edges counted one by one; the network equals sums over edges."""
    x, model = normal(8, 2, 3, 32, 32), bed("--model gnn --width 6 --depth 3 --gains 1")
    nodes, average = model.graph(x)
    corners = [(4 * i, 4 * j) for i in range(8) for j in range(8)]
    for image, found, known in zip(x, average, nodes):
        patches = [image[:, i:i + 4, j:j + 4] for i, j in corners]
        places = [torch.tensor([i, j]) / 14 - 1 for i, j in corners]        # -1 to 1
        points = [torch.cat([patch.mean((1, 2)), 4 * place]) for patch, place in zip(patches, places)]
        edges = {(n, n) for n in range(64)}
        for n in range(64):
            nearest = sorted(range(64), key=lambda m: (points[n] - points[m]).norm().item())
            edges |= {pair for m in nearest[1:9] for pair in ((n, m), (m, n))}
        degree = [sum((n, m) in edges for m in range(64)) for n in range(64)]
        by_hand = torch.tensor([[((n, m) in edges) / math.sqrt(degree[n] * degree[m]) for m in range(64)]
                                for n in range(64)], dtype=torch.float64)
        close(found, by_hand, 1e-12, "A^")
        close(torch.linalg.matrix_norm(found, 2), 1.0, 1e-12, "its spectral norm")
        close(known, torch.stack([torch.cat([patch.flatten(), place]) for patch, place in zip(patches, places)]), 1e-6,
              "what a node knows")
    h = F.relu(linear(model.first, nodes))
    for norm, layer in zip(model.norms, model.layers):
        messages = torch.stack([sum(average[:, n, m, None] * norm(h)[:, m] for m in range(64)) for n in range(64)], 1)
        h = h + F.relu(linear(layer, messages))
    close(model(x), linear(model.head, model.norms[-1](h).mean(1)), 1e-9, "sums over edges")


def test_cifar_scan():
    """The selective scan equals its recurrence to 6 digits in float32; a is close to 1 over 256 steps, close to 0, and
    exactly 0. Under autocast to bfloat16 it computes in float32."""
    for low, high in ((0.99, 1.0), (0.0, 1e-30), (0.0, 0.0), (0.0, 1.0)):
        a = torch.rand(3, 256, 5, dtype=torch.float64) * (high - low) + low
        b, expected = normal(10, 3, 256, 5), [torch.zeros(3, 5).double()]
        for t in range(256):
            expected.append(a[:, t] * expected[-1] + b[:, t])
        close(cifar_train.scan(a.float(), b.float()), torch.stack(expected[1:], 1), 1e-6, f"a from {low} to {high}")
    with unittest.mock.patch.object(cifar_train, "scan", wraps=cifar_train.scan) as scan, \
            torch.autocast("cpu", torch.bfloat16):
        image_model("--model vmamba --width 4 --depth 1")(normal(11, 2, 3, 32, 32, dtype=torch.float32))
    assert {x.dtype for call in scan.call_args_list for x in call.args} == {torch.float32}


def test_scripts_beds_resume():
    """Every bed, killed in mid-run, goes on from its checkpoint and ends with the bits of a run left alone."""
    beds = [(nanogpt_train, "--arch", "lstm")] + [(cifar_train, "--model", name, "--depth", "2") for name in (
        "gnn", "densenet121", "swin", "gcvit", "focalnet", "vmamba")]
    for script, *model in beds:
        with temporary_folder() as folder:
            flags = "--steps 8 --batch_size 4 --eval_every 8 --save_every 3 --opt rotational_adamw".split()
            flags = [*tiny(script, folder), *model, *flags]
            succeed(script, *flags, "--out_dir", folder / "calm")
            run_fork(script, folder, *flags, "--out_dir", "killed", status=(-signal.SIGKILL,), event="step", number=6,
                     act=signal.SIGKILL)
            assert checkpoint(folder / "killed")["step"] == 3, model
            succeed(script, *flags, "--out_dir", folder / "killed", "--resume")
            same_run(folder / "calm", folder / "killed")


# ---- sweep.py --------------------------------------------------------------------------------------------------------

# A training script in miniature: the same flags, files and exit statuses as the real ones, but it starts at once.
# Its loss is a recurrence over the steps, so that one that is lost or done twice shows. `starts` counts its starts.
TOY = '''
import argparse, json, math, os, pathlib, signal, sys, time
p = argparse.ArgumentParser()
p.add_argument("--lr", type=float, default=0.01), p.add_argument("--weight_decay", type=float, default=0.0)
p.add_argument("--seed", type=int, default=1), p.add_argument("--steps", type=int, default=10)
p.add_argument("--betas"), p.add_argument("--device"), p.add_argument("--out_dir")
p.add_argument("--resume", action="store_true")
a = p.parse_args()
out = pathlib.Path(a.out_dir)
out.mkdir(parents=True, exist_ok=True)
print("x", end="", file=open(out / "starts", "a"))
(out / "where").write_text(" ".join(os.environ.get(key, "-") for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")))
stop = []
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
s = json.loads((out / "ckpt.pt").read_text()) if a.resume else vars(a) | {"step": 0, "x": 0.0}
if s["lr"] == 666:
    print("toy_train.py: --lr 666 is evil: choose another", file=sys.stderr)
    sys.exit(2)
while s["step"] < s["steps"]:
    s["step"] += 1
    s["x"] = 0.9 * s["x"] + math.sin(s["step"] * s["lr"] + s["seed"])
    if s["lr"] > 1 and s["step"] == 3:
        print("toy_train.py: the loss is nan at step 3: training diverged. Try a smaller --lr", file=sys.stderr)
        sys.exit(3)
    time.sleep(0.02)
    (out / "part").write_text(json.dumps(s))
    os.replace(out / "part", out / "ckpt.pt")
    if stop and s["step"] < s["steps"] and s["betas"] != "deaf":
        sys.exit(143)
loss = (math.log10(s["lr"]) + 2) ** 2 + s["weight_decay"] + 0.01 * s["x"]
(out / "log.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in (
    {"step": 0, "val_loss": 9.0}, {"step": 1, "rotation": {}}, {"step": s["step"], "val_loss": loss, "final": True})))
'''
TOYS, nan = "--script toy_train.py --jobs 2".split(), math.nan


def toy_sweep(folder, line, status=0):
    """A sweep of the toy to its end -> (stdout, stderr)."""
    return run_script(sweep, folder, *TOYS, *shlex.split(line), status=status)


@contextlib.contextmanager
def folder_with_toy():
    with temporary_folder() as folder:
        (folder / "toy_train.py").write_text(TOY)
        yield folder


def toy_loss(lr, weight_decay=0.0, seed=1, steps=10):
    """The last loss of the toy, computed here."""
    x = 0.0
    for step in range(1, steps + 1):
        x = 0.9 * x + math.sin(step * lr + seed)
    return (math.log10(lr) + 2) ** 2 + weight_decay + 0.01 * x


def starts(folder):
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/starts")}


def toy_lab(folder, **changes):
    """A Lab whose runs are in folder/out."""
    return sweep.Lab(types.SimpleNamespace(**dict(
        out_dir=folder / "out", jobs=2, metric=None, seeds=None, scale="cpu", retry=None, keep_checkpoints=None,
        experiment=None, report=None, print_commands=None) | changes))


def imagined(loss, opt="x", log=(), metric="val_loss", **flags):
    """A sweep.Result with this loss (nan: diverged) and log."""
    run = sweep.Run.of("nanogpt_train.py", {"opt": opt} | flags)
    result = sweep.Result(run, pathlib.Path(run.name), "diverged" if math.isnan(loss) else "done", "", metric, loss)
    result.log = lambda: log
    return result


class ImaginedLab:
    """Gives the experiments results that we make up: loss(flags) is the loss or accuracy, nan if it diverged, and
    log(flags) the lines of the log."""
    asked, out_dir = (), pathlib.Path("imagined")

    def __init__(self, loss, log=None, seeds=None, runs=None):
        self.loss, self.log = loss, log or (lambda flags: [{"train_loss": loss(flags)}])
        self.args = types.SimpleNamespace(scale="cpu", seeds=seeds, print_commands=False, runs=runs)

    def result(self, run):
        flags, metric = dict(run.flags), "val_loss" if run.script == "nanogpt_train.py" else "val_acc"
        return imagined(self.loss(flags), log=self.log(flags), metric=metric, **flags)

    def results(self, runs):
        return [self.result(run) for run in runs]


def write_run(home, records, **config):
    home.mkdir(parents=True)
    (home / "config.json").write_text(json.dumps(config))
    (home / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_sweep_values():
    """Ranges are numpy's. Draws stay in their space, fill it evenly, repeat, and begin alike however many there are.
    Every published space is one of flags that cifar_train.py or the optimizer takes."""
    for text, expected in (("1e-4:1e-1:log7", np.geomspace(1e-4, 1e-1, 7)), ("0:1:lin5", np.linspace(0, 1, 5)),
                           ("0,1e-3:10:log5,70", [0, *np.geomspace(1e-3, 10, 5), 70])):
        assert np.allclose([float(x) for x in sweep.grid_values(text, "")], expected, rtol=1e-5, atol=0), text
    assert sweep.grid_values("(0.9,0.95),(0.9, 0.99),adamw,0.10", "") == ["(0.9,0.95)", "(0.9, 0.99)", "adamw", "0.1"]
    assert sweep.grid_flags("lr,weight_decay", "(1e-3,1),(0.1, 0.01)") == [
        {"lr": "0.001", "weight_decay": "1"}, {"lr": "0.1", "weight_decay": "0.01"}]
    spaces = sweep.parse_space(["a=log(1e-4,1e-1) b=uniform(-1, 3)", "c=choice(x, y,1.50) d=one_minus_log(1e-4,1e-1)"])
    draws = sweep.draws(spaces, 600, seed=3)
    assert draws == sweep.draws(spaces, 600, seed=3) and draws[:20] == sweep.draws(spaces, 20, seed=3)
    assert draws[:20] != sweep.draws(spaces, 20, seed=4) and draws[:20] != sweep.draws(spaces, 20, seed=3, stage=2)
    a, b, d = (np.array([float(flags[key]) for flags in draws]) for key in "abd")
    uniform = np.log10(a / 1e-4) / 3, (b + 1) / 4, np.log10((1 - d) / 1e-4) / 3
    for key, x in zip("abd", uniform):              # the Kolmogorov-Smirnov distance: below 0.08 in all but 0.1 %
        assert np.abs(np.sort(x) - (np.arange(600) + 0.5) / 600).max() < 0.08, key
    assert np.abs(np.corrcoef(uniform) - np.eye(3)).max() < 0.15
    assert all(150 < sum(flags["c"] == c for flags in draws) < 250 for c in ("x", "y", "1.5"))
    assert sweep.Space("choice", ("a", "b", "c")).around(["c", "a", "c"]) == sweep.Space("choice", ("a", "c"))
    assert spaces["d"].around(["0.9", "0.99", "0.9995"]) == sweep.Space("one_minus_log", (0.0005, 0.1))
    for name in sweep.PAPER_SPACES:
        for flags in sweep.draws(sweep.parse_space([name]), 3, seed=0):
            run = sweep.Run.of("cifar_train.py", flags | {"opt": name.rpartition(":")[2]})
            cifar_train.make_optimizer(settled(cifar_train, *run.command(pathlib.Path("x"))[2:]), nn.Linear(3, 3))


def test_sweep_commands():
    """A run's name does not depend on how its flags are written, and tells it from all others. Its command gives the
    optimizer what the script has no flag for, and resumes a checkpoint on the same device."""
    one = sweep.Run.of("nanogpt_train.py", {"lr": "1e-3", "opt": "sgd"})
    assert one.name == sweep.Run.of("nanogpt_train.py", {"opt": "sgd", "lr": 0.001}).name
    for script, lr in (("nanogpt_train.py", 0.002), ("cifar_train.py", 0.001), ("else/nanogpt_train.py", 0.001)):
        assert one.name != sweep.Run.of(script, {"opt": "sgd", "lr": lr}).name, "two runs in one folder"
    run = sweep.Run.of("nanogpt_train.py", {"lr": "1e-3", "damping": "1e-6", "graft": "sgd", "dtype": "float32",
                                            "device": "cpu", "opt_kwargs.dtype": "bfloat16"})
    with temporary_folder() as folder:
        assert run.command(folder)[1:] == [
            str(sweep.HERE / "nanogpt_train.py"), "--device=cpu", "--dtype=float32", "--lr=0.001", "--opt_kwargs",
            "damping=1e-06", "graft=sgd", "dtype=bfloat16", f"--out_dir={folder}"]
        (folder / "ckpt.pt").touch()
        assert run.command(folder)[2:] == ["--resume", "--device=cpu", f"--out_dir={folder}"]


def test_sweep_report():
    """The table has numpy's means and deviations, best first; what failed or diverged is named, never averaged away,
    and --retry runs what failed, and nothing else."""
    grid = "--grid lr=0.001,0.01,10,666 weight_decay,steps=(0,10),(0.5,10) --seeds 2 --fixed device=cpu --out_dir out"
    with folder_with_toy() as folder:
        toy_sweep(folder, grid, status=1)
        begun = starts(folder / "out")
        out, _ = toy_sweep(folder, grid, status=1)              # again: nothing left to do
        assert starts(folder / "out") == begun and set(begun.values()) == {1} and len(begun) == 16
        lines = out.splitlines()
        assert lines[0] == "16 runs of toy_train.py: 8 done, 4 diverged, 4 failed", lines[0]
        expected = sorted((np.mean(losses), np.std(losses, ddof=1), lr, decay) for lr in (0.001, 0.01)
                          for decay in (0, 0.5) for losses in [[toy_loss(lr, decay, seed) for seed in (1, 2)]])
        for line, (mean, deviation, lr, decay) in zip(lines[3:7], expected, strict=True):
            assert line.split() == [f"{mean:.4f}", "+-", f"{deviation:.4f}", "2", f"{lr:g}", f"{decay:g}"], line
        assert all(re.fullmatch(r"  - +0 +(10|666) +0(\.5)? +2 (diverged|failed)", line) for line in lines[7:11]), out
        assert len([line for line in lines if "*" in line]) == 1 and f"{expected[0][0]:.4f}*" in lines[12], lines[11:14]
        for pattern in ("failed: lr 666.* is evil.*", "diverged: lr 10.*nan at step 3: training diverged"):
            assert sum(bool(re.fullmatch(pattern, line)) for line in lines) == 4, out
        assert not list((folder / "out").glob("*/ckpt.pt")), "checkpoints of finished runs are to be deleted"
        (folder / "toy_train.py").write_text(TOY.replace('== 666', '== 667').replace('> 1 and', '== 10 and'))
        out, _ = toy_sweep(folder, f"{grid} --retry")
        assert "12 done, 4 diverged\n" in out and sorted(starts(folder / "out").values()) == [1] * 12 + [2] * 4, out


def test_sweep_order_of_results():
    """The order is by each metric's own sign, and what diverged with one seed comes last. Of two runs, one better on
    the test set, one on the validation set, --metric says which comes first. A copied folder is no further seed."""
    for metric, better, worse in (("bleu", 30, 20), ("test_acc", 0.9, 0.8), ("val_acc", 0.9, 0.8), ("val_loss", 1, 2)):
        results = [imagined(value, metric=metric, lr=value) for value in (worse, better)] + [imagined(nan, lr=0)]
        assert [s.mean for s in sweep.by_setting(results)][:2] == [better, worse], metric
    seeds = [imagined(1.0, lr=1, seed=1), imagined(nan, lr=1, seed=2), imagined(2.0, lr=2, seed=1)]
    assert [s.flags["lr"] for s in sweep.by_setting(seeds)] == ["2", "1"], "one of the better ones has diverged"
    with temporary_folder() as folder:
        for lr, last in {"1": dict(bleu=20, val_loss=0.5), "2": dict(bleu=10, val_loss=0.25), "3": dict(val_loss=nan),
                         "4": dict(val_loss=None), "5": dict(val_loss=0.75, final=False)}.items():
            run = sweep.Run.of("translate_train.py", {"lr": lr})
            write_run(folder / "out" / run.name, [{"val_loss": 0.1}, {"final": True} | last])
            toy_lab(folder).note(run)
        shutil.copytree(folder / "out" / run.name, folder / "out/copy")
        for flags, order in (((), "12"), (("--metric", "val_loss"), "21")):
            status, out, _ = call_main(sweep, "--report", "--out_dir", folder / "out", *flags)
            assert status == 1, "one has failed, one is unfinished"
            assert "5 runs of translate_train.py: 2 done, 1 diverged, 1 failed, 1 unfinished" in out, out
            assert "".join(line.split()[2] for line in out.splitlines()[3:5]) == order, out


def test_sweep_endings():
    """The state of a run by its exit status. A killed or stopped run keeps its checkpoint and goes on. A diverged or
    finished one needs none, one that ended without a result begins anew, and a failed one keeps it for --retry."""
    run = sweep.Run.of("toy_train.py", {"lr": 1})
    for status, done, keep, state, left in (
            *((status, False, False, "unfinished", True) for status in (130, 143, -2, -9, -15)),
            (3, False, False, "diverged", False), (3, False, True, "diverged", True), (1, False, False, "failed", True),
            (0, False, False, "failed", False), (0, True, False, "done", False), (0, True, True, "done", True),
            (-9, True, False, "done", False), (1, True, False, "done", False)):
        with temporary_folder() as folder:
            lab, home = toy_lab(folder, keep_checkpoints=keep), folder / "out" / run.name
            write_run(home, [{"val_loss": 1}, *[{"val_loss": 2, "final": True}] * done])
            (home / "ckpt.pt").touch()
            (home / "stderr.txt").write_text("toy_train.py: words. Advice\n")
            assert lab.ended(run, status).state == lab.result(run).state == state, (status, done)
            assert (home / "ckpt.pt").exists() == left, (status, done, keep)
            assert (home / "failed.json").exists() == (state in ("failed", "diverged")), status


def test_sweep_shares_the_machine():
    """As many runs at a time as --jobs says or as there are GPUs, each on its own; without them each has one thread."""
    start = sweep.Lab.start
    for jobs, devices, most, where in ((None, ["3", "5"], 2, {"3 7", "5 7"}), (3, ["3", "5"], 3, {"3 7", "5 7"}),
                                       (2, [], 2, {"- 1"})):
        alive, counts = [], []

        def counted(lab, run, gpu):
            alive[:] = [process for process in [*alive, start(lab, run, gpu)] if process.poll() is None]
            counts.append(len(alive))
            return alive[-1]

        environment = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "OMP_"))}
        with folder_with_toy() as folder, unittest.mock.patch.multiple(sweep, gpus=lambda: devices), \
                unittest.mock.patch.object(sweep.Lab, "start", counted), contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()), unittest.mock.patch.dict(
                    os.environ, environment | ({"OMP_NUM_THREADS": "7"} if devices else {}), clear=True):
            runs = [sweep.Run.of(folder / "toy_train.py", {"seed": seed}) for seed in range(5)]
            toy_lab(folder, jobs=jobs).results(runs)
            assert max(counts) == most, (jobs, devices)
            assert {path.read_text() for path in folder.glob("out/*/where")} == where, (jobs, devices)
    for visible, count, names in (("3,5,7", 2, ["3", "5"]), ("", 2, ["0", "1"]), ("", 0, [])):
        with unittest.mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=visible), \
                unittest.mock.patch("torch.cuda.device_count", lambda: count):
            assert sweep.gpus() == names


def test_sweep_killed_at_any_moment():
    """Killed by SIGKILL six times, a sweep gives the report of one never killed, and each run was started exactly once:
    the next sweep waits for the orphans of the last."""
    chance = random.Random(0)

    def begin_and_kill(folder, line):
        before, process = starts(folder / "killed"), start_script(sweep, folder, *TOYS, *line.split())
        while starts(folder / "killed") == before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()

    grid = "--grid lr=0.001:1:log8 weight_decay=0,0.1 --fixed steps=20 device=cpu --out_dir"
    with folder_with_toy() as folder:
        toy_sweep(folder, f"{grid} calm")
        for _ in range(6):                          # two runs have begun each time, of 16
            begin_and_kill(folder, f"{grid} killed")
        toy_sweep(folder, f"{grid} killed")
        assert [*starts(folder / "killed").values()] == [1] * 16
        calm, killed = (toy_sweep(folder, f"{grid} {which} --report")[0] for which in ("calm", "killed"))
        assert calm == killed and "16 done" in calm, (calm, killed)
        one = "--fixed lr=0.1 steps=200 device=cpu --out_dir killed"            # it outlives its sweep for sure
        begin_and_kill(folder, one)
        _, err = toy_sweep(folder, one)
        assert "waiting for another sweep" in err and set(starts(folder / "killed").values()) == {1}, err


def test_sweep_stops_on_signal():
    """The first SIGTERM ends the runs after they have saved, a second one kills those that do not listen; the same
    command resumes them and gives the same report."""
    for betas, signals in (("", 1), ("betas=deaf", 2)):
        grid = f"--grid lr=0.01,0.1 --fixed steps=60 device=cpu {betas} --out_dir"
        with folder_with_toy() as folder:
            calm, _ = toy_sweep(folder, f"{grid} calm")
            process = start_script(sweep, folder, *TOYS, *f"{grid} out".split())
            while len(list((folder / "out").glob("*/ckpt.pt"))) < 2:
                time.sleep(0.02)
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 143 and "0 of 2 runs are finished" in out, (process.returncode, out, err)
            left = [path.read_text() for path in folder.glob("out/*/ckpt.pt")]
            time.sleep(0.5)                         # a run that is still alive would go on
            assert left == [path.read_text() for path in folder.glob("out/*/ckpt.pt")], "a run is alive"
            assert all(json.loads(x)["step"] < 60 for x in left), left
            resumed, _ = toy_sweep(folder, f"{grid} out")
            assert sorted(calm.splitlines()) == sorted(resumed.splitlines())


def test_sweep_printed_commands():
    """--print_commands | xargs sh -c, then --report, gives the table that the sweep itself gives; what diverged there
    is unfinished until the sweep finds out. Of a search in two stages the first is printed, and it says so."""
    grid = """--grid lr=0.01,0.1,10 "betas=(0.9, 0.95),it's" --fixed device=cpu --out_dir"""
    with folder_with_toy() as folder:
        table, _ = toy_sweep(folder, f"{grid} whole")
        commands, err = toy_sweep(folder, f"{grid} parts --print_commands")
        assert len(commands.splitlines()) == 6 and "sweep.py" not in commands and not err
        assert not starts(folder / "parts")
        subprocess.run("tr '\\n' '\\0' | xargs -0 -P2 -I{} sh -c {}", shell=True, input=commands, text=True, cwd="/",
                       capture_output=True)
        parts, _ = toy_sweep(folder, f"{grid} parts --report", status=1)
        assert "4 done, 2 unfinished" in parts and set(starts(folder / "parts").values()) == {1}, parts
        again, _ = toy_sweep(folder, f"{grid} parts")
        assert again.splitlines()[-12:] == table.splitlines()[-12:] and "4 done, 2 diverged" in again, again
        assert toy_sweep(folder, f"{grid} parts --print_commands")[0] == ""
        commands, err = toy_sweep(folder, "--two_stage --runs 3 --space 'lr=log(1e-4,1)' --print_commands")
        assert len(commands.splitlines()) == 3 and "print again" in err, err


def test_sweep_two_stage():
    """The second stage draws from the smallest box around the best fifth of the first. The best of both is done again
    with three fresh seeds, and a best value near the edge of its range is named."""
    space = "lr=log(1e-4,1) weight_decay=uniform(0,1)"
    with folder_with_toy() as folder:
        said, _ = toy_sweep(folder, f"--two_stage --runs 15 --space '{space}' --fixed device=cpu steps=2 --seed 4 "
                                    "--out_dir out")
        rows = [json.loads(path.read_text())["flags"] for path in (folder / "out").glob("*/run.json")]
        assert len(starts(folder / "out")) == len(rows) == 33

    def losses(rows):
        pairs = [(float(row["lr"]), float(row["weight_decay"])) for row in rows if "seed" not in row]
        return {pair: toy_loss(*pair, steps=2) for pair in pairs}

    first, both = losses(sweep.draws(sweep.parse_space([space]), 15, seed=4)), losses(rows)
    second, best = np.array(list(both.keys() - first.keys())), np.array(sorted(first, key=first.get)[:3])
    assert len(second) == 15 and (best.min(0) <= second).all() and (second <= best.max(0)).all()
    lr, weight_decay = min(both, key=both.get)
    fresh = [toy_loss(lr, weight_decay, seed, 2) for seed in (1, 2, 3)]
    assert f"fresh seeds: {np.mean(fresh):.4f} +- {np.std(fresh, ddof=1):.4f}" in said, said
    assert weight_decay < 0.05 and f"look beyond it: weight_decay {weight_decay:g}\n" in said, said
    for text, edge, inside in (("log(1e-4,1)", "0.00012", "0.0002"), ("uniform(-1,1)", "0.95", "0.8"),
                               ("one_minus_log(1e-3,0.1)", "0.9989", "0.998"), ("choice(1,2)", None, "1")):
        space = sweep.parse_space([f"x={text}"])["x"]
        assert not space.near_edge(inside) and (edge is None or space.near_edge(edge)), text


# Flags, or several of them; what the line must hold.
SWEEP_BAD = (
    ("", "nothing to run"), ("--grid lr; --grid lr=; --fixed lr,weight_decay=(1,2)", "KEY=VALUE"),
    ("--grid --lr=1", "--grid"), ("--grid lr=1e-4:1e-1", "log8"), ("--grid lr=1:2:log1", "at least 2"),
    ("--grid lr=0:1:log3; --random 2 --space lr=log(0,2); --random 2 --space lr=one_minus_log(0,0.5)", "above 0"),
    ("--random 2 --space beta1=one_minus_log(0.1,1.5)", "below 1"), ("--grid lr=1,,2", "comma"),
    ("--grid weight_decay=1:1e400:lin3", "from one number"), ("--random 2 --space lr=uniform(2,1)", "a larger one"),
    ("--grid lr=1 --grid lr=2; --grid lr,weight_decay=(1,2) --grid lr=2", "lr twice"),
    ("--random 2 --space 'paper:cnn:sgd lr=log(1,2)'", "lr twice"), ("--grid lr=1 --fixed lr=1", "once"),
    ("--grid opt_kwargs.seed=1,2 --fixed opt_kwargs.seed=3", "twice"), ("--grid out_dir=x", "own folder"),
    ("--grid lr,weight_decay=(1,2),(3)", "a value for each key"), ("--grid learning_rat=1", "neither a flag"),
    ("--grid lr=1 --seeds 2 --fixed seed=1", "--seeds"), ("--fixed opt_kwargs=damping=1", "as KEY=VALUE"),
    ("--grid lr=1 --random 3", "not allowed with"), ("--random 3", "--space"), ("--random 2 --space lr=3", "log(a,b)"),
    ("--random 2 --space paper:cnn:lion", "paper:cnn:rf_rmsprop"), ("--grid lr=1 --space lr=log(1,2)", "--random"),
    ("--grid lr=1 --runs 10", "--two_stage"), ("--two_stage --runs 0 --space lr=log(1,2)", "--runs 0"),
    ("--experiment warmup --runs 8", "leave out --runs"), ("--experiment warmpu", "warmup"),
    ("--grid lr=1 --seed 1; --grid lr=1 --seed 0", "--random"), ("--curves x --jobs 2", "--jobs"),
    ("--experiment warmup --grid lr=1", "--grid"), ("--experiment warmup --fixed lr=1", "--fixed"),
    ("--experiment warmup --print_commands --plot x.png", "leave out --plot"), ("--curves no/such", "no log.jsonl"),
    ("--experiment second_order --print_commands", "has no runs"),
    ("--grid lr=1 --scale gpu; --grid lr=1 --scale cpu", "--experiment"),
    ("--grid lr=1 --script nanogtp_train.py", "no such file"),
    (f"--grid lr=1 --script {sys.executable}", "in Python"), ("--grid lr=1 --plot x.exe", ".png"),
    ("--grid lr=1 --plot no/such/x.png", "a folder that exists"), ("--report --out_dir no/such", "no runs"),
    ("--grid lr=1 --print_commands --report", "--report"), ("--grid lr=1 --jobs 0", "at least 1"),
    ("--random 2 --space lr=log(1,2) --seed=-1", "at least 0"), ("--grid lr=1 --lr 3", "unknown flag --lr"),
    ("--gird lr=1", "did you mean --grid?"), ("--grid lr=1 --out_dir ''; --grid ''", "is empty"),
    ("--grid lr=1e-300:1e300:log3 weight_decay=-1e308:1e307:lin100000 --seeds 9", "million"))


def test_sweep_bad_input():
    """Every bad argument: exit status 2 and one line that names it, and no run is started."""
    problems = []
    with temporary_folder() as folder, contextlib.chdir(folder):
        for line, message in SWEEP_BAD:
            for words in map(shlex.split, line.split("; ")):
                with collected(problems):
                    check_refused(sweep, folder, words, message)
        assert not os.listdir("."), "nothing should have been written"
    assert not problems, "\n".join(problems)


def test_sweep_experiments_ask_for_runs_that_exist():
    """Every flag that a named experiment uses is known to its script, at both scales, and takes its values; --seeds
    shifts all seeds, and seed 0, which tunes, never decides."""
    kinds = {}
    with temporary_folder() as folder, contextlib.chdir(folder):
        for name, scale in itertools.product(sweep.EXPERIMENTS.keys() - {"second_order"}, ("cpu", "gpu")):
            out = succeed(sweep, "--experiment", name, "--scale", scale, "--print_commands")
            assert out, name
            for words in map(shlex.split, out.splitlines()):
                change = words[3].partition("=")[0] if "--change" in words else None
                assert change is None or change in sweep.CHANGES
                script, *flags = words[4 if change else 1:]
                kinds[script, re.sub(r"=[\d.e-]+( |$)", "", " ".join(flags[:-1]))] = flags
    assert len({script for script, _ in kinds}) == 2
    for (script, _), flags in kinds.items():
        script = importlib.import_module(pathlib.Path(script).stem)
        with unittest.mock.patch.object(script, "pick_device", lambda name: name):
            script.settle(script.parse(flags))
    for seeds, seed, expected in ((2, 0, "30"), (2, 1, "31"), (None, 0, "10")):
        run = sweep.model_run(ImaginedLab(None, seeds=seeds), "gpt", seed, steps=7)
        assert (run["seed"], run["steps"], run["n_embd"]) == (expected, "7", "64"), "flags come before BASE's"


def test_sweep_changes():
    """An experiment's changes: the first tenth of the neurons turns 3 times as far, or each matrix by its own factor;
    the measured radial part is torch's; RMSProp's average starts at 1/B. The lab starts the real script with a change,
    and a run without one has the log of the script run by itself."""
    def changed(change, value):
        """A step after the change -> the probe's rows, weights before and after, the optimizer."""
        with contextlib.ExitStack() as stack:
            for kind, name in ((optim.Rotational, "move"), (optim.Rotational, "by_row"), (optim.rmsprop, "start"),
                               (optim, "RotationProbe")):
                stack.enter_context(unittest.mock.patch.object(kind, name, getattr(kind, name)))
            sweep.CHANGES[change](optim, value)
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 5))
            optimizer = optim.build("rmsprop" if change == "start" else "rotational_adamw", model, lr=0.1,
                                    weight_decay=0.1)
            weights = [layer.weight for layer in model]
            probe, before = optim.RotationProbe(optimizer), values(weights)
            model(torch.randn(4, 8)).square().sum().backward()
            probe.measure_next_step()
            optimizer.step()
            return probe.rows, before, weights, optimizer

    _, before, even, _ = changed("turn", "1")
    for value, factors in (("3", [[3] * 2 + [1] * 18, [3] + [1] * 4]), ("2,0.5", [[2] * 20, [0.5] * 5])):
        for old, a, b, factor in zip(before, changed("turn", value)[2], even, factors):
            close(angles(old, a).tan(), angles(old, b).tan() * torch.tensor(factor), 0.01, f"turn={value}")
    rows, before, weights, _ = changed("radial", "")
    for row, w, g in zip(rows, before, [w.grad for w in weights]):
        close(row["radial"], ((w * g).sum(1) / w.norm(dim=1) / g.norm(dim=1)).mean(), 1e-6, "radial part", scale=1)
    _, [before, _], [w, _], optimizer = changed("start", "16")
    close(optimizer.state[w]["square_avg"], 0.99 / 16 + 0.01 * (w.grad + 0.1 * before) ** 2, 1e-5, "1/B")

    flags = {key.strip("-"): value for key, value in zip(TINY[::2], TINY[1::2])} | dict(track=1, opt="rotational_adamw")
    runs = [sweep.Run.of("nanogpt_train.py", flags | {"device": "cpu"} | change)
            for change in ({}, {"change": "radial"}, {"change": "turn=3"})]
    with temporary_folder() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            plain, radial, turn = (read_log(result.folder) for result in toy_lab(folder).results(runs))
        succeed(nanogpt_train, *flags_of(**flags), "--out_dir", folder / "alone")
        assert plain == read_log(folder / "alone")
        radial, turn = (next(record["rotation"] for record in log if "rotation" in record)["blocks.0.up.weight"]
                        for log in (radial, turn))
        assert "radial" in radial and turn["angle"] > 1.1 * radial["angle"]


def rotation_log(f, **changes):
    """Two hidden matrices of ten are off, or three, and gradients are radial where they are; records with rotation
    alone stand between those with losses. changes: the same in every row."""
    three, lines = [("sgd", True, "angle"), ("lion", False, "norm")], [{"step": 0, "val_loss": 5.0}]
    for k in range(8):
        rows = {}
        for i, name in enumerate(["tokens.weight", "head.weight", *map("blocks.{}.up.weight".format, range(10))]):
            row = rows[name] = {"predicted_angle": 0.1, "predicted_norm": 4.0 if k > 5 else 99.0}
            for what in ("angle", "norm"):
                off = i < 4 + ((f["opt"], "model" in f, what) in three)
                factor = (0.5 if f["opt"] == "lion" else 1.3) if off else 0.8
                row[what] = row[f"predicted_{what}"] * (factor if k > 5 else 7.0)
            row["radial"] = (-0.02 if i % 2 else 0.02) * (i < 5) + 0.001
            row |= changes
        lines += [{"step": 50 * k, "rotation": rows}, {"step": 50 * k, "val_loss": 5.0 - k, "train_loss": 5.0 - k}]
    return lines


def turning_log(f):
    """Angles of four matrices in the second half: under adam the first is a quarter of the others, under adamw half."""
    least = {"adam": 0.1, "adamw": 0.2}.get(f["opt"], 0.4)
    rows = [{f"blocks.{i}": {"angle": angle, "predicted_angle": 0.1} for i, angle in enumerate(angles)}
            for angles in ((1, 2, 3, 4), (least, 0.4, 0.4, 0.4))]
    return [{"step": 0, "val_loss": 5.0}, *({"step": k, "rotation": rows[k > 3]} for k in range(8))]


def bowl(f, best):                                  # one minimum, at lr = best
    return 1.5 + 0.02 * math.log2(float(f["lr"]) / best) ** 2


TIMES = {sweep.HALF: (10, 1.0), sweep.FULL: (20, 2.0), sweep.SHAMPOO: (30, 3.0)}        # as sweep.step_times gives them


def by_rules(rules):
    """-> a function of flags: the number of the first rule that holds. Its words are flags, or flags=values."""
    def loss(f):
        words = {*f, *map("=".join, f.items())}
        return next(x for rule, x in rules.items() if {*rule.split()} <= words)
    return loss


def transfer(size, smallest, power=1, modular=0, gain=0.1, plain=-1, adam=-7):
    """Losses of networks of several sizes: the plain optimizers' best lr falls with the size."""
    def loss(f):
        turns, gpt = f["opt"].startswith("modular"), size in f
        if size == "n_layer" and "depth" in f:
            return 1.5 - gain * math.log2(int(f["depth"])) * (1 if turns else plain)
        best = ({"adam": 2.0**adam} if gpt else {"adam": 2.0**-6, "sgd": 2.0**-4}).get(f["opt"], 0.5)
        falls = (smallest / int(f[size])) ** power if gpt else (32 / int(f["width"])) ** (1 / 1.5)
        return bowl(f, best * (falls**modular if turns else falls))
    return loss


# For each experiment rules, and outcomes: a loss or accuracy for each rule, or a function of flags; what is to be said
# of each check; rules that come before the others.
VERDICTS = {
    "zero_shot": (("opt=rotational_sgd", ""), [
        (lambda f: bowl(f, 0.004) + 0.01 * f["opt"].startswith("rot"), "yyy"), ((1.53, 1.5), "yny"),
        ((1.5, 1.5), "yyn", {"opt=lion seed=12": nan})]),               # beside one that diverged nothing is good
    "warmup": (("warmup=0 opt=adamw", "warmup=0 opt=sgd", "warmup=0", ""), [
        ((1.6, 1.6, 1.54, 1.5), "yy"), ((1.6, 1.6, 1.56, 1.5), "nn"), ((1.51, 1.51, 1.5, 1.5), "nn"),
        ((nan, nan, 1.5, 1.5), "yy"),                                   # one that diverged has learned nothing
        ((1.6, 1.6, 1.54, 1.5), "nn", {                                 # the mean counts
            f"warmup=0 seed=11 opt=rotational_{opt}": 1.7 for opt in ("adamw", "sgd")})]),
    "balance": (("change", "opt=adam", "opt=adamw", ""), [
        ((0.8, 0.76, 0.85, 0.89), "yyyy"), ((0.8, 0.84, 0.85, 0.82), "ynnn"), ((0.84, 0.76, 0.85, 0.89), "yyyn"),
        ((0.8, 0.76, 0.85, 0.89), "ynny", {"opt=adamw seed=12": nan})]),
    "imbalance": (("change=turn=10", "change=turn=0.1", "change=turn=3", ""), [
        ((0.8, 0.88, 0.9, 0.9), "yyyy"), ((0.895, 0.895, 0.92, 0.9), "nnny"),
        ((0.8, 0.88, 0.9, 0.9), "nnnn", {"change=turn=1 seed=12": nan})]),
    "lr_against_decay": ((), [
        (lambda f: 1.5 + abs(math.log10(float(f["lr"]) / 4e-3)) * (0.1 if f["opt"] == "adamw" else 0.04), "yy"),
        (lambda f: bowl(f, 0.004), "yn"), (lambda f: 1.5, "ny")]),
    "lr_transfer_width": ((), [
        (transfer("n_embd", 32), "yyy"), (lambda f: bowl(f, 2**-4), "nnn"),     # no optimizer depends on the size
        (transfer("n_embd", 32, modular=1), "nnn"),                     # both do: more than 0.03
        (transfer("n_embd", 32, adam=-6), "nyy")]),                     # the best is the last of the GPT's lrs
    "lr_transfer_depth": ((), [
        (transfer("n_layer", 2, 1 / 4), "yyy"), (transfer("n_layer", 2, 1 / 4, gain=0), "ynn"),
        (transfer("n_layer", 2, 1 / 4, plain=1), "ynn")]),              # depth helps the plain ones, too
    "root_free": (("model opt=adamw", "model change", "model opt=rmsprop", "model",
                   "opt=adamw", "change", "opt=rmsprop", ""), [
        ((0.85, 0.8, 0.73, 0.84, 2.0, 2.1, 2.2, 2.02), "yyyyyy"),
        ((0.85, 0.84, 0.83, 0.82, 2.0, 2.0, 2.02, 2.04), "nnnnnn"),
        ((0.85, 0.8, 0.73, 0.84, 2.0, 2.1, 2.2, 2.02), "yynyyy", {
            "model opt=rf_rmsprop": 0.84, "opt=rf_rmsprop weight_decay=0": 2.22})]),
    "half_precision": (("opt=shampoo", "opt_kwargs.dtype=bfloat16", ""), [
        ((1.6, 1.5, 1.49), "yyyy"), ((1.6, 1.5, 1.45), "nyyy"), ((1.45, 1.5, 1.6), "ynyy")])}


def test_sweep_verdicts():
    """The experiments say yes to numbers made up to agree with the claim, and no to others, for the right reason."""
    def verdict(name, losses, extra={}, log=turning_log, slower=2.0, product=0.5):
        times = {kind: (10, 1.0 if kind == sweep.HALF else slower) for kind in TIMES if product < 1}
        rules = VERDICTS[name][0]
        loss = losses if callable(losses) else by_rules(extra | dict(zip(rules, losses, strict=True)))
        lab = ImaginedLab(loss, log if name == "balance" else None)
        with unittest.mock.patch.object(sweep, "step_times", lambda path: (times, product)):
            found = sweep.EXPERIMENTS[name](lab)
        assert found.said.endswith(".") and found.text and bool(found.untested) == (product > 1), name
        return "".join("ny"[bool(held)] for _, held in found.checks)

    for name, (_, outcomes) in VERDICTS.items():
        for losses, held, *extra in outcomes:
            said = verdict(name, losses, *extra)
            assert said == held, (name, losses, extra, said, held)
    assert verdict("half_precision", (1.5, 1.5, 1.5), slower=0.9) == "yynn"
    assert verdict("half_precision", (1.5, 1.5, 1.5), product=2) == "yy"
    alike = verdict("balance", (0.8, 0.76, 0.85, 0.89), log=lambda f: turning_log(f | {"opt": "sgd"}))
    assert alike == "nyyy", alike

    def refuted(loss=lambda f: 1.5, **changes):     # what the experiment on equilibrium finds untrue
        checks = sweep.equilibrium(ImaginedLab(loss, lambda f: rotation_log(f, **changes))).checks
        return {re.match(r"\w+, \w+: (the )?\w+", words)[0] for words, held in checks if not held}

    opts, off = ("adamw", "sgd", "lion"), {"resnet, sgd: the angle", "gpt, lion: the norm"}
    radial = {f"gpt, {opt}: median" for opt in opts}            # the radial part does not explain the misses
    norms = {f"{net}, {opt}: the norm" for net in ("gpt", "resnet") for opt in opts}
    assert refuted() == off and refuted(radial=0.001) == off | radial and refuted(norm=100.0) == off | radial | norms
    assert refuted(by_rules({"opt=adamw": nan, "": 1.5})) == off | {"gpt, adamw: diverged", "resnet, adamw: diverged"}
    with unittest.mock.patch.object(optim.rf_rmsprop, "start", lambda self, w, h: {
            "momentum_buffer": torch.zeros_like(w), "square_avg": torch.full_like(w, 100.0)}):
        assert [held for _, held in sweep.second_order(ImaginedLab(None)).checks] == [False, True, False, True, False]


def test_sweep_findings():
    """An experiment names the runs that diverged and are in no mean, a best value at an edge, and the measured numbers.
    It gives no verdict where all runs of an optimizer diverged, or where one failed or is missing."""
    assert sweep.spread([1.0, math.nan, 2.0]) == "1.500 +- 0.707" and sweep.spread([1.0, math.nan]) == "-"
    found = sweep.imbalance(ImaginedLab(by_rules({"seed=12 change=turn=10": math.nan, "": 0.9})))
    assert "1 of 3 diverged" in found.text and "1 of 3 diverged" in found.checks[0][0]
    asked = []
    found = sweep.balance(ImaginedLab(lambda f: asked.append(f.get("change")) or 0.8, turning_log))
    assert "adam 4.00, adamw 2.00" in found.checks[0][0]
    assert "turn=0.354,1.41,1.41,1.41,1" in asked, "each layer's angle over the geometric mean, the output's as it is"
    found = sweep.zero_shot(ImaginedLab(lambda f: bowl(f, 0.004) + float(f["weight_decay"]) / 100))
    assert "at lr 0.004, weight_decay 0.03" in found.checks[0][0] and "the best lr is at" in found.text
    assert "adamw, tuned with one seed, the best weight_decay is at the edge" in found.text
    for loss, words in ((1.5, "The claim held"), (1.53, "did not hold at this scale: only 2 of 3 checks")):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            sweep.experiment(ImaginedLab(by_rules({"opt=rotational_sgd": loss, "": 1.5})), "zero_shot", None)
        assert words in out.getvalue() and ("NO" in out.getvalue()) == (loss > 1.5), out.getvalue()
    for runs, seeds in ((None, {"11", "12", "13", "14"}), (4, {"10", "11", "12", "13", "14"})):     # stored, searched
        seen = set()
        found = sweep.root_free(ImaginedLab(lambda f: seen.add(f["seed"]) or bowl(f, 0.004), runs=runs))
        assert ("lr 0.01306" in found.text) == (not runs) and seen == seeds
    with temporary_folder() as folder:
        lab = toy_lab(folder, experiment="x", report=True)
        run = sweep.model_run(lab, "gpt")
        refused(sweep.Unfinished, [], lambda: lab.results([run]))
        write_run(folder / "out" / run.name, [])
        (folder / "out" / run.name / "failed.json").write_text('{"status": 1, "message": "words"}')
        with contextlib.redirect_stderr(io.StringIO()) as err:
            refused(SystemExit, ["1"], lambda: lab.results([run]))
        assert "words. Mend it" in err.getvalue()
    for name, opt in (("balance", "adamw"), ("zero_shot", "lion")):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            lab = ImaginedLab(by_rules({f"opt={opt}": nan, "": 1.5}), turning_log)
            refused(SystemExit, ["1"], lambda: sweep.EXPERIMENTS[name](lab))
        assert f"that tune {opt} diverged" in err.getvalue()


def look_at(figure):
    """Fails where a reader of the picture would: texts in TeX, labels that overlap or leave the picture, a curve that
    leaves its axes, a legend on it, an axis without a name or with fewer than two ticks -> all texts."""
    def apart(texts):
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        return not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))

    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(lambda x: hasattr(x, "get_text") and x.get_visible()) if text.get_text()]
    for axes, name in itertools.product(figure.axes, "xy"):
        axis, (low, high) = getattr(axes, f"{name}axis"), sorted(getattr(axes, f"get_{name}lim")())
        labels = {tick.label1: low <= tick.get_loc() <= high for tick in axis.get_major_ticks()}
        texts = [text for text in texts if labels.get(text, True)]              # ticks outside the limits are not drawn
        shown = [label for label, inside in labels.items() if inside and label.get_text()]
        named = axis.get_label_text() or not shown[0].get_text()[0].isdigit()
        assert len(shown) > 1 and named, f"the {name} axis says nothing"
        assert apart(shown) or shown[0].get_rotation(), [label.get_text() for label in shown]
        for line in axes.lines:
            values = np.asarray(getattr(line, f"get_{name}data")(), dtype=float)
            assert line.get_transform() != axes.transData or low <= np.nanmin(values) <= np.nanmax(values) <= high
    for text in texts:
        (left, low), (right, high) = text.get_window_extent().get_points()
        assert "mathdefault" not in text.get_text(), text
        assert -2 <= left and right <= figure.bbox.x1 + 2 and -2 <= low and high <= figure.bbox.y1 + 2, text
    assert apart([axes.title for axes in figure.axes]), "titles overlap"
    for legend, axes in itertools.product([legend for part in figure.subfigs for legend in part.legends], figure.axes):
        assert not legend.get_window_extent().overlaps(axes.get_window_extent()), "the legend covers a curve"
    return [text.get_text() for text in texts]


def drawn(call):
    """The figure that `call` draws."""
    if not importlib.util.find_spec("matplotlib"):
        raise unittest.SkipTest("needs matplotlib")
    figures, curves = [], sweep.curves
    with temporary_folder() as folder, contextlib.redirect_stdout(io.StringIO()):
        with unittest.mock.patch.object(sweep, "curves", lambda *a: figures.append(curves(*a))):
            call(folder / "x.png")
        assert (folder / "x.png").stat().st_size > 5000
    return figures[0]


def test_sweep_pictures():
    """Every picture is fit to be seen: of all experiments, with claim and verdict in the title; of grids, draws
    and seeds, with the best marked, diverged seeds crossed, and a $ where somebody wrote one."""
    for name in sweep.EXPERIMENTS:
        lab = ImaginedLab(lambda f: nan if f["lr"] == "0.008" else bowl(f, 0.004), rotation_log)
        with unittest.mock.patch.object(sweep, "step_times", lambda path: (TIMES, 0.5)):
            texts = look_at(drawn(lambda path: sweep.experiment(lab, name, path)))
        assert any("at this scale" in text and "\n" in text for text in texts), (name, texts)
    failed = "a seed diverged or failed"
    for flags, seeds, lines in (
            (dict(lr=("1e-3", "1e-2", "0.1", "1"), weight_decay=("0", "0.1")), 2,
             ["weight_decay 0", "weight_decay 0.1", failed]),
            (dict(opt=("sgd", "adamw", "rotational_rf_rmsprop")), 1, ["mean"]), (dict(opt=("adam",)), 3, ["mean"]),
            (dict(lr=[f"{10**-x:.4g}" for x in np.linspace(0, 4, 23)]), 2, ["mean", failed]),
            (dict(betas=("$\\foo$", "$b", "(0.9, 0.99)"), n_layer=("1", "2"), lr=("1", "2", "3", "4")), 1, ["mean"])):
        settings = [dict(zip(flags, values)) for values in itertools.product(*flags.values())]
        results = [imagined(nan if i == 3 and seed == 1 else 1 + math.sin(i) + seed, **setting, seed=seed)
                   for i, setting in enumerate(settings) for seed in range(seeds)]
        panels = sweep.report_panels(results)
        texts = look_at(drawn(lambda path: sweep.curves("a title", panels, path)))
        assert len(panels) == (3 if "betas" in flags else 1) and ("betas" not in flags or "$\\foo$" in texts), texts
        best = sweep.Setting({}, results[:1]) if len(settings) == 1 else sweep.by_setting(results)[0]
        for curves in panels.values():
            *labels, star = curves
            assert labels == lines and star.startswith("best") and curves[star].y[0] == best.score, (labels, star)
        if "weight_decay" in flags:
            [(panel, curves)], curve = panels.items(), curves["weight_decay 0"]
            assert curve.x == [0.001, 0.01, 0.1, 1] and panel.log == "x"
            close(curve.y, [1.5 + math.sin(i) for i in (0, 2, 4, 6)], 1e-12, "means")
            close(np.subtract(curve.high, curve.y), np.full(4, math.sqrt(0.5)), 1e-12, "deviations")


def test_sweep_curves():
    """--curves: the table has the last value, the mean over seeds and what tells runs apart; records without a loss are
    passed over; a run that is not at its end is said to be so. The curves are numpy's means and deviations."""
    losses, runs = {}, (("adamw", 1), ("adamw", 2), ("lion", 3))
    with temporary_folder() as folder:
        for opt, seed in runs:
            losses[seed] = [5.0 - 0.01 * k * min(seed, 4 - seed) - 1.5 * (opt == "lion") for k in (0, 100, 200)]
            records = [{"step": 0, "val_loss": losses[seed][0], "seconds": 0.0}]
            for k in (1, 2):
                row = {"angle": 0.1 * seed * k, "predicted_angle": None if seed == 3 else 0.2}
                records += [{"step": 100 * k - 50, "lr": 1, "rotation": {f"blocks.{i}.up.weight": row for i in (0, 1)}},
                            {"step": 100 * k, "val_loss": losses[seed][k], "seconds": 3.0 * k * seed}]
            records[-1] |= {"final": True} if opt == "adamw" else {}
            home = folder / "sweep" / str(seed) if opt == "adamw" else folder / "lion"
            write_run(home, records, opt=opt, seed=seed, steps=200, out_dir=f"x{seed}{opt}", hyper={"lr": 0.1})
        found = sweep.load([folder / "sweep", folder / "lion"])
        assert {name: len(logs) for name, logs in found.items()} == {"adamw": 2, "lion": 1}
        steps, mean, low, high = sweep.over_seeds(found["adamw"], lambda record: record.get("val_loss"))
        both = np.array([losses[1], losses[2]])
        close([mean, np.subtract(high, mean), np.subtract(mean, low)],
              [both.mean(0), both.std(0, ddof=1), both.std(0, ddof=1)], 1e-9, "mean and deviation")
        out = succeed(sweep, "--curves", folder / "sweep", folder / "lion")
        rows = [line.split() for line in out.splitlines()[1:3]]
        assert steps == [0, 100, 200] and rows == [
            ["a", "1.5000", "lion", "200", "18.0", "1", "1", "not", "at", "the", "end"],
            ["b", f"{both.mean(0)[2]:.4f}", "adamw", "200", "9.0", "2"]], out
        assert re.search(r"3.5 \|b\n", out) and re.search(r"1.5 \| +a\n +100 +200 steps", out), out
        lines = sweep.angles(found["adamw"])
        assert {name: np.round(curve.y, 6).tolist() for name, curve in lines.items()} == {
            "up": [[0.15, 0.3]] * 2, "predicted": [[0.2, 0.2]] * 2} and list(sweep.angles(found["lion"])) == ["up"]
        figure = drawn(lambda path: call_main(sweep, "--curves", folder / "sweep", folder / "lion", "--plot", path))
        assert {"step", "seconds", "val_loss (nats)", "lion", "adamw", "up", "predicted"} <= set(look_at(figure))


# ---- Running them ----------------------------------------------------------------------------------------------------


def one_thread():
    """These tensors are tiny: more threads would only wait for each other."""
    torch.set_num_threads(1)


def attempt(name):
    """Run a test -> (verdict, claim or why it was skipped, seconds, traceback if it failed, what it counted)."""
    test, began, details = globals()[name], time.perf_counter(), ""
    claim = inspect.getdoc(test)
    TALLY.clear()
    try:
        test()
        verdict = "ok"
    except unittest.SkipTest as skip:
        verdict, claim = "skip", str(skip)
    except Exception:
        verdict, details = "FAIL", traceback.format_exc()
    return verdict, claim, time.perf_counter() - began, details, TALLY.copy()


def main(words):
    words = [word for word in words if word != "--long"]
    tests = [name for name, f in globals().items() if name.startswith("test_") and inspect.isfunction(f)]
    chosen = [name for name in tests if not words or any(word in name for word in words)]
    if not chosen:
        sys.exit(f"tests.py: no test has {' or '.join(words)} in its name; there are: {', '.join(tests)}")
    width, verdicts, total = max(map(len, chosen)), collections.Counter(), collections.Counter()
    # All of them: as many at a time as there are cores, but no more than fit into a laptop's memory. A few: in this
    # process, where a debugger can be used.
    at_a_time = 1 if words else min(os.cpu_count(), 4)
    with contextlib.ExitStack() as stack:
        run_all = map
        if at_a_time > 1:
            run_all = stack.enter_context(concurrent.futures.ProcessPoolExecutor(at_a_time, initializer=one_thread)).map
        for name, (verdict, claim, seconds, details, counted) in zip(chosen, run_all(attempt, chosen)):
            verdicts[verdict] += 1
            total += counted
            print(f"{verdict:4s} {name:{width}s} {seconds:6.2f} s   {claim}", flush=True)
            if details:
                print(details, flush=True)
    print("; ".join([f"{verdicts['ok']} passed, {verdicts['FAIL']} failed, {verdicts['skip']} skipped",
                     *(f"{number} {what}" for what, number in total.items())]))
    return 1 if verdicts["FAIL"] else 0


if __name__ == "__main__":
    one_thread()
    sys.exit(main(sys.argv[1:]))
