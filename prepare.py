"""Turn a publisher's folder of raw recordings into a corpus on disk, once. Training only reads the corpus.

Every recording goes through ecg.preprocess, which the probes and encoder.embed call too. An estimate of disk and time
is printed first: a sample takes 2 bytes, 10 s of 12 leads take 60 kB. Files are in OUT/.part until all are done. After
an interruption run the same command again: it continues there and ends with the same bytes.

the result, in OUT (for synth in OUT/ptbxl, OUT/mitdb and OUT/nstdb); corpus.py says what a row holds
  signal/        int16 at 250 Hz, 1 uV per step, -32768 = missing; for every recording one (leads, samples) block
  *.npy          a row per recording (index, records), names of patients, fingerprints to find copies
  manifest.json  counts, hours, what was rejected or changed, leak rules, checksums, the command
  rejects.csv    every recording that could not be used, and why

examples
  python prepare.py synth --raw data/raw/synth --out data/synth
  python prepare.py ptbxl --raw data/raw/ptbxl --out data/ptbxl --download
  python prepare.py heedb --raw /data/heedb    --out data/heedb --dry-run
  python prepare.py wfdb  --raw my_ecgs        --out data/mine --workers 8 --patients my_patients.csv
  python prepare.py arrays --raw my_csvs       --out data/csvs --table my_csvs.csv
  python prepare.py check data/ptbxl data/mine       verify them, list copies and leaks, draw DIR/check.png for each
"""
# Shapes: L leads, T samples (at FS unless said otherwise), N recordings.
import argparse
import ast
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal as os_signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy
import wfdb
from joblib import cpu_count                                       # of this job: affinity and containers count
from tqdm import tqdm

from corpus import (FINGERPRINT_DTYPE, FORMAT_VERSION, MAGIC, NO_FINGERPRINTS, SPLITS, SUPERCLASSES, TABLES,
                    fingerprint, index_faults, lock_folder, open_corpus, part_of, rows_to_leave_out, write_held_out)
from ecg import (ARRAY_READERS, FS, LEADS, MAX_LEADS, MAX_MV, MISSING, NOT_READ, PAD_S, UV_PER_MV, Recording, Refused,
                 as_refused, atomic_write, find_files, lead_id, list_recordings, preprocess, read_any, save_figure,
                 sha256)
from synth import atomic_folder, synthesize

MIN_VALID_S = 2.0                # s of signal that a lead needs to be kept
SHARD_BYTES = 256 * 2**20        # of signal, about; 12 million recordings of 10 s and 12 leads are 2,700 files
SHARDS_AT_LEAST = 64             # if there are as many recordings, so that a small corpus too gives work to all cores
ESTIMATE_RECORDINGS = 5          # recordings that are read first, to estimate disk and time
NAMES_LISTED = 20                # of unknown leads or channels left out, in the manifest: the most frequent
ROW_DTYPE = np.dtype([(name, TABLES[name]) for name in ("index", "records", "patients")])  # of the files in done/
# MIT-BIH inter-patient split: de Chazal et al., IEEE TBME 51(7), 2004. The rest of the 48 are the four paced records.
MITDB_DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
MITDB_DS2 = "100 103 105 111 113 117 121 123 200 202 210 212 213 214 219 221 222 228 231 232 233 234".split()
MITDB_HELD_OUT = {*MITDB_DS2, "201"}  # 201 is the same person as 202, which is in DS2
# A folder of loose WFDB records may hold copies of the test sets under the names that public tools give them: Challenge
# 2021's HRn is PTB-XL's ecg_id n; 00018_hr_I is a lead, 100_3 a part; PhysioBank ATM writes 100m.
HELD_OUT_COPY = re.compile(
    r"(?i)(.*[/\\])?((HR\d{5}|(ptb-?xl[_-]?)?\d{5}_[lh]r)(_\w{1,4})?|(mit-?(bih|db)?[_-]?)?"
    rf"({'|'.join(sorted(MITDB_HELD_OUT))})(m|a|skew|[_-](ecg|mlii|v\d|\d\d?))?)(\.(dat|mat|hea|edf|csv|np[yz]))*")
NOISE_S = 30 * 60                # s of an NSTDB record that are used
NOISE_PARTS = (("train", 0, 2 / 3), ("test", 2 / 3, 1))  # minutes 0-20 and 20-30; a shorter record has the same shares
OVERVIEW_RECORDINGS = 2000       # chosen at random, for the histograms of draw_overview
PTBXL_SETS = ("all", "diagnostic", "subdiagnostic", "superdiagnostic", "form", "rhythm")  # of labels
SYNTH_RECORDS = 600              # default number of synthetic 12-lead recordings
PHYSIONET = {                    # database, and the files of it that are needed
    "ptbxl": ("ptb-xl", r"recordsRATE/.*|[^/]*\.csv|LICENSE\.txt"),
    "mitdb": ("mitdb", r"\d{3}\.(hea|dat|atr)|RECORDS"),
    "nstdb": ("nstdb", r"[^/]*\.(hea|dat|atr)|RECORDS")}
CODE_LEADS, CODE_FS = LEADS[1:13], 400  # of code15: DI to V6, and Hz
CODE_SCALES = {"mV": 1.0, "1e-4 V": 0.1, "uV": 1e-3}  # units that code15 may be in, as factors to mV
ARRAY_COLUMNS = ("file", "rate", "unit", "leads", "patient", "split")
PATIENT_COLUMNS = "record path file_name FileName", "patient patient_id subject_id BDSPPatientID"  # of --patients
LEAK_NOTES = {
    **dict.fromkeys(("heedb", "code15", "code", "icentia11k"), "by a hash of the patient 1 % of the patients are val "
                    "and 1 % test: pre-train on the train split only"),
    "ptbxl": "folds 1-8 are train, fold 9 is val, fold 10 is test: pre-train on the train split only",
    "mitdb": "DS2 is test, and so is 201, the same person as 202 of DS2; the paced records are train",
    "nstdb": "of each noise record minutes 0-20 are train and minutes 20-30 test",
    **dict.fromkeys(("wfdb", "arrays"), "train, and one patient per record, unless a table says otherwise; test is "
                    "what is named like PTB-XL (HRnnnnn, nnnnn_lr, nnnnn_hr) or like MIT-BIH's DS2 and 201")}


# ---- sources: which recordings there are ----------------------------------------------------------------------------
class Job(NamedTuple):
    """One recording to prepare."""
    path: str                    # WFDB record without suffix, or another file
    record: str
    patient: str
    split: str
    label: int = 0
    n_channels: int = 0          # that the source promises; 0 = anything
    part: tuple | None = None    # start and end, as shares of the first NOISE_S
    tracing: tuple | None = None  # of an HDF5 file: row, and factor to mV
    array: tuple = ()            # of an array: rate in Hz, unit and names of leads, as the table has them
    reject: tuple | None = None  # reason and detail, if the lister knows already that it cannot be used


def read_ptbxl(raw, rate="auto"):
    """PTB-XL's recordings by ecg_id (with `codes`, their statements, and the `path` of their files), SCP statements,
    and the rate of these files in Hz: 500 if all of them are there, otherwise 100. ValueError if this is not PTB-XL."""
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        if not (raw / name).is_file():
            raise ValueError(f"no {name} in {raw}: expected PTB-XL's own folder, which "
                             f"`python prepare.py ptbxl --raw {raw} --out DIR --download` fetches")
    table = pd.read_csv(raw / "ptbxl_database.csv", index_col="ecg_id")
    complete = rate == "auto" and all((raw / f"{name}.hea").is_file() for name in table.filename_hr)
    rate, names = (500, table.filename_hr) if complete or rate == "500" else (100, table.filename_lr)
    table["path"] = [str(raw / name) for name in names]
    table["codes"] = [sorted(ast.literal_eval(codes)) for codes in table.scp_codes]
    return table, pd.read_csv(raw / "scp_statements.csv", index_col=0), rate


def label_sets(codes, statements):
    """{set of PTBXL_SETS: (names, y (R, C) bool)} of the statements in each of R recordings, as in the benchmark of
    PTB-XL (Strodthoff et al. 2021). A statement counts if it is present, whatever its likelihood."""
    every = {*statements.index}.union(*codes)
    kinds = {kind: statements[statements[kind] == 1] for kind in ("diagnostic", "form", "rhythm")}
    labels = {kind: dict(zip(rows.index, rows.index)) for kind, rows in kinds.items()} | {  # set: {statement: label}
        "all": dict(zip(every, every)),
        "subdiagnostic": kinds["diagnostic"].diagnostic_subclass.dropna().to_dict(),
        "superdiagnostic": kinds["diagnostic"].diagnostic_class.dropna().to_dict()}
    sets = {}
    for task in PTBXL_SETS:
        names = sorted(set(labels[task].values()))
        present = [{labels[task].get(code) for code in row} for row in codes]
        y = np.array([[name in row for name in names] for row in present], bool)
        sets[task] = names, y.reshape(len(codes), len(names))
    return sets


# A lister yields the jobs of a source in an order that depends only on the raw files, and writes into `notes` what a
# user should know. It holds the publisher's tables in memory, but never all recordings. --help shows its docstring.
def list_ptbxl(raw, args, notes):
    """PTB-XL 1.0.3: 21,799 12-lead ECGs of 10 s with labels; folds 1-8 train, 9 val, 10 test (--download: 3 GB)"""
    table, statements, rate = read_ptbxl(raw, args.rate)
    names, y = label_sets(table.codes, statements)["superdiagnostic"]
    notes["rate"] = f"the {rate} Hz records were read"
    for row, present in zip(table.itertuples(), y):
        label = sum(1 << SUPERCLASSES.index(name) for name, there in zip(names, present)
                    if there and name in SUPERCLASSES)
        split, patient = {9: "val", 10: "test"}.get(int(row.strat_fold), "train"), f"ptbxl/{int(row.patient_id)}"
        yield Job(row.path, f"{row.Index:05d}", patient, split, label, n_channels=12)


def list_mitdb(raw, args, notes):
    """MIT-BIH Arrhythmia Database: 48 two-lead recordings of 30 min; DS2 is test (--download: 100 MB)"""
    known = sorted([*MITDB_DS1, *MITDB_DS2, "102", "104", "107", "217"])
    for name in (raw / "RECORDS").read_text().split() if (raw / "RECORDS").is_file() else known:
        patient = f"mitdb/{'201' if name == '202' else name}"      # one person
        yield Job(str(raw / name), name, patient, "test" if name in MITDB_HELD_OUT else "train", n_channels=2)


def list_nstdb(raw, args, notes):
    """MIT-BIH Noise Stress Test Database: the noise records bw, em, ma, each in two parts (--download: 40 MB)"""
    # The gain 0 of these headers means "uncalibrated": 200 adu/mV, so the millivolts are nominal. There is no patient:
    # the two parts have no sample in common, so each counts as one.
    for name in ("bw", "em", "ma"):
        for split, start, stop in NOISE_PARTS:
            yield Job(str(raw / name), name, f"nstdb/{name}/{split}", split, n_channels=2, part=(start, stop))


def list_heedb(raw, args, notes):
    """Harvard-Emory ECG Database: 11.6 million 12-lead ECGs; --raw holds ECG/WFDB and the publisher's tables"""
    notes["patients"] = patient_of = Lookup(raw / "demographics_ECG.csv", "FileName", "BDSPPatientID")
    notes["duplicates"] = twice = Lookup(raw / "duplicated.csv", "file_name", "file_name")
    folder = raw / "ECG" / "WFDB"
    for path in find_files(folder if folder.is_dir() else raw, notes):
        reject = ("duplicate", "named in the publisher's duplicated.csv") if twice.find(path.name) else None
        patient = f"heedb/{patient_of.find(path.name) or path.name}"
        yield job_of(path, path.relative_to(raw).as_posix(), patient, reject=reject)


def list_code15(raw, args, notes):
    """CODE-15%: 345,779 exams; --raw holds exams_part*.hdf5 and exams.csv (needs pip install h5py)"""
    parts = sorted(raw.glob("exams_part*.hdf5"), key=lambda path: (len(path.name), path.name))
    if not parts or not (raw / "exams.csv").is_file():
        raise ValueError(f"no {'exams.csv' if parts else 'exams_part*.hdf5'} in {raw}: expected Zenodo record 4916206")
    table = pd.concat(read_table(raw / "exams.csv", ["exam_id", "patient_id", "trace_file"]))
    patient_of = dict(zip(table.exam_id, "code15/" + table.patient_id))
    unit, median_mv = code15_unit(parts)
    notes["units"] = (f"read as {unit}: the median R wave of lead II is then {median_mv:.2f} mV (the publisher's own "
                      "statements differ)")
    print(f"code15: {notes['units']}")
    for path in parts:
        exams = pd.Series(open_h5(str(path))["exam_id"][:]).astype(str)
        listed = table.exam_id[table.trace_file == path.name]
        known = exams.isin(listed) & ~exams.duplicated()           # without the patient it could be in the wrong split
        for row, exam in exams.items():
            reject = None if known[row] else (
                ("padding row", f"row {row} of {path.name} has exam_id 0") if exam == "0" else
                ("unknown or repeated exam", f"exams.csv has no exam {exam} in {path.name}, or it came before"))
            yield job_of(path, exam, patient_of.get(exam, ""), tracing=(row, CODE_SCALES[unit]), reject=reject)
        for exam in listed[~listed.isin(exams)].unique():
            yield job_of(path, exam, patient_of[exam], reject=("absent exam", f"{path.name} does not hold it"))


def list_code(raw, args, notes):
    """CODE, all of it, as WFDB; --raw holds records TNMG{exam}_N{k} and annotations.csv"""
    notes["patients"] = patient_of = Lookup(raw / "annotations.csv", "id_exam", "id_patient")
    if not patient_of:
        raise ValueError(f"no annotations.csv in {raw}, or no exam in it: expected CODE's own folder, with this table")
    for path in find_files(raw, notes):
        exam, reject = re.fullmatch(r"TNMG(\d+)_N\d+", path.name), None
        patient = exam and patient_of.find(exam[1])
        if not patient:                                            # without it the record could be in the wrong split
            reject = (("unknown patient", f"annotations.csv has no exam {exam[1]}") if exam else
                      ("file name", f"{path.name}.hea: expected TNMG and the exam, _N and the tracing"))
        yield job_of(path, path.relative_to(raw).as_posix(), f"code/{patient}", reject=reject)


def list_icentia11k(raw, args, notes):
    """Icentia11k: 11,000 patients, one lead, 541,794 segments of 70 minutes"""
    for path in find_files(raw, notes):
        known = re.fullmatch(r"p\d{5}_s\d\d", path.name)
        reject = None if known else ("file name", f"{path.name}.hea: expected p, patient, _s and the segment")
        yield job_of(path, path.relative_to(raw).as_posix(), f"icentia11k/{path.name[:6]}", reject=reject)


def list_wfdb(raw, args, notes):
    """any folder of WFDB records (*.hea) and EDF or EDF+ files (*.edf), in all subfolders; every channel in
              volts is a lead; a record with a name from PTB-XL or DS2 goes to the test split; --patients names the
              patient of each record"""
    if args.patients:
        notes["patients"] = patient_of = Lookup(args.patients, *PATIENT_COLUMNS, paths=True)
    for path in list_recordings(raw, notes):
        record = path.relative_to(raw).as_posix()
        patient = patient_of.find(record, path.name) if args.patients else None
        copy = HELD_OUT_COPY.fullmatch(path.name) or patient and patient in patient_of.held_out
        patient = f"wfdb-patient/{patient}" if patient else f"wfdb/{record}"
        yield job_of(path, record, patient, "test" if copy else "train")


def list_arrays(raw, args, notes):
    """any folder of CSV, .npy, .npz and .mat files; --table has a row for each: file, rate (Hz), unit (mV, uV or
              V), leads (I II V1, or I;II;V1; empty if the CSV has a header with them), and, if you like, patient
              (otherwise each file is one) and split (train, val or test)"""
    path, table = args.table or raw / "table.csv", pd.DataFrame()
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding_errors="replace")
        found = f"has {len(table)} rows with the columns {', '.join(table)}"
    except (OSError, ValueError) as error:
        found = f"cannot be read ({error})"
    if not len(table) or not {*ARRAY_COLUMNS[:4]} <= {*table} or {*table.get("split", "")} - {"", *SPLITS}:
        raise ValueError(f"{path} {found}: expected a table (--table FILE.csv) with {', '.join(ARRAY_COLUMNS[:4])}, "
                         f"and perhaps patient and split; a split is {', '.join(SPLITS)} or empty")
    table = table.reindex(columns=ARRAY_COLUMNS, fill_value="").apply(lambda column: column.str.strip())
    table["file"] = table.file.str.replace("\\", "/").str.removeprefix("./")
    files = find_files(raw, notes, {*ARRAY_READERS})
    found = {file.relative_to(raw).as_posix() for file in files if not file.samefile(path)}
    notes["files"] = text = f"{path} names {len(found & {*table.file}):,} of {len(found):,} files"
    if not found & {*table.file}:
        raise ValueError(f"{text} in {raw}: it says {table.file[0]!r}, and there is {min(found, default='none')!r}")
    is_copy = table.file.map(HELD_OUT_COPY.fullmatch).notna()
    is_copy |= table.patient.isin({*table.patient[is_copy]} - {""})        # with a copy, all of its patient is held out
    table["split"] = table.split.where(table.split != "", "train").mask(is_copy, "test")
    sides = table[table.patient != ""].groupby("patient").split.nunique()
    if (sides > 1).any():
        raise ValueError(f"{path} has the patient {sides.idxmax()!r} in more than one split: expected one")
    for row, again in zip(table.itertuples(index=False), table.file.duplicated()):
        reject = None if row.file in found else ("absent file", f"{path} names it, and it is not in {raw}")
        reject = ("file named twice", f"in {path}; the first row counts") if again else reject
        patient = f"arrays-patient/{row.patient}" if row.patient else f"arrays/{row.file}"
        yield job_of(raw / row.file, row.file, patient, row.split, array=row[1:4], reject=reject)
    for name in sorted(found - {*table.file}):
        yield job_of(name, name, "", "train", reject=("not in the table", f"{path} has no row for it"))


LISTERS = {"ptbxl": list_ptbxl, "mitdb": list_mitdb, "nstdb": list_nstdb, "heedb": list_heedb, "code15": list_code15,
           "code": list_code, "icentia11k": list_icentia11k, "wfdb": list_wfdb, "arrays": list_arrays}
ONLY_FOR = {"download": PHYSIONET, "rate": ["ptbxl"], "patients": ["wfdb"], "table": ["arrays"], "limit": LISTERS,
            "dry_run": LISTERS, "records": ["synth"], "seed": ["synth"]}  # options, and the sources that take them


def job_of(path, record, patient, split=None, **more):
    """A Job whose names fit the index. Without a split a hash of the patient decides it: the same on every machine."""
    record, patient = shorten(record, 64), shorten(patient, 32)
    number = int.from_bytes(hashlib.blake2b(os.fsencode(patient), digest_size=8).digest(), "little")
    return Job(str(path), record, patient, split or {0: "val", 1: "test"}.get(number % 100, "train"), **more)


def shorten(name, n_bytes):
    """A name that fits the index. A name that is too long becomes a part of its hash, to stay unique, and its end."""
    name = os.fsencode(name).decode(errors="backslashreplace")       # a name of a file need not be UTF-8
    if len(name.encode()) <= n_bytes:
        return name
    end = name.encode("ascii", "replace").decode()[13 - n_bytes:]
    return f"{hashlib.sha256(name.encode()).hexdigest()[:12]}~{end}"


class Lookup(dict):
    """One column of a CSV table by another, in the folder of `table` or up to two folders below: about 200 bytes per
    row. It is empty if there is no table. Keys are compared without suffix, and without folder unless `paths`."""

    def __init__(self, table, key, value, paths=False):
        self.name, self.paths, self.asked, self.found, self.held_out = table.name, paths, 0, 0, set()
        self.may_miss = key == value               # a list of duplicates: a part of a database may hold none of them
        tables = sorted(path for depth in ("", "*/", "*/*/") for path in table.parent.glob(depth + table.name))
        parts = (part for path in ([table] if paths else tables) for part in read_table(path, [key, value]))
        for name, found in itertools.chain.from_iterable(part.itertuples(index=False, name=None) for part in parts):
            self.setdefault(self.short(name), found)               # `parts` still needs key and value
            if paths and HELD_OUT_COPY.fullmatch(name):
                self.held_out.add(found)

    def short(self, name):
        name = re.sub(r"(?i)\.(hea|mat|dat|edf)\Z", "", name.replace("\\", "/").removeprefix("./"))
        return name if self.paths else name.rpartition("/")[2]

    def find(self, *names):
        """The value of the first of a recording's names that is in the table, otherwise None."""
        value = next((self[name] for name in map(self.short, names) if name in self), None)
        self.asked, self.found = self.asked + 1, self.found + (value is not None)
        if value is None:
            self.stranger = names[0]
        return value

    def share(self):
        """How many recordings the table names, as text. ValueError if it names none."""
        if not self and not self.paths:
            return "" if self.may_miss else f"no {self.name}: every file counts as a patient of its own"
        if self.asked and not self.found and not self.may_miss:
            raise ValueError(f"{self.name} names none of the {self.asked:,} recordings: it says "
                             f"{next(iter(self), '')!r}, and there is {self.stranger!r}; expected the same names")
        return f"{self.name} ({len(self):,} names) names {self.found:,} of {self.asked:,} recordings"


def read_table(path, columns):
    """Yield parts of a CSV table with these columns, as text, without rows in which one of them is empty. A column is
    given by the names that it may have, with spaces between them."""
    try:
        found = list(pd.read_csv(path, nrows=0, encoding_errors="replace"))
        names = [next((name for name in column.split() if name in found), None) for column in columns]
        if None in names:
            raise ValueError(f"it has the columns {', '.join(found)}")
        for part in pd.read_csv(path, dtype=str, chunksize=100_000, encoding_errors="replace", usecols=names):
            yield part[names].dropna()
    except (ValueError, OSError) as error:                         # errors of pandas are ValueErrors
        expected = ", and ".join(" or ".join(column.split()) for column in columns)
        raise ValueError(f"{path} cannot be read: {error}; expected a table with the columns {expected}") from None


@functools.lru_cache(1)
def open_h5(path):
    """An exams_part*.hdf5 of CODE-15%, opened. ValueError if it does not hold the two tables that are needed."""
    with as_refused(path):
        import h5py                                                # only CODE-15% needs it
    try:
        file = h5py.File(path, "r")
        shapes = file["exam_id"].shape, file["tracings"].shape
        if len(shapes[0]) != 1 or shapes[1][::2] != (*shapes[0], len(CODE_LEADS)):
            raise ValueError(f"exam_id has shape {shapes[0]}, tracings {shapes[1]}: expected (N,) and (N, samples, 12)")
        return file
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no whole part of CODE-15% ({error}): download it again") from None


def code15_unit(parts):
    """The unit in which the median R wave of lead II, over up to 200 exams, is nearest to 1 mV; and that median, mV."""
    peaks, n = [], -(-200 // len(parts))
    for tracings in (open_h5(str(path))["tracings"] for path in parts):
        for row in np.unique(np.linspace(0, len(tracings) - 1, min(len(tracings), n)).astype(int)):
            with contextlib.suppress(OSError):                     # a damaged row is counted later, as a reject
                lead = tracings[row, :, 1].astype(float)
                lead = lead[np.isfinite(lead) & (lead != 0)]
                peaks += [np.abs(lead - np.median(lead)).max()] if len(lead) else []  # R: farthest from the median
    if not peaks:
        raise ValueError(f"no signal in {parts[0].parent}: expected tracings of CODE-15%; download them again")
    peak = float(np.median(peaks))
    unit = min(CODE_SCALES, key=lambda name: abs(np.log(peak * CODE_SCALES[name])))
    return unit, peak * CODE_SCALES[unit]


def read_tracing(path, row, scale):
    """Yield 0 and the Recording in a row of an exams_part*.hdf5, as read_any does. scale: factor to mV."""
    with as_refused(path):
        yield 0, Recording(open_h5(path)["tracings"][row].astype(float) * scale, CODE_FS, CODE_LEADS)


# ---- one recording --------------------------------------------------------------------------------------------------
def prepare_recording(job, changes):
    """Yield a recording as rows of the corpus: one, or the pieces of a long record. Raise Refused if there is none.

    A row is int16 (L, T) uV, lead ids (L,), and the rate in Hz before it became FS. changes: a Counter that gets what
    was changed or left out."""
    if job.reject:
        raise Refused(*job.reject)
    refused, lost, found = None, Counter(), None
    pieces = read_tracing(job.path, *job.tracing) if job.tracing else read_any(job.path, *job.array)
    for _, recording in pieces:
        try:
            row, found = prepare_piece(job, recording)
        except Refused as error:
            refused = refused or error
            lost.update(getattr(recording, "notes", None))
            lost[f"pieces of long records left out: {error.reason}"] += 1
        else:
            changes.update(found)
            yield row
    if found is None:
        raise refused
    changes.update(lost)


def prepare_piece(job, recording):
    """A row of the corpus from a Recording, and what was changed."""
    if isinstance(recording, Refused):
        raise recording
    if job.n_channels and len(recording.leads) != job.n_channels:
        raise Refused("channel count", f"{len(recording.leads)} channels, expected {job.n_channels}")
    changes = Counter(recording.notes)
    signal_mv, ids = preprocess(*recording[:4], changes)
    if job.part:
        n = min(signal_mv.shape[1], NOISE_S * FS)
        signal_mv = signal_mv[:, round(job.part[0] * n):round(job.part[1] * n)]
    return (*drop_unusable_leads(signal_mv, ids, changes), recording.fs), changes


def drop_unusable_leads(signal_mv, ids, changes):
    """Drop leads without signal, cut ends where no lead has signal, and make every name unique; count the changes.
    Returns int16 (L, T) uV and lead ids (L,)."""
    valid = np.isfinite(signal_mv)
    keep = np.flatnonzero(valid.sum(axis=1) >= MIN_VALID_S * FS)
    if not len(keep):
        raise Refused("too short", f"{valid.any(axis=0).sum() / FS:.2f} s of signal, at least {MIN_VALID_S} s needed")
    changes["leads dropped: flat, empty or below 2 s of signal"] += len(ids) - len(keep)
    changes["leads dropped: more than 16"] += max(0, len(keep) - MAX_LEADS)
    keep = keep[:MAX_LEADS]
    signal_mv, ids, n = signal_mv[keep], ids[keep], signal_mv.shape[1]
    used = np.flatnonzero(valid[keep].any(axis=0))
    start = used[0] if used[0] >= PAD_S * FS else 0                # a few missing samples are no padding
    stop = used[-1] + 1 if n - used[-1] - 1 >= PAD_S * FS else n
    changes["recordings trimmed"] += bool(start or stop < n)
    again = np.setdiff1d(np.flatnonzero(ids), np.unique(ids, return_index=True)[1])
    ids[again] = 0                                                 # two channels of one name cannot both be that lead
    changes["leads renamed unknown: a second one of the name"] += len(again)
    signal_mv = signal_mv[:, start:stop]
    for k in np.flatnonzero((np.abs(signal_mv) > MAX_MV).any(axis=1)):
        offset = np.nanmedian(signal_mv[k])
        if abs(offset) > MAX_MV / 2:                               # others stay, even if some samples do not fit
            signal_mv[k] -= offset
            changes["leads stored without their offset, because it does not fit 16 bits"] += 1
    steps = np.rint(signal_mv * UV_PER_MV)                         # beyond the range where the resampler overshoots
    steps = np.where(np.abs(steps) < -MISSING, steps, MISSING).astype("<i2")             # NaN becomes MISSING too
    changes["samples missing"] += int((steps == MISSING).sum())
    return steps, ids


# ---- writing a corpus -----------------------------------------------------------------------------------------------
# OUT/.part holds, while a corpus is made: the jobs and their shards, in jobs.jsonl and plan.json, fixed when the run
# first started; the shards in signal/; and in done/ the index rows and rejects of each finished shard, written last.

def refuse_existing(out):
    """ValueError if `out` holds anything but an unfinished run. (A new disk of ext4 has a folder lost+found.)"""
    unfinished = (part_of(out) / "plan.json").exists() and not (out / "manifest.json").exists()
    if out.exists() and not unfinished and not (out.is_dir() and {*os.listdir(out)} <= {".part", "lost+found"}):
        raise ValueError(f"{out} already exists: delete it (rm -r {out}) to make it again, or name another folder")


def write_corpus(source, raw, out, args, command):
    """Prepare `source` under `raw` into `out`, or continue OUT/.part. Returns the manifest, None for a dry run."""
    part, made, working = part_of(out), not out.exists(), {"done", "dry.jsonl", "jobs.jsonl", "lock", "plan.json"}
    same = {"command": command, "format_version": FORMAT_VERSION, "fields": [*Job._fields]}
    part.mkdir(parents=True, exist_ok=True)
    lock, plan = lock_folder(part), part / "plan.json"
    try:
        refuse_existing(out)                                       # another process may have finished it by now
        found = json.loads(plan.read_text()) if plan.exists() and not args.dry_run else None
        if found and found | same != found:
            raise ValueError(f"{part} holds an unfinished run of `{found.get('command')}`, and this is `{command}`, "
                             f"perhaps of another version: finish that one, or delete it (rm -r {part})")
        found = found or make_plan(source, raw, part, args, same)
        if args.dry_run:
            return None
        if not (part / "manifest.json").exists():
            finish_shards(part, found, args.workers or cpu_count())
            assemble(source, part, found, command)
        for path in sorted(part.iterdir(), key=lambda path: (path.name == "manifest.json", path)):
            if path.name not in working:
                path.rename(part.parent / path.name)               # the manifest, which makes it a corpus, comes last
        plan.unlink()
    finally:
        lock.close()
        if not plan.exists():                                      # no run can continue here
            shutil.rmtree(part, ignore_errors=True)
            if made and not os.listdir(part.parent):
                part.parent.rmdir()
    return json.loads((out / "manifest.json").read_text())


def make_plan(source, raw, part, args, same):
    """Write the list of jobs into OUT/.part, and estimate disk and time. Returns the plan, with what has to be the
    `same` when a run continues; None for a dry run."""
    jobs, notes, n = part / ("dry.jsonl" if args.dry_run else "jobs.jsonl"), {}, 0
    listed = tqdm(LISTERS[source](raw, args, notes), desc="listing", unit=" records", disable=None)
    with open(jobs, "w") as file:
        for n, job in enumerate(itertools.islice(listed, args.limit or None), 1):
            file.write(json.dumps(job) + "\n")
    notes[NOT_READ] = ", ".join(f"{k:,} {kind}" for kind, k in sorted(notes.pop(NOT_READ, {}).items()))
    notes = {what: note.share() if isinstance(note, Lookup) else note for what, note in notes.items()}
    notes = {what: note for what, note in notes.items() if note}
    if not n:
        raise ValueError(f"no {source} recordings under {raw}: expected WFDB headers (*.hea) there, for wfdb also EDF "
                         f"files (*.edf); found {notes.get(NOT_READ, 'nothing like these')}")
    with open(jobs) as file:
        some = [Job(*json.loads(line)) for line in itertools.islice(file, 0, None, -(-n // ESTIMATE_RECORDINGS))]
    sizes, start = [], time.perf_counter()
    for job in some:
        with contextlib.suppress(Refused):
            sizes.append(sum(steps.nbytes for steps, *_ in prepare_recording(job, Counter())))
    n_bytes, seconds = np.mean(sizes or [0.0]), (time.perf_counter() - start) / len(some)
    workers, free = args.workers or cpu_count(), shutil.disk_usage(part).free
    print(f"{source}: {n:,} recordings to read; about {n_bytes * n / 1e9:.3g} GB on disk ({free / 1e9:.0f} GB free) "
          f"and {seconds * n / workers / 60:,.1f} min on {workers} cores")
    if args.dry_run:
        return jobs.unlink()
    if n_bytes * n > free:
        raise ValueError(f"{n:,} recordings need about {n_bytes * n / 1e9:.1f} GB, but the disk of {part.parent} has "
                         f"{free / 1e9:.1f} GB free: name another --out, or prepare fewer (--limit)")
    per_shard = max(1, min(int(SHARD_BYTES // max(n_bytes, 1)), -(-n // SHARDS_AT_LEAST)))
    with open(jobs, "rb") as file:
        starts = [*itertools.islice(itertools.accumulate(map(len, file), initial=0), 0, n, per_shard)]
    plan = same | {"jobs": n, "shard_jobs": per_shard, "starts": starts, "notes": notes}
    for name in ("signal", "done"):
        (part / name).mkdir(exist_ok=True)
    atomic_write(part / "plan.json", json.dumps(plan))
    return plan


def finish_shards(part, plan, workers):
    """Prepare the shards that are not finished, `workers` at a time."""
    n_jobs, per_shard, totals = plan["jobs"], plan["shard_jobs"], Counter()
    if done := {int(path.stem) for path in (part / "done").glob("*.npz")}:
        print(f"{part}: continuing, {len(done)} shards are finished")
    tasks = [(part, i, start, per_shard) for i, start in enumerate(plan["starts"]) if i not in done]
    with (contextlib.closing(run_tasks(tasks, min(workers, len(tasks)))) as results,       # an interruption ends them
          tqdm(total=n_jobs, initial=min(n_jobs, len(done) * per_shard), unit=" records", disable=None) as bar):
        for n, result in results:
            totals.update(result)
            bar.set_postfix(totals, refresh=False)
            bar.update(n)


def run_tasks(tasks, workers):
    """Yield prepare_shard(*task) for every task, `workers` at a time."""
    if workers <= 1:
        yield from itertools.starmap(prepare_shard, tasks)
        return
    # If a worker is killed (out of memory), the executor raises an error; multiprocessing.Pool would wait for ever.
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        yield from pool.map(prepare_shard, *zip(*tasks))
    except BrokenExecutor:
        raise OSError("a worker was killed, perhaps for lack of memory: try again with a smaller --workers") from None
    finally:
        if sys.exc_info()[0] is not None:                          # do not wait for shards that are half finished
            for worker in multiprocessing.active_children():
                worker.terminate()
        pool.shutdown(cancel_futures=True)


def start_worker():
    """Make a worker ignore Ctrl-C, which its parent handles, and end when its parent ends for any reason."""
    os_signal.signal(os_signal.SIGINT, os_signal.SIG_IGN)
    os_signal.signal(os_signal.SIGTERM, os_signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def prepare_shard(part, number, start, n_jobs):
    """Prepare a shard, n_jobs lines from byte `start` of jobs.jsonl on. Returns the number of its jobs, and totals."""
    rows, fingerprints, rejects, changes = [], [NO_FINGERPRINTS], [], Counter()
    with open(part / "jobs.jsonl") as file:
        file.seek(start)
        jobs = [Job(*json.loads(line)) for line in itertools.islice(file, n_jobs)]

    def write(file):
        for job in jobs:
            try:
                for steps, leads, fs_hz in prepare_recording(job, changes):
                    n_leads, length = steps.shape
                    row = (number, file.tell() // 2, length, n_leads, np.pad(leads, (0, MAX_LEADS - n_leads)),
                           SPLITS.index(job.split), job.label, 0, fs_hz, 0, 0)   # assemble numbers the patients
                    file.write(steps.tobytes())
                    fingerprints.append(fingerprint(steps, leads, every_lead=job.split != "train"))
                    fingerprints[-1]["row"] = len(rows)            # assemble adds the recordings of the shards before
                    rows.append((row, job.record.encode(), job.patient.encode()))
            except Refused as error:                               # before its first row, never after it
                rejects.append((job.record, error.reason, str(error)))
    name = f"signal/{number:05d}.i16"
    atomic_write(part / name, write)
    rows = np.array(rows, ROW_DTYPE)
    index = rows["index"]
    about = {"rejects": rejects, "changes": most_frequent(changes, 10 * NAMES_LISTED),
             "sha256": {name: sha256(part / name)}}
    atomic_write(part / "done" / f"{number:05d}.npz", lambda file: np.savez(
        file, rows=rows, fingerprints=np.concatenate(fingerprints), about=json.dumps(about)))
    n_bytes, hours = 2 * (index["length"] * index["n_leads"]).sum(), index["length"].sum() / FS / 3600
    return len(jobs), {"hours": hours, "GB": n_bytes / 1e9, "rejected": len(rejects)}


def most_frequent(changes, n):
    """Of each kind of change that names something ("kind: name") keep the n most frequent names; add up the others."""
    kept, names = Counter(), Counter()
    for what, count in changes.most_common():
        kind = what.partition(": ")[0]
        names[kind] += 1
        kept[what if names[kind] <= n else f"{kind}: other names"] += count
    return kept


def assemble(source, part, plan, command):
    """Join the shards: write index.npy, records.npy, patients.npy, fingerprints.npy, rejects.csv, manifest.json. Needs
    200 bytes of memory per recording."""
    shards = sorted((part / "done").glob("*.npz"))
    abouts = [json.loads(str(np.load(path)["about"])) for path in shards]
    rejects = [row for about in abouts for row in about["rejects"]]
    rejects = pd.DataFrame(rejects, columns=["record", "reason", "detail"])
    rejects.to_csv(part / "rejects.csv", index=False, lineterminator="\r\n", errors="backslashreplace")
    rejected, changes = Counter(rejects.reason), sum((Counter(about["changes"]) for about in abouts), Counter())
    try:
        if len(rejects) == plan["jobs"]:
            raise ValueError(f"none of the {plan['jobs']} recordings could be used: {dict(rejected)}; the first: "
                             f"{rejects.iloc[0].tolist()}")
        index, records, patients = (
            np.concatenate([np.load(path)["rows"][name].copy() for path in shards]) for name in ROW_DTYPE.names)
        patients, index["patient"] = np.unique(patients, return_inverse=True)
        manifest = make_manifest(source, index, records, plan["notes"], command)
    except ValueError:                                             # the same command would fail again
        shutil.rmtree(part)
        raise
    for name, table in zip(ROW_DTYPE.names, (index, records, patients)):
        atomic_write(part / f"{name}.npy", functools.partial(np.save, arr=table))
    write_fingerprints(shards, part / "fingerprints.npy")
    sums = {name: digest for about in abouts for name, digest in about["sha256"].items()}
    sums |= {name: sha256(part / name) for name in [*(f"{table}.npy" for table in TABLES.names), "rejects.csv"]}
    manifest |= {"rejected": dict(sorted(rejected.items())),
                 "changed": dict(sorted(most_frequent(changes, NAMES_LISTED).items())),
                 "shard_bytes": {path.name: path.stat().st_size for path in sorted((part / "signal").iterdir())},
                 "sha256": sums}
    atomic_write(part / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def write_fingerprints(shards, path):
    """Join the fingerprints of the shards, one at a time because they may be larger than the index."""
    n, rows = [[len(np.load(shard)[name]) for shard in shards] for name in ("fingerprints", "rows")]
    joined = np.lib.format.open_memmap(path, "w+", FINGERPRINT_DTYPE, (sum(n),))
    for shard, part, row in zip(map(np.load, shards), np.split(joined, np.cumsum(n)[:-1]), np.cumsum(rows) - rows):
        part[:] = shard["fingerprints"]
        part["row"] += row.astype(np.uint32)
    joined.flush()


def make_manifest(source, index, records, notes, command):
    """Facts for readers of the corpus. There is no date, so that the same recordings give the same bytes."""
    by_split = [index[index["split"] == i] for i in range(len(SPLITS))]
    patients = [np.unique(rows["patient"]) for rows in by_split]
    _, splits_of = np.unique(np.concatenate(patients), return_counts=True)
    if overlap := int((splits_of > 1).sum()):
        raise ValueError(f"{overlap} patients are in more than one split: check the source's table of folds")
    return {
        "magic": MAGIC, "format_version": FORMAT_VERSION, "source": source, "fs_hz": FS,
        "units": f"int16 little-endian, 1 uV per step, {MISSING} = missing", "leads": LEADS, "labels": SUPERCLASSES,
        "recordings": len(index), "records": 1 + int((records[1:] != records[:-1]).sum()),  # one may be several rows
        "recordings_per_split": dict(zip(SPLITS, map(len, by_split))),
        "hours_per_split": {name: round(float(rows["length"].sum(dtype=np.int64)) / FS / 3600, 3)
                            for name, rows in zip(SPLITS, by_split)},
        "patients_per_split": dict(zip(SPLITS, map(len, patients))), "patients_in_two_splits": overlap,
        "leak_note": LEAK_NOTES[source], "notes": notes, "command": command,
        "versions": {"numpy": np.__version__, "scipy": scipy.__version__, "wfdb": wfdb.__version__}}


# ---- download -------------------------------------------------------------------------------------------------------
def differences(folder, sums):
    """{name: SHA-256 that was found} of the files that are absent or whose SHA-256 is not that in `sums`."""
    bar = tqdm(sums, desc=f"checking {folder}", unit=" files", disable=None)
    found = {name: sha256(folder / name) if (folder / name).is_file() else "no such file" for name in bar}
    return {name: sha for name, sha in found.items() if sha != sums[name]}


def download(source, raw, rate):
    """Fetch the files that `raw` lacks from PhysioNet. ValueError if they do not fit the publisher's checksums."""
    database, wanted = PHYSIONET[source]
    wanted, listing = wanted.replace("RATE", "500" if rate == "auto" else rate), raw / "SHA256SUMS.txt"
    fetch(database, raw, [listing.name])
    sums = {name: digest for digest, name in re.findall(r"(\S+)[^\S\n]+(.*\S)", listing.read_text())
            if re.fullmatch(wanted, name)}
    if not sums:
        raise ValueError(f"{listing} lists no file like {wanted}: it belongs to another database")
    names = list(differences(raw, sums))
    for i in tqdm(range(0, len(names), 100), desc="fetching", unit="00 files", disable=None):
        fetch(database, raw, names[i:i + 100])
    if bad := list(differences(raw, {name: sums[name] for name in names})):
        raise ValueError(f"{len(bad)} files in {raw} are absent or differ from the publisher's SHA256SUMS.txt: "
                         f"{', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}; run again with --download")


def fetch(database, raw, names):
    """wfdb.dl_files, without the two lines that it prints per call. All errors become a ValueError."""
    try:
        with contextlib.redirect_stdout(None):
            wfdb.dl_files(database, str(raw), names, overwrite=True)
    except Exception as error:                                     # any layer of the network may have failed
        raise ValueError(f"cannot fetch {names[0]} ({database}) from physionet.org ({type(error).__name__}: {error})"
                         f": run again; or copy the files to {raw} by hand and leave --download out") from None


# ---- check: what is in a corpus, and whether it is whole ------------------------------------------------------------
def check(dirs, held_out=None):
    """Verify prepared corpora, print copies and leaks, draw DIR/check.png for each. Returns the number of faults."""
    corpora, faults = [open_corpus(dir) for dir in dirs], 0
    for corpus in corpora:
        print(summary(corpus.manifest, corpus.dir))
        sums = corpus.manifest["sha256"]
        found = [f"{name}: sha256 {sha}, the manifest says {sums[name]}"
                 for name, sha in differences(corpus.dir, sums).items()] + [*index_faults(corpus)]
        faults += len(found)
        for fault in found:
            print(f"  DAMAGED: {fault}")
        if not found:
            draw_overview(corpus, corpus.dir / "check.png")
            print(f"  overview: {corpus.dir / 'check.png'}")
    if faults:
        print("copies are looked for when nothing is damaged")
    for corpus, found in zip(corpora, [] if faults else rows_to_leave_out(corpora)):
        for rows, what in zip(found, ("are copies of held-out recordings", "are second copies")):
            if len(rows):
                names = b", ".join(corpus.records[rows[:5]]).decode() + (" ..." if len(rows) > 5 else "")
                print(f"{corpus.dir}: {len(rows):,} recordings of split train {what}, of these corpora or of public "
                      f"test sets: {names}; train.py leaves them out when it is given the same corpora")
    if held_out and not faults:
        write_held_out(corpora, held_out)
    print(f"{len(corpora)} corpora, {faults} faults")
    return faults


def draw_overview(corpus, path):
    """A corpus: hours by lead set, rate and length; amplitudes and heart rates; six random recordings."""
    from matplotlib.figure import Figure         # only here: no other command draws

    index, rng = corpus.index, np.random.default_rng(0)
    figure = Figure(figsize=(11, 14), layout="constrained")
    axes = figure.subplot_mosaic("aabbcc;dddeee;ffffff;gggggg;hhhhhh;iiiiii;jjjjjj;kkkkkk",
                                 height_ratios=[2, 2, 1, 1, 1, 1, 1, 1], subplot_kw={"xmargin": 0})
    sets, of_set = np.unique(index[["n_leads", "leads"]], return_inverse=True)
    names = [" ".join(LEADS[k] for k in ids[:n]) if n < 5 else f"{n} leads" for n, ids in sets]
    hours = pd.Series(index["length"] / FS / 3600)
    lengths = pd.cut(hours * 3600, [0, 5, 9, 11, 20, 60, 600, 3600, np.inf], right=False)
    for key, what, kinds in (("a", "leads", np.array(names, object)[of_set]),
                             ("b", "original rate, Hz", index["fs_hz"]), ("c", "length, s", lengths)):
        top = hours.groupby(kinds, observed=True).sum().nlargest(6)[::-1]
        top.plot.barh(ax=axes[key], color="0.4", xlabel=f"hours by {what}", ylabel="").margins(x=0.2)
        axes[key].bar_label(axes[key].containers[0], fmt=" %.3g", fontsize=8)
    rows = np.sort(rng.choice(len(index), min(OVERVIEW_RECORDINGS, len(index)), replace=False))
    shown = [shown_lead(corpus, i) for i in rows]
    peaks = [np.percentile(np.abs(x - np.median(x)), 99.5) for x, _ in shown]
    for key, values, most, what in (("d", peaks, 4, "lead II, 99.5th percentile, mV (last bar: 4 and more)"),
                                    ("e", [heart_rate_bpm(x) for x, _ in shown], 200, "heart rate, 1/min")):
        axes[key].hist(np.clip(values, 0, most), 60, range=(0, most), color="0.4")
        axes[key].set_xlabel(what)
    for key, k in zip("fghijk", np.sort(rng.choice(len(rows), min(6, len(rows)), replace=False))):
        x, title = shown[k][0][:10 * FS], f"{corpus.records[rows[k]].decode()}, {shown[k][1]}, mV over s"
        axes[key].plot(np.arange(len(x)) / FS, x, color="k", lw=0.7)
        axes[key].set_title(title, loc="left", fontsize=9, pad=2)
    figure.suptitle(f"{corpus.manifest['source']}, {len(index):,} recordings, {hours.sum():,.1f} h")
    save_figure(figure, path, dpi=90)


def shown_lead(corpus, i):
    """Up to a minute in the middle of recording i, in mV, of lead II (or of the first lead), and the lead's name."""
    ids, length = corpus.lead_ids(i), int(corpus.index["length"][i])
    k, n = int(np.argmax(ids == lead_id("II"))), min(length, 60 * FS)
    lead = corpus.read(i, (length - n) // 2, n)[k]
    return np.where(lead == MISSING, 0, lead) / UV_PER_MV, LEADS[ids[k]]


def heart_rate_bpm(lead):
    """60 / the median time between the landmarks of fingerprints, most often R waves, of a lead (T,) in mV at FS; NaN
    if there are fewer than three."""
    at = fingerprint(np.rint(lead[None] * UV_PER_MV).astype(np.int16), np.zeros(1))["sample"]
    return 60 * FS / np.median(np.diff(at)) if len(at) > 2 else np.nan


# ---- command line ---------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    description, _, text = __doc__.partition("\n\n")
    sources = {name: lister.__doc__ for name, lister in LISTERS.items()} | {
        "synth": "synthetic ECGs: written to --raw in the layouts of the first three, then prepared like them"}
    epilog = "\n".join(["sources", *(f"  {name:12}{doc}" for name, doc in sources.items()), "", text])
    parser = argparse.ArgumentParser(prog="prepare.py", description=description, epilog=epilog, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", choices=("synth", *LISTERS), help="what --raw holds, see below")
    add("--raw", type=Path, metavar="DIR", required=True, help="raw recordings; synth and --download write to it")
    add("--out", type=Path, metavar="DIR", required=True, help="folder to make; delete an old one first")
    add("--download", action="store_true", help="first fetch what --raw lacks from PhysioNet, and check it by SHA-256")
    add("--workers", type=int, default=0, metavar="N", help="processes, with equal results (default: one per CPU core)")
    add("--limit", type=int, default=0, metavar="N", help="prepare only the first N recordings (default: all)")
    add("--dry-run", action="store_true", help="only print the number of recordings, and the disk and time they need")
    add("--patients", type=Path, metavar="CSV",
        help="wfdb only: table with a column record (the path in --raw, or its last part) and a column patient")
    add("--table", type=Path, metavar="CSV", help="arrays only: what the files are (default: table.csv in --raw)")
    add("--rate", choices=("auto", "100", "500"), default="auto",
        help="ptbxl only: which copy to read, in Hz (default: 500 if all of it is there, otherwise 100)")
    add("--records", type=int, default=SYNTH_RECORDS, metavar="N", help="synth only: how many (default: %(default)s)")
    add("--seed", type=int, default=0, help="synth only: the same seed, the same recordings (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, sources in ONLY_FOR.items():
        if args.source not in sources and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for {', '.join(sources)}, not for {args.source}")
    if args.records < 1 or min(args.workers, args.seed, args.limit) < 0:
        parser.error("--records must be at least 1, --workers, --seed and --limit at least 0")
    if not (args.source == "synth" or args.download or args.raw.is_dir()):
        parser.error(f"--raw {args.raw} is no folder")
    return args


def command_of(args):
    """The command line that makes this corpus again."""
    names = ["raw", "out", *{"synth": ["records", "seed"], "ptbxl": ["rate"]}.get(args.source, [])]
    names += [name for name in ("limit", "patients", "table") if getattr(args, name)]
    flags = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    return shlex.join(["python", "prepare.py", args.source, *flags])


def summary(manifest, out):
    """What was prepared, for a person to read."""
    hours, rejected = manifest["hours_per_split"], manifest["rejected"]
    lines = [f"{out}: {manifest['records']:,} records, {sum(hours.values()):.2f} h; "
             f"{sum(rejected.values()):,} recordings rejected"]
    lines += [f"  {split:8} {n:7,} recordings {hours[split]:9.2f} h {manifest['patients_per_split'][split]:7,} patients"
              for split, n in manifest["recordings_per_split"].items()]
    lines += [f"  rejected {n:7,} {reason} (see rejects.csv)" for reason, n in rejected.items()]
    lines += [f"  changed  {n:7,} {what}" for what, n in manifest["changed"].items()]
    lines += [f"  {what}: {note}" for what, note in manifest["notes"].items()]
    lines += [f"  patients in more than one split: {manifest['patients_in_two_splits']}", f"  {manifest['leak_note']}"]
    return "\n".join(lines)


def main(args):
    command = command_of(args)
    refuse_existing(args.out)
    if args.download:
        download(args.source, args.raw, args.rate)
    if args.source != "synth":
        manifests = {"": write_corpus(args.source, args.raw, args.out, args, command)}
    else:
        refuse_existing(args.raw)
        with atomic_folder(args.raw) as raw, atomic_folder(args.out) as out:
            synthesize(raw, args.records, args.seed)
            manifests = {source: write_corpus(source, raw / source, out / source, args, command)
                         for source in PHYSIONET}
    for name, manifest in manifests.items():
        if manifest:
            print(summary(manifest, args.out / name))


def end_of_run(args, error):
    """The last line of a run that did not finish: the error (KeyboardInterrupt has no text), and what is kept."""
    part, said = part_of(args.out), f"prepare.py: {str(error) or 'interrupted'}"
    if kept := len(list(part.glob("done/*.npz"))):
        return f"{said}; {kept} finished shards are kept in {part}: run the same command again to continue"
    return said + (", nothing was written" if isinstance(error, KeyboardInterrupt) else "")


def run_command():
    os_signal.signal(os_signal.SIGTERM, os_signal.default_int_handler)                 # as Ctrl-C
    if checking := sys.argv[1:2] == ["check"]:
        parser = argparse.ArgumentParser(prog="prepare.py check", description=check.__doc__)
        parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR")
        parser.add_argument("--held-out", type=Path, metavar="FILE", help="also write the fingerprints of all "
                            "that is held out here; train.py leaves out copies of what pretrained/held_out.npz holds")
        args = parser.parse_args(sys.argv[2:])
    else:
        args = parse_args()
    try:
        sys.exit(bool(check(args.dirs, args.held_out)) if checking else main(args))
    except (ValueError, OSError, KeyboardInterrupt) as error:            # OSError: disk full, no permission
        sys.exit(f"prepare.py: {str(error) or 'interrupted'}" if checking else end_of_run(args, error))


if __name__ == "__main__":
    run_command()
