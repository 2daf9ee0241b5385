"""Cut photos into tiles of 512², which decode sooner: tiles.py PHOTOS OUT"""

import sys
from pathlib import Path

from PIL import Image

photos, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
for path in sorted(p for p in photos.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"}):
    image = Image.open(path).convert("RGB")
    for top in range(0, image.height - 511, 512):
        for left in range(0, image.width - 511, 512):
            image.crop((left, top, left + 512, top + 512)).save(
                out / f"{path.stem}_{top}_{left}.jpg", quality=97, subsampling=0
            )
