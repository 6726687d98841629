"""The same on a GPU as on the CPU: features, views, losses, gradients, a run and its resume. Skipped without a GPU."""
import copy

import numpy as np
import pytest
import torch

import train
from augment import cut_views, host_batch, lead_groups, load_noise
from conftest import TWELVE
from corpus import Sampler, open_corpus
from dino import objective
from model import build_encoder
from test_train import flags, losses, signal_at, train_here

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def distance(a, b):
    """Of b from a, as a share of a's length."""
    a, b = torch.as_tensor(a).double().cpu(), torch.as_tensor(b).double().cpu()
    return ((a - b).norm() / a.norm()).item()


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_features_are_those_of_the_cpu(size):
    encoder = build_encoder(size)
    encoder.precision = "fp32"
    signals = np.random.default_rng(0).normal(0, 0.3, (3, 12, 7600)).astype(np.float32)
    signals[1, 2, 900:1300] = np.nan                                                 # a gap
    signals[2, 5:] = np.nan                                                          # absent leads
    expected = encoder.embed(signals, fs=500, leads=TWELVE)
    found = encoder.embed(signals, fs=500, leads=TWELVE, device="cuda")
    for a, b in zip(expected, found):
        assert distance(a.global_feature, b.global_feature) < 1e-4
        seen = np.isfinite(a.local_features)
        assert (seen == np.isfinite(b.local_features)).all()
        assert distance(a.local_features[seen], b.local_features[seen]) < 1e-4
    encoder.precision = "auto"                                                       # bf16 on a GPU
    assert 1e-5 < distance(expected[0].global_feature, encoder.embed(signals, fs=500, leads=TWELVE)[0].global_feature
                           ) < 0.03


@pytest.fixture(scope="module")
def batches(synth):
    """The views of one batch, on the CPU and on the GPU."""
    corpora = [open_corpus(synth / "data" / name) for name in ("ptbxl", "mitdb")]
    sampler = Sampler(corpora, 16, 0, lead_groups(), [1.0, 1.0], [], 1)
    noise = load_noise(open_corpus(synth / "data/nstdb"))
    groups = host_batch(sampler, 3, 0, 1, noise.shape[-1], 50)
    return [[cut_views(copy.deepcopy(g), noise.to(device), 50, device) for g in groups] for device in (CPU, CUDA)]


def test_views_are_those_of_the_cpu(batches):
    for ours, theirs in zip(*batches):
        for a, b in zip(ours["views"], theirs["views"]):
            assert all(distance(x, y) < 1e-5 for x, y in zip(a[:2], b[:2]))
            assert all(torch.equal(x, y.cpu()) for x, y in zip(a[2:], b[2:]))


def test_losses_and_gradients_are_those_of_the_cpu(batches):
    found = []
    for device, groups in zip((CPU, CUDA), batches):
        recipe = train.recipe("tiny") | dict(gram=1.0)
        student, teacher = train.networks_of(build_encoder("tiny"), recipe)
        gram_teacher = copy.deepcopy(teacher["encoder"])
        for network in (student, teacher, gram_teacher):
            network.to(device)
        loss, parts, *_ = objective(student, teacher, gram_teacher, groups, 0.05, 0.05, recipe)
        loss.backward()
        found.append((parts, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}))
    (parts, gradients), (cuda_parts, cuda_gradients) = found
    for name, value in parts.items():
        assert value.item() == pytest.approx(cuda_parts[name].item(), rel=1e-3, abs=1e-5), name
    assert gradients.keys() == cuda_gradients.keys()
    total = torch.cat([g.flatten() for g in gradients.values()])
    assert distance(total, torch.cat([g.flatten() for g in cuda_gradients.values()])) < 1e-2


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 3e-2)])
def test_a_run_has_the_losses_of_the_cpu_and_goes_on_with_them(synth, tmp_path, monkeypatch, precision, tolerance):
    def run(out, *extra):
        code = train_here(*flags(synth / "data", tmp_path / out, 6), "--checkpoint-every", "100", *extra)
        return code, [row["loss"] for row in losses(tmp_path / out).values()]

    on_gpu = "--device", "cuda", "--precision", precision
    _, expected = run("cpu", "--precision", "fp32")
    _, found = run("gpu", *on_gpu)
    assert np.allclose(expected, found, rtol=tolerance)
    signal_at(monkeypatch, 3)
    assert run("cut", *on_gpu)[0] == train.EXIT_STOPPED
    monkeypatch.undo()
    code, resumed = run("cut", *on_gpu, "--resume")
    assert code == 0 and np.allclose(found, resumed, rtol=tolerance / 10)
