"""The run on small synthetic corpora: exact resume, ranks, checkpoints, Gram anchoring, and what a user sees when
something is wrong. (What messages advise: test_messages.py.)

Most runs train a small encoder in this process, so that they take seconds; the long tests (ECG_SLOW=1) train the tiny
one. $ECG_KILLS (3) is how often a run is killed at a random instant, $ECG_STEPS (6) how many steps are compared.
"""
import argparse
import errno
import fcntl
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import dino
import model
import train
from augment import cut_views, host_batch, lead_groups
from conftest import PNG, TWELVE
from corpus import Sampler, lock_folder, open_corpus
from dino import build_networks, objective
from ecg import LEADS
from model import Encoder, build_encoder, load_encoder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")         # as train.py does
ROOT = Path(__file__).parents[1]
TINY = train.recipe("tiny")
RUN = ["--batch", "16", "--log-every", "1", "--probe-every", "0", "--prototypes", "64", "--device", "cpu"]
SMALL = dict(width=32, depth=2, heads=2, layer_scale=1.0)      # what --size tiny is in the short tests
STEPS = 5                        # of the run `whole`
LONG_S = 1200                    # no test waits longer; on a busy machine none needs a tenth of it


@pytest.fixture(scope="session")
def data(synth):
    """Synthetic corpora, prepared through the ordinary readers."""
    return synth / "data"


def flags(data, out, steps, *extra):
    return ["--data", str(data / "ptbxl"), str(data / "mitdb"), "--noise", str(data / "nstdb"), "--out", str(out),
            "--steps", str(steps), "--checkpoint-every", "2", *RUN, *extra]


def train_here(*arguments):
    """Train a small encoder in this process; the exit code."""
    gc.collect()                                                       # of a run that failed: its lock on the folder
    with mock.patch.dict(model.SIZES, tiny=SMALL):
        return train.main(train.parse_args([str(a) for a in arguments]))


def refused(*arguments):
    """The message of a run that must not start, or not go on."""
    try:
        train_here(*arguments)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{arguments} was accepted")


def start(launcher, script, *arguments, **environment):
    # One thread: sums in one order, so runs can be compared bit for bit. The other variable as in run.sbatch.
    environment = dict(os.environ, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **environment)
    return subprocess.Popen([*launcher, str(script), *arguments], env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def run(launcher, script, *arguments, expect=0, **environment):
    """Train in processes of its own; a process with its returncode, stdout and stderr."""
    process = start(launcher, script, *arguments, **environment)
    try:
        process.stdout, process.stderr = process.communicate(timeout=LONG_S)
    finally:
        process.kill()
    assert process.returncode == expect, process.stderr[-3000:]
    return process


PYTHON, TRAIN = [sys.executable], ROOT / "train.py"


def torchrun(ranks=2):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0"]


def wait_until(condition):
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def patched(folder, code="", size=SMALL):
    """train.py with a few lines of its own, as a script."""
    script = folder / "patched.py"
    script.write_text(f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
                      f"import torch, dino, model, train\nmodel.SIZES['tiny'] = {size}\n"
                      f"RANK = int(os.environ.get('RANK', 0))\n{code}\ntrain.cli()\n")
    return script


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out, *names):
    """{step: values} of the log, without what depends on the clock."""
    return {r["step"]: {k: v for k, v in r.items() if k not in ("seconds", "waited_s") and (not names or k in names)}
            for r in rows(out) if "loss" in r}


def last_step(out):
    """The last step in the log of a run that goes on."""
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else -1


def weights(out):
    return load_encoder(out / "encoder.pt").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def saved_steps(out):
    return [int(c.name[5:]) for c in train.checkpoints(out / "checkpoints")]


def signal_at(monkeypatch, call, number=signal.SIGTERM):
    """This process gets a signal while the objective is computed for the call-th time from now on."""
    calls, compute = [], train.objective

    def signalled(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return compute(*args)
    monkeypatch.setattr(train, "objective", signalled)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing disturbed, of the small encoder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train_here(*flags(data, out, STEPS)) == 0
    return out


@pytest.fixture(scope="module")
def whole_tiny(data, tmp_path_factory):
    """The same of the tiny one, in seven steps, from the command line."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(PYTHON, TRAIN, *flags(data, out, 7))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# schedules and optimiser

def test_schedules_move_as_stated():
    s = [train.schedules(step, 100, dict(TINY, lr=1e-3, temperature=(0.04, 0.07))) for step in range(100)]
    assert s[0]["lr"] == pytest.approx(1e-4) and s[-1]["lr"] < 2e-5
    assert max(x["lr"] for x in s) == pytest.approx(1e-3)
    assert s[0]["prototype_lr"] == 0 and s[1]["prototype_lr"] > 0
    momentum = [x["momentum"] for x in s]
    assert [x["temperature"] for x in s[:31:15]] == pytest.approx([0.04, 0.055, 0.07]) and s[99]["temperature"] == 0.07
    assert momentum[0] == TINY["momentum"][0] and momentum == sorted(momentum) and momentum[-1] < 1


def test_gram_schedule_is_that_of_dinov3():
    """Over a stage of 200,000 steps: 1,000 of ramp, and a new anchor after 10,000, 20,000 and 30,000."""
    first, steps = 1_000_000, 1_200_000
    refreshed = [step - first for step in range(steps) if train.gram_schedule(step, steps, first)["gram_refresh"]]
    assert refreshed == [0, 10_000, 20_000, 30_000]
    weight = [train.gram_schedule(first + since, steps, first)["gram_weight"]
              for since in (0, 500, 1000, 5000, 199_999)]
    assert weight == pytest.approx([0, dino.GRAM_WEIGHT / 2, *[dino.GRAM_WEIGHT] * 3])
    off = dict(gram_weight=0.0, gram_refresh=False)
    assert train.gram_schedule(first - 1, steps, first) == off == train.gram_schedule(5, steps, -1)


def test_every_parameter_has_one_group_and_vectors_do_not_decay():
    student, _ = build_networks(Encoder(32, 1, 2, 1.0), 16, 8, 16, 16, 5)
    optimizer = train.build_optimizer(student, TINY)
    grouped = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(student.parameters()))
    plain = {id(p) for p in optimizer.param_groups[1]["params"]}
    for name, p in student.named_parameters():
        learned = any(word in name for word in ("token", "lead_embedding", "offset_vectors"))
        assert (id(p) in plain) == (p.ndim < 2 or learned), name


# ---------------------------------------------------------------------------------------------------------------------
# first weights

# Of the first weights of tiny at commit 7774147, which had three blocks of two heads: see checksums(). Processors
# differ in the last bits of normal numbers.
FIRST_WEIGHTS = {"encoder": (618.1252785, 5135.4475781), "student": (335.3822561, 5527.2126869)}


def checksums(network):
    """Of all weights in the order of their names: the sum weighted by place, and the sum of squares."""
    values = torch.cat([value.flatten() for _, value in sorted(network.state_dict().items())]).double()
    place = torch.linspace(-1, 1, len(values), dtype=torch.float64)
    return (values @ place).item(), values.square().sum().item()


def test_first_weights_are_those_of_earlier_versions(monkeypatch):
    monkeypatch.setitem(model.SIZES, "tiny", dict(width=128, depth=3, heads=2, layer_scale=1.0))
    assert checksums(load_encoder("random:tiny")) == pytest.approx(FIRST_WEIGHTS["encoder"], rel=1e-6)
    student, teacher = build_networks(build_encoder("tiny"), 512, 128, 64, 64, 32)
    del student["wave_head"], student["context_head"]                  # are newer
    assert checksums(student) == checksums(teacher) == pytest.approx(FIRST_WEIGHTS["student"], rel=1e-6)


HOST_MEMORY = """
def peak_gb():
    return next(int(line.split()[1]) / 1e6 for line in open("/proc/self/status") if line.startswith("VmHWM"))
if "WORLD_SIZE" in os.environ:
    rank, world_size, device = train.setup_processes("cpu")
    mesh = train.init_device_mesh("cpu", (world_size,))
    args = train.parse_args(["--size", "large", "--prototypes", "512", "--gram-from", "-1"])
    args.recipe |= dict(head_hidden=512, head_bottleneck=128)
    with train.Watchdog(rank) as watchdog:
        networks = train.build(args, mesh, device, watchdog)
    torch.distributed.barrier()
else:
    networks = train.build_networks(train.build_encoder("large"), 512, 128, 512, 512, 32)
open(f"{__file__}.{os.environ.get('RANK', 'alone')}", "w").write(str(peak_gb()))
sys.exit()
"""


@pytest.mark.slow
def test_a_rank_never_holds_whole_networks(tmp_path):
    """Host memory at --size large on two ranks, against both networks in one process as before."""
    script = patched(tmp_path, HOST_MEMORY)
    run(torchrun(), script)
    run(PYTHON, script)
    first, second, alone = (float(Path(f"{script}.{name}").read_text()) for name in (0, 1, "alone"))
    print(f"peak of each rank {first:.2f} and {second:.2f} GB, of one process with whole networks {alone:.2f} GB")
    assert max(first, second) < 0.65 * alone                             # measured: 0.58 to 0.59


# ---------------------------------------------------------------------------------------------------------------------
# whole runs

def test_overfits_one_batch(data):
    """With the batch held still, the student learns to name the prototypes of its views."""
    torch.manual_seed(0)
    sampler = Sampler([open_corpus(data / "ptbxl")], 16, 5, lead_groups())
    encoder = Encoder(48, 1, 2, 1.0)
    student, teacher = build_networks(encoder, 64, 32, 64, 64, 32)
    groups = [cut_views(g, None, encoder.patch_samples, "cpu")
              for g in host_batch(sampler, 0, 0, 1, 5000, encoder.patch_samples)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    seen = []
    for _ in range(25):
        loss, parts, _, _ = objective(student, teacher, None, groups, 0.02, 0.02, TINY)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(parts["dino_local"].item() + parts["ibot"].item())
    assert seen[-1] < 0.85 * seen[0], seen


def test_a_run_leaves_what_it_says(whole):
    about = json.loads((whole / "run.json").read_text())
    assert about["args"]["steps"] == STEPS and about["adjustable"]["lr"] == TINY["lr"]
    assert about["same"]["augment.LEAD_GROUPS"]["8"] == [15, 5.0, 1.6, 0.5] and about["same"]["dino.DINO_WEIGHT"] == 1.0
    assert [r["step"] for r in rows(whole) if "loss" in r] == list(range(STEPS)) and saved_steps(whole) == [4, 5]
    assert load_encoder(whole / "encoder.pt").config["width"] == SMALL["width"]
    # A lead that no view ever names is an unknown lead.
    vectors = load_encoder(whole / "encoder.pt").lead_embedding.weight
    assert [name for name, v in zip(LEADS, vectors) if not torch.equal(v, vectors[0])] == about["named_leads"]
    assert about["named_leads"] == list(TWELVE)
    assert (whole / "curves.png").stat().st_size > 1000 and not (whole / "stopped").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_end_a_run_with_a_checkpoint(data, whole, tmp_path, monkeypatch, capfd, number):
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        signal_at(patch, 2, number)
        assert train_here(*flags(data, out, STEPS, "--checkpoint-every", "100")) == train.EXIT_STOPPED
    assert "--resume" in capfd.readouterr().out and number.name in (out / "stopped").read_text()
    assert saved_steps(out) == [last_step(out) + 1] and last_step(out) < STEPS - 1
    assert train_here(*flags(data, out, STEPS, "--resume")) == 0
    assert losses(out) == losses(whole) and same(weights(out), weights(whole))
    assert not (out / "stopped").exists()


def test_a_killed_run_resumes_bit_for_bit(data, whole, tmp_path):
    """SIGKILL after its first checkpoint; the resumed run is that of another process."""
    out = tmp_path / "run"
    victim = start(PYTHON, patched(tmp_path), *flags(data, out, STEPS))
    wait_until(lambda: victim.poll() is not None or saved_steps(out))
    victim.kill()
    victim.communicate()
    assert train_here(*flags(data, out, STEPS, "--resume")) == 0
    assert losses(out) == losses(whole) and same(weights(out), weights(whole))
    assert not list((out / "checkpoints").glob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 250 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=250m", "none", folder], capture_output=True).returncode:
        pytest.skip("a small disk takes the right to mount one")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_runs_killed_at_random_resume_bit_for_bit(data, small_disk):
    """SIGKILL at random instants, every other one while a checkpoint is being written, in between a full disk. Every
    start goes on from the last good checkpoint, and none is ever lost; in the end log and weights are those of a run
    left alone."""
    kills, out, rng = int(os.environ.get("ECG_KILLS", 3)), small_disk / "run", np.random.default_rng()
    folder, filler, steps, interval, history = out / "checkpoints", small_disk / "filler", 7 + 3 * kills, 2, []

    def newest():
        return max(saved_steps(out) or [0])

    for kill in range(kills):
        if kill % 5 == 2 and newest():                                 # less room than a checkpoint takes, or none
            filler.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - kill % 2 * 20_000_000)))
            done = run(PYTHON, TRAIN, *flags(data, out, steps, "--resume"), expect=1)
            assert "could not be written" in done.stderr or "No space left" in done.stderr, done.stderr[-2000:]
            assert "Traceback" not in done.stderr, done.stderr[-2000:]
            filler.unlink()
        before = newest()
        (out / "run.json").unlink(missing_ok=True)
        victim = start(PYTHON, TRAIN, *flags(data, out, steps, "--resume"))
        # From then on what is there is this start's.
        wait_until(lambda: victim.poll() is not None or (out / "run.json").exists() and not list(folder.glob("*.tmp")))
        writing = False
        if kill % 2:
            wait_until(lambda: victim.poll() is not None or list(folder.glob("*.tmp/*")))
            time.sleep(rng.uniform(0, 0.1))
            writing = bool(list(folder.glob("*.tmp")))
        else:
            wait_until(lambda: victim.poll() is not None or last_step(out) >= before)
            time.sleep(rng.uniform(0, 3.0))
        victim.kill()
        victim.communicate()
        history.append((before, newest(), last_step(out), writing))
        assert newest() >= before, "a good checkpoint was lost"
        # The checkpoint of a step is written while the next steps run, at most an interval of them.
        assert last_step(out) + 1 - newest() <= 2 * interval, history
    run(PYTHON, TRAIN, *flags(data, out, steps, "--resume"))
    print(f"{kills} kills, {sum(h[-1] for h in history)} of them with a checkpoint half written; "
          f"(resumed, kept, reached, half written): {history}")
    assert not list(folder.glob("*.tmp")) and len(saved_steps(out)) == train.KEEP_LAST
    shutil.rmtree(folder)
    run(PYTHON, TRAIN, *flags(data, small_disk / "undisturbed", steps))
    assert losses(out) == losses(small_disk / "undisturbed") and len(losses(out)) == steps
    assert same(weights(out), weights(small_disk / "undisturbed"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_from_outside_end_a_run_with_a_checkpoint(data, whole_tiny, tmp_path, number):
    out = tmp_path / "cut"
    process = start(PYTHON, TRAIN, *flags(data, out, 7, "--checkpoint-every", "100"))
    wait_until(lambda: last_step(out) >= 1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=LONG_S)
    if last_step(out) < 6:                                             # otherwise it was done before the signal came
        assert process.returncode == train.EXIT_STOPPED and "--resume" in output and "Traceback" not in errors
        assert saved_steps(out) == [last_step(out) + 1]
        run(PYTHON, TRAIN, *flags(data, out, 7, "--resume"))
    assert losses(out) == losses(whole_tiny) and same(weights(out), weights(whole_tiny))


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_and_a_dead_rank_is_brought_back(data, tmp_path):
    """torchrun --max-restarts after SIGKILL of one rank, then SIGUSR1 to another: as undisturbed."""
    run(torchrun(), TRAIN, *flags(data, tmp_path / "one", 8))

    def read(path):
        try:
            return path.read_bytes()
        except OSError:
            return b""

    def ranks():
        return [int(p.name) for p in Path("/proc").glob("[0-9]*")
                if f"{tmp_path}/two\0".encode() in read(p / "cmdline") and b"LOCAL_RANK=" in read(p / "environ")]
    two = tmp_path / "two"
    process = start([*torchrun(), "--max-restarts", "1"], TRAIN, *flags(data, two, 8, "--resume"))
    wait_until(lambda: last_step(two) >= 2)
    os.kill(ranks()[0], signal.SIGKILL)
    wait_until(lambda: saved_steps(two) and last_step(two) >= 4)
    for pid in ranks()[-1:]:
        os.kill(pid, signal.SIGUSR1)
    output = process.communicate(timeout=LONG_S)
    assert process.returncode == 0, output[1][-3000:]
    if last_step(two) < 7:
        assert "SIGUSR1" in (two / "stopped").read_text()
        run(torchrun(), TRAIN, *flags(data, two, 8, "--resume"))
    assert losses(two) == losses(tmp_path / "one") and same(weights(two), weights(tmp_path / "one"))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def damage(checkpoint):
    file = next(checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_checkpoints_are_noticed(data, whole, tmp_path, capfd):
    """A flipped byte in the newest: the one before is used. In all: an error."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    older, newest = train.checkpoints(out / "checkpoints")
    damage(newest)
    assert train_here(*flags(data, out, STEPS, "--resume")) == 0
    said = capfd.readouterr()
    assert f"{newest} is damaged" in said.err and f"steps {int(older.name[5:])} to {STEPS}" in said.out
    assert losses(out) == losses(whole) and same(weights(out), weights(whole))
    assert (out / "checkpoints" / f"{newest.name}.damaged").is_dir()
    for i, checkpoint in enumerate(train.checkpoints(out / "checkpoints")):
        damage(checkpoint) if i else (checkpoint / "meta.json").write_text('{"step": 6')
    assert "no checkpoint" in refused(*flags(data, out, STEPS, "--resume"))


@pytest.mark.parametrize("absent", ["adjustable", "same", "sha256"])
def test_a_checkpoint_of_an_earlier_version_is_not_taken(whole, tmp_path, absent):
    """The last version wrote no learning rate into it, for example."""
    checkpoint = train.checkpoints(whole / "checkpoints")[-1]
    copy = tmp_path / checkpoint.name
    copy.mkdir()
    meta = json.loads((checkpoint / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps(meta))
    assert train.read_meta(copy) == meta
    (copy / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != absent}))
    assert train.read_meta(copy) is None
    (copy / "meta.json").write_text(json.dumps(meta | dict(step=99)))
    assert train.read_meta(copy) is None


def test_old_checkpoints_go_and_milestones_stay(data, tmp_path):
    train_here(*flags(data, tmp_path / "run", 6, "--checkpoint-every", "1", "--keep-every", "2"))
    assert saved_steps(tmp_path / "run") == [2, 4, 5, 6]


def test_time_between_checkpoints_follows_from_the_size_of_the_state():
    def interval(size, gram):
        with torch.device("meta"):
            student, teacher = build_networks(build_encoder(size), 512, 128, 64, 64, 32)
        gram_teacher = teacher["encoder"] if gram else None
        numbers, copied, anchor = (sum(p.numel() for p in part.parameters())
                                   for part in (student, teacher, teacher["encoder"]))
        state_gb = 4 * (3 * numbers + copied + gram * anchor) / 1e9
        return train.seconds_between_checkpoints(student, teacher, gram_teacher), state_gb
    assert interval("tiny", False)[0] == train.CHECKPOINT_S == 300
    for gram in (False, True):
        seconds, state_gb = interval("7b", gram)
        assert 100 < state_gb < 200 and seconds > 2000
        assert 86400 / seconds * state_gb == pytest.approx(5000, rel=1e-6)


def clock(monkeypatch, seconds, gb_per_day=1e12):
    monkeypatch.setattr(train, "CHECKPOINT_S", seconds)
    monkeypatch.setattr(train, "CHECKPOINT_GB_PER_DAY", gb_per_day)
    written, save = [], train.Checkpoints.save

    def noted(self, step, *args):
        written.append(step)
        save(self, step, *args)
    monkeypatch.setattr(train.Checkpoints, "save", noted)
    return written


def without(arguments, flag):
    at = arguments.index(flag)
    return arguments[:at] + arguments[at + 2:]


def test_checkpoints_by_time_resume_bit_for_bit(data, whole, tmp_path, monkeypatch):
    """Without --checkpoint-every, at an interval of 0 s, one is written at every step."""
    written, out = clock(monkeypatch, 0), tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, 2)                                            # which the run answers after its next step
        assert train_here(*without(flags(data, out, STEPS), "--checkpoint-every")) == train.EXIT_STOPPED
    assert written == [1, 2, 3] and saved_steps(out) == [2, 3]
    shutil.rmtree(train.checkpoints(out / "checkpoints")[-1])          # as if the run had been killed before it
    assert train_here(*without(flags(data, out, STEPS, "--resume"), "--checkpoint-every")) == 0
    assert written == [1, 2, 3, 3, 4, 5]
    assert losses(out) == losses(whole) and same(weights(out), weights(whole))


@pytest.mark.parametrize("seconds, every, expected", [(0, ["--checkpoint-every", "2"], [2, 3]), (1e6, [], [3])])
def test_checkpoint_every_is_obeyed_and_a_long_interval_means_only_the_last(data, tmp_path, monkeypatch, seconds, every,
                                                                          expected):
    written = clock(monkeypatch, seconds)
    train_here(*without(flags(data, tmp_path / "run", 3), "--checkpoint-every"), *every)
    assert written == expected


SAVE_AGAIN = """
from pathlib import Path
def again(args, rank, world_size, device, stop, watchdog):
    args.seed, args.precision = 1, "fp32"                             # other weights than those of the run
    mesh = train.init_device_mesh("cpu", (world_size,)) if world_size > 1 else None
    student, teacher, gram_teacher = train.build(args, mesh, device, watchdog)
    optimizer = train.build_optimizer(student, args.recipe)
    path, meta = train.Checkpoints(args.out, 0, rank, world_size).newest()
    train.load_checkpoint(path, student, teacher, gram_teacher, optimizer)
    saved = train.Checkpoints(Path(os.environ["AGAIN"]), 0, rank, world_size)
    about = {k: meta[k] for k in ("command", "commit", "same", "adjustable", "named_leads")}
    state = train.training_state(student, teacher, gram_teacher, optimizer)
    saved.save(meta["step"], state, about, teacher["encoder"].config)
    saved.wait()
train.train = again
"""


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_that_of_one(data, tmp_path):
    """Saved on two ranks, loaded on one, saved there, loaded on two and saved again: every weight and moment is bit
    for bit the same."""
    gram = ["--gram-from", "1"]
    run(torchrun(), TRAIN, *flags(data, tmp_path / "two", 2, *gram))
    script, source = patched(tmp_path, SAVE_AGAIN, model.SIZES["tiny"]), "two"
    for name, launcher in (("one", PYTHON), ("back", torchrun())):
        run(launcher, script, *flags(data, tmp_path / source, 2, *gram), AGAIN=str(tmp_path / name))
        source = name

    def tensors(name):
        state, loader = {}, train.dcp.state_dict_loader
        loader._load_state_dict(
            state, storage_reader=train.dcp.FileSystemReader(tmp_path / name / "checkpoints/step_0000002"),
            planner=train.dcp.default_planner._EmptyStateDictLoadPlanner(), no_dist=True)
        return state
    two, one, back = (dict(flat_state(tensors(name))) for name in ("two", "one", "back"))
    assert len(two) > 150 and two.keys() == one.keys() == back.keys()
    for k in two:
        if isinstance(two[k], torch.Tensor):
            assert torch.equal(two[k], one[k]) and torch.equal(two[k], back[k]), k
        else:
            assert two[k] == one[k] == back[k], k
    for part in ("teacher", "gram_teacher"):
        assert any(k.startswith(f"{part}.") for k in two)
    assert any("exp_avg_sq" in k for k in two)


def flat_state(state, prefix=""):
    for k, v in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(v, (dict, list)):
            yield from flat_state(v, f"{prefix}{k}.")
        else:
            yield prefix + str(k), v


# ---------------------------------------------------------------------------------------------------------------------
# what a resumed run must share with its beginning, and what it may change

def resumed(data, out, *extra, steps=None):
    """Flags of a resumed run that leaves the number of steps to the checkpoint."""
    arguments = flags(data, out, steps or 0, "--resume", *extra)
    return arguments if steps else without(arguments, "--steps")


def test_a_run_goes_on_only_as_it_began(data, whole, tmp_path, monkeypatch):
    """Other flags, corpora or constants, or another process in the folder: refused. encoder.pt is made again where a
    kill came before it."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "encoder.pt").unlink()
    assert train_here(*resumed(data, out)) == 0 and same(weights(out), weights(whole))
    contents = [open_corpus(data / name).content() for name in ("ptbxl", "mitdb")]
    assert "--seed 0 (now 1)" in refused(*resumed(data, out, "--seed", "1"))
    assert "--gram-from -1 (now 2)" in refused(*resumed(data, out, "--gram-from", "2"))
    assert "--batch 16 (now 32)" in refused(*resumed(data, out, "--batch", "32"))
    message = refused(*resumed(data, out, "--data", data / "ptbxl"))
    assert (f"--data ptbxl:1 with content {contents[0]} mitdb:1 with content {contents[1]} "
            f"(now ptbxl:1 with content {contents[0]})") in message
    assert "mitdb:0.5" in refused(*resumed(data, out, "--data", data / "ptbxl", f"{data / 'mitdb'}:0.5"))
    assert "--exclude nothing (now mitdb:1" in refused(*resumed(data, out, "--exclude", data / "mitdb"))
    with monkeypatch.context() as patch:
        patch.setattr(dino, "DINO_WEIGHT", 2.0)
        patch.setitem(train.RECIPES, "patch_temperature", ((0.02, 0.03), *train.RECIPES["patch_temperature"][1:]))
        patch.setitem(train.RECIPES, "contrast", (TINY["contrast"], *[3.0] * 5))               # of the other sizes
        message = refused(*resumed(data, out))
        assert "dino.DINO_WEIGHT 1.0 (now 2.0)" in message
        before = " ".join(map(str, TINY["patch_temperature"]))
        assert f"train.RECIPES.patch_temperature {before} (now 0.02 0.03)" in message and "contrast" not in message
    for name in ("HANG_S", "KEEP_LAST", "OUT_OF_MEMORY"):              # these change nothing that is learned
        monkeypatch.setattr(train, name, type(getattr(train, name))(getattr(train, name)) * 2)
    monkeypatch.setattr(train, "LOCK_S", 1)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process writes into" in refused(*resumed(data, out))
    assert train_here(*resumed(data, out)) == 0


def test_a_resumed_run_knows_its_corpora_by_their_content(data, tmp_path):
    """Moved and renamed: accepted. Prepared again from other recordings, under the same name: refused."""
    ptbxl, out = Path(shutil.copytree(data / "ptbxl", tmp_path / "ptbxl")), tmp_path / "run"
    run_flags = ["--out", out, "--checkpoint-every", "1", *RUN]
    train_here("--data", ptbxl, "--steps", "1", *run_flags)
    before = open_corpus(ptbxl).content()
    moved = ptbxl.rename(tmp_path / "moved")
    assert train_here("--data", moved, "--steps", "2", "--resume", *run_flags) == 0
    shutil.copytree(data / "mitdb", ptbxl)
    message = refused("--data", ptbxl, "--resume", *run_flags)
    assert f"--data moved:1 with content {before} (now ptbxl:1 with content {open_corpus(ptbxl).content()})" in message
    assert len(losses(out)) == 2
    assert json.loads((out / "run.json").read_text())["data"][0]["dir"] == str(moved)        # it was not overwritten


def test_learning_rate_steps_and_precision_come_from_the_checkpoint_or_are_changed_aloud(data, tmp_path, monkeypatch,
                                                                                       capfd):
    out = tmp_path / "run"

    def adjustable():
        return json.loads((out / "run.json").read_text())["adjustable"]

    def said():
        return [line for line in capfd.readouterr().out.splitlines() if line.startswith("--")]
    with monkeypatch.context() as patch:
        signal_at(patch, 1)
        train_here(*flags(data, out, 6, "--lr", "5e-4"))
    first = adjustable()
    assert first == dict(lr=5e-4, steps=6, precision="fp32") and not said()
    done = last_step(out) + 1
    with monkeypatch.context() as patch:
        signal_at(patch, 1)
        train_here(*resumed(data, out))                                # nothing given: all as before
    assert adjustable() == first and not said()
    expected = [train.schedules(step, 6, dict(TINY, lr=5e-4))["lr"] for step in range(6)]
    assert last_step(out) + 1 > done and [r["lr"] for r in losses(out).values()] == expected[:last_step(out) + 1]
    done = last_step(out) + 1
    message = refused(*resumed(data, out, steps=1))
    assert f"has already done {done} steps, --steps is 1; give --steps {done} or more" in message
    capfd.readouterr()
    train_here(*resumed(data, out, "--lr", "1e-3", "--precision", "bf16", steps=done + 1))
    assert said() == [f"--lr is 0.001 from step {done} on; until then it was 0.0005",
                      f"--steps is {done + 1} from step {done} on; until then it was 6",
                      f"--precision is bf16 from step {done} on; until then it was fp32"]
    assert adjustable() == dict(lr=1e-3, steps=done + 1, precision="bf16")
    assert losses(out)[done]["lr"] == train.schedules(done, done + 1, dict(TINY, lr=1e-3))["lr"]
    capfd.readouterr()
    assert train_here(*resumed(data, out, steps=done + 1)) == 0 and not said()         # what was advised works
    args = train.parse_args(resumed(data, out))
    train.settle_flags(args, dict(adjustable=adjustable()), torch.device("cpu"), 0)
    assert args.precision == "bf16" and args.lr == 1e-3 and not said()


def test_without_data_the_run_is_short_also_with_resume(tmp_path, monkeypatch):
    """--resume starts from nothing if there is none; the synthetic run then has its own number of steps."""
    seen = []
    monkeypatch.setattr(train, "show_demo", lambda args: None)
    monkeypatch.setattr(train, "train", lambda args, *rest: seen.append(args.steps))
    monkeypatch.setattr(train.prepare, "main", lambda args: None)
    for extra, steps in (([], train.DEMO_STEPS), (["--resume"], train.DEMO_STEPS), (["--steps", "7"], 7)):
        train.main(train.parse_args(["--out", str(tmp_path), "--device", "cpu", *extra]))
        assert seen.pop() == steps
    (tmp_path / "checkpoints/step_0000009").mkdir(parents=True)
    (tmp_path / "checkpoints/step_0000009/meta.json").write_text("{}")
    train.main(train.parse_args(["--out", str(tmp_path), "--device", "cpu", "--resume"]))
    assert seen.pop() is None                                          # the checkpoint knows


@pytest.mark.slow
def test_the_synthetic_run_from_nothing_to_its_table(tmp_path):
    done = run(PYTHON, TRAIN, "--out", str(tmp_path / "demo"), "--steps", "3", "--device", "cpu")
    table = done.stdout.partition("difference [95 %]")[2]
    assert table.count("this run, 3 steps") == table.count("tiny.pt, of real recordings") == 2
    for name in ("encoder.pt", "curves.png", "features.png", "ptbxl/ptbxl.json", "mitbih/mitbih.json"):
        assert (tmp_path / "demo" / name).is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Gram anchoring, and several processes

GRAM_STEPS, GRAM_FROM = 16, 4
GRAM = dict(GRAM_RAMP_SHARE=0.5, GRAM_REFRESH_SHARE=0.2)       # of 12 steps: a ramp of 6, a new anchor every 2
# 65 prototypes: two ranks cannot divide them, nor some other rows.
GRAM_FLAGS = ["--gram-from", str(GRAM_FROM), "--checkpoint-every", "100", "--prototypes", "65", "--seed", "5"]


def train_gram(data, out, weight, *extra):
    with mock.patch.multiple(train, **GRAM), mock.patch.object(dino, "GRAM_WEIGHT", weight):
        return train_here(*flags(data, out, GRAM_STEPS, *GRAM_FLAGS, *extra))


@pytest.fixture(scope="module")
def anchored(data, tmp_path_factory):
    """(folder, anchors) of a run with ten times the weight; anchors: per step, whether the Gram teacher has changed
    since the step before, and whether it equals the teacher."""
    out, anchors, before, compute = tmp_path_factory.mktemp("gram") / "run", {}, [], objective

    def watched(student, teacher, gram_teacher, *args):
        if gram_teacher is not None:
            now = [p.clone() for p in gram_teacher.parameters()]
            changed = not before or any(not torch.equal(a, b) for a, b in zip(now, before[0]))
            before[:] = [now]
            equal = all(torch.equal(a, b) for a, b in zip(now, teacher["encoder"].parameters()))
            anchors[GRAM_FROM + len(anchors)] = changed, equal
        return compute(student, teacher, gram_teacher, *args)
    with mock.patch.object(train, "objective", watched):
        assert train_gram(data, out, 20.0) == 0
    return out, anchors


def test_gram_anchoring_begins_rises_and_refreshes_as_stated(anchored):
    out, anchors = anchored
    log, first = losses(out), GRAM_FROM
    assert [step for step in log if "gram" in log[step]] == list(range(first, GRAM_STEPS)) == list(anchors)
    weight = [log[step]["gram_weight"] for step in range(GRAM_STEPS)]
    assert weight[:first + 1] == [0.0] * (first + 1) and weight[first + 6:] == [20.0] * (GRAM_STEPS - first - 6)
    assert all(a < b for a, b in zip(weight[first:first + 6], weight[first + 1:first + 7]))
    refreshed = [step for step in log if log[step]["gram_refresh"]]
    assert refreshed == [first, first + 2, first + 4, first + 6]       # the first anchor, and three more
    assert [step for step, (changed, _) in anchors.items() if changed] == refreshed
    assert [step for step, (_, equal) in anchors.items() if equal] == refreshed


def test_gram_anchoring_keeps_patches_nearer_to_the_anchor(data, anchored, tmp_path):
    """Against a run with weight 0 from the same seed, which is the same until the weight is above 0."""
    assert train_gram(data, tmp_path / "run", 0.0) == 0
    without, with_ = losses(tmp_path / "run", "gram", "ibot"), losses(anchored[0], "gram", "ibot")
    assert all(without[step] == with_[step] for step in range(GRAM_FROM + 2))
    late = range(GRAM_STEPS - 6, GRAM_STEPS)
    assert all(with_[step]["gram"] < without[step]["gram"] for step in late)
    assert np.mean([with_[s]["gram"] for s in late]) < 0.95 * np.mean([without[s]["gram"] for s in late])


def test_resume_over_gram_anchoring_is_bit_for_bit(data, anchored, tmp_path, monkeypatch):
    """Stopped before the anchor is taken, and again between two anchors."""
    out, stops = tmp_path / "run", []
    for call, extra in ((2, []), (GRAM_FROM + 1, ["--resume"])):
        with monkeypatch.context() as patch:
            signal_at(patch, call)
            assert train_gram(data, out, 20.0, *extra) == train.EXIT_STOPPED
        stops.append(last_step(out))
    assert stops[0] < GRAM_FROM < stops[1] < GRAM_STEPS - 1 and "gram" in losses(out)[stops[1]]
    assert train_gram(data, out, 20.0, "--resume") == 0
    assert losses(out) == losses(anchored[0]) and same(weights(out), weights(anchored[0]))


# Sums over recordings, tokens or ranks are taken in another order, which is 1e-7 of a value each time. AdamW divides
# small gradients by their own size, so differences grow with the steps, in 100 to about 5e-6 of a loss. KoLeo is the
# logarithm of a small distance, and Contrast has a temperature of 0.15: ten times as much.
AGREE = dict(koleo=2e-4, contrast=2e-4)
LOSSES = ("loss", "dino_global", "dino_local", "ibot", "koleo", "contrast", "target_entropy", "patch_target_entropy",
          "cls_rank", "prediction_entropy")


def assert_agree(one, other, names=LOSSES):
    """Two logs, {step: values}, of which the second may be shorter."""
    def difference(step, name):
        assert (name in one[step]) == (name in other[step]), (step, name)
        return abs(one[step].get(name, 0) - other[step].get(name, 0)) / max(1.0, abs(one[step].get(name, 0)))
    worst = {name: max(difference(step, name) for step in other) for name in names}
    print(f"{len(other)} steps:", *(f"{k} {v:.1e}" for k, v in worst.items()))
    assert all(v <= AGREE.get(k, 2e-5) for k, v in worst.items()), worst


TWO_RANKS = f"STOP, GRAM = {GRAM_FROM + 4}, {GRAM}" + """
vars(train).update(GRAM)
dino.GRAM_WEIGHT = 20.0
objective, calls = train.objective, []
def signalled(*args):
    calls.append(1)
    if RANK == 1 and len(calls) == STOP:
        os.kill(os.getpid(), signal.SIGUSR1)
    return objective(*args)
build = train.build
def noted(*args):
    networks = build(*args)
    shares = [p.to_local().numel() / p.numel() for network in networks for p in network.parameters()]
    states = [{name: value.full_tensor() for name, value in network.state_dict().items()} for network in networks]
    if RANK == 0:
        torch.save((states, sum(shares) / len(shares)), args[0].out / "first_weights.pt")
    return networks
train.objective, train.build = signalled, noted
"""


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """(folder, output) of the run of `anchored` on two ranks, sharded, under srun; the second rank gets a signal."""
    folder = tmp_path_factory.mktemp("two")
    slurm = dict(SLURM_STEP_ID="0", SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0")
    done = run(torchrun(), patched(folder, TWO_RANKS), *flags(data, folder / "run", GRAM_STEPS, *GRAM_FLAGS), **slurm)
    return folder / "run", done.stdout


def test_two_ranks_begin_with_the_weights_of_one_process(two_ranks):
    """Bit for bit, also where two ranks cannot divide the rows; nothing is left without a value."""
    sharded, share = torch.load(two_ranks[0] / "first_weights.pt")
    assert 0.4 < share < 0.8                                           # each rank has its part, of most parameters half
    args = train.parse_args(["--size", "tiny", *GRAM_FLAGS])
    with mock.patch.dict(model.SIZES, tiny=SMALL):
        alone = train.build(args, None, torch.device("cpu"), mock.Mock())
        patches = {8: 25, 4: 40, 3: 40, 2: 40, 1: 40}                    # 5 s and 8 s
        student, teacher = build_networks(build_encoder("tiny", args.seed, window_patches=patches), TINY["head_hidden"],
                                          TINY["head_bottleneck"], 65, 65, 32)
    assert len(sharded) == len(alone) == 3 and all(len(state) > 20 for state in sharded)
    for two, one, whole in zip(sharded, alone, (student, teacher, teacher["encoder"])):
        assert same(two, whole.state_dict()) and same(one.state_dict(), whole.state_dict())
        assert all(value.isfinite().all() for value in two.values())


def test_two_ranks_train_as_one_and_stop_together(two_ranks, anchored):
    """With Gram anchoring; a signal to the second rank ends both after the same step."""
    out, said = two_ranks
    log = losses(out)
    assert GRAM_FROM + 3 <= max(log) < GRAM_STEPS - 1 and list(log) == list(range(len(log)))
    assert "SIGUSR1" in (out / "stopped").read_text() and "--resume" in said
    assert json.loads((out / "run.json").read_text())["world_size"] == 2
    assert_agree(losses(anchored[0]), log, (*LOSSES, "gram", "gram_weight"))


@pytest.mark.slow
def test_ranks_sharding_compiling_and_recomputing_do_not_change_the_losses(data, tmp_path):
    steps = int(os.environ.get("ECG_STEPS", 6))
    # A schedule of six steps begins at the full learning rate. With that of the recipe its third step may blow up a
    # difference in the last bit 1,000 times, in one process too, before the differences shrink again.
    gram = ["--gram-from", "2", "--lr", "1e-3"]
    run(PYTHON, TRAIN, *flags(data, tmp_path / "one", steps, *gram))
    for name, launcher, more in (
            ("two", torchrun(), ["--checkpoint-activations"]), ("replicated", torchrun(), ["--shard", "none"]),
            ("compiled", PYTHON, ["--compile"]), ("recomputed", PYTHON, ["--checkpoint-activations"])):
        if name == "compiled" and not shutil.which("g++"):
            continue
        run(launcher, TRAIN, *flags(data, tmp_path / name, steps, *gram, *more))
        print(name, end=" ")
        assert len(losses(tmp_path / name)) == steps
        assert_agree(losses(tmp_path / "one"), losses(tmp_path / name), (*LOSSES, "gram"))


# ---------------------------------------------------------------------------------------------------------------------
# under Slurm

def slurm_environment(monkeypatch, **variables):
    for name in [*(n for n in os.environ if n.startswith("SLURM_")), "WORLD_SIZE", "RANK", "LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variables", [
    dict(SLURM_STEP_ID="0", SLURM_NTASKS="2"), dict(SLURM_STEP_ID="3", SLURM_NTASKS="1", SLURM_STEP_NUM_TASKS="8")])
def test_srun_with_several_tasks_and_no_torchrun_says_what_to_do(monkeypatch, variables):
    slurm_environment(monkeypatch, **variables)
    with pytest.raises(ValueError, match="srun started [28] tasks.*torchrun.*sbatch run.sbatch"):
        train.setup_processes("cpu")


@pytest.mark.parametrize("variables", [
    {}, dict(SLURM_STEP_ID="0", SLURM_NTASKS="1"), dict(SLURM_STEP_ID="0", SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1"),
    dict(SLURM_JOB_ID="7", SLURM_NTASKS="4")])
def test_one_task_trains_alone(monkeypatch, variables):
    """Nothing of Slurm, one task, an interactive step of a job of four, the script of a batch job itself."""
    slurm_environment(monkeypatch, **variables)
    assert train.setup_processes("cpu") == (0, 1, torch.device("cpu"))


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
        moments = [v for s in optimizer.state.values() for v in s.values()]
        return float(skipped), [t.clone() for t in [*student.parameters(), *moments]]
    _, before = step(1.0)
    for factor in (math.nan, math.inf):
        skipped, after = step(factor)
        assert skipped == 1 and all(torch.equal(a, b) for a, b in zip(before, after))
    skipped, after = step(1.0)
    assert skipped == 0 and not torch.equal(before[0], after[0])


def spoil(monkeypatch, bad):
    """The loss of these steps is NaN."""
    calls, compute = [], train.objective

    def spoiled(*args):
        loss, *rest = compute(*args)
        calls.append(1)
        return loss * (math.nan if len(calls) - 1 in bad else 1.0), *rest
    monkeypatch.setattr(train, "objective", spoiled)


def assert_skips(out, said):
    skipped = [row for row in rows(out) if "skipped" in row]
    assert [row["step"] for row in skipped] == [1, 3] and all(len(row["recordings"]) == 16 for row in skipped)
    assert skipped[0]["recordings"][0].split("/")[0] == "ptbxl" and "step 1 was skipped" in said
    assert all(torch.isfinite(w).all() for w in weights(out).values())


def test_steps_that_are_not_finite_are_skipped_and_named(data, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        spoil(patch, (1, 3))
        train_here(*flags(data, tmp_path / "run", 5, "--log-every", "4", "--checkpoint-every", "100"))
    said = capfd.readouterr()
    assert_skips(tmp_path / "run", said.out + said.err)
    spoil(monkeypatch, range(2, 99))
    message = refused(*flags(data, tmp_path / "bad", 20))
    assert message.startswith("5 steps in a row, up to step 6") and "smaller --lr" in message
    assert saved_steps(tmp_path / "bad") == [4, 6] or saved_steps(tmp_path / "bad") == [2, 4]


NAN = """
objective, calls = train.objective, [0]
def spoiled(*args):
    loss, *rest = objective(*args)
    calls[0] += 1
    return loss * (float("nan") if RANK == 1 and calls[0] - 1 in BAD else 1.0), *rest
train.objective = spoiled
"""


@pytest.mark.slow
def test_steps_that_are_not_finite_on_one_rank_are_skipped_on_all(data, tmp_path):
    """NaN on one rank only: both skip the step and go on alike; five in a row end the run."""
    done = run(torchrun(), patched(tmp_path, "BAD = (1, 3)" + NAN),
               *flags(data, tmp_path / "run", 5, "--log-every", "4", "--checkpoint-every", "100"))
    assert_skips(tmp_path / "run", done.stdout)
    done = run(torchrun(), patched(tmp_path, "BAD = range(2, 99)" + NAN), *flags(data, tmp_path / "bad", 20), expect=1)
    assert "error: 5 steps in a row" in done.stderr and "smaller --lr" in done.stderr
    assert saved_steps(tmp_path / "bad")


@pytest.mark.slow
def test_a_learning_rate_out_of_reason_is_named_in_the_log(data, tmp_path):
    run(PYTHON, TRAIN, *flags(data, tmp_path / "run", 25, "--lr", "0.9", "--checkpoint-every", "100"))
    seen = [(r["loss"], r["cls_rank"], r["prediction_entropy"]) for r in rows(tmp_path / "run") if "loss" in r]
    assert any("collapse" in row.get("warning", "") for row in rows(tmp_path / "run")), seen


HANG = """
make, pat = train.Batches.make, train.Watchdog.pat
def stuck(self, step):
    if step == 2 and RANK == 1:
        time.sleep(100000)                                            # as a file system may
    return make(self, step)
def short(self, what):
    if what == "step 2" and RANK == 1:
        train.HANG_S = 3                                              # not before: the machine may be busy
    pat(self, what)
train.Batches.make, train.Watchdog.pat = stuck, short
"""


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_and_says_where(data, tmp_path):
    done = run(torchrun(), patched(tmp_path, HANG), *flags(data, tmp_path / "run", 5), expect=1)
    assert "error: rank 1 on" in done.stderr and "has been in step 2 for 3 s" in done.stderr
    assert "in stuck" in done.stderr


MEMORY = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2_500_000_000,) * 2)
"""


@pytest.mark.slow
def test_out_of_memory_names_the_flags(data, tmp_path):
    done = run(PYTHON, patched(tmp_path, MEMORY), *flags(data, tmp_path / "run", 3, "--size", "base", "--batch", "48"),
               expect=1)
    assert "error: out of memory on rank 0" in done.stderr and "--checkpoint-activations" in done.stderr
    assert "--batch (now 48)" in done.stderr


def test_errors_are_one_line_and_a_finished_run_is_not_overwritten(data, whole, tmp_path):
    """From the command line one of them; the others in this process."""
    before = (whole / "log.jsonl").read_bytes()
    done = run(PYTHON, TRAIN, *flags(data, whole, STEPS), expect=1)
    assert re.fullmatch(r"error: .*/run already holds a run; continue it with --resume, or .*\n", done.stderr)
    assert "prepare.py" in refused(*flags(data, tmp_path / "new", 1, "--data", tmp_path))
    assert "--batch 0 must be at least 1" in refused(*flags(data, whole, STEPS, "--batch", "0"))
    assert (whole / "log.jsonl").read_bytes() == before


def test_log_is_trimmed_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    train.trim_log(log, 2)
    assert log.read_text() == '{"step": 0}\n{"step": 1}\n'


# ---------------------------------------------------------------------------------------------------------------------
# the lock on a folder (corpus.py)

HOLD = ("import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True);"
        " sys.stdin.read()")


def test_a_folder_that_another_process_holds_is_refused_until_it_ends(tmp_path, capfd):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock"], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    for wait_s in (0, 1):
        with pytest.raises(ValueError, match="another process writes into .*choose another --out"):
            lock_folder(tmp_path, wait_s)
    assert "waiting for up to 1 s" in capfd.readouterr().err
    holder.kill()                                                      # SIGKILL: no chance to give the lock back
    holder.communicate()
    with lock_folder(tmp_path):
        with pytest.raises(ValueError, match="another process"):
            lock_folder(tmp_path)
    lock_folder(tmp_path).close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capfd, code):
    """Lustre without -o flock, some NFS and FUSE."""
    def flock(*args):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(fcntl, "flock", flock)
    lock_folder(tmp_path).close()
    assert f"warning: {tmp_path} cannot be locked" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# flags

def test_flags_are_the_documented_ones():
    """A flag is a promise; adding one is a decision (constants at the top of a file are for everything else)."""
    assert set(vars(train.parse_args([]))) == {
        "data", "exclude", "noise", "out", "resume", "size", "steps", "batch", "lr", "prototypes", "gram_from", "seed",
        "device", "precision", "compile", "shard", "checkpoint_activations", "log_every", "checkpoint_every",
        "keep_every", "probe_every", "recipe"}                           # the last is the column of --size


def test_weights_of_corpora_are_read_from_the_flag(capfd):
    assert train.parse_args(["--data", "a", "b:0.5", "c:d", "e:2"]).data == [
        (Path("a"), 1.0), (Path("b"), 0.5), (Path("c:d"), 1.0), (Path("e"), 2.0)]
    for wrong in ("a:0", "a:-1", "a:nan", "a:inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be a number above 0"):
            train.corpus_and_weight(wrong)
        with pytest.raises(SystemExit):
            train.parse_args(["--data", wrong])
    assert "argument --data" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# pictures

@pytest.mark.parametrize("rows", [
    [],
    [dict(step=0, loss=1.0)],
    [dict(step=0, loss=1.0, ibot=None, ln_k=4.1, target_entropy=2.0), dict(step=1, skipped="x"),
     dict(step=2, loss=0.9, ibot=3.0, dino_local=2.0, ln_k=4.1), dict(step=2, online_auroc=0.7)]])
def test_curves_cope_with_any_log(tmp_path, rows):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes()[:4] == PNG
    assert {p.name for p in tmp_path.iterdir()} == {"curves.png", "log.jsonl"}
