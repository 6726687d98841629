"""Both probes: arithmetic, features against those of encoder.embed, and from raw recordings to their files."""
import json
import re
import warnings

import numpy as np
import pytest
import torch
import wfdb
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import f1_score, log_loss, precision_recall_fscore_support, roc_auc_score
from threadpoolctl import threadpool_limits

import evaluate
import probe_mitbih
import probe_ptbxl
from augment import add_test_noise, load_noise
from conftest import draw_ecg
from corpus import open_corpus
from ecg import FS, LEAD_IDS, LEADS, Recording, preprocess, read_wfdb
from evaluate import NOISE_DB, label_auroc, load_encoders, macro, selective
from model import BEAT_WINDOW_S, Encoder, place_windows, save_encoder, token_features
from prepare import MITDB_DS1, MITDB_DS2

WIDTH, WINDOW, PATCH = 16, 5, 50


@pytest.fixture(autouse=True)
def one_thread():
    """The products are small: more threads would only wait for each other."""
    with threadpool_limits(1):
        yield


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
# PTB-XL: features and arithmetic

@pytest.fixture(scope="module")
def ptbxl_records(tmp_path_factory):
    """Paths of WFDB records at 500 Hz: whole, with a gap, with a dead lead, flat, and 12 s long."""
    folder, paths = tmp_path_factory.mktemp("records"), []
    whole = draw_ecg(500, 12, LEADS[1:13]).T
    gap, dead, flat = whole[:5000].copy(), whole[:5000].copy(), np.zeros((5000, 12))
    gap[1000:1300, 2:5], dead[:, 7] = np.nan, 0
    for name, signal in dict(whole=whole[:5000], gap=gap, dead=dead, flat=flat, long=whole).items():
        wfdb.wrsamp(name, fs=500, units=["mV"] * 12, sig_name=[n.upper() for n in LEADS[1:13]], p_signal=signal,
                    fmt=["16"] * 12, adc_gain=[1000.0] * 12, baseline=[0] * 12, write_dir=str(folder))
        paths.append(str(folder / name))
    return paths


def test_ptbxl_features_are_those_of_embed(encoder_path, ptbxl_records):
    encoders, _ = load_encoders([encoder_path], "cpu")
    features, unusable = probe_ptbxl.extract_features(encoders, ptbxl_records)
    assert features.shape == (2, 5, 3 * WIDTH) and unusable == 1
    for encoder, found in zip(encoders, features):
        for path, feature in zip(ptbxl_records[:3], found):
            np.testing.assert_allclose(feature, encoder.embed(read_wfdb(path)).global_feature, atol=1e-6)
        assert np.isnan(found[3]).all()
        np.testing.assert_allclose(found[4], found[0], atol=1e-6)  # the first 10 s
    assert np.abs(features[0, 0] - features[0, 1]).max() > 1e-3 and np.abs(features[0, 0] - features[1, 0]).max() > 1e-3


def test_a_record_that_cannot_be_read_is_named(encoder_path, ptbxl_records, tmp_path):
    encoders, _ = load_encoders([encoder_path], "cpu")
    with pytest.raises(ValueError, match="nothing.*is not there"):
        probe_ptbxl.extract_features(encoders, [ptbxl_records[0], str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="none of the 1 recordings is usable.*flat"):
        probe_ptbxl.extract_features(encoders, [ptbxl_records[3]])


def test_leads_can_be_chosen_by_any_spelling(ptbxl_records):
    whole, two = (next(probe_ptbxl.read_recordings(ptbxl_records[:1], [leads])) for leads in (None, ["aVF", "MLII"]))
    assert two.leads == ["aVF", "MLII"] and len(whole.leads) == 12
    np.testing.assert_array_equal(two.signal, whole.signal[:, [5, 1]])
    with pytest.raises(ValueError, match="has no lead V7, X; it has I, II"):
        next(probe_ptbxl.read_recordings(ptbxl_records[:1], [["I", "V7", "X"]]))


def test_labels_without_both_classes_are_not_fitted_and_equal_ones_once(monkeypatch):
    rng, seen, fit_logistic = np.random.default_rng(3), [], probe_ptbxl.fit_logistic
    monkeypatch.setattr(probe_ptbxl, "fit_logistic", lambda x, y, c: seen.append(y.shape) or fit_logistic(x, y, c))
    x = rng.normal(size=(60, 4))
    y = np.stack((x[:, 0] > 0, np.zeros(60, bool), x[:, 0] > 0), axis=1)
    fit = probe_ptbxl.fit_labels(x[:40], y[:40])
    logits, unusable = fit(x[40:]), fit(x[:10] + np.nan)
    assert seen == [(40, 1)] and logits.shape == (len(probe_ptbxl.C_GRID), 20, 3)
    assert np.isnan(logits[:, :, 1]).all()
    np.testing.assert_array_equal(logits[:, :, 0], logits[:, :, 2])
    assert roc_auc_score(y[40:, 0], logits[-1, :, 0]) > 0.95
    assert np.ptp(unusable[-1, :, 0]) == 0                         # nothing usable: all are the mean recording
    np.testing.assert_allclose(unusable[0, 0, 0], fit(x[:40].mean(axis=0, keepdims=True))[0, 0, 0])
    assert probe_ptbxl.choose_c(logits, y[40:]) == np.argmax(
        [np.mean([roc_auc_score(y[40:, k], z[:, k]) for k in (0, 2)]) for z in logits])


# ---------------------------------------------------------------------------------------------------------------------
# PTB-XL: what deserves a score gets it

FOLDS = np.repeat(np.arange(1, 11), (*[150] * 8, 300, 600))


def simulated(seed=0, shuffled=False):
    """Data of five superclasses and eight statements of rising rarity, one of them without a test positive, and
    features (R, 12) that tell some of it; 1.5 recordings a patient. shuffled: each patient gets labels of another."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(FOLDS), 12))
    z = 2 * x @ rng.normal(size=(12, 13)) / 12 ** 0.5 + rng.logistic(size=(len(FOLDS), 13))
    y = z > np.diag(np.quantile(z, 1 - np.append(np.linspace(0.4, 0.1, 5), np.geomspace(0.3, 0.004, 8)), axis=0))
    patients = FOLDS * 1000 + rng.integers(0, 100 * (1 + (FOLDS > 8)), len(FOLDS))
    if shuffled:
        people, first = np.unique(patients, return_index=True)
        y = y[rng.permutation(first)[np.searchsorted(people, patients)]]
    y[FOLDS == 10, -1] = False
    sets = {"superdiagnostic": (list("ABCDE"), y[:, :5]), "all": (list("fghijklm"), y[:, 5:])}
    return probe_ptbxl.Data(sets, FOLDS, patients, [1]), x


def network_logits(data, x):
    return probe_ptbxl.fit_labels(x[data.train], data.y[data.train])(x[data.scored])


@pytest.mark.parametrize("who", ["constant", "coin", "shuffled", "untrained"])
def test_what_knows_nothing_gets_no_score_in_any_column(who):
    """A constant, a coin, an encoder whose labels are shuffled by patient, and an untrained one next to itself."""
    data, x = simulated(shuffled=who == "shuffled")
    control, rng = network_logits(data, x), np.random.default_rng(1)
    logits = dict(constant=lambda: network_logits(data, np.zeros_like(x)), shuffled=lambda: control,
                  coin=lambda: network_logits(data, rng.normal(size=x.shape)), untrained=lambda: control)[who]()
    scores = probe_ptbxl.macro_scores([logits, control], data)
    short, area = (probe_ptbxl.as_entries(data, x) for x in (scores, scores - 0.5))
    for task in data.sets:
        entry, arrays = probe_ptbxl.compare([logits, control], task, data)
        present = [data.sets[task][1][rows].any(axis=0) for rows in (data.train, data.test)]
        assert entry["n_labels"] == np.logical_and(*present).sum() == len(entry["labels"])
        assert short[task]["macro_auroc"] == pytest.approx(entry["macro_auroc_min10"])
        assert area[task]["ci95"] == pytest.approx(np.array(short[task]["ci95"]) - 0.5)
        for suffix in ("", "_min10"):
            low, high = entry[f"difference_ci95{suffix}"]
            if logits is control:
                assert entry[f"difference{suffix}"] == low == high == 0
            else:
                assert entry[f"difference{suffix}"] < -0.2 and high < 0 and entry[f"untrained{suffix}"] > 0.8
            if who != "untrained":
                assert entry[f"macro_auroc{suffix}"] == pytest.approx(0.5, abs=1e-12 if who == "constant" else 0.05)
                assert entry[f"ci95{suffix}"][0] <= 0.5 <= entry[f"ci95{suffix}"][1]
        for found in entry["calibration"].values() if who != "untrained" else ():
            assert -0.05 < found["brier_skill"] < 0.005 and -0.05 < found["nll_skill"] < 0.005
            assert abs(found["resolution"]) < 2e-3 and abs(found["ece"] - found["ece_perfect"]) < 0.05
            assert abs(found["reliability"]) < 0.01 and abs(found["z"]) < 4  # 300 rows set the prevalence
        assert who == "shuffled" or entry["untrained_calibration"]["raw"]["brier_skill"] > 0.1


@pytest.mark.parametrize("who", ["constant", "coin", "shuffled", "untrained"])
def test_few_labels_tell_nothing_either(who, monkeypatch):
    monkeypatch.setattr(probe_ptbxl, "DRAWS", 2)
    data, x = simulated(shuffled=who == "shuffled")
    own = dict(constant=np.zeros_like(x), coin=np.random.default_rng(1).normal(size=x.shape)).get(who, x)
    found = probe_ptbxl.label_fractions([own, x], [network_logits(data, of) for of in (own, x)], data)
    for share, entry in ((share, of["superdiagnostic"]) for share, of in found.items()):
        if who == "untrained":
            assert entry["difference"] == 0 == entry["difference_ci95"][0] == entry["difference_ci95"][1]
        else:
            assert entry["macro_auroc"] == pytest.approx(0.5, abs=1e-12 if who == "constant" else 0.05), share
            assert entry["ci95"][0] <= 0.5 <= entry["ci95"][1]
            assert who == "shuffled" or share == 0.01 or entry["difference_ci95"][1] < 0


def test_scores_are_those_of_sklearn_at_the_c_that_fold_9_chooses():
    data, x = simulated(2)
    logits = network_logits(data, x)
    (task, (_, y)), = [item for item in data.sets.items() if item[0] == "superdiagnostic"]
    of_val, of_test = (y[rows] for rows in (data.val, data.test))
    by_c = [roc_auc_score(of_val, z[:len(of_val), :5], average="macro") for z in logits]
    found = probe_ptbxl.score_task(logits, task, data)
    assert found["c"] == probe_ptbxl.C_GRID[int(np.argmax(by_c))]
    z = logits[int(np.argmax(by_c)), len(of_val):, :5]
    np.testing.assert_allclose(found["auroc"][0], roc_auc_score(of_test, z, average=None))
    model = LogisticRegression(C=found["c"], solver="newton-cholesky", tol=1e-10).fit(x[data.train], y[data.train, 0])
    scaled = (x - x[data.train].mean(axis=0)) / x[data.train].std(axis=0)
    model.fit(scaled[data.train], y[data.train, 0])
    np.testing.assert_allclose(model.decision_function(scaled[data.test]), z[:, 0], atol=1e-6)


def test_few_labels_are_nested_by_patient(monkeypatch):
    """A draw of 1 % lies in one of 10 %; no patient is split; less is known from fewer."""
    data, x = simulated(3)
    seen, fit_labels = [], probe_ptbxl.fit_labels
    monkeypatch.setattr(probe_ptbxl, "fit_labels", lambda x, y: seen.append(x[:, 0]) or fit_labels(x, y))
    found = probe_ptbxl.label_fractions([x, x], [network_logits(data, x)] * 2, data)
    rows = [np.flatnonzero(np.isin(x[:, 0], part)) for part in seen[1::2]]   # the first is network_logits
    tenth, hundredth = rows[:probe_ptbxl.DRAWS], rows[probe_ptbxl.DRAWS:]
    assert len(tenth) == len(hundredth) == probe_ptbxl.DRAWS and len({tuple(part) for part in tenth}) == len(tenth)
    people = len(np.unique(data.patients[data.train]))
    for some, all_of_10 in zip(hundredth, tenth):
        assert set(some) <= set(all_of_10) <= set(data.train)
        for part, share in ((some, 0.01), (all_of_10, 0.1)):
            chosen = np.unique(data.patients[part])
            assert len(chosen) == np.ceil(share * people)
            np.testing.assert_array_equal(part, data.train[np.isin(data.patients[data.train], chosen)])
    scores = [found[share]["superdiagnostic"]["macro_auroc"] for share in (1, 0.1, 0.01)]
    assert scores == sorted(scores, reverse=True) and scores[2] > 0.5
    assert found[1]["all"]["difference"] == 0 and found[0.1]["all"]["each"]["difference"] == [0] * probe_ptbxl.DRAWS
    low, high = found[0.01]["superdiagnostic"]["ci95"]
    each = found[0.01]["superdiagnostic"]["each"]["macro_auroc"]
    assert low < np.mean(each) < high and high - low > 2 * np.std(each, ddof=1) / len(each) ** 0.5


def test_leads_without_their_name_are_unknown(ptbxl_records):
    sets = {"two": ("I", "V2"), "two unnamed": ("I", "V2")}
    named, unnamed = probe_ptbxl.read_recordings(ptbxl_records[:1], [sets])
    assert named.leads == ["I", "V2"] and unnamed.leads == ["unknown", "unknown"]
    np.testing.assert_array_equal(named.signal, unnamed.signal)
    assert preprocess(*unnamed[:4], {})[1].tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# MIT-BIH: beats, features, arithmetic

def test_beats_get_their_group(tmp_path):
    symbols = list("NLRejAaJSVEF/fQ") + ["+", "~", "|", "!", "x"]
    wfdb.wrann("r", "atr", 360 * np.arange(1, len(symbols) + 1), symbols, fs=360, write_dir=str(tmp_path))
    times_s, group = probe_mitbih.read_beats(str(tmp_path / "r"))
    np.testing.assert_allclose(times_s, np.arange(1, 16))
    assert "".join(group) == "NNNJJSSSSVVFQQQ"


def test_escape_beats_are_n_for_papers_and_s_for_bxb():
    data = dict(record=np.repeat(["101", "100", "103"], 4), group=np.array(list("NJSV" * 3)), rr=np.ones((12, 8)),
                weight=np.array([2, 1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1]))
    for escape, expected in (("N", "NNSV"), ("S", "NSSV")):
        beats = probe_mitbih.select(data, slice(None), 0, escape)
        assert "".join(beats["cls"]) == expected * 3 and beats["train"].tolist() == [0, 1, 2, 3]
        assert beats["test"].tolist() == [4, 4, 4, 5, 6, 7, 8, 9, 10, 11]      # the first counts for three
        assert (beats["counts"][0] == 1).all() and beats["counts"].shape == (1001, 2)
        assert (beats["counts"].sum(axis=1) == 2).all() and beats["number"].tolist() == [0] * 6 + [1] * 4


def test_normal_beats_are_thinned_evenly_and_no_others():
    group = np.array(["N"] * 1500 + ["V"] * 700 + ["Q"] * 5 + ["J"] * 9)
    weight = probe_mitbih.used_beats(group, normals=600)
    assert (weight[:1500] > 0).sum() == 600 and (weight[1500:2200] == 1).all() and not weight[2200:2205].any()
    assert np.ptp(np.diff(np.flatnonzero(weight[:1500]))) <= 1 and (weight[2205:] == 1).all()
    assert weight[:1500].sum() == 1500 and set(weight[:1500]) == {0, 2, 3}     # one counts for two or three
    assert (probe_mitbih.used_beats(group, normals=9999) == (group != "Q")).all()
    assert not probe_mitbih.used_beats(group[:0]).size and (probe_mitbih.used_beats(group[1500:1503]) == 1).all()
    quick = probe_mitbih.used_beats(group, 50)
    assert quick[:1500].sum() == quick[1500:2200].sum() == 50 and set(quick) == {0, 1}
    assert not quick[2200:2205].any() and quick[0] and quick[1499] and quick[2199]
    most = probe_mitbih.used_beats(group, 1000, 600)
    assert most[:1500].sum() == 1000 and (most[:1500] > 0).sum() == 600


def test_rr_features_are_their_definition():
    beats_s = np.cumsum([0.5, 0.8, 0.8, 0.5, 1.1, 0.8, 0.9])
    rr, usual = np.diff(beats_s), 0.8
    x = probe_mitbih.rr_features(beats_s)
    np.testing.assert_allclose(x[3, :2], (0.5, 1.1))               # the early beat: short before, long after
    np.testing.assert_allclose(x[3, 2], np.mean((usual, *rr[:2])))
    np.testing.assert_allclose(x[3, 3:], (0.5 / x[3, 2], 1.1 / x[3, 2], 0.5 / 1.1, 0.5 / usual, 1.1 / usual))
    assert np.isfinite(x).all() and x[0, 0] == pytest.approx(usual) and x[-1, 1] == pytest.approx(usual)


def test_a_record_with_one_beat_or_none_has_as_many_rr_features():
    for n in (0, 1):
        assert probe_mitbih.rr_features(np.arange(n) + 1.0).shape == (n, 8)


def test_a_beat_is_described_by_the_tokens_around_its_r(encoder_path):
    """Each beat's features are those of a window with R in the middle, made here one by one."""
    encoder = load_encoders([encoder_path], "cpu")[0][0]
    signal = np.random.default_rng(4).normal(0, 0.3, (2, 20 * FS)).astype(np.float32)
    beats_s = np.array([0.1, 5.0, 7.123, 19.9])
    signal_mv, ids = preprocess(signal, FS, ["II", "V1"])
    both = token_features(encoder, signal_mv, ids, beats_s)
    assert both.shape == (4, 2 * WIDTH)
    r_token = both[:, :WIDTH]
    for k, start in ((1, 1250 - 2 * PATCH - 25), (2, 1781 - 2 * PATCH - 25)):
        with torch.inference_mode():
            window = torch.from_numpy(signal_mv[None, :, start:start + WINDOW * PATCH])
            tokens = encoder(window, torch.from_numpy(ids)[None]).patches[0].mean(0)
        np.testing.assert_allclose(r_token[k], tokens[2], atol=1e-5)
        # Centres of patches lie at -400, -200, 0, 200 and 400 ms.
        np.testing.assert_allclose(both[k, WIDTH:], tokens[1:5].mean(0), atol=1e-5)
    assert np.isfinite(both).all()                                 # beats near the ends too


LEAD_PAIR = ["II", "V1"]


@pytest.mark.parametrize("lost", [None, np.s_[0, 1700:1790], np.s_[:, 1700:1790], np.s_[1, :]],
                         ids=["whole", "gap in a lead", "gap in both leads", "dead lead"])
def test_mitbih_features_are_those_of_embed(encoder_path, lost):
    """The token of R is the mean over leads of the local features of exactly that window, without what is missing."""
    encoder = load_encoders([encoder_path], "cpu")[0][0]
    signal = draw_ecg(FS, 20, LEAD_PAIR, rr_s=0.9)
    if lost is not None:
        signal[lost] = np.nan
    signal_mv, ids = preprocess(signal, FS, LEAD_PAIR)
    beats_s = 0.5 + 0.9 * np.arange(3, 20)
    both = token_features(encoder, signal_mv, ids, beats_s)
    r_token = both[:, :WIDTH]
    start, N = place_windows(encoder, 2, signal_mv.shape[1], beats_s)
    assert N == WINDOW
    for k, first in enumerate(start):
        window = Recording(signal_mv[:, first:first + N * PATCH], FS, LEAD_PAIR)
        out = encoder.embed(window, window_s=N * PATCH / FS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)        # a patch without any valid lead
            tokens = np.nanmean(out.local_features, axis=0)
        r = round(beats_s[k] * FS) - first
        near = [-0.3 * FS <= round(t * FS) - r <= 0.4 * FS for t in out.times_s]
        np.testing.assert_allclose(r_token[k], tokens[r // PATCH], atol=1e-6)
        np.testing.assert_allclose(both[k, WIDTH:], np.nanmean(tokens[near], axis=0), atol=1e-6)
    unknown = np.isnan(r_token).any(axis=1)
    assert unknown.any() == (lost == np.s_[:, 1700:1790]) and np.isfinite(both[~unknown]).all()


def test_a_recording_shorter_than_a_window_is_the_window():
    encoder = Encoder(width=WIDTH, depth=1, heads=1, layer_scale=1.0, window_patches={1: 40}).eval()
    signal_mv, ids = preprocess(draw_ecg(FS, 3.1, LEAD_PAIR), FS, LEAD_PAIR)
    beats_s = np.array([0.02, 0.5, 1.33, 2.16, 3.09])
    start, N = place_windows(encoder, 2, signal_mv.shape[1], beats_s)
    assert N == 15 and start.min() >= 0 and (start + N * PATCH <= signal_mv.shape[1]).all()
    both = token_features(encoder, signal_mv, ids, beats_s)
    assert np.isfinite(both).all()
    window = signal_mv[:, start[1]:start[1] + N * PATCH]
    tokens = encoder.embed(window, fs=FS, leads=LEAD_PAIR).local_features.mean(axis=0)
    np.testing.assert_allclose(both[1, :WIDTH], tokens[(125 - start[1]) // PATCH], atol=1e-5)
    both = token_features(encoder, signal_mv[:, :PATCH - 1], ids, beats_s[:1])
    assert both.shape == (1, 2 * WIDTH) and np.isnan(both).all()


def test_the_window_of_a_beat_does_not_grow_with_that_of_training():
    encoder = Encoder(width=WIDTH, depth=1, heads=1, layer_scale=1.0, window_patches={1: 3000}).eval()
    usual = Encoder(width=WIDTH, depth=1, heads=1, layer_scale=1.0, window_patches={1: 40}).eval()
    signal_mv, ids = preprocess(draw_ecg(FS, 60, LEAD_PAIR), FS, LEAD_PAIR)
    beats_s = np.array([0.5, 30.38, 59.5])
    start, N = place_windows(encoder, 2, signal_mv.shape[1], beats_s)
    assert N * PATCH / FS == BEAT_WINDOW_S
    np.testing.assert_array_equal(start, place_windows(usual, 2, signal_mv.shape[1], beats_s)[0])
    np.testing.assert_array_equal(*(token_features(e, signal_mv, ids, beats_s) for e in (encoder, usual)))


def test_a_window_of_one_second_sees_the_same_token_and_no_more():
    """What happens 0.6 s from R changes the features of a window of 8 s, not those of a window of 1 s."""
    encoder = Encoder(width=WIDTH, depth=1, heads=1, layer_scale=1.0, window_patches={1: 40}).eval()
    signal_mv, ids = preprocess(draw_ecg(FS, 20, LEAD_PAIR), FS, LEAD_PAIR)
    other, r = signal_mv.copy(), 10 * FS
    other[:, r + FS * 6 // 10:] = other[:, :-r - FS * 6 // 10]
    assert place_windows(encoder, 2, signal_mv.shape[1], np.array([10.0]), 1.0) == (r - 125, 5)
    for window_s, same in ((1.0, True), (BEAT_WINDOW_S, False)):
        a, b = (token_features(encoder, x, ids, np.array([10.0]), window_s) for x in (signal_mv, other))
        assert np.array_equal(a, b) == same and np.isfinite(a).all()


def test_record_auroc_is_that_of_sklearn():
    rng = np.random.default_rng(5)
    cls, record = rng.choice(list("NSV"), 300), rng.choice(["a", "b", "c"], 300)
    p = np.round(rng.random((300, 4)), 1)
    counts, number = np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]]), np.unique(record, return_inverse=True)[1]
    found = label_auroc(probe_mitbih.one_hot(cls), p, number, counts)
    for row, weights in zip(found, counts):
        expected = [roc_auc_score(cls == c, p[:, i], sample_weight=weights[number]) for i, c in enumerate("NSV")]
        np.testing.assert_allclose(row[:3], expected, rtol=1e-12)
    assert np.isnan(found[:, 3]).all()                             # no F beat
    np.testing.assert_allclose(macro(found[:, probe_mitbih.NSV]), found[:, :3].mean(axis=1))


def test_auroc_within_records_is_that_of_plain_loops():
    """A record counts for a class if it has MIN_BEATS of it and of others; a resample weighs the records."""
    rng = np.random.default_rng(7)
    record = np.repeat(list("abcd"), (80, 60, 12, 40))
    cls = np.where(record == "c", "N", rng.choice(list("NSV"), len(record), p=(0.6, 0.2, 0.2)))
    cls[record == "d"] = ["V"] * 4 + ["N"] * 36                      # one V too few
    p, number = rng.random((len(cls), 4)), np.unique(record, return_inverse=True)[1]
    counts = np.array([[1, 1, 1, 1], [0, 3, 1, 0], [0, 0, 2, 2]])
    found = probe_mitbih.within_records(probe_mitbih.one_hot(cls), p, number, counts)
    for i, c in enumerate("NSV"):
        each = {r: roc_auc_score(cls[record == r] == c, p[record == r, i]) for r in "abcd"
                if min(np.sum(cls[record == r] == c), np.sum(cls[record == r] != c)) >= probe_mitbih.MIN_BEATS}
        assert set(each) == {"a", "b"}
        np.testing.assert_allclose(found[:, i], [(each["a"] + each["b"]) / 2, each["b"], np.nan], rtol=1e-12)
    assert np.isnan(found[:, 3]).all()


def test_rr_correlation_is_that_of_numpy_and_finds_what_is_there():
    rng = np.random.default_rng(8)
    rr = np.exp(rng.normal(-0.2, 0.2, (600, 8)))
    train, record = np.arange(600) < 300, np.repeat(list("xyz"), 200)
    number, counts = np.unique(record[~train], return_inverse=True)[1], np.array([[1, 1], [2, 0], [1, 4]])
    log = np.log(rr[:, [0, 3]])
    x = np.concatenate((log[:, :1], rng.normal(size=(600, 3))), axis=1)  # tells RR before alone
    found = probe_mitbih.rr_correlation(x, rr, train, ~train, number, counts)
    assert found.shape == (3, 2) and (found[:, 0] > 0.999).all() and (np.abs(found[:, 1]) < 0.3).all()
    noisy = x + rng.normal(0, 0.2, x.shape)
    found = probe_mitbih.rr_correlation(noisy, rr, train, ~train, number, counts)[:, 0]
    told = RidgeCV(probe_mitbih.RIDGE_GRID).fit(noisy[train], log[train, 0]).predict(noisy[~train])  # not standardized
    for r, weights in zip(found, counts):
        rows = np.repeat(np.arange(300), weights[number])              # within records
        a, b = (v - np.array([v[number == k].mean() for k in (0, 1)])[number] for v in (told, log[~train, 0]))
        assert r == pytest.approx(np.corrcoef(a[rows], b[rows])[0, 1], abs=0.01)


def test_to_know_the_heart_rate_of_a_record_is_no_correlation():
    rng = np.random.default_rng(9)
    train, record = np.arange(800) < 400, np.repeat(np.arange(8), 100)
    rate = np.linspace(-0.4, 0.4, 8)[record]
    rr = np.exp(rate[:, None] + rng.normal(0, 0.05, (800, 8)))
    number, counts = record[~train] - 4, np.ones((1, 4), int)
    x = np.stack((rate, rng.normal(size=800)), axis=1)
    assert abs(probe_mitbih.rr_correlation(x, rr, train, ~train, number, counts)[0, 0]) < 0.1


def drawn_beats(n, rng, share=(0.85, 0.05, 0.1)):
    """n beats in 4 records of DS1 and 4 of DS2: features (n, 3) that tell N, S and V apart, and what select says."""
    record = np.repeat([*MITDB_DS1[:4], "100", "103", "213", "232"], n // 8)
    group = rng.choice(list("NSV"), n, p=share)
    data = dict(record=record, group=group, weight=np.ones(n, int), rr=np.exp(rng.normal(-0.2, 0.2, (n, 8))))
    x = rng.normal(size=(n, 3)) + 1.5 * np.eye(3)[np.searchsorted(list("NSV"), group)]
    return x, probe_mitbih.select(data, slice(None), 0)


def test_the_fit_is_that_of_sklearn():
    """A regression of each class against the rest, made to add up to 1; a class that is not there gets 0."""
    x, beats = drawn_beats(800, np.random.default_rng(16))
    x = x * (1, 10, 0.1) + 5                                         # it is standardized first
    cls, z = beats["cls"], (x - x[:400].mean(axis=0)) / x[:400].std(axis=0)
    p = probe_mitbih.fit(x[:400], probe_mitbih.one_hot(cls[:400]), x)
    model = LogisticRegression(C=probe_mitbih.LOGIT_VARIANCE / 3, solver="newton-cholesky", tol=1e-10)
    expected = np.stack([model.fit(z[:400], cls[:400] == k).predict_proba(z)[:, 1] for k in "NSV"], axis=1)
    np.testing.assert_allclose(p[:, :3], expected / expected.sum(axis=1, keepdims=True), atol=1e-5)
    assert not p[:, 3].any()


def test_probabilities_get_the_frequencies_and_the_sharpness_of_held_out_beats():
    """A fit on every fifth N says S too often, and one that was fitted too closely is too sure. Mended, the mean
    probability is the share of each class again, and the log loss is the least that any temperature has."""
    x, beats = drawn_beats(16000, np.random.default_rng(10))
    kept = (beats["cls"] != "N") | (np.arange(16000) % 5 == 0)
    x, cls = x[kept], beats["cls"][kept]
    y, weight = probe_mitbih.one_hot(cls), np.where(cls == "N", 5, 1)
    p = probe_mitbih.fit(x, y, x)
    for sure in (1.0, 3.0):
        said = (p / y.mean(axis=0).clip(1e-9)) ** sure * y.mean(axis=0)                 # too sure of odds, not shares
        said /= said.sum(axis=1, keepdims=True)
        mended, new, first, sharpness, prior = probe_mitbih.calibrate(said, y, weight, said[:50])
        assert p[:, 1].mean() > 0.1 and sharpness == pytest.approx(1 / sure, rel=0.1)
        np.testing.assert_allclose(np.average(mended, axis=0, weights=weight)[:3], weight @ y[:, :3] / weight.sum(),
                                   atol=0.01)
        np.testing.assert_array_equal(new, mended[:50])
        np.testing.assert_allclose(prior, weight @ y)
        shares = said[:50] * (5, 1, 1, 1)
        np.testing.assert_allclose(first, shares / shares.sum(axis=1, keepdims=True))
        powers = [(said / y.sum(axis=0).clip(1))[:, :3] ** s * prior[:3]
                  for s in (sharpness / 1.02, sharpness, sharpness * 1.02)]
        losses = [log_loss(cls, q / q.sum(axis=1, keepdims=True), labels=list("NSV"), sample_weight=weight)
                  for q in powers]
        assert losses[1] < min(losses[0], losses[2])


def test_detection_is_that_of_sklearn_at_the_best_threshold_of_ds1():
    rng = np.random.default_rng(11)
    y_train, y = rng.random(300) < 0.2, rng.random(200) < 0.3
    held_out, p = (np.round(np.where(of, 0.3, 0) + 0.7 * rng.random(len(of)), 2) for of in (y_train, y))
    weight, number, counts = rng.random(300), np.repeat([0, 1, 2, 3], 50), np.array([[1, 1, 1, 1], [2, 0, 1, 1]])
    found = probe_mitbih.detection(held_out, y_train, weight, p, y, number, counts)
    at = found["threshold"][0]
    f1 = {t: f1_score(y_train, held_out >= t, sample_weight=weight) for t in np.unique(held_out)}
    assert f1[at] == pytest.approx(max(f1.values()))
    for s, weights in enumerate(counts):
        expected = precision_recall_fscore_support(y, p >= at, average="binary", sample_weight=weights[number])
        assert [found[k][s] for k in ("positive_predictivity", "sensitivity", "f1")] == pytest.approx(expected[:3])


def test_nothing_is_chosen_on_ds2():
    """Labels of the test beats may be anything: sharpness, thresholds and probabilities are the same."""
    rng = np.random.default_rng(6)
    x, beats = drawn_beats(400, rng)
    other = beats | dict(cls=np.where(np.arange(400) < 200, beats["cls"], rng.choice(list("NSVF"), 400)))
    (a, p, scores), (b, q, others) = (probe_mitbih.score(x, of) for of in (beats, other))
    np.testing.assert_array_equal(p, q)
    assert p.shape == (2, 200, 4) and (a["sharpness"], a["prior"]) == (b["sharpness"], b["prior"])
    assert [scores[f"threshold_{k}"][0] for k in "sv"] == [others[f"threshold_{k}"][0] for k in "sv"]
    assert scores["f1_v"][0] != others["f1_v"][0]
    np.testing.assert_allclose(p.sum(axis=2), 1)


@pytest.mark.parametrize("kind", ["constant", "coin", "labels of other beats", "labels of other records", "knows"])
def test_each_gets_the_score_that_it_deserves(kind):
    rng = np.random.default_rng(12)
    x, beats = drawn_beats(4000, rng)
    x = {"constant": np.zeros_like(x), "coin": rng.normal(size=x.shape), "knows": x, "labels of other beats":
         rng.permutation(x), "labels of other records": rng.permutation(x.reshape(8, -1, 3)).reshape(x.shape)}[kind]
    few = rng.random(2000) < 0.5
    noisy = np.stack([x[beats["test"]][few]] * (len(probe_mitbih.NOISE_KINDS) * len(NOISE_DB)), axis=1)
    entry, _, scores = probe_mitbih.score(x, beats, few, noisy)
    auroc, areas = [scores[key][0] for key in ("within_nsv", "macro_nsv", "within_neither")], [
        scores[f"{k} area"][0] for k in ("clean", *probe_mitbih.NOISE_KINDS)]
    if kind == "knows":
        assert min(auroc) > 0.8 and min(areas) > 0.3 and entry["calibration"]["brier_skill"] > 0.3
        assert entry["selective"]["accuracy"][-1] > entry["selective"]["accuracy"][0] + 0.05
        assert abs(entry["calibration"]["z"]) < 2.5
    else:
        margin = 1e-9 if kind == "constant" else 0.05
        assert auroc == pytest.approx([0.5] * 3, abs=margin) and areas == pytest.approx([0] * 5, abs=margin + 1e-9)
        classes = [*(entry["per_class"][k] for k in "NSV"), *(entry["within_per_class"][k] for k in "NSV")]
        assert classes + [scores["s_without_232"][0]] == pytest.approx([0.5] * 7, abs=2 * margin)
        of, rows = entry["calibration"], probe_mitbih.one_hot(beats["cls"][beats["test"]])
        assert abs(of["brier_skill"]) < 0.01 and abs(of["nll_skill"]) < 0.02 and abs(of["resolution"]) < 2e-3
        assert abs(of["reliability"]) < 2e-3 and abs(of["ece"] - of["ece_perfect"]) < 0.02
        for k, name in ((1, "S"), (2, "V")):
            found, share = scores[f"positive_predictivity_{name.lower()}"][0], rows[:, k].mean()
            assert np.isnan(found) or abs(found - share) < 0.05
        assert entry["selective"]["accuracy"] == pytest.approx([entry["selective"]["accuracy"][0]] * 7, abs=0.03)
        assert scores["f1_s"][0] < 0.13 and scores["f1_v"][0] < 0.22   # all called positive: .095 and .18
        assert abs(scores["rr_r"][0]) < 0.1 and abs(scores["early_r"][0]) < 0.1
    np.testing.assert_allclose([scores[f"mixture {db} dB"] for db in NOISE_DB], [scores["clean area"] + 0.5] * 6)


def test_an_untrained_encoder_gains_nothing_in_any_column():
    """It is its own control: every difference, of each noise too, is 0, and so are its limits."""
    rng = np.random.default_rng(14)
    x, beats = drawn_beats(800, rng)
    few = rng.random(400) < 0.5
    noisy = np.stack([x[beats["test"]][few]] * (len(probe_mitbih.NOISE_KINDS) * len(NOISE_DB)), axis=1)
    entry, _, scores = probe_mitbih.compare([x, x], beats, [1], few, [noisy, noisy])
    assert entry["difference"] == 0 and entry["differences"].keys() == scores.keys() and len(scores) > 30
    assert np.isnan(entry["differences"].pop("f_without_213")["difference"])                   # there is no F
    for key, of in entry["differences"].items():
        assert [of["difference"], *of["ci95"]] == [0, 0, 0], key


def test_selective_answers_are_those_of_plain_loops():
    rng = np.random.default_rng(13)
    p = rng.dirichlet(np.ones(4), 50)
    y = np.eye(4, dtype=bool)[rng.integers(0, 4, 50)]
    found = selective(p, y, y[:, 1])
    ranked = sorted(range(50), key=lambda i: -max(p[i]))
    for share, accuracy, answered in zip(*found.values()):
        kept = ranked[:round(share * 50)]
        assert accuracy == pytest.approx(np.mean([y[i, np.argmax(p[i])] for i in kept]))
        assert answered == pytest.approx(sum(y[i, 1] for i in kept) / y[:, 1].sum())


@pytest.mark.parametrize("kind", probe_mitbih.NOISE_KINDS)
def test_a_window_gets_noise_of_the_stated_level(synth, kind):
    """The median over leads of the ratio of mean squares is the level; the noise of a window is the same at each level,
    whichever windows are asked for together; a type alone has no other in it; what is missing stays missing."""
    noise = load_noise(open_corpus(synth / "data" / "nstdb"), "test")
    x = torch.from_numpy(np.random.default_rng(14).normal(0, 0.3, (6, 2, 500)).astype(np.float32))
    leads = torch.from_numpy(np.array([LEAD_IDS[name] for name in LEAD_PAIR])).expand(6, -1)
    six, low = (add_test_noise(x, leads, range(6), noise, kind, db, [0, 100]) - x for db in (6, 0))
    ratio_db = 10 * torch.log10(x.var(dim=2, correction=0) / six.var(dim=2, correction=0))
    torch.testing.assert_close(ratio_db.mean(dim=1), torch.full((6,), 6.0), atol=0.01, rtol=0)   # of two: the mean
    torch.testing.assert_close(low, six * 10 ** (6 / 20), atol=1e-4, rtol=1e-3)
    two = add_test_noise(x[2:4], leads[2:4], range(2, 4), noise, kind, 6, [0, 100]) - x[2:4]
    torch.testing.assert_close(two, six[2:4])
    assert (six[0] - six[1]).abs().max() > 0.01
    for number, name in enumerate(probe_mitbih.NOISE_KINDS[1:]):
        without = noise.clone()
        without[number] = 0
        changed = add_test_noise(x, leads, range(6), without, kind, 6, [0, 100]) - x
        assert torch.equal(changed, six) == (kind not in ("mixture", name))
    x[0, 1, 100:200] = torch.nan
    found = add_test_noise(x, leads, range(6), noise, kind, 6, [0, 100])
    assert torch.equal(found.isnan(), x.isnan())


# ---------------------------------------------------------------------------------------------------------------------
# from raw recordings to the files

def results(out, name):
    result = json.loads((out / f"{name}.json").read_text())
    assert {p.name for p in out.iterdir()} == {f"{name}.json", "predictions.npz", f"{name}.png", "report.html"}
    assert (out / "report.html").read_text().count("<img ") > 1 and "Command" in result["run"]
    assert (out / f"{name}.png").stat().st_size > 10_000
    return result, np.load(out / "predictions.npz")


def test_ptbxl_from_raw_to_report(synth, encoder_path, tmp_path, capsys, monkeypatch):
    some = ("12", "I II", "V2", "I", "I unnamed")
    monkeypatch.setattr(probe_ptbxl, "LEAD_SETS", {name: probe_ptbxl.LEAD_SETS[name] for name in some})
    args = ["--encoder", str(encoder_path), "--raw", str(synth / "raw" / "ptbxl"), "--out", str(tmp_path / "out"),
            "--noise", str(synth / "data" / "nstdb"), "--device", "cpu", "--leads-curve", "--attention", "--fine-tune"]
    monkeypatch.setattr(evaluate, "TUNE_EPOCHS", 2)
    monkeypatch.setattr(evaluate, "TUNE_ROWS", 16)
    probe_ptbxl.main(probe_ptbxl.parse_args(args))
    result, stored = results(tmp_path / "out", "ptbxl")
    assert set(result["tasks"]) == set(probe_ptbxl.PTBXL_SETS) and not result["untrained_only"]
    task = result["tasks"]["superdiagnostic"]
    assert {"macro_auroc", "macro_auroc_min10", "ci95", "untrained", "difference", "difference_ci95", "n_labels",
            "n_test"} <= set(task)
    y, p, p0 = (stored[f"superdiagnostic_{k}"] for k in ("y", "p", "p_untrained"))
    assert task["macro_auroc"] == pytest.approx(roc_auc_score(y, p, average="macro"), abs=1e-6)
    assert task["untrained"] == pytest.approx(roc_auc_score(y, p0, average="macro"), abs=1e-6)
    assert task["difference"] == pytest.approx(task["macro_auroc"] - task["untrained"], abs=2e-6) != 0
    levels = result["noise"]["mixture"]
    assert levels["24"]["superdiagnostic"]["macro_auroc"] == pytest.approx(task["macro_auroc"], abs=0.05)  # hardly any
    for noise in (levels[str(db)]["superdiagnostic"] for db in NOISE_DB):
        assert noise["difference"] == pytest.approx(noise["macro_auroc"] - noise["untrained"], abs=2e-6)
        assert noise["difference_ci95"][0] <= noise["difference"] <= noise["difference_ci95"][1]
    assert set(result["noise"]) == {"mixture", "bw", "em", "ma"} == set(result["snr"])
    for kind, levels in result["noise"].items():
        area = np.mean([levels[str(db)]["superdiagnostic"]["macro_auroc"] for db in NOISE_DB]) - 0.5
        assert levels["area"]["superdiagnostic"]["macro_auroc"] == pytest.approx(area, abs=2e-6), kind
    for kind in ("same", "moved"):
        assert list(result["leads_curve"][kind]) == list(some)
        assert result["leads_curve"][kind]["12"]["superdiagnostic"]["macro_auroc"] == pytest.approx(task["macro_auroc"])
    moved = {key: of["superdiagnostic"]["macro_auroc"] for key, of in result["leads_curve"]["moved"].items()}
    assert len(set(moved.values())) > 3 and set(result["fractions"]) == {"1", "0.1", "0.01"}
    assert result["fractions"]["1"]["superdiagnostic"]["difference"] == pytest.approx(task["difference"])
    assert 0 <= result["attention"]["macro_auroc"] <= 1 and result["attention"]["macro_auroc"] != task["macro_auroc"]
    tuned = result["fine_tuned"]
    assert set(tuned) == set(result["fractions"]) and len({of["macro_auroc"] for of in tuned.values()}) > 1
    assert all(of["ci95"][0] <= of["macro_auroc"] <= of["ci95"][1] for of in tuned.values())
    assert any(of["difference"] != 0 for of in tuned.values())
    said = capsys.readouterr().out
    for words in (f"fold 10 is scored ({len(y)} recordings", "mixture at 0 dB", "bw, area", "I unnamed, moved to it",
                  "1% of the training patients", "superdiagnostic, attention", "A^2 / 8",
                  "superdiagnostic, fine-tuned, 10%"):
        assert words in said


@pytest.mark.parametrize("probe, database", [(probe_ptbxl, "ptbxl"), (probe_mitbih, "mitdb")])
def test_scores_of_several_encoders_are_means(synth, encoder_path, tmp_path, probe, database):
    """Of two seeds: each has its own control, and its scores are those that it gets alone."""
    save_encoder(Encoder(width=WIDTH, depth=1, heads=1, layer_scale=1.0, init_seed=1), tmp_path / "second.pt")
    found, flags = {}, ["--beats", "5"] if probe is probe_mitbih else []
    for name, paths in {"a": [encoder_path], "b": [tmp_path / "second.pt"],
                        "ab": [encoder_path, tmp_path / "second.pt"]}.items():
        probe.main(probe.parse_args(["--encoder", *map(str, paths), "--raw", str(synth / "raw" / database), "--out",
                                     str(tmp_path / name), "--device", "cpu", *flags]))
        result = json.loads(next((tmp_path / name).glob("*.json")).read_text())
        found[name] = (result["tasks"]["all"], "macro_auroc") if probe is probe_ptbxl else (
            result["features"]["r_token"], "within_nsv")
    (a, key), (b, _), (ab, _) = found["a"], found["b"], found["ab"]
    assert ab["each"][key] == pytest.approx([a[key], b[key]], abs=2e-6)
    assert ab[key] == pytest.approx((a[key] + b[key]) / 2, abs=2e-6) and a[key] != b[key]
    ci = "ci95" if probe is probe_ptbxl else "within_ci95"
    assert ab[ci][1] - ab[ci][0] > abs(a[key] - b[key])               # two seeds say little about a third


def test_a_probe_of_twelve_leads_is_scored_on_others(synth, tmp_path):
    """Folds 1-8 are fitted on all leads, folds 9 and 10 show one: another score than with either alone."""
    scores = {}
    for name, flags in {"twelve": [], "one": ["--leads", "I"], "moved": ["--leads-scored", "I"]}.items():
        probe_ptbxl.main(probe_ptbxl.parse_args([
            "--encoder", "random:tiny", "--raw", str(synth / "raw" / "ptbxl"), "--out", str(tmp_path / name),
            "--device", "cpu", *flags]))
        result, stored = results(tmp_path / name, "ptbxl")
        scores[name] = stored["all_p"]
        assert result["leads_scored"] == (["I"] if flags else [])
    assert not any(np.array_equal(scores[a], scores[b]) for a, b in (("twelve", "moved"), ("one", "moved")))
    assert scores["twelve"].shape == scores["one"].shape == scores["moved"].shape


def test_mitbih_from_raw_to_report(synth, encoder_path, tmp_path, capsys):
    for names in (MITDB_DS1, MITDB_DS2):                           # five records of each set are enough
        for name in [n for n in names if (synth / "raw" / "mitdb" / f"{n}.hea").is_file()][:5]:
            for file in (synth / "raw" / "mitdb").glob(f"{name}.*"):
                (tmp_path / "raw").mkdir(exist_ok=True)
                (tmp_path / "raw" / file.name).symlink_to(file)
    args = ["--encoder", str(encoder_path), "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"),
            "--device", "cpu", "--noise", str(synth / "data" / "nstdb")]
    probe_mitbih.main(probe_mitbih.parse_args(args))
    result, stored = results(tmp_path / "out", "mitbih")
    number = np.unique(stored["record"], return_inverse=True)[1]
    for name in ("r_token", "neighbourhood"):
        entry = result["features"][name]
        assert {"macro_nsvf", "macro_nsv", "per_class", "ci95", "untrained", "difference",
                "difference_ci95"} <= set(entry)
        for key, value in ((f"p_{name}", entry["macro_nsv"]), (f"p_untrained_{name}", entry["untrained"])):
            expected = np.mean([roc_auc_score(stored["cls"] == c, stored[key][:, i]) for i, c in enumerate("NSV")])
            assert value == pytest.approx(expected, abs=1e-6)
        within = probe_mitbih.within_records(probe_mitbih.one_hot(stored["cls"]), stored[f"p_{name}"], number,
                                             np.ones((1, number.max() + 1)))
        assert entry["within_nsv"] == pytest.approx(np.nanmean(within[0, :3]), abs=1e-6)
        assert entry["within_ci95"][0] <= entry["within_nsv"] <= entry["within_ci95"][1]
        for key in ("within_nsv", "macro_nsv", "rr_r", "early_r"):
            assert entry["differences"][key]["difference"] == pytest.approx(
                entry[key] - entry["untrained_scores"][key], abs=2e-6)
        noise = [entry[f"em {db} dB"] for db in NOISE_DB]
        assert entry["em area"] == pytest.approx(np.mean(noise) - 0.5, abs=2e-6)
        assert noise[0] == pytest.approx(entry["clean area"] + 0.5, abs=0.1)
        for key in ("mixture area", "bw 0 dB", "f1_s"):
            (low, high), gain = entry["differences"][key]["ci95"], entry["differences"][key]["difference"]
            assert low <= high and gain == pytest.approx(entry[key] - entry["untrained_scores"][key], abs=2e-6)
        assert 0 < entry["threshold_s"] < 1 and entry["calibration"]["brier_skill"] > 0
        for side in ("1 s", "lead II"):
            all_leads, other = (result["sides"][f"{name}, {key}"] for key in ("few", side))
            assert other["lost"]["within_nsv"]["difference"] == pytest.approx(
                all_leads["within_nsv"] - other["within_nsv"], abs=2e-6)
        assert result["sides"][f"{name}, 1 s"]["lost"]["within_nsv"]["difference"] == 0     # this encoder's own window
    counts = {name: of["DS2"] for name, of in result["mappings"].items()}
    assert sum(counts["papers"].values()) == sum(counts["bxb"].values()) == result["n"]["test"] == len(stored["cls"])
    assert result["bxb"]["neighbourhood"]["within_nsv"] > 0.5
    assert result["controls"]["rr"]["rr_r"] > 0.95 and result["controls"]["rr"]["early_r"] > 0.9
    assert result["controls"]["rr"]["macro_nsv"] > 0.9 and "macro_nsvf" in result["controls"]["raw"]
    assert set(stored["record"]) <= set(MITDB_DS2) and "N=NLR" in (said := capsys.readouterr().out)
    gained = result["features"]["neighbourhood"]["differences"]["within_nsv"]      # of all beats, not of the few
    assert re.search(rf"control\n.*\n.*\nneighbourhood +{gained['difference']:.3f} ", said) is not None
    assert "over records alone, as there is one seed" in said and str(encoder_path) in said


def test_the_untrained_control_can_be_had_alone(synth, tmp_path):
    args = ["--encoder", "random:tiny:1", "--raw", str(synth / "raw" / "ptbxl"), "--out", str(tmp_path / "out"),
            "--device", "cpu"]
    probe_ptbxl.main(probe_ptbxl.parse_args(args))
    result, _ = results(tmp_path / "out", "ptbxl")
    assert result["untrained_only"]
    assert all(t["difference"] == 0 for t in result["tasks"].values())


@pytest.mark.parametrize("probe, words", [(probe_ptbxl, "no ptbxl_database.csv in"),
                                          (probe_mitbih, "holds 0 of the 44 records")])
def test_a_wrong_folder_is_named(probe, words, encoder_path, tmp_path):
    args = ["--encoder", str(encoder_path), "--raw", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=words):
        probe.main(probe.parse_args(args))
    assert not (tmp_path / "out").exists()


def test_noise_of_training_is_not_that_of_the_probe(synth):
    corpus = open_corpus(synth / "data" / "nstdb")
    train, test = (load_noise(corpus, split) for split in ("train", "test"))
    assert train.shape[-1] == 20 * 60 * FS and test.shape[-1] == 10 * 60 * FS
    assert not np.isin(test[0, 0, :100].numpy(), train[0, 0].numpy()).any()
