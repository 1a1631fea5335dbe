"""What this machine offers to a run: processor, memory, disk, GPUs."""

import os
import platform
import shutil
from pathlib import Path

import torch


def describe_machine(folder: Path) -> dict[str, str]:
    """Facts by name, in words; disk is what is free where `folder` lies."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    shown = [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}" for gpu in gpus]
    return {
        "processor": f"{platform.machine()}, {os.cpu_count()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{pages * page / 2**30:.1f} GiB",
        "free disk": f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB",
        "GPU": "; ".join(shown) if shown else f"none that torch {torch.__version__} sees; runs use the processor",
    }
