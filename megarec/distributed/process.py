"""A process becomes a rank: device, CPU threads, memory, random numbers, the job's process group.

Freed memory stays with the process: by default glibc maps every large block again and returns it when freed. A training
step on a CPU frees and allocates the same gigabytes over and over, and each time the kernel clears the pages again,
one fault per 4 KiB: on a virtual machine that cost a fifth of a dense step. With these two settings of mallopt(3) the
next step finds the pages of the last one.
"""

import ctypes
import hashlib
import os
import socket
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megarec.config.sections import RunConfig
from megarec.distributed.rendezvous import check_variables, keep_to_loopback, store_of_launcher, store_of_one
from megarec.errors import UserError

FLOP_FOR_THREADS = 2e9  # of a step, from which on more threads pay: 1.2 x on two cores at 1.3e9, 1.8 x at 1.0e10
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1
_TRIM_THRESHOLD, _MMAP_MAX = 128 * 1024, 65536  # glibc's own
LONGEST_START = timedelta(minutes=5)
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))


def threads_of_rank(local_ranks: int) -> int:
    """The rank's own cores where a launcher has bound it to some (`deepspeed --bind_cores_to_rank`), else its share.

    Args:
        local_ranks: ranks of this machine.
    """
    cores = os.sched_getaffinity(0)
    return len(cores) if _bound(cores) else max(1, len(cores) // local_ranks)


def threads_that_pay(threads: int, flop: float) -> int:
    """One for a small step: its many short operations gain little from more threads, and beside any other load these
    wait for one another twenty times as long as they compute.

    Args:
        threads: what the rank may use.
        flop: of its micro-batch, forward and backward.
    """
    return threads if flop >= FLOP_FOR_THREADS else 1


def _bound(cores: set[int]) -> bool:
    """Whether this process may use fewer cores than the one that started it."""
    try:
        return cores != os.sched_getaffinity(os.getppid())
    except (ProcessLookupError, PermissionError):  # a parent that ended, or is another user's
        return False


def keep_freed_memory() -> tuple[bool, str]:
    """Set it for this process, whose resident memory then stays at its peak; whether it worked, and why (not)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False, "allocator: this C library has no mallopt, freed memory goes back to the system"
    if mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER):
        return True, "allocator: freed memory stays with the process (mallopt)"
    return False, "allocator: mallopt refused, freed memory goes back to the system"


def give_back_freed_memory() -> None:
    """Undo `keep_freed_memory`: large blocks are mapped one by one again, and resident memory is memory in use."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, _MMAP_MAX)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)


def rank_device() -> torch.device:
    """Where this rank computes: the accelerator that torch finds, unless DS_ACCELERATOR says cpu."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def check_accelerator() -> None:
    """Refuse to train on the CPU of a machine whose accelerator torch cannot use.

    One such host in a job would use another backend than the others, and wait; alone, it would be slow silently.

    Raises:
        UserError: a driver is there, torch finds no device, and DS_ACCELERATOR does not ask for the CPU.
    """
    driver = next((device for device in DRIVERS if device.exists()), None)
    if driver is None or torch.accelerator.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    build = torch.version.cuda or torch.version.hip
    built = f"built for {build}" if build else "built for CPUs only"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible!r}"
    raise UserError(
        f"{socket.gethostname()} has an accelerator ({driver}) that torch {torch.__version__} ({built}{hidden}) cannot "
        "use: install the torch of requirements-gpu.txt and a driver that fits it, or set DS_ACCELERATOR=cpu to train "
        "on the CPU"
    )


def prepare_cuda(deterministic: bool, output: Path) -> None:
    """What CUDA reads when it starts; harmless without it.

    Args:
        deterministic: sums of a fixed order. FBGEMM adds up a row that a batch meets more than 1,024 times by atomic
            additions otherwise, and cuBLAS may split a product differently each time.
        output: train.output_dir, where NCCL leaves its last operations when one of them does not end.
    """
    # Lists have other lengths in every step: without it freed blocks of odd sizes are not found again.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(output.resolve() / "nccl-rank-"))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True, warn_only=True)


def describe_device(device: torch.device) -> str:
    """For the log: the device, and the relevant versions."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu, {threads} thread{'s' * (threads > 1)} a rank, {dist.get_backend()}"
    count = torch.accelerator.device_count()
    if device.type != "cuda":
        return f"{device.type}, {count} on this host, {dist.get_backend()}"
    loaded = Path("/proc/driver/nvidia/version")
    driver = loaded.read_text().splitlines()[0] if loaded.exists() else "driver unknown"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    name, runtime = torch.cuda.get_device_name(device), torch.version.cuda or torch.version.hip
    return f"{name}, {count} on this host, {driver}, CUDA {runtime}, NCCL {nccl}"


def start_process(config: RunConfig) -> torch.device:
    """Join the job that the launcher started (or be a job of one rank); returns this rank's device.

    Raises:
        UserError: the launcher's variables do not describe a job, or the accelerator cannot be used.
    """
    quiet_libraries()
    check_accelerator()
    prepare_cuda(config.train.deterministic, Path(config.train.output_dir))
    if not dist.is_initialized():
        check_variables(os.environ)
    if alone := "RANK" not in os.environ and not dist.is_initialized():
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    torch.set_num_threads(config.train.threads or threads_of_rank(local_ranks))  # an accelerator's weights start here
    if rank_device().type == "cpu":
        keep_freed_memory()
    else:
        torch.accelerator.set_device_index(device_number(os.environ, torch.accelerator.device_count()))
        # fp32 is fp32, and sums of low-precision products are made in fp32: the same numbers on every device.
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    device = rank_device()
    if not dist.is_initialized():
        timeout = timedelta(seconds=config.parallel.timeout_seconds)
        # Hosts need not start at the same moment: the rendezvous may take longer than a collective.
        longest = max(timeout, LONGEST_START)
        backend = dist.get_default_backend_for_device(device)
        # With it NCCL connects now and in one order, not at whichever collective comes first.
        device_id = None if device.type == "cpu" else device
        store: dist.Store | None
        if alone:
            store, port = store_of_one(longest)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        else:
            store = store_of_launcher(os.environ, longest)
        keep_to_loopback(os.environ)
        if store is not None:
            given: dict[str, Any] = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
            dist.init_process_group(backend, store=store, timeout=longest, device_id=device_id, **given)
        else:
            dist.init_process_group(backend, timeout=longest, device_id=device_id)
        distributed_c10d._set_pg_timeout(timeout)
        # What groups take that are made without one: those of the topology, and DeepSpeed's own.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    seed_generators(config.train.seed, dist.get_rank())
    return device


def device_number(environment: Mapping[str, str], devices: int) -> int:
    """Which of this host's devices is the rank's: the one of its number on the host.

    Raises:
        UserError: the host has fewer.
    """
    number = int(environment["LOCAL_RANK"])
    if number >= devices:
        raise UserError(
            f"LOCAL_RANK={number}: this host shows {devices} devices to the rank; start at most {devices} ranks here, "
            "or show it more (CUDA_VISIBLE_DEVICES), or train on CPUs (DS_ACCELERATOR=cpu)"
        )
    return number


def seed_generators(seed: int, rank: int) -> None:
    """Set torch's own generators, on every device, by seed and rank; a checkpoint holds their states.

    Nothing of megarec draws from them; what a user's own module draws (nn.Dropout) is the same in an equal run.
    """
    digest = hashlib.blake2b(f"{seed}/torch/{rank}".encode(), digest_size=7).digest()  # 56 bits, as first weights
    torch.manual_seed(int.from_bytes(digest, "big"))


def leave_job() -> None:
    """Close NCCL's connections at the end of a run that went well: it warns of those it finds open, and aborts them."""
    if dist.is_initialized() and dist.get_backend() != "gloo":
        dist.destroy_process_group()


def quiet_libraries() -> None:
    """Start-up chatter of the libraries must not drown the run's own lines; their errors still show."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\.")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated")
