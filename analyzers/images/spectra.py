"""Random images with the spectrum of given ones: what an objective makes of colours and textures without shapes."""

import torch
from torch import Tensor


def scrambled(images: Tensor, seed: int) -> Tensor:
    """Images with the amplitudes of these and random phases, the same for all colours, within 0 and 1.

    >>> scrambled(torch.rand(2, 3, 8, 8), seed=0).shape
    torch.Size([2, 3, 8, 8])
    """
    draw = torch.Generator().manual_seed(seed)
    size = images.shape[-2:]
    noise = torch.fft.rfft2(torch.randn(1, 1, *size, generator=draw)).to(images.device)
    phases = noise / noise.abs().clamp(min=1e-12)
    phases[..., 0, 0] = 1  # the mean stays what it is
    found: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * phases, s=size).clamp(0, 1)
    return found
