"""Seconds of collectives: against published anchors, and what a number of hosts does to them."""

import math

import pytest

from megarec.distributed.topology import Topology
from megarec.planning.hardware import load_hardware
from megarec.planning.links import all_reduce_seconds, message_seconds, ring_seconds
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


def nccl_us(hosts: int, steps: int, protocol: str) -> float:
    """Of a ring of so many steps, or of a tree (0 steps), over H100 hosts of 8: NCCL's own formula."""
    base, inside, network = {"simple": (8.4, 3.4, 14.0), "ll128": (14.0, 1.9, 4.0), "tree": (14.0, 1.25, 8.5)}[protocol]
    if not steps:
        return base + 2 * (7 * inside + math.log2(hosts) * network)
    return base + (steps - (hosts - 1)) * inside + (hosts - 1) * network


@pytest.mark.parametrize("hosts", [2, 4, 8, 16, 32])
def test_delays_are_those_by_which_nccl_chooses(hosts: int) -> None:
    """A gather takes the faster of two protocols, an all-reduce of few bytes a tree, whose levels grow slowly."""
    steps = 8 * hosts - 1
    simple, ll128 = (nccl_us(hosts, steps, name) for name in ("simple", "ll128"))
    assert 1e6 * ring_seconds(1, hosts, 8, H100) == pytest.approx(ll128, rel=1e-3)
    assert 1e6 * ring_seconds(1e10, hosts, 8, H100) == pytest.approx(simple + 1e10 / 390e3, rel=0.01)
    tree = 1e6 * all_reduce_seconds((1, 1), hosts, 8, H100)
    assert tree == pytest.approx(nccl_us(hosts, 0, "tree"), rel=1e-3)
    assert 1e6 * all_reduce_seconds((1e10, 1e10), hosts, 8, H100) == pytest.approx(
        2 * (simple + 1e10 / 390e3), rel=0.01
    )


def test_a_large_all_reduce_is_two_passes_of_a_ring() -> None:
    topology = Topology(0, 16, 8, 1)
    inside = Message("tower", "all_reduce tower gradients", "float32", "backward", 1000, 0, 0)
    assert message_seconds(inside, topology, H100) == ring_seconds(1000, 1, 8, H100)
    across = inside._replace(group="world", bytes=2 * 10**9, cross_host_bytes=10**9, pairs=8)
    assert message_seconds(across, topology, H100) == 2 * ring_seconds(1e9, 2, 8, H100)
    machine = H100.model_copy(update={"tree_us": None, "ring_ll128_us": None})
    assert message_seconds(across._replace(bytes=1000), topology, machine) == 2 * ring_seconds(500, 2, 8, machine)


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


def test_a_ring_of_tensor_parallel_ranks_leaves_the_links_that_join_72() -> None:
    """20 hosts of 4: NVLink joins 18 of them, however many rings share their ranks; 10 hosts' networks are in it."""
    gb200 = load_hardware("gb200")
    assert ring_seconds(1e8, 20, 1, gb200, rings=4) == pytest.approx(2 * 37.3e-6 + 1e8 / (10 * 50e9 * 0.975))
    assert all_reduce_seconds((1e8, 1e8), 20, 1, gb200, rings=4) == 2 * ring_seconds(1e8, 20, 1, gb200, rings=4)
    assert ring_seconds(1e8, 18, 1, gb200, rings=4) == pytest.approx(50e-6 + 1e8 / 722e9), "all of them are joined"


def test_72_networks_are_no_faster_than_the_link_to_the_next_rank() -> None:
    gb200 = load_hardware("gb200")
    assert ring_seconds(1e9, 2, 72, gb200) == pytest.approx(2 * 37.3e-6 + 1e9 / 722e9)
    assert ring_seconds(1e9, 2, 72, gb200) > ring_seconds(1e9, 1, 72, gb200)


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
