"""Seconds of collectives: against published anchors, and what a number of hosts does to them."""

import pytest

from megarec.distributed.topology import Topology
from megarec.planning.hardware import load_hardware
from megarec.planning.links import message_seconds, ring_seconds
from megarec.planning.traffic import Message

H100 = load_hardware("h100")
B, F, N = 16_384, 26, 128


def all_to_all(group: str, total: float, ranks: int, remote: int) -> Message:
    """Equal blocks of a message of `total` bytes for each of `ranks` ranks, `remote` of them on other hosts."""
    block = total / ranks
    return Message(
        group, "all_to_all x", "float16", "forward", round(block * (ranks - 1)), round(block * remote), remote
    )


def forward_ms(compression: float | None, hosts: int = 8, local: int = 8) -> float:
    """The forward all-to-all of embeddings in fp16 on 64 H100: flat, or SPTT with tower modules."""
    whole, topology = 2.0 * B * F * N, Topology(0, hosts * local, local, 1)
    if compression is None:
        messages = [all_to_all("world", whole, hosts * local, (hosts - 1) * local)]
    else:
        messages = [all_to_all("tower", whole, local, 0), all_to_all("peer", whole / compression, hosts, hosts - 1)]
    return 1e3 * sum(message_seconds(message, topology, H100) for message in messages)


ANCHORS = {None: 2.21, 1: 2.45, 2: 1.43, 4: 0.92, 8: 0.67, 16: 0.54}


@pytest.mark.parametrize("compression", ANCHORS)
def test_the_published_anchor(compression: float | None) -> None:
    """64 H100, F = 26, N = 128, fp16, B = 16,384; the anchor has a delay of a host's all-to-all more, of 50 us."""
    assert forward_ms(compression) + 0.05 == pytest.approx(ANCHORS[compression], rel=0.03)


def test_rings() -> None:
    """An all-gather of 1 GB over 2 hosts of 8 runs at about 390 GB/s of bus bandwidth."""
    assert ring_seconds(1e9, 2, 8, H100) == pytest.approx(1e9 / 390e9 + 75e-6, rel=0.01)
    assert ring_seconds(0, 2, 8, H100) == 0
    assert ring_seconds(1e6, 1, 8, H100) == pytest.approx(50e-6 + 1e6 / 371e9)


def test_all_reduces_are_rings() -> None:
    topology = Topology(0, 16, 8, 1)
    inside = Message("tower", "all_reduce tower gradients", "float32", "backward", 1000, 0, 0)
    across = inside._replace(group="world", cross_host_bytes=500, pairs=8)
    assert message_seconds(inside, topology, H100) == ring_seconds(1000, 1, 8, H100)
    assert message_seconds(across, topology, H100) == ring_seconds(1000, 2, 8, H100)


def test_ranks_of_an_even_job_wait_for_the_mean() -> None:
    """A rank that sends little receives more."""
    little = Message("world", "all_to_all x", "float16", "forward", 1000, 800, 8, mean=10**6, mean_across=8 * 10**5)
    even = Message("world", "all_to_all x", "float16", "forward", 10**6, 8 * 10**5, 8)
    assert message_seconds(little, Topology(0, 16, 8, 1), H100) == message_seconds(even, Topology(0, 16, 8, 1), H100)


@pytest.mark.parametrize("machine", ["l40s", "a40", "h100-pcie"])
def test_no_byte_leaves_a_host_of_cards_faster_than_it_reaches_the_next_card(machine: str) -> None:
    hardware, total = load_hardware(machine), 8e7
    inside = message_seconds(all_to_all("world", total, 8, 0), Topology(0, 8, 8, 1), hardware)
    across = message_seconds(all_to_all("world", total, 8, 4), Topology(0, 8, 4, 1), hardware)
    assert across + 50e-6 >= inside  # an all-to-all over two hosts starts 13 us earlier
    assert ring_seconds(1e8, 2, 4, hardware) > ring_seconds(1e8, 1, 8, hardware)


def test_gloo_sums_by_an_all_reduce() -> None:
    """On a CPU a reduce-scatter takes two passes of a ring, an all-gather one; on accelerators both are exchanges."""
    cpu, topology = load_hardware("epyc-2-ranks"), Topology(0, 2, 2, 1)
    sums, gathered = (
        Message("world", f"{op} embeddings", "float32", "forward", 1_000_000, 0, 0)
        for op in ("reduce_scatter", "all_gather")
    )
    assert cpu.host_ring_us is not None and cpu.host_ring_gb_s is not None
    delay, seconds = 1e-6 * cpu.host_ring_us.value, 1e-3 / cpu.host_ring_gb_s.value
    assert message_seconds(gathered, topology, cpu) == pytest.approx(delay + seconds)
    assert message_seconds(sums, topology, cpu) == pytest.approx(delay + 2 * seconds)
    assert message_seconds(sums, topology, H100) == message_seconds(gathered, topology, H100)
