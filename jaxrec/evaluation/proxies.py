"""Proxy and truth: whether what a policy learned from is still worth what it promises.

The proxy is `reward@10`. The truth is `true_reward@10` where the source knows the true rates, else `spent@10`: what the
held-out baskets spent on the first ten.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROXY = "reward@10"
TRUTHS = {"true_reward@10": "the true reward", "spent@10": "the spend of the held-out baskets"}
LOST = 0.01
"""The share by which the truth may vary without having fallen."""


@dataclass(frozen=True)
class Course:
    """Proxy and truth at the start and at the end of a training."""

    stage: str
    truth: str
    """its name, one of TRUTHS"""
    proxy: tuple[float, float]
    true: tuple[float, float]

    @property
    def split(self) -> bool:
        """Whether the proxy has risen and the truth has fallen."""
        return self.proxy[1] > self.proxy[0] and self.true[1] < self.true[0] - LOST * abs(self.true[0])

    def __str__(self) -> str:
        moved = [f"{'rose' if b > a else 'fell' if b < a else 'stayed'} from {a:.4g} to {b:.4g}" for a, b in
                 (self.proxy, self.true)]  # fmt: skip
        told = f"{self.stage}: the learned reward of the first ten {moved[0]}, {TRUTHS[self.truth]} {moved[1]}"
        if self.split:
            return f"{told}: the policy exploits its reward model, and is worth less than before"
        return told


def has_split(start: Mapping[str, float], now: Mapping[str, float], lost: float = LOST) -> str:
    """The sentence that says so where the proxy has risen since the start and the truth has fallen by more than `lost`
    of it; else ""."""
    truth = truth_of(now)
    if truth is None or now[PROXY] <= start[PROXY] or now[truth] >= start[truth] - lost * abs(start[truth]):
        return ""
    return (
        f"the learned reward rose from {start[PROXY]:.4g} to {now[PROXY]:.4g} while {TRUTHS[truth]} fell from "
        f"{start[truth]:.4g} to {now[truth]:.4g}"
    )


def truth_of(values: Mapping[str, float], prefix: str = "") -> str | None:
    """The best truth that was measured, a name of TRUTHS; None without one."""
    return next((name for name in TRUTHS if f"{prefix}{name}" in values), None)


def courses(metrics: Path) -> list[Course]:
    """Of every stage in a metrics.jsonl that measured proxy and truth: the first evaluation against the last."""
    found: dict[str, list[dict]] = {}
    for text in metrics.read_text().splitlines() if metrics.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and f"valid/{PROXY}" in line and truth_of(line, "valid/"):
            found.setdefault(str(line.get("stage", "")), []).append(line)
    return [_course(stage, lines) for stage, lines in found.items() if len(lines) > 1]


def _course(stage: str, lines: list[dict]) -> Course:
    lines, truth = sorted(lines, key=lambda line: line["step"]), truth_of(lines[0], "valid/")
    return Course(stage, truth, *((lines[0][name], lines[-1][name]) for name in (f"valid/{PROXY}", f"valid/{truth}")))
