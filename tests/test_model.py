"""model.py: the encoder against plain code, what it must not depend on, gradients, export, its files, embed() on any
recording, on many, and on nonsense, and the command line."""
import contextlib
import json
import math
import os
import pickle
import re
import shutil
import signal as os_signal
import subprocess
import sys
import time
import tracemalloc
import types
import warnings
import weakref
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
import wfdb
from torch import nn

import ecg
import evaluate
import model
from conftest import PNG, ROOT, TWELVE, draw_ecg, write
from ecg import FS, LEADS, Recording, RecordingFeatures, lead_id, list_recordings, read_any, read_wfdb
from model import (BASELINE_PATCHES, COMPRESS_MV, FORMAT, PATCH_S, REGISTERS, ROPE_PERIODS_S, SIZES, Attention, Encoder,
                   attend, build_encoder, load_encoder, precision_of, rope_table, rotate, save_encoder, scaled_linear,
                   untrained_like)
from test_prepare import write_edf

P = round(PATCH_S * FS)
WIDTH = 16                       # of small_encoder


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_encoder():
    return Encoder(width=WIDTH, depth=1, heads=1, layer_scale=1.0, window_patches={8: 15, 1: 40}).eval()


def lively(width=32, depth=2, heads=2):
    """A small encoder with all parameters far from their start, where biases and the mask token are 0, scales alike."""
    encoder = Encoder(width=width, depth=depth, heads=heads, layer_scale=0.8)
    for i, p in enumerate(encoder.parameters()):
        p.data.add_(0.1 * randn(*p.shape, seed=i))
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder():
    return lively()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def ids(*names):
    return torch.tensor([lead_id(name) for name in names])


def with_gaps(signal, *places):
    """A copy of signal (B, L, T) with NaN in patches (b, l, n); n may be a slice or a list."""
    patches = signal.clone().unflatten(-1, (-1, P))
    for b, l, n in places:
        patches[b, l, n, 7] = float("nan")                              # one sample is enough
    return patches.flatten(2)


def assert_close(a, b, atol=2e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=atol, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# the same in plain code, float64

def plain_rotate(vector, time_s):
    """Turn the pairs (2i, 2i + 1) by 2 pi time / period_i; periods geometric between the two of ROPE_PERIODS_S."""
    pairs = len(vector) // 2
    turned = vector.clone()
    for i in range(pairs):
        period = ROPE_PERIODS_S[0] * (ROPE_PERIODS_S[1] / ROPE_PERIODS_S[0]) ** (i / (pairs - 1))
        c, s = math.cos(2 * math.pi * time_s / period), math.sin(2 * math.pi * time_s / period)
        x, y = vector[2 * i], vector[2 * i + 1]
        turned[2 * i], turned[2 * i + 1] = c * x - s * y, s * x + c * y
    return turned


def plain_attention(p, x, times_s, heads):
    """Softmax attention of tokens x (M, D), head by head and row by row; times_s: None for a token without a time."""
    E = x.shape[1] // heads
    q, k, v = (x @ p["qkv.weight"].T).split(x.shape[1], dim=1)
    out = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h * E, (h + 1) * E)
        turned = [[row if t is None else plain_rotate(row, t) for row, t in zip(m[:, part], times_s)] for m in (q, k)]
        for i, query in enumerate(turned[0]):
            weights = torch.stack([torch.exp(query @ key / math.sqrt(E)) for key in turned[1]])
            out[i, part] = sum(w * value for w, value in zip(weights / weights.sum(), v[:, part]))
    return out @ p["proj.weight"].T + p["proj.bias"]


def plain_norm(x, weight, bias):
    return (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, correction=0) + 1e-5) * weight + bias


def below(p, prefix):
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def plain_front_end(lead):
    """{n: patch (P,)} of one lead (T,) without patches that miss a sample: asinh of what is above the baseline, a line
    through means over BASELINE_PATCHES (where all of those are missing, the mean of the lead)."""
    patches = {n: patch for n, patch in enumerate(lead.view(-1, P)) if patch.isfinite().all()}
    if not patches:
        return {}
    whole = torch.stack(list(patches.values())).mean()
    N, half = len(lead) // P, BASELINE_PATCHES // 2
    near = [[patches[m].mean() for m in range(n - half, n + half + 1) if m in patches] for n in range(N)]
    baseline = [torch.stack(means).mean() if means else whole for means in near]
    out = {}
    for n, patch in patches.items():
        out[n] = torch.empty_like(patch)
        for i in range(P):
            place = min(max(n + (i + 0.5) / P - 0.5, 0), N - 1)         # in patches, from the centre of the first
            left, right = baseline[math.floor(place)], baseline[math.ceil(place)]
            out[n][i] = torch.asinh((patch[i] - left - (place % 1) * (right - left)) / COMPRESS_MV)
    return out


def plain_encoder(weights, heads, signal, leads):
    """Of one recording, signal (L, T) mV and leads (L,): CLS (D,), registers (R, D), patches (L, N, D), and the
    global feature (3D,). A patch that misses a sample has no token; its feature is NaN."""
    p = {name: value.double() for name, value in weights.items()}
    tokens, times_s, places = [p["cls_token"][0, 0], *p["register_tokens"][0]], [None] * (1 + REGISTERS), []
    for row, (lead, i) in enumerate(zip(signal.double(), leads)):
        for n, patch in plain_front_end(lead).items():
            tokens.append(p["patch_embedding.weight"] @ patch + p["patch_embedding.bias"]
                          + p["lead_embedding.weight"][i])
            times_s.append((n + 0.5) * P / FS)
            places.append((row, n))
    x = torch.stack(tokens)
    for d in range(sum(name.endswith(".scale1") for name in p)):
        b = below(p, f"blocks.{d}.")
        h = plain_norm(x, b["norm1.weight"], b["norm1.bias"])
        x = x + b["scale1"] * plain_attention(below(b, "attention."), h, times_s, heads)
        h = plain_norm(x, b["norm2.weight"], b["norm2.bias"]) @ b["mlp.0.weight"].T + b["mlp.0.bias"]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + b["scale2"] * (h @ b["mlp.2.weight"].T + b["mlp.2.bias"])
    x = plain_norm(x, p["norm.weight"], p["norm.bias"]).float()
    patches = torch.full((*signal.view(len(signal), -1, P).shape[:2], x.shape[1]), float("nan"))
    for (row, n), feature in zip(places, x[1 + REGISTERS:]):
        patches[row, n] = feature
    tokens = x[1 + REGISTERS:].double() if places else torch.zeros(1, x.shape[1]).double()
    spread = (((tokens - tokens.mean(0)) ** 2).mean(0) + 1e-6) ** 0.5
    return x[0], x[1:1 + REGISTERS], patches, torch.cat((x[0], tokens.mean(0).float(), spread.float()))


def assert_equals_plain_code(encoder, signal, leads):
    out = encoder(signal, leads)
    for b in range(len(signal)):
        plain = plain_encoder(encoder.state_dict(), encoder.config["heads"], signal[b], leads[b])
        for found, expected in zip((out.cls, out.registers, out.patches, out.global_feature()), plain):
            assert_close(found[b], expected)
    return out


def test_encoder_equals_plain_code(encoder):
    signal, leads = 0.3 * randn(2, 3, 9 * P), torch.stack([ids("I", "V2", "ECG"), ids("V5", "aVR", "II")])
    signal += torch.linspace(0, 2, 9 * P) ** 2                          # wander
    out = assert_equals_plain_code(encoder, signal, leads)
    assert out.patches.std(dim=(0, 1, 2)).min() > 0.1                   # they differ: nothing is equal for being zero
    assert out.valid is None


def test_encoder_with_missing_samples_equals_plain_code(encoder):
    """Gaps of their own in each recording: one patch, a patch with no other near, a dead lead, all, nothing."""
    signal, leads = 0.3 * randn(5, 3, 9 * P), torch.stack([ids("I", "V2", "ECG")] * 5)
    signal += torch.linspace(0, 2, 9 * P) ** 2
    signal = with_gaps(signal, (0, 0, 2), (0, 2, 8), (1, 1, slice(0, 8)), (2, 0, slice(None)),
                       (3, slice(None), slice(None)))
    signal[0, 1, 300] = float("inf")                                    # as bad as NaN
    out = assert_equals_plain_code(encoder, signal, leads)
    assert out.valid.sum((1, 2)).tolist() == [24, 19, 18, 0, 27]
    assert torch.equal(out.patches.isnan().any(-1), ~out.valid)
    assert torch.equal(out.patches.isnan().all(-1), ~out.valid)


def test_attention_equals_plain_code():
    attention = Attention(24, 3)
    for i, p in enumerate(attention.parameters()):
        p.data.copy_(0.4 * randn(*p.shape, seed=i))
    x, times_s = randn(1, 7, 24), torch.tensor([0.1, 0.3, 5.0, 0.3, 31.4, 2.0, 9.9])
    scale = randn(24, seed=9)
    weights = {k: v.double() for k, v in attention.state_dict().items()}
    expected = plain_attention(weights, x[0].double(), times_s.tolist(), 3)
    for seen in (None, torch.ones(1, 7, dtype=torch.bool)):
        assert_close(attention(x[0], scale, [(1, 7)], [rope_table(times_s, 8)], [seen]), scale * expected.float(),
                     atol=1e-4)                                         # fp32 angles of 500 radians


# ---------------------------------------------------------------------------------------------------------------------
# time

def test_rope_scores_depend_on_the_time_difference_only():
    q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16, seed=1)

    def score(t_q, t_k):
        turned = [rotate(x, rope_table(torch.tensor([t]), 16)) for x, t in ((q, t_q), (k, t_k))]
        return (turned[0] * turned[1]).sum()
    for shift in (0.2, 7.3, 100.0):
        assert_close(score(1.1 + shift, 0.3 + shift), score(1.1, 0.3), atol=1e-3)
    assert abs(score(1.1, 0.3) - score(1.3, 0.3)) > 0.1
    assert abs(score(1.1, 0.3) - score(0.3, 1.1)) > 0.1                 # before is not after


def test_rope_periods():
    shortest, longest = ROPE_PERIODS_S
    table = rope_table(torch.tensor([0.0, shortest, longest, longest / 2]), 8)
    assert table.shape == (4, 4, 2)
    assert torch.equal(table[0], torch.tensor([1.0, 0.0]).expand(4, 2))  # at 0 s nothing turns
    assert_close(table[1, 0, 0], torch.tensor(1.0), atol=1e-4)
    assert_close(table[2, -1, 0], torch.tensor(1.0), atol=1e-4)
    assert_close(table[3, -1, 0], torch.tensor(-1.0), atol=1e-4)


def test_rope_tables_are_fp32():
    times_s = torch.arange(64) * 0.2 + 0.1
    assert rope_table(times_s, 16).dtype == torch.float32
    x = randn(1, 64, 2, 2, 16).bfloat16()
    turned = rotate(x, rope_table(times_s, 16))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), rope_table(times_s, 16)).bfloat16())


def test_both_forms_of_the_rotation_agree(monkeypatch):
    """The complex product of eager mode, and the real one that compilers and exporters get."""
    x, rope = randn(2, 16, 2, 3, 8), rope_table(torch.arange(16) * 0.2, 8)
    expected = rotate(x, rope)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(rotate(x, rope), expected, atol=1e-6)
    assert torch.equal(rotate(x.bfloat16(), rope), rotate(x.bfloat16().float(), rope).bfloat16())


# ---------------------------------------------------------------------------------------------------------------------
# what features depend on, and what not

def test_shapes(encoder):
    out = encoder(randn(2, 3, 5 * P), ids("I", "II", "V1").expand(2, -1))
    assert out.cls.shape == (2, 32) and out.registers.shape == (2, REGISTERS, 32) and out.patches.shape == (2, 3, 5, 32)
    assert out.global_feature().shape == (2, 96) and out.pooled().shape == (2, 64)
    for signal, leads in ((randn(1, 1, P + 1), ids("I")[None]), (randn(1, 2, P), ids("I")[None]),
                          (randn(1, 1, 0), ids("I")[None]), (randn(1, P), ids("I"))):
        with pytest.raises(ValueError, match="multiple of 50.*embed"):
            encoder(signal, leads)


def test_lead_order_does_not_matter(encoder):
    signal, leads = 0.3 * randn(2, 5, 4 * P), ids("I", "V1", "V3", "Z", "ECG").expand(2, -1)
    order = torch.tensor([3, 0, 4, 1, 2])
    out, permuted = encoder(signal, leads), encoder(signal[:, order], leads[:, order])
    assert_close(permuted.cls, out.cls)
    assert_close(permuted.patches, out.patches[:, order])


def test_lead_names_matter(encoder):
    signal = 0.3 * randn(1, 1, 4 * P)
    assert (encoder(signal, ids("II")[None]).cls - encoder(signal, ids("unknown")[None]).cls).abs().max() > 0.01


def test_dc_offset_does_not_matter(encoder):
    signal, leads = 0.3 * randn(2, 3, 4 * P), ids("I", "V1", "V3").expand(2, -1)
    offset = torch.tensor([5.0, -3.0, 0.7])[:, None]
    for a, b in zip(encoder(signal + offset, leads)[:3], encoder(signal, leads)[:3]):
        assert_close(a, b, atol=1e-4)


def test_amplitude_matters(encoder):
    signal, leads = 0.3 * randn(1, 1, 4 * P), ids("I")[None]
    assert (encoder(2 * signal, leads).cls - encoder(signal, leads).cls).abs().max() > 0.05


def test_masked_patches_are_hidden_altogether(encoder):
    """Not even their mean may show: it would reach the other patches through the baseline."""
    signal, leads = 0.3 * randn(2, 3, 6 * P), ids("I", "V1", "V3").expand(2, -1)
    mask = randn(2, 3, 6, seed=1) > 0.3
    mask[0, 1] = True                                                   # a whole lead
    other = torch.where(mask.repeat_interleave(P, dim=2), 2 + randn(2, 3, 6 * P, seed=2), signal)
    assert 0 < mask.float().mean() < 1
    for a, b in zip(encoder(signal, leads, mask=mask)[:3], encoder(other, leads, mask=mask)[:3]):
        assert_close(a, b)


def test_mask_token_stands_in_for_masked_patches(encoder):
    signal, leads, mask = 0.3 * randn(1, 2, 4 * P), ids("I", "V1")[None], torch.zeros(1, 2, 4, dtype=torch.bool)
    clear = encoder(signal, leads)
    for a, b in zip(encoder(signal, leads, mask=mask)[:3], clear[:3]):
        assert_close(a, b)
    mask[0, 1, 2] = True
    tokens, masked = encoder.tokens(signal), encoder.tokens(signal, mask)
    assert torch.equal(masked[0, 1, 2], encoder.mask_token)
    assert_close(masked[0, 0], tokens[0, 0])                            # no masked patch in that lead
    assert (encoder(signal, leads, mask=mask).cls - clear.cls).abs().max() > 0.01


def test_missing_leads_are_as_if_not_given(encoder):
    """Each recording of a batch has leads of its own."""
    signal, leads = 0.3 * randn(2, 4, 3 * P), ids("I", "V1", "V3", "II").expand(2, -1)
    present = torch.tensor([[True, False, True, False], [False, True, True, True]])
    out = encoder(torch.where(present[..., None], signal, float("nan")), leads)
    for b, there in enumerate(present):
        subset = encoder(signal[b, there][None], leads[b, there][None])
        assert_close(out.cls[b], subset.cls[0])
        assert_close(out.registers[b], subset.registers[0])
        assert_close(out.patches[b, there], subset.patches[0])
        assert_close(out.global_feature()[b], subset.global_feature()[0])
        assert out.patches[b, ~there].isnan().all()


def test_missing_patches_have_no_token(encoder):
    """Patches of zero mean have a zero baseline, so that only the tokens that there are can matter."""
    signal, leads = 0.3 * randn(2, 2, 6 * P), ids("I", "V1").expand(2, -1)
    signal -= signal.unflatten(-1, (6, P)).mean(-1).repeat_interleave(P, dim=-1)
    out = encoder(with_gaps(signal, (slice(None), slice(None), slice(4, 6))), leads)
    short = encoder(signal[..., :4 * P], leads)
    assert_close(out.cls, short.cls)
    assert_close(out.patches[:, :, :4], short.patches)
    assert_close(out.global_feature(), short.global_feature())
    assert out.patches[:, :, 4:].isnan().all()
    late = encoder(with_gaps(signal, (slice(None), slice(None), slice(0, 2))), leads)
    assert (late.cls - encoder(signal[..., 2 * P:], leads).cls).abs().max() > 1e-3     # later in time is not the same


def test_missing_patches_are_hidden_altogether(encoder):
    """What else is in a patch that misses a sample has no influence, with a mask or without."""
    signal, leads = 0.3 * randn(2, 3, 6 * P), ids("I", "V1", "V3").expand(2, -1)
    gap = (randn(2, 3, 6, seed=1) > 0).repeat_interleave(P, dim=2)
    other = torch.where(gap, 2 + randn(2, 3, 6 * P, seed=2), signal)
    signal[..., ::P], other[..., ::P] = (torch.where(gap, float("nan"), x)[..., ::P] for x in (signal, other))
    mask = randn(2, 3, 6, seed=3) > 0.5
    changed = torch.where(mask.repeat_interleave(P, dim=2) & ~gap, 2 + randn(2, 3, 6 * P, seed=4), other)
    assert (mask & gap[..., ::P]).any() and (mask & ~gap[..., ::P]).any()
    for pair in ((encoder(signal, leads), encoder(other, leads)),
                 (encoder(signal, leads, mask), encoder(changed, leads, mask))):
        for a, b in zip(*pair):
            assert_close(a, b)


@pytest.mark.parametrize("one_by_one_width", [0, 256])
def test_several_batches_at_once_are_as_one_by_one(encoder, monkeypatch, one_by_one_width):
    monkeypatch.setattr(model, "ONE_BY_ONE_WIDTH", one_by_one_width)
    views = [(0.3 * randn(2, 3, 5 * P), ids("I", "V1", "V3").expand(2, -1), randn(2, 3, 5) > 0.5),
             (0.3 * randn(3, 1, 9 * P), ids("II").expand(3, -1), None)]
    views[1][0][1, 0, 77] = float("nan")
    for out, view in zip(encoder.encode(views, gaps=True), views):
        for a, b in zip(out, encoder(*view)):
            assert (a is None and b is None) or torch.allclose(a.float(), b.float(), atol=2e-6, equal_nan=True)
    views[1][0][1, 0, 77] = 0.0
    for out, view in zip(encoder.encode(views), views):                 # as train.py calls it
        assert out.valid is None
        assert_close(out.global_feature(), encoder(*view).global_feature())


# ---------------------------------------------------------------------------------------------------------------------
# precision

@pytest.mark.parametrize("kernel", ["batched products", "flash"])
@pytest.mark.parametrize("hidden", [False, True])
def test_attention_in_bf16(monkeypatch, kernel, hidden):
    """Both kernels against float64, values and gradients, to what bf16 can hold."""
    if kernel == "flash":
        monkeypatch.setattr(model, "MAX_BATCHED_TOKENS", 0)
    q, k, v, weight = (randn(3, 2, 17, 8, seed=seed).bfloat16() for seed in range(4))
    seen = torch.rand(3, 17, generator=torch.Generator().manual_seed(5)) > 0.4 if hidden else None
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    low = [t.clone().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        scores = exact[0] @ exact[1].mT / math.sqrt(8)
        if hidden:
            scores = scores.masked_fill(~seen[:, None, None], -math.inf)
        outs = scores.softmax(-1) @ exact[2], attend(*low, seen)
        grads = [torch.autograd.grad((out * weight).sum(), x) for out, x in zip(outs, (exact, low))]
    assert outs[1].dtype == torch.bfloat16
    for expected, found in zip((outs[0], *grads[0]), (outs[1], *grads[1])):
        assert (found.double() - expected).norm() < 0.02 * expected.norm()


def test_attention_chooses_its_kernel(monkeypatch):
    """Batched products for bf16 on a CPU up to MAX_BATCHED_TOKENS, otherwise torch's kernel."""
    called = []
    monkeypatch.setattr(torch, "baddbmm", lambda *a, real=torch.baddbmm, **k: called.append("batched") or real(*a, **k))
    x = randn(1, 1, 6, 4)
    for t, limit, batched in ((x, 6, False), (x.bfloat16(), 6, True), (x.bfloat16(), 5, False)):
        called.clear()
        monkeypatch.setattr(model, "MAX_BATCHED_TOKENS", limit)
        attend(t, t, t)
        assert called == ["batched"] * batched


@pytest.mark.parametrize("largest", [0, 30])
def test_layer_scale_is_part_of_the_product(monkeypatch, largest):
    monkeypatch.setattr(model, "MAX_SCALED_WEIGHT", largest)
    layer, scale, x = nn.Linear(6, 5), randn(5), randn(3, 7, 6)
    torch.testing.assert_close(scaled_linear(x, layer, scale), scale * layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capability, native, expected", [("AVX512", True, "bf16"), ("AVX512", False, "fp32"),
                                                          ("AVX2", True, "fp32")])
def test_auto_is_bf16_where_the_hardware_has_it(monkeypatch, capability, native, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert precision_of("cpu") == expected and precision_of("cuda:1") == "bf16"
    assert precision_of("cpu", "bf16") == "bf16" and precision_of("cuda", "fp32") == "fp32"


def test_embed_in_bf16():
    """bf16 changes a feature by less than 2 % of its length; gaps and sizes stay; `precision` decides."""
    encoder, signal = build_encoder("tiny").eval(), draw_ecg(250, 9.6, ("I", "II", "V1"))
    signal[:, 300:310] = np.nan
    exact = encoder.embed(signal, fs=250, leads=["I", "II", "V1"])
    encoder.precision = "bf16"
    low = encoder.embed(signal, fs=250, leads=["I", "II", "V1"])
    assert untrained_like(encoder).precision == "bf16"
    for a, b in ((exact.global_feature, low.global_feature), (exact.local_features, low.local_features)):
        assert (np.isnan(a) == np.isnan(b)).all() and b.dtype == np.float32
        assert 0 < np.linalg.norm(np.nan_to_num(a - b)) < 0.02 * np.linalg.norm(np.nan_to_num(a))


# ---------------------------------------------------------------------------------------------------------------------
# gradients, export, compilers

GAPPY = with_gaps(0.3 * randn(4, 3, 9 * P), (0, 1, [2, 5]), (1, 0, slice(None)), (2, slice(None), slice(None)))
GAPPY_LEADS = torch.stack([ids("I", "V2", "ECG"), ids("V5", "aVR", "II"), ids("I", "II", "III"), ids("X", "Y", "Z")])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_finite_whatever_is_missing(monkeypatch, masked, recompute):
    """A gap, a dead lead, a recording of nothing but NaN, and a whole one, in one batch."""
    monkeypatch.setattr(model.Block, "recompute", recompute)
    encoder, mask = lively().train(), torch.zeros(4, 3, 9, dtype=torch.bool)
    mask[:, :, 1], mask[0, 1] = True, True
    with torch.enable_grad():
        out = encoder(GAPPY, GAPPY_LEADS, mask if masked else None)
        assert out.global_feature().isfinite().all() and out.registers.isfinite().all()
        (out.global_feature() * randn(*out.global_feature().shape)).sum().backward()
    for name, p in encoder.named_parameters():
        if name == "mask_token" and not masked:
            assert p.grad is None
        else:
            assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_gradients_of_a_batch_are_the_sum_of_those_of_its_recordings():
    def gradients(*rows):
        encoder = lively()
        with torch.enable_grad():
            for b in rows:
                encoder(GAPPY[b], GAPPY_LEADS[b]).global_feature().square().sum().backward()
        return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    together, alone = gradients(slice(None)), gradients(*([b] for b in range(4)))
    for name, gradient in together.items():
        assert_close(gradient, alone[name], atol=1e-4 * max(1, float(gradient.abs().max())))


def test_missing_samples_get_no_gradient():
    signal = GAPPY.clone().requires_grad_()
    with torch.enable_grad():
        lively()(signal, GAPPY_LEADS).global_feature().sum().backward()
    missing = ~GAPPY.unflatten(-1, (-1, P)).isfinite().all(-1).repeat_interleave(P, dim=-1)
    assert signal.grad.isfinite().all() and (signal.grad[missing] == 0).all() and signal.grad[3].abs().sum() > 0


# Of fp32, in features of up to 4: the real form of the rotation is not bit for bit the complex one.
ROUNDING = 5e-6


def exported_like(encoder, program, signal, leads, atol):
    for found, expected in zip(program(signal, leads), encoder(signal, leads)):
        if expected is None:                                            # eager: nothing is missing
            assert np.asarray(found).all()
        else:
            assert_close(found, expected, atol=atol)


def test_export_is_exact(encoder):
    """Traced with a whole signal, and then given gaps."""
    whole = 0.3 * randn(4, 3, 9 * P, seed=5)
    program = torch.export.export(encoder, (whole, GAPPY_LEADS)).module()
    for signal in (whole, GAPPY):
        exported_like(encoder, program, signal, GAPPY_LEADS, atol=ROUNDING)


def dynamic_shapes():
    batch, leads, patches = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "leads", "patches"))
    return {"signal": {0: batch, 1: leads, 2: P * patches}, "leads": {0: batch, 1: leads}}


MORE = with_gaps(0.3 * randn(7, 2, 14 * P), (0, 1, 3), (6, 0, slice(None)))
MORE_LEADS = torch.arange(14).view(7, 2)


@pytest.mark.slow
def test_export_of_any_shape(encoder):
    program = torch.export.export(encoder, (GAPPY, GAPPY_LEADS), dynamic_shapes=dynamic_shapes()).module()
    exported_like(encoder, program, GAPPY, GAPPY_LEADS, atol=ROUNDING)
    exported_like(encoder, program, MORE, MORE_LEADS, atol=ROUNDING)
    mask = randn(4, 3, 9) > 0
    program = torch.export.export(encoder, (GAPPY, GAPPY_LEADS, mask)).module()
    for found, expected in zip(program(GAPPY, GAPPY_LEADS, mask), encoder(GAPPY, GAPPY_LEADS, mask)):
        assert_close(found, expected, atol=ROUNDING)


@pytest.mark.slow
def test_onnx(encoder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.onnx.export(encoder, (GAPPY, GAPPY_LEADS), tmp_path / "encoder.onnx", dynamo=True, verbose=False,
                      dynamic_shapes=dynamic_shapes())
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")

    def program(signal, leads):
        return session.run(None, {"signal": signal.numpy(), "leads": leads.numpy()})
    for signal, leads in ((GAPPY, GAPPY_LEADS), (MORE, MORE_LEADS), (-30 * MORE, MORE_LEADS)):
        exported_like(encoder, program, signal, leads, atol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_give_the_same(encoder):
    compiled = lively()
    for block in compiled.blocks:
        block.compile(dynamic=True, backend="aot_eager")                # no C compiler needed
    for signal, leads in ((GAPPY, GAPPY_LEADS), (GAPPY[3:], GAPPY_LEADS[3:]), (MORE, MORE_LEADS)):
        for found, expected in zip(compiled(signal, leads), encoder(signal, leads)):
            assert (found is None and expected is None) or torch.allclose(found, expected, atol=1e-5, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# initial weights and files

def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_encoder("tiny", seed=3).state_dict()
    torch.manual_seed(2)
    torch.use_deterministic_algorithms(True)                            # fills what is not initialised with NaN
    try:
        second = build_encoder("tiny", seed=3).state_dict()
    finally:
        torch.use_deterministic_algorithms(False)
    other = build_encoder("tiny", seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["blocks.0.attention.qkv.weight"], other["blocks.0.attention.qkv.weight"])


def test_initial_statistics():
    encoder = build_encoder("tiny")
    signal = torch.tensor(draw_ecg(FS, 10, TWELVE)[None]).float()
    assert 0.3 < encoder.tokens(signal).std() < 3                       # about 1: lead vectors (0.5) count next to it
    for linear in (encoder.patch_embedding, encoder.blocks[0].attention.qkv, encoder.blocks[0].mlp[2]):
        std = linear.in_features ** -0.5
        assert linear.weight.std().item() == pytest.approx(0.88 * std, rel=0.03)
        assert linear.weight.abs().max() <= 2 * std                     # cut at 2 deviations
    assert encoder.lead_embedding.weight.shape == (len(LEADS), encoder.width)
    assert encoder.lead_embedding.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert encoder.blocks[0].scale1.unique().tolist() == [SIZES["tiny"]["layer_scale"]]


def weights_as_ever(encoder, seed):
    """What the first weights have been since the first release, drawn into the encoder."""
    generator = torch.Generator().manual_seed(seed)
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            std = module.in_features ** -0.5
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for tokens, std in ((encoder.lead_embedding.weight, 0.5), (encoder.cls_token, 0.02),
                        (encoder.register_tokens, 0.02)):
        nn.init.normal_(tokens, std=std, generator=generator)
    nn.init.zeros_(encoder.mask_token)
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        if isinstance(module, model.Block):
            nn.init.constant_(module.scale1, encoder.config["layer_scale"])
            nn.init.constant_(module.scale2, encoder.config["layer_scale"])
    return encoder


@pytest.mark.parametrize("size, seed", [("tiny", 0), ("tiny", 3), pytest.param("small", 0, marks=pytest.mark.slow)])
def test_first_weights_are_those_of_before(size, seed):
    found, expected = build_encoder(size, seed), weights_as_ever(lively_of(size), seed)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def lively_of(size):
    encoder = build_encoder(size)
    for p in encoder.parameters():
        p.data.fill_(7.0)
    return encoder


def test_every_parameter_has_one_first_value():
    encoder = build_encoder("tiny")
    pairs = list(encoder.first_weights())
    assert sorted(id(p) for p, _ in pairs) == sorted(id(p) for p in encoder.parameters())
    assert all(value.shape == p.shape and value.device.type == "cpu" for p, value in pairs)


def test_an_encoder_built_without_memory_gets_the_same_weights():
    with torch.device("meta"):
        encoder = build_encoder("tiny", seed=3)
    assert all(p.is_meta for p in encoder.parameters())
    encoder.to_empty(device="cpu").init_weights()
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), build_encoder("tiny", seed=3).parameters()))


def test_untrained_like_has_the_first_weights():
    encoder = build_encoder("tiny", seed=5)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    for p in encoder.parameters():
        p.data.add_(1.0)
    untrained = untrained_like(encoder)
    assert not untrained.training and untrained.config == encoder.config
    assert all(torch.equal(value, before[name]) for name, value in untrained.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# files

@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    save_encoder(encoder, path, step=7)
    return path


def test_file_gives_the_same_encoder(encoder, saved):
    loaded = load_encoder(saved)
    assert not loaded.training and loaded.config == encoder.config
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in loaded.state_dict().items())
    signal, leads = randn(1, 2, 4 * P), ids("I", "V1")[None]
    assert all(torch.equal(a, b) for a, b in zip(loaded(signal, leads)[:3], encoder(signal, leads)[:3]))
    assert all(p.requires_grad for p in loaded.parameters())


def test_file_describes_itself(saved):
    content = torch.load(saved, weights_only=True)
    assert content["format"] == FORMAT and content["about"] == {"step": 7}
    stated = dict(fs_hz=250, units="mV", leads=list(LEADS), baseline_patches=BASELINE_PATCHES, compress_mv=COMPRESS_MV)
    assert content["preprocessing"] == stated and content["config"]["patch_samples"] == P


def test_other_weights_can_be_saved(encoder, tmp_path):
    shifted = {name: value + 1 for name, value in encoder.state_dict().items()}
    save_encoder(encoder, tmp_path / "encoder.pt", shifted)
    assert torch.equal(load_encoder(tmp_path / "encoder.pt").cls_token, encoder.cls_token + 1)


def test_files_of_before_are_still_read(tmp_path):
    """An encoder.pt as it was written before there was first_weights(), key by key; its features by plain code."""
    D, block = 32, {"scale1": (32,), "scale2": (32,), "norm1.weight": (32,), "norm1.bias": (32,),
                    "attention.qkv.weight": (96, 32), "attention.proj.weight": (32, 32), "attention.proj.bias": (32,),
                    "norm2.weight": (32,), "norm2.bias": (32,), "mlp.0.weight": (128, 32), "mlp.0.bias": (128,),
                    "mlp.2.weight": (32, 128), "mlp.2.bias": (32,)}
    shapes = {"cls_token": (1, 1, D), "register_tokens": (1, 4, D), "mask_token": (D,),
              "patch_embedding.weight": (D, 50), "patch_embedding.bias": (D,), "lead_embedding.weight": (21, D),
              **{f"blocks.0.{name}": shape for name, shape in block.items()}, "norm.weight": (D,), "norm.bias": (D,)}
    weights = {name: 0.3 * randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    torch.save({"format": "ecg-dino encoder 3",
                "config": {"width": 32, "depth": 1, "heads": 2, "layer_scale": 1.0, "init_seed": 0,
                           "window_patches": {8: 15, 1: 40}, "patch_samples": 50, "registers": 4},
                "state_dict": weights,
                "preprocessing": {"fs_hz": 250, "units": "mV", "leads": [
                    "unknown", "I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6", "V7", "V8",
                    "V9", "V3R", "V4R", "X", "Y", "Z"], "baseline_patches": 7, "compress_mv": 0.1},
                "about": {"command": "train.py", "commit": "7774147", "step": 150}}, tmp_path / "encoder.pt")
    encoder = load_encoder(tmp_path / "encoder.pt")
    signal = torch.tensor(draw_ecg(250, 2, ("II", "V1"))).float()
    out = encoder.embed(signal, fs=250, leads=("II", "V1"))
    cls, _, patches, feature = plain_encoder(weights, 2, signal, ids("II", "V1"))
    assert_close(out.local_features, patches)
    assert_close(out.cls, cls)
    assert_close(out.global_feature, feature)


def test_avr_is_shown_upside_down_where_it_is_named():
    """Only in new encoders; what has no such entry in its file (above) sees aVR as it is. Without the name it is as any
    other lead, and a gap stays a gap."""
    new = build_encoder("tiny").eval()
    plain = Encoder(**new.config | dict(turned=[]))
    plain.load_state_dict(new.state_dict())
    signal, leads, avr = randn(2, 3, 4 * P), ids("I", "aVR", "V1").expand(2, 3), [[1.0], [-1.0], [1.0]]
    signal[1, 1, :P] = math.nan
    for network, expected in ((new, signal * torch.tensor(avr)), (plain, signal)):
        for found, same in zip(network(signal, leads), plain(expected, leads)):
            assert torch.equal(found.nan_to_num(9.0), same.nan_to_num(9.0))
    nameless = torch.zeros_like(leads)
    assert torch.equal(new(signal, nameless).cls, plain(signal, nameless).cls)
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[:, 1] = True
    clean, masked = new.encode([(signal[:1], leads[:1], None), (signal[:1], leads[:1], masks[:1])])
    assert torch.equal(clean.cls, plain(signal[:1] * torch.tensor(avr), leads[:1]).cls)
    assert torch.equal(masked.cls, plain(signal[:1], leads[:1], masks[:1]).cls)          # of aVR nothing is seen


def test_loading_makes_no_weights_to_throw_away(saved, monkeypatch):
    def fail(*args, **more):
        raise AssertionError("weights were drawn")
    state, shape = torch.get_rng_state(), load_encoder(saved).cls_token.shape
    monkeypatch.setattr(Encoder, "first_weights", fail)
    monkeypatch.setattr(nn.init, "trunc_normal_", fail)
    assert load_encoder(saved).cls_token.shape == shape
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_of_half_precision_are_loaded_as_fp32(encoder, tmp_path):
    half = {name: value.bfloat16() for name, value in encoder.state_dict().items()}
    save_encoder(encoder, tmp_path / "encoder.pt", half)
    loaded = load_encoder(tmp_path / "encoder.pt").state_dict()
    assert all(value.dtype == torch.float32 for value in loaded.values())
    assert all(torch.equal(value, half[name].float()) for name, value in loaded.items())


def resaved(change):
    """A writer of an encoder.pt whose content was changed."""
    def write(path, saved):
        content = torch.load(saved, weights_only=True)
        change(content)
        torch.save(content, path)
    return write


def with_weight(**weight):
    return resaved(lambda content: content["state_dict"].update(weight))


def with_preprocessing(**setting):
    return resaved(lambda content: content["preprocessing"].update(setting))


def cut_after(size):
    return lambda path, saved: path.write_bytes(saved.read_bytes()[:size])


def cut_at(share):
    return lambda path, saved: path.write_bytes(saved.read_bytes()[:int(share * saved.stat().st_size)])


def flipped(path, saved):
    """One bit of a weight in the middle; torch.load alone does not notice."""
    content, weights = bytearray(saved.read_bytes()), torch.load(saved, weights_only=True)["state_dict"]
    place = content.find(weights["blocks.1.mlp.0.weight"].numpy().tobytes())
    assert place > 0
    content[place + 1001] ^= 4
    path.write_bytes(content)
    torch.load(path, weights_only=True)


class Foreign:
    pass


DAMAGED, FOREIGN = "is damaged.*again", "is not an encoder.*give the encoder.pt that train.py wrote"
COMMIT = "use the commit that wrote it"
BAD_FILES = {                    # name: (what writes it, what the message must say)
    "empty": (cut_after(0), DAMAGED), "10 bytes": (cut_after(10), DAMAGED), "2000 bytes": (cut_after(2000), DAMAGED),
    "cut in the middle": (cut_at(0.5), DAMAGED), "cut at the end": (cut_at(0.9999), DAMAGED),
    "a flipped bit": (flipped, DAMAGED),
    "a weight is absent": (resaved(lambda content: content["state_dict"].pop("mask_token")), "is damaged.*do not fit"),
    "a weight too many": (with_weight(more=torch.ones(1)), "is damaged.*do not fit"),
    "a weight of other shape": (with_weight(mask_token=torch.ones(5)), "is damaged.*do not fit"),
    "no architecture": (resaved(lambda content: content.update(config={"width": 32})), "is damaged.*do not fit"),
    "text": (lambda path, saved: path.write_text("not an encoder"), FOREIGN),
    "npz": (lambda path, saved: np.savez(open(path, "wb"), x=np.zeros(999)), FOREIGN),
    "another zip": (lambda path, saved: zipfile.ZipFile(path, "w").writestr("a.txt", "x" * 999), FOREIGN),
    "a pickle": (lambda path, saved: path.write_bytes(pickle.dumps(Foreign(), protocol=2)), FOREIGN),
    "another dict of PyTorch": (lambda path, saved: torch.save({"model": torch.ones(3)}, path), FOREIGN),
    "a tensor": (lambda path, saved: torch.save(torch.ones(3), path), FOREIGN),
    "a file of an old PyTorch": (lambda path, saved: torch.save(
        {"model": torch.ones(3)}, path, _use_new_zipfile_serialization=False), FOREIGN),
    "objects inside": (lambda path, saved: torch.save({"format": FORMAT, "config": Foreign()}, path), FOREIGN),
    "no preprocessing": (resaved(lambda content: content.pop("preprocessing")), FOREIGN),
    "other format": (resaved(lambda content: content.update(format="ecg-dino encoder 99")),
                     "expected format 'ecg-dino encoder 3'.*ecg-dino encoder 99"),
    "other rate": (with_preprocessing(fs_hz=500), f"fs_hz 500, expected 250.*{COMMIT}"),
    "other leads": (with_preprocessing(leads=["I"]), rf"leads \['I'\], expected.*{COMMIT}"),
    "other baseline": (with_preprocessing(baseline_patches=9), COMMIT),
    "other compression": (with_preprocessing(compress_mv=0.2), f"0.2, expected 0.1.*{COMMIT}"),
    "unknown compression": (resaved(lambda content: content["preprocessing"].pop("compress_mv")), f"None.*{COMMIT}"),
    "absent": (lambda path, saved: None, "no encoder at .*train.py writes.*random:tiny"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_told_apart(saved, tmp_path, kind):
    write, text = BAD_FILES[kind]
    write(tmp_path / "encoder.pt", saved)
    with pytest.raises(ValueError, match=text) as error:
        load_encoder(tmp_path / "encoder.pt")
    assert ("damaged" in str(error.value)) == (text.startswith("is damaged"))


def test_a_changed_byte_is_noticed_or_changes_nothing(tmp_path):
    """Bytes all over a small file, and the bit that says that a member of the archive is a folder: torch.load would not
    fill its weights. Bytes between the members mean nothing."""
    encoder = Encoder(width=8, depth=1, heads=2, layer_scale=1.0)
    save_encoder(encoder, tmp_path / "whole.pt")
    whole, noticed = (tmp_path / "whole.pt").read_bytes(), 0
    members = [match.start() + 38 for match in re.finditer(b"PK\x01\x02", whole)]
    assert len(members) > 20
    places = [*range(0, len(whole), 41), *members]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 0x10
        (tmp_path / "encoder.pt").write_bytes(content)
        try:
            loaded = load_encoder(tmp_path / "encoder.pt")
        except ValueError:
            noticed += 1
        else:
            assert loaded.config == encoder.config
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), encoder.parameters())), place
    assert noticed > len(places) / 2


def test_devices_that_are_not_there(saved, encoder):
    """A good file on a machine without that device is not called a bad file."""
    absent = ["gpu", f"cuda:{torch.cuda.device_count()}"] + ["mps"] * (not torch.backends.mps.is_available())
    for device in absent:
        for call in (lambda: load_encoder(saved, device=device), lambda: load_encoder("random:tiny", device=device),
                     lambda: encoder.embed(GOOD, fs=250, leads=["II"], device=device)):
            with pytest.raises(ValueError, match=f"device '{device}' cannot be used here.*use device='cpu'"):
                call()
    for device in ("cpu", torch.device("cpu")):
        assert load_encoder(saved, device=device).cls_token.device.type == "cpu"


def test_untrained_encoders_by_name():
    assert torch.equal(load_encoder("random:tiny").cls_token, build_encoder("tiny", 0).cls_token)
    assert torch.equal(load_encoder("random:tiny:9").cls_token, build_encoder("tiny", 9).cls_token)


@pytest.mark.parametrize("name", ["random:colossal", "random:", "random:tiny:first"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="tiny, small, base, large|random:SIZE:SEED"):
        load_encoder(name)


# ---------------------------------------------------------------------------------------------------------------------
# any recording

@pytest.mark.parametrize("leads, fs, seconds", [
    (TWELVE, 500, 10), (TWELVE, 100, 10), (("MLII", "V1"), 360, 65), (("II",), 128, 30), (("ECG",), 1000, 10.1),
    (("ECG", "V1", "other"), 257.5, 12), (("ECG",), 300, 1800), (("MLII", "V1"), 360, 1800), (("I",), 1000, 1800),
    (("I",), 250, 0.2)])
def test_embed_any_recording(encoder, leads, fs, seconds):
    out = encoder.embed(draw_ecg(fs, seconds, leads), fs=fs, leads=leads)
    N = int(seconds / PATCH_S + 1e-9)
    assert out.global_feature.shape == (96,) and out.local_features.shape == (len(leads), N, 32)
    assert np.array_equal(out.cls, out.global_feature[:32])
    assert out.global_feature.dtype == out.local_features.dtype == np.float32
    assert np.isfinite(out.global_feature).all() and np.isfinite(out.local_features).all()
    np.testing.assert_allclose(out.times_s, 0.1 + 0.2 * np.arange(N), atol=1e-9)


@pytest.mark.parametrize("fs", [100, 128, 333, 360, 500, 1000])
def test_sampling_rate_hardly_matters(encoder, fs):
    a, b = (encoder.embed(draw_ecg(rate, 20, ("I", "V2")), fs=rate, leads=("I", "V2")) for rate in (fs, 250))
    spread = b.local_features.std(axis=(0, 1)).mean()
    # At either end the resampler knows only one side of the signal.
    assert np.abs(a.local_features - b.local_features)[:, 2:-2].max() < 0.15 * spread
    assert np.abs(a.global_feature - b.global_feature).max() < 0.05 * spread


def test_embed_of_one_window_is_the_encoder_itself(encoder):
    signal = draw_ecg(250, 8, ("I", "V2"))
    out = encoder.embed(signal, fs=250, leads=("I", "V2"))
    direct = encoder(torch.tensor(signal[None]).float(), ids("I", "V2")[None])
    assert_close(out.cls, direct.cls[0], atol=1e-6)
    assert_close(out.global_feature, direct.global_feature()[0], atol=1e-6)
    assert_close(out.local_features, direct.patches[0], atol=1e-6)


def test_layout_and_containers_do_not_matter(encoder):
    signal = draw_ecg(250, 8, ("I", "V2")).astype(np.float32)
    expected = encoder.embed(signal, fs=250, leads=("I", "V2"))
    for same in (signal.T, signal.tolist(), torch.from_numpy(signal), np.asfortranarray(signal), list(signal),
                 tuple(signal), iter(signal), [torch.from_numpy(lead) for lead in signal]):
        out = encoder.embed(same, fs=250, leads=["I", "V2"])
        assert np.array_equal(out.global_feature, expected.global_feature)
        assert np.array_equal(out.local_features, expected.local_features)
    single = encoder.embed(signal[:1], fs=250, leads=["I"])
    assert np.array_equal(encoder.embed(signal[0], fs=250, leads="I").local_features, single.local_features)
    recording = Recording(signal.T, 250, ("I", "V2"))
    assert np.array_equal(encoder.embed(recording).local_features, expected.local_features)


@pytest.mark.parametrize("units, scale", [("uV", 1e3), ("V", 1e-3), ("mv", 1.0)])
def test_units(encoder, units, scale):
    signal = draw_ecg(250, 8)
    out = encoder.embed(scale * signal, fs=250, leads=["II"], units=units)
    expected = encoder.embed(signal, fs=250, leads=["II"])
    assert_close(out.local_features, expected.local_features, atol=1e-4)


def test_lead_aliases(encoder):
    signal = draw_ecg(250, 8, ("II", "V1"))
    a, b = (encoder.embed(signal, fs=250, leads=leads) for leads in (("MLII", "v1"), ("II", "V1")))
    assert np.array_equal(a.local_features, b.local_features)


def test_a_beat_lies_in_the_patch_of_its_time():
    """Without attention a patch knows only its own samples: where a spike at r seconds shows, there the beat is."""
    encoder = lively(depth=0)
    for fs in (250, 360, 1000):
        for r in (0.41, 3.07, 11.99, 25.3):
            signal = 0.05 * np.sin(2 * np.pi * 7 * np.arange(30 * fs) / fs)
            spiked = signal.copy()
            spiked[round(r * fs)] += 5
            a, b = (encoder.embed(x, fs=fs, leads=["II"]).local_features[0] for x in (signal, spiked))
            assert np.abs(a - b).sum(axis=1).argmax() == int(r * 250 / 50), (fs, r)


@pytest.mark.parametrize("at_once", [3200, 450])
def test_patches_come_from_the_most_central_window(encoder, monkeypatch, at_once):
    monkeypatch.setattr(model, "MAX_EMBED_TOKENS", at_once)
    signal = draw_ecg(250, 27.5, ("II", "V1")).astype(np.float32)            # 137 patches and a rest that is left out
    out = encoder.embed(signal, fs=250, leads=("II", "V1"), window_s=10, stride_s=4)
    starts = [0, 20, 40, 60, 80, 87]                                    # the last window ends with the recording
    windows = [encoder(torch.from_numpy(signal[None, :, s * P:(s + 50) * P]), ids("II", "V1")[None]) for s in starts]
    assert_close(out.global_feature, torch.cat([w.global_feature() for w in windows]).mean(0))
    for n in range(137):
        off_centre = [abs(n + 0.5 - (s + 25)) if s <= n < s + 50 else np.inf for s in starts]
        nearest = [windows[i].patches[0, :, n - s] for i, s in enumerate(starts) if off_centre[i] == min(off_centre)]
        assert min(np.abs(out.local_features[:, n] - features.numpy()).max() for features in nearest) < 2e-5, n
    whole = encoder.embed(signal, fs=250, leads=("II", "V1"), window_s=60, stride_s=60)
    assert np.abs(whole.local_features - out.local_features).max() > 0.01         # windows do differ


def test_windows_are_as_long_as_in_training():
    encoder = Encoder(width=32, depth=1, heads=2, layer_scale=1.0, window_patches={1: 20}).eval()
    signal = draw_ecg(250, 13, ("II", "V1"))
    a, b, c = (encoder.embed(signal, fs=250, leads=("II", "V1"), **windows)
               for windows in ({}, dict(window_s=4, stride_s=2), dict(window_s=13)))
    assert np.array_equal(a.local_features, b.local_features) and np.array_equal(a.global_feature, b.global_feature)
    assert np.abs(a.global_feature - c.global_feature).max() > 1e-3


@pytest.mark.parametrize("patches, starts", [(65, (0, 10, 20, 30, 40, 45)), (20, (0,)), (12, (0,))])
def test_the_global_feature_is_the_mean_over_windows(patches, starts):
    """Of global_feature(), each window weighted by its valid patches."""
    encoder = Encoder(width=32, depth=1, heads=2, layer_scale=1.0, window_patches={1: 20}).eval()
    signal, n = torch.tensor(draw_ecg(250, patches * PATCH_S, ("I", "V1"))[None]).float(), min(20, patches)
    for signal in (signal, with_gaps(signal, (0, 0, slice(2, 7)), (0, 1, patches - 1), (0, 0, patches - 2))):
        windows = [encoder(signal[..., s * P:(s + n) * P], ids("I", "V1")[None]) for s in starts]
        weights = [40 if w.valid is None else int(w.valid.sum()) for w in windows]
        expected = sum(k * w.global_feature()[0] for k, w in zip(weights, windows)) / sum(weights)
        out = encoder.embed(signal[0], fs=250, leads=("I", "V1"))
        assert_close(out.global_feature, expected)
        assert_close(out.cls, expected[:32])


def test_windows_and_strides(encoder):
    assert [encoder.window_and_stride(n) for n in (12, 8, 7, 1)] == [(25, 12), (25, 12), (40, 20), (40, 20)]
    assert encoder.window_and_stride(12, window_s=10) == (50, 25)
    assert encoder.window_and_stride(1, window_s=4.06, stride_s=0.01) == (20, 1)
    assert encoder.window_length(9) == 25


# ---------------------------------------------------------------------------------------------------------------------
# many recordings

LIMBS = ("I", "II")
PAIR = [draw_ecg(250, 3, LIMBS), draw_ecg(250, 5, LIMBS)]
MANY = {                         # name: (signal, fs, leads, units) of the two recordings of PAIR
    "list": (PAIR, 250, LIMBS, "mV"), "tuple": (tuple(PAIR), 250, list(LIMBS), "mV"),
    "generator": ((x for x in PAIR), 250, LIMBS, "mV"),
    "turned": ([x.T for x in PAIR], 250.0, LIMBS, "mV"), "nested lists": ([x.tolist() for x in PAIR], 250, LIMBS, "mV"),
    "tensors": ([torch.tensor(x) for x in PAIR], 250, LIMBS, "mV"),
    "masked": ([np.ma.array(x) for x in PAIR], 250, LIMBS, "mV"),
    "objects": (np.array([*PAIR, None], dtype=object)[:2], 250, LIMBS, "mV"),
    "recordings": ([Recording(x, 250, LIMBS) for x in PAIR], None, None, "mV"),
    "recordings and arrays": ([Recording(1000 * PAIR[0], 250, LIMBS, "uV"), PAIR[1]], 250, LIMBS, "mV"),
    "all of their own": ([PAIR[0], 1000 * PAIR[1]], [250, 250], [LIMBS, LIMBS], ["mV", "uV"]),
    "a generator, rates of their own": ((x for x in PAIR), (250, 250), LIMBS, "mV"),
    "leads of their own": (PAIR, 250, np.array([LIMBS, LIMBS]), "mV"),
    "rates of their own": (PAIR, np.array([250, 250]), LIMBS, "mV"),
}


@pytest.mark.parametrize("form", MANY)
def test_many_recordings_in_any_form(encoder, form):
    signal, fs, leads, units = MANY[form]
    found = encoder.embed(signal, fs=fs, leads=leads, units=units)
    assert isinstance(found, list) and len(found) == 2
    for out, x in zip(found, PAIR):
        expected = encoder.embed(x, fs=250, leads=LIMBS)
        assert_close(out.global_feature, expected.global_feature)
        assert_close(out.local_features, expected.local_features)
        assert np.array_equal(out.times_s, expected.times_s)


def test_arrays_of_recordings(encoder):
    pair = np.stack([PAIR[0], 2 * PAIR[0]])
    for many in (pair, torch.tensor(pair), pair.transpose(0, 2, 1), np.ma.array(pair)):
        found = encoder.embed(many, fs=250, leads=LIMBS)
        assert len(found) == 2 and found[0].local_features.shape == (2, 15, 32)
        assert_close(found[1].global_feature, encoder.embed(pair[1], fs=250, leads=LIMBS).global_feature)
    single = encoder.embed([pair[0, 0], pair[1, 1]], fs=250, leads=[["I"], "II"])       # 1-D, a lead for each
    assert [one.local_features.shape for one in single] == [(1, 15, 32)] * 2
    assert encoder.embed(pair[0], fs=250, leads=[["I"], ["II"]])[1].local_features.shape == (1, 15, 32)
    for nothing in ([], (), iter([]), np.empty((0, 2, 500))):
        assert encoder.embed(nothing, fs=250, leads=LIMBS) == []


def said_by(call):
    """The texts of the warnings of a call, and its result."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return [str(warning.message) for warning in found], result


def test_channels_that_are_no_ecg_keep_their_rows_and_change_nothing(encoder):
    wave = np.random.default_rng(0).normal(0, 0.4, (2, 750))
    x, names = np.vstack([wave[:1], PAIR[0], wave[1:]]), ["RESP", "I", "II", "EEG (C4-A1)"]
    said, out = said_by(lambda: encoder.embed(x, fs=250, leads=names))
    alone = encoder.embed(PAIR[0], fs=250, leads=LIMBS)
    assert said == ["channels left out: RESP (1); channels left out: EEG (C4-A1) (1)"]
    assert_close(out.global_feature, alone.global_feature)
    assert_close(out.local_features[1:3], alone.local_features)
    assert np.isnan(out.local_features[[0, 3]]).all()


def test_embed_warns_once_for_all_recordings(encoder):
    """Of unknown names, channels that a file's reader left out, and gains; and not where all is known."""
    recordings = [Recording(PAIR[0], 250, ("ECG1", "II")), Recording(PAIR[1], 250, ("ECG1", "I"), notes={"RESP": 1}),
                  Recording(10 * PAIR[1], 250, LIMBS)]
    said, _ = said_by(lambda: encoder.embed(recordings))
    assert len(said) == 1 and "leads stored as unknown: the name 'ECG1' (2)" in said[0] and "RESP (1)" in said[0]
    assert "signals that span more than most ECGs: the gain may be wrong by 10 (1)" in said[0]
    assert said_by(lambda: encoder.embed(PAIR, fs=250, leads=LIMBS))[0] == []


def test_masks_names_and_tables_as_people_hold_them(encoder):
    """Masked arrays in lists and after indexing, bytes, iterators of names, pandas with units in the columns."""
    gap = PAIR[0].copy()
    gap[1, 300:400] = np.nan
    masked = np.ma.masked_array(np.where(np.isnan(gap), 9, gap), mask=np.isnan(gap))
    expected, whole = (encoder.embed(x, fs=250, leads=LIMBS) for x in (gap, PAIR[0]))
    assert np.isnan(expected.local_features).any() and not np.isnan(whole.local_features).any()
    for many in ([masked, masked], np.ma.stack([masked, masked]), (x for x in (masked, masked)), [list(masked), masked],
                 np.ma.stack([masked] * 3)[1:], [masked[:, :], masked[[0, 1]]]):
        for out in encoder.embed(many, fs=250, leads=LIMBS):
            assert_close(out.global_feature, expected.global_feature)
            assert np.array_equal(np.isnan(out.local_features), np.isnan(expected.local_features))
    for names in (np.array(LIMBS, "S2"), [b"I", b"II"], iter(LIMBS), map(str, LIMBS)):
        for out in encoder.embed([PAIR[0]] * 2, fs=250, leads=names):
            assert_close(out.global_feature, whole.global_feature)
    for factors, columns in (((1, 1), ("I", "II")), ((1, 1), ("I (mV)", "Lead II [mV]")), ((1000, 1), ("I_uV", "II"))):
        table = pd.DataFrame(PAIR[0].T * factors, columns=columns)
        assert_close(encoder.embed(table, fs=250).global_feature, whole.global_feature)
        assert_close(encoder.embed([table, table], fs=250)[1].global_feature, whole.global_feature)
    with pytest.raises(ValueError, match="a set has no order: give a list of names"):
        encoder.embed(PAIR[0], fs=250, leads=set(LIMBS))
    with pytest.raises(ValueError, match="lead 0 is named 'time': time is no lead"):
        encoder.embed(table.assign(time=0.0)[["time", *columns]], fs=250)


@pytest.mark.parametrize("arguments, text", [
    (dict(fs=[250, 250, 250]), "there are 2 recordings, but.*for 3"), (dict(leads=[LIMBS]), "2 recordings.*for 1"),
    (dict(units=["mV"]), "2 recordings.*for 1"), (dict(fs=[250], leads=[LIMBS] * 3), "2 recordings.*for 1 and 3"),
    (dict(fs=None), "fs, the sampling rate in Hz, and leads"), (dict(leads=None), "fs, the sampling rate in Hz")])
@pytest.mark.parametrize("on_error", ["raise", "nan"])
def test_arguments_that_do_not_fit_the_recordings(encoder, arguments, text, on_error):
    for signal in (PAIR, np.stack([PAIR[0]] * 2)):
        with pytest.raises(ValueError, match=text):
            encoder.embed(signal, **(dict(fs=250, leads=LIMBS, on_error=on_error) | arguments))
    if None not in arguments.values():
        with pytest.raises(ValueError, match="shorter|longer|for"):
            encoder.embed(iter(PAIR), **(dict(fs=250, leads=LIMBS, on_error=on_error) | arguments))


def motley():
    """Recordings that differ in leads, rate, length, gaps, dead leads and units."""
    some, rng = [], np.random.default_rng(3)
    for i in range(24):
        leads = [TWELVE, ("MLII", "V1"), ("ECG",), TWELVE[:8], ("V5", "II", "X")][i % 5]
        fs, seconds = (250, 500, 360, 128)[i % 4], (3, 10, 7.3, 25, 0.5)[i % 5 - i // 5]
        signal = draw_ecg(fs, seconds, leads, rr_s=0.6 + 0.02 * i)
        signal += 0.01 * rng.standard_normal(signal.shape)
        if i % 3 == 1:
            start = int(rng.integers(0, signal.shape[1] - fs // 4))
            signal[rng.integers(len(leads)), start:start + fs // 5] = np.nan
        if i % 7 == 2 and len(leads) > 1:
            signal[1] = 0.0
        some.append(Recording(1000 * signal if i % 2 else signal, fs, leads, "uV" if i % 2 else "mV"))
    return some


@pytest.mark.parametrize("at_once", [4096, 70])
def test_a_list_gives_the_same_as_one_by_one(encoder, monkeypatch, at_once):
    recordings = motley()
    alone = [encoder.embed(recording) for recording in recordings]
    monkeypatch.setattr(model, "MAX_EMBED_TOKENS", at_once)
    together = encoder.embed(recordings)
    vectors = encoder.embed((recording for recording in recordings), local=False)
    assert sum(np.isnan(one.local_features).any() for one in alone) > 5
    for one, two, three in zip(alone, together, vectors, strict=True):
        assert_close(two.global_feature, one.global_feature, atol=1e-5)
        assert_close(two.local_features, one.local_features, atol=1e-5)
        assert np.array_equal(two.times_s, one.times_s)
        assert_close(three.global_feature, one.global_feature, atol=1e-5)
        assert_close(three.cls, one.cls, atol=1e-5)
        assert three.local_features is None and three.times_s is None


def test_the_order_of_the_windows_does_not_matter():
    """Patch 2 lies equally near to the centres of the first two windows: the earlier one gives it."""
    def joined(*order):
        features = RecordingFeatures(np.array([0, 2]), (3, 7), 1, local=True)
        for start in order:
            features.add(start, np.full(3, start), 1 + start, np.full((2, 4, 1), start, np.float32))
        return features.whole(0.2)
    first = joined(0, 1, 3)
    assert first[2][0, :, 0].tolist() == first[2][2, :, 0].tolist() == [0, 0, 0, 1, 3, 3, 3]
    assert np.isnan(first[2][1]).all()
    for order in ((3, 1, 0), (1, 0, 3), (1, 3, 0)):
        for a, b in zip(joined(*order), first):
            np.testing.assert_array_equal(a, b)


def test_windows_of_equal_shape_share_a_forward_pass(encoder, monkeypatch):
    passes, forward = [], Encoder.forward

    def counted(self, signal, leads, mask=None):
        passes.append(len(signal))
        return forward(self, signal, leads, mask)
    monkeypatch.setattr(Encoder, "forward", counted)
    encoder.embed([draw_ecg(250, 3, TWELVE)] * 20 + [draw_ecg(250, 2, LIMBS)], fs=250, leads=[TWELVE] * 20 + [LIMBS])
    assert passes == [20, 1]


def test_vectors_of_many_recordings_take_no_memory_that_grows(encoder, monkeypatch):
    """Every recording has a length of its own, so that no forward pass is ever full by itself."""
    monkeypatch.setattr(model, "MAX_EMBED_TOKENS", 60)

    def recordings(n, alive, most):
        for i in range(n):
            signal = draw_ecg(250, 3 + 0.2 * (i % 30), ("II",))
            signal[0, 100 + i] = np.nan
            alive[i] = signal
            most[0] = max(most[0], len(alive))
            yield signal
            del signal

    def peak(n):
        alive, most = weakref.WeakValueDictionary(), [0]
        tracemalloc.start()
        try:
            found = encoder.embed(recordings(n, alive, most), fs=250, leads=["II"], local=False)
            return tracemalloc.get_traced_memory()[1], most[0], len(found)
        finally:
            tracemalloc.stop()
    (few, few_alive, _), (many, many_alive, found) = peak(50), peak(250)
    assert found == 250 and few_alive == many_alive <= 5
    signals = 200 * 6 * 250 * 8                                         # what the other 200 recordings take, 2.4 MB
    assert many - few < 0.4 * signals                                   # their features, and what Python needs for each


def test_a_recording_that_cannot_be_used(encoder):
    bad = [PAIR[0], np.full_like(PAIR[0], np.nan), PAIR[1], None, PAIR[0][:1], 1000 * PAIR[0]]
    with pytest.raises(ValueError, match="recording 1: .*check the units"):
        encoder.embed(bad, fs=250, leads=LIMBS)
    found = encoder.embed(bad, fs=250, leads=LIMBS, on_error="nan")
    for i, (out, signal) in enumerate(zip(found, bad, strict=True)):
        if i in (0, 2):
            assert_close(out.local_features, encoder.embed(signal, fs=250, leads=LIMBS).local_features)
        else:
            assert out.global_feature.shape == (96,) and out.cls.shape == (32,)
            assert np.isnan(out.global_feature).all() and np.isnan(out.cls).all()
            assert out.local_features is None and out.times_s is None
    assert np.isnan(encoder.embed(bad[1], fs=250, leads=LIMBS, on_error="nan").global_feature).all()
    assert len(encoder.embed([None, PAIR[0]], fs=250, leads=LIMBS, on_error="nan")) == 2


@pytest.mark.parametrize("arguments, text", [
    (dict(window_s=0), "window_s is 0"), (dict(window_s=-1), "window_s is -1"),
    (dict(stride_s=float("nan")), "stride_s is nan"), (dict(stride_s=float("inf")), "stride_s is inf"),
    (dict(window_s=2, stride_s=3), "stride_s 3 is longer than window_s 2"),
    (dict(stride_s=9), "stride_s 9 is longer than window_s 8"), (dict(on_error="skip"), "expected 'raise' or 'nan'")])
def test_wrong_arguments_are_no_recording_that_cannot_be_used(encoder, arguments, text):
    with pytest.raises(ValueError, match=text):
        encoder.embed(PAIR, **(dict(fs=250, leads=LIMBS, on_error="nan") | arguments))


def test_progress_is_shown_for_many(encoder, monkeypatch):
    shown = []

    def tqdm(recordings, total, **more):
        shown.append(total)
        return recordings
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=tqdm))
    encoder.embed(PAIR[0], fs=250, leads=LIMBS)
    assert shown == []
    encoder.embed(PAIR, fs=250, leads=LIMBS)
    encoder.embed(iter(PAIR), fs=250, leads=LIMBS)
    assert shown == [2, None]
    monkeypatch.setitem(sys.modules, "tqdm", None)                      # not installed
    assert len(encoder.embed(PAIR, fs=250, leads=LIMBS)) == 2


def test_embedding_leaves_an_encoder_that_can_be_trained():
    """Also where embed() moves it: tensors of inference mode have no gradient. meta is a device that is there."""
    encoder = lively()
    encoder.embed(PAIR[0], fs=250, leads=LIMBS, device="cpu")
    with torch.enable_grad():
        encoder(GAPPY, GAPPY_LEADS).global_feature().sum().backward()
    with pytest.raises(Exception, match="meta"):
        encoder.embed(PAIR[0], fs=250, leads=LIMBS, device="meta")
    assert not any(p.is_inference() for p in encoder.parameters())


@pytest.mark.parametrize("under", [9.0, 0.0, 1e20])
def test_values_under_a_numpy_mask_are_missing(encoder, under):
    signal, gap = draw_ecg(500, 10, LIMBS), draw_ecg(500, 10, LIMBS)
    gap[1, 2000:2200] = np.nan
    signal[1, 2000:2200] = under
    masked = np.ma.masked_array(signal, mask=np.isnan(gap))
    expected = encoder.embed(gap, fs=500, leads=LIMBS)
    assert np.isnan(expected.local_features).any(-1).sum() == 3
    for form in (masked, masked.T, list(masked), [masked], np.ma.stack([masked, masked])):
        out = encoder.embed(form, fs=500, leads=LIMBS)
        out = out[-1] if isinstance(out, list) else out
        assert_close(out.local_features, expected.local_features)
        assert_close(out.global_feature, expected.global_feature)


# ---------------------------------------------------------------------------------------------------------------------
# missing samples

def test_absent_leads_are_as_if_not_given(encoder):
    signal, some = draw_ecg(250, 24, TWELVE), [1, 6, 7]
    absent = np.full_like(signal, np.nan)
    absent[some] = signal[some]
    absent[3] = 0.0                                                     # an unconnected lead is no lead either
    out = encoder.embed(absent, fs=250, leads=TWELVE)
    subset = encoder.embed(signal[some], fs=250, leads=[TWELVE[i] for i in some])
    assert_close(out.global_feature, subset.global_feature)
    assert_close(out.local_features[some], subset.local_features)
    assert np.isnan(np.delete(out.local_features, some, axis=0)).all()


@pytest.mark.parametrize("fs", [250, 360])
def test_patches_with_gaps_are_nan_and_no_others(encoder, fs):
    signal = draw_ecg(fs, 30, ("II", "V1"))
    signal[0, round(3.25 * fs):round(4.05 * fs)] = np.nan               # patches 16 to 20
    signal[1, round(12.5 * fs)] = np.inf                                # patch 62
    signal[0, round(20.1 * fs)] = 500.0                                 # patch 100: no electrode gives half a volt
    out = encoder.embed(signal, fs=fs, leads=("II", "V1"))
    holes = np.isnan(out.local_features)
    assert (holes.all(axis=2) == holes.any(axis=2)).all()
    assert np.flatnonzero(holes[0, :, 0]).tolist() == [16, 17, 18, 19, 20, 100]
    assert np.flatnonzero(holes[1, :, 0]).tolist() == [62]
    assert np.isfinite(out.global_feature).all()


def test_the_rest_of_a_patch_with_a_gap_has_no_influence(encoder):
    signal = draw_ecg(250, 8)
    signal[0, 10 * P + 3] = np.nan
    other = signal.copy()
    other[0, 10 * P + 4:11 * P] += 3
    a, b = (encoder.embed(x, fs=250, leads=["II"]) for x in (signal, other))
    assert_close(a.local_features, b.local_features)
    assert_close(a.global_feature, b.global_feature)


def test_dc_offset_does_not_matter_next_to_a_gap(encoder):
    signal = draw_ecg(250, 8)
    signal[0, 10 * P + 3] = np.nan
    a, b = (encoder.embed(x, fs=250, leads=["II"]) for x in (signal, signal + 3))
    assert_close(a.local_features, b.local_features, atol=1e-4)


def test_windows_are_as_long_as_in_training_with_as_many_leads(encoder):
    signal, leads = draw_ecg(250, 8, TWELVE), list(TWELVE)
    for n, window_s in ((12, 5), (2, 8)):
        assert_close(encoder.embed(signal[:n], fs=250, leads=leads[:n]).global_feature,
                     encoder.embed(signal[:n], fs=250, leads=leads[:n], window_s=window_s).global_feature)


def test_windows_without_signal_do_not_count(encoder):
    signal = draw_ecg(250, 60)
    signal[0, 10 * 250:50 * 250] = np.nan
    out = encoder.embed(signal, fs=250, leads=["II"], window_s=10, stride_s=10)
    ends = [encoder.embed(part, fs=250, leads=["II"], window_s=10) for part in (signal[:, :2500], signal[:, -2500:])]
    assert_close(out.global_feature, (ends[0].global_feature + ends[1].global_feature) / 2)
    assert_close(out.local_features[:, :50], ends[0].local_features)
    assert np.isnan(out.local_features[:, 50:250]).all()


# ---------------------------------------------------------------------------------------------------------------------
# nonsense

GOOD = draw_ecg(250, 10, rr_s=1.5)
NONSENSE = {                     # name: (signal, arguments that differ from a good call, what the message must say)
    "empty": (np.empty((1, 0)), {}, "expected at least one lead and one sample"),
    "no leads": (GOOD, dict(leads=[]), "one name per lead"),
    "0.1 s": (GOOD[:, :25], {}, "at least one patch of 0.2 s"),
    "four dimensions": (GOOD[None, None], {}, r"recording 0: .*expected \(leads, samples\)"),
    "a number": (1.0, {}, r"expected \(leads, samples\)"),
    "None": (None, {}, r"expected \(leads, samples\)"),
    "text": ("ecg.csv", {}, "expected"),
    "texts": ([["a", "b", "c"]], {}, "expected"),
    "ragged": ([[1.0, 2.0], [1.0]], dict(leads=["I", "II"]), "expected"),
    "too many leads": (GOOD, dict(leads=["I", "II"]), "one name per lead"),
    "leads is None": (GOOD, dict(leads=None), "fs, the sampling rate in Hz, and leads"),
    "fs is None": (GOOD, dict(fs=None), "fs, the sampling rate in Hz, and leads"),
    "leads is a count": (GOOD, dict(leads=1), "expected"),
    "fs 0": (GOOD, dict(fs=0), "expected the sampling rate in Hz"),
    "fs negative": (GOOD, dict(fs=-250), "expected the sampling rate in Hz"),
    "fs in kHz": (GOOD, dict(fs=0.25), "expected the sampling rate in Hz"),
    "fs NaN": (GOOD, dict(fs=float("nan")), "expected the sampling rate in Hz"),
    "fs text": (GOOD, dict(fs="250"), "expected the sampling rate in Hz"),
    "all NaN": (GOOD * np.nan, {}, "check the units"),
    "all zero": (GOOD * 0, {}, "check the units"),
    "a gap in every patch": (np.where(np.arange(2500) % 50, GOOD, np.nan), {}, "missing samples"),
    "unknown units": (GOOD, dict(units="inch"), "expected mV, uV or V"),
    "no units": (GOOD, dict(units=None), "expected mV, uV or V"),
    "uV said to be mV": (1000 * GOOD, {}, "units"),
    "mV said to be V": (GOOD, dict(units="V"), "units"),
    "mV said to be uV": (GOOD, dict(units="uV"), "units"),
    "adu said to be mV": (np.round(200 * GOOD) + 1024, {}, "units"),
    "stride beyond window": (GOOD, dict(stride_s=20), "longer than window_s"),
    "window 0": (GOOD, dict(window_s=0), "window_s"),
    "window NaN": (GOOD, dict(window_s=float("nan")), "window_s"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused_with_a_reason(encoder, case):
    signal, arguments, text = NONSENSE[case]
    with pytest.raises(ValueError, match=text):
        encoder.embed(signal, **(dict(fs=250, leads=["II"]) | arguments))


@pytest.mark.parametrize("scale", [0.02, 8.0])
def test_low_and_high_voltages_are_no_nonsense(encoder, scale):
    assert np.isfinite(encoder.embed(scale * GOOD, fs=250, leads=["II"]).local_features).all()


def test_impossible_widths_are_refused():
    for width, heads in ((30, 4), (9, 1), (4, 2)):                      # the last: one pair has no range of periods
        with pytest.raises(ValueError, match="width"):
            Encoder(width=width, depth=1, heads=heads, layer_scale=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# what a person does with it

def test_two_files_are_all_that_embedding_needs(saved, tmp_path):
    """Copied into an empty folder, with tqdm and without."""
    for name in ("ecg.py", "model.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import numpy as np
import pandas as pd
from model import load_encoder
signal = np.sin(np.arange(5000) / 40) + 0.3 * np.sin(np.arange(5000) / 7)
encoder = load_encoder({str(saved)!r})
sys.modules["wfdb"] = None
for _ in range(2):
    many = encoder.embed([signal, signal[:900]], fs=500, leads=[["MLII"], ["V1"]])
    print(many[0].global_feature.shape, many[1].local_features.shape, np.isfinite(many[0].global_feature).all())
    sys.modules["tqdm"] = None
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines() == ["(96,) (1, 9, 32) True"] * 2, done.stderr


def test_the_encoder_that_comes_with_the_program():
    """It is small, and says where it comes from."""
    path = ROOT / "pretrained" / "tiny.pt"
    assert path.stat().st_size <= 3e6
    encoder = load_encoder("tiny")
    assert encoder.width == SIZES["tiny"]["width"] and not encoder.training
    about = encoder.about
    assert {"command", "commit", "step", "data", "results", "intended_use"} <= set(about)
    assert "no medical device" in about["intended_use"] and len(about["commit"]) == 40
    assert all("CC BY 4.0" in line or "ODC-By 1.0" in line for line in about["data"])
    readme = (ROOT / "README.md").read_text()
    assert about["commit"][:7] in readme and "pretrained/tiny.pt" in readme
    with pytest.raises(ValueError, match=r"no encoder at .*small\.pt; tiny comes with the program"):
        load_encoder("small")


def test_fine_tuning_as_the_readme_says(tmp_path, monkeypatch, capsys):
    """The code of the README, but for the number of epochs, separates two kinds of heart."""
    text = (ROOT / "README.md").read_text().partition("## Fine-tune it on your own labels\n")[2]
    section = text.partition("\n## ")[0]
    assert section.rstrip().count("\n") < 30
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    for name, value in dict(TUNE_EPOCHS=3, TUNE_ROWS=64, BATCH=8).items():
        monkeypatch.setattr(evaluate, name, value)
    recordings, y, patients = [], np.arange(40)[:, None] % 2 == 1, np.arange(40)
    for i, (low,) in enumerate(y):
        leads = (TWELVE, ("II", "V1"), ("MLII", "Z"))[i % 3]
        signal = draw_ecg(500, 2 + i % 3 * 2, leads, rr_s=0.9 + 0.01 * i) * (0.3 if low else 1.5)
        signal[0, 300:400] = np.nan
        recordings.append(Recording(signal.T, 500, leads))
    with torch.enable_grad():
        exec(compile(code, "README.md", "exec"), names := dict(recordings=recordings, y=y, patients=patients))
    losses = [loss for loss, _ in names["log"]]
    assert len(losses) == 3 and losses[-1] < 0.8 * losses[0] and float(capsys.readouterr().out.split()[1]) > 0.8
    tuned = load_encoder(tmp_path / "finetuned.pt")
    assert not torch.equal(tuned.patch_embedding.weight, load_encoder("tiny").patch_embedding.weight)


# ---------------------------------------------------------------------------------------------------------------------
# long recordings

def test_half_an_hour_equals_its_windows(encoder):
    """Away from the edges of the windows, each embedded as a recording of its own; with gaps."""
    signal = draw_ecg(250, 1800, ("II",)).astype(np.float32)
    signal[0, 100_000:100_010], signal[0, 300_000:310_000] = np.nan, np.nan
    whole = encoder.embed(signal, fs=250, leads=["II"])
    assert whole.local_features.shape == (1, 9000, 32)
    window, stride = encoder.window_and_stride(1)
    starts = range(0, 9000 - window + 1, stride)
    found = encoder.embed([signal[:, n * P:(n + window) * P] for n in starts], fs=250, leads=["II"], on_error="nan")
    seen = np.zeros(9000, bool)
    for n, out in zip(starts, found):
        middle = slice(window // 4, window - window // 4)
        if out.local_features is None:                                  # all of it is missing
            assert np.isnan(whole.local_features[:, n:n + window][:, middle]).all()
        else:
            assert_close(whole.local_features[:, n:n + window][:, middle], out.local_features[:, middle], atol=1e-5)
        seen[n:n + window][middle] = True
    assert seen.sum() == 9000 - 2 * (window // 4)


DAY = """
import resource, sys
sys.path.insert(0, {root!r})
import numpy as np
from ecg import read_wfdb
import model
encoder = model.load_encoder("tiny")
encoder.embed(np.sin(np.arange(5000) / 9), fs=250, leads=["II"])
args = model.parse_args(["r", "--out", "f.npz"])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = peak()
{work}
print(peak() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fs, work, most_mib", [
    (250, "encoder.embed(read_wfdb('r'))", 800), (500, "encoder.embed(read_wfdb('r'), local=False)", 1024),
    (500, "assert not model.main(args)", 512)])
def test_a_day_of_one_lead_takes_less_than_1_gib(tmp_path, fs, work, most_mib):
    """The command reads pieces, so that the rate does not count; embed holds all of it at its own rate."""
    minute = (1000 * draw_ecg(fs, 60)[0] + 20 * np.random.default_rng(0).normal(size=60 * fs)).astype("<i2")
    (tmp_path / "r.dat").write_bytes(np.tile(minute, 24 * 60).tobytes())
    (tmp_path / "r.hea").write_text(f"r 1 {fs} {24 * 3600 * fs}\nr.dat 16 1000 16 0 0 0 0 II\n")
    code = DAY.format(root=str(ROOT), work=work)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    print(fs, work, done.stdout)
    assert float(done.stdout.split()[-1]) < most_mib


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def command(*words):
    return model.main(model.parse_args([str(word) for word in words]))


def write_ecg(folder, name, seconds=10, leads=("II", "V1"), **more):
    adc = np.rint(1000 * draw_ecg(more.get("fs", FS), seconds, leads).T)
    write(folder, name, adc, leads, gain=1000, baseline=0, **more)


@pytest.fixture
def mine(tmp_path, saved):
    """A folder with recordings of all kinds, with things that are none, and with damaged ones; and an encoder."""
    folder = tmp_path / "mine"
    write_ecg(folder, "a", 12)
    write_ecg(folder, "sub/b", 7, TWELVE, fs=500)
    write_ecg(folder, "s1", 4)
    write_ecg(folder, "s2", 5)
    (folder / "s.hea").write_text(f"s/2 2 {FS} {9 * FS}\ns1 {4 * FS}\ns2 {5 * FS}\n")
    write_edf(folder / "sub" / "c.EDF", [("ECG II", "uV", -32768, 32767, -32768, 32767,
                                          np.rint(1000 * draw_ecg(FS, 6)).reshape(6, FS))])
    rows = [f"{a},{b}" for a, b in draw_ecg(200, 9, ("II", "V1")).T]
    (folder / "sub" / "a.csv").write_text("\n".join(["II,V1", *rows]))
    np.save(folder / "flat.npy", np.zeros((1, 3000)))
    (folder / "bad.hea").write_text("bad 1 250 1000\nbad.dat 16 200 16 0 0 0 0 II\n")
    (folder / "scan.pdf").write_bytes(b"%PDF")
    (folder / "a.mat").write_bytes(b"not of record a")
    return folder, saved


def test_features_of_files(mine, tmp_path, capsys):
    folder, saved = mine
    out, loaded = tmp_path / "new" / "f.npz", load_encoder(saved)
    assert command(folder, "--encoder", saved, "--out", out) == 0
    found, printed = dict(np.load(out)), capsys.readouterr().out
    assert found["path"].tolist() == [str(folder / name) for name in ("a", "s", "sub/b", "sub/c.EDF")]
    assert found["features"].dtype == np.float32 and found["n_leads"].tolist() == [2, 2, 12, 1]
    for path, features in zip(found["path"], found["features"]):
        assert_close(features, loaded.embed(read_wfdb(path)).global_feature, atol=1e-6)
    assert found["leads"].tolist() == ["II;V1", "II;V1", ";".join(TWELVE), "ECG II"]
    assert found["seconds"].tolist() == [12, 9, 7, 6]
    assert found["failed"].tolist() == [str(folder / "bad")] and "bad.dat is not there" in found["reasons"][0]
    about = json.loads(str(found["about"]))
    assert about["encoder"] == str(saved) and "no medical device" in about["use"] and len(about["sha256"]) == 64
    assert about["config"]["window_patches"] == {"8": 25, "1": 40}
    assert "4 recordings, 4 of the 5 found here" in printed and f"failed {folder / 'bad'}: bad.dat is not" in printed
    assert {"not read here: 1 .csv", "not read here: 1 .npy", "not read here: 1 .pdf"} <= {
        line.strip() for line in printed.splitlines()} and not list(out.parent.glob("*.tmp"))


def test_arrays_and_single_files(mine, tmp_path):
    """Arrays need a rate; a file that a header names is a part of its record; each recording counts once."""
    folder, saved = mine
    out, csv = tmp_path / "f.npz", folder / "sub" / "a.csv"
    files = [folder / "a.hea", folder / "a", folder / "a.dat", folder / "a.mat", csv, folder / "flat.npy",
             folder / "scan.pdf", folder / "none", folder / "sub"]
    assert command(*files, "--encoder", saved, "--out", out, "--fs", 200) == 0
    found = np.load(out)
    assert found["path"].tolist() == [str(folder / name) for name in ("a", "sub/a.csv", "sub/b", "sub/c.EDF")]
    expected = load_encoder(saved).embed(draw_ecg(200, 9, ("II", "V1")), fs=200, leads=["II", "V1"])
    assert_close(found["features"][1], expected.global_feature)
    reasons = dict(zip(found["failed"].tolist(), found["reasons"].tolist()))
    assert set(reasons) == {str(folder / name) for name in ("a.mat", "flat.npy", "scan.pdf", "none")}
    assert "no names of leads" in reasons[str(folder / "flat.npy")]
    assert ".pdf is not read here: expected a WFDB record" in reasons[str(folder / "scan.pdf")]
    assert "none.hea is not there" in reasons[str(folder / "none")]
    assert command(csv, "--encoder", saved, "--out", tmp_path / "g.npz") == 1              # without a rate
    (folder / "k.hea").write_text("k 1 250 10\nk.mat 16+24 200 16 0 0 0 0 II\n")
    (folder / "k.mat").write_bytes(bytes(44))
    assert [*list_recordings(folder / "k.mat", {}, True)] == [folder / "k"]
    listed = {path.name for path in list_recordings(folder, {}, True)}
    assert {"a", "a.mat", "a.csv", "k", "s"} <= listed and not {"k.mat", "s1", "s2"} & listed
    assert "expected the sampling rate" in np.load(tmp_path / "g.npz")["reasons"][0]
    words = ["--encoder", saved, "--out", tmp_path / "h.npz", "--fs", 200, "--leads", "I"]
    assert command(folder / "flat.npy", *words) == 1


def test_an_interrupted_command_goes_on(mine, tmp_path, monkeypatch):
    """Nothing that was computed is lost, and nothing is computed again."""
    folder, saved = mine
    once, twice, read = tmp_path / "once.npz", tmp_path / "twice.npz", []

    def interrupted(path, *about):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(path)
        return read_any(path, *about)
    assert command(folder, "--encoder", saved, "--out", once) == 0
    monkeypatch.setattr(model, "read_any", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(folder, "--encoder", saved, "--out", twice)
    assert np.load(twice)["path"].tolist() == [str(folder / "a")] and np.load(twice)["failed"].tolist() == [
        str(folder / "bad")]
    monkeypatch.setattr(model, "read_any", lambda path, *about: read.append(path) or read_any(path, *about))
    assert command(folder, "--encoder", saved, "--out", twice) == 0
    assert read[2:] == [str(folder / name) for name in ("bad", "s", "sub/b", "sub/c.EDF")]
    assert all(np.array_equal(a, b) for a, b in zip(np.load(once).values(), np.load(twice).values(), strict=True))


def test_features_are_written_while_it_runs(mine, tmp_path, monkeypatch):
    folder, saved = mine
    held = []

    def peeking(path, *about):
        held.append(len(np.load(tmp_path / "f.npz")["path"]) if (tmp_path / "f.npz").exists() else None)
        return read_any(path, *about)
    monkeypatch.setattr(model, "SAVE_S", 0)
    monkeypatch.setattr(model, "read_any", peeking)
    command(folder, "--encoder", saved, "--out", tmp_path / "f.npz")
    assert held == [None, 1, 1, 2, 3]


def test_sigterm_ends_it_with_what_it_has(mine, tmp_path):
    """A header that is a pipe shows when the program has come to it."""
    folder, saved = mine
    os.mkfifo(tmp_path / "pipe.hea")
    words = [ROOT / "model.py", folder / "a", tmp_path / "pipe.hea", "--encoder", saved, "--out", "f.npz"]
    process = subprocess.Popen([sys.executable, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    pipe, deadline = None, time.monotonic() + 120
    while pipe is None and process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):                              # nobody reads it yet
            pipe = os.open(tmp_path / "pipe.hea", os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    process.send_signal(os_signal.SIGTERM)
    assert "the same command goes on" in process.communicate(timeout=60)[1] and process.returncode == 1
    assert np.load(tmp_path / "f.npz")["path"].tolist() == [str(folder / "a")]
    os.close(pipe)


def test_tables_of_others_are_kept(mine, tmp_path):
    folder, saved = mine
    out = tmp_path / "f.npz"
    command(folder / "a", "--encoder", saved, "--out", out)
    before = out.read_bytes()
    for words in (["--encoder", "random:tiny"], ["--encoder", saved, "--fs", 100]):
        with pytest.raises(ValueError, match=r"made otherwise \(.*, now .*\); choose another name"):
            command(folder / "a", "--out", out, *words)
    np.savez(tmp_path / "g.npz", x=1)
    with pytest.raises(ValueError, match="g.npz is no table of features .*; choose another name"):
        command(folder / "a", "--out", tmp_path / "g.npz", "--encoder", saved)
    assert out.read_bytes() == before
    command(folder / "sub", "--encoder", saved, "--out", out)           # the same way: it is added to
    assert np.load(out)["path"].tolist() == [str(folder / name) for name in ("a", "sub/b", "sub/c.EDF")]


def test_long_files_are_read_in_pieces(encoder, tmp_path, monkeypatch):
    """Each piece counts by its valid patches; one that cannot be used is noted."""
    signal = draw_ecg(FS, 240, ("II", "V1")).T
    signal[60 * FS:120 * FS] = np.nan
    signal[130 * FS:150 * FS, 1] = np.nan
    steps = np.where(np.isnan(signal), -32768, np.rint(1000 * signal)).astype(int)
    write(tmp_path, "r", steps, gain=1000, baseline=0)
    monkeypatch.setattr(ecg, "PIECE_S", 60)
    (feature, leads, n_leads, seconds, notes), first = ecg.features_of_pieces(encoder.embed, read_any(tmp_path / "r"))
    assert (leads, n_leads, seconds) == ("II;V1", 2, 180) and first.signal.shape == (60 * FS, 2)
    assert notes.startswith("left out from 60 s on: no sample of this recording is usable")
    pieces = [encoder.embed(np.where(steps == -32768, np.nan, steps / 1000)[s * FS:(s + 60) * FS], fs=FS,
                            leads=["II", "V1"]) for s in (0, 120, 180)]
    weights = [np.isfinite(piece.local_features[..., 0]).sum() for piece in pieces]
    assert weights == [600, 500, 600]
    assert_close(feature, sum(np.float32(w / 1700) * piece.global_feature for w, piece in zip(weights, pieces)))
    whole = encoder.embed(read_wfdb(tmp_path / "r"))                    # windows across the pieces, nothing else
    assert np.abs(whole.global_feature - feature).max() < 0.05 * np.abs(feature).std()


def test_pictures_of_files(mine, tmp_path):
    """One for each, below the folder as the recordings are; those that are there are not drawn again."""
    folder, saved = mine
    words = [folder / "a", folder / "sub", "--encoder", saved, "--out", tmp_path / "f.npz"]
    assert command(*words) == command(*words, "--plot", tmp_path / "plots") == 0
    names = ("a.png", "sub/b.png", "sub/c.EDF.png")
    pictures = [tmp_path / "plots" / name for name in names]
    assert sorted(path for path in (tmp_path / "plots").rglob("*") if path.is_file()) == pictures
    before = [path.stat().st_mtime_ns for path in pictures[:2]]
    pictures[2].unlink()
    command(*words, "--plot", tmp_path / "plots")
    assert [path.stat().st_mtime_ns for path in pictures[:2]] == before and pictures[2].exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        model.parse_args(["--help"])
    text = capsys.readouterr().out
    examples = re.findall(r"python model\.py (.*?)(?:  +#.*)?\n", text)
    assert len(examples) == 3 and "No medical device" in text and "failed and reasons" in text
    for example in examples:
        model.parse_args(example.split())


def test_own_labels_as_the_readme_says(tmp_path, monkeypatch, capsys):
    """From files and a CSV to an AUROC with an interval, on two kinds of heart; a tenth have the wrong label."""
    section = (ROOT / "README.md").read_text().partition("### From a CSV")[2].partition("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert sum(bool(line) and not line.startswith(("import", "from")) for line in code.split("\n")) <= 10
    monkeypatch.chdir(tmp_path)
    labels = []
    for i in range(101):
        patient = i // 2
        kind = patient % 2
        signal = draw_ecg(FS, 2, ("II", "V1"), rr_s=0.7 + 0.01 * (7 * i % 30)) * (0.4 if kind else 1.5)
        write(tmp_path / "my_ecgs", f"r{i:03d}", np.rint(1000 * signal.T), gain=1000, baseline=0)
        labels.append(f"my_ecgs/r{i:03d},p{patient},{kind ^ (patient % 10 == 3)}")
    labels[100] = "my_ecgs/absent,p99,1"                                # so r100 has no label
    (tmp_path / "labels.csv").write_text("\n".join(["path,patient,label", *labels[::-1]]))
    assert command("my_ecgs") == 0
    names = {}
    with torch.enable_grad():
        exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()[-1]
    auroc, low, high = map(float, re.fullmatch(r"AUROC ([.\d]+) \[([.\d]+), ([.\d]+)\]", printed).groups())
    train, test, patient = (names[name] for name in ("train", "test", "patient"))
    assert not {*patient[train]} & {*patient[test]} and len(train) + len(test) == 100
    wins = [(a > b) + (a == b) / 2 for a in names["score"][names["y"][test]] for b in names["score"][~names["y"][test]]]
    assert auroc == round(np.mean(wins), 3) and 0.5 < low < auroc < high <= 1, printed


# ---------------------------------------------------------------------------------------------------------------------
# pictures

def test_attention_of_cls_equals_plain_code():
    encoder, inputs = lively(), []
    signal, leads = torch.from_numpy(draw_ecg(FS, 3, ("I", "V2"))).float()[None], torch.tensor([[1, 8]])
    signal = torch.cat((signal, 0.5 * signal.roll(40, -1)))
    signal[1, 0, 200] = np.nan
    with torch.no_grad():
        features, attention = model.cls_attention(encoder, signal, leads.expand(2, -1))
        hook = encoder.blocks[-1].norm1.register_forward_hook(lambda module, x, out: inputs.append(out))
        expected = encoder(signal, leads.expand(2, -1))
        hook.remove()
        torch.testing.assert_close(features.patches, expected.patches, rtol=0, atol=0, equal_nan=True)
        times_s = [0.0] * 5 + 2 * [(n + 0.5) * 50 / FS for n in range(15)]
        for tokens, valid, found in zip(inputs[0].double().view(2, 35, -1), expected.valid, attention, strict=True):
            weights = torch.zeros(2, 35).double()
            for head, part in enumerate((slice(0, 16), slice(16, 32))):
                q, k = (tokens @ encoder.blocks[-1].attention.qkv.weight.double().T).split(32, dim=1)[:2]
                for m in [*range(5), *(5 + i for i in range(30) if valid.flatten()[i])]:
                    weights[head, m] = torch.exp(plain_rotate(q[0, part], 0) @ plain_rotate(k[m, part], times_s[m]) / 4)
            weights = (weights / weights.sum(dim=1, keepdim=True)).mean(dim=0)
            torch.testing.assert_close(found.flatten().double(), weights[5:], rtol=0, atol=1e-6)
    assert attention[1, 0, 4] == 0 and (attention.sum((1, 2)) < 1).all() and not torch.equal(*attention)


def test_the_window_that_is_drawn():
    """The first one without gaps, of the leads that it has; every 20 ms as if the recording began later."""
    encoder, signal = small_encoder(), draw_ecg(FS, 20, ("I", "II", "V1")).astype(np.float32)
    signal[1, 2 * FS] = signal[2] = np.nan
    start_s, names, shown, features, attention, times_s = model.window_to_draw(
        encoder, Recording(signal, FS, ("I", "MLII", "V1")))
    assert start_s == pytest.approx(2.2) and names == ["I", "MLII"] and np.array_equal(shown, signal[:2, 550:2550])
    assert features.shape == (2, 400, WIDTH) and attention.shape == (2, 400)
    np.testing.assert_allclose(times_s, 0.1 + 0.02 * np.arange(400))
    for shift in (0, 3):
        window = torch.from_numpy(signal[None, :2, 550 + 5 * shift:2550 + 5 * shift])
        with torch.no_grad():
            expected, of_cls = model.cls_attention(encoder, window, torch.tensor([[1, 2]]))
        np.testing.assert_allclose(features[:, shift::10], expected.patches[0], atol=1e-5)
        np.testing.assert_allclose(attention[:, shift::10], of_cls[0] / of_cls[0].mean(), rtol=1e-4)


@pytest.mark.parametrize("seconds, leads", [(0.2, ("II",)), (0.25, ("V7",)), (3, TWELVE), (30, ("I", "x", "y"))])
def test_any_recording_can_be_drawn(tmp_path, seconds, leads):
    signal = draw_ecg(500, seconds, leads)
    signal[0, 50:60] = np.nan if seconds > 1 else signal[0, 50:60]
    model.draw_recording(small_encoder(), Recording(signal.T, 500, leads), tmp_path / "a" / "b.png")
    assert (tmp_path / "a" / "b.png").read_bytes()[:4] == PNG


# ---------------------------------------------------------------------------------------------------------------------
# real recordings

def test_real_recordings(encoder, shared_data):
    """MIT-BIH 114 (leads in the other order) for 30 min, and a PTB-XL record at both of its rates."""
    record = wfdb.rdrecord(str(shared_data / "mitdb" / "114"))
    out = encoder.embed(record.p_signal, fs=record.fs, leads=record.sig_name)
    assert record.sig_name == ["V5", "MLII"] and out.local_features.shape == (2, 9027, 32)
    assert np.isfinite(out.global_feature).all()
    path = next((shared_data / "ptbxl" / "records500").rglob("*.hea"))
    low = path.parents[2] / "records100" / path.parent.name / path.name.replace("_hr", "_lr")
    fast, slow = (wfdb.rdrecord(str(p.with_suffix(""))) for p in (path, low))
    a, b = (encoder.embed(r.p_signal, fs=r.fs, leads=r.sig_name) for r in (fast, slow))
    assert a.local_features.shape == b.local_features.shape == (12, 50, 32)
    spread = a.local_features.std(axis=(0, 1)).mean()
    assert np.median(np.abs(a.local_features - b.local_features)) < 0.1 * spread
