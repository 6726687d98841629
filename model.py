"""The ECG encoder: a Vision Transformer over (lead, time) patches, for any number of leads and any duration.

Every lead is cut into patches of PATCH_S seconds; one linear layer, shared by all leads, turns a patch into a token.
A lead is known by its name: a learned vector per named lead is added to its tokens. Time enters as rotary position in
seconds, so nothing is padded or resized. Missing leads and patches have no token, or one that no other token can see.

    encoder = load_encoder("tiny")               # or "runs/real/encoder.pt", or "random:tiny" for an untrained one
    out = encoder.embed(signal, fs=360, leads=["MLII", "V1"])       # any recording, or a list of recordings: Embedding
    features = encoder(signal_mv, lead_ids)                         # windows at 250 Hz, with gradients: Features
    python model.py FILE_OR_FOLDER ...           # features of files, in a table and as pictures; --help says more

Shapes: B batch, L leads, T samples, P samples of a patch, N patches of a lead (T / P), M tokens (1 + R + L*N),
R registers, H heads, E width of a head, D width, Z tokens of several batches of windows, one after the other (the sum
of B * M). Signals are in mV at FS Hz.
"""
import argparse
import contextlib
import importlib
import inspect
import math
import os
import signal as os_signal
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ecg import (FS, LEADS, MAX_LEADS, NOT_READ, FeatureTable, RecordingFeatures, as_recordings, cut_patches,
                 cut_windows, draw_ecg_paper, features_of_pieces, list_recordings, read_any, save_figure, sha256,
                 warn_of)

PATCH_S = 0.2                    # s; a QRS complex is about half of it
REGISTERS = 4                    # extra tokens that hold global scratch values (Darcet et al. 2024)
ROPE_PERIODS_S = (0.4, 40.0)     # s; from two patches to a few windows, geometric over the frequency pairs of a head
# The mean over this many patches (1.4 s, more than a beat) around a sample is its baseline, which is subtracted.
BASELINE_PATCHES = 7
# Standard deviation of the lead vectors at the start; tokens have about unit variance. Features must differ between
# leads before they are averaged over leads.
LEAD_STD = 0.5
TOKEN_STD = 0.02                 # standard deviation of CLS and registers at the start
# Leads that build_encoder shows upside down: a healthy QRS points down in aVR, and networks go by its direction far more
# than by the name of the lead (LOG.md). Upside down, as in Cabrera's order, aVR lies between I and II.
TURNED = ("aVR",)
# mV; linear below, logarithmic above: P and ST still count next to an R ten times as high, and a higher R stays higher.
COMPRESS_MV = 0.1
NORM_EPS = 1e-5
SPREAD_EPS = 1e-6               # keeps the gradient of a standard deviation of 0 finite
# {number of leads or more: patches of a lead}: 5 s for 8 leads or more, 8 s for fewer. train.py stores its own lengths.
WINDOW_PATCHES = {8: 25, 1: 40}
BEAT_WINDOW_S = 8.0              # s, limit for the window of a beat, so that an encoder of longer windows costs no more
BEAT_BATCH = 16                  # windows, one per beat, in a forward pass
AROUND_S = (-0.3, 0.4)           # s from R: the neighbourhood, from the P wave to the end of most T waves
MAX_EMBED_TOKENS = 4096          # patches that embed() runs at once; limits memory, does not change results
# Up to so many tokens, plain batched products are 3 to 6 times as fast in bf16 on a CPU as torch's flash kernel.
MAX_BATCHED_TOKENS = 512
# A scaled copy of a weight with more numbers than this would take much memory until the backward pass.
MAX_SCALED_WEIGHT = 2 ** 22
ONE_BY_ONE_WIDTH = 256           # up to this width a CPU is faster if it takes batches of windows one after the other
PRETRAINED = Path(__file__).with_name("pretrained")      # SIZE.pt, for load_encoder(SIZE)
FORMAT, GIVE = "ecg-dino encoder 3", "give the encoder.pt that train.py wrote"
SHIFT_SAMPLES = 5                # samples at FS between the local features in draw_recording
ATTENTION_COLOURS = ["#9aa7b5", "#f08a3c", "#8b0000"]  # there, from the least to the most
SAVE_S = 60                      # s between two writes of --out, which a power cut then costs at most
INTENDED_USE = "Research on ECG features; no medical device, not validated for diagnosis."
PREPROCESSING = dict(fs_hz=FS, units="mV", leads=list(LEADS), baseline_patches=BASELINE_PATCHES,
                     compress_mv=COMPRESS_MV)  # stored with the weights

# LayerScale starts near 1 in shallow networks (otherwise a short run trains little more than the patch embedding), and
# tiny in deep ones.
SIZES = {
    "tiny": dict(width=128, depth=6, heads=4, layer_scale=1.0),
    "small": dict(width=384, depth=12, heads=6, layer_scale=0.1),
    "base": dict(width=768, depth=12, heads=12, layer_scale=1e-2),
    "large": dict(width=1024, depth=24, heads=16, layer_scale=1e-5),
    "huge": dict(width=1280, depth=32, heads=20, layer_scale=1e-5),
    "7b": dict(width=4096, depth=40, heads=32, layer_scale=1e-5),
}


class Features(NamedTuple):
    """The output of the encoder for a batch of windows."""
    cls: torch.Tensor            # (B, D)
    registers: torch.Tensor      # (B, R, D)
    patches: torch.Tensor        # (B, L, N, D) local features, NaN where not valid
    valid: torch.Tensor | None = None  # (B, L, N) bool: the patches without a missing sample; None: all of them

    def pooled(self):
        """[CLS, mean of the valid patches] (B, 2D), which the DINO head sees. Without any valid patch the mean is 0."""
        if self.valid is None:
            mean = self.patches.mean((1, 2))
        else:
            valid = self.valid[..., None]
            mean = torch.where(valid, self.patches, 0.0).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
        return torch.cat((self.cls, mean), dim=1)

    def global_feature(self):
        """[CLS, mean and standard deviation of the valid patches] (B, 3D): the global feature of a window. The probes
        use it, and embed() averages it over windows. A mean hides how leads and times differ; the deviation shows it.
        Without any valid patch the mean is 0 and the deviation .001."""
        pooled = self.pooled().float()
        away = self.patches.float() - pooled[:, None, None, self.cls.shape[1]:]
        count = away[0, ..., 0].numel()
        if self.valid is not None:
            away, count = torch.where(self.valid[..., None], away, 0.0), self.valid.sum((1, 2)).clamp(min=1)[:, None]
        return torch.cat((pooled, (away.square().sum((1, 2)) / count + SPREAD_EPS).sqrt()), dim=1)


class Embedding(NamedTuple):
    """The output of embed() for a recording, as arrays."""
    global_feature: np.ndarray   # (3D,) Features.global_feature(), mean over windows, weighted by their valid patches
    cls: np.ndarray              # (D,) the first third of it
    local_features: np.ndarray | None  # (L, N, D); NaN where a patch has missing samples; None if not asked for
    times_s: np.ndarray | None   # (N,) centre of each patch, seconds from the start of the recording


# ---- blocks ---------------------------------------------------------------------------------------------------------
def rope_table(times_s, head_width):
    """Rotary position at times_s (M,) seconds: cosine and sine (M, E/2, 2). Angles are in fp32, because bf16 loses
    positions. At 0 s nothing is rotated."""
    shortest, longest = ROPE_PERIODS_S
    exponent = torch.arange(head_width // 2, device=times_s.device, dtype=torch.float32) / (head_width // 2 - 1)
    angle = 2 * math.pi * times_s.float()[:, None] / (shortest * (longest / shortest) ** exponent)
    if torch.compiler.is_compiling():            # see rotate
        return torch.stack((angle.cos(), angle.sin()), dim=-1)
    return torch.view_as_real(torch.polar(torch.ones_like(angle), angle))     # bit for bit as in training


def rotate(x, rope):
    """Rotate the pairs (2i, 2i + 1) of x (B, M, 2, H, E), queries and keys, by rope (M, E/2, 2) (Su et al. 2021)."""
    pairs, rope = x.float().unflatten(-1, (-1, 2)), rope[:, None, None]
    if torch.compiler.is_compiling():            # also in an export: inductor and ONNX have no complex numbers
        a, b, cos, sin = *pairs.unbind(-1), *rope.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:                                        # one complex product: in eager mode 3 to 20 times as fast on one core
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


def attend(q, k, v, seen=None):
    """softmax(q k^T / sqrt(E)) v of q, k, v (B, H, M, E) -> (B, H, M, E); seen (B, M) bool: the tokens that can be
    seen; None: all."""
    B, H, M, E = q.shape
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or M > MAX_BATCHED_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if seen is None else seen[:, None, None])
    q, k, v = (t.reshape(B * H, M, E) for t in (q, k, v))
    hidden = q.new_zeros(1, 1, 1)
    if seen is not None:
        hidden = q.new_zeros(seen.shape).masked_fill(~seen, -math.inf).repeat_interleave(H, dim=0)[:, None]
    scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=E ** -0.5)                              # (B * H, M, M)
    return torch.bmm(scores.softmax(dim=-1), v).view(B, H, M, E)


def context_of(outputs):
    """LayerNorm of the mean of the outputs of blocks: (B, M, D) each -> (B, M, D), fp32. First each channel of a block
    gets mean 0 and deviation 1 over the patches of a recording. The target of data2vec (Baevski et al. 2022)."""
    scaled = [F.instance_norm(x.float().transpose(1, 2)) for x in outputs]
    return F.layer_norm((sum(scaled) / len(scaled)).transpose(1, 2), outputs[0].shape[-1:])


def join(parts):
    """torch.cat, without a copy of a single tensor."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def scaled_linear(x, linear, scale):
    """scale * linear(x), as one matrix product: x (..., in), scale (out,)."""
    if linear.weight.numel() > MAX_SCALED_WEIGHT:
        return scale * linear(x)
    return F.linear(x, linear.weight * scale[:, None], linear.bias * scale)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x, scale, shapes, ropes, keys):
        """scale (D,) times the attention of x (Z, D), tokens of several batches: shapes ((B, M), ...), ropes (one
        (M, E/2, 2) each) and keys (one (B, M) bool each, the tokens that can be seen; None: all) say what belongs
        together."""
        parts = []
        for qkv, (B, M), rope, seen in zip(self.qkv(x).split([B * M for B, M in shapes]), shapes, ropes, keys):
            qk, v = qkv.view(B, M, 3, self.heads, -1).split([2, 1], dim=2)
            q, k, v = (t.transpose(1, 2) for t in (*rotate(qk, rope).unbind(2), v[:, :, 0]))       # (B, H, M, E) each
            parts.append(attend(q, k, v, seen).transpose(1, 2).reshape(B * M, -1))
        return scaled_linear(join(parts), self.proj, scale)


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale (Touvron et al. 2021)."""

    recompute = False            # keep only the input of the block, and compute the rest again in the backward pass

    def __init__(self, width, heads, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads)
        self.scale1 = nn.Parameter(torch.full((width,), float(layer_scale)))
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale2 = nn.Parameter(torch.full((width,), float(layer_scale)))

    def forward(self, x, *layout):               # shapes, ropes, keys: see Attention
        if self.recompute and torch.is_grad_enabled():                                         # nothing is random here
            return checkpoint(self.run, x, *layout, use_reentrant=False, preserve_rng_state=False)
        return self.run(x, *layout)

    def run(self, x, *layout):
        x = x + self.attention(self.norm1(x), self.scale1, *layout)
        return x + scaled_linear(self.mlp[:-1](self.norm2(x)), self.mlp[-1], self.scale2)


# ---- the encoder ----------------------------------------------------------------------------------------------------
class Encoder(nn.Module):
    """ViT over (lead, time) patches.

    `config` holds all that is needed to build it again. `init_seed` decides its first weights. `window_patches`,
    {number of leads or more: patches}, has the lengths of its training windows; embed() cuts longer recordings into
    such windows. `turned`: names of leads that it turns upside down. Under torch.device("meta") it is built without
    memory; to_empty() and init_weights(), or load_state_dict(assign=True), then fill it. ValueError for a width that
    does not fit the heads.
    """

    sharded = False              # whether FSDP holds the weights, see encode
    precision = "auto"           # of embed(), see precision_of
    about = {}                   # what its file says about it: command, commit, ...

    def __init__(self, width, depth, heads, layer_scale, init_seed=0, window_patches=WINDOW_PATCHES,
                 patch_samples=round(PATCH_S * FS), registers=REGISTERS, turned=()):
        super().__init__()
        if width % (2 * heads) or width // heads < 4:
            raise ValueError(f"width {width} with {heads} heads: rotary position needs heads of an even width, "
                             "4 or more; choose another width")
        self.config = dict(width=width, depth=depth, heads=heads, layer_scale=layer_scale, init_seed=init_seed,
                           window_patches=dict(window_patches), patch_samples=patch_samples, registers=registers,
                           turned=list(turned))
        self.width, self.patch_samples, self.num_registers = width, patch_samples, registers
        self.head_width = width // heads
        self.patch_embedding = nn.Linear(patch_samples, width)
        self.lead_embedding = nn.Embedding(len(LEADS), width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_tokens = nn.Parameter(torch.empty(1, registers, width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        if not self.cls_token.is_meta:
            self.init_weights()

    def first_weights(self):
        """Yield every parameter with its first value, a CPU tensor, one by one; config["init_seed"] decides the values.

        Linear layers: truncated normal with variance 1 / fan-in. The usual deviation of 0.02 fits width 2,500; with it
        a narrow network would hardly use its blocks.
        """
        generator = torch.Generator().manual_seed(self.config["init_seed"])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                value, std = torch.empty(module.weight.shape, device="cpu"), module.in_features ** -0.5
                yield module.weight, nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)
        for tokens, std in ((self.lead_embedding.weight, LEAD_STD), (self.cls_token, TOKEN_STD),
                            (self.register_tokens, TOKEN_STD)):
            yield tokens, torch.empty(tokens.shape, device="cpu").normal_(std=std, generator=generator)
        for name, vector in self.named_parameters():
            if vector.ndim == 1:                 # weights of norms, LayerScale, biases, mask token
                value = self.config["layer_scale"] if "scale" in name else float("norm" in name and "weight" in name)
                yield vector, torch.full(vector.shape, value, device="cpu")

    @torch.no_grad()
    def init_weights(self):
        for parameter, value in self.first_weights():
            parameter.copy_(value)

    def forward(self, signal, leads, mask=None):
        """Features of windows, with gradients.

        signal (B, L, T) mV at FS Hz, T a multiple of P, NaN = missing: a patch with a missing sample, and so a whole
        missing lead, is hidden from every other token of its recording, and its own feature is NaN. leads (B, L) lead
        ids (places in ecg.LEADS; ecg.preprocess gives both). mask (B, L, N) bool: these patches are replaced by the
        mask token. Raises ValueError for other shapes; embed() takes any recording. torch.export and torch.onnx.export
        (dynamo=True) give the same features, of signals with NaN too.
        """
        return self.encode([(signal, leads, mask)], gaps=True)[0]

    def encode(self, views, gaps=False, context=False):
        """Features of each of several batches of windows (signal, leads, mask), see forward. gaps: look for NaN, and
        the host then waits for the device; otherwise the signals must be finite. context: return pairs of Features and
        the context_of the patches (B, L, N, D).

        Each block runs once, on the tokens of all batches, and FSDP then fetches its weights once. On a CPU a narrow
        network takes the batches one by one, because these fit the cache. The result is the same."""
        small = self.width <= ONE_BY_ONE_WIDTH and self.cls_token.device.type == "cpu"
        if small and len(views) > 1 and not self.sharded:
            return [features for view in views for features in self.encode([view], gaps, context)]
        first = 1 + self.num_registers           # tokens before the patches
        tokens, shapes, ropes, keys, valid = [], [], [], [], []
        for signal, leads, mask in views:
            if (signal.ndim != 3 or signal.shape[-1] % self.patch_samples or 0 in signal.shape
                    or leads.shape != signal.shape[:2]):
                raise ValueError(f"the encoder takes signal (B, L, T), T a multiple of {self.patch_samples} samples, "
                                 f"and leads (B, L); found {tuple(signal.shape)} and {tuple(leads.shape)}; "
                                 "encoder.embed() takes any recording")
            B, L, N = *leads.shape, signal.shape[-1] // self.patch_samples
            for name in self.config["turned"]:
                signal = torch.where((leads == LEADS.index(name))[..., None], -signal, signal)
            valid.append(self.valid_patches(signal) if gaps else None)
            patches = self.tokens(signal, mask, valid[-1]) + self.lead_embedding(leads)[:, :, None]
            x = torch.cat((self.cls_token.expand(B, -1, -1), self.register_tokens.expand(B, -1, -1),
                           patches.flatten(1, 2)), dim=1)                                              # (B, M, D)
            times_s = (torch.arange(N, device=signal.device) + 0.5) * (self.patch_samples / FS)
            # Lead-major, like x. CLS and registers have no time; they are put at 0 s, where nothing is rotated.
            ropes.append(rope_table(F.pad(times_s.repeat(L), (first, 0)), self.head_width))
            keys.append(None if valid[-1] is None else F.pad(valid[-1].flatten(1), (first, 0), value=True))
            shapes.append(tuple(x.shape[:2]))
            tokens.append(x.flatten(0, 1))
        x, outputs = join(tokens), []
        for block in self.blocks:
            x = block(x, shapes, ropes, keys)
            outputs += [x] if context else []
        features, layers = [], [layer.split([B * M for B, M in shapes]) for layer in (self.norm(x), *outputs)]
        for (x, *blocks), (B, M), (_, leads, _), seen in zip(zip(*layers), shapes, views, valid):
            x = x.view(B, M, self.width)
            patches = x[:, first:].unflatten(1, (leads.shape[1], -1))
            said = context_of([y.view_as(x)[:, first:] for y in blocks]).view_as(patches) if context else None
            if seen is not None:
                patches = torch.where(seen[..., None], patches, float("nan"))
            parts = x[:, 0], x[:, 1:first], patches
            if self.sharded:                     # FSDP attaches hooks to what a module returns: copies, not views
                parts = (part.contiguous() for part in parts)
            features.append((Features(*parts, seen), said) if context else Features(*parts, seen))
        return features

    def valid_patches(self, signal):
        """(B, L, N) bool: the patches without a missing sample; None if these are all, because attention is faster
        without a mask. A graph that is being traced must fit any signal, so it always gets a mask."""
        valid = signal.isfinite().unflatten(-1, (-1, self.patch_samples)).all(dim=-1)
        return None if not torch.compiler.is_compiling() and valid.all() else valid

    def tokens(self, signal, mask=None, valid=None):
        """Patch embedding (B, L, N, D), the mask token where mask (B, L, N); patches that are not valid are hidden."""
        hidden = mask
        if valid is not None:
            hidden = ~valid if mask is None else mask | ~valid
            signal = signal.nan_to_num(0.0, 0.0, 0.0)
        x = self.patch_embedding(self.front_end(signal, hidden).to(self.patch_embedding.weight.dtype))
        if mask is None:
            return x
        return torch.where(mask[..., None], self.mask_token.to(x.dtype), x)

    def front_end(self, signal, hidden=None):
        """Patches (B, L, N, P) without wander and compressed, of about unit variance; signal (B, L, T) mV, finite.

        Wander has most of the variance of a raw ECG and the least information. Training amplifies the differences that
        the teacher sees between recordings at first, and these must not be wander. ST levels survive, because the
        baseline is a mean over more than a beat. Patches that are hidden (B, L, N) are left out of the baseline of the
        others, otherwise masked content would leak into it.
        """
        patches = signal.float().unflatten(-1, (-1, self.patch_samples))
        seen = torch.ones_like(patches[..., :1]) if hidden is None else (~hidden)[..., None].float()
        # The mean of the lead is subtracted first, so that the baseline is 0 where no patch near by is seen.
        patches = (patches - (patches * seen).sum((2, 3), keepdim=True)
                   / (seen.sum((2, 3), keepdim=True) * self.patch_samples).clamp(min=1)) * seen
        near = dict(kernel_size=BASELINE_PATCHES, stride=1, padding=BASELINE_PATCHES // 2)
        baseline = (F.avg_pool1d(patches.mean(-1), **near)
                    / F.avg_pool1d(seen[..., 0], **near).clamp(min=0.5 / BASELINE_PATCHES))
        baseline = F.interpolate(baseline, size=signal.shape[-1], mode="linear").view_as(patches)
        return ((patches - baseline) / COMPRESS_MV).asinh()

    def embed(self, signal, *, fs=None, leads=None, units="mV", window_s=None, stride_s=None, local=True,
              on_error="raise", device=None):
        """Features of one recording or of many, with any leads, rate and duration; see ecg.preprocess.

        One: signal (L, T) or (T, L) in `units` (mV, uV or V), fs in Hz, leads: a name per lead; or an ecg.Recording.
        Returns Embedding. Many: a list, any other iterable, or an array (recordings, L, T) of such signals or
        Recordings; fs, leads and units: one for all, or one for each recording. Returns a list of Embedding. Windows of
        equal shape go through the network together, so this is faster than one by one and gives the same numbers.

        A recording longer than window_s (default: the training window for as many leads) is cut into windows every
        stride_s (default: half of window_s). Its global feature is the mean of Features.global_feature() over the
        windows, each weighted by the number of its valid patches. A local feature comes from the window whose centre is
        nearest.
        Samples after the last whole patch are left out. local=False: global features only; memory then hardly grows
        with the number of recordings that an iterable yields. Channels that are no ECG by their names have local
        features of NaN; one warning names them and the names that are not known. on_error="nan": a recording that
        cannot be used gets global features of NaN and no local ones, instead of a ValueError that names it. device:
        move the encoder there first; it stays there. The attribute `precision` of the encoder ("auto", "fp32", "bf16")
        decides how it computes, see precision_of; bf16 moves a global feature by about .5 % of its length.
        """
        if on_error not in ("raise", "nan"):
            raise ValueError(f"on_error is {on_error!r}; expected 'raise' or 'nan'")
        for name, value in (("window_s", window_s), ("stride_s", stride_s)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; expected seconds above 0")
        if device is not None:
            self.to(checked_device(device))
        recordings, many = as_recordings(signal, fs, leads, units)
        waiting, tokens, found, notes = [], 0, [], Counter()
        for number, recording in enumerate(progress_bar(recordings, signal) if many else recordings):
            try:
                patches, valid, lead_ids = cut_patches(recording, self.patch_samples, notes)
            except ValueError as error:
                if on_error == "raise":
                    raise ValueError(f"recording {number}: {error}" if many else str(error)) from error
                found.append(RecordingFeatures(None, (0, 0), self.width, local=False))
                continue
            rows = np.flatnonzero(valid.any(axis=1))                         # leads with a valid patch
            found.append(RecordingFeatures(rows, valid.shape, self.width, local))
            window, stride = self.window_and_stride(len(rows), window_s, stride_s)
            for start, part in cut_windows(patches[rows], window, stride):
                waiting.append((found[-1], start, part, lead_ids[rows]))
                tokens += part[..., 0].size
                if tokens > 8 * MAX_EMBED_TOKENS:                            # enough to find windows of equal shape
                    self.run_windows(waiting)
                    waiting, tokens = [], 0
        self.run_windows(waiting)
        warn_of(notes)
        found = [Embedding(*features.whole(self.patch_samples / FS)) for features in found]
        return found if many else found[0]

    @torch.inference_mode()
    def run_windows(self, windows):
        """Forward passes of windows (RecordingFeatures, first patch, patches, lead ids), equal shapes together."""
        groups, device = defaultdict(list), self.cls_token.device
        for window in windows:
            L, N, _ = window[2].shape
            groups[L, N, bool(np.isnan(window[2]).any())].append(window)
        for (L, N, _), group in groups.items():
            at_once = max(1, MAX_EMBED_TOKENS // (L * N))
            for i in range(0, len(group), at_once):
                owners, starts, patches, lead_ids = zip(*group[i:i + at_once])
                with low_precision(device, self.precision):
                    out = self(torch.from_numpy(np.stack(patches)).flatten(2).to(device),
                               torch.from_numpy(np.stack(lead_ids)).to(device))
                pooled = out.global_feature().cpu().numpy()
                weights = [L * N] * len(starts) if out.valid is None else out.valid.sum((1, 2)).tolist()
                local = [None] * len(starts) if owners[0].local is None else out.patches.float().cpu().numpy()
                for owner, *result in zip(owners, starts, pooled, weights, local):
                    owner.add(*result)

    def window_length(self, num_leads):
        """Length in patches of the training windows for this number of leads."""
        lengths = self.config["window_patches"]
        return lengths[max(n for n in lengths if n <= num_leads)]

    def window_and_stride(self, num_leads, window_s=None, stride_s=None):
        """Length and step of windows, in patches. Defaults: the training length for these leads, and half of it."""
        patch_s = self.patch_samples / FS
        window = self.window_length(num_leads) if window_s is None else max(1, round(window_s / patch_s))
        stride = max(1, window // 2) if stride_s is None else max(1, round(stride_s / patch_s))
        if stride > window:
            raise ValueError(f"stride_s {stride_s:g} is longer than window_s {window * patch_s:g}: patches between "
                             "windows would be lost; choose a shorter stride_s")
        return window, stride


def progress_bar(recordings, signal):
    """`recordings` with a progress bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return recordings
    return tqdm(recordings, desc="embedding", unit="recording", disable=None,
                total=len(signal) if hasattr(signal, "__len__") else None)


# ---- features of single heartbeats ----------------------------------------------------------------------------------
def place_windows(encoder, num_leads, num_samples, beats_s, window_s=BEAT_WINDOW_S):
    """Windows of K beats in a recording: first samples (K,) at FS, and their length in patches.

    R is in the middle of the window's middle patch, or as near to it as the ends of the recording allow. On a fixed
    grid half of the QRS complexes would lie across two patches. A recording shorter than a window is the whole window.
    """
    P = encoder.patch_samples
    N = min(encoder.window_length(num_leads), int(window_s * FS) // P, num_samples // P)
    r = np.rint(beats_s * FS).astype(int)
    return np.clip(r - N // 2 * P - P // 2, 0, num_samples - N * P), N


def token_features(encoder, signal_mv, lead_ids, beats_s, window_s=BEAT_WINDOW_S, change=None):
    """Features of K beats (K, 2D): the token of R (r_token), and the mean of the tokens around it. Means over leads and
    over patches leave out patches with a missing sample, which have no token. A beat without any token has NaN.

    signal_mv (L, T) and lead_ids (L,) of ecg.preprocess, beats_s (K,). change: a function of each batch of windows
    (B, L, T), their leads (B, L) and their places among the beats, that returns other windows.
    """
    start, N = place_windows(encoder, *signal_mv.shape, beats_s, window_s)
    if N == 0:
        return np.full((len(beats_s), 2 * encoder.width), np.nan)
    P, device, features = encoder.patch_samples, encoder.cls_token.device, []
    signal_mv, lead_ids, start = (torch.from_numpy(x) for x in (signal_mv, lead_ids, start))
    r = torch.from_numpy(np.rint(beats_s * FS).astype(int)) - start                        # (K,) in its window
    from_r = (torch.arange(N) + 0.5) * P - r[:, None]                                      # (K, N) centres of patches
    around = (from_r >= AROUND_S[0] * FS) & (from_r <= AROUND_S[1] * FS)
    for k in torch.arange(len(r)).split(BEAT_BATCH):
        windows = signal_mv.unfold(1, N * P, 1)[:, start[k]].transpose(0, 1)               # (B, L, T)
        leads = lead_ids.expand(len(k), -1)
        windows = windows if change is None else change(windows, leads, range(k[0], k[-1] + 1))
        with torch.inference_mode(), low_precision(device, encoder.precision):
            patches = encoder(windows.to(device), leads.to(device)).patches
        tokens = patches.float().cpu().nanmean(dim=1)                                      # (B, N, D)
        mean = torch.where(around[k][..., None], tokens, torch.nan).nanmean(dim=1)
        features.append(torch.cat((tokens[torch.arange(len(k)), (r[k] // P).clip(0, N - 1)], mean), dim=1))
    return torch.cat(features).numpy()


# ---- pictures -------------------------------------------------------------------------------------------------------
def principal_colours(features):
    """RGB in [0, 1] (L, M, 3) of local features (L, M, D). The mean of each lead is subtracted first: otherwise the
    colour would only show which lead it is."""
    from sklearn.decomposition import PCA        # features do not need it

    x = features - np.nanmean(features, axis=1, keepdims=True)
    x = np.nan_to_num(x).reshape(-1, x.shape[2])
    components = PCA(3, svd_solver="full").fit_transform(np.resize(x, (max(3, len(x)), x.shape[1])))[:len(x)]
    low, high = np.percentile(components, (2, 98), axis=0)
    return np.clip((components - low) / (high - low).clip(1e-12), 0, 1).reshape(*features.shape[:2], 3)


def cls_attention(encoder, signal, leads):
    """Features of windows by encoder(signal, leads), and the attention of CLS to each of their patches in the last
    block, mean over heads (B, L, N); with CLS itself and the registers it adds up to 1."""
    last, kept = encoder.blocks[-1].attention, []
    with last.register_forward_pre_hook(lambda module, inputs: kept.append(inputs)):
        features = encoder(signal, leads)
    x, _, ((B, M),), (rope,), (seen,) = kept[0]
    q, k = rotate(last.qkv(x).view(B, M, 3, last.heads, -1)[:, :, :2], rope).transpose(1, 3).unbind(2)  # (B, H, M, E)
    one_hot = torch.eye(M, dtype=q.dtype, device=q.device).expand(*q.shape[:2], M, M)        # their mean: the weights
    seen = None if seen is None else seen[:, None, None]
    attention = F.scaled_dot_product_attention(q[:, :, :1], k, one_hot, attn_mask=seen).mean(dim=1)[:, 0]
    return features, attention[:, 1 + encoder.num_registers:].view(features.patches.shape[:3])


@torch.no_grad()
def window_to_draw(encoder, recording):
    """The window of a recording with the most valid patches: its start in seconds, names of its leads, signal_mv (L, T)
    and, every SHIFT_SAMPLES, local features (L, M, D), attention of CLS as a multiple of the mean over patches (L, M),
    and their centres (M,) in seconds from the start of the window."""
    P = encoder.patch_samples
    patches, valid, ids = cut_patches(recording._replace(notes={}), P, {})
    N = min(encoder.window_length(valid.any(axis=1).sum()), valid.shape[1])
    first = int(np.convolve(valid.sum(axis=0), np.ones(N, int), "valid").argmax())
    rows = np.flatnonzero(valid[:, first:first + N].any(axis=1))[:MAX_LEADS]
    signal_mv = patches[rows, first:first + N + 1].reshape(len(rows), -1)              # one patch more, if there is one
    late = np.pad(signal_mv, ((0, 0), (0, P)), constant_values=np.nan)
    windows = np.stack([late[:, shift:shift + N * P] for shift in range(0, P, SHIFT_SAMPLES)])
    out, attention = cls_attention(encoder, *(torch.tensor(x, device=encoder.cls_token.device) for x in (
        windows, np.tile(ids[rows], (len(windows), 1)))))
    attention *= ((attention > 0).sum((1, 2)) / attention.sum((1, 2)).clamp(min=1e-12))[:, None, None]
    features, attention = (x.float().cpu().movedim(0, 2).flatten(1, 2).numpy() for x in (out.patches, attention))
    times_s = (np.arange(0, N * P, SHIFT_SAMPLES) + P / 2) / FS
    there = np.isfinite(features).any(axis=(0, 2))                     # not what ends after the recording
    names = [str(recording.leads[row]) for row in rows]
    return first * P / FS, names, signal_mv[:, :N * P], features[:, there], attention[:, there], times_s[there]


def draw_recording(encoder, recording, path):
    """A window of a recording on ECG paper, coloured by the principal components of its local features, and again by
    what CLS attends to."""
    from matplotlib.cm import ScalarMappable     # features do not need these
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    start_s, names, signal_mv, features, attention, times_s = window_to_draw(encoder, recording)
    shades = ScalarMappable(Normalize(0, max(2, np.nanpercentile(attention, 99)), clip=True),
                            LinearSegmentedColormap.from_list("attention", ATTENTION_COLOURS))
    nearest = np.abs(times_s[None] - np.arange(signal_mv.shape[1])[:, None] / FS).argmin(axis=1)
    figure = draw_ecg_paper(signal_mv, names, {
        "local features: principal components as red, green, blue": 0.85 * principal_colours(features)[:, nearest],
        "attention of CLS in the last block, mean over heads": shades.to_rgba(attention)[:, nearest]},
        f"{Path(path).stem}, from {start_s:g} s; 25 mm/s, 10 mm/mV; no medical device")
    axis = figure.axes[-1]                       # its scale comes under it, in mm as all on paper
    bar = axis.inset_axes((0, axis.get_ylim()[0] - 6, 80, 2.5), transform=axis.transData)
    figure.colorbar(shades, cax=bar, orientation="horizontal", label="1: as much as to the mean patch")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


# ---- files ----------------------------------------------------------------------------------------------------------
def save_encoder(encoder, path, state_dict=None, **about):
    """Write architecture, weights and preprocessing into one file. about: further facts for people, of plain types."""
    torch.save(dict(format=FORMAT, config=encoder.config, state_dict=state_dict or encoder.state_dict(),
                    preprocessing=PREPROCESSING, about=about), path)


def build_encoder(size, seed=0, **more):
    """An untrained encoder of a named size; more: other arguments of Encoder. ValueError for an unknown size."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {', '.join(SIZES)}")
    return Encoder(**SIZES[size], init_seed=seed, turned=TURNED, **more)


def untrained_like(encoder):
    """A new encoder with the first weights of `encoder`: its untrained control."""
    control = Encoder(**encoder.config).eval().to(encoder.cls_token.device)
    control.precision = encoder.precision
    return control


def file_of(path):
    """The file of an encoder that may be given by its size."""
    return PRETRAINED / f"{path}.pt" if str(path) in SIZES and not Path(path).is_file() else path


def load_encoder(path, device="cpu"):
    """Encoder in eval mode: "tiny", which comes with the program (its file says from what data, and how good it is);
    from an encoder.pt; or untrained, "random:SIZE" or "random:SIZE:SEED". ValueError for a device that is not there,
    for a file that is no encoder, and for one that is damaged, each with its own text."""
    device, path = checked_device(device), file_of(path)
    if str(path).startswith("random:"):
        _, size, *seed = str(path).split(":")
        if seed and not seed[0].isdigit():
            raise ValueError(f"{path}: expected random:SIZE or random:SIZE:SEED, the seed a whole number")
        return build_encoder(size, int(seed[0]) if seed else 0).eval().to(device)
    saved = read_encoder(path)
    try:
        with torch.device("meta"):               # do not draw weights that are replaced at once
            encoder = Encoder(**saved["config"])
        encoder.load_state_dict(saved["state_dict"], assign=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged: its weights do not fit its architecture ({first_line(error)}); copy or "
                         "export it again") from error
    encoder.about = saved.get("about", {})
    return encoder.eval().to(device, torch.float32)


def precision_of(device, asked="auto"):
    """"fp32" or "bf16" (matrix products in bf16, weights and losses in fp32). "auto" is bf16 on a GPU and on a CPU that
    multiplies bf16 natively (AVX-512 BF16, AMX), fp32 elsewhere."""
    if asked != "auto":
        return asked
    # The capability obeys the environment variable ATEN_CPU_CAPABILITY.
    native = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if torch.device(device).type == "cuda" or native else "fp32"


def low_precision(device, precision):
    """Context in which matrix products run in bf16, if `precision` is "bf16", or "auto" and precision_of says so."""
    low = precision_of(device, precision) == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16) if low else contextlib.nullcontext()


def checked_device(device):
    """torch.device; ValueError if there is no such device here."""
    try:
        return torch.empty(1, device=device).device
    except Exception as error:                   # each backend has errors of its own
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] * torch.backends.mps.is_available()
        raise ValueError(f"device {device!r} cannot be used here: PyTorch {torch.__version__} finds {', '.join(here)} "
                         f"({first_line(error)}); use device='cpu'") from error


def read_encoder(path):
    """The content of an encoder.pt, on the CPU."""
    if not Path(path).is_file():
        raise ValueError(f"no encoder at {path}; tiny comes with the program, train.py writes RUN/encoder.pt, and "
                         "random:tiny is an untrained one")
    if is_damaged(path):
        raise ValueError(f"{path} is damaged: it was cut off, or it changed after it was written; copy or export it "
                         "again")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                   # a foreign file may raise anything
        raise ValueError(f"{path} is not an encoder of this program ({first_line(error)}); {GIVE}") from error
    if not isinstance(saved, dict) or not {"format", "preprocessing", "config", "state_dict"} <= saved.keys():
        raise ValueError(f"{path} is not an encoder of this program, but another PyTorch file; {GIVE}")
    if saved["format"] != FORMAT:
        raise ValueError(f"{path} is not an encoder that this code reads: expected format '{FORMAT}', found "
                         f"'{saved['format']}'; {GIVE}")
    theirs = saved["preprocessing"]
    differ = [f"{key} {theirs.get(key)!s:.30}, expected {PREPROCESSING.get(key)!s:.30}"
              for key in PREPROCESSING | theirs if theirs.get(key) != PREPROCESSING.get(key)]
    if differ:
        raise ValueError(f"{path} was trained with a different preprocessing: found {'; '.join(differ)}; "
                         f"use the commit that wrote it: {saved.get('about', {}).get('commit', 'unknown')}")
    return saved


def is_damaged(path):
    """Whether this is a file of torch.save that was cut off or changed; torch.load alone does not compare checksums."""
    with open(path, "rb") as file:
        head = file.read(300)                    # a ZIP archive whose first member is NAME/data.pkl
    if not b"PK\x03\x04".startswith(head[:4]) or len(head) == 300 and b"/data.pkl" not in head:
        return False                             # another kind of file
    try:
        with zipfile.ZipFile(path) as archive:
            # testzip takes half the time of torch.load, which reads no data from a member that is marked as a folder.
            return archive.testzip() is not None or any(member.external_attr & 16 for member in archive.infolist())
    except Exception:                            # a damaged archive may raise anything
        return True


def first_line(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


# ---- command line ---------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    description, text = inspect.getdoc(main).split("\n\n", 1)
    parser = argparse.ArgumentParser("model.py", None, description, text, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE_OR_FOLDER", help="recordings, or folders with recordings, see below")
    add("--encoder", default="tiny", metavar="FILE",
        help="encoder.pt of a run; tiny (default) comes with the program; random:SIZE is an untrained one")
    add("--out", type=Path, default="features.npz", help="table to write, or to add to (default: %(default)s)")
    add("--plot", type=Path, metavar="DIR", help="also draw each recording into this folder: a window of it on ECG "
        "paper, coloured by its local features and by what CLS attends to")
    add("--fs", type=float, metavar="HZ", help="sampling rate of .csv, .npy, .npz and .mat files, which do not say it")
    add("--units", choices=("mV", "uV", "V"), default="mV", help="of these files (default: %(default)s)")
    add("--leads", default="", metavar="I,II,...", help="of these files (default: the header of a .csv)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of PyTorch (here: %(default)s)")
    return parser.parse_args(argv)


def main(args):
    """Features of ECG recordings, by a frozen encoder: a table with a row for each.

    A FILE is a WFDB record (with or without .hea), an EDF or EDF+ file, or, with --fs, one array in a .csv, .npy, .npz
    or .mat. A FOLDER stands for all recordings below it. Any leads, rates and lengths.

      python model.py my_ecgs                            # features.npz, by the encoder that comes with the program
      python model.py my_ecgs --encoder runs/real/encoder.pt --out real.npz --plot pictures
      python model.py a.csv b.csv --fs 500 --units uV --leads I,II,V1

    numpy.load("features.npz") has features (recordings, 3 x width) and, in the same order, path, leads, n_leads,
    seconds and notes (what was left out or looks wrong); failed and reasons; about (how it was made). Local features
    are large: encoder.embed gives them. The file is written every minute and at the end, also after Ctrl-C; the same
    command goes on from there. What is in it is not read again: delete it to begin anew. No medical device.
    """
    for name in ("matplotlib", "pandas", "sklearn") if args.plot else ():
        importlib.import_module(name)            # what is not installed is told now, not after the first recording
    encoder, file = load_encoder(args.encoder, args.device), Path(file_of(args.encoder))
    array, notes = (args.fs, args.units, args.leads), {}
    table = FeatureTable(args.out, dict(
        encoder=args.encoder, sha256=sha256(file) if file.is_file() else None, commit=encoder.about.get("commit"),
        config=encoder.config, precision=precision_of(args.device), fs_units_leads=array, folder=os.getcwd(),
        use=INTENDED_USE))
    paths = [*dict.fromkeys(str(path) for place in args.files for path in list_recordings(place, notes, bool(args.fs)))]
    above = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths] or ["/"])
    try:
        for path in progress_bar(paths, paths):
            picture = args.plot and args.plot / f"{os.path.relpath(path, above)}.png"
            if path in table.rows and (not picture or picture.is_file()):
                continue
            try:
                table.rows[path], first = features_of_pieces(encoder.embed, read_any(path, *array))
                table.save(SAVE_S)
                if picture:
                    draw_recording(encoder, first, picture)
            except ValueError as error:
                table.failed[path] = str(error)
    finally:
        table.save()
    read = sum(path in table.rows for path in paths)
    print(f"{args.out}: features of {len(table.rows):,} recordings, {read:,} of the {len(paths):,} found here",
          *(f"  failed {path}: {reason}" for path, reason in table.failed.items()),
          *(f"  not read here: {n:,} {kind}" for kind, n in notes.get(NOT_READ, {}).items()), INTENDED_USE, sep="\n")
    return not read


if __name__ == "__main__":
    os_signal.signal(os_signal.SIGTERM, os_signal.default_int_handler)
    try:
        sys.exit(main(parse_args()))
    except (ValueError, OSError, ImportError, KeyboardInterrupt) as error:
        sys.exit(f"model.py: {str(error) or 'interrupted; the same command goes on from what is written'}")
