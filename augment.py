"""The views of a batch: their shapes, time windows, lead subsets, gain, real noise, and masks for iBOT; made one step
ahead.

Randomness and tensor work are kept apart. Each place of a batch has its own row of uniform random numbers, so a rank
draws only the rows of its places. The draw_* functions make all choices from them, on the host with NumPy. What is left
is plain arithmetic on tensors, the same on any device.

Noise is real: baseline wander, electrode motion and muscle artefact of the MIT-BIH Noise Stress Test Database. It is
drawn per electrode and goes through the definitions of the leads, so the noise of any lead subset obeys Einthoven's
law, as an electrode's noise does in a patient. The signal-to-noise ratio is defined in add_noise.

Shapes: B recordings, V views of one list, S slots (leads of the batch), L leads of a view, W samples of the batch,
T samples of a view, E = 3 + L electrodes (of three limbs, and each lead's own), N patches of a lead, C global views.
"""
import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import uniform_filter1d
from scipy.signal import butter, find_peaks, sosfiltfilt
from scipy.stats import trim_mean

from corpus import SPLITS
from ecg import FS, LEADS, MISSING, Recording, Refused, preprocess

# {leads of a recording: (leads that a batch carries, s of a global view, s of a local view, share of the batch)}. The
# first group takes every recording with I, II and V1 to V6, whatever else it shows.
LEAD_GROUPS = {8: (15, 5.0, 1.6, 0.5), 4: (4, 8.0, 3.0, 0.0625), 3: (3, 8.0, 3.0, 0.0625), 2: (2, 8.0, 3.0, 0.1875),
               1: (1, 8.0, 3.0, 0.1875)}
GLOBAL_VIEWS, LOCAL_VIEWS, FEW_VIEWS = 2, 2, 2      # of each recording; half of each from either stretch
MOST_FEW_LEADS = 12              # a view of few leads shows 1 to so many (drawn for each step, few more often)
FEW_TOKENS, FEW_PATCHES = 96, 8  # patches of such a view, together (at most) and of a lead (at least)
ASKED_PATCHES = 16               # patches of such a view that are compared with the teacher's
NEAR_PAIRS, NEAR_PATCHES = 48, 15   # pairs of patches of a global view, one to predict the other, so far apart at most
NEAR_OFFSETS = 2 * NEAR_PATCHES + 2  # ids that pair_patches gives to distances
NOISE_TYPES = ("bw", "em", "ma")     # baseline wander, electrode motion, muscle artefact: records of the noise corpus
NOISE_TYPE_SHARE = 0.7               # chance of each type in a noisy view
NOISY_SHARE = 0.5                    # share of the student's views with noise; the others stay clean
SNR_DB = (0.0, 24.0)                 # uniform; mean-square definition, see add_noise
MUSCLE_HIGHPASS_HZ = 1.0             # below that `ma` is mostly wander, and its power would say nothing about muscle
GAIN = (0.9, 1.1)                    # log-uniform; small, as voltage is diagnostic; one per view, to keep lead ratios
UNKNOWN_SHARE = 0.05                 # share of a view's leads whose name is replaced by "unknown"
NAMELESS_SHARE = 0.4                 # share of the views of few leads that show no name at all
MASKED_CROPS = 1.0                   # share of the global views with a mask (DINOv3: half; a short run needs all)
MASK_RATIO = (0.2, 0.6)              # share of patches in a masked view, on an even grid, so that the total is fixed
MASK_KINDS = dict(time=0.6, lead=0.2, mixed=0.2)
MASK_SPAN_PATCHES = (2, 5)           # length of masked spans in time


# ---- shapes of views ------------------------------------------------------------------------------------------------
class LeadGroup(NamedTuple):
    """A part of every batch whose views have one shape."""
    leads: int                   # of a global view
    slots: int                   # leads that a batch carries
    window_s: float              # length of a global view, and of the stretches from which all views are cut
    local_s: float               # length of a local view
    share: float                 # of the batch


class ViewSpec(NamedTuple):
    """A list of equally shaped views of each recording."""
    views: int                   # per recording; view v comes from stretch v % 2
    leads: int                   # of each view
    patches: int                 # of each lead
    independent: bool            # take the first slots: the sampler puts leads there from which all others follow


def lead_groups():
    return tuple(LeadGroup(leads, *about) for leads, about in LEAD_GROUPS.items())


def view_specs(shape, patch_samples, few):
    """View lists of a lead group: global views, local views with all its leads, and, if it has several leads, views of
    `few` of them (one of the least to most of the group, by a number in [0, 1))."""
    patches, local = (round(s * FS / patch_samples) for s in (shape.window_s, shape.local_s))
    specs = [ViewSpec(GLOBAL_VIEWS, shape.leads, patches, True), ViewSpec(LOCAL_VIEWS, shape.leads, local, True)]
    most = MOST_FEW_LEADS if shape.slots > shape.leads else shape.leads - 1
    if most > 0:
        leads = int((most + 1) ** few)                                 # the chance of L leads is about 1 / L
        specs.append(ViewSpec(FEW_VIEWS, leads, min(patches, max(FEW_PATCHES, FEW_TOKENS // leads)), False))
    return specs


# ---- lead definitions -----------------------------------------------------------------------------------------------
@functools.cache
def electrode_weights(device="cpu"):
    """(len(LEADS), 4): weights of right arm, left arm, left leg and the lead's own electrode in each lead.

    Limb leads by Einthoven and Goldberger, chest leads against Wilson's central terminal. The orthogonal leads X, Y, Z
    and unknown leads get an electrode of their own against that terminal: their wiring is not known, and for noise this
    is enough.
    """
    limb = {"I": (-1, 1, 0, 0), "II": (-1, 0, 1, 0), "III": (0, -1, 1, 0),
            "aVR": (1, -0.5, -0.5, 0), "aVL": (-0.5, 1, -0.5, 0), "aVF": (-0.5, -0.5, 1, 0)}
    return torch.tensor([limb.get(name, (-1 / 3, -1 / 3, -1 / 3, 1)) for name in LEADS], device=device)


# ---- windows and leads ----------------------------------------------------------------------------------------------
def random_numbers(seed, places, views, **sizes):
    """Uniform random numbers in [0, 1) for each of `views` views of `places` (range) of a batch: arrays (V, B, size) by
    name. The generator skips those of the places in between, so a place has the same ones on any rank."""
    n = views * sum(sizes.values())
    rng, numbers = np.random.default_rng(seed), np.empty((len(places), n))
    rng.bit_generator.advance(places.start * n)
    for row in numbers:
        rng.random(out=row)
        rng.bit_generator.advance((places.step - 1) * n)
    numbers = numbers.reshape(len(places), views, -1).swapaxes(0, 1)
    return dict(zip(sizes, np.split(numbers, np.cumsum(list(sizes.values()))[:-1], axis=2)))


def choose_leads(order, available, leads):
    """Slots (V, B, L) of `leads` random leads among the first available[b] slots of each recording; order (V, B, S):
    uniform random numbers."""
    absent = np.arange(order.shape[2])[None, :] >= available[:, None]                             # (B, S)
    slots = np.where(absent, 2.0, order).argsort(axis=2)[:, :, :leads]
    return np.sort(slots, axis=2)


def draw_views(seed, places, spec, leads, available, window, noise_length, patch_samples):
    """All choices for a view list at `places` (range) of a batch: arrays (V, B, ...) by name; see the constants above.

    leads (B, S) ids, of which the first available[b] are those of recording b. A view shows the first slots (see
    ViewSpec.independent), or random ones. Every view begins at a whole patch of its stretch.
    """
    V, B, L, T, types = spec.views, len(leads), spec.leads, spec.patches * patch_samples, len(NOISE_TYPES)
    u = random_numbers(seed, places, V, order=leads.shape[1], start=1, gain=1, noisy=1, snr=1, hidden=L, nameless=1,
                       present=types, amplitude=types, limb=3 * types, own=L * types)
    slots = np.tile(np.arange(L), (V, B, 1)) if spec.independent else choose_leads(u["order"], available, L)
    electrodes = np.concatenate((u["limb"], u["own"]), axis=2).reshape(V, B, 3 + L, types)
    stretch = (electrodes * 4 * (noise_length - T + 1)).astype(np.int64)             # of two channels, with two signs
    present = u["present"] < NOISE_TYPE_SHARE
    present |= ~present.any(axis=2, keepdims=True)
    snr_db = np.where(u["noisy"] < NOISY_SHARE, np.interp(u["snr"], (0, 1), SNR_DB), np.inf)[..., 0]
    hidden = u["hidden"] < UNKNOWN_SHARE
    if not spec.independent:
        hidden |= u["nameless"] < NAMELESS_SHARE
    return dict(
        slots=slots, hidden=hidden, snr_db=snr_db.astype(np.float32),
        start=(u["start"][..., 0] * ((window - T) // patch_samples + 1)).astype(np.int64) * patch_samples,
        gain=np.exp(np.interp(u["gain"][..., 0], (0, 1), np.log(GAIN))).astype(np.float32),
        amplitude=(np.interp(u["amplitude"], (0, 1), (0.3, 1.0)) * present).astype(np.float32),
        sign=(stretch % 2 * 2 - 1).astype(np.float32), channel=stretch // 2 % 2, offset=stretch // 4)


def ask_patches(seed, places, draws, spec, whole, patch_samples):
    """Patches of views of few leads that are compared with the teacher's patch of the same lead and time: arrays (V*B,
    Q): `token`, the place among the patches of the list (V*B, L, N); `target`, the place among those of all global
    views (2*B, leads, patches); `weight`, 1 / number of comparisons of the view, 0 where the teacher does not see the
    lead. spec: of the view list; whole: of the global views."""
    V, B, L = draws["slots"].shape
    lead, patch = np.divmod((random_numbers(seed, places, V, token=ASKED_PATCHES)["token"] * L * spec.patches
                             ).astype(np.int64), spec.patches)                                         # (V, B, Q)
    slot = np.take_along_axis(draws["slots"], lead, axis=2)
    view, row = np.arange(V * B).reshape(V, B, 1), np.arange(B)[:, None]
    time = draws["start"][..., None] // patch_samples + patch
    seen = slot < whole.leads
    crop = np.arange(V)[:, None, None] % 2 * B + row
    found = dict(token=(view * L + lead) * spec.patches + patch,
                 target=(crop * whole.leads + np.where(seen, slot, 0)) * whole.patches + time,
                 weight=(seen / seen.sum(axis=2, keepdims=True).clip(1)).astype(np.float32))
    return {name: torch.from_numpy(values.reshape(V * B, -1)) for name, values in found.items()}


def pair_patches(seed, places, spec):
    """Random pairs of patches of one lead in a global view, 1 to NEAR_PATCHES apart: arrays (V*B, Q): `token` and
    `target`, their places among the patches of all global views (V*B, leads, patches); `offset`, how many patches the
    target is later, plus NEAR_PATCHES + 1 (0 is left for a patch that tells of itself)."""
    V, B, N = spec.views, len(places), spec.patches
    u = random_numbers(seed, places, V, **dict.fromkeys(("lead", "token", "target"), NEAR_PAIRS))         # (V, B, Q)
    lead, token = (u["lead"] * spec.leads).astype(np.int64), (u["token"] * N).astype(np.int64)
    earliest, latest = np.maximum(token - NEAR_PATCHES, 0), np.minimum(token + NEAR_PATCHES, N - 1)
    target = earliest + (u["target"] * (latest - earliest)).astype(np.int64)
    target += target >= token                                          # any but the token itself
    first = (np.arange(V * B).reshape(V, B, 1) * spec.leads + lead) * N
    found = dict(token=first + token, target=first + target, offset=target - token + NEAR_PATCHES + 1)
    return {name: torch.from_numpy(values.reshape(V * B, -1)) for name, values in found.items()}


def stretches(signal, row, start, length):
    """signal (..., samples), its rows numbered throughout, from `start` on: row's shape + (length,)."""
    first = row * signal.shape[-1] + start
    # On a CPU index_select copies whole stretches, and takes half the time of an index.
    return signal.flatten().unfold(0, length, 1).index_select(0, first.flatten()).unflatten(0, first.shape)


def make_views(batch_uv, slot_leads, draws, spec, patch_samples, noise=None):
    """Cut one view list out of a batch.

    batch_uv (B, 2, S, W) int16 uV, slot_leads (B, S) ids, draws of draw_views as tensors, noise of load_noise or None.
    Returns noisy and clean signal, each (V*B, L, T) mV, and the leads (V*B, L) with some names hidden and as they are;
    all view-major (row = view * B + recording).
    """
    device = batch_uv.device
    draws = {name: values.to(device, non_blocking=True) for name, values in draws.items()}
    B, _, S, _ = batch_uv.shape
    row = torch.arange(B, device=device)[:, None]
    stretch = torch.arange(spec.views, device=device)[:, None, None] % 2
    clean = stretches(batch_uv, (row * 2 + stretch) * S + draws["slots"], draws["start"][..., None],
                      spec.patches * patch_samples).float().mul_(1e-3)                            # (V, B, L, T) mV
    clean = clean.mul_(draws["gain"][..., None, None]).flatten(0, 1)
    leads = slot_leads.flatten()[row * S + draws["slots"]].flatten(0, 1)
    noisy = clean
    if noise is not None:
        with torch.autocast(device.type, enabled=False):  # bf16 would miss the stated level
            noisy = add_noise(clean, leads, noise, **{k: draws[k].flatten(0, 1) for k in (
                "snr_db", "amplitude", "sign", "channel", "offset")})
    return noisy, clean, leads.masked_fill(draws["hidden"].flatten(0, 1), 0), leads


# ---- noise ----------------------------------------------------------------------------------------------------------
def load_noise(corpus, split="train"):
    """Noise of one split of a prepared noise corpus: (types, 2 channels, samples) float32, each channel of unit
    deviation, `ma` high-passed (MUSCLE_HIGHPASS_HZ). ValueError if a type is missing."""
    rows = {corpus.records[i].decode(): i for i in np.flatnonzero(corpus.index["split"] == SPLITS.index(split))}
    absent = [t for t in NOISE_TYPES if t not in rows]
    if absent:
        raise ValueError(f"{corpus.dir} has no {', '.join(absent)} noise in split {split!r}; "
                         f"expected the records {', '.join(NOISE_TYPES)}: "
                         "prepare them with python prepare.py nstdb --raw DIR --out DIR")
    length = min(int(corpus.index[rows[t]]["length"]) for t in NOISE_TYPES)
    channels = []
    for t in NOISE_TYPES:
        raw = corpus.read(rows[t])[:2, :length]
        x = np.where(raw == MISSING, np.nan, raw.astype(np.float64))
        x = np.nan_to_num(x - np.nanmean(x, axis=1, keepdims=True))                               # a gap becomes 0
        if t == "ma":
            x = sosfiltfilt(butter(2, MUSCLE_HIGHPASS_HZ, "highpass", fs=FS, output="sos"), x, axis=1)
        channels.append(x / x.std(axis=1, keepdims=True))
    return torch.from_numpy(np.stack(channels).astype(np.float32))


def electrode_noise(noise, amplitude, sign, channel, offset, length):
    """Sum over types of random noise windows at each electrode: (B, E, T). Draws are (B, types) and (B, E, types)."""
    total = 0.0
    for t in range(len(NOISE_TYPES)):
        window = stretches(noise[t], channel[..., t], offset[..., t], length)                     # (B, E, T)
        total = window.mul_((sign[..., t] * amplitude[:, None, t])[..., None]).add_(total)
    return total


def add_noise(signal, leads, noise, snr_db, amplitude, sign, channel, offset):
    """signal (B, L, T) mV with noise at snr_db (B,) decibels; +inf leaves a recording as it is.

    Definition: per lead, 10 log10(mean square of the signal / mean square of the noise), after the mean of each over
    the window is subtracted; snr_db is the median of that over the leads of the recording (the mean of the middle two,
    if their number is even). One factor scales the noise of all leads, so that it still obeys the lead definitions. A
    lead with a flat signal is not counted. Most papers on deep learning use this definition; the `nst` program has
    another, whose 0 dB is about -10 dB here.
    """
    at_electrodes = electrode_noise(noise, amplitude, sign, channel, offset, signal.shape[-1])
    weights = electrode_weights(signal.device)[leads]                                             # (B, L, 4)
    lead_noise = (weights[..., :3] @ at_electrodes[:, :3]).addcmul_(weights[..., 3:], at_electrodes[:, 3:])
    lead_noise -= lead_noise.mean(dim=-1, keepdim=True)
    power = signal.var(dim=-1, correction=0)                                                      # (B, L) mV^2
    ratio_db = 10 * torch.log10(power / lead_noise.var(dim=-1, correction=0).clamp(min=1e-12))
    ratio_db = torch.where(power < 1e-10, torch.nan, ratio_db).nanquantile(0.5, dim=-1)           # (B,)
    factor = 10 ** ((ratio_db - snr_db) / 20)
    # The factor is NaN if all leads are flat: such a recording gets no noise. At +inf dB it is 0 already.
    factor = torch.where(factor.isfinite(), factor, 0.0)
    return lead_noise.mul_(factor[:, None, None]).add_(signal)


def add_noise_levels(recordings, noise, patch_samples, seed, levels_db):
    """Yield each ecg.Recording under the mixture of draw_views and then each of NOISE_TYPES alone, at every level, at
    FS, in whole patches; what is missing stays missing. A recording has the same noise of a kind at every level.
    """
    levels = list(itertools.product(("mixture", *NOISE_TYPES), levels_db))
    for number, recording in enumerate(recordings):
        try:
            signal_mv, lead_ids = preprocess(*recording[:4], {})
        except Refused:                          # embed refuses it too
            yield from [recording] * len(levels)
            continue
        whole = torch.from_numpy(signal_mv[None, :, :signal_mv.shape[1] // patch_samples * patch_samples])
        for kind, db in levels:
            noisy = add_test_noise(whole, torch.from_numpy(lead_ids[None]), range(1), noise, kind, db, [seed, number])
            yield Recording(noisy[0].numpy(), FS, [LEADS[i] for i in lead_ids])


def snr_of_leads(recordings, noise, patch_samples, seed):
    """What single leads have where add_noise says 0 dB: {kind: {lead: (dB by add_noise's definition, dB by nst_db)}},
    medians over recordings; kind: mixture, or one of NOISE_TYPES."""
    kinds, found = ("mixture", *NOISE_TYPES), {}
    noisy = add_noise_levels(recordings, noise, patch_samples, seed, (math.inf, 0.0))
    for clean, *others in zip(*[noisy] * (2 * len(kinds))):              # one recording
        for kind, other in zip(kinds, others[::2]):
            for lead, x, n in zip(clean.leads, clean.signal, other.signal - clean.signal):
                if np.isfinite(x).any() and np.nanstd(x) > 0 and np.nanstd(n) > 0:
                    db = 20 * np.log10(np.nanstd(x) / np.nanstd(n)), nst_db(x, n)
                    if np.isfinite(db).all():    # nst_db finds no R wave in a step
                        found.setdefault(kind, {}).setdefault(lead, []).append(db)
    return {kind: {lead: np.median(db, axis=0).tolist() for lead, db in of.items()} for kind, of in found.items()}


def nst_db(x, noise):
    """The SNR in dB of one lead x (T,) and its noise (T,), at FS, as WFDB's program nst defines it: A^2 / 8 to N^2. A:
    mean peak-to-peak voltage within 50 ms of the R waves, here where the slope is largest, as there is no list of
    them; N: mean RMS of the noise in a second without its mean; both without the highest and the lowest 5 %."""
    x, noise = np.nan_to_num(x - np.nanmean(x)), np.nan_to_num(noise)
    slope = uniform_filter1d(np.abs(np.gradient(x)), FS // 10)
    peaks, _ = find_peaks(slope, 0.3 * np.percentile(slope, 98), distance=FS // 4)
    near = x[(peaks[:, None] + np.arange(-FS // 20, FS // 20 + 1)).clip(0, len(x) - 1)]
    volts, rms = np.ptp(near, axis=1), noise[:len(noise) // FS * FS].reshape(-1, FS).std(axis=1)
    return 20 * np.log10(trim_mean(volts, 0.05) / 8 ** 0.5 / trim_mean(rms, 0.05))


def add_test_noise(windows, leads, places, noise, kind, snr_db, seed):
    """windows (B, L, T) mV of leads (B, L) with noise of load_noise at snr_db decibels of add_noise: the `mixture` of
    training, or one of NOISE_TYPES alone. places: a range, the numbers of the windows; each has draws of its own, the
    same for every kind and level. Missing samples stay missing."""
    (B, L, T), gaps = windows.shape, windows.isnan()
    draws = draw_views(seed, places, ViewSpec(1, L, 1, True), leads.numpy(), np.full(B, L), T, noise.shape[-1], T)
    amplitude, *others = (torch.from_numpy(draws[name][0]) for name in ("amplitude", "sign", "channel", "offset"))
    if kind != "mixture":
        amplitude = torch.eye(len(NOISE_TYPES))[NOISE_TYPES.index(kind)].expand(B, -1)
    clean = torch.where(gaps, windows.nanmean(dim=2, keepdim=True), windows).nan_to_num()
    noisy = add_noise(clean, leads, noise, torch.full((B,), float(snr_db)), amplitude, *others)
    return noisy.masked_fill(gaps, torch.nan)


# ---- masks ----------------------------------------------------------------------------------------------------------
def mask_counts(crops, tokens):
    """Number of masked patches of each crop: a fixed share of the crops has ratios on an even grid, the others have
    none. The sum never changes."""
    masked = int(crops * MASKED_CROPS)
    ratios = np.linspace(*MASK_RATIO, masked + 1)[1:] if masked > 1 else np.full(masked, np.mean(MASK_RATIO))
    counts = np.maximum(1, np.floor(tokens * ratios)).astype(np.int64)
    return np.concatenate([np.zeros(crops - masked, np.int64), counts])


def draw_masks(seed, places, counts, leads, patches):
    """Masks (V*B, L, N) bool with exactly counts (V, B) patches each, for the views at `places` (range) of a batch.

    time: spans of time over all leads together, because a masked limb lead could be computed from the others; lead:
    whole leads; mixed: one lead in four, then spans of time. Each kind ranks the patches, and the first `count` are
    masked, so the last span or lead may be masked only in part.
    """
    crops, u = counts.size, random_numbers(seed, places, len(counts), kind=1, span=1, phase=1,
                                           time=patches // MASK_SPAN_PATCHES[0] + 2, lead=leads, lead_in_span=leads)
    u = {name: values.reshape(crops, -1) for name, values in u.items()}
    kind = np.searchsorted(np.cumsum(list(MASK_KINDS.values()))[:-1], u["kind"], side="right")
    kind = np.array(list(MASK_KINDS))[kind][:, None]                     # (C, 1, 1)
    if leads == 1:
        kind[:] = "time"                                                 # of one lead only spans of time can be masked
    (low, high), steps = MASK_SPAN_PATCHES, np.arange(patches)
    span = low + (u["span"] * (high - low + 1)).astype(np.int64)         # (C, 1)
    block = (steps + (u["phase"] * span).astype(np.int64)) // span       # (C, N) the span that a patch is in
    time_rank = np.take_along_axis(u["time"], block, axis=1)[:, None, :]
    lead_rank, lead_in_span = u["lead"][..., None], u["lead_in_span"][..., None]

    one_in_four = lead_rank <= np.quantile(lead_rank, 0.25, axis=1, keepdims=True)
    by_lead = (kind == "lead") | (kind == "mixed") & one_in_four         # (C, L, 1)
    first = np.where(by_lead, np.where(kind == "mixed", lead_rank - 1, lead_rank), time_rank)      # (C, L, N)
    then = np.where(by_lead, time_rank + 1e-6 * steps, lead_in_span + 1e-3 * steps)   # early first in the last span
    order = np.lexsort((then.reshape(crops, -1), first.reshape(crops, -1)), axis=1)
    masks = np.zeros((crops, leads * patches), bool)
    np.put_along_axis(masks, order, np.arange(leads * patches) < counts.reshape(-1, 1), axis=1)
    return masks.reshape(crops, leads, patches)


# ---- batches, one step ahead ----------------------------------------------------------------------------------------
def host_batch(sampler, step, rank, world_size, noise_length, patch_samples):
    """Everything that is random or read from disk in a step, for this rank: a dict per group with stretches, lead ids,
    draws of views and masks, the patches that are asked for (None without views of few leads), and near ones."""
    few = np.random.default_rng([sampler.seed, step, 99]).random(len(sampler.groups))
    groups, chosen = [], sampler.choose(step)
    for g, group in enumerate(sampler.groups):
        seed = [sampler.seed, step, g]
        places = range(rank, group["size"], world_size)
        batch, leads, available = sampler.draw(step, g, chosen[g], slice(rank, group["size"], world_size))
        specs = view_specs(group["shape"], patch_samples, few[g])
        draws = [draw_views([*seed, 2, k], places, spec, leads, available, group["window"], noise_length, patch_samples)
                 for k, spec in enumerate(specs)]
        asked = ask_patches([*seed, 5], places, draws[2], specs[2], specs[0], patch_samples) if specs[2:] else None
        # How much is masked is drawn for the whole batch, as its total is fixed.
        counts = mask_counts(GLOBAL_VIEWS * group["size"], specs[0].leads * specs[0].patches)
        counts = np.random.default_rng([*seed, 3]).permutation(counts).reshape(GLOBAL_VIEWS, -1)[:, places]
        masks = draw_masks([*seed, 4], places, counts, specs[0].leads, specs[0].patches)
        groups.append(dict(batch=torch.from_numpy(batch), leads=torch.from_numpy(leads), masks=torch.from_numpy(masks),
                           specs=specs, draws=[{name: torch.from_numpy(d[name]) for name in d} for d in draws],
                           asked=asked, near=pair_patches([*seed, 6], places, specs[0])))
    return groups


def cut_views(group, noise, patch_samples, device):
    """A lead group of host_batch, on the device: views (noisy signal, clean signal, lead ids with some hidden, lead
    ids), masks (2B, L, N), for each masked patch its place among the patches of all global views and its weight in
    the iBOT loss, `asked` of ask_patches and `near` of pair_patches."""
    masks = group["masks"]
    place = masks.flatten().nonzero().squeeze(1)
    weights = (1.0 / masks.sum((1, 2)).clamp(min=1))[place // masks[0].numel()]
    batch, leads = group["batch"].to(device), group["leads"].to(device)
    views = [make_views(batch, leads, draws, spec, patch_samples, noise)
             for spec, draws in zip(group["specs"], group["draws"])]
    asked, near = (found and {name: values.flatten().to(device) for name, values in found.items()}
                   for found in (group["asked"], group["near"]))
    return dict(views=views, masks=masks.to(device), place=place.to(device), weights=weights.to(device), asked=asked,
                near=near, recordings=len(batch))


class Batches:
    """The views of this rank, made one step ahead. A thread reads and draws them, moves them to the device and cuts
    them there. A GPU does this on a separate stream, so that neither the host nor the device waits."""

    def __init__(self, sampler, rank, world_size, noise, patch_samples, device):
        self.sampler, self.rank, self.world_size = sampler, rank, world_size
        self.noise, self.patch_samples, self.device = noise, patch_samples, device
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1)

    def make(self, step):
        noise_length = self.noise.shape[-1] if self.noise is not None else max(g["window"] for g in self.sampler.groups)
        groups = host_batch(self.sampler, step, self.rank, self.world_size, noise_length, self.patch_samples)
        with torch.cuda.stream(self.stream):                           # does nothing without one
            made = [cut_views(g, self.noise, self.patch_samples, self.device) for g in groups]
            return made, self.stream.record_event() if self.stream else None

    def start(self, step):
        self.next = self.thread.submit(self.make, step)

    def take(self):
        made, ready = self.next.result()
        if ready is not None:
            current = torch.cuda.current_stream()
            current.wait_event(ready)
            for g in made:                                             # memory stays in use until this stream is done
                drawn = itertools.chain((g["asked"] or {}).values(), g["near"].values(), *g["views"])
                for tensor in (g["masks"], g["place"], g["weights"], *drawn):
                    tensor.record_stream(current)
        return made
