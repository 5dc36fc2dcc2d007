"""The magics `%ranks` and `%%ranks`: cells that run on ranks which stay from cell to cell."""

import atexit
from typing import Any

from IPython.core.displayhook import DisplayHook
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from ddp_lib.distributed.addresses import Endpoint, parse_endpoint
from ddp_lib.errors import UserError, require_seconds
from ddp_lib.notebook.cell_output import ranks_text
from ddp_lib.notebook.errors import in_one_line
from ddp_lib.notebook.kept_ranks import KeptRanks
from ddp_lib.notebook.remote import admit

# A person has to type a line on the other machines: how many times --timeout-s that may take.
_JOIN = 10


@magics_class
class RanksMagics(Magics):
    """One set of ranks at a time. They end with the kernel, however it ends."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self._ranks: KeptRanks | None = None
        atexit.register(self.stop)  # before multiprocessing waits for its processes

    @magic_arguments()
    @argument("what", nargs="?", default="", help="%%ranks: how many, or stop. %%%%ranks: which, as 1 or 0,2")
    @argument("--timeout-s", type=float, default=60.0, help="seconds after which a cell counts as stuck")
    @argument("--nnodes", type=int, default=1, help="%%ranks: machines, with --rdzv-endpoint")
    @argument("--rdzv-endpoint", default="", help="%%ranks: HOST:PORT, an address of this machine")
    @line_cell_magic
    def ranks(self, line: str, cell: str | None = None) -> list[Any] | None:
        """%ranks 2: starts two ranks, joined to one process group. %ranks stop: ends them.

        %ranks 2 --nnodes 2 --rdzv-endpoint HOST:PORT: starts two here, and prints the line to type on one
        other machine, whose ranks follow them; waits for it ten times --timeout-s.

        A cell that begins with %%ranks runs on all ranks, with %%ranks 1 on rank 1 alone. Names stay for the
        next cell; `rank` and `world_size` are there from the start. The values of the last expression come
        back as a list, in rank order.
        """
        given = parse_argstring(self.ranks, line)
        try:
            require_seconds("--timeout-s", given.timeout_s)
            if cell is None:
                self._line(given.what, given)
                return None
            return self._cell(given.what, cell, given.timeout_s)
        except UserError as error:
            raise UsageError(str(error)) from None

    def _line(self, what: str, given: Any) -> None:
        if what == "stop":
            self.stop()
        elif what.isdecimal() and int(what) > 0:
            several = given.nnodes > 1
            endpoint = parse_endpoint("--rdzv-endpoint", given.rdzv_endpoint) if several else None
            self.stop()
            self._ranks = _start(int(what), endpoint, given.nnodes - 1, given.timeout_s)
            print(f"{ranks_text(self._ranks.numbers)}: ready")
        elif what:
            raise UserError(f"%ranks {what}: give a number of ranks, 1 or more, or stop")
        elif self._ranks:
            print(f"{ranks_text(self._ranks.numbers)}: ready")
        else:
            print("no ranks: %ranks 2 starts two")

    def _cell(self, what: str, cell: str, timeout_s: float) -> list[Any] | None:
        if self._ranks is None:
            raise UserError("there are no ranks: start two with %ranks 2, in a cell of its own")
        numbers = list(self._ranks.numbers)
        if what:
            chosen = what.split(",")
            if not all(n.isdecimal() and int(n) in numbers for n in chosen):
                raise UserError(f"%%ranks {what}: give ranks from 0 to {numbers[-1]}, such as 0 or 0,1")
            numbers = sorted({int(n) for n in chosen})
        source = f"#\n{cell}"  # the line of %%ranks counts
        shell = InteractiveShell.instance()
        name = shell.compile.cache(source, shell.execution_count)
        values = self._ranks.run_cell(source, name, numbers, timeout_s)
        silent = all(value is None for value in values) or DisplayHook.semicolon_at_end_of_expression(cell)
        return None if silent else values

    def stop(self) -> None:
        """Ends the ranks, if there are any."""
        ranks, self._ranks = self._ranks, None
        if ranks:
            ranks.stop()


@in_one_line("the ranks have")
def _start(nproc: int, endpoint: Endpoint | None, others: int, timeout_s: float) -> KeptRanks:
    if endpoint is None:
        return KeptRanks(nproc)
    return KeptRanks(nproc, admit(endpoint, others, _JOIN * timeout_s), endpoint.host)
