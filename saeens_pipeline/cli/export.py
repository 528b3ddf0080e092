"""`saeens export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import DictionaryName, notify, print_line
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root

ExportFormat = Literal["sae_lens", "dictionary_learning", "sparsify", "neuronpedia"]


@app.command()
def export(
    subject: DictionaryName,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that does not exist yet, or is empty.")],
    to: Annotated[ExportFormat, typer.Option("--to", help="Format of the tool that is to load it.")] = "sae_lens",
) -> None:
    """Write an SAE or an ensemble for another tool, with equal codes and reconstructions; for neuronpedia, dashboards of its features."""
    import saeens_models as sm
    from saeens_models import interop
    from saeens_models.interop.saelens_folder import ENSEMBLE_ARCHITECTURE
    from saeens_pipeline.assets.lineage import find_dictionary
    from saeens_pipeline.orchestration.catalogue import Catalogue

    catalogue = Catalogue.load()
    declarations = [output for op in catalogue.all_ops() for output in op.outputs]
    store = Store(data_root())
    found = find_dictionary(store, declarations, subject)
    path = found.artefact.path
    sae = sm.load_ensemble(path) if found.artefact.recipe["builder"] == "ensemble" else sm.load_sae(path)
    try:
        if to == "neuronpedia":
            from saeens_pipeline.report.neuronpedia import write_neuronpedia

            write_neuronpedia(store, found, catalogue.experiment(found.address.owner).source, sae.metadata, folder)
        else:
            interop.export(sae, to, folder, {"saeens_asset": str(found.address), "saeens_data_version": found.artefact.data_version})
    except ValueError as error:
        raise ConfigurationError(f"{found.place}: {error}") from error
    print_line(str(folder))
    if to == "sae_lens" and json.loads((folder / "cfg.json").read_text(encoding="utf-8"))["architecture"] == ENSEMBLE_ARCHITECTURE:
        notify("note", "SAELens loads it after `import saeens_models.interop.sae_lens`")
