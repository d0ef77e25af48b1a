"""A real Slurm cluster on one machine, for tests that inject faults: munged, slurmctld and a slurmd per node, as root.

    with Cluster(folder, num_nodes=2) as cluster:
        job = cluster.submit("slurm/train.sbatch", "config.yaml", options=["--nodes=2"])
        cluster.wait(job, ["RUNNING"], timeout=10)
        cluster.cut("n0", "n1")

Each node is a network namespace with its own address and host name (see network.py). Files are shared, as on a
cluster's file system. There is no accounting database; scontrol also knows the jobs that have ended.

Differences from most real clusters: processes are tracked by their parents (proctrack/linuxproc), so that children of a
killed task become orphans that Slurm cannot end, while control groups would; KILL follows TERM after 10 s, not 30; a
requeued job waits 6 s, not two minutes.
"""

import contextlib
import os
import re
import signal as signals
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.cluster.network import Network

ROOT = Path(__file__).resolve().parent.parent.parent
CONTROLLER = "ctl"

# Tests would have to wait for the usual timeouts, so these are shorter. The exception is SlurmdTimeout, after which the
# controller gives up a node that it cannot reach and requeues its jobs.
CONFIG = """
ClusterName={name}
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldDebug=debug
SlurmdDebug=debug
# An empty file: Debian's own loads every plugin in a folder.
PlugStackConfig={folder}/plugstack.conf
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credentials have expired, by default 120 s.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
# No control groups, which a test machine may not have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The nodes together have more CPUs and memory than the machine.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
JobRequeue=1
ReturnToService=2
KillWait=10
MinJobAge=3600
MessageTimeout=10
SlurmdTimeout=60
NodeName=DEFAULT CPUs=8 RealMemory=16000
{nodes}
PartitionName=test Nodes=ALL Default=YES DefaultTime=10 MaxTime=60 State=UP
"""


class Cluster:
    """Nodes n0, n1, ... of one Slurm. `settings` replace values of slurm.conf."""

    def __init__(self, folder: Path, num_nodes: int = 3, settings: dict[str, object] | None = None):
        self.folder = Path(folder)
        self.settings = settings or {}
        self.nodes = [f"n{i}" for i in range(num_nodes)]
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        self.env = outside | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}
        self.jobs: list[str] = []

    def __enter__(self) -> "Cluster":
        """Takes about two seconds. Leaves nothing behind if it fails."""
        self.network = Network([CONTROLLER, *self.nodes])
        try:
            self.network.build()
            self.write_files()
            self.start_daemons()
        except BaseException:
            self.network.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.network.remove()
        for daemon in self.daemons.values():
            daemon.wait()

    # Start

    def write_files(self) -> None:
        addresses = self.network.addresses
        config = CONFIG.format(
            name=self.network.name,
            folder=self.folder,
            controller=CONTROLLER,
            controller_address=addresses[CONTROLLER],
            nodes="\n".join(f"NodeName={node} NodeAddr={addresses[node]}" for node in self.nodes),
        )
        for key, value in self.settings.items():
            config = re.sub(rf"^{key}=.*\n", "", config, flags=re.MULTILINE) + f"{key}={value}\n"
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "plugstack.conf").touch()
        # slurmd looks for control groups although nothing uses them, and finds none in a namespace. v1 is lazy.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def start_daemons(self) -> None:
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        # --force: munged refuses folders without access for others, such as pytest's. Every user here is root.
        self.start_daemon("munged", CONTROLLER, "munged", "--foreground", "--force", *options)
        self.until((self.folder / "munge.socket").exists, 10, self.daemon_logs)
        self.start_daemon("slurmctld", CONTROLLER, "slurmctld", "-D")
        for node in self.nodes:
            self.start_daemon(f"slurmd-{node}", node, "slurmd", "-D", "-N", node)
        self.until(self.is_up, 30, self.daemon_logs)

    def is_up(self) -> bool:
        ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
        if ended:
            raise RuntimeError(f"{', '.join(ended)} exited immediately:\n{self.daemon_logs()}")
        return set(self.node_states().values()) == {"idle"}

    def start_daemon(self, name: str, host: str, *command: str) -> None:
        self.daemons[name] = self.network.start(host, list(command), self.env, self.folder / f"{name}.out")

    def daemon_logs(self) -> str:
        return "\n".join(f"{file.name}:\n{file.read_text()[-1500:]}" for file in sorted(self.folder.glob("*.out")))

    # Jobs

    def submit(
        self,
        script: str | Path,
        *arguments: str,
        options: list[str] | None = None,
        env: dict[str, str] | None = None,
    ) -> str:
        """Submit a job from the repository's root; returns its id.

        The job's environment is that of this process plus `env`. Its log is in the cluster's folder unless options name
        another file.
        """
        command = ["sbatch", "--parsable", f"--output={self.folder}/%j.log", *(options or []), script, *arguments]
        self.jobs.append(self.ask(*command, env=env).split(";")[0])
        return self.jobs[-1]

    def facts(self, job: str) -> dict[str, str]:
        """What scontrol shows of a job: JobState, Reason, Restarts, ExitCode, NodeList, StdOut, ..."""
        told = self.ask("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"([\w:/]+)=(.*?)(?= [\w:/]+=|$)", told))

    def state(self, job: str) -> str:
        return self.facts(job)["JobState"]

    def log(self, job: str) -> str:
        file = Path(self.facts(job)["StdOut"])
        return file.read_text(errors="replace") if file.is_file() else ""

    def wait(self, job: str, states: list[str], timeout: float) -> str:
        """Wait until the job is in one of the states, and return it.

        Raises TimeoutError with what scontrol shows and the end of the log.
        """
        self.until(lambda: self.state(job) in states, timeout, lambda: self.describe(job, states))
        return self.state(job)

    def wait_for_text(self, job: str, text: str, timeout: float) -> None:
        """Wait until the job's log contains the text. Raises TimeoutError as `wait` does."""
        self.until(lambda: text in self.log(job), timeout, lambda: self.describe(job, repr(text)))

    def describe(self, job: str, expected: object) -> str:
        facts = " ".join(f"{key}={value}" for key, value in self.facts(job).items())
        return f"job {job} did not reach {expected}\n{facts}\n{self.log(job)[-3000:]}"

    def cancel(self, job: str, signal: str | None = None, *options: str) -> None:
        """Cancel a job, or only send a signal ("USR2") to every process of its steps, but not to its batch script.

        options: "--batch" sends it to the batch script alone, as --signal=B:USR2@300 does, "--full" to all of these.
        """
        self.ask("scancel", *([f"--signal={signal}"] if signal else []), *options, job)

    def requeue(self, job: str) -> None:
        self.ask("scontrol", "requeue", job)

    # Faults

    def cut(self, a: str, b: str) -> None:
        """Silently drop all traffic between two nodes. The controller still reaches both."""
        self.network.cut(a, b)

    def heal(self, a: str, b: str) -> None:
        self.network.heal(a, b)

    def cut_node(self, node: str) -> None:
        """Drop all traffic of a node. After 50 s Slurm gives it up and requeues its jobs; its processes live on."""
        self.network.unplug(node)

    def heal_node(self, node: str) -> None:
        self.network.plug(node)
        # A node that was given up registers again only when its slurmd starts or reloads its configuration.
        self.daemons[f"slurmd-{node}"].send_signal(signals.SIGHUP)

    def processes(self, node: str | None = None, job: str | None = None) -> list[psutil.Process]:
        """The processes of all jobs or of one, on all nodes or on one: those that started with SLURM_JOB_ID."""
        found = []
        for process in self.processes_on([node] if node else self.nodes):
            with contextlib.suppress(psutil.Error):
                own = process.environ().get("SLURM_JOB_ID")
                if own and own == (job or own) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def stepd(self, node: str, job: str, step: str) -> list[psutil.Process]:
        """The slurmstepd of a job on a node. `step`: "batch" for the script's, "0", "1", ... for those of srun."""
        found = []
        for process in self.processes_on([node]):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(f"slurmstepd: [{job}.{step}]"):
                    found.append(process)
        return found

    def processes_on(self, nodes: list[str]) -> Iterator[psutil.Process]:
        for node in nodes:
            for pid in self.network.pids(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    yield psutil.Process(pid)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """At the end, repair all links and nodes, and end the jobs submitted meanwhile with their orphans."""
        before = len(self.jobs)
        try:
            yield
        finally:
            for cut in list(self.network.cuts):
                self.heal(*cut)
            for node in list(self.network.unplugged):
                self.heal_node(node)
            self.end_jobs(self.jobs[before:])
            self.until(lambda: set(self.node_states().values()) <= {"idle", "mix", "alloc"}, 30, self.daemon_logs)

    def end_jobs(self, jobs: list[str]) -> None:
        """Cancel jobs and kill their processes, even those that ignore TERM, are suspended, or have no parent."""
        for job in jobs:
            self.cancel(job)

        def have_ended() -> bool:
            left = [process for job in jobs for process in self.processes(job=job)]
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return not left and not set(self.ask("squeue", "--noheader", "--format=%A").split()) & set(jobs)

        self.until(have_ended, 30, lambda: self.describe(jobs[-1], "its end"))

    # Helpers

    def node_states(self) -> dict[str, str]:
        lines = self.ask("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).splitlines()
        return dict(line.split() for line in lines)

    def ask(self, *arguments: object, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Run one of Slurm's commands outside the nodes; returns its output. Raises RuntimeError if it fails."""
        command = [str(argument) for argument in arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.env | (env or {}), capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def until(self, holds: Callable[[], bool], timeout: float, complaint: Callable[[], str]) -> None:
        give_up_at = time.monotonic() + timeout
        while not holds():
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"after {timeout} s: {complaint()}")
            time.sleep(0.2)
