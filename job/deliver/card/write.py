"""A report in, the README.md of an adapter or of a merged model out. Names no folder of the machine it was made on."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from job import __version__
from job.data.tally import SourceTally
from job.deliver.card.escape import cell, fenced, shortened
from job.deliver.card.licence import UNKNOWN, Licence, find_licence
from job.deliver.card.metadata import adapter_metadata, base_id, find_languages, merged_metadata
from job.deliver.card.picture import draw_curve
from job.deliver.card.reproduce import env_block
from job.deliver.report import Report
from job.settings import DatasetSpec, Settings, Where

CARD, PICTURE = "README.md", "loss.png"
MAX_SAMPLES = 8
"""Prompts whose answers are shown; report.json has all."""
MAX_QUESTION = 200
"""Characters of a prompt that stands in the card's code."""
SMALL = 1000
"""Examples; fewer teach a form rather than knowledge (arXiv 2305.11206 used 1,000 chosen ones)."""


def save_card(
    folder: Path, report: Report, settings: Settings, *, redact: Callable[[str], str], model_dir: Path | None = None
) -> None:
    """Write README.md, and the picture of the losses beside it, into the folder of an adapter.

    Args:
        redact: applied to the card.
        model_dir: the base model's folder, for its licence; the Hub is asked where it is not here.
    """
    picture = None
    with suppress(Exception):  # a card without its picture is better than a run that fails for one
        chosen = report.chosen.step if report.chosen else None
        if draw_curve(folder / PICTURE, report.curve, report.evaluations, title=redact(report.run_id), chosen_step=chosen):
            picture = PICTURE
    if picture is None:
        (folder / PICTURE).unlink(missing_ok=True)
    licence = licence_of(settings, report, model_dir)
    text = write_card(report, settings, licence=licence, picture=picture, redact=redact)
    (folder / CARD).write_text(text, "utf-8")


def licence_of(settings: Settings, report: Report, model_dir: Path | None) -> Licence:
    """The base model's licence, as far as it can be found in a few seconds."""
    folder = model_dir if model_dir is not None and model_dir.is_dir() else None
    is_on_hub = base_id(settings) is not None
    return find_licence(settings.model.model_id, folder, revision=report.model.get("revision"), ask_hub=is_on_hub)


def write_card(
    report: Report,
    settings: Settings,
    *,
    licence: Licence = UNKNOWN,
    picture: str | None = None,
    redact: Callable[[str], str] = str,
) -> str:
    """Render the card of an adapter, with the metadata that the Hub reads.

    Args:
        picture: name of the picture of the losses, beside the card.
    """
    metadata = adapter_metadata(report, settings, licence, redact=redact)
    return metadata + redact(_render("card.md.jinja", picture=picture, **_facts(report, settings, licence)))


def write_merged_card(
    report: Report, settings: Settings, *, licence: Licence = UNKNOWN, redact: Callable[[str], str] = str
) -> str:
    """Render the card of the base model with the adapter merged in."""
    adapter = report.publication.repo_id if report.publication else settings.publish.hub_model_id
    metadata = merged_metadata(report, settings, licence, adapter=adapter, redact=redact)
    return metadata + redact(_render("merged.md.jinja", adapter=adapter, **_facts(report, settings, licence)))


def _render(template: str, **facts: Any) -> str:
    environment = Environment(
        loader=PackageLoader("job.deliver.card", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "fenced": fenced, "shortened": shortened, "literal": repr}
    return environment.get_template(template).render(**facts)


def _facts(report: Report, settings: Settings, licence: Licence) -> dict[str, Any]:
    sources = _sources(report, settings)
    revisions = {str(spec): tally.revision for spec, tally in sources if spec.kind is Where.HUB and tally.revision}
    revision = report.model.get("revision")
    public, model_id = base_id(settings), settings.model.model_id
    dtype = "float32" if report.actual.device == "cpu" else "bfloat16"  # what `auto` comes to, but for GPUs before 2020
    return {
        "report": report,
        "settings": settings,
        "base": public,
        "base_name": public or PurePath(model_id).name,
        "base_path": public or ("path/to/its/folder" if model_id.endswith(".gguf") else f"path/to/{PurePath(model_id).name}"),
        "gguf_file": PurePath(model_id).name if model_id.endswith(".gguf") else None,
        "adapter_name": settings.publish.hub_model_id or "path/to/this/folder",
        "merged_name": settings.publish.merged_target or "path/to/this/folder",
        "dtype": dtype if settings.model.dtype == "auto" else settings.model.dtype,
        "revision": revision if public else None,
        "licence": licence,
        "languages": find_languages(report, settings),
        "sources": [(_name(spec), tally) for spec, tally in sources],
        "is_plain_text": bool(sources) and all(tally.shape == "text" for _, tally in sources),
        "samples": report.samples[:MAX_SAMPLES],
        "question": next((one.prompt for one in report.samples if len(one.prompt) < MAX_QUESTION), "What can you do?"),
        "env": env_block(settings, revision=revision if public else None, data_revisions=revisions),
        "is_small": report.data is not None and report.data.num_train < SMALL,
        "job_version": __version__,
    }


def _sources(report: Report, settings: Settings) -> list[tuple[DatasetSpec, SourceTally]]:
    specs = (*settings.data.eval_datasets, *settings.data.datasets)  # in the tally's order
    return list(zip(specs, report.data.sources if report.data else [], strict=False))


def _name(spec: DatasetSpec) -> str:
    """A Hub id as it is; of everything else the last part of its address."""
    return spec.where if spec.kind is Where.HUB else PurePosixPath(spec.where.partition("?")[0]).name
