"""A Slurm of one node on this machine: its own daemons, configuration and ports, gone when the tests end.

The node claims more processors, memory and GPUs than there are, so that scripts run as they stand.
"""

import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from getpass import getuser
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
PATH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
CONFIGURATION = """\
ClusterName=errata
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=5
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=65536 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The cluster; a context manager.

    Raises:
        AssertionError: on entering, if it does not come up.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path is short
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))
        } | {"PATH": PATH, "SLURM_CONF": f"{self.folder}/slurm.conf"}

    def __enter__(self) -> Self:
        try:
            self._configure()
            self._start_daemons()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if len(self._daemons) == 3:
            self.ask("scancel", f"--user={getuser()}")
            self._wait_until(lambda: not self.ask("squeue", "--noheader"), seconds=30)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, *words: str) -> str:
        """Return what a client program prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else f"{done.stdout}{done.stderr}".strip()

    def state_of(self, job: str) -> str:
        """Return the state of a job, or of a task of an array, such as `RUNNING`; UNKNOWN if it is gone."""
        shown = self.ask("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].split(maxsplit=1)[0] if "JobState=" in shown else "UNKNOWN"

    def wait_for(self, job: str, *states: str, seconds: float = 240) -> str:
        """Wait until a job has one of these states, and return it."""
        self._wait_until(lambda: self.state_of(job) in states, seconds=seconds, job=job)
        return self.state_of(job)

    def processes_of(self, task: int) -> list[int]:
        """Return the process numbers of a running task of the only running array."""
        wanted = {f"SLURM_CONF={self.folder}/slurm.conf".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is another user's
                if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                    found.append(int(process.name))
        return found

    def told(self) -> str:
        """Return the ends of all logs."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-3000:]}" for log in logs)

    def _configure(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = platform.node().partition(".")[0]
        text = CONFIGURATION.format(host=host, user=getuser(), folder=self.folder, ports=free_ports(2))
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        gpus = f"NodeName={host} Name=gpu File=/dev/null\nNodeName={host} Name=gpu File=/dev/zero\n"
        (self.folder / "gres.conf").write_text(gpus, encoding="utf-8")

    def _start_daemons(self) -> None:
        named = {
            name: f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file")
        }
        files = (f"--key-file={self.folder}/munge.key", f"--seed-file={self.folder}/munge.seed")
        log = f"--log-file={self.folder}/munged.log"
        self._start("munged", "--foreground", "--force", *files, *named.values(), log)
        self._wait_until((self.folder / "munge.socket").exists, seconds=20)
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D", "-N", platform.node().partition(".")[0])
        self._wait_until(lambda: self.ask("sinfo", "--noheader", "-o", "%t") == "idle", seconds=60)

    def _start(self, program: str, *options: str) -> None:
        with (self.folder / f"{program}.out.log").open("wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    [shutil.which(program, path=PATH) or program, *options],
                    env=self.environment,
                    stdout=output,
                    stderr=output,
                    stdin=subprocess.DEVNULL,
                )
            )

    def _wait_until(self, is_so: Callable[[], bool], *, seconds: float, job: str = "") -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            shown = self.ask("scontrol", "show", "job", job) if job else ""
            assert time.monotonic() < deadline, f"Slurm takes too long: {shown}\n{self.told()}"
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A running cluster; tests that need it are skipped where Slurm is not installed."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        pytest.skip(f"needs Slurm and munge (Debian: slurm-wlm, munge); not found: {', '.join(missing)}")
    with Slurm() as cluster:
        yield cluster
