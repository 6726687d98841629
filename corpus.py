"""A prepared corpus on disk (its format, how it is opened, copies within and between corpora), and the sampler, which
chooses the recordings for the batch of a step.

    corpus = open_corpus("data/ptbxl")
    corpus.read(0)                                   # int16 (L, T) uV at 250 Hz; ecg.MISSING where a sample is missing

Shapes: L leads, T samples, N recordings, B recordings of a batch, G lead groups, S slots (leads that a batch carries),
W samples of a window.
"""
import functools
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from ecg import FS, LEAD_IDS, LEADS, MAX_LEADS, MISSING

SPLITS = ("train", "val", "test")                # the corpus stores an index into this tuple
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")  # bits of the label, lowest first
INDEX_DTYPE = np.dtype([
    ("shard", "<u4"), ("offset", "<i8"),         # file in signal/, and the first sample in it
    ("length", "<i4"),                           # samples per lead
    ("n_leads", "u1"), ("leads", "u1", (MAX_LEADS,)),  # lead ids; the first n_leads count
    ("split", "u1"), ("label", "u1"),            # label: bit set of SUPERCLASSES, 0 = none known
    ("patient", "<u4"),                          # row in patients.npy
    ("fs_hz", "<f4"),                            # sampling rate before it became FS
    ("first_event", "<u4"), ("n_events", "<u4")])  # annotations, in the file of the same shard in events/
EVENT_DTYPE = np.dtype([("sample", "<i4"), ("symbol", "S6")])  # sample at FS; a beat ("N") or a rhythm ("(AFIB", ")")
NO_EVENTS = np.zeros(0, EVENT_DTYPE)
RECORD_DTYPE, PATIENT_DTYPE = np.dtype("S64"), np.dtype("S32")
MAGIC, FORMAT_VERSION = "ecg-dino corpus", 3
FINGERPRINTS_FILE = {2: "prints", 3: "fingerprints"}  # by format version; nothing else differs
OPEN_SHARDS = 500                # files that a reader keeps mapped; a process may have 1,024 file descriptors

FINGERPRINT_WORDS, FINGERPRINT_WORD_BYTES, FINGERPRINT_S = 10, 3, 8  # see fingerprint
FINGERPRINT_BYTES = FINGERPRINT_WORDS * FINGERPRINT_WORD_BYTES
FINGERPRINT_STEP = 20            # samples that are averaged, so that the rate is 12.5 Hz
# Words that find_duplicates compares. Copies differed in at most 7 bits; with 7, it misses 1.4 % of the pairs.
LOOKUP_WORDS = 5
# Of 240 bits, in copies. Measured: PTB-XL at 100 and at 500 Hz differs in 0 to 7, different recordings in 18 or more.
MAX_DIFFERENT_BITS = 12

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
    (S32, names; index["patient"] is a row of it), .fingerprints (see fingerprint, one per recording).
    """

    def __init__(self, dir, manifest, index, records, patients, fingerprints=None):
        self.dir, self.manifest, self.index, self.records, self.patients = dir, manifest, index, records, patients
        self.fingerprints = fingerprints
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

    def lead_ids(self, i):
        """Lead ids (L,) of recording i, in the order of its rows."""
        return self.index["leads"][i][:self.index["n_leads"][i]]

    def content(self):
        """Twelve hexadecimal digits that identify the signals, leads, splits and patients, wherever the corpus is."""
        sums = {name: digest for name, digest in self.manifest["sha256"].items()
                if name.startswith("signal/") or name in ("index.npy", "patients.npy")}
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:12]

    def events(self, i):
        """Annotations of recording i, EVENT_DTYPE (K,), in order of time; none where the source has none."""
        row = self.index[i]
        if not row["n_events"]:
            return NO_EVENTS
        first = int(row["first_event"])
        return np.load(self.dir / "events" / f"{row['shard']:05d}.npy", mmap_mode="r")[first:first + row["n_events"]]


def open_corpus(dir):
    """Open the corpus in `dir`. ValueError that names the command to run if it is absent, damaged or not readable."""
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
    version = manifest.get("format_version")
    if manifest.get("magic") != MAGIC or version not in FINGERPRINTS_FILE:
        raise ValueError(f"{dir} is format {version} of {manifest.get('magic')!r}, expected format {FORMAT_VERSION} of "
                         f"{MAGIC!r}: {again}")
    try:
        index, records, patients, fingerprints = (
            np.load(dir / f"{name}.npy", mmap_mode="r")
            for name in ("index", "records", "patients", FINGERPRINTS_FILE[version]))
        check_tables(dir, manifest, index, records, patients, fingerprints)
    except (OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{dir} is damaged ({error}): {again}") from None
    return Corpus(dir, manifest, index, records, patients, fingerprints)


def check_tables(dir, manifest, index, records, patients, fingerprints):
    """ValueError if the files of a corpus do not fit together."""
    for name, size in manifest["shard_bytes"].items():
        found = os.path.getsize(dir / "signal" / name)
        if found != size:
            raise ValueError(f"signal/{name} has {found} bytes, the manifest says {size}")
    if (index.dtype, records.dtype, patients.dtype) != (INDEX_DTYPE, RECORD_DTYPE, PATIENT_DTYPE):
        raise ValueError(f"wrong types: index {index.dtype}, records {records.dtype}, patients {patients.dtype}")
    if not len(index) == len(records) == len(fingerprints) == manifest.get("recordings"):
        raise ValueError(f"{len(index)} index rows, {len(records)} names and {len(fingerprints)} fingerprints, the "
                         f"manifest says {manifest.get('recordings')}")


def index_faults(corpus):
    """Yield a sentence for every fault in the index of a corpus."""
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


def lock_folder(folder, wait_s=0):
    """Lock a folder for as long as the returned file is open and this process lives. ValueError if another process
    holds the lock for longer than wait_s seconds. On a file system without locks there is only a warning."""
    def warn(error):
        print(f"warning: {folder} cannot be locked ({error}); do not start a second process on it", file=sys.stderr)
    try:
        import fcntl
    except ImportError as error:                 # Windows: it would not delete a file that is open, so none is made
        warn(error)
        return open(os.devnull)
    file = open(Path(folder) / "lock", "w")
    for second in range(wait_s + 1):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:                  # EWOULDBLOCK; other errors say that there are no locks
            if second < wait_s:
                if not second:
                    print(f"another process writes into {folder}; waiting for up to {wait_s} s", file=sys.stderr)
                time.sleep(1)
        except OSError as error:
            warn(error)
            return file
    raise ValueError(f"another process writes into {folder}; wait for it, end it, or choose another --out")


def part_of(out):
    """The folder in which the corpus `out` lies until it is finished: on the same disk, even if `out` is a link or a
    mount point."""
    return Path(out).resolve() / ".part"


# ---- copies within and between corpora ------------------------------------------------------------------------------
BIT_COUNT = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
# Signs from NumPy's frozen generator, and only integers: so a fingerprint is the same on every machine.
FINGERPRINT_SIGNS = 2 * np.random.RandomState(0).randint(
    0, 2, (8 * FINGERPRINT_BYTES, FINGERPRINT_S * FS // FINGERPRINT_STEP)) - 1


def fingerprint(steps, leads):
    """FINGERPRINT_BYTES bytes, which differ only in a few bits between two copies of a recording, even if names, rates
    and rounding differ; steps int16 (L, T) uV, leads (L,) ids.

    The bits are the signs of random projections of the first 8 s of lead II (or of the first lead), averaged to 12.5 Hz
    (Charikar, STOC 2002: the share of bits that differ is the angle between the signals, as a share of 180 degrees).
    """
    lead = steps[np.argmax(leads == LEAD_IDS["II"])][:FINGERPRINT_S * FS]
    x = np.zeros(FINGERPRINT_S * FS, np.int64)
    x[:len(lead)] = np.where(lead == MISSING, 0, lead)
    x = x.reshape(-1, FINGERPRINT_STEP).sum(axis=1)
    return np.packbits(FINGERPRINT_SIGNS @ (len(x) * x - x.sum()) > 0)


def find_duplicates(fingerprints):
    """Pairs of rows of fingerprints (N, bytes) that are the same recording: (K, 2), the lower first, sorted.

    Candidates share one of the first LOOKUP_WORDS words of 24 bits; sorting finds them. In each run of equal words only
    neighbours are compared, so sorting is the main cost.
    """
    found = [np.zeros((0, 2), np.int64)]
    words = np.asarray(fingerprints).reshape(len(fingerprints), FINGERPRINT_WORDS, FINGERPRINT_WORD_BYTES)
    for w in range(LOOKUP_WORDS):
        word = words[:, w].astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        order = np.argsort(word, kind="stable")
        same = np.flatnonzero(word[order[1:]] == word[order[:-1]])
        for part in np.array_split(same, 1 + len(same) // 2**20):                                # bounded memory
            a, b = order[part], order[part + 1]
            differ = BIT_COUNT[fingerprints[a] ^ fingerprints[b]].sum(axis=1, dtype=np.int64)
            found.append(np.stack((a, b), axis=1)[differ <= MAX_DIFFERENT_BITS])
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def rows_to_leave_out(corpora, excluded=()):
    """Per corpus, two sorted arrays of rows of split train that must not be trained on: copies of a recording that any
    of the corpora holds out, or that is in an excluded corpus; and copies of a recording that comes earlier, in the
    same corpus or in another."""
    first = np.cumsum([0] + [len(c.index) for c in corpora])
    pairs = find_duplicates(np.concatenate([np.asarray(c.fingerprints) for c in (*corpora, *excluded)]))
    held_out = np.concatenate([np.asarray(c.index["split"]) != SPLITS.index("train") for c in corpora]
                              + [np.ones(len(c.index), bool) for c in excluded])
    a, b = pairs.T
    leaks = np.union1d(a[held_out[b] & ~held_out[a]], b[held_out[a] & ~held_out[b]])
    twice = np.setdiff1d(b[~held_out[a] & ~held_out[b]], leaks)
    return [tuple(rows[(rows >= low) & (rows < high)] - low for rows in (leaks, twice))
            for low, high in zip(first[:-1], first[1:])]


# ---- batches: a pure function of (seed, step) -----------------------------------------------------------------------
class Sampler:
    """Draws pairs of stretches of recordings from several corpora, at most one per patient in a batch.

    A corpus has the weight (patients x hours) ** 0.25, the root of the geometric mean of the two, times its entry in
    `weights`. So neither many short recordings nor a few long ones dominate. (With the root of the hours alone, eleven
    hours of MIT-BIH's 22 people would outweigh 1,400 people of PTB-XL.) All patients of a corpus have the same weight.
    Each of `shapes` (augment.LeadGroup) has a fixed share of the batch, which `ranks` processes can divide, so tensor
    shapes never change. A recording with all INDEPENDENT leads belongs to the first shape, any other to the largest
    number of leads that it has; a group of too few people joins the next smaller one. ValueError if there are no
    recordings, or not enough patients for the batch.
    """

    def __init__(self, corpora, batch, seed, shapes, weights=None, excluded=(), ranks=1):
        self.corpora, self.seed, self.batch, self.shapes = corpora, seed, batch, list(shapes)
        left_out = rows_to_leave_out(corpora, excluded)
        while True:
            self._make_groups(weights or [1.0] * len(corpora), left_out)
            small = [g["shape"] for g in self.groups[:-1] if not g["named"]
                     and MAX_SHARE_OF_PEOPLE * g["patients"].sum() < batch / BATCH_GRAIN]
            if not small:
                break
            self.shapes.remove(small[0])         # its recordings then show fewer leads
        self._share_batch(ranks)

    def _make_groups(self, weights, left_out):
        """The lead groups of self.shapes that have recordings, each with its members: a dict per corpus."""
        self.too_short = "shorter than " + ", ".join(f"{s.window_s:g} s with {s.leads}" for s in self.shapes) + " leads"
        self.skipped = {"not in split train": 0, self.too_short: 0}
        pools = [self._pools(corpus, weight, *rows) for corpus, weight, rows in zip(self.corpora, weights, left_out)]
        self.groups = []
        for shape in self.shapes:
            members = [dict(pool[shape], corpus=c) for c, pool in enumerate(pools) if shape in pool]
            if members:
                self.groups.append(dict(shape=shape, members=members, window=round(shape.window_s * FS),
                                        named=shape is self.shapes[0],
                                        weight=np.array([m["weight"] for m in members]),
                                        patients=np.array([len(m["first"]) for m in members])))
        if not self.groups:
            raise ValueError(f"no recording to train on in {', '.join(str(c.dir) for c in self.corpora)}: "
                             f"{self.skipped}")

    def _pools(self, corpus, weight, leaks, twice):
        """Per lead group of one corpus: index rows sorted by patient, where each patient's rows begin, the corpus'
        weight."""
        index = corpus.index
        train = index["split"] == SPLITS.index("train")
        self.skipped["not in split train"] += int((~train).sum())
        for rows, why in ((leaks, "copy of a held-out recording"), (twice, "copy of another recording")):
            train[rows] = False
            if len(rows):
                self.skipped[why] = self.skipped.get(why, 0) + len(rows)
        rows = np.flatnonzero(train).astype(np.uint32)                                  # half the memory of int64
        rows = rows[np.argsort(index["patient"][rows], kind="stable")]
        belongs = lead_group(index, rows, [shape.leads for shape in self.shapes])
        pools = {}
        for g, shape in enumerate(self.shapes):
            members = rows[(belongs == g) & (index["length"][rows] >= shape.window_s * FS)]
            if len(members):
                patient = index["patient"][members]
                first = np.flatnonzero(np.r_[True, patient[1:] != patient[:-1]])
                hours = float(index["length"][members].sum(dtype=np.int64)) / FS / 3600
                pools[shape] = dict(rows=members, first=first, count=np.diff(np.append(first, len(members))),
                                    weight=weight * (len(first) * hours) ** 0.25)
        self.skipped[self.too_short] += len(rows) - sum(len(pool["rows"]) for pool in pools.values())
        return pools

    def named_leads(self):
        """Names of the leads that views may show by name; all others are trained as unknown."""
        rows = [self.corpora[m["corpus"]].index[m["rows"]] for g in self.groups if g["named"] for m in g["members"]]
        ids = [row["leads"][np.arange(MAX_LEADS) < row["n_leads"][:, None]] for row in rows]
        return [LEADS[i] for i in np.unique(np.concatenate([DERIVED, *ids])) if i] if rows else []

    def _common_patients(self):
        """(G, G): number of patients that two lead groups have in common; on the diagonal, of patients of each."""
        people = [np.concatenate([self._people(m) for m in group["members"]]) for group in self.groups]
        return np.array([[len(np.intersect1d(a, b, assume_unique=True)) for b in people] for a in people])

    def _people(self, member, patients=slice(None)):
        """A number for each patient of a member of a group; the same person has the same one in every group."""
        rows = member["rows"][member["first"][patients]]
        return (member["corpus"] << 32) + self.corpora[member["corpus"]].index["patient"][rows].astype(np.int64)

    def _share_batch(self, ranks):
        """Set the number of recordings of every group in the batch; ValueError that names a possible batch."""
        common = self._common_patients()
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
        """Number of recordings of every group in a batch of this size, in grains of batch / BATCH_GRAIN, by the shares
        of the groups: at least one grain each, and no more than its patients. None if that is not possible."""
        total = BATCH_GRAIN if len(self.groups) > 1 else 1
        share = np.array([g["shape"].share for g in self.groups])
        grain, owed = batch // total, share / share.sum() * total
        if batch % total or len(self.groups) > total:
            return None

        def fit(grains):
            """Whether each group has enough patients, even if the groups before it took all that they share with it."""
            for g, n in enumerate(grains):
                taken = sum(min(grains[h] * grain, common[g, h]) for h in range(g))
                if n * grain + taken > common[g, g]:
                    return False
            return True
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
                    who[member == m] = self._people(pool, patient[member == m])
                new = np.sort(np.unique(who, return_index=True)[1])      # where each person comes first
                new = new[~np.isin(who[new], taken)][:group["size"] - len(places)]
                taken, places = np.append(taken, who[new]), np.append(places, np.c_[member, patient][new], axis=0)
            chosen.append(places)
        return chosen

    def draw(self, step, g, chosen, rows):
        """Recordings `rows` (slice) of group g, chosen for the batch of `step`.

        Returns two stretches of each, int16 (B, 2, S, W), lead ids (B, S) and how many slots hold a lead (B,); further
        slots repeat the first ones. In a group whose recordings differ in their leads the ids are 0 (unknown), because
        a name would tell recordings apart.
        """
        group = self.groups[g]
        places, slots = range(*rows.indices(group["size"])), np.arange(group["shape"].slots)
        signals, leads, _ = zip(*(self._stretches(step, g, place, *chosen[place]) for place in places))
        repeated = [slots % len(ids) for ids in leads]
        return (np.stack([signal[:, order] for signal, order in zip(signals, repeated)]),
                np.stack([ids[order] for ids, order in zip(leads, repeated)]) * group["named"],
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
        """Two random stretches of a patient: (2, L, W) int16, lead ids (L,), and their place (row, first samples).

        A pair with a missing sample is drawn again. A patient who has no whole pair, which is rare, gives way to the
        next one: the only case in which a person can be in a batch twice.
        """
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
