"""What a person can do about failed rows, by status."""

from __future__ import annotations

from collections.abc import Mapping

from blip2_actor import Status

REMEDIES: Mapping[str, str] = {
    Status.MISSING_IMAGE: "Nothing to caption: the row or sample has no image. Check --image-column.",
    Status.UNREADABLE: "The storage did not deliver the bytes. Check the file, then retry.",
    Status.FETCH_FAILED: "The address gave no image. Check it and its server, then retry.",
    Status.UNDECODABLE: (
        "The file is damaged, cut off or of another format. Replace it, or accept cut-off images with "
        "--image-accept-truncated in a new run."
    ),
    Status.TOO_LARGE: (
        "The image exceeds a limit. Retry with a higher --image-memory-bytes if it needs more memory; else "
        "raise --image-max-pixels or --image-max-file-bytes in a new run."
    ),
    Status.DECODER_CRASHED: "The decoder died on this image. Treat the file as hostile, or retry once.",
    Status.DECODER_TIMED_OUT: (
        "Decoding took too long. Retry on a less busy machine, or raise --image-wall-s."
    ),
    Status.REFUSED: (
        "The prompt is too long or contradicts the model: change it in a new run. Or the address of the "
        "image may not be asked: correct it, or retry with --allow-private-hosts."
    ),
    Status.FAILED: (
        "The model failed on this row also when it ran alone. Retry; if it fails again, try a new run with "
        "--dtype float32."
    ),
}


def remedy(status: str, error: str = "") -> str:
    """Return what to do, as a sentence or two; empty for a status that this version does not know.

    Args:
        error: the error of the rows; it may name a command that helps.
    """
    if "; run: " in error:
        return "Run the command that the error names, then retry."
    return REMEDIES.get(status, "")
