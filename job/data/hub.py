"""A Hub data set in, its data files at one commit out, to be streamed: what is not read is not downloaded.

The `datasets` library says which files a config and its splits have; the rows are read by formats.py. Data sets that
only a script can read are refused: the library runs no scripts any more. Tokens are the library's business (HF_TOKEN).
"""

import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from job.data import remote
from job.data.files import DataFile
from job.data.ranges import open_ranges
from job.data.remote import insist, listing
from job.errors import DataError, NetworkError
from job.settings.dataset_spec import DatasetSpec, data_suffixes, parse_split

_FORMATS = {"json": ("json", "jsonl"), "csv": ("csv", "tsv"), "parquet": ("parquet",), "text": ("txt",), "arrow": ("arrow",)}
"""Module of the `datasets` library -> our formats, the first where a file's name does not say it."""
_Result = TypeVar("_Result")


def resolve_hub(spec: DatasetSpec, cache_dir: Path) -> tuple[str, dict[str, list[DataFile]]]:
    """The commit that the revision means now, and the files of each split.

    Raises:
        DataError: there is no such set, config or split, access to it is refused, or nothing here can read it.
        NetworkError: the Hub did not answer after several tries.
    """
    from huggingface_hub import HfApi

    info = _ask(
        spec,
        lambda: HfApi().dataset_info(spec.where, revision=spec.revision, timeout=remote.CONNECT_SECONDS, files_metadata=True),
    )
    builder = _ask(spec, lambda: _builder(spec, info, cache_dir))
    module = type(builder).__module__.split(".")[-2]
    if module not in _FORMATS:
        raise DataError(
            f"DATASETS={spec}: its files are of the kind {module!r}, which holds no text to learn; "
            f"readable kinds: {', '.join(_FORMATS)}"
        )
    splits = {str(name): [str(file) for file in files] for name, files in (builder.config.data_files or {}).items()}
    for part in parse_split(spec.split):
        if part.name not in splits:
            raise DataError(f"DATASETS={spec}: has no split {part.name!r}; the splits are {', '.join(splits) or 'none'}")
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    files = {
        part.name: [_data_file(spec, info.sha, builder.config, module, address, sizes) for address in splits[part.name]]
        for part in parse_split(spec.split)
    }
    # Repositories that are gated list their files to anybody; asking for one tells whether they may be read.
    with next(iter(files.values()))[0].open() as first:
        first.seek(0, io.SEEK_END)
    return info.sha, files


def _builder(spec: DatasetSpec, info: Any, cache_dir: Path) -> Any:
    import datasets
    import yaml

    address = f"hf://datasets/{info.id}"  # not a folder of that name here
    # A cache of its own: the library falls back to what it prepared earlier, whichever commit that was.
    where = {"revision": info.sha, "cache_dir": str(cache_dir / "hub")}
    files = [file.rfilename for file in info.siblings or []]
    try:
        return datasets.load_dataset_builder(address, spec.config, **where)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(_refusal(spec, "gated") if info.gated else f"DATASETS={spec}: {error}") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        if _is_transient(error):
            raise NetworkError(f"DATASETS={spec}: the Hub does not answer ({error})") from error
        has_data = any(data_suffixes(name)[0] for name in files)
        if "scripts are no longer supported" in str(error) or (any(name.endswith(".py") for name in files) and not has_data):
            raise DataError(
                f"DATASETS={spec}: can only be read by a script of its own, and scripts are not supported; add "
                "?revision=refs/convert/parquet (the Hub's own copy of many such sets), or name its files by https:// or s3://"
            ) from error
        if "BuilderConfig" in str(error) or "Config name is missing" in str(error):
            configs = datasets.get_dataset_config_names(address, **where)
            problem = f"has no config {spec.config!r}" if spec.config else "has several configs"
            raise DataError(f"DATASETS={spec}: {problem}; add ?config= one of {', '.join(configs)}") from error
        if isinstance(error, datasets.exceptions.DataFilesNotFoundError | datasets.data_files.EmptyDatasetError):
            raise DataError(f"DATASETS={spec}: no data files there; {listing(files)}") from error
        raise DataError(f"DATASETS={spec}: {str(error) or type(error).__name__}") from error


def _data_file(
    spec: DatasetSpec, commit: str, config: Any, module: str, address: str, sizes: Mapping[str, int | None]
) -> DataFile:
    start, _, path = address.partition(f"@{commit}/")
    repo_id = start.removeprefix("hf://datasets/")  # its name today: the one in DATASETS may be an old one
    promised, compression = data_suffixes(path)
    sample_by = spec.sample_by if spec.sample_by != "line" else getattr(config, "sample_by", "line")
    names = getattr(config, "column_names", None) or getattr(config, "names", None) or getattr(config, "columns", None)
    return DataFile(
        label=f"DATASETS={spec}: {path}",
        format=promised if promised in _FORMATS[module] else _FORMATS[module][0],
        compression=compression,
        open=partial(_open, spec, repo_id, commit, path),
        is_remote=True,
        num_bytes=sizes.get(path),
        sample_by=sample_by or "line",
        delimiter=getattr(config, "delimiter", None) or getattr(config, "sep", None),
        quotechar=getattr(config, "quotechar", None) or '"',
        columns=tuple(names) if names else None,
        field=getattr(config, "field", None),
    )


def _open(spec: DatasetSpec, repo_id: str, commit: str, path: str) -> IO[bytes]:
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repo_id, path, revision=commit, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached).open("rb")
    url = huggingface_hub.hf_hub_url(repo_id, path, repo_type="dataset", revision=commit)
    size = _ask(spec, lambda: huggingface_hub.get_hf_file_metadata(url, timeout=remote.CONNECT_SECONDS).size)
    # A range that breaks off is asked for again from there.
    return open_ranges(int(size or 0), lambda start, stop: _ask(spec, lambda: _fetch(spec, url, start, stop)))


def _fetch(spec: DatasetSpec, url: str, start: int, stop: int) -> bytes:
    """At least one byte of the range; what came before a connection broke is kept."""
    import httpx2
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=remote.CONNECT_SECONDS, follow_redirects=True) as answer:
        if answer.status_code not in (200, 206):
            answer.read()
            hf_raise_for_status(answer)
            raise NetworkError(f"DATASETS={spec}: the Hub answered {answer.status_code} to a range of a file")
        offset = start if answer.status_code == 206 else 0  # small files may come whole
        try:
            for block in answer.iter_bytes():
                data += block
                if len(data) >= stop - offset:
                    break
        except httpx2.TransportError:
            if len(data) <= start - offset:
                raise
    if len(data) <= start - offset:
        raise NetworkError(f"DATASETS={spec}: the Hub broke off before byte {start} of a file")
    return bytes(data[start - offset : stop - offset])


def _ask(spec: DatasetSpec, action: Callable[[], _Result]) -> _Result:
    """Ask the Hub, again if it does not answer, and turn its refusals into errors of ours."""
    import httpx2
    from huggingface_hub import errors

    def ask() -> _Result:
        try:
            return action()
        except errors.GatedRepoError as error:
            raise DataError(_refusal(spec, "gated")) from error
        except errors.RepositoryNotFoundError as error:
            raise DataError(_refusal(spec, "missing")) from error
        except errors.RevisionNotFoundError as error:
            raise DataError(f"DATASETS={spec}: has no revision {spec.revision!r}; see the branches on its page") from error
        except errors.OfflineModeIsEnabled as error:
            raise DataError(f"DATASETS={spec}: HF_HUB_OFFLINE is set; unset it, or name files instead") from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if _is_transient(error):
                raise NetworkError(f"DATASETS={spec}: the Hub answered {status}") from error
            advice = "HF_TOKEN is not valid" if status == 401 else "HF_TOKEN may not read it" if status == 403 else str(error)
            raise DataError(f"DATASETS={spec}: the Hub answered {status}: {advice}") from error
        except (ConnectionError, TimeoutError, httpx2.HTTPError) as error:
            raise NetworkError(f"DATASETS={spec}: the Hub does not answer ({error})") from error

    return insist(ask)


def _refusal(spec: DatasetSpec, why: str) -> str:
    page = f"https://huggingface.co/datasets/{spec.where}"
    if why == "gated":
        return f"DATASETS={spec}: is gated; accept its licence on {page}, and set HF_TOKEN to a token of the account that did"
    return f"DATASETS={spec}: there is no such data set on the Hub, or it is private and HF_TOKEN may not read it; see {page}"


def _is_transient(error: BaseException | None) -> bool:
    """Whether a server that failed or a broken connection is behind an error."""
    import httpx2

    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", 0)
        if status == 429 or status >= 500 or isinstance(cause, httpx2.TransportError | ConnectionError | TimeoutError):
            return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
