"""One model, any topology, the same numbers: a cross through the matrix of `tools/parity.py`."""

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits

from megarec.config.load import load_config
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import ONE_RANK
from megarec.parity.cases import DENSE_SGD, FP32_TOLERANCE, FULL_WIDTH, OVERLAP, TOWER_MODULES, UNEVEN_TWO, Case, cases
from megarec.parity.reference import reference_losses
from megarec.parity.run import compare, write_base
from megarec.run.build import build_run
from megarec.training.profiling import StepTimer
from megarec.training.step import train_step

STEPS = 12  # the tool trains 20; a planted mistake is seen within 5
TOWERS, TENSOR, ZERO = "parallel.exchange=tower", "parallel.tensor=2", "deepspeed.zero_optimization.stage="
# Topology and numbers: any two together are separate code; models and optimizers are only counted alone.
STRUCTURE = re.compile(
    r"\d ranks|parallel\.(tensor|exchange|ranks_per_host|overlap)=|embedding\.(placement|tables|l2)=|train\.ema\.decay="
    r"|deepspeed\.(zero_optimization\.stage|bf16\.enabled)=|data\.weighted=|(?P<kind>model\.sequences|tower_module)="
    r'|.*(?P<norm>"norm")'
)


def values_of(case: Case) -> set[tuple[str, ...]]:
    """Overrides of a case and its number of ranks, alone; pairs of those that are structure; towers x tensor x ZeRO."""
    values = [f"{case.ranks} ranks", *case.topology, *case.numbers]
    structure = [(match["kind"] or match["norm"] or value) for value in values if (match := STRUCTURE.match(value))]
    found = {(value,) for value in values} | set(itertools.combinations(sorted(structure), 2))
    if {TOWERS, TENSOR} <= {*structure}:  # three ways to share out the dense side meet: as a whole
        found.add(
            tuple(sorted(value for value in structure if value.startswith((TOWERS, TENSOR, ZERO, "tower_module"))))
        )
    return found


def covering(every: list[Case]) -> set[Case]:
    """Always the case with the most values and pairs that those before had not, until there is none."""
    chosen, missing = set[Case](), set().union(*map(values_of, every))
    while missing:
        chosen.add(max(every, key=lambda case: len(values_of(case) & missing)))
        missing -= set().union(*map(values_of, chosen))
    return chosen


SMALL = cases("small")
COVERING = covering(SMALL)


def test_the_cases_that_are_not_slow_have_every_value_and_every_pair() -> None:
    def seen(chosen: Iterable[Case]) -> set[tuple[str, ...]]:
        return set().union(*map(values_of, chosen))

    assert seen(COVERING) == seen(SMALL) and len(COVERING) <= 60
    assert {(ZERO + "3", TOWERS, TENSOR, "tower_module"), ('"norm"', "train.ema.decay=0.8")} <= seen(COVERING)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, ...], list[float]]:
    return {}


@pytest.mark.parametrize(
    "case",
    [case if case in COVERING else pytest.param(case, marks=pytest.mark.slow) for case in SMALL],
    ids=lambda case: case.name,
)
def test_the_losses_are_those_of_one_process(
    case: Case, base: Path, references: dict[tuple[str, ...], list[float]], rank_pool: Callable[[int], RankPool]
) -> None:
    if case.numbers not in references:
        references[case.numbers] = reference_losses(load_config(base, list(case.numbers)), STEPS)
    reference = references[case.numbers]
    result = compare(case, base, rank_pool(case.ranks), reference)
    assert result.relative_deviation <= case.tolerance
    assert max(reference) - min(reference) > 0.01, "the losses must move for the comparison to mean anything"


def test_chosen_features_of_which_few_fill_whole_tables(base: Path, rank_pool: Callable[[int], RankPool]) -> None:
    """Four ranks, one whole table and one that is split by rows, by micro-batches: three ranks send no whole rows."""
    features = 'data.features=["single_1", "single_3", "numeric_0"]'
    rows = 'embedding.tables={"single_3": {"placement": "row"}}'
    case = Case(4, (features, "embedding.features={}"), (rows, "deepspeed.zero_optimization.stage=0", *OVERLAP))
    result = compare(case, base, rank_pool(4), reference_losses(load_config(base, list(case.numbers)), 5))
    assert result.relative_deviation <= FP32_TOLERANCE


def losses_with_wrong_gradient_scale(path: Path, overrides: list[str], steps: int) -> list[float]:
    """The planted mistake: each rank's table gradient stays that of its own mean, not of the global batch's."""
    config = load_config(path, overrides)
    device = start_process(config)
    run = build_run(config, device)
    run.dense.set_learning_rate(config.dense.learning_rate)
    run.sparse._topology = ONE_RANK  # by whose size the exchange divides
    losses = []
    for batch in list(run.train.batches(epoch=0))[:steps]:
        result = train_step(run.dense, run.sparse, batch, timer=StepTimer(device))
        loss = binary_cross_entropy_with_logits(result.logits.double(), batch.labels.double())
        dist.all_reduce(loss)
        losses.append(float(loss) / run.topology.world_size)
    return losses


def test_a_wrong_gradient_scale_would_be_seen(base: Path, rank_pool: Callable[[int], RankPool]) -> None:
    overrides = ["embedding.optimizer=sgd", "embedding.l2=0.0"]
    reference = reference_losses(load_config(base, overrides), 5)
    wrong = rank_pool(2).run(losses_with_wrong_gradient_scale, base, overrides, 5)[0]
    deviations = [abs(mine - its) / its for mine, its in zip(wrong, reference, strict=True)]
    assert deviations[0] <= FP32_TOLERANCE  # before any update
    assert max(deviations) > 10 * FP32_TOLERANCE


def losses_with_a_mean_over_the_host(path: Path, overrides: list[str], steps: int, planted: bool) -> list[float]:
    """The planted mistake: tower gradients averaged over the L ranks of a host, so H times what they should be."""
    config = load_config(path, overrides)
    device = start_process(config)
    run = build_run(config, device)
    run.dense.set_learning_rate(config.dense.learning_rate)
    assert run.sparse.modules is not None
    if planted:
        for parameter in run.sparse.modules.bank.parameters():
            parameter.register_hook(lambda gradient: gradient * run.topology.hosts)
    losses = []
    for batch in list(run.train.batches(epoch=0))[:steps]:
        result = train_step(run.dense, run.sparse, batch, timer=StepTimer(device))
        loss = binary_cross_entropy_with_logits(result.logits.double(), batch.labels.double())
        dist.all_reduce(loss)
        losses.append(float(loss) / run.topology.world_size)
    return losses


def test_a_mean_over_the_host_alone_would_be_seen(base: Path, rank_pool: Callable[[int], RankPool]) -> None:
    """Under plain SGD, on two hosts of two ranks; Adam would hide the factor."""
    numbers = [*DENSE_SGD, "embedding.optimizer=sgd", FULL_WIDTH, TOWER_MODULES["dlrm"], UNEVEN_TWO]
    hosts = ["parallel.exchange=tower", "parallel.ranks_per_host=2"]
    reference = reference_losses(load_config(base, numbers), 5)
    for planted in (False, True):
        losses = rank_pool(4).run(losses_with_a_mean_over_the_host, base, numbers + hosts, 5, planted)[0]
        deviations = [abs(mine - its) / its for mine, its in zip(losses, reference, strict=True)]
        assert deviations[0] <= FP32_TOLERANCE  # before any update
        assert (max(deviations) > 10 * FP32_TOLERANCE) == planted


def test_the_full_matrix_holds_the_small_one() -> None:
    assert set(cases("small")) <= set(cases("full"))
