"""Raw recordings -> one corpus on disk, and the reading side of it.

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
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.signal
import wfdb  # 0.5 s, less than scipy.signal: not worth hiding inside a function
from scipy.signal import resample_poly
from scipy.spatial.transform import Rotation
from tqdm import tqdm

FS = 250  # Hz, the one rate of every corpus: twice the 40-100 Hz that diagnostic ECGs carry, and native to Icentia11k
UV_PER_MV = 1000  # a step of the stored int16 is 1 uV, which is also what PTB-XL stores
MISSING = -32768  # int16 value of a sample that the recording does not have
MAX_MV = 32.767  # largest amplitude that int16 holds; anything beyond is an electrode off or an amplifier at its rail
FS_RANGE = (50, 4000)  # Hz, what preprocess accepts: below 50 no QRS is left, above 4000 the header is wrong
PAD_S = 0.5  # s, exact zeros at either end for this long are padding
FLAT_S = 1.0  # s, a value held exactly for this long is a disconnected or saturated lead (see mark_missing)
FLAT_STD_MV = 1e-4  # mV, a lead with less spread than this over the whole recording is no signal
MIN_VALID_S = 2.0  # s of signal that a lead, and so a recording, needs to be kept
MAX_SAMPLES = 2**28  # of all channels of a record, at its own rate: 24 h of 12 leads at 250 Hz
MAX_LEADS = 16  # leads that an index row holds; a recording with more keeps its first 16

LEADS = ("unknown", "I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6",
         "V7", "V8", "V9", "V3R", "V4R", "X", "Y", "Z")  # a lead id is the place in this tuple
LEAD_IDS = {name.upper(): i for i, name in enumerate(LEADS)}
LEAD_ALIASES = {"VX": "X", "VY": "Y", "VZ": "Z"}  # Frank leads as PTB writes them
for _i, _limb in enumerate(("I", "II", "III"), 1):  # DI, D1: CODE and others; MLI: modified limb leads of Holters
    LEAD_ALIASES |= {f"D{_limb}": _limb, f"D{_i}": _limb, f"ML{_limb}": _limb}
for _i in range(1, 7):
    LEAD_ALIASES |= {f"MV{_i}": f"V{_i}", f"MLV{_i}": f"V{_i}"}
MV_PER_UNIT = {"mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "v": 1e3, "volt": 1e3, "volts": 1e3}

SOURCES = ("synth", "ptbxl", "mitdb", "nstdb", "heedb", "code15", "code", "icentia11k", "wfdb")
SPLITS = ("train", "val", "test")  # the index stores the place in this tuple
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")  # bits of the label, lowest first
INDEX_DTYPE = np.dtype([
    ("shard", "<u4"), ("offset", "<i8"),  # file in signal/, and the first sample in it
    ("length", "<i4"),  # samples per lead
    ("n_leads", "u1"), ("leads", "u1", (MAX_LEADS,)),  # lead ids, the first n_leads count
    ("split", "u1"), ("label", "u1"),  # label: bit set of SUPERCLASSES, 0 = none known
    ("patient", "<u4"),  # place in patients.npy
    ("fs_hz", "<f4"),  # rate before it was made FS
    ("first_event", "<u4"), ("n_events", "<u4")])  # annotations, in the file of the same shard in events/
EVENT_DTYPE = np.dtype([("sample", "<i4"), ("symbol", "S6")])  # sample at FS; a beat ("N") or a rhythm ("(AFIB", ")")
NO_EVENTS = np.zeros(0, EVENT_DTYPE)
PRINT_WORDS, PRINT_WORD_BYTES, PRINT_S = 10, 3, 8  # see content_print
PRINT_BYTES = PRINT_WORDS * PRINT_WORD_BYTES
LOOKUP_WORDS = 5  # by which copies are looked for: with 7 bits different, the most seen, 1.4 % are missed
PRINT_STEP = 20  # samples that are averaged: 12.5 Hz are left
SAME_BITS = 12  # of 240 may differ between copies. Measured: PTB-XL at 100 and 500 Hz 0 to 7, strangers 18 and more
RECORD_DTYPE, PATIENT_DTYPE = np.dtype("S64"), np.dtype("S32")
SHARD_BYTES = 256 * 2**20  # of signal, about; so 12 million recordings are 2,800 files
SHARDS_AT_LEAST = 64  # as far as there are recordings, so that a small corpus is shared among cores too
OPEN_SHARDS = 500  # that a reader keeps mapped: each costs a file descriptor, of which a process has 1,024
PROBES = 5  # recordings read beforehand, to estimate disk and time
MAGIC, FORMAT_VERSION = "ecg-dino corpus", 2

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


class Refused(ValueError):
    """A recording that cannot be used: `reason` is what it is counted under, the text says what to do."""

    def __init__(self, reason, text):
        super().__init__(text)
        self.reason = reason


# ---- preprocessing: any recording -> millivolt at FS ---------------------------------------------------------------

def lead_id(name):
    """Place of a lead in LEADS, whatever its spelling ("II", "lead II", "MLII", "DII" are all 2); 0 if not known."""
    key = "".join(str(name).upper().split()).removeprefix("LEAD")
    return LEAD_IDS.get(LEAD_ALIASES.get(key, key).upper(), 0)


def preprocess(signal, fs, leads, units="mV"):
    """Bring any recording to the one form that the encoder knows.

    signal (L, T) or (T, L) in `units` (mV, uV or V) at `fs` Hz, NaN allowed; leads: L names; a single lead may be 1-D.
    Returns signal_mv float32 (L, ceil(T * FS / fs)), NaN where missing, and lead_ids int64 (L,). No filter but the
    resampler's own, no normalisation; 250 Hz passes unchanged. Raises ValueError if this is no such recording.
    """
    x = as_lead_rows(signal, fs, leads, units)
    mark_missing(x, fs)
    missing = np.isnan(x)
    if missing.all():
        raise Refused("no valid lead", "no sample of this recording is usable: every lead is flat, zero, NaN or beyond "
                                       f"+-{MAX_MV} mV; check the units (now {units!r}) and the gain")
    ratio = Fraction(FS) / Fraction(float(fs)).limit_denominator(1000)
    if ratio != 1:
        bridge_gaps(x, missing)
        x = resample_poly(x, ratio.numerator, ratio.denominator, axis=1, padtype="line")
        if missing.any():
            x[resample_missing(missing, ratio)] = np.nan
    return x.astype(np.float32), np.array([lead_id(name) for name in as_list(leads)], dtype=np.int64)


def as_list(leads):
    return [leads] if isinstance(leads, str) else list(leads)


def as_lead_rows(signal, fs, leads, units):
    """The signal as a fresh float64 (L, T) in mV with inf as NaN, or a ValueError that says what is wrong with it."""
    if not isinstance(fs, (int, float, np.integer, np.floating)) or not FS_RANGE[0] <= fs <= FS_RANGE[1]:
        raise Refused("sampling rate", f"fs is {fs!r}: expected the sampling rate in Hz, "
                                       f"a number from {FS_RANGE[0]} to {FS_RANGE[1]}")
    if str(units).lower() not in MV_PER_UNIT:
        raise Refused("units", f"units is {units!r}: expected mV, uV or V; scale the signal and say units=\"mV\"")
    try:
        x, n_leads = np.array(signal, dtype=np.float64), len(as_list(leads))
    except (ValueError, TypeError) as error:
        raise Refused("shape", f"signal or leads cannot be read ({error}): expected numbers (leads, samples) and one "
                               "name per lead") from None
    if x.ndim == 1 and n_leads == 1:
        x = x[None]
    if x.ndim != 2 or n_leads not in x.shape:
        raise Refused("shape", f"signal has shape {x.shape} and leads names {n_leads}: expected (leads, samples) or "
                               "(samples, leads) with one name per lead")
    x = x if len(x) == n_leads else np.ascontiguousarray(x.T)
    if x.size == 0:
        raise Refused("empty", f"signal is empty (shape {x.shape}): expected at least one lead and one sample")
    if MV_PER_UNIT[str(units).lower()] != 1:
        x *= MV_PER_UNIT[str(units).lower()]
    x[np.isinf(x)] = np.nan
    return x


def mark_missing(x, fs):
    """Write NaN into x (L, T) mV at fs wherever there is a value but no signal.

    Beyond +-MAX_MV; zeros at either end for PAD_S; any value held exactly for FLAT_S; leads with a spread below
    FLAT_STD_MV. Of 26,000 real leads (PTB-XL, MIT-BIH, Challenges 2017 and 2021) none holds a value for 1 s unless it
    is flat throughout: the noise of a real electrode does not stand still, so the rule costs no signal.
    """
    x[np.abs(x) > MAX_MV] = np.nan
    block = max(1, int(min(FLAT_S, 2 * PAD_S) * fs) // 2)
    for lead in x:
        # A value held for FLAT_S fills a block of half of that. Hardly any lead has such a block, and to measure all its
        # runs costs ten times as much as to see that.
        blocks = lead[:len(lead) // block * block].reshape(-1, block)
        if 0 in (lead[0], lead[-1]) or len(lead) <= 2 * block or (blocks.max(axis=1) == blocks.min(axis=1)).any():
            edges = np.flatnonzero(np.diff(lead)) + 1  # NaN differs from NaN, so gaps are no runs
            starts, ends = np.r_[0, edges], np.r_[edges, len(lead)]
            held = ends - starts >= FLAT_S * fs
            for end in (0, -1):
                held[end] |= lead[starts[end]] == 0 and ends[end] - starts[end] >= PAD_S * fs
            lead[np.repeat(held, ends - starts)] = np.nan
        valid = lead[np.isfinite(lead)]
        if len(valid) and valid.std() < FLAT_STD_MV:
            lead[:] = np.nan


def bridge_gaps(x, missing):
    """Draw straight lines in x (L, T) over what is missing, so that the resampler neither rings nor spreads NaN."""
    t = np.arange(x.shape[1])
    for lead, gap in zip(x, missing):
        if gap.any():
            lead[gap] = 0.0 if gap.all() else np.interp(t[gap], t[~gap], lead[~gap])


def resample_missing(missing, ratio):
    """missing (L, T) at fs -> (L, T') at FS: an output sample is missing if any input sample that it stands for is.

    Those are the two that it lies between and, when there are more, all within half an output step of it. Integer
    arithmetic: output sample n lies at n * down / up input samples.
    """
    n_in = missing.shape[1]
    up, down = ratio.numerator, ratio.denominator
    n = np.arange(-(-n_in * up // down))
    first = np.minimum(n * down // up, -((1 - 2 * n) * down // (2 * up)))
    last = np.maximum(-(-n * down // up), (1 + 2 * n) * down // (2 * up))
    first, last = first.clip(0, n_in - 1), last.clip(0, n_in - 1)
    count = np.pad(np.cumsum(missing, axis=1), ((0, 0), (1, 0)))
    return count[:, last + 1] > count[:, first]


def to_int16(signal_mv):
    """float (L, T) mV -> int16 in uV, MISSING where NaN or (overshoot of the resampler) beyond the range."""
    steps = np.rint(signal_mv * UV_PER_MV)
    return np.where(np.abs(steps) <= np.iinfo(np.int16).max, steps, MISSING).astype("<i2")


# ---- reading a corpus ----------------------------------------------------------------------------------------------

class Corpus:
    """A prepared corpus, opened without reading it.

    .dir, .manifest (dict), .index (INDEX_DTYPE), .records (S64, a name per recording), .patients (S32, a name per
    number in the index), .prints (content_print of every recording).
    """

    def __init__(self, dir, manifest, index, records, patients, prints=None):
        self.dir, self.manifest, self.index, self.records, self.patients = dir, manifest, index, records, patients
        self.prints = prints
        self.shard = functools.lru_cache(OPEN_SHARDS)(self._open_shard)

    def _open_shard(self, number):
        return np.memmap(self.dir / "signal" / f"{number:05d}.i16", dtype="<i2", mode="r")

    def read(self, i, start=0, length=None):
        """Recording i, samples start to start + length (default: to its end) of every lead: int16 (L, T), a view."""
        row = self.index[i]
        n_leads, n_samples, offset = int(row["n_leads"]), int(row["length"]), int(row["offset"])
        stop = n_samples if length is None else start + length
        assert 0 <= start <= stop <= n_samples, f"samples {start}..{stop} of a recording of {n_samples}"
        signal = self.shard(int(row["shard"]))
        return signal[offset:offset + n_leads * n_samples].reshape(n_leads, n_samples)[:, start:stop]

    def events(self, i):
        """Annotations of recording i, EVENT_DTYPE (K,), in order of time; none where the source has none."""
        row = self.index[i]
        if not row["n_events"]:
            return NO_EVENTS
        first = int(row["first_event"])
        return np.load(self.dir / "events" / f"{row['shard']:05d}.npy", mmap_mode="r")[first:first + row["n_events"]]


def open_corpus(dir):
    """Open the corpus in `dir`; a ValueError names the command that makes it anew if it is absent, old or damaged."""
    dir = Path(dir)
    try:
        manifest = json.loads((dir / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        unfinished = part_of(dir)
        hint = (f"{unfinished} holds an unfinished one: run its command again" if unfinished.is_dir() else
                f"make one with `python prepare.py SOURCE --raw DIR --out {dir}`")
        raise ValueError(f"{dir} holds no corpus (manifest.json: {error}): {hint}") from None
    manifest = manifest if isinstance(manifest, dict) else {}
    again = f"delete {dir} and run `{manifest.get('command', 'python prepare.py ...')}`"
    if manifest.get("magic") != MAGIC or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{dir} is format {manifest.get('format_version')} of {manifest.get('magic')!r}, expected "
                         f"format {FORMAT_VERSION} of {MAGIC!r}: {again}")
    try:
        index, records, patients, prints = (np.load(dir / f"{name}.npy", mmap_mode="r")
                                            for name in ("index", "records", "patients", "prints"))
        for name, size in manifest["shard_bytes"].items():
            found = os.path.getsize(dir / "signal" / name)
            if found != size:
                raise ValueError(f"signal/{name} has {found} bytes, the manifest says {size}")
        if (index.dtype, records.dtype, patients.dtype) != (INDEX_DTYPE, RECORD_DTYPE, PATIENT_DTYPE):
            raise ValueError(f"index of {index.dtype}, records of {records.dtype}, patients of {patients.dtype}")
        if not len(index) == len(records) == len(prints) == manifest.get("recordings"):
            raise ValueError(f"{len(index)} index rows, {len(records)} names and {len(prints)} prints, the manifest "
                             f"says {manifest.get('recordings')}")
    except (OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{dir} is damaged ({error}): {again}") from None
    return Corpus(dir, manifest, index, records, patients, prints)


def find_copies(prints):
    """Pairs of rows of prints (N, bytes) that are the same recording: (K, 2), the lower first, sorted.

    Candidates share one of the first LOOKUP_WORDS words of 24 bits, for which sorting is enough; of each run of equal
    words only neighbours are compared, so the cost is that of the sorting.
    """
    found = [np.zeros((0, 2), np.int64)]
    words = np.asarray(prints).reshape(len(prints), PRINT_WORDS, PRINT_WORD_BYTES)
    for w in range(LOOKUP_WORDS):
        word = words[:, w].astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        order = np.argsort(word, kind="stable")
        same = np.flatnonzero(word[order[1:]] == word[order[:-1]])
        for part in np.array_split(same, 1 + len(same) // 2**20):                                # bounded memory
            a, b = order[part], order[part + 1]
            differ = BIT_COUNT[prints[a] ^ prints[b]].sum(axis=1, dtype=np.int64)
            found.append(np.stack((a, b), axis=1)[differ <= SAME_BITS])
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def rows_to_leave_out(corpora, excluded=()):
    """Per corpus, what must not be trained on though its split is train, as two sorted arrays of rows: copies of a
    recording that any of the corpora holds out or that stands in one of the excluded corpora, and copies of one that
    comes before (in the same corpus or another)."""
    first = np.cumsum([0] + [len(c.index) for c in corpora])
    pairs = find_copies(np.concatenate([np.asarray(c.prints) for c in (*corpora, *excluded)]))
    held = np.concatenate([np.asarray(c.index["split"]) != SPLITS.index("train") for c in corpora]
                          + [np.ones(len(c.index), bool) for c in excluded])
    a, b = pairs.T
    leaks = np.union1d(a[held[b] & ~held[a]], b[held[a] & ~held[b]])
    twice = np.setdiff1d(b[~held[a] & ~held[b]], leaks)
    return [tuple(rows[(rows >= low) & (rows < high)] - low for rows in (leaks, twice))
            for low, high in zip(first[:-1], first[1:])]


# ---- sources: which recordings there are ---------------------------------------------------------------------------

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

# A lister yields the jobs of a source in an order that depends on the raw files alone, and writes what a user should
# know about all of them into `notes`. It holds the publisher's tables in memory, but never a list of all recordings.

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


def header_lines(path):
    """The fields of every line of a WFDB header that is not a comment."""
    lines = [line.split() for line in Path(path).read_text(errors="replace").splitlines()]
    return [fields for fields in lines if fields and not fields[0].startswith("#")]


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


# ---- one recording -------------------------------------------------------------------------------------------------

# WFDB headers of the plain kind (see header(5) of the WFDB manual): one file, one format, no skew, no frames.
RECORD_LINE = re.compile(r"[^\s/]+ +(\d+) +(\d+\.?\d*)(?:[/(]\S*)? +(\d+)(?: .*)?")
SIGNAL_LINE = re.compile(r"(\S+) +(16|212)(?:x1)?(?:\+(\d+))? +([\d.eE+-]+)(?:\((-?\d+)\))?(?:/(\S+))? +\d+ +(-?\d+)"
                         r"(?: +-?\d+ +-?\d+ +\d+(?: +(.*))?)?")


def read_wfdb(path):
    """Read a WFDB record: signal (T, L) in mV, fs, lead names, number of channels that are not voltages (left out)."""
    try:
        signal, fs, names, units = read_plain_wfdb(path) or read_any_wfdb(path)
    except FileNotFoundError as error:
        raise Refused("absent file", f"{Path(error.filename or path).name} is not there") from None
    except Exception as error:  # wfdb has no exception of its own: a damaged file may raise anything
        raise Refused("unreadable or truncated file", f"{type(error).__name__}: {error}") from None
    scale = np.array([MV_PER_UNIT.get(str(unit).lower(), np.nan) for unit in units])
    volts = np.flatnonzero(np.isfinite(scale))
    if not len(volts):
        raise Refused("no voltage channel", f"units {units}: expected at least one channel in mV, uV or V")
    if len(volts) < len(scale) or (scale != 1).any():
        signal = signal[:, volts] * scale[volts]
    return signal, fs, [names[i] or "" for i in volts], len(scale) - len(volts)


def read_plain_wfdb(path):
    """What wfdb.rdrecord reads, sample for sample, several times as fast, of formats 16 (.mat of the Challenges too)
    and 212 in a plain header: signal (T, L) in physical units, fs, names, units. None for all else, damage included."""
    with open(f"{path}.hea", errors="replace") as file:
        lines = [line for line in map(str.strip, file) if line and not line.startswith("#")]
    record = RECORD_LINE.fullmatch(lines[0]) if lines else None
    fields = [SIGNAL_LINE.fullmatch(line) for line in lines[1:]]
    if not record or None in fields or len({f.group(1, 2, 3) for f in fields}) != 1:
        return None
    n_leads, n_samples, (name, kind, skip) = int(record[1]), int(record[3]), fields[0].group(1, 2, 3)
    gains = np.array([float(f[4]) for f in fields])
    zeros = np.array([float(f[5] or f[7]) for f in fields])
    count = n_leads * n_samples
    n_bytes = 2 * count if kind == "16" else 3 * -(-count // 2)
    source = os.path.join(os.path.dirname(path), name)
    if n_leads != len(fields) or not count or (gains == 0).any() or os.path.getsize(source) < int(skip or 0) + n_bytes:
        return None
    with open(source, "rb") as file:
        file.seek(int(skip or 0))
        data = np.fromfile(file, "<i2" if kind == "16" else "u1", n_bytes // 2 if kind == "16" else n_bytes)
    if kind == "212":  # two samples of 12 bits in three bytes; shifts to the right keep the sign
        low, both, high = data.reshape(-1, 3).T
        data = np.empty((len(low), 2), np.int16)
        data[:, 0], data[:, 1] = low, high
        data[:, 0] |= both.astype(np.int16) << 12 >> 4
        data[:, 1] |= (both.astype(np.int16) << 8 & -4096) >> 4
    data = data.reshape(-1)[:count].reshape(n_samples, n_leads).T
    signal = np.empty(data.shape)  # a row per lead: twice as fast from here on
    np.subtract(data, zeros[:, None], out=signal)
    signal /= gains[:, None]
    invalid = data == (-32768 if kind == "16" else -2048)
    if invalid.any():
        signal[invalid] = np.nan
    return signal.T, float(record[2]), [f[8] for f in fields], [f[6] or "mV" for f in fields]


def read_any_wfdb(path):
    """The same by wfdb, for all other formats."""
    lines = header_lines(f"{path}.hea")
    claimed = int(lines[0][1]) * int(lines[0][3]) if len(lines[0]) > 3 else 0
    if claimed > MAX_SAMPLES:                                      # wfdb would take the memory before it looks
        raise ValueError(f"the header says {claimed:,} samples, more than {MAX_SAMPLES:,} are not read at once")
    record = rdrecord_any_date(path)
    return record.p_signal, record.fs, record.sig_name, record.units or []


def rdrecord_any_date(path):
    """wfdb.rdrecord, also for headers whose date and time it refuses (Challenge 2017 has them in swapped order)."""
    try:
        return wfdb.rdrecord(path)
    except ValueError:
        path = Path(path)
        record_line, *signal_lines = header_lines(f"{path}.hea")
        if len(record_line) <= 4 or "/" in record_line[0]:  # NAME CHANNELS RATE SAMPLES: there is no date to blame
            raise
        with tempfile.TemporaryDirectory() as folder:  # the same record, under a header that stops before the date
            lines = [record_line[:4], *signal_lines]
            Path(folder, f"{path.name}.hea").write_text("\n".join(map(" ".join, lines)))
            for name in {fields[0] for fields in signal_lines}:
                os.symlink(path.parent.resolve() / name, Path(folder, name))
            return wfdb.rdrecord(f"{folder}/{path.name}")


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


def load(job, annotator=None):
    """Prepare one recording, or raise Refused."""
    if job.reject:
        raise Refused(*job.reject)
    signal, fs, names, n_other = read_job(job)
    if job.n_channels and len(names) != job.n_channels:
        raise Refused("channel count", f"{len(names)} channels, expected {job.n_channels}")
    signal_mv, ids = preprocess(signal, fs, names)
    if job.part:
        n = min(signal_mv.shape[1], NOISE_S * FS)
        signal_mv = signal_mv[:, round(job.part[0] * n):round(job.part[1] * n)]
    changes = Counter({"channels left out: not a voltage": n_other})
    steps, ids, start = tidy(signal_mv, ids, changes)
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
    return tracing.astype(np.float64) * job.scale, CODE_FS, CODE_LEADS, 0


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


def tidy(signal_mv, ids, changes):
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


BIT_COUNT = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
# Signs from NumPy's frozen generator; with integers throughout, a print is the same on every machine.
PRINT_SIGNS = 2 * np.random.RandomState(0).randint(0, 2, (8 * PRINT_BYTES, PRINT_S * FS // PRINT_STEP)) - 1


def content_print(steps, leads):
    """30 bytes that two copies of a recording share but for a few bits, whatever their names, rates and rounding.

    Signs of random projections of lead II (without it, of the first lead), its first 8 s, averaged to 12.5 Hz
    (Charikar, STOC 2002: the share of bits that differ is the angle between the signals, as a share of 180 degrees).
    """
    lead = steps[np.argmax(leads == LEAD_IDS["II"])][:PRINT_S * FS]
    x = np.zeros(PRINT_S * FS, np.int64)
    x[:len(lead)] = np.where(lead == MISSING, 0, lead)
    x = x.reshape(-1, PRINT_STEP).sum(axis=1)
    return np.packbits(PRINT_SIGNS @ (len(x) * x - x.sum()) > 0)


# ---- writing a corpus ----------------------------------------------------------------------------------------------

# OUT.part/ holds, while a corpus is made:  jobs.jsonl, plan.json   what there is to do, fixed when the run first started
#     signal/00000.i16 ... (events/00000.npy ...)                   the shards; a job belongs to one from the start
#     done/00000.npz ...                                            index rows and rejects of each finished shard
# A shard is finished when its done/ file is there, which is renamed into place last.

@contextlib.contextmanager
def whole_or_nothing(out):
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


def part_of(out):
    """The folder of an unfinished corpus."""
    out = Path(out).resolve()
    return out.with_name(f"{out.name}.part")


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
    n_bytes, seconds = probe_jobs(source, jobs, n)
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
    write_whole(part / "plan.json", json.dumps(plan).encode())
    return plan


def probe_jobs(source, jobs, n):
    """Mean bytes of signal and seconds of a few recordings out of n."""
    chosen, sizes, start = set(np.linspace(0, n - 1, PROBES).astype(int).tolist()), [], time.perf_counter()
    with open(jobs) as file:
        for i, line in enumerate(file):
            if i in chosen:
                with contextlib.suppress(Refused):
                    sizes.append(load(Job(*json.loads(line)), ANNOTATED.get(source)).steps.nbytes)
    return np.mean(sizes or [0.0]), (time.perf_counter() - start) / len(chosen)


def duration(seconds):
    """12 s, 5 min, 3.4 h"""
    return (f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else
            f"{seconds / 3600:.1f} h")


def write_whole(path, data):
    """A file that appears with all of data in it or not at all, also if the machine stops."""
    with open(path.with_name(f"{path.name}.tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


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
    rows, records, patients, prints, events, rejects = [], [], [], [], [], []
    changes, digest, offset, n_events, totals = Counter(), hashlib.sha256(), 0, 0, Counter(jobs=len(jobs))
    path = part / "signal" / f"{number:05d}.i16"
    try:
        with open(path, "wb") as file:
            for job in jobs:
                try:
                    got = load(job, ANNOTATED.get(source))
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
                prints.append(content_print(got.steps, got.leads))
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
             prints=np.array(prints, np.uint8).reshape(len(rows), PRINT_BYTES),
             about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    write_whole(part / "done" / f"{number:05d}.npz", buffer.getvalue())
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
             for name in ("index.npy", "records.npy", "patients.npy", "prints.npy", "rejects.csv")}
    manifest |= {"rejected": dict(sorted(rejected.items())), "changed": dict(sorted(changes.items())),
                 "shard_bytes": sizes, "sha256": sums}
    write_whole(part / "manifest.json", (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def gather_index(part, shards, counts):
    """Write index.npy, records.npy, prints.npy and patients.npy shard by shard; returns the index and the number of
    records, which may have several recordings one after the other. In memory are the patients' names, 32 bytes per
    recording."""
    n = sum(counts)
    tables = dict(index=(INDEX_DTYPE, (n,)), records=(RECORD_DTYPE, (n,)), prints=(np.uint8, (n, PRINT_BYTES)))
    index, records, prints = (np.lib.format.open_memmap(part / f"{name}.npy", "w+", *what)
                              for name, what in tables.items())
    patients, stop = np.empty(n, PATIENT_DTYPE), 0
    for path, count in zip(shards, counts):
        with np.load(path) as shard:
            rows, stop = slice(stop, stop + count), stop + count
            index[rows], records[rows], patients[rows] = shard["index"], shard["records"], shard["patients"]
            prints[rows] = shard["prints"]
    patients, index["patient"] = np.unique(patients, return_inverse=True)
    np.save(part / "patients.npy", patients)
    for table in (index, records, prints):
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


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- download ------------------------------------------------------------------------------------------------------

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


# ---- synthetic recordings: the body and the data sets ---------------------------------------------------------------

# A moving heart dipole seen by nine electrodes, so that Einthoven's and Goldberger's relations hold; written in the
# publishers' layouts. Beside every ECG lies NAME.waves, a WFDB annotation of the true borders of P, QRS and T:
# ( p )  ( N )  ( t ). The last axis of a dipole is x to the patient's left, y to the feet, z to the back (Frank).

SYNTH_ELECTRODES = ("RA", "LA", "LL", "V1", "V2", "V3", "V4", "V5", "V6")
# I, II, V1 .. V6 from Frank's x, y, z: Dower, Machado and Osborne, Clin Cardiol 1980. The limb electrodes follow from I
# and II, because their mean, Wilson's terminal, is the zero: RA = -(I+II)/3, LA = (2 I-II)/3, LL = (2 II-I)/3.
DOWER = np.array([(0.632, -0.235, 0.059), (0.235, 1.066, -0.132), (-0.515, 0.157, -0.917), (0.044, 0.164, -1.387),
                  (0.882, 0.098, -1.277), (1.213, 0.127, -0.601), (1.125, 0.127, -0.086), (0.831, 0.076, 0.230)])
ELECTRODE_VECTORS = np.vstack([np.array([(-1, -1), (2, -1), (-1, 2)]) / 3 @ DOWER[:2], DOWER[2:]])   # (9, 3)

# A lobe is (onset, peak, end, x, y, z): a raised cosine with two flanks, exactly zero outside onset..end, so that wave
# borders are exact. Times are shares of the QRS or P duration, or of the time from J to the end of T; vectors are mV.
QRS_LOBES = np.array([
    (0.00, 0.17, 0.42, -0.20, 0.06, -0.32),   # septum, to the right and forward: r in V1, q in V6
    (0.14, 0.44, 0.74, 0.85, 0.66, -0.20),    # apex and front
    (0.30, 0.56, 0.88, 0.40, 0.14, 0.95),     # left free wall, backward: S in V1 to V3
    (0.60, 0.82, 1.00, -0.22, -0.08, 0.28)])  # base, last: s in V5 and V6
LBBB_LOBES = [(0.0, 0.28, 0.62, 0.5, 0.3, 0.3), (0.18, 0.42, 0.75, 0.5, 0.3, 0.9), (0.42, 0.7, 1.0, 0.82, 0.02, 0.7)]
PVC_ORIGINS = np.array([(0.3, 1.0, 0.7), (0.9, -0.5, 0.6), (-0.8, 0.7, -0.7), (-0.6, -0.8, -0.7)])  # right, left side
P_LOBES = np.array([(0.00, 0.38, 0.75, 0.05, 0.08, -0.04), (0.25, 0.62, 1.00, 0.07, 0.05, 0.05)])   # right, left atrium
ST_TIMES, T_TIMES, T_VECTOR = (-0.08, 0.20, 0.90), (0.28, 0.68, 1.00), np.array((0.20, 0.14, -0.16))

# What a statement does. lobes: added to the QRS; keep: factors on the four QRS_LOBES; squeeze: they end at this share
# of the QRS; axis_deg: they turn in the frontal plane; st, t: added vectors (mV); left_atrium, gain, t_gain: factors.
EFFECTS = {
    "IMI": dict(lobes=[(0.0, 0.26, 0.58, 0.05, -0.95, 0.05)], st=(-0.03, 0.06, 0.01), t=(0.02, -0.24, 0.02)),
    "ASMI": dict(lobes=[(0.0, 0.24, 0.55, 0.08, 0.0, 0.62)], st=(0.02, 0.0, -0.05), t=(-0.04, 0.0, 0.26)),
    "ALMI": dict(lobes=[(0.0, 0.24, 0.52, -0.62, 0.05, 0.22)], st=(0.05, -0.02, -0.04), t=(-0.26, 0.02, 0.12)),
    "NDT": dict(t_gain=(0.05, 0.4)),
    "ISC_": dict(st=(-0.09, -0.07, 0.07), t=(-0.12, -0.08, 0.05)),
    "ISCAL": dict(st=(-0.02, 0.0, 0.02), t=(-0.36, -0.10, 0.28)),
    "LNGQT": dict(qtc_s=(0.475, 0.54)),
    "CLBBB": dict(qrs_s=(0.124, 0.165), keep=(0, 0, 0, 0), lobes=LBBB_LOBES, st=(-0.05, -0.01, -0.09),
                  t=(-0.38, -0.2, -0.16)),
    "CRBBB": dict(qrs_s=(0.122, 0.15), squeeze=0.62, lobes=[(0.46, 0.74, 1.0, -0.75, -0.05, -0.75)], t=(0.06, 0, 0.2)),
    "IRBBB": dict(squeeze=0.82, lobes=[(0.58, 0.82, 1.0, -0.34, -0.05, -0.50)], qrs_s=(0.10, 0.119)),
    "LAFB": dict(axis_deg=(-100, -70), lobes=[(0.0, 0.2, 0.45, -0.05, 0.32, 0.0)]),
    "1AVB": dict(pr_s=(0.21, 0.32)),
    "LVH": dict(keep=(1.2, 1.75, 2.3, 1.2), st=(-0.06, -0.01, 0.03), t=(-0.24, -0.06, 0.02)),
    "RVH": dict(keep=(1.4, 0.5, 0.2, 1.4), lobes=[(0.15, 0.48, 0.90, -0.72, 0.35, -0.72)], t=(0.10, -0.04, 0.28)),
    "LAO/LAE": dict(p_s=(0.122, 0.15), pr_s=(0.165, 0.20), left_atrium=2.4),
    "LVOLT": dict(gain=(0.35, 0.55))}
SEVERITY = (0.25, 1.2)           # drawn once per statement: mild cases overlap with normal variants
HEART_RATE_BPM = {"SR": (58, 98), "SARRH": (55, 85), "SBRAD": (40, 57), "STACH": (101, 135), "AFIB": (60, 135)}
# Noise of one electrode: mV RMS in the bands between these edges (Hz), times a level drawn per recording and electrode.
NOISE_EDGES_HZ = (0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 180)
SKIN_NOISE_MV = (0.01, 0.02, 0.03, 0.008, 0.003, 0.002, 0.002, 0.003, 0.005, 0.004)

# And the data sets:

PTBXL_LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")
PTBXL_FS = 100                   # Hz: records100 alone; records500 would take five times the disk, it is only listed
PTBXL_COLUMNS = ("ecg_id patient_id age sex height weight nurse site device recording_date report scp_codes heart_axis "
                 "infarction_stadium1 infarction_stadium2 validated_by second_opinion initial_autogenerated_report "
                 "validated_by_human baseline_drift static_noise burst_noise electrodes_problems extra_beats pacemaker "
                 "strat_fold filename_lr filename_hr").split()
# code: kinds (d diagnostic, f form, r rhythm), class and subclass, as in the original scp_statements.csv
STATEMENTS = {
    "NDT": "df STTC STTC", "LNGQT": "df STTC STTC", "NORM": "d NORM NORM", "IMI": "d MI IMI", "ASMI": "d MI AMI",
    "LVH": "d HYP LVH", "LAFB": "d CD LAFB/LPFB", "ISC_": "d STTC ISC_", "IRBBB": "d CD IRBBB", "1AVB": "d CD _AVB",
    "ISCAL": "d STTC ISCA", "CRBBB": "d CD CRBBB", "CLBBB": "d CD CLBBB", "LAO/LAE": "d HYP LAO/LAE",
    "ALMI": "d MI AMI", "RVH": "d HYP RVH",
    **dict.fromkeys(("PVC", "STD_", "VCLVH", "QWAVE", "LOWT", "PAC", "INVT", "LVOLT", "STE_"), "f - -"),
    **dict.fromkeys(("SR", "AFIB", "STACH", "SARRH", "SBRAD", "BIGU"), "r - -")}
FORM_OF = {"IMI": "QWAVE", "ASMI": "QWAVE", "ALMI": "QWAVE", "NDT": "LOWT", "ISC_": "STD_", "ISCAL": "INVT",
           "LVH": "VCLVH"}
FIRST_CLASS = ("NORM", "MI", "NORM", "CD", "STTC", "NORM", "HYP", "MI", "NORM", "STTC")   # with SECOND_CLASS about
SECOND_CLASS = ("MI", "STTC", "CD", "CD", "CD", "HYP")                                    # PTB-XL's superclass shares
MITDB_FS, MITDB_MINUTES = 360, 3
MITDB_CONDITIONS = {             # names of real records, half of them in DS1 and half in DS2
    "101": "SARRH PAC", "106": "SR PVC", "109": "SR CLBBB PVC", "114": "SARRH PAC PVC", "118": "SR CRBBB PAC",
    "203": "AFIB PVC", "207": "SR CLBBB PVC PAC", "208": "SR PVC BIGU", "100": "SARRH PAC", "103": "SR PAC PVC",
    "111": "SR CLBBB PVC", "200": "SR PVC BIGU", "212": "SR CRBBB PAC", "213": "SARRH LVH PVC PAC", "221": "AFIB PVC",
    "232": "SBRAD CRBBB PAC"}
NSTDB_SAMPLES = 650_000          # 30 min 5.6 s at 360 Hz
NSTDB_NOISE = {                  # as measured: mV RMS per band of noise1 and noise2, correlation below 0.5 Hz
    "bw": ((.164, .391, .159, .051, .024, .011, .007, .008, .012, .009),
           (.063, .149, .060, .017, .009, .006, .004, .004, .006, .006), -0.70),
    "em": ((.100, .409, .207, .305, .312, .283, .186, .098, .042, .019),
           (.042, .163, .070, .052, .046, .030, .031, .022, .015, .009), -0.75),
    "ma": ((.085, .119, .092, .062, .032, .017, .011, .029, .051, .014),
           (.088, .132, .064, .037, .020, .014, .015, .035, .067, .023), 0.14)}


# ---- synthetic recordings: one heart, one beat, one rhythm, one recording ------------------------------------------

def lead_rows(lead_names) -> np.ndarray:
    """(L, 9) weights that form leads from the potentials of SYNTH_ELECTRODES; ValueError for an unknown lead."""
    ra, la, ll, *chest = np.eye(len(SYNTH_ELECTRODES))
    terminal = (ra + la + ll) / 3
    rows = {"I": la - ra, "II": ll - ra, "III": ll - la, "MLII": ll - ra, "AVR": 1.5 * (ra - terminal),
            "AVL": 1.5 * (la - terminal), "AVF": 1.5 * (ll - terminal),
            **{name: row - terminal for name, row in zip(SYNTH_ELECTRODES[3:], chest)}}
    unknown = [name for name in lead_names if name.upper() not in rows]
    if unknown:
        raise ValueError(f"cannot synthesise leads {unknown}; choose among {', '.join(rows)}")
    return np.stack([rows[name.upper()] for name in lead_names])


def draw_heart(rng, codes) -> dict:
    """A person with these statements: lobes and vectors (mV), durations (s), electrode vectors (9, 3)."""
    heart = {"pr_s": rng.uniform(0.125, 0.195), "p_s": rng.uniform(0.08, 0.11), "qrs_s": rng.uniform(0.074, 0.104),
             "qtc_s": rng.uniform(0.38, 0.44), "pvc_s": rng.uniform(0.125, 0.165)}
    qrs, p, squeeze, gain = QRS_LOBES.copy(), P_LOBES.copy(), 1.0, rng.lognormal(0, 0.2)
    qrs[:, 3:] *= rng.lognormal(0, 0.15, (4, 1))
    p[:, 3:] *= rng.lognormal(0, 0.25)
    st = np.abs(rng.normal(0, 0.12)) * T_VECTOR + rng.normal(0, 0.008, 3)          # a little early repolarisation
    t = (T_VECTOR + rng.normal(0, 0.03, 3)) * rng.lognormal(0, 0.3)
    for code in codes:
        effect, severity = EFFECTS.get(code, {}), rng.uniform(*SEVERITY)
        acute = "STE_" in codes and code in ("IMI", "ASMI", "ALMI")                # ST up, T still upright
        turn = Rotation.from_euler("z", rng.uniform(*effect.get("axis_deg", (0, 0))), degrees=True)
        qrs[1:4, 3:] = turn.apply(qrs[1:4, 3:])                                    # the septum keeps its direction
        qrs[:4, 3:] *= np.power(effect.get("keep", (1, 1, 1, 1)), severity)[:, None]
        qrs[:, :3] *= effect.get("squeeze", 1)
        squeeze *= effect.get("squeeze", 1)
        strength = rng.uniform(0.8, 1.2) if code == "CLBBB" else severity          # here they are the whole QRS
        qrs = np.vstack([qrs, *[np.multiply(lobe, [1] * 3 + [strength] * 3) for lobe in effect.get("lobes", ())]])
        st = st + np.multiply(effect.get("st", 0), severity * (3 if acute else 1))
        t = t * rng.uniform(*effect.get("t_gain", (1, 1)))
        t = t + np.multiply(effect.get("t", 0), severity * (-0.3 if acute else 1))
        p[1, 3:] *= effect.get("left_atrium", 1) ** severity
        gain *= rng.uniform(*effect.get("gain", (1, 1)))
        heart |= {name: rng.uniform(*effect[name]) for name in ("pr_s", "p_s", "qrs_s", "qtc_s") if name in effect}
    origin = PVC_ORIGINS[rng.integers(4)] + rng.normal(0, 0.25, 3)
    pvc = np.array([(0, 0.40, 0.85, *origin), (0.45, 0.75, 1.0, *origin * rng.uniform(0.2, 0.6)),
                    (0.1, 0.3, 0.6, *rng.normal(0, 0.3, 3))])
    turn = Rotation.from_euler("zyx", rng.normal(0, (18, 13, 8)), degrees=True)    # every heart lies differently
    for name, lobes in (("qrs", qrs), ("p", p), ("pvc", pvc)):
        heart[name] = np.hstack([lobes[:, :3], gain * turn.apply(lobes[:, 3:])])
    return heart | {"st": gain * turn.apply(st), "t": gain * turn.apply(t),
                    "pvc_t": -gain * turn.apply(origin) * rng.uniform(0.25, 0.45),
                    "r_at": 0.5 if "CLBBB" in codes else 0.46 * squeeze,           # R as a share of the QRS
                    "electrodes": ELECTRODE_VECTORS * rng.lognormal(0, 0.06, (9, 1)) + rng.normal(0, 0.06, (9, 3))}


def beat_lobes(heart, symbol, rhythm, rr_s):
    """-> lobes (n, 6), times in seconds from R; waves [(onset, peak, end, "p"|"N"|"t")] in the same seconds."""
    if symbol == "F":                                              # fusion: the two fronts meet halfway
        normal, waves = beat_lobes(heart, "N", rhythm, rr_s)
        return np.vstack([normal, beat_lobes(heart, "V", rhythm, rr_s)[0]]) * ([1] * 3 + [0.5] * 3), waves
    wide = symbol == "V"
    qrs, qrs_s = (heart["pvc"], heart["pvc_s"]) if wide else (heart["qrs"], heart["qrs_s"])
    onset = -(0.40 if wide else heart["r_at"]) * qrs_s
    j, rest_s = onset + qrs_s, max(heart["qtc_s"] * rr_s ** (1 / 3) - 0.09, 0.17)   # Fridericia; a wide QRS adds to QT
    t_times = j + rest_s * np.array(T_TIMES)
    lobes = [[np.r_[t_times, heart["pvc_t" if wide else "t"]]], np.hstack([onset + qrs_s * qrs[:, :3], qrs[:, 3:]])]
    waves = [(onset, 0.0, j, "N"), (*t_times, "t")]
    if not wide:
        lobes.append([np.r_[j + rest_s * np.array(ST_TIMES), heart["st"]]])
    if not wide and rhythm != "(AFIB":
        low = symbol == "A"                                        # from low in the atrium, with a shorter way to go
        start, p = onset - heart["pr_s"] * (0.85 if low else 1), heart["p"] * ([1] * 3 + [0.9, -0.7, 1.3] if low else 1)
        lobes.append(np.hstack([start + heart["p_s"] * p[:, :3], p[:, 3:]]))
        waves.insert(0, (start, start + heart["p_s"] / 2, start + heart["p_s"], "p"))
    return np.vstack(lobes), waves


def draw_beats(rng, codes, duration_s, breath) -> list:
    """[(seconds of R, symbol, rhythm, seconds of the underlying RR)], a beat before and after the recording too."""
    base_s = 60 / rng.uniform(*HEART_RATE_BPM[next((c for c in codes if c in HEART_RATE_BPM), "SR")])
    swing = rng.uniform(0.10, 0.2) if "SARRH" in codes else rng.uniform(0.005, 0.05)
    usual = "L" if "CLBBB" in codes else "R" if "CRBBB" in codes else "N"
    ectopic = {symbol: code for symbol, code in (("V", "PVC"), ("A", "PAC")) if code in codes}
    chance = {symbol: rng.uniform(0.04, 0.14) for symbol in ectopic}
    owed_at = {symbol: rng.uniform(0.15, 0.75) * duration_s for symbol in ectopic}    # what is stated does occur
    beats, time_s, symbol, rr_s = [], rng.uniform(-1, 0) * base_s, usual, base_s
    while time_s < duration_s + base_s:
        spell = duration_s < 60 or 0.35 < time_s / duration_s < 0.75          # in long recordings it comes and goes
        rhythm = "(AFIB" if "AFIB" in codes and spell else "(B" if "BIGU" in codes and spell else "(N"
        beats.append((time_s, symbol, rhythm, rr_s))
        rr_s = base_s * (1 + swing * breath(time_s) + 0.02 * np.sin(0.2 * np.pi * time_s) + rng.normal(0, 0.008))
        if rhythm == "(AFIB":
            rr_s = max(0.33, base_s * rng.gamma(22, 1 / 22))
        last, symbol, wait_s = symbol, usual, rr_s
        if last == "A":
            wait_s = rr_s * rng.uniform(1.0, 1.12)                 # the sinus node was reset: no full compensation
        elif last == "V" and rhythm != "(AFIB":
            wait_s = max(2 * rr_s - (beats[-1][0] - beats[-2][0]), 0.8 * rr_s)
        elif last == usual and len(beats) > 2:
            due = [s for s in ectopic if rng.random() < chance[s] or time_s > owed_at[s]]
            due = ["V"] if rhythm == "(B" else [s for s in due if s == "V" or rhythm == "(N"]
            if due:
                paid, symbol = owed_at.get(due[0]) == np.inf, due[0]
                owed_at[symbol] = np.inf
                symbol = "F" if symbol == "V" and paid and rng.random() < 0.12 else symbol
                wait_s = rr_s * {"V": rng.uniform(0.52, 0.78), "A": rng.uniform(0.6, 0.85), "F": 0.94}[symbol]
        time_s += wait_s
    return beats


def shaped_noise(rng, n_samples, fs, rms, channels, coherence=0.0) -> np.ndarray:
    """(n_samples, channels) Gaussian noise in mV whose RMS in the bands of NOISE_EDGES_HZ is rms.

    rms: (bands,) or (channels, bands). coherence: correlation of channel 2 with 1 below 0.5 Hz. Nothing above fs/2.
    """
    freqs = np.fft.rfftfreq(n_samples, 1 / fs)
    z = rng.standard_normal((channels, len(freqs), 2)).view(complex)[..., 0]
    if coherence:
        slow = coherence * (freqs < 0.5)
        z[1] = slow * z[0] + np.sqrt(1 - slow ** 2) * z[1]
    band = np.clip(np.searchsorted(NOISE_EDGES_HZ, freqs, side="right") - 1, 0, len(NOISE_EDGES_HZ) - 2)
    density = (np.atleast_2d(rms) / np.sqrt(np.diff(NOISE_EDGES_HZ)))[:, band] * (freqs > 0)   # mV per root Hz
    return np.fft.irfft(z * density * np.sqrt(fs * n_samples) / 2, n_samples, axis=1).T


def visible_waves(waves, n_samples) -> list:
    """The waves that lie wholly inside, cut where the next begins; one whose peak another wave covers is dropped."""
    kept = []
    for wave in sorted(w for w in waves if w[0] >= 0 and w[2] < n_samples):
        if kept and wave[0] <= kept[-1][1]:                        # begins before the last one has peaked
            if wave[3] == "p":
                continue
            kept.pop()
        if kept and wave[0] <= kept[-1][2]:
            kept[-1] = (*kept[-1][:2], wave[0] - 1, kept[-1][3])
        kept.append(wave)
    return kept


def synth_recording(rng, condition, fs, duration_s, lead_names, heart=None):
    """A recording of someone with the SCP statements in `condition`, separated by blanks ("IMI AFIB PVC").

    -> signal (T, L) in mV; beats [(sample of R, symbol N L R A V or F, rhythm "(N", "(AFIB" or "(B")]; waves [(onset,
    peak, end, "p", "N" or "t")] in samples, in order, without overlap. heart: from draw_heart, to record one person
    again. ValueError for an unknown statement or lead.
    """
    codes, n_samples, rows = condition.split(), round(duration_s * fs), lead_rows(lead_names)
    if unknown := [code for code in codes if code not in STATEMENTS]:
        raise ValueError(f"unknown statements {unknown} in the condition; choose among {', '.join(STATEMENTS)}")
    heart = draw_heart(rng, codes) if heart is None else heart
    breath_hz, phase, sway = rng.uniform(0.18, 0.32), rng.uniform(0, 2 * np.pi), rng.normal(0, 0.05, 3)

    def breath(time_s):
        return np.sin(2 * np.pi * breath_hz * time_s + phase)

    beats, waves, dipole = draw_beats(rng, codes, duration_s, breath), [], np.zeros((n_samples, 3))
    for time_s, symbol, rhythm, rr_s in beats:
        lobes, borders = beat_lobes(heart, symbol, rhythm, rr_s)
        extent = np.ceil((time_s + np.r_[lobes[:, 0].min(), lobes[:, 2].max()]) * fs)
        first, last = np.clip(extent, 0, n_samples).astype(int)
        t, (onset, peak, end) = np.arange(first, last)[:, None] / fs - time_s, lobes[:, :3].T
        flank = np.minimum(np.where(t < peak, (peak - t) / (peak - onset), (t - peak) / (end - peak)), 1)
        vectors = Rotation.from_rotvec(sway * breath(time_s)).apply(lobes[:, 3:])
        vectors *= 1 + 0.03 * breath(time_s) + rng.normal(0, 0.015)
        dipole[first:last] += (1 + np.cos(np.pi * flank)) / 2 @ vectors
        waves += [(*(round((time_s + s) * fs) for s in wave[:3]), wave[3]) for wave in borders]
    if "AFIB" in codes:
        beat = np.searchsorted([b[0] for b in beats], np.arange(n_samples) / fs, side="right") - 1
        turns = np.cumsum(rng.uniform(4.5, 7.5) + 12 * shaped_noise(rng, n_samples, fs, SKIN_NOISE_MV, 1)[:, 0]) / fs
        waving = np.sin(2 * np.pi * turns) + 0.35 * np.sin(4 * np.pi * turns + 1)  # 4 to 8 Hz, wandering
        waving *= np.array([b[2] == "(AFIB" for b in beats])[beat] * rng.uniform(0.03, 0.09)
        dipole += np.outer(waving, rng.normal((-0.1, 0.5, -0.6), 0.15))
    level = rng.lognormal(0, 0.45) * rng.lognormal(0, 0.25, len(SYNTH_ELECTRODES))
    potentials = dipole @ heart["electrodes"].T + level * shaped_noise(rng, n_samples, fs, SKIN_NOISE_MV, len(level))
    inside = [(round(b[0] * fs), *b[1:3]) for b in beats if 0 <= round(b[0] * fs) < n_samples]
    return potentials @ rows.T, inside, visible_waves(waves, n_samples)


# ---- synthetic recordings: files in the publishers' layouts --------------------------------------------------------

def write_record(path, fs, leads, adc, gain) -> None:
    """path.hea and path.dat from integers adc (T, L): format 16 at PTB-XL's gain of 1000 steps per mV, else 212.

    Written here and not by wfdb.wrsamp, which takes 30 ms per record and refuses NSTDB's gain of 0, "not calibrated".
    """
    if gain == 1000:
        kind, detail, data = 16, "1000.0(0)/mV 16 0", adc.astype("<i2")
    else:                                                          # 212: two 12-bit samples in three bytes
        kind, detail, (a, b) = 212, "200 11 1024" if gain else "0 12 0", adc.reshape(-1, 2).T & 0xFFF
        data = np.stack([a & 0xFF, a >> 8 | b >> 8 << 4, b & 0xFF], axis=1).astype("u1")
    path.with_suffix(".dat").write_bytes(data.tobytes())
    lines = [f"{path.name}.dat {kind} {detail} {x[0]} {x.sum() % 65536} 0 {lead}" for lead, x in zip(leads, adc.T)]
    path.with_suffix(".hea").write_text("\n".join([f"{path.name} {len(leads)} {fs} {len(adc)}", *lines]) + "\n")


def write_waves(path, fs, waves) -> None:
    """path.waves: for every wave `(`, its letter at its peak, `)`."""
    wfdb.wrann(path.name, "waves", np.array([s for wave in waves for s in wave[:3]]),
               [s for wave in waves for s in ("(", wave[3], ")")], fs=fs, write_dir=str(path.parent))


def draw_statements(rng, first_class) -> list:
    """SCP statements of one patient: a diagnosis of first_class, perhaps another, the forms that follow, one rhythm."""
    classes = [first_class]
    if first_class != "NORM" and rng.random() < 0.4:
        classes.append(rng.choice([c for c in SECOND_CLASS if c != first_class]))
    codes = [str(rng.choice([code for code, row in STATEMENTS.items() if row.split()[1] == c])) for c in classes]
    codes += [FORM_OF[code] for code in codes if code in FORM_OF]
    chance = {"STE_": 0.3 * ("MI" in classes), "LVOLT": 0.06 * ("HYP" not in classes), "PAC": 0.08,
              "PVC": 0.1 * (first_class != "NORM")}
    codes += [code for code, p in chance.items() if rng.random() < p]
    rhythm = str(rng.choice(list(HEART_RATE_BPM), p=(0.74, 0.06, 0.06, 0.06, 0.08)))
    if rhythm == "AFIB" and {"NORM", "1AVB", "LAO/LAE", "PAC"} & set(codes):       # they need P waves
        rhythm = "SR"
    return [*codes, rhythm]


def write_ptbxl(folder, n_records, seed) -> None:
    """records100/ and the two tables. Every seventh patient has two records; folds keep to patients."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {code: (*(1.0 if k in row.split()[0] else None for k in "dfr"), *row.replace("-", "").split(" ")[1:])
             for code, row in STATEMENTS.items()}
    columns = ["diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass"]
    pd.DataFrame.from_dict(table, "index", columns=columns).to_csv(folder / "scp_statements.csv")
    database = []
    patients = [p for p in range(n_records) for _ in range(2 if p % 7 == 3 else 1)][:n_records]
    for i, patient in enumerate(patients, start=1):
        rng = np.random.default_rng([seed, 0, patient])
        codes = draw_statements(rng, FIRST_CLASS[(patient + patient // 10) % 10])  # every fold gets every class in turn
        age, sex, heart = float(rng.integers(20, 90)), int(rng.integers(2)), draw_heart(rng, codes)
        rng = np.random.default_rng([seed, 1, i])
        signal, _, waves = synth_recording(rng, " ".join(codes), PTBXL_FS, 10, PTBXL_LEADS, heart)
        low, high = (f"records{fs}/{i // 1000 * 1000:05d}/{i:05d}_{tag}" for fs, tag in ((100, "lr"), (500, "hr")))
        (folder / low).parent.mkdir(parents=True, exist_ok=True)
        adc = np.clip(np.round(signal * 1000), -32767, 32767).astype(int)
        write_record(folder / low, PTBXL_FS, PTBXL_LEADS, adc, gain=1000)
        write_waves(folder / low, PTBXL_FS, waves)
        likelihood = {code: 100.0 if "d" in STATEMENTS[code].split()[0] else 0.0 for code in codes}
        database.append({"ecg_id": i, "patient_id": patient + 1.0, "age": age, "sex": sex, "device": "synthetic",
                         "scp_codes": str(likelihood), "validated_by_human": True, "strat_fold": patient % 10 + 1,
                         "filename_lr": low, "filename_hr": high})
    pd.DataFrame(database, columns=PTBXL_COLUMNS).to_csv(folder / "ptbxl_database.csv", index=False)


def write_mitdb(folder, seed) -> None:
    """Two leads, .atr beat annotations, `+` rhythm changes; as in the original, 114 has its leads reversed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, condition in MITDB_CONDITIONS.items():
        leads = ("V5", "MLII") if name == "114" else ("MLII", "V1")
        signal, beats, waves = synth_recording(np.random.default_rng([seed, 2, int(name)]), condition, MITDB_FS,
                                               60 * MITDB_MINUTES, leads)
        adc = np.clip(np.round(signal * 200) + 1024, 0, 2047).astype(int)          # 11 bits
        write_record(folder / name, MITDB_FS, leads, adc, gain=200)
        write_waves(folder / name, MITDB_FS, waves)
        notes, previous = [], None
        for sample, symbol, rhythm in beats:
            notes += [(max(sample - 36, 0), "+", rhythm)] * (rhythm != previous) + [(sample, symbol, "")]
            previous = rhythm
        samples, symbols, texts = zip(*notes)
        wfdb.wrann(name, "atr", np.array(samples), list(symbols), aux_note=list(texts), fs=MITDB_FS,
                   write_dir=str(folder))
    (folder / "RECORDS").write_text("\n".join(sorted(MITDB_CONDITIONS)) + "\n")


def write_nstdb(folder, seed) -> None:
    """bw, em and ma: 30 min of two-channel noise with the spectra of the originals; em also jumps and dies away."""
    folder.mkdir(parents=True, exist_ok=True)
    clock_s = np.arange(NSTDB_SAMPLES) / MITDB_FS
    for i, (name, (first, second, coherence)) in enumerate(NSTDB_NOISE.items()):
        rng = np.random.default_rng([seed, 3, i])
        loudness = np.exp(rng.normal(0, 0.35, 130))                # a new one every 15 s
        noise = shaped_noise(rng, NSTDB_SAMPLES, MITDB_FS, (first, second), 2, coherence)
        noise *= np.interp(clock_s, 15.0 * np.arange(130), loudness / 1.09)[:, None]
        if name == "em":                                           # about one jump a second, gone after 0.2 s
            jumps = rng.standard_t(4, (NSTDB_SAMPLES, 2)) * (rng.random((NSTDB_SAMPLES, 1)) < 1 / MITDB_FS)
            noise = 0.8 * noise + scipy.signal.lfilter([1], [1, -np.exp(-5 / MITDB_FS)], jumps, axis=0) * (0.85, 0.15)
        adc = np.clip(np.round(noise * 200), -2047, 2047).astype(int)
        write_record(folder / name, MITDB_FS, ("noise1", "noise2"), adc, gain=0)


def synthesize(raw_dir: Path, n_records: int, seed: int) -> None:
    """Write raw_dir/ptbxl (n_records of 10 s), raw_dir/mitdb (16 records of 3 min) and raw_dir/nstdb (3 of 30 min).

    The same seed gives the same bytes, and the first records do not depend on n_records.
    """
    write_ptbxl(raw_dir / "ptbxl", n_records, seed)
    write_mitdb(raw_dir / "mitdb", seed)
    write_nstdb(raw_dir / "nstdb", seed)


# ---- check: what is in a corpus, and is it whole --------------------------------------------------------------------

SHEET_RECORDINGS = 2000  # that the histograms of a sheet are made from, chosen at random


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
            draw_sheet(corpus, corpus.dir / "check.png")
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


def draw_sheet(corpus, path):
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
    rows = np.sort(rng.choice(len(index), min(SHEET_RECORDINGS, len(index)), replace=False))
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
    write_whole(path, buffer.getvalue())


def shown_lead(corpus, i):
    """Lead II, or else the first, of up to a minute in the middle of recording i, in mV, and its name."""
    n_leads = corpus.index["n_leads"][i]
    ids, length = corpus.index["leads"][i][:n_leads], int(corpus.index["length"][i])
    k, n = int(np.argmax(ids == LEAD_IDS["II"])), min(length, 60 * FS)
    lead = corpus.read(i, (length - n) // 2, n)[k]
    return np.where(lead == MISSING, 0, lead) / UV_PER_MV, LEADS[ids[k]]


# ---- command line --------------------------------------------------------------------------------------------------

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
        with whole_or_nothing(args.raw) as raw, whole_or_nothing(args.out) as out:
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
