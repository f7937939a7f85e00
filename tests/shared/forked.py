"""Programs in processes of their own that share one process's imports.

A fresh `python -c` spends seconds on importing torch and diffusers. A `ForkServer` imports them once, and
forks for each program; what it imports must start no thread. A program runs as with `python -c`: its own
`__main__`, arguments, output, signals and exit status. Only the hash seed is that of the server, for all its
programs: a test of equal bytes has one of its runs elsewhere.

Run as a script, this file is the server. It reads a line of JSON for each program to start or to wait for,
and answers with the process number or the exit status.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

# All of `errata` with what it is built on, and what its commands import when they run.
IMPORTS = """
import os
os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported; a command sets it before
from errata import quiet
with quiet.without_notices():
    import accelerate, brevitas, jinja2, matplotlib.pyplot, torch, torchao
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
    from errata import calibration, cli, compress, correct, deploy, report
    from errata.deploy import assembly, engines
    for package in (deploy, engines):
        for name in package.__all__:
            getattr(package, name)  # which imports it
"""
COMMAND = "import sys; from errata.cli import main; sys.exit(main(sys.argv[1:]))"


class Program:
    """A program that was started; `returncode` is known when it was waited for."""

    def __init__(self, server: "ForkServer", pid: int, output: tuple[Path, Path]) -> None:
        self.pid, self.returncode = pid, None
        self._server, self._output = server, output

    returncode: int | None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Return the exit status, below zero if a signal ended the program."""
        if self.returncode is None:
            self.returncode = int(self._server.ask({"wait": self.pid}))
        return self.returncode

    @property
    def stdout(self) -> str:
        return self._output[0].read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._output[1].read_text(encoding="utf-8")


class ForkServer:
    """Runs `preamble` once, and then programs in forks of the process that did; output goes to `folder`."""

    def __init__(self, preamble: str, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__, preamble], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            self._process.kill()

    def start(self, program: str, *arguments: object, environment: dict[str, str] | None = None) -> Program:
        """Start a program with `arguments`, and with these variables besides those of this process."""
        self._count += 1
        output = self._folder / f"{self._count}.out", self._folder / f"{self._count}.err"
        request = {
            "program": program,
            "arguments": [str(each) for each in arguments],
            "environment": dict(os.environ) | (environment or {}),
            "output": [str(each) for each in output],
        }
        return Program(self, int(self.ask(request)), output)

    def run(self, program: str, *arguments: object, environment: dict[str, str] | None = None) -> Program:
        """Start a program and wait for its end."""
        started = self.start(program, *arguments, environment=environment)
        started.wait()
        return started

    def ask(self, request: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fork server has ended; its preamble may have failed, see stderr"
        return answer


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Runs programs that find everything imported; started once by each worker that needs it."""
    with ForkServer(IMPORTS, tmp_path_factory.mktemp("forked")) as server:
        yield server


def next_program() -> dict[str, Any] | None:
    """Serve requests. Return a program to run, in a fork, or None at the end of the input, in the server."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what the preamble prints is no answer
        exec(sys.argv[1], {"__name__": "__main__"})
        threads = Path("/proc/self/task")
        assert not threads.is_dir() or len(list(threads.iterdir())) == 1, "a fork would lack a thread"
        for line in sys.stdin:
            request: dict[str, Any] = json.loads(line)
            if "wait" in request:
                answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            elif (answer := os.fork()) == 0:
                return request
            answers.write(f"{answer}\n")
            answers.flush()
    return None


def become(request: dict[str, Any]) -> None:
    """Take on a program's input, output, environment and arguments."""
    for target, path in enumerate((os.devnull, *request["output"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    places = request["environment"].get("PYTHONPATH", "")
    sys.path[0:1] = ["", *(place for place in places.split(os.pathsep) if place)]
    sys.argv = ["-c", *request["arguments"]]


if __name__ == "__main__":
    asked = next_program()
    if asked is not None:
        become(asked)
        exec(compile(asked["program"], "<string>", "exec"), {"__name__": "__main__"})
