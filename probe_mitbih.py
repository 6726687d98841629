"""What a frozen encoder knows about single heartbeats: a linear probe on MIT-BIH, next to the same network untrained.

    python probe_mitbih.py --encoder runs/real/encoder.pt --raw raw/mitdb --out runs/real/mitbih
    python probe_mitbih.py --encoder random:tiny --raw raw/mitdb --out runs/random/mitbih    (untrained control alone)

The protocol is the inter-patient one (de Chazal et al. 2004): the beats of DS1 train, those of DS2 are scored, and the
four paced records are left out. Of the five AAMI classes, Q (7 beats) is neither trained nor scored. A beat lies in the
middle of a window, as long as in training but at most BEAT_WINDOW_S. It is described by the token that holds its R,
mean over leads, alone (r_token) or together with the mean of the tokens from -300 to +400 ms (neighbourhood). Records
201 (DS1) and 202 (DS2) are the same person.

Macro over N, S, V is the number to look at: F is one record against another. Two controls need no encoder: eight RR
intervals (rr), and 0.75 s of the raw lead II (raw).

Writes OUT/mitbih.json, OUT/predictions.npz (beats of DS2) and OUT/mitbih.png.

Shapes: L leads, T samples (at FS), N patches of a window, D width, K beats, F features, C classes, G values of the
regularisation, S resamples of records (the first row of `counts` is the test set itself).
"""
import sys
import warnings

import numpy as np
import pandas as pd
import torch
import wfdb
from matplotlib.figure import Figure
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from tqdm import tqdm

from ecg import FS, LEAD_IDS, Refused, preprocess, read_wfdb
from evaluate import (calibration, draw_bars, interval, label_auroc, load_encoders, macro, parser_of, plain_auroc,
                      resample, show, standardized, to_json, write_results)
from prepare import MITDB_DS1, MITDB_DS2

# AAMI EC57 classes of the annotation symbols, as nearly all papers group them. WFDB's own comparator, bxb, counts the
# escape beats e and j as S instead, which would move 32 beats of DS1 and 213 of DS2 from N to S.
AAMI = {"N": "NLRej", "S": "AaJS", "V": "VE", "F": "F", "Q": "/fQ"}
CLASSES = ("N", "S", "V", "F")   # trained and scored
BEAT_WINDOW_S = 8.0              # s, the longest window of a beat: its cost does not grow with train.py's --window
AROUND_S = (-0.3, 0.4)           # s from R: the neighbourhood, from the P wave to the end of most T waves
RAW_S = (-0.3, 0.45)             # s from R: the waveform of the raw control
MAX_N_TRAIN = 600                # N beats of a record that are trained on, evenly spread; other classes are kept whole
C_GRID = (1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, the inverse strength of the L2 penalty
FOLDS = 5                        # of DS1 records, to choose C
LOCAL_BEATS = 10                 # beats whose mean RR interval a beat is compared with
BATCH = 64                       # windows, one per beat, in a forward pass


# ---------------------------------------------------------------------------------------------------------------------
# beats and their features

def read_beats(path):
    """Times (K,) s and AAMI classes (K,) of a record's beats; symbols that are no beats are left out."""
    annotation = wfdb.rdann(path, "atr")
    class_of = {symbol: name for name, symbols in AAMI.items() for symbol in symbols}
    beats = [(sample, class_of[s]) for sample, s in zip(annotation.sample, annotation.symbol) if s in class_of]
    samples, classes = zip(*beats) if beats else ((), ())
    return np.array(samples) / annotation.fs, np.array(classes, dtype="U1")


def place_windows(encoder, num_leads, num_samples, beats_s):
    """Windows of K beats in a recording: first samples (K,) at FS, and their length in patches.

    R is the middle of the window's middle patch, or as near to it as an end of the recording allows: on a fixed grid a
    QRS would fall across two patches as often as not. A recording that is shorter than a window is the window.
    """
    P = encoder.patch_samples
    N = min(encoder.window_length(num_leads), int(BEAT_WINDOW_S * FS) // P, num_samples // P)
    r = np.rint(beats_s * FS).astype(int)
    return np.clip(r - N // 2 * P - P // 2, 0, num_samples - N * P), N


def token_features(encoder, signal_mv, lead_ids, beats_s):
    """Features of K beats: r_token (K, D) and neighbourhood (K, 2D), the R token and the mean around it.

    signal_mv (L, T) and lead_ids (L,) of ecg.preprocess, beats_s (K,). A patch with a missing sample has no token:
    means over leads and over patches leave it out. What has no token at all is NaN.
    """
    start, N = place_windows(encoder, *signal_mv.shape, beats_s)
    if N == 0:
        return np.full((len(beats_s), encoder.width), np.nan), np.full((len(beats_s), 2 * encoder.width), np.nan)
    P, device, features = encoder.patch_samples, encoder.cls_token.device, []
    r = torch.from_numpy(np.rint(beats_s * FS).astype(int) - start)                        # (K,) in its window
    at = (r // P).clip(0, N - 1)
    from_r = (torch.arange(N) + 0.5) * P - r[:, None]                                      # (K, N) centres of patches
    around = (from_r >= AROUND_S[0] * FS) & (from_r <= AROUND_S[1] * FS)
    place = torch.from_numpy(start)[:, None] + torch.arange(N * P)                         # (K, T) of each window
    signal_mv, lead_ids = torch.from_numpy(signal_mv), torch.from_numpy(lead_ids)
    for k in torch.arange(len(r)).split(BATCH):
        windows = signal_mv[:, place[k]].transpose(0, 1)                                   # (B, L, T)
        with torch.inference_mode():
            patches = encoder(windows.to(device), lead_ids.expand(len(k), -1).to(device)).patches
        tokens = patches.float().cpu().nanmean(dim=1)                                      # (B, N, D)
        mean = torch.where(around[k][..., None], tokens, torch.nan).nanmean(dim=1)
        features.append(torch.cat((tokens[torch.arange(len(k)), at[k]], mean), dim=1))
    both = torch.cat(features).numpy()
    return both[:, :encoder.width], both


def rr_features(beats_s):
    """Eight RR numbers per beat (K, 8), in s or as ratios: what is known without looking at the waveform."""
    rr = np.diff(beats_s)
    usual = np.median(rr) if len(rr) else np.nan
    before, after = np.r_[usual, rr][:len(beats_s)], np.r_[rr, usual][:len(beats_s)]
    sums = np.cumsum(np.r_[0, before])
    k = np.arange(len(before))
    first = np.maximum(k - LOCAL_BEATS, 0)
    local = np.where(k > 0, (sums[k] - sums[first]) / np.maximum(k - first, 1), usual)  # mean of the RR before this one
    return np.stack((before, after, local, before / local, after / local, before / after, before / usual,
                     after / usual), axis=1)


def raw_features(signal_mv, lead_ids, beats_s):
    """0.75 s of lead II around R at FS, or of the first lead without II, mean taken off: (K, 187) mV."""
    wave = np.nan_to_num(signal_mv[np.argmax(lead_ids == LEAD_IDS["II"])])
    at = np.rint(beats_s * FS).astype(int)[:, None] + np.arange(*(int(s * FS) for s in RAW_S))
    window = wave[at.clip(0, len(wave) - 1)]
    return window - window.mean(axis=1, keepdims=True)


def collect(raw, encoders):
    """Beats of every record of DS1 and DS2 that is there: record, beat_s and cls, each (K,), and the features (K, F),
    numbered by encoder. ValueError if a set is absent, or names a file that cannot be read."""
    names = [n for n in MITDB_DS1 + MITDB_DS2 if (raw / f"{n}.hea").is_file()]
    if not set(names) & set(MITDB_DS1) or not set(names) & set(MITDB_DS2):
        raise ValueError(f"{raw} holds {len(names)} of the 44 records of DS1 and DS2 ({' '.join(names) or 'none'}), "
                         "but both sets are needed; "
                         "fetch them with python prepare.py mitdb --raw DIR --out DIR --download")
    parts = []
    for name in tqdm(names, desc="records", unit="record", disable=None):
        try:
            signal_mv, lead_ids = preprocess(*read_wfdb(raw / name)[:4])
        except Refused as error:
            raise ValueError(f"{raw / name}: {error}") from None
        times_s, classes = read_beats(str(raw / name))
        rr, used = rr_features(times_s), used_beats(name, classes)
        times_s = times_s[used]
        part = dict(record=np.full(len(times_s), name), beat_s=times_s, cls=classes[used], rr=rr[used],
                    raw=raw_features(signal_mv, lead_ids, times_s))
        for e, encoder in enumerate(encoders if len(times_s) else []):
            part[f"r_token {e}"], part[f"neighbourhood {e}"] = token_features(encoder, signal_mv, lead_ids, times_s)
        parts += [part] if len(times_s) else []
    return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def used_beats(name, cls):
    """Which beats of record `name` are trained on or scored: all of CLASSES, in DS1 at most MAX_N_TRAIN N, evenly
    spread."""
    used = np.isin(cls, CLASSES)
    if name in MITDB_DS1:
        normal = np.flatnonzero(cls == "N")
        used[normal] = False
        used[normal[np.linspace(0, len(normal) - 1, min(MAX_N_TRAIN, len(normal))).astype(int)]] = True
    return used


# ---------------------------------------------------------------------------------------------------------------------
# probe

def fit(x, y, x_new):
    """Probabilities (G, K', C) of a balanced multinomial logistic regression at every C of the grid; a class that y
    lacks gets 0. A beat without any token counts as the mean beat."""
    x, x_new = standardized(x, x_new)
    model = LogisticRegression(class_weight="balanced", warm_start=True, max_iter=500, tol=1e-3)
    p = np.zeros((len(C_GRID), len(x_new), len(CLASSES)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the loosest C may stop early; it is rarely chosen
        for g, c in enumerate(C_GRID):
            model.set_params(C=c).fit(x, y)
            p[g][:, [CLASSES.index(k) for k in model.classes_]] = model.predict_proba(x_new)
    return p


def probe(x, data, train, test):
    """Probabilities (K', C) on the test rows, and C, chosen by macro N, S, V over folds of held-out DS1 records."""
    x_train, cls, record = x[train], data["cls"][train], data["record"][train]
    held_out = np.zeros((len(C_GRID), len(cls), len(CLASSES)))
    for inner, outer in GroupKFold(min(FOLDS, len(set(record)))).split(cls, groups=record):
        held_out[:, outer] = fit(x_train[inner], cls[inner], x_train[outer])
    scores = [nsv(plain_auroc(one_hot(cls), p)[None])[0] for p in held_out]
    best = int(np.nanargmax(scores))
    return fit(x_train, cls, x[test])[best], C_GRID[best]


def one_hot(cls):
    """(K, C) bool: the class of each beat."""
    return cls[:, None] == np.array(CLASSES)


def nsv(auroc):
    """Mean over N, S, V of auroc (S, C) -> (S,); over those of them that can be scored."""
    return macro(auroc[:, :3])


def detection(p, cls):
    """Sensitivity, positive predictivity and F1 of S and V at the most probable class."""
    said = np.array(CLASSES)[p.argmax(axis=1)]
    scores = {}
    for name in ("S", "V"):
        hits, of, called = (np.count_nonzero(x) for x in ((said == name) & (cls == name), cls == name, said == name))
        scores[name] = dict(sensitivity=hits / of if of else np.nan,
                            positive_predictivity=hits / called if called else np.nan,
                            f1=2 * hits / (of + called) if of + called else np.nan)
    return scores


def score(p, cls, record, number, counts):
    """Everything about one set of probabilities on DS2: JSON entry, and AUROC (S, C).

    p (K, C), cls (K,), record (K,); number (K,) and counts (S, records) as in evaluate.resampled_auroc.
    """
    y, without = one_hot(cls), record != "232"  # which has three quarters of DS2's S beats
    auroc = label_auroc(y, p, number, counts)
    return dict(macro_nsvf=macro(auroc)[0], macro_nsv=nsv(auroc)[0], per_class=dict(zip(CLASSES, auroc[0])),
                ci95=interval(nsv(auroc)[1:]), s_without_232=plain_auroc(y[without], p[without])[1],
                detection=detection(p, cls), calibration=calibration(p, y)), auroc


# ---------------------------------------------------------------------------------------------------------------------
# report and picture

def report(result):
    """The protocol and the scores, as text."""
    n, rows = result["n"], {}
    for group in ("features", "controls"):
        for name, r in result[group].items():
            rows[name] = {"C": r["c"], "N,S,V": show(r["macro_nsv"], r["ci95"]), "N,S,V,F": r["macro_nsvf"],
                          **r["per_class"], "S without 232": r["s_without_232"],
                          "Brier": r["calibration"]["brier"], "ECE": r["calibration"]["ece"]}
            if group == "features":
                rows[name] |= {"untrained": r["untrained"], "difference": show(r["difference"], r["difference_ci95"])}
    mapping = "; ".join(f"{name}: {' '.join(symbols)}" for name, symbols in AAMI.items())
    return "\n".join((
        f"MIT-BIH, DS1 ({n['train_records']} records, {n['train']} beats, N thinned to {MAX_N_TRAIN} a record) "
        f"to DS2 ({n['test_records']} records, {n['test']} beats: "
        + ", ".join(f"{k} {v}" for k, v in n["test_beats"].items()) + ")",
        f"classes by symbol: {mapping}; Q is neither trained nor scored; C by {FOLDS} folds of DS1 records",
        "AUROC, one against the rest [95 %, records resampled]"
        + (f"; no beats of {', '.join(n['absent'])} in DS2: macros go over the others" if n["absent"] else ""),
        pd.DataFrame.from_dict(rows, orient="index").to_string(na_rep="-", float_format="{:.3f}".format)))


def draw(result):
    """Figure: AUROC per class and macro, pre-trained next to untrained and the controls without an encoder."""
    best = result["features"]["neighbourhood"]
    scores = {"RR intervals alone": result["controls"]["rr"], "raw waveform": result["controls"]["raw"],
              "untrained": best["untrained_scores"]}
    if not result["untrained_only"]:
        scores["pre-trained"] = best
    series = {name: ([r["macro_nsv"], *r["per_class"].values()], [r["ci95"]] + [[None, None]] * len(CLASSES))
              for name, r in scores.items()}
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axis = figure.subplots()
    draw_bars(axis, ["macro N, S, V", *CLASSES], series)
    axis.axvline(0.5, color="#bbbbbb", linewidth=1)
    axis.set_ylabel("AUROC on DS2, one against the rest")
    axis.set_title(f"Heartbeats of MIT-BIH, {result['n']['test_records']} test records; features: R token and its "
                   "neighbourhood; lines: 95 %, record bootstrap", loc="left", fontsize=10)
    axis.legend(frameon=False, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    return figure


def parse_args(argv=None):
    return parser_of("Linear probes of single heartbeats on MIT-BIH, of an encoder and of its untrained control.",
                     "raw/mitdb").parse_args(argv)


def main(args):
    encoders = load_encoders(args.encoder, args.device)
    data = collect(args.raw, encoders)
    train, test = (np.isin(data["record"], names) for names in (MITDB_DS1, MITDB_DS2))
    cls, record = data["cls"][test], data["record"][test]
    number, counts = resample(record, args.seed)
    counts = np.concatenate((np.ones_like(counts[:1]), counts))      # first the test set itself

    stored, result = dict(record=record, beat_s=data["beat_s"][test], cls=cls), dict(features={}, controls={})
    for name in ("rr", "raw"):
        p, c = probe(data[name], data, train, test)
        result["controls"][name] = dict(score(p, cls, record, number, counts)[0], c=c)
        stored[f"p_{name}"] = p
    for name in ("r_token", "neighbourhood"):
        runs = [probe(data[f"{name} {e}"], data, train, test) for e in range(len(encoders))]
        (p, c), (p0, c0) = runs[0], runs[-1]  # the control alone: both are the same
        (entry, auroc), (control, auroc0) = (score(x, cls, record, number, counts) for x in (p, p0))
        difference = nsv(auroc) - nsv(auroc0)
        result["features"][name] = dict(entry, c=c, untrained=control["macro_nsv"],
                                        untrained_scores=dict(control, c=c0),
                                        difference=difference[0], difference_ci95=interval(difference[1:]))
        stored |= {f"p_{name}": p, f"p_untrained_{name}": p0, f"difference_{name}": difference}

    n = dict(train=train.sum(), test=len(cls), train_records=len(set(data["record"][train])),
             test_records=counts.shape[1], train_beats={c: np.sum(data["cls"][train] == c) for c in CLASSES},
             test_beats={c: np.sum(cls == c) for c in CLASSES},
             absent=[c for c in CLASSES if not (cls == c).any()])
    result = to_json(dict(encoder=args.encoder, raw=str(args.raw), seed=args.seed, untrained_only=len(encoders) == 1,
                          n=n, mapping=AAMI, **result))
    print(report(result))
    write_results(args.out, "mitbih", result, stored, draw(result))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"probe_mitbih.py: {error}")
