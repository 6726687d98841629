"""ecg.py: lead names and preprocessing against plain definitions, WFDB files of every format against wfdb itself.

    pytest -q tests/test_ecg.py
"""
import functools
import math
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import wfdb

from conftest import ROOT, TWELVE, draw_ecg, edit_header, noise, rows_of, run, write
import ecg
from ecg import FS, LEADS, MISSING, Refused, is_no_ecg, lead_id, preprocess, read_any, read_pieces, read_wfdb


# ---------------------------------------------------------------------------------------------------------------------
# lead names

@pytest.mark.parametrize("name, lead", [
    *((spelling, name) for name in LEADS for spelling in (name, name.lower(), name.upper())),
    ("DI", "I"), ("DII", "II"), ("diii", "III"), ("D2", "II"), ("lead II", "II"), (" Lead aVF ", "aVF"), ("MLI", "I"),
    ("MLII", "II"), ("mliii", "III"), ("MV1", "V1"), ("ML V1", "V1"), ("MV6", "V6"), ("v 3", "V3"), ("vx", "X"),
    ("VY", "Y"), ("VZ", "Z"),
    ("II,", "II"), ("ECG I", "I"), ("ECG V1", "V1"), ("EKG II", "II"), ("ECG_II", "II"), ("ECG-II", "II"),
    ("ML2", "II"), ("Lead I (Einthoven)", "I"), ("Lead V1", "V1"), ("Lead_II", "II"), ("lead:aVF", "aVF"), 
    ("MDC_ECG_LEAD_II", "II"), ("MDC_ECG_LEAD_AVR", "aVR"), ("MDC_ECG_ELEC_POTL_V3R", "V3R"), 
    ("5.6.3-9-2", "II"), ("5.6.3-9-61", "III"), ("MDC 2:1", "I"), ("2:257", "I"), ("131074", "II"), ("131391", "aVL"),
    ("aVR, augmented voltage, right", "aVR"),
    (b"II", "II"), (np.bytes_(b"V1"), "V1"), ("aVR ", "aVR"), ("II-Ref", "II"), ("II (mV)", "II"), ("V1_uV", "V1"),
    ("ECG LL-RA", "II"), ("MCL1", "V1"), ("ECG Lead II", "II"), ("EKG DIII", "III"), ("\tV2\n", "V2"),
    *((name, "unknown") for name in ("-aVR", "ECG -aVR", "Lead -aVR", "MDC_ECG_LEAD_-aVR", "MCL", "MCL2", "CM5", "ECG2",
                                     "V1-V2", "1", "2", "Lead 1", "5.6.3-9-99", "5.6.3-9-65", "II III", b"", "RESP")),
    *((name, "unknown") for name in ("ECG", "ecg", "noise1", "V10", "IV", "", None, "lead", "ECG1", "V", "MV7"))])
def test_lead_id_knows_a_lead_by_any_spelling(name, lead):
    assert lead_id(name) == LEADS.index(lead)


def test_lead_ids_are_never_renumbered():
    """They are stored in every corpus and every encoder."""
    assert LEADS == ("unknown", *TWELVE, "V7", "V8", "V9", "V3R", "V4R", "X", "Y", "Z")


# ---------------------------------------------------------------------------------------------------------------------
# preprocess

def test_250_hz_passes_bit_for_bit():
    x = draw_ecg(FS, 5, TWELVE)
    x[3, 200:240], x[5, 10] = np.nan, np.inf
    y, ids = preprocess(x, FS, TWELVE)
    np.testing.assert_array_equal(y, np.where(np.isinf(x), np.nan, x).astype(np.float32))
    assert y.dtype == np.float32 and ids.dtype == np.int64 and ids.tolist() == [lead_id(name) for name in TWELVE]
    assert x[5, 10] == np.inf                                      # the caller's array is left alone


@pytest.mark.parametrize("fs", [100, 180.04, 257, 300, 360, 400, 500, 1000, 4000])
@pytest.mark.parametrize("frequency", [0.5, 5, 17, 40])
def test_sines_keep_amplitude_and_phase(fs, frequency):
    """To 0.4 %: a lag of a tenth of a sample would move the 17 Hz sine by 4 %."""
    t = np.arange(round(4 * fs)) / fs
    y, _ = preprocess(np.sin(2 * np.pi * frequency * t + 0.7), fs, "II")
    assert y.shape == (1, int(np.ceil(len(t) * Fraction(FS) / Fraction(fs))))
    expected = np.sin(2 * np.pi * frequency * np.arange(y.shape[1]) / FS + 0.7)
    np.testing.assert_allclose(y[0, FS // 2:-FS // 2], expected[FS // 2:-FS // 2], atol=4e-3)


def test_electrode_offset_and_drift_keep_to_the_ends():
    """Real recordings sit on an offset: zeros beyond the ends would make them droop there."""
    for fs in (100, 360, 500):
        y, _ = preprocess(np.arange(4 * fs) / fs - 7, fs, "V1")
        np.testing.assert_allclose(y[0], np.arange(y.shape[1]) / FS - 7, atol=0.01)


@pytest.mark.parametrize("frequency", [150, 200, 450])
def test_nothing_folds_back_from_above_half_the_rate(frequency):
    y, _ = preprocess(np.sin(2 * np.pi * frequency * np.arange(4000) / 1000), 1000, ["II"])
    assert np.abs(y[0, FS // 2:-FS // 2]).max() < 3e-3


def test_an_ecg_is_the_same_from_any_rate():
    """The generator can draw it at 250 Hz as well: R peaks stay where they are, to a share of a sample."""
    expected = draw_ecg(FS, 6, TWELVE)
    for fs in (300, 360, 500, 1000):
        y, _ = preprocess(draw_ecg(fs, 6, TWELVE), fs, TWELVE)
        np.testing.assert_allclose(y[:, 50:-50], expected[:, 50:-50], atol=0.005)
        np.testing.assert_array_equal(y[1:2, 50:-50].argmax(), expected[1:2, 50:-50].argmax())


@pytest.mark.parametrize("fs", [50, 100, 257, 360, 500, 1000])
def test_gaps_come_back_where_they_were_and_only_there(fs):
    """Output sample n is missing if one of its two neighbours is, or one within half an output step of it."""
    x = draw_ecg(fs, 3, ("I", "II", "V1")) + 5                     # an electrode's offset: a jump to 0 would ring
    whole, _ = preprocess(x, fs, ("I", "II", "V1"))
    rng = np.random.default_rng(fs)
    missing = np.zeros(x.shape, bool)
    missing[0, fs:fs + fs // 5] = True
    missing[1, rng.choice(x.shape[1], 5, replace=False)] = True
    y, _ = preprocess(np.where(missing, np.nan, x), fs, ("I", "II", "V1"))
    step = Fraction(fs, FS)                                        # input samples per output sample
    for lead, gaps in zip(np.isnan(y), missing):
        for n, is_missing in enumerate(lead):
            at = n * step
            near = {math.floor(at), math.ceil(at)}
            near |= {k for k in range(int(at - step), int(at + step) + 2) if abs(k - at) <= step / 2}
            assert is_missing == any(gaps[k] for k in near if 0 <= k < len(gaps)), f"output sample {n}"
    np.testing.assert_array_equal(y[2], whole[2])                  # leads are separate
    np.testing.assert_allclose(y, np.where(np.isnan(y), np.nan, whole), atol=0.01)     # next to a gap nothing rings


def test_units_orientation_and_single_leads():
    x = draw_ecg(500, 4, ("I", "II"))
    expected, _ = preprocess(x, 500, ("I", "II"))
    for other, units in ((x * 1000, "uV"), (x * 1000, "µV"), (x / 1000, "V"), (x, "MV"), (x.T, "mV")):
        np.testing.assert_allclose(preprocess(other, 500, ["I", "II"], units)[0], expected, atol=1e-6)
    np.testing.assert_allclose(preprocess(x[1], np.int64(500), "MLII")[0], expected[1:], atol=1e-7)
    np.testing.assert_array_equal(preprocess(x[1], 500, ["MLII"])[1], [lead_id("II")])
    steps = np.round(x * 1000).astype(np.int16)                    # integers, as files hold them
    np.testing.assert_allclose(preprocess(steps, 500.0, ("I", "II"), "uV")[0], expected, atol=2e-3)


def test_what_is_no_signal_is_missing():
    x = draw_ecg(FS, 10, ["II"] * 8)
    x[0, :FS], x[0, -200:] = 0, 0                                  # padding at both ends
    x[1, 500:500 + FS] = 1.234                                     # held for 1 s
    x[2, 500:500 + FS - 1] = 1.234                                 # held for less
    x[3] = 0.7                                                     # disconnected
    x[4] *= 1e-5                                                   # less than any amplifier's noise
    x[5, 700], x[5, 900] = 32.768, -40                             # beyond int16
    x[6, :100], x[6, 300:400] = 0, 0                               # zeros for less than 0.5 s, or inside
    expected = np.where(np.isin(np.arange(8), (3, 4))[:, None], np.nan, x)
    expected[0, :FS], expected[0, -200:], expected[1, 500:500 + FS], expected[5, [700, 900]] = [np.nan] * 4
    np.testing.assert_array_equal(preprocess(x, FS, ["II"] * 8)[0], expected.astype(np.float32))


def test_values_under_a_numpy_mask_are_missing():
    x = draw_ecg(500, 10, ("I", "II"))
    gap = x.copy()
    gap[1, 2000:2200] = np.nan
    expected, _ = preprocess(gap, 500, ("I", "II"))
    for under in (9.0, 0.0, 1e20):
        masked = np.ma.masked_array(x.copy(), mask=np.zeros(x.shape, bool))
        masked[1, 2000:2200] = under
        masked.mask[1, 2000:2200] = True
        np.testing.assert_array_equal(preprocess(masked, 500, ("I", "II"))[0], expected)
    steps = np.ma.masked_array(np.round(x * 1000).astype(np.int16), mask=np.isnan(gap))     # integers have no NaN
    y, _ = preprocess(steps, 500, ("I", "II"), "uV")
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    assert np.isnan(y[1, 1000:1100]).all() and np.isfinite(y).mean() > 0.95


ECG = draw_ecg(FS, 3, ("I", "II"))


@pytest.mark.parametrize("arguments, words", [
    ((ECG, 49.9, ("I", "II")), "fs is 49.9: expected the sampling rate in Hz, a number from 50 to 100000"),
    ((ECG, 100_001, ("I", "II")), "fs is 100001"), ((ECG, float("nan"), ("I", "II")), "fs is nan"),
    ((ECG, "250", ("I", "II")), "fs is '250'"), ((ECG, None, ("I", "II")), "fs is None"),
    ((ECG, FS, ("I", "II", "III")), "shape (2, 750) and leads names 3: expected (leads, samples)"),
    ((ECG[0], FS, ("I", "II")), "shape (750,) and leads names 2"), ((ECG[None], FS, ("I", "II")), "shape (1, 2, 750)"),
    ((ECG[:, :0], FS, ("I", "II")), "empty"), ((ECG[:0], FS, ()), "empty"),
    ((ECG, FS, ("I", "II"), "mmHg"), "units is 'mmHg': expected mV, uV or V"),
    ((ECG, FS, ("I", "II"), None), "units is None"),
    ((ECG * 0, FS, ("I", "II")), "check the units (now 'mV') and the gain"),
    ((ECG * np.nan, FS, ("I", "II")), "no sample of this recording is usable"),
    ((ECG + 2000, FS, ("I", "II")), "2e+03 mV, if it is in mV; an ECG spans 0.005 to 20 mV, on at most 300:")])
def test_what_preprocess_refuses_and_says(arguments, words):
    with pytest.raises(ValueError) as error:
        preprocess(*arguments)
    assert words in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# reading WFDB files

def encode(fmt, adc):
    """The formats of signal(5) that wfdb reads but does not write; adc (T, L)."""
    flat = adc.reshape(-1)
    if fmt == "8":                                                 # differences
        return np.diff(adc, axis=0, prepend=0).astype("i1").tobytes()
    if fmt == "61":
        return flat.astype(">i2").tobytes()
    if fmt == "160":
        return (flat + 32768).astype("<u2").tobytes()
    a, b, c = np.resize(flat, (-(-len(flat) // 3), 3)).T & 0x3FF   # three samples of 10 bits in four bytes
    if fmt == "310":
        return np.stack((a << 1 | (c & 31) << 11, b << 1 | (c >> 5) << 11), axis=1).astype("<u2").tobytes()
    return (a | b << 10 | c << 20).astype("<u4").tobytes()


@pytest.mark.parametrize("fmt", ["8", "16", "24", "32", "61", "80", "160", "310", "311", "508", "516", "524"])
def test_every_format(fmt, tmp_path):
    """5xx are FLAC; 212 has tests of its own."""
    if fmt.startswith("5"):
        pytest.importorskip("soundfile")
    adc = np.random.default_rng(int(fmt)).integers(-60, 61, (2001, 2))
    raw = tmp_path / "raw"
    raw.mkdir()
    kind = fmt if fmt in ("16", "24", "32", "80") or fmt.startswith("5") else "16"
    wfdb.wrsamp("r", FS, ["mV"] * 2, ["II", "V1"], d_signal=adc, fmt=[kind] * 2, adc_gain=[100.0] * 2, baseline=[0] * 2,
                write_dir=str(raw))
    if kind != fmt:
        (raw / "r.dat").write_bytes(encode(fmt, adc))
        lines = [f"r.dat {fmt} 100/mV 10 0 0 0 0 {lead}" for lead in ("II", "V1")]
        (raw / "r.hea").write_text("\n".join(["r 2 250 2001", *lines]) + "\n")
    np.testing.assert_array_equal(run("wfdb", raw, tmp_path / "out").read(0), 10 * adc.T)


def test_segments_with_a_layout_gaps_skew_and_no_length(tmp_path):
    raw = tmp_path / "raw"
    for seed, name in enumerate(("s1", "s2")):
        write(raw, name, noise(seed, 1000), ("II", "V1") if seed == 0 else ("V1", "II"))
    (raw / "lay.hea").write_text("lay 2 250 0\n~ 0 200/mV 0 0 0 0 0 II\n~ 0 200/mV 0 0 0 0 0 V1\n")
    (raw / "whole.hea").write_text("whole/4 2 250 2500\nlay 0\ns1 1000\n~ 500\ns2 1000\n")
    write(raw, "skewed", noise(5, 1500))
    edit_header(raw, "skewed", "skewed.dat 16 ", "skewed.dat 16:7 ")
    write(raw, "no_length", noise(6, 1500))
    edit_header(raw, "no_length", " 1500\n", "\n")
    write(raw, "no_gain", noise(7, 1500))
    header = raw / "no_gain.hea"
    header.write_text(header.read_text().replace("200.0(1024)", "0(1024)"))
    corpus = run("wfdb", raw, tmp_path / "out")
    rows = rows_of(corpus)
    assert set(rows) == {"whole", "skewed", "no_length", "no_gain"} and not corpus.manifest["rejected"]
    whole, expected = corpus.read(rows["whole"]), np.full((2, 2500), MISSING)
    expected[:, :1000], expected[:, 1500:] = 5 * (noise(0, 1000).T - 1024), 5 * (noise(1, 1000).T[::-1] - 1024)
    np.testing.assert_array_equal(whole, expected)
    assert [LEADS[k] for k in corpus.index["leads"][rows["whole"]][:2]] == ["II", "V1"]
    np.testing.assert_array_equal(corpus.read(rows["no_length"]), 5 * (noise(6, 1500).T - 1024))
    np.testing.assert_array_equal(corpus.read(rows["no_gain"]), 5 * (noise(7, 1500).T - 1024))  # WFDB's default
    skewed = corpus.read(rows["skewed"])
    np.testing.assert_array_equal(skewed[0, :1493], 5 * (noise(5, 1500).T[0, 7:] - 1024))
    np.testing.assert_array_equal(skewed[1], 5 * (noise(5, 1500).T[1] - 1024))


def agrees_with_wfdb(path):
    """Compare read_wfdb with wfdb's own reading of a record with one sample per frame, mV only."""
    own, theirs = read_wfdb(path), wfdb.rdrecord(path)
    np.testing.assert_array_equal(own.signal, theirs.p_signal)
    assert own.fs == theirs.fs and own.leads == theirs.sig_name and set(theirs.units) == {"mV"}
    no_gain = {"leads without a gain in the header, read as 200 steps per mV": 2} if path.endswith("bw") else {}
    assert own.notes == no_gain


def test_real_records_are_read_as_wfdb_reads_them(shared_data):
    some = [*sorted((shared_data / "ptbxl" / "records500" / "00000").glob("*.hea"))[:3],
            *sorted((shared_data / "cinc2021").glob("*.hea"))[:3], *sorted((shared_data / "mitdb").glob("11*.hea"))[:3],
            shared_data / "nstdb" / "bw.hea"]                                  # its gain is 0
    for header in some:
        agrees_with_wfdb(str(header.with_suffix("")))


@pytest.mark.parametrize("fmt, gain, seed", [(fmt, gain, seed) for fmt in ("16", "212") for gain in (200.0, 74.36, 1e-3)
                                             for seed in range(3)])
def test_plain_formats_with_every_value_there_is(fmt, gain, seed, tmp_path):
    """Odd counts, all 12-bit and 16-bit values, the one that stands for "no sample", baselines, stretches."""
    rng, top = np.random.default_rng(seed), 2 ** (15 if fmt == "16" else 11)
    n_leads, n = int(rng.integers(1, 5)), int(rng.integers(200, 999))
    adc = rng.integers(-top, top, (n, n_leads))
    wfdb.wrsamp("r", 360, ["mV"] * n_leads, [f"lead {i}" for i in range(n_leads)], d_signal=adc, fmt=[fmt] * n_leads,
                adc_gain=[gain] * n_leads, baseline=rng.integers(-500, 500, n_leads).tolist(), write_dir=str(tmp_path))
    path = str(tmp_path / "r")
    agrees_with_wfdb(path)
    for start in rng.integers(0, n - 1, 9):
        stop = int(rng.integers(start + 1, n + 1))
        part = read_wfdb(path, start / 360, stop / 360)
        np.testing.assert_array_equal(part.signal, read_wfdb(path).signal[start:stop])
    os.truncate(tmp_path / "r.dat", os.path.getsize(tmp_path / "r.dat") - 2)
    with pytest.raises(Refused, match=f"r.dat holds .* samples per channel, and the header says {n}"):
        read_wfdb(path)


# ---------------------------------------------------------------------------------------------------------------------
# WFDB: frames, segments, units, names; wfdb itself is right where it reads one segment without smoothing

def packed(fmt, flat):
    """ADC values in the order of the file -> its bytes."""
    if fmt == "212":
        a, b = np.resize(flat, (-(-len(flat) // 2), 2)).T & 0xFFF
        return np.stack((a & 255, a >> 8 | b >> 8 << 4, b & 255), axis=1).astype("u1").tobytes()
    return (flat + 128 if fmt == "80" else flat).astype({"16": "<i2", "61": ">i2", "80": "u1"}[fmt]).tobytes()


def write_record(folder, name, fs, channels, fmt="16", n=500, seed=0, length=None, offset=0):
    """A record of random ADC values. channels: (lead, samples per frame, gain field, ADC zero) each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, top = np.random.default_rng(seed), {"16": 20000, "61": 20000, "212": 2047, "80": 127}[fmt]
    frames = [rng.integers(-top, top, (n, per_frame)) for _, per_frame, _, _ in channels]
    (folder / f"{name}.dat").write_bytes(bytes(offset) + packed(fmt, np.concatenate(frames, axis=1).reshape(-1)))
    lines = [f"{name} {len(channels)} {fs} {n if length is None else length}"]
    for lead, per_frame, gain, zero in channels:
        kind = fmt + f"x{per_frame}" * (per_frame > 1) + f"+{offset}" * (offset > 0)
        lines.append(f"{name}.dat {kind} {gain} 12 {zero} 0 0 0 {lead}")
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")
    return str(folder / name)


def by_wfdb(path):
    """{signal number: mV at its own rate} of a record without segments."""
    record = wfdb.rdrecord(path, smooth_frames=False)              # physical=False fails for format 61
    scale = {"mV": 1, "uV": 1e-3, "V": 1e3}
    return {i: x * scale[unit] if unit in scale else None for i, (x, unit) in
            enumerate(zip(record.e_p_signal, record.units))}


@pytest.mark.parametrize("fmt", ["16", "212", "80", "61"])
@pytest.mark.parametrize("per_frame", [1, 2, 3, 8])
def test_several_samples_in_a_frame(fmt, per_frame, tmp_path):
    channels = [("II", per_frame, "200/mV", 0), ("RESP", 1, "100/pm", 3), ("V1", per_frame, "0.5(-7)/uV", 0)]
    path = write_record(tmp_path, "r", 125, channels, fmt, n=501, offset=6)
    own, theirs = read_wfdb(path), by_wfdb(path)
    assert own.fs == 125 * per_frame and own.leads == ["II", "V1"] and own.notes == {"channels left out: RESP in pm": 1}
    np.testing.assert_array_equal(own.signal.T, [theirs[0], theirs[2]])
    for start, stop in ((0, 1), (100, 333), (499, 501)):
        part = read_wfdb(path, start / 125, stop / 125).signal
        np.testing.assert_array_equal(part, own.signal[start * per_frame:stop * per_frame])


def test_channels_of_different_rates_are_brought_to_the_highest(tmp_path):
    """ECG at 250 and 125 Hz, pulse at 500, a slow channel in mV; each sample of the frame rate 62.5 Hz."""
    fast, slow = draw_ecg(250, 12, ["II"])[0], draw_ecg(125, 12, ["V1"])[0]
    slow[400:440] = np.nan
    adc = [np.where(np.isnan(x), -32768, np.round(np.nan_to_num(x) * 1000)).reshape(750, -1) for x in (fast, slow)]
    pulse, breath = np.zeros((750, 8)), np.zeros((750, 1))
    (tmp_path / "r.dat").write_bytes(np.concatenate([*adc, pulse, breath], axis=1).astype("<i2").tobytes())
    (tmp_path / "r.hea").write_text("r 4 62.5 750\n" + "".join(
        f"r.dat 16x{n} 1000/mV 16 0 0 0 0 {lead}\n" for lead, n in (("II", 4), ("V1", 2), ("PLETH", 8)))
        + "r.dat 16 1000/mV 16 0 0 0 0 Resp\n")
    recording = read_wfdb(str(tmp_path / "r"))
    assert (recording.fs, recording.leads, recording.signal.shape) == (250, ["II", "V1"], (3000, 2))
    assert recording.notes == {"channels left out: PLETH": 1, "channels left out: Resp": 1}
    np.testing.assert_allclose(recording.signal[:, 0], fast, atol=5.1e-4)
    truth = draw_ecg(250, 12, ["V1"])[0]
    gap = np.isnan(recording.signal[:, 1])
    assert np.flatnonzero(gap).tolist() == list(range(799, 880))
    np.testing.assert_allclose(recording.signal[50:-50, 1][~gap[50:-50]], truth[50:-50][~gap[50:-50]], atol=0.005)


def test_slow_channels_beside_a_fast_ecg_are_no_ecg(tmp_path):
    path = write_record(tmp_path, "r", 31.25, [("II", 8, "1000/mV", 0), ("wave", 1, "1000/mV", 0)])
    recording = read_wfdb(path)
    assert recording.fs == 250 and recording.leads == ["II"]
    assert recording.notes == {"channels left out: wave at 31.25 Hz": 1}
    with pytest.raises(Refused, match="31.25 samples per second: expected 50 to 100000") as error:
        read_wfdb(write_record(tmp_path, "slow", 31.25, [("II", 1, "1000/mV", 0)]))
    assert error.value.reason == "sampling rate"


SEGMENTS = {                     # each with gains, units, orders and channels of its own
    "a": [("II", 4, "200/mV", 0), ("V1", 4, "200/mV", 0), ("RESP", 1, "9/pm", 0)],
    "b": [("V1", 4, "1(5)/uV", 0), ("II", 4, "0.25/uV", -3)],
    "c": [("II", 4, "2000000(4)/V", 0), ("II", 4, "77/mV", 0), ("V1", 4, "5/mmHg", 0)],
    "d": [("ABP", 4, "9/mmHg", 0), ("aVF", 2, "100/mV", 0)]}


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("fmt", ["16", "212", "80", "61"])
def test_segments_have_gain_unit_and_channels_of_their_own(variable, fmt, tmp_path):
    expected = {key: np.full(4 * 1100, np.nan) for key in ("II", "V1", "second II", "aVF")}
    for seed, (name, channels) in enumerate(SEGMENTS.items()):
        path, start = write_record(tmp_path, name, 125, channels, fmt, n=200, seed=seed), 4 * (200 * seed + 100)
        for i, x in by_wfdb(path).items():
            lead = "second II" if (name, i) == ("c", 1) else channels[i][0]
            if x is not None and lead in expected and channels[i][1] == 4:
                expected[lead][start:start + 800] = x
            elif lead == "aVF":
                expected[lead][start:start + 800] = ecg.resample(x[None], Fraction(2))[0]
    lines = ["~ 100", *(f"{name} 200" for name in SEGMENTS), "gone 200"]
    if variable:
        lines.insert(0, "lay 0")
        (tmp_path / "lay.hea").write_text("lay 5 125 0\n" + "".join(
            f"~ 0x4 1/mV 0 0 0 0 0 {lead}\n" for lead in ("V1", "RESP", "II", "aVF", "V6")))
    (tmp_path / "r.hea").write_text(f"r/{len(lines)} 3 125 1100\n" + "\n".join(lines) + "\n")
    recording = read_wfdb(str(tmp_path / "r"))
    order = ("V1", "II", "aVF", "second II") if variable else ("II", "V1", "second II", "aVF")
    assert recording.fs == 500 and recording.leads == [lead.removeprefix("second ") for lead in order]
    rows = dict(zip(order, recording.signal.T))
    for lead, x in expected.items():
        np.testing.assert_array_equal(rows[lead], x, err_msg=lead)
    assert recording.notes == {"channels left out: RESP in pm": 1, "channels left out: V1 in mmHg": 1,
                               "channels left out: ABP in mmHg": 1, "segments left out: absent file": 1}
    for start, stop in ((0, 50), (90, 310), (299, 301), (650, 1100)):
        part = read_wfdb(str(tmp_path / "r"), start / 125, stop / 125).signal[:, :3 if not variable else 2]
        np.testing.assert_array_equal(part, recording.signal[4 * start:4 * stop, :3 if not variable else 2])


def test_what_is_wrong_with_segments_is_counted_or_said(tmp_path):
    channels = [("II", 1, "200/mV", 0)]
    write_record(tmp_path, "a", 250, channels)
    write_record(tmp_path, "fast", 500, channels)
    write_record(tmp_path, "cut", 250, channels)
    os.truncate(tmp_path / "cut.dat", 999)
    (tmp_path / "nested.hea").write_text("nested/1 1 250 500\na 500\n")
    head = "r/6 1 250 3100\n"
    (tmp_path / "r.hea").write_text(head + "a 500\nfast 500\ncut 500\nnested 500\na 600\na 400\n")
    recording = read_wfdb(str(tmp_path / "r"))
    assert recording.notes == {"segments left out: unreadable or truncated file": 3,
                               "segments longer or shorter than their record says": 2}
    a = by_wfdb(str(tmp_path / "a"))[0]
    expected = np.full(3000, np.nan)
    expected[:500], expected[2000:2500], expected[2600:] = a, a, a[:400]
    np.testing.assert_array_equal(recording.signal[:, 0], expected)
    (tmp_path / "none.hea").write_text("none/2 1 250 1000\ngone 500\ncut 500\n")
    with pytest.raises(Refused, match="gone.hea is not there"):
        read_wfdb(str(tmp_path / "none"))
    for text, words in (("endless/2 1 250 9\na 500\n~ 99999999999\n", "it lasts 100,000,000,499 frames at 250.0 Hz"),
                        ("endless/2 1 250 9\na 5\n", "1 lines for 2 segments and 1 signals at 250.0 Hz"),
                        ("endless 1 250\nx.dat 99 200 12 0 0 0 0 II\n", "expected a format of 16, 61, 32"),
                        ("endless\n", "begins with 'endless': expected name, number of signals, rate")):
        (tmp_path / "endless.hea").write_text(text)
        with pytest.raises(Refused, match=words):
            read_wfdb(str(tmp_path / "endless"))


@pytest.mark.parametrize("fmt", ["8", "24", "32", "80", "160", "310", "311", "516"])
def test_stretches_of_the_other_formats(fmt, tmp_path):
    if fmt.startswith("5"):
        pytest.importorskip("soundfile")
    adc = np.random.default_rng(1).integers(-60, 61, (1001, 2))
    kind = fmt if fmt in ("24", "32", "80", "516") else "16"
    wfdb.wrsamp("r", FS, ["mV"] * 2, ["II", "V1"], d_signal=adc, fmt=[kind] * 2, adc_gain=[100.0] * 2,
                baseline=[0] * 2, write_dir=str(tmp_path))
    if fmt in ("8", "160", "310", "311"):
        (tmp_path / "r.dat").write_bytes(encode(fmt, adc))
        lines = [f"r.dat {fmt} 100 10 0 0 0 0 {lead}\n" for lead in ("II", "V1")]
        (tmp_path / "r.hea").write_text("r 2 250\n" + "".join(lines))
    for start, stop in ((0, 1001), (0, 7), (333, 777), (1000, 1001)):
        got = read_wfdb(str(tmp_path / "r"), start / FS, stop / FS).signal
        np.testing.assert_array_equal(got, adc[start:stop] / 100)


@pytest.mark.parametrize("length", [" 500", "", " 0"])
@pytest.mark.parametrize("sign, code", [
    ("u", "ascii"), ("\u00b5", "utf-8"), ("\u03bc", "utf-8"), ("\u00b5", "latin-1")])
def test_micro_signs_and_lengths_that_are_not_stated(length, sign, code, tmp_path):
    path = write_record(tmp_path, "r", 250, [("II", 1, "1/uV", 0), ("V1", 1, "1/uV", 0)])
    expected, text = read_wfdb(path), (tmp_path / "r.hea").read_text()
    text = text.replace(" 500\n", f"{length}\n").replace("/uV", f"/{sign}V").replace("\n", "\r\n")
    (tmp_path / "r.hea").write_bytes(text.encode(code))
    np.testing.assert_array_equal(read_wfdb(path).signal, expected.signal)
    assert np.abs(expected.signal).max() > 10                      # mV; as V it would be 1,000 times this


def test_skew_of_fast_channels_files_of_their_own_and_capitals(tmp_path):
    a = write_record(tmp_path, "a", 125, [("II", 2, "200/mV", 0)], "212")
    b = write_record(tmp_path, "b", 125, [("V1", 2, "100/mV", 0)], "16", seed=1)
    lines = ["a.dat 212x2 200/mV 12 0 0 0 0 II", "b.dat 16x2:7 100/mV 12 0 0 0 0 V1"]
    (tmp_path / "R.HEA").write_text("\n".join(["R 2 125 500", *lines]) + "\n")
    (tmp_path / "b.dat").rename(tmp_path / "B.DAT")
    recording = read_wfdb(str(tmp_path / "R"))
    np.testing.assert_array_equal(recording.signal[:, 0], by_wfdb(a)[0])
    (tmp_path / "B.DAT").rename(tmp_path / "b.dat")
    np.testing.assert_array_equal(recording.signal[:, 1], np.r_[by_wfdb(b)[0][14:], np.full(14, np.nan)])
    (tmp_path / "R.HEA").write_text("\n".join(["R 2 125", *lines]) + "\n")
    os.truncate(tmp_path / "b.dat", 400)
    assert read_wfdb(str(tmp_path / "R")).signal.shape == (200, 2)      # the shortest file


# ---------------------------------------------------------------------------------------------------------------------
# long records

def test_pieces_are_the_record(tmp_path, monkeypatch):
    path = write_record(tmp_path, "r", 62.5, [("II", 4, "200/mV", 0), ("RESP", 1, "9/pm", 0)], n=2000)
    whole = read_wfdb(path)
    assert [start for start, _ in read_pieces(path)] == [0]
    monkeypatch.setattr(ecg, "PIECE_S", 10)
    pieces = list(read_pieces(path))
    assert [start for start, _ in pieces] == [0, 8, 16, 24]
    np.testing.assert_array_equal(np.concatenate([piece.signal for _, piece in pieces]), whole.signal)
    assert [piece.notes for _, piece in pieces] == [whole.notes, None, None, None]
    monkeypatch.setattr(ecg, "PIECE_SAMPLES", 1500)
    assert len(list(read_pieces(path))) == 6


@pytest.mark.parametrize("kind", [".npy", ".npz", ".csv"])
@pytest.mark.parametrize("leads", ["II", "I;II"])
def test_pieces_of_an_array_are_the_array(tmp_path, monkeypatch, kind, leads):
    """Whichever axis is time; also of one lead without an axis of its own."""
    n, path = leads.count(";") + 1, tmp_path / f"a{kind}"
    x = np.random.default_rng(0).normal(size=(2000, n))
    arrays = [x] if kind == ".csv" else [x, x.T] + [x[:, 0]] * (n == 1)
    for array in arrays:
        save = {".npy": np.save, ".npz": np.savez, ".csv": functools.partial(np.savetxt, delimiter=",")}[kind]
        save(path, array)
        with monkeypatch.context() as patch:
            (start, whole), = read_any(path, "62.5", "mV", leads)
            assert start == 0 and np.array_equal(np.reshape(whole.signal, array.shape), array)
            patch.setattr(ecg, "PIECE_S", 10)
            starts, pieces = zip(*read_any(path, "62.5", "mV", leads))
            assert starts == (0, 8, 16, 24)
            rows = np.concatenate([preprocess(*piece[:4], {})[0] for piece in pieces], axis=1)
            assert rows.shape == (n, 8000)
            patch.setattr(ecg, "PIECE_SAMPLES", 500)
            assert len(list(read_any(path, "62.5", "mV", leads))) == 4 * n


@pytest.mark.parametrize("shape, fs", [((4000,), 100), ((3, 4000), 100), ((2, 4000, 1), 100), ((2, 4000), 0),
                                       ((2, 4000), "inf"), ((2, 4000), "nan"), ((2, 4000), -1)])
def test_an_array_that_will_be_refused_is_one_piece(tmp_path, monkeypatch, shape, fs):
    """So that the error tells of the whole."""
    monkeypatch.setattr(ecg, "PIECE_S", 1)
    np.save(tmp_path / "a.npy", np.zeros(shape))
    (start, recording), = read_any(tmp_path / "a.npy", fs, "mV", "I;II")
    with pytest.raises(Refused, match="shape|fs is"):
        preprocess(*recording[:4], {})
    assert start == 0 and recording.signal.shape == shape


def test_a_long_record_becomes_several_rows(tmp_path, monkeypatch):
    """With one name and one patient; a piece without signal is counted."""
    monkeypatch.setattr(ecg, "PIECE_S", 10)
    x = draw_ecg(FS, 40, ("II",))
    x[:, 10 * FS:20 * FS] = 0
    raw = tmp_path / "raw" / "p00" / "p00000"
    write(raw, "p00000_s00", np.round(x.T * 1000), ("II",), gain=1000, baseline=0)
    corpus = run("icentia11k", tmp_path / "raw", tmp_path / "out")
    assert corpus.index["length"].tolist() == [10 * FS] * 3 and corpus.manifest["records"] == 1
    assert [name.decode() for name in corpus.records] == ["p00/p00000/p00000_s00"] * 3
    assert set(corpus.index["patient"]) == {0}
    assert corpus.manifest["changed"]["pieces of long records left out: no valid lead"] == 1
    for row, start in enumerate((0, 20, 30)):
        np.testing.assert_array_equal(corpus.read(row)[0], np.round(x[0, start * FS:(start + 10) * FS] * 1000))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory by /proc")
def test_a_day_of_three_leads_takes_bounded_memory(tmp_path):
    hour = np.round(draw_ecg(FS, 3600, ("I", "II", "V1")).T * 1000).astype("<i2").tobytes()
    (tmp_path / "raw").mkdir()
    with open(tmp_path / "raw" / "day.dat", "wb") as file:
        for _ in range(24):
            file.write(hour)
    (tmp_path / "raw" / "day.hea").write_text(f"day 3 250 {24 * 3600 * FS}\n" + "".join(
        f"day.dat 16 1000/mV 16 0 0 0 0 {lead}\n" for lead in ("I", "II", "V1")))
    code = f"""
import collections
import prepare
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])    # ru_maxrss is the parent's
before = peak()
job = prepare.Job({str(tmp_path / "raw" / "day")!r}, "day", "day", "train")
print(sum(steps.shape[1] for steps, *_ in prepare.prepare_recording(job, collections.Counter())), peak() - before)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True,
                          timeout=600)
    samples, kb = map(int, done.stdout.split())
    print(f"{kb / 1e6:.2f} GB")
    assert samples == 24 * 3600 * FS and kb < 500_000              # all at once: 4.6 GB


# ---------------------------------------------------------------------------------------------------------------------
# what is right and what is said about values and names

def notes_of(*arguments, **more):
    notes = Counter()
    preprocess(*arguments, **more, notes=notes)
    return dict(notes)


PAIR = draw_ecg(FS, 10, ("II", "V2"))
GAIN = "signals that span {} than most ECGs: the gain may be wrong by 10"
NORMALISED = "signals that look normalised (mean 0, deviation 1, or from 0 or -1 to 1): the scale in mV is lost"


@pytest.mark.parametrize("x, units, words", [
    (1000 * PAIR, "mV", "spans 1.3e[+]03 mV.* if it is in mV; in uV it would be 1.3 mV; an ECG spans"),
    (PAIR / 1000, "mV", "spans 0.0013 mV.*in V it would be 1.3 mV"), (PAIR, "uV", "in uV.*check the units"),
    (np.round(200 * PAIR).astype(int), "mV", "integers: divide ADC steps by the gain"),
    (PAIR + 301, "mV", "offset of 301 mV"),
    (PAIR + np.linspace(0, 900, 2500), "mV", "check the units")])
def test_wrong_units_are_refused_wherever_a_recording_comes_from(x, units, words, tmp_path):
    with pytest.raises(Refused, match=words) as error:
        preprocess(x, FS, ("II", "V2"), units)
    assert error.value.reason == "amplitude"


def test_an_offset_and_a_drift_are_no_wrong_unit(tmp_path):
    names = ("II", "V2")
    for offset in (40.0, -250.0, np.array([[0.0], [35.0]])):
        y, _ = preprocess(PAIR + offset, FS, names)
        np.testing.assert_array_equal(y, (PAIR + offset).astype(np.float32))
    for drift in (np.linspace(0, 25, 2500), 12.5 * np.sin(np.arange(2500) / 400), np.linspace(30, 60, 2500)):
        assert np.isfinite(preprocess(PAIR + drift, FS, names)[0]).all()
    write(tmp_path / "raw", "r", np.round(PAIR.T * 500), names, gain=500, baseline=-20000)       # + 40 mV
    corpus = run("wfdb", tmp_path / "raw", tmp_path / "out")
    assert corpus.manifest["changed"] == {"leads stored without their offset, because it does not fit 16 bits": 2}
    steps = 2 * np.round(PAIR * 500)
    np.testing.assert_array_equal(corpus.read(0), steps - np.median(steps, axis=1, keepdims=True))


@pytest.mark.parametrize("fs", [4001, 8000, 32000, 44100, 100_000, 3999.999, 12345.678, 50.001])
def test_every_rate_up_to_100_khz(fs):
    y, _ = preprocess(draw_ecg(fs, 4, ("II",)), fs, "II")
    assert y.shape[1] in (1000, 1001)
    np.testing.assert_allclose(y[0, 50:950], draw_ecg(FS, 4, ("II",))[0, 50:950], atol=0.005 if fs > 100 else 2)


def test_what_looks_wrong_is_said():
    z = (PAIR - PAIR.mean(1, keepdims=True)) / PAIR.std(1, keepdims=True)
    unit = (PAIR - PAIR.min()) / np.ptp(PAIR)
    assert notes_of(PAIR, FS, ("II", "V2")) == {}
    for x in (z, (PAIR - PAIR.mean()) / PAIR.std(), unit, 2 * unit - 1, np.where(np.arange(2500) % 700, z, np.nan)):
        assert notes_of(x, FS, ("II", "V2")) == {NORMALISED: 1}
    assert notes_of(10 * PAIR, FS, ("II", "V2")) == {GAIN.format("more"): 1}
    assert notes_of(PAIR / 10, FS, ("II", "V2")) == {GAIN.format("less"): 1}
    mixed = np.vstack([PAIR, 1000 * PAIR[:1]])
    assert notes_of(mixed, FS, ("II", "V2", "V3")) == {"leads left out: an amplitude or offset that no ECG has": 1}
    y, _ = preprocess(mixed, FS, ("II", "V2", "V3"), notes=Counter())
    assert np.isnan(y[2]).all() and np.isfinite(y[:2]).all()
    y, _ = preprocess(np.vstack([PAIR, PAIR[:1] / 1000]), FS, ("II", "V2", "V3"), notes=(notes := Counter()))
    assert np.isnan(y[2]).all() and notes == {"leads left out: an amplitude or offset that no ECG has": 1}
    burst = PAIR.copy()
    burst[0, :200] = 100 * np.sin(np.arange(200))                  # a bad contact for 8 % of the time
    y, _ = preprocess(burst, FS, ("II", "V2"), notes=Counter())
    np.testing.assert_array_equal(y[0], np.where(np.abs(burst[0]) > 32.767, np.nan, burst[0]).astype(np.float32))
    with pytest.warns(UserWarning, match="^signals that span more"):
        preprocess(10 * PAIR, FS, ("II", "V2"))


NO_ECG_NAMES = ("RESP", "Resp.", "resp thorax", "PLETH", "PLETH R", "PLETHl", "PPG", "ABP", "ART", "CVP", "PAP", "ICP",
                "EEG (C4-A1)", "EEG Fpz-Cz", "C4-M1", "O2-A1", "F3-M2", "EMG chin", "EMG1", "EOG(L)", "EOG horizontal",
                "LOC", "SpO2", "SaO2", "SO2", "CO2", "EtCO2", "UC", "FHR", "Airflow", "NASAL", "THOR RES", "ABDO RES",
                "Thorax", "Abdomen", "Temp rectal", "PCG", "SCG", "ACC X", "accel_x", "GSR", "EDF Annotations",
                "Event marker", "P1", "Pressure", "HR", "Pulse", "Light", "Position", "OX STAT",
                "H.R.", "NEW AIR", "Therm", "Pres", b"RESP", "PLETH (mV)", "BP")


def test_names_of_what_is_no_ecg():
    assert [name for name in NO_ECG_NAMES if not is_no_ecg(name)] == []
    for name in (*LEADS, "ECG", "ECG1", "noise1", "V", "MCL", "CM5", "MLII", "channel 1", "ch2", "P", "avr", "x"):
        assert not is_no_ecg(name), name


def test_channels_that_are_no_ecg_are_missing_and_counted():
    x = np.vstack([PAIR, np.random.default_rng(0).normal(0, 0.5, (3, 2500))])
    names = ["II", "V2", "RESP", "PLETH", "ECG9"]
    y, ids = preprocess(x, FS, names, notes=(notes := Counter()))
    assert notes == {"channels left out: RESP": 1, "channels left out: PLETH": 1,
                     "leads stored as unknown: the name 'ECG9'": 1}
    assert np.isnan(y).all(axis=1).tolist() == [False, False, True, True, False] and ids.tolist() == [2, 8, 0, 0, 0]
    with pytest.raises(Refused, match="the channels RESP, PLETH are no ECG by their names"):
        preprocess(x[2:4], FS, ("RESP", "PLETH"))
    assert notes_of(PAIR, FS, ("unknown", "II")) == {}            # said by the caller


def test_names_as_people_hold_them():
    expected, ids = preprocess(PAIR, FS, ("II", "V2"))
    for names in (np.array(["II", "V2"], "S4"), [b"II", b"V2"], iter(["II", "V2"]), {"II": 1, "V2": 2}.keys(),
                  ["II (mV)", "V2_mV"], np.array(["II", "V2"]), ("ECG II", "Lead V2")):
        y, found = preprocess(PAIR, FS, names)
        np.testing.assert_array_equal(y, expected)
        assert found.tolist() == ids.tolist() == [2, 8]
    assert preprocess(PAIR[0], FS, b"II")[1].tolist() == [2]
    y, _ = preprocess(PAIR * [[1000], [1]], FS, ["II [uV]", "V2"])              # a unit in a name goes first
    np.testing.assert_allclose(y, expected, atol=1e-6)
    with pytest.raises(Refused, match="a set has no order"):
        preprocess(PAIR, FS, {"II", "V2"})


def test_time_is_no_lead():
    t = np.arange(2500) / FS
    for name in ("time", "Time (s)", "t", "sample", "'Elapsed time'", "timestamp", "sample #"):
        with pytest.raises(Refused, match="time is no lead; leave it out of signal and leads"):
            preprocess(np.vstack([t, PAIR]), FS, (name, "II", "V2"))
    for column in (t, np.round(t, 2) + np.arange(2500) * 1e-6):     # rounded, it does not rise evenly
        notes = notes_of(np.vstack([column, PAIR]), FS, ("unknown", "II", "V2"))
        assert notes == {"channels left out: one that only rises, like time": 1}


@pytest.mark.parametrize("header, leads, units", [
    ("time,II,I", "DI;DII", "mV"), ("time,II,I", "lead I;lead II", "mV"), ("II,I", "I (mV);II (mV)", "uV"),
    ("I (uV),II (uV)", "I II", "mV"), ("0,1", "II I", "mV"), ("time,II,I", "I II", "mV"), ("", "time II I", "mV")])
def test_columns_of_a_csv_are_found_by_their_leads(tmp_path, header, leads, units):
    """I is half of II, whatever the names of the header and of the table look like."""
    ii, columns = np.round(PAIR[0], 4), {"time": np.arange(2500) / FS}
    names = [name for name in (header or leads.replace(" ", ",")).split(",")]
    columns |= {"II": ii, "I": ii / 2, "0": ii, "1": ii / 2, "II (uV)": 1000 * ii, "I (uV)": 500 * ii}
    text = [header] if header else []
    text += [",".join(f"{columns[name][k]:.7f}" for name in names) for k in range(2500)]
    (tmp_path / "x.csv").write_text("\n".join(text) + "\n")
    x, ids = preprocess(*ecg.read_array(str(tmp_path / "x.csv"), "250", units, leads)[:4])
    assert x.shape == (2, 2500) and {*ids} == {LEADS.index("I"), LEADS.index("II")}
    for row, lead in zip(x, ids):
        np.testing.assert_allclose(row, ii / (2 if LEADS[lead] == "I" else 1), atol=2e-4)


def test_a_header_in_latin_1_keeps_its_unit(tmp_path):
    rows = "\n".join(f"{v:.1f}" for v in 1000 * PAIR[0])
    (tmp_path / "x.csv").write_bytes(f"I (\u00b5V)\n{rows}\n".encode("latin-1"))
    x, _ = preprocess(*ecg.read_array(str(tmp_path / "x.csv"), "250", "mV", "")[:4])
    np.testing.assert_allclose(x[0], PAIR[0], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# pictures

@pytest.mark.parametrize("leads, standard, rows", [
    (TWELVE, True, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11], [1]]),         # three rows of four, and lead II
    (TWELVE, False, [[i] for i in range(12)]), (("MLII", "V1"), True, [[0], [1]]), (("x",), False, [[0]])])
def test_paper_has_its_scale_and_shows_every_lead_where_it_is_looked_for(leads, standard, rows):
    """25 mm/s and 10 mm/mV in the figure as it is printed; no row crosses another, and no name lies on a trace."""
    signal, colours = draw_ecg(FS, 6, leads), np.random.default_rng(0).random((len(leads), 30, 3)).repeat(50, axis=1)
    signal[0, :5] = np.nan
    figure = ecg.draw_ecg_paper(signal, list(leads), {"one": colours, "two": colours}, "a title", standard)
    (one, _), (two, _) = (axis.get_position().p0 for axis in figure.axes)
    assert (one == two) == (len(rows) < 12)                            # below each other if they are flat
    for axis in figure.axes:
        size_mm = np.array(axis.get_position().size) * figure.get_size_inches() * 25.4
        np.testing.assert_allclose(np.diff([axis.get_xlim(), axis.get_ylim()])[:, 0], size_mm)         # data are in mm
        traces = [of for of in axis.collections if of.get_zorder() != 0.5]                     # without the grid
        places = [(row, k, i) for row, of in enumerate(rows) for k, i in enumerate(of)]
        y_of, names = [[] for _ in rows], [[] for _ in rows]
        for (row, k, i), trace, text in zip(places, traces, axis.texts, strict=True):
            parts = [path.vertices for path in trace.get_paths()]
            at = np.rint([part[0, 0] / 25 * FS for part in parts]).astype(int)
            np.testing.assert_allclose(trace.get_colors()[:, :3], colours[i, at])
            x, y = np.concatenate([part[:-1] for part in parts[:-1]] + parts[-1:]).T
            first, n = 1500 * k // len(rows[row]), 1500 // len(rows[row])
            np.testing.assert_allclose(x, 25 * np.arange(first, first + n) / FS)
            zero = y - 10 * (signal[i, first:first + n] - np.nanmedian(signal[i]))
            assert np.isnan(y).sum() == 5 * (i == 0) and np.nanmedian(zero) % -5 == pytest.approx(0, abs=1e-9)
            np.testing.assert_allclose(zero[np.isfinite(y)], np.nanmedian(zero))
            assert text.get_text() == leads[i] and text.get_position()[0] == pytest.approx(x[0])
            y_of[row] += [*y]
            names[row].append(text.get_position()[1])
        limits = axis.get_ylim()
        for low, high, name, above in zip(map(np.nanmin, y_of), map(np.nanmax, y_of), names,
                                          [limits[1], *map(np.nanmin, y_of)]):
            assert limits[0] <= low and high < min(name) and max(name) + 2.8 <= above                  # 8 points
        black = [line.get_xydata() for line in axis.get_lines()]
        assert len(black) == len(places) * standard


# ---------------------------------------------------------------------------------------------------------------------
# what a person needs who only wants features

def modules_after(code):
    """The modules that a fresh process has loaded after `code`."""
    done = subprocess.run([sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], cwd=ROOT, check=True,
                          capture_output=True, text=True, timeout=600)
    return set(done.stdout.split())


def test_the_model_loads_neither_wfdb_nor_pandas_nor_pictures():
    """torch loads multiprocessing by itself, so what it loads is left out of the comparison."""
    loaded = modules_after("import model") - modules_after("import torch")
    packages = {name.partition(".")[0] for name in loaded}
    assert {"model", "ecg"} <= packages
    assert not packages & {"wfdb", "pandas", "sklearn", "matplotlib", "multiprocessing", "prepare", "corpus", "tqdm"}
