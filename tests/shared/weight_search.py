"""Brevitas' search for the scales of a weight without its layers, for the many tests that compress networks.

Codes and scales are equal to the last bit (`tests/compress/quantize/test_quantizers.py`), in a tenth of the
time for small layers: brevitas walks through its modules at every threshold.
"""

import torch
from torch import Tensor

# How many thresholds brevitas tries, and the smallest one, for channels of zeros.
THRESHOLDS = 20
SMALLEST_THRESHOLD = 1e-10


@torch.no_grad()
def quick_weight_search(weight: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, int8, and scales, `(O,)`, as `quantize_weight` returns them."""
    rows = weight.flatten(1).float()
    widest = rows.abs().amax(dim=1)
    narrowest = best = widest / THRESHOLDS
    least = torch.full_like(widest, torch.inf)
    for share in torch.linspace(0, 1, THRESHOLDS).tolist():
        threshold = narrowest + (widest - narrowest) * share
        codes, scale = codes_within(threshold, rows, bits)
        error = (codes * scale - rows).square().sum(dim=1)
        best = torch.where(error < least, threshold, best)
        least = torch.minimum(error, least)
    codes, scale = codes_within(best, rows, bits)
    return codes.to(torch.int8).reshape(weight.shape), scale.flatten()


def codes_within(threshold: Tensor, rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    most = 2 ** (bits - 1) - 1
    scale = (threshold.clamp(min=SMALLEST_THRESHOLD) / most)[:, None]
    return torch.round(rows / scale).clamp_(-most, most), scale
