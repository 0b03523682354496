"""The catalogue that changes while it is served: items are added, removed and updated between two requests.

- `live.py`: the served catalogue and its versions.
- `version.py`: one version, and the masks of filters over it.
- `changes.py`: checks of the arguments of a change.
- `predicates.py`: filters over the columns of a catalogue.
- `background.py`: work at a lower priority than requests.
"""

from jaxrec.catalogue.live import LiveCatalogue
from jaxrec.catalogue.version import Version

__all__ = ["LiveCatalogue", "Version"]
