"""Speed and memory of the hot paths, each as a ratio to something measured in the same run, because machines differ.

    python bench.py [--data DIR [DIR ...]] [--noise DIR] [--size tiny] [--batch 64] [--device auto] [--precision auto]
    python bench.py --peers [--size tiny] [--batch 32] | --loader [--data ... --noise ...] [--batch 256]
    python bench.py --sizes | --ranks 2 [--size small] | --index 12000000 | --duplicates [--data ... --noise ...]
    python bench.py --probe 21799 [--size base]

Without --data, synthetic recordings are prepared in a temporary folder. One line per path, medians after a warm-up:
    matmul    matrix multiplication in the precision of the step; `step` and `embed` are compared with it
    step      training step: FLOP/s of its matrix products as a share of the matmul rate; the share of its forward pass
    loader    augment.host_batch per second, and as a share of a step (a thread does this during the step)
    views     augment.cut_views, the same
    embed     ten-second 12-lead recordings per second through a frozen encoder, FLOP/s as a share of the matmul rate
--peers: the step in turns with that of a plain reference made of library parts, on one thread of a CPU
--loader: host_batch and cut_views on one thread in turns with a plain torch DataLoader that makes such views in NumPy
--sizes: parameters, state, start, FLOPs and activations of every size, computed with tensors that have no memory
--ranks: state of a rank, step and checkpoint, sharded and replicated; `alone`: ranks that do not communicate
--index: a simulated index of N recordings: seconds to open it and to build the sampler, memory, choice of a batch
--probe: the linear probes of probe_ptbxl.py on N recordings as in PTB-XL, with simulated features
--duplicates: how many pieces of held-out recordings are found, false alarms, and the search at 12 million recordings
"""
import argparse
import contextlib
import copy
import itertools
import json
import resource
import sys
import tempfile
import time
import tracemalloc
from collections import deque
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.signal import resample_poly
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.flop_counter import FlopCounterMode

import dino
import prepare
import probe_ptbxl
import train
from augment import (ASKED_PATCHES, GAIN, NEAR_OFFSETS, NEAR_PAIRS, NOISY_SHARE, SNR_DB, Batches, cut_views, host_batch,
                     lead_groups, load_noise, mask_counts, view_specs)
from corpus import (FINGERPRINT_DTYPE, FORMAT_VERSION, INDEPENDENT, INDEX_DTYPE, MAGIC, PATIENT_DTYPE, RECORD_DTYPE,
                    SEARCH_MOST, Corpus, HeldOut, Sampler, find_duplicates, fingerprints_of, near_starts, open_corpus)
from ecg import FS, LEADS, MISSING
from evaluate import both_classes, fit_logistic
from model import PATCH_S, REGISTERS, ROPE_PERIODS_S, SIZES, build_encoder, low_precision, precision_of

REPEATS, ROUNDS = 5, 9
TEMPERATURE = 0.02               # of the teacher; the time does not depend on it
FEW = 0.5                        # of augment.view_specs: 3 of 12 leads, near the mean number of tokens
P = round(PATCH_S * FS)          # samples of a patch
PIECES, PIECE_RATES = 100, (100, 128, 200, 257, 300, 360, 500, 1000)     # pieces of each kind, Hz
CPU = torch.device("cpu")


def clock(function, device=CPU, now=time.perf_counter):
    start = now()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return now() - start


def seconds(function, device=CPU, repeats=REPEATS):
    """Median wall time of function() after one warm-up call."""
    return np.median([clock(function, device) for _ in range(1 + repeats)][1:])


def compare(plain, ours, device, scale, unit):
    """Print the time of plain() and ours(), in turns, so that other work on the machine slows both; on a CPU the time
    is that of this process."""
    now = time.perf_counter if device.type == "cuda" else time.process_time
    times = scale * np.array([[clock(f, device, now) for f in (plain, ours)] for _ in range(1 + ROUNDS)][1:])
    ratio, (theirs, own) = times[:, 0] / times[:, 1], np.median(times, axis=0)
    print(f"plain {theirs:.3f}, ours {own:.3f} {unit}; plain / ours {np.median(ratio):.2f} (above 1: ours is faster; "
          f"{ratio.min():.2f} to {ratio.max():.2f} in {ROUNDS} rounds)")


def matmul_rate(device, precision):
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n ** 3 / seconds(lambda: a @ a, device)


# ---- a training step ------------------------------------------------------------------------------------------------
class Run:
    """Networks, optimiser and the views of one batch: all that a training step needs."""

    def __init__(self, size, device, groups=None, precision="fp32", recompute=False, mesh=None):
        self.recipe = recipe = train.recipe(size)
        self.student, self.teacher = train.networks_of(build_encoder(size), recipe)
        for block in self.student["encoder"].blocks:
            block.recompute = recompute
        for network in (self.student, self.teacher):
            network.to(device)
            for part in network.values() if mesh is not None else ():
                train.shard(part, mesh, low_precision=False)
        self.optimizer = train.build_optimizer(self.student, recipe)
        train.set_schedules(self.optimizer, train.schedules(50, 100, recipe))
        self.groups, self.device, self.precision, self.sharded = groups, device, precision, mesh is not None

    def loss(self):
        with low_precision(self.device, self.precision):
            return dino.objective(self.student, self.teacher, None, self.groups, TEMPERATURE, TEMPERATURE,
                                  self.recipe)[0]

    def step(self):
        self.loss().backward()
        if dino.distributed() and not self.sharded:
            train.average_gradients(self.student)
        for part in self.student.values():
            nn.utils.clip_grad_norm_(part.parameters(), self.recipe["clip_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        dino.update_teacher(self.teacher, self.student, 0.99)

    def state_bytes(self):
        """Weights, gradients and moments of the student and weights of the teacher, as this rank holds them."""
        self.loss().backward()
        self.optimizer.step()
        held = [t for p, moments in self.optimizer.state.items()
                for t in (p, p.grad, *moments.values()) if t.dim()] + list(self.teacher.parameters())
        return sum(train.local(t).nbytes for t in held)


def random_views(batch, device):
    """Views of a batch as cut_views makes them, with random signal: time and memory depend only on the shapes."""
    made = []
    for shape in lead_groups():
        n, views = max(1, round(batch * shape.share)), []
        for spec in view_specs(shape, P, FEW):
            signal = torch.randn(spec.views * n, spec.leads, spec.patches * P, device=device) * 0.2
            leads = torch.arange(1, 1 + spec.leads, device=device).expand(len(signal), -1)
            views.append((signal, signal, leads, leads))
        (crops, L, T), few = views[0][0].shape, torch.arange(len(views[-1][0]) * ASKED_PATCHES, device=device)
        masked = int(mask_counts(crops, L * T // P).sum())
        masks = (torch.arange(crops * L * T // P, device=device) < masked).view(crops, L, -1)
        asked = dict(token=few, target=few, weight=torch.full(few.shape, 1 / ASKED_PATCHES, device=device))
        pairs = torch.arange(crops * NEAR_PAIRS, device=device) % (crops * L * T // P)
        near = dict(token=pairs, target=pairs, offset=pairs % NEAR_OFFSETS)
        made.append(dict(views=views, masks=masks, near=near, place=torch.arange(masked, device=device), recordings=n,
                         asked=asked if views[2:] else None, weights=torch.full((masked,), 0.1, device=device)))
    return made


def open_batches(args, device):
    """The batches of a run on args.data and args.noise."""
    noise = load_noise(open_corpus(args.noise)).to(device)
    return Batches(Sampler([open_corpus(d) for d in args.data], args.batch, 0, lead_groups()), 0, 1, noise, P, device)


def bench(args):
    device, precision, batches = args.device, args.precision, open_batches(args, args.device)
    noise, run = batches.noise, Run(args.size, device, batches.make(0)[0], precision)
    host = host_batch(batches.sampler, 0, 0, 1, noise.shape[-1], P)
    signal, leads = torch.randn(32, 12, 10 * FS, device=device) * 0.2, torch.arange(1, 13, device=device).expand(32, -1)
    embed = torch.inference_mode()(lambda: run.student["encoder"](signal, leads))
    rate, step = matmul_rate(device, precision), seconds(run.step, device)
    forward, embedding = seconds(run.loss, device), seconds(embed, device)
    views = seconds(lambda: [cut_views(g, noise, P, device) for g in host], device)
    loader = seconds(lambda: host_batch(batches.sampler, 1, 0, 1, noise.shape[-1], P), device)
    work = on_paper(args.size, args.batch)[1]
    with FlopCounterMode(display=False) as counter:
        run.student["encoder"](signal, leads)                          # the counter fails in inference mode
    of_rate = 100 * counter.get_total_flops() / embedding / rate
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"size {args.size}, batch {args.batch}, {precision}, {name}, torch {torch.__version__}\n"
          f"matmul  {rate / 1e9:10.1f} GFLOP/s\n"
          f"step    {args.batch / step:10.1f} recordings/s  {100 * work / step / rate:6.1f} % of the matmul rate   "
          f"({step:.3f} s, {100 * forward / step:.1f} % of it forward)\n"
          f"loader  {1 / loader:10.1f} batches/s     {100 * loader / step:6.1f} % of a step (in a thread, meanwhile)\n"
          f"views   {1 / views:10.1f} batches/s     {100 * views / step:6.1f} % of a step (the same)\n"
          f"embed   {32 / embedding:10.1f} recordings/s  {of_rate:6.1f} % of the matmul rate")


# ---- peers: the same work from library parts -------------------------------------------------------------------------
class PlainBlock(nn.Module):
    def __init__(self, width, heads, layer_scale):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2))

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (y * cos + torch.cat((-y.chunk(2, -1)[1], y.chunk(2, -1)[0]), dim=-1) * sin for y in (q, k))
        x = x + self.scale1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.scale2 * self.mlp(self.norm2(x))


class PlainNetwork(nn.Module):
    """Encoder, without a front end, and heads; RMSNorm is F.normalize times a constant."""

    def __init__(self, recipe, width, depth, heads, layer_scale):
        super().__init__()
        hidden, bottleneck = recipe["head_hidden"], recipe["head_bottleneck"]
        self.patches, self.leads, self.norm = nn.Linear(P, width), nn.Embedding(len(LEADS), width), nn.LayerNorm(width)
        self.first, self.masked = nn.Parameter(torch.randn(1 + REGISTERS, width)), nn.Parameter(torch.randn(width))
        self.blocks = nn.ModuleList(PlainBlock(width, heads, layer_scale) for _ in range(depth))
        self.cls_head, self.patch_head = (nn.Sequential(
            nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck),
            nn.RMSNorm(bottleneck, elementwise_affine=False), nn.Linear(bottleneck, recipe[k], bias=False))
            for inputs, k in ((2 * width, "prototypes"), (width, "patch_prototypes")))
        self.offsets = nn.Embedding(NEAR_OFFSETS, width)
        self.wave_head, self.context_head = (nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, outputs))
            for outputs in (P, width))
        times_s = torch.cat((torch.zeros(1), (torch.arange(100) + 0.5) * PATCH_S))     # the first: CLS and registers
        angle = 2 * torch.pi * times_s[:, None] / torch.logspace(*np.log10(ROPE_PERIODS_S), width // heads // 2)
        self.register_buffer("rope", torch.stack((angle.cos(), angle.sin())).repeat(1, 1, 2))          # (2, 101, E)

    def forward(self, signal, leads, mask=None, outputs=None):
        x = self.patches(signal.unflatten(-1, (-1, P)))
        x = (x if mask is None else torch.where(mask[..., None], self.masked, x)) + self.leads(leads)[:, :, None]
        place = F.pad(torch.arange(1, 1 + x.shape[2], device=x.device).repeat(x.shape[1]), (1 + REGISTERS, 0))
        x, rope = torch.cat((self.first.expand(len(x), -1, -1), x.flatten(1, 2)), dim=1), self.rope[:, place]
        for block in self.blocks:
            x = block(x, *rope)
            if outputs is not None:
                outputs.append(F.instance_norm(x[:, 1 + REGISTERS:].float().transpose(1, 2)))
        x = self.norm(x)
        return torch.cat((x[:, 0], x[:, 1 + REGISTERS:].mean(1)), dim=1), x[:, 1 + REGISTERS:].flatten(0, 1)


def plain_loss(student, teacher, centers, g, recipe):
    """Loss of a lead group, one forward pass per view list: as in dino.py, but with DINO v1's centred targets, without
    the contrast and without the context of views of few leads, which is less work."""
    n, asked, log_probs = g["recordings"], g["asked"], lambda x: F.log_softmax(x.float() / 0.1, dim=-1)
    views = [student(v[0], v[2], mask) for v, mask in zip(g["views"], (g["masks"], None, None))]
    x = torch.cat([cls for cls, _ in views]).unflatten(0, (-1, n))                                      # (S, n, 2D)
    place, weights, found = g["place"], g["weights"] / len(g["masks"]), views[0][1][g["place"]]
    if asked is not None:
        place, found = torch.cat((place, asked["target"])), torch.cat((found, views[2][1][asked["token"]]))
        weights = torch.cat((weights, recipe["leads"] * asked["weight"] / len(views[2][0])))
    near, told, outputs = g["near"], 0.0, [] if recipe["wave"] or recipe["context"] else None
    with torch.no_grad():
        clean_cls, clean_patches = teacher(g["views"][0][1], g["views"][0][3], outputs=outputs)
        logits = [teacher.cls_head(clean_cls.unflatten(0, (-1, n))).float(),
                  teacher.patch_head(clean_patches[place]).float()]                             # (T, n, K), (M, K)
        target, patch_target = (((y - c) / TEMPERATURE).softmax(dim=-1) for y, c in zip(logits, centers))
        for y, center in zip(logits, centers):
            center.lerp_(y.flatten(0, -2).mean(0), 0.1)
    if outputs is not None:                      # Wave and Context
        which, own = (torch.cat((near[k], g["place"])) for k in ("token", "target"))
        tokens = views[0][1][which] + student.offsets(F.pad(near["offset"], (0, len(g["place"]))))
        ecg = g["views"][0][1].unflatten(-1, (-1, P)).flatten(0, 2)[own]
        context = F.layer_norm(sum(outputs).transpose(1, 2), tokens.shape[-1:])
        context = (context - context.mean(0)).flatten(0, 1)[own]
        told = (recipe["wave"] * F.mse_loss(student.wave_head(tokens), ecg)
                + recipe["context"] * F.mse_loss(student.context_head(tokens), context))
    pairs = (log_probs(student.cls_head(x))[:, None] * target).sum(-1).mean(-1)                         # (S, T)
    patches = (log_probs(student.patch_head(found)) * patch_target).sum(-1) @ weights                   # iBOT, Leads
    x = F.normalize(x[:len(target)].float(), dim=-1)
    nearest = (torch.cdist(x, x) + 2 * torch.eye(n, device=x.device)).amin(-1)
    dino_pairs = (pairs.sum() - pairs.trace()) / (pairs.numel() - len(target))
    return told - (dino_pairs + patches + 0.1 * nearest.log().mean())


def bench_peers(args):
    """The training step next to a plain one, on the same views, which have random signals."""
    torch.set_num_threads(1)
    device, precision, groups = args.device, args.precision, random_views(args.batch, args.device)
    ours, recipe = Run(args.size, device, groups, precision), train.recipe(args.size)
    student = PlainNetwork(recipe, **SIZES[args.size]).to(device)
    teacher, centers = copy.deepcopy(student).requires_grad_(False), [
        torch.zeros(recipe[k], device=device) for k in ("prototypes", "patch_prototypes")]
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)

    def plain_step():
        with low_precision(device, precision):
            loss = sum(g["recordings"] / args.batch * plain_loss(student, teacher, centers, g, recipe) for g in groups)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), recipe["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in student.parameters()], 0.01)
    plain, own = (sum(p.numel() for p in network.parameters()) / 1e6 for network in (student, ours.student))
    print(f"step, {args.size}, batch {args.batch}, {precision}: {plain:.2f} M parameters (plain), {own:.2f} M (ours)")
    compare(plain_step, ours.step, device, 1.0, "s a step")


class PlainViews(IterableDataset):
    """Views of recordings of a lead group, one by one in NumPy: noise per lead, so no electrodes; no masks."""

    def __init__(self, sampler, group, noise):
        self.corpora, self.group, self.noise = sampler.corpora, group, noise
        self.rng, self.specs = np.random.default_rng(0), view_specs(group["shape"], P, FEW)

    def view(self, signal, ids, spec):
        rng, T = self.rng, spec.patches * P
        leads = slice(spec.leads) if spec.independent else np.sort(rng.permutation(len(ids))[:spec.leads])
        start = rng.integers((signal.shape[1] - T) // P + 1) * P
        clean = signal[leads, start:start + T] * np.float32(1e-3 * rng.uniform(*GAIN))
        if rng.random() >= NOISY_SHARE:
            return clean, clean, ids[leads]
        offset = rng.integers(0, self.noise.shape[-1] - T + 1, (len(self.noise), spec.leads, 1)) + np.arange(T)
        noise = sum(kind[rng.integers(2)][at] for kind, at in zip(self.noise, offset))                  # (L, T)
        power = clean.var(1) / noise.var(1) / 10 ** (rng.uniform(*SNR_DB, spec.leads).astype(np.float32) / 10)
        return clean + np.sqrt(power)[:, None] * noise, clean, ids[leads]

    def __iter__(self):
        for _ in range(self.group["size"]):
            member, length = self.rng.choice(self.group["members"]), self.group["window"]
            corpus, i = self.corpora[member["corpus"]], self.rng.choice(member["rows"])
            starts, ids = near_starts(self.rng, int(corpus.index["length"][i]), length), corpus.lead_ids(i)
            order = np.argsort(~np.isin(ids, INDEPENDENT), kind="stable")
            signals, ids = [corpus.read(i, start, length)[order] for start in starts], ids[order].astype(np.int64)
            yield [self.view(signals[v % 2], ids, spec) for spec in self.specs for v in range(spec.views)]


def bench_loader(args):
    """The loader beside a plain DataLoader, on one thread."""
    torch.set_num_threads(1)
    batches, steps = open_batches(args, CPU), itertools.count()
    loaders = [DataLoader(PlainViews(batches.sampler, group, batches.noise.numpy()), batch_size=group["size"])
               for group in batches.sampler.groups]
    compare(lambda: deque(itertools.chain(*loaders), 0), lambda: batches.make(next(steps)), CPU, 1e6 / args.batch,
            f"us a recording (loader, batch {args.batch}, one thread)")


# ---- sizes and ranks ------------------------------------------------------------------------------------------------
@patch("dino.full_precision", contextlib.nullcontext)                  # there is no autocast without memory
def on_paper(size, batch, recompute=False):
    """A Run whose tensors have shapes and no memory; FLOP of the matrix products of its step, with those of attention,
    which torch does not count on a CPU; bytes that autograd keeps for the backward pass, without the weights."""
    kept, meta = {}, torch.device("meta")
    with meta:
        run = Run(size, meta, random_views(batch, meta), recompute=recompute)

    def keep(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage()         # kept alive, so that its address stays unique
        return t
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = run.loss()
        for p in run.student.parameters():
            kept.pop(p.untyped_storage()._cdata, None)
        held = sum(storage.nbytes() for storage in kept.values())      # before a recomputation
        loss.backward()
    return run, counter.get_total_flops(), held


def bench_sizes(args):
    """What each size needs, computed with tensors that have no memory."""
    drawn = build_encoder("small")
    per_number_s = clock(lambda: deque(drawn.first_weights(), 0)) / sum(p.numel() for p in drawn.parameters())
    print("state: with --shard full the ranks share it. start: every rank draws all first weights. activations: fp32, "
          "without the teacher's; recomp.: with --checkpoint-activations\n"
          f"{'':7}{'encoder':>10}{'all':>9}{'state':>10}{'start':>9}{'GFLOP per':>12}{'MB of activations':>20}\n"
          f"{'':7}{'M params':>10}{'M params':>9}{'GB':>10}{'s':>9}{'recording':>12}{'per rec.':>10}{'recomp.':>10}")
    for size in SIZES:
        (run, work, kept), (*_, kept_less) = on_paper(size, 16), on_paper(size, 16, recompute=True)
        n_encoder, n_all = (sum(p.numel() for p in x.parameters()) for x in (run.student["encoder"], run.student))
        state = 20 * n_all + 4 * n_encoder * (run.recipe["gram_from"] >= 0)  # with a Gram teacher
        print(f"{size:7}{n_encoder / 1e6:10.1f}{n_all / 1e6:9.1f}{state / 1e9:10.2f}{n_all * per_number_s:9.1f}"
              f"{work / 16e9:12.1f}{kept / 16e6:10.1f}{kept_less / 16e6:10.1f}", flush=True)


def rank_worker(rank, world_size, size, batch, shard, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,)) if shard == "full" else None
    torch.manual_seed(rank)
    run = Run(size, CPU, random_views(batch // world_size, CPU), mesh=mesh)
    if shard == "alone":                                       # no collectives: the others are compared with this
        dino.reduce_, dino.gather_rows = lambda tensor, op=None: tensor, lambda x: (x, 0)
        train.reduce_ = dino.reduce_
    found = dict(held=run.state_bytes(), step=seconds(run.step, repeats=3))
    if shard != "alone":
        saved = train.Checkpoints(Path(folder), 0, rank, world_size)
        state = train.training_state(run.student, run.teacher, None, run.optimizer)
        about, config = dict(command="bench.py", commit=None, named_leads=LEADS), run.teacher["encoder"].config
        found["stall"] = clock(lambda: saved.save(1, state, about, config))
        found["written"] = found["stall"] + clock(saved.wait)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def bench_ranks(args):
    """State, step and checkpoint on 1 to args.ranks processes of one thread each, with the same total batch."""
    print(f"size {args.size}, batch {args.batch} in all, one thread per process, gloo\n"
          f"{'ranks':>5} {'shard':>6} {'state per rank':>15} {'step':>9} {'over alone':>11} "
          f"{'checkpoint: loop waits':>23} {'on disk after':>14}")
    alone = None
    for world_size in range(1, args.ranks + 1):
        for shard in (("alone", "full", "none") if world_size > 1 else ("one",)):
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(rank_worker, (world_size, args.size, args.batch, shard, folder), world_size)
                found = json.loads(Path(folder, "found.json").read_text())
            alone = found["step"] if shard == "alone" else alone
            over = f"{100 * (found['step'] / alone - 1):+.1f} %" if shard in ("full", "none") else ""
            print(f"{world_size:5} {shard:>6} {found['held'] / 1e6:12.1f} MB {found['step']:7.2f} s {over:>11} "
                  + (f"{found['stall']:21.3f} s {found['written']:12.2f} s" if shard != "alone" else ""), flush=True)


# ---- an index of millions -------------------------------------------------------------------------------------------
def write_index(folder, size):
    """A corpus with an index of `size` recordings (12 leads, 10 s) of a quarter as many patients, and no signals."""
    per_shard, rng = prepare.SHARD_BYTES // 60_000, np.random.default_rng(0)
    index = np.lib.format.open_memmap(folder / "index.npy", "w+", INDEX_DTYPE, (size,))
    index["shard"], index["offset"] = np.arange(size) // per_shard, np.arange(size) % per_shard * 30_000
    index["length"], index["n_leads"], index["leads"][:, :12] = 2500, 12, np.arange(1, 13)
    index["patient"] = rng.integers(0, size // 4, size)
    np.save(folder / "records.npy", np.zeros(size, RECORD_DTYPE))
    fingerprints = np.lib.format.open_memmap(folder / "fingerprints.npy", "w+", FINGERPRINT_DTYPE, (size,))
    fingerprints["row"], fingerprints["bits"] = np.arange(size), rng.integers(0, 2**32, (size, 3), np.uint32)
    np.save(folder / "patients.npy", np.zeros(size // 4, PATIENT_DTYPE))
    (folder / "signal").mkdir()
    sizes = {f"{k:05d}.i16": 0 for k in range(-(-size // per_shard))}
    for name in sizes:
        (folder / "signal" / name).touch()
    (folder / "manifest.json").write_text(json.dumps({
        "magic": MAGIC, "format_version": FORMAT_VERSION, "recordings": size, "shard_bytes": sizes}))


def bench_index(args):
    def anonymous_mb():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024
    for size in (max(20_000, args.index // 1000), args.index):
        with tempfile.TemporaryDirectory() as folder:
            write_index(Path(folder), size)
            before, opened = anonymous_mb(), []
            t_open = clock(lambda: opened.append(open_corpus(folder)))
            t_sampler = clock(lambda: opened.append(Sampler(opened[:1], 1024, 0, lead_groups())))
            t_batch = np.median([clock(lambda: opened[1].choose(step)) for step in range(20)])
            print(f"index of {size:12,}: open {t_open:.3f} s, sampler {t_sampler:.2f} s and "
                  f"{anonymous_mb() - before:,.0f} MB, choice of a batch of 1,024 {1000 * t_batch:.1f} ms")


# ---- copies of held-out recordings ----------------------------------------------------------------------------------
class Pieces(Corpus):
    """Recordings in memory, all of split train: (lead ids, int16 (L, T))."""

    def __init__(self, recordings):
        index = np.zeros(len(recordings), INDEX_DTYPE)
        for row, (leads, signal) in zip(index, recordings):
            row["n_leads"], row["length"], row["leads"][:len(leads)] = len(leads), signal.shape[1], leads
        super().__init__(Path("pieces"), {}, index, None, None)
        self.signals = [signal for _, signal in recordings]
        self.fingerprints = fingerprints_of(self, np.zeros(len(index), bool))

    def read(self, i, start=0, length=None):
        return self.signals[i][:, start:None if length is None else start + length]


def piece_of(rng, signal, seconds, noise, snr_db):
    """A random stretch of an int16 signal (L, T) as another archive may hold it: noise, gain, rate and rounding."""
    start = rng.integers(0, signal.shape[1] - round(seconds * FS) + 1)
    x = np.where(signal == MISSING, 0, signal).astype(float)[:, start:start + round(seconds * FS)]
    if snr_db < np.inf:
        at = rng.integers(0, noise.shape[1] - x.shape[1])
        n = noise[rng.integers(0, len(noise), len(x)), at:at + x.shape[1]]
        n = (n - n.mean(1, keepdims=True)) / (n.std(1, keepdims=True) + 1e-9)
        x += n * x.std(1, keepdims=True) * 10 ** (-snr_db / 20)
    rate = int(rng.choice(PIECE_RATES))
    x = np.rint(resample_poly(x * 2 ** rng.uniform(-1, 1), rate, FS, axis=1, padtype="line") / 5) * 5
    return np.rint(resample_poly(x, FS, rate, axis=1, padtype="line")).clip(-32767, 32767).astype(np.int16)


def bench_duplicates(args):
    """Share of pieces of held-out recordings that are found, with and without the signals of these; strangers that are
    taken for copies; and a search as large as 12 million recordings."""
    corpora, rng = [open_corpus(d) for d in args.data], np.random.default_rng(0)
    held = [c.index["split"] != 0 for c in corpora]
    noisy = open_corpus(args.noise)
    noise = [noisy.read(i).astype(float) for i in np.flatnonzero(noisy.index["split"])]
    known = HeldOut(corpora, held)
    alone = HeldOut([Corpus(None, {}, c.index, None, None, c.fingerprints) for c in corpora], held)
    coarse = HeldOut(corpora, held, searched=np.inf)
    print(f"{len(known.row):,} held-out recordings, {len(known.bits):,} fingerprints\n"
          f"found of {PIECES} pieces, each with another rate of 100 to 1,000 Hz, gain of 0.5 to 2, "
          "5 uV steps (with signals; with long words, as in large corpora; without signals)")
    for seconds, snr_db, kind in itertools.product((5, 10, 30), (np.inf, 12), ("all leads", "one lead", "no name")):
        long = np.flatnonzero(known.index["length"] >= seconds * FS)
        some = []
        for h in rng.choice(long, PIECES):
            c = corpora[known.source[h]]
            ids, x = c.lead_ids(known.row[h]), c.read(known.row[h])
            if kind != "all leads":
                k = rng.integers(len(ids))
                ids, x = ids[k:k + 1] * (kind == "one lead"), x[k:k + 1]
            some.append((ids, piece_of(rng, x, seconds, noise[rng.integers(len(noise))], snr_db)))
        pieces = Pieces(some)
        found = [len(h.search([pieces], [np.ones(PIECES, bool)])[0]) / PIECES for h in (known, coarse, alone)]
        print(f"  {seconds:2} s, {kind:9}, {'clean' if snr_db == np.inf else '12 dB'}: "
              + "  ".join(f"{share:6.1%}" for share in found), flush=True)
    train = [~rows for rows in held]
    for what, h in (("with signals", known), ("without", alone)):
        t = time.process_time()
        wrong = [len(rows) for rows in h.search(corpora, train)]
        print(f"strangers taken for copies, {what}: {sum(wrong)} of {sum(rows.sum() for rows in train):,} recordings "
              f"({sum(rows.sum() for rows in train) * len(h.row):.3g} pairs) in {time.process_time() - t:.1f} s")
    pairs = find_duplicates(corpora, train)
    print(f"second copies among these: {len(pairs)} pairs")
    real = [c.fingerprints for c in corpora if c.index["n_leads"].max() == 12]
    real = np.concatenate(real or [c.fingerprints for c in corpora])["bits"]
    simulate_search(real, rng)
    simulate_duplicates(real, rng)


def drawn(real, rng, n, leads):
    """A corpus of n recordings of 10 s without signals: `real` fingerprints (M, 3), drawn at random, with 3 % of their
    bits changed, so that they are as often alike as real ones; the beats of a recording are independent."""
    prints = np.zeros(n * leads * 8, FINGERPRINT_DTYPE)
    prints["row"], prints["channel"] = np.arange(len(prints)) // (8 * leads), np.arange(len(prints)) % leads
    prints["sample"] = np.arange(len(prints)) // leads % 8 * 210 + rng.integers(0, 100, len(prints))
    prints["bits"] = real[rng.integers(0, len(real), len(prints))]
    for k in range(0, len(prints), 2**20):
        flips = np.packbits(rng.random((len(prints[k:k + 2**20]), 96), np.float32) < 0.03, axis=1).view("<u4")
        prints["bits"][k:k + 2**20] ^= flips
    index = np.zeros(n, INDEX_DTYPE)
    index["length"], index["n_leads"], index["leads"][:, :leads] = 2500, leads, np.arange(1, 1 + leads)
    return Corpus(None, {}, index, None, None, prints)


def simulate_search(real, rng, recordings=12_000_000, held=240_000, share=100):
    """The search with 1 / share of the recordings that are trained on and all that are held out."""
    theirs, ours = drawn(real, rng, held, 12), drawn(real, rng, recordings // share, 2)
    start = time.process_time()
    h = HeldOut([theirs], [np.ones(held, bool)], searched=np.inf)
    built = time.process_time()
    with patch("corpus.SEARCH_MOST", SEARCH_MOST // share):              # as many candidates per block as in the whole
        found = h.search([ours], [np.ones(len(ours.index), bool)])[0]
    searched = time.process_time() - built
    print(f"simulated: {recordings:,} recordings of 2 leads, {held:,} held out with 12: {built - start:.0f} s to sort, "
          f"{share * searched:,.0f} s to search ({searched:.1f} s for 1/{share}), "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB of memory, expected false alarms "
          f"{share * len(found):,}", flush=True)


def simulate_duplicates(real, rng, recordings=12_000_000, share=20):
    """The search for second copies among 1 / share of the recordings, of which 100 are copies. Time and memory grow
    with the number of recordings, false alarms with its square."""
    ours = drawn(real, rng, recordings // share, 2)
    by_row = ours.fingerprints.reshape(-1, 16)
    for name in ("sample", "channel", "bits"):
        by_row[name][100:200] = by_row[name][:100]
    tracemalloc.start()
    start = time.process_time()
    pairs = find_duplicates([ours], [np.ones(len(ours.index), bool)])
    took, memory, right = time.process_time() - start, tracemalloc.get_traced_memory()[1] / 1e9, np.diff(pairs) == 100
    tracemalloc.stop()
    print(f"simulated: second copies, {right.sum()} of 100 found; among {recordings:,} recordings of 2 leads in "
          f"{share * took:,.0f} s, {share * memory:.0f} GB of memory ({took:.1f} s, {memory:.2f} GB for 1/{share}), "
          f"expected false alarms {share ** 2 * (~right).sum():,}", flush=True)


# ---- the probe of PTB-XL --------------------------------------------------------------------------------------------
def simulated_ptbxl(recordings, width, seed=0):
    """probe_ptbxl.Data and features (2, R, 3 * width) of an encoder and its control. The k-th principal component of
    the features has a variance of 1 / k; 71 statements, present in 44 % to .05 % of the recordings, depend on all."""
    rng, sizes = np.random.default_rng(seed), dict(zip(probe_ptbxl.PTBXL_SETS, (71, 44, 23, 5, 19, 12)))
    fold = rng.integers(1, 11, recordings)
    patients = fold * recordings + rng.integers(0, recordings // 12, recordings)
    x = rng.standard_normal((recordings, 3 * width), np.float32) * np.arange(1, 3 * width + 1, dtype=np.float32) ** -0.5
    z = x @ rng.standard_normal((3 * width, 71), np.float32)
    z = 2.5 * z / z.std(axis=0) + rng.logistic(size=z.shape)
    all_71 = z > np.diag(np.quantile(z, 1 - np.geomspace(0.44, 0.0005, 71), axis=0))
    groups = (np.stack([all_71[:, k:44:n].any(axis=1) for k in range(n)], axis=1) for n in (23, 5))
    ys = all_71, all_71[:, :44], *groups, all_71[:, 44:63], all_71[:, 59:]
    sets = {task: (list(map(str, range(n))), y) for (task, n), y in zip(sizes.items(), ys)}
    mixed = [x @ np.linalg.qr(rng.standard_normal((x.shape[1],) * 2, np.float32))[0] for _ in range(2)]
    mixed[1] += rng.standard_normal(x.shape, np.float32) * 0.05          # the control knows less
    return probe_ptbxl.Data(sets, fold, patients, [1], seed), np.stack(mixed)


def bench_probe(args):
    """Time and memory of probe_ptbxl.probe_features (fits, calibration, bootstrap, shares of the labels), and the time
    of fit_logistic next to scikit-learn's solver, which is as close to the optimum only with a small tolerance."""
    data, features = simulated_ptbxl(args.probe, SIZES[args.size]["width"])
    wall = time.perf_counter()
    cpu = clock(lambda: probe_ptbxl.probe_features(features, data), now=time.process_time)
    labels = np.unique(data.y[data.train], axis=1)
    labels = labels[:, both_classes(labels)]
    print(f"{args.probe:,} recordings, {features.shape[2]:,} features, {labels.shape[1]} labels, "
          f"{len(probe_ptbxl.C_GRID)} strengths, 2 networks, {data.counts.shape[0] - 1:,} resamples: "
          f"{time.perf_counter() - wall:.0f} s, {cpu:.0f} s of CPU, "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB of memory", flush=True)
    x, few = StandardScaler().fit_transform(features[0, data.train].astype(float)), labels.T[::labels.shape[1] // 3][:3]
    ours = clock(lambda: fit_logistic(x, labels, probe_ptbxl.C_GRID), now=time.process_time)
    for name, tolerance in (("as it is", 1e-4), ("to 1e-7", 1e-7)):
        model = LogisticRegression(warm_start=True, max_iter=5000, tol=tolerance)
        theirs = clock(lambda: [model.set_params(C=c).fit(x, y) for y in few for c in probe_ptbxl.C_GRID],
                       now=time.process_time) / len(few) * labels.shape[1]
        print(f"the labels of a network, scikit-learn {name} / ours, s of CPU: {theirs:.0f} / {ours:.0f} = "
              f"{theirs / ours:.1f}", flush=True)


# ---- command line ---------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--data", nargs="+", type=Path, metavar="DIR", default=[], help="prepared corpora; needs --noise")
    p.add_argument("--noise", type=Path, metavar="DIR", help="prepared noise corpus; needs --data")
    p.add_argument("--size", choices=SIZES, default="tiny", help="size of the encoder (default: %(default)s)")
    p.add_argument("--batch", type=int, help="recordings per step (default: 64; --peers 32, --loader --data 256)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: cuda if there is one)")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="as in train.py")
    p.add_argument("--peers", action="store_true", help="compare only the step with a plain one")
    p.add_argument("--loader", action="store_true", help="compare only the loader with a plain one")
    p.add_argument("--sizes", action="store_true", help="print only what every size needs")
    p.add_argument("--ranks", type=int, metavar="N", help="measure only sharding, over 1 to N processes")
    p.add_argument("--index", type=int, metavar="N", help="measure only an index of N recordings")
    p.add_argument("--probe", type=int, metavar="N", help="measure only the probe of N recordings as in PTB-XL")
    p.add_argument("--duplicates", action="store_true", help="measure only the search for copies")
    return p.parse_args(argv)


def main(args):
    if bool(args.data) != bool(args.noise):
        raise ValueError("give both --data and --noise, or neither")
    args.batch = args.batch or (32 if args.peers else 256 if args.loader and args.data else 64)
    args.device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    args.precision = precision_of(args.device, args.precision)
    for wanted, function in ((args.sizes, bench_sizes), (args.ranks, bench_ranks), (args.index, bench_index),
                             (args.peers, bench_peers), (args.probe, bench_probe)):
        if wanted:
            return function(args)
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            prepare.main(prepare.parse_args(["synth", f"--raw={folder}/raw", f"--out={folder}/data", "--records=200"]))
            args.data, args.noise = [Path(folder, "data/ptbxl"), Path(folder, "data/mitdb")], Path(folder, "data/nstdb")
        (bench_duplicates if args.duplicates else bench_loader if args.loader else bench)(args)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        sys.exit(f"error: {error}")
