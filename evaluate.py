"""How good features are: scores with intervals, fits, calibration, noise, pictures and the report of both probes.

Shapes: E encoders, R recordings or rows, D width of an encoder, C labels, G groups (patients, records), S resamples,
H levels of noise, L leads, T samples (at FS).
"""
import argparse
import base64
import copy
import io
import itertools
import json
import shlex
import sys
import tempfile
import time
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from augment import NOISE_TYPES, add_noise_levels
from corpus import git, known_by_content
from ecg import FS, LEADS, Refused, atomic_write, draw_ecg_paper, lead_id, preprocess, save_figure
from model import load_encoder, untrained_like

BOOTSTRAPS = 1000                # resamples of patients or records
CALIBRATION_BINS = 15            # of equal size, of each label
PERFECT_DRAWS = 200              # of labels from the probabilities themselves: what a perfect model would score
SOLVED = 1e-4                    # largest change of a logit in the last Newton step, of which .1 % is still wrong
SCORES = {"macro_auroc": "ci95", "untrained": "untrained_ci95", "difference": "difference_ci95"}  # and their intervals
EPOCHS, PATIENCE, BATCH, LR, WEIGHT_DECAY = 40, 5, 64, 1e-2, 1e-2  # of fit_attention
TUNE_EPOCHS, TUNE_ROWS = 20, 512  # of fine_tune; rows of an epoch, at least: fewer come again, in other windows
TUNE_LR, TUNE_HEAD_LR, TUNE_DECAY, TUNE_WEIGHT_DECAY = 1e-3, 3e-3, 0.75, 0.05  # the first above all blocks
CHUNK = 256                      # recordings whose local features are in memory at once
COVERAGE = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the rows that get an answer, the surest first
NOISE_DB, NOISE_KINDS = (24, 18, 12, 6, 0, -6), ("mixture", *NOISE_TYPES)  # dB and kinds of augment.add_noise_levels
COLORS = {"untrained": "#c4c4c4", "pre-trained": "#7fb2e5", "RR intervals alone": "#d9c8a9", "raw waveform": "#e3b9b0"}
SMALL_STEP = 1e-3                # of a feature, to find the weight of a probe for it
EXAMPLES = 10                    # in report.html, confidently wrong ones, and as many right ones
FOR, AGAINST = np.array([[1.0, 0.55, 0.15], [0.35, 0.65, 1.0]])  # RGB of patches that raise and lower a logit
COLOURS = """25 mm/s and 10 mm/mV, true to scale in print at 100 %. Orange patches raise the logit of the named label,
blue ones lower it: the weights of the linear probe for the mean local feature, times the difference of the patch from
its mean in training; full colour for the strongest twentieth of a picture. What other features add is not shown."""
CALIBRATION_NOTE = ("(Brier) skill: 1 - Brier score / that of the constant prevalence of the training set; ECE, and "
                    "that of a perfect model; z: of a perfect model between -2 and 2, larger if overconfident")
NOISE_NOTE = ("SNR: mean square of the ECG to that of the noise, each without its mean, over 10 s; the median over the "
              "leads of a recording. The program nst has another: A^2 / 8, A the peak-to-peak voltage of a QRS, to the "
              "square of the mean RMS of the noise in a second")
STYLE = """body{font:16px/1.5 sans-serif;color:#222;max-width:72rem;margin:auto;padding:0 1rem}p{margin:.4rem 0}
dt{font-weight:bold}dd{margin:0;white-space:pre-line;overflow-wrap:anywhere}pre,div{overflow-x:auto;font-size:.8rem}
img{max-width:100%;height:auto}figure{margin:1rem 0;break-inside:avoid}summary{cursor:pointer}
table{border-collapse:collapse}td,th{text-align:right;padding:0 .6rem;border-bottom:1px solid #ddd;white-space:nowrap}
@page{size:A4 landscape;margin:10mm}@media print{body{font-size:9pt;padding:0}pre{font-size:4.7pt}}"""


# ---- scores and intervals -------------------------------------------------------------------------------------------
def resample(groups, seed, n=BOOTSTRAPS):
    """Draw groups (patients or records) with replacement, as many as there are.

    groups (R,): a name per row. Returns the number of each row's group (R,), in the order of np.unique, and counts
    (n, G): how often resample s holds each group. All rows of a group come together.
    """
    names, number = np.unique(groups, return_inverse=True)
    G = len(names)
    return number, np.random.default_rng(seed).multinomial(G, np.full(G, 1 / G), size=n)


def resampled_auroc(y, score, group, counts):
    """AUROC (S,) in every resample: exact, ties count half, NaN where a class is absent.

    y (R,) bool; score (R,); group (R,) int; counts (S, G): how often resample s holds each group. The wins of each
    group's positives over each group's negatives are counted once; a resample only weighs them.
    """
    G, counts, order = counts.shape[1], np.asarray(counts, dtype=np.float64), np.argsort(score[y])
    positives, holders = score[y][order], group[y][order]            # from the lowest score on
    lowest = sum(np.bincount(np.searchsorted(positives, score[~y], side) * G + group[~y],     # a tie is in one of two
                             minlength=(len(positives) + 1) * G) for side in ("left", "right"))
    below = np.cumsum(lowest.reshape(-1, G)[:-1], axis=0)            # (positives, G): negatives below each, twice
    holders, first = np.unique(holders[by := np.argsort(holders, kind="stable")], return_index=True)
    wins = np.add.reduceat(below[by], first, axis=0, dtype=np.float64) / 2 if len(first) else np.zeros((0, G))
    won = np.einsum("sg,sg->s", counts[:, holders] @ wins, counts)
    n_positive, n_negative = (counts @ np.bincount(group[rows], minlength=G) for rows in (y, ~y))
    pairs = n_positive * n_negative
    return np.divide(won, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)


def label_auroc(y, score, group, counts):
    """AUROC (S, C) of every label in every resample: resampled_auroc for the columns of y and score (R, C)."""
    return np.reshape([resampled_auroc(*of, group, counts) for of in zip(y.T, score.T)], (y.shape[1], len(counts))).T


def plain_auroc(y, score):
    """AUROC (C,) of the columns of y (R, C) bool and score (R, C), NaN where a class is absent."""
    return label_auroc(y, score, np.zeros(len(y), int), np.ones((1, 1)))[0]


def macro(auroc):
    """Mean over labels of auroc (S, C) -> (S,). A label that a resample cannot score is left out of its mean."""
    return np.ma.masked_invalid(auroc).mean(axis=1).filled(np.nan)


def interval(samples):
    """95 % percentile interval [low, high] of bootstrap samples (S,)."""
    return np.nanpercentile(samples, [2.5, 97.5]).tolist() if np.isfinite(samples).any() else [np.nan, np.nan]


def interval_of_seeds(scores, groups, signed=True):
    """95 % interval of the mean over encoders (seeds of one recipe) of scores (E, S): of the test set itself, [:, 0],
    and of its resamples; groups: how many patients or records are resampled; signed: scores may be below 0 or above 1.

    One encoder: the percentiles of its resamples, which say nothing about another seed. Several: the variance of the
    mean over resamples of patients plus that over seeds, by Student's t with the degrees of freedom of Welch (1947) and
    Satterthwaite, because few seeds say little about their own spread.
    """
    E, mean = len(scores), scores.mean(axis=0)
    if E == 1 or not np.isfinite(mean[1:]).any() or np.nanmax(scores) == np.nanmin(scores):    # not scored, or equal
        return interval(mean[1:])
    of_patients, of_seeds = np.nanvar(mean[1:], ddof=1) * groups / (groups - 1), scores[:, 0].var(ddof=1) / E
    variance = of_patients + of_seeds
    freedom = variance ** 2 / (of_seeds ** 2 / (E - 1) + of_patients ** 2 / (groups - 1))
    half = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    return np.clip((mean[0] - half, mean[0] + half), *((-np.inf, np.inf) if signed else (0, 1))).tolist()


def paired(a, b, groups, suffix="", signed=False):
    """Entry of a result: the means of the scores a (E, S) of encoders and b (E, S) of their controls and of their
    difference, the intervals (see interval_of_seeds), and those of `each` encoder; the keys of SCORES with suffix.
    signed: scores may be below 0, as areas above chance are; differences always may."""
    entry, each = {}, {}
    for (key, ci), x in zip(SCORES.items(), (a, b, a - b)):
        around = interval_of_seeds(x, groups, signed or key == "difference")
        entry |= {f"{key}{suffix}": x[:, 0].mean(), f"{ci}{suffix}": around}
        each |= {f"{key}{suffix}": x[:, 0].tolist(), f"{ci}{suffix}": [interval(one[1:]) for one in x]}
    return entry | dict(each=each)


def mean_of(found):
    """The mean of several results of one form: dicts of dicts or of numbers."""
    if isinstance(found[0], dict):
        return {key: mean_of([each[key] for each in found]) for key in found[0]}
    return np.mean(np.array(found, dtype=float), axis=0)


def both_classes(y):
    """Which columns of y (R, C) bool have positives and negatives: (C,)."""
    return y.any(axis=0) & ~y.all(axis=0)


def standardized(x, x_new):
    """x (R, F) and x_new (R', F) as float64, each feature with mean 0 and deviation 1 over x.

    NaN becomes 0, the mean: a recording that cannot be used counts as an average one.
    """
    scaler = StandardScaler(copy=False).fit(x)
    return tuple(np.nan_to_num(scaler.transform(rows.astype(np.float64)), copy=False) for rows in (x, x_new))


def fit_logistic(x, y, strengths):
    """Logistic regressions with an L2 penalty: weights (G, F + 1, C), the intercept last, of all labels y (R, C) bool,
    each with both classes, on x (R, F) at all strengths (G,), which are scikit-learn's C.

    They minimise C * the sum of log losses + |w|^2 / 2, as scikit-learn's do. Newton's method, each step by conjugate
    gradients (Lin, Weng and Keerthi 2008) of all labels and strengths together: a product of matrices takes a fraction
    of the time of one product each. Among the singular vectors of x the second derivatives are nearly diagonal, so few
    products are needed; these are in float32, gradients and losses in float64.
    """
    R, C = y.shape
    if R > x.shape[1]:
        basis = np.linalg.eigh(x.T @ x)[1]
    else:                                        # twice as fast as singular vectors
        q, r = np.linalg.qr(x.T)
        basis = q @ np.linalg.eigh(r @ r.T)[1]
    x = np.append(x @ basis, np.ones((R, 1)), axis=1)
    c, y, low = np.repeat(strengths, C), np.tile(y.astype(float), len(strengths)), x.astype(np.float32)
    penalty, square = np.append(np.ones((basis.shape[1], 1)), [[0]], axis=0), (x * x).mean(axis=0)[:, None]
    w = np.zeros((len(penalty), len(c)))
    w[-1] = np.log(y.sum(axis=0) / (1 - y).sum(axis=0))

    def loss(z, w, k):
        softplus = F.softplus(torch.from_numpy(z), threshold=40).numpy()   # twice as fast as numpy's logaddexp
        return c[k] * (softplus - y[:, k] * z).sum(axis=0) + (penalty * w * w).sum(axis=0) / 2

    z, k = x @ w, np.arange(len(c))              # k: what is not solved yet
    before = loss(z, w, k)
    while len(k):
        p = expit(z[:, k])
        gradient, curvature = penalty * w[:, k] + c[k] * (x.T @ (p - y[:, k])), c[k] * p * (1 - p)
        step = newton_step(low, gradient, curvature, penalty, penalty + curvature.sum(axis=0) * square)
        z_step, size = x @ step, np.ones(len(k))
        after = loss(z[:, k] + z_step, w[:, k] + step, k)
        while (worse := after > before * (1 + 1e-12)).any():
            size[worse] /= 2
            after = loss(z[:, k] + size * z_step, w[:, k] + size * step, k)
        w[:, k] += size * step
        z[:, k] += size * z_step
        go_on = np.abs(size * z_step).max(axis=0) > SOLVED
        k, before = k[go_on], after[go_on]
    w = w.reshape(len(w), len(strengths), C).swapaxes(0, 1)
    return np.append(basis @ w[:, :-1], w[:, -1:], axis=1)


def newton_step(x, gradient, curvature, penalty, diagonal):
    """Solve (penalty + x' curvature x) step = -gradient for every label by conjugate gradients, the closer the smaller
    the step; diagonal (F, C): about that of the matrix."""
    first = (gradient * gradient / diagonal).sum(axis=0)
    enough, step, k = first * np.clip(first, 1e-6, 0.1), np.zeros_like(gradient), np.flatnonzero(first)
    residual, left, curvature, diagonal = -gradient[:, k], first[k], curvature[:, k].astype(x.dtype), diagonal[:, k]
    direction = residual / diagonal
    while len(k):
        product = x @ direction.astype(x.dtype)
        product *= curvature
        product = x.T @ product + penalty * direction
        size = left / (direction * product).sum(axis=0)
        step[:, k] += size * direction
        residual -= size * product
        scaled = residual / diagonal
        left, before = (residual * scaled).sum(axis=0), left
        direction = scaled + left / before * direction
        go_on = left > enough[k]
        if not go_on.all():
            k, left, direction, residual, diagonal, curvature = (
                a[..., go_on] for a in (k, left, direction, residual, diagonal, curvature))
    return step


# ---- attention over local features ----------------------------------------------------------------------------------
class AttentionPool(torch.nn.Module):
    """Logits (B, C) of tokens (B, M, D): a linear map of their mean, weighted by softmax(query . token / sqrt(D)); one
    learned query for all labels. A token with NaN is left out."""

    def __init__(self, width, labels):
        super().__init__()
        self.query, self.linear = torch.nn.Parameter(torch.zeros(width)), torch.nn.Linear(width, labels)

    def forward(self, tokens):
        known, tokens = tokens.isfinite().all(dim=-1), tokens.nan_to_num()
        match = tokens @ self.query / len(self.query) ** 0.5
        weight = match.masked_fill(~known, torch.finfo(match.dtype).min).softmax(dim=1)
        return self.linear((weight[..., None] * tokens).sum(dim=1))


def local_features(encoder, recordings, n, leads, seconds):
    """Local features float16 (n, M, D) of n recordings, in a temporary file; NaN where there is none. leads, seconds:
    the most that is in a recording."""
    M = leads * round(seconds * FS / encoder.patch_samples)
    tokens = np.memmap(tempfile.TemporaryFile(), np.float16, "w+", shape=(n, M, encoder.width))
    for first in range(0, n, CHUNK):
        for row, out in enumerate(encoder.embed(list(itertools.islice(recordings, CHUNK)), on_error="nan"), first):
            found = np.zeros((0, encoder.width)) if out.local_features is None else np.concatenate(out.local_features)
            tokens[row] = np.pad(found[:M], ((0, M - len(found[:M])), (0, 0)), constant_values=np.nan)
    return tokens


def fit_attention(tokens, y, train, val, test, seed):
    """Logits (R', C) of the rows `test` by AttentionPool on tokens (R, M, D) and y (R, C) bool, fitted on the rows
    `train`, after the epoch with the best macro AUROC in `val`."""
    torch.manual_seed(seed)
    some = tokens[train[:CHUNK]].astype(np.float32)
    mean, std = np.nanmean(some, axis=(0, 1)), np.nanstd(some, axis=(0, 1)).clip(1e-6)
    head = AttentionPool(tokens.shape[2], y.shape[1])

    def logits(head, rows, rng=None):
        return head(torch.from_numpy((tokens[rows].astype(np.float32) - mean) / std))

    @torch.no_grad()
    def scores(head, rows):
        return np.concatenate([logits(head, part).numpy() for part in np.array_split(rows, -(-len(rows) // BATCH))])

    optimizer = torch.optim.AdamW(head.parameters(), LR, weight_decay=WEIGHT_DECAY)
    return scores(learn(head, [optimizer], logits, scores, y, train, val, seed, EPOCHS)[0], test)


def learn(network, optimizers, logits, scores, y, train, val, seed, epochs):
    """Train a network with the labels y (R, C) bool of the rows `train`. Returns a copy of it after the epoch with the
    best macro AUROC in `val`, and (loss, this AUROC) of each epoch, which end PATIENCE epochs after the best.

    logits(network, rows, rng): (B, C) with gradients; scores(network, rows): (R', C) as an array; optimizers: all that
    makes a step after each batch."""
    best, log = -np.inf, []
    for epoch in range(epochs):
        rng, losses = np.random.default_rng([seed, epoch]), []
        for part in np.array_split(rng.permutation(train), -(-len(train) // BATCH)):
            z = logits(network, part, rng)
            losses.append(F.binary_cross_entropy_with_logits(z, torch.from_numpy(y[part]).to(z.device, z.dtype)))
            optimizers[0].zero_grad()
            losses[-1].backward()
            for each in optimizers:
                each.step()
            losses[-1] = losses[-1].item()
        log.append((np.mean(losses), macro(plain_auroc(y[val], scores(network, val))[None])[0]))
        if not log[-1][1] <= best:
            best, kept, since = log[-1][1], copy.deepcopy(network), epoch
        if epoch - since == PATIENCE:
            break
    return kept, log


# ---- fine-tuning ----------------------------------------------------------------------------------------------------
def stacked(recordings, n, leads, seconds):
    """Signals float32 (n, L, T), mV at FS, of the named leads of n recordings, the first `seconds`; NaN = missing."""
    ids, T = [lead_id(name) for name in leads], round(seconds * FS)
    signal = np.full((n, len(ids), T), np.nan, np.float32)
    for row, recording in zip(signal, recordings):
        try:
            signal_mv, own = preprocess(*recording[:4], {})
        except Refused:                          # nothing in it can be used
            continue
        for lead, values in zip(own, signal_mv[:, :T]):
            if lead in ids:
                row[ids.index(lead), :len(values)] = values
    return signal


def fine_tune(encoder, signal, leads, y, train, val, test, seed=0):
    """Train a copy of the encoder, and a linear head on its global feature, with the labels y (R, C) bool of the rows
    `train` of signal (R, L, T), mV at FS; an untrained encoder: from scratch. Returns logits (R', C) of the rows
    `test`, the copy, both after the epoch with the best macro AUROC in `val`, and (loss, this AUROC) of each epoch.

    Random windows of the length in pre-training; whole recordings, as embed() cuts them, are scored. Layers nearer to
    the signal learn more slowly, by TUNE_DECAY each, as they have less to learn.
    """
    torch.manual_seed(seed)
    device, depth, rows = encoder.cls_token.device, len(encoder.blocks), np.resize(train, max(len(train), TUNE_ROWS))
    network = torch.nn.ModuleDict(dict(encoder=copy.deepcopy(encoder),
                                       head=torch.nn.Linear(3 * encoder.width, y.shape[1]).to(device)))
    rates = {"head": TUNE_HEAD_LR, "encoder.norm": TUNE_LR,         # "encoder": patches, leads, CLS and registers
             **{f"encoder.blocks.{i}.": TUNE_LR * TUNE_DECAY ** (depth - i) for i in range(depth)},
             "encoder": TUNE_LR * TUNE_DECAY ** (depth + 1)}
    optimizer = torch.optim.AdamW([dict(params=[p]) for p in network.parameters()], weight_decay=TUNE_WEIGHT_DECAY)
    cosine = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [next(rate for layer, rate in rates.items() if name.startswith(layer))
                    for name, _ in network.named_parameters()],
        epochs=TUNE_EPOCHS, steps_per_epoch=-(-len(rows) // BATCH), pct_start=0.1, cycle_momentum=False)
    T = min(signal.shape[2], encoder.window_length(len(leads)) * encoder.patch_samples)
    lead_ids = torch.tensor([lead_id(name) for name in leads])

    def logits(network, rows, rng):
        starts = rng.integers(0, signal.shape[2] - T + 1, len(rows))
        window = torch.from_numpy(np.stack([signal[i, :, start:start + T] for i, start in zip(rows, starts)]))
        features = network["encoder"](window.to(device), lead_ids.expand(len(rows), -1).to(device))
        return network["head"](features.global_feature())

    @torch.no_grad()
    def scores(network, rows):
        found = network["encoder"].embed(signal[rows], fs=FS, leads=leads, local=False, on_error="nan")
        x = torch.tensor(np.array([of.global_feature for of in found])).nan_to_num()
        return network["head"](x.to(device)).cpu().numpy()

    kept, log = learn(network, [optimizer, cosine], logits, scores, y, rows, val, seed, TUNE_EPOCHS)
    return scores(kept, test), kept["encoder"], log


# ---- calibration ----------------------------------------------------------------------------------------------------
def platt(logit, y, logit_new):
    """Platt's (1999) sigmoid, fitted on logit (R,) and y (R,) bool: probabilities (R',) of logit_new (R',). If y has
    only one class, nothing can be fitted: the probabilities are then those of the logits themselves."""
    if y.all() or not y.any():
        return expit(logit_new)
    share = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))           # of each row in the positives
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10)
    model.fit(np.tile(logit, 2)[:, None], np.repeat([True, False], len(y)), np.append(share, 1 - share))
    return model.predict_proba(logit_new[:, None])[:, 1]


def calibration(p, y, prevalence, group):
    """How well the probabilities p (R, C) agree with labels y (R, C) bool: dict of means over labels, and skills of
    these means.

    brier, nll     proper scores (nll in nats); brier_skill, nll_skill: 1 - score / score of a constant, the prevalence
                   (C,) in the training set. 0 is as good as this constant, 1 is perfect, below 0 is worse
    reliability    part of the Brier score that comes from wrong probabilities, and resolution: what is gained by
                   telling rows apart; both without the bias of small bins (Ferro and Fricker 2012)
    ece            expected calibration error; ece_perfect: that of labels drawn from p itself, so of a perfect model,
                   the mean and the 95 % of the draws. An ECE can only be read next to it
    z              Spiegelhalter's (1986) test: between -2 and 2 for 95 % of perfect models; larger if overconfident,
                   smaller if too near .5. Rows of one group (R,) int are not independent: other numbers ignore this
    """
    if not p.size:
        return dict.fromkeys(("brier", "brier_skill", "nll", "nll_skill", "reliability", "resolution", "ece",
                              "ece_perfect", "ece_perfect_ci95", "z"), np.nan)

    def nll(p):
        return -np.mean(np.log(np.where(y, p, 1 - p).clip(np.finfo(float).tiny)))

    def ece(seen):                               # class-wise, the mean over labels
        return np.mean(n @ np.abs(said - seen) / n.sum())

    rng, constant = np.random.default_rng(0), np.broadcast_to(prevalence, p.shape)
    mix = rng.permutation(len(p))                # equal p must not fall into bins by patient
    p, y, group = p[mix], y[mix], group[mix]
    said, seen, n = in_bins(p, y)
    bias = n[:, None] * seen * (1 - seen) / (n[:, None] - 1).clip(1) / len(p)
    share, mean, brier = n[:, None] / len(p), y.mean(axis=0), np.mean((p - y) ** 2)
    ranked, starts = np.sort(p, axis=0), np.cumsum(n) - n
    drawn = (np.add.reduceat(rng.random(p.shape) < ranked, starts, dtype=float) for _ in range(PERFECT_DRAWS))
    perfect = [ece(positives / n[:, None]) for positives in drawn]
    of_group = np.bincount(group, ((y - p) * (1 - 2 * p)).sum(axis=1))
    return dict(brier=brier, brier_skill=1 - brier / np.mean((constant - y) ** 2),
                nll=nll(p), nll_skill=1 - nll(p) / nll(constant),
                reliability=((said - seen) ** 2 * share - bias).sum(axis=0).mean(),
                resolution=(((seen - mean) ** 2 * share - bias).sum(axis=0) + mean * (1 - mean) / (len(p) - 1)).mean(),
                ece=ece(seen), ece_perfect=np.mean(perfect), ece_perfect_ci95=interval(perfect),
                z=of_group.sum() / np.sqrt((of_group ** 2).sum()).clip(1e-12))


def in_bins(p, y, bins=CALIBRATION_BINS):
    """Mean probability and share of positives (bins, C) in bins of equal size, from the lowest p of each label on, and
    the sizes of the bins (bins,)."""
    order = np.argsort(p, axis=0, kind="stable")
    bins = min(bins, len(p))
    starts = np.arange(bins) * len(p) // bins
    n = np.diff(np.append(starts, len(p)))
    sums = (np.add.reduceat(np.take_along_axis(x, order, axis=0).astype(float), starts, axis=0) for x in (p, y))
    return *(x / n[:, None] for x in sums), n


def selective(p, y, rare):
    """If only the rows with the surest class get an answer, by p (R, C) and y (R, C) bool: the share of right answers,
    and the share of the rare rows (R,) bool that get one, since it is easy to be right by leaving them out."""
    order, right = np.argsort(-p.max(axis=1), kind="stable"), y[np.arange(len(y)), p.argmax(axis=1)]
    kept = [order[:max(1, round(share * len(p)))] for share in COVERAGE]
    return dict(coverage=COVERAGE, accuracy=[right[k].mean() for k in kept],
                rare_answered=[rare[k].sum() / max(rare.sum(), 1) for k in kept])


# ---- global features, clean and under noise -------------------------------------------------------------------------
def global_features(encoders, recordings):
    """Global features (E, R, 3D) of R recordings by encoder.embed; NaN where a recording cannot be used. recordings: a
    function that returns an iterator of ecg.Recording; it is called once for each encoder."""
    found = [encoder.embed(recordings(), local=False, on_error="nan") for encoder in encoders]
    return np.stack([[embedding.global_feature for embedding in embeddings] for embeddings in found])


def noisy_features(encoders, recordings, noise, seed):
    """Global features (E, K, H, R, 3D), as above, under every kind of NOISE_KINDS at every level of NOISE_DB; noise of
    augment.load_noise. A recording has the same noise of a kind at every level, only its strength differs."""
    P, K, H = encoders[0].patch_samples, len(NOISE_KINDS), len(NOISE_DB)
    features = global_features(encoders, lambda: add_noise_levels(recordings(), noise, P, seed, NOISE_DB))
    return np.moveaxis(features.reshape(len(encoders), -1, K, H, features.shape[2]), 1, 3)


# ---- pictures -------------------------------------------------------------------------------------------------------
def draw_bars(axis, labels, series):
    """Groups of bars from 0.5 on, a group per label; series {name in COLORS: (AUROC (N,), intervals (N, 2))}."""
    width = 0.8 / len(series)
    for i, (name, scores) in enumerate(series.items()):
        value, ci = (np.array(x, dtype=float) for x in scores)       # None becomes NaN, which is not drawn
        at = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * width
        bars = axis.bar(at, value - 0.5, 0.94 * width, bottom=0.5, color=COLORS[name], label=name)
        axis.bar_label(bars, [f"{v:.3f}" for v in value], label_type="center", fontsize=8)
        axis.vlines(at, *ci.T, color="#333333", linewidth=1)
    axis.set_xticks(range(len(labels)), labels, fontsize=9)
    axis.set_ylim(min(0.5, axis.get_ylim()[0]), 1)
    axis.spines[["top", "right"]].set_visible(False)


def draw_reliability(axis, labels, y, p_platt):
    """Share of positives against the calibrated probability; a point stands for about 40 recordings or more. The bars
    are where 95 % of the points of a perfect model lie: labels drawn from its own probabilities."""
    n_bins, rng = int(np.clip(len(y) // 40, 4, 10)), np.random.default_rng(0)
    for k, name in enumerate(labels):
        said, truth, n = (x.ravel() for x in in_bins(p_platt[:, [k]], y[:, [k]], n_bins))
        perfect = rng.binomial(n, said.clip(0, 1), (1000, len(n))) / n
        line, = axis.plot(said, truth, marker="o", markersize=4, label=name)
        axis.vlines(said, *np.quantile(perfect, (0.025, 0.975), axis=0), color=line.get_color(), alpha=0.3, linewidth=4)
    axis.plot((0, 1), (0, 1), color="#999999", linewidth=1, linestyle="--")
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="calibrated probability", ylabel="share with the label")
    axis.set_title("superclasses; bars: of a perfect model", loc="left")
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def draw_scores(axis, kinds, keys, x_label):
    """Superclasses along {kind: {x: {"superdiagnostic": result of paired}}}, with intervals for the first kind; keys
    {name in COLORS: key in SCORES}."""
    for style, (kind, points) in zip(("-", ":", "--", "-."), kinds.items()):
        points = {x: of["superdiagnostic"] for x, of in points.items() if x != "area"}
        for name, key in keys.items():
            axis.plot([*points], [of[key] for of in points.values()], style, marker="o", markersize=3,
                      color=COLORS[name], label=f"{name}, {kind}")
            if style == "-":
                low, high = np.array([of[SCORES[key]] for of in points.values()], dtype=float).T
                axis.fill_between([*points], low, high, color=COLORS[name], alpha=0.3, linewidth=0)
    axis.tick_params(axis="x", labelrotation=60 * (len(points) > len(NOISE_DB)))
    axis.legend(frameon=False, fontsize=8)
    axis.set(xlabel=x_label, ylabel="macro AUROC, superclasses")


# ---- command line and results of both probes ------------------------------------------------------------------------
def parser_of(description, raw_example):
    """A parser with the flags that both probes share. raw_example: a publisher's folder, for --help."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--encoder", required=True, nargs="+", metavar="FILE",
                        help="encoder.pt of a run, or of several runs that differ in --seed: scores are then means, "
                             "and intervals are over seeds and patients or records; tiny comes with the program; "
                             "random:SIZE gives only the untrained control")
    parser.add_argument("--raw", type=Path, required=True,
                        help=f"folder of the raw recordings in their publisher's layout, such as {raw_example}; not "
                             "the prepared corpus")
    parser.add_argument("--out", type=Path, required=True,
                        help="folder for the results; it is made if absent, and earlier results in it are replaced")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--looks", type=int, metavar="N",
                        help="how often the test set was scored in your project, with this time; the report says it")
    parser.add_argument("--device", default="auto",
                        help="a device of PyTorch: cpu, cuda, cuda:1, mps ... (default: cuda if there is a GPU)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                        help="bf16: matrix products in bfloat16, two to three times as fast where the hardware has it; "
                             "auto (default): where it has")
    return parser


def load_encoders(paths, device, precision="auto"):
    """Networks: the encoders at `paths` and then their untrained controls, equal ones once; and the place of the
    control of each encoder (random:SIZE is its own). ValueError as in model.load_encoder."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    networks = [load_encoder(path, device) for path in paths]                         # this checks the device
    kinds = {(of.width, of.patch_samples, str(path).startswith("random:")) for path, of in zip(paths, networks)}
    weights = {tuple(p.double().sum().item() for p in network.parameters()) for network in networks}
    if len(kinds) > 1 or len(weights) < len(paths):
        raise ValueError(f"encoders {' '.join(map(str, paths))}: expected different files of one size, or "
                         "random:SIZE:SEED with different seeds, as scores are means over them; probe others alone")
    for network in networks:
        network.precision = precision
    if str(paths[0]).startswith("random:"):      # so do all
        return networks, list(range(len(paths)))
    controls = {str(network.config): untrained_like(network) for network in networks}
    places = {config: place for place, config in enumerate(controls, len(paths))}
    return networks + list(controls.values()), [places[str(network.config)] for network in networks]


def to_json(value):
    """A dict as plain types for json.dumps, numbers with 6 decimals; pandas makes null of NaN, which JSON lacks."""
    return json.loads(pd.Series(value).to_json(double_precision=6))


def as_texts(rows):
    """DataFrame of the numbers in results {name: dict}, as texts: a column for each result, a row for each number, with
    the keys on the way to it as its name. KEY_ci95 stands next to KEY, and ci95 next to the number before it."""
    def text(value):
        if isinstance(value, list):
            return f"[{', '.join(map(text, value))}]" if value.count(None) < len(value) else ""
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    of, number = {}, ""
    frame = pd.concat({name: pd.json_normalize(row).astype(object).T[0] for name, row in rows.items()}, axis=1)
    for key in frame.index:
        number, own = number if "ci95" in key else key, key.replace("_ci95", "")
        repeated = number != key and f"{number}_ci95" in frame.index
        of[key] = own if own != key and own in frame.index else None if repeated else number
    texts = frame.replace({np.nan: None}).map(text).groupby(of, sort=False)
    return texts.agg(lambda parts: " ".join(filter(None, parts)) or "-")


def table(rows, columns):
    """Text of a table of results {name: dict}: columns {heading: row of as_texts}, without those that nobody has."""
    found = as_texts(rows) if rows else pd.DataFrame()
    headings = {key: heading for heading, key in columns.items() if key in found.index}
    return found.loc[[*headings]].T.rename(columns=headings).to_string() if headings else ""


def as_html(figure, caption=""):
    """A matplotlib Figure as HTML, an image for each of its axes, side by side where the page is wide enough, in their
    true size: 96 pixels are an inch there."""
    figure.draw_without_rendering()              # this places the axes
    images = ""
    for axis in figure.axes:
        image, box = io.BytesIO(), axis.get_tightbbox().transformed(figure.dpi_scale_trans.inverted()).padded(0.02)
        figure.savefig(image, format="webp", dpi=96, bbox_inches=box, pil_kwargs=dict(lossless=True))
        images += f'<img alt="" src="data:image/webp;base64,{base64.b64encode(image.getvalue()).decode()}">'
    return f"<figure>{images}<figcaption>{escape(caption)}</figcaption></figure>"


def draw_examples(encoder, x, fit, names, p, y, group, show_row):
    """HTML, {whether right: text}, of EXAMPLES rows of p (R, C) with the most wrong probabilities of a label, and of
    those with the highest of a label that is there; at most one row of each group (R,). names (C,), y (R, C) bool.

    show_row(row) gives a title, the recording, and which patches (N,) the columns D to 2D of x are the mean of. Colours
    are the part of each patch in the logit through this mean: weights times (local feature - mean of x). The weights
    are differences between logits: fit(rows (R', F)) gives those (R', C) of a linear probe fitted on x (., F).
    """
    mean, columns = np.nanmean(x, axis=0, dtype=np.float64), np.arange(encoder.width, 2 * encoder.width)
    at_mean, *away = fit(np.vstack((mean, mean + SMALL_STEP * np.eye(len(mean))[columns])))
    weights, off, found = (np.array(away) - at_mean) / SMALL_STEP, np.abs(p - y), {False: "", True: ""}
    for right, rank, limit in ((False, -off, -0.5), (True, np.where(y, off, 1), 0.5)) if p.size else ():
        best, rows = rank.argmin(axis=1), np.argsort(rank.min(axis=1), kind="stable")
        rows = rows[np.sort(np.unique(group[rows], return_index=True)[1])]
        for row in rows[rank.min(axis=1)[rows] < limit][:EXAMPLES]:
            title, recording, seen = show_row(row)
            local = encoder.embed(recording, on_error="nan").local_features
            if local is None:                    # it counted as the mean recording
                continue
            part = np.nan_to_num((local - mean[columns]) @ weights[:, best[row]] * seen)
            part = (part / np.quantile(np.abs(part), 0.95).clip(1e-12)).clip(-1, 1)
            part = part.repeat(encoder.patch_samples, axis=1)[..., None]
            signal_mv, ids = preprocess(*recording[:4], {})
            colours, leads = 1 - np.abs(part) * (1 - np.where(part > 0, FOR, AGAINST)), [LEADS[i] for i in ids]
            figure = draw_ecg_paper(signal_mv[:, :part.shape[1]], leads, {"": colours}, standard=True)
            found[right] += as_html(figure, f"{title}: probability of {names[best[row]]} {p[row, best[row]]:.3f}; "
                                            f"annotated: {', '.join(np.array(names)[y[row]]) or 'none of the labels'}")
    return found


def what_was_run(args, networks, recordings):
    """The facts at the head of a report, {name: text}; recordings: an iterator over those of the test set."""
    known, n = known_by_content(recordings)
    run = {"Command": shlex.join(sys.argv), "Written": time.strftime("%Y-%m-%d %H:%M %Z"),
           "Commit": git("describe", "--always", "--abbrev=40", "--dirty") or "unknown",
           "Test set": f"scored {args.looks} times so far" if args.looks else "how often it was scored is not stated",
           "Leak check": f"Of {n} test recordings {known} are known by content to pretrained/held_out.npz. train.py "
                         "leaves out what shares 5 s or more with that file, or with what its own corpora hold out."}
    for path, network in zip(args.encoder, networks):
        about = [f"{key}: {'; '.join(value) if isinstance(value, list) else value}"
                 for key, value in network.about.items() if not isinstance(value, dict)]
        copies = Path(path).with_name("left_out.csv")
        if not path.startswith("random:"):
            about += [f"leak check: {copies.read_text().count(',copy of a held-out')} recordings left out, by {copies}"
                      if copies.is_file() else f"leak check: not known, as there is no {copies}"]
        run[f"Encoder {path}"] = "\n".join(about) or "untrained"
    return run


def write_results(args, name, result, arrays, figure, text, networks, recordings, examples):
    """Write OUT/predictions.npz, OUT/NAME.png, OUT/report.html and, last, OUT/NAME.json with the scores, each whole or
    not at all. text: what was printed; networks: of load_encoders; recordings: see what_was_run; examples: of
    draw_examples."""
    run, out = what_was_run(args, networks, recordings), args.out
    lines = itertools.groupby(escape(text).splitlines(), lambda line: "  " in line)            # tables have two spaces
    printed = ("<pre>" + "\n".join(of) + "</pre>" if table else "<p>" + "<p>".join(of) for table, of in lines)
    numbers = "".join(
        f"<details><summary>{escape(key)}</summary><div>{as_texts(part).to_html(border=0)}</div></details>"
        for key, part in result.items()
        if isinstance(part, dict) and part and all(isinstance(of, dict) for of in part.values()))
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>probe_{name}.py</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>probe_{name}.py</h1><dl>{"".join(f"<dt>{escape(key)}<dd>{escape(value)}" for key, value in run.items())}</dl>
<h2>Scores</h2>{"".join(printed)}{as_html(figure)}<h3>All numbers</h3>{numbers}
<h2>Confidently wrong</h2><p>{COLOURS}{examples[False]}<h2>Confidently right</h2>{examples[True]}</body></html>"""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "predictions.npz", lambda file: np.savez_compressed(file, **arrays))
    save_figure(figure, out / f"{name}.png", dpi=150)
    atomic_write(out / "report.html", page)
    atomic_write(out / f"{name}.json", json.dumps(result | dict(run=run), indent=1))
    print(f"wrote {out / name}.json, predictions.npz, {name}.png and report.html")
