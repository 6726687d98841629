"""What a frozen encoder knows about whole 12-lead ECGs: linear probes on PTB-XL, beside the same network untrained.

    python probe_ptbxl.py --encoder runs/real/encoder.pt --raw data/ptbxl --out runs/real/ptbxl
    python probe_ptbxl.py --encoder random:tiny --raw data/ptbxl --out runs/random/ptbxl      (untrained control alone)

The protocol is the PTB-XL benchmark's (Strodthoff et al. 2021): six label sets in which a statement that is present
counts, whatever its likelihood; folds 1-8 train, fold 9 chooses the regularisation, fold 10 is scored; macro AUROC.
Recordings without any label of a set stay in it as rows of zeros (the benchmark drops them: about 0.001 of AUROC).
Features are [CLS, mean patch] of all 12 leads over 10 s. Untrained means the weights that the encoder started from.
With --noise, fold 10 is also scored under real noise (minutes 20-30 of the Noise Stress Test records, which no encoder
was trained with), by the same probes, which saw clean recordings only; signal-to-noise ratios are augment.add_noise's.

Writes OUT/ptbxl.json (scores, intervals, calibration, robustness, every label), OUT/predictions.npz (fold 10) and
OUT/ptbxl.png.
Size tiny on one core: 3 minutes for 2,000 records, nearly all of it for the features.

Shapes: B batch, L leads, T samples, P patch length, D width; R recordings, F features, C labels, G values of the
regularisation, S bootstrap samples, H levels of noise.
"""
import argparse
import ast
import json
import os
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure  # no pyplot: it draws without a display
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from augment import ViewSpec, add_noise, draw_views, load_noise
from model import load_encoder, untrained_like
from prepare import FS, LEADS, Refused, open_corpus, preprocess, read_wfdb

TASKS = ("all", "diagnostic", "subdiagnostic", "superdiagnostic", "form", "rhythm")
TRAIN_FOLDS, VAL_FOLD, TEST_FOLD = range(1, 9), 9, 10  # the publisher's own; a patient is in one fold only
RECORD_S, RECORD_LEADS = 10, 12  # s and leads of every PTB-XL recording
C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C, the inverse strength of the L2 penalty
MAX_ITER = 2000  # of L-BFGS, which takes up to 300 at the weakest penalty
MIN_POSITIVES = 10  # positives in fold 10 below which the AUROC of a label is mostly noise
FEW_PATIENTS = 1000  # in fold 10 (all of PTB-XL has about 1,900), below which this is said:
FEW_NOTE = "\nfew test patients: the intervals are wide, and labels with few positives move the macro over all"


def read_tables(raw):
    """PTB-XL's recordings (with `codes` and `path`), its SCP statements, and the rate in Hz of what `path` leads to.

    That is 500 Hz when every listed file is there, else 100 Hz. ValueError if this is not PTB-XL or not all of it.
    """
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        if not (raw / name).is_file():
            raise ValueError(f"no {name} in {raw}: expected PTB-XL's own folder, which "
                             f"`python prepare.py ptbxl --raw {raw} --out DIR --download` fetches")
    table = pd.read_csv(raw / "ptbxl_database.csv", index_col="ecg_id")
    table["codes"] = [sorted(ast.literal_eval(codes)) for codes in table.scp_codes]
    for rows, folds in zip(split_rows(table.strat_fold.to_numpy()), ("1 to 8", VAL_FOLD, TEST_FOLD)):
        if not rows.any():
            raise ValueError(f"{raw / 'ptbxl_database.csv'} lists no recording in fold {folds}: expected folds 1-8 to "
                             "train on, 9 to choose the regularisation and 10 to score")
    for rate, column in ((500, "filename_hr"), (100, "filename_lr")):
        table["path"] = [str(raw / name) for name in table[column]]
        absent = [path for path in table.path if not Path(f"{path}.hea").is_file()]
        if not absent:
            return table, pd.read_csv(raw / "scp_statements.csv", index_col=0), rate
    raise ValueError(f"{len(absent)} of the {len(table)} recordings in {raw / 'ptbxl_database.csv'} are absent, "
                     f"{absent[0]}.hea for one: a partial copy; fetch the rest, or take their rows out of the table")


def split_rows(fold):
    """Masks (R,) of the rows that train, validate and test, of folds (R,)."""
    return np.isin(fold, TRAIN_FOLDS), fold == VAL_FOLD, fold == TEST_FOLD


def label_sets(codes, statements):
    """{task: (names, y (R, C) bool)} from the statements present in each of R recordings, as the benchmark does it."""
    diagnostic = statements[statements.diagnostic == 1]
    labels = {  # task: {statement: label}
        "all": {code: code for code in {*statements.index}.union(*codes)},
        "diagnostic": {code: code for code in diagnostic.index},
        "subdiagnostic": diagnostic.diagnostic_subclass.dropna().to_dict(),
        "superdiagnostic": diagnostic.diagnostic_class.dropna().to_dict(),
        "form": {code: code for code in statements.index[statements.form == 1]},
        "rhythm": {code: code for code in statements.index[statements.rhythm == 1]}}
    sets = {}
    for task in TASKS:
        names = sorted(set(labels[task].values()))
        present = [[labels[task][code] for code in row if code in labels[task]] for row in codes]
        sets[task] = names, MultiLabelBinarizer(classes=names).fit_transform(present).astype(bool)
    return sets


def read_record(path, patch_samples):
    """signal (L, T) mV at FS, up to 10 s in whole patches, and lead ids (L,); None if none of it is usable."""
    try:
        signal, fs, leads, _ = read_wfdb(path)
        signal_mv, lead_ids = preprocess(signal, fs, leads)
    except Refused as error:
        if error.reason == "no valid lead":
            return None
        raise ValueError(f"{path}: {error}") from None
    signal_mv = signal_mv[:, :min(signal_mv.shape[1], RECORD_S * FS) // patch_samples * patch_samples]
    valid = np.isfinite(signal_mv).reshape(len(lead_ids), -1, patch_samples).all(axis=2)
    return (signal_mv, lead_ids) if valid.any() else None


def extract_features(encoders, paths, batch, device):
    """[CLS, mean patch] of R recordings: (encoders, R, 2D); also how many have gaps and how many are unusable.

    Every recording is read once for all encoders. One with missing samples (or of another shape) goes through
    encoder.embed by itself, with the mean over its valid patches; one without any valid patch stays NaN.
    """
    P, counts = encoders[0].patch_samples, {"with_gaps": 0, "unusable": 0}
    shape = (RECORD_LEADS, RECORD_S * FS // P * P)
    features = np.full((len(encoders), len(paths), 2 * encoders[0].width), np.nan, dtype=np.float32)
    for start in tqdm(range(0, len(paths), batch), desc="features", unit="batch", disable=None):
        records = {start + i: read_record(path, P) for i, path in enumerate(paths[start:start + batch])}
        whole = [row for row, r in records.items() if r and r[0].shape == shape and np.isfinite(r[0]).all()]
        if whole:
            signal, leads = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*(records[row] for row in whole)))
            for e, encoder in enumerate(encoders):
                features[e, whole] = encoder.pool(signal, leads).cpu()
        for row in set(records) - set(whole):
            counts["with_gaps" if records[row] else "unusable"] += 1
            for e, encoder in enumerate(encoders if records[row] else []):
                signal, leads = records[row]
                out = encoder.embed(signal, fs=FS, leads=[LEADS[i] for i in leads])
                features[e, row] = np.concatenate((out.global_feature, np.nanmean(out.local_features, axis=(0, 1))))
    return features, counts


def fit_label(x, y, x_new):
    """Logits (G, R') of one label's logistic regression at every C; x (R, F), y (R,) bool, x_new (R', F)."""
    # Along rising C every solution starts the next. At the default tolerance the macro AUROC is within 0.001 of the
    # exact optimum's for every C up to 0.1 (measured), in a third of the time.
    model = LogisticRegression(warm_start=True, max_iter=MAX_ITER)
    return np.array([model.set_params(C=c).fit(x, y).decision_function(x_new) for c in C_GRID])


def fit_labels(features, y, train):
    """Logits (G, R', C) on the rows that are not in train (R,), of labels y (R, C) fitted on those that are.

    features (R, F), or more rows, which follow in the logits. A label without both classes in train gets NaN. Labels
    that are the same column (a statement is in several sets) are fitted once, in parallel threads.
    """
    train = np.pad(train, (0, len(features) - len(train)))
    y = np.pad(y, ((0, len(features) - len(y)), (0, 0)))
    x = StandardScaler().fit(features[train]).transform(features.astype(np.float64))
    x = np.nan_to_num(x)  # an unusable recording becomes the mean one; the scaler leaves NaN out of its mean
    columns, where = np.unique(y, axis=1, return_inverse=True)
    logits = np.full((len(C_GRID), (~train).sum(), columns.shape[1]), np.nan)
    todo = np.flatnonzero(both_classes(columns[train]))
    with threadpool_limits(1):  # a thread per label: more inside one small product would only wait for each other
        fits = joblib.Parallel(n_jobs=-1, prefer="threads", return_as="generator")(
            joblib.delayed(fit_label)(x[train], columns[train, k], x[~train]) for k in todo)
        for k, fit in zip(todo, tqdm(fits, total=len(todo), desc="labels", unit="label", disable=None)):
            logits[:, :, k] = fit
    return logits[:, :, where.ravel()]


def choose_c(logits, y):
    """Place in C_GRID of the best macro AUROC of logits (G, R, C) on y (R, C); the middle if nothing can be scored."""
    usable = np.flatnonzero(both_classes(y) & np.isfinite(logits).all(axis=(0, 1)))
    once = np.ones((1, len(y)))
    scores = [[resampled_auroc(y[:, k], z[:, k], once)[0] for k in usable] for z in logits]
    return int(np.argmax(np.mean(scores, axis=1))) if len(usable) else len(C_GRID) // 2


def score_task(logits, y, fold, scored, counts):
    """One encoder on one task: its C, AUROC (1 + S, C') plain and per resample, and p raw and calibrated (R', C').

    logits (G, rows of folds 9 and 10, C); y (R, C); scored: places of the C' labels; counts (S, R') over fold 10.
    """
    _, val, test = split_rows(fold)
    is_val = fold[val | test] == VAL_FOLD
    best = choose_c(logits[:, is_val], y[val])
    z_val, z, y_val, y_test = logits[best][is_val][:, scored], logits[best][~is_val][:, scored], y[val], y[test]
    draws = np.concatenate((np.ones((1, len(z)), dtype=counts.dtype), counts))
    auroc, p, calibrated = np.empty((len(draws), len(scored))), 1 / (1 + np.exp(-z)), np.empty_like(z)
    for k, label in enumerate(scored):
        auroc[:, k] = resampled_auroc(y_test[:, label], z[:, k], draws)
        # Without a positive in fold 9 there is nothing to calibrate with.
        calibrated[:, k] = platt(z_val[:, k], y_val[:, label], z[:, k]) if y_val[:, label].any() else p[:, k]
    return dict(c=C_GRID[best], auroc=auroc, raw=p, platt=calibrated)


def robustness(runs, noisy, y, counts):
    """Macro AUROC at every level of noise, and the mean over levels as a share of the clean one;
    noisy: [(G, H, R', C')]."""
    scores = {}
    for key, run, z in (("macro_auroc", runs[0], noisy[0]), ("untrained", runs[-1], noisy[-1])):
        z, draws = z[C_GRID.index(run["c"])], np.concatenate((np.ones((1, len(y)), dtype=counts.dtype), counts))
        auroc = [macro(np.stack([resampled_auroc(y[:, k], level[:, k], draws) for k in range(y.shape[1])], axis=1))
                 for level in z]
        scores |= {key: [a[0] for a in auroc], f"{key}_ci95": [interval(a[1:]) for a in auroc],
                   f"{key}_kept": np.mean([a[0] for a in auroc]) / macro(run["auroc"])[0]}
    return dict(snr_db=list(NOISE_DB), **scores)


def compare(names, y, fold, logits, counts, noisy=None):
    """JSON entry of a task, and its arrays for predictions.npz; logits: [encoder's, control's] or the control's."""
    train, val, test = split_rows(fold)
    scored = np.flatnonzero(both_classes(y[test]) & both_classes(y[train]))
    frequent = y[test][:, scored].sum(axis=0) >= MIN_POSITIVES
    runs = [score_task(z, y, fold, scored, counts) for z in logits]
    y_test = y[test][:, scored]
    entry = dict(n_labels=len(scored), n_labels_min10=int(frequent.sum()), n_labels_defined=len(names),
                 n_test=int(test.sum()), c=runs[0]["c"], untrained_c=runs[-1]["c"])
    for suffix, chosen in (("", slice(None)), ("_min10", frequent)):
        encoder, control = (macro(run["auroc"][:, chosen]) for run in (runs[0], runs[-1]))
        entry |= {f"macro_auroc{suffix}": encoder[0], f"ci95{suffix}": interval(encoder[1:]),
                  f"untrained{suffix}": control[0], f"untrained_ci95{suffix}": interval(control[1:]),
                  f"difference{suffix}": encoder[0] - control[0],
                  f"difference_ci95{suffix}": interval(encoder[1:] - control[1:])}
    for key, run in (("calibration", runs[0]), ("untrained_calibration", runs[-1])):
        entry[key] = {kind: calibration(run[kind], y_test) for kind in ("raw", "platt")}
    if noisy is not None:
        entry["robustness"] = robustness(runs, [z[..., scored] for z in noisy], y_test, counts)
    # The same seed draws the same patients for every encoder: these samples can be averaged over several runs.
    difference = macro(runs[0]["auroc"]) - macro(runs[-1]["auroc"])
    entry["labels"] = {names[label]: dict(
        auroc=runs[0]["auroc"][0, k], untrained=runs[-1]["auroc"][0, k], positives_train=y[train, label].sum(),
        positives_val=y[val, label].sum(), positives_test=y[test, label].sum()) for k, label in enumerate(scored)}
    return entry, dict(labels=np.array([names[k] for k in scored], dtype=str), y=y_test, p=runs[0]["raw"],
                       p_platt=runs[0]["platt"], p_untrained=runs[-1]["raw"], difference=difference)


def report(result):
    """The protocol and the scores, as text."""
    n, rows = result["n"], {}
    for task, r in result["tasks"].items():
        rows[task] = dict(labels=f"{r['n_labels']}/{r['n_labels_defined']}", C=r["c"],
                          untrained=show(r["untrained"], r["untrained_ci95"]))
        if not result["untrained_only"]:
            rows[task] |= dict(encoder=show(r["macro_auroc"], r["ci95"]),
                               difference=show(r["difference"], r["difference_ci95"]))
        rows[task] |= {"10+": r["n_labels_min10"], "encoder, 10+": show(r["macro_auroc_min10"], r["ci95_min10"])}
        rows[task] |= dict(Brier=r["calibration"]["raw"]["brier"], ECE=r["calibration"]["raw"]["ece"],
                           calibrated=r["calibration"]["platt"]["ece"])
        if "robustness" in r:
            rows[task]["kept under noise"] = r["robustness"]["macro_auroc_kept"]
            rows[task]["untrained keeps"] = r["robustness"]["untrained_kept"]
    return "\n".join((
        f"PTB-XL at {n['rate_hz']} Hz: folds 1-8 train ({n['train']}), fold 9 chooses C and calibrates ({n['val']}), "
        f"fold 10 is scored ({n['test']} recordings, {n['test_patients']} patients); no refit with fold 9",
        f"{n['features']} features; {n['with_gaps']} recordings with missing samples (mean over valid patches), "
        f"{n['unusable']} without a valid patch (taken as the mean recording)",
        "macro AUROC [95 %] over the labels with both classes in folds 1-8 and in fold 10 (of those defined); "
        f"10+: over those with {MIN_POSITIVES} positives or more in fold 10"
        + FEW_NOTE * (n["test_patients"] < FEW_PATIENTS),
        pd.DataFrame.from_dict(rows, orient="index").to_string(na_rep="-", float_format="{:.3g}".format)))


def draw(path, result, arrays):
    """Macro AUROC per label set with intervals, and how reliable the calibrated superclass probabilities are."""
    noise = result["tasks"]["superdiagnostic"].get("robustness")
    figure = Figure(figsize=(12 + 4.4 * bool(noise), 4.8), layout="constrained")
    bars, curve, *more = figure.subplots(1, 2 + bool(noise), width_ratios=(1.7, 1, 1)[:2 + bool(noise)])
    series = {"untrained": ("untrained", "untrained_ci95"), "pre-trained": ("macro_auroc", "ci95")}
    if result["untrained_only"]:
        del series["pre-trained"]
    width = 0.8 / len(series)
    for i, (name, keys) in enumerate(series.items()):
        value, ci = (np.array([result["tasks"][task][key] for task in TASKS], dtype=float) for key in keys)
        at = np.arange(len(TASKS)) + (i - (len(series) - 1) / 2) * width
        drawn = bars.bar(at, value - 0.5, 0.94 * width, bottom=0.5, color=COLORS[name], label=name)
        bars.bar_label(drawn, [f"{v:.3f}" for v in value], label_type="center", fontsize=8)
        bars.vlines(at, *ci.T, color="#333333", linewidth=1)
    labels = [f"{task}\n{result['tasks'][task]['n_labels']} labels" for task in TASKS]
    bars.set(ylim=(0.5, 1), ylabel="macro AUROC, fold 10", xticks=range(len(TASKS)), xticklabels=labels)
    bars.tick_params(axis="x", labelsize=9)
    bars.set_title(f"PTB-XL, {result['n']['test']} test recordings; lines: 95 %, patient bootstrap", loc="left")
    bars.legend(frameon=False, loc="upper left", ncols=2)
    draw_reliability(curve, *(arrays["superdiagnostic"][key] for key in ("labels", "y", "p", "p_platt")))
    for axis in more:
        draw_robustness(axis, noise, series)
    figure.axes[0].spines[["top", "right"]].set_visible(False)
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=150))


def parse_args(argv=None):
    parser = parser_of("Linear probes on PTB-XL, of an encoder and of its untrained control.")
    parser.add_argument("--noise", type=Path, default=argparse.SUPPRESS,
                        help="noise corpus (prepare.py nstdb): score fold 10 under noise too, which takes "
                             "as long again")
    parser.add_argument("--batch", type=int, default=32, help="recordings per forward pass; less if memory runs out")
    return parser.parse_args(argv)


def main(args):
    table, statements, rate = read_tables(args.raw)
    encoders, device = load_encoders(args.encoder, args.device)
    noise = load_noise(open_corpus(args.noise), "test") if "noise" in args else None
    fold, patients = table.strat_fold.to_numpy(), table.patient_id.to_numpy()
    train, val, test = split_rows(fold)
    features, odd = extract_features(encoders, table.path.tolist(), args.batch, device)

    sets = label_sets(table.codes, statements)
    y = np.concatenate([y for _, y in sets.values()], axis=1)
    ends = np.cumsum([len(names) for names, _ in sets.values()])[:-1]
    if noise is not None:
        noisy = noisy_features(encoders, table.path[test].tolist(), noise, args.seed, device)
        features = np.concatenate((features, noisy.reshape(len(encoders), -1, features.shape[2])), axis=1)
    logits = [np.split(fit_labels(x, y, train), ends, axis=2) for x in features]  # [encoder][task]
    n_clean = (~train).sum()
    counts = patient_counts(patients[test], args.seed)
    tasks, arrays = {}, {}
    for i, (task, (names, y)) in enumerate(sets.items()):
        clean, noisy = zip(*((z[i][:, :n_clean], z[i][:, n_clean:]) for z in logits))
        noisy = [z.reshape(len(C_GRID), len(NOISE_DB), test.sum(), -1) for z in noisy] if noise is not None else None
        tasks[task], arrays[task] = compare(names, y, fold, clean, counts, noisy)

    n = dict(rate_hz=rate, train=train.sum(), val=val.sum(), test=test.sum(), features=features.shape[2],
             test_patients=len(set(patients[test])), **odd)
    result = to_json(dict(encoder=args.encoder, raw=str(args.raw), seed=args.seed, untrained_only=len(encoders) == 1,
                          n=n, tasks=tasks))
    print(report(result))
    args.out.mkdir(parents=True, exist_ok=True)
    stored = {f"{task}_{key}": value for task, group in arrays.items() for key, value in group.items()}
    stored |= dict(ecg_id=table.index.to_numpy()[test], patient_id=patients[test])
    atomic_write(args.out / "predictions.npz", lambda path: np.savez_compressed(path, **stored))
    draw(args.out / "ptbxl.png", result, arrays)
    atomic_write(args.out / "ptbxl.json", lambda path: path.write_text(json.dumps(result, indent=1)))
    print(f"wrote {args.out / 'ptbxl.json'}, predictions.npz and ptbxl.png")
