"""Files of networks: write them so that equal networks give equal bytes, and read them without running code in them."""

import json
import zipfile
from pathlib import Path

import keras

from run import RunError, atomic_path


def save_model(network: keras.Model, path: Path, compression: int = zipfile.ZIP_STORED) -> None:
    """Save a network as a .keras file that depends on the network only: the date that Keras adds is removed.

    Args:
        network: The network.
        path: The file.
        compression: That of the archive, a constant of `zipfile`. Keras reads each of them.

    Raises:
        RunError: The file cannot be written.
    """
    with atomic_path(path) as unfinished:
        network.save(unfinished)
        with zipfile.ZipFile(unfinished) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        metadata = json.loads(parts["metadata.json"])
        del metadata["date_saved"]
        parts["metadata.json"] = json.dumps(metadata).encode()
        with zipfile.ZipFile(unfinished, "w") as archive:
            for name, content in parts.items():
                archive.writestr(zipfile.ZipInfo(name), content, compression)


def load_weights(network: keras.Model, path: Path) -> None:
    """Set a network's weights to those of a .keras file. Nothing else in the file is used, so no code in it can run.

    Raises:
        RunError: The file is damaged, or contains a different network.
    """
    try:
        network.load_weights(path)
    except Exception as error:  # A damaged file can raise anything.
        damaged = not zipfile.is_zipfile(path) or isinstance(error, zipfile.BadZipFile | OSError | EOFError)
        problem = "is damaged" if damaged else "contains a different network than this run's"
        raise RunError(f"{path}: {problem}; remove it to train it again, or choose another run_dir") from error


def load_model(path: Path, network_class: type[keras.Model]) -> keras.Model:
    """Load a network of a known class from a .keras file: its settings and its weights, no code.

    Args:
        path: A file that `save_model` has written.
        network_class: Class of the network, such as `model.VQVAE`.

    Raises:
        RunError: The file is missing, damaged, or contains a different network.
    """
    if not path.exists():
        raise RunError(f"{path}: no such file; finish the run first, or choose another run folder")
    try:
        with zipfile.ZipFile(path) as archive:
            saved = json.loads(archive.read("config.json"))
        if saved["class_name"] != network_class.__name__:
            raise RunError(f"{path}: contains a {saved['class_name']}, not a {network_class.__name__}; choose another")
        network = network_class(**saved["config"])
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: is damaged ({error}); train it again, or choose another run folder") from error
    load_weights(network, path)
    return network
