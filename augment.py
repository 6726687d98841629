"""The views of a batch: their shapes, time windows, lead subsets, gain, real noise, and masks for iBOT; made one step
ahead.

Randomness and tensor work are kept apart. The draw_* functions pick all random numbers on the host with NumPy, for the
whole batch, from a generator that the step seeds; a rank then takes its rows. What is left is plain arithmetic on
tensors, the same on any device.

Noise is real: baseline wander, electrode motion and muscle artefact of the MIT-BIH Noise Stress Test Database. It is
drawn per electrode and goes through the definitions of the leads, so the noise of any lead subset obeys Einthoven's
law, as an electrode's noise does in a patient. The signal-to-noise ratio is defined in add_noise.

Shapes: B recordings, V views of one list, S slots (leads of the batch), L leads of a view, W samples of the batch,
T samples of a view, E electrodes, N patches of a lead.
"""
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from scipy.signal import butter, sosfiltfilt

from corpus import SPLITS
from ecg import FS, LEADS, MISSING

WINDOW_S = 9.0                   # s, the part of a recording from which its views are cut (--window)
# Patches of a lead in a global and in a local view: of many leads, and of few (these grow with the window).
MANY_PATCHES, FEW_PATCHES = (15, 8), (40, 15)
GLOBAL_VIEWS, LOCAL_FULL_VIEWS, LOCAL_FEW_VIEWS = 2, 3, 1
FEW_LEADS = (1, 2, 3)            # number of leads of LOCAL_FEW_VIEWS, drawn per step
NOISE_TYPES = ("bw", "em", "ma")     # baseline wander, electrode motion, muscle artefact: records of the noise corpus
NOISE_TYPE_SHARE = 0.7               # chance of each type in a noisy view
NOISY_SHARE = 0.5                    # share of the student's views with noise; the others stay clean
SNR_DB = (0.0, 24.0)                 # uniform; mean-square definition, see add_noise
MUSCLE_HIGHPASS_HZ = 1.0             # below that `ma` is mostly wander, and its power would say nothing about muscle
GAIN = (0.9, 1.1)                    # log-uniform; small, as voltage is diagnostic; one per view, to keep lead ratios
UNKNOWN_SHARE = 0.02                 # share of a view's leads whose name is replaced by "unknown"
MASKED_CROPS = 1.0                   # share of the global views with a mask (DINOv3: half; a short run needs all)
MASK_RATIO = (0.2, 0.6)              # share of patches in a masked view, on an even grid, so that the total is fixed
MASK_KINDS = dict(time=0.6, lead=0.2, mixed=0.2)
MASK_SPAN_PATCHES = (2, 5)           # length of masked spans in time

ELECTRODES = ("RA", "LA", "LL") + tuple(name for name in LEADS if name[0] in "VXYZ") + ("other",)


# ---- shapes of views ------------------------------------------------------------------------------------------------
class LeadGroup(NamedTuple):
    """A part of every batch whose views have one shape."""
    leads: int                   # of a global view; recordings with as many or more take part
    slots: int                   # leads that a batch carries
    window_s: float              # the part of a recording from which its views are cut
    global_patches: int          # of a lead of a global view
    local_patches: int           # of a lead of a local view
    share: float                 # of the batch


class ViewSpec(NamedTuple):
    """A list of equally shaped views of each recording."""
    views: int                   # per recording
    leads: int                   # of each view
    patches: int                 # of each lead
    independent: bool            # take the first slots: the sampler puts leads there from which all others follow


def lead_groups(window_s=WINDOW_S):
    """The lead groups of a run, views as long as the window allows.

    Groups of few leads get longer views: few leads show mainly rhythm, and rhythm needs several beats. Recordings with
    many leads take part in the groups of few leads too, with a random choice of their leads. A longer window makes only
    the views of few leads longer; a recording that is too short for it can still be in the group of many leads.
    """
    few = [round(patches * window_s / WINDOW_S) for patches in FEW_PATCHES]
    return (LeadGroup(8, 12, min(window_s, WINDOW_S), *MANY_PATCHES, share=0.5),
            LeadGroup(2, 4, window_s, *few, share=0.25), LeadGroup(1, 1, window_s, *few, share=0.25))


def view_specs(shape, few):
    """View lists of a lead group: global views, local views with all its leads, local views with `few` leads (or fewer,
    if the group has fewer)."""
    return (ViewSpec(GLOBAL_VIEWS, shape.leads, shape.global_patches, True),
            ViewSpec(LOCAL_FULL_VIEWS, shape.leads, shape.local_patches, True),
            ViewSpec(LOCAL_FEW_VIEWS, min(few, shape.leads), shape.local_patches, False))


# ---- lead definitions -----------------------------------------------------------------------------------------------
@functools.cache
def lead_electrode_matrix(device="cpu"):
    """(len(LEADS), E): weight of each electrode in each lead.

    Limb leads by Einthoven and Goldberger, chest leads against Wilson's central terminal. The orthogonal leads X, Y, Z
    and unknown leads get an electrode of their own against that terminal: their wiring is not known, and for noise this
    is enough.
    """
    matrix = torch.zeros(len(LEADS), len(ELECTRODES))
    limb = {"I": (-1, 1, 0), "II": (-1, 0, 1), "III": (0, -1, 1),
            "aVR": (1, -0.5, -0.5), "aVL": (-0.5, 1, -0.5), "aVF": (-0.5, -0.5, 1)}
    for i, name in enumerate(LEADS):
        if name in limb:
            matrix[i, :3] = torch.tensor(limb[name], dtype=torch.float32)
        else:
            matrix[i, :3] = -1 / 3
            matrix[i, ELECTRODES.index(name if name in ELECTRODES else "other")] = 1.0
    return matrix.to(device)


# ---- windows and leads ----------------------------------------------------------------------------------------------
def choose_leads(order, available, leads):
    """Slots (V, B, L) of `leads` random leads among the first available[b] slots of each recording; order (V, B, S):
    uniform random numbers."""
    absent = np.arange(order.shape[2])[None, :] >= available[:, None]                             # (B, S)
    slots = np.where(absent, 2.0, order).argsort(axis=2)[:, :, :leads]
    return np.sort(slots, axis=2)


def draw_views(rng, spec, recordings, slots, window, noise_length, patch_samples):
    """All random numbers of one view list for a whole batch, a dict of arrays (V, B, ...); see the constants above."""
    V, L, T = spec.views, spec.leads, spec.patches * patch_samples
    shape, types = (V, recordings), len(NOISE_TYPES)
    noisy = rng.random(shape) < NOISY_SHARE
    snr_db = np.where(noisy, rng.uniform(*SNR_DB, shape), np.inf)
    present = rng.random(shape + (types,)) < NOISE_TYPE_SHARE
    present[~present.any(-1)] = True
    amplitude = rng.uniform(0.3, 1.0, shape + (types,)) * present
    electrodes = shape + (len(ELECTRODES), types)
    return dict(
        order=rng.random(shape + (slots,)),
        start=rng.integers(0, window - T + 1, shape),
        gain=np.exp(rng.uniform(*np.log(GAIN), shape)).astype(np.float32),
        hidden=rng.random(shape + (L,)) < UNKNOWN_SHARE,
        snr_db=snr_db.astype(np.float32),
        amplitude=amplitude.astype(np.float32),
        sign=rng.choice(np.float32([-1, 1]), electrodes),
        channel=rng.integers(0, 2, electrodes),
        offset=rng.integers(0, noise_length - T + 1, electrodes),
    )


def share_of_rank(draws, rows, spec, available):
    """This rank's part of the draws, as tensors: recordings `rows`, whose first available[b] slots hold a lead.

    The leads of each view are chosen here: the first slots (see ViewSpec.independent), or random ones.
    """
    draws = {name: values[:, rows] for name, values in draws.items()}
    order = draws.pop("order")
    if spec.independent:
        draws["slots"] = np.broadcast_to(np.arange(spec.leads), order.shape[:2] + (spec.leads,))
    else:
        draws["slots"] = choose_leads(order, available, spec.leads)
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in draws.items()}


def make_views(batch_uv, slot_leads, draws, spec, patch_samples, noise=None):
    """Cut one view list out of a batch.

    batch_uv (B, S, W) int16 uV, slot_leads (B, S) lead ids, draws of share_of_rank, noise of load_noise or None.
    Returns noisy and clean signal, each (V*B, L, T) mV, and the leads (V*B, L) with some names hidden and as they are;
    all view-major (row = view * B + recording).
    """
    device = batch_uv.device
    draws = {name: values.to(device, non_blocking=True) for name, values in draws.items()}
    row = torch.arange(len(batch_uv), device=device)[None, :, None]
    time = draws["start"][..., None, None] + torch.arange(spec.patches * patch_samples, device=device)  # (V, B, 1, T)
    clean = batch_uv[row[..., None], draws["slots"][..., None], time].float() * 1e-3              # (V, B, L, T) mV
    clean = (clean * draws["gain"][..., None, None]).flatten(0, 1)
    leads = slot_leads[row, draws["slots"]].flatten(0, 1)
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
    steps = torch.arange(length, device=noise.device)
    total = 0.0
    for t in range(len(NOISE_TYPES)):
        window = noise[t][channel[..., t, None], offset[..., t, None] + steps]                    # (B, E, T)
        total = total + window * (sign[..., t] * amplitude[:, None, t])[..., None]
    return total


def add_noise(signal, leads, noise, snr_db, amplitude, sign, channel, offset):
    """signal (B, L, T) mV with noise at snr_db (B,) decibels; +inf leaves a recording as it is.

    Definition: per lead, 10 log10(mean square of the signal / mean square of the noise), after the mean of each over
    the window is subtracted; snr_db is the median of that over the leads of the recording (the mean of the middle two,
    if their number is even). One factor scales the noise of all leads, so that it still obeys the lead definitions. A
    lead with a flat signal is not counted. Most papers on deep learning use this definition; the `nst` program has
    another, whose 0 dB is about -10 dB here.
    """
    matrix = lead_electrode_matrix(signal.device)
    at_electrodes = electrode_noise(noise, amplitude, sign, channel, offset, signal.shape[-1])
    lead_noise = matrix[leads] @ at_electrodes                                                    # (B, L, T)
    lead_noise = lead_noise - lead_noise.mean(dim=-1, keepdim=True)
    power = signal.var(dim=-1, correction=0)                                                      # (B, L) mV^2
    ratio_db = 10 * torch.log10(power / lead_noise.var(dim=-1, correction=0).clamp(min=1e-12))
    flat = power < 1e-10
    ratio_db = torch.where(flat, torch.nan, ratio_db).nanquantile(0.5, dim=-1)                    # (B,)
    factor = 10 ** ((ratio_db - snr_db) / 20)
    # The factor is NaN if all leads are flat: such a recording gets no noise. At +inf dB it is 0 already.
    factor = torch.where(factor.isfinite(), factor, 0.0)
    return signal + factor[:, None, None] * lead_noise


# ---- masks ----------------------------------------------------------------------------------------------------------
def mask_counts(crops, tokens):
    """Number of masked patches of each crop: a fixed share of the crops has ratios on an even grid, the others have
    none. The sum never changes."""
    masked = int(crops * MASKED_CROPS)
    ratios = np.linspace(*MASK_RATIO, masked + 1)[1:] if masked > 1 else np.full(masked, np.mean(MASK_RATIO))
    counts = np.maximum(1, np.floor(tokens * ratios)).astype(np.int64)
    return np.concatenate([np.zeros(crops - masked, np.int64), counts])


def draw_masks(rng, crops, leads, patches):
    """Masks (crops, L, N) bool with exactly mask_counts() patches each, over shuffled crops, always the same total.

    time: spans of time over all leads together, because a masked limb lead could be computed from the others; lead:
    whole leads; mixed: one lead in four, then spans of time. Each kind ranks the patches, and the first `count` are
    masked, so the last span or lead may be masked only in part.
    """
    counts = rng.permutation(mask_counts(crops, leads * patches))
    kind = rng.choice(list(MASK_KINDS), crops, p=list(MASK_KINDS.values()))[:, None, None]
    if leads == 1:
        kind[:] = "time"                                                 # of one lead only spans of time can be masked
    span = rng.integers(MASK_SPAN_PATCHES[0], MASK_SPAN_PATCHES[1] + 1, (crops, 1))
    block = (np.arange(patches) + rng.integers(0, span)) // span         # (crops, N) the span that a patch is in
    time_rank = np.take_along_axis(rng.random((crops, patches // MASK_SPAN_PATCHES[0] + 2)), block, axis=1)[:, None, :]
    lead_rank = rng.random((crops, leads, 1))
    lead_in_span, early_first = rng.random((crops, leads, 1)), np.arange(patches)      # order within the last span

    one_in_four = lead_rank <= np.quantile(lead_rank, 0.25, axis=1, keepdims=True)
    by_lead = (kind == "lead") | (kind == "mixed") & one_in_four         # (crops, L, 1)
    first = np.where(by_lead, np.where(kind == "mixed", lead_rank - 1, lead_rank), time_rank)      # (crops, L, N)
    then = np.where(by_lead, time_rank + 1e-6 * early_first, lead_in_span + 1e-3 * early_first)
    order = np.lexsort((then.reshape(crops, -1), first.reshape(crops, -1)), axis=1)
    masks = np.zeros((crops, leads * patches), bool)
    np.put_along_axis(masks, order, np.arange(leads * patches) < counts[:, None], axis=1)
    return masks.reshape(crops, leads, patches)


# ---- batches, one step ahead ----------------------------------------------------------------------------------------
def host_batch(sampler, step, rank, world_size, noise_length, patch_samples):
    """Everything that is random or read from disk in a step, for this rank: a dict per group with windows, lead ids,
    draws of views and masks."""
    few = int(np.random.default_rng([sampler.seed, step, 99]).choice(FEW_LEADS))
    groups, chosen = [], sampler.choose(step)
    for g, group in enumerate(sampler.groups):
        rng = np.random.default_rng([sampler.seed, step, g, 2])
        rows = slice(rank, group["size"], world_size)
        batch, leads, available = sampler.draw(step, g, chosen[g], rows)
        specs = view_specs(group["shape"], few)
        draws = [share_of_rank(draw_views(rng, spec, group["size"], group["shape"].slots, group["window"], noise_length,
                                      patch_samples), rows, spec, available) for spec in specs]
        masks = draw_masks(rng, GLOBAL_VIEWS * group["size"], specs[0].leads, specs[0].patches)
        masks = masks.reshape(GLOBAL_VIEWS, group["size"], *masks.shape[1:])[:, rows].reshape(-1, *masks.shape[1:])
        groups.append(dict(batch=torch.from_numpy(batch), leads=torch.from_numpy(leads), specs=specs, draws=draws,
                           masks=torch.from_numpy(masks)))
    return groups


def cut_views(group, noise, patch_samples, device):
    """A lead group of host_batch, on the device: views (noisy signal, clean signal, lead ids with some hidden, lead
    ids), masks (2B, L, N), and for each masked patch its place among the patches of all global views and its weight in
    the iBOT loss."""
    masks = group["masks"]
    place = masks.flatten().nonzero().squeeze(1)
    weights = (1.0 / masks.sum((1, 2)).clamp(min=1))[place // masks[0].numel()]
    batch, leads = group["batch"].to(device), group["leads"].to(device)
    views = [make_views(batch, leads, draws, spec, patch_samples, noise)
             for spec, draws in zip(group["specs"], group["draws"])]
    return dict(views=views, masks=masks.to(device), place=place.to(device), weights=weights.to(device),
                recordings=len(batch))


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
                for tensor in (g["masks"], g["place"], g["weights"], *itertools.chain(*g["views"])):
                    tensor.record_stream(current)
        return made
