"""What ended a job, from the reports of its ranks and hosts: the root cause first."""

import re

from megarec.errors import PREEMPTED, STOPPED, USER_MISTAKE
from megarec.launching.exit_report import Outcome
from megarec.launching.hosts import Host
from megarec.launching.supervise import Record

SSH_LOST = 255


def failure_report(record: Record, hosts: list[Host], addresses: dict[str, str]) -> tuple[int, list[str]]:
    """The job's exit code and what to say on standard error: the cause first, then what followed from it.

    Args:
        addresses: by host, to find the hosts of addresses that libraries name.
    """
    world_size = sum(host.slots for host in hosts)
    if not record.failed() and len(record.outcomes) == world_size:
        return 0, []
    failures = [outcome for outcome in record.outcomes.values() if outcome.code]
    own = [outcome for outcome in failures if not outcome.lost]
    lost = [host for host in _without_word(record, hosts) if record.host_codes[host.name] == SSH_LOST]
    if lost and own and all(outcome.code == PREEMPTED for outcome in own):
        # Ranks that lose their connection are asked to end, and the others too: a consequence, not a signal.
        return SSH_LOST, _lines("error", _of_hosts(record, lost) + _grouped(own, hosts, addresses))
    for code, word in ((USER_MISTAKE, "error"), (PREEMPTED, "pre-empted")):
        if own and all(outcome.code == code for outcome in own):
            return code, [f"{word}: {line}" for line in _grouped(own, hosts, addresses)]
    lines = _grouped(own, hosts, addresses) + _of_hosts(record, hosts)
    lines += _grouped([outcome for outcome in failures if outcome.lost], hosts, addresses)
    if not own:
        lines += _silent(record, hosts)
    lines = lines or [f"the launcher ended with exit code {record.launcher_code} and no rank lines why"]
    if any(outcome.code == STOPPED for outcome in own):
        return STOPPED, _lines("error", lines)
    codes = [outcome.code for outcome in (*own, *failures)] + [*record.host_codes.values(), record.launcher_code]
    code = next((code for code in codes if 0 < code < 256), 1)
    return code, _lines("error", lines)


def _lines(word: str, lines: list[str]) -> list[str]:
    return [f"{word}: {lines[0]}", *(f"  then: {line}" for line in lines[1:])]


def _grouped(outcomes: list[Outcome], hosts: list[Host], addresses: dict[str, str]) -> list[str]:
    """A line a cause, in order of arrival."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_named(outcome.cause, hosts, addresses), []).append(outcome)
    world_size = sum(host.slots for host in hosts)
    return [_line(cause, outcomes, world_size) for cause, outcomes in groups.items()]


def _line(cause: str, outcomes: list[Outcome], world_size: int) -> str:
    if len(outcomes) == world_size > 1:
        return f"every rank: {cause}"
    by_host: dict[str, list[str]] = {}
    for outcome in sorted(outcomes, key=lambda o: o.rank):
        by_host.setdefault(outcome.host, []).append(str(outcome.rank))
    who = ", ".join(f"rank{'s' * (len(r) > 1)} {' and '.join(r)} on {host}" for host, r in by_host.items())
    return f"{who}: {cause}"


def _named(cause: str, hosts: list[Host], addresses: dict[str, str]) -> str:
    for host in hosts:
        address = addresses.get(host.name)
        if address:
            cause = re.sub(rf"(?<![\d.]){re.escape(address)}(?![\d.])", f"{host.name} ({host.ranks})", cause)
    return cause


def _of_hosts(record: Record, hosts: list[Host]) -> list[str]:
    """Hosts whose launcher or connection ended before any of their ranks reported."""
    return [
        f"{host.ranks} on {host.name}: no report; {_meaning(record.host_codes[host.name])}"
        for host in _without_word(record, hosts)
    ]


def _without_word(record: Record, hosts: list[Host]) -> list[Host]:
    return [host for host in hosts if host.name in record.host_codes and not _has_word(record, host)]


def _silent(record: Record, hosts: list[Host]) -> list[str]:
    """Hosts that were still there for the launcher, but whose ranks reported nothing."""
    silent = [host for host in hosts if host.name not in record.host_codes and not _has_word(record, host)]
    lines = [f"{host.ranks} on {host.name}: no report; its link may be down, or its ranks hang" for host in silent]
    if not record.waited:  # else ranks that did not report their wait in time might be blamed
        return lines
    for host in hosts:
        missing = [str(rank) for rank in _ranks(host) if rank not in record.outcomes]
        if _has_word(record, host) and missing:
            who = f"rank{'s' * (len(missing) > 1)} {' and '.join(missing)} on {host.name}"
            lines.append(f"{who}: no report, while the others waited; may hang outside of NCCL")
    return lines


def _has_word(record: Record, host: Host) -> bool:
    return any(rank in record.outcomes for rank in _ranks(host))


def _ranks(host: Host) -> range:
    return range(host.first_rank, host.first_rank + host.slots)


def _meaning(code: int) -> str:
    if code == SSH_LOST:
        return "its ssh connection failed or was lost (exit code 255)"
    number = 256 - code if code > 192 else code - 128  # a launcher that ends with -9 shows as 247
    if 0 < number < 65:
        return f"its launcher ended with exit code {code} (signal {number})"
    return f"its launcher ended with exit code {code}"
