"""Models that readers bring: what the usual ones need, and one line for what is wrong with the others."""

import sys
from pathlib import Path

import pytest
import torch

from ddp_lib import RankError, TrainConfig, World, fit, run_ranks, warm_up, wrap
from ddp_lib.errors import UserError
from ddp_lib.processes.exit_status import as_exit_status
from ddp_lib.processes.signals import Stopped
from ddp_lib.training.build import blame_model, build_and_try
from ddp_lib.training.ddp import gradient_sync
from tests.lab.fuzz.runs import tiny_dataset
from tests.lab.runs import TIMEOUT_S, config

HEAD = """
import sys, torch
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4096, num_classes)
        {init}
    def forward(self, x):
        {forward}
"""
FORWARD = "return self.head(self.conv(x).flatten(1))"


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Writes own_net.py, as the next import finds it."""
    (folder / "own_net.py").write_text(text)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_net", raising=False)


def net(init: str = "pass", forward: str = FORWARD) -> str:
    return HEAD.format(init=init, forward=forward)


def build(name: str = "Net", dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, str]:
    """The model, and what is said about it."""
    said: list[str] = []
    return build_and_try(f"own_net:{name}", 2, 32, torch.device("cpu"), dtype, said.append), "\n".join(said)


VIEW = "return self.head(self.conv(x).view(x.size(0), -1))"
LAZY = "self.head = nn.LazyLinear(num_classes)"
TRAIN_ONLY = "return {'out': y} if self.training else y"
VOLUME = "self.volume = nn.Conv3d(3, 3, 1)"
USE_VOLUME = f"x = self.volume(x[:, :, None])[:, :, 0]; {FORWARD}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (net(), ""),
        (net(LAZY), ""),
        (net(forward=VIEW), "cannot have the memory layout channels_last (view size"),
        (net(VOLUME, USE_VOLUME), "cannot have the memory layout channels_last (required rank 4"),
        (net("self.double()"), "parameters in torch.float64; it is trained in torch.float32"),
    ],
)
def test_a_model_that_can_be_trained_is(tmp_path, monkeypatch, text, says):
    write(tmp_path, monkeypatch, text)
    model, said = build()
    assert says in said if says else not said
    x = torch.ones(3, 3, 32, 32).to(memory_format=torch.channels_last)
    warm_up(model.train(), x)
    assert model(x).shape == (3, 2)


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        (net(forward=f"{FORWARD}, None"), "Net", "returns a tuple: return only the logits"),
        (net("self.head = nn.Linear(4096, 1000)"), "Net", r"shape \[2, 1000\]: return .* shape \[2, 2\]"),
        (net(forward="return x.view(-1, 16)"), "Net", r"shape \[384, 16\]"),
        (net(forward="sys.exit(0)"), "Net", r"fails on images .*sys.exit\(0\), own_net.py line 10"),
        (net("sys.exit()"), "Net", r"cannot be built \(sys.exit.*leave the exit out"),
        (net("nn.Linear()"), "Net", r"cannot be built \(TypeError: .*own_net.py line 8 in __init__"),
        (net("self.norm = nn.SyncBatchNorm(4)"), "Net", "use BatchNorm on the CPU"),
        ("import not_there", "Net", "cannot be built .*not_there.*line 1.*: install what it imports"),
        ("def f(:", "Net", r"cannot be built \(SyntaxError.*own_net.py, line 1"),
        ("", "Net", "own_net.py has no Net"),
        (
            "import sys; sys.stdout = open('out', 'w'); sys.stdout.close()\n" + net(),
            "Net",
            "closes sys.stdout",
        ),
        ("def make(classes): ...", "make", "give it a parameter of that name"),
        (net() + "model = Net(2)", "model", "is a Net: name the class, or a function"),
    ],
)
def test_what_is_wrong_with_a_model_is_said_in_one_line(tmp_path, monkeypatch, text, name, says):
    write(tmp_path, monkeypatch, text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    with pytest.raises(UserError, match=f"^--model 'own_net:{name}' .*{says}"):
        build(name)


def test_the_run_folder_stays_where_it_was_named(tmp_path, monkeypatch):
    move = f"import os; os.chdir({str(tmp_path)!r})"
    write(tmp_path, monkeypatch, f"{move}\n{net(move, f'{move}; {FORWARD}')}")
    before = Path.cwd()
    build()
    assert Path.cwd() == before


def test_one_that_ends_the_process_group_is_told_in_one_line(capsys):
    with as_exit_status() as outcome:
        torch.distributed.barrier()
    assert outcome.status == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("leave destroy_process_group out of the model")


def test_outputs_are_checked_in_training_too(tmp_path, monkeypatch):
    write(tmp_path, monkeypatch, net(forward=f"y = self.head(self.conv(x).flatten(1)); {TRAIN_ONLY}"))
    model, _ = build()
    with pytest.raises(UserError, match="returns a dict"):
        model.train()(torch.ones(3, 3, 32, 32))


@pytest.mark.parametrize("error", [Stopped(143), RuntimeError("Connection closed by peer"), MemoryError()])
def test_a_model_is_not_blamed_for(error):
    with pytest.raises(type(error)), blame_model("own_net:Net", "fails"):
        raise error


def spare_parameter(from_step: int) -> None:
    """The model does not use its parameter `spare` from the given forward on."""

    class Spare(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.spare = torch.nn.Linear(4, 2)
            self.step = -1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.step += 1
            return super().forward(x) + (self.spare(x) if self.step < from_step else 0)

    with World.join() as world:
        net = wrap(Spare(), world)
        warm_up(net, torch.ones(3, 4))
        for _ in range(2):
            with gradient_sync(net, on=True):
                net(torch.ones(3, 4)).sum().backward()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("step", "says"), [(0, r"the first is spare\.weight"), (1, "a step did not use all")]
)
def test_parameters_that_are_not_used_are_named(step, says):
    with pytest.raises(RankError, match=says):
        run_ranks(spare_parameter, 2, step, timeout_s=TIMEOUT_S)


CHANGES = [
    (net("self.head = nn.Linear(4096, num_classes, bias=False)"), r"head.bias: \[3\] -> none"),
    (net("self.conv = nn.Conv2d(3, 4, 5, padding=2)"), r"conv.weight: \[4, 3, 3, 3\] -> \[4, 3, 5, 5\]"),
    (net(forward="return self.head(self.conv(x).relu().flatten(1))"), "the source of own_net: "),
]


def test_a_run_knows_its_model(tmp_path, monkeypatch, images_folder, shared_cache):
    """Finished or not; and it resumes without the weights that it began with."""
    start = tmp_path / "start.pth"
    write(tmp_path, monkeypatch, net())
    torch.save(
        build_and_try("own_net:Net", 3, 32, torch.device("cpu"), torch.float32, print).state_dict(), start
    )
    changes = {"model": "own_net:Net", "init_from": str(start), "epochs": 1}
    run = config(tmp_path / "run", images_folder, shared_cache, **changes)
    longer = config(tmp_path / "run", images_folder, shared_cache, **changes | {"epochs": 2})
    first = fit(run, World())
    start.unlink()
    for text, says in CHANGES:
        write(tmp_path, monkeypatch, text)
        for settings in (run, longer):
            with pytest.raises(UserError, match=rf"holds a run of another model \({says}"):
                fit(settings, World())
    write(tmp_path, monkeypatch, f"# A comment changes nothing.\n{net()}")
    assert fit(run, World()) == first
    assert fit(longer, World())["steps"] == 2 * first["steps"]


@pytest.mark.parametrize("file", ["summary.json", "cifar_net.pth"])
def test_damaged_results_of_a_finished_run_are_made_again(tmp_path, file):
    settings = TrainConfig(
        run_dir=str(tmp_path), model="tests.lab.fuzz.runs:net", epochs=1, global_batch_size=4
    )
    first = fit(settings, World(), data=tiny_dataset())
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[:200])
    assert fit(settings, World(), data=tiny_dataset()) == first
    assert (tmp_path / file).read_bytes() == whole
