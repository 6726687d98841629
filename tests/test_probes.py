"""The probes: their arithmetic against other programs' or plain loops, and both from raw recordings to their files."""
import json

import numpy as np
import pytest
import torch
import wfdb
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

import probe_mitbih
import probe_ptbxl
from model import Encoder, save_encoder
from prepare import FS, MITDB_DS1, MITDB_DS2, open_corpus

WIDTH, WINDOW, PATCH = 16, 5, 50


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory):
    """A narrow encoder whose weights are not those that it started from."""
    encoder = Encoder(width=WIDTH, depth=1, heads=1, layer_scale=1.0, window_patches={1: WINDOW})
    with torch.no_grad():
        encoder.patch_embedding.weight.mul_(0.5)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    save_encoder(encoder, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# PTB-XL: arithmetic

def scores(seed, n=80):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.3
    return rng, y, np.round(rng.normal(size=n) + y, 1)             # rounded: with ties


def test_resampled_auroc_is_that_of_sklearn_with_weights():
    rng, y, score = scores(0)
    counts = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=20)
    expected = [roc_auc_score(y, score, sample_weight=c) for c in counts]
    np.testing.assert_allclose(probe_ptbxl.resampled_auroc(y, score, counts), expected, rtol=1e-12)
    counts[3, y] = 0                                               # a resample without positives has no AUROC
    assert np.isnan(probe_ptbxl.resampled_auroc(y, score, counts)[3])


def test_patients_are_resampled_with_all_their_recordings():
    patients = np.array([7, 7, 3, 9, 3, 7])
    counts = probe_ptbxl.patient_counts(patients, seed=0)
    assert counts.shape == (probe_ptbxl.BOOTSTRAPS, 6)
    for same in ([0, 1, 5], [2, 4]):
        assert (counts[:, same] == counts[:, same[:1]]).all()
    assert (counts[:, [0, 2, 3]].sum(axis=1) == 3).all()           # as many patients as there are
    np.testing.assert_array_equal(counts, probe_ptbxl.patient_counts(patients, seed=0))


def test_platt_is_that_of_sklearn():
    _, y, score = scores(1, 200)
    model = LogisticRegression().fit(score[:, None], y)
    logit = model.decision_function(score[:, None])
    expected = CalibratedClassifierCV(FrozenEstimator(model), method="sigmoid").fit(score[:100, None], y[:100])
    np.testing.assert_allclose(probe_ptbxl.platt(logit[:100], y[:100], logit[100:]),
                               expected.predict_proba(score[100:, None])[:, 1], atol=2e-4)


def test_calibration_is_its_definition():
    rng = np.random.default_rng(2)
    p, y = rng.random((300, 2)), rng.random((300, 2)) < 0.4
    found, ece = probe_ptbxl.calibration(p, y), []
    for k in range(2):
        gap = 0.0
        for b in range(15):
            inside = (p[:, k] >= b / 15) & (p[:, k] < (b + 1) / 15)
            gap += inside.mean() * abs(p[inside, k].mean() - y[inside, k].mean()) if inside.any() else 0.0
        ece.append(gap)
    assert found["ece"] == pytest.approx(np.mean(ece))
    assert found["brier"] == pytest.approx(np.mean([brier_score_loss(y[:, k], p[:, k]) for k in range(2)]))
    assert found["nll"] == pytest.approx(-np.mean(np.log(np.where(y, p, 1 - p))))
    assert probe_ptbxl.calibration(np.tile(y.mean(0), (300, 1)), y)["ece"] == pytest.approx(0, abs=1e-12)


def test_labels_without_both_classes_are_not_fitted_and_further_rows_follow():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 4))
    y = np.stack((x[:, 0] > 0, np.zeros(60, bool), x[:, 0] > 0), axis=1)
    train = np.arange(60) < 40
    logits = probe_ptbxl.fit_labels(np.concatenate((x, x[:10], x[:10] + np.nan)), y, train)
    assert logits.shape == (len(probe_ptbxl.C_GRID), 20 + 20, 3)
    assert np.isnan(logits[:, :, 1]).all()
    np.testing.assert_array_equal(logits[:, :, 0], logits[:, :, 2])
    assert roc_auc_score(y[40:, 0], logits[-1, :20, 0]) > 0.95 and roc_auc_score(y[:10, 0], logits[-1, 20:30, 0]) > 0.95
    assert np.ptp(logits[-1, 30:, 0]) == 0                         # nothing usable: all are the mean recording
    assert probe_ptbxl.choose_c(logits[:, :20], y[40:]) == np.argmax(
        [np.mean([roc_auc_score(y[40:, k], z[:20, k]) for k in (0, 2)]) for z in logits])


# ---------------------------------------------------------------------------------------------------------------------
# MIT-BIH: beats, features, arithmetic

def test_beats_get_their_aami_class(tmp_path):
    symbols = list("NLRejAaJSVEF/fQ") + ["+", "~", "|", "!", "x"]
    wfdb.wrann("r", "atr", 360 * np.arange(1, len(symbols) + 1), symbols, fs=360, write_dir=str(tmp_path))
    times_s, classes = probe_mitbih.read_beats(str(tmp_path / "r"))
    np.testing.assert_allclose(times_s, np.arange(1, 16))
    assert "".join(classes) == "NNNNNSSSSVVFQQQ"


def test_normal_beats_of_ds1_are_thinned_evenly_and_no_others():
    cls = np.array(["N"] * 1500 + ["V"] * 700 + ["Q"] * 5)
    train, test = (probe_mitbih.used_beats(name, cls) for name in (MITDB_DS1[0], MITDB_DS2[0]))
    assert train[:1500].sum() == 600 and train[1500:2200].all() and not train[2200:].any()
    assert np.ptp(np.diff(np.flatnonzero(train[:1500]))) <= 1
    assert test[:2200].all() and not test[2200:].any()


def test_rr_features_are_their_definition():
    beats_s = np.cumsum([0.5, 0.8, 0.8, 0.5, 1.1, 0.8, 0.9])
    rr, usual = np.diff(beats_s), 0.8
    x = probe_mitbih.rr_features(beats_s)
    np.testing.assert_allclose(x[3, :2], (0.5, 1.1))               # the early beat: short before, long after
    np.testing.assert_allclose(x[3, 2], np.mean((usual, *rr[:2])))
    np.testing.assert_allclose(x[3, 3:], (0.5 / x[3, 2], 1.1 / x[3, 2], 0.5 / 1.1, 0.5 / usual, 1.1 / usual))
    assert np.isfinite(x).all() and x[0, 0] == pytest.approx(usual) and x[-1, 1] == pytest.approx(usual)


def test_a_beat_is_described_by_the_tokens_around_its_r(encoder_path):
    """Each beat's features are those of a window with R in the middle, made here one by one."""
    encoder = probe_mitbih.load_encoders(str(encoder_path), "cpu")[0][0]
    signal = np.random.default_rng(4).normal(0, 0.3, (2, 20 * FS)).astype(np.float32)
    beats_s = np.array([0.1, 5.0, 7.123, 19.9])
    r_token, both = probe_mitbih.token_features(encoder, signal, FS, ["II", "V1"], beats_s)
    assert r_token.shape == (4, WIDTH) and both.shape == (4, 2 * WIDTH)
    np.testing.assert_array_equal(both[:, :WIDTH], r_token)
    signal_mv, ids = probe_mitbih.preprocess(signal, FS, ["II", "V1"])
    for k, start in ((1, 1250 - 2 * PATCH - 25), (2, 1781 - 2 * PATCH - 25)):
        with torch.inference_mode():
            tokens = encoder(torch.from_numpy(signal_mv[None, :, start:start + WINDOW * PATCH]), torch.from_numpy(ids)[None]).patches[0].mean(0)
        np.testing.assert_allclose(r_token[k], tokens[2], atol=1e-5)
        # Centres of patches lie at -400, -200, 0, 200 and 400 ms.
        np.testing.assert_allclose(both[k, WIDTH:], tokens[1:5].mean(0), atol=1e-5)
    assert np.isfinite(both).all()                                 # beats near the ends too


def test_record_auroc_is_that_of_sklearn():
    rng = np.random.default_rng(5)
    cls, record = rng.choice(list("NSV"), 300), rng.choice(["a", "b", "c"], 300)
    p = np.round(rng.random((300, 4)), 1)
    counts = np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]])
    found = probe_mitbih.resampled_auroc(p, cls, record, counts)
    for row, weights in zip(found, counts):
        weight = weights[np.unique(record, return_inverse=True)[1]]
        expected = [roc_auc_score(cls == c, p[:, i], sample_weight=weight) for i, c in enumerate("NSV")]
        np.testing.assert_allclose(row[:3], expected, rtol=1e-12)
    assert np.isnan(found[:, 3]).all()                             # no F beat
    np.testing.assert_allclose(probe_mitbih.nsv(found), found[:, :3].mean(axis=1))


def test_c_is_chosen_without_the_test_records():
    """Labels of the test rows may be anything: the choice and the probabilities are the same."""
    rng = np.random.default_rng(6)
    record = np.repeat(["100", "101", "102", "103", "104", "105"], 40)
    cls = rng.choice(list("NSV"), 240)
    x = rng.normal(size=(240, 6)) + np.eye(6)[np.searchsorted(list("NSV"), cls)]
    train = record < "104"
    found = [probe_mitbih.probe(x, dict(cls=c, record=record), train, ~train) for c in (cls, np.where(train, cls, "F"))]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] and found[0][0].shape == (80, 4)
    np.testing.assert_allclose(found[0][0].sum(axis=1), 1)


# ---------------------------------------------------------------------------------------------------------------------
# from raw recordings to the files

def results(out, name):
    result = json.loads((out / f"{name}.json").read_text())
    assert {p.name for p in out.iterdir()} == {f"{name}.json", "predictions.npz", f"{name}.png"}
    assert (out / f"{name}.png").stat().st_size > 10_000
    return result, np.load(out / "predictions.npz")


def test_ptbxl_from_raw_to_report(synth, encoder_path, tmp_path, capsys):
    args = ["--encoder", str(encoder_path), "--raw", str(synth / "raw" / "ptbxl"), "--out", str(tmp_path / "out"),
            "--noise", str(synth / "data" / "nstdb"), "--device", "cpu"]
    probe_ptbxl.main(probe_ptbxl.parse_args(args))
    result, stored = results(tmp_path / "out", "ptbxl")
    assert set(result["tasks"]) == set(probe_ptbxl.TASKS) and not result["untrained_only"]
    task = result["tasks"]["superdiagnostic"]
    assert {"macro_auroc", "macro_auroc_min10", "ci95", "untrained", "difference", "difference_ci95", "n_labels", "n_test"} <= set(task)
    y, p, p0 = (stored[f"superdiagnostic_{k}"] for k in ("y", "p", "p_untrained"))
    assert task["macro_auroc"] == pytest.approx(roc_auc_score(y, p, average="macro"), abs=1e-6)
    assert task["untrained"] == pytest.approx(roc_auc_score(y, p0, average="macro"), abs=1e-6)
    assert task["difference"] == pytest.approx(task["macro_auroc"] - task["untrained"], abs=2e-6) != 0
    noise = task["robustness"]
    assert len(noise["macro_auroc"]) == len(noise["snr_db"]) == len(probe_ptbxl.NOISE_DB)
    assert noise["macro_auroc"][0] == pytest.approx(task["macro_auroc"], abs=0.05)   # 24 dB is hardly any noise
    assert noise["macro_auroc_kept"] == pytest.approx(np.mean(noise["macro_auroc"]) / task["macro_auroc"], abs=1e-5)
    said = capsys.readouterr().out
    assert f"fold 10 is scored ({len(y)} recordings" in said and "kept under noise" in said


def test_mitbih_from_raw_to_report(synth, encoder_path, tmp_path, capsys):
    args = ["--encoder", str(encoder_path), "--raw", str(synth / "raw" / "mitdb"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    probe_mitbih.main(probe_mitbih.parse_args(args))
    result, stored = results(tmp_path / "out", "mitbih")
    for name in ("r_token", "neighbourhood"):
        entry = result["features"][name]
        assert {"macro_nsvf", "macro_nsv", "per_class", "ci95", "untrained", "difference", "difference_ci95"} <= set(entry)
        for key, value in ((f"p_{name}", entry["macro_nsv"]), (f"p_untrained_{name}", entry["untrained"])):
            expected = np.mean([roc_auc_score(stored["cls"] == c, stored[key][:, i]) for i, c in enumerate("NSV")])
            assert value == pytest.approx(expected, abs=1e-6)
    assert result["controls"]["rr"]["macro_nsv"] > 0.9 and "macro_nsvf" in result["controls"]["raw"]
    assert set(stored["record"]) <= set(MITDB_DS2) and "N: N L R e j" in capsys.readouterr().out


def test_the_untrained_control_can_be_had_alone(synth, tmp_path):
    args = ["--encoder", "random:tiny:1", "--raw", str(synth / "raw" / "ptbxl"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    probe_ptbxl.main(probe_ptbxl.parse_args(args))
    result, _ = results(tmp_path / "out", "ptbxl")
    assert result["untrained_only"] and all(t["difference"] == 0 and "robustness" not in t for t in result["tasks"].values())


@pytest.mark.parametrize("probe, words", [(probe_ptbxl, "no ptbxl_database.csv in"), (probe_mitbih, "holds 0 of the 44 records")])
def test_a_wrong_folder_is_named(probe, words, encoder_path, tmp_path):
    with pytest.raises(ValueError, match=words):
        probe.main(probe.parse_args(["--encoder", str(encoder_path), "--raw", str(tmp_path), "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_noise_of_training_is_not_that_of_the_probe(synth):
    corpus = open_corpus(synth / "data" / "nstdb")
    train, test = (probe_ptbxl.load_noise(corpus, split) for split in ("train", "test"))
    assert train.shape[-1] == 20 * 60 * FS and test.shape[-1] == 10 * 60 * FS
    assert not np.isin(test[0, 0, :100].numpy(), train[0, 0].numpy()).any()
