"""Data sets that `datasets.load_dataset` streams: from the Hugging Face Hub, or from a local folder offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from configs.errors import DataError, StorageError, TelarError
from configs.schema import CorpusSection
from data.templates import where

if TYPE_CHECKING:
    import pyarrow as pa

HUB = "hf://"
BATCH_ROWS = 256


def resolve(corpus: CorpusSection, split: str, field: str) -> tuple[str, str]:
    """(name to load, version) of a split: a local folder and the sizes and times of its files, or Hub name and commit.

    Raises DataError, with `field` in front, when there is no such data set or split.
    """
    if not corpus.path.startswith(HUB):
        folder = Path(corpus.path)
        if not folder.is_dir():
            raise DataError(
                f"{field}: {corpus.path} is no folder; kind 'hf' takes a local folder, or {HUB}OWNER/NAME for the Hub"
            )
        files = sorted(
            (path.relative_to(folder).as_posix(), path.stat()) for path in folder.rglob("*") if path.is_file()
        )
        listing = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files)
        name, version = str(folder), xxhash.xxh3_128_hexdigest(listing.encode())
    else:
        name, version = _on_hub(corpus, field)
    _check_split(corpus, name, split, field)
    return name, version


def tables(corpus: CorpusSection, name: str, split: str) -> Iterator[pa.Table]:
    """Tables of at most BATCH_ROWS rows, streamed; images and other media stay undecoded."""
    with _Errors(corpus, name):
        yield from _stream(corpus, name, split).with_format("arrow").iter(BATCH_ROWS)


def _on_hub(corpus: CorpusSection, field: str) -> tuple[str, str]:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    name, _, revision = corpus.path.removeprefix(HUB).partition("@")
    try:
        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision or None).sha
    except (HFValidationError, OfflineModeIsEnabled, _http_error(), OSError) as error:
        raise DataError(
            f"{field}: the Hugging Face Hub gives no data set {name!r} ({type(error).__name__}: {_first_line(error)}); "
            "correct the name, set HF_TOKEN for one that is not public, or download it and name the local folder"
        ) from error
    return f"{HUB}{name}@{commit}", str(commit)


def _check_split(corpus: CorpusSection, name: str, split: str, field: str) -> None:
    import datasets

    with _Errors(corpus, name):
        there = datasets.get_dataset_split_names(**_arguments(corpus, name))
    if split not in there:
        raise DataError(f"{field}: {corpus.path} has no split {split!r}; splits there: {', '.join(sorted(there))}")


def _stream(corpus: CorpusSection, name: str, split: str) -> Any:
    import datasets

    arguments = _arguments(corpus, name)
    arguments["name"] = arguments.pop("config_name")
    return datasets.load_dataset(split=split, streaming=True, **arguments)


def _arguments(corpus: CorpusSection, name: str) -> dict[str, Any]:
    path, _, revision = name.removeprefix(HUB).partition("@") if name.startswith(HUB) else (name, "", "")
    return {"path": path, "config_name": corpus.subset, "revision": revision or None}


class _Errors:
    """Turns what the library raises into errors that name the corpus: DataError for unusable input, StorageError for a
    Hub that cannot be reached.
    """

    def __init__(self, corpus: CorpusSection, name: str) -> None:
        self._corpus, self._name = corpus, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        import datasets
        import pyarrow as pa

        if error is None or isinstance(error, TelarError):
            return
        subset = f" (subset {self._corpus.subset})" if self._corpus.subset else ""
        said = f"{where(self._corpus, 'path')}: datasets.load_dataset cannot read {self._name}{subset}: "
        network = (ConnectionError, TimeoutError, _http_error())
        if self._name.startswith(HUB) and isinstance(error, network):
            raise StorageError(
                f"{said}{_first_line(error)}; run the same command again, which keeps what is prepared already, or "
                "download the data set and name the local folder"
            ) from error
        expected = (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError)
        if isinstance(error, expected):
            raise DataError(f"{said}{_first_line(error)}; correct path, subset or split") from error


def _http_error() -> type[BaseException]:
    """Base of the errors of the HTTP library, which is another one from version to version of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
