"""How good features are."""
# The best one is taken: what training teaches lies along directions of little variance, which a small C hides.
ONLINE_PROBE_C = (0.01, 0.1, 1.0)
COLLAPSED_RANK = 2.0             # effective rank of a batch's global features; 20 to 27 in a good run
COLLAPSED_ENTROPY = 0.3          # of the mean prediction, as a share of ln K; 0.95 in a good run
UNIFORM_ENTROPY = 0.98           # of the targets after the warm-up, as a share of ln K; 0.45 in a good run
BOOTSTRAPS = 1000  # resamples of the patients of fold 10
NOISE_DB = (24, 18, 12, 6, 0, -6)  # signal-to-noise ratios of fold 10 for the robustness
ECE_BINS = 15  # equal-width bins of the class-wise expected calibration error
COLORS = {"untrained": "#c4c4c4", "pre-trained": "#7fb2e5"}


# ---------------------------------------------------------------------------------------------------------------------
# scores and intervals


def resampled_auroc(y, score, counts):
    """AUROC (S,) of one label in every resample, by ranks: exact, ties count half, NaN where a class is absent.

    y (R,) bool; score (R,); counts (S, R): how often resample s holds row r. A row of ones gives the plain AUROC.
    """
    order = np.argsort(score)
    first = np.unique(score[order], return_index=True)[1]  # where each distinct score begins
    positives = np.add.reduceat(counts[:, order] * y[order], first, axis=1)  # (S, distinct scores)
    negatives = np.add.reduceat(counts[:, order] * ~y[order], first, axis=1)
    won = positives * (np.cumsum(negatives, axis=1) - negatives / 2)
    with np.errstate(invalid="ignore"):
        return won.sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))


def patient_counts(patients, seed):
    """counts (S, R) of resamples of patients (R,): each is drawn with replacement and brings all of its recordings."""
    _, patient = np.unique(patients, return_inverse=True)
    n = patient.max() + 1
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAPS)[:, patient]


def macro(auroc):
    """Mean over labels of auroc (S, C) -> (S,); a label that a resample cannot score is left out of its mean."""
    scored = np.isfinite(auroc)
    with np.errstate(invalid="ignore"):
        return np.where(scored, auroc, 0).sum(axis=1) / scored.sum(axis=1)


def interval(samples):
    """95 % percentile interval [low, high] of bootstrap samples (S,)."""
    return np.nanpercentile(samples, [2.5, 97.5]).tolist() if np.isfinite(samples).any() else [np.nan, np.nan]


def both_classes(y):
    """Which columns of y (R, C) bool have positives and negatives: (C,)."""
    return y.any(axis=0) & ~y.all(axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# calibration


def platt(logit, y, logit_new):
    """Platt's (1999) sigmoid, fitted on logit (R,) and y (R,) bool: probabilities of logit_new (R',).

    As CalibratedClassifierCV(method="sigmoid"), which wants the classifier itself. The smoothed targets that he asks
    for are fractions, so every row enters as a positive and as a negative, weighted.
    """
    target = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))
    model = LogisticRegression(C=np.inf, tol=1e-6, max_iter=MAX_ITER)
    model.fit(np.tile(logit, 2)[:, None], np.repeat([1, 0], len(y)), sample_weight=np.r_[target, 1 - target])
    return model.predict_proba(logit_new[:, None])[:, 1]


def calibration(p, y):
    """Brier score, negative log-likelihood (nats) and class-wise ECE: means over labels of p (R, C), y (R, C)."""
    if not p.size:
        return dict(brier=np.nan, nll=np.nan, ece=np.nan)
    bins = np.minimum((p * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = [np.bincount(bins[:, k], weights=p[:, k] - y[:, k]) for k in range(p.shape[1])]
    likelihood = np.where(y, p, 1 - p).clip(np.finfo(float).tiny)
    return dict(brier=np.mean((p - y) ** 2), nll=-np.mean(np.log(likelihood)),
                ece=np.mean([np.abs(gap).sum() / len(p) for gap in gaps]))


# ---------------------------------------------------------------------------------------------------------------------
# features under noise


def noisy_features(encoders, paths, noise, seed, device):
    """[CLS, mean patch] of R recordings at every level of NOISE_DB: (encoders, H, R, 2D). NaN if one has gaps.

    A recording gets the same noise at every level, only stronger, and for every encoder.
    """
    P = encoders[0].patch_samples
    N = RECORD_S * FS // P
    features = np.full((len(encoders), len(NOISE_DB), len(paths), 2 * encoders[0].width), np.nan, dtype=np.float32)
    levels = torch.tensor(NOISE_DB, dtype=torch.float32)
    for r, path in enumerate(tqdm(paths, desc="noise", unit="record", disable=None)):
        record = read_record(path, P)
        if not record or record[0].shape != (RECORD_LEADS, N * P) or not np.isfinite(record[0]).all():
            continue
        signal, leads = (torch.from_numpy(x).expand(len(NOISE_DB), *x.shape) for x in record)
        draws = draw_views(np.random.default_rng([seed, r]), ViewSpec(1, RECORD_LEADS, N, True), 1, RECORD_LEADS, N * P,
                           noise.shape[-1], P)
        draws = {k: torch.from_numpy(draws[k][0]).expand(len(NOISE_DB), *draws[k].shape[2:])
                 for k in ("amplitude", "sign", "channel", "offset")}
        noisy = add_noise(signal, leads, noise, levels, **draws).to(device)
        for e, encoder in enumerate(encoders):
            with torch.inference_mode():
                features[e, :, r] = encoder.pool(noisy, leads.to(device)).cpu()
    return features


# ---------------------------------------------------------------------------------------------------------------------
# is it learning?


@torch.no_grad()
def health(cls, logits, parts):
    """Signs that the loss does not show, over the recordings of all ranks. cls (2, B, 2D) teacher features, logits
    (V, B, K) of the student; parts are this rank's."""
    x = torch.nan_to_num(gather_rows(cls[0].float())[0])
    x = (x - x.mean(0)).double()
    # Singular values, by way of the smaller square: in fp64, for the root of a rounded zero is no small number.
    spectrum = torch.linalg.eigvalsh(x @ x.T if x.shape[0] < x.shape[1] else x.T @ x).clamp(min=0).sqrt()
    share = spectrum / spectrum.sum().clamp(min=1e-12)
    mean_prediction = reduce_((logits.float() / 0.1).softmax(-1).mean((0, 1))) / num_ranks()
    everyone = reduce_(torch.stack([v.detach().float() for v in parts.values()])) / num_ranks()
    return dict(zip(parts, everyone), cls_std=x.std(0).mean().float(),
                cls_rank=(-(share * share.clamp(min=1e-12).log()).sum()).exp().float(),
                prediction_entropy=-(mean_prediction * mean_prediction.clamp(min=1e-12).log()).sum())


def diagnose(row, warm):
    """What the numbers of a logged step say in words: {kind: sentence}, empty in a run that learns."""
    found = {}
    if row["cls_rank"] < COLLAPSED_RANK:
        found["collapse of features"] = (
            f"the global features of a batch differ along {row['cls_rank']:.1f} directions: the encoder gives every "
            "recording the same feature. Try a smaller --lr, a larger KOLEO_WEIGHT, or more patients")
    if row["prediction_entropy"] < COLLAPSED_ENTROPY * row["ln_k"]:
        found["collapse of predictions"] = (
            f"the student names few of the prototypes (entropy {row['prediction_entropy']:.2f} of {row['ln_k']:.2f}). "
            "Try a smaller --lr, or fewer --prototypes")
    if warm and row["target_entropy"] > UNIFORM_ENTROPY * row["ln_k"]:
        found["uniform targets"] = (
            f"the teacher calls all prototypes equally likely (entropy {row['target_entropy']:.2f} of "
            f"{row['ln_k']:.2f}), which teaches nothing. Try a lower TEACHER_TEMPERATURE, or fewer --prototypes")
    return found


class OnlineProbe:
    """AUROC of a logistic regression on the teacher's features, on a few labelled recordings of the data; None
    without labels.

    Fitted on the train split, scored on the val split (PTB-XL fold 9), which is never pre-trained on. A sign, not a
    result.
    """

    def __init__(self, corpora, window, limit=256):
        self.sets = {}
        for split in ("train", "val"):
            found = [(c, i) for c in corpora for i in np.flatnonzero(
                (c.index["label"] > 0) & (c.index["n_leads"] == 12) & (c.index["length"] >= window)
                & (c.index["split"] == SPLITS.index(split)))[:limit]]
            found = [(c, i) for c, i in found if not (c.read(i, 0, window) == MISSING).any()]
            if len(found) >= 20:
                self.sets[split] = (
                    torch.from_numpy(np.stack([c.read(i, 0, window) for c, i in found])),
                    torch.from_numpy(np.stack([c.index["leads"][i][:12] for c, i in found]).astype(np.int64)),
                    np.unpackbits(np.array([c.index["label"][i] for c, i in found])[:, None], axis=1,
                                  bitorder="little"))
        self.usable = len(self.sets) == 2

    @torch.no_grad()
    def score(self, encoder, device):
        """Macro AUROC over the superclasses that both splits have, at the best of ONLINE_PROBE_C."""
        x, y = {}, {}
        for split, (windows, leads, labels) in self.sets.items():
            x[split] = torch.cat([encoder(w.to(device).float() * 1e-3, l.to(device)).pooled()
                                  for w, l in zip(windows.split(64), leads.split(64))]).float().cpu().numpy()
            y[split] = labels
        scored = [k for k in range(8) if all(5 <= y[s][:, k].sum() <= len(y[s]) - 5 for s in y)]
        auroc = []
        for c in ONLINE_PROBE_C:
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=200))
            auroc.append(np.mean([
                roc_auc_score(y["val"][:, k], probe.fit(x["train"], y["train"][:, k]).decision_function(x["val"]))
                for k in scored]))
        return float(max(auroc))


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def draw_curves(out):
    """curves.png: losses, entropy of the targets beside ln K, and the online probe, against the step."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [{k: math.nan if v is None else v for k, v in r.items()} for r in rows if "loss" in r]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), constrained_layout=True)
    for name in ("dino_global", "dino_local", "ibot"):
        axes[0].plot([r["step"] for r in steps], [r[name] for r in steps], label=name)
    for name in ("target_entropy", "patch_target_entropy", "prediction_entropy"):
        axes[1].plot([r["step"] for r in steps], [r[name] for r in steps], label=name)
    for axis, title in zip(axes, ("losses", "entropy (nats)")):
        axis.axhline(steps[0]["ln_k"], color="0.6", linestyle=":", label="ln K")
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=8)
    probed = [r for r in rows if "online_auroc" in r]
    axes[2].plot([r["step"] for r in probed], [r["online_auroc"] for r in probed], "o-")
    axes[2].set(title="online probe, macro AUROC", xlabel="step")
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)


def fine_features(encoder, signal_mv, leads, step_samples=5):
    """Local features every step_samples / FS seconds, by shifting the patches: features (L, M, D) and centres (M,)
    in seconds."""
    shifted = [encoder.embed(signal_mv[:, shift:], fs=FS, leads=leads)
               for shift in range(0, encoder.patch_samples, step_samples)]
    times_s = np.concatenate([e.times_s + i * step_samples / FS for i, e in enumerate(shifted)])
    order = np.argsort(times_s)
    return np.concatenate([e.local_features for e in shifted], axis=1)[:, order], times_s[order]


def draw_features(encoder, corpus, row, path, show=("I", "II", "V1", "V3", "V5"), seconds=5.0):
    """features.png: an ECG whose colour is its local feature: the first three principal components as RGB."""
    ids = corpus.index["leads"][row][:corpus.index["n_leads"][row]]
    names = [LEADS[i] for i in ids]
    signal = np.where(corpus.read(row) == MISSING, np.nan, corpus.read(row) * np.float32(1e-3))
    features, times_s = fine_features(encoder, signal, names)
    shown = [names.index(n) for n in show if n in names] or [0]
    # A lead's own mean would only colour the lead.
    x = features[shown] - np.nanmean(features[shown], axis=1, keepdims=True)
    L, M, D = x.shape
    components = PCA(3, svd_solver="full").fit_transform(np.nan_to_num(x.reshape(L * M, D)))
    low, high = np.percentile(components, (2, 98), axis=0)
    colour = np.clip((components - low) / (high - low), 0, 1).reshape(L, M, 3)
    figure, axes = plt.subplots(L, 1, figsize=(12, 1.5 * L), sharex=True, constrained_layout=True, squeeze=False)
    for axis, lead, rgb in zip(axes[:, 0], shown, colour):
        t = np.arange(round(seconds * FS)) / FS
        y = signal[lead, :len(t)]
        nearest = np.abs(times_s[None] - t[:, None]).argmin(axis=1)
        axis.add_collection(LineCollection(np.stack([np.stack([t[:-1], y[:-1]], 1), np.stack([t[1:], y[1:]], 1)], 1),
                                           colors=rgb[nearest[:-1]], linewidths=2.2))
        axis.set(xlim=(0, seconds), ylim=(np.nanmin(y) - 0.15, np.nanmax(y) + 0.15), ylabel=f"{names[lead]} (mV)")
    axes[-1, 0].set_xlabel("seconds; colour: first three principal components of the local features")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_reliability(axis, labels, y, p, p_platt):
    """Share of positives against calibrated probability; a point holds about 40 recordings or more."""
    axis.plot((0, 1), (0, 1), color="#999999", linewidth=1, linestyle="--")
    n_bins = int(np.clip(len(y) // 40, 4, 10))
    for k, name in enumerate(labels):
        truth, said = calibration_curve(y[:, k], p_platt[:, k], n_bins=n_bins, strategy="quantile")
        raw, calibrated = (calibration(x[:, [k]], y[:, [k]])["ece"] for x in (p, p_platt))
        axis.plot(said, truth, marker="o", markersize=4, label=f"{name}  ECE {raw:.3f}, calibrated {calibrated:.3f}")
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="calibrated probability", ylabel="share with the label")
    axis.set_title("Reliability of the superclasses", loc="left")
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def draw_robustness(axis, noise, series):
    """Macro AUROC of the superclasses against the signal-to-noise ratio, with intervals."""
    at = range(len(noise["snr_db"]))
    for name, (key, _) in series.items():
        axis.fill_between(at, *np.array(noise[f"{key}_ci95"], dtype=float).T, color=COLORS[name], alpha=0.3,
                          linewidth=0)
        axis.plot(at, noise[key], marker="o", color=COLORS[name], label=f"{name}, keeps {noise[f'{key}_kept']:.1%}")
    axis.set(xticks=list(at), xticklabels=noise["snr_db"], xlabel="signal-to-noise ratio (dB)", ylabel="macro AUROC")
    axis.set_title("Superclasses under noise", loc="left")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------
# what both probes share


def to_json(value):
    """Plain types for json.dumps; a number that could not be computed becomes null, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return value if not isinstance(value, float) else round(value, 6) if np.isfinite(value) else None


def show(value, ci):
    """A score with its interval, for people."""
    return "-" if value is None else f"{value:.3f} [{', '.join('-' if v is None else f'{v:.3f}' for v in ci)}]"


def parser_of(description):
    """The flags that both probes share."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--encoder", required=True, default=argparse.SUPPRESS,
                        help="encoder.pt of a run; random:SIZE gives the untrained control alone")
    parser.add_argument("--raw", type=Path, required=True, default=argparse.SUPPRESS,
                        help="folder of the raw recordings, in their publisher's layout")
    parser.add_argument("--out", type=Path, required=True, default=argparse.SUPPRESS,
                        help="folder for the results; made if absent, earlier results in it are replaced")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    return parser


def load_encoders(path, device):
    """The encoder and its untrained control (the control alone for random:SIZE), and the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    encoder = load_encoder(path, device)
    return [encoder] if path.startswith("random:") else [encoder, untrained_like(encoder)], device


def atomic_write(path, write):
    """write(temporary path), then rename: the file appears whole or not at all."""
    temporary = path.with_name(f"writing-{path.name}")  # keeps the suffix, by which savefig and savez choose the format
    write(temporary)
    os.replace(temporary, path)
