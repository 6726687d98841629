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
import json
import math
import os
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict, namedtuple
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
from scipy.io import loadmat
from scipy.signal import firwin, resample_poly

FS = 250                         # Hz: more than twice the 40 to 100 Hz that a diagnostic ECG needs; Icentia11k's own
UV_PER_MV = 1000                 # a step of the stored int16 is 1 uV, which is also what PTB-XL stores
MISSING = -32768                 # int16 value of a missing sample
MAX_MV = 32.767                  # largest amplitude in int16; above it an electrode is off or the amplifier saturated
FS_RANGE = (50, 100_000)         # Hz, of an ECG: below 50 no QRS is left, above 100,000 the header is wrong
PAD_S = 0.5                      # s, exact zeros at either end for this long are padding
FLAT_S = 1.0                     # s, a value held exactly for this long is a disconnected or saturated lead
FLAT_STD_MV = 1e-4               # mV, a lead with a smaller standard deviation over the whole recording is flat
MAX_SAMPLES = 2**28              # of all channels together, at their own rate, that are read at once
PIECE_S, PIECE_SAMPLES = 7200, 2**23  # a longer record is prepared in pieces: s, and samples of all channels together
MAX_RECORD_S = 400 * 86400       # s; a record that claims to be longer has a damaged header
NOTE_LENGTH = 300                # characters of a note in a FeatureTable; NumPy makes all as long as the longest
MAX_LEADS = 16                   # leads that an index row holds; a recording with more keeps its first 16
MAX_TAPS = 100_000               # largest factor of the resampler; it bounds time and memory for rates like 3999.999
# The span of a lead is the range of its values within SPAN_S, which holds a QRS but little drift: the 80th percentile
# over the recording. Beyond the limits the unit or the gain is wrong. Outside USUAL_MV it may be wrong by 10: 0.6 % of
# 9,946 real recordings of seven databases lie there.
SPAN_S, SPAN_LIMITS_MV, USUAL_MV = 0.2, (0.005, 20.0), (0.2, 8.0)
MAX_OFFSET_MV = 300.0            # what an ECG amplifier has to stand from its electrodes, IEC 60601-2-25
MAX_BEYOND = 0.2                 # share of a lead's samples beyond MAX_MV: if there are more, the lead is no ECG

LEADS = ("unknown", "I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6",
         "V7", "V8", "V9", "V3R", "V4R", "X", "Y", "Z")              # a lead id is an index into this tuple
LEAD_IDS = {name.upper(): i for i, name in enumerate(LEADS)}
LEAD_ALIASES = {
    "VX": "X", "VY": "Y", "VZ": "Z", "MCL1": "V1", "MCL6": "V6",     # Frank leads as PTB writes them; bedside monitors
    "LA-RA": "I", "LL-RA": "II", "LL-LA": "III",                     # Einthoven's definition, in sleep studies
    "AVR,AUGMENTEDVOLTAGE,RIGHT": "aVR", "AVL,AUGMENTEDVOLTAGE,LEFT": "aVL",   # DICOM
    "AVF,AUGMENTEDVOLTAGE,FOOT": "aVF"}
for _i, _lead in enumerate(LEADS[1:4], 1):                           # DI, D1: CODE; MLI, ML1: modified leads of Holters
    LEAD_ALIASES |= {f"{word}{end}": _lead for word in ("D", "ML") for end in (_i, _lead)}
LEAD_ALIASES |= {f"{word}{lead}": lead for word in ("M", "ML") for lead in LEADS[7:13]}
# Numbers of leads in SCP-ECG (EN 1064), which DICOM (PS3.16 CID 3001: 5.6.3-9-n, MDC 2:n) and IEEE 11073-10101
# (131072 + n, and 256 more for the potential itself) took over; in the order of LEADS.
for _i, _lead in zip((1, 2, 61, 62, 63, 64, *range(3, 9), 9, 66, 67, 11, 12, 16, 17, 18), LEADS[1:]):
    LEAD_ALIASES |= {f"{word}{_i + more}": _lead for word, more in
                     (("5.6.3-9-", 0), ("2:", 0), ("2:", 256), ("", 131072), ("", 131328))}
# What stands around a name: "ECG II" of EDF+ (edfplus.info/specs/edftexts.html), "Lead I (Einthoven)" of DICOM,
# MDC_ECG_LEAD_II of HL7 aECG, "II-Ref" of EEG amplifiers, "II," of BIDMC. A minus before aVR is a sign (Cabrera).
LEAD_NAME = re.compile(r"(?:(?:MDC(?:_ECG_(?:LEAD|ELEC_POTL))?|ECG|EKG|LEAD)(?:[\s_.:]+|-(?!AVR)|(?=[^\s_.:-])|$))*"
                       r"(.*?)(?:-REF|\s*\((?:EINTHOVEN|GOLDBERGER|WILSON|FRANK)\))?[\s,;.]*")
UNIT_IN_NAME = re.compile(r"(.*?\S)(?:\s*[\[(]([mu\u00b5\u03bc]?V)[\])]|[\s_]+([mu\u00b5\u03bc]V))\s*", re.IGNORECASE)
TIME_NAME = re.compile(r"'?(?:ELAPSED[ _])?(?:(?:DATE[ _]?)?TIME(?:STAMP)?S?|DATE|T|SAMPLES?|INDEX|MS|M?SEC(?:OND)?S?)"
                       r"(?:[ _]?(?:#|NO|NUMBER|INTERVAL|M?S|[\[(].*[\])]))?'?")
# Names of what is no ECG, whatever its unit: the signals of MIMIC and of other bedside monitors (physionet.org/content/
# mimic3wdb), the types of EDF+, and those of sleep studies (sleepdata.org) and of wearables.
NO_ECG = re.compile("(?:" + "|".join(r"""
    RESP(?:IRATION|IRATORY)? PLETH\w* PPG ABP I?BP NIBP ART(?:ERIAL)? AO CVP PAP ICP [LRU]AP UVP P\d PRES(?:S(?:URE)?)?
    SP?O2 SAO2 OSAT OX\w* O2 (?:ET)?CO2 CAPNO\w* [EM]EG E[MO]G ERG I?EGM GSR EDA UC TOCO [DFM]?HR H\.R PULSE PR TEMP\w*
    THERM\w* THOR[A-Z]*(?!_\d|.*ECG) ABDO?[A-Z]*(?!_\d|.*ECG) NASAL CANNULA (?:AIR)?FLOW NEW\s?AIR CPAP SNOR\w*
    CHIN R?LEG TIB\w* POS(?:ITION)? LIGHT SOUND EVENTS? MARKERS? STAT(?:US)? STIM\w* TRIG\w* EDF\sANNOTATIONS BATT\w*
    ACC\w* GYRO\w* [SPB]CG PHONO\w* IMP(?:EDANCE)? LOC ROC""".split())
                    + r")(?![A-Z])|(?:FP|F|C|P|O|T|E)[\dZ]-(?:REF|AVG|[A-Z]{1,2}[\dZ])")
MV_PER_UNIT = {"mv": 1.0, "millivolt": 1.0, "millivolts": 1.0, "uv": 1e-3, "\u00b5v": 1e-3, "\u03bcv": 1e-3,
               "microvolt": 1e-3, "microvolts": 1e-3, "v": 1e3, "volt": 1e3, "volts": 1e3}

NOT_READ = "other things in these folders, which were not read"  # a note: their kinds and numbers
OTHER_FORMATS = set(".dat .mat .edf .bdf .gdf .rec .ecg .dcm .xml .scp .csv .tsv .npy .npz .h5 .hdf5 .parquet .mef "
                    ".zip .gz .tar .7z .pdf".split())  # suffixes of files that may hold recordings

MM_PER_S, MM_PER_MV, MM_PER_INCH = 25, 10, 25.4  # of ECG paper
MARGIN_MM, NAME_MM, MIN_WIDTH_MM = 4, 4, 95  # left and right of an ECG; of the names above a row; room for a title
PAPER_MARGINS_MM = 16, 34        # of a figure, both sides together: width, height
MAX_SHOWN_MV = 4.0               # about a lead's median; what is beyond is cut off


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
    notes: Counter | None = None  # what the reader left out or did not understand: how often, by reason


@functools.lru_cache(10_000)
def name_and_unit(name):
    """The name of a lead as text, and the unit that it holds ("II (mV)", b"V1_uV") or None."""
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    found = UNIT_IN_NAME.fullmatch(text)
    return (found[1], found[2] or found[3]) if found else (text.strip(), None)


@functools.lru_cache(10_000)
def lead_id(name):
    """Index of a lead in LEADS, for any spelling ("II", "lead II", b"MLII" and "ECG DII" all give 2); 0 if unknown."""
    key = re.sub(r"[\s_]", "", LEAD_NAME.fullmatch(name_and_unit(name)[0].upper().replace("\n", " "))[1])
    return LEAD_IDS.get(LEAD_ALIASES.get(key, key).upper(), 0)


@functools.lru_cache(10_000)
def is_no_ecg(name):
    """Whether a channel of this name is known to be something else than an ECG."""
    text = name_and_unit(name)[0].upper()
    return not lead_id(name) and bool(NO_ECG.match(text) or TIME_NAME.fullmatch(text))


def preprocess(signal, fs, leads, units="mV", notes=None):
    """Convert any recording to the one form that the encoder knows.

    signal (L, T) or (T, L) in `units` (mV, uV or V) at `fs` Hz; NaN and values under a NumPy mask are missing. leads: L
    names; a single lead may be 1-D; a unit in a name ("V1 (uV)") goes before `units`. Returns signal_mv float32
    (L, ceil(T * FS / fs)), NaN where missing, and lead_ids int64 (L,). A channel that is no ECG by its name is NaN.
    Only the resampler filters, nothing is normalised, and 250 Hz passes unchanged. notes: a Counter that gets what was
    left out or looks wrong; without it this is a warning. Raises Refused, a ValueError, if it is no such recording.
    """
    found = Counter()
    x, names = as_lead_rows(signal, fs, leads, units)
    ids = np.array([lead_id(name) for name in names], dtype=np.int64)
    leave_out_channels(x, names, ids, found)
    check_values(x, fs, units, found, getattr(getattr(signal, "dtype", None), "kind", None) in ("i", "u"))
    mark_missing(x, fs)
    missing = np.isnan(x).mean(axis=1)
    if (missing == 1).all():
        raise Refused("no valid lead", "no sample of this recording is usable: every lead is flat, zero, NaN or beyond "
                                       f"+-{MAX_MV} mV; check the units (now {units!r}) and the gain")
    if missing[missing < 1].mean() > 0.5:
        found["signals of which more than half of the samples are missing"] += 1
    x = resample(x, Fraction(FS) / Fraction(float(fs)).limit_denominator(1000))
    if notes is None:
        warn_of(found)
    else:
        notes.update(found)
    return x.astype(np.float32), ids


def warn_of(notes):
    """One warning with all that was left out or not understood."""
    if notes:
        some = [f"{what} ({n})" for what, n in notes.most_common(20)]
        warnings.warn("; ".join(some) + ("; ..." if len(notes) > 20 else ""), stacklevel=3)


def as_lead_rows(signal, fs, leads, units):
    """A new float64 array (L, T) of the signal in mV, with NaN for inf, and L names. Raises Refused if it is wrong."""
    if not isinstance(fs, (int, float, np.integer, np.floating)) or not FS_RANGE[0] <= fs <= FS_RANGE[1]:
        raise Refused("sampling rate", f"fs is {fs!r}: expected the sampling rate in Hz, "
                                       f"a number from {FS_RANGE[0]} to {FS_RANGE[1]}")
    if isinstance(leads, (set, frozenset)):
        raise Refused("leads", f"leads is the set {leads!r:.80}, and a set has no order: give a list of names")
    try:
        names = [leads] if isinstance(leads, (str, bytes)) else list(leads)
        own = [name_and_unit(name)[1] for name in names]
        signal = signal.to_numpy() if hasattr(signal, "columns") else signal         # a pandas table
        if getattr(getattr(signal, "dtype", None), "kind", "f") in "cmM":            # complex, or times
            raise TypeError(f"it holds {signal.dtype}")
        masked = not isinstance(signal, np.ndarray) or isinstance(signal, np.ma.MaskedArray)
        x = np.array(np.ma.array(signal, dtype=np.float64).filled(np.nan) if masked else signal, dtype=np.float64)
    except (ValueError, TypeError, RuntimeError) as error:
        raise Refused("shape", f"signal or leads cannot be read ({error}): expected numbers (leads, samples) and one "
                               "name per lead") from None
    if not all(own) and str(units).lower() not in MV_PER_UNIT:
        raise Refused("units", f"units is {units!r}: expected mV, uV or V; scale the signal and say units=\"mV\"")
    if x.ndim == 1 and len(names) == 1:
        x = x[None]
    if x.ndim != 2 or len(names) not in x.shape:
        raise Refused("shape", f"signal has shape {x.shape} and leads names {len(names)}: expected (leads, samples) or "
                               "(samples, leads) with one name per lead")
    x = x if len(x) == len(names) else np.ascontiguousarray(x.T)
    if x.size == 0:
        raise Refused("empty", f"signal is empty (shape {x.shape}): expected at least one lead and one sample")
    scale = np.array([MV_PER_UNIT[str(unit or units).lower()] for unit in own])
    if (scale != 1).any():
        x *= scale[:, None]
    x[np.isinf(x)] = np.nan
    return x, names


def leave_out_channels(x, names, ids, notes):
    """Write NaN into the channels of x (L, T) that are no ECG by their name, and count what is not known. Raises
    Refused for a time column."""
    for k in np.flatnonzero(ids == 0):
        name = name_and_unit(names[k])[0]
        if TIME_NAME.fullmatch(name.upper()):
            raise Refused("time column", f"lead {k} is named {name!r}: time is no lead; leave it out of signal and "
                                         "leads, and give the rate as fs")
        if is_no_ecg(name):
            x[k] = np.nan
            notes[f"channels left out: {name:.40}"] += 1
        elif name != LEADS[0]:
            notes[f"leads stored as unknown: the name {name!r:.40}"] += 1
        if (np.diff(x[k, :9]) > 0).all() and x.shape[1] > 50 and (np.diff(x[k]) > 0).all():
            x[k] = np.nan
            notes["channels left out: one that only rises, like time"] += 1
    if all(map(is_no_ecg, names)):
        raise Refused("no ECG channel", f"the channels {', '.join(map(str, names)):.80} are no ECG by their names")


def check_values(x, fs, units, notes, integers):
    """Judge amplitude and offset of x (L, T) mV. A lead whose span, offset or share of samples beyond +-MAX_MV no ECG
    has becomes NaN; Refused is raised if all are like this. Other samples beyond +-MAX_MV become NaN, counted from 0
    or, where a lead rides on more than half of MAX_MV, from its offset, its median. What looks normalised or wrong by
    10 is counted in `notes`. integers: whether the numbers came as integers, as those of an ADC do."""
    starts = np.arange(0, x.shape[1], max(1, round(SPAN_S * fs)))
    high, low = np.fmax.reduceat(x, starts, axis=1), np.fmin.reduceat(x, starts, axis=1)
    spans = np.where(high > low, high - low, np.nan)               # a block where a value is held says nothing
    count, rows = np.isfinite(spans).sum(axis=1), np.arange(len(x))
    live = count > 0
    if not live.any():
        return
    span = np.sort(spans, axis=1)[rows, np.rint(0.8 * (count - 1)).astype(int)]      # NaN comes last
    offset = np.sort(np.where(spans > 0, (high + low) / 2, np.nan), axis=1)[rows, (count - 1) // 2]
    centre = np.where(np.abs(offset) > MAX_MV / 2, offset, 0)[:, None]
    beyond = np.zeros(len(x))
    if max(np.nanmax(high - centre), np.nanmax(centre - low)) > MAX_MV:
        outside = np.abs(x - centre) > MAX_MV
        beyond = outside.mean(axis=1)
        x[outside] = np.nan
    wrong = live & ((span < SPAN_LIMITS_MV[0]) | (span > SPAN_LIMITS_MV[1]) | (np.abs(offset) > MAX_OFFSET_MV)
                    | (beyond > MAX_BEYOND))
    if (wrong == live).all():
        k = np.nanargmax(span)
        real = "".join(f"; in {unit} it would be {span[k] * share:.2g} mV" for unit, share in
                       (("uV", 1e-3), ("V", 1e3)) if 0.2 < span[k] * share < 10)
        hint = " (the numbers are integers: divide ADC steps by the gain, in steps per mV)" if integers else ""
        raise Refused("amplitude", f"the signal spans {span[k]:.2g} mV within {SPAN_S} s, on an offset of "
                                   f"{offset[k]:.3g} mV, if it is in {units}{real}; an ECG spans {SPAN_LIMITS_MV[0]} "
                                   f"to {SPAN_LIMITS_MV[1]:g} mV, on at most {MAX_OFFSET_MV:g}: check the units{hint}")
    if wrong.any():
        x[wrong] = np.nan
        notes["leads left out: an amplitude or offset that no ECG has"] += int(wrong.sum())
    good = live & ~wrong
    largest, top, bottom = span[good].max(), np.fmax.reduce(high[good], axis=1), np.fmin.reduce(low[good], axis=1)
    ends = [set(zip(bottom, top)), {(bottom.min(), top.max())}]
    if {(0, 1)} in ends or {(-1, 1)} in ends or is_z_score(x[good]):
        notes["signals that look normalised (mean 0, deviation 1, or from 0 or -1 to 1): the scale in mV is lost"] += 1
    elif not USUAL_MV[0] <= largest <= USUAL_MV[1]:
        notes[f"signals that span {'more' if largest > 1 else 'less'} than most ECGs: the gain may be wrong by 10"] += 1


def is_z_score(x):
    """Whether the leads of x (L, T), or all of them together, have mean 0 and standard deviation 1."""
    some = x[:, ::16]
    some = some[np.isfinite(some)]
    if not len(some) or not 0.7 < some.std() < 1.4:                # most ECGs, in little time
        return False
    return any((np.abs(np.nanmean(x, axis)) < 0.01).all() and (np.abs(np.nanstd(x, axis) - 1) < 0.01).all()
               for axis in (1, None))


@functools.lru_cache(32)
def low_pass(ratio):
    """The filter that resample_poly would make for every recording anew."""
    most = max(ratio.numerator, ratio.denominator)
    return firwin(20 * most + 1, 1 / most, window=("kaiser", 5.0))


def resample(x, ratio):
    """x (L, T), NaN where missing -> (L, ceil(T * ratio)). Fills the gaps of x in place."""
    if ratio == 1:
        return x
    if max(ratio.numerator, ratio.denominator) > MAX_TAPS:
        ratio = ratio.limit_denominator(int(MAX_TAPS / max(ratio, 1)))
    missing = np.isnan(x)
    bridge_gaps(x, missing)
    x = resample_poly(x, ratio.numerator, ratio.denominator, axis=1, padtype="line", window=low_pass(ratio))
    if missing.any():
        x[resample_missing(missing, ratio)] = np.nan
    return x


def mark_missing(x, fs):
    """Write NaN into x (L, T) mV at fs wherever there is a value but no signal: zeros at either end for PAD_S, any
    value held exactly for FLAT_S, and leads with a spread below FLAT_STD_MV. Of 26,000 real leads (PTB-XL, MIT-BIH,
    Challenges 2017 and 2021) none holds a value for 1 s unless it is completely flat: the rule removes no signal."""
    # A value held for FLAT_S fills a block of half that length. Few leads have such a block, and to look for it takes a
    # tenth of the time that it takes to measure all runs of equal values.
    block = max(1, int(min(FLAT_S, 2 * PAD_S) * fs) // 2)
    blocks = x[:, :x.shape[1] // block * block].reshape(len(x), -1, block)
    held_block = (blocks.max(axis=2) == blocks.min(axis=2)).any(axis=1)
    for k in np.flatnonzero(held_block | (x[:, 0] == 0) | (x[:, -1] == 0) | (x.shape[1] <= 2 * block)):
        edges = np.flatnonzero(np.diff(x[k])) + 1                  # NaN differs from NaN, so gaps are no runs
        starts, ends = np.r_[0, edges], np.r_[edges, x.shape[1]]
        held = ends - starts >= FLAT_S * fs
        for end in (0, -1):
            held[end] |= x[k, starts[end]] == 0 and ends[end] - starts[end] >= PAD_S * fs
        x[k, np.repeat(held, ends - starts)] = np.nan
    deviation = x.std(axis=1)
    for k in np.flatnonzero(~(deviation >= FLAT_STD_MV)):          # NaN too: a lead with gaps
        valid = x[k, np.isfinite(x[k])]
        if len(valid) and valid.std() < FLAT_STD_MV:
            x[k] = np.nan


def bridge_gaps(x, missing):
    """Fill the missing samples of x (L, T) with straight lines, so that the resampler does not ring or spread NaN."""
    t = np.arange(x.shape[1])
    for lead, gap in zip(x, missing):
        if gap.any():
            lead[gap] = 0.0 if gap.all() else np.interp(t[gap], t[~gap], lead[~gap])


def resample_missing(missing, ratio):
    """missing (L, T) at fs -> (L, T') at FS: an output sample is missing if any input sample near it is missing. Near
    are the two input samples around it and, if there are more, all within half an output step. Output sample n lies at
    n * down / up input samples, in integer arithmetic."""
    n_in, up, down = missing.shape[1], ratio.numerator, ratio.denominator
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
    leads = list(leads) if hasattr(leads, "__next__") else leads   # an iterator of names: every recording needs them
    signal = list(signal) if getattr(signal, "dtype", None) == object else signal
    about, shared = (fs, leads, units), (np.ndim(fs) == 0, is_lead_set(leads), isinstance(units, str) or units is None)
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
    return isinstance(leads, (str, bytes)) or not hasattr(leads, "__len__") or not any(np.ndim(name) for name in leads)


def complete(signal, fs, leads, units):
    """A Recording; ValueError if its rate or its leads are not given."""
    if isinstance(signal, Recording):
        return signal
    leads = list(signal.columns) if leads is None and hasattr(signal, "columns") else leads          # a pandas table
    if fs is None or leads is None:
        raise ValueError("fs or leads is absent: give fs, the sampling rate in Hz, and leads, a name per lead")
    return Recording(signal, fs, leads, units)


# ---- a recording to windows, and their features back to the recording -----------------------------------------------
def cut_patches(recording, patch_samples, notes):
    """Preprocess a Recording and cut it into N whole patches of P samples at FS. Returns patches float32 (L, N, P), NaN
    where samples are missing; valid (L, N) bool, the patches without a missing sample; lead ids (L,). ValueError if no
    patch is valid or the unit is wrong. notes: see preprocess."""
    notes.update(recording.notes)
    signal_mv, lead_ids = preprocess(*recording[:4], notes)
    N = signal_mv.shape[1] // patch_samples
    if N == 0:
        raise ValueError(f"the recording lasts {signal_mv.shape[1] / FS:.3f} s; at least one patch of "
                         f"{patch_samples / FS:.1f} s is needed")
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
        self.rows, self.sum, self.weight = rows, np.zeros(3 * width), 0
        self.local = np.full((*shape, width), np.nan, np.float32) if local else None
        self.distance = np.full(shape[1] if local else 0, np.inf)            # of each patch to a window's centre

    def add(self, start, pooled, weight, local):
        """Add the output of the window from patch `start`: pooled (3D,), its weight, and local (L, N, D) or None."""
        self.sum += weight * pooled
        self.weight += weight
        if local is not None:
            # The quarter of a patch prevents ties: they would make the result depend on the order of the windows.
            distance = np.abs(np.arange(local.shape[1]) - (local.shape[1] - 1) / 2 - 0.25)
            nearer = np.flatnonzero(distance < self.distance[start:start + len(distance)])
            self.local[self.rows[:, None], start + nearer] = local[:, nearer]
            self.distance[start + nearer] = distance[nearer]

    def whole(self, patch_s):
        """The global feature (3D,), its CLS, and local features (L, N, D) and their times (N,), if kept."""
        feature = (self.sum / (self.weight or np.nan)).astype(np.float32)
        times_s = None if self.local is None else (np.arange(self.local.shape[1]) + 0.5) * patch_s
        return feature, feature[:len(feature) // 3], self.local, times_s


def features_of_pieces(embed, pieces):
    """The row of a recording in a FeatureTable, and its first piece. embed: Encoder.embed; pieces: of read_any, each
    weighted by its valid patches. ValueError if none can be used."""
    first, features, weights, leads, seconds, notes = None, [], [], {}, 0, {}
    for start_s, recording in pieces:
        try:
            if isinstance(recording, Refused):
                raise recording
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                out = embed(recording)
        except ValueError as error:
            notes[f"left out from {start_s:g} s on: {error}" if first or start_s else str(error)] = None
            continue                             # the other pieces may be usable
        first, valid = first or recording, np.isfinite(out.local_features[..., 0])       # (L, N)
        features.append(out.global_feature)
        weights.append(valid.sum())
        leads |= {k: str(recording.leads[k]) for k in np.flatnonzero(valid.any(axis=1))}
        seconds += np.size(recording.signal) / len(recording.leads) / recording.fs
        notes |= dict.fromkeys(str(warning.message) for warning in caught)
    if not first:
        raise ValueError("; ".join(notes))
    feature = np.average(features, axis=0, weights=weights).astype(np.float32)
    names = ";".join(leads[k] for k in sorted(leads))
    return (feature, names, len(leads), seconds, f"{'; '.join(notes):.{NOTE_LENGTH}}"), first


class FeatureTable:
    """Features of recordings in a .npz file, which is written whole or not at all. A file that is there already is
    added to if `about` (a dict of plain types: how its features were made) is the same; ValueError otherwise.

    rows: {path: values of COLUMNS[1:]}; failed: {path: reason}, of this run.
    """
    COLUMNS = "path", "features", "leads", "n_leads", "seconds", "notes"

    def __init__(self, path, about):
        self.path, self.about, self.rows, self.failed = Path(path), json.loads(json.dumps(about)), {}, {}
        self.saved = time.monotonic()
        if not self.path.exists():
            return
        try:
            with np.load(path) as found:
                earlier = dict(json.loads(str(found["about"])))
                self.rows = {name: row for name, *row in zip(*(found[column] for column in self.COLUMNS))}
        except Exception as error:               # a foreign file may raise anything
            raise ValueError(f"{path} is no table of features ({type(error).__name__}: {error}); choose another "
                             "name") from None
        differ = [f"{key} {earlier.get(key)!s:.80}, now {self.about.get(key)!s:.80}" for key in self.about | earlier
                  if earlier.get(key) != self.about.get(key)]
        if differ:
            raise ValueError(f"{path} holds features that were made otherwise ({'; '.join(differ)}); choose another "
                             "name, or delete it")

    def save(self, every_s=0):
        """Write the file, if the last time is so many seconds ago."""
        if time.monotonic() - self.saved < every_s:
            return
        columns = dict(zip(self.COLUMNS, [*zip(*((path, *row) for path, row in self.rows.items()))] or [()] * 6))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, lambda file: np.savez(       # hardly compressible
            file, about=json.dumps(self.about), failed=[*self.failed], reasons=[*self.failed.values()], **columns))
        self.saved = time.monotonic()


# ---- reading one recording from a file ------------------------------------------------------------------------------
# WFDB: header(5) and signal(5) of its manual. wfdb.rdrecord averages the samples of a frame, gives all segments gain
# and unit of the first, and drops what is not ASCII: here it only unpacks the formats that are not in WORDS.
RECORD_LINE = re.compile(r"[^\s/]+(?:/(\d+))?\s+(\d+)(?:\s+(\d+\.?\d*)(?:[/(]\S*)?(?:\s+(\d+)(?:\s.*)?)?)?")
SEGMENT_LINE = re.compile(r"(\S+)\s+(\d+)")
SIGNAL_LINE = re.compile(r"(\S+)\s+(\d+)(?:x(\d+))?(?::(\d+))?(?:\+(\d+))?(?:\s+([-+\d.eE]+)(?:\(([-+\d.]+)\))?"
                         r"(?:/(\S+))?(?:\s+\d+(?:\s+(-?\d+)(?:\s+(-?\d+)(?:\s+-?\d+(?:\s+\d+(?:\s+(.*))?)?)?)?)?)?)?")
WORDS = {"16": "<i2", "61": ">i2", "32": "<i4"}
BITS = {"16": 16, "61": 16, "32": 32, "212": 12, "24": 24, "80": 8, "160": 16, "310": 10, "311": 10, "508": 8,
        "516": 16, "524": 24, "8": 0}                                # of a sample; its lowest value means "no sample"
BYTES = {"8": 1, "16": 2, "24": 3, "32": 4, "61": 2, "80": 1, "160": 2, "212": 1.5, "310": 4 / 3, "311": 4 / 3}
EDF_FIELDS = {"name": 16, "transducer": 80, "unit": 8, "low": 8, "high": 8, "first": 8, "last": 8, "filter": 80,
              "per_frame": 8, "reserved": 32}                        # of all channels; see edfplus.info/specs/edf.html
# A signal line of a header. key: its name, and how many channels of this name came before; offset: bytes (FLAC:
# samples) before the first frame; skew: frames by which it comes too early; mv: of a unit, None for other quantities;
# stated: whether the header says the gain.
Channel = namedtuple("Channel", "key file format per_frame skew offset gain zero mv unit initial stated",
                     defaults=[True])
# Frames `start` to `stop` of a record: a segment, or all of it. files: {file: its Channels}, which hold `frames`.
Part = namedtuple("Part", "start stop frames folder files")
# A record that is ready to be read. per_frame: samples of its fastest ECG channel; keys: of all its ECG channels.
OpenRecord = namedtuple("OpenRecord", "fs frames parts keys per_frame notes")


def read_wfdb(path, start_s=0, stop_s=math.inf):
    """Read a WFDB record, or a stretch of it: a Recording with signal (T, L) in mV. Raises Refused if its files are
    absent or damaged, or if it holds no ECG. FLAC needs soundfile. Channels slower than the fastest are resampled to
    its rate. A segment that cannot be read is missing samples, and a note."""
    with as_refused(path):
        record = open_record(str(path))
        start, stop = (round(min(max(0, at), record.frames / record.fs) * record.fs) for at in (start_s, stop_s))
        return read_stretch(record, start, stop)


read_edf = read_wfdb             # the suffix .edf decides


def open_record(path):
    """An OpenRecord of an EDF file (*.edf) or of a WFDB record (without suffix)."""
    return open_edf(path) if path.lower().endswith(".edf") else open_wfdb(path.removesuffix(".hea"))


def read_pieces(path):
    """Yield (start in s, Recording or Refused) of a record in pieces of at most PIECE_S and PIECE_SAMPLES, all but the
    last of whole seconds. To prepare one takes at most 0.5 GB (24 h of 3 leads at 250 Hz: 0.24), below 100 Hz up to 0.9
    GB, whatever the record's length; only format 8 is read from its start each time."""
    with as_refused(path):
        record = open_record(str(path))
    edges = piece_edges(record.frames, record.fs, record.frames * record.per_frame * len(record.keys))
    for start, stop in zip(edges, edges[1:]):
        try:
            with as_refused(path):
                recording = read_stretch(record, start, stop)._replace(notes=None if start else record.notes)
        except Refused as error:
            recording = error                    # the other pieces may be whole
        yield start / record.fs, recording


def piece_edges(frames, fs, samples):
    """Where pieces begin and end: frames from 0 to `frames`, which hold `samples` of all channels together."""
    n = max(math.ceil(frames / fs / PIECE_S), math.ceil(samples / PIECE_SAMPLES), 1)
    return [round(i * frames // n // fs * fs) for i in range(n)] + [frames]


@contextlib.contextmanager
def as_refused(path):
    """Turns what reading the files of a record may raise into Refused."""
    try:
        yield
    except (Refused, MemoryError):               # a lack of memory is no fault of the file
        raise
    except FileNotFoundError as error:
        raise Refused("absent file", f"{Path(error.filename or path).name} is not there") from None
    except ImportError as error:
        raise Refused("absent package", f"{error.name} is needed for it: run `pip install {error.name}`") from None
    except Exception as error:                                     # wfdb and soundfile may raise anything
        raise Refused("unreadable or truncated file", f"{Path(path).name}: {type(error).__name__}: {error}") from None


def open_wfdb(path):
    """Read the headers of a record and compare them with the sizes of its files: an OpenRecord."""
    fs, frames, channels, segments = read_header(path)
    folder, notes, layout, failed, parts, at = os.path.dirname(path), Counter(), [], [], [], 0
    if not segments:
        at = frames = frames_held(folder, channels, frames)
        parts.append(Part(0, at, at, folder, by_file(channels)))
    for i, (name, frames) in enumerate(segments):
        try:
            if name != "~":                                        # a gap
                with as_refused(name):
                    _, own, channels, _ = read_header(os.path.join(folder, name), fs)
                    if not i and not frames and not by_file(channels):
                        layout = channels                          # the names of all channels, without samples
                        continue
                    own = frames_held(folder, channels, own)
                notes["segments longer or shorter than their record says"] += frames not in (0, own)
                frames = frames or own
                parts.append(Part(at, at + frames, own, folder, by_file(channels)))
        except Refused as error:
            failed.append(error)
            notes[f"segments left out: {error.reason}"] += 1
        at += frames
    if failed and not parts:
        raise failed[0]
    return choose_channels(fs, at, [channel.key for channel in layout], parts, notes)


def choose_channels(fs, frames, order, parts, notes):
    """The OpenRecord of the ECG channels of `parts`, in `order` as far as this goes. Counts the others."""
    rates, dropped = dict.fromkeys(order, 0), {}
    for channel in (channel for part in parts for some in part.files.values() for channel in some):
        if not channel.mv or is_no_ecg(channel.key[0]):
            dropped[channel.key] = f"{channel.key[0]:.40}" + (f" in {channel.unit:.20}" if not channel.mv else "")
        else:
            rates[channel.key] = max(channel.per_frame, rates.get(channel.key, 0))
            if not channel.stated:
                notes["leads without a gain in the header, read as 200 steps per mV"] += 1
    fastest = max(rates.values(), default=0)
    if not fastest:
        raise Refused("no voltage channel", f"channels: {', '.join(dropped.values()) or 'none'}; expected an ECG in "
                                            "mV, uV or V")
    if not FS_RANGE[0] <= fastest * fs <= FS_RANGE[1]:
        raise Refused("sampling rate", f"{fastest * fs:g} samples per second: expected {FS_RANGE[0]} to {FS_RANGE[1]}")
    slow = {key: f"{key[0]:.40} at {n * fs:g} Hz" for key, n in rates.items() if 0 < n * fs < FS_RANGE[0]}
    notes.update(f"channels left out: {name}" for name in (dropped | slow).values() if "EDF Annotations" not in name)
    if not 0 < frames <= MAX_RECORD_S * fs:
        raise ValueError(f"it lasts {frames:,} frames at {fs} Hz: expected one or more, and at most {MAX_RECORD_S:,} s")
    keys = [key for key, n in rates.items() if n and key not in slow]
    return OpenRecord(fs, frames, parts, keys, fastest, +notes)


def read_header(path, record_fs=None):
    """Parse a WFDB header: frames per second, number of frames (0: not stated), its Channels, and its segments as
    (name, frames). record_fs: the rate of the record of which this is a segment. ValueError for a damaged one."""
    lines = header_lines(f"{path}.hea")
    record = RECORD_LINE.fullmatch(lines[0]) if lines else None
    if not record:
        raise ValueError(f"the header begins with {''.join(lines[:1])!r:.60}: expected name, number of signals, rate, "
                         "number of samples")
    n_segments, n_channels, frames = (int(record[i] or 0) for i in (1, 2, 4))
    fs, form, seen, channels = float(record[3] or 250), SEGMENT_LINE if n_segments else SIGNAL_LINE, Counter(), []
    found = [form.fullmatch(line) for line in lines[1:]]
    if len(found) != (n_segments or n_channels) or record_fs and (n_segments or fs != record_fs):
        raise ValueError(f"the header has {len(found)} lines for {n_segments} segments and {n_channels} signals at "
                         f"{fs} Hz: expected one for each, and in a segment the rate of its record and no segments")
    if None in found:
        raise ValueError(f"the line {lines[1 + found.index(None)]!r:.60} of the header: expected a file and its "
                         "format, gain, unit and the other fields of header(5)")
    if n_segments:
        return fs, frames, [], [(line[1], int(line[2])) for line in found]
    for line in found:
        file, format, per_frame, skew, offset, gain, zero, unit, adc_zero, initial, name = line.groups()
        if format not in {"0", *BITS} or per_frame == "0" or not math.isfinite(float(gain or 0)):
            raise ValueError(f"the line {line[0]!r:.60} of the header: expected a format of {', '.join(BITS)}, at "
                             "least one sample per frame, and a finite gain")
        name, unit = name_and_unit(name or "")[0], unit or "mV"
        # Defaults as in header(5): 200 steps per mV, also where the gain is 0; zero is that of the ADC.
        channels.append(Channel((name, seen[name]), "~" if format == "0" else file, format, int(per_frame or 1),
                                int(skew or 0), int(offset or 0), float(gain or 0) or 200.0,
                                float(zero or adc_zero or 0), MV_PER_UNIT.get(unit.lower()), unit,
                                int(initial or 0) if format == "8" else 0, bool(float(gain or 0))))
        seen[name] += 1
    return fs, frames, channels, []


def header_lines(path):
    """The lines of a WFDB header that are no comments."""
    text = as_text(Path(find_file(path)).read_bytes())
    return [line for line in map(str.strip, text.split("\n")) if line and not line.startswith("#")]


def as_text(data):
    """Bytes as UTF-8 or, if that fails, as Latin-1 (the micro sign)."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def find_file(path):
    """A path or, if there is no such file, the one in the same folder that differs from it only in capitals."""
    if os.path.exists(path):
        return path
    folder, name = os.path.split(path)
    same = names_by_lower(folder or ".", os.stat(folder or ".").st_mtime_ns)[name.lower()]
    return os.path.join(folder, same[0]) if len(same) == 1 else path


@functools.lru_cache(1)
def names_by_lower(folder, changed_ns):
    """{name in lower case: names in a folder}; it is listed again only when it changes."""
    names = defaultdict(list)
    for name in os.listdir(folder):
        names[name.lower()].append(name)
    return names


def by_file(channels):
    """{file: its Channels}, in the order of the header."""
    files = defaultdict(list)
    for channel in (channel for channel in channels if channel.file != "~"):       # "~" has no samples
        files[channel.file].append(channel)
    return files


def frames_held(folder, channels, stated):
    """Number of frames: `stated`, or what the smallest file holds if that is 0. ValueError if a file is too short."""
    held = []
    for name, some in by_file(channels).items():
        path, format, offset = find_file(os.path.join(folder, name)), some[0].format, some[0].offset
        if len({(channel.format, channel.offset) for channel in some}) > 1:
            raise ValueError(f"the channels of {name} differ in format or offset: expected one for a file")
        if format in BYTES:
            n_samples = int(max(0, os.path.getsize(path) - offset) / BYTES[format])
            held.append(n_samples // sum(channel.per_frame for channel in some))
        else:
            import soundfile
            held.append((soundfile.info(path).frames - offset) // some[0].per_frame)
        if held[-1] < stated:
            raise ValueError(f"{name} holds {held[-1]:,} samples per channel, and the header says {stated:,}")
    return stated or min(held, default=0)


def read_stretch(record, start, stop):
    """Frames start to stop of an OpenRecord: a Recording with signal (T, L) in mV, NaN where there is none."""
    rows, fastest = {key: row for row, key in enumerate(record.keys)}, record.per_frame
    if (stop - start) * fastest * len(rows) > MAX_SAMPLES:
        raise ValueError(f"more than {MAX_SAMPLES:,} samples are not read at once: read stretches (start_s, stop_s)")
    shape, signal = (len(rows), (stop - start) * fastest), None    # a row per lead: twice as fast from here on
    for part in record.parts:
        first, last = max(start, part.start) - part.start, min(stop, part.stop) - part.start
        for name, channels in part.files.items() if first < last else ():
            groups, column = defaultdict(lambda: ([], [])), 0      # the same operation for all channels of a kind
            for channel in channels:
                if channel.key in rows and channel.mv:
                    groups[channel.per_frame, channel.skew][0].append(channel)
                    groups[channel.per_frame, channel.skew][1].extend(range(column, column + channel.per_frame))
                column += channel.per_frame
            skews = [skew for _, skew in groups] or [part.frames]
            low, high = min(first + min(skews), part.frames), min(last + max(skews), part.frames)
            if low == high:
                continue
            frames = read_frames(os.path.join(part.folder, name), channels, low, high, part.frames)
            for (per_frame, skew), (group, columns) in groups.items():
                steps = frames[columns, first + skew - low:last + skew - low].reshape(len(group), per_frame, -1)
                x = in_mv(group, steps.swapaxes(1, 2).reshape(len(group), -1), record.fs, fastest)
                at, places = (first + part.start - start) * fastest, [rows[channel.key] for channel in group]
                if x.shape == shape and places == list(range(len(rows))):
                    signal = x                                     # all of it
                    continue
                signal = np.full(shape, np.nan) if signal is None else signal
                signal[places, at:at + x.shape[1]] = x
    signal = np.full(shape, np.nan) if signal is None else signal
    return Recording(signal.T, record.fs * fastest, [name for name, _ in record.keys], notes=record.notes)


def in_mv(channels, steps, fs, fastest):
    """ADC values (L, T) of channels of one rate and format -> float64 mV at the fastest's rate, NaN for "no sample"."""
    zeros, gains, mv = np.array([(channel.zero, channel.gain, channel.mv) for channel in channels]).T[..., None]
    x = steps - zeros
    x /= gains
    if (mv != 1).any():
        x *= mv
    invalid = steps == -2 ** (BITS[channels[0].format] - 1)
    if BITS[channels[0].format] and invalid.any():
        x[invalid] = np.nan
    if channels[0].per_frame != fastest:
        mark_missing(x, fs * channels[0].per_frame)                # before the resampler, which would smooth it
        x = resample(x, Fraction(fastest, channels[0].per_frame))
    return x


def read_frames(path, channels, first, last, n_frames):
    """Frames first to last of a signal file with n_frames: ADC values (samples per frame of all channels, frames)."""
    path, format, width = find_file(path), channels[0].format, sum(channel.per_frame for channel in channels)
    if format not in {*WORDS, "212"}:
        return read_frames_by_wfdb(path, channels, first, last, n_frames)
    extra = first * width % 2 if format == "212" else 0            # blocks of two samples
    begin, n_bytes = first * width - extra, math.ceil(((last - first) * width + extra) * BYTES[format])
    with open(path, "rb") as file:
        file.seek(channels[0].offset + int(begin * BYTES[format]))
        data = np.fromfile(file, np.uint8, n_bytes)
    if format == "212":                                            # 12 bits, two in three bytes; >> keeps the sign
        low, both, high = np.pad(data, (0, -len(data) % 3)).reshape(-1, 3).T
        both = both.astype(np.int16)
        pairs = np.stack((low | both << 12 >> 4, high | (both << 8 & -4096) >> 4), axis=1)
        return np.ascontiguousarray(pairs.reshape(-1)[extra:][:(last - first) * width].reshape(-1, width).T)
    return np.ascontiguousarray(data.view(WORDS[format]).reshape(-1, width).T)


def read_frames_by_wfdb(path, channels, first, last, n_frames):
    """read_frames for the other formats: wfdb reads them under a plain header, which it cannot misunderstand."""
    import wfdb  # imported here: features of an array do not need it
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.abspath(path), f"{folder}/r.dat")
        lines = [f"r {len(channels)} 250 {n_frames}", *(
            f"r.dat {c.format}x{c.per_frame}+{c.offset} 200 0 0 {c.initial} 0 0 {i}" for i, c in enumerate(channels))]
        Path(folder, "r.hea").write_text("\n".join(lines) + "\n")
        begin = 0 if channels[0].format == "8" else first          # format 8 holds differences
        found = wfdb.rdrecord(f"{folder}/r", begin, last, physical=False, smooth_frames=False, return_res=32).e_d_signal
    return np.concatenate([x.reshape(-1, c.per_frame).T for x, c in zip(found, channels)])[:, first - begin:]


def open_edf(path):
    """open_wfdb for an EDF or EDF+ file: its data records are frames. Where a recording is interrupted (EDF+D), samples
    are missing, for a whole number of data records. (wfdb.io.convert.edf.read_edf rounds baselines, averages channels
    down to the lowest rate, and refuses interruptions.)"""
    with open(path, "rb") as file:
        head = file.read(256).decode("latin-1")
        n_channels, seconds, n_records = int(head[252:256]), float(head[244:252]), int(head[236:244])
        dtype = [(name, f"S{width}", (n_channels,)) for name, width in EDF_FIELDS.items()]
        fields = np.frombuffer(file.read(256 * n_channels), dtype)[0]
    texts = {name: [text.decode("latin-1").strip().replace("\xc2", "") for text in fields[name]]
             for name in EDF_FIELDS}             # \xc2: half of a micro sign in UTF-8
    names, counts, seen, channels = texts["name"], [int(text) for text in texts["per_frame"]], Counter(), []
    offset, held, width = 256 * (n_channels + 1), os.path.getsize(path), sum(counts)
    n_records = n_records if n_records >= 0 else (held - offset) // (2 * width)             # -1: not stated
    if head[:8].strip() != "0" or not 0 < min(counts) or not 0 < seconds < math.inf or not n_records:
        raise ValueError(f"version {head[:8]!r}, {n_records} records of {width} samples in {seconds:g} s: "
                         "expected EDF's version 0, and samples")
    if 2 * width * n_records > held - offset:
        raise ValueError(f"it is cut short: {n_records} records of {2 * width} bytes should follow the header, "
                         f"and {held - offset} bytes do")
    ranges = np.array([[float(text) for text in texts[name]] for name in ("low", "high", "first", "last")])
    for name, unit, per_frame, (low, high, first, last) in zip(names, texts["unit"], counts, ranges.T):
        gain = (last - first) / (high - low) if high != low else 0.0
        unit = unit if 0 < abs(gain) < math.inf else f"{unit}, of no range"
        channels.append(Channel((name, seen[name]), path, "16", per_frame, 0, offset, gain, first - low * gain,
                                MV_PER_UNIT.get(unit.lower()), unit, 0))
        seen[name] += 1
    starts = np.arange(n_records)
    if head[192:197] == "EDF+D":                 # the first note of a record says when it begins
        begin = sum(counts[:names.index("EDF Annotations")])
        notes = np.memmap(path, "<i2", "r", offset, (n_records, width))[:, begin:]
        onsets = np.array([float(note.tobytes().partition(b"\x14")[0]) for note in notes])
        starts = np.rint((onsets - onsets[0]) / seconds).astype(int)
    if (np.diff(starts) < 1).any():
        raise ValueError("data records overlap, or are not in the order of time: expected one after another")
    parts, edges = [], [0, *(np.flatnonzero(np.diff(starts) > 1) + 1).tolist(), n_records]
    for first, stop in zip(edges, edges[1:]):
        begin, n = int(starts[first]), stop - first
        some = [channel._replace(offset=offset + 2 * width * first) for channel in channels]
        parts.append(Part(begin, begin + n, n, "", {path: some}))
    return choose_channels(1 / seconds, parts[-1].stop, [], parts, Counter())


def read_array(path, fs, units, leads):
    """The Recording in a file of one of ARRAY_READERS. fs: a number, also as text. leads: names with ";", "," or spaces
    between them; "" if the file has a header of names. Raises Refused if the file is absent or damaged."""
    names = re.split(r"\s*[;,]\s*" if re.search("[;,]", leads) else r"\s+", leads.strip()) if leads.strip() else []
    with as_refused(path):
        signal, header = ARRAY_READERS[Path(path).suffix.lower()](path)
        if not header and Path(path).suffix.lower() == ".csv" and signal.shape[1] == len(names):
            header = names                       # they may name a column of time
        known, wanted = list(map(column_key, header)), [key for key in map(column_key, names) if key]
        columns = [i for i, key in enumerate(known) if key]
        if wanted and {*wanted} <= {*known} and len({*wanted}) == len(wanted):
            columns, own = list(map(known.index, wanted)), {column_key(name): name for name in names}
            names = [own[known[i]] if name_and_unit(own[known[i]])[1] else header[i] for i in columns]
        if header:
            signal, names = signal[:, columns].astype(float), names or [header[i] for i in columns]
        fs = float(fs or "nan")
    if not names:
        raise Refused("leads", "no names of leads, and the file has no header with names: name them in the table")
    return Recording(signal, fs, names, units)


def column_key(name):
    """What a column holds: the id of a lead, otherwise its name in capitals; "" for time, or without a name."""
    text = name_and_unit(name)[0].upper()
    return lead_id(name) or ("" if TIME_NAME.fullmatch(text) else text)


def read_csv(path):
    """(T, L) values of a CSV file, and the names in its header: [] without a header."""
    import pandas as pd
    with open(path, "rb") as file:
        first, second = as_text(file.readline()), as_text(file.readline())
    separator = max(",;\t", key=first.count)
    point = "," if separator == ";" and "," in first + second else "."
    cells = [cell.strip().strip('"') for cell in first.strip("\r\n").split(separator)]
    named, header = [cell for cell in cells if cell], cells
    with contextlib.suppress(ValueError):        # not all are numbers
        numbers = [float(cell.replace(point, ".")) for cell in named]
        if len(named) < 2 or numbers != list(range(len(named))):         # 0, 1, 2: pandas numbers columns like this
            header = []
    table = pd.read_csv(path, sep=separator, decimal=point, header=None, skiprows=int(bool(header)),
                        encoding_errors="replace")         # of the header, which is not read here
    return table.to_numpy(), header


def only_array(arrays):
    """The array named signal, or the only one with more than one number, of a .npz or .mat file; and no header."""
    arrays = {name: x for name, x in arrays.items() if getattr(x, "size", 0) > 1 and x.dtype.kind in "biuf"}
    if "signal" not in arrays and len(arrays) != 1:
        raise ValueError(f"it holds the arrays {sorted(arrays)}: expected one, or one named signal")
    return arrays.get("signal", next(iter(arrays.values()))), []


ARRAY_READERS = {".csv": read_csv, ".npy": lambda path: (np.load(path, mmap_mode="r"), []),
                 ".npz": lambda path: only_array(np.load(path)), ".mat": lambda path: only_array(loadmat(path))}


def pieces_of(recording):
    """Yield (start in s, Recording) of a Recording of an array (L, T) or (T, L), in pieces as those of read_pieces; in
    one if preprocess will refuse it."""
    signal, fs, leads = recording[:3]
    signal = signal[:, None] if signal.ndim == len(leads) == 1 else signal
    if signal.ndim != 2 or len(leads) not in signal.shape or not FS_RANGE[0] <= fs <= FS_RANGE[1]:
        yield 0, recording
        return
    leads_first = len(signal) == len(leads)
    edges = piece_edges(signal.shape[int(leads_first)], fs, signal.size)
    for start, stop in zip(edges, edges[1:]):
        yield start / fs, recording._replace(signal=signal[:, start:stop] if leads_first else signal[start:stop])


def read_any(path, fs=None, units="mV", leads=""):
    """Yield (start in s, Recording or Refused) of a recording in any form, in pieces as those of read_pieces. fs, units
    and leads are those of arrays, see read_array."""
    kind = Path(path).suffix.lower()
    if kind in ARRAY_READERS and os.path.isfile(path) and not os.path.isfile(f"{path}.hea"):
        yield from pieces_of(read_array(path, fs, units, leads))
    elif kind == ".edf" or not os.path.isfile(path) or os.path.isfile(find_file(f"{path}.hea")):
        yield from read_pieces(path)
    else:
        raise Refused("unknown format", f"{kind or 'a file without suffix'} is not read here: expected a WFDB record "
                                        f"(.hea), .edf, {', '.join(ARRAY_READERS)}; README.md names converters")


# ---- which recordings there are -------------------------------------------------------------------------------------
def find_files(raw, notes, suffixes=frozenset({".hea"})):
    """Yield the files with one of `suffixes` (in any capitals; WFDB headers without it) in raw and all folders below:
    sorted, files before folders, links to folders last. notes[NOT_READ] counts what else may hold recordings. OSError
    for a folder that cannot be read."""
    folders, links, listed, others = [str(raw)], [], set(), notes.setdefault(NOT_READ, Counter())
    while folders or links:
        folder, files, stems = (folders or links).pop(), [], set()
        if (real := os.path.realpath(folder)) in listed:
            others["links to folders that were listed already"] += 1
            continue
        listed.add(real)
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True):
            is_link = entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                (links if is_link else folders).append(entry.path)
            elif os.path.isfile(entry.path) if is_link else entry.is_file():
                files.append((*os.path.splitext(entry.name.lower()), entry.path))
            else:
                others["links to nowhere" if is_link else "pipes and devices"] += 1
        for stem, kind, path in reversed(files):
            path = path[:-4] if kind == ".hea" else path
            if kind in suffixes and path in stems:
                others["headers whose suffix differs from another's only in capitals"] += 1
            elif kind in suffixes:
                stems |= {stem, path}
                yield Path(path)
        for stem, kind, _ in files:
            # The signal files of a record have its name, in some databases with a letter more.
            if kind in OTHER_FORMATS - suffixes and stem not in stems and not (kind == ".dat" and stem[:-1] in stems):
                others[kind] += 1


def list_recordings(place, notes, arrays=False):
    """Yield the recordings at a place. A folder: its WFDB records, EDF files and, if asked for, arrays, as find_files
    finds them, without the segments and signal files of records, which are read with them. A file: the record that it
    belongs to, or itself."""
    (stem, kind), suffixes = os.path.splitext(place), {".hea", ".edf", *(ARRAY_READERS if arrays else ())}
    if not os.path.isdir(place):
        of_record = kind.lower() not in ("", ".edf", *ARRAY_READERS) and not os.path.isfile(f"{place}.hea")
        of_record = of_record or Path(place).name.lower() in files_named_by(f"{stem}.hea")
        yield Path(stem if kind.lower() == ".hea" or of_record and os.path.isfile(f"{stem}.hea") else place)
        return
    for _, group in itertools.groupby(find_files(place, notes, suffixes), key=lambda path: path.parent):
        paths, parts = list(group), set()
        for path in paths:
            parts |= files_named_by(f"{path}.hea")
        yield from (path for path in paths if path.name.lower() not in parts)


def files_named_by(header):
    """Names, in small letters, of the segments of a WFDB record, or of the arrays that hold its signals (.mat)."""
    with contextlib.suppress(OSError):           # it is refused when it is read
        first, *lines = header_lines(header) or [""]
        named = {line.split()[0].lower() for line in lines}
        segments = "/" in "".join(first.split()[:1])                   # NAME/SEGMENTS, then their lines
        return named if segments else {name for name in named if os.path.splitext(name)[1] in ARRAY_READERS}
    return set()


# ---- pictures -------------------------------------------------------------------------------------------------------
def draw_ecg_paper(signal_mv, leads, panels, title="", standard=False):
    """A Figure of an ECG on paper, in mm: printed at its own size it has 25 mm/s and 10 mm/mV.

    signal_mv (L, T) at FS, NaN = missing, each lead about its median; leads: L names. panels {title: colours (L, T, 3
    or 4)}: the ECG is drawn once for each, in these colours, side by side if it is high. Each lead has its own row.
    standard: the twelve standard leads have three rows of four, a quarter of the time each, with II below, and the
    colours are bands behind a black trace.
    """
    import pandas as pd                          # features do not need these
    from matplotlib.figure import Figure         # no pyplot: it draws without a display
    T, twelve, rows = signal_mv.shape[1], LEADS[1:13], [[i] for i in range(len(leads))]
    if standard and set(twelve) <= set(leads):
        rows = [[leads.index(name) for name in row] for row in (*(twelve[r::3] for r in range(3)), ["II"])]
    mv = pd.DataFrame(signal_mv.T)
    y_mm = MM_PER_MV * (mv - mv.median()).clip(-MAX_SHOWN_MV, MAX_SHOWN_MV).to_numpy().T
    x_mm, known = np.arange(T) / FS * MM_PER_S, np.nan_to_num(y_mm)
    top, bottom = np.array([(known[row].max() + NAME_MM, known[row].min()) for row in rows]).T
    zero = -np.cumsum([0, *np.ceil((top[1:] - bottom[:-1]) / 5) * 5])                 # of each row, on a thick line
    low = np.array([-MARGIN_MM, zero[-1] + np.floor(bottom[-1] / 5) * 5 - 5])         # corners of the paper
    high = np.array([max(x_mm[-1] + MARGIN_MM, MIN_WIDTH_MM), np.ceil(top[0] / 5) * 5])
    step = (high - low + 8) * ((1, 0) if np.diff(high - low) > 0 else (0, -1))        # from panel to panel
    size = high - low + np.abs(step) * (len(panels) - 1) + PAPER_MARGINS_MM
    figure = Figure(figsize=size / MM_PER_INCH)
    figure.text(8 / size[0], 1 - 6 / size[1], title, size=9, weight="bold", parse_math=False)
    for number, (what, colours) in enumerate(panels.items()):
        corner = (8, size[1] - 16) + (low - high) * (0, 1) + number * step
        axis = figure.add_axes([*corner / size, *(high - low) / size], facecolor="#fffaf9", xticks=(), yticks=(),
                               xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        axis.set_title(what, size=8, loc="left")
        axis.spines[:].set_color("#e8b2aa")
        for colour, step_mm in (("#f7dfdb", 1), ("#e8b2aa", 5)):
            axis.vlines(np.arange(-5, high[0], step_mm), low[1], high[1], colour, linewidth=0.5, zorder=0.5)
            axis.hlines(np.arange(low[1], high[1], step_mm), low[0], high[0], colour, linewidth=0.5, zorder=0.5)
        for row, zero_mm, top_mm in zip(rows, zero, top):
            for k, i in enumerate(row):
                part = slice(T * k // len(row), T * (k + 1) // len(row))
                draw_trace(axis, np.stack((x_mm, y_mm[i] + zero_mm), axis=1)[part], colours[i, part], band=standard)
                axis.text(x_mm[part][0], zero_mm + top_mm - NAME_MM + 1, f"{leads[i]:.9}", size=8, parse_math=False)
    return figure


def draw_trace(axis, points, rgb, band):
    """A line through points (T, 2) in the colours rgb (T, 3 or 4), or a black one before a band of these colours."""
    from matplotlib.collections import LineCollection
    starts = np.flatnonzero(np.diff(rgb, axis=0, prepend=-1).any(axis=1))             # of stretches of one colour
    lines = [points[a:b + 1] for a, b in zip(starts, [*starts[1:], len(points)])]
    axis.add_collection(LineCollection(lines, colors=rgb[starts], linewidths=8 if band else 1.5, zorder=2 - 2 * band))
    if band:
        axis.plot(*points.T, color="black", linewidth=0.8)


# ---- files ----------------------------------------------------------------------------------------------------------
def atomic_write(path, content):
    """Write a file whole or not at all, even if the machine stops. content: bytes, text, or a function that writes into
    the open binary file."""
    part = Path(path).with_name(f"{Path(path).name}.tmp")
    try:
        with open(part, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:                              # on a full disk this frees some space
        part.unlink(missing_ok=True)
        raise


def save_figure(figure, path, dpi=110):
    """Write a matplotlib Figure to a PNG file, whole or not at all."""
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def sha256(path):
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
