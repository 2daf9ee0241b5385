"""`hpcm check` that reads shards for parts of a second; the checks with faults start from it."""

from __future__ import annotations

from hpcm_scale.commands.check import main
from hpcm_scale.preflight import measurements

measurements.READ_SECONDS = measurements.CROP_SECONDS = 0.2

if __name__ == "__main__":
    main()
