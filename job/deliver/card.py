"""The model card: a report in, the adapter's README.md out. Names no path of the machine it was made on."""

from pathlib import PurePath

from jinja2 import Environment, PackageLoader, StrictUndefined

from job.deliver.report import Report
from job.settings import Settings, Where, is_hub_id


def write_card(report: Report, settings: Settings) -> str:
    """Render the card in Markdown, with the metadata that the Hub reads.

    Hub ids of the base model and the data sets are linked; anything local is named by its last part only.
    """
    environment = Environment(
        loader=PackageLoader("job.deliver", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    specs = (*settings.data.eval_datasets, *settings.data.datasets)  # in the tally's order
    base_model = settings.model.model_id
    return environment.get_template("card.md.jinja").render(
        report=report,
        settings=settings,
        base_model=base_model if is_hub_id(base_model) else None,
        base_model_name=base_model if is_hub_id(base_model) else PurePath(base_model).name,
        dataset_ids=sorted({spec.where for spec in specs if spec.kind is Where.HUB}),
        sources=[
            (spec.where if spec.kind is Where.HUB else PurePath(spec.where.partition("?")[0]).name, tally)
            for spec, tally in zip(specs, report.data.sources if report.data else [], strict=False)
        ],
    )
