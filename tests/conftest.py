"""What the tests share: the program's files on the path, one thread, real recordings where they are, and one ECG to draw.

    pytest -q                       (in the project's root; no network, no GPU; at most 5 minutes on two idle cores)
    ECG_SLOW=1 pytest -q            (the long tests too: Slurm, kills, mutants, comparisons over many steps)

Tests on real recordings look for them in $ECG_DATA, or else in ../shared/data, and are skipped where neither exists.
"""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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
    """An ECG without noise at any rate: a dipole seen along each lead's direction; float64 (L, T) mV. R at 0.5 + n rr_s."""
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
