"""What the tests of several systems ask of an export."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq

from jaxrec.export import ExportConfig, load, write_artefact
from jaxrec.run import Run
from jaxrec.systems.recommender import GenerativeRecommender

ROOT = Path(__file__).parent.parent


def check_same_answers(model: GenerativeRecommender, run: Run, folder: Path, events: dict[str, np.ndarray]) -> None:
    """An export of a run's model into `folder` gives the model's first five items after one history."""
    item_ids = pq.read_table(run.tables / "items.parquet")["item_id"].to_pylist()
    write_artefact(model, item_ids, folder, ExportConfig(k=5, platforms=("cpu",)))
    artefact = load(folder)
    found = artefact.retrieve(artefact.prepare([events]))
    items, scores = model.recommend([events], 5)
    np.testing.assert_array_equal(found["items"], items)
    np.testing.assert_allclose(found["scores"], scores, atol=1e-5)


WITHOUT_JAXREC = """
import sys, pickle
try:
    import jaxrec
except ImportError:
    pass
else:
    raise SystemExit("jaxrec can be imported")
folder, requests, batches, out = pickle.load(sys.stdin.buffer)
manifest, retrieve, item_ids = load(folder)
answers = {}
for length, arrays in requests.items():
    for batch in batches:
        answers[length, batch] = retrieve(length, {name: array[:batch] for name, array in arrays.items()})
assert not [name for name, module in sys.modules.items() if module and name.split(".")[0] in ("flax", "jaxrec")]
pickle.dump((item_ids, answers), open(out, "wb"))
"""


def snippet() -> str:
    """The code that docs/export.md gives to those without jaxrec."""
    return re.search(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)[1]


def without_the_library(
    folder: Path, requests: dict[int, dict], batches: tuple[int, ...], tmp_path: Path
) -> tuple[list[str], dict]:
    """(item ids, {(length, batch): outputs}) of an artefact in a process that can't import jaxrec.

    requests: inputs by length, of which each batch takes the first ones.
    """
    # -S leaves out the .pth file by which a checkout is installed, -P the working directory.
    environment = {**os.environ, "PYTHONPATH": str(Path(jax.__file__).parent.parent)}
    block = "import sys\nsys.modules['jaxrec'] = None  # where it is installed as a copy\n"
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", block + snippet() + WITHOUT_JAXREC],
        input=pickle.dumps((str(folder), requests, batches, str(tmp_path / "answers"))),
        capture_output=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads((tmp_path / "answers").read_bytes())
