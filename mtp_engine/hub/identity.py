"""Which weights these are, without reading all of them."""

from hashlib import sha256

from mtp_engine.hub.hub import ModelFiles

_SAMPLES, _SAMPLE_BYTES = 64, 16384  # of each file


def weights_identity(files: ModelFiles) -> str:
    """A hash of names, sizes and samples of a model's weight files: retraining changes nearly every value of a matrix, so
    samples tell models apart; they do not prove that a file is undamaged."""
    found = sha256()
    folders = [files.folder, *([files.mtp_folder] if files.mtp_folder else [])]
    for file in sorted({file for folder in folders for file in folder.glob("*.safetensors")}):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for index in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                found.update(stream.read(_SAMPLE_BYTES))
    return found.hexdigest()
