"""Pre-train the ECG encoder with the DINOv3 objective on prepared recordings.

    python train.py                     # needs no data: synthetic recordings, minutes on a laptop
    python train.py --data data/ptbxl data/mitdb --noise data/nstdb --out runs/real
    torchrun --nproc-per-node 8 train.py --data ... --size base
    sbatch run.sbatch                   # on a Slurm cluster: many nodes, and it continues after interruptions

One process per device; --batch is the total batch of all processes. A batch is a pure function of (seed, step), so
--resume continues exactly from the last checkpoint. SIGTERM, SIGUSR1 and Ctrl-C end the run after the current step,
with a checkpoint and exit code 75 (torchrun hides exit codes: there it is 0, and a file `stopped`). Writes into --out:
    run.json        command, arguments, constants, versions, data   log.jsonl     a line per logged step (curves.png)
    checkpoints/    the last ones, each whole or not at all         encoder.pt    the teacher's encoder, for the probes

Shapes: B recordings, V views, L leads, T samples, N patches, K prototypes, D width.
"""
import argparse
import contextlib
import copy
import faulthandler
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from torch.distributed.checkpoint.state_dict import (get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm

import augment
import corpus
import dino
import ecg
import model
import prepare
import probe_mitbih
import probe_ptbxl
from augment import NEAR_OFFSETS, Batches, lead_groups, load_noise
from corpus import SPLITS, Sampler, git, lock_folder, open_corpus
from dino import (STUDENT_TEMPERATURE, build_networks, diagnose, distributed, gather_rows, health, num_ranks, objective,
                  reduce_, update_teacher)
from ecg import LEADS, Recording, atomic_write, save_figure, sha256
from evaluate import plain_auroc, standardized
from model import (PATCH_S, SIZES, Encoder, build_encoder, draw_recording, load_encoder, low_precision, precision_of,
                   save_encoder)

warnings.filterwarnings("ignore", message="torch.distributed is disabled")             # one process is normal

# Gram anchoring (dino.GRAM_WEIGHT), from --gram-from to the end. In DINOv3 it lasts 200,000 steps: the weight rises
# over the first 1,000; the anchor is the teacher of the first step, and is replaced by the current teacher after every
# 10,000 steps, three times. Here the shares are the same. DINOv3's anchor sees twice the resolution; this one does not.
GRAM_RAMP_SHARE = 0.005                          # of the steps from --gram-from on
GRAM_REFRESH_SHARE, GRAM_REFRESHES = 0.05, 3
# The recipe, a column per size; --batch, --steps, --lr, --prototypes (of both heads) and --gram-from override it. The
# column of tiny was found here (LOG.md). The others follow DINOv3 (ViT-L up to huge, then 7B) and were never run at
# length. Of DINOv3's 7B they lack a learning rate that stays constant and the smaller head of patches. The temperatures
# are tiny's in all: DINOv3's .04 to .07 gave small and base flat targets and an alarm (LOG.md), because at the start
# one ECG is like another. What depends on the batch:
#   prototypes        of the CLS head: a power of two, at most 16 for each of the 2 rows of a recording, or the targets
#                     stay flat
#   patch_prototypes  a power of two (but for 7B), at most half of the rows, of which a recording has about 200
#   temperature       Sinkhorn leaves an entropy of ln(prototypes / rows) or more to the targets; the fewer prototypes
#                     a row has, the more of their entropy has to come from the temperature
#   lr                DINOv3's is 4e-3 * (batch / 1024) ** 0.5, with a decay from layer to layer that is not here: small
#                     to huge have a quarter of it, or less; 7b has DINOv3's own
RECIPES = {
    #                     tiny            small         base          large         huge          7b
    "batch":             (32,             256,          1024,         2048,         2048,         4096),
    "steps":             (4200,           50_000,       100_000,      125_000,      200_000,      1_200_000),
    "lr":                (2e-3,           5e-4,         1e-3,         1e-3,         1e-3,         4e-4),
    "prototypes":        (512,            8192,         32_768,       65_536,       65_536,       131_072),
    "patch_prototypes":  (512,            8192,         32_768,       65_536,       65_536,       98_304),
    "head_hidden":       (512,            2048,         2048,         2048,         2048,         8192),
    "head_bottleneck":   (128,            256,          256,          256,          256,          512),
    # Start and end: of temperatures along a line, over TEMPERATURE_SHARE of the steps; of the others along a cosine.
    "temperature":       ((.015, .015),   (.015, .015), (.015, .015), (.015, .015), (.015, .015), (.015, .015)),
    "patch_temperature": ((.02, .04),     (.02, .04),   (.02, .04),   (.02, .04),   (.02, .04),   (.02, .04)),
    "momentum":          ((.98, .998),    (.99, 1.0),   (.992, 1.0),  (.992, 1.0),  (.992, 1.0),  (.994, .994)),
    "weight_decay":      ((.04, .04),     (.04, .2),    (.04, .4),    (.04, .4),    (.04, .4),    (.04, .04)),
    "adam_beta2":        (.99,            .999,         .999,         .999,         .999,         .99),
    "clip_norm":         (3.0,            3.0,          3.0,          3.0,          3.0,          30.0),
    # Weights of the terms that DINOv3 does not have (dino.py); 0 where they were not shown to help.
    "contrast":          (0.5,            0.0,          0.0,          0.0,          0.0,          0.0),
    "leads":             (0.5,            0.5,          0.5,          0.5,          0.5,          0.5),
    "wave":              (1.0,            0.0,          0.0,          0.0,          0.0,          0.0),
    "context":           (2.0,            0.0,          0.0,          0.0,          0.0,          0.0),
    "gram_from":         (-1,             -1,           -1,           -1,           -1,           1_000_000),
}

# Optimisation, at any size.
WARMUP_SHARE = 0.1
TEMPERATURE_SHARE = 0.3
FINAL_LR_SHARE = 0.01
ADAM_BETA1 = 0.9
FREEZE_PROTOTYPES_SHARE = 0.01                  # of the steps, with learning rate 0 for the prototypes

# Running: these do not change what is learned.
DEMO_STEPS, DEMO_LEADS, DEMO_BEATS = 50, ("I", "II", "V2"), "60"
KEEP_LAST = 2                    # checkpoints, in addition to those of --keep-every
# Without --checkpoint-every: seconds between checkpoints, or more, so that a day does not write more than so many GB.
CHECKPOINT_S, CHECKPOINT_GB_PER_DAY = 300, 5000
HANG_S = 900                     # s; a step, a checkpoint or a collective that takes longer ends the job
MAX_SKIPPED = 5                  # this many steps in a row whose loss or gradient is not finite end the run
LOCK_S = 120                     # s that a run waits for another run in its folder to end
EXIT_STOPPED = 75                # "try again later" in sysexits.h
PROBE_RECORDINGS = 256           # of the online probe, per split
PROBE_AT_LEAST = 20              # recordings per split that the online probe needs
PROBE_LEADS = 12                 # leads of its recordings
PROBE_POSITIVES = 5              # positives and negatives per split that a label needs
PROBE_BATCH = 64                 # windows in a forward pass
# The best one is taken: what training teaches lies along directions of little variance, which a small C hides.
PROBE_C = (0.01, 0.1, 1.0)
# Constants of all files that a resumed run may change.
RUNNING = {"DEMO_STEPS", "DEMO_LEADS", "DEMO_BEATS", "KEEP_LAST", "CHECKPOINT_S", "CHECKPOINT_GB_PER_DAY", "HANG_S",
           "MAX_SKIPPED", "LOCK_S", "EXIT_STOPPED", "OUT_OF_MEMORY", "OPEN_SHARDS", "MAX_EMBED_TOKENS", "FORMAT",
           "FORMAT_VERSION", "GIVE", "SIZES", "WINDOW_PATCHES", "FINGERPRINTS_FILE", "PREPROCESSING",
           "MAX_BATCHED_TOKENS", "MAX_SCALED_WEIGHT", "ONE_BY_ONE_WIDTH", "RECIPES", "READABLE_VERSIONS",
           "UV_PER_MV", "NOT_READ", "BEAT_WINDOW_S", "BEAT_BATCH", "AROUND_S", "SAVE_S", "INTENDED_USE",
           "PROBE_RECORDINGS", "PROBE_AT_LEAST", "PROBE_LEADS", "PROBE_POSITIVES", "PROBE_BATCH", "PROBE_C",
           "COLLAPSED_RANK", "SHARED_AT_LEAST", "SAME_FEATURES", "COLLAPSED_ENTROPY", "UNIFORM_ENTROPY",
           "ONE_HOT_ENTROPY"}


# ---- schedules: functions of the step -------------------------------------------------------------------------------
def cosine(start, end, share):
    """From start to end along half a cosine, share in [0, 1] of the way."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, share))))


def recipe(size):
    """The column of a size in RECIPES: {name: value}."""
    return {name: row[list(SIZES).index(size)] for name, row in RECIPES.items()}


def schedules(step, steps, recipe, gram_from=-1):
    """All values that depend on the step. recipe: a column of RECIPES, with the peak learning rate of the run."""
    warmup, lr = max(1, round(WARMUP_SHARE * steps)), recipe["lr"]
    lr = (lr * (step + 1) / warmup if step < warmup else
          cosine(lr, FINAL_LR_SHARE * lr, (step - warmup) / max(1, steps - warmup)))
    warm = min(1.0, step / max(1, TEMPERATURE_SHARE * steps))
    temperature, patch_temperature = ((1 - warm) * start + warm * end for start, end in (
        recipe["temperature"], recipe["patch_temperature"]))
    return dict(lr=lr, prototype_lr=0.0 if step < FREEZE_PROTOTYPES_SHARE * steps else lr,
                weight_decay=cosine(*recipe["weight_decay"], step / steps), temperature=temperature,
                momentum=cosine(*recipe["momentum"], step / steps), patch_temperature=patch_temperature,
                **gram_schedule(step, steps, gram_from))


def gram_schedule(step, steps, gram_from):
    """Weight of Gram anchoring at this step, and whether the current teacher becomes the anchor before the step."""
    since, stage = step - gram_from, steps - gram_from
    if gram_from < 0 or since < 0:
        return dict(gram_weight=0.0, gram_refresh=False)
    every = max(1, round(GRAM_REFRESH_SHARE * stage))
    return dict(gram_weight=cosine(0.0, dino.GRAM_WEIGHT, since / max(1, round(GRAM_RAMP_SHARE * stage))),
                gram_refresh=since % every == 0 and since // every <= GRAM_REFRESHES)


def build_optimizer(student, recipe):
    """AdamW; no decay for vectors and learned tokens; the prototypes in a group of their own, to freeze them by
    learning rate."""
    decayed, plain, prototypes = [], [], []
    for name, p in student.named_parameters():
        tokens = p.ndim < 2 or any(word in name for word in ("token", "lead_embedding", "offset_vectors"))
        (prototypes if "prototypes" in name else plain if tokens else decayed).append(p)
    groups = [dict(params=decayed, decay=True), dict(params=plain, decay=False),
              dict(params=prototypes, decay=True, prototypes=True)]
    return torch.optim.AdamW(groups, betas=(ADAM_BETA1, recipe["adam_beta2"]), fused=True)


def set_schedules(optimizer, s):
    for group in optimizer.param_groups:
        group["lr"] = s["prototype_lr"] if group.get("prototypes") else s["lr"]
        group["weight_decay"] = s["weight_decay"] if group["decay"] else 0.0


# ---- processes: how they start, stop, and are watched ---------------------------------------------------------------
def setup_processes(device_flag):
    """(rank, world size, device), from torchrun's environment variables. A process group that cannot start is an error;
    the run never continues as one process instead."""
    cuda = torch.cuda.is_available() if device_flag == "auto" else device_flag.startswith("cuda")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
        if "SLURM_STEP_ID" in os.environ and tasks != "1":
            raise ValueError(
                f"srun started {tasks} tasks of train.py, and each would train alone into the same folder; start one "
                "torchrun per machine, which starts the processes: `sbatch run.sbatch`, or srun --ntasks-per-node=1 "
                "torchrun --nnodes $SLURM_NNODES --nproc-per-node GPUS ... train.py ... (the line is in run.sbatch)")
        return 0, 1, device
    # Gloo carries host tensors, with GPUs too: the request to stop, and checkpoints that are written during training.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=HANG_S + 60))
    return dist.get_rank(), dist.get_world_size(), device


def from_rank_0(value=None):
    """The same Python object on all ranks, which wait for rank 0 here."""
    held = [value]
    if distributed():
        dist.broadcast_object_list(held)
    return held[0]


class StopRequest:
    """SIGTERM, SIGUSR1 (from Slurm, some minutes before the time limit) or Ctrl-C on any rank ends the run on all ranks
    after the same step. A second Ctrl-C ends it at once."""

    def __enter__(self):
        self.group, self.received = None, 0
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def connect(self):
        """Collective; signals that came before are not lost."""
        self.group = dist.new_group(backend="gloo") if distributed() else None

    def ask(self, save):
        """Start asking all ranks whether one has received a signal or wants a checkpoint."""
        self.flags = torch.tensor([self.received, int(save)])
        self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, self.group, async_op=True) if self.group else None

    def answer(self):
        """(name of the signal that a rank has received, or None; whether to write a checkpoint): equal on all ranks."""
        if self.work is not None:
            self.work.wait()
        number, save = self.flags.tolist()
        return signal.Signals(number).name if number else None, bool(save)


class Watchdog:
    """Ends the process if one activity lasts longer than HANG_S, and prints the stack of every thread. Of several
    ranks, the one that is not in a collective is the one that hangs."""

    def __init__(self, rank):
        self.rank = rank

    def __enter__(self):
        self.pat("the start")
        threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.since = math.inf
        faulthandler.cancel_dump_traceback_later()

    def pat(self, what):
        self.what, self.since = what, time.monotonic()
        faulthandler.dump_traceback_later(HANG_S + 30, exit=True)      # if even the thread below cannot run

    def watch(self):
        while time.monotonic() - self.since < HANG_S:
            time.sleep(min(1.0, HANG_S / 4))
            if self.since == math.inf:
                return
        print(f"error: rank {self.rank} on {socket.gethostname()} has been in {self.what} for {HANG_S} s; it ends here "
              "(HANG_S in train.py is the limit). Its threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        os._exit(1)


# ---- networks: sharding, first weights, gradients -------------------------------------------------------------------
def shard(part, mesh, low_precision):
    """FSDP2 of an encoder or a head. Wrapper order: checkpointing, compile, shard. The roots reshard after forward too,
    otherwise the EMA would get unsharded teacher parameters."""
    # Inputs keep their dtype: in bf16 a signal would lose its small waves before the encoder subtracts the baseline.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if low_precision else None, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for module in (*getattr(part, "blocks", ()), part):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if hasattr(part, "encode"):
        part.sharded = True
        register_fsdp_forward_method(part, "encode")


def local(tensor):
    """What this rank holds of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def materialize(student, teacher, gram_teacher, device, watchdog):
    """Allocate this rank's share of networks on the meta device, and fill it with the first weights: those that one
    process would draw for the same seed. Each parameter is drawn whole on the host, one at a time, and this rank keeps
    its part of the rows, so the host never holds a whole network."""
    student.to_empty(device=device)
    for parameter in student.parameters():
        local(parameter).fill_(math.nan)                               # a parameter that is forgotten shows
    for part in student.values():
        for parameter, value in part.first_weights():
            watchdog.pat("drawing the first weights")                  # 7b has eight billion of them
            if hasattr(parameter, "to_local"):
                shares = value.chunk(parameter.device_mesh.size())
                rank = parameter.device_mesh.get_local_rank()
                value = shares[rank] if rank < len(shares) else value[:0]
            local(parameter).copy_(value)
    for network, original in ((teacher, student), (gram_teacher, student["encoder"])):
        if network is not None:
            network.to_empty(device=device)
            for copied, parameter in zip(network.parameters(), original.parameters()):
                local(copied).copy_(local(parameter))


def average_gradients(student):
    """Average the gradients over the ranks, in one sum, for a student that every rank holds whole. (FSDP does it for a
    sharded one.)"""
    gradients = [p.grad for p in student.parameters()]
    everyone = reduce_(torch.cat([g.flatten() for g in gradients])) / num_ranks()
    torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in
                                     zip(everyone.split([g.numel() for g in gradients]), gradients)])


def skip_if_not_finite(optimizer, loss, norms):
    """Make the next step of the optimiser do nothing, on all ranks, if the loss or a gradient is not finite. Returns a
    tensor, 1.0 in this case. Fused AdamW reads `found_inf` on the device, as with a GradScaler: the host does not wait.
    """
    bad = reduce_((~loss.detach().isfinite()).float()) + sum((~norm.isfinite()).float() for norm in norms)
    optimizer.found_inf = (bad > 0).float()
    return optimizer.found_inf


# ---- checkpoints ----------------------------------------------------------------------------------------------------
def training_state(student, teacher, gram_teacher, optimizer):
    """Everything that a checkpoint holds, except the step; the rest of a run is a function of the step."""
    networks = dict(student=student, teacher=teacher) | (dict(gram_teacher=gram_teacher) if gram_teacher else {})
    return {name: get_model_state_dict(network) for name, network in networks.items()} | dict(
        optimizer=get_optimizer_state_dict(student, optimizer))


def seconds_between_checkpoints(*networks):
    """CHECKPOINT_S, or more if a day would then write more than CHECKPOINT_GB_PER_DAY. The state of all ranks, in fp32,
    is weights and two moments of the student (the first network), and weights of the others."""
    numbers = [sum(p.numel() for p in network.parameters()) for network in networks if network is not None]
    return max(CHECKPOINT_S, 4 * (2 * numbers[0] + sum(numbers)) / (CHECKPOINT_GB_PER_DAY * 1e9) * 86400)


class Checkpoints:
    """checkpoints/step_0001234 of a run, written under another name and then renamed, while training goes on.

    Each holds weights and moments in the shards of its writers (torch.distributed.checkpoint; any number of ranks can
    read it) and meta.json: step, flags, SHA-256 of every file. The last KEEP_LAST and multiples of keep_every stay.
    """

    def __init__(self, out, keep_every, rank, world_size):
        self.out, self.folder, self.keep_every = out, out / "checkpoints", keep_every
        self.rank, self.world_size = rank, world_size
        self.group = dist.new_group(backend="gloo") if distributed() else None
        self.thread, self.pending, self.last_s = ThreadPoolExecutor(1), None, time.monotonic()

    def claim(self, resume):
        """Lock the folder while this process lives; ValueError if it holds a run and resume is False. Collective."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.out, LOCK_S)
        if from_rank_0(not resume and (bool(checkpoints(self.folder)) or (self.out / "log.jsonl").exists())):
            raise ValueError(f"{self.out} already holds a run; continue it with --resume, or choose another --out")

    def clean(self):
        """Delete the files that a killed run left half written or half deleted."""
        for path in [*self.folder.glob("step_*.tmp"), *self.folder.glob("step_*.old"), *self.out.glob("*.tmp")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def save(self, step, state, about, config):
        """Copy the state to the host; a thread writes it, and encoder.pt from it. Collective."""
        self.wait()
        self.last_s = time.monotonic()
        part = self.folder / f"step_{step:07d}.tmp"
        self.writing = f"the checkpoint of step {step}"
        written = dcp.async_save(state, checkpoint_id=part, process_group=self.group)
        self.pending = self.thread.submit(self.finish, written, part, dict(about, step=step), config)

    def finish(self, written, part, meta, config):
        try:
            written.result()
            mine = {path.name: sha256(path) for path in part.glob(f"__{self.rank}_*")}
            everyone = [mine] * self.world_size
            if self.group:
                dist.all_gather_object(everyone, mine, self.group)
            if self.rank == 0:
                meta["sha256"] = {".metadata": sha256(part / ".metadata")}
                for sums in everyone:
                    meta["sha256"] |= sums
                atomic_write(part / "meta.json", json.dumps(meta, indent=1, default=str))
                part.rename(part.with_suffix(""))
                self.writing = f"encoder.pt of step {meta['step']}"
                self.forget_old()
                export_encoder(part.with_suffix(""), self.out / "encoder.pt", config, meta)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise

    def forget_old(self):
        for old in checkpoints(self.folder)[:-KEEP_LAST]:
            if not (self.keep_every and int(old.name[5:]) % self.keep_every == 0):
                shutil.rmtree(old.rename(old.with_suffix(".old")))     # renamed first: no half-deleted checkpoint

    def wait(self):
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        # The disk, a library or another rank may raise anything, and CheckpointException is not an Exception.
        except (Exception, dcp.CheckpointException) as error:
            kept = checkpoints(self.folder)
            raise ValueError(
                f"{self.writing} could not be written: {innermost_cause(error)}; "
                f"{shutil.disk_usage(self.folder).free / 1e6:,.0f} MB are free at {self.folder} (a quota may leave "
                f"less), and the last good checkpoint is {kept[-1].name if kept else 'none'}; make room, then --resume"
            ) from error

    def newest(self):
        """The newest whole checkpoint and its meta.json, or (None, None); damaged ones are set aside. Collective."""
        aside = []
        while True:
            found = checkpoints(self.folder) if self.rank == 0 else None
            path, meta = from_rank_0((found[-1], read_meta(found[-1])) if found else (None, None))
            if path is None and aside:
                raise ValueError(f"no checkpoint in {self.folder} is whole, or of this version of the program; the "
                                 f"damaged ones are kept as {', '.join(aside)}: restore one, or choose another --out")
            if path is None:
                return None, None
            files = sorted(meta["sha256"].items()) if meta else []
            mine = [(path / name, digest) for name, digest in files[self.rank::self.world_size]]
            damaged = not meta or any(not file.is_file() or sha256(file) != digest for file, digest in mine)
            damaged = reduce_(torch.tensor([float(damaged)]))
            if not damaged:
                return path, meta
            aside.append(f"{path.name}.damaged")
            if self.rank == 0:
                shutil.rmtree(self.folder / aside[-1], ignore_errors=True)
                path.rename(self.folder / aside[-1])
                print(f"warning: {path} is damaged (its checksums differ); it is now {aside[-1]}, and the one before "
                      "is used", file=sys.stderr)
            from_rank_0()


def checkpoints(folder):
    """Whole checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.suffix == "" and (p / "meta.json").is_file())


def read_meta(path):
    """meta.json of a checkpoint, or None if it cannot be read."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        complete = {"same", "adjustable", "named_leads", "sha256"} <= set(meta)
        return meta if complete and path.name == f"step_{meta['step']:07d}" else None
    except (ValueError, TypeError, KeyError):
        return None


def innermost_cause(error):
    """The cause of an error in one line: a full disk if it is named, otherwise the last line of the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    full = next((line for line in lines if "No space left" in line), None)
    return full or (lines[-1] if lines else type(error).__name__)


def load_checkpoint(path, student, teacher, gram_teacher, optimizer):
    state = training_state(student, teacher, gram_teacher, optimizer)
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    for name, network in dict(student=student, teacher=teacher, gram_teacher=gram_teacher).items():
        if network is not None:
            set_model_state_dict(network, state[name])
    set_optimizer_state_dict(student, optimizer, state["optimizer"])


def export_encoder(checkpoint, path, config, meta):
    """encoder.pt with the teacher's weights, read from a finished checkpoint. So no rank has to wait, and it is known
    that the checkpoint can be read. A lead whose name was never shown gets the vector of unknown leads."""
    with torch.device("meta"):
        encoder = Encoder(**config)
    encoder.to_empty(device="cpu")
    state = dict(teacher={f"encoder.{name}": weight for name, weight in encoder.state_dict().items()})
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)                                   # into these weights
    vectors = encoder.lead_embedding.weight.data
    vectors[[name not in meta["named_leads"] for name in LEADS]] = vectors[0].clone()
    atomic_write(path, lambda file: save_encoder(encoder, file, **{k: meta[k] for k in ("command", "commit", "step")}))


# ---- what a run is, and whether a resumed one is the same -----------------------------------------------------------
def science_constants():
    """The constants that decide what is learned, from all files that training uses."""
    modules = {"train": globals(), **{m.__name__: vars(m) for m in (augment, corpus, dino, model)}}
    return {f"{file}.{name}": json.loads(json.dumps(value)) for file, names in modules.items()
            for name, value in names.items()
            if name.isupper() and name not in RUNNING and isinstance(value, (int, float, str, tuple, dict))}


def identity(args, corpora, noise, excluded):
    """What decides the losses, and must be equal in a resumed run. A corpus may have moved: only its content counts."""
    def named(corpora, weights):
        return [f"{c.dir.resolve().name}:{weight:g} with content {c.content()}" for c, weight in zip(corpora, weights)]
    column = {f"train.RECIPES.{k}": v for k, v in json.loads(json.dumps(args.recipe)).items()
              if k not in ("batch", "steps", "lr", "prototypes", "gram_from")}
    return {k: getattr(args, k) for k in ("size", "batch", "prototypes", "seed", "gram_from")} | column | dict(
        data=named(corpora, [weight for _, weight in args.data]), noise=named(noise, [1]),
        exclude=named(excluded, [1] * len(excluded)), **science_constants())


def check_resume(meta, same, args):
    """ValueError if this run differs from the run that wrote the checkpoint."""
    def nameless(key, value):
        return [text.rsplit(":", 1)[1] for text in value or []] if key in ("data", "noise", "exclude") else value
    def shown(value):
        return " ".join(map(str, value)) or "nothing" if isinstance(value, list) else value
    before = meta["same"]
    differ = [f"{k if '.' in k else '--' + k.replace('_', '-')} {shown(before.get(k))} (now {shown(same.get(k))})"
              for k in before | same if nameless(k, before.get(k)) != nameless(k, same.get(k))
              and k.rpartition(".")[2] not in RUNNING]                  # an earlier version may have kept more
    if differ:
        raise ValueError(f"{args.out} was started with {', '.join(differ)}; resume with the same flags, data and "
                         "constants, or choose another --out")
    least = max(meta["step"], args.gram_from + 1)
    if args.steps < least:
        anchors = f" and anchors from step {args.gram_from} on" if args.gram_from >= args.steps else ""
        raise ValueError(f"{args.out} has already done {meta['step']} steps{anchors}, --steps is {args.steps}; give "
                         f"--steps {least} or more, or choose another --out")


def settle_flags(args, meta, device, rank):
    """Set learning rate, number of steps and precision: as given, otherwise as in the checkpoint of a resumed run,
    otherwise those of the recipe. A resumed run prints what it changes."""
    settled = dict(lr=args.recipe["lr"], steps=args.recipe["steps"], precision=precision_of(device))
    before = meta["adjustable"] if meta else settled
    for name in settled:
        given = getattr(args, name)
        if given in (None, "auto"):
            setattr(args, name, before[name])
        elif meta and given != before[name] and rank == 0:
            print(f"--{name} is {given} from step {meta['step']} on; until then it was {before[name]}")
    if args.gram_from is None:
        args.gram_from = args.recipe["gram_from"] if args.recipe["gram_from"] < args.steps else -1
        if meta and args.recipe["gram_from"] >= 0:                     # decided at the start, whatever --steps is now
            args.gram_from = meta["same"].get("gram_from", args.gram_from)
    args.recipe |= dict(lr=args.lr, steps=args.steps, gram_from=args.gram_from)
    if meta is None and args.gram_from >= args.steps:
        raise ValueError(f"--gram-from {args.gram_from} is beyond the last of --steps {args.steps}: nothing would be "
                         f"anchored; give --gram-from {args.steps // 2}, for example, or leave it out")


def run_about(args, world_size, device, sampler, student, same):
    """What this run is, for run.json and for the screen."""
    return dict(command=" ".join(sys.argv), same=same,
                adjustable={k: getattr(args, k) for k in ("lr", "steps", "precision")}, args=vars(args),
                commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain")), torch=torch.__version__,
                world_size=world_size, device=str(device), device_name=(
                    torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"),
                parameters={k: sum(p.numel() for p in part.parameters()) for k, part in student.items()},
                groups=[dict(leads=g["shape"].leads, recordings_per_batch=g["size"],
                             patients=int(g["patients"].sum())) for g in sampler.groups],
                skipped=sampler.skipped, named_leads=sampler.named_leads(),
                data=[dict(dir=str(c.dir), source=c.manifest["source"], sha256=c.manifest["sha256"])
                      for c in sampler.corpora])


# ---- a probe during the run ------------------------------------------------------------------------------------------
class OnlineProbe:
    """AUROC of a logistic regression on the teacher's features, on a few labelled recordings of the data.

    Fitted on split train, scored on split val (PTB-XL fold 9), which is never pre-trained on: a sign, not a result.
    corpora: list of Corpus; window: samples at FS of each recording. `usable` is False if there are too few labels.
    """

    def __init__(self, corpora, window):
        self.sets, self.scored = [], []
        for split in ("train", "val"):
            found = [(c.read(i, 0, window), c.lead_ids(i), c.index["label"][i])
                     for c in corpora for i in labelled_rows(c.index, split, window)]
            found = [row for row in found if not (row[0] == ecg.MISSING).any()]
            if len(found) >= PROBE_AT_LEAST:
                windows, leads, labels = (np.stack(x) for x in zip(*found))
                labels = np.unpackbits(labels[:, None], axis=1, bitorder="little").astype(bool)
                self.sets.append((torch.from_numpy(windows), torch.from_numpy(leads.astype(np.int64)), labels))
        if len(self.sets) == 2:
            rarest = [np.minimum(y.sum(axis=0), (~y).sum(axis=0)) for _, _, y in self.sets]
            self.scored = np.flatnonzero(np.minimum(*rarest) >= PROBE_POSITIVES)
        self.usable = len(self.scored) > 0

    @torch.no_grad()
    def score(self, encoder, device):
        """Macro AUROC over the superclasses that both splits have, at the best of PROBE_C."""
        features, scores = [], []
        for windows, leads, _ in self.sets:
            parts = zip(windows.split(PROBE_BATCH), leads.split(PROBE_BATCH))
            found = [encoder(w.to(device).float() / ecg.UV_PER_MV, ids.to(device)).global_feature() for w, ids in parts]
            features.append(torch.cat(found).cpu().numpy())
        x, x_new = standardized(*features)
        y, y_new = (labels[:, self.scored] for _, _, labels in self.sets)
        for c in PROBE_C:
            model = LogisticRegression(C=c, max_iter=200)
            logits = np.stack([model.fit(x, label).decision_function(x_new) for label in y.T], axis=1)
            scores.append(plain_auroc(y_new, logits).mean())
        return float(max(scores))


def labelled_rows(index, split, window):
    """At most PROBE_RECORDINGS rows of a split of an index: with a label, PROBE_LEADS leads and `window` samples."""
    usable = (index["label"] > 0) & (index["n_leads"] == PROBE_LEADS) & (index["length"] >= window)
    return np.flatnonzero(usable & (index["split"] == SPLITS.index(split)))[:PROBE_RECORDINGS]


# ---- the run --------------------------------------------------------------------------------------------------------
@torch.no_grad()
def signs_of_health(groups, parts, target_cls, logits):
    """The parts of the loss and dino.health, over the recordings of all ranks: {name: 0-d tensor}."""
    first_view = [g["views"][0][3][:g["recordings"]] for g in groups]
    lead_sets = torch.cat([F.one_hot(ids, len(LEADS)).sum(1) for ids in first_view])
    mean_prediction = reduce_((logits.float() / STUDENT_TEMPERATURE).softmax(-1).mean(0)) / num_ranks()
    everyone = reduce_(torch.stack([value.detach().float() for value in parts.values()])) / num_ranks()
    return dict(zip(parts, everyone)) | health(gather_rows(target_cls[0].float())[0], gather_rows(lead_sets)[0],
                                               mean_prediction)


def networks_of(encoder, recipe):
    """Student and teacher with the heads of a recipe."""
    return build_networks(encoder, recipe["head_hidden"], recipe["head_bottleneck"], recipe["prototypes"],
                          recipe["patch_prototypes"], NEAR_OFFSETS if recipe["wave"] or recipe["context"] else 0)


def build(args, mesh, device, watchdog):
    """Student, teacher and Gram teacher (None if --gram-from is -1). They get memory in materialize(), at the end."""
    with torch.device("meta"):
        encoder = build_encoder(args.size, args.seed,
                                window_patches={g.leads: round(g.window_s / PATCH_S) for g in lead_groups()})
        student, teacher = networks_of(encoder, args.recipe)
        gram_teacher = copy.deepcopy(teacher["encoder"]) if args.gram_from >= 0 else None
    for block in encoder.blocks:
        block.recompute = args.checkpoint_activations
    for block in (*encoder.blocks, *teacher["encoder"].blocks) if args.compile else ():
        block.forward = torch.compile(block.forward, dynamic=True)
    for part in (*student.values(), *teacher.values(), gram_teacher) if mesh is not None else ():
        if part is not None:
            shard(part, mesh, args.precision == "bf16")
    materialize(student, teacher, gram_teacher, device, watchdog)
    return student, teacher, gram_teacher


def train(args, rank, world_size, device, stop, watchdog):
    """Pre-train into args.out. Returns the name of the signal that ended it before its last step, or None."""
    corpora, excluded = [open_corpus(dir) for dir, _ in args.data], [open_corpus(dir) for dir in args.exclude]
    noises = [open_corpus(args.noise)] if args.noise else []
    out, start = args.out, 0
    saved = Checkpoints(out, args.keep_every, rank, world_size)
    saved.claim(args.resume)
    watchdog.pat("reading the checkpoint")
    path, meta = saved.newest()
    settle_flags(args, meta, device, rank)
    same = identity(args, corpora, noises, excluded)
    if path is not None:
        check_resume(meta, same, args)
        start = meta["step"]
    watchdog.pat("the start")
    sampler = Sampler(corpora, args.batch, args.seed, lead_groups(), [weight for _, weight in args.data],
                      excluded, world_size)
    noise = load_noise(noises[0]).to(device) if noises else None
    sharded = world_size > 1 and args.shard == "full"
    student, teacher, gram_teacher = build(args, init_device_mesh(device.type, (world_size,)) if sharded else None,
                                           device, watchdog)
    optimizer = build_optimizer(student, args.recipe)
    about = run_about(args, world_size, device, sampler, student, same)
    encoder = teacher["encoder"]
    if path is not None:
        watchdog.pat("loading the checkpoint")
        load_checkpoint(path, student, teacher, gram_teacher, optimizer)
    if rank == 0:
        saved.clean()
        exported = out / "encoder.pt"
        if path is not None and (not exported.exists() or                                          # killed in between
                                 exported.stat().st_mtime < (path / "meta.json").stat().st_mtime):
            export_encoder(path, exported, encoder.config, meta)
        (out / "stopped").unlink(missing_ok=True)
        trim_log(out / "log.jsonl", start)
        atomic_write(out / "run.json", json.dumps(about, indent=1, default=str))
        atomic_write(out / "left_out.csv", "".join(",".join(row) + "\n" for row in sampler.left_out))
        print_header(about, args, start)
    from_rank_0()
    probe = OnlineProbe(corpora, encoder.window_length(12) * encoder.patch_samples)
    autocast = low_precision(device, "fp32" if sharded else args.precision)                # sharded weights are bf16
    between_s = seconds_between_checkpoints(student, teacher, gram_teacher)

    log = open(out / "log.jsonl", "a") if rank == 0 else None
    skipped, in_a_row, told, waited_s = {}, 0, set(), 0.0
    batches = Batches(sampler, rank, world_size, noise, encoder.patch_samples, device)
    batches.start(start)
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, disable=None if rank == 0 else True,
                    unit="step", dynamic_ncols=True)
    began = time.perf_counter()
    for step in progress:
        watchdog.pat(f"step {step}")
        stop.ask(save=not args.checkpoint_every and time.monotonic() - saved.last_s >= between_s)
        s = schedules(step, args.steps, args.recipe, args.gram_from)
        set_schedules(optimizer, s)
        tick = time.perf_counter()
        groups = batches.take()
        waited_s += time.perf_counter() - tick
        if step + 1 < args.steps:
            batches.start(step + 1)
        if s["gram_refresh"]:
            gram_teacher.load_state_dict(encoder.state_dict())
        with autocast:
            loss, parts, cls, logits = objective(student, teacher, gram_teacher if step >= args.gram_from else None,
                                                 groups, s["temperature"], s["patch_temperature"],
                                                 args.recipe | dict(gram=s["gram_weight"]))
        loss.backward()
        if world_size > 1 and not sharded:
            average_gradients(student)
        norms = {f"grad_{name}": torch.nn.utils.clip_grad_norm_(part.parameters(), args.recipe["clip_norm"]).detach()
                 for name, part in student.items()}
        norms = {name: norm.full_tensor() if sharded else norm for name, norm in norms.items()}
        skipped[step] = skip_if_not_finite(optimizer, loss, norms.values())
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(teacher, student, s["momentum"])

        stopped_by, due = stop.answer()
        last = step + 1 == args.steps
        save = last or stopped_by or due or bool(args.checkpoint_every) and (step + 1) % args.checkpoint_every == 0
        show = last or step % args.log_every == 0
        if show or save:
            for at, bad in zip(skipped, torch.stack(list(skipped.values())).tolist()):
                in_a_row = in_a_row + 1 if bad else 0
                if bad and rank == 0:
                    write_row(log, step=at, skipped="loss or gradient not finite", recordings=sampler.name(at))
                    progress.write(f"step {at} was skipped: its loss or gradient is not finite (see log.jsonl)")
                if in_a_row == MAX_SKIPPED:
                    saved.wait()
                    raise ValueError(f"{in_a_row} steps in a row, up to step {at}, had a loss or gradient that is not "
                                     "finite, and were skipped; the weights are good: --resume with a smaller --lr "
                                     f"(now {args.lr}) or --precision fp32, and look at the recordings in log.jsonl")
            skipped.clear()
        if show:
            values = signs_of_health(groups, dict(loss=loss, **parts), cls, logits.detach()) | norms
            row = dict(step=step, **dict(zip(values, torch.stack(list(values.values())).tolist())),
                       ln_k=math.log(args.prototypes), ln_patch_k=math.log(args.recipe["patch_prototypes"]), **s,
                       waited_s=round(waited_s, 3), seconds=round(time.perf_counter() - began, 3))
            if rank == 0:
                write_row(log, **row)
                progress.set_postfix_str(f"loss {row['loss']:.3f} dino {row['dino_local']:.3f} "
                                         f"ibot {row['ibot']:.3f} targets {row['target_entropy']:.2f}"
                                         f" of {row['ln_k']:.2f} rank {row['cls_rank']:.1f}")
                for kind, sentence in diagnose(row, warm=step > WARMUP_SHARE * args.steps).items():
                    if kind not in told:
                        progress.write(f"warning, step {step}: {sentence}")
                        write_row(log, step=step, warning=kind, sentence=sentence)
                        told.add(kind)
        if probe.usable and args.probe_every and (step == 0 or last or (step + 1) % args.probe_every == 0):
            watchdog.pat(f"the online probe of step {step + 1}")
            with autocast:
                auroc = probe.score(encoder, device)
            if rank == 0:
                write_row(log, step=step, online_auroc=auroc)
                progress.write(f"step {step + 1}: online probe AUROC {auroc:.3f}")
        if saved.pending is not None and saved.pending.done():
            saved.wait()                                               # ValueError if it could not be written
        if save:
            if rank == 0:
                os.fsync(log.fileno())                                 # the log must not be behind the checkpoint
            watchdog.pat(f"the checkpoint of step {step + 1}")
            saved.save(step + 1, training_state(student, teacher, gram_teacher, optimizer), about, encoder.config)
        if stopped_by and not last:
            break
    else:
        stopped_by = None
    progress.close()
    watchdog.pat("waiting for the last checkpoint")
    saved.wait()
    if rank == 0 and stopped_by:
        atomic_write(out / "stopped", f"by {stopped_by} after step {step}\n")
        print(f"stopped by {stopped_by} after step {step}; the checkpoint is whole: go on with --resume")
    elif rank == 0:
        draw_curves(out)
    return stopped_by


def write_row(log, **row):
    """A line of log.jsonl; a value that is not finite is null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    log.write(json.dumps(finite) + "\n")
    log.flush()


def trim_log(path, start):
    """Delete the lines after the last checkpoint of a killed run: the resumed run logs these steps again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines()
                if line.endswith("}") and json.loads(line)["step"] < start]
        atomic_write(path, "".join(line + "\n" for line in kept))


def draw_curves(out):
    """OUT/curves.png from OUT/log.jsonl: losses, entropies next to ln K, and the online probe, against the step."""
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    panels = {"losses": ("dino_global", "dino_local", "ibot", "leads", "contrast", "wave", "context"),
              "entropy (nats)": ("target_entropy", "patch_target_entropy", "prediction_entropy"),
              "online probe, macro AUROC": ("online_auroc",)}
    panels = {title: [n for n in names if any(n in r for r in rows)] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names} or {"losses": []}      # there may be no probe
    figure = Figure(figsize=(5.6 * len(panels), 3.4), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name in names:
            steps, values = [r["step"] for r in rows if name in r], [r[name] for r in rows if name in r]
            axis.plot(steps, np.array(values, dtype=float), marker="" if len(names) > 1 else "o", label=name)
        axis.set(title=title, xlabel="step")
        if len(names) > 1:
            for ln_k in [r["ln_k"] for r in rows if r.get("ln_k")][:1]:
                axis.axhline(ln_k, color="0.6", linestyle=":", label="ln K")
            axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))        # covers no line
    save_figure(figure, Path(out) / "curves.png")


def print_header(about, args, start):
    print(f"encoder {args.size} {about['parameters']['encoder'] / 1e6:.2f} M parameters, with heads "
          f"{sum(about['parameters'].values()) / 1e6:.2f} M | {about['device_name']} x {about['world_size']}, "
          + ("bf16 with fp32 weights and losses" if args.precision == "bf16" else "fp32"))
    for g in about["groups"]:
        print(f"  {g['recordings_per_batch']} of {args.batch} recordings per batch show {g['leads']} leads "
              f"({g['patients']} patients)")
    print(f"  left out: {', '.join(f'{n} {why}' for why, n in about['skipped'].items())} (copies: left_out.csv)\n"
          f"steps {start} to {args.steps}, checkpoints and log in {args.out}")


# ---- nothing prepared: the whole way on synthetic recordings --------------------------------------------------------
def prepare_demo(args, rank):
    """Make and prepare synthetic recordings in args.out, if they are not there, and set args.data and args.noise."""
    data = args.out / "data"
    if rank == 0 and not data.exists():
        print(f"no --data given: making synthetic recordings in {args.out}\n")
        prepare.main(prepare.parse_args(["synth", "--raw", str(args.out / "raw"), "--out", str(data),
                                         "--seed", str(args.seed)]))
    from_rank_0()
    args.data, args.noise = [(data / "ptbxl", 1.0), (data / "mitdb", 1.0)], data / "nstdb"
    if args.steps is None and not (args.resume and checkpoints(args.out / "checkpoints")):
        args.steps = DEMO_STEPS


def demo_scores(encoders, out):
    """For statements from DEMO_LEADS and for RR intervals, (score, control, difference, interval) of each encoder."""
    probe_ptbxl.main(probe_ptbxl.parse_args(
        ["--encoder", *encoders, "--raw", str(out / "raw/ptbxl"), "--out", str(out / "ptbxl"), "--leads", *DEMO_LEADS]))
    probe_mitbih.main(probe_mitbih.parse_args(
        ["--encoder", *encoders, "--raw", str(out / "raw/mitdb"), "--out", str(out / "mitbih"), "--beats", DEMO_BEATS]))
    leads = json.loads((out / "ptbxl/ptbxl.json").read_text())["tasks"]["all"]["each"]
    beats = json.loads((out / "mitbih/mitbih.json").read_text())["features"]["neighbourhood"]
    gains = beats["differences"]["rr_r"]["each"]
    return [list(zip(*(leads[key] for key in ("macro_auroc", "untrained", "difference", "difference_ci95")))),
            list(zip(beats["each"]["rr_r"], beats["untrained_scores"]["each"]["rr_r"],
                     *([gain[key] for gain in gains] for key in ("difference", "ci95"))))]


def show_demo(args):
    """Probe the demo's encoder, the one that comes with the program and the untrained control, draw features, and print
    the scores."""
    out, encoder = args.out, str(args.out / "encoder.pt")
    with contextlib.redirect_stdout(None):       # their tables hold means of the two encoders
        scores = demo_scores([encoder, "tiny"] if args.size == "tiny" else [encoder], out)
    corpus = open_corpus(args.data[0][0])
    # A normal ECG has every wave.
    normal = (corpus.index["split"] == SPLITS.index("test")) & (corpus.index["label"] == 1)
    row = int(np.flatnonzero(normal)[0])
    recording = Recording(corpus.read(row), ecg.FS, [LEADS[i] for i in corpus.lead_ids(row)], "uV")
    draw_recording(load_encoder("tiny"), recording, out / "features.png")
    print("\nsynthetic recordings, linear probes of frozen features; the same network untrained; difference [95 %]")
    for name, row in zip((f"leads {', '.join(DEMO_LEADS)}, all statements: AUROC",
                          "a heartbeat, RR interval before it: correlation"), scores):
        print(name)
        for of, (score, control, difference, (low, high)) in zip((f"this run, {args.steps} steps",
                                                                  "tiny.pt, of real recordings"), row):
            print(f"  {of:30}{score:9.3f}{control:9.3f}   {difference:+.3f} [{low:+.3f}, {high:+.3f}]")
    print(f"""
wrote {out}/encoder.pt, log.jsonl, curves.png, features.png (an ECG coloured by local features of tiny.pt), ptbxl/, \
mitbih/
So few steps on synthetic recordings teach little; they show that the program works. load_encoder("tiny") was trained \
on real ones, and never saw a synthetic one. Next, with your own:
  python prepare.py ptbxl --raw raw/ptbxl --out data/ptbxl --download
  python prepare.py mitdb --raw raw/mitdb --out data/mitdb --download
  python prepare.py nstdb --raw raw/nstdb --out data/nstdb --download
  torchrun train.py --data data/ptbxl data/mitdb --noise data/nstdb --out runs/real""")


# ---- command line ---------------------------------------------------------------------------------------------------
def corpus_and_weight(text):
    """"DIR" or "DIR:WEIGHT" -> (Path, weight)"""
    dir, colon, weight = text.rpartition(":")
    try:
        weight = float(weight) if colon else 1.0
    except ValueError:                                             # the colon is part of the folder's name
        return Path(text), 1.0
    if not 0 < weight < math.inf:
        raise argparse.ArgumentTypeError(f"the weight of {text} must be a number above 0")
    return Path(dir if colon else text), weight


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    add = p.add_argument_group("data").add_argument
    add("--data", nargs="+", type=corpus_and_weight, default=[], metavar="DIR[:WEIGHT]",
        help="corpora that prepare.py wrote; only their train split is used. Each has the weight (patients x hours) "
             "** 0.25; DIR:0.5 halves it. Without --data: synthetic recordings are made, used and probed")
    add("--exclude", nargs="+", type=Path, default=[], metavar="DIR",
        help="corpora that are never trained on: copies of their recordings in --data are left out, even under another "
             "name. (The same is true for the splits val and test of --data)")
    add("--noise", type=Path, metavar="DIR", help="noise corpus (prepare.py nstdb), mixed into the student's views")
    add("--out", type=Path, metavar="DIR", default=Path("runs/demo"), help="folder of this run (default: %(default)s)")
    add("--resume", action="store_true",
        help="continue exactly from the last checkpoint in --out, or start if there is none. Data, flags and constants "
             "must be those of the start, except --lr, --steps, --precision and the system flags")
    add = p.add_argument_group("model and optimisation (all else is at the top of a file: see RECIPES)").add_argument
    add("--size", choices=SIZES, default="tiny",
        help="tiny trains on a laptop, the others need GPUs (default: %(default)s)")
    def of_sizes(name):
        return f"(default: {', '.join(f'{size} {value:,}' for size, value in zip(SIZES, RECIPES[name]))})"
    add("--steps", type=int, help=f"length of the schedules {of_sizes('steps')}; without --data {DEMO_STEPS}")
    add("--batch", type=int, help=f"recordings per step, of all processes together {of_sizes('batch')}")
    add("--lr", type=float, help=f"peak learning rate; halve it if the loss rises or is NaN {of_sizes('lr')}")
    add("--prototypes", type=int, help="K of both heads; at most 32 times the batch, otherwise targets stay flat "
        f"{of_sizes('prototypes')}")
    add("--gram-from", type=int, metavar="STEP",
        help="Gram anchoring from this step on, if local features get worse in a long run; -1: never (default: never, "
             "7b 1,000,000)")
    add("--seed", type=int, default=0, help="seed of first weights, batches and views (default: %(default)s)")
    add = p.add_argument_group("system").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: cuda if there is a GPU)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="bf16: matrix products in bf16, stored weights and losses in fp32 (if sharded, bf16 between the layers "
             "too); auto: bf16 on a GPU and on a CPU with AVX-512 BF16 or AMX, where a step is two to three times as "
             "fast, fp32 on other CPUs (default: auto)")
    add("--shard", choices=("full", "none"), default="full",
        help="full: weights, gradients and moments are split over all ranks (FSDP); none: every rank holds all of "
             "them, which is faster for small models (default: %(default)s)")
    add("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
        help="compute each block again in the backward pass: much less memory, a third more work")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile each block: the first steps are slow, later ones faster on GPUs, but not on CPUs")
    add("--log-every", type=int, default=10, metavar="STEPS", help="steps between log lines (default: %(default)s)")
    add("--checkpoint-every", type=int, metavar="STEPS",
        help=f"(default: {CHECKPOINT_S / 60:g} minutes; longer if that is over {CHECKPOINT_GB_PER_DAY:,} GB a day)")
    add("--keep-every", type=int, default=10_000, metavar="STEPS",
        help=f"keep these checkpoints too, not only the last {KEEP_LAST}; 0: only the last (default: %(default)s)")
    add("--probe-every", type=int, default=100, metavar="STEPS", help="online probe; 0: never (default: %(default)s)")
    args = p.parse_args(argv)
    given = dict(batch=args.batch, prototypes=args.prototypes, patch_prototypes=args.prototypes)
    args.recipe = recipe(args.size) | {name: value for name, value in given.items() if value is not None}
    args.batch, args.prototypes = args.recipe["batch"], args.recipe["prototypes"]
    return args


def check_args(args):
    """ValueError for flags that cannot be right, before anything slow."""
    least = dict(steps=1, batch=1, prototypes=1, log_every=1, checkpoint_every=1, keep_every=0, probe_every=0)
    for name, lowest in least.items():
        if getattr(args, name) is not None and getattr(args, name) < lowest:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {lowest}")
    if args.lr is not None and not 0 < args.lr < 1:
        raise ValueError(f"--lr {args.lr} is no learning rate; expected something like --lr {args.recipe['lr']}")
    if args.noise and not args.data:
        raise ValueError("--noise without --data: the synthetic run makes its own noise; give both or neither")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but this PyTorch sees no GPU; use --device cpu, or install a CUDA build")


def main(args):
    """Train; without --data also probe and show the result. Returns the exit code."""
    check_args(args)
    demo = not args.data
    with StopRequest() as stop:                                        # first, so that no early signal is lost
        rank, world_size, device = setup_processes(args.device)
        stop.connect()
        if demo:
            prepare_demo(args, rank)
        with Watchdog(rank) as watchdog:
            stopped_by = train(args, rank, world_size, device, stop, watchdog)
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped_by:
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_STOPPED
    if demo and rank == 0:
        show_demo(args)
    return 0


OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc")


def explain(error, args):
    """What happened and what to do, in one line if a user can fix it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        found = (str(error).splitlines() or ["host memory"])[0][:200]
        return (f"error: out of memory on rank {os.environ.get('RANK', 0)} ({found}); "
                "--resume with --checkpoint-activations, which saves most, with more processes, or with --precision "
                f"bf16; or start again in another --out with a smaller --batch (now {args.batch})")
    if isinstance(error, OSError):
        return f"error: {error}; put that right, then --resume: what checkpoints there are, are whole"
    return f"error: {error}" if isinstance(error, ValueError) else traceback.format_exc()


def cli():
    args = parse_args()
    try:
        sys.exit(main(args))
    except (Exception, KeyboardInterrupt) as error:
        # End at once: other ranks wait in a collective, and a normal exit would wait for them and for threads.
        print(explain(error, args), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)


if __name__ == "__main__":
    cli()
