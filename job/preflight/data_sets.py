"""DATASETS and EVAL_DATASETS in; each one's shape out, or what preparation would refuse. Only first rows are read."""

from functools import partial
from pathlib import Path

from job.data.peek import Glimpse, glimpse
from job.data.remote import hurry
from job.errors import JobError, SettingsError
from job.events import Need
from job.preflight.outcome import WARNING, Found, first_error, start
from job.settings import DatasetSpec, DataSettings, Where


def check_data_sets(data: DataSettings, work_dir: Path, store_folder: Path | None) -> Found:
    """Look into every data set, at the same time.

    Args:
        work_dir: WORK_DIR; downloads and prepared data go there.
        store_folder: the store when it is a folder: it gets the prepared data too.

    Raises:
        SettingsError, DataError, NetworkError: as preparation would; several of a kind in one.
    """
    hurry()
    specs = list({str(spec): spec for spec in (*data.datasets, *data.eval_datasets)}.values())
    seen: dict[str, Glimpse] = {}
    results = start({str(spec): partial(_look, spec, work_dir, seen) for spec in specs})(None)
    errors = [result.error for result in results if result.error is not None]
    if errors:
        raise _together(errors)
    needs = [need for spec in specs for need in _needs(spec, seen[str(spec)], data, work_dir, store_folder)]
    deep = [str(spec) for spec in specs if seen[str(spec)].layout is None]
    if deep:
        return Found(text=f"{WARNING}{', '.join(deep)}: its first rows are too far in it to be looked at", needs=tuple(needs))
    shown = "; ".join(result.found for result in results[:3])
    more = f" and {len(results) - 3} more" if len(results) > 3 else ""
    return Found(text=f"{shown}{more}", needs=tuple(needs))


def _look(spec: DatasetSpec, work_dir: Path, seen: dict[str, Glimpse]) -> str:
    seen[str(spec)] = found = glimpse(spec, work_dir)
    return f"{Path(spec.where).name}: {found.layout}"


def _together(errors: list[JobError]) -> JobError:
    first = first_error(errors)
    assert first is not None
    if isinstance(first, SettingsError):
        return first
    return type(first)("\n".join(str(error) for error in errors if type(error) is type(first)))


def _needs(spec: DatasetSpec, found: Glimpse, data: DataSettings, work_dir: Path, store_folder: Path | None) -> list[Need]:
    if found.num_bytes is None:
        return []
    needs = []
    if spec.kind in (Where.S3, Where.HTTP):
        needs.append(
            Need(setting="WORK_DIR", folder=str(work_dir), what=f"the download of {spec.where}", num_bytes=found.num_bytes)
        )
    is_filtered = data.max_samples or data.max_tokens or data.language or data.keep_regex or data.drop_regex
    if not is_filtered:
        # Eight bytes a token (ids and labels) are about twice the text, and what comes packed is smaller than its text:
        # less than this is not to be expected when most rows are kept.
        places = [("WORK_DIR", work_dir), *([("OUTPUT_URI", store_folder)] if store_folder else [])]
        what = f"prepared data of {spec.where}"
        needs += [Need(setting=name, folder=str(folder), what=what, num_bytes=found.num_bytes) for name, folder in places]
    return needs
