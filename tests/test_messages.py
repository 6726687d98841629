"""A message never proposes what the next check refuses: every message that names a flag is found in the sources, is
provoked here, its advice is followed, and the check that gave it then passes.
"""
import ast
import gc
import itertools
import json
import os
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

import augment
import corpus
import dino
import prepare
import probe_mitbih
import probe_ptbxl
import test_train
import train
from conftest import ROOT, noise, run, write
from corpus import Sampler, open_corpus
from test_corpus import fewer_patients

CPU = torch.device("cpu")
FILES = ("train", "corpus", "augment", "prepare", "probe_ptbxl", "probe_mitbih", "evaluate", "model", "ecg", "dino",
         "synth")
ADVICE = {}                      # fragment of a message -> the function that follows it, or why there is nothing to do


def flag_messages():
    """(file, line, text) of every text in a function that names a flag; {} where a value is put in. Not docstrings,
    --help, and the names of flags alone."""
    for file in FILES:
        tree = ast.parse((ROOT / f"{file}.py").read_text())
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            no_message = {id(node) for call in ast.walk(function) if isinstance(call, ast.Call)
                          and getattr(call.func, "id", getattr(call.func, "attr", "")) in ("add", "add_argument")
                          for node in ast.walk(call)}
            for node in ast.walk(function):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    no_message.add(id(node.value))
                if isinstance(node, ast.JoinedStr):
                    no_message |= {id(part) for part in node.values}
                text = (node.value if isinstance(node, ast.Constant) else
                        "".join(getattr(part, "value", "") if isinstance(part, ast.Constant) else "{}"
                                for part in node.values) if isinstance(node, ast.JoinedStr) else None)
                if (isinstance(text, str) and re.search(r"--[a-z{]", text) and " " in text
                        and id(node) not in no_message):
                    yield file, node.lineno, text


def follows(*fragments):
    def known(function):
        ADVICE.update(dict.fromkeys(fragments, function))
        return function
    return known


ADVICE |= {
    "no --data given: making": "says what is done",
    "on; until then it was": "says what is done",
    "synthetic ECGs: written to --raw": "says what is done",
    "go on with --resume": "test_signals_end_a_run_with_a_checkpoint"}      # of test_train.py


def test_every_message_that_names_a_flag_is_followed_here():
    found = sorted(set(flag_messages()))
    assert len(found) > 35
    for file, line, text in found:
        fitting = [fragment for fragment in ADVICE if fragment in text]
        assert len(fitting) == 1, f"{file}.py:{line} {text!r} fits {fitting or 'nothing in ADVICE'}"
    gone = [fragment for fragment in ADVICE if not any(fragment in text for _, _, text in found)]
    assert not gone, f"no longer said: {gone}"
    for what in ADVICE.values():
        assert callable(what) or what == "says what is done" or hasattr(test_train, what)


# ---- tools ----------------------------------------------------------------------------------------------------------

class Work:
    """What the functions below get."""

    def __init__(self, folder, data, monkeypatch, capfd):
        self.folder, self.data, self.monkeypatch, self.capfd = folder, data, monkeypatch, capfd

    def parse(self, *flags):
        """Flags of a run on the synthetic corpora."""
        return train.parse_args(["--data", str(self.data / "ptbxl"), str(self.data / "mitdb"), "--out",
                                 str(self.folder / "run"), "--device", "cpu", *map(str, flags)])

    def settle(self, args, meta=None):
        """All checks of a run that come before its networks."""
        train.check_args(args)
        train.settle_flags(args, meta, CPU, 0)
        corpora = [open_corpus(dir) for dir, _ in args.data]
        same = json.loads(json.dumps(train.identity(args, corpora, [], [])))
        if meta:
            train.check_resume(meta, same, args)
        return same

    def begun(self, *flags, step=5):
        """meta.json of a run that has done so many steps."""
        args = self.parse(*flags)
        same = self.settle(args)
        return dict(step=step, same=same, adjustable={k: getattr(args, k) for k in ("lr", "steps", "precision")})

    def resume(self, meta, *flags):
        self.settle(self.parse("--resume", *flags), meta)

    def new_out(self):
        """Another --out is taken."""
        train.Checkpoints(self.folder / "another", 0, 0, 1).claim(False)

    def prepare(self, source, *flags, raw=None):
        """prepare.py takes these flags."""
        raw = raw or self.folder
        return prepare.parse_args([source, "--raw", str(raw), "--out", str(self.folder / "out"), *map(str, flags)])

    def prepare_refuses(self, source, *flags, raw=None):
        with pytest.raises(SystemExit):
            self.prepare(source, *flags, raw=raw)
        return self.capfd.readouterr().err


@pytest.fixture
def work(tmp_path, synth, monkeypatch, capfd):
    return Work(tmp_path, synth / "data", monkeypatch, capfd)


def refusal(function, *args, error=ValueError, **more):
    with pytest.raises(error) as found:
        function(*args, **more)
    message = str(found.value)
    del found
    gc.collect()                                                       # what failed holds no lock any more
    return message


def commands_in(message):
    """Every `python prepare.py ...` and `torchrun train.py ...` in a message is taken by the program."""
    found = re.findall(r"(prepare|train)\.py ((?:[^\s`]+ ?)+)", message)
    for program, flags in found:
        flags = flags.rstrip(",. ").split()
        (prepare if program == "prepare" else train).parse_args(flags)
    return len(found)


def source_of(fragment):
    return next(text for _, _, text in flag_messages() if fragment in text)


# ---- train.py -------------------------------------------------------------------------------------------------------

@follows("Next, with your own:")
def after_the_synthetic_run(work):
    assert commands_in(source_of("Next, with your own:")) == 4


@follows("error: out of memory on rank")
def out_of_memory(work):
    meta = work.begun("--batch", "32", "--checkpoint-every", "5")
    message = train.explain(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 5 GB"), work.parse())
    assert set(re.findall(r"--[a-z-]+", message)) == {"--resume", "--checkpoint-activations", "--precision", "--out",
                                                     "--batch"}
    work.resume(meta, "--checkpoint-activations", "--precision", "bf16")
    corpora = [open_corpus(work.data / "ptbxl"), open_corpus(work.data / "mitdb")]
    Sampler(corpora, 32, 0, augment.lead_groups(), ranks=2)
    work.new_out()
    work.settle(work.parse("--batch", "16"))
    Sampler(corpora, 16, 0, augment.lead_groups())


@follows("put that right, then --resume")
def a_disk_that_is_full(work):
    assert "--resume" in train.explain(OSError(28, "No space left on device"), work.parse())
    work.resume(work.begun())


@follows("resume with the same flags, data and constants, or choose another --out")
def another_run_in_the_folder(work):
    meta = work.begun("--seed", "3", "--lr", "0.001")
    for flags in (["--seed", "4"], ["--seed", "3", "--batch", "16"], []):
        assert "was started with --" in refusal(work.resume, meta, *flags)
    work.resume(meta, "--seed", "3")
    work.new_out()


@follows("has already done")
def fewer_steps_than_done(work):
    for flags, steps, least in (([], 3, 5), (["--gram-from", "10"], 3, 11), (["--gram-from", "10"], 8, 11)):
        meta = work.begun("--steps", "20", *flags)
        message = refusal(work.resume, meta, *flags, "--steps", steps)
        assert f"--steps {least} or more" in message and "--gram-from" not in message
        work.resume(meta, *flags, *re.search(r"(--steps) (\d+) or more", message).groups())
    work.new_out()


@follows("nothing would be anchored")
def gram_from_beyond_the_last_step(work):
    for first, steps in ((100, 50), (1, 1), (20, 20)):
        message = refusal(work.settle, work.parse("--gram-from", first, "--steps", steps))
        work.settle(work.parse("--steps", steps, *re.search(r"give (--gram-from) (\d+)", message).groups()))
        work.settle(work.parse("--steps", steps))
    # A resumed run cannot change it.
    assert "--gram-from -1 (now 9999)" in refusal(work.resume, work.begun(), "--gram-from", 9999)


@follows("is no learning rate")
def no_learning_rate(work):
    for lr in ("0", "-1", "1", "nan"):
        message = refusal(train.check_args, work.parse("--lr", lr))
        train.check_args(work.parse(*re.search(r"something like (--lr) (\S+)", message).groups()))


@follows("must be at least {}")
def counts_that_are_too_small(work):
    for flag in ("steps", "batch", "prototypes", "log-every", "checkpoint-every", "keep-every", "probe-every"):
        message = refusal(train.check_args, work.parse(f"--{flag}", "-3"))
        train.check_args(work.parse(*re.fullmatch(r"(\S+) -3 must be at least (\d+)", message).groups()))


@follows("--noise without --data")
def noise_without_data(work):
    refusal(train.check_args, train.parse_args(["--noise", "x"]))
    train.check_args(train.parse_args([]))
    train.check_args(work.parse("--noise", "x"))


@follows("but this PyTorch sees no GPU")
def no_gpu(work):
    work.monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(train.check_args, work.parse("--device", "cuda"))
    train.check_args(work.parse(*re.search(r"use (--device) (cpu)", message).groups()))


@follows("srun started {} tasks")
def srun_without_torchrun(work):
    test_train.slurm_environment(work.monkeypatch, SLURM_STEP_ID="0", SLURM_NTASKS="2")
    message = refusal(train.setup_processes, "cpu")
    text = (ROOT / re.search(r"`sbatch (\S+)`", message)[1]).read_text()
    assert all(words in text for words in ("#SBATCH --ntasks-per-node=1", "torchrun --nnodes \"$SLURM_NNODES\" "))
    started = mock.Mock()
    work.monkeypatch.setattr(train.dist, "init_process_group", started)
    work.monkeypatch.setattr(train.dist, "get_rank", lambda: 1)
    work.monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    work.monkeypatch.setenv("WORLD_SIZE", "2")                         # torchrun's
    assert train.setup_processes("cpu") == (1, 2, CPU) and started.called


def checkpoint(out, step):
    """A checkpoint with one small file, as far as the folder is concerned."""
    folder = out / "checkpoints" / f"step_{step:07d}"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"weights")
    sums = {"__0_0.distcp": train.sha256(folder / "__0_0.distcp")}
    meta = dict(step=step, same={}, adjustable={}, named_leads=[], sha256=sums)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@follows("already holds a run; continue it with --resume")
def a_folder_with_a_run(work):
    checkpoint(work.folder / "run", 3)
    refusal(train.Checkpoints(work.folder / "run", 0, 0, 1).claim, False)
    train.Checkpoints(work.folder / "run", 0, 0, 1).claim(True)
    work.new_out()


@follows("could not be written: {}")
def a_checkpoint_that_could_not_be_written(work):
    checkpoint(work.folder / "run", 3)
    saved = train.Checkpoints(work.folder / "run", 0, 0, 1)
    saved.writing = "the checkpoint of step 5"
    saved.pending = saved.thread.submit(lambda: os.stat("/no/such/file"))
    message = refusal(saved.wait)
    assert "step 5 could not be written" in message and "last good checkpoint is step_0000003" in message
    del saved
    resumed = train.Checkpoints(work.folder / "run", 0, 0, 1)
    resumed.claim(True)
    assert resumed.newest()[0].name == "step_0000003"


@follows("no checkpoint in {} is whole")
def all_checkpoints_are_damaged(work):
    folder = checkpoint(work.folder / "run", 3)
    good = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(b"other")
    saved = train.Checkpoints(work.folder / "run", 0, 0, 1)
    message = refusal(saved.newest)
    kept = folder.parent / re.search(r"kept as (\S+):", message)[1]
    (kept / "__0_0.distcp").write_bytes(good)                          # restored from a backup
    kept.rename(folder)
    assert saved.newest()[0] == folder
    work.new_out()


@follows("steps in a row, up to step")
def losses_that_are_not_finite(work):
    """It is provoked in test_steps_that_are_not_finite_are_skipped_and_named of test_train.py."""
    assert re.findall(r"--[a-z-]+", source_of("steps in a row, up to step")) == ["--resume", "--lr", "--precision"]
    meta = work.begun("--precision", "bf16")
    work.resume(meta, "--lr", "0.0001")
    work.resume(meta, "--precision", "fp32")


# ---- corpus.py, augment.py, evaluate.py -----------------------------------------------------------------------------

@follows("another process writes into {}; wait for it")
def a_folder_that_is_held(work):
    (work.folder / "another").mkdir()
    held = corpus.lock_folder(work.folder)
    refusal(corpus.lock_folder, work.folder)
    work.new_out()
    held.close()                                                       # it ended
    corpus.lock_folder(work.folder).close()


@follows("make one with `python prepare.py SOURCE")
def no_corpus(work):
    message = refusal(open_corpus, work.folder / "absent")
    command = re.search(r"`python prepare.py (.*)`", message)[1].replace("DIR", str(work.folder))
    for source in prepare.LISTERS:
        prepare.parse_args(command.replace("SOURCE", source).split())


@follows("--batch {} is not possible", "use --batch {}")
def batches(work):
    """More of them: test_corpus.py."""
    ptbxl, mitdb = open_corpus(work.data / "ptbxl"), open_corpus(work.data / "mitdb")
    few = fewer_patients(ptbxl, 25)
    for corpora, batch, ranks in itertools.chain(itertools.product([[few]], (32, 48), (1, 2, 3, 4)),
                                                 itertools.product([[ptbxl, mitdb]], (24, 40), (1, 2, 3)),
                                                 [([few], 16, 3), ([ptbxl, mitdb], 16, 3), ([ptbxl, mitdb], 48, 4)]):
        message = refusal(Sampler, corpora, batch, 0, augment.lead_groups(), ranks=ranks)
        advised = int(re.search(r"use --batch (\d+)", message)[1])
        train.check_args(work.parse("--batch", advised))
        Sampler(corpora, advised, 0, augment.lead_groups(), ranks=ranks)
    for batch in (16, 24, 32):
        assert refusal(Sampler, [few], batch, 0, augment.lead_groups(), ranks=26).endswith(
            "use more data or fewer processes")
    Sampler([few], 24, 0, augment.lead_groups(), ranks=24)
    Sampler([few, mitdb], 32, 0, augment.lead_groups(), ranks=2)


@follows("leave this corpus out of --data")
def recordings_full_of_gaps(work):
    """Each second has a missing sample in every lead."""
    for seed in range(16):
        values = noise(seed, 5000)
        values[::250] = -32768                                         # WFDB's missing sample
        write(work.folder / "gaps", f"r{seed}", values)
    gaps = run("wfdb", work.folder / "gaps", work.folder / "gappy")
    whole = open_corpus(work.data / "ptbxl")
    sampler = Sampler([whole, gaps], 16, 0, augment.lead_groups())
    message = refusal(augment.host_batch, sampler, 0, 0, 1, 5000, 50)
    assert message.startswith(f"{gaps.dir}: ")
    augment.host_batch(Sampler([whole], 16, 0, augment.lead_groups()), 0, 0, 1, 5000, 50)


@follows("prepare them with python prepare.py nstdb")
def no_noise(work):
    message = refusal(augment.load_noise, open_corpus(work.data / "mitdb"))
    prepare.parse_args(re.search(r"prepare.py (nstdb .*)", message)[1].replace("DIR", str(work.folder)).split())
    augment.load_noise(open_corpus(work.data / "nstdb"))


@follows("the encoder ignores the ECG", "uses only a few of the prototypes", "finds all prototypes equally likely",
         "gives each patch only one prototype")
def alarms(work):
    """They are provoked in test_evaluate.py."""
    said = [text for _, _, text in flag_messages() if "Try a" in text]
    assert len(said) == 4 and {flag for text in said for flag in re.findall(r"--[a-z-]+", text)} == {
        "--lr", "--prototypes"}
    work.resume(work.begun(), "--lr", train.recipe("tiny")["lr"] / 2)
    work.settle(work.parse("--prototypes", "256"))                     # of a new run: a head cannot change its size
    work.new_out()
    constants = {name for text in said for name in re.findall(r"[A-Z]+_[A-Z]+", text)}
    assert constants == {"KOLEO_WEIGHT"} and hasattr(dino, "KOLEO_WEIGHT")
    named = {name for text in said for name in re.findall(r"(\w+) in RECIPES", text)}
    assert named == {"temperature", "patch_temperature"} <= set(train.RECIPES)


# ---- the probes -----------------------------------------------------------------------------------------------------

@follows("python prepare.py mitdb --raw DIR")
def no_mitdb(work):
    assert commands_in(refusal(probe_mitbih.collect, work.folder, [])) == 1


# ---- prepare.py -----------------------------------------------------------------------------------------------------

@follows("expected a table (--table FILE.csv) with {}")
def tables_of_arrays(work):
    raw, table = work.folder / "raw", work.folder / "t.csv"
    raw.mkdir()
    np.save(raw / "a.npy", noise(0)[:, 0] / 1000)
    message = refusal(run, "arrays", raw, work.folder / "out")
    assert f"{raw}/table.csv cannot be read ([Errno 2]" in message
    columns = re.search(r"with (.*), and perhaps (.*) and (.*);", message).groups()
    for header in (columns[0], ", ".join(columns)):
        row = "a.npy,250,mV,II" + (",p1,val" if "split" in header else "")
        table.write_text(header.replace(", ", ",") + f"\n{row}\n")
        out = work.folder / f"out_{len(header)}"
        assert len(run("arrays", raw, out, "--table", str(table)).index) == 1


@follows("which `python prepare.py ptbxl --raw {} --out DIR --download` fetches")
def nothing_to_prepare(work):
    """Only sources that can be downloaded are advised to be."""
    assert commands_in(refusal(probe_ptbxl.read_tables, work.folder)) == 1
    for source in prepare.LISTERS:
        out, raw = work.folder / source, work.folder / f"raw_{source}"
        raw.mkdir()
        args = prepare.parse_args([source, "--raw", str(raw), "--out", str(out)])
        message = refusal(prepare.main, args)
        advised = ["--download"] if "--download" in message else []
        assert advised or source != "ptbxl"
        prepare.parse_args([source, "--raw", str(raw), "--out", str(out), *advised])


@follows("name another --out, or prepare fewer (--limit)")
def a_small_disk(work):
    for i in range(3):
        write(work.folder / "raw", f"r{i}", noise(i))
    usage = shutil.disk_usage

    def small(path):
        return usage(path)._replace(free=15_000 if "small" in str(path) else 10**9)          # a recording takes 10,000
    work.monkeypatch.setattr(shutil, "disk_usage", small)
    for out, flags, fits in (("small", [], False), ("small", ["--limit", "1"], True), ("large", [], True)):
        args = prepare.parse_args(["wfdb", "--raw", str(work.folder / "raw"), "--out", str(work.folder / out),
                                   "--workers", "1", *flags])
        if fits:
            prepare.main(args)
        else:
            assert "--limit" in refusal(prepare.main, args)


@follows("differ from the publisher's SHA256SUMS.txt", "leave --download out")
def a_download_that_is_not_whole(work):
    (work.folder / "SHA256SUMS.txt").write_text(f"{'0' * 64} bw.dat\n")
    online = mock.Mock()
    work.monkeypatch.setattr(prepare.wfdb, "dl_files", online)
    assert "run again with --download" in refusal(prepare.download, "nstdb", work.folder, "auto")
    online.side_effect = OSError("no route to host")
    assert "leave --download out" in refusal(prepare.download, "nstdb", work.folder, "auto")
    for source in prepare.PHYSIONET:
        work.prepare(source, "--download")
        work.prepare(source)                                           # --download is left out


@follows("--{} is for {}, not for {}")
def options_of_other_sources(work):
    values = {"rate": "500", "records": "5", "seed": "1", "limit": "3"}
    for name, sources in prepare.ONLY_FOR.items():
        flags = [f"--{name.replace('_', '-')}", *[values.get(name, "a.csv")] * (name not in ("download", "dry_run"))]
        for source in ("synth", *prepare.LISTERS):
            if source in sources:
                work.prepare(source, *flags)
            else:
                message = work.prepare_refuses(source, *flags)
                assert re.search(rf"{flags[0]} is for (.*), not for {source}", message)[1].split(", ") == [*sources]
        work.prepare("synth")


@follows("--records must be at least 1")
def counts_of_prepare(work):
    for source, flag, least in (("synth", "--records", 1), ("mitdb", "--workers", 0), ("synth", "--seed", 0),
                                ("mitdb", "--limit", 0)):
        assert "must be at least 1, --workers, --seed and --limit at least 0" in work.prepare_refuses(
            source, flag, least - 1)
        work.prepare(source, flag, least)


@follows("and --normals {} must be at least 1")
def counts_of_beats(work):
    def refused(*flags):
        return refusal(probe_mitbih.main, probe_mitbih.parse_args(
            ["--encoder", "random:tiny", "--raw", str(work.folder), "--out", str(work.folder / "beats"), *flags]))
    assert "--beats 0 and" in refused("--beats", "0") and "--normals -1 must" in refused("--normals", "-1")
    assert "holds 0 of the 44 records" in refused("--beats", "1", "--normals", "1")


@follows("--raw {} is no folder")
def no_raw_folder(work):
    work.prepare_refuses("mitdb", raw=work.folder / "absent")
    work.prepare("mitdb", raw=work.folder)


def die_in_a_worker(parent):
    if os.getpid() != parent:
        os._exit(1)
    return "done"


@follows("try again with a smaller --workers")
def a_worker_that_was_killed(work):
    work.monkeypatch.setattr(prepare, "prepare_shard", die_in_a_worker)
    tasks = [(os.getpid(),)] * 3
    assert "smaller --workers" in refusal(lambda: list(prepare.run_tasks(tasks, 2)), error=OSError)
    work.prepare("mitdb", "--workers", "1")
    assert list(prepare.run_tasks(tasks, 1)) == ["done"] * 3


# ---- all of them ----------------------------------------------------------------------------------------------------

FOLLOWED = {function.__name__: function for function in ADVICE.values() if callable(function)}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_advice_of_a_message_is_accepted(work, name):
    FOLLOWED[name](work)
