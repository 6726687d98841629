"""What a frozen encoder knows about whole 12-lead ECGs: linear probes on PTB-XL, beside the same network untrained.

    python probe_ptbxl.py --encoder runs/real/encoder.pt --raw data/ptbxl --out runs/real/ptbxl
    python probe_ptbxl.py --encoder random:tiny --raw data/ptbxl --out runs/random           (untrained control alone)

The protocol is the PTB-XL benchmark's (Strodthoff et al. 2021): six label sets in which a statement that is present
counts, whatever its likelihood; folds 1-8 train, fold 9 chooses the regularisation, fold 10 is scored; macro AUROC.
Recordings without any label of a set stay in it as rows of zeros (the benchmark drops them; it moves the score by
about 0.001). Features are [CLS, mean patch] of all 12 leads over 10 s, each standardised on folds 1-8.

Writes OUT/ptbxl.json (scores, intervals, calibration, every label), OUT/predictions.npz (probabilities of fold 10) and
OUT/ptbxl.png. The untrained control costs a second pass of the encoder over the same recordings. Two cores, size tiny:
4 minutes for 2,000 records.

Shapes: R rows (recordings), L leads, T samples, D width of the encoder, C labels, G values of the regularisation,
S bootstrap samples.
"""
import argparse
import ast
import json
import os
import sys
from pathlib import Path

import joblib
import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from model import load_encoder, untrained_like
from prepare import FS, LEADS, Refused, preprocess, read_wfdb
