"""Where to run what the user did not place."""

import torch


def default_device() -> torch.device:
    """The accelerator, if there is one; else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
