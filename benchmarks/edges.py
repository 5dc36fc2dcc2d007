"""Several machines at the edges: silent machines, second jobs, wrong machines, addresses, clocks, kills.

python benchmarks/edges.py PART [--runs 3] [--only REGEX] [--fresh]     as root, on Linux

PART: silence | jobs | machines | addresses | clocks | kills. The machines are network namespaces of this
computer. Each run is saved at once, so that a script that was stopped goes on where it was (--fresh: from the
beginning). Writes results/edges_<part>.json. The training is that of tests/lab/training.py: without a shared
disk, and, if nothing else is said, two machines with one rank each.
"""

import argparse
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT, save, table

sys.path.insert(0, str(ROOT))

from ddp_lib import read_run
from tests.lab.clocks import shifted
from tests.lab.damage import SHORT_S
from tests.lab.images import write_images
from tests.lab.machines import Lab
from tests.lab.namespaces import missing
from tests.lab.program import Program
from tests.lab.training import GLOBAL_BATCH, STEPS, TEST, TRAIN, Training, make_images, unbroken

FOLDER = Path(tempfile.mkdtemp(prefix="edges"))
# A run that takes longer than this hangs.
TIMEOUT_S = 120.0
PLAIN = Path(__file__).with_name("plain_ddp.py")
# What a run gives: the seconds until it was decided, what happened, in words, and perhaps details.
Run = Callable[[Lab], tuple[Any, ...]]


@cache
def images() -> Path:
    return make_images(FOLDER / "images")


@cache
def whole() -> bytes:
    return unbroken(images(), FOLDER / "unbroken")


def last_line(program: Program) -> str:
    """Its own error, shortened; or the last line."""
    lines = program.output.splitlines() or ["nothing was printed"]
    errors = [line for line in lines if "error: " in line]
    return (errors or lines)[-1].partition("error: ")[2] or lines[-1]


def end_of(programs: list[Program], timeout_s: float = TIMEOUT_S) -> list[int | None]:
    """Exit statuses; None of one that was still running, and was ended."""
    until, statuses = time.monotonic() + timeout_s, []
    for program in programs:
        while not program.ended and time.monotonic() < until:
            time.sleep(0.05)
        hung = not program.ended
        if hung:
            program.end()
        status = program.wait(TIMEOUT_S)
        statuses.append(None if hung else status)
    return statuses


# Silence: a machine freezes, or is unplugged, or goes off.

FAULTS = ("frozen for 10 s", "frozen for good", "unplugged for 15 s", "unplugged for good", "power off")
STARTS = ("launcher", "`--nnodes 1:2 --max-restarts 3`", "four variables")


def silence(who: int, fault: str, start: str, lab: Lab) -> tuple[float, str]:
    elastic, for_good = ":" in start, fault.endswith(("good", "off"))
    timeout_s = SHORT_S if for_good else 60
    flags = ["--timeout-s", str(timeout_s), *(["--max-restarts", "3"] if elastic else [])]
    nnodes = "1:2" if elastic else "2"
    training = Training(lab, images(), *flags, nnodes=nnodes, variables=start == "four variables")
    machine, other = lab.machines[who], lab.machines[1 - who]
    programs = training.start(*lab.machines)
    training.until_gate()
    if "frozen" in fault:
        machine.freeze()
    if "unplugged" in fault or "off" in fault:
        machine.cut()
    if "off" in fault:
        machine.end_all()
    training.open()
    training.open(size=1)

    def mend() -> None:
        machine.resume()
        machine.plug()

    if not for_good:
        time.sleep(float(fault.split()[-2]))
        mend()
    [status] = end_of([programs[1 - who]])
    seconds = time.time() - training.fault_s
    left = len(other.left())
    if for_good:
        mend()
        machine.end_all()
    else:
        end_of(programs)
    said = last_line(programs[1 - who])
    named = any(word in said for word in (machine.name, machine.address))
    if status is None:
        result = "the other hangs"
    elif status == 0:
        result = "goes on"
    else:
        result = f"ends in {SHORT_S} + 20 s" if seconds <= timeout_s + 20 else "ends later"
        result += ", names the machine" if named else f", does not name it: {said}"
        again = training.start(*lab.machines)
        result += "" if end_of(again) == [0, 0] else ", the same command does not go on"
    if left:
        result += f", {left} processes left"
    if status != 0 or not elastic or not for_good:
        result += ", same bits" if training.weights() == whole() else ", other bits"
    return seconds, result


def silences() -> Iterator[tuple[dict[str, Any], int, Run]]:
    for start, fault, who in product(STARTS, FAULTS, (0, 1)):
        name = {"start": start, "fault": fault, "machine": ("master", "other")[who]}
        yield name, 2, partial(silence, who, fault, start)


# Second jobs at the port of one that runs


def second_job(start: str, same: bool, who: int, lab: Lab) -> tuple[float, str]:
    elastic, variables = ":" in start, start == "four variables"
    nnodes = "1:3" if elastic else "2"
    training = Training(lab, images(), nnodes=nnodes, variables=variables)
    programs = training.start(*lab.machines)
    training.until_gate()
    second = Training(lab, images(), nnodes=nnodes, variables=variables)
    if not same:
        second.disk = lambda machine: lab.folder / f"disk{machine.number}" / "another"  # type: ignore[method-assign]
    began_s = time.monotonic()
    [program] = second.start(lab.machines[who])
    [status] = end_of([program])
    seconds = time.monotonic() - began_s
    training.open()
    statuses = end_of(programs)
    said = re.sub(r"\d\d:\d\d:\d\d|process \d+", "...", last_line(program))
    result = "joins or hangs" if status in (0, None) else f"refused: {said}"
    result += ", the first goes on" if statuses == [0, 0] else f", the first ends with {statuses}"
    return seconds, result + (", same bits" if training.weights() == whole() else ", other bits")


def second_jobs() -> Iterator[tuple[dict[str, Any], int, Run]]:
    starts = ("launcher", "`--nnodes 1:3`", "four variables")
    for start, same, who in product(starts, (False, True), (0, 1)):
        job, machine = ("another", "the same")[same], ("master", "other")[who]
        yield {"start": start, "job": job, "machine": machine}, 2, partial(second_job, start, same, who)


# Machines that come to an elastic job and differ, and machines that leave it

COMES = ("another flag", "another data set", "another model's code", "another torch")
LEAVES = ("SIGTERM", "SIGINT", "SIGKILL", "power off")
# These two are made up, in what the newcomer says of itself.
MADE_UP = {
    "another model's code": 'machine["program"]["files"]["own_net.py"] = "0"',
    "another torch": 'machine["equal"]["torch"] = "2.0.0"',
}
PATCHED = """
import sys
from ddp_lib.launch import machines
from ddp_lib.launch.main import main
true = machines.describe_machine
def describe(*args):
    machine = true(*args)
    {}
    return machine
machines.describe_machine = describe
sys.exit(main(sys.argv[1:]))
"""


def comes(how: str, lab: Lab) -> tuple[float, str]:
    m0, m1 = lab.machines
    training = Training(lab, images(), nnodes="1:2")
    [first] = training.start(m0)
    training.until_gate(size=1)
    flags = ["--momentum", "0.8"] if how == "another flag" else []
    data = images()
    if how == "another data set":
        data = lab.folder / "other"
        write_images(data, TRAIN, TEST)
        next((data / "train").glob("*/*.png")).unlink()
    newcomer = Training(lab, data, *flags, nnodes="1:2")
    command = ["ddp-launch", "train", "--nnodes", "1:2", "--rdzv-endpoint", f"{m0.address}:29500"]
    command += ["--run-dir", str(newcomer.disk(m1)), *newcomer.flags]
    if how in MADE_UP:
        command = ["python", "-c", PATCHED.format(MADE_UP[how]), *command[1:]]
    began_s = time.monotonic()
    program = m1.start(command, cwd=ROOT, **newcomer.environment)
    [status] = end_of([program])
    seconds = time.monotonic() - began_s
    training.open(size=1)
    [went_on] = end_of([first])
    starts = (training.disk(m0) / "rank0.jsonl").read_text().count('"event": "start"')
    result = "joins" if status in (0, None) else f"refused: {last_line(program)}"
    return seconds, result + f"; the job ends with {went_on} after {starts} start(s)"


def leaves(how: str, count: int, lab: Lab) -> tuple[float, str]:
    flags = ["--max-restarts", "3", "--timeout-s", str(SHORT_S)]
    training = Training(lab, images(), *flags, nnodes=f"1:{count}")
    training.environment["GATE_STEP_3"] = training.environment["GATE_STEP_2"]
    programs = training.start(*lab.machines)
    training.until_gate(size=count)
    last = lab.machines[-1]
    began_s = time.monotonic()
    if how.startswith("SIG"):
        number = getattr(signal, how)
        if how == "SIGKILL":
            last.end_all()
        else:
            programs[-1].signal(number)
    else:
        last.cut()
        last.end_all()
    for size in range(1, count + 1):
        training.open(size=size)
    statuses = end_of(programs)
    kept = read_run(training.disk(lab.machines[0]))
    complete = int((kept.groupby("step")["samples"].sum() == GLOBAL_BATCH).sum())
    result = f"the others end with {statuses[:-1]}, it with {statuses[-1]}; "
    result += f"{complete} of {STEPS} steps have all samples, once"
    return time.monotonic() - began_s, result


def machines() -> Iterator[tuple[dict[str, Any], int, Run]]:
    for how in COMES:
        yield {"what": f"comes with {how}", "machines": 2}, 2, partial(comes, how)
    for how, count in product(LEAVES, (2, 3)):
        yield {"what": f"leaves by {how}", "machines": count}, count, partial(leaves, how, count)


# Addresses

OWN = ("own address", "127.0.1.1", "nothing", "another interface's")
NETWORKS = ("one interface", "docker0 first", "default route by another", "two networks, one closed")


def address(own: str, network: str, by_name: bool, by_user: bool, lab: Lab) -> tuple[float, str]:
    interface = "eth0"
    if network == "two networks, one closed":
        lab.add_network()
        for machine in lab.machines:
            machine.close_ports(but=29500)
        interface = "eth1"
    for machine in lab.machines:
        elsewhere = f"172.{17 + machine.number}.0.1"
        if network == "docker0 first":
            for words in ("link set eth0 down", "link set eth0 name cable"):
                machine.namespaces.network("ip", *words.split())
        if network in ("docker0 first", "default route by another") or own == "another interface's":
            machine.add_interface("docker0", f"{elsewhere}/16")
        if network == "docker0 first":
            for words in ("link set cable name eth0", "link set eth0 up"):
                machine.namespaces.network("ip", *words.split())
        if network == "default route by another":
            machine.namespaces.network("ip", "route", "add", "default", "dev", "docker0")
        means = {"own address": machine.address, "another interface's": elsewhere, "127.0.1.1": "127.0.1.1"}
        names = {other.name: other.address for other in lab.machines if other is not machine}
        machine.write_hosts({**names, **({machine.name: means[own]} if own in means else {})})
    where = f"{'m0' if by_name else lab.machines[0].address}:29500"
    variables = {"GLOO_SOCKET_IFNAME": interface} if by_user else {}
    flags = f"--nnodes 2 --nproc-per-node 1 --join-timeout-s 10 --rdzv-endpoint {where}".split()
    began_s = time.monotonic()
    programs = [m.start(["ddp-launch", "run", *flags, str(PLAIN)], **variables) for m in lab.machines]
    statuses = end_of(programs)
    seconds = time.monotonic() - began_s
    if statuses == [0, 0]:
        return seconds, "works"
    said = re.sub(r"port \d+", "port ...", last_line(programs[0]))
    return seconds, "hangs" if None in statuses else f"{statuses}: {said}"


def addresses() -> Iterator[tuple[dict[str, Any], int, Run]]:
    for own, network, by_name, by_user in product(OWN, NETWORKS, (False, True), (False, True)):
        name = {"own name means": own, "network": network, "endpoint by": ("address", "name")[by_name]}
        name["GLOO_SOCKET_IFNAME"] = "by the user" if by_user else "not set"
        yield name, 2, partial(address, own, network, by_name, by_user)


# Clocks


def clock(seconds: int, who: int, nnodes: str, lab: Lab) -> tuple[float, str]:
    training = Training(lab, images(), nnodes=nnodes, gate=10**6)
    began_s = time.monotonic()
    programs = []
    for machine in lab.machines:
        command = (
            shifted(seconds, training.command(machine))
            if machine.number == who
            else training.command(machine)
        )
        programs.append(machine.start(command, cwd=ROOT, **training.environment))
        if machine.number == 0:
            programs[0].wait_for("starting", TIMEOUT_S)
    statuses = end_of(programs)
    took_s = time.monotonic() - began_s
    if statuses != [0, 0]:
        return took_s, f"{statuses}: {last_line(programs[0])}"
    world = json.loads((training.disk(lab.machines[0]) / "summary.json").read_text())["world_size"]
    return took_s, f"{world} ranks, {'same' if training.weights() == whole() else 'other'} bits"


def clocks() -> Iterator[tuple[dict[str, Any], int, Run]]:
    for nnodes, who, seconds in product(("2", "1:2"), (0, 1), (-900, -60, -20, 20, 60, 900)):
        name = {"--nnodes": nnodes, "machine": ("master", "other")[who], "its clock, s": seconds}
        yield name, 2, partial(clock, seconds, who, nnodes)


# Kills at random moments

LONG = ("--epochs", "30", "--checkpoint-every-s", "0.2")


def long_training(count: int, nproc: int, lab: Lab) -> Training:
    training = Training(lab, images(), nnodes=str(count), nproc=nproc, gate=10**6)
    training.flags += LONG
    return training


@cache
def undisturbed(count: int, nproc: int) -> tuple[float, bytes]:
    """The seconds that the long training takes, and its final weights."""
    with Lab(count, FOLDER / f"undisturbed{count}.{nproc}") as lab:
        training = long_training(count, nproc, lab)
        began_s = time.monotonic()
        training.start(*lab.machines)
        training.end()
        return time.monotonic() - began_s, training.weights()


def kills(count: int, nproc: int, lab: Lab) -> tuple[float, str, list[str]]:
    """One to three kills, each followed by the same command."""
    rng = random.Random(lab.folder.name)
    lasts_s, weights = undisturbed(count, nproc)
    training = long_training(count, nproc, lab)
    began_s, details = time.monotonic(), []
    for _ in range(rng.randint(1, 3)):
        programs = training.start(*lab.machines)
        who = rng.choice(["a rank", "a launcher", "a machine", "all"])
        when_s, saving = rng.uniform(0, lasts_s), rng.random() < 0.25
        machine, seed = rng.choice(lab.machines), rng.random()
        until = time.monotonic() + when_s
        while time.monotonic() < until and not all(program.ended for program in programs):
            time.sleep(0.01)
        while saving and not all(program.ended for program in programs):
            if any(training.disk(machine).glob(".checkpoint.pt.*.tmp")):
                break
        ranks = [p for p in machine.processes() if p.name().startswith("ddp-rank")]
        if who == "a rank" and ranks:
            random.Random(seed).choice(ranks).kill()
        elif who == "a launcher":
            programs[lab.machines.index(machine)].signal(signal.SIGKILL)
        else:
            for victim in lab.machines if who == "all" else [machine]:
                victim.end_all()
        statuses = end_of(programs)
        details.append(f"{who} after {when_s:.2f} s{' in a save' * saving}: {statuses}")
        left = [process.name() for m in lab.machines for process in m.left()]
        if None in statuses or left:
            return time.monotonic() - began_s, f"hangs, or leaves {left}", details
    statuses = end_of(training.start(*lab.machines))
    seconds = time.monotonic() - began_s
    if any(statuses):
        return seconds, f"the same command ends with {statuses}", details
    return seconds, "same bits" if training.weights() == weights else "other bits", details


def killed() -> Iterator[tuple[dict[str, Any], int, Run]]:
    for count, ranks in product((1, 2), (2, 4)):
        yield {"machines": count, "ranks": ranks}, count, partial(kills, count, ranks // count)


@dataclass(frozen=True)
class Part:
    """good: a regular expression of the outcomes that are as they should be; `finding`: the same in words."""

    cases: Callable[[], Iterator[tuple[dict[str, Any], int, Run]]]
    title: str
    what: str
    good: str
    finding: str


PARTS = {
    "silence": Part(
        silences,
        "A machine falls silent",
        f"The fault comes while both ranks wait in a step. `--timeout-s` is {SHORT_S} where it is for good, "
        "else 60. Seconds: from the fault to the end of the other machine's launcher. Then the same command "
        "was given on both machines, if the run had not gone on.",
        rf"(goes on|ends in {SHORT_S} \+ 20 s, names the machine)(, same bits)?",
        f"the run goes on, or ends within {SHORT_S} + 20 s, names the machine, and leaves nothing; the final "
        "bits are those of an uninterrupted run if the number of ranks is",
    ),
    "jobs": Part(
        second_jobs,
        "A second job at the same port",
        "Seconds: from the start of the second command to its end.",
        r"refused: .*, the first goes on, same bits",
        "the second is refused with a line that says why; the first ends with the bits of an undisturbed run",
    ),
    "machines": Part(
        machines,
        "Machines that come to an elastic job, or leave it",
        "`--nnodes 1:2` or `1:3`. Seconds: until the newcomer had ended, or until all had ended.",
        r"refused: .*; the job ends with 0 after 1 start\(s\)"
        rf"|the others end with \[0(, 0)?\].*; {STEPS} of .*",
        "a machine that differs is refused alone, and the job does not start again; if one leaves, the "
        "others go on, and no sample is lost or repeated",
    ),
    "addresses": Part(
        addresses,
        "Names and interfaces",
        "A plain DDP script of 20 steps by `ddp-launch run`. The second of the two networks is eth1.",
        r"works|.*(set GLOO_SOCKET_IFNAME|does not resolve).*",
        "it works, or the line names the cause: ports that are closed on the network in use, or a name that "
        "the master itself cannot resolve",
    ),
    "clocks": Part(
        clocks,
        "Clocks that differ",
        "torch's view of the time on one machine is shifted.",
        r"2 ranks, same bits",
        "both ranks train, with the bits of equal clocks",
    ),
    "kills": Part(
        killed,
        "Kills at random moments",
        "SIGKILL to a rank, a launcher, all of a machine, or all, one to three times in a run, at moments "
        "between the start and the end of the training; one in four waits for the next moment at which a "
        "checkpoint is being written. Each time, the same command is given again. Seconds: of the whole run.",
        "same bits",
        "the training ends with the bits of an undisturbed run, and nothing hangs or is left",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--runs", type=int, default=3, help="runs of each case")
    parser.add_argument("--only", default="", metavar="REGEX", help="only cases whose names match")
    parser.add_argument("--seed", type=int, default=0, help="decides the order of the runs")
    parser.add_argument("--fresh", action="store_true", help="do not go on with the saved runs")
    options = parser.parse_args()
    if lacks := missing():
        raise SystemExit(f"benchmarks/edges.py: {lacks}")
    part = PARTS[options.part]
    path = RESULTS / f"edges_{options.part}.json"
    saved = json.loads(path.read_text()) if path.exists() and not options.fresh else {}
    rows: list[dict[str, Any]] = saved.get("rows", [])
    done: dict[str, list[Any]] = saved.get("single runs", {})
    todo = [(name, count, run) for name, count, run in part.cases() for _ in range(options.runs)]
    random.Random(options.seed).shuffle(todo)
    for number, (name, count, run) in enumerate(todo):
        key = json.dumps(name)
        if len(done.setdefault(key, [])) >= options.runs or not re.search(options.only, key):
            continue
        with Lab(count, FOLDER / f"{options.part}{number}") as lab:
            try:
                done[key].append(run(lab))
            except Exception as error:  # the table says so, and the next run comes
                done[key].append((0.0, f"the script fails: {type(error).__name__}: {str(error)[:200]}"))
        print(f"{number + 1} of {len(todo)}: {key}: {done[key][-1]}", flush=True)
        order = [json.dumps(name) for name, _, _ in part.cases()]
        rows = [{**json.loads(key), **_summary(done[key])} for key in order if done.get(key)]
        outcomes = [run[1] for runs in done.values() for run in runs]
        good = sum(bool(re.fullmatch(part.good, outcome)) for outcome in outcomes)
        finding = f"In {good} of {len(outcomes)} runs (of {len(rows)} cases) {part.finding}."
        result = save(f"edges_{options.part}", part.title, part.what, rows, [finding])
        path.write_text(json.dumps(result | {"single runs": done}, indent=1) + "\n")
    if rows:
        print(table(rows))


def _summary(runs: list[Any]) -> dict[str, str]:
    """Equal outcomes are counted; the seconds of all runs stand beside."""
    counts = Counter(run[1] for run in runs)
    words = [f"{number} of {len(runs)}: {outcome}" for outcome, number in counts.most_common()]
    return {"outcome": "; ".join(words), "seconds": ", ".join(f"{run[0]:.1f}" for run in runs)}


if __name__ == "__main__":
    main()
