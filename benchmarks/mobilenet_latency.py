"""MobileNetV2 in ONNX Runtime at 25 % of channels: aligned (the default) and not.

python benchmarks/mobilenet_latency.py --out benchmarks/results/mobilenet_latency.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    import graphprune as gp
    from tests import models

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, x = models.mobilenet_v2().eval(), torch.randn(1, 3, 224, 224)
    text = f"# MobileNetV2, {options.ratio:.0%} of channels removed, one image\n"
    for align in ("auto", 1):
        slim = gp.slim(model, options.ratio, x, align=align)
        text += f"\n## align={align}\n\n```\n{gp.compare(model, slim, x, seconds=8)}\n```\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
