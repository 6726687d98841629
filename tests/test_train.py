"""The training loop on small synthetic corpora: batches, exact resume, ranks, checkpoints, what users see when something is wrong."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import train
from model import Encoder, load_encoder
from prepare import SPLITS, open_corpus

ROOT = Path(__file__).parents[1]
RUN = ["--batch", "16", "--log-every", "1", "--checkpoint-every", "2", "--probe-every", "0", "--prototypes", "64", "--device", "cpu"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Synthetic corpora, prepared through the ordinary readers."""
    folder = tmp_path_factory.mktemp("synth")
    prepare.main(prepare.parse_args(["synth", "--raw", str(folder / "raw"), "--out", str(folder / "data"), "--records", "80", "--seed", "3"]))
    return folder / "data"


def command(data, out, steps, *extra):
    return ["--data", str(data / "ptbxl"), str(data / "mitdb"), "--noise", str(data / "nstdb"), "--out", str(out), "--steps", str(steps), *RUN, *extra]


def environment():
    return dict(os.environ, OMP_NUM_THREADS="1")  # one thread: sums in one order, so runs can be compared bit for bit


def run(launcher, data, out, steps, *extra, expect=0):
    done = subprocess.run([*launcher, str(ROOT / "train.py"), *command(data, out, steps, *extra)], env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == expect, done.stderr[-3000:]
    return done


def losses(out, *names):
    """{step: values} of the log, without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {r["step"]: {k: v for k, v in r.items() if k not in ("seconds", "waited_s") and (not names or k in names)} for r in rows}


def sampler(data, batch=32, seed=5, names=("ptbxl", "mitdb")):
    return train.Sampler([open_corpus(data / n) for n in names], batch, seed)


# ---------------------------------------------------------------------------------------------------------------------
# batches

def flat(groups):
    return [t for g in groups for t in [g["batch"], g["leads"], g["masks"], *(v for d in g["draws"] for v in d.values())]]


def test_batch_is_a_pure_function_of_seed_and_step(data):
    draw = lambda seed, step: flat(train.host_batch(sampler(data, seed=seed), step, 0, 1, 5000, 50))
    assert all(torch.equal(a, b) for a, b in zip(draw(5, 7), draw(5, 7)))
    assert not torch.equal(draw(5, 7)[0], draw(5, 8)[0])
    assert not torch.equal(draw(5, 7)[0], draw(6, 7)[0])


def test_ranks_share_the_batch_of_one_process(data):
    whole = train.host_batch(sampler(data), 3, 0, 1, 5000, 50)
    parts = [train.host_batch(sampler(data), 3, rank, 2, 5000, 50) for rank in (0, 1)]
    for g, group in enumerate(whole):
        for rank in (0, 1):
            part = parts[rank][g]
            assert torch.equal(part["batch"], group["batch"][rank::2])
            assert torch.equal(part["masks"], group["masks"].unflatten(0, (2, -1))[:, rank::2].flatten(0, 1))
            for mine, everyone in zip(part["draws"], group["draws"]):
                assert all(torch.equal(mine[k], everyone[k][:, rank::2]) for k in everyone)


def test_excluded_corpora_are_not_trained_on(data):
    corpora = [open_corpus(data / "ptbxl"), open_corpus(data / "mitdb")]
    s = train.Sampler(corpora, 16, 0, excluded=[open_corpus(data / "mitdb")])
    assert {member["corpus"] for group in s.groups for member in group["members"]} == {0}
    assert s.skipped["copy of a held-out recording"] == (corpora[1].index["split"] == 0).sum()
    assert "copy of a held-out recording" not in train.Sampler(corpora, 16, 0).skipped


def test_weights_of_corpora(data):
    assert train.parse_args(["--data", "a", "b:0.5", "c:d", "e:2"]).data == [
        (Path("a"), 1.0), (Path("b"), 0.5), (Path("c:d"), 1.0), (Path("e"), 2.0)]
    for wrong in ("a:0", "a:-1", "a:nan", "a:inf"):
        with pytest.raises(SystemExit):
            train.parse_args(["--data", wrong])
    corpora = [open_corpus(data / "ptbxl"), open_corpus(data / "mitdb")]
    shares = []
    for weights in ([1.0, 1.0], [1.0, 4.0]):
        s = train.Sampler(corpora, 16, 0, weights=weights)
        group = next(g for g in s.groups if len(g["members"]) == 2)
        drawn = [m for step in range(200) for m, _ in s.choose(step)[s.groups.index(group)]]
        shares.append(np.mean(drawn) / (1 - np.mean(drawn)))       # odds of the second corpus
    assert 2 < shares[1] / shares[0] < 8


def test_batch_holds_one_window_per_patient_of_the_train_split(data):
    s = sampler(data)
    chosen, patients = s.choose(0), []
    for g, group in enumerate(s.groups):
        assert len(chosen[g]) == group["size"]
        for m, patient in chosen[g]:
            member = group["members"][m]
            index = s.corpora[member["corpus"]].index
            rows = member["rows"][member["first"][patient]:member["first"][patient] + member["count"][patient]]
            assert len(set(index["patient"][rows])) == 1
            patients.append(s.corpora[member["corpus"]].patients[index["patient"][rows[0]]])
            assert set(index["split"][rows]) == {SPLITS.index("train")}
    assert len(set(patients)) == 32                # once in a batch, though those with many leads are in every group


def test_a_corpus_given_twice_fills_its_batches(data):
    """Its patients count twice there; the draw must come to an end all the same."""
    s = sampler(data, batch=64, names=("mitdb", "mitdb", "ptbxl", "ptbxl"))
    assert [len(places) for places in s.choose(0)] == [g["size"] for g in s.groups]


def test_recordings_with_many_leads_show_few_of_them_for_longer(data):
    groups = train.host_batch(sampler(data), 0, 0, 1, 5000, 50)
    assert [(g["specs"][0].leads, g["specs"][0].patches) for g in groups] == [(8, 15), (2, 40), (1, 40)]
    assert [len(g["batch"]) for g in groups] == [16, 8, 8]
    assert len(set(groups[2]["leads"].flatten().tolist())) > 2 and (groups[2]["leads"] > 2).any()


def test_held_out_patients_never_reach_a_batch(data):
    s = sampler(data)
    trained = {(m["corpus"], p) for g in s.groups for m in g["members"] for p in s.corpora[m["corpus"]].index["patient"][m["rows"]]}
    held = {(c, p) for c, corpus in enumerate(s.corpora) for p in corpus.index["patient"][corpus.index["split"] != SPLITS.index("train")]}
    assert trained and held and not trained & held


def test_independent_leads_come_first_and_windows_are_those_of_the_corpus(data):
    s = sampler(data)
    batch, leads, available = s.draw(0, 0, s.choose(0)[0], slice(0, 8))
    names = [[prepare.LEADS[i] for i in row] for row in leads]
    assert all(row[:8] == ["I", "II", "V1", "V2", "V3", "V4", "V5", "V6"] for row in names)
    assert batch.dtype == np.int16 and batch.shape == (8, 12, s.groups[0]["window"]) and (available == 12).all()
    limb = dict(zip(names[0], batch[0].astype(int)))
    assert np.abs(limb["III"] - (limb["II"] - limb["I"])).max() <= 15                 # Einthoven, up to the resampled rounding


def test_too_few_patients_and_odd_batches_are_refused(data):
    with pytest.raises(ValueError, match="smaller --batch"):
        sampler(data, batch=320)
    with pytest.raises(ValueError, match="multiple of 16"):
        sampler(data, batch=33)


# ---------------------------------------------------------------------------------------------------------------------
# schedules and optimiser

def test_schedules_move_as_stated():
    s = [train.schedules(step, 100, 1e-3) for step in range(100)]
    assert s[0]["lr"] == pytest.approx(1e-4) and max(x["lr"] for x in s) == pytest.approx(1e-3) and s[-1]["lr"] < 2e-5
    assert s[0]["prototype_lr"] == 0 and s[1]["prototype_lr"] > 0
    momentum = [x["momentum"] for x in s]
    assert momentum[0] == train.TEACHER_MOMENTUM[0] and momentum == sorted(momentum) and momentum[-1] < 1


def test_every_parameter_has_one_group_and_vectors_do_not_decay():
    student = torch.nn.ModuleDict(dict(encoder=Encoder(32, 1, 2, 1.0), dino_head=train.build_networks(Encoder(32, 1, 2, 1.0), 16, 8, 16, 16)[0]["dino_head"]))
    optimizer = train.build_optimizer(student)
    grouped = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(student.parameters()))
    plain = {id(p) for p in optimizer.param_groups[1]["params"]}
    for name, p in student.named_parameters():
        assert (id(p) in plain) == (p.ndim < 2 or "token" in name or "lead_embedding" in name), name


# ---------------------------------------------------------------------------------------------------------------------
# whole runs

def test_overfits_one_batch(data, monkeypatch):
    """With the batch held still, the student learns to name the prototypes of its views."""
    torch.manual_seed(0)
    s = sampler(data, batch=16, names=("ptbxl",))
    encoder = Encoder(48, 1, 2, 1.0)
    student, teacher = train.build_networks(encoder, 64, 32, 64, 64)
    groups = [train.cut_views(g, None, encoder.patch_samples, "cpu")
              for g in train.host_batch(s, 0, 0, 1, 5000, encoder.patch_samples)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    seen = []
    for _ in range(25):
        loss, parts, _, _ = train.objective(student, teacher, None, groups, 0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(parts["dino_local"]) + float(parts["ibot"]))
    assert seen[-1] < 0.85 * seen[0], seen


def test_killed_run_resumes_bit_for_bit(data, tmp_path):
    """SIGKILL in the middle: the resumed log equals the one of a run left alone, and so do the weights."""
    run([sys.executable], data, tmp_path / "whole", 7)
    victim = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command(data, tmp_path / "cut", 7)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not train.checkpoints(tmp_path / "cut/checkpoints") and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(np.random.default_rng().uniform(0, 1.0))
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert train.checkpoints(tmp_path / "cut/checkpoints"), "the run was killed before its first checkpoint"
    run([sys.executable], data, tmp_path / "cut", 7, "--resume")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "cut")) == 7
    a, b = (load_encoder(tmp_path / n / "encoder.pt").state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_ranks_give_the_losses_of_one(data, tmp_path):
    """Sharded over two processes with gloo; fp32 sums in another order are all that may differ."""
    run([sys.executable], data, tmp_path / "one", 6)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(20000 + os.getpid() % 20000)]
    run(torchrun, data, tmp_path / "two", 6)
    one, two = (losses(tmp_path / n, "loss", "dino_global", "dino_local", "ibot", "koleo", "target_entropy") for n in ("one", "two"))
    for step in range(6):
        assert two[step] == pytest.approx(one[step], rel=1e-5), step
    run([sys.executable], data, tmp_path / "two", 8, "--resume")                     # and a checkpoint of two ranks goes on with one
    assert len(losses(tmp_path / "two")) == 8


def test_a_finished_run_is_not_overwritten_and_errors_are_one_line(data, tmp_path):
    run([sys.executable], data, tmp_path / "a", 1)
    for extra, text in (([], "--resume"), (["--batch", "0"], "--batch 0"), (["--data", str(tmp_path)], "prepare.py")):
        done = run([sys.executable], data, tmp_path / "a", 1, *extra, expect=1)
        assert text in done.stderr and "Traceback" not in done.stderr, done.stderr
    about = json.loads((tmp_path / "a/run.json").read_text())
    assert about["args"]["steps"] == 1 and about["constants"]["WINDOW_S"] == train.WINDOW_S


def test_log_is_trimmed_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    train.trim_log(log, 2)
    assert log.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_flags_are_the_documented_ones():
    """A flag is a promise; adding one is a decision (constants at the top of the file are for everything else)."""
    assert set(vars(train.parse_args([]))) == {"data", "exclude", "noise", "out", "resume", "size", "steps", "batch", "lr", "prototypes", "gram_from", "seed", "window",
                                               "device", "precision", "compile", "shard", "checkpoint_activations", "log_every", "checkpoint_every", "keep_every", "probe_every"}
