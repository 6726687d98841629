"""What a frozen encoder knows about whole 12-lead ECGs: linear probes on PTB-XL, next to the same network untrained.

    python probe_ptbxl.py --encoder runs/real/encoder.pt --raw raw/ptbxl --out runs/real/ptbxl

The protocol is the PTB-XL benchmark's (Strodthoff et al. 2021): six label sets, in which a statement that is present
counts, whatever its likelihood. Folds 1-8 train, fold 9 chooses the regularisation, fold 10 is scored by macro AUROC.
Recordings without any label of a set stay in it as rows of zeros (the benchmark drops them: about 0.001 of AUROC).
--encoder random:SIZE gives only the untrained control. With --noise, the same probes are also scored on fold 10 under
real noise (minutes 20-30 of the Noise Stress Test records, which are never trained on). --leads I II shows the encoder
these leads alone; --leads-scored does so in folds 9 and 10 only, with a probe that was fitted on --leads.

Writes OUT/report.html, OUT/ptbxl.json, OUT/predictions.npz (fold 10) and OUT/ptbxl.png. 2,000 records and size tiny
take 3 minutes on one core.

Shapes: R recordings, F features, C labels, G values of the regularisation, E encoders, S resamples of patients (the
first row of `counts` is the test set itself).
"""
import ast
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import MultiLabelBinarizer
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from augment import load_noise
from corpus import open_corpus
from ecg import Refused, lead_id, preprocess, read_wfdb
from evaluate import (CALIBRATION_NOTE, COLORS, NOISE_DB, both_classes, calibration, draw_bars, draw_examples,
                      global_features, in_bins, interval, interval_of_seeds, label_auroc, load_encoders, macro, mean_of,
                      noisy_features, only_random, parser_of, plain_auroc, platt, resample, show, show_calibration,
                      standardized, to_json, write_results)

TASKS = ("all", "diagnostic", "subdiagnostic", "superdiagnostic", "form", "rhythm")
TRAIN_FOLDS, VAL_FOLD, TEST_FOLD = range(1, 9), 9, 10  # the publisher's folds; a patient is in one fold only
RECORD_S = 10                    # s that are read, the length of every PTB-XL recording
C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C, the inverse strength of the L2 penalty
MIN_POSITIVES = 10               # positives in fold 10 below which the AUROC of a label is mostly noise
FEW_PATIENTS = 1000              # in fold 10 (all of PTB-XL has about 1,900), below which the report warns


# ---- recordings, labels and features --------------------------------------------------------------------------------
def read_tables(raw):
    """PTB-XL's recordings (with `codes` and `path`), its SCP statements, and the rate in Hz of the files at `path`.

    It is 500 Hz if every file of that rate is there, otherwise 100 Hz. ValueError if this is not PTB-XL, or incomplete.
    """
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        if not (raw / name).is_file():
            raise ValueError(f"no {name} in {raw}: expected PTB-XL's own folder, which "
                             f"`python prepare.py ptbxl --raw {raw} --out DIR --download` fetches")
    table = pd.read_csv(raw / "ptbxl_database.csv", index_col="ecg_id")
    table["codes"] = [sorted(ast.literal_eval(codes)) for codes in table.scp_codes]
    for rows, folds in zip(split_rows(table.strat_fold.to_numpy()), ("1 to 8", VAL_FOLD, TEST_FOLD)):
        if not rows.any():
            raise ValueError(f"{raw / 'ptbxl_database.csv'} has no recording of fold {folds}: 1-8, 9 and 10 are needed")
    for rate, column in ((500, "filename_hr"), (100, "filename_lr")):
        table["path"] = [str(raw / name) for name in table[column]]
        absent = [path for path in table.path if not Path(f"{path}.hea").is_file()]
        if not absent:
            return table, pd.read_csv(raw / "scp_statements.csv", index_col=0), rate
    raise ValueError(f"{len(absent)} of the {len(table)} recordings in {raw / 'ptbxl_database.csv'} are absent, "
                     f"for example {absent[0]}.hea: fetch the rest, or delete their rows in the table")


def split_rows(fold):
    """Masks (R,) of the rows for training, validation and test; fold (R,)."""
    return np.isin(fold, TRAIN_FOLDS), fold == VAL_FOLD, fold == TEST_FOLD


def label_sets(codes, statements):
    """{task: (names, y (R, C) bool)} from the statements in each of R recordings, as in the benchmark."""
    every = {*statements.index}.union(*codes)
    kinds = {kind: statements[statements[kind] == 1] for kind in ("diagnostic", "form", "rhythm")}
    labels = {kind: dict(zip(rows.index, rows.index)) for kind, rows in kinds.items()} | {  # task: {statement: label}
        "all": dict(zip(every, every)),
        "subdiagnostic": kinds["diagnostic"].diagnostic_subclass.dropna().to_dict(),
        "superdiagnostic": kinds["diagnostic"].diagnostic_class.dropna().to_dict()}
    sets = {}
    for task in TASKS:
        names = sorted(set(labels[task].values()))
        present = [[labels[task][code] for code in row if code in labels[task]] for row in codes]
        sets[task] = names, MultiLabelBinarizer(classes=names).fit_transform(present).astype(bool)
    return sets


def read_recordings(paths, leads=None):
    """Yield the first RECORD_S of each record, an ecg.Recording; leads: of each record the names of the leads that are
    shown, or None. ValueError that names a file that cannot be read, or that lacks one of these leads."""
    for path, names in zip(paths, leads or [None] * len(paths)):
        try:
            recording = read_wfdb(path)
        except Refused as error:
            raise ValueError(f"{path}: {error}") from None
        signal, ids = recording.signal[:round(RECORD_S * recording.fs)], [lead_id(name) for name in recording.leads]
        absent = [name for name in names or () if lead_id(name) not in ids]
        if absent:
            raise ValueError(f"{path} has no lead {', '.join(absent)}; it has {', '.join(recording.leads)}")
        if names:
            signal, recording = signal[:, [ids.index(lead_id(name)) for name in names]], recording._replace(leads=names)
        yield recording._replace(signal=signal)


def extract_features(encoders, paths, leads=None):
    """Global features (E, R, 3D) of R recordings, and how many have gaps and are unusable (NaN); leads: of each."""
    features = global_features(encoders, lambda: read_recordings(paths, leads))
    usable = np.isfinite(features[0]).all(axis=1)
    if not usable.any():
        raise ValueError(f"none of the {len(paths)} recordings is usable, for example {paths[0]}: check their signals")
    # {}: embed has warned of what looks odd.
    gaps = [np.isnan(preprocess(*r[:4], {})[0]).any() for r, ok in zip(read_recordings(paths, leads), usable) if ok]
    return features, dict(with_gaps=sum(gaps), unusable=(~usable).sum())


# ---- probes ---------------------------------------------------------------------------------------------------------
def fit_label(x, y, x_new):
    """Logits (G, R') of one label's logistic regression at every C; x (R, F), y (R,) bool, x_new (R', F)."""
    # Each fit starts at the last solution. The default tolerance costs at most 0.001 of macro AUROC up to C 0.1.
    model = LogisticRegression(warm_start=True, max_iter=2000)       # it takes up to 300, at the weakest penalty
    return np.array([model.set_params(C=c).fit(x, y).decision_function(x_new) for c in C_GRID])


def fit_labels(features, y, train):
    """Fit the labels y (R, C) on the rows in train (R,) bool. Returns logits (G, R', C) of all other rows.

    features (R, F), or with more rows at the end, which then follow in the logits. A label without both classes in
    train gets NaN. Equal columns are fitted once (a statement is in several sets), in threads that share the features.
    """
    columns, where = np.unique(y[train], axis=1, return_inverse=True)
    train = np.pad(train, (0, len(features) - len(train)))
    x_train, x_new = standardized(features[train], features[~train])
    logits = np.full((len(C_GRID), len(x_new), columns.shape[1]), np.nan)
    todo = np.flatnonzero(both_classes(columns))
    with threadpool_limits(1):  # a thread per label: several threads in one small product would wait for each other
        fits = joblib.Parallel(n_jobs=-1, prefer="threads", return_as="generator")(
            joblib.delayed(fit_label)(x_train, columns[:, k], x_new) for k in todo)
        for k, fit in zip(todo, tqdm(fits, total=len(todo), desc="labels", unit="label", disable=None)):
            logits[:, :, k] = fit
    return logits[:, :, where.ravel()]


def choose_c(logits, y):
    """Index in C_GRID of the best macro AUROC of logits (G, R, C) on y (R, C); the middle if nothing can be scored."""
    usable = both_classes(y) & np.isfinite(logits).all(axis=(0, 1))
    scores = [plain_auroc(y[:, usable], z[:, usable]).mean() for z in logits] if usable.any() else []
    return int(np.argmax(scores)) if scores else len(C_GRID) // 2


def score_task(logits, y, fold, scored, patient, counts):
    """One encoder on one task: its C; AUROC (S, C') of the labels with indices `scored`; probabilities (R', C') of
    fold 10, raw and calibrated, and their calibration; macro AUROC (S,) at each level of noise. Arguments as in
    compare."""
    train, val, test = split_rows(fold)
    is_val = fold[val | test] == VAL_FOLD
    best = choose_c(logits[:, :len(is_val)][:, is_val], y[val])
    z, noisy = np.split(logits[best][:, scored], [len(is_val)])
    z_val, z, y_test = z[is_val], z[~is_val], y[test][:, scored]
    calibrated = [platt(z_val[:, k], y[val, label], z[:, k]) for k, label in enumerate(scored)]
    levels = noisy.reshape(len(noisy) // len(z), *z.shape)
    p = dict(raw=expit(z), platt=np.reshape(calibrated, z.T.shape).T)
    prevalence = y[train][:, scored].mean(axis=0)
    return dict(c=C_GRID[best], auroc=label_auroc(y_test, z, patient, counts), **p,
                calibration={kind: calibration(p[kind], y_test, prevalence, patient) for kind in p},
                noisy=np.array([macro(label_auroc(y_test, level, patient, counts)) for level in levels]))


def compare(names, y, fold, logits, control_of, patient, counts):
    """JSON entry of a task and its arrays for predictions.npz. names (C,), y (R, C), fold (R,); logits (G, rows, C) of
    each network, of folds 9 and 10, then of fold 10 at each level of noise; control_of: see load_encoders; patient,
    counts: see resample. Scores are means over encoders."""
    train, val, test = split_rows(fold)
    scored = np.flatnonzero(both_classes(y[test]) & both_classes(y[train]))
    y_test = y[test][:, scored]
    frequent = y_test.sum(axis=0) >= MIN_POSITIVES
    networks = [score_task(z, y, fold, scored, patient, counts) for z in logits]
    runs = {"macro_auroc": networks[:len(control_of)], "untrained": [networks[k] for k in control_of]}
    entry = dict(n_labels=len(scored), n_labels_min10=frequent.sum(), n_labels_defined=len(names), n_test=test.sum(),
                 c=[run["c"] for run in runs["macro_auroc"]], untrained_c=[run["c"] for run in runs["untrained"]])
    for suffix, chosen in (("_min10", frequent), ("", slice(None))):
        a, b = (np.stack([macro(run["auroc"][:, chosen]) for run in of]) for of in runs.values())    # (E, S)
        for key, ci, x in (("macro_auroc", "ci95", a), ("untrained", "untrained_ci95", b),
                           ("difference", "difference_ci95", a - b)):
            entry |= {f"{key}{suffix}": x[:, 0].mean(), f"{ci}{suffix}": interval_of_seeds(x, counts.shape[1])}
            entry.setdefault("each", {}).setdefault(f"{key}{suffix}", x[:, 0].tolist())
            entry["each"][f"{ci}{suffix}"] = [interval(one[1:]) for one in x]
    for key, of in zip(("calibration", "untrained_calibration"), runs.values()):
        entry[key] = mean_of([run["calibration"] for run in of])
    if len(networks[0]["noisy"]):
        entry["robustness"] = noise = dict(snr_db=NOISE_DB)
        levels = {key: np.stack([run["noisy"] for run in of], axis=1) for key, of in runs.items()}   # (H, E, S)
        for key, x in (*levels.items(), ("difference", levels["macro_auroc"] - levels["untrained"])):
            noise |= {key: x[:, :, 0].mean(axis=1).tolist(),
                      f"{key}_ci95": [interval_of_seeds(level, counts.shape[1]) for level in x]}
        noise |= {f"{key}_kept": (np.mean(noise[key]) - 0.5) / (entry[key] - 0.5) for key in runs}   # 0.5 is chance
    auroc, untrained = (np.mean([run["auroc"][0] for run in of], axis=0) for of in runs.values())
    entry["labels"] = {names[label]: dict(
        auroc=auroc[k], untrained=untrained[k], positives_train=y[train, label].sum(),
        positives_val=y[val, label].sum(), positives_test=y[test, label].sum()) for k, label in enumerate(scored)}
    # The same seed draws the same patients in every run of this program. One encoder: (R', C), several: (E, R', C);
    # of the controls that of the first encoder.
    p, p_platt = (np.stack([run[kind] for run in runs["macro_auroc"]]) for kind in ("raw", "platt"))
    p, p_platt = (p[0], p_platt[0]) if len(p) == 1 else (p, p_platt)
    return entry, dict(labels=np.array([names[k] for k in scored], dtype=str), y=y_test, p=p, p_platt=p_platt,
                       p_untrained=runs["untrained"][0]["raw"], difference=(a - b).mean(axis=0))


# ---- report and pictures --------------------------------------------------------------------------------------------
def report(result):
    """The protocol and the scores, as text."""
    n, alone, rows = result["n"], result["untrained_only"], {}
    for task, r in result["tasks"].items():
        noise = r.get("robustness", {})
        rows[task] = {"labels": f"{r['n_labels']}/{r['n_labels_defined']}", "C": " ".join(map("{:g}".format, r["c"])),
                      "untrained": show(r["untrained"], r["untrained_ci95"]),
                      "encoder": None if alone else show(r["macro_auroc"], r["ci95"]),
                      "difference": None if alone else show(r["difference"], r["difference_ci95"]),
                      "10+": r["n_labels_min10"], "encoder, 10+": show(r["macro_auroc_min10"], r["ci95_min10"]),
                      **{f"{name}{key}": show_calibration(r["calibration"][kind])[key]
                         for kind, name in (("raw", ""), ("platt", "Platt: ")) for key in ("Brier skill", "ECE", "z")},
                      "kept under noise": noise.get("macro_auroc_kept"), "untrained keeps": noise.get("untrained_kept")}
    table = pd.DataFrame.from_dict(rows, orient="index").dropna(axis=1, how="all")
    return "\n".join((
        f"PTB-XL at {n['rate_hz']} Hz: folds 1-8 train ({n['train']}), fold 9 chooses C and calibrates ({n['val']}), "
        f"fold 10 is scored ({n['test']} recordings, {n['test_patients']} patients); no refit with fold 9",
        f"encoders: {' '.join(result['encoder'])}" + ("; means, intervals over seeds and patients" if
                                                     len(result["encoder"]) > 1 else "; one seed: intervals are over "
                                                     "patients alone"),
        f"leads: {' '.join(result['leads']) or 'all'}; of folds 9 and 10: {' '.join(result['leads_scored']) or 'all'}",
        f"{n['features']} features; {n['with_gaps']} recordings with missing samples (mean over valid patches), "
        f"{n['unusable']} without a valid patch (taken as the mean recording)",
        "macro AUROC [95 %] over the labels with both classes in folds 1-8 and in fold 10 (of those defined); "
        f"10+: over those with {MIN_POSITIVES} positives or more in fold 10",
        CALIBRATION_NOTE + "; Platt: the same after a sigmoid fitted on fold 9",
        *["few test patients: the intervals are wide, and labels with few positives change the macro over all labels"]
        * (n["test_patients"] < FEW_PATIENTS),
        table.to_string(na_rep="-", float_format="{:.3g}".format)))


def draw(result, arrays):
    """Figure: macro AUROC of each label set, reliability of the superclasses, and the superclasses under noise."""
    tasks, noise = result["tasks"], result["tasks"]["superdiagnostic"].get("robustness")
    keys = {"untrained": ("untrained", "untrained_ci95")} | (
        {} if result["untrained_only"] else {"pre-trained": ("macro_auroc", "ci95")})
    figure = Figure(figsize=(16.4 if noise else 12, 4.8), layout="constrained")
    bars, curve, *more = figure.subplots(1, 3 if noise else 2, width_ratios=(1.7, 1, 1) if noise else (1.7, 1))
    draw_bars(bars, [f"{task}\n{tasks[task]['n_labels']} labels" for task in TASKS],
              {name: [[tasks[task][key] for task in TASKS] for key in pair] for name, pair in keys.items()})
    bars.set_ylabel("macro AUROC, fold 10")
    bars.set_title(f"PTB-XL, {result['n']['test']} test recordings; lines: 95 %, patient bootstrap", loc="left")
    bars.legend(frameon=False, loc="upper left", ncols=2)
    labels, y, p = (arrays[f"superdiagnostic_{key}"] for key in ("labels", "y", "p_platt"))
    draw_reliability(curve, labels, y, p if p.ndim == 2 else p[0])
    curve.set_title("Reliability of the superclasses; bars: a perfect model", loc="left")
    for axis in more:                            # none without noise
        levels = [str(db) for db in NOISE_DB]
        for name, (key, _) in keys.items():
            ci = np.array(noise[f"{key}_ci95"], dtype=float)         # None becomes NaN
            axis.fill_between(levels, *ci.T, color=COLORS[name], alpha=0.3, linewidth=0)
            axis.plot(levels, np.array(noise[key], dtype=float), marker="o", color=COLORS[name], label=name)
        axis.set(xlabel="signal-to-noise ratio (dB)", ylabel="macro AUROC")
        axis.set_title("Superclasses under noise", loc="left")
        axis.legend(frameon=False, fontsize=8)
    return figure


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
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def examples(encoder, x, table, superclasses, c, stored, leads):
    """Confident superclasses in fold 10, by evaluate.draw_examples; x (R, F), superclasses: of label_sets."""
    train, _, test = split_rows(table.strat_fold.to_numpy())
    labels, y, p = (stored[f"superdiagnostic_{key}"] for key in ("labels", "y", "p_platt"))
    y_train = superclasses[1][train][:, np.isin(superclasses[0], labels)]

    def fit(rows):
        return fit_labels(np.concatenate((x[train], rows)), y_train, np.ones(len(y_train), bool))[C_GRID.index(c)]

    def show_row(row):
        recording, = read_recordings([table.path[test].iloc[row]], [leads])
        return f"ecg_id {table.index[test][row]}", recording, True
    return draw_examples(encoder, x[train], fit, labels, p if p.ndim == 2 else p[0], y,
                         table.patient_id[test].to_numpy(), show_row)


# ---- command line ---------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = parser_of("Linear probes on PTB-XL, for an encoder and its untrained control.", "raw/ptbxl")
    parser.add_argument("--noise", type=Path, help="prepared noise, such as data/nstdb: also score fold 10 under it")
    parser.add_argument("--leads", nargs="+", metavar="NAME",
                        help="leads that the encoder sees, such as I II (default: all of a recording)")
    parser.add_argument("--leads-scored", nargs="+", metavar="NAME",
                        help="leads of folds 9 and 10, for a probe that was fitted on --leads (default: --leads)")
    return parser.parse_args(argv)


def main(args):
    table, statements, rate = read_tables(args.raw)
    encoders, control_of = load_encoders(args.encoder, args.device, args.precision)
    noise = load_noise(open_corpus(args.noise), "test") if args.noise else None
    fold, patients = table.strat_fold.to_numpy(), table.patient_id.to_numpy()
    train, val, test = split_rows(fold)
    shown = args.leads_scored or args.leads
    features, odd = extract_features(encoders, table.path.tolist(), [args.leads if t else shown for t in train])
    if noise is not None:
        noisy = noisy_features(encoders, lambda: read_recordings(table.path[test], [shown] * test.sum()), noise,
                               args.seed)
        features = np.concatenate((features, noisy.reshape(len(encoders), -1, features.shape[2])), axis=1)

    sets = label_sets(table.codes, statements)
    all_labels = np.concatenate([y for _, y in sets.values()], axis=1)
    logits = [fit_labels(x, all_labels, train) for x in features]
    patient, counts = resample(patients[test], args.seed)
    counts = np.concatenate((np.ones_like(counts[:1]), counts))      # first the test set itself
    ends = np.cumsum([len(names) for names, _ in sets.values()])[:-1]
    tasks, stored = {}, dict(ecg_id=table.index.to_numpy()[test], patient_id=patients[test])
    for (task, (names, y)), *of_task in zip(sets.items(), *(np.split(z, ends, axis=2) for z in logits)):
        tasks[task], arrays = compare(names, y, fold, of_task, control_of, patient, counts)
        stored |= {f"{task}_{key}": value for key, value in arrays.items()}

    n = dict(rate_hz=rate, train=train.sum(), val=val.sum(), test=test.sum(), features=features.shape[2],
             test_patients=counts.shape[1], **odd)
    result = to_json(dict(encoder=args.encoder, raw=str(args.raw), seed=args.seed, untrained_only=only_random(args),
                          leads=args.leads or [], leads_scored=shown or [], n=n, tasks=tasks))
    print(report(result))
    papers = examples(encoders[0], features[0, :len(table)], table, sets["superdiagnostic"],
                      tasks["superdiagnostic"]["c"][0], stored, shown)
    write_results(args, "ptbxl", result, stored, draw(result, stored), report(result), encoders,
                  read_recordings(table.path[test]), papers)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"probe_ptbxl.py: {error}")
