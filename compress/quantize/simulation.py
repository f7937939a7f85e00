"""From a scheme and a table of codes and scales to a UNet that simulates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchao.quantization.quant_primitives import dequantize_affine

from errata.compress.quantize.quantizers import StepwiseQuantizer, quantize_weight
from errata.large_weights import is_large, replace_parameter, sharing_copy
from errata.runtime.attention import QuantizedAttention
from errata.runtime.layers import Geometry, float_layer
from errata.runtime.replacement import replace_layers
from errata.runtime.scheme import AttentionScheme, LayerScheme, Scheme, layer_sites
from errata.runtime.step_context import StepContext


class SimulatedLayer(nn.Module):
    """A float layer whose weight lies on its integer grid, and whose input passes stepwise quantizers.

    `weight` is the dequantized weight `(O, I, …)`, float32. Of a large layer it is None: codes and scales are
    those of the table, not copies, and are dequantized when the layer runs. Each part of a split input has
    its own quantizer.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        float_layer: nn.Conv2d | nn.Linear,
        table: Mapping[str, Tensor],
        quantizers: Sequence[StepwiseQuantizer],
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = Geometry(float_layer)
        self.weight: nn.Parameter | None
        self._codes: Tensor
        self._weight_scale: Tensor
        bias = float_layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
        self.quantizers = nn.ModuleList(quantizers)
        self.take_codes(table, float_layer.weight.device)

    def take_codes(self, table: Mapping[str, Tensor], device: torch.device) -> None:
        """Compute with the codes and scales that the table has for this layer from now on."""
        codes = table[f"{self.scheme.name}.codes"].to(device)
        scale = table[f"{self.scheme.name}.weight_scale"].to(device)
        if not is_large(codes):
            self.weight = nn.Parameter(dequantized(self.scheme, codes, scale), requires_grad=False)
            return
        self.weight = None
        self.register_buffer("_codes", codes, persistent=False)
        self.register_buffer("_weight_scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for the quantized input; shapes as in the float layer."""
        if self.quantizers:
            x = self.geometry.quantize_parts(x, self.scheme.input_widths, self.quantizers)
        weight = self.weight
        dense = dequantized(self.scheme, self._codes, self._weight_scale) if weight is None else weight
        return self.geometry.apply(x, dense, self.bias)


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
    """Return the float weight of a layer that the table stands for, see `dequantized`."""
    return dequantized(layer, table[f"{layer.name}.codes"], table[f"{layer.name}.weight_scale"])


def dequantized(layer: LayerScheme, codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float weight that codes `(O, I, …)` and scales `(P, O)` stand for, `(O, I, …)`.

    Torchao computes it. So when an artifact is compared with its simulation, the artifact's own arithmetic
    (`errata.deploy.reference`) is checked against another implementation.
    """
    parts = codes.split(list(layer.input_widths), dim=1)
    weights = [
        dequantize_affine(part, (1, *part.shape[1:]), scale, None, torch.int8, output_dtype=torch.float32)
        for part, scale in zip(parts, scales, strict=True)
    ]
    return torch.cat(weights, dim=1).contiguous()


def simulate(unet: nn.Module, scheme: Scheme, table: Mapping[str, Tensor], context: StepContext) -> nn.Module:
    """Return a copy of `unet` whose layers and attentions compute on the grids in `table`.

    A correction of the cache is no part of it: `errata.runtime.feature_correction` adds it.

    The copy computes in float32 if anything is quantized. It shares the large weights of `unet` and the codes
    of the table. Float parameters that the table names take their value from there.
    """
    simulated = sharing_copy(unet, torch.float32 if scheme.layers else None)
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
    return simulated


def replace_parameters(unet: nn.Module, table: Mapping[str, Tensor]) -> None:
    """Give `unet` the float parameters that the table holds under their own names."""
    for name, _ in list(unet.named_parameters()):
        if name in table:
            replace_parameter(unet, name, table[name])


def _simulated_layer(
    module: nn.Conv2d | nn.Linear, layer: LayerScheme, table: Mapping[str, Tensor], context: StepContext
) -> SimulatedLayer:
    quantizers = [
        _site_quantizer(site.name, site.bits, table, context).to(module.weight.device)
        for site in layer_sites(layer)
    ]
    return SimulatedLayer(layer, module, table, quantizers)


def _site_quantizer(
    name: str, bits: int, table: Mapping[str, Tensor], context: StepContext
) -> StepwiseQuantizer:
    scale, zero_point = table[f"{name}.scale"], table[f"{name}.zero_point"].float()
    return StepwiseQuantizer(scale, zero_point, bits=bits, context=context)
