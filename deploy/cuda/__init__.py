"""CUDA int8 backend: one program for all sampling steps, the fastest kernel for every shape."""

from errata.deploy.cuda.graphs import GraphedUNet
from errata.deploy.cuda.installing import UNCHOSEN, follow_choices, row_of, runtime_layer
from errata.deploy.cuda.layer import CudaLayer

__all__ = ["UNCHOSEN", "CudaLayer", "GraphedUNet", "follow_choices", "row_of", "runtime_layer"]
