"""Puts the layers of an engine into a network that is about to be written as ONNX."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.downsampling import KDownsample2D
from diffusers.models.upsampling import KUpsample2D
from torch import Tensor, nn

from errata.deploy.engines.onnx_layers import (
    EngineAttention,
    EngineLayer,
    EngineResampling,
    StepTables,
    WeightOnlyEngineLayer,
)
from errata.deploy.engines.onnx_qdq import QDQAttention, QDQLayer
from errata.deploy.tensors import read_codes
from errata.runtime.attention import set_attention
from errata.runtime.feature_correction import correct_outputs
from errata.runtime.layers import Geometry, float_layer, replace_module
from errata.runtime.scheme import Scheme
from errata.runtime.step_context import StepContext


def install_engine_layers(
    unet: nn.Module, scheme: Scheme, tensors: Mapping[str, Tensor], context: StepContext, *, form: str
) -> None:
    """Puts them into `unet`, in place, for its float ones.

    Args:
        unet: the float network.
        scheme: of its layers.
        tensors: those of the artifact.
        context: tells the step.
        form: see `export_onnx`.
    """
    layer_class, attention_class = (
        (EngineLayer, EngineAttention) if form == "gathered" else (QDQLayer, QDQAttention)
    )
    for layer in scheme.layers:
        module = float_layer(unet, layer.name)
        codes = read_codes(layer, tensors, module.weight.shape)
        if layer.activation_bits is None:
            made: nn.Module = WeightOnlyEngineLayer(layer, Geometry(module), codes, tensors)
        else:
            made = layer_class(layer, Geometry(module), codes, tensors, context)
        replace_module(unet, layer.name, made)
    for attention in scheme.attentions:
        query, key, value, probabilities = (StepTables(name, tensors, context) for name in attention.sites)
        processor = attention_class(query=query, key=key, value=value, probabilities=probabilities)
        set_attention(unet, attention.name, processor)
    correct_outputs(unet, scheme, tensors, context=context, device=torch.device("cpu"))
    for name, module in list(unet.named_modules()):
        if isinstance(module, KDownsample2D | KUpsample2D):
            replace_module(unet, name, EngineResampling(module))
