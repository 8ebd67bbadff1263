"""Processes that begin with what one of them has imported.

Imports take most of the time of a short command. So one fresh Python imports what the command needs, computes nothing,
and forks for every process that is asked for; each has its own arguments, environment and output from there on.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

SERVER = """
import json, os, sys, traceback
imports, command = sys.argv[1:]
exec(imports)
for line in sys.stdin:
    request, children = json.loads(line), []
    for environment in request["environments"]:
        children.append(os.fork())
        if children[-1]:
            continue
        code = 1
        try:
            output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
                os.dup2(file, number)
            os.environ.update(environment)
            sys.argv = request["arguments"]
            exec(command)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Forks:
    """
    A Python that has imported, and forks. As a context it ends with whatever is still running.

    Args:
        imports: statements, run once.
        command: statements that each process runs.
        environment: added to that of this process, before the imports.
        folder: to work in.
    """

    def __init__(
        self, imports: str, command: str, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, imports, command],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.communicate()

    def begin(
        self, arguments: Sequence[str], output: Path, environments: Sequence[Mapping[str, str]] = ({},)
    ) -> list[int]:
        """
        Begins processes; those begun before have to be over.

        Args:
            arguments: of each, from the command's name on.
            output: file that gets what they print.
            environments: what is added to that of each process.

        Returns:
            Their ids.
        """
        request = {"arguments": list(arguments), "output": str(output), "environments": list(map(dict, environments))}
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        return json.loads(self.server.stdout.readline())

    def are_over(self, seconds: float) -> bool:
        """Whether all of the processes that were begun last are over, after waiting so long at most."""
        return bool(select.select([self.server.stdout], [], [], seconds)[0])

    def exit_codes(self, seconds: float = 600) -> list[int]:
        """
        Of the processes that were begun last; waits for them. As in `subprocess`, -9 is the signal 9.

        Raises:
            TimeoutError: if that takes longer.
        """
        if not self.are_over(seconds):
            raise TimeoutError(f"Not over after {seconds} seconds.")
        return json.loads(self.server.stdout.readline())


def as_launched(num_processes: int) -> list[dict[str, str]]:
    """What a launcher such as `torchrun` says to each of several processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    number, meeting = str(num_processes), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    together = meeting | {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    return [together | {"RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(num_processes))]
