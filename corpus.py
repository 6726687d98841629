"""A prepared corpus on disk (its format, how it is opened, copies within and between corpora), and the sampler, which
chooses the recordings for the batch of a step.

    corpus = open_corpus("data/ptbxl")
    corpus.read(0)                                   # int16 (L, T) uV at 250 Hz; ecg.MISSING where a sample is missing

Shapes: L leads, T samples, N recordings, B recordings of a batch, G lead groups, S slots (leads that a batch carries),
W samples of a window.
"""
import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import maximum_filter1d

from ecg import FS, LEAD_IDS, LEADS, MAX_LEADS, MISSING, UV_PER_MV, Refused, atomic_write, preprocess

SPLITS = ("train", "val", "test")                # the corpus stores an index into this tuple
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")  # bits of the label, lowest first
INDEX_DTYPE = np.dtype([
    ("shard", "<u4"), ("offset", "<i8"),         # file in signal/, and the first sample in it
    ("length", "<i4"),                           # samples per lead
    ("n_leads", "u1"), ("leads", "u1", (MAX_LEADS,)),  # lead ids; the first n_leads count
    ("split", "u1"), ("label", "u1"),            # label: bit set of SUPERCLASSES, 0 = none known
    ("patient", "<u4"),                          # row in patients.npy
    ("fs_hz", "<f4"),                            # sampling rate before it became FS
    ("first_event", "<u4"), ("n_events", "<u4")])  # 0: annotations are no longer kept
RECORD_DTYPE, PATIENT_DTYPE = np.dtype("S64"), np.dtype("S32")
MAGIC, FORMAT_VERSION = "ecg-dino corpus", 4
OPEN_SHARDS = 500                # files that a reader keeps mapped; a process may have 1,024 file descriptors

# Fingerprints. These values find most copies of real recordings, and hardly a stranger: python bench.py --duplicates
FINGERPRINT_BITS, FINGERPRINT_STEPS, FINGERPRINT_HOP = 96, 140, 5        # of 140 slopes, 5 samples apart: 2.8 s
FINGERPRINT_SAMPLES, FINGERPRINT_LEADS = FINGERPRINT_STEPS * FINGERPRINT_HOP, 2
FINGERPRINT_CHUNK, FINGERPRINT_MARGIN = 2**18, 2**11                     # samples in memory, and around them
SLOPE, LANDMARK_SUM, LANDMARK_NEAR, LANDMARK_LEAST = 8, 24, 75, 20       # samples; the last is a ratio of energies
FINGERPRINT_DTYPE = np.dtype([("row", "<u4"), ("sample", "<i4"), ("channel", "u1"), ("bits", "<u4", (3,))])
NO_FINGERPRINTS = np.zeros(0, FINGERPRINT_DTYPE)
TABLES = np.dtype([("index", INDEX_DTYPE), ("records", RECORD_DTYPE), ("patients", PATIENT_DTYPE),
                   ("fingerprints", FINGERPRINT_DTYPE)])                 # of the files of these names
MOST_DIFFERENT = {1: 16, 3: 4}   # bits, by the length of words / 16, in pairs that are looked at
AGREEMENT, MISSED, NEAR_FINGERPRINTS = 16, 4, 16  # bits, bits, and how many on each side: see HeldOut.score
MAX_SHIFT, EDGE = 4, 300         # samples by which noise moves a landmark, and at the start where one may be extra
MIN_AGREEMENT = 3                # mean per fingerprint: signals are then compared
ENOUGH, ENOUGH_ALONE = (12, 6), (10, 2)  # mean and count that decide: if there are signals, if there are none
MIN_CORRELATION, MIN_OVERLAP_S, CHECK_S = (0.96, 0.9), 4.5, 60           # of one lead, of several
# Of a recording, that find_duplicates compares, and the share of them that two copies have in common. Copies of PTB-XL
# at 100 and at 500 Hz have at least 0.42, strangers at most 0.25.
FIRST_FINGERPRINTS, SHARE_OF_FIRST = 12, 0.4
SEARCH_BLOCK, SEARCH_PAIRS, SEARCH_LEAST, SEARCH_MOST = 2**20, 2**21, 2**13, 2**19
SHORT_WORDS_UP_TO = 3e12         # pairs of fingerprints
HELD_OUT_FILE = Path(__file__).parent / "pretrained" / "held_out.npz"    # PTB-XL's folds 9 and 10, MIT-BIH's DS2, 201

# All limb leads follow from I and II.
INDEPENDENT = np.array([LEADS.index(name) for name in ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")])
DERIVED = np.array([LEADS.index(name) for name in ("III", "aVR", "aVL", "aVF")])
# A group's part of the batch is a multiple of batch / 16, so a number of ranks that divides batch / 16 divides it too.
BATCH_GRAIN = 16
WINDOW_TRIES = 8                 # pairs of stretches of a patient that are looked at, before another patient is taken
MAX_PATIENTS_TRIED = 50
NEAR_S = 60.0                    # s, the most between two stretches of a recording: the rhythm is then still the same
MAX_SHARE_OF_PEOPLE = 0.25       # of a corpus or a lead group in one batch, where others have enough people


# ---- a corpus on disk -----------------------------------------------------------------------------------------------
class Corpus:
    """A prepared corpus, opened without reading its signals.

    .dir, .manifest (dict), .index (INDEX_DTYPE, a row per recording), .records (S64, a name per recording), .patients
    (S32, names; index["patient"] is a row of it), .fingerprints (FINGERPRINT_DTYPE, in order of row and time: of train
    recordings those of two leads, of others those of every lead). .dir is None for fingerprints without signals.
    """

    def __init__(self, dir, manifest, index, records, patients, fingerprints=NO_FINGERPRINTS):
        self.dir, self.manifest, self.index, self.records, self.patients = dir, manifest, index, records, patients
        self.fingerprints = fingerprints
        self.shard = functools.lru_cache(OPEN_SHARDS)(
            lambda number: np.memmap(self.dir / "signal" / f"{number:05d}.i16", dtype="<i2", mode="r"))

    def read(self, i, start=0, length=None):
        """Recording i, samples start to start + length (default: to its end) of every lead: int16 (L, T), a view."""
        row = self.index[i]
        n_leads, n_samples, offset = int(row["n_leads"]), int(row["length"]), int(row["offset"])
        stop = n_samples if length is None else start + length
        assert 0 <= start <= stop <= n_samples, f"samples {start}..{stop} of a recording of {n_samples}"
        signal = self.shard(int(row["shard"]))
        return signal[offset:offset + n_leads * n_samples].reshape(n_leads, n_samples)[:, start:stop]

    def lead_ids(self, i):
        """Lead ids (L,) of recording i, in the order of its rows."""
        return self.index["leads"][i][:self.index["n_leads"][i]]

    def content(self):
        """Twelve hexadecimal digits that identify the signals, leads, splits and patients, wherever the corpus is."""
        sums = {name: digest for name, digest in self.manifest["sha256"].items()
                if name.startswith("signal/") or name in ("index.npy", "patients.npy")}
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:12]


def open_corpus(dir):
    """Open the corpus in `dir`. ValueError that names the command to run if it is absent, damaged or not readable."""
    dir = Path(dir)
    try:
        manifest = dict(json.loads((dir / "manifest.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        hint = (f"{part_of(dir)} holds an unfinished one: run its command again" if part_of(dir).is_dir() else
                f"make one with `python prepare.py SOURCE --raw DIR --out {dir}`")
        raise ValueError(f"{dir} holds no corpus (manifest.json: {error}): {hint}") from None
    again = f"delete {dir} and run `{manifest.get('command', 'python prepare.py ...')}`"
    found = manifest.get("format_version"), manifest.get("magic")
    if found != (FORMAT_VERSION, MAGIC):
        raise ValueError(f"{dir} is format {found[0]} of {found[1]!r}, expected format {FORMAT_VERSION} of {MAGIC!r}: "
                         f"{again}")
    try:
        for name, size in manifest["shard_bytes"].items():
            if (held := os.path.getsize(dir / "signal" / name)) != size:
                raise ValueError(f"signal/{name} has {held} bytes, the manifest says {size}")
        tables = [np.load(dir / f"{name}.npy", mmap_mode="r") for name in TABLES.names]
        for name, table in zip(TABLES.names, tables):
            if table.dtype != TABLES[name]:
                raise ValueError(f"wrong types: {name}.npy is of type {table.dtype}, expected {TABLES[name]}")
        index, records, _, fingerprints = tables
        if not len(index) == len(records) == manifest.get("recordings"):
            raise ValueError(f"{len(index)} index rows and {len(records)} names, the manifest says "
                             f"{manifest.get('recordings')}")
        if len(fingerprints) and fingerprints["row"][-1] >= len(index):
            raise ValueError("fingerprints.npy is of another corpus")
    except (OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{dir} is damaged ({error}): {again}") from None
    return Corpus(dir, manifest, *tables)


def index_faults(corpus):
    """Yield a sentence for every fault in the index of a corpus."""
    index = corpus.index
    size = index["n_leads"].astype(np.int64) * index["length"]
    samples = np.array([n // 2 for n in corpus.manifest["shard_bytes"].values()] + [0])
    wrong = {"reaches beyond its shard": index["offset"] + size > samples[np.minimum(index["shard"], len(samples) - 1)],
             "has no lead or no sample": size <= 0,
             "has a lead that is not known": (index["leads"] >= len(LEADS)).any(axis=1),
             "has a split that is not known": index["split"] >= len(SPLITS),
             "has a patient that is not known": index["patient"] >= len(corpus.patients)}
    for what, rows in wrong.items():
        if rows.any():
            yield f"{rows.sum():,} recordings, the first {corpus.records[np.argmax(rows)].decode()}: it {what}"
    pairs = np.unique(index["patient"].astype(np.int64) * len(SPLITS) + index["split"]) // len(SPLITS)
    if overlap := len(pairs) - len(np.unique(pairs)):
        yield f"{overlap} patients are in more than one split"


def lock_folder(folder, wait_s=0):
    """Lock a folder for as long as the returned file is open and this process lives. ValueError if another process
    holds the lock for longer than wait_s seconds. On a file system without locks there is only a warning."""
    file = open(Path(folder) / "lock", "w")
    for second in range(wait_s + 1):
        try:
            import fcntl                         # Windows has none
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:                  # EWOULDBLOCK; other errors say that there are no locks
            if wait_s and not second:
                print(f"another process writes into {folder}; waiting for up to {wait_s} s", file=sys.stderr)
            time.sleep(min(1, wait_s - second))
        except (ImportError, OSError) as error:
            print(f"warning: {folder} cannot be locked ({error}); do not start a second process on it", file=sys.stderr)
            return file
    raise ValueError(f"another process writes into {folder}; wait for it, end it, or choose another --out")


def part_of(out):
    """The folder in which the corpus `out` lies until it is finished: on the same disk, even if `out` is a link or a
    mount point."""
    return Path(out).resolve() / ".part"


def git(*command):
    """What git says about the folder of this program; None if it says nothing."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):        # there is no git, or no repository
        return subprocess.run(["git", *command], capture_output=True, check=True, text=True,
                              cwd=Path(__file__).parent).stdout.strip()


# ---- copies within and between corpora ------------------------------------------------------------------------------
# A fingerprint describes the 2.8 s of one lead that follow a landmark, most often an R wave. A landmark depends only on
# the signal near it, so a piece of a recording has the landmarks and fingerprints of the whole, moved in time. Held-out
# recordings have those of every lead, so that an export of one lead is found; others have those of two leads.
# Signs from NumPy's frozen generator, and exact sums of integers: a fingerprint is the same on every machine.
FINGERPRINT_SIGNS = 2.0 * np.random.RandomState(0).randint(0, 2, (FINGERPRINT_STEPS, FINGERPRINT_BITS)) - 1


def moving_sums(x, n):
    """Sums of n neighbours in x, integers (L, T): (L, T - n + 1)."""
    sums = np.cumsum(x, axis=1, dtype=np.int64)
    sums[:, n:] -= sums[:, :-n]
    return sums[:, n - 1:]


def slopes(x):
    """Differences of neighbouring sums of SLOPE samples of x (L, T): about 5 to 20 Hz, where QRS complexes are."""
    sums = moving_sums(x, SLOPE)
    return sums[:, SLOPE:] - sums[:, :-SLOPE]


def filled(steps):
    """int16 steps (L, T) as int64, with the median of the lead where a sample is missing."""
    x = steps.astype(np.int64)
    for lead, missing in zip(x, steps == MISSING):
        if missing.any():
            lead[missing] = 0 if missing.all() else np.median(lead[~missing])
    return x


def fingerprint(steps, leads, every_lead=False):
    """FINGERPRINT_DTYPE (K,) of a recording, in order of time; steps int16 (L, T) uV, leads (L,) ids; of every lead, or
    of FINGERPRINT_LEADS, II and V2 before others."""
    order = np.argsort((leads != LEAD_IDS["II"]) * (1 + (leads != LEAD_IDS["V2"])), kind="stable")
    order, parts = order if every_lead else order[:FINGERPRINT_LEADS], [NO_FINGERPRINTS]
    for start in range(0, steps.shape[1], FINGERPRINT_CHUNK):                                  # bounded memory
        first = max(0, start - FINGERPRINT_MARGIN)
        x = filled(steps[order, first:start + FINGERPRINT_CHUNK + FINGERPRINT_MARGIN])
        if x.shape[1] > FINGERPRINT_SAMPLES + 2 * (LANDMARK_SUM + SLOPE):
            lead, sample, bits = fingerprints_of_part(x)
            part = np.zeros(len(lead), FINGERPRINT_DTYPE)
            part["channel"], part["sample"], part["bits"] = order[lead], sample + first, bits
            parts.append(part[(part["sample"] >= start) & (part["sample"] < start + FINGERPRINT_CHUNK)])
    found = np.concatenate(parts)
    return found[np.lexsort((found["channel"], found["sample"]))]


def fingerprints_of_part(x):
    """Lead (K,), sample (K,) and bits uint32 (K, 3) of the fingerprints of x int64 (L, T).

    Landmarks are where the energy of the slope is largest within LANDMARK_NEAR samples. The bits are signs of random
    projections of the slope (Charikar, STOC 2002: the share of bits that differ is the angle between two signals, as a
    share of 180 degrees), so they depend neither on gain nor on offset, and little on rate, rounding and noise.
    """
    slope = slopes(x)
    energy = moving_sums(moving_sums(slope * slope >> 6, LANDMARK_SUM), LANDMARK_SUM)
    peak = maximum_filter1d(energy, 2 * LANDMARK_NEAR + 1, mode="constant")
    lead, t = np.nonzero((energy == peak) & (energy > 0))
    around = (t + LANDMARK_NEAR * np.array([[-3], [-1], [1], [3]])).clip(0, peak.shape[1] - 1)
    keep = energy[lead, t] >= peak[lead, around].max(axis=0) // LANDMARK_LEAST                 # no T waves, no noise
    keep &= t + LANDMARK_SUM + FINGERPRINT_SAMPLES <= slope.shape[1]
    lead, t = lead[keep], t[keep] + LANDMARK_SUM - 1                     # in the middle of the two sums
    y = slope[lead[:, None], t[:, None] + FINGERPRINT_HOP * np.arange(FINGERPRINT_STEPS)].astype(np.float64)
    signs = (FINGERPRINT_STEPS * y - y.sum(axis=1, keepdims=True)) @ FINGERPRINT_SIGNS > 0
    return lead, t + SLOPE, np.packbits(signs, axis=1).view("<u4")


def fingerprints_of(corpus, every_lead):
    """Fingerprints of a corpus, from its signals; every_lead (bool, by row)."""
    parts = [NO_FINGERPRINTS]
    for i, every in enumerate(every_lead):
        parts.append(fingerprint(corpus.read(i), corpus.lead_ids(i), every))
        parts[-1]["row"] = i
    return np.concatenate(parts)


def blocks(corpora, chosen, size=SEARCH_BLOCK):
    """Yield (number of the corpus, fingerprints) of the rows `chosen` (per corpus, bool by row): whole recordings, and
    about `size` fingerprints at a time."""
    for number, (corpus, rows) in enumerate(zip(corpora, chosen)):
        start, prints = 0, corpus.fingerprints
        while start < len(prints):
            part = np.array(prints[start:start + size])
            if start + len(part) < len(prints) and part["row"][0] != part["row"][-1]:
                part = part[:np.searchsorted(part["row"], part["row"][-1])]
            start += len(part)
            yield number, part[rows[part["row"]]]


def differing(a, b):
    """How many bits differ between a and b, uint32 (..., 3)."""
    return np.bitwise_count(a ^ b).sum(axis=-1, dtype=np.int64)


def words_of(bits, n):
    """Yield bits uint32 (K, 3) as words of n times 16 bits: 6 / n times uint64 (K,)."""
    halves = np.ascontiguousarray(bits).view("<u2")
    for k in range(0, 6, n):
        yield sum(halves[:, k + m].astype(np.uint64) << np.uint64(16 * m) for m in range(n))


class HeldOut:
    """Recordings that must not be trained on, ready to be searched: the rows `chosen` (bool, by row) of each of the
    corpora `sources`, for a search with so many fingerprints. H recordings, M fingerprints. If there are many of both,
    words have 48 instead of 16 bits, which saves time, but finds less."""

    def __init__(self, sources, chosen, searched=0):
        self.sources = sources
        self.source = np.repeat(np.arange(len(sources)), [rows.sum() for rows in chosen])              # (H,)
        self.row = np.concatenate([np.flatnonzero(rows) for rows in chosen])                           # (H,)
        self.index = np.concatenate([np.asarray(c.index)[rows] for c, rows in zip(sources, chosen)])   # (H,)
        parts, first = [NO_FINGERPRINTS], np.searchsorted(self.source, np.arange(len(sources)))
        for c, part in blocks(sources, chosen):
            part["row"] = first[c] + np.searchsorted(np.flatnonzero(chosen[c]), part["row"])
            parts.append(part)
        prints = np.concatenate(parts)
        self.prints = prints = prints[np.lexsort((prints["sample"], prints["channel"], prints["row"]))]
        self.bits, self.sample = prints["bits"].copy(), prints["sample"].astype(np.int64)              # (M, 3), (M,)
        self.lead = self.index["leads"][prints["row"], prints["channel"]].astype(np.uint64)            # (M,)
        self.places = place(prints["row"], prints["channel"], self.sample)                             # increasing
        self.channel_of = np.full((len(self.index), len(LEADS)), -1, np.int8)    # -1: the recording has no such lead
        for k in reversed(range(MAX_LEADS)):
            has = np.flatnonzero(self.index["n_leads"] > k)
            self.channel_of[has, self.index["leads"][has, k]] = k
        self.word = 3 if searched * len(prints) > SHORT_WORDS_UP_TO else 1
        self.block = SEARCH_BLOCK if self.word > 1 else int(np.clip(2**34 // (1 + len(prints)), 2**12, SEARCH_BLOCK))
        self.leads, self.tables = np.flatnonzero(np.bincount(self.lead.astype(int))).astype(np.uint64), []
        for word in words_of(self.bits, self.word):
            key = self.lead << np.uint64(48) | word
            order = np.argsort(key)
            self.tables.append((key[order], order.astype(np.uint32)))

    def candidates(self, lead, bits):
        """Yield (i, j): rows of lead (K,) and bits (K, 3), and fingerprints in self that share a word with them, where
        both leads are the same or one is unknown."""
        for (keys, order), word in zip(self.tables, words_of(bits, self.word)):
            for other in self.leads:
                mine = np.flatnonzero((lead == other) | (lead == 0) | (other == 0))
                mine = mine[np.argsort(word[mine])]                      # neighbours then read the same memory
                low, high = (np.searchsorted(keys, other << np.uint64(48) | word[mine], side) for side in
                             ("left", "right"))
                ends = np.cumsum(high - low)
                cuts = np.searchsorted(ends, np.arange(SEARCH_PAIRS, ends[-1] if len(ends) else 0, SEARCH_PAIRS))
                for some, start, n in zip(*(np.split(x, cuts) for x in (mine, low, high - low))):
                    nth = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
                    yield np.repeat(some, n), order[np.repeat(start, n) + nth].astype(np.int64)

    def search(self, corpora, chosen):
        """Per corpus the rows, of those `chosen` (bool, by row), that hold a stretch of a recording in self. Bounded
        memory and time: of too many candidates the best ones are looked at."""
        copies, n_blocks = [set() for _ in corpora], 1 + sum(len(c.fingerprints) for c in corpora) // self.block
        most = max(SEARCH_LEAST, SEARCH_MOST // n_blocks)
        for c, part in blocks(corpora, chosen, self.block):
            lead, pairs = corpora[c].index["leads"][part["row"], part["channel"]], [np.zeros(0, np.int64)]
            bits = part["bits"].copy()
            for i, j in self.candidates(lead, bits):
                near = differing(bits.take(i, axis=0), self.bits.take(j, axis=0)) <= MOST_DIFFERENT[self.word]
                pairs.append(i[near] * len(self.bits) + j[near])
            pairs = np.sort(np.concatenate(pairs))                       # np.unique takes a hundred times longer
            pairs = pairs[np.r_[True, pairs[1:] > pairs[:-1]][:len(pairs)]]
            i, j = self.alignments(part, *np.divmod(pairs, max(1, len(self.bits))), most)
            score = [np.zeros((2, 0))] + [self.score(part, lead, i[k:k + 4096], j[k:k + 4096])
                                          for k in range(0, len(i), 4096)]
            total, count = np.concatenate(score, axis=1)
            for k in np.argsort(-total, kind="stable")[:most // 8]:
                row, mean = int(part["row"][i[k]]), total[k] / max(1, count[k])
                alone = self.sources[self.source[self.prints["row"][j[k]]]].dir is None
                least, fewest = ENOUGH_ALONE if alone else ENOUGH
                if row in copies[c] or mean < MIN_AGREEMENT:
                    continue
                if mean >= least and count[k] >= fewest or not alone and self.alike(corpora[c], part[i[k]], j[k]):
                    copies[c].add(row)
        return [np.array(sorted(rows), np.int64) for rows in copies]

    def alignments(self, part, i, j, most):
        """Of pairs of fingerprints the nearest one for each two recordings and shift in time; at most `most` of these,
        those with the most evidence."""
        row, recording, shift = part["row"][i], self.prints["row"][j], self.sample[j] - part["sample"][i]
        order = np.lexsort((shift, recording, row))
        i, j, row, recording, shift = (x[order] for x in (i, j, row, recording, shift))
        same = (row[1:] == row[:-1]) & (recording[1:] == recording[:-1]) & (np.diff(shift) <= MAX_SHIFT)
        new = np.r_[True, ~same][:len(i)]
        start, gain = np.flatnonzero(new), AGREEMENT + 1 - differing(part["bits"][i], self.bits[j])
        nearest = np.lexsort((-gain, np.cumsum(new)))[start]
        best = nearest[np.argsort(-np.add.reduceat(gain, start) if len(i) else start, kind="stable")[:most]]
        return i[best], j[best]

    def score(self, part, lead, i, j):
        """If fingerprint i (K,) of part and j (K,) of self are the same moment: AGREEMENT minus the bits that differ,
        summed over the fingerprints near them, where a landmark that one recording lacks counts -MISSED; and how many
        were compared. float64 (2, K)."""
        near = (i[:, None] + np.arange(-NEAR_FINGERPRINTS, NEAR_FINGERPRINTS + 1))                     # (K, n)
        valid, near = (near >= 0) & (near < len(part)), near.clip(0, len(part) - 1)
        recording, channel = self.prints["row"][j][:, None], self.prints["channel"][j][:, None]
        time = part["sample"][near] + (self.sample[j] - part["sample"][i])[:, None]
        named = np.where(lead[near] > 0, self.channel_of[recording, lead[near]], -1)
        channel = np.where(part["channel"][near] == part["channel"][i][:, None], channel, named)
        wanted = place(recording, channel, time)
        after = np.searchsorted(self.places, wanted).clip(0, len(self.places) - 1)
        before = (after - 1).clip(0)
        other = np.where(wanted - self.places[before] < self.places[after] - wanted, before, after)
        found = np.abs(self.places[other] - wanted) <= MAX_SHIFT
        inside = (np.minimum(time, part["sample"][near]) >= EDGE) & (
            time + FINGERPRINT_SAMPLES + LANDMARK_SUM + MAX_SHIFT <= self.index["length"][recording])
        valid &= (part["row"][near] == part["row"][i][:, None]) & (channel >= 0) & (found | inside)
        gain = AGREEMENT - differing(part["bits"].take(near, axis=0), self.bits.take(other, axis=0))
        gain = np.where(found, gain, -MISSED).clip(-MISSED) * valid
        return np.stack((gain.sum(axis=1), valid.sum(axis=1))).astype(np.float64)

    def alike(self, corpus, ours, j):
        """Whether signals agree where the recording of fingerprint `ours` of a corpus and that of fingerprint j of self
        overlap: the mean correlation of signals and of slopes, over the leads that both have."""
        h, row, shift = self.prints["row"][j], ours["row"], int(self.sample[j]) - int(ours["sample"])
        leads = {k: self.channel_of[h, lead] for k, lead in enumerate(corpus.lead_ids(row)) if lead}
        leads = {k: other for k, other in leads.items() if other >= 0} | {ours["channel"]: self.prints["channel"][j]}
        start = max(0, shift, self.sample[j] - CHECK_S * FS // 2)
        stop = min(self.index["length"][h], shift + corpus.index["length"][row], self.sample[j] + CHECK_S * FS // 2)
        if stop - start < MIN_OVERLAP_S * FS:
            return False
        a = filled(corpus.read(row, start - shift, stop - start)[list(leads)])
        b = filled(self.sources[self.source[h]].read(self.row[h], start, stop - start)[list(leads.values())])
        found = np.zeros(2 * MAX_SHIFT + 1)
        for x, y in ((moving_sums(a, 10), moving_sums(b, 10)), (slopes(a), slopes(b))):
            n = x.shape[1] - 2 * MAX_SHIFT
            y = y[:, MAX_SHIFT:MAX_SHIFT + n] - y[:, MAX_SHIFT:MAX_SHIFT + n].mean(axis=1, keepdims=True)
            for k in range(len(found)):
                z = x[:, k:k + n] - x[:, k:k + n].mean(axis=1, keepdims=True)
                norm = np.sqrt((y * y).sum(axis=1) * (z * z).sum(axis=1))
                found[k] += np.mean((y * z).sum(axis=1) / np.where(norm > 0, norm, 1)) / 2
        return found.max() >= MIN_CORRELATION[len(leads) > 1]


def place(recording, channel, sample):
    """A number that grows with the recording, then with the channel, then with the sample."""
    return (recording.astype(np.int64) * MAX_LEADS + channel << 32) + sample


def find_duplicates(corpora, chosen):
    """Pairs of recordings, of the rows `chosen` (per corpus, bool by row), that begin with the same signal: (K, 2), the
    earlier one first, counted through all corpora. At least two of their first fingerprints agree, in bits and time."""
    first, parts = np.cumsum([0] + [len(c.index) for c in corpora]), [NO_FINGERPRINTS]
    for c, part in blocks(corpora, chosen):
        parts.append(part[np.arange(len(part)) - np.searchsorted(part["row"], part["row"]) < FIRST_FINGERPRINTS])
        parts[-1]["row"] += np.uint32(first[c])
    prints, parts, pairs = np.concatenate(parts), None, []                                         # frees the parts
    row, halves = prints["row"], np.ascontiguousarray(prints["bits"]).view("<u2")
    for k in range(6):                           # words of 32 bits that overlap
        key = halves[:, k].astype(np.uint64) << np.uint64(48) | halves[:, k - 1].astype(np.uint64) << np.uint64(32)
        key |= prints["sample"].astype(np.uint64)
        order = np.argsort(key, kind="stable")
        key = key[order]
        for apart in (1, 2, 3):                  # few strangers have both the same word and the same time
            near = np.flatnonzero(key[apart:] - key[:-apart] <= MAX_SHIFT)
            a, b = np.sort((order[near], order[near + apart]), axis=0)
            same = (row[a] < row[b]) & (differing(prints["bits"][a], prints["bits"][b]) <= AGREEMENT)
            pairs.append(np.stack((row[a], row[b], a), axis=1)[same].astype(np.int64))
    pairs, times = np.unique(np.unique(np.concatenate(pairs), axis=0)[:, :2], axis=0, return_counts=True)
    n = np.bincount(row, minlength=first[-1])[pairs].min(axis=1)
    return pairs[times >= np.maximum(2, SHARE_OF_FIRST * n)]


@functools.lru_cache(4)
def open_held_out(path):
    """The recordings of public test sets, as a corpus without signals; none, and a warning, if the file is absent."""
    if not path.is_file():
        print(f"warning: no {path}: copies of public test sets are found only if these are in a given corpus",
              file=sys.stderr)
        return Corpus(None, {}, np.zeros(0, INDEX_DTYPE), np.zeros(0, RECORD_DTYPE), None)
    with np.load(path) as file:
        prints = np.rec.fromarrays([file[name] for name in FINGERPRINT_DTYPE.names], FINGERPRINT_DTYPE).view(np.ndarray)
        return Corpus(None, json.loads(file["about"].tobytes()), file["index"], file["records"], None, prints)


def write_held_out(corpora, path):
    """Write the fingerprints of all that the corpora hold out, as open_held_out reads them."""
    chosen = [c.index["split"] != SPLITS.index("train") for c in corpora]
    held = HeldOut(corpora, chosen)
    about = {str(c.dir): {"recordings": int(rows.sum()), "made by": c.manifest["command"]}
             for c, rows in zip(corpora, chosen)}
    about = np.frombuffer(json.dumps(about).encode(), np.uint8)
    atomic_write(path, lambda file: np.savez_compressed(
        file, about=about, index=held.index, records=np.concatenate([c.records[r] for c, r in zip(corpora, chosen)]),
        **{name: held.prints[name] for name in FINGERPRINT_DTYPE.names}))


def known_by_content(recordings, held_out_file=HELD_OUT_FILE):
    """How many recordings share 5 s or more with one that held_out_file knows, and how many there are. recordings: an
    iterable of ecg.Recording; one that cannot be used is not known."""
    prints, index, known = [NO_FINGERPRINTS], [], open_held_out(held_out_file)
    for recording in recordings:
        index.append(np.zeros((), INDEX_DTYPE))
        with contextlib.suppress(Refused):
            signal_mv, lead_ids = (x[:MAX_LEADS] for x in preprocess(*recording[:4], {}))
            steps = np.nan_to_num(np.rint(signal_mv * UV_PER_MV).clip(MISSING + 1, -MISSING - 1), nan=MISSING)
            prints.append(fingerprint(steps.astype(np.int16), lead_ids))
            prints[-1]["row"] = len(index) - 1
            index[-1]["n_leads"], index[-1]["length"], index[-1]["leads"][:len(lead_ids)] = *steps.shape, lead_ids
    ours = Corpus(None, {}, np.array(index, INDEX_DTYPE), None, None, np.concatenate(prints))
    held = HeldOut([known], [np.ones(len(known.index), bool)])
    return len(held.search([ours], [np.ones(len(index), bool)])[0]), len(index)


def rows_to_leave_out(corpora, excluded=(), held_out_file=HELD_OUT_FILE):
    """Per corpus, two sorted arrays of rows of split train that must not be trained on: those that share 5 s or more
    with a recording that any of the corpora holds out, that is in an excluded corpus, or in held_out_file; and copies
    of a recording that comes earlier, in the same corpus or in another."""
    others = [Corpus(c.dir, c.manifest, c.index, c.records, c.patients, fingerprints_of(c, np.ones(len(c.index), bool)))
              for c in excluded] + [open_held_out(held_out_file)]
    train = [c.index["split"] == SPLITS.index("train") for c in corpora]
    held = [*(~rows for rows in train), *(np.ones(len(c.index), bool) for c in others)]
    searched = sum(len(c.fingerprints) for c in corpora)
    leaks = HeldOut([*corpora, *others], held, searched).search(corpora, train)
    for rows, found in zip(train, leaks):
        rows[found] = False
    first, twice = np.cumsum([0] + [len(c.index) for c in corpora]), np.unique(find_duplicates(corpora, train)[:, 1])
    return [(rows, twice[(twice >= low) & (twice < high)] - low)
            for rows, low, high in zip(leaks, first[:-1], first[1:])]


# ---- batches: a pure function of (seed, step) -----------------------------------------------------------------------
class Sampler:
    """Draws pairs of stretches of recordings from several corpora, at most one per patient in a batch.

    A corpus has the weight (patients x hours) ** 0.25 times its entry in `weights`, so that neither many short
    recordings nor a few long ones dominate; all its patients have the same weight. Each of `shapes` (augment.LeadGroup)
    has a fixed share of the batch, which `ranks` processes can divide, so tensor shapes never change. A recording with
    all INDEPENDENT leads belongs to the first shape, any other to the largest number of leads that it has; a group of
    too few people joins the next smaller one. ValueError if there are not enough recordings or patients for the batch.
    """

    def __init__(self, corpora, batch, seed, shapes, weights=None, excluded=(), ranks=1):
        self.corpora, self.seed, self.batch, self.shapes = corpora, seed, batch, list(shapes)
        left_out = rows_to_leave_out(corpora, excluded)
        while True:
            self._make_groups(weights or [1.0] * len(corpora), left_out)
            small = [g["shape"] for g in self.groups[:-1] if not g["named"]
                     and MAX_SHARE_OF_PEOPLE * g["patients"].sum() < batch / BATCH_GRAIN]
            if not small:
                return self._share_batch(ranks)
            self.shapes.remove(small[0])         # its recordings then show fewer leads

    def _make_groups(self, weights, left_out):
        """The lead groups of self.shapes that have recordings, each with its members: a dict per corpus."""
        self.too_short = "shorter than " + ", ".join(f"{s.window_s:g} s with {s.leads}" for s in self.shapes) + " leads"
        self.skipped, self.left_out = {"not in split train": 0, self.too_short: 0}, []
        groups = [dict(shape=shape, members=[], window=round(shape.window_s * FS), named=shape is self.shapes[0])
                  for shape in self.shapes]
        for c, (weight, rows) in enumerate(zip(weights, left_out)):
            self._add_members(groups, c, weight, *rows)
        self.groups = [group for group in groups if group["members"]]
        for group in self.groups:
            group |= {key: np.array([m[key] for m in group["members"]]) for key in ("weight", "patients")}
        if not self.groups:
            raise ValueError(f"no recording to train on in {', '.join(str(c.dir) for c in self.corpora)}: "
                             f"{self.skipped}")

    def _add_members(self, groups, c, weight, leaks, twice):
        """Add corpus c to its groups: its rows, sorted by patient; each patient's number, the same in every group, and
        first row and count; its weight."""
        corpus, index = self.corpora[c], self.corpora[c].index
        train = index["split"] == SPLITS.index("train")
        self.skipped["not in split train"] += int((~train).sum())
        for rows, why in ((leaks, "copy of a held-out recording"), (twice, "copy of another recording")):
            train[rows] = False
            if len(rows):
                self.skipped[why] = self.skipped.get(why, 0) + len(rows)
                self.left_out += [(str(corpus.dir), name.decode(), why) for name in corpus.records[rows]]
        rows = np.flatnonzero(train).astype(np.uint32)                                  # half the memory of int64
        rows = rows[np.argsort(index["patient"][rows], kind="stable")]
        belongs = lead_group(index, rows, [shape.leads for shape in self.shapes])
        self.skipped[self.too_short] += len(rows)
        for g, group in enumerate(groups):
            members = rows[(belongs == g) & (index["length"][rows] >= group["window"])]
            self.skipped[self.too_short] -= len(members)
            if len(members):
                who, first, count = np.unique(index["patient"][members], return_index=True, return_counts=True)
                hours = float(index["length"][members].sum(dtype=np.int64)) / FS / 3600
                group["members"].append(dict(corpus=c, rows=members, people=(c << 32) + who.astype(np.int64),
                                             first=first, count=count, patients=len(first),
                                             weight=weight * (len(first) * hours) ** 0.25))

    def named_leads(self):
        """Names of the leads that views may show by name; all others are trained as unknown."""
        rows = [self.corpora[m["corpus"]].index[m["rows"]] for g in self.groups if g["named"] for m in g["members"]]
        ids = [row["leads"][np.arange(MAX_LEADS) < row["n_leads"][:, None]] for row in rows]
        return [LEADS[i] for i in np.unique(np.concatenate([DERIVED, *ids])) if i] if rows else []

    def _share_batch(self, ranks):
        """Set the number of recordings of every group in the batch; ValueError that names a possible batch."""
        people = [np.concatenate([m["people"] for m in group["members"]]) for group in self.groups]
        common = np.array([[np.isin(a, b, assume_unique=True).sum() for b in people] for a in people])         # (G, G)
        sizes = self._sizes(self.batch, ranks, common)
        if sizes is None:
            smaller, larger = range(self.batch - 1, 0, -1), range(self.batch + 1, 2 * self.batch + BATCH_GRAIN * ranks)
            possible = next((n for n in (*smaller, *larger) if self._sizes(n, ranks, common) is not None), None)
            has = ", ".join(f"{n} patients with {group['shape'].leads} leads"
                            for n, group in zip(common.diagonal(), self.groups))
            raise ValueError(
                f"--batch {self.batch} is not possible: a batch holds a patient once, {len(self.groups)} groups of "
                f"lead counts share it in parts of 1/{BATCH_GRAIN if len(self.groups) > 1 else 1}, {ranks} processes "
                f"divide each part, and the data have {has}; "
                + (f"use --batch {possible}" if possible else "use more data or fewer processes"))
        for group, size in zip(self.groups, sizes):
            group.update(size=size, chance=capped(group["weight"], MAX_SHARE_OF_PEOPLE * group["patients"] / size))

    def _sizes(self, batch, ranks, common):
        """Number of recordings of every group in a batch of this size, by the shares of the groups: at least one grain
        (batch / BATCH_GRAIN) each, and no more than its patients. None if that is not possible."""
        total = BATCH_GRAIN if len(self.groups) > 1 else 1
        share = np.array([g["shape"].share for g in self.groups])
        grain, owed = batch // total, share / share.sum() * total
        if batch % total or len(self.groups) > total:
            return None

        def fit(grains):
            """Whether each group has enough patients, even if the groups before it took all that they share with it."""
            return all(n * grain + np.minimum(grains[:g] * grain, common[g, :g]).sum() <= common[g, g]
                       for g, n in enumerate(grains))
        grains = np.ones(len(self.groups), int)
        while grains.sum() < total:              # the next grain goes to the group that is owed most and can take it
            possible = np.array([fit(grains + one) for one in np.eye(len(grains), dtype=int)])
            if not any(possible):
                return None
            crowding = (grains + 1) * grain / common.diagonal()          # share of the people of a group
            free = possible & (crowding <= MAX_SHARE_OF_PEOPLE)
            wish = np.where(free, owed - grains, -np.inf) if any(free) else np.where(possible, -crowding, -np.inf)
            grains[np.argmax(wish)] += 1
        sizes = [int(n) * grain for n in grains]
        return sizes if fit(grains) and not any(size % ranks for size in sizes) else None

    def choose(self, step):
        """For each group, (member, patient) of its places in the batch of `step`: (places, 2), no patient twice. The
        cost does not depend on the size of the corpora."""
        taken, chosen = np.zeros(0, np.int64), []
        for g, group in enumerate(self.groups):
            rng, places = np.random.default_rng([self.seed, step, g, 0]), np.zeros((0, 2), np.int64)
            while len(places) < group["size"]:
                member = rng.choice(len(group["chance"]), 4 * group["size"], p=group["chance"])
                patient = (rng.random(len(member)) * group["patients"][member]).astype(np.int64)
                who = np.empty(len(member), np.int64)
                for m, pool in enumerate(group["members"]):
                    who[member == m] = pool["people"][patient[member == m]]
                new = np.sort(np.unique(who, return_index=True)[1])      # where each person comes first
                new = new[~np.isin(who[new], taken)][:group["size"] - len(places)]
                taken, places = np.append(taken, who[new]), np.append(places, np.c_[member, patient][new], axis=0)
            chosen.append(places)
        return chosen

    def draw(self, step, g, chosen, rows):
        """Recordings `rows` (slice) of group g, chosen for the batch of `step`.

        Returns two stretches of each, int16 (B, 2, S, W), lead ids (B, S), 0 in a group whose recordings differ in
        their leads because a name would tell them apart; and how many slots hold a lead (B,): others repeat these.
        """
        group = self.groups[g]
        places, slots = range(*rows.indices(group["size"])), np.arange(group["shape"].slots)
        signals, leads, _ = zip(*(self._stretches(step, g, place, *chosen[place]) for place in places))
        return (np.stack([signal[:, slots % len(ids)] for signal, ids in zip(signals, leads)]),
                np.stack([ids[slots % len(ids)] for ids in leads]) * group["named"],
                np.array([len(ids) for ids in leads]))

    def name(self, step):
        """Names of the recordings in the batch of `step`: corpus/record@second,second."""
        names = []
        for g, chosen in enumerate(self.choose(step)):
            for place, (m, patient) in enumerate(chosen):
                row, starts = self._stretches(step, g, place, m, patient)[2]
                corpus = self.corpora[self.groups[g]["members"][m]["corpus"]]
                seconds = ",".join(f"{start / FS:g}" for start in starts)
                names.append(f"{corpus.dir.name}/{corpus.records[row].decode()}@{seconds}")
        return names

    def _stretches(self, step, g, place, m, patient):
        """Two random stretches of a patient: (2, L, W) int16, lead ids (L,), and their place (row, first samples). A
        pair with a missing sample is drawn again. A patient who has no whole pair, which is rare, gives way to the next
        one: the only case in which a person can be in a batch twice."""
        rng, group = np.random.default_rng([self.seed, step, g, 1, place]), self.groups[g]
        member, corpus = group["members"][m], self.corpora[group["members"][m]["corpus"]]
        for attempt in range(WINDOW_TRIES * MAX_PATIENTS_TRIED):
            p = (patient + attempt // WINDOW_TRIES) % len(member["first"])
            row = member["rows"][member["first"][p] + rng.integers(member["count"][p])]
            starts = near_starts(rng, int(corpus.index["length"][row]), group["window"])
            signal = np.stack([corpus.read(row, start, group["window"]) for start in starts])
            ids, whole = corpus.lead_ids(row).astype(np.int64), ~(signal == MISSING).any(axis=(0, 2))
            if group["named"]:
                signal, ids = standard_leads(signal[:, whole], ids[whole], group["shape"].slots)
            else:
                chosen = rng.permutation(np.flatnonzero(whole))[:group["shape"].leads]
                signal, ids = signal[:, chosen], ids[chosen]
            if len(ids) >= group["shape"].leads:
                return signal, ids, (row, starts)
        raise ValueError(f"{corpus.dir}: {MAX_PATIENTS_TRIED} patients in a row have no two stretches of "
                         f"{group['shape'].window_s:g} s without missing samples; leave this corpus out of --data")


def lead_group(index, rows, leads):
    """For each of `rows` of an index the place of its group in `leads`, the numbers of leads of the groups, largest
    first; -1: it has too few. The first group takes the recordings with all INDEPENDENT leads."""
    ids, n_leads = index["leads"][rows], index["n_leads"][rows]
    ids = np.where(np.arange(ids.shape[1]) < n_leads[:, None], ids, 0)
    full = np.all([(ids == lead).any(axis=1) for lead in INDEPENDENT], axis=0)
    belongs = np.full(len(rows), -1)
    for g, least in reversed(list(enumerate(leads))):
        belongs[full if g == 0 else n_leads >= least] = g
    return belongs


def capped(weight, most):
    """Chances in proportion to weight (members,), none above `most` (members,) as long as another one can take more."""
    chance, free = np.zeros(len(weight)), np.ones(len(weight), bool)
    while free.any() and chance.sum() < 1:
        chance[free] = (1 - chance[~free].sum()) * weight[free] / weight[free].sum()
        over = free & (chance > most)
        if not over.any():
            break
        chance[over], free = most[over], free & ~over
    return chance / chance.sum()


def near_starts(rng, length, window):
    """First samples of two stretches of a recording: at most NEAR_S apart, and overlapping by half at most where the
    recording is long enough."""
    room = length - window
    apart = round(rng.uniform(min(window // 2, room), min(max(NEAR_S * FS, window), room)))
    first = int(rng.integers(0, room - apart + 1))
    return (first, first + apart)[::int(rng.choice((1, -1)))]


def standard_leads(signal, ids, slots):
    """signal (2, L, W) uV of whole leads, in the order INDEPENDENT, DERIVED (computed from I and II), others that have
    a name, at most `slots`; no leads if an independent one is missing."""
    column = {lead: i for i, lead in enumerate(ids.tolist())}
    if not all(lead in column for lead in INDEPENDENT.tolist()):
        return signal[:, :0], ids[:0]
    others = [i for lead, i in column.items() if lead not in (0, *INDEPENDENT, *DERIVED)]
    I, II = (signal[:, column[lead]].astype(np.int32) for lead in INDEPENDENT[:2])
    limb = np.stack((II - I, -(I + II) // 2, I - II // 2, II - I // 2), axis=1).clip(MISSING + 1, -MISSING - 1)
    columns = [column[lead] for lead in INDEPENDENT]
    return (np.concatenate((signal[:, columns], limb.astype(np.int16), signal[:, others]), axis=1)[:, :slots],
            np.concatenate((INDEPENDENT, DERIVED, ids[others]))[:slots])
