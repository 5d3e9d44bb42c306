"""What the hosts of a job must have in common, and what each must have: plain comparisons of what probes found."""

from dataclasses import dataclass
from typing import Any

Facts = dict[str, Any]  # as probe.facts gives it

LARGEST_SKEW_SECONDS = 1.0
LEAST_FREE_BYTES = 1 << 30
SAME_ENVIRONMENT = "run 'bash launch/environment.sh' there, with the same checkout and path as here"
SAME_FILES = "share one file system, or copy it there (rsync -a)"


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


def compare(host: str, found: Facts, here: Facts) -> list[Failure]:
    """What differs on a host from the machine that launches, where it must not."""
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


def check_interface(host: str, route: dict[str, Any], master: str, wished: str | None, found: Facts) -> list[Failure]:
    """Whether a host reaches the master, over the interface that GLOO_SOCKET_IFNAME wishes for, if it does."""
    if wished is not None and wished not in found["interfaces"]:
        seen = f"GLOO_SOCKET_IFNAME={wished}, but there are {', '.join(sorted(found['interfaces']))}"
        return [Failure(host, "interface", seen, "one that exists", "leave it out: the one to the master is taken")]
    if route.get("interface") is None:
        seen = f"no route to {master} ({route.get('error', 'from no known interface')})"
        return [Failure(host, "interface", seen, "a network that reaches the first host", "see 'ip route' there")]
    return []
