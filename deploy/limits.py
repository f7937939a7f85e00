"""Sizes that no artifact's file exceeds: a reader refuses them before it spends memory or time on them.

Each is several times what a large network needs (SDXL's UNet in 4 bits: 3,609 modules and parameters, a
tensor header of 710 kB, a scheme of 130 kB in the manifest), and `docs/artifact-format.md` states them all.
"""

from __future__ import annotations

LARGEST_MANIFEST = 8 * 2**20
# `config.json`, `model_index.json` and the like.
LARGEST_SETTINGS = 2**20
# Any other JSON file: the largest tokenizers take 35 MB.
LARGEST_JSON = 64 * 2**20
# Values in one JSON file, counted by commas and opening brackets, those within text included.
MOST_JSON_VALUES = 4_000_000
DEEPEST_JSON = 64
LARGEST_HEADER = 16 * 2**20
MOST_DIMENSIONS = 8
# Modules and parameters of one network, together.
MOST_MODULES = 20_000
# Stride, padding and dilation of a convolution, in pixels.
LARGEST_STRIDE = 64
# Side of an image or latent that a network is made for, in pixels.
LARGEST_SAMPLE = 2**16
# Denoiser calls of one run; 4,000 steps with a second-order sampler make 8,000.
MOST_CALLS = 10_000
# Patterns of a recipe times modules of the network: each is compared with each.
MOST_MATCHES = 5_000_000
LONGEST_PATTERN = 256
# Any whole number in the settings of a network or a scheduler.
LARGEST_NUMBER = 2**24
# The same in a scheduler, which makes arrays and lists of such lengths.
LARGEST_SCHEDULER_NUMBER = 1_000_000
