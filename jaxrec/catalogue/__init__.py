"""The catalogue that changes while it is served: items come, leave and change between two requests.

- `live.py`: a catalogue that changes while it is served, version by version.
- `version.py`: one state of a catalogue that is served, and the masks of filters over it.
- `changes.py`: what is given for a change, checked.
- `predicates.py`: filters over the columns of a catalogue.
- `background.py`: work that gives way to whoever answers requests.
"""

from jaxrec.catalogue.live import LiveCatalogue
from jaxrec.catalogue.version import Version

__all__ = ["LiveCatalogue", "Version"]
