"""Flags and variables of ddp-launch: what they mean, and what is refused before torch is loaded."""

import os

import pytest

from ddp_lib.errors import UserError
from ddp_lib.launch import main as launch
from ddp_lib.launch.options import LaunchOptions, read_launch
from tests.lab.processes import TIMEOUT_S, python

BAD = {
    "no command": ([], "no command"),
    "unknown command": (["tain"], "'tain'"),
    "unknown flag": (["train", "--epoch", "3"], "--epochs"),
    "unknown flag of both": (["train", "--nproc-per-nod", "3"], "--nproc-per-node"),
    "no number": (["train", "--epochs", "many"], "many"),
    "no value": (["train", "--epochs"], "--epochs"),
    "out of range": (["train", "--epochs", "0"], "--epochs is 0"),
    "no such choice": (["train", "--precision", "int4"], "int4"),
    "stray word": (["train", "shapes"], "shapes"),
    "nproc 0": (["train", "--nproc-per-node", "0"], "'0'"),
    "nproc word": (["train", "--nproc-per-node", "two"], "'two'"),
    "nproc negative": (["train", "--nproc-per-node=-1"], "'-1'"),
    "nnodes 0": (["train", "--nnodes", "0"], "'0'"),
    "nnodes range": (["train", "--nnodes", "3:2"], "'3:2'"),
    "no endpoint": (["train", "--nnodes", "2"], "--rdzv-endpoint"),
    "no port": (["train", "--nnodes=2", "--rdzv-endpoint=master"], "'master'"),
    "no host": (["train", "--nnodes=2", "--rdzv-endpoint=:29500"], "':29500'"),
    "bad port": (["train", "--nnodes=2", "--rdzv-endpoint=master:99999"], "'99999'"),
    "port word": (["train", "--nnodes=2", "--rdzv-endpoint=master:http"], "'http'"),
    "bare IPv6": (["train", "--nnodes=2", "--rdzv-endpoint=fd77::10:29500"], "brackets"),
    "half a bracket": (["train", "--nnodes=2", "--rdzv-endpoint=[fd77::1:29500"], "brackets"),
    "restarts": (["train", "--max-restarts=-1"], "-1"),
    "plot nothing": (["plot"], "RUN_DIR"),
    "plot nowhere": (["plot", "no/such/run"], "no/such/run"),
}
# What a number may not be, whatever its flag: later it would be a traceback, or never end.
NUMBERS = {
    "train": """--seed=-1 --seed=99999999999999999999 --timeout-s=1e12 --timeout-s=nan --join-timeout-s=inf
        --data-timeout-s=1e7 --grace-s=1e12 --checkpoint-every-s=inf --lr=1e39 --lr=nan --weight-decay=1e39
        --warmup=nan --momentum=1 --epochs=1000000000000 --global-batch-size=99999999999 --accumulate=0
        --image-size=100000 --nproc-per-node=99999 --max-restarts=99999999999 --nnodes=1:9999999""",
    "run": "--timeout-s=1e12 --join-timeout-s=1e12 --grace-s=nan --max-restarts=-1",
    "stacks": "--timeout-s=1e12",
}
for command, flags in NUMBERS.items():
    BAD |= {f"{command} {flag}": ([command, flag], flag.partition("=")[0]) for flag in flags.split()}


@pytest.mark.parametrize(("args", "named"), BAD.values(), ids=BAD)
def test_a_bad_command_line_is_one_line(args, named, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert launch.main(args) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("ddp-launch: error: ") and err.count("\n") == 1 and len(err) < 300
    assert named.lower() in err.lower()
    assert list(tmp_path.iterdir()) == []


FLAGS = """--nnodes --nproc-per-node --rdzv-endpoint --max-restarts --data --epochs
--global-batch-size --run-dir --seed --precision --resume --model --checkpoint-every-s""".split()


@pytest.mark.process
@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--help"], ["train", "plot"]),
        (["train", "--help"], FLAGS),
        (["plot", "--help"], ["--out"]),
    ],
    ids=["all", "train", "plot"],
)
def test_help_is_quick(args, shown):
    code = (
        "import sys\nfrom ddp_lib.launch.main import main\n"
        f"try:\n    status = main({args})\nexcept SystemExit as leaving:\n    status = leaving.code\n"
        "assert not status\n"
        "assert not {'torch', 'matplotlib', 'pandas'} & set(sys.modules)"
    )
    out, err = python(code).communicate(timeout=TIMEOUT_S)
    assert err == ""
    words = out.replace(",", " ").split()
    assert [flag for flag in shown if flag not in words] == []


def test_pet_variables_stand_behind_flags():
    pet = {"PET_NNODES": "2:4", "PET_RDZV_ENDPOINT": "[fd77::1]:7", "PET_NPROC_PER_NODE": "gpu"}
    launch = read_launch(LaunchOptions(), pet)
    assert (launch.nodes, launch.nproc, str(launch.endpoint)) == (
        (2, 4), "gpu", "PET_RDZV_ENDPOINT [fd77::1]:7",
    )  # fmt: skip
    assert read_launch(LaunchOptions(nnodes="3"), pet).nodes == (3, 3)
    # Kubeflow sets a master for a single machine too.
    assert read_launch(LaunchOptions(), {"PET_MASTER_ADDR": "m", "PET_NNODES": "1"}).endpoint is None
    with pytest.raises(UserError, match=r"^PET_NNODES 'two'"):
        read_launch(LaunchOptions(), {"PET_NNODES": "two"})
    with pytest.raises(UserError, match=r"^PET_NODE_RANK is 4"):
        read_launch(LaunchOptions(), {**pet, "PET_NODE_RANK": "4"})


def test_a_job_has_a_name_that_torchs_store_takes():
    latin = b"M\xfcnchen".decode(errors="surrogateescape")  # as Python reads a folder's name
    assert read_launch(LaunchOptions(), {}, job=latin).job == r"M\udcfcnchen"


def test_a_switch_is_not_called_repeatable(capsys):
    with pytest.raises(SystemExit):
        launch.train(["--help"])
    text = capsys.readouterr().out
    assert "--dry-run" in text and "repeatable" not in text


def test_the_help_ends_in_a_terminal_of_few_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit):
        launch.train(["--help"])
    assert "--dry-run" in capsys.readouterr().out and os.environ["COLUMNS"] == "1"
