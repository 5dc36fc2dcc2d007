"""A real kernel, and what a notebook would show below each cell."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from jupyter_client import KernelManager

from tests.lab.processes import TIMEOUT_S, clean_environment


@dataclass
class Shown:
    """What is below a cell: its text, the data of what it displays, its result, and its error."""

    text: str = ""
    displays: list[dict[str, Any]] = field(default_factory=list)
    result: str = ""
    error: str = ""

    def take(self, message: dict[str, Any]) -> None:
        content = message["content"]
        match message["msg_type"]:
            case "stream":
                self.text += content["text"]
            case "display_data":
                self.displays.append(content["data"])
            case "execute_result":
                self.result = content["data"]["text/plain"]
            case "error":
                self.error = f"{content['ename']}: {content['evalue']}"
            case "clear_output":
                self.text, self.displays = "", []


class Kernel:
    def __init__(self, manager: KernelManager) -> None:
        self.manager = manager
        self.connect()

    def connect(self) -> None:
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=TIMEOUT_S)

    def run(
        self, code: str, answers: list[str] | None = None, on_text: Callable[[str], object] | None = None
    ) -> Shown:
        """Executes a cell. answers: for its input boxes, if somebody sits there; on_text: is told each text
        that appears, as it does only if somebody does."""
        shown = Shown()

        def take(message: dict[str, Any]) -> None:
            shown.take(message)
            if on_text and message["msg_type"] == "stream":
                on_text(message["content"]["text"])

        self.client.execute_interactive(
            textwrap.dedent(code).strip(),
            allow_stdin=answers is not None or on_text is not None,
            stdin_hook=lambda message: self.client.input((answers or []).pop(0)),
            output_hook=take,
            timeout=TIMEOUT_S,
        )
        return shown

    def family(self) -> list[psutil.Process]:
        """The kernel's process and all below it."""
        own = psutil.Process(self.manager.provisioner.pid)
        return [own, *own.children(recursive=True)]


@contextmanager
def kernel(folder: Path) -> Iterator[Kernel]:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(folder), env=clean_environment())
    try:
        started = Kernel(manager)
        yield started
        started.client.stop_channels()
    finally:
        manager.shutdown_kernel(now=True)
