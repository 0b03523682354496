"""What the tests of several systems ask of an export."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from jaxrec.export import ExportConfig, load, write_artefact
from jaxrec.run import Run
from jaxrec.systems.recommender import GenerativeRecommender


def check_same_answers(model: GenerativeRecommender, run: Run, folder: Path, events: dict[str, np.ndarray]) -> None:
    """An export of a run's model into `folder` gives the model's first five items after one history."""
    item_ids = pq.read_table(run.tables / "items.parquet")["item_id"].to_pylist()
    write_artefact(model, item_ids, folder, ExportConfig(k=5, platforms=("cpu",)))
    artefact = load(folder)
    found = artefact.retrieve(artefact.prepare([events]))
    items, scores = model.recommend([events], 5)
    np.testing.assert_array_equal(found["items"], items)
    np.testing.assert_allclose(found["scores"], scores, atol=1e-5)
