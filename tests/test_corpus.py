"""corpus.py: opening, reading, damage, and copies of a recording in two corpora.

    pytest -q tests/test_corpus.py
"""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import names_of, real_ptbxl, run
from corpus import find_duplicates, open_corpus, rows_to_leave_out


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
