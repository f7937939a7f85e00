"""From a scheme and a table of codes and scales to a UNet that simulates them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchao.quantization.quant_primitives import dequantize_affine

from errata.compress.quantize.quantizers import StepwiseQuantizer, quantize_weight
from errata.runtime.attention import QuantizedAttention
from errata.runtime.layers import Geometry, float_layer
from errata.runtime.replacement import replace_layers
from errata.runtime.scheme import AttentionScheme, LayerScheme, Scheme, layer_sites
from errata.runtime.step_context import StepContext


class SimulatedLayer(nn.Module):
    """A float layer whose weight lies on its integer grid, and whose input passes stepwise quantizers.

    `weight` is the dequantized weight `(O, I, …)`; each part of a split input has its own quantizer.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        geometry: Geometry,
        weight: Tensor,
        bias: Tensor | None,
        quantizers: Sequence[StepwiseQuantizer],
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = geometry
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.quantizers = nn.ModuleList(quantizers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for the quantized input; shapes as in the float layer."""
        if self.quantizers:
            x = self.geometry.quantize_parts(x, self.scheme.input_widths, self.quantizers)
        return self.geometry.apply(x, self.weight, self.bias)


def quantize_weights(unet: nn.Module, scheme: Scheme) -> dict[str, Tensor]:
    """Return every quantized layer's `<layer>.codes`, int8, and `<layer>.weight_scale`, `(P, O)`.

    `P` is the number of parts; a part of a split input has its own scales.
    """
    table: dict[str, Tensor] = {}
    for layer in scheme.layers:
        weight = float_layer(unet, layer.name).weight.detach().float().cpu()
        pairs = [
            quantize_weight(part.contiguous(), bits=layer.weight_bits)
            for part in weight.split(list(layer.input_widths), dim=1)
        ]
        table[f"{layer.name}.codes"] = torch.cat([codes for codes, _ in pairs], dim=1).contiguous()
        table[f"{layer.name}.weight_scale"] = torch.stack([scale for _, scale in pairs])
    return table


def range_table(ranges: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return `<site>.scale`, float32, and `<site>.zero_point`, uint8, each `(T,)`."""
    table: dict[str, Tensor] = {}
    for site, (scale, zero_point) in ranges.items():
        table[f"{site}.scale"] = scale.float().contiguous()
        table[f"{site}.zero_point"] = zero_point.to(torch.uint8).contiguous()
    return table


def simulated_weight(layer: LayerScheme, table: Mapping[str, Tensor]) -> Tensor:
    """Return the float weight that the codes stand for, `(O, I, …)`.

    Torchao computes it. So when an artifact is compared with its simulation, the artifact's own arithmetic
    (`errata.deploy.reference`) is checked against another implementation.
    """
    parts = table[f"{layer.name}.codes"].split(list(layer.input_widths), dim=1)
    scales = table[f"{layer.name}.weight_scale"]
    weights = [
        dequantize_affine(part, (1, *part.shape[1:]), scale, None, torch.int8, output_dtype=torch.float32)
        for part, scale in zip(parts, scales, strict=True)
    ]
    return torch.cat(weights, dim=1).contiguous()


def simulate(unet: nn.Module, scheme: Scheme, table: Mapping[str, Tensor], context: StepContext) -> nn.Module:
    """Return a copy of `unet` whose layers and attentions compute on the grids in `table`.

    A correction of the cache is no part of it: `errata.runtime.feature_correction` adds it.

    The copy is in float32 if anything is quantized. Float parameters that the table names take their value
    from there.
    """
    simulated = copy.deepcopy(unet)
    if scheme.layers:
        simulated = simulated.float()
    replace_parameters(simulated, table)
    device = next(simulated.parameters()).device

    def attention(products: AttentionScheme) -> QuantizedAttention:
        query, key, value, probabilities = (
            _site_quantizer(name, products.bits, table, context).to(device) for name in products.sites
        )
        return QuantizedAttention(query=query, key=key, value=value, probabilities=probabilities)

    replace_layers(
        simulated,
        scheme,
        layer=lambda layer, module: _simulated_layer(module, layer, table, context),
        attention=attention,
    )
    return simulated.eval()


@torch.no_grad()
def replace_parameters(unet: nn.Module, table: Mapping[str, Tensor]) -> None:
    """Give `unet`, in place, the float parameters that the table holds under their own names."""
    for name, parameter in unet.named_parameters():
        if name in table:
            parameter.copy_(table[name])


def _simulated_layer(
    module: nn.Conv2d | nn.Linear, layer: LayerScheme, table: Mapping[str, Tensor], context: StepContext
) -> SimulatedLayer:
    weight = simulated_weight(layer, table).to(module.weight.device, module.weight.dtype)
    quantizers = [
        _site_quantizer(site.name, site.bits, table, context).to(module.weight.device)
        for site in layer_sites(layer)
    ]
    return SimulatedLayer(layer, Geometry(module), weight, module.bias, quantizers)


def _site_quantizer(
    name: str, bits: int, table: Mapping[str, Tensor], context: StepContext
) -> StepwiseQuantizer:
    scale, zero_point = table[f"{name}.scale"], table[f"{name}.zero_point"].float()
    return StepwiseQuantizer(scale, zero_point, bits=bits, context=context)
