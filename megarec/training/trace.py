"""A timeline of some steps, of every thread and device, as TensorBoard's profiler page and ui.perfetto.dev open it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler


@contextmanager
def tracing(steps: tuple[int, int] | None, directory: Path, rank: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """Trace the steps first .. last, counted from 1; yields what must be called after every step.

    Args:
        steps: None: nothing is traced.
        directory: for one file a rank, rank<r>.<time>.pt.trace.json.
        done: steps that lie before this process's first.
    """
    if steps is None or steps[1] <= done:
        yield lambda: None
        return
    first, last = max(steps[0], done + 1), steps[1]
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(
        activities=activities,
        schedule=schedule(wait=first - done - 1, warmup=0, active=last - first + 1, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(directory), worker_name=f"rank{rank}"),
        experimental_config=_ExperimentalConfig(profile_all_threads=True),  # the thread that sends ids as well
    ) as profiler:
        yield profiler.step
