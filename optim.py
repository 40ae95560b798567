"""
Run `python optim.py` first. The run takes half a minute, and shows that weight decay turns every neuron by a
predictable angle. Then read this file from top to bottom, as a lecture.

    direction   which way: what a gradient is turned into, from the history of gradients
    geometry    how far, and on which surface: how a direction becomes a change of a weight

Every optimizer here is one direction followed by one geometry. All of them share a loop of three lines:

    decay = geometry.decay(direction, w, h)        # plain: shrinks w at once, or returns wd * w for d
    d = direction.update(g, state, h, decay)       # which way
    geometry.move(w, d, state, h)                  # how far, on which surface

Learn the rows and the columns, and you know them all:

    direction                                     | plain                | rotational       | modular
    ----------------------------------------------+----------------------+------------------+------------
    sgd         heavy-ball momentum               | SGD                  | RotationalSGD    | ModularSGD
    adam        L2 inside the gradient            | Adam                 | RotationalAdam   | ModularAdam
    adamw       decoupled decay                   | AdamW                | RotationalAdamW  | (that is ModularAdam)
    lion        sign of an average                | Lion                 | RotationalLion   |
    rmsprop     gradient over its RMS             | RMSProp              |                  |
    rf_rmsprop  gradient over its mean square     | RootFreeRMSProp      |                  |
    rf_adamw    average over mean square          | RootFreeAdamW        |                  |
    muon        orthogonalised average            | Muon                 | RotationalMuon   | ModularMuon
    shampoo     L_i^(-1/(2k)) on every mode i     | Shampoo              |                  |
    if_shampoo  the same without roots, inverses  | InverseFreeShampoo   |                  |

The empty cells exist, too: "rotational_rmsprop", "modular_lion" and so on are names of OPTIMIZERS.

    plain        w <- w - lr * d, and decay pulls w towards 0. Nothing is kept fixed
    rotational   every neuron keeps its length, and turns by a set average angle. lr * wd sets the angle
    modular      the update of the whole network has the size lr, in a norm made from its architecture

Every class is a true subclass of torch.optim.Optimizer:

    import optim
    optimizer = optim.RotationalAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    optimizer = optim.build("rotational_lion", model, lr=1e-3, weight_decay=0.5)      # by name, with sensible groups

On the command line:

    python optim.py                                     the table, then random walks that show where decay leads
    python optim.py --plot walk.png                     the same, and a picture (needs matplotlib)
    python optim.py --walk adamw lr=0.01 weight_decay=0.2        one walk with values of your own
    python optim.py --bench adamw lion                  one step beside torch.optim.AdamW(fused=True); no name: all

Contents: 1 this map. 2 One step by hand. 3 sgd and the plain geometry. 4 adam, adamw, rmsprop, lion. 5 Why weight decay
is rotation. 6 The rotational geometry. 7 Without the root. 8 The modular norm. 9 Matrices. 10 The optimizer, and speed.
11 The named classes, build, table. 12 The probe, the lesson, the bench. Answers to the exercises stand at the end. For
a lecture of 90 minutes take 2, 3, 5, 6, 8. The end of section 9 says where direction and geometry do not separate.

    w      weight                g      gradient of the MEAN loss over the batch     d    direction
    lr     learning rate eta     wd     weight decay lambda                          t    step, 1, 2, 3, ...
    b1,b2  betas                 mu     momentum          a    alpha, RMSProp's beta (section 6: length of a step)
    m, v   running averages of g and of g^2 (heavy ball: m is a running sum)         C    weights in a neuron
    sigma  RMS size of one entry of g                                                n    kept norm of a neuron
    B      batch size: examples (or tokens) that the loss is a mean over             k    number of modes (dims)
    s      average of g^2 in the root-free rules     L, K   a matrix for each mode (shampoo, if_shampoo)
    S      sum of c_j^2 (c_j: section 5)             U S V^T   singular value decomposition (section 9)
    U      average of ||d||^2 (rotational)           u      an update (section 5), or vector of a power iteration (8)
    h      dict of a group's hyperparameters, and of numbers that depend on the step (from `scalars`)

A neuron is a row of a matrix, or a filter of a convolution: an index of dim 0 picks it, the other dims belong to it.

Papers:
  [RE]    Kosson, Messmer, Jaggi. Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks.
          ICML 2024, arXiv:2305.17212
  [MN]    Large, Liu, Huh, Bahng, Isola, Bernstein. Scalable Optimization in the Modular Norm. NeurIPS 2024,
          arXiv:2405.14813
  [RF]    Lin, Dangel, Eschenhagen, Bae, Turner, Makhzani. Can We Remove the Square-Root in Adaptive Gradient Methods? A
          Second-Order Perspective. ICML 2024, arXiv:2402.03496
  [Adam]  Kingma, Ba. Adam: A Method for Stochastic Optimization. ICLR 2015, arXiv:1412.6980
  [AdamW] Loshchilov, Hutter. Decoupled Weight Decay Regularization. ICLR 2019, arXiv:1711.05101
  [Lion]  Chen et al. Symbolic Discovery of Optimization Algorithms. NeurIPS 2023, arXiv:2302.06675
  [RMS]   Tieleman, Hinton. Lecture 6.5, RMSProp. Coursera, 2012
  [HB]    Polyak. Some methods of speeding up the convergence of iteration methods. 1964
  [Muon]  Jordan et al. Muon: An optimizer for hidden layers in neural networks. 2024, kellerjordan.github.io/posts/muon
  [Moon]  Liu et al. Muon is Scalable for LLM Training. 2025, arXiv:2502.16982
  [Old]   Bernstein, Newhouse. Old Optimizer, New Norm: An Anthology. 2024, arXiv:2409.20325
  [Shampoo] Gupta, Koren, Singer. Shampoo: Preconditioned Stochastic Tensor Optimization. ICML 2018, arXiv:1802.09568
"""
import argparse
import ast
import contextlib
import difflib
import fnmatch
import functools
import importlib.util
import inspect
import itertools
import math
import operator
import os
import re
import statistics
import sys
import time
import types
from dataclasses import dataclass, replace

import torch

# ======================================================================================================================
# 2. One step by hand
#
#     W = [3 4]    G = [1 0]    lr = 0.1    wd = 0.5    sgd's first step, momentum=0, nothing centred (zero_mean=False)
#         [1 0]        [0 2]
#
# plain        The decay joins the gradient: D = G + 0.5 W = [2.5 2.0]
#                                                            [0.5 2.0]
#              W <- W - 0.1 D = [2.75  3.80]
#                               [0.95 -0.20]
#
# rotational   D = G. The rows of W have norms 5 and 1, and keep them. The angle is sqrt(2 lr wd) = sqrt(0.1) = 0.3162.
#              Row 1: the part of (1, 0) along (3, 4) is (3*1 + 4*0) / 25 * (3, 4) = (0.36, 0.48).
#                     The tangent (0.64, -0.48) is left. It has length 0.8, and is rescaled to 0.3162 * 5 = 1.5811.
#                     (3, 4) - (1.2649, -0.9487) = (1.7351, 4.9487) has length sqrt(25 + 2.5), by Pythagoras.
#                     Put back to length 5: (1.6543, 4.7184).
#              Row 2: (0, 2) is a tangent already. (1, 0) - 0.3162 (0, 1), put back to length 1: (0.9535, -0.3015).
#              Both rows have turned by arctan(0.3162) = 0.3063 radians, though one gradient was twice the other.
#
# modular      D = G. Its exact spectral norm is 2. A 2 x 2 weight has usual norm sqrt(out / in) = 1 and share 1.
#              W <- W - 0.1 * G / 2 = [2.95  4.00]     then the decay, W <- (1 - 0.1 * 0.5) W = [2.8025  3.800]
#                                     [1.00 -0.10]                                             [0.9500 -0.095]
#              The code estimates the spectral norm by one power iteration a step, from below. The first estimate here
#              is 1.17, and from the fourth step on it is 2.00.
# ======================================================================================================================


# ======================================================================================================================
# 3. sgd and the plain geometry
#
# A direction is the mathematics for ONE tensor. It sees the gradient, its own running averages, and the decay that it
# is handed. It needs no learning rate, and it never changes g.
# ======================================================================================================================

DIRECTIONS = {}


def row(direction):
    """Class decorator: enter a direction into the table, under the name of its class."""
    DIRECTIONS[direction.__name__] = direction()
    return direction


class Direction:
    """One row of the table. Classes of rows are named as on the command line.

    To add a row, write one class with `@row` above it, anywhere before section 10. `lion` below is a good model, and
    its lines from `formula` to `return d` are enough. Leave out `by_entry` unless an entry of d depends on the same
    entry of g alone. A hyperparameter that RANGES (section 10) lacks goes into `ranges`. Every other attribute has a
    safe default. Without a kappa the row refuses to rotate. Without a contribution its norm is not predicted.
    (Elsewhere, compose(DIRECTIONS["mine"], PLAIN) makes a class, which neither `build` nor pickle finds.)
    """
    formula = ""            # d in one line, for the printed table
    defaults = {}           # hyperparameters, lr first, weight_decay among them: torch.optim's, where it has the row
    ranges = {}             # the range of each hyperparameter that RANGES does not know
    averages = ()           # names of state tensors that start at 0
    decoupled = False       # True: decay shrinks the weight itself. False: decay goes through `update`
    by_entry = False        # True: an entry of d depends on the same entry of g alone, so large tensors may be cut
    turning_decay = False   # True: `update` wants the decay under the rotational geometry, too (adam)
    applies = lambda self, p, group: True               # does the row take parameter p? (muon: no vector)
    instead = None                                      # the row of the other parameters,
    for_others = lambda self, h: h                      # and their hyperparameters
    scalars = lambda self, h, t: {}                     # numbers that depend on the step, for h
    objection = lambda self, h: None                    # what is wrong with a combination of hyperparameters, in words
    # These five predict where weight decay leads. Skip them until section 5.
    kappa = None                                        # a method (h) -> number
    gain = lambda self, h: 1.0
    contribution = lambda self, h, sigma, C: math.nan
    pull = lambda self, h, sigma: 1.0
    on_noise = lambda self, shape: (1.0, 1.0)           # correction factors that muon needs (section 9)

    @property
    def name(self):
        return type(self).__name__

    def start(self, w, h):
        """The state before the first step: {name: tensor}."""
        return {name: torch.zeros_like(w) for name in self.averages}

    def update(self, g, state, h, decay=0):
        """g -> d. `state` is updated in place; `decay` is the tensor wd * w, or 0."""
        raise NotImplementedError


class HeavyBall(Direction):
    """Polyak's momentum [HB]:  m <- mu m + x.  Without momentum x is returned, and a buffer keeps its value.

    Shapes   x, m: the parameter's        State   momentum_buffer = 0, so the first m is x (as in torch)
    Units    m is a sum, not an average. A constant x builds up to x / (1 - mu): a factor called the gain (section 5)
    Notice   the d that is returned IS the buffer, so no geometry may change d in place
    """

    def start(self, w, h):
        return super().start(w, h) | ({"momentum_buffer": torch.zeros_like(w)} if h["momentum"] else {})

    def ball(self, x, state, h):
        if not h["momentum"]:
            return x
        return state["momentum_buffer"].mul_(h["momentum"]).add_(x)

    def gain(self, h):
        """sum of mu^j  =  1 / (1-mu)."""
        return 1 / (1 - h["momentum"])

    def kappa(self, h):
        """sqrt(sum of mu^(2j)) / sum of mu^j  =  (1-mu) / sqrt(1-mu^2)  =  sqrt((1-mu) / (1+mu))."""
        return math.sqrt((1 - h["momentum"]) / (1 + h["momentum"]))


@row
class sgd(HeavyBall):
    """Stochastic gradient descent with heavy-ball momentum:  m <- mu m + (g + decay);  d = m.

    Units    d: loss / weight. So lr is in weight^2 / loss, and depends on the scale of both
    Source   [HB]; equal to torch.optim.SGD (no dampening, no Nesterov)
    """
    formula = "m <- mu m + g + wd w;  d = m"
    defaults = {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0}
    by_entry = True
    contribution = lambda self, h, sigma, C: sigma

    def update(self, g, state, h, decay=0):
        return self.ball(g + decay, state, h)


class Geometry:
    """One column of the table: the only code that moves a weight. It says what lr and wd mean."""
    name = ""
    defaults = {}           # hyperparameters it adds
    marker = None           # a state entry that keeps a parameter under this geometry for good

    start = lambda self, w, h: {}                       # state before the first step
    scalars = lambda self, direction, h, t: {}          # numbers that depend on the step
    applies = lambda self, p, group: True               # to this parameter? The others take the plain geometry
    objection = lambda self, direction, p, group: None  # why it cannot be applied to p, in words
    prepare = lambda self, p, group: None               # changes a parameter once, before its first step
    by_row = lambda self, h: True                       # does a new row depend on the same row of w and d alone?

    def decay(self, direction, w, h):
        """Let w decay at once, or return the part that goes through the direction. (Here: neither.)"""
        return 0

    def move(self, w, d, state, h):
        """Change w in place. d stays as it is, since it may be a buffer."""
        raise NotImplementedError


class Plain(Geometry):
    """w <- w - lr d:  the textbook rule. Decay goes where the direction wants it, into d or into the weight itself.

    Units    lr: weight per unit of d. Decoupled wd: 1 / (lr * steps), since w loses the share lr * wd in every step
    """
    name = "plain"

    def decay(self, direction, w, h):
        lr, wd = h["lr"], h["weight_decay"]
        if not direction.decoupled:
            return wd * w if wd else 0
        if wd:
            w.mul_(1 - lr * wd)
        return 0

    def move(self, w, d, state, h):
        w.sub_(h["lr"] * d)


# Exercise 3. Take the 2 x 2 example with momentum 0.9 and feed it G a second time. Predict d, then run
#     import torch;  from optim import SGD
#     w = torch.nn.Parameter(torch.tensor([[3., 4.], [1., 0.]]));  o = SGD([w], lr=0.1, momentum=0.9, weight_decay=0.5)
#     for _ in range(2): w.grad = torch.tensor([[1., 0.], [0., 2.]]);  o.step();  print(o.state[w]["momentum_buffer"])


# ======================================================================================================================
# 4. adam, adamw, rmsprop, lion: directions without a unit
#
# A running average that starts at 0 is too small at first. After t steps an average with factor b has seen a total
# weight of 1 - b^t, and a division by 1 - b^t removes the bias ([Adam], section 3).
# ======================================================================================================================


class Average(Direction):
    """A direction whose memory is a running average of factor b1:  m <- b1 m + (1-b1) g."""
    decoupled = by_entry = True

    def scalars(self, h, t):
        b1, b2 = h["betas"]
        return {"unbias1": 1 - b1**t, "unbias2": 1 - b2**t}

    def kappa(self, h):
        """sqrt(sum of (1-b)^2 b^(2j)) / 1  =  sqrt((1-b) / (1+b)), b = b1. (v is slow, and counts as constant.)"""
        b1, _ = h["betas"]
        return math.sqrt((1 - b1) / (1 + b1))


@row
class adamw(Average):
    """Mean over root mean square; neither average sees the decay, which the geometry applies ("decoupled", [AdamW]).

    Formula  m <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) g^2
             d  = m / (1-b1^t)  /  (sqrt(v) / sqrt(1-b2^t) + eps)
    Shapes   all: the parameter's                   State   exp_avg = m = 0, exp_avg_sq = v = 0 at first
    Units    d has none. Its entries have size 1 while gradients agree, and about kappa (section 5) when gradients are
             noise. The scale of the loss does not matter, until eps is felt
    Source   [Adam], algorithm 1; equal to torch.optim.AdamW. ([AdamW]'s own decay is not multiplied by lr)
    """
    formula = "d = mean(g) / rms(g)"
    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    averages = "exp_avg", "exp_avg_sq"
    contribution = lambda self, h, sigma, C: 1.0

    def update(self, g, state, h, decay=0):
        return self.ratio(g, g, state, h)

    def ratio(self, g_m, g_v, state, h):
        """g_m feeds the mean, g_v the mean square."""
        m, v, (b1, b2) = state["exp_avg"], state["exp_avg_sq"], h["betas"]
        m.lerp_(g_m, 1 - b1)
        v.mul_(b2).addcmul_(g_v, g_v, value=1 - b2)
        rms = (v / h["unbias2"]).sqrt_()
        return (m / h["unbias1"]).div_(rms.add_(h["eps"]))


@row
class adam(adamw):
    """Both averages see the decay: L2 regularisation, as in torch.optim.Adam. The decay is divided by the gradient's
    own RMS, so a weight with large gradients is hardly decayed, and turns slowly. [RE], section 5.3, traces the worse
    results of Adam+L2 to the unequal angles. Under the rotational geometry only v sees the decay (same section). The
    denominator is that of Adam+L2, but the decay takes no part in the motion."""
    formula = "d = mean(g + wd w) / rms(g + wd w)"
    defaults = adamw.defaults | {"weight_decay": 0.0}
    decoupled, turning_decay = False, True
    pull = lambda self, h, sigma: 1 / sigma

    def update(self, g, state, h, decay=0):
        turning = "angle" in h                                      # the rotational geometry puts its angle there
        return self.ratio(g if turning else g + decay, g + decay, state, h)


@row
class rmsprop(HeavyBall):
    """Gradient over its root mean square [RMS]:  x = g + decay;  v <- a v + (1-a) x^2;  d = x / (sqrt(v) + eps), then
    heavy ball on d.

    Shapes   all: the parameter's                   State   square_avg = v = 0 at first; momentum_buffer
    Units    d has none. There is no bias correction, so the first step is larger by 1/sqrt(1-a)
    Source   equal to torch.optim.RMSprop (not centered)
    """
    formula = "d = heavy ball of [x / rms(x)],  x = g + wd w"
    defaults = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0}
    averages, by_entry = ("square_avg",), True
    contribution = lambda self, h, sigma, C: 1.0
    pull = lambda self, h, sigma: 1 / sigma

    def update(self, g, state, h, decay=0):
        v, x = state["square_avg"], g + decay
        v.mul_(h["alpha"]).addcmul_(x, x, value=1 - h["alpha"])
        return self.ball(x / (v.sqrt() + h["eps"]), state, h)


@row
class lion(Direction):
    """Evolved sign momentum ([Lion], algorithm 2):  d = sign(b1 m + (1-b1) g);  then  m <- b2 m + (1-b2) g.

    Shapes   g, m, d: the parameter's               State   exp_avg = m = 0 at first
    Units    d has none: every entry is -1, 0 or 1. So ||d|| = sqrt(number of weights), far larger than Adam's. [Lion]
             advises a learning rate 3 to 10 times smaller than Adam's, and a decay larger by as much
    Notice   m is read before it is updated, and with the other beta. The lines in reverse are another method.
             In torch sign(nan) is 0. An entry whose gradient once was NaN has d = 0 for good, and only m tells why
    """
    formula = "d = sign(b1 m + (1-b1) g)"
    defaults = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}
    averages, decoupled, by_entry = ("exp_avg",), True, True

    def update(self, g, state, h, decay=0):
        m, (b1, b2) = state["exp_avg"], h["betas"]
        d = torch.lerp(m, g, 1 - b1).sign()
        m.lerp_(g, 1 - b2)
        return d

    def power(self, h):
        """S = sum of c_j^2 of the average inside the sign:  c_0 = 1-b1,  c_j = b1 (1-b2) b2^(j-1)  for j >= 1."""
        b1, b2 = h["betas"]
        return (1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)

    def contribution(self, h, sigma, C):
        """sqrt(2 / (pi S)).  The sign is replaced by the line that fits it best: for a Gaussian x of RMS size r,
        sign(x) ~ sqrt(2/pi) x/r. Here r = sqrt(S) sigma, and the c_j add up to 1, so sigma cancels."""
        return math.sqrt(2 / (math.pi * self.power(h)))

    def kappa(self, h):
        """sqrt(pi S / 2):  one update has entries of size 1, so kappa = 1 / contribution."""
        return math.sqrt(math.pi * self.power(h) / 2)


# Exercise 4. Predict W after the first step of adamw with lr = 0.1 and wd = 0 on the 2 x 2 example. Why is it the same
# for 100 G?


# ======================================================================================================================
# 5. Why weight decay is rotation
#
# Let gradients be pure noise (a "random walk": late training looks much like it, [RE], section 3). Noise has no
# preferred direction, so in a neuron of many weights an update u stands nearly at a right angle to w. (The gradient of
# a weight before a normalisation layer does so exactly.) Weight decay pulls along the radius:
#
#                  u                          ||w + u||^2  =  ||w||^2 + ||u||^2              Pythagoras: u lengthens w
#          w o----------->o w + u             ||(1-e) w||^2  =  ||w||^2 - 2e ||w||^2         decay shortens it
#            |         .                                                                     (e = lr wd, e^2 dropped)
#            |      .                         growth = decay:  ||u||^2 = 2e ||w||^2
#            |   .   angle                    so the angle is  ||u|| / ||w||  =  sqrt(2 lr wd)
#            |.
#            o                                The angle does not depend on layer or gradient. A neuron grows or
#                                             shrinks until its updates turn it by this angle.
#
# The distance of ||w||^2 from this balance shrinks by the factor 1 - 2e in a step. So the way there takes some
# 1 / (2 lr wd) steps: often a large part of a training.
#
# With memory (mu = 0.9) successive updates share gradients, so they are not at right angles to each other. We sort the
# movement by gradient instead of by step. A gradient enters the update j steps later with a weight c_j (heavy ball:
# mu^j; average: (1-b) b^j), and all that it ever moves is one piece. The pieces of different gradients are independent,
# so Pythagoras holds for them. Four numbers describe a direction (muon has a correction of its own, in section 9):
#
#   gain          sum of c_j: over all time, one gradient moves the weight by  lr * gain * (what g is turned into)
#   contribution  RMS size of an entry of what g is turned into: sigma for sgd, 1 where d is divided by an RMS
#   kappa         RMS size of one update, divided by the RMS size of the whole movement that one gradient causes over
#                 all later steps:  sqrt(sum c_j^2) / sum c_j  where d is linear in g (a sign has another one: lion)
#   pull          factor of wd, where the direction rescales the decay, too: 1/sigma for adam and rmsprop
#
#   mu = 0        c = 1, 0, 0, ...             gain  1      one update is the whole movement          kappa = 1
#   mu = 0.9      c = 1, 0.9, 0.81, ...        gain 10      one update has size sqrt(5.26) = 2.29     kappa = 0.229
#
# In the balance above ||u|| becomes the whole movement of one gradient, lr gain contribution sqrt(C), and e becomes
# lr gain wd, as a heavy ball sums up the decay that goes through it, too. (An average has gain 1.) One step is kappa
# times the whole movement. So with memory a neuron turns less in a step, by the factor kappa, at the same lr gain wd.
# (The "gains" of a network, multipliers behind a norm, are another thing.)
# ======================================================================================================================


def equilibrium(direction, h, C, sigma, shape=None):
    """Equilibrium (norm, angle per step) of a neuron under the PLAIN geometry.

    Formula  norm^2 * 2 lr_total wd  =  (lr_total * contribution)^2 * C           decay = growth, in every step
             angle = kappa * lr_total * contribution * sqrt(C) / norm  =  kappa sqrt(2 lr_total wd)
             with lr_total = lr * gain. For adam and rmsprop wd here is wd / sigma, as they divide the decay by the RMS.
             (size, cosine) = muon.on_noise multiply the norm, and the cosine divides the angle
    Args     C: weights in the neuron. sigma: RMS size of a gradient entry (not felt by adamw, lion, muon, shampoo)
             shape: of the weight, which muon feels. None: its kappa without the cosine of `muon.on_noise`
    Returns  norm in the weight's unit, angle in radians. (nan, nan) where nothing decays or nothing moves. nan where
             the direction has no contribution (Shampoo: the size of its steps depends on the shape) or no kappa
    Source   [RE], section 3.2 and table 1; rmsprop and the root-free ones are ours. Lion's sign is linearised there:
             see lion_walk_norm for the exact value
    """
    lr_total = h["lr"] * direction.gain(h)
    if not (lr_total > 0 and h["weight_decay"] > 0 and sigma > 0):
        return math.nan, math.nan
    wd = h["weight_decay"] * direction.pull(h, sigma)
    norm = math.sqrt(lr_total / (2 * wd) * C) * direction.contribution(h, sigma, C)
    kappa = direction.kappa(h) if direction.kappa else math.nan
    size, cosine = direction.on_noise(shape) if shape else (1, 1)
    return norm * size * cosine, kappa * math.sqrt(2 * lr_total * wd) / cosine


def lion_walk_norm(h, C):
    """Equilibrium norm of Lion in a Gaussian random walk, without the linearised sign of the paper.

    Formula  norm^2 = lr C / (2 wd) * sum over lags j of  (2/pi) asin(rho_j) (1 - lr wd)^|j|
             rho_j: autocorrelation of the average inside the sign; asin turns it into that of the signs (arcsine law)
    Source   ours; [RE] has the same with asin(x) ~ x, which makes the sum (2/pi) / S
    """
    b1, b2 = h["betas"]
    S, shrink = DIRECTIONS["lion"].power(h), 1 - h["lr"] * h["weight_decay"]
    total = 1.0                                                                         # lag 0: asin(1) * 2/pi = 1
    for j in itertools.takewhile(lambda j: (b2 * shrink) ** (j - 1) > 1e-9, itertools.count(1)):
        rho = b1 * (1 - b2) * b2 ** (j - 1) * ((1 - b1) + b1 * b2 / (1 + b2)) / S       # sum of c_i c_(i+j), over S
        total += 2 * (2 / math.pi) * math.asin(rho) * shrink**j                         # lags j and -j
    return math.sqrt(h["lr"] * C / (2 * h["weight_decay"]) * total)


# Exercise 5. (a) Signum, older than Lion, is d = sign(m) with m <- mu m + (1-mu) g. Which betas make Lion the same?
# Derive its kappa, and check it with one line:
#     DIRECTIONS["lion"].kappa({"betas": (0.9, 0.9)})
# (b) Before a normalisation layer the gradient is sigma0 / ||w|| instead of sigma. Solve for the norm, for sgd and for
# adam with L2. Does the angle of sgd change? The angle of adam?


# ======================================================================================================================
# 6. The rotational geometry: set the angle outright
#
# The step has three parts. The part of d along w is removed. The rest is scaled to a chosen angle. The neuron is put
# back to its old length.
#
#                    a * (tangent part of d), at a right angle to w
#            w o-----------------------------------o w'  (before it is put back on the sphere)
#              |                             .
#        n     |                  .              ||w'|| = sqrt(||w||^2 + a^2 ||d||^2): known before w' is computed
#              |        .  angle
#              o
# ======================================================================================================================


def neuron_dims(w, h):
    """The dims over which a neuron's norm is taken: all but the first, or all of them if per_neuron=False."""
    return tuple(range(1 if h["per_neuron"] else 0, w.dim()))


def neuron_size(w, dims):
    """C, the number of weights in a neuron."""
    return math.prod([w.shape[dim] for dim in dims])


def neuron_norm(w, dims):
    """Euclidean norms of the neurons of w, with the summed dims kept as size 1: they broadcast against w."""
    return torch.linalg.vector_norm(w, dim=dims, keepdim=True)


def rounding(dtype):
    """The relative size below which a number is rounding: 16 times the precision of its type."""
    return 16 * torch.finfo(dtype).eps


class Rotational(Geometry):
    """Turn every neuron on the sphere that it started on ([RE], algorithm 1). The average angle per step is the one
    that the plain optimizer would reach in equilibrium, without the 1 / (2 lr gain wd) steps of getting there. (For
    adam and rmsprop it is that at sigma = 1. Plain muon turns more: see its kappa.)

    Formula  d <- d - mean(d);  d <- d - w (d.w)/(w.w)        no common offset, and tangent to the sphere
             U <- beta U + (1-beta) ||d||^2                   how large d is on average
             a = angle * n / (sqrt(U / (1-beta^t)) + eps);    w <- (w - a d) * n / ||w - a d||
             angle = kappa sqrt(2 lr gain wd);   beta = update_norm_decay_factor,  eps = rotational_eps
    Shapes   w, d: (neurons, ...);  n, U: (neurons, 1, ...), or (1, 1, ...) if per_neuron=False
    State    radius = n: kept for ever; update_norm_sq = U = 0 at first
    Units    angle: radians per step. lr and wd act through their product alone (but in adam, whose v sees wd w). The
             scale of d does not matter, until eps is felt
    Turns    A parameter turns if it has 2 dims or more and its group has weight_decay > 0. The parameter's first step
             decides for the whole run: a decay that is raised from 0 later comes too late. All others (biases, gains)
             follow the plain geometry, with their group's decay and lr
    Options  per_neuron=False keeps the norm of the whole tensor instead. zero_mean: neurons and updates are centred.
             rotational, in a group: True or False overrules the choice by shape and decay
    Notice   The constructor centres the weights, keeping their norm, which changes what a trained network computes.
             The first step turns by exactly arctan(angle) (if eps = 0), since U is then the size of this very d. Later
             steps turn more when d is larger than usual, and less when it is smaller. So the angle is off while the
             direction's averages fill (adamw on noise: 2/3 of it in step 10, 97 % in step 50). beta = 0: no step is off
    Errors   ValueError for a neuron that cannot turn (too few weights, all zero, all equal)
    """
    name = "rotational"
    marker = "radius"
    defaults = {"update_norm_decay_factor": 0.9, "per_neuron": True, "zero_mean": True, "rotational_eps": 1e-8,
                "rotational": None, "weight_decay": 1e-2}           # without decay there is no angle

    def decay(self, direction, w, h):
        return h["weight_decay"] * w if direction.turning_decay else 0

    def start(self, w, h):
        radius = neuron_norm(w, neuron_dims(w, h))
        return {"radius": radius, "update_norm_sq": torch.zeros_like(radius)}

    def scalars(self, direction, h, t):
        lr = max(h["lr"], 0)                                        # LinearLR(end_factor=0) may end at -1e-18
        angle = direction.kappa(h) * (2 * lr * direction.gain(h) * h["weight_decay"]) ** 0.5
        return {"angle": angle, "unbias_update_norm": 1 - h["update_norm_decay_factor"] ** t}

    def move(self, w, d, state, h):
        n, U, w_sq = state["radius"], state["update_norm_sq"], (w * w).sum(neuron_dims(w, h), keepdim=True)
        d, d_sq = self.tangent(w, w_sq, d, h)
        U.lerp_(d_sq, 1 - h["update_norm_decay_factor"])
        rms = (U / h["unbias_update_norm"]).sqrt()
        a = torch.where(d_sq > 0, h["angle"] * n / (rms + h["rotational_eps"]), 0)
        length = (w_sq + a * a * d_sq).sqrt()                       # ||w - a d||, by Pythagoras
        w.addcmul_(d, a, value=-1).mul_(torch.where(a > 0, n / length, 1))      # at rest: the same bits (0 * NaN shows)

    def tangent(self, w, w_sq, d, h):
        """-> d without its mean (if zero_mean) and without its part along w, which would only change ||w||; and the
        ||d||^2 that is left, or 0 where that is no more than rounding, and so no direction."""
        dims, removed_sq = neuron_dims(w, h), 0
        C = neuron_size(w, dims)
        if h["zero_mean"]:                                          # first: afterwards it would undo the tangent
            mean = d.mean(dims, keepdim=True)
            d, removed_sq = d - mean, mean**2 * C
        radial = (d * w).sum(dims, keepdim=True) / w_sq
        d = torch.addcmul(d, w, radial, value=-1)
        if h["zero_mean"] and C < 16:                               # of a short neuron's d little may be left, and the
            d = d - d.mean(dims, keepdim=True)                      # rounding of the first mean be most of that
        d_sq = (d * d).sum(dims, keepdim=True)
        return d, torch.where(d_sq > rounding(w.dtype) ** 2 * (removed_sq + radial**2 * w_sq + d_sq), d_sq, 0)

    by_row = lambda self, h: h["per_neuron"]

    def applies(self, p, group):
        """Only neurons can turn, and only decay gives them an angle. The group may say otherwise."""
        if group["rotational"] is not None:
            return group["rotational"]
        return p.dim() > 1 and p.numel() > 0 and group["weight_decay"] != 0

    def prepare(self, p, group):
        """Centre every neuron and keep its norm,  w <- ||w|| (w - mean w) / ||w - mean w||.  A neuron whose sum is 0 up
        to rounding (which adds up over a long run) stays as it is, to the bit."""
        if not group["zero_mean"]:
            return
        w, dims = working_copy(p), neuron_dims(p, group)
        mean, norm = w.mean(dims, keepdim=True), neuron_norm(w, dims)
        residue = w - mean
        most = torch.finfo(p.dtype).eps * (1024 if is_wide(p) else 4)       # bfloat16 is centred anew in every step
        off_centre = mean.abs() * neuron_size(w, dims) > most * norm
        p.copy_(torch.where(off_centre, residue * (norm / neuron_norm(residue, dims)), w))

    def objection(self, direction, p, group):
        """Why p cannot turn, and what to do about it. (In the authors' code such neurons become NaN, or never move.)"""
        way_out = "or set rotational=False for its group"
        if direction.kappa is None:
            return f"cannot rotate: the angle of {direction.name} is unknown. Give the row a kappa, {way_out}"
        if group["weight_decay"] == 0:
            return f"cannot rotate: weight_decay=0 makes the angle 0. Set weight_decay > 0, {way_out}"
        stuck = self.why_stuck(p, group)
        return stuck and f"cannot rotate: {stuck}, {way_out}"

    def why_stuck(self, p, group):
        """Why the neurons of p have no direction to turn from, and what to do about it; None if they have."""
        w, dims = working_copy(p.detach()), neuron_dims(p, group)
        entries = neuron_size(w, dims)
        needed = 3 if group["zero_mean"] else 2
        if entries < needed:
            return f"its neurons have {entries} weight{'s' * (entries != 1)}, and turning takes {needed}. Reshape it"
        if p.is_meta:                                               # shapes without values
            return None
        norm = neuron_norm(w, dims)
        if not norm.isfinite().all():
            return "it holds NaN or infinity. Initialise it"
        if (norm == 0).any():
            return "a neuron is all zeros, which has no direction. Initialise it differently"
        if group["zero_mean"]:
            if (neuron_norm(w - w.mean(dims, keepdim=True), dims) <= rounding(w.dtype) * norm).any():
                return "the weights of a neuron are all equal. Initialise it differently"
        return None


# Exercise 6. Train a network without biases and gains twice with RotationalAdamW, once with lr and wd, once with 2 lr
# and wd / 2. Predict how the weights differ. Why is the answer another for RotationalAdam, and with biases?


# ======================================================================================================================
# 7. Without the root ([RF])
#
# RMSProp and Adam divide by sqrt(v). Take the root away, and v is no longer a normaliser. Up to a factor B it is a
# curvature, and this file then calls it s. The average of g^2, with g a mean over B examples, is about 1/B times the
# diagonal of the (empirical) Fisher matrix. The diagonal itself does not depend on B. So B s estimates it, g / (B s) is
# a diagonal Newton step, and one lr fits every batch size. s starts at 1/B, so B s starts at 1, and forgets that start
# slowly.
# ======================================================================================================================


def newton_contribution(self, h, sigma, C):
    """sigma / (B sigma^2 + damping): the root-free directions divide by the curvature B E[g^2] (+ eps or damping)."""
    return sigma / (h["batch_size"] * sigma**2 + h.get("damping", h.get("eps")))


@row
class rf_rmsprop(HeavyBall):
    """RMSProp without the root:  s <- a s + (1-a) g^2;  d = g / (B s + eps);  heavy ball on d + decay.

    Shapes   all: the parameter's                   State   square_avg = s = 1/B at first; momentum_buffer
    Units    B s is in loss^2 / weight^2. For a negative log-likelihood in nats that is a curvature (the Fisher matrix
             is the mean Hessian, over labels from the model). So d is in weights, and lr has no unit, as in Newton's
             method
    Source   [RF]; the decay joins after the preconditioner, in the heavy ball, as in the authors' code
    """
    formula = "d = heavy ball of [g / (B s) + wd w]"
    defaults = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-4, "weight_decay": 0.0, "momentum": 0.9,
                "batch_size": None}                                 # None: has to be given
    by_entry, contribution = True, newton_contribution

    def start(self, w, h):
        return super().start(w, h) | {"square_avg": torch.full_like(w, 1 / h["batch_size"])}

    def update(self, g, state, h, decay=0):
        s, B = state["square_avg"], h["batch_size"]
        s.mul_(h["alpha"]).addcmul_(g, g, value=1 - h["alpha"])
        return self.ball(g / (B * s + h["eps"]) + decay, state, h)


@row
class rf_adamw(Average):
    """AdamW without the root:  m <- b1 m + (1-b1) g;  s <- b2 s + (1-b2) g^2;  d = m / (B s + eps).

    Shapes   all: the parameter's                   State   exp_avg = m = 0, exp_avg_sq = s = 1/B at first
    Units    as in rf_rmsprop
    Source   [RF]; the authors' code, without bias correction
    Notice   bias_correction=True divides m by 1-b1^t and B s by 1-b2^t. s does not start at 0, so B s becomes too large
             at first (1/(1-b2) at t = 1) instead of unbiased: a warmup in disguise
    """
    formula = "d = mean(g) / (B s)"
    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 1e-2, "batch_size": None,
                "bias_correction": False}
    ranges = {"bias_correction": (True, False)}
    contribution = newton_contribution

    def start(self, w, h):
        return {"exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.full_like(w, 1 / h["batch_size"])}

    def update(self, g, state, h, decay=0):
        m, s, (b1, b2), B = state["exp_avg"], state["exp_avg_sq"], h["betas"], h["batch_size"]
        m.lerp_(g, 1 - b1)
        s.mul_(b2).addcmul_(g, g, value=1 - b2)
        if h["bias_correction"]:
            return (m / h["unbias1"]) / (B * s / h["unbias2"] + h["eps"])
        return m / (B * s + h["eps"])


# Exercise 7. Gradients of one example are N(0, 1), and noise alone. What is B s after many steps, for B = 1 and for
# B = 100? What becomes of d if batch_size is left at 1 while the loss is a mean over 100 examples?


# ======================================================================================================================
# 8. The modular norm ([MN], section 3 and table 1)
#
# How large is an update of a whole network? Measure the update D of one weight by how much it can stretch an input,
# relative to what the weight itself does at its usual size:
#
#     ||D||  =  spectral norm of D / scale,      scale = sqrt(out/in): inputs of RMS 1 become outputs of RMS 1
#
# A network is an expression of its layers. Two numbers belong to every part of it:
#
#     mass          how much of the learning is to happen in the part. A weight has mass 1 unless told otherwise
#     sensitivity   RMS change of the part's output, per RMS change of its input. The number is a bound for linear
#                   parts and norms. For relu and gelu 1/sqrt(2) is typical, since half of the units are off. At 1 a
#                   chain of parts neither amplifies changes nor damps them
#
#                              mass             sensitivity      modular norm of an update
#     weight(layer)            1                1                the one above
#     bond(name, s)            0                s                0: relu, attention, layer norm have no weights
#     M2 @ M1  (M1 is first)   m1 + m2          s1 * s2          max( s2 m/m1 ||D1||,  m/m2 ||D2|| ),  m = m1 + m2
#     (M1, M2)  side by side   m1 + m2          s1 + s2          max( m/m1 ||D1||,  m/m2 ||D2|| )
#     M1 + M2                  = bond("+", 1) @ (M1, M2)
#     a * M                    = bond("a", |a|) @ M
#     M ** L                   L m              s^L              L copies of M, each with its own weights, in a row
#     M.tare(m)                m                s                all masses in it rescaled to add up to m
#
# Theorem: for weights of their usual size and inputs of RMS 1, an update of modular norm 1 changes the output by an RMS
# of at most 1, to first order, at any width and depth. So a step of modular norm lr has a known size, and one lr fits
# all widths and depths.
#
# The norm is a max, so every weight may use its whole allowance at once. The allowance is called its share. In a part
# that is given the share p, M2 @ M1 hands  p m1/m / s2  to M1 (M2 will amplify it) and  p m2/m  to M2; (M1, M2) hands
# p m1/m  and  p m2/m  on. At the root p = 1. An example, two layers of mass 1:
#
#     weight(Q) @ bond("damp", 0.5) @ weight(P)       Q: share 1/2            P: share 1/2 / 0.5 = 1
#
# With lr = 0.1 the update of Q has norm 0.05, that of P has norm 0.1. The change that P makes passes the bond, and is
# 0.05 behind it. Both together change the output by at most 0.1. (Shares add up to 1 where all sensitivities are 1.
# Here the bond damps what P changes, so P may change more.)
# ======================================================================================================================


def usual_size(shape, norm):
    """The norm at which a layer maps inputs of RMS 1 to outputs of RMS 1, in its most amplified direction.
    "spectral": sqrt(out/in), for a convolution divided among the kernel positions. "rows" (an embedding has one number
    as its input): norm sqrt(dim) for each row."""
    if norm == "rows":
        return math.sqrt(shape[1])
    return math.sqrt(shape[0] / shape[1]) / math.prod(shape[2:])


def spectral_norm(d, u):
    """The largest factor by which the matrix d can lengthen a vector, by one step of power iteration:

        v = d u / ||d u||;   norm = ||d^T v||;   u <- d^T v / norm

    u is kept, and d changes little from step to step, so one iteration per step is enough. The estimate comes from
    below, so the first updates are larger than lr. A convolution is a matrix for every kernel position, and has a norm
    for each.

    Shapes   d: (out, in, ...), u: (in, ...), v: (out, ...), norm: (...), the dots being the kernel's
    Notice   An update of zero would turn u to NaN for good, so u stays as it is. An update orthogonal to u would have
             norm 0 for good. So v starts again from the fixed vector cos(0), cos(1), ..., and for this one step the
             Frobenius norm stands in, which is never below the spectral one
    """
    v = torch.einsum("oi...,i...->o...", d, u)
    size = torch.linalg.vector_norm(v, dim=0)
    restart = torch.arange(len(d), dtype=d.dtype, device=d.device).cos().view(-1, *[1] * (d.dim() - 2))
    v = torch.where(size > 0, v / size, restart)
    longer = torch.einsum("oi...,o...->i...", d, v)
    norm = torch.linalg.vector_norm(longer, dim=0)
    u.copy_(torch.where((norm > 0) & norm.isfinite(), longer / norm, u))
    return torch.where(size > 0, norm, torch.linalg.vector_norm(d, dim=(0, 1)))


class Modular(Geometry):
    """Rescale d in the norm that suits the layer, so that lr is the modular norm of the whole network's update.

    Formula  w <- w - lr share scale d / norm(d);   then decay:  w <- (1 - lr share wd) w,  or rows back to norm `scale`
                    norm                                       scale             after the update
             Linear      spectral                              sqrt(out/in)      decay
             Conv        spectral, for each kernel position    the same / (number of positions)      decay
             Embedding   "rows": Euclidean, for each row       sqrt(dim)         rows are put back, whatever wd is
    Shapes   w, d: (out, in, ...), or (rows, dim)            State   u: the vector of the power iteration
    Units    none: the size of d does not matter, as long as its type can hold the squares. At lr = 1 an update would be
             as large as the weight, times its share
    Groups   norm: "spectral", or "rows" for embeddings; share; scale: the norm of the weights, None: their usual one.
             `build` takes them from the model's modular_tree(). Without groups every weight is taken for a Linear's or
             a Conv's, with share 1: layers are balanced, but not by what they do to each other
    Options  seed: of the vector that power iteration starts from
    Notice   A zero update, or a zero row of one, adds nothing. Decay and putting rows back happen all the same
    """
    name = "modular"
    defaults = {"lr": 0.25, "weight_decay": 0.0, "share": 1.0, "norm": "spectral", "scale": None, "seed": 0}
    applies = lambda self, p, group: p.dim() > 1 and p.numel() > 0              # biases and gains have no such norm
    by_row = lambda self, h: h["norm"] == "rows"

    def start(self, w, h):
        """u is random, but the same in every process and every run."""
        if h["norm"] == "rows":
            return {}
        generator = torch.Generator().manual_seed(h["seed"])
        u = torch.randn(w.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
        return {"u": u.to(w.device, w.dtype)}

    def move(self, w, d, state, h):
        rows, lr = h["norm"] == "rows", h["lr"]
        scale = h["scale"] or usual_size(w.shape, h["norm"])
        norm = torch.linalg.vector_norm(d, dim=1, keepdim=True) if rows else spectral_norm(d, state["u"])
        w.sub_(d * torch.where(norm > 0, lr * h["share"] * scale / norm, 0))
        if rows:
            size = torch.linalg.vector_norm(w, dim=1, keepdim=True)
            w.mul_(torch.where((size > 0) & (lr > 0), scale / size, 1))
        elif h["weight_decay"]:
            w.mul_(1 - lr * h["share"] * h["weight_decay"])

    def objection(self, direction, p, group):
        if group["norm"] == "rows" and p.dim() > 2:
            return "cannot have norm='rows', which takes (rows, dim). Set norm='spectral' for its group"


def fresh(b, t):
    """The weight of the newest x in an average that needs no bias correction, since it starts at its first x:
    m <- m + (1-b)^((t-1)/t) (x - m).  It falls from 1 at t = 1 to the 1-b of a running average ([MN]'s code)."""
    return (1 - b) ** ((t - 1) / t)


class warm_sgd(Direction):
    """sgd under the modular norm: the average gradient,  d = m.  The size of d does not matter there."""
    name, formula = "sgd", "d = mean(g)"
    defaults = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0}
    averages, decoupled, by_entry = ("exp_avg",), True, True
    scalars = lambda self, h, t: {"fresh": fresh(h["momentum"], t)}

    def update(self, g, state, h, decay=0):
        return state["exp_avg"].lerp_(g, h["fresh"])


class warm_adam(Direction):
    """adam under the modular norm: averages from `fresh`, no eps,  d = m / sqrt(v), and 0 where that is 0/0. So an
    entry counts in full, however small its gradients are. The betas are [MN]'s."""
    name, formula = "adam", "d = mean(g) / rms(g)"
    defaults = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0}
    averages, decoupled, by_entry = ("exp_avg", "exp_avg_sq"), True, True
    scalars = lambda self, h, t: {"fresh1": fresh(h["betas"][0], t), "fresh2": fresh(h["betas"][1], t)}

    def update(self, g, state, h, decay=0):
        m = state["exp_avg"].lerp_(g, h["fresh1"])
        v = state["exp_avg_sq"].lerp_(g * g, h["fresh2"])
        return (m / v.sqrt()).masked_fill_(v == 0, 0)               # v can be 0 where g is tiny: g^2 underflows first


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight in a tree. layers: one for every copy that ** makes. share: of an update of size 1 of the tree."""
    layers: tuple
    norm: str
    mass: float
    share: float = 1.0

    @property
    def layer(self):
        return self.layers[0]

    @property
    def scale(self):
        return usual_size(self.layer.weight.shape, self.norm)

    def words(self):
        return f"{type(self.layer).__name__} {'x'.join(map(str, self.layer.weight.shape))}"


class Tree:
    """A part of a network: its mass, its sensitivity, and its weights in the order of the forward pass. Trees are made
    by `weight`, `bond` and the operators of the table above. A tree never changes. print(tree) shows all shares."""

    def __init__(self, name, mass, sensitivity, parts=(), bare=False):
        self.name, self.mass, self.sensitivity, self.parts = name, mass, sensitivity, tuple(parts)
        self.braced = name if bare else f"({name})"                 # its name within a longer one

    def within(self, share, mass=1.0):
        """Its weights as part of something larger, which leaves it this share of the update."""
        return [replace(w, share=w.share * share, mass=w.mass * mass) for w in self.parts]

    def __matmul__(self, first):
        first = as_tree(first)
        mass = first.mass + self.mass
        if first.mass and not self.sensitivity:
            raise ValueError(f"{self.name} @ {first.name}: the weights in {first.name} cannot reach the output through "
                             "something of sensitivity 0")
        parts = first.within(first.mass / mass / self.sensitivity if first.mass else 0)
        parts += self.within(self.mass / mass if self.mass else 0)
        return Tree(f"{self.name} @ {first.name}", mass, self.sensitivity * first.sensitivity, parts)

    def __rmatmul__(self, then):
        return as_tree(then) @ self

    def __radd__(self, other):
        return as_tree(other) + self

    def __add__(self, other):
        other = as_tree(other)
        both = as_tree((self, other))
        return Tree(f"({self.name} + {other.name})", both.mass, both.sensitivity, both.parts, bare=True)

    def __rmul__(self, factor):
        if not (isinstance(factor, (int, float)) and math.isfinite(factor)):
            raise TypeError(f"a part of a network can be multiplied by a finite number, not by {factor!r}")
        scaled = bond(f"{factor:.4g}", abs(factor)) @ self
        return Tree(f"{factor:.4g} * {self.braced}", scaled.mass, scaled.sensitivity, scaled.parts)

    __mul__ = __rmul__

    def __pow__(self, copies):
        if not isinstance(copies, int) or copies < 1:
            raise ValueError(f"** {copies!r}: the number of copies must be a whole number >= 1")
        if self.mass and not self.sensitivity and copies > 1:
            raise ValueError(f"({self.name}) ** {copies}: of copies with sensitivity 0 only the last one can reach the "
                             "output")
        for w in self.parts:
            if len(w.layers) % copies:
                raise ValueError(f"** {copies} needs {copies} layers, or a multiple of it, in every weight(...): "
                                 f"{w.words()} has {len(w.layers)}")
        parts = []
        for i in range(copies):                                     # copies - 1 - i later ones amplify what copy i does
            share = 1 / copies / self.sensitivity ** (copies - 1 - i) if self.mass else 0
            parts += [replace(w, layers=w.layers[i::copies]) for w in self.within(share)]
        return Tree(f"{self.braced} ** {copies}", copies * self.mass, self.sensitivity**copies, parts)

    def tare(self, mass):
        """The same with all masses in it rescaled so that their sum is `mass`. Shares within depend on ratios alone."""
        if not (0 <= mass < math.inf and self.mass > 0):
            raise ValueError(f"tare({mass!r}): the mass must be a finite number >= 0, and the tree must have some")
        return Tree(f"{self.braced}.tare({mass:g})", mass, self.sensitivity, self.within(1, mass / self.mass))

    def weights(self):
        """The `Weight`s in the order of the forward pass."""
        for w in self.parts:
            if len(w.layers) > 1:
                raise ValueError(f"{w.words()} stands for {len(w.layers)} layers: it needs as many copies, by **")
        return self.parts

    def __repr__(self):
        return self.name

    def __str__(self):
        if any(len(w.layers) > 1 for w in self.parts):              # shares are known when the copies are, by **
            return self.name
        rows = [("weight", "norm", "scale", "mass", "share")]
        rows += [(w.words(), w.norm, *(f"{x:.4g}" for x in (w.scale, w.mass, w.share))) for w in self.weights()]
        return f"{columns(rows)}\nmass {self.mass:.4g}, sensitivity {self.sensitivity:.4g}: {self.name}"


def as_tree(x):
    """A tuple of trees, as one: side by side. A tree, as it is."""
    if isinstance(x, Tree):
        return x
    if not isinstance(x, tuple):
        raise TypeError(f"{x!r} is no part of a modular tree: wrap a layer in optim.weight(...), and name what has no "
                        "weights with optim.bond(...)")
    trees = [as_tree(part) for part in x]
    mass = sum(tree.mass for tree in trees)
    parts = [w for tree in trees for w in tree.within(tree.mass / mass if mass else 0)]
    name = f"({', '.join(tree.name for tree in trees)})"
    return Tree(name, mass, sum(tree.sensitivity for tree in trees), parts, bare=True)


CONVOLUTIONS = torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d
NO_NORM = {             # what to do about layers without a known modular norm
    "MultiheadAttention": "write the attention with an nn.Linear each for q, k, v and the output", **dict.fromkeys(
        ("LSTM", "GRU", "RNN"), "a recurrent matrix is used at every time step, so it has no share of its own"),
    **dict.fromkeys((f"ConvTranspose{n}d" for n in (1, 2, 3)), "use an upsampling and a convolution instead")}


def weight(*layers, mass=1.0, norm=None):
    """The weight of a layer, as a tree. Several layers stand for one, in as many copies as ** makes of it.

    Args     layers: nn.Linear, nn.Conv1d to 3d (without groups), nn.Embedding; all of one shape
             norm: None takes "rows" for an Embedding and "spectral" for all others
    Errors   TypeError for other layers, ValueError for layers of different shapes, or mass < 0
    """
    for layer in layers:
        if not isinstance(layer, (torch.nn.Linear, torch.nn.Embedding, *CONVOLUTIONS)):
            kind = type(layer).__name__
            raise TypeError(f"optim.weight takes nn.Linear, nn.Conv1d to 3d, nn.Embedding, not {kind}: "
                            f"{NO_NORM.get(kind, 'name what has no weights with optim.bond(...)')}. Or train it with a "
                            "rotational or plain optimizer")
        if isinstance(layer, CONVOLUTIONS) and layer.groups != 1:
            raise TypeError("optim.weight: a convolution with groups has no known modular norm: set groups=1, or train "
                            "it with a rotational or plain optimizer")
        if torch.nn.parameter.is_lazy(layer.weight):
            raise ValueError(f"optim.weight: {type(layer).__name__} has no shape yet: run the model once first")
    if len({(type(layer), layer.weight.shape) for layer in layers}) != 1:
        raise ValueError("optim.weight: give it one layer, or several of the same type and shape")
    if not 0 <= mass < math.inf:
        raise ValueError(f"optim.weight: mass={mass!r} must be a finite number >= 0")
    if norm not in (None, "spectral") and not (norm == "rows" and layers[0].weight.dim() == 2):
        raise ValueError(f"optim.weight: norm={norm!r} must be 'spectral', or 'rows' for a weight of 2 dims")
    one = Weight(layers, norm or ("rows" if isinstance(layers[0], torch.nn.Embedding) else "spectral"), mass)
    return Tree(one.words() + f" (of {len(layers)})" * (len(layers) > 1), mass, 1.0, [one], bare=True)


def bond(name, sensitivity=1.0):
    """Something without weights, as a tree: bond("attention"), bond("relu", 0.5 ** 0.5). The name is for people.

    Values   sensitivity 1: identity, mean subtraction, layer norm, attention, abs. 1/sqrt(2): relu, gelu
    """
    if not 0 <= sensitivity < math.inf:
        raise ValueError(f"optim.bond: sensitivity={sensitivity!r} must be a finite number >= 0")
    return Tree(name, 0.0, sensitivity, bare=True)


@torch.no_grad()
def initialise(tree):
    """Fill the weights of a tree, in place, with random ones of their usual norm, which the shares presuppose.
    Linear: all singular values are sqrt(out/in). Conv: so at each kernel position, divided by the number of these.
    Embedding: rows of norm sqrt(dim), and zeros at padding_idx.

    Errors   ValueError for a weight that is computed from other parameters (weight_norm, parametrizations)
    Source   [MN]; the authors store the same divided by `scale` and multiply by it in the forward pass
    """
    for leaf in as_tree(tree).weights():
        w = leaf.layer.weight
        if not isinstance(w, torch.nn.Parameter):
            raise ValueError(f"initialise: the weight of {leaf.words()} is computed from other parameters: initialise "
                             "first, then add the weight_norm or parametrization")
        if leaf.norm == "rows":
            w.normal_()
            w.mul_(leaf.scale / torch.linalg.vector_norm(w, dim=1, keepdim=True))
            if getattr(leaf.layer, "padding_idx", None) is not None:
                w[leaf.layer.padding_idx] = 0
            continue
        for at in itertools.product(*map(range, w.shape[2:])):      # of a Linear: one position, ()
            position = w[(..., *at)]
            position.copy_(leaf.scale * torch.nn.init.orthogonal_(torch.empty_like(working_copy(position))))


# Exercise 8. (a) Put a second bond and a third layer of mass 1 behind the two-layer example. Predict the three shares,
# then print(weight(r) @ damp @ weight(q) @ damp @ weight(p)) with damp = bond("damp", 0.5) and three nn.Linear(2, 2).
# (b) Does the theorem hold? Take README's MLP of width 32 and 256, depth 2 and 16. After a step of modular_adam at lr =
# 0.01 on random x (N(0, 1), 64 of 784) and labels, print(((model(x) - before).square().mean(1).sqrt() / lr).max()).


# ======================================================================================================================
# 9. Matrices
#
# Which update of size 1 lowers the loss fastest? The answer depends on the norm that measures the size, and each norm
# has its method ([Old]):
#
#     Euclidean norm of all weights     d = G / ||G||     SGD, normalised
#     largest entry                     d = sign(G)       Lion, up to its memory
#     spectral norm                     d = U V^T         Muon, up to its memory;  G = U S V^T is the singular value
#                                                         decomposition, and in U V^T all singular values are 1
#
# The spectral norm is the one that the modular norm gives to a Linear.
# ======================================================================================================================


@row
class muon(Direction):
    """The whole matrix, orthogonalised:  m <- mu m + (1-mu) g;  x = (1-mu) g + mu m (Nesterov), or m;  d ~ U V^T of x.

    Shapes   x, d: (out, in), or (out, in, ...) taken for a matrix of out rows       State   exp_avg = m = 0 at first
    Units    d has none. The scale of g is not felt. U V^T has length sqrt(min(out, in)). `adjust` names the factor of
             it. "original": sqrt(max(1, out/in)), so that the rows of d have an RMS norm of about 1.
             "match_rms_adamw": 0.2 sqrt(max(out, in)), so that its entries have an RMS size of about 0.2, as AdamW's
             have, and lr can be AdamW's ([Moon])
    Others   Vectors, scalars, and weights whose group says use_muon=False (`build`: embeddings, and a head tied to one)
             take adamw's direction, with `betas` and `eps`. Their lr, for the decay too, is adamw_lr_scale times the
             group's
    Options  dtype: of the iterations; None: bfloat16 on CUDA, the type of m elsewhere
    Notice   OneCycleLR and CyclicLR would cycle b1 of the others, not mu: give them cycle_momentum=False
    Source   [Muon]; equal to torch.optim.Muon, which takes matrices alone, works in bfloat16, and has an eps of 1e-7
    """
    formula = "d = U V^T of mean(g) = U S V^T"
    defaults = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "adjust": "original",
                "dtype": None, "betas": (0.9, 0.999), "eps": 1e-8, "adamw_lr_scale": 0.1, "use_muon": True}
    ranges = {"nesterov": (True, False), "adjust": ("original", "match_rms_adamw"), "adamw_lr_scale": "[0, inf)",
              "use_muon": (True, False), "dtype": (None, torch.float64, torch.float32, torch.bfloat16)}
    averages, decoupled, instead = ("exp_avg",), True, DIRECTIONS["adamw"]
    applies = lambda self, p, group: group["use_muon"] and p.dim() > 1 and p.numel() > 0
    for_others = lambda self, h: h | {"lr": h["lr"] * h["adamw_lr_scale"]}

    def update(self, g, state, h, decay=0):
        m, mu = state["exp_avg"], h["momentum"]
        m.lerp_(g, 1 - mu)
        x = (g.lerp(m, mu) if h["nesterov"] else m).flatten(1)
        out, rest = x.shape
        factor = max(1, out / rest) ** 0.5 if h["adjust"] == "original" else 0.2 * max(out, rest) ** 0.5
        dtype = h["dtype"] or (torch.bfloat16 if x.is_cuda else x.dtype)
        return orthogonalise(x.to(dtype)).to(g.dtype).view(g.shape) * factor

    def power(self, h):
        """S = sum of c_j^2 of x.  m: c_j = (1-mu) mu^j.  Nesterov: c_0 = 1-mu^2, c_j = (1-mu) mu^(j+1) for j >= 1."""
        mu = h["momentum"]
        return (1 - mu**2) ** 2 + mu**4 * (1 - mu) / (1 + mu) if h["nesterov"] else (1 - mu) / (1 + mu)

    def kappa(self, h):
        """sqrt(S): the kappa of x, whose c_j add up to 1. Orthogonalisation bends d away from x. So the true angle is
        larger, by 1 over the cosine of `on_noise`: 4 to 9 % for matrices of 1 : 4, 16 to 23 % for square ones."""
        return math.sqrt(self.power(h))

    def contribution(self, h, sigma, C):
        """A row of d has norm 1 or 0.2 sqrt(C), so an entry has RMS size 1/sqrt(C) or 0.2. Over kappa, that is the
        movement that one gradient causes."""
        return (1 / math.sqrt(C) if h["adjust"] == "original" else 0.2) / self.kappa(h)

    @functools.cache
    def on_noise(self, shape):
        """Measured on one matrix of noise of this shape: the RMS singular value of d, and the cosine of the angle
        between d and x."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").flatten(1)
        d, norm = orthogonalise(x), torch.linalg.vector_norm
        return (norm(d) / min(x.shape) ** 0.5).item(), ((d * x).sum() / (norm(d) * norm(x))).item()


def orthogonalise(x):
    """x = U S V^T  ->  about U V^T, by matrix products alone (Newton-Schulz, with the coefficients of [Muon]):

        x <- x / ||x||,  then five times  x <- a x + b (x x^T) x + c (x x^T)^2 x

    In each of these every singular value s becomes  a s + b s^3 + c s^5, and U and V stay. The slope a at 0 is steep,
    so that small singular values grow fast. The price is that none of them converges: from s / ||x|| = 0.0015 upwards
    they end between 0.68 and 1.20, and what is smaller ends below. For G = [1 0; 0 2] of section 2, divided by ||G||:

        0.447, 0.894  ->  1.150, 0.827  ->  0.784, 0.934  ->  1.001, 0.771  ->  0.701, 1.021  ->  1.114, 0.689
    """
    tall = x.shape[0] > x.shape[1]                                  # the smaller of the two products x x^T, x^T x
    x = x.T if tall else x
    norm = torch.linalg.vector_norm(x)
    x = torch.where(norm > 0, x / norm, x)
    for _ in range(5):
        A = x @ x.T
        x = torch.addmm(x, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x


# ----------------------------------------------------------------------------------------------------------------------
# Shampoo: one preconditioner for every mode (dim) of the tensor
#
# A diagonal knows how steep every weight is, but not which weights act together. Shampoo keeps a d_i x d_i matrix for
# every mode i of size d_i, and multiplies the gradient by one matrix on each. For a matrix G of two modes:
#
#     d = L0^(-1/4) G L1^(-1/4),     L0: average of G G^T,   L1: average of G^T G
#
# A mode longer than max_dim (a vocabulary) gets a diagonal instead, a vector of d_i numbers. A mode of size 1 is
# squeezed away by if_shampoo. In shampoo it counts as one of the k modes, and its matrix is one number, ||G||^2. Both
# are as in [RF]'s code.
# ----------------------------------------------------------------------------------------------------------------------


def on_every_mode(x, factors):
    """Multiply mode i of x by factors[i], a matrix or a diagonal. For a matrix x with factors A, B: A^T x B.

    In indices, y[.., a, ..] = sum over m of x[.., m, ..] F[m, a]. Each pass takes the first mode and puts its product
    last, so after as many passes as modes they are in order again.
    """
    for F in factors:
        x = x.movedim(0, -1) * F if F.dim() == 1 else torch.tensordot(x, F, dims=([0], [0]))
    return x


def second_moment(x, i, diagonal):
    """X X^T for x unfolded along mode i, X: (d_i, all the rest). Only the diagonal of it, if asked for."""
    rest = [j for j in range(x.dim()) if j != i]
    if diagonal:
        return (x * x).sum(rest) if rest else x * x
    return torch.tensordot(x, x, dims=(rest, rest))


def mode_factors(w, h, **starts):
    """For every mode of w and every letter a multiple of the identity: a matrix, or a vector beyond max_dim."""
    dtype = h.get("dtype") or w.dtype
    state = {}
    for i, n in enumerate(torch.atleast_1d(w).shape):
        for letter, start in starts.items():
            one = torch.ones(n, dtype=dtype, device=w.device)
            state[f"{letter}{i}"] = start * (one if n > h["max_dim"] else torch.diag(one))
    return state


MATRIX_RANGES = {"damping": "[0, inf)", "lr_cov": "[0, inf)", "update_every": "a whole number in [1, inf)",
                 "max_dim": "[0, inf]", "dtype": (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@row
class shampoo(HeavyBall):
    """Shampoo, the baseline with roots:  for every mode i of k

        L_i <- (1 - lr_cov) L_i + lr_cov G_(i) G_(i)^T          d = G times (L_i + damping)^(-1/(2k)) on every mode

    and then heavy ball on d + decay. G_(i) is the gradient unfolded along mode i.

    State    L0, L1, .. = 0 at first; R0, R1, ..: the inverse roots, I until first computed; momentum_buffer
    Options  update_every: steps between new roots.  graft: "sgd" or "adam" gives d the norm of that method's direction
             (adam without momentum, b2 = 1 - lr_cov).  dtype: of the matrices; None: the parameter's, float32 at least
    Units    d has none, from the first roots on: L_i has the unit of g^2, and k powers of -1/(2k) make 1/g of it. On
             noise, without graft,
             ||d|| = (number of weights)^(1/(2k)), if the last 1 / lr_cov gradients can fill every L_i
    Notice   A root takes an eigendecomposition, which is slow, so there is one every `update_every` steps. A root takes
             float32 at least: eigenvalues below the rounding of the largest are noise, and a negative power amplifies
             noise. Between refreshes the roots are stale. In a direction that no earlier gradient had, a stale root is
             damping^(-1/(2k)), which is large, so the first gradient there is amplified too much
    Source   [Shampoo], algorithms 1 and 2, with a running average; heavy ball and decay as in rf_rmsprop
    """
    formula = "d = heavy ball of [G times L_i^(-1/(2k)) on every mode + wd w]"
    defaults = {"lr": 1e-2, "momentum": 0.9, "damping": 1e-6, "lr_cov": 0.05, "weight_decay": 0.0, "update_every": 2,
                "max_dim": 2048, "graft": None, "dtype": None}
    ranges = MATRIX_RANGES | {"graft": (None, "sgd", "adam")}

    def start(self, w, h):
        graft = {"graft_sq": torch.zeros_like(w)} if h["graft"] == "adam" else {}
        return super().start(w, h) | mode_factors(w, h, L=0, R=1) | graft

    def scalars(self, h, t):
        return {"refresh": t % h["update_every"] == 0, "unbias_graft": 1 - (1 - h["lr_cov"]) ** t}

    def update(self, g, state, h, decay=0):
        x = torch.atleast_1d(g).to(state["L0"].dtype)
        k = x.dim()
        L, R = ([state[f"{letter}{i}"] for i in range(k)] for letter in "LR")
        for i in range(k):
            L[i].lerp_(second_moment(x, i, L[i].dim() == 1), h["lr_cov"])
            if h["refresh"]:
                R[i].copy_(inverse_root(L[i], 2 * k, h["damping"]))
        d = on_every_mode(x, R).reshape(g.shape).to(g.dtype)
        return self.ball(self.graft(d, g, state, h) + decay, state, h)

    def graft(self, d, g, state, h):
        """d, rescaled to the norm of another method's direction: the way is d's, the size the other's."""
        if h["graft"] is None:
            return d
        size = g                                                    # "sgd"
        if h["graft"] == "adam":
            v, b2 = state["graft_sq"], 1 - h["lr_cov"]
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            size = g / ((v / h["unbias_graft"]).sqrt() + 1e-8)
        norm = torch.linalg.vector_norm
        return d * (norm(size) / norm(d).clamp(min=torch.finfo(d.dtype).tiny))

    def objection(self, h):
        if h["damping"] == 0:
            return "damping=0: a matrix that too few gradients have filled has no inverse root. Set damping > 0"
        if not 0 < h["lr_cov"] <= 1:
            return f"lr_cov={h['lr_cov']}: the share of the newest gradient in an average. Set 0 < lr_cov <= 1"
        if h["dtype"] in (torch.bfloat16, torch.float16):
            return (f"dtype={h['dtype']}: inverse roots need float32 or float64. Rounding to {h['dtype']} makes small "
                    "eigenvalues noise, and a negative power amplifies it. if_shampoo runs in bfloat16")


def inverse_root(L, p, damping):
    """(L + damping)^(-1/p) of a symmetric positive semi-definite matrix, or of a diagonal."""
    if L.dim() == 1:
        return (L + damping) ** (-1 / p)
    identity = torch.eye(len(L), dtype=L.dtype, device=L.device)
    # Guards. The damping goes in first, since float32 LAPACK can fail on hundreds of zero rows (unused tokens). Where
    # training diverges, eigh must not be what fails. Rounding makes eigenvalues too small. An index without any
    # gradient so far must not get rounding noise.
    damped = L + damping * identity
    finite = damped.isfinite().all()
    eigenvalues, Q = torch.linalg.eigh(torch.where(finite, damped, identity))
    root = (Q * eigenvalues.clamp(min=damping) ** (-1 / p)) @ Q.T
    unseen = L.diagonal() == 0
    root.masked_fill_(unseen | unseen[:, None], 0).diagonal().masked_fill_(unseen, damping ** (-1 / p))
    return torch.where(finite, root, math.nan)


@row
class if_shampoo(HeavyBall):
    """Inverse-free Shampoo [RF]: neither roots nor inverses nor decompositions, so that all of it can run in bfloat16.

    With one mode, P = B E[g g^T] + damping is the damped curvature, and we want K with K K^T = P^-1. It minimises

        F(K) = 1/2 trace(K^T P K) - log |det K|      (up to a constant the KL divergence of N(0, K K^T) from N(0, P^-1))

    A step K <- K exp(N) keeps K invertible. At N = 0 the gradient of F with respect to N is K^T P K - I. H is half of
    it, and takes matrix products alone. Where H = 0, K K^T is the inverse of P, and nothing was inverted. With more
    modes, and d_i the size of mode i, each K_i takes this step while the others are held fixed. On a preconditioner
    step, with A = sqrt(B) G times K_i on every mode:

        H_i = 1/2 [ A_(i) A_(i)^T / (product of the other d_j)  +  damping c_i K_i^T K_i  -  I ]
        c_i = product over the other modes of  ||K_j||^2 / d_j
        M_i <- rho M_i + (1-rho) H_i                                    rho = riemannian_momentum
        K_i <- K_i - lr_cov lr_cov_scale / max(1, ||M_i||) K_i M_i      matrix exponential, to first order

    and at every step  d = G times K_i K_i^T on every mode,  then heavy ball on d + decay.

    State    K0, K1, .. = I and M0, M1, .. = 0 at first; momentum_buffer; all of it in `dtype`
    Options  update_every: the gap between preconditioner steps in the long run. Early gaps are shorter (`refreshes`).
             lr_cov_scale: a factor of lr_cov, given in a group. `build` gives 0.25 to parameters with 1 dim (the
             authors to all whose name holds norm, proj or bias).  dtype: of the whole recursion; None: the
             parameter's, float32 at least. float16 overflows where bfloat16 does not.  damping=0: K grows for ever
             along directions that no gradient ever shows
    Units    as in rf_rmsprop: with one mode, d is a Newton step
    Source   [RF], as in the authors' code (their beta2 is riemannian_momentum). The paper has an A_i for each mode; all
             of them are this A, unfolded along mode i
    """
    formula = "d = heavy ball of [G times K_i K_i^T on every mode + wd w]"
    defaults = {"lr": 1e-3, "momentum": 0.9, "damping": 1e-4, "lr_cov": 0.1, "riemannian_momentum": 0.5,
                "weight_decay": 0.0, "update_every": 2, "batch_size": None, "dtype": None, "max_dim": 2048,
                "lr_cov_scale": 1.0}
    ranges = MATRIX_RANGES | {"riemannian_momentum": "[0, 1)", "lr_cov_scale": "[0, inf)"}
    contribution = newton_contribution      # exact where the noise has no structure: H_i = 0 makes K_i a multiple of I

    def start(self, w, h):
        ball = {name: m.to(h["dtype"] or w.dtype) for name, m in super().start(w, h).items()}
        return ball | mode_factors(w.squeeze(), h, K=1, M=0)

    def scalars(self, h, t):
        return {"refresh": refreshes(t - 1, h["update_every"])}

    def update(self, g, state, h, decay=0):
        if g.numel() == 0:
            return self.ball(g + decay, state, h)
        x = torch.atleast_1d(g.squeeze()).to(state["K0"].dtype)
        K, M = ([state[f"{letter}{i}"] for i in range(x.dim())] for letter in "KM")
        if h["refresh"]:
            for m, new in zip(M, self.descent(on_every_mode(x * math.sqrt(h["batch_size"]), K), K, h["damping"])):
                m.lerp_(new, 1 - h["riemannian_momentum"])
            for k, m in zip(K, M):
                step_size = h["lr_cov"] * h["lr_cov_scale"] / torch.linalg.vector_norm(m).clamp(min=1)
                k.addcmul_(k * m if k.dim() == 1 else k @ m, step_size, value=-1)
        # An overflow guard: max(1, sqrt(max|K|)) is taken out of K before it meets x, and put back at the end.
        big = [k.abs().amax().sqrt().clamp(min=1) for k in K]
        small = [k / b for k, b in zip(K, big)]
        x = on_every_mode(on_every_mode(x, small), [k.t() for k in small]) * math.prod([b**2 for b in big])
        return self.ball(x.reshape(g.shape) + decay, state, h).to(g.dtype)

    def descent(self, A, K, damping):
        """[H_i]. Factors of the sum go into the products, since each pass over the d_i^2 entries of K_i takes time."""
        H = []
        for i, k in enumerate(K):
            rest, c = A.numel() / len(k), 1                         # products over the other modes:
            for other in K[:i] + K[i + 1:]:                         # of d_j, and of ||K_j||^2 / d_j
                c = c * torch.linalg.vector_norm(other) ** 2 / len(other)
            curvature, damped = second_moment(A, i, k.dim() == 1), k * (damping * c / 2) ** 0.5
            if k.dim() == 1:
                H.append(curvature / (2 * rest) + damped * damped - 0.5)
            else:
                H.append(curvature.addmm_(damped.T, damped, beta=1 / (2 * rest)))
                H[-1].diagonal().sub_(0.5)                          # minus I / 2
        return H


def refreshes(t, update_every):
    """Is t = 0, 1, .. a preconditioner step of if_shampoo? Often at first, seldom later: the one after step t comes
    min(max(floor(log_4(t + 1)), 1), update_every) steps on: every step to 15, every 2nd to 63, every 3rd to 255, ..."""
    at = 0                                          # the first preconditioner step of a stretch with equal gaps
    for k in itertools.count(1):
        gap, border = min(k, update_every), 4 ** (k + 1) - 1
        if t < border:
            return t >= at and (t - at) % gap == 0
        at += math.ceil((border - at) / gap) * gap


# Exercise 9. Let one weight have gradients g of constant size, with B = 1. Find the minimum of F(K) by hand. What is d
# there, without momentum? Compare with rf_rmsprop.


# ----------------------------------------------------------------------------------------------------------------------
# What does not fit: direction and geometry do not quite separate, and the exceptions are half of the lesson
#
#   1. Under the plain geometry decay enters in three places. It is decoupled (adamw, lion, rf_adamw, muon), or part of
#      the gradient (sgd, adam, rmsprop), or added after the preconditioner and before the heavy ball (rf_rmsprop, both
#      Shampoos). The rotational geometry only reads an angle from it (and adam's v sees it). The modular one shrinks
#      the weight afterwards, whatever the direction.
#   2. The rotational geometry needs two numbers of the direction, kappa and gain.
#   3. Biases and gains are no neurons. They use the plain geometry, whatever the optimizer is called.
#   4. The root-free directions need the number of examples that the loss is a mean over.
#   5. The modular geometry needs the whole architecture. The model states it (`modular_tree`), and `build` reads it.
#   6. Two directions change with the geometry: adam when it turns, and sgd and adam under the modular norm (`warm_sgd`,
#      `warm_adam`).
#   7. Muon is for matrices. Vectors take adamw's direction. So do embeddings, where `build` makes the groups.
# ----------------------------------------------------------------------------------------------------------------------


# ======================================================================================================================
# 10. The optimizer. No new mathematics from here on, mostly bookkeeping
# ======================================================================================================================

PLAIN, ROTATIONAL, MODULAR = Plain(), Rotational(), Modular()

# The values that are allowed, or an interval: of a number, of a whole number, of each of two. NaN lies in no interval.
RANGES = {
    "lr": "[0, inf)", "weight_decay": "[0, inf)", "eps": "[0, inf)", "momentum": "[0, 1)", "alpha": "[0, 1)",
    "betas": "two numbers in [0, 1)", "compile": (True, False),
    "batch_size": "(0, inf): the number of examples (or tokens) that the loss is a mean over",
    "update_norm_decay_factor": "[0, 1)", "rotational_eps": "[0, inf)", "per_neuron": (True, False),
    "zero_mean": (True, False), "rotational": (None, True, False),
    "share": "[0, inf)", "norm": ("spectral", "rows"), "scale": "None or in (0, inf)",
    "seed": "a whole number in [0, 9e18)",
}


def in_range(value, allowed):
    """Does a value lie in a range of RANGES?"""
    if isinstance(allowed, tuple):
        return any(value is choice or isinstance(value, str) and value == choice for choice in allowed)
    words, above, low, high, below = interval(allowed)
    if value is None:
        return words == "None or in"
    numbers, count = (value, 2) if words == "two numbers in" else ([value], 1)
    return len(numbers) == count and all(
        above(x, low) and below(x, high) and (words != "a whole number in" or isinstance(x, int)) for x in numbers)


@functools.cache
def interval(text):
    """A range in words -> the words in front of it, and its two ends, each with the comparison that it takes."""
    words, opening, low, high, closing = re.match(r"(.*?) ?([\[(])(\S+), (\S+)([\])])", text).groups()
    above = operator.ge if opening == "[" else operator.gt
    below = operator.le if closing == "]" else operator.lt
    return words, above, float(low), float(high), below


# Options of torch.optim that change the method. A group may carry them if they are off.
NOT_OFFERED = {"maximize", "amsgrad", "nesterov", "differentiable", "dampening", "centered", "momentum_decay",
               "decoupled_weight_decay"}


def name_of(group, i, index):
    """What to call parameter i of a group: the name it came with (pass model.named_parameters() to have them)."""
    names = group.get("param_names", ())
    return names[i] if i < len(names) else f"parameter {i} of group {index}"


class Optimizer(torch.optim.Optimizer):
    """A direction followed by a geometry: the base class of every optimizer here, not meant to be used directly.

    Subclasses set `direction` and `geometry`. What a torch.optim.Optimizer can do, they can do: groups, schedulers,
    closures, state_dict, pickle, deepcopy. All state is in self.state[p], as tensors or plain numbers, in float32 or
    the parameter's type, whichever is wider (unless `dtype` says otherwise). `step` there counts the steps in which p
    had a gradient. Parameters without one are left alone, and so is their state. A step with lr = 0 changes no weight
    (but a first step may centre neurons).

    Groups may be edited in mid-run, by hand or by a scheduler. Every step checks their values as the constructor did.
    A parameter's first step settles what its state looks like, and weights are centred only once. So per_neuron,
    rotational, zero_mean, norm, graft, dtype, max_dim and use_muon must not change afterwards. Keys that are no
    hyperparameter are kept, and mean nothing here.

    On the CPU the same gradients give the same weights, to the bit. On CUDA gradients themselves can differ from run to
    run, since some backward passes add with atomics: see torch.use_deterministic_algorithms.

    compile=True: the step goes through torch.compile. lr may then change at every step. A change of another
    hyperparameter compiles anew, and after some eight of those torch gives up and runs the step eagerly. Another set of
    parameters that have a gradient compiles anew, too, without such a limit. (torch.compile around step() itself would
    compile anew in each of the first steps, and give up.)

    Args     params: parameters, (name, parameter) pairs or groups. hyper: the factors' hyperparameters, and compile
    Errors   TypeError for an unknown argument. ValueError for values out of range, misspelt keys in a group, parameters
             or gradients of another kind, a checkpoint of another model or kind of optimizer
    """
    direction = None
    geometry = PLAIN
    overrides = {}                                  # defaults of the pair that differ from its factors'

    def __init_subclass__(cls, **keywords):
        """help() and pop-ups show the formulas of both factors, and the arguments that __init__ takes as **hyper."""
        super().__init_subclass__(**keywords)
        if cls.direction:
            parts = [vars(cls).get("__doc__"), f"Direction {cls.direction.name}", cls.direction.__doc__,
                     f"Geometry {cls.geometry.name}", cls.geometry.__doc__]
            cls.__doc__ = "\n\n".join(inspect.cleandoc(part) for part in parts if part)
            cls.__signature__ = None if "__init__" in vars(cls) else cls._signature()

    @classmethod
    def takes(cls):
        """Every hyperparameter of the class, with its default."""
        return cls.direction.defaults | cls.geometry.defaults | cls.overrides | {"compile": False}

    @classmethod
    def _signature(cls):
        Parameter, own = inspect.Parameter, cls.direction.defaults
        return inspect.Signature([Parameter("params", Parameter.POSITIONAL_OR_KEYWORD)] + [
            Parameter(key, Parameter.POSITIONAL_OR_KEYWORD if key in own else Parameter.KEYWORD_ONLY, default=default)
            for key, default in cls.takes().items()])

    def __init__(self, params, *values, **hyper):
        for key in sorted(hyper.keys() - self.takes().keys()):
            self._refuse(f"takes no {key}{self._meant(key)}; it takes {', '.join(self.takes())}", TypeError)
        hyper = self._signature().bind(params, *values, **hyper).arguments
        self._constructing = True                   # check all groups before any weight is touched
        super().__init__(hyper.pop("params"), self.takes() | hyper)
        del self._constructing
        for group in self.param_groups:
            self._prepare(group)

    def add_param_group(self, param_group):
        """Add a group and check it. The rotational geometry centres its neurons here (once, silently: zero_mean)."""
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()                 # a refused group leaves no trace
            raise
        if not hasattr(self, "_constructing"):
            self._prepare(self.param_groups[-1])

    @torch.no_grad()
    def _prepare(self, group):
        for p in group["params"]:
            if p.requires_grad:                     # a frozen one is prepared when it is thawed, before its first step
                self.geometry_of(p, group).prepare(p, group)

    def _refuse(self, words, kind=ValueError):
        raise kind(f"{type(self).__name__}: {words}")

    def _meant(self, key):
        """': did you mean ...?' for a misspelt hyperparameter, '' for a word of its own."""
        for near in difflib.get_close_matches(key.lower(), self.takes(), n=1, cutoff=0.85):
            if not set(near.split("_")) < set(key.lower().split("_")):          # max_weight_decay is a word of its own
                return f": did you mean {near!r}?"
        return ""

    @classmethod
    def _variants(cls, group):
        """Keys by which a group asks for another method."""
        return {key for key in NOT_OFFERED if group.get(key) and key not in cls.takes()
                and not (key == "decoupled_weight_decay" and cls.direction.decoupled)}

    def _check_values(self, index):
        group = self.param_groups[index]
        for key in self.takes():
            allowed = self.direction.ranges.get(key, RANGES.get(key))
            if allowed is None:
                self._refuse(f"nobody has said which values {key} may have: add them to the `ranges` of its row")
            try:                                    # torch's LinearLR(end_factor=0) may end at lr = -1e-18
                good = in_range(group[key] + 1e-12 if key == "lr" else group[key], allowed)
            except (TypeError, ValueError, RuntimeError, AttributeError):       # a value of another kind altogether
                good = False
            if not good:
                kind = "one of " if isinstance(allowed, tuple) else "a number in " * (allowed[0] in "[(")
                self._refuse(f"{key}={group[key]!r} in parameter group {index}: must be {kind}{allowed}")
        for key in self._variants(group):
            self._refuse(f"{key} in parameter group {index} is not offered here: leave it out")
        if objection := self.direction.objection(group):
            self._refuse(objection)

    def _check_group(self, index):
        self._check_values(index)
        group = self.param_groups[index]
        for key in group.keys() - self.takes().keys():
            if key not in NOT_OFFERED and (meant := self._meant(key)):
                self._refuse(f"unknown key {key!r} in parameter group {index}{meant}")
        for i, p in enumerate(group["params"]):
            if torch.nn.parameter.is_lazy(p):
                self._refuse(f"{name_of(group, i, index)} has no shape yet: run the model once first")
            if p.requires_grad:                     # a frozen one is checked before its first step
                self._check_parameter(p, group, name_of(group, i, index))

    def _check_parameter(self, p, group, name):
        direction, geometry, kind = self.direction_of(p, group), self.geometry_of(p, group), type(p.detach())
        if p.layout is not torch.strided:
            objection = f"is {p.layout}: make it dense"
        elif any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride())):
            objection = "is expanded: several of its entries are one number in memory. Store a clone()"
        elif not p.is_floating_point():
            objection = f"is {p.dtype}, no real floating point. Store a complex one by torch.view_as_real"
        elif kind is not torch.Tensor and (geometry is MODULAR or not direction.by_entry):
            objection = (f"is a {kind.__name__}, but this update needs whole matrices, as plain tensors. Use "
                         "DistributedDataParallel, or an optimizer whose updates go by entry or row")
        else:
            objection = geometry.objection(direction, p, group)
        if objection:
            self._refuse(f"{name} {tuple(p.shape)} {objection}")

    def geometry_of(self, p, group):
        """The geometry of a parameter: that of the class, or the plain one for biases, gains and what a group exempts.
        A parameter's first step settles it for good: a decay that a schedule brings down to 0 must end in an angle of
        0, not in a sudden change of geometry. So a decay schedule must start above 0. Otherwise the weight keeps the
        plain rule for the whole run."""
        state, marker = self.state.get(p, {}), self.geometry.marker
        mine = marker in state if marker and "step" in state else self.geometry.applies(p, group)
        return self.geometry if mine else PLAIN

    def direction_of(self, p, group):
        """The direction of a parameter: that of the class, or the row that takes what the class's is not meant for."""
        return self.direction if self.direction.applies(p, group) else self.direction.instead

    @torch.no_grad()
    def step(self, closure=None):
        """One step. `closure`, if given, recomputes the loss (and the gradients) and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(index, group, i, p) for index, group in enumerate(self.param_groups)
                  for i, p in enumerate(group["params"]) if p.grad is not None]
        for index in range(len(self.param_groups)):             # refuse before anything has moved
            self._check_values(index)                           # schedules and people edit groups in mid-run
        for index, group, i, p in moving:
            if p.grad.layout is not torch.strided:
                self._refuse(f"{name_of(group, i, index)} has a sparse gradient, which is not supported: build "
                             "nn.Embedding with sparse=False")
            if "step" not in self.state.get(p, {}):             # it may have been overwritten since the constructor
                self._check_parameter(p, group, name_of(group, i, index))
        eager, compiled, hyper_at = [], [], {}
        for index, group, _, p in moving:
            direction, geometry, state = self.direction_of(p, group), self.geometry_of(p, group), self.state[p]
            if "step" not in state:
                geometry.prepare(p, group)
                w = working_copy(p)
                state.update(direction.start(w, group) | geometry.start(w, group) | state | {"step": 0})
            if isinstance(direction, HeavyBall) and group["momentum"] and "momentum_buffer" not in state:
                state["momentum_buffer"] = direction.start(working_copy(p), group)["momentum_buffer"]
            state["step"] += 1
            key = index, direction, geometry, state["step"], p.device
            if key not in hyper_at:                 # parameters with the same step count share one dict of numbers
                hyper_at[key] = self._hyper(direction, geometry, group, state["step"], p.device)
            averages = {name: x for name, x in state.items() if name != "step" and torch.is_tensor(x)}
            work = compiled if group["compile"] else eager
            work.append((direction, geometry, p.detach(), p.grad, averages, hyper_at[key]))
        with full_precision(eager + compiled):
            update(blocks(eager))
            update_compiled(compiled)
        for _, geometry, p, _, _, h in eager + compiled:
            if not is_wide(p):
                geometry.prepare(p, h)              # their coarse rounding would move neurons off centre
        return loss

    def _hyper(self, direction, geometry, group, t, device):
        """The hyperparameters as the formulas see them at step t. For compiled code those that change from step to step
        are 0-d tensors, which it reads instead of baking them in. torch.full fills them on the device itself, so
        nothing waits for a copy. (MPS has no float64.)"""
        h, lr = {key: group[key] for key in self.takes()}, group["lr"]
        if torch.is_tensor(lr):                     # in bfloat16, 1 - lr wd would be 1
            h["lr"] = lr.reshape(()).to(torch.promote_types(lr.dtype, torch.float32))
        else:
            h["lr"] = float(lr)
        h = h if direction is self.direction else self.direction.for_others(h)
        changing = {"lr": h["lr"], **direction.scalars(h, t), **geometry.scalars(direction, h, t)}
        if group["compile"]:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            changing = {key: x if isinstance(x, (bool, torch.Tensor)) else torch.full((), x, dtype=dtype, device=device)
                        for key, x in changing.items()}
        return h | changing

    def load_state_dict(self, state_dict):
        """As in torch, with four differences. Where both sides know the parameters' names (build, named_parameters),
        state goes by name. State keeps its precision, which torch rounds to the parameter's type. `compile` stays as it
        is here. A checkpoint with other hyperparameters, averages or shapes is refused. (Those of adam, adamw and
        torch's RAdam are alike.)"""
        loaded, compiled = [], [group["compile"] for group in self.param_groups]

        def match(self, state_dict):                # after the user's own hooks
            state_dict = self._by_name(state_dict)
            loaded.extend(self._check_state(state_dict))
            return state_dict

        def mend(self):                             # before the user's own hooks
            for group, own in zip(self.param_groups, compiled):
                group["compile"] = own
            for p, state in self.state.items():     # torch's SGD without momentum may have a buffer None
                self.state[p] = {key: x for key, x in state.items() if x is not None}
            for p, key, value, dtype in loaded:
                self.state[p][key] = int(value) if key == "step" else value.to(p.device, dtype, copy=True)

        with (self.register_load_state_dict_pre_hook(match),
              self.register_load_state_dict_post_hook(mend, prepend=True)):
            super().load_state_dict(state_dict)

    def _by_name(self, state_dict):
        """The same state_dict, its groups and parameters in the order that they have here."""
        saved, ours = state_dict["param_groups"], self.param_groups
        if not all(len(group.get("param_names", ())) == len(group["params"]) for group in [*saved, *ours]):
            return state_dict
        numbers = {name: n for group in saved for name, n in zip(group["param_names"], group["params"])}
        if strange := numbers.keys() ^ {name for group in ours for name in group["param_names"]}:
            self._refuse("this state_dict was saved for another model: only one of the two has "
                         f"{', '.join(sorted(strange))}. (Is one of them wrapped, with names like 'module.x'?)")
        holding = {frozenset(group["param_names"]): group for group in saved}
        if holding.keys() != {frozenset(group["param_names"]) for group in ours}:
            self._refuse("this state_dict has the same parameters in other groups: make the groups as they were. "
                         "(Call `build` before you load the weights, as in the first run)")
        return state_dict | {"param_groups": [
            holding[frozenset(names)] | {"params": [numbers[name] for name in names], "param_names": [*names]}
            for names in (group["param_names"] for group in ours)]}

    def _check_state(self, state_dict):
        """-> (parameter, key, tensor, the type it is to have) for all of a state_dict that fits this optimizer."""
        takes, known = self.takes().keys(), RANGES.keys() | {key for row in DIRECTIONS.values() for key in row.ranges}
        for index, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"])):
            own = group.keys() - takes | {"compile"}            # a user's own keys, whatever they are called
            own |= NOT_OFFERED - takes - self._variants(saved)  # torch.optim's
            if not MODULAR.defaults.keys() <= saved.keys():
                own |= MODULAR.defaults.keys() - takes          # "scale", say, is an everyday word
            if strange := (takes ^ (saved.keys() & (known | NOT_OFFERED))) - own:
                self._refuse("this state_dict was saved by another optimizer: only one of the two has "
                             f"{', '.join(sorted(strange))}")
            for i, (p, number) in enumerate(zip(group["params"], saved["params"])):
                w = working_copy(p.detach()).to("meta")         # what the state would look like, without its memory
                averages, entries = self.direction_of(p, saved).start(w, saved), state_dict["state"].get(number, {})
                like, name = averages | self.geometry.start(w, saved), name_of(group, i, index)
                missing = averages.keys() - entries.keys() - {"momentum_buffer"}        # that may come in mid-run
                if entries and missing:
                    self._refuse("this state_dict was saved by another optimizer: it has no "
                                 f"{', '.join(sorted(missing))} of {name}")
                for key, value in entries.items():
                    if not torch.is_tensor(value):
                        continue
                    if key in like and value.shape != like[key].shape:
                        self._refuse(f"this state_dict was saved for another model: {key} of {name} {tuple(p.shape)} "
                                     f"is {tuple(value.shape)} in it")
                    yield p, key, value, like[key].dtype if key in like else w.dtype


# ----------------------------------------------------------------------------------------------------------------------
# Speed. Skip this at first: the same numbers, sooner
# ----------------------------------------------------------------------------------------------------------------------


def update(work):
    """One step for each (direction, geometry, p, g, state, h) of `work`: the three lines of the first page. Eager and
    compiled runs both go through here. Low-precision parameters are moved in float32 and rounded once, at the end."""
    for direction, geometry, p, g, state, h in work:
        w = working_copy(p)
        g = g.to(w.dtype)
        decay = geometry.decay(direction, w, h)
        d = direction.update(g, state, h, decay)
        geometry.move(w, d, state, h)
        if w is not p:
            p.copy_(w)


def is_wide(p):
    """Is p precise enough to be moved in place? Averages and small steps drown in the 8 bits of a bfloat16."""
    return p.dtype in (torch.float32, torch.float64)


def working_copy(p):
    """p itself if it is wide, else a float32 copy."""
    return p if is_wide(p) else p.float()


@contextlib.contextmanager
def full_precision(work):
    """No autocast, and no tf32 or bfloat16 inside float32 products of matrices, whatever surrounds the step."""
    products = any(geometry is MODULAR or not direction.by_entry for direction, geometry, *_ in work)
    with contextlib.ExitStack() as stack:
        for device in filter(torch.amp.is_autocast_available, {p.device.type for _, _, p, *_ in work}):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if products else ():
            # "none" inherits the value of torch.backends. A value of its own that equals it passes for inherited.
            found, backend.fp32_precision = backend.fp32_precision, "none"
            inherited, backend.fp32_precision = backend.fp32_precision, "ieee"
            stack.callback(setattr, backend, "fp32_precision", "none" if found == inherited else found)
        yield


def block_size(geometry, device, compiled):
    """How many entries to work on at a time. On a CPU a block's intermediate results stay in the cache; those of a
    whole embedding would go through memory. (A call of compiled code costs more: larger blocks.) On a GPU blocks only
    save memory. Compiled code is not cut there, nor where it has no intermediate results, as under `plain`."""
    if compiled and (geometry is PLAIN or device.type != "cpu"):
        return sys.maxsize
    if device.type == "cpu":
        return 2**20 if compiled else 2**18
    return 2**23


def blocks(work, compiled=False):
    """`work` with its large tensors cut into blocks of rows, wherever the update of a row depends on that row alone.
    (Rows cut from a tensor of FSDP, which lies on several machines, would be copies.)"""
    for direction, geometry, p, g, state, h in work:
        most = block_size(geometry, p.device, compiled)
        rowwise = type(p) is torch.Tensor and direction.by_entry and geometry.by_row(h)
        if p.numel() <= most or not rowwise:
            yield direction, geometry, p, g, state, h
            continue
        rows = max(1, most * len(p) // p.numel())
        for i in range(0, len(p), rows):
            cut = {key: s[i:i + rows] if s.dim() else s for key, s in state.items()}       # 0-d: a user's own
            yield direction, geometry, p[i:i + rows], g[i:i + rows], cut, h


def update_compiled(work):
    """`update` through torch.compile: all small tensors in one piece of code, and each block of a large one."""
    small, large = [], []
    for direction, geometry, p, g, state, h in work:
        if p.dim() == 0:                            # a CPU's compiled code loses what it writes to 0-d float64
            p, g, state = p.view(1), g.view(1), {key: s.view(1) if s.dim() == 0 else s for key, s in state.items()}
        job = direction, geometry, p, g, state, h
        (small if p.numel() <= block_size(geometry, p.device, compiled=True) else large).append(job)
    for batch in filter(None, [small, *([job] for job in blocks(large, compiled=True))]):
        compiled_update(tuple((direction, geometry, p.shape) for direction, geometry, p, *_ in batch))(batch)


@functools.cache
def compiled_update(kinds):
    """torch.compile of `update` for parameters of these kinds: direction, geometry, shape. torch.compile allows some
    eight versions of one code object, so each kind gets a copy of it."""
    own = types.FunctionType(update.__code__.replace(co_name=f"update_{kinds[0][0].name}"), globals())
    # On a CPU torch's compiler (2.11 to 2.13) fails (KeyError 'buf1') on the loops of an embedding under `modular`
    # if it may fuse loops that stand side by side. GPUs do not know the option.
    options = {"cpp.max_horizontal_fusion_size": 1} if any(kind[1] is MODULAR for kind in kinds) else {}
    return torch.compile(own, dynamic=False, options=options)


# ======================================================================================================================
# 11. The named optimizers, the registry, `build`, `table`
#
# The formulas stand at the directions and geometries, and help() shows them with each class. A class says what is
# particular to the pair. "Settles" means the equilibrium of a random walk (section 5), and the angle is in radians a
# step.
# ======================================================================================================================


class SGD(Optimizer):
    """Equal to torch.optim.SGD (no dampening, no Nesterov).
    Settles at ||w||^2 = lr E||g||^2 / (2 wd (1-mu)) and an angle of sqrt(2 lr wd / (1+mu))."""
    direction = DIRECTIONS["sgd"]


class Adam(Optimizer):
    """Equal to torch.optim.Adam: L2 regularisation, divided by the gradient's RMS.
    Settles at ||w||^2 = lr C sigma / (2 wd) and an angle of sqrt(2 lr wd (1-b1) / ((1+b1) sigma)). Both depend on the
    gradient's size sigma. Layers with large gradients turn slowly, others fast. AdamW has no such imbalance."""
    direction = DIRECTIONS["adam"]


class AdamW(Optimizer):
    """Equal to torch.optim.AdamW: decoupled decay. w forgets its past in 1 / (lr * weight_decay) steps.
    Settles at ||w||^2 = lr C / (2 wd) and an angle of sqrt(2 lr wd (1-b1) / (1+b1)), whatever the gradient's size."""
    direction = DIRECTIONS["adamw"]


class Lion(Optimizer):
    """Every weight moves by the same amount, lr.
    Settles at ||w||^2 = lr C / (pi wd S) and an angle of sqrt(pi lr wd S), S = (1-b1)^2 + b1^2 (1-b2) / (1+b2)."""
    direction = DIRECTIONS["lion"]


class RMSProp(Optimizer):
    """Equal to torch.optim.RMSprop (not centered).
    Settles at ||w||^2 = lr C sigma / (2 wd (1-mu)) and an angle of sqrt(2 lr wd / ((1+mu) sigma))."""
    direction = DIRECTIONS["rmsprop"]


class Muon(Optimizer):
    """For all parameters of a model: matrices by muon, the others by adamw (use_muon, in a group). With
    dtype=torch.bfloat16 equal to torch.optim.Muon for what is a matrix.
    Settles ("original") near ||w|| = sqrt(lr / (2 wd S)) and an angle of sqrt(2 lr wd S), S from `muon.power`, whatever
    the gradient's size. For matrices of 1 : 4 to 1 : 1, of 64 rows and columns or more, ||w|| is smaller than that by 6
    to 30 %, and the angle larger by 4 to 23 % (`muon.on_noise`)."""
    direction = DIRECTIONS["muon"]


class RotationalSGD(Optimizer):
    """Neurons turn by sqrt(2 lr wd / (1+mu)) radians a step."""
    direction, geometry = DIRECTIONS["sgd"], ROTATIONAL
    overrides = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


class RotationalAdamW(Optimizer):
    """Neurons turn by sqrt(2 lr wd (1-b1) / (1+b1)) radians a step."""
    direction, geometry = DIRECTIONS["adamw"], ROTATIONAL


class RotationalAdam(Optimizer):
    """The angle of RotationalAdamW: the experiment of [RE], section 5.3, on what makes AdamW better than Adam+L2. The
    L2 term, seen by v alone, still distorts how the entries of d are scaled against each other, but not how far a
    neuron turns. Where this does as well as AdamW, balance was what mattered."""
    direction, geometry = DIRECTIONS["adam"], ROTATIONAL


class RotationalLion(Optimizer):
    """Neurons turn by sqrt(pi lr wd S) radians a step, S as in Lion."""
    direction, geometry = DIRECTIONS["lion"], ROTATIONAL
    overrides = {"weight_decay": 1.0}


class RotationalMuon(Optimizer):
    """Neurons of matrices turn by sqrt(2 lr wd S) radians a step, S from `muon.power`: by less than under plain Muon,
    see there. Rows of embeddings (use_muon=False) turn as under RotationalAdamW with the learning rate adamw_lr_scale *
    lr. `adjust` is not felt, since the angle says how far."""
    direction, geometry = DIRECTIONS["muon"], ROTATIONAL
    overrides = {"weight_decay": 0.1}


class ModularSGD(Optimizer):
    """One learning rate for every width and depth: tune it on a small model."""
    direction, geometry = warm_sgd(), MODULAR


class ModularAdam(Optimizer):
    """Adam's direction, and one learning rate for every width and depth."""
    direction, geometry = warm_adam(), MODULAR


class ModularMuon(Optimizer):
    """All singular values of Muon's direction are about equal already. So for a Linear this geometry does little more
    than to share the update out among the layers. It makes the singular values sqrt(out/in), which is less than Muon's
    own where out < in. Embeddings take adamw's direction, rescaled row by row. (For a Conv it measures each kernel
    position, where muon takes all of them for one matrix.)"""
    direction, geometry = DIRECTIONS["muon"], MODULAR
    overrides = {"adamw_lr_scale": 1.0}             # embeddings are rescaled anyway, `build` gives vectors 0.01 lr


class RootFreeRMSProp(Optimizer):
    """A diagonal second-order method. RMSProp gives all weights steps of one size, this one gives large gradients SMALL
    steps. The authors' best lr lies between AdamW's and SGD's on convolutional networks, and below AdamW's on
    transformers. B is batch_size, the number of examples (in a language model: tokens) that the loss is a mean over.
    Settles at ||w||^2 = lr C / (2 wd (1-mu)) * (sigma / (B sigma^2 + eps))^2 and an angle of sqrt(2 lr wd / (1+mu))."""
    direction = DIRECTIONS["rf_rmsprop"]


class RootFreeAdamW(Optimizer):
    """AdamW as a diagonal second-order method. batch_size: see RootFreeRMSProp.
    Settles at ||w||^2 = lr C / (2 wd) * (sigma / (B sigma^2 + eps))^2 and an angle of sqrt(2 lr wd (1-b1) / (1+b1))."""
    direction = DIRECTIONS["rf_adamw"]


class Shampoo(Optimizer):
    """The baseline with roots. Damping 0, lr_cov 0 or above 1, and dtype bfloat16 or float16 are refused, since no root
    survives them. Memory: 2 matrices d_i x d_i per mode (vectors beyond max_dim), and tensors of w's shape."""
    direction = DIRECTIONS["shampoo"]


class InverseFreeShampoo(Optimizer):
    """Shampoo in bfloat16, if need be: `dtype` is that of its state, and weights keep their own. Memory as in Shampoo.
    Settles as RootFreeRMSProp with damping for eps, where gradients are noise without structure."""
    direction = DIRECTIONS["if_shampoo"]


def pair_name(direction, geometry):
    """What the command line calls a pair."""
    return f"{geometry.name}_{direction.name}".removeprefix("plain_")


NAMED = {pair_name(kind.direction, kind.geometry): kind for kind in Optimizer.__subclasses__()}


def compose(direction, geometry):
    """A class for a pair that has none of its own: OPTIMIZERS has one for every pair.

    Args     direction: a row, as in DIRECTIONS;  geometry: PLAIN, ROTATIONAL or MODULAR
    """
    title = NAMED[direction.name].__name__ if direction.name in NAMED else direction.name.title().replace("_", "")
    return type(title if geometry is PLAIN else geometry.name.title() + title, (Optimizer,), {
        "direction": direction, "geometry": geometry, "__module__": __name__})


OPTIMIZERS = {}
for _direction, _geometry in itertools.product(DIRECTIONS.values(), (PLAIN, ROTATIONAL, MODULAR)):
    _name = pair_name(_direction, _geometry)
    if _name != "modular_adamw":                    # decay is the geometry's there, so it would be modular_adam
        OPTIMIZERS[_name] = NAMED.get(_name) or compose(_direction, _geometry)
        globals()[OPTIMIZERS[_name].__name__] = OPTIMIZERS[_name]               # pickle looks for classes by name


def find_optimizer(name):
    """The class behind a name of OPTIMIZERS, or a ValueError that suggests the nearest one."""
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(str(name), OPTIMIZERS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown optimizer {name!r}: did you mean {near!r}? There are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def build(name, model, *, tree=None, no_decay=(), **hyper):
    """The optimizer `name` for all trainable parameters of a model, with the usual rule for each of them.

        2 dims and more (Linear, Conv, Embedding)    decay; turned, where the geometry is rotational
        the same, but with a neuron that can't turn  all of it: decay under the plain rule (a neuron of one weight, or
                                                     of zeros, as an Embedding's padding_idx has: group it by hand to
                                                     have the others turn). `table` shows why
        1 dim and less (biases, gains, norms)        no decay, plain rule: without neurons there is no equilibrium, and
                                                     decay would only make them smaller

    Embeddings count as matrices: the row of a token is a neuron. ([RE]'s GPT2-124M runs on OpenWebText did the same,
    its Wikitext runs left them out.) Tied weights are one parameter. Muon leaves embeddings, and a head tied to one, to
    adamw. An embedding is a list of vectors and no map, and a step touches few of them. (The authors leave an untied
    head to AdamW, too: use_muon=False in a group.) In a ConvTranspose dim 0 is the input, so its filters are no
    neurons: exempt it if that matters.

    Under a modular geometry model.modular_tree(), or `tree`, gives each weight of 2 dims or more a norm, a scale and
    its share. Biases and gains take the plain rule with a hundredth of lr: a modular lr (0.1 to 2) is relative to the
    norm of a whole weight, and far too large a step for a single number. (Schedulers that set one lr for all groups,
    OneCycleLR and SWALR, take a list, too.)

    Args     model: an nn.Module. Parameters with requires_grad=False are left out: thaw first, or add_param_group later
             tree: the Tree of a model without a method modular_tree
             no_decay: names of parameters, or patterns like "*.pos_embed", that get no decay and do not turn
             hyper: of the class, OPTIMIZERS[name], but for what these rules decide (rotational, norm, scale, share)
    Errors   ValueError, with what to give instead; TypeError for something that is no model
    """
    kind = find_optimizer(name)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"build: give it the model itself, build({name!r}, model), not its parameters")
    model = getattr(model, "_orig_mod", model)      # torch.compile's wrapper would add a prefix to all names
    if isinstance(model, torch.nn.DataParallel):
        raise ValueError(f"build: give it the network inside DataParallel: build({name!r}, model.module)")
    trainable, owner = {n: p for n, p in model.named_parameters() if p.requires_grad}, {}
    if not trainable:
        raise ValueError("build: the model has no trainable parameters")
    for n, p in trainable.items():
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(f"build: {n} has no shape yet: run the model once first")
        first = owner.setdefault((p.device, p.data_ptr()) if p.numel() and p.data_ptr() else n, n)
        if first != n:
            raise ValueError(f"build: {first} and {n} share memory but are two parameters, which would be updated "
                             "twice: tie them by assigning the same nn.Parameter to both modules")
    spared, all_names = set(), {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for pattern in [no_decay] if isinstance(no_decay, str) else no_decay:
        if not (matches := fnmatch.filter(all_names, pattern.replace("_orig_mod.", ""))):
            raise ValueError(f"build: no_decay={pattern!r} is the name of no trainable parameter")
        spared.update(all_names[n] for n in matches)
    h = kind.takes() | hyper
    for key, way in {"rotational": "no_decay=", "norm": "tree=", "scale": "tree=", "share": "tree="}.items():
        if key in kind.takes() and h[key] != kind.takes()[key]:
            raise ValueError(f"build: {key} is decided for each parameter: leave it out, or use {way}")
    if kind.geometry is ROTATIONAL and h["weight_decay"] == 0:
        raise ValueError(f"build: {name} turns neurons by an angle of kappa sqrt(2 lr weight_decay), so weight_decay=0 "
                         f"cannot rotate anything. Set weight_decay > 0, or take {kind.direction.name!r}")
    shares = modular_rules(model, tree, trainable) if kind.geometry is MODULAR else {}
    looked_up = {p for module in model.modules() if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))
                 for n, p in module.named_parameters() if "." not in n or n.startswith("parametrizations.")}
    groups = {}
    for n, p in sorted(trainable.items(), key=lambda item: item[1].dim() < 2):          # matrices first
        rule = shares.get(n, {})
        if p.dim() < 2:
            rule = {"weight_decay": 0.0}
            if kind.geometry is MODULAR and isinstance(h["lr"], (int, float, torch.Tensor)):
                rule["lr"] = 0.01 * h["lr"]
            if "lr_cov_scale" in h:                 # if_shampoo: the authors' factor; they go by names
                rule["lr_cov_scale"] = 0.25
        elif p in spared:
            rule = rule | {"weight_decay": 0.0} | ({"rotational": False} if kind.geometry is ROTATIONAL else {})
        elif kind.geometry is ROTATIONAL:
            reason = ROTATIONAL.why_stuck(p, h) if p.numel() else "it is empty"
            stuck = reason and p.isfinite().all()   # NaN is for the class to refuse
            rule = {"rotational": False, "reason": reason} if stuck else {"rotational": True}
        if "use_muon" in h and p in looked_up:
            rule = rule | {"use_muon": False}
        groups.setdefault(tuple(map(str, rule.items())), {"params": [], **rule})["params"].append((n, p))
    return kind(list(groups.values()), **hyper)


def modular_rules(model, tree, trainable):
    """{name: its norm, scale and share} of every trainable weight, as the tree has it."""
    if tree is None and not hasattr(model, "modular_tree"):
        inside = " (give the network inside the wrapper: model.module)" if hasattr(model, "module") else ""
        raise ValueError(f"build: a modular optimizer has to know the architecture, and {type(model).__name__} has no "
                         f"method modular_tree(){inside}: write one with optim.weight, optim.bond and the operators of "
                         "Tree, or give build(..., tree=...)")
    names, rules, frozen = {p: n for n, p in trainable.items()}, {}, set(model.parameters()) - set(trainable.values())
    for leaf in as_tree(model.modular_tree() if tree is None else tree).weights():
        p = leaf.layer.weight
        if not isinstance(p, torch.nn.Parameter):
            raise ValueError(f"build: the weight of {leaf.words()} is computed from other parameters (weight_norm, "
                             "parametrizations), which have no modular norm of their own: remove the parametrization")
        if p in frozen:
            continue
        if p not in names:
            raise ValueError(f"build: {leaf.words()} is in the modular tree, but not in the model")
        if names[p] in rules:
            raise ValueError(f"build: {names[p]} is in the modular tree twice: it can have only one share (where it is "
                             "tied, write the second use as a bond)")
        rules[names[p]] = {"norm": leaf.norm, "scale": leaf.scale, "share": leaf.share}
    for n, p in trainable.items():
        if p.dim() >= 2 and n not in rules:
            kind = type(model.get_submodule(n.rpartition(".")[0])).__name__
            mend = NO_NORM.get(kind, "write it there with optim.weight(layer), or set requires_grad=False")
            raise ValueError(f"build: {n} {tuple(p.shape)} of {kind} is not in the modular tree: {mend}")
    return rules


def columns(rows):
    """Rows of words as text, with the words of a column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def table(optimizer):
    """What an optimizer (of this file or of torch.optim) does with each parameter, as text: name, shape, rule, learning
    rate, decay."""
    rows = [("parameter", "shape", "rule", "lr", "weight_decay")]
    for index, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            rule, h = "plain", group
            if isinstance(optimizer, Optimizer):
                rule, direction = optimizer.geometry_of(p, group).name, optimizer.direction_of(p, group)
                if rule == "modular":
                    rule += f" {group['norm']}, share {group['share']:.4g}"
                if direction is not optimizer.direction:
                    rule, h = f"{rule}, by {direction.name}", optimizer.direction.for_others(group)
            if "reason" in group:
                rule += f": {group['reason']}"
            lr, decay = (f"{float(h[key]):g}" if key in h else "-" for key in ("lr", "weight_decay"))
            rows.append((name_of(group, i, index), "x".join(map(str, p.shape)) or "scalar", rule, lr, decay))
    return columns(rows)


# ======================================================================================================================
# 12. RotationProbe: measure what the theory predicts, on any optimizer. The lesson. The bench
# ======================================================================================================================

TORCH_TWINS = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw",
               torch.optim.RMSprop: "rmsprop", torch.optim.Muon: "muon"}


def neuron_angles(before, after, dims):
    """Angle between each neuron before and after, in radians:  2 asin(|u - v| / 2) for unit vectors u and v.
    acos(u.v) would lose all angles under 1e-4 in float32, since u.v is 1 to the last bit there."""
    u, v = before / neuron_norm(before, dims), after / neuron_norm(after, dims)
    return 2 * (neuron_norm(u - v, dims) / 2).clamp(max=1).asin()


def settling_steps(direction, h, sigma):
    """1 / (2 lr_total wd): the steps in which the distance of ||w||^2 from its equilibrium falls by the factor e. (For
    adam and rmsprop wd stands for wd / sigma.)"""
    return 1 / (2 * h["lr"] * direction.gain(h) * h["weight_decay"] * direction.pull(h, sigma))


class RotationProbe:
    """Measures how far neurons turn in one optimizer step, beside what theory predicts in equilibrium.

        probe = RotationProbe(optimizer)        # any optimizer of this file or of torch.optim
        probe.measure_next_step()               # arms it for one step; a step it is not asked about costs nothing
        optimizer.step()
        print(probe)                            # or probe.rows: a dict per parameter; probe.as_json() for a log

    Rows     name; norm: mean ||w|| of the neurons after the step; angle: mean angle turned, radians; predicted_norm,
             predicted_angle: for rotational parameters the kept norm and the angle that is set; for plain ones the
             equilibrium of a random walk with the lr and decay of this step and, where it matters, the gradient of
             this step ([RE], table 1), nan where there is no decay or no theory (modular ones, the norm of shampoo)
    Measures parameters with two dims or more that had a gradient. Memory: a copy of these, during a measured step
    """

    def __init__(self, optimizer):
        self.optimizer, self.rows, self._hooks, self._settling = optimizer, [], [], []

    def measure_next_step(self):
        """Arm the probe: the next step is measured, the ones after it are not."""
        if not self._hooks:
            self._hooks = [self.optimizer.register_step_pre_hook(self._before),
                           self.optimizer.register_step_post_hook(self._after)]

    def _before(self, optimizer, args, kwargs):
        self._copies = {p: p.detach().clone() for group in optimizer.param_groups
                        for p in group["params"] if p.dim() > 1 and not p.is_complex()}

    @torch.no_grad()
    def _after(self, optimizer, args, kwargs):
        self.rows, self._settling = [], []
        for index, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if p not in self._copies or p.grad is None or p.numel() == 0:
                    continue
                dims = neuron_dims(p, {"per_neuron": True} | group)
                before, after = working_copy(self._copies[p]), working_copy(p)
                norm, angle = self._predict(p, group, neuron_size(p, dims))
                self.rows.append({
                    "name": name_of(group, i, index), "norm": neuron_norm(after, dims).mean().item(),
                    "angle": neuron_angles(before, after, dims).nanmean().item(),       # a zero neuron has no angle
                    "predicted_norm": norm, "predicted_angle": angle})
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._copies = [], {}

    def _predict(self, p, group, C):
        """(norm, angle) in equilibrium; C weights to a neuron."""
        optimizer, geometry = self.optimizer, PLAIN
        if isinstance(optimizer, Optimizer):
            direction, geometry = optimizer.direction_of(p, group), optimizer.geometry_of(p, group)
            group = group if direction is optimizer.direction else optimizer.direction.for_others(group)
        else:
            twin = TORCH_TWINS.get(type(optimizer))
            if twin == "adam" and group.get("decoupled_weight_decay"):          # how torch spells AdamW since 2.7
                twin = "adamw"
            if twin == "muon":
                group = group | {"adjust": group["adjust_lr_fn"] or "original"}
            variant = twin and OPTIMIZERS[twin]._variants(group) - {"differentiable"}       # that moves the same way
            direction = None if variant else DIRECTIONS.get(twin)
        if direction is None or geometry is MODULAR:        # normalised updates have no equilibrium of this kind
            return math.nan, math.nan
        if geometry is ROTATIONAL:
            state = optimizer.state[p]
            angle = geometry.scalars(direction, group, state["step"])["angle"]
            return state["radius"].mean().item(), math.atan(angle)
        sigma = p.grad.to_dense().cpu().double().square().mean().sqrt().item()      # RMS entry of this step's gradient
        h = group | {"lr": float(group["lr"])}
        norm, angle = equilibrium(direction, h, C, sigma, p.shape)
        if angle > 0:                                       # not nan
            self._settling.append(settling_steps(direction, h, sigma))
        return norm, angle

    def as_json(self):
        """{name: {"norm": ..., "angle": ..., ...}}, with None for nan, which JSON lacks."""
        return {row["name"]: {key: x if math.isfinite(x) else None for key, x in row.items() if key != "name"}
                for row in self.rows}

    def __str__(self):
        lines = [f"{'parameter':32s} {'norm':>10s} {'predicted':>10s} {'angle':>10s} {'predicted':>10s}"]
        line = "{name:32s} {norm:10.4g} {predicted_norm:10.4g} {angle:10.4g} {predicted_angle:10.4g}"
        lines += [line.format(**row) for row in self.rows]
        if self._settling:
            lines.append(f"Plain weights come near their predictions after some {max(self._settling):,.0f} steps "
                         "(settling_steps).")
        return "\n".join(lines)


def random_walk(optimizer, weights, steps, sigmas=(1.0,)):
    """Feed weights of one shape with pure noise, gradients N(0, sigma^2), the same noise for all of them but its size,
    and measure. -> for each weight a list of (step, norm, angle), means over its neurons.

    Noise is the whole point. With no loss to descend, all that the neurons do is the work of optimizer and decay.
    """
    probe, traces = RotationProbe(optimizer), [[] for _ in weights]
    for step in range(1, steps + 1):
        noise = torch.randn(weights[0].shape)
        for w, sigma in zip(weights, sigmas):
            w.grad = noise * sigma
        measured = step % 20 == 0 or step <= 3
        if measured:
            probe.measure_next_step()
        optimizer.step()
        for trace, row in zip(traces, probe.rows if measured else []):
            trace.append((step, row["norm"], row["angle"]))
    return traces


def working():
    """OPTIMIZERS, but without the rotational variant of a row that has no kappa, which refuses to be made."""
    return {name: kind for name, kind in OPTIMIZERS.items() if kind.geometry is not ROTATIONAL or kind.direction.kappa}


def state_bytes(kind):
    """Bytes of optimizer state per float32 weight, counted on a 1000 x 1000 matrix, with momentum if there is any."""
    w = torch.nn.Parameter(torch.randn(1000, 1000))
    options = {"momentum": 0.9, "batch_size": 1}
    optimizer = kind([w], **{key: value for key, value in options.items() if key in kind.takes()})
    w.grad = torch.zeros_like(w)
    optimizer.step()
    return sum(s.numel() * s.element_size() for s in optimizer.state[w].values() if torch.is_tensor(s)) / w.numel()


# The walks of the lesson: name, hyperparameters, sizes of the gradient's entries
NEURONS, C, SIGMAS = 64, 256, (0.5, 1.0, 2.0)
WALKS = [
    ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.005}, SIGMAS),
    ("adamw", {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}, SIGMAS),
    ("adam", {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.4}, SIGMAS),
    ("lion", {"lr": 0.001, "betas": (0.9, 0.99), "weight_decay": 0.5}, SIGMAS),
    ("muon", {"lr": 0.01, "momentum": 0.95, "nesterov": True, "adjust": "original", "weight_decay": 0.05}, (1.0,)),
    ("rmsprop", {"lr": 0.01, "alpha": 0.999, "eps": 1e-8, "weight_decay": 0.2, "momentum": 0.0}, (1.0,)),
    ("rf_rmsprop", {"lr": 0.01, "alpha": 0.999, "eps": 1e-8, "momentum": 0.9, "weight_decay": 0.01,
                    "batch_size": 100}, (0.1,)),
    ("rf_adamw", {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "batch_size": 100}, (0.1,)),
    ("if_shampoo", {"lr": 0.01, "momentum": 0.9, "damping": 1e-4, "lr_cov": 0.01, "weight_decay": 0.01,
                    "update_every": 10, "batch_size": 100}, (0.1,)),
]
HEADING = "optimizer  sigma       norm  measured   off by       angle  measured   off by"


def short_weight(norm):
    """A weight whose neurons are 3 times too short for the norm that is predicted (or of norm 1/3, where none is)."""
    return torch.nn.Parameter(torch.randn(NEURONS, C) * (norm if math.isfinite(norm) else 1) / 3 / math.sqrt(C))


def walk(name, hyper, sigmas, steps):
    """Print a random walk for each size of the gradient beside its predictions. -> {sigma: (trace, (norm, angle))}"""
    targets = [equilibrium(DIRECTIONS[name], hyper, C, sigma, (NEURONS, C)) for sigma in sigmas]
    weights = [short_weight(norm) for norm, _ in targets]
    traces = random_walk(OPTIMIZERS[name](weights, **hyper), weights, steps, sigmas)
    for trace, target, sigma in zip(traces, targets, sigmas):
        settled = [(norm, angle) for step, norm, angle in trace if step > steps // 2]
        norm, angle = (sum(column) / len(settled) for column in zip(*settled))
        predictions = {"adam + L2" if name == "adam" else name: target}
        if name == "lion":                          # every Lion step has length lr sqrt(C): the norm gives the angle
            exact = lion_walk_norm(hyper, C)
            predictions["  exact"] = exact, hyper["lr"] * math.sqrt(C) / exact
        for label, (n, a) in predictions.items():
            line = (f"{label:10s} {sigma:5g} {n:10.4f} {norm:9.4f} {norm / n - 1:+8.2%} {a:11.5f} {angle:9.5f} "
                    f"{angle / a - 1:+8.2%}")
            print(line.replace("+nan%", "    -").replace("nan", "  -"), flush=True)
    return {sigma: (trace, target) for sigma, trace, target in zip(sigmas, traces, targets)}


def options_of(hyper):
    """Hyperparameters in one line, without those that a walk does not feel."""
    unfelt = "eps", "update_every", "compile"
    return " ".join(f"{key}={value}".replace(" ", "") for key, value in hyper.items() if key not in unfelt)


def lesson(plot=None):
    """Print the table of optimizers and the random walks; with `plot`, draw the walks into that file as well."""
    torch.manual_seed(0)
    print("An optimizer is a direction (which way) times a geometry (how far, on which\nsurface).\n")
    print(f"{'name':21s} state   direction d")
    for name, kind in working().items():
        formula = kind.direction.formula
        if kind.geometry is not PLAIN:              # decay is the geometry's; only adam's v still sees it
            formula = formula.replace(" + wd w", "", 1)
        formula = formula.removeprefix("d = ").replace("heavy ball of ", "ball ")
        print(f"{name:21s} {state_bytes(kind):5.1f}   {formula}")
    print("(state: bytes per weight of a 1000 x 1000 matrix, with momentum where there is\n"
          "any. ball [x]: m <- mu m + x, d = m)")
    print("\nWithout their memory three of them are steepest descent, each in a norm of its\n"
          "own: sgd (up to its length) in the Euclidean norm, lion in the largest entry\n"
          "(every weight moves alike), muon in the spectral norm (every singular value\n"
          "becomes about 1).")

    _, hyper, _ = WALKS[1]
    norm, angle = equilibrium(DIRECTIONS["adamw"], hyper, C, 1.0)
    print(f"\nA random walk: {NEURONS} neurons of {C} weights, 3 times too short, and gradients of\n"
          "pure noise. AdamW takes long to find its angle. Its rotational variant, with the\n"
          "same lr and decay, only has to fill its averages first. (A bar ends at 3 times\nthe final angle: >)\n")
    traces = []
    for kind in (AdamW, RotationalAdamW):
        w = short_weight(norm)
        traces += random_walk(kind([w], **hyper), [w], 1600)
    print(f"{'step':>5s}   {'AdamW: radians per step':35s}  RotationalAdamW")
    for (step, _, plain), (_, _, turned) in zip(*traces):
        if step in (1, 2, 3, 20, 40, 80, 160, 320, 640, 960, 1280, 1600):
            bars = ["#" * round(8 * a / angle) if a < 3 * angle else "#" * 24 + ">" for a in (plain, turned)]
            print(f"{step:5d}   {plain:.4f} {bars[0]:28s}   {turned:.4f} {bars[1]}")
    print(f"theory: {angle:.4f} {'=' * 8:28s}   {angle:.4f} {'=' * 8}\n{'':8}= sqrt(2 lr wd (1-b1)/(1+b1))")

    print("\nWhere plain optimizers settle, by the formulas of `equilibrium` (table 1 of the\n"
          "paper, and ours), for gradients of different sizes sigma:\n")
    drawn = {}
    for name, hyper, sigmas in WALKS:
        print(f"{options_of(hyper)}\n{HEADING}" if name == "sgd" else options_of(hyper))
        drawn[name] = walk(name, hyper, sigmas, 7000 if name == "lion" else 5000)       # lion settles slowly here
    print("\nLook at adam + L2. Its angle depends on the size of the gradient (as rmsprop's\n"
          "does), so layers with small gradients turn fast, and others slowly. AdamW, Lion\n"
          "and SGD turn all layers alike in the end, rotational ones from about the start.\n"
          "(lion: the paper fits a line to the sign; 'exact' uses the arcsine law instead.)")
    if plot:
        draw(drawn, plot)


def own_walk(name, pairs):
    """`--walk NAME KEY=VALUE ...`: one walk with values of one's own."""
    if name not in DIRECTIONS:
        raise ValueError(f"--walk {name}: must be one of {', '.join(DIRECTIONS)}")
    hyper = OPTIMIZERS[name].takes() | {"weight_decay": 0.1}
    if "batch_size" in hyper:
        hyper["batch_size"] = 1
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            hyper[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"--walk: {pair!r} is no KEY=VALUE, like lr=0.01 or betas=(0.9,0.99)") from None
    OPTIMIZERS[name]([short_weight(1.0)], **hyper)              # refuses what it does not take
    if not (hyper["lr"] > 0 and hyper["weight_decay"] > 0):
        raise ValueError("--walk: without lr > 0 and weight_decay > 0 there is no equilibrium")
    settling = max(settling_steps(DIRECTIONS[name], hyper, sigma) for sigma in SIGMAS)
    steps = int(min(max(10 * settling, 1000), 20_000))
    torch.manual_seed(0)
    print(f"{options_of(hyper)}\nsettles in some {settling:.0f} steps, walks {steps}"
          f"{': too few to settle' * (steps < 6 * settling)}\n\n{HEADING}")
    walk(name, hyper, SIGMAS, steps)


def draw(walks, path):
    """The message in one picture: adam + L2 beside adamw, three sizes of gradients each, angle and norm over the steps.
    Predictions are dashed."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 2, sharex=True, sharey="row", figsize=(11, 7.5), constrained_layout=True)
    titles = {"adam": "Adam + L2: layers with small gradients turn faster",
              "adamw": "AdamW: all layers turn alike in the end"}
    looks = ("#0072B2", "-"), ("#D55E00", (0, (5, 1))), ("#009E73", (0, (1, 1)))
    for (name, title), (top, bottom) in zip(titles.items(), axes.T):
        for (sigma, (trace, (norm, angle))), (colour, style) in zip(walks[name].items(), looks):
            steps, norms, angles = zip(*trace)
            for panel, values, predicted in ((top, angles, angle), (bottom, norms, norm)):
                panel.plot(steps, values, color=colour, ls=style, lw=2, label=f"gradients of size {sigma:g}")
                panel.axhline(predicted, color=colour, ls="--", lw=1)
        top.set(title=title, xscale="log", yscale="log")
        bottom.set(xlabel="step", yscale="log")
    axes[0, 0].set(ylabel="angle per step (radians)")
    axes[1, 0].set(ylabel="norm of a neuron")
    axes[0, 1].legend(title="dashed: predicted by theory")
    figure.suptitle("Pure noise as gradients: weight decay sets the angle that neurons turn by")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:          # no such folder; no such format
        fail(f"cannot draw {path}: {error}")
    print(f"\npicture: {path}")


def gpt2_parameters(layers, device):
    """Parameters of the shapes of GPT-2 124M's (tied head), with gradients."""
    block = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (2304,), (768,), (3072,), (768,), *[(768,)] * 4]
    shapes = [(50304, 768), (1024, 768), *block * layers, (768,), (768,)]
    params = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def milliseconds(step, count=1):
    """The time of one step, the mean of `count`. On a GPU the clock waits for the work to be done."""
    started = time.perf_counter()
    for _ in range(count):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / count


def in_turn(step, reference, count=1, repeats=9):
    """Median time of a step (each time the mean of `count`), and median ratio to `reference`, run in turn: what else
    the machine does hits both."""
    times = [(milliseconds(reference), milliseconds(step, count)) for _ in range(repeats)]
    return statistics.median(t for _, t in times), statistics.median(t / r for r, t in times)


def bench(names):
    """Print the time of one step of each optimizer beside torch.optim.AdamW(fused=True), on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    layers = 12 if device == "cuda" else 1
    params = gpt2_parameters(layers, device)
    count = sum(p.numel() for p in params)
    fused = torch.optim.AdamW(params, lr=1e-6, fused=True)
    fused.step()
    print(f"One step on GPT-2's shapes with {layers} layer{'s' * (layers > 1)}, {count / 1e6:.0f} M parameters, "
          f"float32, on {machine}, torch {torch.__version__}.\n"
          "Ratios are to torch.optim.AdamW(fused=True), run in turn.\n")
    print(f"{'name':24s} {'state':>12s} {'eager':>18s} {'compiled':>18s} {'compiling':>10s}")
    for name in names:
        kind = OPTIMIZERS[name]
        options = {"batch_size": 1024} if "batch_size" in kind.takes() else {}
        line = f"{name:24s} {state_bytes(kind):5.1f} B/weight"
        for compiled in (False, True):
            own = {"norm": "rows", "use_muon": False}
            embeddings = {"params": params[:2]} | {key: own[key] for key in own.keys() & kind.takes().keys()}
            optimizer = kind([embeddings, {"params": params[2:]}], lr=1e-6, compile=compiled, **options)
            first = milliseconds(optimizer.step)    # makes the state, and the code
            optimizer.param_groups[0]["lr"] /= 2
            optimizer.step()
            # shampoo refreshes its matrices every few steps, which take longer: whole rounds of them
            time_of_one, ratio = in_turn(optimizer.step, fused.step, optimizer.defaults.get("update_every", 1))
            line += f" {time_of_one:8.1f} ms {ratio:5.2f}x"
        print(f"{line} {first / 1e3:8.1f} s", flush=True)


def fail(message):
    """Bad input: one line, and status 2."""
    print(f"optim.py: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description="The lesson of optim.py: the table of optimizers and random walks.")
    parser.add_argument("--plot", metavar="FILE", help="also draw angle and norm over the steps (.png, .pdf, .svg)")
    parser.add_argument("--walk", metavar=("NAME", "KEY=VALUE"), nargs="+",
                        help="instead: one random walk with values of your own, as in --walk adamw lr=0.01")
    parser.add_argument("--bench", metavar="NAME", nargs="*",
                        help="instead: time one step of these optimizers, or of all (a minute each: they get compiled)")
    parser.error = fail                             # argparse would print how to use it, too
    args = parser.parse_args()
    if args.plot is not None:                       # before any work
        if args.bench is not None or args.walk:
            fail("--plot draws the lesson: leave out --bench and --walk")
        if not importlib.util.find_spec("matplotlib"):
            fail("--plot needs matplotlib: pip install matplotlib")
        if not args.plot or os.path.isdir(args.plot) or not os.path.isdir(os.path.dirname(args.plot) or "."):
            fail(f"cannot draw {args.plot!r}: name a file, in a folder that is there")
    try:
        if args.walk:
            own_walk(args.walk[0], args.walk[1:])
        elif args.bench is not None:
            bench([name for name in args.bench if find_optimizer(name)] or working())
        else:
            lesson(args.plot)
    except (ValueError, TypeError) as error:
        fail(error)


# ======================================================================================================================
# Answers
#
# 3. d is the buffer. The first one is [2.5 2.0; 0.5 2.0]. The second one is 0.9 of it plus G + 0.5 W, with the W that
#    the first step has left: [2.25+2.375 1.8+1.9; 0.45+0.475 1.8+1.9] = [4.625 3.7; 0.925 3.7].
# 4. m / (1-b1) = g and sqrt(v / (1-b2)) = |g|, so d = sign(g) = [1 0; 0 1], whatever the size of g (until eps is felt),
#    and W = [2.9 4.0; 1.0 -0.1].
# 5. (a) b1 = b2 = mu. m has c_j = (1-mu) mu^j, so S = (1-mu)^2 / (1-mu^2) = (1-mu) / (1+mu). The sign has entries of
#    size 1, and one gradient contributes sqrt(2 / (pi S)) in all. So kappa = sqrt(pi S / 2) = 0.2875 for mu = 0.9.
#    (b) sgd: norm^4 = lr_total C sigma0^2 / (2 wd). adam: norm^3 = lr C sigma0 / (2 wd). The angle of sgd has no sigma
#    in it, and stays. That of adam is kappa sqrt(2 lr wd norm / sigma0), with this norm.
# 6. The weights are equal, since they feel lr * wd alone. In RotationalAdam v sees wd w, so they differ. A bias feels
#    lr alone. Its change alters the gradients, and so every weight, from the second step on.
# 7. g is N(0, 1/B), so s tends to 1/B and B s to 1 for both. With batch_size=1, s itself is taken for the curvature:
#    it is 100 times too small, and d 100 times too large.
# 8. (a) Each later layer has a bond in front. The shares are 1/3 (r), 1/3 / 0.5 = 0.667 (q), 1/3 / 0.25 = 1.333 (p).
#    (b) Some 0.17, 0.07 (width 32, depth 2, 16), 0.34, 0.19 (width 256): below 1, and not tight. The bound is for an
#    input and an update that conspire in every layer.
# 9. F = 1/2 K^2 (g^2 + damping) - log K has its minimum at K^2 = 1 / (g^2 + damping), and d = K^2 g = g / (g^2 +
#    damping). That is rf_rmsprop with s = g^2, B = 1 and eps = damping.
# ======================================================================================================================

if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()                          # here, where a pipe that nobody reads can be caught
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                         # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
