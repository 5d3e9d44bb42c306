"""The dense side of a run: a dense model under the DeepSpeed engine, with the verbs of a step.

    made = dense.forward_backward(batch, values)     logits, losses, the gradient of the embeddings; nothing changes
    dense.apply() | dense.skip(cause)                the optimizer step, or what DeepSpeed does in its place

Nothing outside of this folder knows DeepSpeed: a run uses its engine only through this class.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megarec.data.batch import Batch
from megarec.dense import masters
from megarec.dense.engine import backward, compute_dtype, gradient_norm, loss_scale, loss_scale_can_shrink, skip_step
from megarec.dense.memory import Parts, dense_bytes
from megarec.dense.monitor import Monitor
from megarec.dense.objective import Objective
from megarec.dense.reduction import GradientReduction
from megarec.dense.tensor_parallel import is_sharded
from megarec.distributed.topology import Topology
from megarec.models.norms import apply_statistics, batch_norms
from megarec.slices import Ints, ParameterShard, TensorSlice


@dataclass(frozen=True)
class DenseResult:
    """What a forward and a backward pass of the dense model made on this rank.

    Attributes:
        logits: [B], or of several labels [B, T].
        loss: of the backward pass (dense/objective.py).
        gradient: [B, columns], of the embeddings: that of the mean over this rank's examples of all micro-batches; may
            be part of a wider matrix.
        finite: float32 [T], 1 where a label's loss is finite on this rank, else 0; None: of one label.
    """

    logits: Tensor
    loss: Tensor
    gradient: Tensor
    finite: Tensor | None = None


@dataclass(frozen=True)
class DenseUpdate:
    """The outcome of a step.

    Attributes:
        cause: why nothing was changed, the same on all ranks: the caller's, or "overflow" (fp16) or "gradient" when
            DeepSpeed refused the step; None: the step was applied.
        gradient_norm: before clipping, over all ranks; None when it was not asked for or is not kept.
    """

    cause: str | None
    gradient_norm: float | None = None


class DenseSide:
    """The dense model of one rank.

    Args:
        engine: DeepSpeed's, around the model.
        learning_rate: the base rate that the schedule scales.
        reason: which optimizer and which kernels were taken and why, for the log.
        objective: the loss.
        reduction: averages gradients over the data group where DeepSpeed does not (dense/reduction.py), from the last
            backward pass of a step on; collective.
        average_replicated: called between the last backward pass of a step and what reads its gradients
            (dense/replicated.py); collective.

    Attributes:
        monitor: TensorBoard and the like, as the deepspeed section says.
    """

    def __init__(
        self,
        engine: Any,
        topology: Topology,
        learning_rate: float,
        reason: str,
        objective: Objective,
        reduction: GradientReduction,
        average_replicated: Callable[[], None],
    ) -> None:
        self.engine, self.learning_rate, self.reason = engine, learning_rate, reason
        self._topology, self._objective = topology, objective
        self._reduction, self._average_replicated = reduction, average_replicated
        self.monitor = Monitor(engine.monitor)

    @property
    def module(self) -> nn.Module:
        """The dense model on this rank; at ZeRO-3 its parameters are partitioned."""
        module: nn.Module = self.engine.module
        return module

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the model computes."""
        return compute_dtype(self.engine)

    @property
    def accumulation(self) -> int:
        """Micro-batches of one step."""
        return int(self.engine.gradient_accumulation_steps())

    def forward_backward(self, micro: int, batch: Batch, values: Tensor) -> DenseResult:
        """Forward and backward of one micro-batch, the next one in turn; collective. After the last one `apply` or
        `skip` must follow.

        Args:
            micro: which one, from 0.
            batch: the examples of this rank, all micro-batches of them; as many on every rank.
            values: [B, columns], the embeddings of this micro-batch.
        """
        engine = self.engine
        if micro:
            engine.step()  # not at the boundary: it only counts
        else:
            engine.train()
        kept: list[Tensor] = []
        rows = slice(micro * values.shape[0], (micro + 1) * values.shape[0])
        out = engine(batch.numeric[rows], keep_gradient(values, kept), batch.keys[rows])
        loss, finite = self._objective(out, batch, rows)
        if micro + 1 == self.accumulation:
            self._reduction.begin()
        backward(engine, loss)
        scale = self.loss_scale() or 1.0
        return DenseResult(out.detach(), loss.detach(), kept[0] if scale == 1.0 else kept[0] / scale, finite)

    def apply(self, want_norm: bool = False) -> DenseUpdate:
        """One optimizer step; collective.

        Args:
            want_norm: return the norm of the gradient; at ZeRO 0 in fp32 it costs a pass over the gradients.
        """
        self._reduction.finish()
        self._average_replicated()
        norm = gradient_norm(self.engine) if want_norm else None
        overflow = self.loss_scale_can_shrink()
        self.engine.step()
        if not self.engine.was_step_applied():
            return DenseUpdate("overflow" if overflow else "gradient", norm)
        apply_statistics(self.module)
        if want_norm and norm is None:
            norm = self.engine.get_global_grad_norm()
        return DenseUpdate(None, None if norm is None else float(norm))

    def skip(self, cause: str) -> DenseUpdate:
        """In place of `apply`: forget the gradients; after an "overflow" the loss scale of fp16 shrinks."""
        self._reduction.finish()  # its messages are on their way
        skip_step(self.engine, overflow=cause == "overflow")
        return DenseUpdate(cause)

    @torch.no_grad()
    def predict(self, batch: Batch, values: Tensor) -> Tensor:
        """Logits [B], or of several labels [B, T], in evaluation mode."""
        self.engine.eval()
        logits: Tensor = self.engine(batch.numeric, values, batch.keys)
        return logits

    def set_learning_rate(self, rate: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    def scale_learning_rate(self, factor: float) -> None:
        """Set the rate to `factor` x the base rate."""
        self.set_learning_rate(factor * self.learning_rate)

    def loss_scale_can_shrink(self) -> bool:
        """Whether gradients that are not finite may be an overflow of fp16, which DeepSpeed has a remedy for."""
        return loss_scale_can_shrink(self.engine)

    def memory_bytes(self, messages: Iterable[Tensor] = ()) -> Parts:
        """Bytes that this rank holds now, by part (dense/memory.py)."""
        return dense_bytes(self.engine, [*messages, *self._reduction.messages()])

    def loss_scale(self) -> float | None:
        """What fp16 scales the loss by; None in other precisions."""
        return loss_scale(self.engine)

    # The state that a checkpoint keeps.

    @property
    def zero_stage(self) -> int:
        return int(self.engine.zero_optimization_stage())

    @property
    def optimizer_name(self) -> str:
        return type(masters.optimizer_of(self.engine)).__name__

    def shapes(self) -> Iterator[tuple[str, Ints]]:
        """(parameter, shape of the whole tensor, whichever part of it this rank holds)."""
        for name, parameter in self.module.named_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            yield name, getattr(parameter, "shard", ParameterShard(shape, ())).shape

    def statistics_shapes(self) -> Iterator[tuple[str, Ints]]:
        """(running statistic of a batch normalisation, shape of the whole)."""
        for piece in masters.statistics(self.module, self._topology):
            yield piece.name, piece.shape

    def check_supported(self) -> None:
        """Raise a UserError for states that a checkpoint cannot hold: before training, not at the first save."""
        masters.check_supported(self.engine)

    def held(self) -> list[TensorSlice]:
        """Master weights, optimizer states and running statistics on this rank, as slices of whole tensors; live, no
        copies."""
        return masters.held(self.engine, self._topology)

    def written(self) -> list[TensorSlice]:
        """Those that this rank writes: equal holders write equal parts, so that no two write the same."""
        return masters.written(self.engine, self._topology)

    def masters(self) -> list[Tensor]:
        """Every tensor that holds master weights or running statistics on this rank, once each; live."""
        return masters.tensors(self.engine, self._topology)

    def laid_out(self, of_master: Callable[[Tensor], Tensor], *, to_write: bool) -> list[TensorSlice]:
        """Slices of what is laid out as `masters` are (`masters.laid_out`)."""
        return masters.laid_out(self.engine, self._topology, of_master, to_write=to_write)

    def take_over_masters(self) -> None:
        """Set the weights that the model computes with from master weights that were changed; collective."""
        masters.sync_from_masters(self.engine)

    def allocate_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Give the optimizer exactly the states that a checkpoint has (`masters.allocate_states`)."""
        masters.allocate_states(self.engine, self._topology, states)

    def loss_scaler_state(self) -> dict[str, int | float] | None:
        """The numbers of fp16's dynamic loss scale, under DeepSpeed's names; None: there is none."""
        return masters.loss_scale(self.engine)

    def resume(self, step: int, skipped: int, examples: int, loss_scale: Mapping[str, int | float] | None) -> None:
        """Restore filled-in master weights, and the run's position; collective."""
        masters.sync_from_masters(self.engine)
        self.engine.global_steps, self.engine.skipped_steps, self.engine.global_samples = step, skipped, examples
        masters.set_loss_scale(self.engine, loss_scale or {})

    def replicated(self) -> Iterator[tuple[str, bool, Tensor]]:
        """(name, whether tensor parallelism shards it, the part that this rank holds whole): weights (at ZeRO-3 the
        small ones), and at ZeRO 0 the fp32 masters and optimizer states."""
        parameters = dict(self.module.named_parameters())
        for name, parameter in parameters.items():
            if getattr(parameter, "ds_persist", True):
                yield name, is_sharded(parameter), parameter
        for norm_name, norm in batch_norms(self.module):
            yield f"{norm_name}.running_mean", norm.sharded, norm.running_mean
            yield f"{norm_name}.running_var", norm.sharded, norm.running_var
        for name, suffix, tensor in masters.unsharded_states(self.engine, self._topology):
            yield f"{name}/{suffix}", is_sharded(parameters[name]), tensor


def keep_gradient(values: Tensor, kept: list[Tensor]) -> Tensor:
    """Embeddings for the dense model, whose gradient is appended to `kept` as it arrives.

    A leaf of autograd would copy a gradient that is part of a wider matrix, as that of X_0 is.
    """
    anchor = torch.empty(0, requires_grad=True)  # what makes autograd come back here
    handed: Tensor = _KeepGradient.apply(anchor, values, kept)
    return handed


class _KeepGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, values: Tensor, kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.kept.append(grads[0])
        return None, None, None
