"""Seconds of a collective on the links of a machine: each formula once, its constants in the machine's JSON.

    all-to-all in a host       delay + bytes / (link x ramp(bytes a pair))
    all-to-all over H hosts    delay(H) + bytes to other hosts / (network x (1 - incast / H) x ramp(bytes a pair)),
                               or its bytes inside the hosts at the link's rate, whichever takes longer; where they
                               share a fabric (PCIe) both, and those to other hosts no faster than the link
    ring over H hosts          H x delay + bytes / (share x the network of all ranks of a host that are in the ring),
                               no faster than a ring in a host where they share a fabric; or by NCCL's protocol of
                               less delay (LL128) at 0.92 of the rate, whichever is faster
    all-reduce over H hosts    two such passes, or a tree of log2(H) levels at 0.86 of a ring's rate, as NCCL chooses

Hosts whose ranks the links of a host join (hardware.scale_up_ranks: NVL72) count as one host here.

After fits of nccl-tests (hardware/h100.json). NCCL sends an all-to-all over NVLink to the rank whose NIC is on the rail
of the receiver (PXN), so that a flat all-to-all loses nothing by its many pairs but their smaller messages: the ramp.
"""

from collections.abc import Sequence

from megarec.distributed.topology import Topology
from megarec.planning.hardware import Hardware, needed
from megarec.planning.traffic import Message

LL128_SHARE, TREE_SHARE = 0.92, 0.92 * 0.9375
"""Of a ring's rate (NCCL 2.30, src/graph/tuning.cc: 120 of 128 bytes are data; a tree reaches 0.92 of a ring)."""


def message_seconds(message: Message, topology: Topology, hardware: Hardware) -> float:
    """Of a message of the sparse side.

    Raises:
        UserError: a figure that it needs is not known of this machine.
    """
    if message.op.startswith("all_reduce"):
        joined = linked_hosts(topology.hosts, topology.ranks_per_host, hardware) == 1
        if joined or not message.cross_host_bytes:
            return ring_seconds(message.bytes, 1, topology.ranks_per_host, hardware)
        halves = message.bytes / 2, message.bytes / 2
        return all_reduce_seconds(halves, topology.hosts, topology.ranks_per_host, hardware)
    ring = message.op.startswith(("reduce_scatter", "all_gather"))
    if ring and hardware.device == "cpu" and not message.cross_host_bytes:
        passes = 2 if message.op.startswith("reduce_scatter") else 1  # gloo's is an all-reduce
        return ring_seconds(passes * message.bytes, 1, topology.ranks_per_host, hardware)
    if message.mean:  # of tables that lie evenly; a rank that sends little receives more
        message = message._replace(bytes=message.mean, cross_host_bytes=message.mean_across)
    hosts = linked_hosts(topology.hosts, topology.ranks_per_host, hardware)
    if hosts < topology.hosts:
        far = (topology.hosts - topology.hosts // hosts) / (topology.hosts - 1)
        across, pairs = far * message.cross_host_bytes, max(1, round(far * message.pairs))
        message = message._replace(cross_host_bytes=round(across) if hosts > 1 else 0, pairs=pairs)
    inside = inside_seconds(message.bytes - message.cross_host_bytes, topology, hardware)
    if not message.cross_host_bytes:
        return _us(needed(hardware, "host_link_us")) + inside
    across = across_seconds(message, hosts, hardware)
    if hardware.one_fabric:  # what leaves the host takes the slots as well
        link = _bytes(needed(hardware, "host_link_gb_s"))
        return network_delay(hosts, hardware) + inside + max(across, message.cross_host_bytes / link)
    return network_delay(hosts, hardware) + max(inside, across)


def inside_seconds(sent: int, topology: Topology, hardware: Hardware) -> float:
    """Of the bytes of an all-to-all that stay in a host, without its delay."""
    ramp, others = hardware.host_ramp, max(1, topology.ranks_per_host - 1)
    return sent / (_bytes(needed(hardware, "host_link_gb_s")) * (1.0 if ramp is None else ramp.at(sent / others, 1)))


def linked_hosts(hosts: int, ranks_per_host: int, hardware: Hardware) -> int:
    """Hosts as the links see them: those that one set of host links joins are one."""
    joined = hardware.scale_up_ranks
    return -(-hosts // max(1, int(joined.value) // ranks_per_host)) if joined is not None else hosts


def across_seconds(message: Message, hosts: int, hardware: Hardware) -> float:
    """Of the bytes of an all-to-all to other hosts, without its delay."""
    ramp = hardware.network_ramp
    reached = 1.0 if ramp is None else ramp.at(message.cross_host_bytes / message.pairs, hosts)
    rate = _bytes(needed(hardware, "network_gb_s")) * reached
    return message.cross_host_bytes / (rate * (1 - needed(hardware, "network_incast") / hosts))


def network_delay(hosts: int, hardware: Hardware) -> float:
    """Of an all-to-all over hosts."""
    return _us(hardware.network_us.at(hosts)) if hardware.network_us is not None else 0.0


def ring_seconds(sent: float, hosts: int, ranks_of_a_host: int, hardware: Hardware, rings: int = 1) -> float:
    """Of a pass of a ring in which each rank sends so many bytes.

    Args:
        ranks_of_a_host: that are in the ring: the bytes leave a host over the network of all of them.
        rings: so many, side by side, share the ranks of a host.
    """
    if not sent:
        return 0.0
    linked = linked_hosts(hosts, rings * ranks_of_a_host, hardware)
    if linked == 1:
        own, delay = hardware.host_ring_gb_s, hardware.host_ring_us
        rate = needed(hardware, "host_link_gb_s") if own is None else own.value
        return _us(needed(hardware, "host_link_us") if delay is None else delay.value) + sent / _bytes(rate)
    rate = _over_hosts(ranks_of_a_host * (hosts // linked), hardware)
    simple = _us(linked * needed(hardware, "ring_us_per_host")) + sent / rate
    if hardware.ring_ll128_us is None:
        return simple
    return min(simple, _us(hardware.ring_ll128_us.at(linked)) + sent / (LL128_SHARE * rate))


def all_reduce_seconds(
    passes: Sequence[float], hosts: int, ranks_of_a_host: int, hardware: Hardware, rings: int = 1
) -> float:
    """Of an all-reduce whose two passes of a ring send so many bytes each; arguments as of `ring_seconds`."""
    ring = sum(ring_seconds(sent, hosts, ranks_of_a_host, hardware, rings) for sent in passes)
    linked = linked_hosts(hosts, rings * ranks_of_a_host, hardware)
    if linked == 1 or hardware.tree_us is None or not ring:
        return ring
    rate = TREE_SHARE * _over_hosts(ranks_of_a_host * (hosts // linked), hardware)
    return min(ring, _us(hardware.tree_us.at(linked)) + sum(passes) / rate)


def _over_hosts(ranks_of_a_host: int, hardware: Hardware) -> float:
    """Bytes a second of a ring over hosts, each of whose ranks sends as much."""
    own = hardware.host_ring_gb_s
    rate = _bytes(needed(hardware, "network_gb_s")) * needed(hardware, "ring_share") * ranks_of_a_host
    if hardware.one_fabric and own is not None:
        rate = min(rate, _bytes(own.value))  # from card to card it takes the same slots
    if hardware.scale_up_ranks is not None:  # the networks of dozens of ranks are faster than the link of one
        rate = min(rate, _bytes(needed(hardware, "host_link_gb_s") if own is None else own.value))
    return rate


def _bytes(gigabytes: float) -> float:
    return 1e9 * gigabytes


def _us(microseconds: float) -> float:
    return 1e-6 * microseconds
