"""prepare.py: every source on small raw folders, damaged input, interrupted runs, downloads, check, flags, and real
recordings where they are.

    pytest -q tests/test_prepare.py
"""
import ast
import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.signal
import wfdb

import prepare
from conftest import (RECORDS, ROOT, TWELVE, draw_ecg, edit_header, files_of, link, names_of, noise, patient_of,
                      real_ptbxl, rows_of, run, write)
from corpus import INDEX_DTYPE, SPLITS, lock_folder, open_corpus, part_of
from ecg import FS, LEADS, MISSING, Refused, is_no_ecg, preprocess, read_array, read_edf, read_wfdb
from synth import MITDB_CONDITIONS, STATEMENTS, atomic_folder, write_record

DS2 = "100 103 105 111 113 117 121 123 200 202 210 212 213 214 219 221 222 228 231 232 233 234".split()
MINUTE = 60 * FS


def rejects_of(folder):
    table = pd.read_csv(folder / "rejects.csv", dtype=str)
    assert list(table) == ["record", "reason", "detail"]
    return dict(zip(table.record, table.reason))


def label_of(row):
    return {name for bit, name in enumerate(("NORM", "MI", "STTC", "CD", "HYP")) if row["label"] >> bit & 1}


def read_raw(path):
    """wfdb's own view of a record, preprocessed: float32 (L, T) mV at FS and lead ids."""
    record = wfdb.rdrecord(str(path))
    return preprocess(record.p_signal, record.fs, record.sig_name, units="mV")


def assert_stored(steps, signal_mv):
    """int16 (L, T) holds signal_mv to half a step of 1 uV, and MISSING exactly where that is NaN."""
    assert steps.shape == signal_mv.shape and steps.dtype == np.int16
    np.testing.assert_array_equal(steps == MISSING, np.isnan(signal_mv))
    np.testing.assert_allclose(np.where(steps == MISSING, np.nan, steps / 1000), signal_mv, rtol=1e-6, atol=0.5e-3)


# ---------------------------------------------------------------------------------------------------------------------
# the sources, on synthetic recordings in the publishers' layouts

@pytest.mark.parametrize("source", ["ptbxl", "mitdb", "nstdb"])
def test_corpus_on_disk_is_what_its_manifest_says(synth, source):
    corpus = open_corpus(synth / "data" / source)
    index, manifest = corpus.index, corpus.manifest
    files = files_of(corpus.dir)
    assert index.dtype == INDEX_DTYPE and manifest["source"] == source
    assert set(manifest["sha256"]) == set(files) - {"manifest.json"}
    assert {name for name in files if "/" not in name} == {
        "index.npy", "records.npy", "patients.npy", "fingerprints.npy", "rejects.csv", "manifest.json"}
    sizes = index["n_leads"].astype(int) * index["length"]
    assert (np.diff(index["shard"].astype(int)) >= 0).all()        # recordings in order, and in a shard without gaps
    for shard in range(len(manifest["shard_bytes"])):
        rows = index["shard"] == shard
        np.testing.assert_array_equal(index["offset"][rows], np.cumsum(sizes[rows]) - sizes[rows])
        n_bytes = len(files[f"signal/{shard:05d}.i16"])
        assert n_bytes == 2 * sizes[rows].sum() == manifest["shard_bytes"][f"{shard:05d}.i16"]
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256(files[name]).hexdigest() == digest
    assert set(index["fs_hz"]) == {100 if source == "ptbxl" else 360}
    assert manifest["fs_hz"] == 250 and manifest["leads"] == list(LEADS) and "1 uV" in manifest["units"]
    assert manifest["recordings"] == len(index) and manifest["rejected"] == {} == rejects_of(corpus.dir)
    assert manifest["command"].startswith("python prepare.py synth --raw")
    assert manifest["leak_note"] == prepare.LEAK_NOTES[source]
    patients = {}
    for number, split in enumerate(SPLITS):
        rows = index[index["split"] == number]
        patients[split] = set(rows["patient"])
        assert manifest["recordings_per_split"][split] == len(rows)
        assert manifest["patients_per_split"][split] == len(patients[split])
        assert manifest["hours_per_split"][split] == pytest.approx(rows["length"].sum() / FS / 3600, abs=1e-3)
    assert sum(map(len, patients.values())) == len(set.union(*patients.values()))     # no patient in two splits
    assert manifest["patients_in_two_splits"] == 0


def test_ptbxl_splits_by_fold_and_labels_by_statement(synth, ptbxl_table):
    corpus = open_corpus(synth / "data" / "ptbxl")
    assert names_of(corpus) == [f"{ecg_id:05d}" for ecg_id in range(1, RECORDS + 1)]
    for i, (row, (ecg_id, known)) in enumerate(zip(corpus.index, ptbxl_table.iterrows())):
        assert SPLITS[row["split"]] == {9: "val", 10: "test"}.get(known.strat_fold, "train")
        assert patient_of(corpus, i) == f"ptbxl/{known.patient_id:.0f}"
        assert row["n_leads"] == 12 and row["length"] == 2500 and [LEADS[i] for i in row["leads"][:12]] == list(TWELVE)
        classes = {STATEMENTS[code].split()[1] for code in ast.literal_eval(known.scp_codes)} - {"-"}
        assert label_of(row) == classes
    assert {1, 9, 10} <= set(ptbxl_table.strat_fold) and ptbxl_table.patient_id.nunique() < RECORDS


def test_mitdb_keeps_ds2_and_201_out_and_finds_leads_by_name(synth):
    corpus = open_corpus(synth / "data" / "mitdb")
    rows = rows_of(corpus)
    assert set(rows) == set(MITDB_CONDITIONS) and len(rows) == 16
    assert set(names_of(corpus, "test")) == set(rows) & set(DS2) and not names_of(corpus, "val")
    assert set(corpus.index["length"]) == {3 * MINUTE}
    for name, i in rows.items():
        assert [LEADS[k] for k in corpus.index["leads"][i][:2]] == (["V5", "II"] if name == "114" else ["II", "V1"])


def test_all_of_mitdb_is_listed_and_201_goes_with_202(synth, tmp_path):
    """Without RECORDS all 48 are looked for; those that are not there are counted, not passed over."""
    raw = tmp_path / "mitdb"
    raw.mkdir()
    for path in (synth / "raw" / "mitdb").iterdir():
        if path.suffix in (".hea", ".dat"):
            os.symlink(path, raw / path.name)
    corpus = run("mitdb", raw, tmp_path / "out")
    assert corpus.manifest["recordings"] == 16 and corpus.manifest["rejected"] == {"absent file": 32}
    assert set(rejects_of(tmp_path / "out").values()) == {"absent file"}
    jobs = {job.record: job for job in prepare.list_mitdb(raw, None, {})}
    assert len(jobs) == 48
    assert {name for name, job in jobs.items() if job.split == "test"} == {*DS2, "201"}
    assert jobs["201"].patient == jobs["202"].patient and len({job.patient for job in jobs.values()}) == 47
    assert {job.split for job in jobs.values()} == {"train", "test"}


def test_nstdb_parts_are_minutes_0_to_20_and_20_to_30(synth, tmp_path):
    corpus = open_corpus(synth / "data" / "nstdb")
    assert names_of(corpus, "train") == names_of(corpus, "test") == ["bw", "em", "ma"]
    for i, name in enumerate(names_of(corpus)):
        whole, ids = read_raw(synth / "raw" / "nstdb" / name)
        test = corpus.index["split"][i] == SPLITS.index("test")
        assert_stored(corpus.read(i), whole[:, 20 * MINUTE:30 * MINUTE] if test else whole[:, :20 * MINUTE])
        assert corpus.index["leads"][i][:2].tolist() == ids.tolist() == [0, 0]
    for name in ("bw", "em", "ma"):                                # a shorter record is parted likewise
        adc = np.random.default_rng(0).integers(-500, 500, (90 * 360, 2))
        write_record(tmp_path / name, 360, ("noise1", "noise2"), adc, gain=0)
    assert run("nstdb", tmp_path, tmp_path / "out").index["length"].tolist() == [60 * FS, 30 * FS] * 3


@pytest.mark.parametrize("source", ["ptbxl", "mitdb"])
def test_samples_are_those_that_wfdb_reads(synth, ptbxl_table, source):
    corpus = open_corpus(synth / "data" / source)
    for i, name in enumerate(names_of(corpus)):
        path = ptbxl_table.filename_lr[int(name)] if source == "ptbxl" else name
        expected, ids = read_raw(synth / "raw" / source / path)
        assert_stored(corpus.read(i), expected)
        assert corpus.index["leads"][i][:len(ids)].tolist() == ids.tolist()


@pytest.mark.parametrize("source", ["ptbxl", "mitdb", "nstdb"])
def test_output_does_not_depend_on_the_number_of_workers(synth, source, tmp_path):
    run(source, synth / "raw" / source, tmp_path / "two", "--workers", "2")
    two, one = files_of(tmp_path / "two"), files_of(synth / "data" / source)
    manifests = [json.loads(files.pop("manifest.json")) for files in (two, one)]
    assert two == one and len(one) >= 10
    assert {key for key in manifests[0] if manifests[0][key] != manifests[1][key]} == {"command"}


def ptbxl_copy(synth, raw, rows):
    """PTB-XL's layout with only these rows of the table, records by link."""
    raw.mkdir()
    for name in ("records100", "scp_statements.csv"):
        os.symlink(synth / "raw" / "ptbxl" / name, raw / name)
    rows.to_csv(raw / "ptbxl_database.csv")
    return raw


def test_ptbxl_counts_what_it_cannot_read(synth, ptbxl_table, tmp_path):
    rows = ptbxl_table[:4].copy()
    raw = ptbxl_copy(synth, tmp_path / "raw", rows)
    (raw / "mine").mkdir()
    for ecg_id, leads in ((2, TWELVE[:11]), (3, TWELVE)):
        rows.loc[ecg_id, "filename_lr"] = f"mine/{ecg_id}"
        write(raw, f"mine/{ecg_id}", noise(ecg_id, 1000, len(leads)), leads, fs=100)
    os.truncate(raw / "mine" / "3.dat", 5000)
    rows.loc[4, "filename_lr"] = "no_such_folder/4"
    rows.to_csv(raw / "ptbxl_database.csv")
    corpus = run("ptbxl", raw, tmp_path / "out", "--rate", "100")
    assert names_of(corpus) == ["00001"]
    reasons = {"00002": "channel count", "00003": "unreadable or truncated file", "00004": "absent file"}
    assert rejects_of(tmp_path / "out") == reasons and corpus.manifest["rejected"] == Counter(reasons.values())


def test_a_patient_in_two_splits_makes_no_corpus(synth, ptbxl_table, tmp_path):
    rows = ptbxl_table[:6].copy()
    assert rows.patient_id[4] == rows.patient_id[5]                # one patient, two records
    rows.loc[5, "strat_fold"] = 10
    raw = ptbxl_copy(synth, tmp_path / "raw", rows)
    with pytest.raises(ValueError, match="1 patients are in more than one split"):
        run("ptbxl", raw, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


# ---------------------------------------------------------------------------------------------------------------------
# any folder of WFDB records, with everything in it that people have

LONG_NAME = "ward_7/" + "x" * 70


def write_good_records(raw):
    """-> {record: what the corpus must hold, int16 (L, T)}; 200 steps per mV from 1024, so 5 uV per step."""
    expected = {}
    names = ("plain", "ward_1/plain", "ward_1/swapped_date", "HR00001", "ward_1/00017_lr", "ward_1/00018_hr", "100",
             "JS00001", "same_names", LONG_NAME)
    for seed, name in enumerate(names):
        write(raw, name, noise(seed), leads=("II", "lead II") if name == "same_names" else ("II", "V1"))
        expected[name] = 5 * (noise(seed).T - 1024)
    edit_header(raw, "ward_1/swapped_date", "2500\n", "2500 2014-05-08 05:05:15\n")
    adc = noise(10)
    adc[:100], adc[1500:1510, 0] = -32768, -32768                  # what format 16 writes for "no sample"
    write(raw, "few_missing", adc)
    expected["few_missing"] = np.where(adc.T == -32768, MISSING, 5 * (adc.T - 1024))
    adc = noise(20)
    adc[:, 1] = 1100
    write(raw, "one_flat_lead", adc)
    expected["one_flat_lead"] = 5 * (adc.T[:1] - 1024)
    adc = noise(21)
    adc[:300], adc[-200:] = 1024, 1024
    write(raw, "zero_padded", adc)
    expected["zero_padded"] = 5 * (adc.T[:, 300:-200] - 1024)
    write(raw, "microvolt", noise(22), units="uV", gain=1)
    expected["microvolt"] = noise(22).T - 1024
    write(raw, "with_breathing", noise(23), leads=("II", "RESP"), units=("mV", "pm"))
    expected["with_breathing"] = 5 * (noise(23).T[:1] - 1024)
    write(raw, "seventeen_leads", noise(24, channels=17), leads=[*TWELVE, "V7", "V8", "V9", "X", "Y"])
    expected["seventeen_leads"] = 5 * (noise(24, channels=17).T[:16] - 1024)
    for name in ("part_1", "part_2"):
        write(raw, name, noise(ord(name[-1])))
    (raw / "in_parts.hea").write_text("in_parts/2 2 250 5000\npart_1 2500\npart_2 2500\n")
    expected["in_parts"] = np.hstack([5 * (noise(ord(digit)).T - 1024) for digit in "12"])
    return expected


def write_bad_records(raw):
    """-> {record: reason}"""
    unreadable = ["truncated", "cut_within_a_sample", "empty_signal_file", "lines_missing", "unknown_format"]
    for name in (*unreadable, "no_signal_file"):
        write(raw, name, noise(30))
    os.truncate(raw / "truncated.dat", 3000)
    os.truncate(raw / "cut_within_a_sample.dat", 9999)
    os.truncate(raw / "empty_signal_file.dat", 0)
    (raw / "no_signal_file.dat").unlink()
    header = (raw / "lines_missing.hea").read_text()
    (raw / "lines_missing.hea").write_text(header[:header.rindex("lines_missing.dat")])
    edit_header(raw, "unknown_format", ".dat 16 ", ".dat 999 ")
    (raw / "garbage.hea").write_bytes(np.random.default_rng(1).bytes(3000))
    (raw / "empty_header.hea").touch()
    (raw / "no_channels.hea").write_text("no_channels 0 250 2500\n")
    write(raw, "all_flat", np.full((2500, 2), 1100))
    write(raw, "all_invalid", np.full((2500, 2), -32768))
    write(raw, "at_the_rails", noise(31), gain=0.02)               # 40 V: the header's gain is wrong
    write(raw, "below_2_s", noise(32, n=499))
    adc = noise(33)
    adc[300:] = 1024
    write(raw, "mostly_padding", adc)
    write(raw, "twenty_hz", noise(34), fs=20)
    write(raw, "pressure", noise(35), units="mmHg")
    unreadable += ["garbage", "empty_header"]
    names = {"unreadable or truncated file": unreadable, "absent file": ["no_signal_file"],
             "no valid lead": ["all_flat", "all_invalid"], "amplitude": ["at_the_rails"],
             "too short": ["below_2_s", "mostly_padding"],
             "sampling rate": ["twenty_hz"], "no voltage channel": ["pressure", "no_channels"]}
    return {name: reason for reason, some in names.items() for name in some}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """-> corpus, {kept record: samples}, {rejected record: reason}"""
    folder = tmp_path_factory.mktemp("wfdb")
    good, bad = write_good_records(folder / "raw"), write_bad_records(folder / "raw")
    return run("wfdb", folder / "raw", folder / "out"), good, bad


def test_folders_and_links_to_nowhere_named_like_headers_are_no_records(tmp_path, capsys):
    write(tmp_path / "raw", "good", noise(0))
    (tmp_path / "raw" / "folder.hea").mkdir()
    os.mkfifo(tmp_path / "raw" / "pipe.hea")
    for target, name in (("nowhere", "dangling.hea"), ("itself.hea", "itself.hea")):
        os.symlink(target, tmp_path / "raw" / name)
    corpus = run("wfdb", tmp_path / "raw", tmp_path / "out")
    assert names_of(corpus) == ["good"] and not corpus.manifest["rejected"]
    assert corpus.manifest["notes"] == {prepare.NOT_READ: "2 links to nowhere, 1 pipes and devices"}
    assert f"  {prepare.NOT_READ}: 2 links to nowhere" in capsys.readouterr().out


def test_links_to_folders_are_followed_once(tmp_path):
    """Circles too, and a folder keeps its own name where it has one."""
    raw = tmp_path / "raw"
    for seed, name in enumerate(("raw/a/1", "raw/b/2", "raw/3", "elsewhere/4", "elsewhere/deep/5")):
        write(tmp_path, name, noise(seed))
    os.symlink(tmp_path / "elsewhere", raw / "a" / "cohort")
    os.symlink(raw / "b", raw / "a" / "of_b")
    os.symlink("..", raw / "b" / "up")
    os.symlink(raw, tmp_path / "elsewhere" / "deep" / "back")
    os.symlink(tmp_path / "elsewhere" / "deep", raw / "z")
    os.symlink(raw / "3.hea", raw / "b" / "3.hea")
    os.symlink(raw / "3.dat", raw / "b" / "3.dat")
    for folder, flags in ((raw, ()), (raw.parent / "as_link", ("--workers", "2"))):
        if not folder.exists():
            os.symlink(raw, folder)
        corpus = run("wfdb", folder, tmp_path / f"out_{folder.name}", *flags)
        assert names_of(corpus) == ["3", "a/1", "b/2", "b/3", "a/cohort/4", "a/cohort/deep/5"]
        assert corpus.manifest["notes"] == {prepare.NOT_READ: "4 links to folders that were listed already"}


def test_two_headers_that_differ_in_capitals_are_one_record(tmp_path, capsys):
    write(tmp_path / "raw", "a", noise(0, 1500))
    (tmp_path / "raw/a.HEA").write_text((tmp_path / "raw/a.hea").read_text())
    corpus = run("wfdb", tmp_path / "raw", tmp_path / "out")
    assert corpus.records.tolist() == [b"a"]
    assert "1 headers whose suffix differs from another's only in capitals" in capsys.readouterr().out


def test_names_in_capitals(tmp_path):
    """A Windows export: the headers name the files in other capitals, in all that read_wfdb can read."""
    raw, kinds = tmp_path / "raw", (("HEA", "DAT"), ("Hea", "Dat"), ("hea", "DAT"), ("HEA", "dat"))
    for seed, (hea, dat) in enumerate(kinds):
        write(raw, f"r{seed}", noise(seed))
        (raw / f"r{seed}.hea").rename(raw / f"R{seed}.{hea}")
        (raw / f"r{seed}.dat").rename(raw / f"R{seed}.{dat}")
    wfdb.wrsamp("c", 500, ["mV"] * 2, ["I", "II"], d_signal=noise(9), fmt=["24"] * 2, adc_gain=[200.0] * 2,
                baseline=[1024] * 2, write_dir=str(raw))           # a format that read_plain_wfdb does not read
    (raw / "c.hea").rename(raw / "C.HEA")
    (raw / "c.dat").rename(raw / "C.DAT")
    write(raw, "lost", noise(5))
    (raw / "lost.hea").rename(raw / "LOST.HEA")
    (raw / "lost.dat").unlink()
    corpus = run("wfdb", raw, tmp_path / "out")
    assert names_of(corpus) == ["C", "R0", "R1", "R2", "R3"] and rejects_of(corpus.dir) == {"LOST": "absent file"}
    for i in range(4):
        np.testing.assert_array_equal(corpus.read(i + 1), 5 * (noise(i).T - 1024))
    assert_stored(corpus.read(0), preprocess((noise(9) - 1024) / 200, 500, ["I", "II"])[0])


def test_what_is_not_read_is_counted(tmp_path):
    """Files that belong to a record, or cannot hold one, are not."""
    raw = tmp_path / "raw"
    write(raw, "a", noise(0))
    write(raw, "slp01", noise(1))
    (raw / "slp01.dat").rename(raw / "slp01a.dat")
    (raw / "slp01.hea").write_text((raw / "slp01.hea").read_text().replace("slp01.dat", "slp01a.dat"))
    (raw / "sub").mkdir()
    for name in ("a.mat", "a.csv", "b.mat", "c.DCM", "sub/d.dcm", "e.xml", "a1.dat", "f.dat", "LICENSE.txt", "a.atr",
                 "sub/a.xml"):
        (raw / name).touch()
    corpus = run("wfdb", raw, tmp_path / "out")
    assert names_of(corpus) == ["a", "slp01"]
    assert corpus.manifest["notes"] == {prepare.NOT_READ: "1 .dat, 2 .dcm, 1 .mat, 2 .xml"}
    with pytest.raises(ValueError, match="no wfdb recordings under .*: expected WFDB headers .*; found 1 .dcm, 1 .xml"):
        run("wfdb", raw / "sub", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def stored_name(name):
    return prepare.shorten(name, 64)


def test_every_record_is_kept_or_rejected_with_its_reason(folder):
    corpus, good, bad = folder
    assert set(names_of(corpus)) == {stored_name(name) for name in good} and len(corpus.index) == len(good)
    assert rejects_of(corpus.dir) == bad
    assert corpus.manifest["rejected"] == Counter(bad.values())
    headers = len(list((corpus.dir.parent / "raw").rglob("*.hea"))) - 2    # two are parts, read with their whole
    assert corpus.manifest["recordings"] + sum(corpus.manifest["rejected"].values()) == headers == len(good) + len(bad)
    assert all(pd.read_csv(corpus.dir / "rejects.csv").detail.str.len() > 10)         # each says more than its reason


def test_kept_records_are_stored_exactly(folder):
    corpus, good, _ = folder
    rows = rows_of(corpus)
    for name, expected in good.items():
        np.testing.assert_array_equal(corpus.read(rows[stored_name(name)]), expected, err_msg=name)


def test_leads_are_named_once_and_changes_are_counted(folder):
    corpus, _, _ = folder
    rows = rows_of(corpus)
    leads = {name: [LEADS[k] for k in row["leads"][:row["n_leads"]]] for name, row in zip(rows, corpus.index)}
    assert leads["plain"] == ["II", "V1"] and leads["same_names"] == ["II", "unknown"]
    assert leads["one_flat_lead"] == leads["with_breathing"] == ["II"]
    assert leads["seventeen_leads"] == [*TWELVE, "V7", "V8", "V9", "X"]
    assert corpus.manifest["changed"] == {
        "channels left out: RESP in pm": 1, "leads dropped: flat, empty or below 2 s of signal": 1,
        "leads dropped: more than 16": 1, "leads renamed unknown: a second one of the name": 1, "recordings trimmed": 1,
        "samples missing": 210}


def test_what_was_not_understood_is_named_up_to_a_number(tmp_path):
    """The 20 most frequent names of each kind, the others as one number; in the manifest and in the summary."""
    for i in range(25):
        write(tmp_path / "raw", f"r{i:02}", noise(i), ("II", f"ECG{max(i, 3)}"))
    for i in range(25, 27):
        write(tmp_path / "raw", f"r{i}", noise(i, channels=3), ("II", "V1", "PLETH"))
    manifest = run("wfdb", tmp_path / "raw", tmp_path / "out").manifest
    kind = "leads stored as unknown"
    assert manifest["changed"] == {"channels left out: PLETH": 2, f"{kind}: the name 'ECG3'": 4,
                                   f"{kind}: other names": 2,
                                   **{f"{kind}: the name 'ECG{i}'": 1 for i in range(4, 23)}}
    assert "  changed        4 leads stored as unknown: the name 'ECG3'\n" in prepare.summary(manifest, "out")


def test_copies_of_test_sets_are_held_out_by_name(folder):
    corpus, good, _ = folder
    assert sorted(names_of(corpus, "test")) == sorted(["HR00001", "ward_1/00017_lr", "ward_1/00018_hr", "100"])
    assert len(corpus.patients) == len(set(corpus.index["patient"])) == len(corpus.index)  # unknown: one per record
    copies = "201 HR21837 HR00001_I 00018_hr_I ptbxl_00018_lr 100skew 103m mitdb_213 mit-bih-100 213_ecg 100_12 117.dat"
    others = "101 101m 102 JS10001 HR1 1000 x100 s100 100_ward 100_2023 mitdb_101 0018_hr"
    assert all(map(prepare.HELD_OUT_COPY.fullmatch, (*DS2, *copies.split())))
    assert not any(map(prepare.HELD_OUT_COPY.fullmatch, others.split()))


def test_long_names_stay_apart():
    names = [f"ward_{i}/" + "x" * 70 + "_hr" for i in range(50)]
    for n_bytes in (32, 64):
        short = [prepare.shorten(name, n_bytes) for name in names]
        assert len(set(short)) == 50 and {len(name) for name in short} == {n_bytes}
        assert all(name.endswith(part.split("~")[1]) for name, part in zip(names, short))
    assert prepare.shorten("ä" * 40, 64).isascii() and prepare.shorten("x" * 64, 64) == "x" * 64


def test_workers_agree_on_damaged_folders_too(folder, tmp_path):
    corpus, _, _ = folder
    run("wfdb", corpus.dir.parent / "raw", tmp_path / "two", "--workers", "2")
    one, two = files_of(corpus.dir), files_of(tmp_path / "two")
    assert one.pop("manifest.json") != two.pop("manifest.json") and one == two


# ---------------------------------------------------------------------------------------------------------------------
# EDF, and arrays with a table

def write_edf(path, channels, seconds=1.0, kind="", n_records=None):
    """channels: (label, unit, physical minimum and maximum, digital minimum and maximum, int16 (records, samples))."""
    fields = [[str(value) for value in column] for column in list(zip(*channels))[:6]]
    label, unit, low, high, digital_low, digital_high = fields
    counts = [str(x.shape[1]) for *_, x in channels]
    empty = [""] * len(channels)
    columns = ((label, 16), (empty, 80), (unit, 8), (low, 8), (high, 8), (digital_low, 8), (digital_high, 8),
               (empty, 80), (counts, 8), (empty, 32))
    n, n_bytes = len(channels[0][-1]) if n_records is None else n_records, 256 * (1 + len(channels))
    head = [("0", 8), ("X", 80), ("X", 80), ("01.01.01", 8), ("01.01.01", 8), (n_bytes, 8), (kind, 44), (n, 8),
            (seconds, 8), (len(channels), 4), *((value, width) for column, width in columns for value in column)]
    text = "".join(str(value).ljust(width) for value, width in head)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.hstack([x for *_, x in channels]).astype("<i2").tobytes()
    path.write_bytes(text.encode("latin-1") + data)


def edf_notes(onsets):
    """The channel of notes of EDF+: when each record begins."""
    notes = [f"+{onset}\x14\x14\0+{onset}\x14a note\x14".encode().ljust(60, b"\0") for onset in onsets]
    return "EDF Annotations", "", -1, 1, -32768, 32767, np.array([np.frombuffer(note, "<i2") for note in notes])


def test_edf_is_read_from_its_digital_samples(tmp_path):
    """Gains, offsets and units of their own, several samples per record, a channel that is no voltage, notes."""
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.integers(-2000, 2000, (12, n)) for n in (500, 500, 250, 1))
    write_edf(tmp_path / "x.edf", [
        ("ECG II", "uV", -3276.8, 3276.7, -32768, 32767, a), ("V1", "mV", 5, -3, -2048, 2047, b),
        ("SpO2", "%", 0, 100, 0, 1000, d), ("I", "\xc2\xb5V", -10000, 10000, -20000, 20000, c),
        edf_notes(range(12))], kind="EDF+C")
    got = read_edf(tmp_path / "x.edf")
    assert got.fs == 500 and got.leads == ["ECG II", "V1", "I"] and got.units == "mV"
    assert got.signal.shape == (6000, 3) and got.notes == {"channels left out: SpO2 in %": 1}
    np.testing.assert_allclose(got.signal[:, 0], a.ravel() * 1e-4, atol=1e-9)     # 0.1 uV per step
    np.testing.assert_allclose(got.signal[:, 1], 5 + (b.ravel() + 2048) * -8 / 4095, atol=1e-9)
    np.testing.assert_allclose(got.signal[::2, 2], c.ravel() * 0.5e-3, atol=0.05)           # at twice its rate
    expected = scipy.signal.resample_poly(c.ravel() * 0.5e-3, 2, 1, padtype="line")
    np.testing.assert_allclose(got.signal[:, 2], expected, atol=1e-9)
    write_edf(tmp_path / "y.edf", [("II", "uV", -3276.8, 3276.7, -32768, 32767, a)], 2, n_records=-1)
    got = read_edf(tmp_path / "y.edf")                             # the number of records is not known
    assert got.fs == 250 and np.array_equal(got.signal[:, 0], read_edf(tmp_path / "x.edf").signal[:, 0])


def test_edf_with_interruptions_has_gaps(tmp_path):
    a = np.random.default_rng(0).integers(-2000, 2000, (4, 200))
    onsets = (7.5, 8.5, 12.4, 13.4)                                # the second half comes 2.9 s late: 3 data records
    channel = "II", "mV", -32.768, 32.767, -32768, 32767, a
    write_edf(tmp_path / "x.edf", [channel, edf_notes(onsets)], kind="EDF+D")
    signal = read_edf(tmp_path / "x.edf").signal[:, 0]
    assert len(signal) == 1400 and np.isnan(signal[400:1000]).all()
    np.testing.assert_allclose(np.r_[signal[:400], signal[1000:]], a.ravel() / 1000, atol=1e-9)
    assert np.array_equal(read_edf(tmp_path / "x.edf", 1, 6).signal[:, 0], signal[200:1200], equal_nan=True)
    write_edf(tmp_path / "back.edf", [channel, edf_notes((7, 6, 8, 9))], kind="EDF+D")
    with pytest.raises(Refused, match="expected one after another"):
        read_edf(tmp_path / "back.edf")


def test_damaged_edf_is_refused_with_its_cause(tmp_path):
    channel = "II", "mV", -32.768, 32.767, -32768, 32767, noise(0, 1000, 1).reshape(4, 250)
    write_edf(tmp_path / "x.edf", [channel])
    good = (tmp_path / "x.edf").read_bytes()
    assert read_edf(tmp_path / "x.edf").signal.shape == (1000, 1)
    for data, words in ((good[:-2], "cut short: 4 records of 500 bytes .* and 1998 bytes do"), (b"", "ValueError"),
                        (b"1" + good[1:], "version '1"),
                        (good.replace(b"-32768  ", b"32767   "), "II in mV, of no range;"),
                        (good.replace(b"mV  ", b"mmHg"), "II in mmHg; expected"), (good[:300], "ValueError")):
        (tmp_path / "x.edf").write_bytes(data)
        with pytest.raises(Refused, match=words):
            read_edf(tmp_path / "x.edf")
    with pytest.raises(Refused, match="y.edf is not there"):
        read_edf(tmp_path / "y.edf")


def test_mutated_edf_is_read_or_refused(tmp_path):
    rng, counts = np.random.default_rng(0), Counter()
    channel = "II", "mV", -32.768, 32.767, -32768, 32767, noise(0, 2000, 1).reshape(4, 500)
    write_edf(tmp_path / "x.edf", [channel, edf_notes((0, 1, 3, 4))], kind="EDF+D")
    good = (tmp_path / "x.edf").read_bytes()
    for i in range(400):
        head = mutate(good[:768], rng)                             # the header is where harm is done
        (tmp_path / "x.edf").write_bytes((head + good[768:]) if i % 2 else mutate(good, rng))
        try:
            got = read_edf(tmp_path / "x.edf")
            assert got.signal.ndim == 2 and got.signal.size <= 2**28 and len(got.leads) == got.signal.shape[1]
            counts["read"] += 1
        except Refused as error:
            counts[error.reason] += 1
    assert set(counts) <= {"read", "unreadable or truncated file", "no voltage channel"} and min(counts.values()) > 1


def test_mutated_arrays_are_read_or_refused(tmp_path):
    rng, counts, x = np.random.default_rng(0), Counter(), noise(0) / 1000
    pd.DataFrame(x, columns=["II", "V1"]).to_csv(tmp_path / "a.csv", index=False)
    np.save(tmp_path / "b.npy", x)
    np.savez(tmp_path / "c.npz", x)
    scipy.io.savemat(tmp_path / "d.mat", {"val": x})
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for i in range(400):
        path, good = list(files.items())[i % 4]
        data = mutate(good[:300], rng) + good[300:] if i % 8 < 4 else mutate(good, rng)
        path.write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with within(60), warnings.catch_warnings(action="ignore"):
                preprocess(*read_array(str(path), "250", "mV", "II V1")[:4], Counter())
            counts["read"] += 1
        except Refused as error:
            counts[error.reason] += 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < TOO_MUCH_KB, (i, path.name)
    print(dict(counts))
    assert counts["read"] > 50 and counts["unreadable or truncated file"] > 50


def test_edf_is_prepared_next_to_wfdb(tmp_path):
    raw = tmp_path / "raw"
    write(raw, "a", noise(0))
    for name in ("b.EDF", "sub/00017_lr.edf", "sub/c.edf"):
        adc = noise(len(name), 2500, 2).reshape(10, 250, 2) - 1024
        write_edf(raw / name, [("II", "uV", -32768, 32767, -32768, 32767, 5 * adc[..., 0]),
                               ("V1", "uV", -32768, 32767, -32768, 32767, 5 * adc[..., 1])])
    os.truncate(raw / "sub" / "c.edf", 5000)
    table = tmp_path / "patients.csv"
    table.write_text("record,patient\nb,7\na,7\n")
    corpus = run("wfdb", raw, tmp_path / "out", "--patients", str(table))
    assert names_of(corpus) == ["a", "b.EDF", "sub/00017_lr.edf"] and names_of(corpus, "test") == ["sub/00017_lr.edf"]
    assert rejects_of(corpus.dir) == {"sub/c.edf": "unreadable or truncated file"}
    np.testing.assert_array_equal(corpus.read(1), 5 * (noise(5).T - 1024))
    assert [LEADS[i] for i in corpus.lead_ids(1)] == ["II", "V1"]
    assert patient_of(corpus, 0) == patient_of(corpus, 1) == "wfdb-patient/7"
    assert corpus.manifest["notes"] == {"patients": "patients.csv (2 names) names 2 of 4 recordings"}


ARRAY_TABLE = """file,rate,unit,leads,patient,split
header.csv,500,mV,,5,
header_named.csv,500,mV,V1 II,5,
plain.csv,250,uV,II;V1,,val
german.csv,250,mV,,,
one.npy,250,mV,II,6,train
sub\\wide.npy,360,uV,II;V1,,
x.npz,250,mV,I;II,,
named.npz,250,mV,I;II,,
x.mat,250,uV,"I, II",,
x.mat,250,uV,I II,,
HR00001.npy,250,mV,II,9,train
of_nine.npy,250,mV,II,9,
no_rate.npy,,mV,II,,
no_unit.npy,250,,II,,
no_leads.npy,250,mV,,,
three.npy,250,mV,I II III,,
words.csv,250,mV,I II,,
two.npz,250,mV,I II,,
gone.npy,250,mV,II,,
"""


def test_arrays_with_a_table(tmp_path):
    raw, table = tmp_path / "raw", tmp_path / "raw" / "t.csv"
    x = [(noise(seed) - 1024) / 1000 for seed in range(20)]       # (T, 2) mV: whole uV
    (raw / "sub").mkdir(parents=True)
    table.write_text(ARRAY_TABLE)
    t = np.arange(2500) / 500
    pd.DataFrame({"time": t, "II (mV)": x[0][:, 0], "V1 [mV]": x[0][:, 1]}).to_csv(raw / "header.csv", index=False)
    pd.DataFrame({"": t, "ii": x[1][:, 0], "RESP": t, "v1": x[1][:, 1]}).to_csv(raw / "header_named.csv", index=False)
    np.savetxt(raw / "plain.csv", x[2] * 1000, "%d", delimiter="\t")
    pd.DataFrame({"II": x[3][:, 0], "V1": x[3][:, 1]}).to_csv(raw / "german.csv", sep=";", decimal=",", index=False,
                                                             encoding="utf-8-sig")
    np.save(raw / "one.npy", x[4][:, 0])
    np.save(raw / "sub" / "wide.npy", np.rint(x[5].T * 1000).astype(np.int16))
    np.savez(raw / "x.npz", x[6], fs=250)
    np.savez(raw / "named.npz", signal=x[7].T, other=x[0])
    scipy.io.savemat(raw / "x.mat", {"val": np.rint(x[8].T * 1000).astype(np.int16), "fs": 250.0, "note": "text"})
    for seed, name in enumerate(("HR00001", "of_nine", "no_rate", "no_unit", "no_leads", "three", "not_named"), 9):
        np.save(raw / f"{name}.npy", x[seed][:, 0] if name != "three" else x[seed])
    (raw / "words.csv").write_text("I,II\n" + "1,2\n" * 2000 + "no signal,3\n")
    np.savez(raw / "two.npz", a=x[0], b=x[1])
    (raw / "scan.dcm").touch()
    corpus = run("arrays", raw, tmp_path / "out", "--table", str(table))
    rows = rows_of(corpus)
    expected = {"plain.csv": x[2].T, "german.csv": x[3].T, "one.npy": x[4][None, :, 0], "x.npz": x[6].T,
                "named.npz": x[7].T, "x.mat": x[8].T, "HR00001.npy": x[9][None, :, 0], "of_nine.npy": x[10][None, :, 0]}
    assert set(rows) == {*expected, "header.csv", "header_named.csv", "sub/wide.npy"}
    for name, signal_mv in expected.items():
        np.testing.assert_array_equal(corpus.read(rows[name]), np.rint(signal_mv * 1000), err_msg=name)
    resampled = {"header.csv": (x[0], 500), "header_named.csv": (x[1][:, ::-1], 500), "sub/wide.npy": (x[5], 360)}
    for name, (values, fs) in resampled.items():
        assert_stored(corpus.read(rows[name]), preprocess(values, fs, ["II", "V1"])[0])
        assert corpus.index["fs_hz"][rows[name]] == fs
    leads = {name: " ".join(LEADS[k] for k in corpus.lead_ids(i)) for name, i in rows.items()}
    assert leads == dict.fromkeys(("header.csv", "plain.csv", "german.csv", "sub/wide.npy"), "II V1") | {
        "header_named.csv": "V1 II"} | dict.fromkeys(("one.npy", "HR00001.npy", "of_nine.npy"), "II") | dict.fromkeys(
        ("x.npz", "named.npz", "x.mat"), "I II")
    assert names_of(corpus, "val") == ["plain.csv"] and names_of(corpus, "test") == ["HR00001.npy", "of_nine.npy"]
    assert patient_of(corpus, rows["header.csv"]) == patient_of(corpus, rows["header_named.csv"]) == "arrays-patient/5"
    assert patient_of(corpus, rows["x.npz"]) == "arrays/x.npz" and len(corpus.patients) == 9
    reasons = pd.read_csv(corpus.dir / "rejects.csv").sort_values("record", kind="stable")
    assert dict(zip(reasons.record, reasons.reason)) == {
        "gone.npy": "absent file", "no_leads.npy": "leads", "no_rate.npy": "sampling rate", "no_unit.npy": "units",
        "not_named.npy": "not in the table", "three.npy": "shape", "two.npz": "unreadable or truncated file",
        "words.csv": "unreadable or truncated file", "x.mat": "file named twice"}
    details = dict(zip(reasons.record, reasons.detail))
    assert "'a', 'b'" in details["two.npz"] and "no signal" in details["words.csv"]
    assert corpus.manifest["notes"] == {"files": f"{table} names 17 of 18 files", prepare.NOT_READ: "1 .dcm"}
    assert corpus.manifest["command"].endswith(f"--table {table}")


def test_tables_of_arrays_that_are_refused(tmp_path):
    raw, table = tmp_path / "raw", tmp_path / "t.csv"
    raw.mkdir()
    np.save(raw / "a.npy", noise(0)[:, 0] / 1000)
    for text, words in (("file,rate,unit\na.npy,250,mV\n", "has 1 rows with the columns file, rate, unit: expected"),
                        ("file,rate,unit,leads\n", "has 0 rows"), ("", "t.csv cannot be read .No columns to parse"),
                        ("file,rate,unit,leads\na.npy,250,mV,II\nb,c,d,e,f\n", "cannot be read .Error token"),
                        ("file,rate,unit,leads,split\na.npy,250,mV,II,dev\n", "a split is train, val, test or empty"),
                        ("file,rate,unit,leads\nx/a.npy,250,mV,II\n",
                         "t.csv names 0 of 1 files in .*: it says 'x/a.npy', and there is 'a.npy'")):
        table.write_text(text)
        with pytest.raises(ValueError, match=words):
            run("arrays", raw, tmp_path / "out", "--table", str(table))
    with pytest.raises(ValueError, match="raw/table.csv cannot be read .*No such file.*: expected a table"):
        run("arrays", raw, tmp_path / "out")
    (raw / "table.csv").write_text("file,rate,unit,leads\na.npy,250,mV,II\n")
    assert names_of(run("arrays", raw, tmp_path / "out")) == ["a.npy"]     # the table that lies in the folder


# ---------------------------------------------------------------------------------------------------------------------
# whole or not at all, and what users see

def test_an_existing_folder_is_never_written_into(small_raw, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    (tmp_path / "file").write_text("data")
    for name in ("out", "file"):
        with pytest.raises(ValueError, match=f"{name} already exists: delete it .* to make it again"):
            run("wfdb", small_raw, tmp_path / name)
    with pytest.raises(ValueError, match="already exists"):         # synth writes its raw folder too
        run("synth", tmp_path / "out", tmp_path / "new", "--records", "1")
    assert files_of(tmp_path) == {"file": b"data", "out/precious": b"data"}
    (tmp_path / "empty").mkdir()
    assert len(run("wfdb", small_raw, tmp_path / "empty").index) == 3


def test_nothing_usable_leaves_nothing(tmp_path):
    raw = tmp_path / "raw"
    write(raw, "short", noise(0, n=100))
    (raw / "garbage.hea").write_text("?")
    with pytest.raises(ValueError, match="none of the 2 recordings could be used: .*'too short': 1"):
        run("wfdb", raw, tmp_path / "out")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no wfdb recordings under .*: expected WFDB headers"):
        run("wfdb", tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="no ptbxl_database.csv in .*: expected PTB-XL's own folder, which "
                       "`python prepare.py ptbxl --raw .* --out DIR --download` fetches$"):
        run("ptbxl", tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(OSError), atomic_folder(tmp_path / "out") as part:
        (part / "half").write_text("half")
        raise OSError("disk full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nothing", "raw"]


def until(condition, what, limit_s=600):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s} s for {what}"
        time.sleep(0.02)


def processes_of(session):
    """Ids of the processes of a session, its leader included."""
    ids = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            ids += [int(name)] * (os.getsid(int(name)) == session)
    return ids


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the worker processes in /proc")
@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM", "SIGKILL", "a worker is killed"])
def test_an_interrupted_run_goes_on_where_it_stood(end, tmp_path):
    """One record's header is a pipe that nobody writes to, so the run stands in the middle until it is ended."""
    raw, out, part = tmp_path / "raw", tmp_path / "out", tmp_path / "out" / ".part"
    for i in range(6):
        write(raw, f"r{i}", noise(i))
    whole = files_of(run("wfdb", raw, out).dir)
    shutil.rmtree(out)
    command = [sys.executable, str(ROOT / "prepare.py"), "wfdb", "--raw", str(raw), "--out", str(out)]
    code = ("import os, sys; sys.path.insert(0, sys.argv.pop(1)); import prepare\n"
            "make = prepare.make_plan\n"                            # the pipe comes after the recordings are listed
            "def plan(*a):\n"
            "    got = make(*a); os.rename(sys.argv[3] + '/r4.hea', sys.argv[3] + '/../r4.hea')\n"
            "    os.mkfifo(sys.argv[3] + '/r4.hea'); return got\n"
            "prepare.make_plan = plan\n"
            "prepare.run_command()")
    hung = [sys.executable, "-c", code, str(ROOT), *command[2:]]
    workers = "1" if end in ("SIGINT", "SIGTERM") else "2"
    process = subprocess.Popen([*hung, "--workers", workers], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               # A shell that runs the tests in the background has Ctrl-C ignored, which is inherited.
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        until(lambda: len(list(part.glob("done/*.npz"))) >= 4, "the first shards")
        if end == "a worker is killed":
            for pid in set(processes_of(process.pid)) - {process.pid}:
                with contextlib.suppress(ProcessLookupError):      # it may have ended with the one before
                    os.kill(pid, signal.SIGKILL)
        else:
            (os.killpg if end == "SIGINT" else os.kill)(process.pid, signal.Signals[end])   # Ctrl-C goes to all of them
        code, errors = process.wait(600), "" if end == "SIGKILL" else process.stderr.read()
        until(lambda: not processes_of(process.pid), "the workers, which end with their parent")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert code == (-signal.SIGKILL if end == "SIGKILL" else 1)
    assert os.listdir(out) == [".part"]
    said = {"SIGINT": "interrupted", "SIGTERM": "interrupted", "SIGKILL": "",
            "a worker is killed": "try again with a smaller --workers"}[end]
    n = len(list(part.glob("done/*.npz")))
    kept = f"; {n} finished shards are kept in {part}: run the same command again to continue" if said else ""
    assert errors.strip().endswith(said + kept) and "Traceback" not in errors
    os.replace(tmp_path / "r4.hea", raw / "r4.hea")
    refusal = "holds an unfinished run of `python prepare.py wfdb .*finish that one, or delete"
    with pytest.raises(ValueError, match=refusal):
        run("wfdb", raw, out, "--limit", "2")
    before = {path: path.stat().st_mtime_ns for path in part.glob("done/*.npz")}
    with monkeypatched(prepare, "prepare_shard") as prepared:
        run("wfdb", raw, out)
    assert {int(path.stem) for path in before} | {args[1] for args in prepared} == set(range(6))
    assert len(prepared) == 6 - len(before)                        # finished shards are not made again
    assert files_of(out) == whole and not part.exists()


@contextlib.contextmanager
def monkeypatched(module, name):
    """The arguments of every call of module.name, which still does its work."""
    function, calls = getattr(module, name), []
    setattr(module, name, lambda *args: calls.append(args) or function(*args))
    try:
        yield calls
    finally:
        setattr(module, name, function)


def test_mistakes_are_told_in_one_line(small_raw, tmp_path):
    command = [sys.executable, str(ROOT / "prepare.py"), "wfdb", "--raw", str(small_raw), "--out", str(small_raw)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [f"prepare.py: {small_raw} already exists: delete it (rm -r {small_raw}) to "
                                        "make it again, or name another folder"]


@pytest.mark.parametrize("flags, words", [
    ("holter", "invalid choice: 'holter'"), ("wfdb --download", "--download is for ptbxl, mitdb, nstdb, not for wfdb"),
    ("mitdb --rate 500", "--rate is for ptbxl"), ("ptbxl --records 5", "--records is for synth, not for ptbxl"),
    ("nstdb --seed 1", "--seed is for synth"), ("synth --records 0", "--records must be at least 1"),
    ("wfdb --workers -1", "--workers, --seed and --limit at least 0"),
    ("wfdb --limit -1", "--limit at least 0"), ("synth --dry-run", "--dry-run is for ptbxl, mitdb"),
    ("heedb --patients a.csv", "--patients is for wfdb"), ("wfdb --table a.csv", "--table is for arrays"),
    ("wfdb --work 2", "unrecognized arguments: --work 2"),
    ("wfdb --raw nowhere/at/all", "--raw nowhere/at/all is no folder")])
def test_flags_that_do_not_go_together(flags, words, tmp_path, capsys):
    source, *rest = flags.split()
    with pytest.raises(SystemExit) as end:
        prepare.parse_args([source, "--raw", str(tmp_path), "--out", str(tmp_path / "out"), *rest])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_the_command_in_the_manifest_makes_the_corpus_again(small_raw, small_corpus, tmp_path):
    words = json.loads((small_corpus / "manifest.json").read_text())["command"].split()
    args = prepare.parse_args(words[2:])
    assert words[:2] == ["python", "prepare.py"]
    assert (args.source, args.raw, args.out) == ("wfdb", small_raw, small_corpus)
    args = prepare.parse_args(["synth", "--raw", "a b", "--out", "c", "--records", "7", "--seed", "9"])
    assert prepare.command_of(args) == "python prepare.py synth --raw 'a b' --out c --records 7 --seed 9"


# ---------------------------------------------------------------------------------------------------------------------
# checksums of a download

def test_checksums_pass_and_damaged_files_are_named(tmp_path, monkeypatch):
    def verify(wanted=".*"):
        monkeypatch.setitem(prepare.PHYSIONET, "mitdb", ("mitdb", wanted))
        prepare.download("mitdb", tmp_path, "auto")

    fetched = []                                                   # and nothing comes
    monkeypatch.setattr(prepare, "fetch", lambda database, raw, names: fetched.append(names))
    (tmp_path / "records100").mkdir()
    contents = {"RECORDS": b"100\n", "records100/1.dat": b"\x00\x01", "records100/1.hea": b"1 1 100\n", "a.txt": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    lines = [f"{hashlib.sha256(content).hexdigest()} {name}\n" for name, content in contents.items()]
    (tmp_path / "SHA256SUMS.txt").write_text("".join(lines))
    verify()
    (tmp_path / "records100" / "1.dat").write_bytes(b"\x00\x03")
    (tmp_path / "RECORDS").unlink()
    verify(r"records100/.*hea")
    verify(r".*\.(hea|txt)")                                       # only what is asked for
    with pytest.raises(ValueError, match="2 files in .* differ .*: RECORDS, records100/1.dat; run again"):
        verify()
    assert fetched[-2:] == [["SHA256SUMS.txt"], ["RECORDS", "records100/1.dat"]]
    with pytest.raises(ValueError, match="lists no file like .*: it belongs to another database"):
        verify(r".*\.mat")


# ---------------------------------------------------------------------------------------------------------------------
# real recordings

def test_real_ptbxl(shared_data, tmp_path):
    """60 records; not all of them are there at 500 Hz, so 100 Hz are read."""
    raw, table = real_ptbxl(shared_data, tmp_path / "raw", [*range(20), *range(110, 1900, 45)])
    corpus = run("ptbxl", raw, tmp_path / "out")
    assert len(corpus.index) == len(table) == 60 and not corpus.manifest["rejected"]
    statements = pd.read_csv(raw / "scp_statements.csv", index_col=0)
    for i, (row, (ecg_id, known)) in enumerate(zip(corpus.index, table.iterrows())):
        assert corpus.records[i] == f"{ecg_id:05d}".encode()
        assert patient_of(corpus, i) == f"ptbxl/{known.patient_id:.0f}"
        assert SPLITS[row["split"]] == {9: "val", 10: "test"}.get(known.strat_fold, "train")
        found = statements.loc[list(ast.literal_eval(known.scp_codes))]
        classes = set(found.diagnostic_class[found.diagnostic == 1])
        assert label_of(row) == classes
    assert {1, 2, 4} <= set(corpus.index["label"]) and set(corpus.index["split"]) == {0, 1, 2}
    for i in range(0, 60, 7):
        assert_stored(corpus.read(i), read_raw(raw / table.filename_lr.iloc[i])[0])
        assert [LEADS[k] for k in corpus.index["leads"][i][:12]] == list(TWELVE)


def test_real_ptbxl_is_the_same_from_either_rate(shared_data, tmp_path):
    """No lag, and below 40 Hz no more difference than the publisher's own decimation to 100 Hz makes."""
    raw, table = real_ptbxl(shared_data, tmp_path / "raw", slice(20))
    high, low = run("ptbxl", raw, tmp_path / "high"), run("ptbxl", raw, tmp_path / "low", "--rate", "100")
    assert_stored(high.read(0), read_raw(raw / table.filename_hr.iloc[0])[0])   # auto takes 500 Hz if all is there
    low_pass, differences = scipy.signal.butter(4, 40, fs=FS, output="sos"), []
    for i in range(20):
        a, b = (np.where(c.read(i) == MISSING, 0, c.read(i) / 1000) for c in (low, high))
        a, b = (scipy.signal.sosfiltfilt(low_pass, x, axis=1)[:, 25:-25] for x in (a, b))
        assert a.shape == b.shape == (12, 2450)
        lags = range(-5, 6)
        agreement = [((a[:, 5 + k:2445 + k] - b[:, 5:-5]) ** 2).sum() for k in lags]
        assert lags[np.argmin(agreement)] == 0
        differences.append(np.sqrt(((a - b) ** 2).sum() / (b ** 2).sum()))
    assert max(differences) <= 0.12 and np.median(differences) <= 0.095


def test_real_mitdb(shared_data, tmp_path):
    names = ("100", "102", "114", "201", "202")
    raw = link(shared_data / "mitdb", tmp_path / "raw", [f"{name}.{kind}" for name in names for kind in ("hea", "dat")])
    (raw / "RECORDS").write_text("\n".join(names) + "\n")
    corpus = run("mitdb", raw, tmp_path / "out")
    assert names_of(corpus) == list(names) and names_of(corpus, "train") == ["102", "114"]
    assert not corpus.manifest["rejected"]
    leads = [[LEADS[k] for k in row["leads"][:2]] for row in corpus.index]
    assert leads == [["II", "V5"], ["V5", "V2"], ["V5", "II"], ["II", "V1"], ["II", "V1"]]
    assert corpus.index["patient"][3] == corpus.index["patient"][4] and len(set(corpus.index["patient"])) == 4
    assert set(corpus.index["length"]) == {-(-650_000 * 25 // 36)}
    for i in (0, 2):
        assert_stored(corpus.read(i), read_raw(raw / names[i])[0])
    beats = wfdb.rdann(str(shared_data / "mitdb" / "100"), "atr")
    peaks = [int(s * FS / 360) for s, symbol in zip(beats.sample, beats.symbol) if symbol == "N"][5:-5]
    offsets = [corpus.read(0)[0, r - 10:r + 11].argmax() - 10 for r in peaks]
    assert len(peaks) > 2000 and np.abs(np.median(offsets)) <= 1   # R of lead II stays under its annotation


def test_real_nstdb(shared_data, tmp_path):
    corpus = run("nstdb", shared_data / "nstdb", tmp_path / "out")
    assert names_of(corpus, "train") == names_of(corpus, "test") == ["bw", "em", "ma"]
    assert corpus.manifest["records"] == 3 and not corpus.manifest["rejected"]
    assert corpus.index["length"].tolist() == [20 * MINUTE, 10 * MINUTE] * 3
    whole, _ = read_raw(shared_data / "nstdb" / "em")
    assert_stored(corpus.read(2), whole[:, :20 * MINUTE])
    assert_stored(corpus.read(3), whole[:, 20 * MINUTE:30 * MINUTE])


def test_real_cinc2017_in_spite_of_its_dates(shared_data, tmp_path):
    headers = sorted((shared_data / "cinc2017").glob("*.hea"))[:20]
    files = [name for header in headers for name in (header.name, f"{header.stem}.mat")]
    raw = link(shared_data / "cinc2017", tmp_path / "raw", files)
    with pytest.raises(ValueError):                                # otherwise this test shows nothing
        wfdb.rdheader(str(raw / headers[0].stem))
    corpus = run("wfdb", raw, tmp_path / "out")
    assert names_of(corpus, "train") == [header.stem for header in headers] and not corpus.manifest["rejected"]
    for i, header in enumerate(headers):
        n = int(header.read_text().split()[3])
        adc = np.frombuffer(header.with_suffix(".mat").read_bytes(), "<i2", offset=24)         # 1000 steps per mV
        expected, ids = preprocess(adc / 1000, 300, ["ECG"])
        assert len(adc) == n and ids.tolist() == [0] == corpus.index["leads"][i][:corpus.index["n_leads"][i]].tolist()
        assert_stored(corpus.read(i), expected)


def test_real_cinc2021(shared_data, tmp_path):
    """39 records, and a header without its signal, which is counted."""
    corpus = run("wfdb", shared_data / "cinc2021", tmp_path / "out")
    headers = sorted((shared_data / "cinc2021").glob("*.hea"))
    lost = {header.stem: "absent file" for header in headers if not header.with_suffix(".mat").exists()}
    assert rejects_of(tmp_path / "out") == lost and corpus.manifest["rejected"] == Counter(lost.values())
    headers = [header for header in headers if header.stem not in lost]
    assert len(headers) == 39 and names_of(corpus, "train") == [header.stem for header in headers]
    assert set(corpus.index["length"]) == {2500}
    dropped = 0
    for i, header in enumerate(headers):
        expected, ids = read_raw(header.with_suffix(""))
        valid = np.isfinite(expected).sum(1) >= 2 * FS             # a lead that is flat throughout is dropped
        assert [LEADS[k] for k in ids] == list(TWELVE) and valid.any()
        dropped += (~valid).sum()
        assert corpus.index["leads"][i][:valid.sum()].tolist() == ids[valid].tolist()
        assert_stored(corpus.read(i), expected[valid])
    assert corpus.manifest["changed"]["leads dropped: flat, empty or below 2 s of signal"] == dropped > 0


# ---------------------------------------------------------------------------------------------------------------------
# the large databases, in their publishers' layouts, from real recordings

def as_record(shared_data, folder, name, i, suffix):
    """The i-th real 500 Hz recording under another name, with .dat or .mat signals."""
    source = sorted((shared_data / "ptbxl" / "records500" / "00000").glob("*.hea"))[i]
    folder.mkdir(parents=True, exist_ok=True)
    header = source.read_text().replace(source.stem, name)
    data = source.with_suffix(".dat").read_bytes()
    if suffix == "mat":                                            # 24 bytes of MATLAB's header, then the same samples
        header = header.replace(f"{name}.dat 16", f"{name}.mat 16+24")
        data = bytes(24) + data
    (folder / f"{name}.hea").write_text(header)
    (folder / f"{name}.{suffix}").write_bytes(data)
    return source.with_suffix("")


def write_heedb(shared_data, raw):
    """Both forms, in two years; -> {record: real record}, the last of them listed as a duplicate."""
    sources = {}
    for i in range(6):
        site, suffix = (("S0001", "mat"), ("S0006", "dat"))[i % 2]
        folder, name = f"ECG/WFDB/{site}/{1990 + i // 4}", f"de_{site}_{i:04d}"
        sources[f"{folder}/{name}"] = as_record(shared_data, raw / folder, name, i, suffix)
    names = [path.split("/")[-1] for path in sources]
    (raw / "Metadata").mkdir()
    pd.DataFrame({"FileName": [f"{name}.mat" for name in names[:5]], "BDSPPatientID": [11, 12, 11, 13, 14],
                  "SexDSC": "Female", "Age": 50.0}).to_csv(raw / "Metadata" / "demographics_ECG.csv")
    pd.DataFrame({"file_name": names[5:]}).to_csv(raw / "Metadata" / "duplicated.csv", index=False)
    return sources


def test_heedb_takes_both_forms_and_its_tables(shared_data, tmp_path):
    raw = tmp_path / "raw"
    sources = write_heedb(shared_data, raw)
    corpus = run("heedb", raw, tmp_path / "out")
    rows = rows_of(corpus)
    assert rejects_of(corpus.dir) == {list(sources)[5]: "duplicate"} and set(rows) == set(list(sources)[:5])
    for (name, i), patient in zip(sorted(rows.items(), key=lambda item: item[0][-4:]), (11, 12, 11, 13, 14)):
        assert_stored(corpus.read(i), read_raw(sources[name])[0])
        assert [LEADS[k] for k in corpus.index["leads"][i][:12]] == list(TWELVE) and corpus.index["fs_hz"][i] == 500
        assert patient_of(corpus, i) == f"heedb/{patient}"
        assert SPLITS[corpus.index["split"][i]] == prepare.job_of("", "", f"heedb/{patient}").split
    assert corpus.manifest["notes"] == {"patients": "demographics_ECG.csv (5 names) names 5 of 6 recordings",
                                        "duplicates": "duplicated.csv (1 names) names 1 of 6 recordings"}
    for table in (raw / "Metadata").iterdir():
        table.unlink()
    corpus = run("heedb", raw, tmp_path / "alone")
    assert len(corpus.patients) == len(corpus.index) == 6
    assert corpus.manifest["notes"] == {
        "patients": "no demographics_ECG.csv: every file counts as a patient of its own"}


def test_code_keeps_the_tracings_of_a_patient_together(shared_data, tmp_path):
    raw = tmp_path / "raw"
    exams = {"TNMG1_N1": 7, "TNMG1_N2": 7, "TNMG22_N1": 8, "TNMG333_N1": 7, "TNMG4_N1": None, "ECG5": None}
    sources = {name: as_record(shared_data, raw / "S0000", name, i, "dat") for i, name in enumerate(exams)}
    for name in exams:
        header = raw / "S0000" / f"{name}.hea"
        header.write_text(header.read_text().replace("AVR", "DAVR").replace(" I\n", " DI\n").replace(" II\n", " DII\n"))
    with pytest.raises(ValueError, match="no annotations.csv in"):
        run("code", raw, tmp_path / "out")
    table = pd.DataFrame({"id_exam": [1, 22, 333], "id_patient": [7, 8, 7], "AF": False})
    table.to_csv(raw / "annotations.csv", index=False)
    corpus = run("code", raw, tmp_path / "out")
    assert rejects_of(corpus.dir) == {"S0000/TNMG4_N1": "unknown patient", "S0000/ECG5": "file name"}
    for name, i in rows_of(corpus).items():
        name = name.split("/")[1]
        assert patient_of(corpus, i) == f"code/{exams[name]}"
        assert_stored(corpus.read(i), read_raw(sources[name])[0])
        assert [LEADS[k] for k in corpus.index["leads"][i][:3]] == ["I", "II", "III"]
    assert len(corpus.index) == 4


def write_code15(path, exams, tracings):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["exam_id"] = np.array(exams)
        file.create_dataset("tracings", data=np.asarray(tracings, np.float32), chunks=(1, 4096, 12), compression="gzip")


def test_real_code15_is_read_by_exam_id_and_trimmed(shared_data, tmp_path):
    h5py = pytest.importorskip("h5py")
    corpus = run("code15", shared_data / "code15", tmp_path / "out")
    table = pd.read_csv(shared_data / "code15" / "exams.csv").set_index("exam_id")
    assert len(corpus.index) == 10 and not corpus.manifest["rejected"] and set(corpus.index["fs_hz"]) == {400}
    assert corpus.manifest["notes"]["units"].startswith("read as mV: the median R wave of lead II is then 1.76 mV")
    with h5py.File(shared_data / "code15" / "exams_part0.hdf5") as file:
        tracings = dict(zip(file["exam_id"][:].tolist(), file["tracings"][:]))
    trimmed = 0
    for name, i in rows_of(corpus).items():
        tracing = tracings[int(name)]
        assert patient_of(corpus, i) == f"code15/{table.patient_id[int(name)]}"
        whole, ids = preprocess(tracing, 400, TWELVE)
        used = np.flatnonzero(np.isfinite(whole).any(axis=0))
        trimmed += len(used) < whole.shape[1]
        assert corpus.index["length"][i] == used[-1] + 1 - used[0] and used[-1] + 1 - used[0] in (2560, 1833, 1834)
        assert_stored(corpus.read(i), whole[:, used[0]:used[-1] + 1])
        assert corpus.index["leads"][i][:12].tolist() == ids.tolist()
    assert trimmed == corpus.manifest["changed"]["recordings trimmed"] == 6


def test_faults_of_code15_are_counted(shared_data, tmp_path):
    """Two parts from the real exams, with a padding row, an empty exam, dead leads, an exam that is not in the table,
    one that is in the wrong part, one that is missing, absurd amplitudes, and a scale of 1e-4 V."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(shared_data / "code15" / "exams_part0.hdf5") as file:
        real = file["tracings"][:] * 10
    real[1], real[2][:, 3], real[3][:, 6:] = 0, 0, 50_000
    raw = tmp_path / "raw"
    raw.mkdir()
    write_code15(raw / "exams_part0.hdf5", [101, 102, 103, 104, 105, 0], [*real[:5], np.zeros((4096, 12))])
    write_code15(raw / "exams_part1.hdf5", [201, 999, 104, 0], [*real[5:8], np.zeros((4096, 12))])
    parts = ["exams_part1.hdf5"] * 2 + ["exams_part0.hdf5"] * 5 + ["exams_part17.hdf5"]
    table = pd.DataFrame({"exam_id": [202, 201, 105, 104, 103, 102, 101, 301], "patient_id": [1, 1, 2, 3, 4, 5, 1, 6],
                          "trace_file": parts})
    with pytest.raises(ValueError, match="no exams.csv in .*Zenodo record 4916206"):
        run("code15", raw, tmp_path / "out")
    table.drop(columns="patient_id").to_csv(raw / "exams.csv", index=False)
    refusal = "exams.csv cannot be read: it has the columns exam_id, trace_file; expected .* exam_id, and patient_id"
    with pytest.raises(ValueError, match=refusal):
        run("code15", raw, tmp_path / "out")
    table.to_csv(raw / "exams.csv", index=False)
    corpus = run("code15", raw, tmp_path / "out")
    assert corpus.manifest["notes"]["units"].startswith("read as 1e-4 V")
    assert pd.read_csv(corpus.dir / "rejects.csv", dtype=str)[["record", "reason"]].to_numpy().tolist() == [
        ["102", "no valid lead"], ["0", "padding row"], ["999", "unknown or repeated exam"],
        ["104", "unknown or repeated exam"], ["0", "padding row"], ["202", "absent exam"]]
    rows = rows_of(corpus)
    assert set(rows) == {"101", "103", "104", "105", "201"}
    assert corpus.index["patient"][rows["101"]] == corpus.index["patient"][rows["201"]]     # in different parts
    assert corpus.index["n_leads"][[rows["103"], rows["104"]]].tolist() == [11, 6]
    assert np.abs(np.where(corpus.read(rows["101"]) == MISSING, 0, corpus.read(rows["101"]))).max() < 6000
    shutil.copy(raw / "exams_part1.hdf5", raw / "exams_part2.hdf5")
    os.truncate(raw / "exams_part2.hdf5", 30_000)
    with pytest.raises(ValueError, match="exams_part2.hdf5 is no whole part of CODE-15% .*: download it again"):
        run("code15", raw, tmp_path / "again")


def test_icentia11k(shared_data, tmp_path):
    """Two patients, three segments, as long as the real ones in one case, from MIT-BIH at 250 Hz."""
    raw, expected = tmp_path / "raw", {}
    record = wfdb.rdrecord(str(shared_data / "mitdb" / "100"))
    lead = scipy.signal.resample_poly(record.p_signal[:, 0], 25, 36)
    adc = np.rint(np.tile(lead, 3)[:2 ** 20 + 1] * 74.36 + 20 * np.sin(np.arange(2 ** 20 + 1) / 1e4)).astype(int)
    for name, n, start in (("p00000_s00", 2 ** 20 + 1, 0), ("p00000_s01", 100_000, 30_000), ("p00017_s00", 50_000, 0)):
        folder = raw / "p00" / name[:6]
        folder.mkdir(parents=True, exist_ok=True)
        values = adc[:n].copy()
        values[:start] = 0                                         # an electrode that was not on yet
        wfdb.wrsamp(name, 250, ["mV"], ["ecg"], d_signal=values[:, None], fmt=["16"], adc_gain=[74.36], baseline=[0],
                    write_dir=str(folder))
        (folder / f"{name}.atr").write_bytes(b"beats")                 # are not read
        expected[f"p00/{name[:6]}/{name}"] = values, start
    corpus = run("icentia11k", raw, tmp_path / "out")
    rows = rows_of(corpus)
    assert set(rows) == set(expected) and not corpus.manifest["rejected"]
    assert corpus.patients.tolist() == [b"icentia11k/p00000", b"icentia11k/p00017"]
    for name, (values, start) in expected.items():
        i = rows[name]
        assert corpus.index["leads"][i][0] == 0 and corpus.index["n_leads"][i] == 1
        np.testing.assert_allclose(corpus.read(i)[0], values[start:] / 74.36 * 1000, atol=0.5001)


def test_faults_of_heedb_are_counted(tmp_path):
    """Both rates, another order of leads, gaps, dead leads and rails, a listed duplicate, damaged and absent files."""
    raw, folder = tmp_path / "raw", "ECG/WFDB/S0001/1999/"
    swapped = (*TWELVE[:4], "aVF", "aVL", *TWELVE[6:])             # as MIMIC-IV-ECG has it
    names = ("fine_250", "swapped", "gaps", "dead_lead", "rails", "all_flat", "all_invalid", "cut", "lost", "twice",
             "no_rate", "one_channel_less", "stranger")
    for seed, name in enumerate(names):
        adc = noise(seed, 5000, 12)
        if name == "gaps":
            adc[1000:1200, 2], adc[:, 5] = -32768, -32768
        elif name == "dead_lead":
            adc[:, 7] = 1024
        elif name == "rails":
            adc[2000:2600, 3] = 32767                              # 159 mV: an amplifier at its rail
        elif name in ("all_flat", "all_invalid"):
            adc[:] = 1024 if name == "all_flat" else -32768
        leads = swapped if name == "swapped" else TWELVE
        write(raw, folder + name, adc, leads, fs=250 if name == "fine_250" else 500)
    os.truncate(raw / f"{folder}cut.dat", 60_000)
    (raw / f"{folder}lost.dat").unlink()
    edit_header(raw, f"{folder}no_rate", " 12 500 ", " 12 0 ")
    header = (raw / f"{folder}one_channel_less.hea").read_text()
    (raw / f"{folder}one_channel_less.hea").write_text(header[:header.rindex("one_channel_less.dat")])
    pd.DataFrame({"FileName": names[:-1], "BDSPPatientID": 7}).to_csv(raw / "demographics_ECG.csv", index=False)
    pd.DataFrame({"file_name": ["twice.hea"]}).to_csv(raw / "duplicated.csv", index=False)
    corpus = run("heedb", raw, tmp_path / "out")
    assert rejects_of(corpus.dir) == {folder + name: reason for name, reason in (
        ("all_flat", "no valid lead"), ("all_invalid", "no valid lead"), ("cut", "unreadable or truncated file"),
        ("lost", "absent file"), ("twice", "duplicate"), ("no_rate", "sampling rate"),
        ("one_channel_less", "unreadable or truncated file"))}
    rows = {name.removeprefix(folder): i for name, i in rows_of(corpus).items()}
    leads = {name: [LEADS[k] for k in corpus.lead_ids(i)] for name, i in rows.items()}
    assert leads["swapped"] == list(swapped) and leads["dead_lead"] == [*TWELVE[:7], *TWELVE[8:]]
    assert leads["gaps"] == [*TWELVE[:5], *TWELVE[6:]] and (corpus.read(rows["gaps"])[2] == MISSING).sum() == 101
    assert (corpus.read(rows["rails"])[3] == MISSING).sum() >= 300 and corpus.index["length"][rows["fine_250"]] == 5000
    assert patient_of(corpus, rows["stranger"]) == "heedb/stranger" and len(corpus.patients) == 2
    assert corpus.manifest["notes"] == {
        "patients": "demographics_ECG.csv (12 names) names 12 of 13 recordings",
        "duplicates": "duplicated.csv (1 names) names 1 of 13 recordings"}
    pd.DataFrame({"FileName": ["ECG_1.mat"], "BDSPPatientID": 7}).to_csv(raw / "demographics_ECG.csv", index=False)
    refusal = "demographics_ECG.csv names none of the 13 recordings: it says 'ECG_1', and there is '.*'; expected"
    with pytest.raises(ValueError, match=refusal):
        run("heedb", raw, tmp_path / "again")


def test_faults_of_icentia11k_are_counted(tmp_path):
    raw, folder = tmp_path / "raw", "p01/p01000/"
    names = ("p01000_s00", "p01000_s01", "p01000_s02", "p01000_batched", "p01000_s05")
    for seed, name in enumerate(names):
        adc = noise(seed, 3000, 1) // 4
        if name == "p01000_s02":
            adc[:] = 0                                             # the patch was not worn
        write(raw, folder + name, adc, ("ecg",), gain=74.36, baseline=0)
    (raw / f"{folder}p01000_s01.dat").unlink()
    os.truncate(raw / f"{folder}p01000_s05.dat", 4001)
    corpus = run("icentia11k", raw, tmp_path / "out")
    assert rejects_of(corpus.dir) == {f"{folder}p01000_s01": "absent file", f"{folder}p01000_s02": "no valid lead",
                                      f"{folder}p01000_batched": "file name",
                                      f"{folder}p01000_s05": "unreadable or truncated file"}
    assert names_of(corpus) == [f"{folder}p01000_s00"]


def test_patients_of_a_folder_come_from_a_table(tmp_path):
    raw = tmp_path / "raw"
    for i, name in enumerate(("a/1", "a/2", "b/HR00001", "c")):
        write(raw, name, noise(i))
    table = tmp_path / "patients.csv"
    known = pd.DataFrame({"study": 1, "path": ["a/1.hea", "a/2", "HR00001"], "subject_id": [5, 6, 6]})
    known.to_csv(table, index=False)
    corpus = run("wfdb", raw, tmp_path / "out", "--patients", str(table))
    who = {name: patient_of(corpus, i) for name, i in rows_of(corpus).items()}
    assert who == {"a/1": "wfdb-patient/5", "a/2": "wfdb-patient/6", "b/HR00001": "wfdb-patient/6", "c": "wfdb/c"}
    assert sorted(names_of(corpus, "test")) == ["a/2", "b/HR00001"]    # with the copy, all of its patient is held out
    assert corpus.manifest["notes"] == {"patients": "patients.csv (3 names) names 3 of 4 recordings"}
    assert "--patients" in corpus.manifest["command"]
    pd.DataFrame({"record": ["x/9", ""], "patient": [1, 2]}).to_csv(table)
    refusal = "patients.csv names none of the 4 recordings: it says 'x/9', and there is 'b/HR00001'; expected the same"
    with pytest.raises(ValueError, match=refusal):
        run("wfdb", raw, tmp_path / "no", "--patients", str(table))
    table.write_text("record,patient\n")
    with pytest.raises(ValueError, match="patients.csv names none of the 4 recordings: it says '', and there is"):
        run("wfdb", raw, tmp_path / "no", "--patients", str(table))
    assert not (tmp_path / "no").exists()
    pd.DataFrame({"name": ["a/1"]}).to_csv(table)
    with pytest.raises(ValueError, match="it has the columns .*name; expected .* record or path .*, and patient or"):
        run("wfdb", raw, tmp_path / "no", "--patients", str(table))
    with pytest.raises(ValueError, match="absent.csv cannot be read: .* No such file"):
        run("wfdb", raw, tmp_path / "no", "--patients", str(tmp_path / "absent.csv"))
    records, patients = (names.split() for names in prepare.PATIENT_COLUMNS)
    for record, patient in zip(records, patients, strict=True):
        pd.DataFrame({patient: ["p"], record: ["a/1"]}).to_csv(table)
        assert prepare.Lookup(table, *prepare.PATIENT_COLUMNS, paths=True) == {"a/1": "p"}
    for part in ("a", "b"):                                        # a publisher's table may be in several folders
        (raw / part / "t.csv").write_text(f"who,name\n{part}1,x/{part}.mat\n{part}2,{part}\n")
    assert prepare.Lookup(raw / "t.csv", "name", "who") == {"a": "a1", "b": "b1"}


def test_limit_and_dry_run(tmp_path, capsys):
    for i in range(5):
        write(tmp_path / "raw", f"r{i}", noise(i))
    assert run_dry(tmp_path) == [] and "5 recordings to read; about 5e-05 GB on disk" in capsys.readouterr().out
    assert names_of(run("wfdb", tmp_path / "raw", tmp_path / "out", "--limit", "3")) == ["r0", "r1", "r2"]


def mounted(folder, *options):
    """Mount an empty tmpfs, or skip the test."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")


@pytest.mark.parametrize("kind", ["mount", "link", "link to nothing", "empty folder"])
def test_out_may_be_a_mount_point_or_a_link(small_raw, small_corpus, tmp_path, monkeypatch, kind):
    """The unfinished corpus lies on the same disk, an interrupted run continues, nothing is left behind."""
    out, disk = tmp_path / "out", tmp_path / "big"
    if kind == "mount":
        mounted(out)
        (out / "lost+found").mkdir()
    elif kind == "empty folder":
        out.mkdir()
    else:
        disk.mkdir()
        os.symlink(disk / "mine", out)
        if kind == "link":
            (disk / "mine").mkdir()
    args = prepare.parse_args(["wfdb", "--raw", str(small_raw), "--out", str(out), "--workers", "1"])
    rename, moved = Path.rename, []

    def interrupted(path, target):
        if moved:
            raise KeyboardInterrupt("interrupted")
        moved.append(path.name)
        rename(path, target)
    try:
        for name, function in (("assemble", lambda *a: interrupted(*a[:2])), ("rename", interrupted)):
            moved[:] = [0] if name == "assemble" else []
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(*((Path, name) if name == "rename" else (prepare, name)), function)
                prepare.main(args)
            with pytest.raises(ValueError, match="out holds no corpus .*out/.part holds an unfinished one|"
                                                 "mine/.part holds an unfinished one"):
                open_corpus(out)
        assert moved == ["fingerprints.npy"] and "3 finished shards are kept" in prepare.end_of_run(args, ValueError())
        with monkeypatched(prepare, "prepare_shard") as prepared:
            prepare.main(args)
        made, expected = files_of(out), files_of(small_corpus)
        assert not prepared and {name for name in expected if made[name] != expected[name]} == {"manifest.json"}
        assert made.keys() == expected.keys() and not part_of(out).exists()
        assert sorted(os.listdir(tmp_path)) == (["big", "out"] if "link" in kind else ["out"])
        assert not disk.exists() or os.listdir(disk) == ["mine"]
        before = files_of(out)
        for again in (lambda: prepare.main(args),                      # or, after a long download, made by another one
                      lambda: prepare.write_corpus("wfdb", small_raw, out, args, "another command")):
            with pytest.raises(ValueError, match="out already exists: delete it"):
                again()
        assert files_of(out) == before
    finally:
        if kind == "mount":
            subprocess.run(["umount", "-l", str(out)], check=True)


def test_synth_too_goes_to_a_mount_point(tmp_path):
    mounted(tmp_path / "out")
    (tmp_path / "raw").mkdir()
    try:
        prepare.main(prepare.parse_args(["synth", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"),
                                         "--records", "3", "--workers", "1"]))
        for name in ("out", "raw"):
            assert sorted(os.listdir(tmp_path / name)) == ["mitdb", "nstdb", "ptbxl"]
        assert len(open_corpus(tmp_path / "out" / "ptbxl").index) == 3
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "out")], check=True)


def test_a_run_that_fails_leaves_a_folder_of_the_user_alone(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "mine").mkdir()
    for name, stays in (("mine", True), ("new", False)):
        with pytest.raises(ValueError, match="no wfdb recordings"):
            run("wfdb", tmp_path / "raw", tmp_path / name)
        assert (tmp_path / name).exists() == stays and not part_of(tmp_path / name).exists()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity of processes")
def test_cores_are_those_of_the_job(tmp_path, capsys):
    """As taskset, Slurm and containers give them."""
    write(tmp_path / "raw", "r", noise(0))
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        run_dry(tmp_path)
    finally:
        os.sched_setaffinity(0, cores)
    assert " min on 1 cores" in capsys.readouterr().out


def run_dry(folder):
    prepare.main(prepare.parse_args(["wfdb", "--raw", str(folder / "raw"), "--out", str(folder / "out"), "--dry-run"]))
    return [path.name for path in folder.iterdir() if path.name != "raw"]


def test_a_disk_that_is_too_small_is_told_beforehand(tmp_path, monkeypatch):
    write(tmp_path / "raw", "r", noise(0))
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 6, 10 ** 6, 9_000))
    refusal = "1 recordings need about 0.0 GB, but the disk of .* has 0.0 GB free: name another"
    with pytest.raises(ValueError, match=refusal):
        run("wfdb", tmp_path / "raw", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


# ---------------------------------------------------------------------------------------------------------------------
# what happens to long runs

KILLS = int(os.environ.get("ECG_KILLS", 3))                        # the log's figures are from 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="kills processes as POSIX does")
def test_sigkill_at_random_instants_changes_no_byte(tmp_path):
    """2,000 recordings; each time killed once, somewhere, and run again to the end."""
    raw, out, rng = tmp_path / "raw", tmp_path / "out", np.random.default_rng(KILLS)
    raw.mkdir()
    signals = rng.integers(-2000, 2000, (2000, 600, 2))
    signals[::50, 100:] = 7                                        # every 50th is too short
    for i, adc in enumerate(signals):
        write_record(raw / f"r{i:04d}", 200, ("II", "V1"), adc, gain=1000)
    command = [sys.executable, str(ROOT / "prepare.py"), "wfdb", "--raw", str(raw), "--out", str(out), "--workers", "2"]
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=1200)
    whole, took_s, standing = files_of(out), time.monotonic() - start, []
    assert len(whole) > 60 and len(rejects_of(out)) == 40
    for _ in range(KILLS):
        shutil.rmtree(out)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.2, 1) * took_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(600)
        standing.append(len(list(part_of(out).glob("done/*.npz"))))
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0 or out.exists() and "already exists" in done.stderr     # it had come to its end
        assert files_of(out) == whole and not part_of(out).exists()
    print(f"killed with so many shards of 63 done: {standing}")


def after_the_plan(monkeypatch, function):
    make_plan = prepare.make_plan

    def plan(*args):
        made = make_plan(*args)
        function()
        return made
    monkeypatch.setattr(prepare, "make_plan", plan)


def test_a_full_disk_ends_the_run_and_keeps_what_is_finished(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    mounted(disk, "-o", "size=400k")
    try:
        for i in range(20):
            write(tmp_path / "raw", f"r{i:02d}", noise(i))
        whole = {name: data for name, data in files_of(run("wfdb", tmp_path / "raw", tmp_path / "whole").dir).items()}
        after_the_plan(monkeypatch, lambda: (disk / "other").write_bytes(bytes(250_000)))
        with pytest.raises(OSError, match="No space left on device") as error:
            run("wfdb", tmp_path / "raw", disk / "out")
        args = prepare.parse_args(["wfdb", "--raw", str(tmp_path / "raw"), "--out", str(disk / "out")])
        kept, part = len(list((disk / "out" / ".part" / "done").glob("*.npz"))), disk / "out" / ".part"
        assert 0 < kept < 20 and f"No space left on device; {kept} finished shards are kept in {part}" in \
            prepare.end_of_run(args, error.value)
        (disk / "other").unlink()
        monkeypatch.undo()
        made = files_of(run("wfdb", tmp_path / "raw", disk / "out").dir)
        assert {name for name in whole if whole[name] != made[name]} == {"manifest.json"}
        assert made.keys() == whole.keys()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)       # lazily: corpora are still mapped


def test_files_that_vanish_or_shrink_meanwhile_are_counted(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    for i in range(8):
        write(raw, f"r{i}", noise(i))
    after_the_plan(monkeypatch, lambda: ((raw / "r1.dat").unlink(), (raw / "r3.hea").unlink(),
                                         os.truncate(raw / "r5.dat", 4321)))
    corpus = run("wfdb", raw, tmp_path / "out")
    assert rejects_of(corpus.dir) == {"r1": "absent file", "r3": "absent file", "r5": "unreadable or truncated file"}
    assert names_of(corpus) == ["r0", "r2", "r4", "r6", "r7"]


def test_what_may_not_be_read(tmp_path):
    raw = tmp_path / "raw"
    for i, name in enumerate(("a/1", "b/2", "b/3")):
        write(raw, name, noise(i))
    (raw / "b" / "2.dat").chmod(0)
    if os.access(raw / "b" / "2.dat", os.R_OK):
        pytest.skip("nothing is closed to root")
    corpus = run("wfdb", raw, tmp_path / "out")
    assert rejects_of(corpus.dir) == {"b/2": "unreadable or truncated file"}
    (raw / "a").chmod(0)
    try:
        with pytest.raises(PermissionError, match="raw/a"):       # a folder that is closed is no empty one
            run("wfdb", raw, tmp_path / "again")
        assert not (tmp_path / "again").exists()
    finally:
        (raw / "a").chmod(0o755)


def test_two_runs_do_not_write_into_one_folder(small_raw, tmp_path):
    part = part_of(tmp_path / "out")
    part.mkdir(parents=True)
    with lock_folder(part), pytest.raises(ValueError, match="another process writes into .*out/.part"):
        run("wfdb", small_raw, tmp_path / "out")
    assert part.is_dir()                                           # it is the other's


@pytest.mark.parametrize("code", ["no fcntl", "ENOSYS", "ENOLCK", "EOPNOTSUPP", "EWOULDBLOCK"])
def test_only_a_lock_that_is_held_is_another_process(small_raw, tmp_path, monkeypatch, capsys, code):
    """Windows has no fcntl; Lustre without -o flock, some NFS and FUSE have no flock."""
    def flock(*args):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    if code == "no fcntl":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", flock)
    if code == "EWOULDBLOCK":
        with pytest.raises(ValueError, match="another process writes into"):
            run("wfdb", small_raw, tmp_path / "out")
    else:
        assert len(run("wfdb", small_raw, tmp_path / "out").index) == 3
        assert "out/.part cannot be locked (" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# mutated inputs

MUTANTS = int(os.environ.get("ECG_MUTANTS", 400))                  # the log's figures are from 2,000
FEW_MUTANTS = 80                                                   # of the quick run
TOO_MUCH_KB = 100_000                                              # no recording here has more than 3 MB


def mutate(data, rng):
    """Flip bits, cut, double, zero, or put another number or field where one was."""
    kind, data = rng.integers(6), bytearray(data)
    place = int(rng.integers(len(data)))
    if kind == 0:
        for at in rng.integers(0, len(data), rng.integers(1, 9)):
            data[at] ^= 1 << rng.integers(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        del data[place:place + int(rng.integers(1, 99))]
    elif kind == 3:
        data[place:place] = data[max(0, place - int(rng.integers(1, 99))):place]
    elif kind == 4:
        values = [bytes(8), b"\xff" * 8, b"NaN", b"-1", b"99999999999", b"1e308", b"\n", b"/"]
        data[place:place + 8] = rng.choice(values)
    else:                                                          # fields of text: two that swap, or one replaced
        fields = bytes(data).split(b" ")
        i, j = rng.integers(0, len(fields), 2)
        fields[i], fields[j] = fields[j], rng.choice([fields[i], b"0", b"-5", b"1000000000000", b"inf", b"x"])
        data = bytearray(b" ".join(fields))
    return bytes(data)


def mutant_trees(raw, shared_data):
    """{source: folder} with a few short recordings each."""
    signal = sorted((shared_data / "ptbxl" / "records500" / "00000").glob("*.hea"))[0].with_suffix("")
    adc = wfdb.rdrecord(str(signal), physical=False, sampto=1500).d_signal[:, :3].astype(int)
    for source, names in (("wfdb", ("a", "b")), ("heedb", ("ECG/WFDB/S0001/1990/x",)), ("code", ("TNMG1_N1",)),
                          ("icentia11k", ("p00/p00000/p00000_s00",))):
        for name in names:
            write(raw / source, name, adc, TWELVE[:3], fs=500, gain=1000, baseline=0)
    wfdb.wrsamp("c", 500, ["mV"] * 3, ["I", "II", "III"], d_signal=np.clip(adc, -2000, 2000), fmt=["212"] * 3,
                adc_gain=[1000.0] * 3, baseline=[0] * 3, write_dir=str(raw / "wfdb"))
    wfdb.wrsamp("d", 500, ["mV"] * 3, ["I", "II", "III"], d_signal=adc, fmt=["24"] * 3, adc_gain=[1000.0] * 3,
                baseline=[0] * 3, write_dir=str(raw / "wfdb"))
    (raw / "wfdb" / "e.mat").write_bytes(bytes(24) + (raw / "wfdb" / "a.dat").read_bytes())
    (raw / "wfdb" / "e.hea").write_text((raw / "wfdb" / "a.hea").read_text().replace("a.dat 16", "e.mat 16+24"))
    (raw / "wfdb" / "f.hea").write_text("f/2 3 500 3000\na 1500\nb 1500\n")
    # Two samples in a frame, units and gains that differ, a channel that is no ECG; and segments of such records.
    for name, gains in (("g", ("1000/mV", "1(0)/uV", "100/pm")), ("h", ("2000(9)/mV", "1000000/V", "50/mmHg"))):
        frames = np.concatenate([adc[:, 0].reshape(-1, 2), adc[:, 1].reshape(-1, 2), adc[::2, 2:]], axis=1)
        (raw / "wfdb" / f"{name}.dat").write_bytes(frames.astype("<i2" if name == "g" else ">i2").tobytes())
        (raw / "wfdb" / f"{name}.hea").write_text(f"{name} 3 250 750\n" + "".join(
            f"{name}.dat {'16' if name == 'g' else '61'}{spf} {gain} 16 0 0 0 0 {lead}\n"
            for spf, gain, lead in zip(("x2", "x2", ""), gains, ("Lead II", "ECG V1", "RESP"))))
    (raw / "wfdb" / "lay.hea").write_text("lay 3 250 0\n" + "".join(
        f"~ 0{spf} 0 0 0 0 0 0 {lead}\n" for spf, lead in (("x2", "ECG V1"), ("", "RESP"), ("x2", "Lead II"))))
    (raw / "wfdb" / "i.hea").write_text("i/5 3 250 2050\nlay 0\ng 750\n~ 100\nh 750\ngone 450\n")
    wfdb.wrann("p00000_s00", "atr", np.arange(50, 1400, 100), ["N"] * 14, fs=500,
               write_dir=str(raw / "icentia11k" / "p00" / "p00000"))
    (raw / "code" / "annotations.csv").write_text("id_exam,id_patient\n1,5\n2,5\n")
    (raw / "heedb" / "demographics_ECG.csv").write_text("FileName,BDSPPatientID\nx.mat,5\ny.mat,6\n")
    (raw / "heedb" / "duplicated.csv").write_text("file_name\nz\n")
    (raw / "code15").mkdir()
    with pytest.importorskip("h5py").File(shared_data / "code15" / "exams_part0.hdf5") as file:
        write_code15(raw / "code15" / "exams_part0.hdf5", [1, 2, 0], [*file["tracings"][:2], np.zeros((4096, 12))])
    (raw / "code15" / "exams.csv").write_text("exam_id,patient_id,trace_file\n"
                                              "1,5,exams_part0.hdf5\n2,6,exams_part0.hdf5\n")


def by_wfdb(path):
    """An independent reading: (mV, its places) of each channel of a record that wfdb can read, None if it cannot. Of a
    record with segments wfdb reads the segments one by one, channels are joined by name and number."""
    try:
        lines = [line.split() for line in path.with_suffix(".hea").read_text("ascii").splitlines()
                 if line.strip() and not line.startswith("#")]
        n_segments = int((lines[0][0] + "/0").split("/")[1])
        parts, at = [("x", path, 0)] if not n_segments else [], 0
        for name, length in lines[1:] if n_segments else ():
            parts += [(name, path.with_name(name), at)] * (name not in ("~", "gone"))
            at += int(length)
        channels, rates = {}, set()
        for name, part, at in parts:
            part.with_suffix(".hea").read_text("ascii")            # wfdb drops other characters, also from names
            if name == "lay":
                continue
            record, seen = wfdb.rdrecord(str(part), smooth_frames=False), Counter()
            for x, unit, lead, n in zip(record.e_p_signal, record.units, record.sig_name, record.samps_per_frame):
                scale = {"mv": 1, "uv": 1e-3, "v": 1e3}.get(unit.lower())
                if scale and not is_no_ecg(lead or ""):
                    channels.setdefault((lead, seen[lead]), []).append((n * at, x * scale if scale != 1 else x))
                    rates.add(n)
                seen[lead] += 1
        return list(channels.values()) if len(rates) == 1 else None
    except Exception:                                              # wfdb may raise anything
        return None


def disagrees(raw, changed):
    """Whether read_wfdb and wfdb read the record that was changed, or those made of it, differently; None: one of them
    refuses it."""
    answers = []
    for path in (raw / name for name in {changed.stem, *{"a": "f", "b": "f", "g": "i", "h": "i", "lay": "i"}.get(
            changed.stem, "")} if (raw / name).with_suffix(".hea").exists()):
        try:
            own, theirs = read_wfdb(str(path)), by_wfdb(path)
        except Refused:
            theirs = None
        if theirs is None or own.notes["segments left out: unreadable or truncated file"] or any(
                what.startswith("channels left out") and "RESP" not in what for what in own.notes):
            continue
        rows = own.signal.T.copy()
        for row in rows:                                           # each of our channels is one of wfdb's
            found = [parts for parts in theirs if all(
                np.array_equal(row[at:at + len(x)], x[:max(0, len(row) - at)], equal_nan=True) for at, x in parts)]
            answers.append(not found)
        answers.append(len(rows) != len(theirs))
    return any(answers) if answers else None


@contextlib.contextmanager
def within(seconds):
    """A hang becomes a failure."""
    def give_up(number, frame):
        raise BaseException(f"hangs for {seconds} s")
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(source, raw):
    """What preparing `raw` comes to: the reasons of its recordings, or the one error."""
    found = []
    args = prepare.parse_args([source, "--raw", str(raw), "--out", str(raw / "out")])
    prepare.open_h5.cache_clear()
    try:
        for job in prepare.LISTERS[source](raw, args, {}):
            try:
                rows = list(prepare.prepare_recording(job, Counter()))
            except Refused as error:
                assert len(str(error)) > 5
                found.append(error.reason)
                continue
            for steps, _, fs_hz in rows:
                assert steps.dtype == np.int16 and 500 <= steps.shape[1] and 50 <= fs_hz <= 100_000
                assert (steps != MISSING).any(axis=1).all()
            found.append("read")
    except ValueError as error:
        assert str(raw) in str(error) and len(str(error)) < 1000
        found.append("one error")
    return found


@pytest.mark.parametrize("mutants", [FEW_MUTANTS, pytest.param(MUTANTS, marks=pytest.mark.slow)])
def test_mutated_inputs_are_read_or_rejected_with_a_reason(mutants, shared_data, tmp_path):
    """No crash, no hang, no traceback, nothing absurd in the corpus, no memory by what a header merely claims, and what
    is read is what wfdb reads, segment by segment and without smoothing."""
    rng, counts, raw = np.random.default_rng(2), Counter(), tmp_path / "raw"
    mutant_trees(raw, shared_data)
    files = [(source, path) for source in ("wfdb", "heedb", "code", "icentia11k", "code15")
             for path in sorted((raw / source).rglob("*")) if path.is_file()]
    for source in ("wfdb", "heedb", "code", "icentia11k", "code15"):
        assert set(outcome(source, raw / source)) <= {"read", "padding row"}
    for i in range(mutants):
        source, path = files[i % len(files)]
        data = path.read_bytes()
        path.write_bytes(mutate(data, rng))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with within(300):
            counts.update(outcome(source, raw / source))
            if source == "wfdb" and path.suffix in (".hea", ".dat", ".mat"):
                answer = disagrees(raw / source, path)
                counts[{None: "not compared", True: "DISAGREES", False: "agrees"}[answer]] += 1
                if answer:
                    print(i, path.name, path.read_bytes()[:400] if path.suffix == ".hea" else "")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < TOO_MUCH_KB, (i, path.name)
        path.write_bytes(data)
    print(dict(counts))
    assert not counts["DISAGREES"] and counts["agrees"] > mutants / 12
    assert counts["read"] > mutants / 2 and counts["unreadable or truncated file"] > mutants / 40


# ---------------------------------------------------------------------------------------------------------------------
# check

def test_check_of_whole_and_damaged_corpora(small_corpus, tmp_path, capsys):
    copy, twin = (Path(shutil.copytree(small_corpus, tmp_path / name)) for name in ("copy", "twin"))
    assert prepare.check([copy]) == 0 and (copy / "check.png").stat().st_size > 20_000
    assert "1 corpora, 0 faults" in capsys.readouterr().out
    assert prepare.check([copy, twin]) == 0
    words = (f"{twin}: 3 recordings of split train are second copies, of these corpora or of public test sets: "
             "r0, r1, r2;")
    assert words in capsys.readouterr().out
    write(tmp_path / "raw", "Müller/1", noise(0))
    assert prepare.check([copy, run("wfdb", tmp_path / "raw", tmp_path / "named").dir]) == 0
    assert "of public test sets: Müller/1;" in capsys.readouterr().out
    open_corpus(copy)                                              # the picture is no part of the corpus
    data = bytearray((copy / "signal" / "00001.i16").read_bytes())
    data[77] ^= 4
    (copy / "signal" / "00001.i16").write_bytes(data)
    assert prepare.check([copy]) == 1 and "DAMAGED: signal/00001.i16: sha256" in capsys.readouterr().out
    index = np.load(twin / "index.npy")
    index["offset"][1], index["leads"][2, 0], index["patient"][:], index["split"][2] = 1, 99, 0, 2
    np.save(twin / "index.npy", index)
    assert prepare.check([twin]) == 4
    said = capsys.readouterr().out
    for words in ("DAMAGED: index.npy: sha256", "1 recordings, the first r1: it reaches beyond its shard",
                  "the first r2: it has a lead that is not known", "1 patients are in more than one split"):
        assert words in said
    done = subprocess.run([sys.executable, str(ROOT / "prepare.py"), "check", str(tmp_path)], capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 1 and done.stderr.startswith(f"prepare.py: {tmp_path} holds no corpus")


@pytest.mark.parametrize("bpm", [45, 70, 120, 180])
def test_heart_rate_of_the_overview(bpm):
    assert abs(prepare.heart_rate_bpm(draw_ecg(FS, 20, rr_s=60 / bpm)[0]) - bpm) < 1
    assert np.isnan(prepare.heart_rate_bpm(np.zeros(1000)))
