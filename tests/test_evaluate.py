"""What both probes share and what train.py asks about its run: against other programs, loops, or by construction."""
import base64
import io
import json
import math
import shutil
import subprocess
from argparse import Namespace
from html import escape
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

import dino
import evaluate
from augment import load_noise, nst_db, snr_of_leads
from conftest import PNG, draw_ecg
from corpus import INDEX_DTYPE, open_corpus
from ecg import FS, LEADS, MISSING, Recording, preprocess, save_figure
from model import Encoder, save_encoder, untrained_like
from test_model import WIDTH, small_encoder
from train import OnlineProbe

PATCH = 50


# ---------------------------------------------------------------------------------------------------------------------
# scores, intervals, calibration

def scores(seed, n=80):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.3
    return rng, y, np.round(rng.normal(size=n) + y, 1)             # rounded: with ties


@pytest.mark.parametrize("groups", [80, 25, 3])
def test_resampled_auroc_is_that_of_sklearn_with_weights(groups):
    rng, y, score = scores(0)
    group = np.r_[np.arange(groups), rng.integers(0, groups, len(y) - groups)]
    counts = rng.multinomial(groups, np.full(groups, 1 / groups), size=20)
    found = evaluate.resampled_auroc(y, score, group, counts)
    for auroc, weight in zip(found, counts[:, group]):
        if 0 < weight[y].sum() and 0 < weight[~y].sum():
            assert auroc == pytest.approx(roc_auc_score(y, score, sample_weight=weight), rel=1e-12)
        else:
            assert np.isnan(auroc)


def test_a_resample_without_a_class_has_no_auroc():
    rng, y, score = scores(0)
    counts = np.ones((3, len(y)))
    counts[1, y], counts[2, ~y] = 0, 0
    found = evaluate.resampled_auroc(y, score, np.arange(len(y)), counts)
    assert found[0] == pytest.approx(roc_auc_score(y, score)) and np.isnan(found[1:]).all()
    for same in (y | True, y & False):
        assert np.isnan(evaluate.resampled_auroc(same, score, np.arange(len(y)), counts)).all()


def test_auroc_of_columns():
    rng, y, score = scores(7)
    labels, columns = np.stack((y, y & False, ~y), axis=1), np.stack((score, score, score), axis=1)
    found = evaluate.plain_auroc(labels, columns)
    assert found[0] == pytest.approx(roc_auc_score(y, score)) and found[2] == pytest.approx(1 - found[0])
    assert np.isnan(found[1]) and evaluate.plain_auroc(labels[:, :0], columns[:, :0]).shape == (0,)
    np.testing.assert_allclose(evaluate.macro(found[None]), [0.5])


def test_groups_are_resampled_with_all_their_rows():
    patients = np.array([7, 7, 3, 9, 3, 7])
    number, counts = evaluate.resample(patients, seed=0)
    assert counts.shape == (evaluate.BOOTSTRAPS, 3) and number.tolist() == [1, 1, 0, 2, 0, 1]
    assert (counts.sum(axis=1) == 3).all()                         # as many patients as there are
    np.testing.assert_array_equal(counts, evaluate.resample(patients, seed=0)[1])
    assert len(evaluate.resample(patients, 0, n=7)[1]) == 7


def test_interval_leaves_out_what_could_not_be_scored():
    assert evaluate.interval(np.r_[np.arange(1001), np.nan]) == [25, 975]
    assert np.isnan(evaluate.interval(np.full(3, np.nan))).all()


@pytest.mark.parametrize("scale, positives", [(1, None), (10, None), (0.1, 1)])
def test_platt_is_that_of_sklearn_and_the_optimum_of_its_definition(scale, positives):
    """Platt's (1999) targets; the optimum by another program. Scikit-learn stops a little before it."""
    _, y, score = scores(1, 200)
    y = np.arange(200) == 3 if positives == 1 else y
    identity = LogisticRegression()              # its decision function is its input
    identity.classes_, identity.coef_, identity.intercept_ = np.array([False, True]), np.ones((1, 1)), np.zeros(1)
    train, test, y_train = scale * score[:100], scale * score[100:], y[:100]
    found = evaluate.platt(train, y_train, test)
    sklearns = CalibratedClassifierCV(FrozenEstimator(identity), method="sigmoid").fit(train[:, None], y_train)
    np.testing.assert_allclose(found, sklearns.predict_proba(test[:, None])[:, 1], atol=1e-6)
    n = y_train.sum()
    target = [(n + 1) / (n + 2) if positive else 1 / (100 - n + 2) for positive in y_train]

    def loss(ab):
        return sum(-t * math.log(p) - (1 - t) * math.log(1 - p)
                   for t, p in zip(target, 1 / (1 + np.exp(-ab[0] * train / scale - ab[1]))))
    a, b = minimize(loss, (1, 0), method="Nelder-Mead", options=dict(xatol=1e-9, fatol=1e-12, maxiter=5000)).x
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-a * test / scale - b)), atol=1e-6)


def test_platt_keeps_raw_probabilities_where_nothing_can_be_fitted():
    logit = np.array([-2.0, 0.0, 3.0])
    for same in (np.zeros(3, bool), np.ones(3, bool)):
        np.testing.assert_allclose(evaluate.platt(logit, same, logit), 1 / (1 + np.exp(-logit)))
    assert evaluate.platt(logit, logit > 1, logit)[2] != pytest.approx(1 / (1 + np.exp(-3)))   # one positive is enough


@pytest.mark.parametrize("rows, features", [(400, 30), (40, 60)])
def test_all_labels_and_strengths_at_once_are_those_of_sklearn(rows, features):
    """Also with correlated features, rare labels, fewer rows than features, and labels that can be separated."""
    rng, strengths = np.random.default_rng(rows), (1e-3, 0.1, 10.0)
    x = rng.normal(size=(rows, features)) @ rng.normal(size=(features, features)) * np.geomspace(1, 0.01, features)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    z = x @ rng.normal(size=(features, 5)) + rng.logistic(size=(rows, 5))
    y = z > np.diag(np.quantile(z, (0.5, 0.7, 0.9, 1 - 3 / rows, 1 - 1 / rows), axis=0))
    w = evaluate.fit_logistic(x, y, strengths)
    assert w.shape == (3, features + 1, 5) and y.sum(axis=0)[-1] == 1
    for g, c in enumerate(strengths):
        for k in range(5):
            model = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x, y[:, k])
            np.testing.assert_allclose(x @ w[g, :-1, k] + w[g, -1, k], model.decision_function(x), atol=1e-6)
            np.testing.assert_allclose(w[g, :-1, k], model.coef_[0], atol=1e-6)
    alone = evaluate.fit_logistic(np.zeros((rows, 2)), y, strengths)       # constant features: the odds are all
    np.testing.assert_allclose(alone[:, 2], np.broadcast_to(np.log(y.sum(0) / (~y).sum(0)), (3, 5)), atol=1e-12)
    assert (alone[:, :2] == 0).all() and evaluate.fit_logistic(x, y[:, :0], strengths).shape == (3, features + 1, 0)


def test_a_fit_ends_where_rounding_hides_the_optimum():
    """Almost without a penalty, of labels that can be separated: no step makes the loss smaller any more."""
    x = np.random.default_rng(0).normal(size=(300, 40))
    y = np.stack((x[:, 0] > 0, np.arange(300) == 5, np.arange(300) != 7), axis=1)
    w, = evaluate.fit_logistic(x, y, [1e6])
    for k in range(3):
        model = LogisticRegression(C=1e6, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(x, y[:, k])
        np.testing.assert_allclose(x @ w[:-1, k] + w[-1, k], model.decision_function(x), rtol=0.01, atol=0.2)


def test_attention_is_that_of_nested_loops():
    torch.manual_seed(5)
    head, tokens = evaluate.AttentionPool(6, 3).double(), torch.randn(4, 7, 6, dtype=torch.float64)
    tokens[1, 2:4], tokens[2, 0, 5], tokens[3] = torch.nan, torch.nan, torch.nan
    torch.nn.init.normal_(head.query)
    found = head(tokens).detach().numpy()
    query, weight, bias = (p.detach().numpy() for p in (head.query, head.linear.weight, head.linear.bias))
    for b in range(4):
        total, pooled = 0.0, np.zeros(6)
        for token in tokens[b].numpy():
            if not np.isnan(token).any():
                share = math.exp(sum(q * t for q, t in zip(query, token)) / math.sqrt(6))
                total, pooled = total + share, pooled + share * token
        expected = weight @ (pooled / total if total else pooled) + bias
        np.testing.assert_allclose(found[b], expected, atol=1e-12)
    assert np.isfinite(torch.autograd.grad(head(tokens).sum(), head.query)[0]).all()


def test_attention_finds_the_token_that_tells():
    """One token of sixteen tells the class: its mean over tokens says little, attention finds it. Test rows are not
    fitted."""
    rng = np.random.default_rng(6)
    tokens, y = rng.normal(size=(800, 16, 8)), rng.random((800, 2)) < 0.5
    which = rng.integers(0, 16, 800)
    tokens[np.arange(800), which, 0] += 8                            # where to look
    tokens[np.arange(800), which, 1:3] = np.where(y, 1, -1)
    tokens[6, which[6] + 1:] = np.nan
    parts = np.split(rng.permutation(800), [600, 700])
    z = evaluate.fit_attention(tokens.astype(np.float16), y, *parts, seed=0)
    mean = LogisticRegression().fit(np.nanmean(tokens[parts[0]], axis=1), y[parts[0], 0])
    said = mean.decision_function(np.nanmean(tokens[parts[2]], axis=1))
    assert evaluate.plain_auroc(y[parts[2]], z).min() > 0.97 and roc_auc_score(y[parts[2], 0], said) < 0.9
    changed = y.copy()
    changed[parts[2]] = ~changed[parts[2]]
    np.testing.assert_array_equal(z, evaluate.fit_attention(tokens.astype(np.float16), changed, *parts, seed=0))


@pytest.mark.parametrize("kind", ["constant", "coin"])
def test_attention_finds_nothing_where_nothing_is(kind):
    rng = np.random.default_rng(8)
    tokens, y = rng.normal(size=(1600, 4, 3)), rng.random((1600, 4)) < 0.4
    parts = np.split(rng.permutation(1600), [600, 700])
    z = evaluate.fit_attention((tokens if kind == "coin" else np.ones_like(tokens)).astype(np.float16), y, *parts, 0)
    found = evaluate.plain_auroc(y[parts[2]], z)
    np.testing.assert_allclose(found, 0.5, atol=0.07 if kind == "coin" else 1e-12)         # a coin: 3.5 standard errors


def hearts(n, seed):
    """Recordings of 5 s of II and V1, half of them with low beats and half with another rhythm, and these labels."""
    rng, y = np.random.default_rng(seed), np.arange(n)[:, None] // (1, 2) % 2 == 1
    drawn = (draw_ecg(FS, 5, ("II", "V1"), rr_s=rng.uniform(0.5, 0.6) + 0.4 * fast) * (0.4 if low else 1.2)
             for low, fast in y)
    return [Recording(x + rng.normal(0, 0.02, x.shape), FS, ["II", "V1"]) for x in drawn], y


def test_fine_tuning_learns_keeps_the_best_and_leaves_the_encoder_alone(monkeypatch):
    for name, value in dict(TUNE_EPOCHS=5, TUNE_ROWS=96, BATCH=16).items():
        monkeypatch.setattr(evaluate, name, value)
    made, y = hearts(72, 8)
    signal, encoder = evaluate.stacked(iter(made), 72, ("V1", "II"), 5), small_encoder()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    parts = np.split(np.random.default_rng(0).permutation(72), [40, 56])
    z, tuned, log = evaluate.fine_tune(encoder, signal, ("V1", "II"), y, *parts)
    losses, aurocs = np.array(log).T
    assert losses[-1] < 0.8 * losses[0] and evaluate.plain_auroc(y[parts[2]], z).min() > 0.8
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(not torch.equal(value, before[name]) for name, value in tuned.state_dict().items() if "weight" in name)
    again, _, same = evaluate.fine_tune(encoder, signal, ("V1", "II"), y, *parts)
    assert log == same and np.array_equal(z, again)                 # the same seed
    # Scored rows are those of the best epoch, whichever it was, and test labels do not matter.
    y[parts[2]] = ~y[parts[2]]
    of_val = evaluate.fine_tune(encoder, signal, ("V1", "II"), y, *parts[:2], parts[1])[0]
    assert evaluate.plain_auroc(y[parts[1]], of_val).mean() == max(aurocs)


def test_fine_tuning_stops_early_and_returns_the_best_weights(monkeypatch):
    """Of scores that rise and then fall: the weights after the second epoch, and no more than the patience after it."""
    monkeypatch.setattr(evaluate, "TUNE_ROWS", 16)
    monkeypatch.setattr(evaluate, "PATIENCE", 2)
    made, y = hearts(24, 9)
    signal, parts = evaluate.stacked(iter(made), 24, ("II",), 5), np.split(np.arange(24), [16, 20])
    given, epochs = iter([0.6, 0.9, 0.7, 0.8, 1.0]), []
    monkeypatch.setattr(evaluate, "plain_auroc", lambda y, z: epochs.append(z) or np.array([next(given)]))
    z, _, log = evaluate.fine_tune(small_encoder(), signal, ("II",), y, *parts[:2], parts[1])
    assert [auroc for _, auroc in log] == [0.6, 0.9, 0.7, 0.8]
    np.testing.assert_array_equal(z, epochs[1])
    assert not np.array_equal(z, epochs[3])


def test_stacked_recordings_are_preprocessed_ones():
    whole, _, gap, dead = recordings(lost=True)
    flat = whole._replace(signal=np.zeros((12, 5000)))
    short = whole._replace(signal=whole.signal[:2, :2000], leads=["I", "DII"])
    signal = evaluate.stacked(iter([whole, gap, dead, flat, short]), 5, ("V1", "II", "V7"), 8)
    assert signal.shape == (5, 3, 8 * FS) and signal.dtype == np.float32
    for row, recording in zip(signal, (whole, gap, dead)):
        np.testing.assert_array_equal(row[:2], preprocess(*recording[:4])[0][[6, 1], :8 * FS])
    assert np.isnan(signal[:, 2]).all() and np.isnan(signal[3]).all() and np.isnan(signal[4, 0]).all()
    assert np.isfinite(signal[4, 1, :4 * FS]).all() and np.isnan(signal[4, 1, 4 * FS:]).all()


def test_local_features_are_those_of_embed(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 2)
    encoder, made = small_encoder(), recordings(lost=True)
    flat = made[0]._replace(signal=np.zeros((12, 5000)))
    short = made[1]._replace(signal=made[1].signal[:3, :2000], leads=made[1].leads[:3])
    tokens = evaluate.local_features(encoder, iter([*made, flat, short]), 6, 12, 10)
    assert tokens.shape == (6, 12 * 50, WIDTH) and tokens.dtype == np.float16
    for row, recording in enumerate(made):
        np.testing.assert_allclose(tokens[row], np.concatenate(encoder.embed(recording).local_features), atol=5e-3)
    assert np.isnan(tokens[4]).all() and np.isnan(tokens[2]).any() and np.isfinite(tokens[2]).any()
    assert np.isfinite(tokens[5, :3 * 20]).all() and np.isnan(tokens[5, 3 * 20:]).all()


def test_paired_scores_have_their_difference_and_each():
    rng = np.random.default_rng(7)
    a, b = rng.normal(0.8, 0.01, (2, 101)), rng.normal(0.7, 0.01, (2, 101))
    found = evaluate.paired(a, b, 50, "_x")
    assert found["difference_x"] == pytest.approx(found["macro_auroc_x"] - found["untrained_x"])
    assert found["difference_ci95_x"] == evaluate.interval_of_seeds(a - b, 50)
    assert found["each"]["ci95_x"] == [evaluate.interval(one[1:]) for one in a]
    assert found["each"]["untrained_x"] == b[:, 0].tolist()
    a[:, 0] = 0.9, 1.0                                         # two seeds so far apart that Student's t goes beyond 1
    assert evaluate.paired(a, b, 50)["ci95"][1] == 1 and evaluate.paired(a, b, 50, signed=True)["ci95"][1] > 1


def drawn(seed, n=255, temperature=1.0):
    """Labels of five classes drawn from probabilities, and these with their logits multiplied by `temperature`."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 1.6, (n, 5)) - np.array([-0.2, 1.2, 1.2, 1.4, 2.4])
    return 1 / (1 + np.exp(-temperature * logit)), rng.random((n, 5)) < 1 / (1 + np.exp(-logit))


def test_calibration_is_its_definition():
    p, y = drawn(2, 300)
    found, rows = evaluate.calibration(p, y, np.full(5, 0.3), np.arange(300)), []
    for k in range(5):
        order = np.argsort(p[:, k])
        ece, reliability, resolution = 0.0, 0.0, 0.0
        for b in range(15):                                        # bins of 20
            said, seen = p[order[20 * b:20 * b + 20], k].mean(), y[order[20 * b:20 * b + 20], k].mean()
            bias = seen * (1 - seen) / 19
            ece += abs(said - seen) / 15
            reliability += ((said - seen) ** 2 - bias) / 15
            resolution += ((seen - y[:, k].mean()) ** 2 - bias) / 15
        rows.append((ece, reliability, resolution + y[:, k].mean() * (1 - y[:, k].mean()) / 299))
    for key, expected in zip(("ece", "reliability", "resolution"), np.mean(rows, axis=0)):
        assert found[key] == pytest.approx(expected, abs=1e-9), key
    for key, score in dict(brier=brier_score_loss, nll=log_loss).items():
        of_model, of_constant = (np.mean([score(y[:, k], said[:, k]) for k in range(5)])
                                 for said in (p, np.full(p.shape, 0.3)))
        assert found[key] == pytest.approx(of_model, abs=1e-9)
        assert found[f"{key}_skill"] == pytest.approx(1 - of_model / of_constant, abs=1e-9)
    spread = ((y - p) * (1 - 2 * p)).sum(axis=1)
    assert found["z"] == pytest.approx(spread.sum() / np.sqrt((spread ** 2).sum()))
    # Brier = reliability - resolution + uncertainty, up to the spread of p within a bin.
    uncertainty = np.mean(y.mean(0) * (1 - y.mean(0)))
    assert found["brier"] == pytest.approx(found["reliability"] - found["resolution"] + uncertainty, abs=0.01)


def test_a_perfect_model_is_called_so_and_an_overconfident_one_is_not(monkeypatch):
    monkeypatch.setattr(evaluate, "PERFECT_DRAWS", 20)
    found = {t: [evaluate.calibration(*drawn(seed, temperature=t), np.full(5, 0.3), np.arange(255))
                 for seed in range(200)] for t in (1.0, 1.5)}
    called = {t: np.mean([abs(f["z"]) < 2 for f in results]) for t, results in found.items()}
    assert 0.9 < called[1.0] < 0.99 and called[1.5] == 0
    assert all(f["z"] > 2 for f in found[1.5])                     # and its sign says: overconfident
    ece, perfect = np.mean([[f["ece"], f["ece_perfect"]] for f in found[1.0]], axis=0)
    assert ece == pytest.approx(perfect, abs=0.002) and ece > 0.05       # a perfect model has an ECE of that size


def test_a_constant_has_no_skill_and_no_resolution():
    _, y = drawn(3, 3000)
    found = evaluate.calibration(np.broadcast_to(y.mean(0), y.shape), y, y.mean(0), np.arange(3000))
    assert found["brier_skill"] == found["nll_skill"] == 0 and abs(found["resolution"]) < 1e-3
    worse = evaluate.calibration(np.full(y.shape, 0.9), y, y.mean(0), np.arange(3000))
    assert worse["brier_skill"] < -1 and worse["nll_skill"] < -1


def test_rows_of_one_patient_count_as_one():
    """Every row ten times is no more evidence than once."""
    p, y = drawn(4, temperature=1.2)
    once = evaluate.calibration(p, y, np.full(5, 0.3), np.arange(255))["z"]
    tenfold = evaluate.calibration(*(np.repeat(x, 10, axis=0) for x in (p, y)), np.full(5, 0.3),
                                   np.repeat(np.arange(255), 10))["z"]
    assert tenfold == pytest.approx(once) and once > 1


def test_what_json_gets():
    found = evaluate.to_json(dict(a=np.float32(0.5), b=[np.nan, np.int64(3), None], c=(True, "x", np.inf)))
    assert json.loads(json.dumps(found)) == dict(a=0.5, b=[None, 3, None], c=[True, "x", None])


# ---------------------------------------------------------------------------------------------------------------------
# features

def recordings(lost=False):
    """Two recordings, and with `lost` one with a gap and one with a dead lead, at 500 Hz."""
    made = []
    for rr_s in (0.7, 0.9):
        signal = draw_ecg(500, 10, LEADS[1:13], rr_s)
        made.append(Recording(signal, 500.0, list(LEADS[1:13])))
    if lost:
        for where in (np.s_[:, 2000:2300], np.s_[4, :]):
            signal = made[0].signal.copy()
            signal[where] = np.nan
            made.append(made[0]._replace(signal=signal))
    return made


def test_noise_takes_in_recordings_with_gaps(synth):
    """Every level holds the same noise, only stronger; a gap stays a gap, and a recording that is none stays NaN."""
    noise = load_noise(open_corpus(synth / "data" / "nstdb"), "test")
    made = recordings(lost=True)
    noisy = list(evaluate.add_noise_levels(made, noise, PATCH, 3, evaluate.NOISE_DB))
    H, K = len(evaluate.NOISE_DB), len(evaluate.NOISE_KINDS)
    assert len(noisy) == 4 * K * H and all(r.fs == FS and r.leads == list(LEADS[1:13]) for r in noisy)
    for k, recording in enumerate(made):
        clean, _ = preprocess(*recording[:4])
        levels = np.stack([r.signal for r in noisy[k * K * H:(k + 1) * K * H]]).reshape(K, H, *clean.shape)
        np.testing.assert_array_equal(np.isnan(levels), np.broadcast_to(np.isnan(clean), levels.shape))
        added = np.nan_to_num(levels - clean)
        strength = np.sqrt((added ** 2).mean(axis=(2, 3)))
        expected = np.broadcast_to(24 - np.array(evaluate.NOISE_DB), strength.shape)
        np.testing.assert_allclose(20 * np.log10(strength / strength[:, :1]), expected, atol=0.02)
        shapes = added[:, 2:] / strength[:, 2:, None, None]
        np.testing.assert_allclose(shapes[:, -1], shapes[:, 0], atol=1e-3)
        # The mixture is a sum of its types.
        types, mixture = shapes[1:, -1].reshape(3, -1).T, shapes[0, -1].ravel()
        weights, rest, *_ = np.linalg.lstsq(types, mixture, rcond=None)
        assert rest[0] < 1e-4 * len(mixture) and (weights > -1e-3).all()
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert abs(np.corrcoef(types.T)[a, b]) < 0.9

    encoders = [small_encoder()]
    encoders.append(untrained_like(encoders[0]))
    flat = Recording(np.zeros((12, 5000)), 500.0, list(LEADS[1:13]))
    found = evaluate.noisy_features(encoders, lambda: iter([*made, flat]), noise, seed=3)
    assert found.shape == (2, K, H, 5, 3 * WIDTH)
    assert np.isfinite(found[:, :, :, :4]).all() and np.isnan(found[:, :, :, 4]).all()
    np.testing.assert_array_equal(found[0], found[1])              # the same weights here: the same noise for both
    one = encoders[0].embed(noisy[2 * K * H + 3 * H + 1]).global_feature
    np.testing.assert_allclose(found[0, 3, 1, 2], one, atol=1e-6)


def test_what_single_leads_have_where_a_recording_has_0_db(synth):
    """By add_noise's definition the median over leads is 0; by that of nst, which goes by the QRS, it is more."""
    noise, made = load_noise(open_corpus(synth / "data" / "nstdb"), "test"), recordings()[:1]
    flat = Recording(np.zeros((12, 5000)), 500.0, list(LEADS[1:13]))
    found = snr_of_leads(iter([flat, *made]), noise, PATCH, seed=3)
    assert list(found) == list(evaluate.NOISE_KINDS)
    for of in found.values():
        assert list(of) == list(LEADS[1:13])
        mean_square, nst = np.array(list(of.values())).T
        assert np.median(mean_square) == pytest.approx(0, abs=0.01) and np.ptp(mean_square) > 1 and np.median(nst) > 3
    one = next(evaluate.add_noise_levels(iter([made[0]]), noise, PATCH, 3, (0,)))      # another number: other noise
    clean = preprocess(*made[0][:4])[0]
    again = snr_of_leads(iter(made), noise, PATCH, seed=3)["mixture"]["V2"]
    added = one.signal[7] - clean[7]
    assert again[0] == pytest.approx(10 * np.log10(clean[7].var() / added.var()), abs=0.01)
    assert again[1] == pytest.approx(nst_db(clean[7], added), abs=0.01)


def test_nst_goes_by_qrs_amplitude_and_seconds_of_noise():
    """A triangle of 2 mV a second, and noise whose seconds have RMS 0.1 about different means."""
    t = np.arange(10 * FS)
    x = 2 * np.clip(1 - np.abs(t % FS - FS // 2) / 10, 0, None)
    noise = 0.1 * (-1.0) ** t + np.arange(10).repeat(FS)
    assert nst_db(x + 3, noise) == pytest.approx(10 * np.log10(2 ** 2 / 8 / 0.1 ** 2))
    x[x.argmax() - 20:x.argmax() + 20] *= 4                          # one beat of twenty and one second are left out
    twice = np.tile(x, 2), np.append(noise, noise)
    twice[0][10 * FS:] = 2 * np.clip(1 - np.abs(t % FS - FS // 2) / 10, 0, None)
    twice[1][:FS] *= 9
    assert nst_db(*twice) == pytest.approx(10 * np.log10(2 ** 2 / 8 / 0.1 ** 2))


def test_global_features_are_those_of_embed():
    encoder, made = small_encoder(), recordings(lost=True)
    short = made[0]._replace(signal=made[0].signal[:, :40])
    found = evaluate.global_features([encoder], lambda: iter([*made, short]))
    assert found.shape == (1, 5, 3 * WIDTH) and np.isnan(found[0, 4]).all()
    for feature, recording in zip(found[0], made):
        np.testing.assert_allclose(feature, encoder.embed(recording).global_feature, atol=1e-6)


def test_standardized_makes_a_missing_row_the_mean_one():
    x = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    x[7] = np.nan
    before = x.copy()
    scaled, new = evaluate.standardized(x, x[5:9])
    np.testing.assert_array_equal(x, before)                       # which others still use
    assert scaled.dtype == np.float64 and (scaled[7] == 0).all() and (new[2] == 0).all()
    np.testing.assert_allclose(np.delete(scaled, 7, 0).mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.delete(scaled, 7, 0).std(axis=0), 1, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# is a run learning?

def lead_counts(*sets):
    return torch.tensor([[ids.count(i) for i in range(len(LEADS))] for ids in sets])


def row(features, lead_sets, logits=None, **more):
    torch.manual_seed(1)
    p = (torch.randn(96, 64) if logits is None else logits).div(0.1).softmax(-1).mean(0)
    found = dino.health(features, lead_sets, p)
    assert all(v.ndim == 0 for v in found.values())
    return {k: float(v) for k, v in found.items()} | dict(
        ln_k=math.log(64), ln_patch_k=math.log(64), target_entropy=2.0, patch_target_entropy=1.0) | more


def test_collapse_is_named():
    torch.manual_seed(0)
    features, same = torch.randn(32, 16), lead_counts(*[[1, 2]] * 32)
    good = row(features, same)
    assert dino.diagnose(good, warm=True) == {} and good["cls_rank"] > 10
    alike = torch.randn(16) + torch.randn(32, 1) * torch.randn(16)                        # all along one direction
    assert list(dino.diagnose(row(alike, same), True)) == ["collapse of features"]
    few = torch.eye(64)[3:4] * 9
    assert list(dino.diagnose(row(features, same, few), True)) == ["collapse of predictions"]
    uniform, one_hot = good | dict(target_entropy=math.log(64)), good | dict(patch_target_entropy=0.3)
    assert list(dino.diagnose(uniform, True)) == ["uniform targets"]
    assert list(dino.diagnose(one_hot, True)) == ["one-hot patch targets"]
    assert dino.diagnose(uniform | one_hot, warm=False) == {}                          # at first that is normal


@pytest.mark.parametrize("value", [None, math.nan, "absent"])
def test_a_number_that_is_not_there_is_no_alarm(value):
    for name in ("cls_rank", "prediction_entropy", "target_entropy", "patch_target_entropy", "ln_k", "ln_patch_k"):
        bad = dict(cls_rank=1.0, prediction_entropy=0.1, target_entropy=4.15, patch_target_entropy=0.1, ln_k=4.158,
                   ln_patch_k=4.158)
        assert len(dino.diagnose(bad, warm=True)) == 4
        bad[name] = value
        if value == "absent":
            del bad[name]
        assert len(dino.diagnose(bad, warm=True)) == (2 if name == "ln_k" else 3)


def test_rank_is_that_of_numpy_within_lead_sets():
    torch.manual_seed(2)
    features = torch.randn(12, 20)
    which = [0, 0, 1, 0, 1, 2, 1, 0, 3, 1, 0, 1]                   # 2 and 3 are alone in their sets
    sets = lead_counts(*[[[1], [2], [1, 2], [7]][w] for w in which])
    x = features.double().numpy()
    within = np.stack([x[i] - x[np.array(which) == which[i]].mean(0) for i in range(12)])
    values = np.linalg.svd(within, compute_uv=False)
    share = values / values.sum()
    share = share[share > 1e-9]
    assert row(features, sets)["cls_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert row(features, sets)["cls_std"] == pytest.approx(x.std(axis=0, ddof=1).mean(), rel=1e-5)


def test_an_order_of_leads_is_no_other_lead_set_and_lone_sets_are_compared_with_all():
    torch.manual_seed(3)
    features = torch.randn(8, 16)
    assert row(features, lead_counts([1, 2], [2, 1]).repeat(4, 1)) == row(features, lead_counts([1, 2]).repeat(8, 1))
    alone = row(features, lead_counts(*[[i] for i in range(8)]))
    assert alone["cls_rank"] == row(features, lead_counts(*[[1]] * 8))["cls_rank"] > 5
    pair = row(features, lead_counts([1], *[[i] for i in range(1, 8)]))                    # one pair says nothing
    assert dino.diagnose(pair, True) == {}


def test_an_encoder_that_reads_lead_names_only_is_called_collapsed():
    """Its features differ from lead set to lead set, and have a high rank over all recordings."""
    encoder, rng = small_encoder(), np.random.default_rng(0)
    sets = [[int(i)] for i in rng.integers(1, 7, 24)] + [sorted(rng.choice(4, 2, False).tolist()) for _ in range(24)]
    signals = [torch.from_numpy(rng.normal(0, 0.3, (1, len(ids), 20 * PATCH))).float() for ids in sets]

    def alarms():
        with torch.no_grad():
            pooled = [encoder(x, torch.tensor([ids])).pooled() for x, ids in zip(signals, sets)]
        features = torch.cat(pooled)
        return dino.diagnose(row(features, lead_counts(*sets)), True), dino.effective_rank(
            (features - features.mean(0)).double())
    found, _ = alarms()
    assert found == {}
    with torch.no_grad():
        encoder.patch_embedding.weight.zero_()
        encoder.patch_embedding.bias.zero_()
    found, over_all = alarms()
    assert list(found) == ["collapse of features"] and "ignores the ECG" in found["collapse of features"]
    assert over_all > dino.COLLAPSED_RANK                      # which is why lead sets are kept apart


class Labels:
    """A corpus in memory: noise whose strength is the label."""

    def __init__(self, n, seed):
        rng = np.random.default_rng(seed)
        self.index = np.zeros(n, INDEX_DTYPE)
        self.index["label"] = 1 + rng.integers(0, 2, n)
        self.index["n_leads"], self.index["length"] = 12, 10 * FS
        self.index["leads"][:, :12] = np.arange(1, 13)
        self.index["split"] = np.arange(n) % 2
        self.signals = (rng.normal(size=(n, 12, 10 * FS)) * 100 * self.index["label"][:, None, None]).astype(np.int16)
        self.signals[0, 3, 5] = MISSING

    def read(self, i, start=0, length=None):
        return self.signals[i][:, start:start + length]

    def lead_ids(self, i):
        return self.index["leads"][i][:12]


def test_the_online_probe_finds_what_the_features_hold():
    corpus, encoder = Labels(90, 0), small_encoder()
    probe = OnlineProbe([corpus], 15 * PATCH)
    assert probe.usable and probe.scored.tolist() == [0, 1]
    assert [len(windows) for windows, _, _ in probe.sets] == [44, 45]          # one has a missing sample
    signal_mv = torch.from_numpy(corpus.read(2, 0, 15 * PATCH) * np.float32(1e-3))
    assert probe.score(encoder, torch.device("cpu")) > 0.95
    with torch.no_grad():
        out = encoder(signal_mv[None], torch.arange(1, 13)[None])
    seen = []
    encoder.forward, forward = lambda *x: seen.append(forward(*x)) or seen[-1], encoder.forward
    probe.score(encoder, torch.device("cpu"))
    np.testing.assert_allclose(seen[0].global_feature()[0], out.global_feature()[0], atol=1e-5)
    assert not OnlineProbe([Labels(20, 0)], 15 * PATCH).usable
    assert not OnlineProbe([corpus], 11 * FS).usable and not OnlineProbe([], 500).usable


# ---------------------------------------------------------------------------------------------------------------------
# pictures

def test_bars_leave_out_what_is_not_known(tmp_path):
    figure = Figure()
    axis = figure.subplots()
    evaluate.draw_bars(axis, ["a", "b"], {"untrained": ([0.7, None], [[0.6, 0.8], [None, None]]),
                                          "pre-trained": ([0.9, 0.4], [[0.8, 1.0], [0.3, 0.5]])})
    save_figure(figure, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == PNG and axis.get_ylim()[0] < 0.41
    assert [t.get_text() for t in axis.texts] == ["0.700", "", "0.900", "0.400"]


def example(seed=0, R=40):
    """A probe with known weights for R recordings of two leads, half as many people: arguments of draw_examples."""
    rng, encoder = np.random.default_rng(seed), small_encoder()
    made = [Recording(draw_ecg(FS, 3.1, ("I", "V2"), rr_s), FS, ["I", "V2"]) for rr_s in rng.uniform(0.5, 1, R)]
    x = np.stack([encoder.embed(recording).global_feature for recording in made])
    weights = rng.normal(size=(3 * WIDTH, 2))
    z = (x - x.mean(axis=0)) @ weights
    y = z + rng.normal(0, z.std(), z.shape) > 0
    seen = np.arange(15) % 3 > 0
    return encoder, x, lambda rows: rows @ weights + 3, ["a", "b"], 1 / (1 + np.exp(-z)), y, np.arange(R) // 2, (
        lambda row: (f"row {row}", made[row], seen)), made, weights, seen


def test_examples_are_the_most_confident_ones_and_show_their_patches(monkeypatch):
    """Which ones, what is said of them, and the colours, by loops."""
    *arguments, made, weights, seen = example()
    encoder, x, _, _, p, y, group, _ = arguments
    shown, draw = [], evaluate.draw_ecg_paper
    monkeypatch.setattr(evaluate, "EXAMPLES", 4)
    monkeypatch.setattr(evaluate, "draw_ecg_paper", lambda *drawn, **how: shown.append(drawn) or draw(*drawn, **how))
    found = evaluate.draw_examples(*arguments)
    expected = []
    for right in (False, True):
        rows = [(abs(p[r, k] - y[r, k]) * (1 if right else -1), r, k) for r in range(len(p)) for k in range(2)
                if (abs(p[r, k] - y[r, k]) < 0.5 and y[r, k] if right else abs(p[r, k] - y[r, k]) > 0.5)]
        best = {}
        for _, r, k in sorted(rows):
            best.setdefault(group[r], (r, k))
        expected.append(list(best.values())[:4])
        captions = [f"row {r}: probability of {'ab'[k]} {p[r, k]:.3f}; annotated: "
                    f"{', '.join(c for c, there in zip('ab', y[r]) if there) or 'none of the labels'}"
                    for r, k in expected[-1]]
        assert Page(found[right]).captions == captions and len(captions) == 4
    for (r, k), (signal_mv, leads, panels) in zip(sum(expected, []), shown):
        colours, = panels.values()
        assert leads == ["I", "V2"] and signal_mv.shape == (2, 750) == colours.shape[:2]           # whole patches
        np.testing.assert_allclose(signal_mv, made[r].signal[:, :750], atol=1e-6)
        local, part = encoder.embed(made[r]).local_features, np.zeros((2, 15))
        for lead in range(2):
            for n in np.flatnonzero(seen):
                part[lead, n] = sum((local[lead, n, d] - x[:, WIDTH + d].mean()) * weights[WIDTH + d, k]
                                    for d in range(WIDTH))
        full = np.sort(np.abs(part).ravel())[-1]
        for lead in range(2):
            for n in range(15):
                rgb = colours[lead, n * PATCH]
                assert (colours[lead, n * PATCH:(n + 1) * PATCH] == rgb).all()
                assert (rgb == 1).all() if part[lead, n] == 0 else (rgb[0] > rgb[2]) == (part[lead, n] > 0)
        strongest = np.unravel_index(np.abs(part).argmax(), part.shape)
        np.testing.assert_allclose(colours[strongest[0], strongest[1] * PATCH],
                                   evaluate.FOR if part[strongest] > 0 else evaluate.AGAINST)
        weak = np.abs(part) < 0.5 * full                               # below full colour they are proportional
        depth = (1 - colours[:, ::PATCH]).max(axis=2) / (1 - np.where(part > 0, *(
            c.min() for c in (evaluate.FOR, evaluate.AGAINST))))
        scale = np.quantile(np.abs(part), 0.95)
        np.testing.assert_allclose(depth[weak], np.minimum(np.abs(part) / scale, 1)[weak], atol=1e-5)


def test_a_right_example_has_the_label_and_a_wrong_one_is_wrong():
    *arguments, made, _, _ = example()
    arguments[4], arguments[5] = np.full((40, 2), 0.1), np.zeros((40, 2), bool)        # all are right, none has a label
    assert evaluate.draw_examples(*arguments) == {False: "", True: ""}
    arguments[4], arguments[5] = np.zeros((40, 0)), np.zeros((40, 0), bool)
    assert evaluate.draw_examples(*arguments) == {False: "", True: ""}


class Page(HTMLParser):
    """What a page shows: its text, captions, images (bytes), cells, and whatever is not in the page itself."""

    def __init__(self, text):
        super().__init__()
        self.text, self.captions, self.images, self.tags, self.links, self.cells = "", [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        if tag == "img":
            kind, data = attributes["src"].split(",")
            assert kind == "data:image/webp;base64"
            self.images.append(base64.b64decode(data, validate=True))
        self.links += [value for name, value in attributes.items() if name in ("href", "src") and "data:" not in value]

    def handle_data(self, data):
        self.text += data
        if self.tags[-1:] == ["figcaption"] and data.strip():
            self.captions.append(data)
        if self.tags[-1:] in (["td"], ["th"]) and data.strip():
            self.cells.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What write_results writes, with two wrong examples and two right ones, and the result that it got."""
    *arguments, made, _, _ = example()
    figure = Figure(figsize=(32, 4), layout="constrained")
    for axis in figure.subplots(1, 2):
        axis.plot([0, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "EXAMPLES", 2)
        examples = evaluate.draw_examples(*arguments)
    result = dict(encoder=["random:tiny"], n=dict(test=3), tasks={
        "all": dict(n=3, auroc=0.8125, ci95=[0.7, None], deep=dict(z=1.5)), "some": dict(auroc=0.5, ci95=[0.25, 0.75])})
    text = "The protocol, with <angles> & so\n      auroc  difference\nall    0.812       0.100"
    args = Namespace(out=tmp_path_factory.mktemp("report") / "out", encoder=["random:tiny"], looks=7)
    evaluate.write_results(args, "ptbxl", result, dict(a=np.arange(3)), figure, text, [small_encoder()], made[:2],
                           examples)
    return args.out, result


def test_the_report_holds_all_that_it_shows(report):
    out, result = report
    text = (out / "report.html").read_text()
    page = Page(text)
    assert {path.name for path in out.iterdir()} == {"ptbxl.json", "ptbxl.png", "predictions.npz", "report.html"}
    assert len(page.images) == 6 and text.count("<figure>") == 5 and len(page.captions) == 4
    for image, width_mm in zip(page.images, 2 * [None] + 4 * [95 + 4]):          # an image for each part of a figure
        with PIL.Image.open(io.BytesIO(image)) as found:
            # A browser shows 96 pixels an inch, so ECG paper is true to scale.
            assert abs(found.width / 96 * 25.4 - (width_mm or 16 * 25.4)) < (2 if width_mm else 20) < found.height
            assert len(found.convert("RGB").getcolors(10 ** 6)) > 10           # something is drawn
    assert not page.links and "script" not in page.tags and "http" not in text and "@import" not in text
    assert 'name="viewport" content="width=device-width' in text and "img{max-width:100%;height:auto}" in text
    for said in ("The protocol, with <angles> & so", "all    0.812       0.100", "scored 7 times", "untrained",
                 "Of 2 test recordings 0 are known", "All numberstasks"):
        assert said in page.text, said
    assert [cell.strip() for cell in page.cells] == [
        "all", "some", "n", "3", "-", "auroc", "0.812 [0.700, ]", "0.500 [0.250, 0.750]", "deep.z", "1.500", "-"]
    assert json.loads((out / "ptbxl.json").read_text()).items() >= result.items()


def test_nothing_in_the_report_is_wider_than_the_page(report, tmp_path):
    """In a browser, if there is one, as wide as a phone and as a desk. A figure that is missing or too wide is seen."""
    browser = shutil.which("chromium")
    if not browser:
        pytest.skip("no chromium")
    text = (report[0] / "report.html").read_text()
    broken = text.replace("max-width:100%;", ""), text.replace("data:image/webp;base64,", "data:,", 1)
    frames = "".join(f'<iframe width={width} height=800 srcdoc="{escape(page)}"></iframe>'
                     for page in (text, *broken) for width in (390, 1280))
    (tmp_path / "page.html").write_text(f"""<meta charset="utf-8">{frames}<script>onload = () => {{
        document.body.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(f => [
            f.contentWindow.innerWidth, f.contentDocument.documentElement.scrollWidth,
            [...f.contentDocument.images].map(i => [i.naturalWidth, i.getBoundingClientRect().right])]))}}
        </script>""")
    quiet = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update",
             "disable-sync")
    out = subprocess.run([browser, "--headless", "--no-sandbox", *(f"--{flag}" for flag in quiet), "--dump-dom",
                          f"--user-data-dir={tmp_path}/chromium", (tmp_path / "page.html").as_uri()],
                         capture_output=True, text=True, timeout=120).stdout
    found = json.loads(out[out.index("[["):out.rindex("]]") + 2])
    assert [width for width, *_ in found] == 3 * [390, 1280]
    fits = [scrolled <= width and len(images) == 6 and all(own > 0 and right <= width for own, right in images)
            for width, scrolled, images in found]
    assert fits == [True, True, False, False, False, False]


# ---------------------------------------------------------------------------------------------------------------------
# command line

def test_an_absent_device_and_an_absent_encoder_are_named(tmp_path):
    with pytest.raises(ValueError, match="nosuch"):
        evaluate.load_encoders(["random:tiny"], "nosuch")
    with pytest.raises(ValueError, match="no encoder at"):
        evaluate.load_encoders([tmp_path / "encoder.pt"], "cpu")
    networks, control_of = evaluate.load_encoders(["random:tiny"], "auto")
    assert len(networks) == 1 and control_of == [0]


def test_encoders_of_one_seed_share_their_control(tmp_path):
    for name, seed, step in (("a", 0, 1.0), ("b", 1, 2.0), ("c", 0, 3.0), ("d", 0, 3.0)):
        encoder = Encoder(width=WIDTH, depth=1, heads=1, layer_scale=1.0, init_seed=seed)
        encoder.cls_token.data += step
        save_encoder(encoder, tmp_path / name)
    networks, control_of = evaluate.load_encoders([tmp_path / name for name in "abc"], "cpu", "fp32")
    assert len(networks) == 5 and control_of == [3, 4, 3]
    for number, control in enumerate(control_of):
        moved = networks[number].cls_token - networks[control].cls_token
        torch.testing.assert_close(moved, torch.full_like(moved, 1.0 + number))
    for same in ([tmp_path / "c", tmp_path / "d"], ["random:tiny", "random:tiny:0"]):      # would count as two seeds
        with pytest.raises(ValueError, match="expected different files"):
            evaluate.load_encoders(same, "cpu")


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_over_seeds_and_patients_cover_the_truth(seeds):
    """The score of a seed is the truth, plus what the seed adds, plus what the test patients add (the same for all
    seeds) and what they add to each seed. 95 % of the intervals hold the truth; fewer of those of one seed.
    """
    rng, held = np.random.default_rng(0), []
    for _ in range(2000):
        patients = rng.normal(0, 0.04, 200)                        # what each of 200 patients adds to all seeds
        own = rng.normal(0, 0.01, (seeds, 200))                    # and to one seed
        counts = rng.multinomial(200, np.full(200, 1 / 200), size=100) / 200
        seed = rng.normal(0, 0.003, seeds)[:, None]
        scores = 0.85 + seed + (patients + own) @ np.concatenate((np.full((1, 200), 1 / 200), counts)).T
        low, high = evaluate.interval_of_seeds(scores, 200)
        alone = evaluate.interval(scores[0, 1:])
        held.append((low <= 0.85 <= high, alone[0] <= 0.85 <= alone[1]))
    both, alone = np.mean(held, axis=0)
    assert 0.93 <= both <= 0.97 and alone < both - 0.05


def test_the_interval_of_one_encoder_is_that_of_its_patients():
    scores = np.random.default_rng(0).normal(0.8, 0.01, (1, 1001))
    assert evaluate.interval_of_seeds(scores, 50) == evaluate.interval(scores[0, 1:])


def test_seeds_that_cannot_be_scored_or_do_not_differ_have_an_interval_too():
    assert np.isnan(evaluate.interval_of_seeds(np.full((2, 11), np.nan), 5)).all()
    assert evaluate.interval_of_seeds(np.ones((2, 11)), 5) == [1, 1]
    some = np.ones((2, 11))
    some[:, 3] = np.nan                                              # a resample without a class
    assert evaluate.interval_of_seeds(some, 5) == [1, 1]


def test_the_interval_of_a_share_stays_within_0_and_1():
    scores = np.random.default_rng(0).uniform(0.4, 0.5, (3, 101)) + np.array([[-0.4], [0], [0.5]])
    low, high = evaluate.interval_of_seeds(scores, 50)
    assert low < 0 and high > 1 and evaluate.interval_of_seeds(scores, 50, signed=False) == [0, 1]


@pytest.mark.parametrize("paths", [["a", "a"], ["a", "wide"], ["a", "random:tiny"], ["random:tiny", "random:tiny"]])
def test_what_cannot_be_averaged_is_refused(tmp_path, paths):
    for name, width in (("a", WIDTH), ("wide", 2 * WIDTH)):
        save_encoder(Encoder(width=width, depth=1, heads=1, layer_scale=1.0), tmp_path / name)
    with pytest.raises(ValueError, match="expected different files of one size.*probe others alone"):
        evaluate.load_encoders([p if ":" in p else str(tmp_path / p) for p in paths], "cpu")


def test_the_mean_of_results_is_that_of_every_number():
    found = evaluate.mean_of([dict(a=1.0, b=dict(c=[1, 2])), dict(a=2.0, b=dict(c=[3, 5]))])
    assert found["a"] == 1.5 and found["b"]["c"].tolist() == [2, 3.5]


def test_help_says_that_raw_is_the_publishers_folder(capsys):
    with pytest.raises(SystemExit):
        evaluate.parser_of("what it does", "raw/ptbxl").parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "such as raw/ptbxl; not the prepared corpus" in said and "cuda:1" in said
