"""What a frozen encoder knows about single heartbeats: a linear probe on MIT-BIH, next to the same network untrained.

    python probe_mitbih.py --encoder runs/real/encoder.pt --raw raw/mitdb --out runs/real/mitbih [--noise data/nstdb]

The protocol is the inter-patient one (de Chazal et al. 2004): the beats of DS1 train, those of DS2 are scored, paced
records and AAMI class Q (7 beats) are left out. A beat lies in the middle of a window, as long as in training but at
most BEAT_WINDOW_S. Its features are the token that holds its R, mean over leads, alone (r_token) or together with
the mean of the tokens from -300 to +400 ms (neighbourhood). Records 201 (DS1) and 202 (DS2) are the same person.
The scores are macros over N, S, V (nine in ten F beats of each set are in one record): `within` is the mean over
records of the AUROC within a record, which is what a reader of one record needs, and `pooled` that over all beats, in
which a few records decide. Two controls need no encoder: eight RR features (rr), and 0.75 s of the raw lead II (raw).
How well a linear fit on DS1 finds two of these numbers in DS2 is the correlation within records: `rr r` of the
logarithm of the RR interval before the beat, `early r` of its ratio to the mean of the ten before, which tells S from
N. Probabilities and thresholds come from held-out records of DS1. A window of 1 s, lead II alone, and noise, added to
the window of a beat, are scored on FEW_BEATS of a class and record. --encoder random:SIZE gives only the control.
Writes OUT/report.html, OUT/mitbih.json, OUT/predictions.npz (beats of DS2) and OUT/mitbih.png.

Shapes: L leads, D width, K beats, F features, C classes, G penalties, E encoders, H noises, S resamples (first: DS2).
"""
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import wfdb
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import precision_recall_curve
from sklearn.model_selection import GroupKFold
from tqdm import tqdm

from augment import add_test_noise, load_noise
from corpus import open_corpus
from ecg import FS, LEAD_IDS, LEADS, Recording, Refused, preprocess, read_wfdb
from evaluate import (CALIBRATION_NOTE, COLORS, NOISE_DB, NOISE_KINDS, calibration, draw_bars, draw_examples,
                      interval, interval_of_seeds, label_auroc, load_encoders, macro, mean_of, parser_of,
                      plain_auroc, resample, selective, standardized, table, to_json, write_results)
from model import AROUND_S, BEAT_WINDOW_S, place_windows, token_features
from prepare import MITDB_DS1, MITDB_DS2

# Symbols of the AAMI EC57 classes. J are the escape beats e and j: nearly all papers count them as N, and WFDB's own
# comparator, bxb, as S, which moves 32 beats of DS1 and 213 of DS2.
SYMBOLS = {"N": "NLR", "J": "ej", "S": "AaJS", "V": "VE", "F": "F", "Q": "/fQ"}
CLASSES, NSV = ("N", "S", "V", "F"), slice(3)  # trained and scored; in the macros
SIDES = {"1 s": (1.0, False), "lead II": (BEAT_WINDOW_S, True)}  # window; whether lead II (or the first) is alone
RAW_S = (-0.3, 0.45)             # s from R: the waveform of the raw control
MAX_N_TRAIN = 600                # N beats per training record, evenly spread; all beats of other classes are used
FEW_BEATS = 60                   # of a class and record, for what costs another forward pass
C_GRID = (1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, the inverse strength of the L2 penalty
FOLDS = 5                        # of DS1 records, to choose C, the temperature and the thresholds
RIDGE_GRID = np.logspace(0, 4, 5)  # penalties of the fits of RR intervals
MIN_BEATS = 5                    # of a class and of all others, to score the class within a record
LOCAL_BEATS = 10                 # beats whose mean RR interval a beat is compared with
RR_S, RR_RATIO = (0.2, 3.0), (0.5, 1.5)  # s; beyond these are gaps, pauses and artefacts: they count as the limit
DOMINANT = ("213", "232")        # hold nine in ten of DS2's F beats, and three quarters of its S beats


# ---- beats and their features ---------------------------------------------------------------------------------------
def read_beats(path):
    """Times (K,) s and groups (K,), the keys of SYMBOLS, of a record's beats; other symbols are left out."""
    annotation = wfdb.rdann(path, "atr")
    group_of = {symbol: name for name, symbols in SYMBOLS.items() for symbol in symbols}
    groups = pd.Series(annotation.symbol, dtype=object).map(group_of)
    return annotation.sample[groups.notna()] / annotation.fs, groups.dropna().to_numpy(dtype="U1")


def rr_features(beats_s):
    """Eight RR features per beat (K, 8), in s or as ratios: they do not use the waveform."""
    rr = pd.Series(beats_s).diff()
    usual = rr.median()
    before, after = rr.fillna(usual), rr.shift(-1).fillna(usual)
    local = before.rolling(LOCAL_BEATS, min_periods=1).mean().shift(fill_value=usual)  # of the beats before this one
    ratios = before / local, after / local, before / after, before / usual, after / usual
    return np.stack((before, after, local, *ratios), axis=1)


def raw_features(signal_mv, lead_ids, beats_s):
    """0.75 s of lead II (or of the first lead) around R at FS, minus its mean: (K, 187) mV."""
    wave = np.nan_to_num(signal_mv[np.argmax(lead_ids == LEAD_IDS["II"])])
    at = np.rint(beats_s * FS).astype(int)[:, None] + np.arange(*(int(s * FS) for s in RAW_S))
    window = wave[at.clip(0, len(wave) - 1)]
    return window - window.mean(axis=1, keepdims=True)


def collect(raw, encoders, most=None, noise=None, seed=0):
    """Beats of every record of DS1 and DS2 in `raw`: record, beat_s, group, weight (of used_beats), `few` (whether used
    for SIDES and noise), rr, raw; and neighbourhood (K, 2D), by number of the encoder, with a side, and, in DS2, under
    `noise` of augment.load_noise (K, H, 2D). ValueError if a set is absent, or if a file cannot be read."""
    names = [n for n in MITDB_DS1 + MITDB_DS2 if (raw / f"{n}.hea").is_file()]
    if not set(names) & set(MITDB_DS1) or not set(names) & set(MITDB_DS2):
        raise ValueError(f"{raw} holds {len(names)} of the 44 records of DS1 and DS2 ({' '.join(names) or 'none'}); "
                         "fetch both sets with python prepare.py mitdb --raw DIR --out DIR --download")
    parts = []
    for name in tqdm(names, desc="records", unit="record", disable=None):
        try:
            signal_mv, lead_ids = preprocess(*read_wfdb(raw / name)[:4])
        except Refused as error:
            raise ValueError(f"{raw / name}: {error}") from None
        times_s, group = read_beats(str(raw / name))
        weight, rr = used_beats(name, group, most), rr_features(times_s)
        times_s, group, rr, weight = (x[weight > 0] for x in (times_s, group, rr, weight))
        few = used_beats("", group, FEW_BEATS) > 0
        part = dict(record=np.full(len(times_s), name), beat_s=times_s, group=group, weight=weight, few=few, rr=rr,
                    raw=raw_features(signal_mv, lead_ids, times_s))
        for e, encoder in enumerate(encoders if len(times_s) else ()):
            part[e] = token_features(encoder, signal_mv, lead_ids, times_s)
            for side, (window_s, alone) in ({} if most else SIDES).items():
                leads = [np.argmax(lead_ids == LEAD_IDS["II"])] if alone else slice(None)
                part[side, e] = token_features(encoder, signal_mv[leads], lead_ids[leads], times_s[few], window_s)
            if noise is not None and name in MITDB_DS2:
                part["noise", e] = np.stack([token_features(encoder, signal_mv, lead_ids, times_s[few], change=partial(
                    add_test_noise, noise=noise, kind=kind, snr_db=db, seed=[seed, int(name)]))
                    for kind in NOISE_KINDS for db in NOISE_DB], axis=1)
        parts.append(part)
    return {key: np.concatenate([part[key] for part in parts if key in part]) for key in set().union(*parts)}


def used_beats(name, group, most=None):
    """How many beats each beat of record `name` stands for (K,), 0 if it is not used. Used are all but Q, in DS1 at
    most MAX_N_TRAIN N; or at most `most` of every group; evenly spread."""
    weight = np.zeros(len(group))
    for of in set(SYMBOLS) - {"Q"}:
        found = np.flatnonzero(group == of)
        scored = min(len(found), most or len(found))                 # what a record of DS2 would show
        n = min(scored, MAX_N_TRAIN) if of == "N" and name in MITDB_DS1 else scored
        weight[found[np.linspace(0, len(found) - 1, n).astype(int)]] = scored / max(n, 1)
    return weight


def select(data, rows, seed, escape="N"):
    """The beats `rows` of data as the scores need them: classes (of J: escape), which beats are of DS2, and its
    resamples of records, the first of which is DS2 itself; see evaluate.resample."""
    beats = {key: data[key][rows] for key in ("record", "group", "weight", "rr")}
    beats["cls"] = np.where(beats["group"] == "J", escape, beats["group"])
    beats["test"] = np.isin(beats["record"], MITDB_DS2)
    beats["number"], counts = resample(beats["record"][beats["test"]], seed)
    return beats | dict(counts=np.concatenate((np.ones_like(counts[:1]), counts)))


# ---- probe ----------------------------------------------------------------------------------------------------------
def fit(x, y, x_new):
    """Probabilities (G, K', C) of a balanced multinomial logistic regression at every C of the grid; a class that y
    lacks gets 0. A beat without any token counts as the mean beat."""
    x, x_new = standardized(x, x_new)
    model = LogisticRegression(class_weight="balanced", warm_start=True, max_iter=500, tol=1e-3)
    p = np.zeros((len(C_GRID), len(x_new), len(CLASSES)))
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # of the weakest penalty
        for g, c in enumerate(C_GRID):
            model.set_params(C=c).fit(x, y)
            p[g][:, [CLASSES.index(k) for k in model.classes_]] = model.predict_proba(x_new)
    return p


def probe(x, cls, record, x_new):
    """Probabilities of x_new (K', C), of x (K, C) by fits on other records, and C, best in macro N, S, V of these."""
    held_out = np.zeros((len(C_GRID), len(cls), len(CLASSES)))
    for inner, outer in GroupKFold(min(FOLDS, len(set(record)))).split(cls, groups=record):
        held_out[:, outer] = fit(x[inner], cls[inner], x[outer])
    best = int(np.nanargmax([macro(plain_auroc(one_hot(cls), p)[None, NSV]) for p in held_out]))
    return fit(x, cls, x_new)[best], held_out[best], C_GRID[best]


def calibrate(held_out, y, weight, p):
    """Probabilities that mean what they say. The balanced fit counts every class the same, and says "V" far too often:
    classes get back their frequencies in DS1, by weight (K,). A fit on few people is too sure of others: the sharpness
    (1 / temperature) has the least log loss in held_out (K, C), of classes y (K, C). Returns held_out and p (K', C) so,
    p with the frequencies alone, the sharpness, and the beats of each class in DS1 (C,)."""
    prior = weight @ y
    def mended(p, log_sharpness=0.0):
        p = p ** np.exp(log_sharpness) * prior
        return p / p.sum(axis=1, keepdims=True)
    best = minimize_scalar(lambda s: -weight @ np.log(mended(held_out, s)[y].clip(np.finfo(float).tiny)),
                           bounds=(-4, 2), method="bounded").x
    return mended(held_out, best), mended(p, best), mended(p), np.exp(best), prior


def detection(held_out, y_train, weight, p, y, number, counts):
    """Sensitivity, positive predictivity and F1 {name: (S,)} of p (K',) on y (K',) bool, from the threshold on that has
    the best F1 in held_out (K,); and the threshold."""
    precision, recall, thresholds = precision_recall_curve(y_train, held_out, sample_weight=weight)
    at = thresholds[np.argmax((precision * recall / (precision + recall).clip(1e-12))[:-1])]
    hit, said, true = (counts @ np.bincount(number, of, counts.shape[1]) for of in ((p >= at) & y, p >= at, y))
    return {name: np.divide(a, b, out=np.full(len(a), np.nan), where=b > 0) for name, a, b in (
        ("sensitivity", hit, true), ("positive_predictivity", hit, said), ("f1", 2 * hit, said + true))}, at


def one_hot(cls):
    """(K, C) bool: the class of each beat."""
    return cls[:, None] == np.array(CLASSES)


def within_records(y, p, number, counts):
    """AUROC within a record, averaged over the records that have MIN_BEATS of the class and of others: (S, C), in every
    resample of records; arguments as in evaluate.label_auroc."""
    auroc = np.full((counts.shape[1], y.shape[1]), np.nan)
    for record in range(len(auroc)):
        rows = number == record
        enough = np.minimum(y[rows].sum(axis=0), (~y[rows]).sum(axis=0)) >= MIN_BEATS
        auroc[record, enough] = plain_auroc(y[rows][:, enough], p[rows][:, enough])
    scored, weights = np.isfinite(auroc), counts.astype(np.float64)
    total, n = weights @ np.where(scored, auroc, 0), weights @ scored
    return np.divide(total, n, out=np.full(n.shape, np.nan), where=n > 0)


def rr_correlation(x, rr, train, test, number, counts):
    """Correlation (S, 2) within records of DS2 of a ridge regression on DS1 with the logarithms of RR before the beat
    and of its ratio to the mean before; rr (K, 8) of rr_features. The mean of each record is subtracted, so that to
    know its heart rate is no gain."""
    target = np.log(np.stack((rr[:, 0].clip(*RR_S), rr[:, 3].clip(*RR_RATIO)), axis=1))
    x_train, x_test = standardized(x[train], x[test])
    told = np.stack([RidgeCV(RIDGE_GRID).fit(x_train, t).predict(x_test) for t in target[train].T], axis=1)
    n, found = np.bincount(number, minlength=counts.shape[1]).clip(1), []
    for a, b in zip(told.T, target[test].T):
        a, b = (v - (np.bincount(number, v, len(n)) / n)[number] for v in (a, b))
        aa, bb, ab = (counts @ np.bincount(number, v, len(n)) for v in (a * a, b * b, a * b))          # (S,) each
        found.append(ab / np.sqrt(aa * bb))
    return np.stack(found, axis=1)


def score(x, beats, few=None, noisy=None):
    """The probe of features x (K, F) on the beats of select: JSON entry; probabilities of DS2, balanced and calibrated
    (2, K', C); scores {name: (S,)}. noisy (K'', H, F): features of the `few` (K',) bool beats of DS2 under noise."""
    test, cls, record, number, counts = (beats[key] for key in ("test", "cls", "record", "number", "counts"))
    train, y_train, y, weight = ~test, one_hot(cls[~test]), one_hot(cls[test]), beats["weight"][~test]
    x_new = x[test] if noisy is None else np.concatenate((x[test], *noisy.swapaxes(0, 1)))
    p, held_out, c = probe(x[train], cls[train], record[train], x_new)
    p, p_noisy = np.split(p, [len(y)])
    held_out, after, before, sharpness, prior = calibrate(held_out, y_train, weight, p)
    auroc, within = label_auroc(y, p, number, counts), within_records(y, p, number, counts)
    no_213, no_232 = (plain_auroc(y[rows], p[rows]) for rows in (record[test] != name for name in DOMINANT))
    neither, found = counts * ~np.isin(np.unique(record[test]), DOMINANT), {}
    rr_r, early_r = rr_correlation(x, beats["rr"], train, test, number, counts).T
    scores = dict(within_nsv=macro(within[:, NSV]), macro_nsv=macro(auroc[:, NSV]), rr_r=rr_r, early_r=early_r,
                  within_neither=macro(within_records(y, p, number, neither)[:, NSV]),
                  macro_neither=macro(label_auroc(y, p, number, neither)[:, NSV]))
    for k, name in ((1, "S"), (2, "V")):
        each, at = detection(held_out[:, k], y_train[:, k], weight, after[:, k], y[:, k], number, counts)
        found[name] = dict(threshold=at, **{key: of[0] for key, of in each.items()})
        scores |= {f"{key}_{name.lower()}": of for key, of in each.items()}
    if noisy is not None:
        clean, *levels = (macro(within_records(y[few], q, number[few], counts)[:, NSV])
                          for q in (p[few], *np.split(p_noisy, noisy.shape[1])))
        scores |= {"clean area": clean - 0.5}
        for kind, of in zip(NOISE_KINDS, np.split(np.array(levels), len(NOISE_KINDS))):
            scores |= {f"{kind} area": of.mean(axis=0) - 0.5} | {f"{kind} {db} dB": a for db, a in zip(NOISE_DB, of)}
    return dict(c=c, sharpness=sharpness, macro_nsvf=macro(auroc)[0], per_class=dict(zip(CLASSES, auroc[0])),
                within_per_class=dict(zip(CLASSES, within[0])), s_without_232=no_232[1], f_without_213=no_213[3],
                detection=found, prior=dict(zip(CLASSES, prior)), selective=selective(after, y, y[:, 1:3].any(axis=1)),
                calibration=calibration(after, y, prior / prior.sum(), number),
                calibration_before=calibration(before, y, prior / prior.sum(), number)), np.stack((p, after)), scores


def with_intervals(runs, records):
    """JSON entry of runs of score(), of encoders with other seeds: means, intervals; and scores {name: (E, S)}."""
    entry, scores = mean_of([run[0] for run in runs]), {k: np.stack([run[2][k] for run in runs]) for k in runs[0][2]}
    for key, of in scores.items():
        entry |= {key: of[:, 0].mean(), f"{key}_ci95": interval_of_seeds(of, records)}
    return entry | dict(c=[run[0]["c"] for run in runs], each={key: of[:, 0].tolist() for key, of in scores.items()},
                        within_ci95=entry["within_nsv_ci95"], ci95=entry["macro_nsv_ci95"]), scores


def gains(scores, lower, records):
    """JSON entry of the paired differences of two sets of scores {name: (E, S)}."""
    return {key: dict(difference=of[:, 0].mean(), ci95=interval_of_seeds(of, records),
                      each=[dict(difference=one[0], ci95=interval(one[1:])) for one in of])
            for key, of in ((key, scores[key] - lower[key]) for key in scores)}


def compare(x, beats, control_of, few=None, noisy=None):
    """Features x, a (K, F) of each network, next to the untrained controls: JSON entry, arrays for predictions.npz, and
    scores {name: (E, S)}. noisy: a (K'', H, F) of each network, or None; see score."""
    runs, records = [score(of, beats, few, noisy and noisy[e]) for e, of in enumerate(x)], beats["counts"].shape[1]
    ours, controls = runs[:len(control_of)], [runs[k] for k in control_of]
    (entry, scores), (control, lower) = with_intervals(ours, records), with_intervals(controls, records)
    differences, gained = gains(scores, lower, records), (scores["macro_nsv"] - lower["macro_nsv"]).mean(axis=0)
    entry |= dict(untrained=control["macro_nsv"], untrained_scores=control, differences=differences,
                  difference=gained[0], difference_ci95=differences["macro_nsv"]["ci95"])
    p, p_calibrated = (of[0] if len(of) == 1 else of for of in np.stack([run[1] for run in ours], axis=1))
    return entry, dict(p=p, p_calibrated=p_calibrated, p_untrained=controls[0][1][0], difference=gained), scores


# ---- report and picture ---------------------------------------------------------------------------------------------
def report(result):
    """The protocol and the scores, as text."""
    n, compared = result["n"], {} if result["untrained_only"] else result["features"] | result["sides"]
    full = result["features"] | {f"{name}, e and j are S": r for name, r in result["bxb"].items()}
    rows = {**full, **{f"{name}, untrained": r["untrained_scores"] for name, r in full.items()}, **result["controls"]}
    macros, areas = {"within": "within_nsv", "pooled": "macro_nsv"}, {k: f"{k} area" for k in ("clean", *NOISE_KINDS)}
    rr, f1 = {"rr r": "rr_r", "early r": "early_r"}, {f"F1 of {k}": f"f1_{k.lower()}" for k in "SV"}
    tables = {
        "macro AUROC of N, S, V within records and pooled, of each class pooled": (rows, macros | {
            f"within {k}": f"within_per_class.{k}" for k in "SVN"} | {k: f"per_class.{k}" for k in CLASSES} | rr),
        f"without {' and '.join(DOMINANT)}; S and V at the threshold of the best F1 in DS1": (rows, {
            "within": "within_neither", "pooled": "macro_neither", "S, no 232": "s_without_232", "F, no 213":
            "f_without_213"} | {f"{short} {k}": f"detection.{k}.{key}" for k in "SV" for short, key in (
                ("Se", "sensitivity"), ("+P", "positive_predictivity"))} | f1),
        f"{CALIBRATION_NOTE}; with the class frequencies of DS1 (first), then a temperature too": (rows, {
            "first": "calibration_before.brier_skill", **{key: f"calibration.{path}" for key, path in zip(
                ("Brier skill", "NLL skill", "ECE", "of a perfect model", "z"),
                ("brier_skill", "nll_skill", "ece", "ece_perfect", "z"))}}),
        f"AUROC within records - .5, mean over levels of noise; {FEW_BEATS} beats of a class and record": (rows, areas),
        f"other windows and leads; {FEW_BEATS} beats of a class and record": (
            result["sides"], macros | {"lost within": "lost.within_nsv.difference"}),
        "paired difference to the untrained control": (compared, {
            key: f"differences.{path}.difference" for key, path in (macros | f1 | rr | areas).items()})}
    thinned = f"at most {result['beats']} of a class" if result["beats"] else f"N thinned to {MAX_N_TRAIN}"
    absent = f", none of {', '.join(n['absent'])}" if n["absent"] else ""
    return "\n".join((
        f"MIT-BIH, DS1 ({n['train_records']} records, {n['train']} beats, {thinned} a record) to DS2 "
        f"({n['test_records']} records, {n['test']} beats{absent})",
        f"encoders: {' '.join(result['encoder'])}; " + ("means; [95 %] over seeds and records" if len(
            result["encoder"]) > 1 else "one seed: [95 %] are over records alone"),
        "classes by symbol: " + "; ".join(f"{name}: {' '.join(symbols)}" for name, symbols in result["mapping"].items())
        + f"; Q is neither trained nor scored; C, temperature and thresholds by {FOLDS} folds of DS1 records",
        *(f"beats with e and j as {k}: " + "; ".join(
            f"{part} " + " ".join(f"{cls} {n:,.0f}" for cls, n in counts.items()) for part, counts in of.items())
          for k, of in zip("NS", result["mappings"].values())),
        *(f"{title}\n{table(*of)}" for title, of in tables.items() if table(*of))))


def draw(result):
    """Figure: AUROC, pre-trained next to all controls; errors of the surest beats; AUROC under the mixture of noise."""
    best, noise = result["features"]["neighbourhood"], list(map(str, result["snr_db"]))
    series = {"RR intervals alone": result["controls"]["rr"], "raw waveform": result["controls"]["raw"],
              "untrained": best["untrained_scores"]} | ({} if result["untrained_only"] else {"pre-trained": best})
    figure = Figure(figsize=(19 if noise else 14, 4.6), layout="constrained")
    bars, errors, *more = figure.subplots(1, 3 if noise else 2, width_ratios=(2.4, 1, 1)[:3 if noise else 2])
    draw_bars(bars, ["within\nN, S, V", "pooled\nN, S, V", *CLASSES], {name: (
        [r["within_nsv"], r["macro_nsv"], *r["per_class"].values()],
        [r["within_ci95"], r["ci95"]] + [[None, None]] * len(CLASSES)) for name, r in series.items()})
    bars.set_ylabel("AUROC on DS2, one against the rest")
    bars.set_title(f"Heartbeats of MIT-BIH, {result['n']['test_records']} test records; R token and its neighbourhood; "
                   f"lines: 95 % over {'seeds and ' * (len(result['encoder']) > 1)}records", loc="left", fontsize=10)
    bars.legend(frameon=False, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for name, r in series.items():
        errors.plot(r["selective"]["coverage"], 1 - np.array(r["selective"]["accuracy"]), "o-", color=COLORS[name])
    errors.set(xlabel="share of the beats that get an answer, the surest first", ylabel="share of wrong answers")
    for axis, (name, r) in ((axis, of) for axis in more for of in list(series.items())[2:]):
        keys = [f"mixture {db} dB" for db in noise]
        ci = np.array([r[f"{key}_ci95"] for key in keys], dtype=float)               # None becomes NaN
        axis.fill_between(noise, *ci.T, color=COLORS[name], alpha=0.3, linewidth=0)
        axis.plot(noise, [r[key] for key in keys], "o-", color=COLORS[name])
        axis.set(xlabel="mixture of noise, signal-to-noise ratio (dB)", ylabel="macro AUROC within records")
    return figure


def examples(encoder, raw, data, beats, c, p):
    """Confident classes of beats in DS2, by evaluate.draw_examples; p (K', C) of the neighbourhood's probe."""
    test, cls, P = beats["test"], beats["cls"], encoder.patch_samples

    def show_row(row):
        record, beat_s = data["record"][test][row], data["beat_s"][test][[row]]
        signal_mv, ids = preprocess(*read_wfdb(raw / record)[:4], {})
        (start,), N = place_windows(encoder, *signal_mv.shape, beat_s)
        from_r = (start + (np.arange(N) + 0.5) * P - np.rint(beat_s * FS)) / FS
        window = Recording(signal_mv[:, start:start + N * P], FS, [LEADS[i] for i in ids])
        return f"record {record}, {beat_s[0]:.1f} s", window, (from_r >= AROUND_S[0]) & (from_r <= AROUND_S[1])
    x = data[0][~test]
    return draw_examples(encoder, x, lambda rows: np.log(fit(x, cls[~test], rows)[C_GRID.index(c)]), CLASSES, p,
                         one_hot(cls[test]), data["record"][test], show_row)


# ---- command line ---------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = parser_of("Linear probes of heartbeats of MIT-BIH, for an encoder and its untrained control.", "raw/mitdb")
    parser.add_argument("--beats", type=int, metavar="N", help="for a quick look: at most so many beats of a class of "
                        f"each record, one window, all leads (default: all beats; of normal ones in DS1 {MAX_N_TRAIN})")
    parser.add_argument("--noise", type=Path, help="prepared noise, such as data/nstdb: also score DS2 under it")
    return parser.parse_args(argv)


def main(args):
    encoders, control_of = load_encoders(args.encoder, args.device, args.precision)
    noise, E = load_noise(open_corpus(args.noise), "test") if args.noise else None, range(len(encoders))
    data = collect(args.raw, encoders, args.beats, noise, args.seed)
    papers, bxb = (select(data, slice(None), args.seed, escape) for escape in "NS")
    few = select(data | dict(weight=np.ones(len(data["few"]))), data["few"], args.seed)   # DS1 and DS2 thinned alike
    test, records = papers["test"], papers["counts"].shape[1]
    stored = {key: data[key][test] for key in ("record", "beat_s", "group")} | dict(cls=papers["cls"][test])
    found = dict(features={}, controls={}, sides={})
    for name in ("rr", "raw"):
        run = score(data[name], papers)
        found["controls"][name], stored[f"p_{name}"] = with_intervals([run], records)[0], run[1][0]
    for name, width in dict(r_token=encoders[0].width, neighbourhood=None).items():
        x = [data[e][:, :width] for e in E]
        noisy = None if noise is None else [data["noise", e][..., :width] for e in E]
        found["features"][name], arrays, _ = compare(x, papers, control_of, data["few"][test], noisy)
        stored |= {f"{key}_{name}": value for key, value in arrays.items()}
        if not args.beats:                       # a quick look has no more than that
            found["sides"][f"{name}, few"], _, whole = compare([of[data["few"]] for of in x], few, control_of)
            for side in SIDES:
                entry, _, scores = compare([data[side, e][:, :width] for e in E], few, control_of)
                found["sides"][f"{name}, {side}"] = entry | dict(lost=gains(whole, scores, records))
    found["bxb"] = {} if args.beats else {name: compare(x, bxb, control_of)[0]}
    counted = {name: {part: dict(zip(CLASSES, of["weight"][rows] @ one_hot(of["cls"][rows]))) for part, rows in (
        ("DS1", ~test), ("DS2", test))} for name, of in dict(papers=papers, bxb=bxb).items()}
    beats = counted["papers"]["DS2"]
    n = dict(train=(~test).sum(), test=test.sum(), train_records=len(set(data["record"][~test])), test_records=records,
             train_beats=dict(zip(CLASSES, one_hot(papers["cls"][~test]).sum(axis=0))), test_beats=beats,
             few=data["few"].sum(), absent=[name for name in beats if not beats[name]])
    mapping = {name: of + SYMBOLS["J"] * (name == "N") for name, of in SYMBOLS.items() if name != "J"}
    result = to_json(dict(encoder=args.encoder, raw=str(args.raw), seed=args.seed,
                          untrained_only=len(encoders) == len(args.encoder), beats=args.beats or 0, n=n,
                          mapping=mapping, mappings=counted, snr_db=NOISE_DB if args.noise else [], **found))
    text = report(result)
    print(text)
    p = stored["p_calibrated_neighbourhood"]
    shown = examples(encoders[0], args.raw, data, papers, result["features"]["neighbourhood"]["c"][0],
                     p if p.ndim == 2 else p[0])
    write_results(args, "mitbih", result, stored, draw(result), text, encoders,
                  (read_wfdb(args.raw / record) for record in sorted(set(stored["record"]))), shown)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"probe_mitbih.py: {error}")
