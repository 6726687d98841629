"""The ECG encoder: a Vision Transformer over (lead, time) patches, for any number of leads and any duration.

Every lead is cut into patches of PATCH_S seconds; one linear layer, shared by all leads, turns a patch into a token.
A lead is known by its name: a learned vector per named lead is added to its tokens. A lead that is absent has no token.
Time enters as rotary position in seconds, so nothing is padded, resized or interpolated.

    encoder = load_encoder("runs/real/encoder.pt")                  # or "random:tiny" for an untrained one
    out = encoder.embed(signal, fs=360, leads=["MLII", "V1"])       # any recording as it is: out.global_feature (D,),
                                                                    # out.local_features (L, N, D), out.times_s (N,)
    cls, registers, patches = encoder(signal_mv, lead_ids)          # batched, at 250 Hz

Shapes: B batch, L leads, T samples, P samples of a patch, N patches of a lead (T / P), M tokens (1 + R + L*N),
R registers, H heads, E width of a head, D width, Z tokens of several batches of windows, one after the other (the sum
of B * M). Signals are in mV at FS Hz.
"""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from prepare import FS, LEADS, preprocess

PATCH_S = 0.2                    # s; a QRS complex is about half of it
REGISTERS = 4                    # extra tokens that hold global scratch values (Darcet et al. 2024)
ROPE_PERIODS_S = (0.4, 40.0)     # s; from two patches to a few windows, geometric over the frequency pairs of a head
# The mean over this many patches (1.4 s, more than a beat) around a sample is its baseline, which is taken off.
BASELINE_PATCHES = 7
# Of the lead vectors at the start, beside tokens of about unit variance: features must differ between leads before
# they are averaged.
LEAD_STD = 0.5
# mV; linear below, logarithmic above: P and ST count beside an R ten times as high, and higher is still more.
COMPRESS_MV = 0.1
NORM_EPS = 1e-5
# mV; from 1 to 99 % of the samples of the largest lead of an ECG: beyond, the units are wrong.
MIN_SPREAD_MV, MAX_SPREAD_MV = 0.005, 20.0
# {leads or more: patches}: windows of about 120 tokens of independent leads, 8 s at most. train.py trains on these.
WINDOW_PATCHES = {8: 15, 1: 40}
MAX_EMBED_TOKENS = 4096          # that embed() runs at once: bounds its memory for long recordings, not its results
FORMAT = "ecg-dino encoder 3"
PREPROCESSING = dict(fs_hz=FS, units="mV", leads=list(LEADS), baseline_patches=BASELINE_PATCHES,
                     compress_mv=COMPRESS_MV)  # stored with the weights

# LayerScale starts near 1 in shallow networks (else a short run trains little more than the patch embedding),
# and tiny in deep ones.
SIZES = {
    "tiny": dict(width=128, depth=3, heads=2, layer_scale=1.0),
    "small": dict(width=384, depth=12, heads=6, layer_scale=0.1),
    "base": dict(width=768, depth=12, heads=12, layer_scale=1e-2),
    "large": dict(width=1024, depth=24, heads=16, layer_scale=1e-5),
    "huge": dict(width=1280, depth=32, heads=20, layer_scale=1e-5),
    "7b": dict(width=4096, depth=40, heads=32, layer_scale=1e-5),
}


class Features(NamedTuple):
    cls: torch.Tensor            # (B, D) global feature
    registers: torch.Tensor      # (B, R, D)
    patches: torch.Tensor        # (B, L, N, D) local features

    def pooled(self):
        """[CLS, mean patch] (B, 2D): what the probes read and the DINO head sees, so that training shapes both."""
        return torch.cat((self.cls, self.patches.mean((1, 2))), dim=1)


class Embedding(NamedTuple):
    global_feature: np.ndarray   # (D,) CLS token, mean over windows
    local_features: np.ndarray   # (L, N, D); NaN where a patch has missing samples
    times_s: np.ndarray          # (N,) centre of each patch, seconds from the start of the recording


# ---------------------------------------------------------------------------------------------------------------------
# blocks

def rope_table(times_s, head_width):
    """Rotary position at times_s (M,) seconds: unit complex numbers (M, E/2), from fp32 angles, because bf16 loses
    positions."""
    shortest, longest = ROPE_PERIODS_S
    exponent = torch.arange(head_width // 2, device=times_s.device, dtype=torch.float32) / (head_width // 2 - 1)
    angle = 2 * math.pi * times_s.float()[:, None] / (shortest * (longest / shortest) ** exponent)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, rope):
    """Rotate the pairs (2i, 2i + 1) of x (B, H, M, E) by rope (M, E/2): one complex product (Su et al. 2021)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x, shapes, ropes):
        """x (Z, D), of which shapes ((B, M), ...) and ropes (one (M, E/2) each) say what belongs together."""
        parts = []
        for qkv, (B, M), rope in zip(self.qkv(x).split([B * M for B, M in shapes]), shapes, ropes):
            q, k, v = qkv.view(B, M, 3, self.heads, -1).permute(2, 0, 3, 1, 4)                   # (B, H, M, E) each
            part = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
            parts.append(part.transpose(1, 2).reshape(B * M, -1))
        return self.proj(torch.cat(parts))


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale (Touvron et al. 2021)."""

    recompute = False            # keep only the input of the block, and compute it again in the backward pass

    def __init__(self, width, heads, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads)
        self.scale1 = nn.Parameter(torch.full((width,), float(layer_scale)))
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale2 = nn.Parameter(torch.full((width,), float(layer_scale)))

    def forward(self, x, shapes, ropes):  # as Attention
        if self.recompute and torch.is_grad_enabled():                                         # nothing is random
            return checkpoint(self.run, x, shapes, ropes, use_reentrant=False, preserve_rng_state=False)
        return self.run(x, shapes, ropes)

    def run(self, x, shapes, ropes):
        x = x + self.scale1 * self.attention(self.norm1(x), shapes, ropes)
        return x + self.scale2 * self.mlp(self.norm2(x))


# ---------------------------------------------------------------------------------------------------------------------
# the encoder

class Encoder(nn.Module):
    """ViT over (lead, time) patches.

    `config` holds all that is needed to build it again: `init_seed` its first weights, `window_patches` the lengths of
    the windows that it was trained on, {number of leads or more: patches}, through which longer recordings go.
    """

    def __init__(self, width, depth, heads, layer_scale, init_seed=0, window_patches=WINDOW_PATCHES,
                 patch_samples=round(PATCH_S * FS), registers=REGISTERS):
        super().__init__()
        if width % (2 * heads) or width // heads < 4:
            raise ValueError(f"width {width} with {heads} heads: rotary position needs heads of an even width, "
                             "4 or more; choose another width")
        self.config = dict(width=width, depth=depth, heads=heads, layer_scale=layer_scale, init_seed=init_seed,
                           window_patches=dict(window_patches), patch_samples=patch_samples, registers=registers)
        self.width, self.patch_samples, self.num_registers = width, patch_samples, registers
        self.head_width = width // heads
        self.patch_embedding = nn.Linear(patch_samples, width)
        self.lead_embedding = nn.Embedding(len(LEADS), width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_tokens = nn.Parameter(torch.empty(1, registers, width))
        self.mask_token = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.init_weights(init_seed)

    def init_weights(self, seed):
        """Truncated normal with variance 1 / fan-in for linear layers (0.02 is that of width 2,500: a narrow network
        would hardly use its blocks); drawn from a generator of its own, so the seed alone decides."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features ** -0.5
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for tokens, std in ((self.lead_embedding.weight, LEAD_STD), (self.cls_token, 0.02),
                            (self.register_tokens, 0.02)):
            nn.init.normal_(tokens, std=std, generator=generator)
        nn.init.zeros_(self.mask_token)

    def forward(self, signal, leads, mask=None, keep=None):
        """Encode windows.

        signal (B, L, T) mV at FS Hz, finite, T a multiple of P; leads (B, L) lead ids (prepare.LEADS);
        mask (B, L, N) bool: these patches are replaced by the mask token; keep (L, N) bool: the other patches get no
        token at all (missing samples), and their features come back as NaN. Returns Features.
        """
        return self.encode([(signal, leads, mask)], keep)[0]

    def encode(self, views, keep=None):
        """Features of each of several batches of windows (signal, leads, mask), see forward: the same as one by one,
        but each block runs once, on the tokens of all, and under FSDP fetches its weights once."""
        P, R = self.patch_samples, self.num_registers
        tokens, shapes, ropes = [], [], []
        for signal, leads, mask in views:
            B, L, T = signal.shape
            if T == 0 or T % P or leads.shape != (B, L):
                raise ValueError(f"the encoder takes signal (B, L, T) with T a multiple of {P} samples and leads "
                                 f"(B, L); found {tuple(signal.shape)} and {tuple(leads.shape)}; "
                                 "encoder.embed() takes any recording")
            x = (self.tokens(signal, mask, keep) + self.lead_embedding(leads)[:, :, None]).flatten(1, 2)  # (B, L*N, D)
            times_s = ((torch.arange(T // P, device=signal.device) + 0.5) * (P / FS)).repeat(L)   # lead-major, like x
            if keep is not None:
                kept = keep.flatten().nonzero().squeeze(1)
                x, times_s = x[:, kept], times_s[kept]
            x = torch.cat((self.cls_token.expand(B, -1, -1), self.register_tokens.expand(B, -1, -1), x), dim=1)
            # CLS and registers have no place in time: a factor of 1 leaves them as they are.
            rope = rope_table(times_s, self.head_width)
            ropes.append(torch.cat((rope.new_ones(1 + R, rope.shape[1]), rope)))
            shapes.append(tuple(x.shape[:2]))
            tokens.append(x.flatten(0, 1))
        x = torch.cat(tokens)
        for block in self.blocks:
            x = block(x, shapes, ropes)
        features = []
        for x, (B, M), (_, leads, _) in zip(self.norm(x).split([B * M for B, M in shapes]), shapes, views):
            x, L = x.view(B, M, self.width), leads.shape[1]
            patches = x[:, 1 + R:]
            if keep is not None:
                patches = patches.new_full((B, keep.numel(), self.width), float("nan")).index_copy(1, kept, patches)
            # Copies, not views: sharding hangs its hooks on what a module returns.
            features.append(Features(x[:, 0].contiguous(), x[:, 1:1 + R].contiguous(),
                                     patches.unflatten(1, (L, -1)).contiguous()))
        return features

    def tokens(self, signal, mask=None, keep=None):
        """Patch embedding (B, L, N, D), or the mask token where mask (B, L, N)."""
        hidden = mask if keep is None else (~keep).expand(len(signal), -1, -1) | (False if mask is None else mask)
        x = self.patch_embedding(self.front_end(signal, hidden).to(self.patch_embedding.weight.dtype))
        if mask is None:
            return x
        return torch.where(mask[..., None], self.mask_token.to(x.dtype), x)

    def front_end(self, signal, hidden=None):
        """Patches (B, L, N, P) without wander and compressed, of about unit variance; signal (B, L, T) mV.

        Wander has most of the variance of a raw ECG and says least; what the teacher finds different between
        recordings at first is what training then amplifies. ST levels survive, since the baseline is a mean over more
        than a beat. Patches that are hidden (B, L, N) have no part in the baseline of the others, or masked content
        would show there.
        """
        patches = signal.float().unflatten(-1, (-1, self.patch_samples))
        seen = torch.ones_like(patches[..., :1]) if hidden is None else (~hidden)[..., None].float()
        # The lead's own mean goes first: where no patch is seen near by, the baseline is then 0.
        patches = (patches - (patches * seen).sum((2, 3), keepdim=True)
                   / (seen.sum((2, 3), keepdim=True) * self.patch_samples).clamp(min=1)) * seen
        near = dict(kernel_size=BASELINE_PATCHES, stride=1, padding=BASELINE_PATCHES // 2)
        baseline = (F.avg_pool1d(patches.mean(-1), **near)
                    / F.avg_pool1d(seen[..., 0], **near).clamp(min=0.5 / BASELINE_PATCHES))
        baseline = F.interpolate(baseline, size=signal.shape[-1], mode="linear").view_as(patches)
        return ((patches - baseline) / COMPRESS_MV).asinh()

    @torch.inference_mode()
    def embed(self, signal, *, fs, leads, units="mV", window_s=None, stride_s=None):
        """Features of one recording as it is: any leads, rate, duration; see prepare.preprocess for what it accepts.

        signal (L, T) or (T, L), `leads` a name per lead, `units` mV, uV or V. A recording longer than window_s (the
        length of the global views with as many leads in training) goes through windows every stride_s (half of that);
        each patch is taken from the window in which it lies most centrally, and the global feature is the mean of the
        windows' CLS. A rest shorter than a patch at the end is left out. Returns Embedding.
        """
        signal_mv, lead_ids = preprocess(signal, fs, leads, units)
        P = self.patch_samples
        N = signal_mv.shape[1] // P
        if N == 0:
            raise ValueError(f"the recording lasts {signal_mv.shape[1] / FS:.3f} s; at least one patch of "
                             f"{P / FS:.1f} s is needed")
        check_amplitude(signal_mv, units)
        present = max(1, np.isfinite(signal_mv).any(axis=1).sum())                       # a dead lead is no lead
        window, stride = self.window_and_stride(present, window_s, stride_s)
        patches = torch.from_numpy(signal_mv[:, :N * P]).unflatten(1, (N, P))           # (L, N, P)
        starts = window_starts(N, window, stride)
        window = min(window, N)
        cls, local = [], torch.full((len(lead_ids), N, self.width), float("nan"))
        best = torch.full((N,), float("inf"))                                   # distance to its window's centre so far
        for batch in window_batches(patches, starts, window, max(1, MAX_EMBED_TOKENS // (len(patches) * window))):
            features = self._embed_windows(patches, batch, window, lead_ids)
            cls.append(features.cls.cpu().float())
            for start, window_features in zip(batch, features.patches.cpu().float()):
                distance = (torch.arange(window) - (window - 1) / 2).abs()
                nearer = (distance < best[start:start + window]).nonzero().squeeze(1)
                local[:, start + nearer] = window_features[:, nearer]
                best[start + nearer] = distance[nearer]
        if not cls:
            raise ValueError("every patch of the recording has missing samples (NaN, or a flat or saturated signal); "
                             "nothing is left to embed")
        times_s = (np.arange(N) + 0.5) * P / FS
        return Embedding(torch.cat(cls).mean(dim=0).numpy(), local.numpy(), times_s)

    @torch.inference_mode()
    def pool(self, signal, leads):
        """The feature for a linear probe: [CLS, mean patch] (B, 2D), mean over windows as long as in training;
        arguments as in forward."""
        P = self.patch_samples
        N = signal.shape[-1] // P
        window, stride = self.window_and_stride(leads.shape[1])
        return torch.stack([self(signal[..., s * P:(s + window) * P], leads).pooled()
                            for s in window_starts(N, window, stride)]).mean(0).float()

    def window_and_stride(self, num_leads, window_s=None, stride_s=None):
        """Length and step of the windows of a recording, in patches; None: as trained on so many leads, and half of
        that."""
        for name, value in (("window_s", window_s), ("stride_s", stride_s)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}; expected seconds above 0")
        window = (window_length(num_leads, self.config["window_patches"]) if window_s is None else
                  max(1, round(window_s * FS / self.patch_samples)))
        stride = max(1, window // 2) if stride_s is None else max(1, round(stride_s * FS / self.patch_samples))
        if stride > window:
            raise ValueError(f"stride_s {stride_s} is longer than window_s {window_s}: "
                             "patches between windows would be lost")
        return window, stride

    def _embed_windows(self, patches, starts, window, lead_ids):
        """Features of the windows (in patches) at `starts`, all of which miss the same patches."""
        device = self.cls_token.device
        signal = torch.stack([patches[:, s:s + window] for s in starts])                # (B, L, N, P)
        keep = signal[0].isfinite().all(dim=-1)
        leads = torch.as_tensor(lead_ids, device=device).expand(len(starts), -1)
        return self(signal.nan_to_num(0.0).flatten(2).to(device), leads, keep=None if keep.all() else keep.to(device))


def check_amplitude(signal_mv, units):
    """ValueError if a recording is a thousand times too large or too small to be in `units`."""
    missing = np.isnan(signal_mv)
    spread = max((np.ptp(np.percentile(lead[~gap], (1, 99)))
                  for lead, gap in zip(signal_mv, missing) if not gap.all()), default=0)
    if not MIN_SPREAD_MV <= spread <= MAX_SPREAD_MV or missing.mean() > 0.5 and spread > MAX_SPREAD_MV / 2:
        raise ValueError(f"the signal spans {spread:.2g} mV if it is in {units}, and {missing.mean():.0%} of its "
                         f"samples are unusable; an ECG spans {MIN_SPREAD_MV} to {MAX_SPREAD_MV:g} mV: "
                         "check the units")


def window_length(num_leads, window_patches=WINDOW_PATCHES):
    """Patches of the windows with num_leads leads, of {leads or more: patches}."""
    return window_patches[max(n for n in window_patches if n <= num_leads)]


def window_starts(num_patches, window, stride):
    """First patches of the windows that cover a recording; the last one ends with it."""
    if num_patches <= window:
        return [0]
    starts = list(range(0, num_patches - window, stride))
    return starts + [num_patches - window]


def window_batches(patches, starts, window, at_once):
    """Lists of window starts that can run together: complete windows `at_once`, each window with gaps alone.

    A window whose patches are all missing is left out.
    """
    valid = patches.isfinite().all(dim=-1)                                              # (L, N)
    complete = [s for s in starts if valid[:, s:s + window].all()]
    for i in range(0, len(complete), at_once):
        yield complete[i:i + at_once]
    for start in sorted(set(starts) - set(complete)):
        if valid[:, start:start + window].any():
            yield [start]


# ---------------------------------------------------------------------------------------------------------------------
# files

def save_encoder(encoder, path, state_dict=None, **about):
    """Write a self-describing file: architecture, weights and preprocessing, with `about` (plain types) for people."""
    torch.save(dict(format=FORMAT, config=encoder.config, state_dict=state_dict or encoder.state_dict(),
                    preprocessing=PREPROCESSING, about=about), path)


def build_encoder(size, seed=0, **more):
    """An untrained encoder of a named size; `more` of its config."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {', '.join(SIZES)}")
    return Encoder(**SIZES[size], init_seed=seed, **more)


def untrained_like(encoder):
    """The weights that `encoder` started from: its own untrained control."""
    return Encoder(**encoder.config).eval().to(encoder.cls_token.device)


def load_encoder(path, device="cpu"):
    """Encoder in eval mode from an encoder.pt, or untrained from "random:SIZE" or "random:SIZE:SEED"."""
    if str(path).startswith("random:"):
        _, size, *seed = str(path).split(":")
        if seed and not seed[0].isdigit():
            raise ValueError(f"{path}: the seed must be a whole number; expected random:SIZE or random:SIZE:SEED")
        return build_encoder(size, int(seed[0]) if seed else 0).eval().to(device)
    if not Path(path).is_file():
        raise ValueError(f"no encoder at {path}; train.py writes RUN/encoder.pt, "
                         "and random:tiny gives an untrained one")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        found, preprocessing = saved["format"], saved["preprocessing"]
    except Exception as error:  # a damaged or foreign file may raise anything
        raise ValueError(f"{path} is not an encoder of this program "
                         f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}); "
                         "give the encoder.pt that train.py wrote") from error
    if found != FORMAT:
        raise ValueError(f"{path} is not an encoder that this code reads: expected format '{FORMAT}', found '{found}'; "
                         "give the encoder.pt that train.py wrote")
    differ = [f"{k} {short(k, preprocessing.get(k))} (here {short(k, PREPROCESSING.get(k))})"
              for k in PREPROCESSING | preprocessing if preprocessing.get(k) != PREPROCESSING.get(k)]
    if differ:
        raise ValueError(f"{path} was trained with another preprocessing than this code has: {', '.join(differ)}; "
                         "use the commit that wrote it")
    encoder = Encoder(**saved["config"])
    encoder.load_state_dict(saved["state_dict"])
    return encoder.eval().to(device)


def short(name, value):
    """A setting in few words."""
    return f"{len(value)} leads" if isinstance(value, list) else f"{value} Hz" if name == "fs_hz" else value
