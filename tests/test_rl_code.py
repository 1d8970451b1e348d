"""Programs of strangers: what the box stops, what it lets work, and that a broken box blames nobody."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from nemotron_nb.rl import code
from nemotron_nb.rl.code import Limits, NoSandbox, Ran, run_command, run_program, run_tests, sandbox_command, verify_code
from nemotron_nb.rl.judgement import FAILED, read_reply
from nemotron_nb.rl.tasks import Task

BOXED = sandbox_command(os.curdir)[1] == "bubblewrap"
boxed = pytest.mark.skipif(not BOXED, reason="bubblewrap is not installed, or cannot make a box here")
QUICK = Limits(seconds=1.5, memory=256 << 20, output=1 << 16, processes=16, disk=4 << 20)
UNIQUE = f"31{os.getpid()}.4"  # seconds of a sleep that nobody else sleeps

# What a program tries, and what it must not be able to print. "{mark}" is a file of the user, "{port}" a server of this machine.
ATTACKS = {
    "endless loop": "while True: pass",
    "sleeps": "import time; time.sleep(60); print('ESCAPED')",
    "ignores the signals": "import signal, time\nfor s in (2, 15, 24): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
    "memory": "x = bytearray(4 << 30); print('ESCAPED')",
    "memory by degrees": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "starts processes": "import os, time\nfor _ in range(60):\n  if os.fork() == 0: time.sleep(50)\ntime.sleep(1)\nprint('ESCAPED')",
    "starts processes without end": "import os\nwhile True: os.fork()",
    "starts processes faster and faster": "import os\nfor _ in range(9): os.fork()\nimport time; time.sleep(30)",
    "threads": "import threading, time\nfor i in range(1000): threading.Thread(target=time.sleep, args=(5,)).start()\nprint('ESCAPED')",
    "prints without end": "while True: print('x' * 10000)",
    "prints ten gigabytes at once": "import os\nos.truncate(1, 10 << 30); print('ESCAPED')",
    "fills a file": "f = open('x', 'wb')\nwhile True: f.write(b'0' * 1000000)",
    "fills /tmp with files": "for i in range(500): open(f'/tmp/{i}', 'wb').write(b'0' * 60000)\nprint('ESCAPED')",
    "fills /dev/shm with files": "for i in range(500): open(f'/dev/shm/{i}', 'wb').write(b'0' * 60000)\nprint('ESCAPED')",
    "writes to /": "open('/x', 'w').write('x'); print('ESCAPED')",
    "writes to /dev": "open('/dev/x', 'w').write('x'); print('ESCAPED')",
    "writes to /usr": "open('/usr/x', 'w').write('x'); print('ESCAPED')",
    "changes its job": "import glob\nfor f in glob.glob('/job/*'): open(f, 'w').write('x'); print('ESCAPED')",
    "reads /etc/shadow": "print(open('/etc/shadow').read(), 'ESCAPED')",
    "reads a file of the user": "print(open('{mark}').read(), 'ESCAPED')",
    "lists the folder of the user": "import os; os.listdir(os.path.dirname('{mark}')); print('ESCAPED')",
    "talks to this machine": "import socket; socket.create_connection(('127.0.0.1', {port}), 1); print('ESCAPED')",
    "talks to the network": "import socket; socket.create_connection(('pypi.org', 80), 1); print('ESCAPED')",
    "stops the first process": "import os\nos.kill(1, 9)\nos.kill({pid}, 9)\nprint('ESCAPED')",
    "sees other processes": "import os\nif len([p for p in os.listdir('/proc') if p.isdigit()]) > 6 or os.path.exists('/proc/{pid}'): print('ESCAPED')",
    "reads the environment": "import os\nif 'SECRET' in os.environ or any('{secret}' in open(f'/proc/{p}/environ', errors='replace').read() for p in os.listdir('/proc') if p.isdigit() and os.access(f'/proc/{p}/environ', os.R_OK)): print('ESCAPED')",
    "mounts": "import ctypes\nif ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0: print('ESCAPED')",
    "makes a user namespace": "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) == 0: print('ESCAPED')",
    "leaves a process": "import os, sys\nif os.fork() == 0:\n  os.setsid()\n  os.execv('/bin/sleep', ['sleep', '{sleep}'])\nprint('left one')",
    "asks for more": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1)); print('ESCAPED')",
    "sleeps in the background": "import os\nfor _ in range(3):\n  if os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['sleep', '{sleep}'])",
}
WITHOUT_A_BOX = ("endless loop", "sleeps", "ignores the signals", "memory", "memory by degrees", "prints without end", "prints ten gigabytes at once", "fills a file")


def asleep():
    """Processes of this test that are still there."""
    found = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                found += UNIQUE.encode() in file.read()
        except OSError:
            pass
    return found


@pytest.fixture
def bait(tmp_path, monkeypatch):
    """What an attack is after."""
    (tmp_path / "mark").write_text("secret")
    monkeypatch.setenv("SECRET", "4711-4712")
    server = socket.create_server(("127.0.0.1", 0))

    def listen():
        with contextlib.suppress(OSError):  # nobody came
            server.accept()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    words = {"{mark}": str(tmp_path / "mark"), "{port}": str(server.getsockname()[1]), "{pid}": str(os.getpid()), "{secret}": "4711-4712", "{sleep}": UNIQUE}
    yield lambda text: __import__("functools").reduce(lambda t, item: t.replace(*item), words.items(), text)
    server.shutdown(socket.SHUT_RDWR)
    listener.join()
    server.close()


def stopped(runs):
    for ran in runs:
        assert "ESCAPED" not in ran.output and len(ran.output) <= QUICK.output


@boxed
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_nowhere(name, bait):
    begun = time.monotonic()
    runs = run_tests(bait(ATTACKS[name]), ["", ""], QUICK)
    assert 1 <= len(runs) <= 2 and all(r.sandbox == "bubblewrap" for r in runs)
    stopped(runs)
    assert time.monotonic() - begun < 30 and asleep() == 0


@pytest.mark.parametrize("name", WITHOUT_A_BOX)
def test_limits_alone_stop_accidents(name, bait, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    runs = run_tests(bait(ATTACKS[name]), [""], QUICK)
    assert runs[0].sandbox == "limits" and runs[0].code != 0
    stopped(runs)


def test_each_test_starts_from_nothing():
    program = "import os\nprint(sorted(os.listdir('.')), os.path.exists('/tmp/left'))\nopen('here', 'w'); open('/tmp/left' if {} else 'left', 'w')".format(BOXED)
    first, second = run_tests(program, ["", ""], QUICK)
    assert first.output.startswith("[]") and second.output.startswith("[]")


def test_all_tests_in_one_box_say_what_one_box_each_says():
    programs = ["print(input()[::-1])", "n = int(input())\nprint(n)\nassert n < 2", "import sys; sys.exit(int(input()))", "print('\\ud800')", "import sys; sys.stdout.buffer.write(b'\\xff\\n\\x00')", "import os; os._exit(3)", "x = (", ""]
    for program in programs:
        inputs = ["1", "2", "\ud800 \u00e9", ""]
        alone = [run_program(program, given, QUICK) for given in inputs]
        bad = next((i + 1 for i, ran in enumerate(alone) if ran.code != 0), len(alone))
        assert run_tests(program, inputs, QUICK) == alone[:bad]


@boxed
@pytest.mark.parametrize("how", ["os.kill(os.getppid(), 9)", "os.kill(-1, 9)", "open(f'/proc/{os.getppid()}/fd/1', 'w').write('[0, \"MwA=\"]\\n' * 5)"])
def test_a_program_that_breaks_the_driver_is_wrong_and_never_right(how):
    program = f"import os\ntry:\n    {how}\nexcept OSError as e: pass\nprint(7)"
    task = Task("t", "code", (), truth={"verifier_metadata": {"unit_tests": {"inputs": ["", ""], "outputs": ["3", "3"]}}})
    assert verify_code(task, read_reply(f"</think>\n```python\n{program}\n```<|im_end|>"), QUICK).reward == 0


def test_a_box_that_does_not_work_blames_nobody(monkeypatch):
    with pytest.raises(NoSandbox):
        run_tests("print(1)", ["", ""], Limits(memory=1 << 20))
    monkeypatch.setattr(code, "_PYTHON", "/no/such/python")
    task = Task("t", "code", (), truth={"verifier_metadata": {"unit_tests": {"inputs": [""], "outputs": ["3"]}}})
    if BOXED:
        found = verify_code(task, read_reply("</think>\n```python\nprint(3)\n```<|im_end|>"), QUICK)
        assert (found.status, found.reward) == (FAILED, None)


def test_a_bubblewrap_that_cannot_make_a_box_is_none(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    assert sandbox_command(tmp_path) == ([], "limits")
    assert run_program("print(1)", "", QUICK) == Ran("1\n", 0, "limits")


@boxed
def test_namespaces_are_closed_where_bubblewrap_can():
    words, _ = sandbox_command(os.curdir)
    assert ("--disable-userns" in words) == ("--disable-userns" in code._can(words[0]))


@pytest.mark.skipif(not code._limiter(), reason="prlimit is not installed")
@pytest.mark.parametrize("boxed", [True, False])
def test_the_limits_are_the_same_whoever_sets_them(boxed, monkeypatch):
    if not boxed:
        monkeypatch.setattr(code, "sandbox_command", lambda *_: ([], "limits"))
    some = code.Limits(seconds=7, memory=300 << 20, output=4096, processes=50)
    told = []
    for limiter in (code._limiter(), ""):
        monkeypatch.setattr(code, "_limiter", lambda limiter=limiter: limiter)
        told.append(run_command(["/bin/cat", "/proc/self/limits"], {}, limits=some))
    assert told[0] == told[1] and told[0].code == 0
    found = {line[:26].strip(): line[26:].split()[:2] for line in told[0].output.splitlines()[1:]}
    assert found["Max cpu time"] == ["7", "7"] and found["Max address space"] == [str(300 << 20)] * 2
    assert found["Max file size"] == ["4096", "4096"] and found["Max core file size"] == ["0", "0"]
    assert found["Max open files"] == ["256", "256"] and int(found["Max processes"][0]) <= 50


def test_a_limit_is_not_above_what_this_process_may_have():
    """Where the hard limit is lower, it holds; asking for more would end every program before it starts."""
    program = "from nemotron_nb.rl import code; print([code._most(code.Limits(), 1 << 20)[w] for w in code._NAMES][4], code.run_command(['/bin/true'], {}).code)"
    words = [sys.executable, "-c", f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99)); {program}"]
    assert subprocess.run(words, capture_output=True, text=True).stdout == "(99, 99) 0\n"


def test_a_command_sees_its_files_and_its_input():
    ran = run_command(["/bin/cat", "{job}/a", "-"], {"a": "one "}, b"two", QUICK)
    assert (ran.output, ran.code) == ("one two", 0)
    assert "No such file" in run_command(["/bin/cat", "{job}/b"], {}, b"", QUICK, errors=True).output
