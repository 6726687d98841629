"""Any ECG in the one form that the encoder knows: leads by name, 250 Hz, millivolt, NaN where a sample is missing.

    signal_mv, lead_ids = preprocess(signal, fs=500, leads=["I", "II"], units="mV")      # any array
    recording = read_wfdb("my/record")                                # a WFDB file; encoder.embed takes it as it is

Nothing is filtered, normalised or centred. prepare.py, the probes and encoder.embed all call `preprocess`.

Shapes: L leads, T samples (at FS unless said otherwise).
"""
import contextlib
import functools
import hashlib
import itertools
import os
import re
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
from scipy.signal import resample_poly

FS = 250                         # Hz: more than twice the 40 to 100 Hz that a diagnostic ECG needs; Icentia11k's own
UV_PER_MV = 1000                 # a step of the stored int16 is 1 uV, which is also what PTB-XL stores
MISSING = -32768                 # int16 value of a missing sample
MAX_MV = 32.767                  # largest amplitude in int16; above it an electrode is off or the amplifier saturated
FS_RANGE = (50, 4000)            # Hz, what preprocess accepts: below 50 no QRS is left, above 4,000 the header is wrong
PAD_S = 0.5                      # s, exact zeros at either end for this long are padding
FLAT_S = 1.0                     # s, a value held exactly for this long is a disconnected or saturated lead
FLAT_STD_MV = 1e-4               # mV, a lead with a smaller standard deviation over the whole recording is flat
MAX_SAMPLES = 2**28              # of all channels of a record together, at its own rate: 24 h of 12 leads at 250 Hz
MAX_LEADS = 16                   # leads that an index row holds; a recording with more keeps its first 16
# mV, from the 1st to the 99th percentile of the largest lead of an ECG. Outside these limits the units are wrong.
MIN_SPREAD_MV, MAX_SPREAD_MV = 0.005, 20.0

LEADS = ("unknown", "I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6",
         "V7", "V8", "V9", "V3R", "V4R", "X", "Y", "Z")              # a lead id is an index into this tuple
LEAD_IDS = {name.upper(): i for i, name in enumerate(LEADS)}
LEAD_ALIASES = {"VX": "X", "VY": "Y", "VZ": "Z"}                     # Frank leads as PTB writes them
for _i, _limb in enumerate(("I", "II", "III"), 1):                   # DI, D1: CODE; MLI: modified limb leads of Holters
    LEAD_ALIASES |= {f"D{_limb}": _limb, f"D{_i}": _limb, f"ML{_limb}": _limb}
for _i in range(1, 7):
    LEAD_ALIASES |= {f"MV{_i}": f"V{_i}", f"MLV{_i}": f"V{_i}"}
MV_PER_UNIT = {"mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "v": 1e3, "volt": 1e3, "volts": 1e3}


class Refused(ValueError):
    """A recording that cannot be used. `reason` is the category that prepare.py counts; the text says what to do."""

    def __init__(self, reason, text):
        super().__init__(text)
        self.reason = reason


class Recording(NamedTuple):
    """One recording as a file or a device gives it; preprocess(*recording[:4]) converts it."""
    signal: np.ndarray           # (L, T) or (T, L) in `units`, NaN where missing
    fs: float                    # Hz
    leads: Sequence[str]         # L names
    units: str = "mV"
    left_out: int = 0            # number of channels of the file that are not voltages


def lead_id(name):
    """Index of a lead in LEADS, for any spelling ("II", "lead II", "MLII" and "DII" all give 2); 0 if unknown."""
    key = "".join(str(name).upper().split()).removeprefix("LEAD")
    return LEAD_IDS.get(LEAD_ALIASES.get(key, key).upper(), 0)


def preprocess(signal, fs, leads, units="mV"):
    """Convert any recording to the one form that the encoder knows.

    signal (L, T) or (T, L) in `units` (mV, uV or V) at `fs` Hz; NaN and values under a NumPy mask are missing. leads: L
    names; a single lead may be 1-D. Returns signal_mv float32 (L, ceil(T * FS / fs)), NaN where missing, and lead_ids
    int64 (L,). Only the resampler filters, nothing is normalised, and 250 Hz passes unchanged. Raises Refused, a
    ValueError, if the input is not such a recording.
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
    """A new float64 array (L, T) of the signal in mV, with NaN for inf. Raises Refused if the input is wrong."""
    if not isinstance(fs, (int, float, np.integer, np.floating)) or not FS_RANGE[0] <= fs <= FS_RANGE[1]:
        raise Refused("sampling rate", f"fs is {fs!r}: expected the sampling rate in Hz, "
                                       f"a number from {FS_RANGE[0]} to {FS_RANGE[1]}")
    if str(units).lower() not in MV_PER_UNIT:
        raise Refused("units", f"units is {units!r}: expected mV, uV or V; scale the signal and say units=\"mV\"")
    try:
        x = np.array(np.ma.array(signal, dtype=np.float64).filled(np.nan))
        n_leads = len(as_list(leads))
    except (ValueError, TypeError, RuntimeError) as error:
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

    These are values beyond +-MAX_MV, zeros at either end for PAD_S, any value held exactly for FLAT_S, and leads with
    a spread below FLAT_STD_MV. Of 26,000 real leads (PTB-XL, MIT-BIH, Challenges 2017 and 2021) none holds a value for
    1 s unless it is completely flat: a real electrode always has noise, so the rule removes no signal.
    """
    x[np.abs(x) > MAX_MV] = np.nan
    block = max(1, int(min(FLAT_S, 2 * PAD_S) * fs) // 2)
    for lead in x:
        # A value held for FLAT_S fills a block of half that length. Few leads have such a block, and to look for it
        # takes a tenth of the time that it takes to measure all runs of equal values.
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
    """Fill the missing samples of x (L, T) with straight lines, so that the resampler does not ring or spread NaN."""
    t = np.arange(x.shape[1])
    for lead, gap in zip(x, missing):
        if gap.any():
            lead[gap] = 0.0 if gap.all() else np.interp(t[gap], t[~gap], lead[~gap])


def resample_missing(missing, ratio):
    """missing (L, T) at fs -> (L, T') at FS: an output sample is missing if any input sample near it is missing.

    Near are the two input samples around it and, if there are more, all within half an output step. In integer
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


def as_recordings(signal, fs=None, leads=None, units="mV"):
    """Returns an iterable of Recording, and whether `signal` holds several recordings.

    signal: a Recording or an array (L, T), or several: a list, any other iterable, or an array (recordings, L, T). fs,
    leads and units: one for all, or one for each recording. ValueError if their numbers differ.
    """
    if isinstance(signal, Recording):
        return [signal], False
    if getattr(signal, "dtype", None) == object:
        signal = list(signal)
    about = (fs, leads, units)
    shared = (np.ndim(fs) == 0, is_lead_set(leads), isinstance(units, str) or units is None)
    if hasattr(signal, "ndim"):
        many = signal.ndim > 2
    else:
        signal, known = peek(signal)
        if not known:
            return [], True
        many = any(isinstance(item, Recording) or dimensions(item) > 1 for item in known)
    if not many and all(shared):
        return [complete(signal if hasattr(signal, "ndim") else list(signal), *about)], False
    own = [x for x, one in zip(about, shared) if not one]
    counts = {len(x) for x in (signal, *own) if hasattr(x, "__len__")}
    if len(counts) > 1:
        raise ValueError(f"there are {len(signal) if hasattr(signal, '__len__') else 'some'} recordings, but fs, leads "
                         f"or units for {' and '.join(str(len(x)) for x in own)}; give one for all, or one for each")
    # Lengths that are known must be equal; a generator of recordings may be endless.
    columns = [itertools.repeat(x, *counts) if one else x for x, one in zip(about, shared)]
    return (complete(*item) for item in zip(signal, *columns, strict=bool(counts))), True


def peek(signal):
    """The items of an iterable, and a list of those to look at: all of them, or the first one of a generator."""
    try:
        items = iter(signal)
    except TypeError:
        raise Refused("shape", f"signal is {signal!r:.50}; expected (leads, samples), or several of these") from None
    if hasattr(signal, "__len__"):
        return signal, list(items)
    known = list(itertools.islice(items, 1))
    return itertools.chain(known, items), known


def dimensions(x):
    try:
        return np.ndim(x)
    except ValueError:                           # a list of lists of different lengths
        return 2


def is_lead_set(leads):
    """Whether `leads` is one set of names (or invalid), and not one set for each recording."""
    return isinstance(leads, str) or not hasattr(leads, "__len__") or not any(np.ndim(name) for name in leads)


def complete(signal, fs, leads, units):
    """A Recording; ValueError if its rate or its leads are not given."""
    if isinstance(signal, Recording):
        return signal
    if fs is None or leads is None:
        raise ValueError("fs or leads is absent: give fs, the sampling rate in Hz, and leads, a name per lead")
    return Recording(signal, fs, leads, units)


def check_amplitude(signal_mv, units):
    """Raise Refused if a recording (L, T) mV is so large or so small that `units` must be wrong."""
    ordered, count = np.sort(signal_mv, axis=1), np.isfinite(signal_mv).sum(axis=1)     # missing samples come last
    count, ordered = count[count > 0], ordered[count > 0]
    low, high = (ordered[np.arange(len(count)), np.rint(share * (count - 1)).astype(int)] for share in (0.01, 0.99))
    spread, missing = (high - low).max(initial=0), np.isnan(signal_mv).mean()
    if not MIN_SPREAD_MV <= spread <= MAX_SPREAD_MV or missing > 0.5 and spread > MAX_SPREAD_MV / 2:
        raise Refused("amplitude", f"the signal spans {spread:.2g} mV if it is in {units}, and {missing:.0%} of "
                                   f"its samples are unusable; an ECG spans {MIN_SPREAD_MV} to {MAX_SPREAD_MV:g} mV: "
                                   "check the units")


# ---- a recording to windows, and their features back to the recording -----------------------------------------------
def cut_patches(recording, patch_samples):
    """Preprocess a Recording and cut it into N patches of P samples at FS. Returns patches float32 (L, N, P), NaN where
    samples are missing; valid (L, N) bool, the patches without a missing sample; lead ids (L,). Samples after the last
    whole patch are left out. ValueError if no patch is valid or the unit is wrong."""
    signal_mv, lead_ids = preprocess(*recording[:4])
    N = signal_mv.shape[1] // patch_samples
    if N == 0:
        raise ValueError(f"the recording lasts {signal_mv.shape[1] / FS:.3f} s; at least one patch of "
                         f"{patch_samples / FS:.1f} s is needed")
    check_amplitude(signal_mv, recording.units)
    patches = signal_mv[:, :N * patch_samples].reshape(len(lead_ids), N, patch_samples)
    valid = np.isfinite(patches).all(axis=2)
    if not valid.any():
        raise Refused("no valid patch", "every patch of the recording has missing samples (NaN, or a flat or saturated "
                                        "signal); nothing is left to embed")
    return patches, valid, lead_ids


def cut_windows(patches, window, stride):
    """Yield (first patch, patches (L, N, P)) of each window with a valid patch; the last ends with the recording."""
    N = patches.shape[1]
    starts = [0] if N <= window else [*range(0, N - window, stride), N - window]
    for start in starts:
        part = patches[:, start:start + window]
        if np.isfinite(part).all(axis=2).any():
            yield start, part.copy()             # a view would keep the whole recording in memory


class RecordingFeatures:
    """Collects the features of one recording of `shape` (L, N) patches from its windows; rows: the leads in these.

    local: keep the features of the patches too. Without any window the global feature is NaN.
    """

    def __init__(self, rows, shape, width, local):
        self.rows, self.sum, self.weight = rows, np.zeros(2 * width), 0
        self.local = np.full((*shape, width), np.nan, np.float32) if local else None
        self.distance = np.full(shape[1] if local else 0, np.inf)            # of each patch to a window's centre

    def add(self, start, pooled, weight, local):
        """Add the output of the window from patch `start`: pooled (2D,), its weight, and local (L, N, D) or None."""
        self.sum += weight * pooled
        self.weight += weight
        if local is not None:
            # The quarter of a patch prevents ties: they would make the result depend on the order of the windows.
            distance = np.abs(np.arange(local.shape[1]) - (local.shape[1] - 1) / 2 - 0.25)
            nearer = np.flatnonzero(distance < self.distance[start:start + len(distance)])
            self.local[self.rows[:, None], start + nearer] = local[:, nearer]
            self.distance[start + nearer] = distance[nearer]

    def whole(self, patch_s):
        """The global feature (2D,), its first half, and local features (L, N, D) and their times (N,), if kept."""
        feature = (self.sum / (self.weight or np.nan)).astype(np.float32)
        times_s = None if self.local is None else (np.arange(self.local.shape[1]) + 0.5) * patch_s
        return feature, feature[:len(feature) // 2], self.local, times_s


# ---- reading one recording from a file ------------------------------------------------------------------------------
# Plain WFDB headers: one file, one format, no skew, no frames. See header(5) of the WFDB manual.
RECORD_LINE = re.compile(r"[^\s/]+ +(\d+) +(\d+\.?\d*)(?:[/(]\S*)? +(\d+)(?: .*)?")
SIGNAL_LINE = re.compile(r"(\S+) +(16|212)(?:x1)?(?:\+(\d+))? +([\d.eE+-]+)(?:\((-?\d+)\))?(?:/(\S+))? +\d+ +(-?\d+)"
                         r"(?: +-?\d+ +-?\d+ +\d+(?: +(.*))?)?")


def read_wfdb(path):
    """Read a WFDB record: a Recording with signal (T, L) in mV. Raises Refused if the file is absent or damaged."""
    with readable(path):
        signal, fs, names, units = read_plain_wfdb(path) or read_any_wfdb(path)
    scale = np.array([MV_PER_UNIT.get(str(unit).lower(), np.nan) for unit in units])
    volts = np.flatnonzero(np.isfinite(scale))
    if not len(volts):
        raise Refused("no voltage channel", f"units {units}: expected at least one channel in mV, uV or V")
    if len(volts) < len(scale) or (scale != 1).any():
        signal = signal[:, volts] * scale[volts]
    return Recording(signal, fs, [names[i] or "" for i in volts], left_out=len(scale) - len(volts))


def read_plain_wfdb(path):
    """Signal (T, L) in physical units, fs, names and units of a plain header with format 16 (also the .mat files of the
    Challenges) or 212: what wfdb.rdrecord reads, several times as fast. None for other or damaged files."""
    with open(any_case(f"{path}.hea"), errors="replace") as file:
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
    source = any_case(os.path.join(os.path.dirname(path), name))
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
    """The same with wfdb, for all other formats."""
    lines = header_lines(f"{path}.hea")
    claimed = int(lines[0][1]) * int(lines[0][3]) if len(lines[0]) > 3 else 0
    if claimed > MAX_SAMPLES:                                      # wfdb would allocate before it checks
        raise ValueError(f"the header says {claimed:,} samples, more than {MAX_SAMPLES:,} are not read at once")
    record = rdrecord_any_date(path)
    return record.p_signal, record.fs, record.sig_name, record.units or []


def rdrecord_any_date(path):
    """wfdb.rdrecord, also for headers whose date and time it refuses (Challenge 2017 has them in swapped order)."""
    import wfdb  # imported here: features of an array do not need it
    try:
        return wfdb.rdrecord(path)
    except (ValueError, FileNotFoundError) as error:                   # a date, or a name in capitals
        path = Path(path)
        record_line, *signal_lines = header_lines(f"{path}.hea")
        has_no_date = len(record_line) <= 4                            # NAME CHANNELS RATE SAMPLES
        if "/" in record_line[0] or has_no_date and isinstance(error, ValueError):
            raise
        with tempfile.TemporaryDirectory() as folder:  # the same record, under a header that stops before the date
            lines = [record_line[:4], *signal_lines]
            Path(folder, f"{path.name}.hea").write_text("\n".join(map(" ".join, lines)))
            for name in {fields[0] for fields in signal_lines}:
                os.symlink(any_case(path.parent.resolve() / name), Path(folder, name))
            return wfdb.rdrecord(f"{folder}/{path.name}")


def header_lines(path):
    """The fields of every line of a WFDB header that is not a comment."""
    lines = [line.split() for line in Path(any_case(path)).read_text(errors="replace").splitlines()]
    return [fields for fields in lines if fields and not fields[0].startswith("#")]


def read_edf(path):
    """Read an EDF or EDF+ file: a Recording with signal (L, T) in mV, at the highest rate of its voltage channels; NaN
    between the parts of a recording with interruptions (EDF+D). Raises Refused if the file is absent or damaged.

    wfdb.io.convert.edf.read_edf rounds baselines, reads all channels at the lowest rate, and refuses interruptions.
    """
    with readable(path):
        with open(path, "rb") as file:
            head = file.read(256).decode("latin-1")
            n_channels = int(head[252:256])
            text = file.read(256 * n_channels).decode("latin-1")
            data = np.fromfile(file, "<i2")
        columns, start = [], 0                   # one list per field of the channels; see edfplus.info/specs/edf.html
        for width in (16, 80, 8, 8, 8, 8, 8, 80, 8):
            fields = [text[start + i * width:][:width].strip() for i in range(n_channels)]
            columns.append([field.replace("\xc2", "") for field in fields])           # of a µ in UTF-8
            start += n_channels * width
        names, _, units, low, high, digital_low, digital_high, _, counts = columns
        counts, seconds, n_records = np.array(counts, int), float(head[244:252]), int(head[236:244])
        n_records = n_records if n_records >= 0 else len(data) // counts.sum()       # -1: not known
        if head[:8].strip() != "0" or not 0 < n_records * counts.sum() <= len(data) or counts.min() < 1:
            raise ValueError(f"version {head[:8]!r}, {n_records} records of {counts.sum()} samples, but {len(data)} "
                             "samples are there: expected EDF's version 0 and at least as many samples")
        channels = np.split(data[:n_records * counts.sum()].reshape(n_records, -1), counts.cumsum()[:-1], axis=1)
        volts = [i for i, unit in enumerate(units) if unit.lower() in MV_PER_UNIT]
        is_notes = np.array([name in ("EDF Annotations", "BDF Annotations") for name in names])
        if not volts:
            raise Refused("no voltage channel", f"units {units}: expected at least one channel in mV, uV or V")
        n = counts[volts].max()                  # samples per record and lead
        at = np.arange(n_records) * n
        if head[192:197] == "EDF+D":             # the first note of a record says when it begins
            onsets = [float(row.tobytes().split(b"\x14")[0]) for row in channels[int(np.argmax(is_notes))]]
            at = np.rint((np.array(onsets) - onsets[0]) * n / seconds).astype(int)
        if not 0 < at[-1] + n <= MAX_SAMPLES // len(volts) or (np.diff(at) < n).any():
            raise ValueError(f"{n_records} records take {at[-1] + n:,} samples: expected records one after the other, "
                             f"and at most {MAX_SAMPLES:,} samples in all")
        signal = np.full((len(volts), at[-1] + n), np.nan)
        for lead, i in zip(signal, volts):
            gain = (float(high[i]) - float(low[i])) / (float(digital_high[i]) - float(digital_low[i]))
            x = ((channels[i] - float(digital_low[i])) * gain + float(low[i])) * MV_PER_UNIT[units[i].lower()]
            ratio = Fraction(int(n), int(counts[i]))
            breaks = np.flatnonzero(np.diff(at) > n) + 1
            for part, first in zip(np.split(x, breaks), at[np.r_[0, breaks]]):
                part = resample_poly(part.ravel(), ratio.numerator, ratio.denominator, padtype="line")
                lead[first:first + len(part)] = part
    return Recording(signal, n / seconds, [names[i] for i in volts], left_out=int((~is_notes).sum()) - len(volts))


def read_array(path, fs, units, leads):
    """The Recording in a file of one of ARRAY_READERS. fs: a number, also as text. leads: names with ";", "," or spaces
    between them; "" if the file has a header of names. Raises Refused if the file is absent or damaged."""
    names = re.split(r"\s*[;,]\s*" if re.search("[;,]", leads) else r"\s+", leads.strip()) if leads.strip() else []
    with readable(path):
        signal, header = ARRAY_READERS[Path(path).suffix.lower()](path)
        fs = float(fs or "nan")
    header = [re.sub(r"[\[(].*", "", name).strip() for name in header]             # "II (mV)" is II
    known = [name.lower() for name in header]
    columns = [i for i, name in enumerate(known) if name not in NO_LEAD_COLUMNS]
    if {name.lower() for name in names} <= {*known} and names:
        columns = [known.index(name.lower()) for name in names]
    if header:
        signal, names = signal[:, columns], names or [header[i] for i in columns]
    if not names:
        raise Refused("leads", "no names of leads, and the file has no header with names: name them in the table")
    return Recording(signal, fs, names, units)


def read_csv(path):
    """(T, L) numbers of a CSV file, and the names in its header: [] without a header."""
    import pandas as pd
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first, second = file.readline(), file.readline()
    separator = max(",;\t", key=first.count)
    point = "," if separator == ";" and "," in first + second else "."
    cells = [cell.strip().strip('"') for cell in first.strip("\n").split(separator)]
    try:
        header = [float(cell.replace(point, ".")) for cell in cells if cell] and []
    except ValueError:                           # not all are numbers
        header = cells
    table = pd.read_csv(path, sep=separator, decimal=point, header=None, skiprows=int(bool(header)))
    return table.to_numpy(np.float64), header


def only_array(arrays):
    """The array named signal, or the only one with more than one number, of a .npz or .mat file; and no header."""
    arrays = {name: x for name, x in arrays.items() if getattr(x, "size", 0) > 1 and x.dtype.kind in "biuf"}
    if "signal" not in arrays and len(arrays) != 1:
        raise ValueError(f"it holds the arrays {sorted(arrays)}: expected one, or one named signal")
    return arrays.get("signal", next(iter(arrays.values()))), []


def read_mat(path):
    from scipy.io import loadmat
    return only_array(loadmat(path))


ARRAY_READERS = {".csv": read_csv, ".npy": lambda path: (np.load(path), []), ".mat": read_mat,
                 ".npz": lambda path: only_array(np.load(path))}
NO_LEAD_COLUMNS = ("", "time", "t", "timestamp", "date", "datetime", "sample", "samples", "index", "unnamed: 0", "ms",
                   "s", "sec", "second", "seconds", "n")  # of a CSV header


# ---- files ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def readable(path):
    """Errors while a file is read become Refused, with their cause."""
    try:
        yield
    except Refused:
        raise
    except FileNotFoundError as error:
        raise Refused("absent file", f"{Path(error.filename or path).name} is not there") from None
    except Exception as error:  # a damaged file may raise anything
        raise Refused("unreadable or truncated file", f"{type(error).__name__}: {error}") from None


def any_case(path):
    """`path` if it is there; otherwise the file of its folder whose name differs only in capitals (.HEA and .DAT of a
    Windows export), if there is one; otherwise `path`."""
    folder, name = os.path.split(path)
    if not os.path.exists(path) and os.path.isdir(folder or "."):
        name = names_by_lower(folder or ".", os.stat(folder or ".").st_mtime_ns).get(name.lower(), name)
    return os.path.join(folder, name)


@functools.lru_cache(1)
def names_by_lower(folder, changed_ns):
    """The names in a folder by their lower-case form, listed again only when the folder changes."""
    return {name.lower(): name for name in sorted(os.listdir(folder), reverse=True)}


def atomic_write(path, content):
    """Write a file whole or not at all, even if the machine stops.

    content: bytes, text, or a function that writes into the open binary file.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.tmp")
    with open(part, "wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def sha256(path):
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
