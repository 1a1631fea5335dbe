"""What this machine offers to a run: processor, memory, disk, GPUs."""

import os
import platform
import shutil
from pathlib import Path

import torch

from qtool.kernels import launch
from qtool.linalg.half_products import has_units


def describe_machine(folder: Path) -> dict[str, str]:
    """Facts by name, in words; disk is what is free where `folder` lies."""
    units = "units of the processor" if has_units() else "by float32 units: the processor has none for bfloat16"
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    shown = [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}" for gpu in gpus]
    return {
        "processor": f"{platform.machine()}, {os.cpu_count()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "products in bfloat16": units,
        "memory": f"{pages * page / 2**30:.1f} GiB",
        "free disk": f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB",
        "GPU": "; ".join(shown) if shown else f"none that torch {torch.__version__} sees; runs use the processor",
    }


def describe_products() -> dict[str, str]:
    """What computes quantized linears here beside decoding: by device, in words, or what is missing for it."""
    reason = launch.reason_not_to_run()
    int8 = "int8 by int8" if torch.cpu._is_vnni_supported() else "no int8 by int8, for which the processor lacks VNNI"
    fp8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    return {
        "fast on the CPU": f"packed weights of 4 and 8 bits in bfloat16; {int8}",
        "fast on a GPU": f"nothing: {reason}" if reason else f"2, 3, 4 and 8 bits, tables, int8{', FP8' if fp8 else ''}",
    }
