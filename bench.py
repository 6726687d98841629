"""Speed and memory of the hot paths, each as a ratio to something measured in the same run: machines differ and are
shared.

    python bench.py [--data DIR [DIR ...]] [--noise DIR] [--size tiny] [--batch 64] [--device auto]
    python bench.py --sizes          python bench.py --ranks 2 [--size small]         python bench.py --lengths
    python bench.py --prepare        python bench.py --index 12000000

Without --data, synthetic recordings are prepared in a temporary folder. Prints one line per path, medians after a
warm-up:
    matmul    fp32 (bf16 on a GPU) matrix multiplication of this machine, the yardstick of `step`
    step      training step: model FLOP/s (matrix products of forward and backward) as a share of the matmul rate, what
              it is made of, and the share of it that the loop waits for data
    loader    batches per second of train.host_batch, and the share of a step that they take
    views     windows, leads, gain and noise of a batch, as a share of a step (they are made beside it)
    embed     ten-second 12-lead recordings per second through a frozen encoder, FLOP/s as a share of the matmul rate
--sizes: parameters, state, activations and FLOPs of every size, computed without memory, beside what is measured here
--ranks: state of each rank, step and checkpoint of a sharded and a replicated run, on 1 to so many processes; `alone`
    is a rank that speaks to no other, and whose losses see only its own recordings
--lengths: time and memory of a training step against --window, and of embedding against the recording's length
--prepare: recordings per second of prepare.py, from raw files to finished shards, on one core and on two, as a ratio to
    wfdb.rdrecord (h5py for HDF5) alone reading the same files, and where the time goes
--index: a simulated index of so many recordings: seconds to open it and to build the sampler, memory, and the choice of
    a batch of 1,024 beside the same at a thousandth of the size
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import wfdb
from scipy.signal import resample_poly
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

import dino
import prepare
import train
from augment import load_noise, mask_counts
from dino import build_networks, distributed, update_teacher
from model import PATCH_S, SIZES, build_encoder
from prepare import FS, open_corpus

REPEATS = 5
ROUNDS = 8                       # how often the raw files are prepared: two processes take half a second to start
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
PROTOTYPES = 512
TEMPERATURE = 0.02               # of the teacher; the time does not depend on it
MEASURED = ("tiny", "small")     # sizes that --sizes trains a step of


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


class Run:
    """A training run that is held still: networks, optimiser and the views of one batch."""

    def __init__(self, size, device, groups=None, recompute=False, mesh=None):
        self.student, self.teacher = build_networks(build_encoder(size), train.HEAD_HIDDEN, train.HEAD_BOTTLENECK,
                                                    PROTOTYPES, PROTOTYPES)
        for block in self.student["encoder"].blocks:
            block.recompute = recompute
        for network in (self.student, self.teacher):
            network.to(device)
            if mesh is not None:
                train.shard(network, mesh, low_precision=device.type == "cuda")
        self.optimizer = train.build_optimizer(self.student)
        train.set_schedules(self.optimizer, train.schedules(50, 100, 1e-3))
        self.groups, self.device, self.sharded = groups, device, mesh is not None

    def loss(self):
        low = self.device.type == "cuda" and not self.sharded
        with torch.autocast("cuda", torch.bfloat16) if low else contextlib.nullcontext():
            return train.objective(self.student, self.teacher, None, self.groups, TEMPERATURE)[0]

    def encode(self, network):
        """The forward pass of the student's or the teacher's encoder."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            if network is self.teacher:
                with torch.no_grad():
                    return network["encoder"].encode([(v[1], v[3], None) for g in self.groups for v in g["views"][:1]])
            return network["encoder"].encode([(v[0], v[2], mask) for g in self.groups
                                              for v, mask in zip(g["views"], (g["masks"], None, None))])

    def update(self):
        if distributed() and not self.sharded:
            train.average_gradients(self.student)
        for part in self.student.values():
            torch.nn.utils.clip_grad_norm_(part.parameters(), train.CLIP_NORM)
        self.optimizer.step()

    def ema(self):
        update_teacher(self.teacher, self.student, 0.99)

    def step(self):
        loss = self.loss()
        loss.backward()
        self.update()
        self.optimizer.zero_grad()
        self.ema()

    def state_bytes(self):
        """Weights, gradients and moments of the student and weights of the teacher, as this rank holds them."""
        self.loss().backward()
        self.optimizer.step()
        moments = [t for state in self.optimizer.state.values() for t in state.values() if t.dim()]
        held = [t for p in self.student.parameters() for t in (p, p.grad)] + list(self.teacher.parameters()) + moments
        return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in held)


def random_views(batch, device, window_s=train.WINDOW_S, groups=None):
    """Views of a batch as cut_views makes them, of random signal: shapes are all that time and memory depend on."""
    made = []
    for shape in groups or train.lead_groups(window_s):
        n, P = max(1, round(batch * shape.share)), round(PATCH_S * FS)
        views = []
        for spec in train.view_specs(shape, few=2):
            signal = torch.randn(spec.views * n, spec.leads, spec.patches * P, device=device) * 0.2
            leads = torch.arange(1, 1 + spec.leads, device=device).expand(len(signal), -1)
            views.append((signal, signal, leads, leads))
        crops, tokens = len(views[0][0]), shape.leads * shape.global_patches
        masked = int(mask_counts(crops, tokens).sum())
        masks = torch.zeros(crops * tokens, dtype=torch.bool)
        place = torch.linspace(0, crops * tokens - 1, masked).long()
        masks[place] = True
        made.append(dict(views=views, masks=masks.view(crops, shape.leads, -1).to(device), place=place.to(device),
                         weights=torch.full((masked,), 0.1, device=device), recordings=n))
    return made


def bench(args):
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else
                          "cpu" if args.device == "auto" else args.device)
    corpora, noise = [open_corpus(d) for d in args.data], load_noise(open_corpus(args.noise)).to(device)
    run = Run(args.size, device)
    P = run.student["encoder"].patch_samples
    batches = train.Batches(train.Sampler(corpora, args.batch, 0), 0, 1, noise, P, device)
    host = train.host_batch(batches.sampler, 0, 0, 1, noise.shape[-1], P)
    run.groups = batches.make(0)[0]
    signal, leads = torch.randn(32, 12, 10 * FS, device=device) * 0.2, torch.arange(1, 13, device=device).expand(32, -1)

    @torch.inference_mode()
    def embed():
        run.student["encoder"](signal, leads)

    def loop():
        """Steps as train.py does them; seconds waited for data."""
        waited = 0.0
        batches.start(0)
        for step in range(REPEATS):
            before = time.perf_counter()
            run.groups = batches.take()
            waited += time.perf_counter() - before if step else 0.0     # nothing was ahead of the first
            batches.start(step + 1)
            run.step()
            if device.type == "cuda":
                torch.cuda.synchronize()                               # else the host waits for steps, not for data
        batches.take()
        return waited

    rate = matmul_rate(device)
    t_step, t_forward, t_embed = seconds(run.step, device), seconds(run.loss, device), seconds(embed, device)
    t_teacher, t_student = (seconds(lambda: run.encode(net), device) for net in (run.teacher, run.student))
    run.loss().backward()
    t_update, t_ema = seconds(run.update, device), seconds(run.ema, device)
    t_views = seconds(lambda: [train.cut_views(g, noise, P, device) for g in host], device)
    t_loader = seconds(lambda: train.host_batch(batches.sampler, 1, 0, 1, noise.shape[-1], P), device)
    start = time.perf_counter()
    waited = loop()
    waited /= time.perf_counter() - start
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"size {args.size}, batch {args.batch}, {name}, torch {torch.__version__}")
    print(f"matmul  {rate / 1e9:10.1f} GFLOP/s")
    work = step_flops(on_paper(args.size, args.batch))
    print(f"step    {args.batch / t_step:10.1f} recordings/s  {100 * work / t_step / rate:6.1f} % of the matmul rate   "
          f"({t_step:.3f} s)")
    parts = {"teacher": t_teacher, "student forward": t_student, "heads and losses": t_forward - t_teacher - t_student,
             "clip and AdamW": t_update, "EMA": t_ema}
    parts["backward"] = t_step - sum(parts.values())
    print("        " + ", ".join(f"{k} {100 * v / t_step:.1f} %" for k, v in parts.items())
          + f"; waiting for data {100 * waited:.2f} %")
    print(f"loader  {1 / t_loader:10.1f} batches/s     {100 * t_loader / t_step:6.1f} % of a step "
          "(runs beside it in a thread)")
    print(f"views   {1 / t_views:10.1f} batches/s     {100 * t_views / t_step:6.1f} % of a step (run beside it too)")
    print(f"embed   {32 / t_embed:10.1f} recordings/s  {100 * flops(embed) / t_embed / rate:6.1f} % of the matmul rate")


# ---------------------------------------------------------------------------------------------------------------------
# sizes, ranks, lengths

def saved_bytes(run):
    """What autograd keeps for the backward pass of a step, each storage once, without the weights."""
    kept, weights = {}, {p.untyped_storage()._cdata for p in run.student.parameters()}

    def keep(t):
        storage = t.untyped_storage()                                  # held, so that no other gets its address
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = run.loss()
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def in_new_process(function, *args):
    """function(*args) in a process of its own, whose peak of memory is its own too."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def measure_step(size, batch, recompute, window_s=train.WINDOW_S, groups=None):
    """(peak MB of a step above what the imports take, its seconds, FLOP/s of the machine) on one CPU thread."""
    torch.set_num_threads(1)
    cpu, before = torch.device("cpu"), memory_mb("VmHWM")
    run = Run(size, cpu, random_views(batch, cpu, window_s, groups), recompute)
    run.step()
    peak = memory_mb("VmHWM") - before
    return peak, seconds(run.step, cpu, 1), matmul_rate(cpu)


def on_paper(size, batch, recompute=False):
    """A Run whose tensors have shapes and no memory: neither generators nor autocast know such a device."""
    meta = torch.device("meta")
    with (patch("model.Encoder.init_weights"), patch("dino.DINOHead.init_weights"), meta):
        return Run(size, meta, random_views(batch, meta), recompute)


def step_flops(run):
    """Of the matrix products of a step on paper, attention's among them, which torch does not count on a CPU."""
    with patch("dino.full_precision", contextlib.nullcontext):
        return flops(lambda: run.loss().backward())


def bench_sizes(args):
    """What each size costs: computed with tensors that have no memory, and for MEASURED sizes beside a step of this
    machine."""
    print("state: weights, gradients and two moments of the student and weights of the teacher, 4 bytes each; with "
          "--shard full divided by the ranks.\nactivations in fp32, without the teacher's; recomp.: with "
          "--checkpoint-activations")
    print(f"{'':7}{'encoder':>10}{'all':>9}{'state':>10}{'GFLOP per':>12}{'MB of activations':>20}"
          f"{'':4}measured here, batch 16, one thread: MB predicted, found; step s, % of matmul rate")
    print(f"{'':7}{'M params':>10}{'M params':>9}{'GB':>10}{'recording':>12}{'per rec.':>10}{'recomp.':>10}")
    for size in SIZES:
        run = on_paper(size, 16)
        n_encoder, n_all = (sum(p.numel() for p in x.parameters()) for x in (run.student["encoder"], run.student))
        with patch("dino.full_precision", contextlib.nullcontext):
            kept, kept_less = saved_bytes(run) / 16, saved_bytes(on_paper(size, 16, recompute=True)) / 16
        work = step_flops(run) / 16
        line = (f"{size:7}{n_encoder / 1e6:10.1f}{n_all / 1e6:9.1f}{20 * n_all / 1e9:10.2f}{work / 1e9:12.1f}"
                f"{kept / 1e6:10.1f}{kept_less / 1e6:10.1f}")
        if size in MEASURED:
            mb, step, rate = in_new_process(measure_step, size, 16, False)
            line += (f"{'':4}{(20 * n_all + 16 * kept) / 1e6:8.0f} {mb:8.0f}   {step:8.2f} "
                     f"{100 * 16 * work / step / rate:6.1f} %")
        print(line, flush=True)


def rank_worker(rank, world_size, port, size, batch, shard, queue):
    torch.set_num_threads(1)
    mesh, cpu = None, torch.device("cpu")
    if world_size > 1:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world_size,)) if shard == "full" else None
    torch.manual_seed(rank)
    run = Run(size, cpu, random_views(batch // world_size, cpu), mesh=mesh)
    if shard == "alone":                                       # no collective at all: what the others are compared with
        train.reduce_ = lambda tensor, op=None: tensor
        dino.reduce_, dino.gather_rows = train.reduce_, lambda x: (x, 0)
    held, step = run.state_bytes(), seconds(run.step, cpu, 3)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        stall = written = 0.0
        if shard != "alone":
            out = Path(dist_folder(folder, rank, world_size))
            saved = train.Checkpoints(out, 0, rank, world_size)
            about = dict(command="bench.py", commit=None, args={})
            start = time.perf_counter()
            saved.save(1, train.training_state(run.student, run.teacher, None, run.optimizer), about,
                       run.teacher["encoder"])
            stall = time.perf_counter() - start
            saved.wait()
            written = time.perf_counter() - start
            if world_size > 1:
                dist.barrier()
    if rank == 0:
        queue.put((held, step, stall, written))
    if world_size > 1:
        dist.destroy_process_group()


def dist_folder(folder, rank, world_size):
    """The same folder on all ranks: that of rank 0."""
    held = [str(folder)]
    if world_size > 1:
        dist.broadcast_object_list(held)
    return held[0]


def bench_ranks(args):
    """State, step and checkpoint on 1 to args.ranks processes of one thread each, for one total batch."""
    context = multiprocessing.get_context("spawn")
    print(f"size {args.size}, batch {args.batch} in all, one thread per process, gloo\n"
          f"{'ranks':>5} {'shard':>6} {'state per rank':>15} {'step':>9} {'over alone':>11} "
          f"{'checkpoint: loop waits':>23} {'on disk after':>14}")
    for world_size in range(1, args.ranks + 1):
        alone = None
        for shard in (("alone", "full", "none") if world_size > 1 else ("one",)):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            queue = context.Queue()
            workers = [context.Process(target=rank_worker, args=(rank, world_size, port, args.size, args.batch, shard,
                                                                 queue)) for rank in range(world_size)]
            for worker in workers:
                worker.start()
            held, step, stall, written = queue.get(timeout=600)
            for worker in workers:
                worker.join()
            alone = step if shard == "alone" else alone
            over = "" if alone is None or shard == "alone" else f"{100 * (step / alone - 1):+.1f} %"
            print(f"{world_size:5} {shard:>6} {held / 1e6:12.1f} MB {step:7.2f} s {over:>11} "
                  + (f"{stall:21.3f} s {written:12.2f} s" if shard != "alone" else ""), flush=True)


def measure_embedding(size, leads, duration_s):
    """(seconds, peak MB above the start) of embedding one recording, on one CPU thread."""
    torch.set_num_threads(1)
    encoder = build_encoder(size).eval()
    names = prepare.PTBXL_LEADS[:leads]
    signal = np.random.default_rng(0).normal(0, 0.3, (leads, round(duration_s * FS))).astype(np.float32)
    encoder.embed(signal[:, :10 * FS], fs=FS, leads=names)
    before = memory_mb("VmHWM")
    took = clock(lambda: encoder.embed(signal, fs=FS, leads=names))
    return took, memory_mb("VmHWM") - before


def bench_lengths(args):
    """Training of one lead against --window, and embedding against the length of the recording."""
    print(f"size {args.size}, one CPU thread; MB above the start\n"
          "training step of one recording of one lead:                     s        MB   with --checkpoint-activations:"
          "     s        MB")
    for window_s in (9, 60, 600):
        one = [train.lead_groups(window_s)[-1]._replace(share=1.0)]
        found = [in_new_process(measure_step, args.size, 1, recompute, window_s, one) for recompute in (False, True)]
        tokens = one[0].global_patches + 1 + build_encoder(args.size).num_registers
        print(f"  --window {window_s:<4} ({tokens:5} tokens in a global view) {found[0][1]:24.2f} {found[0][0]:9.0f} "
              f"{found[1][1]:35.2f} {found[1][0]:9.0f}", flush=True)
    print("embedding of one recording:" + " " * 37 + "s        MB    per hour of one lead")
    for leads, duration_s in ((12, 10), (1, 10), (1, 60), (1, 600), (1, 4200)):
        took, mb = in_new_process(measure_embedding, args.size, leads, duration_s)
        print(f"  {leads:2} leads, {duration_s:5} s {took:46.2f} {mb:9.0f} {took * 3600 / duration_s / leads:20.1f} s",
              flush=True)


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


def bench_prepare(args):
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


def memory_mb(field):
    """Memory of this process in MB: RssAnon what is not mapped from files, VmHWM the most that there was of all."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def bench_index(args):
    """A corpus of n recordings of 12 leads and 10 s by a quarter as many patients, of which only the index exists."""
    for size in (args.index // 1000, args.index):
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
            before, opened = memory_mb("RssAnon"), []
            t_open = clock(lambda: opened.append(open_corpus(folder)))
            t_sampler = clock(lambda: opened.append(train.Sampler(opened[:1], 1024, 0)))
            t_batch = statistics.median(clock(lambda: opened[1].choose(step)) for step in range(20))
            print(f"index of {size:12,}: open {t_open:.3f} s ({len(sizes):,} shards), sampler {t_sampler:.2f} s and "
                  f"{memory_mb('RssAnon') - before:,.0f} MB, choice of a batch of 1,024 {1000 * t_batch:.1f} ms")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--data", nargs="+", type=Path, default=[], help="prepared corpora")
    p.add_argument("--noise", type=Path, help="prepared noise corpus")
    p.add_argument("--size", choices=SIZES, default="tiny", help="(default: %(default)s)")
    p.add_argument("--batch", type=int, default=64, help="(default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    p.add_argument("--sizes", action="store_true", help="compute what every size costs instead")
    p.add_argument("--ranks", type=int, metavar="N", help="measure sharding over 1 to N processes instead")
    p.add_argument("--lengths", action="store_true", help="measure long windows and recordings instead")
    p.add_argument("--prepare", action="store_true", help="measure prepare.py instead")
    p.add_argument("--index", type=int, metavar="N", help="measure an index of N recordings instead")
    return p.parse_args(argv)


def main(args):
    if bool(args.data) != bool(args.noise):
        raise ValueError("give both --data and --noise, or neither")
    for wanted, function in ((args.sizes, bench_sizes), (args.ranks, bench_ranks), (args.lengths, bench_lengths),
                             (args.prepare, bench_prepare), (args.index, bench_index)):
        if wanted:
            return function(args)
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
