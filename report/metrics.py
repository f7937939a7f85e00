"""What a report measures beside the Fréchet distance: titles, which way is better, and the protocols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from errata.quality.precision_recall import NEIGHBOURS
from errata.report.judging import MOST_COMPARED
from errata.report.protocol import Protocol
from errata.report.results import FLOAT, Report


@dataclass(frozen=True)
class Metric:
    """`told` says how it is measured, given the report's protocol."""

    title: str
    higher_is_better: bool
    told: Callable[[Protocol], str]

    @property
    def arrow(self) -> str:
        """Points to the better side."""
        return "↑" if self.higher_is_better else "↓"


def _in_features(protocol: Protocol) -> str:
    shown = min(protocol.samples, MOST_COMPARED)
    real = protocol.real_compared
    return f"in the features of {protocol.feature_network}, {shown} images against {real} real ones"


def _to(protocol: Protocol) -> str:
    other = "the float model's image" if protocol.paired_with == FLOAT else "the uncorrected image"
    return f"mean over {protocol.samples} images, each against {other} from the same noise, at full size"


def _unknown(protocol: Protocol) -> str:
    return f"{protocol.samples} images"


METRICS = {
    "ssim": Metric("SSIM", True, lambda p: f"structural similarity, {_to(p)}"),
    "lpips": Metric("LPIPS", False, lambda p: f"learned perceptual distance, {_to(p)}"),
    "clip_score": Metric(
        "CLIP score", True, lambda p: f"fit of image and prompt, mean over {p.samples} images"
    ),
    "kid": Metric(
        "KID", False, lambda p: f"squared maximum mean discrepancy, cubic kernel, {_in_features(p)}; unscaled"
    ),
    "precision": Metric(
        "Precision",
        True,
        lambda p: f"share of images within reach of a real one's {NEIGHBOURS} nearest, {_in_features(p)}",
    ),
    "recall": Metric(
        "Recall",
        True,
        lambda p: (
            f"share of real images within reach of a generated one's {NEIGHBOURS} nearest, {_in_features(p)}"
        ),
    ),
    "inception_score": Metric(
        "Inception score",
        True,
        lambda p: f"from the class probabilities of {p.feature_network}, {p.samples} images, one split",
    ),
}


def measured_metrics(report: Report) -> dict[str, Metric]:
    """Those that any row has, in a fixed order; unknown ones last, under their own names."""
    there = dict.fromkeys(name for row in report.rows for name in row.metrics)
    known = {name: metric for name, metric in METRICS.items() if name in there}
    return known | {name: Metric(name, True, _unknown) for name in there if name not in METRICS}


def paired_name(report: Report) -> str:
    """What single images are compared with, in a word."""
    return "float" if report.protocol.paired_with == FLOAT else "uncorrected"


def metric_lines(report: Report) -> list[tuple[str, str]]:
    """The protocol of each metric as pairs of title and text."""
    protocol, lines = report.protocol, []
    if any(row.psnr is not None for row in report.rows):
        lines.append(("PSNR", _sentence(f"peak signal-to-noise ratio in dB, {_to(protocol)}")))
    for name, metric in measured_metrics(report).items():
        fact = protocol.facts.get(name)
        lines.append((metric.title, _sentence(metric.told(protocol)) + (f"; {fact}" if fact else "")))
    lines += [(name, fact) for name, fact in protocol.facts.items() if name not in METRICS]
    return lines


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
