"""Where to run what the user did not place."""

import os

import torch


def default_device() -> torch.device:
    """The accelerator, if there is one; else the CPU. Of several processes on a machine, each gets its own."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return torch.device("cpu")
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None:
        return device
    return torch.device(device.type, int(local_rank) % torch.accelerator.device_count())
