"""A Slurm cluster of two nodes on this one host, for tests: own munged, slurmctld and two slurmd, all in one folder."""
import os
import pathlib
import random
import secrets
import signal
import socket
import subprocess
import sys
import time

# This Python's own programs (torchrun) come first, wherever it was started from.
PATH = ":".join((str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin",
                 "/sbin", "/usr/bin", "/bin"))
NODES = ("node1", "node2")
SETTINGS = {
    "ClusterName": "test", "SlurmctldHost": "{host}(127.0.0.1)", "SlurmctldPort": "{port}",
    "SlurmUser": "root", "SlurmdUser": "root", "AuthType": "auth/munge", "CredType": "cred/munge",
    "AuthInfo": "socket={folder}/munge.socket,cred_expire=5",  # 5: the shortest wait before a requeued job starts
    "StateSaveLocation": "{folder}/state", "SlurmctldPidFile": "{folder}/slurmctld.pid",
    "SlurmdSpoolDir": "{folder}/%n", "SlurmdPidFile": "{folder}/%n.pid",
    "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "MpiDefault": "none", "MailProg": "/bin/true",
    "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CPU", "GresTypes": "gpu",
    "SlurmdParameters": "config_overrides", "SchedulerParameters": "sched_interval=1,bf_interval=5",
    "ReturnToService": 2, "JobRequeue": 1, "SlurmdTimeout": 10, "KillWait": 15,
    "MessageTimeout": 90,  # a busy machine answers late, and what is not answered is sent again, to the next turn
    "PartitionName": "test Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
}


def free_ports(count):
    """Ports nobody listens on, below the range the kernel gives to outgoing connections, so that they stay free."""
    ports = set()
    while len(ports) < count:
        with socket.socket() as probe:
            try:
                port = random.randint(15000, 32000)
                probe.bind(("", port))
                ports.add(port)
            except OSError:
                pass
    return sorted(ports)


def processes(*variables):
    """{pid: (name, parent)} of the processes with all these NAME=value in their environment, and their descendants."""
    wanted, found, others = {variable.encode() for variable in variables}, {}, {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            name, fields = (entry / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            environ = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is not ours
            continue
        state, parent = fields.split()[:2]
        if state not in "ZX":
            (found if wanted <= set(environ) else others)[int(entry.name)] = name, int(parent)
    while children := {pid: others.pop(pid) for pid, (_, parent) in list(others.items()) if parent in found}:
        found |= children
    return found


def kill(*variables, seconds=100):
    """SIGKILL to all `processes(*variables)`. They are all stopped first, so that none can react to the death of
    another or report it: the rest of the cluster sees what it sees when a machine loses power."""
    deadline, stopped = time.monotonic() + seconds, set()
    while new := processes(*variables).keys() - stopped:
        send(signal.SIGSTOP, new)
        stopped |= new
    while found := processes(*variables):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still alive after SIGKILL: {found}")
        depth = {}
        for pid in found:
            above, depth[pid] = pid, 0
            while above in found:
                above, depth[pid] = found[above][1], depth[pid] + 1
        # children first: the kernel wakes (SIGHUP, SIGCONT) stopped ones whose group is orphaned by a parent's death
        send(signal.SIGKILL, sorted(depth, key=depth.get, reverse=True))
        time.sleep(0.05)


def send(number, pids):
    """A signal to processes that may have ended."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


class Cluster:
    """The cluster, as a context manager. `folder` should be new and its path short (sockets lie in it); `settings`
    replace those of SETTINGS or add to them. Nodes named 127.0.0.1 and 127.0.0.2 have names that a job can resolve."""

    def __init__(self, folder, nodes=NODES, **settings):
        self.nodes, self.folder = nodes, pathlib.Path(folder).resolve()
        self.settings, self.daemons = SETTINGS | settings, {}
        if len(str(self.folder)) > 75:
            raise ValueError(f"path too long for the sockets in it: {self.folder}")
        self.mark = f"SLURM_CONF={self.folder}/slurm.conf"  # all daemons, commands and jobs of this cluster have it
        foreign = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SINFO", "SCANCEL")
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environ |= {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": PATH}

    def __enter__(self):
        for name in ("state", *self.nodes):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.configure()
        # Ends everything when this process ends, however it ends: its standard input closes then.
        self.watch = subprocess.Popen([sys.executable, __file__, self.mark], stdin=subprocess.PIPE,
                                      start_new_session=True)
        try:
            self.start("munged", "munged", "--foreground", "--force", "--num-threads=1",
                       *(f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "seed", "log")),
                       f"--socket={self.folder}/munge.socket")
            self.wait_for((self.folder / "munge.socket").exists, 100, "munged")
            self.start("slurmctld", "slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            self.wait_for(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), 600, "both nodes idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def configure(self):
        """Write the files that the daemons read."""
        host, (port, *ports) = socket.gethostname().split(".")[0], free_ports(1 + len(self.nodes))
        lines = [f"{name}={value}".format(host=host, port=port, folder=self.folder)
                 for name, value in self.settings.items()]
        lines[-1:-1] = [f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 Gres=gpu:1"
                        for node, port in zip(self.nodes, ports)]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu File=/dev/null\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # or slurmd needs /sys/fs/cgroup
        (self.folder / "munge.key").touch(0o600)
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(64))

    def __exit__(self, *exc_info):
        kill(self.mark)
        for daemon in [*self.daemons.values(), self.watch]:
            if daemon.stdin:
                daemon.stdin.close()
            daemon.wait(100)

    def start(self, name, *command, **environ):
        """Start a daemon in the foreground, its output in NAME.log."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(command, env=self.environ | environ, stdin=subprocess.DEVNULL,
                                                  stdout=log, stderr=log, cwd=self.folder, start_new_session=True)

    def start_node(self, name, *options):
        """Start the slurmd of a node; the node is ready when `states` says so."""
        self.start(name, "slurmd", "-D", "-N", name, *options, SLURMD_NODENAME=name)

    def kill_node(self, name):
        """SIGKILL to all that runs on a node, as if it lost power: slurmd, slurmstepd, tasks and all they started."""
        kill(self.mark, f"SLURMD_NODENAME={name}")
        self.daemons.pop(name).wait(100)

    def on_node(self, name):
        """{pid: (name, parent)} of what runs on a node."""
        return processes(self.mark, f"SLURMD_NODENAME={name}")

    def run(self, *command, seconds=300):
        """The output of a Slurm command."""
        done = subprocess.run(command, env=self.environ, cwd=self.folder, text=True, capture_output=True,
                              timeout=seconds, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"{command}: exit status {done.returncode}\n{done.stderr}{done.stdout}")
        return done.stdout.strip()

    def states(self):
        """{node: state}; empty while slurmctld does not answer."""
        try:
            return dict(line.split() for line in self.run("sinfo", "-hN", "-o", "%N %T").splitlines())
        except RuntimeError:
            return {}

    def job(self, job):
        """What `scontrol show job` says, as a dictionary."""
        fields = self.run("scontrol", "-o", "show", "job", str(job)).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def state(self, job):
        """PENDING, RUNNING, COMPLETING, COMPLETED, ..."""
        return self.job(job)["JobState"]

    def wait_for(self, predicate, seconds, what):
        """Wait until predicate() is true and return it; an error with the ends of the logs if that takes too long."""
        deadline, error = time.monotonic() + seconds, "too late"
        while time.monotonic() < deadline:
            try:
                if result := predicate():
                    return result
            except RuntimeError as e:  # a job that ended MinJobAge ago is not known any more
                error = e
                break
            time.sleep(0.2)
        logs = [f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}"
                for log in sorted(self.folder.glob("*.log"))]
        what = what() if callable(what) else what
        raise TimeoutError("\n".join([f"{what}: {error} ({seconds} s were given)", *logs]))


if __name__ == "__main__":  # the watcher that Cluster starts
    sys.stdin.read()
    kill(sys.argv[1])
