"""run.sbatch on a real Slurm of two nodes (both on this machine), and everything that a cluster does to a job.

It takes minutes and runs with ECG_SLOW=1. It is skipped where Slurm and munge are not installed:
    apt-get install slurmctld slurmd slurm-client munge
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import prepare
import train
from slurm_cluster import PATH, Cluster, processes, send
from test_train import LONG_S, last_step, losses, same, saved_steps, weights

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 70, 5
LIMIT_SIGNAL_S, LATE_S = 90, 30      # Slurm sends the signal so long before the time limit, or up to LATE_S later

missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name, path=PATH)]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing) or os.geteuid() != 0, reason=(
    f"takes root and a Slurm; not found: {', '.join(missing) or 'root'}; "
    "apt-get install slurmctld slurmd slurm-client munge"))]


@pytest.fixture(scope="module")
def corpora(request, tmp_path_factory):
    """Real recordings where there are any, otherwise synthetic ones."""
    folder = tmp_path_factory.mktemp("slurm-data")
    try:
        raw = request.getfixturevalue("shared_data")
    except pytest.skip.Exception:
        prepare.main(prepare.parse_args(["synth", "--raw", str(folder / "raw"), "--out", str(folder / "data"),
                                         "--records", "80"]))
        return folder / "data"
    for source, limit in (("ptbxl", ["--limit", "200"]), ("mitdb", []), ("nstdb", [])):
        prepare.main(prepare.parse_args([source, "--raw", str(raw / source), "--out", str(folder / source), *limit]))
    return folder


def flags(corpora, out):
    return ["--data", f"{corpora}/ptbxl", f"{corpora}/mitdb", "--noise", f"{corpora}/nstdb", "--out", str(out),
            "--device", "cpu", "--batch", "16", "--prototypes", "64", "--steps", str(STEPS), "--log-every", "1",
            "--checkpoint-every", str(EVERY), "--probe-every", "0"]


def rank_of(pid):
    """RANK of a training process, None of another."""
    try:
        environment = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in v)
        return environment.get("RANK") if "train.py" in Path(f"/proc/{pid}/cmdline").read_text() else None
    except OSError:
        return None


def test_nothing_that_a_cluster_does_changes_the_run(corpora, tmp_path):
    """USR1, SIGKILL of a rank, requeue, a node that loses power, the time limit, one after the other on one job over
    two nodes: it comes back each time by itself, and its log and weights are those of a run that nothing disturbed."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    reference = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         str(33000 + os.getpid() % 20000), str(ROOT / "train.py"), *flags(corpora, whole)],
        env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors = reference.communicate(timeout=2 * LONG_S)[1]
    assert reference.returncode == 0, errors[-3000:]
    # The path is short, because sockets lie in it. A requeued job starts after cred_expire, here Slurm's default: what
    # was to end a turn on a dead node is sent again after 60 s, and would end the next turn if that had begun.
    with Cluster(Path("/tmp") / f"slurm{os.getpid()}", KillWait=10,
                 AuthInfo="socket={folder}/munge.socket,cred_expire=120") as cluster:
        job = cluster.run("sbatch", "--parsable", "--chdir", str(ROOT), "--nodes=2", "--cpus-per-task=1",
                          f"--signal=USR1@{LIMIT_SIGNAL_S}", "--time=300", f"--output={tmp_path}/job.log",
                          f"--export=ALL,OUT={out}", str(ROOT / "run.sbatch"), *flags(corpora, out))
        begun, seen = time.time(), []

        def turn():
            """How often Slurm has started the job again."""
            return int(cluster.job(job)["Restarts"])

        def trains(turns):
            """The job runs on both nodes in this turn, and has got a few steps further. After a node died, a later
            turn will do: on a busy machine what was to end the turn that lost it may still end the next one, which then
            fails and comes back by itself like any other."""
            start = last_step(out)
            cluster.wait_for(lambda: (turn() == turns or turn() > turns == 3) and cluster.state(job) == "RUNNING"
                             and last_step(out) >= max(start, 0) + EVERY + 2 and
                             {rank_of(pid) for node in cluster.nodes for pid in cluster.on_node(node)} >= {"0", "1"},
                             LONG_S, lambda: f"turn {turns} trains\n{log()}")
            seen.append((round(time.time() - begun), turn(), last_step(out)))

        def seconds():
            """How long this turn of the job has run."""
            return sum(int(n) * 60 ** k for k, n in enumerate(reversed(cluster.job(job)["RunTime"].split(":"))))

        def log():
            return (tmp_path / "job.log").read_text()[-3000:] if (tmp_path / "job.log").exists() else ""

        trains(0)
        cluster.run("scancel", "--signal=USR1", job)
        trains(1)
        assert "requeued after step_" in log() and "by SIGUSR1" in log()
        os.kill(next(pid for pid in cluster.on_node(cluster.nodes[1]) if rank_of(pid)), signal.SIGKILL)
        trains(1)                                                        # torchrun brought it back; no other turn
        cluster.run("scontrol", "requeue", job)
        trains(2)
        cluster.kill_node(cluster.nodes[1])
        cluster.wait_for(lambda: turn() >= 3, LONG_S, "Slurm notices the dead node")
        cluster.start_node(cluster.nodes[1])
        trains(3)
        # The ranks stand still until the signal has come: a fast machine would be done before, and a slow one may have
        # run for minutes. Limits are whole minutes.
        before = turn()
        limit = (seconds() + LIMIT_SIGNAL_S + 5) // 60 + 1
        ranks = [pid for node in cluster.nodes for pid in cluster.on_node(node) if rank_of(pid)]
        send(signal.SIGSTOP, ranks)
        cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
        cluster.wait_for(lambda: turn() > before or                                # Slurm may wake them with the signal
                         seconds() > 60 * limit - LIMIT_SIGNAL_S + LATE_S + 2, LONG_S, "the signal")
        send(signal.SIGCONT, ranks)
        cluster.wait_for(lambda: turn() > before, LONG_S, lambda: f"the time limit\n{log()}")
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=300")
        cluster.wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED", "TIMEOUT"), LONG_S,
                         lambda: f"the end\n{log()}")
        print(f"seconds, turn, step: {seen}, whole {time.time() - begun:.0f} s")
        assert cluster.state(job) == "COMPLETED", log()
    assert not processes(cluster.mark)
    assert losses(out) == losses(whole) and len(losses(out)) == STEPS
    assert same(weights(out), weights(whole))
    assert not list((out / "checkpoints").glob("*.tmp")) and len(saved_steps(out)) == train.KEEP_LAST


@pytest.mark.parametrize("turns", [0, 2])
def test_a_job_that_cannot_work_is_not_requeued(corpora, tmp_path, turns):
    """Without a checkpoint it ends at once; with one it gets two turns more, as a machine may have been the cause."""
    if turns:
        (tmp_path / "run/checkpoints/step_0000005").mkdir(parents=True)
    with Cluster(Path("/tmp") / f"slurm{os.getpid()}b{turns}") as cluster:
        job = cluster.run("sbatch", "--parsable", "--chdir", str(ROOT), "--cpus-per-task=1",
                          f"--export=ALL,OUT={tmp_path}/run", f"--output={tmp_path}/job.log", str(ROOT / "run.sbatch"),
                          *flags(corpora, tmp_path / "run"), "--batch", "0")
        cluster.wait_for(lambda: cluster.state(job) == "FAILED" and cluster.job(job)["Restarts"] == str(turns), LONG_S,
                         "the end")
        time.sleep(10)                                                   # of a job that would be queued again
        assert cluster.state(job) == "FAILED"
    log = (tmp_path / "job.log").read_text()
    assert "--batch 0 must be at least 1" in log and log.count("requeued after step_0000005: exit code 1") == turns
