"""Whether towers pay: bytes are the ledger's, links and batches decide, and what cannot be is said."""

from pathlib import Path

import pytest

from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.config.towers import IdentityTowerConfig, WukongTowerConfig
from megarec.data.schema import schema_of
from megarec.distributed.topology import Topology
from megarec.errors import UserError
from megarec.planning.hardware import DelayFigure, Figure, Hardware, load_hardware
from megarec.planning.towers_pay import Variant, choose, compare, predict, sentence, with_towers
from megarec.planning.traffic import sparse_messages
from megarec.run.spec import resolve

ROOT = Path(__file__).resolve().parents[2]
H100 = load_hardware("h100")


def criteo(*overrides: str) -> RunConfig:
    return load_config(ROOT / "ds_configs/dlrm-criteo-terabyte.json", list(overrides))


def slow(share: float) -> Hardware:
    """H100 on a network of a share of its rate."""
    assert H100.network_gb_s is not None
    return H100.model_copy(update={"network_gb_s": Figure(value=H100.network_gb_s.value * share, source="made up")})


def test_bytes_are_those_of_the_rank_that_sends_most() -> None:
    config = criteo()
    schema = schema_of(config.data)
    found = compare(config, schema, 2, 2, H100)
    assert [variant.name for variant in found.variants] == [
        "flat", "SPTT alone", "compression 2", "compression 4", "compression 8", "compression 16",
    ]  # fmt: skip
    for variant in found.variants:
        own = config if variant.name == "flat" else with_towers(config, 2, variant.compression)
        sent = [sparse_messages(own, resolve(own, schema), Topology(rank, 4, 2, 1)) for rank in range(4)]
        assert variant.network_bytes == max(sum(m.cross_host_bytes for m in messages) for messages in sent)
    assert found.run.seconds == found.variants[0].seconds, "the run is flat"
    half = 2 * 32_768 * 26 * 128 * 4 // 2  # S (H-1)/H, both ways; ids are a two-hundredth of it
    assert found.variants[1].network_bytes == pytest.approx(half, rel=0.01)
    assert found.variants[3].network_bytes == pytest.approx(found.variants[1].network_bytes / 4, rel=0.05)


def test_slow_links_pay_and_one_host_or_few_examples_do_not() -> None:
    config = criteo()
    schema = schema_of(config.data)
    many = compare(config, schema, 2, 2, slow(0.1))
    assert many.pays and many.best is not None and many.best.compression is not None
    assert many.sentence.startswith("Yes: towers pay; compression ")
    assert not compare(config, schema, 1, 4, slow(0.1)).pays
    few = compare(criteo("data.batch_size=64"), schema, 2, 2, H100)
    assert not few.pays and few.sentence.startswith("No: towers do not pay; at best")


def variant(name: str, seconds: float, compression: float | None = None) -> Variant:
    return Variant(name, compression, {"exchange": seconds / 2, "dense compute": seconds / 2})


def test_the_mildest_compression_near_the_shortest_step() -> None:
    flat, sptt = variant("flat", 1.0), variant("SPTT alone", 1.1)
    two, four, eight = (variant(f"compression {c}", s, c) for c, s in ((2, 0.7), (4, 0.52), (8, 0.5)))
    assert choose([flat, sptt, two, four, eight]) == (four, True)
    assert choose([flat, sptt, variant("compression 2", 0.95, 2)]) == (variant("compression 2", 0.95, 2), False)
    assert choose([flat, Variant("SPTT alone", impossible="no")]) == (None, False)
    smaller = Variant("compression 4", 4, {"exchange": 0.48, "dense compute": 0.2})
    assert choose([flat, sptt, smaller]) == (smaller, False), "it is the dense model that is smaller"
    names = ("dlrm", "dlrm")
    assert "mostly by a smaller dense model" in sentence(names, [flat, smaller], smaller, False, 8)
    assert "it cost no AUC on synthetic data" in sentence(names, [flat, sptt, four], four, True, 8)
    assert "what dlrm modules cost dcn in quality was not measured" in sentence(
        ("dcn", "dlrm"), [flat, sptt, eight], eight, True, 8
    )
    assert sentence(names, [flat], None, False, 1).startswith("No: towers do not pay on one host")
    refused = [flat, Variant("SPTT alone", impossible="too few"), Variant("compression 2", 2, impossible="too narrow")]
    assert sentence(names, refused, None, False, 8) == "No: this model cannot be run with towers on 8 hosts (too few)."


def test_towers_of_the_config_or_of_its_family() -> None:
    plain = criteo()
    assert with_towers(plain, 2, None).parallel.towers == 2
    assert isinstance(with_towers(plain, 2, None).tower_module, IdentityTowerConfig)
    assert with_towers(plain, 2, 4).tower_module.name == "dlrm"
    module = 'tower_module={"name": "wukong", "num_fm": 4, "num_lcb": 4, "rank": 8}'
    made = with_towers(criteo("parallel.towers=4", module), 2, 8)
    assert made.parallel.towers == 4
    assert isinstance(made.tower_module, WukongTowerConfig)
    assert (made.tower_module.rank, made.tower_module.compression, made.tower_module.num_fm) == (8, 8, None)


def test_what_cannot_be_run_is_a_row_with_its_reason() -> None:
    config = criteo("data.batch_size=6400", "embedding.placement=row")
    found = compare(config, schema_of(config.data), 32, 1, H100)
    assert all(v.impossible and "fill at most 26 towers" in v.impossible for v in found.variants[1:])
    assert found.best is None and found.sentence.startswith("No: this model cannot be run with towers on 32 hosts")


def test_a_figure_that_is_not_known() -> None:
    config = criteo()
    spec = resolve(config, schema_of(config.data))
    lonely = H100.model_copy(update={"network_gb_s": None})
    with pytest.raises(UserError, match="network_gb_s is not known"):
        predict(config, spec, 2, 2, lonely, "x")
    free = H100.model_copy(update={"host_link_us": DelayFigure(value=0, source="made up")})
    assert predict(config, spec, 2, 2, free, "x").total <= predict(config, spec, 2, 2, H100, "x").total
