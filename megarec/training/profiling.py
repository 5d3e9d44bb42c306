"""Where the time of a step goes.

StepTimer              milliseconds by part: data, exchange, dense, optimizer
time_forward           the forward passes of a module as a part of their own
measure_gemm_tflops    the GEMM peak of a rank where it runs: the reference of the MFU
tracing                a timeline of some steps, for TensorBoard's profiler page and ui.perfetto.dev
"""

import itertools
import logging
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from megarec.models.cpu_gemm import fast_cpu_gemm

_log = logging.getLogger(__name__)


def measure_gemm_tflops(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """TFLOP/s of the best square GEMM found in about `seconds`; all ranks should measure at the same time.

    An accelerator is measured at one size, warm and by its own clock: its first product loads libraries, and the host
    cannot time a product.
    """
    if device.type != "cpu":
        return _gemm_tflops_of_accelerator(dtype, device)
    best = 0.0
    random = torch.Generator(device).manual_seed(0)  # its own: how many numbers it draws depends on the clock
    end = time.perf_counter() + seconds
    size = 128
    while time.perf_counter() < end:
        a = torch.randn(size, size, generator=random, device=device).to(dtype)
        with fast_cpu_gemm(device, dtype):  # as the model multiplies
            torch.matmul(a, a)
            start = time.perf_counter()
            torch.matmul(a, a)
            elapsed = time.perf_counter() - start
        best = max(best, 2 * size**3 / elapsed / 1e12)
        # grow only while a GEMM of twice the size (8 times the work) still fits the time that is left
        if size < 8192 and 2 * 8 * elapsed < end - time.perf_counter():
            size *= 2
    return best


GEMM_SIZE, GEMM_PRODUCTS = 8192, 20


def _gemm_tflops_of_accelerator(dtype: torch.dtype, device: torch.device) -> float:
    random = torch.Generator(device).manual_seed(0)
    a = torch.randn(GEMM_SIZE, GEMM_SIZE, generator=random, device=device).to(dtype)
    out = torch.matmul(a, a)
    torch.matmul(a, a, out=out)
    events = [torch.Event(device=device, enable_timing=True) for _ in range(GEMM_PRODUCTS + 1)]
    events[0].record()
    for event in events[1:]:
        torch.matmul(a, a, out=out)
        event.record()
    events[-1].synchronize()
    milliseconds = statistics.median(start.elapsed_time(stop) for start, stop in itertools.pairwise(events))
    return 2 * GEMM_SIZE**3 / milliseconds / 1e9


PEAK_TFLOPS = {  # dense, fp16 and bf16, of the data sheet, by a part of torch's name for the device
    "GB200": 2500, "B300": 2250, "B200": 2250, "H200 NVL": 835, "H200": 989, "GH200": 989, "H100 NVL": 835,
    "H100 PCIe": 756, "H100": 989, "A100": 312, "A40": 149.7, "A30": 165, "A10": 125, "L40S": 362, "L4": 121,
    "V100": 125, "MI355X": 2516, "MI325X": 1307, "MI300X": 1307, "MI250X": 191.5,
}  # fmt: skip


def data_sheet_tflops(dtype: torch.dtype, device: torch.device) -> float | None:
    """The peak of a device by its data sheet, in fp16 and bf16; None: not known, as for every CPU."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)


class StepTimer:
    """Adds up wall-clock seconds by part.

    On an accelerator work is queued, so a part is only known after a synchronisation: `sampled` steps pay for it,
    the others are left out of the parts. On the CPU every step counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sampled = True
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.sampled:
            yield
            return
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def next_step(self, sampled: bool) -> None:
        self.steps += self.sampled
        self.sampled = sampled or self.device.type == "cpu"

    def milliseconds(self) -> dict[str, float]:
        """Mean milliseconds a step by part since the last call."""
        steps = max(1, self.steps)
        result = {name: 1e3 * total / steps for name, total in self.seconds.items()}
        self.seconds.clear()
        self.steps = 0
        return result

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def time_forward(module: nn.Module, timer: StepTimer) -> None:
    """Add up the module's forward passes in training as the part "forward": of the dense part, what a rank computes
    before it meets the others (ZeRO 0 to 2, no tensor parallelism)."""
    running = ExitStack()

    def begin(module: nn.Module, _: object) -> None:
        if module.training:
            running.enter_context(timer.part("forward"))

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(lambda *_: running.close())


@contextmanager
def tracing(steps: tuple[int, int] | None, directory: Path, rank: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """Trace the steps first .. last, counted from 1; yields what must be called after every step.

    Args:
        steps: None: nothing is traced.
        directory: for one file a rank, rank<r>.<time>.pt.trace.json; one that cannot be written is a warning.
        done: steps that lie before this process's first.
    """
    if steps is None or steps[1] <= done:
        yield lambda: None
        return
    first, last = max(steps[0], done + 1), steps[1]

    def write(profiler: profile) -> None:
        try:
            tensorboard_trace_handler(str(directory), worker_name=f"rank{rank}")(profiler)
        except Exception as error:
            _log.warning(
                "%s HAS NO TRACE OF RANK %d, THE RUN GOES ON: %s", directory, rank, " ".join(str(error).split())
            )

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(
        activities=activities,
        schedule=schedule(wait=first - done - 1, warmup=0, active=last - first + 1, repeat=1),
        on_trace_ready=write,
        experimental_config=_ExperimentalConfig(profile_all_threads=True),  # the thread that sends ids as well
    ) as profiler:
        yield profiler.step
