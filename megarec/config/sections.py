"""One typed section per concern; the JSON of a run is exactly these keys. Every level refuses unknown keys."""

from typing import Annotated, Any, Literal

from pydantic import Field

from megarec.config.base import Above0, Betas, Count, Fraction, Positive, Probability, Ranks, Rate, Section, Seed, Size
from megarec.config.models import ModelSection
from megarec.config.regularisation import L2, L2Config, Rows, TableRule
from megarec.config.towers import IdentityTowerConfig, TowerLists, TowerModuleSection


class DataConfig(Section):
    """The prepared data set and how it is cut into batches."""

    path: str = Field(description="directory that tools/prepare_data.py wrote; relative to the working directory")
    schema_path: str | None = Field(
        None,
        alias="schema",
        description="the schema.json of data that is not on this machine, relative to this file: what counting, "
        "planning and rehearsal read; a training run reads the one in data.path",
    )
    cache: str | None = Field(
        None, description="where the cached rows go; null: in the data's own directory (.arrow/), if it can be written"
    )
    stream_rows: Annotated[int, Field(gt=0, lt=2**40)] | None = Field(
        None,
        description="null: training rows are cached, and an epoch is a permutation of all of them; a number: they are "
        "read from the shards each epoch and shuffled within this many, for data larger than a disk for their cache",
    )
    batch_size: Annotated[int, Field(gt=0, lt=2**31)] = Field(
        1024, description="examples of one optimizer step over all ranks and micro-batches"
    )
    features: list[str] | None = Field(None, description="the features to use, categorical and numeric; null: all")
    label: str | Annotated[list[str], Field(min_length=1, max_length=1_000)] | None = Field(
        None, description="which of the data's labels to predict, several as a list (docs/tasks.md); null: the first"
    )
    weighted: bool = Field(False, description="an example's loss times its number in the data's weight column")
    prefetch: Annotated[int, Field(gt=0, le=10_000)] = Field(
        4, description="batches a rank prepares ahead in the background"
    )
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="a row with a bad id, number or label: stop, or leave it out, count and log it"
    )


class FeatureEmbedding(Section):
    """How one feature is embedded, where it differs from one embedding of width model.dim."""

    embeddings: Size = Field(1, description="several embeddings of width d for an important feature")
    width: Size | None = Field(None, description="a smaller width: joins the grouped small embeddings")


Placement = Literal["auto", "table", "column", "row", "replicated"]


class TableConfig(Section):
    """How one table is held, initialised and regularised, where it differs: keys as in embedding."""

    placement: Placement | None = Field(None, description="as embedding.placement, for this table")
    l2: L2 | None = Field(None, description="as embedding.l2, for this table")
    update_rows: Rows | None = Field(None, description="as embedding.update_rows, for this table")
    initial_std: Above0 | None = Field(None, description="as embedding.initial_std, for this table")


class EmbeddingConfig(Section):
    """The sparse side: tables, their optimizer and regularisation. Outside the DeepSpeed engine."""

    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = Field(
        "rowwise_adagrad", description="applied in the backward pass; adam over touched rows needs the torch backend"
    )
    learning_rate: Rate = 0.05
    eps: Above0 = 1e-8
    backend: Literal["auto", "fbgemm", "triton", "torch"] = Field(
        "auto", description="auto: FBGEMM where it can (optimizer, widths), else Triton on a GPU, else torch"
    )
    weights: Literal["fp32", "fp16"] = Field("fp32", description="stored type of the tables")
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="of fp16 weights after an update; stochastic: by chance, the same on every topology"
    )
    placement: Placement = Field(
        "table",
        description="whole tables per rank; every table split by columns, or by rows, over all ranks; replicated: a "
        "copy on every rank; auto: by size and lookups",
    )
    tables: dict[str, TableConfig] = Field(
        {}, description="by table: the name of its feature, or of the one whose table others share"
    )
    l2: L2 = Field(
        0.0,
        description="a number adds l2 x mean over examples of |looked-up embeddings|^2 to what is minimised; an object "
        "says on which rows L2 acts, and whether through the optimizer",
    )
    update_rows: Rows | None = Field(
        None,
        description="which rows the optimizer steps: looked_up, or all, as torch's dense optimizers; null: all where "
        "L2 on all rows is in the gradient, else looked_up",
    )
    gradient_clipping: Above0 | None = Field(
        None,
        description="the largest norm of the gradient of all tables together, as deepspeed.gradient_clipping of the "
        "dense model; L2 on all rows is in it; null: not clipped",
    )
    dropout: Probability = Field(0.0, description="on the looked-up embeddings; the mask is the same on every topology")
    initial_std: Above0 | None = Field(None, description="normal initialisation; null: uniform in +-1/sqrt(rows)")
    features: dict[str, FeatureEmbedding] = Field({}, description="by feature name")

    @property
    def table_placements(self) -> dict[str, Placement]:
        """The placements in `tables`."""
        return {name: table.placement for name, table in self.tables.items() if table.placement is not None}

    def rule_of(self, table: str) -> TableRule:
        """How the rows of a table are regularised and updated."""
        l2, own = self._l2_of(table), self.tables.get(table)
        on_all = l2.weight if l2.rows == "all" else 0.0
        coupled, decay = (on_all, 0.0) if l2.coupled else (0.0, on_all)
        rows = (own.update_rows if own is not None else None) or self.update_rows
        clipped = self.gradient_clipping is not None
        return TableRule(rows == "all" or coupled > 0, coupled, decay, self.rounding == "stochastic", clipped)

    def looked_up_l2(self, table: str) -> float:
        """The weight of L2 on what is looked up of a table."""
        l2 = self._l2_of(table)
        return l2.weight if l2.rows == "looked_up" else 0.0

    def initial_std_of(self, table: str) -> float | None:
        """Standard deviation of a table's first weights; None: uniform."""
        own = self.tables.get(table)
        return self.initial_std if own is None or own.initial_std is None else own.initial_std

    def only_read(self) -> "EmbeddingConfig":
        """For tables that nothing updates: without state, in the backend that looks up fastest."""
        untrained = {"l2": None, "update_rows": None}
        tables = {name: own.model_copy(update=untrained) for name, own in self.tables.items()}
        plain = {"optimizer": "sgd", "l2": 0.0, "update_rows": None, "rounding": "nearest", "tables": tables}
        return self.model_copy(update=plain)

    def _l2_of(self, table: str) -> L2Config:
        own = self.tables.get(table)
        l2 = self.l2 if own is None or own.l2 is None else own.l2
        return l2 if isinstance(l2, L2Config) else L2Config(weight=l2)


class DenseConfig(Section):
    """The dense model's optimizer; `deepspeed.optimizer` may take its place."""

    optimizer: Literal["adamw", "adam", "sgd"] = Field(
        "adamw", description="adam: weight_decay is coupled, a part of the gradient (L2); adamw: it is not"
    )
    learning_rate: Rate = 1e-3
    betas: Betas = Field((0.9, 0.999), strict=False)
    eps: Above0 = 1e-8
    weight_decay: Rate = 0.0
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations of an interaction layer: kept, all but matrix products computed again, or all",
    )
    compile: bool = Field(False, description="torch.compile for the interaction layers; not at ZeRO-3")


MessageType = Literal["fp32", "fp16", "bf16"]


class ParallelConfig(Section):
    """How ranks form hosts and groups."""

    tensor: Ranks = Field(1, description="ranks of one host that share the dense layers")
    ranks_per_host: Ranks | None = Field(None, description="null: the ranks of one machine")
    exchange: Literal["flat", "tower"] = Field(
        "flat", description="flat: one world-wide all-to-all; tower: SPTT, in the host and then among peers"
    )
    towers: TowerLists | None = Field(
        None,
        description="by tower, its features; or a number of towers, feature i in tower i mod T; or the path of a "
        "towers.json, relative to this file (from --set: to the working directory)",
    )
    timeout_seconds: Annotated[float, Field(ge=0.1, le=2_592_000)] = Field(
        600.0, description="a collective that waits longer for other ranks ends the run"
    )
    overlap: bool | None = Field(
        None,
        description="the ids of the next batch, the embeddings of micro-batches and, at ZeRO 0, dense gradients travel "
        "while a step computes; null: where they cross hosts, and on accelerators",
    )
    messages: tuple[MessageType, MessageType] = Field(
        ("fp32", "fp32"), strict=False, description="types in which embeddings and their gradients travel between ranks"
    )


class ScheduleConfig(Section):
    """One factor over time for the learning rates of both sides."""

    warmup: Probability = Field(0.0, description="fraction of all steps with a linear rise from 0")
    decay: Literal["constant", "linear", "cosine", "step"] = "constant"
    final: Fraction = Field(0.0, description="factor at the last step of linear and cosine decay")
    step_every: Above0 = Field(1.0, description="step decay: epochs between drops")
    step_factor: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="step decay: factor of one drop")
    plateau_patience: Positive | None = Field(
        None, description="drop after this many validations without improvement; null: never"
    )
    plateau_factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.3, description="factor of one drop on a plateau")


class FaultsConfig(Section):
    """What happens when a step has a loss or gradient that is not finite, or a loss that jumps (docs/faults.md)."""

    max_in_a_row: Positive = Field(
        10, description="this many faulty steps in a row are skipped; at the last of them, `then`"
    )
    then: Literal["stop", "rollback"] = Field(
        "stop", description="end the run, or go back to the latest checkpoint and leave the faulty batches out"
    )
    max_rollbacks: Count = Field(3, description="rollbacks of a run; the next one stops it")
    spike: Literal["off", "skip", "rollback", "stop"] = Field(
        "off", description="a step whose mean loss is far above those before it: take it, skip it, go back, or stop"
    )
    spike_deviations: Above0 = Field(
        20.0, description="far: this many median absolute deviations (of at least 1 % of the median) above the median"
    )
    spike_window: Annotated[int, Field(ge=2, le=10**6)] = Field(
        100,
        description="applied steps over which median and deviation are taken; spikes are looked for once it is full",
    )


class EmaConfig(Section):
    """Exponential moving averages of weights, which validation, test and export take (run/averages.py)."""

    decay: Probability = Field(0.999, description="of an applied step; smaller in the first ones")
    table_rows: Count = Field(
        1_000_000, description="tables of at most this many rows are averaged; larger ones keep the last weights"
    )


class TrainConfig(Section):
    """One run."""

    epochs: Annotated[int, Field(gt=0, le=10**6)] = 1
    max_steps: Positive | None = Field(None, description="stop after this many optimizer steps; null: after the epochs")
    seed: Seed = 1
    output_dir: str = Field("runs/run", min_length=1, description="relative to the working directory")
    log_every: Positive = Field(20, description="optimizer steps between log lines and TensorBoard points")
    evaluate_every: Positive | None = Field(None, description="optimizer steps between validations; null: every epoch")
    best_by: Literal["logloss", "auc", "auc_minus_logloss"] = Field(
        "logloss", description="the validation metric whose best model is kept and tested, and that patience watches"
    )
    best_label: str | None = Field(
        None, description="of several labels, the one whose metric that is; null: the first of data.label"
    )
    label_weights: dict[str, Above0] = Field(
        {}, description="of several labels, what the loss of each is multiplied by; 1 where it is not named"
    )
    early_stopping: Positive | None = Field(
        None, description="stop after this many validations without improvement; null: never"
    )
    test: bool = Field(
        True, description="test the best model at the end; false: a search leaves the test split to what it chooses"
    )
    checkpoint_every: Positive | None = Field(
        None, description="optimizer steps between checkpoints; null: at every validation"
    )
    keep_checkpoints: Positive = Field(2, description="the newest checkpoints that stay, beside the best one")
    background_checkpoints: bool = Field(
        True, description="steps wait only for a copy in memory; false: until a checkpoint is on the disk"
    )
    fall_back: bool = Field(
        False, description="--resume takes the checkpoint before a damaged one; false: it stops and says why"
    )
    reset_towers: bool = Field(
        False, description="--resume starts tower modules from scratch, for other towers than the checkpoint's"
    )
    label_smoothing: Probability = Field(
        0.0, description="e: what is minimised has the labels y (1 - e) + e / 2 in place of y; metrics have y"
    )
    ema: EmaConfig | None = Field(
        None,
        description="validate, test and export averages of the weights over the steps; null: the last weights",
    )
    faults: FaultsConfig = Field(FaultsConfig(), description="what to do about faulty steps")
    verify_replicas_every: Count = Field(
        0, description="steps between comparisons of everything that several ranks hold copies of; 0: never"
    )
    trace: tuple[Positive, Positive] | None = Field(
        None,
        strict=False,
        description="first and last step of a torch profiler trace under output_dir/trace; null: none",
    )
    threads: Annotated[int, Field(gt=0, le=1_024)] | None = Field(
        None, description="CPU threads a rank; null: its share of cores, 1 for small steps"
    )
    peak_tflops: Above0 | None = Field(
        None, description="peak of one rank for the MFU; null: measured at the start with a GEMM"
    )
    hardware: str | None = Field(
        None,
        min_length=1,
        description="the machine that the run is on, as plan --hardware takes it: a name, or the path of what plan "
        "--measure wrote; TensorBoard then has predicted step times beside measured ones; null: an accelerator that "
        "is known by its name",
    )
    deterministic: bool = Field(
        False, description="on a GPU, kernels whose sums have a fixed order: two equal runs agree bit for bit"
    )
    fused_kernels: Literal["auto", "torch"] = Field(
        "auto", description="auto: NVIDIA apex where it works, Triton's FM with LayerNorm on a GPU in 16 bits"
    )


class RunConfig(Section):
    """The JSON of one run."""

    model: ModelSection
    data: DataConfig
    embedding: EmbeddingConfig = EmbeddingConfig()
    dense: DenseConfig = DenseConfig()
    parallel: ParallelConfig = ParallelConfig()
    tower_module: TowerModuleSection = IdentityTowerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: dict[str, Any] = Field({}, description="DeepSpeed's own configuration, passed on untouched")
