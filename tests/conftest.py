"""What the tests share: the program's files on the path, one thread, real recordings if there are any, an ECG to draw.

    pytest -q                       (in the project's root; no network, no GPU; at most 5 minutes on two idle cores)
    ECG_SLOW=1 pytest -q            (the long tests too: Slurm, kills, mutants, comparisons over many steps)

Tests on real recordings look for them in $ECG_DATA, or else in ../shared/data, and are skipped where neither exists.
"""
import os
import sys
from pathlib import Path

os.environ["ATEN_CPU_CAPABILITY"] = "avx2"       # --precision auto is then fp32 on every CPU

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402  (after the path)

torch.set_num_threads(1)         # the tests are small: more threads would only fight over the cores

RECORDS, SEED = 80, 9            # of the synthetic data set that the tests read
RR_S = 0.83                      # s, beat to beat
WAVES = (                        # centre and deviation in s from the R peak, x, y, z of the heart's dipole in mV
    (-0.18, 0.025, 0.08, 0.12, -0.02),                                        # P
    (-0.03, 0.012, -0.05, -0.12, 0.2), (0.0, 0.012, 0.8, 1.0, -0.3),          # Q, R
    (0.03, 0.012, -0.2, -0.15, -0.6), (0.25, 0.05, 0.2, 0.28, 0.15))          # S, T
DIRECTIONS = {                   # lead vectors; the limb leads hold to Einthoven's and Goldberger's relations
    "I": (1, 0, 0), "II": (0.5, 0.87, 0), "III": (-0.5, 0.87, 0), "aVR": (-0.75, -0.435, 0), "aVL": (0.75, -0.435, 0),
    "aVF": (0, 0.87, 0), "V1": (-0.4, 0, 1), "V2": (0, 0, 1.2), "V3": (0.5, 0.1, 1), "V4": (0.9, 0.3, 0.6),
    "V5": (1, 0.3, 0.2), "V6": (0.9, 0.3, -0.1)}


def draw_ecg(fs, seconds, leads=("II",), rr_s=RR_S):
    """An ECG without noise at any rate: a dipole along each lead's direction; float64 (L, T) mV. R at 0.5 + n rr_s."""
    t = np.arange(round(seconds * fs)) / fs
    dipole = np.zeros((3, len(t)))
    for centre, deviation, *xyz in WAVES:
        from_peak = (t - 0.5 - centre + rr_s / 2) % rr_s - rr_s / 2
        dipole += np.outer(xyz, np.exp(-0.5 * (from_peak / deviation) ** 2))
    dipole[1] += 0.05 * np.sin(2 * np.pi * 0.3 * t)                           # breathing: no value is held for a second
    return np.array([DIRECTIONS.get(lead, (0.6, 0.5, 0.3)) for lead in leads]) @ dipole


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs where the environment has ECG_SLOW=1")


def pytest_collection_modifyitems(items):
    if not os.environ.get("ECG_SLOW"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long test: set ECG_SLOW=1"))


@pytest.fixture(scope="session")
def synth(tmp_path_factory):
    """A folder with raw/ and data/, each with ptbxl, mitdb and nstdb, made by `prepare.py synth`."""
    folder = tmp_path_factory.mktemp("prepare")
    prepare.main(prepare.parse_args(["synth", "--raw", str(folder / "raw"), "--out", str(folder / "data"),
                                     "--records", str(RECORDS), "--seed", str(SEED), "--workers", "1"]))
    return folder


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real recordings (ptbxl, mitdb, nstdb, ...)."""
    folder = Path(os.environ.get("ECG_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real recordings in {folder}; set ECG_DATA to a folder that holds ptbxl, mitdb and nstdb")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# what the tests of several files share

import pandas as pd  # noqa: E402
import wfdb  # noqa: E402

from corpus import SPLITS, open_corpus  # noqa: E402
from ecg import FS  # noqa: E402

TWELVE = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
PNG = b"\x89PNG"                 # how such a file begins


def run(source, raw, out, *flags):
    """Do what the command line does, in this process. Returns the corpus, None for synth."""
    prepare.main(prepare.parse_args([source, "--raw", str(raw), "--out", str(out), "--workers", "1", *flags]))
    return None if source == "synth" else open_corpus(out)


def names_of(corpus, split=None):
    rows = slice(None) if split is None else corpus.index["split"] == SPLITS.index(split)
    return [name.decode() for name in corpus.records[rows]]


def patient_of(corpus, i):
    return corpus.patients[corpus.index["patient"][i]].decode()


def rows_of(corpus):
    """{record: place in the index}"""
    return {name: i for i, name in enumerate(names_of(corpus))}


def files_of(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write(raw, name, adc, leads=("II", "V1"), fs=FS, units="mV", gain=200, baseline=1024):
    """A record by wfdb's own writer, from integers (T, L) that stand for (adc - baseline) / gain."""
    path, n = raw / name, len(leads)
    path.parent.mkdir(parents=True, exist_ok=True)
    units = [units] * n if isinstance(units, str) else list(units)
    wfdb.wrsamp(path.name, fs, units, [f"s{i}" for i in range(n)], d_signal=np.asarray(adc, np.int64), fmt=["16"] * n,
                adc_gain=[float(gain)] * n, baseline=[baseline] * n, write_dir=str(path.parent))
    header = path.with_suffix(".hea")
    for i, lead in enumerate(leads):                               # wfdb would refuse two leads of one name
        header.write_text(header.read_text().replace(f" s{i}\n", f" {lead}\n"))


def edit_header(raw, name, old, new):
    header = raw / f"{name}.hea"
    assert old in header.read_text()
    header.write_text(header.read_text().replace(old, new, 1))


def noise(seed, n=2500, channels=2):
    return np.random.default_rng(seed).integers(224, 1824, (n, channels))


def link(source, target, names):
    target.mkdir()
    for name in names:
        os.symlink(source / name, target / name)
    return target


def real_ptbxl(shared_data, folder, places):
    raw = link(shared_data / "ptbxl", folder, ("records100", "records500", "scp_statements.csv"))
    table = pd.read_csv(shared_data / "ptbxl" / "ptbxl_database.csv", index_col="ecg_id").iloc[places]
    table.to_csv(raw / "ptbxl_database.csv")
    return raw, table


@pytest.fixture(scope="session")
def ptbxl_table(synth):
    return pd.read_csv(synth / "raw" / "ptbxl" / "ptbxl_database.csv", index_col="ecg_id")


@pytest.fixture(scope="session")
def small_raw(tmp_path_factory):
    raw = tmp_path_factory.mktemp("small") / "raw"
    for seed in range(3):
        write(raw, f"r{seed}", noise(seed))
    return raw


@pytest.fixture(scope="session")
def small_corpus(small_raw):
    return run("wfdb", small_raw, small_raw.parent / "out").dir
