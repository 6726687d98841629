"""What a frozen encoder knows about single heartbeats: a linear probe on MIT-BIH, next to the same network untrained.

    python probe_mitbih.py --encoder runs/real/encoder.pt --raw raw/mitdb --out runs/real/mitbih

The protocol is the inter-patient one (de Chazal et al. 2004): the beats of DS1 train, those of DS2 are scored, paced
records and AAMI class Q (7 beats) are left out. A beat lies in the middle of a window, as long as in training but at
most BEAT_WINDOW_S. Its features are the token that holds its R, mean over leads, alone (r_token) or together with
the mean of the tokens from -300 to +400 ms (neighbourhood). Records 201 (DS1) and 202 (DS2) are the same person.
The scores are macros over N, S, V (nine in ten F beats of each set are in one record): `within` is the mean over
records of the AUROC within a record, which is what a reader of one record needs, and `pooled` that over all beats, in
which a few records decide. Two controls need no encoder: eight RR features (rr), and 0.75 s of the raw lead II (raw).
How well a linear fit on DS1 finds two of these numbers from the features of DS2 is the correlation within records:
`rr r` of the logarithm of the RR interval before the beat, and `early r` of its ratio to the mean of the ten before,
which tells S from N. --encoder random:SIZE gives only the control.

Writes OUT/report.html, OUT/mitbih.json, OUT/predictions.npz (beats of DS2) and OUT/mitbih.png.

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
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import precision_recall_fscore_support
from sklearn.model_selection import GroupKFold
from tqdm import tqdm

from ecg import FS, LEAD_IDS, LEADS, Recording, Refused, preprocess, read_wfdb
from evaluate import (CALIBRATION_NOTE, calibration, draw_bars, draw_examples, interval, interval_of_seeds, label_auroc,
                      load_encoders, macro, mean_of, only_random, parser_of, plain_auroc, resample, show,
                      show_calibration, standardized, to_json, write_results)
from model import low_precision
from prepare import MITDB_DS1, MITDB_DS2

# AAMI EC57 classes of the annotation symbols, as nearly all papers group them. WFDB's own comparator, bxb, counts the
# escape beats e and j as S, which would move 32 beats of DS1 and 213 of DS2 from N to S.
AAMI = {"N": "NLRej", "S": "AaJS", "V": "VE", "F": "F", "Q": "/fQ"}
CLASSES = ("N", "S", "V", "F")   # trained and scored
BEAT_WINDOW_S = 8.0              # s, limit for the window of a beat, so that an encoder of longer windows costs no more
AROUND_S = (-0.3, 0.4)           # s from R: the neighbourhood, from the P wave to the end of most T waves
RAW_S = (-0.3, 0.45)             # s from R: the waveform of the raw control
MAX_N_TRAIN = 600                # N beats per training record, evenly spread; all beats of other classes are used
C_GRID = (1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, the inverse strength of the L2 penalty
FOLDS = 5                        # of DS1 records, to choose C
RIDGE_GRID = np.logspace(0, 4, 5)  # penalties of the fits of RR intervals
MIN_BEATS = 5                    # of a class and of all others, to score the class within a record
LOCAL_BEATS = 10                 # beats whose mean RR interval a beat is compared with
RR_S, RR_RATIO = (0.2, 3.0), (0.5, 1.5)  # s; beyond these are gaps, pauses and artefacts: they count as the limit
NAMES = dict(within_nsv="within", macro_nsv="pooled", rr_r="rr r", early_r="early r")  # of scores in JSON, in the table
CI_NAMES = dict(within_nsv="within_ci95", macro_nsv="ci95")      # of their intervals in JSON
BATCH = 64                       # windows, one per beat, in a forward pass


# ---- beats and their features ---------------------------------------------------------------------------------------
def read_beats(path):
    """Times (K,) s and AAMI classes (K,) of a record's beats; symbols that are not beats are left out."""
    annotation = wfdb.rdann(path, "atr")
    class_of = {symbol: name for name, symbols in AAMI.items() for symbol in symbols}
    classes = pd.Series(annotation.symbol, dtype=object).map(class_of)
    return annotation.sample[classes.notna()] / annotation.fs, classes.dropna().to_numpy(dtype="U1")


def place_windows(encoder, num_leads, num_samples, beats_s):
    """Windows of K beats in a recording: first samples (K,) at FS, and their length in patches.

    R is in the middle of the window's middle patch, or as near to it as the ends of the recording allow. On a fixed
    grid half of the QRS complexes would lie across two patches. A recording shorter than a window is the whole window.
    """
    P = encoder.patch_samples
    N = min(encoder.window_length(num_leads), int(BEAT_WINDOW_S * FS) // P, num_samples // P)
    r = np.rint(beats_s * FS).astype(int)
    return np.clip(r - N // 2 * P - P // 2, 0, num_samples - N * P), N


def token_features(encoder, signal_mv, lead_ids, beats_s):
    """Features of K beats: r_token (K, D) and neighbourhood (K, 2D), the R token and the mean around it.

    signal_mv (L, T) and lead_ids (L,) of ecg.preprocess, beats_s (K,). Means over leads and over patches leave out
    patches with a missing sample, which have no token. The features of a beat without any token are NaN.
    """
    start, N = place_windows(encoder, *signal_mv.shape, beats_s)
    if N == 0:
        return tuple(np.full((len(beats_s), width), np.nan) for width in (encoder.width, 2 * encoder.width))
    P, device, features = encoder.patch_samples, encoder.cls_token.device, []
    signal_mv, lead_ids, start = (torch.from_numpy(x) for x in (signal_mv, lead_ids, start))
    r = torch.from_numpy(np.rint(beats_s * FS).astype(int)) - start                        # (K,) in its window
    from_r = (torch.arange(N) + 0.5) * P - r[:, None]                                      # (K, N) centres of patches
    around = (from_r >= AROUND_S[0] * FS) & (from_r <= AROUND_S[1] * FS)
    for k in torch.arange(len(r)).split(BATCH):
        windows = signal_mv.unfold(1, N * P, 1)[:, start[k]].transpose(0, 1)               # (B, L, T)
        with torch.inference_mode(), low_precision(device, encoder.precision):
            patches = encoder(windows.to(device), lead_ids.expand(len(k), -1).to(device)).patches
        tokens = patches.float().cpu().nanmean(dim=1)                                      # (B, N, D)
        mean = torch.where(around[k][..., None], tokens, torch.nan).nanmean(dim=1)
        features.append(torch.cat((tokens[torch.arange(len(k)), (r[k] // P).clip(0, N - 1)], mean), dim=1))
    both = torch.cat(features).numpy()
    return both[:, :encoder.width], both


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


def collect(raw, encoders, most=None):
    """Beats of every record of DS1 and DS2 in `raw`: record, beat_s, cls and stands_for (how many beats of its class
    and record it represents, of those that DS2 would use), each (K,), and features (K, F), numbered by encoder; most:
    see used_beats. ValueError if a set is absent, or if a file cannot be read."""
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
        times_s, classes = read_beats(str(raw / name))
        used = used_beats(name, classes, most)
        if not used.any():
            continue
        rr, times_s = rr_features(times_s)[used], times_s[used]
        every = one_hot(classes[used_beats("", classes, most)]).sum(axis=0)  # as many as a record of DS2 would give
        part = dict(record=np.full(len(times_s), name), beat_s=times_s, cls=classes[used], rr=rr,
                    stands_for=one_hot(classes[used]) @ (every / one_hot(classes[used]).sum(axis=0).clip(1)),
                    raw=raw_features(signal_mv, lead_ids, times_s))
        for e, encoder in enumerate(encoders):
            part[f"r_token {e}"], part[f"neighbourhood {e}"] = token_features(encoder, signal_mv, lead_ids, times_s)
        parts.append(part)
    return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def used_beats(name, cls, most=None):
    """Which beats of record `name` are used: all of CLASSES, in DS1 at most MAX_N_TRAIN N; or at most `most` of every
    class; evenly spread."""
    used = np.zeros(len(cls), bool)
    for of in CLASSES:
        found = np.flatnonzero(cls == of)
        limit = most or (MAX_N_TRAIN if of == "N" and name in MITDB_DS1 else len(found))
        used[found[np.linspace(0, len(found) - 1, min(limit, len(found))).astype(int)]] = True
    return used


# ---- probe ----------------------------------------------------------------------------------------------------------
def fit(x, y, x_new):
    """Probabilities (G, K', C) of a balanced multinomial logistic regression at every C of the grid; a class that y
    lacks gets 0. A beat without any token counts as the mean beat."""
    x, x_new = standardized(x, x_new)
    model = LogisticRegression(class_weight="balanced", warm_start=True, max_iter=500, tol=1e-3)
    p = np.zeros((len(C_GRID), len(x_new), len(CLASSES)))
    # The fit with the weakest penalty may stop early; it is rarely chosen.
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        for g, c in enumerate(C_GRID):
            model.set_params(C=c).fit(x, y)
            p[g][:, [CLASSES.index(k) for k in model.classes_]] = model.predict_proba(x_new)
    return p


def probe(x, data, train, test):
    """Probabilities (K', C) on the test rows, and C: the best in macro N, S, V over folds of held-out DS1 records."""
    x_train, cls, record = x[train], data["cls"][train], data["record"][train]
    held_out = np.zeros((len(C_GRID), len(cls), len(CLASSES)))
    for inner, outer in GroupKFold(min(FOLDS, len(set(record)))).split(cls, groups=record):
        held_out[:, outer] = fit(x_train[inner], cls[inner], x_train[outer])
    scores = [nsv(plain_auroc(one_hot(cls), p)[None])[0] for p in held_out]
    best = int(np.nanargmax(scores))
    return fit(x_train, cls, x[test])[best], C_GRID[best]


def with_prior(p, prior):
    """Probabilities (K, C) of the balanced fit, as if classes were as frequent as `prior` (C,): beats of each in DS1.
    Balanced weights count every class the same, so p says "V" far too often. AUROC is that of p."""
    p = p * prior
    return p / p.sum(axis=1, keepdims=True)


def one_hot(cls):
    """(K, C) bool: the class of each beat."""
    return cls[:, None] == np.array(CLASSES)


def nsv(auroc):
    """Mean over N, S, V of auroc (S, C) -> (S,); classes that cannot be scored are left out."""
    return macro(auroc[:, :3])


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
    """Correlation (S, 2) within the records of DS2, in every resample of them, of a ridge regression on DS1 with the
    logarithms of RR before the beat and of its ratio to the mean before; rr (K, 8) of rr_features. The mean of each
    record is subtracted, so that to know its heart rate is no gain."""
    target = np.log(np.stack((rr[:, 0].clip(*RR_S), rr[:, 3].clip(*RR_RATIO)), axis=1))
    x_train, x_test = standardized(x[train], x[test])
    told = np.stack([RidgeCV(RIDGE_GRID).fit(x_train, t).predict(x_test) for t in target[train].T], axis=1)
    n, found = np.bincount(number, minlength=counts.shape[1]).clip(1), []
    for a, b in zip(told.T, target[test].T):
        a, b = (v - (np.bincount(number, v, len(n)) / n)[number] for v in (a, b))
        aa, bb, ab = (counts @ np.bincount(number, v, len(n)) for v in (a * a, b * b, a * b))          # (S,) each
        found.append(ab / np.sqrt(aa * bb))
    return np.stack(found, axis=1)


def detection(p, cls):
    """Sensitivity, positive predictivity and F1 of S and V at the most probable class."""
    said = np.array(CLASSES)[p.argmax(axis=1)]
    scores = precision_recall_fscore_support(cls, said, labels=["S", "V"], zero_division=np.nan)
    return {name: dict(sensitivity=recall, positive_predictivity=precision, f1=f1)
            for name, precision, recall, f1, _ in zip("SV", *scores)}


def score(x, data, train, test, number, counts):
    """The probe of features x on DS2: JSON entry, probabilities (K', C), and the scores of NAMES (4, S), the first of
    which are DS2 itself."""
    p, c = probe(x, data, train, test)
    prior = (one_hot(data["cls"][train]) * data["stands_for"][train][:, None]).sum(axis=0)
    believed = with_prior(p, prior)
    cls, without = data["cls"][test], data["record"][test] != "232"  # 232 has three quarters of DS2's S beats
    y = one_hot(cls)
    auroc, within = label_auroc(y, p, number, counts), within_records(y, p, number, counts)
    macro_nsv, within_nsv = nsv(auroc), nsv(within)
    r = rr_correlation(x, data["rr"], train, test, number, counts)
    return dict(c=c, macro_nsvf=macro(auroc)[0], per_class=dict(zip(CLASSES, auroc[0])),
                within_per_class=dict(zip(CLASSES, within[0])), s_without_232=plain_auroc(y[without], p[without])[1],
                detection=detection(p, cls),
                prior=dict(zip(CLASSES, prior)), calibration=calibration(believed, y, prior / prior.sum(), number)
                ), p, np.stack((within_nsv, macro_nsv, *r.T))


def with_intervals(runs, records):
    """JSON entry of several runs of score(), of encoders that differ in their seed: means, with intervals of NAMES."""
    entry, scores = mean_of([run[0] for run in runs]), np.stack([run[2] for run in runs], axis=1)   # (4, E, S)
    entry["c"] = [run[0]["c"] for run in runs]
    entry["each"] = {key: of[:, 0].tolist() for key, of in zip(NAMES, scores)}
    for key, of in zip(NAMES, scores):
        entry |= {key: of[:, 0].mean(), CI_NAMES.get(key, f"{key}_ci95"): interval_of_seeds(of, records)}
    return entry


# ---- report and picture ---------------------------------------------------------------------------------------------
def report(result):
    """The protocol and the scores, as text."""
    n, rows, differences, untrained = result["n"], {}, {}, {}
    thinned = (f"at most {result['beats']} of a class and record" if result["beats"] else
               f"N thinned to {MAX_N_TRAIN} a record")
    for name, r in (result["features"] | result["controls"]).items():
        rows[name] = {"C": " ".join(map("{:g}".format, r["c"])), "within": show(r["within_nsv"], r["within_ci95"]),
                      **{f"within {k}": r["within_per_class"][k] for k in "SVN"},
                      "pooled": show(r["macro_nsv"], r["ci95"]), **r["per_class"],
                      "S without 232": r["s_without_232"], "rr r": r["rr_r"], "early r": r["early_r"],
                      **show_calibration(r["calibration"])}
        for key, d in (r.get("differences", {}) if not result["untrained_only"] else {}).items():
            differences.setdefault(NAMES[key], {})[name] = show(d["difference"], d["ci95"])
            untrained.setdefault(NAMES[key], {})[name] = r["untrained_scores"][key]
    return "\n".join((
        f"MIT-BIH, DS1 ({n['train_records']} records, {n['train']} beats, {thinned}) "
        f"to DS2 ({n['test_records']} records, {n['test']} beats: "
        + ", ".join(f"{k} {v}" for k, v in n["test_beats"].items()) + ")",
        "classes by symbol: " + "; ".join(f"{name}: {' '.join(symbols)}" for name, symbols in AAMI.items())
        + f"; Q is neither trained nor scored; C by {FOLDS} folds of DS1 records",
        "macro AUROC of N, S, V within records and pooled, of each class pooled [95 %, records resampled]"
        + (f"; no beats of {', '.join(n['absent'])} in DS2: macros go over the others" if n["absent"] else ""),
        CALIBRATION_NOTE + "; with the class frequencies of DS1 put back; beats of a record are alike, and only z "
        "allows for that",
        table(rows), *([f"untrained\n{table(untrained)}\ndifference\n{table(differences)}"] if differences else [])))


def table(rows):
    frame = pd.DataFrame.from_dict(rows, orient="index").fillna(np.nan)
    return frame.to_string(na_rep="-", float_format="{:.3f}".format)


def draw(result):
    """Figure: AUROC per class and macro, pre-trained next to untrained and the controls without an encoder."""
    best, controls = result["features"]["neighbourhood"], result["controls"]
    scores = {"RR intervals alone": controls["rr"], "raw waveform": controls["raw"],
              "untrained": best["untrained_scores"]} | ({} if result["untrained_only"] else {"pre-trained": best})
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


def examples(encoder, raw, data, train, test, c, p):
    """Confident classes of beats in DS2, by evaluate.draw_examples; p (K', C) of the neighbourhood's probe."""
    x, cls, P = data["neighbourhood 0"][train], data["cls"], encoder.patch_samples

    def show_row(row):
        record, beat_s = data["record"][test][row], data["beat_s"][test][[row]]
        signal_mv, ids = preprocess(*read_wfdb(raw / record)[:4], {})
        (start,), N = place_windows(encoder, *signal_mv.shape, beat_s)
        from_r = (start + (np.arange(N) + 0.5) * P) / FS - beat_s
        window = Recording(signal_mv[:, start:start + N * P], FS, [LEADS[i] for i in ids])
        return f"record {record}, {beat_s[0]:.1f} s", window, (from_r >= AROUND_S[0]) & (from_r <= AROUND_S[1])
    return draw_examples(encoder, x, lambda rows: np.log(fit(x, cls[train], rows)[C_GRID.index(c)]), CLASSES, p,
                         one_hot(cls[test]), data["record"][test], show_row)


# ---- command line ---------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = parser_of("Linear probes of single heartbeats on MIT-BIH, for an encoder and its untrained control.",
                       "raw/mitdb")
    parser.add_argument("--beats", type=int, metavar="N",
                        help="for a quick look: at most so many beats of a class from each record (default: all; of "
                             f"normal ones in DS1 {MAX_N_TRAIN})")
    return parser.parse_args(argv)


def main(args):
    encoders, control_of = load_encoders(args.encoder, args.device, args.precision)
    data = collect(args.raw, encoders, args.beats)
    train, test = (np.isin(data["record"], names) for names in (MITDB_DS1, MITDB_DS2))
    number, counts = resample(data["record"][test], args.seed)
    counts = np.concatenate((np.ones_like(counts[:1]), counts))      # first the test set itself

    records = counts.shape[1]
    stored, result = {key: data[key][test] for key in ("record", "beat_s", "cls")}, dict(features={}, controls={})
    for name in ("rr", "raw"):
        run = score(data[name], data, train, test, number, counts)
        result["controls"][name], stored[f"p_{name}"] = with_intervals([run], records), run[1]
    for name in ("r_token", "neighbourhood"):
        runs = [score(data[f"{name} {e}"], data, train, test, number, counts) for e in range(len(encoders))]
        ours, controls = runs[:len(control_of)], [runs[k] for k in control_of]
        gains = np.stack([run[2] - control[2] for run, control in zip(ours, controls)], axis=1)      # (4, E, S)
        differences = {key: dict(difference=of[:, 0].mean(), ci95=interval_of_seeds(of, records),
                                 each=[dict(difference=one[0], ci95=interval(one[1:])) for one in of])
                       for key, of in zip(NAMES, gains)}
        pooled, control = differences["macro_nsv"], with_intervals(controls, records)
        result["features"][name] = dict(with_intervals(ours, records), untrained=control["macro_nsv"],
                                        untrained_scores=control, difference=pooled["difference"],
                                        difference_ci95=pooled["ci95"],
                                        differences=differences)
        p = np.stack([run[1] for run in ours])                         # one encoder: (K', C), several: (E, K', C)
        stored |= {f"p_{name}": p[0] if len(p) == 1 else p, f"p_untrained_{name}": controls[0][1],
                   f"difference_{name}": gains[1].mean(axis=0)}

    train_beats, test_beats = (dict(zip(CLASSES, one_hot(data["cls"][rows]).sum(axis=0))) for rows in (train, test))
    n = dict(train=train.sum(), test=test.sum(), train_records=len(set(data["record"][train])),
             test_records=records, train_beats=train_beats, test_beats=test_beats,
             absent=[name for name, beats in test_beats.items() if not beats])
    result = to_json(dict(encoder=args.encoder, raw=str(args.raw), seed=args.seed, untrained_only=only_random(args),
                          beats=args.beats or 0, n=n, mapping=AAMI, **result))
    print(report(result))
    p = stored["p_neighbourhood"]
    papers = examples(encoders[0], args.raw, data, train, test, result["features"]["neighbourhood"]["c"][0],
                      p if p.ndim == 2 else p[0])
    write_results(args, "mitbih", result, stored, draw(result), report(result), encoders,
                  (read_wfdb(args.raw / record) for record in sorted(set(stored["record"]))), papers)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"probe_mitbih.py: {error}")
