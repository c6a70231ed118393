"""Data sets prepared by tensorflow-datasets as array_record.

Preparing a data set needs TensorFlow, reading one does not. It is opened by its folder, offline.
"""

import contextlib
import difflib
import io
import json
import os
import re
from pathlib import Path

import numpy as np

from ddpm_jax.data.dataset import DataError, no_split, one_line
from ddpm_jax.data.pictures import Pictures, sha256

_HARD_TO_PREPARE = {
    "celeb_a": "its files are on Google Drive, which often refuses them",
    "celeb_a_hq": "its files must first be made by hand, see its page at tensorflow.org/datasets",
    "lsun": "it needs tensorflow_io too",
}


def find(name: str, root: Path, file_format: str = "array_record") -> Path | None:
    """The folder of the newest version prepared in this format, or None.

    `name` may include a config and a version, as in "lsun/church" and "mnist:3.0.1".
    """
    dataset, _, version = name.partition(":")
    for folder in _tfds_folders(root):
        infos = (folder / dataset).glob("*/dataset_info.json")
        for info in sorted(infos, key=_version, reverse=True):
            if version in ("", info.parent.name) and _file_format(info) == file_format:
                return info.parent
    return None


def pictures(folder: Path, name: str, split: str) -> Pictures:
    """The pictures of one split of a prepared data set."""
    with _explained(folder):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        features = dict(builder.info.features.items())
        images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
        key = "image" if "image" in images else "".join(images)
        if key not in images or features[key].np_dtype != np.uint8:
            raise TypeError(f"expected one uint8 feature `image`, found {builder.info.features}")
        decoders = {key: tfds.decode.SkipDecoding()}  # `pictures.decode` does it
        if split.isidentifier() and split not in builder.info.splits:  # not train[:10%]
            raise no_split(name, split, builder.info.splits)
        source = builder.as_data_source(split=split, decoders=decoders)
        class_names = tuple(getattr(features.get("label"), "names", None) or ())
    listing = sorted((path.name, path.stat().st_size) for path in folder.iterdir())
    read = _Records(source, folder, key, bool(class_names), f"{name}/{split}")
    return Pictures(read, len(source), class_names, sha256([split, *listing]))


class _Records:
    """Reads records of a prepared split, as `Pictures.read`."""

    def __init__(self, source, folder, key, labelled, name):
        self.source, self.folder, self.key, self.name = source, folder, key, name
        self.labelled = labelled

    def __call__(self, indices):
        indices = [int(i) for i in indices]
        with _explained(self.folder):
            items = self.source.__getitems__(indices)
        return [
            (io.BytesIO(item[self.key]), item["label"] if self.labelled else 0, f"{self.name}[{i}]")
            for i, item in zip(indices, items, strict=True)
        ]


@contextlib.contextmanager
def _explained(folder):
    """Turns errors of tensorflow-datasets into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"tensorflow-datasets cannot read {folder}: {one_line(error)}") from error


def _tfds_folders(root):
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return root / "tfds", root, Path(os.path.expanduser(default))


def _version(info):
    return [int(number) for number in re.findall(r"\d+", info.parent.name)]


def _file_format(info):
    try:
        return json.loads(info.read_text()).get("fileFormat", "tfrecord")
    except (ValueError, AttributeError):
        return "damaged"


def known_names(root: Path) -> list[str]:
    """Sorted names of prepared data sets, such as "lsun/church"."""
    found = {}  # {folder: name}; data_dir/tfds first, since data_dir contains it
    for parent in _tfds_folders(root):
        for pattern in ("*/*.*.*", "*/*/*.*.*"):  # name/version, name/config/version
            for info in parent.glob(f"{pattern}/dataset_info.json"):
                folder = info.parent.parent
                found.setdefault(folder, folder.relative_to(parent).as_posix())
    return sorted(set(found.values()))


def advice(name: str, root: Path, known: list[str]) -> str:
    """The error message for a data set that is neither known nor prepared, with what to do."""
    prepare = (
        f'pip install tensorflow && python -c "import tensorflow_datasets as tfds; tfds.builder('
        f"{name!r}, data_dir={str(root / 'tfds')!r}, file_format='array_record')"
        f'.download_and_prepare()"'
    )
    if reason := _HARD_TO_PREPARE.get(name.partition("/")[0]):
        prepare += f" ({reason}; image_folder:PATH reads any folder)"
    if folder := find(name, root, "tfrecord"):
        return (
            f"{folder} is prepared as tfrecord, which only TensorFlow reads; prepare it again "
            f"as array_record: {prepare}"
        )
    path = Path(os.path.expanduser(name))
    if path.is_dir() or path.is_file() or name.startswith(("/", "./", "../", "~")):
        kind = "npz" if path.suffix == ".npz" else "image_folder"
        missing = "" if path.exists() else f", and there is no {path}"
        return f"data.name is a path: did you mean {kind}:{name}?{missing}"
    near = difflib.get_close_matches(name.partition(":")[0], known, n=3)
    guess = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}."
    return (
        f"no data set {name!r} on this machine; {guess} If it is one of tensorflow-datasets, "
        f"prepare it once, which needs TensorFlow: {prepare}"
    )
