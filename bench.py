"""Speed of the hot paths, each as a ratio to something measured in the same run: machines differ and are shared.

    python bench.py [--data DIR [DIR ...]] [--noise DIR] [--size tiny] [--batch 64] [--device auto]

Without --data, synthetic recordings are prepared in a temporary folder. Prints one line per path, medians after a
warm-up:
    matmul    fp32 (bf16 on a GPU) matrix multiplication of this machine, the yardstick of `step`
    loader    batches per second of train.host_batch, and the share of a training step that they take
    views     windows, leads, gain and noise of a batch, as a share of a training step
    step      training step: model FLOP/s (counted by torch, forward and backward) as a share of the matmul rate
    embed     ten-second 12-lead recordings per second through a frozen encoder, FLOP/s as a share of the matmul rate
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import prepare
import train
from augment import load_noise, make_views
from dino import build_networks, update_teacher
from model import SIZES, build_encoder
from prepare import FS, open_corpus

REPEATS = 5
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
    sampler = train.Sampler(corpora, args.batch, 0, round(train.WINDOW_S * FS))
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


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--data", nargs="+", type=Path, default=[], help="prepared corpora")
    p.add_argument("--noise", type=Path, help="prepared noise corpus")
    p.add_argument("--size", choices=SIZES, default="tiny", help="(default: %(default)s)")
    p.add_argument("--batch", type=int, default=64, help="(default: %(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    return p.parse_args(argv)


def main(args):
    if bool(args.data) != bool(args.noise):
        raise ValueError("give both --data and --noise, or neither")
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
