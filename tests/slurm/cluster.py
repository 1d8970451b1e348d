"""A private Slurm on this machine: munge, one controller, two nodes that pretend. Everything lies in one short temporary folder."""

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

USER = pwd.getpwuid(os.getuid()).pw_name
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
FOREIGN = ("SLURM_", "SBATCH_", "SALLOC_", "NEMOTRON_", "SQUEUE_", "SCANCEL_")  # variables that must not leak into the tests
CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={state}/munge.sock,cred_expire=5
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=60
InactiveLimit=0
KillWait=5
MinJobAge=3600
JobRequeue=1
EnforcePartLimits=ALL
FirstJobId={first_job}
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port1}-{port2}] CPUs=8 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=UNLIMITED DefaultTime=60 State=UP
PartitionName=quick Nodes=ALL MaxTime=30 DefaultTime=5 State=UP
"""


def missing() -> list[str]:
    """The programs of Slurm and munge that are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    for _ in range(200):
        first = random.randrange(30_000, 32_700)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")


class Cluster:
    """The running programs and how to stop them: by the process ids they wrote down."""

    def __init__(self) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="nb-slurm-", dir="/tmp"))  # a socket's path may have 107 bytes
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        self.env |= {"PATH": PATH, "SLURM_CONF": str(self.state / "slurm.conf")}

    def up(self) -> "Cluster":
        """Start munge, the controller and both nodes, and wait until they are idle."""
        self.state.chmod(0o755)
        self._write()
        self.run("munged", f"--key-file={self.state}/munge.key", f"--socket={self.state}/munge.sock", f"--pid-file={self.state}/munged.pid", f"--log-file={self.state}/munged.log", f"--seed-file={self.state}/munge.seed", "--force")
        self.run("slurmctld", "-i", "-f", self.env["SLURM_CONF"])
        for node in ("n1", "n2"):
            self.run("slurmd", "-N", node, "-f", self.env["SLURM_CONF"])
        self.wait_for(lambda: self.run("sinfo", "-h", "-o", "%t %D", check=False).strip() == "idle 2", 60, "idle nodes")
        return self

    def _write(self) -> None:
        port, host = _free_ports(3), socket.gethostname().partition(".")[0]
        places = {"host": host, "user": USER, "state": self.state, "port": port, "port1": port + 1, "port2": port + 2}
        (self.state / "slurm.conf").write_text(CONF.format(**places, first_job=random.randrange(1000, 60_000)))
        (self.state / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.state}/gpu[0-7]\n")
        for number in range(8):  # Slurm wants a device; this is one, and needs no rights
            (self.state / f"gpu{number}").symlink_to("/dev/null")
        for folder in ("ctld", "n1", "n2"):
            (self.state / folder).mkdir()
        key = self.state / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, timeout: float = 60) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def wait_for(self, true, seconds: float, what: str) -> None:
        """Wait until it is true. What did not come in time is an error with the state of things."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                said = self.run("squeue", "-t", "all", check=False) + self.run("sinfo", "-N", "-l", check=False)
                raise AssertionError(f"{what} did not come within {seconds} s\n{said}{(self.state / 'slurmctld.log').read_text()[-2000:]}")
            time.sleep(0.1)

    def down(self) -> None:
        """End all jobs, then the programs, then remove the folder."""
        self.run("scancel", "-u", USER, check=False)
        end = time.monotonic() + 10
        while self.run("squeue", "-h", "-t", "R,CG", check=False).strip() and time.monotonic() < end:
            time.sleep(0.2)
        for name, program in (("n1", "slurmd"), ("n2", "slurmd"), ("slurmctld", "slurmctld"), ("munged", "munged")):
            _stop(self.state / f"{name}.pid", program)
        shutil.rmtree(self.state, ignore_errors=True)


def _is(pid: int, program: str) -> bool:
    """Is this process that program, and alive? A finished one may wait for its parent under its old number."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith(program) and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _stop(pid_file: Path, program: str) -> None:
    """End the program that wrote the file, and only that."""
    if not pid_file.exists() or not pid_file.read_text().strip():
        return
    pid = int(pid_file.read_text())
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + patience
        if _is(pid, program):
            os.kill(pid, number)
        while _is(pid, program) and time.monotonic() < end:
            time.sleep(0.05)
