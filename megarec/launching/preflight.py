"""Checks of every host before a job starts, over ssh and in parallel: each failure is one line with its remedy.

Requirements within and across hosts are plain comparisons of the probes' findings.
"""

import os
import re
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from megarec.config.deepspeed import micro_batch_size
from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.errors import UserError
from megarec.files import read_object
from megarec.launching import probe
from megarec.launching.hosts import Host, read_hostfile
from megarec.launching.probe import GPU_FACTS
from megarec.launching.probe_client import Session, Sessions

Facts = dict[str, Any]  # as probe.facts gives it

LARGEST_SKEW_SECONDS = 1.0
LEAST_FREE_BYTES = 1 << 30
SAME_ENVIRONMENT = "run 'bash launch/environment.sh' there, with the same checkout and path as here"
SAME_FILES = "share one file system, or copy it there (rsync -a)"
ROOT = Path(__file__).resolve().parents[2]  # a checkout, or what the package is installed in
CLOCK_READINGS = 3
LARGEST_SHARE_OF_GPU_IN_USE = 0.1
LEAST_SHARED_MEMORY = 1 << 30  # NCCL takes tens of MiB a rank of it, and reports only "unhandled system error"


@dataclass(frozen=True)
class Failure:
    """One thing that is wrong on one host."""

    host: str
    check: str
    seen: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.host}: {self.check}: {self.seen}; expected {self.expected}; {self.remedy}"


def compare_hosts(host: str, found: Facts, here: Facts) -> list[Failure]:
    """Forbidden differences between a host and the launching machine."""
    if not found["directory"]:
        return [Failure(host, "directory", "the working directory is not there", "it to be as here", SAME_FILES)]
    failures = []
    if found["python"] != here["python"]:
        failures.append(Failure(host, "python", found["python"], here["python"], SAME_ENVIRONMENT))
    if found["code"] != here["code"]:
        seen = "no megarec package" if found["code"] is None else f"another version ({found['code'][:12]})"
        remedy = "git pull the same commit on every host, or share one checkout"
        failures.append(Failure(host, "code", seen, f"the files of this machine ({here['code'][:12]})", remedy))
    for name, version in here["packages"].items():
        other = found["packages"].get(name)
        if other != version:
            failures.append(
                Failure(host, "packages", f"{name} {other or 'missing'}", version or "none, as here", SAME_ENVIRONMENT)
            )
    for path, digest in here["files"].items():
        other = found["files"].get(path)
        if other != digest:
            seen = f"{path} {'cannot be read' if other is None else 'has other content'}"
            failures.append(Failure(host, "files", seen, "the same content as here", SAME_FILES))
    return failures


def check_output(host: str, state: dict[str, Any], output: str) -> list[Failure]:
    """Whether train.output_dir can be written, with room for checkpoints."""
    if not state["writable"]:
        remedy = "change its owner, or choose another train.output_dir"
        return [Failure(host, "disk", f"{state['path']} cannot be written", f"a place for {output}", remedy)]
    if state["free"] < LEAST_FREE_BYTES:
        seen = f"{state['free'] / 2**20:,.0f} MiB free at {state['path']}"
        expected = f"at least {LEAST_FREE_BYTES / 2**20:,.0f} MiB for train.output_dir"
        return [Failure(host, "disk", seen, expected, "free some, or choose another train.output_dir")]
    return []


def check_gpus(host: Host, found: Facts, first: Facts) -> list[Failure]:
    """Whether a host's GPUs suffice for its ranks, are free and sound, and match the first host's; it may have none.

    Args:
        first: the facts of the first host of the job.
    """
    here, there = found["gpus"], first["gpus"]
    if "error" in here:
        remedy = "reboot it, or leave it out of the hostfile"
        return [Failure(host.name, "gpus", f"nvidia-smi: {here['error']}", "a driver that answers", remedy)]
    if not here["found"] and not there["found"]:
        return []
    failures = []

    def fail(seen: str, expected: str, remedy: str) -> None:
        failures.append(Failure(host.name, "gpus", seen, expected, remedy))

    if len(here["found"]) < host.slots:
        fail(f"{len(here['found'])} GPUs", f"at least slots={host.slots}", "lower slots in the hostfile, or repair it")
    for what in ("name", "driver_version"):
        own, others = ({gpu[what] for gpu in side["found"]} for side in (here, there))
        if own and others and own != others:
            seen, expected = (", ".join(sorted(kinds)) for kinds in (own, others))
            fail(f"{what} {seen}", f"{expected}, as the first host", "use the same on all hosts")
    for number, gpu in enumerate(here["found"]):
        used, total, errors = (gpu[what] for what in ("memory.used", "memory.total", GPU_FACTS[-1]))
        if used.isdigit() and total.isdigit() and int(used) > LARGEST_SHARE_OF_GPU_IN_USE * int(total):
            fail(f"GPU {number} has {used} of {total} MiB in use", "a free one", "end what runs there (nvidia-smi)")
        if errors.isdigit() and int(errors):
            fail(f"GPU {number} has {errors} uncorrected memory errors", "none", "reset or replace it")
    shared = found["shared_memory"]
    if len(here["found"]) > 1 and shared is not None and shared < LEAST_SHARED_MEMORY:
        seen, expected = f"/dev/shm of {shared / 2**20:,.0f} MiB", f"{LEAST_SHARED_MEMORY / 2**20:,.0f} MiB for NCCL"
        fail(seen, expected, "mount it larger (docker --shm-size)")
    if len(found["infiniband"]) != len(first["infiniband"]):
        seen, expected = (f"{len(side['infiniband'])} InfiniBand devices" for side in (found, first))
        fail(seen, f"{expected}, as the first host", "check its adapters (ibstat)")
    return failures


def check_clock(host: str, readings: list[tuple[float, float, float]]) -> list[Failure]:
    """Whether a host's clock agrees with this machine's.

    Args:
        readings: (here before, there, here after), in seconds: the true difference lies within the two ends.
    """
    before, there, after = min(readings, key=lambda reading: reading[2] - reading[0])
    skew = there - (before + after) / 2
    if abs(skew) - (after - before) / 2 <= LARGEST_SKEW_SECONDS:
        return []
    seen = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine"
    expected = f"at most {LARGEST_SKEW_SECONDS:g} s"
    return [Failure(host, "clock", seen, expected, "set it: 'chronyc makestep' or 'timedatectl set-ntp true'")]


def check_interface(
    host: str, route: dict[str, Any], master: str, requested: str | None, found: Facts
) -> list[Failure]:
    """Whether a host reaches the master, over the interface that GLOO_SOCKET_IFNAME names, if it is set."""
    if requested is not None and requested not in found["interfaces"]:
        seen = f"GLOO_SOCKET_IFNAME={requested}, but there are {', '.join(sorted(found['interfaces']))}"
        return [Failure(host, "interface", seen, "one that exists", "leave it out: the one to the master is taken")]
    if route.get("interface") is None:
        seen = f"no route to {master} ({route.get('error', 'from no known interface')})"
        return [Failure(host, "interface", seen, "a network that reaches the first host", "see 'ip route' there")]
    return []


@dataclass(frozen=True)
class Job:
    """The job: what to start, and where.

    Attributes:
        directory: the working directory, the same on every host.
        master: address of the first host; None: as the other hosts resolve its name.
        interface: requested for all hosts (GLOO_SOCKET_IFNAME), if any.
    """

    hosts: list[Host]
    config: RunConfig
    files: list[str]
    directory: Path
    master: str | None
    port: int
    interface: str | None = None


@dataclass
class Report:
    """The preflight's findings.

    Attributes:
        master: address of the first host, for all.
        addresses, interfaces: by host, those that reach the master.
    """

    failures: list[Failure] = field(default_factory=list)
    master: str = ""
    addresses: dict[str, str] = field(default_factory=dict)
    interfaces: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def plan_job(
    hostfile: Path, config_path: Path, overrides: list[str], master: str | None, port: int, interface: str | None
) -> Job:
    """Read and check what needs no other host.

    Raises:
        UserError: the hostfile, the config, or how they fit together.
    """
    hosts = read_hostfile(hostfile)
    config = load_config(config_path, overrides)
    _check_sizes(hosts, config, str(hostfile))
    return Job(hosts, config, files_of(config_path, config), Path.cwd(), master, port, interface)


def without(job: Job, lost: set[str]) -> Job:
    """The job on its other hosts, at least one; an address that was given for the first host goes with that host.

    Raises:
        UserError: the run cannot be divided among them.
    """
    hosts: list[Host] = []
    for host in job.hosts:
        if host.name not in lost:
            hosts.append(replace(host, first_rank=sum(other.slots for other in hosts)))
    _check_sizes(hosts, job.config, "the hosts that remain")
    return replace(job, hosts=hosts, master=None if job.hosts[0].name in lost else job.master)


def _check_sizes(hosts: list[Host], config: RunConfig, where: str) -> None:
    slots, world_size = hosts[0].slots, sum(host.slots for host in hosts)
    per_host = config.parallel.ranks_per_host or slots
    if world_size % per_host:
        raise UserError(
            f"parallel.ranks_per_host={per_host} does not divide the {world_size} ranks of {where} "
            f"({len(hosts)} hosts x slots={slots})"
        )
    if per_host % config.parallel.tensor:
        raise UserError(
            f"parallel.tensor={config.parallel.tensor} does not divide the {per_host} ranks of a host "
            f"({where}: slots={slots})"
        )
    micro_batch_size(config, world_size)


def files_of(config_path: Path, config: RunConfig) -> list[str]:
    """Files that every host must hold with the same content: the config, JSONs it takes in, the data's schema."""
    raw = read_object(config_path, "the JSON of a run")
    named = [value for value in raw.values() if isinstance(value, str)]
    parallel = raw.get("parallel")
    if isinstance(parallel, dict) and isinstance(parallel.get("towers"), str):
        named.append(parallel["towers"])
    included = [str(config_path.parent / name) for name in named]
    return [str(config_path), *included, str(Path(config.data.path) / "schema.json")]


def check_hosts(job: Job) -> Report:
    """All checks that need the hosts; those that depend on a failed one are left out."""
    report = Report()
    names = [host.name for host in job.hosts]
    arguments: dict[str, Any] = {
        "directory": str(job.directory),
        "root": str(ROOT),
        "files": job.files,
        "packages": required_packages(),
        "output": job.config.train.output_dir,
        "peers": names,
    }
    here = probe.facts(**arguments)
    missing = [path for path, digest in here["files"].items() if digest is None]
    if missing:
        remedy = "megarec prepare writes data" if missing[0].endswith("schema.json") else "see the run's config"
        raise UserError(f"{missing[0]}: cannot be read; {remedy}")
    with Sessions(names) as sessions:
        report.facts = sessions.ask("facts", lambda host: arguments)
        for host, found in report.facts.items():
            report.failures += compare_hosts(host, found, here)
            report.failures += check_output(host, found["output"], job.config.train.output_dir)
        if names[0] in report.facts and os.environ.get("DS_ACCELERATOR") != "cpu":
            first = report.facts[names[0]]
            for place in job.hosts:
                if place.name in report.facts:
                    report.failures += check_gpus(place, report.facts[place.name], first)
        for host, readings in sessions.map(_read_clock).items():
            report.failures += check_clock(host, readings)
        _check_network(job, sessions, report)
        report.failures += [_unreachable(host, why) for host, why in sessions.unanswered.items()]
    order = {name: place for place, name in enumerate(names)}
    report.failures.sort(key=lambda failure: order[failure.host])
    return report


def _read_clock(host: str, session: Session) -> list[tuple[float, float, float]]:
    readings = []
    for _ in range(CLOCK_READINGS):
        before = time.time()
        there = session.ask("clock")["time"]
        readings.append((before, there, time.time()))
    return readings


def _check_network(job: Job, sessions: Sessions, report: Report) -> None:
    """Routes and interfaces, then a connection from every host to the master port and to a free port of every host."""
    first = job.hosts[0].name
    if first not in report.facts:
        return
    master = job.master or _address_of_first(job, report)
    if master is None:
        return
    report.master = master
    for host, route in sessions.ask("route", lambda host: {"address": master}).items():
        failures = check_interface(host, route, master, job.interface, report.facts[host])
        report.failures += failures
        if not failures:
            report.addresses[host] = route["address"]
            report.interfaces[host] = job.interface or route["interface"]
    targets = _listen_everywhere(job, sessions, report, master)
    reachable = list(targets.values())
    tried = sessions.ask("connect", lambda host: {"targets": reachable})
    for host, answer in tried.items():
        for target, error in zip(targets, answer["tried"], strict=True):
            if error is not None:
                address, port = targets[target]
                seen = f"{target} at {address} port {port} cannot be reached: {error}"
                remedy = "open TCP ports among the hosts (firewall), or name another interface or --master-addr"
                report.failures.append(Failure(host, "port", seen, "a connection", remedy))


def _address_of_first(job: Job, report: Report) -> str | None:
    """The first host's address as the other hosts see it: on itself its name is often a loopback address."""
    first = job.hosts[0].name
    asked = [host.name for host in job.hosts[1:] if host.name in report.facts] or [first]
    seen = {host: report.facts[host]["addresses"][first] for host in asked}
    for host, address in seen.items():
        if address is None:
            remedy = "fix /etc/hosts or DNS there, or give --master-addr"
            report.failures.append(Failure(host, "address", f"cannot resolve {first}", "an address", remedy))
    return next((address for address in seen.values() if address is not None), None)


def _listen_everywhere(job: Job, sessions: Sessions, report: Report, master: str) -> dict[str, tuple[str, int]]:
    """Open the master port on the first host and a free one on every host; returns where, by what to call it."""
    first = job.hosts[0].name
    targets = {}
    opened = sessions.map(
        lambda host, session: session.ask("listen", address=master, port=job.port) if host == first else {}
    )
    if "port" in opened.get(first, {}):
        targets[f"the master port of {first}"] = (master, job.port)
    elif first in opened:
        seen = f"port {job.port} of {master}: {opened[first]['error']}"
        remedy = "end what uses it, or choose another with --master-port (or --master-addr)"
        report.failures.append(Failure(first, "port", seen, "a free port", remedy))
    own = {host: address for host, address in report.addresses.items() if host in opened}
    free = sessions.map(lambda host, session: session.ask("listen", address=own[host], port=0) if host in own else {})
    targets |= {host: (own[host], answer["port"]) for host, answer in free.items() if "port" in answer}
    return targets


def _unreachable(host: str, why: str) -> Failure:
    if "No such file or directory" in why or "not found" in why:
        expected, remedy = "the Python of this machine's environment", "run 'bash launch/environment.sh' there"
    else:
        expected, remedy = (
            "ssh without a password",
            f"try 'ssh {host} true', see ssh-copy-id, or take it off the hostfile",
        )
    return Failure(host, "ssh", why, expected, remedy)


def required_packages() -> list[str]:
    """Names of the requirements, those of the checkout or else of the installed package, with either FBGEMM."""
    pinned = ROOT / "requirements.txt"
    if pinned.is_file():
        lines = [*pinned.read_text().splitlines(), "fbgemm-gpu"]
    else:
        lines = [line for line in requires("megarec") or [] if "extra" not in line]
        lines += ["fbgemm-gpu-cpu", "fbgemm-gpu"]
    return [re.split(r"[=<>~\[ ]", line)[0] for line in lines if line and not line.startswith("#")]


def table(job: Job, report: Report) -> list[str]:
    """The summary of a passed preflight."""
    rows = [("host", "address", "interface", "ranks", "free disk")]
    for host in job.hosts:
        free = report.facts[host.name]["output"]["free"] / 2**30
        where = (report.addresses[host.name], report.interfaces[host.name])
        rows.append((host.name, *where, host.ranks.split()[1], f"{free:,.0f} GiB"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
