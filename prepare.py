"""Publishers' folders to corpora: raw recordings are turned into one corpus on disk, once.

    python prepare.py SOURCE --raw DIR --out DIR           (python prepare.py --help lists the sources and examples)

Writes OUT/signal/00000.i16 ... (the samples, in shards), OUT/index.npy (one row per recording), OUT/manifest.json (what
this corpus is, what was rejected and why, checksums) and OUT/rejects.csv. Until all is done it writes into OUT.part, and
the same command goes on there after an interruption, to the same bytes. Disk: 2 bytes per sample, that is 60 kB for
10 s of 12 leads; the estimate of disk and time is printed before anything is written (--dry-run: nothing else).

Every recording goes through `preprocess`, which is also what the probes and `encoder.embed` call on any other ECG:
250 Hz, millivolt, leads by name, NaN where the recording says nothing. Nothing is filtered, normalised or centred.

Shapes: L leads, T samples (at FS unless said otherwise).
"""

import argparse
import ast
import contextlib
import csv
import functools
import hashlib
import io
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
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.signal
import wfdb
from tqdm import tqdm

from corpus import (EVENT_DTYPE, FINGERPRINT_BYTES, FORMAT_VERSION, INDEX_DTYPE, MAGIC, NO_EVENTS, PATIENT_DTYPE, RECORD_DTYPE, SPLITS,
                    SUPERCLASSES, fingerprint, open_corpus, part_of, rows_to_leave_out)
from ecg import (FS, LEAD_IDS, LEADS, MAX_LEADS, MISSING, PAD_S, UV_PER_MV, Recording, Refused, atomic_write, header_lines, preprocess, read_wfdb, sha256)
from synth import synthesize

MIN_VALID_S = 2.0  # s of signal that a lead, and so a recording, needs to be kept
SOURCES = ("synth", "ptbxl", "mitdb", "nstdb", "heedb", "code15", "code", "icentia11k", "wfdb")
SHARD_BYTES = 256 * 2**20  # of signal, about; so 12 million recordings are 2,800 files
SHARDS_AT_LEAST = 64  # as far as there are recordings, so that a small corpus is shared among cores too
ESTIMATE_RECORDINGS = 5  # recordings read beforehand, to estimate disk and time
# MIT-BIH inter-patient split: de Chazal et al., IEEE TBME 51(7), 2004. The rest of the 48 are the four paced records.
MITDB_DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
MITDB_DS2 = "100 103 105 111 113 117 121 123 200 202 210 212 213 214 219 221 222 228 231 232 233 234".split()
MITDB_PACED = "102 104 107 217".split()
MITDB_HELD_OUT = {*MITDB_DS2, "201"}  # 201 is the same person as 202, which is in DS2
# A folder of loose WFDB records may hold copies of the test sets: Challenge 2021's HRn is PTB-XL's ecg_id n.
HELD_OUT_COPY = re.compile(r"HR\d{5}|\d{5}_[lh]r|" + "|".join(sorted(MITDB_HELD_OUT)))
NOISE_S = 30 * 60  # s, how much of an NSTDB record is used: minutes 0-20 to train with, 20-30 to test with
NOISE_PARTS = (("train", 0, 2 / 3), ("test", 2 / 3, 1))  # as shares, so that a shorter record is parted likewise
SYNTH_RECORDS = 600  # default number of synthetic 12-lead recordings
PHYSIONET = {  # database, files that are needed of it
    "ptbxl": ("ptb-xl", r"recordsRATE/.*|[^/]*\.csv|LICENSE\.txt"),
    "mitdb": ("mitdb", r"\d{3}\.(hea|dat|atr)|RECORDS"),
    "nstdb": ("nstdb", r"[^/]*\.(hea|dat|atr)|RECORDS")}
HASHED_SPLIT = {"val": 1, "test": 1}  # per cent of the patients, of sources without a split of their own
HASHED_NOTE = "by a hash of the patient 1 % of the patients are val and 1 % test: pre-train on the train split only"
CODE_LEADS = ("DI", "DII", "DIII", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")  # of code15's columns
CODE_FS = 400
CODE_SCALES = {"mV": 1.0, "1e-4 V": 0.1, "uV": 1e-3}  # units that code15 may be in, as factors to mV
ANNOTATED = {"icentia11k": "atr"}  # sources whose annotations are kept
LEAK_NOTES = {
    "heedb": HASHED_NOTE, "code15": HASHED_NOTE, "code": HASHED_NOTE, "icentia11k": HASHED_NOTE,
    "ptbxl": "folds 1-8 are train, fold 9 is val, fold 10 is test: pre-train on the train split only",
    "mitdb": "DS2 is the test split and is never pre-trained on; 201 is held out with it, being the same person as 202 "
             "(DS2); the paced records 102 104 107 217 are in the train split",
    "nstdb": "of each noise record minutes 0-20 are train and minutes 20-30 test",
    "wfdb": "all train, one patient per record unless --patients names them, but copies of evaluation data, told by "
            "their names, are test: HRnnnnn (Challenge 2021's PTB-XL), nnnnn_lr and nnnnn_hr (PTB-XL), MIT-BIH's DS2 "
            "and 201"}


def to_int16(signal_mv):
    """float (L, T) mV -> int16 in uV, MISSING where NaN or (overshoot of the resampler) beyond the range."""
    steps = np.rint(signal_mv * UV_PER_MV)
    return np.where(np.abs(steps) <= np.iinfo(np.int16).max, steps, MISSING).astype("<i2")


class Job(NamedTuple):
    """One recording to prepare."""
    path: str  # WFDB record without suffix, or an HDF5 file
    record: str
    patient: str
    split: str
    label: int = 0
    n_channels: int = 0  # what the source promises; 0 = anything
    part: tuple | None = None  # from, to: shares of the first NOISE_S
    row: int = -1  # in the HDF5 file
    scale: float = 1.0  # factor to mV
    reject: tuple | None = None  # reason, detail: why it cannot be used, where the listing knows that already


NO_PATIENT = "records that the table of patients does not name, each a patient of its own"


def list_ptbxl(raw, args, notes):
    """Jobs for PTB-XL: every row of ptbxl_database.csv, at 100 or 500 Hz."""
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        if not (raw / name).is_file():
            raise ValueError(f"no {name} in {raw}: expected PTB-XL's own folder, or add --download")
    table = pd.read_csv(raw / "ptbxl_database.csv", index_col="ecg_id")
    statements = pd.read_csv(raw / "scp_statements.csv", index_col=0)
    superclass = statements.diagnostic_class[statements.diagnostic == 1].to_dict()
    rate = args.rate
    if rate == "auto":
        rate = "500" if all((raw / f"{name}.hea").is_file() for name in table.filename_hr) else "100"
    names = table.filename_hr if rate == "500" else table.filename_lr
    notes["rate"] = f"the {rate} Hz records were read"
    for ecg_id, row in table.iterrows():
        # A statement counts if it is present, whatever its likelihood, as in the benchmark (Strodthoff et al. 2021).
        present = {superclass.get(code) for code in ast.literal_eval(row.scp_codes)}
        label = sum(1 << bit for bit, name in enumerate(SUPERCLASSES) if name in present)
        split = {9: "val", 10: "test"}.get(int(row.strat_fold), "train")
        yield Job(str(raw / names[ecg_id]), f"{ecg_id:05d}", f"ptbxl/{int(row.patient_id)}", split, label, n_channels=12)


def list_mitdb(raw, args, notes):
    """Jobs for the MIT-BIH Arrhythmia Database: what RECORDS lists, or all 48."""
    names = sorted(MITDB_DS1 + MITDB_DS2 + MITDB_PACED)
    if (raw / "RECORDS").is_file():
        names = (raw / "RECORDS").read_text().split()
    for name in names:
        yield Job(str(raw / name), name, "mitdb/" + {"202": "201"}.get(name, name),  # 201 and 202: one person
                  "test" if name in MITDB_HELD_OUT else "train", n_channels=2)


def list_nstdb(raw, args, notes):
    """Jobs for the three noise records of the Noise Stress Test Database, each in its two parts."""
    # The gain 0 of these headers means "uncalibrated", which WFDB reads as 200 adu/mV: the millivolts are nominal.
    # There is no patient: the parts never meet, so each is a unit of its own.
    for name in ("bw", "em", "ma"):
        for split, start, stop in NOISE_PARTS:
            yield Job(str(raw / name), name, f"nstdb/{name}/{split}", split, n_channels=2, part=(start, stop))


def list_heedb(raw, args, notes):
    """Jobs for the Harvard-Emory ECG Database: all headers under ECG/WFDB (or under raw, if that is not there), with the
    patients of demographics_ECG.csv, without the files of duplicated.csv."""
    patient_of = Lookup.of_tables(find_tables(raw, "demographics_ECG.csv"), "FileName", "BDSPPatientID")
    duplicates = Lookup.of_tables(find_tables(raw, "duplicated.csv"), "file_name")
    if not patient_of:
        notes["patients"] = "no demographics_ECG.csv: every file counts as a patient of its own"
    folder = raw / "ECG" / "WFDB"
    for _, names in header_folders(folder if folder.is_dir() else raw):
        for path in names:
            patient = patient_of[path.name]
            reject = ("duplicate", "named in the publisher's duplicated.csv") if path.name in duplicates else None
            if patient is None and patient_of and not reject:
                notes[NO_PATIENT] = 1 + notes.get(NO_PATIENT, 0)
            yield hashed_job(path, raw, f"heedb/{path.name if patient is None else patient}", reject)


def list_code(raw, args, notes):
    """Jobs for the whole of CODE in its WFDB form: TNMG{exam}_N{k}, patients from annotations.csv."""
    tables = find_tables(raw, "annotations.csv")
    if not tables:
        raise ValueError(f"no annotations.csv in {raw}: expected CODE's own folder, with its table of exams and "
                         "patients")
    patient_of = Lookup.of_tables(tables, "id_exam", "id_patient")
    for _, names in header_folders(raw):
        for path in names:
            exam = re.fullmatch(r"TNMG(\d+)_N\d+", path.name)
            patient = exam and patient_of[exam[1]]
            reject = None
            if not exam:
                reject = "file name", f"{path.name}.hea: expected TNMG and the exam, _N and the tracing"
            elif patient is None:                                  # without the patient it could be in the wrong split
                reject = "unknown patient", f"annotations.csv has no exam {exam[1]}"
            yield hashed_job(path, raw, f"code/{patient}", reject)


def list_code15(raw, args, notes):
    """Jobs for CODE-15%: the rows of all exams_part*.hdf5, patients from exams.csv by exam_id."""
    h5py, parts = import_h5py(), sorted(raw.glob("exams_part*.hdf5"), key=lambda path: (len(path.name), path.name))
    if not parts or not (raw / "exams.csv").is_file():
        raise ValueError(f"no {'exams.csv' if parts else 'exams_part*.hdf5'} in {raw}: expected the files of Zenodo "
                         "record 4916206, unpacked")
    table = pd.concat(read_table(raw / "exams.csv", ["exam_id", "patient_id", "trace_file"]))
    patient_of = dict(zip(table.exam_id, table.patient_id))
    unit, median_mv = code15_unit(h5py, parts)
    notes["units"] = (f"read as {unit}: the median R wave of lead II is then {median_mv:.2f} mV (the publisher's own "
                      "statements differ)")
    print(f"code15: {notes['units']}")
    for path in parts:
        with open_h5(h5py, path) as file:
            exams, n_rows = file["exam_id"][:], len(file["tracings"])
        if len(exams) != n_rows:
            raise ValueError(f"{path} has {len(exams)} exam_id and {n_rows} tracings: it is damaged, fetch it again")
        owed = dict.fromkeys(table.exam_id[table.trace_file == path.name])
        for row, exam in enumerate(map(str, exams.tolist())):
            known, reject = exam in owed, None
            owed.pop(exam, None)
            if exam == "0":
                reject = "padding row", f"row {row} of {path.name} has exam_id 0"
            elif not known:                                        # without the patient it could be in the wrong split
                reject = "unknown or repeated exam", f"exams.csv has no exam {exam} in {path.name}, or it came before"
            patient = f"code15/{patient_of.get(exam)}"
            yield Job(str(path), exam, patient, hashed_split(patient), n_channels=12, row=row, scale=CODE_SCALES[unit],
                      reject=reject)
        for exam in owed:
            yield Job(str(path), exam, f"code15/{patient_of[exam]}", "train",
                      reject=("absent exam", f"exams.csv says {path.name}, which does not hold it"))


def list_icentia11k(raw, args, notes):
    """Jobs for Icentia11k: a segment of about 70 minutes each; the folder is the patient."""
    for folder, names in header_folders(raw):
        for path in names:
            known = re.fullmatch(r"(p\d{5})_s\d\d", path.name)
            reject = None if known else ("file name", f"{path.name}.hea: expected p, patient, _s and the segment")
            yield hashed_job(path, raw, f"icentia11k/{known[1] if known else folder.name}", reject)


def list_wfdb(raw, args, notes):
    """Jobs for every WFDB record under raw; the segments of a multi-segment record are read with it, not twice."""
    patient_of, held_out = read_patients(args.patients)
    for folder, names in header_folders(raw):
        segments = set()
        for path in names:
            lines = header_lines(f"{path}.hea")
            if lines and "/" in lines[0][0]:  # NAME/SEGMENTS, then a line for each segment
                segments |= {path.parent / fields[0] for fields in lines[1:]}
        for path in names:
            if path in segments:
                continue
            record = path.relative_to(raw).as_posix()
            patient = patient_of.get(record, patient_of.get(path.name))
            if patient is None and patient_of:
                notes[NO_PATIENT] = 1 + notes.get(NO_PATIENT, 0)
            copy = HELD_OUT_COPY.fullmatch(path.name) or patient in held_out
            patient = f"wfdb/{record}" if patient is None else f"wfdb-patient/{patient}"
            yield Job(str(path), shorten(record, 64), shorten(patient, 32), "test" if copy else "train")


LISTERS = {"ptbxl": list_ptbxl, "mitdb": list_mitdb, "nstdb": list_nstdb, "heedb": list_heedb, "code15": list_code15,
           "code": list_code, "icentia11k": list_icentia11k, "wfdb": list_wfdb}


def header_folders(folder):
    """(folder, its WFDB records as paths without suffix), for folder and all folders in it, in sorted order; one folder
    is in memory at a time, and one that cannot be read is an OSError. Links to folders are not followed."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    names = [Path(entry.path).with_suffix("") for entry in entries if entry.name.endswith(".hea") and entry.is_file()]
    if names:
        yield Path(folder), names
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from header_folders(entry.path)


def hashed_job(path, raw, patient, reject=None):
    """A job for the record `path`, in the split that the patient's hash gives."""
    patient = shorten(patient, 32)
    return Job(str(path), shorten(path.relative_to(raw).as_posix(), 64), patient, hashed_split(patient), reject=reject)


def hashed_split(patient):
    """The split of a patient, the same wherever and whenever it is asked for."""
    place = int.from_bytes(hashlib.blake2b(patient.encode(), digest_size=8).digest(), "little") % 100
    return "val" if place < HASHED_SPLIT["val"] else "test" if place < sum(HASHED_SPLIT.values()) else "train"


def find_tables(raw, name):
    """The publisher's table `name`: in raw or in a folder of it, two deep at most."""
    return sorted(path for pattern in (name, f"*/{name}", f"*/*/{name}") for path in raw.glob(pattern))


class Lookup:
    """A column of a table by a key, for tables of many million rows: 16 bytes a row, keys by their 64-bit hash.

    Keys are compared without folder and suffix. `key in lookup`, `lookup[key]` (None if it is not there).
    """

    def __init__(self, keys, values):
        order = np.argsort(keys, kind="stable")
        self.keys, self.values = keys[order], values[order]

    @classmethod
    def of_tables(cls, paths, key, value=None):
        """From CSV tables that all have the column `key` (and `value`); ValueError if one has not."""
        keys, values = [np.zeros(0, np.uint64)], [np.zeros(0, "S1")]
        for path in paths:
            for part in read_table(path, [key] + ([value] if value else [])):
                keys.append(np.fromiter(map(cls.hash, part[key]), np.uint64, len(part)))
                values.append(np.char.encode(part[value].to_numpy(str)) if value else np.zeros(len(part), "S1"))
        return cls(np.concatenate(keys), np.concatenate(values))

    @staticmethod
    def hash(key):
        stem = str(key).replace("\\", "/").split("/")[-1].removesuffix(".hea").removesuffix(".mat").removesuffix(".dat")
        return int.from_bytes(hashlib.blake2b(stem.encode(), digest_size=8).digest(), "little")

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, key):
        place = np.searchsorted(self.keys, np.uint64(self.hash(key)))
        if place == len(self.keys) or self.keys[place] != self.hash(key):
            return None
        return self.values[place].decode(errors="replace")

    def __contains__(self, key):
        return self[key] is not None


def read_table(path, columns):
    """Yield parts of a CSV table with these columns, as text without the rows that lack one of them."""
    try:
        for part in pd.read_csv(path, dtype=str, chunksize=100_000, encoding_errors="replace",
                                usecols=lambda name: name in columns):
            absent = [name for name in columns if name not in part]
            if absent:
                found = pd.read_csv(path, nrows=0, encoding_errors="replace").columns.tolist()
                raise ValueError(f"no column {absent[0]!r} among {found}")
            yield part.dropna()
    except (ValueError, pd.errors.ParserError) as error:  # EmptyDataError, too, is a ValueError
        raise ValueError(f"{path} cannot be read: {error}; expected the publisher's table, with the columns "
                         f"{', '.join(columns)}") from None


PATIENT_COLUMNS = (("record", "path", "file_name", "FileName"),
                   ("patient", "patient_id", "subject_id", "BDSPPatientID"))


def read_patients(path):
    """--patients: {record: patient}, and the patients who have a copy of a held-out recording."""
    if path is None:
        return {}, set()
    found = pd.read_csv(path, nrows=0).columns
    record, patient = (next((name for name in names if name in found), None) for names in PATIENT_COLUMNS)
    if not record or not patient:
        raise ValueError(f"--patients {path} has the columns {', '.join(found)}: expected one of "
                         f"{', '.join(PATIENT_COLUMNS[0])}, and one of {', '.join(PATIENT_COLUMNS[1])}")
    patient_of = {}
    for part in read_table(path, [record, patient]):
        patient_of |= dict(zip(part[record].str.removesuffix(".hea"), part[patient]))
    return patient_of, {who for name, who in patient_of.items() if HELD_OUT_COPY.fullmatch(name.split("/")[-1])}


def import_h5py():
    """h5py, which only CODE-15% needs."""
    try:
        import h5py
    except ImportError:
        raise ValueError("CODE-15% comes as HDF5: run `pip install h5py` first") from None
    return h5py


def open_h5(h5py, path):
    """An exams_part*.hdf5, checked for the two tables that are read."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is no HDF5 file or cut short ({error}): fetch it again") from None
    shapes = {name: getattr(file.get(name), "shape", None) for name in ("exam_id", "tracings")}
    if shapes["exam_id"] is None or len(shapes["tracings"] or ()) != 3 or shapes["tracings"][2] != len(CODE_LEADS):
        raise ValueError(f"{path} holds {shapes}: expected exam_id (N,) and tracings (N, samples, {len(CODE_LEADS)})")
    return file


def code15_unit(h5py, parts):
    """The unit in which lead II of up to 200 exams has the most usual R wave (1 mV), and the median R wave in mV.

    R is taken as the largest distance from the median of a tracing.
    """
    peaks = []
    for path in parts:
        with open_h5(h5py, path) as file:
            tracings = file["tracings"]
            n = min(len(tracings), -(-200 // len(parts)))
            for row in np.unique(np.linspace(0, len(tracings) - 1, n).astype(int)):
                with contextlib.suppress(OSError):                 # a damaged row will be counted in its turn
                    lead = tracings[row, :, 1].astype(float)
                    lead = lead[np.isfinite(lead) & (lead != 0)]
                    if len(lead):
                        peaks.append(np.abs(lead - np.median(lead)).max())
    if not peaks:
        raise ValueError(f"none of the exams looked at in {parts[0].parent} has a signal")
    peak = float(np.median(peaks))
    unit = min(CODE_SCALES, key=lambda name: abs(np.log(peak * CODE_SCALES[name])))
    return unit, peak * CODE_SCALES[unit]


def shorten(name, n_bytes):
    """A name that fits the index: if it is too long, its end and enough of its hash to stay unique."""
    if len(name.encode()) <= n_bytes:
        return name
    end = name.encode("ascii", "replace").decode()[13 - n_bytes:]
    return f"{hashlib.sha256(name.encode()).hexdigest()[:12]}~{end}"


class Prepared(NamedTuple):
    """A recording as the corpus holds it."""
    steps: np.ndarray  # int16 (L, T)
    leads: np.ndarray
    fs_hz: float
    events: np.ndarray  # EVENT_DTYPE
    changes: Counter  # what was done to it


def read_job(job):
    """What read_wfdb returns, from whichever kind of file the job names."""
    return read_wfdb(job.path) if job.row < 0 else read_code15(job)


def prepare_recording(job, annotator=None):
    """Prepare one recording, or raise Refused."""
    if job.reject:
        raise Refused(*job.reject)
    signal, fs, names, units, n_other = read_job(job)
    if job.n_channels and len(names) != job.n_channels:
        raise Refused("channel count", f"{len(names)} channels, expected {job.n_channels}")
    signal_mv, ids = preprocess(signal, fs, names, units)
    if job.part:
        n = min(signal_mv.shape[1], NOISE_S * FS)
        signal_mv = signal_mv[:, round(job.part[0] * n):round(job.part[1] * n)]
    changes = Counter({"channels left out: not a voltage": n_other})
    steps, ids, start = drop_unusable_leads(signal_mv, ids, changes)
    events = read_events(job.path, annotator, fs, start, steps.shape[1], changes) if annotator else NO_EVENTS
    return Prepared(steps, ids, fs, events, changes)


@functools.lru_cache(1)
def tracings_of(path):
    return open_h5(import_h5py(), path)["tracings"]


def read_code15(job):
    """A row of an exams_part*.hdf5, like read_wfdb."""
    try:
        tracing = tracings_of(job.path)[job.row]
    except (OSError, ValueError) as error:
        raise Refused("unreadable or truncated file", f"{type(error).__name__}: {error}") from None
    return Recording(tracing.astype(np.float64) * job.scale, CODE_FS, CODE_LEADS)


def read_events(path, annotator, fs, start, length, changes):
    """Annotations of a WFDB record as EVENT_DTYPE, in samples at FS from `start` of the prepared recording on: the
    beats' symbols, and in place of "+" the rhythm that it says. A file that is absent or damaged is counted, no reason
    to refuse the signal."""
    try:
        with open(f"{path}.{annotator}", "rb") as file:
            events = decode_annotations(file.read())
    except (OSError, ValueError) as error:
        absent = isinstance(error, FileNotFoundError)
        changes[f"recordings without annotations: the file is {'absent' if absent else 'damaged'}"] += 1
        return NO_EVENTS
    sample = np.rint(events["sample"] * (FS / fs)) - start
    inside = (sample >= 0) & (sample < length) & ~np.isin(events["symbol"], (b'"', b" "))       # comments are none
    events = events[inside].astype(EVENT_DTYPE)
    events["sample"] = sample[inside]
    return events


ANNOTATION_SYMBOLS = {label.label_store: label.symbol for label in wfdb.io.annotation.ann_labels}
SKIP, NUM, AUX = 59, 60, 63


def decode_annotations(data):
    """The bytes of a .atr file -> sample (K,) at the record's rate and symbol; ValueError if they are none.

    The format is annot(5) of the WFDB manual: words of 16 bits, a code in the upper 6 and in the lower 10 the samples
    since the last annotation. wfdb.rdann reads the same, but loops without end in some damaged files.
    """
    words, k, time, samples, symbols = np.frombuffer(data[:len(data) // 2 * 2], "<u2").tolist(), 0, 0, [], []
    while True:
        if k >= len(words):
            raise ValueError("cut short: no end mark")
        code, step = words[k] >> 10, words[k] & 0x3FF
        k += 1
        if code == 0 and step == 0:
            break
        if code == SKIP and k + 1 < len(words):                    # a signed long, its upper half first
            long = words[k] << 16 | words[k + 1]
            time, k = time + long - (long >> 31 << 32), k + 2
        elif code == AUX:                                          # text of the last annotation, `step` bytes of it
            text = data[2 * k:2 * k + step].rstrip(b"\0 ")
            k += (step + 1) // 2
            if symbols and symbols[-1] == b"+":
                symbols[-1] = text
        elif code < NUM:                                           # beyond: subtype, channel, number
            time += step
            if code not in ANNOTATION_SYMBOLS or time < (samples[-1] if samples else 0):
                raise ValueError(f"code {code} at sample {time}")
            samples.append(time)
            symbols.append(ANNOTATION_SYMBOLS[code].encode())
    events = np.empty(len(samples), [("sample", "<i8"), ("symbol", "S6")])
    events["sample"], events["symbol"] = samples, symbols
    return events


def drop_unusable_leads(signal_mv, ids, changes):
    """Drop leads without signal, trim ends that no lead has, name every lead once; what was done is counted.

    Returns int16 (L, T), lead ids (L,) and the sample at which the recording begins now.
    """
    valid = np.isfinite(signal_mv)
    keep = np.flatnonzero(valid.sum(axis=1) >= MIN_VALID_S * FS)
    if not len(keep):
        raise Refused("too short", f"{valid.any(axis=0).sum() / FS:.2f} s of signal, at least {MIN_VALID_S} s needed")
    changes["leads dropped: flat, empty or below 2 s of signal"] += len(ids) - len(keep)
    changes["leads dropped: more than 16"] += max(0, len(keep) - MAX_LEADS)
    keep = keep[:MAX_LEADS]
    signal_mv, ids, valid = signal_mv[keep], ids[keep], valid[keep]
    used = np.flatnonzero(valid.any(axis=0))
    start, stop = used[0], used[-1] + 1
    start = start if start >= PAD_S * FS else 0  # a few missing samples are no padding
    stop = stop if valid.shape[1] - stop >= PAD_S * FS else valid.shape[1]
    changes["recordings trimmed"] += bool(start or stop < valid.shape[1])
    signal_mv = signal_mv[:, start:stop]
    for i in range(1, len(ids)):
        if ids[i] and ids[i] in ids[:i]:  # two channels of one name cannot both be that lead
            ids[i] = 0
            changes["leads renamed unknown: a second one of the name"] += 1
    steps = to_int16(signal_mv)
    changes["samples missing"] += int((steps == MISSING).sum())
    return steps, ids, int(start)


@contextlib.contextmanager
def atomic_folder(out):
    """A folder to write into that becomes `out` at the end, and leaves nothing behind if anything goes wrong."""
    refuse_existing(out)
    out = out.resolve()
    part = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_existing(out):
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is already there: to make it anew, delete it (rm -r {out}); else name another folder")


@contextlib.contextmanager
def only_writer(part):
    """A lock on `part` for as long as this process lives, however it ends."""
    import fcntl  # not on Windows, where nothing else here is in the way
    with open(part / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another prepare.py is writing {part}: wait for it, or end it") from None
        yield


def write_corpus(source, raw, out, args, command):
    """Prepare all recordings of `source` under `raw` into `out`, or go on with what OUT.part holds; returns the
    manifest, None for a dry run."""
    refuse_existing(out)
    part = part_of(out)
    part.mkdir(parents=True, exist_ok=True)
    with only_writer(part):
        try:
            begun = json.loads((part / "plan.json").read_text()) if (part / "plan.json").exists() else None
            if begun and not args.dry_run:
                plan = check_plan(source, part, begun, command)
            else:
                plan = make_plan(source, raw, part, args, command)
        except BaseException:
            if not begun:                                          # nothing was prepared yet: leave nothing behind
                shutil.rmtree(part, ignore_errors=True)
            raise
        if args.dry_run:
            return None if begun else shutil.rmtree(part)
        if not (part / "manifest.json").exists():
            finish_shards(source, part, plan, args.workers or os.cpu_count())
            assemble(source, part, plan, command)
        shutil.rmtree(part / "done", ignore_errors=True)
        # The plan last: as long as it is there, this goes on. dry.jsonl: of a dry run that was killed.
        for name in ("dry.jsonl", "jobs.jsonl", "lock", "plan.json"):
            (part / name).unlink(missing_ok=True)
        if out.exists():
            out.rmdir()                                            # empty, as refuse_existing has seen
        part.rename(out.resolve())
    return json.loads((out / "manifest.json").read_text())


def check_plan(source, part, plan, command):
    """The plan of an interrupted run, if it was the same command."""
    if plan.get("command") != command or plan.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{part} holds an unfinished run of `{plan.get('command')}`, and this is `{command}`: finish "
                         f"that one, or delete it (rm -r {part})")
    print(f"{source}: going on, {len(list((part / 'done').glob('*.npz')))} of {n_shards(plan)} shards are done")
    return plan


def make_plan(source, raw, part, args, command):
    """List the jobs, once, into OUT.part, and estimate what they cost: {"jobs", "shard_jobs", "notes", "command"}."""
    jobs, notes, n = part / ("dry.jsonl" if args.dry_run else "jobs.jsonl"), {}, 0
    with open(jobs, "w") as file, tqdm(desc="listing", unit=" records", disable=None) as bar:
        for job in itertools.islice(LISTERS[source](raw, args, notes), args.limit or None):
            file.write(json.dumps(job) + "\n")
            n += 1
            bar.update()
    if not n:
        raise ValueError(f"no {source} recordings under {raw}: expected WFDB headers (*.hea) there, or add --download")
    n_bytes, seconds = estimate_cost(source, jobs, n)
    workers, free = args.workers or os.cpu_count(), shutil.disk_usage(part).free
    print(f"{source}: {n:,} recordings to read; about {n_bytes * n / 1e9:.3g} GB on disk ({free / 1e9:.0f} GB are free) "
          f"and {duration(seconds * n / workers)} on {workers} cores")
    if args.dry_run:
        return jobs.unlink()
    if n_bytes * n > free:
        raise ValueError(f"{n:,} recordings need about {n_bytes * n / 1e9:.1f} GB, and where {part.parent} lies "
                         f"{free / 1e9:.1f} GB are free: name another --out, or prepare fewer (--limit)")
    plan = {"command": command, "format_version": FORMAT_VERSION, "jobs": n, "notes": notes, "shard_jobs": max(1, min(
        int(SHARD_BYTES // max(n_bytes, 1)), -(-n // SHARDS_AT_LEAST)))}
    for name in ("signal", "done", *(["events"] if source in ANNOTATED else [])):
        (part / name).mkdir(exist_ok=True)
    atomic_write(part / "plan.json", json.dumps(plan).encode())
    return plan


def estimate_cost(source, jobs, n):
    """Mean bytes of signal and seconds of a few recordings out of n."""
    chosen, sizes, start = set(np.linspace(0, n - 1, ESTIMATE_RECORDINGS).astype(int).tolist()), [], time.perf_counter()
    with open(jobs) as file:
        for i, line in enumerate(file):
            if i in chosen:
                with contextlib.suppress(Refused):
                    sizes.append(prepare_recording(Job(*json.loads(line)), ANNOTATED.get(source)).steps.nbytes)
    return np.mean(sizes or [0.0]), (time.perf_counter() - start) / len(chosen)


def duration(seconds):
    """12 s, 5 min, 3.4 h"""
    return (f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else
            f"{seconds / 3600:.1f} h")


def n_shards(plan):
    return -(-plan["jobs"] // plan["shard_jobs"])


def finish_shards(source, part, plan, workers):
    """Prepare the shards that are not done, `workers` at a time; the jobs of at most two shards per worker are in
    memory."""
    done = {int(path.stem) for path in (part / "done").glob("*.npz")}
    totals = Counter()
    with tqdm(total=plan["jobs"], unit=" records", disable=None) as bar:
        def count(result):
            totals.update(result)
            bar.set_postfix(hours=f"{totals['samples'] / FS / 3600:.1f}", GB=f"{totals['bytes'] / 1e9:.2f}",
                            rejected=totals["rejected"], refresh=False)
            bar.update(result["jobs"])
        bar.update(min(plan["jobs"], len(done) * plan["shard_jobs"]))
        bar.initial = bar.n                                        # what was done before says nothing about the speed
        todo = ((source, part, k, jobs) for k, jobs in shard_jobs(part, plan) if k not in done)
        workers = min(workers, n_shards(plan) - len(done))
        if workers <= 1:
            for task in todo:
                count(prepare_shard(*task))
            return
        # Unlike multiprocessing.Pool, the executor raises if a worker is killed (out of memory), not waits for ever.
        pool, running = ProcessPoolExecutor(workers, initializer=start_worker), set()
        try:
            for task in todo:
                running.add(pool.submit(prepare_shard, *task))
                if len(running) >= 2 * workers:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        count(future.result())
            for future in as_completed(running):
                count(future.result())
        except BrokenProcessPool:
            raise OSError(f"one of the {workers} workers was killed, most often because memory ran out: "
                          "try again with a smaller --workers") from None
        finally:
            if sys.exc_info()[0] is not None:                      # do not wait for shards that are half way
                for worker in multiprocessing.active_children():
                    worker.terminate()
            pool.shutdown(cancel_futures=True)


def shard_jobs(part, plan):
    """(number, jobs) of every shard, in order."""
    with open(part / "jobs.jsonl") as file:
        for k in range(n_shards(plan)):
            yield k, [Job(*json.loads(line)) for line in itertools.islice(file, plan["shard_jobs"])]


def prepare_shard(source, part, number, jobs):
    """Prepare the recordings of a shard, and write it; returns its totals."""
    rows, records, patients, fingerprints, events, rejects = [], [], [], [], [], []
    changes, digest, offset, n_events, totals = Counter(), hashlib.sha256(), 0, 0, Counter(jobs=len(jobs))
    path = part / "signal" / f"{number:05d}.i16"
    try:
        with open(path, "wb") as file:
            for job in jobs:
                try:
                    got = prepare_recording(job, ANNOTATED.get(source))
                except Refused as error:
                    rejects.append((job.record, error.reason, str(error)))
                    continue
                data = got.steps.tobytes()
                file.write(data)
                digest.update(data)
                length, n_leads = got.steps.shape[1], len(got.leads)
                rows.append((number, offset, length, n_leads, np.pad(got.leads, (0, MAX_LEADS - n_leads)),
                             SPLITS.index(job.split), job.label, 0, got.fs_hz, n_events, len(got.events)))
                records.append(job.record.encode())
                patients.append(job.patient.encode())
                fingerprints.append(fingerprint(got.steps, got.leads))
                events.append(got.events)
                offset, n_events = offset + got.steps.size, n_events + len(got.events)
                changes += got.changes
                totals["samples"] += length
            file.flush()
            os.fsync(file.fileno())
        sums = {f"signal/{path.name}": digest.hexdigest()}
        if source in ANNOTATED:
            target = part / "events" / f"{number:05d}.npy"
            np.save(target, np.concatenate([NO_EVENTS, *events]))
            sums[f"events/{target.name}"] = sha256(target)
    except OSError:
        path.unlink(missing_ok=True)                               # on a full disk, room for whatever comes next
        raise
    buffer = io.BytesIO()
    about = {"rejects": rejects, "changes": changes, "sha256": sums, "bytes": 2 * offset}
    np.savez(buffer, index=np.array(rows, INDEX_DTYPE), records=np.array(records, RECORD_DTYPE),
             patients=np.array(patients, PATIENT_DTYPE),
             fingerprints=np.array(fingerprints, np.uint8).reshape(len(rows), FINGERPRINT_BYTES),
             about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    atomic_write(part / "done" / f"{number:05d}.npz", buffer.getvalue())
    return totals + Counter(rejected=len(rejects), bytes=2 * offset)


def assemble(source, part, plan, command):
    """Put the indices of all shards together: index.npy, records.npy, patients.npy, rejects.csv, manifest.json."""
    shards = [part / "done" / f"{k:05d}.npz" for k in range(n_shards(plan))]
    counts, rejected, changes, sums, sizes, first = [], Counter(), Counter(), {}, {}, None
    with open(part / "rejects.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("record", "reason", "detail"))
        for path in shards:
            with np.load(path) as shard:
                counts.append(len(shard["patients"]))
                about = json.loads(shard["about"].tobytes())
            writer.writerows(about["rejects"])
            first = first or (about["rejects"] or [None])[0]
            rejected += Counter(reason for _, reason, _ in about["rejects"])
            changes += Counter(about["changes"])
            sums |= about["sha256"]
            sizes[f"{path.stem}.i16"] = about["bytes"]
    try:
        if not sum(counts):
            raise ValueError(f"none of the {plan['jobs']} recordings could be used: {dict(rejected)}; "
                             f"the first: {first}")
        index, n_records = gather_index(part, shards, counts)
        manifest = make_manifest(source, index, n_records, plan["notes"], command)
    except ValueError:                                             # it would be no other the next time
        shutil.rmtree(part)
        raise
    sums |= {name: sha256(part / name)
             for name in ("index.npy", "records.npy", "patients.npy", "fingerprints.npy", "rejects.csv")}
    manifest |= {"rejected": dict(sorted(rejected.items())), "changed": dict(sorted(changes.items())),
                 "shard_bytes": sizes, "sha256": sums}
    atomic_write(part / "manifest.json", (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def gather_index(part, shards, counts):
    """Write index.npy, records.npy, fingerprints.npy and patients.npy shard by shard; returns the index and the number of
    records, which may have several recordings one after the other. In memory are the patients' names, 32 bytes per
    recording."""
    n = sum(counts)
    tables = dict(index=(INDEX_DTYPE, (n,)), records=(RECORD_DTYPE, (n,)), fingerprints=(np.uint8, (n, FINGERPRINT_BYTES)))
    index, records, fingerprints = (np.lib.format.open_memmap(part / f"{name}.npy", "w+", *what)
                              for name, what in tables.items())
    patients, stop = np.empty(n, PATIENT_DTYPE), 0
    for path, count in zip(shards, counts):
        with np.load(path) as shard:
            rows, stop = slice(stop, stop + count), stop + count
            index[rows], records[rows], patients[rows] = shard["index"], shard["records"], shard["patients"]
            fingerprints[rows] = shard["fingerprints"]
    patients, index["patient"] = np.unique(patients, return_inverse=True)
    np.save(part / "patients.npy", patients)
    for table in (index, records, fingerprints):
        table.flush()
    return index, 1 + int((records[1:] != records[:-1]).sum())


def start_worker():
    """A worker leaves signals to its parent, and ends with it, however that ends."""
    os_signal.signal(os_signal.SIGINT, os_signal.SIG_IGN)
    os_signal.signal(os_signal.SIGTERM, os_signal.SIG_DFL)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def make_manifest(source, index, n_records, notes, command):
    """All that a reader of the corpus should know, as a plain dict. No date in it: the same recordings give the same
    bytes."""
    by_split = [index[index["split"] == i] for i in range(len(SPLITS))]
    patients = [np.unique(rows["patient"]) for rows in by_split]
    _, splits_of = np.unique(np.concatenate(patients), return_counts=True)
    overlap = int((splits_of > 1).sum())
    if overlap:
        raise ValueError(f"{overlap} patients are in more than one split, so training would see patients of the test; "
                         "check the source's table of folds")
    return {
        "magic": MAGIC, "format_version": FORMAT_VERSION, "source": source, "fs_hz": FS,
        "units": f"int16 little-endian, 1 uV per step, {MISSING} = missing", "leads": LEADS, "labels": SUPERCLASSES,
        "recordings": len(index), "records": n_records,
        "recordings_per_split": dict(zip(SPLITS, map(len, by_split))),
        "hours_per_split": {name: round(float(rows["length"].sum(dtype=np.int64)) / FS / 3600, 3)
                            for name, rows in zip(SPLITS, by_split)},
        "patients_per_split": dict(zip(SPLITS, map(len, patients))), "patients_in_two_splits": overlap,
        "leak_note": LEAK_NOTES[source], "notes": notes, "command": command,
        "versions": {"numpy": np.__version__, "scipy": scipy.__version__, "wfdb": wfdb.__version__}}


def damaged_files(raw, wanted=".*"):
    """Names that SHA256SUMS.txt in `raw` lists, that match `wanted` in full, and that are absent or differ here."""
    if not (raw / "SHA256SUMS.txt").is_file():
        raise ValueError(f"no SHA256SUMS.txt in {raw}: the publisher's is fetched by --download")
    lines = (raw / "SHA256SUMS.txt").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines if line.strip())}
    names = [name for name in sums if re.fullmatch(wanted, name)]
    if not names:
        raise ValueError(f"{raw / 'SHA256SUMS.txt'} lists no file like {wanted}: is it another database's?")
    return [name for name in tqdm(names, desc="checking", unit=" files", disable=None)
            if not (raw / name).is_file() or sha256(raw / name) != sums[name]]


def verify_checksums(raw, wanted=".*"):
    """Raise ValueError, naming the files, unless `raw` agrees with the publisher's SHA256SUMS.txt that lies in it."""
    bad = damaged_files(Path(raw), wanted)
    if bad:
        raise ValueError(f"{len(bad)} files in {raw} are absent or differ from the publisher's SHA256SUMS.txt: "
                         f"{', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}; run again with --download")


def download(source, raw, rate):
    """Fetch from PhysioNet what `raw` does not have yet, and check all of it against the publisher's checksums."""
    database, wanted = PHYSIONET[source]
    wanted = wanted.replace("RATE", "500" if rate == "auto" else rate)
    fetch(database, raw, ["SHA256SUMS.txt"])
    names = damaged_files(raw, wanted)
    for name in names:
        (raw / name).unlink(missing_ok=True)  # wfdb would append to a file that is shorter than the publisher's
    with tqdm(total=len(names), desc="fetching", unit=" files", disable=None) as bar:
        for i in range(0, len(names), 100):
            fetch(database, raw, names[i:i + 100])
            bar.update(len(names[i:i + 100]))
    verify_checksums(raw, wanted)


def fetch(database, raw, names):
    """wfdb.dl_files without the two lines that it prints per call, and with one kind of error."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            wfdb.dl_files(database, str(raw), names, overwrite=True)
    except Exception as error:  # whatever layer of the network failed
        raise ValueError(f"could not fetch {names[0]} ... of {database} from physionet.org ({type(error).__name__}: "
                         f"{error}): run again, what is complete is kept; or copy the files to {raw} by hand and leave "
                         "--download out") from None


OVERVIEW_RECORDINGS = 2000  # that the histograms of a sheet are made from, chosen at random


def check(dirs):
    """Verify corpora, print what several of them share, draw DIR/check.png for each; the number of faults found."""
    corpora, faults = [open_corpus(dir) for dir in dirs], 0
    for corpus in corpora:
        print(summary(corpus.manifest, corpus.dir))
        found = [*damaged_shards(corpus), *index_faults(corpus)]
        faults += len(found)
        for fault in found:
            print(f"  DAMAGED: {fault}")
        if not found:
            draw_overview(corpus, corpus.dir / "check.png")
            print(f"  sheet: {corpus.dir / 'check.png'}")
    for corpus, (leaks, twice) in zip(corpora, rows_to_leave_out(corpora)):
        for rows, what in ((leaks, "are copies of held-out recordings"), (twice, "are second copies")):
            if len(rows):
                names = ", ".join(corpus.records[rows[:5]].astype(str))
                print(f"{corpus.dir}: {len(rows):,} recordings of split train {what}, of these corpora: {names}"
                      f"{' ...' if len(rows) > 5 else ''}; train.py leaves them out when it is given the same corpora")
    print(f"{len(corpora)} corpora, {faults} faults")
    return faults


def damaged_shards(corpus):
    """Files that are absent or differ from the manifest's checksums."""
    sums = corpus.manifest["sha256"].items()
    for name, digest in tqdm(sums, desc=f"checking {corpus.dir}", unit=" files", disable=None):
        path = corpus.dir / name
        found = sha256(path) if path.is_file() else "no such file"
        if found != digest:
            yield f"{name}: sha256 {found}, the manifest says {digest}"


def index_faults(corpus):
    """What cannot be true of an index."""
    index = corpus.index
    size = index["n_leads"].astype(np.int64) * index["length"]
    samples = np.array([n // 2 for n in corpus.manifest["shard_bytes"].values()])
    wrong = {"reaches beyond its shard": index["offset"] + size > samples[np.minimum(index["shard"], len(samples) - 1)],
             "is in a shard that is not there": index["shard"] >= len(samples),
             "has no lead or no sample": size <= 0,
             "has a lead that is not known": (index["leads"] >= len(LEADS)).any(axis=1),
             "has a split that is not known": index["split"] >= len(SPLITS),
             "has a patient that is not known": index["patient"] >= len(corpus.patients)}
    for what, rows in wrong.items():
        if rows.any():
            yield f"{rows.sum():,} recordings, the first {corpus.records[np.argmax(rows)].decode()}: it {what}"
    pairs = np.unique(index["patient"].astype(np.int64) * len(SPLITS) + index["split"]) // len(SPLITS)
    if len(set(pairs.tolist())) < len(pairs):
        yield f"{len(pairs) - len(set(pairs.tolist()))} patients are in more than one split"


def heart_rate_bpm(lead):
    """60 / the median distance of R waves in a lead (T,) in mV at FS; NaN if there are fewer than three."""
    band = scipy.signal.butter(2, (5, 20), "band", fs=FS, output="sos")
    steep = scipy.signal.sosfiltfilt(band, lead) ** 2
    steep = np.convolve(steep, np.ones(FS // 10) / (FS // 10), "same")
    peaks, _ = scipy.signal.find_peaks(steep, height=0.3 * np.percentile(steep, 98), distance=FS // 4)
    return 60 * FS / np.median(np.diff(peaks)) if len(peaks) > 2 else np.nan


def draw_overview(corpus, path):
    """check.png: hours by lead set, rate and length; amplitudes and heart rates; six recordings at random."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    index, rng = corpus.index, np.random.default_rng(0)
    hours = index["length"] / FS / 3600
    sets, of_set = np.unique(np.where(np.arange(MAX_LEADS) < index["n_leads"][:, None], index["leads"], 255), axis=0,
                             return_inverse=True)
    names = [" ".join(LEADS[k] for k in row if k < len(LEADS)) for row in sets]
    names = [f"{len(name.split())} leads" if len(name) > 16 else name for name in names]
    edges = np.array([0, 5, 9, 11, 20, 60, 600, 3600, np.inf])
    lengths = [f"{a:g} to {b:g} s" for a, b in zip(edges[:-1], edges[1:])]
    seconds = index["length"] / FS
    bars = {"leads": (names, np.bincount(of_set.ravel(), hours, len(names))),
            "original rate": ([f"{fs:g} Hz" for fs in np.unique(index["fs_hz"])],
                              np.bincount(np.unique(index["fs_hz"], return_inverse=True)[1], hours)),
            "length": (lengths, np.histogram(seconds, edges, weights=hours)[0])}
    rows = np.sort(rng.choice(len(index), min(OVERVIEW_RECORDINGS, len(index)), replace=False))
    leads = [shown_lead(corpus, i) for i in rows]
    figure, axes = plt.subplot_mosaic("aabbcc;dddeee;ffffff;gggggg;hhhhhh;iiiiii;jjjjjj;kkkkkk", figsize=(11, 14),
                                      height_ratios=[2, 2, 1, 1, 1, 1, 1, 1], layout="constrained")
    for key, (title, (labels, values)) in zip("abc", bars.items()):
        top = np.argsort(-values)[:6]
        top = top[values[top] > 0]
        axes[key].barh([labels[k] for k in top][::-1], values[top][::-1], color="0.4")
        axes[key].set_title(f"hours by {title}", loc="left", fontsize=10)
        for place, k in enumerate(top[::-1]):
            axes[key].text(values[k], place, f" {values[k]:.3g}", va="center", fontsize=8)
        axes[key].margins(x=0.2)
    peaks = [np.percentile(np.abs(x - np.median(x)), 99.5) for x, _ in leads]
    rates = [heart_rate_bpm(x) for x, _ in leads if len(x) > 3 * FS]
    axes["d"].hist(np.clip(peaks, 0, 4), 60, (0, 4), color="0.4")
    axes["d"].set_title("lead II, 99.5th percentile, mV (last bar: 4 and more)", loc="left", fontsize=10)
    axes["e"].hist(np.clip([r for r in rates if np.isfinite(r)], 0, 200), 60, (0, 200), color="0.4")
    axes["e"].set_title("heart rate, 1/min", loc="left", fontsize=10)
    for key, k in zip("fghijk", np.sort(rng.choice(len(rows), min(6, len(rows)), replace=False))):
        x, name = leads[k]
        axes[key].plot(np.arange(len(x[:10 * FS])) / FS, x[:10 * FS], color="k", lw=0.7)
        axes[key].set_title(f"{corpus.records[rows[k]].decode()}, {name}, mV", loc="left", fontsize=9, pad=2)
        axes[key].margins(x=0)
    axes["k"].set_xlabel("s")
    figure.suptitle(f"{corpus.dir.name}: {corpus.manifest['source']}, {len(index):,} recordings, {hours.sum():,.1f} h")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    plt.close(figure)
    atomic_write(path, buffer.getvalue())


def shown_lead(corpus, i):
    """Lead II, or else the first, of up to a minute in the middle of recording i, in mV, and its name."""
    n_leads = corpus.index["n_leads"][i]
    ids, length = corpus.index["leads"][i][:n_leads], int(corpus.index["length"][i])
    k, n = int(np.argmax(ids == LEAD_IDS["II"])), min(length, 60 * FS)
    lead = corpus.read(i, (length - n) // 2, n)[k]
    return np.where(lead == MISSING, 0, lead) / UV_PER_MV, LEADS[ids[k]]


HELP = """\
sources
  ptbxl       PTB-XL 1.0.3: 21,799 12-lead ECGs of 10 s with labels; folds 1-8 train, 9 val, 10 test  (--download: 3 GB)
  mitdb       MIT-BIH Arrhythmia Database: 48 two-lead recordings of 30 min; DS2 is test             (--download: 100 MB)
  nstdb       MIT-BIH Noise Stress Test Database: the noise records bw, em, ma                        (--download: 40 MB)
  heedb       Harvard-Emory ECG Database: 11.6 million 12-lead ECGs; --raw holds ECG/WFDB and the publisher's tables
  code15      CODE-15%: 345,779 exams; --raw holds exams_part*.hdf5 and exams.csv (needs pip install h5py)
  code        the whole of CODE as WFDB: TNMG{exam}_N{k} and annotations.csv
  icentia11k  Icentia11k: 11,000 patients, one lead, 541,794 segments of 70 minutes; beats and rhythms are kept beside
  wfdb        any folder of WFDB records (*.hea, in all subfolders); every channel in volts counts as a lead; what is a
              copy of PTB-XL or DS2 by its name becomes test; --patients says whose recording each is
  synth       synthetic ECGs, written to --raw in the layouts of the first three, then prepared by their readers

the result, in OUT (for synth in OUT/ptbxl, OUT/mitdb and OUT/nstdb)
  signal/        int16 at 250 Hz, 1 uV per step, -32768 = missing; for every recording one (leads, samples) block
  events/        icentia11k alone: beats and rhythms, by sample at 250 Hz
  index.npy      a row per recording: where it is, its leads, split, patient, label; records.npy and patients.npy: names
  manifest.json  what this is: counts, hours, what was rejected or changed, leak rules, checksums, the command
  rejects.csv    every recording that could not be used, and why
While it is made it stands in OUT.part. After an interruption of any kind the same command goes on there.

afterwards
  python prepare.py check DIR [DIR ...]    verify checksums, index and splits, print what corpora have in common and what
                                           must not be trained on, and draw DIR/check.png

examples
  python prepare.py synth --raw data/raw/synth --out data/synth
  python prepare.py ptbxl --raw data/raw/ptbxl --out data/ptbxl --download
  python prepare.py heedb --raw /data/heedb    --out data/heedb --dry-run
  python prepare.py wfdb  --raw my_ecgs        --out data/mine --workers 8 --patients my_patients.csv
"""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the flags, and the description as it is written."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="prepare.py", description="Turn raw ECG recordings into one corpus on disk, once. Training only reads it.",
        epilog=HELP, allow_abbrev=False, formatter_class=HelpFormatter)
    parser.add_argument("source", choices=SOURCES, help="what lies in --raw, see below")
    parser.add_argument("--raw", type=Path, required=True, default=argparse.SUPPRESS,
                        help="folder of the raw recordings, in their publisher's layout; only synth writes to it")
    parser.add_argument("--out", type=Path, required=True, default=argparse.SUPPRESS,
                        help="folder to make; if it exists already, delete it first")
    parser.add_argument("--download", action="store_true",
                        help="first fetch what --raw lacks from PhysioNet and check it against SHA256SUMS.txt")
    parser.add_argument("--workers", type=int, default=0,
                        help="processes; 0 = one per CPU core; the result is the same for any number")
    parser.add_argument("--limit", type=int, default=0, help="prepare only the first so many recordings; 0 = all")
    parser.add_argument("--dry-run", action="store_true",
                        help="say how many recordings there are, what disk and time they need, and write nothing")
    parser.add_argument("--patients", type=Path,
                        help="wfdb only: CSV table with a column record (the path in --raw, or its last part) and a "
                             "column patient")
    parser.add_argument("--rate", choices=("auto", "100", "500"), default="auto",
                        help="ptbxl only: which copy to read, in Hz; auto = 500 if all of it is there, else 100")
    parser.add_argument("--records", type=int, default=SYNTH_RECORDS, help="synth only: number of 12-lead recordings")
    parser.add_argument("--seed", type=int, default=0, help="synth only: the same seed makes the same recordings")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """End with a usage message where flags do not go together."""
    if args.download and args.source not in PHYSIONET:
        parser.error(f"--download: {args.source} is no PhysioNet database; it works for {', '.join(PHYSIONET)}")
    if args.source != "ptbxl" and args.rate != "auto":
        parser.error(f"--rate is for ptbxl; {args.source} records are read at the rate that their headers give")
    if args.source != "synth" and (args.records, args.seed) != (SYNTH_RECORDS, 0):
        parser.error(f"--records and --seed are for synth; of {args.source} every record is prepared")
    if args.records < 1 or args.workers < 0 or args.seed < 0 or args.limit < 0:
        parser.error("--records must be at least 1, --workers, --seed and --limit at least 0")
    if args.source == "synth" and (args.limit or args.dry_run):
        parser.error("--limit and --dry-run are for recordings that exist; for synth there is --records")
    if args.patients and (args.source != "wfdb" or not args.patients.is_file()):
        parser.error(f"--patients {args.patients}: " + ("there is no such file" if args.source == "wfdb" else
                                                        f"{args.source} knows its patients; it is for wfdb"))
    if args.source != "synth" and not args.download and not args.raw.is_dir():
        parser.error(f"--raw {args.raw} is no folder")


def command_of(args):
    """The command line that makes this corpus again."""
    extra = {"synth": ["--records", args.records, "--seed", args.seed], "ptbxl": ["--rate", args.rate]}
    words = ["python", "prepare.py", args.source, "--raw", args.raw, "--out", args.out, *extra.get(args.source, []),
             *(["--limit", args.limit] if args.limit else []), *(["--patients", args.patients] if args.patients else [])]
    return shlex.join(map(str, words))


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
    if args.source == "synth":
        refuse_existing(args.out)
        with atomic_folder(args.raw) as raw, atomic_folder(args.out) as out:
            synthesize(raw, args.records, args.seed)
            manifests = {source: write_corpus(source, raw / source, out / source, args, command)
                         for source in ("ptbxl", "mitdb", "nstdb")}
    else:
        refuse_existing(args.out)
        if args.download:
            download(args.source, args.raw, args.rate)
        manifests = {"": write_corpus(args.source, args.raw, args.out, args, command)}
    for name, manifest in manifests.items():
        if manifest:
            print(summary(manifest, args.out / name))


def end_of_run(args, error):
    """The last line of a run that did not come to its end: what was wrong, and what is kept."""
    part = part_of(args.out)
    kept = len(list((part / "done").glob("*.npz"))) if (part / "plan.json").exists() else 0
    return f"prepare.py: {error}" + (f"; {kept} finished shards are kept in {part}, the same command goes on from there"
                                     if kept else ", nothing was written" if isinstance(error, Interrupted) else "")


class Interrupted(BaseException):  # not an Exception: no reader may take it for a damaged file
    """By Ctrl-C or SIGTERM."""


def interrupt(number, frame):
    raise Interrupted("interrupted" if number == os_signal.SIGINT else "terminated")


def run_check(argv):
    parser = argparse.ArgumentParser(
        prog="prepare.py check", description="Verify prepared corpora, print what they have in common, and draw "
        "DIR/check.png for each: hours by leads, rate and length, amplitudes, heart rates, six recordings.")
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR")
    try:
        sys.exit(bool(check(parser.parse_args(argv).dirs)))
    except (ValueError, OSError, Interrupted) as error:
        sys.exit(f"prepare.py: {error}")


def run_command():
    for number in (os_signal.SIGINT, os_signal.SIGTERM):
        os_signal.signal(number, interrupt)
    if sys.argv[1:2] == ["check"]:
        run_check(sys.argv[2:])
    args = parse_args()
    try:
        main(args)
    except (ValueError, OSError, Interrupted) as error:  # OSError: disk full, no permission
        sys.exit(end_of_run(args, error))


if __name__ == "__main__":
    run_command()
