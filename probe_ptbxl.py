"""What a frozen encoder knows about whole 12-lead ECGs: probes on PTB-XL, next to the same network untrained.

    python probe_ptbxl.py --encoder runs/real/encoder.pt --raw raw/ptbxl --out runs/real/ptbxl

The protocol is the PTB-XL benchmark's (Strodthoff et al. 2021): six label sets, in which a statement that is present
counts, whatever its likelihood. Folds 1-8 train, fold 9 chooses the regularisation, fold 10 is scored by macro AUROC.
Recordings without any label of a set stay in it as rows of zeros (the benchmark drops them: about 0.001 of AUROC).
The linear probe is also fitted on 10 % and 1 % of the training patients. --encoder random:SIZE gives only the untrained
control. --help says what else can be scored. Noise is minutes 20-30 of the Noise Stress Test records, which are never
trained on. Writes report.html, ptbxl.json, predictions.npz (fold 10) and ptbxl.png in OUT. 2,000 records, size tiny,
one core: 5 minutes.

Shapes: R recordings, R' those of fold 9 and then of fold 10, T those of fold 10, F features, C labels, G values of the
regularisation, E encoders, E' these and their controls, S resamples of patients (the first row of `counts` is the test
set itself), K kinds and H levels of noise, M local features of width D.
"""
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.special import expit
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from augment import load_noise, snr_of_leads
from corpus import open_corpus
from ecg import LEADS, Refused, lead_id, read_wfdb
from evaluate import (CALIBRATION_NOTE, NOISE_DB, NOISE_KINDS, NOISE_NOTE, SCORES, both_classes, calibration,
                      draw_bars, draw_examples, draw_reliability, draw_scores, fine_tune, fit_attention, fit_logistic,
                      global_features, label_auroc, load_encoders, local_features, macro, mean_of, noisy_features,
                      paired, parser_of, plain_auroc, platt, resample, stacked, table, to_json, write_results)
from prepare import PTBXL_SETS, label_sets, read_ptbxl

FOLDS = {"1 to 8": range(1, 9), "9": [9], "10": [10]}  # train, choose, are scored; a patient is in one fold only
RECORD_S = 10                    # s that are read, the length of every PTB-XL recording
C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C, the inverse strength of the L2 penalty
MIN_POSITIVES = 10               # positives in fold 10 below which the AUROC of a label is mostly noise
SHORT = {"superdiagnostic": 1, "all": MIN_POSITIVES}  # sets of the curves, and positives in fold 10 that a label needs
SHARES, DRAWS = (0.1, 0.01), 5   # of the training patients, nested; draws of them
LEAD_SETS = {"12": LEADS[1:13], "8": ("I", "II", *LEADS[7:13]), "6 limb": LEADS[1:7], "I II V2": ("I", "II", "V2"),
             "I II": ("I", "II"), **{name: (name,) for name in LEADS[1:13]}, "I unnamed": ("I",)}
SNR_RECORDINGS = 200             # of fold 10, to measure the SNR of single leads


# ---- recordings, labels and features --------------------------------------------------------------------------------
def read_tables(raw):
    """prepare.read_ptbxl; ValueError if a fold has no recording, or if a recording is absent."""
    table, statements, rate = read_ptbxl(raw)
    for name, folds in FOLDS.items():
        if not table.strat_fold.isin(folds).any():
            raise ValueError(f"{raw / 'ptbxl_database.csv'} has no recording of fold {name}: 1-8, 9 and 10 are needed")
    absent = [path for path in table.path if not Path(f"{path}.hea").is_file()]
    if absent:
        raise ValueError(f"{len(absent)} of the {len(table)} recordings in {raw / 'ptbxl_database.csv'} are absent, "
                         f"for example {absent[0]}.hea: fetch the rest, or delete their rows in the table")
    return table, statements, rate


def read_recordings(paths, leads=None):
    """Yield the first RECORD_S of each record, an ecg.Recording, once for each of its sets of leads. leads: of each
    record these sets, {name: names of leads, or None for all}, which are unknown leads if the name says unnamed; or its
    only set. ValueError that names a file that cannot be read, or that lacks one of these leads."""
    for path, sets in zip(paths, leads or [None] * len(paths)):
        try:
            recording = read_wfdb(path)
        except Refused as error:
            raise ValueError(f"{path}: {error}") from None
        whole, ids = recording.signal[:round(RECORD_S * recording.fs)], [lead_id(name) for name in recording.leads]
        for name, shown in (sets if isinstance(sets, dict) else {"": sets}).items():
            shown = shown or recording.leads
            absent = [lead for lead in shown if lead_id(lead) not in ids]
            if absent:
                raise ValueError(f"{path} has no lead {', '.join(absent)}; it has {', '.join(recording.leads)}")
            yield recording._replace(signal=whole[:, [ids.index(lead_id(lead)) for lead in shown]],
                                     leads=[LEADS[0]] * len(shown) if "unnamed" in name else list(shown))


def extract_features(encoders, paths, leads=None):
    """Global features (E, R, 3D) of R recordings, and how many are unusable (NaN); leads: of each."""
    features = global_features(encoders, lambda: read_recordings(paths, leads))
    usable = np.isfinite(features[0]).all(axis=1)
    if not usable.any():
        raise ValueError(f"none of the {len(paths)} recordings is usable, for example {paths[0]}: check their signals")
    return features, (~usable).sum()


# ---- linear probes --------------------------------------------------------------------------------------------------
class Data:
    """What is known of the recordings besides the ECG. sets: {task: (names (C,), y (R, C) bool)}; fold, patients (R,).
    Labels of all sets lie side by side in y, those of a task in `columns`; in `short` only sets of the curves are not
    empty, so that others are not fitted. control_of: see load_encoders. number (T,) and counts (S, patients): see
    resample, of the patients of fold 10."""

    def __init__(self, sets, fold, patients, control_of, seed=0):
        self.sets, self.patients, self.control_of, self.seed = sets, patients, control_of, seed
        self.train, self.val, self.test = (np.flatnonzero(np.isin(fold, of)) for of in FOLDS.values())
        self.scored = np.append(self.val, self.test)                   # (R',)
        self.y = np.concatenate([y for _, y in sets.values()], axis=1)
        self.short = np.concatenate([y & (task in SHORT) for task, (_, y) in sets.items()], axis=1)
        ends = np.cumsum([len(names) for names, _ in sets.values()])
        self.columns = {task: slice(end - len(sets[task][0]), end) for task, end in zip(sets, ends)}
        self.number, counts = resample(patients[self.test], seed)
        self.counts = np.concatenate((np.ones_like(counts[:1]), counts))

    def few(self, share, draw):
        """The recordings of a share of the training patients."""
        patients = self.patients[self.train]
        order = np.random.default_rng([self.seed, draw]).permutation(np.unique(patients))
        return self.train[np.isin(patients, order[:math.ceil(share * len(order))])]


def of_each(function, *networks):
    """[function(...) of each network], side by side on parts of the cores, as most steps of a probe use few of them."""
    workers = min(len(networks[0]), torch.get_num_threads())
    with threadpool_limits(torch.get_num_threads() // workers), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, *networks))


def fit_labels(x, y):
    """Fit every label of y (R, C) bool on x (R, F) at every C. Returns a function of features (N, F): logits (G, N, C),
    NaN for a label without both classes. The mean takes the place of NaN in features."""
    columns, where = np.unique(y, axis=1, return_inverse=True)         # a statement is in several sets
    scaler, todo = StandardScaler().fit(x), np.flatnonzero(both_classes(columns))

    def scaled(rows):
        return np.nan_to_num(scaler.transform(rows.astype(np.float64)), copy=False)

    weights = np.full((len(C_GRID), x.shape[1] + 1, columns.shape[1]), np.nan)
    weights[:, :, todo] = fit_logistic(scaled(x), columns[:, todo], C_GRID)
    return lambda rows: (scaled(rows) @ weights[:, :-1] + weights[:, -1:])[..., where.ravel()]


def choose_c(logits, y):
    """Index in C_GRID of the best macro AUROC of logits (G, R, C) on y (R, C); the middle if nothing can be scored."""
    usable = both_classes(y) & np.isfinite(logits).all(axis=(0, 1))
    scores = [plain_auroc(y[:, usable], z[:, usable]).mean() for z in logits] if usable.any() else []
    return int(np.argmax(scores)) if scores else len(C_GRID) // 2


def score_task(logits, task, data, calibrated=False):
    """One network on one task, by its logits (G, R', all labels): its C; AUROC (S, C') in fold 10 of the labels with
    indices `labels`, which have both classes in folds 1-8 and in fold 10; if calibrated, probabilities (T, C') of fold
    10, raw and by Platt, and their calibration. A label that could not be fitted counts as a constant, .5."""
    y, N = data.sets[task][1], len(data.val)
    labels = np.flatnonzero(both_classes(y[data.train]) & both_classes(y[data.test]))
    best = choose_c(logits[:, :N, data.columns[task]], y[data.val])
    z_val, z = np.split(np.nan_to_num(logits[best, :, data.columns[task]][:, labels]), [N])
    y_val, y_test = (y[rows][:, labels] for rows in (data.val, data.test))
    found = dict(c=C_GRID[best], labels=labels, auroc=label_auroc(y_test, z, data.number, data.counts))
    if calibrated:
        p = [platt(z_val[:, k], y_val[:, k], z[:, k]) for k in range(len(labels))]
        found |= dict(raw=expit(z), platt=np.reshape(p, z.T.shape).T)
        found["calibration"] = {kind: calibration(found[kind], y_test, y[data.train][:, labels].mean(axis=0),
                                                  data.number) for kind in ("raw", "platt")}
    return found


def compare(logits, task, data):
    """JSON entry of a task, with means over encoders, and its arrays for predictions.npz: of one encoder (T, C'), of
    several (E, T, C'), of the controls that of the first; logits (G, R', all labels) of each network."""
    (names, y), networks = data.sets[task], of_each(lambda z: score_task(z, task, data, calibrated=True), logits)
    labels, (y_train, y_val, y_test) = networks[0]["labels"], (y[rows] for rows in (data.train, data.val, data.test))
    frequent = y_test[:, labels].sum(axis=0) >= MIN_POSITIVES
    runs = {"macro_auroc": networks[:len(data.control_of)], "untrained": [networks[k] for k in data.control_of]}
    entry = dict(n_labels=len(labels), n_labels_min10=frequent.sum(), n_labels_defined=len(names), n_test=len(y_test),
                 c=[run["c"] for run in runs["macro_auroc"]], untrained_c=[run["c"] for run in runs["untrained"]])
    for suffix, chosen in (("_min10", frequent), ("", slice(None))):
        a, b = (np.stack([macro(run["auroc"][:, chosen]) for run in of]) for of in runs.values())    # (E, S)
        each, found = entry.get("each", {}), paired(a, b, data.counts.shape[1], suffix)
        entry |= found | dict(each=each | found["each"])
    for key, of in zip(("calibration", "untrained_calibration"), runs.values()):
        entry[key] = mean_of([run["calibration"] for run in of])
    auroc, untrained = (np.mean([run["auroc"][0] for run in of], axis=0) for of in runs.values())
    entry["labels"] = {names[label]: dict(
        auroc=auroc[k], untrained=untrained[k], positives_train=y_train[:, label].sum(),
        positives_val=y_val[:, label].sum(), positives_test=y_test[:, label].sum()) for k, label in enumerate(labels)}
    p, p_platt = (np.stack([run[kind] for run in runs["macro_auroc"]]) for kind in ("raw", "platt"))
    p, p_platt = (p[0], p_platt[0]) if len(p) == 1 else (p, p_platt)
    return entry, dict(labels=np.array([names[k] for k in labels], dtype=str), y=y_test[:, labels], p=p,
                       p_platt=p_platt, p_untrained=runs["untrained"][0]["raw"], difference=(a - b).mean(axis=0))


def probe_features(features, data):
    """Linear probes of features (E', R, F): the fits; the JSON entries and the arrays of compare; label_fractions."""
    fits = of_each(lambda x: fit_labels(x[data.train], data.y[data.train]), features)
    logits = of_each(lambda fit, x: fit(x[data.scored]), fits, features)
    found = {task: compare(logits, task, data) for task in data.sets}
    stored = {f"{task}_{key}": value for task, (_, arrays) in found.items() for key, value in arrays.items()}
    return fits, {task: entry for task, (entry, _) in found.items()}, stored, label_fractions(features, logits, data)


# ---- curves: few labels, few leads, noise ---------------------------------------------------------------------------
def macro_scores(logits, data):
    """Macro AUROC (tasks of SHORT, E', S) in fold 10; logits (G, R', all labels) of each network."""
    found = []
    for task, at_least in SHORT.items():
        runs = of_each(lambda z: score_task(z, task, data), logits)
        enough = data.sets[task][1][data.test][:, runs[0]["labels"]].sum(axis=0) >= at_least
        found.append([macro(run["auroc"][:, enough]) for run in runs])
    return np.array(found)


def as_entries(data, *draws, signed=False):
    """{task of SHORT: evaluate.paired} of macro_scores, one or several draws of them. Intervals of one encoder are over
    draws and patients, those of several over seeds and patients, of the mean over draws."""
    E, entries = len(data.control_of), {}
    for task, x in zip(SHORT, np.stack(draws, axis=2)):                                      # (E', draws, S)
        a, b = (of[0] if E == 1 else of.mean(axis=1) for of in (x[:E], x[data.control_of]))
        entries[task] = paired(a, b, data.counts.shape[1], signed=signed)
    return entries


def label_fractions(features, logits, data):
    """{share of the training patients: as_entries of the probes that are fitted on it}; logits: of all of them. A draw
    of 1 % is part of one of 10 %; fold 9 is whole."""
    return {1: as_entries(data, macro_scores(logits, data))} | {share: as_entries(data, *(
        macro_scores(of_each(lambda x: fit_labels(x[some], data.short[some])(x[data.scored]), features), data)
        for some in (data.few(share, draw) for draw in range(DRAWS)))) for share in SHARES}


def leads_curve(encoders, paths, fits, data):
    """{"same": {lead set: as_entries} by probes that are fitted on each of LEAD_SETS, "moved": by `fits`}."""
    found, curve = global_features(encoders, lambda: read_recordings(paths, [LEAD_SETS] * len(paths))), {}
    for number, name in enumerate(LEAD_SETS):
        x = found[:, number::len(LEAD_SETS)]
        own = of_each(lambda each: fit_labels(each[data.train], data.short[data.train]), x)
        for kind, of in (("same", own), ("moved", fits)):
            curve.setdefault(kind, {})[name] = as_entries(data, macro_scores(
                [fit(each[data.scored]) for fit, each in zip(of, x)], data))
    return curve


def noise_curve(features, noisy, fits, data):
    """{kind of noise: {level in dB, or "area": as_entries}}; noisy (E', K, H, T, F). The area between AUROC and chance
    is the mean over levels of AUROC - .5."""
    curve = {}
    for k, kind in enumerate(NOISE_KINDS):
        rows = [np.append(features[:, data.val], noisy[:, k, h], axis=1) for h in range(len(NOISE_DB))]
        x = [macro_scores([fit(part) for fit, part in zip(fits, level)], data) for level in rows]
        curve[kind] = {str(db): as_entries(data, level) for db, level in zip(NOISE_DB, x)}
        curve[kind]["area"] = as_entries(data, np.mean(x, axis=0) - 0.5, signed=True)
    return curve


# ---- other heads: attention, fine-tuning ----------------------------------------------------------------------------
def other_heads(args, encoders, paths, leads, data):
    """{"attention": superclasses by evaluate.fit_attention; "fine_tuned": {share of the training patients: these by
    evaluate.fine_tune}}, as asked for. Encoders themselves learn there, with the labels of the first draw of
    label_fractions, and controls do so from scratch. leads: names for each recording, or None."""
    found, most = {}, max(len(names or LEAD_SETS["12"]) for names in leads)
    if args.attention:
        found["attention"] = superclasses(encoders, data, lambda encoder, y: fit_attention(
            local_features(encoder, read_recordings(paths, leads), len(paths), most, RECORD_S),
            y, data.train, data.val, data.test, data.seed))
    if args.fine_tune:                           # the other four leads follow from I and II
        names = list(dict.fromkeys(name for of in leads for name in of or ("I", "II", *LEADS[7:13])))
        signal = stacked(read_recordings(paths, leads), len(paths), names, RECORD_S)
        found["fine_tuned"] = {share: superclasses(encoders, data, lambda encoder, y: fine_tune(
            encoder, signal, names, y, data.few(share, 0), data.val, data.test, data.seed)[0])
            for share in (1, *SHARES)}
    return found


def superclasses(encoders, data, head):
    """evaluate.paired; head(encoder, y (R, C) bool of the labels that can be scored): logits (T, C)."""
    y = data.sets["superdiagnostic"][1]
    y = y[:, both_classes(y[data.train]) & both_classes(y[data.test])]
    x = np.stack([macro(label_auroc(y[data.test], head(each, y), data.number, data.counts)) for each in encoders])
    return paired(x[:len(data.control_of)], x[data.control_of], data.counts.shape[1])


# ---- report and pictures --------------------------------------------------------------------------------------------
def report(result):
    """The protocol and the scores, as text."""
    n, tasks = result["n"], result["tasks"]
    scores = {"untrained": "untrained"} | ({} if result["untrained_only"] else {
        "encoder": "macro_auroc", "difference": "difference"})
    heads = {"superdiagnostic, attention": result["attention"]} if "attention" in result else {}
    heads |= {f"superdiagnostic, fine-tuned, {float(x):.0%}": of for x, of in result.get("fine_tuned", {}).items()}
    calibrated = {"skill": "brier_skill", "ECE": "ece", "perfect": "ece_perfect", "z": "z"}
    of_tasks = {"labels": "n_labels", "of": "n_labels_defined", "C": "c", **scores, "10+": "n_labels_min10",
                "encoder, 10+": "macro_auroc_min10"}
    for kind, note in (("raw", ""), ("platt", "Platt's ")):
        of_tasks |= {note + heading: f"calibration.{kind}.{key}" for heading, key in calibrated.items()}
    of_curves = {f"{heading}{note}": f"{task}.{key}" for task, note in (("superdiagnostic", ""), ("all", ", all 10+"))
                 for heading, key in scores.items()}
    curves = {f"{float(share):.0%} of the training patients": of for share, of in result["fractions"].items()}
    for kind, levels in result.get("noise", {}).items():
        curves |= {f"{kind}, {level}" + " dB" * (level != "area"): entries for level, entries in levels.items()}
    for kind, sets in result.get("leads_curve", {}).items():
        curves |= {f"{name}, {'fitted on it' if kind == 'same' else 'moved to it'}": of for name, of in sets.items()}
    snr = [f"  {kind} at 0 dB, single leads: " + "; ".join(
        f"{name} {np.median(db):.1f} ({min(db):.1f} to {max(db):.1f}) dB"
        for name, db in zip(("mean square", "nst"), zip(*of.values()))) for kind, of in result.get("snr", {}).items()]
    return "\n".join((
        f"PTB-XL at {n['rate_hz']} Hz: folds 1-8 train ({n['train']}), fold 9 chooses C and calibrates ({n['val']}), "
        f"fold 10 is scored ({n['test']} recordings, {n['test_patients']} patients); no refit with fold 9",
        f"encoders: {' '.join(result['encoder'])}; " + ("means, intervals over seeds and patients" if len(
            result["encoder"]) > 1 else "one seed: intervals are over patients (with few labels also over draws)"),
        f"leads: {' '.join(result['leads']) or 'all'}; of folds 9 and 10: {' '.join(result['leads_scored']) or 'all'}",
        f"{n['features']} features; {n['unusable']} recordings cannot be used (taken as the mean recording)",
        "macro AUROC [95 %] over the labels with both classes in folds 1-8 and in fold 10 (of those defined); "
        f"10+: over those with {MIN_POSITIVES} positives or more in fold 10",
        CALIBRATION_NOTE + "; Platt's: the same after a sigmoid fitted on fold 9",
        table(tasks | heads, of_tasks),
        *[f"{NOISE_NOTE}; medians over recordings (range over leads)", *snr] * bool(snr),
        f"few labels (means of {DRAWS} draws), and what was asked for; area: the mean over levels of AUROC - .5",
        table(curves, of_curves)))


def draw(result, arrays):
    """Figure: macro AUROC of each label set, reliability of the superclasses, and these under noise and by leads."""
    tasks = result["tasks"]
    curves = {title: result[key] for key, title in (("noise", "signal-to-noise ratio (dB)"), ("leads_curve", "leads"))
              if key in result}
    keys = {"untrained": "untrained"} | ({} if result["untrained_only"] else {"pre-trained": "macro_auroc"})
    ratios = [1.7, 1] + [1.2] * len(curves)
    figure = Figure(figsize=(4.5 * sum(ratios), 4.8), layout="constrained")
    bars, reliability, *more = figure.subplots(1, len(ratios), width_ratios=ratios)
    draw_bars(bars, [f"{task}\n{tasks[task]['n_labels']} labels" for task in PTBXL_SETS],
              {name: [[tasks[of][x] for of in PTBXL_SETS] for x in (key, SCORES[key])] for name, key in keys.items()})
    bars.set_ylabel("macro AUROC, fold 10")
    bars.set_title(f"PTB-XL, {result['n']['test']} test recordings; lines: 95 % intervals", loc="left")
    bars.legend(frameon=False, loc="upper left", ncols=2)
    labels, y, p = (arrays[f"superdiagnostic_{key}"] for key in ("labels", "y", "p_platt"))
    draw_reliability(reliability, labels, y, p if p.ndim == 2 else p[0])
    for axis, (title, kinds) in zip(more, curves.items()):
        draw_scores(axis, kinds, keys, title)
    return figure


def examples(encoder, x, fit, table, data, c, stored, leads):
    """Confident superclasses in fold 10, by evaluate.draw_examples; x (R, F) of fit, a result of fit_labels."""
    labels, y, p = (stored[f"superdiagnostic_{key}"] for key in ("labels", "y", "p_platt"))
    columns = data.columns["superdiagnostic"].start + np.flatnonzero(np.isin(data.sets["superdiagnostic"][0], labels))
    rows = table.iloc[data.test]
    return draw_examples(encoder, x, lambda rows: fit(rows)[C_GRID.index(c)][:, columns], labels,
                         p if p.ndim == 2 else p[0], y, data.patients[data.test], lambda row: (
                             f"ecg_id {rows.index[row]}", next(read_recordings([rows.path.iloc[row]], [leads])), True))


# ---- command line ---------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = parser_of("Probes on PTB-XL, for an encoder and its untrained control.", "raw/ptbxl")
    parser.add_argument("--noise", type=Path, help="prepared noise, such as data/nstdb: also score fold 10 under it")
    parser.add_argument("--leads", nargs="+", metavar="NAME",
                        help="leads that the encoder sees, such as I II (default: all of a recording)")
    parser.add_argument("--leads-scored", nargs="+", metavar="NAME",
                        help="leads of folds 9 and 10, for a probe that was fitted on --leads (default: --leads)")
    parser.add_argument("--leads-curve", action="store_true",
                        help=f"also score {len(LEAD_SETS)} sets of leads, by the probe fitted on --leads and by one of "
                             "their own; all recordings are embedded for each")
    parser.add_argument("--attention", action="store_true",
                        help="also probe local features, which take 1.2 kB x width a recording in a temporary file")
    parser.add_argument("--fine-tune", action="store_true",
                        help="also train encoders with the labels of 100, 10 and 1 %% of the training patients, and "
                             "their controls from scratch; 80 kB of memory a recording")
    return parser.parse_args(argv)


def main(args):
    table, statements, rate = read_tables(args.raw)
    encoders, control_of = load_encoders(args.encoder, args.device, args.precision)
    noise = load_noise(open_corpus(args.noise), "test") if args.noise else None
    data = Data(label_sets(table.codes, statements), table.strat_fold.to_numpy(), table.patient_id.to_numpy(),
                control_of, args.seed)
    shown = args.leads_scored or args.leads
    paths, leads = table.path.to_numpy(), [args.leads if f in FOLDS["1 to 8"] else shown for f in table.strat_fold]
    features, unusable = extract_features(encoders, paths, leads)
    fits, tasks, stored, fractions = probe_features(features, data)
    result = dict(encoder=args.encoder, raw=str(args.raw), seed=args.seed,
                  untrained_only=len(encoders) == len(args.encoder), leads=args.leads or [], leads_scored=shown or [],
                  n=dict(rate_hz=rate, train=len(data.train), val=len(data.val), test=len(data.test),
                         features=features.shape[2], test_patients=data.counts.shape[1], unusable=unusable),
                  tasks=tasks, fractions=fractions)
    if noise is not None:
        some = [shown] * len(data.test)
        noisy = noisy_features(encoders, lambda: read_recordings(paths[data.test], some), noise, args.seed)
        result["noise"] = noise_curve(features, noisy, fits, data)
        result["snr"] = snr_of_leads(read_recordings(paths[data.test[:SNR_RECORDINGS]], some), noise,
                                     encoders[0].patch_samples, args.seed)
    result |= dict(leads_curve=leads_curve(encoders, paths, fits, data)) if args.leads_curve else {}
    result = to_json(result | other_heads(args, encoders, paths, leads, data))
    stored |= dict(ecg_id=table.index.to_numpy()[data.test], patient_id=data.patients[data.test])
    print(text := report(result))
    shown_ecgs = examples(encoders[0], features[0][data.train], fits[0], table, data, tasks["superdiagnostic"]["c"][0],
                          stored, shown)
    write_results(args, "ptbxl", result, stored, draw(result, stored), text, encoders,
                  read_recordings(paths[data.test]), shown_ecgs)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"probe_ptbxl.py: {error}")
