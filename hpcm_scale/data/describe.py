"""What is in a set of shards, in a few lines."""

from __future__ import annotations

import numpy as np

from hpcm_scale.data.index import ShardIndex

EDGES = (0, 256, 512, 768, 1024, 1536, 2048, 4096)
"""Lower edges of the histogram of smaller sides, pixels; 256 and 512 are crops."""


def describe(location: str, index: ShardIndex) -> str:
    """Count, megapixels, bytes, shards, smallest side and a histogram of smaller sides."""
    sides = index.smaller_sides
    smallest = int(sides.argmin())
    lines = [
        f"{location}: {counted(len(index), 'photo')} in {counted(len(index.shards), 'shard')}",
        f"  {index.pixels / 1e6:,.1f} megapixels, {index.bytes / 1e6:,.1f} MB"
        f" ({8 * index.length.sum() / index.pixels:.2f} bits per pixel)",
        f"  smallest side {sides[smallest]} pixels ({index.keys[smallest]})",
        "",
        "  smaller side, pixels",
    ]
    counts = np.histogram(sides, bins=(*EDGES, np.inf))[0]
    for low, high, count in zip(EDGES, (*EDGES[1:], None), counts, strict=True):
        if count:
            span = f"{low:,} and more" if high is None else f"{low:,} to {high - 1:,}"
            lines.append(f"  {span:>16} {count:>9,} {'█' * max(1, round(40 * count / counts.max()))}")
    return "\n".join(lines)


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 photo, 1,234 photos."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
