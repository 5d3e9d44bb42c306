"""Topologies and variants whose loss curves must be those of one process: each is some `--set` overrides."""

import itertools
from dataclasses import dataclass
from typing import Literal

Matrix = Literal["small", "full"]

# bf16 rounds every activation and gradient to 8 significant bits (relative 2^-9 = 0.2 %).
BF16_TOLERANCE = 2e-2
FP32_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One training of the parity matrix.

    Attributes:
        numbers: overrides that change the numbers: the reference takes them as well.
        topology: overrides that must not.
    """

    ranks: int
    numbers: tuple[str, ...] = ()
    topology: tuple[str, ...] = ()
    tolerance: float = FP32_TOLERANCE

    @property
    def name(self) -> str:
        return ", ".join(
            [f"{self.ranks} ranks", *(text.replace("deepspeed.", "") for text in self.topology + self.numbers)]
        )


def cases(matrix: Matrix) -> list[Case]:
    """The small matrix is a cross through the full one: every axis, not every combination."""
    return _full() if matrix == "full" else _small()


def _zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


def _tensor(ways: int) -> tuple[str, ...]:
    return (f"parallel.tensor={ways}",) if ways > 1 else ()


ACCUMULATION = "deepspeed.gradient_accumulation_steps=4"
OVERLAP = (ACCUMULATION, "parallel.overlap=true")
STREAM = ("data.stream_rows=400",)
BF16, OFFLOAD = "deepspeed.bf16.enabled=true", 'deepspeed.zero_optimization.offload_optimizer={"device": "cpu"}'
SECONDARY = "deepspeed.zero_optimization.zero_hpz_partition_size=2"
COMPILE = "dense.compile=true"
COLUMN, FBGEMM, TORCH = "embedding.placement=column", "embedding.backend=fbgemm", "embedding.backend=torch"
ROW, REPLICATED = "embedding.placement=row", "embedding.placement=replicated"
MIXED = 'embedding.tables={"single_1": {"placement": "row"}, "single_2": {"placement": "replicated"}}'
OPTIMIZERS = tuple(f"embedding.optimizer={name}" for name in ("rowwise_adagrad", "adagrad", "sgd", "adam"))
ALL_ROWS = 'embedding.l2={"weight": 1e-3, "rows": "all"}'
DECAYED = 'embedding.l2={"weight": 0.1, "rows": "all", "coupled": false}'
DENSE_SGD = ("dense.optimizer=sgd", "dense.learning_rate=0.1")
ATTENTIVE, FULL_FM = "model.projection=attentive", "model.fm=full"
DLRM = 'model={"name": "dlrm", "dim": 16, "head": [16], "dropout": 0.1}'
DCN_LOW_RANK, DCN_FULL_RANK = (
    f'model={{"name": "dcn", "layers": 2, "rank": {rank}, "dim": 16, "head": [16], "dropout": 0.1}}'
    for rank in ("8", "null")
)
NORMED = {
    "dnn": '"head": [16, 8, 12], "dropout": 0.1',
    "finalmlp": '"mlp1": [16, 8], "mlp2": [8], "fusion_heads": 2, "dropout": 0.1',
    "dcn": '"layers": 2, "rank": null, "structure": "parallel", "head": [16, 8], "dropout": 0.1',
}
BASELINES = {
    "lr": '"dropout": 0.1',
    "fm": '"dropout": 0.1',
    "dnn": '"head": [16], "dropout": 0.1',
    "deepfm": '"head": [16], "dropout": 0.1',
    "xdeepfm": '"cin": [8, 6], "head": [16], "dropout": 0.1',
    "autoint": '"layers": 2, "attention_dim": 8, "head": [16], "dropout": 0.1',
    "masknet": '"blocks": 2, "mask": 16, "width": 8, "head": [16], "dropout": 0.1',
    "finalmlp": '"mlp1": [16, 8], "mlp2": [8], "fusion_heads": 2, "gates": [[0], []], "gate_mlp": [16], "dropout": 0.1',
    "afn": '"neurons": 8, "mlp": [16], "epsilon": 0.1, "head": [16], "dropout": 0.1',
}
MODELS = ((), (ATTENTIVE,), (FULL_FM,), (DLRM,), (DCN_LOW_RANK,), (DCN_FULL_RANK,))


# Two labels: the second is missing in a quarter of the rows, and examples have weights.
TWO_LABELS = ('data.label=["label", "label_1"]', "data.weighted=true", 'train.label_weights={"label_1": 0.5}')
MMOE = 'model.tasks={"name": "mmoe", "experts": 3, "expert": [12, 8]}'
PLE = 'model.tasks={"name": "ple", "experts": 2, "own_experts": 2, "levels": 2, "expert": [12, 8]}'
ESMM = 'model.tasks={"name": "esmm"}'
# With ReLU a sign flips within 20 steps under one of these topologies, and the losses diverge (docs/parity.md).
SMOOTH = "model.activation=silu"
HEADS = ((), (MMOE, SMOOTH), (PLE, SMOOTH), (ESMM, SMOOTH))

# Tower modules take embeddings of full width alone; multi_0 shares the table of single_0.
FULL_WIDTH = 'embedding.features={"single_1": {"embeddings": 2}}'
# The default first rows are small against LayerNorm's eps in a Wukong tower of one embedding: there rounding noise
# grows ten times every few steps, in one process as well, until a ReLU flips (1e-7 at step 5, 1e-4 at step 15).
LARGE_ROWS = "embedding.initial_std=0.3"
# The gradient of ln |x| is 1 / |x|: at the default epsilon of 1e-5 AFN's losses differ by 1e-2 within 10 steps when its
# first weights change by 1e-7, in one process. With this epsilon (0.1) and these rows they stay within 2e-7.
TAME_LOGARITHMS = (LARGE_ROWS, "embedding.learning_rate=0.01")
UNEVEN_TWO = 'parallel.towers=[["single_0", "single_1", "multi_0", "multi_1"], ["single_2", "single_3"]]'
UNEVEN_FOUR = 'parallel.towers=[["single_0", "multi_0"], ["multi_1"], ["single_2", "single_3"], ["single_1"]]'
TOWER_MODULES = {
    "wukong": 'tower_module={"name": "wukong", "compression": 2, "rank": 4, "mlp": [8]}',
    "dlrm": 'tower_module={"name": "dlrm", "compression": 2}',
    "dcn": 'tower_module={"name": "dcn", "compression": 2, "rank": 4}',
}
# Lists of up to four ids: DIN cuts them to three, and multi_0 shares the table of its target.
SEQUENCES = (
    'model.sequences=[{"features": ["multi_0"], "target": ["single_0"], "block": "din", "max_length": 3, "mlp": [8]}, '
    '{"features": ["multi_1"], "target": ["single_3"], "block": "hstu", "max_length": 5, "heads": 2}]',
    FULL_WIDTH,
    LARGE_ROWS,
)
FAMILIES = (((), "wukong"), ((DLRM,), "dlrm"), ((DCN_LOW_RANK,), "dcn"))


def _hosts(ranks_per_host: int) -> tuple[str, ...]:
    """The tower exchange on hosts of that many ranks."""
    return ("parallel.exchange=tower", f"parallel.ranks_per_host={ranks_per_host}")


def _small() -> list[Case]:
    chosen = _small_sparse() + _small_dense() + _small_norms() + _small_labels() + _small_bf16()
    return chosen + _small_towers() + _small_sequences()


def _small_sequences() -> list[Case]:
    """Rows that travel one by one: placements, both exchanges, tower modules, micro-batches, tensor parallelism."""
    sgd = (*DENSE_SGD, "embedding.optimizer=sgd")
    chosen = [Case(1, SEQUENCES), Case(2, SEQUENCES, (_zero(1),)), Case(4, (*SEQUENCES, *sgd), (_zero(2), MIXED))]
    chosen += [Case(2, (*SEQUENCES, DCN_LOW_RANK), (_zero(3), COLUMN)), Case(4, SEQUENCES, (_zero(0), ROW, *OVERLAP))]
    chosen += [Case(4, SEQUENCES, (_zero(1), *_tensor(2)))]
    chosen += [Case(4, (*SEQUENCES, *sgd, UNEVEN_TWO), (_zero(2), *_hosts(2)))]
    chosen += [Case(2, (*SEQUENCES, UNEVEN_TWO), (_zero(0), *_hosts(1), *OVERLAP))]
    modules = (*SEQUENCES, TOWER_MODULES["dcn"], UNEVEN_TWO)
    chosen += [Case(2, modules, (_zero(0),)), Case(4, modules, (_zero(1), *_hosts(2)))]
    return [*chosen, Case(2, (*SEQUENCES, DECAYED), (_zero(1), MIXED)), Case(2, (*SEQUENCES, OPTIMIZERS[3], ALL_ROWS))]


def _small_towers() -> list[Case]:
    """Every family with its module and uneven towers: one host, hosts of one and of two ranks, two towers a host; under
    the flat exchange too; plain SGD, which does not hide a constant factor, and AdamW."""
    chosen = [Case(4, (UNEVEN_TWO,), (_zero(1), *_hosts(2))), Case(2, (UNEVEN_FOUR,), (_zero(2), COLUMN, *_hosts(1)))]
    for (model, module), stage in zip(FAMILIES, (3, 2, 1), strict=True):
        for dense in ((), (*DENSE_SGD, "embedding.optimizer=sgd")):
            numbers = (*model, *dense, FULL_WIDTH, LARGE_ROWS, TOWER_MODULES[module])
            chosen += [Case(4, (*numbers, UNEVEN_TWO), (_zero(stage), *_hosts(2)))]
            chosen += [Case(2, (*numbers, UNEVEN_FOUR), (_zero(stage - 1), *_hosts(1)))]
        chosen += [Case(4, (*numbers, UNEVEN_FOUR), (_zero(stage), *_tensor(2), *_hosts(2)))]
        chosen += [Case(1, (*numbers, UNEVEN_TWO), (_zero(stage),)), Case(2, (*numbers, UNEVEN_TWO), (_zero(0),))]
    chosen += [Case(4, (*numbers, UNEVEN_FOUR), (_zero(2), *_hosts(1)))]
    return chosen + _small_micro_batches()


def _small_micro_batches() -> list[Case]:
    """The exchange by micro-batches, each beside the compute of another: flat with every placement, SPTT alone, and
    tower modules, under SGD and AdamW."""
    chosen = [Case(2, topology=(_zero(0), MIXED, *OVERLAP)), Case(4, (UNEVEN_TWO,), (_zero(1), *_hosts(2), *OVERLAP))]
    for dense, (model, module) in zip(((), (*DENSE_SGD, "embedding.optimizer=sgd")), FAMILIES[1:], strict=True):
        numbers = (*model, *dense, FULL_WIDTH, LARGE_ROWS, TOWER_MODULES[module])
        chosen += [Case(4, (*numbers, UNEVEN_TWO), (_zero(2), *_hosts(2), *OVERLAP))]
        chosen += [Case(2, (*numbers, UNEVEN_FOUR), (_zero(0), *_hosts(1), *OVERLAP))]
    return chosen


def _small_labels() -> list[Case]:
    """Two labels: ZeRO x tensor parallelism x exchange, every kind of heads among them; micro-batches; bf16."""
    chosen = []
    for index, (stage, ways, towers) in enumerate(itertools.product((0, 1, 2, 3), (1, 2), (False, True))):
        heads, exchange = HEADS[(index + index // 4) % len(HEADS)], _hosts(1 if ways == 1 else 2) if towers else ()
        numbers = (*TWO_LABELS, *heads, *((UNEVEN_FOUR,) if towers else ()))
        chosen.append(Case(2 if ways == 1 or not towers else 4, numbers, (*_tensor(ways), _zero(stage), *exchange)))
    chosen += [Case(2, (*TWO_LABELS, DLRM), (_zero(1), *OVERLAP)), Case(2, (*TWO_LABELS[1:2],), (_zero(2),))]
    return [*chosen, Case(2, (*TWO_LABELS, *HEADS[1]), (_zero(2), BF16), BF16_TOLERANCE)]


def _small_sparse() -> list[Case]:
    chosen = [Case(ranks, topology=(_zero(2), COLUMN)) for ranks in (2, 4)]
    chosen += [Case(ranks, topology=(_zero(1), backend)) for ranks in (1, 2) for backend in (FBGEMM, TORCH)]
    chosen += [Case(2, ("embedding.optimizer=adagrad",), (_zero(3), COLUMN, FBGEMM))]
    chosen += [Case(2, topology=(_zero(3), COLUMN, TORCH))]
    chosen += [Case(2, (optimizer,), (_zero(1), COLUMN)) for optimizer in OPTIMIZERS]
    chosen += [Case(2, (OPTIMIZERS[3],), (_zero(1), ROW)), Case(2, topology=(_zero(2), REPLICATED))]
    chosen += [Case(4, topology=(_zero(1), MIXED)), Case(4, (UNEVEN_TWO,), (_zero(2), MIXED, *_hosts(2)))]
    chosen += [Case(2, (optimizer,), (_zero(2),)) for optimizer in OPTIMIZERS[1:]]
    return chosen + _small_all_rows()


def _small_all_rows() -> list[Case]:
    """L2 on all rows: Adam steps every row; or rows decay, lazily, whatever the optimizer."""
    adam = OPTIMIZERS[3]
    return [
        Case(2, (adam, ALL_ROWS, *SEQUENCES), (_zero(1), ROW)),
        Case(4, (adam, ALL_ROWS, UNEVEN_TWO), (_zero(2), COLUMN, *_hosts(2))),
        Case(4, (DECAYED, *SEQUENCES), (_zero(1), MIXED)),
        Case(2, (DECAYED, UNEVEN_TWO), (_zero(0), ROW, *_hosts(1), *OVERLAP)),
    ]


def _small_dense() -> list[Case]:
    chosen = [Case(ranks, topology=(_zero(stage),)) for ranks in (1, 2, 4) for stage in (0, 1, 2, 3)]
    chosen += [Case(2, topology=(_zero(2), ACCUMULATION)), Case(4, STREAM, (_zero(1),))]
    chosen += [Case(2, DENSE_SGD, (_zero(stage),)) for stage in (0, 2)]
    chosen += [Case(2, model, (_zero(stage),)) for model, stage in zip(MODELS[1:], (1, 1, 2, 3, 1), strict=True)]
    chosen += [Case(4, DENSE_SGD, (*_tensor(2), _zero(stage), ACCUMULATION)) for stage in (0, 2)]
    chosen += [Case(4, topology=(*_tensor(4), _zero(stage))) for stage in (1, 3)]
    chosen += [
        Case(2, model, (*_tensor(2), _zero(stage))) for model, stage in zip(MODELS, (2, 3, 1, 3, 2, 0), strict=True)
    ]
    chosen += [Case(4, topology=(*_tensor(ways), _zero(stage), OFFLOAD)) for ways, stage in ((1, 2), (2, 3))]
    chosen += [Case(4, topology=(*_tensor(ways), _zero(3), SECONDARY)) for ways in (1, 2)]
    recomputed = (("full", 3, 2), ("selective", 3, 2), ("full", 3, 1), ("selective", 1, 1), ("full", 0, 2))
    return chosen + [
        Case(2, topology=(*_tensor(ways), _zero(stage), f"dense.recompute={policy}"))
        for policy, stage, ways in recomputed
    ]


def _normed(name: str, norm: str) -> str:
    return f'model={{"name": "{name}", "dim": 16, {NORMED[name]}, "norm": "{norm}"}}'


def _small_norms() -> list[Case]:
    """Statistics over the global batch, and over columns that a tensor group shares, at every stage; averaged weights,
    of tables and tower modules too."""
    batch, layer = ((_normed("dnn", norm),) for norm in ("batch", "layer"))
    ema = ("train.ema.decay=0.8",)
    chosen = [Case(ranks, batch, (_zero(stage),)) for ranks, stage in ((2, 0), (4, 2))]
    chosen += [Case(ranks, batch, (*_tensor(ranks), _zero(stage))) for ranks, stage in ((2, 3), (4, 1))]
    chosen += [Case(4, (*batch, *DENSE_SGD, UNEVEN_TWO), (*_tensor(2), _zero(1), *_hosts(2)))]
    chosen += [Case(4, layer, (*_tensor(2), _zero(3)))]
    chosen += [Case(2, (_normed(name, "batch"),), (*_tensor(2), _zero(2))) for name in ("finalmlp", "dcn")]
    chosen += [Case(ranks, ema, (_zero(stage),)) for ranks, stage in ((2, 0), (4, 3))]
    clipped = ("embedding.gradient_clipping=0.01", "embedding.optimizer=sgd", *DENSE_SGD)
    on_all = 'embedding.l2={"weight": 0.01, "rows": "all", "coupled": true}'
    chosen += [
        Case(2, (*clipped, "embedding.update_rows=all"), (_zero(1), COLUMN)),
        Case(4, (*clipped, on_all), (_zero(2), ROW)),
    ]
    coupled = ("dense.optimizer=adam", "dense.weight_decay=0.1", "train.label_smoothing=0.1")
    chosen += [Case(4, (*batch, *ema, *coupled), (*_tensor(2), _zero(3), COLUMN))]
    numbers = (*FAMILIES[1][0], FULL_WIDTH, LARGE_ROWS, TOWER_MODULES["dlrm"], UNEVEN_TWO)
    return [*chosen, Case(4, (*numbers, *ema, "train.ema.table_rows=50"), (*_tensor(2), _zero(2), *_hosts(2), ROW))]


def _small_bf16() -> list[Case]:
    chosen = [Case(2, topology=(_zero(stage), BF16), tolerance=BF16_TOLERANCE) for stage in (0, 1, 2, 3)]
    return chosen + [
        Case(4, topology=(*_tensor(ways), _zero(stage), BF16), tolerance=BF16_TOLERANCE)
        for ways, stage in ((2, 0), (4, 1), (2, 2), (2, 3))
    ]


def _full() -> list[Case]:
    every = _full_sparse() + _full_dense() + _full_baselines() + _full_compiled() + _full_towers() + _small()
    return list(dict.fromkeys(every))


def _full_baselines() -> list[Case]:
    """Each baseline on two ranks, and with its MLPs shared by them."""
    chosen = []
    for (name, sizes), ways in itertools.product(BASELINES.items(), (1, 2)):
        model = f'model={{"name": "{name}", "dim": 16, {sizes}}}'
        numbers = (model, *TAME_LOGARITHMS) if name == "afn" else (model,)
        chosen.append(Case(2, numbers, (*_tensor(ways), _zero(2))))
        heads = HEADS[1 if ways == 1 else 2]
        chosen.append(Case(2, (*numbers, *TWO_LABELS, *heads), (*_tensor(ways), _zero(2))))
    return chosen


def _full_towers() -> list[Case]:
    """Every family under the tower exchange x tensor parallelism x ZeRO, with both dense optimizers."""
    chosen = []
    for (model, module), dense, towers, (ranks, local, ways), stage in itertools.product(
        FAMILIES,
        ((), (*DENSE_SGD, "embedding.optimizer=sgd")),
        (UNEVEN_TWO, UNEVEN_FOUR),
        ((2, 2, 1), (2, 1, 1), (4, 2, 1), (4, 2, 2)),
        (0, 1, 2, 3),
    ):
        numbers = (*model, *dense, FULL_WIDTH, LARGE_ROWS, TOWER_MODULES[module], towers)
        chosen.append(Case(ranks, numbers, (*_tensor(ways), _zero(stage), *_hosts(local))))
    return chosen


def _full_sparse() -> list[Case]:
    """Every way of holding and updating tables."""
    chosen = []
    for ranks, stage, placement, backend, accumulation in itertools.product(
        (1, 2, 4), (0, 1, 2, 3), (None, COLUMN), (FBGEMM, TORCH), (None, ACCUMULATION)
    ):
        topology = tuple(filter(None, (_zero(stage), placement, backend, accumulation)))
        for optimizer in OPTIMIZERS:
            if backend == TORCH or _fbgemm_can(optimizer, placement):
                chosen.append(Case(ranks, (optimizer,), topology))
    for regularised, optimizer, placement, exchange in itertools.product(
        (ALL_ROWS, DECAYED), OPTIMIZERS, (None, COLUMN, ROW, REPLICATED), ((), (UNEVEN_TWO,))
    ):
        if (regularised, optimizer) == (ALL_ROWS, OPTIMIZERS[0]):
            continue  # torch has no row-wise Adagrad to be the reference
        topology = tuple(filter(None, (_zero(1), placement, *(_hosts(2) if exchange else ()))))
        chosen.append(Case(4, (optimizer, regularised, *exchange), topology))
    return chosen


def _full_dense() -> list[Case]:
    """Every model under tensor parallelism x ZeRO x accumulation, with both dense optimizers."""
    chosen = []
    for model, dense, (ranks, ways), stage, accumulation in itertools.product(
        MODELS, ((), DENSE_SGD), ((2, 1), (4, 1), (2, 2), (4, 2), (4, 4)), (0, 1, 2, 3), ((), (ACCUMULATION,))
    ):
        chosen.append(Case(ranks, (*model, *dense), (*_tensor(ways), _zero(stage), *accumulation)))
    for (ranks, ways), stage, accumulation in itertools.product(
        ((2, 1), (2, 2), (4, 2), (4, 4)), (0, 1, 2, 3), ((), (ACCUMULATION,))
    ):
        chosen.append(Case(ranks, (), (*_tensor(ways), _zero(stage), BF16, *accumulation), BF16_TOLERANCE))
    return chosen


def _full_compiled() -> list[Case]:
    """Compiled layers; half a minute a case."""
    chosen = [(1, 1, ()), (0, 2, ()), (2, 2, (ACCUMULATION,))]
    chosen += [(2, ways, (f"dense.recompute={policy}",)) for ways, policy in ((1, "full"), (2, "selective"))]
    return [Case(2, (), (*_tensor(ways), _zero(stage), COMPILE, *others)) for stage, ways, others in chosen] + [
        Case(2, (), (*_tensor(ways), _zero(2), COMPILE, BF16), BF16_TOLERANCE) for ways in (1, 2)
    ]


def _fbgemm_can(optimizer: str, placement: str | None) -> bool:
    """It has no lazy Adam, and row-wise Adagrad needs whole rows."""
    needs_whole_rows = optimizer.endswith("rowwise_adagrad")
    return not optimizer.endswith("adam") and not (needs_whole_rows and placement == COLUMN)
