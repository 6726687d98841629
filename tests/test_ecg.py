"""ecg.py: lead names and preprocessing against plain definitions, WFDB files of every format against wfdb itself.

    pytest -q tests/test_ecg.py
"""
import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import wfdb

from conftest import ROOT, TWELVE, draw_ecg, edit_header, noise, rows_of, run, write
import ecg
from ecg import FS, LEADS, MISSING, Refused, is_no_ecg, lead_id, preprocess, read_pieces, read_wfdb


# ---------------------------------------------------------------------------------------------------------------------
# lead names

@pytest.mark.parametrize("name, lead", [
    *((spelling, name) for name in LEADS for spelling in (name, name.lower(), name.upper())),
    ("DI", "I"), ("DII", "II"), ("diii", "III"), ("D2", "II"), ("lead II", "II"), (" Lead aVF ", "aVF"), ("MLI", "I"),
    ("MLII", "II"), ("mliii", "III"), ("MV1", "V1"), ("ML V1", "V1"), ("MV6", "V6"), ("v 3", "V3"), ("vx", "X"),
    ("VY", "Y"), ("VZ", "Z"),
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
    ((ECG + 2000, FS, ("I", "II")), "on an offset of 2e+03 mV, if it is in mV; an ECG spans 0.005 to 20 mV, on at most 300 mV")])
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
    assert own.fs == theirs.fs and own.leads == theirs.sig_name and set(theirs.units) == {"mV"} and not own.notes


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
