"""synth.py: the synthetic heart obeys what is known of hearts, and its files read back as they were written.

    pytest -q tests/test_synth.py
"""
import ast
from collections import Counter

import numpy as np
import pytest
import scipy.signal
import wfdb

from conftest import SEED, TWELVE, files_of, rows_of
from corpus import open_corpus
from ecg import FS, lead_id
from synth import (MITDB_CONDITIONS, NOISE_EDGES_HZ, NSTDB_NOISE, draw_heart, shaped_noise, synth_recording, synthesize,
                   write_ptbxl, write_record)


# ---------------------------------------------------------------------------------------------------------------------
# one recording

def clean_recording(condition, seed, fs=500, duration_s=20):
    """-> signal (T, 12) mV without noise, beats, waves.

    Two recordings from the same draws, one of them with all waves doubled, differ by the waves alone.
    """
    heart = draw_heart(np.random.default_rng([seed, 1]), condition.split())
    doubled = dict(heart)
    for name in ("qrs", "p", "pvc"):
        doubled[name] = heart[name] * ([1] * 3 + [2] * 3)
    for name in ("st", "t", "pvc_t"):
        doubled[name] = 2 * heart[name]
    once, twice = (synth_recording(np.random.default_rng([seed, 2]), condition, fs, duration_s, TWELVE, one)
                   for one in (heart, doubled))
    assert once[1:] == twice[1:]
    return twice[0] - once[0], *once[1:]


def steepness(x, fs):
    """Energy of x (T, ...) between 5 and 40 Hz, where the QRS is."""
    return scipy.signal.sosfiltfilt(scipy.signal.butter(2, (5, 40), "band", fs=fs, output="sos"), x, axis=0) ** 2


def seconds(waves, kind, fs=500):
    return np.array([(end - onset) / fs for onset, _, end, letter in waves if letter == kind])


def assert_einthoven_and_goldberger(lead, atol):
    np.testing.assert_allclose(lead["III"], lead["II"] - lead["I"], rtol=0, atol=3 * atol)
    np.testing.assert_allclose(lead["aVR"], -(lead["I"] + lead["II"]) / 2, rtol=0, atol=2 * atol)
    np.testing.assert_allclose(lead["aVL"], (lead["I"] - lead["III"]) / 2, rtol=0, atol=2 * atol)
    np.testing.assert_allclose(lead["aVF"], (lead["II"] + lead["III"]) / 2, rtol=0, atol=2 * atol)


def test_limb_leads_obey_einthoven_and_goldberger(synth, ptbxl_table):
    """Exactly as computed, noise included; to the rounding of each lead in the files; to a few uV when resampled."""
    signal_mv, _, _ = synth_recording(np.random.default_rng(0), "AFIB PVC", 250, 10, TWELVE)
    assert_einthoven_and_goldberger(dict(zip(TWELVE, signal_mv.T)), atol=1e-12)
    corpus = open_corpus(synth / "data" / "ptbxl")
    for i, path in enumerate(ptbxl_table.filename_lr):
        adc = wfdb.rdrecord(str(synth / "raw" / "ptbxl" / path), physical=False).d_signal.astype(float)
        assert_einthoven_and_goldberger(dict(zip(TWELVE, adc.T)), atol=0.5)
        assert_einthoven_and_goldberger(dict(zip(TWELVE, corpus.read(i).astype(float))), atol=1.5)


def test_seed_decides_every_byte_and_the_number_of_records_none(synth, tmp_path):
    synthesize(tmp_path / "again", 3, SEED)
    write_ptbxl(tmp_path / "other", 3, SEED + 1)
    first, again, other = files_of(synth / "raw"), files_of(tmp_path / "again"), files_of(tmp_path / "other")
    tables = {name for name in again if name.endswith("ptbxl_database.csv")}
    assert {name for name in again if again[name] != first[name]} == tables
    assert first[tables.pop()].startswith(again["ptbxl/ptbxl_database.csv"])
    signals = [name for name in other if name.endswith(".dat")]
    assert len(signals) == 3 and all(other[name] != again[f"ptbxl/{name}"] for name in signals)


def test_written_records_read_back_through_wfdb(tmp_path):
    rng = np.random.default_rng(0)
    for gain, largest, baseline in ((1000, 32767, 0), (200, 2047, 1024), (0, 2047, 0)):
        adc = rng.integers(-largest, largest + 1, (1000, 2))
        adc[:4] = [(-largest, largest), (0, -1), (-1, 0), (1, -largest)]
        write_record(tmp_path / f"gain{gain}", 360, ("II", "V1"), adc, gain)
        record = wfdb.rdrecord(str(tmp_path / f"gain{gain}"), physical=False)
        np.testing.assert_array_equal(record.d_signal, adc)
        assert record.checksum == record.calc_checksum() and record.init_value == adc[0].tolist()
        assert record.baseline == [baseline] * 2 and record.adc_gain == [gain or 200] * 2 and record.units == ["mV"] * 2
        assert record.fs == 360 and record.sig_len == 1000 and record.sig_name == ["II", "V1"]


@pytest.mark.parametrize("condition", ["SR NORM", "SARRH PAC", "SR CLBBB PVC", "SR CRBBB PAC", "AFIB PVC",
                                       "STACH IMI QWAVE STE_", "SBRAD 1AVB", "SR PVC BIGU"])
def test_waves_are_in_order_and_beats_lie_on_qrs_peaks(condition):
    for seed in range(3):
        x, beats, waves = clean_recording(condition, seed)
        borders = np.array([wave[:3] for wave in waves])
        assert borders.min() >= 0 and borders.max() < len(x)
        assert (np.diff(borders, axis=1) >= 0).all() and (borders[1:, 0] > borders[:-1, 2]).all()
        samples = np.array([beat[0] for beat in beats])
        assert (np.diff(samples) > 0.25 * 500).all()
        peaks = [wave[1] for wave in waves if wave[3] == "N"]
        assert set(peaks) <= set(samples) and len(peaks) >= len(samples) - 2    # the ends may cut two
        energy = steepness(x, 500).sum(1)
        for peak in peaks:
            near = slice(max(peak - 30, 0), peak + 31)
            assert abs(near.start + energy[near].argmax() - peak) <= 12               # 24 ms
            lead = x[near][:, np.ptp(x[near], axis=0).argmax()]
            extrema = np.r_[scipy.signal.argrelmax(lead)[0], scipy.signal.argrelmin(lead)[0]]
            assert np.abs(near.start + extrema - peak).min() <= 12                    # of the largest lead


def test_wave_borders_are_where_the_waves_begin_and_end():
    """Between P and QRS and after T there is nothing at all; inside there is something from the first samples on."""
    for seed in range(5):
        x, _, waves = clean_recording("SBRAD NORM", seed)
        inside = np.zeros(len(x), bool)
        order = [wave[3] for wave in waves]
        first, last = order.index("p"), len(order) - order[::-1].index("t")
        assert order[first:last] == ["p", "N", "t"] * ((last - first) // 3)
        for (p, _, p_end, _), (qrs, _, j, _), (_, _, t_end, _) in zip(*(waves[first + k:last:3] for k in range(3))):
            inside[p - 1:p_end + 2], inside[qrs - 1:t_end + 2] = True, True
            for onset, end, floor_mv in ((p, p_end, 0.02), (qrs, j, 0.2), (j, t_end, 0.03)):
                assert np.abs(x[onset:end]).max() > floor_mv
                assert np.abs(x[onset + 3]).max() > 0 < np.abs(x[end - 3]).max()
        span = slice(waves[first][0], waves[last - 1][2])
        assert np.abs(x[span][~inside[span]]).max() < 1e-12 and (~inside[span]).mean() > 0.2


def test_normal_intervals_and_the_statements_that_change_them():
    def draw(condition):
        recordings = [clean_recording(condition, seed) for seed in range(4)]
        waves = [wave for _, _, waves in recordings for wave in waves]
        pairs = [pair for _, _, waves in recordings for pair in zip(waves, waves[1:])]
        pr = [(b[0] - a[0]) / 500 for a, b in pairs if a[3] + b[3] == "pN"]
        qt = [(b[2] - a[0]) / 500 for a, b in pairs if a[3] + b[3] == "Nt"]
        rr = np.concatenate([np.diff([beat[0] for beat in beats]) / 500 for _, beats, _ in recordings])
        return seconds(waves, "N"), np.array(pr), np.array(qt), rr, seconds(waves, "p")

    qrs, pr, qt, rr, p = draw("SR NORM")
    for values, low, high in ((qrs, 0.07, 0.11), (pr, 0.12, 0.2), (p, 0.075, 0.115), (qt, 0.3, 0.46), (rr, 0.5, 1.2)):
        assert len(values) > 60 and low <= values.min() and values.max() <= high
    assert draw("SR CLBBB")[0].min() > 0.12 and draw("SR CRBBB")[0].min() > 0.12
    assert draw("SR 1AVB")[1].min() > 0.2 and draw("SR LAO/LAE")[4].min() > 0.115
    assert np.median(draw("SR LNGQT")[2]) > np.median(qt) + 0.03
    assert np.median(draw("SBRAD NORM")[3]) > 1.0 and np.median(draw("STACH NORM")[3]) < 0.61


def test_atrial_fibrillation_has_no_p_waves_and_no_rhythm():
    for seed in range(4):
        _, beats, waves = clean_recording("AFIB", seed)
        assert {wave[3] for wave in waves} == {"N", "t"} and {beat[2] for beat in beats} == {"(AFIB"}
        rr = np.diff([beat[0] for beat in beats])
        assert rr.std() / rr.mean() > 0.1
        rr = np.diff([beat[0] for beat in clean_recording("SR NORM", seed)[1]])
        assert rr.std() / rr.mean() < 0.07
    _, beats, waves = synth_recording(np.random.default_rng(0), "AFIB", 250, 120, TWELVE)   # long: it comes and goes
    assert {beat[2] for beat in beats} == {"(AFIB", "(N"}
    p = [wave[1] for wave in waves if wave[3] == "p"]
    fibrillating = [beat[0] for beat in beats if beat[2] == "(AFIB"]
    assert len(p) > 20 and not any(fibrillating[0] < sample < fibrillating[-1] for sample in p)


@pytest.mark.parametrize("symbol, condition", [("V", "SR PVC"), ("A", "SR PAC")])
def test_ectopic_beats_come_early_and_ventricular_ones_are_wide_without_p(symbol, condition):
    for seed in range(6):
        x, beats, waves = clean_recording(condition, seed)
        samples = np.array([beat[0] for beat in beats])
        places = [i for i, beat in enumerate(beats) if beat[1] == symbol]
        assert places and {beat[1] for beat in beats} <= {"N", symbol, "F"}        # what is stated does occur
        usual = np.median(np.diff(samples))
        rows = {wave[1]: k for k, wave in enumerate(waves) if wave[3] == "N"}
        normal = [waves[rows[s]][2] - waves[rows[s]][0] for s, sign, _ in beats if sign == "N" and s in rows]
        for i in (i for i in places if samples[i] in rows):
            k = rows[samples[i]]
            width, before = waves[k][2] - waves[k][0], waves[k - 1]
            assert i and samples[i] - samples[i - 1] < 0.9 * usual
            assert i + 1 == len(samples) or samples[i + 1] - samples[i] > (1.05 if symbol == "V" else 0.9) * usual
            if symbol == "V":
                assert width > 0.12 * 500 > 1.1 * max(normal) and before[3] == "t"
            else:
                assert abs(width - max(normal)) <= 2 and before[3] == "p"


def deflection(condition, leads, at, seeds=8):
    """Mean over people of the largest mV ("R"), the lowest ("S"), or the level 60 ms after J ("ST") in some leads."""
    values = []
    for seed in range(seeds):
        x, beats, waves = clean_recording(condition, seed, duration_s=3)
        onset, _, j, _ = next(wave for wave in waves if wave[3] == "N")
        cut = x[:, [TWELVE.index(lead) for lead in leads]]
        values.append({"R": cut[onset:j].max(0), "S": cut[onset:j].min(0), "ST": cut[j + 30]}[at].mean())
    return np.mean(values)


def test_statements_look_like_themselves():
    limbs, inferior, lateral = TWELVE[:6], ("II", "III", "aVF"), ("I", "V5", "V6")
    assert deflection("SR LVOLT", limbs, "R") < 0.7 * deflection("SR NORM", limbs, "R")
    assert deflection("SR LVH", ("V5",), "R") - deflection("SR LVH", ("V1",), "S") > \
        1.4 * (deflection("SR NORM", ("V5",), "R") - deflection("SR NORM", ("V1",), "S"))
    assert deflection("SR IMI STE_", inferior, "ST") > 0.1 > abs(deflection("SR NORM", inferior, "ST"))
    assert deflection("SR ISC_", lateral, "ST") < deflection("SR NORM", lateral, "ST") - 0.04
    assert deflection("SR CRBBB", ("V1",), "R") > 0.2 + deflection("SR NORM", ("V1",), "R")     # the second R in V1
    assert deflection("SR CLBBB", ("V1",), "S") < -0.8 and deflection("SR CLBBB", ("V6",), "S") > -0.2
    assert deflection("SR IMI", ("III", "aVF"), "S") < deflection("SR NORM", ("III", "aVF"), "S") - 0.1   # Q waves


def test_annotations_in_the_files_are_true_and_fit_the_corpus(synth, ptbxl_table):
    raw, corpus = synth / "raw", open_corpus(synth / "data" / "mitdb")
    for name, i in rows_of(corpus).items():
        notes, codes = wfdb.rdann(str(raw / "mitdb" / name), "atr"), MITDB_CONDITIONS[name].split()
        symbols, rhythms = Counter(notes.symbol), {note.rstrip("\0") for note in notes.aux_note if note}
        assert ("V" in symbols) == ("PVC" in codes) and ("A" in symbols) == ("PAC" in codes)
        assert ("L" in symbols) == ("CLBBB" in codes) and ("R" in symbols) == ("CRBBB" in codes)
        assert "(N" in rhythms <= {"(N", "(AFIB", "(B"}
        assert ("(AFIB" in rhythms) == ("AFIB" in codes) and ("(B" in rhythms) == ("BIGU" in codes)
        lead = corpus.read(i)[corpus.index["leads"][i][:2].tolist().index(lead_id("II"))] / 1000
        steep = steepness(lead, FS)
        usual = [s for s, symbol in zip(notes.sample, notes.symbol) if symbol in "NLR" and 360 < s < 64000]
        peaks = [int(s * FS / 360) for s in usual]
        assert np.mean([steep[r - 12:r + 13].max() > 20 * np.median(steep) for r in peaks]) > 0.98
        assert abs(np.median([steep[r - 12:r + 13].argmax() - 12 for r in peaks])) <= 5        # 20 ms
    fibrillating = ptbxl_table.scp_codes.str.contains("AFIB")
    assert fibrillating.any()
    for ecg_id in [1, 2, 3, *ptbxl_table.index[fibrillating]]:
        path, scp_codes = ptbxl_table.filename_lr[ecg_id], ptbxl_table.scp_codes[ecg_id]
        letters = wfdb.rdann(str(raw / "ptbxl" / path), "waves").symbol
        assert letters[::3] == ["("] * (len(letters) // 3) and letters[2::3] == [")"] * (len(letters) // 3)
        assert ("p" in letters) == ("AFIB" not in ast.literal_eval(scp_codes))


def test_noise_has_the_stated_power_in_every_band():
    for kind, (first, second, coherence) in NSTDB_NOISE.items():
        x = shaped_noise(np.random.default_rng(0), 360 * 600, 360, (first, second), 2, coherence)
        power = np.abs(np.fft.rfft(x, axis=0)) ** 2 * 2 / len(x) ** 2
        freqs = np.fft.rfftfreq(len(x), 1 / 360)
        for band, (low, high) in enumerate(zip(NOISE_EDGES_HZ, NOISE_EDGES_HZ[1:])):
            rms = np.sqrt(power[(freqs >= low) & (freqs < high)].sum(0))
            np.testing.assert_allclose(rms, (first[band], second[band]), rtol=0.25 if high <= 1 else 0.08)
        slow = scipy.signal.sosfiltfilt(scipy.signal.butter(4, 0.4, fs=360, output="sos"), x, axis=0)
        assert np.corrcoef(slow.T)[0, 1] == pytest.approx(coherence, abs=0.15)


def test_unknown_statements_and_leads_are_refused():
    with pytest.raises(ValueError, match=r"unknown statements \['FLU'\] in the condition; choose among"):
        synth_recording(np.random.default_rng(0), "SR FLU", 250, 10, TWELVE)
    with pytest.raises(ValueError, match=r"cannot synthesise leads \['V9'\]; choose among"):
        synth_recording(np.random.default_rng(0), "SR", 250, 10, ("II", "V9"))
