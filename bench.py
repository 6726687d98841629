"""Speed of the hot paths, each as a ratio to something measured in the same run: machines differ and are shared.

    python bench.py [--data DIR [DIR ...]] [--noise DIR] [--size tiny] [--batch 64] [--device auto]
    python bench.py --prepare        python bench.py --index 12000000

Without --data, synthetic recordings are prepared in a temporary folder. Prints one line per path, medians after a
warm-up:
    matmul    fp32 (bf16 on a GPU) matrix multiplication of this machine, the yardstick of `step`
    loader    batches per second of train.host_batch, and the share of a training step that they take
    views     windows, leads, gain and noise of a batch, as a share of a training step
    step      training step: model FLOP/s (counted by torch, forward and backward) as a share of the matmul rate
    embed     ten-second 12-lead recordings per second through a frozen encoder, FLOP/s as a share of the matmul rate
--prepare: recordings per second of prepare.py, from raw files to finished shards, on one core and on two, as a ratio to
    wfdb.rdrecord (h5py for HDF5) alone reading the same files, and where the time goes
--index: a simulated index of so many recordings: seconds to open it and to build the sampler, memory, and the choice of
    a batch of 1,024 beside the same at a thousandth of the size
"""
import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
import torch
import wfdb
from scipy.signal import resample_poly
from torch.utils.flop_counter import FlopCounterMode

import prepare
import train
from augment import load_noise, make_views
from dino import build_networks, update_teacher
from model import SIZES, build_encoder
from prepare import FS, open_corpus

REPEATS = 5
ROUNDS = 8                       # how often the raw files are prepared: two processes take half a second to start
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


def seconds(function, device, repeats=REPEATS):
    """Median wall time of function() after one warm-up call."""
    def once():
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    once()
    return statistics.median(once() for _ in range(repeats))


def flops(function):
    """Floating-point operations of the matrix products in function()."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matmul_rate(device):
    n, dtype = MATMUL_SIZE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / seconds(lambda: a @ a, device)


def bench(args):
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else
                          "cpu" if args.device == "auto" else args.device)
    corpora, noise = [open_corpus(d) for d in args.data], load_noise(open_corpus(args.noise)).to(device)
    encoder = build_encoder(args.size)
    P = encoder.patch_samples
    student, teacher = (n.to(device) for n in build_networks(encoder, train.HEAD_HIDDEN, train.HEAD_BOTTLENECK,
                                                             512, 512))
    optimizer = train.build_optimizer(student)
    train.set_schedules(optimizer, train.schedules(50, 100, 1e-3))
    sampler = train.Sampler(corpora, args.batch, 0)
    groups = train.host_batch(sampler, 0, 0, 1, noise.shape[-1], P)

    def views():
        for g in groups:
            batch, leads = g["batch"].to(device), g["leads"].to(device)
            for spec, draws in zip(g["specs"], g["draws"]):
                make_views(batch, leads, draws, spec, P, noise)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = train.objective(student, teacher, None, groups, noise, 0.02, P, device)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(teacher, student, 0.99)

    signal, leads = torch.randn(32, 12, 10 * FS, device=device) * 0.2, torch.arange(1, 13, device=device).expand(32, -1)

    @torch.inference_mode()
    def embed():
        student["encoder"](signal, leads)

    rate = matmul_rate(device)
    t_step, t_views, t_embed = seconds(step, device), seconds(views, device), seconds(embed, device)
    t_loader = seconds(lambda: train.host_batch(sampler, 1, 0, 1, noise.shape[-1], P), device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"size {args.size}, batch {args.batch}, {name}, torch {torch.__version__}")
    print(f"matmul  {rate / 1e9:10.1f} GFLOP/s")
    print(f"loader  {1 / t_loader:10.1f} batches/s     {100 * t_loader / t_step:6.1f} % of a step "
          "(runs beside it in a thread)")
    print(f"views   {1 / t_views:10.1f} batches/s     {100 * t_views / t_step:6.1f} % of a step")
    print(f"step    {args.batch / t_step:10.1f} recordings/s  {100 * flops(step) / t_step / rate:6.1f} % of the matmul "
          f"rate   ({t_step:.3f} s)")
    print(f"embed   {32 / t_embed:10.1f} recordings/s  {100 * flops(embed) / t_embed / rate:6.1f} % of the matmul rate")


def raw_folders(folder):
    """{name: (source, folder of raw files)}, made from one synthetic ECG."""
    rng = np.random.default_rng(0)
    leads, fs = prepare.PTBXL_LEADS, 500
    ecg = np.rint(prepare.synth_recording(rng, "SR NORM", fs, 10, leads)[0] * 1000).astype(int)
    for kind, count in (("dat", 300), ("mat", 300)):
        (folder / kind).mkdir()
        for i in range(count):
            prepare.write_record(folder / kind / f"r{i}", fs, leads, np.roll(ecg, i, axis=0), gain=1000)
            if kind == "mat":
                header, data = folder / kind / f"r{i}.hea", folder / kind / f"r{i}.dat"
                header.write_text(header.read_text().replace(".dat 16", ".mat 16+24"))
                data.with_suffix(".mat").write_bytes(bytes(24) + data.read_bytes())
                data.unlink()
    (folder / "212").mkdir()
    for i in range(20):
        prepare.write_record(folder / "212" / f"r{i}", 360, leads[:2], np.resize(ecg[:, :2], (360 * 1800, 2)), gain=200)
    (folder / "icentia11k").mkdir()
    for i in range(20):
        name = f"p00000_s{i:02d}"
        prepare.write_record(folder / "icentia11k" / name, 250, ["ecg"], np.resize(ecg[:, :1], (2 ** 20 + 1, 1)),
                             gain=1000)
    made = {"12 leads, 10 s, 500 Hz, .dat": ("wfdb", folder / "dat"), "the same, .mat": ("wfdb", folder / "mat"),
            "2 leads, 30 min, 212": ("wfdb", folder / "212"),
            "1 lead, 70 min, 250 Hz": ("icentia11k", folder / "icentia11k")}
    try:
        import h5py
    except ImportError:
        return made
    (folder / "code15").mkdir()
    tracing = np.zeros((4096, 12), np.float32)
    tracing[581:3515] = resample_poly(ecg, 4, 5)[:2934] / 1000
    tracing += (tracing != 0) * rng.normal(0, 1e-3, tracing.shape)
    with h5py.File(folder / "code15" / "exams_part0.hdf5", "w") as file:
        file["exam_id"] = np.arange(1, 301)
        data = np.stack([np.roll(tracing, i, axis=1) for i in range(300)]).astype(np.float32)
        file.create_dataset("tracings", data=data, chunks=(1, 4096, 12), compression="gzip")
    rows = "".join(f"{i},{i},exams_part0.hdf5\n" for i in range(1, 301))
    (folder / "code15" / "exams.csv").write_text("exam_id,patient_id,trace_file\n" + rows)
    return made | {"CODE-15%, HDF5": ("code15", folder / "code15")}


def bench_prepare():
    """From raw files to shards, beside the reading alone."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(f"{'':30}{'rec/s':>8} {'rec/s':>8} {'gain of':>8}  {'x reading':>10}   ms: read, preprocess, tidy, rest"
              f"\n{'':30}{'1 core':>8} {'2 cores':>8} {'2 cores':>8}  {'by wfdb':>10}")
        for name, (source, raw) in raw_folders(folder).items():
            args = prepare.parse_args([source, "--raw", str(raw), "--out", str(folder / "out")])
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                jobs = list(prepare.LISTERS[source](raw, args, {}))
            if source == "code15":
                file = prepare.open_h5(prepare.import_h5py(), jobs[0].path)["tracings"]
                alone = clock_each(lambda job: file[job.row], jobs)
            else:
                alone = clock_each(lambda job: wfdb.rdrecord(job.path), jobs)
            read, raws = clock_each(prepare.read_job, jobs), list(map(prepare.read_job, jobs[:20]))
            share = len(jobs) / len(raws)
            ready = [prepare.preprocess(*r[:3]) for r in raws]
            pre = share * clock_each(lambda r: prepare.preprocess(*r[:3]), raws)
            tidy = share * clock_each(lambda r: prepare.tidy(r[0].copy(), r[1].copy(), Counter()), ready)
            plan = {"jobs": len(jobs) * ROUNDS, "shard_jobs": max(1, len(jobs) // 20)}
            whole = []
            for workers in (1, 2):
                part = folder / f"part{workers}"
                for sub in ("signal", "done", "events"):
                    (part / sub).mkdir(parents=True)
                (part / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs) * ROUNDS)
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                    whole.append(clock(lambda: prepare.finish_shards(source, part, plan, workers)) / ROUNDS)
                shutil.rmtree(part)
            n, ms = len(jobs), 1000 / len(jobs)
            print(f"{name:30}{n / whole[0]:8.1f} {n / whole[1]:8.1f} {whole[0] / whole[1]:8.2f}  "
                  f"{alone / whole[0]:10.2f}   {ms * read:.2f} ({alone / read:.1f} x wfdb), {ms * pre:.2f}, "
                  f"{ms * tidy:.2f}, {ms * (whole[0] - read - pre - tidy):.2f}")


def clock(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def clock_each(function, items):
    """Seconds for all items; no result is kept, so that memory is used again as it is in prepare.py."""
    return clock(lambda: deque(map(function, items), maxlen=0))


def resident_mb():
    """Memory of this process that is not mapped from files, in MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def bench_index(n):
    """A corpus of n recordings of 12 leads and 10 s by a quarter as many patients, of which only the index exists."""
    for size in (n // 1000, n):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            per_shard = prepare.SHARD_BYTES // 60_000
            index = np.lib.format.open_memmap(folder / "index.npy", "w+", prepare.INDEX_DTYPE, (size,))
            index["shard"], index["offset"] = np.arange(size) // per_shard, np.arange(size) % per_shard * 30_000
            index["length"], index["n_leads"], index["leads"][:, :12] = 2500, 12, np.arange(1, 13)
            index["patient"] = np.random.default_rng(0).integers(0, size // 4, size)
            index.flush()
            np.save(folder / "records.npy", np.zeros(size, prepare.RECORD_DTYPE))
            np.save(folder / "prints.npy", np.random.default_rng(1).integers(0, 256, (size, prepare.PRINT_BYTES), np.uint8))
            np.save(folder / "patients.npy", np.zeros(size // 4, prepare.PATIENT_DTYPE))
            (folder / "signal").mkdir()
            sizes = {f"{k:05d}.i16": 0 for k in range(-(-size // per_shard))}
            for name in sizes:
                (folder / "signal" / name).touch()
            (folder / "manifest.json").write_text(json.dumps({
                "magic": prepare.MAGIC, "format_version": prepare.FORMAT_VERSION, "recordings": size,
                "shard_bytes": sizes}))
            del index
            before, opened = resident_mb(), []
            t_open = clock(lambda: opened.append(open_corpus(folder)))
            t_sampler = clock(lambda: opened.append(train.Sampler(opened[:1], 1024, 0)))
            t_batch = statistics.median(clock(lambda: opened[1].choose(step)) for step in range(20))
            print(f"index of {size:12,}: open {t_open:.3f} s ({len(sizes):,} shards), sampler {t_sampler:.2f} s and "
                  f"{resident_mb() - before:,.0f} MB, choice of a batch of 1,024 {1000 * t_batch:.1f} ms")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--data", nargs="+", type=Path, default=[], help="prepared corpora")
    p.add_argument("--noise", type=Path, help="prepared noise corpus")
    p.add_argument("--size", choices=SIZES, default="tiny", help="(default: %(default)s)")
    p.add_argument("--batch", type=int, default=64, help="(default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    p.add_argument("--prepare", action="store_true", help="measure prepare.py instead")
    p.add_argument("--index", type=int, metavar="N", help="measure an index of N recordings instead")
    return p.parse_args(argv)


def main(args):
    if bool(args.data) != bool(args.noise):
        raise ValueError("give both --data and --noise, or neither")
    if args.prepare or args.index:
        return bench_prepare() if args.prepare else bench_index(args.index)
    if args.data:
        return bench(args)
    with tempfile.TemporaryDirectory() as folder:
        prepare.main(prepare.parse_args(["synth", "--raw", f"{folder}/raw", "--out", f"{folder}/data",
                                         "--records", "200"]))
        args.data, args.noise = [Path(folder, "data/ptbxl"), Path(folder, "data/mitdb")], Path(folder, "data/nstdb")
        bench(args)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        sys.exit(f"error: {error}")
