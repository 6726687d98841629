"""augment.py: noise that obeys the lead definitions at an exact level, views that are stretches of the recording,
masks of a fixed total, and batches that are functions of (seed, step).
"""
import numpy as np
import pytest
import torch
import wfdb

import augment
from augment import (ASKED_PATCHES, FEW_PATCHES, FEW_TOKENS, GAIN, MASK_RATIO, MASK_SPAN_PATCHES, MASKED_CROPS,
                     NAMELESS_SHARE, NOISE_TYPES, NOISY_SHARE, SNR_DB, UNKNOWN_SHARE, Batches, ViewSpec, cut_views,
                     draw_masks, draw_views, electrode_weights, host_batch, lead_groups, load_noise, make_views,
                     mask_counts, random_numbers, view_specs)
from conftest import TWELVE, draw_ecg, run
from corpus import INDEX_DTYPE, Corpus, Sampler, open_corpus
from ecg import FS, LEADS, MISSING, lead_id
from test_corpus import of_leads

LIMB = TWELVE[:6]
PATCH = 50                       # samples
WINDOW = 6 * FS                  # samples of the two stretches of a recording that views are cut from
FIFTEEN = (*TWELVE, "X", "Y", "Z")


def ids(*names):
    return torch.tensor([lead_id(name) for name in names])


@pytest.fixture(scope="module")
def noise():
    """(types, 2, samples) of unit deviation: slow, in steps, and fast, as the three types of the database are."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(2, 20 * FS)), axis=1)
    steps = np.repeat(rng.normal(size=(2, 20 * FS // 100)), 100, axis=1) + 0.1 * rng.normal(size=(2, 20 * FS))
    x = np.stack((walk, steps, rng.normal(size=(2, 20 * FS))))
    return torch.from_numpy((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)).float()


@pytest.fixture(scope="module")
def batch():
    """Six recordings of 12 leads: int16 uV (6, 2, 12, WINDOW) of different size, rate and offset; lead ids (6, 12)."""
    signal = [(0.5 + 0.2 * i) * draw_ecg(FS, 2 * WINDOW / FS, TWELVE, rr_s=0.6 + 0.1 * i) + 0.3 * i for i in range(6)]
    signal = np.stack(signal).reshape(6, 12, 2, WINDOW).swapaxes(1, 2)
    return torch.from_numpy((1000 * signal).round().astype(np.int16)), ids(*TWELVE).expand(6, -1)


def views_of(batch, spec, noise=None, seed=0, rows=slice(None), available=None, **changed):
    """Draws and the resulting (noisy, clean, leads, all_leads) of `rows` of a batch; `changed` replaces draws."""
    signal, leads = batch
    available = np.full(len(leads), leads.shape[1]) if available is None else available
    draws = draw_views(seed, range(len(leads))[rows], spec, leads[rows].numpy(), available[rows], signal.shape[3],
                       20 * FS, PATCH)
    draws = {name: torch.from_numpy(values) for name, values in (draws | changed).items()}
    return draws, make_views(signal[rows], leads[rows], draws, spec, PATCH, noise)


# ---------------------------------------------------------------------------------------------------------------------
# lead definitions

def assert_limb_laws(leads, **tolerance):
    """leads: name -> values. Einthoven's law and Goldberger's definitions."""
    I, II = leads["I"], leads["II"]
    for name, expected in (("III", II - I), ("aVR", -(I + II) / 2), ("aVL", I - II / 2), ("aVF", II - I / 2)):
        if name in leads:
            torch.testing.assert_close(leads[name], expected, **tolerance)


def test_leads_follow_from_electrodes():
    right, left, foot, *own = torch.randn(3 + len(LEADS), 100, generator=torch.Generator().manual_seed(0))
    leads = {name: weights @ torch.stack((right, left, foot, at))
             for name, weights, at in zip(LEADS, electrode_weights(), own)}
    assert_limb_laws(leads, rtol=0, atol=1e-5)
    torch.testing.assert_close(leads["I"], left - right)
    torch.testing.assert_close(leads["II"], foot - right)
    for name, at in zip(LEADS, own):
        if name not in LIMB:
            torch.testing.assert_close(leads[name], at - (right + left + foot) / 3)
    # What all electrodes share is in no lead.
    torch.testing.assert_close(electrode_weights().sum(dim=1), torch.zeros(len(LEADS)), rtol=0, atol=1e-6)
    assert len({tuple(row.tolist()) for row in electrode_weights()[ids(*LIMB)]}) == len(LIMB)


@pytest.mark.parametrize("names", [TWELVE, ("III", "V3", "II", "aVF", "I"), ("aVL", "aVR", "I", "II")])
def test_noise_obeys_the_lead_definitions(batch, noise, names):
    slots = [TWELVE.index(name) for name in names]
    spec = ViewSpec(views=3, leads=len(names), patches=10, independent=True)
    # Hidden names must not matter: the electrodes are where they are.
    _, (noisy, clean, leads, _) = views_of((batch[0][:, :, slots], batch[1][:, slots]), spec, noise,
                                           snr_db=np.zeros((3, 6), np.float32),
                                           hidden=np.ones((3, 6, len(names)), bool))
    assert (leads == 0).all()
    added = dict(zip(names, (noisy - clean).double().transpose(0, 1)))
    assert min(x.std(dim=-1).min() for x in added.values()) > 0.01
    assert_limb_laws(added, rtol=0, atol=2e-6)


def test_noise_of_chest_leads_is_their_own(batch, noise):
    _, (noisy, clean, *_) = views_of(batch, ViewSpec(2, 12, 20, True), noise, snr_db=np.zeros((2, 6), np.float32))
    for row in (noisy - clean).double():
        assert torch.linalg.matrix_rank(row, rtol=1e-4) == 8            # 12 leads, of which 8 are independent


# ---------------------------------------------------------------------------------------------------------------------
# signal-to-noise ratio

def measured_snr_db(noisy, clean):
    """Median over leads of 10 log10 of the ratio of mean squares, each without its mean: (B,)."""
    added, clean = (noisy.double() - clean.double()).numpy(), clean.double().numpy()
    return np.array([np.median([10 * np.log10(s.var() / n.var()) for s, n in zip(signal, extra) if s.var() > 0])
                     for signal, extra in zip(clean, added)])


@pytest.mark.parametrize("names", [TWELVE, ("II",), ("MLII", "V1"), ("I", "II", "V2"), ("ECG", "V5")])
def test_snr_is_exact(batch, noise, names):
    slots = [TWELVE.index(name) if name in TWELVE else 1 for name in names]
    spec = ViewSpec(views=4, leads=len(names), patches=25, independent=True)
    for snr_db in (SNR_DB[0], 0.0, 7.3, SNR_DB[1], np.random.default_rng(1).uniform(*SNR_DB, (4, 6))):
        _, (noisy, clean, *_) = views_of((batch[0][:, :, slots], ids(*names).expand(6, -1)), spec, noise,
                                        snr_db=np.broadcast_to(snr_db, (4, 6)).astype(np.float32))
        np.testing.assert_allclose(measured_snr_db(noisy, clean), np.broadcast_to(snr_db, (4, 6)).ravel(), atol=0.05)


def test_flat_leads_do_not_count_for_the_snr(batch, noise):
    signal = batch[0].clone()
    signal[:, :, 3:8] = 120                                                # an offset is no signal
    spec, snr_db = ViewSpec(1, 12, 25, True), np.full((1, 6), 3, np.float32)
    _, (noisy, clean, *_) = views_of((signal, batch[1]), spec, noise, snr_db=snr_db)
    np.testing.assert_allclose(measured_snr_db(noisy, clean), 3, atol=0.05)
    signal[:] = 120
    _, (noisy, clean, *_) = views_of((signal, batch[1]), spec, noise, snr_db=snr_db)
    assert torch.equal(noisy, clean)                                    # nothing to relate the noise to


def test_infinite_snr_is_clean_to_the_bit(batch, noise):
    draws, (noisy, clean, *_) = views_of(batch, ViewSpec(8, 12, 10, True), noise)
    is_clean = draws["snr_db"].flatten().isinf()
    assert 0 < is_clean.sum() < len(is_clean)
    assert torch.equal(noisy[is_clean], clean[is_clean])
    assert (noisy != clean)[~is_clean].any(dim=(1, 2)).all()
    _, (noisy, clean, *_) = views_of(batch, ViewSpec(8, 12, 10, True), None)
    assert torch.equal(noisy, clean)


def test_noise_is_a_sum_over_electrodes_and_types(batch, noise):
    """add_noise against loops: before scaling, an electrode has sign * amplitude * a stretch of a channel of each
    type."""
    draws, (noisy, clean, *_) = views_of(batch, ViewSpec(1, 12, 5, True), noise, snr_db=np.full((1, 6), 2, np.float32))
    d = {name: values[0].numpy() for name, values in draws.items()}
    for b in range(6):
        at = np.zeros((3 + 12, 250))
        for e in range(3 + 12):
            for t in range(len(NOISE_TYPES)):
                start = d["offset"][b, e, t]
                stretch = noise[t, d["channel"][b, e, t], start:start + 250].numpy()
                at[e] += d["sign"][b, e, t] * d["amplitude"][b, t] * stretch
        weights = electrode_weights()[ids(*TWELVE)].numpy()
        expected = weights[:, :3] @ at[:3] + weights[:, 3:] * at[3:]
        expected -= expected.mean(axis=1, keepdims=True)
        added = (noisy - clean)[b].numpy()
        np.testing.assert_allclose(added / added.std(), expected / expected.std(), atol=1e-4)


def gathered(batch, draws, spec, noise):
    """What make_views returns first, gathered sample by sample, with the weights of all electrodes in one matrix."""
    signal, leads = batch
    time, row = torch.arange(spec.patches * PATCH), torch.arange(len(signal))[:, None]
    stretch = torch.arange(spec.views)[:, None, None, None] % 2
    d = {name: values.flatten(0, 1) for name, values in draws.items()}
    shown = leads[row, draws["slots"]].flatten(0, 1)
    clean = signal[row[..., None], stretch, draws["slots"][..., None], draws["start"][..., None, None] + time]
    clean = (clean.float() * 1e-3 * draws["gain"][..., None, None]).flatten(0, 1)
    total = 0.0
    for t in range(len(NOISE_TYPES)):
        window = noise[t][d["channel"][..., t, None], d["offset"][..., t, None] + time]
        total = total + window * (d["sign"][..., t] * d["amplitude"][:, None, t])[..., None]
    weights = electrode_weights()[shown]
    added = torch.cat((weights[..., :3], torch.diag_embed(weights[..., 3])), dim=-1) @ total
    added = added - added.mean(dim=-1, keepdim=True)
    ratio_db = 10 * torch.log10(clean.var(dim=-1, correction=0) / added.var(dim=-1, correction=0).clamp(min=1e-12))
    factor = 10 ** ((ratio_db.nanquantile(0.5, dim=-1) - d["snr_db"]) / 20)
    return clean + factor[:, None, None] * added


@pytest.mark.parametrize("spec", [ViewSpec(2, 8, 15, True), ViewSpec(3, 3, 10, False), ViewSpec(2, 1, 20, False)])
def test_views_are_those_of_a_gather_sample_by_sample(batch, noise, spec):
    """To the bit: limb and chest leads, X, Y, Z, and unknown ones, each of which has an electrode of its own."""
    leads = ids("I", "II", "V1", "X", "unknown", "aVF", "unknown", "V1", "Y", "Z", "V4R", "I").repeat(6, 1)
    leads[1::2] = ids(*TWELVE)
    draws, (noisy, clean, _, shown) = views_of((batch[0], leads), spec, noise,
                                               snr_db=np.full((spec.views, 6), 5, np.float32))
    assert torch.equal(noisy, gathered((batch[0], leads), draws, spec, noise))
    if spec.independent:
        added = noisy - clean
        assert shown[0, [4, 6]].tolist() == [0, 0] and (added[0, 4] - added[0, 6]).abs().max() > 0.01


def test_autocast_does_not_lower_the_precision(batch, noise):
    spec = ViewSpec(2, 12, 10, True)
    _, expected = views_of(batch, spec, noise)
    with torch.autocast("cpu", torch.bfloat16):
        _, views = views_of(batch, spec, noise)
    for a, b in zip(views, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# windows, leads, gain

@pytest.mark.parametrize("spec", [ViewSpec(2, 8, 15, True), ViewSpec(3, 3, 10, False), ViewSpec(2, 12, 30, False),
                                  ViewSpec(4, 2, 7, False), ViewSpec(1, 1, 1, False)])
def test_views_are_stretches_of_the_recording(batch, spec):
    draws, (_, clean, leads, all_leads) = views_of(batch, spec)
    T = spec.patches * PATCH
    assert clean.shape == (spec.views * 6, spec.leads, T) and clean.dtype == torch.float32
    assert leads.shape == clean.shape[:2]
    for v in range(spec.views):
        for b in range(6):
            start, gain, slots = int(draws["start"][v, b]), float(draws["gain"][v, b]), draws["slots"][v, b]
            expected = batch[0][b, v % 2, slots, start:start + T] / 1000 * gain    # half of the views from either
            torch.testing.assert_close(clean[v * 6 + b], expected, rtol=1e-6, atol=1e-7)
            names = torch.where(draws["hidden"][v, b], 0, batch[1][b, slots])
            assert torch.equal(leads[v * 6 + b], names) and torch.equal(all_leads[v * 6 + b], batch[1][b, slots])
            assert len(set(slots.tolist())) == spec.leads
            if spec.independent:
                assert slots.tolist() == list(range(spec.leads))


def test_random_leads_are_those_that_there_are(batch):
    """Slots beyond `available` repeat other leads; all that a recording has are taken, about equally often."""
    available = np.array([12, 8, 3, 2, 2, 5])
    draws, _ = views_of(batch, ViewSpec(600, 2, 1, False), available=available)
    slots = draws["slots"].numpy()                                      # (600, 6, 2)
    assert (slots[..., 0] < slots[..., 1]).all()
    for b, n in enumerate(available):
        times = np.bincount(slots[:, b].ravel(), minlength=12)
        assert (times[n:] == 0).all()
        np.testing.assert_allclose(times[:n], 1200 / n, rtol=0.35)


def test_draws_stay_in_their_ranges():
    spec = ViewSpec(50, 4, 10, False)
    leads = ids(*TWELVE).expand(100, -1).numpy()
    draws = draw_views(0, range(100), spec, leads, np.full(100, 12), WINDOW, 20 * FS, PATCH)
    finite = draws["snr_db"][np.isfinite(draws["snr_db"])]
    assert len(finite) / 5000 == pytest.approx(NOISY_SHARE, abs=0.05)
    assert SNR_DB[0] <= finite.min() < SNR_DB[0] + 1 and SNR_DB[1] - 1 < finite.max() <= SNR_DB[1]
    assert finite.mean() == pytest.approx(np.mean(SNR_DB), abs=1)
    assert GAIN[0] <= draws["gain"].min() < 1.02 * GAIN[0] and 0.98 * GAIN[1] < draws["gain"].max() <= 1.0001 * GAIN[1]
    assert np.log(draws["gain"]).mean() == pytest.approx(np.log(GAIN).mean(), abs=0.01)
    assert set(draws["start"].ravel()) == set(range(0, WINDOW - 10 * PATCH + 1, PATCH))  # whole patches, each of them
    np.testing.assert_allclose(np.unique(draws["start"], return_counts=True)[1], 5000 / 21, rtol=0.3)
    last = 20 * FS - 10 * PATCH
    assert 0 <= draws["offset"].min() < 10 and last - 10 < draws["offset"].max() <= last
    assert draws["offset"].mean() == pytest.approx(last / 2, rel=0.01)
    nameless = draws["hidden"].all(axis=-1)
    assert nameless.mean() == pytest.approx(NAMELESS_SHARE, abs=0.02)
    assert draws["hidden"][~nameless].mean() == pytest.approx(UNKNOWN_SHARE, abs=0.01)
    assert (draws["amplitude"].max(axis=-1) > 0).all() and ((draws["amplitude"] == 0).mean(axis=(0, 1)) > 0.1).all()
    assert set(np.unique(draws["sign"])) == {-1, 1} and set(np.unique(draws["channel"])) == {0, 1}
    kinds = np.stack((draws["sign"], draws["channel"], draws["offset"])).reshape(3, -1)
    np.testing.assert_allclose(np.corrcoef(kinds), np.eye(3), atol=0.01)
    assert draws["sign"].mean() == pytest.approx(0, abs=0.01)
    assert draws["channel"].mean() == pytest.approx(0.5, abs=0.01)


def test_views_with_all_leads_of_their_group_keep_their_names():
    leads = ids(*TWELVE).expand(100, -1).numpy()
    draws = draw_views(0, range(100), ViewSpec(50, 2, 10, True), leads, np.full(100, 12), WINDOW, 20 * FS, PATCH)
    assert draws["hidden"].mean() == pytest.approx(UNKNOWN_SHARE, abs=0.005)
    assert draws["hidden"].all(axis=-1).mean() < 0.005


def test_a_view_as_long_as_the_window_starts_with_it(batch):
    draws, _ = views_of(batch, ViewSpec(2, 3, WINDOW // PATCH, False))
    assert (draws["start"] == 0).all()


def test_views_end_within_a_window_that_is_no_multiple_of_a_patch():
    draws = draw_views(0, range(500), ViewSpec(2, 1, 10, False), ids("II").expand(500, -1).numpy(), np.full(500, 1),
                       10 * PATCH + 2 * PATCH + PATCH // 2, 20 * FS, PATCH)
    assert set(draws["start"].ravel()) == {0, PATCH, 2 * PATCH}


def test_same_seed_same_views(batch, noise):
    spec = ViewSpec(2, 3, 10, False)
    first, again, other = (views_of(batch, spec, noise, seed=seed)[1] for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_make_the_views_of_one_process(batch, noise, independent, world_size):
    spec = ViewSpec(3, 4, 10, independent)
    _, whole = views_of(batch, spec, noise)
    for rank in range(world_size):
        rows = slice(rank, 6, world_size)
        _, part = views_of(batch, spec, noise, rows=rows)
        for a, b in zip(part, whole):
            torch.testing.assert_close(a.unflatten(0, (3, -1)), b.unflatten(0, (3, 6))[:, rows], rtol=1e-6, atol=1e-6)


def test_a_place_has_the_same_random_numbers_whichever_others_are_drawn():
    """Those of the whole batch are drawn in one go; no two views, places or steps have the same."""
    whole = np.random.default_rng([1, 2]).random((12, 2, 7)).swapaxes(0, 1)
    for places in (range(12), range(5, 12, 3), range(3, 12, 4), range(11, 12, 64)):
        numbers = random_numbers([1, 2], places, 2, a=3, b=4)
        assert np.array_equal(np.concatenate((numbers["a"], numbers["b"]), axis=2), whole[:, places])
    assert len(np.unique(whole)) == whole.size


# ---------------------------------------------------------------------------------------------------------------------
# noise from a corpus

@pytest.fixture(scope="module")
def noise_corpus(tmp_path_factory):
    """make(types): a corpus prepared from one minute of noise per type, two channels at 360 Hz, slow plus fast."""
    def make(types):
        folder = tmp_path_factory.mktemp("noise")
        rng = np.random.default_rng(0)
        t = np.arange(60 * 360) / 360
        for name in types:
            slow = np.stack((np.sin(2 * np.pi * 0.2 * t), np.cos(2 * np.pi * 0.2 * t)), axis=1)
            x = slow + 0.3 * rng.normal(size=(len(t), 2)) + 0.4
            wfdb.wrsamp(name, 360, ["mV", "mV"], ["noise1", "noise2"], x, fmt=["212", "212"], adc_gain=[200, 200],
                        baseline=[0, 0], write_dir=str(folder))
        return run("nstdb", folder, folder / "out")
    return make


def test_load_noise(noise_corpus):
    corpus = noise_corpus(NOISE_TYPES)
    noise = load_noise(corpus)
    assert noise.shape == (3, 2, 40 * FS) and noise.dtype == torch.float32        # 40 s of 60 are for training
    torch.testing.assert_close(noise.mean(-1), torch.zeros(3, 2), rtol=0, atol=0.01)
    torch.testing.assert_close(noise.std(-1), torch.ones(3, 2), rtol=1e-3, atol=0)
    slow = np.exp(-2j * np.pi * 0.2 * np.arange(40 * FS) / FS)                   # the 0.2 Hz that was put in
    share = 2 * np.abs(noise.numpy() @ slow / noise.shape[-1]) ** 2
    for t, name in enumerate(NOISE_TYPES):
        assert (share[t] < 0.05).all() if name == "ma" else (share[t] > 0.8).all(), name
    raw = corpus.read(corpus.records.tolist().index(b"em")).astype(float)
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(raw, noise[NOISE_TYPES.index("em")])) > 0.9999
    held_out = load_noise(corpus, "test")
    assert held_out.shape == (3, 2, 20 * FS) and not torch.equal(held_out, noise[..., :20 * FS])


def test_absent_noise_is_refused(noise_corpus):
    corpus = noise_corpus(("bw", "em"))
    with pytest.raises(ValueError, match="no ma noise in split 'train'.*prepare.py nstdb"):
        load_noise(corpus)


def test_missing_samples_of_noise_are_no_noise(tmp_path):
    """A gap must come out as the mean of its channel, not as a jump to 0 uV."""
    x = np.tile(1000 + 50 * np.sin(np.arange(2500)), (2, 1)).astype(np.int16)
    x[:, 500:600] = MISSING
    index = np.zeros(3, INDEX_DTYPE)
    index["length"], index["n_leads"] = 2500, 2                                     # all three lie at offset 0
    (tmp_path / "signal").mkdir()
    x.tofile(tmp_path / "signal" / "00000.i16")
    noise = load_noise(Corpus(tmp_path, {}, index, np.array(NOISE_TYPES, "S64"), np.array([b"nobody"])))
    assert noise.isfinite().all() and noise[:, :, 510:590].abs().max() < 2


def test_real_noise(shared_data, tmp_path, batch):
    """Noise of the database at its worst level, on all leads: the level is exact and the laws hold."""
    noise = load_noise(run("nstdb", shared_data / "nstdb", tmp_path / "nstdb"))
    assert noise.shape == (3, 2, 20 * 60 * FS)
    _, (noisy, clean, *_) = views_of(batch, ViewSpec(4, 12, 25, True), noise,
                                     snr_db=np.full((4, 6), SNR_DB[0], np.float32))
    np.testing.assert_allclose(measured_snr_db(noisy, clean), SNR_DB[0], atol=0.05)
    assert_limb_laws(dict(zip(TWELVE, (noisy - clean).double().transpose(0, 1))), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# masks

CROPS, N = 64, 25


def masks_of(monkeypatch, kind=None, crops=CROPS, leads=8, patches=N, seed=0):
    """Masks (crops, L, N) as a NumPy array; with `kind`, all of that kind and without the crops that have no mask."""
    if kind:
        monkeypatch.setattr(augment, "MASK_KINDS", {name: float(name == kind) for name in augment.MASK_KINDS})
    counts = np.random.default_rng(seed).permutation(mask_counts(crops, leads * patches))
    masks = draw_masks([seed, 1], range(crops), counts[None], leads, patches)
    assert masks.shape == (crops, leads, patches) and masks.dtype == bool
    return masks[masks.any(axis=(1, 2))] if kind else masks


def runs(row):
    """Lengths of the runs of True in a 1-D array."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row.astype(int), [0]))))
    return edges[1::2] - edges[::2]


@pytest.mark.parametrize("crops, leads, patches", [(64, 8, 25), (7, 12, 30), (10, 1, 25), (6, 2, 3), (4, 1, 1),
                                                   (2, 3, 10), (1, 8, 25)])
def test_the_number_of_masked_patches_is_fixed(monkeypatch, crops, leads, patches):
    (low, high), masked = MASK_RATIO, int(crops * MASKED_CROPS)
    ratios = [low + (high - low) * (i + 1) / masked for i in range(masked)]
    if masked == 1:
        ratios = [(low + high) / 2]
    expected = [0] * (crops - masked) + [max(1, int(leads * patches * ratio + 1e-9)) for ratio in ratios]
    # 1: rounding of the grid
    np.testing.assert_allclose(np.sort(mask_counts(crops, leads * patches)), expected, atol=1)
    for seed in range(5):
        counts = masks_of(monkeypatch, None, crops, leads, patches, seed).sum(axis=(1, 2))
        assert np.sort(counts).tolist() == np.sort(mask_counts(crops, leads * patches)).tolist()
        assert (counts == 0).sum() == crops - masked


def test_which_crops_are_masked_changes(monkeypatch):
    a, b, c = (masks_of(monkeypatch, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a.sum(axis=(1, 2)), c.sum(axis=(1, 2)))


@pytest.mark.parametrize("leads", [1, 3, 12])
def test_time_masks_are_spans_over_all_leads(monkeypatch, leads):
    masks = masks_of(monkeypatch, "time", leads=leads)
    lengths, shuffled = [], []
    for mask in masks:
        whole, some = mask.all(axis=0), mask.any(axis=0)
        cut = np.flatnonzero(some & ~whole)                     # at most one span is cut, to reach the exact count
        assert len(cut) <= MASK_SPAN_PATCHES[1] and (len(cut) < 2 or cut[-1] - cut[0] < MASK_SPAN_PATCHES[1])
        lengths.extend(runs(some))
        shuffled.extend(runs(np.random.default_rng(0).permutation(some)))
    assert np.mean(lengths) > 1.7 * np.mean(shuffled) and np.mean(lengths) > 2.5
    assert masks.any(axis=1).mean(axis=0).min() > 0.1                   # every place in time gets its turn


def test_lead_masks_are_whole_leads(monkeypatch):
    masks = masks_of(monkeypatch, "lead")
    for mask in masks:
        assert ((mask.any(axis=1) & ~mask.all(axis=1)).sum() <= 1)      # at most one is cut
        assert mask.any(axis=1).sum() == -(-mask.sum() // N)
        assert all(len(runs(row)) <= 6 for row in mask)                 # and that one in spans
    assert masks.any(axis=2).mean(axis=0).min() > 0.1


def test_mixed_masks_have_whole_leads_and_spans(monkeypatch):
    masks = masks_of(monkeypatch, "mixed")
    assert masks.all(axis=2).any(axis=1).mean() > 0.8
    for mask in masks:
        whole = mask.all(axis=1)
        assert whole.sum() <= 2                                         # a quarter of eight
        rest = mask[~whole]
        if whole.sum() == 2:
            cut = np.flatnonzero(rest.any(axis=0) & ~rest.all(axis=0))
            assert len(cut) < 2 or cut[-1] - cut[0] < MASK_SPAN_PATCHES[1]
        else:                                                           # too few for the quarter: only leads
            assert rest.any(axis=1).sum() <= 1


def test_shares_of_the_kinds(monkeypatch):
    masks = masks_of(monkeypatch, crops=4000, leads=12)
    masks = masks[masks.any(axis=(1, 2))]
    share = masks.all(axis=2).any(axis=1).mean()                        # a whole lead is masked: lead or mixed
    assert share == pytest.approx(augment.MASK_KINDS["lead"] + augment.MASK_KINDS["mixed"], abs=0.04)
    single = masks_of(monkeypatch, crops=200, leads=1)
    assert not single.all(axis=2).any()                                 # one lead is never masked as a whole


# ---------------------------------------------------------------------------------------------------------------------
# batches

def sampler(synth, batch=32, seed=5, names=("ptbxl", "mitdb")):
    return Sampler([open_corpus(synth / "data" / n) for n in names], batch, seed, lead_groups())


LEADS_OF = {"fifteen": FIFTEEN, "four": ("I", "II", "V1", "V5"), "three": ("X", "Y", "Z"), "two": ("MLII", "V1"),
            "one": ("II",)}


@pytest.fixture(scope="module")
def five_groups(tmp_path_factory):
    """A sampler of five corpora, one for each lead group, with 20 people each; batches of 64."""
    folder = tmp_path_factory.mktemp("five")
    return Sampler([of_leads(folder / name, 20 if len(leads) < 15 else 40, leads) for name, leads in LEADS_OF.items()],
                   64, 5, lead_groups())


def coded(group):
    """The group with a batch of which each whole patch holds one number, which tells recording, stretch, slot and
    time; without gain and noise a view shows where its patches come from. Returns also the time patches of a slot."""
    B, _, S, W = group["batch"].shape
    patches = W // PATCH
    numbers = torch.arange(B * 2 * S * patches).reshape(B, 2, S, patches)
    assert numbers.max() < 32767 and W == patches * PATCH
    return dict(group, batch=numbers.repeat_interleave(PATCH, dim=3).to(torch.int16)), patches


def patches_of(signal):
    """The number in each patch of views (V*B, L, T) of a coded batch: int (V*B, L, N)."""
    steps = (1000 * signal).round().long().unflatten(2, (-1, PATCH))
    assert (steps == steps[..., :1]).all()                              # whole patches
    return steps[..., 0]


@pytest.fixture
def without_gain(monkeypatch):
    monkeypatch.setattr(augment, "GAIN", (1.0, 1.0))


def flat(groups):
    return [t for g in groups
            for t in [g["batch"], g["leads"], g["masks"], *(v for d in g["draws"] for v in d.values()),
                      *(g["asked"] or {}).values(), *g["near"].values()]]


def test_batch_is_a_pure_function_of_seed_and_step(synth):
    def draw(seed, step):
        return flat(host_batch(sampler(synth, seed=seed), step, 0, 1, 5000, PATCH))
    assert all(torch.equal(a, b) for a, b in zip(draw(5, 7), draw(5, 7)))
    assert not torch.equal(draw(5, 7)[0], draw(5, 8)[0])
    assert not torch.equal(draw(5, 7)[0], draw(6, 7)[0])
    asked = [host_batch(sampler(synth, seed=seed), step, 0, 1, 5000, PATCH)[1]["asked"]["token"]
             for seed, step in ((5, 7), (5, 8), (6, 7))]
    assert not torch.equal(asked[0], asked[1]) and not torch.equal(asked[0], asked[2])


def assert_ranks_share(s, step, noise, world_size):
    whole = host_batch(s, step, 0, 1, 5000, PATCH)
    for rank in range(world_size):
        for part, group in zip(host_batch(s, step, rank, world_size, 5000, PATCH), whole, strict=True):
            rows = slice(rank, None, world_size)
            assert torch.equal(part["batch"], group["batch"][rows]) and torch.equal(part["leads"], group["leads"][rows])
            assert torch.equal(part["masks"], group["masks"].unflatten(0, (2, -1))[:, rows].flatten(0, 1))
            assert part["specs"] == group["specs"]
            for mine, everyone in zip(part["draws"], group["draws"], strict=True):
                assert all(torch.equal(mine[k], everyone[k][:, rows]) for k in everyone)
            assert_ranks_ask_the_same(part, group, rows)
            made, expected = (cut_views(g, noise, PATCH, "cpu") for g in (part, group))
            for spec, mine, everyone in zip(part["specs"], made["views"], expected["views"], strict=True):
                noisy, *rest = (x.unflatten(0, (spec.views, -1))[:, rows].flatten(0, 1) for x in everyone)
                torch.testing.assert_close(mine[0], noisy, rtol=1e-6, atol=1e-6)
                assert all(torch.equal(a, b) for a, b in zip(mine[1:], rest, strict=True))


def assert_ranks_ask_the_same(part, group, rows):
    """The places count the recordings of a rank: within a view they are those of one process."""
    assert (part["asked"] is None) == (group["asked"] is None) == (len(part["specs"]) == 2)
    for kind in ("asked", "near") if part["asked"] is not None else ("near",):
        of = {"token": part["specs"][2 if kind == "asked" else 0], "target": part["specs"][0]}
        assert_rank_asks_the_same(part[kind], group[kind], rows, of)


def assert_rank_asks_the_same(part, group, rows, of):
    for name, mine in part.items():
        everyone = group[name].unflatten(0, (2, -1))[:, rows].flatten(0, 1)
        if name in of:
            patches = of[name].leads * of[name].patches
            assert (mine // patches == torch.arange(len(mine))[:, None]).all()
            mine, everyone = mine % patches, everyone % patches
        assert torch.equal(mine, everyone)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(synth, noise, world_size):
    """To the bit; only noise is scaled by arithmetic that rounds differently in a batch of another size."""
    assert_ranks_share(sampler(synth), 3, noise, world_size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_batch_of_five_groups(five_groups, noise, world_size):
    for step in (0, 1):
        assert_ranks_share(five_groups, step, noise, world_size)


def test_shapes_of_the_groups(five_groups):
    """Groups of few leads show them for longer; every view fits into a stretch."""
    groups = host_batch(five_groups, 0, 0, 1, 5000, PATCH)
    assert [(g["specs"][0].leads, g["specs"][0].patches, g["specs"][1].patches) for g in groups] == [
        (8, 25, 8), (4, 40, 15), (3, 40, 15), (2, 40, 15), (1, 40, 15)]
    assert [tuple(g["batch"].shape) for g in groups] == [
        (24, 2, 15, 1250), (12, 2, 4, 2000), (12, 2, 3, 2000), (8, 2, 2, 2000), (8, 2, 1, 2000)]
    assert [g["asked"] is None for g in groups] == [False] * 4 + [True]
    for g in groups:
        assert all(spec.patches * PATCH <= g["batch"].shape[3] and spec.views == 2 for spec in g["specs"])
        assert [spec.independent for spec in g["specs"]] == [True, True, False][:len(g["specs"])]


def test_numbers_of_leads_in_views_of_few():
    """1 to 12 of recordings with twelve leads or more, 1 to all but one of those with fewer; few more often than many,
    and not more patches than FEW_TOKENS, or FEW_PATCHES of each lead."""
    for shape in lead_groups():
        specs = [view_specs(shape, PATCH, few)[2:] for few in np.linspace(0, 1, 5000, endpoint=False)]
        if shape.leads == 1:
            assert specs == [[]] * 5000
            continue
        leads = np.bincount([spec.leads for spec, in specs])[1:]
        assert len(leads) == (12 if shape.leads == 8 else shape.leads - 1) and (leads > 0).all()
        np.testing.assert_allclose(leads / 5000, np.diff(np.log(np.arange(1, len(leads) + 2))) / np.log(len(leads) + 1),
                                   atol=0.001)
        for spec, in specs:
            assert spec.leads * spec.patches <= FEW_TOKENS or spec.patches == FEW_PATCHES
            assert FEW_PATCHES <= spec.patches <= shape.window_s * FS / PATCH
            assert spec.views == 2 and not spec.independent


def test_views_of_few_leads_show_any_number_and_all_leads(five_groups):
    """Over 200 steps: 1 to 12 of fifteen leads, X, Y and Z too; of four, three and two all in turns."""
    s = Sampler(five_groups.corpora, 16, 5, lead_groups())
    numbers, shown = [set() for _ in range(5)], [set() for _ in range(5)]
    nameless, pairs = [], set()
    for step in range(200):
        groups = host_batch(s, step, 0, 1, 5000, PATCH)
        pairs.add((groups[0]["specs"][2].leads, groups[1]["specs"][2].leads))
        for g, group in enumerate(groups):
            for spec, draws in list(zip(group["specs"], group["draws"]))[2:]:
                numbers[g].add(spec.leads)
                lead = group["leads"] if g == 0 else group["batch"][:, 0, :, 0]          # lead n (from 0) is n + 1 uV
                lead = lead[torch.arange(len(lead))[:, None], draws["slots"]]
                shown[g] |= set(lead.flatten().tolist())
                assert all(len(set(row.tolist())) == spec.leads for row in lead.flatten(0, 1))
                if g == 0:
                    nameless.append(draws["hidden"].all(-1).float().mean() - (spec.leads == 1) * UNKNOWN_SHARE)
    assert numbers == [set(range(1, 13)), {1, 2, 3}, {1, 2}, {1}, set()]
    assert len(pairs) > 20                                              # each group has its own number
    assert shown == [set(ids(*FIFTEEN).tolist()), {1, 2, 3, 4}, {1, 2, 3}, {1, 2}, set()]
    assert np.mean(nameless) == pytest.approx(NAMELESS_SHARE, abs=0.025)


def test_only_leads_of_the_first_group_have_names(five_groups):
    for step in range(5):
        for g, group in enumerate(host_batch(five_groups, step, 0, 1, 5000, PATCH)):
            cut = cut_views(group, None, PATCH, "cpu")
            for _, _, shown, named in cut["views"]:
                assert (named > 0).all() if g == 0 else (named == 0).all()
                assert ((shown == named) | (shown == 0)).all()


def test_unknown_leads_have_noise_of_their_own(five_groups, noise):
    """In the groups without names, too: what two leads had in common would not be noise to a difference of them."""
    for group in host_batch(five_groups, 0, 0, 1, noise.shape[-1], PATCH)[1:4]:
        signal = torch.randn(group["batch"].shape, generator=torch.Generator().manual_seed(0))
        for draws in group["draws"]:
            draws["snr_db"] = torch.zeros_like(draws["snr_db"])
        noisy, clean, leads, _ = cut_views(dict(group, batch=(1000 * signal).short()), noise, PATCH, "cpu")["views"][0]
        for added in (noisy - clean).double():
            assert torch.linalg.matrix_rank(added, rtol=1e-3) == len(added) > 1


def test_global_views_are_the_two_stretches_and_the_others_lie_within(five_groups, without_gain):
    """The first view of each list comes from the first stretch, the second from the second."""
    for step in range(10):
        for group in host_batch(five_groups, step, 0, 1, 5000, PATCH):
            group, patches = coded(group)
            B, _, S, _ = group["batch"].shape
            views = cut_views(group, None, PATCH, "cpu")["views"]
            for k, (spec, (_, clean, *_)) in enumerate(zip(group["specs"], views, strict=True)):
                found = patches_of(clean).unflatten(0, (2, B))                           # (V, B, L, N)
                time = found % patches
                assert (found // patches // S % 2 == torch.arange(2)[:, None, None, None]).all()
                assert (found // patches // S // 2 == torch.arange(B)[:, None, None]).all()
                assert (time == time[:, :, :1, :1] + torch.arange(spec.patches)).all()   # side by side, all leads
                if k == 0:
                    assert (time == torch.arange(patches)).all()                         # the whole stretch
                if k < 2:
                    assert (found // patches % S == torch.arange(spec.leads)[:, None]).all()


def test_what_is_asked_is_the_teachers_patch_of_the_same_lead_and_time(five_groups, without_gain):
    """By what the views show at `token` and at `target`. A lead beyond the teacher's has no weight."""
    unseen = 0
    for step in range(20):
        for group in host_batch(five_groups, step, 0, 1, 5000, PATCH):
            if group["asked"] is None:
                continue
            group, patches = coded(group)
            cut = cut_views(group, None, PATCH, "cpu")
            teacher, few = (patches_of(cut["views"][k][1]) for k in (0, 2))
            asked, views, S = cut["asked"], len(few), group["batch"].shape[2]
            assert asked["token"].shape == asked["target"].shape == asked["weight"].shape == (views * ASKED_PATCHES,)
            assert (asked["token"] // few[0].numel() == torch.arange(views).repeat_interleave(ASKED_PATCHES)).all()
            token, target = few.flatten()[asked["token"]], teacher.flatten()[asked["target"]]
            seen = token // patches % S < group["specs"][0].leads
            assert torch.equal(asked["weight"] > 0, seen)
            assert torch.equal(token[seen], target[seen])
            unseen += int((~seen).sum())
            for weight in asked["weight"].unflatten(0, (views, -1)):
                assert weight.unique().tolist() in ([0], [float(weight.max())], [0, float(weight.max())])
                assert weight.sum() == pytest.approx(float((weight > 0).any()), abs=1e-6)
    assert unseen > 0


def test_near_patches_are_of_one_lead_and_the_offset_says_how_far(five_groups):
    """The two patches of a pair are in one lead of one view; every offset comes up, but 0 never."""
    offsets = [set() for _ in augment.lead_groups()]
    for step in range(20):
        for seen, group in zip(offsets, host_batch(five_groups, step, 0, 1, 5000, PATCH)):
            near, spec = group["near"], group["specs"][0]
            crops = torch.arange(2 * len(group["batch"]))[:, None]
            rows, place = near["token"] // spec.patches, near["token"] % spec.patches
            assert near["token"].shape == (len(crops), augment.NEAR_PAIRS) and (rows // spec.leads == crops).all()
            assert (near["target"] // spec.patches == rows).all()
            later = near["target"] % spec.patches - place
            assert (later + 16 == near["offset"]).all() and augment.NEAR_OFFSETS == 32
            seen |= set(later.flatten().tolist())
    assert all(seen == set(range(-15, 16)) - {0} for seen in offsets)


def test_any_patch_of_a_view_of_few_leads_is_asked_for(five_groups):
    asked = [set() for _ in range(4)]
    for step in range(40):
        for found, group in zip(asked, host_batch(five_groups, step, 0, 1, 5000, PATCH)):
            _, leads, patches, _ = group["specs"][2]
            found |= set(((group["asked"]["token"] % (leads * patches)) / (leads * patches)).flatten().tolist())
            assert (group["asked"]["token"] < 2 * len(group["batch"]) * leads * patches).all()
    assert all(min(found) == 0 and max(found) > 0.97 for found in asked)


def test_masked_places_and_their_weights(synth):
    """cut_views names each masked patch of all global views, and the weights of a masked view sum to 1."""
    for group in host_batch(sampler(synth, 16), 0, 0, 1, 5000, PATCH):
        cut = cut_views(group, None, PATCH, "cpu")
        masks = group["masks"]
        assert cut["recordings"] == len(group["batch"]) and [len(v) for v in cut["views"]] == [4] * 3
        assert all(torch.equal(cut["asked"][k], group["asked"][k].flatten()) for k in group["asked"])
        assert cut["place"].tolist() == [i for i, masked in enumerate(masks.flatten().tolist()) if masked]
        view = cut["place"] // masks[0].numel()
        sums = torch.zeros(len(masks)).index_add(0, view, cut["weights"])
        torch.testing.assert_close(sums, masks.any(dim=(1, 2)).float())


def test_batches_come_one_step_ahead_and_are_those_of_host_batch(synth, noise):
    s = sampler(synth, 16)
    batches = Batches(s, 1, 2, noise, PATCH, torch.device("cpu"))
    batches.start(4)
    for step in (4, 5):
        made = batches.take()
        batches.start(step + 1)
        expected = [cut_views(g, noise, PATCH, "cpu")
                    for g in host_batch(s, step, 1, 2, noise.shape[-1], PATCH)]
        for a, b in zip(made, expected):
            for mine, theirs in zip(a["views"], b["views"]):
                assert all(torch.equal(x, y) for x, y in zip(mine, theirs))
            assert torch.equal(a["place"], b["place"]) and torch.equal(a["weights"], b["weights"])
            assert all(torch.equal(a[which][k], b[which][k]) for which in ("asked", "near") for k in b[which])
