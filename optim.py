"""
optim.py: optimizers as  direction x geometry,  in one file that can be read from top to bottom.

    direction   what a gradient is turned into: which way to go, from the history of gradients (and perhaps the decay)
    geometry    how a direction becomes a change of a weight: how far, and on which surface

Every optimizer here is one direction followed by one geometry. Learn the rows and the columns and you know them all:

    direction                                     | plain                | rotational       | modular
    ----------------------------------------------+----------------------+------------------+------------
    sgd         heavy-ball momentum               | SGD                  | RotationalSGD    | ModularSGD
    adam        L2 inside the gradient            | Adam                 | RotationalAdam   |
    adamw       decoupled decay                   | AdamW                | RotationalAdamW  | ModularAdam
    lion        sign of an average                | Lion                 | RotationalLion   | (by name:
    rmsprop     gradient over its RMS             | RMSProp              | (by name:        |  "modular_lion",
    rf_rmsprop  gradient over its mean square     | RootFreeRMSProp      |  "rotational_    |  "modular_
    rf_adamw    average over mean square          | RootFreeAdamW        |  rmsprop", and   |  rmsprop", and
    shampoo     inverse roots of d x d matrices   | Shampoo              |  so on, in       |  so on, in
    if_shampoo  the same without roots, inverses  | InverseFreeShampoo   |  OPTIMIZERS)     |  OPTIMIZERS)

    plain        w <- w - lr * d, and decay pulls w towards 0: inside d, or beside it
    rotational   every neuron keeps its length and turns by a controlled average angle; decay only sets that angle
    modular      the update of the whole network has size lr, in a norm made from its architecture

Use it like torch.optim: every class here is a true subclass of torch.optim.Optimizer.

    import optim
    optimizer = optim.RotationalAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    optimizer = optim.build("rotational_lion", model, lr=1e-3, weight_decay=0.5)      # by name, with sensible groups

Run it for a lesson (half a minute, no network, no GPU):

    python optim.py                    the table, then a random walk that shows where weight decay leads
    python optim.py --plot walk.png    the same, and a figure (needs matplotlib)
    python optim.py --bench adamw lion one step of these beside torch.optim.AdamW(fused=True); without names, of all

Symbols, in the formulas and in the code:

    w      weight                g      gradient of the MEAN loss over the batch     d    direction
    lr     learning rate eta     wd     weight decay lambda                          t    step, 1, 2, 3, ...
    b1,b2  betas                 mu     momentum                                     a    alpha, RMSProp's beta
    m, v   running averages of g and of g^2 (heavy ball: m is a running sum)         h    dict of hyperparameters
    C      weights in a neuron   sigma  RMS size of one entry of g                   n    kept norm of a neuron
    B      batch size: examples (or tokens) that the loss is a mean over             k    number of modes (long dims)
    s      average of g^2 in the root-free rules     L, K   a matrix for each mode (shampoo, if_shampoo)
    U      average of ||d||^2 (rotational)           share, scale   of a weight in the modular norm: its part of the
                                                                    network's update, and its own usual norm

A neuron is a row of a matrix, or a filter of a convolution: an index of dim 0 picks it, the other dims belong to it.

Where the two factors cannot quite be separated (half of the lesson):
  1. Decay enters in three places: decoupled (adamw, lion, rf_adamw), inside the gradient (adam, rmsprop), or after the
     preconditioner and before the heavy ball (rf_rmsprop, both shampoos; for sgd the two are the same). So a direction
     takes the decay term as an argument. The plain geometry fills it, unless decay is decoupled; the others leave it
     out (but for adam: adam_turning).
  2. The rotational geometry needs two numbers of the direction, kappa and gain: see "What one gradient does over all
     time".
  3. Biases and gains have no neurons to turn. They use the plain geometry, whatever the optimizer is called.
  4. The root-free directions need to know over how many examples the loss is a mean: batch_size.
  5. The modular geometry has to know the whole architecture: the model states it (modular_tree), `build` reads it. And
     the paper's SGD and Adam average in a way of their own (warm_sgd, warm_adam).

Papers:
  [RE]    Kosson, Messmer, Jaggi. Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks.
          ICML 2024, arXiv:2305.17212
  [MN]    Large, Liu, Huh, Bahng, Isola, Bernstein. Scalable Optimization in the Modular Norm. NeurIPS 2024,
          arXiv:2405.14813
  [Adam]  Kingma, Ba. Adam: A Method for Stochastic Optimization. ICLR 2015, arXiv:1412.6980
  [AdamW] Loshchilov, Hutter. Decoupled Weight Decay Regularization. ICLR 2019, arXiv:1711.05101
  [Lion]  Chen et al. Symbolic Discovery of Optimization Algorithms. NeurIPS 2023, arXiv:2302.06675
  [RMS]   Tieleman, Hinton. Lecture 6.5, RMSProp. Coursera, 2012
  [HB]    Polyak. Some methods of speeding up the convergence of iteration methods. 1964
  [RF]    Lin, Dangel, Eschenhagen, Bae, Turner, Makhzani. Can We Remove the Square-Root in Adaptive Gradient Methods? A
          Second-Order Perspective. ICML 2024, arXiv:2402.03496
  [Shampoo] Gupta, Koren, Singer. Shampoo: Preconditioned Stochastic Tensor Optimization. ICML 2018, arXiv:1802.09568

To add a row: write its function; its line in DIRECTIONS (with gain and kappa, if it is to rotate; with by_entry=False,
if an entry of d depends on other entries of g); the range of each new hyperparameter in RANGES; a class, or
compose(...) if it needs no docstring; its names in OPTIMIZERS.
"""
import argparse
import copy
import difflib
import functools
import importlib.util
import inspect
import itertools
import math
import os
import statistics
import sys
import time
import types
from dataclasses import dataclass, field
from typing import Callable

import torch

# ======================================================================================================================
# Directions:  direction(g, state, h, decay) -> d
#
# Each is the mathematics for ONE tensor. It sees the gradient g, its own running averages (`state`, updated in place)
# and the hyperparameters h. It uses no weight and no learning rate, and it never changes g. `decay` is the tensor
# wd * w where the geometry wants the decay to go through the direction, and 0 where it does not.
#
# Every running average that starts at 0 is too small at first: after t steps an average with factor b has only seen a
# total weight of 1 - b^t. Dividing by that removes the bias ([Adam], section 3). h["unbias1"] = 1 - b1^t and the like
# come ready-made, because they are plain numbers that are best worked out once a step in double precision.
#
# With heavy ball the d that is returned IS the buffer in `state`: a geometry must never change d in place.
# ======================================================================================================================


def heavy_ball(x, state, h):
    """Polyak's momentum [HB]:  m <- mu m + x,  returns m. Without momentum there is no buffer, and x is returned.

    Shapes   x, m: the parameter's        State   momentum_buffer = 0 at first, so the first m is x (as in torch)
    Units    m is a sum, not an average: a constant x builds up to x / (1 - mu). That factor is the direction's `gain`.
    """
    if "momentum_buffer" not in state:
        return x
    m = state["momentum_buffer"]
    m.mul_(h["momentum"]).add_(x)                   # m <- mu m + x
    return m


def sgd(g, state, h, decay=0):
    """Stochastic gradient descent with heavy-ball momentum:  m <- mu m + (g + decay);  d = m.

    Shapes   g, m, d: the parameter's               State   momentum_buffer (only if momentum > 0)
    Units    d: loss / parameter, so lr has to be in parameter^2 / loss, and depends on the scale of both
    Source   [HB]; equal to torch.optim.SGD
    """
    return heavy_ball(g + decay, state, h)


def adam_ratio(g_m, g_v, state, h):
    """Mean over root mean square, the core of Adam ([Adam], algorithm 1); g_m feeds the mean, g_v the mean square.

    Formula  m <- b1 m + (1-b1) g_m
             v <- b2 v + (1-b2) g_v^2
             d  = m / (1-b1^t)  /  (sqrt(v) / sqrt(1-b2^t) + eps)
    Shapes   all: the parameter's                   State   exp_avg = m = 0, exp_avg_sq = v = 0 at first
    Units    d has none: entries of size 1 while gradients agree, smaller when they are noise (average_kappa says how
             much), whatever the loss is multiplied by (until eps is felt)
    """
    m, v, (b1, b2) = state["exp_avg"], state["exp_avg_sq"], h["betas"]
    m.lerp_(g_m, 1 - b1)                            # m <- m + (1-b1) (g_m - m)
    v.mul_(b2).addcmul_(g_v, g_v, value=1 - b2)     # v <- b2 v + (1-b2) g_v^2
    rms = (v / h["unbias2"]).sqrt_()
    return (m / h["unbias1"]).div_(rms.add_(h["eps"]))


# Three rules that differ in one thing: which of the two averages gets to see the decay.


def adamw(g, state, h, decay=0):
    """Neither average sees the decay; the geometry applies it to the weight directly ("decoupled", [AdamW])."""
    return adam_ratio(g, g, state, h)


def adam(g, state, h, decay=0):
    """Both see it: L2 regularisation as torch.optim.Adam does it. The decay is divided by the gradient's own RMS, so a
    weight with large gradients is hardly decayed at all. [RE], section 5.3, blames that for Adam+L2 being worse."""
    return adam_ratio(g + decay, g + decay, state, h)


def adam_turning(g, state, h, decay=0):
    """Only v sees it: the denominator is that of Adam+L2, but the decay takes no part in the motion itself. This is the
    form that adam takes under the rotational geometry ([RE], section 5.3): the one direction that has two forms."""
    return adam_ratio(g, g + decay, state, h)


def warm_average(average, x, fresh):
    """An average that needs no bias correction, since it starts at its first x:  m <- m + (1-b)^((t-1)/t) (x - m).

    `fresh` is that factor. It falls from 1 at t = 1, where the whole of x is taken, to the 1-b of a running average.
    """
    return average.lerp_(x, fresh)


def warm_sgd(g, state, h, decay=0):
    """The average gradient, started warm:  d = m. The modular norm's SGD ([MN]'s code), which rescales d in any case.

    Shapes   g, m, d: the parameter's               State   exp_avg = m
    """
    return warm_average(state["exp_avg"], g, h["fresh"])


def warm_adam(g, state, h, decay=0):
    """Adam with averages started warm and without eps:  d = m / sqrt(v), and 0 where that is 0/0. The modular norm's
    Adam ([MN]'s code): an entry counts in full, however small its gradients are.

    Shapes   g, m, v, d: the parameter's            State   exp_avg = m, exp_avg_sq = v
    """
    m = warm_average(state["exp_avg"], g, h["fresh1"])
    v = warm_average(state["exp_avg_sq"], g * g, h["fresh2"])
    return (m / v.sqrt()).masked_fill_(v == 0, 0)   # v is 0, too, where g^2 is too small for its type, though g is not


def lion(g, state, h, decay=0):
    """Evolved sign momentum ([Lion], algorithm 2):  d = sign(b1 m + (1-b1) g);  then  m <- b2 m + (1-b2) g.

    Shapes   g, m, d: the parameter's               State   exp_avg = m = 0 at first
    Units    d has none: every entry is -1, 0 or 1, so ||d|| = sqrt(number of weights): larger than Adam's by far. Use a
             learning rate some 3 to 10 times smaller and a decay larger by as much
    Notice   m is read before it is updated, and with the other beta. Swap the two lines: a different method. In torch
             sign(nan) is 0: for an entry whose gradient once was NaN, d is 0 for good, and only m tells why
    Try      set b1 = b2. Which older optimizer is left? (The sign of an average: Signum)
    """
    m, (b1, b2) = state["exp_avg"], h["betas"]
    d = torch.lerp(m, g, 1 - b1).sign()             # sign(b1 m + (1-b1) g)
    m.lerp_(g, 1 - b2)                              # m <- b2 m + (1-b2) g
    return d


def rmsprop(g, state, h, decay=0):
    """Gradient over its root mean square [RMS]:  x = g + decay;  v <- a v + (1-a) x^2;  d = x / (sqrt(v) + eps), then
    heavy ball on d if momentum > 0.

    Shapes   all: the parameter's                   State   square_avg = v = 0 at first; momentum_buffer
    Units    d has none. There is no bias correction, so early steps are larger: 1/sqrt(1-a) at t = 1
    Source   equal to torch.optim.RMSprop
    """
    v, x = state["square_avg"], g + decay
    v.mul_(h["alpha"]).addcmul_(x, x, value=1 - h["alpha"])     # v <- a v + (1-a) x^2
    return heavy_ball(x / (v.sqrt() + h["eps"]), state, h)


# ----------------------------------------------------------------------------------------------------------------------
# Without the root ([RF])
#
# RMSProp and Adam divide by sqrt(v). Take the root away, and v is no longer a normaliser but a curvature: for the mean
# loss over B examples, the average of g^2 is about 1/B times the diagonal of the (empirical) Fisher matrix, so B v
# estimates that diagonal whatever B is, and g / (B v) is a diagonal Newton step. We then call v s. It starts at
# 1/B, so that B s starts at 1.
# ----------------------------------------------------------------------------------------------------------------------


def rf_rmsprop(g, state, h, decay=0):
    """RMSProp without the root:  s <- a s + (1-a) g^2;  d = g / (B s + eps);  heavy ball on d + decay.

    Shapes   all: the parameter's                   State   square_avg = s = 1/B at first; momentum_buffer
    Units    B s is in loss^2 / weight^2. For a negative log-likelihood in nats that is a curvature (Fisher's matrix is
             the mean Hessian there), d is in weights and lr has no unit, as for Newton
    Why B    the noise in the mean of B gradients makes s shrink like 1/B, though the curvature it stands for does not
             depend on B. Times B, s is free of it; without, lr would have to be retuned for every batch size
    Source   [RF]; the decay joins after the preconditioner, in the heavy ball, as in the authors' code
    """
    s, B = state["square_avg"], h["batch_size"]
    s.mul_(h["alpha"]).addcmul_(g, g, value=1 - h["alpha"])     # s <- a s + (1-a) g^2
    return heavy_ball(g / (B * s + h["eps"]) + decay, state, h)


def rf_adamw(g, state, h, decay=0):
    """AdamW without the root:  m <- b1 m + (1-b1) g;  s <- b2 s + (1-b2) g^2;  d = m / (B s + eps).

    Shapes   all: the parameter's                   State   exp_avg = m = 0, exp_avg_sq = s = 1/B at first
    Units    as in rf_rmsprop
    Notice   bias_correction=True divides m by 1-b1^t and B s by 1-b2^t; since s does not start at 0, that makes B s too
             large at first (1/(1-b2) at t = 1) instead of unbiased: a warmup in disguise. Off by default, as in [RF]
    """
    m, s, (b1, b2), B = state["exp_avg"], state["exp_avg_sq"], h["betas"], h["batch_size"]
    m.lerp_(g, 1 - b1)                              # m <- m + (1-b1) (g - m)
    s.mul_(b2).addcmul_(g, g, value=1 - b2)         # s <- b2 s + (1-b2) g^2
    if h["bias_correction"]:
        return (m / h["unbias1"]) / (B * s / h["unbias2"] + h["eps"])
    return m / (B * s + h["eps"])


# ----------------------------------------------------------------------------------------------------------------------
# With matrices: one preconditioner for every mode (dim) of the tensor
#
# A diagonal knows how steep every weight is, but not which weights act together. Shampoo keeps a d_i x d_i matrix for
# every mode i of size d_i and multiplies the gradient by one matrix on each. A mode longer than max_dim (a vocabulary)
# gets a diagonal, a vector of d_i numbers, instead. A mode of size 1 is squeezed away by if_shampoo. In shampoo it
# counts: its matrix is one number, ||G||^2, and it takes its part of the root. Both are as in [RF]'s code.
# ----------------------------------------------------------------------------------------------------------------------


def on_every_mode(x, factors):
    """Multiply mode i of x by factors[i]: a matrix F, y[.., a, ..] = sum over m of x[.., m, ..] F[m, a], or a diagonal.

    Each pass takes the first mode and puts its product last: after as many passes as modes they are in order again.
    """
    for F in factors:
        x = x.movedim(0, -1) * F if F.dim() == 1 else torch.tensordot(x, F, dims=([0], [0]))
    return x


def second_moment(x, i, diagonal):
    """X X^T for x unfolded along mode i, X: (d_i, all the rest); only the diagonal of it if asked for."""
    rest = [j for j in range(x.dim()) if j != i]
    if diagonal:
        return (x * x).sum(rest) if rest else x * x
    return torch.tensordot(x, x, dims=(rest, rest))


def shampoo(g, state, h, decay=0):
    """Shampoo [Shampoo], the root-based baseline:  for every mode i of k

        L_i <- (1 - lr_cov) L_i + lr_cov G_(i) G_(i)^T          d = G times (L_i + damping)^(-1/(2k)) on every mode

    and then heavy ball on d + decay. G_(i) is the gradient unfolded along mode i.

    State    L0, L1, .. = 0 at first; R0, R1, ..: the inverse roots, I until first computed; momentum_buffer
    Units    every L_i has those of g^2, and the powers -1/(2k) of k modes make 1/g of it: d has no unit
    Notice   a root takes an eigendecomposition, which is costly: hence one every `update_every` steps. And it takes
             float32 at least: eigenvalues below the rounding of the largest come out as noise, and a negative power
             blows noise up. Hence no bfloat16. And in between, old roots meet new gradients: along what none of the
             old ones showed they are damping^(-1/(2k)), a large number where few gradients fill L_i: a long bias
    """
    x = torch.atleast_1d(g).to(state["L0"].dtype)
    order = x.dim()
    L, R = ([state[f"{letter}{i}"] for i in range(order)] for letter in "LR")
    for i in range(order):
        L[i].lerp_(second_moment(x, i, L[i].dim() == 1), h["lr_cov"])
        if h["refresh"]:
            R[i].copy_(inverse_root(L[i], 2 * order, h["damping"]))
    d = on_every_mode(x, R).reshape(g.shape).to(g.dtype)
    return heavy_ball(graft(d, g, state, h) + decay, state, h)


def inverse_root(L, p, damping):
    """(L + damping)^(-1/p) of a symmetric positive semi-definite matrix, or of a diagonal."""
    if L.dim() == 1:
        return (L + damping) ** (-1 / p)
    identity = torch.eye(len(L), dtype=L.dtype, device=L.device)
    # the damping goes in first: float32 LAPACK can fail on a matrix with hundreds of zero rows (unused tokens)
    damped = L + damping * identity
    finite = damped.isfinite().all()                # where training diverges, eigh must not be what fails
    eigenvalues, Q = torch.linalg.eigh(torch.where(finite, damped, identity))
    root = (Q * eigenvalues.clamp(min=damping) ** (-1 / p)) @ Q.T              # rounding makes eigenvalues too small
    unseen = L.diagonal() == 0                      # an index without any gradient so far must not get rounding noise
    root.masked_fill_(unseen | unseen[:, None], 0).diagonal().masked_fill_(unseen, damping ** (-1 / p))
    return torch.where(finite, root, math.nan)


def graft(d, g, state, h):
    """d, rescaled to the norm of another method's direction if h["graft"] names one: the way is d's, the size its."""
    if h["graft"] is None:
        return d
    size = g                                        # "sgd"
    if h["graft"] == "adam":                        # without momentum: the heavy ball comes after
        v, b2 = state["graft_sq"], 1 - h["lr_cov"]
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        size = g / ((v / h["unbias_graft"]).sqrt() + 1e-8)
    norm = torch.linalg.vector_norm
    return d * (norm(size) / norm(d).clamp(min=torch.finfo(d.dtype).tiny))


def if_shampoo(g, state, h, decay=0):
    """Inverse-free Shampoo [RF]: neither roots nor inverses nor decompositions, in bfloat16 if need be.

    It learns a factor K_i of every inverse, (curvature)^-1 = K K^T, by descent on the positive definite matrices. On a
    preconditioner step, with d_i the size of mode i and A = sqrt(B) G times K_i on every mode:

        H_i = 1/2 [ A_(i) A_(i)^T / (product of the other d_j)  +  damping c_i K_i^T K_i  -  I ]
        c_i = product over the other modes of  ||K_j||^2 / d_j
        M_i <- rho M_i + (1-rho) H_i                                    rho = riemannian_momentum
        K_i <- K_i - lr_cov lr_cov_scale / max(1, ||M_i||) K_i M_i      matrix exponential, to first order

    and at every step  d = G times K_i K_i^T on every mode,  then heavy ball on d + decay. With one mode it settles at
    H = 0:  K^T (B E[g g^T] + damping) K = I,  so K K^T is the inverse of the damped curvature: nothing was inverted.

    State    K0, K1, .. = I and M0, M1, .. = 0 at first; momentum_buffer; all of it in `dtype`
    Units    as in rf_rmsprop: with one mode, d is a Newton step
    Notice   the paper has an A_i for each mode; all of them are this A, unfolded along mode i. max(1, sqrt(max|K_i|))
             is taken out of K_i before it is squared and put back after, so that nothing overflows on the way
    """
    if g.numel() == 0:
        return heavy_ball(g + decay, state, h)
    x = torch.atleast_1d(g.squeeze()).to(state["K0"].dtype)
    K, M = ([state[f"{letter}{i}"] for i in range(x.dim())] for letter in "KM")
    if h["refresh"]:
        A = on_every_mode(x * math.sqrt(h["batch_size"]), K)
        H = []
        for i, k in enumerate(K):
            rest, c = x.numel() / len(k), 1                                     # products over the other modes:
            for other in K[:i] + K[i + 1:]:                                     # of d_j, and of ||K_j||^2 / d_j
                c = c * torch.linalg.vector_norm(other) ** 2 / len(other)
            # factors of the sum go into the products: each pass over the d_i^2 entries of K_i for itself takes time
            curvature, damped = second_moment(A, i, k.dim() == 1), k * (h["damping"] * c / 2) ** 0.5
            if k.dim() == 1:
                H.append(curvature / (2 * rest) + damped * damped - 0.5)
            else:
                H.append(curvature.addmm_(damped.T, damped, beta=1 / (2 * rest)))
                H[-1].diagonal().sub_(0.5)                                      # minus I / 2
        for k, m, new in zip(K, M, H):
            m.lerp_(new, 1 - h["riemannian_momentum"])
            step_size = h["lr_cov"] * h["lr_cov_scale"] / torch.linalg.vector_norm(m).clamp(min=1)
            k.addcmul_(k * m if k.dim() == 1 else k @ m, step_size, value=-1)
    scale = 1
    for k in K:
        lowest, highest = k.aminmax()                       # on a CPU ten times as fast as vector_norm(k, inf)
        s = torch.maximum(-lowest, highest).sqrt().clamp(min=1)
        scale = scale * s**2
        if k.dim() == 2 and len(k) ** 2 > x.numel():        # K (K^T x) costs less than (K K^T) x
            x = torch.tensordot(torch.tensordot(x / s, k, dims=([0], [0])) / s, k, dims=([-1], [1]))
        else:
            small = k / s
            x = on_every_mode(x, [small * small if k.dim() == 1 else small @ small.T])
    return heavy_ball((x * scale).reshape(g.shape) + decay, state, h).to(g.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# What one gradient does over all time: gain, kappa, contribution
#
# Feed a direction with independent random gradients (a "random walk": late training looks much like it, [RE] section
# 3). A gradient that arrives now enters the update j steps later with some weight c_j: heavy ball mu^j, a running
# average (1-b) b^j. Three numbers describe all that matters (this gain has nothing to do with a network's gains):
#
#   gain          sum of c_j: over all time, one gradient g moves the weight by  lr * gain * (what g is turned into).
#   contribution  RMS size of an entry of what g is turned into: sigma for sgd, 1 where d is divided by an RMS.
#   kappa         RMS size of ONE update over that of all that one gradient adds up to:  sqrt(sum c_j^2) / sum c_j. A
#                 longer memory cuts this sum into more and smaller parts, which all point the same way: kappa falls.
# ----------------------------------------------------------------------------------------------------------------------


def heavy_ball_gain(h):
    """sum of mu^j  =  1 / (1-mu)."""
    return 1 / (1 - h["momentum"])


def heavy_ball_kappa(h):
    """sqrt(sum of mu^(2j)) / sum of mu^j  =  (1-mu) / sqrt(1-mu^2)  =  sqrt((1-mu) / (1+mu))."""
    return math.sqrt((1 - h["momentum"]) / (1 + h["momentum"]))


def average_kappa(h):
    """sqrt(sum of (1-b)^2 b^(2j)) / 1  =  sqrt((1-b) / (1+b)), b = b1. (v is so slow that it counts as constant.)"""
    b1, _ = h["betas"]
    return math.sqrt((1 - b1) / (1 + b1))


def newton_contribution(h, sigma):
    """sigma / (B sigma^2 + damping): the root-free directions divide by the curvature B E[g^2] (+ eps or damping). For
    if_shampoo that holds where the noise has no structure: with sigma equal in all entries, H_i = 0 makes every K_i a
    multiple of I, and their product 1 / sqrt(B sigma^2 + damping)."""
    return sigma / (h["batch_size"] * sigma**2 + h.get("damping", h.get("eps")))


def lion_filter_power(h):
    """S = sum of c_j^2 of the average inside Lion's sign:  c_0 = 1-b1,  c_j = b1 (1-b2) b2^(j-1)  for j >= 1."""
    b1, b2 = h["betas"]
    return (1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)


def lion_contribution(h, sigma):
    """sqrt(2 / (pi S)).  The sign is replaced by the line that fits it best: for a Gaussian x of RMS size s,
    sign(x) ~ sqrt(2/pi) x/s. Here s = sqrt(S) sigma, and the c_j add up to 1, so sigma cancels."""
    return math.sqrt(2 / (math.pi * lion_filter_power(h)))


def lion_kappa(h):
    """sqrt(pi S / 2):  one update has entries of size 1, so kappa = 1 / contribution."""
    return math.sqrt(math.pi * lion_filter_power(h) / 2)


def zeros(*names):
    """`init` of a direction whose averages all start at 0. A heavy-ball buffer is made only where there is momentum."""
    def init(w, h):
        return {name: torch.zeros_like(w) for name in names if name != "momentum_buffer" or h["momentum"] > 0}
    return init


def mode_factors(w, h, **starts):
    """For every mode of w and every letter a multiple of the identity: a matrix, or a vector beyond max_dim."""
    dtype = h.get("dtype") or w.dtype
    state = {}
    for i, n in enumerate(torch.atleast_1d(w).shape):
        for letter, start in starts.items():
            one = torch.ones(n, dtype=dtype, device=w.device)
            state[f"{letter}{i}"] = start * (one if n > h["max_dim"] else torch.diag(one))
    return state


def shampoo_objection(h):
    """What is wrong with Shampoo's options: no damping, no average, or a dtype too coarse for inverse roots."""
    if h["damping"] == 0:
        return ("damping=0: a matrix that too few gradients have filled has no inverse root. Set damping > 0, say 1e-6")
    if not 0 < h["lr_cov"] <= 1:
        return (f"lr_cov={h['lr_cov']}: the share of the newest gradient in an average. Set 0 < lr_cov <= 1")
    if h["dtype"] in (torch.bfloat16, torch.float16):
        return (f"dtype={h['dtype']}: inverse roots need float32 or float64. Rounding to {h['dtype']} makes small "
                "eigenvalues noise, and a negative power blows it up; if_shampoo has no roots and runs in bfloat16")


def shampoo_state(w, h):
    """L = 0 and R = I for every mode; no preconditioning until the first roots."""
    state = zeros("momentum_buffer")(w, h) | mode_factors(w, h, L=0, R=1)
    return state | ({"graft_sq": torch.zeros_like(w)} if h["graft"] == "adam" else {})


def if_shampoo_state(w, h):
    """K = I and M = 0 for every mode, and the heavy-ball buffer: all in the recursion's own dtype."""
    dtype = h["dtype"] or w.dtype
    return {k: v.to(dtype) for k, v in zeros("momentum_buffer")(w, h).items()} | mode_factors(w.squeeze(), h, K=1, M=0)


def refreshes(t, update_every):
    """Is t = 0, 1, .. a preconditioner step of if_shampoo? Often at first, seldom later: the one after step t comes
    min(max(floor(log_4(t + 1)), 1), update_every) steps on: every step to 15, every 2nd to 63, every 3rd to 255, ..."""
    at = 0                                          # the first preconditioner step of a stretch with equal gaps
    for k in itertools.count(1):
        gap, border = min(k, update_every), 4 ** (k + 1) - 1
        if t < border:
            return t >= at and (t - at) % gap == 0
        at += math.ceil((border - at) / gap) * gap


def zeros_and_curvature(curvature, *names):
    """`init` of a root-free direction: as `zeros`, but the average of g^2 starts at 1/B."""
    def init(w, h):
        return zeros(*names)(w, h) | {curvature: torch.full_like(w, 1 / h["batch_size"])}
    return init


def unbias_both(h, t):
    """1 - b^t for both betas: what bias correction divides by."""
    b1, b2 = h["betas"]
    return {"unbias1": 1 - b1**t, "unbias2": 1 - b2**t}


def fresh_one(h, t):
    """How much of a new gradient enters a warm-started average."""
    return {"fresh": (1 - h["momentum"]) ** ((t - 1) / t)}


def fresh_both(h, t):
    """The same for each of the betas."""
    b1, b2 = h["betas"]
    return {"fresh1": (1 - b1) ** ((t - 1) / t), "fresh2": (1 - b2) ** ((t - 1) / t)}


@dataclass(frozen=True, eq=False)
class Direction:
    """One row of the table: the function above, and what the rest of the file has to know about it."""
    update: Callable                                # (g, state, h, decay) -> d
    init: Callable                                  # (w, h) -> dict of state tensors, before the first step
    formula: str                                    # d in one line, for the printed table
    decoupled: bool                                 # True: `plain` does w <- (1 - lr wd) w. False: decay is in d
    defaults: dict                                  # hyperparameters of its plain class, torch.optim's if it has it
    scalars: Callable = lambda h, t: {}             # numbers that depend on the step
    gain: Callable = lambda h: 1.0                  # these three: see "What one gradient does over all time"
    kappa: Callable = lambda h: 1.0
    contribution: Callable = lambda h, sigma: 1.0
    pull: Callable = lambda h, sigma: 1.0           # what to multiply wd by: 1/sigma where decay is divided by an RMS
    objection: Callable = lambda h: None            # what is wrong with a combination of hyperparameters, in words
    turning: Callable | None = None                 # another `update`, fed with the decay, for the rotational geometry
    by_entry: bool = True                           # does each entry of d depend on the same entry of g alone?


ADAM_DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

DIRECTIONS = {
    "sgd": Direction(
        sgd, zeros("momentum_buffer"), "m <- mu m + g + wd w;  d = m", False,
        {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0},
        gain=heavy_ball_gain, kappa=heavy_ball_kappa, contribution=lambda h, sigma: sigma),
    "adam": Direction(
        adam, zeros("exp_avg", "exp_avg_sq"), "d = mean(g + wd w) / rms(g + wd w)", False,
        ADAM_DEFAULTS | {"weight_decay": 0.0}, unbias_both,
        kappa=average_kappa, pull=lambda h, sigma: 1 / sigma,           # the decay, too, is divided by the RMS
        turning=adam_turning),
    "adamw": Direction(
        adamw, zeros("exp_avg", "exp_avg_sq"), "d = mean(g) / rms(g)", True, ADAM_DEFAULTS, unbias_both,
        kappa=average_kappa),
    "warm_sgd": Direction(
        warm_sgd, zeros("exp_avg"), "d = mean(g)", True, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0}, fresh_one,
        kappa=heavy_ball_kappa, contribution=lambda h, sigma: sigma),
    "warm_adam": Direction(
        warm_adam, zeros("exp_avg", "exp_avg_sq"), "d = mean(g) / rms(g)", True,
        {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0}, fresh_both, kappa=average_kappa),
    "lion": Direction(
        lion, zeros("exp_avg"), "d = sign(b1 m + (1-b1) g)", True,
        {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}, kappa=lion_kappa, contribution=lion_contribution),
    "rmsprop": Direction(
        rmsprop, zeros("square_avg", "momentum_buffer"), "d = heavy ball of [x / rms(x)],  x = g + wd w",
        False, {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0},
        gain=heavy_ball_gain, kappa=heavy_ball_kappa, pull=lambda h, sigma: 1 / sigma),
    "rf_rmsprop": Direction(
        rf_rmsprop, zeros_and_curvature("square_avg", "momentum_buffer"), "d = heavy ball of [g / (B s) + wd w]", False,
        {"lr": 1e-2, "alpha": 0.99, "eps": 1e-4, "weight_decay": 0.0, "momentum": 0.9, "batch_size": None},
        gain=heavy_ball_gain, kappa=heavy_ball_kappa, contribution=newton_contribution),
    "rf_adamw": Direction(
        rf_adamw, zeros_and_curvature("exp_avg_sq", "exp_avg"), "d = mean(g) / (B s)", True,
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 1e-2, "bias_correction": False,
         "batch_size": None}, unbias_both,
        kappa=average_kappa, contribution=newton_contribution),
    "shampoo": Direction(
        shampoo, shampoo_state, "d = heavy ball of [G times L_i^(-1/(2k)) on every mode + wd w]", False,
        {"lr": 1e-2, "momentum": 0.9, "damping": 1e-6, "lr_cov": 0.05, "weight_decay": 0.0, "update_every": 2,
         "max_dim": 2048, "graft": None, "dtype": None},
        lambda h, t: {"refresh": t % h["update_every"] == 0, "unbias_graft": 1 - (1 - h["lr_cov"]) ** t},
        gain=heavy_ball_gain, kappa=heavy_ball_kappa, contribution=lambda h, sigma: math.nan,
        objection=shampoo_objection, by_entry=False),
    "if_shampoo": Direction(
        if_shampoo, if_shampoo_state, "d = heavy ball of [G times K_i K_i^T on every mode + wd w]", False,
        {"lr": 1e-3, "momentum": 0.9, "damping": 1e-4, "lr_cov": 0.1, "riemannian_momentum": 0.5, "weight_decay": 0.0,
         "update_every": 2, "batch_size": None, "dtype": None, "max_dim": 2048, "lr_cov_scale": 1.0},
        lambda h, t: {"refresh": refreshes(t - 1, h["update_every"])},
        gain=heavy_ball_gain, kappa=heavy_ball_kappa, contribution=newton_contribution, by_entry=False),
}


# ----------------------------------------------------------------------------------------------------------------------
# Rotational equilibrium: where plain optimizers go by themselves
#
# A gradient is orthogonal to the weight (in a random walk: nearly, by chance; before a normalisation layer: exactly).
# So what it contributes over all time makes the weight longer: ||w||^2 grows by C (lr gain contribution)^2 a step.
# Decay makes it shorter: by 2 lr gain wd ||w||^2. The two balance at one norm, and then an update of known size on a
# sphere of known radius turns the neuron by a known angle. Apart from the betas it depends on lr * wd alone, not on the
# layer, except where the decay is divided by the gradient's RMS (adam, rmsprop). ([RE], table 1; rmsprop's and the
# root-free ones' are ours. sigma is taken as given here. Where it is sigma0 / ||w||, as before a normalisation layer,
# put that in and solve for the norm.)
# ----------------------------------------------------------------------------------------------------------------------


def equilibrium(direction, h, C, sigma):
    """Equilibrium (norm, angle per step) of a neuron under the PLAIN geometry.

    Formula  norm^2 * 2 lr_total wd  =  (lr_total * contribution)^2 * C           decay = growth, in every step
             angle = kappa * lr_total * contribution * sqrt(C) / norm  =  kappa sqrt(2 lr_total wd)
             with lr_total = lr * gain. For adam and rmsprop wd stands for wd / sigma: it is divided by the RMS, too
    Args     C: weights in the neuron. sigma: RMS size of a gradient entry (not felt by adamw, lion, shampoo)
    Returns  norm in the weight's unit, angle in radians; (nan, nan) where nothing decays or nothing moves. Shampoo:
             (nan, angle), as the size of its steps depends on the shape, the angle does not
    Source   [RE], section 3.2 and table 1. Lion's sign is linearised there: see lion_walk_norm for the exact value
    """
    lr_total = h["lr"] * direction.gain(h)
    if not (lr_total > 0 and h["weight_decay"] > 0 and sigma > 0):
        return math.nan, math.nan
    wd = h["weight_decay"] * direction.pull(h, sigma)
    norm = math.sqrt(lr_total / (2 * wd) * C) * direction.contribution(h, sigma)
    return norm, direction.kappa(h) * math.sqrt(2 * lr_total * wd)


def lion_walk_norm(h, C):
    """Equilibrium norm of Lion in a Gaussian random walk without the paper's linearised sign.

    Formula  norm^2 = lr C / (2 wd) * sum over lags j of  (2/pi) asin(rho_j) (1 - lr wd)^|j|
             rho_j: autocorrelation of the average inside the sign; asin turns it into that of the signs (arcsine law)
    Source   ours; [RE] has the same with asin(x) ~ x, which makes the sum (2/pi) / S
    """
    b1, b2 = h["betas"]
    S, shrink = lion_filter_power(h), 1 - h["lr"] * h["weight_decay"]
    total = 1.0                                                                         # lag 0: asin(1) * 2/pi = 1
    for j in itertools.takewhile(lambda j: (b2 * shrink) ** (j - 1) > 1e-9, itertools.count(1)):
        rho = b1 * (1 - b2) * b2 ** (j - 1) * ((1 - b1) + b1 * b2 / (1 + b2)) / S       # sum of c_i c_(i+j), over S
        total += 2 * (2 / math.pi) * math.asin(rho) * shrink**j                         # lags j and -j
    return math.sqrt(h["lr"] * C / (2 * h["weight_decay"]) * total)


# ======================================================================================================================
# Geometries:  geometry(direction, w, g, state, h)  moves w in place
#
# The only code that moves a weight in a step. It says what lr and wd mean.
# ======================================================================================================================


def plain(direction, w, g, state, h):
    """w <- w - lr d:  the textbook rule. Decay goes where the direction wants it: into d, or w <- (1 - lr wd) w first.

    Shapes   w, g: any, equal
    Units    lr: weight per unit of d. Decoupled wd: 1 / (lr * steps), since lr * wd is the share of w lost in a step
    """
    lr, wd = h["lr"], h["weight_decay"]
    d = direction.update(g, state, h, 0 if direction.decoupled or not wd else wd * w)
    if direction.decoupled and wd:
        w.mul_(1 - lr * wd)
    w.sub_(lr * d)


def neuron_dims(w, h):
    """The dims over which a neuron's norm is taken: all but the first, or all of them if per_neuron=False."""
    return tuple(range(1 if h["per_neuron"] else 0, w.dim()))


def neuron_norm(w, dims):
    """Euclidean norms of the neurons of w, with the summed dims kept as size 1: they broadcast against w."""
    return torch.linalg.vector_norm(w, dim=dims, keepdim=True)


def sum_of_squares(d, dims):
    """||d||^2 of every neuron, shaped like neuron_norm's. Without its root, which compiled code would take once more
    for every few weights of the neuron."""
    return (d * d).sum(dims, keepdim=True)


def rotational(direction, w, g, state, h):
    """Turn every neuron on the sphere it started on ([RE], algorithm 1). The average angle per step is set outright to
    what the plain optimizer would reach in equilibrium, if decay is not divided by an RMS: the same for every neuron of
    every layer, and without the 1 / (2 lr gain wd) steps of getting there (only U and the direction's averages have to
    fill first).

    Formula  d <- d - mean(d);  d <- d - w (d.w)/n^2          no common offset, and tangent to the sphere
             U <- beta U + (1-beta) ||d||^2                   how large d is on average
             w <- w - angle * n * d / (sqrt(U / (1-beta^t)) + eps);   w <- w * n / ||w||
             angle = kappa sqrt(2 lr gain wd);   beta = update_norm_decay_factor,  eps = rotational_eps
    Shapes   w, g, d: (neurons, ...);  n, U: (neurons, 1, ...), or (1, 1, ...) if per_neuron=False
    Units    angle: radians per step. lr and wd act through their product alone (but in adam, whose v sees wd w); the
             scale of d does not matter until eps is felt
    Notice   the first step turns by exactly arctan(angle) (if eps = 0), since U is then the size of this very d; later
             steps turn more when d is larger than it used to be, less when it is smaller. beta = 0: always as the first
    """
    dims, n, U = neuron_dims(w, h), state["norm"], state["update_norm_sq"]
    d = direction.turning(g, state, h, h["weight_decay"] * w) if direction.turning else direction.update(g, state, h)
    whole_sq = sum_of_squares(d, dims)
    if h["zero_mean"]:
        d = d - d.mean(dims, keepdim=True)                          # first: afterwards it would undo the tangent
    radial = (d * w).sum(dims, keepdim=True) / n**2
    d = torch.addcmul(d, w, radial, value=-1)                       # d - w (d.w)/n^2: the rest would only change ||w||
    size_sq = sum_of_squares(d, dims)
    turns = size_sq > rounding(w) ** 2 * whole_sq                   # where only rounding is left, there is no direction
    U.lerp_(torch.where(turns, size_sq, 0), 1 - h["update_norm_decay_factor"])
    rms = (U / h["unbias_update_norm"]).sqrt()
    w.addcmul_(d, torch.where(turns, h["angle"] * n / (rms + h["rotational_eps"]), 0), value=-1)
    w.mul_(n / neuron_norm(w, dims))                                # back onto the sphere, exactly


def rotational_init(w, h):
    """n = ||w||, kept for ever; U = 0. One number of each per neuron. (h["norm"] is another thing: modular's.)

    U is every other number of a list; those between mean nothing. Without these gaps the compiler of torch 2.13 works
    on the U of 16 neurons at once on a CPU. It then cannot join that loop to those over a neuron's weights, which stay
    in the cache if neurons are taken one by one.
    """
    norm = neuron_norm(w, neuron_dims(w, h))
    return {"norm": norm, "update_norm_sq": torch.stack([torch.zeros_like(norm)] * 2, dim=-1)[..., 0]}


def rotational_scalars(direction, h, t):
    """The angle that the plain optimizer with this lr and wd settles to by itself (adam and rmsprop: would, if their
    decay were not divided by the RMS), and the bias of U."""
    lr = max(h["lr"], 0)                            # see is_rate
    angle = direction.kappa(h) * (2 * lr * direction.gain(h) * h["weight_decay"]) ** 0.5
    return {"angle": angle, "unbias_update_norm": 1 - h["update_norm_decay_factor"] ** t}


def rotates(p, group):
    """Does this parameter turn? Only neurons can, and only decay gives them an angle. The group may say otherwise."""
    if group["rotational"] is not None:
        return group["rotational"]
    return p.dim() > 1 and p.numel() > 0 and group["weight_decay"] != 0


def centre(p, group):
    """What the rotational geometry does to a parameter before the first step: remove the mean of every neuron and keep
    its norm,  w <- ||w|| (w - mean w) / ||w - mean w||.  One that is centred already stays as it is, to the bit."""
    if not group["zero_mean"]:
        return
    w, dims = working_copy(p), neuron_dims(p, group)
    mean, norm = w.mean(dims, keepdim=True), neuron_norm(w, dims)
    residue = w - mean
    off_centre = mean.abs() * math.sqrt(w.numel() / mean.numel()) > rounding(w) * norm
    p.copy_(torch.where(off_centre, residue * (norm / neuron_norm(residue, dims)), w))


def rounding(w):
    """What counts as rounding, relative to the numbers it came from: some times the precision of w's type."""
    return 16 * torch.finfo(w.dtype).eps


def why_stuck(p, group):
    """Why p cannot turn under the group's options, and what to do about it, in words; None if it can. (In the authors'
    code such neurons become NaN, or never move.)"""
    way_out = "or set rotational=False for its group"
    if group["weight_decay"] == 0:
        return f"cannot rotate: weight_decay=0 makes the angle 0. Set weight_decay > 0, {way_out}"
    w, dims = working_copy(p.detach()), neuron_dims(p, group)
    entries = math.prod(p.shape[d] for d in dims)
    needed = 3 if group["zero_mean"] else 2
    if entries < needed:
        weights = "1 weight" if entries == 1 else f"{entries} weights"
        return f"cannot rotate: its neurons have {weights}, and turning takes {needed}. Reshape it, {way_out}"
    norm = neuron_norm(w, dims)
    if not norm.isfinite().all():
        return f"cannot rotate: it holds NaN or infinity. Initialise it, {way_out}"
    if (norm == 0).any():
        return f"cannot rotate: a neuron is all zeros, which has no direction. Initialise it differently, {way_out}"
    if group["zero_mean"]:
        if (neuron_norm(w - w.mean(dims, keepdim=True), dims) <= rounding(w) * norm).any():
            return f"cannot rotate: the weights of a neuron are all equal. Initialise it differently, {way_out}"
    return None


def spectral_norm(d, u):
    """The largest factor by which the matrix d can lengthen a vector, by one step of power iteration:

        v = d u / ||d u||;   norm = ||d^T v||;   u <- d^T v / norm

    u is kept, and d changes little from step to step, so one step each is enough: it approaches the norm from below.
    A convolution is a matrix for every kernel position, and has a norm for each.

    Shapes   d: (out, in, ...), u: (in, ...), v: (out, ...), norm: (...), the dots being the kernel's
    Notice   after an update of zero u would be NaN for good, so u stays as it is. An update orthogonal to u would have
             norm 0 for good, so v starts again from a fixed vector that is hardly ever orthogonal to anything, and for
             this one step the Frobenius norm stands in, which is never below the spectral one
    """
    v = torch.einsum("oi...,i...->o...", d, u)
    size = torch.linalg.vector_norm(v, dim=0)
    anywhere = torch.arange(len(d), dtype=d.dtype, device=d.device).cos().view(-1, *[1] * (d.dim() - 2))
    v = torch.where(size > 0, v / size, anywhere)
    longer = torch.einsum("oi...,o...->i...", d, v)
    norm = torch.linalg.vector_norm(longer, dim=0)
    u.copy_(torch.where((norm > 0) & norm.isfinite(), longer / norm, u))
    return torch.where(size > 0, norm, torch.linalg.vector_norm(d, dim=(0, 1)))


def modular(direction, w, g, state, h):
    """Rescale d in the norm that suits the layer ([MN], section 3), so that lr is the size of the whole network's
    update in a norm built from its architecture. Each weight gets its share of it: see "The modular tree".

    Formula  w <- w - lr share scale d / norm(d);   then decay:  w <- (1 - lr share wd) w,  or rows back to norm `scale`
                    norm                                       scale             after the update
             Linear      spectral                              sqrt(out/in)      decay
             Conv        spectral, for each kernel position    the same / K      decay; K: number of kernel positions
             Embedding   "rows": Euclidean, for each row       sqrt(dim)         rows are put back, whatever wd is
    Shapes   w, g, d: (out, in, ...), or (rows, dim)
    Units    none: how large d is does not matter, and `scale` is the norm that `initialise` gives a weight of that
             layer. At lr = 1 an update would be as large as the weight itself, times its share
    Notice   a zero update, or a zero row of one, adds nothing; decay and putting rows back happen all the same
    """
    d, rows = direction.update(g, state, h), h["norm"] == "rows"
    scale = h["scale"] or usual_size(w.shape, h["norm"])
    norm = torch.linalg.vector_norm(d, dim=1, keepdim=True) if rows else spectral_norm(d, state["u"])
    w.sub_(d * torch.where(norm > 0, h["lr"] * h["share"] * scale / norm, 0))
    if rows:
        size = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        w.mul_(torch.where(size > 0, scale / size, 1))
    elif h["weight_decay"]:
        w.mul_(1 - h["lr"] * h["share"] * h["weight_decay"])


def usual_size(shape, norm):
    """The norm of a weight that turns inputs of RMS 1 into outputs of RMS 1, if they point where it stretches most.
    (An embedding has one number as its input, so each of its rows has norm sqrt(dim).) Spectral: of each kernel
    position."""
    if norm == "rows":
        return math.sqrt(shape[1])
    return math.sqrt(shape[0] / shape[1]) / math.prod(shape[2:])


def modular_init(w, h):
    """u, where power iteration starts: random, but the same in every process and every run."""
    if h["norm"] == "rows":
        return {}
    generator = torch.Generator().manual_seed(h["seed"])
    return {"u": torch.randn(w.shape[1:], generator=generator, dtype=torch.float64).to(w.device, w.dtype)}


def has_modular_norm(p, group):
    """Vectors and scalars (biases, gains) take the plain rule."""
    return p.dim() > 1 and p.numel() > 0


def why_no_norm(p, group):
    """What is wrong with the norm of p, in words; None if nothing is."""
    if group["norm"] == "rows" and p.dim() > 2:
        return "cannot have norm='rows', which takes (rows, dim): set norm='spectral' for its group"
    return None


@dataclass(frozen=True, eq=False)
class Geometry:
    """One column of the table: the function above, and what the rest of the file has to know about it."""
    name: str
    move: Callable                                  # (direction, w, g, state, h): changes w
    key: str | None = None                          # a state entry that only parameters under this geometry have
    init: Callable = lambda w, h: {}                # (w, h) -> dict of state tensors, before the first step
    scalars: Callable = lambda direction, h, t: {}  # numbers that depend on the step
    defaults: dict = field(default_factory=dict)    # hyperparameters it adds
    applies: Callable = lambda p, group: True       # to this parameter? The others take the plain rule
    objection: Callable = lambda p, group: None     # why it cannot be applied, in words
    prepare: Callable = lambda p, group: None       # what it does to a parameter on adding it
    by_row: Callable = lambda h: True               # does what happens to a row depend on that row alone?


PLAIN = Geometry("plain", plain)
ROTATIONAL = Geometry(
    "rotational", rotational, "norm", rotational_init, rotational_scalars,
    {"update_norm_decay_factor": 0.9, "per_neuron": True, "zero_mean": True, "rotational_eps": 1e-8,
     "rotational": None, "weight_decay": 1e-2},     # without decay there is no angle
    applies=rotates, objection=why_stuck, prepare=centre, by_row=lambda h: h["per_neuron"])
MODULAR = Geometry(
    "modular", modular, None, modular_init,
    defaults={"lr": 0.25, "weight_decay": 0.0, "share": 1.0, "norm": "spectral", "scale": None, "seed": 0},
    applies=has_modular_norm, objection=why_no_norm, by_row=lambda h: h["norm"] == "rows")

PER_GROUP = {"rotational", "lr_cov_scale", "share", "norm", "scale"}        # what differs from weight to weight


# ======================================================================================================================
# The optimizer: no mathematics from here to "The modular tree", only bookkeeping
# ======================================================================================================================


def update(direction, work):
    """One step for each (geometry, p, g, state, h) of `work`. Eager and compiled runs both go through here.

    Low-precision parameters are moved in float32 and rounded once at the end, where a step below half the spacing of
    their numbers is lost; float32 and float64 ones in place.
    """
    for geometry, p, g, state, h in work:
        if is_wide(p):
            geometry.move(direction, p, g.to(p.dtype), state, h)
        else:
            w = p.float()
            geometry.move(direction, w, g.float(), state, h)
            p.copy_(w)


def block_size(geometry, device, compiled):
    """How many entries to work on at a time. On a CPU a block's intermediate results stay in the cache; those of a
    whole embedding would go through memory. (A call of compiled code costs more: larger blocks.) On a GPU blocks only
    save memory. Compiled code is not cut there, nor where it has no intermediate results, as under `plain`."""
    if compiled and (geometry is PLAIN or device.type != "cpu"):
        return sys.maxsize
    if device.type == "cpu":
        return 2**20 if compiled else 2**18
    return 2**23


def blocks(direction, work, compiled=False):
    """`work` with its large tensors cut into blocks of rows, wherever the update of a row depends on that row alone:
    the same numbers, sooner and in less memory."""
    for geometry, p, g, state, h in work:
        most = block_size(geometry, p.device, compiled)
        if p.numel() <= most or not is_ordinary(p) or not (direction.by_entry and geometry.by_row(h)):
            yield geometry, p, g, state, h
            continue
        rows = max(1, most * len(p) // p.numel())
        for i in range(0, len(p), rows):
            cut = {key: s[i:i + rows] if s.dim() else s for key, s in state.items()}       # 0-d: a user's own
            yield geometry, p[i:i + rows], g[i:i + rows], cut, h


def packs(direction, work):
    """`work` with its small tensors under `plain` (biases, gains) laid end to end, if the update of an entry depends on
    that entry alone: the same numbers from one call for all of them, where a call costs more than what it does."""
    alike = {}
    for job in work:
        geometry, p, g, state, h = job
        if geometry is PLAIN and direction.by_entry and p.numel() <= 2**12 and is_ordinary(p):
            alike.setdefault((id(h), p.dtype, g.dtype, *state), []).append(job)
        else:
            yield job
    for jobs in alike.values():
        if len(jobs) < 4:                           # laying out and putting back are calls, too
            yield from jobs
            continue
        _, ps, gs, states, (h, *_) = zip(*jobs)
        own = [ps, *zip(*(state.values() for state in states))]                     # what changes: p, every average
        p, *averages = packed = [torch.cat([x.flatten() for x in xs]) for xs in own]
        yield PLAIN, p, torch.cat([g.flatten() for g in gs]), dict(zip(states[0], averages)), h
        for xs, pack in zip(own, packed):                                           # the step is done: put back
            torch._foreach_copy_(xs, [new.view_as(x) for x, new in zip(xs, pack.split([x.numel() for x in xs]))])


def is_ordinary(p):
    """Is p a plain tensor? Rows cut from one of FSDP's, which lie on several machines, would be copies."""
    return type(p) is torch.Tensor


def is_wide(p):
    """Is p precise enough to be moved in place? Averages and small steps drown in the 8 bits of a bfloat16."""
    return p.dtype in (torch.float32, torch.float64)


def working_copy(p):
    """p itself if it is wide, else a float32 copy."""
    return p if is_wide(p) else p.float()


def update_compiled(direction, work):
    """`update` through torch.compile: all small tensors in one piece of code, and each block of a large one."""
    small, large = [], []
    for geometry, p, g, state, h in work:
        if p.dim() == 0:                            # a CPU's compiled code loses what it writes to 0-d float64
            p, g, state = p.view(1), g.view(1), {key: s.view(1) if s.dim() == 0 else s for key, s in state.items()}
        job = geometry, p, g, state, h
        (small if p.numel() <= block_size(geometry, p.device, compiled=True) else large).append(job)
    for batch in filter(None, [small, *([job] for job in blocks(direction, large, compiled=True))]):
        compiled_update(direction, tuple((geometry, p.shape) for geometry, p, _, _, _ in batch))(direction, batch)


@functools.cache
def compiled_update(direction, kinds):
    """torch.compile of `update` for parameters of these kinds: geometries and shapes. Each gets a code object of its
    own: torch.compile keeps its versions of a function, and counts them against a limit, per code object."""
    own = types.FunctionType(update.__code__.replace(co_name=f"update_{direction.update.__name__}"), globals())
    # On a CPU torch's compiler (2.11 to 2.13) fails (KeyError 'buf1') on the loops of an embedding under `modular`
    # if it may fuse loops that stand side by side. `modular` is about as fast without that; `rotational`, with its
    # many sums over the same rows, is not. GPUs do not know the option.
    options = {"cpp.max_horizontal_fusion_size": 1} if any(geometry is MODULAR for geometry, _ in kinds) else {}
    return torch.compile(own, dynamic=False, options=options)


def as_tensor(value, device):
    """A number that changes from step to step, as a 0-d tensor: compiled code then reads it instead of baking it in.
    torch.full fills it on the device itself, so nothing has to wait for a copy. (MPS has no float64.)"""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def is_fraction(x):
    return 0 <= x < 1


def is_size(x):
    return 0 <= x < math.inf


def is_rate(x):
    """A size, or what a schedule leaves of 0: torch's LinearLR(end_factor=0) may end at -1e-18."""
    return -1e-12 < x < math.inf


def is_flag(x):
    return isinstance(x, bool)


RANGES = {                                          # NaN fails every comparison, so it is refused everywhere
    "lr": (is_rate, "a finite number >= 0"),
    "weight_decay": (is_size, "a finite number >= 0"),
    "eps": (is_size, "a finite number >= 0"),
    "rotational_eps": (is_size, "a finite number >= 0"),
    "momentum": (is_fraction, "a number in [0, 1)"),
    "alpha": (is_fraction, "a number in [0, 1)"),
    "update_norm_decay_factor": (is_fraction, "a number in [0, 1)"),
    "betas": (lambda x: len(x) == 2 and all(is_fraction(b) for b in x), "two numbers in [0, 1)"),
    "per_neuron": (is_flag, "True or False"),
    "zero_mean": (is_flag, "True or False"),
    "rotational": (lambda x: x is None or is_flag(x), "True, False or None (None: decide by shape and decay)"),
    "compile": (is_flag, "True or False"),
    "batch_size": (lambda x: 0 < x < math.inf, "a number > 0: over how many examples (or tokens) the loss is a mean"),
    "bias_correction": (is_flag, "True or False"),
    "damping": (is_size, "a finite number >= 0"),
    "lr_cov": (is_size, "a finite number >= 0"),
    "lr_cov_scale": (is_size, "a finite number >= 0"),
    "riemannian_momentum": (is_fraction, "a number in [0, 1)"),
    "update_every": (lambda x: isinstance(x, int) and x >= 1, "a whole number >= 1"),
    "max_dim": (lambda x: x >= 0, "a number >= 0"),
    "graft": (lambda x: x in (None, "sgd", "adam"), "None, 'sgd' or 'adam'"),
    "dtype": (lambda x: x in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16),
              "None or torch.float64, float32, bfloat16 or float16"),
    "share": (is_size, "a finite number >= 0"),
    "norm": (lambda x: x in ("spectral", "rows"), "'spectral' or 'rows'"),
    "scale": (lambda x: x is None or 0 < x < math.inf, "None or a finite number > 0"),
    "seed": (lambda x: isinstance(x, int) and 0 <= x < 2**63, "a whole number >= 0"),
}
# what a group may carry beside hyperparameters: names, and what torch's schedulers leave in it
FREE_KEYS = {"params", "param_names", "name",
             "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


def name_of(group, i, index):
    """What to call parameter i of a group: the name it came with (pass model.named_parameters() to have them)."""
    return group["param_names"][i] if "param_names" in group else f"parameter {i} of group {index}"


class Optimizer(torch.optim.Optimizer):
    """A direction followed by a geometry: the base class of every optimizer here, not meant to be used directly.

    Subclasses set `direction` and `geometry`. Everything a torch.optim.Optimizer can do works: groups, schedulers,
    closures, state_dict, pickle, deepcopy. All state is in self.state[p], as tensors or plain numbers, in float32 or
    the parameter's type, whichever is wider (unless `dtype` says otherwise); `step` there counts the steps in which p
    had a gradient. Parameters without one are left alone, and so is their state.

    Groups may be edited in mid-run, by hand or by a scheduler; every step checks their values as the constructor did.
    But a parameter's first step settles what its state looks like: leave per_neuron, rotational, norm, graft, dtype and
    max_dim as they are from there on.

    On the CPU the same gradients give the same weights, to the bit. On CUDA gradients themselves can differ from run to
    run, since some backward passes add with atomics: see torch.use_deterministic_algorithms.

    compile=True: the step goes through torch.compile. lr may then change at every step; a change of any other
    hyperparameter compiles anew, and after some eight of those torch gives up and runs the step eagerly. Another set of
    parameters that have a gradient compiles anew, too, without such a limit.

    Args     params: parameters, (name, parameter) pairs or groups. hyper: the factors' hyperparameters, and compile
    Errors   ValueError for values out of range, unknown keys in a group, parameters that are complex, sparse or
             expanded, or of FSDP where the update needs whole matrices, sparse gradients, a checkpoint of another model
             or of an optimizer with other hyperparameters or averages; TypeError for an unknown argument
    """
    direction: Direction
    geometry: Geometry = PLAIN

    @classmethod
    @functools.cache
    def takes(cls):
        """Every hyperparameter of the class, with its default: the factors', unless the constructor has its own."""
        arguments = inspect.signature(cls.__init__).parameters.values()
        own = {argument.name: argument.default for argument in arguments
               if argument.name in RANGES and argument.default is not argument.empty}
        return cls.direction.defaults | cls.geometry.defaults | {"compile": False} | own

    def __init__(self, params, **hyper):
        defaults = self.takes()
        unknown = sorted(set(hyper) - set(defaults))
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(unknown)}; it takes {', '.join(defaults)}")
        self._constructing = True                   # check all groups before any weight is touched
        super().__init__(params, defaults | hyper)
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

    def _check_values(self, index):
        group, kind = self.param_groups[index], type(self).__name__
        known = self.takes()
        for key, value in group.items():
            if key not in known:
                if key not in FREE_KEYS:
                    raise ValueError(f"{kind}: unknown key {key!r} in parameter group {index}; it takes "
                                     f"{', '.join(known)}")
                continue
            allowed, words = RANGES[key]
            try:
                good = allowed(value)
            except (TypeError, ValueError, RuntimeError, AttributeError):       # of another kind altogether
                good = False
            if not good:
                raise ValueError(f"{kind}: {key}={value!r} in parameter group {index}: must be {words}")
        objection = self.direction.objection(group)
        if objection:
            raise ValueError(f"{kind}: {objection}")

    def _check_group(self, index):
        self._check_values(index)
        group, kind = self.param_groups[index], type(self).__name__
        for i, p in enumerate(group["params"]):
            name = name_of(group, i, index)
            if p.layout is not torch.strided:
                raise ValueError(f"{kind}: {name} is {p.layout}: only dense parameters are supported")
            if any(size > 1 and stride == 0 for size, stride in zip(p.shape, p.stride())):
                raise ValueError(f"{kind}: {name} {tuple(p.shape)} is expanded: several of its entries are one number "
                                 "in memory. Store it as it was before expand(), or as a clone()")
            if not p.is_floating_point():
                raise ValueError(f"{kind}: {name} is {p.dtype}: only real floating-point parameters are supported "
                                 "(a complex one can be stored as two real ones: torch.view_as_real)")
            self._check_parameter(p, group, name)

    def _check_parameter(self, p, group, name):
        geometry = self.geometry_of(p, group)
        objection = geometry.objection(p, group)
        if not is_ordinary(p.detach()) and (geometry is MODULAR or not self.direction.by_entry):
            objection = (f"is a {type(p.detach()).__name__}, but this update needs plain tensors, and whole matrices. "
                         "Use DistributedDataParallel, or an optimizer whose updates go by entry or row")
        if objection:
            raise ValueError(f"{type(self).__name__}: {name} {tuple(p.shape)} {objection}")

    def geometry_of(self, p, group):
        """The geometry of a parameter: that of the class, or the plain one for biases, gains and what a group exempts.
        Settled at the first step, for good: a decay that a schedule brings down to 0 must end in an angle of 0, not in
        a sudden change of geometry. (So start a schedule that raises the decay above 0, or the weight stays plain.)"""
        state, key = self.state.get(p, {}), self.geometry.key
        mine = key in state if key and "step" in state else self.geometry.applies(p, group)
        return self.geometry if mine else PLAIN

    @torch.no_grad()
    def step(self, closure=None):
        """One step. `closure`, if given, recomputes the loss (and the gradients) and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):       # refuse before anything has moved
            self._check_values(index)                           # schedules and people edit groups in mid-run
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if p.grad.layout is not torch.strided:
                    raise ValueError(f"{type(self).__name__}: {name_of(group, i, index)} has a sparse gradient, which "
                                     "is not supported: build nn.Embedding with sparse=False")
                if "step" not in self.state.get(p, {}):         # it may have been overwritten since the constructor
                    self._check_parameter(p, group, name_of(group, i, index))
        heavy = self.direction.gain is heavy_ball_gain
        eager, compiled = [], []
        for group in self.param_groups:
            hyper_at = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                geometry, state = self.geometry_of(p, group), self.state[p]
                if "step" not in state:
                    geometry.prepare(p, group)
                    w = working_copy(p)
                    state.update(step=0, **self.direction.init(w, group), **geometry.init(w, group))
                if heavy and group["momentum"] and "momentum_buffer" not in state:          # switched on in mid-run
                    state["momentum_buffer"] = self.direction.init(working_copy(p), group)["momentum_buffer"]
                state["step"] += 1
                key = (geometry, state["step"], p.device)
                if key not in hyper_at:             # parameters with the same step count share one dict of numbers
                    hyper_at[key] = self._hyper(geometry, group, state["step"], p.device)
                averages = {key: value for key, value in state.items() if key != "step" and torch.is_tensor(value)}
                work = compiled if group["compile"] else eager
                work.append((geometry, p.detach(), p.grad, averages, hyper_at[key]))
        update(self.direction, blocks(self.direction, packs(self.direction, eager)))
        update_compiled(self.direction, compiled)
        return loss

    def _hyper(self, geometry, group, t, device):
        """The hyperparameters as the formulas see them at step t."""
        h = {key: group[key] for key in self.takes()}
        changing = {"lr": h["lr"], **self.direction.scalars(h, t), **geometry.scalars(self.direction, h, t)}
        if group["compile"]:
            changing = {key: value if isinstance(value, bool) else as_tensor(value, device)
                        for key, value in changing.items()}
        return h | changing

    def __setstate__(self, state):
        """After pickle, deepcopy and load_state_dict. torch adds an option of its own to the defaults, which no group
        here knows."""
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)

    def load_state_dict(self, state_dict):
        """As in torch, but state keeps its precision (torch rounds it to the parameter's type), and the checkpoint of
        an optimizer with other hyperparameters, or of parameters with other shapes, is refused."""
        loaded = []

        def check(self, state_dict):                # what the user's own hooks have made of it
            loaded.extend(self._check_state(state_dict))

        def unround(self):                          # before the user's own hooks see it
            for p, key, value, dtype in loaded:
                self.state[p][key] = copy.deepcopy(value).to(p.device, dtype)   # strides, too: see rotational_init

        hooks = [self.register_load_state_dict_pre_hook(check),
                 self.register_load_state_dict_post_hook(unround, prepend=True)]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_state(self, state_dict):
        """-> (parameter, key, tensor, the type it is to have) for all of a state_dict that fits this optimizer."""
        kind = type(self).__name__
        for group in state_dict["param_groups"]:
            strange = self.takes().keys() ^ (group.keys() & RANGES.keys())      # what only one of the two knows
            if strange:
                raise ValueError(f"{kind}: this state_dict was saved by another optimizer: only one of them has "
                                 f"{', '.join(sorted(strange))}")
        for index, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"])):
            for i, (p, number) in enumerate(zip(group["params"], saved["params"])):
                w = working_copy(p.detach()).to("meta")         # what the state would look like, without its memory
                averages, entries = self.direction.init(w, saved), state_dict["state"].get(number, {})
                like = averages | self.geometry.init(w, saved)
                missing = averages.keys() - entries.keys() - {"momentum_buffer"}        # that may come in mid-run
                if entries and missing:
                    raise ValueError(f"{kind}: this state_dict was saved by another optimizer: it has no "
                                     f"{', '.join(sorted(missing))} of {name_of(group, i, index)}")
                for key, value in entries.items():
                    if not isinstance(value, torch.Tensor):
                        continue
                    if key in like and value.shape != like[key].shape:
                        raise ValueError(f"{kind}: this state_dict was saved for another model: {key} of "
                                         f"{name_of(group, i, index)} {tuple(p.shape)} is {tuple(value.shape)} in it")
                    yield p, key, value, like[key].dtype if key in like else w.dtype


# ======================================================================================================================
# The named optimizers
# ======================================================================================================================


class SGD(Optimizer):
    """Stochastic gradient descent with heavy-ball momentum and coupled L2 regularisation.

    Formula  m <- momentum * m + (g + weight_decay * w);   w <- w - lr * m
    Shapes   any
    State    1 tensor like w (none if momentum = 0)
    Units    lr: weight^2 / loss. In effect lr / (1 - momentum): momentum is a sum, not an average
    Settles  (in a random walk: see `equilibrium`)  ||w||^2 = lr E||g||^2 / (2 wd (1-mu)), turning by
             sqrt(2 lr wd / (1+mu)) a step
    Errors   ValueError: lr, weight_decay < 0 or not finite; momentum outside [0, 1)
    Source   Polyak 1964; equal to torch.optim.SGD (no dampening, no Nesterov)
    """
    direction = DIRECTIONS["sgd"]

    def __init__(self, params, lr=1e-3, momentum=0.0, weight_decay=0.0, *, compile=False):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, compile=compile)


class Adam(Optimizer):
    """Adam with L2 regularisation: the decay is added to the gradient, and so divided by the gradient's RMS as well.

    Formula  x = g + weight_decay * w;   m <- b1 m + (1-b1) x;   v <- b2 v + (1-b2) x^2
             w <- w - lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
    Shapes   any
    State    2 tensors like w
    Units    lr: weight per step (while gradients agree: lr). weight_decay: loss / weight^2
    Settles  ||w||^2 = lr C sigma / (2 wd), turning by sqrt(2 lr wd (1-b1) / ((1+b1) sigma)) a step: both depend on the
             gradient's size sigma. Layers with large gradients turn slowly, others fast; AdamW has no such imbalance
    Errors   ValueError: lr, eps, weight_decay < 0 or not finite; betas outside [0, 1)
    Source   Kingma and Ba 2015, algorithm 1; equal to torch.optim.Adam
    """
    direction = DIRECTIONS["adam"]

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, compile=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, compile=compile)


class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    Formula  w <- (1 - lr * weight_decay) w;   m <- b1 m + (1-b1) g;   v <- b2 v + (1-b2) g^2
             w <- w - lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
    Shapes   any
    State    2 tensors like w
    Units    lr: weight per step. weight_decay: 1 / (lr * steps): w forgets its past in 1 / (lr * weight_decay) steps
    Settles  ||w||^2 = lr C / (2 wd), turning by sqrt(2 lr wd (1-b1) / (1+b1)) a step, whatever the gradient's size
    Errors   ValueError: lr, eps, weight_decay < 0 or not finite; betas outside [0, 1)
    Source   Loshchilov and Hutter 2019, algorithm 2, whose decay is not multiplied by lr; ours is torch.optim.AdamW's
    """
    direction = DIRECTIONS["adamw"]

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *, compile=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, compile=compile)


class Lion(Optimizer):
    """Lion: the sign of an average, so that every weight moves by the same amount.

    Formula  w <- (1 - lr * weight_decay) w;   w <- w - lr * sign(b1 m + (1-b1) g);   then  m <- b2 m + (1-b2) g
    Shapes   any
    State    1 tensor like w
    Units    lr: weight per step, exactly. weight_decay: 1 / (lr * steps)
    Settles  ||w||^2 = lr C / (pi wd S), turning by sqrt(pi lr wd S) a step; S = (1-b1)^2 + b1^2 (1-b2) / (1+b2)
    Errors   ValueError: lr, weight_decay < 0 or not finite; betas outside [0, 1)
    Source   Chen et al. 2023, algorithm 2
    """
    direction = DIRECTIONS["lion"]

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, compile=False):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, compile=compile)


class RMSProp(Optimizer):
    """RMSProp: the gradient over its root mean square, optionally with heavy-ball momentum.

    Formula  x = g + weight_decay * w;   v <- alpha v + (1-alpha) x^2;   d = x / (sqrt(v) + eps)
             m <- momentum * m + d;   w <- w - lr * m
    Shapes   any
    State    1 tensor like w, 2 with momentum
    Units    lr: weight per step, in effect lr / (1 - momentum). weight_decay: loss / weight^2
    Settles  ||w||^2 = lr C sigma / (2 wd (1-mu)), turning by sqrt(2 lr wd / ((1+mu) sigma)) a step
    Errors   ValueError: lr, eps, weight_decay < 0 or not finite; alpha, momentum outside [0, 1)
    Source   Tieleman and Hinton 2012; equal to torch.optim.RMSprop (not centered)
    """
    direction = DIRECTIONS["rmsprop"]

    def __init__(self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, *, compile=False):
        super().__init__(params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum,
                         compile=compile)


class RotationalSGD(Optimizer):
    """SGD's direction on the rotational geometry.

    Formula  m <- momentum * m + g;   d = m, made zero-mean and tangent;   every neuron turns, on average, by
             angle = sqrt(2 lr weight_decay / (1 + momentum))  radians a step along d, and keeps its norm
    Shapes   turns neurons w[i] of parameters with 2 dims or more whose group has weight_decay > 0 (settled at a
             weight's first step); the others (biases, gains) follow plain SGD, with their group's decay
    State    1 tensor like w (none if momentum = 0) and 2 numbers per neuron
    Options  update_norm_decay_factor: of the average of ||d||^2; 0: every step turns by exactly arctan(angle)
             per_neuron: False keeps the norm of the whole tensor instead.   zero_mean: neurons and updates are centred
             (weights at construction, keeping their norm).   rotational_eps: added to the average size of d
             A group may set rotational=True or False to overrule the choice by shape and decay
    Units    angle: radians per step; only lr * weight_decay matters to a turning weight. lr for the others: as in SGD
    Errors   ValueError as in SGD; also for a neuron that cannot turn (too few weights, all zero, all equal)
    Source   Kosson et al. 2024, algorithm 1 and table 1
    """
    direction, geometry = DIRECTIONS["sgd"], ROTATIONAL

    def __init__(self, params, lr=0.1, momentum=0.9, weight_decay=1e-4, *, update_norm_decay_factor=0.9,
                 per_neuron=True, zero_mean=True, rotational_eps=1e-8, compile=False):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay,
                         update_norm_decay_factor=update_norm_decay_factor, per_neuron=per_neuron, zero_mean=zero_mean,
                         rotational_eps=rotational_eps, compile=compile)


class RotationalAdamW(Optimizer):
    """AdamW's direction on the rotational geometry.

    Formula  d = mean(g) / rms(g), as in AdamW, made zero-mean and tangent;   every neuron turns, on average, by
             angle = sqrt(2 lr weight_decay (1-b1) / (1+b1))  radians a step, and keeps its norm
    Shapes   turns neurons w[i] of parameters with 2 dims or more whose group has weight_decay > 0; the others (biases,
             gains) follow plain AdamW, with their group's decay
    State    2 tensors like w and 2 numbers per neuron
    Options  update_norm_decay_factor, per_neuron, zero_mean, rotational_eps, and `rotational` in a group: see
             RotationalSGD
    Units    angle: radians per step; only lr * weight_decay matters to a turning weight. lr for the others: as in AdamW
    Errors   ValueError as in AdamW; also for a neuron that cannot turn (too few weights, all zero, all equal)
    Source   Kosson et al. 2024, algorithm 1 and table 1
    """
    direction, geometry = DIRECTIONS["adamw"], ROTATIONAL

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *,
                 update_norm_decay_factor=0.9, per_neuron=True, zero_mean=True, rotational_eps=1e-8, compile=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                         update_norm_decay_factor=update_norm_decay_factor, per_neuron=per_neuron, zero_mean=zero_mean,
                         rotational_eps=rotational_eps, compile=compile)


class RotationalAdam(Optimizer):
    """Adam+L2 with AdamW's balanced rotation: the paper's experiment on what makes AdamW better than Adam+L2.

    Formula  d = mean(g) / rms(g + weight_decay * w), made zero-mean and tangent;   every neuron turns, on average, by
             angle = sqrt(2 lr weight_decay (1-b1) / (1+b1))  radians a step, and keeps its norm
    Shapes   as in RotationalAdamW; the parameters that do not turn follow plain Adam, L2 included
    State    2 tensors like w and 2 numbers per neuron
    Units    lr * weight_decay sets the angle, and weight_decay is felt by v besides. Biases, gains: lr as in Adam
    Options  as in RotationalAdamW
    Errors   as in RotationalAdamW
    Source   Kosson et al. 2024, section 5.3; the authors' wrapper around Adam with the angle of AdamW
    Notice   the decay is felt by v, not by m: the L2 term still distorts how the entries of d are scaled against each
             other, but not how far the neuron turns. Where this does as well as AdamW, balance was what mattered
    """
    direction, geometry = DIRECTIONS["adam"], ROTATIONAL

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, *,
                 update_norm_decay_factor=0.9, per_neuron=True, zero_mean=True, rotational_eps=1e-8, compile=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                         update_norm_decay_factor=update_norm_decay_factor, per_neuron=per_neuron, zero_mean=zero_mean,
                         rotational_eps=rotational_eps, compile=compile)


class RotationalLion(Optimizer):
    """Lion's direction on the rotational geometry.

    Formula  d = sign(b1 m + (1-b1) g), made zero-mean and tangent;   every neuron turns, on average, by
             angle = sqrt(pi lr weight_decay S)  radians a step, and keeps its norm, with
             S = (1-b1)^2 + b1^2 (1-b2) / (1+b2)
    Shapes   turns neurons w[i] of parameters with 2 dims or more whose group has weight_decay > 0; the others (biases,
             gains) follow plain Lion, with their group's decay
    State    1 tensor like w and 2 numbers per neuron
    Options  update_norm_decay_factor, per_neuron, zero_mean, rotational_eps, and `rotational` in a group: see
             RotationalSGD
    Units    angle: radians per step; only lr * weight_decay matters to a turning weight. lr for the others: as in Lion
    Errors   ValueError as in Lion; also for a neuron that cannot turn (too few weights, all zero, all equal)
    Source   Kosson et al. 2024, algorithm 1 and table 1
    """
    direction, geometry = DIRECTIONS["lion"], ROTATIONAL

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=1.0, *, update_norm_decay_factor=0.9,
                 per_neuron=True, zero_mean=True, rotational_eps=1e-8, compile=False):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay,
                         update_norm_decay_factor=update_norm_decay_factor, per_neuron=per_neuron, zero_mean=zero_mean,
                         rotational_eps=rotational_eps, compile=compile)


class ModularSGD(Optimizer):
    """The average gradient, rescaled in the modular norm.

    Formula  m <- m + (1 - momentum)^((t-1)/t) (g - m);   w <- w - lr share scale m / norm(m)
             then  w <- (1 - lr share weight_decay) w,  or an embedding's rows back to norm `scale`
    Shapes   2 dims or more: the weights of Linear, Conv, Embedding. The others (biases, gains) follow the plain
             rule:  w <- (1 - lr weight_decay) w;   w <- w - lr m
    State    1 tensor like w, and 1 like w[0]: where power iteration is
    Groups   norm: "spectral", or "rows" for embeddings; share; scale: the norm of the weights, None: their usual one.
             optim.build makes groups from the model's modular_tree(). Without groups every weight is taken for a
             Linear's or a Conv's, with share 1: layers are balanced, but not by what they do to each other
    Options  seed: of the vector that power iteration starts from
    Units    none: lr is the size of the network's update in its modular norm. Tune it on a small model
    Errors   ValueError: lr, weight_decay, share < 0 or not finite; scale <= 0; momentum outside [0, 1)
    Source   Large et al. 2024, with the averages of the authors' code
    """
    direction, geometry = DIRECTIONS["warm_sgd"], MODULAR

    def __init__(self, params, lr=0.25, momentum=0.9, weight_decay=0.0, *, seed=0, compile=False):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, seed=seed, compile=compile)


class ModularAdam(Optimizer):
    """Adam's direction, rescaled in the modular norm: one learning rate for every width and depth.

    Formula  m <- m + (1-b1)^((t-1)/t) (g - m);   v <- v + (1-b2)^((t-1)/t) (g^2 - v);   d = m / sqrt(v), 0 for 0/0
             w <- w - lr share scale d / norm(d)
             then  w <- (1 - lr share weight_decay) w,  or an embedding's rows back to norm `scale`
    Shapes   2 dims or more: the weights of Linear, Conv, Embedding. The others (biases, gains) follow the plain
             rule:  w <- (1 - lr weight_decay) w;   w <- w - lr d
    State    2 tensors like w, and 1 like w[0]: where power iteration is
    Groups   and options: as in ModularSGD
    Units    none: lr is the size of the network's update in its modular norm. Tune it on a small model
    Errors   ValueError: lr, weight_decay, share < 0 or not finite; scale <= 0; betas outside [0, 1)
    Source   Large et al. 2024, with the averages of the authors' code, which has no eps either
    """
    direction, geometry = DIRECTIONS["warm_adam"], MODULAR

    def __init__(self, params, lr=0.25, betas=(0.9, 0.99), weight_decay=0.0, *, seed=0, compile=False):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, seed=seed, compile=compile)


class RootFreeRMSProp(Optimizer):
    """RMSProp without the square root: a diagonal second-order method.

    Formula  s <- alpha s + (1-alpha) g^2, s = 1/B at first;   d = g / (B s + eps)
             m <- momentum * m + (d + weight_decay * w);   w <- w - lr * m
    Shapes   any
    State    1 tensor like w, 2 with momentum
    Units    batch_size B: over how many examples the loss is a mean (for a language model: tokens). B s is a curvature,
             d a Newton step, so lr has no unit; in effect lr / (1 - momentum). eps: a curvature, adds damping
    Settles  ||w||^2 = lr C / (2 wd (1-mu)) * (sigma / (B sigma^2 + eps))^2, turning by sqrt(2 lr wd / (1+mu)) a step
    Errors   ValueError: batch_size missing or <= 0; lr, eps, weight_decay < 0 or not finite; alpha, momentum outside
             [0, 1)
    Source   Lin et al. 2024; the authors' RMSProp, with decay between preconditioner and heavy ball
    Notice   where RMSProp gives all weights steps of one size, this one gives large gradients SMALL steps. The authors'
             best lr lies between AdamW's and SGD's on convolutional networks, and below AdamW's on transformers
    """
    direction = DIRECTIONS["rf_rmsprop"]

    def __init__(self, params, lr=1e-2, alpha=0.99, eps=1e-4, weight_decay=0.0, momentum=0.9, *, batch_size=None,
                 compile=False):
        super().__init__(params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum,
                         batch_size=batch_size, compile=compile)


class RootFreeAdamW(Optimizer):
    """AdamW without the square root.

    Formula  w <- (1 - lr * weight_decay) w;   m <- b1 m + (1-b1) g;   s <- b2 s + (1-b2) g^2, s = 1/B at first
             w <- w - lr * m / (B s + eps);    bias_correction: m / (1-b1^t) and B s / (1-b2^t) instead
    Shapes   any
    State    2 tensors like w
    Units    as in RootFreeRMSProp; weight_decay: 1 / (lr * steps), as in AdamW
    Settles  ||w||^2 = lr C / (2 wd) * (sigma / (B sigma^2 + eps))^2, turning by sqrt(2 lr wd (1-b1) / (1+b1)) a step
    Errors   ValueError: batch_size missing or <= 0; lr, eps, weight_decay < 0 or not finite; betas outside [0, 1)
    Source   Lin et al. 2024; the authors' code, bias correction off
    """
    direction = DIRECTIONS["rf_adamw"]

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-4, weight_decay=1e-2, *, batch_size=None,
                 bias_correction=False, compile=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, batch_size=batch_size,
                         bias_correction=bias_correction, compile=compile)


class Shampoo(Optimizer):
    """Shampoo: an inverse root of a d x d matrix for every mode of a tensor. The baseline with roots.

    Formula  L_i <- (1-lr_cov) L_i + lr_cov G_(i) G_(i)^T, L_i = 0 at first
             d = G times (L_i + damping)^(-1/(2k)) on each of its k modes
             m <- momentum * m + (d + weight_decay * w);   w <- w - lr * m
    Shapes   any; modes longer than max_dim get a diagonal L_i, a mode of size 1 a number that counts among the k
    State    1 tensor like w (none if momentum = 0), 1 more with graft="adam", and 2 matrices d_i x d_i per mode
             (vectors beyond max_dim)
    Options  update_every: steps between new roots (before the first, d = G).  graft: "sgd" or "adam" gives d the norm
             of that method's direction (adam without momentum, b2 = 1 - lr_cov).  dtype: of the matrices; None: the
             parameter's, float32 at least
    Units    d has none (graft="sgd": g's). Its size depends on the shape: on noise, without graft,
             ||d|| = (number of weights)^(1/(2k)), if no mode is so long that the gradients of the last 1 / lr_cov
             steps cannot fill its L_i
    Errors   ValueError: values out of range; damping 0; lr_cov 0 or above 1; dtype bfloat16 or float16, which no root
             survives
    Source   Gupta et al. 2018, algorithm 1 and 2, with a running average; heavy ball and decay as in RootFreeRMSProp
    """
    direction = DIRECTIONS["shampoo"]

    def __init__(self, params, lr=1e-2, momentum=0.9, damping=1e-6, lr_cov=0.05, weight_decay=0.0, update_every=2, *,
                 max_dim=2048, graft=None, dtype=None, compile=False):
        super().__init__(params, lr=lr, momentum=momentum, damping=damping, lr_cov=lr_cov, weight_decay=weight_decay,
                         update_every=update_every, max_dim=max_dim, graft=graft, dtype=dtype, compile=compile)


class InverseFreeShampoo(Optimizer):
    """Shampoo without roots and without inverses: matrix products alone, so that all of it can run in bfloat16.

    Formula  A = sqrt(B) G times K_i on every mode i;  with c_i = prod of the other ||K_j||^2 / d_j,
             H_i = 1/2 [ A_(i) A_(i)^T / (prod of the other d_j)  +  damping c_i K_i^T K_i  -  I ]
             M_i <- riemannian_momentum M_i + (1 - riemannian_momentum) H_i
             K_i <- K_i - lr_cov lr_cov_scale / max(1, ||M_i||) K_i M_i
             d = G times K_i K_i^T on every mode;   m <- momentum * m + (d + weight_decay * w);   w <- w - lr * m
    Shapes   any; modes of size 1 are squeezed away, modes longer than max_dim get a diagonal K_i
    State    1 tensor like w (none if momentum = 0), and 2 matrices d_i x d_i per mode (vectors beyond max_dim), all in
             `dtype`
    Options  update_every: the largest gap between preconditioner steps; they are dense at first (`refreshes`).
             lr_cov_scale: a factor of lr_cov, given in a group. `build` gives 0.25 to parameters with 1 dim (the
             authors to all whose name holds norm, proj or bias).
             dtype: of the whole recursion; None: the parameter's, float32 at least. Weights keep their own. float16
             overflows where bfloat16 does not.  damping=0: K grows for ever along what no gradient ever shows
    Units    batch_size B: over how many examples the loss is a mean. With one mode d is a Newton step: lr has no unit
    Settles  where gradients are noise without structure: as RootFreeRMSProp, with damping for eps
    Errors   ValueError: batch_size missing or <= 0; values out of range
    Source   Lin et al. 2024, inverse-free Shampoo, as in the authors' code (their beta2 is riemannian_momentum)
    """
    direction = DIRECTIONS["if_shampoo"]

    def __init__(self, params, lr=1e-3, momentum=0.9, damping=1e-4, lr_cov=0.1, riemannian_momentum=0.5,
                 weight_decay=0.0, update_every=2, *, batch_size=None, dtype=None, max_dim=2048, compile=False):
        super().__init__(params, lr=lr, momentum=momentum, damping=damping, lr_cov=lr_cov,
                         riemannian_momentum=riemannian_momentum, weight_decay=weight_decay, update_every=update_every,
                         batch_size=batch_size, dtype=dtype, max_dim=max_dim, compile=compile)


def compose(name, direction, geometry):
    """A class for a pair that no paper has named. It takes the hyperparameters of both, as keywords."""
    options = {ROTATIONAL: " and in RotationalSGD", MODULAR: " and in ModularSGD"}.get(geometry, "")
    doc = f"The direction {direction} under the {geometry.name} geometry: options as in its plain class{options}."
    return type(name, (Optimizer,), {"direction": DIRECTIONS[direction], "geometry": geometry, "__doc__": doc,
                                     "__module__": __name__})


RotationalRMSProp = compose("RotationalRMSProp", "rmsprop", ROTATIONAL)
RotationalRootFreeRMSProp = compose("RotationalRootFreeRMSProp", "rf_rmsprop", ROTATIONAL)
RotationalRootFreeAdamW = compose("RotationalRootFreeAdamW", "rf_adamw", ROTATIONAL)
RotationalShampoo = compose("RotationalShampoo", "shampoo", ROTATIONAL)
RotationalInverseFreeShampoo = compose("RotationalInverseFreeShampoo", "if_shampoo", ROTATIONAL)
ModularLion = compose("ModularLion", "lion", MODULAR)
ModularRMSProp = compose("ModularRMSProp", "rmsprop", MODULAR)
ModularRootFreeRMSProp = compose("ModularRootFreeRMSProp", "rf_rmsprop", MODULAR)
ModularRootFreeAdamW = compose("ModularRootFreeAdamW", "rf_adamw", MODULAR)
ModularShampoo = compose("ModularShampoo", "shampoo", MODULAR)
ModularInverseFreeShampoo = compose("ModularInverseFreeShampoo", "if_shampoo", MODULAR)


# ======================================================================================================================
# The modular tree: which share of the network's update each weight gets
#
# A network is written as an expression of its layers ([MN], section 3 and table 1). Two numbers belong to every part:
#
#   mass          how much of the learning is to happen in it. A weight has mass 1 unless told otherwise
#   sensitivity   its output's largest relative change, per relative change of its input (a Lipschitz constant). At 1 a
#                 chain of parts neither amplifies changes nor damps them
#
#                              mass             sensitivity
#   weight(layer)              1                1             nn.Linear, nn.Conv2d, nn.Embedding
#   bond(name, s)              0                s             everything without weights: relu, attention, layer norm
#   M2 @ M1  (M1 is first)     m1 + m2          s1 * s2
#   (M1, M2)  side by side     m1 + m2          s1 + s2
#   M1 + M2                    = bond("+", 1) @ (M1, M2)
#   a * M                      = bond("a", |a|) @ M
#   M ** L                     L m              s^L           L copies of M, each with its own weights, in a row
#   M.tare(m)                  m                s             all masses in it rescaled to give m in sum
#
# The whole network's update has size 1; each part gets a share of it. What comes later amplifies what comes earlier:
#
#   M2 @ M1:   M1 gets  target * mass1/mass / sensitivity2,   M2 gets  target * mass2/mass
#   (M1, M2):  each gets  target * its mass/mass
#
# and then, to first order, no single step of modular norm 1 changes the output by more than 1, however deep or wide.
# ======================================================================================================================


def columns(rows):
    """Rows of words as text, with the words of a column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


class Tree:
    """A part of a network: see the table above. Immutable; print(tree) shows the share of every weight."""
    mass: float
    sensitivity: float

    def __matmul__(self, first):
        return Composition(self, as_tree(first))

    def __rmatmul__(self, then):
        return Composition(as_tree(then), self)

    def __add__(self, other):
        return Composition(bond("+"), Parallel((self, as_tree(other))))

    def __rmul__(self, factor):
        if not (isinstance(factor, (int, float)) and math.isfinite(factor)):
            raise TypeError(f"a part of a network can be multiplied by a finite number, not by {factor!r}")
        return Composition(bond(f"{factor:.4g} *", abs(factor)), self)

    def __pow__(self, copies):
        return Power(self, copies)

    def tare(self, mass):
        """A new tree: the same with all masses in it rescaled so that their sum is `mass`."""
        return Tare(self, mass)

    def weights(self, target=1.0, unit=1.0):
        """Yield (leaf, mass, share) in the order of the forward pass. target: the size of this part's update; unit:
        what `tare` around it has made of a mass of 1 in here (for the masses yielded alone: no share depends on it)."""
        raise NotImplementedError

    def part(self, i, parts):
        """The i-th of the copies that ** makes: run i of every leaf's layers."""
        raise NotImplementedError

    def __str__(self):
        rows = [("weight", "norm", "scale", "mass", "share")]
        for leaf, mass, share in self.weights():
            rows.append((leaf.words(), leaf.norm, *(f"{x:.4g}" for x in (leaf.scale, mass, share))))
        return f"{columns(rows)}\nmass {self.mass:.4g}, sensitivity {self.sensitivity:.4g}: {self!r}"


@dataclass(frozen=True, eq=False, repr=False)
class Leaf(Tree):
    """Layers with a weight each, one for every copy that ** will make of the leaf: use `weight`."""
    layers: tuple
    mass: float
    norm: str
    sensitivity = 1.0

    @property
    def layer(self):
        if len(self.layers) != 1:
            raise ValueError(f"{self!r} stands for {len(self.layers)} layers: it needs as many copies, by **")
        return self.layers[0]

    @property
    def scale(self):
        return usual_size(self.layers[0].weight.shape, self.norm)

    def weights(self, target=1.0, unit=1.0):
        self.layer                                  # refuses a leaf of several layers
        yield self, self.mass * unit, target

    def part(self, i, parts):
        each, rest = divmod(len(self.layers), parts)
        if rest:
            raise ValueError(f"** {parts} needs {parts} layers, or a multiple of it, in every weight(...): {self!r} "
                             f"has {len(self.layers)}")
        return Leaf(self.layers[i * each:(i + 1) * each], self.mass, self.norm)

    def words(self):
        return f"{type(self.layers[0]).__name__} {'x'.join(map(str, self.layers[0].weight.shape))}"

    def __repr__(self):
        return self.words() + (f" (of {len(self.layers)})" if len(self.layers) > 1 else "")


@dataclass(frozen=True, eq=False, repr=False)
class Bond(Tree):
    """A part without weights: use `bond`."""
    name: str
    sensitivity: float
    mass = 0.0

    def weights(self, target=1.0, unit=1.0):
        return iter(())

    def part(self, i, parts):
        return self

    def __repr__(self):
        return self.name


@dataclass(frozen=True, eq=False, repr=False)
class Composition(Tree):
    """M2 @ M1."""
    then: Tree
    first: Tree

    @property
    def mass(self):
        return self.first.mass + self.then.mass

    @property
    def sensitivity(self):
        return self.first.sensitivity * self.then.sensitivity

    def weights(self, target=1.0, unit=1.0):
        if self.first.mass and not self.then.sensitivity:
            raise ValueError(f"{self!r}: the weights in {self.first!r} cannot reach the output through something of "
                             "sensitivity 0")
        yield from self.first.weights(self.first.mass and target * self.first.mass / self.mass / self.then.sensitivity,
                                      unit)
        yield from self.then.weights(self.then.mass and target * self.then.mass / self.mass, unit)

    def part(self, i, parts):
        return Composition(self.then.part(i, parts), self.first.part(i, parts))

    def __repr__(self):
        if self.then_is("+"):
            return "(" + " + ".join(map(repr, self.first.parts)) + ")"
        if self.then_is(" *"):
            return f"{self.then.name} {braced(self.first)}"
        return f"{self.then!r} @ {self.first!r}"

    def then_is(self, ending):
        return isinstance(self.then, Bond) and self.then.name.endswith(ending)


@dataclass(frozen=True, eq=False, repr=False)
class Parallel(Tree):
    """(M1, M2, ...)."""
    parts: tuple

    @property
    def mass(self):
        return sum(part.mass for part in self.parts)

    @property
    def sensitivity(self):
        return sum(part.sensitivity for part in self.parts)

    def weights(self, target=1.0, unit=1.0):
        for part in self.parts:
            yield from part.weights(part.mass and target * part.mass / self.mass, unit)

    def part(self, i, parts):
        return Parallel(tuple(part.part(i, parts) for part in self.parts))

    def __repr__(self):
        return "(" + ", ".join(map(repr, self.parts)) + ")"


@dataclass(frozen=True, eq=False, repr=False)
class Power(Tree):
    """M ** L: L copies of M, one after the other."""
    one: Tree
    copies: int

    def __post_init__(self):
        if not isinstance(self.copies, int) or self.copies < 1:
            raise ValueError(f"** {self.copies!r}: the number of copies must be a whole number >= 1")

    @property
    def mass(self):
        return self.copies * self.one.mass

    @property
    def sensitivity(self):
        return self.one.sensitivity ** self.copies

    def weights(self, target=1.0, unit=1.0):
        for i in range(self.copies):                # what copy i does goes through the later ones
            later = self.one.sensitivity ** (self.copies - 1 - i)
            if self.mass and not later:
                raise ValueError(f"{self!r}: its copies have sensitivity 0, so only the last one can reach the output")
            yield from self.one.part(i, self.copies).weights(self.mass and target / self.copies / later, unit)

    def part(self, i, parts):
        return Power(self.one.part(i, parts), self.copies)

    def __repr__(self):
        return f"{braced(self.one)} ** {self.copies}"


@dataclass(frozen=True, eq=False, repr=False)
class Tare(Tree):
    """M.tare(m). Only the ratios of masses matter inside M, so nothing in there has to change."""
    inside: Tree
    mass: float

    def __post_init__(self):
        if not (is_size(self.mass) and self.inside.mass > 0):
            raise ValueError(f"tare({self.mass!r}): the mass must be a finite number >= 0, and what it is given to "
                             "must have some")

    @property
    def sensitivity(self):
        return self.inside.sensitivity

    def weights(self, target=1.0, unit=1.0):
        yield from self.inside.weights(target, unit * self.mass / self.inside.mass)

    def part(self, i, parts):
        return Tare(self.inside.part(i, parts), self.mass)

    def __repr__(self):
        return f"{braced(self.inside)}.tare({self.mass:g})"


def braced(tree):
    """repr of a tree, in parentheses unless it brings its own or needs none."""
    bare = isinstance(tree, (Leaf, Bond, Parallel)) or isinstance(tree, Composition) and tree.then_is("+")
    return repr(tree) if bare else f"({tree!r})"


def as_tree(x):
    """A tuple of trees, as one; a tree, as it is."""
    if isinstance(x, tuple):
        return Parallel(tuple(map(as_tree, x)))
    if not isinstance(x, Tree):
        raise TypeError(f"{x!r} is no part of a modular tree: wrap a layer in optim.weight(...), and name what has no "
                        "weights with optim.bond(...)")
    return x


def weight(*layers, mass=1.0, norm=None):
    """The weight of a layer, as a tree. Several layers stand for one, in as many copies as ** makes of it.

    Args     layers: nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d (without groups), nn.Embedding; all of one shape
             norm: None takes "rows" for an Embedding and "spectral" for all others
    Errors   TypeError for other layers, ValueError for layers of different shapes, or mass < 0
    """
    convs = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    for layer in layers:
        if not isinstance(layer, (torch.nn.Linear, torch.nn.Embedding, *convs)):
            raise TypeError(f"optim.weight takes nn.Linear, nn.Conv1d to 3d, nn.Embedding, not {type(layer).__name__}")
        if isinstance(layer, convs) and layer.groups != 1:
            raise TypeError("optim.weight: a convolution with groups has no known modular norm")
    if len({(type(layer), layer.weight.shape) for layer in layers}) != 1:
        raise ValueError("optim.weight: give it one layer, or several of the same type and shape")
    if not is_size(mass):
        raise ValueError(f"optim.weight: mass={mass!r} must be a finite number >= 0")
    if norm not in (None, "spectral") and not (norm == "rows" and layers[0].weight.dim() == 2):
        raise ValueError(f"optim.weight: norm={norm!r} must be 'spectral', or 'rows' for a weight of 2 dims")
    return Leaf(layers, mass, norm or ("rows" if isinstance(layers[0], torch.nn.Embedding) else "spectral"))


def bond(name, sensitivity=1.0):
    """Something without weights, as a tree: bond("attention"), bond("relu", 0.5 ** 0.5).

    Values   sensitivity 1: identity, mean subtraction, layer norm, attention, abs. 1/sqrt(2): relu, gelu
    """
    if not is_size(sensitivity):
        raise ValueError(f"optim.bond: sensitivity={sensitivity!r} must be a finite number >= 0")
    return Bond(name, sensitivity)


@torch.no_grad()
def initialise(tree):
    """Fill the weights of a tree, in place, with random ones of their usual norm, which is what the shares presuppose.
    Linear: all singular values are sqrt(out/in). Conv: so at each kernel position, divided by the number of these.
    Embedding: rows of norm sqrt(dim), and zeros at padding_idx.

    Errors   ValueError for a weight that is not a Parameter, but computed from others (weight_norm, parametrizations)
    Source   [MN]; the authors store the same divided by `scale` and multiply by it in the forward pass
    """
    for leaf, _, _ in tree.weights():
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
        for position in w.flatten(2).unbind(2) if w.dim() > 2 else [w]:
            position.copy_(leaf.scale * torch.nn.init.orthogonal_(torch.empty_like(working_copy(position))))


# ======================================================================================================================
# By name: the registry, and `build`, which decides the rule of every parameter of a model
# ======================================================================================================================

OPTIMIZERS = {
    "sgd": SGD, "rotational_sgd": RotationalSGD, "modular_sgd": ModularSGD,
    "adam": Adam, "rotational_adam": RotationalAdam,
    "adamw": AdamW, "rotational_adamw": RotationalAdamW, "modular_adam": ModularAdam,
    "lion": Lion, "rotational_lion": RotationalLion, "modular_lion": ModularLion,
    "rmsprop": RMSProp, "rotational_rmsprop": RotationalRMSProp, "modular_rmsprop": ModularRMSProp,
    "rf_rmsprop": RootFreeRMSProp, "rotational_rf_rmsprop": RotationalRootFreeRMSProp,
    "modular_rf_rmsprop": ModularRootFreeRMSProp,
    "rf_adamw": RootFreeAdamW, "rotational_rf_adamw": RotationalRootFreeAdamW,
    "modular_rf_adamw": ModularRootFreeAdamW,
    "shampoo": Shampoo, "rotational_shampoo": RotationalShampoo, "modular_shampoo": ModularShampoo,
    "if_shampoo": InverseFreeShampoo, "rotational_if_shampoo": RotationalInverseFreeShampoo,
    "modular_if_shampoo": ModularInverseFreeShampoo,
}


def find_optimizer(name):
    """The class behind a name of OPTIMIZERS, or a ValueError that suggests the nearest one."""
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown optimizer {name!r}: did you mean {near!r}? There are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def build(name, model, **hyper):
    """The optimizer `name` for all trainable parameters of a model, with the usual rule for each of them.

        2 dims and more (Linear, Conv, Embedding)    decay; turned, where the geometry is rotational
        the same, but with a neuron that can't turn  all of it: decay under the plain rule (a neuron of one weight; or
                                                     of zeros, as an Embedding's padding_idx has: group it by hand to
                                                     have the others turn)
        1 dim and less (biases, gains, norms)        no decay, plain rule: decay would only make them smaller; without
                                                     neurons there is no equilibrium

    Embeddings count as matrices: the row of a token is a neuron, decayed and turned like any other. The paper's
    GPT2-124M runs on OpenWebText did the same, its Wikitext runs left them out. Tied weights are one parameter.
    (In a ConvTranspose dim 0 is the input: a filter of it is not a neuron. Exempt it if that matters.)

    Under a modular geometry the model says more: model.modular_tree() is a Tree with every weight of 2 dims or more in
    it, which gives each a norm, a scale and its share. Biases and gains, which are not in it, take the plain rule with
    a hundredth of lr: a modular lr (0.1 to 2) is relative to the norm of a whole weight, and far too large a step for a
    single number.

    Args     model: an nn.Module. Parameters with requires_grad=False are left out: thaw first, or add_param_group later
             hyper: of the class, OPTIMIZERS[name]
    Returns  the optimizer, its groups holding names ("param_names"), so that `table` can print them
    Errors   ValueError: unknown name, nothing to train, two parameters that share memory without being tied, a
             rotational optimizer without decay; a weight that is not in the tree or in it twice, or in the tree but not
             in the model; whatever the class itself refuses
    """
    kind = find_optimizer(name)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("build: the model has no trainable parameters")
    owner = {}
    for n, p in named:
        first = owner.setdefault((p.device, p.data_ptr()) if p.numel() and p.data_ptr() else n, n)
        if first != n:
            raise ValueError(f"build: {first} and {n} share memory but are two parameters, which would be updated "
                             "twice: tie them by assigning the same nn.Parameter to both modules")
    vectors = [(n, p) for n, p in named if p.dim() < 2]
    matrices = [(n, p) for n, p in named if p.dim() >= 2]
    if kind.geometry is PLAIN:
        groups = [{"params": matrices}]
    elif kind.geometry is MODULAR:
        groups = modular_groups(model, matrices)
    else:
        h = kind.takes() | hyper | {"weight_decay": 1.0}        # no decay at all: for the class to complain about
        stuck = {n for n, p in matrices if p.numel() == 0 or p.isfinite().all() and why_stuck(p, h)}    # NaN: refused
        groups = [{"params": [(n, p) for n, p in matrices if n not in stuck], "rotational": True},
                  {"params": [(n, p) for n, p in matrices if n in stuck], "rotational": False}]
    groups.append({"params": vectors, "weight_decay": 0.0})
    if kind.geometry is MODULAR:
        lr = hyper.get("lr", kind.takes()["lr"])
        groups[-1]["lr"] = 0.01 * lr if isinstance(lr, (int, float, torch.Tensor)) else lr      # the class refuses it
    if "lr_cov_scale" in kind.takes():              # if_shampoo: the authors' factor; they go by names
        groups[-1]["lr_cov_scale"] = 0.25
    return kind([group for group in groups if group["params"]], **hyper)


def modular_groups(model, matrices):
    """Groups of the (name, parameter) pairs `matrices` by norm, scale and share, as model.modular_tree() has it."""
    if not hasattr(model, "modular_tree"):
        raise ValueError(f"build: a modular optimizer has to know the architecture, and {type(model).__name__} has no "
                         "method modular_tree(): write one with optim.weight, optim.bond and the operators of Tree")
    names, seen, groups = {p: n for n, p in model.named_parameters()}, set(), {}
    for leaf, _, share in as_tree(model.modular_tree()).weights():
        p = leaf.layer.weight
        if p not in names:
            raise ValueError(f"build: {leaf.words()} is in the modular tree, but not in the model")
        if p in seen:
            raise ValueError(f"build: {names[p]} is in the modular tree twice: it can have only one share (where it is "
                             "tied, write the second use as a bond)")
        seen.add(p)
        if p.requires_grad:
            rule = {"norm": leaf.norm, "scale": leaf.scale, "share": share}
            groups.setdefault(tuple(rule.values()), {"params": [], **rule})["params"].append((names[p], p))
    for n, p in matrices:
        if p not in seen:
            raise ValueError(f"build: {n} {tuple(p.shape)} is not in the modular tree: write it there with "
                             "optim.weight(layer), or set requires_grad=False")
    return list(groups.values())


def table(optimizer):
    """What an optimizer does with each parameter, as text: name, shape, rule, learning rate, decay."""
    rows = [("parameter", "shape", "rule", "lr", "weight_decay")]
    for index, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            name = name_of(group, i, index)
            rule = optimizer.geometry_of(p, group).name if isinstance(optimizer, Optimizer) else "plain"
            if rule == "modular":
                rule += f" {group['norm']}, share {group['share']:.4g}"
            rows.append((name, "x".join(map(str, p.shape)) or "scalar", rule, f"{group['lr']:g}",
                         f"{group['weight_decay']:g}"))
    return columns(rows)


# ======================================================================================================================
# RotationProbe: measure what the theory predicts, on any optimizer
# ======================================================================================================================

TORCH_TWINS = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw",
               torch.optim.RMSprop: "rmsprop"}


def neuron_angles(before, after, dims):
    """Angle between each neuron before and after, in radians:  2 asin(|u - v| / 2) for unit vectors u and v.
    acos(u.v) would lose all angles under 1e-4 in float32, since u.v is 1 to the last bit there."""
    u, v = before / neuron_norm(before, dims), after / neuron_norm(after, dims)
    return 2 * (neuron_norm(u - v, dims) / 2).clamp(max=1).asin()


class RotationProbe:
    """Measures how far neurons turn in one optimizer step, beside what theory predicts in equilibrium.

        probe = RotationProbe(optimizer)        # any optimizer of this file or of torch.optim
        probe.measure_next_step()               # arms it for one step; a step it is not asked about costs nothing
        optimizer.step()
        print(probe)                            # or probe.rows: one dict per parameter

    Rows     name; norm: mean ||w|| of the neurons after the step; angle: mean angle turned, radians; predicted_norm,
             predicted_angle: for rotational parameters the kept norm and the angle that is set; for plain ones the
             equilibrium of a random walk with the lr and decay of this step and, where it matters, the gradient of
             this step ([RE], table 1), nan where there is no decay or no theory (modular ones, the norm of shampoo)
    Measures parameters with two dims or more that had a gradient. Memory: a copy of these, during a measured step
    """

    def __init__(self, optimizer):
        self.optimizer, self.rows, self._hooks = optimizer, [], []

    def measure_next_step(self):
        """Arm the probe: the next step is measured, the ones after it are not."""
        if not self._hooks:
            self._hooks = [self.optimizer.register_step_pre_hook(self._before),
                           self.optimizer.register_step_post_hook(self._after)]

    def _before(self, optimizer, args, kwargs):
        self._copies = {p: p.detach().clone() for group in optimizer.param_groups
                        for p in group["params"] if p.dim() > 1}

    @torch.no_grad()
    def _after(self, optimizer, args, kwargs):
        self.rows = []
        for index, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if p not in self._copies or p.grad is None or p.numel() == 0:
                    continue
                h = {"per_neuron": True} | group
                dims = neuron_dims(p, h)
                before, after = working_copy(self._copies[p]), working_copy(p)
                predicted_norm, predicted_angle = self._predict(p, group, math.prod(p.shape[d] for d in dims))
                self.rows.append({
                    "name": name_of(group, i, index),
                    "norm": neuron_norm(after, dims).mean().item(),
                    "angle": neuron_angles(before, after, dims).nanmean().item(),       # a zero neuron has no angle
                    "predicted_norm": predicted_norm, "predicted_angle": predicted_angle})
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._copies = [], {}

    def _predict(self, p, group, C):
        """(norm, angle) in equilibrium; C weights to a neuron."""
        if isinstance(self.optimizer, Optimizer):
            direction, state = self.optimizer.direction, self.optimizer.state[p]
            geometry = self.optimizer.geometry_of(p, group)
            if geometry is MODULAR:                 # normalised updates have no equilibrium of this kind
                return math.nan, math.nan
            if geometry is ROTATIONAL:
                angle = rotational_scalars(direction, group, state["step"])["angle"]
                return state["norm"].mean().item(), math.atan(angle)
        else:
            twin = TORCH_TWINS.get(type(self.optimizer))
            if group.get("decoupled_weight_decay"):             # how torch spells AdamW since version 2.7
                twin = "adamw"
            variants = ("nesterov", "dampening", "amsgrad", "centered", "maximize")
            if twin is None or any(group.get(key) for key in variants):
                return math.nan, math.nan
            direction = DIRECTIONS[twin]
        sigma = p.grad.double().square().mean().sqrt().item()   # RMS entry of this step's gradient
        return equilibrium(direction, group | {"lr": float(group["lr"])}, C, sigma)

    def __str__(self):
        lines = [f"{'parameter':32s} {'norm':>10s} {'predicted':>10s} {'angle':>10s} {'predicted':>10s}"]
        for row in self.rows:
            lines.append(f"{row['name']:32s} {row['norm']:10.4g} {row['predicted_norm']:10.4g} "
                         f"{row['angle']:10.4g} {row['predicted_angle']:10.4g}")
        return "\n".join(lines)


# ======================================================================================================================
# The lesson: python optim.py
# ======================================================================================================================


def random_walk(optimizer, w, steps, sigma=1.0, every=20, generator=None):
    """Feed w with pure noise, gradients N(0, sigma^2), and measure. -> [(step, norm, angle)], means over the neurons.

    Noise is the whole point: with no loss to descend, everything the neurons do is the work of optimizer and decay.
    """
    probe, trace = RotationProbe(optimizer), []
    for step in range(1, steps + 1):
        w.grad = torch.randn(w.shape, generator=generator) * sigma
        if step % every == 0 or step <= 3:
            probe.measure_next_step()
        optimizer.step()
        if probe.rows:
            row = probe.rows.pop()
            trace.append((step, row["norm"], row["angle"]))
    return trace


def state_bytes(kind):
    """Bytes of optimizer state per float32 weight, counted on a 1000 x 1000 matrix, with momentum if there is any."""
    w = torch.nn.Parameter(torch.randn(1000, 1000))
    options = {"momentum": 0.9, "batch_size": 1}
    optimizer = kind([w], **{key: value for key, value in options.items() if key in kind.takes()})
    w.grad = torch.zeros_like(w)
    optimizer.step()
    return sum(s.numel() * s.element_size() for s in optimizer.state[w].values() if torch.is_tensor(s)) / w.numel()


# name, hyperparameters, size of the gradient's entries. Adam+L2 comes three times: its angle depends on that size
WALKS = [
    ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.005}, 1.0),
    ("adamw", {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}, 1.0),
    ("adam", {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.2}, 0.5),
    ("adam", {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.2}, 1.0),
    ("adam", {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.2}, 2.0),
    ("rmsprop", {"lr": 0.01, "alpha": 0.999, "eps": 1e-8, "weight_decay": 0.2, "momentum": 0.0}, 1.0),
    ("rf_rmsprop", {"lr": 0.01, "alpha": 0.999, "eps": 1e-8, "momentum": 0.9, "weight_decay": 0.01,
                    "batch_size": 100}, 0.1),
    ("rf_adamw", {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "batch_size": 100}, 0.1),
    ("if_shampoo", {"lr": 0.01, "momentum": 0.9, "damping": 1e-4, "lr_cov": 0.01, "weight_decay": 0.01,
                    "update_every": 10, "batch_size": 100}, 0.1),
    ("lion", {"lr": 0.001, "betas": (0.9, 0.99), "weight_decay": 0.5}, 1.0),
]
NEURONS, C = 64, 256


def fail(message):
    """Bad input: one line, and status 2."""
    print(f"optim.py: {message}", file=sys.stderr)
    sys.exit(2)


def lesson(plot=None):
    """Print the table of optimizers and the random walk; with `plot`, draw the walk into that file as well."""
    if plot and not importlib.util.find_spec("matplotlib"):
        fail("--plot needs matplotlib: pip install matplotlib")
    if plot and not os.path.isdir(os.path.dirname(plot) or "."):
        fail(f"cannot draw {plot}: there is no folder {os.path.dirname(plot)}; make it first")
    torch.manual_seed(0)
    print("An optimizer is a direction (which way) times a geometry (how far, on which surface).\n")
    print(f"{'name':22s} {'geometry':11s} {'state':>12s}   direction")
    for name, kind in OPTIMIZERS.items():
        formula = kind.direction.formula
        if kind.geometry is not PLAIN:              # decay is the geometry's; only adam's v still sees it
            formula = "d = mean(g) / rms(g + wd w)" if kind.direction.turning else formula.replace(" + wd w", "")
        print(f"{name:22s} {kind.geometry.name:11s} {state_bytes(kind):5.1f} B/weight   {formula}")
    print("(state: of a 1000 x 1000 matrix, with momentum where there is any)")

    print(f"\nA random walk: {NEURONS} neurons of {C} weights, 3 times too short, and gradients of pure noise.")
    print("AdamW takes long to find its angle; its rotational variant, with the same lr and decay, only has to fill\n"
          "its averages first:\n")
    name, hyper, sigma = WALKS[1]
    target = equilibrium(DIRECTIONS[name], hyper, C, sigma)
    traces = {}
    for kind in (AdamW, RotationalAdamW):
        w = torch.nn.Parameter(torch.randn(NEURONS, C) * (target[0] / 3 / math.sqrt(C)))
        traces[kind.__name__] = random_walk(kind([w], **hyper), w, 1600)
    drawn = {"RotationalAdamW": (traces["RotationalAdamW"], (target[0] / 3, target[1]))}        # it keeps its norm
    print(f"{'step':>6s}   {'AdamW: radians per step':41s}  {'RotationalAdamW':s}")
    width = 36 / max(angle for trace in traces.values() for step, _, angle in trace)
    for (step, _, a), (_, _, b) in zip(*traces.values()):
        if step in (1, 2, 3, 20, 40, 80, 160, 320, 640, 960, 1280, 1600):
            print(f"{step:6d}   {a:.4f} {'#' * round(a * width):36s}   {b:.4f} {'#' * round(b * width)}")
    print(f"{'':6s}   {target[1]:.4f} {'=' * round(target[1] * width):36s}   {target[1]:.4f}   "
          "= sqrt(2 lr wd (1-b1)/(1+b1))")

    print("\nWhere plain optimizers settle, by the formulas of `equilibrium` (the paper's table 1, and ours):\n")
    print(f"{'optimizer':10s} {'sigma of g':>10s} {'norm: formula':>14s} {'measured':>9s} {'':>7s} "
          f"{'angle: formula':>15s} {'measured':>9s}")
    for name, hyper, sigma in WALKS:
        target = equilibrium(DIRECTIONS[name], hyper, C, sigma)
        w = torch.nn.Parameter(torch.randn(NEURONS, C) * (target[0] / 3 / math.sqrt(C)))
        trace = random_walk(OPTIMIZERS[name]([w], **hyper), w, 7000, sigma)
        drawn[f"{name}, sigma = {sigma:g}"] = trace, target
        settled = [(norm, angle) for step, norm, angle in trace if step > 3500]
        norm, angle = (sum(column) / len(settled) for column in zip(*settled))

        predictions = {name if name != "adam" else "adam + L2": target}
        if name == "lion":                          # every Lion step has length lr sqrt(C): the norm gives the angle
            exact = lion_walk_norm(hyper, C)
            predictions["  exact"] = exact, hyper["lr"] * math.sqrt(C) / exact
        for label, target in predictions.items():
            print(f"{label:10s} {sigma:10g} {target[0]:14.4f} {norm:9.4f} {norm / target[0] - 1:+7.2%} "
                  f"{target[1]:15.5f} {angle:9.5f} {angle / target[1] - 1:+7.2%}", flush=True)
    print("\nLook at adam + L2: its angle depends on the gradient's size (so does rmsprop's), so layers with small\n"
          "gradients turn fast and others slowly. AdamW, Lion and SGD turn all layers alike in the end, rotational\n"
          "variants once their averages have filled. (sigma: RMS size of an entry of g. lion: the paper fits a line\n"
          "to the sign; 'exact' uses the arcsine law instead.)")
    if plot:
        draw(drawn, plot)


def draw(walks, path):
    """Norm and angle over the steps, as multiples of their predictions: {label: (trace, (norm, angle))} -> a figure."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(10, 7), constrained_layout=True)
    for number, (label, (trace, (norm, angle))) in enumerate(walks.items()):
        steps, norms, angles = zip(*trace)
        colour = pyplot.get_cmap("tab20")(number)
        above.plot(steps, [x / norm for x in norms], label=label, color=colour)
        below.plot(steps, [x / angle for x in angles], color=colour)
    above.set(ylabel="neuron norm / predicted norm", xscale="log", yscale="log",
              title="Random walk: norm and angle settle where lr and weight decay send them")
    below.set(ylabel="angle per step / predicted angle", xlabel="step", yscale="log")
    for axes in (above, below):
        axes.axhline(1, color="black", linestyle="--", linewidth=0.8)
    figure.legend(loc="outside right center", fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:          # no such folder; no such format
        fail(f"cannot draw {path}: {error}")
    print(f"\nfigure: {path}")


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
    """Print the time of one step of each optimizer beside torch.optim.AdamW(fused=True), on this machine, and how close
    the compiled one comes to the memory's own speed: bytes that have to move (weights and state read and written,
    gradients read) over the time, as a share of what copying a tensor reaches."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = 12 if device == "cuda" else 1
    params = gpt2_parameters(layers, device)
    count = sum(p.numel() for p in params)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    source, target = torch.ones(count, device=device), torch.zeros(count, device=device)
    bandwidth = 8 * count / statistics.median(milliseconds(lambda: target.copy_(source)) for _ in range(9))
    del source, target
    fused = torch.optim.AdamW(params, lr=1e-6, fused=True)
    fused.step()
    print(f"One step on GPT-2's shapes with {layers} layer{'s' * (layers > 1)}, {count / 1e6:.0f} M parameters, "
          f"float32, on {machine}, torch {torch.__version__}; copying moves {bandwidth / 1e6:.1f} GB/s.\n"
          "Ratios are to torch.optim.AdamW(fused=True), run in turn.\n")
    print(f"{'name':24s} {'state':>12s} {'eager':>18s} {'compiled':>18s} {'of copying':>10s} {'compiling':>9s}")
    for name in names:
        kind = OPTIMIZERS[name]
        options = {"batch_size": 1024} if "batch_size" in kind.takes() else {}
        state = state_bytes(kind)
        line = f"{name:24s} {state:5.1f} B/weight"
        for compiled in (False, True):
            embeddings = {"params": params[:2]} | ({"norm": "rows"} if kind.geometry is MODULAR else {})
            optimizer = kind([embeddings, {"params": params[2:]}], lr=1e-6, compile=compiled, **options)
            first = milliseconds(optimizer.step)    # makes the state, and the code
            optimizer.param_groups[0]["lr"] /= 2
            optimizer.step()
            # shampoo refreshes its matrices every few steps, which take longer: whole rounds of them
            time_of_one, ratio = in_turn(optimizer.step, fused.step, optimizer.defaults.get("update_every", 1))
            line += f" {time_of_one:8.1f} ms {ratio:5.2f}x"
        reached = count * (12 + 2 * state) / time_of_one / bandwidth
        print(f"{line} {reached:10.0%} {first / 1e3:7.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description="The lesson of optim.py: the table of optimizers and a random walk.")
    parser.add_argument("--plot", metavar="FILE", help="also draw norm and angle over the steps (.png, .pdf, .svg)")
    parser.add_argument("--bench", metavar="NAME", nargs="*",
                        help="instead: time one step of these optimizers, or of all (a minute each: they get compiled)")
    parser.error = fail                             # argparse would print how to use it, too
    args = parser.parse_args()
    if args.bench is None:
        lesson(args.plot)
        return
    try:
        names = [name for name in args.bench if find_optimizer(name)] or list(OPTIMIZERS)
    except ValueError as error:
        fail(error)
    if args.plot:
        fail("--bench draws nothing: leave out --plot")
    bench(names)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()                          # here, where a pipe that nobody reads can be caught
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                         # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
