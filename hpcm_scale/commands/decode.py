"""Command: `.hpcm` files to PNG."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hpcm_scale.errors import Parser, one_line


@one_line
def main() -> None:
    """Entry point of `hpcm decode` and `python -m hpcm_scale.commands.decode`."""
    parser = Parser(
        prog="hpcm decode",
        description="Decode an .hpcm file (a folder of them: every one below it) into an 8-bit RGB PNG.",
    )
    parser.add_argument("source", help=".hpcm file, or folder of them")
    parser.add_argument("target", help="PNG to write, or folder for them")
    parser.add_argument("--weights", required=True, help="the weights that the file was made with")
    parser.add_argument("--device", help="for example cuda or cpu; default: cuda where there is one")
    arguments = parser.parse_args()

    from hpcm_scale.coding.codec import Codec
    from hpcm_scale.coding.files import decode_file, decoding_jobs, run_jobs
    from hpcm_scale.model.weights import device_of, load_weights
    from hpcm_scale.tracking.progress import progress

    jobs = decoding_jobs(Path(arguments.source), Path(arguments.target))
    device = device_of(arguments.device)
    model, _ = load_weights(arguments.weights)
    run_jobs(
        jobs, partial(decode_file, Codec(model.to(device))), partial(progress, description="decoding", unit="file")
    )
    files = arguments.source if len(jobs) == 1 else f"{len(jobs)} files of {arguments.source}"
    print(f"{files}: decoded to {arguments.target}")


if __name__ == "__main__":
    main()
