"""Models with 4-bit layers of bitsandbytes."""

from torch import nn


def keep_unpacked(model: nn.Module) -> None:
    """Has 4-bit layers compute on a CPU with AVX512-BF16 as they do on any other, in place.

    There a layer of bitsandbytes packs its weights for good the first time it runs in evaluation mode, with scales
    rounded to bfloat16. A packed layer passes no gradient on to what is before it, adapters included, and is written
    to a state dict that does not give the layer back.

    Raises:
        ValueError: a layer is packed already.
    """
    for name, module in model.named_modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit layer {name!r} has been run before, and bitsandbytes has packed its weights for inference "
                "on this CPU, which can't be undone exactly: load the model anew, and hand it over before anything "
                "runs it"
            )
        module.support_avx512bf16_for_cpu = False
