"""The training loop on small synthetic corpora: batches, exact resume, ranks, checkpoints, what users see when something is wrong.

$ECG_KILLS (3) is how often a run is killed at a random instant, $ECG_STEPS (6) how long runs that must agree are compared.
"""
import fcntl
import json
import math
import os
import shutil
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
    # One thread: sums in one order, so runs can be compared bit for bit. The other as in run.sbatch.
    return dict(os.environ, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def start(launcher, data, out, steps, *extra, script=ROOT / "train.py"):
    return subprocess.Popen([*launcher, str(script), *command(data, out, steps, *extra)], env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(launcher, data, out, steps, *extra, expect=0, script=ROOT / "train.py"):
    """Train; a process with its returncode, stdout and stderr."""
    process = start(launcher, data, out, steps, *extra, script=script)
    try:
        process.stdout, process.stderr = process.communicate(timeout=100 + 3 * steps)
    finally:
        process.kill()
    assert process.returncode == expect, process.stderr[-3000:]
    return process


def torchrun(ranks=2):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def wait_until(condition, seconds=100):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.02)


def patched(folder, code):
    """train.py with a few lines of its own, as a script."""
    script = folder / "patched.py"
    script.write_text(f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, train\nRANK = int(os.environ.get('RANK', 0))\n{code}\n"
                      "train.cli()\n")
    return script


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


def last_step(out):
    """The last step in the log of a run that goes on."""
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else -1


def weights(out):
    return load_encoder(out / "encoder.pt").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of seven steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run([sys.executable], data, out, 7)
    return out


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 250 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=250m", "none", folder], capture_output=True).returncode:
        pytest.skip("a small disk takes the right to mount one")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_killed_runs_resume_bit_for_bit(data, small_disk):
    """SIGKILL at random instants, every other one while a checkpoint is being written, in between a full disk: every start goes on from the last good
    checkpoint, of which there is always one once there was one, and log and weights are in the end those of a run left alone."""
    kills, out, rng = int(os.environ.get("ECG_KILLS", 3)), small_disk / "run", np.random.default_rng()
    folder, filler, steps, interval, history = out / "checkpoints", small_disk / "filler", 7 + 3 * kills, 2, []

    def newest():
        return max([int(c.name[5:]) for c in train.checkpoints(folder)] or [0])

    for kill in range(kills):
        if kill % 5 == 2 and newest():                                 # less room than a checkpoint takes, or none
            filler.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - kill % 2 * 20_000_000)))
            done = run([sys.executable], data, out, steps, "--resume", expect=1)
            assert ("could not be written" in done.stderr or "No space left" in done.stderr) and "Traceback" not in done.stderr, done.stderr[-2000:]
            filler.unlink()
        before = newest()
        if (out / "run.json").exists():
            (out / "run.json").unlink()
        victim = start([sys.executable], data, out, steps, "--resume")
        # From then on what is there is this start's.
        wait_until(lambda: victim.poll() is not None or (out / "run.json").exists() and not list(folder.glob("*.tmp")))
        if kill % 2:
            wait_until(lambda: victim.poll() is not None or list(folder.glob("*.tmp/*")))
            time.sleep(rng.uniform(0, 0.1))
            writing = bool(list(folder.glob("*.tmp")))
        else:
            wait_until(lambda: victim.poll() is not None or last_step(out) >= before)
            time.sleep(rng.uniform(0, 3.0))
            writing = False
        victim.kill()
        victim.communicate()
        history.append((before, newest(), last_step(out), writing))
        assert newest() >= before, "a good checkpoint was lost"
        # The checkpoint of a step is written beside the next steps, at most an interval of them.
        assert last_step(out) + 1 - newest() <= 2 * interval, history
    run([sys.executable], data, out, steps, "--resume")
    print(f"{kills} kills, {sum(h[-1] for h in history)} of them with a checkpoint half written; (resumed, kept, reached, half written): {history}")
    assert not list(folder.glob("*.tmp")) and len(train.checkpoints(folder)) == train.KEEP_LAST
    shutil.rmtree(folder)
    run([sys.executable], data, small_disk / "undisturbed", steps)
    assert losses(out) == losses(small_disk / "undisturbed") and len(losses(out)) == steps
    assert same(weights(out), weights(small_disk / "undisturbed"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_end_a_run_with_a_checkpoint(data, whole, tmp_path, number):
    process = start([sys.executable], data, tmp_path / "cut", 7, "--checkpoint-every", "100")
    wait_until(lambda: last_step(tmp_path / "cut") >= 1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == train.EXIT_STOPPED and "--resume" in output and "Traceback" not in errors, errors[-2000:]
    assert number.name in (tmp_path / "cut/stopped").read_text()
    assert [int(c.name[5:]) for c in train.checkpoints(tmp_path / "cut/checkpoints")] == [last_step(tmp_path / "cut") + 1]
    run([sys.executable], data, tmp_path / "cut", 7, "--resume")
    assert losses(tmp_path / "cut") == losses(whole) and same(weights(tmp_path / "cut"), weights(whole))
    assert not (tmp_path / "cut/stopped").exists()


def test_a_signal_to_one_rank_ends_all_and_a_dead_rank_is_brought_back(data, tmp_path):
    """torchrun --max-restarts after SIGKILL of one rank, then SIGUSR1 to another: as undisturbed."""
    run(torchrun(), data, tmp_path / "one", 8)
    ranks = lambda: [int(p.name) for p in Path("/proc").glob("[0-9]*") if f"{tmp_path}/two\0".encode() in read(p / "cmdline")
                     and b"LOCAL_RANK=" in read(p / "environ")]

    def read(path):
        try:
            return path.read_bytes()
        except OSError:
            return b""
    process = start([*torchrun(), "--max-restarts", "1"], data, tmp_path / "two", 8, "--resume")
    wait_until(lambda: last_step(tmp_path / "two") >= 2)
    os.kill(ranks()[0], signal.SIGKILL)
    wait_until(lambda: "dead" and train.checkpoints(tmp_path / "two/checkpoints") and last_step(tmp_path / "two") >= 4)
    os.kill(ranks()[-1], signal.SIGUSR1)
    output = process.communicate(timeout=100)
    assert process.returncode == 0, output[1][-3000:]
    if last_step(tmp_path / "two") < 7:
        assert "SIGUSR1" in (tmp_path / "two/stopped").read_text()
        run(torchrun(), data, tmp_path / "two", 8, "--resume")
    assert losses(tmp_path / "two") == losses(tmp_path / "one") and same(weights(tmp_path / "two"), weights(tmp_path / "one"))


def test_damaged_checkpoints_are_noticed(data, whole, tmp_path):
    """A flipped byte in the newest: the one before is used. In all: an error."""
    shutil.copytree(whole, tmp_path / "run")
    newest, older = reversed(train.checkpoints(tmp_path / "run/checkpoints"))

    def damage(checkpoint):
        file = next(checkpoint.glob("*.distcp"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    damage(newest)
    done = run([sys.executable], data, tmp_path / "run", 7, "--resume")
    assert f"{newest.name} is damaged" in " ".join(done.stderr.split()) and f"steps {int(older.name[5:])} to 7" in done.stdout, done.stderr
    assert losses(tmp_path / "run") == losses(whole) and same(weights(tmp_path / "run"), weights(whole))
    assert (tmp_path / "run/checkpoints" / f"{newest.name}.damaged").is_dir()
    for i, checkpoint in enumerate(train.checkpoints(tmp_path / "run/checkpoints")):
        damage(checkpoint) if i else (checkpoint / "meta.json").write_text('{"step": 6')
    done = run([sys.executable], data, tmp_path / "run", 7, "--resume", expect=1)
    assert "no checkpoint" in done.stderr and "Traceback" not in done.stderr


def test_a_run_goes_on_only_as_it_began(data, whole, tmp_path):
    """Other flags or corpora, fewer steps, another process in the folder: refused. encoder.pt is made anew where a kill came before it."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "encoder.pt").unlink()
    run([sys.executable], data, out, 7, "--resume")
    assert same(weights(out), weights(whole))
    for steps, extra, text in ((7, ["--seed", "1"], "--seed 0 (now 1)"), (7, ["--data", str(data / "ptbxl")], "--data ptbxl:1 mitdb:1 (now ptbxl:1)"),
                               (5, [], "already done 7 steps")):
        done = run([sys.executable], data, out, steps, "--resume", *extra, expect=1)
        assert text in done.stderr and "Traceback" not in done.stderr, done.stderr
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run([sys.executable], data, out, 7, "--resume", expect=1, script=patched(tmp_path, "train.LOCK_S = 2"))
    assert "another process trains into" in done.stderr
    (out / "checkpoints/step_0000007").rename(out / "checkpoints/step_0000009")
    assert train.read_meta(out / "checkpoints/step_0000009") is None                          # it says step 7


def test_old_checkpoints_go_and_milestones_stay(data, tmp_path):
    run([sys.executable], data, tmp_path / "run", 6, "--checkpoint-every", "1", "--keep-every", "2")
    assert [c.name for c in train.checkpoints(tmp_path / "run/checkpoints")] == [f"step_{n:07d}" for n in (2, 4, 5, 6)]


# Sums over recordings, tokens or ranks are taken in another order, which is 1e-7 of a value each time; AdamW divides small gradients by their own size, so
# that differences grow with the steps, in 100 to about 5e-6 of a loss. KoLeo is the logarithm of a small distance, and Contrast has a temperature of 0.15:
# ten times as much.
AGREE = dict(koleo=2e-4, contrast=2e-4)
LOSSES = ("loss", "dino_global", "dino_local", "ibot", "koleo", "contrast", "target_entropy", "patch_target_entropy", "cls_rank", "prediction_entropy")


def test_ranks_sharding_compiling_and_recomputing_do_not_change_the_losses(data, tmp_path):
    steps = int(os.environ.get("ECG_STEPS", 6))
    run([sys.executable], data, tmp_path / "one", steps)
    for name, launcher, flags in (("two", torchrun(), ["--checkpoint-activations"]), ("replicated", torchrun(), ["--shard", "none"]),
                                  ("compiled", [sys.executable], ["--compile"]), ("recomputed", [sys.executable], ["--checkpoint-activations"])):
        if name == "compiled" and not shutil.which("g++"):
            continue
        run(launcher, data, tmp_path / name, steps, *flags)
        a, b = losses(tmp_path / "one", *LOSSES), losses(tmp_path / name, *LOSSES)
        assert len(b) == steps
        worst = {k: max(abs(a[step][k] - b[step][k]) / max(1.0, abs(a[step][k])) for step in range(steps)) for k in LOSSES}
        print(f"{name} after {steps} steps:", *(f"{k} {v:.1e}" for k, v in worst.items()))
        assert all(v <= AGREE.get(k, 2e-5) for k, v in worst.items()), (name, worst)


SAVE_AGAIN = """
import torch.distributed as dist
from pathlib import Path
def again(args, rank, world_size, device, stop, watchdog):
    encoder = train.build_encoder(args.size, 1)                       # other weights than those of the run
    student, teacher = train.build_networks(encoder, train.HEAD_HIDDEN, train.HEAD_BOTTLENECK, args.prototypes, args.prototypes)
    if world_size > 1:
        for network in (student, teacher):
            train.shard(network, train.init_device_mesh("cpu", (world_size,)), False)
    optimizer = train.build_optimizer(student)
    path, meta = train.Checkpoints(args.out, 0, rank, world_size).newest()
    train.load_checkpoint(path, student, teacher, None, optimizer)
    saved = train.Checkpoints(Path(os.environ["AGAIN"]), 0, rank, world_size)
    saved.save(meta["step"], train.training_state(student, teacher, None, optimizer), {k: meta[k] for k in ("command", "commit", "same")}, teacher["encoder"])
    saved.wait()
train.train = again
"""


def test_a_checkpoint_of_two_ranks_is_that_of_one(data, tmp_path, monkeypatch):
    """Saved on two ranks, loaded on one, saved there, loaded on two and saved again: every weight and moment is bit for bit the same."""
    run(torchrun(), data, tmp_path / "two", 2)
    script, source = patched(tmp_path, SAVE_AGAIN), "two"
    for name, launcher in (("one", [sys.executable]), ("back", torchrun())):
        monkeypatch.setenv("AGAIN", str(tmp_path / name))
        run(launcher, data, tmp_path / source, 2, script=script)
        source = name

    def tensors(name):
        state = {}
        train.dcp.state_dict_loader._load_state_dict(
            state, storage_reader=train.dcp.FileSystemReader(tmp_path / name / "checkpoints/step_0000002"), planner=train.dcp.default_planner._EmptyStateDictLoadPlanner(), no_dist=True)
        return state
    two, one, back = (dict(flat_state(tensors(name))) for name in ("two", "one", "back"))
    assert len(two) > 150 and two.keys() == one.keys() == back.keys()
    for k in two:
        if isinstance(two[k], torch.Tensor):
            assert torch.equal(two[k], one[k]) and torch.equal(two[k], back[k]), k
        else:
            assert two[k] == one[k] == back[k], k
    assert any("exp_avg_sq" in k for k in two) and any(k.startswith("teacher") for k in two)


def flat_state(state, prefix=""):
    for k, v in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(v, (dict, list)):
            yield from flat_state(v, f"{prefix}{k}.")
        else:
            yield prefix + str(k), v


# ---------------------------------------------------------------------------------------------------------------------
# guards

def test_a_step_that_is_not_finite_changes_nothing():
    student = torch.nn.ModuleDict(dict(encoder=torch.nn.Linear(3, 2)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1, fused=True)

    def step(factor):
        loss = student["encoder"](torch.ones(1, 3)).sum() * factor
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        skipped = train.skip_if_not_finite(optimizer, loss, [norm])
        optimizer.step()
        optimizer.zero_grad()
        return float(skipped), [t.clone() for t in [*student.parameters(), *(v for s in optimizer.state.values() for v in s.values())]]
    _, before = step(1.0)
    for factor in (math.nan, math.inf):
        skipped, after = step(factor)
        assert skipped == 1 and all(torch.equal(a, b) for a, b in zip(before, after))
    skipped, after = step(1.0)
    assert skipped == 0 and not torch.equal(before[0], after[0])


NAN = """
objective, calls = train.objective, [0]
def spoiled(*args):
    loss, *rest = objective(*args)
    calls[0] += 1
    return loss * (float("nan") if RANK == 1 and calls[0] - 1 in BAD else 1.0), *rest
train.objective = spoiled
"""


def test_non_finite_steps_are_skipped_on_all_ranks_and_named(data, tmp_path):
    """NaN on one rank only: both skip the step and go on alike; five in a row end the run."""
    done = run(torchrun(), data, tmp_path / "run", 5, "--log-every", "4", "--checkpoint-every", "100", script=patched(tmp_path, "BAD = (1, 3)" + NAN))
    skipped = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines() if "skipped" in line]
    assert [row["step"] for row in skipped] == [1, 3] and all(len(row["recordings"]) == 16 for row in skipped)
    assert skipped[0]["recordings"][0].split("/")[0] == "ptbxl" and "step 1 was skipped" in done.stdout
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())
    done = run(torchrun(), data, tmp_path / "bad", 20, script=patched(tmp_path, "BAD = range(2, 99)" + NAN), expect=1)
    assert "error: 5 steps in a row" in done.stderr and "smaller --lr" in done.stderr
    assert train.checkpoints(tmp_path / "bad/checkpoints")


def test_collapse_is_named():
    def row(cls, logits, entropy=2.0):
        found = train.health(cls, logits, dict(target_entropy=torch.tensor(entropy)))
        return {k: float(v) for k, v in found.items()} | dict(ln_k=math.log(64))
    torch.manual_seed(0)
    cls, logits = torch.randn(2, 32, 16), torch.randn(3, 32, 64)
    assert train.name_trouble(row(cls, logits), warm=True) == {}
    alike = torch.randn(1, 1, 16) + torch.randn(2, 32, 1) * torch.randn(16)              # all along one direction
    assert list(train.name_trouble(row(alike, logits), True)) == ["collapse of features"]
    assert list(train.name_trouble(row(cls, 0 * logits + torch.eye(64)[3] * 9), True)) == ["collapse of predictions"]
    assert list(train.name_trouble(row(cls, logits, math.log(64)), True)) == ["uniform targets"]
    assert train.name_trouble(row(cls, logits, math.log(64)), warm=False) == {}          # at first that is normal


def test_a_learning_rate_out_of_reason_is_named_in_the_log(data, tmp_path):
    run([sys.executable], data, tmp_path / "run", 25, "--lr", "0.9", "--checkpoint-every", "100")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert any("collapse" in row.get("warning", "") for row in rows), [(r["loss"], r["cls_rank"], r["prediction_entropy"]) for r in rows if "loss" in r]


def test_a_rank_that_hangs_ends_the_job_and_says_where(data, tmp_path):
    hang = """
host_batch = train.host_batch
def stuck(sampler, step, *args):
    if step == 2 and RANK == 1:
        time.sleep(1000)                                              # as a file system may
    return host_batch(sampler, step, *args)
train.host_batch, train.HANG_S = stuck, 8
"""
    begun = time.time()
    done = run(torchrun(), data, tmp_path / "run", 5, script=patched(tmp_path, hang), expect=1)
    assert time.time() - begun < 60
    assert "error: rank 1 on" in done.stderr and "has been in step 2 for 8 s" in done.stderr and "in stuck" in done.stderr


def test_out_of_memory_names_the_flags(data, tmp_path):
    limit = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2_500_000_000,) * 2)
"""
    done = run([sys.executable], data, tmp_path / "run", 3, "--size", "base", "--batch", "48", script=patched(tmp_path, limit), expect=1)
    assert "error: out of memory on rank 0" in done.stderr and "--checkpoint-activations" in done.stderr and "--batch (now 48)" in done.stderr


def test_views_of_few_leads_grow_with_the_window(data):
    """Recordings of ten seconds show eight leads, and only longer ones show few."""
    s = train.Sampler([open_corpus(data / n) for n in ("ptbxl", "mitdb")], 16, 5, window_s=60)
    groups = train.host_batch(s, 0, 0, 1, 16000, 50)
    assert [(g["specs"][0].leads, g["specs"][0].patches, g["batch"].shape[2]) for g in groups] == [(8, 15, 2250), (2, 267, 15000), (1, 267, 15000)]
    assert [{m["corpus"] for m in g["members"]} for g in s.groups] == [{0}, {1}, {1}]
    short = train.Sampler([open_corpus(data / "ptbxl")], 16, 5, window_s=5)
    assert [g["batch"].shape[2] for g in train.host_batch(short, 0, 0, 1, 5000, 50)] == [1250] * 3
    for seconds in ("3", "601", "nan"):
        with pytest.raises(ValueError, match="--window"):
            train.check_args(train.parse_args(["--window", seconds]))


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
