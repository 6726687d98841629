"""Publishers' folders to corpora: turn raw recordings into one corpus on disk, once.

    python prepare.py SOURCE --raw DIR --out DIR           (python prepare.py --help lists the sources and examples)

Writes OUT/signal/00000.i16 ... (the samples, in shards), OUT/index.npy (one row per recording), OUT/manifest.json (what
this corpus is, what was rejected and why, checksums) and OUT/rejects.csv. Until all is done, the files are in OUT.part.
After an interruption the same command continues there and ends with the same bytes. A sample takes 2 bytes on disk: 10 s
of 12 leads take 60 kB. An estimate of disk and time is printed before anything is written (--dry-run: nothing else).

Every recording goes through ecg.preprocess, which the probes and encoder.embed call too.

Shapes: L leads, T samples (at FS unless said otherwise), N recordings, K annotations.
"""
import argparse
import ast
import contextlib
import csv
import datetime
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

from corpus import (EVENT_DTYPE, FINGERPRINT_BYTES, FORMAT_VERSION, INDEX_DTYPE, MAGIC, NO_EVENTS, PATIENT_DTYPE,
                    RECORD_DTYPE, SPLITS, SUPERCLASSES, fingerprint, open_corpus, part_of, rows_to_leave_out)
from ecg import (FS, LEAD_IDS, LEADS, MAX_LEADS, MISSING, PAD_S, UV_PER_MV, Recording, Refused, atomic_write,
                 header_lines, preprocess, read_wfdb, sha256)
from synth import synthesize

MIN_VALID_S = 2.0                # s of signal that a lead, and so a recording, needs to be kept
SHARD_BYTES = 256 * 2**20        # of signal, about; so 12 million recordings are 2,800 files
SHARDS_AT_LEAST = 64             # if there are as many recordings, so that a small corpus is shared among cores too
ESTIMATE_RECORDINGS = 5          # recordings that are read first, to estimate disk and time
OVERVIEW_RECORDINGS = 2000       # chosen at random, for the histograms of check.png
ROW_DTYPE = np.dtype([           # what a finished shard keeps of a recording until the index is written
    ("index", INDEX_DTYPE), ("record", RECORD_DTYPE), ("patient", PATIENT_DTYPE),
    ("fingerprint", "u1", (FINGERPRINT_BYTES,))])
# MIT-BIH inter-patient split: de Chazal et al., IEEE TBME 51(7), 2004. The rest of the 48 are the four paced records.
MITDB_DS1 = "101 106 108 109 112 114 115 116 118 119 122 124 201 203 205 207 208 209 215 220 223 230".split()
MITDB_DS2 = "100 103 105 111 113 117 121 123 200 202 210 212 213 214 219 221 222 228 231 232 233 234".split()
MITDB_PACED = "102 104 107 217".split()
MITDB_HELD_OUT = {*MITDB_DS2, "201"}  # 201 is the same person as 202, which is in DS2
# A folder of loose WFDB records may hold copies of the test sets: Challenge 2021's HRn is PTB-XL's ecg_id n.
HELD_OUT_COPY = re.compile(r"HR\d{5}|\d{5}_[lh]r|" + "|".join(sorted(MITDB_HELD_OUT)))
NOISE_S = 30 * 60                # s of an NSTDB record that are used: minutes 0-20 to train with, 20-30 to test with
NOISE_PARTS = (("train", 0, 2 / 3), ("test", 2 / 3, 1))  # as shares, so that a shorter record is split in the same way
SYNTH_RECORDS = 600              # default number of synthetic 12-lead recordings
PHYSIONET = {                    # database, and the files of it that are needed
    "ptbxl": ("ptb-xl", r"recordsRATE/.*|[^/]*\.csv|LICENSE\.txt"),
    "mitdb": ("mitdb", r"\d{3}\.(hea|dat|atr)|RECORDS"),
    "nstdb": ("nstdb", r"[^/]*\.(hea|dat|atr)|RECORDS")}
HASHED_SPLIT = {"val": 1, "test": 1}  # per cent of the patients, for sources without a split of their own
CODE_LEADS = ("DI", "DII", "DIII", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")  # of code15's columns
CODE_FS = 400
CODE_SCALES = {"mV": 1.0, "1e-4 V": 0.1, "uV": 1e-3}  # units that code15 may be in, as factors to mV
ANNOTATED = {"icentia11k": "atr"}  # sources whose annotations are kept
ANNOTATION_SYMBOLS = {label.label_store: label.symbol for label in wfdb.io.annotation.ann_labels}
SKIP, NUM, AUX = 59, 60, 63      # codes of annot(5) that are no symbols
PATIENT_COLUMNS = (("record", "path", "file_name", "FileName"),  # names that --patients may use
                   ("patient", "patient_id", "subject_id", "BDSPPatientID"))
NO_PATIENT = "records that the table of patients does not name, each a patient of its own"
HASHED_NOTE = "by a hash of the patient 1 % of the patients are val and 1 % test: pre-train on the train split only"
LEAK_NOTES = {
    **dict.fromkeys(("heedb", "code15", "code", "icentia11k"), HASHED_NOTE),
    "ptbxl": "folds 1-8 are train, fold 9 is val, fold 10 is test: pre-train on the train split only",
    "mitdb": "DS2 is the test split and is never pre-trained on; 201 is held out with it, being the same person as 202 "
             "(DS2); the paced records 102 104 107 217 are in the train split",
    "nstdb": "of each noise record minutes 0-20 are train and minutes 20-30 test",
    "wfdb": "all train, one patient per record unless --patients names them, but copies of evaluation data, told by "
            "their names, are test: HRnnnnn (Challenge 2021's PTB-XL), nnnnn_lr and nnnnn_hr (PTB-XL), MIT-BIH's DS2 "
            "and 201"}


# ---------------------------------------------------------------------------------------------------------------------
# sources: which recordings there are

class Job(NamedTuple):
    """One recording to prepare."""
    path: str                    # WFDB record without suffix, or an HDF5 file
    record: str
    patient: str
    split: str
    label: int = 0
    n_channels: int = 0          # that the source promises; 0 = anything
    part: tuple | None = None    # from, to: shares of the first NOISE_S
    row: int = -1                # in the HDF5 file
    scale: float = 1.0           # factor to mV
    reject: tuple | None = None  # reason, detail: why it cannot be used, if the lister knows that already


# A lister yields the jobs of a source in an order that depends on the raw files alone. It writes into `notes` what a user
# should know about all of them. It holds the publisher's tables in memory, but never a list of all recordings.

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
    """Jobs for the MIT-BIH Arrhythmia Database: the records that RECORDS lists, or all 48."""
    names = sorted(MITDB_DS1 + MITDB_DS2 + MITDB_PACED)
    if (raw / "RECORDS").is_file():
        names = (raw / "RECORDS").read_text().split()
    for name in names:
        patient = "201" if name == "202" else name                 # one person
        yield Job(str(raw / name), name, f"mitdb/{patient}", "test" if name in MITDB_HELD_OUT else "train", n_channels=2)


def list_nstdb(raw, args, notes):
    """Jobs for the three noise records of the Noise Stress Test Database, each in its two parts."""
    # The gain 0 of these headers means "uncalibrated". WFDB reads it as 200 adu/mV, so the millivolts are nominal.
    # There is no patient: the two parts have no sample in common, so each counts as a patient.
    for name in ("bw", "em", "ma"):
        for split, start, stop in NOISE_PARTS:
            yield Job(str(raw / name), name, f"nstdb/{name}/{split}", split, n_channels=2, part=(start, stop))


def list_heedb(raw, args, notes):
    """Jobs for the Harvard-Emory ECG Database: all headers under ECG/WFDB (or under raw, if that folder is absent), with
    the patients of demographics_ECG.csv, without the files of duplicated.csv."""
    patient_of = Lookup(find_tables(raw, "demographics_ECG.csv"), "FileName", "BDSPPatientID")
    duplicates = Lookup(find_tables(raw, "duplicated.csv"), "file_name")
    if not patient_of:
        notes["patients"] = "no demographics_ECG.csv: every file counts as a patient of its own"
    folder = raw / "ECG" / "WFDB"
    for path in find_headers(folder if folder.is_dir() else raw):
        patient, reject = patient_of[path.name], None
        if duplicates[path.name] is not None:
            reject = "duplicate", "named in the publisher's duplicated.csv"
        elif patient is None and patient_of:
            notes[NO_PATIENT] = 1 + notes.get(NO_PATIENT, 0)
        yield hashed_job(path, raw, f"heedb/{path.name if patient is None else patient}", reject)


def list_code15(raw, args, notes):
    """Jobs for CODE-15%: the rows of all exams_part*.hdf5, patients from exams.csv by exam_id."""
    parts = sorted(raw.glob("exams_part*.hdf5"), key=lambda path: (len(path.name), path.name))
    if not parts or not (raw / "exams.csv").is_file():
        raise ValueError(f"no {'exams.csv' if parts else 'exams_part*.hdf5'} in {raw}: expected the files of Zenodo "
                         "record 4916206, unpacked")
    table = pd.concat(read_table(raw / "exams.csv", ["exam_id", "patient_id", "trace_file"]))
    patient_of = dict(zip(table.exam_id, table.patient_id))
    unit, median_mv = code15_unit(parts)
    notes["units"] = (f"read as {unit}: the median R wave of lead II is then {median_mv:.2f} mV (the publisher's own "
                      "statements differ)")
    print(f"code15: {notes['units']}")
    for path in parts:
        with open_h5(path) as file:
            exams = file["exam_id"][:].tolist()
        expected = dict.fromkeys(table.exam_id[table.trace_file == path.name])  # a set that keeps the order
        for row, exam in enumerate(map(str, exams)):
            known, reject = exam in expected, None
            expected.pop(exam, None)
            if exam == "0":
                reject = "padding row", f"row {row} of {path.name} has exam_id 0"
            elif not known:                                        # without the patient it could be in the wrong split
                reject = "unknown or repeated exam", f"exams.csv has no exam {exam} in {path.name}, or it came before"
            patient = f"code15/{patient_of.get(exam)}"
            yield Job(str(path), exam, patient, hashed_split(patient), n_channels=12, row=row, scale=CODE_SCALES[unit],
                      reject=reject)
        for exam in expected:
            yield Job(str(path), exam, f"code15/{patient_of[exam]}", "train",
                      reject=("absent exam", f"exams.csv says {path.name}, which does not hold it"))


def list_code(raw, args, notes):
    """Jobs for the whole of CODE in its WFDB form: TNMG{exam}_N{k}, patients from annotations.csv."""
    tables = find_tables(raw, "annotations.csv")
    if not tables:
        raise ValueError(f"no annotations.csv in {raw}: expected CODE's own folder, with its table of exams and "
                         "patients")
    patient_of = Lookup(tables, "id_exam", "id_patient")
    for path in find_headers(raw):
        exam, patient, reject = re.fullmatch(r"TNMG(\d+)_N\d+", path.name), None, None
        if not exam:
            reject = "file name", f"{path.name}.hea: expected TNMG and the exam, _N and the tracing"
        elif (patient := patient_of[exam[1]]) is None:             # without the patient it could be in the wrong split
            reject = "unknown patient", f"annotations.csv has no exam {exam[1]}"
        yield hashed_job(path, raw, f"code/{patient}", reject)


def list_icentia11k(raw, args, notes):
    """Jobs for Icentia11k: a segment of about 70 minutes each; the folder is the patient."""
    for path in find_headers(raw):
        known = re.fullmatch(r"(p\d{5})_s\d\d", path.name)
        reject = None if known else ("file name", f"{path.name}.hea: expected p, patient, _s and the segment")
        yield hashed_job(path, raw, f"icentia11k/{known[1] if known else path.parent.name}", reject)


def list_wfdb(raw, args, notes):
    """Jobs for every WFDB record under raw. The segments of a multi-segment record are read with it, not again."""
    patient_of, held_out = read_patients(args.patients)
    for _, group in itertools.groupby(find_headers(raw), key=lambda path: path.parent):
        paths = list(group)
        segments = {segment for path in paths for segment in segments_of(path)}
        for path in paths:
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


def find_headers(folder):
    """The WFDB records in folder and in all folders below, as paths without suffix, in sorted order. A folder that cannot
    be read is an OSError. Links to folders are not followed."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.endswith(".hea") and entry.is_file():
            yield Path(entry.path).with_suffix("")
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from find_headers(entry.path)


def segments_of(path):
    """Paths of the segments of a multi-segment WFDB record; none for other records."""
    lines = header_lines(f"{path}.hea")
    if lines and "/" in lines[0][0]:                               # NAME/SEGMENTS, then a line for each segment
        return [path.parent / fields[0] for fields in lines[1:]]
    return []


def hashed_job(path, raw, patient, reject=None):
    """A job for the record `path`, in the split that the patient's hash gives."""
    patient = shorten(patient, 32)
    return Job(str(path), shorten(path.relative_to(raw).as_posix(), 64), patient, hashed_split(patient), reject=reject)


def hashed_split(patient):
    """The split of a patient: the same in every run and on every machine."""
    place = hash64(patient) % 100
    return "val" if place < HASHED_SPLIT["val"] else "test" if place < sum(HASHED_SPLIT.values()) else "train"


def hash64(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def shorten(name, n_bytes):
    """A name that fits the index. One that is too long becomes its end, after enough of its hash to stay unique."""
    if len(name.encode()) <= n_bytes:
        return name
    end = name.encode("ascii", "replace").decode()[13 - n_bytes:]
    return f"{hashlib.sha256(name.encode()).hexdigest()[:12]}~{end}"


def find_tables(raw, name):
    """The publisher's table `name`: in raw or in a folder of it, at most two levels down."""
    return sorted(path for pattern in (name, f"*/{name}", f"*/*/{name}") for path in raw.glob(pattern))


class Lookup:
    """A column of CSV tables by a key, for many million rows: 16 bytes per row, keys by their 64-bit hash.

    Keys are compared without folder and suffix. lookup[key] is None if no table has the key. ValueError if a table lacks
    the column `key` or `value`; without `value` all values are "".
    """

    def __init__(self, paths, key, value=None):
        keys, values = [np.zeros(0, np.uint64)], [np.zeros(0, "S1")]
        columns = [key, value] if value else [key]
        for part in itertools.chain.from_iterable(read_table(path, columns) for path in paths):
            keys.append(np.fromiter(map(self.hash, part[key]), np.uint64, len(part)))
            values.append(np.char.encode(part[value].to_numpy(str)) if value else np.zeros(len(part), "S1"))
        self.keys, first = np.unique(np.concatenate(keys), return_index=True)
        self.values = np.concatenate(values)[first]

    @staticmethod
    def hash(key):
        stem = str(key).replace("\\", "/").split("/")[-1]
        return hash64(stem.removesuffix(".hea").removesuffix(".mat").removesuffix(".dat"))

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, key):
        wanted = np.uint64(self.hash(key))
        place = np.searchsorted(self.keys, wanted)
        found = place < len(self.keys) and self.keys[place] == wanted
        return self.values[place].decode(errors="replace") if found else None


def read_table(path, columns):
    """Yield parts of a CSV table with these columns, as text, without the rows that lack one of them."""
    try:
        found = pd.read_csv(path, nrows=0, encoding_errors="replace").columns.tolist()
        for name in columns:
            if name not in found:
                raise ValueError(f"no column {name!r} among {found}")
        for part in pd.read_csv(path, dtype=str, chunksize=100_000, encoding_errors="replace", usecols=columns):
            yield part.dropna()
    except (ValueError, pd.errors.ParserError) as error:           # EmptyDataError is a ValueError too
        raise ValueError(f"{path} cannot be read: {error}; expected the publisher's table, with the columns "
                         f"{', '.join(columns)}") from None


def read_patients(path):
    """--patients: {record: patient}, and the patients who have a copy of a held-out recording."""
    if path is None:
        return {}, set()
    found = pd.read_csv(path, nrows=0).columns
    record, patient = (next((name for name in names if name in found), None) for names in PATIENT_COLUMNS)
    if not record or not patient:
        raise ValueError(f"--patients {path} has the columns {', '.join(found)}: expected one of "
                         f"{', '.join(PATIENT_COLUMNS[0])}, and one of {', '.join(PATIENT_COLUMNS[1])}")
    table = pd.concat(read_table(path, [record, patient]))
    patient_of = dict(zip(table[record].str.removesuffix(".hea"), table[patient]))
    return patient_of, {who for name, who in patient_of.items() if HELD_OUT_COPY.fullmatch(name.split("/")[-1])}


def open_h5(path):
    """An exams_part*.hdf5 of CODE-15%, which has the two tables that are needed."""
    try:
        import h5py                                                # only CODE-15% needs it
        file = h5py.File(path, "r")
    except ImportError:
        raise ValueError("CODE-15% comes as HDF5: run `pip install h5py` first") from None
    except OSError as error:
        raise ValueError(f"{path} is no HDF5 file or cut short ({error}): download it again") from None
    shapes = {name: getattr(file.get(name), "shape", None) for name in ("exam_id", "tracings")}
    exams, tracings = (shape or () for shape in shapes.values())
    if len(exams) != 1 or len(tracings) != 3 or tracings[::2] != (exams[0], len(CODE_LEADS)):
        raise ValueError(f"{path} holds {shapes}: expected exam_id (N,) and tracings (N, samples, {len(CODE_LEADS)}); "
                         "download it again")
    return file


def code15_unit(parts):
    """The unit in which lead II of up to 200 exams has the most usual R wave (1 mV), and the median R wave in mV.

    The R wave is taken as the largest distance from the median of a tracing.
    """
    peaks = []
    for path in parts:
        with open_h5(path) as file:
            tracings = file["tracings"]
            n = min(len(tracings), -(-200 // len(parts)))
            for row in np.unique(np.linspace(0, len(tracings) - 1, n).astype(int)):
                with contextlib.suppress(OSError):                 # a damaged row is counted later, as a reject
                    lead = tracings[row, :, 1].astype(float)
                    lead = lead[np.isfinite(lead) & (lead != 0)]
                    if len(lead):
                        peaks.append(np.abs(lead - np.median(lead)).max())
    if not peaks:
        raise ValueError(f"none of the exams looked at in {parts[0].parent} has a signal: expected tracings of CODE-15%; "
                         "download them again")
    peak = float(np.median(peaks))
    unit = min(CODE_SCALES, key=lambda name: abs(np.log(peak * CODE_SCALES[name])))
    return unit, peak * CODE_SCALES[unit]


# ---------------------------------------------------------------------------------------------------------------------
# one recording

class Prepared(NamedTuple):
    """A recording as the corpus holds it."""
    steps: np.ndarray            # int16 (L, T) uV
    leads: np.ndarray            # (L,) lead ids
    fs_hz: float                 # before it became FS
    events: np.ndarray           # EVENT_DTYPE (K,)
    changes: Counter             # what was done to it


def prepare_recording(job, annotator=None):
    """Prepare one recording, or raise Refused."""
    if job.reject:
        raise Refused(*job.reject)
    recording = read_job(job)
    if job.n_channels and len(recording.leads) != job.n_channels:
        raise Refused("channel count", f"{len(recording.leads)} channels, expected {job.n_channels}")
    signal_mv, ids = preprocess(*recording[:4])
    if job.part:
        n = min(signal_mv.shape[1], NOISE_S * FS)
        signal_mv = signal_mv[:, round(job.part[0] * n):round(job.part[1] * n)]
    changes = Counter({"channels left out: not a voltage": recording.left_out})
    steps, ids, start = drop_unusable_leads(signal_mv, ids, changes)
    events = NO_EVENTS
    if annotator:
        events = read_events(job.path, annotator, recording.fs, start, steps.shape[1], changes)
    return Prepared(steps, ids, recording.fs, events, changes)


def read_job(job):
    """The Recording of a job, from a WFDB record or from a row of an exams_part*.hdf5."""
    if job.row < 0:
        return read_wfdb(job.path)
    try:
        tracing = tracings_of(job.path)[job.row]
    except (OSError, ValueError) as error:
        raise Refused("unreadable or truncated file", f"{type(error).__name__}: {error}") from None
    return Recording(tracing.astype(np.float64) * job.scale, CODE_FS, CODE_LEADS)


@functools.lru_cache(1)
def tracings_of(path):
    return open_h5(path)["tracings"]


def drop_unusable_leads(signal_mv, ids, changes):
    """Drop leads without signal, cut ends where no lead has signal, name every lead once; count in `changes` what was done.

    Returns int16 (L, T) uV, lead ids (L,), and the sample at which the recording begins now.
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
    start = start if start >= PAD_S * FS else 0                    # a few missing samples are no padding
    stop = stop if valid.shape[1] - stop >= PAD_S * FS else valid.shape[1]
    changes["recordings trimmed"] += bool(start or stop < valid.shape[1])
    for i in range(1, len(ids)):
        if ids[i] and ids[i] in ids[:i]:                           # two channels of one name cannot both be that lead
            ids[i] = 0
            changes["leads renamed unknown: a second one of the name"] += 1
    steps = to_int16(signal_mv[:, start:stop])
    changes["samples missing"] += int((steps == MISSING).sum())
    return steps, ids, int(start)


def to_int16(signal_mv):
    """float (L, T) mV -> int16 uV; MISSING where NaN or where the resampler went beyond the range."""
    steps = np.rint(signal_mv * UV_PER_MV)
    return np.where(np.abs(steps) <= np.iinfo(np.int16).max, steps, MISSING).astype("<i2")


def read_events(path, annotator, fs, start, length, changes):
    """Annotations of a WFDB record as EVENT_DTYPE, in samples at FS from `start` of the prepared recording on: the
    symbols of beats, and for "+" the rhythm that it names. A file that is absent or damaged is counted; the signal is kept."""
    try:
        with open(f"{path}.{annotator}", "rb") as file:
            events = decode_annotations(file.read())
    except (OSError, ValueError) as error:
        absent = isinstance(error, FileNotFoundError)
        changes[f"recordings without annotations: the file is {'absent' if absent else 'damaged'}"] += 1
        return NO_EVENTS
    sample = np.rint(events["sample"] * (FS / fs)) - start
    inside = (sample >= 0) & (sample < length) & ~np.isin(events["symbol"], (b'"', b" "))  # comments are no events
    events = events[inside].astype(EVENT_DTYPE)
    events["sample"] = sample[inside]
    return events


def decode_annotations(data):
    """The bytes of a .atr file -> sample (K,) at the record's rate and symbol (K,). ValueError if it is damaged.

    The format is annot(5) of the WFDB manual: words of 16 bits, a code in the upper 6 and in the lower 10 the samples
    since the last annotation. wfdb.rdann reads the same, but it never ends on some damaged files.
    """
    words = np.frombuffer(data[:len(data) // 2 * 2], "<u2").tolist()
    k, time, samples, symbols = 0, 0, [], []
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
        elif code < NUM:                                           # above: subtype, channel, number
            time += step
            if code not in ANNOTATION_SYMBOLS or time < (samples[-1] if samples else 0):
                raise ValueError(f"code {code} at sample {time}")
            samples.append(time)
            symbols.append(ANNOTATION_SYMBOLS[code].encode())
    events = np.empty(len(samples), [("sample", "<i8"), ("symbol", "S6")])
    events["sample"], events["symbol"] = samples, symbols
    return events


# ---------------------------------------------------------------------------------------------------------------------
# writing a corpus

# OUT.part/ holds, while a corpus is made:
#     jobs.jsonl, plan.json                        what there is to do, fixed when the run first started
#     signal/00000.i16 ... (events/00000.npy ...)  the shards; which shard a job belongs to is fixed from the start
#     done/00000.npz ...                           index rows and rejects of each finished shard
# A shard is finished when its file in done/ is there. That file is written last, and atomically.

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
        raise ValueError(f"{out} already exists: delete it (rm -r {out}) to make it again, or name another folder")


@contextlib.contextmanager
def only_writer(part):
    """A lock on `part` that lasts as long as this process, however it ends."""
    import fcntl                                                   # Windows has none; all else here would work there
    with open(part / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another prepare.py is writing {part}: wait for it, or end it") from None
        yield


def write_corpus(source, raw, out, args, command):
    """Prepare all recordings of `source` under `raw` into `out`, or continue with what OUT.part holds. Returns the
    manifest, None for a dry run."""
    refuse_existing(out)
    part = part_of(out)
    part.mkdir(parents=True, exist_ok=True)
    with only_writer(part):
        begun = (part / "plan.json").exists()
        try:
            if begun and not args.dry_run:
                plan = read_plan(source, part, command)
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
        # The plan goes last: as long as it is there, a run continues. dry.jsonl is left of a dry run that was killed.
        for name in ("dry.jsonl", "jobs.jsonl", "lock", "plan.json"):
            (part / name).unlink(missing_ok=True)
        if out.exists():
            out.rmdir()                                            # it is empty: refuse_existing looked
        part.rename(out.resolve())
    return json.loads((out / "manifest.json").read_text())


def read_plan(source, part, command):
    """The plan of an interrupted run, if it was the same command."""
    plan = json.loads((part / "plan.json").read_text())
    if plan.get("command") != command or plan.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{part} holds an unfinished run of `{plan.get('command')}`, and this is `{command}`: finish "
                         f"that one, or delete it (rm -r {part})")
    print(f"{source}: continuing, {len(list((part / 'done').glob('*.npz')))} of {n_shards(plan)} shards are finished")
    return plan


def make_plan(source, raw, part, args, command):
    """List the jobs, once, into OUT.part, and estimate what they cost. Returns the plan, None for a dry run: {"jobs",
    "shard_jobs" (jobs per shard), "notes", "command", "format_version"}."""
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
    wall_time = datetime.timedelta(seconds=round(seconds * n / workers))
    print(f"{source}: {n:,} recordings to read; about {n_bytes * n / 1e9:.3g} GB on disk ({free / 1e9:.0f} GB are free) "
          f"and {wall_time} (h:mm:ss) on {workers} cores")
    if args.dry_run:
        return jobs.unlink()
    if n_bytes * n > free:
        raise ValueError(f"{n:,} recordings need about {n_bytes * n / 1e9:.1f} GB, and on the disk of {part.parent} "
                         f"{free / 1e9:.1f} GB are free: name another --out, or prepare fewer (--limit)")
    shard_jobs = min(int(SHARD_BYTES // max(n_bytes, 1)), -(-n // SHARDS_AT_LEAST))
    plan = {"command": command, "format_version": FORMAT_VERSION, "jobs": n, "shard_jobs": max(1, shard_jobs),
            "notes": notes}
    for name in ("signal", "done", *(["events"] if source in ANNOTATED else [])):
        (part / name).mkdir(exist_ok=True)
    atomic_write(part / "plan.json", json.dumps(plan))
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


def n_shards(plan):
    return -(-plan["jobs"] // plan["shard_jobs"])


def shard_jobs(part, plan):
    """(number, jobs) of every shard, in order."""
    with open(part / "jobs.jsonl") as file:
        for k in range(n_shards(plan)):
            yield k, [Job(*json.loads(line)) for line in itertools.islice(file, plan["shard_jobs"])]


def finish_shards(source, part, plan, workers):
    """Prepare the shards that are not finished, `workers` at a time."""
    done = {int(path.stem) for path in (part / "done").glob("*.npz")}
    tasks = ((source, part, k, jobs) for k, jobs in shard_jobs(part, plan) if k not in done)
    results = run_tasks(tasks, min(workers, n_shards(plan) - len(done)))
    totals, before = Counter(), min(plan["jobs"], len(done) * plan["shard_jobs"])
    with (contextlib.closing(results),                             # closed at once: an interruption ends the workers
          tqdm(total=plan["jobs"], initial=before, unit=" records", disable=None) as bar):
        for result in results:
            totals.update(result)
            bar.set_postfix(hours=f"{totals['samples'] / FS / 3600:.1f}", GB=f"{totals['bytes'] / 1e9:.2f}",
                            rejected=totals["rejected"], refresh=False)
            bar.update(result["jobs"])


def run_tasks(tasks, workers):
    """Yield prepare_shard(*task) for every task, `workers` at a time. At most two tasks per worker are in memory."""
    if workers <= 1:
        yield from itertools.starmap(prepare_shard, tasks)
        return
    # If a worker is killed (out of memory), the executor raises; multiprocessing.Pool would wait for ever.
    pool, running = ProcessPoolExecutor(workers, initializer=start_worker), set()
    try:
        for task in tasks:
            running.add(pool.submit(prepare_shard, *task))
            if len(running) >= 2 * workers:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        yield from (future.result() for future in as_completed(running))
    except BrokenProcessPool:
        raise OSError(f"one of the {workers} workers was killed, most often because memory ran out: "
                      "try again with a smaller --workers") from None
    finally:
        if sys.exc_info()[0] is not None:                          # do not wait for shards that are half finished
            for worker in multiprocessing.active_children():
                worker.terminate()
        pool.shutdown(cancel_futures=True)


def start_worker():
    """A worker leaves signals to its parent, and ends when its parent ends, however that happens."""
    os_signal.signal(os_signal.SIGINT, os_signal.SIG_IGN)
    os_signal.signal(os_signal.SIGTERM, os_signal.SIG_DFL)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def prepare_shard(source, part, number, jobs):
    """Prepare the recordings of a shard and write it. Returns its totals."""
    rows, events, rejects = [], [NO_EVENTS], []
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
                n_leads, length = got.steps.shape
                leads = np.pad(got.leads, (0, MAX_LEADS - n_leads))
                row = (number, offset, length, n_leads, leads, SPLITS.index(job.split), job.label, 0, got.fs_hz,
                       n_events, len(got.events))                  # 0: the patient's number, known when all shards are
                rows.append((row, job.record.encode(), job.patient.encode(), fingerprint(got.steps, got.leads)))
                events.append(got.events)
                offset, n_events = offset + got.steps.size, n_events + len(got.events)
                changes += got.changes
                totals["samples"] += length
            file.flush()
            os.fsync(file.fileno())
        sums = {f"signal/{path.name}": digest.hexdigest()}
        if source in ANNOTATED:
            target = part / "events" / f"{number:05d}.npy"
            atomic_write(target, lambda file: np.save(file, np.concatenate(events)))
            sums[f"events/{target.name}"] = sha256(target)
    except OSError:
        path.unlink(missing_ok=True)                               # on a full disk: room for what comes next
        raise
    about = json.dumps({"rejects": rejects, "changes": changes, "sha256": sums, "bytes": 2 * offset}).encode()
    atomic_write(part / "done" / f"{number:05d}.npz", lambda file: np.savez(
        file, rows=np.array(rows, ROW_DTYPE), about=np.frombuffer(about, np.uint8)))
    return totals + Counter(rejected=len(rejects), bytes=2 * offset)


def assemble(source, part, plan, command):
    """Join the rows of all shards: index.npy, records.npy, patients.npy, fingerprints.npy, rejects.csv, manifest.json."""
    shards = [part / "done" / f"{k:05d}.npz" for k in range(n_shards(plan))]
    counts, rejected, changes, sums, sizes, first = [], Counter(), Counter(), {}, {}, None
    with open(part / "rejects.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("record", "reason", "detail"))
        for path in shards:
            with np.load(path) as shard:
                counts.append(len(shard["rows"]))
                about = json.loads(shard["about"].tobytes())
            writer.writerows(about["rejects"])
            first = first or (about["rejects"] or [None])[0]
            rejected.update(reason for _, reason, _ in about["rejects"])
            changes += Counter(about["changes"])
            sums |= about["sha256"]
            sizes[f"{path.stem}.i16"] = about["bytes"]
    try:
        if not sum(counts):
            raise ValueError(f"none of the {plan['jobs']} recordings could be used: {dict(rejected)}; "
                             f"the first: {first}")
        index, n_records = gather_index(part, shards, counts)
        manifest = make_manifest(source, index, n_records, plan["notes"], command)
    except ValueError:                                             # the same command would end in the same way
        shutil.rmtree(part)
        raise
    sums |= {name: sha256(part / name)
             for name in ("index.npy", "records.npy", "patients.npy", "fingerprints.npy", "rejects.csv")}
    manifest |= {"rejected": dict(sorted(rejected.items())), "changed": dict(sorted(changes.items())),
                 "shard_bytes": sizes, "sha256": sums}
    atomic_write(part / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def gather_index(part, shards, counts):
    """Write index.npy, records.npy, fingerprints.npy and patients.npy, shard by shard. Returns the index and the number
    of records (a record may have several recordings, one after the other). In memory are only the patients' names, 32
    bytes per recording."""
    tables = {name: np.lib.format.open_memmap(part / f"{name}.npy", "w+", dtype, (sum(counts), *shape))
              for name, dtype, shape in (("index", INDEX_DTYPE, ()), ("records", RECORD_DTYPE, ()),
                                         ("fingerprints", np.uint8, (FINGERPRINT_BYTES,)))}
    patients, stop = np.empty(sum(counts), PATIENT_DTYPE), 0
    for path, count in zip(shards, counts):
        with np.load(path) as shard:
            rows = shard["rows"]
        here, stop = slice(stop, stop + count), stop + count
        tables["index"][here], tables["records"][here] = rows["index"], rows["record"]
        tables["fingerprints"][here], patients[here] = rows["fingerprint"], rows["patient"]
    patients, tables["index"]["patient"] = np.unique(patients, return_inverse=True)
    np.save(part / "patients.npy", patients)
    for table in tables.values():
        table.flush()
    return tables["index"], 1 + int((tables["records"][1:] != tables["records"][:-1]).sum())


def make_manifest(source, index, n_records, notes, command):
    """All that a reader of the corpus should know, as a plain dict. It has no date: the same recordings give the same
    bytes."""
    by_split = [index[index["split"] == i] for i in range(len(SPLITS))]
    patients = [np.unique(rows["patient"]) for rows in by_split]
    _, splits_of = np.unique(np.concatenate(patients), return_counts=True)
    overlap = int((splits_of > 1).sum())
    if overlap:
        raise ValueError(f"{overlap} patients are in more than one split, so training would see patients of the test: "
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


# ---------------------------------------------------------------------------------------------------------------------
# download

def damaged_files(raw, wanted=".*"):
    """Names that SHA256SUMS.txt in `raw` lists, that match `wanted` in full, and that are absent or differ here."""
    if not (raw / "SHA256SUMS.txt").is_file():
        raise ValueError(f"no SHA256SUMS.txt in {raw}: --download fetches the publisher's")
    lines = (raw / "SHA256SUMS.txt").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines if line.strip())}
    names = [name for name in sums if re.fullmatch(wanted, name)]
    if not names:
        raise ValueError(f"{raw / 'SHA256SUMS.txt'} lists no file like {wanted}: does it belong to another database?")
    return [name for name in tqdm(names, desc="checking", unit=" files", disable=None)
            if not (raw / name).is_file() or sha256(raw / name) != sums[name]]


def verify_checksums(raw, wanted=".*"):
    """Raise ValueError, naming the files, unless those in `raw` agree with the publisher's SHA256SUMS.txt."""
    bad = damaged_files(Path(raw), wanted)
    if bad:
        raise ValueError(f"{len(bad)} files in {raw} are absent or differ from the publisher's SHA256SUMS.txt: "
                         f"{', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}; run again with --download")


def download(source, raw, rate):
    """Fetch from PhysioNet what `raw` lacks, and check all of it against the publisher's checksums."""
    database, wanted = PHYSIONET[source]
    wanted = wanted.replace("RATE", "500" if rate == "auto" else rate)
    fetch(database, raw, ["SHA256SUMS.txt"])
    names = damaged_files(raw, wanted)
    for name in names:
        (raw / name).unlink(missing_ok=True)                       # wfdb would append to a file that is too short
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
    except Exception as error:                                     # any layer of the network may have failed
        raise ValueError(f"could not fetch {names[0]} ... of {database} from physionet.org ({type(error).__name__}: "
                         f"{error}): run again, complete files are kept; or copy the files to {raw} by hand and leave "
                         "--download out") from None


# ---------------------------------------------------------------------------------------------------------------------
# check: what is in a corpus, and whether it is whole

def check(dirs):
    """Verify corpora, print what several of them share, draw DIR/check.png for each. Returns the number of faults."""
    corpora, faults = [open_corpus(dir) for dir in dirs], 0
    for corpus in corpora:
        print(summary(corpus.manifest, corpus.dir))
        found = [*damaged_shards(corpus), *index_faults(corpus)]
        faults += len(found)
        for fault in found:
            print(f"  DAMAGED: {fault}")
        if not found:
            draw_overview(corpus, corpus.dir / "check.png")
            print(f"  overview: {corpus.dir / 'check.png'}")
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
    overlap = len(pairs) - len(np.unique(pairs))
    if overlap:
        yield f"{overlap} patients are in more than one split"


def heart_rate_bpm(lead):
    """60 / the median distance of R waves in a lead (T,) in mV at FS; NaN if there are fewer than three."""
    band = scipy.signal.butter(2, (5, 20), "band", fs=FS, output="sos")
    steep = scipy.signal.sosfiltfilt(band, lead) ** 2
    steep = np.convolve(steep, np.ones(FS // 10) / (FS // 10), "same")
    peaks, _ = scipy.signal.find_peaks(steep, height=0.3 * np.percentile(steep, 98), distance=FS // 4)
    return 60 * FS / np.median(np.diff(peaks)) if len(peaks) > 2 else np.nan


def draw_overview(corpus, path):
    """check.png: hours by lead set, rate and length; amplitudes and heart rates; six random recordings."""
    from matplotlib.figure import Figure
    index, rng = corpus.index, np.random.default_rng(0)
    figure = Figure(figsize=(11, 14), layout="constrained")
    axes = figure.subplot_mosaic("aabbcc;dddeee;ffffff;gggggg;hhhhhh;iiiiii;jjjjjj;kkkkkk",
                                 height_ratios=[2, 2, 1, 1, 1, 1, 1, 1])
    hours = pd.Series(index["length"] / FS / 3600)
    for key, (what, labels) in zip("abc", labels_of(index).items()):
        top = hours.groupby(labels).sum().nlargest(6)[::-1]
        axes[key].bar_label(axes[key].barh(top.index, top, color="0.4"), [f" {h:.3g}" for h in top], fontsize=8)
        axes[key].set_title(f"hours by {what}", loc="left", fontsize=10)
        axes[key].margins(x=0.2)
    rows = np.sort(rng.choice(len(index), min(OVERVIEW_RECORDINGS, len(index)), replace=False))
    leads = [shown_lead(corpus, i) for i in rows]
    peaks = [np.percentile(np.abs(x - np.median(x)), 99.5) for x, _ in leads]
    rates = np.array([heart_rate_bpm(x) for x, _ in leads if len(x) > 3 * FS])
    axes["d"].hist(np.clip(peaks, 0, 4), 60, (0, 4), color="0.4")
    axes["d"].set_title("lead II, 99.5th percentile, mV (last bar: 4 and more)", loc="left", fontsize=10)
    axes["e"].hist(np.clip(rates[np.isfinite(rates)], 0, 200), 60, (0, 200), color="0.4")
    axes["e"].set_title("heart rate, 1/min", loc="left", fontsize=10)
    for key, k in zip("fghijk", np.sort(rng.choice(len(rows), min(6, len(rows)), replace=False))):
        x, name = leads[k]
        axes[key].plot(np.arange(len(x[:10 * FS])) / FS, x[:10 * FS], color="k", lw=0.7)
        axes[key].set_title(f"{corpus.records[rows[k]].decode()}, {name}, mV", loc="left", fontsize=9, pad=2)
        axes[key].margins(x=0)
    axes["k"].set_xlabel("s")
    figure.suptitle(f"{corpus.dir.name}: {corpus.manifest['source']}, {len(index):,} recordings, {hours.sum():,.1f} h")
    atomic_write(path, lambda file: figure.savefig(file, dpi=90))


def labels_of(index):
    """Labels (N,) of every recording, for the bars: its lead set, its original rate, its length."""
    ids = np.where(np.arange(MAX_LEADS) < index["n_leads"][:, None], index["leads"], 255)
    sets, of_set = np.unique(ids, axis=0, return_inverse=True)
    names = [" ".join(LEADS[k] for k in row if k < len(LEADS)) for row in sets]
    names = [f"{len(name.split())} leads" if len(name) > 16 else name for name in names]
    rates, of_rate = np.unique(index["fs_hz"], return_inverse=True)
    edges_s = np.array([0, 5, 9, 11, 20, 60, 600, 3600, np.inf])
    lengths = [f"{low:g} to {high:g} s" for low, high in itertools.pairwise(edges_s)]
    return {"leads": np.array(names, object)[of_set.ravel()],
            "original rate": np.array([f"{fs:g} Hz" for fs in rates], object)[of_rate],
            "length": np.array(lengths, object)[np.searchsorted(edges_s, index["length"] / FS, "right") - 1]}


def shown_lead(corpus, i):
    """Up to a minute in the middle of recording i, in mV, of lead II (without it, of the first lead), and its name."""
    ids, length = corpus.lead_ids(i), int(corpus.index["length"][i])
    k, n = int(np.argmax(ids == LEAD_IDS["II"])), min(length, 60 * FS)
    lead = corpus.read(i, (length - n) // 2, n)[k]
    return np.where(lead == MISSING, 0, lead) / UV_PER_MV, LEADS[ids[k]]


# ---------------------------------------------------------------------------------------------------------------------
# command line

HELP = """\
sources
  ptbxl       PTB-XL 1.0.3: 21,799 12-lead ECGs of 10 s with labels; folds 1-8 train, 9 val, 10 test  (--download: 3 GB)
  mitdb       MIT-BIH Arrhythmia Database: 48 two-lead recordings of 30 min; DS2 is test             (--download: 100 MB)
  nstdb       MIT-BIH Noise Stress Test Database: the noise records bw, em, ma                        (--download: 40 MB)
  heedb       Harvard-Emory ECG Database: 11.6 million 12-lead ECGs; --raw holds ECG/WFDB and the publisher's tables
  code15      CODE-15%: 345,779 exams; --raw holds exams_part*.hdf5 and exams.csv (needs pip install h5py)
  code        the whole of CODE as WFDB: TNMG{exam}_N{k} and annotations.csv
  icentia11k  Icentia11k: 11,000 patients, one lead, 541,794 segments of 70 minutes; beats and rhythms are kept in events/
  wfdb        any folder of WFDB records (*.hea, in all subfolders); every channel in volts counts as a lead; a record
              named like a copy of PTB-XL or of DS2 goes to the test split; --patients names the patient of each record
  synth       synthetic ECGs: written to --raw in the layouts of the first three, then prepared like these

the result, in OUT (for synth in OUT/ptbxl, OUT/mitdb and OUT/nstdb)
  signal/        int16 at 250 Hz, 1 uV per step, -32768 = missing; for every recording one (leads, samples) block
  events/        only for icentia11k: beats and rhythms, by sample at 250 Hz
  index.npy      a row per recording: where it is, its leads, split, patient, label; records.npy and patients.npy: names;
                 fingerprints.npy: what finds copies of a recording in other corpora
  manifest.json  what this is: counts, hours, what was rejected or changed, leak rules, checksums, the command
  rejects.csv    every recording that could not be used, and why
Until the result is complete it is in OUT.part. After any interruption the same command continues there.

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
    """Shows the default of every flag, and the lines of HELP as they are."""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="prepare.py", description="Turn raw ECG recordings into one corpus on disk, once. Training only reads it.",
        epilog=HELP, allow_abbrev=False, formatter_class=HelpFormatter)
    parser.add_argument("source", choices=("synth", *LISTERS), help="what --raw holds, see below")
    parser.add_argument("--raw", type=Path, required=True, default=argparse.SUPPRESS,
                        help="folder of the raw recordings, in their publisher's layout; only synth writes to it")
    parser.add_argument("--out", type=Path, required=True, default=argparse.SUPPRESS,
                        help="folder to make; if it exists already, delete it first")
    parser.add_argument("--download", action="store_true",
                        help="first fetch what --raw lacks from PhysioNet and check it against SHA256SUMS.txt")
    parser.add_argument("--workers", type=int, default=0,
                        help="processes; 0 = one per CPU core; the result is the same for any number")
    parser.add_argument("--limit", type=int, default=0, help="prepare only the first LIMIT recordings; 0 = all")
    parser.add_argument("--dry-run", action="store_true",
                        help="print how many recordings there are, what disk and time they need, and write nothing")
    parser.add_argument("--patients", type=Path,
                        help="wfdb only: CSV table with a column record (the path in --raw, or its last part) and a "
                             "column patient")
    parser.add_argument("--rate", choices=("auto", "100", "500"), default="auto",
                        help="ptbxl only: which copy to read, in Hz; auto = 500 if all of it is there, otherwise 100")
    parser.add_argument("--records", type=int, default=SYNTH_RECORDS, help="synth only: number of 12-lead recordings")
    parser.add_argument("--seed", type=int, default=0, help="synth only: the same seed makes the same recordings")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """End with a usage message where flags do not fit together."""
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
    if args.patients and args.source != "wfdb":
        parser.error(f"--patients is for wfdb; {args.source} knows its patients")
    if args.patients and not args.patients.is_file():
        parser.error(f"--patients {args.patients}: there is no such file")
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
    refuse_existing(args.out)
    if args.source == "synth":
        with atomic_folder(args.raw) as raw, atomic_folder(args.out) as out:
            synthesize(raw, args.records, args.seed)
            manifests = {source: write_corpus(source, raw / source, out / source, args, command)
                         for source in ("ptbxl", "mitdb", "nstdb")}
    else:
        if args.download:
            download(args.source, args.raw, args.rate)
        manifests = {"": write_corpus(args.source, args.raw, args.out, args, command)}
    for name, manifest in manifests.items():
        if manifest:
            print(summary(manifest, args.out / name))


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM came. It is no Exception, so that no reader takes it for a damaged file."""


def interrupt(number, frame):
    raise Interrupted("interrupted" if number == os_signal.SIGINT else "terminated")


def end_of_run(args, error):
    """The last line of a run that did not finish: what was wrong, and what is kept."""
    part = part_of(args.out)
    kept = len(list((part / "done").glob("*.npz"))) if (part / "plan.json").exists() else 0
    if kept:
        return f"prepare.py: {error}; {kept} finished shards are kept in {part}: run the same command again to continue"
    return f"prepare.py: {error}" + (", nothing was written" if isinstance(error, Interrupted) else "")


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
    except (ValueError, OSError, Interrupted) as error:            # OSError: disk full, no permission
        sys.exit(end_of_run(args, error))


if __name__ == "__main__":
    run_command()
