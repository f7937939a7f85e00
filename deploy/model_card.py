"""The page of an artifact's repository on the Hugging Face hub."""

from __future__ import annotations

from collections import Counter

from errata.deploy.manifest import Manifest
from errata.runtime.paired_change import output_map_text

_PAGE = """\
---
library_name: errata
tags:
{tags}
---

# {title}

A frozen diffusion pipeline, an artifact of format `{format}`: every byte is checked when it is fetched, and
again when it is loaded.

    {summary}

```python
from errata import deploy

deployed = deploy.load(deploy.from_hub("{repo_id}"))
images = deployed(...).images  # takes what diffusers' {pipeline} takes
```

Or on the command line:

    errata pull {repo_id} --out artifact
    errata generate artifact --out images

| | |
| --- | --- |
{rows}

This page is no part of the artifact: `errata pull` and `deploy.from_hub` leave it on the hub.
"""


def model_card(manifest: Manifest, repo_id: str) -> str:
    """Return Markdown with the metadata that the hub reads; the same manifest and name give the same text."""
    tags = ["diffusers", "errata", *_kinds(manifest)]
    return _PAGE.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        title=repo_id.rpartition("/")[2],
        format=manifest.format,
        summary=manifest.summary(),
        repo_id=repo_id,
        pipeline=manifest.pipeline_class,
        rows="\n".join(f"| {name} | {value} |" for name, value in _facts(manifest).items()),
    )


def _kinds(manifest: Manifest) -> list[str]:
    words = []
    if manifest.is_quantized:
        words.append("quantized")
    if manifest.schedule.has_cache:
        words.append("feature-caching")
    return words


def _facts(manifest: Manifest) -> dict[str, str]:
    sampler, schedule = manifest.sampler, manifest.schedule
    cached = schedule.num_steps - len(schedule.full_steps)
    return {
        "recipe": f"`{manifest.recipe.name}`",
        "layers": _layers(manifest),
        "denoiser": f"`{manifest.unet_class}`, {manifest.denoiser_bytes:,} bytes; "
        f"{manifest.float32_weight_bytes:,} in float32",
        "whole artifact": f"{manifest.artifact_bytes:,} bytes in {len(manifest.files)} files",
        "sampler": f"`{sampler.scheduler_class}`, {sampler.num_inference_steps} steps",
        "cache": f"{cached} of {schedule.num_steps} denoiser calls are cached" if cached else "none",
        "output": output_map_text(manifest.scheme, manifest.calibrated_output),
        "made by": ", ".join(f"{name} {version}" for name, version in manifest.made_by.items()),
        "manifest SHA-256": f"`{manifest.sha256}`",
    }


def _layers(manifest: Manifest) -> str:
    if not manifest.is_quantized:
        return "nothing quantized"
    counts = Counter(layer.label() for layer in manifest.scheme.layers)
    return ", ".join(f"{count} of {label}" for label, count in sorted(counts.items()))
