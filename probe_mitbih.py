"""What a frozen encoder knows about single heartbeats: a linear probe on MIT-BIH, beside the same network untrained.

    python probe_mitbih.py --encoder runs/real/encoder.pt --raw data/mitdb --out runs/real/mitbih
    python probe_mitbih.py --encoder random:tiny --raw data/mitdb --out runs/random/mitbih    (untrained control alone)

The protocol is the inter-patient one: training on the beats of DS1, scores on those of DS2 (de Chazal et al. 2004), the
four paced records left out, five AAMI classes of which Q (7 beats) is neither trained nor scored. A whole recording goes
through encoder.embed; a beat is described by the token that holds its R (mean over leads), alone (r_token) or together
with the mean of the tokens from -300 to +400 ms (neighbourhood). Records 201 (DS1) and 202 (DS2) are the same person.

Macro over N, S, V is the number to look at: F is one record against another. Two controls need no encoder: eight RR
intervals (rr), and 0.75 s of the raw lead II (raw).

Writes OUT/mitbih.json, OUT/predictions.npz (beats of DS2) and OUT/mitbih.png.

Shapes: L leads, N patches, D width, K beats, F features, C classes, G values of the regularisation, R records,
S bootstrap samples.
"""
import json
import sys
import warnings

import numpy as np
import wfdb
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from prepare import FS, MITDB_DS1, MITDB_DS2, lead_id, preprocess, read_wfdb

# AAMI EC57 classes of the annotation symbols, as nearly all papers group them. WFDB's own comparator, bxb, counts the
# escape beats e and j as S instead, which would move 32 beats of DS1 and 213 of DS2 from N to S.
AAMI = {"N": "NLRej", "S": "AaJS", "V": "VE", "F": "F", "Q": "/fQ"}
CLASSES = ("N", "S", "V", "F")  # trained and scored
AROUND_S = (-0.3, 0.4)  # s from R: the neighbourhood, from the P wave to the end of most T waves
RAW_S = (-0.3, 0.45)  # s from R: the waveform of the raw control
LOCAL_BEATS = 10  # beats whose mean RR interval a beat is compared with


def read_beats(path):
    """Times (K,) s and AAMI classes (K,) of a record's beats; symbols that are no beats are left out."""
    annotation = wfdb.rdann(path, "atr")
    class_of = {symbol: name for name, symbols in AAMI.items() for symbol in symbols}
    beats = [(sample, class_of[s]) for sample, s in zip(annotation.sample, annotation.symbol) if s in class_of]
    samples, classes = zip(*beats) if beats else ((), ())
    return np.array(samples) / annotation.fs, np.array(classes, dtype="U1")


def token_features(encoder, signal, fs, leads, beats_s):
    """Features of K beats: r_token (K, D) and neighbourhood (K, 2D); NaN where no lead has a valid patch."""
    _, local, times_s = encoder.embed(signal, fs=fs, leads=leads)
    valid = np.isfinite(local[..., :1])                                                 # (L, N, 1)
    with np.errstate(invalid="ignore"):
        tokens = np.where(valid, local, 0).sum(axis=0) / valid.sum(axis=0)              # (N, D) mean over leads
    at = np.minimum((beats_s * FS / encoder.patch_samples).astype(int), len(times_s) - 1)
    first = np.minimum(np.searchsorted(times_s, beats_s + AROUND_S[0]), at)
    last = np.maximum(np.searchsorted(times_s, beats_s + AROUND_S[1], side="right"), at + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)                                 # no valid token: NaN is meant
        around = np.array([np.nanmean(tokens[i:j], axis=0) for i, j in zip(first, last)])
    return tokens[at], np.concatenate((tokens[at], around), axis=1)


def rr_features(beats_s):
    """Eight RR numbers per beat (K, 8), in s or as ratios: what is known without looking at the waveform."""
    rr = np.diff(beats_s)
    usual = np.median(rr)
    before, after = np.r_[usual, rr], np.r_[rr, usual]
    sums = np.cumsum(np.r_[0, before])
    k = np.arange(len(before))
    first = np.maximum(k - LOCAL_BEATS, 0)
    local = np.where(k > 0, (sums[k] - sums[first]) / np.maximum(k - first, 1), usual)  # mean of the RR before this one
    return np.stack((before, after, local, before / local, after / local, before / after, before / usual,
                     after / usual), axis=1)


def raw_features(signal, fs, leads, beats_s):
    """0.75 s of lead II (else the first lead) around R at FS, mean taken off: (K, 187) mV."""
    ids = [lead_id(name) for name in leads]
    lead = ids.index(lead_id("II")) if lead_id("II") in ids else 0
    wave = np.nan_to_num(preprocess(signal, fs, leads)[0][lead])
    at = np.rint(beats_s * FS).astype(int)[:, None] + np.arange(*(int(s * FS) for s in RAW_S))
    window = wave[at.clip(0, len(wave) - 1)]
    return window - window.mean(axis=1, keepdims=True)
