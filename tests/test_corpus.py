"""corpus.py: opening, reading, damage, copies of a recording in two corpora, and which stretches make a batch.

    pytest -q tests/test_corpus.py
"""
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import resample_poly

from augment import lead_groups
from conftest import TWELVE, names_of, real_ptbxl, run, rows_of
from corpus import (DERIVED, FINGERPRINT_DTYPE, HELD_OUT_FILE, INDEPENDENT, INDEX_DTYPE, MAX_PATIENTS_TRIED,
                    MAX_SHARE_OF_PEOPLE, NEAR_S, SPLITS, Corpus, Sampler, capped, find_duplicates,
                    fingerprint, fingerprints_of, known_by_content, lead_group, near_starts, open_corpus, open_held_out,
                    rows_to_leave_out, standard_leads, write_held_out)
from ecg import FS, LEAD_IDS, LEADS, MISSING, Recording

EIGHT = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")


# ---------------------------------------------------------------------------------------------------------------------
# opening and reading

def test_read_gives_windows_without_copying(synth):
    corpus = open_corpus(synth / "data" / "mitdb")
    whole = corpus.read(3)
    for start, length in ((0, 100), (777, 2500), (len(whole[0]) - 1, 1), (40000, None), (5, 0)):
        part = corpus.read(3, start, length)
        np.testing.assert_array_equal(part, whole[:, start:None if length is None else start + length])
        shard = corpus.shard(int(corpus.index["shard"][3]))
        assert part.base is not None and np.shares_memory(part, shard) or length == 0
    for start, length in ((-1, 5), (0, len(whole[0]) + 1), (len(whole[0]), 1)):
        with pytest.raises(AssertionError, match="of a recording of 45000"):
            corpus.read(3, start, length)


@pytest.mark.parametrize("damage, words", [
    (lambda d: shutil.rmtree(d), "holds no corpus"),
    (lambda d: (d / "manifest.json").write_text("{"), "holds no corpus"),
    (lambda d: rewrite(d, magic="cat pictures"), "format 4 of 'cat pictures', expected format 4 of 'ecg-dino corpus'"),
    (lambda d: rewrite(d, format_version=0), "is format 0 of"),
    (lambda d: rewrite(d, format_version=3), "is format 3 of"),
    (lambda d: rewrite(d, recordings=99), "the manifest says 99"),
    (lambda d: rewrite(d, recordings=None), "the manifest says None"),
    (lambda d: rewrite(d, shard_bytes=None), "is damaged"),
    (lambda d: os.truncate(d / "signal" / "00001.i16", 9999),
     "is damaged (signal/00001.i16 has 9999 bytes, the manifest says 10000)"),
    (lambda d: os.truncate(d / "signal" / "00000.i16", 0), "is damaged"),
    (lambda d: np.save(d / "records.npy", np.zeros(2, "S64")), "3 index rows and 2 names"),
    (lambda d: np.save(d / "fingerprints.npy", np.zeros((3, 30), np.uint8)), "fingerprints.npy is of type uint8"),
    (lambda d: (d / "patients.npy").unlink(), "is damaged"),
    (lambda d: os.truncate(d / "index.npy", 300), "is damaged"),
    (lambda d: np.save(d / "index.npy", np.zeros(3)), "is damaged"),
    (lambda d: (d / "index.npy").unlink(), "is damaged"),
    (lambda d: (d / "signal" / "00002.i16").unlink(), "is damaged"),
    (lambda d: (d.rename(f"{d}.part"), d.mkdir(), (d.parent / f"{d.name}.part").rename(d / ".part")),
     "corpus/.part holds an unfinished one: run its command again")])
def test_open_corpus_refuses_damage_and_names_the_command(small_corpus, tmp_path, damage, words):
    copy = Path(shutil.copytree(small_corpus, tmp_path / "corpus"))
    open_corpus(copy)
    damage(copy)
    with pytest.raises(ValueError) as error:
        open_corpus(copy)
    assert words in str(error.value) and str(copy) in str(error.value)
    assert "`python prepare.py " in str(error.value) or "unfinished" in words


def test_a_corpus_with_annotations_of_earlier_still_opens(small_corpus, tmp_path):
    """Icentia11k had a file of them for each shard, and rows of the index that pointed into it."""
    copy = Path(shutil.copytree(small_corpus, tmp_path / "corpus"))
    index = np.load(copy / "index.npy")
    index["n_events"] = 5
    np.save(copy / "index.npy", index)
    (copy / "events").mkdir()
    np.save(copy / "events" / "00000.npy", np.zeros(5, [("sample", "<i4"), ("symbol", "S6")]))
    assert np.array_equal(open_corpus(copy).read(0), open_corpus(small_corpus).read(0))


def rewrite(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


# ---------------------------------------------------------------------------------------------------------------------
# the same recording in two corpora

def test_copies_are_found_whatever_their_names_and_rates(shared_data, tmp_path):
    """PTB-XL at 500 Hz in a folder under other names, next to PTB-XL at 100 Hz."""
    raw, table = real_ptbxl(shared_data, tmp_path / "raw", slice(60))
    theirs = run("ptbxl", raw, tmp_path / "theirs", "--rate", "100")
    mine = tmp_path / "mine"
    mine.mkdir()
    for i in range(0, 60, 2):
        source = raw / table.filename_hr.iloc[i]
        for kind in ("hea", "dat"):
            shutil.copy(source.with_suffix(f".{kind}"), mine / f"{source.name}.{kind}")
        for kind in ("hea", "dat"):
            (mine / f"{source.name}.{kind}").rename(mine / f"x{i}.{kind}")
        (mine / f"x{i}.hea").write_text((mine / f"x{i}.hea").read_text().replace(source.name, f"x{i}"))
    mine = run("wfdb", mine, tmp_path / "out")
    held = theirs.index["split"][::2] != 0
    assert 3 < held.sum() < 27 and (mine.index["split"] == 0).all()
    number = np.array([int(name[1:]) // 2 for name in names_of(mine)])
    absent = tmp_path / "absent"

    def left_out(corpora, excluded=()):
        return [[set(number[rows].tolist()) if c is mine else set(rows.tolist()) for rows in pair]
                for c, pair in zip(corpora, rows_to_leave_out(corpora, excluded, absent))]
    held, rest = set(np.flatnonzero(held).tolist()), set(np.flatnonzero(~held).tolist())
    (none, also_none), (leaks, twice) = left_out([theirs, mine])
    assert leaks == held and not none | also_none
    assert twice <= rest and len(twice) >= 0.9 * len(rest)                # bench.py: 96 % of such copies are found
    (leaks, twice), (none, theirs_twice) = left_out([mine, theirs])       # now theirs come second
    assert leaks == held and not twice | none and theirs_twice <= {2 * i for i in rest}
    assert len(theirs_twice) >= 0.9 * len(rest)
    assert left_out([mine, mine]) == [[set(), set()], [set(), set(range(30))]]
    assert left_out([mine], [theirs]) == [[set(range(30)), set()]]        # all of theirs, their train split too
    assert rows_to_leave_out([mine])[0][0].tolist() == np.flatnonzero(np.isin(number, list(held))).tolist()  # shipped


def pieces_of(signals, seed=0, seconds=5, rate=257, gain=0.6):
    """int16 stretches of int16 signals (L, T) at random starts, resampled to a rate and back, in steps of 5 uV."""
    rng, pieces = np.random.default_rng(seed), []
    for x in signals:
        start = rng.integers(0, x.shape[1] - seconds * FS + 1)
        x = x[:, start:start + seconds * FS] * gain
        x = np.rint(resample_poly(x, rate, FS, axis=1, padtype="line") / 5) * 5
        pieces.append(np.rint(resample_poly(x, FS, rate, axis=1, padtype="line")).astype(np.int16))
    return pieces


def of_pieces(folder, leads, pieces):
    return made(folder, [(i, names, x) for i, (names, x) in enumerate(zip(leads, pieces))], True)


def test_pieces_of_held_out_recordings_are_found(shared_data, tmp_path):
    """5 s at random starts, of all leads, of one lead and of one lead without a name, from PTB-XL and MIT-BIH; all rows
    of the corpora but these are strangers, and none of them is left out."""
    raw, table = real_ptbxl(shared_data, tmp_path / "raw", slice(120))
    theirs = run("ptbxl", raw, tmp_path / "theirs", "--rate", "100")
    held = np.flatnonzero(theirs.index["split"])
    signals = [np.array(theirs.read(i)) for i in held]
    names = [LEADS[k] for k in theirs.lead_ids(0)]
    assert len(held) > 20
    lead = np.arange(len(held)) % 12
    one = [x[k:k + 1] for x, k in zip(signals, lead)]
    for leads, some in (([names] * len(held), signals), ([names[k:k + 1] for k in lead], one),
                        ([["ECG"]] * len(held), one)):
        pieces = of_pieces(tmp_path / str(leads[-1]), leads, pieces_of(some))
        (none, _), (found, twice) = rows_to_leave_out([theirs, pieces], held_out_file=tmp_path / "absent")
        assert len(found) >= len(held) - 1 and len(none) == 0 == len(twice)
        again = rows_to_leave_out([theirs, of_pieces(tmp_path / f"{leads[-1]}2", leads, pieces_of(some, gain=1.9))])
        assert len(again[1][0]) >= len(held) - 1


def test_a_held_out_piece_of_a_recording_that_is_trained_on(synth, tmp_path):
    """The other way round: 5 s are held out, and half an hour that holds them is not; excluded corpora count too."""
    mitdb = open_corpus(synth / "data" / "mitdb")
    whole = made(tmp_path / "a", [(i, ("II", "V1"), np.array(mitdb.read(i))) for i in range(4)], True)
    piece = made(tmp_path / "b", [(0, ("V1",), pieces_of([np.array(mitdb.read(2))[1:]])[0])], True)
    absent = tmp_path / "absent"
    assert [rows.tolist() for rows in rows_to_leave_out([whole], [piece], absent)[0]] == [[2], []]
    piece.index["split"] = SPLITS.index("val")
    piece.fingerprints = fingerprints_of(piece, [True])
    assert [rows.tolist() for rows in rows_to_leave_out([piece, whole], (), absent)[1]] == [[2], []]
    assert [len(rows) for rows in rows_to_leave_out([piece, whole], (), absent)[0]] == [0, 0]


def test_test_sets_that_are_not_prepared_here(shared_data, tmp_path, capsys):
    """pretrained/held_out.npz knows PTB-XL's folds 9 and 10 and DS2, without signals; without it there is a warning."""
    known = open_held_out(HELD_OUT_FILE)
    assert known.dir is None and len(known.index) == 497 + 23 and (known.index["split"] > 0).all()
    raw, table = real_ptbxl(shared_data, tmp_path / "raw", slice(60))
    theirs = run("ptbxl", raw, tmp_path / "theirs", "--rate", "100")
    held = np.flatnonzero(theirs.index["split"])
    mine = made(tmp_path / "mine", [(i, TWELVE, np.array(theirs.read(i))) for i in range(60)], True)
    assert rows_to_leave_out([mine])[0][0].tolist() == held.tolist()
    assert rows_to_leave_out([mine], held_out_file=tmp_path / "absent")[0][0].tolist() == []
    assert "absent: copies of public test sets are found only" in capsys.readouterr().err
    write_held_out([theirs], tmp_path / "own.npz")
    assert rows_to_leave_out([mine], held_out_file=tmp_path / "own.npz")[0][0].tolist() == held.tolist()
    assert names_of(open_held_out(tmp_path / "own.npz")) == [names_of(theirs)[i] for i in held]


def test_recordings_of_a_test_set_are_known_by_their_content(synth, tmp_path):
    """Those that are held out, at another rate, gain and with one lead; not others, and not what cannot be used."""
    corpus = open_corpus(synth / "data" / "ptbxl")
    write_held_out([corpus], tmp_path / "held_out.npz")
    held, names = corpus.index["split"] > 0, [LEADS[i] for i in corpus.lead_ids(0)]
    assert held.any() and not held.all() and (corpus.index["n_leads"] == 12).all()

    def known(rows, leads=slice(None)):
        signals = [resample_poly(np.array(corpus.read(i))[leads] / 1000 * 0.7, 2, 1, axis=1) for i in rows]
        return known_by_content([Recording(x, 2 * FS, names[leads]) for x in signals], tmp_path / "held_out.npz")
    held, others = np.flatnonzero(held), np.flatnonzero(~held)[:20]
    assert known(held) == (len(held), len(held)) and known(others) == (0, len(others)) and known([]) == (0, 0)
    found, n = known([*held, *others], slice(1, 2))
    assert 0.9 * len(held) <= found <= len(held) == n - len(others)
    flat = Recording(np.zeros((1, 2500)), FS, ["I"])
    assert known_by_content([flat], tmp_path / "held_out.npz") == (0, 1)


def test_fingerprints_do_not_depend_on_gain_offset_start_or_pieces_in_memory(synth, monkeypatch):
    mitdb = open_corpus(synth / "data" / "mitdb")
    steps, leads = np.array(mitdb.read(0)), mitdb.lead_ids(0)
    found = fingerprint(steps, leads)
    assert len(found) > 100 and set(found["channel"]) == {0, 1}
    for other in (steps // 2 * 2, steps + np.int16(3000)):
        other = fingerprint(other, leads)
        assert np.mean([len(other) == len(found) and (other["sample"] == found["sample"]).mean()]) > 0.95
    later = fingerprint(steps[:, 1000:], leads)
    both, a, b = np.intersect1d(found["sample"] * 2 + found["channel"], (later["sample"] + 1000) * 2 + later["channel"],
                                return_indices=True)
    assert len(both) >= len(later) - 4 and (found["bits"][a] == later["bits"][b]).all()
    monkeypatch.setattr("corpus.FINGERPRINT_CHUNK", 5000)
    np.testing.assert_array_equal(fingerprint(steps, leads), found)
    assert len(fingerprint(steps[:, :700], leads)) == 0 and len(fingerprint(np.full_like(steps, MISSING), leads)) == 0


def test_find_duplicates_needs_two_fingerprints_that_agree():
    """Recordings a and b of four fingerprints each: so many are the same, with so many bits changed, and moved."""
    rng = np.random.default_rng(0)
    prints = np.zeros(4 * 300, FINGERPRINT_DTYPE)
    prints["row"], prints["sample"] = np.arange(1200) // 4, np.arange(1200) % 4 * 200
    prints["bits"] = rng.integers(0, 2**32, (1200, 3), np.uint32)
    for a, b, same, flips, moved in ((3, 200, 4, 0, 0), (7, 150, 2, 5, 4), (50, 60, 2, 16, 0), (100, 299, 2, 17, 0),
                                     (20, 30, 1, 0, 0), (40, 41, 4, 0, 5)):
        for k in range(same):
            bits = np.unpackbits(prints["bits"][4 * a + k].view(np.uint8))
            bits[48 + rng.choice(48, flips, replace=False)] ^= 1           # the first word stays whole
            prints["bits"][4 * b + k] = np.packbits(bits).view("<u4")
            prints["sample"][4 * b + k] += moved
    corpus = Corpus(None, {}, np.zeros(300, INDEX_DTYPE), None, None, prints)
    assert find_duplicates([corpus], [np.ones(300, bool)]).tolist() == [[3, 200], [7, 150], [50, 60]]
    assert find_duplicates([corpus], [np.arange(300) < 200]).tolist() == [[7, 150], [50, 60]]
    assert find_duplicates([corpus], [np.zeros(300, bool)]).shape == (0, 2)


# ---------------------------------------------------------------------------------------------------------------------
# the sampler

def sampler(synth, batch=32, seed=5, names=("ptbxl", "mitdb"), **more):
    return Sampler([open_corpus(synth / "data" / n) for n in names], batch, seed, lead_groups(), **more)


def made(folder, recordings, fingerprints=False):
    """A corpus of recordings (patient, lead names, int16 (L, T)), all of split train; fingerprints or none at all."""
    index = np.zeros(len(recordings), INDEX_DTYPE)
    (folder / "signal").mkdir(parents=True)
    offset = 0
    for row, (patient, leads, signal) in zip(index, recordings):
        row["patient"], row["n_leads"], row["length"], row["offset"] = patient, len(leads), signal.shape[1], offset
        row["leads"][:len(leads)] = [LEAD_IDS.get(name.upper(), 0) for name in leads]
        offset += signal.size
    np.concatenate([np.asarray(signal, np.int16).ravel() for _, _, signal in recordings]).tofile(
        folder / "signal" / "00000.i16")
    people = [f"person {i}" for i in range(index["patient"].max() + 1)]
    corpus = Corpus(folder, {}, index, np.array([f"r{i}" for i in range(len(index))], "S64"), np.array(people, "S32"))
    if fingerprints:
        corpus.fingerprints = fingerprints_of(corpus, index["split"] > 0)
    return corpus


def of_leads(folder, people, leads, seconds=12):
    """A corpus of one recording for each of so many people; lead n (from 0) is n + 1 uV throughout."""
    signal = np.repeat(np.arange(1, len(leads) + 1, dtype=np.int16)[:, None], round(seconds * FS), axis=1)
    return made(folder, [(i, leads, signal) for i in range(people)])


def drawn(s, step, g=0):
    return s.draw(step, g, s.choose(step)[g], slice(None))


def test_excluded_corpora_are_not_trained_on(synth):
    mitdb = open_corpus(synth / "data" / "mitdb")
    s = sampler(synth, 16, excluded=[mitdb])
    assert {member["corpus"] for group in s.groups for member in group["members"]} == {0}
    assert s.skipped["copy of a held-out recording"] == (mitdb.index["split"] == 0).sum()
    assert "copy of a held-out recording" not in sampler(synth, 16).skipped


def test_weights_of_corpora(tmp_path):
    corpora = [of_leads(tmp_path / name, 200, ("II", "V1")) for name in "ab"]
    shares = []
    for weights in ([1.0, 1.0], [1.0, 4.0]):
        s = Sampler(corpora, 16, 5, lead_groups(), weights)
        drawn = [m for step in range(200) for m, _ in s.choose(step)[0]]
        shares.append(np.mean(drawn) / (1 - np.mean(drawn)))       # odds of the second corpus
    assert shares[0] == pytest.approx(1, rel=0.2) and shares[1] == pytest.approx(4, rel=0.2)


def test_a_batch_holds_a_patient_of_the_train_split_once(synth):
    s = sampler(synth)
    chosen, patients = s.choose(0), []
    for g, group in enumerate(s.groups):
        assert len(chosen[g]) == group["size"]
        for m, patient in chosen[g]:
            member = group["members"][m]
            corpus, first = s.corpora[member["corpus"]], member["first"][patient]
            rows = member["rows"][first:first + member["count"][patient]]
            assert len(set(corpus.index["patient"][rows])) == 1
            patients.append(corpus.patients[corpus.index["patient"][rows[0]]])
            assert set(corpus.index["split"][rows]) == {SPLITS.index("train")}
    assert len(set(patients)) == 32                # once in a batch


def test_a_person_with_recordings_of_few_and_of_many_leads_is_in_a_batch_once(tmp_path):
    signal = np.ones((12, 12 * FS), np.int16)
    s = Sampler([made(tmp_path / "a", [(i, leads, signal[:len(leads)]) for leads in (TWELVE, ("II",))
                                       for i in range(20)])], 16, 0, lead_groups())
    assert [g["patients"].tolist() for g in s.groups] == [[20], [20]]
    for step in range(50):
        assert len({p for places in s.choose(step) for _, p in places.tolist()}) == 16


def test_a_batch_takes_the_first_of_each_person_that_is_drawn(synth):
    """choose against a loop over the places."""
    s = sampler(synth, 32, names=("ptbxl", "mitdb", "ptbxl"))
    assert len(s.groups) == 2
    for step in range(5):
        taken, chosen = set(), s.choose(step)
        for g, group in enumerate(s.groups):
            rng, places = np.random.default_rng([s.seed, step, g, 0]), []
            while len(places) < group["size"]:
                member = rng.choice(len(group["weight"]), 4 * group["size"], p=group["chance"])
                patient = (rng.random(len(member)) * group["patients"][member]).astype(np.int64)
                for m, p in zip(member.tolist(), patient.tolist()):
                    pool = group["members"][m]
                    index = s.corpora[pool["corpus"]].index
                    who = pool["corpus"], index["patient"][pool["rows"][pool["first"][p]]]
                    if who not in taken and len(places) < group["size"]:
                        taken.add(who)
                        places.append([m, p])
            assert chosen[g].tolist() == places


def test_a_corpus_given_twice_fills_its_batches(synth):
    """Its patients count twice there; the draw must come to an end all the same."""
    s = sampler(synth, 32, names=("mitdb", "mitdb", "ptbxl", "ptbxl"))
    assert [len(places) for places in s.choose(0)] == [g["size"] for g in s.groups] == [28, 4]


def test_held_out_patients_never_reach_a_batch(synth):
    s = sampler(synth)
    trained = {(m["corpus"], p) for g in s.groups for m in g["members"]
               for p in s.corpora[m["corpus"]].index["patient"][m["rows"]]}
    held = {(c, p) for c, corpus in enumerate(s.corpora)
            for p in corpus.index["patient"][corpus.index["split"] != SPLITS.index("train")]}
    assert trained and held and not trained & held


def test_stretches_are_those_of_the_corpus_and_only_the_group_of_twelve_leads_has_names(synth):
    """What `name` says is what `draw` reads: every sample of both stretches."""
    s = sampler(synth)
    names = iter(s.name(0))
    for g, group in enumerate(s.groups):
        batch, leads, available = drawn(s, 0, g)
        slots, W = group["shape"].slots, group["window"]
        assert batch.dtype == np.int16 and batch.shape == (group["size"], 2, slots, W)
        assert leads.shape == (group["size"], slots)
        for signal, ids, n in zip(batch, leads, available):
            name, seconds = next(names).split("@")
            corpus = next(c for c in s.corpora if c.dir.name == name.split("/")[0])
            row = rows_of(corpus)[name.split("/")[1]]
            starts = [round(float(second) * FS) for second in seconds.split(",")]
            whole = np.stack([corpus.read(row, start, W) for start in starts])
            for slot in range(n, slots):                           # further slots repeat the first ones
                assert np.array_equal(signal[:, slot], signal[:, slot - n]) and ids[slot] == ids[slot - n]
            if group["named"]:
                assert [LEADS[i] for i in ids[:n]] == [*EIGHT, "III", "aVR", "aVL", "aVF"]
                order = [corpus.lead_ids(row).tolist().index(i) for i in INDEPENDENT]
                assert np.array_equal(signal[:, :8], whole[:, order])
                # Computed leads are the recorded ones, up to their rounding before resampling.
                order = [corpus.lead_ids(row).tolist().index(i) for i in DERIVED]
                assert np.abs(signal[:, 8:12].astype(int) - whole[:, order]).max() <= 15
            else:
                assert n == 2 and (ids == 0).all()
                assert any(np.array_equal(signal, whole[:, order]) for order in ([0, 1], [1, 0]))
    assert [g["named"] for g in s.groups] == [True, False] and next(names, None) is None


@pytest.mark.parametrize("batch", [26, 32, 33, 320])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_batch_that_is_not_possible_is_refused_and_the_one_that_is_advised_is_taken(synth, batch, ranks):
    """Of 25 patients with twelve leads."""
    few = fewer_patients(open_corpus(synth / "data" / "ptbxl"), 25)
    with pytest.raises(ValueError, match=f"--batch {batch} is not possible") as error:
        Sampler([few], batch, 0, lead_groups(), ranks=ranks)
    message = str(error.value)
    assert "25 patients with 8 leads" in message and f"{ranks} processes" in message
    advised = int(re.search(r"use --batch (\d+)$", message)[1])
    s = Sampler([few], advised, 0, lead_groups(), ranks=ranks)
    assert [g["size"] for g in s.groups] == [advised] == [{1: 25}.get(ranks, 24)]
    assert [len(places) for places in s.choose(0)] == [advised]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_groups_share_a_batch_in_parts_that_the_processes_divide(synth, ranks):
    """Of 25 and 8 patients. On three processes a batch of two groups is a multiple of 48: for that they are too few."""
    corpora = [fewer_patients(open_corpus(synth / "data" / "ptbxl"), 25), open_corpus(synth / "data" / "mitdb")]
    message = refusal(lambda: Sampler(corpora, 20, 0, lead_groups(), ranks=ranks))
    assert "25 patients with 8 leads, 8 patients with 2 leads" in message and "parts of 1/16" in message
    if ranks == 3:
        assert message.endswith("use more data or fewer processes")
        assert "use --batch 48" in refusal(lambda: sampler(synth, 32, ranks=3))
        sizes = [g["size"] for g in sampler(synth, 48, ranks=3).groups]
        assert len(sizes) == 2 and sum(sizes) == 48 and not any(size % 3 for size in sizes)
    else:
        assert message.endswith("use --batch 16")
        assert [g["size"] for g in Sampler(corpora, 16, 0, lead_groups(), ranks=ranks).groups] == [12, 4]


def fewer_patients(corpus, patients):
    """The corpus with only the first so many patients of its train split in training."""
    index = np.array(corpus.index)
    train = index["split"] == SPLITS.index("train")
    kept = np.unique(index["patient"][train])[:patients]
    index["split"][train & ~np.isin(index["patient"], kept)] = SPLITS.index("test")
    return Corpus(corpus.dir, corpus.manifest, index, corpus.records, corpus.patients, corpus.fingerprints)


def refusal(function):
    with pytest.raises(ValueError) as error:
        function()
    return str(error.value)


def test_data_without_a_recording_to_train_on_are_refused(synth):
    few = fewer_patients(open_corpus(synth / "data" / "ptbxl"), 0)
    assert "no recording to train on in" in refusal(lambda: Sampler([few], 16, 0, lead_groups()))


# ---------------------------------------------------------------------------------------------------------------------
# two stretches of a recording

def draws_of(length, window, times=3000):
    rng = np.random.default_rng(0)
    return np.array([near_starts(rng, length, window) for _ in range(times)])


@pytest.mark.parametrize("length, window", [(10 * FS, 5 * FS), (1875, 5 * FS), (3600 * FS, 8 * FS),
                                            (3600 * FS, 90 * FS), (70 * FS, 8 * FS), (12, 4)])
def test_two_stretches_overlap_by_half_at_most_and_are_near(length, window):
    starts = draws_of(length, window)
    apart = np.abs(starts[:, 0] - starts[:, 1])
    least, most = window // 2, min(max(round(NEAR_S * FS), window), length - window)
    assert starts.min() >= 0 and starts.max() + window <= length
    assert least <= apart.min() and apart.max() <= most
    assert apart.min() - least <= 0.01 * most and most - apart.max() <= 0.01 * most      # both are reached
    if least < most:
        assert apart.mean() == pytest.approx((least + most) / 2, rel=0.05)
    assert (starts[:, 0] < starts[:, 1]).mean() == pytest.approx(0.5, abs=0.05)          # both orders
    assert starts.min() <= 0.01 * length and length - window - starts.max() <= 0.01 * length


def test_stretches_reach_every_place_of_a_recording():
    starts = draws_of(12, 4)
    assert set(starts[:, 0]) == set(starts[:, 1]) == set(range(9))
    assert {tuple(pair) for pair in starts} == {(a, b) for a in range(9) for b in range(9) if abs(a - b) >= 2}
    first = draws_of(3600 * FS, 8 * FS).min(axis=1)                                      # of a long one equally often
    np.testing.assert_allclose(np.histogram(first, 10, (0, 3600 * FS - 8 * FS))[0], 300, rtol=0.25)


def test_stretches_of_a_short_recording_lie_as_far_apart_as_they_can():
    assert (draws_of(1000, 1000, 100) == 0).all()                        # as long as the stretch: it comes twice
    assert {tuple(pair) for pair in draws_of(1001, 1000, 100)} == {(0, 1), (1, 0)}
    assert {tuple(pair) for pair in draws_of(1400, 1000, 100)} == {(0, 400), (400, 0)}


def with_gaps(leads, seconds, gaps, seed=0):
    """int16 (L, T), 1 to 1,000 uV, with MISSING at gaps (lead, first second, last second)."""
    x = np.random.default_rng(seed).integers(1, 1001, (leads, seconds * FS)).astype(np.int16)
    for lead, first, last in gaps:
        x[lead, first * FS:last * FS] = MISSING
    return x


@pytest.mark.parametrize("leads, kept", [(("II", "V1"), slice(0, 2)), (TWELVE, slice(0, 8))])
def test_only_whole_stretches_are_drawn(tmp_path, leads, kept):
    """Also a gap in one lead only counts; a 0, of which these recordings have none, never stands for it."""
    gaps = [(slice(None), 12, 14), (0, 40, 41), (1, 55, 60)]
    s = Sampler([made(tmp_path / "a", [(i, leads, with_gaps(len(leads), 70, gaps, i)) for i in range(20)])], 16, 0,
                lead_groups())
    for step in range(20):
        batch = drawn(s, step)[0][:, :, kept]
        assert batch.min() >= 1 and batch.max() <= 1000
        for name in s.name(step):
            for second in map(float, name.split("@")[1].split(",")):
                end = second + s.groups[0]["window"] / FS
                assert not any(second < last and first < end for _, first, last in gaps), name


def test_a_gap_in_a_lead_that_is_not_needed_does_no_harm(tmp_path):
    """III is computed; of other leads than the twelve those are shown that are whole."""
    leads = (*TWELVE, "X", "Y", "Z")
    gaps = [(leads.index("III"), 0, 12), (leads.index("Y"), 6, 7)]
    s = Sampler([made(tmp_path / "a", [(i, leads, with_gaps(15, 12, gaps, i)) for i in range(20)])], 16, 0,
                lead_groups())
    batch, ids, available = drawn(s, 0)
    assert MISSING not in batch and set(available) == {14, 15}
    for n, row in zip(available, ids):
        assert [LEADS[i] for i in row[12:n]] == (["X", "Z"] if n == 14 else ["X", "Y", "Z"])


def test_a_patient_without_two_whole_stretches_gives_way_to_the_next(tmp_path):
    """Person 1, 2 and 4 have too long gaps, 4 in one lead only."""
    holes = {1: [(slice(None), 0, 12)], 2: [(slice(None), 4, 12)], 4: [(1, 5, 6)]}
    s = Sampler([made(tmp_path / "a", [(i, ("II", "V1"), with_gaps(2, 12, holes.get(i, []), i)) for i in range(5)])],
                4, 0, lead_groups())
    for step in range(10):
        found = [s._stretches(step, 0, 0, 0, patient) for patient in range(5)]
        assert [row for *_, (row, _) in found] == [0, 3, 3, 3, 0]
        assert all(signal.min() >= 1 for signal, *_ in found)
        again = s._stretches(step, 0, 0, 0, 2)
        assert np.array_equal(again[0], found[2][0]) and again[2] == found[2][2]


@pytest.mark.parametrize("leads, hole", [(("II", "V1"), 1), (TWELVE, TWELVE.index("V6"))])
def test_a_corpus_without_two_whole_stretches_is_refused(tmp_path, leads, hole):
    s = Sampler([made(tmp_path / "a", [(i, leads, with_gaps(len(leads), 12, [(hole, 2, 3), (hole, 6, 8)]))
                                       for i in range(20)])], 16, 0, lead_groups())
    message = refusal(lambda: drawn(s, 0))
    assert str(tmp_path / "a") in message and f"{MAX_PATIENTS_TRIED} patients in a row" in message
    assert f"{s.groups[0]['shape'].window_s:g} s without missing" in message
    assert "leave this corpus out of --data" in message


# ---------------------------------------------------------------------------------------------------------------------
# leads

def ids_of(*names):
    return np.array([LEAD_IDS.get(name.upper(), 0) for name in names])


def test_standard_leads():
    """In any order of the recording; recorded limb leads other than I and II are replaced, unknown leads left out."""
    names = ("Z", "V6", "aVL", "V1", "unknown", "II", "III", "V3", "V7", "V2", "I", "V5", "X", "V4", "Y")
    x = np.random.default_rng(0).integers(-3000, 3001, (2, len(names), 50)).astype(np.int16)
    signal, ids = standard_leads(x, ids_of(*names), 20)
    shown = [LEADS[i] for i in ids]
    assert shown == [*EIGHT, "III", "aVR", "aVL", "aVF", "Z", "V7", "X", "Y"]
    assert signal.dtype == np.int16 and ids.dtype == np.int64
    lead = {name: signal[:, i].astype(int) for i, name in enumerate(shown)}
    for name in (*EIGHT, "Z", "V7", "X", "Y"):
        assert np.array_equal(lead[name], x[:, names.index(name)])
    I, II = lead["I"], lead["II"]
    assert np.array_equal(lead["III"], II - I)
    for name, twice in (("aVR", -(I + II)), ("aVL", 2 * I - II), ("aVF", 2 * II - I)):
        assert set(np.unique(2 * lead[name] - twice)) <= {-1, 0, 1}, name               # half a microvolt
    for slots in (8, 12, 14):
        fewer, few = standard_leads(x, ids_of(*names), slots)
        assert few.tolist() == ids[:slots].tolist() and np.array_equal(fewer, signal[:, :slots])


@pytest.mark.parametrize("absent", EIGHT)
def test_without_an_independent_lead_there_are_no_standard_leads(absent):
    names = [name for name in (*TWELVE, "X") if name != absent]
    signal, ids = standard_leads(np.ones((2, 12, 50), np.int16), ids_of(*names), 15)
    assert signal.shape == (2, 0, 50) and ids.shape == (0,)


def test_computed_leads_are_clipped_and_never_missing():
    """int16 would turn over, and -32768 means that a sample is missing."""
    x = np.zeros((2, 8, 4), np.int16)
    x[:, 0], x[:, 1] = (32767, -32767, -32767, 32767), (-32767, 32767, -32767, 32767)
    signal, ids = standard_leads(x, ids_of(*EIGHT), 15)
    assert signal[:, 8].tolist() == [[-32767, 32767, 0, 0]] * 2                          # III
    assert signal[:, 9].tolist() == [[0, 0, 32767, -32767]] * 2                          # aVR
    assert signal.min() == -32767 and (signal[:, 10, :2] == (32767, -32767)).all()
    x[:, 0], x[:, 1] = (1, 1, 0, 0), (-32767, -32766, -32767, 32767)
    assert standard_leads(x, ids_of(*EIGHT), 15)[0].min() == -32767


GROUPS_OF = {"12": (TWELVE, 8), "15": ((*TWELVE, "X", "Y", "Z"), 8), "8": (EIGHT, 8), "6": (TWELVE[:6], 4),
             "9": (("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V3", "V5"), 4), "V6 is absent": (TWELVE[:11], 4),
             "8 without names": (("?",) * 8, 4), "XYZ": (("X", "Y", "Z"), 3), "2": (("II", "V5"), 2), "1": (("?",), 1)}


@pytest.mark.parametrize("case", GROUPS_OF)
def test_the_group_of_a_recording(case):
    leads, expected = GROUPS_OF[case]
    index = np.zeros(3, INDEX_DTYPE)
    index["leads"] = ids_of(*TWELVE, "X", "Y", "Z", "V7")                # what lies beyond n_leads does not count
    index["n_leads"] = 1
    index["leads"][1][:len(leads)], index["n_leads"][1] = ids_of(*leads), len(leads)
    groups = (8, 4, 3, 2, 1)
    assert groups[lead_group(index, np.array([1]), groups)[0]] == expected
    assert lead_group(index, np.array([0, 1, 2]), groups).tolist() == [4, groups.index(expected), 4]
    for least in groups[1:]:                                             # without the groups below
        found = lead_group(index, np.array([1]), groups[:groups.index(least) + 1])[0]
        assert found == (groups.index(expected) if expected >= least else -1)


def test_groups_are_exclusive_and_every_recording_is_in_one(tmp_path):
    kinds = [leads for leads, _ in GROUPS_OF.values()]
    recordings = [(i, leads, np.ones((len(leads), 12 * FS), np.int16)) for leads in kinds for i in range(20)]
    s = Sampler([made(tmp_path / "a", recordings)], 16, 0, lead_groups())
    rows = [group["members"][0]["rows"].tolist() for group in s.groups]
    assert sorted(sum(rows, [])) == list(range(len(recordings))) and s.skipped[s.too_short] == 0
    for group, found in zip(s.groups, rows):
        expected = {i for i, kind in enumerate(GROUPS_OF.values()) if kind[1] == group["shape"].leads}
        assert {row // 20 for row in found} == expected
    assert [g["shape"].leads for g in s.groups] == [8, 4, 3, 2, 1]


def test_a_group_of_too_few_people_joins_the_next_smaller_one(tmp_path):
    """Three people with four leads would all be in every batch: each shows three of its leads, another time others."""
    corpora = [of_leads(tmp_path / "four", 3, TWELVE[:4]), of_leads(tmp_path / "three", 20, ("X", "Y", "Z")),
               of_leads(tmp_path / "two", 20, ("II", "V1"))]
    s = Sampler(corpora, 16, 0, lead_groups())
    assert [g["shape"].leads for g in s.groups] == [3, 2]
    assert [[(m["corpus"], len(m["rows"])) for m in g["members"]] for g in s.groups] == [[(0, 3), (1, 20)], [(2, 20)]]
    shown = set()
    for step in range(100):
        places = s.choose(step)[0]
        batch = s.draw(step, 0, places, slice(None))[0]
        shown |= {tuple(batch[i, 0, :, 0]) for i in np.flatnonzero(places[:, 0] == 0)}
    assert {frozenset(leads) for leads in shown} == {frozenset({1, 2, 3, 4} - {n}) for n in (1, 2, 3, 4)}
    assert len(Sampler([of_leads(tmp_path / "more", 4, TWELVE[:4]), *corpora[1:]], 16, 0, lead_groups()).groups) == 3


def test_the_last_group_is_never_left_out(tmp_path):
    """However few its people are: there is no smaller group that they could join. Nor does the group of twelve leads
    join another."""
    few, many = of_leads(tmp_path / "few", 8, ("II", "V1")), of_leads(tmp_path / "many", 100, TWELVE)
    s = Sampler([few, many], 64, 0, lead_groups())
    assert [(g["shape"].leads, g["patients"].tolist()) for g in s.groups] == [(8, [100]), (2, [8])]
    few, many = of_leads(tmp_path / "few2", 8, TWELVE), of_leads(tmp_path / "many2", 100, ("II",))
    s = Sampler([few, many], 64, 0, lead_groups())
    assert [(g["shape"].leads, g["patients"].tolist()) for g in s.groups] == [(8, [8]), (1, [100])]


@pytest.mark.parametrize("leads", [TWELVE[:4], ("X", "Y", "Z"), ("II", "V1"), ("?", "?"), TWELVE[:6]])
def test_recordings_of_few_leads_show_all_of_them_without_names(tmp_path, leads):
    s = Sampler([of_leads(tmp_path / "a", 20, leads)], 16, 0, lead_groups())
    shown, orders, n = set(), set(), min(4, len(leads))
    for step in range(20):
        batch, ids, available = drawn(s, step)
        assert batch.shape[2] == n and (available == n).all() and (ids == 0).all()
        assert (batch == batch[:, :1, :, :1]).all()                      # the same leads in both stretches
        orders |= {tuple(row) for row in batch[:, 0, :, 0]}
        shown |= set(batch.ravel())
    assert shown == set(range(1, len(leads) + 1)) and all(len(set(order)) == n for order in orders)
    assert len(orders) > 1                                               # in any order


def test_an_exam_of_seven_seconds_takes_part_and_one_of_four_is_too_short(tmp_path):
    signal = np.ones((12, 7 * FS), np.int16)
    s = Sampler([made(tmp_path / "a", [(i, TWELVE, signal) for i in range(20)]
                      + [(20, TWELVE, signal[:, :4 * FS]), (21, TWELVE, signal[:, :5 * FS - 1])]
                      + [(22, TWELVE, signal[:, :5 * FS])]               # as long as a stretch
                      + [(23 + i, ("II", "V1"), signal[:2]) for i in range(20)])], 16, 0, lead_groups())
    assert [g["patients"].tolist() for g in s.groups] == [[21]]
    assert s.skipped == {"not in split train": 0, s.too_short: 22}       # those of two leads too: they need 8 s
    assert s.too_short.startswith("shorter than 5 s with 8, 8 s with 4")
    assert {name.split("@")[1] for step in range(5) for name in s.name(step)} == {"0,2", "2,0", "0,0"}


# ---------------------------------------------------------------------------------------------------------------------
# corpora with few people

def test_capped():
    np.testing.assert_allclose(capped(np.array([1.0, 3.0]), np.array([1.0, 1.0])), [0.25, 0.75])
    np.testing.assert_allclose(capped(np.array([8.0, 1.0, 1.0]), np.array([0.5, 1.0, 1.0])), [0.5, 0.25, 0.25])
    # What the first leaves lifts the second above its own limit.
    np.testing.assert_allclose(capped(np.array([8.0, 2.0, 1.0]), np.array([0.1, 0.5, 1.0])), [0.1, 0.5, 0.4])
    np.testing.assert_allclose(capped(np.array([8.0, 1.0]), np.array([0.3, 0.1])), [0.75, 0.25])
    np.testing.assert_allclose(capped(np.array([7.0]), np.array([0.01])), [1.0])
    rng = np.random.default_rng(0)
    for n in rng.integers(1, 9, 300):
        weight, most = rng.uniform(0.1, 5, n) ** 3, rng.uniform(0.01, 1, n)
        chance = capped(weight, most)
        assert chance.sum() == pytest.approx(1) and (chance > 0).all()
        if most.sum() > 1:
            assert (chance <= most + 1e-9).all()
            free = chance < most - 1e-9
            np.testing.assert_allclose(np.diff((chance / weight)[free]), 0, atol=1e-9)      # in proportion
            assert (chance[~free] / weight[~free]).max(initial=0) <= (chance / weight)[free].min(initial=np.inf) + 1e-9


def test_a_corpus_of_few_people_does_not_fill_the_batches(tmp_path):
    """Even at a thousand times the weight; but where nobody else is there, it does."""
    few, many = of_leads(tmp_path / "few", 20, ("II", "V1")), of_leads(tmp_path / "many", 300, ("II", "V1"))

    def share_of_people(corpora):
        s = Sampler(corpora, 16, 0, lead_groups(), [1000.0, 1.0][:len(corpora)])
        assert s.groups[0]["chance"].sum() == pytest.approx(1)
        return np.mean([(s.choose(step)[0][:, 0] == 0).sum() for step in range(300)]) / 20
    assert 0.8 * MAX_SHARE_OF_PEOPLE < share_of_people([few, many]) < 1.05 * MAX_SHARE_OF_PEOPLE
    assert share_of_people([few]) == 16 / 20


def test_only_the_limit_of_a_corpus_of_few_people_depends_on_the_others(tmp_path):
    """A corpus with enough people has the chance of its weight: (people x hours) ** 0.25."""
    corpora = [of_leads(tmp_path / "a", 100, ("II", "V1")), of_leads(tmp_path / "b", 200, ("II", "V1"), 24)]
    chance = Sampler(corpora, 16, 0, lead_groups()).groups[0]["chance"]
    assert chance[1] / chance[0] == pytest.approx((2 * 4) ** 0.25)


def test_content_stands_for_what_is_in_a_corpus_and_not_for_its_name(synth, tmp_path):
    """A run is resumed on a corpus that moved, and not on one that was prepared again from other recordings."""
    there = synth / "data" / "ptbxl"
    moved = Path(shutil.copytree(there, tmp_path / "another name"))
    assert open_corpus(moved).content() == open_corpus(there).content() != open_corpus(there.parent / "mitdb").content()
    sums = open_corpus(there).manifest["sha256"]
    for name in ("signal/00000.i16", "index.npy", "patients.npy"):
        rewrite(moved, sha256=sums | {name: "0" * 64})
        assert open_corpus(moved).content() != open_corpus(there).content()
    rewrite(moved, sha256=sums | {"records.npy": "0" * 64}, command="another")   # names of recordings decide nothing
    assert open_corpus(moved).content() == open_corpus(there).content()
