"""``python -m fastflow`` as a user starts it, forked from one process that has imported torch already.

Run as a module, this file is that process. A command runs in a session of its own, as ``__main__``, and ends as the
interpreter does, with all that is registered for its exit.
"""

import ctypes
import gc
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PRELOADED = (
    "fastflow.trainer.commands torch._dynamo torch.utils.tensorboard matplotlib.backends.backend_agg "
    "matplotlib.figure PIL.WebPImagePlugin tqdm"
).split()


class Commands:
    """The process from which commands are forked."""

    def __init__(self):
        argv = [sys.executable, "-m", "tests.support.commands"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(argv, env=environment, bufsize=0, **pipes)
        self._read = b""
        self._started = []
        self.ended = {}  # exit codes by process id, negative for a signal

    def start(
        self, log, *argv, cwd=None, out=None, ignored=(), overrides=True, file_size=None, **environment
    ):
        """``fastflow argv`` in the folder ``cwd``, with more ``environment``; both outputs go to the file ``log``.

        ``out``: another file for standard output.
        ``ignored``: signals that the command inherits as ignored, as one does that nohup starts.
        ``overrides``: False: permissions of files hold for root too.
        ``file_size``: bytes to which every file may grow, as if the disk were then full.
        """
        request = {
            "argv": list(argv),
            "environment": environment,
            "log": str(log),
            "cwd": str(cwd or Path.cwd()),
        }
        request |= {"ignored": list(ignored), "out": str(out or log), "overrides": overrides}
        request |= {"file_size": file_size}
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        while (started := self._next(60)) is None:
            pass
        self._started.append(Command(self, started, Path(log)))
        return self._started[-1]

    def wait(self, pid, seconds):
        """The exit code of a command, None if it runs on."""
        until = time.monotonic() + seconds
        while pid not in self.ended and time.monotonic() < until:
            self._next(until - time.monotonic())
        return self.ended.get(pid)

    def _next(self, seconds):
        """Wait for the next start or end of a command; the process id of a start."""
        while b"\n" not in self._read:
            if not select.select([self._server.stdout], [], [], max(0, seconds))[0]:
                return None
            read = self._server.stdout.read(4096)
            assert read, "the process from which commands are forked has ended"
            self._read += read
        line, _, self._read = self._read.partition(b"\n")
        event, pid, code = line.split()
        if event == b"start":
            return int(pid)
        self.ended[int(pid)] = int(code)
        return None

    def close(self):
        for command in self._started:
            command.gone(0)  # those of a test that failed may run on
        self._server.kill()
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()


class Command:
    """A started command: process ``pid``, whose session has its workers."""

    def __init__(self, commands, pid, log):
        self.commands, self.pid, self.log = commands, pid, log

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def processes(self):
        """The process ids of its session: the command, unless it has ended, and its workers."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == self.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found

    def wait(self, seconds=60):
        """The exit code; raises AssertionError if the command runs on."""
        code = self.commands.wait(self.pid, seconds)
        assert code is not None, f"runs on after {seconds} seconds: {self.said()}"
        return code

    def wait_for(self, condition, seconds=60):
        until = time.monotonic() + seconds
        while not condition():
            assert self.pid not in self.commands.ended and time.monotonic() < until, self.said()
            time.sleep(0.005)

    def gone(self, seconds):
        """Whether all processes of the session end within ``seconds``; those that run on are killed."""
        until = time.monotonic() + seconds
        while left := self.processes():
            if time.monotonic() > until:
                for pid in left:
                    os.kill(pid, 9)
                return False
            time.sleep(0.01)
        return True


def _serve():
    """Fork a process per line of standard input; return its request in the process, None in this one at the end."""
    running, buffer = set(), b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.02)
        if ready:
            read = os.read(0, 65536)
            if not read:
                return None
            buffer += read
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            pid = os.fork()
            if not pid:
                return json.loads(line)
            running.add(pid)
            print("start", pid, 0, flush=True)
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            running.remove(pid)
            print("end", pid, os.waitstatus_to_exitcode(status), flush=True)


def _become(request):
    os.setsid()
    opened = [os.open(os.devnull, os.O_RDONLY), _appended(request["out"]), _appended(request["log"])]
    for target, source in enumerate(opened):
        os.dup2(source, target)
    os.chdir(request["cwd"])
    if not request["overrides"]:
        _heed_permissions()
    os.environ |= request["environment"]
    if request["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    # whoever started the tests may have ignored signals: a shell does so for a job in the background
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    for signum in request["ignored"]:
        signal.signal(signum, signal.SIG_IGN)
    sys.argv = ["fastflow", *request["argv"]]
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")


def _heed_permissions():
    """Give up root's capabilities CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH; other users have neither."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert not libc.capget(header, sets), os.strerror(ctypes.get_errno())
    for i in range(3):  # effective, permitted, inheritable: the first 32 of each
        sets[i] &= ~0b110
    assert not libc.capset(header, sets), os.strerror(ctypes.get_errno())


def _appended(log):
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


if __name__ == "__main__":
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # a command's garbage collections then copy no page of the modules
    if request := _serve():
        _become(request)
        runpy.run_module("fastflow", run_name="__main__", alter_sys=True)
