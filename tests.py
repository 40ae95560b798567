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
import gzip
import hashlib
import http.server
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
import socket
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
import urllib.parse
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
import tqdm
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
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


class Skip(unittest.SkipTest):
    """Raise it where a test cannot run here; pytest understands it too."""

# ======================================================================================================================
# Helpers
# ======================================================================================================================

# Strong settings: every mechanism (momentum, decay, both averages) shows within a few steps. A row of the table that is
# not listed here has ORDINARY ones, as far as it takes them.
SETTINGS = {
    "sgd": {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1},
    "adam": {"lr": 0.02, "betas": (0.9, 0.97), "weight_decay": 0.2},
    "adamw": {"lr": 0.02, "betas": (0.9, 0.97), "weight_decay": 0.2},
    "lion": {"lr": 0.005, "betas": (0.9, 0.97), "weight_decay": 0.5},
    "rmsprop": {"lr": 0.01, "alpha": 0.95, "momentum": 0.8, "weight_decay": 0.1},
    "rf_rmsprop": {"lr": 0.05, "alpha": 0.95, "eps": 1e-3, "momentum": 0.8, "weight_decay": 0.1, "batch_size": 4},
    "rf_adamw": {"lr": 0.1, "betas": (0.9, 0.97), "eps": 1e-3, "weight_decay": 0.2, "batch_size": 4},
    "shampoo": {"lr": 0.02, "momentum": 0.8, "damping": 0.01, "lr_cov": 0.1, "weight_decay": 0.1, "update_every": 2},
    "if_shampoo": {"lr": 0.05, "momentum": 0.8, "damping": 0.01, "lr_cov": 0.2, "riemannian_momentum": 0.5,
                   "weight_decay": 0.1, "update_every": 2, "batch_size": 4},
    "modular_sgd": {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.1},
    "modular_adam": {"lr": 0.2, "betas": (0.9, 0.97), "weight_decay": 0.1},
}
ORDINARY = {"lr": 0.02, "momentum": 0.8, "betas": (0.9, 0.97), "weight_decay": 0.1, "batch_size": 4}
DIRECTIONS = ("sgd", "adam", "adamw", "lion", "rmsprop", "rf_rmsprop", "rf_adamw", "shampoo", "if_shampoo")
ROTATIONAL = tuple(f"rotational_{name}" for name in DIRECTIONS)
MODULAR = ("modular_sgd", *(f"modular_{name}" for name in DIRECTIONS[1:] if name != "adamw"))
TORCH_TWINS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
               "rmsprop": torch.optim.RMSprop}
SHAPES = [(), (1,), (5,), (4, 7), (6, 4, 3, 3)]
MIXED = [(4, 6), (3, 2, 3, 3), (5,), ()]        # two tensors that turn under a rotational optimizer, two that do not
TURNING = [(5, 24), (4, 3, 3, 3)]               # wide enough that the signs of a neuron are hardly ever all equal


def base(name):
    """The name of the direction."""
    return name.removeprefix("rotational_").removeprefix("modular_")


def settings(name, **options):
    known = optim.OPTIMIZERS[name].takes()
    own = SETTINGS.get(name) or SETTINGS.get(base(name)) or {k: v for k, v in ORDINARY.items() if k in known}
    return own | options


def required(name):
    """The arguments that have no default, with any value: none but the batch size of the root-free directions."""
    return {"batch_size": 7} if "batch_size" in optim.OPTIMIZERS[name].takes() else {}


def make(name, params, **options):
    """The optimizer `name` with its strong settings, some of them replaced."""
    return optim.OPTIMIZERS[name](params, **settings(name, **options))


def turns(name):
    return optim.OPTIMIZERS[name].geometry is optim.ROTATIONAL


def rescales(name):
    return optim.OPTIMIZERS[name].geometry is optim.MODULAR


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weight(*shape, fill=None, dtype=torch.float32):
    return nn.Parameter(normal(0, *shape, dtype=dtype) if fill is None else torch.full(shape, fill, dtype=dtype))


def parameters(shapes, dtype=torch.float64, seed=0):
    return [nn.Parameter(normal(seed + i, *shape, dtype=dtype)) for i, shape in enumerate(shapes)]


def noise(shapes, steps, dtype=torch.float64, seed=1000):
    """A list of `steps` lists of gradients: drawn in advance, so that every optimizer can be fed the same ones."""
    return [[normal(seed + 100 * t + i, *shape, dtype=dtype) for i, shape in enumerate(shapes)] for t in range(steps)]


def everything(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def run(optimizer, gradients, lrs=None):
    """Feed a list of gradients per step (None: the parameter gets none), with a learning rate per step if given."""
    for t, step_gradients in enumerate(gradients):
        for group in optimizer.param_groups if lrs is not None else ():
            group["lr"] = lrs[t]
        for p, g in zip(everything(optimizer), step_gradients, strict=True):
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


def same_bits(ours, theirs, what):
    TALLY["references compared"] += 1
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{what}: tensor {i} differs"


def refused(kind, words, call):
    """`call` must raise `kind` with a message of one line that contains all the words."""
    try:
        call()
    except kind as error:
        message = str(error)
    else:
        raise AssertionError(f"accepted, though it should be refused with {words}")
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


def orthogonal(seed, n):
    return torch.linalg.qr(normal(seed, n, n))[0]


def through_a_file(thing):
    """torch.save, then torch.load in the mode that trusts nothing but tensors and plain containers."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Single(nn.Linear):
    """A network of one layer, for whatever needs no more; it states its modular tree."""

    def modular_tree(self):
        return optim.weight(self)


# ======================================================================================================================
# The same numbers by hand: the papers' algorithms in numpy, one weight at a time
# ======================================================================================================================


class DirectionByHand:
    """The directions without matrices, from the papers' formulas.

    `l2` is what goes through the direction beside the gradient: weight_decay * w, or 0. With `only_v` it reaches Adam's
    second moment and not its first.
    """

    def __init__(self, name, h, shape):
        self.name, self.h, self.t, self.m = name, h, 0, np.zeros(shape)
        self.v = np.full(shape, 1 / h["batch_size"]) if name.startswith("rf_") else np.zeros(shape)

    def __call__(self, g, l2=0, only_v=False):
        self.t += 1
        h, x = self.h, g + l2
        if self.name in ("modular_sgd", "modular_adam"):    # averages that start warm, at the first gradient
            b1, b2 = h.get("betas", (h.get("momentum"), 0))
            self.m = self.m + (1 - b1) ** ((self.t - 1) / self.t) * (g - self.m)
            self.v = self.v + (1 - b2) ** ((self.t - 1) / self.t) * (g * g - self.v)
            return self.m if self.name == "modular_sgd" else \
                np.divide(self.m, np.sqrt(self.v), out=np.zeros_like(self.m), where=self.v > 0)
        if self.name == "sgd":
            self.m = h["momentum"] * self.m + x
            return self.m
        if self.name == "rmsprop":
            self.v = h["alpha"] * self.v + (1 - h["alpha"]) * x**2
            self.m = h["momentum"] * self.m + x / (np.sqrt(self.v) + h.get("eps", 1e-8))
            return self.m
        if self.name == "rf_rmsprop":                       # the decay joins after the division
            self.v = h["alpha"] * self.v + (1 - h["alpha"]) * g**2
            self.m = h["momentum"] * self.m + g / (h["batch_size"] * self.v + h["eps"]) + l2
            return self.m
        b1, b2 = h["betas"]
        if self.name == "rf_adamw":
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * g**2
            c1, c2 = (1 - b1**self.t, 1 - b2**self.t) if h.get("bias_correction") else (1, 1)
            return self.m / c1 / (h["batch_size"] * self.v / c2 + h["eps"])
        if self.name == "lion":
            d = np.sign(b1 * self.m + (1 - b1) * g)
            self.m = b2 * self.m + (1 - b2) * g
            return d
        assert self.name in ("adam", "adamw"), f"no transcription of {self.name}"
        self.m = b1 * self.m + (1 - b1) * (g if only_v else x)
        self.v = b2 * self.v + (1 - b2) * x**2
        return self.m / (1 - b1**self.t) / (np.sqrt(self.v / (1 - b2**self.t)) + h.get("eps", 1e-8))


def unfold(x, i):
    """The matrix (d_i, all the rest) that has mode i of x as its rows."""
    return np.moveaxis(x, i, 0).reshape(x.shape[i], -1)


def times(x, i, F):
    """x with mode i multiplied by F: the new unfolding along mode i is F^T times the old one."""
    others = [n for j, n in enumerate(x.shape) if j != i]
    return np.moveaxis((F.T @ unfold(x, i)).reshape([F.shape[1], *others]), 0, i)


class ShampooByHand:
    """Root-based Shampoo, mode by mode. A diagonal is kept as a full matrix whose other entries are set to 0."""

    def __init__(self, name, h, shape):
        self.h, self.t, self.m, self.shape = h, 0, np.zeros(shape), tuple(shape) or (1,)
        self.L, self.R = [np.zeros((n, n)) for n in self.shape], [np.eye(n) for n in self.shape]
        self.v = np.zeros(shape)                            # of the Adam whose norm is borrowed

    def __call__(self, g, l2=0):
        self.t += 1
        h, b, x, k = self.h, self.h["lr_cov"], g.reshape(self.shape), len(self.shape)
        for i, n in enumerate(self.shape):
            C = unfold(x, i) @ unfold(x, i).T
            self.L[i] = (1 - b) * self.L[i] + b * (np.diag(np.diag(C)) if n > h.get("max_dim", 2048) else C)
            if self.t % h["update_every"] == 0:
                eigenvalues, Q = np.linalg.eigh(self.L[i] + h["damping"] * np.eye(n))
                self.R[i] = Q @ np.diag(eigenvalues ** (-1 / (2 * k))) @ Q.T
        for i in range(k):
            x = times(x, i, self.R[i])
        d = x.reshape(g.shape)
        if h.get("graft") == "sgd":
            d = d * np.linalg.norm(g) / np.linalg.norm(d)
        if h.get("graft") == "adam":
            self.v = (1 - b) * self.v + b * g**2
            adam = g / (np.sqrt(self.v / (1 - (1 - b) ** self.t)) + 1e-8)
            d = d * np.linalg.norm(adam) / np.linalg.norm(d)
        self.m = h["momentum"] * self.m + d + l2
        return self.m


class InverseFreeShampooByHand:
    """Inverse-free Shampoo, mode by mode, every A_i formed for itself as (rest, d_i)."""

    def __init__(self, name, h, shape):
        self.h, self.t, self.m, self.shape = h, 0, np.zeros(shape), tuple(n for n in shape if n != 1) or (1,)
        self.K, self.M = [np.eye(n) for n in self.shape], [np.zeros((n, n)) for n in self.shape]
        self.next = 0                                       # the next preconditioner step; t counts from 0

    def __call__(self, g, l2=0):
        h, x, k = self.h, g.reshape(self.shape), len(self.shape)
        if self.t == self.next:
            self.next = self.t + min(max(math.floor(math.log(self.t + 1, 4) + 1e-9), 1), h["update_every"])
            H = []
            for i, d_i in enumerate(self.shape):
                A, c = math.sqrt(h["batch_size"]) * x, 1.0
                for j, d_j in enumerate(self.shape):
                    A = times(A, j, self.K[j] if j == i else self.K[j] / math.sqrt(d_j))
                    if j != i:
                        c *= np.trace(self.K[j].T @ self.K[j]) / d_j
                A = unfold(A, i).T
                H_i = 0.5 * (A.T @ A + h["damping"] * c * self.K[i].T @ self.K[i] - np.eye(d_i))
                H.append(np.diag(np.diag(H_i)) if d_i > h.get("max_dim", 2048) else H_i)
            for i in range(k):
                rho = h["riemannian_momentum"]
                self.M[i] = rho * self.M[i] + (1 - rho) * H[i]
                lr_cov = h["lr_cov"] * h.get("lr_cov_scale", 1.0) / max(1.0, np.sqrt((self.M[i] ** 2).sum()))
                self.K[i] = self.K[i] - lr_cov * self.K[i] @ self.M[i]
        self.t += 1
        for i in range(k):
            x = times(x, i, self.K[i] @ self.K[i].T)
        self.m = h["momentum"] * self.m + x.reshape(g.shape) + l2
        return self.m


def direction_by_hand(name, h, shape):
    """-> a function (g, l2) -> d. modular_sgd and modular_adam have directions of their own."""
    name = name if name in ("modular_sgd", "modular_adam") else base(name)
    kinds = {"shampoo": ShampooByHand, "if_shampoo": InverseFreeShampooByHand}
    return kinds.get(name, DirectionByHand)(name, h, shape)


DECOUPLED = ("adamw", "lion", "rf_adamw", "modular_sgd", "modular_adam")


def plain_by_hand(name, w, gradients, lrs, h):
    """One parameter under the plain rule. Yields w after every step."""
    direction, wd, w = direction_by_hand(name, h, w.shape), h["weight_decay"], w.copy()
    for g, lr in zip(gradients, lrs):
        if name in DECOUPLED or base(name) in DECOUPLED:    # the decay bypasses the direction
            w = (1 - lr * wd) * w - lr * direction(g)
        else:
            w = w - lr * direction(g, wd * w)
        yield w


def angle_by_hand(name, h):
    """The average rotation per step (table 1 of the rotational equilibrium paper), written out for each optimizer."""
    product = h["lr"] * h["weight_decay"]
    if base(name) in ("sgd", "rmsprop", "rf_rmsprop", "shampoo", "if_shampoo"):     # heavy ball comes last
        return math.sqrt(2 * product / (1 + h["momentum"]))
    b1, b2 = h["betas"]
    if base(name) == "lion":
        return math.sqrt(math.pi * product * ((1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)))
    return math.sqrt(2 * product * (1 - b1) / (1 + b1))


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
            for i in range(n_out):
                size = np.sqrt((d[i] ** 2).sum())
                w[i] -= lr * share * math.sqrt(n_in) * d[i] / size if size else 0
                w[i] *= math.sqrt(n_in) / np.sqrt((w[i] ** 2).sum()) if lr else 1
        else:
            for at in np.ndindex(kernel):
                D = d[(..., *at)]
                left = D @ u[(..., *at)]
                u[(..., *at)] = D.T @ (left / np.linalg.norm(left))
                w[(..., *at)] -= lr * share * math.sqrt(n_out / n_in) / np.prod(kernel, initial=1) * D \
                    / np.linalg.norm(u[(..., *at)])
            w *= 1 - lr * share * h["weight_decay"]
        yield w.copy()


def by_hand(name, w, gradients, lrs, h):
    """h: the optimizer's settings and the group's own. Yields w after every step."""
    rule, alone = plain_by_hand, w.ndim < 2 or not w.size   # a bias, a gain
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


# ======================================================================================================================
# One step with pencil and paper, sgd and the plain rule, Adam's family, Lion
# ======================================================================================================================


def test_worked_example():
    """W = [[3, 4], [1, 0]], g = [[1, 0], [0, 2]], lr 0.1, decay 0.5, not centred: the numbers of the first page."""
    W, g, lr, wd = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0]]), 0.1, 0.5
    turn, rotated = math.atan(math.sqrt(2 * lr * wd)), np.zeros((2, 2))
    for i, tangent in enumerate(([16 / 25, -12 / 25], [0.0, 2.0])):     # g - w (g.w) / w.w, at a right angle to w
        unit = np.array(tangent) / np.linalg.norm(tangent)
        rotated[i] = math.cos(turn) * W[i] - math.sin(turn) * np.linalg.norm(W[i]) * unit
    settled = (W - lr * g / 2) * (1 - lr * wd)              # 2: the largest singular value of g
    for name, options, steps, expected in (("sgd", {}, 1, W - lr * (g + wd * W)),
                                           ("rotational_sgd", {"zero_mean": False}, 1, rotated),
                                           ("modular_sgd", {}, 60, settled)):
        w = nn.Parameter(torch.tensor(W))
        optimizer = optim.OPTIMIZERS[name]([w], lr=lr, momentum=0.0, weight_decay=wd, **options)
        for _ in range(steps):                              # power iteration needs a few steps to find the 2
            w.data.copy_(torch.tensor(W))
            run(optimizer, [[torch.tensor(g)]])
        close(w, expected, 1e-6, name)
        if name == "rotational_sgd":
            close(w.norm(dim=1), [5, 1], 1e-6, "its rows keep the norms 5 and 1")
            close(angles(torch.tensor(W), w), [turn] * 2, 1e-6, "and both turn by the same angle")


def test_plain_equals_torch():
    """SGD, Adam, AdamW, RMSProp equal torch.optim to 1e-12, for all shapes, options and lr schedules, by default and
    with lr, decay, momentum, betas, alpha and eps edited by hand in mid-run."""
    cases = {
        "sgd": [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"momentum": 0.8, "weight_decay": 0.3}],
        "adam": [{}, {"weight_decay": 0.3}, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},
                 {"betas": (0.0, 0.99)}],
        "adamw": [{}, {"weight_decay": 0.0}, {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.5},
                  {"betas": (0.0, 0.99)}],
        "rmsprop": [{}, {"weight_decay": 0.3}, {"alpha": 0.9, "eps": 1e-3, "momentum": 0.9},
                    {"alpha": 0.5, "momentum": 0.5, "weight_decay": 0.1}]}
    edits = [{"lr": 0.1}, {"weight_decay": 0.7}, {"weight_decay": 0}, {"momentum": 0.1, "betas": (0.0, 0.5)},
             {"momentum": 0.95, "betas": (0.95, 0.9)}, {"alpha": 0.3, "eps": 0.1, "lr": 0}]
    gradients = noise(SHAPES, 20)
    for name, twin in TORCH_TWINS.items():
        for hyper in cases[name]:
            for lrs in (None, [0.03] * 20, [0.06 * math.sin(t / 5) ** 2 for t in range(20)]):     # the last starts at 0
                ours, theirs = parameters(SHAPES), parameters(SHAPES)
                optimizers = optim.OPTIMIZERS[name](ours, **hyper), twin(theirs, **hyper)
                for optimizer in optimizers:
                    run(optimizer, gradients, lrs)
                    for t, edit in enumerate(edits if lrs is None else ()):
                        own = {key: x for key, x in edit.items() if key in optimizer.defaults}
                        if name == "rmsprop" and not hyper.get("momentum"):
                            own.pop("momentum", None)       # torch's has no buffer then, and fails
                        optimizer.param_groups[0].update(own)
                        run(optimizer, gradients[2 * t:2 * t + 2])
                for p, q, start in zip(ours, theirs, parameters(SHAPES)):
                    close(p, q, 1e-11 if lrs is None else 1e-12, f"{name} {hyper} {tuple(p.shape)}")
                    assert not torch.equal(p, start), f"{name}: nothing moved"


def test_defaults_are_the_papers():
    """Called with parameters alone, the others have these settings, their factors the same, and state as documented."""
    root_free, shampoo = {"weight_decay": 0.0, "momentum": 0.9}, {"max_dim": 2048, "dtype": None}
    turning = {"update_norm_decay_factor": 0.9, "per_neuron": True, "zero_mean": True, "rotational_eps": 1e-8,
               "rotational": None}
    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    modular = {"lr": 0.25, "weight_decay": 0.0, "share": 1.0, "norm": "spectral", "scale": None, "seed": 0}
    expected = {
        "lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
        "rf_rmsprop": root_free | {"lr": 1e-2, "alpha": 0.99, "eps": 1e-4, "batch_size": None},
        "rf_adamw": adam | {"eps": 1e-4, "bias_correction": False, "batch_size": None},
        "shampoo": root_free | shampoo | {"lr": 1e-2, "damping": 1e-6, "lr_cov": 0.05, "update_every": 2,
                                          "graft": None},
        "if_shampoo": root_free | shampoo | {"lr": 1e-3, "damping": 1e-4, "lr_cov": 0.1, "riemannian_momentum": 0.5,
                                             "update_every": 2, "batch_size": None, "lr_cov_scale": 1.0},
        "rotational_sgd": turning | {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
        "rotational_adam": turning | adam, "rotational_adamw": turning | adam,
        "rotational_lion": turning | {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1.0},
        "modular_sgd": modular | {"momentum": 0.9}, "modular_adam": modular | {"betas": (0.9, 0.99)}}
    for name, kind in optim.OPTIMIZERS.items():
        takes = kind.takes()
        if name in expected:
            assert takes == expected[name] | {"compile": False}, f"{name}: {takes}"
        elif kind.geometry is not optim.PLAIN:              # composed: the direction's, but for what the geometry sets
            own = turning | {"weight_decay": 1e-2} if turns(name) else modular
            assert takes == optim.OPTIMIZERS[base(name)].takes() | own, f"{name}: {takes}"
        shown = {key: argument.default for key, argument in inspect.signature(kind).parameters.items()}
        del shown["params"]                                 # help() and a notebook's pop-up show the rest
        assert shown == takes, f"{name}: {shown}"
        assert kind.__doc__ and kind.__name__ == type(kind([weight(3, 4)], **required(name))).__name__
    # bytes a weight of a 1000 x 1000 matrix: 4 for each average, 8 for each matrix of a mode
    averages = {"sgd": 4, "adam": 8, "adamw": 8, "lion": 4, "rmsprop": 8, "rf_rmsprop": 8, "rf_adamw": 8,
                "shampoo": 20, "if_shampoo": 20}
    for name, count in averages.items():
        close(optim.state_bytes(optim.OPTIMIZERS[name]), count, 0, f"state of {name}")
        if "momentum" in SETTINGS[name]:
            [p] = parameters([(3, 4)])
            optimizer = make(name, [p], momentum=0.0)
            run(optimizer, noise([(3, 4)], 1))
            assert "momentum_buffer" not in optimizer.state[p], f"{name}: a buffer without momentum"


# ======================================================================================================================
# Why decay is rotation: kappa from impulse responses, and random walks that settle where the closed forms say
# ======================================================================================================================


def impulse_response(direction, h, by_sign=False, lags=3000):
    """The weights c_0, c_1, ... with which one gradient enters the updates that follow, up to a common factor: measured
    on the direction itself, by feeding a 1 and then zeros."""
    # With the second moment frozen at 1 (its factor is 1) and no bias correction (a late step), the direction is
    # linear. So it is for the Shampoos on a single weight as long as their factors stay at 1.
    w = torch.zeros(1, dtype=torch.float64)
    h = direction.defaults | {"eps": 0.0, "alpha": 1.0, "batch_size": 1, "lr_cov": 0.0, "update_every": 7} | h
    late = direction.scalars(h | ({"betas": (h["betas"][0], 0.0)} if "betas" in h else {}), 10**9)
    h = h | late | ({"betas": (h["betas"][0], 1.0)} if "betas" in h and not by_sign else {})
    start = {key: torch.zeros_like(x) if key in ("momentum_buffer", "exp_avg") else torch.ones_like(x)
             for key, x in direction.start(w, h).items()}
    pulse = [torch.ones_like(w)] + [torch.zeros_like(w)] * (lags - 1)
    if not by_sign:
        return np.array([direction.update(g, start, h).item() for g in pulse])
    # A sign hides the average inside it. It flips where a new gradient just cancels what the pulse left behind, so
    # bisection for that gradient, for all lags at once, uncovers c_k / c_0.
    left_behind = [w]
    for g in pulse[:-1]:
        direction.update(g, start, h)
        left_behind.append(start["exp_avg"].clone())
    left_behind, low = torch.cat(left_behind), torch.full((lags,), -100.0, dtype=torch.float64)
    high = -low
    for _ in range(70):
        middle = (low + high) / 2
        above = direction.update(middle, {"exp_avg": left_behind.clone()}, h) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return np.concatenate([[1.0], -low[1:].numpy()])        # c_0 / c_0 = 1: the gradient cancels itself


def test_kappa_is_the_shape_of_the_impulse_response():
    """kappa equals sqrt(sum c_k^2) / sum c_k of the measured impulse response, and heavy ball's gain is sum c_k."""
    cases = [("sgd", {"momentum": mu}) for mu in (0.0, 0.5, 0.9, 0.99)]
    cases += [(name, {"momentum": mu}) for name in ("rmsprop", "rf_rmsprop", "shampoo", "if_shampoo")
              for mu in (0.0, 0.5, 0.9)]
    cases += [(name, {"betas": betas}) for betas in ((0.0, 0.9), (0.9, 0.99), (0.95, 0.98))
              for name in ("adam", "adamw", "rf_adamw", "lion")]
    for name, h in cases:
        direction = optim.DIRECTIONS[name]
        c = impulse_response(direction, h, name == "lion", lags=400 if "shampoo" in name else 3000)
        sign = math.sqrt(math.pi / 2) if name == "lion" else 1  # what the sign itself takes away
        close(direction.kappa(h), sign * math.sqrt((c**2).sum()) / c.sum(), 1e-9, f"kappa of {name} {h}")
        if "momentum" in h:
            close(direction.gain(h), c.sum(), 1e-9, f"gain of {name} {h}")


def walk(name, h, sigma, start, seed=0):
    """Random gradients N(0, sigma^2) on 64 neurons of 256 weights for 7 time constants, the last 4 of them measured.

    Returns (RMS norm, mean angle per step).
    """
    rng = torch.Generator().manual_seed(seed)
    w = nn.Parameter(torch.randn(64, 256, generator=rng) * (start / math.sqrt(256)))
    optimizer = optim.OPTIMIZERS[name]([w], **h)
    # How fast ||w||^2 forgets: 2 lr wd per step, over 1-mu for momentum, and over sigma where that divides the decay.
    rate = 2 * h["lr"] * h["weight_decay"] / (1 - h.get("momentum", 0)) / (sigma if name == "adam" else 1)
    squares, turned = [], []
    for t in range(round(7 / rate)):
        w.grad = torch.randn(64, 256, generator=rng) * sigma
        measure = t * rate >= 3 and t % 4 == 0
        before = w.detach().clone() if measure else None
        optimizer.step()
        if measure:
            squares.append(w.detach().square().sum(dim=1).mean().item())
            turned.append(angles(before, w).mean().item())
    return math.sqrt(np.mean(squares)), np.mean(turned)


def settled_by_hand(name, h, C, sigma):
    """(norm, angle per step) of a neuron of C weights, from growth = decay, written out for each optimizer."""
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


def lion_power_by_arcsine(h, lags=2000):
    """Sum over all lags of the correlation of two signs, (2/pi) asin(rho_k), each weakened by the decay in between.

    rho_k is the autocorrelation of Lion's inner average, from its filter: c_0 = 1-b1, c_k = b1 (1-b2) b2^(k-1).
    """
    b1, b2 = h["betas"]
    c = np.concatenate([[1 - b1], b1 * (1 - b2) * b2 ** np.arange(lags)])
    rho = np.array([np.dot(c[:len(c) - k], c[k:]) for k in range(lags)]) / np.dot(c, c)
    power = 2 / math.pi * np.arcsin(np.clip(rho, -1, 1)) * (1 - h["lr"] * h["weight_decay"]) ** np.arange(lags)
    return 2 * power.sum() - power[0]                       # lags k and -k; lag 0 counts once


def test_random_walks_settle_where_theory_says():
    """Random walks settle at the closed-form norm and angle: within 1.5 %, the root-free 2 %, Lion 4 % and 1 % with the
    arcsine law. So AdamW's angle depends on lr * wd alone, and four times larger gradients halve that of Adam+L2."""
    # Two things limit the root-free, 1 % each: g takes part in the s that divides it, with weight 1-a; and what is left
    # of the long early steps, before s (or K) has forgotten its start, which was 1 where B sigma^2 + damping is 2.5.
    adam, ball = {"lr": 0.01, "betas": (0.8, 0.999), "weight_decay": 0.2}, {"momentum": 0.8, "batch_size": 4}
    cases = [("sgd", 0.7, {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.008}), ("adam", 0.5, adam), ("adam", 2, adam),
             ("adamw", 0.7, adam), ("lion", 0.7, {"lr": 0.005, "betas": (0.9, 0.95), "weight_decay": 0.2}),
             ("rf_rmsprop", 0.7, ball | {"lr": 0.05, "alpha": 0.99, "eps": 0.5, "weight_decay": 0.01}),
             ("rf_adamw", 0.7, {"lr": 0.02, "betas": (0.8, 0.99), "eps": 0.5, "weight_decay": 0.1, "batch_size": 4}),
             ("if_shampoo", 0.7, ball | {"lr": 0.05, "damping": 0.5, "lr_cov": 0.2, "riemannian_momentum": 0.5,
                                         "weight_decay": 0.02, "update_every": 10})]
    for name, sigma, h in cases:
        norm, angle = settled_by_hand(name, h, 256, sigma)
        measured_norm, measured_angle = walk(name, h, sigma, start=0.7 * norm)
        tolerance = 0.04 if name == "lion" else 0.02 if "batch_size" in h else 0.015
        close(measured_norm, norm, tolerance, f"norm of {name}")
        close(measured_angle, angle, tolerance, f"angle of {name}")
        if name == "lion":
            exact = math.sqrt(h["lr"] * 256 / (2 * h["weight_decay"]) * lion_power_by_arcsine(h))
            close(measured_norm, exact, 0.01, "norm of lion, arcsine law")
            close(optim.lion_walk_norm(h, 256), exact, 1e-9, "lion_walk_norm")


# ======================================================================================================================
# The rotational geometry: what turning neurons keep, and what they do not feel
# ======================================================================================================================


def test_rotational_equals_transcription():
    """Rotational optimizers equal a neuron-by-neuron transcription to 1e-10 of the distance moved, for all options."""
    # Beside the tensors that turn there are a vector, a group without decay and an exempt one: they must follow the
    # plain rule, decay included.
    steps, shapes = 10, [(5, 7), (4, 3, 2, 2), (6,), (3, 5), (4, 4), (2, 6)]
    gradients = noise(shapes, steps)
    for t, step_gradients in enumerate(gradients):
        step_gradients[0][1] = 0                            # a neuron that never gets a gradient,
        if 4 <= t < 8:
            step_gradients[1][2] = 0                        # and one that gets none for a while
    fed = copy.deepcopy(gradients)
    for step_gradients, replacement in zip(fed, noise([(7,)], steps, seed=500)):
        step_gradients[0][1] = replacement[0]
    schedules = [[0.02] * steps, [0.004 * t for t in range(steps)]]     # the second one starts at lr = 0
    options = itertools.product((True, False), (True, False), (0.0, 0.5, 0.9))
    for case, (zero_mean, per_neuron, factor) in enumerate(options):
        for name in ROTATIONAL:
            h = settings(name, zero_mean=zero_mean, per_neuron=per_neuron, update_norm_decay_factor=factor)
            own = {3: {"weight_decay": 0.0}, 4: {"rotational": False}, 5: {"weight_decay": 2 * h["weight_decay"]}}
            # Shampoo's eigenvectors come out of rounding, so a neuron that never gets a gradient has d = 1e-17 instead
            # of 0, and the rotational geometry rescales all d: such noise cannot be compared.
            follows(name, shapes, h, schedules[case % 2], own, fed if name == "rotational_shampoo" else gradients)


def test_norm_and_mean_are_kept():
    """Over 60 steps neurons keep their norm (1e-12 in float64, 1e-5 in float32) and their means stay zero; the next
    step gives a weight that was rescaled or shifted in between its norm back (the new length is Pythagoras')."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for name, per_neuron in itertools.product(ROTATIONAL, (True, False)):
            params = parameters(TURNING, dtype)
            norms, starts = [rows_of(p, per_neuron).double().norm(dim=1) for p in params], values(params)
            optimizer = make(name, params, per_neuron=per_neuron)
            run(optimizer, noise(TURNING, 60, dtype))
            for p, norm, start in zip(params, norms, starts):
                row = rows_of(p, per_neuron).double()
                close(row.norm(dim=1), norm, tolerance, f"{name} {dtype} norm")
                close(row.mean(dim=1) / norm, 0 * norm, tolerance, f"{name} {dtype} mean", scale=1)
                assert (angles(start, p, per_neuron) > 0.1).all(), f"{name}: hardly turned, so this shows nothing"
                p.data.mul_(1.3).add_(0.01)
            run(optimizer, noise(TURNING, 1, dtype, seed=7))
            for p, norm in zip(params, norms):
                close(rows_of(p, per_neuron).double().norm(dim=1), norm, tolerance, f"{name} {dtype} norm after a push")


def test_centring():
    """Construction removes even a mean of 1e-4 of the norm in float32 and keeps the norm; what is centred already,
    rounding and drift included, stays as it is, to the bit, in all four types. add_param_group does the same."""
    w = normal(0, 5, 24)
    w = w - w.mean(dim=1, keepdim=True)
    for dtype, offset in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        p = nn.Parameter((w / w.norm(dim=1, keepdim=True) + offset).to(dtype))
        make("rotational_sgd", [p])
        assert p.double().mean(dim=1).abs().max() < offset / 50, f"{dtype}: mean {p.double().mean(dim=1)}"
    for name, dtype in itertools.product(ROTATIONAL, (torch.float64, torch.float32, torch.bfloat16, torch.float16)):
        params, late, apart = (parameters(TURNING, dtype) for _ in "abc")
        for p in params + late + apart:
            p.data.add_(0.3)                                # as far from the centre as no rounding brings them
        starts, optimizer = values(params), make(name, params)
        optimizer.add_param_group({"params": late})
        optimizer.add_param_group({"params": apart, "zero_mean": False})
        same_bits(late + apart, params + starts, f"{name} {dtype}: a group added later")
        for p, start in zip(params, map(rows_of, starts)) if dtype == torch.float64 else ():
            residue = start - start.mean(dim=1, keepdim=True)
            expected = residue * (start.norm(dim=1) / residue.norm(dim=1))[:, None]
            close(rows_of(p), expected, 1e-13, f"{name} centred")
        for steps in (0, 15):                               # centred just now, and after a while of rounding
            run(optimizer, [step * 3 for step in noise(TURNING, steps, dtype)])
            here = values(params)
            make(name, params)
            same_bits(params, here, f"{name} {dtype}: centred twice, {steps} steps on")
    assert [optimizer.state[p]["step"] for p in late] == [15, 15] and optimizer.param_groups[1]["weight_decay"] == 0.1


def test_exact_angle():
    """The first step turns neurons by exactly arctan(eta_r); all steps do so if update_norm_decay_factor is 0."""
    for name in ROTATIONAL:
        for factor, per_neuron, zero_mean in ((0.0, True, True), (0.0, False, False), (0.9, True, True)):
            params = parameters(TURNING)
            optimizer = make(name, params, update_norm_decay_factor=factor, per_neuron=per_neuron, zero_mean=zero_mean,
                             rotational_eps=0.0)
            expected = math.atan(angle_by_hand(name, settings(name)))
            for t, gradients in enumerate(noise(TURNING, 6)):
                starts = values(params)
                run(optimizer, [gradients])
                for start, p in zip(starts, params):
                    turned = angles(start, p, per_neuron)
                    if factor == 0 or t == 0:
                        close(turned, torch.full_like(turned, expected), 1e-11, f"{name} {factor} step {t + 1}")
                    else:
                        assert (turned - expected).abs().max() > 1e-5, f"{name}: factor {factor} has no effect"


def test_what_turning_does_not_feel():
    """Turning weights come out the same, bit for bit, with 4 times the lr and a quarter of the decay (biases do not),
    and to 1e-7 with gradients 1000 times as large or as small."""
    shapes, starts = TURNING + [(6,)], parameters(TURNING)
    gradients = noise(shapes, 20)
    for name in set(ROTATIONAL) - {"rotational_adam"}:      # its denominator sees weight_decay * w
        h, ends = settings(name), []
        for factor, scale in ((1, 1), (4, 1), (1, 1000), (1, 1e-3)):
            params = parameters(shapes)
            # Adam's own eps is compared with the gradient's RMS and would be felt; rotational_eps stays.
            options = {"lr": h["lr"] * factor, "weight_decay": h["weight_decay"] / factor} | (
                {"eps": 0.0} if "adamw" in name and "rf" not in name else {})
            run(make(name, params, **options), [[scale * g for g in step] for step in gradients])
            ends.append(params)
        same_bits(ends[0][:2], ends[1][:2], name)
        assert not torch.allclose(ends[0][2], ends[1][2]), f"{name}: the bias does not feel the lr"
        for scale, end in ((1000, ends[2]), (1e-3, ends[3])) if base(name) in ("sgd", "adamw", "lion") else ():
            # Small gradients come within sight of rotational_eps, which SGD's updates are as small as.
            tolerance = 1e-4 if scale < 1 and base(name) == "sgd" else 1e-7
            for p, q, start in zip(ends[0][:2], end, starts):
                close(q, p, tolerance, f"{name} gradients x {scale}", scale=(p - start).abs().max().item())


def test_neurons_without_a_direction_stand_still():
    """A zero update, one equal for all weights of a neuron, or none in one neuron, leaves it bit for bit and never
    leads to NaN, not even once gradients return."""
    for name, dtype, eps in itertools.product(ROTATIONAL, (torch.float32, torch.float64), (1e-8, 0.0)):
        params = parameters(TURNING, dtype)
        optimizer = make(name, params, rotational_eps=eps)
        starts, zeros = values(params), [torch.zeros_like(p) for p in params]
        run(optimizer, [zeros] * 3)
        same_bits(params, starts, f"{name} {dtype}")
        gradients = noise(TURNING, 8, dtype)
        for step in gradients:
            step[0][3] = 0                                  # an unused token, a dead unit
        run(optimizer, gradients + [zeros] * 3)
        turned = angles(starts[0], params[0])
        assert turned[[0, 1, 2, 4]].min() > 0.02, f"{name} {dtype}: stuck, or NaN: {turned}"
        same_bits([params[0][3]], [starts[0][3]], f"{name} {dtype}: no gradient, and yet turned by {turned[3]:.2g}")
        assert params[1].isfinite().all() and not torch.equal(params[1], starts[1]), f"{name} {dtype}"
    params = parameters(TURNING, torch.float32)
    optimizer, starts = make("rotational_lion", params), values(params)
    run(optimizer, [[g.abs() + 0.1 for g in step] for step in noise(TURNING, 10, torch.float32)])
    same_bits(params, starts, "rotational_lion, all signs equal")
    optimizer = make("rotational_sgd", params)              # 0.1, 0.3, ..: their mean is off by rounding
    run(optimizer, [[torch.full_like(p, 0.1 + 0.2 * t) for p in params] for t in range(5)])
    same_bits(params, starts, "rotational_sgd, constant gradients")


def test_rotation_outlives_an_overflow():
    """A gradient too large for its square to be a float32 counts as none: the neuron rests for that step, and turns in
    the next as if nothing had been. (An update_norm_sq of NaN would hold it for good, and w would not show it.)"""
    ends = []
    for scale in (1e25, 0.0):
        [w], gradients = parameters([(6, 5)], torch.float32), noise([(6, 5)], 3, torch.float32)
        gradients[0][0][2] *= scale
        run(optim.RotationalSGD([w], lr=0.1, momentum=0, weight_decay=0.01), gradients)
        ends.append(w)
    same_bits(ends[:1], ends[1:], "an overflow")


def test_decay_scheduled_to_zero_freezes():
    """A turning weight whose decay is scheduled to 0 stands still, also after a checkpoint, and turns by the right
    angle when decay returns."""
    for name in ROTATIONAL:
        [p] = parameters([(5, 24)])
        optimizer = make(name, [p], update_norm_decay_factor=0.0, rotational_eps=0.0)
        first, second, third = noise([(5, 24)], 3)
        run(optimizer, [first])
        start = p.detach().clone()
        optimizer.param_groups[0]["weight_decay"] = 0.0
        run(optimizer, [second] * 5)
        close(p, start, 1e-14, f"{name}: without decay")
        saved = through_a_file(optimizer.state_dict())
        optimizer = make(name, [p])
        optimizer.load_state_dict(saved)
        run(optimizer, [second] * 5)
        close(p, start, 1e-14, f"{name}: without decay, after a checkpoint")
        optimizer.param_groups[0]["weight_decay"] = 0.3
        run(optimizer, [third])
        expected = math.atan(angle_by_hand(name, settings(name, weight_decay=0.3)))
        close(angles(start, p), np.full(5, expected), 1e-11, f"{name}: decay is back")


def test_weights_that_change_before_their_first_step():
    """A layer that was frozen when the optimizer was made moves, once thawed, as one that never was: centred first. One
    that became all zero since then is refused by the first step, which moves and counts nothing."""
    for name in ROTATIONAL:
        [thawed], [never] = parameters([(5, 24)]), parameters([(5, 24)])
        thawed.requires_grad_(False)
        optimizer, twin = make(name, [thawed]), make(name, [never])
        thawed.requires_grad_(True)
        for one in (optimizer, twin):
            run(one, noise([(5, 24)], 2))
        same_bits([thawed], [never], name)
        good, bad = parameters([(4, 6), (3, 5)])
        optimizer = make(name, [good, bad])
        good.data.add_(1.0)                                 # off centre, as loaded weights are
        bad.data[1] = 0
        start = values([good])
        refused(ValueError, [type(optimizer).__name__, "parameter 1 of group 0", "all zeros"],
                lambda: run(optimizer, noise([(4, 6), (3, 5)], 1)))
        same_bits([good], start, f"{name}: a weight beside the refused one")
        assert not optimizer.state.get(good), f"{name}: a step that was refused is counted"


# ======================================================================================================================
# Root-free: what the batch size does, and what the directions do not feel
# ======================================================================================================================


def test_batch_size_makes_a_curvature():
    """With the same mean gradients and B doubled, B s - a^t doubles (a^t: what is left of the start); nothing else."""
    # s is an average of g^2 that starts at 1/B, so B s = a^t + B * (average of g^2).
    steps, gradients = 40, noise(SHAPES, 40)
    for name, key, other, forget in (("rf_rmsprop", "square_avg", None, 0.95),
                                     ("rf_adamw", "exp_avg_sq", "exp_avg", 0.97)):
        states = []
        for B in (6, 12):
            params = parameters(SHAPES)
            optimizer = make(name, params, batch_size=B)
            run(optimizer, gradients)
            states.append([optimizer.state[p] for p in params])
        for one, two in zip(*states):
            close(12 * two[key] - forget**steps, 2 * (6 * one[key] - forget**steps), 1e-12, f"{name}: curvature")
            if other:
                same_bits([two[other]], [one[other]], f"{name} {other}")


def test_rescaled_loss_is_a_rescaled_direction():
    """Loss times c with B / c^2 leaves the curvature and multiplies d by c: with lr / c and wd * c nothing changes."""
    # For B g^2 is then the same, and the start 1/B of s scales as g^2 does. (c = B: a sum over the batch in place of
    # the mean.) The same bits come out if c is a power of 2, which costs no rounding.
    gradients = noise(MIXED, 30)
    for name in ("rf_rmsprop", "rf_adamw", "if_shampoo"):
        ends = []
        for c in (1, 2, 1 / 8):
            h, params = settings(name), parameters(MIXED)
            run(make(name, params, batch_size=64 / c**2, lr=h["lr"] / c, weight_decay=h["weight_decay"] * c),
                [[c * g for g in step] for step in gradients])
            ends.append(params)
        same_bits(ends[1], ends[0], f"{name} c = 2")
        same_bits(ends[2], ends[0], f"{name} c = 1/8")
        params = parameters(MIXED)
        run(make(name, params, batch_size=64), [[2 * g for g in step] for step in gradients])
        assert not torch.allclose(params[0], ends[0][0], rtol=1e-3), f"{name} does not feel the loss, so this is empty"


def test_diagonal_directions_feel_rotations_but_not_names():
    """rf_* square entry by entry: they follow permutations and sign flips of the weights exactly, rotations not."""
    shape, gradients = (4, 6), noise([(4, 6)], 30)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    signs, P = normal(2, *shape).sign(), orthogonal(3, 4)
    maps = {"permutation": lambda x: x.flatten()[order].view(shape), "flip": lambda x: signs * x,
            "turn": lambda x: P @ x}
    for name in ("rf_rmsprop", "rf_adamw"):
        [w] = parameters([shape])
        run(make(name, [w]), gradients)
        for what, there in maps.items():
            [u] = parameters([shape])
            u.data = there(u.data)
            run(make(name, [u]), [[there(g)] for [g] in gradients])
            if what == "turn":
                assert (u - there(w.detach())).abs().max() > 0.01, f"{name} does not feel a rotation"
            else:
                same_bits([u], [there(w.detach())], f"{name} {what}")


# ======================================================================================================================
# The modular norm: shares, sizes, bounds
# ======================================================================================================================


def linears(count, n_in=6, n_out=None):
    return [nn.Linear(n_in, n_out or n_in, bias=False) for _ in range(count)]


def shares(tree):
    return [share for _, _, share in tree.weights()]


def test_modular_shares_of_random_trees():
    """share = mass / total mass / sensitivity of all that comes after the weight, in 200 random expressions."""
    draw = random.Random(0)

    def expression(depth):
        """-> a tree, [(mass, sensitivity of what comes after it in here), ...] in forward order, sensitivity"""
        inner = ("compose", "compose", "tuple", "sum", "scale", "tare")
        kind = draw.choice(inner if depth else ("weight", "bond"))
        if kind == "weight":
            mass = draw.uniform(0.1, 3)
            return optim.weight(nn.Linear(2, 2), mass=mass), [(mass, 1.0)], 1.0
        if kind == "bond":
            s = draw.uniform(0.5, 2)
            return optim.bond("b", s), [], s
        one, in_one, s_one = expression(depth - 1)
        if kind == "scale":
            a = draw.uniform(-2, -0.5)
            return a * one, [(m, after * -a) for m, after in in_one], -a * s_one
        if kind == "tare":
            total = sum(m for m, _ in in_one)
            return (one.tare(5), [(m * 5 / total, after) for m, after in in_one], s_one) if total else \
                (one, in_one, s_one)
        two, in_two, s_two = expression(depth - 1)
        if kind == "compose":
            return two @ one, [(m, after * s_two) for m, after in in_one] + in_two, s_one * s_two
        return (one + two if kind == "sum" else optim.as_tree((one, two))), in_one + in_two, s_one + s_two

    biggest = 0
    for _ in range(200):
        tree, leaves, sensitivity = expression(draw.randint(1, 5))
        total = sum(mass for mass, _ in leaves)
        close(tree.mass, total, 1e-12, repr(tree), scale=1)
        close(tree.sensitivity, sensitivity, 1e-12, repr(tree))
        close([mass for _, mass, _ in tree.weights()], [mass for mass, _ in leaves], 1e-12, repr(tree))
        close(shares(tree), [mass / total / after for mass, after in leaves], 1e-12, repr(tree))
        biggest = max(biggest, len(leaves))
    assert biggest >= 10, f"no tree has more than {biggest} weights: this shows little"


def test_modular_shares_of_the_papers_networks():
    """With T = 2 + mass of the blocks: 1/T at both ends, mass/(T depth), or mass/T and mass/(3T), at every width, L."""
    for L in (1, 2, 3, 7):
        gpt = nanogpt_train.ModularGPT(11, L, 2, 8, 4, 0.0)
        one = [5 / 7] * 3 + [5 / 21] * 3                    # q, k, v; attention's output, up, down
        close(shares(gpt.modular_tree()), [1 / 7, 1 / 7, *one * L, 1 / 7], 1e-12, f"GPT with {L} blocks")
        for depth in (1, 2, 3):                             # ResMLP: norm, layer, abs, subtract the mean
            residue = (optim.bond("centre") @ optim.bond("abs") @ optim.weight(*linears(L * depth))) ** depth
            blocks = (((1 - 1 / L) * optim.bond("x") + 1 / L * residue) ** L).tare(1)
            mlp = optim.weight(nn.Linear(6, 3)) @ blocks @ optim.weight(nn.Linear(9, 6))
            close(shares(mlp), [1 / 3, *[1 / (3 * depth)] * L * depth, 1 / 3], 1e-12, f"ResMLP {L} x {depth}")
            assert mlp.mass == 3 and math.isclose(mlp.sensitivity, 1)


def test_powers_take_layers_in_order():
    """M ** L takes the i-th run of every leaf's layers for copy i, nested or not, and amplification by later copies. A
    tree prints as the expression that made it, whatever its bonds are called."""
    layers = linears(6)
    tree = (2 * (0.5 * optim.weight(*layers)) ** 3) ** 2    # 2 blocks of 3 layers, each block of sensitivity 2 / 8
    assert [leaf.layer for leaf, _, _ in tree.weights()] == layers
    expected = [1 / 6 / (0.5 ** (3 - i % 3) * 2 * (0.25 if i < 3 else 1)) for i in range(6)]
    close(shares(tree), expected, 1e-12, repr(tree))
    around = optim.weight(nn.Linear(6, 2)) @ optim.weight(*layers) ** 6 @ optim.weight(nn.Linear(3, 6), mass=2)
    close(shares(around), [2 / 9, *[1 / 9] * 7], 1e-12, "the copies have their masses beside others")
    text = str(tree)
    assert text.count("Linear 6x6  spectral") == 6 and "sensitivity 0.0625" in text, text
    a, b = optim.bond("a"), optim.bond("b")
    for tree, text in (((b @ a) ** 2, "(b @ a) ** 2"), (2 * (a + b) ** 3, "2 * ((a + b) ** 3)"),
                       (a + b @ a, "(a + b @ a)"), (optim.bond("C++") @ a, "C++ @ a"),
                       ((0.5 * optim.weight(*layers)).tare(3), "(0.5 * Linear 6x6 (of 6)).tare(3)")):
        assert repr(tree) == text, repr(tree)


def test_modular_sizes():
    """Once power iteration has settled, an update's largest singular value (by SVD) is lr * share * scale. A group's
    `scale` stands in for the usual size, in the step and as the norm of rows; a row of zeros stays."""
    for shape, scale in (((20, 30), math.sqrt(20 / 30)), ((30, 20, 3, 3), math.sqrt(30 / 20) / 9)):
        [w], g = parameters([shape]), normal(9, *shape)     # the same at every step, so d is its sign
        optimizer = optim.ModularAdam([{"params": [w], "share": 0.7}], lr=0.01)
        run(optimizer, [[g]] * 300)
        before = w.detach().clone()
        run(optimizer, [[g]])
        for step in (w.detach() - before).flatten(2).unbind(-1) if len(shape) > 2 else [w.detach() - before]:
            close(np.linalg.norm(step.numpy(), 2), 0.01 * 0.7 * scale, 1e-3, f"{shape}")
    for name in MODULAR:
        for shape in ((1, 9), (1, 9, 1, 1)):                # one row: its spectral norm is its Euclidean one
            [w] = parameters([shape])
            start = w.detach().clone()
            run(make(name, [{"params": [w], "scale": 3.0, "share": 0.5}], lr=0.1, weight_decay=0.0), noise([shape], 1))
            close((w - start).norm(), 0.1 * 0.5 * 3, 1e-12, f"{name} {shape}")
        [w], gradients = parameters([(6, 5)]), noise([(6, 5)], 3)
        w.data[2] = 0
        for [g] in gradients:
            g[2] = 0                                        # an Embedding's padding_idx
        long = {"max_dim": 0} if "shampoo" in name else {}
        run(make(name, [{"params": [w], "norm": "rows", "scale": 3.0}], **long), gradients)
        close(w.norm(dim=1), [3.0, 3.0, 0.0, 3.0, 3.0, 3.0], 1e-12, f"{name} rows")


def test_modular_survives_degenerate_updates():
    """Zero updates, ones orthogonal to the kept vector, of rank 1, tiny or not finite never spoil power iteration."""
    for name in MODULAR:
        [w], [start] = parameters([(4, 5)]), parameters([(4, 5)])
        optimizer = make(name, [w], weight_decay=0.0)
        run(optimizer, [[torch.zeros(4, 5, dtype=torch.float64)]] * 3)
        assert torch.equal(w, start), f"{name}: moved by nothing"
        run(optimizer, noise([(4, 5)], 3))
        assert w.isfinite().all() and not torch.equal(w, start), name
    hidden, first = (torch.zeros(4, 5, dtype=torch.float64) for _ in range(2))
    first[1, 1] = hidden[2, 0] = 1.0                        # row spaces e_1, which u takes on at once, and e_0
    for kernel in ([], [1], [1, 10]):                       # a matrix, and a convolution's positions
        factors = torch.tensor(kernel or 1.0, dtype=torch.float64)
        there = lambda x: x[..., None] * factors if kernel else x       # noqa: E731
        w = nn.Parameter(there(normal(0, 4, 5)))
        optimizer = optim.ModularSGD([w], lr=1.0, momentum=0.0)
        run(optimizer, [[there(first)]])
        before = w.detach().clone()
        run(optimizer, [[there(hidden)]])
        close(w - before, -(there(hidden) / factors) * math.sqrt(4 / 5) / max(1, len(kernel)), 1e-12, "orthogonal to u")
    [w] = parameters([(4, 5)])
    optimizer = optim.ModularSGD([w], lr=1.0, momentum=0.0)
    run(optimizer, [[hidden]])
    kept, huge = optimizer.state[w]["u"].clone(), torch.zeros_like(hidden)
    close(kept.abs(), [1, 0, 0, 0, 0], 1e-12, "u after an update of rank 1")
    huge[0] = 1e154                                         # times u it is in range; the square of its norm is not
    for spoilt in (huge, hidden * math.nan):
        run(optimizer, [[spoilt]])
        assert torch.equal(optimizer.state[w]["u"], kept), "a gradient that is no number has spoilt u"
    ends = []
    for factor in (1.0, 2.0**-300):                         # tiny, but the squares are still in range
        [w] = parameters([(4, 5)])
        run(make("modular_sgd", [w]), [[factor * g] for [g] in noise([(4, 5)], 5)])
        ends.append(w)
    same_bits(ends[:1], ends[1:], "tiny updates")


def test_initialise():
    """initialise: singular values sqrt(out/in), for a Conv at each kernel position over k^2; rows of norm sqrt(dim),
    and zeros at padding_idx; in bfloat16, too. A computed weight is refused."""
    up, down, conv, rows = nn.Linear(3, 12), nn.Linear(12, 3), nn.Conv2d(4, 8, 3), nn.Embedding(9, 5)
    padded, coarse = nn.Embedding(4, 5, padding_idx=2), nn.Linear(6, 3, dtype=torch.bfloat16)
    optim.initialise(optim.as_tree(tuple(map(optim.weight, (up, down, conv, rows, padded, coarse)))))
    singular = [(up.weight, 2.0), (down.weight, 0.5), (coarse.weight, math.sqrt(0.5)),
                *((position, math.sqrt(2) / 9) for position in conv.weight.flatten(2).unbind(2))]
    for w, expected in singular:
        found = np.linalg.svd(w.detach().float().numpy())[1]
        close(found, np.full_like(found, expected), 0.01 if w.dtype == torch.bfloat16 else 1e-5, f"{tuple(w.shape)}")
    close(rows.weight.norm(dim=1), np.full(9, math.sqrt(5)), 1e-5, "Embedding")
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
        inner, first, last = linears(L, width), *linears(1, 5, width), *linears(1, width, 3)
        net = nn.ModuleList([first, *inner, last]).double()
        block = (1 - 1 / L) * optim.bond("x") + 1 / L * (optim.bond("abs") @ optim.weight(*inner))
        tree = optim.weight(last) @ block ** L @ optim.weight(first)
        optim.initialise(tree)
        names = [name for name, _ in net.named_parameters()]
        share_of = dict(zip(names, shares(tree), strict=True))          # both in the order of the forward pass
        x = normal(0, 5)
        x *= math.sqrt(5) / x.norm()                                    # RMS 1

        def function(weights):
            h = weights[names[0]] @ x
            for name in names[1:-1]:
                h = (1 - 1 / L) * h + 1 / L * (weights[name] @ h).abs()
            return weights[names[-1]] @ h

        weights, worst = {name: p.detach() for name, p in net.named_parameters()}, 0.0
        for c in normal(1, 20, 3):
            slopes, update = torch.func.grad(lambda ws: (c * function(ws)).sum())(weights), {}
            for name, slope in slopes.items():
                U, S, V = torch.linalg.svd(slope, full_matrices=False)
                update[name] = share_of[name] * math.sqrt(slope.shape[0] / slope.shape[1]) * U[:, :1] @ V[:1]
            _, change = torch.func.jvp(function, (weights,), (update,))
            worst = max(worst, change.square().mean().sqrt().item())
        assert 0.05 <= worst <= 1 + 1e-9, f"width {width}, {L} blocks: the output changes by {worst}"


# ======================================================================================================================
# Matrices: shampoo, if_shampoo
# ======================================================================================================================

MODES = [(), (1, 1), (4,), (1, 4), (3, 4), (3, 1, 2), (2, 3, 4), (2, 2, 3, 2)]


def test_shampoos_equal_transcriptions():
    """shampoo and if_shampoo equal mode-by-mode transcriptions to 1e-10: 1 to 5 modes, rare roots, grafting, long
    modes, all gaps between preconditioner steps, under a schedule that starts at 0."""
    h, lrs = SETTINGS["shampoo"] | {"update_every": 1}, [0.004 * t for t in range(12)]
    for other in ({}, {"update_every": 3}, {"momentum": 0.0}, {"weight_decay": 0.0, "lr_cov": 0.5}, {"graft": "sgd"},
                  {"graft": "adam", "update_every": 3}, {"max_dim": 2}, {"max_dim": 0, "damping": 1e-3}):
        follows("shampoo", MODES, h | other, lrs)
    shapes, h = MODES + [(2, 3, 1, 2, 2, 2)], SETTINGS["if_shampoo"] | {"damping": 0.1, "update_every": 1}
    scales = {i: {"lr_cov_scale": (1.0, 0.25, 2.0)[i % 3]} for i in range(len(shapes))}
    for other, own in (({}, {}), ({"update_every": 2, "riemannian_momentum": 0.0}, {}),
                       ({"update_every": 10, "momentum": 0.0}, scales), ({"max_dim": 2, "weight_decay": 0.0}, scales),
                       ({"max_dim": 0, "batch_size": 100, "riemannian_momentum": 0.9}, {})):
        follows("if_shampoo", shapes, h | other, [0.02 * math.sin(t / 9) ** 2 for t in range(40)], own)


def test_shampoo_first_gradient_of_an_index():
    """An index without gradient until now has L = 0, so its roots are damping^(-1/4), in a matrix as in a diagonal."""
    damping = 1e-4
    for max_dim in (2, 1):
        w = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
        optimizer = optim.Shampoo([w], lr=1.0, momentum=0.0, damping=damping, update_every=5, max_dim=max_dim)
        here, there = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
        here[0, 0] = there[1, 1] = 1.0
        run(optimizer, [[here]] * 6)                        # the roots of step 5 know nothing of index 1
        before = w.detach().clone()
        run(optimizer, [[there]])
        close(before - w, there * damping ** -0.5, 1e-12, f"max_dim={max_dim}")


def test_shampoo_at_the_limits_of_its_type():
    """A matrix with eigenvalues from 0 to 10^6 has its roots in float32, and one with infinity in it gives NaN: neither
    stops the run. Zero gradients, grafted, move nothing."""
    a, b = (normal(i, 30, dtype=torch.float32) for i in range(2))
    g = 1e3 * torch.outer(a / a.norm(), b / b.norm())       # on a gradient of rank 1, s u v^T, both roots act as
    w = torch.zeros(30, 30, requires_grad=True)             # (s^2 + damping)^(-1/4): d = g / sqrt(s^2 + damping)
    run(optim.Shampoo([w], lr=1.0, momentum=0.0, damping=1e-6, lr_cov=1.0, update_every=1), [[g]])
    close(w.norm(), 1.0, 0.1, "the step")
    for value in (math.inf, math.nan):                      # where LAPACK is left alone with it, it fails
        w, g = torch.zeros(4, 4, requires_grad=True), normal(2, 4, 4, dtype=torch.float32)
        g[0, 0] = value
        run(optim.Shampoo([w], lr=1.0, momentum=0.0, update_every=1), [[g]] * 2)
        assert w.isnan().all(), f"a gradient with {value} in it went unnoticed"
    for graft in ("sgd", "adam"):                           # 0 rescaled to the norm 0
        params, starts = parameters(TURNING), parameters(TURNING)
        run(make("shampoo", params, graft=graft, weight_decay=0.0), [[torch.zeros_like(p) for p in params]] * 2)
        same_bits(params, starts, f"graft={graft}")


def test_if_shampoo_refreshes_on_time():
    """Preconditioner steps follow 'the one after step t is at t + min(max(floor(log_4(t+1)), 1), update_every)'."""
    for update_every in (1, 2, 3, 4, 7, 100):
        due, t = set(), 0
        while t < 5000:
            due.add(t)
            power = 0
            while 4 ** (power + 1) <= t + 1:                # floor(log_4(t+1)) in whole numbers
                power += 1
            t += min(max(power, 1), update_every)
        wrong = [t for t in range(5000) if optim.refreshes(t, update_every) != (t in due)]
        assert not wrong, f"update_every={update_every}: wrong at {wrong[:5]}"
    [p], moved, last = parameters([(3, 4)]), [], None       # and the factors do change at these steps and no others
    optimizer = make("if_shampoo", [p], update_every=10)
    for t, gradients in enumerate(noise([(3, 4)], 80)):
        run(optimizer, [gradients])
        K = optimizer.state[p]["K0"].clone()
        if last is None or not torch.equal(K, last):
            moved.append(t)
        last = K
    assert moved == [*range(15), *range(15, 63, 2), *range(63, 80, 3)], moved


def test_if_shampoo_finds_the_inverse():
    """On gradients N(0, S) one mode settles at K K^T = (B S + damping)^-1, without ever inverting anything."""
    # K averages about the last 1/lr_cov = 200 gradients, whose sampling noise is about sqrt(d lr_cov / 2) = 10 % at any
    # moment; averaged over 6000 steps it is 5 times smaller. E[K K^T] is above the inverse by the square of the noise,
    # 1 %. Riemannian momentum 0.95 keeps ||M|| under 1: where the step is clipped, the average is not that of H.
    d, B, damping, steps = 4, 5, 0.3, 7000
    X = normal(1, d, d)
    S = X @ X.T / d + 0.1 * torch.eye(d, dtype=torch.float64)
    gradients = normal(2, steps, d) @ torch.linalg.cholesky(S).T
    w = nn.Parameter(torch.zeros(d, dtype=torch.float64))
    optimizer = optim.InverseFreeShampoo([w], lr=0.0, momentum=0.0, damping=damping, lr_cov=0.005, update_every=1,
                                         riemannian_momentum=0.95, batch_size=B)
    average = torch.zeros(d, d, dtype=torch.float64)
    for t, g in enumerate(gradients):
        w.grad = g
        optimizer.step()
        if t >= 1000:
            K = optimizer.state[w]["K0"]
            average += K @ K.T / (steps - 1000)
    target = np.linalg.inv((B * S + damping * torch.eye(d, dtype=torch.float64)).numpy())
    assert np.linalg.cond(target) > 5, "nearly a multiple of I, so this shows little"
    close(average, target, 0.05, "K K^T")


def test_matrix_directions_do_not_feel_rotations():
    """w = P u Q^T with orthogonal P, Q: shampoo and if_shampoo map the trajectory of u to that of w."""
    # A factor starts as a multiple of I, which looks alike in all orthogonal coordinates, and then turns with the
    # gradient. Damping and decay are round as well, so they need not be 0.
    for name, shape in itertools.product(("shampoo", "if_shampoo"), ((5,), (4, 6))):
        P, Q = orthogonal(1, shape[0]), orthogonal(2, shape[-1])
        turn = (lambda x: P @ x) if len(shape) == 1 else (lambda x: P @ x @ Q.T)
        back = (lambda x: P.T @ x) if len(shape) == 1 else (lambda x: P.T @ x @ Q)
        [w] = parameters([shape])
        u = nn.Parameter(back(w.detach()))
        ours, theirs = make(name, [w], update_every=1), make(name, [u], update_every=1)
        for [g] in noise([shape], 30):
            run(ours, [[g]])
            run(theirs, [[back(g)]])
            close(turn(u.detach()), w, 1e-10, f"{name} {shape}")


def test_if_shampoo_does_not_feel_any_linear_map():
    """w = P u with any invertible P, one mode, damping 0: the same trajectory, if K of u starts at P^-1, not at I."""
    # It is Newton's invariance: K^T g is the same vector in both coordinates. Started from K = I as always, it is lost
    # unless P is orthogonal. Decay takes part, since P (wd u) = wd w.
    P, [w] = normal(1, 5, 5) + 2 * torch.eye(5, dtype=torch.float64), parameters([(5,)])
    u = nn.Parameter(torch.linalg.solve(P, w.detach()))
    idle = {"lr_cov": 0.0, "damping": 0.0, "weight_decay": 0.1, "update_every": 1, "momentum": 0.8, "lr": 0.0}
    ours, theirs = make("if_shampoo", [w], **idle), make("if_shampoo", [u], **idle)
    for optimizer in (ours, theirs):
        run(optimizer, [[torch.zeros(5, dtype=torch.float64)]])         # makes the state and moves nothing: lr = 0
    theirs.state[u]["K0"].copy_(torch.linalg.inv(P))
    for t, [g] in enumerate(noise([(5,)], 30)):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(lr=0.05, lr_cov=0.2)
        run(ours, [[g]])
        run(theirs, [[P.T @ g]])                            # the gradient of u, by the chain rule
        close(P @ u.detach(), w, 1e-10, f"step {t + 1}")


def test_if_shampoo_does_not_overflow_on_the_way():
    """K = +-2^10 I gives d = 2^20 g in float16, whose largest number is 2^16: K K^T is never formed as it is."""
    for shape, sign in itertools.product(((2, 2), (4,)), (1, -1)):
        state = {f"{letter}{i}": torch.eye(n, dtype=torch.float16) for i, n in enumerate(shape) for letter in "KM"}
        state["K0"] *= sign * 2**10
        g = 2**-12 * torch.arange(1.0, 5.0).view(shape)
        close(optim.DIRECTIONS["if_shampoo"].update(g, state, {"refresh": False}), 2**20 * g, 0, f"{shape} {sign}")


# In bfloat16: 8 bits, a relative rounding of up to 2^-9 = 0.2 %.


class Watch(TorchDispatchMode):
    """Sees every operation that reaches a device while it is on: matrix products with the dtypes of their inputs, how
    often a number was fetched from a tensor, which makes the host wait for the device, and how many bytes the largest
    tensor has that any operation makes (a view is not made)."""
    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "matmul")

    def __init__(self):
        super().__init__()
        self.products, self.fetched, self.largest = [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, leaves = func.overloadpacket.__name__, torch.utils._pytree.tree_leaves
        if name in self.PRODUCTS:
            self.products += [x.dtype for x in args if torch.is_tensor(x)]
        self.fetched += name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal")
        known = {x.untyped_storage().data_ptr() for x in leaves((args, kwargs)) if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for x in leaves(out):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def test_if_shampoo_runs_in_bfloat16():
    """dtype=bfloat16: all state and all products are bfloat16, weights float32, the run close to that of float32."""
    h = {"lr": 0.05, "momentum": 0.8, "damping": 1e-3, "lr_cov": 0.2, "weight_decay": 1e-3, "batch_size": 32}
    for kind in (optim.InverseFreeShampoo, optim.OPTIMIZERS["rotational_if_shampoo"]):
        params = parameters(MIXED, torch.float32)
        optimizer = kind(params, dtype=torch.bfloat16, **h)
        run(optimizer, noise(MIXED, 3, torch.float32))
        with Watch() as watch:
            run(optimizer, noise(MIXED, 3, torch.float32, seed=7))
        assert watch.products and set(watch.products) == {torch.bfloat16}, f"products in {set(watch.products)}"
        for p in params:
            # What the geometry keeps of its own, lengths of neurons, is no part of the recursion.
            found = {x.dtype for key, x in tensors(optimizer.state[p]).items() if key[0] in "KM" or "momentum" in key}
            assert p.dtype == torch.float32 and found == {torch.bfloat16}, f"{kind.__name__}: {found}"
        weights = [parameters(MIXED[:2], torch.float32) for _ in "ab"]
        for params, dtype in zip(weights, (torch.float32, torch.bfloat16)):
            run(kind(params, dtype=dtype, **h), noise(MIXED[:2], 20, torch.float32))
        for p, q, start in zip(*weights, parameters(MIXED[:2], torch.float32)):
            close(q, p, 0.1, f"{kind.__name__} after 20 steps", scale=(p - start).abs().max().item())
            assert not torch.equal(p, q), "bfloat16 was not felt at all"


# ======================================================================================================================
# The optimizer: do this in mid-run, get the same numbers
# ======================================================================================================================


class Trial:
    """Three steps of an optimizer on named parameters of all types, and whatever an act puts in place of its parts."""
    KINDS = [((4, 6), torch.float32), ((3, 2, 3, 3), torch.float64), ((5, 3), torch.bfloat16),
             ((5,), torch.float32), ((), torch.float64), ((3,), torch.bfloat16)]
    # numbers that are exact in all types
    GRADIENTS = [[(8 * g).round() / 8 for g in step] for step in noise([shape for shape, _ in KINDS], 3)]

    def __init__(self, name):
        self.name, self.take, self.around, self.left = name, lambda: self.optimizer.step(), contextlib.nullcontext, []
        self.params = [nn.Parameter(normal(i, *shape, dtype=dtype)) for i, (shape, dtype) in enumerate(self.KINDS)]
        self.begin()

    def named(self):
        return list(zip("abcdef", self.params))

    def begin(self, groups=None, **hyper):
        self.optimizer = make(self.name, groups or self.named(), **hyper)

    def leave(self, found):
        """These tensors must not change any more."""
        self.left += [(x, x.detach().clone()) for x in found]

    def step(self, t):
        given = [g.to(getattr(p, "grad_dtype", None) or p.dtype) for p, g in zip(self.params, self.GRADIENTS[t])]
        for p, g in zip(self.params, given):
            p.grad = g.clone(memory_format=torch.preserve_format)
        with self.around():
            self.take()
        same_bits([p.grad for p in self.params], given, "a step changed a gradient")
        same_bits(*zip(*self.left) if self.left else ([], []), "a tensor that is not part of it")

    def reload(self, edit=lambda saved: saved, file=through_a_file, order=slice(None)):
        """Weights from a file, then an optimizer on them with other settings, then its state: a resumed run."""
        saved = file({"params": values(self.params), "optimizer": self.optimizer.state_dict()})
        self.params = [nn.Parameter(x) for x in saved["params"]]
        self.optimizer = optim.OPTIMIZERS[self.name](self.named()[order], **required(self.name))
        self.optimizer.load_state_dict(edit(saved["optimizer"]))

    def split(self):
        [group] = self.optimizer.param_groups
        self.optimizer.param_groups[:] = [group | {key: group[key][i::2] for key in ("params", "param_names")}
                                           for i in range(2)]

    def added(self):
        self.begin(self.named()[:2])
        for pair in self.named()[2:]:
            self.optimizer.add_param_group({"params": [pair]})

    def alone(self):
        optimizers = [make(self.name, [pair]) for pair in self.named()]
        self.take = lambda: [one.step() for one in optimizers]

    def closure(self):
        def take():
            gradients, calls = [p.grad.clone() for p in self.params], []

            def compute():
                self.optimizer.zero_grad()
                calls.append(sum((p * g).sum().double() for p, g in zip(self.params, gradients)))
                calls[-1].backward()                            # needs gradients enabled
                return calls[-1]

            assert [self.optimizer.step(compute)] == calls, "a closure is called once, and its loss is returned"
        self.take = take

    def scaled(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)

        def take():
            before, gradients = values(self.params), [p.grad.clone() for p in self.params]
            for factor in (math.inf, 1.0):                      # the infinite one must not be felt
                same_bits(self.params, before, "moved by an infinite gradient")
                for p, g in zip(self.params, gradients):
                    p.grad = g * (scaler.scale(torch.tensor(1.0)).item() * factor)
                scaler.step(self.optimizer)
                scaler.update()
        self.take = take

    def nothing_to_do(self):
        self.optimizer.zero_grad()
        self.optimizer.step()

    def kept_company(self):
        for i, p in enumerate(self.params):
            self.optimizer.state[p] |= {"seen": torch.tensor(0), "note": "mine", f"average {i % 2}": torch.ones(i)}

    def subclass(self):
        class Own(optim.OPTIMIZERS[self.name]):
            def __init__(self, params, keep=0.9, **hyper):
                super().__init__(params, **hyper)
                self.keep = keep

        self.optimizer = Own(self.named(), **settings(self.name))

    def laid_out(self):
        for p in self.params:
            p.data = p.data.to(memory_format=torch.channels_last) if p.dim() == 4 else p.data.mT.contiguous().mT \
                if p.dim() == 2 else p.data
        strides = [p.stride() for p in self.params]
        self.begin()
        self.take = lambda: (self.optimizer.step(), [p.stride() for p in self.params] == strides or 1 / 0)

    def coarse_gradients(self):
        for p in self.params if hasattr(torch.Tensor, "grad_dtype") else ():
            p.grad, p.grad_dtype = None, torch.bfloat16

    def of_torch(self):
        """torch's own checkpoints, which go by the model's names and take a step with lr 0 on a fresh optimizer."""
        from torch.distributed.checkpoint import state_dict as checkpoints
        saved = checkpoints.get_optimizer_state_dict(nn.ParameterDict(self.named()), self.optimizer)
        self.params = [nn.Parameter(p.detach().clone()) for p in self.params]
        self.begin()
        checkpoints.set_optimizer_state_dict(nn.ParameterDict(self.named()), self.optimizer, saved)


def edited(group=None, **entries):
    """A state_dict with other entries in its groups and its states, each made from the old one."""
    def edit(saved):
        saved["param_groups"] = [(g | group if isinstance(group, dict) else group(g)) if group else g
                                 for g in saved["param_groups"]]
        for state in saved["state"].values():
            state |= {key: make_entry(state) for key, make_entry in entries.items()}
        return saved
    return edit


FOREIGN = {"lr_scale": 0.5, "tag": "head", "layer": 3, "name": "body", "initial_lr": 1.0, "max_lr": 1.0, "min_lr": 0.0,
           "base_momentum": 0.1, "max_momentum": 0.9, "swa_lr": 0.1, "wd_multiplier": 1.0}


def copied(duplicate):
    def act(trial):
        trial.leave([*trial.params, *(x for s in trial.optimizer.state.values() for x in tensors(s).values())])
        trial.params, trial.optimizer = duplicate((trial.params, trial.optimizer))
    return act


def scheduled(make_lr):
    return lambda trial: trial.optimizer.param_groups[0].update(lr=make_lr(settings(trial.name)["lr"]))


def under(around):
    return lambda trial: setattr(trial, "around", around)


@contextlib.contextmanager
def setting(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


SAME = [    # the claim; the step before which it happens; the act; how far off weights may end, in eps of their type
    ("a checkpoint resumes", 1, Trial.reload, 0),
    ("a checkpoint before the first step", 0, Trial.reload, 0),
    ("a checkpoint of a checkpoint", 1, lambda trial: (trial.reload(), trial.reload()), 0),
    ("a checkpoint whose step counts are tensors", 1, lambda trial: trial.reload(
        edited(step=lambda state: torch.tensor(float(state["step"])))), 8),
    ("a checkpoint with foreign keys and entries", 1, lambda trial: trial.reload(
        edited(FOREIGN, ema=lambda state: torch.ones(2), note=lambda state: "mine")), 0),
    ("a checkpoint without names", 1, lambda trial: trial.reload(
        edited(lambda group: {key: x for key, x in group.items() if key != "param_names"})), 0),
    ("a checkpoint of a run that was compiled", 1, lambda trial: trial.reload(edited({"compile": True})), 0),
    ("a checkpoint in another order", 1, lambda trial: trial.reload(order=slice(None, None, -1)), 0),
    ("a state_dict handed over in memory", 1, lambda trial: (
        trial.leave(x for state in trial.optimizer.state.values() for x in tensors(state).values()),
        trial.reload(file=lambda saved: saved)), 0),
    ("torch's own checkpoints", 1, Trial.of_torch, 0),
    ("pickle", 1, copied(lambda pair: pickle.loads(pickle.dumps(pair))), 0),
    ("deepcopy", 1, copied(copy.deepcopy), 0),
    ("one group split into two", 1, Trial.split, 0),
    ("groups added one by one", 0, Trial.added, 0),
    ("each parameter in an optimizer of its own", 0, Trial.alone, 0),
    ("foreign keys in a group", 1, lambda trial: trial.optimizer.param_groups[0].update(FOREIGN), 0),
    ("foreign keys from the start", 0, lambda trial: trial.begin([{"params": trial.named()} | FOREIGN]), 0),
    ("lr as a tensor", 1, scheduled(lambda lr: torch.tensor(lr, dtype=torch.float64)), 16),
    ("lr as a tensor with one entry", 1, scheduled(lambda lr: torch.tensor([lr], dtype=torch.float64)), 16),
    ("autocast to bfloat16", 1, under(lambda: torch.autocast("cpu", torch.bfloat16)), 0),
    ("autocast to float16", 1, under(lambda: torch.autocast("cpu", torch.float16)), 0),
    ("another matmul precision", 1, under(lambda: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium")), 0),
    ("another default device", 0, lambda trial: (under(lambda: torch.device("meta"))(trial), trial.begin()), 0),
    ("another default type", 0, lambda trial: under(lambda: setting(
        torch.get_default_dtype, torch.set_default_dtype, torch.float64))(trial), 0),
    ("other random numbers", 0, lambda trial: (torch.manual_seed(9), trial.begin()), 0),
    ("a closure", 1, Trial.closure, 0),
    ("a GradScaler", 1, Trial.scaled, 0),
    ("a step without any gradient", 1, Trial.nothing_to_do, 0),
    ("hooks around a step", 1, lambda trial: (trial.optimizer.register_step_pre_hook(lambda *_: None),
                                              trial.optimizer.register_step_post_hook(lambda *_: None)), 0),
    ("a user's own entries in the state", 1, Trial.kept_company, 0),
    ("a subclass with an argument of its own", 0, Trial.subclass, 0),
    ("gradients of another type", 1, Trial.coarse_gradients, 0),
    ("other memory layouts", 0, Trial.laid_out, 64),
    ("tensors cut into blocks", 1, under(lambda: unittest.mock.patch("optim.block_size", lambda *_: 7)), 0),
]


def test_same_numbers_whatever_is_done():
    """For every optimizer and every row of SAME: three steps with the act in between end where three steps end."""
    for name in optim.OPTIMIZERS:
        straight = Trial(name)
        for t in range(3):
            straight.step(t)
        for claim, when, act, tolerance in SAME:
            trial = Trial(name)
            for t in range(3):
                if t == when:
                    act(trial)
                try:
                    trial.step(t)
                except Exception as error:
                    raise AssertionError(f"{name}, {claim}: {error}") from error
            for key, (p, q) in zip("abcdef", zip(trial.params, straight.params)):
                if tolerance:
                    close(p.double(), q.double(), tolerance * torch.finfo(p.dtype).eps, f"{name}, {claim}, {key}",
                          scale=max(1, q.abs().max().item()))
                else:
                    same_bits([p], [q], f"{name}, {claim}, parameter {key}")
            for group in trial.optimizer.param_groups:
                assert group["compile"] is False, f"{name}, {claim}: compile has been loaded"
                if "foreign" in claim:
                    assert FOREIGN.items() <= group.items(), f"{name}, {claim}: lost"


def test_checkpoints_keep_precision():
    """State is float32, or the parameter's type if that is wider, or `dtype`; a checkpoint brings it back as it was,
    whatever `dtype` says, and in another precision as if made there, where the run goes on."""
    types = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    cases = [(name, {}) for name in optim.OPTIMIZERS] + [
        (name, {"dtype": dtype, "momentum": momentum} | ({"graft": "adam"} if "if_" not in name else {}))
        for name in optim.OPTIMIZERS if "shampoo" in name for dtype in types[2:] for momentum in (0.8, 0.0)]
    for name, options in cases:
        params, fresh = ([parameters([(4, 6)], dtype)[0] for dtype in types] for _ in "ab")
        optimizer, loaded = make(name, params, **options), make(name, fresh)
        run(optimizer, [[g.to(dtype) for dtype in types] for [g] in noise([(4, 6)], 3)])
        loaded.load_state_dict(through_a_file(optimizer.state_dict()))
        for p, q, dtype in zip(params, fresh, types):
            wide, rounded = dtype if dtype in types[2:] else torch.float32, False
            assert optimizer.state[p].keys() == loaded.state[q].keys() and loaded.state[q]["step"] == 3, name
            for key, x in tensors(optimizer.state[p]).items():
                matrix = key[0] in "LRKM" or key == "momentum_buffer" and "if_shampoo" in name
                assert x.dtype == (options.get("dtype", wide) if matrix else wide), f"{name} {options} {key} {x.dtype}"
                same_bits([loaded.state[q][key]], [x], f"{name} {options} {key}")
                rounded |= not torch.equal(x, x.to(dtype).to(x.dtype))
            assert rounded or dtype in types[2:], f"{name}: the state fits into {dtype}, so this shows nothing"
        for here, there in (types[2:], types[:1:-1]) if not options else ():
            params, fresh = parameters(MIXED, here), parameters(MIXED, there)
            optimizer, loaded = make(name, params), make(name, fresh)
            run(optimizer, noise(MIXED, 3, here))
            loaded.load_state_dict(through_a_file(optimizer.state_dict()))
            for p, q in zip(params, fresh):
                q.data.copy_(p.data)
                assert {x.dtype for x in tensors(loaded.state[q]).values()} == {there}, name
            run(loaded, noise(MIXED, 1, there, seed=7))
            run(optimizer, noise(MIXED, 1, here, seed=7))
            for p, q in zip(params, fresh):
                close(q, p, 1e-4, f"{name} {here} to {there}")


def test_hooks_of_checkpoints():
    """What a user's hook makes of a state_dict is what is loaded, and what it does to the loaded state stays; none of
    ours is left behind."""
    shapes = [(4, 6), (4, 6), (5,)]
    for name in optim.OPTIMIZERS:
        saved, loaded = (make(name, parameters(shapes, torch.bfloat16)) for _ in "ab")
        run(saved, noise(shapes, 2, torch.bfloat16))
        loaded.load_state_dict(saved.state_dict())
        assert not (loaded._optimizer_load_state_dict_pre_hooks or loaded._optimizer_load_state_dict_post_hooks), name
        loaded.register_load_state_dict_pre_hook(
            lambda _, state: state | {"state": {0: state["state"][1], 1: state["state"][0], 2: state["state"][2]}})
        loaded.register_load_state_dict_post_hook(lambda self: self.state[everything(self)[2]].update(
            {key: torch.zeros_like(x) for key, x in tensors(self.state[everything(self)[2]]).items()}, step=7))
        loaded.load_state_dict(saved.state_dict())
        for ours, theirs, factor in zip(everything(loaded), [everything(saved)[i] for i in (1, 0, 2)], (1, 1, 0)):
            for key, value in tensors(saved.state[theirs]).items():
                same_bits([loaded.state[ours][key]], [factor * value], f"{name}: {key}")
        assert [loaded.state[p]["step"] for p in everything(loaded)] == [2, 2, 7], name


def test_foreign_checkpoints_are_refused():
    """The state_dict of another kind of optimizer, or model, is a ValueError, and nothing has been loaded."""
    pairs = [("adamw", "sgd"), ("adamw", torch.optim.SGD), ("rotational_sgd", "sgd"), ("rotational_adamw", "adamw"),
             # and where the other one knows more hyperparameters, not fewer
             ("sgd", "rmsprop"), ("lion", "adamw"), ("adamw", "rotational_adamw"), ("lion", "rotational_adamw"),
             ("rmsprop", "rf_rmsprop"), ("rf_adamw", "adamw"), ("if_shampoo", "shampoo"), ("shampoo", "if_shampoo"),
             ("modular_adam", "modular_lion")]                  # the same hyperparameters, one average less
    cases = [(name, other, [("w", (4, 6))], [("w", (4, 6))], []) for name, other in pairs]
    for name in optim.OPTIMIZERS:
        cases += [(name, name, [("w", (4, 6))], [("w", (4, 8))], ["another model", "w (4, 8) is (4, 6)"]),
                  (name, name, [("w", (4, 6)), ("q", (3, 4))], [("w", (4, 6)), ("k", (3, 4))], ["k", "q"])]
    for name, other, saved, here, words in cases:
        theirs, ours = (list(zip([n for n, _ in pairs], parameters([shape for _, shape in pairs])))
                        for pairs in (saved, here))
        other = make(other, theirs, lr=0.5) if isinstance(other, str) else other(theirs, lr=0.5)
        run(other, noise([shape for _, shape in saved], 2))
        optimizer = make(name, ours)
        refused(ValueError, [type(optimizer).__name__, *words], lambda: optimizer.load_state_dict(other.state_dict()))
        assert not optimizer.state and optimizer.param_groups[0]["lr"] == settings(name)["lr"], f"{name}: half loaded"


def test_missing_gradients():
    """A parameter without gradient stays as it is, decay or not, and gets no state. One that misses gradients at some
    steps ends where it would without these steps. Its averages change in place."""
    gradients = noise(MIXED, 6)
    for name in optim.OPTIMIZERS:
        params, alone = parameters(MIXED), parameters(MIXED)
        optimizer, starts = make(name, params), values(params)
        starts = values(params)                             # taken after construction, which centres neurons
        run(optimizer, [[g if i else None for i, g in enumerate(gradients[0])]])
        same_bits(params[:1], starts[:1], name)
        assert params[0] not in optimizer.state, f"{name}: state without a gradient"
        run(optimizer, gradients[1:2])
        held = [x for p in params for x in [p, *tensors(optimizer.state[p]).values()]]
        places = [x.data_ptr() for x in held]
        run(optimizer, [[g if t % 2 or i else None for i, g in enumerate(gradients[t])] for t in range(2, 6)])
        assert places == [x.data_ptr() for x in held], f"{name}: something was replaced"
        run(make(name, alone[:1]), [step[:1] for step in gradients[1::2]])
        run(make(name, alone[1:]), [step[1:] for step in gradients])
        same_bits(params, alone, name)
        assert [optimizer.state[p]["step"] for p in params] == [3, 6, 6, 6], name
        assert isinstance(optimizer, torch.optim.Optimizer) and "weight_decay" in repr(optimizer), name
        optimizer.zero_grad()
        assert all(p.grad is None for p in params) and optimizer.defaults["lr"] == settings(name)["lr"], name


def test_a_step_with_lr_0_changes_nothing():
    """Under every geometry a step with lr 0 leaves weights of all types, to the bit: on a fresh optimizer and later."""
    types = torch.float64, torch.float32, torch.bfloat16, torch.float16
    for name, dtype in itertools.product(optim.OPTIMIZERS, types):
        params = [*parameters(MIXED, dtype), *parameters([(6, 5)], dtype, seed=9)]
        groups = [{"params": params[:4]}, {"params": params[4:]} | ({"norm": "rows"} if rescales(name) else {})]
        optimizer, gradients = make(name, groups), noise([p.shape for p in params], 3, dtype)
        lrs = [group["lr"] for group in optimizer.param_groups]
        for t, step in enumerate(gradients):
            here = values(params)
            for group, lr in zip(optimizer.param_groups, lrs):
                group["lr"] = lr if t == 1 else 0.0
            run(optimizer, [step])
            if t != 1:
                same_bits(params, here, f"{name} {dtype} step {t}")


def test_schedulers_drive_it():
    """All schedulers of torch (some move momentum or beta1 too) act as on torch.optim."""
    torchs, parts = torch.optim.lr_scheduler, lambda o: [torchs.ConstantLR(o, factor=0.5), torchs.StepLR(o, 4)]
    kinds = {"LambdaLR": {"lr_lambda": lambda t: min(1, t / 5)}, "MultiplicativeLR": {"lr_lambda": lambda t: 0.9},
             "StepLR": {"step_size": 4}, "MultiStepLR": {"milestones": [3, 9]}, "ConstantLR": {"factor": 0.5},
             "LinearLR": {"end_factor": 0, "total_iters": 4},                           # ends at lr = -4e-19
             "ExponentialLR": {"gamma": 0.9}, "CosineAnnealingLR": {"T_max": 8}, "PolynomialLR": {"total_iters": 6},
             "CosineAnnealingWarmRestarts": {"T_0": 4}, "ReduceLROnPlateau": {"patience": 1},
             "CyclicLR": {"base_lr": 0.001, "max_lr": 0.05, "step_size_up": 3},
             "OneCycleLR": {"max_lr": 0.1, "total_steps": 20}, "SequentialLR": {}, "ChainedScheduler": {}}
    assert kinds.keys() == set(torchs.__all__) - {"LRScheduler"}, "torch has other schedulers now"
    for kind, options in kinds.items():
        def schedule(optimizer):
            if kind == "SequentialLR":
                return torchs.SequentialLR(optimizer, parts(optimizer), [3])
            return getattr(torchs, kind)(optimizer, **options) if options else torchs.ChainedScheduler(parts(optimizer))
        metrics = [1.0] if kind == "ReduceLROnPlateau" else []
        for name, twin in TORCH_TWINS.items():
            ours, theirs = parameters(MIXED), parameters(MIXED)
            for optimizer in (make(name, ours), twin(theirs, **settings(name))):
                scheduler = schedule(optimizer)
                for step_gradients in noise(MIXED, 8):
                    run(optimizer, [step_gradients])
                    scheduler.step(*metrics)
            for p, q in zip(ours, theirs):
                close(p, q, 1e-12, f"{name} {kind}")
        optimizer = make("rotational_sgd", parameters(MIXED))   # no twin in torch, but it takes what they leave
        scheduler = schedule(optimizer)
        for step_gradients in noise(MIXED, 5):
            run(optimizer, [step_gradients])
            scheduler.step(*metrics)


def test_precisions():
    """bfloat16, float16 and float32 parameters follow float64 ones as closely as one rounding a step allows."""
    for name, dtype in itertools.product(optim.OPTIMIZERS, (torch.bfloat16, torch.float16, torch.float32)):
        gradients, params = noise(MIXED, 8, dtype), parameters(MIXED, dtype)
        exact = [nn.Parameter(p.detach().double()) for p in params]
        starts = values(exact)
        run(make(name, params), gradients)
        run(make(name, exact), [[g.double() for g in step] for step in gradients])
        for p, q in zip(params, exact):
            assert p.dtype == dtype and p.isfinite().all(), f"{name} {dtype}"
            # Rounding to nearest costs at most half an eps of the weight each step.
            close(p.double(), q, 8 * torch.finfo(dtype).eps, f"{name} {dtype} {tuple(p.shape)}",
                  scale=max(1.0, q.abs().max().item()))
        moved = max((q - start).abs().max().item() for q, start in zip(exact, starts))
        assert moved > 0.03, f"{name}: hardly moved ({moved}), so this shows nothing"


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


def test_random_shapes_and_hyperparameters():
    """Every optimizer equals its slow reference for random shapes of 0 to 4 dims and random hyperparameters; parameters
    without any number in them are harmless."""
    for name, case in itertools.product((name for name in optim.OPTIMIZERS if base(name) in DIRECTIONS), range(12)):
        kind, r = optim.OPTIMIZERS[name], random.Random(f"{name} {case}")
        sizes = (1, 3, 5) if name == "modular_lion" else (1, 2, 3, 4, 5)        # signs cancel in even numbers
        shape = tuple(r.choice(sizes) for _ in range(r.randint(0, 4)))
        drawn = {"lr": r.uniform(0, 0.1), "momentum": r.choice([0.0, r.uniform(0, 0.95)]), "seed": case,
                 "betas": (r.uniform(0, 0.95), r.uniform(0.5, 0.999)), "alpha": r.uniform(0.5, 0.99),
                 "eps": 10 ** r.uniform(-8, -1), "weight_decay": r.choice([0.0, r.uniform(0, 0.5)]),
                 "batch_size": r.choice([0.5, 1, 100]), "bias_correction": r.random() < 0.5,
                 "damping": 10 ** r.uniform(-3, 0), "lr_cov": r.uniform(0.01, 0.3),
                 "riemannian_momentum": r.uniform(0, 0.9), "update_every": r.randint(1, 4),
                 "max_dim": r.choice([0, 3, 2048]), "graft": r.choice([None, "sgd", "adam"]),
                 "zero_mean": r.random() < 0.5, "per_neuron": r.random() < 0.5,
                 "update_norm_decay_factor": r.choice([0.0, r.random()])}
        h, own = {key: value for key, value in drawn.items() if key in kind.takes()}, {}
        if turns(name) and math.prod(shape[h["per_neuron"]:]) < 2 + h["zero_mean"]:
            own = {"rotational": False} if len(shape) > 1 else {}
        if rescales(name) and len(shape) > 1:
            own = {"share": r.random(), "norm": r.choice(["spectral", "rows"]) if len(shape) == 2 else "spectral"}
        lrs = [h["lr"] * r.choice([0, r.random(), 1]) for _ in range(8)]
        empty = [] if "shampoo" in name else [(0,), (0, 5), (3, 0)]             # numpy has no unfolding of these
        gradients = noise([shape, *empty], 8)
        for step in gradients[2:5] if len(shape) == 2 and shape[0] > 1 and "shampoo" not in name else ():
            step[0][-1] = 0                                 # a token that does not occur
        follows(name, [shape, *empty], h, lrs, {0: own}, gradients, tolerance=1e-9)


def test_blocks_change_nothing_but_memory():
    """Cut into blocks of rows, large tensors get the same numbers to the bit, and whatever a step makes is no larger. A
    tensor that turns as one, or whose direction sees more than an entry, is not cut."""
    shapes, small = [(50, 8), (7, 3, 2, 2), (90,)], 45
    gradients = noise(shapes, 4)
    for name in optim.OPTIMIZERS:
        for options in [{}] + [{"norm": "rows"}] * rescales(name) + [{"per_neuron": False}] * turns(name):
            some = slice(None, None, 2 if "norm" in options else 1)             # no filters under that norm
            whole, cut, given = parameters(shapes)[some], parameters(shapes)[some], [step[some] for step in gradients]
            run(make(name, [{"params": whole} | options]), given)
            optimizer = make(name, [{"params": cut} | options])
            run(optimizer, given[:1])               # makes the state
            with unittest.mock.patch("optim.block_size", lambda geometry, device, compiled: small):
                run(optimizer, given[1:-1])
                for p, g in zip(cut, given[-1]):
                    p.grad = g
                with Watch() as watch:
                    optimizer.step()
            same_bits(whole, cut, f"{name} {options}")
            alike = "norm" in options or not (options or rescales(name))
            if optimizer.direction.by_entry and alike:
                assert 0 < watch.largest <= 8 * small, f"{name} {options} made a tensor of {watch.largest} bytes"


def test_no_step_waits_for_the_device():
    """Once its state exists, no optimizer fetches a number from a tensor during step(), nor makes tensors elsewhere:
    meta tensors, which have no numbers, get through. A checkpoint brings state to its parameter's device."""
    with Watch() as watch:
        torch.ones(1).item()
    assert watch.fetched == 1, "the watch is blind"
    cases = [(name, {}) for name in optim.OPTIMIZERS] + [("shampoo", {"graft": graft}) for graft in ("sgd", "adam")]
    for name, options in cases:
        optimizer = make(name, parameters(MIXED, torch.float32), **options)
        run(optimizer, noise(MIXED, 1, torch.float32))
        with Watch() as watch:
            run(optimizer, noise(MIXED, 3, torch.float32))
        assert watch.fetched == 0, f"{name}: {watch.fetched} numbers fetched in 3 steps"
        far = [nn.Parameter(p.detach().to("meta")) for p in parameters(MIXED, torch.float32)]
        with unittest.mock.patch("optim.Optimizer._check_parameter"):           # it looks at a neuron's numbers, once
            for saved in (None, through_a_file(optimizer.state_dict())):
                loaded = make(name, far)
                if saved:
                    loaded.load_state_dict(saved)
                run(loaded, [[torch.empty_like(p) for p in far]])
                held = [x for p in far for x in tensors(loaded.state[p]).values()]
                assert held and all(x.is_meta for x in held), name


def network(seed=0):
    """Two layers in float64."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(normal(seed + i, *p.shape))
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
            optim.build(name, model, **settings(name))          # accepts what the class accepts
            with unittest.mock.patch("optim.block_size", lambda geometry, device, compiled: 10):
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
        if rescales(name) or not optim.OPTIMIZERS[name].direction.by_entry:
            assert "parameter 0 of group 0 (5, 6) is a DTensor" in found, found
        for reached in [one[name]] + [found] * (not isinstance(found, str)):
            for p, q in zip(reached, model.parameters(), strict=True):
                close(p, q, 1e-10, f"{name}: two processes beside one")


def test_compiled_equals_eager():
    """compile=True gives the numbers of eager mode under a changing lr, for tensors in blocks, of 0 dims, embeddings,
    and compiles nothing after the first step; so does torch.compile of a whole training step."""
    named, found = os.environ.get("CXX"), [shutil.which(c) for c in ("c++", "g++", "clang++")]
    if not (shutil.which(named) if named else any(found)):
        raise Skip("torch.compile needs a C++ compiler: none of $CXX, c++, g++, clang++ was found")
    from torch._dynamo.utils import counters
    shapes, lrs = [(8, 6), ()], [0.01 * t for t in range(4)]
    for name, small in (("rotational_sgd", 24), ("modular_sgd", sys.maxsize)):              # 24: twice 4 rows
        options = {"norm": "rows"} if rescales(name) else {}                    # where torch's compiler has a bug
        torch._dynamo.reset()
        counters.clear()
        params, compiled, graphs = parameters(shapes), parameters(shapes), []
        optimizer = make(name, [{"params": compiled} | options], compile=True)
        run(make(name, [{"params": params} | options]), noise(shapes, 4), lrs)
        with unittest.mock.patch("optim.block_size", lambda geometry, device, compiled: small):
            for lr, step in zip(lrs, noise(shapes, 4)):
                run(optimizer, [step], [lr])
                graphs.append(counters["stats"]["unique_graphs"])
        for p, q in zip(compiled, params):
            close(p, q, 1e-12, name)
        assert 0 < graphs[0] == graphs[-1], f"{name}: compiled again and again, or never: {graphs}"
    model, twin = network(), network()
    step, x = torch.compile(train, backend="aot_eager"), [normal(0, 8, 6)]      # all but the code generation
    step(model, make("rotational_sgd", model.parameters()), x)
    train(twin, make("rotational_sgd", twin.parameters()), x)
    for p, q in zip(model.parameters(), twin.parameters()):
        close(p, q, 1e-12, "a compiled training step")
    h = make("shampoo", [p], compile=True)._hyper(optim.PLAIN, settings("shampoo") | {
        "compile": True, "max_dim": 9, "graft": None, "dtype": None}, 2, torch.device("cpu"))
    assert h["refresh"] is True and torch.is_tensor(h["lr"]), f"a flag, so that nothing waits for the device: {h}"


# ======================================================================================================================
# What is refused, and whether the message names the offender and the way out
# ======================================================================================================================


def test_errors_of_values():
    """A hyperparameter out of range or of the wrong type is a ValueError that shows name, value, range and group, from
    the constructor and in mid-run, where nothing moves."""
    nan, inf, size, part, flag = math.nan, math.inf, "[0, inf)", "[0, 1)", "True, False"
    table = {"lr": ((-0.1, -1e-9, nan, inf, "0.1", None, torch.ones(2)), size),
             "weight_decay": ((-1.0, nan, inf, "none", None), size), "eps": ((-1e-8, nan, inf, None), size),
             "rotational_eps": ((-1e-8, nan), size), "momentum": ((-0.1, 1.0, nan, None), part),
             "alpha": ((-0.1, 1.0, nan), part), "update_norm_decay_factor": ((-0.1, 1.0, nan), part),
             "betas": (((0.9, 1.0), (-0.1, 0.9), (0.9,), (0.9, 0.9, 0.9), (nan, 0.9), 0.9, None, ("a", "b")), part),
             "per_neuron": ((1, "yes", None), flag), "zero_mean": ((0, None), flag), "compile": ((1, "yes"), flag),
             "bias_correction": ((1, None), flag), "batch_size": ((None, 0, -1, nan, inf, "4"), "examples"),
             "damping": ((-1e-8, nan, None), size), "lr_cov": ((-0.1, nan, None), size),
             "lr_cov_scale": ((-0.1, nan, None), size), "riemannian_momentum": ((-0.1, 1.0, nan), part),
             "update_every": ((0, -1, 1.5, nan, None), "whole"), "max_dim": ((-1, nan, None), "[0, inf"),
             "graft": (("lion", "Adam", True, 0), "'sgd', 'adam'"), "share": ((-0.1, nan, inf, None), size),
             "scale": ((0, -1.0, nan, inf), "(0, inf)"), "norm": (("frobenius", None), "'spectral', 'rows'"),
             "seed": ((-1, 0.5, 2**63, None), "whole"), "rotational": (("yes", 2), flag),
             "dtype": ((torch.int32, torch.complex64, torch.float8_e4m3fn, "float32", 16), "float32")}
    taken = set().union(*(optim.OPTIMIZERS[name].takes() for name in optim.OPTIMIZERS if base(name) in DIRECTIONS))
    assert taken == set(table), f"no values to try for {taken ^ set(table)}"
    for name, kind in optim.OPTIMIZERS.items():
        optimizer = make(name, [weight(3, 4)])
        run(optimizer, [[weight(3, 4)]])
        [group] = optimizer.param_groups
        before = repr(optimizer.state_dict())
        for key in table.keys() & kind.takes():
            for value in table[key][0]:
                shown = [kind.__name__, f"{key}={value!r}", table[key][1], "group"]
                groups = [{"params": [weight(3, 4)]}, {"params": [weight(2, 5)], key: value}]
                refused(ValueError, shown + ["group 1"], lambda: kind(groups, **required(name)))
                kept, group[key] = group[key], value        # by hand, in mid-run
                refused(ValueError, shown + ["group 0"], optimizer.step)
                group[key] = kept
        assert before == repr(optimizer.state_dict()), f"{name}: moved by a step that it refuses"


def replaced(**entries):
    """A weight of 3 x 24 with some of its rows overwritten."""
    p = normal(0, 3, 24)
    for row, value in entries.items():
        p[int(row[1])] = value
    return nn.Parameter(p)


# For every optimizer: what is given (a group, or the parameters), the error, the words of its message.
BAD_PARAMETERS = [
    ({"params": [weight(3, 4)], "weigth_decay": 0.1}, ValueError, ["'weigth_decay'", "'weight_decay'", "group 0"]),
    ({"params": [weight(3, 4)], "learning_rate": 0.1}, None, []),       # a user's own, and far from any
    ([weight(3, 4), weight(4, fill=1j, dtype=torch.complex64)], ValueError,
     ["parameter 1 of group 0", "complex64", "view_as_real"]),
    ([("head.weight", weight(3, 4, fill=1j, dtype=torch.complex64))], ValueError, ["head.weight", "complex64"]),
    ([nn.Parameter(weight(3, 4).detach().to_sparse())], ValueError, ["parameter 0 of group 0", "sparse_coo", "dense"]),
    *(([nn.Parameter(p.detach())], ValueError, ["parameter 0 of group 0", str(tuple(p.shape)), "expanded", "clone()"])
      for p in (weight(3, 1).expand(3, 4), weight(4).expand(3, 4), weight(1).expand(4))),
    ([nn.Parameter(weight().detach().expand(1))], None, []),            # stride 0, but of one entry
]
# For rotational ones: the parameter, zero_mean, why it cannot turn.
BAD_NEURONS = [
    (weight(4, 1), True, "1 weight,"), (weight(4, 1), False, "1 weight,"), (weight(4, 2), True, "2 weights"),
    (weight(3, 2, 1, 1), True, "2 weights"), (replaced(_2=0.0), True, "all zeros"), (replaced(_1=0.1), True, "equal"),
    (replaced(_2=0.0), False, "all zeros"), (weight(3, 4, fill=0.1), True, "equal"),
    (weight(3, 4, fill=0.1, dtype=torch.bfloat16), True, "equal"), (replaced(_0=math.nan), True, "NaN"),
    (replaced(_2=math.inf), False, "infinity"),
    (weight(4, 2), False, None), (replaced(_1=0.1), False, None)]       # two span a circle; a constant row can turn


def test_errors_of_parameters():
    """Misspelt keys, parameters of the wrong kind, neurons that cannot turn and sparse gradients are refused by name,
    with the way out; add_param_group refuses alike and leaves no trace."""
    for name, kind in optim.OPTIMIZERS.items():
        optimizer, late = make(name, parameters([(3, 4)])), make(name, parameters([(3, 4)]))
        before = repr(optimizer.state_dict())
        for bad, error, words in BAD_PARAMETERS:
            group = bad if isinstance(bad, dict) else {"params": bad}
            if error:
                refused(error, [kind.__name__, *words], lambda: kind([group.copy()], **required(name)))
                refused(error, [], lambda: optimizer.add_param_group(copy.copy(group)))
                assert repr(optimizer.state_dict()) == before, f"{name}: {words} left a trace"
            else:
                kind([group.copy()], **required(name))
                late.add_param_group(copy.deepcopy(group))
        refused(TypeError, [kind.__name__, "learning_rate", *kind.takes()],
                lambda: kind([weight(3, 4)], learning_rate=0.1))
        refused(ValueError, ["empty"], lambda: kind([], **required(name)))
        table = nn.Embedding(5, 4, sparse=True)
        table(torch.tensor([1, 2])).sum().backward()
        optimizer, start = make(name, table.parameters()), table.weight.detach().clone()
        refused(ValueError, [kind.__name__, "sparse", "sparse=False"], optimizer.step)
        same_bits([table.weight], [start], f"{name}: moved by a gradient that it refuses")
    for name in ROTATIONAL:
        kind = optim.OPTIMIZERS[name]
        for bad, zero_mean, reason in BAD_NEURONS:
            p = nn.Parameter(bad.detach().clone())
            words = [kind.__name__, str(tuple(p.shape)), reason, "rotational=False"]
            for where, params in (("parameter 1 of group 0", [weight(3, 4), p]), ("head.w", [("head.w", p)])):
                if reason:
                    refused(ValueError, words + [where], lambda: make(name, params, zero_mean=zero_mean))
                    same_bits([p.nan_to_num(9)], [bad.nan_to_num(9)], f"{name}: {reason}: refused, and yet changed")
            own = {} if reason is None else {"rotational": False}       # the way out is one
            make(name, [{"params": [p]} | own], zero_mean=zero_mean)
        make(name, [weight(3, 4, fill=0.1)], weight_decay=0.0)  # without decay nothing is asked to turn
        for own, words in (({"weight_decay": 0.0}, "weight_decay=0"), ({"params": [weight(4)]}, "(4,)")):
            refused(ValueError, [kind.__name__, "parameter 0 of group 0", words],
                    lambda: make(name, [{"params": [weight(3, 4)], "rotational": True} | own]))
        optimizer, [good] = make(name, parameters([(3, 4)])), parameters([(4, 6)], seed=7)
        before, start, group = repr(optimizer.state_dict()), values([good]), {"params": [good, weight(3, 5, fill=0.0)]}
        refused(ValueError, ["all zeros"], lambda: optimizer.add_param_group(group))
        assert repr(optimizer.state_dict()) == before, f"{name}: a refused group left a trace"
        same_bits([good], start, f"{name}: a weight of the refused group")


def test_errors_of_options():
    """Combinations that no matrix survives, a missing batch size and norms of the wrong shape are refused in words."""
    for name, kind in optim.OPTIMIZERS.items():
        if required(name):
            words = [kind.__name__, "batch_size=None", "examples"]
            refused(ValueError, words, lambda: kind([weight(3, 4)]))
            refused(ValueError, words, lambda: optim.build(name, Single(4, 3)))
            refused(ValueError, words + ["group 1"], lambda: kind([{"params": [weight(3, 4)], "batch_size": 3},
                                                                   {"params": [weight(4)]}]))
            kind([{"params": [weight(3, 4)], "batch_size": 3}, {"params": [weight(4)], "batch_size": 0.5}])
        if name.endswith("shampoo") and "if_" not in name:
            bad = [({"damping": 0.0}, ["damping=0"]), *(({"lr_cov": x}, [f"lr_cov={x}"]) for x in (0.0, 1.5)), *(
                ({"dtype": dtype}, [str(dtype), "roots", "float32", "if_shampoo"])
                for dtype in (torch.bfloat16, torch.float16))]
            for options, words in bad:
                refused(ValueError, ["Shampoo", *words], lambda: make(name, [weight(3, 4)], **options))
                refused(ValueError, ["Shampoo", *words], lambda: make(name, [{"params": [weight(3, 4)]} | options]))
        if rescales(name):
            refused(ValueError, [kind.__name__, "norm='rows'"],
                    lambda: make(name, [{"params": [weight(3, 4, 5)], "norm": "rows"}]))


class Net(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def test_errors_of_modular_trees():
    """A weight left out, taken twice, foreign, unsuited or beyond reach is refused with its name or shape, and layers
    without a modular norm with words that lead somewhere; build takes a tree of one's own."""
    w, stranger, net = optim.weight, nn.Linear(7, 8), Net(a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    a, b, x, attention = w(net.a), w(net.b), optim.bond("x"), Net(att=nn.MultiheadAttention(4, 2))
    for words, model, tree in (
            (["b.weight", "(3, 5)", "not in the modular tree"], net, lambda: a),
            (["a.weight", "twice"], net, lambda: b @ a @ a), (["sensitivity 0"], net, lambda: b @ (0 * x) @ a),
            (["Linear 8x7", "not in the model"], net, lambda: a @ w(stranger)),
            (["module"], Net(module=net), lambda: None), (["2 layers", "**"], net, lambda: w(net.b, nn.Linear(5, 3))),
            (["Net has no method modular_tree()", "tree="], net, lambda: None),
            (["att.in_proj_weight", "q, k, v"], attention, lambda: x)):
        refused(ValueError, words, lambda: optim.build("modular_adam", model, tree=tree()))
    for kind, words, call in (
            (TypeError, ["BatchNorm1d"], lambda: w(nn.BatchNorm1d(3))), (TypeError, ["LSTM"], lambda: w(nn.LSTM(3, 4))),
            (TypeError, ["groups"], lambda: w(nn.Conv2d(4, 4, 3, groups=2))),
            (TypeError, ["MultiheadAttention", "q, k, v"], lambda: w(attention.att)),
            (TypeError, ["upsampling"], lambda: w(nn.ConvTranspose2d(3, 4, 2))),
            (TypeError, ["optim.weight"], lambda: a @ nn.ReLU()), (TypeError, ["finite number"], lambda: "3" * a),
            (ValueError, ["run the model once"], lambda: w(nn.LazyLinear(4))), (ValueError, ["same"], lambda: w()),
            (ValueError, ["same type and shape"], lambda: w(nn.Linear(4, 5), nn.Linear(5, 4))),
            (ValueError, ["mass=-1"], lambda: w(stranger, mass=-1)), (ValueError, ["tare(2)"], lambda: x.tare(2)),
            (ValueError, ["** 0"], lambda: a ** 0), (ValueError, ["norm="], lambda: w(nn.Conv2d(3, 4, 3), norm="rows")),
            (ValueError, ["sensitivity=nan"], lambda: optim.bond("x", math.nan)),
            *((ValueError, [f"tare({mass})"], lambda mass=mass: a.tare(mass)) for mass in (-1, math.nan, math.inf)),
            (ValueError, ["sensitivity 0", "last one"], lambda: shares((w(*linears(2)) @ optim.bond("x", 0)) ** 2)),
            (ValueError, ["** 2 needs 2 layers"], lambda: shares(a ** 2))):
        refused(kind, words, call)
    net.b.weight.requires_grad_(False)                      # a frozen weight is nobody's business
    for tree in (a, b @ a):
        optimizer = optim.build("modular_adam", net, tree=tree)
        close([group["share"] for group in optimizer.param_groups][:1], [1 / tree.mass], 1e-12, "a frozen weight")


# ======================================================================================================================
# build and table: which parameter gets which rule
# ======================================================================================================================


class Zoo(nn.Module):
    """One of everything that a model may hold."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 5)
        self.one_input = nn.Linear(1, 4)                    # neurons of a single weight: they cannot turn,
        self.zero_start = nn.Linear(6, 3)                   # nor can these
        self.frozen = nn.Linear(6, 6)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight            # tied
        nn.init.zeros_(self.zero_start.weight)
        self.frozen.requires_grad_(False)

    def modular_tree(self):
        hidden, tied = optim.weight(self.one_input) @ optim.weight(self.hidden), optim.bond("head")
        return tied @ (optim.weight(self.zero_start), hidden) @ (optim.weight(self.embedding), optim.weight(self.conv))


def cells(optimizer):
    """The table as {name of the parameter: the other cells of its row}."""
    first, *rows = [re.split("  +", line) for line in optim.table(optimizer).splitlines()]
    assert len({row[0] for row in rows}) == len(rows), f"a row stands twice: {rows}"
    return {row[0]: row[1:] for row in rows}


def test_build_rules():
    """build turns and decays matrices, not vectors; stuck ones take the plain rule, and table says why; tied ones count
    once, frozen ones not; names of no_decay neither decay nor turn."""
    turn, stuck = {"embedding.weight", "conv.weight", "hidden.weight"}, {"one_input.weight": "1 weight"}
    stuck["zero_start.weight"] = "zero"
    vectors = {f"{name}.bias" for name in ("norm", "conv", "hidden", "one_input", "zero_start")}
    vectors |= {"norm.weight", "temperature"}
    for name, no_decay in itertools.product(optim.OPTIMIZERS, ((), ("hidden.weight", "emb*"))):
        torch.manual_seed(0)
        model, h, some = Zoo(), settings(name), {"hidden.weight", "embedding.weight"} if no_decay else set()
        optimizer = optim.build(name, model, no_decay=no_decay, **h)
        assert type(optimizer) is optim.OPTIMIZERS[name]
        rows = cells(optimizer)
        assert rows.keys() == turn | stuck.keys() | vectors, f"{name}: a name is missing: {rows}"
        for label, (shape, rule, lr, wd) in rows.items():
            p = model.get_parameter(label)
            assert shape == ("x".join(str(n) for n in p.shape) or "scalar"), f"{name} {label}: {shape}"
            expected = "rotational" if turns(name) and label in turn - some else "plain"
            if rescales(name) and label not in vectors:     # five weights; two come before something of sensitivity 2
                share = 0.1 if label in ("embedding.weight", "conv.weight") else 0.2
                expected = f"modular {'rows' if label == 'embedding.weight' else 'spectral'}, share {share}"
            assert rule.startswith(expected), f"{name} {label}: {rule}"
            assert not turns(name) or stuck.get(label, "") in rule, f"{name} {label}: {rule}"
            assert float(lr) == h["lr"] * (0.01 if rescales(name) and label in vectors else 1), f"{name} {label}: {lr}"
            assert float(wd) == (0 if label in vectors | some else h["weight_decay"]), f"{name} {label}: decay {wd}"
        # Now the deeds: with gradients of zero only decay under the plain rule moves a weight.
        starts = {label: p.detach().double().clone() for label, p in model.named_parameters()}
        run(optimizer, [[torch.zeros_like(p) for p in everything(optimizer)]])
        for label, p in model.named_parameters():
            decays = label in (turn | stuck.keys()) - some - (turn if turns(name) else set()) - {"zero_start.weight"}
            decays |= rescales(name) and label == "embedding.weight"            # whose rows are put back
            assert torch.equal(p.double(), starts[label]) != decays, f"{name} {label}: decays, or does not, by mistake"
        assert all(model.frozen.weight is not p for p in everything(optimizer)), name
        if "lr_cov_scale" in optimizer.defaults:
            factors = {n: g["lr_cov_scale"] for g in optimizer.param_groups for n in g["param_names"]}
            assert {n for n, x in factors.items() if x == 0.25} == vectors and set(factors.values()) == {0.25, 1.0}


def test_build_of_odd_models():
    """Several parameters without numbers are not taken for shared memory, the options of build decide who can turn; a
    model that build cannot use is refused with what to give instead."""
    empty = Net(**{name: nn.Parameter(torch.zeros(shape)) for name, shape in (("a", (0,)), ("b", (0, 4)), ("c", (2,)))})
    for name in optim.OPTIMIZERS:
        if not rescales(name):
            optimizer = optim.build(name, empty, **settings(name))
            assert all(row[1].startswith("plain") for row in cells(optimizer).values()), name
            assert all(group["params"] for group in optimizer.param_groups), f"{name}: an empty group"
        twins = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        twins[1].weight = nn.Parameter(twins[0].weight.data)            # same memory, but another nn.Parameter
        bad = [(ValueError, ["no trainable parameters"], nn.ReLU(), {}),
               (ValueError, ["no trainable parameters"], Single(4, 3).requires_grad_(False), {}),
               (TypeError, ["learning_rate"], Single(4, 3), {"learning_rate": 0.1}),
               (ValueError, ["0.weight", "1.weight", "share memory"], twins, {}),
               (TypeError, ["model"], Single(4, 3).parameters(), {}), (TypeError, ["model"], [weight(3, 4)], {}),
               (ValueError, ["model.module"], nn.DataParallel(Single(4, 3)), {}),
               (ValueError, ["run the model once first"], nn.Sequential(nn.LazyLinear(4)), {}),
               (ValueError, ["'wieght'"], Single(4, 3), {"no_decay": ["wieght"]})]
        if turns(name):
            bad += [(ValueError, ["weight_decay=0", repr(base(name))], Single(4, 3), {"weight_decay": 0.0})]
            broken = Single(4, 3)
            broken.weight.data[0, 0] = math.nan
            bad += [(ValueError, ["weight", "NaN"], broken, {})]
        if rescales(name):
            made = Single(4, 3)
            nn.utils.parametrizations.weight_norm(made)
            bad += [(ValueError, ["computed", "weight_norm"], made, {})]
            bad += [(ValueError, [f"lr={lr!r}"], Single(4, 3), {"lr": lr}) for lr in ("0.1", None)]
        for error, words, model, options in bad:
            refused(error, words, lambda: optim.build(name, model, **required(name) | options))
    typos = {"adamww": "adamw", "rotational_adam_w": "rotational_adamw", "Lion": "lion", "rmsprob": "rmsprop"}
    for typo, meant in typos.items():
        refused(ValueError, [repr(typo), f"did you mean {meant!r}"], lambda: optim.build(typo, Single(4, 3)))
    for name, zero_mean in itertools.product(ROTATIONAL, (True, False)):        # two weights to a neuron: a circle
        rows = cells(optim.build(name, Single(2, 3, bias=False), zero_mean=zero_mean, **settings(name)))
        assert rows["weight"][1].startswith("plain" if zero_mean else "rotational"), rows
    model = nn.Sequential(*linears(2))                      # alike but for their masses
    tree = optim.weight(model[1], mass=3) @ optim.weight(model[0])
    groups = optim.build("modular_adam", model, tree=tree).param_groups
    close([group["share"] for group in groups], [0.25, 0.75], 1e-12, "shares")


def test_table_of_any_optimizer():
    """table lists the parameters of any torch optimizer, with names or without, each once, by group and place."""
    makers = {name: lambda groups, name=name: make(name, groups) for name in optim.OPTIMIZERS}
    makers |= {f"torch {kind.__name__}": kind for kind in vars(torch.optim).values() if isinstance(kind, type)
               and issubclass(kind, torch.optim.Optimizer) and kind.__name__ not in ("Optimizer", "LBFGS", "Muon")}
    for name, maker in makers.items():
        late = weight(2, 5) if "Sparse" not in name else nn.Parameter(weight(2, 5).detach())
        rows = cells(maker([{"params": [weight(3, 4), weight(4)]}, {"params": [late], "lr": torch.tensor([0.5])
                            if "torch" not in name else 0.5}]))
        assert list(rows) == [f"parameter {place}" for place in ("0 of group 0", "1 of group 0", "0 of group 1")], name
        assert rows["parameter 0 of group 1"][0] == "2x5" and "0.5" in rows["parameter 0 of group 1"], f"{name}: {rows}"
    rows = cells(torch.optim.SGD([("head.weight", weight(3, 4))], lr=0.5))
    assert rows == {"head.weight": ["3x4", "plain", "0.5", "0"]}, rows


# ======================================================================================================================
# RotationProbe: what it measures, and what it predicts
# ======================================================================================================================


def probed(optimizer, gradients):
    """One measured step -> the probe."""
    probe = optim.RotationProbe(optimizer)
    probe.measure_next_step()
    run(optimizer, [gradients])
    return probe


def test_probe_measures():
    """The probe's norm and angle equal float64 numbers by hand, for every optimizer, down to 1e-5 rad in float32, of
    neurons, or of whole tensors under per_neuron=False."""
    shapes = [(5, 24), (4, 3, 3, 3), (6,)]
    makers = [(name, lambda ps, name=name: make(name, ps)) for name in optim.OPTIMIZERS]
    makers += [(f"torch {name}", lambda ps, name=name: TORCH_TWINS[name](ps, **settings(name))) for name in TORCH_TWINS]
    makers += [("whole tensors", lambda ps: make("rotational_adamw", ps, per_neuron=False))]
    for (name, maker), dtype in itertools.product(makers, (torch.float64, torch.float32, torch.bfloat16)):
        params, whole = parameters(shapes, dtype), name == "whole tensors"
        optimizer = maker(params)
        run(optimizer, noise(shapes, 2, dtype))
        starts = values(params)
        probe = probed(optimizer, noise(shapes, 1, dtype, seed=77)[0])
        measured = [row["name"] for row in probe.rows]
        assert measured == ["parameter 0 of group 0", "parameter 1 of group 0"], f"{name}: a vector has no neurons"
        for row, p, start in zip(probe.rows, params, starts):
            fine = dtype == torch.float64                   # others are measured in float32
            norm = rows_of(p, not whole).double().norm(dim=1).mean()
            close(row["norm"], norm, 1e-12 if fine else 1e-6, f"{name} {dtype} norm")
            close(row["angle"], angles(start, p, not whole).mean(), 1e-9 if fine else 1e-4, f"{name} {dtype} angle")
    for dtype in (torch.float64, torch.float32):            # tiny angles: set them exactly, by lr * wd = 1e-10 / 2
        [p], fine = parameters([(64, 256)], dtype), dtype == torch.float64
        optimizer = optim.RotationalSGD([p], lr=1e-9, momentum=0.0, weight_decay=0.05)
        start, [row] = p.detach().clone(), probed(optimizer, noise([(64, 256)], 1, dtype)[0]).rows
        close(row["angle"], angles(start, p).mean(), 1e-9 if fine else 5e-3, f"{dtype} tiny angle, as moved")
        close(row["angle"], 1e-5, 1e-6 if fine else 1e-2, f"{dtype} tiny angle, as meant")


def test_probe_predicts():
    """The probe predicts the closed-form equilibrium, and says how many steps it takes; kept norm and set angle where
    rotational; nan without decay or theory (Nesterov, AMSGrad, .., modular). torch's spellings have their twins'."""
    shape, C = (5, 24), 24
    gradient = normal(3, *shape)
    gradient *= 0.3 / gradient.square().mean().sqrt()
    cases, nothing = [], (math.nan, math.nan)
    for name in DIRECTIONS:
        h, kinds = SETTINGS[name], [kind for kind in (optim.OPTIMIZERS[name], TORCH_TWINS.get(name)) if kind]
        cases += [(kind, h, settled_by_hand(name, h, C, 0.3)) for kind in kinds]
        cases += [(kind, h | {"weight_decay": 0.0}, nothing) for kind in kinds]
        cases += [(optim.OPTIMIZERS[f"rotational_{name}"], h, (None, math.atan(angle_by_hand(name, h))))]
        for none, sigma in (({"lr": 0.0}, 0.3), ({"weight_decay": 0.0}, 0.3), ({}, 0.0)):
            predicted = optim.equilibrium(optim.DIRECTIONS[name], h | none, C, sigma)
            assert all(map(math.isnan, predicted)), f"{name}: {predicted} where nothing moves, decays or comes"
    h, mu, torchs, same = {"lr": 0.02, "weight_decay": 0.2}, {"momentum": 0.9}, torch.optim, SETTINGS["adamw"]
    adamw = settled_by_hand("adamw", same, C, 1)
    cases += [(torchs.Adam, same | {"decoupled_weight_decay": True}, adamw),
              (torchs.AdamW, same | {"lr": torch.tensor(0.02, dtype=torch.float64)}, adamw)]
    cases += [(kind, h | options, nothing) for kind, options in (
        (torchs.SGD, mu | {"nesterov": True}), (torchs.SGD, mu | {"dampening": 0.5}), (torchs.SGD, {"maximize": True}),
        (torchs.AdamW, {"amsgrad": True}), (torchs.RMSprop, {"centered": True}), (torchs.Adagrad, {}),
        (optim.ModularSGD, {}), (optim.ModularAdam, {}))]
    for kind, options, expected in cases:
        [p] = parameters([shape])
        optimizer = kind([("w", p)], **options)
        kept, probe = p.norm(dim=1).mean().item(), probed(optimizer, [gradient])
        [row], text = probe.rows, str(probe).splitlines()
        assert row["name"] == "w" and row["angle"] > 0, kind
        for key, value in zip(("predicted_norm", "predicted_angle"), expected):
            if value is None or not math.isnan(value):
                close(row[key], kept if value is None else value, 1e-12, f"{kind} {options} {key}")
            else:
                assert math.isnan(row[key]), f"{kind} {options}: {row}"
        if kind is optim.AdamW and options["weight_decay"]:
            assert "125" in text[-1], f"1 / (2 lr wd) = 125 steps are not in {text}"
        else:
            assert len(text) == 2 or getattr(kind, "geometry", optim.PLAIN) is optim.PLAIN, text


def test_probe_of_odd_parameters():
    """Parameters without a gradient or without numbers have no row, a zero neuron is left out of the mean angle, half a
    turn is pi, and after the step the copies are gone."""
    params = [weight(3, 4), weight(0, 4), weight(5, 6), weight(3, 0)]
    params[2].data[1] = 0
    start, [gradients] = params[2].detach().clone(), noise([p.shape for p in params], 1, torch.float32)
    gradients[0], gradients[2][1] = None, 0
    probe = probed(optim.SGD(params, lr=0.1), gradients)
    [row] = probe.rows
    assert row["name"] == "parameter 2 of group 0" and not probe._copies, row
    close(row["angle"], angles(start, params[2])[[0, 2, 3, 4]].mean(), 1e-5, "mean angle of those that have one")
    w = normal(0, 200, 7)
    close(optim.neuron_angles(w, -w, (1,)), np.full((200, 1), math.pi), 1e-6, "half a turn")


def test_probe_is_not_in_the_way():
    """A measured step moves weights as always and leaves no hook behind; unmeasured steps leave the rows alone."""
    shapes, gradients = [(5, 24), (6,)], noise([(5, 24), (6,)], 5)
    for kind in (optim.AdamW, optim.RotationalAdamW, torch.optim.AdamW):
        params, others, seen = parameters(shapes), parameters(shapes), []
        optimizer = kind(params, **settings("adamw"))
        probe = optim.RotationProbe(optimizer)
        for t, step in enumerate(gradients):
            for _ in range((0, 2, 0, 0, 1)[t]):             # arming it twice is arming it once
                probe.measure_next_step()
            run(optimizer, [step])
            seen.append(copy.deepcopy(probe.rows))
            assert not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks), f"{kind}: a hook"
        assert list(map(len, seen)) == [0, 1, 1, 1, 1] and seen[1] == seen[2] == seen[3] != seen[4], f"{kind}: {seen}"
        run(kind(others, **settings("adamw")), gradients)
        same_bits(params, others, f"{kind}: the probe disturbed the run")


# ======================================================================================================================
# The lesson, and a row of one's own
# ======================================================================================================================


def test_walk_of_ones_own():
    """--walk prints, for three sizes of the gradient, what is predicted and measured, within 3 %, in 80 columns; what
    it cannot walk is refused in one line."""
    status, out, err = call_main(optim, "--walk", "adamw", "lr=0.01", "weight_decay=0.5", "betas=(0.8,0.99)")
    assert status == 0 and not err, err
    assert max(map(len, out.splitlines())) <= 80 and "lr=0.01" in out, out
    rows = [line.split() for line in out.splitlines() if "%" in line]
    norm, angle = settled_by_hand("adamw", {"lr": 0.01, "weight_decay": 0.5, "betas": (0.8, 0.99)}, optim.C, 1)
    assert [row[0] for row in rows] == ["adamw"] * 3 and len({row[1] for row in rows}) == 3, out
    for _, _, *numbers in rows:
        numbers = [float(x) for x in numbers if "%" not in x]
        close(np.divide(numbers, [norm, norm, angle, angle]), np.ones(4), 0.03, "predicted and measured")
    for words, arguments in (("adamw", ["adamww"]), ("rr", ["adamw", "rr=0.1"]), ("lr=-1", ["adamw", "lr=-1"]),
                             ("lr", ["adamw", "lr"]), ("weight_decay", ["adamw", "weight_decay=0"])):
        status, out, err = call_main(optim, "--walk", *arguments)
        assert status == 2 and len(err.splitlines()) == 1 and words in err, f"{arguments}: {status} {err}"


ROWS = """
@row
class normalised_sgd(Direction):
    defaults = {"lr": 0.1, "weight_decay": 0.0}

    def update(self, g, state, h, decay=0):
        return g / g.norm() + decay


@row
class unranged(normalised_sgd):
    defaults = {"lr": 0.1, "weight_decay": 0.0, "strength": 1.0}
"""


def test_rows_of_ones_own():
    """The rows in README's recipe, pasted into a copy of optim.py, work under all three geometries: Signum has its
    kappa in closed form, and turns by it. The defaults are safe: normalised SGD, which says nothing of its kappa,
    refuses to rotate, predicts no norm, is not cut into blocks; a hyperparameter without a range is refused."""
    readme = pathlib.Path(__file__).with_name("README.md").read_text()
    recipe = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.S))
    rows = "\n\n\n".join(re.findall(r"^@row\nclass .*?(?=\n\S|\Z)", recipe, re.S | re.M))
    source, mine = pathlib.Path(optim.__file__).read_text(), types.ModuleType("optim_with_rows")
    at = source.index("@row\nclass lion(")
    sys.modules[mine.__name__] = mine                       # where dataclass looks for its module
    with unittest.mock.patch(f"{__name__}.optim", mine):
        exec(compile(f"{source[:at]}{rows}\n{ROWS}\n\n{source[at:]}", mine.__name__, "exec"), vars(mine))
        signum, sgd = (mine.DIRECTIONS[name] for name in ("signum", "normalised_sgd"))
        for b in (0.0, 0.5, 0.9):
            c = (1 - b) * b ** np.arange(3000)
            kappa = math.sqrt(math.pi / 2 * (1 - b) / (1 + b))
            close(signum.kappa({"momentum": b}), kappa, 1e-12, f"kappa of signum, momentum {b}")
            close(kappa, math.sqrt(math.pi / 2 * (c**2).sum()), 1e-9, "which is that of its impulse response")
        h = {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.2}
        [w], kappa = parameters([(5, 24)]), signum.kappa(h)
        start = w.detach() - w.detach().mean(dim=1, keepdim=True)
        run(mine.OPTIMIZERS["rotational_signum"]([w], rotational_eps=0.0, **h), noise([(5, 24)], 1))
        close(angles(start, w), [math.atan(kappa * math.sqrt(2 * 0.002))] * 5, 1e-9, "the angle of its first step")
        for name in ("signum", "normalised_sgd"):
            known, [[g]] = mine.OPTIMIZERS[name].takes(), noise([(50, 8)], 1)
            options = {key: value for key, value in h.items() if key in known}
            for geometry in ("", "rotational_", "modular_"):
                ends = []
                for most in (sys.maxsize, 45):
                    [w] = parameters([(50, 8)])
                    if geometry + name == "rotational_normalised_sgd":
                        refused(ValueError, ["kappa", name], lambda: mine.OPTIMIZERS[geometry + name]([w], **options))
                        continue
                    with unittest.mock.patch.object(mine, "block_size", lambda *_: most):
                        optimizer, start = mine.OPTIMIZERS[geometry + name]([w], **options), w.detach().clone()
                        run(optimizer, [[g]])
                    ends.append(w)
                same_bits(ends[:1], ends[1:], f"{geometry}{name} in blocks")
        assert all(map(math.isnan, mine.equilibrium(sgd, h, 256, 1.0)[:1])), "a norm without a contribution"
        refused(ValueError, ["strength", "ranges"], lambda: mine.OPTIMIZERS["unranged"]([weight(3, 4)]))
        for name in mine.OPTIMIZERS:                        # the tables of settings above know what to do
            run(make(name, [weight(3, 4)]) if "unranged" not in name and name != "rotational_normalised_sgd" else
                mine.OPTIMIZERS["sgd"]([weight(3, 4)]), [[weight(3, 4)]])


def test_optim_bad_input():
    """python optim.py with a flag, a name or a file that is none: exit status 2 and one line that says so."""
    with temporary_folder() as folder:
        check_refused(optim, folder, ["--bench", "rotational_lyon"], "did you mean 'rotational_lion'")
        check_refused(optim, folder, ["--benchh"], "unrecognized arguments: --benchh")
        check_refused(optim, folder, ["--bench", "adamw", "--plot", "walk.png"], "leave out --bench")
        with unittest.mock.patch("importlib.util.find_spec", lambda name: None):
            check_refused(optim, folder, ["--plot", "walk.png"], "--plot needs matplotlib")
        with unittest.mock.patch("importlib.util.find_spec", lambda name: True):                # before any work
            check_refused(optim, folder, ["--plot", str(folder / "never/walk.png")], "in a folder that is there")
            check_refused(optim, folder, ["--plot", str(folder)], "name a file")


def test_lesson():
    """python optim.py prints every optimizer, and its walks measure, on fewer neurons here, what its formulas say:
    within 3 %, Lion 5 %; sgd, adamw and lion the same angle for all sizes of the gradient, adam not; in 80 columns."""
    for name, h, sigmas in optim.WALKS:
        assert all(math.isfinite(x) for sigma in sigmas
                   for x in optim.equilibrium(optim.DIRECTIONS[name], h, optim.C, sigma)), name
    walks = [("sgd", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.02}, (0.5, 2.0)),
             ("adamw", {"lr": 0.01, "betas": (0.8, 0.999), "eps": 1e-8, "weight_decay": 0.2}, (1.0,)),
             ("adam", {"lr": 0.01, "betas": (0.8, 0.999), "eps": 1e-8, "weight_decay": 0.4}, (0.5, 2.0)),
             ("lion", {"lr": 0.002, "betas": (0.9, 0.99), "weight_decay": 0.5}, (1.0,))]
    starts, walk = [], optim.random_walk

    def watched(optimizer, weights, *rest):
        starts.extend(w.detach().norm(dim=1).mean().item() for w in weights)
        return walk(optimizer, weights, *rest)

    with unittest.mock.patch.multiple(optim, WALKS=walks, NEURONS=16, random_walk=watched, state_bytes=lambda _: 0.0):
        status, out, err = call_main(optim)
    assert status == 0 and not err, err
    assert max(map(len, out.splitlines())) <= 80, max(out.splitlines(), key=len)
    rows = [line.replace("adam + L2", "adam").split() for line in out.splitlines() if re.search("[+-][0-9.]+%", line)]
    assert [row[0] for row in rows] == ["sgd", "sgd", "adamw", "adam", "adam", "lion", "exact"], out
    for name, sigma, norm, measured_norm, off_norm, angle, measured_angle, off_angle in rows:
        tolerance = 0.05 if name == "lion" else 0.03
        close(float(measured_norm), float(norm), tolerance, f"norm of {name}")
        close(float(measured_angle), float(angle), tolerance, f"angle of {name}")
        close(float(off_norm[:-1]) / 100, float(measured_norm) / float(norm) - 1, 1e-3, f"{name}: off", scale=1)
        close(float(off_angle[:-1]) / 100, float(measured_angle) / float(angle) - 1, 5e-3, f"{name}: off", scale=1)
    assert rows[0][5] == rows[1][5] and abs(float(rows[3][5]) / float(rows[4][5]) - 2) < 0.01, "angles over sizes"
    table = [line for line in out.splitlines() if re.match(r"\w+ +0[.]0 ", line)]
    assert [line.split()[0] for line in table] == list(optim.OPTIMIZERS), out
    assert re.search("rotational_adam .* mean[(]g[)] / rms[(]g [+] wd w[)]", out), out
    assert re.search("rotational_sgd .* m <- mu m [+] g;  d = m", out), out
    steps = [int(line.split()[0]) for line in out.splitlines() if re.match(" +[0-9]+   0[.]", line)]
    assert steps == [1, 2, 3, 20, 40, 80, 160, 320, 640, 960, 1280, 1600], steps
    norms = [float(row[2]) for row in rows[:6]]             # all start 3 times too short
    close(starts, [norms[2] / 3, norms[2] / 3, *(norm / 3 for norm in norms)], 0.05, "norms at the start")


def test_lesson_draws():
    """--plot draws angles and norms of adam + L2 and of adamw, predictions dashed; what cannot be written is said."""
    if not importlib.util.find_spec("matplotlib"):
        raise Skip("without matplotlib there are no figures")
    traces = {0.5: ([(1, 6.0, 0.3), (20, 4.0, 0.2)], (2.0, 0.1)), 2.0: ([(1, 5.0, 0.4), (20, 3.0, 0.1)], (2.5, 0.05))}
    with temporary_folder() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            optim.draw({"adam": traces, "adamw": traces}, folder / "walk.png")
        from matplotlib import pyplot
        figure = pyplot.gcf()
        for number, axes in enumerate(figure.axes):
            drawn = [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in axes.lines]
            for trace, predicted in traces.values():
                values = [row[1 if number >= 2 else 2] for row in trace]        # angles above, norms below
                assert any(x == [1, 20] and y == values for x, y, _ in drawn), f"panel {number}: {drawn}"
                level = predicted[0 if number >= 2 else 1]
                assert any(y == [level, level] and style == "--" for _, y, style in drawn), f"panel {number}: {drawn}"
            assert axes.get_xscale() == axes.get_yscale() == "log"
        assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["angle per step (radians)", "norm of a neuron"]
        for path, words in ((folder / "none" / "walk.png", "No such file"), (folder / "walk.xyz", "xyz")):
            with contextlib.redirect_stderr(io.StringIO()) as err:
                refused(SystemExit, ["2"], lambda: optim.draw({"adam": traces, "adamw": traces}, path))
            assert words in err.getvalue() and len(err.getvalue().splitlines()) == 1, err.getvalue()
        pyplot.close("all")


def test_bench_of_steps():
    """in_turn gives the time of a step and how many times that of the reference it is, over whole rounds where steps
    differ; --bench prints both, eager and compiled."""
    clock, costs = [0.0], itertools.cycle((0.001, 0.011))   # of every two steps one is long, as shampoo's

    def pass_time(seconds):
        clock[0] += seconds

    with unittest.mock.patch("optim.time.perf_counter", lambda: clock[0]):
        found = optim.in_turn(lambda: pass_time(next(costs)), lambda: pass_time(0.002), 2)
    assert np.allclose(found, (6.0, 3.0)), found
    small = parameters([(9, 4), (5, 4), (4, 4), (4,)], torch.float32)
    for p in small:
        p.grad = torch.ones_like(p)
    with unittest.mock.patch.multiple(
            optim, gpt2_parameters=lambda *_: small, in_turn=lambda step, reference, count: (4.0, 0.5 * count),
            update_compiled=optim.update):
        status, out, _ = call_main(optim, "--bench", "adamw", "shampoo")
    assert status == 0
    assert re.search("adamw +8.0 B/weight +4.0 ms  0.50x +4.0 ms  0.50x", out), out
    assert re.search("shampoo .* 4.0 ms  1.00x +4.0 ms  1.00x", out), out                       # rounds of 2 steps


# ======================================================================================================================
# Helpers for the scripts
# ======================================================================================================================

SCRIPTS = (nanogpt_train, cifar_train, translate_train)


def command_line(script, arguments):
    """argv of a script, which is its module. A sweep computes nothing, but its runs do, with flags of their own."""
    device = () if script in (sweep, optim) else ("--device", "cpu")
    return [script.__file__, *device, *map(str, arguments)]


def start_script(script, folder, *arguments, launcher=(), stdout=subprocess.PIPE):
    """Start it in a folder of its own. One thread: small models gain nothing from two, and two runs at a time then
    share the machine instead of fighting over it."""
    return subprocess.Popen([sys.executable, *launcher, *command_line(script, arguments)], cwd=folder,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}, encoding="utf-8",
                            stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE)


def run_script(script, folder, *arguments, status=0, launcher=(), stdout=subprocess.PIPE):
    """Run it to its end -> (stdout, stderr); the exit status must be the expected one."""
    process = start_script(script, folder, *arguments, launcher=launcher, stdout=stdout)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"status {process.returncode}, not {status}:\n{(out or '')[-2000:]}\n{err}"
    return out, err


def call_main(script, *arguments):
    """script.main() in this process, with one thread -> (exit status, stdout, stderr). Faster than a new process."""
    stdout, stderr, argv, threads = io.StringIO(), io.StringIO(), sys.argv, torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv, status = command_line(script, arguments), 0
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            script.main()
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, stdout.getvalue(), stderr.getvalue()


def succeed(script, *arguments):
    """call_main, which must end well -> stdout."""
    status, out, err = call_main(script, *arguments)
    assert status == 0, f"{script.__name__} {arguments}: status {status}, {err}"
    return out


def read_log(folder):
    """log.jsonl without what may differ between two runs of the same numbers: the time they took."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.endswith("seconds")} for record in records]


def checkpoint(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def same_run(one, other):
    """Two folders hold the same weights, the same state of the optimizer and the same log, bit for bit."""
    left, right = checkpoint(one), checkpoint(other)
    for part in ("model", "optimizer"):
        (a, tree), (b, twin) = (torch.utils._pytree.tree_flatten(ckpt[part]) for ckpt in (left, right))
        assert tree == twin, f"{other}: another shape of {part}"
        for x, y in zip(a, b):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, f"{other}: {part} differs"
    assert read_log(one) == read_log(other), f"{other}: another log"
    for name in ("hypotheses.en", "bpe.json"):
        assert (one / name).exists() == (other / name).exists()
        assert not (one / name).exists() or (one / name).read_bytes() == (other / name).read_bytes(), f"{other}: {name}"


FORKS = multiprocessing.get_context("forkserver") if hasattr(os, "fork") else None
if FORKS:                                           # it imports torch once, which takes seconds; from there on it forks
    FORKS.set_forkserver_preload(["torch._dynamo", "numpy", "tqdm"])


def start_fork(script, folder, *arguments, **fate):
    """start_script in a process forked from one that has imported torch already -> a multiprocessing.Process. It
    writes to stdout.txt and stderr.txt in the folder. fate: as in_fork takes it."""
    if not FORKS:
        raise Skip("needs fork and signals, which this system does not have")
    process = FORKS.Process(target=in_fork, args=(command_line(script, arguments), folder), kwargs=fate, daemon=True)
    process.start()
    return process


def in_fork(argv, folder, die_at=None, file_size=None, mortal=False, step=None, send=None, evaluation=None, out=None,
            error=None):
    """die_at: SIGKILL at the n-th opening, renaming or removing of a file in the folder. file_size: no file can grow
    beyond that, as if the disk were full; if mortal, trying to is death, in the middle of the write. step, send: after
    the n-th step of the optimizer a signal comes; without `send`, one entry of a gradient is infinite in that step.
    evaluation, send: the signal comes in the n-th forward pass of evaluations, which must be the last one. out: where
    standard output goes; "closed": a pipe that nobody reads. error: what every backward pass raises."""
    os.chdir(folder)
    read, write = os.pipe() if out == "closed" else (None, None)
    for number, name in ((1, out or "stdout.txt"), (2, "stderr.txt")):
        os.dup2(write if name == "closed" else os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if read:
        os.close(read), os.close(write)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))        # not those of a tty or file
    tqdm.tqdm.set_lock(threading.RLock())           # its own is for several processes, and would outlive a killed one
    torch.set_num_threads(1)
    home, files, steps, passes = os.getcwd(), itertools.count(1), itertools.count(1), itertools.count(1)

    def on_file(event, args):
        if event in ("open", "os.rename", "os.remove") and os.path.abspath(str(args[0])).startswith(home):
            if next(files) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_step(optimizer, *_):
        if next(steps) == step:
            os.kill(os.getpid(), send) if send else poison(optimizer)

    def on_pass(module, _):
        if hasattr(module, "head") and not module.training:
            count = next(passes)
            assert count <= evaluation, "it goes on with its evaluation after the signal"
            if count == evaluation:
                os.kill(os.getpid(), send)
    if die_at:
        sys.addaudithook(on_file)
    if step:
        (register_optimizer_step_post_hook if send else register_optimizer_step_pre_hook)(on_step)
    if error:
        torch.Tensor.backward = unittest.mock.Mock(side_effect=error)
    if evaluation:
        nn.modules.module.register_module_forward_pre_hook(on_pass)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))        # the signal would leave a core file
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if mortal else signal.SIG_IGN)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def poison(optimizer):
    """Make one entry of a gradient infinite."""
    gradient = optimizer.param_groups[0]["params"][0].grad
    gradient[(0,) * gradient.dim()] = math.inf


def end_fork(process, folder, status=0):
    """Wait for its end -> (stdout, stderr); the exit status must be the expected one."""
    process.join(timeout=300)
    out, err = ((folder / name).read_text() for name in ("stdout.txt", "stderr.txt"))
    assert process.exitcode == status, f"status {process.exitcode}, not {status}:\n{out[-2000:]}\n{err[-2000:]}"
    return out, err


def run_fork(script, folder, *arguments, status=0, **fate):
    """run_script, as a fork."""
    return end_fork(start_fork(script, folder, *arguments, **fate), folder, status)


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


# ======================================================================================================================
# Small runs of the three training scripts
# ======================================================================================================================

TINY = ("--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --dropout 0.1 --steps 24 --warmup 2 "
        "--eval_every 8 --save_every 6 --eval_batches 2").split()
CIFAR_TINY = "--width 4 --batch_size 20 --steps 24 --warmup 3 --eval_every 8 --save_every 6 --cutout 6".split()
TINY_TRANSLATE = ("--n_layer 1 --n_head 2 --n_embd 16 --n_ffn 32 --vocab 300 --max_tokens 200 --dropout 0.1 --steps 24 "
                  "--warmup 2 --eval_every 8 --save_every 6 --beam 2").split()


def cifar_folder(folder, n_train=100, n_test=40):
    """Noise with a redness that tells the class, in the official layout of CIFAR-10, in folder/bins -> train images and
    labels, test images and labels."""
    (folder / "bins").mkdir(exist_ok=True)
    rng = np.random.default_rng(5)
    train_labels, test_labels = np.arange(n_train) % 10, np.arange(n_test) % 10
    train, test = (rng.integers(0, 60, (n, 32, 32, 3), dtype=np.uint8) for n in (n_train, n_test))
    for images, labels in ((train, train_labels), (test, test_labels)):
        images[..., 0] += 20 * labels[:, None, None].astype(np.uint8)
    parts = np.array_split(np.arange(n_train), 5)
    for name, images, labels in [(f"data_batch_{i + 1}.bin", train[part], train_labels[part])
                                 for i, part in enumerate(parts)] + [("test_batch.bin", test, test_labels)]:
        records = [labels[:, None].astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(len(images), -1)]
        (folder / "bins" / name).write_bytes(np.hstack(records).tobytes())      # a label; planes of red, green and blue
    return train, train_labels, test, test_labels


def write_corpus(folder, train=200, zipped=False, valid="val"):
    """Number words, train, val and test, in PREFIX.de and PREFIX.en or their .gz -> the PREFIX of train."""
    folder.mkdir(exist_ok=True)
    numbers = random.Random(0).sample(range(10_000), train + 35)
    for part, count in (("train", train), (valid, 20), ("test", 15)):
        some, numbers = numbers[:count], numbers[count:]
        for language, words in (("de", translate_train.german), ("en", translate_train.english)):
            data = "".join(f"{words(n)}\n" for n in some).encode()
            (folder / f"{part}.{language}{'.gz' * zipped}").write_bytes(gzip.compress(data) if zipped else data)
    return folder / "train"


def read_corpus(folder):
    """-> {part: [(German, English), ..]}"""
    return {part: list(zip(*((folder / f"{part}.{language}").read_text().splitlines() for language in ("de", "en"))))
            for part in ("train", "val", "test")}


def tiny(script, folder, model=("resmlp", "--depth", "1")):
    """Flags of a run of 24 steps, on data that is made in the folder."""
    if script is nanogpt_train:
        return [*TINY, "--data_dir", folder / "data"]
    if script is cifar_train:
        cifar_folder(folder)
        return [*CIFAR_TINY, "--data", folder / "bins", "--model", *model]
    return [*TINY_TRANSLATE, "--data", write_corpus(folder / "corpus"), "--data_dir", folder / "data"]


def flags_of(**settings):
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


# ======================================================================================================================
# The life of a run
# ======================================================================================================================

# What happens to a run, one after the other: what it is (as in_fork takes it), the exit status, what the last line says
# and the step of the checkpoint then.
LIFE = (
    (dict(step=5, send=signal.SIGINT), 130, "stopped after step 5", 5),
    (dict(error=RuntimeError("a bug")), 1, "RuntimeError: a bug", 5),
    (dict(error=MemoryError()), 2, "out of memory: make", 5),
    (dict(step=7), 3, "diverged", 10),              # one Inf in a gradient: in step 12
    (dict(file_size=9000), 2, "cannot write", 10),  # a full disk
    (dict(evaluation=1, send=signal.SIGTERM), 143, "stopped after step 30", 30),
)


def survive(script, folder, flags, opt, seed):
    """A run that suffers LIFE, is killed KILLS times and resumed each time ends with the bits of one left alone. Of
    every three kills one is at a random file operation, one in the middle of a write, one at any time."""
    chance, run = random.Random(seed), folder / "it's a run"
    flags = [*flags, *flags_of(opt=opt, steps=24 * (KILLS + 2), eval_every=30, save_every=2)]
    run_fork(script, folder, *flags, "--out_dir", "calm")
    size, command = (folder / "calm/ckpt.pt").stat().st_size, [*flags, "--out_dir", run.name]
    for fate, status, words, done in LIFE:
        before = (run / "ckpt.pt").read_bytes() if run.exists() else b""
        out, err = run_fork(script, folder, *command, status=status, **fate)
        said = (out if "send" in fate else err).strip().splitlines()[-1]
        assert words in said and (status == 1) == ("Traceback" in err), f"{fate}: {out}{err}"
        assert not list(run.glob("*.part")), f"{fate} leaves {os.listdir(run)}"
        if "send" in fate:                          # as somebody would paste it
            command = shlex.split(said.partition("To go on: ")[2])[2:]
        else:
            command = [*flags, "--out_dir", run.name, "--resume"]
        ckpt = checkpoint(run)
        assert ckpt["step"] == done, f"{fate}: {ckpt['step']}"
        assert "file_size" not in fate or (run / "ckpt.pt").read_bytes() == before
        for x in torch.utils._pytree.tree_leaves([ckpt["model"], ckpt["optimizer"]]):
            assert not torch.is_tensor(x) or x.isfinite().all(), f"{fate}: {x} was saved"
    for i in range(KILLS):
        in_a_write = {"file_size": chance.randint(1, size - 1), "mortal": True}
        fate = ({"die_at": chance.randint(1, 40)}, in_a_write, {})[i % 3]
        process = start_fork(script, folder, *command, **fate)
        if not fate:
            changed = (run / "ckpt.pt").stat().st_mtime_ns
            while process.is_alive() and (run / "ckpt.pt").stat().st_mtime_ns == changed:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
        end_fork(process, folder, -signal.SIGXFSZ if "mortal" in fate else -signal.SIGKILL)
        TALLY["kills survived"] += 1
    for command in (command, ["--resume", "--out_dir", run.name]):      # the second time nothing is left to do
        run_fork(script, folder, *command)
        same_run(folder / "calm", run)
    assert not list(folder.rglob("*.part"))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    seconds = [record["seconds"] for record in log if "seconds" in record]
    assert seconds == sorted(seconds), "the clock goes on where it was"


def test_modular_gpt_is_the_papers():
    """ModularGPT computes what the paper's network with unit weights and scales in the forward pass does."""
    torch.manual_seed(0)
    V, L, H, C, T = 11, 3, 2, 6, 5
    model = nanogpt_train.ModularGPT(V, L, H, C, T, 0.0).double().eval()
    p, x = {name: w.detach() for name, w in model.named_parameters()}, torch.randint(0, V, (2, T))

    def linear(name, h):                                    # weights of spectral norm 1, their size in the forward pass
        w = p[f"{name}.weight"]
        scale = math.sqrt(w.shape[0] / w.shape[1])
        return h @ (w / scale).T * scale

    def norm(h):
        h = h - h.mean(-1, keepdim=True)
        return h / h.square().mean(-1, keepdim=True).sqrt()

    h = 0.5 * p["tokens.weight"][x] + 0.5 * p["positions.weight"][torch.arange(T)]
    for i in range(L):
        q, k, v = (linear(f"blocks.{i}.{n}", norm(h)).view(2, T, H, C // H) / 3 for n in "qkv")
        out = torch.zeros_like(v)
        for t in range(T):
            logits = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, :t + 1]) / (C // H)
            out[:, t] = torch.einsum("bhs,bshd->bhd", logits.softmax(-1), v[:, :t + 1])
        h = (1 - 1 / (2 * L)) * h + 1 / (2 * L) * linear(f"blocks.{i}.out", out.reshape(2, T, C))
        up = linear(f"blocks.{i}.up", norm(h))
        gelu = up * 0.5 * (1 + torch.erf(up / math.sqrt(2))) * math.sqrt(2)
        h = (1 - 1 / (2 * L)) * h + 1 / (2 * L) * linear(f"blocks.{i}.down", gelu)
    close(model(x), linear("head", norm(h))[:, -1], 1e-9, "logits")


def test_nanogpt_survives():
    """nanogpt_train.py: Ctrl-C, SIGTERM, Inf, a full disk and kills at any moment cost no bit of the result."""
    with temporary_folder() as folder:
        survive(nanogpt_train, folder, tiny(nanogpt_train, folder), "if_shampoo", 0)


def test_cifar_survives():
    """cifar_train.py: the same, with the statistics of batch normalisation."""
    with temporary_folder() as folder:
        flags = tiny(cifar_train, folder, "vgg16 --width 2 --batch_size 4".split())
        cifar_folder(folder, 100, 1100)             # evaluated in two batches
        survive(cifar_train, folder, flags, "rotational_adamw", 1)


def test_translate_survives():
    """translate_train.py: the same, and its translations of the test set."""
    with temporary_folder() as folder:
        survive(translate_train, folder, tiny(translate_train, folder), "shampoo", 2)


def test_scripts_killed_over_their_data():
    """What a run leaves that is killed while it makes its data files is no obstacle to the next one."""
    for script, kind, moment in ((nanogpt_train, "*/train.bin", 4), (translate_train, "bpe-*", 10)):
        with temporary_folder() as folder:
            flags = [*tiny(script, folder), "--out_dir", "run"]
            run_fork(script, folder, *flags, status=-signal.SIGKILL, die_at=moment)
            run_fork(script, folder, *flags)
            assert not list(folder.rglob("*.part")) and len(list(folder.glob(f"data/{kind}"))) == 1


def test_scripts_into_a_closed_pipe():
    """`script | head`, and standard output on a full disk: no traceback; the first is no error of ours."""
    for out, statuses in (("closed", (0, 1, 141)), ("/dev/full", (1, 2))):
        for script in SCRIPTS:
            with temporary_folder() as folder:
                process = start_fork(script, folder, *tiny(script, folder), "--out_dir", "run", out=out)
                process.join(100)
                err = (folder / "stderr.txt").read_text()
                what = f"{script.__name__} into {out}: status {process.exitcode}, {err}"
                assert process.exitcode in statuses, what
                assert not re.search("Traceback|BrokenPipe|Exception", err), what
                assert out == "closed" or "No space left" in err, what


def test_nanogpt_data_parallel():
    """Two processes with half a batch each see the same losses as one process with the whole batch, one line a step;
    each refuses bad input by itself, before it would wait for the others."""
    with temporary_folder() as folder:
        common = tiny(nanogpt_train, folder) + flags_of(dropout=0, batch_size=2, grad_accum=3, opt="rotational_adamw")
        run_fork(nanogpt_train, folder, *common, "--out_dir", "one")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(port))
        out, _ = run_script(nanogpt_train, folder, *common, "--out_dir", "two", launcher=launcher)
        steps = [line.split()[1] for line in out.splitlines() if line.startswith("step ")]
        assert steps and len(steps) == len(set(steps)), f"every process prints its own: {out}"
        for one, two in zip(read_log(folder / "one"), read_log(folder / "two"), strict=True):
            for key in one.keys() & {"train_loss", "val_loss"}:
                assert abs(one[key] - two[key]) < 1e-4, (key, one, two)
        (folder / "short.txt").write_text("too short")
        with unittest.mock.patch.multiple(nanogpt_train, RANK=1, WORLD=2):
            for flags, words in ((f"--data {folder}/short.txt", "too few"), (f"--data {folder}/none.txt", "no such"),
                                 ("--batch_size 3", "multiple"), ("--prompt 日", "does not occur")):
                check_refused(nanogpt_train, folder, [*common, *flags.split(), "--out_dir", folder / "never"], words)


def test_scripts_diverge():
    """A loss, a weight or a state that is no number: status 3, one line names the step, the last good checkpoint stays,
    all finite, whether losses are read at once or many together, gradients clipped or not."""
    with temporary_folder() as folder:
        for script in SCRIPTS:
            flags, run = [*tiny(script, folder), "--out_dir", folder / "run"], folder / "run"
            wild = flags_of(opt="sgd", lr=1e25, warmup=0, grad_clip=0)
            for how in (["--save_every", 1], ["--save_every", 24, "--eval_every", 24]):
                status, _, err = call_main(script, *flags, *wild, *how)
                line = err.strip().splitlines()[-1]
                assert status == 3 and re.search(r"step [1-6]\b.*diverged", line) and "Traceback" not in err, err
                assert "--lr" in line and "ckpt.pt" in line, line
                assert (checkpoint(run)["step"] < 4) if how[1] == 1 else not checkpoint(run)["step"]
            for name, clip in (("lion", 0), ("rotational_lion", 0), ("modular_sgd", 1)):
                count = itertools.count(1)
                hook = register_optimizer_step_pre_hook(
                    lambda optimizer, *_: poison(optimizer) if next(count) == 10 else None)
                try:
                    status, _, err = call_main(script, *flags, *flags_of(opt=name, grad_clip=clip, save_every=1))
                finally:
                    hook.remove()
                what, ckpt = f"{script.__name__}, {name}: status {status}, {err}", checkpoint(run)
                assert status == 3 and "diverged" in err.splitlines()[-1] and "Traceback" not in err, what
                assert ckpt["step"] == 9, f"{what} {ckpt['step']}"
                assert all(x.isfinite().all() for x in torch.utils._pytree.tree_leaves(
                    [ckpt["model"], ckpt["optimizer"]]) if torch.is_tensor(x)), what


def test_scripts_replace_and_go_on():
    """A longer run goes on in the log, with one last line, and its clock; the old checkpoint is gone before a new run's
    first; --eval_only gives the result again."""
    with temporary_folder() as folder:
        run, copy_ = folder / "run", folder / "copy"
        for script in SCRIPTS:
            flags = [*tiny(script, folder), "--out_dir", run]
            result = succeed(script, *flags).strip().splitlines()[-1].partition(" after ")[0]
            for again in (["--eval_only"], []):     # or nothing left to do
                out = succeed(script, "--resume", "--out_dir", run, *again)
                assert out.strip().splitlines()[-1].startswith(result.partition(",")[0].partition(" (beam")[0]), out
            shutil.copytree(run, copy_)
            with unittest.mock.patch.object(torch.Tensor, "backward", side_effect=KeyboardInterrupt):
                refused(KeyboardInterrupt, [], lambda: call_main(script, *flags[:-1], copy_))
            assert checkpoint(copy_)["step"] == 0, "an older run's would be taken for this one's"
            shutil.rmtree(copy_)
            before = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            torch.save(checkpoint(run) | {"seconds": 1000.0}, run / "ckpt.pt")
            with open(run / "log.jsonl", "a") as file:
                file.write('{"step": 99, "val_loss": 1}\n{"step": 100, "val')     # later than the checkpoint; cut short
            succeed(script, "--resume", "--steps", 48, "--out_dir", run)
            after = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            last = before.pop() if script is translate_train else {"final": before[-1].pop("final")}
            assert last["final"] and after[:len(before)] == before
            assert [r["step"] for r in after if "bleu" not in r] == list(range(0, 49, 8))
            assert [r.get("final", False) for r in after] == [False] * (len(after) - 1) + [True]
            seconds = [record["seconds"] for record in after[len(before):]] + [checkpoint(run)["seconds"]]
            assert 1000 < min(seconds) and max(seconds) < 1300, seconds
            shutil.rmtree(run)


def test_scripts_repeat_themselves():
    """The same seed gives the same log; another one does not. A checkpoint of a compiled run is resumed without
    compiling and the other way round, with the same numbers. In bfloat16 losses are near, and others."""
    with temporary_folder() as folder, torch.compiler.set_stance("force_eager"):    # wrapped, but not really compiled
        for script in SCRIPTS:
            flags, logs, run = tiny(script, folder), [], folder / "run"
            for first, then, seed in ((0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 0, 2)):
                succeed(script, *flags, *flags_of(compile=first, seed=seed, steps=12, out_dir=run))
                succeed(script, "--resume", "--out_dir", run, *flags_of(steps=24, compile=then))
                logs.append(read_log(run))
                shutil.rmtree(run)
            assert logs[0] == logs[1] == logs[2] != logs[3], script.__name__
            for name in ("adamw", "rotational_adamw", "modular_adam"):
                losses = []
                for dtype in ("float32", "bfloat16"):
                    succeed(script, *flags, *flags_of(opt=name, dtype=dtype, out_dir=run))
                    last = read_log(run)[-1]
                    shutil.rmtree(run)
                    losses.append(last["val_loss"] if "val_loss" in last else last["test_loss"])
                assert 0 < abs(losses[1] - losses[0]) < 0.3, f"{script.__name__}, {name}: {losses}"


# ======================================================================================================================
# Bad input: exit status 2, one line that names the mend, no traceback, nothing written
# ======================================================================================================================

# Initials of the scripts: flags, and what the line must hold. @ is a folder with FILES and a finished run, @/run. The
# flags come after those of a small run; with --resume, --eval_only or --translate they stand alone.
BAD = {
    "NCT": (
        ("--opt rotational_lyon", "did you mean 'rotational_lion'"), ("--optt adam", "did you mean --opt?"),
        ("--learning_rate 1", "did you mean --lr?"), ("--lr -1", "[0, inf)"), ("--lr nan", "[0, inf)"),
        ("--eps inf", "[0, inf)"), ("--eps=-1e-8", "[0, inf)"), ("--weight_decay -0.1", "[0, inf)"),
        ("--grad_clip -1", "[0, inf)"), ("--beta1 1", "[0, 1)"), ("--beta2 nan", "[0, 1)"), ("--track -1", "[0, "),
        ("--opt sgd --momentum 2", "[0, 1)"), ("--save_every 0", "[1, "), ("--batch_size 0", "[1, "),
        ("--steps 0", "[1, "), ("--seed -1", "[0, "), ("--lr fast", "not a number"),
        ("--steps 1.5", "not a whole number"), ("--schedule exp", "invalid choice"),
        ("--preset gpt3", "invalid choice"), ("--compile 2", "invalid choice"),
        ("--opt if_shampoo --opt_kwargs damping=-1", "damping"), ("--opt if_shampoo --opt_kwargs lr_cov=nan", "lr_cov"),
        ("--opt shampoo --opt_kwargs graft=sdg", "graft"), ("--opt_kwargs dtype=float", "dtype"),
        ("--opt sgd --beta1 0.9", "takes no beta1"), ("--opt lion --eps 1e-8", "takes no eps"),
        ("--opt_kwargs per_neuron=True", "takes no per_neuron"), ("--opt_kwargs lr", "KEY=VALUE"),
        ("--lr 1 --opt_kwargs lr=2", "twice"), ("--opt_kwargs eps=1 eps=2", "twice"), ("--opt_kwargs eps={1}", "eps"),
        ("--opt rotational_lion --weight_decay 0", "weight_decay > 0"), ("--warmup 24", "make it smaller"),
        ("--device mps" if torch.cuda.is_available() else "--device cuda", "--device cpu"), ("--out_dir ''", "empty"),
        ("--out_dir /dev/null/run", "--out_dir"), ("--out_dir @/file", "--out_dir"),
        ("--eval_only", "--resume"), ("--out_dir @/used", "another run is writing"),
        ("--out_dir @/run --lr 1", "finished run with another"), ("--out_dir @/run --steps 25", "another steps"),
        ("--resume --out_dir @/none", "there is no"), ("--resume --out_dir @/run --opt sgd", "is not what"),
        ("--resume --out_dir @/run --lr 1", "is not what"), ("--resume --out_dir @/run --beta1 0.1", "is not what"),
        ("--resume --out_dir @/run --steps 23", "24 steps already"), ("--resume --out_dir @/elsewhere", "is not the")),
    "NT": (
        ("--dropout 1.5", "[0, 1]"), ("--n_layer 0", "[1, "), ("--n_head 3", "not a multiple"),
        ("--data_dir @/file", "--data_dir"), ("--data_dir /dev/null/data", "--data_dir"),
        ("--resume --out_dir @/run --n_layer 2", "is not what")),
    "N": (
        ("--prompt ''", "empty"), ("--data shakespear", "did you mean shakespeare"), ("--data @", "no such text file"),
        ("--data @/none.txt", "no such text file"), ("--data @/short.txt", "too few"),
        ("--data @/empty.txt", "too few"), ("--data @/line.txt", "too few"), ("--data @/latin1.txt", "UTF-8"),
        ("--data @/binary.txt", "UTF-8"), ("--data @/damaged.txt", "is damaged: delete it"),
        ("--data shakespeare --data_dir @/stale", "delete it"), ("--data shakespeare --data_dir @/file", "--data_dir"),
        ("--block_size 100000", "smaller block"), ("--arch modular --bias 1", "--bias"),
        ("--resume --out_dir @/run --eval_only --prompt 日", "does not occur")),
    "C": (
        ("--modle vit", "did you mean --model?"), ("--epochs 0", "[1, "), ("--split 0", "(0, 1]"),
        ("--model resnet21", "invalid choice"), ("--show ''", "empty"), ("--show @/none/sheet.png", "--show"),
        ("--show @/sheet.foo", "--show"), ("--data shape", "did you mean shapes"),
        ("--data cifar-10", "did you mean cifar10"), ("--data @/file", "no such folder"),
        ("--data @", "data_batch_1.bin"), ("--data @/cut", "damaged"), ("--data @/larger", "32 x 32"),
        ("--data @/labels", "label is 10"), ("--data @/empty", "0 bytes"),
        ("--data @/lacking", "data_batch_3.bin is missing"), ("--data cifar10 --data_dir @/stale", "delete it"),
        ("--data cifar100 --data_dir @/file", "cannot download"), ("--data shapes --data_dir @/file", "--data_dir"),
        ("--data shapes --data_dir /dev/null/data", "--data_dir"), ("--steps 9 --epochs 1", "give one"),
        ("--width 9 --width_mult 1", "give one"), ("--model resnet18", "resmlp"),
        ("--model resmlp --norm group", "resmlp has"), ("--model vit --width 200", "multiple of 64"),
        ("--loss mse --label_smoothing 0.1", "leave it out"), ("--batch_size 101", "make it smaller"),
        ("--resume --out_dir @/run --model vit", "is not what"),
        ("--resume --out_dir @/run --steps 30 --epochs 2", "give one")),
    "T": (
        ("--warmup-updates 1", "did you mean --warmup?"), ("--vocab 200", "[260, "), ("--beam 0", "[1, "),
        ("--label_smoothing 2", "[0, 1]"), ("--length_penalty 1000", "[0, 10]"), ("--epochs 2", "give one"),
        ("--max_tokens 2", "make it larger"), ("--data number", "did you mean numbers"),
        ("--data multi30k", "delete it"), ("--data iwslt14 --data_dir @/file", "cannot download"),
        ("--data @/unequal", "has 2 lines"), ("--data @/hollow", "line 2: empty"), ("--data @/void", "is empty"),
        ("--data @/latin", "line 2: not UTF-8"), ("--data @/alone", "alone.en"), ("--data @/lonely", "valid.de"),
        ("--data @/zip", "cannot read"), ("--test @/tset", "tset.de"),
        ("--translate x --out_dir @/none", "train one first"), ("--translate \udcff --out_dir @/run", "UTF-8"),
        ("--resume --out_dir @/run --steps 30 --epochs 2", "give one")),
}
FILES = {
    "file": b"", "short.txt": b"too short", "empty.txt": b"", "line.txt": b"To be, or not to be.\n", "used/.lock": b"",
    "latin1.txt": "Zwölf Boxkämpfer".encode("latin-1") * 100, "binary.txt": random.Random(0).randbytes(5000),
    "damaged.txt": b"To be, or not to be. " * 20, "my.txt": b"To be, or not to be. " * 20,
    "stale/shakespeare.txt": b"To be, or not to be.\n", "stale/cifar-10-binary.tar.gz": b"<html>Please log in</html>",
    "data/multi30k/train.de.gz": b"something else", "unequal.de": b"a\nb\n", "unequal.en": b"a\n",
    "hollow.de": b"a\n \nb\n", "hollow.en": b"a\nb\nc\n", "void.de": b"", "void.en": b"", "alone.de": b"a\n",
    "latin.de": "gut\nfünf\n".encode("latin-1"), "latin.en": b"good\nfive\n", "lonely.de": b"a\n", "lonely.en": b"a\n",
    "zip.de.gz": gzip.compress(b"a line\n" * 999)[:-9], "zip.en.gz": gzip.compress(b"a line\n" * 999)[:-9],
}


def spoil(script, folder, flags):
    """The damaged data of BAD, and a run, `elsewhere`, whose data changes afterwards."""
    if script is nanogpt_train:
        for name, run in (("damaged", "other"), ("my", "elsewhere")):
            succeed(script, *flags, "--data", folder / f"{name}.txt", "--out_dir", folder / run)
        (folder / "my.txt").write_text("To be, or to be not. " * 20)
        tokens, = folder.glob("data/damaged-*/val*.bin")
        tokens.write_bytes(tokens.read_bytes()[:-1] + b"\1")    # of the same size
    elif script is cifar_train:
        for name, damage in (("cut", lambda blob: blob[:-1]), ("labels", lambda blob: b"\x0a" + blob[1:]),
                             ("empty", lambda blob: b""), ("larger", lambda blob: bytes(20 * (1 + 3 * 64 * 64))),
                             ("lacking", None), ("moved", lambda blob: blob)):
            shutil.copytree(folder / "bins", folder / name)
            path = folder / name / "data_batch_3.bin"
            path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
        succeed(script, *flags, "--data", folder / "moved", "--out_dir", folder / "elsewhere")
        test_set = folder / "moved/test_batch.bin"
        test_set.write_bytes(test_set.read_bytes()[:-1] + b"\xff")      # one pixel of one test image
    else:
        succeed(script, *flags, "--data", write_corpus(folder / "moved"), "--out_dir", folder / "elsewhere")
        (folder / "moved/val.en").write_text("x\n" * 20)


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def collected(problems, what=""):
    """Go on after an error: a table is more useful when all its failures are seen."""
    try:
        yield
    except Exception as error:
        problems.append(f"{what} {type(error).__name__}: {error}")


def test_scripts_bad_input():
    """Every bad flag, file or value: exit status 2 and one line that names the mend, no traceback, nothing written.
    What a run was made with can be said again, and a finished run be done again."""
    problems = []
    for script in SCRIPTS:
        with temporary_folder() as folder:
            for name, data in FILES.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
            common = tiny(script, folder)
            succeed(script, *common, "--out_dir", folder / "run")
            spoil(script, folder, common)
            used = open(folder / "used/.lock")
            if fcntl:
                fcntl.flock(used, fcntl.LOCK_SH)    # as another run would, but less jealously
            before = contents_of(folder / "run")
            for words, message in [row for scripts, rows in BAD.items() if script.__name__[0].upper() in scripts
                                   for row in rows if fcntl or "@/used" not in row[0]]:
                words = shlex.split(words.replace("@", str(folder)))
                flags = words if {"--resume", "--eval_only", "--translate"} & set(words) else [*common, *words]
                flags += ["--out_dir", folder / "never"] * ("--out_dir" not in words)
                with collected(problems):
                    check_refused(script, folder, flags, message)
                shutil.rmtree(folder / "never", ignore_errors=True)
            used.close()
            with collected(problems):
                assert before == contents_of(folder / "run"), "the finished run was touched"
            for flags in ([], ["--resume"], ["--resume", "--lr", script.TUNED["adamw"]["lr"], "--gains", "auto"]):
                with collected(problems):
                    succeed(script, *common, *flags, "--out_dir", folder / "run")
    assert not problems, "\n".join(problems)


def test_scripts_refuse_foreign_checkpoints():
    """A truncated, empty or foreign ckpt.pt, another script's, one edited by hand, or code in a pickle: one line and
    status 2, nothing run, nothing changed."""
    class Code:
        def __reduce__(self):
            return os.mkdir, ("was run",)
    archive, problems = io.BytesIO(), []
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data.txt", "text")
    with temporary_folder() as folder, contextlib.chdir(folder):
        for script in SCRIPTS:
            succeed(script, *tiny(script, folder), "--out_dir", script.__name__)
        whole = {script: (folder / script.__name__ / "ckpt.pt").read_bytes() for script in SCRIPTS}
        for script in SCRIPTS:
            with zipfile.ZipFile(io.BytesIO(whole[script])) as file:
                place = whole[script].index(file.read(max(file.infolist(), key=lambda entry: entry.file_size)))
            damaged = bytearray(whole[script])
            damaged[place] ^= 1                     # one bit of a tensor
            contents = {"another script's": whole[SCRIPTS[SCRIPTS.index(script) - 1]], "one bit": damaged, "empty": b"",
                        "no checkpoint": archive.getvalue(), "code": pickle.dumps(Code()), "a folder": None}
            contents |= {f"the first {n} bytes": damaged[:n] for n in (100, len(damaged) // 2, len(damaged) - 1)}
            for key, value in (
                    ("step", -1), ("step", "x"), ("step", 1.5), ("seconds", None), ("config", {}), ("model", {}),
                    ("losses", ["x"]), ("optimizer", {}), ("script", "x"), ("config", {"schedule": "x"}),
                    ("config", {"opt": "x"}), ("config", {"warmup": -1}), ("config", {"hyper": {"lr": "x"}})):
                ckpt, edited = checkpoint(folder / script.__name__), io.BytesIO()
                torch.save(ckpt | {key: ckpt[key] | value if key == "config" and value else value}, edited)
                contents[f"{key}: {value}"] = edited.getvalue()
            for what, content in contents.items():
                os.mkdir("foreign")
                path = folder / "foreign/ckpt.pt"
                path.mkdir() if content is None else path.write_bytes(content)
                with collected(problems, f"{script.__name__}, {what}"):
                    check_refused(script, folder, ["--resume", "--out_dir", "foreign"], "")
                    assert os.listdir("foreign") == ["ckpt.pt"] and not os.path.exists("was run")
                shutil.rmtree("foreign")
    assert not problems, "\n".join(problems)


# ======================================================================================================================
# Numbers of a run: one loop by hand for all three scripts, with torch's optimizers
# ======================================================================================================================


def config(folder):
    return types.SimpleNamespace(**json.loads((folder / "config.json").read_text()))


def decayed(model, kind, **hyper):
    """torch's optimizer, with weight decay for matrices and filters alone."""
    return kind([{"params": [p for p in model.parameters() if p.dim() > 1]},
                 {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}], **hyper)


def check_by_hand(folder, model, optimizer, losses_of, evaluate, watch, noise):
    """The log of the run in the folder, and its weights, are those of a plain loop. losses_of: step -> a list of losses
    whose mean is minimised, and the accuracy if it is logged; evaluate -> what an evaluation logs; watch: name of a
    weight whose angle is compared; noise: step -> what seeds dropout."""
    s, named = config(folder), dict(model.named_parameters())
    expected, turned, seen = [{"step": 0, "lr": 0.0, **evaluate()}], {}, []
    for step in range(s.steps):
        done = (step - s.warmup) / (s.steps - s.warmup)
        share = {"linear": 1 - done, "cosine": math.cos(math.pi * done / 2) ** 2, "constant": 1.0}[s.schedule]
        for group in optimizer.param_groups:
            group["lr"] = s.hyper["lr"] * ((step + 1) / (s.warmup + 1) if step < s.warmup else share)
        torch.manual_seed(int(np.random.SeedSequence(noise(step)).generate_state(1)[0]))
        losses, *accuracy = losses_of(step)
        (sum(losses) / len(losses)).backward()
        seen.append([sum(losses).item() / len(losses), *accuracy])
        if s.grad_clip:
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
            for p in model.parameters():
                p.grad *= min(1.0, s.grad_clip / norm)
        before = named[watch].detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        turned[step + 1] = angles(before, named[watch]).mean().item()
        if (step + 1) % s.eval_every == 0:
            means = dict(zip(("train_loss", "train_acc"), np.mean(seen, 0)))
            expected.append({"step": step + 1, "lr": optimizer.param_groups[0]["lr"], **means, **evaluate()})
            seen.clear()
    log = read_log(folder)
    rotations = {record["step"]: record for record in log if "rotation" in record}
    assert list(rotations) == list(range(s.track, s.steps, s.track)), "every --track steps, but not the last"
    for step, record in rotations.items():
        close(record["rotation"][watch]["angle"], turned[step], 1e-3, f"angle of step {step}")
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
    with temporary_folder() as folder:
        (folder / "my.txt").write_text(text)
        run = folder / "run"
        out = succeed(nanogpt_train, *TINY, *flags_of(
            grad_accum=2, bias=1, gains=1, opt="adamw", lr=0.02, weight_decay=0.5, seed=7, beta1=0.8, beta2=0.9,
            eps=0.003, grad_clip=0.3, track=5, data=folder / "my.txt", data_dir=folder / "data", out_dir=run))
        ids = torch.tensor([sorted(set(text)).index(c) for c in text])
        train, val = ids[:2700], ids[2700:]
        torch.manual_seed(7)
        model = nanogpt_train.GPT(9, 1, 2, 16, 16, 0.1, True, True)

        def windows(part, rng, count):
            return torch.stack([part[i:i + 17] for i in rng.integers(0, len(part) - 16, size=count)])

        def losses_of(step):
            parts = windows(train, np.random.default_rng([7, step]), 8).split(4)
            return [model(part[:, :16], part[:, 1:]) for part in parts],

        @torch.no_grad()
        def evaluate():
            model.eval()
            rng = np.random.default_rng(0)          # whatever the seed of the run is
            losses = [model(w[:, :16], w[:, 1:]).item() for w in (windows(val, rng, 4) for _ in range(2))]
            model.train()
            return {"val_loss": np.mean(losses)}
        optimizer = decayed(model, torch.optim.AdamW, betas=(0.8, 0.9), eps=0.003, weight_decay=0.5)
        log = check_by_hand(run, model, optimizer, losses_of, evaluate, "blocks.0.up.weight", lambda step: [7, step, 0])
        assert log[-1]["tokens"] == 24 * 8 * 16
        assert f"val_loss {log[-1]['val_loss']:.4f} (perplexity {math.exp(log[-1]['val_loss']):.2f})" in out, out

        out = succeed(nanogpt_train, "--resume", "--eval_only", "--show_table", *flags_of(
            sample=30, temperature=0.3, prompt="bad", out_dir=run))
        model.load_state_dict(checkpoint(run)["model"])
        model.eval()
        written, generator = "bad", torch.Generator().manual_seed(7)
        for _ in range(30):
            x = torch.tensor([sorted(set(text)).index(c) for c in written[-16:]])
            p = model(x[None])[0].double().exp() ** (1 / 0.3)
            written += sorted(set(text))[torch.multinomial(p / p.sum(), 1, generator=generator)]
        assert f"---\n{written}\n---" in out, f"{written} should be in {out}"
        assert out.count("blocks.0.up.weight") == 1, "the table has a line for each parameter"


def test_cifar_equals_a_loop_by_hand():
    """Losses, accuracies, lr, angles and weights are those of a plain loop on the same batches; test-time mirroring,
    label smoothing and --split reach where they should, and the test set is left alone by --split."""
    with temporary_folder() as folder:
        images = cifar_train.Images(*map(torch.from_numpy, cifar_folder(folder, 2200, 1030)), [""] * 10, "")
        for own in (dict(loss="ce", label_smoothing=0.3, tta=1, split=0.5), dict(loss="mse", tta=0, split=1)):
            run = folder / own["loss"]
            flags = ["--data", folder / "bins", *flags_of(
                model="vgg16", width=2, norm="none", batch_size=20, steps=12, eval_every=6, warmup=2, opt="sgd", lr=0.1,
                weight_decay=0.02, grad_clip=0.05, seed=7, cutout=6, schedule="linear", track=5, **own)]
            if own["split"] < 1:                    # other test images
                (folder / "bins/test_batch.bin").write_bytes(bytes(3073 * 7))
            succeed(cifar_train, *flags, "--out_dir", run)
            cifar_folder(folder, 2200, 1030)
            s = config(run)
            train, train_labels, held_out, labels = cifar_train.split(images, own["split"], 7)
            mean, std = train.double().mean((0, 1, 2)).float(), train.double().std((0, 1, 2), correction=0).float()
            batches = cifar_train.Batches(train, train_labels, s)
            torch.manual_seed(7)
            model = cifar_train.make_model(s, 10)

            def loss_of(logits, y, smoothing):
                if own["loss"] == "mse":
                    return (logits - math.sqrt(10) * torch.eye(10)[y]).square().mean()
                log_p = logits.log_softmax(1)
                return -(1 - smoothing) * log_p[torch.arange(len(y)), y].mean() - smoothing * log_p.mean()

            def losses_of(step):
                x, y = batches(step)
                logits = model(x)
                return [loss_of(logits, y, own.get("label_smoothing"))], (logits.argmax(1) == y).double().mean().item()

            @torch.no_grad()
            def evaluate():
                x = ((held_out - mean) / std).permute(0, 3, 1, 2)
                logits = (model(x) + model(x.flip(3))) / 2 if own["tta"] else model(x)
                name = "val" if own["split"] < 1 else "test"
                return {f"{name}_loss": loss_of(logits, labels, 0.0).item(),
                        f"{name}_acc": (logits.argmax(1) == labels).double().mean().item()}
            optimizer = decayed(model, torch.optim.SGD, lr=1.0, momentum=0.9, weight_decay=0.02)
            log = check_by_hand(run, model, optimizer, losses_of, evaluate, "features.3.weight", lambda step: [step])
            assert log[-1]["epoch"] == 12 * 20 / len(train)


def test_translate_equals_a_loop_by_hand():
    """Losses, lr, angles, weights and tokens are those of a plain loop on the same batches."""
    for schedule, clip, smoothing, seed, most in (("linear", 0.3, 0.2, 5, 99), ("constant", 0, 0.0, 6, 7)):
        with temporary_folder() as folder:
            train, run = write_corpus(folder / "corpus", train=60), folder / "run"
            succeed(translate_train, *TINY_TRANSLATE, *flags_of(
                data=train, data_dir=folder / "data", opt="sgd", lr=0.4, momentum=0.5, weight_decay=0,
                schedule=schedule, grad_clip=clip, label_smoothing=smoothing, seed=seed, max_tokens=150, steps=12,
                warmup=4, eval_every=6, batch_size=most, track=5, out_dir=run))
            pairs, s = read_corpus(folder / "corpus"), config(run)
            codec = translate_train.BytePairs(translate_train.learn_byte_pairs(
                [side for pair in pairs["train"] for side in pair], 300 - 259))
            batches, valid = (translate_train.Batches(pairs[part], codec, 150, most) for part in ("train", "val"))
            torch.manual_seed(seed)
            model, held = translate_train.make_model(s, codec), len(batches.sizes)
            assert 12 > held > 2 and len(valid.sizes) > 2, f"{held} batches"

            def loss_of(part, indices, weight):
                x, y, z = part.get(indices, "cpu")
                logp, real = model(x, y).log_softmax(dim=-1), z != codec.pad
                picked = logp.gather(2, z[:, :, None])[:, :, 0]
                return -(((1 - weight) * picked + weight * logp.mean(dim=2)) * real).sum(), real.sum()

            def losses_of(step):
                total, count = loss_of(batches, batches.epoch([seed, step // held])[step % held], smoothing)
                return [total / count],

            @torch.no_grad()
            def evaluate():                         # a sum over all tokens, then divided
                model.eval()
                sums = [loss_of(valid, indices, 0.0) for indices in valid.epoch()]
                model.train()
                return {"val_loss": sum(a for a, _ in sums).item() / sum(b for _, b in sums).item()}
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
            log = check_by_hand(run, model, optimizer, losses_of, evaluate, "encoder.0.ffn.up.weight",
                                lambda step: [seed, step])
            said = sum(len(ids) + 1 for ids in codec.encode([en for _, en in pairs["train"]]))
            assert log[-1]["tokens"] == round(12 * said / held)


def test_translate_translations():
    """What a run says of the test set, and --translate of a text or of standard input, is what slow beam search finds
    with the beam and the length penalty asked for, in the order of the text, without dropout; the BLEU is theirs."""
    with temporary_folder() as folder:
        train, run = write_corpus(folder / "corpus"), ["--out_dir", folder / "run"]
        test = read_corpus(folder / "corpus")["test"]
        test = dict(pair for pair in test if pair in sorted(test, key=lambda pair: len(pair[0]))[:5])
        for language, lines in (("de", test), ("en", test.values())):
            (folder / f"corpus/few.{language}").write_text("".join(line + "\n" for line in lines))
        succeed(translate_train, *TINY_TRANSLATE, *run, *flags_of(
            data=train, test=folder / "corpus/few", data_dir=folder / "data", dropout=0.5, steps=3, warmup=1))
        ckpt = checkpoint(folder / "run")
        codec = translate_train.BytePairs(ckpt["bpe"])
        model = small_translator(codec.n_vocab, n_layer=1)      # one that has something to say, and may end it anywhere
        with torch.no_grad():
            model.target.weight.mul_(0.5)[codec.end] = F.normalize(model.decoder[0].sums[2].norm.bias, dim=0)
        torch.save(ckpt | {"model": model.state_dict()}, folder / "run/ckpt.pt")

        @torch.no_grad()
        def by_hand(text, beam, penalty):
            ids = torch.tensor([[*codec.encode([text])[0], codec.end]])
            said = codec.decode(slow_beam_search(model, ids, codec.begin, codec.end, beam, penalty))
            return " ".join(unicodedata.normalize("NFC", said.replace("\ufeff", "")).split())
        found = set()
        for beam, penalty in ((3, 0), (2, 1.0), (3, 2.0)):
            how = ["--beam", beam, "--length_penalty", penalty]
            succeed(translate_train, "--resume", *run, *how)
            hypotheses = [by_hand(de, beam, penalty) for de in test]
            assert (folder / "run/hypotheses.en").read_text().split("\n") == [*hypotheses, ""], how
            assert succeed(translate_train, "--translate", "\n".join(test), *run, *how).split("\n") == [*hypotheses, ""]
            found |= set(hypotheses)
        assert len(found) > 5, "it says little"
        bleu = translate_train.bleu(hypotheses, list(test.values()))
        out = succeed(translate_train, "--resume", "--eval_only", *run, *how)
        assert f"BLEU {bleu:.2f} on 5 test pairs" in out and out.count("\n  -> ") == 5, out
        shutil.rmtree(folder / "corpus")            # not needed any more
        first, last = [*test][0], [*test][-1]
        for spelling in (f"{first}\n\n{last}\n", f"\ufeff{first}\r\n\r\n{last}\r\n", f"  {first} \n \n{last}",
                         unicodedata.normalize("NFD", f"{first}\n\n{last}").replace(" ", "\xa0 ")):
            with unittest.mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(spelling.encode()))):
                out = succeed(translate_train, "--translate", "-", *run, *how)
            assert out.split("\n") == [hypotheses[0], "", hypotheses[-1], ""], repr(spelling)
            assert succeed(translate_train, "--translate", spelling, *run, *how) == out, repr(spelling)


# ======================================================================================================================
# Settings
# ======================================================================================================================


def settled(script, *arguments):
    """Settings of a new run with these flags, as the script settles them."""
    return script.settle(script.parse(["--device", "cpu", *" ".join(map(str, arguments)).split()]))


def test_scripts_settings():
    """Flags end up in the optimizer, 0 is a value like others; a flag overrides a preset, and that TUNED; the default
    folder is named by what was said by hand; a root-free batch_size counts what the loss is a mean of."""
    for script in SCRIPTS:
        def hyper(*flags):
            return settled(script, *flags).hyper
        said = dict(lr=1, weight_decay=2, beta1=0.3, beta2=0.4, eps=0.5)
        assert hyper("--opt rf_adamw --opt_kwargs batch_size=7", *flags_of(**said)) == said | {"batch_size": 7}
        assert hyper("--opt adamw --beta2 0.4") == script.TUNED["adamw"] | {"beta2": 0.4}
        assert hyper("--opt sgd --momentum 0 --lr 0") == script.TUNED["sgd"] | {"momentum": 0, "lr": 0}
        assert hyper("--opt if_shampoo --opt_kwargs damping=1e-2 update_every=3")["damping"] == 0.01
        s = vars(settled(script, "--warmup 0 --grad_clip 0 --track 0 --seed 0"))
        assert [s[key] for key in ("warmup", "grad_clip", "track", "seed")] == [0, 0, 0, 0]
        for name, gains in (("adamw", 0), ("rotational_adamw", 1), ("modular_adam", 0), ("lion --gains 1", 1)):
            assert settled(script, "--opt", name).gains == gains, name
        for name in optim.OPTIMIZERS:
            assert name in script.TUNED, f"no tuned defaults for {name}"
            seen = []
            with unittest.mock.patch.object(optim, "build", lambda *args, **hyper: seen.append(hyper)):
                script.make_optimizer(settled(script, "--opt", name, "--opt_kwargs eps=0.5" if "eps" in
                                              optim.find_optimizer(name).takes() else ""), None)
            tuned, given = script.TUNED[name], seen[0]
            assert given["lr"] == tuned["lr"] and given["weight_decay"] == tuned["weight_decay"]
            assert "beta1" not in tuned or given["betas"] == (tuned["beta1"], tuned["beta2"]), name
            assert given.get("eps", 0.5) == 0.5 and not given["compile"], name
        plain, other = (settled(script, flags).out_dir for flags in ("", "--lr 1 --opt_kwargs eps=2 --data_dir x"))
        assert other.startswith(plain) and "lr=1" in other and "eps=2" in other and "data_dir" not in other
        different = "", "--lr 1", "--lr 2", "--steps 7", "--opt lion"
        assert len({settled(script, flags).out_dir for flags in different}) == 5
        with unittest.mock.patch.object(script, "pick_device", lambda name: "cuda"):
            s = script.settle({})                   # a larger model, perhaps, and still no download
            assert s.data in ("python_docs", "shapes", "numbers")
    s = settled(nanogpt_train, "--opt rf_rmsprop --batch_size 6 --grad_accum 5 --block_size 7 --steps 90")
    assert s.hyper["batch_size"] == 6 * 5 * 7 and s.warmup == 9, "a preset's warmup in a short run"
    assert settled(cifar_train, "--opt rf_rmsprop --batch_size 6").hyper["batch_size"] == 6
    s = settled(nanogpt_train, "--preset shakespeare --dropout 0 --opt modular_adam")
    assert (s.dropout, s.n_layer, s.data, s.arch, s.steps) == (0, 6, "shakespeare", "modular", 5000)
    s = settled(translate_train, "--preset iwslt --lr 7 --n_head 8")
    assert (s.hyper, s.n_head) == (dict(lr=7, weight_decay=1e-4, beta1=0.9, beta2=0.98), 8)
    assert settled(translate_train, "--preset iwslt --opt lion").hyper == translate_train.TUNED["lion"]
    s = settled(cifar_train, "--model resnet20 --crop 0 --flip 0 --steps 9")
    assert (s.crop, s.flip, s.width, s.epochs, s.steps) == (0, 0, 16, None, 9), "a preset's width is its model's"


def test_scripts_presets():
    """Every preset can be started, and has the values of its paper. A preset's values are its own optimizer's."""
    for script in SCRIPTS:
        for name, preset in script.PRESETS.items():
            s = settled(script, "--preset", name)
            assert s.opt == preset.get("opt", "adamw"), name
            assert not name.startswith("paper_") or name.startswith(f"paper_{s.model}") and name.endswith(s.opt), name
            script.make_optimizer(s, Single(3, 4))
    for name, *expected in (                        # as the papers' scripts and figures have it
            ("resnet20_rotational_sgd", "cifar10", 2048, 200, 120, "cosine", "float32", 4.8, 1e-4),
            ("resnet20_rotational_lion", "cifar10", 2048, 200, 120, "cosine", "float32", 0.016, 1),
            ("resnet18_rotational_adam", "cifar10", 256, 200, 975, "cosine", "float32", 0.0125, 0.08),
            ("resmlp_modular_adam", "cifar10", 128, 10_000, 0, "linear", "float32", 0.25, 0),
            ("rescnn_modular_sgd", "cifar10", 128, 10_000, 0, "linear", "float32", 4, 0),
            ("resnet34_rf_rmsprop", "cifar100", 128, 210, 0, "step", None, 4.978e-3, 2.325e-3),
            ("resnet50_mse_sgd", "cifar100", 128, 120, 0, "step", None, 0.02629, 0.01503),
            ("vgg16_adamw", "cifar100", 128, 210, 0, "step", None, 2.743e-3, 0.08979)):
        s, preset = settled(cifar_train, "--preset", f"paper_{name}"), cifar_train.PRESETS[f"paper_{name}"]
        found = [s.data, s.batch_size, s.epochs or s.steps, s.warmup, s.schedule, preset.get("dtype"), s.hyper["lr"],
                 s.hyper.get("weight_decay", 0)]
        assert found == expected, (name, found)
    s = settled(nanogpt_train, "--preset modular_gpt")
    assert (s.n_embd, s.n_layer, s.block_size, s.n_head, s.batch_size, s.steps, s.data, s.dtype, s.arch) == (
        128, 3, 128, 8, 128, 10_000, "shakespeare", "float32", "modular")
    assert settled(cifar_train, "--preset paper_resnet20_adamw --opt sgd").hyper == cifar_train.TUNED["sgd"]


def test_scripts_schedule():
    """Warmup is a straight line that never starts at 0; cosine, linear, constant and step go as their formulas say."""
    for script in SCRIPTS:
        for name, quarter, middle in (("cosine", (2 + 2**0.5) / 4, 0.5), ("linear", 0.75, 0.5), ("constant", 1, 1)):
            s = types.SimpleNamespace(warmup=10, steps=110, schedule=name)
            found = [script.lr_at(step, 11.0, s) for step in (*range(11), 35, 60)]
            close(found, [*range(1, 11), 11, 11 * quarter, 11 * middle], 1e-12, name)
    s = types.SimpleNamespace(warmup=0, steps=210, schedule="step")
    drops = [cifar_train.lr_at(step, 1.0, s) for step in (69, 70, 139, 140, 209)]
    close(drops, [1, 0.1, 0.1, 0.01, 0.01], 1e-12, "tenfold down at 1/3 and 2/3")


def test_scripts_bench():
    """--bench prints how fast training is and where the time of a step goes, and writes nothing."""
    with temporary_folder() as folder:
        for script in SCRIPTS:
            out = succeed(script, *tiny(script, folder), "--out_dir", folder / "new", "--bench")
            assert re.search(r"[\d,]+ (tokens|images|English tokens)/s", out), f"{script}: {out}"
            assert re.search(r"outside( of)? forward|is not forward", out) and not (folder / "new").exists(), out


def test_scripts_end_to_end():
    """A run learns, and leaves what it promises: config, a log with the same keys for all, a checkpoint, the result in
    words as the last line. Its neurons turn by about their angle. Its checkpoint is measured again by hand."""
    with temporary_folder() as folder:
        cifar_folder(folder, 400, 100)
        train = write_corpus(folder / "corpus", zipped=True)
        for script, flags, result, keys, watch in (
                (nanogpt_train, "--steps 150 --n_layer 2 --n_embd 64 --eval_every 50 --eval_batches 10 --sample 9",
                 "val_loss {val_loss:.4f} ", "tokens val_loss", "blocks.0.up.weight"),
                (cifar_train, f"--data {folder}/bins --model vgg16 --width 4 --epochs 6 --batch_size 20 --warmup 5 "
                 "--eval_every 40", "test_acc {percent:.2f} % ", "train_acc test_loss test_acc epoch",
                 "features.3.weight"),
                (translate_train, " ".join(TINY_TRANSLATE).replace("--steps 24", "--epochs 8") + f" --data {train} "
                 "--eval_every 50", "BLEU {bleu:.2f} ", "tokens val_loss", "encoder.0.ffn.up.weight")):
            run = folder / script.__name__
            out, _ = run_fork(script, folder, *flags.split(), *flags_of(opt="rotational_lion", out_dir=run, track=50))
            log, s = read_log(run), config(run)
            evaluations = [record for record in log if "train_loss" in record]
            for key in ("step", "train_loss", "lr", *keys.split()):
                assert key in evaluations[-1], (script, key)
            assert evaluations[-1]["train_loss"] < evaluations[0]["train_loss"] - 0.1 and log[-1]["final"], script
            turned = next(record for record in log if "rotation" in record)["rotation"][watch]
            assert abs(turned["angle"] / turned["predicted_angle"] - 1) < 0.35, f"{watch} should turn by it: {turned}"
            decay = script.TUNED["rotational_lion"]["weight_decay"]
            assert (s.opt, s.gains, s.hyper["weight_decay"]) == ("rotational_lion", 1, decay)
            words = result.format(**log[-1], percent=100 * log[-1].get("test_acc", 0))
            assert out.strip().splitlines()[-1].startswith(words), f"{words}: {out}"
        log = read_log(folder / "nanogpt_train")
        assert abs(log[0]["val_loss"] - math.log(103)) < 0.3, "an untrained model should find all 103 characters alike"
        assert log[-1]["val_loss"] < 2.7, "the frequencies of single characters alone give about 3.2"
        last, losses = read_log(folder / "cifar_train")[-1], []
        assert last["test_acc"] > 0.3 and last["step"] == 120, last
        model = cifar_train.make_model(config(folder / "cifar_train"), 10).double().eval()
        model.load_state_dict(checkpoint(folder / "cifar_train")["model"])
        train, _, test, labels = cifar_folder(folder, 400, 100)
        for image, label in zip(test, labels):      # an image at a time, in float64
            pixels = (image - train.mean((0, 1, 2))) / train.std((0, 1, 2))
            logits = model(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
            losses.append((logits.logsumexp(0) - logits[label]).item())
        close(last["test_loss"], np.mean(losses), 1e-4, "test_loss")
        last, hypotheses = read_log(run)[-1], (run / "hypotheses.en").read_text().splitlines()
        references = gzip.decompress((folder / "corpus/test.en.gz").read_bytes()).decode().splitlines()
        assert last["bleu"] == translate_train.bleu(hypotheses, references) and len(hypotheses) == 15


def test_scripts_go_on_to_where_they_were_last_told():
    """--steps or --epochs on resuming hold for later resumptions, too, whichever of them the run began with."""
    with temporary_folder() as folder, unittest.mock.patch.object(translate_train, "translate", lambda *_: ["x"] * 15):
        cifar_folder(folder)
        train = write_corpus(folder / "corpus", train=60)
        for script, flags in ((translate_train, f"--data {train} --data_dir {folder} "
                               "--n_layer 1 --n_embd 16 --vocab 300 --max_tokens 200"),
                              (cifar_train, f"--data {folder}/bins --batch_size 20 --model resmlp --width 4")):
            run = folder / script.__name__
            succeed(script, *flags.split(), *flags_of(opt="rf_rmsprop", track=0, epochs=1, out_dir=run))
            epoch = config(run).steps
            assert config(run).warmup == epoch // 10, "in so short a run"
            for more, steps in (("", epoch), (f"--steps {epoch + 3}", epoch + 3), ("", epoch + 3),
                                ("--epochs 2", 2 * epoch), ("", 2 * epoch)):
                succeed(script, "--resume", "--out_dir", run, *more.split())
                assert read_log(run)[-1]["step"] == config(run).steps == steps, f"{script.__name__} {more}"
            assert not any("rotation" in record for record in read_log(run)), "--track 0"
        run = folder / "translate_train"            # root-free: the tokens of the usual batch
        codec, corpus = translate_train.BytePairs(checkpoint(run)["bpe"]), read_corpus(folder / "corpus")["train"]
        tokens = sum(len(ids) + 1 for ids in codec.encode([en for _, en in corpus]))
        assert config(run).hyper["batch_size"] == round(tokens / (config(run).steps / 2))


def small_translator(n_vocab=9, seed=0, **changes):
    """A Translator with large random weights, so that every token matters; the last ids are pad, begin, end."""
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, n_ffn=32, norm="post", dropout=0.0, bias=True, gain=False) | changes
    model = translate_train.Translator(n_vocab, n_vocab - 3, **sizes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


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


# ======================================================================================================================
# Data
# ======================================================================================================================


def test_nanogpt_text():
    """Any text is split 90 / 10 by characters and comes back from its token files unchanged, but for a byte-order mark
    and carriage returns; a changed text of the same size and time is read anew; two processes do not make it at once.
    Windows of tokens begin anywhere where one fits, and the target of each token is its successor."""
    text = "".join(random.Random(i).choice("\n ab\u00e4a\u0308\u20ac\U0001f600") for i in range(5000))
    with temporary_folder() as folder:
        def load(data, where="data"):
            (folder / "my.txt").write_bytes(data.encode())
            os.utime(folder / "my.txt", (1e9, 1e9))
            train, val, codec, _ = nanogpt_train.load_data(str(folder / "my.txt"), folder / where, "char")
            return codec.decode(train.tolist()), codec.decode(val.tolist())
        for spelling in (text, text, "\ufeff" + text, text.replace("\n", "\r\n")):      # made, then found
            assert load(spelling) == (text[:4500], text[4500:])
        for last in "xy":
            assert load(text[:-1] + last)[1] == text[4500:-1] + last, "token files of the text as it was"
        if fcntl:                                   # while another process makes token files, two more wait
            (folder / "other").mkdir()
            with open(folder / "other/.lock", "w") as lock, concurrent.futures.ThreadPoolExecutor(2) as pool:
                fcntl.flock(lock, fcntl.LOCK_EX)
                found = [pool.submit(load, text, "other") for _ in range(2)]
                time.sleep(0.1)
                assert os.listdir(folder / "other") == [".lock"] and not any(result.done() for result in found)
                fcntl.flock(lock, fcntl.LOCK_UN)
                assert [result.result(20) for result in found] == [(text[:4500], text[4500:])] * 2
    pieces = list(nanogpt_train.read_text(io.BytesIO((text * 1000).encode()), 7, 4_500_123))
    assert len(pieces) > 1 and "".join(pieces) == (text * 1000)[7:4_500_123], "texts larger than memory"
    windows = nanogpt_train.get_windows(np.arange(100, 120, dtype=np.uint16), np.random.default_rng(0), 500, 15)
    assert {row[0] for row in windows.tolist()} == {100, 101, 102, 103, 104}
    x, y = nanogpt_train.inputs_and_targets(windows, "cpu")
    assert torch.equal(windows, windows[:, :1] + torch.arange(16)) and torch.equal(y, x + 1) and x.shape == (500, 15)


def test_nanogpt_large_texts():
    """TinyStories and WikiText keep their own split; of OpenWebText, every 2000th document is held out."""
    def pack(*files):
        blob = io.BytesIO()
        with tarfile.open(fileobj=blob, mode="w") as tar:
            for name, data in files:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return blob.getvalue()
    documents = [f"document {n}, größer" for n in range(4200)]
    with temporary_folder() as folder, unittest.mock.patch.object(
            nanogpt_train, "download", lambda url, sha256, path: folder / url.rpartition("/")[2]):
        for i in range(21):                         # in each archive an .xz file of 200 documents, and something else
            inner = pack(*((f"{n}.txt", documents[n].encode()) for n in range(200 * i, 200 * i + 200)))
            files = ("part.xz", lzma.compress(inner, preset=0)), ("README", b"no archive")
            (folder / f"urlsf_subset{i:02d}.tar").write_bytes(pack(*files))
        with zipfile.ZipFile(folder / "wikitext-103-raw-v1.zip", "w") as file:
            for part in ("train", "valid", "test"):
                (folder / f"TinyStoriesV2-GPT4-{part}.txt").write_text(f"tiny {part}")
                file.writestr(f"wikitext-103-raw/wiki.{part}.raw", f"wiki {part}")
        held_out = documents[1999::2000]
        for part, expected in (("valid", held_out), ("train", [text for text in documents if text not in held_out])):
            read = nanogpt_train.read_part("openwebtext", part, folder)
            assert list(read) == [text + "<|endoftext|>" for text in expected], part
            for name, words in (("tinystories", "tiny"), ("wikitext", "wiki")):
                assert "".join(nanogpt_train.read_part(name, part, folder)) == f"{words} {part}"
                assert settled(nanogpt_train, "--data", name).tokenizer == "gpt2"


def test_nanogpt_byte_pairs():
    """Byte pairs of a text encoded piece by piece equal those of the text encoded in one go, wherever pieces end."""
    import tiktoken
    merges = [b"a", b"b", b" ", b"\n", b"!", b"  ", b"\n\n", b" a", b"ab", b" ab", b" \n"]       # white space can merge
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""     # as GPT-2 splits text
    ranks = {token: rank for rank, token in enumerate(merges)}
    codec = tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 11})
    chance = random.Random(1)
    for length in [60] * 200 + [60_000] * 2:
        text = "".join(chance.choice("ab  \n!") for _ in range(length))
        cuts = sorted(chance.sample(range(length + 1), 5))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, length])]
        apart = [token for piece in nanogpt_train.whole_words(pieces) for token in codec.encode(piece)]
        assert apart == codec.encode(text), repr(text)
    with unittest.mock.patch.object(tiktoken, "get_encoding", lambda name: {"gpt2": codec}[name]), \
            temporary_folder() as folder:
        tokens = nanogpt_train.GPT2Tokens()
        assert tokens.encode("ab!<|endoftext|>a") == [8, 4, 11, 0], "the end of a document is one token"
        assert tokens.decode([8, 4, 11, 12, tokens.n_vocab - 1, 0]) == "ab!<|endoftext|>a", "padding has no text"
        (folder / "my.txt").write_text("ab !\n" * 200)
        train, val, found, _ = nanogpt_train.load_data(str(folder / "my.txt"), folder, "gpt2")
        assert found.decode(train.tolist()) + found.decode(val.tolist()) == "ab !\n" * 200
        assert train.tolist() == codec.encode("ab !\n" * 180)


def test_cifar_layouts():
    """CIFAR-10's and CIFAR-100's binary layouts are read pixel by pixel as documented, from a folder and an archive."""
    rng = np.random.default_rng(0)
    for name, inner, label_bytes, classes, *parts in (
            ("cifar10", "cifar-10-batches-bin", 1, 10, [f"data_batch_{i}.bin" for i in range(1, 6)],
             ["test_batch.bin"]),
            ("cifar100", "cifar-100-binary", 2, 100, ["train.bin"], ["test.bin"])):
        with temporary_folder() as folder:
            (folder / inner).mkdir()
            expected = []
            for part in parts:
                records = rng.integers(0, 256, (4 * len(part), label_bytes + 3072), dtype=np.uint8)
                records[:, label_bytes - 1] = rng.integers(0, classes, len(records))
                for file, blob in zip(part, np.split(records, len(part))):
                    (folder / inner / file).write_bytes(blob.tobytes())
                images = np.zeros((len(records), 32, 32, 3), np.uint8)
                for n, row, column, colour in np.ndindex(images.shape):
                    images[n, row, column, colour] = records[n, label_bytes + 1024 * colour + 32 * row + column]
                expected += [images, records[:, label_bytes - 1].astype(np.int64)]
            archive, _, *layout = cifar_train.CIFAR[name]
            with tarfile.open(folder / archive, "w:gz") as tar:
                tar.add(folder / inner, inner)
                tar.addfile(tarfile.TarInfo(f"../{folder.name}-outside"))       # nothing is unpacked, so nor is this
            sha256 = hashlib.sha256((folder / archive).read_bytes()).hexdigest()
            with unittest.mock.patch.dict(cifar_train.CIFAR, {name: (archive, sha256, *layout)}):
                both = cifar_train.load_data(str(folder / inner), folder), cifar_train.load_data(name, folder)
            for images in both:
                same_bits(images[:4], map(torch.from_numpy, expected), name)
                assert len(images.names) == classes and images.fingerprint == both[0].fingerprint
            records[-1, -1] ^= 1                    # one pixel of the test images
            (folder / inner / parts[1][0]).write_bytes(records.tobytes())
            assert cifar_train.load_data(str(folder / inner), folder).fingerprint != both[0].fingerprint
            assert not (folder.parent / f"{folder.name}-outside").exists()


def test_cifar_shapes():
    """The drawn classes: a linear softmax stays below 30 %, though above chance; drawn once, the same for everyone, and
    anew for other code. Areas equal closed forms, and each shape is turned by a rotation, stretched along its axes."""
    with temporary_folder() as folder, contextlib.redirect_stderr(io.StringIO()):       # a progress bar
        drawn, found = (cifar_train.load_shapes(folder, 5000, 1000)[0] for _ in range(2))
        assert len(list(folder.glob("*.npz"))) == 1 and all(np.array_equal(a, b) for a, b in zip(drawn, found))
        with unittest.mock.patch.object(cifar_train, "draw_shapes", lambda n, rng: (np.ones((n, 1)), np.ones(n))):
            for n_train, inside in ((3000, cifar_train.inside), (5000, cifar_train.inside), (5000, cifar_train.show)):
                with unittest.mock.patch.object(cifar_train, "inside", inside):
                    assert len(cifar_train.load_shapes(folder, n_train, 1000)[0][0]) == n_train
        assert len(list(folder.glob("*.npz"))) == 4
    assert not {image.tobytes() for image in drawn[0]} & {image.tobytes() for image in drawn[2]}, "trained on the test"
    x, y, x_test, y_test = (torch.from_numpy(array) for array in drawn)
    assert y.bincount().tolist() == [500] * 10 and y_test.bincount().tolist() == [100] * 10
    x, x_test = ((part.flatten(1).float() - 128) / 64 for part in (x, x_test))
    linear, best = nn.Linear(3072, 10), 0.0
    optimizer = torch.optim.AdamW(linear.parameters(), lr=3e-4, weight_decay=0.1)
    for _ in range(4):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(linear(x[batch]), y[batch]).backward()
            optimizer.step()
        best = max(best, (linear(x_test).argmax(1) == y_test).double().mean().item())
    assert 0.12 < best < 0.3, best

    u, v = np.meshgrid(*[(np.arange(800) + 0.5) / 400 * 1.25 - 1.25] * 2)
    lens = sum(r**2 * math.acos((0.25 + r**2 - other**2) / r) for r, other in ((0.95, 0.75), (0.75, 0.95)))
    lens -= math.sqrt((1.7**2 - 0.25) * (0.25 - 0.2**2)) / 2                        # what two discs have in common
    areas = {"disc": math.pi * 0.85**2, "ring": math.pi * (0.97**2 - 0.53**2), "square": 1.5**2,
             "triangle": 3 * math.sqrt(3) * 0.55**2, "pentagon": 5 * math.tan(math.pi / 5) * 0.75**2,
             "star": math.pi * (0.68**2 + 0.3**2 / 2), "cross": 2 * 1.8 * 0.56 - 0.56**2,
             "crescent": math.pi * 0.95**2 - lens, "bars": 2 * 0.4 * 1.7, "heart": math.pi * 0.8**2}    # a sheared disc
    for shape in cifar_train.SHAPES:
        close((cifar_train.inside(shape, u, v) > 0).mean() * 2.5**2, areas[shape], 0.004, shape)
    star = [cifar_train.inside("star", np.cos(a), np.sin(a)) for a in 2 * np.pi * np.arange(5) / 5]
    close(star, [-0.02] * 5, 1e-9, "five points of the star")
    seen, inside = [], cifar_train.inside
    with unittest.mock.patch.object(cifar_train, "inside", lambda *a: seen.append(a) or inside(*a)):
        cifar_train.draw_shapes(40, np.random.default_rng(0))
    assert [shape for shape, *_ in seen] == list(cifar_train.SHAPES)
    for _, u, v in seen:                            # 4 pictures of each: gradients of u and v by differences
        (u_x, u_y), (v_x, v_y) = (((f[:, 0, 31] - f[:, 0, 0]) * 16 / 31, (f[:, 31, 0] - f[:, 0, 0]) * 16 / 31)
                                  for f in (u, v))
        close(u_x * v_x + u_y * v_y, np.zeros(4), 1e-5, "the axes stay at right angles", scale=1)
        area, stretch = u_x * v_y - u_y * v_x, np.hypot(u_x, u_y) / np.hypot(v_x, v_y)
        assert (0.9**-2 <= area).all() and (area <= 0.6**-2).all() and (np.abs(np.log(stretch)) <= 0.3).all()


def test_cifar_show():
    """--show draws the first images of each class in a row, every pixel as it is, doubled."""
    if not importlib.util.find_spec("matplotlib"):
        raise Skip("needs matplotlib")
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
    """A batch equals a per-image transcription of crop, mirror, normalise and cutout; an epoch shows no image twice; a
    part held out is random, and disjoint."""
    images = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (50, 32, 32, 3), np.uint8))
    labels = torch.arange(50)
    mean, std = (getattr(images.double(), kind)((0, 1, 2)).numpy() for kind in ("mean", "std"))

    def batches(pixels=images, **how):
        s = dict(crop=4, flip=1, cutout=8, batch_size=12, seed=9, device="cpu") | how
        return cifar_train.Batches(pixels, labels, types.SimpleNamespace(**s))
    for pad, flip, cutout in ((4, 1, 7), (0, 0, 0), (2, 1, 8)):
        ours, seen, shifts = batches(crop=pad, flip=flip, cutout=cutout), [], set()
        for step in range(8):                       # two epochs of 4 batches; two images are left over
            (x, y), draws = ours(step), ours.draw(step)
            assert x.shape == (12, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(y, draws[0])
            seen.append(y.tolist())
            shifts |= set(zip(*draws[1:4].tolist()))
            for i, (n, top, left, mirrored, middle_y, middle_x) in enumerate(draws.T[:2].tolist()):
                by_hand = np.zeros((3, 32, 32))     # pixel by pixel, which takes its time: two images
                for row, column in np.ndindex(32, 32):
                    source_y, source_x = row + top - pad, (31 - column if mirrored else column) + left - pad
                    hidden = (cutout and middle_y - cutout / 2 <= row < middle_y + cutout / 2
                              and middle_x - cutout / 2 <= column < middle_x + cutout / 2)
                    inside = 0 <= source_y < 32 and 0 <= source_x < 32
                    pixel = images[n, source_y, source_x].numpy() if inside else np.zeros(3)
                    by_hand[:, row, column] = 0 if hidden else (pixel - mean) / std
                close(x[i], by_hand, 1e-4, f"step {step}, image {i}")
        epochs = [sum(seen[:4], []), sum(seen[4:], [])]
        assert all(len(set(epoch)) == 48 for epoch in epochs) and epochs[0] != epochs[1]
        assert (len(shifts) > 1) == bool(pad or flip)
    assert (batches(seed=1).draw(0) != batches(seed=2).draw(0)).any(1).all(), "all six draws depend on the seed"
    ours = batches()
    draws = torch.cat([ours.draw(step) for step in range(200)], dim=1)
    assert draws[1].bincount(minlength=9).min() > 0 and draws[1].max() == 8, "a crop can begin in any of 9 rows"
    assert 0.45 < draws[3].double().mean() < 0.55, "every other image is mirrored"
    assert batches(torch.full_like(images, 7))(0)[0].isfinite().all(), "a single colour has no deviation to divide by"

    whole = cifar_train.Images(labels[:, None, None, None], labels, labels[:0], labels[:0], [""] * 50, "")
    train, train_labels, rest, rest_labels = cifar_train.split(whole, 0.7, 3)
    assert len(train) == 35 and sorted([*train_labels.tolist(), *rest_labels.tolist()]) == labels.tolist()
    assert torch.equal(train.flatten(), train_labels) and torch.equal(rest.flatten(), rest_labels)
    assert train_labels.tolist() != sorted(train_labels.tolist()), "a random part, not the first images"


def test_translate_grammar():
    """Numbers, ordinals, years and times are spelled as German and English spell them; no content of the test or the
    validation set, and no sentence, occurs in the training set."""
    for name, given, de, en in re.findall(r"(\w+) ([\d ]+\w*): (.+?) = (.+?)(?:;|$)", """
            number 0: null = zero; number 1: eins = one; number 16: sechzehn = sixteen; number 17: siebzehn = seventeen
            number 21: einundzwanzig = twenty-one; number 30: dreißig = thirty; number 66: sechsundsechzig = sixty-six
            number 101: einhunderteins = one hundred and one; number 1000000: eine Million = one million
            number 1983: eintausendneunhundertdreiundachtzig = one thousand nine hundred and eighty-three
            number 101011: einhunderteintausendelf = one hundred and one thousand and eleven
            number 2000017: zwei Millionen siebzehn = two million and seventeen
            ordinal 1 e: erste = first; ordinal 2 e: zweite = second; ordinal 3 e: dritte = third
            ordinal 7 e: siebte = seventh; ordinal 8 e: achte = eighth; ordinal 12 e: zwölfte = twelfth
            ordinal 20 e: zwanzigste = twentieth; ordinal 21 er: einundzwanzigster = twenty-first
            ordinal 101 en: einhundertersten = one hundred and first; year 2000: zweitausend = two thousand
            year 1983: neunzehnhundertdreiundachtzig = nineteen eighty-three
            year 1900: neunzehnhundert = nineteen hundred; year 1105: elfhundertfünf = eleven oh five
            year 2023: zweitausenddreiundzwanzig = twenty twenty-three
            clock 7 30: halb acht = half past seven; clock 12 30: halb eins = half past twelve
            clock 7 15: Viertel nach sieben = a quarter past seven; clock 7 45: Viertel vor acht = a quarter to eight
            clock 12 50: zehn vor eins = ten to one; clock 7 25: fünf vor halb acht = twenty-five past seven
            clock 7 35: fünf nach halb acht = twenty-five to eight; timetable 8 0: acht Uhr = eight a.m.
            timetable 23 15: dreiundzwanzig Uhr fünfzehn = eleven fifteen p.m.; timetable 12 0: zwölf Uhr = twelve p.m.
            timetable 0 5: null Uhr fünf = twelve oh five a.m.
            timetable 1 31: ein Uhr einunddreißig = one thirty-one a.m.""", re.M):
        words = getattr(translate_train, name, lambda n: (translate_train.german(n), translate_train.english(n)))
        assert words(*(int(x) if x.isdigit() else x for x in given.split())) == (de, en), (name, given)
    contents, sources = {}, {}
    for part, count in (("train", 24_000), ("valid", 500), ("test", 1000)):
        grammar, drawn = translate_train.Grammar(part, seed=part), {}
        while len(drawn) < count:
            drawn.setdefault(*grammar.pair())
        contents[part], sources[part] = grammar.contents, set(drawn)
        assert part == "train" or list(drawn.items()) == translate_train.numbers(part), part
        assert all(text == translate_train.sentence(text) for pair in drawn.items() for text in pair)
    for a, b in (("train", "test"), ("train", "valid"), ("valid", "test")):
        assert not contents[a] & contents[b] and not sources[a] & sources[b], (a, b)
    # independent of the grammar's own books: no long number word of the test set is a word of the training set
    words = {part: {word for de in sources[part] for word in re.findall(r"\w{25,}", de)} for part in sources}
    assert len(words["test"]) > 100 and not words["test"] & words["train"], len(words["test"])


# Spellings of one sentence; and texts that are others.
SPELLINGS = ("Grüße um halb acht", "\ufeffGrüße um halb acht", "Grüße um halb acht\r", " Grüße  um halb acht ",
             "Gru\u0308ße\u00a0um\u2009halb\tacht", "\u3000Grüße um halb acht\u00a0")
OTHERS = ("GRÜSSE um halb acht", "Grüßeum halb acht", "Grüsse um halb acht", "Grüße um halb acht.")


def test_translate_text():
    """A sentence is one however it was typed: mark, carriage return, spaces, decomposed letters. So are a corpus, its
    vocabulary and the BLEU of a test set."""
    assert {translate_train.sentence(text) for text in SPELLINGS} == {SPELLINGS[0]}
    assert len({translate_train.sentence(text) for text in (*OTHERS, SPELLINGS[0])}) == 5
    with temporary_folder() as folder:
        lines, found = [SPELLINGS[0]] * len(SPELLINGS), []
        for name, spelled, end in (("plain", lines, "\n"), ("odd", SPELLINGS, "\n"), ("windows", lines, "\r\n")):
            (folder / name).mkdir()
            for part, language in itertools.product(("train", "val", "test"), ("de", "en")):
                (folder / name / f"{part}.{language}").write_bytes("".join(f"{line}{end}" for line in spelled).encode())
            pairs = translate_train.load_corpus(str(folder / name / "train"), folder, None)
            codec = translate_train.byte_pairs_of(pairs["train"], 290, folder, name)
            found.append((pairs, codec.tokens, translate_train.bleu(*zip(*pairs["test"]))))
        assert found[0] == found[1] == found[2] and abs(found[0][2] - 100) < 1e-9


def test_translate_corpora():
    """multi30k's parts are train, val, test_2016_flickr; --test is another test set; each text has its vocabulary.
    IWSLT'14 is cleaned as the recipe says. (Tried on a made-up archive of the same layout.)"""
    with temporary_folder() as folder:
        parts, sums = {"train": "train", "valid": "val", "test": "test_2016_flickr"}, {}
        (folder / "multi30k").mkdir()
        for name, language in itertools.product(parts.values(), ("de", "en")):
            data = gzip.compress("".join(f"{name} {i} ein Wort {language}\n" for i in range(4)).encode())
            (folder / f"multi30k/{name}.{language}.gz").write_bytes(data)
            sums[f"{name}.{language}.gz"] = f"sha256:{hashlib.sha256(data).hexdigest()}"
        with unittest.mock.patch.object(translate_train, "MULTI30K_FILES", sums):
            plain = translate_train.load_corpus("multi30k", folder, None)
            other = translate_train.load_corpus("multi30k", folder, str(folder / "multi30k/val"))
        for part, name in parts.items():
            assert plain[part] == [(f"{name} {i} ein Wort de", f"{name} {i} ein Wort en") for i in range(4)], part
        assert other == plain | {"test": plain["valid"]}
        for pairs in (plain["train"], plain["train"] + plain["test"]) * 2:
            bpe = translate_train.byte_pairs_of(pairs, 270, folder, "x")
            assert bpe.tokens == translate_train.learn_byte_pairs([side for pair in pairs for side in pair], 11)
        assert len(list(folder.glob("bpe-x-270-*.json"))) == 2

        head = "<url>http</url>\n<talkid>1</talkid>\n<keywords>k</keywords>\n<title>Der Titel</title>\n"
        path = folder / "iwslt14-de-en.tgz"
        with tarfile.open(path, "w:gz") as archive:
            for language, end in (("de", "eins zwei drei vier\n\n"), ("en", "one two\nempty\n")):       # 2 : 1; nothing
                text = head + "".join(f"Satz {i} {language} ({i}).\n" for i in range(60)) + end + "wort " * 176 + "\n"
                files = {f"train.tags.de-en.{language}": text}
                for i, name in enumerate("TED.dev2010 TEDX.dev2012 TED.tst2010 TED.tst2011 TED.tst2012".split()):
                    files[f"IWSLT14.{name}.de-en.{language}.xml"] = (
                        f'<doc>\n<seg id="1"> Test {i} &amp; so’s {language} </seg>\n<seg id="2">Zwei</seg>\n</doc>\n')
                for name, text in files.items():
                    member = tarfile.TarInfo(f"de-en/{name}")
                    member.size = len(text.encode())
                    archive.addfile(member, io.BytesIO(text.encode()))
        checksum = f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"
        with unittest.mock.patch.object(translate_train, "IWSLT14", (translate_train.IWSLT14[0], checksum)):
            pairs = translate_train.load_corpus("iwslt14", folder, None)
    right = [("der titel", "der titel")] + [(f"satz {i} de ({i}).", f"satz {i} en ({i}).") for i in range(60)]
    assert pairs["valid"] == [right[22], right[45]]
    assert pairs["train"] == [pair for i, pair in enumerate(right) if i not in (22, 45)]
    assert len(pairs["test"]) == 10 and pairs["test"][0] == ("test 0 & so's de", "test 0 & so's en")


SAMPLES = ["", " ", "halb acht", "  zwei  Leerzeichen ", "Grüße: 5 €, 30 %!", "e\u0301 a\u0308\u0323", "\0\x01\x1c\x85",
           "👩‍👩‍👧‍👦 🇩🇪", "日本語のテキスト", "\u2028\u2029\ufeff\ufffd", "<end><pad>", "tab\tand\r", "İıſß", "\U0010ffff"]


def test_translate_byte_pairs():
    """Any Unicode text survives encoding and decoding unchanged, and its ids never include a mark. The trainer learns
    what counting all pairs again for every token does; tiktoken joins as it did."""
    chance = random.Random(0)
    languages = translate_train.german, translate_train.english
    numbers = [words(n) for n in chance.sample(range(10**6), 300) for words in languages]
    codec = translate_train.BytePairs(translate_train.learn_byte_pairs(numbers + SAMPLES * 3, 300))
    for i in range(400):
        top = [chance.choice([0x80, 0x250, 0x3000, 0x110000]) for _ in range(20)]
        text = SAMPLES[i] if i < len(SAMPLES) else "".join(map(chr, map(chance.randrange, top)))
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
    numbers = random.Random(0).sample(range(10**7), 500)
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
    assert abs(batches.padding - (1 - real / held)) < 1e-12 and batches.padding < 0.15 and batches.too_long == 1
    assert all(sorted(i for batch in epoch for i in batch) == list(range(500)) for epoch in (one, two))
    assert sorted(map(len, one)) == sorted(map(len, two)) == sorted(batches.sizes) != [*map(len, one)]
    assert not all(np.array_equal(a, b) for a, b in zip(one, two))
    assert all(np.array_equal(a, b) for a, b in zip(one, batches.epoch([1, 0]), strict=True))
    assert max(translate_train.Batches(pairs, bpe, 400, 3).sizes) == 3
    members = [{frozenset(batch.tolist()) for batch in epoch} for epoch in (one, two)]
    assert len(members[0] & members[1]) < len(one) / 2, "pairs of the same lengths should trade places"
    longest = max(len(ids) + 1 for ids in bpe.encode(pairs[0]))         # as long as is allowed, by either language
    for pair in (pairs[0], pairs[0][::-1]):
        for room, sizes in ((longest, [1, 1]), (2 * longest - 1, [1, 1]), (2 * longest, [2]), (longest - 1, [])):
            assert translate_train.Batches([pair] * 2, bpe, room).sizes == sizes, room


@contextlib.contextmanager
def misbehaving_server(body):
    """-> its address. What it answers stands in the path: good, slow, wrong, short, ..."""
    raw = {"garbage": b"this is no HTTP\r\n" * 9,          # the second chunk breaks off
           "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\nff\r\nabc",
           "length": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n" + body}
    moved = {"loop": "/loop", "moved": "/good", "announced": "/good", "announced wrongly": "/wrong", "login": "/page"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind = urllib.parse.unquote(self.path.strip("/"))
            data = {"wrong": body.upper(), "page": b"<html>Please log in</html>"}.get(kind, body)
            time.sleep(0.2 if kind == "slow" else 0)
            if kind not in raw:
                self.send_response(302 if kind in moved else 404 if kind == "missing" else 200)
                self.send_header("Location", moved.get(kind, ""))
                if kind.startswith("announced"):
                    self.send_header("X-Linked-Etag", f'"{hashlib.sha256(body).hexdigest()}"')
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
            self.wfile.write(raw.get(kind) or (data[:-10] if kind == "short" else data))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_scripts_downloads():
    """Downloads are checked before they count: whatever a server does, it is one line, and leaves nothing behind."""
    body = b"text " * 1000
    right = hashlib.sha256(body).hexdigest()

    def fetch(script, url, checksum, path):         # -> the path, or what went wrong
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                return script.download(url, checksum, path)
        except SystemExit as stop:
            assert stop.code == 2 and "Traceback" not in stderr.getvalue()
            TALLY["bad inputs tried"] += 1
            return stderr.getvalue().splitlines()[-1]

    with misbehaving_server(body) as address, temporary_folder() as folder:
        for script, checksum in zip(SCRIPTS, (right, right, f"sha256:{right}")):
            assert "http://" not in pathlib.Path(script.__file__).read_text(), "all is fetched by https"
            for kind in ("good", "slow", "moved"):
                path = fetch(script, address + kind, checksum, folder / "deep/er/file")
                assert path.read_bytes() == body
                path.unlink()
            for kind, words in (("wrong page login", "did not give"), ("short", "did not give|broke off"),
                                ("chunked garbage length loop", "cannot download"), ("missing", "Not Found")):
                for kind in kind.split():
                    line = fetch(script, address + kind, checksum, folder / "deep/er/file")
                    assert re.search(f"({words}).*Fetch it by hand and put it at {folder}/deep/er/file", line), line
                    assert not os.listdir(folder / "deep/er"), f"{script.__name__}: {kind} left something behind"
            (folder / "file").write_text("an older download")
            assert "delete it" in fetch(script, address + "good", checksum, folder / "file")
            assert (folder / "file").read_text() == "an older download"
            for path in (folder / "file/x", folder):            # no place for it
                assert "by hand" in fetch(script, address + "good", checksum, path)
        # where the sha256 is the one that the Hugging Face hub announces
        assert fetch(nanogpt_train, address + "announced", None, folder / "hub").read_bytes() == body
        for kind in ("announced%20wrongly", "login", "page", "good"):
            assert "did not give" in fetch(nanogpt_train, address + kind, None, folder / "other"), kind
        assert sorted(os.listdir(folder)) == ["deep", "file", "hub"]


# ======================================================================================================================
# Models
# ======================================================================================================================


def torchs_layer(heads, norm1, qkv, out, norm2, up, down):
    """The half-blocks of a transformer as torch's own layer, in float64: gains are multiplied into its weights."""
    layer = nn.TransformerEncoderLayer(up.in_features, heads, up.out_features, 0.0, F.gelu, batch_first=True,
                                       norm_first=True, dtype=torch.float64)
    names = {"self_attn.in_proj_": qkv, "self_attn.out_proj.": out, "linear1.": up, "linear2.": down}
    state = {f"norm{i}.{key}": x for i, norm in ((1, norm1), (2, norm2)) for key, x in norm.state_dict().items()}
    for name, linear in names.items():
        state |= {f"{name}weight": linear.gain[:, None] * linear.weight, f"{name}bias": linear.bias}
    layer.load_state_dict(state)
    return layer.train()                            # in eval() torch takes another path


def test_scripts_sizes():
    """Models have as many parameters as published, or as a formula counts. The formula behind MFU gives what torch
    counts in a forward and backward pass. Under bfloat16 a CPU computes attention in float32."""
    C, D, s = 768, 192, settled(translate_train, "--preset iwslt")
    resnet20 = (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64) * 9          # 3x3 filters
    resnet20 += 16 * 32 + 32 * 64 + 2 * (7 * 16 + 7 * 32 + 7 * 64) + 64 * 10 + 10       # projections, norms, head
    vit = 48 * D + D + 65 * D + 12 * (12 * D**2 + 13 * D) + 2 * D + 10 * D + 10         # DeiT-tiny, for 4x4 patches
    with torch.device("meta"):
        models = [(cifar_train.make_model(settled(cifar_train, f"--model {name} --width_mult 1"), 10), size)
                  for name, size in (("resnet20", resnet20), ("vit", vit), ("resnet18", 11.17e6), ("resnet34", 21.28e6),
                                     ("resnet50", 23.52e6), ("vgg16", 14.72e6))]
        models += [(nanogpt_train.GPT(50304, 12, 12, C, 1024, 0.0, True, False),        # Radford et al. 2019, tied head
                    50304 * C + 1024 * C + 12 * (12 * C**2 + 13 * C) + 2 * C),          # and as fairseq reports it, at
                   (translate_train.Translator((8848 + 6632) // 2, 0, s.n_layer, s.n_head, s.n_embd, s.n_ffn, s.norm, 0,
                                               True, False), 39_469_056)]               # its two vocabularies
    for model, size in models:
        found = sum(p.numel() for p in model.parameters())
        assert abs(found - size) <= (0.01e6 if isinstance(size, float) else 0), f"{type(model)}: {found}, not {size}"

    from torch.utils.flop_counter import FlopCounterMode
    for arch in (nanogpt_train.GPT(11, 3, 2, 8, 16, 0.0, True, True), nanogpt_train.ModularGPT(11, 3, 2, 8, 16, 0.0)):
        x, math_only = torch.zeros(5, 16, dtype=torch.long), torch.nn.attention.SDPBackend.MATH
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(math_only):
            arch(x, x).backward()
        assert nanogpt_train.flops_per_token(arch, 3, 8, 16) * x.numel() == counter.get_total_flops(), type(arch)
    q, k, v = (normal(i, 2, 3, 20, 8, dtype=torch.bfloat16) for i in range(3))
    Q, K, V = (x.double() for x in (q, k, v))
    exact = (Q @ K.mT / math.sqrt(8)).masked_fill(torch.ones(20, 20).triu(1).bool(), -math.inf).softmax(-1) @ V
    for script in SCRIPTS:
        with torch.autocast("cpu", torch.bfloat16):
            close(script.attend(q, k, v, is_causal=True), exact, 1e-5, script.__name__)


def test_nanogpt_models():
    """GPT equals torch's own layers and starts as GPT-2 does; each loss is that of predictions from prefixes; dropout
    is where it should be; a gain of 1 changes nothing, one of 3 triples its neuron."""
    torch.manual_seed(0)
    V, L, H, C, T = 11, 3, 2, 8, 5
    model = nanogpt_train.GPT(V, L, H, C, T + 1, 0.4, True, True).double().eval()
    for p in model.parameters():
        nn.init.normal_(p)                          # so that no part is too small to matter
    x, y = torch.randint(V, (2, 4, T))
    h = model.tokens.weight[x] + model.positions.weight[:T]
    for b in model.blocks:
        layer = torchs_layer(H, b.norm1, b.attention.qkv, b.attention.out, b.norm2, b.up, b.down)
        h = layer(h, nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64), is_causal=True)
    logits = F.layer_norm(h, (C,), model.norm.weight, model.norm.bias) @ (model.head.gain * model.tokens.weight.T)
    close(model(x), logits[:, -1], 1e-9, "logits of the last token, without dropout")
    close(model(x, y), (logits.logsumexp(-1) - logits.gather(-1, y[..., None])[..., 0]).mean(), 1e-9, "loss")
    for other in (model.train(), nanogpt_train.ModularGPT(V, L, H, C, T, 0.4)):
        dropped, in_attention = [], []
        for module in other.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda module, args, out: dropped.append(out.eq(0).double().mean().item()))
        with unittest.mock.patch.object(nanogpt_train, "attend", lambda q, k, v, **how: in_attention.append(how) or v):
            other(x, y)
        assert len(dropped) == 1 + 2 * L and 0.2 < np.mean(dropped) < 0.6, "after embeddings, attention and MLP: 0.4"
        assert all(how["is_causal"] for how in in_attention) and len(in_attention) == L
    for model in (model.eval(), nanogpt_train.ModularGPT(V, L, H, C, T, 0.4).double().eval()):
        apart = [F.cross_entropy(model(x[:, :t + 1]), y[:, t]) for t in range(T)]
        close(model(x, y), torch.stack(apart).mean(), 1e-9, f"{type(model).__name__}: loss from prefixes")
    model = nanogpt_train.GPT(500, 8, 2, 48, 64, 0.0, True, False)
    for name, p in model.named_parameters():        # 0.02 at width 768: 0.08 at a sixteenth; 2 x 8 terms are added up
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
    def conv(h, layer, stride=1):
        return F.conv2d(h, layer.weight, stride=stride, padding=layer.weight.shape[-1] // 2)

    def norm(h):
        return (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()

    if name == "vgg16":
        h = x
        for i, layer in enumerate(m for m in model.features if isinstance(m, nn.Conv2d)):
            h = norm(conv(h, layer)).clamp(min=0)
            h = F.max_pool2d(h, 2) if i in (1, 3, 6, 9, 12) else h
    else:
        h, blocks = norm(conv(x, model.conv)).clamp(min=0), iter(model.blocks)
        for stage, count in enumerate({"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}[name]):
            for i in range(count):
                block, stride, f = next(blocks), 2 if stage and not i else 1, h
                for k, layer in enumerate(block.convs):
                    f = norm(conv(f.clamp(min=0) if k else f, layer, stride if k == len(block.convs) - 2 else 1))
                if f.shape != h.shape:
                    h = norm(conv(h, block.projection[0], stride))
                h = (h + f).clamp(min=0)
    return h.mean((2, 3)) @ model.head.weight.T + model.head.bias


def test_cifar_models():
    """ResNets, VGG-16 and the modular paper's networks equal their layers written out, ViT torch's own layers; all
    start as published; losses and normalisations equal sums written out."""
    torch.manual_seed(0)
    x = normal(2, 3, 3, 32, 32)

    def make(*flags):
        return cifar_train.make_model(settled(cifar_train, *flags), 10)
    for name in ("resnet18", "resnet50", "vgg16"):
        model = make(f"--model {name} --width 4").double()
        close(model(x), convolutional_by_hand(model, x, name), 1e-7, name)
    for name, L in (("resmlp", 1), ("resmlp", 3), ("rescnn", 2)):
        model = make(f"--model {name} --width 8 --depth {L}").double()
        weights = [model.first.weight, *(layer.weight for pair in model.blocks for layer in pair), model.head.weight]
        apply = (lambda w, h: h @ w.T) if name == "resmlp" else (lambda w, h: F.conv2d(h, w, padding=1))
        for i, image in enumerate(x):
            h = apply(weights[0], image.flatten() if name == "resmlp" else image)
            for k in range(L):
                f = h
                for w in weights[1 + 2 * k:3 + 2 * k]:
                    f = apply(w, f / f.square().mean().sqrt()).abs()
                    f = f - f.mean()
                h = (1 - 1 / L) * h + f / L
            close(model(x)[i], weights[-1] @ (h if name == "resmlp" else h.mean((1, 2))), 1e-9, f"{name} of {L} blocks")
        for w in weights:                           # singular values sqrt(out / in), per kernel position over k^2
            for matrix in w[None] if w.dim() == 2 else w.flatten(2).permute(2, 0, 1):
                by_hand = np.full(min(matrix.shape), math.sqrt(w.shape[0] / w.shape[1]) / (1 if w.dim() == 2 else 9))
                close(torch.linalg.svdvals(matrix), by_hand, 1e-6, f"{name}: {tuple(w.shape)}")
    model = make("--model vit --width 128 --depth 2 --gains 1").double()
    for name, p in model.named_parameters():
        if name.startswith(("blocks", "head", "positions")) and not name.endswith("gain"):
            expected = 0.02 if p.dim() == 2 else 0.0
            close(p.std(correction=0), expected, 0.08, f"vit's {name}", scale=0.02)
        nn.init.normal_(p, std=0.3)
    patches = torch.stack([model.patches.weight.flatten(1) @ x[:, :, i:i + 4, j:j + 4].flatten(1).T
                           for i in range(0, 32, 4) for j in range(0, 32, 4)]).permute(2, 0, 1) + model.patches.bias
    h = torch.cat([torch.zeros(3, 1, 128), patches], 1) + model.positions.weight
    for b in model.blocks:
        h = torchs_layer(2, b.norm1, b.qkv, b.out, b.norm2, b.up, b.down)(h)
    last = F.layer_norm(h[:, 0], (128,), model.norm.weight, model.norm.bias)
    close(model(x), last @ (model.head.gain[:, None] * model.head.weight).T + model.head.bias, 1e-9, "vit")

    model = make("--model resnet18 --width 4 --weight_standardization 1").double()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            rows = layer.weight.detach().flatten(1).numpy()
            standard = np.stack([(row - row.mean()) / (row.std() + 1e-5) / np.sqrt(row.size) for row in rows])
            h = normal(1, 2, layer.in_channels, 6, 6)
            by_hand = F.conv2d(h, torch.from_numpy(standard).view_as(layer.weight), None, layer.stride, layer.padding)
            close(layer(h), by_hand, 1e-12, "standardised")
    h = normal(3, 2, 48, 5, 5)
    for name, count in (("group", 16), ("layer", 1)):
        groups = [(g - g.mean((1, 2, 3), keepdim=True)) / (g.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
                  for g in h.split(48 // count, dim=1)]
        close(cifar_train.NORMS[name](48).double()(h), torch.cat(groups, 1), 1e-9, f"{name} norm")
    assert cifar_train.NORMS["none"](48)(h) is h
    kinds = [type(make("--model resnet20 --norm", norm).norm) for norm in cifar_train.NORMS]
    assert kinds == [nn.BatchNorm2d, nn.GroupNorm, nn.GroupNorm, nn.Identity]
    first = make("--model resnet20 --width 16").blocks[3].convs[0].weight        # from 16 to 32 channels
    close(first.std(), math.sqrt(2 / (9 * 32)), 0.05, "He's deviation by fan-out")
    sizes = torch.linalg.svdvals(make("--model resnet20 --width 4 --opt modular_adam").blocks[3].convs[0].weight
                                 .permute(2, 3, 0, 1))
    close(sizes, torch.full_like(sizes, math.sqrt(2) / 9), 1e-5, "modular optimizers begin with weights of their size")
    logits, y = normal(0, 5, 4), torch.tensor([3, 0, 1, 1, 2])
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    pairs = [(i, k, logits[i, k].item(), k == y[i]) for i in range(5) for k in range(4)]
    for kind, by_hand in (("ce", -np.mean([0.8 * np.log(p[i, y[i]]) + 0.2 * np.log(p[i]).mean() for i in range(5)])),
                          ("mse", np.mean([(z - 2.0 * right) ** 2 for _, _, z, right in pairs])),      # sqrt(4)
                          ("mse30", np.mean([(1 + 14 * right) * (z - 30 * right) ** 2 for _, _, z, right in pairs]))):
        close(cifar_train.loss_of(logits, y, kind, 0.2 if kind == "ce" else 0.0), by_hand, 1e-6, kind)


def test_cifar_every_optimizer():
    """Every optimizer takes a step with its tuned defaults, and every matrix and filter moves."""
    x, y = normal(0, 4, 3, 32, 32, dtype=torch.float32), torch.tensor([0, 1, 2, 3])
    few = ("adamw", "rotational_lion", "modular_adam", "if_shampoo")
    for kind, name in itertools.product(cifar_train.MODELS, optim.OPTIMIZERS):
        if kind not in ("resnet20", "vit", "resmlp") and name not in few:
            continue
        depth = "--depth 1" if kind in ("vit", "resmlp", "rescnn") else ""
        s = settled(cifar_train, f"--model {kind} --width 4 --opt {name} --batch_size 4", depth)
        torch.manual_seed(0)
        model = cifar_train.make_model(s, 10)
        optimizer, before = cifar_train.make_optimizer(s, model), values(model.parameters())
        cifar_train.loss_of(model(x), y, "ce").backward()
        optimizer.step()
        for (n, p), start in zip(model.named_parameters(), before):
            assert p.isfinite().all(), f"{name} on {kind}: {n} is not finite"
            stays = p.dim() < 2 or n == "head.weight" and "rotational" in name      # one sign in all of a centred row
            assert stays or not torch.equal(p, start), f"{name} on {kind}: {n} did not move"


def test_scripts_modular_trees():
    """Shares of every weight equal closed forms, for every depth, one block included; every tree holds each weight of
    its model once."""
    def make(*flags):
        return cifar_train.make_model(settled(cifar_train, *flags), 10)

    def shares_of(model):
        return {leaf.layer: share for leaf, _, share in model.modular_tree().weights()}
    for (name, mass), L in itertools.product((("resmlp", 1), ("rescnn", 20)), (1, 2, 5)):
        model, T = make(f"--model {name} --width 6 --depth {L}"), 2 + mass
        expected = {model.first: 1 / T, model.head: 1 / T,
                    **{layer: mass / (2 * T) for pair in model.blocks for layer in pair}}
        found = shares_of(model)
        close([found[layer] for layer in expected], list(expected.values()), 1e-12, f"{name} of {L} blocks")
        close(model.modular_tree().sensitivity, 1, 1e-12, f"{name} of {L} blocks: sensitivity")
    half = math.sqrt(0.5)                           # the sensitivity of relu and gelu, where it counts
    for name, total, in_blocks, before_head, stem_feels in (
            ("resnet18", 22, 20 / 19, half, half * ((1 + half) * half) ** 8), ("vgg16", 22, 20 / 12, 1, 1),
            ("resnet50", 22, 20 / 52, half, half * ((1 + half**2) * half) ** 16),
            ("vit", 7, 5 / 16, 1 / 9, math.prod([(k + (3 if k % 2 else half)) / (k + 1) for k in range(1, 9)]))):
        model = make(f"--model {name} --width 4", "--depth 4" if name == "vit" else "")    # 8 steps, the last one 1/9
        found, convs = shares_of(model), [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        last = model.blocks[-1].down if name == "vit" else convs[-1] if name == "vgg16" else model.blocks[-1].convs[-1]
        first_mass = 0.5 if name == "vit" else 1    # patches and positions share theirs
        close([found[model.head], found[last], found[convs[0]]],
              [1 / total, in_blocks / total / before_head, first_mass / total / stem_feels], 1e-12, name)
        if name == "vit":                           # its attention is the step before: it feels the last step
            close(found[model.blocks[-1].qkv], 5 / 16 / 7 * 8 / ((8 + half) / 9) / 3, 1e-12, "vit's attention")
    for norm in ("pre", "post"):                    # masses 5, 5, 1, 1
        model = small_translator(norm=norm, modular=True)
        shares = {}
        for group in optim.build("modular_adam", model).param_groups:
            shares |= {name: group["share"] for name, p in zip(group["param_names"], group["params"]) if p.dim() > 1}
        assert shares.keys() == {name for name, p in model.named_parameters() if p.dim() > 1}
        # a decoder layer is 3 parts that keep 5/6 and add 1/6: of sensitivity 1, 1 and, as relu's is, 1/sqrt(2)
        layer, expected = 5 / 6 + 1 / 6 * half, {"target": 1 / 12}      # the tied head
        for i, after in ((0, layer), (1, 1.0)):
            down = 5 / 2 / (4 + 4 + 2) / 12 / (1 / 6) / after           # 5 for two layers, of 10 matrices each
            expected |= {f"decoder.{i}.ffn.down": down, f"decoder.{i}.ffn.up": down / half,
                         f"decoder.{i}.cross.out": down / layer, f"decoder.{i}.cross.v": 3 * down / layer}
        expected["source"] = 1 / 12 / layer**2 / (3 / 4 + 1 / 4 * half) ** 2
        close([shares[f"{name}.weight"] for name in expected], list(expected.values()), 1e-9, norm)
    for model in [make(f"--model {name} --width 4") for name in cifar_train.MODELS] + [
            nanogpt_train.ModularGPT(11, 3, 2, 8, 16, 0.0), small_translator(modular=True)]:
        found = [id(leaf.layer.weight) for leaf, _, _ in model.modular_tree().weights()]
        assert sorted(found) == sorted(id(p) for p in model.parameters() if p.dim() > 1), type(model)


def test_translate_model():
    """The network is torch's own layers in float64, between tied embeddings and positions by the formula; its weights
    start as Glorot says; with dropout 1 nothing of the text is left; no token sees a later one; padding changes
    nothing; the loss is the mean over the tokens that are no padding, smoothing gives every token its part."""
    C, source, target = 16, torch.tensor([[0, 3, 5, 1], [2, 4, 6, 6]]), torch.tensor([[7, 1, 2], [7, 5, 6]])
    angle = np.arange(4)[:, None] / 10000 ** (np.arange(C // 2) / (C // 2 - 1))
    where = torch.from_numpy(np.hstack([np.sin(angle), np.cos(angle)]))
    close(translate_train.positions(1, 3, C, "cpu").double(), where[1:], 1e-6, "positions")
    for norm in ("pre", "post"):
        model = small_translator(norm=norm).double()
        how = dict(d_model=C, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True, norm_first=norm == "pre",
                   dtype=torch.float64)

        def torchs(kind, layer):
            twin = kind(**how)
            pairs = [(twin.linear1, layer.ffn.up), (twin.linear2, layer.ffn.down)]
            for to, of in zip((twin.self_attn, getattr(twin, "multihead_attn", None)),
                              (layer.attention, getattr(layer, "cross", None))):
                if to is not None:
                    to.in_proj_weight.data = torch.cat([x.weight for x in (of.q, of.k, of.v)])
                    to.in_proj_bias.data = torch.cat([x.bias for x in (of.q, of.k, of.v)])
                    pairs.append((to.out_proj, of.out))
            pairs += [(getattr(twin, f"norm{i + 1}"), part.norm) for i, part in enumerate(layer.sums)]
            for to, of in pairs:
                to.load_state_dict(of.state_dict())
            return twin
        h = model.source.weight[source] * C**0.5 + where
        for layer in model.encoder:
            h = torchs(nn.TransformerEncoderLayer, layer)(h, src_key_padding_mask=source == 6)
        memory, h = model.encoder_norm(h), model.target.weight[target] * C**0.5 + where[:3]
        for layer in model.decoder:
            h = torchs(nn.TransformerDecoderLayer, layer)(h, memory, tgt_mask=torch.ones(3, 3).triu(1).bool(),
                                                          memory_key_padding_mask=source == 6)
        assert isinstance(model.decoder_norm, nn.LayerNorm) == (norm == "pre")
        logits = model.decoder_norm(h) @ model.target.weight.T
        with unittest.mock.patch.object(translate_train, "positions", lambda _, count, *others: where[:count]):
            close(model(source, target), logits, 1e-9, norm)            # the script's positions are float32
            logp, y = logits.log_softmax(-1), torch.tensor([[0, 1, 8], [3, 8, 6]])
            rows = [(logp[i, t], y[i, t]) for i in range(2) for t in range(3) if y[i, t] != 6]
            for smoothing in (0.0, 0.1):
                by_hand = -np.mean([((1 - smoothing) * row[k] + smoothing * row.mean()).item() for row, k in rows])
                close(translate_train.loss_of(model, 6, source, target, y, smoothing), by_hand, 1e-9, "loss")
        with torch.no_grad():
            logits = model(source, target)
            padded = model(F.pad(source, (0, 4), value=6), F.pad(target, (0, 2), value=6))
            close(padded[:, :3], logits, 1e-5, "padding")
            changed = model(source, torch.tensor([[7, 1, 3], [7, 5, 1]]))
            assert (changed == logits).all(2).all(0).tolist() == [True, True, False], "a token sees a later one"
            other = model(torch.tensor([[0, 3, 5, 2], [2, 5, 6, 6]]), target)
            assert not (other == logits).any(), "deaf for the source"
        model = small_translator(norm=norm, dropout=1.0).train()
        h = torch.zeros(C)
        for layer in model.decoder if norm == "post" else ():
            for part in layer.sums:
                h = part.norm(h)
        close(model(source, target), (model.decoder_norm(h) @ model.target.weight.T).expand(2, 3, -1), 1e-5, norm)
    model = translate_train.Translator(999, 0, 1, 2, 64, 192, "post", 0.0, True, False)
    for name, rms in (("source", 1 / 8), ("target", 1 / 8), ("encoder.0.attention.q", 128**-0.5),
                      ("decoder.0.cross.v", 128**-0.5), ("decoder.0.cross.out", 64**-0.5),
                      ("decoder.0.ffn.up", 128**-0.5)):
        assert abs(model.get_submodule(name).weight.square().mean().sqrt().item() / rms - 1) < 0.05, name
    for flags, rows in (("", 1), ("--opt modular_adam", math.sqrt(128))):
        model = translate_train.make_model(settled(translate_train, flags), translate_train.BytePairs([]))
        close(model.source.weight.norm(dim=1).mean(), rows, 0.02, "rows of a modular network have norm sqrt(C)")


@torch.no_grad()
def test_translate_beam_search():
    """Batched beam search with its cache equals a slow one; with a beam as large as the tree, exhaustive search."""
    lengths, found = [7, 3, 5, 1], set()
    for norm, seed in itertools.product(("pre", "post"), range(2)):
        model = small_translator(norm=norm, seed=seed)
        source = torch.full((4, 7), model.pad)
        for row, length in zip(source, lengths):
            row[:length] = torch.randint(6, (length,))
        for beam, penalty in ((1, 1.0), (3, 0.0), (4, 1.0), (5, 0.6)):
            ours = translate_train.beam_search(model, source, 7, 8, beam, penalty)
            slow = [slow_beam_search(model, source[i:i + 1, :length], 7, 8, beam, penalty)
                    for i, length in enumerate(lengths)]
            assert ours == slow, (norm, seed, beam, penalty, ours, slow)
            found |= set(map(len, slow))
    assert len(found) > 3, "sentences of hardly any lengths: this says little"
    for seed in range(3):
        model, source, scores = small_translator(n_vocab=4, seed=seed), torch.zeros(1, 3, dtype=torch.long), {}
        for said in itertools.chain(*(itertools.product((0, 1, 2), repeat=length) for length in range(4))):
            logp = model(source, torch.tensor([[2, *said]]))[0].double().log_softmax(dim=1)
            scores[said] = sum(logp[i, token].item() for i, token in enumerate([*said, 3])) / (len(said) + 1) ** 0.8
        best = [list(max(scores, key=scores.get))]
        assert translate_train.beam_search(model, source, 2, 3, 4**4, 0.8, (0, 4)) == best, seed


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


# ======================================================================================================================
# sweep.py
# ======================================================================================================================

# A training script in miniature: the same flags, files, lock and exit statuses as the real ones, but it starts at once.
# Its loss is a recurrence over the steps, so that one that is lost or done twice shows. `starts` counts its starts.
TOY = '''
import argparse, fcntl, json, math, os, pathlib, signal, sys, time
p = argparse.ArgumentParser()
p.add_argument("--lr", type=float, default=0.01)
p.add_argument("--weight_decay", type=float, default=0.0)
p.add_argument("--seed", type=int, default=1)
p.add_argument("--steps", type=int, default=10)
p.add_argument("--betas", default="")
p.add_argument("--device"), p.add_argument("--out_dir"), p.add_argument("--resume", action="store_true")
a = p.parse_args()
out = pathlib.Path(a.out_dir)
out.mkdir(parents=True, exist_ok=True)
only_one = open(out / ".lock", "w")
try:
    fcntl.flock(only_one, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("another run is writing")
with open(out / "starts", "a") as file:
    file.write("x")
(out / "where").write_text(" ".join(os.environ.get(key, "-") for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")))
stop = []
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
s = vars(a) | {"step": 0, "x": 0.0}
if a.resume:
    s = json.loads((out / "ckpt.pt").read_text())
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
TOYS = "--script toy_train.py --jobs 2".split()


@contextlib.contextmanager
def folder_with_toy():
    with temporary_folder() as folder:
        (folder / "toy_train.py").write_text(TOY)
        yield folder


def toy_loss(lr, weight_decay=0.0, seed=1, steps=10):
    """What the toy should end with, worked out here."""
    x = 0.0
    for step in range(1, steps + 1):
        x = 0.9 * x + math.sin(step * lr + seed)
    return (math.log10(lr) + 2) ** 2 + weight_decay + 0.01 * x


def starts(folder):
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/starts")}


def toy_lab(folder, **changes):
    """A Lab whose runs are in folder/out."""
    args = dict(out_dir=folder / "out", jobs=2, metric=None, seeds=None, scale="cpu")
    return sweep.Lab(sweep.argparse.Namespace(**dict.fromkeys(
        ("retry", "keep_checkpoints", "experiment", "report", "print_commands")) | args | changes))


def imagined(loss, opt="x", log=(), metric="val_loss", **flags):
    """A sweep.Result with this loss (nan: diverged) and log."""
    run = sweep.Run.of("nanogpt_train.py", {"opt": opt} | flags)
    result = sweep.Result(run, pathlib.Path(run.name), "diverged" if math.isnan(loss) else "done", "", metric, loss)
    result.log = lambda: log
    return result


class ImaginedLab:
    """Gives the experiments results that we make up: loss(flags) is the loss or accuracy, nan if it diverged, and
    log(flags) the lines of the log."""
    asked, out_dir = (), "imagined"
    args = sweep.argparse.Namespace(scale="cpu", seeds=None, print_commands=False)

    def __init__(self, loss, log=None):
        self.loss, self.log = loss, log or (lambda flags: [{"train_loss": loss(flags)}])

    def result(self, run):
        flags = dict(run.flags)
        metric = "val_loss" if run.script == "nanogpt_train.py" else "val_acc"
        return imagined(self.loss(flags), log=self.log(flags), metric=metric, **flags)

    def results(self, runs):
        return [self.result(run) for run in runs]


def write_run(home, records, **config):
    home.mkdir(parents=True)
    (home / "config.json").write_text(json.dumps(config))
    (home / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_sweep_values():
    """Ranges are numpy's; draws stay in their space, fill it evenly, repeat, and begin alike however many there are; a
    run's name and command do not depend on how its flags are written."""
    for text, expected in (("1e-4:1e-1:log7", np.geomspace(1e-4, 1e-1, 7)), ("0:1:lin5", np.linspace(0, 1, 5)),
                           ("0,1e-3:10:log5,70", [0, *np.geomspace(1e-3, 10, 5), 70])):
        assert np.allclose([float(x) for x in sweep.grid_values(text, "")], expected, rtol=1e-5, atol=0), text
    assert sweep.grid_values("(0.9,0.95),(0.9, 0.99),adamw,0.10", "") == ["(0.9,0.95)", "(0.9, 0.99)", "adamw", "0.1"]
    spaces = sweep.parse_space(["a=log(1e-4,1e-1)", "b=uniform(-1, 3) c=choice(x, y,1.50)"])
    draws = sweep.draws(spaces, 600, seed=3)
    assert draws == sweep.draws(spaces, 600, seed=3) and draws[:20] == sweep.draws(spaces, 20, seed=3)
    assert draws[:20] != sweep.draws(spaces, 20, seed=4) and draws[:20] != sweep.draws(spaces, 20, seed=3, stage=2)
    a, b = (np.sort([float(flags[key]) for flags in draws]) for key in "ab")
    quantiles = (np.arange(600) + 0.5) / 600        # the Kolmogorov-Smirnov distance: below 0.08 in all but 0.1 %
    assert np.abs(np.log10(a / 1e-4) / 3 - quantiles).max() < 0.08 and np.abs((b + 1) / 4 - quantiles).max() < 0.08
    assert np.abs(np.corrcoef([[math.log(float(f["a"])), float(f["b"])] for f in draws], rowvar=False)[0, 1]) < 0.15
    assert all(150 < sum(flags["c"] == c for flags in draws) < 250 for c in ("x", "y", "1.5"))
    assert sweep.Space("choice", ("a", "b", "c")).around(["c", "a", "c"]) == sweep.Space("choice", ("a", "c"))
    assert sweep.grid_flags("lr,weight_decay", "(1e-3,1),(0.1, 0.01)") == [
        {"lr": "0.001", "weight_decay": "1"}, {"lr": "0.1", "weight_decay": "0.01"}]
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
    with folder_with_toy() as folder:
        grid = "--grid lr=0.001,0.01,10,666 weight_decay,steps=(0,10),(0.5,10) --seeds 3 --fixed device=cpu".split()
        grid += ["--out_dir", "out"]
        run_script(sweep, folder, *TOYS, *grid, status=1)
        begun = starts(folder / "out")
        out, _ = run_script(sweep, folder, *TOYS, *grid, status=1)              # again: nothing left to do
        assert starts(folder / "out") == begun and set(begun.values()) == {1} and len(begun) == 24
        lines = out.splitlines()
        assert lines[0] == "24 runs of toy_train.py: 12 done, 6 diverged, 6 failed", lines[0]
        expected = sorted((np.mean(losses), np.std(losses, ddof=1), lr, decay) for lr in (0.001, 0.01)
                          for decay in (0, 0.5) for losses in [[toy_loss(lr, decay, seed) for seed in (1, 2, 3)]])
        for line, (mean, deviation, lr, decay) in zip(lines[3:7], expected, strict=True):
            assert line.split() == [f"{mean:.4f}", "+-", f"{deviation:.4f}", "3", f"{lr:g}", f"{decay:g}"], line
        assert all(re.fullmatch(r"  - +0 +(10|666) +0(\.5)? +3 (diverged|failed)", line) for line in lines[7:11]), out
        assert len([line for line in lines if "*" in line]) == 1 and f"{expected[0][0]:.4f}*" in lines[12], lines[11:14]
        assert sum(line.startswith("failed: lr 666") and "is evil" in line for line in lines) == 6
        assert sum(line.startswith("diverged: lr 10") and line.endswith("nan at step 3: training diverged")
                   for line in lines) == 6
        assert len(list((folder / "out").glob("*/ckpt.pt"))) == 0, "checkpoints of finished runs are to be deleted"
        (folder / "toy_train.py").write_text(TOY.replace('== 666', '== 667').replace('> 1 and', '== 10 and'))
        _, err = run_script(sweep, folder, *TOYS, *grid, "--print_commands", status=1)
        assert "12 done, 6 diverged, 6 failed" in err, err
        out, _ = run_script(sweep, folder, *TOYS, *grid, "--retry")
        assert "18 done, 6 diverged\n" in out and sorted(starts(folder / "out").values()) == [1] * 18 + [2] * 6, out


def test_sweep_counts_only_sound_results():
    """Of two runs, one better on the test set, one on the validation set, --metric says which comes first; the order is
    by each metric's own sign; a loss that is NaN has diverged, one that is no number failed; a copied folder is no
    further seed; half a run.json is mended; a log that cannot be read is not taken for none."""
    for metric, better, worse in (("bleu", 30, 20), ("test_acc", 0.9, 0.8), ("val_acc", 0.9, 0.8), ("val_loss", 1, 2)):
        results = [imagined(value, metric=metric, lr=value) for value in (worse, better)] + [imagined(math.nan, lr=0)]
        assert [s.mean for s in sweep.by_setting(results)][:2] == [better, worse], metric
    seeds = [imagined(1.0, lr=1, seed=1), imagined(math.nan, lr=1, seed=2), imagined(2.0, lr=2, seed=1)]
    assert [s.flags["lr"] for s in sweep.by_setting(seeds)] == ["2", "1"], "one of the better ones has diverged"
    with temporary_folder() as folder:
        for lr, last in {"1": dict(bleu=20, val_loss=0.5), "2": dict(bleu=10, val_loss=0.25), "4": dict(val_loss=None),
                         "3": dict(val_loss=math.nan), "5": dict(val_loss=0.75, final=False)}.items():
            run = sweep.Run.of("translate_train.py", {"lr": lr})
            write_run(folder / "out" / run.name, [{"val_loss": 0.1}, {"final": True} | last, {}][:2 + (lr == "5")])
            toy_lab(folder).note(run)
            if lr == "1":
                shutil.copytree(folder / "out" / run.name, folder / "out/copy")
                half = folder / "out" / run.name / "run.json"
        for flags, order in (((), "12"), (("--metric", "val_loss"), "21")):
            out, _ = run_script(sweep, folder, "--report", "--out_dir", "out", *flags, status=1)
            assert "5 runs of translate_train.py: 2 done, 1 diverged, 1 failed, 1 unfinished" in out, out
            assert "".join(line.split()[2] for line in out.splitlines()[3:5]) == order, out
        half.write_text('{"script": "transl')
        call_main(sweep, *"--script translate_train.py --fixed lr=1 --print_commands --out_dir".split(), folder / "out")
        assert json.loads(half.read_text())["flags"] == {"lr": "1"}
        if os.geteuid():                            # root may read everything
            (half.parent / "log.jsonl").chmod(0)
            run_script(sweep, folder, "--report", "--out_dir", "out", status=1)


def test_sweep_endings():
    """What came of a run, by its exit status: killed or stopped, it keeps its checkpoint and goes on; what diverged or
    is done needs none; what ended without a result begins anew; what failed keeps it for --retry."""
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
    for jobs, devices, most, where in ((None, ["3", "5"], 2, {"3 7", "5 7"}), (3, ["3", "5"], 3, {"3 7", "5 7"}),
                                       (1, ["3", "5"], 1, {"3 7"}), (2, [], 2, {"- 1"})):
        with folder_with_toy() as folder, unittest.mock.patch.object(sweep, "gpus", lambda: devices):
            lab, alive, start = toy_lab(folder, jobs=jobs), [], sweep.Lab.start

            def counted(lab, run, gpu):
                process = start(lab, run, gpu)
                alive.append([other for other in [*(alive[-1] if alive else ()), process] if other.poll() is None])
                return process
            with unittest.mock.patch.object(sweep.Lab, "start", counted), contextlib.redirect_stdout(io.StringIO()), \
                    contextlib.redirect_stderr(io.StringIO()), unittest.mock.patch.dict(os.environ):
                os.environ.pop("CUDA_VISIBLE_DEVICES", None)
                os.environ.update({"OMP_NUM_THREADS": "7"} if devices else {})
                os.environ.pop("" if devices else "OMP_NUM_THREADS", None)
                lab.results([sweep.Run.of(folder / "toy_train.py", {"seed": seed}) for seed in range(5)])
            assert max(map(len, alive)) == most, (jobs, devices)
            assert {path.read_text() for path in folder.glob("out/*/where")} == where, (jobs, devices)
    for visible, count, names in (("3,5,7", 2, ["3", "5"]), ("", 2, ["0", "1"]), ("", 0, [])):
        with unittest.mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=visible):
            with unittest.mock.patch("torch.cuda.device_count", lambda count=count: count):
                assert sweep.gpus() == names


def test_sweep_killed_at_any_moment():
    """Killed by SIGKILL ten times, a sweep gives the report of one never killed, and each run was started exactly once:
    the next sweep waits for the orphans of the last."""
    chance = random.Random(0)
    with folder_with_toy() as folder:
        grid = "--grid lr=0.001:1:log8 weight_decay=0,0.1,10 --fixed steps=20 device=cpu --out_dir".split()
        run_script(sweep, folder, *TOYS, *grid, "calm")
        for _ in range(10):
            before = starts(folder / "killed")
            process = start_script(sweep, folder, *TOYS, *grid, "killed")
            while starts(folder / "killed") == before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
            process.communicate()
        run_script(sweep, folder, *TOYS, *grid, "killed")
        assert set(starts(folder / "killed").values()) == {1} and len(starts(folder / "killed")) == 24
        reports = [run_script(sweep, folder, *TOYS, *grid, which, "--report")[0] for which in ("calm", "killed")]
        assert reports[0] == reports[1] and "24 done" in reports[0], reports
        one = "--fixed lr=0.1 steps=200 device=cpu --out_dir orphan".split()
        process = start_script(sweep, folder, *TOYS, *one)
        while not starts(folder / "orphan"):
            time.sleep(0.01)
        process.kill()
        process.communicate()
        _, err = run_script(sweep, folder, *TOYS, *one)
        assert "waiting for another sweep" in err and set(starts(folder / "orphan").values()) == {1}, err


def test_sweep_stops_on_signal():
    """The first SIGTERM ends the runs after they have saved, a second one kills those that do not listen; the same
    command resumes them and gives the same report."""
    for betas, signals in (("", 1), ("deaf", 2)):
        with folder_with_toy() as folder:
            grid = f"--grid lr=0.01,0.1 --fixed steps=60 device=cpu {'betas=' * bool(betas)}{betas} --out_dir".split()
            calm, _ = run_script(sweep, folder, *TOYS, *grid, "calm")
            process = start_script(sweep, folder, *TOYS, *grid, "out")
            while len(list((folder / "out").glob("*/ckpt.pt"))) < 2:
                time.sleep(0.02)
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 143 and "0 of 2 runs are finished" in out, (process.returncode, out, err)
            for path in (folder / "out").glob("*/ckpt.pt"):
                with open(path.parent / ".lock") as file:       # it would still be locked if the run were alive
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                assert json.loads(path.read_text())["step"] < 60
            resumed, _ = run_script(sweep, folder, *TOYS, *grid, "out")
            assert sorted(calm.splitlines()) == sorted(resumed.splitlines())


def test_sweep_printed_commands():
    """--print_commands | xargs sh -c, then --report, gives the table that the sweep itself gives; what diverged there
    is unfinished until the sweep finds out."""
    with folder_with_toy() as folder:
        grid = ["--grid", "lr=0.01,0.1,10", "betas=(0.9, 0.95),it's", "--fixed", "device=cpu", "--out_dir"]
        table, _ = run_script(sweep, folder, *TOYS, *grid, "whole")
        commands, err = run_script(sweep, folder, *TOYS, *grid, "parts", "--print_commands")
        assert len(commands.splitlines()) == 6 and "sweep.py" not in commands and not err
        assert not starts(folder / "parts")
        subprocess.run("tr '\\n' '\\0' | xargs -0 -P2 -I{} sh -c {}", shell=True, input=commands, text=True, cwd="/",
                       capture_output=True)
        parts, _ = run_script(sweep, folder, *TOYS, *grid, "parts", "--report", status=1)
        assert "4 done, 2 unfinished" in parts and set(starts(folder / "parts").values()) == {1}, parts
        again, _ = run_script(sweep, folder, *TOYS, *grid, "parts")
        assert again.splitlines()[-12:] == table.splitlines()[-12:] and "4 done, 2 diverged" in again, again
        assert run_script(sweep, folder, *TOYS, *grid, "parts", "--print_commands")[0] == ""


def test_sweep_two_stage():
    """The second stage draws from the smallest box around the best fifth of the first, and a restart draws the same."""
    with folder_with_toy() as folder:
        search = ["--two_stage", "--runs", "15", "--space", "lr=log(1e-4,1) weight_decay=uniform(0,1)", "--fixed",
                  "device=cpu steps=2", "--out_dir", "out", "--seed", "3"]
        first = sweep.draws(sweep.parse_space(["lr=log(1e-4,1) weight_decay=uniform(0,1)"]), 15, seed=3)
        run_script(sweep, folder, *TOYS, *search)
        begun = starts(folder / "out")
        rows = [json.loads(path.read_text())["flags"] for path in (folder / "out").glob("*/run.json")]
        rows = {(float(row["lr"]), float(row["weight_decay"])) for row in rows}
        stage1 = sorted(((float(f["lr"]), float(f["weight_decay"])) for f in first),
                        key=lambda row: toy_loss(*row, steps=2))
        stage2, best = np.array(list(rows - set(stage1))), np.array(stage1[:3])
        assert len(begun) == 30 and len(stage2) == 15
        assert (best.min(0) <= stage2).all() and (stage2 <= best.max(0)).all()
        run_script(sweep, folder, *TOYS, *search)
        assert starts(folder / "out") == begun


def test_sweep_bad_input():
    """Every bad argument: exit status 2 and one line that names it, and no run is started."""
    bad = """ | nothing to run
        --grid lr | KEY=VALUE
        --grid lr= | KEY=VALUE
        --grid --lr=1 | --grid
        --grid lr=1e-4:1e-1 | log8
        --grid lr=1:2:log1 | at least 2
        --grid lr=0:1:log3 | above 0
        --grid weight_decay=1:1e400:lin3 | from one number
        --grid lr=1,,2 | comma
        --grid lr=1 --grid lr=2 | twice
        --grid lr,weight_decay=(1,2) --grid lr=2 | twice
        --grid lr,weight_decay=(1,2),(3) | a value for each key
        --fixed lr,weight_decay=(1,2) | KEY=VALUE
        --grid lr=1 --fixed lr=1 | once
        --grid opt_kwargs.seed=1,2 --fixed opt_kwargs.seed=3 | twice
        --grid learning_rat=1 | neither a flag
        --grid out_dir=x | own folder
        --fixed opt_kwargs=damping=1 | as KEY=VALUE
        --grid lr=1 --random 3 | not allowed with
        --random 3 | --space
        --grid lr=1 --space lr=log(1,2) | --random
        --random 2 --space lr=log(0,2) | above 0
        --random 2 --space lr=uniform(2,1) | a larger one
        --random 2 --space lr=3 | log(a,b)
        --grid lr=1 --runs 10 | --two_stage
        --two_stage --runs 0 --space lr=log(1,2) | --runs 0
        --grid lr=1 --seed 1 | --random
        --grid lr=1 --seeds 2 --fixed seed=1 | --seeds
        --experiment warmpu | warmup
        --experiment warmup --grid lr=1 | --grid
        --experiment warmup --fixed lr=1 | --fixed
        --experiment warmup --print_commands --plot x.png | leave out --plot
        --curves x --jobs 2 | --jobs
        --curves no/such | no log.jsonl
        --grid lr=1 --scale gpu | --experiment
        --grid lr=1 --script nanogtp_train.py | no such file
        --grid lr=1 --script PYTHON | in Python
        --grid lr=1 --plot x.exe | .png
        --grid lr=1 --plot no/such/x.png | a folder that exists
        --report --out_dir no/such | no runs
        --grid lr=1 --print_commands --report | --report
        --grid lr=1 --jobs 0 | at least 1
        --grid lr=1 --lr 3 | unknown flag --lr
        --grid lr=1e-300:1e300:log3 weight_decay=-1e308:1e307:lin100000 --seeds 9 | million
        --grid lr=1 --out_dir EMPTY | --out_dir is empty
        --grid EMPTY | --grid is empty"""
    words_for = {"PYTHON": sys.executable, "EMPTY": ""}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for line in bad.split("\n"):
            arguments, words = line.rsplit(" | ", 1)
            check_refused(sweep, pathlib.Path(folder), [words_for.get(x, x) for x in arguments.split()], words)
        assert not os.listdir("."), "nothing should have been written"


def test_sweep_of_the_real_script():
    """Two GPTs, the sweep and its runs killed halfway: resumed, they end with the logs of the script run by itself."""
    with temporary_folder() as folder:
        tiny = dict(zip((word.strip("-") for word in TINY[::2]), TINY[1::2])) | {
            "steps": "300", "eval_every": "100", "save_every": "5", "device": "cpu"}
        fixed = " ".join(f"{key}={value}" for key, value in tiny.items())
        command = ["--jobs", "2", "--grid", "opt=if_shampoo riemannian_momentum=0.3,0.6", "--fixed", fixed, "--out_dir",
                   "out"]
        process = start_script(sweep, folder, *command)
        while len(list((folder / "out").glob("*/ckpt.pt"))) < 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 143
        process = start_script(sweep, folder, *command)
        flags = [word for key, value in tiny.items() for word in (f"--{key}", value)]
        flags += "--opt if_shampoo --opt_kwargs riemannian_momentum=0.6 --out_dir alone".split()
        run_script(nanogpt_train, folder, *flags)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        run = sweep.Run.of("nanogpt_train.py", tiny | {"opt": "if_shampoo", "riemannian_momentum": "0.6"})
        assert read_log(folder / "out" / run.name) == read_log(folder / "alone")
        assert f"{read_log(folder / 'alone')[-1]['val_loss']:.4f}" in out


def test_sweep_experiments_ask_for_runs_that_exist():
    """Every flag that a named experiment uses is known to its script, at both scales, and takes its values; --seeds
    shifts all seeds, and seed 0, which tunes, never decides."""
    kinds, lab = {}, ImaginedLab(None)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, scale in itertools.product(sweep.EXPERIMENTS.keys() - {"second_order"}, ("cpu", "gpu")):
            status, out, err = call_main(sweep, "--experiment", name, "--scale", scale, "--print_commands")
            assert status == 0 and out and not err, (name, err)
            for line in out.splitlines():
                words = shlex.split(line)[1:]
                if "--change" in words:
                    assert words[2].partition("=")[0] in sweep.CHANGES
                    words = words[3:]
                script, *flags = words
                kinds[script, re.sub(r"=[\d.e-]+( |$)", "", " ".join(flags[:-1]))] = flags
    assert len({script for script, _ in kinds}) == 2
    for (script, _), flags in kinds.items():
        script = importlib.import_module(pathlib.Path(script).stem)
        with unittest.mock.patch.object(script, "pick_device", lambda name: name):
            script.settle(script.parse(flags))
    with unittest.mock.patch.object(lab, "args", sweep.argparse.Namespace(scale="cpu", seeds=2)):
        assert sweep.model_run(lab, "gpt")["seed"] == "30" and sweep.model_run(lab, "gpt", 1, steps=7)["seed"] == "31"
    run = sweep.model_run(lab, "gpt", steps=7)
    assert (run["seed"], run["steps"], run["n_embd"]) == ("10", "7", "64"), "flags come before BASE's"


def test_sweep_changes():
    """What an experiment changes in a run: the first tenth of the neurons turns 3 times as far, or each matrix by its
    own factor; the measured radial part is torch's; RMSProp's average starts at 1/B. Through the command line, too."""
    def turned(change, value):
        with contextlib.ExitStack() as stack:
            for kind, name in ((optim.Rotational, "move"), (optim.Rotational, "by_row"), (optim.rmsprop, "start"),
                               (optim, "RotationProbe")):
                stack.enter_context(unittest.mock.patch.object(kind, name, getattr(kind, name)))
            sweep.CHANGES[change](optim, value)
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(8, 20), torch.nn.Linear(20, 5))
            optimizer = optim.build("rmsprop" if change == "start" else "rotational_adamw", model, lr=0.1,
                                    weight_decay=0.1)
            probe, before = optim.RotationProbe(optimizer), [layer.weight.detach().clone() for layer in model]
            model(torch.randn(4, 8)).square().sum().backward()
            probe.measure_next_step()
            optimizer.step()
            state = optimizer.state[model[0].weight]
            angles = [torch.acos(torch.cosine_similarity(old, layer.weight.detach(), dim=1))
                      for old, layer in zip(before, model)]
            return angles, probe.rows, before, [layer.weight.grad for layer in model], state
    even, *_ = turned("turn", "1")
    for value, factors in (("3", [[3] * 2 + [1] * 18, [3] + [1] * 4]), ("2,0.5", [[2] * 20, [0.5] * 5])):
        angles, *_ = turned("turn", value)
        for a, b, factor in zip(angles, even, factors):
            assert torch.allclose(a.tan(), b.tan() * torch.tensor(factor), rtol=0.02), value
    _, rows, before, grads, _ = turned("radial", "")
    for row, w, g in zip(rows, before, grads):
        assert abs(row["radial"] - ((w * g).sum(1) / w.norm(dim=1) / g.norm(dim=1)).mean().item()) < 1e-6
    _, _, (w, _), (g, _), state = turned("start", "16")
    assert torch.allclose(state["square_avg"], 0.99 / 16 + 0.01 * (g + 0.1 * w) ** 2)
    with temporary_folder() as folder:
        first = {}
        for change in ("radial", "turn=3"):
            run_script(sweep, folder, "--change", change, sweep.HERE / "nanogpt_train.py", *TINY, "--track", "1",
                       "--opt", "rotational_adamw", "--out_dir", change)
            first[change] = next(r["rotation"] for r in read_log(folder / change) if "rotation" in r)["blocks.0.up.weight"]
        assert "radial" in first["radial"] and first["turn=3"]["angle"] > 1.1 * first["radial"]["angle"]


def rotation_log(f):
    """Two hidden matrices of ten are off, or three, and gradients are radial where they are (or, for lr 9, nowhere);
    records with rotation alone stand between those with losses. Under balance the angles are as TURNING says."""
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


def test_sweep_verdicts():
    """The experiments say yes to numbers made up to agree with the claim, and no to others, for the right reason."""
    def by(key, numbers, default=0.0):              # a number for each value of a flag
        return lambda f: next((x for value, x in numbers.items() if value == f.get(key, "-")), default)

    def worse(opt, more, seed=None):
        return lambda f: 1.5 + (more if f["opt"].endswith(opt) and seed in (None, f.get("seed")) else 0)

    def needs(plain, turning):                      # how much the loss rises without warmup
        return lambda f: 1.5 + ((turning if f["opt"].startswith("rot") else plain) if f["warmup"] == "0" else 0)

    def transfer(size, smallest, modular=0.0, gain=0.1):        # the plain optimum falls with the size
        def loss(f):
            if size == "n_layer" and "depth" in f:
                return 1.5 - gain * math.log2(int(f["depth"])) * (1 if f["opt"].startswith("modular") else -1)
            falls = modular if f["opt"].startswith("modular") else 1
            ratio = smallest / int(f[size] if size in f else f["width"])
            return bowl(f, {"adam": 2**-6, "sgd": 2.0**-2}.get(f["opt"], 0.5) * ratio ** falls)
        return loss

    def balanced(adam, adamw, even, uneven):
        return lambda f: uneven if "change" in f else {"adam": adam, "adamw": adamw}.get(f["opt"], even)

    def roots(gpt, vgg):                            # of adamw, rmsprop, rmsprop from 1/B, rf_rmsprop
        return lambda f: (vgg if "model" in f else gpt)[
            2 if "change" in f else ["adamw", "rmsprop", "", "rf_rmsprop"].index(f["opt"])]

    def precise(*kinds):
        return lambda f: dict(zip(("bfloat16", "float32", "shampoo"), kinds))[
            "shampoo" if f["opt"] == "shampoo" else f.get("opt_kwargs.dtype", "float32")]
    uneven, alike = (needs(0.1, 0.16), needs(0.1, 0)), {"turn=0.333": 0.9, "turn=3": 0.9, "turn=1": 0.9}
    cases = [                                       # experiment, losses or accuracies, what is to be said of each check
        ("zero_shot", lambda f: bowl(f, 0.004) + 0.01 * f["opt"].startswith("rot"), "yyy"),
        ("zero_shot", worse("rotational_sgd", 0.03), "yny"), ("zero_shot", worse("rotational_sgd", 0.09, "13"), "yny"),
        ("zero_shot", worse("rotational_lion", math.nan), "yyn"),
        ("zero_shot", worse("lion", math.nan), "yyn"),          # if both diverge, neither is as good
        ("warmup", needs(0.1, 0.04), "yy"), ("warmup", needs(0.1, 0.06), "nn"), ("warmup", needs(0.01, 0), "nn"),
        ("warmup", needs(math.nan, 0), "yy"),
        ("warmup", lambda f: uneven[f["seed"] == "11"](f), "nn"),       # the mean over the seeds counts
        ("balance", balanced(0.76, 0.85, 0.89, 0.8), "yyyy"), ("balance", balanced(0.84, 0.85, 0.89, 0.8), "ynyy"),
        ("balance", balanced(0.76, 0.85, 0.82, 0.7), "yyny"), ("balance", balanced(0.76, 0.85, 0.89, 0.84), "yyyn"),
        ("balance", balanced(0.9, 0.85, 0.89, 0.8), "ynyn"), ("balance", balanced(0.76, math.nan, 0.89, 0.8), "ynyy"),
        ("imbalance", by("change", alike | {"turn=10": 0.8, "turn=0.1": 0.88}), "yyyy"),
        ("imbalance", by("change", alike | {"turn=10": 0.895, "turn=0.1": 0.88}), "nyyy"),
        ("imbalance", by("change", alike | {"turn=10": 0.8, "turn=0.1": 0.88, "turn=3": 0.92}), "yyny"),
        ("lr_against_decay", lambda f: 1.5 + abs(math.log10(float(f["lr"]) / 4e-3)) * (
            0.1 if f["opt"] == "adamw" else 0.04), "yy"),
        ("lr_against_decay", lambda f: bowl(f, 0.004), "yn"), ("lr_against_decay", lambda f: 1.5, "ny"),
        ("lr_transfer_width", transfer("n_embd", 32), "yyyy"),
        ("lr_transfer_width", lambda f: bowl(f, 2**-4), "nnnn"),        # no optimizer depends on the size
        ("lr_transfer_width", transfer("n_embd", 32, modular=1), "nnnn"),       # both do: more than 0.03
        ("lr_transfer_depth", transfer("n_layer", 2), "yyyy"),
        ("lr_transfer_depth", transfer("n_layer", 2, gain=0), "yynn"),
        ("root_free", roots((2.0, 2.2, 2.1, 2.02), (0.85, 0.73, 0.8, 0.84)), "yyyyyy"),
        ("root_free", roots((2.0, 2.02, 2.0, 2.04), (0.85, 0.83, 0.84, 0.82)), "nnnnnn"),
        ("root_free", roots((2.0, 2.2, 2.0, 2.02), (0.85, 0.73, 0.84, 0.84)), "yynyyy"),
        ("half_precision", precise(1.5, 1.49, 1.6), "yyyy"), ("half_precision", precise(1.5, 1.45, 1.6), "nyyy"),
        ("half_precision", precise(1.5, 1.6, 1.45), "ynyy"), ("half_precision", precise(1.5, math.nan, 1.6), "ynyy")]
    times = {sweep.HALF: (10, 1.0), sweep.FULL: (20, 2.0), sweep.SHAMPOO: (30, 3.0)}
    for name, loss, held in cases[:-1]:
        log = turning_log if name == "balance" else None
        with unittest.mock.patch.object(sweep, "step_times", lambda: (times, 0.5)):
            found = sweep.EXPERIMENTS[name](ImaginedLab(loss, log))
        assert "".join("ny"[bool(held)] for _, held in found.checks) == held, (name, held, found.checks)
        assert found.said.endswith(".") and found.text
    for product, kinds, held in ((0.5, (2.0, 0.9), "yyyn"), (0.5, (0.9, 2.0), "yyny"), (1.5, (0.9, 2.0), "yy")):
        slow = {sweep.HALF: (10, 1.0), sweep.FULL: (1, kinds[0]), sweep.SHAMPOO: (1, kinds[1])}
        with unittest.mock.patch.object(sweep, "step_times", lambda: (slow, product)):
            checks = sweep.half_precision(ImaginedLab(precise(1.5, 1.5, 1.5))).checks
        assert "".join("ny"[held] for _, held in checks) == held, (product, checks)     # without bfloat16: not compared

    for words, held in sweep.equilibrium(ImaginedLab(lambda f: 1.5, rotation_log)).checks:
        assert held != (("resnet, sgd: the angle" in words) or ("gpt, lion: the norm" in words)), words
    flat = [line | {"rotation": {name: row | {"radial": 0.001} for name, row in line["rotation"].items()}}
            for line in rotation_log({"opt": "adamw"}) if "rotation" in line]
    assert not sweep.equilibrium(ImaginedLab(lambda f: 1.5, lambda f: flat)).checks[-1][1], "nothing explains them"
    found = sweep.balance(ImaginedLab(balanced(0.76, 0.85, 0.89, 0.8), turning_log))
    assert "adam 4.00, adamw 2.00" in found.checks[0][0]
    asked = []
    lab = ImaginedLab(lambda f: asked.append(f.get("change")) or 0.8, turning_log)
    sweep.balance(lab)
    assert "turn=0.354,1.41,1.41,1.41,1" in asked, "each layer's angle over the geometric mean, the output's as it is"
    assert not sweep.balance(ImaginedLab(lambda f: 1.0, lambda f: turning_log(f | {"opt": "adamw"}))).checks[0][1]
    with unittest.mock.patch.object(optim.rf_rmsprop, "start", lambda self, w, h: {
            "momentum_buffer": torch.zeros_like(w), "square_avg": torch.full_like(w, 100.0)}):
        assert [held for _, held in sweep.second_order(ImaginedLab(None)).checks] == [False, True, False, True, False]

    found = sweep.zero_shot(ImaginedLab(lambda f: bowl(f, 0.004) + float(f["weight_decay"]) / 100))
    assert "at lr 0.004, weight_decay 0.03" in found.checks[0][0] and "decay is at the edge" in found.text
    for loss, words in ((1.5, "The claim held"), (1.53, "did not hold at this scale: 2 of 3")):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            sweep.experiment(ImaginedLab(worse("rotational_sgd", loss - 1.5)), "zero_shot", None)
        assert words in out.getvalue() and ("NO" in out.getvalue()) == (loss > 1.5), out.getvalue()
    with temporary_folder() as folder:              # with a run that failed, or is missing, nothing is said
        lab = toy_lab(folder, experiment="x", report=True)
        run = sweep.model_run(lab, "gpt")
        refused(sweep.Unfinished, [], lambda: lab.results([run]))
        write_run(folder / "out" / run.name, [])
        (folder / "out" / run.name / "failed.json").write_text('{"status": 1, "message": "words"}')
        with contextlib.redirect_stderr(io.StringIO()) as err:
            refused(SystemExit, ["1"], lambda: lab.results([run]))
        assert "words. Mend it" in err.getvalue()


def look_at(figure):
    """Fails where a reader of the picture would: texts in TeX, labels that overlap or leave the picture, a curve that
    leaves its axes, a legend on it, an axis without a name or with fewer than two ticks -> all texts."""
    def apart(texts):
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        return not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(lambda x: hasattr(x, "get_text") and x.get_visible()) if text.get_text()]
    for axes in figure.axes:
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            low, high = sorted(getattr(axes, f"get_{name}lim")())
            labels = {tick.label1: low <= tick.get_loc() <= high for tick in axis.get_major_ticks()}
            texts = [text for text in texts if labels.get(text, True)]          # ticks outside the limits are not drawn
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
    for part in figure.subfigs:
        for legend, axes in itertools.product(part.legends, figure.axes):
            assert not legend.get_window_extent().overlaps(axes.get_window_extent()), "the legend covers a curve"
    return [text.get_text() for text in texts]


def drawn(call):
    """The figure that `call` draws."""
    if not importlib.util.find_spec("matplotlib"):
        raise Skip("needs matplotlib")
    figures, curves = [], sweep.curves
    with temporary_folder() as folder, contextlib.redirect_stdout(io.StringIO()):
        with unittest.mock.patch.object(sweep, "curves", lambda *a: figures.append(curves(*a))):
            call(folder / "x.png")
        assert (folder / "x.png").stat().st_size > 5000
    return figures[0]


def test_sweep_pictures():
    """Every picture is fit to be seen: of all experiments, with claim and verdict in the title; of grids, draws
    and seeds, with the best marked, diverged seeds crossed, and a $ where somebody wrote one."""
    times = {sweep.HALF: (10, 1.0), sweep.FULL: (20, 2.0), sweep.SHAMPOO: (30, 3.0)}
    for name in sweep.EXPERIMENTS:
        lab = ImaginedLab(lambda f: math.nan if f["lr"] == "0.008" else bowl(f, 0.004), rotation_log)
        with unittest.mock.patch.object(sweep, "step_times", lambda: (times, 0.5)):
            texts = look_at(drawn(lambda path: sweep.experiment(lab, name, path)))
        assert any("at this scale" in text and "\n" in text for text in texts), (name, texts)
    failed = ["a seed diverged or failed"]
    for flags, seeds, lines in (
            (dict(lr=("1e-3", "1e-2", "0.1", "1"), weight_decay=("0", "0.1")), 2,
             ["weight_decay 0", "weight_decay 0.1"] + failed),
            (dict(opt=("sgd", "adamw", "rotational_rf_rmsprop")), 1, ["mean"]), (dict(opt=("adam",)), 3, ["mean"]),
            (dict(lr=[f"{10**-x:.4g}" for x in np.linspace(0, 4, 23)]), 2, ["mean"] + failed),
            (dict(betas=("$\\foo$", "$b", "(0.9, 0.99)"), n_layer=("1", "2"), lr=("1", "2", "3", "4")), 1, ["mean"])):
        settings = [dict(zip(flags, values)) for values in itertools.product(*flags.values())]
        results = [imagined(math.nan if i == 3 and seed == 1 else 1 + math.sin(i) + seed, **setting, seed=seed)
                   for i, setting in enumerate(settings) for seed in range(seeds)]
        panels = sweep.report_panels(results)
        texts = look_at(drawn(lambda path: sweep.curves("a title", panels, path)))
        assert len(panels) == (3 if "betas" in flags else 1) and ("betas" not in flags or "\\$\\foo\\$" in texts), texts
        best = min(results, key=lambda r: r.score) if len(settings) == 1 else sweep.by_setting(results)[0]
        for curves in panels.values():
            *labels, star = curves
            assert labels == lines and star.startswith("best") and curves[star].y[0] == best.score, (labels, star)
        if "weight_decay" in flags:
            (panel, curves), = panels.items()
            curve = curves["weight_decay 0"]
            assert curve.x == [0.001, 0.01, 0.1, 1] and panel.log == "x"
            assert np.allclose(curve.y, [1.5 + math.sin(i) for i in (0, 2, 4, 6)])
            assert np.allclose(np.subtract(curve.high, curve.y), math.sqrt(0.5))


def test_sweep_curves():
    """--curves: the table has the last value, the mean over seeds and what tells runs apart; records without a loss are
    passed over; a run that is not at its end is said to be so. The curves are numpy's means and deviations."""
    with temporary_folder() as folder:
        losses = {}
        for opt, seed in (("adamw", 1), ("adamw", 2), ("lion", 3)):
            losses[opt, seed] = [5.0 - 0.01 * k * min(seed, 4 - seed) - 1.5 * (opt == "lion") for k in (0, 100, 200)]
            records = [{"step": 0, "val_loss": losses[opt, seed][0], "seconds": 0.0}]
            for k in (1, 2):
                records += [{"step": 100 * k - 50, "lr": 1, "rotation": {
                    f"blocks.{i}.up.weight": {"angle": 0.1 * seed * k, "predicted_angle": None if seed == 3 else 0.2}
                    for i in (0, 1)}}, {"step": 100 * k, "val_loss": losses[opt, seed][k], "seconds": 3.0 * k * seed}]
            records[-1] |= {"final": True} if opt == "adamw" else {}
            home = folder / "sweep" / str(seed) if opt == "adamw" else folder / "lion"
            write_run(home, records, opt=opt, seed=seed, steps=200, out_dir=f"x{seed}{opt}", hyper={"lr": 0.1})
        found = sweep.load([folder / "sweep", folder / "lion"])
        assert {name: len(logs) for name, logs in found.items()} == {"adamw": 2, "lion": 1}
        steps, mean, low, high = sweep.over_seeds(found["adamw"], lambda record: record.get("val_loss"))
        both = np.array([losses["adamw", 1], losses["adamw", 2]])
        assert steps == [0, 100, 200] and np.allclose(mean, both.mean(0))
        assert np.allclose(np.subtract(high, mean), both.std(0, ddof=1)) and np.allclose(low, 2 * both.mean(0) - high)
        assert list(sweep.load([folder / "lion", folder / "lion"])) == [str(folder / "lion")]
        status, out, _ = call_main(sweep, "--curves", folder / "sweep", folder / "lion")
        rows = [line.split() for line in out.splitlines()[1:3]]
        assert status == 0 and rows == [["a", "1.5000", "lion", "200", "18.0", "1", "1", "not", "at", "the", "end"],
                                        ["b", f"{both.mean(0)[2]:.4f}", "adamw", "200", "9.0", "2"]], out
        assert re.search(r"3.5 \|b\n", out) and re.search(r"1.5 \| +a\n +100 +200 steps", out), out
        lines = sweep.angles(found["adamw"])
        assert {name: np.round(curve.y, 6).tolist() for name, curve in lines.items()} == {
            "up": [[0.15, 0.3]] * 2, "predicted": [[0.2, 0.2]] * 2} and list(sweep.angles(found["lion"])) == ["up"]
        figure = drawn(lambda path: call_main(sweep, "--curves", folder / "sweep", folder / "lion", "--plot", path))
        assert {"step", "seconds", "val_loss (nats)", "lion", "adamw", "up", "predicted"} <= set(look_at(figure))


# ======================================================================================================================
# Running them
# ======================================================================================================================


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
