"""Speed and memory of the hot paths, each as a ratio to something measured in the same run, because machines differ.

    python bench.py [--data DIR [DIR ...]] [--noise DIR] [--size tiny] [--batch 64] [--device auto]
    python bench.py --sizes | --ranks 2 [--size small] | --index 12000000

Without --data, synthetic recordings are prepared in a temporary folder. One line per path, medians after a warm-up:
    matmul    matrix multiplication on this machine, fp32 (bf16 on a GPU); `step` and `embed` are compared with it
    step      training step: FLOP/s of its matrix products as a share of the matmul rate, the share of each part, and
              the share of the time in which the loop waits for data
    loader    augment.host_batch per second, and as a share of a step (a thread does this during the step)
    views     augment.cut_views, the same
    embed     ten-second 12-lead recordings per second through a frozen encoder, FLOP/s as a share of the matmul rate
--sizes: parameters, state, start, FLOPs and activations of every size, computed with tensors that have no memory
--ranks: state of a rank, step and checkpoint, sharded and replicated; `alone`: ranks that do not communicate
--index: a simulated index of N recordings: seconds to open it and to build the sampler, memory, choice of a batch
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

import dino
import prepare
import train
from augment import Batches, cut_views, host_batch, lead_groups, load_noise, mask_counts, view_specs
from corpus import (FINGERPRINT_BYTES, FORMAT_VERSION, INDEX_DTYPE, MAGIC, PATIENT_DTYPE, RECORD_DTYPE, Sampler,
                    open_corpus)
from dino import build_networks, distributed, update_teacher
from ecg import FS
from model import PATCH_S, SIZES, build_encoder

REPEATS = 5
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
PROTOTYPES = 512
TEMPERATURE = 0.02               # of the teacher; the time does not depend on it
CPU = torch.device("cpu")


def clock(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def seconds(function, device=CPU, repeats=REPEATS):
    """Median wall time of function() after one warm-up call."""
    def once():
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
    once()
    return statistics.median(clock(once) for _ in range(repeats))


def flops(function):
    """Floating-point operations of the matrix products in function()."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matmul_rate(device=CPU):
    """FLOP/s of a large matrix product."""
    n, dtype = MATMUL_SIZE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / seconds(lambda: a @ a, device)


def memory_mb(field):
    """Memory of this process in MB: `field` of /proc/self/status."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


# ---- a training step ------------------------------------------------------------------------------------------------
class Run:
    """Networks, optimiser and the views of one batch: all that a training step needs."""

    def __init__(self, size, device, groups=None, recompute=False, mesh=None):
        self.student, self.teacher = build_networks(build_encoder(size), train.HEAD_HIDDEN, train.HEAD_BOTTLENECK,
                                                    PROTOTYPES, PROTOTYPES)
        for block in self.student["encoder"].blocks:
            block.recompute = recompute
        for network in (self.student, self.teacher):
            network.to(device)
            for part in network.values() if mesh is not None else ():
                train.shard(part, mesh, low_precision=device.type == "cuda")
        self.optimizer = train.build_optimizer(self.student)
        train.set_schedules(self.optimizer, train.schedules(50, 100, 1e-3))
        self.groups, self.device, self.sharded = groups, device, mesh is not None

    def autocast(self):
        low = self.device.type == "cuda" and not self.sharded
        return torch.autocast("cuda", torch.bfloat16) if low else contextlib.nullcontext()

    def loss(self):
        with self.autocast():
            return dino.objective(self.student, self.teacher, None, self.groups, TEMPERATURE)[0]

    @torch.no_grad()
    def encode_clean(self):
        """The forward pass of the teacher's encoder."""
        with self.autocast():
            return self.teacher["encoder"].encode([(v[1], v[3], None) for g in self.groups for v in g["views"][:1]])

    def encode_noisy(self):
        """The forward pass of the student's encoder."""
        with self.autocast():
            return self.student["encoder"].encode([(v[0], v[2], mask) for g in self.groups
                                                   for v, mask in zip(g["views"], (g["masks"], None, None))])

    def update(self):
        if distributed() and not self.sharded:
            train.average_gradients(self.student)
        for part in self.student.values():
            torch.nn.utils.clip_grad_norm_(part.parameters(), train.CLIP_NORM)
        self.optimizer.step()

    def step(self):
        self.loss().backward()
        self.update()
        self.optimizer.zero_grad()
        update_teacher(self.teacher, self.student, 0.99)

    def state_bytes(self):
        """Weights, gradients and moments of the student and weights of the teacher, as this rank holds them."""
        self.loss().backward()
        self.optimizer.step()
        moments = [t for state in self.optimizer.state.values() for t in state.values() if t.dim()]
        held = [t for p in self.student.parameters() for t in (p, p.grad)] + list(self.teacher.parameters()) + moments
        return sum(train.local(t).nbytes for t in held)


def random_views(batch, device):
    """Views of a batch as cut_views makes them, with random signal: time and memory depend only on the shapes."""
    made = []
    for shape in lead_groups():
        n, P = max(1, round(batch * shape.share)), round(PATCH_S * FS)
        views = []
        for spec in view_specs(shape, few=2):
            signal = torch.randn(spec.views * n, spec.leads, spec.patches * P, device=device) * 0.2
            leads = torch.arange(1, 1 + spec.leads, device=device).expand(len(signal), -1)
            views.append((signal, signal, leads, leads))
        crops, tokens = len(views[0][0]), shape.leads * shape.global_patches
        masked = int(mask_counts(crops, tokens).sum())
        masks = torch.zeros(crops * tokens, dtype=torch.bool, device="cpu")
        place = torch.linspace(0, crops * tokens - 1, masked, device="cpu").long()
        masks[place] = True
        made.append(dict(views=views, masks=masks.view(crops, shape.leads, -1).to(device), place=place.to(device),
                         weights=torch.full((masked,), 0.1, device=device), recordings=n))
    return made


def waiting_share(run, batches):
    """The share of the time in which the loop waits for data, over REPEATS steps as train.py makes them."""
    batches.start(0)
    run.groups, begun, waited = batches.take(), time.perf_counter(), 0.0       # the first batch cannot be ahead
    for step in range(1, 1 + REPEATS):
        batches.start(step)
        run.step()
        if run.device.type == "cuda":
            torch.cuda.synchronize()                                   # or the host would wait for steps, not for data
        before = time.perf_counter()
        run.groups = batches.take()
        waited += time.perf_counter() - before
    return waited / (time.perf_counter() - begun)


def bench(args):
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else
                          "cpu" if args.device == "auto" else args.device)
    corpora, noise = [open_corpus(d) for d in args.data], load_noise(open_corpus(args.noise)).to(device)
    run = Run(args.size, device)
    P = run.student["encoder"].patch_samples
    batches = Batches(Sampler(corpora, args.batch, 0, lead_groups()), 0, 1, noise, P, device)
    host = host_batch(batches.sampler, 0, 0, 1, noise.shape[-1], P)
    run.groups = batches.make(0)[0]
    signal, leads = torch.randn(32, 12, 10 * FS, device=device) * 0.2, torch.arange(1, 13, device=device).expand(32, -1)

    @torch.inference_mode()
    def embed():
        run.student["encoder"](signal, leads)

    rate, step = matmul_rate(device), seconds(run.step, device)
    forward = seconds(run.loss, device)
    run.loss().backward()
    parts = {"teacher": seconds(run.encode_clean, device), "student forward": seconds(run.encode_noisy, device)}
    parts["heads and losses"] = forward - sum(parts.values())
    parts |= {"clip and AdamW": seconds(run.update, device),
              "EMA": seconds(lambda: update_teacher(run.teacher, run.student, 0.99), device)}
    parts["backward"] = step - sum(parts.values())
    views = seconds(lambda: [cut_views(g, noise, P, device) for g in host], device)
    loader = seconds(lambda: host_batch(batches.sampler, 1, 0, 1, noise.shape[-1], P), device)
    embedding, work = seconds(embed, device), step_flops(on_paper(args.size, args.batch))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"size {args.size}, batch {args.batch}, {name}, torch {torch.__version__}\n"
          f"matmul  {rate / 1e9:10.1f} GFLOP/s\n"
          f"step    {args.batch / step:10.1f} recordings/s  {100 * work / step / rate:6.1f} % of the matmul rate   "
          f"({step:.3f} s)\n        " + ", ".join(f"{k} {100 * v / step:.1f} %" for k, v in parts.items())
          + f"; waiting for data {100 * waiting_share(run, batches):.2f} %\n"
          f"loader  {1 / loader:10.1f} batches/s     {100 * loader / step:6.1f} % of a step (in a thread, meanwhile)\n"
          f"views   {1 / views:10.1f} batches/s     {100 * views / step:6.1f} % of a step (the same)\n"
          f"embed   {32 / embedding:10.1f} recordings/s  {100 * flops(embed) / embedding / rate:6.1f} % of the matmul "
          "rate")


# ---- sizes and ranks ------------------------------------------------------------------------------------------------
def on_paper(size, batch, recompute=False):
    """A Run whose tensors have shapes and no memory."""
    meta = torch.device("meta")
    with meta:
        return Run(size, meta, random_views(batch, meta), recompute)


def step_flops(run):
    """FLOP of the matrix products of a step on paper, with those of attention, which torch does not count on a CPU."""
    with patch("dino.full_precision", contextlib.nullcontext):
        return flops(lambda: run.loss().backward())


def saved_bytes(run):
    """Bytes that autograd keeps for the backward pass of a step on paper: each storage once, without the weights."""
    kept, weights = {}, {p.untyped_storage()._cdata for p in run.student.parameters()}

    def keep(t):
        storage = t.untyped_storage()                                  # kept alive, so that its address stays unique
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), patch("dino.full_precision",
                                                                            contextlib.nullcontext):
        loss = run.loss()
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def bench_sizes(args):
    """What each size needs, computed with tensors that have no memory."""
    drawn = build_encoder("small")
    per_number_s = clock(lambda: deque(drawn.first_weights(), 0)) / sum(p.numel() for p in drawn.parameters())
    print("state: weights, gradients and two moments of the student and weights of the teacher, 4 bytes each; with "
          "--shard full the ranks share it.\nstart: drawing the first weights; every rank draws all of them, one by "
          "one.\nactivations: in fp32, without the teacher's; recomp.: with --checkpoint-activations\n"
          f"{'':7}{'encoder':>10}{'all':>9}{'state':>10}{'start':>9}{'GFLOP per':>12}{'MB of activations':>20}\n"
          f"{'':7}{'M params':>10}{'M params':>9}{'GB':>10}{'s':>9}{'recording':>12}{'per rec.':>10}{'recomp.':>10}")
    for size in SIZES:
        run = on_paper(size, 16)
        n_encoder, n_all = (sum(p.numel() for p in x.parameters()) for x in (run.student["encoder"], run.student))
        kept, kept_less = saved_bytes(run) / 16, saved_bytes(on_paper(size, 16, recompute=True)) / 16
        print(f"{size:7}{n_encoder / 1e6:10.1f}{n_all / 1e6:9.1f}{20 * n_all / 1e9:10.2f}{n_all * per_number_s:9.1f}"
              f"{step_flops(run) / 16e9:12.1f}{kept / 1e6:10.1f}{kept_less / 1e6:10.1f}", flush=True)


def rank_worker(rank, world_size, port, size, batch, shard, folder, queue):
    torch.set_num_threads(1)
    mesh = None
    if world_size > 1:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world_size,)) if shard == "full" else None
    torch.manual_seed(rank)
    run = Run(size, CPU, random_views(batch // world_size, CPU), mesh=mesh)
    if shard == "alone":                                       # no collectives: the others are compared with this
        dino.reduce_, dino.gather_rows = lambda tensor, op=None: tensor, lambda x: (x, 0)
        train.reduce_ = dino.reduce_
    held, step, stall, written = run.state_bytes(), seconds(run.step, repeats=3), 0.0, 0.0
    if shard != "alone":
        saved = train.Checkpoints(folder, 0, rank, world_size)
        about = dict(command="bench.py", commit=None)
        start = time.perf_counter()
        state = train.training_state(run.student, run.teacher, None, run.optimizer)
        saved.save(1, state, about, run.teacher["encoder"].config)
        stall = time.perf_counter() - start
        saved.wait()
        written = time.perf_counter() - start
    if rank == 0:
        queue.put((held, step, stall, written))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def on_ranks(world_size, shard, args):
    """The measurements of rank 0 of rank_worker."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [context.Process(target=rank_worker, args=(rank, world_size, port, args.size, args.batch, shard,
                                                             Path(folder), queue)) for rank in range(world_size)]
        for worker in workers:
            worker.start()
        found = queue.get(timeout=600)
        for worker in workers:
            worker.join()
    return found


def bench_ranks(args):
    """State, step and checkpoint on 1 to args.ranks processes of one thread each, with the same total batch."""
    print(f"size {args.size}, batch {args.batch} in all, one thread per process, gloo\n"
          f"{'ranks':>5} {'shard':>6} {'state per rank':>15} {'step':>9} {'over alone':>11} "
          f"{'checkpoint: loop waits':>23} {'on disk after':>14}")
    for world_size in range(1, args.ranks + 1):
        alone = None
        for shard in (("alone", "full", "none") if world_size > 1 else ("one",)):
            held, step, stall, written = on_ranks(world_size, shard, args)
            alone = step if shard == "alone" else alone
            over = "" if alone is None or shard == "alone" else f"{100 * (step / alone - 1):+.1f} %"
            print(f"{world_size:5} {shard:>6} {held / 1e6:12.1f} MB {step:7.2f} s {over:>11} "
                  + (f"{stall:21.3f} s {written:12.2f} s" if shard != "alone" else ""), flush=True)


# ---- an index of millions -------------------------------------------------------------------------------------------
def write_index(folder, size):
    """A corpus with an index of `size` recordings (12 leads, 10 s) of a quarter as many patients, and no signals."""
    per_shard, rng = prepare.SHARD_BYTES // 60_000, np.random.default_rng(0)
    index = np.lib.format.open_memmap(folder / "index.npy", "w+", INDEX_DTYPE, (size,))
    index["shard"], index["offset"] = np.arange(size) // per_shard, np.arange(size) % per_shard * 30_000
    index["length"], index["n_leads"], index["leads"][:, :12] = 2500, 12, np.arange(1, 13)
    index["patient"] = rng.integers(0, size // 4, size)
    index.flush()
    np.save(folder / "records.npy", np.zeros(size, RECORD_DTYPE))
    np.save(folder / "fingerprints.npy", rng.integers(0, 256, (size, FINGERPRINT_BYTES), np.uint8))
    np.save(folder / "patients.npy", np.zeros(size // 4, PATIENT_DTYPE))
    (folder / "signal").mkdir()
    sizes = {f"{k:05d}.i16": 0 for k in range(-(-size // per_shard))}
    for name in sizes:
        (folder / "signal" / name).touch()
    (folder / "manifest.json").write_text(json.dumps({
        "magic": MAGIC, "format_version": FORMAT_VERSION, "recordings": size, "shard_bytes": sizes}))


def bench_index(args):
    for size in (max(20_000, args.index // 1000), args.index):
        with tempfile.TemporaryDirectory() as folder:
            write_index(Path(folder), size)
            before, opened = memory_mb("RssAnon"), []
            t_open = clock(lambda: opened.append(open_corpus(folder)))
            t_sampler = clock(lambda: opened.append(Sampler(opened[:1], 1024, 0, lead_groups())))
            t_batch = statistics.median(clock(lambda: opened[1].choose(step)) for step in range(20))
            print(f"index of {size:12,}: open {t_open:.3f} s, sampler {t_sampler:.2f} s and "
                  f"{memory_mb('RssAnon') - before:,.0f} MB, choice of a batch of 1,024 {1000 * t_batch:.1f} ms")


# ---- command line ---------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--data", nargs="+", type=Path, metavar="DIR", default=[], help="prepared corpora; needs --noise")
    p.add_argument("--noise", type=Path, metavar="DIR", help="prepared noise corpus; needs --data")
    p.add_argument("--size", choices=SIZES, default="tiny", help="size of the encoder (default: %(default)s)")
    p.add_argument("--batch", type=int, default=64, help="recordings per step (default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                   help="auto: cuda if there is a GPU (default: %(default)s)")
    p.add_argument("--sizes", action="store_true", help="print only what every size needs")
    p.add_argument("--ranks", type=int, metavar="N", help="measure only sharding, over 1 to N processes")
    p.add_argument("--index", type=int, metavar="N", help="measure only an index of N recordings")
    return p.parse_args(argv)


def main(args):
    if bool(args.data) != bool(args.noise):
        raise ValueError("give both --data and --noise, or neither")
    for wanted, function in ((args.sizes, bench_sizes), (args.ranks, bench_ranks), (args.index, bench_index)):
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
