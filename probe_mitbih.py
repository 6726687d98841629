"""What a frozen encoder knows about single heartbeats: a linear probe on MIT-BIH, next to the same network untrained.

    python probe_mitbih.py --encoder runs/real/encoder.pt --raw raw/mitdb --out runs/real/mitbih [--noise data/nstdb]

The protocol is the inter-patient one (de Chazal et al. 2004): the beats of DS1 train, those of DS2 are scored; paced
records and AAMI class Q (7 beats) are left out. Of the normal beats MAX_N of a record are shown, and count for all.
A beat lies in the middle of a window, as long as in training but at most BEAT_WINDOW_S. Its features are the token of
its R, mean over leads, alone (r_token) or with the mean of the tokens from -300 to +400 ms (neighbourhood). Scores are
macros over N, S, V: `within` is the mean over records of the AUROC within a record, what a reader of one record needs;
`pooled`, over all beats, is decided by a few records. Two controls need no encoder: eight RR features (rr), and 0.75 s
of lead II (raw). `rr r` and `early r` are the correlations within records of the log RR interval before the beat, and
of its ratio to the mean of the ten before, which tells S from N, with linear fits on DS1. Other windows, leads and
noise are scored on FEW_BEATS. Writes report.html, mitbih.json, predictions.npz (beats of DS2) and mitbih.png in OUT.

Shapes: L leads, D width, K beats, F features, C classes, E encoders, H noises, S resamples (first: DS2).
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import wfdb
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.linear_model import RidgeCV
from sklearn.metrics import precision_recall_curve
from sklearn.model_selection import GroupKFold
from tqdm import tqdm

from augment import add_test_noise, load_noise
from corpus import open_corpus
from ecg import FS, LEAD_IDS, LEADS, Recording, Refused, preprocess, read_wfdb
from evaluate import (CALIBRATION_NOTE, COLORS, NOISE_DB, NOISE_KINDS, both_classes, calibration, draw_bars,
                      draw_examples, fit_logistic, interval, interval_of_seeds, label_auroc, load_encoders, macro,
                      mean_of, parser_of, resample, resampled_auroc, selective, standardized, table, to_json,
                      write_results)
from model import AROUND_S, BEAT_WINDOW_S, place_windows, token_features
from prepare import MITDB_DS1, MITDB_DS2

# Of the AAMI EC57 classes. J, the escape beats (32 of DS1, 213 of DS2), are N in most papers, and S for WFDB's bxb.
SYMBOLS = {"N": "NLR", "J": "ej", "S": "AaJS", "V": "VE", "F": "F", "Q": "/fQ"}
CLASSES, NSV = ("N", "S", "V", "F"), slice(3)  # trained and scored; in the macros
NOISE_LEVELS = [(kind, db) for kind in NOISE_KINDS for db in NOISE_DB]
SIDES = {"1 s": (1.0, False), "lead II": (BEAT_WINDOW_S, True)}  # window; whether lead II (or the first) is alone
RAW_S = (-0.3, 0.45)             # s from R: the waveform of the raw control
MAX_N = 200                      # N beats of a record that are used, evenly spread; all beats of other classes are
FEW_BEATS = 60                   # of a class and record, for what costs another forward pass
LOGIT_VARIANCE = 10              # scikit-learn's C times the number of features; chosen on DS1, see LOG.md
FOLDS = 5                        # of DS1 records, to choose the temperature and the thresholds
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
    return np.stack((before, after, local, before / local, after / local, before / after, before / usual,
                     after / usual), axis=1)


def raw_features(signal_mv, lead_ids, beats_s):
    """0.75 s of lead II (or of the first lead) around R at FS, minus its mean: (K, 187) mV."""
    wave = np.nan_to_num(signal_mv[np.argmax(lead_ids == LEAD_IDS["II"])])
    at = np.rint(beats_s * FS).astype(int)[:, None] + np.arange(*(int(s * FS) for s in RAW_S))
    window = wave[at.clip(0, len(wave) - 1)]
    return window - window.mean(axis=1, keepdims=True)


def collect(raw, encoders, most=None, normals=MAX_N, noise=None, seed=0):
    """The used_beats of DS1 and DS2 in `raw`: record, beat_s, group, weight, rr, raw and, by kind and number of the
    encoder, neighbourhood (K, 2D): of "all", of the `few` also with a side, of `noisy` ones in DS2 under "noise" (K, H,
    2D). ValueError if a set is absent, or if a file cannot be read."""
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
        weight, rr = used_beats(group, most, normals), rr_features(times_s)
        times_s, group, rr, weight = (x[weight > 0] for x in (times_s, group, rr, weight))
        few = used_beats(group, FEW_BEATS) > 0
        noisy = few & (noise is not None and name in MITDB_DS2 and enough(one_hot(group[few]))[NSV].any())
        part = dict(record=np.full(len(times_s), name), beat_s=times_s, group=group, weight=weight, few=few,
                    noisy=noisy, rr=rr, raw=raw_features(signal_mv, lead_ids, times_s))
        for e, encoder in enumerate(encoders if len(times_s) else ()):
            part["all", e] = token_features(encoder, signal_mv, lead_ids, times_s)
            part["few", e] = part["all", e][few]
            for side, (window_s, alone) in ({} if most else SIDES).items():
                leads = [np.argmax(lead_ids == LEAD_IDS["II"])] if alone else slice(None)
                part[side, e] = token_features(encoder, signal_mv[leads], lead_ids[leads], times_s[few], window_s)
            if noisy.any():
                part["noise", e] = np.stack([token_features(
                    encoder, signal_mv, lead_ids, times_s[noisy], change=partial(add_test_noise, noise=noise, kind=kind,
                    snr_db=db, seed=[seed, int(name)])) for kind, db in NOISE_LEVELS], axis=1)
        parts.append(part)
    return {key: np.concatenate([part[key] for part in parts if key in part]) for key in set().union(*parts)}


def used_beats(group, most=None, normals=MAX_N):
    """How many beats each beat of a record stands for (K,), 0 if it is not used. Used are all but Q, and of N at most
    `normals`, which stand for all; or at most `most` of every group; evenly spread."""
    weight = np.zeros(len(group), int)
    for of in set(SYMBOLS) - {"Q"}:
        found = np.flatnonzero(group == of)
        counted = np.arange(min(len(found), most or len(found)))
        n = min(len(counted), normals) if of == "N" else len(counted)
        kept = found[np.linspace(0, len(found) - 1, n).astype(int)]
        weight[kept] = np.bincount(counted * n // max(len(counted), 1), minlength=n)
    return weight


def one_hot(cls):                                # (K, C) bool: the class of each beat
    return cls[:, None] == np.array(CLASSES)


def enough(y):                                   # which classes of y (K, C) bool can be scored within a record
    return np.minimum(y.sum(axis=0), (~y).sum(axis=0)) >= MIN_BEATS


def select(data, rows, seed, escape="N"):
    """The beats `rows` of data as the scores need them: classes (of J: escape); `train`, the places of those of DS1,
    and `test`, of DS2, each as often as it counts; resamples of DS2's records, the first of which is DS2 itself."""
    beats, group = {key: data[key][rows] for key in ("record", "weight", "rr")}, data["group"][rows]
    beats["cls"] = np.where(group == "J", escape, group)
    in_test = np.isin(beats["record"], MITDB_DS2)
    beats["train"], test = np.flatnonzero(~in_test), np.repeat(np.flatnonzero(in_test), beats["weight"][in_test])
    number, counts = resample(beats["record"][test], seed)
    return beats | dict(test=test, number=number, counts=np.concatenate((np.ones_like(counts[:1]), counts)))


# ---- probe ----------------------------------------------------------------------------------------------------------
def fit(x, y, x_new):
    """Probabilities (K', C) of x_new, logistic regressions of each class of y (K, C) against the rest, made to add up
    to 1; see evaluate.standardized for beats without any token."""
    x, x_new = standardized(x, x_new)
    p, fitted = np.tile(y.mean(axis=0), (len(x_new), 1)), both_classes(y)
    weights = fit_logistic(x, y[:, fitted], [LOGIT_VARIANCE / x.shape[1]])[0]
    p[:, fitted] = expit(x_new @ weights[:-1] + weights[-1])
    return p / p.sum(axis=1, keepdims=True)


def calibrate(held_out, y, weight, p):
    """Probabilities that mean what they say: with the frequencies of the classes in DS1, by weight (K,), and the
    sharpness (1 / temperature) of the least log loss in held_out (K, C) of classes y (K, C). Returns held_out and p
    (K', C) so, p with the frequencies alone, the sharpness, and the beats of each class in DS1 (C,)."""
    prior = weight @ y
    def mended(p, log_sharpness=0.0):
        p = (p / y.sum(axis=0).clip(1)) ** np.exp(log_sharpness) * prior               # flat: the frequencies
        return p / p.sum(axis=1, keepdims=True)
    best = minimize_scalar(lambda s: -weight @ np.log(mended(held_out, s)[y].clip(np.finfo(float).tiny)),
                           bounds=(-4, 2), method="bounded").x
    return mended(held_out, best), mended(p, best), mended(p), np.exp(best), prior


def detection(held_out, y_train, weight, p, y, number, counts):
    """Sensitivity, positive predictivity and F1 {name: (S,)} of p (K',) on y (K',) bool, from the threshold on that
    has the best F1 in held_out (K,), and this threshold."""
    precision, recall, thresholds = precision_recall_curve(y_train, held_out, sample_weight=weight)
    at = thresholds[np.argmax((precision * recall / (precision + recall).clip(1e-12))[:-1])]
    hit, said, true = (counts @ np.bincount(number, of, counts.shape[1]) for of in ((p >= at) & y, p >= at, y))
    with np.errstate(invalid="ignore"):          # 0 / 0 is NaN
        return dict(threshold=np.full(len(hit), at), sensitivity=hit / true, positive_predictivity=hit / said,
                    f1=2 * hit / (said + true))


def within_records(y, p, number, counts):
    """AUROC within a record, averaged over the records that have MIN_BEATS of the class and of others: (S, C), in every
    resample of records; arguments as in evaluate.label_auroc."""
    scored = np.array([enough(y[number == record]) for record in range(counts.shape[1])])
    auroc = np.where(scored, label_auroc(y, p, number, np.eye(len(scored))), 0)      # (records, C) of each record alone
    return counts @ auroc / np.where(n := counts @ scored, n, np.nan)


def rr_correlation(x, rr, train, test, number, counts):
    """Correlation (S, 2) within records of DS2, where a heart rate is no gain, of a ridge regression on DS1 with the
    logarithms of RR before the beat and of its ratio to the mean before; rr (K, 8) of rr_features."""
    target = np.log(np.stack((rr[:, 0].clip(*RR_S), rr[:, 3].clip(*RR_RATIO)), axis=1))
    x_train, x_test = standardized(x[train], x[test])
    told = RidgeCV(RIDGE_GRID, alpha_per_target=True).fit(x_train, target[train]).predict(x_test)
    a, b = (v - pd.DataFrame(v).groupby(number).transform("mean").to_numpy() for v in (told, target[test]))
    aa, bb, ab = (counts @ pd.DataFrame(v).groupby(number).sum().to_numpy() for v in (a * a, b * b, a * b))    # (S, 2)
    return ab / np.sqrt(aa * bb).clip(1e-12)     # of equal predictions: 0


def score(x, beats, few=None, noisy=None):
    """The probe of features x (K, F) on the beats of select: JSON entry; probabilities of DS2, as fitted and calibrated
    (2, K', C); scores {name: (S,)}. noisy (K'', H, F): features of the beats `few` (K'',) of DS2 under noise."""
    train, test, number, counts = (beats[key] for key in ("train", "test", "number", "counts"))
    record, weight, names = beats["record"], beats["weight"][train], np.unique(beats["record"][test])
    y_train, y = (one_hot(beats["cls"][rows]) for rows in (train, test))
    x_new = x[test] if noisy is None else np.concatenate((x[test], *noisy.swapaxes(0, 1)))
    p, p_noisy = np.split(fit(x[train], y_train, x_new), [len(y)])
    held_out = np.zeros(y_train.shape)           # by fits on other records
    for inner, outer in GroupKFold(min(FOLDS, len(set(record[train])))).split(train, groups=record[train]):
        held_out[outer] = fit(x[train[inner]], y_train[inner], x[train[outer]])
    held_out, after, before, sharpness, prior = calibrate(held_out, y_train, weight, p)
    neither, no_213, no_232 = (counts * ~np.isin(names, of) for of in (DOMINANT, *DOMINANT))
    auroc, within = label_auroc(y, p, number, counts), within_records(y, p, number, counts)
    scores = {name: macro(of[:, NSV]) for name, of in dict(
        within_nsv=within, macro_nsv=auroc, within_neither=within_records(y, p, number, neither),
        macro_neither=label_auroc(y, p, number, neither)).items()}
    scores |= dict(s_without_232=resampled_auroc(y[:, 1], p[:, 1], number, no_232),
                   f_without_213=resampled_auroc(y[:, 3], p[:, 3], number, no_213))
    scores |= zip(("rr_r", "early_r"), rr_correlation(x, beats["rr"], train, test, number, counts).T)
    for k, name in enumerate("sv", 1):
        found = detection(held_out[:, k], y_train[:, k], weight, after[:, k], y[:, k], number, counts)
        scores |= {f"{key}_{name}": of for key, of in found.items()}
    if noisy is not None:
        clean, *levels = (macro(within_records(y[few], q, number[few], counts)[:, NSV])
                          for q in (p[few], *np.split(p_noisy, len(NOISE_LEVELS))))
        scores |= {"clean area": clean - 0.5} | {f"{kind} {db} dB": of for (kind, db), of in zip(NOISE_LEVELS, levels)}
        scores |= {f"{k} area": np.mean([scores[f"{k} {db} dB"] for db in NOISE_DB], axis=0) - 0.5 for k in NOISE_KINDS}
    entry = {key: calibration(q, y, prior / prior.sum(), number)
             for key, q in dict(calibration=after, calibration_before=before).items()}
    entry |= {key: dict(zip(CLASSES, of)) for key, of in dict(
        per_class=auroc[0], within_per_class=within[0], prior=prior).items()}
    entry |= dict(c=LOGIT_VARIANCE / x.shape[1], sharpness=sharpness, macro_nsvf=macro(auroc)[0],
                  selective=selective(after, y, y[:, 1:3].any(axis=1)))
    return entry, np.stack((p, after)), scores


def with_intervals(runs, records):
    """JSON entry of runs of score(), of encoders with other seeds: means, intervals; and scores {name: (E, S)}."""
    entry, scores = mean_of([run[0] for run in runs]), {k: np.stack([run[2][k] for run in runs]) for k in runs[0][2]}
    for key, of in scores.items():
        entry |= {key: of[:, 0].mean(), f"{key}_ci95": interval_of_seeds(of, records, key.endswith(("area", "_r")))}
    return entry | dict(each={key: of[:, 0].tolist() for key, of in scores.items()},
                        within_ci95=entry["within_nsv_ci95"], ci95=entry["macro_nsv_ci95"]), scores


def gains(scores, lower, records):
    """JSON entry of the paired differences of two sets of scores {name: (E, S)}."""
    return {key: dict(difference=of[:, 0].mean(), ci95=interval_of_seeds(of, records),
                      each=[dict(difference=one[0], ci95=interval(one[1:])) for one in of])
            for key, of in ((key, scores[key] - lower[key]) for key in scores)}


def compare(x, beats, control_of, few=None, noisy=None):
    """Features x, a (K, F) of each network, and noisy, see score, next to the untrained controls: JSON entry, arrays
    for predictions.npz, and scores {name: (E, S)}."""
    runs, records = [score(of, beats, few, noisy and noisy[e]) for e, of in enumerate(x)], beats["counts"].shape[1]
    ours, controls = runs[:len(control_of)], [runs[k] for k in control_of]
    (entry, scores), (control, lower) = (with_intervals(of, records) for of in (ours, controls))
    entry |= dict(untrained=control["macro_nsv"], untrained_scores=control, differences=gains(scores, lower, records))
    gained = entry["differences"]["macro_nsv"]
    p, p_calibrated = (of[0] if len(of) == 1 else of for of in np.stack([run[1] for run in ours], axis=1))
    return entry | dict(difference=gained["difference"], difference_ci95=gained["ci95"]), dict(
        p=p, p_calibrated=p_calibrated, p_untrained=controls[0][1][0],
        difference=(scores["macro_nsv"] - lower["macro_nsv"]).mean(axis=0)), scores


# ---- report and picture ---------------------------------------------------------------------------------------------
def report(result):
    """The protocol and the scores, as text."""
    n, compared = result["n"], {} if result["untrained_only"] else result["features"] | result["sides"]
    full = result["features"] | {f"{name}, e and j are S": r for name, r in result["bxb"].items()}
    rows = {**full, **{f"{name}, untrained": r["untrained_scores"] for name, r in full.items()}, **result["controls"]}
    macros, areas = {"within": "within_nsv", "pooled": "macro_nsv"}, {k: f"{k} area" for k in ("clean", *NOISE_KINDS)}
    rr, f1 = {"rr r": "rr_r", "early r": "early_r"}, {"F1 of S": "f1_s", "F1 of V": "f1_v"}
    tables = {
        "macro AUROC of N, S, V within records and pooled, of each class pooled": (rows, macros | {
            f"within {k}": f"within_per_class.{k}" for k in "SVN"} | {k: f"per_class.{k}" for k in CLASSES} | rr),
        f"without {' and '.join(DOMINANT)}; S and V at the threshold of the best F1 in DS1": (rows, {
            "within": "within_neither", "pooled": "macro_neither", "S, no 232": "s_without_232",
            "F, no 213": "f_without_213", "Se S": "sensitivity_s", "+P S": "positive_predictivity_s",
            "Se V": "sensitivity_v", "+P V": "positive_predictivity_v"} | f1),
        f"{CALIBRATION_NOTE}; with the class frequencies of DS1 (first), then a temperature too": (rows, {
            "first": "calibration_before.brier_skill"} | {key.replace("_", " "): f"calibration.{key}" for key in (
                "brier_skill", "nll_skill", "ece", "ece_perfect", "z")}),
        f"AUROC within records - .5, mean over levels of noise; {FEW_BEATS} beats of a class and record": (rows, areas),
        f"{FEW_BEATS} beats of a class and record": (
            result["sides"], macros | {"lost within": "lost.within_nsv.difference"}),
        "paired difference to the untrained control": (compared, {
            key: f"differences.{path}.difference" for key, path in (macros | f1 | rr | areas).items()})}
    over = "seeds and records" if len(result["encoder"]) > 1 else "records alone, as there is one seed"
    shown = f"at most {result['beats']} of a class" if result["beats"] else f"of N at most {result['normals']}"
    lines = [f"MIT-BIH, DS1 ({n['train_records']} records) to DS2 ({n['test_records']}); {shown} of a record are shown "
             f"({n['train']} and {n['test_shown']} beats)" + "".join(f"; none is {name}" for name in n["absent"]),
             f"encoders: {' '.join(result['encoder'])}; [95 %] over {over}; temperature and thresholds by {FOLDS} "
             f"folds of DS1 records; symbols: {' '.join(map('='.join, SYMBOLS.items()))}; Q is not used",
             table({f"{part}, e and j are {k}": of for k, parts in zip("NS", result["mappings"].values())
                    for part, of in parts.items()}, {name: name for name in CLASSES})]
    return "\n".join(lines + [f"{title}\n{text}" for title, of in tables.items() if (text := table(*of))])


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
    bars.set(ylabel="AUROC on DS2, one against the rest", title="neighbourhood; lines: 95 %")
    bars.legend(frameon=False, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for name, r in series.items():
        errors.plot(r["selective"]["coverage"], 1 - np.array(r["selective"]["accuracy"]), "o-", color=COLORS[name])
        if noise and "clean area" in r:
            score, ci = (np.array([r[f"mixture {db} dB{key}"] for db in noise], dtype=float) for key in ("", "_ci95"))
            more[0].fill_between(noise, *ci.T, color=COLORS[name], alpha=0.3, linewidth=0)   # None becomes NaN
            more[0].plot(noise, score, "o-", color=COLORS[name])
            more[0].set(xlabel="mixture of noise, signal-to-noise ratio (dB)", ylabel="macro AUROC within records")
    errors.set(xlabel="share of the beats that get an answer, the surest first", ylabel="share of wrong answers")
    return figure


def examples(encoder, raw, data, beats, p):
    """Confident classes of beats in DS2, by evaluate.draw_examples; p ([E,] K', C) of the neighbourhood's probe."""
    train, test, y, P = beats["train"], beats["test"], one_hot(beats["cls"]), encoder.patch_samples
    x = data["all", 0][train]
    def show_row(row):
        record, beat_s = data["record"][test[row]], data["beat_s"][test[[row]]]
        signal_mv, ids = preprocess(*read_wfdb(raw / record)[:4], {})
        (start,), N = place_windows(encoder, *signal_mv.shape, beat_s)
        from_r = (start + (np.arange(N) + 0.5) * P - np.rint(beat_s * FS)) / FS
        window = Recording(signal_mv[:, start:start + N * P], FS, [LEADS[i] for i in ids])
        return f"record {record}, {beat_s[0]:.1f} s", window, (from_r >= AROUND_S[0]) & (from_r <= AROUND_S[1])
    return draw_examples(encoder, x, lambda new: logit(fit(x, y[train], new)), CLASSES,
                         p.reshape(-1, *p.shape[-2:])[0], y[test], data["record"][test], show_row)


# ---- command line ---------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = parser_of("Linear probes of heartbeats of MIT-BIH, for an encoder and its untrained control.", "raw/mitdb")
    parser.add_argument("--beats", type=int, metavar="N", help="for a quick look: at most so many beats of a class of "
                        "each record, one window, all leads (default: all but N, see --normals)")
    parser.add_argument("--normals", type=int, metavar="N", default=MAX_N, help="so many normal beats of a record are "
                        "shown to the encoder, evenly spread, and count for all (default: %(default)s)")
    parser.add_argument("--noise", type=Path, help="prepared noise, such as data/nstdb: also score DS2 under it")
    return parser.parse_args(argv)


def main(args):
    if args.normals < 1 or args.beats is not None and args.beats < 1:
        raise ValueError(f"--beats {args.beats} and --normals {args.normals} must be at least 1")
    encoders, control_of = load_encoders(args.encoder, args.device, args.precision)
    noise = load_noise(open_corpus(args.noise), "test") if args.noise else None
    data = collect(args.raw, encoders, args.beats, args.normals, noise, args.seed)
    papers, bxb = (select(data, slice(None), args.seed, escape) for escape in "NS")
    few = select(data | dict(weight=np.ones_like(data["weight"])), data["few"], args.seed)
    train, test, records = papers["train"], papers["test"], papers["counts"].shape[1]
    first = np.flatnonzero(np.diff(test, prepend=-1))              # a beat is there as often as it counts
    stored = {key: data[key][test] for key in ("record", "beat_s", "group")} | dict(cls=papers["cls"][test])
    found = dict(features={}, controls={}, sides={}, bxb={})
    for name, run in ((name, score(data[name], papers)) for name in ("rr", "raw")):
        found["controls"][name], stored[f"p_{name}"] = with_intervals([run], records)[0], run[1][0]
    for name, width in dict(r_token=encoders[0].width, neighbourhood=None).items():
        def features(kind):
            return [data[kind, e][..., :width] for e in range(len(encoders))]
        noisy = (first[data["noisy"][test[first]]], features("noise")) if ("noise", 0) in data else ()
        found["features"][name], arrays, _ = compare(features("all"), papers, control_of, *noisy)
        stored |= {f"{key}_{name}": value for key, value in arrays.items()}
        if not args.beats:                       # a quick look has no more than that
            sides = {side: compare(features(side), few, control_of) for side in ("few", *SIDES)}
            for side, (entry, _, scores) in sides.items():
                found["sides"][f"{name}, {side}"] = entry | dict(lost=gains(sides["few"][2], scores, records))
    if not args.beats:
        found["bxb"]["neighbourhood"] = compare([data["all", e] for e in range(len(encoders))], bxb, control_of)[0]
    counted = {name: {part: dict(zip(CLASSES, of["weight"][rows] @ one_hot(of["cls"][rows]))) for part, rows in (
        ("DS1", train), ("DS2", test[first]))} for name, of in dict(papers=papers, bxb=bxb).items()}
    n = dict(train=len(train), test=len(test), train_records=len(set(data["record"][train])), test_records=records,
             test_shown=len(first), absent=[name for name, of in counted["papers"]["DS2"].items() if not of])
    result = to_json(dict(encoder=args.encoder, raw=str(args.raw), seed=args.seed, beats=args.beats or 0,
                          normals=args.normals, untrained_only=len(encoders) == len(args.encoder), n=n,
                          mapping=SYMBOLS, mappings=counted, snr_db=NOISE_DB if args.noise else [], **found))
    print(text := report(result))
    write_results(args, "mitbih", result, stored, draw(result), text, encoders,
                  (read_wfdb(args.raw / record) for record in sorted(set(stored["record"]))),
                  examples(encoders[0], args.raw, data, papers, stored["p_calibrated_neighbourhood"]))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"probe_mitbih.py: {error}")
