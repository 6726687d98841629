"""How good features are: scores with intervals, calibration, noise and pictures for both probes; and for train.py signs
of collapse, an online probe and pictures of its run.

    number, counts = resample(patients, seed=0)                       # which patients each resample holds
    interval(resampled_auroc(y, score, number, counts))               # AUROC of each resample; their 95 % interval
    features = global_features(encoders, recordings)                  # (E, R, 3D) by encoder.embed

Shapes: E encoders, R recordings or rows, D width of an encoder, C labels, G groups (patients, records), S resamples,
H levels of noise, L leads, T samples (at FS), K prototypes.
"""
import argparse
import base64
import io
import itertools
import json
import math
import shlex
import sys
import time
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure             # no pyplot: it draws without a display
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from augment import ViewSpec, add_noise, draw_views
from corpus import SPLITS, git, known_by_content
from ecg import FS, LEADS, MISSING, UV_PER_MV, Recording, Refused, atomic_write, preprocess
from model import load_encoder, untrained_like

BOOTSTRAPS = 1000                # resamples of patients or records
CALIBRATION_BINS = 15            # of equal size, of each label
PERFECT_DRAWS = 200              # of labels from the probabilities themselves: what a perfect model would score
NOISE_DB = (24, 18, 12, 6, 0, -6)  # dB, signal-to-noise ratios of augment.add_noise
COLORS = {"untrained": "#c4c4c4", "pre-trained": "#7fb2e5", "RR intervals alone": "#d9c8a9", "raw waveform": "#e3b9b0"}

COLLAPSED_RANK = 2.0             # effective rank of a batch's global features within equal lead sets
SHARED_AT_LEAST = 4              # recordings beyond one per lead set; the rank within lead sets cannot exceed this
SAME_FEATURES = 1e-3             # of the features' root mean square: with a smaller difference they count as equal
COLLAPSED_ENTROPY = 0.3          # of the mean prediction, as a share of ln K; 0.95 in a good run
UNIFORM_ENTROPY = 0.98           # of the targets after the warm-up, as a share of ln K; 0.45 in a good run
ONE_HOT_ENTROPY = 0.1            # of the patch targets after the warm-up, as a share of ln K

PROBE_RECORDINGS = 256           # of the online probe, per split
PROBE_AT_LEAST = 20              # recordings per split that the online probe needs
PROBE_LEADS = 12                 # leads of its recordings
PROBE_POSITIVES = 5              # positives and negatives per split that a label needs
PROBE_BATCH = 64                 # windows in a forward pass
# The best one is taken: what training teaches lies along directions of little variance, which a small C hides.
PROBE_C = (0.01, 0.1, 1.0)

SHOWN_LEADS = ("I", "II", "V1", "V3", "V5")  # of features.png
SHOWN_S = 5.0                    # s of the recording in features.png
SHIFT_SAMPLES = 5                # samples at FS between the local features in features.png

MM_PER_S, MM_PER_MV = 25, 10     # of ECG paper
ROW_MM, MARGIN_MM = 25, 4        # from a row of leads to the next, and left and right of them
EXAMPLES = 10                    # in report.html, confidently wrong ones, and as many right ones
FOR, AGAINST = np.array([[1.0, 0.55, 0.15], [0.35, 0.65, 1.0]])  # RGB of patches that raise and lower a logit
COLOURS = """25 mm/s and 10 mm/mV, true to scale in print at 100 %. Orange patches raise the logit of the named label,
blue ones lower it: the weights of the linear probe for the mean local feature, times the difference of the patch from
its mean in training; full colour for the strongest twentieth of a picture. What other features add is not shown."""
STYLE = """body{font:16px/1.5 sans-serif;color:#222;max-width:72rem;margin:auto;padding:0 1rem}p{margin:.4rem 0}
dt{font-weight:bold}dd{margin:0;white-space:pre-line;overflow-wrap:anywhere}pre,div{overflow-x:auto;font-size:.8rem}
img{max-width:100%;height:auto}figure{margin:1rem 0;break-inside:avoid}summary{cursor:pointer}
table{border-collapse:collapse}td,th{text-align:right;padding:0 .6rem;border-bottom:1px solid #ddd;white-space:nowrap}
@page{size:A4 landscape;margin:10mm}
@media print{body{font-size:9pt;padding:0}pre{font-size:5.5pt}}"""


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
    G, counts = counts.shape[1], counts.astype(np.float64)
    negatives = np.flatnonzero(~y)[np.argsort(score[~y])]
    positives = np.flatnonzero(y)[np.argsort(group[y], kind="stable")]
    lowest = np.zeros((len(negatives) + 1, G), np.int32)             # of each group, among the n lowest negatives
    lowest[np.arange(1, len(lowest)), group[negatives]] = 1
    np.cumsum(lowest, axis=0, out=lowest)
    below = lowest[np.searchsorted(score[negatives], score[positives], side="left")]
    below += lowest[np.searchsorted(score[negatives], score[positives], side="right")]  # a tie is in one of the two
    holders, first = np.unique(group[positives], return_index=True)
    wins = np.add.reduceat(below, first, axis=0, dtype=np.float64) / 2 if len(first) else np.zeros((0, G))
    won = ((counts[:, holders] @ wins) * counts).sum(axis=1)
    pairs = (counts @ np.bincount(group[y], minlength=G)) * (counts @ np.bincount(group[~y], minlength=G))
    return np.divide(won, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)


def label_auroc(y, score, group, counts):
    """AUROC (S, C) of every label in every resample: resampled_auroc for the columns of y and score (R, C)."""
    auroc = [resampled_auroc(*column, group, counts) for column in zip(y.T, score.T)]
    return np.reshape(auroc, (y.shape[1], len(counts))).T


def plain_auroc(y, score):
    """AUROC (C,) of the columns of y (R, C) bool and score (R, C), NaN where a class is absent."""
    return label_auroc(y, score, np.zeros(len(y), int), np.ones((1, 1)))[0]


def macro(auroc):
    """Mean over labels of auroc (S, C) -> (S,). A label that a resample cannot score is left out of its mean."""
    return np.ma.masked_invalid(auroc).mean(axis=1).filled(np.nan)


def interval(samples):
    """95 % percentile interval [low, high] of bootstrap samples (S,)."""
    return np.nanpercentile(samples, [2.5, 97.5]).tolist() if np.isfinite(samples).any() else [np.nan, np.nan]


def interval_of_seeds(scores, groups):
    """95 % interval of the mean over encoders (seeds of one recipe) of scores (E, S): of the test set itself, [:, 0],
    and of its resamples; groups: how many patients or records are resampled.

    One encoder: the percentiles of its resamples, which say nothing about another seed. Several: the variance of the
    mean over resamples of patients plus that over seeds, by Student's t with the degrees of freedom of Welch (1947) and
    Satterthwaite, because few seeds say little about their own spread.
    """
    E, mean = len(scores), scores.mean(axis=0)
    if E == 1 or not np.isfinite(mean[1:]).any() or not scores.std():            # nothing scored, or all equal
        return interval(mean[1:])
    of_patients, of_seeds = np.nanvar(mean[1:], ddof=1) * groups / (groups - 1), scores[:, 0].var(ddof=1) / E
    variance = of_patients + of_seeds
    freedom = variance ** 2 / (of_seeds ** 2 / (E - 1) + of_patients ** 2 / (groups - 1))
    half = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    return [mean[0] - half, mean[0] + half]


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


# ---- calibration ----------------------------------------------------------------------------------------------------
def platt(logit, y, logit_new):
    """Platt's (1999) sigmoid, fitted on logit (R,) and y (R,) bool: probabilities (R',) of logit_new (R',). If y has
    only one class, nothing can be fitted: the probabilities are then those of the logits themselves."""
    identity = LogisticRegression()              # its decision function is its input
    identity.classes_, identity.coef_, identity.intercept_ = np.array([False, True]), np.ones((1, 1)), np.zeros(1)
    if y.all() or not y.any():
        return identity.predict_proba(logit_new[:, None])[:, 1]
    rows = np.arange(len(y))                     # one fold with all rows: a frozen classifier needs no held-out rows
    model = CalibratedClassifierCV(FrozenEstimator(identity), method="sigmoid", cv=[(rows, rows)], ensemble=False)
    return model.fit(logit[:, None], y).predict_proba(logit_new[:, None])[:, 1]


def calibration(p, y, prevalence, group):
    """How well the probabilities p (R, C) agree with labels y (R, C) bool: dict of means over labels, and skills of
    these means.

    brier, nll     proper scores (nll in nats); brier_skill, nll_skill: 1 - score / score of a constant, the prevalence
                   (C,) in the training set. 0 is as good as this constant, 1 is perfect, below 0 is worse
    reliability    part of the Brier score that comes from wrong probabilities, and resolution: what is gained by
                   telling rows apart; both without the bias of small bins (Ferro and Fricker 2012)
    ece            expected calibration error; ece_perfect: that of labels drawn from p itself, so of a perfect model,
                   the mean and the 95 % of the draws. An ECE can only be read next to it
    z              Spiegelhalter's (1986) test: 0 for a perfect model, between -2 and 2 for 95 % of such; larger for
                   overconfident probabilities, smaller for those too near .5. group (R,) int: rows of one
                   group are not independent, which the other numbers ignore
    """
    if not p.size:
        return dict.fromkeys(("brier", "brier_skill", "nll", "nll_skill", "reliability", "resolution", "ece",
                              "ece_perfect", "ece_perfect_ci95", "z"), np.nan)
    rng, constant = np.random.default_rng(0), np.broadcast_to(prevalence, p.shape)
    mix = rng.permutation(len(p))                # equal p must not fall into bins by patient
    p, y, group = p[mix], y[mix], group[mix]
    brier, nll = np.mean((p - y) ** 2), neg_log_likelihood(p, y)
    said, seen, n = in_bins(p, y)
    bias = n[:, None] * seen * (1 - seen) / (n[:, None] - 1).clip(1) / len(p)
    share, mean = n[:, None] / len(p), y.mean(axis=0)
    ranked = np.sort(p, axis=0)                  # to sort it again in each draw is quick
    perfect = [expected_error(ranked, rng.random(p.shape) < ranked) for _ in range(PERFECT_DRAWS)]
    of_group = np.bincount(group, ((y - p) * (1 - 2 * p)).sum(axis=1))
    return dict(brier=brier, brier_skill=1 - brier / np.mean((constant - y) ** 2), nll=nll,
                nll_skill=1 - nll / neg_log_likelihood(constant, y),
                reliability=((said - seen) ** 2 * share - bias).sum(axis=0).mean(),
                resolution=(((seen - mean) ** 2 * share - bias).sum(axis=0) + mean * (1 - mean) / (len(p) - 1)).mean(),
                ece=expected_error(p, y), ece_perfect=np.mean(perfect), ece_perfect_ci95=interval(perfect),
                z=of_group.sum() / np.sqrt((of_group ** 2).sum()).clip(1e-12))


def neg_log_likelihood(p, y):
    return -np.mean(np.log(np.where(y, p, 1 - p).clip(np.finfo(float).tiny)))


def in_bins(p, y, bins=CALIBRATION_BINS):
    """Mean probability and share of positives (bins, C) in bins of equal size, from the lowest p of each label on, and
    the sizes of the bins (bins,)."""
    order = np.argsort(p, axis=0, kind="stable")
    bins = min(bins, len(p))
    starts = np.arange(bins) * len(p) // bins
    n = np.diff(np.append(starts, len(p)))
    sums = (np.add.reduceat(np.take_along_axis(x, order, axis=0).astype(float), starts, axis=0) for x in (p, y))
    return *(x / n[:, None] for x in sums), n


def expected_error(p, y):
    """Class-wise expected calibration error, the mean over labels of p (R, C) and y (R, C)."""
    said, seen, n = in_bins(p, y)
    return np.mean(n @ np.abs(said - seen) / len(p))


CALIBRATION_NOTE = ("Brier skill: 1 - Brier score / that of the constant prevalence of the training set; ECE [of a "
                    "perfect model]; z: of a perfect model between -2 and 2, larger if overconfident")


def show_calibration(found):
    """Columns of a table from a result of calibration, for people."""
    return {"Brier skill": found["brier_skill"], "ECE": show(found["ece"], found["ece_perfect_ci95"]), "z": found["z"]}


# ---- global features, clean and under noise -------------------------------------------------------------------------
def global_features(encoders, recordings):
    """Global features (E, R, 3D) of R recordings by encoder.embed; NaN where a recording cannot be used. recordings: a
    function that returns an iterator of ecg.Recording; it is called once for each encoder."""
    found = [encoder.embed(recordings(), local=False, on_error="nan") for encoder in encoders]
    return np.stack([[embedding.global_feature for embedding in embeddings] for embeddings in found])


def noisy_features(encoders, recordings, noise, seed):
    """Global features (E, H, R, 3D), as above, at every level of NOISE_DB; noise of augment.load_noise. A recording has
    the same noise at every level, only its strength differs."""
    P = encoders[0].patch_samples
    features = global_features(encoders, lambda: add_noise_levels(recordings(), noise, P, seed))
    return features.reshape(len(encoders), -1, len(NOISE_DB), features.shape[2]).swapaxes(1, 2)


def add_noise_levels(recordings, noise, patch_samples, seed):
    """Yield each recording once for every level of NOISE_DB, at FS, in whole patches; what is missing stays missing."""
    snr_db = torch.tensor(NOISE_DB, dtype=torch.float32)
    for number, recording in enumerate(recordings):
        try:
            signal_mv, lead_ids = preprocess(*recording[:4], {})
        except Refused:                          # embed refuses it too
            yield from [recording] * len(NOISE_DB)
            continue
        L, N = len(signal_mv), signal_mv.shape[1] // patch_samples
        T = N * patch_samples
        clean = np.ma.masked_invalid(signal_mv[:, :T])
        filled = np.where(clean.mask, clean.mean(axis=1, keepdims=True).filled(0), clean.data).astype(np.float32)
        draws = draw_views([seed, number], range(1), ViewSpec(1, L, N, True), lead_ids[None], np.array([L]), T,
                           noise.shape[-1], patch_samples)
        arrays = filled, lead_ids, *(draws[name][0, 0] for name in ("amplitude", "sign", "channel", "offset"))
        x, leads, *same = (torch.from_numpy(a).expand(len(NOISE_DB), *a.shape) for a in arrays)
        for noisy in add_noise(x, leads, noise, snr_db, *same).numpy():
            yield Recording(np.where(clean.mask, np.nan, noisy), FS, [LEADS[i] for i in lead_ids])


# ---- is a run learning? ---------------------------------------------------------------------------------------------
@torch.no_grad()
def health(features, lead_sets, mean_prediction):
    """Signs of collapse that the loss does not show: dict of 0-d tensors cls_std, cls_rank, prediction_entropy.

    features (R, 2D): the teacher's, of the recordings of all ranks. lead_sets (R, len(LEADS)) int: how often a
    recording shows each lead. mean_prediction (K,): the student's mean probability of each prototype.

    cls_rank is the effective rank of the features among recordings with the same leads (among all, if too few have the
    same): the features of an encoder that reads lead names and ignores the ECG differ only between lead sets.
    """
    x = torch.nan_to_num(features).double()
    _, which, size = torch.unique(lead_sets, dim=0, return_inverse=True, return_counts=True)
    if len(x) - len(size) < SHARED_AT_LEAST:
        which, size = torch.zeros_like(which), torch.full_like(size[:1], len(x))
    mean = x.new_zeros(len(size), x.shape[1]).index_add_(0, which, x) / size[:, None]
    within = x - mean[which]
    alike = within.square().mean() <= SAME_FEATURES ** 2 * x.square().mean()       # rounding noise has a high rank
    return dict(cls_std=x.std(0).mean().float(),
                cls_rank=torch.where(alike, 1.0, effective_rank(within)).float(),
                prediction_entropy=-(mean_prediction * mean_prediction.clamp(min=1e-12).log()).sum())


def effective_rank(x):
    """exp of the entropy of the singular values of x (R, F), fp64, as shares of their sum (Roy and Vetterli 2007).

    Roots of the eigenvalues of x x' or x' x (the smaller), in fp64, because the root of a rounding error is not small.
    """
    square = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(square).clamp(min=0).sqrt()
    share = values / values.sum().clamp(min=1e-12)
    return (-(share * share.clamp(min=1e-12).log()).sum()).exp()


def diagnose(row, warm):
    """Warnings about the numbers of a logged step (dict): {kind: sentence}, empty in a run that learns. A value that is
    absent, None or NaN gives no warning. warm: whether the warm-up is over."""
    names = ("cls_rank", "prediction_entropy", "target_entropy", "ln_k", "patch_target_entropy", "ln_patch_k")
    rank, prediction, target, ln_k, patch_target, ln_patch_k = (
        math.nan if row.get(n) is None else row[n] for n in names)
    signs = {
        "collapse of features": (rank < COLLAPSED_RANK, (
            f"the global features differ along only {rank:.1f} directions among recordings with the same leads: the "
            "encoder ignores the ECG. Try a smaller --lr, a larger KOLEO_WEIGHT, or more patients")),
        "collapse of predictions": (prediction < COLLAPSED_ENTROPY * ln_k, (
            f"the student uses only a few of the prototypes (entropy {prediction:.2f} of {ln_k:.2f}). "
            "Try a smaller --lr, or fewer --prototypes")),
        "uniform targets": (warm and target > UNIFORM_ENTROPY * ln_k, (
            f"the teacher finds all prototypes equally likely (entropy {target:.2f} of {ln_k:.2f}), which teaches "
            "nothing. Try a lower temperature in RECIPES, or fewer --prototypes")),
        "one-hot patch targets": (warm and patch_target < ONE_HOT_ENTROPY * ln_patch_k, (
            f"the teacher gives each patch only one prototype (entropy {patch_target:.2f} of {ln_patch_k:.2f}), so the "
            "targets do not say which patches are alike. Try a higher patch_temperature in RECIPES, or fewer "
            "--prototypes"))}
    return {kind: sentence for kind, (found, sentence) in signs.items() if found}


class OnlineProbe:
    """AUROC of a logistic regression on the teacher's features, on a few labelled recordings of the data.

    Fitted on split train, scored on split val (PTB-XL fold 9), which is never pre-trained on: a sign, not a result.
    corpora: list of Corpus; window: samples at FS of each recording. `usable` is False if there are too few labels.
    """

    def __init__(self, corpora, window):
        self.sets, self.scored = [], []
        for split in ("train", "val"):
            found = [(c.read(i, 0, window), c.lead_ids(i), c.index["label"][i])
                     for c in corpora for i in labelled_rows(c.index, split, window)]
            found = [row for row in found if not (row[0] == MISSING).any()]
            if len(found) >= PROBE_AT_LEAST:
                windows, leads, labels = (np.stack(x) for x in zip(*found))
                labels = np.unpackbits(labels[:, None], axis=1, bitorder="little").astype(bool)
                self.sets.append((torch.from_numpy(windows), torch.from_numpy(leads.astype(np.int64)), labels))
        if len(self.sets) == 2:
            rarest = [np.minimum(y.sum(axis=0), (~y).sum(axis=0)) for _, _, y in self.sets]
            self.scored = np.flatnonzero(np.minimum(*rarest) >= PROBE_POSITIVES)
        self.usable = len(self.scored) > 0

    @torch.no_grad()
    def score(self, encoder, device):
        """Macro AUROC over the superclasses that both splits have, at the best of PROBE_C."""
        features, scores = [], []
        for windows, leads, _ in self.sets:
            parts = zip(windows.split(PROBE_BATCH), leads.split(PROBE_BATCH))
            found = [encoder(w.to(device).float() / UV_PER_MV, ids.to(device)).global_feature() for w, ids in parts]
            features.append(torch.cat(found).cpu().numpy())
        x, x_new = standardized(*features)
        y, y_new = (labels[:, self.scored] for _, _, labels in self.sets)
        for c in PROBE_C:
            model = LogisticRegression(C=c, max_iter=200)
            logits = np.stack([model.fit(x, label).decision_function(x_new) for label in y.T], axis=1)
            scores.append(plain_auroc(y_new, logits).mean())
        return float(max(scores))


def labelled_rows(index, split, window):
    """At most PROBE_RECORDINGS rows of a split of an index: with a label, PROBE_LEADS leads and `window` samples."""
    usable = (index["label"] > 0) & (index["n_leads"] == PROBE_LEADS) & (index["length"] >= window)
    return np.flatnonzero(usable & (index["split"] == SPLITS.index(split)))[:PROBE_RECORDINGS]


# ---- pictures -------------------------------------------------------------------------------------------------------
def save_figure(figure, path, dpi=110):
    """Write a matplotlib Figure to a PNG file, whole or not at all."""
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def draw_curves(out):
    """OUT/curves.png from OUT/log.jsonl: losses, entropies next to ln K, and the online probe, against the step."""
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    panels = {"losses": ("dino_global", "dino_local", "ibot", "leads", "contrast", "wave"),
              "entropy (nats)": ("target_entropy", "patch_target_entropy", "prediction_entropy"),
              "online probe, macro AUROC": ("online_auroc",)}
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, 3), panels.items()):
        for name in (n for n in names if any(n in r for r in rows)):
            steps, values = [r["step"] for r in rows if name in r], [r[name] for r in rows if name in r]
            axis.plot(steps, np.array(values, dtype=float), marker="" if len(names) > 1 else "o", label=name)
        axis.set(title=title, xlabel="step")
        if len(names) > 1:
            for ln_k in [r["ln_k"] for r in rows if r.get("ln_k")][:1]:
                axis.axhline(ln_k, color="0.6", linestyle=":", label="ln K")
            axis.legend(fontsize=8)
    save_figure(figure, Path(out) / "curves.png")


def fine_features(encoder, signal_mv, leads):
    """Local features (L, M, D) every SHIFT_SAMPLES of signal_mv (L, T), and their centres (M,) in seconds."""
    shifts = range(0, encoder.patch_samples, SHIFT_SAMPLES)
    shifted = encoder.embed([Recording(signal_mv[:, shift:], FS, leads) for shift in shifts])
    times_s = np.concatenate([e.times_s + shift / FS for e, shift in zip(shifted, shifts)])
    order = np.argsort(times_s)
    return np.concatenate([e.local_features for e in shifted], axis=1)[:, order], times_s[order]


def draw_features(encoder, corpus, row, path):
    """features.png: an ECG coloured by its local features: their first three principal components are RGB."""
    names = [LEADS[i] for i in corpus.lead_ids(row)]
    steps = corpus.read(row)
    signal = np.where(steps == MISSING, np.nan, steps / np.float32(UV_PER_MV))
    t = np.arange(min(round(SHOWN_S * FS), signal.shape[1])) / FS
    seen = [i for i in range(len(names)) if np.isfinite(signal[i, :len(t)]).any()]
    shown = [i for i in seen if names[i] in SHOWN_LEADS] or seen[:1]
    features, times_s = fine_features(encoder, signal, names)
    colour = principal_colours(features[shown])
    nearest = np.abs(times_s[None] - t[:, None]).argmin(axis=1)
    figure = Figure(figsize=(12, 1.5 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axis, lead, rgb in zip(axes, shown, colour):
        y = signal[lead, :len(t)]
        points = np.stack((t, y), axis=1)
        axis.add_collection(LineCollection(np.stack((points[:-1], points[1:]), axis=1), colors=rgb[nearest[:-1]],
                                           linewidths=2.2))
        axis.set(xlim=(0, t[-1]), ylim=(np.nanmin(y) - 0.15, np.nanmax(y) + 0.15), ylabel=f"{names[lead]} (mV)")
    axes[-1].set_xlabel("seconds; colour: first three principal components of the local features")
    save_figure(figure, path)


def principal_colours(features):
    """RGB in [0, 1] (L, M, 3) of local features (L, M, D). The mean of each lead is subtracted first: otherwise the
    colour would only show which lead it is."""
    x = features - np.nanmean(features, axis=1, keepdims=True)
    components = PCA(3, svd_solver="full").fit_transform(np.nan_to_num(x.reshape(-1, x.shape[2])))
    low, high = np.percentile(components, (2, 98), axis=0)
    return np.clip((components - low) / (high - low).clip(1e-12), 0, 1).reshape(*x.shape[:2], 3)


def draw_ecg_paper(axis, signal_mv, leads, colours=None):
    """Draw an ECG on paper of 25 mm/s and 10 mm/mV, and return the size (2,) in mm that `axis` must have for that.

    signal_mv (L, T) at FS, NaN = missing, drawn without the median of each lead; leads: L names. The twelve standard
    ones are in three rows of four, a quarter of the time each, with II below; others have a row each. colours
    (L, T, 3): RGB behind every sample.
    """
    T, names, twelve = signal_mv.shape[1], list(leads), LEADS[1:13]
    rows = [[i] for i in range(len(names))]
    if set(twelve) <= set(names):
        rows = [[names.index(name) for name in row] for row in (*(twelve[r::3] for r in range(3)), ["II"])]
    x_mm, y_mm = np.arange(T) / FS * MM_PER_S, (signal_mv.T - pd.DataFrame(signal_mv.T).median().to_numpy()) * MM_PER_MV
    for number, row in enumerate(rows):
        for k, i in enumerate(row):
            part = slice(T * k // len(row), T * (k + 1) // len(row))
            points = np.stack((x_mm, y_mm[:, i] - ROW_MM * number), axis=1)[part]
            if colours is not None:              # below the grid, a line for each stretch of one colour
                starts = np.flatnonzero(np.diff(colours[i, part], axis=0, prepend=-1).any(axis=1))
                lines = [points[a:b + 1] for a, b in zip(starts, [*starts[1:], T])]
                axis.add_collection(LineCollection(lines, linewidths=8, colors=colours[i, part][starts], zorder=0))
            axis.plot(*points.T, color="black", linewidth=0.8)
            axis.text(points[0, 0] + 1, 8 - ROW_MM * number, names[i], fontsize=9)
    size_mm = np.array((x_mm[-1] + 2 * MARGIN_MM, ROW_MM * (len(rows) + 1)))
    (left, right), (low, high) = (-MARGIN_MM, size_mm[0] - MARGIN_MM), (ROW_MM - size_mm[1], ROW_MM)
    for step_mm, colour in ((1, "#f8e3e3"), (5, "#eebcbc")):
        axis.vlines(np.arange(-5, right, step_mm), low, high, color=colour, linewidth=0.6, zorder=0.5)
        axis.hlines(np.arange(low, high, step_mm), left, right, color=colour, linewidth=0.6, zorder=0.5)
    axis.set(xlim=(left, right), ylim=(low, high), xticks=(), yticks=(), frame_on=False)
    return size_mm


def draw_bars(axis, labels, series):
    """Groups of bars from 0.5 on, a group per label; series {name in COLORS: (AUROC (N,), intervals (N, 2))}."""
    width = 0.8 / len(series)
    for i, (name, scores) in enumerate(series.items()):
        value, ci = (np.array(x, dtype=float) for x in scores)       # None becomes NaN, which is not drawn
        at = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * width
        bars = axis.bar(at, value - 0.5, 0.94 * width, bottom=0.5, color=COLORS[name], label=name)
        axis.bar_label(bars, [f"{v:.3f}" for v in value], label_type="center", fontsize=8)
        axis.vlines(at, *ci.T, color="#333333", linewidth=1)
    axis.set(xticks=range(len(labels)), xticklabels=labels, ylim=(min(0.5, axis.get_ylim()[0]), 1))
    axis.tick_params(axis="x", labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)


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
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    networks, control_of = [load_encoder(path, device) for path in paths], []        # this checks the device
    kinds = {(network.width, network.patch_samples, str(path).startswith("random:"))
             for path, network in zip(paths, networks)}
    if len(kinds) > 1 or len({*map(str, paths)}) < len(paths):
        raise ValueError(f"encoders {' '.join(map(str, paths))}: expected different files of one size, or "
                         "random:SIZE:SEED with different seeds, as scores are means over them; probe others alone")
    for number, path in enumerate(paths):
        networks[number].precision = precision
        same = [k for k in range(len(paths), len(networks)) if networks[k].config == networks[number].config]
        if str(path).startswith("random:"):
            same = [number]
        elif not same:
            networks.append(untrained_like(networks[number]))
        control_of.append(same[0] if same else len(networks) - 1)
    return networks, control_of


def only_random(args):
    """Whether the encoders are untrained ones: then they are their own controls."""
    return all(path.startswith("random:") for path in args.encoder)


def to_json(value):
    """A dict as plain types for json.dumps, numbers with 6 decimals; pandas makes null of NaN, which JSON lacks."""
    return json.loads(pd.Series(value).to_json(double_precision=6))


def show(value, ci):
    """A score with its interval, for people."""
    return "-" if value is None else f"{value:.3f} [{', '.join('-' if v is None else f'{v:.3f}' for v in ci)}]"


# ---- results and report.html of both probes -------------------------------------------------------------------------
def as_html(figure, caption=""):
    """A matplotlib Figure as HTML, in its true size where the page is wide enough."""
    image = io.BytesIO()
    figure.savefig(image, format="webp", dpi=100, pil_kwargs=dict(lossless=True))      # half the size of a PNG
    return (f'<figure><img style="width:{figure.get_figwidth():.3f}in" alt="" src="data:image/webp;base64,'
            f'{base64.b64encode(image.getvalue()).decode()}"><figcaption>{escape(caption)}</figcaption></figure>')


def draw_examples(encoder, x, fit, names, p, y, group, show_row):
    """HTML, {whether right: text}, of EXAMPLES rows of p (R, C) with the most wrong probabilities of a label, and of
    those with the highest of a label that is there; at most one row of each group (R,). names (C,), y (R, C) bool.

    show_row(row) gives a title, the recording, and which patches (N,) the columns D to 2D of x are the mean of. Colours
    are the part of each patch in the logit through this mean: weights times (local feature - mean of x). The weights
    are differences between logits: fit(rows (R', F)) gives those (R', C) of a linear probe fitted on x (., F).
    """
    mean, columns = np.nanmean(x, axis=0, dtype=np.float64), np.arange(encoder.width, 2 * encoder.width)
    at_mean, *away = fit(np.vstack((mean, mean + np.eye(len(mean))[columns])))
    weights, off, found = np.array(away) - at_mean, np.abs(p - y), {False: "", True: ""}
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
            (signal_mv, ids), figure = preprocess(*recording[:4], {}), Figure()
            colours, leads = 1 - np.abs(part) * (1 - np.where(part > 0, FOR, AGAINST)), [LEADS[i] for i in ids]
            size_mm = draw_ecg_paper(figure.add_axes((0, 0, 1, 1)), signal_mv[:, :part.shape[1]], leads, colours)
            figure.set_size_inches(size_mm / 25.4)
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
        about = {key: "; ".join(value) if isinstance(value, list) else value for key, value in network.about.items()
                 if not isinstance(value, dict)}
        copies = Path(path).with_name("left_out.csv")
        if not path.startswith("random:"):
            about["leak check"] = (f"{copies.read_text().count(',copy of a held-out')} recordings left out, by {copies}"
                                   if copies.is_file() else f"not known, as there is no {copies}")
        run[f"Encoder {path}"] = "\n".join(map("{0[0]}: {0[1]}".format, about.items())) or "untrained"
    return run


def all_numbers(result):
    """HTML tables of the parts of a result that are dicts of dicts: a column each, a row for every number."""
    def as_text(value):
        return (f"[{', '.join(map(as_text, value))}]" if isinstance(value, list) else "" if value is None else
                f"{value:.3f}".removesuffix(".000") if isinstance(value, float) else str(value))
    page = ""
    for name, part in result.items():
        if isinstance(part, dict) and part and all(isinstance(value, dict) for value in part.values()):
            table = pd.json_normalize(list(part.values()), sep=" ").set_axis(list(part)).T.replace({np.nan: None})
            number = ~table.index.astype(str).str.contains("ci95")   # an interval belongs to the number before it
            number[:1] = True
            table = table.map(as_text).groupby(number.cumsum()).agg(" ".join).set_axis(table.index[number])
            page += f"<details><summary>{escape(name)}</summary><div>{table.to_html(border=0)}</div></details>"
    return page


def write_results(args, name, result, arrays, figure, text, networks, recordings, examples):
    """Write OUT/predictions.npz, OUT/NAME.png, OUT/report.html and, last, OUT/NAME.json with the scores, each whole or
    not at all. text: what was printed; networks: of load_encoders; recordings: see what_was_run; examples: of
    draw_examples."""
    run, out = what_was_run(args, networks, recordings), args.out
    lines = itertools.groupby(escape(text).splitlines(), lambda line: "  " in line)            # tables have two spaces
    printed = ("<pre>" + "\n".join(of) + "</pre>" if table else "<p>" + "<p>".join(of) for table, of in lines)
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>probe_{name}.py</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>probe_{name}.py</h1><dl>{"".join(f"<dt>{escape(key)}<dd>{escape(value)}" for key, value in run.items())}</dl>
<h2>Scores</h2>{"".join(printed)}{as_html(figure)}<h3>All numbers</h3>{all_numbers(result)}
<h2>Confidently wrong</h2><p>{COLOURS}{examples[False]}<h2>Confidently right</h2>{examples[True]}</body></html>"""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "predictions.npz", lambda file: np.savez_compressed(file, **arrays))
    save_figure(figure, out / f"{name}.png", dpi=150)
    atomic_write(out / "report.html", page)
    atomic_write(out / f"{name}.json", json.dumps(result | dict(run=run), indent=1))
    print(f"wrote {out / name}.json, predictions.npz, {name}.png and report.html")
