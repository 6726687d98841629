"""corpus.py: opening, reading, damage, copies of a recording in two corpora, and which recordings make a batch.

    pytest -q tests/test_corpus.py
"""
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from augment import lead_groups
from conftest import names_of, real_ptbxl, run
from corpus import SPLITS, Corpus, Sampler, find_duplicates, open_corpus, rows_to_leave_out
from ecg import LEADS


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
    (lambda d: rewrite(d, magic="cat pictures"), "format 3 of 'cat pictures', expected format 3 of 'ecg-dino corpus'"),
    (lambda d: rewrite(d, format_version=0), "is format 0 of"),
    (lambda d: rewrite(d, recordings=99), "the manifest says 99"),
    (lambda d: rewrite(d, recordings=None), "the manifest says None"),
    (lambda d: rewrite(d, shard_bytes=None), "is damaged"),
    (lambda d: os.truncate(d / "signal" / "00001.i16", 9999),
     "is damaged (signal/00001.i16 has 9999 bytes, the manifest says 10000)"),
    (lambda d: os.truncate(d / "signal" / "00000.i16", 0), "is damaged"),
    (lambda d: np.save(d / "records.npy", np.zeros(2, "S64")), "3 index rows, 2 names and 3 fingerprints"),
    (lambda d: (d / "patients.npy").unlink(), "is damaged"),
    (lambda d: os.truncate(d / "index.npy", 300), "is damaged"),
    (lambda d: np.save(d / "index.npy", np.zeros(3)), "is damaged"),
    (lambda d: (d / "index.npy").unlink(), "is damaged"),
    (lambda d: (d / "signal" / "00002.i16").unlink(), "is damaged"),
    (lambda d: d.rename(f"{d}.part"), "corpus.part holds an unfinished one: run its command again")])
def test_open_corpus_refuses_damage_and_names_the_command(small_corpus, tmp_path, damage, words):
    copy = Path(shutil.copytree(small_corpus, tmp_path / "corpus"))
    open_corpus(copy)
    damage(copy)
    with pytest.raises(ValueError) as error:
        open_corpus(copy)
    assert words in str(error.value) and str(copy) in str(error.value)
    assert "`python prepare.py " in str(error.value) or "unfinished" in words


def rewrite(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def test_a_corpus_of_format_2_still_opens(small_corpus, tmp_path):
    """Format 2 differs in the name of one file."""
    old = Path(shutil.copytree(small_corpus, tmp_path / "old"))
    (old / "fingerprints.npy").rename(old / "prints.npy")
    rewrite(old, format_version=2)
    old, new = open_corpus(old), open_corpus(small_corpus)
    np.testing.assert_array_equal(old.fingerprints, new.fingerprints)
    np.testing.assert_array_equal(old.index, new.index)
    for i in range(len(new.index)):
        np.testing.assert_array_equal(old.read(i), new.read(i))
    (old.dir / "prints.npy").rename(old.dir / "fingerprints.npy")
    with pytest.raises(ValueError, match="is damaged .*prints.npy"):
        open_corpus(old.dir)


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
    leaks, twice = rows_to_leave_out([theirs, mine])[1]
    assert sorted(number[leaks]) == np.flatnonzero(held).tolist()
    assert sorted(number[twice]) == np.flatnonzero(~held).tolist()
    assert [len(rows) for rows in rows_to_leave_out([theirs, mine])[0]] == [0, 0]
    leaks, twice = rows_to_leave_out([mine, theirs])[0]
    assert sorted(number[leaks]) == np.flatnonzero(held).tolist() and len(twice) == 0
    leaks, twice = rows_to_leave_out([mine, theirs])[1]   # now theirs come second
    assert len(leaks) == 0 and len(twice) == (~held).sum()
    assert [tuple(map(len, rows)) for rows in rows_to_leave_out([mine, mine])] == [(0, 0), (0, 30)]
    leaks, twice = rows_to_leave_out([mine], [theirs])[0]  # all of theirs is kept out, their train split too
    assert leaks.tolist() == list(range(30)) and len(twice) == 0


def test_find_duplicates_by_counting_bits():
    rng = np.random.default_rng(0)
    prints = rng.integers(0, 256, (300, 30), np.uint8)
    for a, b, flips in ((3, 200, 0), (7, 150, 5), (50, 60, 12), (100, 299, 13)):
        bits = np.unpackbits(prints[a])
        bits[24 + rng.choice(216, flips, replace=False)] ^= 1          # the first word stays whole
        prints[b] = np.packbits(bits)
    assert find_duplicates(prints).tolist() == [[3, 200], [7, 150], [50, 60]]
    assert find_duplicates(prints[:2]).shape == (0, 2) and find_duplicates(prints[:0]).shape == (0, 2)


# ---------------------------------------------------------------------------------------------------------------------
# the sampler

def sampler(synth, batch=32, seed=5, names=("ptbxl", "mitdb"), **more):
    return Sampler([open_corpus(synth / "data" / n) for n in names], batch, seed, lead_groups(), **more)


def test_excluded_corpora_are_not_trained_on(synth):
    mitdb = open_corpus(synth / "data" / "mitdb")
    s = sampler(synth, 16, excluded=[mitdb])
    assert {member["corpus"] for group in s.groups for member in group["members"]} == {0}
    assert s.skipped["copy of a held-out recording"] == (mitdb.index["split"] == 0).sum()
    assert "copy of a held-out recording" not in sampler(synth, 16).skipped


def test_weights_of_corpora(synth):
    shares = []
    for weights in ([1.0, 1.0], [1.0, 4.0]):
        s = sampler(synth, 16, weights=weights)
        group = next(g for g in s.groups if len(g["members"]) == 2)
        drawn = [m for step in range(200) for m, _ in s.choose(step)[s.groups.index(group)]]
        shares.append(np.mean(drawn) / (1 - np.mean(drawn)))       # odds of the second corpus
    assert 2 < shares[1] / shares[0] < 8


def test_batch_holds_one_window_per_patient_of_the_train_split(synth):
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
    assert len(set(patients)) == 32                # once in a batch, though those with many leads are in every group


def test_a_batch_takes_the_first_of_each_person_that_is_drawn(synth):
    """choose against a loop over the places."""
    s = sampler(synth, 48, names=("ptbxl", "mitdb", "ptbxl"))
    for step in range(5):
        taken, chosen = set(), s.choose(step)
        for g, group in enumerate(s.groups):
            rng, places = np.random.default_rng([s.seed, step, g, 0]), []
            while len(places) < group["size"]:
                member = rng.choice(len(group["weight"]), 4 * group["size"], p=group["weight"] / group["weight"].sum())
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
    s = sampler(synth, 64, names=("mitdb", "mitdb", "ptbxl", "ptbxl"))
    assert [len(places) for places in s.choose(0)] == [g["size"] for g in s.groups]


def test_held_out_patients_never_reach_a_batch(synth):
    s = sampler(synth)
    trained = {(m["corpus"], p) for g in s.groups for m in g["members"]
               for p in s.corpora[m["corpus"]].index["patient"][m["rows"]]}
    held = {(c, p) for c, corpus in enumerate(s.corpora)
            for p in corpus.index["patient"][corpus.index["split"] != SPLITS.index("train")]}
    assert trained and held and not trained & held


def test_independent_leads_come_first_and_windows_are_those_of_the_corpus(synth):
    s = sampler(synth)
    batch, leads, available = s.draw(0, 0, s.choose(0)[0], slice(0, 8))
    names = [[LEADS[i] for i in row] for row in leads]
    assert all(row[:8] == ["I", "II", "V1", "V2", "V3", "V4", "V5", "V6"] for row in names)
    assert batch.dtype == np.int16 and batch.shape == (8, 12, s.groups[0]["window"]) and (available == 12).all()
    limb = dict(zip(names[0], batch[0].astype(int)))
    # Einthoven's law, up to the rounding before resampling.
    assert np.abs(limb["III"] - (limb["II"] - limb["I"])).max() <= 15


@pytest.mark.parametrize("batch", [24, 32, 33, 320])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_batch_that_is_not_possible_is_refused_and_the_one_that_is_advised_is_taken(synth, batch, ranks):
    """25 patients are enough for a batch of 16. On three ranks a batch is a multiple of 48: only fewer processes help,
    or more data."""
    few = fewer_patients(open_corpus(synth / "data" / "ptbxl"), 25)
    with pytest.raises(ValueError, match=f"--batch {batch} is not possible") as error:
        Sampler([few], batch, 0, lead_groups(), ranks=ranks)
    message = str(error.value)
    assert "25 patients with 8 or more leads" in message and f"{ranks} processes" in message
    if ranks == 3:
        assert message.endswith("use more data or fewer processes")
        assert "use --batch 48" in refusal(lambda: sampler(synth, 32, ranks=3)) and sampler(synth, 48, ranks=3)
    else:
        advised = int(re.search(r"use --batch (\d+)$", message)[1])
        s = Sampler([few], advised, 0, lead_groups(), ranks=ranks)
        assert sum(g["size"] for g in s.groups) == advised == 16 and not any(g["size"] % ranks for g in s.groups)
        assert [len(places) for places in s.choose(0)] == [g["size"] for g in s.groups]


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
