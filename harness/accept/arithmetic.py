"""Float32 that is float32, and noise that is the CPU's bit for bit."""
import torch
from torch import Tensor

from attacks.noise import example_keys, keyed_normal, keyed_uniform
from harness.accept.check import Check, Found, Site
from harness.device import torchs_own_settings

ROUNDING = 3e-5  # relative error of a float32 result, in l_2; TF32's is 3e-4


def float32_error(device: torch.device) -> dict[str, float]:
    """|float32 - float64| / |float64| in l_2, of a convolution and of a product on the device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 32, 32, generator=generator)
    kernel = torch.randn(64, 64, 3, 3, generator=generator)
    left, right = torch.randn(2, 512, 512, generator=generator)
    operations = {"convolution": (torch.conv2d, x, kernel), "product": (torch.matmul, left, right)}

    def error(operation, *arguments: Tensor) -> float:
        exact = operation(*(value.double() for value in arguments))
        found = operation(*(value.to(device) for value in arguments)).cpu().double()
        return float((found - exact).norm() / exact.norm())

    return {name: error(*given) for name, given in operations.items()}


def float32(site: Site) -> Found:
    """A convolution and a product against float64; with TF32 the first would be a hundred times as far."""
    errors = float32_error(site.device)
    with torchs_own_settings():
        theirs = float32_error(site.device)
    shown = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
    text = f"{shown} of the result (torch's own settings: convolution {theirs['convolution']:.1e})"
    figures = {"ours": errors, "torch_settings": theirs, "most": ROUNDING}
    return Found(max(errors.values()) <= ROUNDING, text, figures)


def noise(site: Site) -> Found:
    """Keyed noise of 64 colour images: the bits of uniform numbers, and the values of normal ones.

    A normal number is made of two uniform ones by the device's own logarithm and cosine, whose last bits are
    its own too.
    """
    keys = example_keys(torch.arange(64), 0, 1)
    shape, beneath, there = (3, 32, 32), (2, 3, 32, 32), keys.to(site.device)
    uniform = int((keyed_uniform(there, beneath).cpu() != keyed_uniform(keys, beneath)).sum())
    apart = float((keyed_normal(there, shape).cpu() - keyed_normal(keys, shape)).abs().max())
    text = (f"{uniform} of {64 * 2 * 3 * 32 * 32:,} uniform numbers differ; the normal ones made of them, by "
            f"the device's own logarithm and cosine, by {apart:.1e} at most")
    return Found(uniform == 0 and apart <= 1e-5, text, {"uniform": uniform, "normal": apart})


CHECKS = (Check("float32", "float32 is float32", float32, seconds=15),
          Check("noise", "keyed noise is the CPU's", noise, seconds=10))
