"""What a device and its links reach: one JSON a kind of machine in this folder, each figure with its source.

    load_hardware("h100")                  a file of this folder
    load_hardware("runs/this-machine.json")     what `python tools/plan.py --measure` wrote

Rates are those of one rank, which has an accelerator of its own, or its share of a machine's cores.
"""

import itertools
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from megarec.config.base import Section
from megarec.config.load import describe
from megarec.errors import UserError, did_you_mean
from megarec.files import read_object

FOLDER = Path(__file__).resolve().parent
Rate = Annotated[float, Field(ge=1e-9, le=1e9)]
Delay = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(gt=0, le=1)]
TableKind = Literal[
    "ids", "split", "fbgemm lookup", "fbgemm update", "torch lookup", "torch update", "copy", "assemble", "scatter"
]


class Figure(Section):
    """A number and where it comes from."""

    value: Rate
    source: str


class DelayFigure(Section):
    """One that may be 0."""

    value: Delay
    source: str


class IncastFigure(Section):
    """One that leaves something of the network between two hosts."""

    value: Annotated[float, Field(ge=0, lt=2)]
    source: str


class ByHosts(Section):
    """A delay for each number of hosts that was measured; between them, it grows with the logarithm of their number."""

    value: Annotated[dict[str, Delay], Field(min_length=1)]
    source: str

    def at(self, hosts: int) -> float:
        """At that many hosts; beyond the largest number it grows with them."""
        known = sorted((int(count), delay) for count, delay in self.value.items())
        if hosts >= known[-1][0]:
            return known[-1][1] * hosts / known[-1][0]
        return _between(known, hosts)


class Ramp(Section):
    """Share of a rate that is reached by size: of a link, by bytes for each pair of ranks; of products, by their
    smallest side. From the largest size on as there."""

    value: Annotated[dict[str, Share], Field(min_length=1)]
    source: str

    def at(self, size: float, hosts: int) -> float:
        """With more hosts more messages are on their way at once, and small ones weigh less."""
        share = _between(sorted((int(count), part) for count, part in self.value.items()), size)
        return share if hosts < 4 else 1 - (1 - share) / math.log2(hosts)


class Costs(Section):
    """Nanoseconds of a kind of work on tables, for each of what table_work.py counts of it."""

    start: Delay = 0
    bag: Delay = 0
    id: Delay = 0
    cell: Delay = 0
    row: Delay = 0
    row_cell: Delay = 0


class TableCosts(Section):
    """By kind of work."""

    value: Annotated[dict[TableKind, Costs], Field(min_length=1)]
    source: str


def _between(known: list[tuple[int, float]], at: float) -> float:
    """Linear in the logarithm between known points, level outside of them."""
    if at <= known[0][0]:
        return known[0][1]
    for (low, first), (high, second) in itertools.pairwise(known):
        if at <= high:
            return first + (second - first) * math.log(at / low) / math.log(high / low)
    return known[-1][1]


class Hardware(Section):
    """One kind of machine; a key that is left out is not known, and what needs it says so."""

    name: str
    what: str = Field(description="for people")
    device: Literal["cpu", "cuda"]
    ranks_per_host: Figure = Field(description="accelerators of a host, or ranks that its cores were measured with")
    memory_gb: Figure = Field(description="of a rank, 1e9 bytes")
    peak_tflops: Figure | None = Field(None, description="16 bits, by the data sheet: what an MFU is a share of")
    gemm_tflops: Figure | None = Field(None, description="that a large product in 16 bits reaches")
    fp32_tflops: Figure | None = Field(None, description="in fp32 without TF32")
    gemm_ramp: Ramp | None = Field(
        None, description="share of gemm_tflops by the smallest side of a product; left out: by its tiles, or all of it"
    )
    fp32_ramp: Ramp | None = Field(None, description="the same of fp32_tflops")
    memory_tb_s: Figure = Field(description="that a copy reaches, read and written bytes together")
    lookup_gb_s: Figure | None = Field(None, description="bytes of looked-up rows; left out: as a copy")
    update_gb_s: Figure | None = Field(None, description="bytes of an update of tables; left out: as a copy")
    table_ns: TableCosts | None = Field(
        None, description="of a CPU: what work on tables costs by what is counted of it; left out: by bytes alone"
    )
    launch_us: DelayFigure = Field(description="that starting an operation takes on the host")
    sms: Figure | None = Field(None, description="multiprocessors; left out: kernels of every size fill the device")
    cache_mb: Figure | None = Field(None, description="of the last cache before memory, 1e6 bytes; left out: none")
    scale_up_ranks: Figure | None = Field(
        None, description="ranks that the links of a host join, where these reach over several hosts"
    )
    host_link_gb_s: Figure | None = Field(None, description="of a rank to the others of its host, each way")
    one_fabric: bool = Field(False, description="bytes to other hosts take the same way as those inside: PCIe")
    host_ring_gb_s: Figure | None = Field(None, description="the same in a ring; left out: as host_link_gb_s")
    host_ring_us: DelayFigure | None = Field(
        None, description="of a pass of a ring in a host, beside its bytes; left out: as host_link_us"
    )
    host_ramp: Ramp | None = Field(None, description="in a host; left out: messages of every size reach the rate")
    host_link_us: DelayFigure | None = Field(None, description="of a collective inside a host, beside its bytes")
    network_gb_s: Figure | None = Field(None, description="of a rank to other hosts, each way")
    network_us: ByHosts | None = Field(None, description="of an all-to-all over hosts, beside its bytes; left out: 0")
    network_incast: IncastFigure | None = Field(
        None, description="an all-to-all reaches 1 - this / hosts of the network"
    )
    network_ramp: Ramp | None = Field(None, description="left out: messages of every size reach the rate")
    ring_share: Figure | None = Field(None, description="of the network's rate that a ring over hosts reaches")
    ring_us_per_host: DelayFigure | None = Field(None, description="of a ring, beside its bytes")
    ring_ll128_us: ByHosts | None = Field(
        None, description="of a ring over hosts by NCCL's protocol of less delay; left out: it is not used"
    )
    tree_us: ByHosts | None = Field(None, description="of an all-reduce by a tree over hosts; left out: rings alone")

    @property
    def table_kinds(self) -> tuple[TableKind, ...]:
        """Kinds of work on tables whose costs are known."""
        return () if self.table_ns is None or self.device != "cpu" else tuple(self.table_ns.value)


RAMPS = "network_ramp", "host_ramp", "gemm_ramp", "fp32_ramp"
Known = Literal["host_link_gb_s", "host_link_us", "network_gb_s", "network_incast", "ring_share", "ring_us_per_host"]


def known_hardware() -> list[str]:
    """The names of this folder's files."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_hardware(name: str, option: str = "--hardware") -> Hardware:
    """The machine of that name in any case, or of a JSON's path.

    Args:
        option: that gave the name, for messages.

    Raises:
        UserError: there is none, or the file has a mistake; one line that names file, key and value.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name.lower()}.json"
    if not name.endswith(".json") and name.lower() not in known_hardware():
        raise UserError(
            f"{option} {name}: no such machine is known here; {did_you_mean(name.lower(), known_hardware())} (all: "
            f"{', '.join(known_hardware())}; or the path of a JSON that python tools/plan.py --measure wrote)"
        )
    return hardware_of(read_object(path, "the JSON of a machine"), str(path))


def hardware_of(raw: dict[str, Any], where: str) -> Hardware:
    """The machine of a JSON's content.

    Args:
        where: it stands, for messages.

    Raises:
        UserError: it has a mistake; one line that names place, key and value.
    """
    try:
        hardware = Hardware.model_validate(raw)
        for key in ("network_us", "ring_ll128_us", "tree_us", *RAMPS):
            _check_counts(key, getattr(hardware, key))
        if not hardware.ranks_per_host.value.is_integer():
            raise ValueError(f"ranks_per_host.value={hardware.ranks_per_host.value}; expected a whole number")
    except ValidationError as error:
        raise UserError(f"{where}: {describe(error, Hardware)}") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return hardware


def _check_counts(key: str, table: ByHosts | Ramp | None) -> None:
    for count in table.value if table is not None else ():
        if not count.isdecimal() or str(int(count)) != count or not 0 < int(count) < 1 << 40:
            raise ValueError(f"{key}.value has the key {count!r}; expected a whole number from 1 on")


def needed(hardware: Hardware, key: Known) -> float:
    """A figure that a prediction cannot do without.

    Raises:
        UserError: it is not known of this machine.
    """
    figure: Figure | DelayFigure | IncastFigure | None = getattr(hardware, key)
    if figure is None:
        told = Hardware.model_fields[key].description
        raise UserError(f"hardware {hardware.name}: {key} is not known ({told}); give it in its JSON, with its source")
    return figure.value
