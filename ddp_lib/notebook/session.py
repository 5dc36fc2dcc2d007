"""What a rank of `%ranks` does: it joins the process group once, then runs cell after cell.

It runs them in an IPython shell of its own, so that a cell may hold what a notebook's cell may hold: magics,
`display`, figures, `await`. Each answer is ("done", (value, pickled; its text)) or ("failed", ...) as in
worker.py, and before it comes ("names", ...).
"""

import base64
import builtins
import json
import os
import signal
import sys
from types import FrameType, ModuleType
from typing import Any

import cloudpickle
from IPython.core.compilerop import CachingCompiler
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets import Type
from traitlets.config import Config

from ddp_lib.distributed.world import World
from ddp_lib.notebook import worker
from ddp_lib.notebook.cell_output import DISPLAY
from ddp_lib.processes.signals import kill_descendants

# No collective of a cell times out by itself: the cell's timeout ends it, and says where each rank stands.
_COLLECTIVE_S = 86_400.0


class _Publisher(DisplayPublisher):
    """Writes what is displayed into the rank's output, between the lines that it prints."""

    def publish(self, data: Any, metadata: Any = None, source: Any = None, **options: Any) -> None:
        text = json.dumps([data, metadata or {}], default=lambda raw: base64.b64encode(raw).decode())
        sys.stdout.flush()
        os.write(1, f"{DISPLAY}{text}\n".encode())

    def clear_output(self, wait: bool = False) -> None:
        pass


class _LastValue(DisplayHook):
    """Keeps the value of a cell's last expression, and prints nothing: the notebook's process shows it."""

    def __call__(self, result: Any = None) -> None:
        self.fill_exec_result(result)
        if result is not None:
            _Shell.instance().user_ns["_"] = result


class _Compiler(CachingCompiler):
    def get_code_name(self, *about: Any) -> str:
        return _Shell.instance().cell_name


class _Shell(InteractiveShell):
    cell_name = ""  # of its file, as the notebook's process knows it
    compiler_class = Type(_Compiler)
    display_pub_class = Type(_Publisher)
    displayhook_class = Type(_LastValue)

    def showtraceback(self, *args: Any, **options: Any) -> None:
        """The notebook's process says what failed, and on which rank."""

    showsyntaxerror = showtraceback


def _new_shell(**names: Any) -> _Shell:
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.cache_size = 0  # no Out: it would keep every value alive
    shell: _Shell = _Shell.instance(config=config, user_module=ModuleType("__main__"))
    shell.push(names)
    return shell


def serve_cells() -> None:
    """Joins, says ("done", "joined"), and runs cells until it gets "quit"."""
    link, running = worker.link, False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal running
        if running:  # once per cell: a terminal sends Ctrl-C to this process too
            running = False
            raise KeyboardInterrupt

    def ask(prompt: object = "") -> str:
        answer = link.ask(prompt)
        print(f"{prompt}{answer}")  # as a terminal shows it
        return answer

    builtins.input = ask
    world = World.join(timeout_s=_COLLECTIVE_S, log=lambda line: None)
    shell = _new_shell(rank=world.rank, world_size=world.world_size)
    given = set(shell.user_ns)
    signal.signal(signal.SIGINT, interrupt)
    link.send(("done", "joined"))
    while (message := link.inbox.get()) != "quit":
        try:
            running = True
            answer = _run_cell(shell, *message[1])
            running = False
        except KeyboardInterrupt as error:
            answer = worker.failure(error, {})
        sys.stdout.flush()
        sys.stderr.flush()
        link.send(("names", [n for n in shell.user_ns if n not in given and not n.startswith("_")]))
        link.send(answer)
    world.leave()
    kill_descendants()


def _run_cell(shell: _Shell, source: str, name: str) -> tuple[str, Any]:
    """The answer to a cell; name: see `_Shell.cell_name`."""
    shell.cell_name = name
    result = shell.run_cell(source)
    if error := result.error_before_exec or result.error_in_exec:
        return worker.failure(error, {})
    value = result.result
    if not DisplayHook.semicolon_at_end_of_expression(source):
        formatter = shell.display_formatter
        data, metadata = formatter.format(value) if formatter else ({}, {})
        if set(data) - {"text/plain"}:
            shell.display_pub.publish(data, metadata)
    try:
        text = repr(value)
    except Exception as error:
        return worker.failure(error, {})
    try:
        return "done", (cloudpickle.dumps(value), text)
    except Exception:
        return "done", (b"", text)
