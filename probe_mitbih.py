"""What a frozen encoder knows about single heartbeats: a linear probe on MIT-BIH, beside the same network untrained.

    python probe_mitbih.py --encoder runs/real/encoder.pt --raw data/mitdb --out runs/real/mitbih
    python probe_mitbih.py --encoder random:tiny --raw data/mitdb --out runs/random/mitbih    (untrained control alone)

The protocol is the inter-patient one: training on the beats of DS1, scores on those of DS2 (de Chazal et al. 2004), the
four paced records left out, five AAMI classes of which Q (7 beats) is neither trained nor scored. A beat lies in the
middle of a window as long as in training; it is described by the token that holds its R (mean over leads), alone
(r_token) or together with the mean of the tokens from -300 to +400 ms (neighbourhood). Records 201 (DS1) and 202 (DS2)
are the same person.

Macro over N, S, V is the number to look at: F is one record against another. Two controls need no encoder: eight RR
intervals (rr), and 0.75 s of the raw lead II (raw).

Writes OUT/mitbih.json, OUT/predictions.npz (beats of DS2) and OUT/mitbih.png.

Shapes: L leads, N patches, D width, K beats, F features, C classes, G values of the regularisation, R records,
S bootstrap samples.
"""
import json
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
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from prepare import FS, MITDB_DS1, MITDB_DS2, lead_id, preprocess, read_wfdb
from probe_ptbxl import BOOTSTRAPS, calibration, interval, load_encoders, parser_of, show, to_json, write_whole

# AAMI EC57 classes of the annotation symbols, as nearly all papers group them. WFDB's own comparator, bxb, counts the
# escape beats e and j as S instead, which would move 32 beats of DS1 and 213 of DS2 from N to S.
AAMI = {"N": "NLRej", "S": "AaJS", "V": "VE", "F": "F", "Q": "/fQ"}
CLASSES = ("N", "S", "V", "F")  # trained and scored
AROUND_S = (-0.3, 0.4)  # s from R: the neighbourhood, from the P wave to the end of most T waves
RAW_S = (-0.3, 0.45)  # s from R: the waveform of the raw control
MAX_N_TRAIN = 600  # N beats of a record that are trained on, evenly spread; the other classes are kept whole
C_GRID = (1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, the inverse strength of the L2 penalty
FOLDS = 5  # of DS1 records, to choose C
BARS = {"RR intervals alone": "#d9c8a9", "raw waveform": "#e3b9b0", "untrained": "#c4c4c4", "pre-trained": "#7fb2e5"}
LOCAL_BEATS = 10  # beats whose mean RR interval a beat is compared with
BATCH = 64  # windows, one per beat, in a forward pass


def read_beats(path):
    """Times (K,) s and AAMI classes (K,) of a record's beats; symbols that are no beats are left out."""
    annotation = wfdb.rdann(path, "atr")
    class_of = {symbol: name for name, symbols in AAMI.items() for symbol in symbols}
    beats = [(sample, class_of[s]) for sample, s in zip(annotation.sample, annotation.symbol) if s in class_of]
    samples, classes = zip(*beats) if beats else ((), ())
    return np.array(samples) / annotation.fs, np.array(classes, dtype="U1")


def token_features(encoder, signal, fs, leads, beats_s):
    """Features of K beats: r_token (K, D) and neighbourhood (K, 2D).

    Each beat gets a window as long as in training, placed so that R is the middle of the window's middle patch (nearer
    to an end of the recording, as near to it as can be): on a fixed grid a QRS would fall across two patches as often
    as not. Samples that are missing count as 0 mV.
    """
    signal_mv, ids = preprocess(signal, fs, leads)
    P, window = encoder.patch_samples, encoder.window_and_stride(len(ids))[0]
    r = np.rint(beats_s * FS).astype(int)
    start = np.clip(r - window // 2 * P - P // 2, 0, signal_mv.shape[1] - window * P)       # (K,)
    at = np.clip((r - start) // P, 0, window - 1)                                           # (K,) patch that holds R
    centre = start[:, None] + (np.arange(window) + 0.5) * P - r[:, None]                    # (K, N) samples from R
    around = (centre >= AROUND_S[0] * FS) & (centre <= AROUND_S[1] * FS)
    signal_mv, ids = torch.from_numpy(np.nan_to_num(signal_mv)), torch.from_numpy(ids)
    device, features = encoder.cls_token.device, []
    for k in np.split(np.arange(len(r)), np.arange(BATCH, len(r), BATCH)):
        # windows (B, L, T), tokens (B, N, D)
        windows = signal_mv[:, torch.from_numpy(start[k])[:, None] + torch.arange(window * P)].transpose(0, 1)
        with torch.inference_mode():
            tokens = encoder(windows.to(device), ids.expand(len(k), -1).to(device)).patches.mean(
                dim=1).float().cpu().numpy()
        mean = (tokens * around[k][..., None]).sum(axis=1) / around[k].sum(axis=1, keepdims=True)
        features.append(np.concatenate((tokens[np.arange(len(k)), at[k]], mean), axis=1))
    both = np.concatenate(features)
    return both[:, :encoder.width], both


def rr_features(beats_s):
    """Eight RR numbers per beat (K, 8), in s or as ratios: what is known without looking at the waveform."""
    rr = np.diff(beats_s)
    usual = np.median(rr)
    before, after = np.r_[usual, rr], np.r_[rr, usual]
    sums = np.cumsum(np.r_[0, before])
    k = np.arange(len(before))
    first = np.maximum(k - LOCAL_BEATS, 0)
    local = np.where(k > 0, (sums[k] - sums[first]) / np.maximum(k - first, 1), usual)  # mean of the RR before this one
    return np.stack((before, after, local, before / local, after / local, before / after, before / usual,
                     after / usual), axis=1)


def raw_features(signal, fs, leads, beats_s):
    """0.75 s of lead II (else the first lead) around R at FS, mean taken off: (K, 187) mV."""
    ids = [lead_id(name) for name in leads]
    lead = ids.index(lead_id("II")) if lead_id("II") in ids else 0
    wave = np.nan_to_num(preprocess(signal, fs, leads)[0][lead])
    at = np.rint(beats_s * FS).astype(int)[:, None] + np.arange(*(int(s * FS) for s in RAW_S))
    window = wave[at.clip(0, len(wave) - 1)]
    return window - window.mean(axis=1, keepdims=True)


# ---- features of all records -------------------------------------------------------------------------------

def collect(raw, encoders):
    """Beats of every record of DS1 and DS2 that is there: record, beat_s and cls, each (K,), and the features (K, F),
    numbered by encoder."""
    names = [n for n in MITDB_DS1 + MITDB_DS2 if (raw / f"{n}.hea").is_file()]
    if not set(names) & set(MITDB_DS1) or not set(names) & set(MITDB_DS2):
        raise ValueError(f"{raw} holds {len(names)} of the 44 records of DS1 and DS2 ({' '.join(names) or 'none'}), "
                         "but both sets are needed; "
                         "fetch them with python prepare.py mitdb --raw DIR --out DIR --download")
    parts = []
    for name in tqdm(names, desc="records", unit="record", disable=None):
        signal, fs, leads, _ = read_wfdb(raw / name)
        times_s, classes = read_beats(str(raw / name))
        rr, used = rr_features(times_s), used_beats(name, classes)
        times_s = times_s[used]
        part = dict(record=np.full(len(times_s), name), beat_s=times_s, cls=classes[used], rr=rr[used],
                    raw=raw_features(signal, fs, leads, times_s))
        for e, encoder in enumerate(encoders):
            part[f"r_token {e}"], part[f"neighbourhood {e}"] = token_features(encoder, signal, fs, leads, times_s)
        parts.append(part)
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


# ---- probe -------------------------------------------------------------------------------------------------

def fit(x, y, x_new):
    """Probabilities (G, K', C) of a balanced multinomial logistic regression at every C of the grid; a class that y
    lacks gets 0."""
    scaler = StandardScaler().fit(x)
    # No valid token: the mean beat.
    x, x_new = (np.nan_to_num(scaler.transform(z.astype(np.float64))) for z in (x, x_new))
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
    rows = np.flatnonzero(train)
    held_out = np.zeros((len(C_GRID), len(rows), len(CLASSES)))
    folds = GroupKFold(min(FOLDS, len(set(data["record"][rows]))))
    for inner, outer in folds.split(rows, groups=data["record"][rows]):
        held_out[:, outer] = fit(x[rows[inner]], data["cls"][rows[inner]], x[rows[outer]])
    counts = np.ones((1, len(set(data["record"][rows]))))
    macro = [nsv(resampled_auroc(p, data["cls"][rows], data["record"][rows], counts))[0] for p in held_out]
    best = int(np.nanargmax(macro))
    return fit(x[rows], data["cls"][rows], x[test])[best], C_GRID[best]


def resampled_auroc(p, cls, record, counts):
    """One-vs-rest AUROC (S, C) in resamples of records, counts (S, R) in the order of np.unique(record); NaN without
    a class.

    Exact and fast: the wins of each record's positives over each record's negatives are counted once, (R, R), and a
    resample only weighs them. Ties count half. p (K, C), cls (K,), record (K,).
    """
    names = np.unique(record)
    auroc = np.full((len(counts), len(CLASSES)), np.nan)
    for c, name in enumerate(CLASSES):
        positive = [p[(record == r) & (cls == name), c] for r in names]
        negative = [np.sort(p[(record == r) & (cls != name), c]) for r in names]
        wins = np.array([[(np.searchsorted(n, x, "left") + np.searchsorted(n, x, "right")).sum() / 2 for n in negative]
                         for x in positive])
        pairs = np.outer([len(x) for x in positive], [len(n) for n in negative]).astype(float)
        total = np.einsum("si,ij,sj->s", counts, pairs, counts)
        won = np.einsum("si,ij,sj->s", counts, wins, counts)
        auroc[total > 0, c] = won[total > 0] / total[total > 0]
    return auroc


def nsv(auroc):
    """Mean over N, S, V of auroc (S, C) -> (S,); over those of them that can be scored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(auroc[:, :3], axis=1)


def nsvf(auroc):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(auroc, axis=1)


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


def score(p, cls, record, counts):
    """Everything about one set of probabilities on DS2: JSON entry, and AUROC (1 + S, C) plain and resampled."""
    auroc = resampled_auroc(p, cls, record, counts)
    without = record != "232"  # three quarters of DS2's S beats
    plain = np.ones((1, len(np.unique(record[without]))))
    y = cls[:, None] == np.array(CLASSES)
    return dict(macro_nsvf=nsvf(auroc)[0], macro_nsv=nsv(auroc)[0], per_class=dict(zip(CLASSES, auroc[0])),
                ci95=interval(nsv(auroc)[1:]),
                s_without_232=resampled_auroc(p[without], cls[without], record[without], plain)[0, 1],
                detection=detection(p, cls), calibration=calibration(p, y)), auroc


# ---- output ------------------------------------------------------------------------------------------------

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


def draw(path, result):
    """AUROC per class and macro: pre-trained beside untrained and the controls without an encoder."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axis = figure.subplots()
    best = result["features"]["neighbourhood"]
    series = {"RR intervals alone": result["controls"]["rr"], "raw waveform": result["controls"]["raw"],
              "untrained": best["untrained_scores"]}
    if not result["untrained_only"]:
        series["pre-trained"] = best
    labels, width = ["macro N, S, V", *CLASSES], 0.8 / len(series)
    for i, (name, r) in enumerate(series.items()):
        value = np.array([r["macro_nsv"], *(r["per_class"][c] for c in CLASSES)], dtype=float)
        at = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * width
        bars = axis.bar(at, value - 0.5, 0.94 * width, bottom=0.5, color=BARS[name], label=name)
        axis.bar_label(bars, ["-" if np.isnan(v) else f"{v:.2f}" for v in value], fontsize=8)
        axis.vlines(at[0], *np.array(r["ci95"], dtype=float), color="#333333", linewidth=1)
    axis.axvline(0.5, color="#bbbbbb", linewidth=1)
    axis.set(ylim=(min(0.5, axis.get_ylim()[0]), 1.03), ylabel="AUROC on DS2, one against the rest",
             xticks=range(len(labels)), xticklabels=labels)
    axis.set_title(f"Heartbeats of MIT-BIH, {result['n']['test_records']} test records; features: R token and its "
                   "neighbourhood; lines: 95 %, record bootstrap", loc="left", fontsize=10)
    axis.legend(frameon=False, ncols=len(series), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axis.spines[["top", "right"]].set_visible(False)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=130))


def parse_args(argv=None):
    return parser_of(
        "Linear probes of single heartbeats on MIT-BIH, of an encoder and of its untrained control.").parse_args(argv)


def main(args):
    encoders, _ = load_encoders(args.encoder, args.device)
    data = collect(args.raw, encoders)
    train, test = (np.isin(data["record"], names) for names in (MITDB_DS1, MITDB_DS2))
    cls, record = data["cls"][test], data["record"][test]
    n_records = len(np.unique(record))
    resampled = np.random.default_rng(args.seed).multinomial(n_records, np.full(n_records, 1 / n_records),
                                                             size=BOOTSTRAPS)
    counts = np.concatenate((np.ones((1, n_records)), resampled))

    stored, result = dict(record=record, beat_s=data["beat_s"][test], cls=cls), dict(features={}, controls={})
    for name in ("rr", "raw"):
        p, c = probe(data[name], data, train, test)
        result["controls"][name] = dict(score(p, cls, record, counts)[0], c=c)
        stored[f"p_{name}"] = p
    for name in ("r_token", "neighbourhood"):
        runs = [probe(data[f"{name} {e}"], data, train, test) for e in range(len(encoders))]
        (p, c), (p0, c0) = runs[0], runs[-1]  # the control alone: both are the same
        (entry, auroc), (control, auroc0) = score(p, cls, record, counts), score(p0, cls, record, counts)
        difference = nsv(auroc) - nsv(auroc0)
        result["features"][name] = dict(entry, c=c, untrained=control["macro_nsv"],
                                        untrained_scores=dict(control, c=c0),
                                        difference=difference[0], difference_ci95=interval(difference[1:]))
        stored |= {f"p_{name}": p, f"p_untrained_{name}": p0, f"difference_{name}": difference}

    n = dict(train=train.sum(), test=len(cls), train_records=len(np.unique(data["record"][train])),
             test_records=n_records, train_beats={c: np.sum(data["cls"][train] == c) for c in CLASSES},
             test_beats={c: np.sum(cls == c) for c in CLASSES},
             absent=[c for c in CLASSES if not (cls == c).any()])
    result = to_json(dict(encoder=args.encoder, raw=str(args.raw), seed=args.seed, untrained_only=len(encoders) == 1,
                          n=n, mapping=AAMI, **result))
    print(report(result))
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "predictions.npz", lambda path: np.savez_compressed(path, **stored))
    draw(args.out / "mitbih.png", result)
    write_whole(args.out / "mitbih.json", lambda path: path.write_text(json.dumps(result, indent=1)))
    print(f"wrote {args.out / 'mitbih.json'}, predictions.npz and mitbih.png")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"probe_mitbih.py: {error}")
