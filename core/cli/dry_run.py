"""A dry run in words."""

from typing import TYPE_CHECKING

from errata.cli.output import megabytes, table

if TYPE_CHECKING:
    from errata.compress.jobs.dry_run import LayerDryRun, Preview


def preview_text(preview: "Preview") -> str:
    """A table of layers, the cache, what is done beyond rounding, and the size."""
    columns = ("layer", "kind", "scheme", "input parts", "weight", "bytes")
    rows = table(columns, [_row(layer) for layer in preview.layers])
    facts = {
        "recipe": preview.recipe.name,
        "rounding": _rounding(preview),
        "exceptions": _exceptions(preview),
        "cache": preview.cache_text(),
        "steps": str(preview.num_steps),
        **{name: megabytes(size) for name, size in preview.sizes.items()},
        "in all": f"{megabytes(preview.total_bytes)}, {preview.total_bytes / preview.float32_bytes:.3f} of "
        f"the {megabytes(preview.float32_bytes)} of its float32 weights",
    }
    width = max(map(len, facts))
    lines = "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
    return f"{rows}\n\n{lines}\nnothing was written"


def _row(layer: "LayerDryRun") -> tuple[object, ...]:
    parts = " + ".join(map(str, layer.parts)) or "-"
    shape = " x ".join(map(str, layer.shape)) or "-"
    return layer.name, layer.kind, layer.scheme, parts, shape, layer.weight_bytes


def _exceptions(preview: "Preview") -> str:
    quantization = preview.recipe.quantization
    return (quantization.exceptions() if quantization is not None else "") or "none"


def _rounding(preview: "Preview") -> str:
    quantization = preview.recipe.quantization
    if quantization is None:
        return "none: nothing is quantized"
    learned = quantization.rounding
    words = ["to nearest"]
    if learned is not None:
        words = [f"learned, {learned.iterations} iterations a block on {learned.samples} inputs"]
    words += ["equalized first"] * quantization.equalization
    words += ["biases corrected"] * quantization.bias_correction
    return ", ".join(words)
