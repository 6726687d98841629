"""Raw recordings -> one corpus on disk, and the reading side of it.

    python prepare.py SOURCE --raw DIR --out DIR           (python prepare.py --help lists the sources and examples)

Writes OUT/signal.i16 (all samples), OUT/index.npy (one row per recording), OUT/manifest.json (what this corpus is, what
was rejected and why, checksums) and OUT/rejects.csv; OUT appears whole or not at all. One core prepares about
100 PTB-XL records a second, MIT-BIH in 5 s. Disk: 2 bytes per sample, that is 60 kB for 10 s of 12 leads.

Every recording goes through `preprocess`, which is also what the probes and `encoder.embed` call on any other ECG:
250 Hz, millivolt, leads by name, NaN where the recording says nothing. Nothing is filtered, normalised or centred.

Shapes: L leads, T samples (at FS unless said otherwise).
"""

import argparse
import ast
import contextlib
import csv
import hashlib
import io
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
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timezone
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

SOURCES = ("synth", "ptbxl", "mitdb", "nstdb", "wfdb")
SPLITS = ("train", "val", "test")  # the index stores the place in this tuple
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")  # bits of the label, lowest first
INDEX_DTYPE = np.dtype([
    ("offset", "<i8"),  # first sample in signal.i16
    ("length", "<i4"),  # samples per lead
    ("n_leads", "u1"), ("leads", "u1", (MAX_LEADS,)),  # lead ids, the first n_leads count
    ("split", "u1"), ("label", "u1"),  # label: bit set of SUPERCLASSES, 0 = none known
    ("patient", "S32"), ("record", "S64"), ("source", "S16")])
MAGIC, FORMAT_VERSION = "ecg-dino corpus", 1

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
LEAK_NOTES = {
    "ptbxl": "folds 1-8 are train, fold 9 is val, fold 10 is test: pre-train on the train split only",
    "mitdb": "DS2 is the test split and is never pre-trained on; 201 is held out with it, being the same person as 202 "
             "(DS2); the paced records 102 104 107 217 are in the train split",
    "nstdb": "of each noise record minutes 0-20 are train and minutes 20-30 test",
    "wfdb": "all train, one patient per record (none is known), but copies of evaluation data, told by their names, "
            "are test: HRnnnnn (Challenge 2021's PTB-XL), nnnnn_lr and nnnnn_hr (PTB-XL), MIT-BIH's DS2 and 201"}


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
    x *= MV_PER_UNIT[str(units).lower()]
    x[~np.isfinite(x)] = np.nan
    return x


def mark_missing(x, fs):
    """Write NaN into x (L, T) mV at fs wherever there is a value but no signal.

    Beyond +-MAX_MV; zeros at either end for PAD_S; any value held exactly for FLAT_S; leads with a spread below
    FLAT_STD_MV. Of 26,000 real leads (PTB-XL, MIT-BIH, Challenges 2017 and 2021) none holds a value for 1 s unless it
    is flat throughout: the noise of a real electrode does not stand still, so the rule costs no signal.
    """
    x[np.abs(x) > MAX_MV] = np.nan
    for lead in x:
        edges = np.flatnonzero(np.diff(lead)) + 1  # NaN differs from NaN, so gaps are no runs
        starts, ends = np.r_[0, edges], np.r_[edges, len(lead)]
        held = ends - starts >= FLAT_S * fs
        for end in (0, -1):
            held[end] |= lead[starts[end]] == 0 and ends[end] - starts[end] >= PAD_S * fs
        lead[np.repeat(held, ends - starts)] = np.nan
        if np.isfinite(lead).any() and np.nanstd(lead) < FLAT_STD_MV:
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
    """A prepared corpus, opened without reading it: .dir, .manifest (dict), .index (INDEX_DTYPE), .signal (int16)."""

    def __init__(self, dir, manifest, index, signal):
        self.dir, self.manifest, self.index, self.signal = dir, manifest, index, signal

    def read(self, i, start=0, length=None):
        """Recording i, samples start to start + length (default: to its end) of every lead: int16 (L, T), a view."""
        row = self.index[i]
        n_leads, n_samples, offset = int(row["n_leads"]), int(row["length"]), int(row["offset"])
        stop = n_samples if length is None else start + length
        assert 0 <= start <= stop <= n_samples, f"samples {start}..{stop} of a recording of {n_samples}"
        return self.signal[offset:offset + n_leads * n_samples].reshape(n_leads, n_samples)[:, start:stop]


def open_corpus(dir):
    """Open the corpus in `dir`; a ValueError names the command that makes it anew if it is absent, old or damaged."""
    dir = Path(dir)
    try:
        manifest = json.loads((dir / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{dir} holds no corpus (manifest.json: {error}): make one with "
                         f"`python prepare.py SOURCE --raw DIR --out {dir}`") from None
    manifest = manifest if isinstance(manifest, dict) else {}
    again = f"delete {dir} and run `{manifest.get('command', 'python prepare.py ...')}`"
    if manifest.get("magic") != MAGIC or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{dir} is format {manifest.get('format_version')} of {manifest.get('magic')!r}, expected "
                         f"format {FORMAT_VERSION} of {MAGIC!r}: {again}")
    try:
        index = np.load(dir / "index.npy", mmap_mode="r")
        signal = np.memmap(dir / "signal.i16", dtype="<i2", mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{dir} is damaged ({error}): {again}") from None
    n_samples = int((index["n_leads"].astype(np.int64) * index["length"]).sum()) if index.dtype == INDEX_DTYPE else -1
    if len(index) != manifest.get("recordings") or len(signal) != n_samples:
        raise ValueError(f"{dir} is damaged: {len(index)} index rows and {len(signal)} samples, the manifest says "
                         f"{manifest.get('recordings')} and the index {n_samples}: {again}")
    return Corpus(dir, manifest, index, signal)


# ---- sources: which recordings there are ---------------------------------------------------------------------------

class Job(NamedTuple):
    """One recording to prepare."""
    path: str  # WFDB record, without suffix
    source: str
    record: str
    patient: str
    split: str
    label: int = 0
    n_channels: int = 0  # what the source promises; 0 = anything
    part: tuple | None = None  # from, to: shares of the first NOISE_S


def list_ptbxl(raw, rate):
    """Jobs for PTB-XL: every row of ptbxl_database.csv, at 100 or 500 Hz."""
    for name in ("ptbxl_database.csv", "scp_statements.csv"):
        if not (raw / name).is_file():
            raise ValueError(f"no {name} in {raw}: expected PTB-XL's own folder, or add --download")
    table = pd.read_csv(raw / "ptbxl_database.csv", index_col="ecg_id")
    statements = pd.read_csv(raw / "scp_statements.csv", index_col=0)
    superclass = statements.diagnostic_class[statements.diagnostic == 1].to_dict()
    if rate == "auto":
        rate = "500" if all((raw / f"{name}.hea").is_file() for name in table.filename_hr) else "100"
    names = table.filename_hr if rate == "500" else table.filename_lr
    print(f"ptbxl: reading the {rate} Hz records")
    jobs = []
    for ecg_id, row in table.iterrows():
        # A statement counts if it is present, whatever its likelihood, as in the benchmark (Strodthoff et al. 2021).
        present = {superclass.get(code) for code in ast.literal_eval(row.scp_codes)}
        label = sum(1 << bit for bit, name in enumerate(SUPERCLASSES) if name in present)
        split = {9: "val", 10: "test"}.get(int(row.strat_fold), "train")
        jobs.append(Job(str(raw / names[ecg_id]), "ptbxl", f"{ecg_id:05d}", f"ptbxl/{int(row.patient_id)}",
                        split, label, n_channels=12))
    return jobs


def list_mitdb(raw, rate):
    """Jobs for the MIT-BIH Arrhythmia Database: what RECORDS lists, or all 48."""
    names = sorted(MITDB_DS1 + MITDB_DS2 + MITDB_PACED)
    if (raw / "RECORDS").is_file():
        names = (raw / "RECORDS").read_text().split()
    return [Job(str(raw / name), "mitdb", name, "mitdb/" + {"202": "201"}.get(name, name),  # 201 and 202: one person
                "test" if name in MITDB_HELD_OUT else "train", n_channels=2) for name in names]


def list_nstdb(raw, rate):
    """Jobs for the three noise records of the Noise Stress Test Database, each in its two parts."""
    # The gain 0 of these headers means "uncalibrated", which WFDB reads as 200 adu/mV: the millivolts are nominal.
    # There is no patient: the parts never meet, so each is a unit of its own.
    return [Job(str(raw / name), "nstdb", name, f"nstdb/{name}/{split}", split, n_channels=2, part=(start, stop))
            for name in ("bw", "em", "ma") for split, start, stop in NOISE_PARTS]


def list_wfdb(raw, rate):
    """Jobs for every WFDB record under raw; the segments of a multi-segment record are read with it, not twice."""
    # No folders, no links to nowhere.
    headers, segments = sorted(path for path in raw.rglob("*.hea") if path.is_file()), set()
    for path in headers:
        lines = header_lines(path)
        if lines and "/" in lines[0][0]:  # NAME/SEGMENTS, then a line for each segment
            segments |= {path.parent / f"{fields[0]}.hea" for fields in lines[1:]}
    names = [path.relative_to(raw).with_suffix("").as_posix() for path in headers if path not in segments]
    return [Job(str(raw / name), "wfdb", shorten(name, 64), shorten(f"wfdb/{name}", 32),
                "test" if HELD_OUT_COPY.fullmatch(name.split("/")[-1]) else "train") for name in names]


def header_lines(path):
    """The fields of every line of a WFDB header that is not a comment."""
    lines = [line.split() for line in Path(path).read_text(errors="replace").splitlines()]
    return [fields for fields in lines if fields and not fields[0].startswith("#")]


def shorten(name, n_bytes):
    """A name that fits the index: if it is too long, its end and enough of its hash to stay unique."""
    if len(name.encode()) <= n_bytes:
        return name
    end = name.encode("ascii", "replace").decode()[13 - n_bytes:]
    return f"{hashlib.sha256(name.encode()).hexdigest()[:12]}~{end}"


LISTERS = {"ptbxl": list_ptbxl, "mitdb": list_mitdb, "nstdb": list_nstdb, "wfdb": list_wfdb}


# ---- one recording -------------------------------------------------------------------------------------------------

def read_wfdb(path):
    """Read a WFDB record: signal (T, L) in mV, fs, lead names, number of channels that are not voltages (left out)."""
    try:
        record = rdrecord_any_date(path)
    except FileNotFoundError as error:
        raise Refused("absent file", f"{Path(error.filename or path).name} is not there") from None
    except Exception as error:  # wfdb has no exception of its own: a damaged file may raise anything
        raise Refused("unreadable or truncated file", f"{type(error).__name__}: {error}") from None
    scale = np.array([MV_PER_UNIT.get(str(unit).lower(), np.nan) for unit in record.units or []])
    volts = np.flatnonzero(np.isfinite(scale))
    if not len(volts):
        raise Refused("no voltage channel", f"units {record.units}: expected at least one channel in mV, uV or V")
    names = [record.sig_name[i] or "" for i in volts]
    return record.p_signal[:, volts] * scale[volts], record.fs, names, record.n_sig - len(volts)


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


def load(job):
    """Prepare one recording: (int16 (L, T), lead ids, Counter of what was changed), or (None, reason, detail)."""
    try:
        signal, fs, names, n_other = read_wfdb(job.path)
        if job.n_channels and len(names) != job.n_channels:
            raise Refused("channel count", f"{len(names)} channels, {job.source} has {job.n_channels}")
        signal_mv, ids = preprocess(signal, fs, names)
        if job.part:
            n = min(signal_mv.shape[1], NOISE_S * FS)
            signal_mv = signal_mv[:, round(job.part[0] * n):round(job.part[1] * n)]
        return tidy(signal_mv, ids, Counter({"channels left out: not a voltage": n_other}))
    except Refused as error:
        return None, error.reason, str(error)


def tidy(signal_mv, ids, changes):
    """Drop leads without signal, trim ends that no lead has, name every lead once; what was done is counted."""
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
    return steps, ids, changes


# ---- writing a corpus ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def whole_or_nothing(out):
    """A folder to write into that becomes `out` at the end, and leaves nothing behind if anything goes wrong."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is already there: to make it anew, delete it (rm -r {out}); else name another folder")
    out = out.resolve()
    part = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_corpus(source, raw, out, workers, rate, command):
    """Prepare all recordings of `source` under `raw` into the empty folder `out`; returns the manifest."""
    out.mkdir(exist_ok=True)
    jobs = LISTERS[source](raw, rate)
    if not jobs:
        raise ValueError(f"no {source} recordings under {raw}: expected WFDB headers (*.hea) there, or add --download")
    print(f"{source}: {len(jobs):,} recordings to read")
    rows, rejects, changes, digest, n_samples, hours = [], [], Counter(), hashlib.sha256(), 0, 0.0
    with open(out / "signal.i16", "wb") as file, tqdm(total=len(jobs), unit=" records", disable=None) as bar:
        for job, (steps, leads, detail) in zip(jobs, map_in_order(load, jobs, workers)):
            if steps is None:
                rejects.append((job.record, leads, detail))
            else:
                data = steps.tobytes()
                file.write(data)
                digest.update(data)
                rows.append((n_samples, steps.shape[1], len(leads), np.pad(leads, (0, MAX_LEADS - len(leads))),
                             SPLITS.index(job.split), job.label, job.patient.encode(), job.record.encode(), job.source))
                n_samples += steps.size
                hours += steps.shape[1] / FS / 3600
                changes += detail
            bar.set_postfix(hours=f"{hours:.1f}", rejected=len(rejects), refresh=False)
            bar.update()
    with open(out / "rejects.csv", "w", newline="") as file:
        csv.writer(file).writerows([("record", "reason", "detail"), *rejects])
    if not rows:
        raise ValueError(f"none of the {len(jobs)} recordings in {raw} could be used: "
                         f"{dict(Counter(r[1] for r in rejects))}; the first: {rejects[0]}")
    index = np.array(rows, dtype=INDEX_DTYPE)
    np.save(out / "index.npy", index)
    sums = {"signal.i16": digest.hexdigest(), "index.npy": sha256(out / "index.npy")}
    manifest = make_manifest(source, index, rejects, changes, sums, command)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def map_in_order(function, items, workers):
    """map over processes; results come in the order of the items, so the output does not depend on `workers`."""
    workers = min(workers, 1 + len(items) // 4)  # a process costs about a second to start
    if workers <= 1:
        yield from map(function, items)
        return
    # Unlike multiprocessing.Pool, the executor raises if a worker is killed (out of memory) instead of waiting forever.
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        yield from pool.map(function, items, chunksize=max(1, min(16, len(items) // (4 * workers))))
    except BrokenProcessPool:
        raise OSError(f"one of the {workers} workers was killed, most often because memory ran out; "
                      "nothing was written: try again with a smaller --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker():
    """A worker leaves signals to its parent, and ends with it, however that ends."""
    os_signal.signal(os_signal.SIGINT, os_signal.SIG_IGN)
    os_signal.signal(os_signal.SIGTERM, os_signal.SIG_DFL)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()


def make_manifest(source, index, rejects, changes, sums, command):
    """All that a reader of the corpus should know, as a plain dict."""
    by_split = {name: index[index["split"] == i] for i, name in enumerate(SPLITS)}
    patients = [set(rows["patient"].tolist()) for rows in by_split.values()]
    overlap = len(patients[0] & patients[1] | patients[0] & patients[2] | patients[1] & patients[2])
    if overlap:
        raise ValueError(f"{overlap} patients are in more than one split, so training would see patients of the test; "
                         "check the source's table of folds")
    return {
        "magic": MAGIC, "format_version": FORMAT_VERSION, "source": source, "fs_hz": FS,
        "units": f"int16 little-endian, 1 uV per step, {MISSING} = missing", "leads": LEADS, "labels": SUPERCLASSES,
        "recordings": len(index), "records": len(set(index["record"].tolist())),
        "recordings_per_split": {name: len(rows) for name, rows in by_split.items()},
        "hours_per_split": {name: round(float(rows["length"].sum()) / FS / 3600, 3) for name, rows in by_split.items()},
        "patients_per_split": dict(zip(SPLITS, map(len, patients))), "patients_in_two_splits": overlap,
        "leak_note": LEAK_NOTES[source],
        "rejected": dict(sorted(Counter(reason for _, reason, _ in rejects).items())),
        "changed": dict(sorted(changes.items())),
        "sha256": sums, "command": command, "created": datetime.now(timezone.utc).isoformat(),
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


# ---- command line --------------------------------------------------------------------------------------------------

HELP = """\
sources
  ptbxl   PTB-XL 1.0.3: 21,799 12-lead ECGs of 10 s with labels; folds 1-8 train, 9 val, 10 test  (--download: 3 GB)
  mitdb   MIT-BIH Arrhythmia Database: 48 two-lead recordings of 30 min; DS2 is test              (--download: 100 MB)
  nstdb   MIT-BIH Noise Stress Test Database: the noise records bw, em, ma                        (--download: 40 MB)
  wfdb    any folder of WFDB records (*.hea, in all subfolders); every channel in volts counts as a lead; what is a
          copy of PTB-XL or DS2 by its name becomes test
  synth   synthetic ECGs, written to --raw in the layouts of the three databases above, then prepared by their readers

the result, in OUT (for synth in OUT/ptbxl, OUT/mitdb and OUT/nstdb); it appears whole or not at all
  signal.i16     int16 at 250 Hz, 1 uV per step, -32768 = missing; for every recording one (leads, samples) block
  index.npy      a row per recording: where it is, its leads, split, patient, label
  manifest.json  what this is: counts, hours, what was rejected or changed, leak rules, checksums, the command
  rejects.csv    every recording that could not be used, and why

examples
  python prepare.py synth --raw data/raw/synth --out data/synth
  python prepare.py ptbxl --raw data/raw/ptbxl --out data/ptbxl --download
  python prepare.py wfdb  --raw my_ecgs        --out data/mine --workers 8
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
    if args.records < 1 or args.workers < 0 or args.seed < 0:
        parser.error("--records must be at least 1, --workers and --seed at least 0")
    if args.source != "synth" and not args.download and not args.raw.is_dir():
        parser.error(f"--raw {args.raw} is no folder")


def command_of(args):
    """The command line that makes this corpus again."""
    extra = {"synth": ["--records", args.records, "--seed", args.seed], "ptbxl": ["--rate", args.rate]}
    words = ["python", "prepare.py", args.source, "--raw", args.raw, "--out", args.out, *extra.get(args.source, [])]
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
    lines += [f"  patients in more than one split: {manifest['patients_in_two_splits']}", f"  {manifest['leak_note']}"]
    return "\n".join(lines)


def main(args):
    workers, command = args.workers or os.cpu_count(), command_of(args)
    if args.source == "synth":
        with whole_or_nothing(args.raw) as raw, whole_or_nothing(args.out) as out:
            synthesize(raw, args.records, args.seed)
            manifests = {source: write_corpus(source, raw / source, out / source, workers, args.rate, command)
                         for source in ("ptbxl", "mitdb", "nstdb")}
    else:
        with whole_or_nothing(args.out) as out:
            if args.download:
                download(args.source, args.raw, args.rate)
            manifests = {"": write_corpus(args.source, args.raw, out, workers, args.rate, command)}
    for name, manifest in manifests.items():
        print(summary(manifest, args.out / name))


if __name__ == "__main__":
    os_signal.signal(os_signal.SIGTERM, lambda *_: sys.exit("prepare.py: terminated, nothing was written"))
    try:
        main(parse_args())
    except (ValueError, OSError) as error:  # OSError: disk full, no permission
        sys.exit(f"prepare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted, nothing was written")
