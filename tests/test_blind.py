"""Nothing but the ECG tells recordings apart: an encoder that cannot see it learns nothing from the objective, and one
that can does not go by lead names.

Lead counts, lead names, their order, masks and times are all that is left to an encoder whose patch embedding is 0. If
any of them told recordings or patches apart, the teacher's targets would not be uniform, or a loss would fall below its
chance level, at once or after some training.
"""
import copy
import math
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import augment
import dino
from augment import NEAR_OFFSETS, cut_views, host_batch, lead_groups, load_noise
from conftest import TWELVE, run, write
from corpus import Sampler, open_corpus
from dino import build_networks, objective, update_teacher
from ecg import FS, LEADS, preprocess, read_wfdb
from model import Encoder, load_encoder

K, BATCH, STEPS, CPU = 64, 32, 30, torch.device("cpu")
TEMPERATURE, MOMENTUM = 0.02, 0.9
WEIGHTS = dict(contrast=1.0, leads=0.5, wave=1.0, context=2.0)
NAMES = [name for name in LEADS if name != "unknown"]
COUNTS = (1, 2, 3, 4, 15)        # leads of the recordings of `mixed`, which form all lead groups
PEOPLE = 16                      # of each count


def beats(rng, leads, seconds):
    """int (T, L) uV about 0 of a heart of its own: three bumps in every lead, at a rate of its own; a little noise."""
    t, rr = np.arange(round(seconds * FS)) / FS, rng.uniform(0.5, 1.3)
    x = np.zeros((len(t), leads))
    for centre, width in zip(rng.uniform(0, rr, 3), rng.uniform(0.01, 0.08, 3)):
        from_peak = (t - centre + rr / 2) % rr - rr / 2
        x += np.outer(np.exp(-0.5 * (from_peak / width) ** 2), rng.uniform(-1500, 1500, leads))
    return np.rint(x + rng.normal(0, 20, x.shape))


def prepared(folder, leads_of, seed=0, seconds=20):
    """A corpus with a recording for each of `leads_of`, tuples of lead names."""
    for i, leads in enumerate(leads_of):
        signal = beats(np.random.default_rng([seed, i]), len(leads), seconds)
        write(folder / "raw", f"r{i:03d}", signal, leads, gain=1000, baseline=0)
    return run("wfdb", folder / "raw", folder / "out")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Recordings of 1, 2, 3, 4 and 15 leads, each with names and an order of its own."""
    rng, orthogonal = np.random.default_rng(5), ("X", "Y", "Z")
    leads_of = [tuple(rng.permutation(NAMES if n < 15 else TWELVE + orthogonal)[:n])
                for n in COUNTS for _ in range(PEOPLE)]
    return prepared(tmp_path_factory.mktemp("mixed"), leads_of)


@pytest.fixture(scope="module")
def corpora(synth, mixed):
    data = synth / "data"
    return [open_corpus(data / "ptbxl"), open_corpus(data / "mitdb"), mixed], load_noise(open_corpus(data / "nstdb"))


def networks(blind, seed=0):
    encoder = Encoder(32, 2, 2, 1.0, init_seed=seed)
    if blind:                                                          # the teacher is a copy
        for p in (encoder.patch_embedding.weight, encoder.mask_token):
            torch.nn.init.zeros_(p.requires_grad_(False))
    return build_networks(encoder, 64, 32, K, K, NEAR_OFFSETS)


def batch(sampler, noise, step):
    return [cut_views(g, noise, 50, CPU) for g in host_batch(sampler, step, 0, 1, noise.shape[-1], 50)]


def train(student, teacher, sampler, noise, steps):
    """Some steps of the whole objective."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        loss = objective(student, teacher, None, batch(sampler, noise, step), TEMPERATURE, TEMPERATURE, WEIGHTS)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_teacher(teacher, student, MOMENTUM)


def right_at_random(views, anchors):
    """Share of views (B, F) whose nearest anchor (B, F) is their own; equally near ones count in part."""
    near = F.normalize(views, dim=-1) @ F.normalize(anchors, dim=-1).T
    near = near >= near.amax(1, keepdim=True) - 1e-5
    return (near.diagonal() / near.sum(1)).mean().item()


def silenced(student):
    """A copy that predicts 0 of every patch."""
    silent = copy.deepcopy(student)
    for head in ("wave_head", "context_head"):
        for p in silent[head].rest[-1].parameters():
            torch.nn.init.zeros_(p)
    return silent


def below_chance(student, teacher, groups):
    """How far the losses and the targets' entropies of lead groups are below those of guessing: {name: float}."""
    parts, silent = (objective(network, teacher, None, groups, TEMPERATURE, TEMPERATURE, WEIGHTS)[1]
                     for network in (student, silenced(student)))
    B = sum(g["recordings"] for g in groups)
    names = ("target_entropy", "patch_target_entropy", "dino_global", "dino_local", "ibot")
    chance = dict.fromkeys(names, math.log(K))
    chance["contrast"] = sum(g["recordings"] / B * math.log(g["recordings"]) for g in groups)
    chance |= {name: silent[name].item() for name in ("wave", "context")}
    if "leads" in parts:                                               # a view whose leads no teacher sees adds 0
        chance["leads"] = math.log(K) * sum(
            g["recordings"] / B * g["asked"]["weight"].sum().item() / len(g["views"][2][0])
            for g in groups if g["asked"] is not None)
    return {name: value - parts[name].item() for name, value in chance.items()}


def retrieved(student, teacher, g):
    """How much oftener than at random the views of a lead group have their own global view next to them."""
    n = g["recordings"]
    clean = teacher["encoder"](*[g["views"][0][k] for k in (1, 3)]).pooled().unflatten(0, (2, n))
    found = {"global views": right_at_random(clean[1], clean[0]) - 1 / n}
    for name, (signal, _, ids, _) in zip(("local views", "views of few leads"), g["views"][1:]):
        found[name] = right_at_random(student["encoder"](signal, ids).pooled()[:n], clean[0]) - 1 / n
    return found


@torch.no_grad()
def given_away(student, teacher, sampler, noise, first=0, batches=4):
    """Of each lead group, by number of leads, and of all together, which is 0, the mean of both over some batches."""
    found = {}
    for step in range(first, first + batches):
        groups = batch(sampler, noise, step)
        rows = {group["shape"].leads: below_chance(student, teacher, [g]) | retrieved(student, teacher, g)
                for group, g in zip(sampler.groups, groups)}
        for leads, row in (rows | {0: below_chance(student, teacher, groups)}).items():
            for name, value in row.items():
                found.setdefault(leads, {}).setdefault(name, []).append(value)
    return {leads: {name: float(np.mean(values)) for name, values in row.items()} for leads, row in found.items()}


# Contrast is that of noisy views, so it varies by 1e-3; everything else is exact, or above chance because of them.
# Wave, which is near 2, may learn the mean ECG of a lead, which is not 0: that says nothing about a recording. The
# context of a blind teacher is 0 after its mean is taken off, so another test of it below has a teacher that sees.
LIMITS = dict(target_entropy=1e-3, patch_target_entropy=1e-3, contrast=3e-3, dino_global=0.01, dino_local=0.01,
              ibot=0.01, leads=0.01, wave=0.1, context=0.01) | dict.fromkeys(
                  ("global views", "local views", "views of few leads"), 1e-3)


def beyond(found):
    """What is given away by more than LIMITS: {(leads, name): amount}."""
    return {(leads, name): value for leads, row in found.items() for name, value in row.items() if value > LIMITS[name]}


def test_a_blind_encoder_learns_nothing(corpora):
    """Before training, and after some steps of everything but the embedding of the signal."""
    corpora, noise = corpora
    sampler, (student, teacher) = Sampler(corpora, BATCH, 3, lead_groups()), networks(blind=True)
    assert [g["shape"].leads for g in sampler.groups] == [8, 4, 3, 2, 1]
    before = given_away(student, teacher, sampler, noise)
    assert not beyond(before) and all("leads" in row for leads, row in before.items() if leads != 1)
    first = {name: p.clone() for name, p in student.named_parameters()}
    train(student, teacher, sampler, noise, STEPS)
    moved = [name for name, p in student.named_parameters() if not torch.equal(p, first[name])]
    assert len(moved) == len(first) - 2 and "encoder.lead_embedding.weight" in moved
    assert not beyond(given_away(student, teacher, sampler, noise, first=STEPS))


def test_a_blind_student_cannot_tell_the_context(corpora):
    """Of a teacher that sees, and stays as it is; a prediction of 0 is as near."""
    corpora, noise = corpora
    sampler = Sampler(corpora, BATCH, 3, lead_groups())
    (student, _), (_, teacher) = networks(blind=True), networks(blind=False)
    with mock.patch("test_blind.update_teacher"):
        train(student, teacher, sampler, noise, STEPS)
    told, chance = (np.mean([objective(network, teacher, None, batch(sampler, noise, step), TEMPERATURE, TEMPERATURE,
                                       WEIGHTS)[1]["context"].item() for step in range(STEPS, STEPS + 4)])
                    for network in (student, silenced(student)))
    assert 1 < chance < 3 and told > 0.99 * chance, (told, chance)


def with_names(self, step, g, chosen, rows, draw=Sampler.draw):
    """Sampler.draw with the names of the leads in every group."""
    signals, leads, available = draw(self, step, g, chosen, rows)
    ids = [self._stretches(step, g, place, *chosen[place])[1]
           for place in range(*rows.indices(self.groups[g]["size"]))]
    return signals, np.stack([np.resize(names, leads.shape[1]) for names in ids]), available


def with_one_mask(*args, draw=augment.draw_masks):
    """augment.draw_masks with the same mask in both global views of a recording."""
    first, second = np.split(draw(*args), augment.GLOBAL_VIEWS)
    return np.concatenate((first, first))


SHORTCUTS = {  # what is changed, the steps until it shows, the lead groups and signs that it shows in at least
    "names": (mock.patch.object(Sampler, "draw", with_names), 0, {4, 3, 2, 1}, {"target_entropy", "global views"}),
    "places": (mock.patch.object(dino, "centered", lambda x, *_: x), 0, {8, 4, 3, 2, 1}, {"patch_target_entropy"}),
    "masks": (mock.patch.object(augment, "draw_masks", with_one_mask), 3 * STEPS, {0}, {"contrast"})}


@pytest.mark.parametrize("name", ["names", "places", pytest.param("masks", marks=pytest.mark.slow)])
def test_this_finds_shortcuts(corpora, name):
    """The test above fails if leads are named where recordings differ in them, if targets tell lead and time, and if a
    recording has a mask of its own, which has to be learned."""
    corpora, noise = corpora
    patch, steps, groups, signs = SHORTCUTS[name]
    sampler, (student, teacher) = Sampler(corpora, BATCH, 3, lead_groups()), networks(blind=True)
    with patch:
        assert not steps or not beyond(given_away(student, teacher, sampler, noise))
        train(student, teacher, sampler, noise, steps)
        found = beyond(given_away(student, teacher, sampler, noise, first=steps))
    assert groups <= {leads for leads, _ in found} and signs <= {what for _, what in found}, found


@pytest.mark.slow
def test_a_seeing_encoder_learns_in_as_many_steps(corpora):
    corpora, noise = corpora
    sampler, (student, teacher) = Sampler(corpora, BATCH, 3, lead_groups()), networks(blind=False)
    train(student, teacher, sampler, noise, STEPS)
    found = beyond(given_away(student, teacher, sampler, noise, first=STEPS))
    assert {(leads, name) for leads in (8, 4, 3, 2, 1) for name in ("contrast", "target_entropy", "global views")
            } <= set(found), found


# ---------------------------------------------------------------------------------------------------------------------
# exchanged names

@torch.no_grad()
def with_exchanged_names(encoder, corpus):
    """Of views of single-lead recordings, the shares that are nearer to their own signal under the name of the
    recording before than to that recording's signal under theirs; that are nearest to their own signal when all have
    the name of the one before; and when all have their own."""
    own = np.arange(len(corpus.index))
    before, names = np.roll(own, 1), np.stack([corpus.lead_ids(i) for i in own]).astype(np.int64)
    assert (names != names[before]).all()

    def features(start, rows, names):
        signal = np.stack([corpus.read(i, start, 8 * FS) for i in rows]).astype(np.float32) / 1000
        return F.normalize(encoder(torch.from_numpy(signal), torch.from_numpy(names)).pooled(), dim=-1)
    views, exchanged = features(0, own, names), features(10 * FS, own, names[before])
    namesake = features(10 * FS, before, names)
    nearer = ((views * exchanged).sum(1) > (views * namesake).sum(1)).float().mean().item()
    return nearer, right_at_random(views, exchanged), right_at_random(views, features(10 * FS, own, names))


@pytest.mark.slow
def test_the_signal_counts_and_not_the_name(corpora, tmp_path):
    """Names are learned from twelve leads beside; if single leads showed theirs in training, they would be all."""
    noise = corpora[1]
    single = prepared(tmp_path / "single", [(TWELVE[i % 12],) for i in range(96)], seed=7)
    twelve = prepared(tmp_path / "twelve", [TWELVE] * 48, seed=8)
    shapes = [shape._replace(share=0.25 if shape.leads == 8 else 0.75) for shape in lead_groups()]
    sampler = Sampler([twelve, single], BATCH, 3, shapes)
    assert [(g["shape"].leads, g["size"]) for g in sampler.groups] == [(8, 8), (1, 24)]
    found = []
    for draw in (Sampler.draw, with_names):
        student, teacher = networks(blind=False)
        with mock.patch.object(Sampler, "draw", draw):
            train(student, teacher, sampler, noise, 160)
        found.append(with_exchanged_names(student["encoder"], single))
    print(found)
    ours, named = found             # measured: 0.90, 0.46, 0.86 (0.5, 0.01, 0.01 at random) and 0.66, 0.05, 0.83
    assert ours[0] > 0.8 and ours[1] > 0.25 and ours[2] > 0.6
    assert named[0] < 0.75 and named[1] < 0.15 and named[2] > 0.5


# ---------------------------------------------------------------------------------------------------------------------
# the encoder that comes with the program, on people that it never saw

@pytest.fixture(scope="module")
def strangers(shared_data):
    """(100, 8, T) mV: I, II, V1 to V6 of ten seconds of people of PTB-XL's fold 9."""
    table = pd.read_csv(shared_data / "ptbxl/ptbxl_database.csv").query("strat_fold == 9").drop_duplicates("patient_id")
    signals = []
    for path in table.filename_lr[:100]:
        signal, leads = preprocess(*read_wfdb(shared_data / "ptbxl" / path)[:4])
        signals.append(signal[[list(leads).index(LEADS.index(name)) for name in TWELVE[:2] + TWELVE[6:]]])
    return torch.from_numpy(np.nan_to_num(signals))


@torch.inference_mode()
def found_again(encoder, views):
    """Shares of people whose nearest feature is right: of lead I without its name, among leads I; of lead I under the
    name of II, among all leads I and II, each under its own; of the later half of ten seconds, among earlier halves; of
    I and II, and of aVR alone, among all eight leads of the same stretch. At last, as the second, but II counts too."""
    views = torch.cat((views, -views[:, :2].mean(1, keepdim=True)), dim=1)                 # aVR, by its definition

    def features(columns, stretch, names):
        ids = torch.tensor([LEADS.index(name) for name in names]).expand(len(views), -1)
        return encoder(views[:, columns, stretch], ids).global_feature()

    def nearest(found, *among):
        among = torch.cat(among)
        found, among = ((x - among.mean(0)) / among.std(0) for x in (found, among))
        return torch.cdist(found, among).argmin(1)

    def right(places):
        return (places == torch.arange(len(views))).float().mean().item()
    eight, long, early, late = TWELVE[:2] + TWELVE[6:], slice(0, 2000), slice(0, 1250), slice(1250, 2500)
    lead_i, lead_ii = (features([k], long, [name]) for k, name in enumerate(("I", "II")))
    whole = features(slice(8), early, eight)
    renamed = nearest(features([0], long, ["II"]), lead_i, lead_ii)
    return (right(nearest(features([0], long, ["unknown"]), lead_i)), right(renamed),
            right(nearest(features(slice(8), late, eight), whole)),
            right(nearest(features(slice(2), early, ["I", "II"]), whole)),
            right(nearest(features([8], early, ["aVR"]), whole)), right(renamed % len(views)))


def test_the_finished_encoder_goes_by_the_signal_and_not_by_the_names(strangers):
    finished, untrained = (found_again(load_encoder(name), strangers) for name in ("tiny", "random:tiny"))
    # Measured: 0.99, 0.67, 0.67, 0.95, 0.91, 1.00; untrained 0.06, 0.00, 0.44, 0.09, 0.03, 0.33. The second was 0.89
    # after half the steps: what is nearest instead is lead II of the same person, never another person.
    assert untrained[0] < 0.2 and untrained[1] < 0.1 and untrained[4] < 0.2 and untrained[5] < 0.5
    assert finished[0] > 0.95 and finished[2] > 0.55 and finished[3] > 0.85 and finished[4] > 0.7
    assert finished[1] > 0.5 and finished[5] > 0.95
    assert all(a > b + 0.1 for a, b in zip(finished, untrained))
